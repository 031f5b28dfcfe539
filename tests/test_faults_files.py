"""Files as other people write them: other orders, units, clocks, circles and spellings; and files that are broken, hostile, or
claim too much.
"""

import itertools
import json
import os
import pickle
import zlib

import cftime
import h5py
import numcodecs
import numpy as np
import pytest
import torch
import xarray as xr
import zarr
from hypothesis import given
from hypothesis import strategies as st

from pnpda_nb.core import write_netcdf
from pnpda_nb.files import Axis, Field, Layout, open_archive, open_dataset, read_observations, read_states
from pnpda_nb.files.layout import layout_from_record, layout_record
from pnpda_nb.files.places import along_axis
from pnpda_nb.files.states import writable_attributes
from pnpda_nb.files.units import conversion
from pnpda_nb.files.zarr_store import CODECS
from pnpda_nb.operations import set_aside

START = np.datetime64("2020-01-01", "ns")


def pairs(times: int = 60, seed: int = 0) -> xr.Dataset:
    """Backgrounds of a small field, and analyses that are 0.1 more."""
    values = np.random.default_rng(seed).standard_normal((times, 3, 4))
    dims = ("time", "lat", "lon")
    return xr.Dataset(
        {"t_background": (dims, values, {"units": "K"}), "t_analysis": (dims, values + 0.1, {"units": "K"})},
        coords={"time": START + np.arange(times) * np.timedelta64(6, "h"), "lat": [60.0, 50.0, 40.0], "lon": np.arange(4.0)},
    )


def day(axis=(0.0, 1.0, 2.0, 3.0), units="", value=280.0, time=0, **attributes) -> xr.Dataset:
    """A background along one axis."""
    lon = ("lon", list(axis), {"units": units} if units else {})
    return xr.Dataset(
        {"t": (("time", "lon"), np.full((1, len(axis)), value), {"units": "K"} | attributes)}, coords={"time": [time], "lon": lon}
    )


def states_of(data: xr.Dataset, folder, layout: Layout | None = None):
    data.to_netcdf(folder / "b.nc")
    return read_states(folder / "b.nc", layout or Layout.of(data.data_vars, ("time",)))


def seen(text: str, states, folder, **options):
    (folder / "o.csv").write_text(text)
    return read_observations(folder / "o.csv", states, **options)


def one_line(caught, *words) -> None:
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message


# ---------------------------------------------------------------- orders


@pytest.mark.parametrize("orders", list(itertools.permutations(["time", "lat", "lon"]))[1:])
def test_that_every_array_of_an_archive_is_read_in_the_order_of_the_layout(tmp_path, orders):
    data = pairs()
    data.to_netcdf(tmp_path / "same.nc")
    data.assign(t_analysis=data.t_analysis.transpose(*orders)).to_netcdf(tmp_path / "mixed.nc")
    data.isel(time=slice(30)).to_netcdf(tmp_path / "p_1.nc")
    data.isel(time=slice(30, 60)).transpose(*orders).to_netcdf(tmp_path / "p_2.nc")
    with open_archive(tmp_path / "same.nc") as same:
        for name in ("mixed.nc", "p_*.nc"):
            with open_archive(tmp_path / name) as other:
                assert all(torch.equal(x, y) for x, y in zip(same.read(0, 60), other.read(0, 60)))


def test_that_dimensions_that_count_states_may_come_in_any_order_in_every_file(tmp_path):
    data = pairs(20).expand_dims(member=3, case=2).copy(deep=True)
    data["t_background"] = data.t_background + xr.DataArray([[0.0, 1, 2], [3, 4, 5]], dims=("case", "member"))
    data["t_analysis"] = (data.t_background + 0.1).assign_attrs(units="K")
    data.t_background.attrs["units"] = "K"
    data.transpose("time", "case", "member", ...).to_netcdf(tmp_path / "same.nc")
    for part, order in enumerate([("time", "case", "member"), ("member", "case", "time")]):
        half = data.isel(time=slice(10 * part, 10 * part + 10)).transpose(*order, "lat", "lon")
        half.assign(t_analysis=half.t_analysis.transpose("lon", "member", "lat", "case", "time")).to_netcdf(
            tmp_path / f"p_{part}.nc"
        )
    with open_archive(tmp_path / "same.nc") as same, open_archive(tmp_path / "p_*.nc") as other:
        assert same.count == other.count == 120
        for first, last in ((0, 120), (7, 61), (59, 64)):
            assert all(torch.equal(x, y) for x, y in zip(same.read(first, last), other.read(first, last)))


def test_that_states_and_gridded_observations_are_read_in_the_order_of_the_layout(tmp_path):
    data = pairs(2)
    layout = Layout.of({"t": data.t_background}, ("time",))
    field = data[["t_background"]].rename(t_background="t")
    straight = states_of(field, tmp_path, layout)
    turned = states_of(field.transpose("lon", "time", "lat"), tmp_path, layout)
    assert torch.equal(straight.values, turned.values)
    grid = field.assign(t_error=(("lon", "lat"), 1 + np.arange(12.0).reshape(4, 3)))
    for order in (("time", "lat", "lon"), ("lon", "lat", "time")):
        grid.transpose(*order).to_netcdf(tmp_path / "o.nc")
        sightings = read_observations(tmp_path / "o.nc", straight)
        assert np.array_equal(sightings.values, straight.values[:, 0]) and np.array_equal(
            sightings.errors, (1 + np.arange(12.0).reshape(4, 3)).T.ravel()
        )


# ---------------------------------------------------------------- times


@pytest.mark.parametrize("column", ["time", "valid_time"])
@pytest.mark.parametrize(
    "text, right",
    [
        ("2020-01-30T18:00", True),
        ("2020-01-30 18:00:00", True),
        ("2020-01-30T18:00Z", True),
        ("2020-01-30T23:00+05:00", True),
        ("2020-01-30T12:30:00.000-0530", True),
        ("20200130T1800", True),
        ("2020-01-30T18:00+05:00", False),
        ("2020-01-30T18:01", False),
        ("2020-01-30", False),
    ],
)
def test_that_times_with_an_offset_are_converted_to_utc_and_those_without_are_utc(tmp_path, column, text, right):
    states = states_of(day(time=np.datetime64("2020-01-30T18:00", "ns")), tmp_path)
    table = f"value,error,units,lon,{column}\n281,0.5,K,1,{text}\n"
    if right:
        assert seen(table, states, tmp_path).values == 281
    else:
        with pytest.raises(ValueError, match="expected the background's time") as caught:
            seen(table, states, tmp_path)
        one_line(caught, "2020-01-30T18:00")


@pytest.mark.parametrize("text", ["30/01/2020 18:00", "yesterday", "2020-02-30", "2020-01-30T25:00", ""])
def test_that_what_is_no_time_is_refused_as_one(tmp_path, text):
    states = states_of(day(time=np.datetime64("2020-01-30T18:00", "ns")), tmp_path)
    with pytest.raises(ValueError, match="expected a time such as") as caught:
        seen(f"value,error,units,lon,time\n281,0.5,K,1,{text}\n", states, tmp_path)
    one_line(caught, "o.csv")


def test_that_two_spellings_of_one_instant_are_one_time_and_another_instant_is_refused(tmp_path):
    states = states_of(day(time=np.datetime64("2020-01-30T18:00", "ns")), tmp_path)
    rows = "value,error,units,lon,time\n281,0.5,K,1,2020-01-30T18:00Z\n281,0.5,K,2,{}\n"
    assert seen(rows.format("2020-01-30T20:00+02:00"), states, tmp_path).values.shape == (1, 2)
    with pytest.raises(ValueError, match="expected the background's time .2020-01-30T18:00:00., got 2020-01-30T20:00:00 in row 2"):
        seen(rows.format("2020-01-30T20:00"), states, tmp_path, strict=True)


