"""Every method on every testbed, by name; and what must not happen when something is wrong with what it is given."""

import warnings
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pnpda_nb.classical import FourDVar, ThreeDVar, WeakFourDVar
from pnpda_nb.core import RunStreams, standard_normal, stream
from pnpda_nb.dynamics import Forecast, FunctionModel, KuramotoSivashinsky, Lorenz63
from pnpda_nb.methods import LEARNED, climate_of, method_by_name
from pnpda_nb.methods import METHODS as ALL_METHODS
from pnpda_nb.observing import Covariance, DiagonalCovariance, Linear, Nonlinear, ObservingNetwork, Select
from pnpda_nb.twin import TESTBEDS, cycle, mean_and_error, rank_histogram, scores, spread_skill
from pnpda_nb.twin.scores import time_mean

METHODS = {name: make for name, make in ALL_METHODS.items() if name not in LEARNED}
NEEDS_ENSEMBLE = ("enkf", "etkf", "letkf", "local_enkf", "enks", "enrda", "ensf", "enff")
ENSEMBLE = (*NEEDS_ENSEMBLE, "particle_filter")
REDRAWN = ("particle_filter", "ensf", "enff")  # their analysis is another sample, also of what was not observed
FOUR_D = ("var4d", "weak_var4d", "pnpda4d")
WITHOUT_OBSERVATIONS = ("free_run", "climatology")
CONSTANT = ("climatology", "optimal_interpolation")  # their analysis does not start from the background


@lru_cache
def small(name: str):
    experiment = TESTBEDS[name]()
    if name == "kuramoto_sivashinsky":
        model = KuramotoSivashinsky(dim=31, length=15.0)
        network = ObservingNetwork(Select(range(1, 31, 4), 31), DiagonalCovariance(torch.full((8,), 0.1)))
        experiment = replace(experiment, nature=model, forecast_model=model, network=network, start=31 * (0.1,), spin_up=50)
    spin_up = min(experiment.spin_up, 300)
    return replace(experiment, cycles=3, burn_in=0, spin_up=spin_up)


@lru_cache
def pair(method: str, where: str):
    experiment = small(where)
    if method == "enrda":  # it needs everything observed
        dim = experiment.dim
        experiment = experiment.with_network(ObservingNetwork(Select(range(dim), dim), DiagonalCovariance(torch.ones(dim))))
    settings = {"iterations": 2} if method in FOUR_D else {"iterations": 4} if method == "pnpda" else {}
    return experiment, method_by_name(method, experiment, **settings)


class Watched:
    """A method whose input must be what it was when it returns."""

    def __init__(self, method):
        self.method = method

    def __getattr__(self, name):
        return getattr(self.method, name)

    def analyse(self, background, observations, **rest):
        listed = observations if isinstance(observations, list) else [observations]
        tensors = [background, *(o.values for o in listed), *(t for t in rest.values() if isinstance(t, torch.Tensor))]
        before = [t.clone() for t in tensors]
        answer = self.method.analyse(background, observations, **rest)
        analysis = answer
        if "weights" in rest:
            analysis, weights = answer
            assert weights.shape == background.shape[:-1] and torch.allclose(weights.sum(-1), torch.ones_like(weights[..., 0]))
        assert all(torch.equal(t, b) for t, b in zip(tensors, before))
        assert analysis.dtype == torch.float64 and analysis.shape[-2:] == background.shape[-2:]
        return answer


OTHERS = [
    pytest.param(name, marks=pytest.mark.slow)
    for name in ("kuramoto_sivashinsky", "double_well", "pendulum", "sakov2012", "sakov2008")
]


@pytest.mark.parametrize("where", ["lorenz63", "lorenz96", *OTHERS])
@pytest.mark.parametrize("method", METHODS)
def test_that_every_method_runs_on_every_testbed_and_keeps_its_promises(method, where):
    experiment, made = pair(method, where)
    settings = dict(members=5 if method in ENSEMBLE else 1, seed=4)
    a, b = (cycle(experiment, Watched(made), runs=3, **settings) for _ in range(2))
    assert a.equals(b) and np.isfinite(a.rmse).all()
    assert a.analysis.shape == (3, 3, experiment.dim) and a.analysis.dtype == np.float64
    fewer = cycle(experiment, made, runs=2, **settings)
    for name in ("truth", "observations", "background", "analysis", "estimate"):
        assert np.allclose(a[name][:2], fewer[name], rtol=1e-6, atol=1e-6), name


