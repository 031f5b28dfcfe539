"""Small inputs that once went wrong, one script each; its first line says what is right. `pytest --slow -s
tests/test_fault_scripts.py` shows what they print.
"""

import subprocess
import sys
from pathlib import Path

import pytest

FAULTS = Path(__file__).parent / "faults"
REFUSED = {
    "06_overlap": "files of different times",
    "13_pnpda4d_not_finite": "finite",
}  # what their last line must say: these end in one clear error


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    subprocess.run([sys.executable, FAULTS / "make_inputs.py"], cwd=folder, check=True, capture_output=True)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(p.stem for p in FAULTS.glob("[0-9]*.py")))
def test_that_what_once_went_wrong_is_right_or_refused(name, folder):
    done = subprocess.run([sys.executable, FAULTS / f"{name}.py"], cwd=folder, capture_output=True, text=True, timeout=300)
    print((FAULTS / f"{name}.py").read_text().splitlines()[0], done.stdout, sep="\n")
    if name in REFUSED:
        last = done.stderr.strip().splitlines()[-1]
        assert done.returncode and last.startswith("ValueError: ") and REFUSED[name] in last
    else:
        assert done.returncode == 0 and "Traceback" not in done.stdout + done.stderr, done.stderr
