"""Worlds in two dimensions: what a field must keep, whatever its size, precision and company."""

import math

import pytest
import torch

from pnpda_nb.core import standard_normal, stream
from pnpda_nb.dynamics import SurfaceQuasiGeostrophic, jacobian, trajectory


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
