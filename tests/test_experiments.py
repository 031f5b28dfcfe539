"""Networks that change with time, starts out of many states or from a function, and first errors that are forecasts' own."""

from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
import xarray as xr
from test_every_method import ENSEMBLE, PARTIAL, pair, small

from pnpda_nb.core import standard_normal, stream
from pnpda_nb.dynamics import FunctionModel
from pnpda_nb.learned import AmortisedAnalysis, AnalysisPrior, ObservedRecord, OnPolicySettings, TruthRecord, train_on_policy
from pnpda_nb.learned.records import observed_record
from pnpda_nb.observing import DiagonalCovariance, GridObservations, Observations, ObservingNetwork, Select
from pnpda_nb.twin import FreeRun, TwinExperiment, cycle, nature_run, nature_start, observe_truth, scores, watch_nature
from pnpda_nb.windows.laws import draw_windows

EXPERIMENT = replace(small("sakov2012"), cycles=6)


def network(*sites: int, variance: float = 2.0, missing: float = 0.0) -> ObservingNetwork:
    return ObservingNetwork(Select(sites, 3), DiagonalCovariance(torch.full((len(sites),), variance)), missing)


ALL, NONE = network(0, 1, 2), network()
CHANGING = (network(0), ALL, network(2, 1))


@pytest.mark.parametrize("missing", [0.0, 0.3])
def test_that_a_network_for_every_cycle_is_that_network_to_the_byte(missing):
    one = network(0, 2, missing=missing)
    constant = replace(EXPERIMENT, cycles=130).with_network(one)
    method = pair("etkf", "sakov2012")[1]
    whole = cycle(constant, method, members=4, runs=2, seed=1)
    for networks in ((one,), [one, one], lambda k: one):
        assert whole.identical(cycle(constant.with_network(networks), method, members=4, runs=2, seed=1))


@pytest.mark.parametrize("name", [name for name in PARTIAL if name not in ("enkf", "enks", "local_enkf")])
def test_that_cycles_without_observations_are_those_in_which_all_are_missing(name):
    method = pair(name, "sakov2012")[1]
    settings = {"members": 5 if name in ENSEMBLE else 1, "runs": 3, "seed": 1}
    changing = EXPERIMENT.with_network((ALL, NONE))
    nature = list(watch_nature(changing, 3, 1, "test"))
    lost = torch.full((3, 3), torch.nan, dtype=torch.float64)
    known = [(truth, seen if seen is None or seen.operator.size else ALL.report(lost)) for truth, seen in nature]
    one, other = cycle(changing, method, **settings), cycle(EXPERIMENT.with_network(ALL), method, nature=known, **settings)
    for field_ in ("background", "analysis", "estimate", "truth", "observations"):
        assert np.allclose(one[field_], other[field_], atol=1e-6, equal_nan=True), field_
    assert other.missing[0].values.tolist() == [0, 3] * 3 and not one.missing.any()
    assert np.isnan(one.observations[:, 1::2]).all() and np.isfinite(one.observations[:, ::2]).all()


@dataclass(frozen=True)
class Looks:
    """Notes what it is shown."""

    shown: list
    window: int = field(default=1, init=False)

    def analyse(self, background, observations, *, forecast, generator):
        self.shown.append((observations.operator.sites, observations.values.clone()))
        return background


@pytest.mark.parametrize("networks", [CHANGING, lambda k: CHANGING[k % 3]])
def test_that_a_method_is_shown_the_network_of_its_cycle(networks):
    changing, method = EXPERIMENT.with_network(networks), Looks([])
    result = cycle(changing, method, runs=2, seed=3)
    assert [sites for sites, _ in method.shown] == [(0,), (0, 1, 2), (2, 1)] * 2
    seen = observe_truth(changing, nature_run(changing, 2, 3), 3)
    for k, (sites, values) in enumerate(method.shown):
        held = result.observations[:, k].values
        assert torch.equal(values, seen[k].values) and np.array_equal(held[:, : len(sites)], values.numpy())
        assert np.isnan(held[:, len(sites) :]).all()
        truth = result.truth.sel(time=result.cycle_time[k], method="nearest").values
        assert np.abs(values.numpy() - truth[:, list(sites)]).max() < 6
    lean = scores(cycle(changing, FreeRun(), runs=2, seed=3, keep="scores"))
    assert np.allclose(lean.step_rmse, scores(cycle(changing, FreeRun(), runs=2, seed=3)).step_rmse)


