"""Laws as sets of states: the way back to them, and methods that take it."""

import warnings
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from pnpda_nb.classical import EnKF, EnKS, FourDVar, ThreeDVar
from pnpda_nb.core import RunStreams, standard_normal, stream
from pnpda_nb.dynamics import AdditiveModelError, trajectory
from pnpda_nb.flow_matching import Estimate, GaussianPrior
from pnpda_nb.observing import Covariance, DiagonalCovariance, Linear, ObservingNetwork, Select
from pnpda_nb.pnp import (
    AsObservation,
    Conserving,
    ConstrainedPnPDA,
    FunctionConstraint,
    LinearConstraint,
    PnPDA,
    Projected,
    QuadraticConstraint,
    RigidBody,
    analysis_ensemble,
    convergence,
)
from pnpda_nb.twin import FreeRun, TwinExperiment, cycle, nature_start

EYE = torch.eye(3, dtype=torch.float64)
METRIC = Covariance([[2.0, 0.5, 0.1], [0.5, 1.0, 0.2], [0.1, 0.2, 0.5]])
BODY = RigidBody()
CLOUD = standard_normal((6, 5, 3), stream(1, "cloud"))
PRIOR = GaussianPrior(EYE, 0.1 * EYE[0], Covariance(0.3 * EYE))
NETWORK = ObservingNetwork(Linear(torch.tensor([[0.5, 0.5, 0.5**0.5]], dtype=torch.float64)), DiagonalCovariance([0.01]))


def both(x):
    return torch.cat((x.square().sum(-1, keepdim=True), BODY.energy().function(x)), -1)


NEAR = both(BODY.momentum(1.0).project(CLOUD[:, :1]))  # levels of a state that exists: one pair for every run
LAWS = {
    "sum": LinearConstraint(torch.ones(1, 3, dtype=torch.float64), 2.0),
    "two sums in a metric": LinearConstraint(
        torch.tensor([[1.0, 1, 1], [0, 1, -1]], dtype=torch.float64), torch.tensor([2.0, 0.5]), METRIC
    ),
    "sphere": BODY.momentum(1.0),
    "ellipsoid": BODY.energy(0.3),
    "ellipsoid in a metric": replace(BODY.energy(0.3), metric=METRIC),
    "cylinder": QuadraticConstraint(torch.diag(torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64)), 2.0),
    "a level for each run": BODY.momentum(torch.arange(1.0, 7.0).reshape(6, 1, 1)),
    "function": FunctionConstraint(lambda x: x.square().sum(-1, keepdim=True) + 0.1 * x.sin().sum(-1, keepdim=True), 2.0),
    "two laws": FunctionConstraint(both, NEAR, METRIC),
    "the background's": BODY.energy(),
}
BACKGROUND = 1 + CLOUD.flip(0)


@pytest.mark.parametrize("name", LAWS)
def test_that_a_projection_lands_on_the_set_and_stays_there(name):
    start = CLOUD if name != "two laws" else BODY.momentum(1.0).project(CLOUD[:, :1]) + 0.1 * CLOUD
    landed = LAWS[name].project(start, BACKGROUND)
    assert LAWS[name].residual(landed, BACKGROUND).abs().max() < 1e-10 < LAWS[name].residual(start, BACKGROUND).abs().max()
    assert (LAWS[name].project(landed, BACKGROUND) - landed).abs().max() < 1e-9
    assert landed.shape == CLOUD.shape and landed.dtype == torch.float64


@pytest.mark.parametrize("name", [name for name in LAWS if name != "two laws"])
def test_that_a_state_does_not_know_of_the_others(name):
    law = LAWS[name]
    for run in (0, 3):
        one = replace(law, level=law.level[run : run + 1]) if name == "a level for each run" else law
        alone = one.project(CLOUD[run : run + 1, 2:3], BACKGROUND[run : run + 1, 2:3])
        assert torch.allclose(law.project(CLOUD, BACKGROUND)[run, 2], alone[0, 0], rtol=0, atol=1e-14)


@pytest.mark.parametrize("name", ["sum", "two sums in a metric", "sphere", "ellipsoid in a metric", "cylinder", "function"])
def test_that_the_derivative_of_a_projection_is_that_of_finite_differences(name):
    x = CLOUD[:1, :3].clone().requires_grad_()
    assert torch.autograd.gradcheck(LAWS[name].project, x)
    on_set = LAWS[name].project(CLOUD[:1, :3]).requires_grad_()  # where nothing is left to be moved
    assert torch.autograd.gradcheck(LAWS[name].project, on_set)


