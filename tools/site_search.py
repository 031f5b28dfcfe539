"""The index for the site's search: every section of every page, as a script that a page can load from disk.

A browser refuses `fetch` to pages that are opened as files, but it runs scripts. The words are indexed in the browser,
by MiniSearch, when the search box is opened for the first time.
"""

from __future__ import annotations

import json
import keyword
import re
import unicodedata
from html.parser import HTMLParser
from pathlib import Path

HEADINGS = ("h1", "h2", "h3", "h4")
SILENT = ("script", "style", "button", "template", "svg", "footer")
SILENT_CLASSES = {"turn", "run-chapter", "entry-links", "origin", "letters"}
VOID = ("img", "br", "hr", "input", "link", "meta", "col", "source", "wbr")
BLOCKS = ("p", "li", "td", "th", "dt", "dd", "div", "figcaption", "pre", "summary", "tr")
WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_]{2,}")


def readable_math(tex: str) -> str:
    """TeX as a reader might type it: Greek letters as such, and no commands."""

    def letter(match: re.Match[str]) -> str:
        name = match[1].removeprefix("var")
        case = "CAPITAL" if name[0].isupper() else "SMALL"
        try:
            return unicodedata.lookup(f"GREEK {case} LETTER {name.upper()}") + " "
        except KeyError:
            return " " if len(name) > 2 else ""

    tex = re.sub(r"\\math\w+|\\bar\b", "", tex)
    tex = re.sub(r"\\(?:tag|begin|end)\{[^}]*\}|\\[()\[\]]", " ", tex)
    return " ".join(re.sub(r"[{}$&\\]", "", re.sub(r"\\([A-Za-z]+)", letter, tex)).split())


class Sections(HTMLParser):
    """Collects what stands in `<main>`, one record for each heading."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.stack: list[tuple[str, str]] = []  # tag, what it is for us
        self.sections: list[dict[str, str]] = []
        self.anchors: list[str] = []
        self.math = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {key: value or "" for key, value in attrs}
        classes = values.get("class", "").split()
        role = ""
        if tag == "main":
            role = "main"
        elif tag in SILENT or SILENT_CLASSES & set(classes) or (tag == "summary" and not classes):
            role = "silent"
        elif tag == "section":
            self.anchors.append(values.get("id", ""))
            role = "section"
        elif tag in HEADINGS:
            role = "heading"
            if self.inside("main"):
                anchor = values.get("id") or (self.anchors[-1] if self.anchors else "")
                self.sections.append({"anchor": "" if tag == "h1" else anchor, "heading": "", "text": "", "code": ""})
        elif tag == "pre":
            role = "code"
        elif tag == "span" and "math" in classes:
            role, self.math = "math", ""
        if tag in BLOCKS and self.sections:
            self.sections[-1]["text"] += " "
        if tag not in VOID:
            self.stack.append((tag, role))

    def inside(self, *roles: str) -> bool:
        return any(role in roles for _, role in self.stack)

    def handle_endtag(self, tag: str) -> None:
        while any(open_tag == tag for open_tag, _ in self.stack):
            closed, role = self.stack.pop()
            if role == "section":
                self.anchors.pop()
            elif role == "math" and self.sections:
                self.sections[-1]["heading" if self.inside("heading") else "text"] += f" {readable_math(self.math)} "
            if closed == tag:
                break

    def handle_data(self, data: str) -> None:
        if not self.sections or not self.inside("main") or self.inside("silent"):
            return
        if self.inside("math"):
            self.math += data
        else:
            key = "heading" if self.inside("heading") else "code" if self.inside("code") else "text"
            self.sections[-1][key] += data


def sections_of(page: str) -> list[dict[str, str]]:
    """The sections of one page's HTML: `anchor`, `heading`, `text`, and the identifiers in its `code`."""
    parser = Sections()
    parser.feed(page)
    for section in parser.sections:
        names = dict.fromkeys(WORD.findall(section["code"]))
        section["code"] = " ".join(name for name in names if not keyword.iskeyword(name))
        section["heading"], section["text"] = (" ".join(section[key].split()) for key in ("heading", "text"))
    return parser.sections


def write_index(site: Path) -> int:
    """Index all pages of `site` but those of sources, which repeat the chapters; returns the number of sections."""
    pages: list[list[str]] = []
    records: list[list[str | int]] = []
    for path in sorted(site.glob("*.html")):
        if path.name.startswith("source_"):
            continue
        sections = sections_of(path.read_text(encoding="utf-8"))
        if not sections:
            continue
        for section in sections:
            records.append([len(pages), section["anchor"], section["heading"], section["text"], section["code"]])
        pages.append([path.name, sections[0]["heading"]])
    content = json.dumps({"pages": pages, "sections": records}, ensure_ascii=False, separators=(",", ":"))
    (site / "libs" / "search-index.js").write_text(f"window.searchIndex = {content};\n", encoding="utf-8")
    return len(records)
