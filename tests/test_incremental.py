"""Neural incremental data assimilation: gradients and posteriors against dense algebra, and training that repeats, resumes and is
written down.
"""

import json
from dataclasses import replace

import pytest
import torch
from altered import altered, with_seal
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from pnpda_nb.core import standard_normal, stream, unchecked
from pnpda_nb.dynamics import Lorenz63
from pnpda_nb.observing import Covariance, DiagonalCovariance, Linear, Nonlinear, Observations, ObservingNetwork, Select
from pnpda_nb.twin import TwinExperiment, cycle
from pnpda_nb.windows import (
    BandedPrecision,
    DensePrecision,
    IncrementalPrior,
    IncrementalSettings,
    Information,
    LowRankPrecision,
    NeuralIncremental,
    RandomSets,
    Recalibration,
    WindowClimatology,
    background_information,
    linearised,
    most_probable,
    regular_sets,
    train_incremental,
)
from pnpda_nb.windows.banded import band_dense, band_gram, dense_band
from pnpda_nb.windows.laws import pointwise
from pnpda_nb.windows.precision import banded_solve
from pnpda_nb.windows.training import incremental_loss, observe_windows

PRECISIONS = ("banded", "low_rank", "dense")
TURN = torch.tensor([[0.8, 0.4], [-0.4, 0.8]], dtype=torch.float64)


def normal(shape, *names):
    return standard_normal(shape, stream(1, *names))


def column(matrix, vector):
    return (matrix @ vector.unsqueeze(-1)).squeeze(-1)


def process(count, steps=6, seed=1):
    states = [standard_normal((count, 2), stream(seed, "start"))]
    for t in range(steps - 1):
        states.append(states[-1] @ TURN.T + 0.45 * standard_normal((count, 2), stream(seed, "noise", t)))
    return 3 + torch.tensor([2.0, 0.5]) * torch.stack(states, 1)


WINDOWS = process(600)
CLIMATE, MARKOV = WindowClimatology.of(WINDOWS), WindowClimatology.of(WINDOWS, order=1, stationary=True)
MASK = torch.rand(3, 6, 2, generator=stream(1, "mask")) < 0.4
SEEN = pointwise(WINDOWS[:3], 0.5, MASK)
SETS = RandomSets(6, 2, 2, (0, 1))
QUICK = IncrementalSettings(iterations=25, processes=2, windows=3, checks=3, background=0.3)


def make(climate=CLIMATE, shake=0.1, **settings):
    """A prior whose weights are shaken as training would."""
    size = {"dense": {"width": 8}, "convolution": {"width": 6, "dilations": (1,)}, "constant": {}}.get(
        settings.get("network", "dense"), {}
    )
    prior = IncrementalPrior.make(climate, **{"levels": 2} | size | settings)
    with torch.no_grad():
        for parameter in prior.networks.parameters():
            parameter.add_(shake * torch.randn(parameter.shape, generator=stream(1, "shake")))
    return prior


def weights(prior):
    return torch.cat([p.detach().flatten() for p in prior.networks.parameters()])


@given(
    d=st.integers(1, 8),
    part=st.floats(0, 1),
    data=st.sampled_from([((), ()), ((3,), (3,)), ((1,), (3,)), ((2, 1), (1, 3)), ((2, 2), (2,)), ((2, 1), ())]),
)
def test_that_the_implicit_gradient_is_that_of_a_dense_solve(d, part, data):
    """Bands and right side broadcast against one another."""
    half_band, (left, right) = round(part * (d - 1)), data
    rows = 0.4 * normal((half_band + 1, *left, d), "rows")
    bands = band_gram(torch.cat((1 + rows[:1].abs(), rows[1:]))).requires_grad_()
    side = normal((*right, d), "side").requires_grad_()
    cotangent = normal((*torch.broadcast_shapes(left, right), d), "cotangent")
    dense = torch.linalg.solve(band_dense(bands), side.unsqueeze(-1)).squeeze(-1)
    implicit = banded_solve(bands, side)
    torch.testing.assert_close(implicit, dense)
    for a, b in zip(torch.autograd.grad(implicit, (bands, side), cotangent), torch.autograd.grad(dense, (bands, side), cotangent)):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("left, right", [((), (3,)), ((3,), (2, 3))])
def test_that_bands_broadcast_to_a_right_side_with_more_dimensions(left, right):
    bands, side = band_gram(1 + 0.1 * normal((2, *left, 5), "bands")), normal((*right, 5), "side")
    torch.testing.assert_close(banded_solve(bands, side), torch.linalg.solve(band_dense(bands), side.unsqueeze(-1)).squeeze(-1))


def test_that_a_banded_solve_takes_none_and_single_precision_and_more_bands_than_rows():
    bands, side = band_gram(1 + 0.1 * normal((2, 4, 5), "bands")), normal((4, 5), "side")
    none = banded_solve(bands[:, :0].clone().requires_grad_(), side[:0])
    none.sum().backward()
    assert none.shape == (0, 5)
    single = bands.float().requires_grad_()
    found = banded_solve(single, side.float())
    found.sum().backward()
    assert found.dtype == single.grad.dtype == torch.float32
    torch.testing.assert_close(found, banded_solve(bands, side).float(), rtol=1e-4, atol=1e-5)
    wide = torch.cat((bands, torch.zeros(6, 4, 5))).requires_grad_()
    banded_solve(wide, side).sum().backward()
    torch.testing.assert_close(
        wide.grad[:2], torch.autograd.grad(banded_solve(leaf := bands.clone().requires_grad_(), side).sum(), leaf)[0]
    )


