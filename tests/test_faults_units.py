"""Nothing depends on the units of the user's numbers; what never changes is left out and kept; every rival stands in the report,
and every word is a word.
"""

import dataclasses
import math
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pnpda_nb.classical import ETKF, LETKF, EnKF, ThreeDVar, archive_background, climatological_background
from pnpda_nb.core import standard_normal, stream
from pnpda_nb.files import Axis, Field, Layout, States
from pnpda_nb.files.layout import layout_record
from pnpda_nb.files.stations import StationObservations
from pnpda_nb.flow_matching import FlowPrior, GaussianPrior, TensorPairs, TrainingSettings, train_from, train_prior
from pnpda_nb.observing import (
    Covariance,
    DenseError,
    DiagonalCovariance,
    FactoredError,
    Interpolate,
    Nonlinear,
    ObservingNetwork,
    Select,
    kalman_update,
)
from pnpda_nb.operations import (
    Calibration,
    Report,
    assimilate,
    assimilation_report,
    errors,
    regression,
    set_aside,
    survey,
    train_archive,
    training_report,
    trial,
    usual_settings,
    verdict,
)
from pnpda_nb.operations import report as reports
from pnpda_nb.operations import validation as trials
from pnpda_nb.operations.errors import Fixed, Part, attach_errors, attached_unit
from pnpda_nb.operations.report import innovations
from pnpda_nb.operations.validation import pnpda_with, pseudo_observations, scored
from pnpda_nb.pnp import EnsembleResidual, FunctionConstraint, LinearConstraint, QuadraticConstraint, residual_covariance
from pnpda_nb.windows import WindowClimatology

DIM = 12
UNITS = torch.tensor([100.0] * 4 + [1e-16] * 4 + [1e9] * 4, dtype=torch.float64)
QUICK = usual_settings(DIM, 240, epochs=2)


