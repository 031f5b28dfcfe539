"""Data steps of PnP-DA that know how wrong the denoiser is."""

import math
from dataclasses import dataclass, replace

import pytest
import torch

from pnpda_nb.core import Grid, Homogeneous, gaspari_cohn, standard_normal, stream
from pnpda_nb.core.checks import unchecked
from pnpda_nb.core.grid import _taper
from pnpda_nb.flow_matching import Estimate, FlowDenoiser, FlowPrior, GaussianPrior, VelocityMLP
from pnpda_nb.methods import method_by_name
from pnpda_nb.observing import (
    Covariance,
    DenseError,
    DiagonalCovariance,
    ErrorCovariance,
    FactoredError,
    Interpolate,
    Linear,
    Nonlinear,
    Observations,
    ObservingNetwork,
    Select,
    kalman_update,
)
from pnpda_nb.observing.update import kalman_pull
from pnpda_nb.pnp import (
    EnsembleResidual,
    GaussianResidual,
    PnPDA,
    PnPDA4D,
    ResidualCovariance,
    Residuals,
    convergence,
    residual_covariance,
)
from pnpda_nb.twin import cycle, lorenz63

DIM, SEEN = 6, (0, 2, 5)
ROOT = standard_normal((DIM, DIM), stream(1, "root"))
B = ROOT @ ROOT.T / DIM + 0.2 * torch.eye(DIM, dtype=torch.float64)
PRIOR = GaussianPrior(0.9 * torch.eye(DIM, dtype=torch.float64), standard_normal((DIM,), stream(1, "offset")), Covariance(B))
SELECT, RANDOM = Select(SEEN, DIM), Linear(standard_normal((3, DIM), stream(1, "H")))
DIAGONAL, FULL = DiagonalCovariance([0.5, 1.0, 2.0]), Covariance([[1.0, 0.3, 0.0], [0.3, 1.0, 0.2], [0.0, 0.2, 0.7]])
X = standard_normal((4, 2, DIM), stream(1, "x"))
BENT = Nonlinear(lambda s: s[..., :3].square() / 2 + s[..., 3:], 3)
OPERATORS = {"select": SELECT, "linear": RANDOM, "nonlinear": BENT}


def values(missing: bool):
    y = standard_normal((4, 3), stream(1, "y"))
    if missing:
        y[0, 1] = y[2, 0] = y[2, 2] = torch.nan
        y[3] = torch.nan
    return y


def by_hand(x, y, operator, R, matrix):
    """The Kalman update, one state after the other and with the present observations alone."""
    out = torch.empty_like(x)
    for run in range(x.shape[0]):
        for member in range(x.shape[1]):
            here, one = ~y[run].isnan(), x[run, member]
            H = operator.jacobian(one)[here]
            S = H @ matrix[run, member] @ H.T + R.matrix[here][:, here]
            innovation = (y[run] - operator(one))[here]
            out[run, member] = one + matrix[run, member] @ H.T @ torch.linalg.solve(S, innovation)
    return out


def analyse(method, seen, background=X, seed=2):
    return method.analyse(background, seen, forecast=None, generator=stream(seed, "pnp"))


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("R", [DIAGONAL, FULL], ids=["diagonal", "full"])
@pytest.mark.parametrize("operator", OPERATORS)
def test_that_every_form_of_a_covariance_gives_the_kalman_update(operator, R, missing):
    y, operator = values(missing), OPERATORS[operator]
    seen = ObservingNetwork(operator, R).report(y)
    L, d = standard_normal((4, 2, DIM, 2), stream(1, "L")), standard_normal((4, 2, DIM), stream(1, "d")).square()
    shapes = {"common": (slice(0, 1), slice(0, 1)), "per run": (slice(None), slice(0, 1)), "per state": (slice(None), slice(None))}
    for which in shapes.values():
        factor, e = L[which], d[which]
        matrix = factor @ factor.mT + torch.diag_embed(e)
        exact = by_hand(X, y, operator, R, matrix.expand(4, 2, DIM, DIM))
        for error in (DenseError(matrix), FactoredError(factor, e)):
            assert isinstance(error, ErrorCovariance)
            assert torch.allclose(kalman_update(error, X, seen), exact, atol=1e-10)
    common = L[0, 0] @ L[0, 0].T
    exact = by_hand(X, y, operator, R, common.expand(4, 2, DIM, DIM))
    assert torch.allclose(kalman_update(FactoredError(L[0, 0]), X, seen), exact, atol=1e-10)
    assert torch.allclose(kalman_update(DenseError(common), X, seen), exact, atol=1e-10)
    eye = 0.7 * torch.eye(DIM, dtype=torch.float64).expand(4, 2, DIM, DIM)
    assert torch.allclose(kalman_update(FactoredError(diagonal=0.7), X, seen), by_hand(X, y, operator, R, eye), atol=1e-10)


