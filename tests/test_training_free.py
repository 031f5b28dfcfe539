"""Score and flow filters: what is exactly true of them, on other inputs than the chapter's."""

from dataclasses import replace

import pytest
import torch

from pnpda_nb.classical import EnFF, EnSF
from pnpda_nb.classical.training_free import ensemble_score, ensemble_velocity, member_weights, standardise, towards_observations
from pnpda_nb.core import standard_normal, stream
from pnpda_nb.observing import Covariance, DiagonalCovariance, Linear, Nonlinear, ObservingNetwork, Select
from pnpda_nb.twin import FreeRun, cycle, lorenz96, mean_and_error

ALL = [EnSF(steps=20), EnSF(steps=20, score="own"), EnFF(), EnFF(guidance="gaussian"), EnFF(path="background")]
NAMES = ["EnSF", "EnSF own", "EnFF", "EnFF Gaussian", "EnFF background"]
CLOUD = torch.tensor([1.0, -4.0, 20.0]) + torch.tensor([0.1, 1.0, 7.0]) * standard_normal((6, 12, 3), stream(2, "cloud"))


def analyse(method, cloud, network, values, name="chance"):
    return method.analyse(cloud, network.report(values), forecast=None, generator=stream(2, name))


def test_that_the_score_is_the_gradient_of_the_mixture_s_log_density():
    members, states = standard_normal((7, 3), stream(2, "members")), standard_normal((5, 3), stream(2, "states"))
    states.requires_grad_()
    density = torch.exp(-(states[:, None] - 0.6 * members).square().sum(-1) / (2 * 0.3)).sum(-1).log().sum()
    expected = torch.autograd.grad(density, states)[0]
    assert torch.allclose(ensemble_score(states.detach(), members, 0.6, 0.3), expected)


def test_that_weights_add_up_to_one_and_follow_their_members():
    members, states = standard_normal((4, 7, 3), stream(2, "members")), standard_normal((4, 5, 3), stream(2, "states"))
    weights, order = member_weights(states, members, 0.6, 0.3), torch.randperm(7, generator=stream(2, "order"))
    assert torch.allclose(weights.sum(-1), torch.ones(4, 5, dtype=torch.float64))
    assert torch.allclose(member_weights(states, members[:, order], 0.6, 0.3), weights[..., order])


@pytest.mark.parametrize("bandwidth", [0.0, 0.2, 0.7])
def test_that_the_velocity_satisfies_the_continuity_equation(bandwidth):
    members = standard_normal((5, 1), stream(2, "members"))
    x = torch.linspace(-9, 9, 20_001, dtype=torch.float64)[:, None]

    def density(tau):
        sigma = 1 - (1 - bandwidth) * tau
        return (torch.exp(-((x - tau * members.T) ** 2) / (2 * sigma**2)) / sigma).mean(-1)

    tau, h = 0.4, 1e-4
    change = (density(tau + h) - density(tau - h)) / (2 * h)
    flux = density(tau) * ensemble_velocity(x, members, tau, bandwidth)[:, 0]
    divergence = torch.gradient(flux, spacing=(x[:, 0],))[0]
    assert (change + divergence).abs().max() < 1e-4 * change.abs().max() + 1e-5


def test_that_narrow_kernels_end_on_members():
    blind = ObservingNetwork(Select((), 3), Covariance(torch.zeros(0, 0)))
    for method in (EnSF(bandwidth=0.0), EnFF(bandwidth=0.0)):
        drawn = analyse(method, CLOUD, blind, torch.zeros(6, 0, dtype=torch.float64))
        scaled = [x / CLOUD.std(1, keepdim=True) for x in (drawn, CLOUD)]
        assert (torch.cdist(*scaled).amin(-1) < 1e-3).double().mean() > 0.7


@pytest.mark.parametrize("matrix", [[[1.0, 0.0, 0.0], [0.5, 0.0, 2.0]], [[0.0, 3.0, 0.0], [0.0, 0.0, 1.0]]])
def test_that_linear_and_linearised_steps_are_the_same(matrix):
    H, P = torch.tensor(matrix, dtype=torch.float64), Covariance([[1.0, 0.3], [0.3, 2.0]])
    spread = CLOUD.std(1, keepdim=True)
    values = standard_normal((6, 2), stream(2, "values"))
    values[0, 1] = torch.nan
    a, b = (
        towards_observations(CLOUD, ObservingNetwork(operator, P).report(values), spread, 0.4)
        for operator in (Linear(H), Nonlinear(lambda x: x @ H.T, 2))
    )
    assert torch.allclose(a, b) and a.abs().max() > 0.1


