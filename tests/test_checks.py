"""The border: what an annotation asks for, what is converted, what is told, and that nothing is looked at twice."""

import dataclasses
import inspect
import math
import pickle
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Annotated, Any, Literal

import annotated_types
import numpy as np
import pytest
import torch
from torch import Tensor

from pnpda_nb.classical import (
    ETKF,
    LETKF,
    Climatology,
    EnFF,
    EnKF,
    EnKS,
    EnRDA,
    EnSF,
    FourDVar,
    LocalEnKF,
    OptimalInterpolation,
    ParticleFilter,
    ThreeDVar,
)
from pnpda_nb.core import Gappy, RunStreams, guard, guarded, standard_normal, stream
from pnpda_nb.core.checks import GAPS, Complex, Converted, Index, Mask, shown
from pnpda_nb.core.rules import rule_of
from pnpda_nb.dynamics import Forecast, FunctionModel, KuramotoSivashinsky, Lorenz63, Model, trajectory
from pnpda_nb.flow_matching import FlowPrior, GaussianPrior, VelocityMLP
from pnpda_nb.observing import Covariance, DiagonalCovariance, Nonlinear, Observations, ObservingNetwork, Select
from pnpda_nb.pnp import PnPDA, PnPDA4D
from pnpda_nb.twin import FreeRun, TwinExperiment, cycle, tune

DOUBLE = torch.float64
EYE = Covariance(torch.eye(3, dtype=DOUBLE))
GAUSSIAN = GaussianPrior(torch.eye(3, dtype=DOUBLE), torch.zeros(3, dtype=DOUBLE), EYE)
NETWORK = ObservingNetwork(Select((0, 1, 2), 3), DiagonalCovariance([1.0] * 3))
SEEN = NETWORK.report([[0.5, -0.5, 1.0], [1.0, 0.0, 2.0]])
CLOUD = torch.randn(2, 8, 3, generator=torch.Generator().manual_seed(1), dtype=DOUBLE)
BENT = ObservingNetwork(Nonlinear(lambda x: x[..., [0, 2]] ** 2 / 5, 2, sites=(0, 2)), DiagonalCovariance([1.0, 1.0]))
METHODS = {
    "free run": FreeRun(),
    "climatology": Climatology(torch.zeros(3, dtype=DOUBLE)),
    "optimal interpolation": OptimalInterpolation(torch.zeros(3, dtype=DOUBLE), EYE),
    "3D-Var": ThreeDVar(EYE),
    "4D-Var": FourDVar(EYE),
    "EnKF": EnKF(),
    "ETKF": ETKF(),
    "LETKF": LETKF(half_width=1.0),
    "local EnKF": LocalEnKF(half_width=0.5),
    "EnKS": EnKS(),
    "particles": ParticleFilter(),
    "EnRDA": EnRDA(iterations=20),
    "EnSF": EnSF(steps=5),
    "EnFF": EnFF(steps=5),
    "PnP-DA": PnPDA(GAUSSIAN, 5),
    "PnP-DA 4D": PnPDA4D(GAUSSIAN, 5, window=1),
}


def analyse(method, background, observations=SEEN):
    windowed = getattr(method, "from_start", False)
    return method.analyse(
        background,
        [observations] if windowed else observations,
        forecast=Forecast(Lorenz63(), 1),
        generator=RunStreams(1, "x", runs=2),
    )


