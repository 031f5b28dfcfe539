"""The editing loop of the book: text -> notebook -> export -> execute -> clean -> export.

    python tools/chapters.py text [CHAPTER ...]    write nbs_py/CHAPTER.py, the text view that is edited
    python tools/chapters.py build [CHAPTER ...]   bring edited text back, export, execute, clean, export
    python tools/chapters.py run [CHAPTER ...]     execute and clean notebooks as they stand (no text view)
    python tools/chapters.py export                write the modules that the notebooks export
    python tools/chapters.py check                 fail if clean or export would change a tracked file

Without names, `text`, `build` and `run` take every chapter. A name may be shortened: `08` or `pnp` finds `08_pnp`.
"""

from __future__ import annotations

import argparse
import ast
import base64
import gc
import io
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import chdir
from importlib import import_module
from multiprocessing import get_context
from multiprocessing.forkserver import ensure_running
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS, TEXT = ROOT / "nbs", ROOT / "nbs_py"
SLOW_FLAGS = {"slow", "gpu"}  # as tst_flags in settings.ini
# what chapters import of others: seconds for every one of them, if each process began with nothing
LIBRARIES = [
    "torch",
    "torch.func",
    "xarray",
    "pandas",
    "scipy.stats",
    "ot.batch",
    "h5netcdf",
    "matplotlib.pyplot",
    "safetensors.torch",
    "execnb.shell",
    "nbdev.process",
    # what these import as soon as there is something for them to do
    "torch._dynamo",
    "torch._decomp.decompositions_for_jvp",
    "dask.array",
    "distributed",
    "pint",
    "cf_xarray.units",
    "jinja2",
    "matplotlib.backends.backend_agg",
    "PIL.Image",
    "typer._adapters",
    "pydantic.types",
    "annotated_types",
    "zarr",
    "IPython.core.magics.execution",
    "pygments.lexers",
    "warm",  # last, see there
]


def sh(*command: str, **options) -> subprocess.CompletedProcess:
    """Run a command at the top of the project and stop on failure."""
    return subprocess.run(command, cwd=ROOT, check=True, **options)


def find(names: list[str], folder: Path, suffix: str) -> list[str]:
    """Full chapter names for the (possibly shortened) ones given; all of them for none."""
    known = sorted(p.stem for p in folder.glob(f"*{suffix}"))
    if not names:
        return known
    found = []
    for name in names:
        stem = Path(name).stem
        tests = (stem.__eq__, lambda k: k.startswith(stem), lambda k: k.endswith(stem))
        hits = next(filter(None, ([k for k in known if test(k)] for test in tests)), [])
        if len(hits) != 1:
            sys.exit(f"chapters: {name!r} names {len(hits)} chapters in {folder.name}/; known: {', '.join(known)}")
        found += hits
    return found


def to_text(name: str) -> None:
    TEXT.mkdir(exist_ok=True)
    sh(sys.executable, "-m", "jupytext", "--quiet", "--to", "py:percent", "-o", f"nbs_py/{name}.py", f"nbs/{name}.ipynb")


def to_notebook(name: str) -> None:
    """Bring the text view back; `--update` keeps cell ids and outputs of cells that did not change."""
    notebook = NOTEBOOKS / f"{name}.ipynb"
    update = ["--update"] if notebook.exists() else []
    sh(sys.executable, "-m", "jupytext", "--quiet", *update, "--to", "ipynb", "-o", str(notebook), f"nbs_py/{name}.py")
    _plain_metadata(notebook)


