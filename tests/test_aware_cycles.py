"""Priors that go on learning where they are used: in cycles of a model over the times of an archive."""

import signal
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
import xarray as xr

from pnpda_nb.core import stream
from pnpda_nb.dynamics.base import rk4
from pnpda_nb.files import Axis, Field, Layout, open_archive
from pnpda_nb.files.layout import layout_record
from pnpda_nb.flow_matching import TensorPairs
from pnpda_nb.operations import AwareSettings, learn_archive, rounds
from pnpda_nb.operations.cases import Networks
from pnpda_nb.operations.cycling import _compared, _cycled, _Forecasts, _Ground, _ratio, _Scores, consecutive
from pnpda_nb.operations.errors import Part
from pnpda_nb.operations.pipeline import set_aside
from pnpda_nb.operations.rounds import Rounds, learn_in_cycles
from pnpda_nb.operations.verdicts import cycles_report, cycles_verdict

DIM = 8
TINY = AwareSettings(epochs=8, steps=20, batch=32, width=16, learning_rate=4e-3)
FEW = Rounds(rounds=2, networks=64, cycles=12, epochs=8, rate=1.0)
RING = Layout((Field("u", (DIM,), ("longitude",)),), {"longitude": Axis(tuple(45.0 * np.arange(DIM)), "degrees_east")})


def walked(x: torch.Tensor, forcing: float, steps: int = 2) -> torch.Tensor:
    def tendency(x):
        return (x.roll(-1, -1) - x.roll(2, -1)) * x.roll(1, -1) - x + forcing

    for _ in range(steps):
        x = rk4(tendency, x, 0.05)
    return x


def carried(x: torch.Tensor) -> torch.Tensor:
    """Lorenz-96 with too weak a forcing."""
    return walked(x, 7.0)


@cache
def world(times: int = 300, runs: int = 4) -> TensorPairs:
    """Lorenz-96, and forecasts from analyses that are nearly right."""
    draws = stream(0, "world")
    x, b, a = walked(8 + torch.randn(runs, DIM, generator=draws).double(), 8.0, 100), [], []
    for _ in range(times):
        b.append(carried(x + 0.2 * torch.randn(runs, DIM, generator=draws)))
        x = walked(x, 8.0)
        a.append(x)
    return TensorPairs(torch.cat(b), torch.cat(a), "carried", 40, layout_record(RING))


@pytest.fixture(scope="module")
def learned():
    return learn_archive(world(), TINY, seed=1)


@pytest.fixture(scope="module")
def cycled(learned):
    return learn_in_cycles(world(), learned, carried, 4, FEW, seed=1)


def test_that_the_round_with_the_best_forecasts_is_kept_and_judged_by_other_times(cycled, learned):
    table, verdict = cycled.rounds, cycled.verdict
    assert list(table["round"]) == [0, 1, 2] and table.ratio[0] == 1 and cycled.kept == table.ratio.argmin()
    before, after = table.forecast[0], table.forecast[1]
    assert table["less by (forecast)"][1] == pytest.approx(before - after) and (table["± paired (forecast)"][1:] > 0).all()
    assert (table.ratio >= (table.forecast + table["± paired (forecast)"]) / before - 1e-12).all()
    assert cycled.kept and list(verdict["prior"]) == ["of the archive", f"after round {cycled.kept}"]
    assert cycled.learned.prior.to_bytes() != learned.prior.to_bytes() and 0.5 < cycled.coverage < 0.99
    prior, source = learned.prior, world()
    *_, part = set_aside(source, 256_000_000, ends=3)
    networks, parts = Networks(**{k: tuple(v) for k, v in prior.training["networks"].items()}), [slice(0, DIM)]
    ground, draws = _Ground.of(part, 4, 10_000, stream(1, "verdict", 0)), stream(1, "verdict", 0)
    starts = ground.starts(12, (64, 1), None)
    assert int(starts[0].min()) + ground.first == part.first // 4 >= 270  # the last tenth of the times
    errors = []
    for one in _cycled(prior, _Forecasts(carried), ground, starts, 12, networks, parts, draws, torch.device("cpu")):
        errors.append((one.cases.background - one.cases.analysis) / prior.unit)
    own = torch.stack(errors[7:]).square().mean().sqrt()
    assert verdict.forecast[0] == pytest.approx(float(own), rel=1e-9)
    page = cycles_report(cycled, "pairs").html()
    assert page.count("<table") == 5 and page.count("Believe the figure in cycles: spreads were calibrated there") == 2
    said = cycles_verdict(replace(cycled, kept=0))
    assert "Believe the figure in cycles: backgrounds are forecasts" in said
    assert "the archive's prior is kept" in said and "In units of the increments" in said