@pytest.mark.parametrize("error", [DenseError(B), FactoredError(ROOT[:, :2], B.diagonal())])
@pytest.mark.parametrize("R", [DIAGONAL, FULL], ids=["diagonal", "full"])
def test_that_nothing_seen_changes_nothing_and_a_broken_state_harms_no_other(error, R):
    nothing = ObservingNetwork(Select((), DIM), DiagonalCovariance(torch.zeros(0))).report(torch.zeros(4, 0, dtype=torch.float64))
    assert torch.equal(kalman_update(error, X, nothing), X)
    broken, seen = X.clone(), ObservingNetwork(BENT, R).report(values(False))
    broken[1, 0] = torch.nan
    a, b = kalman_update(error, X, seen), kalman_update(error, broken, seen)
    assert not torch.isfinite(b[1, 0]).all()
    a[1, 0] = b[1, 0] = 0
    assert torch.equal(a, b)


@pytest.mark.parametrize("R", [DIAGONAL, FULL], ids=["diagonal", "full"])
@pytest.mark.parametrize("operator", ["select", "linear"])
def test_that_one_kalman_iteration_is_the_posterior_mean_of_a_gaussian_prior(operator, R):
    y = values(True)
    seen = ObservingNetwork(OPERATORS[operator], R).report(y)
    exact = by_hand(PRIOR.mean(X), y, OPERATORS[operator], R, B.expand(4, 2, DIM, DIM))
    assert torch.allclose(analyse(PnPDA(PRIOR, 1, data_step="kalman"), seen), exact, atol=1e-10)
    for step in ("gradient", "prox"):
        assert (analyse(PnPDA(PRIOR, 1, data_step=step), seen) - exact).abs().max() > 0.1


class Quiet(GaussianPrior):
    """Without its noise, which leaves the expectation of what an affine method does."""

    def source(self, shape, generator):
        return torch.zeros(shape, dtype=torch.float64)


def test_that_kalman_iterations_stay_at_the_posterior_mean_but_for_their_noise():
    quiet = Quiet(PRIOR.matrix, PRIOR.offset, PRIOR.covariance)
    seen = ObservingNetwork(RANDOM, FULL).report(values(False))
    exact = analyse(PnPDA(PRIOR, 1, data_step="kalman"), seen)
    for n in (2, 7, 50):
        assert torch.allclose(analyse(PnPDA(quiet, n, data_step="kalman"), seen), exact, atol=1e-8)
    wrong = PnPDA(quiet, 7, data_step="kalman", residuals=ResidualCovariance((0.0,), (DenseError(B),)))
    assert (analyse(wrong, seen) - exact).abs().max() > 1e-3  # B has to shrink


@pytest.mark.parametrize("rule", ["paper", "scaled", "lipschitz"])
@pytest.mark.parametrize("missing", [False, True])
def test_that_a_short_proximal_step_is_a_gradient_step_and_a_long_one_obeys_the_observations(rule, missing):
    seen = ObservingNetwork(SELECT, Covariance(1e6 * FULL.matrix)).report(values(missing))
    quiet = Quiet(PRIOR.matrix, PRIOR.offset, PRIOR.covariance)
    method = PnPDA(quiet, 4, alpha=0.0, step_rule=rule, data_step="prox")
    misfit = method.misfit(X, seen)
    if rule == "paper":  # errors of a million make a step of one short
        short = method.towards(Estimate(X), misfit, 1.0, 0.5) - X
        assert torch.allclose(short, -misfit.gradient(X), rtol=1e-4, atol=1e-12)
    long = method.towards(Estimate(X), misfit, 1e14, 0.5)
    assert seen.innovation(long).abs().max() < 1e-5
    assert torch.isfinite(analyse(method, seen)).all()