def pairs(count: int = 300, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Backgrounds and analyses `(count, 12)`, of order one, that a line explains in part."""
    background = standard_normal((count, DIM), stream(seed, "background"))
    return background, background + 0.5 * torch.tanh(background) + 0.3 * standard_normal((count, DIM), stream(seed, "analysis"))


def source(background, analysis, layout: Layout | None = None) -> TensorPairs:
    return TensorPairs(background, analysis, "pairs", 32, None if layout is None else layout_record(layout))


def trained(background, analysis, layout: Layout | None = None, settings: TrainingSettings = QUICK, **options):
    return train_archive(source(background, analysis, layout), settings, **options)


def same_scores(one: pd.DataFrame, other: pd.DataFrame, rtol: float = 1e-3) -> bool:
    return one.analysis.tolist() == other.analysis.tolist() and np.allclose(one[["error", "±"]], other[["error", "±"]], rtol=rtol)


# ---------------------------------------------------------------- covariances


@pytest.mark.parametrize(
    "matrix", [np.diag([1e-12, 1e4]), np.diag([1e-300, 1e300]), np.diag([1e-16] * 3), [[1e-12, 9e-5], [9e-5, 1e4]]]
)
def test_that_a_positive_definite_matrix_is_a_covariance_whatever_its_scale(matrix):
    covariance = Covariance(matrix)
    d = covariance.variances.sqrt()
    correlations = covariance.matrix / d / d[:, None]
    assert torch.allclose((covariance.factor / d[:, None]) @ (covariance.factor / d[:, None]).T, correlations, rtol=1e-12)
    assert torch.allclose(covariance.inverse * d * d[:, None] @ correlations, torch.eye(len(d)).double(), atol=1e-12)
    assert math.isclose(covariance.largest_precision, float(covariance.inverse.diagonal().max()), rel_tol=1)
    assert torch.allclose(covariance.squared_norm(d), torch.linalg.inv(correlations).sum(), rtol=1e-9)


@pytest.mark.parametrize("scale", [1e-200, 1e-12, 1.0, 1e200])
@pytest.mark.parametrize(
    "matrix, message",
    [
        ([[1.0, 0.9], [0.0, 1.0]], "expected a symmetric matrix"),
        ([[1.0, 2.0], [2.0, 1.0]], "expected a positive definite matrix"),
        ([[1.0, 1.0], [1.0, 1.0]], "expected a positive definite matrix"),
        ([[1.0, 0.0], [0.0, 0.0]], "expected a positive definite matrix, got one with the variance 0 at 1"),
        ([[-1.0, 0.0], [0.0, 1.0]], "expected a positive definite matrix, got one with the variance -1"),
    ],
)
def test_that_a_matrix_that_is_none_is_refused_whatever_its_scale(matrix, message, scale):
    for unit in (1.0, 1e-4):
        D = torch.tensor([1.0, unit], dtype=torch.float64)
        with pytest.raises(ValueError, match=f"^B: {message}"):
            Covariance(scale * torch.tensor(matrix, dtype=torch.float64) * D * D[:, None], "B")


def test_that_variances_without_a_finite_inverse_are_refused():
    for wrong in ([0.0], [-1.0], [math.inf], [math.nan], [1.0, 1e-320]):
        with pytest.raises(ValueError, match="^R: expected finite positive variances, got"):
            DiagonalCovariance(wrong, "R")
    assert (
        DiagonalCovariance([1e4, 4e4]).without(torch.tensor([True, False])).largest_precision == 1e-4
    )  # not that of the 1 in its place


def test_that_sample_covariances_are_accepted_in_any_units_and_their_faults_named():
    background, analysis = pairs()
    one, other = archive_background(background, analysis), archive_background(background * UNITS, analysis * UNITS)
    assert torch.allclose(other.matrix / UNITS / UNITS[:, None], one.matrix, rtol=1e-12)
    analysis[:, 3] = background[:, 3]
    with pytest.raises(ValueError, match="archive background: .* the variance 0 at 3"):
        archive_background(background, analysis)
    with pytest.raises(ValueError, match="climatological background: expected a positive definite"):
        climatological_background(standard_normal((5, DIM), stream(0)) * UNITS)


def test_that_a_gaussian_prior_is_the_same_in_any_units():
    background, analysis = pairs()
    one, other = GaussianPrior.from_pairs(background, analysis), GaussianPrior.from_pairs(background * UNITS, analysis * UNITS)
    assert torch.allclose(other.mean(background * UNITS) / UNITS, one.mean(background), rtol=1e-9, atol=1e-12)
    assert torch.allclose(other.covariance.matrix / UNITS / UNITS[:, None], one.covariance.matrix, rtol=1e-9, atol=1e-12)
    with pytest.raises(ValueError, match="background .*covariance of the backgrounds of the pairs: expected"):
        GaussianPrior.from_pairs(background[:5], analysis[:5])


# ---------------------------------------------------------------- analyses


@pytest.mark.parametrize("spread", [1e3, 1e12])
def test_that_analyses_are_the_same_in_any_units(spread):
    g = stream(0, "units")
    L, d = standard_normal((DIM, 3), g), torch.rand(DIM, generator=g, dtype=torch.float64)
    B, x = L @ L.T + torch.diag(d), standard_normal((2, 20, DIM), g)
    seen, y = torch.arange(0, DIM, 2), standard_normal((2, 6), g)
    units = spread ** torch.rand(DIM, generator=g, dtype=torch.float64)
    pair, weight = torch.tensor([[0, 3], [5, 8]]), torch.tensor([[0.25, 0.75], [0.5, 0.5]], dtype=torch.float64)

    def analyses(u: torch.Tensor) -> list[torch.Tensor]:
        R = (0.1 * torch.eye(6).double() + 0.05) * u[seen] * u[seen, None]
        select = [
            ObservingNetwork(Select(tuple(seen.tolist()), DIM), covariance).report(y * u[seen])
            for covariance in (DiagonalCovariance(R.diagonal()), Covariance(R))
        ]
        between = ObservingNetwork(Interpolate(pair, weight / u[pair], DIM), DiagonalCovariance([0.1, 0.2])).report(y[:, :2])
        errors = [
            DenseError(B * u * u[:, None]),
            FactoredError(L * u[:, None], d * u**2),
            EnsembleResidual(source=u).at(0.3, x * u),
        ]
        found = [kalman_update(error, x * u, observations) for error in errors for observations in (*select, between)]
        methods = ThreeDVar(Covariance(B * u * u[:, None])), EnKF(), ETKF(), LETKF(half_width=3.0)
        found += [m.analyse(x * u, o, forecast=None, generator=stream(1)) for m in methods for o in select]
        return [a / u for a in found]

    for one, other in zip(analyses(torch.ones(DIM).double()), analyses(units)):
        assert torch.allclose(one, other, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("unit", [1e-12, 1e-3, 1e8])
def test_that_a_nonlinear_minimum_is_as_accurate_in_any_units(unit):
    background = torch.tensor([[[1.0, 2.0]], [[0.3, -0.1]]], dtype=torch.float64)
    operator = Nonlinear(lambda x: x.norm(dim=-1, keepdim=True), 1)

    def analysis(u: float) -> torch.Tensor:
        seen = ObservingNetwork(operator, DiagonalCovariance([0.01 * u**2])).report(torch.tensor([[3.0], [0.5]]).double() * u)
        return ThreeDVar(Covariance(torch.eye(2) * 0.5 * u**2)).analyse(background * u, seen, forecast=None, generator=None) / u

    assert torch.allclose(analysis(unit), analysis(1.0), rtol=1e-7)


@pytest.mark.parametrize("rank", [None, 2, DIM])
def test_that_error_covariances_are_the_same_in_any_units_and_those_without_error_have_none(rank):
    background, analysis = pairs()
    background[:, 5] = analysis[:, 5] = 273.15

    def covariance(u: torch.Tensor) -> torch.Tensor:
        b, a = background * u, analysis * u
        a[:, 6] = b[:, 6] + 0.0
        error = residual_covariance(Fixed(DIM), b, a, (0.0,), stream(0), rank=rank).errors[0]
        matrix = error.matrix if rank is None else error.factor @ error.factor.T + torch.diag(error.diagonal)
        return matrix / u / u[:, None]

    one, other = covariance(torch.ones(DIM).double()), covariance(UNITS)
    assert torch.allclose(one, other, rtol=1e-6, atol=1e-9)
    assert not one[5].any() and not one[6].any()
    rest = torch.tensor([i for i in range(DIM) if i not in (5, 6)])
    assert torch.linalg.eigvalsh(one[rest][:, rest])[0] > 0


def test_that_a_field_of_small_numbers_keeps_its_correlations():
    z = standard_normal((500, 2), stream(0, "z"))
    p, q = (z[:, [i]] + 0.3 * standard_normal((500, 20), stream(0, i)) for i in range(2))
    true = torch.corrcoef(torch.cat([p, q], 1).T)[25, 30]
    for scale in (1.0, 1e-3, 1e-12):
        analysis = torch.cat([p, scale * q], 1)
        e = residual_covariance(Fixed(40), torch.zeros_like(analysis), analysis, (0.0,), stream(1), rank=2).errors[0]
        B = e.factor @ e.factor.T + torch.diag(e.diagonal)
        assert abs(B[25, 30] / (B[25, 25] * B[30, 30]).sqrt() - true) < 0.03


def test_that_residuals_whose_squares_are_not_finite_are_refused():
    huge = 1e160 * torch.ones(20, DIM, dtype=torch.float64)
    with pytest.raises(ValueError, match="^background, analysis: expected numbers whose squares are finite"):
        residual_covariance(Fixed(DIM), 0 * huge, huge, (0.0,), stream(0))


# ---------------------------------------------------------------- constraints


@pytest.mark.parametrize("unit", [1e-15, 1.0, 1e14])
def test_that_a_law_is_met_in_any_units(unit):
    x = unit * (1 + standard_normal((50, 3), stream(0)).abs())
    laws = (
        LinearConstraint(torch.tensor([[1.0, -1.0, 1.0]]).double(), 0.0),
        QuadraticConstraint(torch.diag(torch.tensor([1.0, 2.0, 3.0])).double(), 4.0 * unit**2),
        FunctionConstraint(lambda s: s.square().sum(-1, keepdim=True), 4.0 * unit**2),
    )
    for law in laws:
        there = law.project(x)
        assert (law.residual(there) / law.terms(there)).abs().max() < 1e-12
        with pytest.raises(ValueError, match="^project: expected"):  # a step that does not arrive is found out, in any units
            dataclasses.replace(laws[2], iterations=1).project(x)
    LinearConstraint(torch.tensor([[1e12, 1e12], [1e-9, -1e-9]]).double())  # independent, whatever their sizes
    with pytest.raises(ValueError, match="^matrix: expected independent rows"):
        LinearConstraint(torch.tensor([[1e12, 1e-6], [1e-9, 1e-27]], dtype=torch.float64))
    with pytest.raises(ValueError, match="^matrix: expected a symmetric one"):
        QuadraticConstraint(torch.tensor([[1e10, 0.0], [0.0, -1e-6]]).double())


# ---------------------------------------------------------------- what never changes


def test_that_an_archive_in_other_units_has_the_same_scores_choice_and_verdict():
    background, analysis = pairs()
    one, other = trained(background, analysis), trained(background * UNITS, analysis * UNITS)
    assert same_scores(one.calibration.trial, other.calibration.trial)
    assert verdict(one.calibration) == verdict(other.calibration)
    assert torch.equal(one.prior.attached["iterations"], other.prior.attached["iterations"])
    assert np.allclose(one.calibration.ranks, other.calibration.ranks, atol=1e-3)
    assert torch.allclose(other.prior.attached["increment"] / UNITS, one.prior.attached["increment"], rtol=1e-9)


LAYOUT = Layout((Field("sst", (2, 4), ("y", "x"), "K"), Field("ice", (4,), ("x",))))


def with_ice() -> tuple[torch.Tensor, torch.Tensor]:
    """Points 0 to 2 never change, in three ways; point 3 does not in the last third."""
    background, analysis = (x + 273.15 for x in pairs())
    analysis[:, 0] = background[:, 0]  # no analysis touches it
    analysis[:, 1] = background[:, 1] + 0.1  # a constant increment, up to rounding
    analysis[:, 2] = background[:, 2] = 271.35  # frozen
    analysis[-100:, 3] = background[-100:, 3] = 271.35
    return background, analysis


@pytest.mark.parametrize(
    "settings, memory",
    [
        (QUICK, 256_000_000),
        (QUICK, 50_000),  # in blocks
        (TrainingSettings(hidden=(16,), batch=32, epochs=2), 256_000_000),
        (TrainingSettings(hidden=(16,), batch=32, epochs=2, source="covariance", target="increment"), 256_000_000),
        (TrainingSettings(hidden=(16,), batch=32, epochs=2, standardise=False), 256_000_000),
    ],
)
def test_that_points_that_never_change_are_named_left_out_and_kept(settings, memory):
    background, analysis = with_ice()
    found = trained(background, analysis, LAYOUT, settings, memory=memory)
    unit = found.prior.attached["increment"]
    assert (unit == 0).nonzero().flatten().tolist() == [0, 1, 2]
    assert "3 points never change (sst[0,0], sst[0,1], sst[0,2]): left out of training and scores, kept in the output." in verdict(
        found.calibration
    )
    assert "1 point does not change in the pairs of the test (sst[0,3]): left out of its scores." in verdict(found.calibration)
    table = found.calibration.trial.set_index("analysis")
    assert table.error[["background", "3D-Var", "regression + Kalman step"]].between(0.3, 1.5).all() and (table.error < 1e3).all()
    field = Layout((Field("sst", (2, 4), ("y", "x"), "K"), Field("ice", (4,), ("x",))))
    states = States(background[:3, None].clone(), field, {}, (), ())
    seen = StationObservations(np.full((3, 4), 274.0), np.full(4, 0.1), ("sst",) * 4, np.arange(4)[:, None], np.ones((4, 1)), DIM)
    answer = assimilate(found.prior, states, seen)
    assert torch.equal(answer[..., :3], states.values[..., :3]) and not torch.equal(answer[..., 3], states.values[..., 3])
    if found.prior.factor is not None:  # the flow stays at the background, exactly
        denoiser = found.prior(background[:5])
        start = denoiser.start(stream(0))
        assert torch.equal(start[:, :3], background[:5, :3]) and not denoiser.velocity(start, 0.4)[:, :3].any()
    errors = pnpda_with(found.prior).residuals.errors
    assert all(not e.factor[:3].any() and not e.diagonal[:3].any() for e in errors)
    for report in (training_report(found, "a"), assimilation_report(found.prior, states, answer, seen, "b")):
        assert "3 points never change" in report.html() and "sst[0,1]" in report.html()


def test_that_a_field_that_never_changes_stands_in_the_table_and_one_that_is_all_constant_is_refused():
    background, analysis = pairs()
    background[:, 8:] = analysis[:, 8:] = 1.0
    means = trained(background, analysis, LAYOUT).calibration.means.set_index("field")
    assert (means.loc["ice", ["background", "regression", "prior"]] == "never changes").all() and "±" in means.prior["sst"]
    with pytest.raises(ValueError, match="^archive: expected analyses that differ from the backgrounds by something that changes"):
        trained(background, background)


def test_that_what_is_constant_in_the_part_set_aside_is_scored_nowhere_and_what_changes_only_there_neither():
    background, analysis = pairs()
    analysis[-60:, :2] = background[-60:, :2]  # ice in both parts set aside
    analysis[:240, 2] = background[:240, 2]  # and a point that melts in them
    found = trained(background, analysis)
    assert found.calibration.trial.error.between(0.3, 1.5).all()
    assert found.calibration.notes == (
        "1 point never changes (state[2]): left out of training and scores, kept in the output.",
        "2 points do not change in the pairs of the test (state[0], state[1]): left out of its scores.",
    )
    observations = pseudo_observations(background[-30:], analysis[-30:], stream(0), share=1.0)
    assert set(observations.operator.indices) == set(range(2, DIM))


def test_that_the_unit_is_that_of_the_pairs_of_training():
    background, analysis = pairs()
    part, _, last = set_aside(source(background, analysis))
    unit, low, high = survey(source(background, analysis), part.count, memory=1000)
    assert torch.allclose(unit, (analysis - background)[: part.count].std(0), rtol=1e-12)
    both = torch.cat((background, analysis))
    assert torch.equal(low, both.amin(0)) and torch.equal(high, both.amax(0))
    prior = trained(background, analysis).prior
    table = trial(prior, part, last, stream(0), [1])
    by_hand = (((last.read()[1] - last.read()[0]) / unit).square().mean()) ** 0.5
    assert math.isclose(table.error[0], by_hand, rel_tol=1e-9)


def test_that_a_prior_says_between_which_values_its_fields_were():
    background, analysis = pairs()
    background[-1, 3], analysis[0, 9] = -50.0, 70.0  # in whatever part of the archive
    layout = Layout(LAYOUT.fields, {}, np.array([0, 5]))
    kept = background[:, layout.kept], analysis[:, layout.kept]
    found = trained(*kept, layout, usual_settings(10, 240, epochs=1)).prior
    held = {v["name"]: v["held"] for v in found.layout["variables"]}
    both = torch.cat(kept)
    assert held == {"sst": [-50.0, float(both[:, :6].max())], "ice": [float(both[:, 6:].min()), 70.0]}


@pytest.mark.parametrize("together", [True, False])
def test_that_training_alone_refuses_what_never_changes_by_name(together):
    background, analysis = with_ice()
    for target, message in (
        ("increment", "analysis: a variable differs from the background's by a constant in all pairs: 2 of 12, first number 0"),
        ("state", "analysis: a variable is constant over all pairs and cannot be standardised: 1 of 12, first number 2"),
    ):
        settings = dataclasses.replace(QUICK, source="white", target=target, standardise=target == "state")
        some = source(*((x[:, [0, 1, *range(3, DIM), 3]] if target == "increment" else x) for x in (background, analysis)))
        with pytest.raises(ValueError, match=re.escape(message)):
            train_from(some, settings, memory=256_000_000 if together else 50_000)
    with pytest.raises(ValueError, match="^analysis: a variable"):
        train_prior(background, analysis, QUICK)


def test_that_numbers_whose_squares_cannot_be_held_are_refused():
    background, analysis = pairs()
    for factor in (1e160, 1e-170):
        with pytest.raises(ValueError, match="^archive: expected numbers whose squares are finite and not zero"):
            trained(background * factor, analysis * factor)
        with pytest.raises(ValueError, match="^background, analysis: expected numbers whose squares are finite and not zero"):
            train_prior(background * factor, analysis * factor, QUICK)


def test_that_a_climate_of_windows_refuses_what_is_constant_whatever_its_rounding():
    windows = standard_normal((50, 4, 2), stream(0))
    windows[:, 1, 1] = 273.1500000001
    for order in (None, 1):
        with pytest.raises(ValueError, match="^windows: expected numbers that are finite and vary"):
            WindowClimatology.of(windows, order)


# ---------------------------------------------------------------- rivals


def linear(count: int, dim: int, patterns: int = 5, seed: int = 0) -> TensorPairs:
    """Pairs whose increments are a linear function of a few patterns of the background, half of them noise."""
    shapes = standard_normal((patterns, dim), stream(seed, "shapes"))
    amounts = standard_normal((count, patterns), stream(seed, "amounts"))
    background = amounts @ shapes + standard_normal((count, dim), stream(seed, "background"))
    told = amounts @ standard_normal((patterns, patterns), stream(seed, "map")) @ shapes / patterns**0.5
    return TensorPairs(background, background + told + 0.3 * standard_normal((count, dim), stream(seed, "noise")), "linear", 16)


@pytest.mark.parametrize("count, dim", [(400, 3), (400, 30), (200, 250), (120, 3000)])
def test_that_there_is_a_regression_for_states_of_every_size_in_any_units(count, dim):
    pairs = linear(count, dim)
    first = Part(pairs, 0, count - 40)
    new, truth = pairs.read(count - 40, count)
    line = regression(first)
    unit = (truth - new).std(0)
    errors = [float(((x - truth) / unit).square().mean().sqrt()) for x in (line(new), new)]
    assert errors[0] < (0.95 if dim == 3 else 0.5) * errors[1]
    left = ((line(new) - truth).square().mean(0) / (line.errors.diagonal + line.errors.factor.square().sum(-1))).mean()
    assert 0.5 < left < 1.5  # it knows how wrong it is
    units = 10 ** (12 * torch.rand(dim, generator=stream(1), dtype=torch.float64) - 6)
    other = regression(Part(TensorPairs(pairs.background * units, pairs.analysis * units, "scaled", 16), 0, count - 40))
    assert torch.allclose(other(new * units) / units, line(new), rtol=1e-6, atol=1e-7)


def test_that_a_regression_is_least_squares_where_pairs_are_many_and_the_mean_increment_where_nothing_is_known():
    pairs = linear(4000, 4)
    background, analysis = pairs.read(0, 4000)
    ones = torch.ones(4000, 1, dtype=torch.float64)
    exact = torch.cat((background, ones), 1) @ torch.linalg.lstsq(torch.cat((background, ones), 1), analysis).solution
    assert ((regression(pairs)(background) - exact).square().mean() / (exact - background).square().mean()) < 1e-3
    noise = 5 + standard_normal((400, 60), stream(3))
    nothing = regression(
        TensorPairs(
            background[:400, :1].expand(-1, 60) + standard_normal((400, 60), stream(2)),
            background[:400, :1].expand(-1, 60) + noise,
            "n",
            16,
        )
    )
    new = standard_normal((50, 60), stream(4))
    assert (nothing(new) - new - 5).abs().mean() < 1.0 and math.isclose(float((nothing(new) - new).mean()), 5, abs_tol=0.4)


def test_that_a_trial_of_a_large_state_has_all_rivals():
    pairs = linear(100, 250)
    found = train_archive(pairs, TrainingSettings(hidden=(16,), batch=16, epochs=1, source="background", target="increment"))
    table = found.calibration.trial.set_index("analysis")
    assert np.isfinite(table.error[["background", "3D-Var", "regression + Kalman step"]]).all() and "note" not in table
    assert table.error["regression + Kalman step"] < table.error["3D-Var"] < table.error["background"]
    assert "WORSE than with the best of the others (regression + Kalman step)" in verdict(found.calibration)
    assert "regression" in found.calibration.means and "±" in found.calibration.means.regression[0]


def test_that_a_rival_that_cannot_be_computed_stands_in_the_report_with_its_reason(monkeypatch, tmp_path):
    def broken(*args, **options):
        raise torch.linalg.LinAlgError("the equations | have no solution")

    monkeypatch.setattr(trials, "regression", broken)
    found = trained(*pairs())
    row = found.calibration.trial.set_index("analysis").loc["regression + Kalman step"]
    assert math.isnan(row.error) and row.note == "not computed: the equations | have no solution"
    said = verdict(found.calibration)
    assert (
        "Missing among the others: regression + Kalman step (not computed: the equations | have no solution)." in said
        and "regression + Kalman step):" not in said
    )
    assert (found.calibration.means.regression == "not computed").all()
    report = training_report(found, "a")
    assert "not computed: the equations | have no solution" in report.html() and "<td>–</td>" in report.html()
    assert r"not computed: the equations \| have no solution" in report.write(tmp_path / "r.md").read_text()


def test_that_a_verdict_names_what_it_lacks_and_does_not_praise_what_is_not_finite():
    def calibration(rows: list[tuple]) -> Calibration:
        table = pd.DataFrame(rows, columns=["analysis", "error", "±", "pairs", "note"])
        return Calibration(pd.DataFrame(), table, np.ones(20), {}, 10)

    rows = [("background", 1.0, 0.01, 10, ""), ("3D-Var", 0.8, 0.01, 10, ""), ("PnP-DA, 1 iteration", 0.5, 0.01, 10, "")]
    assert verdict(calibration(rows)) == (
        "With this prior analyses were better than with the best of the others (3D-Var). Missing among the others: "
        "regression + Kalman step (not tried)."
    )
    lost = [
        *rows[:2],
        ("regression + Kalman step", 0.4, 0.01, 10, ""),
        ("PnP-DA, 1 iteration", math.nan, math.nan, 10, "not finite in 3 of 10 pairs"),
    ]
    assert verdict(calibration(lost)).startswith("With this prior there was no finite analysis of every pair")
    single = [(name, error, math.nan, 1, "") for name, error, *_ in lost[:3]] + [("PnP-DA, 1 iteration", 0.1, math.nan, 1, "")]
    assert verdict(calibration(single)).startswith("There are too few pairs to tell")


def test_that_few_pairs_give_an_error_of_unknown_accuracy_and_not_a_crash():
    found = trained(*pairs())
    part, _, last = set_aside(source(*pairs()))
    one = trials.calibrate(found.prior, part, Part(last, 0, 1), stream(0))
    assert np.isfinite(one.trial.error).all() and one.trial["±"].isna().all() and math.isnan(one.coverage[0.9][1])
    for count in (50, 51, 59, 101):
        parts = set_aside(source(*pairs(count)))
        assert sum(p.count for p in parts) == count and parts[1].count == parts[2].count >= 5


@pytest.mark.parametrize("dim, count", [(1, 50), (1, 10**9), (10**6, 50), (10**7, 10**6)])
def test_that_usual_settings_fit_states_of_any_size(dim, count):
    settings = usual_settings(dim, count)
    assert 32 <= settings.hidden[0] <= 1024 and 8 <= settings.batch <= max(8, count // 8) and 30 <= settings.epochs <= 1000


# ---------------------------------------------------------------- arguments


@pytest.fixture(scope="module")
def prior() -> FlowPrior:
    return trained(*pairs()).prior


def some_states(prior: FlowPrior) -> tuple[States, StationObservations]:
    states = States(torch.zeros(2, 1, DIM, dtype=torch.float64), Layout.plain(DIM), {}, (), ())
    return states, StationObservations(np.zeros((2, 1)), np.ones(1), ("",), np.zeros((1, 1), int), np.ones((1, 1)), DIM)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"iterations": 0}, "iterations: expected a whole number from 1 to 100000, got 0"),
        ({"iterations": 10**20}, "iterations: expected a whole number"),
        ({"iterations": 2.5}, "iterations: expected a whole number"),
        ({"iterations": True}, "iterations: expected a whole number"),
        ({"ensemble": 0}, "ensemble: expected a whole number from 1 to 100000, got 0"),
        ({"ensemble": 10**30}, "ensemble: expected a whole number"),
        ({"seed": 2**63}, "seed: expected a whole number of at most 63 bits"),
        ({"seed": "1"}, "seed: expected a whole number"),
        ({"seed": 1.0}, "seed: expected a whole number"),
    ],
)
def test_that_arguments_of_an_assimilation_out_of_range_are_named(prior, options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        assimilate(prior, *some_states(prior), **options)
    if "seed" in options:
        with pytest.raises(ValueError, match="^seed: expected"):
            trained(*pairs(), seed=options["seed"])


def test_that_states_and_observations_that_do_not_fit_are_named(prior):
    states, seen = some_states(prior)
    assert assimilate(prior, states, seen, seed=-(2**62)).shape == (2, 1, DIM)
    for changed, message in (
        ((dataclasses.replace(states, values=states.values[..., :5]), seen), "states: expected 12 numbers"),
        ((states, dataclasses.replace(seen, values=np.zeros((3, 1)))), "sightings: expected 2 states of 12 numbers"),
        ((states, dataclasses.replace(seen, dim=11)), "sightings: expected 2 states of 12 numbers"),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            assimilate(prior, *changed)
    with pytest.raises(ValueError, match="^values: expected finite numbers, got 24"):
        dataclasses.replace(states, values=states.values / 0)
    for name, value in (
        ("iterations", torch.tensor(1e30)),
        ("iterations", torch.zeros(2)),
        ("increment", torch.ones(3)),
        ("increment", -torch.ones(DIM)),
    ):
        forged = errors._with(prior, **{name: value.double()})
        with pytest.raises(ValueError, match="^prior: expected"):
            assimilate(forged, states, seen)


# ---------------------------------------------------------------- reports

HOSTILE = (
    '<script>alert(1)</script>|`a`[x](javascript:y)*b*_c_$x_1$\n# d\r\n1. e \u202eevil\ud800 "><img src=x onerror=z> &amp; '
    "~~f~~ 漢字 \x00"
)


def hostile_report() -> Report:
    report = Report(HOSTILE)
    report.heading(HOSTILE)
    report.text(HOSTILE)
    report.table(pd.DataFrame({HOSTILE: [HOSTILE, math.nan, 1.23456, 7]}), HOSTILE)
    figure, _ = reports.plt.subplots()
    report.figure(figure, HOSTILE)
    return report


def test_that_words_are_words_in_html():
    page = hostile_report().html()
    body = page[page.index("<body>") :]
    elements = set(re.findall(r"<(/?[a-z0-9]+)", body))
    assert elements <= {
        e
        for name in (
            "body",
            "h1",
            "h2",
            "p",
            "figure",
            "figcaption",
            "div",
            "table",
            "thead",
            "tbody",
            "tr",
            "th",
            "td",
            "img",
            "html",
        )
        for e in (name, f"/{name}")
    }
    assert body.count("<img") == 1 and "onerror=z&gt;" in body and not re.search(r'alt="[^"]*<', body)
    assert "<td>–</td>" in body and "<td>1.23</td>" in body and "\u202e" not in page and page.encode()


def test_that_words_are_words_in_markdown(tmp_path):
    text = hostile_report().markdown(Path("a b(c).md"))
    assert not re.search(r"<[a-z/!]", text) and text.encode()
    lines = text.splitlines()
    assert sum(line.startswith("#") for line in lines) == 2  # the title and the heading
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 6 and all(len(re.findall(r"(?<!\\)\|", line)) == 2 for line in table)
    assert re.findall(r"(?<!\\)\]\(([^)]*)\)", text) == ["a%20b%28c%29_files/3.png"]
    assert not re.search(r"(?<!\\)[`*_$~]", text.replace("_files/", ""))


@pytest.mark.parametrize("words", ["- a", "+ a", "1. a", "12) a", "---", "===", "# a", "  > a", "    a", "-", "1."])
def test_that_a_paragraph_is_no_list_line_or_quotation(words):
    pypandoc = pytest.importorskip("pypandoc")
    report = Report("t")
    report.text(words)
    page = pypandoc.convert_text(report.markdown(Path("a.md")), "html", format="gfm")
    assert re.findall(r"<(\w+)", page) == ["h1", "p"] and words.strip().replace(">", "&gt;") in page


@given(st.text(max_size=40))
def test_that_any_name_can_be_written_in_both_languages(name):
    report = Report(name)
    report.text(name)
    report.table(pd.DataFrame({"a": [name]}), name)
    for text in (report.html(), report.markdown(Path("a.md"))):
        text.encode()
        assert "<script" not in text
    assert len(report.markdown(Path("a.md")).splitlines()) == len(Report("x").markdown(Path("a.md")).splitlines()) + 8


def test_that_a_report_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    report, write = hostile_report(), Path.write_bytes
    for broken in (".png", ".md"):

        def full(path, content, broken=broken):
            if path.name.endswith(broken):
                raise OSError(28, "No space left on device")
            return write(path, content)

        monkeypatch.setattr(Path, "write_bytes", full)
        with pytest.raises(OSError, match="cannot write .* .No space left on device"):
            report.write(tmp_path / "r.md")
        assert not list(tmp_path.iterdir())
    monkeypatch.setattr(Path, "write_bytes", write)
    report.write(tmp_path / "r.md")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    assert len(before) == 2
    monkeypatch.setattr(Path, "write_bytes", full)
    changed = hostile_report()
    changed.blocks[-1] = ("figure", b"another", "")
    with pytest.raises(OSError):
        changed.write(tmp_path / "r.md")
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("name", [r"$\frac{$", "a$b", r"\$x_1$", "漢字 🌊", HOSTILE, "n" * 500, "%s {0}"])
@pytest.mark.parametrize("shape", [(12,), (3, 4), (2, 2, 3)])
@pytest.mark.filterwarnings("error")
def test_that_any_name_and_unit_can_be_drawn(name, shape):
    dims = tuple(f"{name}{i}" for i in range(len(shape)))
    values = {12: (350.0, 355.0, 0.0), 3: (0.0, 5.0, 4.0)}.get(shape[0], (1.0, math.nan))
    axes = {
        dims[0]: Axis(
            (*values, *range(10, 10 + shape[0] - len(values))) if shape[0] > 2 else values, name, 360.0 if shape[0] == 12 else None
        )
    }
    layout = Layout((Field(name, shape, dims, name),), axes)
    states = States(torch.zeros(1, 1, DIM, dtype=torch.float64), layout, {}, (), ())
    seen = StationObservations(np.ones((1, 1)), np.ones(1), (name,), np.zeros((1, 1), int), np.ones((1, 1)), DIM)
    report = Report("r")
    report.figure(reports.draw_increments(layout.fields[0], states, states.values + 1, seen), name)
    assert report.blocks[0][1].startswith(b"\x89PNG")


def test_that_refused_values_are_listed(prior):
    states, seen = some_states(prior)
    seen = dataclasses.replace(seen, refused=tuple(("state", f"station {i}", -9999.0) for i in range(23)))
    report = assimilation_report(prior, states, states.values, seen, "b")
    assert "station 19" in report.html() and "station 20" not in report.html() and "23, of which 20 are listed" in report.html()
    assert innovations(states, states.values, seen).refused.tolist() == [23]
    assert "refused" not in innovations(states, states.values, some_states(prior)[1])
    assert attached_unit(prior).shape == (DIM,)


def test_that_single_precision_states_are_analysed_as_double(prior):
    states, seen = some_states(prior)
    single = dataclasses.replace(states, values=standard_normal((2, 1, DIM), stream(5)).float())
    double = dataclasses.replace(states, values=single.values.double())
    assert torch.equal(assimilate(prior, single, seen), assimilate(prior, double, seen))


def test_that_pairs_that_are_none_are_named(prior):
    background, analysis = pairs(20)
    unit = torch.ones(DIM, dtype=torch.float64)
    few = background[:, :5], analysis[:, :5]
    for call in (
        lambda: attach_errors(prior, *few, stream(0)),
        lambda: attach_errors(prior, background / 0, analysis, stream(0)),
        lambda: pseudo_observations(background, analysis[:3], stream(0)),
        lambda: scored(background, analysis[:, 0], unit),
        lambda: GaussianPrior.from_pairs(background, analysis[:3]),
        lambda: GaussianPrior.from_pairs(background[:1], analysis[:1]),
    ):
        with pytest.raises(ValueError, match="^background(, analysis)?: expected"):
            call()
    for call, message in (
        (lambda: pseudo_observations(background, analysis, stream(0), share=0), "share: expected"),
        (lambda: pseudo_observations(background, analysis, stream(0), share=math.nan), "share: expected"),
        (lambda: pseudo_observations(background, background, stream(0)), "analysis: expected increments that change"),
        (lambda: scored(background, analysis, unit[:3]), "unit: expected 12"),
        (lambda: scored(background, analysis, 0 * unit), "archive: expected points that change"),
        (lambda: survey(source(background, analysis), 21), "trained: expected 2 to 20 pairs"),
        (lambda: regression(source(background, analysis)), "pairs: expected at least 30"),
        (lambda: GaussianPrior(torch.eye(2) / 0, torch.zeros(2), Covariance(torch.eye(2))), "matrix: expected finite"),
        (
            lambda: GaussianPrior(torch.eye(2), torch.zeros(2), Covariance(torch.eye(2))).mean(torch.zeros(3).double()),
            "background: expected states of size 2",
        ),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            call()