def test_that_a_round_is_only_better_if_chains_that_are_lost_and_those_that_are_not_say_so():
    place = torch.arange(40)
    before = torch.where(place.unsqueeze(1) < 4, 100.0, 1.0).double() * (1 + 0.1 * torch.rand(40, 6, generator=stream(0)))

    def ratio(lost: float, others: float) -> float:
        ours = before * torch.where(place.unsqueeze(1) < 4, lost, others)
        return _ratio(*(_Scores(x, x, x, place, torch.zeros(3, 1)) for x in (before, ours)))

    assert ratio(1.0, 1.0) == pytest.approx(1) and 0.5 <= ratio(0.25, 0.25) < 0.65
    assert ratio(0.25, 1.5) > 1 and ratio(1.1, 0.25) > 1
    assert ratio(1.0, 0.25) == pytest.approx(1, abs=0.05) and ratio(1.0, 0.25) > 0.95


def test_that_chains_that_have_lost_their_way_do_not_count_for_nearly_all(learned):
    start = rounds._Start(learned.prior.linear, learned.halves, 100)
    parts = set_aside(world(), 256_000_000, ends=3)
    subject = rounds._InCycles(
        learned.prior, start, _Forecasts(carried), parts, 4, FEW, 1, 256_000_000, torch.device("cpu"), False
    )  # fmt: skip
    subject.settings = replace(subject.settings, likelihood=0.0)
    target, look, met = next(subject.batches(0))
    assert met.shape == target.shape[:2] and (met[:8] == 0).all() and (met[8:] > 0).all()
    far = target.clone()
    far[-1] += 100 * learned.prior.unit
    with torch.no_grad():
        one, lost = (subject.loss((x, look, met)).item() for x in (target, far))
        met[-1] = 100.0**2
        relative = subject.loss((far, look, met)).item()
    assert lost > 20 * one and relative < 1.5 * one


@pytest.mark.parametrize("epoch", [3, 8])
def test_that_an_interruption_anywhere_changes_no_byte(cycled, learned, tmp_path, monkeypatch, epoch):
    whole, checkpoint, run = cycled.learned.prior.to_bytes(), tmp_path / "p.cycles", rounds.run_training

    def stopped(training, path, **options):
        def stop(number, row):
            if number == epoch:
                raise KeyboardInterrupt

        run(training, path, callback=stop, **options)

    monkeypatch.setattr(rounds, "run_training", stopped)
    with pytest.raises(KeyboardInterrupt):
        learn_in_cycles(world(), learned, carried, 4, FEW, seed=1, checkpoint=checkpoint)
    monkeypatch.setattr(rounds, "run_training", run)
    again = learn_in_cycles(world(), learned, carried, 4, FEW, seed=1, checkpoint=checkpoint)
    assert again.learned.prior.to_bytes() == whole and again.rounds.equals(cycled.rounds)
    with pytest.raises(ValueError, match="belongs to a training with other settings, seed, pairs or model"):
        learn_in_cycles(world(), learned, lambda x: 0.99 * carried(x), 4, FEW, seed=1, checkpoint=checkpoint)


def test_that_states_are_set_aside_with_which_a_model_fails(learned):
    def failing(x):
        if (x[:, 0] > 11).any():
            raise ValueError("too warm")
        return torch.where(x[:, :1] < -5, torch.nan, carried(x))

    x = torch.tensor([[0.0], [12.0], [1.0], [-6.0]]).double().expand(4, DIM).clone()
    forecasts = _Forecasts(failing)
    moved, there = forecasts(x)
    assert there.tolist() == [True, False, True, False] and torch.equal(moved[there], carried(x[there]))
    assert (forecasts.tried, forecasts.lost, forecasts.said) == (4, 2, "too warm")
    with pytest.raises(ValueError, match="model: expected forecasts, got none of 1 states: too warm"):
        forecasts(x[1:2])
    found = learn_in_cycles(world(), learned, failing, 4, Rounds(1, 16, 8, 1), seed=1)
    assert "failed and were set aside" in found.notes[1] and np.isfinite(found.rounds.forecast).all()
    with pytest.raises(ValueError, match="expected forecasts from each time of the archive to the next, got errors of"):
        learn_in_cycles(world(), learned, lambda x: 50 + carried(x), 4, FEW)


def test_that_chains_go_from_time_to_time_within_their_part():
    source = world()
    ground = _Ground.of(Part(source, 6, 400), 4, 1000, stream(0))
    assert (ground.first, len(ground.analysis)) == (2, 98)
    assert torch.equal(ground.analysis[3, 1], source.analysis[4 * 5 + 1])
    for draws in (None, stream(1)):
        time, member = ground.starts(8, (40, 2), draws)
        assert time.shape == member.shape == (40, 2) and int(time.max()) + 8 <= 97 and int(member.max()) == 3
    assert len(_Ground.of(Part(source, 0, 600), 4, 11, stream(0)).analysis) == 11


def test_that_chains_from_one_place_are_one_case_in_paired_errors():
    ours = 1 + torch.rand(30, 5, generator=stream(0)).double()
    place = torch.arange(30)
    one = _compared(4 * ours, ours, place)
    assert one[2] == pytest.approx(one[0]) and one[3] == pytest.approx(one[1])  # twice the root mean square
    twice = _compared(*(torch.cat([x, x]) for x in (4 * ours, ours)), torch.cat([place, place]))
    assert twice == pytest.approx(one)


