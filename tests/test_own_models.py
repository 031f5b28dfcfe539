"""What a stranger's model may do: functions and programs, well behaved and not."""

import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pnpda_nb.classical import ETKF, LETKF, EnKF, EnKS, FourDVar, ParticleFilter, ThreeDVar
from pnpda_nb.core import standard_normal, stream, unchecked
from pnpda_nb.dynamics import AdditiveModelError, Lorenz63, jacobian, trajectory
from pnpda_nb.files import Field, Layout
from pnpda_nb.flow_matching import GaussianPrior
from pnpda_nb.interop import ManySteps, ProgramModel, UserModel, from_tendency, per_state
from pnpda_nb.observing import Covariance, DiagonalCovariance, Linear, NumpyOperator, ObservingNetwork, Select, operator_from
from pnpda_nb.pnp import PnPDA, PnPDA4D
from pnpda_nb.twin import FreeRun, TwinExperiment, cycle, make_archive, scores, tune

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
EDITS = """
import shutil
import sys
import h5py
import numpy as np
shutil.copy(sys.argv[1], sys.argv[2])
with h5py.File(sys.argv[2], "a") as edited:
    {}
"""  # without the time to import xarray


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
    assert torch.equal(model.step(STATES), own.step(STATES))
    assert torch.allclose(trajectory(model, STATES, 20), trajectory(own, STATES, 20), rtol=1e-12, atol=1e-12)  # compiled
    twice = from_tendency(tendency, 3, 0.02, substeps=2, numpy=numpy)
    assert torch.equal(twice.step(STATES), own.step(own.step(STATES)))
    assert torch.equal(ManySteps(model, 2).step(STATES), twice.step(STATES)) and ManySteps(own, 2).dt == twice.dt


@pytest.mark.parametrize(
    "function, said",
    [
        (lambda x: 1 / 0, "mine: raised ZeroDivisionError: division by zero"),
        (lambda x: x[..., :2], r"mine: expected states of shape \(4, 5, 3\), got \(4, 5, 2\)"),
        (lambda x: None, "mine: expected an array of real numbers, got NoneType$"),
        (
            lambda x: x / np.where(x == x.max(), 0, 1),
            "mine: 1 of 20 states became non-finite in a step of 1; the first of them was",
        ),
        (lambda x: "warm", "mine: expected an array of real numbers, got str$"),
        (lambda x: x + 1j, "mine: expected an array of real numbers, got ndarray of complex128"),
        (lambda x: x.astype(object), "mine: expected an array of real numbers, got ndarray of object"),
        (lambda x: x.astype(str), "mine: expected an array of real numbers, got ndarray of <U"),
        (lambda x: [[1.0, 2.0, 3.0], [1.0]], r"mine: expected an array of real numbers, got list \(.*inhomogeneous"),
        (lambda x: sys.exit("no licence"), "mine: raised SystemExit: no licence"),
        (lambda x: 2.0, r"mine: expected states of shape \(4, 5, 3\), got \(\)"),
    ],
)
def test_that_what_a_function_does_wrong_is_one_line_with_the_model_s_name(function, said):
    with np.errstate(divide="ignore"), pytest.raises(ValueError, match=said) as caught:
        UserModel(function, 3, numpy=True, name="mine", on_nonfinite="raise").step(STATES)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("numpy", [True, False])