@pytest.mark.parametrize(
    "calendar, date", [("noleap", (2021, 3, 1)), ("360_day", (2021, 2, 30)), ("julian", (2021, 3, 1)), ("standard", (2021, 3, 1))]
)
def test_that_times_of_any_calendar_are_compared_in_it(tmp_path, calendar, date):
    states = states_of(day(time=cftime.datetime(*date, 6, calendar=calendar)), tmp_path)
    text = "{}-{:02}-{:02}".format(*date)
    table = "value,error,units,lon,time\n281,0.5,K,1,{}\n"
    assert seen(table.format(f"{text}T08:00+02:00"), states, tmp_path).values == 281
    with pytest.raises(ValueError, match="expected the background's time"):
        seen(table.format(f"{text}T08:00"), states, tmp_path)
    stations = xr.Dataset(
        {"value": ("station", [281.0]), "error": 0.5, "lon": ("station", [1.0])},
        coords={"time": np.datetime64("2021-03-01T06", "ns")},
    )
    stations.value.attrs["units"] = "K"
    stations.to_netcdf(tmp_path / "o.nc")
    if calendar == "standard":
        assert read_observations(tmp_path / "o.nc", states).values == 281
    else:
        with pytest.raises(ValueError, match=f"of the calendar {calendar}.*of the calendar standard"):
            read_observations(tmp_path / "o.nc", states)


def test_that_archives_and_backgrounds_of_other_calendars_are_read_and_written(tmp_path):
    data = pairs(60).assign_coords(time=xr.date_range("2001-02-27", periods=60, freq="6h", calendar="noleap", use_cftime=True))
    data.to_netcdf(tmp_path / "a.nc")
    with open_archive(tmp_path / "a.nc") as archive:
        data[["t_background"]].isel(time=[3]).to_netcdf(tmp_path / "b.nc")
        states = read_states(tmp_path / "b.nc", archive.state)
    with xr.open_dataset(
        write_netcdf(states.dataset(states.values), tmp_path / "out.nc"), decode_times=xr.coders.CFDatetimeCoder(use_cftime=True)
    ) as out:
        assert out.time.values[0] == data.time.values[3] and out.time.values[0].calendar == "noleap"


def test_that_pairs_are_in_the_order_of_their_times_whatever_the_files_are_called(tmp_path):
    data = pairs(120)
    for name, first in (("jan", 0), ("feb", 40), ("mar", 80)):
        data.isel(time=slice(first, first + 40)).to_netcdf(tmp_path / f"m_{name}.nc")
    with open_archive(tmp_path / "m_*.nc") as archive:
        assert [piece.path.name for piece in archive.pieces] == ["m_jan.nc", "m_feb.nc", "m_mar.nc"]
        assert np.array_equal(archive.read(0, 120)[0], data.t_background.values.reshape(120, -1))
        train, _, test = set_aside(archive)
        known = {x.tobytes() for x in train.read()[0].numpy()}
        assert not any(x.tobytes() in known for x in test.read()[0].numpy())


@pytest.mark.parametrize("calendar", ["standard", "noleap", "numbers", "sample"])
@pytest.mark.parametrize(
    "first, second",
    [
        (range(60), range(50, 70)),
        (range(60), range(59, 70)),
        (range(60), range(60)),
        (range(60), range(20, 30)),
        ([0, 2, 4], [1, 3, 5]),
    ],
)
def test_that_files_that_overlap_are_refused_with_their_times(tmp_path, calendar, first, second):
    data = pairs(70)
    if calendar == "noleap":
        data = data.assign_coords(time=xr.date_range("2001-02-27", periods=70, freq="6h", calendar="noleap", use_cftime=True))
    elif calendar == "numbers":
        data = data.assign_coords(time=np.arange(70))
    elif calendar == "sample":
        data = data.rename(time="sample").rename_vars(sample="time").reset_index("time")
    dim = "sample" if calendar == "sample" else "time"
    for name, some in (("p_1", first), ("p_2", second)):
        data.isel({dim: list(some)}).to_netcdf(tmp_path / f"{name}.nc")
    with pytest.raises(ValueError, match="files of different times") as caught:
        open_archive(tmp_path / "p_*.nc")
    one_line(caught, "p_1.nc", "p_2.nc", str(data.time.values[list(second)[-1]])[:10])


@pytest.mark.parametrize("order", [[0, 1, 1, 2], [0, 2, 1, 3], [3, 2, 1, 0]])
def test_that_times_that_do_not_increase_in_a_file_are_refused(tmp_path, order):
    pairs(4).isel(time=order).to_netcdf(tmp_path / "a.nc")
    with pytest.raises(ValueError, match="expected times that increase, got 2020-01-01.* after 2020-01-01") as caught:
        open_archive(tmp_path / "a.nc")
    one_line(caught, "a.nc")


def test_that_a_dimension_with_times_comes_before_others_and_members_stay_together(tmp_path):
    data = pairs(10).expand_dims(case=2, member=3)
    data.transpose("case", "member", "time", ...).to_netcdf(tmp_path / "a.nc")
    with open_archive(tmp_path / "a.nc") as archive:
        assert torch.equal(
            archive.read(0, 60)[0], torch.from_numpy(pairs(10).t_background.values.reshape(10, -1)).repeat_interleave(6, 0)
        )


def test_that_files_without_times_keep_the_natural_order_of_their_names(tmp_path):
    data = pairs(30).drop_vars("time").rename(time="sample")
    for part in (2, 10, 1):
        first = {1: 0, 2: 10, 10: 20}[part]
        data.isel(sample=slice(first, first + 10)).to_netcdf(tmp_path / f"p_{part}.nc")
    with open_archive(tmp_path / "p_*.nc") as archive:
        assert np.array_equal(archive.read(0, 30)[0], data.t_background.values.reshape(30, -1))


@pytest.mark.parametrize("where", ["time", "lat"])
def test_that_durations_as_coordinates_are_numbers_with_units(tmp_path, where):
    data = pairs(60)
    data = data.assign_coords({where: np.arange(data.sizes[where]) * np.timedelta64(3, "h").astype("timedelta64[ns]")})
    data.to_netcdf(tmp_path / "a.nc")
    with open_archive(tmp_path / "a.nc") as archive:
        assert archive.count == 60
        data[["t_background"]].isel(time=[3]).to_netcdf(tmp_path / "b.nc")
        states = read_states(tmp_path / "b.nc", archive.state)
        write_netcdf(states.dataset(states.values), tmp_path / "out.nc")
        assert torch.equal(read_states(tmp_path / "out.nc", archive.state, name="analysis").values, states.values)


# ---------------------------------------------------------------- circles


