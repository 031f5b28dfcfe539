"""Whole files or none; and no file of ours that is damaged is read as if it were whole."""

import json
import os
import random

import numpy as np
import pytest
import torch
import xarray as xr

from pnpda_nb.core import read_record, standard_normal, stream, write_netcdf
from pnpda_nb.core.disk import (
    netcdf_bytes,
    netcdf_from,
    read_checkpoint,
    record_from,
    require_whole_hdf5,
    writable,
    writable_attributes,
    write_checkpoint,
    write_record,
    write_whole,
)
from pnpda_nb.flow_matching import TrainingSettings, describe_prior, train_prior
from pnpda_nb.learned import AmortisedAnalysis, AnalysisPrior, OnPolicySettings, TruthRecord, train_on_policy
from pnpda_nb.sweep import FORMATS, Store, Task, run_tasks
from pnpda_nb.twin import lorenz63, read_archive
from pnpda_nb.windows import IncrementalPrior, IncrementalSettings, RandomSets, WindowClimatology, train_incremental

PAIRS = standard_normal((200, 3), stream(1, "b")), standard_normal((200, 3), stream(1, "a"))
SETTINGS = TrainingSettings(hidden=(8, 8), epochs=3, batch=64)
ONE = torch.tensor(1.0, dtype=torch.float64)
CLIMATE = WindowClimatology.of(standard_normal((50, 4, 3), stream(2)))


class Stop(Exception):
    """What interrupts a training."""


def a_dataset(settings: dict | None = None) -> xr.Dataset:
    values = standard_normal((40, 3), stream(3)).numpy()
    return xr.Dataset(
        {n: (("sample", "variable"), values) for n in ("background", "analysis")},
        coords={"variable": ["x", "y", "z"]},
        attrs={"title": "a test"},
    )


def a_record(settings: dict | None = None) -> dict:
    return {"setting": {"inflation": 1.25}, "tried": [{"mean": 0.5, "failed": 0}, {"mean": float("nan"), "failed": 3}]}


def a_prior(settings: dict | None = None):
    return train_prior(*PAIRS, SETTINGS)[0]


def an_analysis_prior(settings: dict | None = None):
    return AnalysisPrior.make(0 * ONE, ONE, ONE, dim=3, width=4)


def an_incremental_prior(settings: dict | None = None):
    return IncrementalPrior.make(CLIMATE, width=4)


PARTS = {
    "dataset": a_dataset,
    "record": a_record,
    "prior": a_prior,
    "analysis_prior": an_analysis_prior,
    "incremental_prior": an_incremental_prior,
}


def flow_training(path, stops=False):
    def stop(epoch, row):
        if stops and epoch == 2:
            raise Stop

    return train_prior(*PAIRS, SETTINGS, checkpoint=path, callback=stop)


def incremental_training(path, stops=False):
    seen = []

    def windows(count, generator):
        seen.append(count)
        if stops and len(seen) > 1:
            raise Stop
        return standard_normal((count, 4, 3), generator)

    settings = IncrementalSettings(iterations=40, processes=2, windows=2)
    return train_incremental(an_incremental_prior(), windows, RandomSets(4, 3, 2), settings, checkpoint=path)


NATURE = lorenz63(cycles=5)


def on_policy_training(path, stops=False):
    import pnpda_nb.core.training as loop

    settings = OnPolicySettings(trajectories=2, cycles=4, steps=1, batch=4, memory=3)
    record, count = TruthRecord(NATURE, runs=2, cycles=8, seed=1), []

    def validate(prior):
        count.append(1)
        if stops and len(count) > 3:
            raise Stop
        return 1.0

    with pytest.MonkeyPatch.context() as patch:
        if stops:
            patch.setattr(loop.time, "monotonic", iter(range(0, 10**6, 100)).__next__)
        return train_on_policy(
            an_analysis_prior(), record, policy=AmortisedAnalysis, settings=settings, validate=validate, checkpoint=path
        )


