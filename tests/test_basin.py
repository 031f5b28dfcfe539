"""The ocean between walls: what it keeps and whom it obeys, and the tracks along which it is seen."""

import math

import pytest
import torch

from pnpda_nb.core import standard_normal, stream
from pnpda_nb.dynamics import QuasiGeostrophic, jacobian, trajectory
from pnpda_nb.dynamics.quasi_geostrophic import arakawa, laplacian
from pnpda_nb.methods import experiment_of, method_by_name
from pnpda_nb.studies import PUBLISHED
from pnpda_nb.twin import cycle, mean_and_error, qg, watch_nature
from pnpda_nb.twin.testbeds import FromFreeRun


def some_flow(model: QuasiGeostrophic, runs: int = 3) -> torch.Tensor:
    """States `(run, dim)` of a random vorticity."""
    return model.streamfunction(1e4 * standard_normal((runs, model.dim), stream(1, "flow")))


def walls(model: QuasiGeostrophic, states: torch.Tensor) -> torch.Tensor:
    fields = model.grid.unflatten(states)
    return torch.cat((fields[..., [0, -1], :].flatten(), fields[..., [0, -1]].flatten()))


@pytest.mark.parametrize("size", [4, 9, 40])
def test_that_the_streamfunction_is_the_one_that_has_the_vorticity(size):
    model = QuasiGeostrophic(size)
    psi = some_flow(model)
    torch.testing.assert_close(model.streamfunction(model.vorticity(psi)), psi)
    inner = torch.eye((size - 2) ** 2, dtype=torch.float64).unflatten(-1, (size - 2, size - 2))
    padded = torch.nn.functional.pad(inner, (1, 1, 1, 1))
    helmholtz = laplacian(padded, 1 / (size - 1)).flatten(1) - model.froude * inner.flatten(1)
    q = model.vorticity(psi).unflatten(-1, (size, size))[..., 1:-1, 1:-1].flatten(1)
    solved = torch.linalg.solve(helmholtz, q.mT).mT
    torch.testing.assert_close(solved, psi.unflatten(-1, (size, size))[..., 1:-1, 1:-1].flatten(1))


def test_that_arakawas_jacobian_is_antisymmetric_conserves_and_is_of_second_order():
    a, b = torch.nn.functional.pad(standard_normal((2, 3, 11, 14), stream(1, "fields")), (1, 1, 1, 1))
    J = arakawa(a, b, 0.1)
    torch.testing.assert_close(arakawa(b, a, 0.1), -J)
    for kept in (a, b):
        assert ((kept[..., 1:-1, 1:-1] * J).sum((-2, -1)).abs() < 1e-12 * kept.norm() * J.norm()).all()
    off = []
    for n in (32, 64):
        x = torch.linspace(0, 1, n + 1, dtype=torch.float64)
        y = x.unsqueeze(-1)
        (sin, cos), at = (lambda z: (math.pi * z).sin(), lambda z: (math.pi * z).cos()), slice(1, -1)
        exact = math.pi**2 * (cos(x) * sin(y) * sin(2 * x) * cos(y) - 2 * sin(x) * cos(y) * cos(2 * x) * sin(y))
        off.append(float((arakawa(sin(x) * sin(y), sin(2 * x) * sin(y), 1 / n) - exact[at, at]).abs().max()))
    assert 3.8 < off[0] / off[1] < 4.2


@pytest.mark.parametrize("size", [4, 17, 24])
def test_that_without_wind_and_friction_no_flow_gains_energy(size):
    model = QuasiGeostrophic(size, wind=0.0, friction=0.0, rossby=1e-3)
    psi = some_flow(model)
    gain = psi * model.vorticity(model.tendency(psi))
    assert (gain.sum(-1).abs() < 1e-11 * gain.abs().sum(-1)).all()
    rubbed = psi * QuasiGeostrophic(size, wind=0.0, friction=1e-8).tendency(psi)
    assert (rubbed * 0 == 0).all() and (walls(model, model.tendency(psi)) == 0).all()


def test_that_friction_takes_energy_from_every_flow_and_wind_gives_it_to_rest():
    model = QuasiGeostrophic(12, wind=0.0, friction=1e-7)
    psi = some_flow(model)
    assert ((psi * model.vorticity(model.tendency(psi))).sum(-1) > 0).all()  # energy is minus half of ψ q
    moved = QuasiGeostrophic(12, friction=1e-7).step(torch.zeros(144, dtype=torch.float64)).unflatten(-1, (12, 12))
    torch.testing.assert_close(moved, -moved.flip(0))  # two gyres that turn against one another
    assert (moved[1:6, 1:-1] > 0).all()


def test_that_what_is_on_the_walls_does_not_count():
    model = QuasiGeostrophic(9, friction=1e-7)
    psi = some_flow(model)
    fields = psi.clone().unflatten(-1, (9, 9))
    fields[:, 0], fields[..., -1] = 5.0, -3.0
    for move in (model.step, model.tendency, model.vorticity, model.streamfunction):
        assert torch.equal(move(fields.flatten(1)), move(psi)) and (walls(model, move(psi)) == 0).all()


