"""Methods on a field of 8 192 numbers: nothing as large as the state squared, and little memory."""

import pytest

SCRIPT = """
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pnpda_nb.classical import LETKF, EnKF, OptimalInterpolation, ThreeDVar
from pnpda_nb.core import Grid, Homogeneous, gaspari_cohn, standard_normal, stream
from pnpda_nb.dynamics import FunctionModel
from pnpda_nb.learned import AmortisedAnalysis, AnalysisPrior, BlindPrior
from pnpda_nb.observing import DiagonalCovariance, FactoredError, Nonlinear, ObservingNetwork, Select
from pnpda_nb.pnp import EnsembleResidual, PnPDA
from pnpda_nb.twin import TwinExperiment, cycle

PLANE = Grid((64, 128), "circular")
HOMOGENEOUS = Homogeneous(PLANE, lambda apart: gaspari_cohn(apart, 5.0))
FACTORED = FactoredError(standard_normal((PLANE.dim, 10), stream(1, "factor")), 0.1)
MANY = tuple(range(0, PLANE.dim, 16))
SELECT = Select(MANY, PLANE.dim)
BENT = Nonlinear(lambda x: x[..., :: 1024].square() / 4 + x[..., :: 1024], PLANE.dim // 1024)
ZERO, ONE, SIZE = torch.tensor(0.0).double(), torch.tensor(1.0).double(), dict(width=4, dilations=(1,), rank=2)
PRIOR = AnalysisPrior.make(ZERO, ONE, ONE, dim=PLANE.dim, geometry=PLANE, half_width=5.0, **SIZE)
METHODS = {
    "homogeneous": (ThreeDVar(HOMOGENEOUS, 0.5), SELECT, 1),
    "nonlinear": (ThreeDVar(HOMOGENEOUS, 0.5), BENT, 1),
    "factored": (ThreeDVar(FACTORED), SELECT, 1),
    "diagonal": (OptimalInterpolation(torch.zeros(PLANE.dim).double(), DiagonalCovariance(torch.ones(PLANE.dim))), SELECT, 1),
    "EnKF": (EnKF(1.02), SELECT, 20),
    "EnKF of all": (EnKF(1.02), Select(range(PLANE.dim), PLANE.dim), 20),
    "LETKF": (LETKF(half_width=5.0, distance=PLANE), SELECT, 20),
    "look": (AmortisedAnalysis(PRIOR, blind=True), SELECT, 1),
    "loop": (PnPDA(PRIOR, 3, data_step="kalman"), SELECT, 2),
    "members": (PnPDA(BlindPrior(PRIOR), 3, data_step="kalman", residuals=EnsembleResidual(5.0, distance=PLANE)), SELECT, 5),
    "drawn": (AmortisedAnalysis(PRIOR, spread=0.1), SELECT, 2),
}


class NothingDense(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        answer = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(answer):
            if isinstance(tensor, torch.Tensor) and sum(n >= PLANE.dim for n in tensor.shape) > 1:
                raise AssertionError(f"{function} made a tensor of shape {tuple(tensor.shape)}")
        return answer


def drift(x):
    # the largest 25 waves, which move east
    waves = torch.fft.rfft2(x.unflatten(-1, PLANE.shape).roll(1, -1))
    waves[..., 3:-2, :] = waves[..., 3:] = 0
    return torch.fft.irfft2(waves, s=PLANE.shape).flatten(-2)


DRIFT = FunctionModel(drift, PLANE.dim)
for name, (method, operator, members) in METHODS.items():
    network = ObservingNetwork(operator, DiagonalCovariance(torch.full((operator.size,), 0.1)))
    about = dict(start=(0.0,) * PLANE.dim, start_variance=PLANE.dim / 25, spin_up=1, background_variance=160.0)
    experiment = TwinExperiment(name, DRIFT, DRIFT, network, interval=1, cycles=CYCLES, **about)
    with NothingDense():
        result = cycle(experiment, method, members=members, runs=1, seed=1)
    truth = result.truth.values[0, -1]
    climate, after = ((x**2).mean() ** 0.5 for x in (truth, result.analysis.values[0, -1] - truth))
    print(name, climate, after, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2, sep=", ")
"""
METHODS = ("homogeneous", "nonlinear", "factored", "diagonal", "EnKF", "EnKF of all", "LETKF", "look", "loop", "members", "drawn")


@pytest.mark.parametrize("cycles", [1, pytest.param(100, marks=pytest.mark.slow)])
def test_that_no_method_squares_the_size_of_a_field(cycles, forked):
    done = forked("--version", before=f"CYCLES = {cycles}\n{SCRIPT}")
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line.split(", ") for line in done.stdout.splitlines()[:-1]]
    assert tuple(line[0] for line in lines) == METHODS
    for name, climate, after, peak in lines:
        assert float(after) < float(climate), name
        assert float(peak) < 1.5, name  # gigabytes, of everything so far
