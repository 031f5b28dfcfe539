"""The `pnpda` command as a user meets it: through a subprocess."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr

from pnpda_nb import cli
from pnpda_nb.core import read_record, write_netcdf
from pnpda_nb.flow_matching import FlowPrior
from pnpda_nb.learned import AnalysisPrior

PNPDA = Path(sys.executable).with_name("pnpda")
# the whole chain, archive and training included, in a few seconds
TINY = [
    "--workers",
    "1",
    "--runs",
    "3",
    "--set",
    "cycles=5",
    "--set",
    "archive_runs=4",
    "--set",
    "archive_cycles=20",
    "--set",
    "epochs=3",
    "--set",
    "tuning_runs=2",
    "--set",
    "iterations=5",
]


# for commands whose figures nobody looks at: drawing them takes most of their time
UNDRAWN = "import matplotlib.figure\nmatplotlib.figure.Figure.draw = lambda *_: None\n"


def pnpda(*words, **options):
    return subprocess.run([PNPDA, *map(str, words)], capture_output=True, text=True, **options)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, forked):
    folder = tmp_path_factory.mktemp("tiny")
    answer = forked("run", "lorenz63", *TINY, "--seed", 4, "--out", folder)
    assert answer.returncode == 0, answer.stderr
    return folder, answer.stdout


def test_that_list_names_experiments_methods_and_presets(forked):
    answer = forked("list")
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


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_that_the_same_seed_gives_the_same_rows_byte_for_byte_on_processes_and_without_others(tiny, tmp_path, forked, workers):
    words = ["--workers", workers, "--seed", 4, "--methods", "pnpda,free_run", "--out", tmp_path]
    forked("run", "lorenz63", *TINY[2:], *words, before=UNDRAWN)
    few, all_methods = (f.read_text().splitlines() for f in (tmp_path / "scores.csv", tiny[0] / "scores.csv"))
    assert len(few) > 1 and few[1:] == [line for line in all_methods[1:] if line.split(",")[2] in ("pnpda", "free_run")]


def test_that_a_finished_run_is_not_done_again(tiny, forked):
    folder, _ = tiny
    parts = {p: p.stat().st_mtime_ns for p in (folder / "parts").iterdir()}
    assert forked("run", "lorenz63", *TINY, "--seed", 4, "--out", folder, before=UNDRAWN).returncode == 0
    assert {p: p.stat().st_mtime_ns for p in (folder / "parts").iterdir()} == parts


def test_that_a_run_and_an_analysis_in_single_precision_are_those_in_double_up_to_rounding(tiny, files, tmp_path, forked):
    folder, few = tiny[0], ["--methods", "var3d_gc,free_run", "--dtype", "float32", "--out", tmp_path]
    answer = forked("run", "lorenz63", *TINY, "--seed", 4, *few, before=UNDRAWN)
    assert answer.returncode == 0, answer.stderr
    assert json.loads((tmp_path / "manifest.json").read_text())["settings"]["dtype"] == "float32"
    tables = [pd.read_csv(f / "scores.csv").query("method == 'var3d_gc'")["mean"] for f in (folder, tmp_path)]
    assert 0 < np.abs(tables[0].values / tables[1].values - 1).max() < 0.01
    analyses = []
    for dtype in ("float64", "float32"):
        words = ["--iterations", 2, "--dtype", dtype, "--out", tmp_path / f"{dtype}.nc"]
        answer = forked(*ASSIMILATE, *words, folder=files, before=UNDRAWN)
        assert answer.returncode == 0, answer.stderr
        analyses.append(xr.open_dataset(tmp_path / f"{dtype}.nc", engine="h5netcdf"))
    assert f"--dtype {dtype}" in analyses[1].history
    for name in analyses[0].data_vars:
        assert np.allclose(analyses[0][name], analyses[1][name], rtol=1e-4, atol=1e-4), name


@pytest.mark.slow  # quick: a training that is interrupted (test_files_and_operations), and a sweep that is killed (test_sweeps)
@pytest.mark.parametrize("moment", ["training", "cycling"])
def test_that_ctrl_c_leaves_usable_parts_and_the_same_command_resumes(moment, tmp_path, forked):
    settings = ["--runs", "2", "--set", "archive_runs=2", "--set", "archive_cycles=30"]
    # long enough to be hit in the middle on a fast machine
    changes = (
        ("epochs=120", "patience=120", "iterations=5", "cycles=5")
        if moment == "training"
        else ("epochs=2", "patience=2", "iterations=600")
    )
    settings += [word for change in changes for word in ("--set", change)]
    command = ["run", "lorenz63", *settings, "--methods", "free_run,pnpda", "--seed", "2"]
    assert forked(*command, "--workers", 1, "--out", tmp_path / "straight").returncode == 0
    # a test runner that was started in the background may have handed down an ignored SIGINT
    listen = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    workers = ["--workers", "1"] if moment == "training" else []
    process = subprocess.Popen(
        [PNPDA, *command, *workers, "--out", tmp_path / "stopped"], stderr=subprocess.PIPE, text=True, preexec_fn=listen
    )
    parts, deadline = tmp_path / "stopped" / "parts", time.monotonic() + 60
    sign = "prior-*.training" if moment == "training" else "prior-*.safetensors"
    while not list(parts.glob(sign)) and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and said.strip().splitlines()[-1].startswith("pnpda: interrupted")
    if moment == "training":
        assert list(parts.glob("archive-*")) and list(parts.glob("prior-*.training"))
    else:
        assert len(list(parts.glob("cycle-*.nc"))) == 1  # that of the free run
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
    (["run", "lorenz63", "--set", "alpha=steep"], "alpha: expected zero or a positive number, got 'steep'"),
    (["run", "lorenz63", "--set", "alpha=-1"], "alpha: expected zero or a positive number, got '-1'"),
    (["run", "lorenz63", "--set", "step_rule=fast"], "step_rule: expected 'paper'"),
    (["run", "lorenz63", "--runs", "0"], "runs: expected at least 1, got 0"),
    (["run", "lorenz63", "--runs", "many"], "--runs"),
    (["run", "lorenz63", "--members", "1", "--methods", "enkf", "--workers", "1"], "members: EnKF needs an ensemble of at least 2"),
    (["run", "lorenz63", "--set", "model_error_variance=-0.1"], "model_error_variance: expected zero or a positive number"),
    (["run", "lorenz63", "--set", "observation_variance=-2"], "observation_variance: expected a positive number, got '-2'"),
    (["run", "lorenz63", "--set", "observation_correlation=1"], "expected a positive definite matrix"),
    (["run", "lorenz63", "--seed", "99999999999999999999"], "seed: expected a whole number of at most 63 bits"),
    (["run", "lorenz63", "--set", "gc_variance=-1"], "gc_variance: expected a positive number"),
    (["run", "lorenz63", "--set", "batch=2.5"], "batch: expected a whole number of at least 1, got '2.5'"),
    (["run", "lorenz63", "--set", "linear_skip=perhaps"], "linear_skip: expected True or False, got 'perhaps'"),
    (["run", "lorenz96", "--set", "hidden=3.5"], "hidden: expected a sequence, each a whole number of at least 1, got '3.5'"),
    (["run", "lorenz63", "--set", "observed=0,7"], "indices: expected distinct numbers from 0 to 2"),
    (["run", "lorenz63", "--set", "prior=missing.safetensors"], "no file missing.safetensors"),
    (["run", "lorenz63", "--out", "/dev/null/results"], "out: cannot write to"),
    (["run", "lorenz63", "--dtype", "half"], "dtype: expected float64 or float32, got half"),
    (["run", "lorenz63", "--device", "tpu"], "device: expected cpu or, where there is one, cuda, got tpu"),
    (["run", "incremental_pendulum", "--dtype", "float32"], "dtype: expected a study that cycles states"),
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
        (
            ["run", "lorenz63", "--methods", "pnpda", "--set", f"prior={tmp_path / 'truncated.safetensors'}"],
            "not a readable safetensors file (truncated",
        ),
        (
            ["run", "lorenz63", "--methods", "pnpda", "--set", f"prior={prior_of_four}"],
            "expected one for states of size 3, got size 4",
        ),
        (["run", "lorenz63", "--methods", "var3d", "--set", f"archive={nan}"], "not finite in 1 of 100 samples"),
        (["run", "lorenz63", "--methods", "var3d", "--set", f"archive={four}"], "expected states of size 3 in"),
        (["train", nan, "--out", tmp_path / "p.safetensors"], "got nan in the background of state of pair 3"),
        (["train", tmp_path / "truncated.safetensors", "--out", tmp_path / "p.safetensors"], "not a readable NetCDF file"),
        (["train", four, "--out", tmp_path / "p.safetensors", "--device", "tpu"], "device: expected cpu or, where there is"),
    ]
    commands = [words + (["--workers", 1, "--out", tmp_path / "out"] if words[0] == "run" else []) for words, _ in cases]
    for words, (_, said) in zip(commands, cases):
        answer = forked(*words, folder=tmp_path)
        assert answer.returncode == 2 and said in answer.stderr and answer.stderr.count("\n") == 1, answer.stderr
    assert not (tmp_path / "out" / "scores.csv").exists() and not (tmp_path / "p.safetensors").exists()


def test_that_a_method_of_which_no_run_survives_does_not_stop_the_others(tmp_path, forked):
    words = [
        "--set",
        "cycles=2",
        "--set",
        "archive_runs=4",
        "--set",
        "archive_cycles=20",
        "--set",
        "epochs=2",
        "--runs",
        "2",
        "--workers",
        "1",
    ]
    answer = forked(
        "run", "lorenz63", *words, "--set", "observation_variance=0.001", "--methods", "free_run,pnpda", "--out", tmp_path
    )
    assert answer.returncode == 0 and "pnpda: 2 of 2 runs" in answer.stdout
    assert json.loads((tmp_path / "manifest.json").read_text())["failed_runs"] == {"free_run": 0, "pnpda": 2}


def test_that_a_prior_trained_on_an_archive_can_be_used_in_a_run(tmp_path, forked):
    prior = tmp_path / "prior.safetensors"
    answer = forked("train", wrong_archive(tmp_path), "--out", prior, "--epochs", 2, "--paper")
    assert answer.returncode == 0 and "pairs that were set aside" in answer.stdout
    answer = forked(
        "run",
        "lorenz63",
        "--runs",
        2,
        "--methods",
        "pnpda",
        "--set",
        f"prior={prior}",
        "--set",
        "iterations=3",
        "--workers",
        1,
        "--out",
        tmp_path / "out",
        before=UNDRAWN,
    )
    assert answer.returncode == 0, answer.stderr
    assert sorted(name.split("-")[0] for name in os.listdir(tmp_path / "out" / "parts")) == ["cycle", "prior_file"]


# ---------------------------------------------------------------------------------------------- outputs and inputs


@pytest.fixture(scope="module")
def files(tmp_path_factory, forked):
    """An archive as two files, as one, and as a Zarr store; a prior; a background; observations."""
    folder, r = tmp_path_factory.mktemp("files"), np.random.default_rng(0)
    b = r.standard_normal((60, 3))
    pairs = xr.Dataset({"T_background": (("time", "x"), b), "T_analysis": (("time", "x"), b + 0.1 * r.standard_normal(b.shape))})
    for name, some in (("pairs.nc", slice(60)), ("part_1.nc", slice(30)), ("part_2.nc", slice(30, 60))):
        write_netcdf(pairs.isel(time=some), folder / name)
    write_netcdf(pairs[["T_background"]].isel(time=[0]), folder / "today.nc")
    (folder / "seen.csv").write_text("value,error,x_index\n0.5,0.1,1\n")
    done = forked(
        "train", "pairs.nc", "--out", "prior.safetensors", "--epochs", 1, "--paper", "--report", "prior.md", folder=folder
    )
    assert done.returncode == 0, done.stderr
    return folder


ASSIMILATE = ["assimilate", "--prior", "prior.safetensors", "--background", "today.nc", "--observations", "seen.csv"]


@pytest.fixture
def copied(files, tmp_path):
    """The files in a folder of their own, where they may be spoiled; with links, a store and another name for one of them."""
    shutil.copytree(files, tmp_path, dirs_exist_ok=True)
    (tmp_path / "link.nc").symlink_to("pairs.nc"), (tmp_path / "d").mkdir(), (tmp_path / "away").symlink_to("d")
    os.link(tmp_path / "pairs.nc", tmp_path / "hard.nc")
    (tmp_path / "store.zarr").mkdir(), (tmp_path / "today.md").write_text("mine")
    return tmp_path


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def fails_and_touches_nothing(answer, folder, before):
    return (
        answer.returncode == 2
        and answer.stderr.startswith("pnpda: ")
        and answer.stderr.count("\n") == 1
        and not answer.stdout
        and contents(folder) == before
    )


@pytest.mark.parametrize(
    "words",
    [
        "train pairs.nc --out link.nc",
        "train link.nc --out pairs.nc",
        "train pairs.nc --out hard.nc",
        "train pairs.nc --out d/../pairs.nc",
        "train pairs.nc --out later/../pairs.nc",
        "train part_*.nc --out part_2.nc",
        "train p?ir[s].nc --out pairs.nc",
        "train store.zarr --out store.zarr/p.safetensors",
        "train store.zarr --out p.x --report store.zarr/later/p.html",
        "train part_*.nc --out x.html --report x.html",
        "train part_*.nc --out x.html --report ./d/../x.html",
        "train part_*.nc --out d/x.html --report away/x.html",
        "train part_*.nc --out X.html --report x.html",
        "train part_*.nc --out x_files/0.png --report x.md",
        "train p.training --out p",
        "train pairs.nc --out new/ --report /dev/null",
        "train pairs.nc --out /dev/null",
        "train /dev/zero --out p",
        "assimilate --prior today.md --background today.nc --observations seen.csv --out n.nc --report today.md",
        "assimilate --prior prior.safetensors --background prior_files/0.png --observations seen.csv --out n.nc --report prior.md",
        " ".join([*ASSIMILATE, "--out today.nc"]),
        " ".join([*ASSIMILATE, "--out ./d/../today.nc"]),
        " ".join([*ASSIMILATE, "--out n.nc --report seen.md/../seen.csv"]),
        "run lorenz63 --methods free_run --out pairs.nc",
        "run lorenz63 --methods free_run --out . --set archive=pairs.nc",
        "run lorenz63 --methods free_run --out away/.. --set prior=prior.safetensors",
        "bench --quick --out pairs.nc",
        "published --quick --out pairs.nc",
    ],
)
def test_that_no_output_meets_an_input_or_another_output(words, copied, forked):
    shutil.copy(copied / "pairs.nc", copied / "p.training")
    before = contents(copied)
    answer = forked(*words.split(), folder=copied)
    assert fails_and_touches_nothing(answer, copied, before), answer
    assert "expected" in answer.stderr and not (copied / "later").exists() and Path("/dev/null").is_char_device()


def test_that_outputs_may_be_beside_inputs_and_may_be_written_again(copied, forked):
    for _ in range(2):
        answer = forked(*ASSIMILATE, "--out", "d/../analysis.nc", "--report", "away/analysis.md", folder=copied)
        assert answer.returncode == 0, answer.stderr
    assert (copied / "analysis.nc").exists() and list((copied / "d" / "analysis_files").glob("*.png"))
    assert (copied / "d" / "analysis.md").read_text().count("](analysis_files/") == 1


def test_that_folders_that_were_made_for_nothing_go_away(copied, forked):
    (copied / "pairs.nc").write_bytes(wrong_archive(copied / "d", np.nan).read_bytes())
    answer = forked("train", "pairs.nc", "--out", "a/b/p.safetensors", "--report", "c/p.html", "--epochs", 1, folder=copied)
    assert answer.returncode == 2 and not (copied / "a").exists() and not (copied / "c").exists()
    answer = forked(
        "run", "lorenz63", "--methods", "pnpda", "--set", "prior=today.nc", "--out", "a/b", "--workers", 1, folder=copied
    )
    assert answer.returncode == 2 and not (copied / "a").exists()


# ---------------------------------------------------------------------------------------------- disks


FULL = {
    "train": ["train", "pairs.nc", "--epochs", 1, "--out", "full/p.safetensors"],
    "assimilate": [*ASSIMILATE, "--iterations", 1, "--out", "full/a.nc"],
    "run": ["run", "lorenz63", "--methods", "free_run,var3d_gc", "--runs", 40, "--workers", 1, "--out", "full"],
    "sweep": ["run", "lorenz63", *TINY, "--runs", 40, "--workers", 2, "--methods", "free_run,pnpda", "--out", "full"],
}
OLD = ("p.safetensors", "p.html", "a.nc", "a.html", "scores.csv", "cycles.nc", "manifest.json")


def whole_parts(folder):
    """What may be left of a sweep: parts that can be read."""
    return all(name in OLD or name.startswith("parts/") and ".part" not in name for name in contents(folder)) and all(
        xr.load_dataset(p, engine="h5netcdf") for p in folder.glob("parts/*.nc")
    )


@pytest.mark.parametrize(
    "name, size",
    [
        ("train", 3000),
        ("assimilate", 3000),
        pytest.param("run", 3000, marks=pytest.mark.slow),
        ("run", 40_000),
        pytest.param("sweep", 20_000, marks=pytest.mark.slow),
    ],
)
def test_that_a_file_that_may_not_grow_is_one_line_and_the_old_ones_stay(name, size, copied, forked):
    (copied / "full").mkdir()
    for old in OLD:
        (copied / "full" / old).write_text("old")
    answer = forked(*FULL[name], folder=copied, before=f"resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))")
    assert answer.returncode == 2 and answer.stderr.count("\n") == 1 and "File too large" in answer.stderr, answer
    assert whole_parts(copied / "full") and all((copied / "full" / old).read_text() == "old" for old in OLD)


@pytest.mark.parametrize("name", ["train", "assimilate", "run", pytest.param("sweep", marks=pytest.mark.slow)])
def test_that_a_full_disk_is_one_line_and_the_old_files_stay(name, copied, forked):
    (copied / "full").mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", copied / "full"], capture_output=True).returncode:
        pytest.skip("a file system cannot be mounted here")
    try:
        for old in OLD:
            (copied / "full" / old).write_text("old")
        (copied / "full" / "p.safetensors.x").write_bytes(bytes(24_000))  # what others have there
        answer = forked(*FULL[name], folder=copied)
        assert answer.returncode == 2 and answer.stderr.count("\n") == 1 and "No space left" in answer.stderr, answer
        (copied / "full" / "p.safetensors.x").unlink()
        assert whole_parts(copied / "full") and all((copied / "full" / old).read_text() == "old" for old in OLD)
    finally:
        subprocess.run(["umount", copied / "full"], check=True)


def test_that_what_a_killed_process_left_is_removed_when_it_is_old(copied, forked):
    dead = subprocess.Popen(["true"])
    dead.wait()
    names = {
        "old": f".{dead.pid}.part.a.nc",
        "young": f".{dead.pid}.part.a.html",
        "living": f".{os.getpid()}.part.a.nc",
        "other": f".{dead.pid}.part.b.nc",
        "named": ".x.part.a.nc",
    }
    for kind, name in names.items():
        (copied / name).touch()
        os.utime(copied / name, (0, 0)) if kind != "young" else None
    assert forked(*ASSIMILATE, "--out", "a.nc", folder=copied).returncode == 0
    assert [kind for kind, name in names.items() if not (copied / name).exists()] == ["old"]


def test_that_a_manifest_is_sealed_and_knows_the_files_beside_it(tiny):
    folder, _ = tiny
    files = read_record(folder / "manifest.json")["files"]
    assert {"scores.csv", "cycles.nc", "prior.safetensors", "figure_2_time.png"} <= set(files)
    assert all(hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest for name, digest in files.items())


# ---------------------------------------------------------------------------------------------- what is printed


@pytest.mark.parametrize(
    "encoding, sign",
    [
        ("cp1252", b"\xb1"),
        pytest.param("ascii", rb"\xb1", marks=pytest.mark.slow),
        pytest.param("utf-8", "±".encode(), marks=pytest.mark.slow),
    ],
)
def test_that_output_does_not_fail_for_its_encoding(encoding, sign, copied, forked):
    answer = forked(
        *FULL["train"][:-1], "p.safetensors", folder=copied, before=f"sys.stdout = open('printed', 'w', encoding='{encoding}')"
    )
    assert answer.returncode == 0 and not answer.stderr and b" (" + sign + b" standard error" in (copied / "printed").read_bytes()


@pytest.mark.slow
def test_that_output_does_not_fail_for_its_encoding_in_a_shell(copied):
    line = [PNPDA, *ASSIMILATE, "--out", "é.nc"]
    answer = subprocess.run(line, cwd=copied, capture_output=True, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert answer.returncode == 0 and not answer.stderr and rb"In \xe9.nc and \xe9.html" in answer.stdout


NOBODY = {
    "a pipe that is closed": (
        "r, w = os.pipe(); os.close(r); sys.stdout, sys.stderr = os.fdopen(w, 'w'), os.fdopen(os.dup(w), 'w')",
        0,
    ),
    "no output": ("os.close(1); sys.stdout = None", 0),
    "no errors": ("os.close(2); sys.stderr = None", 0),
    "nothing": ("sys.stdin = sys.stdout = sys.stderr = None; os.closerange(0, 3)", 0),
    "a full disk": ("os.dup2(os.open('/dev/full', os.O_WRONLY), 1)", 2),
    "errors on a full disk": ("os.dup2(os.open('/dev/full', os.O_WRONLY), 2)", 0),
}


@pytest.mark.parametrize(
    "where",
    [pytest.param(w, marks=[pytest.mark.slow] if w in ("no output", "no errors", "errors on a full disk") else []) for w in NOBODY],
)
def test_that_output_that_nobody_reads_stops_nothing(where, copied, forked):
    before, status = NOBODY[where]
    answer = forked(*ASSIMILATE, "--out", "new.nc", folder=copied, before=before)
    assert answer.returncode == status and xr.load_dataset(copied / "new.nc", engine="h5netcdf").T_analysis.shape == (1, 3)
    assert answer.stderr.count("\n") == (status > 0) and "Traceback" not in answer.stderr


@pytest.mark.slow
def test_that_a_pipe_may_be_closed_early_in_a_shell():
    answer = subprocess.run(["bash", "-c", f"set -o pipefail; {PNPDA} list | head -c 10"], capture_output=True, text=True)
    assert answer.returncode == 0 and len(answer.stdout) == 10 and not answer.stderr


@pytest.mark.parametrize("long", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_that_names_in_files_do_nothing_to_the_terminal(tmp_path, forked, long):
    b = np.random.default_rng(0).standard_normal((60, 3))
    evil = "\x1b]0;gone\x07\r\u202e\n1 pairs"
    array = xr.DataArray(b, dims=("time", "x"), coords={"x": ("x", ["a\x1b[2J", "b", "c\nd"])})
    xr.Dataset({f"T{evil}_background": array, f"T{evil}_analysis": array + 0.1 * b[::-1]}).to_netcdf(
        tmp_path / "pairs.nc", engine="h5netcdf"
    )
    xr.Dataset({role: array.assign_attrs(units=evil) for role in ("background", "analysis")}).to_netcdf(
        tmp_path / "units.nc", engine="h5netcdf"
    )
    xr.Dataset({f"T{evil}_background": array[:1]}).to_netcdf(tmp_path / "today.nc", engine="h5netcdf")
    (tmp_path / "seen.csv").write_text("value,error,x_index\n0.5,0.1,1\n")
    words = [["describe", "pairs.nc"], ["describe", "units.nc"], ["describe", "today.nc"], ["run", "\x1b[2J"]]
    if long:
        words += [
            ["train", "pairs.nc", "--out", "prior.safetensors", "--epochs", 1, "--paper"],
            ["describe", "prior.safetensors"],
            [*ASSIMILATE, "--out", "a.nc"],
        ]
    answers = [forked(*line, folder=tmp_path) for line in words]
    assert [a.returncode for a in answers] == [0, 0, 2, 2, 0, 0, 0][: len(words)], answers
    for answer in answers:
        assert all(c.isprintable() or c == "\n" for c in answer.stdout + answer.stderr)
        assert not any(line.startswith("1 pairs") for line in answer.stdout.splitlines())
    assert all(
        r"\x1b]0;gone\x07" in answers[number].stdout and r"\u202e" in answers[number].stdout
        for number in (0, 1, 4, 5, 6)
        if number < len(words)
    )


# ---------------------------------------------------------------------------------------------- errors, options and kinds of files


@pytest.mark.parametrize(
    "error, said",
    [
        ("ZeroDivisionError('by zero')", "unexpected error (ZeroDivisionError: by zero); with PNPDA_TRACEBACK=1"),
        ("RecursionError()", "unexpected error (RecursionError: )"),
        ("MemoryError()", "not enough memory"),
        ("RuntimeError('you can not allocate memory:\\n 10 bytes')", "not enough memory (you can not allocate memory: 10 bytes)"),
        ("OSError(28, 'No space left on device', 'x.nc')", "x.nc: No space left on device"),
        ("OSError(28, 'cannot write x (No space left)')", "pnpda: cannot write x (No space left)"),
        ("ValueError('')", "unexpected error (ValueError: )"),
        ("ValueError('a: expected\\n\\x1b[2J b')", r"a: expected \x1b[2J b"),
        ("BrokenPipeError(32, 'Broken pipe')", "Broken pipe"),
        ("SystemExit(7)", "unexpected error"),
        ("UnicodeEncodeError('ascii', 'é', 0, 1, 'no')", "codec can't encode"),
        ("ValueError('a: ' + 9999 * 'x')", "xxx ... xxx"),
    ],
)
def test_that_whatever_happens_is_one_line_and_status_two(error, said, tmp_path, capsys, monkeypatch):
    def fail():
        raise eval(error)

    listing = next(command for command in cli.app.registered_commands if command.name == "list")
    monkeypatch.setattr(listing, "callback", fail)
    monkeypatch.setattr(sys, "argv", ["pnpda", "list"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    err = capsys.readouterr().err
    assert end.value.code == 2 and said in err and err.startswith("pnpda: ") and err.count("\n") == 1 and len(err) < 2100


LISTING = "listing = next(c for c in pnpda_nb.cli.app.registered_commands if c.name == 'list')\n"


def test_that_a_traceback_is_shown_to_who_asks_for_it(forked):
    code = f"{LISTING}def breaks(): 1 / 0\nlisting.callback = breaks\n"
    plain, traced = (forked("list", before=code + asked) for asked in ("", "os.environ['PNPDA_TRACEBACK'] = '1'"))
    assert plain.returncode == traced.returncode == 2 and plain.stderr.count("\n") == 1
    assert "in breaks" in traced.stderr and traced.stderr.endswith(plain.stderr)


def test_that_warnings_are_a_line_each_after_the_work_and_none_after_a_failure(forked):
    code = (
        f"import warnings\n{LISTING}def warns():\n    for i in (1, 2): warnings.warn('two\\nlines', stacklevel=i)\n    "
        f"{{}}\nlisting.callback = warns"
    )
    assert forked("list", before=code.format("print('done')")).stderr == "pnpda: warning: two lines\n"
    assert forked("list", before=code.format("raise ValueError('x: no')")).stderr == "pnpda: x: no\n"


@pytest.mark.parametrize(
    "words, said",
    [
        (["--iterations", 10**20], "iterations: expected at most"),
        (["--ensemble", -5], "ensemble: expected at least 1"),
        (["--seed", 2**70], "seed: expected a number of at most 63 bits"),
        (["--seed", "x"], "--seed"),
        (["--names", "T"], "names: expected two names"),
        (["--names", "a,a"], "names: expected two names"),
        (["--samples", "a,,b"], "samples: expected names"),
        (["--report", ""], "--report"),
        (["--report", "x" * 300 + ".md"], "--report"),
        (["--report", "d/" * 2100 + "x.md"], "File name too long"),
        (["--report", "x" * 248 + ".html"], "File name too long"),
        (["--iterations"], "--iterations"),
        (["--bogus", 1], "No such option"),
        (["--background", "loop.nc"], "background: "),
    ],
)
def test_that_every_option_is_held_against_what_makes_sense(words, said, copied, forked):
    (copied / "loop.nc").symlink_to("loop.nc")
    before = contents(copied)
    answer = forked(*ASSIMILATE, "--out", "new.nc", *words, folder=copied)
    assert fails_and_touches_nothing(answer, copied, before) and said in answer.stderr, answer


@pytest.mark.parametrize(
    "words, said",
    [
        ("train pairs.nc --out p --memory 99999999999999", "memory: expected at most"),
        ("train pairs.nc --out p --epochs 99999999999", "epochs: expected at most"),
        ("train pairs.nc --out p --seed 99999999999999999999", "seed: expected"),
        ("run lorenz63 --runs -5", "runs: expected at least 1, got -5"),
        ("run lorenz63 --members 99999999999", "members: expected at most"),
        ("run lorenz63 --workers 0", "workers: expected at least 1"),
        ("run lorenz63 --methods ,", "methods: expected names"),
        ("run lorenz63 --set beta=inf", "expected beta to be finite"),
        ("run lorenz63 --set cycles=99999999999", "cycles"),
        ("run lorenz63 --set =3", "expected key=value"),
        ("run lorenz63 --set observed=0,,2", "observed"),
        ("bench --only ,", "only: expected names"),
        ("bench --only nothing --out d/new", "unknown part 'nothing'"),
        ("published --runs 0", "runs: expected at least 1"),
        ("published --seed 99999999999999999999 --out d/new", "seed: expected"),
    ],
)
def test_that_numbers_and_lists_have_ranges_everywhere(words, said, copied, forked):
    before = contents(copied)
    answer = forked(*words.split(), folder=copied)
    assert fails_and_touches_nothing(answer, copied, before) and said in answer.stderr and not list((copied / "d").iterdir()), (
        answer
    )


@pytest.mark.slow
def test_that_names_that_the_system_does_not_understand_are_one_line(copied):
    answer = subprocess.run(
        [os.fsencode(PNPDA), b"train", b"\xff\xfe.nc", b"--out", b"\xff.safetensors"], cwd=copied, capture_output=True
    )
    assert answer.returncode == 2 and answer.stderr == b"pnpda: archive: no file \\udcff\\udcfe.nc\n"


def test_that_samples_and_names_are_options_of_all_commands_and_a_prior_may_know_them(copied, forked):
    b = np.random.default_rng(0).standard_normal((60, 3))
    pairs = xr.Dataset({"T_forecast": (("Time", "x"), b), "T_truth": (("Time", "x"), b + 0.1 * b[::-1])})
    pairs.to_netcdf(copied / "own.nc"), pairs.isel(Time=[0]).to_netcdf(copied / "today.nc")
    told = ["--samples", "Time", "--names", "forecast,truth"]
    for words in (
        ["describe", "own.nc"],
        ["train", "own.nc", "--out", "p.safetensors", "--epochs", 1, "--paper"],
        [*ASSIMILATE[:2], "p.safetensors", *ASSIMILATE[3:], "--out", "a.nc"],
    ):
        answer = forked(*words, *told, folder=copied)
        assert answer.returncode == 0, answer.stderr
    prior = FlowPrior.load(copied / "p.safetensors")
    prior.layout |= {"samples": ["Time"], "roles": ["forecast", "truth"]}
    prior.save(copied / "prior.safetensors")
    assert forked(*ASSIMILATE, "--out", "b.nc", folder=copied).returncode == 0
    with xr.open_dataset(copied / "a.nc", engine="h5netcdf") as one, xr.open_dataset(copied / "b.nc", engine="h5netcdf") as other:
        assert one.equals(other) and "--samples Time" in one.attrs["history"]


def test_that_describe_goes_by_content_and_assimilate_says_what_kind_a_prior_is(copied, forked):
    (copied / "prior.safetensors").rename(copied / "prior.bin")
    assert "FlowPrior" in forked("describe", "prior.bin", folder=copied).stdout
    assert "60 pairs of states of 3 numbers" in forked("describe", "part_*.nc", folder=copied).stdout
    zeros, ones = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    AnalysisPrior.make(zeros, ones, ones, dim=3).save(copied / "prior.safetensors")
    assert "AnalysisPrior" in forked("describe", "prior.safetensors", folder=copied).stdout
    answer = forked(*ASSIMILATE, "--out", "a.nc", folder=copied)
    assert answer.returncode == 2 and "AnalysisPrior" in answer.stderr and answer.stderr.count("\n") == 1


def test_that_the_package_is_the_command_line(tmp_path):
    answer = subprocess.run([sys.executable, "-m", "pnpda_nb", "--help"], capture_output=True, text=True, cwd=tmp_path)
    assert answer.returncode == 0 and answer.stdout == pnpda("--help").stdout and answer.stdout.startswith("Usage: pnpda ")
    alone = pnpda()
    assert alone.returncode == 0 and alone.stdout == answer.stdout and not alone.stderr


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
