"""Priors of fields: they begin as 3D-Var, are shown networks that move, and fit into small files."""

import pytest
import torch

from pnpda_nb.classical import ThreeDVar
from pnpda_nb.core import Grid, standard_normal, stream
from pnpda_nb.core.compute import _alike, reuse_memory
from pnpda_nb.core.spectral import Spectral
from pnpda_nb.flow_matching.field_networks import PyramidNetwork
from pnpda_nb.learned import AmortisedAnalysis, AnalysisPrior, OnPolicySettings, RandomNetworks, TruthRecord, train_on_policy
from pnpda_nb.learned.on_policy import TrainingBatch, on_policy_loss
from pnpda_nb.learned.records import Trajectories
from pnpda_nb.methods import METHODS
from pnpda_nb.observing import DiagonalCovariance, GridObservations, ObservingNetwork, Select, on_grid
from pnpda_nb.observing.update import gridded_increment
from pnpda_nb.pnp.errors import HomogeneousResidual
from pnpda_nb.pnp.misfit import Misfit
from pnpda_nb.twin.testbeds import sqg

PLANE = Grid((8, 12), "circular", channels=("bottom", "top"))
ERRORS = Spectral.of_errors(PLANE, standard_normal((60, PLANE.dim), stream(1, "errors")).cumsum(-1)).scaled(4.0)
GLOBE = Grid.sphere(tuple(range(-75, 90, 30)), tuple(range(0, 360, 45)))
ZERO, ONE = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
STATES = 3 * standard_normal((3, 2, PLANE.dim), stream(2, "states"))


def network(*sites: int) -> ObservingNetwork:
    return ObservingNetwork(Select(sites, PLANE.dim), DiagonalCovariance([0.5 + 0.1 * i for i in range(len(sites))]))


def prior(**changes) -> AnalysisPrior:
    size = {"geometry": PLANE, "rank": 1, "width": 8, "levels": 2, "kernel": 3, "patch": 2, "errors": ERRORS}
    return AnalysisPrior.make(ZERO, ONE, ONE, dim=PLANE.dim, seed=1, **(size | changes))


def little_world(**changes):
    return sqg(size=16, columns=20, cycles=4, **changes)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_that_increments_on_the_grid_are_those_of_3d_var(dtype):
    values = network(3, 50, 110, 111).observe(STATES.mean(1), stream(3)).values
    values[1, 2] = torch.nan
    seen, rounded = network(3, 50, 110, 111).report(values), network(3, 50, 110, 111).report(values.to(dtype))
    known = ThreeDVar(ERRORS).analyse(STATES, seen, forecast=None, generator=None) - STATES
    found = gridded_increment(ERRORS, STATES.to(dtype), on_grid(rounded, PLANE.dim))
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), known, rtol=0, atol=1e-10 if dtype == torch.float64 else 1e-4)


def test_that_every_state_may_be_seen_elsewhere_and_some_nowhere():
    networks = [network(3, 50, 110), network(4), network()]
    shown = [on_grid(net.observe(x, stream(4)), PLANE.dim)[0] for net, x in zip(networks, STATES[:, 0])]
    together = GridObservations(*(torch.stack(parts) for parts in zip(*((s.value, s.mask, s.error) for s in shown))))
    found = gridded_increment(ERRORS, STATES[:, 0], together)
    for net, x, increment in zip(networks[:2], STATES[:, 0], found):
        seen = net.observe(x[None], stream(4))
        known = ThreeDVar(ERRORS).analyse(x[None, None], seen, forecast=None, generator=None)[0, 0] - x
        torch.testing.assert_close(increment, known)
    assert found[2].count_nonzero() == 0