def test_that_places_may_be_drawn_anew_in_every_cycle():
    def somewhere(k: int) -> ObservingNetwork:
        return network(int(torch.randint(3, (1,), generator=stream(1, "place", k))))

    method, experiment = pair("etkf", "sakov2012")[1], EXPERIMENT.with_network(somewhere)
    one, fewer = (cycle(experiment, method, members=5, runs=runs, seed=1) for runs in (3, 2))
    assert np.isfinite(one.rmse).all() and np.isfinite(one.observations).all() and np.allclose(one.rmse[:2], fewer.rmse)


@pytest.mark.parametrize(
    "networks, said",
    [
        ((), "network: expected an ObservingNetwork or at least one value or a function"),
        (3, "network: expected an ObservingNetwork or a sequence or a function, got 3"),
        ((ALL, None), "network: expected an ObservingNetwork or a sequence, each an ObservingNetwork or a function"),
        (lambda k: ALL if k < 2 else "none", "network: expected an ObservingNetwork for cycle 2, got 'none'"),
    ],
)
def test_that_what_is_no_network_is_named(networks, said):
    with pytest.raises(ValueError, match=f"^{said}"):
        cycle(EXPERIMENT.with_network(networks), FreeRun())


def test_that_a_record_is_seen_by_the_network_of_each_time():
    changing = EXPERIMENT.with_network(CHANGING)
    truth, method = TruthRecord(changing, runs=3, cycles=7, seed=1), pair("etkf", "sakov2012")[1]
    dataset = observed_record(changing, method, members=5, runs=3, cycles=12, seed=1, discard=5)
    observed = ObservedRecord(changing, dataset)
    times, runs = torch.tensor([1, 2, 3, 4, 2, 6]), torch.tensor([0, 1, 2, 0, 0, 1])
    for record, first, bound in ((truth, -1, 7), (observed, 5, 0)):
        seen = record.observe(times, runs, None, stream(1))
        assert isinstance(seen, GridObservations)
        for i, (time, run) in enumerate(zip(times.tolist(), runs.tolist())):
            sites = list(CHANGING[(time + first) % 3].operator.sites)
            assert seen.mask[i, 0].nonzero()[:, 0].tolist() == sorted(sites)
            known = truth.targets[time, run] if record is truth else torch.zeros(3).double()
            if record is observed:
                known[sites] = torch.tensor(dataset.observations.values[time, run, : len(sites)])
            assert (seen.value - known)[i, 0, sites].abs().max() <= bound
        alone = record.observe(times[[1, 4]], runs[[1, 4]], None, stream(1))  # at one time there is one network
        assert isinstance(alone, Observations)


def test_that_training_where_it_is_used_copes_with_networks_that_change():
    blank = torch.zeros(3).double()
    prior = AnalysisPrior.make(blank, blank + 8, blank + 2, dim=3, rank=2, width=8, seed=1)
    settings = OnPolicySettings(trajectories=4, cycles=6, steps=2, batch=8, memory=3)
    weights = []
    for networks in (ALL, (ALL, ALL), CHANGING):
        record = TruthRecord(EXPERIMENT.with_network(networks), runs=5, cycles=12, seed=1)
        trained, history = train_on_policy(prior, record, settings=settings, seed=1)
        assert np.isfinite(history.loss).all()
        weights.append(torch.cat([p.flatten() for p in trained.network.parameters()]))
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    result = cycle(EXPERIMENT.with_network(CHANGING), AmortisedAnalysis(trained), runs=2)
    assert np.isfinite(result.rmse).all()


START, VARIANCE = torch.tensor(EXPERIMENT.start, dtype=torch.float64), EXPERIMENT.start_variance


def normal(count: int, generator: torch.Generator) -> torch.Tensor:
    return START + VARIANCE**0.5 * standard_normal((count, 3), generator)


