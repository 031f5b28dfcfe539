"""Training where the prior is used: records, examples, and trainings that go on after an interruption."""

import itertools
import math
from dataclasses import replace

import pytest
import torch

import pnpda_nb.core.training as loop
from pnpda_nb.classical import EnKF, EnKS
from pnpda_nb.core import standard_normal, stream
from pnpda_nb.learned import (
    AmortisedAnalysis,
    AnalysisPrior,
    LearnedMean,
    ObservedRecord,
    OnPolicySettings,
    OnPolicyTraining,
    RandomNetworks,
    Records,
    TruthRecord,
    train_on_policy,
)
from pnpda_nb.learned.methods import ENSEMBLE_FIELDS
from pnpda_nb.learned.on_policy import TrainingBatch, on_policy_loss
from pnpda_nb.learned.records import innovation_rms, observed_record
from pnpda_nb.observing import GridObservations, on_grid
from pnpda_nb.twin import FreeRun, cycle, lorenz63
from pnpda_nb.twin.testbeds import sqg

ZERO, ONE = (torch.tensor(x, dtype=torch.float64) for x in (0.0, 1.0))
EXPERIMENT = lorenz63(cycles=6)
SETTINGS = OnPolicySettings(trajectories=4, cycles=6, steps=2, batch=8, memory=3, restart=0.2, patience_points=3)


@pytest.fixture(scope="module")
def nature():
    return TruthRecord(EXPERIMENT, runs=5, cycles=12, seed=1)


@pytest.fixture(scope="module")
def data():
    return observed_record(EXPERIMENT, EnKS(inflation=1.5, lag=2), members=10, runs=4, cycles=14, seed=1, smoothed=True)


def make(**settings) -> AnalysisPrior:
    return AnalysisPrior.make(ZERO, 8 * ONE, 2 * ONE, **{"dim": 3, "rank": 2, "width": 8} | settings)


def weights(prior) -> torch.Tensor:
    return torch.cat([p.flatten() for p in prior.network.parameters()])


def test_that_random_networks_respect_their_counts_and_errors():
    usual = (((0, 5), 2.0), ((1, 2, 3), 3.0))
    mask, error = RandomNetworks(20, usual, 0.5, (4, 7), (0.1, 1.0)).draw(400, stream(1))
    counts, deviation = mask.sum(-1), error.amax(-1)
    assert torch.equal(error > 0, mask) and ((error == deviation[:, None]) | ~mask).all()
    assert (deviation[counts == 2] == 2).all() and (deviation[counts == 3] == 3).all()
    free = counts > 3
    assert (
        0.4 < free.double().mean() < 0.6 and counts.max() == 7 and (deviation[free] <= 1).all() and (deviation[free] >= 0.1).all()
    )
    assert torch.equal(mask, RandomNetworks(20, usual, 0.5, (4, 7), (0.1, 1.0)).draw(400, stream(1))[0])
    full = RandomNetworks(20, (), 0.0, (20, 20)).draw(50, stream(1))[0]
    assert full.all()


@pytest.mark.parametrize(
    "settings, name",
    [
        ({"counts": (0, 4)}, "counts"),
        ({"counts": (4, 21)}, "counts"),
        ({"errors": (1.0, 0.1)}, "errors"),
        ({"often": 0.5}, "often"),
    ],
)
def test_that_networks_that_cannot_be_are_named(settings, name):
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        RandomNetworks(**{"dim": 20, "usual": (), "often": 0.0, "counts": (4, 8)} | settings)


def test_that_a_truth_record_observes_its_own_truths_anew():
    record = TruthRecord(EXPERIMENT, runs=1, cycles=3, seed=1)
    times, runs = torch.ones(20_000, dtype=torch.long), torch.zeros(20_000, dtype=torch.long)
    seen = record.observe(times, runs, None, stream(1))
    errors = seen.values - record.targets[1, 0, [0, 2]]
    assert (torch.cov(errors.T) - EXPERIMENT.network.covariance.matrix).abs().max() < 0.1
    networks = RandomNetworks(3, (((1,), 0.5),), 1.0, (1, 3)).draw(20_000, stream(2))
    shown = record.observe(times, runs, networks, stream(1))
    assert isinstance(shown, GridObservations) and shown.value.shape == (20_000, 1, 3) and (shown.value[..., 0] == 0).all()
    assert abs(float((shown.value[..., 1] - record.targets[1, 0, 1]).std()) - 0.5) < 0.02
    begin = record.begin(times, runs, stream(3)) - record.targets[1, 0]
    assert abs(float(begin.var()) - EXPERIMENT.background_variance) < 0.1