def test_that_an_untrained_prior_with_a_first_guess_is_3d_var_and_so_is_its_file(tmp_path):
    seen = network(3, 50, 110).observe(STATES.mean(1), stream(3))
    known = ThreeDVar(ERRORS).analyse(STATES, seen, forecast=None, generator=None)
    new = prior()
    new.save(tmp_path / "prior.safetensors")
    for one in (new, AnalysisPrior.load(tmp_path / "prior.safetensors")):
        found = AmortisedAnalysis(one).analyse(STATES, seen, forecast=None, generator=None)
        torch.testing.assert_close(found, known)
        assert torch.equal(one.look(STATES).mean, STATES)  # nothing seen, nothing guessed
        wide = one.widened(2).look(STATES, seen=on_grid(seen, PLANE.dim), extra=standard_normal((3, 2, 2, PLANE.dim), stream(5)))
        torch.testing.assert_close(wide.mean, known)


def test_that_what_is_hidden_from_a_prior_does_not_come_back_as_its_first_guess():
    target, seen = STATES[:, 0] + 1, on_grid(network(3, 50, 110).observe(STATES.mean(1), stream(3)), PLANE.dim)
    shown = GridObservations(*(x[:, 0] for x in (seen.value, seen.mask, seen.error)))
    guess = gridded_increment(ERRORS, STATES, seen)[:, 0]

    def loss(factor: float, hidden: float) -> torch.Tensor:
        batch = TrainingBatch(STATES[:, 0], target, shown, guess=factor * guess)
        return on_policy_loss(prior(), batch, stream(4), hidden=hidden, likelihood=0.0).detach()

    assert loss(1.0, 0.0) != loss(2.0, 0.0)
    assert loss(1.0, 1.0) == loss(2.0, 1.0)
    torch.testing.assert_close(loss(1.0, 1.0), (target - STATES[:, 0]).square().mean())


def test_that_what_a_flow_to_homogeneous_errors_leaves_open_is_known_wave_by_wave():
    everywhere = torch.arange(PLANE.dim)
    S, variance = ERRORS.between(everywhere, everywhere), torch.tensor(2.5).double()
    residual = HomogeneousResidual(ERRORS, variance)
    for tau in (0.0, 0.25, 0.75):
        noise = (1 - tau) ** 2 * variance * torch.eye(PLANE.dim).double()
        known = S - tau**2 * S @ torch.linalg.solve(tau**2 * S + noise, S)
        torch.testing.assert_close(residual.at(tau, STATES).between(everywhere, everywhere), known)


def test_that_an_untrained_blind_prior_of_fields_in_one_iteration_is_3d_var():
    seen = network(3, 50, 110).observe(STATES.mean(1), stream(3))
    method = METHODS["pnpda"](None, prior=prior(), blind=True, data_step="kalman", iterations=1)
    found = method.analyse(STATES, seen, forecast=None, generator=stream(4))
    torch.testing.assert_close(found, ThreeDVar(ERRORS).analyse(STATES, seen, forecast=None, generator=None))


def test_that_one_moving_network_of_all_runs_is_one_set_of_observations():
    seen = network(3, 50, 110).observe(STATES.mean(1), stream(3))
    again = on_grid(seen, PLANE.dim).observations()
    assert again.covariance.variances.ndim == 1 and again.missing is None
    torch.testing.assert_close(again.values, seen.values)
    torch.testing.assert_close(again.covariance.variances, seen.covariance.variances)
    rounded = on_grid(_alike(seen, STATES.float()), PLANE.dim).observations()
    assert rounded.values.dtype == rounded.covariance.variances.dtype == torch.float32


def test_that_rounded_weights_take_half_the_file_and_come_back_the_same(tmp_path):
    shaken = prior(width=32)
    with torch.no_grad():
        for weight in shaken.network.parameters():
            weight.add_(0.05 * torch.randn(weight.shape, generator=stream(6)))
    shaken.save(tmp_path / "whole.safetensors")
    answer = shaken.look(STATES).mean
    shaken.rounded().save(tmp_path / "half.safetensors")
    whole, half = ((tmp_path / f"{name}.safetensors").stat().st_size for name in ("whole", "half"))
    assert half < 0.6 * whole
    assert torch.equal(AnalysisPrior.load(tmp_path / "half.safetensors").look(STATES).mean, shaken.look(STATES).mean)
    torch.testing.assert_close(shaken.look(STATES).mean, answer, rtol=0, atol=0.02)


