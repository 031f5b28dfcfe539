"""What the library's modules hold, read from their source, as the markdown of the site's reference.

Nothing is imported or executed: names, signatures, docstrings and line numbers are those of the files. `tools/site.py`
makes a page of entries and a page of highlighted source for every module, and one page that lists everything. With
Quarto the same entries stand in the chapters, where nbdev's `show_doc` puts them.
"""

from __future__ import annotations

import ast
import json
import re
from dataclasses import dataclass, field, replace
from pathlib import Path

WIDTH = 88
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass
class Entry:
    """A public name: what it is, where it stands, how it is called and what it says of itself."""

    name: str
    kind: str
    module: str
    line: int
    signature: str = ""
    doc: str = ""
    bases: list[str] = field(default_factory=list)
    fields: list[tuple[str, str, str, str]] = field(default_factory=list)  # name, type, default, class it comes from
    members: list[Entry] = field(default_factory=list)

    @property
    def page(self) -> str:
        return page_name("api", self.module)

    @property
    def target(self) -> str:
        return f"{self.page}#{self.name}"

    @property
    def source(self) -> str:
        return f"{page_name('source', self.module)}#L{self.line}"

    @property
    def summary(self) -> str:
        """The first sentence."""
        first = " ".join(self.doc.split("\n\n")[0].split())
        return re.split(r"(?<=[.!?])\s(?=[A-Z`*])", first)[0]


@dataclass
class Module:
    name: str  # "ensemble", "experiments.lorenz63"
    path: Path
    doc: str
    notebook: str  # "05_ensemble.ipynb", or "" if no notebook makes it
    text: str
    entries: dict[str, Entry]
    classes: dict[str, Entry] = field(default_factory=dict)  # private ones, too: public ones inherit from them

    @property
    def page(self) -> str:
        return page_name("api", self.name)


def page_name(kind: str, module: str) -> str:
    return f"{kind}_{module.replace('.', '_')}.html"


def call(name: str, parameters: list[str], end: str = "") -> str:
    """A call on one line, or on one line for each parameter."""
    line = f"{name}({', '.join(parameters)}){end}"
    return line if len(line) <= WIDTH else f"{name}(\n" + "".join(f"    {p},\n" for p in parameters) + f"){end}"


def parameters_of(node: Function, skip_first: bool = False) -> list[str]:
    """The parameters as Python writes them, `*` and `/` among them."""
    arguments = node.args
    plain = [*arguments.posonlyargs, *arguments.args]
    defaults: list[ast.expr | None] = [None] * (len(plain) - len(arguments.defaults)) + list(arguments.defaults)

    def text(argument: ast.arg, default: ast.expr | None) -> str:
        hint = f": {ast.unparse(argument.annotation)}" if argument.annotation else ""
        return argument.arg + hint + ("" if default is None else f"{' = ' if hint else '='}{ast.unparse(default)}")

    result = [text(*pair) for pair in zip(plain, defaults, strict=True)]
    if arguments.posonlyargs:
        result.insert(len(arguments.posonlyargs), "/")
    result = result[1:] if skip_first else result
    if arguments.vararg or arguments.kwonlyargs:
        result.append("*" + (text(arguments.vararg, None) if arguments.vararg else ""))
    result += [text(*pair) for pair in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)]
    return result + (["**" + text(arguments.kwarg, None)] if arguments.kwarg else [])


def decorators(node: Function | ast.ClassDef) -> list[str]:
    return [ast.unparse(decorator).partition("(")[0].rpartition(".")[2] for decorator in node.decorator_list]


def function_entry(node: Function, module: str, owner: str = "") -> Entry:
    marks = decorators(node)
    is_method = bool(owner) and "staticmethod" not in marks
    end = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    if {"property", "cached_property"} & set(marks):
        kind, signature = "property", node.name + end.replace(" -> ", ": ")
    else:
        kind = next((mark for mark in ("classmethod", "staticmethod") if mark in marks), "method" if owner else "function")
        signature = call(("def " if not owner else "") + node.name, parameters_of(node, is_method), end)
    name = f"{owner}.{node.name}" if owner else node.name
    return Entry(name, kind, module, node.lineno, signature, ast.get_docstring(node) or "")