def test_that_a_broken_matrix_spoils_only_its_own_gradient():
    bands, side = band_gram(1 + 0.1 * normal((2, 3, 5), "bands")), normal((3, 5), "side")
    harmed = bands.clone()
    harmed[0, 1, 2] = -1.0
    harmed.requires_grad_(), bands.requires_grad_()
    found, whole = banded_solve(harmed, side), banded_solve(bands, side)
    found[[0, 2]].sum().backward(), whole[[0, 2]].sum().backward()
    assert found[1].isnan().all() and torch.equal(found[[0, 2]], whole[[0, 2]])
    torch.testing.assert_close(harmed.grad[:, [0, 2]], bands.grad[:, [0, 2]])


def precisions(batch=()):
    """The three kinds with their matrices; the process's own among them."""
    F = torch.eye(12, dtype=torch.float64) - torch.block_diag(torch.zeros(2, 0), *5 * [TURN], torch.zeros(0, 2))
    whole = F.T @ torch.block_diag(torch.eye(2), torch.eye(10) / 0.45**2).double() @ F
    U = normal((*batch, 12, 3), "U")
    diagonal = 0.5 + torch.rand(1, *batch, 12, generator=stream(2), dtype=torch.float64)
    return {
        "banded": (BandedPrecision(dense_band(whole.expand(*batch, 12, 12), 3)), whole),
        "dense": (DensePrecision(whole.expand(*batch, 12, 12)), whole),
        "low_rank": (LowRankPrecision(diagonal, U), band_dense(diagonal) + U @ U.mT),
    }


@pytest.mark.parametrize("kind", PRECISIONS)
@pytest.mark.parametrize("batch", [(3,), (2, 3)])
def test_that_the_posterior_of_a_linear_gaussian_process_is_the_exact_smoother(kind, batch):
    prior, matrix = precisions(batch)[kind]
    mean, truth = normal((*batch, 12), "mean"), normal((*batch, 6, 2), "truth")
    R, H = Covariance([[0.4, 0.1], [0.1, 0.2]]), normal((2, 2), "H")
    seen = [None if t % 2 else Observations(truth[..., t, :] @ H.T, Linear(H), R) for t in range(6)]
    known = linearised(seen, truth.unsqueeze(-3))
    known = Information(known.bands.squeeze(-2), known.vector.squeeze(-2))
    found, posterior = most_probable(mean, prior, known)
    A = torch.zeros(6, 12, dtype=torch.float64)  # all observations at once, and the gain
    y = torch.cat([truth[..., t, :] @ H.T for t in (0, 2, 4)], -1)
    for i, t in enumerate((0, 2, 4)):
        A[2 * i : 2 * i + 2, 2 * t : 2 * t + 2] = H
    B = torch.linalg.inv(matrix)
    gain = B @ A.T @ torch.linalg.inv(A @ B @ A.T + torch.block_diag(*3 * [R.matrix]))
    torch.testing.assert_close(found, mean + column(gain, y - mean @ A.T))
    torch.testing.assert_close(torch.linalg.inv(band_dense(posterior.banded())), (B - gain @ A @ B).expand(*batch, 12, 12))
    torch.testing.assert_close(posterior.product(posterior.solve(mean)), mean)


@pytest.mark.parametrize("kind", PRECISIONS)
def test_that_nothing_known_leaves_the_mean_and_gradients_reach_it(kind):
    prior, matrix = precisions((3,))[kind]
    mean = normal((3, 12), "mean").requires_grad_()
    nothing = Information(torch.zeros(1, 3, 12, dtype=torch.float64), torch.zeros(3, 12, dtype=torch.float64))
    found, _ = most_probable(mean, prior, nothing)
    assert torch.equal(found, mean)
    known = Information(torch.ones(1, 1, 12, dtype=torch.float64), normal((3, 12), "j"))  # bands alike for all
    found, _ = most_probable(mean, prior, known)
    torch.testing.assert_close(
        torch.autograd.grad(found.sum(), mean)[0],
        column(matrix @ torch.linalg.inv(matrix + torch.eye(12)), torch.ones(12).double()).expand(3, 12),
    )


@pytest.mark.parametrize("kind", PRECISIONS)
def test_that_samples_have_the_covariance(kind):
    prior, matrix = precisions((2000,))[kind]
    draws = prior.sample((2000,), stream(3, "draws"))
    if kind == "low_rank":
        draws, matrix = column(torch.linalg.cholesky(matrix).mT, draws), torch.eye(12, dtype=torch.float64)
    assert (torch.cov(draws.T) @ matrix - torch.eye(12)).abs().max() < 0.25


