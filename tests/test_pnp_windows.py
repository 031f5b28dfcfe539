"""PnP-DA over windows of observations, and several answers to one background."""

import warnings
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from pnpda_nb.core import RunStreams, standard_normal, stream, unchecked
from pnpda_nb.dynamics import Forecast, FunctionModel, Lorenz63
from pnpda_nb.flow_matching import GaussianPrior
from pnpda_nb.observing import Covariance, Nonlinear, ObservingNetwork, Select
from pnpda_nb.pnp import PnPDA, PnPDA4D, analysis_ensemble, convergence
from pnpda_nb.pnp.windows import WindowMisfit
from pnpda_nb.twin import cycle, ensemble_scores, lorenz63, rank_histogram, scores, spread_skill

EYE = torch.eye(3, dtype=torch.float64)
Q = Covariance([[0.3, 0.1, 0.0], [0.1, 0.2, 0.0], [0.0, 0.0, 0.1]])
PRIOR = GaussianPrior(EYE, torch.zeros(3, dtype=torch.float64), Covariance([[1.0, 0.4, 0.1], [0.4, 1.0, 0.2], [0.1, 0.2, 0.8]]))
TURN = 0.95 * torch.linalg.matrix_exp(torch.tensor([[0.0, 0.5, 0.2], [-0.5, 0.0, 0.1], [0.0, 0.3, 0.0]], dtype=torch.float64))
LINEAR = Forecast(FunctionModel(lambda x: x @ TURN.T, 3), 1)
LORENZ = Forecast(Lorenz63(), 10)
NETWORK = ObservingNetwork(Select((0, 2), 3), Covariance([[1.0, 0.3], [0.3, 0.5]]))
START = 3 * standard_normal((4, 2, 3), stream(1, "start"))


def watch(forecast, times, network=NETWORK, runs=4):
    """Observations at `times` times of a truth near the first member's forecast."""
    state, seen = START[:runs, 0] + standard_normal((runs, 3), stream(1, "truth")), []
    for k in range(times):
        state = forecast(state)
        seen.append(network.observe(state, stream(1, "seen", k)))
    return seen


def answer(method, seen, forecast, start=START, seed=2):
    streams = RunStreams(seed, "method", runs=len(start))
    return method.analyse(start, seen, forecast=forecast, generator=streams)


class WithoutNoise(GaussianPrior):
    def source(self, shape, generator):
        return torch.zeros(shape, dtype=torch.float64)


QUIET = WithoutNoise(PRIOR.matrix, PRIOR.offset, PRIOR.covariance)


def smoother_mean(seen, start, model_error):
    """E[x_1, ..., x_K | y_1, ..., y_K] `(K, run, member, dim)` by one big linear solve."""
    times, powers = len(seen), [torch.linalg.matrix_power(TURN, k) for k in range(len(seen))]
    m = PRIOR.mean(LINEAR(start))
    mean = torch.cat([m @ power.T for power in powers], -1)
    carry = torch.cat([torch.cat([powers[i - k] if k <= i else 0 * EYE for k in range(times)], 1) for i in range(times)])
    jump = model_error.matrix if model_error else 0 * EYE
    B = carry @ torch.block_diag(PRIOR.covariance.matrix, *[jump] * (times - 1)) @ carry.T
    H = torch.block_diag(*[o.operator.jacobian(START[0, 0]) for o in seen])
    R = torch.block_diag(*[o.covariance.matrix for o in seen])
    y = torch.cat([o.values for o in seen], -1).unsqueeze(-2)
    mean = mean + (y - mean @ H.T) @ torch.linalg.solve(H @ B @ H.T + R, H @ B)
    return mean.unflatten(-1, (times, 3)).movedim(-2, 0)


@pytest.mark.parametrize("model_error", [None, Q])
def test_that_a_window_tends_to_the_smoother_mean_when_everything_is_linear_and_gaussian(model_error):
    seen, far = watch(LINEAR, 3), []
    exact = smoother_mean(seen, START, model_error)
    for n in (80, 320, 1280):
        method = PnPDA4D(QUIET, n, 2.0, "paper", window=3, model_error=model_error)
        far.append((answer(method, seen, LINEAR)[1:] - exact).square().mean().sqrt())
    assert far[0] > 1.5 * far[1] > 2.2 * far[2] and far[2] < 0.08  # nearly as fast as one over the root of n
    filtered = PnPDA(QUIET, 1280, 2.0, "paper").analyse(LINEAR(START), seen[0], forecast=None, generator=stream(1))
    assert (filtered - exact[0]).square().mean().sqrt() > 3 * far[2]


@pytest.mark.parametrize("settings", [{"join": 0.5}, {"relinearise": True}])
def test_that_the_settings_beyond_the_paper_do_not_change_the_limit_of_linear_problems(settings):
    seen, plain = watch(LINEAR, 2), PnPDA4D(QUIET, 400, 2.0, "paper", window=2, model_error=Q)
    far = answer(plain, seen, LINEAR) - answer(replace(plain, **settings), seen, LINEAR)
    assert far.abs().max() < 1e-3


