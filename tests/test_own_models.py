"""What a stranger's model may do: functions and programs, well behaved and not."""

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from pnpda_nb.dynamics import (
    AdditiveModelError,
    Lorenz63,
    jacobian,
    standard_normal,
    stream,
    trajectory,
)
from pnpda_nb.ensemble import EnKF
from pnpda_nb.files import Field, Layout
from pnpda_nb.interop import (
    ManySteps,
    NumpyOperator,
    ProgramModel,
    UserModel,
    from_tendency,
    operator_from,
    per_state,
)
from pnpda_nb.observing import DiagonalCovariance, Linear, ObservingNetwork, Select
from pnpda_nb.twin import TwinExperiment, cycle

STATES = standard_normal((4, 5, 3), stream(1, "states"))
LAYOUT = Layout((Field("wind", (2,), ("cell",), "m s-1"), Field("heat")))


def program(text: str, tmp_path, **settings) -> ProgramModel:
    """A Python program that finds its input as `given` and writes what it leaves in `out`, by h5netcdf."""
    path = tmp_path / "model.py"
    path.write_text(text)
    return ProgramModel([sys.executable, path, "{input}", "{output}"], 3, name="theirs", **settings)


WRITES = """
import sys
import xarray as xr
given = xr.load_dataset(sys.argv[1], engine="h5netcdf")
out = given.copy(deep=True)
{}
out.to_netcdf(sys.argv[2], engine="h5netcdf")
"""


def test_that_a_function_of_one_state_and_one_of_a_batch_are_the_same_model():
    both = [
        UserModel(lambda x: np.array([x[1], x[0], x[2] ** 2]), 3, numpy=True, one_at_a_time=True),
        UserModel(lambda x: torch.stack((x[1], x[0], x[2] ** 2)), 3, one_at_a_time=True),
        UserModel(lambda x: torch.stack((x[..., 1], x[..., 0], x[..., 2] ** 2), -1), 3),
    ]
    for model in both:
        assert torch.equal(model.step(STATES), both[-1].step(STATES)) and model.step(STATES[0, 0]).shape == (3,)
        assert torch.allclose(jacobian(model, STATES)[..., 2, 2], 2 * STATES[..., 2], atol=1e-8)
    assert per_state(np.cumsum)(STATES.numpy()).shape == STATES.shape


@pytest.mark.parametrize("numpy", [True, False])
def test_that_a_tendency_is_stepped_like_the_book_s_own_models(numpy):
    own = Lorenz63()

    def tendency(x):
        slopes = own.tendency(torch.as_tensor(x))
        return slopes.numpy() if numpy else slopes

    model = from_tendency(tendency, 3, 0.01, numpy=numpy, names=("x", "y", "z"))
    assert torch.equal(trajectory(model, STATES, 20), trajectory(own, STATES, 20))
    twice = from_tendency(tendency, 3, 0.02, substeps=2, numpy=numpy)
    assert torch.equal(twice.step(STATES), trajectory(own, STATES, 2)[-1])
    assert torch.equal(ManySteps(own, 2).step(STATES), twice.step(STATES)) and ManySteps(own, 2).dt == twice.dt


@pytest.mark.parametrize(
    "function, said",
    [
        (lambda x: 1 / 0, "mine: raised ZeroDivisionError: division by zero"),
        (lambda x: x[..., :2], r"mine: expected states of shape \(4, 5, 3\), got \(4, 5, 2\)"),
        (lambda x: None, "mine: "),
        (lambda x: x / np.where(x == x.max(), 0, 1), "mine: 1 of 20 states became non-finite in a step of 1; the first of them was"),
        (lambda x: "warm", "mine: raised"),
    ],
)
def test_that_what_a_function_does_wrong_is_one_line_with_the_model_s_name(function, said):
    with np.errstate(divide="ignore"), pytest.raises(ValueError, match=said) as caught:
        UserModel(function, 3, numpy=True, name="mine").step(STATES)
    assert "\n" not in str(caught.value)


