"""Priors that see the observations: what they are shown, what they leave open, and what is written to disk."""

from dataclasses import replace

import pytest
import torch

from pnpda_nb.classical import EnKF, ThreeDVar
from pnpda_nb.core import Grid, gaspari_cohn_matrix, standard_normal, stream
from pnpda_nb.core.grid import _taper
from pnpda_nb.core.spectral import Spectral
from pnpda_nb.learned import AmortisedAnalysis, AnalysisPrior, BlindPrior, LearnedMean, SeeingPrior
from pnpda_nb.learned.methods import ENSEMBLE_FIELDS, ensemble_fields
from pnpda_nb.observing import (
    Covariance,
    DenseError,
    DiagonalCovariance,
    GridObservations,
    Linear,
    Observations,
    ObservingNetwork,
    Residual,
    Select,
    kalman_update,
    on_grid,
)
from pnpda_nb.observing.update import _on_circles
from pnpda_nb.pnp import PnPDA
from pnpda_nb.twin import cycle, lorenz63

ZERO, ONE = (torch.tensor(x, dtype=torch.float64) for x in (0.0, 1.0))
X = standard_normal((5, 2, 16), stream(1, "x"))
SEEN = Observations(standard_normal((5, 3), stream(1, "y")), Select((1, 4, 9), 16), DiagonalCovariance([0.5, 1.0, 2.0]))


def make(dim=16, geometry="ring", shake=0.0, plain=False, **settings) -> AnalysisPrior:
    """Weights are shaken as training would; a `plain` prior has a factor of exactly zero."""
    size = {} if geometry == "none" else {"dilations": (1, 2)}
    prior = AnalysisPrior.make(ZERO, ONE, 0.5 * ONE, **{"dim": dim, "geometry": geometry, "rank": 3, "width": 8} | size | settings)
    generator = stream(2, "shake")
    with torch.no_grad():
        if plain:
            prior.network.last.weight.view(5, -1)[1:-1] = 0
        for parameter in prior.network.parameters():
            parameter.add_(shake * torch.randn(parameter.shape, generator=generator))
    return prior


def analyse(method, background, seen):
    return method.analyse(background, seen, forecast=None, generator=stream(3))


def test_that_missing_observations_are_not_shown():
    values = SEEN.values.clone()
    values[0, 1] = values[3, :] = torch.nan
    shown = on_grid(Observations(values, SEEN.operator, SEEN.covariance), 16)
    assert shown.mask[0, 0, [1, 4, 9]].tolist() == [True, False, True] and not shown.mask[3].any()
    assert shown.value[~shown.mask].abs().max() == 0 == shown.error[~shown.mask].abs().max()
    prior = make(shake=0.2)
    nothing, gone = prior.look(X[3:4])[0], prior.look(X[3:4], seen=shown[3:4])[0]
    assert torch.equal(nothing, gone) and not torch.equal(prior.look(X[:1])[0], prior.look(X[:1], seen=shown[:1])[0])


def test_that_observations_go_to_the_grid_and_back():
    values = SEEN.values.clone()
    values[2, 0] = torch.nan
    seen = Observations(values, SEEN.operator, SEEN.covariance)
    back = on_grid(seen, 16).observations()
    one, other = seen.innovation(X), back.innovation(X)
    assert back.operator.sites == (1, 4, 9) and torch.equal(other, one)
    assert back.covariance.variances[1].tolist() == pytest.approx([0.5, 1.0, 2.0])
    open_ = Residual(standard_normal((5, 2, 16, 3), stream(4)), torch.ones(5, 2, 16, dtype=torch.float64))
    assert torch.allclose(kalman_update(open_, X, seen), kalman_update(open_, X, back))