def _plain_metadata(path: Path) -> None:
    """Keep only what a reader of the notebook needs: its kernel and language."""
    from execnb.nbio import read_nb, write_nb

    book = read_nb(path)
    book.metadata = {
        "kernelspec": {"display_name": "python3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    write_nb(book, path)


def warm_context():
    """For processes that are forked from one that knows the libraries and the package, and has done nothing with them."""
    os.environ.update(OMP_NUM_THREADS="1", PYTHONHASHSEED="0")  # before the libraries are imported
    context = get_context("forkserver")
    context.set_forkserver_preload(LIBRARIES)
    with chdir(Path(__file__).parent):  # where the server finds `warm`; it hands down no folder
        ensure_running()
    return context


def fresh_processes(workers: int = 1) -> ProcessPoolExecutor:
    """A process for every chapter: what one leaves behind must not help the next."""
    return ProcessPoolExecutor(workers, mp_context=warm_context(), max_tasks_per_child=1)


def execute(name: str, keep: bool = True) -> tuple[str, float, str]:
    """Run one notebook by nbdev's own skip rules and (if `keep`) store its outputs. Returns (name, seconds, error)."""
    # CaptureShell chooses matplotlib's inline backend itself; IN_TEST is what nbdev_test sets
    os.environ.update(IN_TEST="1", OMP_NUM_THREADS="1", PYTHONHASHSEED="0")
    gc.freeze()  # what the libraries made need not be looked at again
    gc.set_threshold(50_000, 20, 50)
    from execnb.nbio import read_nb, write_nb
    from execnb.shell import CaptureShell
    from fastcore.xtras import working_directory
    from nbdev.process import extract_directives

    path = NOTEBOOKS / f"{name}.ipynb"
    book = read_nb(path)

    def skip(cell) -> bool:
        if cell.cell_type != "code":
            return True
        directives = extract_directives(cell, remove=False)
        if directives.get("eval:", [""])[0].lower() == "false":
            return True
        return bool(SLOW_FLAGS & directives.keys())

    sys.path.insert(0, str(ROOT))
    for cell in book.cells:  # a cell that prints nothing any more must not keep what it once printed
        if not skip(cell):
            cell.outputs = []
    if not keep:  # pictures are drawn when they are kept, and so are those with sliders; without them a chapter takes a tenth less
        import_module("pnpda_nb.plotting.explore")._pixels = blank
    shell, start = CaptureShell(path, mpl_format="png" if keep else None), time.perf_counter()
    try:
        with working_directory(NOTEBOOKS):
            shell.run_all(book, exc_stop=True, preproc=skip)
    except BaseException:
        return name, time.perf_counter() - start, shell.prettytb(fname=path)
    if keep:
        for cell in book.cells:
            for output in cell.get("outputs", []):
                if "image/png" in output.get("data", {}):
                    output["data"]["image/png"] = smaller_png(output["data"]["image/png"])
        write_nb(book, path)
    return name, time.perf_counter() - start, ""


def blank(figure):
    """An empty picture of a matplotlib figure's size; the figure is closed."""
    from matplotlib.pyplot import close
    from PIL import Image

    close(figure)
    return Image.new("RGB", tuple(map(round, figure.get_size_inches() * figure.dpi)))


def smaller_png(picture: str | list[str]) -> str:
    """A picture (base64) with a palette of 256 colours, which is a third of the size and looks the same; as it was if that is no
    smaller.
    """
    from PIL import Image

    picture = "".join(picture)
    small = io.BytesIO()
    Image.open(io.BytesIO(base64.b64decode(picture))).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(
        small, "png", optimize=True
    )
    shorter = base64.b64encode(small.getvalue()).decode()
    return min(picture, shorter, key=len)


def execute_all(names: list[str], workers: int) -> None:
    failed = []
    with fresh_processes(workers) as pool:
        for name, seconds, error in pool.map(execute, names):
            print(f"{'FAILED' if error else 'ran   '} {name:24s} {seconds:6.1f} s", flush=True)
            if error:
                failed.append(name)
                print(error, file=sys.stderr)
    if failed:
        sys.exit(f"chapters: {', '.join(failed)} did not run to the end; their stored outputs are unchanged")


def export(root: Path = ROOT) -> None:
    """Write every module anew. nbdev does the work, but its own command only appends to a module that a cell names, as in
    `#| export package.module`; here a notebook may have several, each of them whole. A module that no notebook exports goes.
    """
    from fastcore.xtras import working_directory
    from nbdev.config import add_init, update_version
    from nbdev.doclinks import _build_modidx
    from nbdev.export import ExportModuleProc
    from nbdev.maker import ModuleMaker
    from nbdev.process import NBProcessor

    class Maker(ModuleMaker):
        """A package's `__init__` names what is public, and `__all__` of a module in it has nothing else."""

        def make_all(self, cells):
            names = super().make_all(cells)
            if self.name.endswith(".__init__"):
                return names or sorted(faces[self.name])
            face = faces.get(f"{self.name.split('.')[0]}.__init__")
            return names if face is None else [name for name in names if name in face]

        def _last_future(self, cells):
            """`__all__` comes after this many cells: up to imports from the future, or the first, if it says what the module is."""
            said = bool(cells) and bool(tree := cells[0].parsed_()) and ast.get_docstring(ast.Module(list(tree), [])) is not None
            return max(super()._last_future(cells), int(said))

    package, modules = root / "pnpda_nb", {}
    with working_directory(root):
        for path in sorted((root / "nbs").glob("*.ipynb")):
            found = ExportModuleProc()
            NBProcessor(path, [found]).process()
            for name, cells in found.modules.items():
                if not any(cell.cell_type == "code" for cell in cells):
                    continue
                listed = found.in_all[name]
                name = found.default_exp if name == "#" else name
                if name in modules:
                    sys.exit(
                        f"chapters: both {modules[name][0].name} and {path.name} export {name}; a module comes from one notebook"
                    )
                modules[name] = path, cells, listed
        faces = {name: set() for name in modules if name.endswith(".__init__")}
        for name, names in faces.items():
            for cell in modules[name][1]:
                names |= {
                    a.asname or a.name for node in cell.parsed_() or () if isinstance(node, ast.ImportFrom) for a in node.names
                }
        for name, (path, cells, listed) in modules.items():
            Maker(package, name, path).make(cells, listed, lib_path=package)
            _relative_imports(package, name)
        exported = {package / f"{name.replace('.', '/')}.py" for name in modules}
        for path in package.rglob("*.py"):
            if path not in exported and "AUTOGENERATED! DO NOT EDIT! File to edit" in path.read_text(encoding="utf-8")[:2000]:
                path.unlink()
        add_init(package)
        update_version(package)
        _build_modidx()
        sh("ruff", "format", "--quiet", str(package))  # what nbdev adds between cells; the cells are formatted in the notebooks


def _relative_imports(package: Path, name: str) -> None:
    """nbdev overlooks imports of several lines, and leaves directives of pages behind."""
    path, above = package / f"{name.replace('.', '/')}.py", name.split(".")[:-1]

    def relative(match: re.Match) -> str:
        parts = match[2].split(".")
        shared = next((i for i, (a, b) in enumerate(zip(above, parts)) if a != b), min(len(above), len(parts)))
        return f"{match[1]}from {'.' * (1 + len(above) - shared)}{'.'.join(parts[shared:])} import"

    text = re.sub(r"^#\| .*\n", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE)  # what only a page makes use of
    path.write_text(re.sub(rf"^(\s*)from {package.name}\.([\w.]+) import", relative, text, flags=re.MULTILINE), encoding="utf-8")


def clean_and_export() -> None:
    sh("ruff", "format", "--quiet", "nbs")
    sh("ruff", "check", "--quiet", "--select", "I", "--fix", "nbs")
    sh("nbdev_clean")
    export()


def check() -> None:
    """Clean and export, then compare with what git has (as CI does)."""
    before = sh("git", "diff", "--stat", capture_output=True, text=True).stdout
    clean_and_export()
    after = sh("git", "diff", "--stat", capture_output=True, text=True).stdout
    new = sh("git", "ls-files", "--others", "--exclude-standard", "pnpda_nb", "nbs", capture_output=True, text=True).stdout
    if before != after or (after and os.environ.get("CI")) or new:
        sys.exit(f"chapters: clean and export change tracked files; run the build again and commit\n{after}{new}")
    print("chapters: clean and export leave no diff")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["text", "build", "run", "export", "check"])
    parser.add_argument("chapters", nargs="*")
    parser.add_argument("--workers", type=int, default=2)
    given = parser.parse_args()
    # the tools named in sh() live beside this interpreter
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    if given.action == "check":
        return check()
    if given.action == "export":
        return export()
    if given.action == "text":
        for name in find(given.chapters, NOTEBOOKS, ".ipynb"):
            to_text(name)
        return None
    if given.action == "build":
        names = find(given.chapters, TEXT, ".py")
        for name in names:
            to_notebook(name)
        export()
    else:
        names = find(given.chapters, NOTEBOOKS, ".ipynb")
    execute_all(names, given.workers)
    clean_and_export()
    return None


if __name__ == "__main__":
    main()