@pytest.mark.parametrize(
    "axis, place, weights",
    [
        ([350.0, 355, 0, 5, 10], -5, {355: 1.0}),
        ([350.0, 355, 0, 5, 10], 357.5, {355: 0.5, 0: 0.5}),
        ([350.0, 355, 0, 5, 10], 715, {355: 1.0}),
        ([350.0, 355, 0, 5, 10], 10, {10: 1.0}),
        ([350.0, 355, 0, 5, 10], 180, None),
        ([350.0, 355, 0, 5, 10], 349, None),
        ([350.0, 355, 0, 5, 10], 11, None),
        ([10.0, 5, 0, 355, 350], 357.5, {355: 0.5, 0: 0.5}),
        ([-10.0, -5, 0, 5, 10], 355, {-5: 1.0}),
        ([0.0, 60, 120, 180, -120, -60], 210, {180: 0.5, -120: 0.5}),
        ([0.0, 60, 120, 180, -120, -60], -30, {-60: 0.5, 0: 0.5}),
        ([0.0, 60, 120, 180, 240, 300], 330, {300: 0.5, 0: 0.5}),
        ([0.0, 60, 120, 180, 240, 300, 360], 330, {300: 0.5, 0: 0.5}),
        ([0.0, 90, 180], 270, None),
        ([359.0], -1, {359: 1.0}),
        ([359.0], 0, None),
    ],
)
def test_that_longitudes_are_places_on_a_circle(tmp_path, axis, place, weights):
    states = states_of(day(axis, "degrees_east"), tmp_path)
    table = f"value,error,units,lon\n281,0.5,K,{place}\n"
    if weights is None:
        with pytest.raises(ValueError, match="lon: expected stations between") as caught:
            seen(table, states, tmp_path)
        one_line(caught, f"got {place} for row 1")
    else:
        sightings = seen(table, states, tmp_path)
        found = {axis[p]: w for p, w in zip(sightings.points[0], sightings.weights[0]) if w}
        assert found.keys() == weights.keys() and all(found[k] == pytest.approx(w, abs=1e-12) for k, w in weights.items())


@pytest.mark.parametrize(
    "attributes",
    [
        {"standard_name": "longitude", "units": "degrees"},
        {"units": "degrees"},
        {},
        {"standard_name": "longitude"},
        *({"units": u} for u in ("degrees_east", "degree_east", "degrees_E", "degree_E", "degreesE", "degreeE")),
    ],
)
def test_that_longitudes_are_known_by_units_standard_name_and_usual_names(tmp_path, attributes):
    data = day([350.0, 355, 0, 5, 10])
    data.lon.attrs = attributes
    assert seen("value,error,units,lon\n281,0.5,K,-5\n", states_of(data, tmp_path), tmp_path).points.tolist() == [[1]]


@given(st.integers(0, 359), st.integers(2, 12), st.integers(1, 29), st.floats(0, 1), st.integers(-2, 2), st.booleans())
def test_that_only_places_in_a_region_are_in_it_however_it_is_turned(start, count, spacing, share, turns, falling):
    values = (start + spacing * np.arange(count)) % 360.0
    axis = Axis(tuple(map(float, values[::-1] if falling else values)), "degrees_east")
    inside = start + share * spacing * (count - 1)
    near, far, way = along_axis(axis, np.array([inside + 360 * turns]), "here")
    middle = np.exp(1j * np.deg2rad(np.array(axis.values)))
    between = (1 - way) * middle[near] + way * middle[far]
    assert np.abs(np.angle(between / np.exp(1j * np.deg2rad(inside)))) < 1e-2
    if 360 - spacing * (count - 1) > 2 * spacing:
        with pytest.raises(ValueError, match="expected stations between"):
            along_axis(axis, np.array([start - spacing * 0.9]), "here")


def test_that_a_grid_fits_up_to_full_turns_and_one_with_other_points_does_not(tmp_path):
    world = day(np.arange(0.0, 360, 60), "degrees_east")
    layout = Layout.of(world.data_vars, ("time",))
    again = day([0.0, 60, 120, 180, -120, -60], "degree_E")
    assert states_of(again, tmp_path, layout).values.shape == (1, 1, 6)
    with pytest.raises(ValueError, match="expected coordinates lon") as caught:
        states_of(day(np.arange(-190.0, 170, 60), "degrees_east"), tmp_path, layout)
    one_line(caught, "b.nc")


def test_that_latitudes_may_fall(tmp_path):
    data = pairs(1).isel(lon=0, drop=True)[["t_background"]].rename(t_background="t")
    sightings = seen("value,error,units,lat\n281,0.5,K,47.5\n", states_of(data, tmp_path), tmp_path)
    weights = dict(zip(sightings.points[0].tolist(), sightings.weights[0].tolist()))
    assert weights == {1: pytest.approx(0.75), 2: pytest.approx(0.25)}


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_that_no_comparison_of_coordinates_depends_on_their_units(scale):
    axis = Axis(tuple(scale * np.array([1.0, 2.0, 3.0])), "")
    assert axis.fits(Axis(tuple(scale * np.array([1.0, 2.0, 3.0000001])))) and not axis.fits(
        Axis(tuple(scale * np.array([1.0, 2.0, 3.01])))
    )
    assert along_axis(axis, scale * np.array([1.5]), "here")[2][0] == pytest.approx(0.5)
    with pytest.raises(ValueError, match="expected stations between"):
        along_axis(axis, scale * np.array([3.01]), "here")


@pytest.mark.parametrize("values", [(1.0, 1.0, 2.0), (1.0, np.nan, 2.0)])
def test_that_an_axis_that_orders_nothing_is_refused_when_stations_are_placed_on_it(values):
    with pytest.raises(ValueError, match="here: expected an axis of"):
        along_axis(Axis(values), np.array([1.5]), "here")


# ---------------------------------------------------------------- units


@pytest.mark.parametrize(
    "one, other, value, wanted",
    [
        ("hPa", "Pa", 1013.25, 101325),
        ("degC", "K", 15, 288.15),
        ("K", "kelvin", 3, 3),
        ("degF", "K", 212, 373.15),
        ("km/h", "m s-1", 36, 10),
        ("100 Pa", "hPa", 5, 5),
        ("g kg-1", "1", 7, 0.007),
        ("%", "1", 50, 0.5),
        ("degrees_E", "degrees_east", 7, 7),
        ("parsnips", "parsnips", 7, 7),
        ("kg.m-2", "g cm-2", 10, 1),
        ("J kg-1", "m2 s-2", 2, 2),
    ],
)
def test_that_units_that_measure_the_same_are_converted_there_and_back(one, other, value, wanted):
    factor, offset = conversion(one, other)
    assert factor * value + offset == pytest.approx(wanted, rel=1e-12)
    factor, offset = conversion(other, one)
    assert factor * wanted + offset == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize(
    "one, other",
    [
        ("K", "m"),
        ("psu", "g/kg"),
        ("psu", "1"),
        ("", "K"),
        ("dBZ", "K"),
        ("degrees_north", "degrees_east"),
        ("parsnips", "K"),
        ("9**9**9**9", "m"),
        ("(" * 70, "m"),
        ("m" * 500, "K"),
        ("K", "K-1"),
    ],
)
def test_that_other_units_are_not_converted_whatever_they_say(one, other):
    assert conversion(one, other) is None and conversion(other, one) is None


def test_that_an_archive_whose_roles_have_other_units_is_read_in_one(tmp_path):
    data = pairs()
    for name, factor in (("t_background", 1.0), ("t_analysis", 100.0)):
        data[name] = (data[name] * factor).assign_attrs(units="hPa" if factor == 1 else "Pa")
    data.to_netcdf(tmp_path / "a.nc")
    with open_archive(tmp_path / "a.nc") as archive:
        x, y = archive.read(0, 60)
        assert archive.state.fields[0].units == "hPa" and torch.allclose(y - x, torch.full_like(x, 0.1), rtol=1e-9)