TRAININGS = {"flow matching": flow_training, "incremental": incremental_training, "on-policy": on_policy_training}


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    """For every kind of file that is written and read back: its content, its name, and what reads it from a path."""
    folder, found = tmp_path_factory.mktemp("kinds"), {}
    store = Store(folder / "store")
    for kind, make in PARTS.items():
        task = Task(kind, make, {}, format=kind)
        run_tasks([task], store)
        reader = FORMATS[kind][2]
        found[f"part: {kind}"] = (
            store.path(task).read_bytes(),
            "x",
            lambda path, reader=reader: reader(path.read_bytes(), f"part: {path}"),
        )
        if "prior" in kind:
            found[f"described: {kind}"] = store.path(task).read_bytes(), "x", describe_prior
    found["manifest"] = (write_record(a_record(), folder / "m.json"), (folder / "m.json").read_bytes())[1], "m.json", read_record
    found["archive of ours"] = write_netcdf(a_dataset(), folder / "a.nc").read_bytes(), "a.nc", read_archive
    for kind, train in TRAININGS.items():
        with pytest.raises(Stop):
            train(folder / kind, stops=True)
        found[f"checkpoint: {kind}"] = (folder / kind).read_bytes(), "c", train
    return found


def damaged(content: bytes, count: int, cuts: int):
    """`count` copies with one bit changed each, and `cuts` that end too early."""
    luck = random.Random(0)
    for _ in range(count):
        place, bit = luck.randrange(len(content)), luck.randrange(8)
        yield f"bit {bit} of byte {place}", content[:place] + bytes([content[place] ^ (1 << bit)]) + content[place + 1 :]
    for _ in range(cuts):
        end = luck.randrange(len(content))
        yield f"the first {end} bytes", content[:end]


def accepted(kinds, tmp_path, count, cuts):
    """What was damaged and read all the same."""
    found = []
    for kind, (content, name, read) in kinds.items():
        for what, changed in damaged(content, count, cuts):
            (tmp_path / name).write_bytes(changed)
            try:
                read(tmp_path / name)
            except ValueError as error:
                assert "\n" not in str(error) and name in str(error)
            else:
                found.append(f"{kind}: {what}")
    return found


def test_that_what_is_whole_is_read_and_nothing_that_is_damaged(kinds, tmp_path):
    for content, name, read in kinds.values():
        (tmp_path / name).write_bytes(content)
        read(tmp_path / name)
    assert accepted(kinds, tmp_path, 40, 15) == []


@pytest.mark.slow
def test_that_not_one_of_a_thousand_flips_and_two_hundred_truncations_of_each_kind_is_accepted(kinds, tmp_path):
    assert accepted(kinds, tmp_path, 1000, 200) == []


@pytest.mark.parametrize("kind", PARTS)
def test_that_a_sweep_makes_a_damaged_part_again_and_keeps_the_damaged_one_aside(kind, tmp_path):
    store, task = Store(tmp_path), Task(kind, PARTS[kind], {}, format=kind)
    run_tasks([task], store)
    path, content = store.path(task), store.path(task).read_bytes()
    path.write_bytes(content[:-5] + bytes([content[-5] ^ 2]) + content[-4:])
    assert store.read(task) is None and path.with_name(f"{path.name}.damaged").exists()
    run_tasks([task], store)
    assert path.read_bytes() == content  # to the byte


def test_that_a_file_is_as_it_was_if_one_of_several_cannot_be_written(tmp_path):
    (tmp_path / "a").write_text("old")
    with pytest.raises(OSError, match="cannot write .*nowhere"):
        write_whole({tmp_path / "a": "new", tmp_path / "nowhere" / "else" / "b": "new"})
    assert (tmp_path / "a").read_text() == "old" and os.listdir(tmp_path) == ["a"]


def test_that_a_disk_that_is_full_is_one_error_and_the_old_file_stays(tmp_path, forked):
    (tmp_path / "out").write_text("old")
    code = f"""
import numpy as np, torch, xarray as xr
resource.setrlimit(resource.RLIMIT_FSIZE, (8000, 8000))
from pathlib import Path
from pnpda_nb.core.disk import write_checkpoint, write_netcdf, write_record
from pnpda_nb.learned import AnalysisPrior
one, path = torch.tensor(1.0, dtype=torch.float64), Path({str(tmp_path / "out")!r})
dataset, prior = xr.Dataset({{"x": ("y", np.random.rand(5000))}}), AnalysisPrior.make(one, one, one, dim=3, width=64)
writers = write_netcdf, lambda x, path: x.save(path), write_checkpoint, write_record
for write, content in zip(writers, (dataset, prior, {{"x": torch.ones(5000)}}, {{"x": list(range(5000))}})):
    try:
        write(content, path)
    except OSError as error:
        print(error)
"""
    done = forked("--version", before=code)
    said = f"[Errno 27] path: cannot write {tmp_path / 'out'} (File too large)"
    assert done.returncode == 0 and done.stdout.splitlines()[:-1] == 4 * [said], done
    assert (tmp_path / "out").read_text() == "old" and os.listdir(tmp_path) == ["out"]


