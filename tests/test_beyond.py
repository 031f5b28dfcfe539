"""The studies of one forecast against a hundred: their plans, settings and tables, and one small training as a task."""

import dataclasses
import json

import numpy as np
import pandas as pd
import pytest
import torch

from pnpda_nb.experiments import find_study
from pnpda_nb.experiments.beyond import BEYOND_METHODS, beyond_study, plan_beyond, table_beyond
from pnpda_nb.experiments.beyond_testbeds import BEYOND_PRESETS
from pnpda_nb.experiments.beyond_training import beyond_priors
from pnpda_nb.experiments.ladder_parts import PARTS, off_policy_prior, plan_parts
from pnpda_nb.learned import AnalysisPrior, OnPolicySettings
from pnpda_nb.methods import experiment_of
from pnpda_nb.studies.parts import _nature, costed_task, learning_task, passes, record_task
from pnpda_nb.sweep import Store, run_tasks
from pnpda_nb.twin import watch_nature

TINY = beyond_study("lorenz63").presets["beyond_smoke"]
SHORT = OnPolicySettings(trajectories=8, cycles=4, steps=1, batch=16, patience_points=2)
BED = {"name": "lorenz63", "cycles": 4}
NETWORK = {"geometry": "none", "rank": 2, "increment": 0.5, "width": 8}


@pytest.mark.parametrize("testbed", BEYOND_PRESETS)
def test_that_every_method_is_planned_for_every_condition_and_none_twice(testbed):
    settings = BEYOND_PRESETS[testbed]
    first = next(iter(settings.conditions()))
    plan = plan_beyond(settings, BEYOND_METHODS)
    missing = {(c, m) for c in settings.conditions() for m in BEYOND_METHODS} - set(plan)
    rare = {
        "rollout",
        "rollout_obs",
        "learned_mean",
        "learned_mean_obs",
        "pnpda_blind_obs",
        "amortised_ensemble_obs",
    }  # for one condition, or none
    assert {m for _, m in missing} <= rare and all(c != first or "rollout" in m for c, m in missing)
    keys = [task.key for (_, m), task in plan.items() if m != "free_run"]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("testbed", BEYOND_PRESETS)
def test_that_what_learns_from_observations_alone_is_never_given_the_nature_run(testbed):
    for name, task in beyond_priors(BEYOND_PRESETS[testbed]).items():
        waiting = [task]
        while waiting:
            one = waiting.pop()
            waiting += one.needs.values()
            if name.endswith("_obs"):
                assert not one.settings.get("truth")
        assert bool(task.settings["truth"]) != name.endswith("_obs")


def test_that_the_off_policy_prior_differs_from_the_whole_by_who_cycles():
    whole, other = beyond_priors(TINY)["amortised"].settings, off_policy_prior(TINY).settings
    changed = {k for k in whole if whole[k] != other[k]}
    assert changed <= {"policy", "judged", "members", "training"} and other["policy"]["name"] == "enkf"
    assert {k for k in whole["training"] if whole["training"][k] != other["training"][k]} <= {"trajectories"}


def test_that_a_prior_is_trained_as_a_task_and_its_method_is_cycled_with_its_cost(tmp_path):
    prior = learning_task(
        [BED], {"name": "amortised"}, SHORT, seed=1, network=NETWORK, truth={"runs": 4, "cycles": 12}, validation_runs=2
    )
    cycled = costed_task(BED, {"name": "amortised"}, runs=3, seed=1, prior=prior)
    result, learned = run_tasks([cycled, prior], Store(tmp_path))
    assert isinstance(learned, AnalysisPrior) and learned.training["cycles"] == 4
    assert result.forecasts.values.tolist() == [1, 1, 1] and result.passes.values.tolist() == [1, 1, 1]
    assert (result.seconds > 0).all()


def test_that_a_record_of_observations_teaches_without_a_truth_and_the_same_seed_gives_the_same_weights(tmp_path):
    record = record_task(BED, {"name": "enks", "lag": 1}, members=8, runs=3, cycles=14, seed=1, smoothed=True)
    task = learning_task([BED], {"name": "amortised"}, SHORT, seed=1, network=NETWORK, records=[record], validation_runs=2)
    again = [run_tasks([task], Store(tmp_path / name))[0] for name in ("one", "two")]
    assert all(torch.equal(a, b) for a, b in zip(*(p.network.state_dict().values() for p in again)))


def test_that_passes_are_counted_per_member_draw_and_iteration():
    assert passes({"name": "amortised"}, 20) == 20
    assert passes({"name": "pnpda", "iterations": 4, "draws": 8}, 1) == 32
    assert passes({"name": "learned_mean"}, 20) == 1


def test_that_the_table_says_how_many_runs_are_left_and_marks_what_was_lost():
    rows = [
        ("", m, name, "all", mean, 0.1, runs)
        for m, mean, runs in (("enkf", 1.0, 4), ("letkf", 2.0, 3), ("enff", np.nan, 0))
        for name in ("step_rmse", "crps")
    ]
    table = table_beyond(
        pd.DataFrame(rows, columns=["condition", "method", "metric", "variable", "mean", "std", "runs"]), "", "step_rmse"
    )
    assert table["step RMSE"].tolist() == ["1.00 ± 0.05", "2.00 ± 0.06 (3 runs)", "lost"]


