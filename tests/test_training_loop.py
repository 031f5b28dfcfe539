"""The one training loop: a training that was interrupted at any step is the one that was not, for every kind of training."""

import math
import sys
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_precision import Device

import pnpda_nb.core.training as loop
from pnpda_nb.core import standard_normal, stream
from pnpda_nb.core.disk import write_checkpoint
from pnpda_nb.core.training import Phase, Plan, Training, read_training, resume_training, run_training
from pnpda_nb.flow_matching import TensorPairs, TrainingSettings, train_from
from pnpda_nb.learned import AnalysisPrior, OnPolicySettings, TruthRecord, train_on_policy
from pnpda_nb.twin import lorenz63
from pnpda_nb.windows import IncrementalPrior, IncrementalSettings, RandomSets, WindowClimatology, train_incremental

ONE = torch.tensor(1.0, dtype=torch.float64)
DRAWS = standard_normal((300, 6, 2), stream(1, "windows"))


@pytest.fixture(autouse=True, scope="module")
def every_round_is_remembered():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "_PAUSE", -1.0)
        yield


@cache
def nature() -> TruthRecord:
    return TruthRecord(lorenz63(cycles=6), runs=3, cycles=12, seed=1)


def flow(memory=10**8, **options):
    start = TrainingSettings(hidden=(8,), embedding=4, batch=32, epochs=4, source="background", repaired_target=0.3)
    source = TensorPairs(DRAWS[:200, 0], DRAWS[:200, 1], "pairs of this test", 20)
    prior, history = train_from(source, start, seed=1, memory=memory, **options)
    return prior.network, history


def on_policy(rollout=0, **options):
    start = OnPolicySettings(
        trajectories=3, cycles=4, steps=2, batch=6, memory=3, restart=0.2, rollout=rollout, rollout_cycles=4, patience_points=4
    )
    prior = AnalysisPrior.make(0 * ONE, 8 * ONE, 2 * ONE, dim=3, rank=2, width=8)

    def judge(prior) -> float:
        return float(sum(p.abs().sum() for p in prior.network.parameters()))

    prior, history = train_on_policy(prior, nature(), settings=start, validate=judge, seed=1, **options)
    return prior.network, history


def incremental(drawn=True, **options):
    start = IncrementalSettings(iterations=23, processes=2, windows=2, checks=3, background=0.3)
    windows = (lambda count, generator: DRAWS[torch.randint(0, 300, (count,), generator=generator)]) if drawn else DRAWS
    prior = IncrementalPrior.make(WindowClimatology.of(DRAWS), levels=2, width=8)
    sets = RandomSets(6, 2, count=2)
    prior, history = train_incremental(prior, windows, sets, start, validation=DRAWS[:5], seed=1, **options)
    return prior.networks, history.drop(columns="seconds")


KINDS = {
    "flow matching": flow,
    "flow matching on a part of the pairs": lambda **options: flow(memory=4000, **options),
    "on-policy": on_policy,
    "on-policy, then rollout": lambda **options: on_policy(rollout=2, **options),
    "incremental, drawn": incremental,
    "incremental, from an archive": lambda **options: incremental(drawn=False, **options),
}


def interrupted(train, step: int, taken: bool, **options) -> None:
    """Train, and press Ctrl-C at a step (counted from 0), before or after it is taken; or to the end if there are fewer."""
    whole, count = Training.step, iter(range(10**6))

    def stops(training, loss):
        now = next(count)
        if now == step and not taken:
            raise KeyboardInterrupt
        whole(training, loss)
        if now == step:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Training, "step", stops)
        try:
            train(**options)
        except KeyboardInterrupt:
            pass


@cache
def straight(kind: str):
    network, history = KINDS[kind]()
    return content(network), history


def content(network: torch.nn.Module) -> list[bytes]:
    return [x.numpy().tobytes() for x in network.state_dict().values()]


QUICK = ("flow matching", "on-policy", "incremental, drawn")


@pytest.mark.parametrize("kind", [kind if kind in QUICK else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS])
@settings(max_examples=4, deadline=None)
@example(stops=[(10, True)])  # among the rollouts, where there are any
@given(stops=st.lists(st.tuples(st.integers(0, 24), st.booleans()), min_size=1, max_size=2))
def test_that_a_training_that_was_interrupted_at_any_step_ends_with_the_bytes_of_one_that_was_not(kind, stops, tmp_path_factory):
    path = tmp_path_factory.mktemp("training") / "checkpoint"
    for step, taken in stops:
        interrupted(KINDS[kind], step, taken, checkpoint=path)
    network, history = KINDS[kind](checkpoint=path)
    weights, expected = straight(kind)
    assert content(network) == weights and history.equals(expected) and not path.exists()