@pytest.mark.parametrize("kind", ["banded", "dense", "low_rank"])
def test_that_a_precision_of_single_precision_takes_a_mean_of_double(kind):
    prior, _ = precisions((3,))[kind]
    single = type(prior)(*(x.float() for x in vars(prior).values()))
    mean, known = normal((3, 12), "mean"), Information(torch.ones(1, 3, 12, dtype=torch.float64), normal((3, 12), "j"))
    torch.testing.assert_close(most_probable(mean, single, known)[0], most_probable(mean, prior, known)[0], rtol=1e-4, atol=1e-5)


def test_that_a_broken_dense_matrix_spoils_no_other():
    matrix = torch.eye(4, dtype=torch.float64).repeat(3, 1, 1)
    matrix[1, 2, 2] = torch.nan
    found = DensePrecision(matrix).solve(torch.ones(3, 4, dtype=torch.float64))
    assert found[1].isnan().all() and torch.equal(found[[0, 2]], torch.ones(2, 4, dtype=torch.float64))


def in_units(prior, level=1):
    """Mean and precision of a prior with a constant network, in the windows' own units."""
    mean, precision = prior.prior_at(torch.zeros(6, 2), level)
    scale = prior.climate.scale.flatten()
    matrix = band_dense(precision.banded().detach().double()) / scale / scale[:, None]
    return prior.climate.mean.flatten() + scale * mean.detach(), matrix