def test_that_observations_of_another_kind_or_size_are_refused():
    with pytest.raises(ValueError, match="^operator: expected one that selects"):
        on_grid(Observations(SEEN.values[:, :1], Linear(torch.ones(1, 16)), Covariance([[1.0]])), 16)
    with pytest.raises(ValueError, match="^operator: expected one of states of size 15, got 16"):
        on_grid(SEEN, 15)
    with pytest.raises(ValueError, match="^observations: expected a grid of 15 points, got 16"):
        on_grid(on_grid(SEEN, 16), 15)
    with pytest.raises(ValueError, match="^background: expected states of size 16"):
        analyse(AmortisedAnalysis(make()), X[..., :12], SEEN)


@pytest.mark.parametrize("half_width", [0.0, 3.0])
def test_that_a_residual_is_its_matrix_in_every_respect(half_width):
    taper = gaspari_cohn_matrix(16, half_width, True) if half_width else None
    factor, diagonal = standard_normal((5, 2, 16, 3), stream(4)), 0.2 + torch.rand(5, 2, 16, generator=stream(4)).double()
    open_ = Residual(factor, diagonal, None if taper is None else DenseError(taper))
    B = open_.factor @ open_.factor.mT * (1 if taper is None else taper) + torch.diag_embed(open_.diagonal)
    torch.testing.assert_close(open_.matrix, B)
    torch.testing.assert_close(open_.variance, B.diagonal(dim1=-2, dim2=-1))
    sites = torch.tensor([0, 3, 11])
    torch.testing.assert_close(open_.between(torch.arange(16), sites), B[..., sites])
    law = torch.distributions.MultivariateNormal(torch.zeros(3, dtype=torch.float64), B[..., sites[:, None], sites])
    constant = 1.5 * torch.log(torch.tensor(2 * torch.pi, dtype=torch.float64))
    torch.testing.assert_close(-3 * open_.negative_log_likelihood(X, sites) - constant, law.log_prob(X[..., sites]))
    H, R = torch.eye(16, dtype=torch.float64)[[1, 4, 9]], SEEN.covariance.matrix
    gain = B @ H.T @ torch.linalg.inv(H @ B @ H.T + R)
    torch.testing.assert_close(kalman_update(open_, X, SEEN), X + (gain @ SEEN.innovation(X).unsqueeze(-1)).squeeze(-1))


def test_that_errors_are_drawn_with_the_covariance():
    open_ = Residual(standard_normal((4, 2), stream(5)).expand(20_000, 4, 2), torch.full((20_000, 4), 0.3, dtype=torch.float64))
    sample = torch.cov(open_.draw(stream(5)).T)
    assert (sample - open_.matrix[0]).norm() < 0.05 * open_.matrix[0].norm()


@pytest.mark.parametrize("geometry", ["none", "ring", "walls"])
def test_that_an_untrained_prior_adds_nothing_and_leaves_open_one_increment(geometry):
    answer, open_ = make(geometry=geometry, plain=True).look(X, seen=on_grid(SEEN, 16))
    assert torch.equal(answer, X)
    torch.testing.assert_close(open_.matrix, (0.25 * torch.eye(16, dtype=torch.float64)).expand(5, 2, 16, 16), atol=1e-4, rtol=0)


@pytest.mark.parametrize("geometry", ["none", "ring", "walls"])
def test_that_everything_a_prior_says_is_learned_from_the_first_step_on(geometry):
    prior = make(geometry=geometry)
    answer, open_ = prior.look(X)
    loss = (X + 1 - answer).square().mean() + open_.negative_log_likelihood(X, torch.arange(16)).mean()
    loss.backward()
    gradient = prior.network.last.weight.grad.reshape(5, -1)
    assert (gradient.norm(dim=-1) > 0).all()  # a factor of zero would have no gradient


@pytest.mark.parametrize("geometry", ["none", "ring", "walls"])
def test_that_a_widened_prior_answers_as_before(geometry):
    prior, shown = make(geometry=geometry, shake=0.2), on_grid(SEEN, 16)
    wide = prior.widened(2)
    extra = standard_normal((5, 2, 2, 16), stream(6))
    for a, b in zip(prior.look(X, X + 1, 0.3, shown), wide.look(X, X + 1, 0.3, shown, extra)):
        a, b = (x.matrix if isinstance(x, Residual) else x for x in (a, b))
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="^extra: expected a prior without"):
        wide.widened(1)
    with pytest.raises(ValueError, match="^prior: expected one without extra"):
        AmortisedAnalysis(wide)


