"""Whatever has settings refuses those that its annotations do not ask for, by name and in one line, and takes all others."""

import dataclasses
import importlib
import math
import pkgutil
import re
import types
from collections.abc import Iterator
from functools import cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types as bounds
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_fuzz import aware, experiment, incremental

import pnpda_nb
from pnpda_nb.classical import EnKF
from pnpda_nb.core import Settings, unchecked
from pnpda_nb.core.checks import GAPS
from pnpda_nb.core.settings import annotations_of, parse_as
from pnpda_nb.dynamics import Lorenz63
from pnpda_nb.experiments import find_study
from pnpda_nb.learned.methods import ENSEMBLE_FIELDS
from pnpda_nb.observing import DiagonalCovariance, Select
from pnpda_nb.pnp import LinearConstraint

B = DiagonalCovariance(torch.ones(3).double())
LAW = LinearConstraint(torch.ones(1, 3).double())
NEEDED = {  # what is made of more than settings
    "AdditiveModelError": lambda: {"variance": 0.5},
    "AmortisedAnalysis": lambda: {"prior": aware()},
    "AsObservation": lambda: {"method": EnKF(), "constraint": LAW},
    "ConstrainedPnPDA": lambda: {"prior": None, "constraint": LAW},
    "WeakFourDVar": lambda: {"covariance": B, "model_error": B},
    "FourDVar": lambda: {"covariance": B},
    "DualFourDVar": lambda: {"covariance": B},
    "FunctionConstraint": lambda: {"function": torch.sin},
    "FunctionModel": lambda: {"function": torch.sin, "dim": 3},
    "LearnedMean": lambda: {"prior": aware(extra=ENSEMBLE_FIELDS), "filter": EnKF()},
    "LinearConstraint": lambda: {"matrix": torch.ones(1, 3).double()},
    "ManySteps": lambda: {"model": Lorenz63(), "steps": 2},
    "Misspecified": lambda: {"method": EnKF(), "variance": 1.0},
    "NeuralIncremental": lambda: {"prior": incremental(), "covariance": DiagonalCovariance(torch.ones(incremental().dim))},
    "NumpyOperator": lambda: {"function": abs, "size": 3},
    "ObservingNetwork": lambda: {"operator": Select((0, 1, 2), 3), "covariance": B},
    "PnPDA": lambda: {"prior": None},
    "PnPDA4D": lambda: {"prior": None},
    "ProgramModel": lambda: {"command": "model {input} {output}", "dim": 3},
    "QuadraticConstraint": lambda: {"matrix": torch.eye(3).double()},
    "RandomNetworks": lambda: {"dim": 40, "usual": (((0, 1), 1.0),)},
    "RandomSets": lambda: {"steps": 8, "dim": 3, "count": 2},
    "ThreeDVar": lambda: {"covariance": B},
    "TwinExperiment": lambda: {f.name: getattr(experiment(), f.name) for f in dataclasses.fields(experiment())},
    "UserModel": lambda: {"function": torch.sin, "dim": 3},
}

COMPLETED = {("NeuralIncremental", "window"), ("ProgramModel", "name"), ("RandomSets", "held_out")}  # by the class itself


def kinds(base: type = Settings) -> Iterator[type]:
    for kind in base.__subclasses__():
        if kind.__module__.startswith("pnpda_nb."):
            yield from kinds(kind)
            if not kind.__name__.startswith("_"):
                yield kind


for module in pkgutil.walk_packages(pnpda_nb.__path__, "pnpda_nb."):
    importlib.import_module(module.name)
KINDS = sorted({kind.__qualname__: kind for kind in kinds()}.values(), key=lambda kind: kind.__qualname__)


@cache
def example(kind: type) -> Any:
    return kind(**NEEDED.get(kind.__name__, dict)())


