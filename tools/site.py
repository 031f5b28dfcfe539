"""Render the book to static pages, offline: `python tools/site.py [--out _site] [--only 01_dynamics.ipynb]`.

The inputs are the files that Quarto reads: `_quarto.yml`, `nbs/*.ipynb`, the bibliography, the filter and the style
sheet. nbdev's own processor prepares the notebooks (it executes imports and definitions, for the API entries), their
stored outputs are taken as they are, and pandoc makes the pages. The result needs neither a server nor a network.

Three things are made here only, from the finished pages and the library's source: the index of the search (Quarto has a
search of its own), the reference, a page of entries for every module, and the pages of highlighted source that both
link to. With Quarto, entries are those that nbdev's `show_doc` puts into the chapters, and sources are those on GitHub.

Every problem is one line on stderr, and the exit status is then 1. Pages that could be made are still put in place, to
be looked at.
"""

from __future__ import annotations

import argparse
import base64
import html
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pypandoc
import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tools"))  # last: this file must not shadow the standard library's `site`
import site_reference as reference  # noqa: E402
import site_search as search  # noqa: E402

NBS = ROOT / "nbs"
ASSETS = ROOT / "tools" / "site_assets"
CACHE = ROOT / ".cache" / "site"
PACKAGES = (
    "mathjax@3.2.2",
    "bootswatch@5.3.8",
    "minisearch@7.2.0",
)  # MathJax 4 fetches its fonts while a page is shown; 3 carries them
MATHJAX = "mathjax-3.2.2/package/es5/tex-svg-full.js"  # SVG: browsers refuse web fonts to pages opened as files
MINISEARCH = "minisearch-7.2.0/package/dist/umd/index.js"
KINDS = {"fig": "Figure", "tbl": "Table", "eq": "Equation", "sec": "Section"}
CALLOUTS = ("note", "tip", "warning", "important", "caution")
MARK = ".made-by-tools-site"  # only a folder that carries it may be replaced
ANSI = re.compile(r"\x1b(?:[@-Z\\-_]|\[[0-?]*[ -/]*[@-~])")
LABEL = re.compile(
    r"^#\| *label: *[\"']?((?:fig|tbl)-[\w-]+)|\{#((?:fig|tbl|eq)-[\w-]+)[ }]|^#+ (.*?) *\{#(sec-[\w-]+)", re.MULTILINE
)

Node = dict[str, Any]


@dataclass
class Page:
    """A chapter, or a page of the reference: where it comes from, where it goes, and what can be referred to in it."""

    source: Path
    title: str
    labels: dict[str, str] = field(default_factory=dict)  # label -> its number, or a section's title
    kind: str = "chapter"  # or "index", "api", "source"
    file: str = ""  # for pages that no notebook makes
    text: str = ""  # the same: their markdown

    @property
    def name(self) -> str:
        """The page's file name: nbdev, and so every link it makes, drops a notebook's number."""
        return self.file or re.sub(r"^\d+[a-zA-Z0-9]*_", "", self.source.stem.lower()) + ".html"


@dataclass
class Book:
    config: dict[str, Any]
    pages: dict[str, Page]  # by notebook name, in file order
    order: list[str]  # notebook names in reading order
    sidebar: list[tuple[str, list[str]]]  # (part title or "", notebook names)
    doc_url: str
    out: Path
    library: reference.Library
    problems: list[str] = field(default_factory=list)
    made: list[Page] = field(default_factory=list)  # the reference
    shown: dict[str, str] = field(default_factory=dict)  # what the sidebar calls a notebook, if not by its title

    @property
    def html(self) -> dict[str, Any]:
        return self.config.get("format", {}).get("html", {})

    def problem(self, where: str, what: str) -> None:
        line = f"{where}: {what}"
        if line not in self.problems:
            self.problems.append(line)


# ---------------------------------------------------------------- the book