def test_that_a_prior_with_geometry_turns_with_the_ring_and_works_on_longer_ones():
    prior, shown = make(shake=0.2, half_width=3.0), on_grid(SEEN, 16)
    turned = GridObservations(*(x.roll(5, -1) for x in (shown.value, shown.mask, shown.error)))
    torch.testing.assert_close(
        prior.look(X.roll(5, -1), seen=turned)[0], prior.look(X, seen=shown)[0].roll(5, -1), rtol=1e-5, atol=1e-6
    )
    long = prior.on(48)
    twice = GridObservations(*(x.repeat(1, 1, 3) for x in (shown.value, shown.mask, shown.error)))
    answer, open_ = long.look(X.repeat(1, 1, 3), seen=twice)
    torch.testing.assert_close(answer[..., 16:32], prior.look(X, seen=shown)[0], rtol=1e-5, atol=1e-6)
    assert open_.matrix.shape == (5, 2, 48, 48)
    with pytest.raises(ValueError, match="^dim: a prior without geometry"):
        make(geometry="none").on(48)


SPHERE = Grid.sphere(
    [-67.5, -22.5, 22.5, 67.5],
    range(0, 360, 45),
    channels=("t", "q"),
    land=torch.rand(2, 4, 8, generator=stream(9)) < 0.2,
    radius=1.0,
)
GRIDS = {
    "ring": Grid(24, "circular"),
    "plane": Grid((8, 6), "circular", channels=2),
    "channel": Grid((5, 8), ("zeros", "circular"), spacing=(2.0, 1.0)),
    "sphere": SPHERE,
}


