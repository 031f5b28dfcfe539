"""Open every page of a built site in a browser and say what is wrong: `python tools/check_site.py _site [--only twin.html]`.

Pages are opened as files, offline, at 1400×1000 (light, then dark) and at 390×844. One line for each page and problem,
and exit status 1 if there is any. Needs `chromium` (or its path in CHROMIUM) and the `playwright` package.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urldefrag, urlparse

from playwright.async_api import TimeoutError, async_playwright

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
WIDE, NARROW = {"width": 1400, "height": 1000}, {"width": 390, "height": 844}
CONTRAST = 4.5
QUERY, FINDS = "Gaspari", "engine.html"  # the chapter of covariances

SETTLE = """async () => {
  if (window.MathJax?.startup?.promise) await MathJax.startup.promise;
  for (const image of document.images) { image.loading = "eager"; await image.decode().catch(() => {}); }
}"""

CONTENT = """() => {
  const bad = [], all = selector => [...document.querySelectorAll(selector)];
  const name = e => e.tagName.toLowerCase() + (e.id ? "#" + e.id : "") + (e.className && e.className.split ? "." + e.className.split(" ").join(".") : "");
  for (const image of document.images) {
    const what = (image.getAttribute("src") ?? "").slice(0, 60);
    if (!image.naturalWidth) bad.push("the image " + what + " did not load");
    if (!image.alt.trim() || /^(figure|image|plot)( drawn.*)?$/i.test(image.alt.trim())) bad.push("the image " + what + " has no text instead of it");
  }
  const set = all("mjx-container").length, math = all("span.math").length;
  if (set < math) bad.push(`${math - set} of ${math} formulas are not typeset`);
  for (const e of all("[data-mml-node='merror']")) bad.push("MathJax: " + (e.getAttribute("data-mjx-error") ?? "error"));
  if (!document.documentElement.lang) bad.push("no language is given");
  if (!document.title.trim()) bad.push("no title");
  for (const part of ["header", "nav", "main", "footer"]) if (!document.querySelector(part)) bad.push("no landmark <" + part + ">");
  if (all("h1").length !== 1) bad.push(all("h1").length + " headings of the first level");
  let level = 0;
  for (const heading of all("main h1, main h2, main h3, main h4, main h5, main h6")) {
    const next = +heading.tagName[1];
    if (next > level + 1) bad.push(`the heading “${heading.textContent.trim().slice(0, 40)}” skips from level ${level} to ${next}`);
    level = next;
  }
  for (const table of all("main table")) if (!table.querySelector("th")) bad.push("a table has no headers");
  for (const e of all("button, a[href], summary")) {
    if (!(e.getAttribute("aria-label") ?? e.textContent).trim() && !e.querySelector("img[alt]") && e.tabIndex >= 0) bad.push(name(e) + " has no name");
  }
  const ids = all("[id]").map(e => e.id), twice = ids.filter((id, i) => ids.indexOf(id) !== i);
  if (twice.length) bad.push("an id is used twice: " + [...new Set(twice)].slice(0, 3).join(", "));
  return { bad, ids, links: all("a[href]").map(a => a.href) };
}"""

OVERFLOW = """() => {
  const root = document.documentElement;
  const spills = e => {
    const box = e.getBoundingClientRect();
    if (!box.width || box.right <= innerWidth + 1) return false;
    for (let up = e.parentElement; up && up !== document.body; up = up.parentElement) if (getComputedStyle(up).overflowX !== "visible") return false;
    return true;
  };
  const wide = [...document.querySelectorAll("main *, footer *")].filter(spills).slice(0, 2).map(e => e.tagName.toLowerCase() + "." + (e.className.baseVal ?? e.className));
  const bad = wide.map(e => "stands out of the page: " + e);
  if (root.scrollWidth > innerWidth) bad.push(`the page scrolls sideways: ${root.scrollWidth} px of ${innerWidth}`);
  return bad;
}"""

# every colour of text on its background; what a picture or a canvas shows is not text
COLOURS = """() => {
  const parse = text => {
    const numbers = text.match(/-?[\\d.]+(e-?\\d+)?/g)?.map(Number) ?? [0, 0, 0, 0];
    const scale = text.startsWith("color(") ? 255 : 1;
    return [...numbers.slice(0, 3).map(x => x * scale), numbers[3] ?? 1];
  };
  const over = ([r, g, b, a], below) => [r, g, b].map((x, i) => a * x + (1 - a) * below[i]);
  const light = rgb => {
    const [r, g, b] = rgb.map(x => x / 255).map(x => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const grounds = new Map();
  const ground = e => {
    if (!e) return over(parse(getComputedStyle(document.documentElement).backgroundColor), [255, 255, 255]);
    if (!grounds.has(e)) grounds.set(e, over(parse(getComputedStyle(e).backgroundColor), ground(e.parentElement)));
    return grounds.get(e);
  };
  const seen = new Map();
  for (const e of document.querySelectorAll("body, body *")) {
    const own = e.tagName.toLowerCase() === "mjx-container" || [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim());
    if (!own || e.closest("svg, script, style, template, dialog:not([open]), [aria-hidden='true'], mjx-assistive-mml") || !e.checkVisibility()) continue;
    const style = getComputedStyle(e), back = ground(e), front = over(parse(style.color), back);
    const [high, low] = [light(front), light(back)].sort((a, b) => b - a);
    const kind = e.tagName.toLowerCase() + (e.classList[0] ? "." + e.classList[0] : "");
    const key = kind + style.color + back.join();
    if (!seen.has(key)) seen.set(key, [(high + 0.05) / (low + 0.05), kind, style.color]);
  }
  return [...seen.values()];
}"""

FOCUS = """() => {
  const e = document.activeElement, style = getComputedStyle(e), box = e.getBoundingClientRect();
  const ring = (style.outlineStyle !== "none" && parseFloat(style.outlineWidth) > 0) || style.boxShadow !== "none";
  return { body: e === document.body, skip: e.classList.contains("skip"), ring, seen: box.right > 0 && box.bottom > 0 && box.width > 0,
    name: e.tagName.toLowerCase() + (e.id ? "#" + e.id : "") + " " + e.textContent.trim().slice(0, 20) };
}"""

# each control to its other end: the picture must become another one, and back
EXPLORERS = """async () => {
  const bad = [], wait = () => new Promise(done => setTimeout(done, 60));
  const shown = figure => [...figure.querySelectorAll("img, canvas")].filter(e => e.checkVisibility()).map(e => e.src ?? e.toDataURL()).join();
  const all = [...document.querySelectorAll(".explorer")];
  for (const [i, figure] of all.entries()) {
    const controls = [...figure.querySelectorAll("input[type=range], select")];
    if (!controls.length) bad.push(`explorer ${i + 1} has nothing to move`);
    for (const control of controls) {
      if (!control.labels?.length && !control.getAttribute("aria-label")) bad.push(`explorer ${i + 1}: a control has no label`);
      const before = shown(figure), value = control.value, options = control.options && [...control.options].map(o => o.value);
      const ends = options ? [options.at(-1), options[0]] : [control.max || "100", control.min || "0"];
      control.value = ends.find(end => end !== value);
      const change = () => ["input", "change"].forEach(type => control.dispatchEvent(new Event(type, { bubbles: true })));
      change();
      await wait();
      if (!before || shown(figure) === before) bad.push(`explorer ${i + 1}: moving a control does not change the picture`);
      control.value = value;
      change();
      await wait();
    }
  }
  return [all.length, bad];
}"""


class Checker:
    """Opens pages, and keeps what was found wrong by page."""

    def __init__(self, site: Path, browser: Any, shots: Path | None):
        self.site, self.browser, self.shots = site, browser, shots
        self.problems: list[tuple[str, str]] = []
        self.ids: dict[str, set[str]] = {}
        self.links: dict[str, set[str]] = {}
        self.lowest: dict[str, tuple[float, str]] = {}
        self.explorers = 0

    def say(self, page: str, what: str) -> None:
        if (page, what) not in self.problems:
            self.problems.append((page, what))

    async def open(self, context: Any, name: str) -> Any:
        page = await context.new_page()
        page.on("console", lambda m: m.type in ("error", "warning") and self.say(name, f"console {m.type}: {m.text[:200]}"))
        page.on("pageerror", lambda error: self.say(name, f"script error: {str(error)[:200]}"))
        page.on("requestfailed", lambda r: self.say(name, f"failed: {r.url[:120]}"))
        page.on(
            "request",
            lambda r: r.url.startswith(("file:", "data:", "blob:")) or self.say(name, f"asks the network for {r.url[:120]}"),
        )
        await page.goto((self.site / name).as_uri(), wait_until="load", timeout=90_000)
        await page.evaluate(SETTLE)
        return page

    async def shot(self, page: Any, name: str, view: str) -> None:
        if self.shots:
            await page.screenshot(path=self.shots / f"{Path(name).stem}-{view}.png")

    async def contrast(self, page: Any, name: str, theme: str) -> None:
        for ratio, kind, colour in await page.evaluate(COLOURS):
            if ratio < CONTRAST:
                self.say(name, f"contrast {ratio:.2f} of {kind} ({colour}), {theme}")
            if ratio < self.lowest.get(theme, (99.0, ""))[0]:
                self.lowest[theme] = ratio, f"{kind} in {name}"

    async def wide(self, name: str) -> None:
        context = await self.browser.new_context(viewport=WIDE, offline=True, color_scheme="light")
        page = await self.open(context, name)
        content = await page.evaluate(CONTENT)
        self.ids[name], self.links[name] = set(content["ids"]), set(content["links"])
        for what in [*content["bad"], *(await page.evaluate(OVERFLOW))]:
            self.say(name, what)
        count, bad = await page.evaluate(EXPLORERS)
        self.explorers += count
        for what in bad:
            self.say(name, what)
        await self.contrast(page, name, "light")
        await self.shot(page, name, "1400-light")
        for number in range(6):
            await page.keyboard.press("Tab")
            focus = await page.evaluate(FOCUS)
            if focus["body"] or not (focus["ring"] and focus["seen"]):
                self.say(
                    name,
                    f"the keyboard's focus is not seen on {focus['name'] if not focus['body'] else 'its way through the page'}",
                )
            if number == 0 and not focus["skip"]:
                self.say(name, "the first Tab does not lead to the link that skips to the text")
        await page.emulate_media(color_scheme="dark")
        followed = "!document.getElementById('theme') || document.documentElement.dataset.bsTheme === 'dark'"
        try:
            await page.wait_for_function(followed, timeout=5_000)
        except TimeoutError:
            self.say(name, "does not follow the system to the dark")
        await self.contrast(page, name, "dark")
        await self.shot(page, name, "1400-dark")
        await context.close()

    async def narrow(self, name: str) -> None:
        context = await self.browser.new_context(viewport=NARROW, offline=True, color_scheme="light")
        page = await self.open(context, name)
        for what in await page.evaluate(OVERFLOW):
            self.say(name, f"{what} (390 px)")
        await self.shot(page, name, "390-light")
        await context.close()

    async def theme(self, name: str) -> None:
        """Dark from the first paint, a button that changes it, and a memory of it."""
        context = await self.browser.new_context(viewport=WIDE, offline=True, color_scheme="dark")
        theme = "document.documentElement.dataset.bsTheme"
        await context.add_init_script(f"addEventListener('DOMContentLoaded', () => {{ window.firstTheme = {theme}; }})")
        page = await self.open(context, name)
        if await page.locator("#theme").count():
            if await page.evaluate("window.firstTheme") != "dark":
                self.say(name, "a dark system sees a flash of light")
            await page.click("#theme")
            if await page.evaluate(theme) != "light":
                self.say(name, "the button does not change the theme")
            await page.reload()
            if await page.evaluate(theme) != "light":
                self.say(name, "the theme that was chosen is forgotten")
        await context.close()

    async def search(self, name: str) -> None:
        """From the keyboard alone, at both widths; the index is read only then."""
        for view in (WIDE, NARROW):
            context = await self.browser.new_context(viewport=view, offline=True)
            page = await self.open(context, name)
            if await page.evaluate("typeof window.searchIndex") != "undefined":
                self.say(name, "reads the search index before anybody searches")
            await page.keyboard.press("/")
            await page.keyboard.type(QUERY)
            try:
                await page.wait_for_selector("#search-results li", timeout=20_000)
                found = await page.eval_on_selector_all("#search-results a", "links => links.map(a => a.getAttribute('href'))")
                if not any(link.startswith(FINDS) for link in found[:5]):
                    self.say(name, f"the search for {QUERY} does not lead to {FINDS} but to {found[:3]}")
                for what in await page.evaluate(OVERFLOW):
                    self.say(name, f"search: {what} ({view['width']} px)")
                await self.contrast(page, name, "light")
                await page.emulate_media(color_scheme="dark")
                await self.contrast(page, name, "dark")
                await self.shot(page, name, f"search-{view['width']}")
                await page.keyboard.press("ArrowDown")
                await page.keyboard.press("Enter")
                await page.wait_for_url(lambda url: Path(urlparse(url).path).name == found[1].partition("#")[0], timeout=10_000)
                await page.keyboard.press("Control+k")
                await page.keyboard.press("Escape")
                if await page.locator("#search[open]").count():
                    self.say(name, "Esc does not close the search")
            except Exception as error:
                self.say(name, f"the search for {QUERY} fails at {view['width']} px: {str(error).splitlines()[0]}")
            await context.close()

    def check_links(self) -> None:
        """Links that stay in the site must lead to a file, and to a place in it."""
        for name, links in self.links.items():
            for link in links:
                address, anchor = urldefrag(link)
                if not address.startswith("file:"):
                    continue
                path = Path(unquote(urlparse(address).path))
                if not path.exists():
                    self.say(path.name, "does not exist, but pages link to it")
                elif anchor and path.name in self.ids and unquote(anchor) not in self.ids[path.name]:
                    self.say(name, f"a link goes to #{unquote(anchor)} in {path.name}, which is not there")


async def check(site: Path, only: list[str], shots: Path | None, workers: int) -> Checker:
    names = sorted(path.name for path in site.glob("*.html") if not only or path.name in only)
    async with async_playwright() as driver:
        browser = await driver.chromium.launch(executable_path=chromium(), args=FLAGS)
        checker = Checker(site, browser, shots)
        first = "index.html" if "index.html" in names else names[0]
        jobs = [(checker.search, first), (checker.theme, first)]
        jobs += [(job, name) for name in names for job in (checker.wide, checker.narrow)]

        async def work() -> None:
            while jobs:
                job, name = jobs.pop(0)
                try:
                    await job(name)
                except Exception as error:
                    checker.say(name, f"could not be checked ({job.__name__}): {str(error).splitlines()[0]}")

        await asyncio.gather(*(work() for _ in range(workers)))
        await browser.close()
    checker.check_links()
    return checker


def chromium() -> str | None:
    return os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")


def main() -> int:
    parser = argparse.ArgumentParser(description="Open every page of a built site in a browser and say what is wrong.")
    parser.add_argument("site", type=Path)
    parser.add_argument("--only", nargs="+", metavar="PAGE", default=[], help="check these pages only, for example twin.html")
    parser.add_argument("--shots", type=Path, metavar="DIR", help="leave a picture of every view there")
    parser.add_argument("--workers", type=int, default=max(2, os.cpu_count() or 2), help="pages that are open at a time")
    options = parser.parse_args()
    site = options.site.resolve()
    missing = [name for name in options.only if not (site / name).is_file()]
    if missing or not any(site.glob("*.html")):
        print(f"check_site: no page {', '.join(missing)} in {site}", file=sys.stderr)
        return 1
    if not chromium():
        print("check_site: chromium is not installed", file=sys.stderr)
        return 1
    if options.shots:
        options.shots.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    checker = asyncio.run(check(site, options.only, options.shots, options.workers))
    for page, what in sorted(checker.problems):
        print(f"{page}: {what}")
    lowest = ", ".join(f"{ratio:.2f} {theme} ({where})" for theme, (ratio, where) in sorted(checker.lowest.items()))
    print(
        f"{site.name}: {len(checker.ids)} pages, {sum(map(len, checker.links.values()))} links, {checker.explorers} explorers,"
        f" lowest contrast {lowest}; {len(checker.problems)} problem(s), {time.perf_counter() - start:.0f} s"
    )
    return 1 if checker.problems else 0


if __name__ == "__main__":
    sys.exit(main())