def plain(annotation: Any) -> bool:
    """Whether a value of this kind is made of numbers, words and None."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return plain(parts[0])
    if origin in (tuple, Union, types.UnionType):
        return all(part is Ellipsis or plain(part) for part in parts)
    return origin is Literal or annotation in (int, float, bool, str, type(None))


def fields_of(kind: type) -> list[tuple[str, Any]]:
    return [(name, annotation) for name, annotation in annotations_of(kind).items() if plain(annotation)]


def proper(value: Any) -> bool:
    """Whether all numbers in a value are finite, and fit into 64 bits."""
    if isinstance(value, tuple):
        return all(map(proper, value))
    return abs(value) < 2**63 if isinstance(value, int) else not isinstance(value, float) or math.isfinite(value)


def outside(bound: Any) -> list:
    """What is just outside a range, and what is far outside."""
    if isinstance(bound, bounds.Interval):
        return [value for end in bound for value in outside(end)]
    limit = next((getattr(bound, sign) for sign in ("ge", "gt", "le", "lt") if hasattr(bound, sign)), None)
    return {
        bounds.Ge: lambda: [limit - 1, math.nextafter(limit, -math.inf), -1e300],
        bounds.Gt: lambda: [limit, -1],
        bounds.Le: lambda: [limit + 1, math.nextafter(limit, math.inf), 1e300],
        bounds.Lt: lambda: [limit, limit + 1],
    }.get(type(bound), list)()


def wrong(annotation: Any) -> list:
    """What is not of a kind: of another one, out of range, not finite."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        values = wrong(parts[0]) + [value for bound in parts[1:] for value in outside(bound)]
        rules = [bound for bound in parts[1:] if isinstance(bound, bounds.Predicate)]
        values += [value for value in ((), (1, 1)) if not all(rule.func(value) for rule in rules)]  # none, or none that differ
        return [value for value in values if not (GAPS in parts and value == math.inf)]
    if origin in (Union, types.UnionType):
        return [value for part in parts if part is not type(None) for value in wrong(part) if value is not None]
    if origin is Literal:
        return ["neither", None, 3.5, True]
    if origin is tuple:
        each = parts[:1] if parts[-1] is Ellipsis else parts
        return ["1", 3.5, None] + [len(each) * (value,) for value in wrong(each[0])] + ([] if parts[-1] is Ellipsis else [()])
    return {
        bool: ["no", 1, 0.0, None],
        int: [2.5, "3", True, None, math.nan, math.inf, 2**63],
        float: ["3", True, None, math.nan, math.inf, -math.inf, 1j],
        str: [3, None, b"text"],
    }[annotation]


FIELDS = [(kind, *field) for kind in KINDS for field in fields_of(kind)]
NAMES = [f"{kind.__name__}.{name}" for kind, name, _ in FIELDS]


def test_that_every_kind_of_settings_is_found():
    found = {kind.__name__ for kind in KINDS}
    assert set(NEEDED) < found and len(found) >= 50 and len(FIELDS) > 350
    assert {"TrainingSettings", "OnPolicySettings", "IncrementalSettings", "SweepSettings", "Lorenz63Settings", "Sizes"} < found


@pytest.mark.parametrize(("kind", "name", "annotation"), FIELDS, ids=NAMES)
def test_that_a_wrong_value_is_refused_by_name_in_one_line(kind, name, annotation):
    given = NEEDED.get(kind.__name__, dict)()
    for value in wrong(annotation):
        for make in (lambda: kind(**given | {name: value}), lambda: dataclasses.replace(example(kind), **{name: value})):
            with pytest.raises(ValueError, match=rf"^{name}: expected [^\n]*, got [^\n]*$"):
                make()
            with unchecked(), pytest.raises(ValueError, match=rf"^{name}: expected [^\n]*, got [^\n]*$"):
                make()  # inside the library, too


@pytest.mark.parametrize("kind", KINDS, ids=[kind.__name__ for kind in KINDS])
@settings(max_examples=5)  # of every field
@given(data=st.data())
def test_that_whatever_the_annotations_ask_for_is_taken(kind, data):
    for name, annotation in fields_of(kind):
        value = data.draw(st.from_type(annotation).filter(proper), name)
        try:
            made = dataclasses.replace(example(kind), **{name: value})
        except ValueError as error:  # of two settings that do not fit together
            assert kind.__post_init__ is not Settings.__post_init__ and re.match(r"^[a-z0-9_, ]+: [^\n]+$", str(error)), error
            continue
        assert getattr(made, name) == value or (kind.__name__, name) in COMPLETED


@given(data=st.data())
def test_that_a_value_is_read_from_the_text_that_shows_it(data):
    numbers = [annotation for _, _, annotation in FIELDS if "str" not in str(annotation) and annotation is not str]
    annotation = data.draw(st.sampled_from(numbers))
    value = data.draw(st.from_type(annotation).filter(lambda v: v != () and proper(v)))
    text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
    assert parse_as("setting", text, annotation) == value


@pytest.mark.parametrize(("kind", "name", "annotation"), FIELDS, ids=NAMES)
def test_that_a_text_that_says_something_else_is_refused_by_name(kind, name, annotation):
    if annotation is str or "str" in str(annotation):
        return
    for text in ("neither", "1,neither", "", "nan"):
        with pytest.raises(ValueError, match=rf"^{name}: expected [^\n]*, got '{text}'$"):
            parse_as(name, text, annotation)


def test_that_a_class_of_somebody_else_is_checked_as_far_as_its_names_are_known():
    @dataclasses.dataclass(frozen=True)
    class Mine(EnKF):
        seen: "NameForTypeCheckers" = None  # noqa: F821

    assert Mine(seen=3).seen == 3
    with pytest.raises(ValueError, match="^inflation: expected a positive number, got 0$"):
        Mine(inflation=0)


def test_that_none_leaves_out_all_where_there_may_be_none():
    kinds = annotations_of(type(find_study("sqg").presets["smoke"]))
    assert parse_as("jets", "none", kinds["jets"]) == () and parse_as("jets", "20,40", kinds["jets"]) == (20.0, 40.0)
    with pytest.raises(ValueError, match="^columns: expected values that differ, got 'none'"):
        parse_as("columns", "none", kinds["columns"])
