"""The benchmark as a user runs it: small versions, in another process."""

import dataclasses
import json
from importlib.util import find_spec

import numpy as np
import pandas as pd
import pytest

from pnpda_nb.bench import bench, growth, measure, report, speed, suite
from pnpda_nb.bench.measure import QUICK
from pnpda_nb.sweep import code_version


def test_that_the_quick_benchmark_writes_whole_files_and_prints_its_table(tmp_path, forked):
    answer = forked("bench", "--quick", "--only", "steps", "--out", tmp_path)
    assert answer.returncode == 0, answer.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bench.csv", "manifest.json"]
    table = pd.read_csv(tmp_path / "bench.csv")
    assert list(table.columns) == list(measure.COLUMNS) and set(table.part) == {"steps"}
    assert np.isfinite(table[table.unit == "steps/s"].ours).all() and (table.ratio.dropna() > 0).all()
    assert all(case in answer.stdout for case in table.case)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    (session,) = manifest["sessions"]
    assert session["machine"]["threads"] == 1 and "torch" in session["machine"]["versions"]
    assert session["sizes"]["dimensions"] == list(QUICK.dimensions) and session["parts"] == ["steps"]


@pytest.mark.parametrize(
    "words, said",
    [
        (
            ["--only", "speed"],
            "only: unknown part 'speed'; known: enkf, lorenz96, kuramoto_sivashinsky, own_tendency, steps, etdrk4, members, ",
        ),
        (["--quick", "--full"], "quick: expected one of --quick and --full"),
    ],
)
def test_that_a_wrong_word_is_one_line_and_status_two(words, said, forked):
    answer = forked("bench", *words)
    assert answer.returncode == 2 and said in answer.stderr and answer.stderr.count("\n") == 1 and not answer.stdout


def test_that_the_dapper_part_is_skipped_with_a_reason_when_it_is_not_installed(monkeypatch):
    monkeypatch.setattr(speed, "find_spec", lambda name: None)
    table = bench(["enkf", "kuramoto_sivashinsky", "own_tendency"], QUICK)
    assert len(table) == 3 and "skipped: DAPPER is not installed" in report(table) and table.ratio.isna().all()


@pytest.mark.skipif(find_spec("dapper") is None, reason="DAPPER is not installed")
@pytest.mark.parametrize("part, within", [("enkf", 0.3), ("own_tendency", 0.3), ("kuramoto_sivashinsky", 0.03)])
def test_that_dapper_and_we_score_the_same_on_the_same_experiment(part, within):
    table = bench([part], QUICK)
    scored = table[table.case.str.endswith("analysis RMSE")].iloc[0]
    assert abs(scored.ours - scored.peer) < within


def test_that_a_device_is_measured_beside_the_processor_and_one_that_is_not_there_is_refused():
    small = dataclasses.replace(QUICK, ensembles=(5,), runs=1, iterations=2, repeats=1)
    table = bench(["device"], small)
    assert list(table.case.str.endswith(", cpu")) == [True, True] and (table.ratio > 0).all() and (table.ours > 0).all()
    with pytest.raises(ValueError, match="device: expected cpu or, where there is one, cuda, got nowhere"):
        bench(["device"], dataclasses.replace(small, device="nowhere"))


def test_that_a_users_tendency_and_the_model_that_it_is_are_the_same():
    from pnpda_nb.core import standard_normal, stream
    from pnpda_nb.dynamics import Lorenz63
    from pnpda_nb.interop import from_tendency

    states = 10 * standard_normal((5, 3), stream(1, "states"))
    for compiled in (False, True):
        model = from_tendency(speed._tendency, dim=3, dt=0.01, compile=compiled, **({} if compiled else {"numpy": True}))
        model = model if compiled else dataclasses.replace(model, one_at_a_time=True)
        assert np.allclose(model.step(states), Lorenz63().step(states), rtol=1e-12)


def test_that_a_folder_that_cannot_be_written_to_is_found_out_before_anything_is_measured(monkeypatch):
    monkeypatch.setitem(suite.PARTS, "steps", lambda sizes: pytest.fail("measured"))
    with pytest.raises(ValueError, match="out: cannot write to"):
        bench(["steps"], out="/dev/null/bench")


@pytest.mark.slow
def test_that_workloads_are_measured_apart_and_one_that_fails_is_reported_with_its_size():
    answers = growth.needs("members", [20, 1])
    size, seconds, rise = next(answers)
    assert size == 20 and seconds > 0 and rise >= 0
    with pytest.raises(RuntimeError, match="members: size 1 failed: .*needs an ensemble of at least 2"):
        next(answers)


def test_that_one_thread_is_used_only_inside_the_benchmark(monkeypatch):
    import torch

    inside = []
    monkeypatch.setitem(suite.PARTS, "steps", lambda sizes: inside.append(torch.get_num_threads()) or iter(()))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        bench(["steps"])
        assert inside == [1] and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def invented(part: str, value: float):
    return lambda sizes: iter([measure._row(part, "invented", value)])