def test_that_a_background_in_other_units_is_converted_and_written_back_in_its_own(tmp_path):
    data = day(value=1000.0, units_of="x").assign(t=lambda d: d.t.assign_attrs(units="hPa"))
    layout = Layout.of(data.data_vars, ("time",))
    pascal = data.assign(t=(data.t * 100).assign_attrs(units="Pa"))
    states = states_of(pascal, tmp_path, layout)
    assert states.values.tolist() == [[[1000.0] * 4]]
    back = states.dataset(states.values + 1).t
    assert back.attrs["units"] == "Pa" and back.values.tolist() == [[100100.0] * 4]


def test_that_values_convert_with_their_offset_and_errors_without_it(tmp_path):
    states = states_of(day(), tmp_path)
    sightings = seen("value,error,units,lon\n10,0.5,degC,1\n50,0.9,degF,2\n281,0.5,K,0\n", states, tmp_path)
    assert np.allclose(sightings.values, [[283.15, 283.15, 281]], rtol=1e-14) and np.allclose(
        sightings.errors, [0.5, 0.5, 0.5], rtol=1e-14
    )
    named = xr.Dataset(
        {"t": ("station", [10.0], {"units": "degC"}), "t_error": ("station", [0.9], {"units": "degF"}), "lon": ("station", [1.0])}
    )
    named.to_netcdf(tmp_path / "o.nc")
    sightings = read_observations(tmp_path / "o.nc", states)
    assert np.allclose(sightings.values, 283.15) and np.allclose(sightings.errors, 0.5)


def test_that_coordinates_in_other_units_are_converted(tmp_path):
    data = day().rename(lon="depth").assign_coords(depth=("depth", [0.0, 1.0, 2.0, 3.0], {"units": "km"}))
    layout = Layout.of(data.data_vars, ("time",))
    metres = data.assign_coords(depth=("depth", [0.0, 1000.0, 2000.0, 3000.0], {"units": "m"}))
    states = states_of(metres, tmp_path, layout)
    stations = xr.Dataset(
        {"value": ("station", [281.0], {"units": "K"}), "error": 0.5, "depth": ("station", [2500.0], {"units": "m"})}
    )
    stations.to_netcdf(tmp_path / "o.nc")
    assert read_observations(tmp_path / "o.nc", states).points.tolist() == [[2, 3]]
    with pytest.raises(ValueError, match="expected coordinates depth"):
        states_of(metres.assign_coords(depth=("depth", [0.0, 1000.0, 2000.0, 3000.0], {"units": "km"})), tmp_path, layout)


def test_that_an_archive_of_equal_units_does_not_load_the_registry_of_units(tmp_path, monkeypatch):
    monkeypatch.setattr("pnpda_nb.files.units._converted", lambda one, other: pytest.fail(f"{one} and {other} were looked up"))
    data = pairs()
    data.t_analysis.attrs["units"], data.t_background.attrs["units"] = "m s-1", "m/s"
    data.to_netcdf(tmp_path / "a.nc")
    assert open_archive(tmp_path / "a.nc").count == 60


@pytest.mark.parametrize("units", [None, ["K", "m"], {"a": 1}, 7, True, "K\n"])
def test_that_strange_units_are_read_or_refused_in_one_line(tmp_path, units):
    data = pairs()
    for name in data.data_vars:
        data[name].attrs["units"] = units
    data.to_zarr(tmp_path / "a.zarr", consolidated=False)
    if units in (["K", "m"], {"a": 1}, True) and units is not None:
        with pytest.raises(ValueError, match="expected text as its attribute 'units'") as caught:
            open_archive(tmp_path / "a.zarr")
        one_line(caught)
    else:
        with open_archive(tmp_path / "a.zarr") as archive:
            assert archive.state.fields[0].units == {None: "", 7: "7", "K\n": "K"}[units]


# ---------------------------------------------------------------- text, and what is not used


def test_that_character_arrays_are_text(tmp_path):
    data = xr.Dataset(
        {n: (("time", "lon"), np.full((1, 4), 280.0), {"units": "K"}) for n in ("air", "sea")},
        coords={"time": [0], "lon": np.arange(4.0)},
    )
    states = states_of(data, tmp_path)
    bare = {"value": ("station", [281.0, 282]), "error": ("station", [0.5, 0.5]), "lon": ("station", [0.0, 1])}
    for words, units in (
        (np.array([b"air", b"sea"]), np.array([b"K", b"K"])),
        (np.array(["air  ", "sea"]), np.array(["K ", "K"])),
        (np.array(["air", "sea"], object), np.array(["K", "K"], object)),
    ):
        for engine in ("scipy", "h5netcdf"):
            xr.Dataset(bare | {"variable": ("station", words), "units": ("station", units)}).to_netcdf(
                tmp_path / "o.nc", engine=engine
            )
            assert read_observations(tmp_path / "o.nc", states).fields == ("air", "sea")


def test_that_names_along_an_axis_may_be_characters_or_look_like_numbers(tmp_path):
    data = xr.Dataset(
        {"t": (("time", "lon"), np.full((1, 2), 280.0), {"units": "K"})}, coords={"time": [0], "lon": ["06240", "EHAM"]}
    )
    states = states_of(data, tmp_path)
    assert seen("value,error,units,lon\n281,0.5,K,EHAM\n282,0.5,K,06240\n", states, tmp_path).points.tolist() == [[1], [0]]
    assert seen("value,error,units,lon\n281,0.5,K,06240\n", states, tmp_path).points.tolist() == [[0]]
    bytes_ = data.assign_coords(lon=np.array([b"06240", b"EHAM"]))
    bytes_.to_netcdf(tmp_path / "c.nc", engine="scipy")
    assert read_states(tmp_path / "c.nc", states.layout).values.shape == (1, 1, 2)


def test_that_columns_that_nobody_needs_may_hold_anything(tmp_path):
    states = states_of(day(), tmp_path)
    table = 'wmo,name,comment,value,error,units,lon\n06240,Schiphol,"a, b",281,0.5,K,0\nEHAM,7,,282,0.5,K,1\n'
    assert seen(table, states, tmp_path).values.tolist() == [[281, 282]]
    with pytest.raises(ValueError, match="expected numbers in column 'error', got 'about 1' in row 2") as caught:
        seen(table.replace("282,0.5", "282,about 1"), states, tmp_path, strict=True)
    one_line(caught, "o.csv")
    with pytest.raises(ValueError, match="expected numbers in column 'lon', got 'EHAM' in row 2"):
        seen("value,error,units,lon\n281,0.5,K,0\n281,0.5,K,EHAM\n", states, tmp_path, strict=True)


def test_that_a_column_that_is_there_twice_is_refused(tmp_path):
    with pytest.raises(ValueError, match="expected distinct columns, got 'value' twice"):
        seen("value ,value,error,units,lon\n281,1,0.5,K,0\n", states_of(day(), tmp_path), tmp_path)


# ---------------------------------------------------------------- fill values


@pytest.fixture
def believing(tmp_path):
    """States of a layout that knows that its archive held 270 to 290 K."""
    data = day()
    layout = Layout.of(data.data_vars, ("time",)).with_held({"t": (270.0, 290.0)})
    return states_of(data, tmp_path, layout_from_record(json.loads(json.dumps(layout_record(layout)))))