@pytest.mark.parametrize("size", [{"dilations": (1,)}, {"levels": 2}], ids=["convolutions", "pyramid"])
@pytest.mark.parametrize("name", ["ring", "plane", "channel"])
def test_that_a_prior_on_a_grid_moves_with_its_fields_along_circular_axes(name, size):
    grid = GRIDS[name]
    prior = AnalysisPrior.make(ZERO, ONE, 0.5 * ONE, dim=grid.dim, geometry=grid, rank=2, half_width=1.5, kernel=3, width=8, **size)
    with torch.no_grad():
        for parameter in prior.network.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=stream(2)))
    axes = [axis - len(grid.shape) for axis, edge in enumerate(grid.edges) if edge == "circular"]

    def moved(states):
        return grid.flatten(grid.unflatten(states).roll([2] * len(axes), axes))

    x, u, value, error = standard_normal((4, 3, 2, grid.dim), stream(11)).abs()
    mask = torch.rand(3, 2, grid.dim, generator=stream(12)) < 0.3
    seen = GridObservations(value * mask, mask, error * mask)
    turned = GridObservations(moved(seen.value), moved(mask.double()).bool(), moved(seen.error))
    here, there = prior.look(x, u, 0.4, seen), prior.look(moved(x), moved(u), 0.4, turned)
    torch.testing.assert_close(there.mean, moved(here.mean), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(there.residual.factor.mT, moved(here.residual.factor.mT), rtol=1e-5, atol=1e-5)
    v = u.unsqueeze(-2)
    torch.testing.assert_close(there.residual.multiply(moved(v)), moved(here.residual.multiply(v)), rtol=1e-5, atol=1e-5)
    assert (moved(here.mean) - here.mean).abs().max() > 0.1 and here.residual.factor.abs().max() > 0.01
    if len(grid.channels) > 1:  # one channel has a say in the other
        other = prior.look(x + 0.5 * (grid.channel == 1), u, 0.4, seen).mean
        assert (other - here.mean)[..., grid.channel == 0].abs().max() > 1e-3


@pytest.mark.parametrize("name", GRIDS)
def test_that_a_prior_on_a_grid_is_the_same_one_from_its_file(tmp_path, name):
    grid = GRIDS[name]
    each = standard_normal((grid.dim,), stream(3)).abs() + 0.1
    prior = AnalysisPrior.make(
        each, each, each, dim=grid.dim, geometry=grid, rank=2, half_width=1.0, width=8, kernel=3, dilations=(1,)
    )
    prior = prior.widened(1)
    again = AnalysisPrior.load(prior.save(tmp_path / "prior.safetensors"))
    assert again.grid == prior.grid == grid and again.architecture == prior.architecture and repr(grid) in repr(again)
    x, extra = standard_normal((2, 1, grid.dim), stream(7)), standard_normal((2, 1, 1, grid.dim), stream(8))
    a, b = (p.look(x, x + 1, 0.3, extra=extra) for p in (prior, again))
    assert torch.equal(a.mean, b.mean) and torch.equal(a.residual.matrix, b.residual.matrix)
    with pytest.raises(ValueError, match="^dim: a prior without"):
        prior.on(48)
    with pytest.raises(ValueError, match=f"^geometry: expected a grid of 5 values, got one of {grid.dim}"):
        AnalysisPrior.make(ZERO, ONE, ONE, dim=5, geometry=grid)


@pytest.mark.parametrize("name", GRIDS)
def test_that_a_taper_on_circles_is_the_one_that_is_written_down(name):
    grid, half_width = GRIDS[name], {"sphere": 0.7}.get(name, 1.5)
    exact, found = DenseError(_taper(grid.dim, half_width, grid)), _on_circles(grid, half_width)
    x, every = standard_normal((2, 3, grid.dim), stream(13)), torch.arange(grid.dim)
    torch.testing.assert_close(found.multiply(x), exact.multiply(x), rtol=0, atol=1e-12)
    torch.testing.assert_close(found.between(every[:5], every), exact.between(every[:5], every), rtol=0, atol=1e-12)
    drawn = found.draw((50_000,), stream(14))
    assert (torch.cov(drawn.T) - exact.matrix).abs().max() < 0.03


@pytest.mark.parametrize("iterations", [1, 4])
def test_that_pnpda_with_an_untrained_blind_prior_makes_one_kalman_step(iterations):
    """Its covariance is increment² I, and its denoised state is the background: further iterations begin there again."""
    prior, x = make(plain=True), X[:, :1]
    method = PnPDA(BlindPrior(prior), 1, data_step="kalman")
    pull = torch.zeros_like(x)
    pull[..., [1, 4, 9]] = 0.25 / (0.25 + SEEN.covariance.variances) * SEEN.innovation(x)
    torch.testing.assert_close(analyse(method, x, SEEN), x + pull, rtol=0, atol=1e-3)
    torch.testing.assert_close(analyse(AmortisedAnalysis(prior, blind=True), x, SEEN), x + pull, rtol=0, atol=1e-3)
    more = analyse(replace(method, iterations=iterations, draws=2), x, SEEN)
    assert torch.isfinite(more).all()


def test_that_what_is_left_open_belongs_to_the_answer_that_it_came_with():
    denoiser, other = make(shake=0.2)(X), make(shake=0.3)(X)
    early, late = denoiser(X + 1, 0.2), denoiser(X - 1, 0.7)
    other(X, 0.5)
    for x, tau, answer in ((X + 1, 0.2, early), (X - 1, 0.7, late)):
        alone = make(shake=0.2).look(X, x, tau)
        assert torch.equal(answer.mean, alone.mean) and torch.equal(answer.residual.matrix, alone.residual.matrix)
    assert not torch.equal(early.residual.matrix, late.residual.matrix)


def test_that_only_the_blind_prior_is_blind():
    prior = make(shake=0.2)
    other = Observations(SEEN.values + 1, SEEN.operator, SEEN.covariance)
    assert isinstance(prior.seeing(SEEN), SeeingPrior) and not hasattr(BlindPrior(prior), "seeing")
    looks = PnPDA(prior, 1)  # without a data step: one iteration, no effect of the observations but through the eyes
    assert not torch.equal(analyse(looks, X, SEEN), analyse(looks, X, other))
    blind = PnPDA(BlindPrior(prior), 1)
    assert torch.equal(analyse(blind, X, SEEN), analyse(blind, X, other))


def test_that_a_spread_scales_what_is_drawn():
    prior = make(shake=0.1)
    mean, once, twice = (analyse(AmortisedAnalysis(prior, spread), X, SEEN) for spread in (0.0, 1.0, 2.0))
    torch.testing.assert_close(twice - mean, 2 * (once - mean))
    with pytest.raises(ValueError, match="^spread: expected"):
        AmortisedAnalysis(prior, -1.0)


def test_that_a_saved_prior_is_the_same_one(tmp_path):
    prior = make(shake=0.2, extra=1, half_width=2.0)
    prior.training = {"seed": 3}
    again = AnalysisPrior.load(prior.save(tmp_path / "prior.safetensors"))
    extra = standard_normal((5, 2, 1, 16), stream(7))
    assert torch.equal(prior.look(X, extra=extra)[0], again.look(X, extra=extra)[0])
    assert torch.equal(prior.look(X, extra=extra)[1].matrix, again.look(X, extra=extra)[1].matrix)
    assert again.architecture == prior.architecture and again.training == {"seed": 3}
    assert [p.name for p in tmp_path.iterdir()] == ["prior.safetensors"]
    AnalysisPrior.make(ZERO, ONE, ONE, dim=3, width=4).save(tmp_path / "units.safetensors")  # two units that are one tensor


def test_that_files_of_others_and_broken_ones_are_named(tmp_path):
    from altered import with_seal
    from safetensors.torch import save_file

    path = make().save(tmp_path / "prior.safetensors")
    (tmp_path / "cut").write_bytes(path.read_bytes()[:-100])
    (tmp_path / "text").write_text("no prior")
    save_file({"x": torch.ones(2)}, tmp_path / "foreign")
    header = {"format": "pnpda_nb.analysis_prior/1", "architecture": "[]", "training": "{}"}
    with_seal({"x": torch.ones(2)}, header, tmp_path / "header")
    for name, message in {
        "cut": "not a readable", "text": "not a readable", "foreign": "expected format", "header": "a header that does not fit"
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=message) as error:
            AnalysisPrior.load(tmp_path / name)
        assert str(error.value).startswith("prior: ") and "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError, match="^prior: no file"):
        AnalysisPrior.load(tmp_path / "nothing")
    lost = make()
    with torch.no_grad():
        lost.network.last.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="not finite"):
        AnalysisPrior.load(lost.save(tmp_path / "nan"))


