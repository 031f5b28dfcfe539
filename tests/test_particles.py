"""Particles that carry weights from one analysis to the next, and scores that count them."""

import sys
from dataclasses import dataclass, replace
from unittest.mock import patch

import numpy as np
import pytest
import torch

from pnpda_nb.classical import ParticleFilter
from pnpda_nb.classical.particles import systematic_resampling
from pnpda_nb.core import RunStreams, standard_normal, stream
from pnpda_nb.dynamics import AdditiveModelError, FunctionModel, Lorenz96
from pnpda_nb.observing import Covariance, DiagonalCovariance, Nonlinear, ObservingNetwork, Select
from pnpda_nb.twin import FreeRun, TwinExperiment, bocquet2010, cycle, make_archive, rank_histogram, scores, spread_skill, summary

with patch.dict(sys.modules, numba=None):  # or it would compile everything it has
    from scoringrules import crps_ensemble

STILL = FunctionModel(lambda x: x, 6)
R = Covariance([[0.5]])
M = torch.tensor([[0.9, 0.3], [-0.3, 0.9]], dtype=torch.float64)
TURNING = FunctionModel(lambda x: x @ M.T, 2)
LINEAR = TwinExperiment(
    "turning",
    TURNING,
    TURNING,
    ObservingNetwork(Select((0,), 2), R),
    interval=2,
    cycles=15,
    start=(0.0, 0.0),
    start_variance=4.0,
    spin_up=0,
    nature_error=AdditiveModelError(0.1),
    model_error=AdditiveModelError(0.1),
    first_ensemble="same_law",
)
CHAOTIC = TwinExperiment(
    "ring",
    Lorenz96(dim=6),
    Lorenz96(dim=6),
    ObservingNetwork(Select((0, 2, 4), 6), Covariance(2.25 * np.eye(3))),
    interval=1,
    cycles=12,
    start=(1.0,) + 5 * (0.0,),
    start_variance=1.0,
    spin_up=0,
    first_ensemble="same_law",
)