def test_that_no_proximal_step_is_too_long_where_the_gradient_explodes():
    seen = ObservingNetwork(SELECT, DiagonalCovariance([1e-3] * 3)).report(values(False))
    explodes, holds = (PnPDA(PRIOR, 60, step_rule="paper", data_step=step) for step in ("gradient", "prox"))
    assert not analyse(explodes, seen).abs().max() < 1e6 and analyse(holds, seen).abs().max() < 20


@pytest.mark.parametrize("step", ["kalman", "prox"])
def test_that_the_answer_is_the_last_iterate_and_one_more_data_step(step):
    seen = ObservingNetwork(SELECT, FULL).report(values(True))
    method = PnPDA(PRIOR, 5, data_step=step)
    last = list(method.iterates(X, seen, stream(2, "pnp")))[-1]
    misfit = method.misfit(X, seen)
    length = misfit.step_size(method.step_rule)
    assert torch.equal(analyse(method, seen), method.towards(Estimate(last), misfit, length, 1.0))
    if step == "kalman":
        assert torch.allclose(analyse(method, seen), kalman_update(GaussianResidual(PRIOR).at(0.8, X), last, seen))
    alone = PnPDA(PRIOR, 5)
    assert torch.equal(analyse(alone, seen), list(alone.iterates(X, seen, stream(2, "pnp")))[-1])


PAIRS = standard_normal((6000, DIM), stream(3, "background"))
ANALYSES = PRIOR.mean(PAIRS) + PRIOR.covariance.draw((6000,), stream(3, "analysis"))
TAUS = (0.0, 0.4, 0.8)


def measured(pairs=6000, **settings):
    return residual_covariance(PRIOR, PAIRS[:pairs], ANALYSES[:pairs], TAUS, stream(3, "noise"), **settings)


def test_that_measured_residuals_are_those_of_theory():
    found = measured()
    assert isinstance(found, Residuals) and found.taus == TAUS
    for tau, error in zip(TAUS, found.errors):
        exact = GaussianResidual(PRIOR).at(tau, X).matrix
        assert (error.matrix - exact).norm() < 0.06 * exact.norm()
    cut = measured(rank=2)
    for dense, error in zip(found.errors, cut.errors):
        matrix = error.factor @ error.factor.T + torch.diag(error.diagonal)
        assert error.factor.shape == (DIM, 2) and (error.diagonal > 0).all()
        assert torch.allclose(matrix.diagonal(), dense.matrix.diagonal(), rtol=1e-6)
        units = dense.matrix.diagonal().sqrt()[:, None]
        top = torch.linalg.eigh(dense.matrix / units / units.T).eigenvectors[:, -2:]
        assert torch.allclose(
            top @ top.T @ (error.factor / units), error.factor / units, atol=1e-6
        )  # the leading ones of the correlations


@pytest.mark.parametrize(
    "settings", [{}, {"half_width": 1.5}, {"half_width": 4.0}, {"half_width": 1.5, "distance": "line"}, {"rank": 1}, {"rank": DIM}]
)
def test_that_covariances_from_few_pairs_are_positive_definite(settings):
    for error in measured(3, **settings).errors:
        matrix = error.matrix if isinstance(error, DenseError) else error.factor @ error.factor.T + torch.diag(error.diagonal)
        assert torch.equal(matrix, matrix.T) or torch.allclose(matrix, matrix.T, rtol=1e-12)
        assert torch.linalg.eigvalsh(matrix)[0] > 0
    if "half_width" in settings and settings["half_width"] < 2:
        assert matrix[0, 3] == 0 and (matrix[0, 5] == 0) == ("distance" in settings)


def test_that_a_pseudo_time_takes_the_covariance_of_the_nearest_not_above():
    found = measured(50)
    for tau, index in ((0.0, 0), (0.39, 0), (0.4, 1), (2 * 0.2, 1), (0.1 + 0.3, 1), (0.79, 1), (0.8, 2), (0.99, 2)):
        assert found.at(tau, X) is found.errors[index]