@pytest.mark.parametrize("kind", PRECISIONS)
@pytest.mark.parametrize("climate", [CLIMATE, MARKOV], ids=["full", "order"])
def test_that_a_constant_network_is_a_gaussian_prior_in_the_windows_units(kind, climate):
    prior = make(climate, shake=0.3, network="constant", precision=kind, rank=3)
    mean, matrix = in_units(prior)
    known = SEEN + background_information(WINDOWS[:3, 0] + 0.3, Covariance([[1.0, 0.4], [0.4, 0.5]]), 6)
    law = prior.analyse(known)
    A = matrix + band_dense(known.bands)
    torch.testing.assert_close(
        law.mean.flatten(1), torch.linalg.solve(A, column(matrix, mean) + known.vector), rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(law.variance.flatten(1), torch.linalg.inv(A).diagonal(0, -2, -1), rtol=1e-4, atol=1e-5)
    assert not law.mean.is_inference() and not law.mean.requires_grad and law.mean.dtype == torch.float64


@pytest.mark.parametrize("kind", PRECISIONS)
@pytest.mark.parametrize("batch", [(), (1,), (3,), (0,), (2, 1, 2)])
def test_that_any_leading_dimensions_are_a_batch_of_windows(kind, batch):
    prior, value = make(precision=kind), normal((*batch, 6, 2), "value")
    info = pointwise(value, 0.5, torch.rand(value.shape, generator=stream(2)) < 0.5)
    law = prior.analyse(info)
    assert law.mean.shape == law.variance.shape == prior.deviation(law).shape == (*batch, 6, 2)
    for i, (mean, variance) in enumerate(zip(law.mean.reshape(-1, 6, 2), law.variance.reshape(-1, 6, 2))):
        alone = prior.analyse(Information(info.bands.reshape(1, -1, 12)[:, i], info.vector.reshape(-1, 12)[i]))
        torch.testing.assert_close(alone.mean, mean, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(alone.variance, variance, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("update", ["estimate", "average"])
def test_that_levels_follow_one_another_as_written(update):
    prior = make(update=update, levels=3)
    z = first = CLIMATE.interpolate(CLIMATE.standardised(SEEN))
    for level, law in enumerate(prior.laws(SEEN)):
        mean, precision = prior.prior_at(z, level)
        found = most_probable(mean, precision, CLIMATE.standardised(SEEN))[0].detach().unflatten(-1, (6, 2))
        z = found if update == "estimate" else z + (found - first) / 3
        torch.testing.assert_close(law.mean, CLIMATE.mean + CLIMATE.scale * z, rtol=1e-6, atol=1e-6)


def test_that_a_linear_operator_given_as_a_function_is_the_same_information():
    prior = make()
    for one, other in zip(prior.laws(SEEN), prior.laws(lambda x: SEEN)):
        assert torch.equal(one.mean, other.mean) and torch.equal(one.precision, other.precision)


@pytest.mark.parametrize("harm", ["bands", "vector"])
@pytest.mark.parametrize("climate", [CLIMATE, pytest.param(MARKOV)], ids=["full", "order"])
def test_that_a_window_with_information_that_is_not_finite_stays_alone(harm, climate):
    prior, clean = make(climate), make(climate).analyse(SEEN)
    lost = Information(SEEN.bands.clone(), SEEN.vector.clone())
    (lost.bands[0] if harm == "bands" else lost.vector)[1] = torch.nan
    law = prior.analyse(lost)
    torch.testing.assert_close(law.mean[[0, 2]], clean.mean[[0, 2]], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(law.variance[[0, 2]], clean.variance[[0, 2]], rtol=1e-5, atol=1e-5)
    assert law.mean[1].isnan().any()


@pytest.mark.parametrize("known", ["sum", "background"])
def test_that_very_precise_knowledge_of_a_combination_is_no_error(known):
    if known == "sum":
        both = ObservingNetwork(Linear(torch.tensor([[1.0, 0.7]], dtype=torch.float64)), Covariance([[1e-10]]))
        info = linearised([both.observe(WINDOWS[:3, t], stream(1, t)) for t in range(6)], WINDOWS[:3, None])
    else:
        off = (1 - 5e-11) * 1e-4
        info = background_information(WINDOWS[:3, None, 0], Covariance([[1e-4, off], [off, 1e-4]]), 6)
    assert make().analyse(info).variance.isfinite().all()


def test_that_a_prior_with_a_convolution_works_on_longer_windows():
    prior = make(MARKOV, network="convolution")
    long = prior.on(9)
    assert long.steps == 9 and torch.equal(weights(long), weights(prior))
    value = process(2, 9, seed=5)
    law = long.analyse(pointwise(value, 0.5, torch.ones(2, 9, 2, dtype=torch.bool)))
    assert law.mean.shape == (2, 9, 2) and law.variance.isfinite().all()
    with pytest.raises(ValueError, match="^steps: a prior whose network reads the whole window"):
        make().on(9)
    with pytest.raises(ValueError, match="^steps: expected a stationary climate"):
        make(network="convolution").on(9)


@pytest.mark.parametrize("steps, dim", [(1, 2), (6, 1), (2, 1)])
def test_that_windows_may_be_as_small_as_they_like(steps, dim):
    windows = WINDOWS[:, :steps, :dim]
    prior, info = make(WindowClimatology.of(windows)), pointwise(windows[:3], 0.5, MASK[:, :steps, :dim])
    assert prior.analyse(info).variance.isfinite().all()


def test_that_settings_out_of_range_are_named():
    for wrong in (
        {"network": "x"},
        {"precision": "x"},
        {"update": "x"},
        {"levels": 0},
        {"rank": 0},
        {"half_band": 12},
        {"floor": 0.0},
    ):
        with pytest.raises(ValueError, match=f"^{next(iter(wrong))}: expected"):
            make(**wrong)
    for wrong in (
        {"iterations": 0},
        {"processes": 0},
        {"windows": 0},
        {"checks": 0},
        {"learning_rate": 0.0},
        {"deviation": -1.0},
        {"weight_decay": -1.0},
        {"likelihood": float("nan")},
        {"mode": "x"},
        {"average": 1.5},
        {"background": -0.1},
        {"last": 0.0},
    ):
        with pytest.raises(ValueError, match=f"^{next(iter(wrong))}: expected"):
            IncrementalSettings(**wrong)
    for wrong in (
        {"variables": (2,)},
        {"variables": ()},
        {"count": 0},
        {"count": 7},
        {"near_regular": 2.0},
        {"near_regular": 0.5, "count": 4},
    ):
        with pytest.raises(ValueError, match=f"^{next(iter(wrong))}: expected"):
            RandomSets(**{"steps": 6, "dim": 2, "count": 2} | wrong)


@pytest.mark.parametrize(
    "wrong", [{"background_deviation": (0.0, 1.0)}, {"background_deviation": (1.0, 0.1)}, {"variables": (0, 0)}, {"jitter": -1}]
)
def test_that_more_settings_out_of_range_are_named(wrong):
    with pytest.raises(ValueError, match=f"^{next(iter(wrong))}: expected"):
        IncrementalSettings(**wrong) if "background_deviation" in wrong else RandomSets(6, 2, 2, **wrong)


@given(seed=st.integers(0, 10**6), near=st.sampled_from([0.0, 0.5, 1.0]), count=st.integers(2, 3))
def test_that_sets_have_their_number_of_points_and_those_held_out_are_never_drawn(seed, near, count):
    sets = RandomSets(12, 2, count, (1,), near, jitter=1)
    tests = torch.cat((regular_sets(12, 2, 12 // count, (1,)), sets.draw(3, stream(seed, "held out"))))
    drawn = sets.holding_out(tests).draw(40, stream(seed))
    assert (drawn.sum((1, 2)) == count).all() and not drawn[..., 0].any()
    assert not (drawn.flatten(1)[:, None] == tests.flatten(1)).all(-1).any()


def test_that_when_every_set_is_held_out_that_is_said():
    everything = RandomSets(3, 1, 1).holding_out(torch.eye(3).bool().unsqueeze(-1))
    with pytest.raises(ValueError, match="^held_out: nearly every set"):
        everything.draw(1, stream(1))
    assert regular_sets(7, 2, 3, (0, 1)).sum((1, 2)).tolist() == [6, 4, 4] and (regular_sets(7, 2, 3, (0, 1)).sum(0) == 1).all()


def test_that_observed_windows_know_what_was_seen_with_its_error():
    z = normal((2, 4000, 6, 2), "z")
    present = SETS.draw(2, stream(1))
    info = observe_windows(z, present, 0.1, stream(2), 1.0, (0.5, 0.5))
    weight = present.flatten(1) / 0.01
    weight[:, :2] += 4
    torch.testing.assert_close(info.bands[0, :, 0], weight.double(), rtol=1e-6, atol=1e-6)
    expected = torch.where(weight > 0, 1 / weight, 0.0)  # the variance of J⁻¹j about the truth
    error = torch.where(weight[:, None] > 0, info.vector / weight[:, None] - z.flatten(2), 0.0)
    torch.testing.assert_close(error.var(1), expected.double(), rtol=0.15, atol=0)
    assert torch.equal(observe_windows(z, present, 0.1, stream(2), 0.0).bands[0, :, 0] > 0, present.flatten(1))


@pytest.mark.parametrize("kind", PRECISIONS)
def test_that_a_rollout_gives_levels_their_own_estimates_and_an_interpolation_the_truth_in_part(kind):
    prior = make(precision=kind)
    z = ((WINDOWS[:8] - CLIMATE.mean) / CLIMATE.scale).float().reshape(2, 4, 6, 2)
    info = observe_windows(z, SETS.draw(2, stream(1)), 0.1, stream(2))
    first = CLIMATE.interpolate(info).float()
    settings = IncrementalSettings(likelihood=0.0, last=0.7)

    def error(x, level):
        found = most_probable(*prior.prior_at(x, level), info)[0].reshape(z.shape).to(z)
        return found, (found - z).square().mean()

    found, one = error(first, 0)
    rollout = incremental_loss(prior, z, info, settings, stream(3))
    torch.testing.assert_close(rollout, 0.3 * one + 0.7 * error(found, 1)[1])
    interpolated = incremental_loss(prior, z, info, replace(settings, mode="interpolated"), stream(3))
    torch.testing.assert_close(interpolated, (one + error((first + z) / 2, 1)[1]) / 2)
    parameters = list(prior.networks[0].parameters())
    alone, passed = (
        torch.autograd.grad(one, parameters, retain_graph=True),
        torch.autograd.grad(rollout, parameters, retain_graph=True),
    )
    apart = torch.autograd.grad(interpolated, parameters)
    assert all(torch.allclose(a, b / 2, atol=1e-6) for a, b in zip(apart, alone))  # the second level has no part in it
    assert not all(torch.allclose(a, 0.3 * b, atol=1e-6) for a, b in zip(passed, alone))


@pytest.mark.parametrize("mode", ["rollout", "interpolated"])
def test_that_with_one_level_both_modes_are_one(mode):
    prior, z = make(levels=1), ((WINDOWS[:8] - CLIMATE.mean) / CLIMATE.scale).float().reshape(2, 4, 6, 2)
    info = observe_windows(z, SETS.draw(2, stream(1)), 0.1, stream(2), 0.5)
    losses = [incremental_loss(prior, z, info, IncrementalSettings(mode=m), stream(3)) for m in ("rollout", mode)]
    torch.testing.assert_close(*losses)


def train(prior=None, windows=WINDOWS, settings=QUICK, seed=1, **options):
    return train_incremental(
        make(shake=0.0) if prior is None else prior, windows, SETS, settings, validation=WINDOWS[:5], seed=seed, **options
    )


def test_that_one_seed_gives_one_prior_and_the_global_stream_is_left_alone():
    def train(prior, seed=1):
        return train_incremental(prior, WINDOWS, SETS, replace(QUICK, iterations=10), validation=WINDOWS[:5], seed=seed)

    untrained, before = make(shake=0.0), torch.random.get_rng_state()
    start = weights(untrained)
    (a, history), (b, _), (c, _) = train(untrained), train(untrained), train(untrained, seed=2)
    assert torch.equal(weights(a), weights(b)) and not torch.equal(weights(a), weights(c)) and not torch.equal(weights(a), start)
    assert torch.equal(weights(untrained), start) and torch.equal(torch.random.get_rng_state(), before)
    assert (
        history.columns.tolist() == ["iteration", "loss", "validation", "seconds"]
        and history.iteration.iloc[-1] == 10
        and len(history) == 3
    )
    assert torch.equal(weights(make(seed=3)), weights(make(seed=3))) and not torch.equal(
        weights(make(seed=3)), weights(make(seed=4))
    )


@pytest.mark.parametrize("kind", PRECISIONS)
def test_that_training_lowers_the_loss(kind):
    settings = IncrementalSettings(iterations=60, processes=4, windows=16, learning_rate=5e-3, checks=4)
    prior, history = train(untrained := make(shake=0.0, precision=kind), settings=settings)
    z = ((WINDOWS - CLIMATE.mean) / CLIMATE.scale).float().reshape(6, 100, 6, 2)
    info = observe_windows(z, SETS.draw(6, stream(1)), settings.deviation, stream(2))
    before, after = (incremental_loss(p, z, info, settings, stream(3)).item() for p in (untrained, prior))
    assert after < before - 0.002 and history.validation.iloc[-1] < history.validation.iloc[0] + 0.1
    assert not any(p.requires_grad for p in prior.networks.parameters())


class Interrupted:
    """Draws windows; at the second call it is interrupted, before or after it has drawn."""

    def __init__(self, after=False, calm=False):
        self.calls, self.after, self.calm = 0, after, calm

    def __call__(self, count, generator):
        self.calls += 1
        stops = self.calls == 2 and not self.calm
        if stops and not self.after:
            raise KeyboardInterrupt
        chosen = torch.randint(0, len(WINDOWS), (count,), generator=generator)
        if stops:
            raise KeyboardInterrupt
        return WINDOWS[chosen]


@pytest.mark.parametrize("after", [False, True])
def test_that_a_training_that_was_interrupted_ends_as_one_that_was_not(after, tmp_path):
    path, settings = tmp_path / "checkpoint", replace(QUICK, iterations=24)
    whole, history = train(windows=Interrupted(calm=True), settings=settings)
    with pytest.raises(KeyboardInterrupt):
        train(windows=Interrupted(after), settings=settings, checkpoint=path)
    assert path.exists() and [p.name for p in tmp_path.iterdir()] == ["checkpoint"]
    with pytest.raises(ValueError, match="^checkpoint: .* belongs to another training"):
        train(windows=Interrupted(calm=True), settings=settings, checkpoint=path, seed=2)
    again, rest = train(windows=Interrupted(calm=True), settings=settings, checkpoint=path)
    assert torch.equal(weights(whole), weights(again)) and not path.exists()
    assert rest.drop(columns="seconds").equals(history.drop(columns="seconds"))


@pytest.mark.parametrize("other", ["weights", "climate"])
def test_that_a_checkpoint_of_another_prior_is_refused(other, tmp_path):
    path = tmp_path / "checkpoint"
    with pytest.raises(KeyboardInterrupt):
        train(windows=Interrupted(), checkpoint=path)
    mean, scale, covariance = CLIMATE.mean, CLIMATE.scale, CLIMATE.covariance
    prior = make(shake=0.0, seed=7) if other == "weights" else make(WindowClimatology(mean, 2 * scale, covariance), shake=0.0)
    with pytest.raises(ValueError, match="^checkpoint: "):
        train(prior, windows=Interrupted(calm=True), checkpoint=path)


def test_that_training_refuses_what_does_not_fit(tmp_path):
    with pytest.raises(ValueError, match=r"^windows: expected shape \(N, 6, 2\), got \(600, 5, 2\)"):
        train(windows=WINDOWS[:, :5])
    with pytest.raises(ValueError, match="^validation: expected shape"):
        train_incremental(make(), WINDOWS, SETS, QUICK, validation=WINDOWS[:, :5])
    with pytest.raises(ValueError, match="^sets: expected windows of shape"):
        train_incremental(make(), WINDOWS, RandomSets(5, 2, 2), QUICK)
    with pytest.raises(ValueError, match="^windows: expected finite numbers"):
        train(windows=WINDOWS * torch.nan)
    with pytest.raises(ValueError, match="^settings: the loss became non-finite at iteration 0"):
        train(windows=lambda count, generator: torch.full((count, 6, 2), torch.nan, dtype=torch.float64))
    (tmp_path / "checkpoint").write_bytes(b"no checkpoint")
    with pytest.raises(ValueError, match="^checkpoint: .* not a readable"):
        train(checkpoint=tmp_path / "checkpoint")
    prior, history = train_incremental(make(), WINDOWS, SETS, replace(QUICK, iterations=2))  # without validation
    assert history.validation.isna().all() and len(history) == 2 and weights(prior).isfinite().all()


@pytest.mark.parametrize("kind", PRECISIONS)
@pytest.mark.parametrize("network", ["dense", "convolution", "constant"])
@pytest.mark.parametrize("climate", [CLIMATE, MARKOV], ids=["full", "order"])
def test_that_a_saved_prior_is_the_same_one(kind, network, climate, tmp_path):
    prior = make(climate, precision=kind, network=network, shared=network == "convolution", rank=2)
    prior.calibration, prior.training = Recalibration((-1.0, 0.5), (0.2, -0.1)), {"seed": 3}
    prior.networks.requires_grad_(False)
    again = IncrementalPrior.load(prior.save(tmp_path / "prior.safetensors"))
    assert [p.name for p in tmp_path.iterdir()] == ["prior.safetensors"]
    x = normal((3, 6, 2), "x")
    for level in range(2):
        (a, p), (b, q) = prior.prior_at(x, level), again.prior_at(x, level)
        assert torch.equal(a, b) and torch.equal(p.banded(), q.banded())
    assert again.calibration.knots == (-1.0, 0.5) and again.calibration.factors == (0.2, -0.1)
    assert again.training == {"seed": 3} and again.architecture == prior.architecture
    for one, other in zip(prior.climate.law(SEEN), again.climate.law(SEEN)):
        assert torch.equal(one, other)
    one, other = prior.analyse(SEEN), again.analyse(SEEN)
    assert torch.equal(one.mean, other.mean) and torch.equal(prior.deviation(one), again.deviation(other))


def test_that_files_of_others_and_broken_ones_are_named(tmp_path):
    path = make().save(tmp_path / "prior.safetensors")
    (tmp_path / "cut").write_bytes(path.read_bytes()[:-100])
    (tmp_path / "head").write_bytes(path.read_bytes()[:5])
    (tmp_path / "text").write_text("no prior")
    save_file({"x": torch.ones(2)}, tmp_path / "foreign")
    header = {"format": "pnpda_nb incremental prior 1", "architecture": "[]", "training": "{}", "calibration": "null"}
    with_seal({"x": torch.ones(2)}, header, tmp_path / "header")
    for name, message in {
        "cut": "not a readable",
        "head": "not a readable",
        "text": "not a readable",
        "foreign": "expected format",
        "header": "a header that does not fit",
    }.items():
        with pytest.raises(ValueError, match=message) as error:
            IncrementalPrior.load(tmp_path / name)
        assert str(error.value).startswith("prior: ") and "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError, match="^prior: no file"):
        IncrementalPrior.load(tmp_path / "nothing")
    lost = make()
    with torch.no_grad():
        next(lost.networks.parameters()).fill_(torch.nan)
    with pytest.raises(ValueError, match="not finite"):
        IncrementalPrior.load(lost.save(tmp_path / "nan"))


def with_architecture(path, **changes):
    with safe_open(path, framework="pt") as file:
        architecture = json.loads(file.metadata()["architecture"]) | changes
    return altered(path, path, architecture=json.dumps({k: v for k, v in architecture.items() if v is not None}))


@pytest.mark.parametrize(
    "changes", [{"levels": 3}, {"levels": 1}, {"precision": "dense"}, {"precision": "x"}, {"size": {"width": 9}}, {"shared": True}]
)
def test_that_a_header_that_does_not_fit_its_contents_is_refused(changes, tmp_path):
    with pytest.raises(ValueError, match="^prior: .* a header that does not fit"):
        IncrementalPrior.load(with_architecture(make().save(tmp_path / "prior"), **changes))


@pytest.mark.parametrize("changes", [{"update": None}, {"floor": None}, {"update": "x"}, {"floor": -1.0}])
def test_that_a_header_that_lacks_something_is_refused(changes, tmp_path):
    with pytest.raises(ValueError, match="^prior: "):
        IncrementalPrior.load(with_architecture(make().save(tmp_path / "prior"), **changes))


@pytest.mark.parametrize("coverage", [0.5, 0.9])
def test_that_calibrated_intervals_cover_what_they_should_wide_and_narrow_ones_alike(coverage):
    deviation = torch.rand(40_000, generator=stream(1), dtype=torch.float64) + 0.2
    error = deviation ** torch.tensor([1.7]) * normal((40_000,), "error")
    calibration = Recalibration.fit(error[:20_000], deviation[:20_000], coverage)
    wide = calibration(deviation[20_000:])
    quantile = torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor((1 + coverage) / 2))
    inside = error[20_000:].abs() < quantile * wide
    for part in deviation[20_000:].argsort().tensor_split(5):
        assert inside[part].double().mean() == pytest.approx(coverage, abs=0.025)
    torch.testing.assert_close(
        calibration(torch.tensor([1e-3, 1e3]).double()) / torch.tensor([1e-3, 1e3]).double(),
        torch.tensor(calibration.factors).double()[[0, -1]].exp(),
    )


def test_that_a_calibrated_prior_covers_the_truth():
    prior, truth = make(), process(400, seed=9)
    law = prior.analyse(
        pointwise(truth + 0.5 * normal(truth.shape, "errors"), 0.5, torch.rand(truth.shape, generator=stream(2)) < 0.3)
    )
    fitted = prior.calibrated(law, truth)
    assert prior.calibration is None and torch.equal(prior.deviation(law), law.deviation)
    inside = ((law.mean - truth).abs() < 1.6449 * fitted.deviation(law)).double().mean()
    assert inside == pytest.approx(0.9, abs=0.02)
    with pytest.raises(ValueError, match="^coverage: expected a share"):
        prior.calibrated(law, truth, coverage=1.0)
    with pytest.raises(ValueError, match="^deviation: expected as many as errors, and at least 120"):
        Recalibration.fit(torch.ones(100), torch.ones(100))


@pytest.mark.parametrize("broken", ["error", "deviation"])
def test_that_a_calibration_of_numbers_that_are_not_finite_is_refused(broken):
    error, deviation = normal((400,), "error"), torch.ones(400, dtype=torch.float64)
    (error if broken == "error" else deviation)[:200] = torch.nan if broken == "error" else 0.0
    with pytest.raises(ValueError, match=f"^{broken}: expected"):
        Recalibration.fit(error, deviation)


B = Covariance([[1.0, 0.4], [0.4, 0.5]])


def reports(network, count=5, runs=3):
    return [network.observe(WINDOWS[:runs, t], stream(1, "y", t)) for t in range(1, count + 1)]


def analyse(method, background, seen):
    return method.analyse(background, seen, forecast=None, generator=None)


@pytest.mark.parametrize("members", [1, 4])
@pytest.mark.parametrize("count", [1, 3, 5])
def test_that_a_cycled_window_is_the_dense_analysis_with_its_background(members, count):
    """Values are missing, errors correlated, the window not yet full."""
    prior = make(network="constant", shake=0.3)
    mean, matrix = in_units(prior)
    H = normal((2, 2), "H")
    network = ObservingNetwork(Linear(H), Covariance([[0.4, 0.1], [0.1, 0.2]]), missing=0.3)
    background, seen = WINDOWS[:3, None, 0] + normal((3, members, 2), "b"), reports(network, count)
    assert any(o.missing is not None for o in seen) or count < 3
    found = analyse(NeuralIncremental(prior, B, scale=2.0), background, seen)
    assert found.shape == (count + 1, 3, members, 2) and found.dtype == torch.float64
    for run in range(3):
        for member in range(members):
            A, right = matrix.clone(), matrix @ mean
            A[:2, :2] += B.inverse / 2
            right[:2] += B.inverse / 2 @ background[run, member]
            for t, o in enumerate(seen, 1):
                there = torch.ones(2, dtype=torch.bool) if o.missing is None else ~o.missing[run]
                part, weight = H[there], torch.linalg.inv(network.covariance.matrix[there][:, there])
                A[2 * t : 2 * t + 2, 2 * t : 2 * t + 2] += part.T @ weight @ part
                right[2 * t : 2 * t + 2] += part.T @ weight @ o.values[run, there]
            expected = torch.linalg.solve(A, right).reshape(6, 2)[: count + 1]
            torch.testing.assert_close(found[:, run, member], expected, rtol=1e-4, atol=1e-4)


def test_that_runs_members_and_nonlinear_operators_go_their_own_ways():
    method = NeuralIncremental(make(), B)
    bent = ObservingNetwork(Nonlinear(lambda s: (s[..., :1] / 3).sinh(), 1), DiagonalCovariance([0.01]), missing=0.2)
    background, seen = WINDOWS[:3, None, 0] + normal((3, 4, 2), "b"), reports(bent)
    whole = analyse(method, background, seen)
    assert whole.isfinite().all()
    single = [
        Observations(
            torch.where(o.missing[1], torch.nan, o.values[1]) if o.missing is not None else o.values[1],
            bent.operator,
            bent.covariance,
        )
        for o in seen
    ]
    torch.testing.assert_close(analyse(method, background[1, 2:3], single), whole[:, 1, 2:3], rtol=1e-4, atol=1e-4)
    lost = background.clone()
    lost[1] = torch.nan
    with pytest.raises(ValueError, match="^background: expected finite"):
        analyse(method, lost, seen)
    with unchecked():  # as in a cycle, where the run is set aside
        found = analyse(method, lost, seen)
    torch.testing.assert_close(found[:, [0, 2]], whole[:, [0, 2]], rtol=1e-4, atol=1e-4)
    assert found[:, 1].isnan().all()
    straight, same = Linear(torch.tensor([[1.0, 0.0]], dtype=torch.float64)), Nonlinear(lambda s: s[..., :1], 1)
    values = [analyse(method, background, reports(ObservingNetwork(o, DiagonalCovariance([0.3])))) for o in (straight, same)]
    torch.testing.assert_close(*values, rtol=1e-5, atol=1e-5)


def test_that_a_method_whose_settings_or_states_do_not_fit_says_so():
    prior = make()
    for wrong in ({"window": 6}, {"window": -1}, {"shift": 0}, {"window": 2, "shift": 3}, {"scale": 0.0}, {"scale": float("nan")}):
        with pytest.raises(ValueError, match=f"^{list(wrong)[-1]}: expected"):
            NeuralIncremental(prior, B, **wrong)
    method = NeuralIncremental(prior, B)
    assert (method.window, method.shift, method.from_start) == (5, 1, True)
    with pytest.raises(ValueError, match="^prior: expected states of size 3"):
        analyse(method, torch.zeros(3, 1, 3, dtype=torch.float64), [])
    with pytest.raises(ValueError, match="^observations: expected 6 times"):
        analyse(method, WINDOWS[:3, None, 0], 2 * reports(ObservingNetwork(Select((0,), 2), DiagonalCovariance([0.3]))))


def test_that_a_background_covariance_of_another_size_is_refused():
    with pytest.raises(ValueError, match="^covariance: expected size 2"):
        NeuralIncremental(make(), Covariance(torch.eye(3)))


LORENZ = TwinExperiment(
    "cycled",
    Lorenz63(dt=0.05),
    Lorenz63(dt=0.05),
    ObservingNetwork(Select((0, 2), 3), DiagonalCovariance([0.2, 0.3]), missing=0.3),
    interval=1,
    cycles=8,
    start=(0.0, 0.0, 25.0),
    spin_up=50,
)
NATURE = torch.stack([standard_normal((500, 3), stream(4, t)).cumsum(-1) + 3 * t for t in range(5)], 1)


@pytest.mark.parametrize("window, shift", [(0, 1), (4, 4), (4, 3), (1, 1)])
@pytest.mark.parametrize("operator", [None, Nonlinear(lambda s: s[..., :2] ** 2 / 20, 2)], ids=["linear", "nonlinear"])
def test_that_it_cycles_like_any_other_method(window, shift, operator):
    network = LORENZ.network if operator is None else replace(LORENZ.network, operator=operator)
    method = NeuralIncremental(make(WindowClimatology.of(NATURE)), Covariance(torch.eye(3)), window=window, shift=shift)
    a, b = (cycle(LORENZ.with_network(network), method, members=2, runs=runs, seed=1) for runs in (3, 2))
    assert (a.failed == -1).all() and a.missing.sum() > 0 and a.sizes["cycle"] == 8
    assert abs(a.analysis.values[:2] - b.analysis.values).max() < 1e-2 and ("smoothed" in a) == (method.shift < method.window)
    assert abs(a.analysis.values).max() < 1e3
