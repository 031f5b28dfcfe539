"""Observations as their users have them: several times in one file, some times only, errors that change, grids in another order."""

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr

from pnpda_nb.files import Layout, read_observations, read_states
from pnpda_nb.operations import AwarePrior

TIMES = pd.date_range("2026-01-01", periods=120, freq="6h")


@pytest.fixture(scope="module")
def files(tmp_path_factory, forked):
    """A prior from an archive of temperatures on a small sphere, from north to south and from 0 to 360, and three mornings."""
    folder, draws = tmp_path_factory.mktemp("observations"), np.random.default_rng(0)
    b = 280 + draws.standard_normal((120, 3, 6))
    b[:, 1, 4] = np.nan  # land
    a = b + draws.standard_normal((120, 3, 1)) + 0.3 * draws.standard_normal((120, 3, 6))
    axes = {
        "lat": ("lat", [50.0, 0.0, -50.0], {"units": "degrees_north"}),
        "lon": ("lon", 60.0 * np.arange(6), {"units": "degrees_east"}),
    }
    data = {f"t_{role}": (("time", "lat", "lon"), x, {"units": "K"}) for role, x in (("background", b), ("analysis", a))}
    world = xr.Dataset(data, axes | {"time": TIMES})
    world.to_netcdf(folder / "pairs.nc")
    world[["t_background"]].isel(time=slice(117, 120)).to_netcdf(folder / "today.nc")
    answer = forked("train", "pairs.nc", "--out", "prior.safetensors", "--epochs", 1, folder=folder)
    assert answer.returncode == 0, answer.stderr
    return folder


@pytest.fixture(scope="module")
def states(files):
    layout = Layout.of({"t": xr.load_dataset(files / "pairs.nc").t_background}, ("time",))
    layout = Layout(layout.fields, layout.axes, np.array([10]))
    return read_states(files / "today.nc", layout)


def analysed(files, forked, name, *words, background="today.nc", status=0):
    given = ["assimilate", "--prior", "prior.safetensors", "--background", background, "--out", f"{name}.nc"]
    answer = forked(*given, *words, folder=files)
    assert answer.returncode == status, answer.stderr
    return answer if status else (xr.load_dataset(files / f"{name}.nc"), answer.stdout)


ROWS = """station,value,error,units,lat,lon,time
a,281,0.2,K,50,60,{0}
b,279,0.3,K,-50,120,{0}
a,280.5,0.2,K,50,60,{2}
b,280,0.6,K,-50,120,{2}
a,280.7,0.4,K,50,60,{2}
"""


def rows(text: str = ROWS) -> str:
    return text.format(*(f"{t:%Y-%m-%dT%H:%MZ}" for t in TIMES[117:]))


def test_that_rows_of_a_table_go_to_their_times_and_places(files, states, tmp_path):
    (tmp_path / "o.csv").write_text(rows())
    seen = read_observations(tmp_path / "o.csv", states)
    nan = np.nan
    assert np.array_equal(seen.values, [[281, 279, nan], [nan] * 3, [280.5, 280, 280.7]], equal_nan=True)
    assert seen.labels == ("a", "b", "a") and seen.points[:, 0].tolist() == [1, 13, 1]
    assert (
        seen.errors.shape == (3, 3) and seen.errors[[0, 2], 1].tolist() == [0.3, 0.6] and seen.errors[2].tolist() == [0.2, 0.6, 0.4]
    )
    R = seen.observations().covariance.variances
    assert torch.allclose(R[2].sqrt(), torch.tensor([0.2, 0.6, 0.4]).double()) and seen.observations(slice(0, 1)).operator.size == 2
    pd.read_csv(tmp_path / "o.csv").sample(frac=1, random_state=1).to_csv(tmp_path / "mixed.csv", index=False)
    mixed = read_observations(tmp_path / "mixed.csv", states)
    assert np.array_equal(np.sort(np.nan_to_num(mixed.values)), np.sort(np.nan_to_num(seen.values)))


def test_that_some_times_in_any_order_of_a_netcdf_file_are_those_of_the_table(files, states, tmp_path):
    (tmp_path / "o.csv").write_text(rows("\n".join(ROWS.splitlines()[:-1]) + "\n"))
    table = read_observations(tmp_path / "o.csv", states)
    dims = ("time", "station")
    data = {"value": (dims, [[280.5, 280.0], [281.0, 279.0]], {"units": "K"}), "error": (dims, [[0.2, 0.6], [0.2, 0.3]])}
    where = {"lat": ("station", [50.0, -50.0]), "lon": ("station", [60.0, 120.0]), "time": TIMES[[119, 117]]}
    xr.Dataset(data, where).to_netcdf(tmp_path / "o.nc")
    other = read_observations(tmp_path / "o.nc", states)
    assert np.array_equal(table.values, other.values, equal_nan=True) and np.array_equal(table.errors[[0, 2]], other.errors[[0, 2]])
    one = xr.Dataset(data, where).isel(time=1)  # of one time, which is said once
    one.to_netcdf(tmp_path / "one.nc")
    single = read_observations(tmp_path / "one.nc", states)
    assert np.array_equal(single.values[0], table.values[0]) and np.isnan(single.values[1:]).all() and single.errors.shape == (2,)
    grid = xr.load_dataset(files / "today.nc").rename(t_background="t").isel(time=[2, 0])
    grid = grid.where(grid.lon < 100).assign(t_error=("time", [0.5, 0.25]))
    grid.t.attrs["units"] = "K"
    grid.to_netcdf(tmp_path / "grid.nc")
    fields = read_observations(tmp_path / "grid.nc", states)
    assert (
        np.isnan(fields.values[1]).all() and np.array_equal(fields.errors[[0, 2], 0], [0.25, 0.5]) and fields.values.shape == (3, 6)
    )


