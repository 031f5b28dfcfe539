"""Worlds in two dimensions: what a field must keep, whatever its size, precision and company."""

import math

import pytest
import torch

from pnpda_nb.classical import LETKF
from pnpda_nb.classical.ensemble import ensemble_weights
from pnpda_nb.core import Grid, standard_normal, stream
from pnpda_nb.core.localisation import local_groups, local_tapers
from pnpda_nb.dynamics import SurfaceQuasiGeostrophic, jacobian, trajectory
from pnpda_nb.observing import Covariance, DiagonalCovariance, ObservingNetwork, Select, anomalies


def some_weather(model: SurfaceQuasiGeostrophic, runs: int = 3) -> torch.Tensor:
    """States `(run, dim)` whose waves are those of the model."""
    return model.step(10 * standard_normal((runs, model.dim), stream(1, "weather")))


@pytest.mark.parametrize("variant, factor", [("correct", 1.0), ("published", 2.25)])
def test_that_the_published_variant_carries_temperature_two_and_a_quarter_times_as_fast_as_the_wind(variant, factor):
    calm = {"size": 16, "relaxation": math.inf}
    x = some_weather(SurfaceQuasiGeostrophic(size=16))
    by_wind = SurfaceQuasiGeostrophic(**calm).tendency(x)
    torch.testing.assert_close(SurfaceQuasiGeostrophic(**calm, variant=variant).tendency(x), factor * by_wind)


@pytest.mark.parametrize("size, waves", [(16, None), (24, 7), (32, 5)])
def test_that_advection_creates_neither_variance_nor_energy(size, waves):
    model = SurfaceQuasiGeostrophic(size=size, waves=waves, relaxation=math.inf)
    x = some_weather(model)
    slope, psi = model.tendency(x), model.streamfunction(x)
    for keeps in (x, psi):
        gain = (slope * keeps).unflatten(-1, (2, -1)).sum(-1)
        gain = gain if keeps is x else gain[..., 1:] - gain[..., :1]
        assert (gain.abs() < 1e-12 * (slope.norm(dim=-1) * keeps.norm(dim=-1))[:, None]).all()


def test_that_the_points_do_not_matter_to_the_waves():
    fine, coarse = (SurfaceQuasiGeostrophic(size=n, waves=10, diffusion=1e300) for n in (64, 24))
    x = some_weather(SurfaceQuasiGeostrophic(size=64, waves=10))
    every = x.unflatten(-1, (2, 64, 64))[..., ::8, ::8]
    shared = 8 * torch.arange(8)
    moved = fine.step(x).unflatten(-1, (2, 64, 64))
    spectrum = torch.fft.rfft2(x.unflatten(-1, (2, 64, 64)), norm="forward")
    small = torch.zeros(3, 2, 24, 13, dtype=torch.complex128)
    small[..., :11, :11], small[..., -10:, :11] = spectrum[..., :11, :11], spectrum[..., -10:, :11]
    on_few = torch.fft.irfft2(small, s=(24, 24), norm="forward")
    torch.testing.assert_close(on_few[..., ::3, ::3], every)
    torch.testing.assert_close(
        coarse.step(on_few.flatten(-3)).unflatten(-1, (2, 24, 24))[..., ::3, ::3], moved[..., shared, :][..., shared]
    )


def test_that_a_batch_is_as_each_of_it_to_the_bit_in_both_precisions():
    model = SurfaceQuasiGeostrophic(size=16, substeps=2)
    for dtype in (torch.float64, torch.float32):
        x = some_weather(model, 9).to(dtype)
        together = model.step(x)
        assert together.dtype == dtype and all(
            torch.equal(model.step(x[i : i + k]), together[i : i + k]) for i, k in ((0, 1), (3, 5))
        )
        assert torch.equal(model.step(x.reshape(3, 3, -1)), together.reshape(3, 3, -1)) and model.step(x[:0]).shape == (0, 512)
    assert (together.double() - model.step(some_weather(model, 9))).abs().max() < 1e-4


def test_that_steps_and_substeps_are_the_same_and_derivatives_are_those_of_differences():
    model = SurfaceQuasiGeostrophic(size=8, dt=2.0, substeps=2, waves=3)
    x = some_weather(model, 1)[0]
    hourly = trajectory(SurfaceQuasiGeostrophic(size=8, dt=1.0, waves=3), x, 2)[-1]
    torch.testing.assert_close(model.step(x), hourly)
    slopes, h = jacobian(model, x), 1e-5
    bump = torch.zeros(128, dtype=torch.float64)
    bump[17] = h
    torch.testing.assert_close((model.step(x + bump) - model.step(x - bump)) / (2 * h), slopes[:, 17], rtol=1e-5, atol=1e-8)


def test_that_the_grid_knows_where_the_numbers_are():
    model = SurfaceQuasiGeostrophic(size=8)
    apart = model.grid(torch.tensor([0, 0, 0]), torch.tensor([1, 7, 64 + 8]))
    assert apart.tolist() == [2.5e6, 2.5e6, 2.5e6] and model.grid.dim == model.dim == 128


@pytest.mark.parametrize("wrong, told", [({"waves": 32}, "waves: expected 1 to 31"), ({"size": 9}, "size"), ({"dt": 0.0}, "dt")])
def test_that_what_does_not_fit_is_refused_by_name(wrong, told):
    with pytest.raises(ValueError, match=told):
        SurfaceQuasiGeostrophic(**wrong)
    with pytest.raises(ValueError, match="state: expected states of size 8192"):
        SurfaceQuasiGeostrophic().step(torch.zeros(3))