@pytest.mark.parametrize("level", [0.02, 0.3, 4.0])
def test_that_no_point_of_an_ellipsoid_is_nearer(level):
    law = BODY.energy(level)
    landed = law.project(CLOUD)
    others = standard_normal((4000, 3), stream(1, "others"))
    others = others * (level / law.function(others)).sqrt()
    around = landed + 1e-3 * standard_normal((300, *CLOUD.shape), stream(1, "around"))
    around = around * (level / law.function(around)).sqrt()
    way = (landed - CLOUD).norm(dim=-1)
    assert (torch.cdist(CLOUD.flatten(0, 1), others).amin(-1) > way.flatten() - 1e-9).all()
    assert ((around - CLOUD).norm(dim=-1).amin(0) > way - 1e-9).all()


def test_that_flat_sets_and_spheres_agree_with_their_closed_forms():
    sphere, two = LAWS["sphere"], LAWS["two sums in a metric"]
    length = CLOUD.norm(dim=-1, keepdim=True)
    assert torch.allclose(sphere.project(CLOUD), CLOUD / length, rtol=0, atol=1e-14)
    general = FunctionConstraint(sphere.function, 1.0)
    assert torch.allclose(general.project(CLOUD), CLOUD / length, rtol=0, atol=1e-10)
    # the nearest point of a flat set by its conditions of first order, solved at once
    A, precision = two.matrix, METRIC.inverse
    system = torch.cat((torch.cat((precision, A.T), 1), torch.cat((A, torch.zeros(2, 2, dtype=torch.float64)), 1)))
    right = torch.cat((CLOUD @ precision, torch.tensor([2.0, 0.5], dtype=torch.float64).expand(6, 5, 2)), -1)
    assert torch.allclose(two.project(CLOUD), torch.linalg.solve(system, right.mT).mT[..., :3])
    assert torch.allclose(FunctionConstraint(two.function, two.level, METRIC).project(CLOUD), two.project(CLOUD))


def test_that_a_sphere_looks_the_same_from_all_sides():
    skew = standard_normal((3, 3), stream(1, "skew"))
    turn = torch.linalg.matrix_exp(skew - skew.T)
    for law in (LAWS["sphere"], FunctionConstraint(LAWS["sphere"].function, 1.0)):
        assert torch.allclose(law.project(CLOUD @ turn.T), law.project(CLOUD) @ turn.T, atol=1e-10)


