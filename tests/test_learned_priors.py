"""Coupling, training, files: what the flow-matching chapter promises, on other inputs than the chapter's."""

import dataclasses
import math

import numpy as np
import ot
import pytest
import torch
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from pnpda_nb.core import standard_normal, stream, write_netcdf
from pnpda_nb.flow_matching import (
    PAPER_TRAINING,
    FlowPrior,
    GaussianPrior,
    Prior,
    TrainingSettings,
    conditional_coupling,
    denoised_from_velocity,
    train_prior,
    velocity_from_denoised,
)
from pnpda_nb.observing import Covariance
from pnpda_nb.twin import read_archive

QUICK = TrainingSettings(hidden=(16, 16), epochs=4, batch=64)


def gaussian_pairs(seed: int, samples: int, dim: int = 3):
    root = standard_normal((dim, dim), stream(seed, "root")) / dim**0.5
    matrix = standard_normal((dim, dim), stream(seed, "matrix")) / dim**0.5
    prior = GaussianPrior(matrix, standard_normal((dim,), stream(seed, "offset")), Covariance(root @ root.T + 0.2 * torch.eye(dim)))
    background = standard_normal((samples, dim), stream(seed, "background"))
    return prior, background, prior.mean(background) + prior.covariance.draw((samples,), stream(seed, "rest"))


@given(seed=st.integers(0, 1000), batch=st.integers(2, 40), beta=st.floats(0.01, 100))
def test_that_the_coupling_is_the_optimal_assignment(seed, batch, beta):
    z, a, b = (standard_normal((batch, 2), stream(seed, name)) for name in "zab")
    cost = (torch.cdist(z, a).square() + beta * torch.cdist(b, b).square()).numpy()
    coupling = conditional_coupling(z, a, b, beta)
    assert sorted(coupling.index.tolist()) == list(range(batch))
    assert np.isclose(cost[np.arange(batch), coupling.index].mean(), ot.emd2([], [], cost))  # another solver
    assert 0 <= coupling.repaired <= 1


@given(seed=st.integers(0, 1000), tau=st.floats(0, 0.99))
def test_that_velocity_and_denoiser_translate_into_each_other(seed, tau):
    x, v = standard_normal((5, 3), stream(seed, "x")), standard_normal((5, 3), stream(seed, "v"))
    assert torch.allclose(velocity_from_denoised(x, denoised_from_velocity(x, v, tau), tau), v, atol=1e-10)


@given(seed=st.integers(0, 100))
def test_that_the_gaussian_prior_samples_its_own_law(seed):
    prior, background, _ = gaussian_pairs(seed, 1)
    samples = prior(background.expand(20_000, 3)).sample(stream(seed, "samples"), steps=20)
    size = prior.covariance.matrix.diagonal().sqrt()
    assert ((samples.mean(0) - prior.mean(background)[0]).abs() / size).max() < 0.05
    assert ((torch.cov(samples.T) - prior.covariance.matrix).abs() / size.outer(size)).max() < 0.06


def test_that_a_gaussian_prior_is_recovered_from_its_pairs():
    prior, background, analysis = gaussian_pairs(4, 200_000)
    again = GaussianPrior.from_pairs(background, analysis)
    assert torch.allclose(again.matrix, prior.matrix, atol=0.01)
    assert torch.allclose(again.covariance.matrix, prior.covariance.matrix, atol=0.02)


@pytest.mark.slow  # on other pairs than chapter 07, which asserts the same
def test_that_a_prior_trained_on_gaussian_pairs_knows_their_law():
    exact, background, analysis = gaussian_pairs(7, 20_000, dim=2)
    settings = TrainingSettings(batch=512, learning_rate=4e-3, epochs=120, plateau_patience=5, patience=30)
    learned, _ = train_prior(background, analysis, settings, seed=7)
    fresh = standard_normal((2000, 2), stream(7, "fresh"))
    mean = learned(fresh).conditional_mean(stream(7, "z"), draws=20)
    assert float((mean - exact.mean(fresh)).norm() / exact.mean(fresh).norm()) < 0.03
    samples = learned(fresh[:1].expand(20_000, 2)).sample(stream(7, "samples"), steps=30)
    assert float((samples.mean(0) - exact.mean(fresh[0])).norm() / exact.mean(fresh).norm(dim=-1).mean()) < 0.05
    assert float((torch.cov(samples.T) - exact.covariance.matrix).norm() / exact.covariance.matrix.norm()) < 0.05