@pytest.mark.parametrize(
    "answer, said",
    [
        (lambda x: None, "expected"),
        (lambda x: x[:2], r"mine: expected states of shape \(4, 5, 3\), got"),
        (lambda x: [float(v) for v in x] if float(x[0]) > 0 else [0.0], "mine: "),
        (lambda x: x + 1j, "mine: expected .*real numbers, got .*complex"),
        (lambda x: "warm", "mine: "),
    ],
)
def test_that_what_a_function_of_one_state_does_wrong_names_the_model(numpy, answer, said):
    with pytest.raises(ValueError, match=said) as caught:
        UserModel(answer, 3, numpy=numpy, name="mine", one_at_a_time=True).step(STATES)
    assert str(caught.value).startswith("mine: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize("numpy", [True, False])
@pytest.mark.parametrize(
    "tendency, said",
    [
        (lambda x: 0.0, "mine: "),
        (lambda x: x.sum(-1), "mine: raised ValueError: tendency: expected shape"),
        (lambda x: x[..., :1], r"mine: raised ValueError: tendency: expected shape \(4, 5, 3\), got \(4, 5, 1\)"),
        (lambda x: x + 1j, "mine: raised ValueError: tendency: expected .*real"),
        (lambda x: None, "mine: raised ValueError: tendency: expected .*, got NoneType"),
    ],
)
def test_that_a_tendency_is_not_spread_over_what_it_was_not_meant_for(numpy, tendency, said):
    with pytest.raises(ValueError, match=said) as caught:
        from_tendency(tendency, 3, 0.1, numpy=numpy, name="mine").step(STATES)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("numpy", [True, False])
def test_that_a_tendency_may_change_what_it_is_given(numpy):
    def greedy(x):
        x *= -1
        return x

    model = from_tendency(greedy, 3, 0.1, numpy=numpy)
    assert torch.allclose(model.step(STATES), from_tendency(lambda x: -x, 3, 0.1).step(STATES), rtol=1e-15)


def test_that_masked_numbers_and_other_precisions_are_what_they_are():
    with unchecked():  # as inside `cycle`, which sets the runs aside
        masked = UserModel(lambda x: np.ma.masked_where(x > 0, x), 3, numpy=True).step(STATES)
    assert torch.equal(masked.isnan(), STATES > 0) and torch.equal(masked[STATES <= 0], STATES[STATES <= 0])
    for dtype in (np.float32, np.longdouble, np.float16):
        moved = UserModel(lambda x: x.astype(dtype), 3, numpy=True).step(STATES)
        assert moved.dtype == torch.float64 and torch.allclose(moved, STATES, rtol=2e-3, atol=1e-3)
    assert UserModel(lambda x: x.float(), 3).step(STATES).dtype == torch.float64
    assert UserModel(lambda x: x, 3, numpy=True).step(STATES.float()).dtype == torch.float32


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
        (lambda: ProgramModel("", 3), "command: expected {input} and {output} in it, got ''"),
        (lambda: ProgramModel((), 3), "command: expected {input} and {output} in it, got ''"),
        (lambda: ProgramModel("{input} {output}", 3), "command: expected a program as its first word, got '{input}'"),
        (lambda: ProgramModel("model '{input} {output}", 3), "command: expected a line or a list of words, got"),
        (lambda: ProgramModel(None, 3), "command: expected "),
        (lambda: ProgramModel("model {input} {output}", 3, timeout="long"), "timeout: expected .*number"),
        (lambda: ProgramModel("model {input} {output}", 2.5), "dim: expected a whole number"),
        (lambda: UserModel(torch.sin, 3.5), "dim: expected a whole number"),
        (lambda: UserModel(torch.sin, "3"), "dim: expected a whole number"),
        (lambda: UserModel(torch.sin, 3, dt="0.1"), "dt: expected a.* number"),
        (lambda: UserModel(torch.sin, 3, dt=float("nan")), "dt: expected a"),
        (lambda: UserModel(3, 3), "function: expected "),
        (lambda: from_tendency(None, 3, 0.1), "tendency: expected "),
        (lambda: NumpyOperator(None, 3), "function: expected "),
        (lambda: NumpyOperator(np.abs, 2.5), "size: expected a whole number"),
        (lambda: ProgramModel("model {input} {output}", 4, layout=LAYOUT), "layout: expected 4 numbers, got 3"),
        (lambda: ProgramModel("model {input} {output}", 3, timeout=0), "timeout: expected a positive number, got 0"),
        (lambda: Layout((Field("a"), Field("a"))), r"fields: expected distinct names, got \['a', 'a'\]"),
        (
            lambda: Layout((Field("a", (2,), ("x",)), Field("b", (3,), ("x",)))),
            "fields: expected one size for dimension 'x', got 2 and 3",
        ),
        (lambda: Field("a", (2,), ("x", "y")), "dims: expected 1, one a size of a"),
        (lambda: LAYOUT.join({"wind": STATES[..., :2]}), "fields: expected wind, heat, got none called heat"),
        (lambda: UserModel(torch.sin, 3).step(STATES[..., :2]), r"state: expected states of size 3, got shape \(4, 5, 2\)"),
    ],
)
def test_that_wrong_settings_are_refused_by_name(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def lost_above(limit: float, **settings) -> UserModel:
    """Lorenz-63 that loses every state whose first variable is above `limit`."""
    own = Lorenz63()

    def step(x):
        if settings.get("numpy"):
            return np.where(x[..., :1] > limit, np.nan, own.step(torch.from_numpy(x)).numpy())
        return torch.where(x[..., :1] > limit, torch.nan, own.step(x))

    return UserModel(step, 3, own.dt, name="theirs", **settings)


# runs of which no state exceeds the limit, and others
PERILOUS = TwinExperiment(
    "perilous",
    Lorenz63(),
    Lorenz63(),
    ObservingNetwork(Select((0, 1, 2), 3), DiagonalCovariance([2.0, 2.0, 2.0])),
    interval=10,
    cycles=5,
    start=(1.5, -1.5, 25.0),
    start_variance=2.0,
    spin_up=500,
)
B = Covariance(2 * torch.eye(3, dtype=torch.float64))
PRIOR = GaussianPrior(torch.eye(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64), B)


@pytest.mark.parametrize("settings", [{}, {"numpy": True}], ids=["tensors", "arrays"])
@pytest.mark.parametrize(
    "method, members",
    [
        (FreeRun(), 1),
        (ThreeDVar(B), 1),
        (EnKF(), 10),
        (ETKF(), 10),
        (LETKF(), 10),
        (EnKS(lag=2), 10),
        (ParticleFilter(), 30),
        (FourDVar(B, window=2, shift=1, iterations=2), 1),
        (PnPDA(PRIOR, iterations=3), 1),
        (PnPDA4D(PRIOR, window=2, iterations=3), 1),
    ],
    ids=lambda x: type(x).__name__ if not isinstance(x, int) else "",
)
def test_that_a_run_that_a_stranger_s_model_loses_is_set_aside_and_no_other_notices(method, members, settings):
    if settings and isinstance(method, PnPDA4D):
        pytest.skip("needs derivatives")
    limit = 15.0
    theirs = replace(PERILOUS, forecast_model=lost_above(limit, **settings))
    with pytest.warns(UserWarning, match=f"{type(method).__name__}: . of 8 runs became non-finite"):
        result = cycle(theirs, method, members=members, runs=8, seed=3)
    alive = result.failed.values < 0
    assert alive.any() and not alive.all()
    assert np.isnan(scores(result).analysis_rmse.values[~alive]).all() and np.isfinite(result.analysis.values[alive]).all()
    # the first runs, alone; and all that live, with a model that loses none (4D-Var may try states that are lost, and live)
    first, whole = cycle(theirs, method, members=members, runs=2, seed=3), cycle(PERILOUS, method, members=members, runs=8, seed=3)
    assert alive[:2].all()
    for name in ("analysis", "estimate", "rmse"):
        assert np.allclose(result[name][:2], first[name], rtol=1e-9, atol=1e-9), name
        if not isinstance(method, FourDVar):
            assert np.allclose(result[name][alive], whole[name][alive], rtol=1e-9, atol=1e-9), name


def test_that_tuning_and_archives_count_runs_that_a_stranger_s_model_loses():
    theirs = replace(PERILOUS, forecast_model=lost_above(15.0))
    tuned = tune(lambda inflation: EnKF(inflation), {"inflation": [1.0, 1.1]}, theirs, members=10, runs=8, seed=3)
    assert (tuned.table.failed > 0).all() and (tuned.table.failed < 8).all() and np.isfinite(tuned.table["mean"]).all()
    with pytest.warns(UserWarning, match="became non-finite"):
        archive = make_archive(theirs, EnKF(), members=10, runs=12, seed=3, discard=1)
    assert 0 < archive.sizes["sample"] < 12 * 4 and np.isfinite(archive.background).all() and np.isfinite(archive.analysis).all()


def test_that_a_model_may_still_insist_on_finite_states():
    theirs = replace(PERILOUS, forecast_model=lost_above(15.0, on_nonfinite="raise"))
    with pytest.raises(ValueError, match="theirs: . of 80 states became non-finite in a step of 0.01"):
        cycle(theirs, EnKF(), members=10, runs=8, seed=3)


def test_that_a_nature_that_is_lost_is_named():
    with pytest.raises(ValueError, match="nature: the nature run became non-finite in runs"):
        cycle(replace(PERILOUS, nature=lost_above(15.0)), EnKF(), members=10, runs=8, seed=3)


def test_that_a_member_that_a_program_loses_costs_its_run_and_no_other(tmp_path):
    half = UserModel(lambda x: 0.5 * x, 3, dt=0.1)
    seen = ObservingNetwork(Select((0,), 3), DiagonalCovariance([1.0]))
    experiment = TwinExperiment("halving", half, half, seen, interval=1, cycles=2, start=(3.0,) * 3, spin_up=0)
    lines = "x = edited['state'][...]; edited['state'][...] = np.where(x < 4.6, x / 2, np.nan)"
    lossy = program(EDITS.format(lines), tmp_path, dt=0.1)
    with pytest.warns(UserWarning, match="EnKF: . of 6 runs became non-finite"):
        result = cycle(replace(experiment, forecast_model=lossy), EnKF(), members=4, runs=6, seed=1)
    whole, alive = cycle(experiment, EnKF(), members=4, runs=6, seed=1), result.failed.values < 0
    assert alive.any() and not alive.all() and np.allclose(result.analysis[alive], whole.analysis[alive], rtol=1e-12)


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
        ("edited.move('state', 'answer')", "theirs: expected 'state' in its output, got answer"),
        (
            "out = out.isel(variable=slice(2))",
            r"theirs: expected 'state' to be numbers of shape \(20, 3\), got float64 of \(20, 2\)",
        ),
        ("out = out.rename_dims(variable='column')", r"theirs: expected 'state' with dimensions \('member', 'variable'\), got"),
        ("edited['state'][3, 1] = np.nan", "theirs: 1 of 20 states became non-finite in a step of 1"),
        ("out['state'] = out['state'].astype(str)", r"theirs: expected 'state' to be numbers of shape \(20, 3\), got "),
        ("print('tables read', file=sys.stderr); sys.exit('no  convergence\\n')", "theirs: ended with status 1: no  convergence$"),
        ("print('only on paper'); sys.exit(3)", "theirs: ended with status 3: only on paper$"),
        ("sys.exit(0)", "theirs: expected an output file, got none"),
    ],
)
def test_that_what_a_program_does_wrong_is_one_line(lines, said, tmp_path):
    # who reads nothing imports nothing
    text = next((t.format(lines) for word, t in {"edited": EDITS, "out": WRITES}.items() if word in lines), f"import sys\n{lines}")
    with pytest.raises(ValueError, match=said) as caught:
        program(text, tmp_path, on_nonfinite="raise").step(STATES)
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


