"""The benchmark as a user runs it: small versions, in another process."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from pnpda_nb import bench as benchmark

PNPDA = Path(sys.executable).with_name("pnpda")


def pnpda(*words, **options):
    return subprocess.run([PNPDA, *map(str, words)], capture_output=True, text=True, **options)


def test_that_the_quick_benchmark_writes_whole_files_and_prints_its_table(tmp_path):
    answer = pnpda("bench", "--quick", "--only", "steps", "--out", tmp_path)
    assert answer.returncode == 0, answer.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bench.csv", "manifest.json"]
    table = pd.read_csv(tmp_path / "bench.csv")
    assert list(table.columns) == list(benchmark.COLUMNS) and set(table.part) == {"steps"}
    assert np.isfinite(table[table.unit == "steps/s"].ours).all() and (table.ratio.dropna() > 0).all()
    assert all(case in answer.stdout for case in table.case)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["machine"]["threads"] == 1 and "torch" in manifest["machine"]["versions"]
    assert manifest["sizes"]["dimensions"] == list(benchmark.QUICK.dimensions)


@pytest.mark.parametrize(
    "words, said",
    [
        (["--only", "speed"], "only: unknown part 'speed'; known: enkf, steps, etdrk4, members, state, memory"),
        (["--quick", "--full"], "quick: expected one of --quick and --full"),
    ],
)
def test_that_a_wrong_word_is_one_line_and_status_two(words, said):
    answer = pnpda("bench", *words)
    assert answer.returncode == 2 and said in answer.stderr and answer.stderr.count("\n") == 1 and not answer.stdout


def test_that_the_dapper_part_is_skipped_with_a_reason_when_it_is_not_installed(monkeypatch):
    monkeypatch.setattr(benchmark, "find_spec", lambda name: None)
    table = benchmark.bench(["enkf"], benchmark.QUICK)
    assert len(table) == 1 and "skipped: DAPPER is not installed" in benchmark.report(table) and table.ratio.isna().all()


@pytest.mark.skipif(find_spec("dapper") is None, reason="DAPPER is not installed")
def test_that_dapper_and_we_score_the_same_on_the_same_experiment():
    table = benchmark.bench(["enkf"], benchmark.QUICK).set_index("case")
    assert abs(table.loc["analysis RMSE", "ours"] - table.loc["analysis RMSE", "peer"]) < 0.3


def test_that_a_folder_that_cannot_be_written_to_is_found_out_before_anything_is_measured(monkeypatch):
    monkeypatch.setitem(benchmark.PARTS, "steps", lambda sizes: pytest.fail("measured"))
    with pytest.raises(ValueError, match="out: cannot write to"):
        benchmark.bench(["steps"], out="/dev/null/bench")


def test_that_workloads_are_measured_apart_and_one_that_fails_is_reported_with_its_size():
    answers = benchmark.needs("members", [20, 1])
    size, seconds, rise = next(answers)
    assert size == 20 and seconds > 0 and rise >= 0
    with pytest.raises(RuntimeError, match="members: size 1 failed: .*needs an ensemble of at least 2"):
        next(answers)


def test_that_one_thread_is_used_only_inside_the_benchmark(monkeypatch):
    import torch

    inside = []
    monkeypatch.setitem(benchmark.PARTS, "steps", lambda sizes: inside.append(torch.get_num_threads()) or iter(()))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        benchmark.bench(["steps"])
        assert inside == [1] and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