@pytest.mark.parametrize("method", ["etkf", "letkf", "var3d", "optimal_interpolation"])
@given(seed=st.integers(0, 10_000), members=st.integers(2, 9))
def test_that_the_order_of_members_does_not_matter_to_a_deterministic_method(method, seed, members):
    experiment, made = pair(method, "sakov2012")
    cloud = 3 * standard_normal((2, members, 3), stream(seed, "cloud"))
    seen = experiment.network.observe(cloud[:, 0], stream(seed, "noise"))
    order = torch.randperm(members, generator=stream(seed, "order"))
    a, b = (made.analyse(x, seen, forecast=None, generator=None) for x in (cloud, cloud[:, order]))
    assert torch.allclose(a.mean(1), b.mean(1), atol=1e-9)
    for x, y in zip(a, b):
        assert torch.allclose(torch.cov(x.T), torch.cov(y.T), atol=1e-9)


def streams_of(*runs):
    """What `cycle` gives a method, for these runs of an experiment."""
    streams = RunStreams(1, "method", runs=len(runs))
    streams.runs = [stream(1, "method", run) for run in runs]
    return streams


def analyse(name, cloud, network, values, runs=None):
    generator = streams_of(*(range(len(cloud)) if runs is None else runs))
    _, made = pair(name, "sakov2012")
    seen = network.report(values)
    if name in FOUR_D:
        still = Forecast(FunctionModel(lambda x: 0.9 * x, cloud.shape[-1]), 1)
        out = made.analyse(cloud, [seen], forecast=still, generator=generator)
        return out[int(name == "pnpda4d")] if out.ndim > cloud.ndim else out  # it leaves the start alone
    return made.analyse(cloud, seen, forecast=None, generator=generator)


FULL = ObservingNetwork(Select((0, 1, 2), 3), Covariance([[2.0, 0.5, 0.1], [0.5, 1.0, 0.2], [0.1, 0.2, 1.0]]))
CLOUD = 2 * standard_normal((4, 6, 3), stream(9, "cloud"))
VALUES = standard_normal((4, 3), stream(9, "values"))
PARTIAL = [m for m in METHODS if m != "enrda"]


@pytest.mark.parametrize("name", PARTIAL)
def test_that_a_missing_observation_is_as_good_as_one_that_was_never_made(name):
    values = VALUES.clone()
    values[0, 1] = values[1, 2] = values[2] = torch.nan
    holes = analyse(name, CLOUD, FULL, values)
    assert torch.isfinite(holes).all()
    for run, there in ((0, [0, 2]), (1, [0, 1]), (3, [0, 1, 2])):
        part = ObservingNetwork(Select(there, 3), Covariance(FULL.covariance.matrix[there][:, there]))
        alone = analyse(name, CLOUD[[run]], part, VALUES[[run]][:, there], runs=[run])
        # perturbed observations are others when there are fewer, but centred ones: the mean is the same
        assert (holes[run].mean(0) - alone[0].mean(0)).abs().max() < 1e-8
        if name not in ("enkf", "enks", "local_enkf"):
            assert (holes[run] - alone[0]).abs().max() < 1e-8
    if name not in (*CONSTANT, *REDRAWN, "pnpda", "pnpda4d"):
        assert torch.allclose(holes[2], CLOUD[2], atol=1e-8)  # nothing was seen: nothing is changed


@pytest.mark.parametrize("name", PARTIAL)
def test_that_an_empty_observation_vector_leaves_the_background_alone(name):
    network = ObservingNetwork(Select((), 3), Covariance(torch.zeros(0, 0)))
    analysis = analyse(name, CLOUD, network, torch.zeros(4, 0, dtype=torch.float64))
    assert analysis.shape == CLOUD.shape and torch.isfinite(analysis).all()
    if name not in (*CONSTANT, *REDRAWN, "pnpda", "pnpda4d"):
        assert torch.allclose(analysis, CLOUD, atol=1e-10)


def test_that_missing_observations_are_counted():
    experiment = small("sakov2012")
    experiment = replace(experiment.with_network(replace(experiment.network, missing=0.3)), cycles=20)
    for name in ("etkf", "enkf", "letkf", "particle_filter", "var3d"):
        result = cycle(experiment, method_by_name(name, experiment), members=6, runs=5, seed=1)
        assert int(result.missing.sum()) == int(np.isnan(result.observations).sum()) > 50
        assert np.isfinite(result.rmse).all()
        lean = cycle(experiment, method_by_name(name, experiment), members=6, runs=5, seed=1, keep="scores")
        assert int(lean.missing.sum()) == int(result.missing.sum())


