"""Machine code for the models' steps: the same as the torch formula, and used where nobody would notice."""

import functools
from dataclasses import dataclass, replace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_precision import Watch
from torch.autograd import forward_ad

from pnpda_nb.core import standard_normal, stream
from pnpda_nb.core.checks import unchecked
from pnpda_nb.dynamics import DoubleWell, Forecast, Lorenz63, Lorenz96, Pendulum, TwoScaleLorenz96, by_formula, kernels, trajectory
from pnpda_nb.interop import ManySteps, from_tendency
from pnpda_nb.twin import nature_run, nature_start, sakov2012

# a model of every formula, with settings that are not the default, and the size of its states
MODELS = {
    "lorenz63": (Lorenz63(10.5, 27.0, 10 / 3, dt=0.02), 10.0),
    "lorenz96": (Lorenz96(), 5.0),
    "smallest ring": (Lorenz96(4, forcing=18.0), 5.0),
    "large ring": (Lorenz96(700), 5.0),
    "two scales": (TwoScaleLorenz96(5, 3, coupling=0.7, amplitude_ratio=8.0, time_ratio=5.0, feedback=+1), 2.0),
    "the paper's": (TwoScaleLorenz96(), 0.3),
    "one fast": (TwoScaleLorenz96(4, 1), 0.3),
    "double well": (DoubleWell(rate=3.0), 1.0),
    "pendulum": (Pendulum(3.0, 0.2), 2.0),
}
models = st.sampled_from(sorted(MODELS))
STEP = {torch.float64: 1e-12, torch.float32: 1e-5}


def by_torch(model, state, steps, error=None, every=1):
    path = [state]
    for t in range(steps):
        state = model.step(state) if error is None else model.step(state) + error[t]
        path += [state] if (t + 1) % every == 0 else []
    return torch.stack(path)


def compiled(monkeypatch):
    """Counts how often machine code is asked for."""
    calls, walk = [], kernels._walk
    monkeypatch.setattr(kernels, "_walk", lambda *a: calls.append(a[0].formula) or walk(*a))
    return calls


def states_of(name, shape, seed=0, dtype=torch.float64):
    model, size = MODELS[name]
    return model, (size * standard_normal((*shape, model.dim), stream(seed, name))).to(dtype)


@given(
    name=models,
    seed=st.integers(0, 10**6),
    shape=st.lists(st.integers(0, 5), max_size=3),
    layout=st.sampled_from(["contiguous", "turned", "expanded", "every second"]),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    disturbed=st.booleans(),
)
def test_that_a_compiled_step_is_that_of_torch(name, seed, shape, layout, dtype, disturbed):
    model, states = states_of(name, (*shape, 2), seed, dtype)
    states = {
        "contiguous": states,
        "turned": states.mT.contiguous().mT.transpose(0, -2),
        "expanded": states[..., :1, :].expand(*shape, 3, model.dim),
        "every second": states.repeat_interleave(2, -1)[..., ::2],
    }[layout]
    error = 0.1 * standard_normal((*states.shape[:-1], 1, model.dim), stream(seed, "error")).to(dtype).movedim(-2, 0)
    step = trajectory(model, states, 1, error if disturbed else None)
    right = by_torch(model, states, 1, error if disturbed else None)
    assert step.shape == right.shape and step.dtype == dtype and torch.equal(step[0], states)
    scale = right.abs().max() if right.numel() else 1.0
    assert torch.allclose(step / scale, right / scale, rtol=0, atol=STEP[dtype])
    assert Forecast(model, 1)(states).equal(trajectory(model, states, 1)[1])


@given(name=models, steps=st.integers(0, 7), every=st.integers(1, 9), disturbed=st.booleans())
def test_that_of_many_steps_the_right_ones_are_kept(name, steps, every, disturbed):
    model, states = states_of(name, (2, 3))
    error = 0.1 * standard_normal((steps, *states.shape), stream(1, "error")) if disturbed else None
    path = trajectory(model, states, steps, error, every)
    right = by_torch(model, states, steps, error, every)
    assert path.shape == right.shape and torch.allclose(path, right, rtol=1e-10, atol=1e-10)
    assert torch.equal(path, trajectory(model, states, steps, error)[::every])


