"""Every chapter runs as a test, and what is stored and exported is what the chapters make."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CHAPTERS = sorted(p.stem for p in (ROOT / "nbs").glob("*.ipynb"))


@pytest.mark.parametrize("name", CHAPTERS)
def test_that_a_chapter_runs_to_the_end_in_under_a_minute(name, executed):
    _, seconds, error = executed[name].result()
    assert not error, error
    assert seconds < 60


@pytest.mark.parametrize("name", CHAPTERS)
def test_that_a_notebook_is_small_and_stores_the_outputs_of_a_good_run(name):
    path = ROOT / "nbs" / f"{name}.ipynb"
    assert path.stat().st_size < 1_000_000
    cells = [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]
    assert not any(o["output_type"] == "error" for c in cells for o in c["outputs"])
    figures = [c for c in cells if "#| label: fig-" in "".join(c["source"])]
    assert all(any(shows_a_picture(o.get("data", {})) for o in c["outputs"]) for c in figures)


def shows_a_picture(data: dict) -> bool:
    """A picture, or an explorer: HTML with several."""
    return "image/png" in data or "data-explorer=" in "".join(data.get("text/html", ""))


def test_that_clean_and_export_change_nothing(tmp_path):
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    copy = tmp_path / "pnpda_nb"
    for name in tracked:
        if (ROOT / name).is_file() or (ROOT / name).is_symlink():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name, follow_symlinks=False)
    before = {
        p: p.read_bytes() for folder in ("pnpda_nb", "nbs") for p in (copy / folder).rglob("*") if p.suffix in (".py", ".ipynb")
    }
    environment = {k: v for k, v in os.environ.items() if k != "IN_TEST"}
    for command in ([Path(sys.executable).with_name("nbdev_clean")], [sys.executable, "tools/chapters.py", "export"]):
        subprocess.run(command, cwd=copy, check=True, env=environment)
    changed = [str(p.relative_to(copy)) for p, content in before.items() if p.read_bytes() != content]
    assert not changed, f"run `python tools/chapters.py build`: {changed}"


def test_that_the_readme_is_in_step_with_the_index():
    answer = subprocess.run([sys.executable, "tools/readme.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stdout + answer.stderr