def test_that_parts_that_are_run_again_replace_their_rows_and_no_others(monkeypatch, tmp_path):
    def table_and_sessions():
        sessions = json.loads((tmp_path / "manifest.json").read_text())["sessions"]
        return pd.read_csv(tmp_path / "bench.csv").set_index("part").ours.to_dict(), [s["parts"] for s in sessions]

    for part, value in (("enkf", 1), ("steps", 2), ("memory", 3)):
        monkeypatch.setitem(suite.PARTS, part, invented(part, value))
    bench(["steps", "memory"], out=tmp_path)
    assert json.loads((tmp_path / "manifest.json").read_text())["sessions"][0]["code"] == code_version()
    answer = bench(["enkf"], QUICK, out=tmp_path)
    assert set(answer.part) == {"enkf"}  # what was measured, not what is in the folder
    assert table_and_sessions() == ({"enkf": 1, "steps": 2, "memory": 3}, [["steps", "memory"], ["enkf"]])
    monkeypatch.setitem(suite.PARTS, "steps", invented("steps", 4))
    bench(["steps"], out=tmp_path)
    values, sessions = table_and_sessions()
    assert list(values.items()) == [("enkf", 1), ("steps", 4), ("memory", 3)]  # in the order of the parts
    assert sessions == [["memory"], ["enkf"], ["steps"]]
    bench(["memory", "enkf"], out=tmp_path)
    assert table_and_sessions()[1] == [["steps"], ["enkf", "memory"]]


@pytest.mark.parametrize("manifest", [None, "{", "{}", "[]", '{"sessions": 3}'])
def test_that_a_table_without_a_readable_manifest_is_not_written_over(monkeypatch, tmp_path, manifest):
    (tmp_path / "bench.csv").write_text("part,case\nmine,alone\n")
    if manifest is not None:
        (tmp_path / "manifest.json").write_text(manifest)
    monkeypatch.setitem(suite.PARTS, "steps", lambda sizes: pytest.fail("measured"))
    with pytest.raises(ValueError, match="out: .* holds a table that this one cannot be added to"):
        bench(["steps"], out=tmp_path)
    assert (tmp_path / "bench.csv").read_text() == "part,case\nmine,alone\n"


def test_that_an_analysis_is_compared_with_its_network_passes():
    table = bench(["pnpda"], QUICK)
    speeds, costs = table[table.unit == "analyses/s"], table[table.case.str.contains("bare passes")]
    assert len(speeds) == len(costs) == len(speed.NETWORKS)
    assert (speeds[["ours", "peer", "ratio", "low", "high"]] > 0).all(axis=None) and np.isfinite(costs.ours).all()
    assert np.allclose(costs.ours.values * speeds.ratio.values, 1, atol=0.6)  # medians of numbers and of their inverses


def test_that_the_time_of_an_analysis_has_rows_for_every_size_and_both_rules(monkeypatch):
    def here(name, sizes):
        return ((size, *growth._needed(name, size)) for size in sizes)  # saves two processes

    monkeypatch.setattr(growth, "needs", here)
    table = bench(["pnpda_state"], QUICK)
    for prefix in ("", "scaled: "):
        times = table[table.case.str.startswith(f"{prefix}time of an analysis")]
        assert list(times["size"]) == list(QUICK.fields) and (times.ours > 0).all()
    assert np.isfinite(table[table.case.str.contains("exponent of time")].ours).all()


def test_that_the_training_part_is_skipped_with_a_reason_when_torchcfm_is_not_installed(monkeypatch):
    monkeypatch.setattr(speed, "find_spec", lambda name: None)
    table = bench(["training"], QUICK)
    assert len(table) == 1 and "skipped: torchcfm is not installed" in report(table) and table.ratio.isna().all()


@pytest.mark.skipif(find_spec("torchcfm") is None, reason="torchcfm is not installed")
def test_that_torchcfm_and_we_train_alike_and_numpy_keeps_its_random_state():
    before = np.random.get_state()[1].copy()
    table = bench(["training"], QUICK).set_index("case")
    assert (np.random.get_state()[1] == before).all()
    timed = table[table.unit == "s"]
    assert len(timed) == 4 * len(QUICK.minibatches) and (timed.ratio > 0).all()
    losses = table[table.index.str.endswith("without replacement")]
    assert len(losses) == 2
    for _, row in losses.iterrows():
        ours, theirs = (float(word.split()[0].rstrip(",")) for word in row.note.split("± ")[1:])
        assert abs(row.ours - row.peer) < 3 * (ours**2 + theirs**2) ** 0.5


@pytest.mark.skipif(find_spec("torchcfm") is None, reason="torchcfm is not installed")
def test_that_torchcfm_pairs_as_we_do():
    import torch

    z, a, b, _ = speed._minibatches(48, 1)[0]
    ours = torch.cat(speed.our_pairing(3.0)(z, a, b), -1)
    every = torch.cat(speed.torchcfm_pairing(3.0, replace=False)(z, a, b), -1)
    drawn = torch.cat(speed.torchcfm_pairing(3.0)(z, a, b), -1)
    assert {tuple(x) for x in every.tolist()} == {tuple(x) for x in ours.tolist()}
    assert {tuple(x) for x in drawn.tolist()} < {tuple(x) for x in ours.tolist()}
