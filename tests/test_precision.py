"""Precision and device are those of the state: what changes them within an analysis, and what that does to scores."""

import sys
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import t as student
from test_every_method import ENSEMBLE, FOUR_D, METHODS, NEEDS_ENSEMBLE, pair, small
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import pnpda_nb
from pnpda_nb.core import RunStreams, standard_normal, stream
from pnpda_nb.core.compute import _alike, _casts
from pnpda_nb.dynamics import AdditiveModelError, Forecast, Lorenz63, trajectory
from pnpda_nb.flow_matching import FlowPrior, VelocityMLP
from pnpda_nb.learned import AmortisedAnalysis, AnalysisPrior, LearnedMean, TruthRecord
from pnpda_nb.learned.records import Examples
from pnpda_nb.methods import build_method, method_by_name
from pnpda_nb.observing import Covariance, DiagonalCovariance, GridObservations, Linear, Nonlinear, ObservingNetwork, Select
from pnpda_nb.pnp import PnPDA
from pnpda_nb.twin import cycle, mean_and_error, scores

PACKAGE = str(Path(pnpda_nb.__file__).parent)
SINGLE, DOUBLE = torch.float32, torch.float64

# where an analysis of states in single precision computes in double precision all the same, and why
IN_DOUBLE = {
    "core.random.standard_normal": "draws are the same in all precisions, and rounded by whoever asked for them",
    "classical.ensemble.random_rotation": "a rotation is a draw, and all of it is made of draws before it is rounded",
    "observing.covariance.inverse": "what is inverted is what was given, once: rounding comes last",
    "classical.four_dvar.cost": "the distance from the background is as ill-conditioned as its covariance",
    "classical.four_dvar.direction": "and so are the normal equations: in single precision steps are a per cent off",
    "classical.four_dvar.analyse": "which scales the precision of both",
    "classical.four_dvar._in_double": "for both, covariances stay as they were given",
    "core.localisation": "and so are those of the points of a grid",
    "core.grid": "distances and tapers are made once, of the grid and not of states, and rounded by whoever asked for them",
}
# where a state goes to the device from, or leaves it for, another
ELSEWHERE = {
    "core.random.standard_normal": "a generator draws on its own device",
    "classical.ensemble.random_rotation": "a rotation is a draw, and made where the generator is",
    "core.compute._cast": "what a method holds is moved once",
}


def place() -> tuple[str, ...]:
    """The functions of the library that an operation of torch is done for, the innermost first."""
    frame, found = sys._getframe(2), []
    while frame is not None:
        if frame.f_code.co_filename.startswith(PACKAGE):
            module = Path(frame.f_code.co_filename).relative_to(PACKAGE).with_suffix("")
            found.append(f"{'.'.join(module.parts)}.{frame.f_code.co_name}")
        frame = frame.f_back
    return tuple(name for name in found if not name.startswith("core.checks."))


def listed(where: tuple[str, ...], exceptions) -> bool:
    """Whether `where` is listed, or was called by what is; a whole `analyse` counts for what it does itself."""
    within = {name for name in exceptions if not name.endswith(".analyse")}
    return where[:1] in {(name,) for name in exceptions} or any(f"{place}.".startswith(f"{n}.") for place in where for n in within)


class Watch(TorchDispatchMode):
    """Notes where an operation has a result of a floating-point type that is not `dtype`."""

    def __init__(self, dtype):
        super().__init__()
        self.dtype, self.found = dtype, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and x.ndim and x.is_floating_point() and x.dtype != self.dtype:  # numbers widen nothing
                self.found.add(place())
        return result


def learned(experiment, name: str):
    """The methods of the registry that need a prior, and priors of all kinds, untrained."""
    dim = experiment.dim
    zeros, ones = torch.zeros(dim, dtype=DOUBLE), torch.ones(dim, dtype=DOUBLE)
    if name.startswith("flow"):
        architecture = {"network": "VelocityMLP", "dim": dim, "hidden": [16, 16], "embedding": 8, "linear_skip": False}
        settings = {"factor": torch.diag(0.5 * ones), "units": 3 * ones} if name == "flow_around" else {}
        return PnPDA(FlowPrior(VelocityMLP(dim, (16, 16), 8, stream(0, "u")), zeros + 1, 2 * ones, architecture, **settings), 4)
    extra = 3 if name == "learned_mean" else 0
    prior = AnalysisPrior.make(zeros[0], 5 * ones[0], ones[0], dim=dim, rank=2, width=16, extra=extra, seed=3)
    made = {
        "amortised": lambda: AmortisedAnalysis(prior, spread=1.0),
        "amortised_blind": lambda: AmortisedAnalysis(prior, blind=True),
        "learned_mean": lambda: LearnedMean(prior, method_by_name("etkf", experiment)),
        "learned_kalman": lambda: PnPDA(prior, 4, data_step="kalman"),
    }
    return made[name]()