@pytest.mark.parametrize("rule", ["paper", "scaled", "lipschitz"])
@pytest.mark.parametrize("model_error", [None, Q])
def test_that_a_window_of_one_is_the_3d_method_on_the_same_forecast(rule, model_error):
    seen = watch(LORENZ, 1)
    window = answer(PnPDA4D(PRIOR, 10, step_rule=rule, window=1, model_error=model_error), seen, LORENZ)
    alone = answer(PnPDA(PRIOR, 10, step_rule=rule), seen[0], None, LORENZ(START))
    assert torch.equal(window[0], START) and (window[1] - alone).abs().max() < 1e-12


@pytest.mark.parametrize("rule", ["paper", "scaled", "lipschitz"])
@pytest.mark.parametrize("settings", [{}, {"model_error": Q}, {"model_error": Q, "relinearise": True, "join": 0.3}])
def test_that_a_missing_observation_in_a_window_is_as_good_as_one_that_was_never_made(rule, settings):
    method, seen = PnPDA4D(PRIOR, 10, step_rule=rule, window=2, **settings), watch(LINEAR, 2)
    values = [o.values.clone() for o in seen]
    values[0][:, 1] = values[1][:, 0] = torch.nan
    holes = answer(method, [NETWORK.report(v) for v in values], LINEAR)
    parts = [
        ObservingNetwork(Select((i,), 3), Covariance(NETWORK.covariance.matrix[j : j + 1, j : j + 1])) for i, j in ((0, 0), (2, 1))
    ]
    cut = answer(method, [p.report(o.values[:, j : j + 1]) for p, o, j in zip(parts, seen, (0, 1))], LINEAR)
    assert torch.isfinite(holes).all() and (holes - cut).abs().max() < 1e-10


@pytest.mark.parametrize("model_error", [None, Q])
@pytest.mark.parametrize("missing", [0.0, 0.4])
def test_that_gradients_agree_with_finite_differences(model_error, missing):
    curved = ObservingNetwork(Nonlinear(lambda x: x[..., :2].square() / 5, 2), NETWORK.covariance, missing)
    misfit = WindowMisfit(LORENZ(START), watch(LORENZ, 3, curved), LORENZ, model_error)
    x, h = misfit.background + 0.3, 1e-6
    by_differences = torch.stack([(misfit.value(x + h * v) - misfit.value(x - h * v)) / (2 * h) for v in EYE], -1)
    assert torch.allclose(misfit.gradient(x), by_differences, rtol=1e-5, atol=1e-5 * float(by_differences.abs().max()))


def test_that_the_lipschitz_step_is_one_over_the_largest_curvature_of_the_window():
    for model_error in (None, Q):
        misfit = WindowMisfit(LINEAR(START), watch(LINEAR, 3), LINEAR, model_error)
        hessian = torch.stack([misfit.gradient(misfit.background + v) - misfit.gradient(misfit.background) for v in EYE], -1)
        largest = torch.linalg.eigvalsh((hessian + hessian.mT) / 2)[..., -1:]
        assert torch.allclose(misfit.step_size("lipschitz"), 1 / largest, rtol=1e-8)


def test_that_a_forecast_without_derivatives_is_one_clear_error():
    still = Forecast(FunctionModel(lambda x: np.sin(x), 3, numpy=True), 2)
    for rule in ("paper", "lipschitz"):
        with pytest.raises(ValueError, match="^forecast: expected a model that torch can differentiate[^\n]*$"):
            answer(PnPDA4D(PRIOR, 3, step_rule=rule), watch(LINEAR, 2), still)
    with pytest.raises(ValueError, match="^forecast: expected a forecast model"):
        answer(PnPDA4D(PRIOR, 3), watch(LINEAR, 2), None)


@pytest.mark.parametrize("settings", [{}, {"model_error": Q}, {"model_error": Q, "relinearise": True}])
def test_that_a_run_that_diverges_harms_no_other(settings):
    for rule in ("lipschitz", "paper"):
        method, start = PnPDA4D(PRIOR, 6, step_rule=rule, **settings), START.clone()
        whole = answer(method, watch(LORENZ, 2), LORENZ)
        start[1] = 1e200
        with unchecked():
            broken = answer(method, watch(LORENZ, 2), LORENZ, start)
        assert not torch.isfinite(broken[1, 1]).any() and torch.equal(broken[:, [0, 2, 3]], whole[:, [0, 2, 3]])


@dataclass(frozen=True)
class Fragile:
    dim: int = 3
    dt: float = 0.01
    names: tuple = ()

    def step(self, state):
        return torch.where(state[..., :1] > 17.0, torch.nan, Lorenz63().step(state))


def test_that_a_cycle_sets_diverging_runs_aside():
    experiment = lorenz63(cycles=4)
    method = PnPDA4D(
        GaussianPrior(EYE, torch.zeros(3, dtype=torch.float64), Covariance(4 * EYE)), 5, model_error=Covariance(4 * EYE)
    )
    whole = cycle(experiment, method, runs=8, seed=3)
    experiment = replace(experiment, forecast_model=Fragile())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        broken = cycle(experiment, method, runs=8, seed=3)
    assert (broken.failed >= 0).any() and whole.sizes == broken.sizes


