"""What the library's modules hold, as griffe reads it from their source, as the markdown of the site's reference.

Nothing is imported or executed: names, signatures, docstrings and line numbers are those of the files. `tools/site.py`
makes a page of entries and a page of highlighted source for every module, and one page that lists everything. With
Quarto the same entries stand in the chapters, where nbdev's `show_doc` puts them.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field, replace
from pathlib import Path

import griffe

WIDTH = 88


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
    parameters: list[str] = field(default_factory=list)  # of a dataclass
    members: list[Entry] = field(default_factory=list)
    above: list[tuple[str, str]] = field(
        default_factory=list
    )  # module and name of the library's classes it inherits from, nearest first

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
    name: str  # "classical.ensemble"
    path: Path
    doc: str
    notebook: str  # "06_ensembles.ipynb", or "" if no notebook makes it
    text: str
    entries: dict[str, Entry]
    everything: dict[str, Entry] = field(default_factory=dict)  # what is not public, too: chapters show it, classes inherit from it

    @property
    def page(self) -> str:
        return page_name("api", self.name)


def page_name(kind: str, module: str) -> str:
    return f"{kind}_{module.replace('.', '_')}.html"


def call(name: str, parameters: list[str], end: str = "") -> str:
    """A call on one line, or on one line for each parameter."""
    line = f"{name}({', '.join(parameters)}){end}"
    return line if len(line) <= WIDTH else f"{name}(\n" + "".join(f"    {p},\n" for p in parameters) + f"){end}"


def parameters_of(function: griffe.Function, skip_first: bool = False) -> list[str]:
    """The parameters as Python writes them, `*` and `/` among them."""
    given = list(function.parameters)[1 if skip_first else 0 :]
    result, starred = [], False
    for place, parameter in enumerate(given):
        kind = parameter.kind
        starred |= kind is griffe.ParameterKind.var_positional
        if kind is griffe.ParameterKind.keyword_only and not starred:
            result, starred = [*result, "*"], True
        result.append(_parameter(parameter))
        after = given[place + 1].kind if place + 1 < len(given) else None
        if kind is griffe.ParameterKind.positional_only and after is not kind:
            result.append("/")
    return result


def _parameter(parameter: griffe.Parameter) -> str:
    stars = {griffe.ParameterKind.var_positional: "*", griffe.ParameterKind.var_keyword: "**"}.get(parameter.kind, "")
    hint = f": {parameter.annotation}" if parameter.annotation is not None else ""
    default = "" if parameter.default is None or stars else f"{' = ' if hint else '='}{_default(parameter.default)}"
    return f"{stars}{parameter.name}{hint}{default}"


def _default(value: object) -> str:
    """What a field is when nothing is given; "" for none."""
    text = "" if value is None else str(value)
    text = re.sub(r"^(?:\w+\.)?field\(.*?default_factory=([\w.]+)[,)].*$", r"\1()", text, flags=re.DOTALL)
    return re.sub(r"^\(lambda: (.*)\)\(\)$", r"\1", text)


def _line(found: griffe.Function | griffe.Class) -> int:
    """That of `def` or `class`, below the decorators."""
    return found.decorators[-1].endlineno + 1 if found.decorators else found.lineno or 0


def _doc(found: griffe.Object) -> str:
    return found.docstring.value if found.docstring else ""


def function_entry(found: griffe.Function, module: str, owner: str = "") -> Entry:
    kind = next((mark for mark in ("classmethod", "staticmethod") if mark in found.labels), "method" if owner else "function")
    end = f" -> {found.returns}" if found.returns is not None else ""
    parameters = parameters_of(found, bool(owner) and kind != "staticmethod")
    name = f"{owner}.{found.name}" if owner else found.name
    return Entry(name, kind, module, _line(found), call(("" if owner else "def ") + found.name, parameters, end), _doc(found))


def class_entry(found: griffe.Class, module: str, package: str) -> Entry:
    bases = [str(base) for base in found.bases]
    kind = "dataclass" if "dataclass" in found.labels else "class"
    kind = "protocol" if any(base.partition("[")[0] == "Protocol" for base in bases) else kind
    entry = Entry(found.name, kind, module, _line(found), doc=_doc(found), bases=bases)
    for item in found.members.values():
        if item.is_alias or not item.lineno:  # what a dataclass is given has no line
            continue
        if item.is_function and (not item.name.startswith("_") or item.name in ("__call__", "__init__")):
            entry.members.append(function_entry(item, module, found.name))
        elif item.is_attribute and not item.name.startswith("_"):
            hint = f": {item.annotation}" if item.annotation is not None else ""
            if "property" in item.labels:
                entry.members.append(
                    Entry(f"{found.name}.{item.name}", "property", module, item.lineno, item.name + hint, _doc(item))
                )
            elif hint and "instance-attribute" in item.labels or hint and item.value is None:
                default = str(item.value) if "class-attribute" in item.labels and item.value is not None else ""
                entry.fields.append((item.name, str(item.annotation), default, found.name))
    ours = [base for base in found.mro() if base.package.name == package]
    entry.above = [(base.module.path.removeprefix(package).lstrip("."), base.name) for base in ours]
    if "dataclass" in found.labels:  # griffe knows what a dataclass is called with, and what it leaves out
        owner = {name: base.name for base in [*reversed(ours), found] for name, item in base.members.items() if item.is_attribute}
        rows = [p for p in found.parameters if p.name != "self"]
        entry.fields = [(p.name, str(p.annotation), _default(p.default), owner[p.name]) for p in rows]
        made_by = next(kind.members["__init__"] for kind in (found, *ours) if "__init__" in kind.members)
        entry.parameters = parameters_of(made_by, True)
    return entry


def read_module(found: griffe.Module, package: str) -> Module:
    """The names in `__all__` that the module itself defines, in the order of the file."""
    path = Path(str(found.filepath))
    text = path.read_text(encoding="utf-8")
    name = found.path.removeprefix(package).lstrip(".")
    notebook = re.search(r"^# AUTOGENERATED! .*?([\w.-]+\.ipynb)", text, re.MULTILINE)
    module = Module(name, path, _doc(found), notebook[1] if notebook else "", text.rstrip(), {})
    public = {str(export) for export in found.exports or ()}
    for item in sorted((m for m in found.members.values() if not m.is_alias and m.lineno), key=lambda m: m.lineno):
        if item.is_function:
            module.entries[item.name] = function_entry(item, name)
        elif item.is_class:
            module.entries[item.name] = class_entry(item, name, package)
        elif item.is_attribute and item.name != "__all__":
            hint = f": {item.annotation}" if item.annotation is not None else ""
            value = f" = {item.value}" if len(str(item.value)) <= WIDTH else " = …"
            module.entries[item.name] = Entry(item.name, "constant", name, item.lineno, f"{item.name}{hint}{value}")
    module.everything = module.entries
    module.entries = {key: entry for key, entry in module.entries.items() if key in public}
    return module


def modules_of(found: griffe.Module) -> list[griffe.Module]:
    """A package and all modules below it whose names do not begin with an underscore."""
    below = [module for name, module in sorted(found.modules.items()) if not module.is_alias and not name.startswith("_")]
    here = [] if isinstance(found.filepath, list) else [found]
    return here + [one for module in below for one in modules_of(module)]


class Library:
    """All modules of a package, and what can only be said when all of them are known."""

    def __init__(self, package: Path):
        read = griffe.load(package.name, search_paths=[package.parent], allow_inspection=False)
        modules = [read_module(module, package.name) for module in modules_of(read)]
        self.package = package.name
        self.modules = {module.name: module for module in modules if module.entries}
        self.everything = {(module.name, name): entry for module in modules for name, entry in module.everything.items()}
        self.by_name: dict[str, list[Entry]] = {}
        for module in self.modules.values():
            for entry in module.entries.values():
                self.by_name.setdefault(entry.name, []).append(entry)
        for entry in self.everything.values():
            if entry.kind in ("class", "dataclass", "protocol"):
                self.finish_class(entry)

    def entry(self, name: str, module: str) -> Entry | None:
        """The entry that `name` means in `module`: its own, or the only one in the library."""
        base, _, member = name.removesuffix("()").partition(".")
        found = [e for e in self.by_name.get(base, []) if e.module == module] or self.by_name.get(base, [])
        if len(found) != 1 or not member:
            return found[0] if len(found) == 1 else None
        return next((item for item in found[0].members if item.name == f"{base}.{member}"), None)

    def inner(self, name: str, module: str) -> Entry | None:
        """The entry of `name` in `module`, public or not."""
        base, _, member = name.removesuffix("()").partition(".")
        entry = self.everything.get((module, base))
        return entry if entry is None or not member else next((m for m in entry.members if m.name == f"{base}.{member}"), None)

    def is_public(self, entry: Entry) -> bool:
        return any(entry is other for other in self.by_name.get(entry.name, []))

    def family(self, entry: Entry) -> list[Entry]:
        """A class and those of its bases that are the library's, farthest first."""
        return [*(self.everything[place] for place in reversed(entry.above) if place in self.everything), entry]

    def finish_class(self, entry: Entry) -> None:
        """How it is made, with the fields that it inherits, and docstrings for methods that leave them to a base."""
        bases = f"({', '.join(entry.bases)})" if entry.bases else ""
        lines = ["@dataclass"] if entry.kind == "dataclass" else []
        lines.append(f"class {entry.name}{bases}")
        own = {member.name.partition(".")[2] for member in entry.members}
        for relative in reversed(self.family(entry)[:-1]):  # what a base that is not public has stands nowhere else
            if not self.is_public(relative):
                added = {m.name.partition(".")[2]: m for m in relative.members}
                entry.members += [replace(m, name=f"{entry.name}.{short}") for short, m in added.items() if short not in own]
                own |= added.keys()
        init = next((item for item in entry.members if item.name.endswith(".__init__")), None)
        if init:
            lines.append(init.signature.replace("__init__", entry.name, 1))
            entry.members.remove(init)
        elif self.is_dataclass(entry):
            if entry.kind != "dataclass":  # it only adds methods: it is made like its base
                base = next(above for above in reversed(self.family(entry)) if above.kind == "dataclass")
                entry.fields, entry.parameters = base.fields, base.parameters
            lines.append(call(entry.name, entry.parameters))
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
    links = [f"[chapter]({chapter})"] if chapter else []
    if entry.module in library.modules:  # what a class has from a module without public names stands on no page
        links.append(f"[source]({entry.source})")
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
        for relative in [relative for relative in library.family(entry)[:-1] if library.is_public(relative)]:
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
