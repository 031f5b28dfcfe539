"""Priors that see observations, from archives: they begin as the best linear analysis, and say when they bring nothing more."""

from dataclasses import dataclass, replace
from dataclasses import field as kept_in

import numpy as np
import pytest
import torch
import xarray as xr

from pnpda_nb.cli import words
from pnpda_nb.core import Grid, progress, stream, training
from pnpda_nb.files import Axis, Field, Layout
from pnpda_nb.files.layout import layout_from_record, layout_record
from pnpda_nb.flow_matching import TensorPairs
from pnpda_nb.flow_matching.convolutions import ConvolutionNetwork
from pnpda_nb.observing import DenseError, DiagonalCovariance, FactoredError, Interpolate, Observations, Select
from pnpda_nb.operations import (
    AwarePrior,
    AwareSettings,
    Networks,
    aware,
    cases,
    errors,
    learn_archive,
    learning,
    linear,
    linear_tuning,
    set_aside,
)
from pnpda_nb.operations.aware import _InRows, draw_around, geometry_of, look_at
from pnpda_nb.operations.cases import Cases, _ahead
from pnpda_nb.operations.errors import Part, looks_swapped
from pnpda_nb.operations.linear import LinearAnalysis
from pnpda_nb.operations.linear_tuning import _standing
from pnpda_nb.operations.local import Boxes, LocalError
from pnpda_nb.operations.verdicts import draw_maps, learning_report, learning_verdict

TINY = AwareSettings(epochs=2, steps=3, batch=16, width=8)
RING = Layout(
    (Field("u", (8,), ("longitude",), "m s-1"), Field("q", (8,), ("longitude",), "kg kg-1")),
    {"longitude": Axis(tuple(45.0 * np.arange(8)), "degrees_east")},
)