def test_that_what_is_not_finite_stays_nan_and_harms_no_other():
    for value in (torch.nan, torch.inf, 1e200):  # the last is not finite when squared
        broken = CLOUD.clone()
        broken[2, 3, 1] = value
        for name in ("sphere", "ellipsoid in a metric", "function"):
            landed, whole = LAWS[name].project(broken), LAWS[name].project(CLOUD)
            lost = torch.isnan(landed)
            assert lost[2, 3].all() and lost.sum() == 3
            assert torch.allclose(landed[~lost], whole[~lost], rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: FunctionConstraint(lambda x: x.square().sum(-1, keepdim=True), -1.0).project(CLOUD),
            "project: expected .* 30 of 30",
        ),
        (lambda: BODY.momentum(1.0).project(torch.zeros(1, 3, dtype=torch.float64)), "project: .* 1 of 1"),  # no nearest point
        (lambda: FunctionConstraint(lambda x: 0 * x[..., :1], 1.0).project(CLOUD), "project"),
        (lambda: BODY.momentum().project(CLOUD), "background"),
        (lambda: BODY.momentum(-1.0), "level"),
        (lambda: QuadraticConstraint(torch.diag(torch.tensor([1.0, -1.0, 1.0])), 1.0), "matrix"),
        (lambda: QuadraticConstraint(torch.zeros(3, 3), 1.0), "matrix"),
        (lambda: QuadraticConstraint(torch.tensor([[1.0, 0.5], [0.0, 1.0]]), 1.0), "matrix"),
        (lambda: LinearConstraint(torch.ones(2, 3), 1.0), "matrix: expected independent rows"),
        (lambda: LinearConstraint(torch.ones(1, 4, dtype=torch.float64), 1.0, METRIC), "metric: expected size 4"),
        (lambda: FunctionConstraint(both, 1.0, iterations=0), "iterations"),
        (lambda: RigidBody(inertia=(1.0, 2.0)), "inertia"),
        (lambda: RigidBody(dt=0.0), "dt"),
        (lambda: AsObservation(FourDVar(METRIC, window=2), LAWS["sphere"]), "method: expected one with a window of 1"),
        (lambda: AsObservation(ThreeDVar(METRIC), LAWS["sphere"], 0.0), "variance"),
    ],
)
def test_that_what_makes_no_sense_is_one_clear_error(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_that_a_free_body_keeps_both_laws_to_the_order_of_its_step():
    start, drift = LAWS["sphere"].project(CLOUD), {}
    for law in (BODY.momentum, BODY.energy):
        for dt in (0.4, 0.2):
            end = trajectory(RigidBody(dt=dt), start, round(8 / dt))[-1]
            drift[dt] = (law().function(end) - law().function(start)).abs().mean()
        assert 3.5 < torch.log2(drift[0.4] / drift[0.2]) < 6
        kept = trajectory(Conserving(RigidBody(dt=0.4), law()), start, 20)[-1]
        assert (law().function(kept) - law().function(start)).abs().max() < 1e-13
    assert torch.allclose(BODY.step(torch.diag(torch.ones(3).double())), torch.diag(torch.ones(3).double()))  # spins about its axes
    flip = torch.tensor([1.0, -1.0, -1.0], dtype=torch.float64)
    assert torch.equal(BODY.step(flip * start), flip * BODY.step(start))


def small(**changes):
    law = BODY.momentum(1.0)
    settings = dict(
        name="rigid body",
        nature=Conserving(BODY, law),
        forecast_model=BODY,
        network=NETWORK,
        interval=5,
        cycles=4,
        start=3 * (0.0,),
        spin_up=10,
        background_variance=0.04,
        model_error=AdditiveModelError(0.001),
    )
    return TwinExperiment(**settings | changes)


@pytest.mark.parametrize("name", ["sphere", "function", "ellipsoid", "the background's"])
def test_that_answers_are_on_the_set_whatever_the_settings(name, untrained_prior):
    law, seen = LAWS[name], NETWORK.observe(CLOUD[:, 0], stream(1, "seen"))
    for prior in (PRIOR, untrained_prior):  # the second runs in inference mode
        for settings in ({}, {"ensemble": 3}, {"draws": 2}, {"alpha": 0.05}):
            method = ConstrainedPnPDA(prior, 4, **settings, constraint=law)
            answer = method.analyse(BACKGROUND, seen, forecast=None, generator=RunStreams(1, "method", runs=6))
            assert answer.shape == CLOUD.shape and not answer.is_inference()
            assert law.residual(answer, BACKGROUND).abs().max() < 1e-10


def test_that_every_step_towards_the_observations_ends_on_the_set_and_the_first_takes_none():
    held, free = ConstrainedPnPDA(PRIOR, 5, constraint=LAWS["sphere"]), PnPDA(PRIOR, 5)
    misfit = held.misfit(CLOUD, NETWORK.observe(CLOUD[:, 0], stream(1, "seen")))
    length = misfit.step_size("lipschitz")
    assert torch.equal(held.towards(Estimate(CLOUD), misfit, length, 0.0), CLOUD)
    for tau in (0.2, 0.8):
        w = free.towards(Estimate(CLOUD), misfit, length, tau)
        assert torch.equal(held.towards(Estimate(CLOUD), misfit, length, tau), LAWS["sphere"].project(w))
    seen = misfit.observations
    one, other = (
        m.analyse(CLOUD, seen, forecast=None, generator=stream(1))
        for m in (replace(held, iterations=1), replace(free, iterations=1))
    )
    assert torch.equal(one, LAWS["sphere"].project(other))
    several = analysis_ensemble(held, CLOUD[:, :1], seen, size=4, generator=stream(1))
    assert LAWS["sphere"].residual(several).abs().max() < 1e-10
    assert np.isfinite(convergence(held, CLOUD, seen, generator=stream(1)).misfit).all()


@pytest.mark.parametrize("kind", ["inside", "3D-Var", "EnKF", "as an observation", "smoother", "window"])
def test_that_methods_with_a_law_cycle_and_runs_do_not_know_of_each_other(kind):
    law, B = BODY.momentum(1.0), Covariance(0.05 * EYE)
    method = {
        "inside": ConstrainedPnPDA(PRIOR, 4, constraint=law),
        "3D-Var": Projected(ThreeDVar(B), law),
        "EnKF": Projected(EnKF(), law),
        "as an observation": AsObservation(EnKF(), law),
        "smoother": Projected(EnKS(lag=2), law),
        "window": Projected(FourDVar(B, window=2, shift=1, iterations=2), law),
    }[kind]
    members = 6 if kind in ("EnKF", "smoother", "as an observation") else 1
    a, b = (cycle(small(), method, members=members, runs=runs, seed=1, keep_members=True) for runs in (5, 3))
    assert np.allclose(a.analysis[:3], b.analysis, atol=1e-9) and (a.failed == -1).all()
    squared = (a.analysis_members**2).sum("variable")
    if kind in ("inside", "3D-Var", "EnKF", "smoother"):
        assert abs(squared - 1).max() < 1e-10
    if kind in ("smoother", "window"):
        assert "smoothed" in a


def test_that_a_run_that_breaks_takes_no_other_with_it():
    @dataclass(frozen=True)
    class Fragile(RigidBody):
        def step(self, state):
            return torch.where(state[..., :1] > 0.9, torch.nan, super().step(state))

    law = BODY.momentum(1.0)
    for method in (ConstrainedPnPDA(PRIOR, 4, constraint=law), Projected(ThreeDVar(METRIC), law)):
        whole = cycle(small(), method, runs=12, seed=1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            broken = cycle(small(forecast_model=Fragile()), method, runs=12, seed=1)
        fine = (broken.failed == -1).values
        assert 0 < fine.sum() < 12 and np.allclose(broken.analysis[fine], whole.analysis[fine])


def test_that_nothing_is_changed_where_the_law_is_obeyed_already():
    experiment = small(
        forecast_model=Conserving(BODY, BODY.momentum()), background_variance=0.0, model_error=AdditiveModelError(0.0)
    )
    free, held = (cycle(experiment, method, runs=3, seed=1) for method in (FreeRun(), Projected(FreeRun(), BODY.momentum(1.0))))
    assert np.allclose(free.analysis, held.analysis, atol=1e-12) and np.allclose(held.rmse, 0, atol=1e-6)


def test_that_two_laws_leave_less_error_than_one():
    experiment = small(cycles=15)
    known = both(nature_start(experiment, 20, seed=1)).unsqueeze(1)
    methods = (Projected(ThreeDVar(Covariance(0.05 * EYE)), law) for law in (BODY.momentum(1.0), FunctionConstraint(both, known)))
    one, two = (float(cycle(experiment, method, runs=20, seed=1).rmse.mean()) for method in methods)
    assert two < 0.8 * one


def test_that_a_law_told_as_an_exact_observation_is_projection_in_the_metric_of_the_analysis():
    B, law = METRIC, LAWS["sum"]
    seen = ObservingNetwork(Select((0,), 3), Covariance([[0.1]])).observe(CLOUD[:, 0], stream(1, "seen"))
    gain = B.matrix[:, :1] / (B.matrix[0, 0] + 0.1)
    with_metric = replace(law, metric=Covariance(B.matrix - gain @ B.matrix[:1]))
    told, after = (
        method.analyse(CLOUD, seen, forecast=None, generator=None)
        for method in (AsObservation(ThreeDVar(B), law, 1e-10), Projected(ThreeDVar(B), with_metric))
    )
    assert torch.allclose(told, after, atol=1e-7)


def test_that_the_level_of_the_background_can_be_told_and_a_missing_value_cannot():
    network = ObservingNetwork(Select((0,), 3), Covariance([[0.1]]))
    method = AsObservation(ThreeDVar(METRIC), LinearConstraint(torch.ones(1, 3, dtype=torch.float64)), 1e-8)
    seen = network.observe(CLOUD[:, 0], stream(1, "seen"))
    told = method.analyse(CLOUD[:, :1], seen, forecast=None, generator=None)
    assert torch.allclose(told.sum(-1), CLOUD[:, :1].sum(-1), atol=1e-5)
    assert not torch.allclose(told, CLOUD[:, :1], atol=1e-3)
    each = AsObservation(ThreeDVar(METRIC), replace(method.constraint, level=torch.arange(6.0).reshape(6, 1, 1)), 1e-8)
    told = each.analyse(CLOUD, seen, forecast=None, generator=None)
    assert torch.allclose(told.sum(-1), torch.arange(6.0, dtype=torch.float64)[:, None].expand(6, 5), atol=1e-5)
    with pytest.raises(ValueError, match="observations: expected no missing values, got 1"):
        method.analyse(CLOUD[:1, :1], network.report(torch.full((1, 1), torch.nan)), forecast=None, generator=None)


def test_that_a_constraint_says_what_it_is():
    assert repr(LAWS["sphere"]) == "QuadraticConstraint(level 1.0)"
    assert repr(LAWS["the background's"]) == "QuadraticConstraint(level the background's)"
    assert "of shape (6, 1, 2), with a metric" in repr(LAWS["two laws"])
    assert "FunctionConstraint" in repr(Projected(FreeRun(), LAWS["two laws"]))