def test_that_an_observed_record_knows_what_was_stored(data):
    record = ObservedRecord(EXPERIMENT, data)
    times, runs = torch.tensor([0, 3, 8]), torch.tensor([3, 0, 1])
    stored = torch.tensor(data.observations.values)
    assert record.targets.shape == (9, 4, 3)
    assert torch.equal(record.observe(times, runs, None, stream(1)).values, stored[times, runs])
    assert torch.equal(record.begin(times, runs, stream(1)), torch.tensor(data.analysis.values)[times, runs])
    assert not torch.equal(record.targets, record.analyses)  # the smoother has moved them
    state = standard_normal((3, 3), stream(2))
    miss = record.miss(times, runs, state)
    assert torch.equal(miss[:, 1], torch.zeros(3)) and torch.equal(miss[:, [0, 2]], stored[times, runs] - state[:, [0, 2]])
    with pytest.raises(ValueError, match="^smoothed: EnKF does not look back"):
        observed_record(EXPERIMENT, EnKF(), members=3, runs=2, cycles=7, seed=1, smoothed=True)


def test_that_several_records_are_gathered_in_order(nature, data):
    first, second = ObservedRecord(EXPERIMENT, data), ObservedRecord(lorenz63(observed=(1, 2), cycles=6), data)
    both = Records(first, second)
    times, runs = torch.tensor([1, 2, 3, 4]), torch.tensor([5, 0, 7, 3])
    shown = both.observe(times, runs, None, stream(1))
    for i, (record, run) in enumerate(((second, 1), (first, 0), (second, 3), (first, 3))):
        alone = on_grid(record.observe(times[i : i + 1], torch.tensor([run]), None, stream(1)), 3)
        for name in ("value", "mask", "error"):
            assert torch.equal(getattr(shown, name)[i], getattr(alone, name)[0])
        assert torch.equal(both.begin(times, runs, stream(1))[i], record.analyses[times[i], run])
        assert torch.equal(both.miss(times, runs, 0 * shown.value[:, 0])[i], alone.value[0, 0])
        assert torch.equal(both.targets[times[i], runs[i]], record.targets[times[i], run])
    with pytest.raises(ValueError, match="^records: expected the same number"):
        Records(first, nature)
    trained, _ = train_on_policy(make(), both, settings=SETTINGS, seed=1)
    assert torch.isfinite(weights(trained)).all()


def test_that_the_loss_of_an_untrained_prior_is_known():
    prior, misses = make(), standard_normal((200, 3), stream(1))
    seen = GridObservations(torch.zeros(200, 3), torch.zeros(200, 3, dtype=torch.bool), torch.zeros(200, 3))
    for likelihood in (0.0, 0.3):
        squares = (misses / 2).square().mean()
        expected = squares + likelihood * (squares / 2 + math.log(2))
        found = on_policy_loss(prior, TrainingBatch(0 * misses, misses, seen), stream(1), likelihood=likelihood)
        assert abs(float(found.detach() - expected)) < 0.02
    alone = on_policy_loss(
        prior, TrainingBatch(0 * misses, misses, seen), stream(1), likelihood=0.0, start_fraction=0.0, hidden=1.0
    )
    torch.testing.assert_close(alone.detach(), squares)  # what it adds is zero at every pseudo-time


