"""Score the same methods in DAPPER and here: `python tools/compare_dapper.py EXPERIMENT [--runs 10] [--cycles 500]`.

Writes the score of every run to nbs/results/dapper/runs.csv, which chapter 15 shows, in the place of those of the same experiment
(Lorenz-63 or Lorenz-96), and a manifest. Needs an environment with DAPPER; takes some minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from dataclasses import replace
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from pnpda_nb.classical import ETKF, LETKF, EnKF
from pnpda_nb.core.disk import write_record
from pnpda_nb.flow_matching import GaussianPrior
from pnpda_nb.interop import dapper_experiment, for_dapper
from pnpda_nb.interop.dapper import import_dapper
from pnpda_nb.pnp import PnPDA
from pnpda_nb.sweep import code_version
from pnpda_nb.twin import cycle, make_archive, pairs_of, scores, testbeds

ROOT = Path(__file__).resolve().parent.parent
KEPT = ROOT / "nbs" / "results" / "dapper"
WAYS = ("DAPPER's method in DAPPER", "ours in DAPPER", "ours with DAPPER's model", "all ours")


def settings():
    """Experiment, its HMM, ours, the label, DAPPER's method, ours, members."""
    import dapper.da_methods as da
    from dapper.mods.Lorenz63.sakov2012 import HMM as lorenz63
    from dapper.mods.Lorenz96.sakov2008 import HMM as lorenz96

    three, forty = ("Lorenz-63", lorenz63, testbeds.sakov2012), ("Lorenz-96", lorenz96, testbeds.sakov2008)
    archive = pairs_of(make_archive(testbeds.sakov2012(200), EnKF(inflation=1.04), members=10, runs=20, seed=100))
    return [
        (*three, "EnKF, N=10", lambda: da.EnKF("PertObs", N=10, infl=1.04), EnKF(inflation=1.04), 10),
        (*three, "ETKF, N=10, rotated", lambda: da.EnKF("Sqrt", N=10, infl=1.02, rot=True), ETKF(inflation=1.02, rotate=True), 10),
        (*three, "PnP-DA, Gaussian prior", None, PnPDA(GaussianPrior.from_pairs(*archive), data_step="kalman"), 1),
        (*forty, "EnKF, N=40", lambda: da.EnKF("PertObs", N=40, infl=1.06), EnKF(inflation=1.06), 40),
        (*forty, "ETKF, N=24, rotated", lambda: da.EnKF("Sqrt", N=24, infl=1.02, rot=True), ETKF(inflation=1.02, rotate=True), 24),
        (
            *forty, "LETKF, N=7, rotated",
            lambda: da.LETKF(N=7, infl=1.04, rot=True, loc_rad=4), LETKF(inflation=1.04, rotate=True, half_width=7.28), 7,
        ),
    ]  # fmt: skip


def in_dapper(hmm, make, runs: int) -> list[float]:
    """Analysis RMSEs of `make()` for truths with seeds 1, 2, ..."""
    from dapper.tools.seeding import set_seed

    scored = []
    for seed in range(1, runs + 1):
        set_seed(seed)
        truth, observations = hmm.simulate()
        xp = make()
        xp.assimilate(hmm, truth, observations)
        xp.stats.average_in_time()
        scored.append(float(xp.avrgs.err.rms.a.val))
    return scored


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=["Lorenz-63", "Lorenz-96"])
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--cycles", type=int, default=500)
    given = parser.parse_args()
    torch.set_num_threads(1)
    import_dapper()
    from dapper.dpr_config import rc

    rc.comps["error_only"] = True  # of all statistics, only errors are kept
    rows, start = [], time.perf_counter()
    for experiment, hmm, ours, label, theirs, method, members in settings():
        if experiment != given.experiment:
            continue
        hmm = hmm.copy()
        hmm.tseq.Ko = given.cycles - 1
        translated = dapper_experiment(hmm)
        for way in WAYS if theirs else WAYS[1:]:
            if way == WAYS[0]:
                scored = in_dapper(hmm, theirs, given.runs)
            elif way == WAYS[1]:
                scored = in_dapper(hmm, lambda: for_dapper(method, members), given.runs)
            else:  # in `all ours` the same cycles count
                twin = translated if way == WAYS[2] else replace(ours(cycles=given.cycles), burn_in=translated.burn_in)
                result = cycle(twin, method, members=members, runs=given.runs, seed=1, keep="scores")
                scored = scores(result).analysis_rmse.values.tolist()
            rows += [(experiment, label, way, run, score) for run, score in enumerate(scored)]
            mean, error = np.mean(scored), np.std(scored, ddof=1) / len(scored) ** 0.5
            print(f"{time.perf_counter() - start:6.0f} s  {experiment}: {label}, {way}: {mean:.3f} ± {error:.3f}", flush=True)
    KEPT.mkdir(parents=True, exist_ok=True)
    table, path = pd.DataFrame(rows, columns="experiment method way run score".split()), KEPT / "runs.csv"
    if path.exists():
        before = pd.read_csv(path)
        table = pd.concat([before[before.experiment != given.experiment], table]).sort_values("experiment", kind="stable")
    table.to_csv(path, index=False, float_format="%.6g")
    record, path = {}, KEPT / "manifest.json"
    if path.exists():
        record = json.loads(path.read_text())
    record[given.experiment] = {
        "command": f"python tools/compare_dapper.py {given.experiment} --runs {given.runs} --cycles {given.cycles}",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "code": code_version(),
        "wall_seconds": round(time.perf_counter() - start, 1),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in ("dapper", "numpy", "torch")},
    }
    write_record(record, path)


if __name__ == "__main__":
    sys.exit(main())