def test_that_members_spread_is_the_covariance_of_the_members():
    members = standard_normal((3, 5, DIM), stream(4, "members"))
    seen = ObservingNetwork(SELECT, DIAGONAL).report(values(False)[:3])
    sample = torch.stack([torch.cov(m.T) for m in members]).unsqueeze(1)
    for factor in (1.0, 1.5):
        moved = kalman_update(EnsembleResidual(inflation=factor).at(0.0, members), members, seen)
        assert torch.allclose(moved, kalman_update(DenseError(factor**2 * sample), members, seen))
    local = EnsembleResidual(half_width=1.0, distance="line").at(0.0, members).matrix
    assert (local[..., 0, 2:] == 0).all() and torch.allclose(local.diagonal(dim1=-2, dim2=-1), sample.diagonal(dim1=-2, dim2=-1))
    late, early = (EnsembleResidual(source=0.5).at(t, members).factor.square().sum() for t in (0.9, 0.1))
    assert 0 < late < early
    for wrong in (members[:, :1], members[:, :1].expand(3, 5, DIM)):
        with pytest.raises(ValueError, match="^members: EnsembleResidual needs"):
            EnsembleResidual().at(0.0, wrong)


@dataclass(frozen=True)
class Predicted:
    """A stand-in for a network that predicts a factor from the background."""

    def at(self, tau, background):
        return FactoredError((1 - tau) * torch.stack((background.sin(), background.cos()), -1), 0.1)


def test_that_a_covariance_that_depends_on_the_state_can_take_its_place():
    seen = ObservingNetwork(SELECT, DIAGONAL).report(values(True))
    a = analyse(PnPDA(PRIOR, 3, data_step="kalman", residuals=Predicted()), seen)
    assert torch.isfinite(a).all() and a.shape == X.shape
    one = PnPDA(PRIOR, 1, data_step="kalman", residuals=Predicted())
    L = torch.stack((X.sin(), X.cos()), -1)
    matrix = L @ L.mT + 0.1 * torch.eye(DIM)
    assert torch.allclose(analyse(one, seen), by_hand(PRIOR.mean(X), values(True), SELECT, DIAGONAL, matrix))
    mean = analyse(replace(one, ensemble=3, iterations=4), seen)
    assert mean.shape == X.shape


class Centred(GaussianPrior):
    """A Gaussian law of increments, whose flow starts around the background."""

    def __call__(self, background):
        inner = super().__call__(torch.zeros_like(background))
        return FlowDenoiser(background, lambda x, tau: inner.velocity(x - background, tau), self.source, background)


@pytest.mark.parametrize("step", ["gradient", "kalman", "prox"])
def test_that_a_centred_source_is_blended_with_its_centre(step):
    law, one = (PRIOR.matrix, PRIOR.offset, PRIOR.covariance), X[:, :1]
    network = ObservingNetwork(SELECT, FULL)
    moved = analyse(PnPDA(Centred(*law), 6, data_step=step), network.report(values(False)), one)
    shifted = network.report(values(False) - SELECT(one[:, 0]))
    still = analyse(PnPDA(PRIOR, 6, data_step=step), shifted, torch.zeros_like(one))
    assert torch.allclose(moved, one + still, atol=1e-10)
    pairs = residual_covariance(Centred(*law), PAIRS[:9], PAIRS[:9] + ANALYSES[:9], TAUS, stream(3))
    alone = residual_covariance(PRIOR, 0 * PAIRS[:9], ANALYSES[:9], TAUS, stream(3))
    assert all(torch.allclose(x.matrix, y.matrix) for x, y in zip(pairs.errors, alone.errors))
    rest = convergence(PnPDA(Centred(*law), 6, data_step=step), one, network.report(values(False)), generator=stream(2, "pnp"))
    plain = convergence(PnPDA(PRIOR, 6, data_step=step), torch.zeros_like(one), shifted, generator=stream(2, "pnp"))
    assert all(abs(rest[name] - plain[name]).max() < 1e-9 for name in ("misfit", "change", "residual"))