def test_that_training_on_gaussian_lessons_finds_the_kalman_answer_and_its_variance():
    """x_a = x_b + N(0, 1), seen with variance 1 in half of the cases: the posterior variance is 1/2, without it 1."""
    prior = AnalysisPrior.make(ZERO, ONE, ONE, dim=1, rank=1, width=16)
    optimiser, generator = torch.optim.Adam(prior.network.parameters(), lr=4e-3), stream(1)

    def training_batch(count: int, half: bool = True) -> TrainingBatch:
        background, increment, error = standard_normal((3, count, 1), generator)
        mask = (torch.rand(count, 1, generator=generator) < 0.5) if half else torch.ones(count, 1, dtype=torch.bool)
        value = (background + increment + error).where(mask, 0.0)
        return TrainingBatch(
            background, background + increment, GridObservations(value, mask, ONE.expand(count, 1).where(mask, 0.0))
        )

    for step in range(500):
        loss = on_policy_loss(prior, training_batch(256), generator, likelihood=0.5)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if step == 350:
            optimiser.param_groups[0]["lr"] = 1e-3
    test = training_batch(4000, half=False)
    with torch.no_grad():
        answer, open_ = prior.look(test.background, seen=test.seen)
        blind, wide = prior.look(test.background)
    kalman = (test.background + test.seen.value) / 2
    assert (answer - kalman).square().mean() < 0.03 and (blind - test.background).square().mean() < 0.03
    assert abs(float((answer - test.target).var()) - 0.5) < 0.06
    assert abs(float(open_.variance.mean()) - 0.5) < 0.08 and abs(float(wide.variance.mean()) - 1.0) < 0.15