# what else the methods of the registry can be set to
SETTINGS = {
    "etkf_rotated": ("etkf", {"rotate": True, "inflation": 1.1, "relaxation": 0.5, "additive": 0.1}),
    "letkf_rotated": ("letkf", {"rotate": True, "half_width": 2.0}),
    "enks_symmetric": ("enks", {"kind": "symmetric", "lag": 2}),
    "enff_background": ("enff", {"path": "background"}),
    "ensf_own": ("ensf", {"score": "own"}),
    "pnpda_kalman": ("pnpda", {"iterations": 4, "data_step": "kalman"}),
    "pnpda_prox": ("pnpda", {"iterations": 4, "data_step": "prox", "draws": 2, "ensemble": 2}),
    "misspecified": ("etkf", {"assumed_variance": 2.0}),
}
UNTRAINED = ("amortised", "amortised_blind", "learned_mean", "learned_kalman", "flow", "flow_around")
EVERY = (*METHODS, *SETTINGS, *UNTRAINED)


@lru_cache
def made_for(name: str, where: str):
    if name in METHODS:
        return pair(name, where)
    experiment = small(where)
    if name in UNTRAINED:
        return experiment, learned(experiment, name)
    method, settings = SETTINGS[name]
    return experiment, build_method(experiment, {"name": method, **settings})


def asked(name: str, where: str, dtype, missing: bool = False, there=lambda x: x):
    """A method of every kind and what it is asked, in the precision of its background: a function that asks it."""
    experiment, method = made_for(name, where)
    truth = standard_normal((3, experiment.dim), stream(9, "truth"))
    network = experiment.network
    if missing and name != "enrda":
        network = replace(network, missing=0.3)
    members = 6 if name in ENSEMBLE or name not in METHODS else 2
    cloud = truth.unsqueeze(-2) + standard_normal((3, members, experiment.dim), stream(9, "cloud"))
    background = there(cloud.to(dtype))
    window = name in FOUR_D
    seen = [network.observe(truth, stream(9, "noise", i)) for i in range(2 if window else 1)]
    seen = _alike(seen, background)
    more = {"past": there(torch.stack(2 * [cloud.to(dtype)]))} if name.startswith("enks") else {}
    if name == "particle_filter":
        more = {"weights": there(torch.full(cloud.shape[:-1], 1 / members, dtype=dtype))}
    method = _alike(method, background)

    def ask():
        forecast = Forecast(experiment.forecast_model, 2)
        generator = RunStreams(5, "method", runs=3)
        return method.analyse(background, seen if window else seen[0], forecast=forecast, generator=generator, **more)

    return ask


@pytest.mark.parametrize("missing", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("where", ["lorenz63", "lorenz96"])
@pytest.mark.parametrize("name", EVERY)
def test_that_no_analysis_leaves_the_precision_of_its_background(name, where, missing):
    ask = asked(name, where, SINGLE, missing)
    with Watch(SINGLE) as watch:
        result = ask()
    for x in result if isinstance(result, tuple) else (result,):
        assert x.dtype == SINGLE and torch.isfinite(x).all()
    assert not (found := {where for where in watch.found if not listed(where, IN_DOUBLE)}), found


class There(torch.Tensor):
    """A tensor on a device that there is not: its numbers are here, and `Device` sees to it that nobody mixes the two."""

    @staticmethod
    def __new__(cls, here):
        place = {"strides": here.stride(), "storage_offset": here.storage_offset()}
        return torch.Tensor._make_wrapper_subclass(cls, here.shape, dtype=here.dtype, device="lazy", **place)

    def __init__(self, here):
        self.here = here

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return Device.call(set(), function, args, kwargs or {})


class Device(TorchDispatchMode):
    """Lets operations on the other device happen here, refuses those that mix devices, and notes where tensors change theirs."""

    def __init__(self):
        super().__init__()
        self.moved = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return Device.call(self.moved, function, args, kwargs or {})

    @staticmethod
    def call(moved, function, args, kwargs):
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        there = any(isinstance(x, There) for x in tensors)
        asked = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.device)]
        if asked or function is torch.ops.aten.to.other:
            to = isinstance(args[1], There) if not asked else asked[0].type == "lazy"
            if tensors and to != isinstance(tensors[0], There):
                moved.add(place())
            there = to
            args, kwargs = tree_map(lambda x: torch.device("cpu") if isinstance(x, torch.device) else x, (args, kwargs))
        elif function is torch.ops.aten.copy_.default:  # from any device to any other
            if there != all(isinstance(x, There) for x in tensors):
                moved.add(place())
        elif there and any(x.ndim and not isinstance(x, There) for x in tensors):
            raise RuntimeError(f"{function} in {place()}: expected all tensors to be on one device")
        args, kwargs = tree_map(lambda x: x.here if isinstance(x, There) else x, (args, kwargs))
        return tree_map(lambda x: There(x) if there and isinstance(x, torch.Tensor) else x, function(*args, **kwargs))


