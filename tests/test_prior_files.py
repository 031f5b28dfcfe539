"""Prior files that say what they are, and training on archives larger than memory."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from altered import altered
from safetensors import safe_open
from safetensors.torch import save_file

from pnpda_nb import __version__
from pnpda_nb.core import standard_normal, stream
from pnpda_nb.flow_matching import FlowPrior, PairSource, TensorPairs, TrainingSettings, describe_prior, train_from, train_prior
from pnpda_nb.flow_matching.store import PRIOR_KINDS, prior_bytes, read_prior_bytes
from pnpda_nb.learned import AnalysisPrior
from pnpda_nb.windows import IncrementalPrior, WindowClimatology

QUICK = TrainingSettings(hidden=(16, 16), epochs=4, batch=64)
AROUND = dataclasses.replace(QUICK, source="background", target="increment")
STORED = sorted((Path(__file__).parent.parent / "nbs" / "results").glob("*/prior*.safetensors"))
LAYOUT = {
    "variables": [{"name": "temperature", "units": "K", "dims": ["level"]}, {"name": "wind", "units": "m s-1", "dims": []}],
    "coordinates": {"level": [1000.0, 0.1]},
    "none": None,
}


def pairs(samples: int = 2000, dim: int = 3, size: float = 0.3):
    background = 3 + standard_normal((samples, dim), stream(1, "background"))
    return background, 0.9 * background + size * standard_normal((samples, dim), stream(1, "analysis"))


def source(samples: int = 2000, block: int = 50, layout=None, **other) -> TensorPairs:
    return TensorPairs(*pairs(samples, **other), "pairs of this test", block, layout)


def same(one: FlowPrior, other: FlowPrior) -> bool:
    weights = zip(one.network.state_dict().values(), other.network.state_dict().values())
    units = zip((one.location, one.scale, one.factor, one.units), (other.location, other.scale, other.factor, other.units))
    return all(torch.equal(a, b) for a, b in weights) and all(a is b is None or torch.equal(a, b) for a, b in units)


def one_of(kind: str):
    """A small untrained prior of this kind."""
    if kind == "FlowPrior":
        prior, _ = train_prior(*pairs(200), dataclasses.replace(QUICK, epochs=1))
        return prior
    if kind == "AnalysisPrior":
        one = torch.tensor(1.0, dtype=torch.float64)
        return AnalysisPrior.make(0 * one, one, one, dim=3, width=4)
    return IncrementalPrior.make(WindowClimatology.of(standard_normal((50, 4, 3), stream(2))), width=4)


CLASSES = {"FlowPrior": FlowPrior, "AnalysisPrior": AnalysisPrior, "IncrementalPrior": IncrementalPrior}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("priors")
    return {kind: one_of(kind).save(folder / f"{kind}.safetensors") for kind in CLASSES}


# --- files


@pytest.mark.parametrize("settings", [QUICK, AROUND], ids=["white", "around"])
def test_that_layout_and_attachments_come_back_exactly(settings, tmp_path):
    prior, _ = train_prior(*pairs(200), dataclasses.replace(settings, epochs=1))
    attached = {"residual": torch.eye(3, dtype=torch.float64) / 3, "a.b": prior.location}  # and a tensor with two names
    full = FlowPrior(
        prior.network, prior.location, prior.scale, prior.architecture, prior.training,
        factor=prior.factor, units=prior.units, layout=LAYOUT, attached=attached,
    )  # fmt: skip
    again = FlowPrior.load(full.save(tmp_path / "prior"))
    assert again.layout == LAYOUT and again.training == prior.training
    assert list(again.attached) == sorted(attached) and all(torch.equal(again.attached[k], v) for k, v in attached.items())
    assert same(again, prior) and repr(again) == repr(full)
    assert "temperature, wind" in repr(again) and "temperature" not in repr(prior)
    assert [p.name for p in tmp_path.iterdir()] == ["prior"]


def test_that_early_readers_can_read_a_file_with_layout_and_attachments(tmp_path):
    prior = one_of("FlowPrior")
    full = FlowPrior(prior.network, prior.location, prior.scale, prior.architecture, layout=LAYOUT, attached={"x": prior.scale})
    with safe_open(full.save(tmp_path / "prior"), "pt") as file:
        metadata, names = file.metadata(), set(file.keys())
    assert metadata["format"] == "pnpda_nb.prior/1" and metadata["written_by"] == f"pnpda_nb {__version__}"
    assert {"location", "scale"} <= names and {n.split(".")[0] for n in names} == {"location", "scale", "network", "attached"}
    assert json.loads(metadata["architecture"]) == prior.architecture


@pytest.mark.parametrize(
    "wrong",
    [
        {"layout": {"a": torch.ones(2)}},
        {"layout": {"a": float("nan")}},
        {"attached": {"x": torch.ones(2)}},
        {"attached": {"x": torch.full((2,), torch.nan, dtype=torch.float64)}},
        {"attached": {"x": [1.0]}},
    ],
)
def test_that_what_no_file_can_hold_is_refused_at_once(wrong):
    prior = one_of("FlowPrior")
    with pytest.raises(ValueError, match=f"^{next(iter(wrong))}: expected"):
        FlowPrior(prior.network, prior.location, prior.scale, prior.architecture, **wrong)


@pytest.mark.parametrize("kind", CLASSES)
def test_that_a_prior_of_another_kind_is_named_with_the_class_that_reads_it(kind, files):
    for other, path in files.items():
        if other != kind:
            with pytest.raises(ValueError, match=rf"^prior: .* another kind, which {other}\.load reads") as error:
                CLASSES[kind].load(path)
            assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", CLASSES)
def test_that_a_file_of_a_newer_library_says_so(kind, files, tmp_path):
    newer = altered(
        files[kind], tmp_path / "new", format=f"{PRIOR_KINDS[kind]}9", written_by="pnpda_nb 7.1", architecture="unknown"
    )
    with pytest.raises(
        ValueError, match=rf"^prior: .* version 9, written by pnpda_nb 7\.1; this is pnpda_nb {__version__}, which reads"
    ):
        CLASSES[kind].load(newer)


@pytest.mark.parametrize("kind", CLASSES)
def test_that_broken_files_are_one_clear_line(kind, files, tmp_path):
    whole, load = files[kind].read_bytes(), CLASSES[kind].load

    def nan(tensors):
        tensors[next(k for k in tensors if k.startswith("network") and k.endswith("weight"))].fill_(torch.nan)

    def lost(tensors):
        del tensors[next(k for k in tensors if k.startswith("network") and k.endswith("weight"))]

    cases = {
        "cut": "not a readable",
        "head": "not a readable",
        "empty": "not a readable",
        "text": "not a readable",
        "foreign": "expected format",
    }
    (tmp_path / "cut").write_bytes(whole[:-100])
    (tmp_path / "head").write_bytes(whole[:20])
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "text").write_text("no prior")
    save_file({"x": torch.ones(2)}, tmp_path / "foreign", metadata={"format": "pt"})
    for name, change in {"nan": nan, "lost": lost}.items():
        altered(files[kind], tmp_path / name, change)
    altered(files[kind], tmp_path / "no header", architecture=None)
    altered(files[kind], tmp_path / "no json", training="{")
    altered(files[kind], tmp_path / "version", format=f"{PRIOR_KINDS[kind]}x")
    cases |= {"nan": "not finite", "version": "expected format"} | dict.fromkeys(("lost", "no header", "no json"), "does not fit")
    for name, message in cases.items():
        with pytest.raises(ValueError, match=f"^prior: .*{message}") as error:
            load(tmp_path / name)
        assert "\n" not in str(error.value)
    for call in (load, describe_prior):
        with pytest.raises(FileNotFoundError, match="^prior: no file"):
            call(tmp_path / "nothing")


def test_that_units_of_another_size_than_the_network_are_refused(files, tmp_path):
    def longer(tensors):
        tensors["location"] = tensors["scale"] = torch.ones(4, dtype=torch.float64)

    with pytest.raises(ValueError, match="does not fit"):
        FlowPrior.load(altered(files["FlowPrior"], tmp_path / "x", lambda t: (longer(t), t.update(scale=t["scale"].clone()))))


def test_that_a_file_is_written_whole_or_not_at_all(tmp_path):
    prior, path = one_of("FlowPrior"), tmp_path / "prior"
    before = prior.save(path).read_bytes()
    prior.training = {"b": object()}
    with pytest.raises(ValueError, match="^training: expected plain values"):
        prior.save(path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
    content = prior_bytes("FlowPrior", 1, {"x": torch.ones(2)}, {"a": 1})
    version, tensors, header = read_prior_bytes(content, "x", "FlowPrior", 1)
    assert version == 1 and header["a"] == 1 and torch.equal(tensors["x"], torch.ones(2))


@pytest.mark.parametrize("path", STORED, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_that_every_stored_prior_loads_and_describes_itself(path):
    about = describe_prior(path)
    prior = CLASSES[about["kind"]].load(path)
    assert about["dim"] == prior.dim and about["training"] == prior.training and about["bytes"] == path.stat().st_size
    assert about["parameters"] == sum(p.numel() for p in prior.network.parameters())
    assert about["variables"] is None
    assert re.fullmatch(r"an early pnpda_nb|pnpda_nb \d+\.\d+\.\d+", about["written_by"])  # the early ones were sealed later


def test_that_there_are_stored_priors_of_two_kinds():
    assert {describe_prior(path)["kind"] for path in STORED} == {"FlowPrior", "AnalysisPrior"}


@pytest.mark.parametrize("kind", CLASSES)
def test_that_a_description_needs_no_weights(kind, files, tmp_path, monkeypatch):
    prior, about = CLASSES[kind].load(files[kind]), describe_prior(files[kind])
    networks = prior.networks if kind == "IncrementalPrior" else prior.network
    assert (about["kind"], about["dim"], about["format"]) == (kind, 3, f"{PRIOR_KINDS[kind]}1")
    assert about["parameters"] == sum(p.numel() for p in networks.parameters())
    nan = altered(files[kind], tmp_path / "nan", lambda tensors: [t.fill_(torch.nan) for t in tensors.values()])
    assert describe_prior(nan)["parameters"] == about["parameters"]  # nobody looked
    damaged = bytearray(files[kind].read_bytes())
    damaged[-1] ^= 64
    (tmp_path / "damaged").write_bytes(damaged)
    with pytest.raises(ValueError, match="^prior: .*damaged is damaged"):
        describe_prior(tmp_path / "damaged")
    for name, message in {"cut": "not a readable", "foreign": "expected format"}.items():
        (tmp_path / "cut").write_bytes(files[kind].read_bytes()[:50])
        save_file({"x": torch.ones(2)}, tmp_path / "foreign")
        with pytest.raises(ValueError, match=f"^prior: .*{message}"):
            describe_prior(tmp_path / name)


@pytest.mark.parametrize(
    "variables, expected",
    [
        (LAYOUT["variables"], {"temperature": "K", "wind": "m s-1"}),
        ({"u": {"units": "m/s"}, "v": {}}, {"u": "m/s", "v": None}),
        (["u"], {"u": None}),
    ],
)
def test_that_a_description_names_variables_with_their_units(variables, expected, tmp_path):
    prior = one_of("FlowPrior")
    prior.layout = {"variables": variables}
    assert describe_prior(prior.save(tmp_path / "prior"))["variables"] == expected


# --- pairs that are read


@pytest.mark.parametrize(
    "settings", [QUICK, dataclasses.replace(AROUND, source="covariance"), dataclasses.replace(QUICK, beta=1.0, coupling_batch=128)]
)
def test_that_pairs_that_fit_into_memory_are_trained_on_as_tensors(settings):
    straight, history = train_prior(*pairs(), settings, seed=2)
    streamed, same_history = train_from(source(block=333, layout=LAYOUT), settings, seed=2)
    assert same(straight, streamed) and history.equals(same_history)
    assert streamed.layout == LAYOUT and streamed.training == straight.training


SMALL = 16_000  # bytes, of which all 2000 pairs of 3 variables would need 96 000
LARGER = [
    QUICK,
    dataclasses.replace(AROUND, standardise=False),
    dataclasses.replace(AROUND, source="covariance", coupling_batch=128, repaired_target=0.3),
]


@pytest.mark.parametrize("settings", LARGER, ids=["white", "raw", "covariance"])
def test_that_an_interrupted_training_on_part_of_the_pairs_ends_with_the_same_weights(settings, tmp_path):
    def stop(epoch, row):
        if epoch == 2:
            raise KeyboardInterrupt

    class Counting(TensorPairs):
        seen = 0

        def read(self, first, last):
            Counting.seen += last - first
            return super().read(first, last)

    counting = Counting(*pairs(), "pairs of this test", 50)
    straight, history = train_from(source(), settings, seed=2, memory=SMALL)
    with pytest.raises(KeyboardInterrupt):
        train_from(source(), settings, seed=2, memory=SMALL, checkpoint=tmp_path / "c", callback=stop)
    for wrong in ({"seed": 3, "memory": SMALL}, {"seed": 2, "memory": SMALL + 1000}):
        with pytest.raises(ValueError, match="belongs to a training with other"):
            train_from(source(), settings, checkpoint=tmp_path / "c", **wrong)
    resumed, history_of_both = train_from(counting, settings, seed=2, memory=SMALL, checkpoint=tmp_path / "c")
    assert history.equals(history_of_both) and same(straight, resumed) and resumed.training == straight.training
    assert Counting.seen < 2000  # statistics were in the checkpoint
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("settings", LARGER, ids=["white", "raw", "covariance"])
def test_that_units_do_not_depend_on_how_many_pairs_are_held(settings):
    whole, _ = train_from(source(), dataclasses.replace(settings, epochs=1))
    part, _ = train_from(source(), dataclasses.replace(settings, epochs=1), memory=SMALL)
    assert part.training["pairs"] == 2000 and part.training["pairs_per_epoch"] < 600
    for name in ("location", "scale", "factor", "units"):
        one, other = getattr(whole, name), getattr(part, name)
        assert one is other is None or torch.allclose(one, other, rtol=1e-12, atol=1e-15)


def test_that_units_are_right_where_sums_of_squares_would_cancel():
    background, analysis = (1e8 + x for x in pairs())
    part, _ = train_from(TensorPairs(background, analysis, "far away", 50), dataclasses.replace(AROUND, epochs=1), memory=SMALL)
    assert torch.allclose(part.scale, torch.cat((background, analysis)).std(0), rtol=1e-9)
    assert torch.allclose(part.units, (analysis - background).std(0), rtol=1e-7)


def test_that_all_pairs_have_their_turn_and_none_of_validation_is_trained_on():
    class Watched(TensorPairs):
        def read(self, first, last):
            log.append((first, last))
            return super().read(first, last)

    log, ends = [], []
    settings = dataclasses.replace(QUICK, epochs=20)
    train_from(Watched(*pairs(), "watched", 50), settings, memory=SMALL, callback=lambda *_: ends.append(len(log)))
    rows = {n for span in log for n in range(*span)}
    assert rows == set(range(2000))
    sweep = next(i for i, (_, last) in enumerate(log) if last == 2000) + 1  # the pass over all of them
    per_epoch = ends[1] - ends[0]
    held_out = {n for span in log[sweep : ends[0] - per_epoch] for n in range(*span)}
    trained = [n for span in log[ends[0] - per_epoch :] for n in range(*span)]
    assert 30 <= len(held_out) <= 200 and not held_out & set(trained)
    assert held_out | set(trained) == set(range(2000))  # without holes
    counts = torch.bincount(torch.tensor(trained), minlength=2000)[[n for n in range(2000) if n not in held_out]]
    assert counts.max() - counts.min() <= 1  # and fairly


def test_that_a_part_of_the_pairs_teaches_as_much_as_all_of_them():
    settings = dataclasses.replace(AROUND, epochs=6, batch=128, learning_rate=8e-3, average=0.95)
    whole, _ = train_from(source(8000), settings)
    # an epoch is a quarter of the pairs: four times as many
    part, _ = train_from(source(8000), dataclasses.replace(settings, epochs=24), memory=80_000)
    background, analysis = pairs(9000)
    errors = [
        float((p(background).conditional_mean(stream(3), 8) - 0.9 * background).square().mean().sqrt()) for p in (whole, part)
    ]
    assert errors[1] < max(1.5 * errors[0], 0.05)


def test_that_what_a_source_gives_is_checked():
    class Wrong(TensorPairs):
        def read(self, first, last):
            return wrong(*super().read(first, last))

    assert isinstance(source(), PairSource) and not isinstance(object(), PairSource)
    for memory in (SMALL, 10**6):
        with pytest.raises(ValueError, match="^source: expected a count, dim and block"):
            train_from(source(block=0), QUICK, memory=memory)
        with pytest.raises(ValueError, match="^layout: expected plain values"):
            train_from(source(layout={"x": torch.ones(1)}), QUICK, memory=memory)
    for wrong, words in (
        (lambda b, a: (b.float(), a), "float64"),
        (lambda b, a: (b[:1], a[:1]), "shape"),
        (lambda b, a: (b, a / 0), "finite"),
    ):
        for memory in (SMALL, 10**6):
            with pytest.raises(ValueError, match=f"^source: expected .*{words}"):
                train_from(Wrong(*pairs(), "wrong", 50), QUICK, memory=memory)


@pytest.mark.parametrize("dim", [1, 3, 40, 400, 401, 5000])
def test_that_settings_for_a_size_of_the_state_grow_with_it(dim):
    settings = TrainingSettings.for_dim(dim, batch=32)
    width = settings.hidden[0]
    assert settings.hidden == (width,) * 3 and settings.batch == 32
    assert 64 <= width <= 1024 and width >= min(4 * dim, 1024) and (width == 64 or width < 8 * dim)
    assert settings.linear_skip == (dim <= 400) and TrainingSettings.for_dim(dim, linear_skip=False).linear_skip is False
    with pytest.raises(ValueError, match="^dim: expected"):
        TrainingSettings.for_dim(0)


def test_that_settings_that_need_more_memory_are_refused():
    with pytest.raises(ValueError, match="^memory: expected at least .* batches of 64, got 2000"):
        train_from(source(), QUICK, memory=2000)
    with pytest.raises(ValueError, match="^source: 'covariance' of 40 variables"):
        train_from(source(dim=40), dataclasses.replace(QUICK, source="covariance"), memory=100_000)
    with pytest.raises(ValueError, match="^analysis: expected at least 64 pairs"):
        train_from(source(60), QUICK, memory=1000)
    with pytest.raises(ValueError, match="^analysis: a variable is constant"):
        train_from(TensorPairs(torch.full((2000, 3), 0.1), torch.full((2000, 3), 0.1), "constant", 50), QUICK, memory=SMALL)


MEASURED = """
import resource, sys, torch
from pnpda_nb.flow_matching import TrainingSettings, train_from
from pnpda_nb.core import stream

class Made:
    dim, block, identity, layout = 100, 1000, "made", None
    def __init__(self, count): self.count = count
    def read(self, first, last):
        b = torch.arange(first, last)[:, None] % torch.arange(7, 107) / 10.0
        return b.double(), 0.9 * b.double()

def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
settings = TrainingSettings(hidden=(32,), epochs=2, batch=1000, validation_draws=1, linear_skip=False)
train_from(Made(1500), settings)  # what libraries need when they are first used
before = peak()
train_from(Made(int(sys.argv[1])), settings, memory=int(sys.argv[3]))  # not all at once
first = peak()
train_from(Made(int(sys.argv[2])), settings, memory=int(sys.argv[3]))
print(first - before, peak() - first)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peaks are counted in other units elsewhere")
@pytest.mark.slow
def test_that_memory_does_not_grow_with_the_number_of_pairs():
    memory = 16_000_000
    run = subprocess.run(
        [sys.executable, "-c", MEASURED, "20000", "80000", str(memory)], capture_output=True, text=True, check=True
    )  # 32 and 128 MB
    needed, more = map(int, run.stdout.split())
    assert needed < 4 * memory and more < memory