def class_entry(node: ast.ClassDef, module: str) -> Entry:
    bases = [ast.unparse(base) for base in node.bases]
    kind = "dataclass" if "dataclass" in decorators(node) else "protocol" if "Protocol" in bases else "class"
    entry = Entry(node.name, kind, module, node.lineno, doc=ast.get_docstring(node) or "", bases=bases)
    for item in node.body:
        if isinstance(item, Function) and (not item.name.startswith("_") or item.name in ("__call__", "__init__")):
            entry.members.append(function_entry(item, module, node.name))
        elif isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name) and not item.target.id.startswith("_"):
            hint, default = ast.unparse(item.annotation), ""
            if isinstance(item.value, ast.Call) and ast.unparse(item.value.func).endswith("field"):
                options = {keyword.arg: ast.unparse(keyword.value) for keyword in item.value.keywords}
                factory = options.get("default_factory", "")
                made = factory.removeprefix("lambda: ") if factory.startswith("lambda:") else f"{factory}()" * bool(factory)
                default = options.get("default") or made
                if options.get("init") == "False":  # not a parameter: a base's field of this name is none either
                    hint = ""
            elif item.value:
                default = ast.unparse(item.value)
            if not hint.startswith("ClassVar"):
                entry.fields.append((item.target.id, hint, default, node.name))
    return entry


def read_module(path: Path, package: Path) -> Module:
    """The names in `__all__` that the module itself defines, in the order of the file."""
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    name = ".".join(path.relative_to(package).with_suffix("").parts).removesuffix("__init__").rstrip(".")
    notebook = re.search(r"^# AUTOGENERATED! .*?([\w.-]+\.ipynb)", text, re.MULTILINE)
    module = Module(name, path, ast.get_docstring(tree) or "", notebook[1] if notebook else "", text.rstrip(), {})
    public: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [target.id for target in targets if isinstance(target, ast.Name)]
            if names == ["__all__"]:
                public = set(ast.literal_eval(node.value))
            hint = f": {ast.unparse(node.annotation)}" if isinstance(node, ast.AnnAssign) else ""
            code = ast.unparse(node.value)
            value = f" = {code}" if len(code) <= WIDTH else " = …"
            module.entries |= {n: Entry(n, "constant", name, node.lineno, f"{n}{hint}{value}") for n in names}
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            module.entries[node.name] = function_entry(node, name)
        elif isinstance(node, ast.ClassDef):
            module.entries[node.name] = class_entry(node, name)
    module.classes = {key: entry for key, entry in module.entries.items() if entry.kind in ("class", "dataclass", "protocol")}
    module.entries = {key: entry for key, entry in module.entries.items() if key in public}
    return module


class Library:
    """All modules of a package, and what can only be said when all of them are known."""

    def __init__(self, package: Path):
        paths = [path for path in sorted(package.rglob("*.py")) if not path.name.startswith("_") or path.name == "__init__.py"]
        modules = [read_module(path, package) for path in paths]
        self.package = package.name
        self.modules = {module.name: module for module in modules if module.entries}
        self.by_name: dict[str, list[Entry]] = {}
        for module in self.modules.values():
            for entry in module.entries.values():
                self.by_name.setdefault(entry.name, []).append(entry)
        for module in self.modules.values():
            for entry in module.classes.values():
                self.finish_class(entry)

    def entry(self, name: str, module: str) -> Entry | None:
        """The entry that `name` means in `module`: its own, or the only one in the library."""
        base, _, member = name.removesuffix("()").partition(".")
        found = [e for e in self.by_name.get(base, []) if e.module == module] or self.by_name.get(base, [])
        if len(found) != 1 or not member:
            return found[0] if len(found) == 1 else None
        return next((item for item in found[0].members if item.name == f"{base}.{member}"), None)

    def family(self, entry: Entry) -> list[Entry]:
        """A class and those of its bases that are the library's, farthest first."""
        classes, names = self.modules[entry.module].classes, [base.partition("[")[0] for base in reversed(entry.bases)]
        bases = [found for name in names if (found := classes.get(name) or self.entry(name, entry.module)) and found is not entry]
        above = [ancestor for base in bases for ancestor in self.family(base)]
        return [*(ancestor for i, ancestor in enumerate(above) if ancestor not in above[:i]), entry]

    def finish_class(self, entry: Entry) -> None:
        """How it is made, with the fields that it inherits, and docstrings for methods that leave them to a base."""
        bases = f"({', '.join(entry.bases)})" if entry.bases else ""
        lines = ["@dataclass"] if entry.kind == "dataclass" else []
        lines.append(f"class {entry.name}{bases}")
        own = {member.name.partition(".")[2] for member in entry.members}
        for relative in self.family(entry)[:-1]:  # what a private base has stands nowhere else
            if relative.name.startswith("_"):
                added = [(member, member.name.partition(".")[2]) for member in relative.members]
                entry.members += [replace(m, name=f"{entry.name}.{short}") for m, short in added if short not in own]
        init = next((item for item in entry.members if item.name.endswith(".__init__")), None)
        if init:
            lines.append(init.signature.replace("__init__", entry.name, 1))
            entry.members.remove(init)
        elif self.is_dataclass(entry):
            rows: dict[str, tuple[str, str, str, str]] = {}
            for relative in self.family(entry):
                rows.update({row[0]: row for row in relative.fields})
            entry.fields = [row for row in rows.values() if row[1]]
            lines.append(call(entry.name, [f"{n}: {hint}" + (f" = {d}" if d else "") for n, hint, d, _ in entry.fields]))
        entry.signature = "\n".join(lines)
        for member in entry.members:
            if not member.doc:
                short = member.name.partition(".")[2]
                protocols = [e for group in self.by_name.values() for e in group if e.kind == "protocol"]
                for relative in [*reversed(self.family(entry)[:-1]), *protocols]:
                    other = next((m for m in relative.members if m.name == f"{relative.name}.{short}" and m.doc), None)
                    if other:
                        member.doc = f"As in `{other.name}`: {other.doc}"
                        break

    def is_dataclass(self, entry: Entry) -> bool:
        return any(relative.kind == "dataclass" for relative in self.family(entry))


