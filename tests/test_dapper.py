"""Against the real DAPPER, in both directions; skipped where it is not installed."""

import numpy as np
import pytest
import torch

pytest.importorskip("dapper", reason="DAPPER is not installed")

from pnpda_nb.interop import dapper_experiment, dapper_model, dapper_network, for_dapper
from pnpda_nb.interop.dapper import import_dapper

import_dapper()
import dapper as dpr  # noqa: E402
import dapper.da_methods as da  # noqa: E402
import dapper.mods as modelling  # noqa: E402
import dapper.mods.Lorenz63.sakov2012  # noqa: E402
import dapper.mods.Lorenz96.sakov2008  # noqa: E402
from dapper.da_methods.ensemble import EnKF_analysis  # noqa: E402
from dapper.tools.seeding import rng, set_seed  # noqa: E402

from pnpda_nb.classical import ETKF, LETKF, EnKF, EnKS, FourDVar, ParticleFilter, ThreeDVar  # noqa: E402
from pnpda_nb.core import standard_normal, stream  # noqa: E402
from pnpda_nb.dynamics import AdditiveModelError, Lorenz63, Lorenz96, trajectory  # noqa: E402
from pnpda_nb.flow_matching import GaussianPrior  # noqa: E402
from pnpda_nb.observing import Covariance, DiagonalCovariance, Select  # noqa: E402
from pnpda_nb.pnp import PnPDA  # noqa: E402
from pnpda_nb.twin import FreeRun, cycle, make_archive, mean_and_error, pairs_of, sakov2008, sakov2012  # noqa: E402  # noqa: E402  # noqa: E402

COVARIANCE = Covariance(torch.eye(3, dtype=torch.float64))


def lorenz63(Ko: int = 199):
    hmm = dapper.mods.Lorenz63.sakov2012.HMM.copy()
    hmm.tseq.Ko = Ko
    return hmm


def lorenz96(Ko: int = 199):
    hmm = dapper.mods.Lorenz96.sakov2008.HMM.copy()
    hmm.tseq.Ko = Ko
    hmm.tseq.BurnIn = 5.0
    return hmm


def changed(hmm, dyn: dict | None = None, obs: dict | None = None, X0=None):
    """The same experiment with some parts replaced."""
    Dyn = {"M": hmm.Dyn.M, "model": hmm.Dyn.model, "noise": 0} | (dyn or {})
    Obs = modelling.partial_Id_Obs(hmm.Nx, np.arange(hmm.Nx)) | {"noise": 2} if obs is None else obs
    return modelling.HiddenMarkovModel(Dyn, Obs, hmm.tseq.copy(), X0 or hmm.X0, name="mine")


def score(make, hmm, seeds=range(1, 6)) -> np.ndarray:
    scores = []
    for seed in seeds:
        set_seed(seed)
        truth, observations = hmm.simulate()
        xp = make()
        xp.assimilate(hmm, truth, observations)
        xp.stats.average_in_time()
        scores.append(xp.avrgs.err.rms.a.val)
    return np.array(scores)


def mean_of(scores: np.ndarray) -> tuple[float, float]:
    return scores.mean(), scores.std(ddof=1) / len(scores) ** 0.5


def same(one: tuple[float, float], other: tuple[float, float], errors: float = 4.0) -> bool:
    return abs(one[0] - other[0]) < errors * np.hypot(one[1], other[1])


@pytest.mark.parametrize("hmm, own", [(lorenz63(), Lorenz63()), (lorenz96(), Lorenz96())])
def test_that_dappers_models_step_as_ours_do(hmm, own):
    start = torch.tensor(hmm.X0.sample(6)).reshape(2, 3, -1)
    theirs = dapper_model(hmm)
    assert theirs.dt == own.dt and theirs.dim == own.dim
    assert torch.allclose(trajectory(theirs, start, 50), trajectory(own, start, 50), rtol=0, atol=1e-9)