def test_that_a_netcdf_file_of_ours_is_like_any_other_to_others(tmp_path):
    path = write_netcdf(a_dataset(), tmp_path / "a.nc")
    assert xr.load_dataset(path, engine="h5netcdf").identical(a_dataset())
    import h5py

    with h5py.File(path, "a") as file:  # somebody changes it: the seal goes, and the file is like any other
        file["background"][0, 0] = 1.0
        file.attrs["changed"] = "by hand"
    require_whole_hdf5(path, "archive")
    assert float(read_archive(path).background[0, 0]) == 1.0
    with pytest.raises(ValueError, match="no seal at its end"):
        netcdf_from(path.read_bytes(), "part: a.nc")


def test_that_the_same_dataset_makes_the_same_bytes():
    assert netcdf_bytes(a_dataset()) == netcdf_bytes(a_dataset())


def test_that_a_record_is_json_to_others_and_holds_what_it_was_given(tmp_path):
    write_record(a_record(), tmp_path / "r.json")
    plain = json.loads((tmp_path / "r.json").read_text())
    assert plain.pop("seal") and plain["setting"] == {"inflation": 1.25}
    assert read_record(tmp_path / "r.json")["tried"][0] == {"mean": 0.5, "failed": 0}
    with pytest.raises(ValueError, match="^record: expected plain values"):
        write_record({"x": object()}, tmp_path / "r.json")
    for content in (b"", b"[]", b"{}", b"\xff", b"[" * 10**5):
        with pytest.raises(ValueError, match="^record: r.json has no seal"):
            record_from(content, "record: r.json")
    with pytest.raises(FileNotFoundError, match="cannot read .*nothing"):
        read_record(tmp_path / "nothing")


def test_that_attributes_are_written_in_a_form_that_netcdf_can_hold(tmp_path):
    odd = {
        "yes": True,
        "none": None,
        "map": {"a": 1},
        "mixed": [1, "a"],
        "words": ["a", "b"],
        "long": 2**80,
        "half": "\ud800x",
        "bytes": b"K",
        "empty": [],
        "array": np.arange(3),
        "flags": np.array([True]),
    }
    dataset = xr.Dataset({"t": ("x", [1.0], odd)}, attrs=odd, coords={"x": ("x", [0.0], odd)})
    again = xr.load_dataset(write_netcdf(dataset, tmp_path / "t.nc"))
    assert again.t.attrs["yes"] == 1 and again.t.attrs["map"] == '{"a": 1}' and list(again.attrs["words"]) == ["a", "b"]
    assert again.x.attrs["none"] == "null" and set(writable_attributes(odd)) == set(again.attrs)
    assert dataset.t.attrs["yes"] is True  # what was given is as it was


def test_that_a_checkpoint_of_something_else_is_one_line(tmp_path):
    write_checkpoint({"fingerprint": "other"}, tmp_path / "c")
    for train in TRAININGS.values():
        with pytest.raises(ValueError, match="^checkpoint: .* belongs to"):
            train(tmp_path / "c")
        with pytest.raises(ValueError, match="^checkpoint: expected a file, got the folder"):
            train(tmp_path)
    write_checkpoint.__wrapped__([1], tmp_path / "c")  # past the check of what it is given
    with pytest.raises(ValueError, match="^checkpoint: .* not a training checkpoint, but list"):
        read_checkpoint(tmp_path / "c")


def test_that_a_folder_that_cannot_be_written_to_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    for wrong in (tmp_path / "file" / "x", tmp_path / ("x" * 300), "a\0b"):
        with pytest.raises(ValueError, match="^out: cannot write to"):
            writable(wrong)
