"""The `pnpda` command as a user meets it: through a subprocess."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import xarray as xr

from pnpda_nb.disk import write_netcdf

PNPDA = Path(sys.executable).with_name("pnpda")
# the whole chain, archive and training included, in a few seconds
TINY = ["--workers", "1", "--runs", "3", "--set", "cycles=5", "--set", "archive_runs=4", "--set", "archive_cycles=20", "--set", "epochs=3", "--set", "tuning_runs=2", "--set", "iterations=5"]


def pnpda(*words, **options):
    return subprocess.run([PNPDA, *map(str, words)], capture_output=True, text=True, **options)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, forked):
    folder = tmp_path_factory.mktemp("tiny")
    answer = forked("run", "lorenz63", *TINY, "--seed", 4, "--out", folder)
    assert answer.returncode == 0, answer.stderr
    return folder, answer.stdout


def test_that_list_names_experiments_methods_and_presets():
    answer = pnpda("list")
    assert answer.returncode == 0
    assert all(word in answer.stdout for word in ("lorenz63", "var3d_gc", "pnpda", "smoke", "paper"))


def test_that_a_run_leaves_scores_cycles_figures_and_a_manifest(tiny):
    folder, printed = tiny
    table = pd.read_csv(folder / "scores.csv", keep_default_na=False)
    assert list(table.columns) == ["experiment", "condition", "method", "metric", "variable", "mean", "std", "runs"]
    assert {"free_run", "var3d_gc", "var3d", "enkf", "conditional_mean", "pnpda"} <= set(table.method)
    assert {"step_rmse", "analysis_rmse", "background_rmse", "mae", "bias", "spread", "crps"} <= set(table.metric)
    assert set(table.variable) == {"all", "x", "y", "z"} and (table.runs == 3).all()
    cycles = xr.open_dataset(folder / "cycles.nc", engine="h5netcdf")
    assert dict(cycles.rmse.sizes) == {"scheme": 7, "run": 3, "time": 200}
    mean = float(table[(table.method == "enkf") & (table.metric == "step_rmse")]["mean"].iloc[0])
    assert np.isclose(float(cycles.rmse.sel(scheme="enkf").mean()), mean, rtol=1e-6)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["settings"]["seed"] == 4 and manifest["methods"]["pnpda"]["alpha"] == 0.5 and "torch" in manifest["versions"]
    assert {p.name for p in folder.glob("*.png")} == {"figure_2_time.png", "figure_2_phase.png", "trajectories.png"}
    assert "8.31 ± 1.57" in printed and "3D-Var (tuned)" in printed


def test_that_the_same_seed_gives_the_same_scores_byte_for_byte_on_two_processes(tiny, tmp_path, forked):
    methods = "free_run,var3d_gc,var3d,enkf,conditional_mean,pnpda,pnpda_small_alpha"
    forked("run", "lorenz63", *TINY[2:], "--workers", 2, "--seed", 4, "--methods", methods, "--out", tmp_path)
    assert (tmp_path / "scores.csv").read_bytes() == (tiny[0] / "scores.csv").read_bytes()


def test_that_methods_left_out_change_no_other_rows(tiny, tmp_path, forked):
    forked("run", "lorenz63", *TINY, "--seed", 4, "--methods", "pnpda,free_run", "--out", tmp_path)
    few, all_methods = (f.read_text().splitlines() for f in (tmp_path / "scores.csv", tiny[0] / "scores.csv"))
    assert few[1:] == [line for line in all_methods[1:] if line.split(",")[2] in ("pnpda", "free_run")]


def test_that_a_finished_run_is_not_done_again(tiny, forked):
    folder, _ = tiny
    parts = {p: p.stat().st_mtime_ns for p in (folder / "parts").iterdir()}
    assert forked("run", "lorenz63", *TINY, "--seed", 4, "--out", folder).returncode == 0
    assert {p: p.stat().st_mtime_ns for p in (folder / "parts").iterdir()} == parts


@pytest.mark.parametrize("moment", ["training", pytest.param("cycling", marks=pytest.mark.slow)])
def test_that_ctrl_c_leaves_usable_parts_and_the_same_command_resumes(moment, tmp_path, forked):
    settings = ["--runs", "3", "--set", "archive_runs=4", "--set", "archive_cycles=30"]
    # long enough to be hit in the middle on a fast machine
    changes = ("epochs=250", "patience=250", "iterations=5", "cycles=5") if moment == "training" else ("epochs=2", "patience=2", "iterations=600")
    settings += [word for change in changes for word in ("--set", change)]
    command = ["run", "lorenz63", *settings, "--methods", "free_run,pnpda", "--seed", "2"]
    assert forked(*command, "--workers", 1, "--out", tmp_path / "straight").returncode == 0
    # a test runner that was started in the background may have handed down an ignored SIGINT
    listen = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen([PNPDA, *command, "--out", tmp_path / "stopped"], stderr=subprocess.PIPE, text=True, preexec_fn=listen)
    parts, deadline = tmp_path / "stopped" / "parts", time.monotonic() + 60
    sign = "prior-*.training" if moment == "training" else "prior-*.safetensors"
    while not list(parts.glob(sign)) and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and said.strip().splitlines()[-1].startswith("pnpda: interrupted")
    assert len(list(parts.glob("cycle-*.nc"))) == 1  # that of the free run
    if moment == "training":
        assert list(parts.glob("prior-*.training"))
    assert not [p for p in parts.iterdir() if p.name.startswith(".")]
    assert forked(*command, "--workers", 1, "--out", tmp_path / "stopped").returncode == 0
    assert (tmp_path / "stopped" / "scores.csv").read_bytes() == (tmp_path / "straight" / "scores.csv").read_bytes()


def wrong_archive(folder: Path, value: float = 1.0, variables: int = 3) -> Path:
    values = np.random.default_rng(0).standard_normal((100, variables))
    values[3, 0] = value
    pairs = {"background": (("sample", "variable"), values), "analysis": (("sample", "variable"), values + 0.1 * values[::-1])}
    return write_netcdf(xr.Dataset(pairs), folder / "pairs.nc")


WRONG_WORDS = [
    (["run", "lorenz64"], "unknown experiment 'lorenz64'; known: lorenz63"),
    (["run", "lorenz63", "--methods", "4dvar"], "unknown method '4dvar'; known: free_run"),
    (["run", "lorenz63", "--preset", "huge"], "unknown preset 'huge'; known: smoke, paper"),
    (["run", "lorenz63", "--set", "speed=3"], "unknown setting 'speed'; known: runs"),
    (["run", "lorenz63", "--set", "alpha"], "expected key=value"),
    (["run", "lorenz63", "--set", "alpha=steep"], "expected alpha to be like 0.5"),
    (["run", "lorenz63", "--set", "alpha=-1"], "alpha: expected zero or a positive exponent"),
    (["run", "lorenz63", "--set", "step_rule=fast"], "step_rule: expected 'paper'"),
    (["run", "lorenz63", "--runs", "0"], "runs: expected at least 1, got 0"),
    (["run", "lorenz63", "--runs", "many"], "--runs"),
    (["run", "lorenz63", "--members", "1", "--methods", "enkf"], "members: EnKF needs an ensemble of at least 2"),
    (["run", "lorenz63", "--set", "model_error_variance=-0.1"], "variance: expected zero or a positive number"),
    (["run", "lorenz63", "--set", "observation_variance=-2"], "expected a positive definite matrix"),
    (["run", "lorenz63", "--set", "observation_correlation=1"], "expected a positive definite matrix"),
    (["run", "lorenz63", "--seed", "99999999999999999999"], "seed: expected a number of at most 63 bits"),
    (["run", "lorenz63", "--set", "gc_variance=-1"], "variance: expected a positive number"),
    (["run", "lorenz63", "--set", "observed=0,7"], "indices: expected distinct numbers from 0 to 2"),
    (["run", "lorenz63", "--set", "prior=missing.safetensors"], "no file missing.safetensors"),
    (["run", "lorenz63", "--out", "/dev/null/results"], "out: cannot write to"),
    (["train", "missing.nc", "--out", "prior.safetensors"], "archive: no file missing.nc"),
    (["run", "lorenz63", "--bogus"], "No such option"),
    (["fly"], "No such command"),
]


@pytest.fixture(scope="module")
def answers(tmp_path_factory, forked):
    """All wrong commands, each in an empty folder of its own."""
    folders = [tmp_path_factory.mktemp("wrong") for _ in WRONG_WORDS]
    return [(forked(*words, folder=folder), folder) for (words, _), folder in zip(WRONG_WORDS, folders)]


@pytest.mark.parametrize("number", range(len(WRONG_WORDS)), ids=[" ".join(words) for words, _ in WRONG_WORDS])
def test_that_a_wrong_word_is_one_line_and_status_two(number, answers):
    (answer, folder), said = answers[number], WRONG_WORDS[number][1]
    assert answer.returncode == 2 and said in answer.stderr and answer.stderr.count("\n") == 1 and not answer.stdout
    assert not list(folder.rglob("scores.csv"))


def test_that_wrong_files_are_one_line_and_status_two(tmp_path, untrained_prior, forked):
    whole = untrained_prior.save(tmp_path / "whole.safetensors").read_bytes()
    (tmp_path / "truncated.safetensors").write_bytes(whole[:-200])
    nan = wrong_archive(tmp_path, np.nan).rename(tmp_path / "nan.nc")
    four = wrong_archive(tmp_path, variables=4)
    prior_of_four = tmp_path / "four.safetensors"
    assert forked("train", four, "--out", prior_of_four, "--epochs", 1, "--paper").returncode == 0
    cases = [
        (["run", "lorenz63", "--methods", "pnpda", "--set", f"prior={tmp_path / 'truncated.safetensors'}"], "truncated or foreign"),
        (["run", "lorenz63", "--methods", "pnpda", "--set", f"prior={prior_of_four}"], "expected one for states of size 3, got size 4"),
        (["run", "lorenz63", "--methods", "var3d", "--set", f"archive={nan}"], "not finite in 1 of 100 samples"),
        (["run", "lorenz63", "--methods", "var3d", "--set", f"archive={four}"], "expected states of size 3 in"),
        (["train", nan, "--out", tmp_path / "p.safetensors"], "got nan in the background of state of pair 3"),
        (["train", tmp_path / "truncated.safetensors", "--out", tmp_path / "p.safetensors"], "not a readable NetCDF file"),
    ]
    commands = [words + (["--workers", 1, "--out", tmp_path / "out"] if words[0] == "run" else []) for words, _ in cases]
    for words, (_, said) in zip(commands, cases):
        answer = forked(*words, folder=tmp_path)
        assert answer.returncode == 2 and said in answer.stderr and answer.stderr.count("\n") == 1, answer.stderr
    assert not (tmp_path / "out" / "scores.csv").exists() and not (tmp_path / "p.safetensors").exists()


def test_that_a_method_of_which_no_run_survives_does_not_stop_the_others(tmp_path, forked):
    words = ["--set", "cycles=2", "--set", "archive_runs=4", "--set", "archive_cycles=20", "--set", "epochs=2", "--runs", "2", "--workers", "1"]
    answer = forked("run", "lorenz63", *words, "--set", "observation_variance=0.001", "--methods", "free_run,pnpda", "--out", tmp_path)
    assert answer.returncode == 0 and "pnpda: 2 of 2 runs" in answer.stdout
    assert json.loads((tmp_path / "manifest.json").read_text())["failed_runs"] == {"free_run": 0, "pnpda": 2}


def test_that_a_prior_trained_on_an_archive_can_be_used_in_a_run(tmp_path, forked):
    prior = tmp_path / "prior.safetensors"
    answer = forked("train", wrong_archive(tmp_path), "--out", prior, "--epochs", 2, "--paper")
    assert answer.returncode == 0 and "pairs that were set aside" in answer.stdout
    answer = forked("run", "lorenz63", "--runs", 2, "--methods", "pnpda", "--set", f"prior={prior}", "--set", "iterations=3", "--workers", 1, "--out", tmp_path / "out")
    assert answer.returncode == 0, answer.stderr
    assert sorted(name.split("-")[0] for name in os.listdir(tmp_path / "out" / "parts")) == ["cycle", "prior_file"]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [11, 12])
def test_that_the_paper_preset_reproduces_table_1(seed, tmp_path):
    start = time.monotonic()
    assert pnpda("run", "lorenz63", "--preset", "paper", "--seed", seed, "--out", tmp_path).returncode == 0
    assert time.monotonic() - start < 240
    table = pd.read_csv(tmp_path / "scores.csv").set_index(["method", "metric", "variable"])["mean"]
    for method, published, within in (
        ("free_run", (8.31, 9.35, 8.75), 0.12),
        ("var3d_gc", (4.61, 6.74, 5.13), 0.15),
        ("pnpda", (2.54, 3.94, 3.58), 0.15),
    ):
        assert all(abs(table[method, "mae", v] / p - 1) < within for v, p in zip("xyz", published)), method
    assert table["pnpda", "step_rmse", "all"] <= 4.1 and table["enkf", "step_rmse", "all"] <= 4.0
    assert table["var3d", "step_rmse", "all"] <= 3.95