def pairs(layout: Layout | None = None, count: int = 200, seed: int = 0) -> TensorPairs:
    """Backgrounds whose errors are larger where they are, of two variables of very different sizes."""
    draws, dim = stream(seed, "pairs"), 6 if layout is None else layout.dim
    b = torch.randn(count, dim, generator=draws, dtype=torch.float64)
    a = 0.8 * b + b.abs() * torch.randn(count, dim, generator=draws, dtype=torch.float64) / 2
    size = torch.ones(dim, dtype=torch.float64)
    size[dim // 2 :] = 1e-3
    record = None if layout is None else layout_record(layout)
    return TensorPairs(size * b, size * a, f"pairs {seed}", 32, record)


@pytest.fixture(scope="module")
def learned():
    return learn_archive(pairs(RING), TINY, seed=1)


def seen_at(sites, state, error, dim):
    return Observations(state[..., list(sites)], Select(tuple(sites), dim), DiagonalCovariance(error[list(sites)] ** 2))


def test_that_the_network_is_told_coordinates_along_axes_with_ends_and_not_along_circles():
    globe = Grid.sphere((60.0, 20.0, -20.0, -60.0), tuple(45.0 * np.arange(8)), channels=("t", "q"))
    told = aware._places(torch.arange(64.0).double(), torch.ones(64).double(), globe)
    assert set(told) == {"relief", "activity", "coordinate_0"}
    assert torch.allclose(told["coordinate_0"] * 2000**0.5, globe.positions[:, 0], rtol=0.02)
    assert set(aware._places(torch.zeros(16).double(), torch.ones(16).double(), RING.grid)) == {"relief", "activity"}


def test_that_a_grid_of_which_one_row_is_sea_has_no_coordinate_along_rows():
    land = torch.ones(1, 3, 6, dtype=torch.bool)
    land[:, 1] = False
    rows = Grid((3, 6), ("zeros", "zeros"), land=land)
    told = aware._places(torch.arange(6.0).double(), torch.ones(6).double(), rows)
    assert set(told) == {"relief", "activity", "coordinate_1"} and all(torch.isfinite(x).all() for x in told.values())


def test_that_rows_of_a_state_without_a_grid_are_refused():
    with pytest.raises(ValueError, match="settings: expected rows=0 for states without a grid, got 3"):
        learn_archive(pairs(), replace(TINY, rows=3), seed=1)


def test_that_before_training_the_prior_is_the_linear_analysis():
    source = pairs(RING)
    trained, stopping, *_ = set_aside(source, ends=3)
    unit, parts = (source.analysis - source.background).std(0), list(RING.parts().values())
    cases = Cases.drawn(stopping.read(), Networks(), unit, parts, stream(0), 2)
    best = linear_tuning.fit_linear(trained, cases, unit, RING.grid)["3D-Var"].analysis
    prior = learning._untrained(trained, best, unit, RING.grid, TINY, 0)
    b, a = (x[:3, None] for x in stopping.read())
    seen = seen_at((1, 4, 9), a[:, 0], unit / 3, 16)
    looked, mean = look_at(prior, b, seen), best.line(b)
    kalman = mean + linear.kalman_increment(best.errors, mean, seen)
    assert torch.allclose(looked.mean, kalman, rtol=1e-6, atol=1e-9)
    spread = best.spread(torch.zeros(1, 16).bool().index_fill(1, torch.tensor([1, 4, 9]), True), unit[None] / 3)
    assert torch.allclose(looked.residual.diagonal.sqrt(), spread[:, None].expand(3, 1, 16), rtol=1e-3)


@pytest.mark.parametrize("factored", [False, True])
def test_that_the_spread_is_that_of_the_kalman_step(factored):
    draws = stream(2)
    L, d = torch.randn(7, 2, generator=draws).double(), torch.rand(7, generator=draws).double() + 0.1
    B, mask, error = L @ L.T + torch.diag(d), torch.rand(4, 7, generator=draws) < 0.5, torch.rand(4, 7, generator=draws).double()
    line, error = _standing(torch.zeros(7).double()), error + 0.2
    errors = FactoredError(L, d) if factored else DenseError(B)
    found = LinearAnalysis(line, errors).spread(mask, error)
    for m, e, spread in zip(mask, error, found):
        H = torch.eye(7).double()[m]
        exact = B - B @ H.T @ torch.linalg.solve(H @ B @ H.T + torch.diag(e[m] ** 2), H @ B)
        assert torch.allclose(spread, exact.diagonal().sqrt(), rtol=1e-4)
    left = error[:, None] * mask[:, None]
    both = [LinearAnalysis(line, x).increments(left, mask, error) for x in (errors, DenseError(B))]
    assert torch.allclose(*both)


def test_that_a_network_sees_the_share_it_should_and_not_what_never_changes():
    unit = torch.ones(2000).double().index_fill(0, torch.arange(100), 0.0)
    mask, error = Networks((0.2, 0.2), (0.5, 0.5)).draw(60, unit, [slice(0, 1000), slice(1000, 2000)], stream(0))
    assert not mask[:, :100].any() and mask.any(1).all() and torch.allclose(error[:, 100:], torch.tensor(0.5).double())
    share = mask[:, 100:].double().mean(1)
    assert float((share - 0.2).abs().median()) < 0.03 and float(share.min()) > 0
    with pytest.raises(ValueError, match="share: expected two numbers, the smaller first"):
        Networks(share=(0.5, 0.2))


def test_that_the_same_seed_gives_the_same_bytes_also_after_an_interruption(tmp_path, monkeypatch, learned):
    whole, checkpoint = learned.prior.to_bytes(), tmp_path / "p.training"
    run = learning.run_training

    def stopped(training, path, **options):
        def stop(number, row):
            if number == 1:
                raise KeyboardInterrupt

        run(training, path, callback=stop, **options)

    monkeypatch.setattr(learning, "run_training", stopped)
    with pytest.raises(KeyboardInterrupt):
        learn_archive(pairs(RING), TINY, seed=1, checkpoint=checkpoint)
    monkeypatch.setattr(learning, "run_training", run)
    assert learn_archive(pairs(RING), TINY, seed=1, checkpoint=checkpoint).prior.to_bytes() == whole
    with pytest.raises(ValueError, match="belongs to a training with other settings, seed or pairs"):
        learn_archive(pairs(RING), TINY, seed=2, checkpoint=checkpoint)


def test_that_a_file_gives_the_same_answers_and_a_damaged_one_is_one_line(learned, tmp_path):
    prior, source = learned.prior, pairs(RING)
    again = AwarePrior.load(prior.save(tmp_path / "p.safetensors"))
    b, seen = source.background[:2, None], seen_at((0, 11), source.analysis[:2], prior.unit, 16)
    for x in (prior, AwarePrior(prior.fields, prior.linear, prior.attached | {"learned": torch.ones(()).double()})):
        y = x if x is prior else AwarePrior.from_bytes(x.to_bytes())
        assert torch.equal(look_at(x, b, seen).mean, look_at(y, b, seen).mean)
        assert torch.equal(look_at(x, b, seen).residual.diagonal, look_at(y, b, seen).residual.diagonal)
    assert again.to_bytes() == prior.to_bytes() and again.layout == prior.layout and "held" in again.layout["variables"][0]
    line = replace(_standing(torch.zeros(16).double()), answers=torch.zeros(1, 3).double())
    odd = AwarePrior(prior.fields, replace(prior.linear, line=line), prior.attached).to_bytes()
    for content, said in ((odd, "does not fit its contents"), (odd[:-9], "truncated")):
        with pytest.raises(ValueError, match=said):
            AwarePrior.from_bytes(content)
    with pytest.raises(ValueError, match="attached: expected 16 numbers as 'calibration'"):
        AwarePrior(learned.prior.fields, learned.prior.linear, learned.prior.attached | {"calibration": torch.ones(3).double()})


def test_that_answers_do_not_depend_on_place_chance_or_company(learned):
    prior, source = learned.prior, pairs(RING)
    prior = AwarePrior(prior.fields, prior.linear, prior.attached | {"learned": torch.ones(()).double()})
    b, a = source.background[:6].reshape(3, 2, 16), source.analysis[:3]
    one = look_at(prior, b, seen_at((2, 3, 8), a, prior.unit / 2, 16))
    turned = look_at(prior, b.flip(0), seen_at((2, 3, 8), a.flip(0), prior.unit / 2, 16))
    alone = look_at(prior, b[1:2, :1], seen_at((2, 3, 8), a[1:2], prior.unit / 2, 16))
    assert torch.allclose(one.mean, turned.mean.flip(0), rtol=1e-5) and torch.allclose(one.mean[1, 0], alone.mean[0, 0], rtol=1e-5)
    drawn = draw_around(prior, one, seen_at((2, 3, 8), a, prior.unit / 2, 16), 300, stream(0))
    assert torch.allclose(drawn.std(0), one.residual.diagonal.sqrt(), rtol=0.25)


def test_that_draws_have_the_quantiles_of_errors_that_are_not_normal(learned):
    errors = stream(7, "errors")
    z = torch.randn(50_000, generator=errors).double() * (1 + 2 * (torch.rand(50_000, generator=errors) < 0.1).double())
    prior = AwarePrior(learned.prior.fields, learned.prior.linear, learned.prior.attached, learned.prior.layout)
    prior.attached = prior.attached | {"tails": learning._quantiles(z / z.std()).repeat(2, 1)}
    drawn = aware._bent(prior, torch.randn(20_000, 16, generator=errors).double())
    levels = torch.tensor([0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99]).double()
    assert torch.allclose(drawn[:, 3].quantile(levels), (z / z.std()).quantile(levels), rtol=0.06, atol=0.03)
    assert abs(float(drawn.std()) - 1) < 0.05 and abs(float(drawn.mean())) < 0.01


def test_that_what_is_missing_was_never_there_and_stations_may_lie_between_points(learned):
    prior, source = learned.prior, pairs(RING)
    prior = AwarePrior(prior.fields, prior.linear, prior.attached | {"learned": torch.ones(()).double()})
    b, a = source.background[:2, None], source.analysis[:2]
    values = a[:, [2, 3, 8]].clone()
    values[:, 1] = torch.nan
    gap = Observations(values, Select((2, 3, 8), 16), DiagonalCovariance(prior.unit[[2, 3, 8]] ** 2))
    less = seen_at((2, 8), a, prior.unit, 16)
    assert torch.allclose(look_at(prior, b, gap).mean, look_at(prior, b, less).mean, rtol=1e-6)
    place, weight = torch.tensor([[2, 3], [8, 8]]), torch.tensor([[0.75, 0.25], [1.0, 0.0]]).double()
    between = Observations(torch.ones(2, 2).double(), Interpolate(place, weight, 16), DiagonalCovariance(prior.unit[[2, 8]] ** 2))
    assert torch.isfinite(look_at(prior, b, between).mean).all()
    on = Interpolate(torch.tensor([[2, 2], [8, 8]]), torch.tensor([[1.0, 0.0], [1.0, 0.0]]).double(), 16)
    assert torch.allclose(look_at(prior, b, replace(less, operator=on)).mean, look_at(prior, b, less).mean, rtol=1e-6)


def test_that_what_never_changes_stays_as_it_is():
    source = pairs()
    source.analysis[:, 2] = source.background[:, 2]
    found = learn_archive(source, TINY, seed=1)
    prior = AwarePrior(found.prior.fields, found.prior.linear, found.prior.attached | {"learned": torch.ones(()).double()})
    seen = seen_at((1, 2), source.analysis[:3] + 1, torch.ones(6).double(), 6)
    looked = look_at(prior, source.background[:3, None], seen)
    assert torch.equal(looked.mean[..., 2], source.background[:3, None, 2]) and not looked.residual.diagonal[..., 2].any()
    assert (looked.residual.diagonal[..., [0, 1, 3, 4, 5]] > 0).all() and "never changes (state[2])" in learning_verdict(found)


@pytest.mark.parametrize(
    "layout, limit, memory, kind",
    [(RING, 4, 256_000_000, LocalError), (None, 4, 256_000_000, FactoredError), (RING, 2000, 40_000, (DenseError, LocalError))],
)
def test_that_large_states_and_small_memories_are_trained_on_too(layout, limit, memory, kind, monkeypatch):
    monkeypatch.setattr(linear_tuning, "LIMIT", limit)
    source = pairs(layout, 400)
    found = learn_archive(source, TINY, memory=memory)
    assert isinstance(found.prior.linear.errors, kind) and np.isfinite(found.findings.trial.error).all()
    prior, again = found.prior, AwarePrior.from_bytes(found.prior.to_bytes())
    b, seen = source.background[:2, None], seen_at((0, 4), source.analysis[:2], prior.unit, source.dim)
    assert torch.equal(look_at(prior, b, seen).mean, look_at(again, b, seen).mean)


def in_one_window() -> tuple[LocalError, DenseError]:
    """Errors on a ring of six points in two variables, as one box, and as a matrix."""
    boxes, draws = Boxes(Grid(6, "circular", channels=2), (1,), (6,)), stream(3)
    root = torch.randn(12, 12, generator=draws).double()
    C = root @ root.T + torch.eye(12)
    C, d = C / C.diagonal().sqrt() / C.diagonal().sqrt()[:, None], torch.rand(12, generator=draws).double() + 0.5
    return LocalError(boxes, d, C[None].float()), DenseError(C * d * d[:, None])


def test_that_covariances_between_places_are_those_of_draws():
    boxes = Boxes.of(Grid((24,), "circular"), 8)
    near = torch.exp(-(((torch.arange(boxes.numbers.shape[1])[:, None] - torch.arange(boxes.numbers.shape[1])) / 2.0) ** 2)).float()
    errors = LocalError(boxes, torch.linspace(1, 2, 24).double(), near[None])
    some = torch.tensor([0, 1, 5, 23])
    drawn = errors.draw((40_000,), stream(1, "draws"))
    assert torch.allclose(errors.between(some, torch.arange(24)), drawn[:, some].T @ drawn / len(drawn), atol=0.06)
    assert torch.allclose(errors.between(some, some).diagonal(), errors.deviation[some].square(), rtol=1e-4)


def test_that_a_local_step_with_one_window_is_the_kalman_step():
    local, dense = in_one_window()
    draws, states = stream(4), torch.zeros(3, 2, 12).double()
    place, weight = torch.tensor([[2, 3], [8, 8], [3, 3]]), torch.tensor([[0.75, 0.25], [1.0, 0.0], [0.4, 0.6]]).double()
    for operator in (Select((1, 4, 11), 12), Interpolate(place, weight, 12)):
        values = torch.randn(3, 3, generator=draws).double()
        values[1, 2] = torch.nan
        seen = Observations(values, operator, DiagonalCovariance(torch.tensor([0.3, 0.2, 0.1]).double()))
        both = [linear.kalman_increment(x, states, seen) for x in (local, dense)]
        assert torch.allclose(*both, atol=1e-4)
    mask, error = torch.rand(2, 12, generator=draws) < 0.5, torch.full((2, 12), 0.3).double()
    both = [LinearAnalysis(_standing(torch.zeros(12).double()), x).spread(mask, error) for x in (local, dense)]
    assert torch.allclose(*both, rtol=1e-3)
    drawn = local.draw((20_000,), draws)
    assert torch.allclose(drawn.T @ drawn / 20_000, dense.matrix, atol=0.05)


@pytest.mark.parametrize(
    "grid", [Grid((9, 7), ("zeros", "circular"), channels=2), Grid.sphere(np.linspace(90, -90, 9), 20.0 * np.arange(18))]
)
def test_that_boxes_hold_every_number_once(grid):
    land = torch.zeros(grid.shape, dtype=torch.bool)
    land[2:4, 1] = True
    boxes, states = Boxes.of(replace(grid, land=land), 70), torch.arange(1.0, 1 + replace(grid, land=land).dim)
    assert torch.equal(boxes.together(boxes.windows(states)[..., boxes.inner]), states) and len(boxes.numbers) > 1
    assert (boxes.targets < len(states)).sum() == len(states)
    for groups in (1, 2, boxes.count[0], len(boxes.numbers)):
        assert boxes.group(groups).unique().tolist() == list(range(groups)) and len(boxes.apart(min(groups, 2))) == min(groups, 2)


def test_that_local_analyses_are_about_as_good_as_those_of_a_dense_covariance(monkeypatch):
    layout = Layout((Field("h", (12, 12), ("y", "x"), "m"),), {k: Axis(tuple(np.arange(12.0)), "km", 12.0) for k in ("y", "x")})
    draws, grid = stream(6), layout.grid
    fields = torch.randn(2, 600, 12, 12, generator=draws).double()
    b, e = sum(fields.roll(k, -1).roll(m, -2) for k in range(3) for m in range(3)).flatten(-2) / 3
    source = TensorPairs(b, 0.7 * b + 0.7 * e, "plane", 600, layout_record(layout))
    trained, stopping, _, tested = set_aside(source, ends=3)
    unit, errors = (source.analysis - source.background).std(0), {}
    tuned, test = (Cases.drawn(p.read(), Networks(), unit, [slice(0, 144)], stream(k), 5) for k, p in enumerate((stopping, tested)))
    for kind, some in (("dense", {"SMALL": 2000}), ("local", {"LIMIT": 0, "WINDOW": 100})):
        for name, value in some.items():
            monkeypatch.setattr(linear_tuning, name, value)
        ways = linear_tuning.fit_linear(trained, tuned, unit, grid)
        errors[kind] = {k: float(cases._squares(test.analyses(w.analysis), test, unit).mean()) ** 0.5 for k, w in ways.items()}
        assert all(isinstance(w.analysis.errors, LocalError) == (kind == "local") for w in ways.values())
    assert all(errors["local"][name] < 1.02 * dense for name, dense in errors["dense"].items()) and len(errors["local"]) == 2


def test_that_the_report_says_when_the_linear_analysis_is_kept(learned):
    prior = learned.prior
    attached = prior.attached | {"learned": torch.zeros(()).double()}
    kept = replace(learned, prior=AwarePrior(prior.fields, prior.linear, attached, None, prior.training))
    assert "the linear analysis is kept" in learning_verdict(kept)
    page = learning_report(learned, "pairs").html()
    assert (
        page.count("<table") == 3
        and page.count("<figure") >= 3
        and "longitude 0 to 45" in page
        and "paired" in page
        and "Intervals of 90 %" in page
    )


@pytest.mark.parametrize(
    "layout, shape",
    [
        (RING, (8,)),
        (Layout((Field("u", (8,), ("x",)),)), None),  # nobody says where its points are
        (Layout((Field("u", (3,), ("name",)),), {"name": Axis(("a", "b", "c"))}), None),
        (Layout((Field("u", (8,), ("longitude",)), Field("p")), RING.axes), None),
        (
            Layout(
                (Field("t", (2, 4, 6), ("level", "y", "x")),),
                {"x": Axis(tuple(range(6)), "km", 6.0), "y": Axis(tuple(range(4)), "km")},
            ),
            (4, 6),
        ),
    ],
)
def test_that_the_geometry_is_that_of_coordinates(layout, shape):
    grid = geometry_of(layout)
    assert (grid and grid.shape) == shape and (grid is None or len(grid.channels) * np.prod(shape) == layout.dim)


def test_that_the_maps_of_a_report_have_units_and_labels_and_this_prior_its_name():
    axes = {"lat": Axis((0.0, 1.0, 2.0), "degrees_north"), "lon": Axis((0.0, 1.0, 2.0, 3.0), "degrees_east")}
    plain = Layout((Field("t", (3, 4), ("lat", "lon"), "K"), Field("u", (3, 4), ("lat", "lon"), "m s-1")), axes)
    found = learn_archive(pairs(plain), TINY)
    figure = draw_maps(found)
    assert [ax.get_ylabel() for ax in figure.axes if ax.get_label() == "<colorbar>"] == ["K", "m s-1"]
    assert figure.axes[0].get_title() == "increments of t" and figure.axes[3].get_xlabel() == "lon (degrees_east)"
    assert figure.axes[0].get_ylabel() == "lat (degrees_north)" and found.findings.trial.analysis.iloc[-1].startswith("this prior")


def shifted(source: TensorPairs, layout: Layout, order: tuple[int, ...] = (0, 1)) -> TensorPairs:
    """Temperatures and humidities, of which analyses may have been mixed up."""
    size, offset = torch.tensor([[10.0], [1e-3]]).double(), torch.tensor([[280.0], [5e-3]]).double()
    b, a = ((x.unflatten(-1, (2, -1)) / x.unflatten(-1, (2, -1)).std((0, 2), keepdim=True) * size + offset) for x in
            (source.background, source.analysis))  # fmt: skip
    return TensorPairs(b.flatten(1), a[:, list(order)].flatten(1), "mixed", 32, layout_record(layout))


def test_that_names_that_are_swapped_are_one_warning_and_those_of_a_clean_archive_none(capsys):
    draws = stream(9)
    b, a = [], [torch.randn(3, 16, generator=draws).double()]
    for _ in range(100):  # members of an ensemble, forecast and analysed
        b.append(0.9 * a[-1] + 0.7 * torch.randn(3, 16, generator=draws).double())
        a.append(b[-1] + 0.5 * torch.randn(3, 16, generator=draws).double())
    forecasts, analyses = torch.cat(b), torch.cat(a[1:])
    assert looks_swapped(TensorPairs(forecasts, analyses, "right", 3, layout_record(RING)), 3) == ""
    said = looks_swapped(TensorPairs(analyses, forecasts, "wrong", 3, layout_record(RING)), 3)
    assert said.startswith("backgrounds and analyses look swapped") and "\n" not in said
    for source in (pairs(RING), shifted(pairs(RING), RING)):
        assert looks_swapped(source) == looks_swapped(source, 1) == ""
    said = looks_swapped(shifted(pairs(RING), RING, (1, 0)), 1)
    assert "the background of u is like the analysis of q" in said and "swapped" not in said
    assert words._roles("analysis,background") == ("analysis", "background")
    assert "WARNING: names: backgrounds are what is called 'analysis'" in capsys.readouterr().out
    for right in ("background,analysis", "b,a", "forecast,reanalysis", "truth_minus,an"):
        words._roles(right)
    assert capsys.readouterr().out == ""


def test_that_errors_that_depend_on_the_state_are_learned():
    draws = stream(5)
    b = torch.randn(3000, 4, generator=draws, dtype=torch.float64)
    a = b + torch.sin(2 * b.roll(1, -1)) + 0.2 * torch.randn(3000, 4, generator=draws, dtype=torch.float64)
    settings = AwareSettings(epochs=10, steps=60, batch=64, width=64, learning_rate=5e-3)
    found = learn_archive(TensorPairs(b, a, "sines"), settings, seed=0)
    table = found.findings.trial.set_index("analysis")
    assert found.prior.learned and (table["behind by"] > 3 * table["± (paired)"])[["3D-Var", "regression + Kalman step"]].all()
    assert 0.85 < found.findings.coverage[0] < 0.95 and "better" in learning_verdict(found)
    assert abs(4 * found.findings.ranks.reshape(4, 5).sum(1) - 1).max() < 0.3


def test_that_settings_fit_states_of_every_size():
    for grid, dim in ((None, 3), (None, 100_000), (RING.grid, 16), (Grid((181, 360), ("zeros", "circular"), channels=2), 130_320)):
        few, many = (learning.aware_settings(grid, dim, pairs) for pairs in (35, 5000))
        assert few.batch * few.steps <= 35 and 3 <= many.epochs <= 150 and few.each <= few.batch
        assert (few.rows > 0) == (dim >= learning.LARGE and grid is not None)
    assert learning.aware_settings(None, 3, 5000, epochs=7).epochs == 7


# ---------------------------------------------------------------- large states

BELT = Layout(
    (Field("t", (60, 6), ("latitude", "longitude"), "K"),),
    {
        "latitude": Axis(tuple(np.linspace(88.5, -88.5, 60)), "degrees_north"),
        "longitude": Axis(tuple(60.0 * np.arange(6)), "degrees_east", 360.0),
    },
)
IN_ROWS = replace(TINY, batch=4, each=2, rows=8)


@pytest.mark.parametrize("edges", [("pole", "circular"), ("circular", "circular"), ("zeros", "circular"), ("reflected", "zeros")])
def test_that_answers_in_some_rows_are_those_of_the_whole(edges):
    grid = Grid.sphere(np.linspace(90, -90, 31), 45.0 * np.arange(8)) if "pole" in edges else Grid((31, 8), edges)
    network = ConvolutionNetwork(2, 3, stream(0), boundary=grid, width=6, kernel=3, dilations=(1, 2, 1))
    torch.nn.init.normal_(network.last.weight, generator=stream(1))
    fields = torch.randn(2, 2, 31, 8, generator=stream(2))
    whole = network(fields, torch.zeros(1, 1))
    assert network.sight == 6
    for rows in (slice(0, 5), slice(11, 19), slice(26, 31)):
        some = _InRows(network, rows)(fields, torch.zeros(1, 1))
        assert torch.allclose(some[..., rows, :], whole[..., rows, :], atol=1e-5)
        assert some.shape == whole.shape and not some[..., : rows.start, :].any() and not some[..., rows.stop :, :].any()


def in_rows(source: TensorPairs, settings: AwareSettings, fitted=None) -> learning._Learning:
    """What is trained on some rows of a state, from the linear analysis on."""
    trained, stopping, *_ = set_aside(source, ends=3)
    unit, layout = (source.analysis - source.background).std(0), layout_from_record(source.layout)
    parts = list(layout.parts().values())
    tuned = Cases.drawn(stopping.read(), Networks(), unit, parts, stream(0), 2)
    way = (fitted or linear_tuning.fit_linear(trained, tuned, unit, layout.grid))["3D-Var"]
    prior = learning._untrained(trained, way.analysis, unit, layout.grid, settings, 0)
    pairs = learning._Pairs(trained, 0, 256_000_000, 100)
    return learning._Learning(prior, way.halves, pairs, tuned, Networks(), settings, parts, 0, torch.device("cpu"))


def test_that_a_step_learns_from_some_rows_as_it_would_from_all_of_them(monkeypatch):
    subject = in_rows(pairs(BELT, 80), IN_ROWS)
    torch.nn.init.normal_(subject.network.last.weight, std=0.1, generator=stream(1))
    seen = set()
    for target, look, rows in subject.batches(0):
        seen.add(rows.start)
        within = subject._within(rows)
        assert rows.stop - rows.start == 8 and int(within.sum()) == 8 * 6
        some = subject._scores(subject.network, target, look, rows)
        monkeypatch.setattr(learning, "_InRows", lambda network, _: network)  # the whole network, and the same rows of it
        whole = subject._scores(subject.network, target, look, rows)
        monkeypatch.undo()
        assert all(torch.allclose(x, y, rtol=1e-4) for x, y in zip(some, whole))
    assert len(seen) > 1


def test_that_training_on_rows_gives_the_same_bytes_whatever_thread_makes_the_batches(monkeypatch, tmp_path):
    source, run = pairs(BELT, 80), learning.run_training
    whole = learn_archive(source, IN_ROWS, seed=1).prior.to_bytes()

    def stopped(training, path, **options):
        def stop(number, row):
            raise KeyboardInterrupt

        run(training, path, callback=stop, **options)

    monkeypatch.setattr(learning, "run_training", stopped)
    with pytest.raises(KeyboardInterrupt):
        learn_archive(source, IN_ROWS, seed=1, checkpoint=tmp_path / "p.training")
    monkeypatch.setattr(learning, "run_training", run)
    monkeypatch.setattr(learning, "_ahead", lambda batches: batches)
    assert learn_archive(source, IN_ROWS, seed=1, checkpoint=tmp_path / "p.training").prior.to_bytes() == whole


def test_that_batches_come_in_order_and_an_error_arrives():
    assert list(_ahead(iter("abc"))) == ["a", "b", "c"] and list(_ahead(iter(()))) == []

    def failing():
        yield 1
        raise ValueError("archive: is gone")

    with pytest.raises(ValueError, match="archive: is gone"):
        list(_ahead(failing()))


@dataclass(frozen=True)
class Watched(TensorPairs):
    """Pairs that know how many of them were read at a time."""

    sizes: list = kept_in(default_factory=list)

    def read(self, first: int, last: int):
        self.sizes.append(last - first)
        return super().read(first, last)


def test_that_what_is_held_of_an_archive_does_not_grow_with_it(monkeypatch):
    held, memory = [], 1_000_000
    for count in (300, 600):
        made = pairs(BELT, count)
        source = Watched(made.background, made.analysis, "long", 1, made.layout)
        part = Part(source, 0, count)
        nothing = LinearAnalysis(_standing(torch.zeros(360).double()), DenseError(torch.eye(360).double()))
        unit = (made.analysis - made.background).std(0)
        prior = learning._untrained(part, nothing, unit, BELT.grid, TINY, 0, memory)
        assert torch.allclose(prior.fields.location, torch.cat((made.background, made.analysis)).mean(0))
        epoch = learning._Pairs(part, 0, memory, 10_000).of_epoch(0)
        held.append((max(source.sizes), len(epoch[0])))
        number = (made.background[:, None] == epoch[0][::9]).all(-1).nonzero()[:, 0]  # whose pairs these are
        assert torch.equal(number >= count // 2, epoch[2][::9]) and torch.equal(made.analysis[number], epoch[1][::9])
    assert held[0] == held[1] and 16 * 360 * max(held[0]) <= memory


def test_that_every_stage_of_a_training_says_how_far_it_is(monkeypatch):
    bars = []
    for module in (cases, linear_tuning, errors, training):
        monkeypatch.setattr(
            module, "tqdm", lambda *args, bar=module.tqdm, **kw: bars.append([*args, kw.get("desc")]) or bar(*args, **kw)
        )
    learn_archive(pairs(BELT, 80), replace(IN_ROWS, epochs=1), progress=True)
    said = [next(x for x in bar if isinstance(x, str)) for bar in bars]
    stages = ["survey", "statistics", "tuning", "units", "validation cases", "training", "choice", "verdict", "ranks"]
    assert [name for name in dict.fromkeys(said) if name in stages] == stages


def test_that_a_log_has_lines_with_the_time_left_now_and_then_where_there_is_no_terminal(monkeypatch, capsys):
    monkeypatch.setattr(progress, "_LAST", [])
    for pause, count in ((30.0, 0), (-1.0, 4)):
        monkeypatch.setattr(progress, "_BETWEEN", pause)
        assert list(cases._watched("abcd", "verdict", "part", True)) == [*"abcd"]
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == count and all(line.startswith("verdict: ") and line.endswith(" s left") for line in lines)
    learn_archive(pairs(RING), TINY, progress=True)
    said = capsys.readouterr().err
    assert (
        "training: 1 of 2 epochs, about" in said and "(validation " in said and "survey: 200 of 200 pairs, about 0 s left" in said
    )


# ---------------------------------------------------------------- from the shell


@pytest.fixture(scope="module")
def files(tmp_path_factory, forked):
    folder, draws = tmp_path_factory.mktemp("aware"), np.random.default_rng(0)
    b = 280 + draws.standard_normal((120, 6))
    b[:, 4] = np.nan  # land
    a = b + 0.5 * draws.standard_normal((120, 6))
    lon = ("lon", 60.0 * np.arange(6), {"units": "degrees_east"})
    said = {"units": "K", "standard_name": "air_temperature"}
    data = {f"t_{role}": (("time", "lon"), x, said) for role, x in (("background", b), ("analysis", a))}
    world = xr.Dataset(data, {"lon": lon, "time": np.arange(120)})
    world.to_netcdf(folder / "pairs.nc")
    celsius = world[["t_background"]].isel(time=slice(117, 120)) - 273.15
    celsius.t_background.attrs = said | {"units": "degC", "valid_min": -50.0}
    celsius.to_netcdf(folder / "today.nc")
    (folder / "seen.csv").write_text("value,error,lon,units\n280.5,0.2,60,K\n279.5,0.2,150,K\n")
    (folder / "seen.nc").unlink(missing_ok=True)
    seen = {"value": (("time", "station"), a[117:, [1, 2]], {"units": "K"}), "error": ("station", [0.2, 0.2])}
    xr.Dataset(seen, {"lon": ("station", [60.0, 120.0]), "time": [117, 118, 119]}).to_netcdf(folder / "seen.nc")
    answer = forked("train", "pairs.nc", "--out", "prior.safetensors", "--epochs", 1, folder=folder)
    assert answer.returncode == 0 and "pairs that were set aside" in answer.stdout, answer.stderr
    return folder


GIVEN = ["assimilate", "--prior", "prior.safetensors", "--background", "today.nc", "--observations", "seen.nc"]


def test_that_an_analysis_comes_with_its_standard_deviation_and_draws(files, tmp_path, forked):
    for name in ("a", "b"):
        answer = forked(*GIVEN, "--members", 4, "--out", tmp_path / f"{name}.nc", folder=files)
        assert answer.returncode == 0, answer.stderr
    assert "AwarePrior" in forked("describe", "prior.safetensors", folder=files).stdout
    with xr.open_dataset(tmp_path / "a.nc") as a, xr.open_dataset(tmp_path / "b.nc") as b, xr.open_dataset(files / "today.nc") as t:
        assert a.equals(b) and set(a.data_vars) == {"t_analysis", "t_analysis_std", "t_analysis_draws"}
        assert a.t_analysis.shape == t.t_background.shape and a.t_analysis_draws.sizes == {"draw": 4, "time": 3, "lon": 6}
        assert a.t_analysis.attrs["ancillary_variables"] == "t_analysis_std" and "valid_min" not in a.t_analysis_std.attrs
        assert a.t_analysis_std.attrs["standard_name"] == "air_temperature standard_error"
        spread = a.t_analysis_std.values
        assert np.isnan(spread[:, 4]).all() and (np.delete(spread, 4, 1) > 0).all() and np.nanmax(spread) < 3  # not in kelvins
        assert (spread[:, 1] < spread[:, 5]).all() and abs(a.t_analysis - t.t_background.values).max() < 5
    assert "Standard deviations" in (tmp_path / "a.html").read_text()


def test_that_times_in_another_order_or_alone_have_the_same_analyses(files, tmp_path, forked):
    orders = {"all": [0, 1, 2], "turned": [2, 0, 1], "one": [1]}
    for name, order in orders.items():
        for role in ("today", "seen"):
            with xr.open_dataset(files / f"{role}.nc") as data:
                data.isel(time=order).to_netcdf(tmp_path / f"{role}_{name}.nc")
        words = ["--background", f"today_{name}.nc", "--observations", f"seen_{name}.nc", "--out", f"{name}.nc"]
        answer = forked("assimilate", "--prior", files / "prior.safetensors", *words, folder=tmp_path)
        assert answer.returncode == 0, answer.stderr
    found = {name: xr.load_dataset(tmp_path / f"{name}.nc") for name in orders}
    for name, order in orders.items():
        for field in ("t_analysis", "t_analysis_std"):
            assert np.allclose(found[name][field], found["all"][field].isel(time=order), rtol=1e-6, equal_nan=True)


@pytest.mark.parametrize(
    "words, said",
    [
        ([*GIVEN, "--out", "new.nc", "--iterations", 3], "iterations: expected none with a prior of kind seeing, got 3"),
        ([*GIVEN, "--out", "new.nc", "--members", 0], "members: expected at least 1, got 0"),
        ([*GIVEN[:-1], "seen.csv", "--out", "new.nc"], "with the dimension time of the background"),
        (["train", "pairs.nc", "--out", "new.p", "--kind", "deaf"], "kind: expected seeing or blind, got 'deaf'"),
        (["train", "pairs.nc", "--out", "new.p", "--kind", "seeing", "--paper"], "kind: expected blind"),
        (["train", "pairs.nc", "--out", "new.p", "--device", "tpu"], "device: expected cpu"),
    ],
)
def test_that_what_does_not_fit_is_one_line(files, forked, words, said):
    before = sorted(p.name for p in files.iterdir())
    answer = forked(*words, folder=files)
    assert answer.returncode == 2 and said in answer.stderr and answer.stderr.count("\n") == 1, answer
    assert sorted(p.name for p in files.iterdir()) == before
