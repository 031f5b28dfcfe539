"""Damaged and odd files, by chance: each is read as what it is, or refused in one line that names it, and takes no memory."""

import csv
import io
import itertools
import json
import resource
import shutil
import warnings

import numpy as np
import pytest
import xarray as xr

from pnpda_nb.files import Layout, open_archive, read_observations, read_states

LAYOUT_OF = {"t": ("lat", "lon"), "u": ("lon",)}
ODD_NUMBERS = [0, -1, 1, 2, 7, 10**6, 10**9, 10**12, 2**63, -(2**31), 0.5, 1e300, float("nan"), True]
ODD = [None, "", "x", "K", "nan", "\ud800", "a\nb", [], [1], {}, {"a": 1}, *ODD_NUMBERS, "9" * 400, "<f8", "|O", "int8", ["K", "m"]]


def world(times: int = 60) -> xr.Dataset:
    random = np.random.default_rng(5)
    t, u = 280 + random.standard_normal((times, 3, 4)), random.standard_normal((times, 4))
    data = {"t_background": (("time", "lat", "lon"), t, {"units": "K"}), "u_background": (("time", "lon"), u, {"units": "m s-1"})}
    data |= {
        "t_analysis": (("time", "lat", "lon"), t + 0.1, {"units": "K"}),
        "u_analysis": (("time", "lon"), u + 0.1, {"units": "m s-1"}),
    }
    lat, lon = ("lat", [60.0, 50.0, 40.0], {"units": "degrees_north"}), ("lon", [350.0, 355, 0, 5], {"units": "degrees_east"})
    time = np.datetime64("2020-01-01", "ns") + np.arange(times) * np.timedelta64(6, "h")
    return xr.Dataset(data, coords={"time": time, "lat": lat, "lon": lon})


STATIONS = {
    "value": ("station", [281.0, 279.0, 0.5]),
    "error": ("station", [0.1, 0.2, 0.1]),
    "variable": ("station", ["t", "t", "u"]),
    "units": ("station", ["K", "K", "m s-1"]),
    "lat": ("station", [50.0, 45.0, 40.0]),
    "lon": ("station", [-5.0, 357.5, 5.0]),
    "time": ((), np.datetime64("2020-01-01", "ns")),
}
TABLE = "value,error,variable,units,lat,lon,time\n281,0.1,t,K,50,-5,2020-01-01T00:00Z\n0.5,0.1,u,m s-1,,5,2020-01-01T02:00+02:00\n"


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """One good file of each kind, and what each is read with."""
    folder, data = tmp_path_factory.mktemp("originals"), world()
    today = data[["t_background", "u_background"]].isel(time=[0])
    packed = {"zlib": True, "fletcher32": True}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data.to_netcdf(folder / "archive.nc", engine="h5netcdf")
        data.to_netcdf(
            folder / "packed.nc",
            engine="h5netcdf",
            encoding={n: packed | {"chunksizes": (20, *data[n].shape[1:])} for n in data.data_vars},
        )
        data.to_netcdf(folder / "classic.nc", engine="scipy")
        data.to_zarr(
            folder / "two.zarr",
            zarr_format=2,
            encoding={n: {"chunks": (20, *data[n].shape[1:])} for n in data.data_vars},
            consolidated=True,
        )
        data.to_zarr(
            folder / "three.zarr",
            zarr_format=3,
            encoding={n: {"chunks": (20, *data[n].shape[1:])} for n in data.data_vars},
            consolidated=False,
        )
        today.to_netcdf(folder / "today.nc", engine="h5netcdf")
        today.to_zarr(folder / "today.zarr", zarr_format=3, consolidated=False)
        xr.Dataset(STATIONS).to_netcdf(folder / "stations.nc", engine="h5netcdf")
        xr.Dataset(STATIONS).to_netcdf(folder / "characters.nc", engine="scipy")
        xr.Dataset(STATIONS).to_zarr(folder / "stations.zarr", zarr_format=3, consolidated=False)
        (folder / "stations.csv").write_text(TABLE)
    with open_archive(folder / "archive.nc") as archive:
        layout = archive.state.with_held(archive.held())
        truth = [x.numpy() for x in archive.read(0, 60)]
    return folder, layout, truth, read_states(folder / "today.nc", layout)


ARCHIVES = ("archive.nc", "packed.nc", "classic.nc", "two.zarr", "three.zarr")
OTHERS = ("today.nc", "today.zarr", "stations.nc", "characters.nc", "stations.zarr", "stations.csv")


def read(path, kind: str, layout: Layout, states) -> list[np.ndarray]:
    """All that is taken from a file, as arrays of numbers."""
    if kind in ARCHIVES:
        with open_archive(path) as archive:
            return [x.numpy() for x in archive.read(0, archive.count)]
    if kind.startswith("today"):
        found = read_states(path, layout)
        return [found.values.numpy(), *(v.values for v in found.dataset(found.values).data_vars.values())]
    seen = read_observations(path, states)
    return [seen.values[~np.isnan(seen.values)], seen.errors, seen.weights]


