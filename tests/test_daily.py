"""The daily cycle from files: whatever interrupts it, and whichever members fail."""

import os
import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr

from pnpda_nb.cli.daily import _prepared
from pnpda_nb.files import open_archive
from pnpda_nb.files.sequence import _moments, _observed_at, _read_start
from pnpda_nb.operations import AwareSettings, learn_archive
from pnpda_nb.operations.ahead import _Ahead, _replaced
from pnpda_nb.operations.daily import _run_daily
from pnpda_nb.operations.verification import _verification

WORDS = {
    "method": "etkf", "prior": None, "set": {"inflation": "1.05"}, "model": "world:step", "program": None, "interval": None,
    "members": 8, "spread": "0.5", "leads": 3, "fallback": None, "calibration": 30, "regions": 2, "seed": 1, "start": "start.nc",
}  # fmt: skip
MODEL = """
import numpy as np

def step(x):
    slope = lambda x: np.roll(x, 1, -1) * (np.roll(x, -1, -1) - np.roll(x, 2, -1)) - x + 8
    k = slope(x)
    return x + 0.04 * slope(x + 0.02 * k)
"""
DAY = np.datetime64("2020-01-01", "ns")


def step(x):
    space = {}
    exec(MODEL, space)
    return space["step"](x)


def seen(x, k, r, name="T"):
    values = x[::2] + 0.5 * r.standard_normal(len(x[::2]))
    data = {
        name: (("station",), values, {"units": "K"}),
        f"{name}_error": (("station",), np.full(len(values), 0.5)),
        "x": (("station",), np.arange(0.0, len(x), 2)),
    }
    return xr.Dataset(data, coords={"time": DAY + np.timedelta64(round(360 * k), "m")})


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A model of twelve numbers, a start and eight files of observations."""
    r, x = np.random.default_rng(0), 8 + np.random.default_rng(1).standard_normal(12)
    for _ in range(200):
        x = step(x)
    start = xr.Dataset({"T": (("x",), x + 0.3, {"units": "K"})}, coords={"x": np.arange(12.0), "time": DAY})
    start.to_netcdf(tmp_path / "start.nc")
    for k in range(1, 9):
        x = step(x)
        seen(x, k, r).to_netcdf(tmp_path / f"obs_{k}.nc")
    (tmp_path / "world.py").write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def daily(out, pattern="obs_*.nc", workers=1, timeout=5.0, **changes):
    words = WORDS | changes
    told = {name: str(value) for name, value in words.items() if value is not None}
    Path(out).mkdir(exist_ok=True)
    return _prepared(words, told, Path("start.nc"), pattern, Path(out), timeout, workers)


def contents(folder):
    return {p.name: p.read_bytes() for p in Path(folder).iterdir() if not p.name.startswith(".")}


def test_that_a_cycle_follows_the_truth_and_its_report_says_so(world):
    plan = daily("out")
    memory = _run_daily(plan)
    last = xr.open_dataset("out/analysis_20200103T0000.nc", engine="h5netcdf")
    assert (
        dict(last["T"].sizes) == {"member": 8, "x": 12}
        and last["T"].units == "K"
        and last.time.values == DAY + np.timedelta64(2, "D")
    )
    assert np.allclose(last["T"].mean("member"), last.T_mean) and np.allclose(last["T"].std("member", ddof=1), last.T_std)
    report, text, table = _verification(plan, memory)
    assert table.observations.tolist() == [48] and 0.4 < float(table.rms[0]) < 1.5 and "learning what is usual: 8 of 30" in text
    assert memory["skill"][:, 0, 0].tolist() == [48.0, 42.0, 36.0] and int(memory["ranks"].sum()) == 48
    assert "Forecasts by lead" in report.html()
    free = _run_daily(daily("free", method="free_run", set={}))
    errors = [float(m["rows"][4:, 0, 2].mean()) for m in (memory, free)]
    assert errors[0] < errors[1]


def test_that_days_that_come_later_make_the_same_bytes_as_all_at_once(world):
    _run_daily(daily("whole"))
    for k in range(5, 9):
        Path(f"obs_{k}.nc").rename(f"later_{k}.nc")
    assert len(_run_daily(daily("parts"))["done"]) == 4
    for k in range(5, 9):
        Path(f"later_{k}.nc").rename(f"obs_{k}.nc")
    assert len(_run_daily(daily("parts"))["done"]) == 8
    assert contents("parts") == contents("whole")
    with pytest.raises(ValueError, match="out: expected the options with which parts was begun, got seed 2 instead of 1"):
        _run_daily(daily("parts", seed=2))
    seen(np.zeros(12), 1.5, np.random.default_rng(0)).to_netcdf("obs_late.nc")
    assert any("not used" in note for note in _run_daily(daily("parts"))["notes"])
    (world / "parts" / "checkpoint").unlink()
    with pytest.raises(ValueError, match="out: expected a new folder"):
        _run_daily(daily("parts"))


def killed(out, moments):
    """A cycle that is killed again and again, each time after so many seconds, and then comes to its end."""
    for moment in moments:
        child = os.fork()
        if not child:
            try:
                _run_daily(daily(out))
            finally:
                os._exit(0)
        time.sleep(moment)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    _run_daily(daily(out))


@pytest.mark.parametrize("times", [4, pytest.param(20, marks=pytest.mark.slow)])
def test_that_nothing_is_lost_when_it_is_killed_and_the_same_bytes_result(world, times):
    began = time.monotonic()
    _run_daily(daily("whole"))
    length, draw = time.monotonic() - began, random.Random(times)
    killed("killed", [draw.uniform(0.01, 0.7) * length for _ in range(times)])
    assert contents("killed") == contents("whole")


FAILING = """#!/bin/sh
n=$(cat count 2>/dev/null || echo 0); n=$((n+1)); echo $n > count
case $n in
  5) echo "no convergence" >&2; exit 3;;
  7) sleep 30;;
  9) head -c 900 "$1" > "$2";;
  *) cp "$1" "$2";;
