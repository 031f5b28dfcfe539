// Theme, search, the chapter menu of narrow screens, the place in the contents, and copy buttons. Pages can be read without it.
const byId = id => document.getElementById(id);
const make = (tag, properties = {}, ...children) => {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
};

// ---------------------------------------------------------------- theme
const theme = byId("theme");
if (theme) {
  const dark = () => document.documentElement.dataset.bsTheme === "dark";
  const tell = () => theme.setAttribute("aria-pressed", dark());
  theme.addEventListener("click", () => {
    const chosen = dark() ? "light" : "dark";
    const system = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
    try { // what the system asks for anyway is not remembered, so that it can be followed again
      if (chosen === system) localStorage.removeItem("pnpda-theme");
      else localStorage.setItem("pnpda-theme", chosen);
    } catch {}
    showTheme(chosen);
    tell();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", tell);
  tell();
}

// ---------------------------------------------------------------- menu and contents
const menu = byId("menu");
menu.addEventListener("click", () => {
  const open = document.body.classList.toggle("menu-open");
  menu.setAttribute("aria-expanded", open);
});
const sidebar = byId("sidebar");
const active = sidebar.querySelector(".active");
if (active && matchMedia("(min-width: 60rem)").matches) {
  sidebar.scrollTop = active.getBoundingClientRect().top - sidebar.getBoundingClientRect().top - sidebar.clientHeight / 2;
}

const toc = byId("toc");
if (toc) {
  const wide = matchMedia("(min-width: 75rem)");
  const fit = () => { toc.open = wide.matches; };
  wide.addEventListener("change", fit);
  fit();

  const links = [...toc.querySelectorAll("a[href^='#']")];
  const targets = links.map(link => byId(decodeURIComponent(link.hash.slice(1))));
  let last = -1;
  const mark = () => {
    const here = targets.findLastIndex(target => target && target.getBoundingClientRect().top < 120);
    if (here === last) return;
    links.forEach((link, i) => link.classList.toggle("here", i === here));
    if (wide.matches && here >= 0) { // a long list of contents follows the page
      const box = toc.getBoundingClientRect(), row = links[here].getBoundingClientRect();
      if (row.top < box.top + 60 || row.bottom > box.bottom - 60) toc.scrollTop += row.top - box.top - box.height / 2;
    }
    last = here;
  };
  addEventListener("scroll", mark, { passive: true });
  mark();
}

// ---------------------------------------------------------------- copy buttons, and scrolling by keyboard
for (const block of document.querySelectorAll("div.sourceCode")) {
  const button = make("button", { type: "button", className: "copy", textContent: "Copy" });
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(block.querySelector("pre").innerText.trimEnd());
      button.textContent = "Copied";
    } catch { // no permission: select it, to be copied by hand
      getSelection().selectAllChildren(block.querySelector("pre"));
      button.textContent = "Selected";
    }
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  });
  block.append(button);
}
const scrolling = () => {
  for (const box of document.querySelectorAll("pre, .table-scroll, .cell-output-display, .math.display, .numbered-equation")) {
    if (box.scrollWidth > box.clientWidth + 1) box.tabIndex = 0;
  }
};
addEventListener("load", () => window.MathJax?.startup?.promise ? MathJax.startup.promise.then(scrolling) : scrolling());

// ---------------------------------------------------------------- search
const dialog = byId("search"), text = byId("search-text"), list = byId("search-results"), state = byId("search-state");
let index, pages, chosen = -1;

const load = source => new Promise((done, failed) => {
  document.head.append(make("script", { src: source, onload: done, onerror: failed }));
});
const simple = word => word.normalize("NFKD").replace(/\p{M}/gu, "").toLowerCase();
// TwinExperiment is found as it stands, as twin and as experiment
const terms = word => {
  const parts = word.match(/\p{Lu}?\p{Ll}+|\p{Lu}+(?!\p{Ll})|\p{N}+/gu) ?? [];
  return parts.length > 1 ? [simple(word), ...parts.filter(part => part.length > 2).map(simple)] : simple(word);
};

let loading;
const prepare = () => loading ??= (async () => {
  state.textContent = "Reading the index …";
  await Promise.all([load("libs/minisearch.js"), load("libs/search-index.js")]);
  pages = searchIndex.pages;
  index = new MiniSearch({
    fields: ["heading", "page", "text", "code"], storeFields: ["file", "anchor", "heading", "page", "text", "code"], processTerm: terms,
  });
  await index.addAllAsync(searchIndex.sections.map(([page, anchor, heading, text, code], id) =>
    ({ id, file: pages[page][0], page: pages[page][1], anchor, heading, text, code })), { chunkSize: 60 });
  state.textContent = "";
})();