@pytest.mark.parametrize("members, upd", [(10, "Sqrt"), (3, "Sqrt"), (10, "Sqrt svd")])
def test_that_the_square_root_analysis_is_dappers_to_rounding(members, upd):
    hmm = lorenz63()
    background = 5 * standard_normal((members, 3), stream(members, "background"))
    network = dapper_network(hmm.Obs(0), 3)
    y = standard_normal((1, 3), stream(1, "observations"))
    operator = hmm.Obs(0)
    theirs = EnKF_analysis(background.numpy(), operator(background.numpy()), operator.noise, y[0].numpy(), upd)
    ours = ETKF().analyse(background[None], network.report(y), forecast=None, generator=stream(1, "method"))
    assert np.allclose(ours[0].numpy(), theirs, rtol=0, atol=1e-8)


def test_that_a_deterministic_filter_gives_the_same_run_inside_dapper_as_dappers_own():
    hmm = lorenz63(Ko=5)
    means = []
    for make in (lambda: da.EnKF("Sqrt", N=10, infl=1.1), lambda: for_dapper(ETKF(inflation=1.1), 10)):
        set_seed(7)
        truth, observations = hmm.simulate()
        xp = make()
        xp.assimilate(hmm, truth, observations)
        means.append((np.array(xp.stats.mu.f), np.array(xp.stats.mu.a), np.array(xp.stats.spread.a)))
    for one, other in zip(*means):
        assert np.allclose(one, other, atol=1e-6) and len(one) == 6


@pytest.mark.parametrize(
    "hmm, theirs, ours, members, testbed",
    [
        (lorenz63(), lambda: da.EnKF("PertObs", N=20, infl=1.04), EnKF(inflation=1.04), 20, sakov2012),
        (lorenz96(), lambda: da.EnKF("Sqrt", N=24, infl=1.02, rot=True), ETKF(inflation=1.02, rotate=True), 24, sakov2008),
    ],
)
def test_that_a_method_scores_the_same_here_and_there(hmm, theirs, ours, members, testbed):
    there, carried = score(theirs, hmm, range(1, 5)), score(lambda: for_dapper(ours, members), hmm, range(1, 5))
    assert same(mean_of(there), mean_of(carried))
    experiment = dapper_experiment(hmm)
    from_there = cycle(experiment, ours, members=members, runs=10, seed=1)
    own = cycle(testbed(cycles=experiment.cycles), ours, members=members, runs=10, seed=1)
    if testbed is sakov2012:  # the same burn-in, and the same draws: the same numbers, until chaos finds the rounding
        assert np.allclose(from_there.analysis[:, :3], own.analysis[:, :3], atol=1e-8)
    assert same(mean_and_error(from_there), mean_of(carried), 5)


def test_that_a_local_filter_knows_where_dapper_observes():
    inside = score(lambda: for_dapper(LETKF(1.04, rotate=True, half_width=7.28), 7), lorenz96(), [1])
    assert inside[0] < 0.3  # DAPPER lists 0.22 for its own; without localisation, seven members lose the truth


def test_that_what_is_translated_says_what_dapper_says():
    theirs, own = dapper_experiment(lorenz63(Ko=999)), sakov2012()
    for name in ("interval", "cycles", "burn_in", "start", "spin_up", "first_ensemble"):
        assert getattr(theirs, name) == getattr(own, name), name
    assert abs(theirs.start_variance - 2) < 1e-12 and theirs.network.operator == Select((0, 1, 2), 3)
    assert torch.allclose(theirs.network.covariance.variances, own.network.covariance.variances)
    noisy = dapper_experiment(changed(lorenz63(), dyn={"noise": 0.5}), cycles=7)
    assert noisy.cycles == 7 and abs(noisy.model_error.variance - 0.005) < 1e-15 and noisy.name == "mine"
    squares = {"M": 3, "model": lambda x: x**2, "noise": modelling.GaussRV(C=np.eye(3) + 0.5)}
    network = dapper_experiment(changed(lorenz63(), obs=squares)).network
    assert not network.operator.linear and not isinstance(network.covariance, DiagonalCovariance)
    one = [modelling.Operator(**modelling.partial_Id_Obs(3, [i]), noise=1.0 + i) for i in range(3)]
    changing = dapper_experiment(changed(lorenz63(), obs={"time_dependent": lambda ko: one[ko % 3]}), cycles=4)
    seen = [changing.network_at(k) for k in range(4)]
    assert [network.operator.sites for network in seen] == [(0,), (1,), (2,), (0,)]
    assert [float(network.covariance.variances) for network in seen] == [1.0, 2.0, 3.0, 1.0]
    assert cycle(changing, ETKF(), members=5, runs=2).sizes["observation"] == 1