esac
"""


def test_that_a_program_may_fail_for_a_member_or_hang_or_write_half_a_file(world):
    Path("program.sh").write_text(FAILING)
    plan = daily(
        "out", program="sh program.sh {input} {output}", model=None, timeout=1.0, members=4, leads=1, pattern="obs_[1-3].nc"
    )
    memory = _run_daily(plan)
    notes = memory["notes"]
    assert len(memory["done"]) == len(notes) == 3 and all("set aside" in note for note in notes)
    assert "ended with status 3: no convergence" in notes[0] and "within 1 s" in notes[1] and "not a readable NetCDF" in notes[2]
    assert torch.isfinite(memory["states"]).all() and len(memory["states"]) == 4
    Path("program.sh").write_text("exit 1")
    with pytest.raises(ValueError, match="model: expected forecasts, got none of 4: sh: ended with status 1"):
        _run_daily(daily("all", program="sh program.sh {input} {output}", model=None, members=4, pattern="obs_[1-3].nc"))
    assert not list(Path("all").glob("analysis_*"))


def test_that_programs_run_side_by_side_and_make_the_same_bytes(world):
    for out, workers in (("one", 1), ("four", 4)):
        _run_daily(daily(out, program="cp {input} {output}", model=None, members=4, pattern="obs_[12].nc", workers=workers))
    assert contents("one") == contents("four")


def test_that_a_member_without_a_forecast_goes_on_beside_the_nearest():
    class Fragile:
        def step(self, states):
            if (states > 9).any():
                raise ValueError("model: too warm")
            return 2 * states

    members = torch.tensor([[1.0], [2.0], [9.5], [4.0]]).double()
    moved, said = _Ahead(Fragile())(members, 1)
    assert said == {2: "model: too warm"} and moved[[0, 1, 3], 0].tolist() == [2.0, 4.0, 8.0]
    whole, lines = _replaced(members, moved, said)
    assert whole[2].item() == 8.0 + 5.5 and lines == ["member 2 set aside, member 3 goes on in its place: model: too warm"]


def test_that_a_prior_from_an_archive_is_cycled_with_draws_around_it(world):
    r, a = np.random.default_rng(3), []
    x = 8 + r.standard_normal((4, 12))
    for _ in range(60):
        x = step(x)
        a.append(x)
    a = np.stack(a).reshape(-1, 12)
    pairs = {
        n: (("sample", "x"), v, {"units": "K"})
        for n, v in (("T_analysis", a), ("T_background", a + 0.4 * r.standard_normal(a.shape)))
    }
    xr.Dataset(pairs, coords={"x": np.arange(12.0)}).to_netcdf("pairs.nc")
    with open_archive("pairs.nc") as archive:
        learn_archive(archive, AwareSettings(epochs=1, steps=3, batch=16, width=8)).prior.save("p.safetensors")
    changes = dict(method=None, prior=Path("p.safetensors"), set={}, spread=None)
    memory = _run_daily(daily("out", pattern="obs_[1-4].nc", members=6, **changes))
    data = xr.open_dataset("out/analysis_20200102T0000.nc", engine="h5netcdf")
    assert dict(data["T"].sizes) == {"member": 6, "x": 12} and (data.T_std > 0).all()
    alone = _run_daily(daily("alone", pattern="obs_[1-4].nc", members=None, **changes))
    assert torch.allclose(alone["states"][0], memory["states"][0])  # draws do nothing to the analysis
    data = xr.open_dataset("alone/analysis_20200102T0000.nc", engine="h5netcdf")
    assert data["T"].dims == ("x",) and "T_std" in data


@pytest.mark.slow  # quick: that the fall-back has the weight (test_monitor)
def test_that_the_fallback_counts_while_an_alarm_lasts(world):
    r, x = np.random.default_rng(0), _read_start("start.nc").values[0].numpy() - 0.3
    for k in range(1, 46):
        x = step(x)
        seen(x + 6.0 * (k > 40), k, r).to_netcdf(f"obs_{k:02d}.nc")
    memory = _run_daily(daily("out", pattern="obs_??.nc", fallback="enkf", members=20))
    fallen = [xr.open_dataset(p, engine="h5netcdf").fallen_back for p in sorted(Path("out").glob("analysis_*"))]
    assert not any(fallen[:40]) and fallen[-1] == 1 and memory["alarms"][0][0] == 40


def test_that_times_may_be_in_several_files_or_several_in_one(world):
    rows = [f"2020-01-01T{h:02d}:00Z,{v},0.5,{i}" for h in (6, 12) for i, v in enumerate((1.0, 2.0))]
    Path("obs_9.csv").write_text("\n".join(["time,value,error,x_index,units", *(f"{row},K" for row in rows)]))
    start = _read_start("start.nc")
    moments = _moments("obs_[129].*", start.time)
    assert [len(m.files) for m in moments] == [2, 2] and moments[0].label == "20200101T0600"
    both = _observed_at(moments[0], start.layout)
    assert both.values.shape == (1, 8) and sorted(both.values[0, -2:].tolist() + both.values[0, :2].tolist())[-1] > 2
    for number in (1, 2, 10):
        Path(f"row_{number}.csv").write_text(f"value,error,x_index\n{number},0.5,1\n")
    assert [(m.time, m.files) for m in _moments("row_*.csv")][2] == (3.0, ("row_10.csv",))
    with pytest.raises(ValueError, match="expected times, as the start has one, got none"):
        _moments("row_*.csv", start.time)
    with pytest.raises(FileNotFoundError, match="observations: no file nothing"):
        _moments("nothing*.nc")


def test_that_an_analysis_is_the_start_of_another_cycle(world):
    _run_daily(daily("out", pattern="obs_[1-4].nc"))
    start = _read_start("out/analysis_20200102T0000.nc")
    assert start.values.shape == (8, 12) and start.time == DAY + np.timedelta64(1, "D")


def test_that_times_must_be_whole_steps_apart(world):
    Path("obs_3.nc").unlink()
    seen(step(np.full(12, 8.0)), 2.3, np.random.default_rng(0)).to_netcdf("obs_0.nc")
    with pytest.raises(
        ValueError, match="observations: expected times that are whole steps of 6480 s apart, got 2020-01-01 and then"
    ):
        _run_daily(daily("out", pattern="obs_[0-5].nc"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--method etkf --model world:step --prior p.x", "prior: expected one of --prior and --method, got both"),
        ("--method var4d --model world:step", "method: expected one of free_run, enkf"),
        ("--method etkf --set speed=1 --model world:step", "ETKF: got an unexpected keyword argument 'speed'"),
        ("--method etkf --members 4 --model world:step", "members: expected --spread, for members around the one state"),
        ("--method etkf --members 4 --spread U=1 --model world:step", "spread: expected a positive number, or T=NUMBER, got 'U=1'"),
        ("--method free_run --model world:nothing", "model: world has no 'nothing'"),
    ],
)
def test_that_wrong_words_are_one_line_and_leave_nothing(words, said, world, forked):
    answer = forked("cycle", "--start", "start.nc", "--observations", "obs_*.nc", "--out", "out", *words.split(), folder=world)
    assert answer.returncode == 2 and said in answer.stderr and answer.stderr.count("\n") == 1, answer.stderr
    assert not list(world.glob("out/analysis_*"))


def test_that_the_command_writes_analyses_a_checkpoint_and_a_report(world, forked):
    words = "--method enkf --members 6 --spread 0.5 --model world:step --out out".split()
    for _ in range(2):
        answer = forked("cycle", "--start", "start.nc", "--observations", "obs_[12].nc", *words, folder=world)
        assert answer.returncode == 0, answer.stderr
    assert "2 analyses, 0 of them new" in answer.stdout
    assert set(contents("out")) == {
        "analysis_20200101T0600.nc",
        "analysis_20200101T1200.nc",
        "checkpoint",
        "report.html",
        "report.txt",
    }
