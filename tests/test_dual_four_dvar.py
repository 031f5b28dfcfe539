"""4D-Var in the space of observations: the same answers as with matrices, and states too large for one."""

import pytest
import torch

from pnpda_nb.classical import DualFourDVar, FourDVar, ThreeDVar
from pnpda_nb.core import standard_normal, stream
from pnpda_nb.core.spectral import Spectral
from pnpda_nb.dynamics import Forecast, FunctionModel, Lorenz96, SurfaceQuasiGeostrophic
from pnpda_nb.observing import Covariance, DiagonalCovariance, Nonlinear, ObservingNetwork, Select
from pnpda_nb.twin import cycle, sakov2008, scores

RING = Lorenz96(dim=8, dt=0.05)
STATES = RING.step(8 + 3 * standard_normal((4, 2, 8), stream(1, "states")))
ROOT = standard_normal((8, 8), stream(2, "root"))
B = Covariance(ROOT @ ROOT.T / 8 + torch.eye(8))


def seen_of(operator, R, times: int, missing: bool = False):
    found, state, network = [], STATES[:, 0] + standard_normal((4, 8), stream(3)), ObservingNetwork(operator, R)
    for time in range(times):
        state = RING.step(RING.step(state))
        values = network.observe(state, stream(4, time)).values
        if missing:
            values[1, 0] = torch.nan
        found.append(network.report(values))
    return found


@pytest.mark.parametrize(
    "operator, R, missing",
    [
        (Select((0, 2, 5), 8), DiagonalCovariance([0.5, 1.0, 2.0]), False),
        (Select((0, 2, 5), 8), DiagonalCovariance([0.5, 1.0, 2.0]), True),
        (Select((1, 4), 8), Covariance([[1.0, 0.5], [0.5, 2.0]]), False),
        (Nonlinear(lambda x: x[..., :3] + 0.02 * x[..., :3] ** 2, 3), DiagonalCovariance([1.0, 1.0, 1.0]), False),
    ],
)
@pytest.mark.parametrize("window, shift", [(2, 1)])
def test_that_the_dual_has_the_answer_of_the_primal(operator, R, missing, window, shift):
    seen, options = seen_of(operator, R, window, missing), {"window": window, "shift": shift, "iterations": 3}
    forecast = Forecast(RING, 2)
    primal = FourDVar(B, 0.3, **options).analyse(STATES, seen, forecast=forecast, generator=None)
    dual = DualFourDVar(B, 0.3, tolerance=1e-12, **options).analyse(STATES, seen, forecast=forecast, generator=None)
    torch.testing.assert_close(dual, primal, rtol=0, atol=1e-9)


def test_that_with_a_model_that_rests_it_is_3d_var():
    rest, seen = (
        Forecast(FunctionModel(lambda x: x, dim=8), 1),
        seen_of(Select((0, 2, 5), 8), DiagonalCovariance([0.5, 1.0, 2.0]), 1),
    )
    dual = DualFourDVar(B, 0.3, tolerance=1e-12).analyse(STATES, seen, forecast=rest, generator=None)
    torch.testing.assert_close(dual, ThreeDVar(B, 0.3).analyse(STATES, seen[0], forecast=None, generator=None))


@pytest.mark.slow
def test_that_it_cycles_on_the_benchmark_as_the_primal_does():
    from dataclasses import replace

    experiment = replace(sakov2008(cycles=30), burn_in=10)
    unit = DiagonalCovariance(torch.ones(40))
    errors = [
        float(scores(cycle(experiment, kind(unit, 0.2), runs=3, seed=1)).analysis_rmse.mean()) for kind in (FourDVar, DualFourDVar)
    ]
    assert errors[1] == pytest.approx(errors[0], rel=0.02) and errors[0] < 0.6


def test_that_a_field_needs_no_matrix_and_ends_where_the_pull_of_the_observations_is_balanced():
    model = SurfaceQuasiGeostrophic(8, dt=3.0, waves=2)
    truth, background = (model.step(10 * standard_normal((2, 1, 128), stream(i))) for i in (1, 2))
    errors = Spectral.of_errors(model.grid, 5 * standard_normal((40, 128), stream(3)))
    network = ObservingNetwork(Select((3, 20, 90), 128), DiagonalCovariance([1.0, 2.0, 1.0]))
    seen, forecast = network.report(model.step(truth)[:, 0, [3, 20, 90]]), Forecast(model, 1)
    found = DualFourDVar(errors, tolerance=1e-10, iterations=8).analyse(background, [seen], forecast=forecast, generator=None)
    start = found.clone().requires_grad_()
    misfit = seen.covariance.squared_norm(seen.innovation(forecast(start))).sum() / 2
    (slope,) = torch.autograd.grad(misfit, start)
    pulled = -errors.multiply(slope)  # B Mᵀ Hᵀ R⁻¹ (y − H M x)
    assert (found - background).norm() > 1
    torch.testing.assert_close(found - background, pulled, rtol=0, atol=1e-3 * float(pulled.abs().max()))


def test_that_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="^shift: expected 1 to 2"):
        DualFourDVar(B, window=2, shift=3)
    with pytest.raises(ValueError, match="^covariance: expected size 8"):
        DualFourDVar(DiagonalCovariance([1.0])).analyse(
            STATES, seen_of(Select((0,), 8), DiagonalCovariance([1.0]), 1), forecast=Forecast(RING, 1), generator=None
        )