@pytest.mark.parametrize(
    ("annotation", "right", "wrong"),
    [
        (int, (3, np.int64(3), -1), (3.0, True, "3", 2**70, None, torch.tensor(3))),
        (float, (3, 3.0, np.float32(3), math.inf, torch.tensor(3.0)), (math.nan, "3", True, 3j, [3.0], 10**400, torch.zeros(2))),
        (bool, (True, np.bool_(False)), (0, 1, "True", None)),
        (str, ("", "x"), (b"x", 1, None)),
        (int | None, (None, 2), (2.5, "")),
        (
            tuple[int, ...],
            ((), (1, 2), [1, 2], range(3), np.array([1, 2]), torch.tensor([1, 2])),
            (3, "12", (1, 2.5), np.eye(2), {1: 2}),
        ),
        (tuple[float, float], ((1, 2.0), [0.5, 1]), ((1,), (1, 2, 3), (1, "2"), 1.0)),
        (Sequence, ([], (1, "x"), np.eye(2)), ("x", 3, {})),
        (Literal["ring", "line"], ("ring",), ("circle", 1, np.zeros(2), None)),
        (Literal["ring"] | Callable[[Tensor], Tensor], ("ring", abs), ("line", 3)),
        (Annotated[float, annotated_types.Gt(0), annotated_types.Lt(math.inf)], (1e-300, 3), (0, -1, math.inf, math.nan, "x")),
        (Annotated[int, annotated_types.Interval(ge=1, le=3)], (1, 3), (0, 4, 2.0)),
        (
            Tensor,
            (torch.zeros(2), torch.zeros((), dtype=torch.half)),
            (np.zeros(2), 1.0, [1.0], torch.zeros(2).int(), torch.zeros(2).bool(), torch.zeros(2) + 1j),
        ),
        (Mask, (torch.zeros(2).bool(),), (torch.zeros(2), True)),
        (Index, (torch.zeros(2).long(),), (torch.zeros(2), torch.zeros(2).bool(), 3)),
        (Complex, (torch.zeros(2), torch.zeros(2) + 1j), (1j, np.zeros(2))),
        (Model, (Lorenz63(), FunctionModel(abs, 3)), (None, 3, abs)),
        (torch.Generator, (stream(1), RunStreams(1, runs=2)), (None, 1)),
    ],
)
def test_that_a_rule_accepts_what_its_annotation_says_and_nothing_else(annotation, right, wrong):
    rule = rule_of(annotation)
    assert [rule(value) for value in right] == [None] * len(right)
    assert all(rule(value) for value in wrong), [value for value in wrong if not rule(value)]


def test_that_what_nobody_can_check_is_not_checked():
    assert rule_of(Any) is None and rule_of(object) is None and rule_of(int | Any) is None


def mean_of(values: Tensor, weight: float = 1.0, *more: int, **named: float) -> Tensor:
    return weight * values.mean()


def count_of(values: Gappy) -> int:
    return int(torch.isfinite(values).sum())


def steps_of(values: Tensor, steps: int) -> Iterator[Tensor]:
    for _ in range(steps):
        values = values**2
        yield checked_mean(values) + 0 * values