@pytest.mark.parametrize("settings", [{}, {"ensemble": 3}, {"draws": 2}])
def test_that_a_run_does_not_depend_on_how_many_there_are(settings):
    method = PnPDA4D(PRIOR, 6, model_error=Q, **settings)
    four, two = (answer(method, watch(LORENZ, 2, runs=n), LORENZ, START[:n]) for n in (4, 2))
    again = answer(method, watch(LORENZ, 2), LORENZ)
    assert torch.equal(four, again)
    seen = [NETWORK.report(o.values[:2]) for o in watch(LORENZ, 2)]
    assert torch.allclose(four[:, :2], answer(method, seen, LORENZ, START[:2]), atol=1e-10) and two.shape[1] == 2


def test_that_an_ensemble_is_the_mean_of_independent_answers():
    seen = watch(LINEAR, 1)[0]
    start = START[:, :1]
    several = analysis_ensemble(PnPDA(PRIOR, 10), start, seen, size=4, generator=RunStreams(2, "method", runs=4))
    mean = answer(PnPDA(PRIOR, 10, ensemble=4), seen, None, start)
    assert several.shape == (4, 4, 3) and torch.allclose(several.mean(-2, keepdim=True), mean)
    one = analysis_ensemble(PnPDA(PRIOR, 10), start, seen, size=1, generator=RunStreams(2, "method", runs=4))
    assert torch.equal(one, answer(PnPDA(PRIOR, 10), seen, None, start))
    windows = analysis_ensemble(PnPDA4D(PRIOR, 4), start, watch(LINEAR, 2), size=5, generator=stream(1), forecast=LINEAR)
    assert windows.shape == (3, 4, 5, 3)
    for wrong, size, name in ((START, 2, "background"), (start, 0, "size")):
        with pytest.raises(ValueError, match=f"^{name}"):
            analysis_ensemble(PnPDA(PRIOR), wrong, seen, size=size, generator=stream(1))


def test_that_scores_of_an_ensemble_are_those_of_a_cycle():
    result = cycle(lorenz63(cycles=3), PnPDA(PRIOR, 5), members=6, runs=4, seed=1, keep_members=True)
    truth = torch.tensor(result.truth.sel(time=result.cycle_time, method="nearest").values)
    ours, theirs = ensemble_scores(truth, torch.tensor(result.analysis_members.values)), scores(result)
    for name, metric in (("rmse", "analysis_rmse"), ("crps", "crps"), ("spread", "spread")):
        assert np.isclose(ours[name], float(theirs[metric].mean())), name
    assert np.allclose(ours["ranks"], rank_histogram(result))
    one = cycle(lorenz63(cycles=3), PnPDA(PRIOR, 5), members=6, runs=1, seed=1, keep_members=True)
    truth = torch.tensor(one.truth.sel(time=one.cycle_time, method="nearest").values)
    assert np.isclose(
        ensemble_scores(truth, torch.tensor(one.analysis_members.values))["spread_skill"], float(spread_skill(one)[0])
    )


def test_that_convergence_says_what_the_iterations_do():
    seen = watch(LINEAR, 2)
    for method, observed in ((PnPDA(PRIOR, 40), seen[0]), (PnPDA4D(PRIOR, 40), seen)):
        made = convergence(method, START, observed, generator=stream(1), forecast=LINEAR)
        path = list(method.iterates(START, observed, stream(1), LINEAR))
        assert made.misfit.dims == ("iteration", "run", "member") and made.sizes == {"iteration": 40, "run": 4, "member": 2}
        assert np.allclose(made.change[-1], (path[-1] - path[-2]).square().mean(-1).sqrt())
        assert np.allclose(made.misfit[-1], method.misfit(START, observed, LINEAR).value(path[-1]))
        assert made.residual[-5:].mean() < made.residual[5:10].mean() and float(made.tau[1]) == 1 / 40


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"window": 0}, "window"),
        ({"window": 1.5}, "window"),
        ({"shift": 3}, "shift"),
        ({"shift": 0}, "shift"),
        ({"ensemble": 0}, "ensemble"),
        ({"draws": 0}, "draws"),
        ({"iterations": 0}, "iterations"),
        ({"alpha": -1.0}, "alpha"),
        ({"step_rule": "long"}, "step_rule"),
        ({"join": 1.0}, "join"),
    ],
)
def test_that_a_bad_setting_of_a_window_is_named(settings, name):
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        PnPDA4D(PRIOR, **settings)


def test_that_sizes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="^model_error: expected size 3"):
        answer(PnPDA4D(PRIOR, model_error=Covariance([[1.0]])), watch(LINEAR, 2), LINEAR)
    with pytest.raises(ValueError, match="^background: expected states of size 3"):
        PnPDA4D(PRIOR).analyse(torch.zeros(1, 1, 2, dtype=torch.float64), watch(LINEAR, 2), forecast=LINEAR, generator=stream(1))