def test_that_parts_and_limits_are_planned_for_their_conditions():
    plan = plan_parts(PARTS, ("amortised", "enkf"))
    conditions = {c.split("=")[0] for c, _ in plan}
    assert conditions == {"testbed", "forcing", "truths", "points"}
    assert {c for c, m in plan if c.startswith("truths")} == {f"truths={n}" for n in PARTS.archives}


@pytest.mark.parametrize(
    "change, name",
    [
        ({"testbed": "lorenz64"}, "testbed"),
        ({"runs": 0}, "runs"),
        ({"follow": 0.0}, "follow"),
        ({"members": 1}, "members"),
        ({"batch": 0}, "batch"),
    ],
)
def test_that_a_wrong_setting_is_one_line(change, name):
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        dataclasses.replace(TINY, **change)


def test_that_a_preset_finds_its_study_and_an_unknown_one_names_those_there_are():
    study = find_study("lorenz96")
    assert study.with_preset("paper") is study and study.with_preset("beyond").methods == BEYOND_METHODS
    with pytest.raises(ValueError, match="^preset: unknown preset 'beyound'; known: smoke, paper, beyond"):
        study.with_preset("beyound")


def test_that_learning_from_a_filter_works_where_networks_are_random():
    settings = dataclasses.replace(beyond_study("kuramoto_sivashinsky").presets["beyond_smoke"], learning_cycles=2)
    task = off_policy_prior(settings)
    prior = task.function(task.settings | {"validation_runs": 1})
    assert torch.isfinite(prior.network.last.weight).all()


def test_that_methods_that_are_not_planned_for_a_testbed_are_one_line():
    with pytest.raises(ValueError, match="^methods: rollout is not planned for lorenz63"):
        plan_beyond(dataclasses.replace(TINY, rollout=0), ("rollout",))


def test_that_the_study_of_fields_goes_where_it_says():
    study = find_study("sqg")
    settings = study.presets["smoke"]
    plan = study.plan(settings, study.methods)
    first, others = "columns=64", {"columns=32", "still=64", "jet=40", "dissipation=4"}
    assert {name for condition, name in plan if condition == first} == set(study.methods)
    assert {condition for condition, name in plan if name == "amortised"} == {first, "size=32"} | others
    everywhere = {(condition, name) for condition in others for name in ("var3d", "letkf", "amortised")}
    assert {case for case in plan if case[0] in others} == everywhere
    assert len({plan[condition, "amortised"].needs["prior"].key for condition in {first, "size=32"} | others}) == 1
    fewer = study.plan(dataclasses.replace(settings, jets=(), dissipations=(), still=0, larger=0), study.methods)
    assert {condition for condition, _ in fewer} == {first, "columns=32"}
    kept = study.kept(settings, study.methods)
    assert "prior_amortised.safetensors" in kept and "prior_brief.safetensors" not in kept


def test_that_priors_of_a_study_are_trained_where_its_states_are_cycled(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(
        "pnpda_nb.studies.study.run_tasks", lambda tasks, store, **options: asked.extend(tasks) or [None] * len(tasks)
    )
    study = dataclasses.replace(beyond_study("lorenz63"), kept=lambda settings, methods: {})
    study.run(TINY, ("amortised", "pnpda_blind"), Store(tmp_path), {"device": "cuda"})

    def trainings(tasks):
        for task in tasks:
            yield from trainings(task.needs.values())
            if task.resumable:
                yield task

    devices = {task.key: task.settings.get("device") for task in trainings(asked)}
    assert len(devices) >= 2 and set(devices.values()) == {"cuda"}


def test_that_a_part_trains_on_the_device_that_it_is_told(monkeypatch):
    asked = []
    monkeypatch.setattr(
        "pnpda_nb.studies.parts.train_on_policy", lambda prior, *_, device, **__: (asked.append(device) or prior, None)
    )
    truth = {"runs": 2, "cycles": 6}
    task = learning_task([BED], {"name": "amortised"}, SHORT, network=NETWORK, truth=truth, seed=1, validation_runs=2)
    for settings in (task.settings, {**task.settings, "device": "cuda"}):
        task.function(settings)
    assert asked == ["cpu", "cuda"]


def test_that_conditions_of_fields_share_truths_and_not_observations():
    beds = [{"name": "sqg", "size": 16, "cycles": 2, "burn_in": 0, "columns": columns} for columns in (20, 30)]
    shared = [_nature(json.dumps(bed), 2, 1, "test") for bed in beds]
    alone = [list(watch_nature(experiment_of(bed), 2, 1, "test")) for bed in beds]
    for found, known in zip(shared, alone):
        for (truth, seen), (same, also) in zip(found, known, strict=True):
            assert torch.equal(truth, same) and (seen is also is None or torch.equal(seen.values, also.values))
    assert all(a is b for (a, _), (b, _) in zip(*shared))
