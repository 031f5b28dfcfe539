"""Make the stored results of the book again: `python tools/store_results.py` (lorenz63: about five minutes; published: as
long).

Runs the paper preset of each study for several seeds and keeps what is small: for the first seed the scores, the manifest and
the prior, for all seeds one table of scores. Chapters read these files and check a few rows against the code.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).resolve().parent.parent
SEEDS = range(1, 7)


def store(study: str) -> None:
    kept, work = ROOT / "nbs" / "results" / study, ROOT / "runs" / "stored" / study
    kept.mkdir(parents=True, exist_ok=True)
    tables = []
    for seed in SEEDS:
        folder = work / str(seed)
        command = [str(Path(sys.executable).with_name("pnpda")), "run", study, "--preset", "paper", "--seed", str(seed), "--out", str(folder)]
        subprocess.run(command, cwd=ROOT, check=True)
        tables.append(pd.read_csv(folder / "scores.csv").assign(seed=seed))
    for name in ("scores.csv", "manifest.json", "prior.safetensors"):
        shutil.copy(work / str(SEEDS[0]) / name, kept / name)
    pd.concat(tables).to_csv(kept / "seeds.csv", index=False, float_format="%.8g")


def store_published() -> None:
    folder = ROOT / "nbs" / "results" / "published"
    subprocess.run([str(Path(sys.executable).with_name("pnpda")), "published", "--out", str(folder)], cwd=ROOT, check=True)


if __name__ == "__main__":
    for name in sys.argv[1:] or ["lorenz63", "published"]:
        store_published() if name == "published" else store(name)