def kalman(observations: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means `(run, cycle, 2)` and covariances `(cycle, 2, 2)` of the Kalman filter of LINEAR."""
    m, Q, H = M.numpy(), 0.1 * np.eye(2), np.array([[1.0, 0.0]])
    mean, P = np.zeros((len(observations), 2)), 4.0 * np.eye(2)
    means, covariances = [], []
    for y in np.moveaxis(observations, 1, 0):
        for _ in range(2):
            mean, P = mean @ m.T, m @ P @ m.T + Q
        K = P @ H.T / (H @ P @ H.T + 0.5)
        mean, P = mean + (y - mean @ H.T) @ K.T, P - K @ H @ P
        means.append(mean), covariances.append(P)
    return np.stack(means, 1), np.stack(covariances)


@pytest.mark.parametrize("share", [0.2, 1.0])
def test_that_particles_are_the_kalman_filter_where_that_is_exact(share):
    result = cycle(LINEAR, ParticleFilter(0.2, share), members=8000, runs=4, seed=1)
    means, covariances = kalman(result.observations.values)
    sigma = np.sqrt(np.trace(covariances, axis1=1, axis2=2) / 2)
    assert (np.sqrt(((result.analysis.values - means) ** 2).mean(-1)) < 0.08 * sigma).all()
    assert (abs(result.analysis_spread.values / sigma - 1) < 0.12).all()


def test_that_particles_stay_where_they_are_while_enough_of_them_count():
    method = ParticleFilter(resample_below=0.3)
    result = cycle(CHAOTIC, method, members=200, runs=5, seed=1, keep_members=True)
    before, after, weights = result.background_members, result.analysis_members, result.analysis_weights
    kept = (before == after).all(("member", "variable"))
    equal = (abs(200 * weights - 1) < 1e-9).all("member")
    assert (kept != equal).all() and kept.any() and equal.any()
    count = 1 / (weights**2).sum("member")
    assert (count.where(kept) >= 0.3 * 200 - 1e-6).where(kept, True).all()
    # what is handed on is what comes back, times the likelihood
    given = result.background_weights
    assert np.array_equal(given[:, 1:], weights[:, :-1]) and np.allclose(weights.sum("member"), 1, rtol=1e-12)
    misfit = ((result.observations.values[:, :, None] - before.values[..., [0, 2, 4]]) ** 2).sum(-1) / 2.25
    updated = given.values * np.exp(-misfit / 2)
    updated /= updated.sum(-1, keepdims=True)
    assert np.allclose(weights.values[kept.values], updated[kept.values], rtol=1e-9, atol=0)
    assert (1 / (updated**2).sum(-1) < 0.3 * 200)[equal.values].all()


def test_that_particles_without_weights_are_drawn_at_once_and_that_a_share_of_one_means_always():
    @dataclass(frozen=True)
    class Direct:
        filter: ParticleFilter
        window: int = 1

        def analyse(self, background, observations, *, forecast, generator):
            return self.filter.analyse(background, observations, forecast=forecast, generator=generator)

    always = cycle(CHAOTIC, ParticleFilter(resample_below=1.0), members=50, runs=3, seed=1)
    direct = cycle(CHAOTIC, Direct(ParticleFilter(resample_below=0.2)), members=50, runs=3, seed=1)
    assert np.array_equal(always.analysis, direct.analysis) and np.array_equal(always.crps, direct.crps)
    assert "concentration" not in always


def drawn_by(method: ParticleFilter, cloud: torch.Tensor, seen) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """By how much the copies `(copy, dim)` of one run were moved, its weights, and the particles that were drawn."""
    moved = method.analyse(cloud, seen, forecast=None, generator=RunStreams(1, "method", runs=1))
    weights = torch.softmax(-seen.covariance.squared_norm(seen.innovation(cloud)) / 2, -1)
    drawn = systematic_resampling(weights, RunStreams(1, "method", runs=1))[0]
    shift = moved[0] - cloud[0, drawn]
    return shift[1:][drawn[1:] == drawn[:-1]], weights[0], shift[1:][drawn[1:] != drawn[:-1]]


@pytest.mark.parametrize("unit", [1e-9, 1.0, 1e9])
@pytest.mark.parametrize("kernel, kurtosis", [("gaussian", 3.0), ("student", 6.0)])
def test_that_copies_are_moved_by_the_kernel_and_first_ones_not_at_all(kernel, kurtosis, unit):
    cloud = unit * standard_normal((1, 20_000, 1), stream(1, "cloud"))
    seen = ObservingNetwork(Select((0,), 1), Covariance([[0.1 * unit**2]])).report(
        torch.tensor([[2.0 * unit]], dtype=torch.float64)
    )
    shift, weights, first = drawn_by(ParticleFilter(0.5, kernel=kernel), cloud, seen)
    count = 1 / weights.square().sum() if kernel == "student" else 20_000
    variance = 0.1 / 1.1 * unit**2  # of the posterior
    assert abs(shift.square().mean() / (0.25 * count ** (-2 / 5) * variance) - 1) < 0.08 and not first.any()
    assert abs(shift.mean()) < 4 * shift.std() / len(shift) ** 0.5
    found = shift.pow(4).mean() / shift.square().mean() ** 2
    assert 0.7 * kurtosis < found < 1.3 * kurtosis


def test_that_a_cloud_of_one_particle_is_spread_out_like_the_forecasts():
    cloud = standard_normal((1, 500, 3), stream(1, "cloud")) * torch.tensor([1.0, 1e-6, 1e6])
    seen = ObservingNetwork(Select((0, 1, 2), 3), DiagonalCovariance([1e-6, 1e-18, 1e6])).report(
        4 * torch.tensor([[1.0, 1e-6, 1e6]]).double()
    )
    shift, weights, _ = drawn_by(ParticleFilter(1.0), cloud, seen)
    count = 1 / weights.square().sum()
    assert count < 3 and len(shift) > 490
    assert torch.allclose(shift.std(0) / cloud[0].std(0), (count ** (-1 / 7)).expand(3), rtol=0.15)


def test_that_no_run_depends_on_the_others_weights():
    several = cycle(CHAOTIC, ParticleFilter(), members=40, runs=4, seed=2)
    alone = cycle(CHAOTIC, ParticleFilter(), members=40, runs=1, seed=2)
    for name in ("analysis", "estimate", "crps", "rank", "analysis_spread", "concentration"):
        assert np.allclose(several[name][:1], alone[name], rtol=1e-12, atol=0), name


@dataclass(frozen=True)
class Weighing:
    """The background, with given weights."""

    weights: object
    window: int = 1
    weighted: bool = True

    def analyse(self, background, observations, *, forecast, generator, weights):
        return background, self.weights(weights) if callable(self.weights) else self.weights


def test_that_equal_weights_give_every_score_that_no_weights_give():
    plain, weighed = (cycle(CHAOTIC, method, members=9, runs=5, seed=3) for method in (FreeRun(), Weighing(lambda w: w)))
    assert set(weighed) - set(plain) == {"concentration"} and np.allclose(weighed.concentration, 1 / 9)
    for name in plain:
        assert np.allclose(plain[name], weighed[name], rtol=1e-9, atol=1e-12), name
    assert np.allclose(spread_skill(plain), spread_skill(weighed)) and np.array_equal(
        rank_histogram(plain), rank_histogram(weighed)
    )


def test_that_members_of_no_weight_count_for_nothing():
    half = torch.tensor([0.125] * 8 + [0.0] * 8, dtype=torch.float64)
    result = cycle(replace(CHAOTIC, interval=2), Weighing(half.expand(5, 16)), members=16, runs=5, seed=3, keep_members=True)
    eight, truth = result.analysis_members.values[:, :, :8], result.truth.values[:, 1::2]
    assert np.allclose(result.analysis, eight.mean(2), rtol=1e-12)
    assert np.allclose(result.analysis_spread, np.sqrt(eight.var(2, ddof=1).mean(-1)), rtol=1e-12)
    assert np.allclose(result.crps, crps_ensemble(truth, np.moveaxis(eight, 2, -1), estimator="fair"), rtol=1e-9)
    assert np.array_equal(result["rank"], 2 * (eight < truth[:, :, None]).sum(2)) and np.allclose(result.concentration, 1 / 8)
    # the first background has equal weights; later ones, and what is between analyses, have those of the analysis before
    sixteen = result.background_members.values
    assert np.allclose(result.background[:, 0], sixteen[:, 0].mean(1)) and np.allclose(
        result.background[:, 1:], sixteen[:, 1:, :8].mean(2)
    )
    between = CHAOTIC.nature.step(torch.from_numpy(eight.copy())).numpy()[:, :-1].mean(2)
    assert np.allclose(result.estimate.values[:, 2::2], between, rtol=1e-12)


def test_that_the_weighted_crps_is_the_fair_one_of_scoringrules():
    w = stream(1, "weights")
    weights = torch.rand(3, 7, generator=w, dtype=torch.float64)
    weights /= weights.sum(-1, keepdim=True)
    offset = TwinExperiment(
        "still",
        STILL,
        STILL,
        CHAOTIC.network,
        interval=1,
        cycles=2,
        start=6 * (1e6,),
        start_variance=1.0,
        spin_up=0,
        first_ensemble="same_law",
    )
    result = cycle(offset, Weighing(weights), members=7, runs=3, seed=1, keep_members=True)
    ensemble = result.analysis_members.transpose("run", "cycle", "variable", "member").values
    many = np.broadcast_to(weights.numpy()[:, None, None, :], ensemble.shape).copy()
    assert np.allclose(result.crps, crps_ensemble(result.truth.values, ensemble, ens_w=many, estimator="fair"), rtol=1e-8)


def test_that_weights_make_an_honest_ensemble_of_one_that_is_too_wide():
    @dataclass(frozen=True)
    class Importance:
        """Members drawn around what was seen with 1.3 times the standard deviation that they should have, and weights that make up
        for it.
        """

        window: int = 1
        weighted: bool = True

        def analyse(self, background, observations, *, forecast, generator, weights):
            z = standard_normal(tuple(background.shape), generator)
            density = -(z.square() * (1.3**2 - 1) / 2).sum(-1)
            return observations.values[:, None] + 1.3 * z, torch.softmax(density, -1)

    one = FunctionModel(lambda x: x, 1)
    seen = ObservingNetwork(Select((0,), 1), Covariance([[1.0]]))
    experiment = TwinExperiment("one", one, one, seen, interval=1, cycles=400, start=(0.0,), spin_up=0)
    result = cycle(experiment, Importance(), members=39, runs=10, seed=1)
    lean = cycle(experiment, Importance(), members=39, runs=10, seed=1, keep="scores")
    for kept in (result, lean, summary(result)):
        assert abs(spread_skill(kept).mean() - 1) < 0.04
        assert np.allclose(spread_skill(kept), spread_skill(result))
    for name, values in scores(result).data_vars.items():
        assert np.allclose(values, scores(lean)[name].transpose(*values.dims), rtol=1e-9), name
    cumulated = rank_histogram(result).cumsum()
    assert abs(cumulated - np.arange(1, 41) / 40).max() < 0.03


@pytest.mark.parametrize("spoil", [lambda w: w * torch.nan, lambda w: 0 * w, lambda w: w - 0.2, lambda w: w / 0])
def test_that_a_run_without_weights_is_set_aside_and_no_other(spoil):
    def spoilt(weights):
        return torch.cat((weights[:1], spoil(weights[1:2]), weights[2:]))

    with pytest.warns(UserWarning, match="Weighing: 1 of 3 runs became non-finite"):
        result = cycle(CHAOTIC, Weighing(spoilt), members=6, runs=3, seed=1)
    whole = cycle(CHAOTIC, Weighing(lambda w: w), members=6, runs=3, seed=1)
    assert result.failed.values.tolist() == [-1, 0, -1] and np.isnan(result.analysis[1]).all()
    for run in (0, 2):
        assert np.array_equal(result.estimate[run], whole.estimate[run]) and np.array_equal(result.crps[run], whole.crps[run])


def test_that_particles_that_see_nothing_finite_are_set_aside():
    blind = ObservingNetwork(Nonlinear(lambda x: torch.where(x[..., :1] > 4.5, torch.nan, x[..., :1]), 1), R)
    for method in (ParticleFilter(), ParticleFilter(jitter=0.0), ParticleFilter(0.0, 1.0)):
        with pytest.warns(UserWarning, match="ParticleFilter: . of 8 runs became non-finite"):
            result = cycle(CHAOTIC.with_network(blind), method, members=20, runs=8, seed=5)
        failed = result.failed.values >= 0
        assert failed.any() and not failed.all() and np.isfinite(result.analysis.values[~failed]).all()


def test_that_nothing_seen_changes_neither_particles_nor_weights():
    gone = ObservingNetwork(Select((0, 2, 4), 6), Covariance(np.eye(3)), missing=1.0)
    result = cycle(CHAOTIC.with_network(gone), ParticleFilter(), members=10, runs=2, seed=1, keep_members=True)
    assert np.array_equal(result.analysis_members, result.background_members) and np.allclose(
        result.analysis_weights, 0.1, rtol=1e-12
    )


def test_that_a_weighted_method_must_return_a_pair_and_cannot_look_back():
    class Alone(Weighing):
        def analyse(self, background, observations, **rest):
            return background

    class Back(Weighing):
        lag = 2

    with pytest.raises(ValueError, match=r"Weighing: expected weights of shape \(2, 6\), got \(2, 3\)"):
        cycle(CHAOTIC, Weighing(torch.ones(2, 3)), members=6, runs=2, seed=1)
    with pytest.raises(ValueError, match="Alone: expected an analysis and its weights, got Tensor"):
        cycle(CHAOTIC, Alone(None), members=6, runs=2, seed=1)
    with pytest.raises(ValueError, match="method: expected one with a lag or with weights, got Back with both"):
        cycle(CHAOTIC, Back(None), members=6, runs=2, seed=1)


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda: ParticleFilter(resample_below=-0.1), "resample_below: expected a share from 0 to 1, got -0.1"),
        (lambda: ParticleFilter(resample_below=1.5), "resample_below: expected a share from 0 to 1, got 1.5"),
        (lambda: ParticleFilter(resample_below=float("nan")), "resample_below: expected a share from 0 to 1, got nan"),
        (lambda: ParticleFilter(kernel="wide"), "kernel: expected 'student' or 'gaussian', got 'wide'"),
        (lambda: ParticleFilter(jitter=-1), "jitter: expected zero or a positive number, got -1"),
    ],
)
def test_that_wrong_settings_of_a_particle_filter_are_refused_by_name(make, said):
    with pytest.raises(ValueError, match=said):
        make()


@pytest.mark.parametrize(
    "weights, said",
    [
        (torch.ones(2, 5), r"weights: expected shape \(2, 6\), got \(2, 5\)"),
        (-torch.ones(2, 6), "weights: expected finite numbers of at least 0"),
        (torch.zeros(2, 6), "weights: expected finite numbers of at least 0, some of them above it in every run"),
        (torch.full((2, 6), float("inf")), "weights: expected finite numbers"),
    ],
)
def test_that_wrong_weights_are_refused_by_name(weights, said):
    cloud = standard_normal((2, 6, 6), stream(1, "cloud"))
    seen = CHAOTIC.network.report(cloud[:, 0, [0, 2, 4]])
    with pytest.raises(ValueError, match=said):
        ParticleFilter().analyse(cloud, seen, forecast=None, generator=stream(1, "method"), weights=weights)


def test_that_weights_need_not_add_up_to_one_on_the_way_in_and_do_on_the_way_out():
    cloud = standard_normal((2, 6, 6), stream(1, "cloud"))
    seen = CHAOTIC.network.report(cloud[:, 0, [0, 2, 4]])
    one, ten = (
        ParticleFilter().analyse(
            cloud, seen, forecast=None, generator=stream(1, "method"), weights=w * torch.ones(2, 6, dtype=torch.float64)
        )
        for w in (1.0, 10.0)
    )
    assert (
        torch.equal(one[0], ten[0])
        and torch.allclose(one[1], ten[1])
        and torch.allclose(one[1].sum(-1), torch.ones(2, dtype=torch.float64))
    )


def test_that_an_archive_of_members_is_not_made_of_members_that_count_differently():
    with pytest.raises(ValueError, match="pairs: expected 'means' of ParticleFilter, whose members have weights, got 'members'"):
        make_archive(CHAOTIC, ParticleFilter(), members=10, runs=2, seed=1, pairs="members")
    means = make_archive(CHAOTIC, ParticleFilter(), members=10, runs=2, seed=1)
    assert means.sizes["sample"] == 2 * (12 - 5)
    assert (
        make_archive(CHAOTIC, ParticleFilter(resample_below=1.0), members=10, runs=2, seed=1, pairs="members").sizes["sample"]
        == 20 * 7
    )


@pytest.mark.slow
def test_that_drawing_on_demand_beats_drawing_always_where_the_model_is_perfect():
    experiment = replace(bocquet2010(200), burn_in=50)
    on_demand, always = (
        scores(cycle(experiment, method, members=800, runs=5, seed=4, keep="scores")).analysis_rmse.values
        for method in (ParticleFilter(), ParticleFilter(1.0, 1.0, "gaussian"))
    )
    gain = always - on_demand
    assert gain.mean() > 3 * gain.std(ddof=1) / 5**0.5