def read_book(out: Path) -> Book:
    """Read `_quarto.yml` and list what every notebook holds that others may refer to."""
    from nbdev.config import get_config

    settings = get_config()
    library = reference.Library(ROOT / settings.lib_path)
    book = Book(yaml.safe_load((ROOT / "_quarto.yml").read_text()), {}, [], [], "", out, library)
    book.doc_url = settings.doc_host.rstrip("/") + "/" + settings.doc_baseurl.strip("/")
    for path in sorted(NBS.glob("[!_.]*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        first = next(("".join(c["source"]) for c in cells if c["cell_type"] != "code"), "")
        title = re.search(r"^(?:# +|title: *)(.+?) *$", first, re.MULTILINE)
        if not title:
            book.problem(path.name, "has no title: its first cell should be '# Title' and '> one line'")
        page = book.pages[path.name] = Page(path, title.group(1).strip("\"'") if title else path.stem)
        page.labels = number_labels(book, path.name, cells)
    contents = book.config.get("website", {}).get("sidebar", {}).get("contents", "auto")
    if contents == "auto":
        contents = sorted(book.pages, key=lambda name: (name != "index.ipynb", name))
    for item in contents:
        section = item.get("section") if isinstance(item, dict) else None
        entries = item.get("contents", []) if section else [item]
        names = [entry["href"] if isinstance(entry, dict) else entry for entry in entries]
        book.shown |= {entry["href"]: entry["text"] for entry in entries if isinstance(entry, dict) and "text" in entry}
        for name in names:
            if name not in book.pages:
                book.problem("_quarto.yml", f"the sidebar lists {name}, which is not in nbs/")
        names = [name for name in names if name in book.pages]
        book.order += names
        if not section and book.sidebar and not book.sidebar[-1][0]:
            book.sidebar[-1][1].extend(names)
        elif names:
            book.sidebar.append((section or "", names))
    for name in book.pages.keys() - set(book.order):
        book.problem("_quarto.yml", f"the sidebar does not list {name}")
    return book


def reference_pages(book: Book) -> list[Page]:
    """The index of all names, and for every module a page of entries and a page of source, in the chapters' order."""
    library = book.library
    place = {name: number for number, name in enumerate(book.order)}
    modules = sorted(library.modules.values(), key=lambda module: (place.get(module.notebook, len(place)), module.name))
    library.modules = {module.name: module for module in modules}
    pages = [Page(ROOT, "All names", kind="index", file="reference.html", text=reference.index_markdown(library))]
    for module in modules:
        chapter, anchors = book.pages.get(module.notebook), set()
        if chapter and (ROOT / "_proc" / chapter.source.name).exists():
            text = (ROOT / "_proc" / chapter.source.name).read_text(encoding="utf-8")
            anchors = {name.lower() for name in re.findall(r"\bshow_doc\((\w+)", text)}
        link = (chapter.name, chapter.title) if chapter else None
        text = reference.module_markdown(module, library, link, anchors)
        pages.append(Page(module.path, module.name, kind="api", file=module.page, text=text))
        source = reference.page_name("source", module.name)
        pages.append(Page(module.path, module.name, kind="source", file=source, text=reference.source_markdown(module, library)))
    taken = {page.name for page in book.pages.values()}
    for page in pages:
        if page.name in taken:
            book.problem(page.name, "a notebook and the reference both make this page")
    return pages


def number_labels(book: Book, name: str, cells: list[Node]) -> dict[str, str]:
    """Number figures, tables and equations of one notebook in reading order, as Quarto does."""
    labels: dict[str, str] = {}
    for cell in cells:
        text = "".join(cell["source"])
        if re.search(r"^#\| *(hide\b|export\b|exporti\b|include: *false)", text, re.MULTILINE):
            continue
        if cell["cell_type"] == "markdown":  # what stands in code is an example, not a label
            text = re.sub(r"^(```+|~~~+).*?^\1|`[^`\n]+`", "", text, flags=re.MULTILINE | re.DOTALL)
        for code, prose, heading, section in LABEL.findall(text):
            label = code or prose or section
            if bool(code) != (cell["cell_type"] == "code"):
                continue
            if label in labels:
                book.problem(name, f"the label {label} is used twice")
            kind = label.partition("-")[0]
            count = sum(other.startswith(kind + "-") for other in labels) + 1
            labels[label] = heading if section else str(count)
    return labels


# ---------------------------------------------------------------- notebook -> markdown


def process(book: Book, only: str | None, fresh: bool) -> None:
    """Run nbdev's processor into `_proc`, in parallel; what is newer there than its notebook is kept."""
    from nbdev.serve import proc_nbs

    for name in [only] if only else book.pages:  # nbdev compares with its folder's time, and so misses edits made during a run
        done = ROOT / "_proc" / name
        if done.exists() and done.stat().st_mtime < (NBS / name).stat().st_mtime:
            done.unlink()
    for name in [only] if only else ["", *book.pages]:
        if name and not only and (ROOT / "_proc" / name).exists():
            continue
        try:  # all of them; then one by one those that were left because another one failed
            skip = rf"^(?!{re.escape(name)}$)" if name else None
            proc_nbs(
                n_workers=1 if name else min(4, os.cpu_count() or 1), force=fresh and (not name or name == only), skip_file_re=skip
            )
        except Exception as error:
            # from another process the cause comes as the text of a traceback, whose first error line says what happened
            cause = re.search(r"^\w*(?:Error|Exception)\b.*", str(error.__cause__), re.MULTILINE)
            reason = cause[0] if cause else repr(error.__cause__ or error)
            book.problem("nbdev", f"{' '.join(str(error).splitlines()[:1])} {reason}")


def notebook_markdown(book: Book, page: Page, files: Path) -> str:
    """One notebook as pandoc's markdown, its images written into `files`."""
    stored = {c["id"]: c for c in json.loads(page.source.read_text(encoding="utf-8"))["cells"] if "id" in c}
    parts = []
    for number, cell in enumerate(json.loads((ROOT / "_proc" / page.source.name).read_text(encoding="utf-8"))["cells"]):
        source = "".join(cell["source"])
        if cell["cell_type"] == "code":
            # nbdev has executed imports and definitions anew; what the author saw and stored is the truth
            outputs = stored.get(cell["id"], cell).get("outputs", [])
            parts.append(code_cell(book, page, files, f"cell-{number}", source, outputs))
        elif not source.startswith("<!-- WARNING: THIS FILE WAS AUTOGENERATED"):
            parts.append(source)
    return "\n\n".join(parts) + "\n"


def fence(text: str, attributes: str) -> str:
    """A fenced block that ends where it should, whatever is in it."""
    ticks = "`" * max([3, *(len(run) + 1 for run in re.findall(r"`{3,}", text))])
    return f"{ticks} {{{attributes}}}\n{text.rstrip()}\n{ticks}"


def code_cell(book: Book, page: Page, files: Path, name: str, source: str, outputs: list[Node]) -> str:
    """A code cell's source and stored outputs, in the divs that Quarto makes, so that style sheets fit both."""
    where = page.source.name
    lines = source.splitlines()
    count = next((i for i, line in enumerate(lines) if not line.startswith("#|")), len(lines))
    code = "\n".join(lines[count:]).strip("\n")
    try:
        options = yaml.safe_load("\n".join(line[2:].strip() for line in lines[:count])) or {}
    except yaml.YAMLError as error:
        options = {}
        line = lines[error.problem_mark.line] if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark else ""
        book.problem(where, f"cell options are not valid YAML, quote the text: {line}")
    for key in {name for name in options if sum(line.startswith(f"#| {name}:") for line in lines[:count]) > 1}:
        book.problem(where, f"a cell gives {key} twice, which Quarto refuses (nbdev adds its own to exported cells)")
    if options.get("include") is False:
        return ""
    blocks = []
    if code and options.get("echo") is not False:
        block = fence(code, ".python .cell-code")
        fold = options.get("code-fold", book.html.get("code-fold", False))
        if fold:
            summary = html.escape(str(options.get("code-summary", book.html.get("code-summary", "Code"))))
            # what carries an idea stays open however long it is; plumbing says of itself that it is to be folded
            is_open = " open" if fold == "show" and not options.get("folded") else ""
            opening = fence(f'<details class="code-fold"{is_open}><summary>{summary}</summary>', "=html")
            block = f"{opening}\n\n{block}\n\n{fence('</details>', '=html')}"
        blocks.append(block)

    label = str(options.get("label", ""))
    kind = label.partition("-")[0] if label in page.labels else "fig"
    caption = str(options.get("tbl-cap" if kind == "tbl" else "fig-cap", ""))
    # a screen reader should not read markup: a link is its text, and stars, dollars and backticks go
    alt = re.sub(r"\[([^\]]*)\]\([^)]*\)|[*$`]", r"\1", str(options.get("fig-alt", caption)))
    if not alt and any(kind.startswith("image/") for output in outputs for kind in output.get("data", {})):
        book.problem(where, f"a figure has neither fig-cap nor fig-alt, in the cell that starts with: {code.strip()[:60]!r}")
    shown = []
    if options.get("output", True) is not False:
        for number, output in enumerate(outputs):
            if output["output_type"] == "error":
                book.problem(where, f"a stored output is an error: {output['ename']}: {ANSI.sub('', output['evalue'])}")
            elif output["output_type"] != "stream" or output["name"] != "stderr" or options.get("warning") is not False:
                stem = files / f"{label or name}-{number}"
                shown.append(cell_output(book, page, stem, output, alt, options.get("output") == "asis"))
    if shown and (label in page.labels or caption):
        body = "\n\n".join(shown)
        identifier = f"#{label}" if label in page.labels else ".no-number"
        blocks.append(f"::::: {{{identifier} .quarto-{kind}}}\n{body}\n\n{caption or '[]{.no-caption}'}\n:::::")
    else:
        blocks += shown
        if label in page.labels:
            book.problem(where, f"the cell labelled {label} has no stored output")
    if options.get("output") == "asis":  # API entries: their headings must not be wrapped
        return "\n\n".join(blocks)
    return ":::::: {.cell}\n" + "\n\n".join(blocks) + "\n::::::" if blocks else ""


def cell_output(book: Book, page: Page, stem: Path, output: Node, alt: str, as_is: bool) -> str:
    """One stored output as markdown, in the richest form that a static page can show."""

    def text(data: str | list[str]) -> str:
        return ANSI.sub("", "".join(data))

    if output["output_type"] == "stream":
        if as_is:
            return text(output["text"])
        return f"::: {{.cell-output .cell-output-{output['name']}}}\n{fence(text(output['text']), '.output')}\n:::"
    data = output["data"]
    if "text/html" in data:
        # pandas repeats the same small style sheet in every table
        body = fence(re.sub(r"<style scoped>.*?</style>", "", text(data["text/html"]), flags=re.DOTALL), "=html")
    elif "application/vnd.jupyter.widget-view+json" in data:
        book.problem(page.source.name, "a widget's stored output has no HTML, so it is dead on a static page")
        return ""
    elif "text/markdown" in data:
        body = text(data["text/markdown"])
        if as_is:
            body = library_entry(book, page, body)
    elif "image/svg+xml" in data:
        body = fence(text(data["image/svg+xml"]), "=html")
    elif image := next((kind for kind in ("image/png", "image/jpeg") if kind in data), None):
        content = base64.b64decode("".join(data[image]))
        path = stem.with_name(stem.name + "." + image.partition("/")[2])
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        size = output.get("metadata", {}).get(image, {})
        if not size and image == "image/png":  # the size keeps the text still while images arrive
            size = dict(zip(("width", "height"), struct.unpack(">II", content[16:24]), strict=True))
        size_html = "".join(f' {key}="{value}"' for key, value in size.items() if key in ("width", "height"))
        source = f"{path.parent.name}/{path.name}"
        body = fence(f'<p><img src="{source}" alt="{html.escape(alt)}"{size_html} loading="lazy"></p>', "=html")
    elif "text/latex" in data:
        body = text(data["text/latex"])
    else:
        body = fence(text(data.get("text/plain", "")), ".output")
    return body if as_is else f"::: {{.cell-output .cell-output-display}}\n{body}\n:::"


def modules_of(page: Page) -> list[str]:
    """The modules that a notebook exports, below the package, in its order."""
    found = re.findall(r"#\| *(?:default_exp|exports?) +([\w.]+)", page.source.read_text(encoding="utf-8"))
    return list(dict.fromkeys(found))


def library_entry(book: Book, page: Page, text: str) -> str:
    """nbdev's entry for a name, with the signature as Python writes it, and links to our reference and source."""
    match = re.match(
        rf"-+\s+\[source\]\(\S*/{book.library.package}/([\w/]+)\.py#L\d+\)\{{.*?\}}\s+(#+) (\S+)\s+```python\n.*?\n```\n",
        text,
        re.DOTALL,
    )
    if not match:
        return text
    # the chapter's own name comes first: nbdev's link goes to any module that has one of that name
    linked = match[1].replace("/", ".").removesuffix("__init__").rstrip(".")
    entries = [book.library.inner(match[3].replace("\\", ""), module) for module in (*modules_of(page), linked)]
    entry = next(filter(None, entries), None)
    if entry is None:
        return text
    module = entry.module
    public = book.library.entry(entry.name.partition(".")[0], module)
    shown = public is not None and public.module == module
    links = ([f"[reference]({entry.target})"] if shown else []) + (
        [f"[source]({entry.source})"] if module in book.library.modules else []
    )
    doc = re.sub(r"\A\s*\*(?!\*)(.+)\*$", r"\1", text[match.end() :], count=1, flags=re.MULTILINE)  # half in italics
    names = set(re.findall(r"\b\w+(?=[:=,)])", entry.signature))
    doc = re.sub(r"\[`(\w+)`\]\([^)]*\)", lambda link: f"`{link[1]}`" if link[1] in names else link[0], doc)
    return "\n\n".join(
        [
            f"{match[2]} {match[3]} {{.entry}}",
            f"::: {{.entry-links}}\n[{entry.kind}]{{.kind}} {' '.join(links)}\n:::",
            f"``` {{.python .signature}}\n{entry.signature}\n```",
            doc.strip(),
        ]
    )


# ---------------------------------------------------------------- pandoc's document tree


def walk(node: Any, change: Any) -> Any:
    """Apply `change` to every element of the tree, inner ones first; it returns None, or a list to put instead."""
    if isinstance(node, list):
        result = []
        for child in node:
            child = walk(child, change)
            new = change(child) if isinstance(child, dict) and "t" in child else None
            result.extend([child] if new is None else new)
        return result
    return {key: walk(value, change) for key, value in node.items()} if isinstance(node, dict) else node


def raw(text: str, block: bool = True) -> Node:
    return {"t": "RawBlock" if block else "RawInline", "c": ["html", text]}


def string(text: str) -> Node:
    return {"t": "Str", "c": text}


def plain(inlines: list[Node]) -> Node:
    return {"t": "Plain", "c": inlines}


def attributes(identifier: str = "", *classes: str) -> list[Any]:
    return [identifier, list(classes), []]


def change_element(book: Book, page: Page, element: Node) -> list[Node] | None:
    """Quarto's additions to pandoc's markdown: callouts, numbers, cross-references and links between notebooks."""
    tag, content = element["t"], element.get("c")
    if tag == "Div":
        (identifier, classes, pairs), blocks = content
        if callout := next((kind for kind in CALLOUTS if f"callout-{kind}" in classes), None):
            return make_callout(callout, identifier, dict(pairs), blocks)
        if identifier.partition("-")[0] in ("fig", "tbl") or "no-number" in classes:
            return make_float(book, page, identifier, classes, blocks)
    elif tag == "Figure" and content[0][0] in page.labels and content[1][1]:
        content[1][1][0]["c"][:0] = caption_start(page, content[0][0])
    elif tag == "Table":
        make_table_caption(page, content)
        return [{"t": "Div", "c": [attributes("", "table-scroll"), [element]]}]
    elif tag in ("Para", "Plain"):
        element["c"] = tag_equations(page, content)
    elif tag == "CodeBlock":
        content[1] = content[1].strip("\n")
    elif tag == "Cite":
        return cross_reference(book, page, content[0])
    elif tag == "Link":
        return change_link(book, page, element)
    elif tag == "Image":
        content[0][2] += [["loading", "lazy"]] if "loading" not in dict(content[0][2]) else []
        copy_local(book, page, content[2][0], "image")
    return None


def make_callout(kind: str, identifier: str, options: dict[str, str], blocks: list[Node]) -> list[Node]:
    title = [string(options.get("title", kind.capitalize()))]
    if blocks and blocks[0]["t"] == "Header":
        title, blocks = blocks[0]["c"][2], blocks[1:]
    body = {"t": "Div", "c": [attributes("", "callout-body"), blocks]}
    if "collapse" in options:
        start = f'<details class="callout-fold"{"" if options["collapse"] == "true" else " open"}><summary class="callout-title">'
        inner = [raw(start), plain(title), raw("</summary>"), body, raw("</details>")]
    else:
        inner = [{"t": "Div", "c": [attributes("", "callout-title"), [plain(title)]]}, body]
    return [{"t": "Div", "c": [attributes(identifier, "callout", f"callout-{kind}"), inner]}]


def caption_start(page: Page, label: str) -> list[Node]:
    return [{"t": "Strong", "c": [string(f"{KINDS[label.partition('-')[0]]}\u00a0{page.labels[label]}:")]}, {"t": "Space"}]


def make_float(book: Book, page: Page, label: str, classes: list[str], blocks: list[Node]) -> list[Node] | None:
    """A div that ends in a paragraph, its caption, as a figure (caption below) or a table (caption above)."""
    if not blocks or blocks[-1]["t"] != "Para" or (label and label not in page.labels):
        book.problem(page.source.name, f"the block {label} should end in a paragraph, its caption")
        return None
    caption = blocks[-1]["c"]
    if caption and caption[0]["t"] == "Span" and "no-caption" in caption[0]["c"][0][1]:
        caption = []
    caption = [*(caption_start(page, label) if label else []), *caption]
    is_table = label.startswith("tbl-") or "quarto-tbl" in classes
    body, text = blocks[:-1], [raw("<figcaption>"), plain(caption), raw("</figcaption>")]
    start = f'<figure{f" id={label}" if label else ""} class="quarto-float quarto-float-{"tbl" if is_table else "fig"}">'
    return [raw(start), *(text + body if is_table else body + text), raw("</figure>")]


def make_table_caption(page: Page, content: list[Any]) -> None:
    """`: A caption {#tbl-name}` below a table gives it a name and a number."""
    blocks = content[1][1]
    inlines = blocks[-1]["c"] if blocks else []
    if inlines and inlines[-1]["t"] == "Str" and (match := re.fullmatch(r"\{#(tbl-[\w-]+)\}", inlines[-1]["c"])):
        content[0][0] = match.group(1)
        inlines.pop()
    if content[0][0] in page.labels and blocks:
        blocks[0]["c"][:0] = caption_start(page, content[0][0])


def tag_equations(page: Page, inlines: list[Node]) -> list[Node]:
    """`$$…$$ {#eq-name}` becomes an equation with that name and a number at its right."""
    result: list[Node] = []
    for inline in inlines:
        match = re.fullmatch(r"\{#(eq-[\w-]+)\}(.*)", inline["c"]) if inline["t"] == "Str" else None
        back = -2 if len(result) > 1 and result[-1]["t"] in ("Space", "SoftBreak") else -1
        if match and result and result[back]["t"] == "Math" and match.group(1) in page.labels:
            math = result[back]
            math["c"][1] = f"{math['c'][1].rstrip()} \\tag{{{page.labels[match.group(1)]}}}"
            result[back:] = [{"t": "Span", "c": [attributes(match.group(1), "numbered-equation"), [math]]}]
            result += [string(match.group(2))] if match.group(2) else []
        else:
            result.append(inline)
    return result


def cross_reference(book: Book, page: Page, citations: list[Node]) -> list[Node] | None:
    """`@fig-name` becomes a link; what is not a cross-reference is left to pandoc, as a citation."""
    result: list[Node] = []
    for citation in citations:
        label = citation["citationId"]
        kind = label.partition("-")[0].lower()
        if kind not in KINDS or "-" not in label:
            return None
        key = label[0].lower() + label[1:]
        holders = [page] if key in page.labels else [other for other in book.pages.values() if key in other.labels]
        if len(holders) != 1:
            what = "is not defined" if not holders else "is defined in several other chapters"
            book.problem(page.source.name, f"the cross-reference @{label} {what}")
            return [string(f"@{label}")]
        number = holders[0].labels[key]
        text = [] if kind == "sec" or citation["citationMode"]["t"] == "SuppressAuthor" else [string(KINDS[kind] + "\u00a0")]
        if citation["citationPrefix"]:
            text = [*citation["citationPrefix"], string("\u00a0")]
        text = [*text, string(number)]
        if holders[0] is not page and kind != "sec":
            text += [string(" in “" + holders[0].title + "”")]
        target = f"{'' if holders[0] is page else holders[0].name}#{key}"
        link = {"t": "Link", "c": [attributes("", "quarto-xref"), text, [target, ""]]}
        result += [string(", "), link] if result else [link]
        result += citation["citationSuffix"]
    return result


def change_link(book: Book, page: Page, element: Node) -> None:
    target = element["c"][2][0]
    if target.startswith(book.doc_url):  # nbdev links names in backticks to the published site
        element["c"][2][0] = target[len(book.doc_url) :].lstrip("/") or "index.html"
        element["c"][0][1].append("doclink")
    elif match := re.fullmatch(r"(?:\./)?([^/#:]+\.ipynb)(#.*)?", target):
        if match.group(1) in book.pages:
            element["c"][2][0] = book.pages[match.group(1)].name + (match.group(2) or "")
        else:
            book.problem(page.source.name, f"a link goes to {match.group(1)}, which is not in nbs/")
    elif target.partition("#")[0] not in {known.name for known in [*book.made, *book.pages.values()]}:
        copy_local(book, page, target, "link")


def copy_local(book: Book, page: Page, target: str, what: str) -> None:
    """Take a file that a page shows or links to along with the page."""
    path = target.partition("#")[0]
    if not path or re.match(r"[a-z][a-z+.-]*:|//", path):
        return
    source = (NBS / path).resolve()
    if not source.is_file() or not source.is_relative_to(NBS):
        book.problem(page.source.name, f"the {what} {path} is not a file in nbs/")
        return
    (book.out / path).parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, book.out / path)


# ---------------------------------------------------------------- pages


def pandoc(text: str, *arguments: str) -> tuple[str, str]:
    """Run pandoc on `text`; returns what it wrote and what it warned of."""
    command = [pypandoc.get_pandoc_path(), *arguments]
    done = subprocess.run(command, input=text, capture_output=True, encoding="utf-8", cwd=NBS, check=False)
    if done.returncode:
        raise RuntimeError(f"pandoc: {done.stderr.strip()}")
    return done.stdout, done.stderr


def sidebar_html(book: Book, current: Page) -> str:
    def links(pages: list[Page]) -> str:
        items = []
        for page in pages:
            here = ' class="active" aria-current="page"' if page is current else ""
            text = book.shown.get(page.source.name, page.title)
            items.append(f'<li><a href="{page.name}"{here}>{html.escape(text)}</a></li>')
        return f"<ul>{''.join(items)}</ul>"

    parts = []
    for section, names in book.sidebar:
        title = f'<p class="part">{html.escape(section)}</p>' if section else ""
        parts.append(title + links([book.pages[name] for name in names]))
    index, *others = book.made
    is_open = " open" if current.kind != "chapter" else ""
    modules = links([page for page in others if page.kind == (current.kind if current.kind == "source" else "api")])
    parts.append(f'<p class="part">Reference</p>{links([index])}')
    parts.append(f"<details{is_open}><summary>Modules</summary>{modules}</details>")
    return "".join(parts)


def themes(book: Book) -> dict[str, str]:
    """`theme: cosmo`, `theme: [cosmo, own.scss]` or `theme: {light: …, dark: …}`, as Quarto reads it: names of Bootswatch's."""
    given = book.html.get("theme", "cosmo")
    given = given if isinstance(given, dict) else {"light": given}
    return {mode: name if isinstance(name, str) else name[0] for mode, name in given.items() if mode in ("light", "dark")}


def render(book: Book, page: Page) -> str:
    """Write one page; returns the line that says so."""
    start = time.perf_counter()
    where = page.source.name
    is_chapter = page.kind == "chapter"
    files = book.out / f"{page.name.removesuffix('.html')}_files"
    markdown = notebook_markdown(book, page, files) if is_chapter else page.text
    document = json.loads(pandoc(markdown, "--from=markdown", "--to=json")[0])
    document["blocks"] = walk(document["blocks"], partial(change_element, book, page))
    headings = [block["c"] for block in document["blocks"] if block["t"] == "Header"]
    above = next((number for number, heading in enumerate(headings) if heading[0] <= 2), len(headings))
    for heading in headings[:above]:  # nbdev's entries are of the third level, also where no heading of the second is above
        heading[0] -= headings[0][0] - 2

    website = book.config.get("website", {})
    meta = document["meta"]

    def set_meta(**values: str) -> None:
        for key, value in values.items():
            meta[key.replace("_", "-")] = {"t": "MetaInlines", "c": [raw(value, block=False)]}

    set_meta(site_title=html.escape(website.get("title", "")), sidebar=sidebar_html(book, page), kind=page.kind)
    if "dark" in themes(book):
        set_meta(dark="1")
    if is_chapter:
        meta["notebook"] = {"t": "MetaString", "c": where}
    if is_chapter and where in book.order:
        place = book.order.index(page.source.name)
        for key, index in (("previous", place - 1), ("next", place + 1)):
            if 0 <= index < len(book.order):
                other = book.pages[book.order[index]]
                set_meta(**{f"{key}_page": other.name, f"{key}_title": html.escape(other.title)})
    tree = json.dumps(document["blocks"])
    if '"t": "Cite"' in tree and '["refs"' not in tree and '["references"' not in tree:  # the author may have placed it
        heading = {"t": "Header", "c": [2, attributes("references"), [string("References")]]}
        document["blocks"] += [heading, {"t": "Div", "c": [attributes("refs"), []]}]
    depth = book.html.get("toc-depth", 3) if is_chapter else 2
    arguments = ["--from=json", "--to=html5", f"--template={ASSETS / 'page.html'}", "--mathjax=libs/mathjax.js"]
    arguments += [f"--lua-filter={name}" for name in book.html.get("filters", []) if str(name).endswith(".lua")]
    arguments += ["--citeproc", "--toc", f"--toc-depth={depth}", "--section-divs", "--wrap=preserve"]
    bibliography = book.config.get("bibliography") or []
    for name in [bibliography] if isinstance(bibliography, str) else bibliography:
        if (NBS / name).is_file():
            arguments.append(f"--bibliography={name}")
        else:
            book.problem("_quarto.yml", f"the bibliography {name} is not in nbs/")
    if book.config.get("link-citations"):
        arguments += ["--metadata=link-citations:true"]
    if book.config.get("csl"):
        arguments += [f"--csl={book.config['csl']}"]
    text, warnings = pandoc(json.dumps(document), *arguments)
    for line in warnings.splitlines():
        if missing := re.search(r"citation (\S+) not found", line):
            book.problem(where, f"the citation @{missing.group(1)} is not in the bibliography")
        elif line.strip():
            book.problem(where, line.strip())
    if is_chapter:
        shutil.copyfile(page.source, book.out / where)
    elif page.kind == "source":  # lines are named as on GitHub
        text = re.sub(r'id="L-(\d+)"><a href="#L-\d+"', r'id="L\1"><a href="#L\1" tabindex="-1" aria-label="Line \1"', text)
    (book.out / page.name).write_text(text, encoding="utf-8")
    return f"{page.name:32} {time.perf_counter() - start:5.1f} s"


def mend_links(book: Book, written: list[Page]) -> None:
    """nbdev links every name in backticks to an entry. Where a chapter shows none, the reference may have one."""
    anchors: dict[str, set[str]] = {}

    def mend(page: Page, match: re.Match[str]) -> str:
        path, anchor, shown = match.groups()
        name = path or page.name
        if name not in anchors:
            there = (book.out / name).exists()
            anchors[name] = set(re.findall(r'\bid="?([^"\s>]+)', (book.out / name).read_text("utf-8"))) if there else {anchor}
        if anchor in anchors[name]:
            return match[0]
        module = next((m.name for m in book.library.modules.values() if m.name.rpartition(".")[2] + ".html" == name), "")
        entry = book.library.entry(html.unescape(re.sub(r"<[^>]+>", "", shown)), module)
        return f'<a href="{entry.target}" class="doclink">{shown}</a>' if entry else shown

    for page in written:
        if page.kind == "chapter":
            path = book.out / page.name
            text = path.read_text(encoding="utf-8")
            pattern = r'<a\s+href="([^"#:]*)#([^"]+)"\s+class="doclink">(.*?)</a>'
            path.write_text(re.sub(pattern, partial(mend, page), text, flags=re.DOTALL), encoding="utf-8")


def check_links(book: Book, written: list[Page]) -> None:
    """What a page shows must exist, and so must the places inside pages that links go to."""
    text = {page.name: (book.out / page.name).read_text(encoding="utf-8") for page in written}
    anchors = {name: set(re.findall(r'\bid="?([^"\s>]+)', page)) for name, page in text.items()}
    known = {page.name for page in [*book.pages.values(), *book.made]}
    for page in written:
        where = page.source.name if page.kind == "chapter" else page.name
        for source in re.findall(r'<img\b[^>]*\bsrc="([^":]+)"', text[page.name]):
            if not (book.out / html.unescape(source)).exists():
                book.problem(where, f"the image {source} is not there")
        for path, anchor in re.findall(r'<a\b[^>]*\bhref="([^"#:]*)#?([^":]*)"', text[page.name]):
            name = path or page.name
            if name.endswith(".html") and name not in known:
                book.problem(where, f"a link goes to {name}, which no notebook makes")
            checked = bool(anchor) and not anchor.startswith("ref-")  # citations have been checked
            if checked and name in anchors and html.unescape(anchor) not in anchors[name]:
                book.problem(where, f"a link goes to #{anchor} in {name}, which has no such heading")


def copy_assets(book: Book) -> None:
    """Put themes, MathJax, the search and our own style beside the pages; the first build fetches three packages with npm."""
    CACHE.mkdir(parents=True, exist_ok=True)
    for package in PACKAGES:
        folder = CACHE / package.replace("@", "-")
        if not folder.exists():
            print(f"fetching {package} with npm", flush=True)
            subprocess.run(["npm", "pack", "--silent", package], cwd=CACHE, check=True, stdout=subprocess.DEVNULL)
            with tarfile.open(CACHE / f"{folder.name}.tgz") as archive:
                archive.extractall(CACHE / "unpacked", filter="data")
            (CACHE / "unpacked").rename(folder)
    libs = book.out / "libs"
    libs.mkdir(parents=True, exist_ok=True)
    for mode, theme in themes(book).items():
        css = CACHE / f"bootswatch-{PACKAGES[1].partition('@')[2]}/package/dist/{theme}/bootstrap.min.css"
        if not css.exists():
            raise RuntimeError(f"_quarto.yml: theme {theme} is not one of Bootswatch's")
        # the theme's web font would be fetched from the network
        text = re.sub(r"@import\s*(url\([^)]*\)|\"[^\"]*\"|'[^']*');?", "", css.read_text())
        (libs / f"theme-{mode}.css").write_text(text)
    shutil.copyfile(CACHE / MATHJAX, libs / "mathjax.js")
    shutil.copyfile(CACHE / MINISEARCH, libs / "minisearch.js")
    for name in ("site.css", "site.js"):
        shutil.copyfile(ASSETS / name, libs / name)
    shutil.copyfile(NBS / book.html.get("css", "styles.css"), libs / "book.css")
    (book.out / MARK).touch()
    (book.out / ".nojekyll").touch()


def build(out: Path, only: str | None = None, fresh: bool = False) -> list[str]:
    """Build the site into `out` and return the problems."""
    if out.exists() and any(out.iterdir()) and not (out / MARK).exists():
        return [f"{out}: holds something else; name a folder that does not exist"]
    draft = out.with_name(out.name + ".tmp")
    shutil.rmtree(draft, ignore_errors=True)
    book = read_book(draft)
    if only and only not in book.pages:
        return [f"--only {only}: not in nbs/ (one of {', '.join(book.pages)})"]
    try:
        if only and out.exists():
            shutil.copytree(out, draft)
        write_pages(book, only, fresh)
        shutil.rmtree(out, ignore_errors=True)
        draft.rename(out)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return book.problems


def write_pages(book: Book, only: str | None, fresh: bool) -> None:
    copy_assets(book)
    process(book, only, fresh)
    pages = []
    for name in [only] if only else book.pages:
        if (ROOT / "_proc" / name).exists():
            pages.append(book.pages[name])
        else:
            book.problem(name, "nbdev did not process it, so its page is missing")
    book.made = reference_pages(book)
    pages += [] if only else book.made
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for line in pool.map(partial(render, book), pages):
            print(line, flush=True)
    mend_links(book, pages)
    check_links(book, pages)
    print(f"{search.write_index(book.out)} sections to search")


def main() -> int:
    parser = argparse.ArgumentParser(description="Render the book to static pages that need no network.")
    parser.add_argument("--out", type=Path, default=ROOT / "_site", help="folder to write (default: _site)")
    parser.add_argument("--only", metavar="NOTEBOOK", help="render this notebook only, for example 01_dynamics.ipynb")
    parser.add_argument("--fresh", action="store_true", help="process every notebook anew, also those that did not change")
    options = parser.parse_args()
    start = time.perf_counter()
    out = options.out.resolve()
    os.chdir(ROOT)  # nbdev looks for settings.ini from here upwards
    sys.path[0] = str(ROOT)  # chapters import the library from this tree; tools/ must not shadow the standard library
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    only = Path(options.only).name if options.only else None
    try:
        problems = build(out, only, options.fresh)
    except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
        problems = [str(error)]
    for line in sorted(problems):  # pages are made in parallel
        print(f"problem: {line}", file=sys.stderr)
    print(f"{out.name}: {len(problems)} problem(s), {time.perf_counter() - start:.1f} s")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