def test_that_settings_out_of_range_are_named():
    for wrong in ({"geometry": "sphere"}, {"geometry": Grid(16, metric=lambda i, j: (i - j).abs())}, {"rank": 0}):
        with pytest.raises(ValueError, match=f"^{next(iter(wrong))}: expected"):
            make(**wrong)


def test_that_a_learned_mean_of_fields_begins_between_3dvar_and_its_filter():
    grid = Grid((8, 8), "circular", channels=("a", "b"))
    errors = Spectral.of_errors(grid, standard_normal((200, grid.dim), stream(1)))
    pyramid = {"geometry": grid, "width": 4, "levels": 1, "kernel": 3, "patch": 2, "extra": ENSEMBLE_FIELDS}
    prior = AnalysisPrior.make(0 * ONE, ONE, 0.2 * ONE, dim=grid.dim, errors=errors, seed=1, **pyramid)
    members = standard_normal((3, 6, grid.dim), stream(2))
    variances = torch.full((9,), 0.5, dtype=torch.float64)
    network = ObservingNetwork(Select(tuple(range(0, 126, 14)), grid.dim), DiagonalCovariance(variances))
    seen = network.observe(members[:, 0], stream(3))
    own = analyse(ThreeDVar(errors), members.mean(-2, keepdim=True), seen)[:, 0]
    filtered = analyse(EnKF(), members, seen).mean(-2)
    for share in (0.0, 0.25, 1.0):
        between = analyse(LearnedMean(prior, EnKF(), filter_share=share), members, seen).mean(-2)
        torch.testing.assert_close(between, own + share * (filtered - own))