# where numbers change their device in a training that is not on the processor's
MOVES = {
    "core.compute._computing": "whether there is such a device",
    "core.compute._cast": "what a method or a climate holds",
    "core.random.standard_normal": "a generator draws on its own device",
    "core.training._copied": "the best weights, and checkpoints",
    "core.training.restore": "which are read",
    "flow_matching.flow.conditional_coupling": "who is paired with whom is found by the processor",
    "flow_matching.training.__init__": "the network",
    "flow_matching.training.batches": "pairs and noise",
    "flow_matching.training.validate": "and those that are always the same",
    "learned.on_policy._copy": "the network",
    "learned.on_policy.advance": "targets, and which trajectories are lost",
    "learned.on_policy.batches": "which are lost in a rollout",
    "learned.on_policy.on_policy_loss": "draws",
    "learned.on_policy.rollout_loss": "targets and draws",
    "learned.records.__init__": "states of trajectories",
    "learned.records._rows": "which rows are taken",
    "learned.records.begin": "states that begin anew",
    "learned.records.miss": "targets",
    "learned.records.recall": "states of trajectories",
    "learned.records.remember": "states of trajectories",
    "windows.banded._back": "banded systems are solved by the processor",
    "windows.banded._factored": "banded systems are solved by the processor",
    "windows.banded._flat": "banded systems are solved by the processor",
    "windows.incremental.prior_at": "how far an estimate has come",
    "windows.laws._gain": "a matrix of ones",
    "windows.training.__init__": "the networks",
    "windows.training._standard": "windows",
    "windows.training.observe_windows": "errors, and what is seen",
    "windows.training.train_incremental": "the networks, in the end",
}


def begun_and_finished(kind: str, begun: str, finished: str, path) -> tuple:
    interrupted(KINDS[kind], 5, True, checkpoint=path, device=begun)
    assert path.exists()
    network, history = KINDS[kind](checkpoint=path, device=finished)
    assert all(type(x) is torch.Tensor and x.device.type == "cpu" for x in network.state_dict().values())
    return network, history


def require_close(one: tuple, other: tuple, **tolerance) -> None:
    for a, b in zip(one[0].state_dict().values(), other[0].state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, **tolerance)
    np.testing.assert_allclose(one[1].validation.astype(float), other[1].validation.astype(float), rtol=tolerance["rtol"])


@pytest.mark.parametrize("kind", [kind if kind in QUICK[:2] else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS])
def test_that_a_training_may_change_its_device_and_sees_the_same_numbers_everywhere(kind, monkeypatch, tmp_path):
    fused = "_get_fused_kernels_supported_devices"  # the optimiser of one pass over the weights
    monkeypatch.setattr(sys.modules["torch.optim.optimizer"], fused, lambda: ["cpu", "lazy"])
    with Device() as device:  # which no compiled step sees
        here = KINDS[kind]()
        assert not device.moved
        for begun, finished in (("lazy", "cpu"), ("cpu", "lazy")):
            elsewhere = begun_and_finished(kind, begun, finished, tmp_path / begun)
            require_close(here, elsewhere, rtol=1e-4, atol=1e-6)  # torch has other sums for such tensors
    inner = {next(name for name in where if not name.endswith(">")) for where in device.moved}
    assert inner <= MOVES.keys(), inner - MOVES.keys()
    assert any(name.split(".")[0] in ("flow_matching", "learned", "windows") for name in inner)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("kind", KINDS)