def test_that_a_batch_is_as_each_of_it_to_the_bit_in_both_precisions():
    for size, dtype in ((17, torch.float64), (17, torch.float32), (129, torch.float32)):
        model = QuasiGeostrophic(size, substeps=2, friction=1e-9 if size == 17 else 2e-12)
        x = some_flow(model, 6).to(dtype)
        together = model.step(x)
        assert together.dtype == dtype and all(torch.equal(model.step(x[i:k]), together[i:k]) for i, k in ((0, 1), (3, 6), (5, 6)))
        assert torch.equal(model.step(x.reshape(2, 3, -1)), together.reshape(2, 3, -1)) and model.step(x[:0]).shape == x[:0].shape
        assert torch.equal(model.step(x[2]), together[2])
        assert (together.double() - model.step(x.double())).norm() < 1e-5 * together.double().norm()


def test_that_steps_and_substeps_are_the_same_of_fourth_order_and_can_be_differentiated():
    model = QuasiGeostrophic(9, dt=2.5, substeps=2, friction=1e-7, rossby=1e-3)
    x = some_flow(model, 1)[0]
    torch.testing.assert_close(model.step(x), trajectory(QuasiGeostrophic(9, friction=1e-7, rossby=1e-3), x, 2)[-1])
    best, *some = (QuasiGeostrophic(9, dt=10.0, substeps=n, friction=1e-7, rossby=1e-3).step(x) for n in (64, 4, 8))
    assert 3.8 < math.log2((some[0] - best).norm() / (some[1] - best).norm()) < 4.2
    slopes, h = jacobian(model, x), 1e-5
    bump = h * torch.eye(81, dtype=torch.float64)[30]
    torch.testing.assert_close((model.step(x + bump) - model.step(x - bump)) / (2 * h), slopes[:, 30], rtol=1e-5, atol=1e-8)
    assert (slopes[:, :9] == 0).all()


def test_that_tracks_move_go_round_everywhere_and_are_the_same_at_the_same_time():
    experiment = qg()
    first, again, later = (experiment.network_at(k).operator.sites for k in (0, 0, 1))
    assert first == again != later and len(first) == 300
    gaps = {b - a for a, b in zip(first, first[1:])}
    assert gaps == {55, 56}
    sites = {site for k in range(400) for site in experiment.network_at(k).operator.sites}
    assert min(sites) == 0 and max(sites) < experiment.dim and len(sites) > 0.95 * experiment.dim
    assert experiment.network_at(3).covariance.variances.unique().tolist() == [4.0]


def test_that_the_filter_of_the_published_rows_follows_a_small_basin_that_spins_up():
    small = {"size": 17, "observed": 40, "variance": 0.01, "friction": 1e-7, "spin_up": 5, "states": 16}
    experiment = experiment_of({"name": "qg", "cycles": 10, "burn_in": 4} | small)
    (row,) = [row for row in PUBLISHED if row.testbed == "qg" and row.members == 25]
    nature = list(watch_nature(experiment, 1, 1, "test"))
    found = {}
    for name, settings in {row.method: row.settings, "free_run": {}}.items():
        method = method_by_name(name, experiment, **settings)
        assert name == "free_run" or method.distance == experiment.forecast_model.grid
        result = cycle(experiment, method, members=8, seed=1, keep="scores", dtype=row.dtype, nature=nature)
        found[name] = mean_and_error(result)[0]
    assert found["letkf"] < 0.3 * found["free_run"]


def test_that_members_are_different_states_of_one_free_run():
    start = FromFreeRun(QuasiGeostrophic(9, friction=1e-7), spin_up=2, states=5, between=1)
    drawn = start(5, stream(1, "members"))
    run = trajectory(start.model, torch.zeros(81), 6)[2:].double()
    assert {tuple(x.tolist()) for x in drawn} == {tuple(x.tolist()) for x in run} and drawn.dtype == torch.float64
    with pytest.raises(ValueError, match="^states: expected at least the 6 that are drawn, got 5"):
        start(6, stream(1, "members"))


@pytest.mark.parametrize(
    "make, told",
    [
        (lambda: QuasiGeostrophic(3), "^size: expected a whole number of at least 4, got 3"),
        (lambda: QuasiGeostrophic(dt=0.0), "^dt: expected a positive number"),
        (lambda: QuasiGeostrophic(friction=-1.0), "^friction"),
        (lambda: QuasiGeostrophic(9).step(torch.zeros(80)), "^state: expected states of size 81"),
        (lambda: QuasiGeostrophic(9).streamfunction(torch.full((81,), math.nan)), "^vorticity"),
        (lambda: qg(observed=0), "^observed: expected a whole number of at least 1, got 0"),
        (lambda: qg(size=9, observed=82), "^observed: expected 1 to 81"),
        (lambda: qg(variance=-1.0).network_at(0), "variance"),
    ],
)
def test_that_what_does_not_fit_is_refused_by_name(make, told):
    with pytest.raises(ValueError, match=told):
        make()
