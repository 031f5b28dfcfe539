"""Sources that fit and couplings that act: what the flow-matching chapter promises of them, on other inputs than the chapter's."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from pnpda_nb.core import standard_normal, stream
from pnpda_nb.flow_matching import PAPER_TRAINING, FlowPrior, GaussianPrior, TrainingSettings, train_prior
from pnpda_nb.observing import Covariance

QUICK = TrainingSettings(hidden=(16, 16), epochs=4, batch=64)
SOURCES = [
    ("white", "increment"),
    ("background", "state"),
    ("background", "increment"),
    ("covariance", "state"),
    ("covariance", "increment"),
]
STORED = sorted(
    p
    for p in (Path(__file__).parent.parent / "nbs" / "results").glob("*/prior*.safetensors")
    if not p.parent.name.startswith(("beyond_", "sqg"))
)


def pairs_nearby(seed: int, samples: int, size: float = 0.1):
    """Linear-Gaussian pairs whose increments are correlated and small beside the states."""
    matrix = torch.eye(2) - size * torch.tensor([[0.5, 0.2], [-0.3, 0.4]])
    rest = Covariance(size**2 * torch.tensor([[1.0, 0.6], [0.6, 0.8]], dtype=torch.float64))
    exact = GaussianPrior(matrix.double(), torch.tensor([size, 0.0], dtype=torch.float64), rest)
    background = standard_normal((samples, 2), stream(seed, "background"))
    return exact, background, exact.mean(background) + rest.draw((samples,), stream(seed, "rest"))


def same(one: FlowPrior, other: FlowPrior) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.network.state_dict().values(), other.network.state_dict().values()))


@pytest.mark.parametrize("source, target", SOURCES)
@pytest.mark.parametrize("standardise", [True, False])
def test_that_a_prior_with_a_source_survives_a_round_trip_through_its_file(source, target, standardise, tmp_path):
    _, background, analysis = pairs_nearby(1, 300)
    prior, _ = train_prior(background, analysis, dataclasses.replace(QUICK, source=source, target=target, standardise=standardise))
    again = FlowPrior.load(prior.save(tmp_path / "prior.safetensors"))
    b = background[:5]
    assert torch.equal(prior.source((5, 2), stream(1)), again.source((5, 2), stream(1)))
    assert torch.equal(prior(b).sample(stream(1), 3), again(b).sample(stream(1), 3))
    assert torch.equal(prior(b).conditional_mean(stream(1)), again(b).conditional_mean(stream(1)))
    assert torch.equal(again(b).centre, b) and repr(again) == repr(prior)
    assert TrainingSettings(**prior.training["settings"] | {"hidden": (16, 16)}) == dataclasses.replace(
        QUICK, source=source, target=target, standardise=standardise
    )


@pytest.mark.parametrize("source, target", SOURCES)
def test_that_the_source_has_the_covariance_it_is_said_to_have(source, target):
    _, background, analysis = pairs_nearby(1, 500)
    scale = 1.0 if source == "white" else 0.5
    prior, _ = train_prior(
        background, analysis, dataclasses.replace(QUICK, epochs=1, source=source, target=target, source_scale=scale)
    )
    wanted = scale**2 * torch.cov((analysis - background).T)
    if source != "covariance":
        wanted = wanted.diagonal().diag()
    draws = prior.source((200_000, 2), stream(2))
    assert torch.allclose(torch.cov(draws.T), wanted, atol=0.01 * float(wanted.max()))
    assert draws.mean(0).abs().max() < 0.01 * float(wanted.max()) ** 0.5
    start = prior(background).start(stream(3))
    assert torch.equal(start, background + prior.source(tuple(background.shape), stream(3)))


@pytest.mark.parametrize("source, target", [pair for pair in SOURCES if pair[1] == "increment"])
def test_that_samples_are_the_background_if_analyses_are(source, target):
    background = 10 * standard_normal((2000, 2), stream(1, "b"))
    analysis = background + 1e-6 * standard_normal((2000, 2), stream(1, "a"))
    prior, _ = train_prior(background, analysis, dataclasses.replace(QUICK, source=source, target=target))
    assert (prior(background).sample(stream(2), 3) - background).abs().max() < 1e-5
    assert (prior(background).conditional_mean(stream(2)) - background).abs().max() < 1e-5


@pytest.mark.parametrize("source", ["background", "covariance"])
def test_that_the_law_of_gaussian_increments_is_learned(source):
    exact, background, analysis = pairs_nearby(7, 8000)
    settings = TrainingSettings(
        hidden=(32, 32),
        batch=500,
        learning_rate=6e-3,
        epochs=40,
        average=0.99,
        plateau_patience=4,
        source=source,
        target="increment",
    )
    learned, _ = train_prior(background, analysis, settings, seed=7)
    fresh = standard_normal((2000, 2), stream(7, "fresh"))
    mean, wanted = learned(fresh).conditional_mean(stream(7, "z"), draws=20), exact.mean(fresh)
    assert float((mean - wanted).norm() / (wanted - fresh).norm()) < 0.1  # of the increment, not of the state
    samples = learned(fresh[:1].expand(20_000, 2)).sample(stream(7, "samples"), steps=20)
    assert float((torch.cov(samples.T) - exact.covariance.matrix).norm() / exact.covariance.matrix.norm()) < 0.1


def test_that_white_noise_in_units_of_increments_is_the_source_at_the_background():
    _, background, analysis = pairs_nearby(1, 300)
    white, around = (
        train_prior(background, analysis, dataclasses.replace(QUICK, source=s, target="increment"))[0]
        for s in ("white", "background")
    )
    assert same(white, around) and torch.equal(white.factor, around.factor)


def test_that_a_flow_in_increments_moves_along_with_the_background():
    _, background, analysis = pairs_nearby(1, 300)
    prior, _ = train_prior(
        background, analysis, dataclasses.replace(QUICK, source="background", target="increment", standardise=False)
    )
    b, c = background[:5], torch.tensor([3.0, -1.0], dtype=torch.float64)
    shifted = FlowPrior(prior.network, prior.location + c, prior.scale, prior.architecture, factor=prior.factor, units=prior.units)
    # the network sees the same background and the same increments: states move along with the background
    assert torch.allclose(shifted(b + c).sample(stream(1), 4), prior(b).sample(stream(1), 4) + c, atol=1e-5)


@pytest.mark.parametrize("change", [{}, {"coupling_batch": 256}, {"beta": 1000.0}])
def test_that_beta_is_found_that_lets_the_wanted_share_change_partners(change):
    _, background, analysis = pairs_nearby(1, 1200)
    settings = dataclasses.replace(QUICK, epochs=15, source="background", target="increment", repaired_target=0.3, **change)
    _, history = train_prior(background, analysis, settings)
    assert abs(history.repaired.tail(6).mean() - 0.3) < 0.04
    assert history.path_gain.tail(6).mean() > 0.05
    assert np.log(history.beta.tail(6)).std() < 1.0


def test_that_more_backgrounds_at_once_let_more_analyses_change_partners():
    _, background, analysis = pairs_nearby(1, 1200)
    repaired = [
        train_prior(background, analysis, dataclasses.replace(QUICK, epochs=2, beta=100.0, coupling_batch=n))[1].repaired.mean()
        for n in (64, 512)
    ]
    assert repaired[1] > 1.5 * repaired[0] > 0


def test_that_an_interrupted_search_for_beta_ends_with_the_same_weights(tmp_path):
    _, background, analysis = pairs_nearby(1, 400)
    settings = dataclasses.replace(QUICK, source="covariance", target="increment", coupling_batch=128, repaired_target=0.4)

    def stop(epoch, row):
        if epoch == 2:
            raise KeyboardInterrupt

    straight, history = train_prior(background, analysis, settings)
    with pytest.raises(KeyboardInterrupt):
        train_prior(background, analysis, settings, checkpoint=tmp_path / "c", callback=stop)
    resumed, history_of_both = train_prior(background, analysis, settings, checkpoint=tmp_path / "c")
    assert history.equals(history_of_both) and history.beta.nunique() == 4 and same(straight, resumed)


def test_that_a_coupling_batch_of_one_batch_changes_nothing():
    _, background, analysis = pairs_nearby(1, 300)
    one, two = (train_prior(background, analysis, dataclasses.replace(QUICK, beta=1.0, coupling_batch=n))[0] for n in (0, 64))
    assert same(one, two)


@pytest.mark.parametrize("path", STORED, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_that_prior_files_of_earlier_versions_load(path):
    prior = FlowPrior.load(path)
    b = standard_normal((4, prior.dim), stream(1))
    assert prior.factor is None and prior(b).centre is None
    assert torch.equal(prior(b).start(stream(2)), prior.source((4, prior.dim), stream(2)))
    assert torch.isfinite(prior(b).sample(stream(3), 2)).all()


def test_that_there_are_prior_files_of_earlier_versions():
    assert STORED


def test_that_settings_which_change_nothing_leave_no_trace(tmp_path):
    """Records, and with them checkpoints and files, are those of versions that did not know the settings."""
    known = {f.name for f in dataclasses.fields(TrainingSettings)} - {
        "source",
        "source_scale",
        "target",
        "coupling_batch",
        "repaired_target",
    }
    assert set(PAPER_TRAINING.record()) == known
    assert set(TrainingSettings(source="background").record()) == known | {"source"}
    _, background, analysis = pairs_nearby(1, 300)
    prior, _ = train_prior(background, analysis, QUICK)
    with safe_open(prior.save(tmp_path / "prior.safetensors"), "pt") as file:
        assert file.metadata()["format"] == "pnpda_nb.prior/1" and not {"factor", "units"} & set(file.keys())


@pytest.mark.parametrize(
    "change",
    [
        {"source": "pink"},
        {"target": "truth"},
        {"source_scale": 2.0},
        {"source_scale": 0.0, "source": "background"},
        {"coupling_batch": 100},
        {"coupling_batch": -256},
        {"repaired_target": 1.0},
    ],
)
def test_that_sources_and_couplings_out_of_range_are_refused(change):
    with pytest.raises(ValueError, match=f"^{next(iter(change))}: expected"):
        TrainingSettings(**change)


def test_that_increments_without_a_covariance_are_refused():
    _, background, _ = pairs_nearby(1, 300)
    once = background + torch.tensor([1.0, 0.0], dtype=torch.float64)
    with pytest.raises(ValueError, match="^analysis: "):
        train_prior(background, once, dataclasses.replace(QUICK, source="background"))
    whole = background.round()  # whole numbers, so that the increments are exactly of rank one
    along = whole + standard_normal((300, 1), stream(3)).round() * torch.ones(2, dtype=torch.float64)
    with pytest.raises(ValueError, match="full rank"):
        train_prior(whole, along, dataclasses.replace(QUICK, source="covariance"))
    with pytest.raises(ValueError, match="^units: "):
        FlowPrior(
            train_prior(background, background + 0.1 * background, QUICK)[0].network,
            torch.zeros(2),
            torch.ones(2),
            {},
            units=torch.ones(2),
        )