@pytest.mark.parametrize("boundary, shape", [("ring", (24,)), (PLANE, (8, 12)), (Grid((8, 12), ("reflected", "zeros")), (8, 12))])
def test_that_patches_are_folded_and_unfolded_without_loss(boundary, shape):
    net = PyramidNetwork(3, 2, stream(1), boundary=boundary, width=4, levels=1, kernel=3, patch=2)
    fields = standard_normal((5, 3, *shape), stream(7)).float()
    folded = net._folded(fields)
    assert folded.shape == (5, 3 * 2 ** len(shape), *(n // 2 for n in shape)) and torch.equal(net._unfolded(folded), fields)
    corner = folded[0, : 2 ** len(shape)][(slice(None), *len(shape) * [0])]  # the points of the first patch of the first channel
    assert torch.equal(corner, fields[0, 0][tuple(slice(2) for _ in shape)].flatten())


@pytest.mark.parametrize("axis", [-1, -2])
def test_that_a_network_of_patches_moves_with_its_fields_by_its_coarsest_step(axis):
    net = PyramidNetwork(2, 2, stream(1), boundary=PLANE, width=4, levels=2, kernel=3, patch=2)
    with torch.no_grad():
        for weight in net.parameters():
            weight.add_(0.1 * torch.randn(weight.shape, generator=stream(8)))
    fields, tau = standard_normal((2, 2, 8, 12), stream(9)).float(), torch.zeros(2, 1)
    torch.testing.assert_close(net(fields.roll(4, axis), tau), net(fields, tau).roll(4, axis))


@pytest.mark.parametrize(
    "make, told",
    [
        (lambda: PyramidNetwork(2, 2, None, boundary=PLANE, patch=0), "^patch: expected at least 1"),
        (lambda: PyramidNetwork(2, 2, None, boundary=GLOBE, patch=2), "^patch: .*sphere"),
        (lambda: PyramidNetwork(1, 1, stream(1), levels=1, patch=2)(torch.ones(1, 1, 25), torch.zeros(1, 1)), "^fields: expected"),
        (lambda: RandomNetworks(10, (), often=0.0, counts=(1, 2), channels=3), "^channels: expected a divisor of 10"),
        (lambda: RandomNetworks(10, (), often=0.0, counts=(1, 6), channels=2), "^counts: expected two numbers from 1 to 5"),
        (lambda: sqg(columns=5000), "^columns: expected 1 to 4096"),
        (lambda: sqg(size=15, columns=3), "^size: expected an even number"),
    ],
)
def test_that_what_does_not_fit_is_refused_by_name(make, told):
    with pytest.raises(ValueError, match=told):
        make()


def test_that_columns_are_seen_in_all_channels():
    networks = RandomNetworks(60, (), often=0.0, counts=(4, 9), even=0.3, channels=3)
    mask, error = networks.draw(40, stream(1))
    assert (mask.unflatten(-1, (3, 20)) == mask[:, None, :20]).all() and set(mask.sum(-1).tolist()) <= set(range(12, 28, 3))
    assert ((error > 0) == mask).all()


def test_that_networks_that_move_are_common_to_all_trajectories_and_others_at_each_time():
    world = little_world()
    networks = RandomNetworks(world.dim, (), often=0.0, counts=(10, 20), even=0.0, channels=2, moving=True)
    moving = Trajectories(TruthRecord(world, runs=2, cycles=5, seed=1, networks=networks), 3, 1, 0, stream(1))
    first = moving.networks[0].clone()
    moving.renew()
    assert (moving.networks[0] == moving.networks[0][:1]).all() and not torch.equal(moving.networks[0], first)


def test_that_the_experiment_with_fields_is_what_it_says():
    world, still = little_world(), little_world(moving=False)
    assert world.dim == 512 and world.nature.dim == 2048 and world.nature.substeps == 2 * world.forecast_model.substeps
    sites = [world.network_at(k).operator.sites for k in range(3)]
    assert len(set(sites)) == 3 and all(len(s) == 40 and s[:20] == tuple(i - 256 for i in s[20:]) for s in sites)
    assert still.network_at(0) is still.network_at(2)
    state = world.starts(1, stream(1))
    assert state.dtype == torch.float64 and state.shape == (1, 2048)
    resolved = world.resolved(state)
    fine, coarse = (torch.fft.rfft2(x.unflatten(-1, (2, n, n)), norm="forward") for x, n in ((state, 32), (resolved, 16)))
    torch.testing.assert_close(coarse[..., :6, :6], fine[..., :6, :6])
    assert coarse[..., 6:-5, :].abs().max() < 1e-12 and coarse[..., 6:].abs().max() < 1e-12


def test_that_a_record_in_single_precision_is_near_that_in_double_and_stays_so():
    world = little_world()
    double, single = (TruthRecord(world, runs=2, cycles=3, seed=1, dtype=dtype) for dtype in ("float64", "float32"))
    assert single.targets.dtype == torch.float32
    torch.testing.assert_close(single.targets.double(), double.targets, rtol=0, atol=0.05)
    begun = single.begin(torch.tensor([0, 2]), torch.tensor([1, 0]), stream(1))
    assert begun.dtype == torch.float32 and single.targets[[0, 2], [1, 0]].shape == begun.shape


def test_that_a_prior_of_fields_is_trained_where_it_is_used_and_goes_on_to_the_bit(tmp_path):
    world = little_world()
    networks = RandomNetworks(world.dim, (), often=0.0, counts=(10, 40), even=0.0, channels=2, moving=True)
    record = TruthRecord(world, runs=2, cycles=8, seed=1, networks=networks, dtype="float32")
    grid = world.forecast_model.grid
    errors = Spectral.of_errors(grid, record.targets.flatten(0, 1).double()).scaled(8.0)
    made = {"geometry": grid, "rank": 1, "half_width": 2e6, "width": 8, "levels": 2, "kernel": 3, "patch": 2, "errors": errors}
    start = AnalysisPrior.make(ZERO, 10 * ONE, 2 * ONE, dim=world.dim, seed=1, **made)
    settings = OnPolicySettings(trajectories=2, cycles=4, steps=2, batch=4, memory=3, learning_rate=1e-3)
    straight, history = train_on_policy(start, record, AmortisedAnalysis, settings, seed=1)
    assert len(history) == 4 and straight.errors is start.errors

    class Stop(Exception):
        pass

    path = tmp_path / "checkpoint"
    draw, many = record.observe, []

    def stopping(*given):
        many.append(1)
        if len(many) == 3:
            raise Stop
        return draw(*given)

    record.observe = stopping
    with pytest.raises(Stop):
        train_on_policy(start, record, AmortisedAnalysis, settings, seed=1, checkpoint=path)
    record.observe = draw
    resumed, _ = train_on_policy(start, record, AmortisedAnalysis, settings, seed=1, checkpoint=path)
    for one, other in zip(straight.network.parameters(), resumed.network.parameters()):
        assert torch.equal(one, other)


def test_that_a_misfit_knows_errors_of_each_run_where_nothing_is_missing():
    seen = network(3, 50, 110).observe(STATES.mean(1), stream(3))
    gridded = on_grid(seen, PLANE.dim)
    gridded = GridObservations(gridded.value, gridded.mask.expand(3, 1, -1), gridded.error.expand(3, 1, -1))
    one, each = Misfit(STATES, seen), Misfit(STATES, gridded.observations())
    torch.testing.assert_close(each.gradient(STATES), one.gradient(STATES))
    torch.testing.assert_close(each.step_size("lipschitz"), one.step_size("lipschitz"))


def test_that_a_process_may_keep_its_memory_more_than_once():
    reuse_memory()
    reuse_memory()
    assert torch.zeros(10**7).sum() == 0


FINER = Grid((24, 36), "circular", spacing=1 / 3, channels=("bottom", "top"))


def shaken(**changes) -> AnalysisPrior:
    """A prior that answers something."""
    found = prior(**changes)
    with torch.no_grad():
        for parameter in found.network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=stream(6, "shaken")))
    return found