def test_that_a_training_on_a_gpu_is_that_of_the_processor(kind, tmp_path):
    here = KINDS[kind]()
    require_close(here, KINDS[kind](device="cuda"), rtol=1e-2, atol=1e-3)
    for begun, finished in (("cuda", "cpu"), ("cpu", "cuda")):
        require_close(here, begun_and_finished(kind, begun, finished, tmp_path / begun), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("kind", QUICK)
def test_that_a_device_that_is_not_there_is_named_before_anything_is_done(kind):
    with pytest.raises(ValueError, match="^device: expected cpu or, where there is one, cuda, got tpu"):
        KINDS[kind](device="tpu")


@pytest.mark.parametrize("kind", ["flow matching", "on-policy", "incremental, drawn"])
def test_that_a_checkpoint_is_that_of_the_last_whole_round(kind, tmp_path):
    rounds = {"flow matching": (5, 1), "on-policy": (5, 2), "incremental, drawn": (5, 5)}  # after step 5 has begun
    step, done = rounds[kind]
    interrupted(KINDS[kind], step, True, checkpoint=tmp_path / "c")
    with pytest.MonkeyPatch.context() as patch:
        seen = []
        run = Training.restore
        patch.setattr(Training, "restore", lambda self, memory: (seen.append(memory["numbers"][0]), run(self, memory))[1])
        KINDS[kind](checkpoint=tmp_path / "c")
    assert seen == [done]


@pytest.mark.parametrize(
    "kind, says",
    [
        ("flow matching", r"^training: the loss became non-finite in epoch 2; try a smaller learning rate"),
        ("on-policy", r"^training: the loss became non-finite in cycle 4; try a smaller learning rate"),
        ("incremental, drawn", r"^settings: the loss became non-finite at iteration 7; try a smaller learning_rate"),
    ],
)
def test_that_a_loss_that_is_not_finite_is_an_error_that_says_when(kind, says, monkeypatch, tmp_path):
    whole, count = Training.step, iter(range(10**6))
    monkeypatch.setattr(Training, "step", lambda self, loss: whole(self, loss * (math.nan if next(count) == 7 else 1.0)))
    with pytest.raises(ValueError, match=says):
        KINDS[kind](checkpoint=tmp_path / "c")
    monkeypatch.undo()
    network, history = KINDS[kind](checkpoint=tmp_path / "c")  # the last whole round was kept
    assert content(network) == straight(kind)[0]


class Slope:
    """A weight that is moved by losses that are given, and scored by numbers that are given."""

    def __init__(self, scores=(), losses=None):
        self.network, self.averaged = (torch.nn.Linear(1, 1, bias=False) for _ in range(2))
        with torch.no_grad():
            self.network.weight.fill_(2.0), self.averaged.weight.fill_(2.0)
        self.averaged.requires_grad_(False)
        self.generator, self.scores, self.seen, self.began = stream(1, "nothing"), list(scores), [], []
        self.score_of = losses or (lambda weight, number: weight)

    def batches(self, number):
        self.began.append(self.network.weight.item())
        yield number
        self.seen.append(self.averaged.weight.item())

    def loss(self, number):
        return self.score_of(self.network.weight.sum(), number)

    def validate(self):
        return self.scores.pop(0)

    def row(self, training):
        return {"round": training.round, "loss": training.losses[-1], "validation": training.score, "rate": training.rate}

    def remember(self):
        return {"scores": list(self.scores)}

    def recall(self, memory):
        self.scores = list(memory["scores"])


def plan(rounds=50, average=0.9, rate=0.1, **options) -> Plan:
    return Plan(phases=(Phase(rounds=rounds, learning_rate=rate, average=average),), **options)


def test_that_early_stopping_gives_the_best_weights_back():
    training = Training(slope := Slope([5.0, 4.0, 3.0, 3.0, math.inf, 3.5, 1.0]), plan(patience=3))
    run_training(training)
    assert training.round == 6 and training.best_round == 3 and training.best_score == 3.0
    assert training.best_weights["weight"].item() == slope.seen[2] != slope.averaged.weight.item()


def test_that_without_a_finite_score_the_last_weights_are_given():
    training = Training(slope := Slope(5 * [math.nan]), plan(5))
    run_training(training)
    assert training.best_score == math.inf and torch.equal(training.best_weights["weight"], slope.averaged.weight)
    with pytest.raises(ValueError, match="^training: the loss became non-finite in step 2 of round 1"):
        run_training(Training(Slope([math.nan]), plan(5, strict=True)))


def test_that_the_start_may_be_the_best():
    training = Training(Slope([1.0, 2.0, 3.0]), plan(2, from_start=True))
    run_training(training)
    assert training.best_round == 0 and training.best_weights["weight"].item() == 2.0


def test_that_the_average_is_that_of_its_equation():
    average, trained = 2.0, Slope()
    run = Training(trained, plan(40, average=0.7, checks=frozenset()))
    for n in range(1, 41):
        run.run_round()
        decay = min(0.7, n / (n + 10))
        average = decay * average + (1 - decay) * trained.network.weight.item()
        assert trained.averaged.weight.item() == pytest.approx(average, abs=1e-6)


def test_that_the_rate_is_lowered_when_nothing_is_gained_and_follows_its_schedule():
    training = Training(Slope([5.0, 4.0, 4.0, 4.0, 4.0, 4.0]), plan(6, plateau=(0.5, 1)))
    run_training(training)
    np.testing.assert_allclose([row["rate"] for row in training.history], [0.1, 0.1, 0.1, 0.1, 0.05, 0.05])
    phases = tuple(
        Phase(rounds=3, learning_rate=1.0, average=0.5, schedule=lambda step, top=top: top / (1 + step)) for top in (0.3, 0.6)
    )
    training = Training(slope := Slope(), Plan(phases=phases, checks=frozenset()))
    run_training(training)
    assert [row["rate"] for row in training.history] == [0.3, 0.15, 0.3 / 3, 0.6, 0.3, 0.6 / 3]
    assert slope.began[3] == slope.seen[2]  # the second phase began from the averages


def test_that_a_gradient_that_is_not_finite_takes_no_step_only_if_that_is_wanted():
    def steep(weight, number):
        return (weight - weight.detach()).sqrt() if number == 1 else weight  # finite, with an infinite slope

    for lenient in (True, False):
        training = Training(slope := Slope(losses=steep), plan(2, clip=1.0, lenient=lenient, checks=frozenset()))
        run_training(training)
        assert math.isfinite(slope.network.weight.item()) == lenient


def test_that_checkpoints_that_do_not_fit_are_refused_in_one_line(tmp_path):
    assert read_training(None, "mine") == {} and read_training(tmp_path / "none", "mine") == {}
    write_checkpoint({"fingerprint": "training/1: mine", "numbers": [1]}, tmp_path / "c")
    with pytest.raises(ValueError, match="^checkpoint: .* belongs to another training; move it away"):
        read_training(tmp_path / "c", "theirs")
    with pytest.raises(ValueError, match="^checkpoint: .* does not fit this training"):
        resume_training(Training(Slope(), plan()), tmp_path / "c", read_training(tmp_path / "c", "mine"))
