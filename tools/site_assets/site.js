// The chapter menu of narrow screens, the place in the contents, and a copy button on code. The pages work without it.
const menu = document.getElementById("menu");
menu.addEventListener("click", () => {
  const open = document.body.classList.toggle("menu-open");
  menu.setAttribute("aria-expanded", open);
});

const toc = document.getElementById("toc");
if (toc) {
  const wide = matchMedia("(min-width: 75rem)");
  const fit = () => { toc.open = wide.matches; };
  wide.addEventListener("change", fit);
  fit();

  const links = [...toc.querySelectorAll("a[href^='#']")];
  const targets = links.map(link => document.getElementById(decodeURIComponent(link.hash.slice(1))));
  const mark = () => {
    let here = targets.findLastIndex(target => target && target.getBoundingClientRect().top < 120);
    links.forEach((link, i) => link.classList.toggle("here", i === here));
  };
  addEventListener("scroll", mark, { passive: true });
  mark();
}

for (const block of document.querySelectorAll("div.sourceCode")) {
  const button = document.createElement("button");
  button.type = "button";
  button.className = "copy";
  button.textContent = "Copy";
  button.addEventListener("click", async () => {
    await navigator.clipboard.writeText(block.querySelector("pre").innerText);
    button.textContent = "Copied";
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  });
  block.append(button);
}