def test_that_a_function_may_draw_what_numbers_say():
    drawn, method = replace(EXPERIMENT, start=normal), pair("etkf", "sakov2012")[1]
    one, other = (cycle(e, method, members=5, runs=3, seed=1) for e in (EXPERIMENT, drawn))
    assert one.identical(other)
    assert torch.equal(draw_windows(EXPERIMENT, 4, stream(1)), draw_windows(drawn, 4, stream(1)))


def test_that_truths_and_members_start_from_states_of_a_file(tmp_path):
    from_climate = cycle(replace(EXPERIMENT, cycles=20), FreeRun(), runs=1, seed=5)
    from_climate.to_netcdf(tmp_path / "climate.nc", engine="h5netcdf")
    with xr.open_dataset(tmp_path / "climate.nc", engine="h5netcdf") as file:
        states = torch.tensor(file.truth.values[0, ::25])
    experiment = replace(EXPERIMENT, start=states, start_variance=7.0)
    starts = nature_start(experiment, 12, 1)
    assert all((states == start).all(-1).any() for start in starts) and len(starts.unique(dim=0)) > 5
    assert torch.equal(nature_start(experiment, 4, 1), starts[:4])
    assert not torch.equal(nature_start(experiment, 12, 2), starts)
    still = replace(experiment, nature=FunctionModel(lambda x: x, 3, 0.01), forecast_model=FunctionModel(lambda x: x, 3, 0.01))
    members = torch.tensor(cycle(still, FreeRun(), members=9, runs=2, keep_members=True).background_members.values[:, 0])
    assert all((states == x).all(-1).any() for x in members.flatten(0, 1)) and len(members[0].unique(dim=0)) > 3


@pytest.mark.parametrize(
    "start, said",
    [
        ((0.0, 1.0), "start: expected 3 numbers, got 2"),
        (torch.zeros(4, 2).double(), r"start: expected states of shape \(count, 3\), got \(4, 2\)"),
        (torch.zeros(0, 3).double(), r"start: expected states of shape \(count, 3\), got \(0, 3\)"),
        (torch.full((4, 3), torch.nan), "start: expected finite numbers"),
        (lambda count, generator: torch.zeros(3), r"start: expected states of shape \(1, 3\), got \(3,\)"),
        ("climate.nc", "start: expected a sequence or a tensor of floating-point numbers or a function, got 'climate.nc'"),
    ],
)
def test_that_what_is_no_start_is_named(start, said):
    with pytest.raises(ValueError, match=f"^{said}"):
        nature_start(replace(EXPERIMENT, start=start), 2, 1)


TURN = torch.tensor([[0.8, -0.6, 0.0], [0.6, 0.8, 0.0], [1.2, 1.6, 0.0]]).double()  # which keeps the third at twice the second
TURNING = FunctionModel(lambda x: x @ TURN.T, 3)


def test_that_first_errors_may_be_those_of_forecasts():
    kept = {"interval": 1, "cycles": 1, "start": (3.0, 0.0, 0.0), "start_variance": 0.0, "spin_up": 0}
    settings = kept | {"background_variance": 5.0, "first_ensemble": "forecast_differences"}
    experiment = TwinExperiment("turning", TURNING, TURNING, ALL, **settings)
    result = cycle(experiment, FreeRun(), members=4000, runs=2, seed=1, keep_members=True)
    error = result.background_members.values[:, 0] - result.truth.values[:, :1]
    assert np.allclose(error[..., 2], 2 * error[..., 1])  # as in all states of the model, and in no white noise
    assert abs((error**2).mean() / 5 - 1) < 0.05 and abs(error.mean()) < 0.1
    fewer = cycle(experiment, FreeRun(), members=3, runs=1, seed=1, keep_members=True).background_members.values
    assert np.array_equal(fewer[0, 0, 0], result.background_members.values[0, 0, 0])
    still = FunctionModel(lambda x: x, 3)
    with pytest.raises(ValueError, match="^first_ensemble: expected a forecast model that moves"):
        cycle(replace(experiment, forecast_model=still), FreeRun(), members=3)
    with pytest.raises(ValueError, match="^forecast_model: the forecast_model run became non-finite in runs"):
        cycle(replace(experiment, forecast_model=FunctionModel(lambda x: 1e9 * x + 1, 3)), FreeRun(), members=3)