@pytest.mark.parametrize("fill", [-9999.0, 9.969209968386869e36, 1e20, -32768.0, 99999.0])
def test_that_numbers_beyond_anything_held_are_missing_and_listed(believing, tmp_path, fill):
    sightings = seen(f"value,error,units,lon\n281,0.5,K,1\n{fill},{abs(fill)},K,2\n300,0.5,K,0\n", believing, tmp_path)
    assert np.array_equal(sightings.values, [[281, np.nan, 300]], equal_nan=True) and sightings.refused == (
        ("t", "row 2 (lon 2)", fill),
    )
    assert "1 refused" in repr(sightings) and "at row 2 (lon 2)" in sightings.beyond
    with pytest.raises(ValueError, match="expected at least one value, got 1 missing, of which 1 refused"):
        seen(f"value,error,units,lon\n{fill},0.5,K,2\n", believing, tmp_path)
    grid = xr.Dataset({"t": ("lon", [281.0, fill, 283.0, np.nan], {"units": "K"}), "t_error": 0.5}, coords={"lon": np.arange(4.0)})
    grid.to_netcdf(tmp_path / "g.nc")
    on_grid = read_observations(tmp_path / "g.nc", believing)
    assert on_grid.values.tolist() == [[281.0, 283.0]] and on_grid.refused == (("t", "point 2", fill),)


def test_that_bounds_follow_the_units_of_the_values(believing, tmp_path):
    sightings = seen("value,error,units,lon\n10,0.5,degC,1\n-9999,0.5,degC,2\n", believing, tmp_path)
    assert len(sightings.refused) == 1 and sightings.values[0, 0] == pytest.approx(283.15)


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6), st.floats(1e-6, 1e6), st.floats(-1e6, 1e6))
def test_that_what_is_believed_does_not_depend_on_units(low, width, factor, offset):
    one, other = Field("t", held=(low, low + width)), Field("t", held=(factor * low + offset, factor * (low + width) + offset))
    size = abs(factor * low) + abs(offset) + factor * width
    assert np.allclose(factor * np.array(one.bounds) + offset, other.bounds, rtol=0, atol=1e-9 * size)


def test_that_a_background_beyond_anything_held_is_refused_and_names_field_and_value(believing, tmp_path):
    data = day()
    data.t[0, 2] = -9999.0
    with pytest.raises(ValueError, match="expected t between 170 and 390 K .*got -9999") as caught:
        states_of(data, tmp_path, believing.layout)
    one_line(caught, "b.nc")


def test_that_what_an_archive_held_is_its_smallest_and_largest_value(tmp_path):
    data = pairs(100)
    data.t_analysis[77, 1, 2], data.t_background[99, 0, 0] = 55.0, -44.0
    data.to_netcdf(tmp_path / "a.nc")
    with open_archive(tmp_path / "a.nc") as archive:
        archive.block = 7
        assert archive.held() == {"t": (-44.0, 55.0)}
        layout = archive.state.with_held(archive.held())
        assert layout_from_record(layout_record(layout)).fields[0].held == (-44.0, 55.0) and layout_record(archive.state)[
            "variables"
        ][0].keys() == {"name", "dims", "shape", "units"}


def test_that_a_field_that_never_changed_or_is_not_known_believes_anything():
    assert Field("t").bounds == Field("t", held=(0.0, 0.0)).bounds == (-np.inf, np.inf)
    with pytest.raises(ValueError, match="held: expected the lowest and the highest value of t"):
        Field("t", held=(1.0, 0.0))


# ---------------------------------------------------------------- what a prior's layout knows


def test_that_a_layout_knows_which_dimensions_count_states_and_what_roles_are_called(tmp_path):
    data = pairs().rename(time="Time", t_background="T2_forecast", t_analysis="T2_truth").drop_vars("Time")
    data.to_netcdf(tmp_path / "a.nc")
    with open_archive(tmp_path / "a.nc", roles=("forecast", "truth"), samples=("Time",)) as archive:
        layout = layout_from_record(json.loads(json.dumps(archive.layout)))
    assert layout.samples == ("Time",) and layout.roles == ("forecast", "truth")
    data[["T2_forecast"]].isel(Time=[1, 2]).to_netcdf(tmp_path / "b.nc")
    states = read_states(tmp_path / "b.nc", layout)
    assert states.values.shape == (2, 1, 12) and list(states.dataset(states.values)) == ["T2_analysis"]
    bare = Layout(layout.fields, layout.axes)
    with pytest.raises(ValueError, match="expected a variable"):
        read_states(tmp_path / "b.nc", bare)
    assert read_states(
        write_netcdf(data[["T2_forecast"]].isel(Time=[1]).rename(T2_forecast="T2"), tmp_path / "c.nc"), bare, samples=("Time",)
    ).runs == ("Time",)


def test_that_older_records_of_layouts_are_read():
    record = {
        "variables": [{"name": "t", "dims": ["lon"], "shape": [3], "units": "K"}],
        "axes": {"lon": {"values": [350, 355.0, 0], "units": "degrees_east", "period": None}},
        "left_out": [],
    }
    layout = layout_from_record(record)
    assert (
        layout.axes["lon"].period == 360
        and layout.samples == ()
        and layout.roles == ("background", "analysis")
        and layout.fields[0].held is None
    )


@pytest.mark.parametrize(
    "change",
    [
        {"left_out": [[0, 10**15]]},
        {"axes": {"lon": {"values": [1.0], "units": "", "period": None}}},
        {"axes": {"lon": {"values": [[]] * 3, "units": "", "period": None}}},
        {"roles": ["a"]},
        {"variables": [{"name": "t", "dims": ["lon"], "shape": [3], "units": "K", "held": [2, 1]}]},
        {"variables": [{"name": "t", "dims": ["lon"], "shape": [10**15], "units": "K"}], "axes": {}, "left_out": [[1, 10**15 - 1]]},
        {"axes": {"lon": {"values": [1.0, 2.0, 3.0], "units": "", "period": -1}}},
    ],
)
def test_that_a_record_of_a_layout_that_makes_no_sense_is_refused_before_memory_is_taken(change):
    record = {"variables": [{"name": "t", "dims": ["lon"], "shape": [3], "units": "K"}], "axes": {}, "left_out": []}
    assert layout_from_record(record).dim == 3
    with pytest.raises(ValueError, match="layout: expected variables") as caught:
        layout_from_record(record | change)
    one_line(caught)


# ---------------------------------------------------------------- attributes


@pytest.mark.parametrize(
    "value",
    [
        True,
        None,
        {"a": [1, None]},
        [1, "two"],
        [],
        [True, False],
        ["a", "b"],
        10**30,
        1 + 2j,
        np.float16(1),
        [[1, 2], [3, 4]],
        "nul\0",
        "\ud800",
        [[]],
        1.5,
    ],
)
def test_that_attributes_that_netcdf_cannot_hold_are_written_in_a_form_that_it_can(tmp_path, value):
    data = day()
    written = writable_attributes({"note": value, "CLASS": "x", "a/b": 1})
    data.t.attrs |= written
    data.lon.attrs |= written
    data.attrs = written
    for engine in ("h5netcdf", "scipy"):
        if engine == "scipy" and isinstance(value, list) and value == ["a", "b"]:
            continue  # classic NetCDF has no lists of text
        data.to_netcdf(tmp_path / f"{engine}.nc", engine=engine)
        with xr.open_dataset(tmp_path / f"{engine}.nc", engine=engine) as back:
            assert ("note" in back.t.attrs) == (value is not None) and "CLASS" not in back.t.attrs