checked_mean, checked_count, checked_steps = guarded(mean_of), guarded(count_of), guarded(steps_of)
HOLE = torch.tensor([1.0, math.nan])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: checked_mean(HOLE), "values: expected finite numbers, got 1 of 2 that are not"),
        (lambda: checked_mean(torch.ones(2), "x"), "weight: expected a number, got 'x'"),
        (lambda: checked_mean(torch.ones(2), 1.0, 2, 2.5), "more: expected a whole number, got 2.5"),
        (lambda: checked_mean(torch.ones(2), extra="x"), "named: expected a number, got 'x'"),
        (
            lambda: checked_mean(torch.full((2,), 3e38), 1e38),
            r"mean_of: expected a finite result, got 1 of 1 that are not, from values a tensor of shape \(2,\), float32, "
            r"weight 1e\+38",
        ),
        (lambda: list(checked_steps(torch.ones(2), 1.5)), "steps: expected a whole number, got 1.5"),
        (lambda: list(checked_steps(torch.full((2,), 1e30), 3)), "steps_of: expected a finite result"),
    ],
)
def test_that_an_error_says_which_argument_what_came_and_what_was_expected(make, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        make()


def test_that_gaps_pass_where_they_are_allowed_and_behind_the_border():
    def careful(values: Gappy) -> int:
        return int(torch.isnan(checked_mean(values)))

    assert checked_count(HOLE) == 1 and guarded(careful)(HOLE) == 1


def test_that_a_generator_is_behind_the_border_only_while_it_steps():
    steps = checked_steps(torch.full((2,), 2.0), 3)
    assert next(steps)[0] == 4
    with pytest.raises(ValueError, match="values"):  # between two steps we are outside
        checked_mean(HOLE)
    assert len(list(steps)) == 2


def test_that_errors_of_others_name_all_arguments_and_ours_pass():
    def broken(values: Tensor, kind: str) -> Tensor:
        return {
            "shape": lambda: values @ torch.ones(7),
            "key": lambda: {}["x"],
            "ours": lambda: refuse(),
            "lines": lambda: refuse("a\nb"),
            "file": lambda: open("/no/such/file"),
        }[kind]()

    def refuse(what="nothing"):
        raise ValueError(f"values: expected something, got {what}")

    check = guarded(broken)
    with pytest.raises(
        ValueError, match=r"broken: cannot work with values a tensor of shape \(3,\), float32, kind 'shape' \(RuntimeError: "
    ) as caught:
        check(torch.ones(3), "shape")
    assert isinstance(caught.value.__cause__, RuntimeError)
    with pytest.raises(ValueError, match="KeyError"):
        check(torch.ones(3), "key")
    with pytest.raises(ValueError, match="^values: expected something, got nothing$"):
        check(torch.ones(3), "ours")
    with pytest.raises(ValueError, match="^values: expected something, got a b$"):
        check(torch.ones(3), "lines")
    with pytest.raises(FileNotFoundError, match="/no/such/file"):
        check(torch.ones(3), "file")
    with pytest.raises(TypeError, match="'kind'"):
        check(torch.ones(3))
    with pytest.raises(ValueError):  # an error leaves the border as it was
        checked_mean(HOLE)


@dataclass(frozen=True)
class _Base:
    scale: float = 1.0

    def scaled(self, values: Tensor) -> Tensor:
        return self.scale * values


@dataclass(frozen=True)
class Thing(_Base):
    weights: Tensor | None = None

    @classmethod
    def of(cls, values: Tensor) -> "Thing":
        return cls(1.0, values / 0)

    @staticmethod
    def total(values: Tensor) -> Tensor:
        return values.sum()

    @property
    def inverse(self) -> Tensor:
        return 1 / self.weights

    @cached_property
    def logarithm(self) -> Tensor:
        return self.weights.log()

    def _private(self, values: Tensor) -> Tensor:
        return values


@lru_cache
def remembered(size: int) -> Tensor:
    return torch.ones(size)


MODULE = {"__name__": __name__, "Thing": Thing, "remembered": remembered}
guard(MODULE)
remembered = MODULE["remembered"]


def test_that_constructors_methods_and_properties_of_a_class_are_behind_the_border():
    for make, name in (
        (lambda: Thing("x"), "scale"),
        (lambda: Thing().scaled(HOLE), "values"),  # what comes from a private class
        (lambda: Thing.total([1.0]), "values"),
        (lambda: Thing.of(torch.ones(2)), "Thing.of"),  # weights of inf
        (lambda: Thing(weights=torch.zeros(2)).inverse, "Thing.inverse"),
        (lambda: Thing(weights=torch.zeros(2)).logarithm, "Thing.logarithm"),
        (lambda: remembered("x"), "size"),
    ):
        with pytest.raises(ValueError, match=f"^{name}: "):
            make()
    assert torch.isnan(Thing()._private(HOLE)).any() and Thing(weights=torch.ones(2)).logarithm.sum() == 0
    assert dataclasses.replace(Thing(), scale=2).scale == 2


def test_that_functions_keep_their_names_signatures_memories_and_can_be_sent_to_others():
    assert remembered(3) is remembered(3) and remembered.cache_info().hits >= 1
    assert (
        str(inspect.signature(trajectory)).startswith("(model: 'Model', initial: 'Tensor', steps: 'int'")
        and "time first" in trajectory.__doc__
    )
    for thing in (trajectory, cycle, Lorenz63(), EnKF(), EnKF, Lorenz63.step, SEEN, GAUSSIAN.covariance):
        assert type(pickle.loads(pickle.dumps(thing))) is type(thing)
    assert pickle.loads(pickle.dumps(trajectory)) is trajectory


def test_that_a_model_that_is_given_or_becomes_nonsense_says_so():
    for make, name in (
        (lambda: Lorenz63().step(torch.full((3,), math.nan)), "state"),
        (lambda: Lorenz63().step(torch.ones(3).int()), "state"),
        (lambda: Lorenz63().step(torch.full((3,), 1e155, dtype=DOUBLE)), "Lorenz63.step"),
        (lambda: trajectory(Lorenz63(dt=0.5), torch.full((3,), 50.0, dtype=DOUBLE), 50), "trajectory"),
        (lambda: KuramotoSivashinsky(dim=8).reference(torch.zeros(8), 1, rtol=-1.0), "rtol"),
        (lambda: standard_normal((3,), None), "generator"),
    ):
        with pytest.raises(ValueError, match=f"^{name}: expected"):
            make()
    # transforms of torch go through
    assert torch.func.vmap(Lorenz63().step)(torch.ones(2, 3)).shape == (2, 3)
    assert torch.func.jacrev(Lorenz63().step)(torch.ones(3)).shape == (3, 3)


@pytest.mark.parametrize("name", METHODS)
def test_that_analyses_are_the_same_whatever_the_numbers_come_in(name):
    method = METHODS[name]
    right = analyse(method, CLOUD)
    assert right.dtype == DOUBLE
    for same in (CLOUD.numpy(), CLOUD.tolist()):
        assert torch.equal(analyse(method, same), right)
    whole = analyse(method, (10 * CLOUD).long())
    assert whole.dtype == DOUBLE and torch.equal(whole, analyse(method, (10 * CLOUD).trunc()))
    single = CLOUD.float()
    back = analyse(method, single)  # in its own precision: see test_precision
    assert back.dtype == torch.float32 and torch.equal(analyse(method, single.numpy()), back)
    assert (back - analyse(method, single.double())).abs().max() <= 1e-4 * back.abs().max()


@pytest.mark.parametrize("name", METHODS)
def test_that_backgrounds_that_are_none_are_refused_by_name(name):
    hole = CLOUD.clone()
    hole[1, 2, 0] = math.nan
    for wrong in (hole, hole.numpy(), CLOUD + 1j, "x", None, CLOUD[0, 0], [["x"]], [[1.0], [1.0, 2.0]], CLOUD > 0, 1.0):
        with pytest.raises(ValueError, match="^background: expected"):
            analyse(METHODS[name], wrong)


def test_that_observations_are_made_float64_or_refused():
    right = Observations(torch.tensor([[1.0, 2.0, 3.0]], dtype=DOUBLE), Select((0, 1, 2), 3), EYE).values
    for same in ([[1, 2, 3]], np.array([[1, 2, 3]], dtype="float32"), torch.tensor([[1, 2, 3]]), torch.tensor([[1.0, 2.0, 3.0]])):
        for made in (Observations(same, Select((0, 1, 2), 3), EYE), NETWORK.report(same)):
            assert made.values.dtype == DOUBLE and torch.equal(made.values, right)
    assert NETWORK.report([[1.0, math.nan, 3.0]]).missing.tolist() == [[False, True, False]]
    for wrong in ("x", None, [["x"]], right + 1j, right > 0, object()):
        with pytest.raises(ValueError, match="^values: expected"):
            NETWORK.report(wrong)


@pytest.mark.parametrize("start", [0.0, 1e-308, 1e-3])
def test_that_an_analysis_that_is_not_finite_says_which_runs_and_why(start):
    background = CLOUD.clone()
    background[1] = start
    method = PnPDA4D(GAUSSIAN, iterations=3, window=2)
    seen = [BENT.report(torch.ones(2, 2, dtype=DOUBLE))] * 2
    try:
        found = method.analyse(background, seen, forecast=Forecast(Lorenz63(), 2), generator=RunStreams(1, "t", runs=2))
    except ValueError as error:
        assert str(error).startswith(
            "PnPDA4D: expected a finite analysis, got one that is not in runs 1 of 2; the observation operator is nonlinear"
        )
    else:
        assert start == 1e-3 and torch.isfinite(found).all()


def test_that_numbers_whose_squares_overflow_are_told_as_the_cause():
    with pytest.raises(ValueError, match="^EnKF: expected a finite analysis, .* in runs 0 of 2; .*squares overflow"):
        analyse(EnKF(), CLOUD * torch.tensor([1e155, 1.0], dtype=DOUBLE)[:, None, None])
    with pytest.raises(ValueError, match="in members 0, 1, 2, 3, 4, ... of 8"):
        EnKF().analyse(1e155 * CLOUD[0], NETWORK.report([0.0, 0.0, 0.0]), forecast=None, generator=stream(1))


@dataclass(frozen=True)
class Breaking:
    """A method of the reader's own, of which run 1 becomes nan."""

    window: int = 1

    def analyse(self, background, observations, *, forecast, generator):
        return ThreeDVar(EYE).analyse(background, observations, forecast=forecast, generator=generator) + torch.tensor(
            [0.0, math.nan]
        ).reshape(2, 1, 1)


@pytest.mark.parametrize("network", [NETWORK, BENT])
def test_that_in_a_cycle_runs_are_set_aside_as_before(network):
    experiment = TwinExperiment("t", Lorenz63(), Lorenz63(), network, 1, 2, (1.0, 1.0, 20.0), spin_up=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = cycle(experiment, Breaking(), runs=2)
    assert result.failed.values.tolist() == [-1, 0] and np.isfinite(result.analysis.values[0]).all()
    zero = dataclasses.replace(experiment, start=(0.0, 0.0, 0.0), start_variance=0.0, background_variance=0.0)
    if network is BENT:
        with pytest.warns(UserWarning, match="became non-finite"):
            assert (cycle(zero, PnPDA4D(GAUSSIAN, iterations=3, window=2), runs=2).failed.values >= 0).all()


def test_that_settings_that_make_a_prior_or_a_covariance_degenerate_are_refused():
    zeros, ones = torch.zeros(3, dtype=DOUBLE), torch.ones(3, dtype=DOUBLE)
    network = VelocityMLP(3, (8,), 4, stream(0, "w"))
    architecture = {"network": "VelocityMLP", "dim": 3, "hidden": [8], "embedding": 4, "linear_skip": False}
    for settings, name in (
        ({"scale": zeros}, "scale"),
        ({"scale": -ones}, "scale"),
        ({"scale": ones / 0}, "scale"),
        ({"location": zeros / 0}, "location"),
        ({"factor": ones / 0}, "factor"),
        ({"factor": ones, "units": zeros}, "units"),
        ({"scale": torch.ones(2, dtype=DOUBLE)}, "scale"),
    ):
        with pytest.raises(ValueError, match=f"^{name}: expected"):
            FlowPrior(network, **{"location": zeros, "scale": ones, "architecture": architecture} | settings)
    for variances in ([0.0], [-1.0], [math.nan], [math.inf]):
        with pytest.raises(ValueError, match="^covariance: expected"):
            DiagonalCovariance(variances)


def test_that_the_annotations_of_the_whole_library_can_be_read():
    from test_fuzz import callables, homes

    from pnpda_nb.core.checks import _Rules

    for name, function in callables().items():
        home, first, member = homes()[name]
        _Rules(getattr(function, "__wrapped__", function), getattr(home, first) if member else None)
    assert len(callables()) > 400
    with pytest.raises(ValueError, match="^grid: expected a Mapping|^grid: expected a mapping"):
        tune(EnKF, 3, None)


def test_that_a_value_is_shown_in_a_few_words_whatever_it_is():
    class Broken:
        def __repr__(self):
            raise RuntimeError

    assert shown(torch.ones(2, 3)) == "a tensor of shape (2, 3), float32" and shown(np.ones(2)) == "an array of shape (2,), float64"
    assert shown(Broken()) == "Broken" and len(shown("x" * 1000)) == 80 and "\n" not in shown("a\nb")
    assert GAPS in Gappy.__metadata__ and GAPS in Converted.__metadata__


def test_that_sequences_may_be_of_pandas_or_xarray():
    import pandas as pd
    import xarray as xr

    days = pd.date_range("2020-01-01", periods=3)
    for value in (days, pd.Series([1.0, 2.0]), xr.DataArray([1.0, 2.0], dims="x"), np.arange(3.0), range(3)):
        assert rule_of(Sequence)(value) is None
    assert (
        rule_of(tuple[float, ...])(xr.DataArray([1.0, 2.0], dims="x")) is None
        and rule_of(Sequence[int])(pd.Series([0.5])) is not None
    )
    assert rule_of(Sequence[float])(xr.DataArray(np.ones((2, 2)), dims=("x", "y"))) == "a sequence"


def test_that_a_class_that_a_chapter_defines_anew_is_taken_for_the_one_that_it_is():
    rule = rule_of(EnKF)
    again = type("EnKF", (), {"__module__": "__main__", "__qualname__": "EnKF"})
    other = type("EnKF", (), {"__module__": "elsewhere", "__qualname__": "EnKF"})
    assert rule(again()) is None and rule(EnKF()) is None and rule(other()) == "an EnKF"