def test_that_a_function_on_arrays_that_is_taken_for_one_on_tensors_is_told_so():
    with pytest.raises(ValueError, match="mine: expected a tensor .numpy=True is for arrays., got ndarray"):
        UserModel(lambda x: np.asarray(x), 3, name="mine").step(STATES)


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda: UserModel(torch.sin, 3, on_nonfinite="ignore"), "on_nonfinite: expected 'raise' or 'pass', got 'ignore'"),
        (lambda: from_tendency(torch.sin, 3, 0.1, substeps=0), "substeps: expected a whole number of at least 1, got 0"),
        (lambda: ManySteps(Lorenz63(), 0), "steps: expected a whole number of at least 1, got 0"),
        (lambda: UserModel(torch.sin, 3, names=("x",)), "names: expected 3"),
        (lambda: ProgramModel("model {input}", 3), "command: expected {input} and {output} in it, got 'model {input}'"),
        (lambda: ProgramModel("model {input} {output}", 4, layout=LAYOUT), "layout: expected 4 numbers, got 3"),
        (lambda: ProgramModel("model {input} {output}", 3, timeout=0), "timeout: expected a positive number of seconds, got 0"),
        (lambda: Layout((Field("a"), Field("a"))), r"fields: expected distinct names, got \['a', 'a'\]"),
        (lambda: Layout((Field("a", (2,), ("x",)), Field("b", (3,), ("x",)))), "fields: expected one size for dimension 'x', got 2 and 3"),
        (lambda: Field("a", (2,), ("x", "y")), "dims: expected 1, one a size of a"),
        (lambda: LAYOUT.join({"wind": STATES[..., :2]}), "fields: expected wind, heat, got none called heat"),
        (lambda: UserModel(torch.sin, 3).step(STATES[..., :2]), r"state: expected states of size 3, got shape \(4, 5, 2\)"),
    ],
)
def test_that_wrong_settings_are_refused_by_name(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def test_that_a_run_whose_model_blows_up_is_set_aside_if_that_is_what_was_asked_for():
    def explode(x):
        return np.where(x > 2.2, np.inf, 0.9 * x)

    model = UserModel(explode, 1, numpy=True, on_nonfinite="pass")
    seen = ObservingNetwork(Select((0,), 1), DiagonalCovariance([1.0]))
    experiment = TwinExperiment(
        "explosive", UserModel(lambda x: 0.9 * x, 1), model, seen, interval=1, cycles=5, start=(0.0,), spin_up=0
    )  # fmt: skip
    with pytest.warns(UserWarning, match="became non-finite"):
        failed = cycle(experiment, EnKF(), members=20, runs=6, seed=1).failed
    assert (failed >= 0).any() and (failed < 0).any()


def test_that_a_layout_names_splits_and_joins_states_of_both_libraries():
    assert LAYOUT.names == ("wind[0]", "wind[1]", "heat") and LAYOUT.dim == 3
    fields = LAYOUT.split(STATES)
    assert fields["heat"].shape == (4, 5) and torch.equal(LAYOUT.join(fields), STATES)
    assert np.array_equal(LAYOUT.join(LAYOUT.split(STATES.numpy())), STATES.numpy())
    data = LAYOUT.dataset(STATES[0])
    assert data.wind.dims == ("member", "cell") and data.wind.units == "m s-1" and data.heat.dims == ("member",)
    grid = Layout((Field("t", (2, 3)),))
    assert grid.names[4] == "t[1,1]" and grid.fields[0].dims == ("t_0", "t_1")


@pytest.mark.parametrize("layout", [None, LAYOUT])
def test_that_a_program_moves_a_whole_batch_in_one_call(layout, tmp_path):
    lines = "open(sys.argv[0] + '.calls', 'a').write('.')\nfor name in out: out[name] = out[name] * 2 * given.attrs['dt']"
    model = program(WRITES.format(lines), tmp_path, layout=layout, dt=0.25, names=() if layout else ("x", "y", "z"))
    assert torch.equal(model.step(STATES), STATES / 2)
    assert (tmp_path / "model.py.calls").read_text() == "." and not model.differentiable
    assert model.names == (LAYOUT.names if layout else ("x", "y", "z"))


@pytest.mark.parametrize(
    "lines, said",
    [
        ("out = out.rename(state='answer')", "theirs: expected 'state' in its output, got answer"),
        ("out = out.isel(variable=slice(2))", r"theirs: expected 'state' to be numbers of shape \(20, 3\), got float64 of \(20, 2\)"),
        ("out = out.rename_dims(variable='column')", r"theirs: expected 'state' with dimensions \('member', 'variable'\), got"),
        ("out['state'][3, 1] = float('nan')", "theirs: 1 of 20 states became non-finite in a step of 1"),
        ("print('tables read', file=sys.stderr); sys.exit('no  convergence\\n')", "theirs: ended with status 1: no  convergence$"),
        ("print('only on paper'); sys.exit(3)", "theirs: ended with status 3: only on paper$"),
        ("sys.exit(0)", "theirs: expected an output file, got none"),
    ],
)
def test_that_what_a_program_does_wrong_is_one_line(lines, said, tmp_path):
    with pytest.raises(ValueError, match=said) as caught:
        program(WRITES.format(lines), tmp_path).step(STATES)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc to see other processes")
def test_that_a_program_that_hangs_is_ended_with_all_that_it_started(tmp_path):
    number = tmp_path / "child"
    script = f"sleep 300 & echo $! > {number}; wait"
    model = ProgramModel(["sh", "-c", script, "{input}", "{output}"], 3, name="theirs", timeout=2)
    with pytest.raises(ValueError, match="theirs: expected an answer within 2 s, got none"):
        model.step(STATES)
    state = Path("/proc") / number.read_text().strip() / "stat"
    for _ in range(100):  # what was killed is gone, or waits to be collected
        try:
            if state.read_text().split()[2] in "ZX":
                return
        except (FileNotFoundError, ProcessLookupError):
            return
        time.sleep(0.1)
    pytest.fail("the program's own child is still running")


def test_that_a_command_may_be_a_line_and_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    copy = ProgramModel("cp {input} {output}", 3)
    assert copy.name == "cp" and torch.equal(copy.step(STATES), STATES) and copy.step(STATES[:0]).shape == (0, 5, 3)
    with pytest.raises(ValueError, match=r"nowhere: cannot start '/nowhere' \(No such file or directory\)"):
        ProgramModel("/nowhere {input} {output}", 3).step(STATES)
    assert not list(tmp_path.iterdir())
    assert copy.step(STATES.float()).dtype == torch.float32


def test_that_old_files_are_read_as_well_as_written(tmp_path):
    copy = ProgramModel("cp {input} {output}", 3, layout=LAYOUT, classic=True)
    assert torch.equal(copy.step(STATES), STATES)


def test_that_an_operator_is_recognised_for_what_it_is():
    assert operator_from(lambda x: x[:, [2, 0]], 2, 3) == Select((2, 0), 3)
    assert isinstance(operator_from(lambda x: x[:, :2].sum(1, keepdims=True), 1, 3), Linear)
    for function in (np.abs, lambda x: x + 1, lambda x: np.maximum(x, 0), lambda x: x**3):
        operator = operator_from(function, 3, 3)
        assert isinstance(operator, NumpyOperator) and np.array_equal(operator(STATES).numpy(), function(STATES.numpy()))
    with pytest.raises(ValueError, match="function: raised IndexError"):
        operator_from(lambda x: x[:, 7:8] + x[:, 7], 1, 3)
    with pytest.raises(ValueError, match=r"function: expected observations of shape \(20, 2\), got \(20, 3\)"):
        NumpyOperator(np.abs, 2)(STATES)


def test_that_interop_does_not_need_dapper():
    code = "import sys, pnpda_nb.interop; assert 'dapper' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_that_model_error_can_stand_in_for_a_model_s_own_noise():
    model = UserModel(lambda x: 0.5 * x, 3, name="relaxing")
    seen = ObservingNetwork(Select(range(3), 3), DiagonalCovariance(torch.full((3,), 0.1)))
    experiment = TwinExperiment(
        "relaxing", model, model, seen, interval=1, cycles=40, start=(0.0,) * 3, spin_up=0,
        nature_error=AdditiveModelError(1.0), model_error=AdditiveModelError(1.0),
    )  # fmt: skip
    variance = 1.0
    for _ in range(20):  # the Kalman filter's own
        forecast = 0.25 * variance + 1
        variance = forecast * 0.1 / (forecast + 0.1)
    result = cycle(experiment, EnKF(), members=60, runs=10, seed=1)
    error = (result.analysis - result.truth.values).values[:, 5:]
    assert abs((error**2).mean() / variance - 1) < 0.15