@pytest.mark.parametrize("method", ALL, ids=NAMES)
def test_that_units_do_not_matter(method):
    scale, shift = torch.tensor([10.0, 0.2, 3.0]).double(), torch.tensor([5.0, 0.0, -100.0]).double()
    values = CLOUD.mean(1)[:, :2] + 0.1
    a = analyse(method, CLOUD, ObservingNetwork(Select((0, 1), 3), DiagonalCovariance([0.01, 0.5])), values)
    other = DiagonalCovariance([0.01 * 10.0**2, 0.5 * 0.2**2])
    b = analyse(method, shift + scale * CLOUD, ObservingNetwork(Select((0, 1), 3), other), shift[:2] + scale[:2] * values)
    assert torch.allclose(shift + scale * a, b, atol=1e-6)


@pytest.mark.parametrize("method", ALL, ids=NAMES)
@pytest.mark.parametrize("variance", [1e-12, 1e-4, 1e6])
def test_that_no_observation_is_too_good_or_too_bad_for_it(method, variance):
    network = ObservingNetwork(Select((0, 2), 3), DiagonalCovariance([variance, variance]))
    values = CLOUD.mean(1)[:, [0, 2]] + 0.5 * CLOUD.std(1)[:, [0, 2]]
    found = analyse(method, CLOUD, network, values)
    assert torch.isfinite(found).all()
    off = (found.mean(1)[:, [0, 2]] - values).abs() / CLOUD.std(1)[:, [0, 2]]
    assert off.max() < 5  # it does not shoot away
    if variance == 1e6:  # as good as none
        blind = ObservingNetwork(Select((), 3), Covariance(torch.zeros(0, 0)))
        assert torch.allclose(found, analyse(method, CLOUD, blind, torch.zeros(6, 0).double()), atol=1e-2)


def test_that_gaussian_guidance_finds_the_posterior_of_independent_gaussians():
    cloud = standard_normal((30, 100, 1), stream(2, "gaussian"))
    network = ObservingNetwork(Select((0,), 1), Covariance([[0.5]]))
    found = analyse(EnFF(guidance="gaussian", bandwidth=0.05, steps=40), cloud, network, torch.full((30, 1), 1.0).double())
    means, variances = found.mean((1, 2)), found.var((1, 2))
    assert abs(means.mean() - 1 / 1.5) < 0.07 and abs(variances.mean() - 0.5 / 1.5) < 0.08


@pytest.mark.parametrize("method", ALL, ids=NAMES)
def test_that_relaxation_gives_the_spread_back(method):
    network = ObservingNetwork(Select((0, 1, 2), 3), DiagonalCovariance([0.01, 1.0, 10.0]))
    kept = type(method)(**{**{f: getattr(method, f) for f in method.__dataclass_fields__ if f != "window"}, "relaxation": 1.0})
    found = analyse(kept, CLOUD, network, CLOUD.mean(1))
    assert torch.allclose(found.std(1), CLOUD.std(1))


def test_that_both_beat_a_free_run_where_half_the_state_is_seen():
    experiment = replace(lorenz96(cycles=10), spin_up=500)
    free, *found = (
        mean_and_error(cycle(experiment, m, members=20, runs=6, seed=5), "analysis_rmse")
        for m in (FreeRun(), EnSF(steps=20, relaxation=0.3), EnFF(steps=10, relaxation=0.5))
    )
    for score, error in found:
        assert score + 3 * error < 0.7 * free[0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EnSF(steps=0), "steps: expected a whole number of at least 1, got 0"),
        (lambda: EnFF(steps=2.5), "steps"),
        (lambda: EnSF(bandwidth=1.5), "bandwidth: expected a share from 0 to 1, got 1.5"),
        (lambda: EnFF(bandwidth=-0.1), "bandwidth"),
        (lambda: EnSF(scale=0.0), "scale: expected a positive number or None, got 0.0"),
        (lambda: EnSF(epsilon=0.0), "epsilon: expected a share between 0 and 1, got 0.0"),
        (lambda: EnSF(score="some"), "score: expected 'all' or 'own', got 'some'"),
        (lambda: EnFF(path="straight"), "path: expected 'ot' or 'background'"),
        (lambda: EnFF(guidance="none"), "guidance"),
        (lambda: EnFF(path="background", guidance="gaussian"), "guidance: expected 'local' with path='background'"),
        (lambda: EnFF(strength=0.0), "strength: expected a positive number, got 0.0"),
        (lambda: EnSF(inflation=0.0), "inflation"),
    ],
)  # fmt: skip
def test_that_settings_out_of_range_are_one_clear_error(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_that_a_given_scale_takes_the_place_of_the_spread():
    centre, spread, units = standardise(CLOUD, scale=2.0)
    assert (spread == 2.0).all() and torch.allclose(centre + 2 * units, CLOUD)
    same = CLOUD[:, :1].expand(6, 5, 3)
    assert torch.allclose(standardise(same)[2], torch.zeros(6, 5, 3).double())