class Bare(GaussianPrior):
    """A prior whose denoisers answer with no more than a state."""

    def __call__(self, background):
        class Answers(FlowDenoiser):
            def __call__(self, x, tau):
                return background

        return Answers(background, lambda x, tau: x, self.source)


@pytest.mark.parametrize("draws", [1, 2])
def test_that_an_answer_without_a_covariance_is_said_to_have_none(draws):
    seen, law = ObservingNetwork(SELECT, FULL).report(values(False)), (PRIOR.matrix, PRIOR.offset, PRIOR.covariance)
    with pytest.raises(ValueError, match="^denoiser: expected an Estimate as its answer, got Tensor"):
        analyse(PnPDA(Bare(*law), 3, draws=draws), seen)
    zeros, ones = torch.zeros(DIM, dtype=torch.float64), torch.ones(DIM, dtype=torch.float64)
    network = VelocityMLP(DIM, (4,), 4, stream(0))
    method = PnPDA(FlowPrior(network, zeros, ones, {"dim": DIM, "hidden": [4], "features": 4}), 3, draws=draws)
    assert torch.isfinite(analyse(method, seen)).all()
    with pytest.raises(ValueError, match="^residuals: expected a covariance for data_step 'kalman'"):
        analyse(replace(method, data_step="kalman"), seen)


class Sees(GaussianPrior):
    """A prior whose mean is what was observed."""

    def seeing(self, observations):
        return GaussianPrior(0 * self.matrix, observations.values.mean() + self.offset, self.covariance)


def test_that_a_prior_that_must_see_the_observations_is_shown_them():
    seen = ObservingNetwork(SELECT, FULL).report(values(False))
    looks, told = Sees(PRIOR.matrix, PRIOR.offset, PRIOR.covariance), None
    told = looks.seeing(seen)
    for step in ("gradient", "kalman", "prox"):
        a, b = (PnPDA(p, 4, data_step=step) for p in (looks, told))
        assert torch.equal(analyse(a, seen), analyse(b, seen))
        paths = (torch.stack(list(m.iterates(X, seen, stream(1)))) for m in (a, b))
        assert torch.equal(*paths)
    assert not torch.allclose(analyse(PnPDA(looks, 4), seen), analyse(PnPDA(PRIOR, 4), seen))
    assert convergence(PnPDA(looks, 4), X, seen, generator=stream(1)).equals(
        convergence(PnPDA(told, 4), X, seen, generator=stream(1))
    )


def test_that_methods_with_data_steps_are_made_by_name_and_cycle():
    experiment = lorenz63(cycles=3)
    for step in ("gradient", "kalman", "prox"):
        method = method_by_name("pnpda", experiment, iterations=3, data_step=step)
        a, b = (cycle(experiment, method, runs=runs, seed=1).analysis.values for runs in (3, 2))
        assert math.isfinite(abs(a).max()) and abs(a[:2] - b).max() < 1e-9
    with pytest.raises(ValueError, match="data_step"):
        method_by_name("pnpda4d", experiment, data_step="kalman")


@pytest.mark.parametrize(
    "settings, name",
    [
        ({"data_step": "newton"}, "data_step"),
        ({"data_step": "kalman", "residuals": torch.eye(3)}, "residuals"),
        ({"data_step": "kalman", "prior": object()}, "prior"),
    ],
)
def test_that_settings_that_do_not_fit_are_named(settings, name):
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        PnPDA(**{"prior": PRIOR} | settings)
    with pytest.raises(TypeError):
        PnPDA4D(PRIOR, data_step="kalman")