def test_that_the_same_seed_gives_the_same_weights_and_another_one_others(nature):
    prior = make()
    before = weights(prior).clone()
    a, b, c = (weights(train_on_policy(prior, nature, settings=SETTINGS, seed=seed)[0]) for seed in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert torch.equal(weights(prior), before)  # what it started from is left alone


@pytest.mark.parametrize("stop", [3, 4, 6])  # the first call is for what training starts from
@pytest.mark.parametrize("kind", ["nature", "observed", "ensemble", "plain"])
def test_that_a_resumed_training_is_the_uninterrupted_one(kind, stop, nature, data, tmp_path, monkeypatch):
    record = ObservedRecord(EXPERIMENT, data) if kind == "observed" else nature
    settings = replace(SETTINGS, cycles=5, rollout=0 if kind in ("ensemble", "plain") else 2, rollout_cycles=5, patience_points=5)
    options, prior = {"settings": settings, "seed": 1}, make()
    if kind == "ensemble":
        prior = make(extra=ENSEMBLE_FIELDS)
        options |= {"policy": lambda p: LearnedMean(p, EnKF(inflation=1.3)), "members": 5}
    whole, history = train_on_policy(prior, record, validate=lambda p: float(weights(p).abs().sum()), **options)
    ticks = itertools.count(0, 100)
    monkeypatch.setattr(loop.time, "monotonic", lambda: next(ticks))  # every cycle is written
    calls = itertools.count(1)

    def breaks(prior) -> float:
        if next(calls) == stop:
            raise KeyboardInterrupt
        return float(weights(prior).abs().sum())

    path = tmp_path / "checkpoint"
    with pytest.raises(KeyboardInterrupt):
        train_on_policy(prior, record, validate=breaks, checkpoint=path, **options)
    assert path.exists()
    resumed, again = train_on_policy(prior, record, validate=breaks, checkpoint=path, **options)
    assert torch.equal(weights(whole), weights(resumed)) and again.equals(history) and not path.exists()
    assert whole.training == resumed.training


def test_that_checkpoints_of_others_and_broken_ones_are_named(nature, tmp_path, monkeypatch):
    path = tmp_path / "checkpoint"
    ticks = itertools.count(0, 100)
    monkeypatch.setattr(loop.time, "monotonic", lambda: next(ticks))

    calls = itertools.count()

    def stops(prior) -> float:
        if next(calls) == 2:  # after the first cycles
            raise KeyboardInterrupt
        return 1.0

    with pytest.raises(KeyboardInterrupt):
        train_on_policy(make(), nature, settings=SETTINGS, validate=stops, checkpoint=path)
    with pytest.raises(ValueError, match="^checkpoint: .* belongs to another training"):
        train_on_policy(make(), nature, settings=SETTINGS, checkpoint=path, seed=5)
    for content in (path.read_bytes()[:-200], b"", b"no checkpoint"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="^checkpoint: .* not a readable") as error:
            train_on_policy(make(), nature, settings=SETTINGS, checkpoint=path)
        assert "\n" not in str(error.value)


def test_that_the_best_of_the_validated_priors_is_returned(nature):
    seen = []

    def validate(prior) -> float:
        seen.append(weights(prior).clone())
        return [4.0, 3.0, 1.0, 2.0][len(seen) - 1]  # the first is what training starts from

    best, history = train_on_policy(make(), nature, settings=SETTINGS, validate=validate)
    assert torch.equal(weights(best), seen[2]) and history.validation.dropna().tolist() == [3.0, 1.0, 2.0]
    assert len(history) == 6 and best.training["validation"] == 1.0
    with pytest.raises(ValueError, match="^training: no validation"):
        train_on_policy(make(), nature, settings=SETTINGS, validate=lambda prior: math.nan)


def test_that_training_helps(nature):
    prior = AnalysisPrior.make(
        nature.targets.mean((0, 1)), nature.targets.std((0, 1)), 0.2 * nature.targets.std((0, 1)), dim=3, rank=1, width=16
    )
    settings = replace(SETTINGS, trajectories=16, cycles=40, batch=64, memory=20, average=0.9)
    trained, _ = train_on_policy(prior, nature, settings=settings, seed=1)
    before, after = (cycle(EXPERIMENT, AmortisedAnalysis(p), runs=20, seed=2) for p in (prior, trained))
    at_cycles = [r.truth.sel(time=r.cycle_time, method="nearest").values for r in (before, after)]
    wrong, less = (float(((r.analysis.values - t) ** 2).mean() ** 0.5) for r, t in zip((before, after), at_cycles))
    assert less < 0.85 * wrong
    assert innovation_rms(after, EXPERIMENT) < innovation_rms(before, EXPERIMENT)


def test_that_trajectories_that_are_lost_begin_anew_and_teach_nothing(nature):
    class Wild(AmortisedAnalysis):
        def analyse(self, background, observations, *, forecast, generator):
            analysis = super().analyse(background, observations, forecast=forecast, generator=generator)
            analysis[0] = torch.nan
            return analysis

    training = OnPolicyTraining(make(), nature, Wild, SETTINGS)
    training.advance()
    assert torch.isfinite(training.trajectories.state).all() and len(training.examples.places[0]) == SETTINGS.trajectories - 1


def test_that_innovations_are_those_that_were_seen():
    result = cycle(EXPERIMENT, AmortisedAnalysis(make()), runs=3, seed=1)
    by_hand = (result.observations.values - result.background.values[..., [0, 2]]).ravel()
    assert innovation_rms(result, EXPERIMENT) == pytest.approx((by_hand**2).mean() ** 0.5)
    result.background.values[0, 0, 0] = math.nan
    assert innovation_rms(result, EXPERIMENT) == math.inf
    moving = sqg(size=16, columns=20, cycles=3)
    result = cycle(moving, FreeRun(), runs=2, seed=1)
    known = [moving.network_at(k).operator(torch.tensor(result.background.values[:, k])) for k in range(3)]
    by_hand = result.observations.values - torch.stack(known, 1).numpy()
    assert innovation_rms(result, moving) == pytest.approx((by_hand**2).mean() ** 0.5)


def test_that_trainings_that_cannot_be_are_named(nature):
    with pytest.raises(ValueError, match="^prior: expected one for states of size 3, got 4"):
        train_on_policy(make(dim=4), nature, settings=SETTINGS)
    with pytest.raises(ValueError, match="^rollout: expected a single forecast"):
        train_on_policy(make(), nature, settings=replace(SETTINGS, rollout=2), members=3)
    with pytest.raises(ValueError, match="^record: expected at least 14 times, got 13"):
        train_on_policy(make(), nature, settings=replace(SETTINGS, rollout=11))
    for wrong in ({"cycles": 0}, {"restart": 2.0}, {"learning_rate": 0.0}, {"rollout": -1}):
        with pytest.raises(ValueError, match=f"^{next(iter(wrong))}: expected"):
            replace(SETTINGS, **wrong)