# ---------------------------------------------------------------- markdown


def plain(text: str) -> str:
    """Text that markdown takes as it is."""
    return re.sub(r"([!-/:-@\[-`{-~])", r"\\\1", text)


def code(text: str) -> str:
    return f"`` {text} ``" if "`" in text else f"`{text}`"


def means_entry(word: str, entry: Entry, here: Entry | None, module: str) -> bool:
    """Whether a word in backticks is meant as that name: not a parameter, nor an everyday word of another module."""
    if here and (here.name.partition(".")[0] == entry.name or re.search(rf"\b{re.escape(word)}[:=,)]", here.signature)):
        return False
    return entry.module == module or bool(re.search(r"[A-Z_.(]", word))


def inline(text: str, library: Library, module: str, here: Entry | None = None) -> str:
    """A docstring's text: what stands in backticks is code, and a link if the library has it; all else is plain."""
    parts = re.split(r"`([^`]+)`", text)
    for i, part in enumerate(parts):
        if i % 2:
            entry = library.entry(part, module)
            linked = entry and means_entry(part, entry, here, module)
            parts[i] = f"[{code(part)}]({entry.target})" if entry and linked else code(part)
        else:
            parts[i] = plain(part)
    return "".join(parts)


def docstring(entry: Entry, library: Library) -> str:
    """Paragraphs as paragraphs; what is indented or starts with `>>>` as code."""
    blocks = []
    for block in re.split(r"\n\s*\n", entry.doc.strip()):
        if block.startswith((" ", ">>>")):
            blocks.append(f"``` {{.python}}\n{block}\n```")
        elif block:
            blocks.append(inline(block, library, entry.module, entry))
    return "\n\n".join(blocks)


def hint_code(hint: str, library: Library, module: str) -> str:
    """A type in a table, its names linked."""

    def link(match: re.Match[str]) -> str:
        entry = library.entry(match[0], module)
        return f'<a href="{entry.target}">{match[0]}</a>' if entry and entry.kind != "constant" else match[0]

    escaped = hint.replace("&", "&amp;").replace("<", "&lt;").replace("|", "&#124;")
    linked = re.sub(r"(?<![\w.])[A-Z]\w+", link, escaped)
    return f"`<code>{linked}</code>`{{=html}}" if hint else ""


def table_code(text: str) -> str:
    return code(text).replace("|", "\\|") if text else ""