def test_that_residuals_that_do_not_fit_are_named():
    for settings, name in (
        ({"rank": 0}, "rank"),
        ({"rank": 2, "half_width": 2.0}, "rank, half_width"),
        ({"half_width": -1.0}, "half_width"),
    ):
        with pytest.raises(ValueError, match=f"^{name}: expected"):
            measured(9, **settings)
    for taus in ((), (0.1, 0.5), (0.0, 0.0), (0.0, 1.0)):
        with pytest.raises(ValueError, match="^taus: expected"):
            residual_covariance(PRIOR, PAIRS, ANALYSES, taus, stream(1))
    with pytest.raises(ValueError, match="^background, analysis: expected"):
        residual_covariance(PRIOR, PAIRS, ANALYSES[:5], TAUS, stream(1))
    with pytest.raises(ValueError, match="^background: expected finite"):
        residual_covariance(PRIOR, PAIRS / 0, ANALYSES, TAUS, stream(1))
    with pytest.raises(ValueError, match="^errors: expected 2"):
        ResidualCovariance((0.0, 0.5), (DenseError(B),))
    for wrong in ({"half_width": 0.0}, {"inflation": 0.0}):
        with pytest.raises(ValueError, match=f"^{next(iter(wrong))}: expected"):
            EnsembleResidual(**wrong)


@pytest.mark.parametrize("tau", [0.0, 0.6])
def test_that_the_members_of_a_field_have_the_covariance_that_is_not_written_down(tau):
    plane, source = Grid((26, 40), "circular"), 0.7
    members = Homogeneous(plane, lambda apart: gaspari_cohn(apart, 4.0)).draw((2, 5), stream(20))
    found = EnsembleResidual(4.0, 1.1, plane, source).at(tau, members)
    A = 1.1 / 2 * (members - members.mean(1, keepdim=True))
    B, known = A.mT @ A * _taper(plane.dim, 4.0, plane), (tau / (1 - tau) / source) ** 2
    exact = torch.linalg.solve(torch.eye(plane.dim, dtype=torch.float64) + known * B, B)
    exact = DenseError(((exact + exact.mT) / 2).unsqueeze(1))
    torch.testing.assert_close(found.multiply(members[..., None, :]), exact.multiply(members[..., None, :]), rtol=0, atol=1e-8)
    sites, near = torch.tensor([3, 700, 701, 41]), torch.tensor([1, 700, 2])
    torch.testing.assert_close(found.between(near, sites), exact.between(near, sites), rtol=0, atol=1e-8)
    select, y = Select(tuple(sites.tolist()), plane.dim), standard_normal((2, 4), stream(21))
    y[0, 1] = torch.nan
    for R in (DiagonalCovariance([0.1, 0.2, 0.3, 1.0]), Covariance(0.1 * torch.eye(4) + 0.2)):
        seen = ObservingNetwork(select, R).report(y)
        torch.testing.assert_close(kalman_update(found, members, seen), kalman_update(exact, members, seen), rtol=0, atol=1e-8)
        pulls = (kalman_pull(error, members, seen, members + 1, 0.5) for error in (found, exact))
        torch.testing.assert_close(*pulls, rtol=0, atol=1e-7)
    lost = members.clone()
    lost[0, 0] = torch.nan
    with unchecked():
        moved = kalman_update(EnsembleResidual(4.0, 1.1, plane, source).at(tau, lost), lost, seen)
    assert torch.isnan(moved[0]).all() and torch.isfinite(moved[1]).all()


@pytest.mark.parametrize("gaps", [False, True])
def test_that_stations_between_points_are_a_matrix_that_is_not_written_down(gaps):
    """The sparse path against the dense one, for the same operator as a matrix; some stations stand at one place."""
    dim, size, g = 12, 5, stream(7, "stations")
    points = torch.randint(0, dim, (size, 3), generator=g)
    points[4] = points[3]
    weights = torch.rand(size, 3, generator=g, dtype=torch.float64)
    sparse = Interpolate(points, weights, dim)
    dense = Linear(sparse.jacobian(torch.zeros(dim, dtype=torch.float64)))
    values = standard_normal((4, size), g)
    if gaps:
        values[1, 2] = values[2, 0] = values[2, 4] = torch.nan
    errors = DiagonalCovariance(torch.rand(size, generator=g, dtype=torch.float64) + 0.1)
    error = FactoredError(standard_normal((dim, 3), g), torch.rand(dim, generator=g, dtype=torch.float64))
    x = standard_normal((4, 2, dim), g)
    one, other = (kalman_update(error, x, Observations(values, operator, errors)) for operator in (sparse, dense))
    assert torch.allclose(one, other, atol=1e-12)