@pytest.mark.parametrize("value", [True, None, {"a": 1}, [1, "two"], ["a", "b"]])
def test_that_the_analysis_of_a_zarr_background_with_any_attributes_is_written(tmp_path, value):
    data = day(note=value)
    data.lon.attrs["note"] = value
    data.to_zarr(tmp_path / "b.zarr", consolidated=False)
    states = read_states(tmp_path / "b.zarr", Layout.of(data.data_vars, ("time",)))
    with xr.open_dataset(write_netcdf(states.dataset(states.values), tmp_path / "out.nc")) as out:
        assert out.t.values.tolist() == [[280.0] * 4] and (value is None or "note" in out.t.attrs)


def test_that_an_analysis_names_no_variable_that_it_lacks(tmp_path):
    data = day(ancillary_variables="t_qc", grid_mapping="crs", cell_measures="area: cell_area")
    data = data.assign(
        crs=((), 0, {"grid_mapping_name": "latitude_longitude"}), lon_bnds=(("lon", "nv"), np.arange(8.0).reshape(4, 2))
    ).assign_coords(height=2.0)
    data.lon.attrs["bounds"], data.time.attrs["bounds"] = "lon_bnds", "time_bnds"
    states = states_of(data, tmp_path, Layout.of(data[["t"]].data_vars, ("time",)))
    with xr.open_dataset(write_netcdf(states.dataset(states.values), tmp_path / "out.nc"), decode_coords=False) as out:
        naming = {
            k: v
            for variable in out.variables.values()
            for k, v in variable.attrs.items()
            if k in ("ancillary_variables", "grid_mapping", "cell_measures", "bounds", "coordinates")
        }
        assert naming == {"grid_mapping": "crs", "bounds": "lon_bnds", "coordinates": "height"} and {
            "crs",
            "lon_bnds",
            "height",
        } <= set(out.variables)
        assert np.array_equal(out.lon_bnds, data.lon_bnds) and "_FillValue" not in out.lon.attrs


# ---------------------------------------------------------------- content that executes


class Touch:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def store_v2(folder, **hostile):
    """A Zarr store written by hand, whose coordinate `x` is described as told."""
    good = {"zarr_format": 2, "dtype": "<f8", "compressor": None, "filters": None, "fill_value": 0.0, "order": "C"}
    (folder / ".zgroup").write_text('{"zarr_format": 2}')
    for name, shape, more in (("background", [60, 3], {}), ("analysis", [60, 3], {}), ("x", [3], hostile)):
        (folder / name).mkdir()
        (folder / name / ".zarray").write_text(json.dumps(good | {"shape": shape, "chunks": shape} | more))
        (folder / name / ".zattrs").write_text(json.dumps({"_ARRAY_DIMENSIONS": ["sample", "x"][-len(shape) :]}))
        payload = (
            pickle.dumps(Touch(folder.parent / "executed")) if more else np.random.default_rng(0).standard_normal(shape).tobytes()
        )
        (folder / name / ".".join("0" * len(shape))).write_bytes(payload)


PICKLE = {"id": "pickle", "protocol": 5}


@pytest.mark.parametrize(
    "hostile",
    [
        {"compressor": PICKLE},
        {"filters": [PICKLE]},
        {"filters": [{"id": "zlib"}, PICKLE]},
        {"dtype": "|O", "filters": [PICKLE]},
        {"dtype": "|O", "filters": [{"id": "vlen-utf8"}], "compressor": PICKLE},
        {"dtype": "|O"},
        {"compressor": {"id": "msgpack2"}},
        {"compressor": {}},
        {"compressor": "pickle"},
        {"filters": [["pickle"]]},
    ],
)
def test_that_no_codec_that_could_execute_anything_is_ever_used(tmp_path, hostile):
    (tmp_path / "a.zarr").mkdir()
    store_v2(tmp_path / "a.zarr", **hostile)
    for read in (
        open_archive,
        open_dataset,
        lambda p: read_states(p, Layout.plain(3)),
        lambda p: read_observations(p, None or states_of(day(), tmp_path)),
    ):
        with pytest.raises(ValueError, match="codec|objects|numbers or text") as caught:
            read(tmp_path / "a.zarr")
        one_line(caught, "a.zarr")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    "codecs",
    [
        [{"name": "bytes"}, {"name": "numcodecs.pickle", "configuration": {"protocol": 5}}],
        [{"name": "os.system"}],
        ["pickle"],
        [{"name": "sharding_indexed", "configuration": {"chunk_shape": [3], "codecs": [{"name": "numcodecs.pickle"}]}}],
        [
            {
                "name": "sharding_indexed",
                "configuration": {
                    "chunk_shape": [3],
                    "codecs": [{"name": "bytes"}],
                    "index_codecs": [{"name": "numcodecs.pickle"}],
                },
            }
        ],
        7,
        None,
    ],
)
@pytest.mark.parametrize("consolidated", [False, True])
def test_that_codecs_of_the_third_format_are_checked_in_shards_and_in_copies_too(tmp_path, codecs, consolidated):
    pairs().to_zarr(tmp_path / "a.zarr", zarr_format=3, consolidated=consolidated)
    place = tmp_path / "a.zarr" / ("zarr.json" if consolidated else "lat/zarr.json")
    said = json.loads(place.read_text())
    (said["consolidated_metadata"]["metadata"]["lat"] if consolidated else said)["codecs"] = codecs
    place.write_text(json.dumps(said))
    with pytest.raises(ValueError, match="codec|description") as caught:
        open_archive(tmp_path / "a.zarr")
    one_line(caught, "a.zarr")
    assert not any("pickle" in codec or "json" in codec or "msgpack" in codec for codec in CODECS)


def test_that_a_copy_of_the_descriptions_of_the_second_format_is_checked_too(tmp_path):
    pairs().to_zarr(tmp_path / "a.zarr", zarr_format=2, consolidated=True)
    place = tmp_path / "a.zarr" / ".zmetadata"
    said = json.loads(place.read_text())
    said["metadata"]["lat/.zarray"]["filters"] = [PICKLE]
    place.write_text(json.dumps(said))
    with pytest.raises(ValueError, match="the codec 'pickle'"):
        open_archive(tmp_path / "a.zarr")


COMPRESSIONS = [None, *(numcodecs.get_codec({"id": i}) for i in ("blosc", "zlib", "gzip", "bz2", "lzma", "zstd", "lz4"))]