@pytest.mark.parametrize(
    "function, said",
    [
        (lambda x: None, "function: expected an array of real numbers, got NoneType"),
        (lambda x: "warm", "function: expected an array of real numbers, got str"),
        (lambda x: x + 1j, "function: expected an array of real numbers, got ndarray of complex128"),
        (lambda x: [[1.0], [1.0, 2.0]], "function: expected an array of real numbers, got list"),
        (lambda x: 1 / 0, "function: raised ZeroDivisionError: division by zero"),
    ],
)
def test_that_what_an_operator_s_function_does_wrong_is_one_line(function, said):
    for make in (lambda: NumpyOperator(function, 3)(STATES), lambda: operator_from(function, 3, 3)):
        with pytest.raises(ValueError, match=said) as caught:
            make()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("unit", [1e-15, 1e-6, 1.0, 1e9])
def test_that_an_operator_is_recognised_and_differentiated_in_any_unit(unit):
    scale = unit * np.array([1.0, 1e-7, 1e8])

    def curved(x):
        return (x / scale) ** 3 + np.roll(x / scale, 1, -1)

    operator = operator_from(curved, 3, 3)
    assert isinstance(operator, NumpyOperator)
    z = STATES.clone()
    z[0, 0, 0], z[1, 1] = 0.0, 0.0  # zeros among others, and a state of nothing else
    exact = (torch.diag_embed(3 * z**2) + torch.eye(3, dtype=torch.float64).roll(1, 0)) / torch.from_numpy(scale)
    found = operator.jacobian(z * torch.from_numpy(scale))
    assert ((found - exact).abs() * torch.from_numpy(scale) < 1e-7).all()
    # small coefficients do not hide that it bends, and large ones do not bend what is straight
    assert isinstance(operator_from(lambda x: unit * x**2, 3, 3), NumpyOperator)
    assert isinstance(operator_from(lambda x: unit * x + 1e-3 * unit * np.sin(x), 3, 3), NumpyOperator)
    matrix = unit * standard_normal((2, 3), stream(1, "matrix")).numpy()
    linear = operator_from(lambda x: x @ matrix.T, 2, 3)
    assert isinstance(linear, Linear) and np.allclose(linear.matrix.numpy(), matrix, rtol=1e-12, atol=0)