def looked_at(model: SurfaceQuasiGeostrophic, columns: int, members: int = 20):
    """An ensemble `(1, member, dim)` of weather with errors of the day, its truth, and what is seen of that at some columns."""
    state = trajectory(model, some_weather(model, 1), 60, every=60)[-1]
    near = state + 0.3 * some_weather(model, members + 1)
    truth, ensemble = trajectory(model, near, 16, every=16)[-1].split((1, members))
    points = model.size**2
    chosen = torch.randperm(points, generator=stream(1, "columns"))[:columns].sort().values
    sites = torch.cat((chosen, chosen + points)).tolist()
    network = ObservingNetwork(Select(sites, model.dim), DiagonalCovariance(torch.ones(2 * columns)))
    return ensemble[None], truth, network.observe(truth, stream(1, "errors"))


@pytest.mark.parametrize("every, apart", [(2, 0.1), (4, 0.25)])
def test_that_weights_at_some_points_are_nearly_as_good_as_at_all(every, apart):
    model = SurfaceQuasiGeostrophic(size=32, dt=6.0, substeps=6, diffusion=1.0)
    ensemble, truth, seen = looked_at(model, 64)
    wide = {"half_width": 4 * model.grid.spacing[0], "distance": model.grid}
    all_, some = (LETKF(**wide, every=n).analyse(ensemble, seen, forecast=None, generator=None) for n in (1, every))
    assert (some - all_).norm() < apart * (all_ - ensemble).norm()
    before, exact, coarse = ((x.mean(-2) - truth).norm() for x in (ensemble, all_, some))
    assert coarse < 1.02 * exact and exact < 0.95 * before


def test_that_interpolated_weights_reach_the_end_of_axes_and_leave_land_out():
    land = torch.zeros(5, 7, dtype=torch.bool)
    land[1:3, 2:4] = True
    grid = Grid((5, 7), ("zeros", "circular"), channels=2, land=land)
    ensemble = standard_normal((2, 6, grid.dim), stream(1, "members"))
    seen = ObservingNetwork(Select((0, 20), grid.dim), DiagonalCovariance([0.5, 0.5])).observe(ensemble[:, 0], stream(1, "errors"))
    moved = LETKF(half_width=50.0, distance=grid, every=3).analyse(ensemble, seen, forecast=None, generator=None)
    everywhere = LETKF(half_width=50.0, distance=grid).analyse(ensemble, seen, forecast=None, generator=None)
    assert (moved - everywhere).norm() < 0.05 * (everywhere - ensemble).norm()  # tapers are flat, and so are weights
    with pytest.raises(ValueError, match="every: expected 1 for distances that are given by a function"):
        LETKF(distance=lambda i, j: (i - j).abs().double(), every=2).analyse(ensemble, seen, forecast=None, generator=None)


def test_that_the_channels_of_a_point_share_the_weights_that_each_of_them_had():
    grid = Grid((4, 6), "circular", channels=2)
    ensemble = standard_normal((2, 5, 48), stream(1, "members"))
    seen = ObservingNetwork(Select((0, 30), 48), DiagonalCovariance([0.5, 0.5])).observe(ensemble[:, 0], stream(1, "errors"))
    for_itself = grid.__call__  # a function, for which every number is a point
    answers = (LETKF(half_width=2.0, distance=d).analyse(ensemble, seen, forecast=None, generator=None) for d in (grid, for_itself))
    shared, own = answers
    torch.testing.assert_close(shared, own)


@pytest.mark.parametrize("correlated", [False, True])
def test_that_points_in_groups_have_the_weights_of_each_alone_and_the_same_bits_in_any_company(correlated):
    grid, members = Grid((20, 20), "circular", channels=2), 9
    sites = tuple(torch.randperm(800, generator=stream(1, "sites"))[:120].tolist())
    R = torch.diag(0.5 + torch.rand(120, generator=stream(1, "variances"), dtype=torch.float64))
    R = R + 0.2 if correlated else R
    network = ObservingNetwork(Select(sites, 800), Covariance(R) if correlated else DiagonalCovariance(R.diagonal()))
    ensemble, values = standard_normal((3, members, 800), stream(1, "members")), standard_normal((3, 120), stream(1, "values"))
    method, answer = LETKF(half_width=1.3, distance=grid), {"forecast": None, "generator": None}
    together = method.analyse(ensemble, network.report(values), **answer)
    alone = [method.analyse(ensemble[run : run + 1], network.report(values[run : run + 1]), **answer) for run in range(3)]
    assert torch.equal(torch.cat(alone), together)

    groups, (number, taper) = local_groups(grid, sites, 1.3), local_tapers(grid, sites, 1.3)
    assert torch.cat([points for points, *_ in groups]).sort().values.tolist() == list(range(400))
    widths = [near.shape[1] for _, near, _ in groups]
    assert len(groups) > 2 and min(widths) < members < max(widths)
    shown, miss = anomalies(ensemble[..., list(sites)]), values - ensemble[..., list(sites)].mean(-2)
    for point in [points[0] for points, *_ in groups]:
        at, weight = number[point][taper[point] > 0], taper[point][taper[point] > 0].sqrt()
        precision = torch.linalg.inv(R[at][:, at]) * weight * weight[:, None]
        mean, transform = ensemble_weights(
            shown[..., at] @ precision @ shown[..., at].mT, (shown[..., at] @ (precision @ miss[:, at].unsqueeze(-1))).squeeze(-1)
        )
        here = ensemble[..., [point, 400 + point]]
        expected = here.mean(-2, keepdim=True) + (mean.unsqueeze(-2) + transform) @ anomalies(here)
        torch.testing.assert_close(together[..., [point, 400 + point]], expected, rtol=1e-10, atol=1e-10)