@pytest.mark.parametrize("version, sharded", [(2, False), (3, False), (3, True)])
@pytest.mark.parametrize("compression", COMPRESSIONS, ids=str)
def test_that_stores_with_known_codecs_are_read_and_truncated_chunks_never_are(tmp_path, version, sharded, compression):
    if version == 3 and compression is not None:
        import zarr.codecs.numcodecs as known

        names = {
            "blosc": zarr.codecs.BloscCodec,
            "gzip": zarr.codecs.GzipCodec,
            "zstd": zarr.codecs.ZstdCodec,
            "zlib": known.Zlib,
            "bz2": known.BZ2,
            "lzma": known.LZMA,
            "lz4": known.LZ4,
        }
        compression = names[compression.codec_id]()
    data, group = pairs(20), zarr.open_group(tmp_path / "a.zarr", mode="w", zarr_format=version)
    options = {"chunks": (2, 3, 4), "shards": (4, 3, 4)} if sharded else {"chunks": (4, 3, 4)}
    for name in data.data_vars:
        named = {"dimension_names": data[name].dims} if version == 3 else {}
        array = group.create_array(name, shape=(20, 3, 4), dtype="f8", compressors=compression, **named, **options)
        array[:] = data[name].values
        array.attrs.update({"_ARRAY_DIMENSIONS": data[name].dims} if version == 2 else {"units": "K"})
    with open_archive(tmp_path / "a.zarr") as archive:
        assert all(np.array_equal(x, data[n].values.reshape(20, -1)) for x, n in zip(archive.read(0, 20), data.data_vars))
        assert np.array_equal(archive.read(5, 7)[0], data.t_background.values[5:7].reshape(2, -1))
    chunk = sorted(
        p
        for p in (tmp_path / "a.zarr" / "t_analysis").rglob("*")
        if p.is_file() and p.name not in ("zarr.json", ".zarray", ".zattrs")
    )[2]
    whole = chunk.read_bytes()
    for length in (0, 1, 10, len(whole) // 2, len(whole) - 1):
        chunk.write_bytes(whole[:length])
        with open_archive(tmp_path / "a.zarr") as archive:
            with pytest.raises(ValueError, match="is it whole|is the file whole") as caught:
                archive.read(0, 20)
            one_line(caught, "a.zarr")


def test_that_a_chunk_that_is_not_stored_is_not_taken_for_data(tmp_path):
    data = pairs(20)
    for fill in (0.0, np.nan):
        folder = tmp_path / f"{fill}.zarr"
        group = zarr.open_group(folder, mode="w", zarr_format=3)
        for name in data.data_vars:
            group.create_array(
                name, shape=(20, 3, 4), chunks=(4, 3, 4), dtype="f8", fill_value=fill, dimension_names=data[name].dims
            )[:] = data[name].values
        (folder / "t_analysis/c/2/0/0").unlink()
        with open_archive(folder) as archive:
            assert np.array_equal(archive.read(0, 8)[1], data.t_analysis.values[:8].reshape(8, -1))
            with pytest.raises(
                ValueError, match=r"t_analysis/c/2/0/0 is not stored" if fill == 0 else "expected finite values"
            ) as caught:
                archive.read(0, 20)
            one_line(caught)


@pytest.mark.parametrize("target", ["elsewhere", "fifo", "nowhere"])
def test_that_a_store_does_not_lead_out_of_itself(tmp_path, target):
    pairs(20).to_zarr(tmp_path / "a.zarr", consolidated=False)
    chunk = tmp_path / "a.zarr/t_analysis/c/0/0/0"
    outside = tmp_path / "outside"
    outside.write_bytes(chunk.read_bytes())
    chunk.unlink()
    if target == "fifo":
        os.mkfifo(chunk)
    else:
        chunk.symlink_to(outside if target == "elsewhere" else tmp_path / "nothing")
    with pytest.raises(ValueError, match="leads out of it|link to nothing") as caught:
        open_archive(tmp_path / "a.zarr").read(0, 20)
    one_line(caught, "a.zarr")


# ---------------------------------------------------------------- what a file is


@pytest.mark.parametrize(
    "start, words",
    [
        (b"CDF\x05" + bytes(100), "CDF-5"),
        (b"GRIB" + bytes(100), "GRIB"),
        (b"", "an empty file"),
        (b"PK\x03\x04" + bytes(30), "zip"),
        (b"hello", "begins with b'hello'"),
        (b"\x89HDF\r\n\x1a\n", "is it whole"),
        (b"CDF\x01" + bytes(100), ""),
    ],
)
def test_that_a_file_is_known_by_its_first_bytes_and_anything_else_is_refused(tmp_path, start, words):
    (tmp_path / "a.nc").write_bytes(start)
    with pytest.raises(ValueError) as caught:
        open_archive(tmp_path / "a.nc")
    one_line(caught, words, "a.nc")


@pytest.mark.parametrize(
    "path, error",
    [
        ("/".join(["a"] * 2000), FileNotFoundError),
        ("a" * 300, (FileNotFoundError, ValueError)),
        ("a\0b", FileNotFoundError),
        ("nowhere.nc", FileNotFoundError),
        ("/".join(["a" * 200] * 50), (FileNotFoundError, ValueError)),
        ("a\0*", FileNotFoundError),
    ],
)
def test_that_a_path_that_no_file_can_have_is_one_line(tmp_path, path, error):
    states = states_of(day(), tmp_path)
    for read in (
        open_archive,
        open_dataset,
        lambda p: read_states(p, states.layout),
        lambda p: read_observations(p, states),
        lambda p: read_observations(f"{p}.csv", states),
    ):
        with pytest.raises(error) as caught:
            read(path)
        one_line(caught)
        assert len(str(caught.value)) < 600


def test_that_folders_pipes_and_links_without_an_end_are_one_line(tmp_path):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name in ("folder", "pipe", "loop"):
        with pytest.raises(ValueError, match=name) as caught:
            open_dataset(tmp_path / name)
        one_line(caught)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        "{",
        "[]",
        "null",
        '{"zarr_format": 2, "shape": "x"}',
        '{"zarr_format": 2, "shape": [-1], "chunks": [1], "dtype": "<f8"}',
        '{"zarr_format": 2, "shape": [1], "chunks": [0], "dtype": "<f8"}',
        '{"zarr_format": 2, "shape": [1.5], "chunks": [1], "dtype": "<f8"}',
        '{"zarr_format": 2, "shape": [3], "chunks": [3], "dtype": "nonsense"}',
        " " * 9_000_000,
    ],
)
def test_that_descriptions_that_make_no_sense_are_one_line(tmp_path, text):
    pairs().to_zarr(tmp_path / "a.zarr", zarr_format=2, consolidated=False)
    (tmp_path / "a.zarr/lat/.zarray").write_text(text)
    with pytest.raises(ValueError, match="a.zarr") as caught:
        open_archive(tmp_path / "a.zarr")
    one_line(caught)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda d: d.assign(t_analysis=d.t_analysis.astype(str)), "expected numbers in 't_analysis', got text"),
        (
            lambda d: d.assign(t_analysis=(d.t_analysis.dims, np.full(d.t_analysis.shape, START))),
            "expected numbers in 't_analysis', got times",
        ),
        (lambda d: d.isel(lat=slice(0)), "expected points of t"),
        (lambda d: d.isel(time=slice(0)), "expected pairs"),
        (lambda d: d.assign(t_background=1.0, t_analysis=2.0), "expected a dimension that counts pairs"),
    ],
)
def test_that_variables_that_are_no_fields_are_one_line(tmp_path, change, words):
    change(pairs()).to_netcdf(tmp_path / "a.nc")
    with pytest.raises(ValueError) as caught:
        open_archive(tmp_path / "a.nc")
    one_line(caught, words)


def test_that_complex_numbers_are_not_cut_to_their_real_part(tmp_path):
    data = pairs()
    data.assign(t_analysis=data.t_analysis + 1j).to_zarr(tmp_path / "a.zarr", consolidated=False)
    with pytest.raises(ValueError, match="expected numbers in 't_analysis', got complex numbers"):
        open_archive(tmp_path / "a.zarr")


def test_that_a_dimension_that_is_there_twice_is_one_line(tmp_path):
    with h5py.File(tmp_path / "a.nc", "w") as file:
        file["time"], file["x"] = np.arange(60.0), np.arange(3.0)
        for name in ("time", "x"):
            file[name].make_scale(name)
        for name in ("background", "analysis"):
            file[name] = np.zeros((60, 3, 3))
            for axis, scale in enumerate(("time", "x", "x")):
                file[name].dims[axis].attach_scale(file[scale])
    with pytest.raises(ValueError, match="expected distinct dimensions") as caught:
        open_archive(tmp_path / "a.nc")
    one_line(caught)