def in_boxes(states: torch.Tensor) -> torch.Tensor:
    """States of the plane with the same number at all nine points of a box."""
    return PLANE.unflatten(states).repeat_interleave(3, -1).repeat_interleave(3, -2).flatten(-3)


def middle(states: torch.Tensor) -> torch.Tensor:
    """The numbers in the middle of boxes."""
    return FINER.unflatten(states)[..., 1::3, 1::3].flatten(-3)


def test_that_on_a_finer_grid_a_prior_sees_boxes_and_answers_the_same_in_their_middle(tmp_path):
    coarse = shaken(errors=None)
    fine = coarse.on(FINER)
    assert fine.grid == FINER and fine.dim == FINER.dim
    sites = torch.tensor([3, 50, 110, 111])
    seen = network(*sites.tolist()).observe(STATES.mean(1), stream(3))
    at = torch.arange(FINER.dim).reshape(2, 24, 36)[:, ::3, ::3].flatten()[sites].tolist()  # anywhere in their boxes
    there = ObservingNetwork(Select(at, FINER.dim), seen.covariance).report(seen.values)
    known = coarse.look(STATES, seen=on_grid(seen, PLANE.dim))
    found = fine.look(in_boxes(STATES), seen=on_grid(there, FINER.dim))
    increments = found.mean - in_boxes(STATES), known.mean - STATES
    torch.testing.assert_close(middle(increments[0]), increments[1], rtol=0, atol=1e-5)
    torch.testing.assert_close(middle(found.residual.diagonal), known.residual.diagonal, rtol=1e-5, atol=1e-6)
    assert increments[1].abs().max() > 0.1
    again = AnalysisPrior.load(shaken().on(FINER).save(tmp_path / "finer.safetensors"))
    assert again.grid == FINER and again.errors.grid == FINER
    torch.testing.assert_close(again.look(in_boxes(STATES)).mean, shaken().on(FINER).look(in_boxes(STATES)).mean)
    other = ERRORS.on(FINER).scaled(2.0)
    guess = prior().on(FINER, other).look(in_boxes(STATES), seen=on_grid(there, FINER.dim)).mean - in_boxes(STATES)
    torch.testing.assert_close(guess, gridded_increment(other, in_boxes(STATES), on_grid(there, FINER.dim)), rtol=0, atol=1e-4)


