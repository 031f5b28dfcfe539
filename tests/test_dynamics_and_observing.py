"""Properties of models, operators and covariances, through the installed package."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pnpda_nb.core import gaspari_cohn, gaspari_cohn_matrix, standard_normal, stream
from pnpda_nb.dynamics import AdditiveModelError, FunctionModel, Lorenz63, Model, trajectory
from pnpda_nb.observing import Covariance, Linear, Nonlinear, ObservingNetwork, Select

seeds = st.integers(0, 10**6)


@given(seed=seeds, runs=st.integers(1, 5), members=st.integers(1, 5))
def test_that_trajectories_of_a_batch_are_those_of_its_members(seed, runs, members):
    model = Lorenz63()
    batch = 5 * standard_normal((runs, members, 3), stream(seed))
    together = trajectory(model, batch, 20)
    assert together.shape == (21, runs, members, 3)
    assert torch.allclose(together[:, -1, -1], trajectory(model, batch[-1, -1], 20), rtol=0, atol=1e-11)
    assert torch.equal(together[0], batch)


def test_that_rk4_converges_at_order_four():
    start = torch.tensor([[1.0, 2.0, 3.0], [5.0, 5.0, 20.0], [-3.0, 1.0, 15.0]], dtype=torch.float64)

    def end(n):
        return trajectory(Lorenz63(dt=0.5 / n), start, n)[-1]

    exact = end(3200)
    errors = [(end(n) - exact).norm().item() for n in (100, 200, 400)]
    orders = [math.log2(a / b) for a, b in zip(errors, errors[1:])]
    assert all(3.8 < order < 4.2 for order in orders)


@given(seed=seeds, name=st.text(max_size=5))
def test_that_streams_repeat_themselves_and_not_each_other(seed, name):
    assert torch.equal(standard_normal((5,), stream(seed, name)), standard_normal((5,), stream(seed, name)))
    assert not torch.equal(standard_normal((5,), stream(seed, name)), standard_normal((5,), stream(seed, name, 1)))


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: Lorenz63(dt=0), "dt"),
        (lambda: AdditiveModelError(-1), "variance"),
        (lambda: AdditiveModelError(math.nan), "variance"),
        (lambda: FunctionModel(lambda x: x, dim=0), "dim"),
        (lambda: FunctionModel(lambda x: x, dim=2, names=("a",)), "names"),
        (lambda: FunctionModel(lambda x: x[..., :1], dim=2).step(torch.zeros(2)), "function"),
        (lambda: trajectory(Lorenz63(), torch.zeros(4), 1), "initial"),
        (lambda: trajectory(Lorenz63(), torch.zeros(3), -1), "steps"),
        (lambda: trajectory(Lorenz63(), torch.zeros(3), 2, torch.zeros(1, 3)), "error"),
        (lambda: Select((0, 3), dim=3), "indices"),
        (lambda: Select((0, 0), dim=3), "indices"),
        (lambda: Select((0,), dim=3)(torch.zeros(4)), "state"),
        (lambda: Covariance([[1.0, 2.0], [2.0, 1.0]], "P"), "P"),
        (lambda: Covariance([[1.0, 0.5], [0.2, 1.0]], "P"), "P"),
        (lambda: Covariance([[math.nan]], "P"), "P"),
        (lambda: Covariance([1.0, 2.0], "P"), "P"),
        (lambda: ObservingNetwork(Select((0,), 3), Covariance(np.eye(2))), "covariance"),
        (lambda: ObservingNetwork(Select((0,), 3), Covariance([[1.0]])).report(torch.tensor([math.inf])), "values"),
        (lambda: gaspari_cohn(1.0, half_width=0), "half_width"),
    ],
)
def test_that_bad_input_is_refused_by_the_name_of_the_argument(make, name):
    with pytest.raises(ValueError, match=f"^{name}"):
        make()


def test_that_the_models_of_the_book_keep_the_protocol():
    assert isinstance(Lorenz63(), Model) and isinstance(FunctionModel(lambda x: x, 1), Model)


@given(seed=seeds, kind=st.sampled_from(["select", "linear", "nonlinear"]))
def test_that_the_adjoint_passes_the_dot_product_test(seed, kind):
    matrix = standard_normal((2, 4), stream(seed, "matrix"))
    operator = {
        "select": Select((3, 1), 4),
        "linear": Linear(matrix),
        "nonlinear": Nonlinear(lambda x: torch.tanh(x @ matrix.T), 2),
    }[kind]
    x, u = standard_normal((3, 4), stream(seed, "x")), standard_normal((3, 4), stream(seed, "u"))
    v = standard_normal((3, 2), stream(seed, "v"))
    pushed = (operator.jacobian(x) @ u[..., None])[..., 0]
    assert torch.allclose((pushed * v).sum(-1), (u * operator.adjoint(x, v)).sum(-1), rtol=1e-11, atol=1e-12)


@given(dim=st.integers(2, 30), half_width=st.floats(0.3, 8))
def test_that_gaspari_cohn_matrices_are_correlations(dim, half_width):
    matrix = gaspari_cohn_matrix(dim, half_width)
    assert torch.linalg.eigvalsh(matrix)[0] > -1e-10
    assert (matrix.diagonal() == 1).all() and (matrix <= 1).all() and (matrix >= 0).all()


def test_that_gaspari_cohn_has_its_published_value():
    assert abs(gaspari_cohn(1.5, 1.0).item() - 19 / 1152) < 1e-15


@given(seed=seeds)
def test_that_observation_errors_have_their_covariance_and_misfits_their_norm(seed):
    root = standard_normal((3, 3), stream(seed, "root"))
    covariance = Covariance(root @ root.T + 0.1 * torch.eye(3))
    v = standard_normal((4, 3), stream(seed, "v"))
    assert torch.allclose(covariance.squared_norm(v), (v * torch.linalg.solve(covariance.matrix, v.T).T).sum(-1), rtol=1e-8)
    assert np.isclose(covariance.largest_precision, torch.linalg.eigvalsh(covariance.inverse)[-1].item(), rtol=1e-6)
    draws = covariance.draw((40_000,), stream(seed, "draws"))
    scale = covariance.matrix.diagonal().outer(covariance.matrix.diagonal()).sqrt()
    assert ((torch.cov(draws.T) - covariance.matrix).abs() / scale).max() < 0.05
