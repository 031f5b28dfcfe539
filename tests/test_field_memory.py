"""Methods on a field of 8 192 numbers: nothing as large as the state squared, and little memory."""

import subprocess
import sys

import pytest

SCRIPT = """
import resource
from math import prod

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pnpda_nb.classical import LETKF, EnKF, LocalEnKF, ThreeDVar
from pnpda_nb.core import standard_normal, stream
from pnpda_nb.core.grid import Grid, gaspari_cohn
from pnpda_nb.core.homogeneous import Homogeneous
from pnpda_nb.dynamics import FunctionModel
from pnpda_nb.observing import DiagonalCovariance, FactoredError, Nonlinear, ObservingNetwork, Select
from pnpda_nb.twin import TwinExperiment, cycle


class NothingDense(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        answer = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(answer):
            if isinstance(tensor, torch.Tensor) and sum(n >= DIM for n in tensor.shape) > 1:
                raise AssertionError(f"{function} made a tensor of shape {tuple(tensor.shape)}")
        return answer
"""