def entry_markdown(entry: Entry, library: Library, chapter: str = "", level: int = 2) -> str:
    links = ([f"[chapter]({chapter})"] if chapter else []) + [f"[source]({entry.source})"]
    short = entry.name.rpartition(".")[2]
    parts = [
        f"{'#' * level} {plain(short)} {{#{entry.name} .entry}}",
        f"::: {{.entry-links}}\n[{entry.kind}]{{.kind}} {' '.join(links)}\n:::",
        f"``` {{.python .signature}}\n{entry.signature}\n```",
        docstring(entry, library),
    ]
    if entry.fields:
        rows = ["| parameter | type | default |", "|:----|:----|:----|"]
        for name, hint, default, owner in entry.fields:
            base = library.entry(owner, entry.module)
            note = f" [from [{code(owner)}]({base.target})]{{.inherited}}" if base and owner != entry.name else ""
            rows.append(f"| `{name}`{note} | {hint_code(hint, library, entry.module)} | {table_code(default)} |")
        parts.append("\n".join(rows))
    parts += [entry_markdown(member, library, level=level + 1) for member in entry.members]
    own = {member.name.partition(".")[2] for member in entry.members}
    if entry.kind in ("class", "dataclass"):
        inherited: dict[str, Entry] = {}
        for relative in [relative for relative in library.family(entry)[:-1] if not relative.name.startswith("_")]:
            inherited |= {m.name.partition(".")[2]: m for m in relative.members if not m.name.endswith("__")}
        links = [f"[{code(member.name)}]({member.target})" for name, member in inherited.items() if name not in own]
        if links:
            parts.append(f"Inherited: {', '.join(links)}.")
    return "\n\n".join(parts)


def front(title: str, description: str) -> str:
    return f"---\ntitle: {json.dumps(plain(title))}\ndescription: {json.dumps(plain(description))}\n---\n"


def module_markdown(module: Module, library: Library, chapter: tuple[str, str] | None, anchors: set[str]) -> str:
    """A module's page; `chapter` is its (file name, title), `anchors` the entries' names in it."""
    origin = f"[{plain(chapter[1])}]({chapter[0]}) · " if chapter else ""
    source = f"[source]({page_name('source', module.name)})"
    parts = [front(f"{library.package}.{module.name}", module.doc), f"::: {{.origin}}\nChapter {origin}{source}\n:::"]
    if not chapter:
        parts[1] = f"::: {{.origin}}\n{source}\n:::"
    rows = ["| name | what it is |", "|:----|:----------|"]
    for entry in module.entries.values():
        summary = inline(entry.summary, library, module.name, entry).replace("\n", " ") or entry.kind
        rows.append(f"| [{code(entry.name)}](#{entry.name}) | {summary} |")
    parts.append("::: {.names}\n" + "\n".join(rows) + "\n:::")
    for entry in module.entries.values():
        place = entry.name.lower()
        link = f"{chapter[0]}{'#' + place if place in anchors else ''}" if chapter else ""
        parts.append(entry_markdown(entry, library, link))
    return "\n\n".join(parts) + "\n"


def source_markdown(module: Module, library: Library) -> str:
    """A module's source, every line with a number that can be linked to."""
    ticks = "`" * max([3, *(len(run) + 1 for run in re.findall(r"`{3,}", module.text))])
    title = f"Source of {library.package}.{module.name}"
    line = f"::: {{.origin}}\n[Reference]({module.page})" + (
        f" · made from {code('nbs/' + module.notebook)}" if module.notebook else ""
    )
    return f"{front(title, module.doc)}\n{line}\n:::\n\n{ticks} {{#L .python .numberLines .lineAnchors}}\n{module.text}\n{ticks}\n"


def index_markdown(library: Library) -> str:
    """All modules, and all names by the alphabet."""
    parts = [front("Reference", "Every module and every public name, with signatures, docstrings and sources"), "## Modules"]
    rows = ["| module | what it is about |", "|:----|:----------|"]
    rows += [
        f"| [{code(module.name)}]({module.page}) | {inline(module.doc, library, name)} |"
        for name, module in library.modules.items()
    ]
    parts += ["::: {.names}\n" + "\n".join(rows) + "\n:::", "## All names"]
    letters: dict[str, list[Entry]] = {}
    for name in sorted(library.by_name, key=lambda name: (name.lower(), name)):
        letters.setdefault(name[0].upper(), []).extend(library.by_name[name])
    jump = " ".join(f"[{letter}](#names-{letter})" for letter in letters)
    parts.append(f"::: {{.letters}}\n{jump}\n:::")
    for letter, entries in letters.items():
        parts.append(f"### {letter} {{#names-{letter}}}")
        items = [f"- [{code(e.name)}]({e.target}) [{e.kind} in {plain(e.module)}]{{.where}}" for e in entries]
        parts.append("::: {.all-names}\n" + "\n".join(items) + "\n:::")
    return "\n\n".join(parts) + "\n"