@pytest.mark.parametrize(
    "change, said",
    [
        (
            {"X0": modelling.GaussRV(mu=np.zeros(3), C=np.array([1.0, 2, 3]))},
            "X0: expected a covariance that is a multiple of the identity",
        ),
        ({"X0": modelling.RV(M=3, func=lambda N: rng.random((N, 3)))}, "X0: expected a Gaussian, got RV"),
        ({"dyn": {"noise": np.array([1.0, 2, 3])}}, "Dyn.noise: expected a covariance that is a multiple of the identity"),
        ({"dyn": {"model": lambda x, t, dt: x + rng.standard_normal(x.shape)}}, "Dyn: expected a model that does the same twice"),
        ({"dyn": {"model": lambda x, t, dt: x + t}}, "Dyn: expected a model that does not depend on time"),
        ({"dyn": {"model": lambda x: x}}, "Dyn: raised TypeError"),
        ({"obs": {"M": 3}}, "Obs.noise: expected Gaussian noise with a covariance, got none"),
        ({"obs": {"M": 3, "noise": modelling.GaussRV(mu=np.ones(3), C=np.eye(3))}}, "Obs.noise: expected noise of mean zero"),
    ],
)
def test_that_what_cannot_be_translated_is_refused_by_name(change, said):
    with pytest.raises(ValueError, match=said):
        dapper_experiment(changed(lorenz63(), **change))


def test_that_translating_draws_nothing_from_dappers_generator():
    set_seed(5)
    before = rng.bit_generator.state
    dapper_experiment(lorenz63())
    assert rng.bit_generator.state == before


@pytest.fixture(scope="module")
def prior():
    return GaussianPrior.from_pairs(*pairs_of(make_archive(sakov2012(60), EnKF(inflation=1.04), members=10, runs=20, seed=1)))


def test_that_pnpda_runs_inside_dapper_and_beats_a_free_run(prior):
    hmm = lorenz63()
    ours = score(lambda: for_dapper(PnPDA(prior, iterations=20, data_step="kalman")), hmm, [1])
    members = score(lambda: for_dapper(PnPDA(prior, iterations=20, data_step="kalman"), 5), hmm, [1])
    assert ours[0] < 1.5 and members[0] < 1.5 < score(lambda: for_dapper(FreeRun()), hmm, [1])[0]
    assert score(lambda: for_dapper(ThreeDVar(COVARIANCE, scale=7.0)), hmm, [1])[0] < 2


def test_that_a_list_is_launched_and_tabulated_with_ours_beside_theirs(prior, tmp_path):
    xps = dpr.xpList()
    xps += da.EnKF("PertObs", N=10, infl=1.04)
    xps += for_dapper(EnKF(inflation=1.04, relaxation=0.1), 10, seed=3000)
    xps += for_dapper(EnKF(inflation=1.04, relaxation=0.1), 10, seed=3000, name="again")
    xps += for_dapper(PnPDA(prior, iterations=5), seed=3000)
    xps.launch(lorenz63(Ko=80), save_as=False, fail_gently=False)
    table = xps.tabulate_avrgs(["rmse.a", "rmv.a"], colorize=False)
    assert "EnKF (pnpda_nb)" in table and "again" in table and "PnPDA (pnpda_nb)" in table
    first, second = (xps[i].avrgs.err.rms.a.val for i in (1, 2))
    assert first == second  # the same seed of DAPPER, the same truth and the same luck
    assert xps[1].infl == 1.04 and xps[1].N == 10 and not hasattr(xps[3], "N")
    assert np.isnan(xps[3].avrgs.spread.rms.a.val) and np.isfinite(xps[3].avrgs.err.rms.a.val)


def test_that_smoothers_and_windows_look_back_inside_dapper(prior):
    hmm = lorenz63(Ko=80)
    set_seed(4)
    truth, observations = hmm.simulate()
    for method, members in (
        (EnKS(inflation=1.04, lag=2), 20),
        (FourDVar(COVARIANCE, scale=0.5, window=2, shift=1, iterations=3), 1),
    ):
        xp = for_dapper(method, members)
        xp.assimilate(hmm, truth, observations)
        errors = [np.sqrt(np.mean(np.array(getattr(xp.stats.err, which)) ** 2, 1))[65:].mean() for which in "fas"]
        assert errors[2] < errors[1] < errors[0]