def test_that_what_only_happens_far_from_one_is_seen():
    for function in (lambda x: np.minimum(x, 1e5), lambda x: np.where(abs(x) < 1e-4, 0.0, x), lambda x: x + 1e-9 * x**2):
        assert isinstance(operator_from(function, 3, 3), NumpyOperator)

    def cautious(x):
        if abs(x).max() > 1e4:
            raise RuntimeError("beyond the table")
        return x

    assert isinstance(operator_from(cautious, 3, 3), NumpyOperator)


def test_that_no_state_s_derivatives_depend_on_another_that_is_lost():
    operator = NumpyOperator(np.sin, 3)
    alone = operator.jacobian(STATES)
    crowd = torch.cat((STATES, STATES[:1] + torch.nan, 1e30 * STATES[:1]))
    with unchecked():
        together = operator.jacobian(crowd)
    assert torch.equal(together[:4], alone) and torch.allclose(torch.diagonal(alone, dim1=-2, dim2=-1), STATES.cos(), atol=1e-9)
    assert operator.jacobian(STATES[:0]).shape == (0, 5, 3, 3)


def test_that_model_error_can_stand_in_for_a_model_s_own_noise():
    model = UserModel(lambda x: 0.5 * x, 3, name="relaxing")
    seen = ObservingNetwork(Select(range(3), 3), DiagonalCovariance(torch.full((3,), 0.1)))
    experiment = TwinExperiment(
        "relaxing",
        model,
        model,
        seen,
        interval=1,
        cycles=40,
        start=(0.0,) * 3,
        spin_up=0,
        nature_error=AdditiveModelError(1.0),
        model_error=AdditiveModelError(1.0),
    )
    variance = 1.0
    for _ in range(20):  # the Kalman filter's own
        forecast = 0.25 * variance + 1
        variance = forecast * 0.1 / (forecast + 0.1)
    result = cycle(experiment, EnKF(), members=60, runs=10, seed=1)
    error = (result.analysis - result.truth.values).values[:, 5:]
    assert abs((error**2).mean() / variance - 1) < 0.15
