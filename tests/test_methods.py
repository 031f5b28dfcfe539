"""Every method goes through the same cycle, and keeps the same promises there."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from pnpda_nb.classical import EnKF, EnRDA, ThreeDVar, climatological_background, gaspari_cohn_background
from pnpda_nb.core import standard_normal, stream, unchecked
from pnpda_nb.dynamics import FunctionModel, Lorenz63
from pnpda_nb.flow_matching import GaussianPrior
from pnpda_nb.learned import AnalysisPrior
from pnpda_nb.methods import build_method
from pnpda_nb.observing import Covariance, ObservingNetwork, Select, kalman_gain
from pnpda_nb.pnp import PnPDA
from pnpda_nb.twin import FreeRun, Method, TwinExperiment, cycle, lorenz63, nature_run, score_table, scores, tune

SHORT = lorenz63(observed=(0, 1, 2), cycles=3)
B = gaspari_cohn_background(3, 20.0, 2.0)


@pytest.fixture(params=["free_run", "var3d", "enkf", "enrda", "pnpda"])
def method(request, untrained_prior) -> Method:
    return {
        "free_run": FreeRun(),
        "var3d": ThreeDVar(B),
        "enkf": EnKF(1.2),
        "enrda": EnRDA(),
        "pnpda": PnPDA(untrained_prior, iterations=5),
    }[request.param]


def analyse(method, background, observations, seed=1):
    return method.analyse(background, observations, forecast=None, generator=stream(seed, "method"))


def background_and_observations(runs=4, members=6):
    background = 5 * standard_normal((runs, members, 3), stream(1, "background"))
    return background, SHORT.network.observe(background[:, 0], stream(1, "observations"))


def test_that_a_method_keeps_the_protocol_and_the_shape(method):
    background, seen = background_and_observations()
    analysis = analyse(method, background, seen)
    assert isinstance(method, Method) and analysis.shape == background.shape and analysis.dtype == torch.float64


def test_that_a_method_is_built_around_a_prior_that_sees_as_around_one_that_does_not(untrained_prior):
    zero = torch.zeros((), dtype=torch.float64)
    seeing = AnalysisPrior.make(zero, zero + 8, zero + 2, dim=3, width=4)
    assert build_method(SHORT, {"name": "amortised"}, prior=seeing).prior is seeing
    assert build_method(SHORT, {"name": "pnpda"}, prior=untrained_prior).prior is untrained_prior
    with pytest.raises(ValueError, match="prior"):
        build_method(SHORT, {"name": "pnpda"}, prior="prior.safetensors")


def test_that_a_method_leaves_its_input_alone_and_repeats_itself(method):
    background, seen = background_and_observations()
    copies = background.clone(), seen.values.clone()
    first = analyse(method, background, seen)
    assert torch.equal(background, copies[0]) and torch.equal(seen.values, copies[1])
    assert torch.equal(first, analyse(method, background, seen))


def test_that_runs_do_not_influence_each_other(method):
    background, seen = background_and_observations()
    other = background.clone()
    other[1] *= 3
    changed = analyse(method, other, seen)
    untouched = [0, 2, 3]
    assert torch.allclose(changed[untouched], analyse(method, background, seen)[untouched], rtol=1e-10, atol=1e-10)


def test_that_a_cycle_with_one_seed_gives_one_result(method):
    a, b = (cycle(SHORT, method, members=4, runs=3, seed=5) for _ in range(2))
    assert a.identical(b)
    assert not a.rmse.identical(cycle(SHORT, method, members=4, runs=3, seed=6).rmse)


def test_that_methods_see_the_same_truth_observations_and_noise():
    free, filtered = cycle(SHORT, FreeRun(), runs=5, seed=2), cycle(SHORT, EnKF(), members=10, runs=5, seed=2)
    assert free.truth.identical(filtered.truth) and free.observations.identical(filtered.observations)
    # before the first analysis the ensemble's first member is the single forecast
    alone = cycle(SHORT, FreeRun(), runs=5, seed=2, keep_members=True)
    ensemble = cycle(SHORT, FreeRun(), members=10, runs=5, seed=2, keep_members=True)
    assert np.array_equal(alone.background_members[:, :, 0], ensemble.background_members[:, :, 0])


def test_that_a_run_does_not_depend_on_how_many_others_there_are():
    few, many = cycle(SHORT, ThreeDVar(B), runs=2, seed=3), cycle(SHORT, ThreeDVar(B), runs=7, seed=3)
    assert np.allclose(few.rmse, many.rmse[:2], rtol=1e-10)


def test_that_truths_for_tuning_are_not_those_for_testing():
    truths = [nature_run(SHORT, 2, 1, split) for split in ("test", "training", "archive")]
    assert not any(torch.equal(a, b) for a, b in zip(truths, truths[1:] + truths[:1]))


@pytest.mark.parametrize("shape", [(6, 3), (4, 6, 3), (2, 4, 6, 3)])
def test_that_any_leading_dimensions_are_a_batch(method, shape):
    background = 5 * standard_normal(shape, stream(1, "background"))
    seen = SHORT.network.observe(background[..., 0, :], stream(1, "observations"))
    analysis = analyse(method, background, seen)
    assert analysis.shape == shape and torch.isfinite(analysis).all()


def test_that_members_that_agree_are_no_error(method):
    background = torch.ones(2, 6, 3, dtype=torch.float64)
    seen = SHORT.network.report(torch.zeros(2, 3, dtype=torch.float64))
    assert torch.isfinite(analyse(method, background, seen)).all()


def test_that_a_run_of_absurd_size_does_not_spoil_the_others(method):
    background, seen = background_and_observations()
    absurd = background.clone()
    absurd[1] *= 1e200
    others = [0, 2, 3]
    with unchecked():
        assert torch.isfinite(analyse(method, absurd, seen)[others]).all()


def test_that_every_method_survives_a_forecast_model_that_explodes(method):
    explodes = FunctionModel(lambda x: torch.where(x.abs() > 6, 1e308 * 10 * x, 1.02 * x), dim=3)
    experiment = replace(
        SHORT, forecast_model=explodes, nature=FunctionModel(lambda x: x, 3), start=(1.0, 1.0, 1.0), spin_up=0, interval=5
    )
    with pytest.warns(UserWarning, match="runs became non-finite"):
        result = cycle(experiment, method, members=6, runs=30, seed=1)
    failed = int((result.failed >= 0).sum())
    table = score_table({"m": result})
    assert 0 < failed and (table["runs"] == 30 - failed).all()
    assert failed == 30 or np.isfinite(table["mean"]).all()


@dataclass(frozen=True)
class Breaks:
    """Turns chosen runs into nan at a chosen cycle (it counts cycles by the observations it is given)."""

    runs: tuple[int, ...]
    window: int = 1

    def analyse(self, background, observations, *, forecast, generator):
        analysis = background.clone()
        analysis[list(self.runs)] = torch.nan
        return analysis


def test_that_a_run_that_breaks_is_reported_counted_and_left_out():
    with pytest.warns(UserWarning, match=r"Breaks: 2 of 5 runs became non-finite \(run 1 at cycle 0, run 3 at cycle 0\)"):
        broken = cycle(SHORT, Breaks((1, 3)), runs=5, seed=1)
    whole = cycle(SHORT, FreeRun(), runs=5, seed=1)
    kept = [0, 2, 4]
    assert list(broken.failed.values) == [-1, 0, -1, 0, -1]
    table = score_table({"broken": broken}).set_index(["metric", "variable"])
    assert table.loc[("step_rmse", "all"), "runs"] == 3
    assert np.isclose(table.loc[("step_rmse", "all"), "mean"], whole.rmse[kept].mean())
    assert np.isfinite(table["mean"]).all()


def test_that_a_run_of_absurd_but_finite_size_is_set_aside_too():
    @dataclass(frozen=True)
    class Absurd:
        window: int = 1

        def analyse(self, background, observations, *, forecast, generator):
            return background * torch.tensor([1.0, 1e200, 1.0], dtype=torch.float64)[:, None, None]

    with pytest.warns(UserWarning, match="run 1 at cycle 0"):
        table = score_table({"a": cycle(lorenz63(cycles=1), Absurd(), runs=3)})
    assert (table["runs"] == 2).all() and (table["mean"] < 100).all()


def test_that_background_covariances_work_in_one_dimension():
    errors = standard_normal((500, 1), stream(1))
    assert climatological_background(errors).matrix.shape == (1, 1)


def test_that_scores_of_no_surviving_run_are_nan_with_no_runs():
    with pytest.warns(UserWarning):
        broken = cycle(SHORT, Breaks((0, 1)), runs=2)
    table = score_table({"broken": broken})
    assert table["mean"].isna().all() and (table["runs"] == 0).all()


def test_that_tuning_prefers_settings_that_do_not_break():
    tuned = tune(lambda broken: Breaks((0,)) if broken else FreeRun(), {"broken": [True, False]}, SHORT, runs=2)
    assert tuned.setting == {"broken": False} and list(tuned.table["failed"]) == [1, 0]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: cycle(SHORT, FreeRun(), runs=0), "runs: expected a whole number of at least 1, got 0"),
        (lambda: cycle(SHORT, FreeRun(), members=0), "members: expected a whole number of at least 1, got 0"),
        (lambda: cycle(SHORT, EnKF(), members=1), "members: EnKF needs"),
        (lambda: cycle(lorenz63(), EnRDA(), members=5), "EnRDA needs every component"),
        (lambda: EnKF(0), "inflation: expected a positive"),
        (lambda: EnRDA(weight=2), "weight: expected a share from 0 to 1"),
        (lambda: ThreeDVar(B, scale=-1), "scale: expected a positive"),
        (lambda: cycle(SHORT, ThreeDVar(Covariance(np.eye(2)))), "covariance: expected size 3"),
        (lambda: replace(SHORT, interval=0), "interval: expected a whole number of at least 1, got 0"),
        (lambda: replace(SHORT, start=(1.0,)), "start: expected 3 numbers"),
        (lambda: replace(SHORT, background_variance=-1.0), "background_variance: expected zero or a positive number, got -1.0"),
        (lambda: lorenz63(correlation=1.0), "observation error covariance: expected a positive definite"),
        (lambda: cycle(SHORT, Breaks((0,), window=0)), "window=0"),
    ],
)
def test_that_bad_settings_are_one_clear_error(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def linear_experiment(cycles=40):
    angle = torch.tensor(0.4, dtype=torch.float64)
    M = 1.03 * torch.tensor(
        [[angle.cos(), -angle.sin(), 0.1], [angle.sin(), angle.cos(), 0.0], [0.0, 0.05, 1.02]], dtype=torch.float64
    )
    model = FunctionModel(lambda x: x @ M.T, dim=3)
    network = ObservingNetwork(Select((0, 2), 3), Covariance([[0.5, 0.1], [0.1, 0.8]]))
    return M, TwinExperiment("linear", model, model, network, 1, cycles, (1.0, 0.0, 0.5), spin_up=0)


def test_that_3dvar_with_the_exact_background_covariance_is_the_kalman_filter():
    M, experiment = linear_experiment()
    H = experiment.network.operator.jacobian(torch.zeros(3, dtype=torch.float64))
    R = experiment.network.covariance.matrix
    P = torch.eye(3, dtype=torch.float64)
    for _ in range(5000):
        K = kalman_gain(P, H, R)
        P = M @ (P - K @ H @ P) @ M.T
        P = (P + P.T) / 2
    result = cycle(experiment, ThreeDVar(Covariance(P)), runs=6, seed=1)
    mean = torch.tensor(result.background[:, 0].values)
    for k in range(experiment.cycles):
        S = H @ P @ H.T + R
        mean = mean + (torch.tensor(result.observations[:, k].values) - mean @ H.T) @ torch.linalg.solve(S, H @ P)
        assert np.abs(mean.numpy() - result.analysis[:, k].values).max() < 1e-10
        mean = mean @ M.T


def test_that_a_large_enkf_approaches_the_kalman_filter():
    prior = Covariance([[4.0, 1.0, 0.5], [1.0, 2.0, -0.3], [0.5, -0.3, 1.0]])
    _, experiment = linear_experiment()
    network = experiment.network
    background = prior.draw((100_000,), stream(1, "large"))[None]
    seen = network.report(torch.tensor([[1.0, -1.0]], dtype=torch.float64))
    analysis = analyse(EnKF(), background, seen)[0]
    H = network.operator.jacobian(torch.zeros(3, dtype=torch.float64))
    K = kalman_gain(prior.matrix, H, network.covariance.matrix)
    assert torch.allclose(analysis.mean(0), K @ seen.values[0], atol=0.03)
    assert torch.allclose(torch.cov(analysis.T), prior.matrix - K @ H @ prior.matrix, atol=0.05)


@pytest.mark.slow  # on other truths than chapter 05, which asserts the same
@pytest.mark.parametrize(("weight", "reported"), [(None, 4.6), (0.05, 3.7), (0.5, 8.1)])
def test_that_enrda_falls_in_the_band_of_its_reference_code(weight, reported):
    result = cycle(lorenz63(observed=(0, 1, 2), cycles=50), EnRDA(weight), members=10, runs=40, seed=3)
    assert abs(float(np.sqrt((result.rmse**2).mean())) / reported - 1) < 0.15


def exact_posterior(prior, background, seen):
    m = prior.mean(background)
    H = seen.operator.jacobian(torch.zeros(prior.dim, dtype=torch.float64))
    return m + seen.innovation(m) @ kalman_gain(prior.covariance.matrix, H, seen.covariance.matrix).T


class NoNoise(GaussianPrior):
    def source(self, shape, generator):
        return torch.zeros(shape, dtype=torch.float64)


def test_that_pnpda_with_alpha_two_converges_to_the_posterior_mean_and_with_less_does_not():
    prior = NoNoise(torch.eye(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64), Covariance([[1.0, 0.6], [0.6, 1.0]]))
    network = ObservingNetwork(Select((0,), 2), Covariance([[1.0]]))
    background = standard_normal((50, 1, 2), stream(1, "b"))
    seen = network.report(2 * standard_normal((50, 1), stream(1, "y")))
    posterior = exact_posterior(prior, background, seen)

    def distance(alpha, iterations):
        return float((analyse(PnPDA(prior, iterations, alpha, "paper"), background, seen) - posterior).norm())

    by_count = [distance(2.0, n) for n in (30, 300, 3000)]
    assert by_count[0] > 2 * by_count[1] > 4 * by_count[2]
    assert distance(0.5, 3000) > 5 * by_count[2]


@pytest.mark.parametrize("rule", ["scaled", "lipschitz"])
def test_that_safe_step_rules_do_not_explode_with_accurate_observations(rule):
    prior = GaussianPrior(torch.eye(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64), Covariance(np.eye(2)))
    network = ObservingNetwork(Select((0,), 2), Covariance([[1e-6]]))
    seen = network.report(torch.ones(3, 1, dtype=torch.float64))
    background = torch.zeros(3, 1, 2, dtype=torch.float64)
    assert (analyse(PnPDA(prior, 100, 0.5, rule), background, seen)[..., 0] - 1).abs().max() < 0.1
    with pytest.raises(ValueError, match="^PnPDA: expected a finite analysis, got one that is not in runs 0, 1, 2 of 3"):
        analyse(PnPDA(prior, 100, 0.5, "paper"), background, seen)


@pytest.mark.parametrize("change", [{"iterations": 0}, {"alpha": -1.0}, {"step_rule": "fast"}, {"draws": 0}])
def test_that_pnpda_refuses_settings_out_of_range(change, untrained_prior):
    with pytest.raises(ValueError, match=next(iter(change))):
        PnPDA(untrained_prior, **change)


def test_that_pnpda_refuses_a_prior_of_another_size(untrained_prior):
    network = ObservingNetwork(Select((0,), 4), Covariance([[1.0]]))
    with pytest.raises(ValueError, match="background: expected states of size 3"):
        analyse(
            PnPDA(untrained_prior),
            torch.zeros(1, 1, 4, dtype=torch.float64),
            network.report(torch.zeros(1, 1, dtype=torch.float64)),
        )


def test_that_a_perfect_forecast_has_no_error_in_any_score():
    perfect = replace(SHORT, forecast_model=Lorenz63(), background_variance=0.0, model_error=type(SHORT.model_error)(0.0))
    table = scores(cycle(perfect, FreeRun(), runs=2))
    assert all(float(abs(values).max()) == 0 for values in table.data_vars.values())