@pytest.mark.parametrize(
    "old, new, said",
    [
        ("{2}", "2031-01-01", "expected the background's time (3 from"),
        ("a,280.5,0.2,K,50,60,{2}", "a,280.5,0.2,K,50,60,2031-01-01", "got 2031-01-01 in row 3"),
        ("b,280,0.6", "b,280,", "expected positive standard deviations of errors, got nan for station 1"),
        ("b,280,0.6", "b,many,0.6", "expected numbers in column 'value', got 'many' in row 4"),
        (",time", ",when", "with the dimension time of the background"),
    ],
)
def test_that_a_table_of_other_times_is_one_line(files, forked, old, new, said):
    (files / "wrong.csv").write_text(rows(ROWS.replace(old, new)))
    before = sorted(p.name for p in files.iterdir())
    answer = analysed(files, forked, "wrong", "--observations", "wrong.csv", status=2)
    assert said in answer.stderr and answer.stderr.count("\n") == 1 and before == sorted(p.name for p in files.iterdir())


def test_that_states_of_which_nothing_was_seen_are_named_and_the_others_are_as_without_them(files, forked):
    (files / "o.csv").write_text(rows())
    whole, said = analysed(files, forked, "whole", "--observations", "o.csv", "--members", 2)
    assert "Nothing was seen of 1 of 3 states (time 2026-01-30T12:00:00)" in said
    assert "Nothing was seen of 1 of 3 states" in (files / "whole.html").read_text()
    xr.load_dataset(files / "today.nc").isel(time=[2]).to_netcdf(files / "last.nc")
    (files / "last.csv").write_text("\n".join(line for line in rows().splitlines() if f"{TIMES[117]:%dT%H}" not in line))
    alone, said = analysed(files, forked, "alone", "--observations", "last.csv", background="last.nc")
    assert "Nothing was seen" not in said
    for name in ("t_analysis", "t_analysis_std"):
        assert np.allclose(whole[name][2], alone[name][0], rtol=1e-5, equal_nan=True)
    prior = AwarePrior.load(files / "prior.safetensors")
    open_ = (prior.linear.variance.sqrt() * prior.attached["calibration"]).numpy()
    spread = whole.t_analysis_std.values[1].ravel()
    assert (
        np.allclose(spread[np.isfinite(spread)], open_, rtol=0.2) and (whole.t_analysis_std[1] > whole.t_analysis_std[0]).sum() > 10
    )


def test_that_an_error_that_grows_with_time_is_believed_less(files, forked):
    (files / "e.csv").write_text(rows("value,error,units,lat,lon,time\n285,0.1,K,0,0,{0}\n285,0.1,K,0,0,{1}\n285,9,K,0,0,{2}\n"))
    found, _ = analysed(files, forked, "e", "--observations", "e.csv")
    spread = found.t_analysis_std.sel(lat=0, lon=0).values
    assert spread[0] == pytest.approx(spread[1], rel=0.05) and spread[2] > 3 * spread[0]


def test_that_the_same_grid_in_another_order_gives_the_same_analysis_in_that_order(files, forked):
    (files / "o.csv").write_text(rows())
    usual, _ = analysed(files, forked, "usual", "--observations", "o.csv")
    today = xr.load_dataset(files / "today.nc")
    turned = today.isel(lat=slice(None, None, -1)).roll(lon=3, roll_coords=True)
    turned = turned.assign_coords(lon=((turned.lon + 180) % 360 - 180).assign_attrs(units="degrees_east"))
    turned.to_netcdf(files / "turned.nc")
    other, _ = analysed(files, forked, "other", "--observations", "o.csv", background="turned.nc")
    assert other.lat.values.tolist() == [-50, 0, 50] and other.lon.values.tolist() == [-180, -120, -60, 0, 60, 120]
    back = other.assign_coords(lon=other.lon % 360).sortby("lon").sortby("lat", ascending=False)
    for name in usual.data_vars:
        assert np.array_equal(back[name].values, usual[name].values, equal_nan=True)
    turned.rename(t_background="t").where(turned.lat > 0).assign(t_error=(turned.lat / 500).drop_attrs()).to_netcdf(
        files / "turned_o.nc"
    )
    today.rename(t_background="t").where(today.lat > 0).assign(t_error=(today.lat / 500).drop_attrs()).to_netcdf(
        files / "today_o.nc"
    )
    one, _ = analysed(files, forked, "one", "--observations", "today_o.nc")
    two, _ = analysed(files, forked, "two", "--observations", "turned_o.nc")
    assert one.t_analysis.equals(two.t_analysis)


@pytest.mark.parametrize(
    "change, observations, said",
    [
        (lambda x: x.assign_coords(lon=x.lon + 30.0), "o.csv", "expected coordinates lon"),
        (lambda x: x.assign_coords(lat=x.lat[::-1] * 1.1), "o.csv", "expected coordinates lat"),
        (lambda x: x.isel(lat=[2, 1, 1]), "o.csv", "expected coordinates lat"),
        (lambda x: x.isel(lat=[2, 1, 0]), "i.csv", "by coordinates, as the background has lat in another order"),
    ],
)
def test_that_a_grid_that_is_another_one_is_one_line(files, forked, change, observations, said):
    (files / "o.csv").write_text(rows())
    (files / "i.csv").write_text(rows("value,error,units,lat_index,lon,time\n281,1,K,0,60,{0}\n"))
    change(xr.load_dataset(files / "today.nc")).to_netcdf(files / "another.nc")
    answer = analysed(files, forked, "none", "--observations", observations, background="another.nc", status=2)
    assert said in answer.stderr and answer.stderr.count("\n") == 1
