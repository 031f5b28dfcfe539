"""Make the stored results of the book again: `python tools/store_results.py [STUDY ...]`.

Runs the paper preset of each study, Lorenz-63 for several seeds, the presets of the chapter beyond the paper and the studies of
windows, and keeps what is small: scores, manifest, priors, the archive of Lorenz-63, and the scores of every run. Chapters read
these files and check a few rows against the code. In all it takes about six hours on two cores; a run that was interrupted goes on
where it was.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import xarray as xr

from pnpda_nb.core import write_netcdf

ROOT = Path(__file__).resolve().parent.parent
KEPT, WORK = ROOT / "nbs" / "results", ROOT / "runs" / "stored"
SEEDS = {"lorenz63": range(1, 7), "lorenz96": [1], "kuramoto_sivashinsky": [1], "ablations": [1]}
BEYOND = {f"beyond_{name}": [1] for name in ("lorenz63", "lorenz96", "kuramoto_sivashinsky", "parts")}
FIELDS = {"sqg": [1], "sqg_elsewhere": [1], "sqg_around": [1]}
CHOSEN = {  # what is stored of a study that takes many hours
    "sqg": "--set still=0 --set jets=none --set dissipations=none --set larger=0"
    " --methods free_run,interpolation,var3d,letkf,letkf_40,amortised",
    "sqg_elsewhere": "--set larger=0 --methods var3d,amortised",
    "sqg_around": "--set still=0 --set jets=none --set dissipations=none --set columns=256 --set larger_runs=6"
    " --set truth_runs=16 --set priors=nbs/results/sqg --methods var3d,letkf_40,pnpda_blind,amortised,learned_mean",
}
WINDOWS = {f"incremental_{name}": [1] for name in ("lorenz63", "pendulum", "lorenz96")}
SMALL = 500_000  # bytes; larger priors are not kept, but for fields
PNPDA = str(Path(sys.executable).with_name("pnpda"))


def keep(study: str, folder: Path) -> None:
    """Copy what is small from the `folder` of a run to the stored results."""
    kept = KEPT / study
    kept.mkdir(parents=True, exist_ok=True)
    priors = sorted(folder.glob("prior*.safetensors"))
    if study in WINDOWS:
        priors = []
    if study in FIELDS:
        theirs = {"sqg": "prior_amortised", "sqg_around": "prior_learned_mean"}
        priors = [p for p in priors if p.stem == theirs.get(study)]
    if study in BEYOND:
        priors = [p for p in priors if p.stem in ("prior_amortised", "prior_pnpda_blind") and p.stat().st_size < SMALL]
    some = (*folder.glob("tuning_*.json"), *folder.glob("maps.nc"))
    for path in (folder / "scores.csv", folder / "manifest.json", *priors, *some):
        shutil.copy(path, kept / path.name)
    if study == "lorenz63":  # pairs that chapters learn from
        (archive,) = folder.glob("parts/archive-*.nc")
        shutil.copy(archive, kept / "archive.nc")
    cycles = xr.load_dataset(folder / "cycles.nc", engine="h5netcdf")
    if study in WINDOWS:
        for name in ("timing.json", "scaling.json", "levels.nc"):
            shutil.copy(folder / name, kept / name)
        main = np.isin(cycles.condition.values, ("regular", "random"))
        return write_netcdf(cycles[["mse"]].isel(case=main), kept / "runs.nc")
    if "case" in cycles.dims:  # many conditions: the scores by variable would be megabytes
        table = pd.read_csv(kept / "scores.csv")
        table[table.variable == "all"].to_csv(kept / "scores.csv", index=False, float_format="%.8g")
        write_netcdf(cycles.drop_dims("cycle"), kept / "runs.nc")


def store(study: str) -> None:
    tables = []
    experiment = study.removeprefix("beyond_").removesuffix("_elsewhere").removesuffix("_around")
    preset, chosen = "beyond" if study in BEYOND else "paper", CHOSEN.get(study, "").split()
    if experiment == "parts":
        experiment, preset = "beyond", "paper"
    for seed in (SEEDS | BEYOND | FIELDS | WINDOWS)[study]:
        folder = WORK / study / str(seed)
        subprocess.run(
            [PNPDA, "run", experiment, "--preset", preset, "--seed", str(seed), "--out", str(folder), *chosen], cwd=ROOT, check=True
        )
        tables.append(pd.read_csv(folder / "scores.csv").assign(seed=seed))
    keep(study, WORK / study / str((SEEDS | BEYOND | FIELDS | WINDOWS)[study][0]))
    if len(tables) > 1:
        pd.concat(tables).to_csv(KEPT / study / "seeds.csv", index=False, float_format="%.8g")


def store_published() -> None:
    subprocess.run([PNPDA, "published", "--out", str(KEPT / "published")], cwd=ROOT, check=True)


if __name__ == "__main__":
    for name in sys.argv[1:] or [*SEEDS, *BEYOND, *FIELDS, *WINDOWS, "published"]:
        store_published() if name == "published" else store(name)