@pytest.mark.parametrize("missing", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("where", ["lorenz96", pytest.param("lorenz63", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", [n for n in EVERY if n not in FOUR_D])  # torch.func takes no such tensors
def test_that_no_analysis_leaves_the_device_of_its_background(name, where, missing):
    with Device() as device:
        result = asked(name, where, DOUBLE, missing, there=There)()
    for x in result if isinstance(result, tuple) else (result,):
        assert isinstance(x, There)
    assert not (found := {where for where in device.moved if not listed(where, ELSEWHERE)}), found


# what else of a cycle is here, and so where states come from or go to
BETWEEN = {
    "core.compute._computing": "whether there is such a device",
    "twin.cycle.__init__": "first states are drawn around nature's, and so large is nature",
    "twin.cycle.watched": "nature grows",
    "twin.cycle.advance": "model errors are draws",
    "twin.collecting._averaged": "what is kept",
    "twin.collecting._collected": "what was seen",
}
CYCLED = ["free_run", "letkf_rotated", "enkf", "enks_symmetric", "particle_filter", "pnpda_kalman", "flow", "amortised"]


@pytest.mark.parametrize("keep", ["all", "scores"])
@pytest.mark.parametrize("name", CYCLED)
def test_that_a_cycle_on_another_device_is_the_same_and_no_more_goes_there_than_must(name, keep):
    experiment, method = made_for(name, "sakov2012")
    network = (experiment.network, SEEN_IN_TURN)
    experiment = replace(experiment, model_error=AdditiveModelError(0.1), network=network, interval=8)
    settings = {"members": 5 if name in ENSEMBLE or name not in METHODS else 1, "runs": 2, "keep": keep, "keep_members": True}
    with Device():  # which no compiled step sees
        here = cycle(experiment, method, **settings)
    with Device() as device:
        there = cycle(experiment, method, device="lazy", **settings)
    assert there.equals(here) and there.attrs == here.attrs | {"device": "lazy"}
    inner = {next(name for name in where if not name.endswith(">")) for where in device.moved}  # not a comprehension
    assert set(BETWEEN) <= inner <= {*ELSEWHERE, *BETWEEN}, inner


@pytest.mark.parametrize("name", ["tpu", "cuda:99", "meta"])
def test_that_a_device_that_is_not_there_is_named(name):
    with pytest.raises(ValueError, match=rf"^device: expected cpu or, where there is one, cuda, got {name}"):
        cycle(*pair("free_run", "sakov2012"), device=name)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", [DOUBLE, SINGLE])
@pytest.mark.parametrize("name", CYCLED)
def test_that_cycles_on_a_gpu_are_those_of_the_processor(name, dtype):
    experiment, method = made_for(name, "sakov2012")
    settings = {"members": 5 if name in ENSEMBLE or name not in METHODS else 1, "runs": 2, "dtype": dtype}
    here, there = (cycle(experiment, method, device=device, **settings) for device in ("cpu", "cuda"))
    assert there.attrs["device"] == "cuda" and here.truth.equals(there.truth)
    assert np.allclose(here.analysis, there.analysis, atol=0.01)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", [DOUBLE, SINGLE])
@pytest.mark.parametrize("name", EVERY)
def test_that_analyses_on_a_gpu_are_those_of_the_processor(name, dtype):
    here, there = asked(name, "lorenz96", dtype)(), asked(name, "lorenz96", dtype, there=lambda x: x.cuda())()
    for a, b in zip(*(x if isinstance(x, tuple) else (x,) for x in (here, there))):
        assert b.device.type == "cuda" and b.dtype == dtype
        torch.testing.assert_close(b.cpu(), a, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("missing", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("where", ["lorenz96", "kuramoto_sivashinsky"])
@pytest.mark.parametrize("name", EVERY)
def test_that_an_analysis_is_the_same_up_to_rounding(name, where, missing):
    whole, rounded = (asked(name, where, dtype, missing)() for dtype in (DOUBLE, SINGLE))
    for a, b in zip(*(x if isinstance(x, tuple) else (x,) for x in (whole, rounded))):
        assert a.dtype == DOUBLE and b.dtype == SINGLE
        assert (a - b).abs().max() < 1e-3 * a.abs().max()


def differences(names, where: str, *, runs: int, cycles: int) -> dict[str, np.ndarray]:
    """For each method and run, the error of its analyses in single precision over that in double precision, minus one."""
    found = {}
    for name in names:
        experiment, method = made_for(name, where)
        if name in NEEDS_ENSEMBLE and name not in ("enrda", "ensf", "enff"):
            method = replace(method, inflation=1.1)  # lest the filter diverges, and nothing can be told
        members = 10 if name in ENSEMBLE or name not in METHODS else 1
        settings = {"members": members, "runs": runs, "seed": 1, "keep_steps": False}
        results = [cycle(replace(experiment, cycles=cycles), method, dtype=dtype, **settings) for dtype in (DOUBLE, SINGLE)]
        assert [r.analysis.dtype for r in results] == [np.float64, np.float32]
        whole, rounded = (r.rmse.mean("time").values for r in results)
        found[name] = (rounded - whole) / whole.mean()
    return found


def check_scores(found: dict[str, np.ndarray]) -> None:
    """Within two per cent, or within two standard errors of the runs' differences, corrected for the number of methods."""
    share = 2 * student.sf(2, 1e6) / len(found)
    for name, apart in found.items():
        bound = student.isf(share / 2, len(apart) - 1) * apart.std(ddof=1) / len(apart) ** 0.5
        assert abs(apart.mean()) < max(0.02, bound), (name, apart.mean(), bound)


@pytest.mark.parametrize("where", ["lorenz96", "kuramoto_sivashinsky"])
def test_that_scores_do_not_need_double_precision_in_a_few_cycles(where):
    check_scores(differences([n for n in EVERY if n not in FOUR_D], where, runs=4, cycles=3))


@pytest.mark.slow
@pytest.mark.parametrize("where", ["lorenz96", "kuramoto_sivashinsky"])
def test_that_scores_do_not_need_double_precision(where):
    check_scores(differences(EVERY, where, runs=20, cycles=60))


def test_that_a_tensor_is_rounded_once_and_again_when_it_was_written_to():
    matrix, state = torch.eye(3, dtype=DOUBLE), torch.zeros(2, 3, dtype=SINGLE)
    rounded, count = _alike(matrix, state), len(_casts)
    assert rounded.dtype == SINGLE and _alike(matrix, state) is rounded and _alike(matrix, state.double()) is matrix
    matrix[0, 0] = 2.0
    assert _alike(matrix, state)[0, 0] == 2 and len(_casts) == count
    assert _alike(rounded, state.double()) is rounded  # nothing is widened
    assert _alike(matrix.requires_grad_(), state).requires_grad
    del matrix
    assert len(_casts) == count - 1


def test_that_a_rounded_covariance_is_made_of_the_whole_one():
    tight = Covariance([[1.0, 1 - 1e-9], [1 - 1e-9, 1.0]])  # singular in single precision
    state = torch.zeros(1, dtype=SINGLE)
    rounded = _alike(tight, state)
    assert rounded.matrix.dtype == rounded.inverse.dtype == SINGLE and _alike(tight, state.double()) is tight
    assert torch.equal(rounded.factor, tight.factor.float()) and torch.equal(rounded.inverse, tight.inverse.float())
    assert rounded.largest_precision == tight.largest_precision
    assert rounded.draw((2,), stream(1)).dtype == SINGLE and tight.draw((2,), stream(1)).dtype == DOUBLE
    gone = torch.tensor([[False, True]])
    assert torch.equal(rounded.without(gone).factor, tight.without(gone).factor.float())
    diagonal = _alike(DiagonalCovariance([0.1, 3.0]), state)
    assert diagonal.variances.dtype == SINGLE and diagonal.without(gone).variances.tolist() == [[pytest.approx(0.1), 1.0]]
    assert isinstance(_alike(FULL, state).covariance, Covariance)


SEEN_IN_TURN = ObservingNetwork(Select((2,), 3), DiagonalCovariance([0.5]))
FULL = ObservingNetwork(Linear(torch.eye(2, dtype=DOUBLE)), Covariance([[1.0, 0.5], [0.5, 1.0]]))


@pytest.mark.parametrize("operator", [Linear(torch.eye(3, dtype=DOUBLE)[:2]), Nonlinear(lambda x: x[..., :2].square(), 2)])
@pytest.mark.parametrize("name", ["var3d", "etkf", "enkf", "pnpda"])
def test_that_other_operators_keep_the_precision_too(name, operator):
    experiment, method = pair(name, "sakov2012")
    network = ObservingNetwork(operator, Covariance([[1.0, 0.5], [0.5, 1.0]]))
    cloud = standard_normal((3, 6, 3), stream(1))
    seen = network.observe(cloud[:, 0], stream(2))
    whole, rounded = (method.analyse(x, seen, forecast=None, generator=stream(3)) for x in (cloud, cloud.float()))
    assert rounded.dtype == SINGLE and (whole - rounded).abs().max() < 1e-3 * whole.abs().max()


def test_that_a_cycle_in_single_precision_sees_the_same_nature():
    experiment, method = pair("etkf", "lorenz63")
    whole, rounded = (cycle(experiment, method, members=5, runs=3, dtype=dtype) for dtype in (DOUBLE, SINGLE))
    assert whole.truth.equals(rounded.truth) and rounded.attrs["dtype"] == "float32" and "dtype" not in whole.attrs
    assert np.array_equal(whole.observations.astype("float32"), rounded.observations)
    with pytest.raises(ValueError, match="dtype: expected float64 or float32, got float16"):
        cycle(experiment, method, dtype=torch.float16)


@pytest.mark.parametrize("every", [1, 2, 3, 6, 7])
def test_that_a_trajectory_keeps_some_of_its_states(every):
    start, error = standard_normal((2, 3), stream(1)), standard_normal((6, 2, 3), stream(2))
    whole = trajectory(Lorenz63(), start, 6, error)
    assert torch.equal(trajectory(Lorenz63(), start, 6, error, every), whole[::every])
    with pytest.raises(ValueError, match="every"):
        trajectory(Lorenz63(), start, 6, every=0)


@pytest.mark.parametrize("name", ["etkf", "enks", "particle_filter", "var4d", "weak_var4d", "free_run"])
@pytest.mark.parametrize("keep", ["all", "scores"])
def test_that_ends_of_intervals_are_those_of_a_cycle_that_keeps_all_steps(name, keep):
    experiment, method = pair(name, "lorenz63")
    experiment = replace(experiment, cycles=6, burn_in=1)
    settings = {"members": 4 if name in ENSEMBLE else 1, "runs": 2, "seed": 1, "keep": keep}
    whole, ends = (cycle(experiment, method, keep_steps=steps, **settings) for steps in (True, False))
    if keep == "scores":
        a, b = scores(whole), scores(ends)
        for metric in ("analysis_rmse", "background_rmse"):
            assert np.allclose(a[metric], b[metric], rtol=1e-12)
        return
    assert ends.sizes["time"] == ends.sizes["cycle"] == 6 and np.allclose(ends.time, ends.cycle_time)
    for field in ("truth", "estimate"):
        assert np.allclose(whole[field].sel(time=ends.time, method="nearest"), ends[field], rtol=1e-12)
    for field in ("analysis", "background", "observations"):
        assert whole[field].equals(ends[field])
    assert np.allclose(scores(ends).step_rmse, scores(ends).analysis_rmse)
    assert abs(mean_and_error(whole)[0] - mean_and_error(ends)[0]) < 1e-12


def test_that_a_record_holds_no_more_than_the_ends_of_intervals():
    record = TruthRecord(small("lorenz63"), runs=2, cycles=3, seed=1)
    assert record.targets.untyped_storage().nbytes() == 8 * record.targets.numel()


@given(sizes=st.lists(st.integers(0, 4), min_size=1, max_size=12), cycles=st.integers(1, 4))
def test_that_the_memory_of_training_is_the_last_cycles_in_their_order(sizes, cycles):
    memory, rows = Examples(cycles, 4), []
    for k, size in enumerate(sizes):
        number = 10.0 * k + torch.arange(size)
        rows.append(number)
        memory.add((number[:, None].float(), (number, number > 3), GridObservations(number, number > 3, -number), None))
    held = torch.cat(rows[-cycles:])
    assert len(memory) == min(cycles, len(sizes)) and memory.ring[0].shape == (4 * cycles, 1)
    again = Examples(cycles, 4)
    again.recall(memory.remember())
    for each in (memory, again) if len(held) else ():
        x, (number, mask), seen, nothing = each.draw(50, stream(1))
        pick = held[torch.randint(0, len(held), (50,), generator=stream(1))]
        assert torch.equal(x[:, 0], pick.float()) and x.dtype == SINGLE and torch.equal(number, pick) and nothing is None
        assert torch.equal(mask, pick > 3) and torch.equal(seen.error, -pick) and torch.equal(seen.mask, pick > 3)
    memory.clear()
    assert len(memory) == 0