def test_that_two_observations_in_a_box_are_one_with_their_mean_and_less_error():
    fine, x = shaken(errors=None).on(FINER), in_boxes(STATES[0, :1])
    pair = ObservingNetwork(Select((0, 37), FINER.dim), DiagonalCovariance([2.0, 2.0])).report(torch.tensor([[3.0, 5.0]]).double())
    single = ObservingNetwork(Select((38,), FINER.dim), DiagonalCovariance([1.0])).report(torch.tensor([[4.0]]).double())
    two, one = (fine.look(x, seen=on_grid(seen, FINER.dim)[:, 0]).mean for seen in (pair, single))
    torch.testing.assert_close(two, one, rtol=0, atol=1e-5)
    assert (one - fine.look(x).mean).abs().max() > 1e-3


def test_that_a_covariance_goes_to_a_finer_grid_and_back_but_for_the_shortest_waves():
    back = ERRORS.on(FINER).on(PLANE)
    x = standard_normal((3, PLANE.dim), stream(8, "x"))
    smooth = ERRORS.on(Grid((4, 6), "circular", spacing=2.0, channels=("bottom", "top"))).on(PLANE)
    torch.testing.assert_close(smooth.on(FINER).on(PLANE).multiply(x), smooth.multiply(x))
    assert back.spectrum.diagonal(dim1=-2, dim2=-1).sum() < ERRORS.spectrum.diagonal(dim1=-2, dim2=-1).sum()
    for other in (Grid((24, 36), "circular", channels=2), Grid((24, 36), "circular", spacing=1 / 3)):
        with pytest.raises(ValueError, match="^grid: expected one with the domain and the channels of"):
            ERRORS.on(other)
        with pytest.raises(ValueError, match="^dim: expected a grid like"):
            prior().on(other)