def damage(path, random: np.random.Generator) -> str:
    """Change a file, or one of the files of a store, in one of many ways; what was done."""
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    file = files[random.integers(len(files))]
    content = file.read_bytes()
    texts = (".zarray", ".zattrs", ".zgroup", ".zmetadata", "zarr.json")
    how = random.choice(
        ["flip", "flips", "cut", "zeros", "double", "gone", "swap", "odd"]
        if path.is_dir()
        else ["flip", "flips", "cut", "zeros", "double", "insert", "odd"]
    )
    changed = bytearray(content)
    if how == "gone":
        file.unlink()
        return f"{file.name} gone"
    if how == "swap":
        other = files[random.integers(len(files))]
        changed = bytearray(other.read_bytes())
    elif how == "odd" and file.name in texts:
        return f"{file.name}: {odd_text(file, random)}"
    elif how == "odd" and file.suffix == ".csv":
        return f"{file.name}: {odd_table(file, random)}"
    elif not content:
        return "nothing"
    elif how in ("flip", "odd"):
        at = int(random.integers(len(content)))
        changed[at] ^= 1 << int(random.integers(8))
    elif how == "flips":
        for at in random.integers(len(content), size=20):
            changed[at] = int(random.integers(256))
    elif how == "cut":
        changed = changed[: random.integers(len(content))]
    elif how == "zeros":
        at = int(random.integers(len(content)))
        changed[at : at + 100] = bytes(len(changed[at : at + 100]))
    elif how == "double":
        changed += content
    elif how == "insert":
        at = int(random.integers(len(content)))
        changed[at:at] = bytes(random.integers(256, size=10).astype(np.uint8))
    file.write_bytes(changed)
    return f"{file.name}: {how}"


def odd_text(file, random) -> str:
    """Put something odd somewhere into a description of a Zarr store."""
    said = json.loads(file.read_text())
    at = said
    while True:
        keys = list(at) if isinstance(at, dict) else list(range(len(at)))
        if not keys:
            break
        key = keys[random.integers(len(keys))]
        if isinstance(at[key], dict | list) and at[key] and random.random() < 0.7:
            at = at[key]
            continue
        at[key] = ODD[random.integers(len(ODD))]
        file.write_text(json.dumps(said))
        return f"{key} = {at[key]!r}"
    return "nothing"


def odd_table(file, random) -> str:
    rows = list(csv.reader(io.StringIO(file.read_text())))
    row, column = random.integers(len(rows)), random.integers(len(rows[0]))
    rows[row][column] = str(ODD[random.integers(len(ODD))]).replace("\ud800", "?")
    with open(file, "w", newline="") as out:
        csv.writer(out).writerows(rows)
    return f"{row}, {column} = {rows[row][column]!r}"


def attempt(originals, folder, kind: str, seed: int) -> str:
    """Damage one file and read it; whether it was "refused", "the same", or read as something "else"."""
    whole, layout, truth, states = originals
    random = np.random.default_rng([seed, *kind.encode()])
    path = folder / f"{seed}_{kind}"
    (shutil.copytree if (whole / kind).is_dir() else shutil.copy)(whole / kind, path)
    done = damage(path, random)
    try:
        found = read(path, kind, layout, states)
    except (ValueError, FileNotFoundError) as error:
        message = str(error)
        assert "\n" not in message and path.name in message and len(message) < 1000, (done, message)
        return "refused"
    finally:
        (shutil.rmtree if path.is_dir() else path.unlink)(path) if path.is_dir() else path.unlink(missing_ok=True)
    assert all(np.isfinite(x[~np.isnan(x)]).all() for x in found), done
    if kind in ARCHIVES:
        assert all(np.isfinite(x).all() for x in found), done
        return "the same" if all(x.shape == y.shape and np.array_equal(x, y) for x, y in zip(found, truth)) else "else"
    return "read"


def trial(originals, folder, kinds, count: int) -> dict[tuple[str, str], int]:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcomes: dict[tuple[str, str], int] = {}
    for seed, kind in itertools.product(range(count), kinds):
        outcome = attempt(originals, folder, kind, seed)
        outcomes[kind, outcome] = outcomes.get((kind, outcome), 0) + 1
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown < 250, f"{grown:.0f} MB"
    return outcomes


def test_that_damaged_archives_are_read_right_or_refused_in_one_line(originals, tmp_path):
    outcomes = trial(originals, tmp_path, ARCHIVES, 20)
    # what carries a check of its numbers never gives others; the rest of these formats cannot tell
    assert outcomes.get(("packed.nc", "refused"), 0) > 5 and all(outcomes.get((kind, "refused"), 0) for kind in ARCHIVES)


def test_that_damaged_backgrounds_and_observations_are_read_or_refused_in_one_line(originals, tmp_path):
    outcomes = trial(originals, tmp_path, OTHERS, 20)
    assert all(outcomes.get((kind, "refused"), 0) for kind in OTHERS)


@pytest.mark.slow
@pytest.mark.parametrize("kinds", [ARCHIVES, OTHERS])
def test_that_thousands_of_damaged_files_are_read_or_refused_in_one_line(originals, tmp_path, kinds):
    assert sum(trial(originals, tmp_path, kinds, 1000).values()) == 1000 * len(kinds)
