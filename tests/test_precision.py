"""Precision and device are those of the state: what changes them within an analysis, and what that does to scores."""

import sys
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import t as student
from test_every_method import ENSEMBLE, FOUR_D, METHODS, pair, small
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import pnpda_nb
from pnpda_nb.core import RunStreams, standard_normal, stream
from pnpda_nb.core.compute import _alike, _casts
from pnpda_nb.dynamics import Forecast, Lorenz63, Lorenz96, trajectory
from pnpda_nb.flow_matching import FlowPrior, GaussianPrior, VelocityMLP
from pnpda_nb.learned import AmortisedAnalysis, AnalysisPrior, LearnedMean, OnPolicySettings, TruthRecord
from pnpda_nb.learned.records import Examples
from pnpda_nb.methods import METHODS as ALL
from pnpda_nb.methods import Misspecified, build_method, method_by_name
from pnpda_nb.observing import Covariance, DiagonalCovariance, Linear, Nonlinear, ObservingNetwork, Select
from pnpda_nb.pnp import PnPDA
from pnpda_nb.twin import TESTBEDS, cycle, mean_and_error, scores

PACKAGE = str(Path(pnpda_nb.__file__).parent)
SINGLE, DOUBLE = torch.float32, torch.float64

# where an analysis of states in single precision computes in double precision all the same, and why
IN_DOUBLE = {
    "core.random.standard_normal": "draws are the same in all precisions, and rounded by whoever asked for them",
    "classical.ensemble.random_rotation": "a rotation is a draw, and all of it is made of draws before it is rounded",
    "observing.covariance.inverse": "what is inverted is what was given, once: rounding comes last",
    "core.grid": "distances and tapers are made once, of the grid and not of states, and rounded by whoever asked for them",
}
# where a state goes to the device from, or leaves it for, another
ELSEWHERE = {
    "core.random.standard_normal": "a generator draws on its own device",
    "classical.ensemble.random_rotation": "a rotation is a draw, and made where the generator is",
    "core.compute._cast": "what a method holds is moved once",
}


def place() -> str:
    """The function of the library that an operation of torch is done for."""
    frame = sys._getframe(2)
    while frame is not None and not (frame.f_code.co_filename.startswith(PACKAGE) and frame.f_code.co_name[0] != "<"):
        frame = frame.f_back
    if frame is None:
        return ""
    module = Path(frame.f_code.co_filename).relative_to(PACKAGE).with_suffix("")
    return f"{'.'.join(module.parts)}.{frame.f_code.co_name}"


def listed(where: str, exceptions) -> bool:
    return any(where == name or where.startswith(f"{name}.") for name in exceptions)


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


SELECTING = ("pnpda_kalman", "pnpda_prox", "learned_kalman", "amortised_blind")  # for `_selection`, on devices
WAITING = ("local_enkf", "amortised")  # for `LocalEnKF.update` and `Residual.draw`, which are being rewritten


def waiting(*more):
    reason = "tapers or draws in double precision meet states"
    return [pytest.param(n, marks=pytest.mark.xfail(reason=reason, strict=False)) if n in (*WAITING, *more) else n for n in EVERY]


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("where", ["lorenz63", "lorenz96"])
@pytest.mark.parametrize("name", waiting())
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
        elif there and any(x.ndim and not isinstance(x, There) for x in tensors):
            raise RuntimeError(f"{function} in {place()}: expected all tensors to be on one device")
        args, kwargs = tree_map(lambda x: x.here if isinstance(x, There) else x, (args, kwargs))
        return tree_map(lambda x: There(x) if there and isinstance(x, torch.Tensor) else x, function(*args, **kwargs))


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("where", ["lorenz63", "lorenz96"])
@pytest.mark.parametrize("name", [n for n in waiting(*SELECTING) if n not in FOUR_D])  # torch.func takes no such tensors
def test_that_no_analysis_leaves_the_device_of_its_background(name, where, missing):
    with Device() as device:
        result = asked(name, where, DOUBLE, missing, there=There)()
    for x in result if isinstance(result, tuple) else (result,):
        assert isinstance(x, There)
        x = x.here
    assert not (found := {where for where in device.moved if not listed(where, ELSEWHERE)}), found