def test_that_weights_are_told_to_dapper_and_score_there_as_here():
    hmm = lorenz63(Ko=150)
    theirs = score(lambda: da.PartFilt(N=200, NER=0.2, reg=1.0), hmm, range(1, 5))
    ours = score(lambda: for_dapper(ParticleFilter(1.0, 0.2, "gaussian"), 200), hmm, range(1, 5))
    assert abs(ours.mean() / theirs.mean() - 1) < 0.4
    set_seed(4)
    truth, observations = hmm.simulate()
    xp = for_dapper(ParticleFilter(resample_below=0.5), 50)
    xp.assimilate(hmm, truth, observations)
    weights = np.array(xp.stats.w.a)
    assert np.allclose(weights.sum(1), 1) and (1 / (weights**2).sum(1) >= 25 - 1e-6).all() and (weights.std(1) > 0).any()
    assert np.array_equal(np.array(xp.stats.w.f)[1:], weights[:-1])


def test_that_noise_of_the_model_moves_ensembles_by_as_much_as_dapper_moves_them():
    still = {"model": lambda x, t, dt: x, "noise": np.array([1.0, 4.0, 9.0])}
    hmm = changed(lorenz63(Ko=3), dyn=still, X0=modelling.GaussRV(mu=np.zeros(3), C=1e-10))
    set_seed(1)
    truth, observations = hmm.simulate()
    xp = for_dapper(FreeRun(), 4000)
    xp.assimilate(hmm, truth, observations)
    assert np.allclose(np.array(xp.stats.spread.f)[-1] ** 2, 4 * 25 * 0.01 * np.array([1, 4, 9]), rtol=0.1)


def test_that_operators_may_change_in_time_and_models_depend_on_it_where_nobody_asks_for_a_forecast():
    def at(ko):
        return modelling.Operator(**modelling.partial_Id_Obs(3, np.array([ko % 3])), noise=2)

    hmm = changed(lorenz63(Ko=60), obs={"time_dependent": at})
    step = hmm.Dyn.model
    hmm.Dyn.model = lambda x, t, dt: step(x, t, dt) + 0.001 * np.sin(t)
    theirs = score(lambda: da.EnKF("PertObs", N=30, infl=1.05), hmm, [2, 3, 4])
    ours = score(lambda: for_dapper(EnKF(inflation=1.05), 30), hmm, [2, 3, 4])
    assert abs(ours.mean() / theirs.mean() - 1) < 0.5
    with pytest.raises(ValueError, match="Dyn: expected a model that does not depend on time"):
        score(lambda: for_dapper(FourDVar(COVARIANCE)), hmm, [1])


def test_that_a_run_that_fails_says_when_and_may_fail_gently():
    hmm = changed(lorenz63(Ko=10), dyn={"model": lambda x, t, dt: np.where(t > 1, np.nan, x), "noise": 0})
    truth, observations = lorenz63(Ko=10).simulate()
    xp = for_dapper(EnKF(), 5)
    with pytest.raises(ValueError, match=r"EnKF \(pnpda_nb\): the ensemble became non-finite at ko = 4"):
        xp.assimilate(hmm, truth, observations)
    xp.assimilate(hmm, truth, observations, fail_gently="quiet")
    assert xp.crashed


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda: for_dapper(EnKF(), 0), "members: expected a whole number of at least 1, got 0"),
        (lambda: for_dapper("EnKF", 2), "method: expected a Method, got 'EnKF'"),
        (lambda: for_dapper(EnKF(), 2, seed=0), "seed: expected a positive number"),
    ],
)
def test_that_wrong_arguments_are_refused_by_name(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def test_that_an_additive_model_error_of_ours_is_dappers_noise():
    experiment = dapper_experiment(changed(lorenz96(), dyn={"noise": 0.25}))
    assert experiment.model_error == experiment.nature_error == AdditiveModelError(0.25 * 0.05)
