"""The studies of windows: their scenes, what is held out, their scores, and the command."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr

from pnpda_nb.experiments import STUDIES
from pnpda_nb.experiments.trajectories.answers import best_of, four_dvar, importance, interpolation, measured
from pnpda_nb.experiments.trajectories.parts import window_pairs
from pnpda_nb.experiments.trajectories.scenes import held_out_sets, scene, training_windows, window_testbed
from pnpda_nb.experiments.trajectories.study import WINDOW_PRESETS, WindowSettings
from pnpda_nb.experiments.trajectories.tables import window_scores
from pnpda_nb.windows import normalised_mse

SMALL = [
    "--runs",
    6,
    "--set",
    "iterations=8",
    "--set",
    "climate_windows=300",
    "--set",
    "validation_windows=8",
    "--set",
    "width=16",
    "--set",
    "level_iterations=0",
    "--set",
    "draws=500",
    "--set",
    "unseen=arctan",
    "--set",
    "lengths=32",
    "--set",
    "repeats=1",
]


@pytest.mark.parametrize("name", WINDOW_PRESETS)
def test_that_a_scene_is_the_same_for_all_who_ask_and_other_for_other_seeds(name):
    steps = window_testbed(name).sets.steps * window_testbed(name).sets.dim
    condition = list(held_out_sets(name, 4))[0]
    one, same, other = (scene.__wrapped__(name, condition, 3, steps + 20, seed) for seed in (4, 4, 5))
    assert torch.equal(one.values, same.values) and torch.equal(one.climate.mean, same.climate.mean)
    assert not torch.equal(one.truth, other.truth)


@pytest.mark.parametrize("name", ["lorenz63", "pendulum"])
def test_that_processes_of_tests_are_never_seen_in_training_or_validation(name):
    kept = {tuple(p.flatten().nonzero()[:, 0].tolist()) for sets in held_out_sets(name, 2).values() for p in sets}
    assert len(kept) == 16
    validation = scene(name, "", 4, 600, 2, "validation")
    assert not kept & {tuple(p.flatten().nonzero()[:, 0].tolist()) for p in validation.present}


def test_that_windows_for_tests_validation_and_training_are_all_different():
    test, validation = (scene("lorenz63", "regular", 50, 400, 1, split).truth for split in ("test", "validation"))
    starts = torch.cat([w[:, 0, 0] for w in (test, validation, training_windows("lorenz63", 400, 1))])
    assert len(starts.unique()) == len(starts)


@pytest.mark.parametrize(
    "condition", ["regular", "random", "points=2", "points=9", "noise=0.3", "clustered", "variable=2", "arctan"]
)
def test_that_every_condition_shows_what_it_says(condition):
    here = scene("lorenz63", condition, 200, 400, 1)
    count = int(condition.split("=")[1]) if condition.startswith("points") else 4
    assert (here.present.sum((1, 2)) == count).all()
    truth = here.truth if here.function is None else here.function(here.truth)
    error = ((here.values - truth) / here.climate.scale)[here.present[:, None].expand_as(here.values)]
    wanted = 0.3 if condition == "noise=0.3" else 0.05
    assert abs(float(error.std()) / wanted - 1) < 0.05
    assert here.present.any(0).any(0).nonzero()[:, 0].tolist() == ([2] if condition == "variable=2" else [0])


def test_that_an_unknown_condition_or_testbed_is_refused():
    with pytest.raises(ValueError, match="^condition: unknown condition 'windy'"):
        scene("lorenz63", "windy", 2, 400, 1)
    with pytest.raises(ValueError, match="^testbed: expected 'lorenz63', 'pendulum' or 'lorenz96'"):
        WindowSettings("lorenz64")
    with pytest.raises(ValueError, match="^climate_windows: expected more than 96"):
        WindowSettings(climate_windows=50)


def test_that_optimal_interpolation_covers_as_often_as_it_says():
    here = scene("lorenz63", "regular", 200, 3000, 1)
    row = measured(here, interpolation(here), 1.0, {"experiment": "e"})
    assert abs(float(row.covered.mean()) - 0.9) < 0.02
    assert 0.4 < float(row.mse.mean()) < 0.6  # what others have found: 0.51


def test_that_importance_sampling_is_better_than_optimal_interpolation_and_finite_far_away():
    here = scene("lorenz63", "regular", 10, 1000, 1)
    sampled = importance(here, 40000, seed=3)
    errors = [normalised_mse(a.mean, here.truth, here.climate.scale).mean() for a in (sampled, interpolation(here))]
    assert errors[0] < 0.5 * errors[1]
    far = importance(type(here)(**{**vars(here), "values": here.values + 1e3}), 1000, seed=3)
    assert torch.isfinite(far.mean).all() and torch.isfinite(far.deviation).all()


def test_that_pairs_for_flow_priors_are_optimal_interpolations_of_their_windows():
    first, truth = window_pairs("lorenz63", 500, 1000, 1)
    apart = (first - truth).square().mean()
    assert 0.3 < apart < 0.8 and abs((first * (truth - first)).mean()) < 0.1  # what is left is not correlated with the estimate


def test_that_scores_are_those_of_windows_with_processes_averaged_first():
    mse = np.random.default_rng(0).gamma(1.0, 0.1, (8, 50))
    result = xr.Dataset(
        {"mse": (("process", "window"), mse), "seconds": 0.01, "iterations": (("process", "window"), 10 * mse)},
        attrs={"experiment": "e"},
    )
    table = window_scores({("regular", "m"): result}).set_index("metric")
    assert np.isclose(table.loc["mse_mean", "mean"], mse.mean()) and np.isclose(
        table.loc["mse_mean", "std"], mse.mean(0).std(ddof=1)
    )
    assert np.isclose(table.loc["stuck", "mean"], (mse > 0.1).mean()) and np.isclose(
        table.loc["mse_median", "mean"], np.median(mse)
    )
    assert (table.runs == 50).all() and np.isclose(table.loc["iterations", "mean"], 10 * mse.mean())


def test_that_a_window_that_became_non_finite_is_left_out_of_means_and_counted_as_stuck():
    mse = np.full((8, 5), 0.2)
    mse[3, 2] = np.nan
    result = xr.Dataset({"mse": (("process", "window"), mse), "seconds": 0.01}, attrs={"experiment": "e"})
    table = window_scores({("regular", "m"): result}).set_index("metric")
    assert (table.runs == 4).all() and np.isclose(table.loc["mse_mean", "mean"], 0.2) and table.loc["stuck", "mean"] == 1.0


@pytest.mark.parametrize("wrong", ["points=33", "points=x", "noise=0", "noise=-1", "variable=3", "variable=-1", "windy", ""])
def test_that_conditions_that_cannot_be_are_refused_before_any_work(wrong):
    with pytest.raises(ValueError, match="^condition: "):
        WindowSettings(unseen=(wrong,))


def test_that_the_best_of_several_starts_costs_no_more_and_errs_no_more_than_the_first():
    here = scene("lorenz63", "regular", 12, 1000, 1)
    one, five = (best_of(here, starts) for starts in (1, 5))
    first = four_dvar(here, interpolation(here).mean)
    assert torch.allclose(one.mean, first.mean, atol=1e-8)
    errors = [normalised_mse(a.mean, here.truth, here.climate.scale).mean() for a in (five, one)]
    assert errors[0] < errors[1] and (five.iterations > one.iterations).all()


@pytest.mark.slow
@pytest.mark.parametrize("methods", ["oi,incremental", "oi,incremental,hybrid"])
def test_that_the_command_writes_scores_levels_times_and_a_prior(forked, tmp_path, methods):
    done = forked("run", "incremental_lorenz63", *SMALL, "--workers", 1, "--methods", methods, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    table = pd.read_csv(tmp_path / "scores.csv", dtype={"condition": str})
    assert {"regular", "random", "arctan", "calibrated", "uncalibrated"} >= set(table.condition) >= {"regular", "random", "arctan"}
    assert ("calibrated" in set(table.condition)) == ("hybrid" in methods)
    assert {"mse_mean", "mse_median", "coverage", "coverage_low", "seconds"} <= set(table.metric)
    assert ({"stuck", "iterations"} <= set(table.metric)) == ("hybrid" in methods)
    assert np.isfinite(table["mean"]).all()
    assert {"levels.nc", "timing.json", "scaling.json", "prior.safetensors", "cycles.nc", "manifest.json"} <= {
        p.name for p in tmp_path.iterdir()
    }
    assert [row["steps"] for row in json.loads((tmp_path / "scaling.json").read_text())["rows"]] == [32]
    assert ("hybrid: 4D-Var from the large network" in done.stdout) == ("hybrid" in methods)
    again = forked("run", "incremental_lorenz63", *SMALL, "--workers", 2, "--methods", methods, "--out", tmp_path)
    assert again.returncode == 0 and pd.read_csv(tmp_path / "scores.csv", dtype={"condition": str}).equals(
        table
    )  # nothing is done twice


def test_that_members_of_a_study_without_them_and_unknown_settings_are_one_line(forked):
    answer = forked("run", "incremental_pendulum", "--set", "wind=3")
    assert answer.returncode == 2 and answer.stderr.startswith("pnpda: set: unknown setting 'wind'")
    answer = forked("run", "incremental_lorenz96", "--methods", "pnpda4d")
    assert answer.returncode == 2 and "unknown method 'pnpda4d'" in answer.stderr


def test_that_every_study_of_windows_has_both_presets_and_names_its_methods():
    for name in WINDOW_PRESETS:
        study = STUDIES[f"incremental_{name}"]
        assert set(study.presets) == {"smoke", "paper"} and study.presets["paper"].runs >= 200
        assert {"oi", "incremental", "weak4d_oi", "hybrid"} <= set(study.methods)