@pytest.mark.parametrize("name", ENSEMBLE)
def test_that_an_ensemble_of_equal_members_gives_a_finite_analysis(name):
    analysis = analyse(name, CLOUD[:, :1].expand(4, 6, 3).clone(), FULL, VALUES)
    assert torch.isfinite(analysis).all()
    if name != "enrda":
        assert torch.allclose(analysis, CLOUD[:, :1].expand(4, 6, 3))


@pytest.mark.parametrize("name", METHODS)
def test_that_an_ensemble_of_one_is_right_or_one_clear_error(name):
    if name in NEEDS_ENSEMBLE:
        with pytest.raises(ValueError, match="members: .* needs an ensemble of at least 2, got 1"):
            analyse(name, CLOUD[:, :1], FULL, VALUES)
    else:
        assert torch.isfinite(analyse(name, CLOUD[:, :1], FULL, VALUES)).all()


FINE = Lorenz63()


@dataclass(frozen=True)
class Fragile:
    """Lorenz-63 that breaks where x is large: one member of some runs becomes nan."""

    breaking: float
    dim: int = 3
    dt: float = 0.01
    names: tuple = ()

    def step(self, state):
        return torch.where(state[..., :1] > 17.5, self.breaking, FINE.step(state))


@pytest.mark.parametrize("breaking", [torch.nan, torch.inf, pytest.param(1e300, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", METHODS)
def test_that_a_member_that_breaks_takes_its_own_run_with_it_and_no_other(name, breaking):
    experiment = replace(small("sakov2012"), cycles=6, spin_up=300, first_ensemble="around_truth", background_variance=2.0)
    _, made = pair(name, "sakov2012")
    fragile = replace(experiment, forecast_model=Fragile(breaking))
    settings = dict(members=6 if name in ENSEMBLE else 1, runs=12, seed=3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        broken = cycle(fragile, made, **settings)
    whole = cycle(experiment, made, **settings)
    fine = (broken.failed == -1).values
    assert 0 < fine.sum() < 12 or name in FOUR_D
    assert np.allclose(broken.rmse[fine], whole.rmse[fine], rtol=1e-6, atol=1e-6)
    assert np.isnan(scores(broken).step_rmse[~fine]).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Covariance([[1.0, 2.0], [2.0, 1.0]], "R"), "R: expected a positive definite matrix"),
        (lambda: DiagonalCovariance([1.0, 0.0], "R"), "R: expected finite positive variances"),
        (lambda: DiagonalCovariance([[1.0]], "R"), "R: expected a vector"),
        (lambda: method_by_name("enkf", None, inflation=float("inf")), "inflation"),
        (lambda: method_by_name("etkf", None, relaxation=1.5), "relaxation"),
        (lambda: method_by_name("enks", None, lag=0), "lag"),
        (lambda: method_by_name("letkf", small("sakov2008"), half_width=0.0), "half_width"),
        (lambda: method_by_name("letkf", small("sakov2008"), width=1.0), "letkf: .*width"),
        (lambda: method_by_name("nonsense", None), "unknown method 'nonsense'; known: free_run"),
        (lambda: FourDVar(Covariance([[1.0]]), window=2, shift=3), "shift"),
        (lambda: ObservingNetwork(Select((0,), 2), Covariance([[1.0]]), missing=2.0), "missing"),
        (lambda: FULL.report(torch.full((1, 3), torch.inf, dtype=torch.float64)), "values: expected finite"),
        (lambda: cycle(small("sakov2012"), pair("var3d", "sakov2012")[1], keep="none"), "keep"),
        (lambda: replace(small("sakov2012"), burn_in=3), "burn_in"),
    ],
)  # fmt: skip
def test_that_what_makes_no_sense_is_one_clear_error(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_that_letkf_wants_to_know_where_observations_are():
    network = ObservingNetwork(Nonlinear(lambda x: x.square().sum(-1, keepdim=True), 1), Covariance([[1.0]]))
    with pytest.raises(ValueError, match="sites"):
        analyse("letkf", CLOUD, network, VALUES[:, :1])
    sited = ObservingNetwork(Linear(torch.tensor([[0.0, 1.0, 0.0]], dtype=torch.float64), sites=(1,)), Covariance([[1.0]]))
    where = ObservingNetwork(Select((1,), 3), Covariance([[1.0]]))
    assert torch.allclose(analyse("letkf", CLOUD, sited, VALUES[:, :1]), analyse("letkf", CLOUD, where, VALUES[:, :1]))


@pytest.mark.parametrize("name", [m for m in METHODS if m not in ("enrda", "letkf", "local_enkf")])
def test_that_nonlinear_observations_are_assimilated(name):
    network = ObservingNetwork(Nonlinear(lambda x: x[..., :2].square(), 2), Covariance([[0.5, 0.1], [0.1, 0.5]]))
    truth = 2 + standard_normal((40, 3), stream(3, "truth"))
    cloud = truth.unsqueeze(1) + 0.7 * standard_normal((40, 30, 3), stream(3, "cloud"))
    seen = network.observe(truth, stream(3, "noise"))
    if name in FOUR_D:
        made = {
            "var4d": FourDVar,
            "weak_var4d": lambda B: WeakFourDVar(B, Covariance(1e-6 * np.eye(3))),
            "pnpda4d": lambda B: pair(name, "sakov2012")[1],
        }[name](Covariance(0.5 * np.eye(3)))
        out = made.analyse(cloud, [seen], forecast=Forecast(FunctionModel(lambda x: x, 3), 1), generator=stream(3, "method"))
        out = out[-1] if out.ndim > cloud.ndim else out
    elif name == "var3d":
        out = ThreeDVar(Covariance(0.5 * np.eye(3))).analyse(cloud, seen, forecast=None, generator=None)
    else:
        out = pair(name, "sakov2012")[1].analyse(cloud, seen, forecast=None, generator=stream(3, "method"))
    assert torch.isfinite(out).all()
    if name not in (*WITHOUT_OBSERVATIONS, *CONSTANT, "pnpda", "pnpda4d"):
        before, after = ((x.mean(1) - truth)[:, :2].square().mean() for x in (cloud + 0.5, out + 0.0))
        assert after < before


def test_that_a_numpy_model_can_be_used_by_every_method():
    model = FunctionModel(lambda x: np.roll(x, 1, -1) * 0.95 + 0.1 * np.sin(x), 4, numpy=True)
    experiment = replace(
        small("sakov2012"), nature=model, forecast_model=model, start=4 * (1.0,), interval=2,
        network=ObservingNetwork(Select((0, 2), 4), DiagonalCovariance([0.1, 0.1])),
    )  # fmt: skip
    for name in [m for m in PARTIAL if m != "pnpda4d"]:  # which says that it needs derivatives: see test_pnp_windows
        result = cycle(experiment, method_by_name(name, experiment), members=5 if name in ENSEMBLE else 1, runs=2, seed=1)
        assert np.isfinite(result.rmse).all(), name


def test_that_scores_are_the_same_whether_or_not_everything_is_kept():
    for name in ("etkf", "enks", "var4d"):
        experiment = replace(small("pendulum" if name == "var4d" else "sakov2012"), cycles=35, burn_in=7)
        made = method_by_name(name, experiment, **({"window": 2, "iterations": 1} if name == "var4d" else {}))
        settings = dict(members=4 if name != "var4d" else 1, runs=4, seed=2)
        full, lean = (cycle(experiment, made, keep=keep, **settings) for keep in ("all", "scores"))
        for metric, values in scores(full).data_vars.items():
            assert np.allclose(values, scores(lean)[metric].transpose(*values.dims), rtol=1e-10), metric
        if name != "var4d":
            assert np.allclose(rank_histogram(full), rank_histogram(lean)) and np.allclose(spread_skill(full), spread_skill(lean))
        a, b = (mean_and_error(x) for x in (full, lean))
        assert abs(a[0] - b[0]) < 1e-9 and 0 < b[1] < 5 * a[1]


def test_that_a_smoother_is_better_than_its_filter_and_leaves_it_alone():
    experiment = replace(small("sakov2012"), cycles=80, burn_in=20)
    for kind, name in (("stochastic", "enkf"), ("symmetric", "etkf")):
        settings = dict(members=10, runs=10, seed=2)
        smoother = cycle(experiment, method_by_name("enks", experiment, inflation=1.1, lag=2, kind=kind), **settings)
        filtered = cycle(experiment, method_by_name(name, experiment, inflation=1.1), **settings)
        assert np.allclose(smoother.analysis[:, :10], filtered.analysis[:, :10], atol=1e-6)
        table = scores(smoother)
        assert table.smoother_rmse.mean() < 0.9 * table.analysis_rmse.mean()


def test_that_a_climate_is_taken_from_training_truths_only():
    experiment = small("sakov2012")
    climate = climate_of(experiment)
    test = torch.tensor(cycle(experiment, METHODS["free_run"](experiment), runs=5).truth.values)
    assert climate.mean.shape == (3,) and (climate.mean - test.mean((0, 1))).abs().max() < 10
    assert climate_of(experiment) is climate


class Spy:
    """A window method that notes which observations it is shown and leaves the background as it is."""

    def __init__(self, window, shift):
        self.window, self.shift, self.from_start, self.new = window, shift, True, []

    def analyse(self, background, observations, *, forecast, generator):
        self.new.append([float(o.values[0, 0]) for o in observations[max(0, len(observations) - self.shift) :]])
        return background


@pytest.mark.parametrize(("cycles", "window", "shift"), [(5, 4, 2), (7, 4, 3), (6, 3, 3), (5, 1, 1), (2, 4, 3)])
def test_that_every_observation_is_assimilated_once_whatever_the_windows(cycles, window, shift):
    experiment, spy = replace(small("sakov2012"), cycles=cycles), Spy(window, shift)
    result = cycle(experiment, spy, seed=1)
    assert sum(spy.new, []) == result.observations[0, :, 0].values.tolist()
    free = cycle(experiment, METHODS["free_run"](experiment), seed=1)
    assert np.allclose(result.estimate, free.estimate, atol=1e-9)  # windows that change nothing are a free run


@pytest.mark.slow
def test_that_a_longer_weak_window_is_no_worse_and_smooths():
    model = FunctionModel(lambda x: 0.9 * x, 1)
    one = ObservingNetwork(Select((0,), 1), DiagonalCovariance([1.0]))
    experiment = replace(
        small("double_well"), nature=model, forecast_model=model, network=one, interval=1, cycles=300, burn_in=20,
        nature_error=type(small("double_well").model_error)(1.0), model_error=type(small("double_well").model_error)(0.0),
    )  # fmt: skip
    unit, found = Covariance([[1.0]]), {}
    for window in (1, 4):
        result = cycle(experiment, WeakFourDVar(unit, unit, window=window, iterations=2), runs=20, seed=1)
        found[window] = scores(result)
    assert found[4].analysis_rmse.mean() < 1.01 * found[1].analysis_rmse.mean()
    assert found[4].smoother_rmse.mean() < 0.95 * found[4].analysis_rmse.mean()


def test_that_a_run_that_breaks_inside_a_window_shows_nothing_from_there_on():
    experiment = replace(small("sakov2012"), cycles=6, spin_up=300, first_ensemble="around_truth", background_variance=2.0)
    made = FourDVar(Covariance(np.eye(3)), window=3, shift=3, iterations=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        broken = cycle(replace(experiment, forecast_model=Fragile(1e300)), made, runs=12, seed=3)
    whole = cycle(experiment, made, runs=12, seed=3)
    assert (broken.failed >= 0).any()
    shown = np.isfinite(broken.analysis.values)
    assert np.allclose(broken.analysis.values[shown], whole.analysis.values[shown], atol=1e-6)


@pytest.mark.parametrize("phi", [-0.6, 0.0, 0.6, 0.9])
def test_that_the_error_of_a_time_mean_is_the_scatter_of_time_means(phi):
    noise = np.random.default_rng(3).standard_normal((300, 1200))
    series = np.zeros_like(noise)
    for t in range(1, 1200):
        series[:, t] = phi * series[:, t - 1] + noise[:, t]
    mean, error = time_mean(series[:, 200:])
    assert abs(error.mean() / mean.std() - 1) < 0.15
    assert np.isnan(time_mean([3.0])[1])
    with pytest.raises(ValueError, match="series"):
        time_mean([])


def test_that_short_cycles_have_standard_errors_too():
    experiment = replace(small("sakov2012"), cycles=40)
    full, lean = (
        cycle(experiment, method_by_name("etkf", experiment), members=6, runs=3, seed=1, keep=k) for k in ("all", "scores")
    )
    for metric in ("analysis_rmse", "rmse", "crps"):
        a, b = (mean_and_error(x, metric) for x in (full, lean))
        assert abs(a[0] - b[0]) < 1e-9 and 0.2 * a[1] < b[1] < 5 * a[1]


def test_that_enrda_says_that_it_cannot_do_without_a_value():
    values = VALUES.clone()
    values[1, 1] = torch.nan
    with pytest.raises(ValueError, match="missing values"):
        analyse("enrda", CLOUD, FULL, values)


def test_that_models_with_different_time_steps_are_refused():
    with pytest.raises(ValueError, match="forecast_model: expected time steps of 0.01"):
        replace(small("sakov2012"), forecast_model=Lorenz63(dt=0.005))