// a stretch of the text around the first word that was found, with those words marked
const excerpt = (record, found) => {
  const plain = simple(record.text);
  const words = found.filter(word => word.length > 1).sort((a, b) => b.length - a.length);
  const at = words.map(word => plain.indexOf(word)).filter(place => place >= 0);
  let source = record.text, start = 0;
  if (at.length) start = Math.max(0, Math.min(...at) - 60);
  else if (words.length && simple(record.code).includes(words[0])) {
    source = record.code;
    start = Math.max(0, simple(source).indexOf(words[0]) - 40);
  }
  if (start) start = source.indexOf(" ", start) + 1;
  const piece = (start ? "… " : "") + source.slice(start, start + 170).replace(/\s\S*$/, "") + (source.length > start + 170 ? " …" : "");
  return marked(piece, words);
};
const marked = (piece, words) => {
  const pattern = words.map(word => word.replace(/[.*+?^${}()|[\]\\]/g, "\\$&")).join("|");
  if (!pattern) return [piece];
  return piece.split(new RegExp(`(${pattern})`, "gi")).map((part, i) => i % 2 ? make("mark", { textContent: part }) : part);
};

const choose = place => {
  const options = list.children;
  if (!options.length) return;
  chosen = (place + options.length) % options.length;
  for (const [i, option] of [...options].entries()) option.setAttribute("aria-selected", i === chosen);
  text.setAttribute("aria-activedescendant", options[chosen].id);
  options[chosen].scrollIntoView({ block: "nearest" });
};

const ask = async () => {
  await prepare();
  const query = text.value.trim();
  const options = {
    prefix: true, fuzzy: word => word.length > 4 ? 0.2 : 0, combineWith: "AND",
    boost: { heading: 4, page: 2, code: 0.7 },
    processTerm: simple,
    // chapters before the entries that repeat their docstrings
    boostDocument: (id, term, stored) => stored.file.startsWith("api_") || stored.file === "reference.html" ? 0.6 : 1,
  };
  let results = query ? index.search(query, options) : [];
  if (query && !results.length) results = index.search(query, { ...options, combineWith: "OR" });
  list.replaceChildren(...results.slice(0, 30).map((record, i) => {
    const isEntry = record.file.startsWith("api_");
    const place = make("span", { className: "place" }, record.page);
    if (isEntry) place.append(make("span", { className: "badge-api" }, "reference"));
    const words = record.terms;
    const title = make("span", { className: "found" }, ...marked(record.heading, words));
    const link = make("a", { href: record.file + (record.anchor ? "#" + record.anchor : ""), tabIndex: -1 },
      place, title, make("span", { className: "excerpt" }, ...excerpt(record, words)));
    const item = make("li", { id: "result-" + i }, link);
    item.setAttribute("role", "option");
    link.addEventListener("click", () => dialog.close());
    return item;
  }));
  chosen = -1;
  choose(0);
  text.setAttribute("aria-expanded", results.length > 0);
  if (!results.length) text.removeAttribute("aria-activedescendant");
  state.textContent = !query ? "" : results.length ? `${results.length} section${results.length > 1 ? "s" : ""}` : `Nothing found for “${query}”`;
};

const open = () => {
  if (!dialog.open) dialog.showModal();
  text.select();
};
byId("search-open").addEventListener("click", open);
text.addEventListener("focus", () => prepare().catch(() => { state.textContent = "The index could not be read."; }));
text.addEventListener("input", ask);
text.addEventListener("keydown", event => {
  const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
  if (step) { event.preventDefault(); choose(chosen + step); }
  if (event.key === "Enter") { event.preventDefault(); list.children[chosen]?.querySelector("a").click(); }
  if (event.key === "Escape") { event.preventDefault(); dialog.close(); } // the first Esc would only empty the box
});
dialog.addEventListener("click", event => { if (event.target === dialog) dialog.close(); });
addEventListener("keydown", event => {
  const typing = /^(INPUT|TEXTAREA|SELECT)$/.test(document.activeElement?.tagName) || document.activeElement?.isContentEditable;
  if ((event.key === "/" && !typing && !event.ctrlKey && !event.metaKey && !event.altKey) || (event.key.toLowerCase() === "k" && (event.ctrlKey || event.metaKey))) {
    event.preventDefault();
    open();
  }
});
