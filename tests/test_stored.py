"""The stored results are found wherever a reader is, and chapters run for a reader."""

import ast
import builtins
import json
import re
import shutil
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from pnpda_nb.core import stored as module
from pnpda_nb.core.stored import stored_file

ROOT = Path(__file__).parent.parent
CHAPTERS = [path for path in sorted((ROOT / "nbs").glob("[!_.]*.ipynb")) if path.stem != "index"]
EXPORTED = re.compile(r"^#\| ?(export|exports|exporti)\b", re.MULTILINE)


@pytest.fixture
def far_from_any_clone(tmp_path, monkeypatch):
    """A folder of nobody's, a home of its own, and a package that is not in a clone."""
    (tmp_path / "site" / "pnpda_nb").mkdir(parents=True)
    (tmp_path / "work").mkdir()
    shutil.copy(module._package() / "results.json", tmp_path / "site" / "pnpda_nb")
    monkeypatch.setattr(module, "_package", lambda: tmp_path / "site" / "pnpda_nb")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("PNPDA_RESULTS", raising=False)
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path


@pytest.fixture
def server(tmp_path):
    """A page that serves a copy of some stored results; its address and its folder."""
    folder = tmp_path / "served"
    shutil.copytree(ROOT / "nbs" / "results" / "dapper", folder / "dapper")

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *words):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as here:
        threading.Thread(target=here.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{here.server_port}", folder
        here.shutdown()


def test_that_a_stored_result_is_found_beside_a_notebook_above_it_and_where_the_environment_says(far_from_any_clone, monkeypatch):
    for place in ("work/results", "nbs/results", "elsewhere"):
        folder = far_from_any_clone / place / "dapper"
        shutil.copytree(ROOT / "nbs" / "results" / "dapper", folder)
        if place == "elsewhere":
            monkeypatch.setenv("PNPDA_RESULTS", str(folder.parent))
        assert stored_file("dapper/runs.csv") == folder / "runs.csv"
        assert stored_file("dapper") == folder
        shutil.rmtree(folder)


def test_that_what_is_nowhere_is_fetched_once_and_compared(far_from_any_clone, server, monkeypatch):
    address, folder = server
    monkeypatch.setenv("PNPDA_RESULTS", address)
    found = stored_file("dapper")
    assert found.is_relative_to(far_from_any_clone / "cache")
    assert {p.name: p.read_bytes() for p in found.iterdir()} == {p.name: p.read_bytes() for p in (folder / "dapper").iterdir()}
    monkeypatch.setenv("PNPDA_RESULTS", "http://127.0.0.1:9")  # nobody is asked again
    assert stored_file("dapper") == found


def test_that_a_file_of_another_version_is_not_taken(far_from_any_clone, server, monkeypatch):
    address, folder = server
    monkeypatch.setenv("PNPDA_RESULTS", address)
    (folder / "dapper" / "runs.csv").write_text("other,numbers\n")
    with pytest.raises(FileNotFoundError, match="^results: .*runs.csv is not the file that this version was made with; set PNPDA"):
        stored_file("dapper/runs.csv")
    assert not list((far_from_any_clone / "cache").rglob("*.csv"))


def test_that_one_line_says_what_to_do_where_nothing_can_be_fetched(far_from_any_clone, monkeypatch):
    monkeypatch.setenv("PNPDA_RESULTS", "http://127.0.0.1:9/results")
    with pytest.raises(FileNotFoundError, match="^results: dapper/runs.csv is not here and cannot be fetched .*PNPDA") as error:
        stored_file("dapper/runs.csv")
    assert "\n" not in str(error.value)
    for wrong in ("dapper/nothing.csv", "", "dap", "../results"):
        with pytest.raises(ValueError, match="^name: expected a file or folder of the stored results"):
            stored_file(wrong)


def test_that_the_list_of_stored_results_is_that_of_the_files():
    made = subprocess.run([sys.executable, "tools/stored_index.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert made.returncode == 0, made.stdout + made.stderr


def cells_of(path: Path) -> list[str]:
    return ["".join(c["source"]) for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_that_a_chapter_needs_neither_nbdev_nor_a_clone_to_run(path):
    for cell in cells_of(path):
        if not EXPORTED.search(cell):
            assert not re.search(r"^(from|import) nbdev", cell, re.MULTILINE)
            assert not re.search(r"""["'](\.\./)?(nbs/)?results/""", cell), cell


def at_once(node: ast.AST) -> list[ast.Name]:
    """The names that are looked up when a cell runs, not later in a function of it."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
        given = node.args
        now = [*given.defaults, *(d for d in given.kw_defaults if d), *getattr(node, "decorator_list", [])]
    elif isinstance(node, ast.AnnAssign):
        now = [node.target, *([node.value] if node.value else [])]
    else:
        now = list(ast.iter_child_nodes(node))
    return ([node] if isinstance(node, ast.Name) else []) + [name for child in now for name in at_once(child)]


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_that_every_name_of_a_cell_comes_from_a_cell_that_a_page_shows(path):
    known = set(dir(builtins)) | {"display", "__file__"}
    for cell in cells_of(path):
        if cell.startswith("#| hide\n"):
            continue
        tree = ast.parse("\n".join(line for line in cell.splitlines() if not line.startswith(("!", "%"))))
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                known.add(node.name)
            elif isinstance(node, (ast.Import, ast.ImportFrom)):
                known |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
            elif isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
                known.add(node.id)
            elif isinstance(node, ast.ExceptHandler) and node.name:
                known.add(node.name)
        missing = {name.id for name in at_once(tree)} - known
        assert not missing, f"{sorted(missing)} in a cell that begins {cell[:60]!r}"