@pytest.mark.parametrize(
    "settings", [QUICK, dataclasses.replace(PAPER_TRAINING, epochs=4), dataclasses.replace(QUICK, standardise=True, average=0.0)]
)
def test_that_an_interrupted_training_ends_with_the_same_weights(settings, tmp_path):
    _, background, analysis = gaussian_pairs(1, 300)

    def stop(epoch, row):
        if epoch == 2:
            raise KeyboardInterrupt

    straight, history = train_prior(background, analysis, settings, seed=1)
    with pytest.raises(KeyboardInterrupt):
        train_prior(background, analysis, settings, seed=1, checkpoint=tmp_path / "c", callback=stop)
    resumed, history_of_both = train_prior(background, analysis, settings, seed=1, checkpoint=tmp_path / "c")
    assert history.equals(history_of_both)
    assert all(torch.equal(a, b) for a, b in zip(straight.network.state_dict().values(), resumed.network.state_dict().values()))
    assert list(tmp_path.iterdir()) == []


def test_that_a_foreign_checkpoint_is_refused(tmp_path):
    _, background, analysis = gaussian_pairs(1, 300)

    def stop(epoch, row):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_prior(background, analysis, QUICK, seed=1, checkpoint=tmp_path / "c", callback=stop)
    with pytest.raises(ValueError, match="belongs to a training with other settings"):
        train_prior(background, analysis, QUICK, seed=2, checkpoint=tmp_path / "c")
    (tmp_path / "c").write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match="not a readable training checkpoint"):
        train_prior(background, analysis, QUICK, seed=1, checkpoint=tmp_path / "c")


def test_that_training_does_not_touch_the_global_random_state():
    _, background, analysis = gaussian_pairs(1, 300)
    before = torch.get_rng_state()
    train_prior(background, analysis, QUICK)
    assert torch.equal(before, torch.get_rng_state())


def test_that_a_prior_survives_a_round_trip_through_its_file(tmp_path):
    _, background, analysis = gaussian_pairs(1, 300)
    prior, _ = train_prior(background, analysis, dataclasses.replace(QUICK, standardise=True))
    again = FlowPrior.load(prior.save(tmp_path / "prior.safetensors"))
    x = standard_normal((5, 3), stream(1))
    assert isinstance(again, Prior) and repr(again) == repr(prior)
    assert all(torch.equal(prior(background[:5])(x, tau).mean, again(background[:5])(x, tau).mean) for tau in (0.0, 0.5, 0.9))


def test_that_wrong_prior_files_are_one_clear_error(tmp_path, untrained_prior):
    whole = untrained_prior.save(tmp_path / "whole.safetensors").read_bytes()
    (tmp_path / "truncated").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "text").write_text("this is no prior")
    save_file({"a": torch.zeros(2)}, tmp_path / "foreign")
    save_file(
        {"a": torch.zeros(2)}, tmp_path / "header", metadata={"format": "pnpda_nb.prior/1", "architecture": "{}", "training": "{}"}
    )
    save_file({"a": torch.zeros(2)}, tmp_path / "newer", metadata={"format": "pnpda_nb.prior/2"})
    for name in ("truncated", "empty", "text", "foreign", "header", "newer"):
        with pytest.raises(ValueError, match="^prior: ") as caught:
            FlowPrior.load(tmp_path / name)
        assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(FileNotFoundError, match="^prior: no file"):
        FlowPrior.load(tmp_path / "missing")


def test_that_wrong_pairs_are_refused():
    _, background, analysis = gaussian_pairs(1, 100)
    for b, a, words in (
        (background[:50], analysis, "one shape"),
        (background[:20], analysis[:20], "at least 64 pairs"),
        (background * math.nan, analysis, "finite"),
    ):
        with pytest.raises(ValueError, match=words):
            train_prior(b, a, QUICK)
    with pytest.raises(ValueError, match="constant"):
        train_prior(torch.ones(100, 3), torch.ones(100, 3), dataclasses.replace(QUICK, standardise=True))


@pytest.mark.parametrize(
    "change",
    [
        {"batch": 0},
        {"epochs": 0},
        {"learning_rate": 0.0},
        {"beta": -1.0},
        {"hidden": ()},
        {"average": 1.0},
        {"embedding_scale": 0.0},
    ],
)
def test_that_training_settings_out_of_range_are_refused(change):
    with pytest.raises(ValueError, match=f"^{next(iter(change))}"):
        TrainingSettings(**change)


def test_that_archives_are_checked_when_read(tmp_path):
    good = xr.Dataset({name: (("sample", "variable"), np.ones((5, 3))) for name in ("background", "analysis")})
    assert read_archive(write_netcdf(good, tmp_path / "good.nc")).equals(good)
    nan = good.copy(deep=True)
    nan["background"][2, 1] = np.nan
    cases = {
        "nan.nc": nan,
        "missing.nc": good.drop_vars("background"),
        "dims.nc": good.rename(sample="time"),
        "one.nc": good.isel(sample=[0]),
    }
    for name, dataset in cases.items():
        with pytest.raises(ValueError, match=name):
            read_archive(write_netcdf(dataset, tmp_path / name))
    (tmp_path / "truncated.nc").write_bytes((tmp_path / "good.nc").read_bytes()[:1500])
    with pytest.raises(ValueError, match="not a readable NetCDF"):
        read_archive(tmp_path / "truncated.nc")
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]