# ---------------------------------------------------------------- from the shell


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder, pairs = tmp_path_factory.mktemp("cycles"), world(60, 2)
    data = {
        n: (("time", "run", "lon"), x.numpy().reshape(60, 2, DIM))
        for n, x in (("background", pairs.background), ("analysis", pairs.analysis))
    }
    whole = xr.Dataset(data, {"lon": ("lon", 45.0 * np.arange(DIM), {"units": "degrees_east"}), "time": np.arange(60) * 6})
    whole.to_netcdf(folder / "pairs.nc")
    whole.isel(time=np.delete(np.arange(60), 7)).to_netcdf(folder / "gap.nc")
    whole.drop_vars("time").to_netcdf(folder / "timeless.nc")
    (folder / "carry.py").write_text(
        "import numpy as np\n\ndef on(x):\n    return 0.9 * x\n\ndef off(x):\n    return x[..., :2]\n\nno = 3\n"
    )
    return folder


def test_that_times_must_follow_one_another_at_one_interval(folder):
    with open_archive(folder / "pairs.nc") as archive:
        assert consecutive(archive) == (2, "6")


@pytest.mark.parametrize("how", [["--model", "carry:on"], ["--program", "cp {input} {output}", "--interval", 2]])
def test_that_the_shell_trains_in_cycles_of_functions_and_programs(folder, tmp_path, forked, how):
    words = ["train", "pairs.nc", "--out", tmp_path / "p.safetensors", "--epochs", 1, "--rounds", 1, *how]
    answer = forked(*words, folder=folder)
    assert answer.returncode == 0, answer.stderr
    assert "with 2 pair(s) of each" in answer.stdout and "In units of the increments" in answer.stdout
    assert sorted(p.name for p in tmp_path.iterdir()) == ["p.html", "p.safetensors"]
    assert "In cycles with the model" in (tmp_path / "p.html").read_text()


KILLED = """
import os, signal
from pnpda_nb.core import training
from pnpda_nb.operations import rounds
training._EVERY = training._PAUSE = 0.0
whole, calls = rounds._InCycles.loss, []
def loss(*given):
    calls.append(1)
    if len(calls) == {call}: os.kill(os.getpid(), signal.SIGKILL)
    return whole(*given)
rounds._InCycles.loss = loss
"""


def test_that_a_training_in_cycles_that_is_killed_goes_on_to_the_same_bytes(folder, tmp_path, forked):
    def train(name, before=""):
        words = "--epochs", 1, "--rounds", 2, "--model", "carry:on", "--seed", 3
        return forked("train", "pairs.nc", "--out", tmp_path / name / "p.safetensors", *words, folder=folder, before=before)

    (tmp_path / "whole").mkdir(), (tmp_path / "killed").mkdir()
    assert train("whole").returncode == 0
    for call in (4, 20):  # in the first epoch, and then in one of the second round
        assert train("killed", KILLED.format(call=call)).returncode == -signal.SIGKILL
        left = sorted(p.name for p in (tmp_path / "killed").iterdir())
        assert left == ["p.safetensors.cycles"] * (call == 20) + ["p.safetensors.training"], left
    again = train("killed")
    assert again.returncode == 0, again.stderr
    for name in ("p.safetensors", "p.html"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert len(list((tmp_path / "killed").iterdir())) == 2


@pytest.mark.parametrize(
    "words, said",
    [
        (
            ["gap.nc", "--model", "carry:on"],
            "expected times at regular intervals to forecast from one to the next, got 36 and then 48",
        ),
        (
            ["timeless.nc", "--model", "carry:on"],
            "expected times at regular intervals to forecast from one to the next, got none in timeless.nc",
        ),
        (["pairs.nc", "--model", "carry"], "model: expected MODULE:FUNCTION, got 'carry'"),
        (["pairs.nc", "--model", "carry:out"], "model: carry has no 'out'; it has "),
        (["pairs.nc", "--model", "carry.py:no"], "model: expected a function or a model as carry.py:no, got int"),
        (["pairs.nc", "--model", "carry:off"], "carry:off: expected states of shape"),
        (["pairs.nc", "--program", "false {input} {output}"], "false: ended with status 1"),
        (
            ["pairs.nc", "--model", "carry:on", "--program", "cp {input} {output}"],
            "model: expected one of --model and --program, got both",
        ),
        (["pairs.nc", "--rounds", "2"], "rounds: expected it with --model or --program, got 2"),
        (["pairs.nc", "--model", "carry:on", "--kind", "blind"], "model: expected none for a prior of kind blind"),
    ],
)
def test_that_a_model_that_does_not_fit_is_one_line(folder, forked, words, said):
    before = sorted(p.name for p in folder.iterdir() if p.name != "__pycache__")
    answer = forked("train", *words, "--out", "new.p", folder=folder)
    assert answer.returncode == 2 and said in answer.stderr and answer.stderr.count("\n") == 1, answer
    assert sorted(p.name for p in folder.iterdir() if p.name != "__pycache__") == before