def test_that_times_in_units_that_nobody_knows_are_one_line(tmp_path):
    pairs().assign_coords(time=("time", np.arange(60), {"units": "days since yesterday"})).to_netcdf(tmp_path / "a.nc")
    with pytest.raises(ValueError, match="has times that cannot be understood") as caught:
        open_archive(tmp_path / "a.nc")
    one_line(caught, "a.nc")


def test_that_a_damaged_heap_of_hdf5_does_not_keep_the_library_busy_for_ever(tmp_path):
    pairs().to_netcdf(tmp_path / "a.nc", engine="h5netcdf")
    content = bytearray((tmp_path / "a.nc").read_bytes())
    at = content.find(b"GCOL\x01")
    assert at > 0
    content[at + 200 : at + 400] = bytes(200)
    (tmp_path / "a.nc").write_bytes(content)
    with pytest.raises(ValueError, match="heap of texts at byte [0-9]+ is damaged") as caught:
        open_archive(tmp_path / "a.nc")
    one_line(caught, "a.nc")


def test_that_text_that_is_no_text_is_one_line(tmp_path):
    states = states_of(day(), tmp_path)
    stations = xr.Dataset(
        {"value": ("station", [281.0]), "error": ("station", [0.5]), "lon": ("station", [1.0]), "units": ("station", ["K"])}
    )
    stations.to_zarr(
        tmp_path / "o.zarr", zarr_format=2, encoding={"units": {"dtype": "<U1", "compressors": None}}, consolidated=False
    )
    (tmp_path / "o.zarr/units/0").write_bytes(b"\xff\xff\xff\xff")
    with pytest.raises(ValueError, match="'units' cannot be read") as caught:
        read_observations(tmp_path / "o.zarr", states)
    one_line(caught, "o.zarr")


def test_that_a_damaged_checksum_of_hdf5_is_one_line(tmp_path):
    data = pairs(200)
    data.to_netcdf(
        tmp_path / "a.nc", engine="h5netcdf", encoding={n: {"fletcher32": True, "chunksizes": (200, 3, 4)} for n in data.data_vars}
    )
    content = bytearray((tmp_path / "a.nc").read_bytes())
    at = content.find(data.t_analysis.values.tobytes())
    assert at > 0
    content[at + 100] ^= 4
    (tmp_path / "a.nc").write_bytes(content)
    with pytest.raises(ValueError, match="cannot be read") as caught:
        open_archive(tmp_path / "a.nc")
    one_line(caught, "a.nc")


# ---------------------------------------------------------------- claims


def test_that_a_store_that_claims_far_more_than_is_there_is_refused_before_memory_is_taken(tmp_path):
    def store(name, shape, chunks, **options):
        group = zarr.open_group(tmp_path / name, mode="w", zarr_format=2)
        for variable in ("background", "analysis"):
            array = group.create_array(variable, shape=shape, chunks=chunks, dtype="f8", fill_value=1.0, **options)
            array.attrs["_ARRAY_DIMENSIONS"] = ["sample", "x"]
            yield array, tmp_path / name / variable

    for _ in store("nothing.zarr", (60, 10**12), (1, 10**6)):
        pass
    for _, folder in store("chunk.zarr", (60, 10), (60, 10**9)):
        (folder / "0.0").write_bytes(b"x" * 100)
    for array, _ in store("one.zarr", (60, 10**9), (1, 10**5)):
        array[0, : 10**5] = np.random.default_rng(0).standard_normal(10**5)
    for kind, pack in (("zlib", zlib.compress), ("zstd", numcodecs.zstd.compress)):
        for _, folder in store(f"{kind}.zarr", (60, 10), (60, 10), compressors=numcodecs.get_codec({"id": kind})):
            (folder / "0.0").write_bytes(pack(bytes(50_000_000)))
    for path in tmp_path.iterdir():
        with pytest.raises(ValueError, match="stored|got more|to be packed") as caught:
            open_archive(path)
        one_line(caught, path.name)


def scaled(path, make) -> None:
    """An HDF5 file as NetCDF-4 is, with two variables that `make` makes."""
    with h5py.File(path, "w") as file:
        file["time"], file["x"] = np.arange(60.0), np.arange(1000.0)
        for name in ("time", "x"):
            file[name].make_scale(name)
        for name in ("background", "analysis"):
            made = make(file, name)
            for axis, scale in enumerate(("time", "x")):
                made.dims[axis].attach_scale(file[scale])


def packed(file, name):
    made = file.create_dataset(name, (60, 1000), "f8", chunks=(60, 1000), compression="gzip")
    made.id.write_direct_chunk((0, 0), zlib.compress(bytes(100_000_000)))
    return made


def partly(file, name):
    made = file.create_dataset(name, (60, 1000), "f8", chunks=(1, 1000))
    made[:30] = 1.0
    return made


def outside(file, name):
    return file.create_dataset(name, (60, 1000), "f8", external=[(os.fspath(file.filename) + ".raw", 0, 480_000)])


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda f, n: f.create_dataset(n, (60, 1000), "f8", chunks=(1, 1000)), "nothing of"),
        (partly, "30 of 60 chunks"),
        (packed, "got more"),
        (outside, "in others"),
    ],
)
def test_that_an_hdf5_file_that_claims_more_than_is_there_is_refused(tmp_path, make, words):
    scaled(tmp_path / "a.nc", make)
    with pytest.raises(ValueError) as caught:
        open_archive(tmp_path / "a.nc").read(0, 60)
    one_line(caught, words, "a.nc")


def test_that_a_coordinate_that_claims_very_much_is_refused_before_it_is_read(tmp_path):
    with h5py.File(tmp_path / "a.nc", "w") as file:
        file.create_dataset("x", (10**11,), "f8", chunks=(10**6,)).make_scale("x")
        file["background"] = file["analysis"] = np.zeros((3, 4))
    with pytest.raises(ValueError, match="'x' claims 8e"):
        open_archive(tmp_path / "a.nc")


def test_that_a_link_to_another_file_is_not_followed(tmp_path):
    pairs().to_netcdf(tmp_path / "whole.nc")
    pairs()[["t_background"]].to_netcdf(tmp_path / "a.nc")
    with h5py.File(tmp_path / "a.nc", "a") as file:
        file["t_analysis"] = h5py.ExternalLink(str(tmp_path / "whole.nc"), "t_analysis")
    with pytest.raises(ValueError, match="link 't_analysis' to elsewhere"):
        open_archive(tmp_path / "a.nc")


def test_that_a_coordinate_of_two_dimensions_is_one_line(tmp_path):
    zarr = pytest.importorskip("zarr")
    pairs = xr.Dataset(
        {role: (("time", "lat", "lon"), np.random.default_rng(0).standard_normal((5, 2, 2))) for role in ("background", "analysis")}
    )
    pairs.assign_coords(lat=[10.0, 20.0]).to_zarr(tmp_path / "pairs.zarr", consolidated=False)
    group = zarr.open_group(tmp_path / "pairs.zarr")
    del group["lat"]
    array = group.create_array("lat", data=np.ones((2, 2)), dimension_names=["lat", "lon"])
    array.attrs["units"] = "degrees_north"
    with pytest.raises(ValueError, match=r"^(archive|coordinate|open_archive).*lat.*") as refused:
        open_archive(tmp_path / "pairs.zarr")
    assert "\n" not in str(refused.value) and "pairs.zarr" in str(refused.value)
