"""Windows as states: banded algebra is dense algebra, information adds up, and 4D-Var finds the exact law where there is one."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pnpda_nb.core import standard_normal, stream
from pnpda_nb.dynamics import AdditiveModelError, Forecast, FunctionModel, Lorenz63
from pnpda_nb.observing import Covariance, DiagonalCovariance, Linear, Nonlinear, Observations, ObservingNetwork, Select
from pnpda_nb.twin import TwinExperiment
from pnpda_nb.windows import (
    GaussianWindow,
    Information,
    WindowClimatology,
    WindowFourDVar,
    background_information,
    draw_windows,
    linearised,
    normalised_mse,
    window_four_dvar,
)
from pnpda_nb.windows.banded import BandedCholesky, add_bands, band_dense, band_gram, band_product, block_bands, dense_band
from pnpda_nb.windows.laws import pointwise
from pnpda_nb.windows.minimise import levenberg_marquardt

TURN = torch.tensor([[0.9, 0.4], [-0.4, 0.9]], dtype=torch.float64)
WAVE = FunctionModel(lambda s: s @ TURN.T + 0.3 * s.flip(-1).sin(), 2)
BATCHES = [(), (1,), (3,), (2, 1, 2)]


def normal(shape, *names):
    return standard_normal(shape, stream(1, *names))


def eye(n, batch=()):
    return torch.eye(n, dtype=torch.float64).expand(*batch, n, n)


def column(matrix, vector):
    return (matrix @ vector.unsqueeze(-1)).squeeze(-1)


def factor_rows(half_band, batch, d, *names):
    """Rows of lower triangular factors, away from singular."""
    rows = 0.4 * normal((half_band + 1, *batch, d), "rows", *names)
    return torch.cat((1 + rows[:1].abs(), rows[1:]))


def process(count=3000, steps=6):
    """A linear Gaussian process of order one, whose every time has the same law from the start on."""
    states = [normal((count, 2), "start")]
    for t in range(steps - 1):
        states.append(0.8 * states[-1] @ TURN.T / 0.97**0.5 + (1 - 0.64) ** 0.5 * normal((count, 2), "noise", t))
    return torch.stack(states, 1)


WINDOWS = process()
CLIMATES = {
    "full": WindowClimatology.of(WINDOWS),
    "order": WindowClimatology.of(WINDOWS, order=1),
    "second": WindowClimatology.of(WINDOWS, order=2, stationary=True),
}
MASK = torch.rand(3, 6, 2, generator=stream(1, "mask")) < 0.4
SEEN = pointwise(WINDOWS[:3], 0.5, MASK)
BLOCKS = Information(band_gram(0.7 * normal((2, 3, 12), "J")), normal((3, 12), "j"))


def method(model=WAVE, strong=False, mean=None, tolerance=1e-12, iterations=200):
    mean = torch.zeros(2, dtype=torch.float64) if mean is None else mean
    error = None if strong else Covariance([[0.3, 0.1], [0.1, 0.2]])
    return WindowFourDVar(Forecast(model, 1), mean, Covariance([[1.0, 0.2], [0.2, 0.7]]), error, iterations, tolerance)


@given(d=st.integers(1, 9), part=st.floats(0, 1), batch=st.sampled_from(BATCHES))
def test_that_banded_algebra_is_dense_algebra(d, part, batch):
    half_band = round(part * (d - 1))
    rows = factor_rows(half_band, batch, d)
    L = sum(torch.diag_embed(row[..., m:], offset=-m) for m, row in enumerate(rows))
    bands, x = band_gram(rows), normal((*batch, d), "x")
    A = L.mT @ L
    torch.testing.assert_close(band_dense(bands), A)
    torch.testing.assert_close(dense_band(A, half_band), bands)
    torch.testing.assert_close(band_product(bands, x), column(A, x))
    factor, inverse = BandedCholesky(bands), torch.linalg.inv(A)
    assert factor.broken.shape == batch and not factor.broken.any()
    torch.testing.assert_close(factor.solve(x), column(inverse, x))
    torch.testing.assert_close(factor.log_determinant(), torch.logdet(A))
    torch.testing.assert_close(factor.inverse_bands(), dense_band(inverse, half_band))
    root = torch.stack([factor.whiten(unit.expand(*batch, d)) for unit in eye(d)], -1)
    torch.testing.assert_close(root @ root.mT, inverse)


@given(a=st.integers(0, 4), b=st.integers(0, 4), left=st.sampled_from([(3,), (1,)]), right=st.sampled_from([(3,), (1,)]))
def test_that_bands_of_different_widths_and_batches_add_up(a, b, left, right):
    one, other = (band_gram(factor_rows(width, batch, 5, width)) for width, batch in ((a, left), (b, right)))
    torch.testing.assert_close(band_dense(add_bands(one, other)), band_dense(one) + band_dense(other))


@pytest.mark.parametrize("batch", [(2,), (3,), (2, 2)])
def test_that_bands_add_up_to_those_of_a_batch_with_more_dimensions(batch):
    one, other = band_gram(factor_rows(1, (), 5)), band_gram(factor_rows(1, batch, 5))
    torch.testing.assert_close(band_dense(add_bands(one, other)), band_dense(one) + band_dense(other))


def test_that_an_empty_batch_has_empty_answers():
    factor, none = BandedCholesky(band_gram(factor_rows(2, (0,), 6))), torch.zeros(0, 6, dtype=torch.float64)
    assert factor.solve(none).shape == factor.whiten(none).shape == (0, 6)
    assert factor.inverse_bands().shape == (3, 0, 6) and factor.log_determinant().shape == factor.broken.shape == (0,)


@given(st.integers(0, 3), st.sampled_from([torch.nan, torch.inf, -3.0, 0.0]))
def test_that_a_broken_matrix_gives_nan_for_itself_alone(which, value):
    bands, x = band_gram(factor_rows(2, (4,), 6)), normal((4, 6), "x")
    whole = BandedCholesky(bands)
    harmed = bands.clone()
    harmed[0, which, 2] = value
    factor, others = BandedCholesky(harmed), [i for i in range(4) if i != which]
    assert factor.broken.tolist() == [i == which for i in range(4)]
    for answer in ("solve", "whiten"):
        found = getattr(factor, answer)(x)
        assert found[which].isnan().all() and torch.equal(found[others], getattr(whole, answer)(x)[others])
    found = factor.inverse_bands()
    assert found[:, which].isnan().all() and torch.allclose(found[:, others], whole.inverse_bands()[:, others])
    assert factor.log_determinant().isnan().tolist() == [i == which for i in range(4)]


def test_that_a_right_side_that_is_not_finite_spoils_no_other():
    factor, x = BandedCholesky(band_gram(factor_rows(2, (3,), 6))), normal((3, 6), "x")
    harmed = x.clone()
    harmed[1, 4] = torch.nan
    assert torch.equal(factor.solve(harmed)[[0, 2]], factor.solve(x)[[0, 2]])


def test_that_what_is_beyond_the_end_of_a_band_is_not_read():
    bands, x = band_gram(factor_rows(2, (3,), 6)), normal((3, 6), "x")
    beyond = bands.clone()
    beyond[1, :, 5:], beyond[2, :, 4:] = 7.0, 7.0
    assert torch.equal(band_product(beyond, x), band_product(bands, x))
    assert torch.equal(BandedCholesky(beyond).solve(x), BandedCholesky(bands).solve(x))


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_that_blocks_become_bands(steps):
    diagonal, below = normal((3, steps, 2, 2), "diagonal"), normal((3, steps - 1, 2, 2), "below")
    diagonal = diagonal + diagonal.mT
    matrix = torch.zeros(3, steps, 2, steps, 2, dtype=torch.float64)
    for t in range(steps):
        matrix[:, t, :, t] = diagonal[:, t]
    for t in range(steps - 1):
        matrix[:, t + 1, :, t], matrix[:, t, :, t + 1] = below[:, t], below[:, t].mT
    matrix, bands, x = matrix.reshape(3, 2 * steps, 2 * steps), block_bands(diagonal, below), normal((3, 2 * steps), "x")
    torch.testing.assert_close(band_product(bands, x), column(matrix, x))
    torch.testing.assert_close(band_dense(bands[: 2 * steps]), matrix)


@pytest.mark.parametrize("batch", BATCHES)
def test_that_a_gaussian_law_of_windows_is_one(batch):
    bands = band_gram(factor_rows(3, batch, 8))
    A, law = band_dense(bands), GaussianWindow(normal((*batch, 4, 2), "mean"), bands)
    peer = torch.distributions.MultivariateNormal(law.mean.flatten(-2), precision_matrix=A)
    x = normal((5, *batch, 4, 2), "x")
    torch.testing.assert_close(law.log_density(x), peer.log_prob(x.flatten(-2)))
    torch.testing.assert_close(law.deviation.flatten(-2) ** 2, torch.linalg.inv(A).diagonal(0, -2, -1))
    draws = (law.sample(2000, stream(1, "draws")) - law.mean) / law.deviation
    assert draws.shape == (2000, *batch, 4, 2) and abs(draws.mean(0)).max() < 0.12 and abs(draws.std(0) - 1).max() < 0.08


def test_that_two_halves_of_what_is_known_are_the_whole_of_it():
    value, first = normal((3, 6, 2), "value"), torch.rand(3, 6, 2, generator=stream(2)) < 0.5
    one, other = (pointwise(value, 0.5, MASK & part) for part in (first, ~first))
    whole = pointwise(value, 0.5, MASK)
    torch.testing.assert_close((one + other).vector, whole.vector)
    torch.testing.assert_close((one + other).bands, whole.bands)
    x = normal((3, 12), "x")
    torch.testing.assert_close((BLOCKS + one).misfit(x), BLOCKS.misfit(x) + one.misfit(x))
    apart = ((x.unflatten(-1, (6, 2)) - value) / 0.5).square()
    difference = torch.where(MASK, apart - (value / 0.5).square(), 0.0).sum((-2, -1)) / 2
    torch.testing.assert_close(whole.misfit(x), difference)  # all but a constant
    torch.testing.assert_close(whole[[2, 0]].vector, whole.vector[[2, 0]])


def test_that_a_background_is_an_observation_of_the_first_state():
    B, x_b = Covariance([[1.0, 0.4], [0.4, 0.5]]), normal((3, 1, 2), "x_b")
    told = background_information(x_b, B, 6, scale=2.0)
    first = Observations(x_b[:, 0], Select((0, 1), 2), Covariance(2 * B.matrix))
    seen = linearised([first, *[None] * 5], torch.zeros(3, 1, 6, 2, dtype=torch.float64))
    torch.testing.assert_close(told.vector, seen.vector)
    torch.testing.assert_close(band_dense(told.bands), band_dense(seen.bands))


def test_that_information_moves_with_the_units():
    mean, scale, x = normal((12,), "mean"), 0.5 + torch.rand(12, generator=stream(3), dtype=torch.float64), normal((3, 12), "x")
    z = BLOCKS.standardised(mean, scale)
    constant = BLOCKS.misfit(mean.expand(3, 12))
    torch.testing.assert_close(z.misfit(x), BLOCKS.misfit(mean + scale * x) - constant)


@pytest.mark.parametrize("batch", [(), (1,), (3,), (2, 3)])
def test_that_observations_with_correlated_errors_and_gaps_are_written_out(batch):
    H, R = normal((2, 2), "H"), Covariance([[0.4, 0.1], [0.1, 0.2]])
    values = normal((*batch, 2), "values")
    values[..., 1] = torch.where(
        torch.arange(values[..., 1].numel()).reshape(values[..., 1].shape) % 2 == 0, torch.nan, values[..., 1]
    )
    info = linearised([None, Observations(values, Linear(H), R), None], normal((*batch, 1, 3, 2), "x"))
    for y, J, j in zip(values.reshape(-1, 2), band_dense(info.bands).reshape(-1, 6, 6), info.vector.reshape(-1, 6)):
        there = y.isfinite()
        part, weight = H[there], torch.linalg.inv(R.matrix[there][:, there])
        torch.testing.assert_close(J[2:4, 2:4], part.T @ weight @ part)
        torch.testing.assert_close(j[2:4], part.T @ weight @ y[there])
        assert J[:2].count_nonzero() == J[4:].count_nonzero() == 0
    with pytest.raises(ValueError, match="^observations: expected 3 times as the window's, got 1"):
        linearised([None], normal((*batch, 1, 3, 2), "x"))


def dense_law(climate, information):
    """Mean and variance as a textbook has them."""
    prior = torch.linalg.inv(climate.covariance) if climate.covariance is not None else band_dense(climate.precision)
    z = climate.standardised(information)
    covariance = torch.linalg.inv(prior + band_dense(z.bands))
    mean, variance = column(covariance, z.vector), covariance.diagonal(0, -2, -1)
    return climate.mean + climate.scale * mean.unflatten(-1, (6, 2)), climate.scale**2 * variance.unflatten(-1, (6, 2))


@pytest.mark.parametrize("name", CLIMATES)
@pytest.mark.parametrize("known", ["points", "blocks", "background", "nothing", "exact", "vague"])
def test_that_the_law_of_a_climate_is_the_dense_formula(name, known):
    information = {
        "points": SEEN, "blocks": BLOCKS, "nothing": pointwise(WINDOWS[:3], 0.5, torch.zeros_like(MASK)),
        "background": SEEN + background_information(WINDOWS[:3, 0], Covariance([[1.0, 0.4], [0.4, 0.5]]), 6),
        "exact": pointwise(WINDOWS[:3], 1e-4, MASK), "vague": pointwise(WINDOWS[:3], 1e6, MASK),
    }[known]  # fmt: skip
    climate = CLIMATES[name]
    mean, variance = climate.law(information)
    expected = dense_law(climate, information)
    torch.testing.assert_close(mean, expected[0], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(variance, expected[1].expand(3, 6, 2), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", CLIMATES)
def test_that_a_window_interpolated_alone_is_as_in_a_batch(name):
    climate, batch = CLIMATES[name], SEEN + BLOCKS
    whole = climate.law(batch)
    for i in range(3):
        for one, all_ in zip(climate.law(batch[i : i + 1]), whole):
            torch.testing.assert_close(one[0], all_[i])
        for one, all_ in zip(climate.law(Information(batch.bands[:, i], batch.vector[i])), whole):  # no batch at all
            torch.testing.assert_close(one, all_[i])
    none = batch[torch.tensor([], dtype=torch.long)]
    assert [x.shape for x in climate.law(none)] == [(0, 6, 2)] * 2


@pytest.mark.parametrize("name", CLIMATES)
def test_that_information_about_all_windows_alike_broadcasts(name):
    one = Information(BLOCKS.bands[:, :1], BLOCKS.vector)
    each = Information(BLOCKS.bands[:, :1].expand(-1, 3, -1), BLOCKS.vector)
    for a, b in zip(CLIMATES[name].law(one), CLIMATES[name].law(each)):
        torch.testing.assert_close(a, b)


def test_that_bands_without_a_batch_broadcast_in_a_climate_of_an_order():
    one, each = (Information(b, BLOCKS.vector[:2]) for b in (BLOCKS.bands[:, 0], BLOCKS.bands[:, :1].expand(-1, 2, -1)))
    for a, b in zip(CLIMATES["order"].law(one), CLIMATES["order"].law(each)):
        torch.testing.assert_close(a, b)


def test_that_a_law_of_the_highest_order_is_the_full_covariance():
    full, markov = CLIMATES["full"], WindowClimatology.of(WINDOWS, order=5)
    count = len(WINDOWS)  # one divides by N, the other by N − 1
    torch.testing.assert_close(
        torch.linalg.inv(band_dense(markov.precision)), full.covariance * (count - 1) / count, rtol=1e-6, atol=1e-8
    )


def test_that_a_stationary_law_says_the_same_of_every_next_state_whatever_the_length():
    """The density of what comes next depends on the last two states alone, in windows of any length."""
    long, laws = normal((10, 2), "long"), {}
    for steps in (5, 6, 8, 9):
        climate = CLIMATES["second"].on(steps)
        assert climate.mean.shape == (steps, 2)
        laws[steps] = GaussianWindow(torch.zeros(steps, 2, dtype=torch.float64), climate.precision).log_density(long[10 - steps :])
        if steps in (5, 8):
            laws[steps] = GaussianWindow(torch.zeros(steps, 2, dtype=torch.float64), climate.precision).log_density(
                long[9 - steps : 9]
            )
    torch.testing.assert_close(laws[6] - laws[5], laws[9] - laws[8])
    again = CLIMATES["second"].on(9).on(6)
    torch.testing.assert_close(again.precision, CLIMATES["second"].precision)


def test_that_climates_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match=r"^windows: expected three dimensions \(N, T, n\)"):
        WindowClimatology.of(WINDOWS[0])
    with pytest.raises(ValueError, match="^windows: expected more than 12 for a full covariance, got 12"):
        WindowClimatology.of(WINDOWS[:12])
    with pytest.raises(ValueError, match="^windows: expected more than 4 for a law of order 1"):
        WindowClimatology.of(WINDOWS[:4], order=1)
    with pytest.raises(ValueError, match="^windows: expected finite numbers"):
        WindowClimatology.of(torch.where(WINDOWS > 3, torch.nan, WINDOWS))
    with pytest.raises(ValueError, match="^windows: expected numbers that are finite and vary"):
        WindowClimatology.of(torch.ones_like(WINDOWS))
    with pytest.raises(ValueError, match="^order: expected at least 1"):
        WindowClimatology.of(WINDOWS, order=0)
    with pytest.raises(ValueError, match="^covariance: expected either"):
        WindowClimatology(WINDOWS[0], WINDOWS[0].abs() + 1)
    for name in ("full", "order"):
        with pytest.raises(ValueError, match="^steps: expected a stationary climate"):
            CLIMATES[name].on(9)
    with pytest.raises(ValueError, match="^steps: expected more than 4, got 4"):
        CLIMATES["second"].on(4)


def test_that_windows_of_single_precision_make_a_climate():
    mean, _ = WindowClimatology.of(WINDOWS.float()).law(SEEN)
    torch.testing.assert_close(mean.double(), CLIMATES["full"].law(SEEN)[0], rtol=1e-3, atol=1e-4)


def squares(matrix, target):
    """A linear least-squares problem as levenberg_marquardt asks for it."""
    A = matrix.mT @ matrix

    def cost(x, which):
        return (column(matrix[which], x) - target[which]).square().sum(-1) / 2

    def system(x, which):
        away = target[which] - column(matrix[which], x)
        return dense_band(A[which], matrix.shape[-1] - 1), column(matrix[which].mT, away)

    return cost, system


def test_that_elements_that_have_converged_are_not_asked_again():
    matrix, target = normal((3, 4, 4), "matrix") + 2 * eye(4), normal((3, 4), "target")
    exact, asked = torch.linalg.solve(matrix, target), []
    cost, system = squares(matrix, target)

    def watched(x, which):
        asked.append(which.tolist())
        return cost(x, which)

    first = torch.stack((exact[0], exact[1] + 100, exact[2] + 1))
    found = levenberg_marquardt(watched, system, first, tolerance=1e-14)
    torch.testing.assert_close(found.x, exact, rtol=0, atol=1e-6)
    assert found.converged.all() and found.iterations[0] == 1 < found.iterations[1]
    assert asked[0] == [0, 1, 2] and all(0 not in which for which in asked[2:])
    assert [sum(i in which for which in asked) - 1 for i in range(3)] == found.iterations.tolist()


def test_that_a_start_that_is_not_finite_is_set_aside():
    cost, system = squares(normal((3, 4, 4), "matrix") + 2 * eye(4), normal((3, 4), "target"))
    first = torch.zeros(3, 4, dtype=torch.float64)
    clean = levenberg_marquardt(cost, system, first, tolerance=1e-14)
    first[1, 2] = torch.nan
    found = levenberg_marquardt(cost, system, first, tolerance=1e-14)
    assert found.converged.tolist() == [True, False, True] and found.iterations[1] == 0 and found.x[1].isnan().sum() == 1
    torch.testing.assert_close(found.x[[0, 2]], clean.x[[0, 2]])
    assert levenberg_marquardt(cost, system, first * torch.nan).iterations.tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match="^iterations: expected at least 1"):
        levenberg_marquardt(cost, system, first, iterations=0)


@pytest.mark.parametrize("strong", [False, True])
def test_that_nothing_is_worse_than_its_start_and_more_iterations_are_no_worse(strong):
    first, present = 5 * normal((12, 6, 2), "first"), torch.rand(12, 6, 2, generator=stream(4)) < 0.5
    info, way = pointwise(normal((12, 6, 2), "value"), 0.1, present), method(strong=strong)
    x = [first[:, 0]]
    for t in range(1, 6):
        x.append(WAVE.step(x[-1]) if strong else first[:, t])
    x = torch.stack(x, 1)
    before = way.covariance.squared_norm(x[:, 0] - way.mean) / 2 + info.misfit(x.flatten(1))
    if not strong:
        before = before + way.model_error.squared_norm(x[:, 1:] - WAVE.step(x[:, :-1])).sum(-1) / 2
    for iterations in (1, 2, 5, 50):
        found = method(strong=strong, iterations=iterations).minimise(first, info)[1]
        assert (found.cost <= before + 1e-9).all() and (found.iterations <= iterations).all()
        before = found.cost
    assert found.converged.all()


def test_that_what_is_stuck_on_a_slope_has_not_converged():
    wall = torch.tensor(torch.inf, dtype=torch.float64)

    def cost(x, which):
        return torch.where(x[:, 0] >= 2, x[:, 0] ** 2 / 2, wall)

    found = levenberg_marquardt(cost, lambda x, which: (torch.ones_like(x)[None], -x), torch.full((1, 1), 2.0, dtype=torch.float64))
    assert found.x.item() == 2 and not found.converged.any()


def test_that_4d_var_of_a_linear_model_is_the_exact_smoother_and_needs_few_iterations():
    linear = method(FunctionModel(lambda s: s @ TURN.T, 2))
    info = SEEN + BLOCKS
    law, minimum = linear.minimise(torch.zeros(3, 6, 2, dtype=torch.float64), info)
    F = eye(12) - torch.block_diag(torch.zeros(2, 0), *5 * [TURN], torch.zeros(0, 2))
    rigid = torch.block_diag(linear.covariance.inverse, *5 * [linear.model_error.inverse])
    A = F.T @ rigid @ F + band_dense(info.bands)
    torch.testing.assert_close(band_dense(law.precision), A)
    torch.testing.assert_close(law.mean.flatten(1), torch.linalg.solve(A, info.vector), rtol=0, atol=1e-6)
    torch.testing.assert_close(law.variance.flatten(1), torch.linalg.inv(A).diagonal(0, -2, -1))
    assert minimum.converged.all() and minimum.iterations.max() <= 5


def test_that_strong_4d_var_of_a_linear_model_is_exact_too():
    linear = method(FunctionModel(lambda s: s @ TURN.T, 2), strong=True)
    law, _ = linear.minimise(torch.zeros(3, 6, 2, dtype=torch.float64), SEEN + BLOCKS)
    path = torch.cat([torch.linalg.matrix_power(TURN, t) for t in range(6)])
    info = SEEN + BLOCKS
    A = linear.covariance.inverse + path.T @ band_dense(info.bands) @ path
    torch.testing.assert_close(
        law.mean.flatten(1), column(path, torch.linalg.solve(A, column(path.T, info.vector))), rtol=0, atol=1e-6
    )
    torch.testing.assert_close(law.variance.flatten(1), (path @ torch.linalg.inv(A) @ path.T).diagonal(0, -2, -1))


@pytest.mark.parametrize("strong", [False, True])
@pytest.mark.parametrize("batch", [(), (1,), (3,), (2, 1, 3)])
def test_that_a_window_analysed_alone_is_as_in_a_batch(strong, batch):
    count = max(1, torch.Size(batch).numel())
    first, value = normal((count, 6, 2), "first"), normal((count, 6, 2), "value")
    present = torch.rand(count, 6, 2, generator=stream(5)) < torch.linspace(0, 1, count)[:, None, None]  # from none to all
    info = pointwise(value, 0.3, present)
    shaped = Information(info.bands.reshape(1, *batch, 12), info.vector.reshape(*batch, 12))
    law, minimum = method(strong=strong).minimise(first.reshape(*batch, 6, 2).mT.contiguous().mT, shaped)
    assert law.mean.shape == law.variance.shape == (*batch, 6, 2) and minimum.converged.shape == (count,)
    for i in range(count):
        alone, one = method(strong=strong).minimise(first[i : i + 1], info[i : i + 1])
        torch.testing.assert_close(alone.mean[0], law.mean.reshape(-1, 6, 2)[i], rtol=0, atol=1e-9)
        torch.testing.assert_close(alone.variance[0], law.variance.reshape(-1, 6, 2)[i])
        assert one.iterations[0] == minimum.iterations[i]


def test_that_no_windows_at_all_are_no_error():
    none = torch.zeros(0, 6, 2, dtype=torch.float64)
    assert method().minimise(none, pointwise(none, 1.0, none.bool()))[0].mean.shape == (0, 6, 2)


def test_that_information_without_a_batch_is_about_all_windows():
    one = Information(SEEN.bands[:, 0], SEEN.vector[0])
    law, _ = method().minimise(normal((3, 6, 2), "first"), one)
    torch.testing.assert_close(law.mean[0], method().minimise(normal((3, 6, 2), "first")[:1], SEEN[:1])[0].mean[0])


def test_that_a_first_guess_may_be_of_single_precision():
    first = normal((3, 6, 2), "first")
    torch.testing.assert_close(
        method().minimise(first.float(), SEEN)[0].mean.double(), method().minimise(first, SEEN)[0].mean, rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("strong", [False, True])
def test_that_the_answer_does_not_depend_on_where_zero_is(strong):
    stay, far = FunctionModel(lambda s: s, 2), 1e5
    value, present = normal((3, 6, 2), "value"), MASK
    near, _ = method(stay, strong, tolerance=1e-6).minimise(torch.full((3, 6, 2), 3.0).double(), pointwise(value, 0.01, present))
    there = method(stay, strong, mean=torch.full((2,), far).double(), tolerance=1e-6)
    moved, _ = there.minimise(torch.full((3, 6, 2), far + 3.0).double(), pointwise(value + far, 0.01, present))
    assert ((moved.mean - far - near.mean).abs() < 0.01 * near.deviation).all()


def test_that_a_window_of_one_state_is_the_kalman_analysis():
    x, present = normal((4, 1, 2), "x"), torch.ones(4, 1, 2, dtype=torch.bool)
    law, _ = method().minimise(torch.zeros_like(x), pointwise(x, 0.5, present))
    A = method().covariance.inverse + 4 * eye(2)
    torch.testing.assert_close(law.mean[:, 0], column(torch.linalg.inv(A), 4 * x[:, 0]))
    torch.testing.assert_close(law.variance[:, 0], torch.linalg.inv(A).diagonal().expand(4, 2))
    torch.testing.assert_close(band_dense(law.precision), A.expand(4, 2, 2))


@pytest.mark.parametrize("strong", [False, True])
def test_that_a_window_with_numbers_that_are_not_finite_stays_alone(strong):
    first, clean = normal((3, 6, 2), "first"), method(strong=strong).minimise(normal((3, 6, 2), "first"), SEEN)[0]
    harmed = first.clone()
    harmed[1] = torch.nan
    law, minimum = method(strong=strong).minimise(harmed, SEEN)
    torch.testing.assert_close(law.mean[[0, 2]], clean.mean[[0, 2]])
    torch.testing.assert_close(law.variance[[0, 2]], clean.variance[[0, 2]])
    assert minimum.converged.tolist() == [True, False, True] and law.mean[1].isnan().any()
    bands = SEEN.bands.clone()
    bands[0, 1, 3] = torch.nan
    law, minimum = method(strong=strong).minimise(first, Information(bands, SEEN.vector))
    torch.testing.assert_close(law.variance[[0, 2]], clean.variance[[0, 2]])
    assert not minimum.converged[1] and law.variance[1].isnan().any()


def curved(value, deviation=0.1):
    """What the product of both variables, seen at all times, says around windows."""
    network = ObservingNetwork(Nonlinear(lambda s: s[..., :1] * s[..., 1:] + s[..., :1], 1), DiagonalCovariance([deviation**2]))
    seen = [network.report(network.operator(value[:, t])) for t in range(value.shape[1])]

    def known(x):
        info = linearised(seen, x.unsqueeze(1))
        return Information(info.bands.squeeze(2), info.vector.squeeze(1))

    return known, network


def test_that_nonlinear_observations_lead_to_a_stationary_point_of_their_own_cost():
    truth = 1 + 0.1 * normal((3, 6, 2), "truth")
    known, network = curved(truth)
    weak = method()
    law, minimum = weak.minimise(truth + 0.1 * normal((3, 6, 2), "away"), known)
    x = law.mean.clone().requires_grad_()
    jump = x[:, 1:] - WAVE.step(x[:, :-1])
    cost = (x[:, 0] @ weak.covariance.inverse * x[:, 0]).sum() + (jump @ weak.model_error.inverse * jump).sum()
    cost = cost + ((network.operator(x) - network.operator(truth)) / 0.1).square().sum()
    slope = torch.autograd.grad(cost / 2, x)[0]
    assert minimum.converged.all() and ((slope * law.deviation).abs() < 0.02).all()  # in units of what one deviation costs


def test_that_a_window_seen_nonlinearly_alone_is_as_in_a_batch():
    truth = 1 + 0.1 * normal((3, 6, 2), "truth")
    first = truth + torch.tensor([1e-3, 0.1, 0.5])[:, None, None] * normal((3, 6, 2), "away")
    tight = method(tolerance=1e-15)  # a promise of 1e-12 would leave a distance of up to 1e-6 open
    whole = tight.minimise(first, curved(truth)[0])
    for i in range(3):
        one = tight.minimise(first[i : i + 1], curved(truth[i : i + 1])[0])
        assert one[1].iterations[0] == whole[1].iterations[i]
        torch.testing.assert_close(one[0].mean[0], whole[0].mean[i], rtol=0, atol=1e-9)


def test_that_gradients_and_inference_mode_do_not_matter_to_a_minimisation():
    first, expected = normal((3, 6, 2), "first"), method().minimise(normal((3, 6, 2), "first"), SEEN)[0]
    tracked = method().minimise(first.clone().requires_grad_(), Information(SEEN.bands, SEEN.vector.clone().requires_grad_()))[0]
    with torch.inference_mode():
        inside = method().minimise(first, SEEN)[0]
        torch.testing.assert_close(inside.variance, expected.variance)
    torch.testing.assert_close(tracked.mean.detach(), expected.mean)
    single = Information(SEEN.bands.float(), SEEN.vector.float())
    torch.testing.assert_close(method().minimise(first, single)[0].mean, expected.mean, rtol=1e-4, atol=1e-5)


def small_experiment(**changes):
    network = ObservingNetwork(Select((0,), 3), DiagonalCovariance([0.2]))
    experiment = TwinExperiment(
        "small", Lorenz63(dt=0.05), Lorenz63(dt=0.05), network, interval=1, cycles=5, start=(0.0, 0.0, 25.0), start_variance=100.0,
        spin_up=0, nature_error=AdditiveModelError(0.05),
    )  # fmt: skip
    return replace(experiment, **changes)


def test_that_windows_are_drawn_as_nature_runs_and_four_dvar_takes_their_law():
    experiment = small_experiment()
    windows = draw_windows(experiment, 300, stream(1, "windows"))
    assert windows.shape == (300, 6, 3) and torch.equal(windows, draw_windows(experiment, 300, stream(1, "windows")))
    still = draw_windows(small_experiment(nature_error=AdditiveModelError(0.0), interval=2), 4, stream(1, "windows"))
    torch.testing.assert_close(still[:, 1:], Lorenz63(dt=0.05).step(Lorenz63(dt=0.05).step(still[:, :-1])))
    weak = window_four_dvar(experiment, windows)
    torch.testing.assert_close(weak.mean, windows[:, 0].mean(0))
    torch.testing.assert_close(weak.covariance.matrix, torch.cov(windows[:, 0].T))
    torch.testing.assert_close(weak.model_error.variances, torch.full((3,), 0.05, dtype=torch.float64))
    assert window_four_dvar(experiment, windows, strong=True).model_error is None
    with pytest.raises(ValueError, match="^strong: expected True"):
        window_four_dvar(small_experiment(nature_error=AdditiveModelError(0.0)), windows)
    with pytest.raises(ValueError, match="^experiment: expected a nature with"):
        draw_windows(small_experiment(resolve=lambda s: s), 2, stream(1))
    assert normalised_mse(windows + 2, windows, torch.full((6, 3), 2.0)).allclose(torch.ones(300, dtype=torch.float64))