def test_that_an_untrained_learned_mean_recentres_on_the_background():
    prior = make(3, "none", extra=ENSEMBLE_FIELDS)
    experiment = lorenz63(cycles=3)
    members = standard_normal((4, 10, 3), stream(8))
    seen = experiment.network.observe(members[:, 0], stream(8, "seen"))
    filtered = analyse(EnKF(), members, seen)
    centred = analyse(LearnedMean(prior, EnKF(), 1.5), members, seen)
    torch.testing.assert_close(centred.mean(-2), members.mean(-2))
    torch.testing.assert_close(centred - centred.mean(-2, keepdim=True), 1.5 * (filtered - filtered.mean(-2, keepdim=True)))
    fields = ensemble_fields(members, filtered, 0.5 * ONE)
    torch.testing.assert_close(fields[:, 1], 2 * filtered.std(-2))
    torch.testing.assert_close(fields[:, 2], 2 * (filtered.mean(-2) - members.mean(-2)))
    a, b = (cycle(experiment, LearnedMean(prior, EnKF()), members=5, runs=runs, seed=1).analysis.values for runs in (3, 2))
    assert abs(a[:2] - b).max() < 1e-9
    with pytest.raises(ValueError, match="^members: EnKF needs"):
        analyse(LearnedMean(prior, EnKF()), members[:, :1], seen)
    with pytest.raises(ValueError, match="^prior: expected one with 3 extra"):
        LearnedMean(make(3, "none"), EnKF())
    with pytest.raises(ValueError, match="^spread_factor: expected"):
        LearnedMean(prior, EnKF(), 0.0)
    with pytest.raises(ValueError, match="^background: expected"):
        analyse(LearnedMean(prior, EnKF()), members[..., :2], seen)


def test_that_drawn_errors_have_the_covariance_that_is_left_open_and_a_lost_run_stays_alone():
    factor, taper = torch.randn(1, 1, 12, 3, generator=stream(1), dtype=torch.float64), DenseError(gaspari_cohn_matrix(12, 3.0))
    open_ = Residual(factor.expand(40_000, -1, -1, -1), torch.full((40_000, 1, 12), 0.2, dtype=torch.float64), taper)
    drawn = torch.cov(open_.draw(stream(2))[:, 0].T)
    exact = open_.matrix[0, 0]
    assert (drawn - exact).norm() / exact.norm() < 0.03
    plain = Residual(open_.factor, open_.diagonal)
    assert (torch.cov(plain.draw(stream(2))[:, 0].T) - plain.matrix[0, 0]).norm() / plain.matrix[0, 0].norm() < 0.03
    lost = factor.repeat(2, 1, 1, 1)
    lost[0] = torch.nan
    both = Residual(lost, torch.ones(2, 1, 12, dtype=torch.float64), taper).draw(stream(3))
    assert torch.isnan(both[0]).all() and torch.isfinite(both[1]).all()


def test_that_a_blind_analysis_does_not_pretend_to_draw_and_a_wide_taper_on_a_short_ring_is_refused():
    one = torch.tensor(1.0, dtype=torch.float64)
    with pytest.raises(ValueError, match="^spread: expected 0 for a blind analysis"):
        AmortisedAnalysis(AnalysisPrior.make(0 * one, one, one, dim=3), spread=1.0, blind=True)
    with pytest.raises(ValueError, match="^half_width: expected at most 4"):
        AnalysisPrior.make(0 * one, one, one, dim=16, geometry="ring", half_width=5.0)
