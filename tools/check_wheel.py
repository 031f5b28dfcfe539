"""Does the library work for somebody who installs it and has nothing else? `python tools/check_wheel.py [--keep FOLDER]`

Builds a wheel from a copy of the tree, installs it into an empty environment with its requirements alone, and uses it
from an empty folder: imports, the command line, README's example. At the end DAPPER is installed, too, for the tests
that need it. The first problem ends the check with a sentence and status 1.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DEVELOPERS_ALONE = ("pytest", "nbdev", "jupyterlab", "fastcore", "execnb", "hypothesis")
HELP_SECONDS = 1.0
STARTED = time.perf_counter()


def say(text: str) -> None:
    print(f"wheel: {time.perf_counter() - STARTED:5.0f} s  {text}", flush=True)


def sh(*command: object, cwd: Path, **options) -> str:
    """Run a command far from the repository and return what it prints."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "IN_TEST", "PYTHONSTARTUP")}
    done = subprocess.run([str(word) for word in command], cwd=cwd, env=environment, capture_output=True, text=True, **options)
    if done.returncode:
        words = " ".join(str(word) for word in command)[:200]
        sys.exit(f"wheel: `{words}` ended with status {done.returncode}\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    return done.stdout


def expect(truth: bool, sentence: str) -> None:
    if not truth:
        sys.exit(f"wheel: {sentence}")


def copy_of_the_tree(folder: Path) -> Path:
    """What git has or would add: neither build/ nor egg-info is left behind, and none is picked up."""
    names = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in names.stdout.splitlines():
        if (ROOT / name).is_file() and not name.startswith("nbs/"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


def build(folder: Path) -> Path:
    tree = copy_of_the_tree(folder / "tree")
    sh(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", ".", "-w", folder / "wheel", cwd=tree)
    (wheel,) = (folder / "wheel").glob("*.whl")
    config = ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini", encoding="utf-8")
    expect(wheel.name.split("-")[1] == config["DEFAULT"]["version"], f"{wheel.name} has another version than settings.ini")
    inside = set(zipfile.ZipFile(wheel).namelist())
    wanted = {p.relative_to(tree).as_posix() for p in (tree / "pnpda_nb").rglob("*") if p.is_file()}
    expect(wanted <= inside, f"{wheel.name} lacks {', '.join(sorted(wanted - inside))}")
    stray = {name for name in inside - wanted if ".dist-info/" not in name}
    expect(not stray, f"{wheel.name} holds what is no part of the package: {', '.join(sorted(stray)[:5])}")
    return wheel


def modules_in(wheel: Path) -> list[str]:
    names = [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".py") and ".dist-info/" not in name]
    return sorted(re.sub(r"(/__init__)?\.py$", "", name).replace("/", ".") for name in names)


def check_help(pnpda: Path, folder: Path) -> float:
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        said = sh(pnpda, "--help", cwd=folder)
        seconds.append(time.perf_counter() - began)
    expect("run" in said and "train" in said, "`pnpda --help` does not name its commands")
    expect(min(seconds) < HELP_SECONDS, f"`pnpda --help` takes {min(seconds):.2f} s, expected under {HELP_SECONDS} s")
    return min(seconds)


def readme_example() -> tuple[str, str]:
    """README's Python as one script, and what README says that it prints."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```(python|text)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    code, shown = ("".join(body for kind, body in blocks if kind == wanted) for wanted in ("python", "text"))
    expect(bool(code and shown), "README.md has no Python example with an output")
    return code, shown


def chapter_alone(name: str, cache: Path) -> str:
    """The cells of a chapter as one script for somebody who downloaded it alone and fetches what it has stored."""
    cells = json.loads((ROOT / "nbs" / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    served = (ROOT / "nbs" / "results").as_uri()
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    code = [cell for cell in code if not cell.startswith("#| slow")]
    return (
        f"import os\nos.environ |= {{'MPLBACKEND': 'Agg', 'PNPDA_RESULTS': {served!r}, 'XDG_CACHE_HOME': {str(cache)!r}}}\n"
        "import codeop\nas_in_a_notebook = codeop.Compile()  # what a cell takes from the future holds for those after it\n"
        f"for cell in {code!r}:\n    exec(as_in_a_notebook(cell, {name!r}, 'exec'), globals())\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, help="a folder to work in and to leave in place; default: one that is deleted")
    keep = parser.parse_args().keep
    with tempfile.TemporaryDirectory(prefix="wheel_") as temporary:
        check(Path(keep.resolve() if keep else temporary))


def check(folder: Path) -> None:
    empty, constraints = folder / "empty", ROOT / "constraints.txt"
    empty.mkdir(parents=True)
    wheel = build(folder)
    say(f"{wheel.name}: {len(modules_in(wheel))} modules, py.typed and no strays")

    sh(sys.executable, "-m", "venv", folder / "venv", cwd=folder)
    binaries = folder / "venv" / ("Scripts" if os.name == "nt" else "bin")
    python, pnpda = binaries / "python", binaries / "pnpda"
    sh(python, "-m", "pip", "install", "-q", "-c", constraints, wheel, cwd=empty)
    sh(python, "-m", "pip", "check", cwd=empty)
    say("installed, and its requirements agree")

    found = f"from importlib.util import find_spec; print([m for m in {DEVELOPERS_ALONE} if find_spec(m)])"
    present = ast.literal_eval(sh(python, "-c", found, cwd=empty))
    expect(not present, f"the requirements bring what only developers need: {', '.join(present)}")
    sh(python, "-c", f"import importlib\nfor name in {modules_in(wheel)}: importlib.import_module(name)", cwd=empty)
    where = Path(sh(python, "-c", "import pnpda_nb; print(pnpda_nb.__file__)", cwd=empty).strip()).parent
    expect(where.is_relative_to(folder / "venv") and (where / "py.typed").exists(), f"py.typed: expected it in {where}")
    say("every module imports without the tools of developers")

    say(f"`pnpda --help` takes {check_help(pnpda, empty):.2f} s")
    expect("lorenz63" in sh(pnpda, "list", cwd=empty), "`pnpda list` does not name lorenz63")
    out = empty / "out"
    sh(pnpda, "run", "lorenz63", "--methods", "free_run,var3d_gc", "--runs", 3, "--workers", 2, "--out", out, cwd=empty)
    expect((out / "scores.csv").exists() and (out / "manifest.json").exists(), f"`pnpda run` left no scores in {out}")
    expect({p.name for p in empty.iterdir()} == {"out"}, "`pnpda run` writes outside of its --out")
    say("`pnpda list` and `pnpda run` work from an empty folder")

    code, shown = readme_example()
    printed = sh(python, "-", cwd=empty, input=code)
    expect(printed == shown, f"README's example prints {printed!r}, expected {shown!r} as README shows")
    say(f"README's example prints {printed.strip()!r}")

    sh(python, "-", cwd=empty, input=chapter_alone("27_windows_by_loop", folder / "cache"))
    fetched = sorted(path.name for path in (folder / "cache").rglob("*") if path.is_file())
    expect(bool(fetched), "a chapter that was downloaded alone fetched nothing that it has stored")
    say(f"a chapter that was downloaded alone runs, and fetched {', '.join(fetched)}")

    tests = ROOT / "tests" / "test_dapper.py"
    if not tests.exists():
        return say("no tests/test_dapper.py: DAPPER is left out")
    sh(python, "-m", "pip", "install", "-q", "-c", constraints, f"{wheel}[dapper]", "pytest", cwd=empty)
    sh(python, "-m", "pip", "check", cwd=empty)
    alone = shutil.copy2(tests, empty)
    said = sh(python, "-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider", alone, cwd=empty)
    expect("skipped" not in said, f"tests/test_dapper.py leaves something out though DAPPER is installed\n{said}")
    return say(f"with DAPPER: {said.strip().splitlines()[-1]}")


if __name__ == "__main__":
    main()