@given(name=models, count=st.integers(1, 150), row=st.integers(0, 149), dtype=st.sampled_from([torch.float64, torch.float32]))
def test_that_a_state_has_the_same_bits_in_any_batch_and_place(name, count, row, dtype):
    model, states = states_of(name, (150,), dtype=dtype)
    alone = trajectory(model, states[row], 12)
    assert torch.equal(trajectory(model, states[:count], 12), trajectory(model, states, 12)[:, :count])
    assert torch.equal(alone, trajectory(model, states, 12)[:, row])


@pytest.mark.parametrize("name", MODELS)
def test_that_threads_change_no_bit(name, monkeypatch):
    model, states = states_of(name, (5, 301))
    error = 0.01 * standard_normal((8, *states.shape), stream(1, "error"))
    steps = 8 * (1 + 4_000_000 // (states.numel() * 8))
    error = error.repeat(steps // 8, 1, 1, 1)
    paths, pools, pool = [], [], kernels.ThreadPoolExecutor
    monkeypatch.setattr(kernels, "ThreadPoolExecutor", lambda n: pools.append(n) or pool(n))
    for threads in (1, 2, 5):
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
        paths.append(trajectory(model, states, steps, error, every=steps // 8))
    assert pools == [2, 5] and all(torch.equal(path, paths[0]) for path in paths)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", MODELS)
def test_that_what_is_not_finite_goes_where_it_goes_in_torch(name, value):
    model, states = states_of(name, (6,))
    states[2, model.dim // 2] = value
    with unchecked():
        path, right = trajectory(model, states, 2), by_torch(model, states, 2)
    assert torch.allclose(path, right, rtol=1e-12, atol=1e-12, equal_nan=True) and path[:, [0, 1, 3, 4, 5]].isfinite().all()


@dataclass(frozen=True)
class Stopped(Lorenz63):
    def step(self, state):
        return state.clone()


@dataclass(frozen=True)
class Slower(Lorenz96):
    def tendency(self, state):
        return 0.5 * super().tendency(state)


@pytest.mark.parametrize("model", [Stopped(), Slower()])
def test_that_a_derived_model_never_takes_the_steps_of_its_parent(model, monkeypatch):
    calls, state = compiled(monkeypatch), torch.ones(2, model.dim, dtype=torch.float64) + torch.arange(model.dim)
    for path in (trajectory(model, state, 3)[-1], Forecast(model, 3)(state), ManySteps(model, 3).step(state)):
        assert torch.equal(path, by_torch(model, state, 3)[-1])
    assert not calls


class Marked(torch.Tensor):
    pass


def test_that_torch_takes_the_steps_wherever_it_could_be_noticed(monkeypatch):
    model, state = MODELS["lorenz63"][0], torch.tensor([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]], dtype=torch.float64)
    calls, wanted = compiled(monkeypatch), state.clone().requires_grad_()
    assert trajectory(model, wanted, 3).requires_grad
    assert trajectory(model, state, 3, torch.zeros(3, 2, 3, dtype=torch.float64, requires_grad=True)).requires_grad
    assert isinstance(trajectory(model, state.as_subclass(Marked), 3), Marked)

    def ahead(x):
        return trajectory(model, x, 3)[-1]

    assert torch.allclose(torch.func.vmap(ahead)(state), ahead(wanted), rtol=0, atol=1e-12)
    tangent = torch.func.jvp(ahead, (state,), (torch.ones_like(state),))[1]
    assert tangent.abs().sum() > 0 and torch.func.grad(lambda x: ahead(x).sum())(state).abs().sum() > 0
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(ahead(forward_ad.make_dual(state, torch.ones_like(state)))).tangent
    assert torch.allclose(found, tangent)
    with Watch(torch.float64):
        ahead(state)
    assert trajectory(model, state.to("meta"), 3).device.type == "meta"
    for other in (state.half(), state.bfloat16()):
        assert trajectory(model, other, 3).dtype == other.dtype
    assert trajectory(model, state.float(), 3, torch.zeros(3, 2, 3, dtype=torch.float64)).dtype == torch.float64
    assert trajectory(Lorenz63(sigma=torch.tensor(10.0, requires_grad=True)), state, 3).requires_grad
    assert not calls
    with torch.no_grad():
        assert not trajectory(model, wanted, 3).requires_grad
    with torch.inference_mode():
        assert trajectory(model, state, 3).is_inference()
    ahead(state)
    assert calls == 3 * ["lorenz63"]


def test_that_neither_the_compiler_nor_dapper_is_imported_before_it_is_needed(forked):
    answer = forked("--version", before="print(at_once, pnpda_nb.dynamics.Lorenz63().kernel.formula)")
    assert answer.stdout.startswith("set() lorenz63\n")


def test_that_what_is_compiled_is_kept_and_where_it_cannot_be_one_line_says_so(tmp_path, forked):
    again = "import numba, torch, warnings, pnpda_nb.dynamics as d\nfrom numba.core import caching\n"
    again += "warnings.simplefilter('always')\ndel sys.modules['pnpda_nb.dynamics.kernels'], d.kernels\n"
    walk = "\nprint(d.trajectory(d.DoubleWell(), torch.ones(1), 3).sum())"
    answer = forked("--version", before=f"{again}numba.config.CACHE_DIR = {str(tmp_path)!r}{walk}")
    kept = list(tmp_path.rglob("kernels.double_well-*.nbc"))
    assert answer.stdout.startswith("tensor(4.)\n") and not answer.stderr and len(kept) == 1, answer.stderr
    answer = forked("--version", before=f"{again}caching.CacheImpl._locator_classes = []{walk}")
    said = [line for line in answer.stderr.splitlines() if "arning" in line]
    assert answer.stdout.startswith("tensor(4.)\n") and len(said) == 1 and "NUMBA_CACHE_DIR" in said[0], answer.stderr


def test_that_steps_may_be_asked_to_be_those_of_the_formula(monkeypatch):
    calls = compiled(monkeypatch)
    model, state = states_of("lorenz63", (5,))
    with by_formula():
        assert torch.equal(trajectory(model, state, 20), by_torch(model, state, 20)) and not calls
    trajectory(model, state, 2)
    assert calls


def test_that_a_truth_by_formula_is_not_one_that_is_remembered():
    experiment = replace(sakov2012(cycles=20), first_ensemble="around_truth", spin_up=300)
    compiled_, again = (nature_run(experiment, 2, 1) for _ in range(2))
    with by_formula():
        formula = nature_run(experiment, 2, 1)
    assert torch.equal(compiled_, again) and torch.equal(nature_run(experiment, 2, 1), compiled_)
    start = nature_start(replace(experiment, spin_up=0), 2, 1)
    assert torch.equal(formula, by_torch(experiment.nature, start, 800)[300:]) and not torch.equal(formula, compiled_)


def test_that_a_full_disk_keeps_nobody_from_walking():
    from numba.core.caching import IndexDataCacheFile

    def save(*_):
        raise OSError(28, "No space left on device")

    state = torch.tensor([0.5], dtype=torch.float64)
    kernels.double_well.overloads.clear()
    with patch.object(IndexDataCacheFile, "save", save), patch.object(IndexDataCacheFile, "load", lambda *_: None):
        assert torch.allclose(trajectory(DoubleWell(), state, 3), by_torch(DoubleWell(), state, 3), rtol=1e-12)


# ------------------------------------------------------------------------------------------------ a user's tendency
def turning(x):
    return np.roll(x, 1) * np.array([1.0, -2.0, 0.5]) - x**3


@functools.cache
def turning_model(substeps):
    return from_tendency(turning, 3, 0.1, substeps, compile=True)


@pytest.mark.parametrize(
    "substeps, dtype",
    [
        (3, torch.float64),
        pytest.param(1, torch.float64, marks=pytest.mark.slow),
        pytest.param(1, torch.float32, marks=pytest.mark.slow),
        (3, torch.float32),
    ],
)
def test_that_a_compiled_tendency_makes_the_model_that_it_makes_in_numpy(substeps, dtype):
    slow, quick = from_tendency(turning, 3, 0.1, substeps, numpy=True, one_at_a_time=True), turning_model(substeps)
    states = standard_normal((4, 5, 3), stream(1, "states")).to(dtype)
    error = 0.1 * standard_normal((6, 4, 5, 3), stream(1, "error")).to(dtype)
    tolerance = 10 * STEP[dtype]
    assert torch.allclose(quick.step(states), slow.step(states), rtol=tolerance, atol=tolerance)
    assert quick.step(states).dtype == dtype
    paths = (trajectory(model, states, 6, error, every=2) for model in (quick, slow))
    assert torch.allclose(*paths, rtol=tolerance, atol=tolerance)
    assert torch.equal(trajectory(quick, states, 1)[1], quick.step(states))
    assert not quick.differentiable


@pytest.mark.parametrize(
    ("tendency", "said"),
    [
        (lambda x: np.gradient(x), "numba cannot compile <lambda>: .*gradient"),
        (lambda x: undefined(x), "numba cannot compile <lambda>: .*undefined"),  # noqa: F821
        (lambda x: x.sum(), r"expected real numbers of shape \(dim,\), got float64"),
        (lambda x: x + 1j, r"expected real numbers of shape \(dim,\), got array\(complex128"),
        (lambda x: x.reshape(1, -1), r"expected real numbers of shape \(dim,\), got array\(float64, 2d"),
        (Stopped, "numba cannot compile Stopped"),
    ],
)
def test_that_what_cannot_be_compiled_is_one_line_at_once(tendency, said):
    with pytest.raises(ValueError, match=f"^tendency: {said}[^\n]*$"):
        from_tendency(tendency, 3, 0.1, compile=True)


def moody(x):
    """-2 x, which is also written into the state, but for states that begin with a sign of something else."""
    if x[0] == 7:
        return x[:2]
    if x[0] == 8:
        x[2] = x[len(x) + int(x[1])]
    if x[0] == 9:
        return np.log(x - 10)
    x *= 2
    return -x


@functools.cache
def moody_model():
    return from_tendency(moody, 3, 0.1, compile=True, name="mine")


def beginning_with(number):
    return torch.tensor([[number, 0.0, 1.0], [number, 0.0, 2.0]], dtype=torch.float64)


@pytest.mark.parametrize(("sign", "said"), [(7, "as many numbers"), (8, "out of bounds")])
def test_that_a_compiled_tendency_that_goes_wrong_says_so_when_it_does(sign, said):
    model, state = moody_model(), beginning_with(sign)
    with pytest.raises(ValueError, match=f"mine: .*{said}"):
        model.step(state)
    with pytest.raises(ValueError, match=said):
        trajectory(model, state, 2)


def test_that_a_compiled_tendency_must_be_finite_where_the_model_asks_for_it():
    model, state = replace(moody_model(), on_nonfinite="raise"), beginning_with(9)
    for move in (model.step, lambda x: trajectory(model, x, 2)):
        with pytest.raises(ValueError, match="2 of 2 states became non-finite"):
            move(state)


def test_that_a_tendency_may_write_to_its_state():
    exact = from_tendency(lambda x: -2 * x, 3, 0.1)
    state = torch.ones(3, dtype=torch.float64)
    assert torch.allclose(moody_model().step(state), exact.step(state)) and torch.equal(state, torch.ones(3, dtype=torch.float64))
