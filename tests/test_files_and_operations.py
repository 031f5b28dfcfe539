"""Files with names and units, and the two commands that make a prior and an analysis of them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st

from pnpda_nb.core import standard_normal, stream
from pnpda_nb.files import Axis, open_archive, read_observations, read_states
from pnpda_nb.files.layout import layout_from_record, layout_record
from pnpda_nb.files.places import along_axis
from pnpda_nb.files.units import same_units
from pnpda_nb.flow_matching import FlowPrior, TrainingSettings
from pnpda_nb.observing import Interpolate, Select
from pnpda_nb.operations import Report, set_aside, train_archive
from pnpda_nb.operations.errors import Part, attach_errors, attached_errors
from pnpda_nb.operations.validation import pnpda_with

LAT, LON = np.array([60.0, 50.0, 40.0]), np.arange(0.0, 360.0, 90.0)


def world(samples: int, seed: int = 1) -> xr.Dataset:
    """Pairs of a field of temperatures with a hole, and of a scalar wind."""
    random = np.random.default_rng(seed)
    temperature = 280 + random.standard_normal((samples, 3, 4))
    temperature[:, 1, 2] = np.nan
    wind = random.standard_normal(samples)
    data = {
        "temperature_analysis": (("time", "lat", "lon"), temperature, {"units": "K"}),
        "temperature_background": (
            ("time", "lat", "lon"),
            temperature + 1 + 0.3 * random.standard_normal((samples, 3, 4)),
            {"units": "K"},
        ),
        "wind_analysis": (("time",), wind, {"units": "m/s"}),
        "wind_background": (("time",), wind + 0.2 * random.standard_normal(samples), {"units": "m s-1"}),
    }
    lat, lon = ("lat", LAT, {"units": "degrees_north"}), ("lon", LON, {"units": "degrees_east"})
    return xr.Dataset(data, coords={"time": np.arange(samples), "lat": lat, "lon": lon})


def stations(**changes) -> xr.Dataset:
    data = {
        "value": ("station", [281.0, 279.0, 0.5]),
        "error": ("station", [0.1, 0.2, 0.1]),
        "variable": ("station", ["temperature", "temperature", "wind"]),
        "units": ("station", ["K", "K", "m s-1"]),
        "lat": ("station", [50.0, 45.0, np.nan]),
        "lon": ("station", [90.0, 315.0, np.nan]),
    }
    return xr.Dataset({k: v for k, v in (data | changes).items() if v is not None})


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with an archive, a background, stations, and a prior that was trained on the archive for a moment."""
    folder = tmp_path_factory.mktemp("files")
    pairs = world(400)
    pairs.to_netcdf(folder / "pairs.nc")
    names = {f"{n}_background": n for n in ("temperature", "wind")}
    today = pairs.isel(time=[399])[list(names)].rename(names)
    today.to_netcdf(folder / "today.nc")
    stations().to_netcdf(folder / "stations.nc")
    brief = TrainingSettings(hidden=(16, 16), batch=64, epochs=3, source="background", target="increment")
    with open_archive(folder / "pairs.nc") as archive:
        train_archive(archive, brief).prior.save(folder / "prior.safetensors")
    return folder


@pytest.fixture
def states(files):
    with open_archive(files / "pairs.nc") as archive:
        return read_states(files / "today.nc", archive.state)


# ---------------------------------------------------------------- files


@pytest.mark.parametrize(
    "one, other, same",
    [
        ("m/s", "m s-1", True),
        ("kg m-2", "kg/m^2", True),
        ("", "1", True),
        ("K", "degC", False),
        ("m", "km", False),
        ("s-1", "s", False),
        ("100 Pa", "Pa", False),
        ("kg/m s", "kg/m/s", False),
        ("W/m2 sr", "W m-2 sr", True),
    ],
)
def test_that_units_are_compared_as_products_of_powers(one, other, same):
    assert same_units(one, other) == same == same_units(other, one)


@given(st.lists(st.floats(-1000, 1000), min_size=1, max_size=5), st.booleans())
def test_that_interpolation_along_a_periodic_axis_only_knows_positions_modulo_the_period(positions, falling):
    axis = Axis(tuple(LON[::-1] if falling else LON), "degrees_east", 360.0)
    near, far, share = along_axis(axis, np.array(positions), "here")
    values = np.exp(1j * np.deg2rad(np.array(axis.values)))  # points of the circle
    middle = (1 - share) * values[near] + share * values[far]
    wanted = np.exp(1j * np.deg2rad(np.array(positions)))
    assert np.allclose(np.angle(middle[share == 0] / wanted[share == 0]), 0, atol=1e-3)
    assert (np.abs(np.angle(middle / wanted)) < np.pi / 4).all() and (share < 1).all()


def test_that_a_layout_survives_being_written_as_json(files):
    with open_archive(files / "pairs.nc") as archive:
        record = json.loads(json.dumps(archive.layout))
        again = layout_from_record(record)
    assert layout_record(again) == archive.layout and again.dim == archive.dim == 12
    assert again.left_out.tolist() == [6] and [f.units for f in again.fields] == ["K", "m s-1"]
    with pytest.raises(ValueError, match="layout: expected variables"):
        layout_from_record({"variables": [{}]})


@pytest.mark.parametrize("order", [("time", "member", "lat", "lon"), ("lat", "time", "lon", "member")])
def test_that_an_archive_reads_any_stretch_whatever_the_order_of_dimensions(tmp_path, order):
    pairs = world(30)[["temperature_background", "temperature_analysis"]].expand_dims(member=4).transpose(*order)
    pairs.to_netcdf(tmp_path / "pairs.nc")
    samples = [d for d in order if d in ("time", "member")]
    whole = pairs.temperature_analysis.transpose(*samples, "lat", "lon").values.reshape(120, 12)
    whole = np.delete(whole, 6, axis=1)
    with open_archive(tmp_path / "pairs.nc") as archive:
        for first, last in ((0, 120), (0, 1), (3, 4), (3, 9), (5, 7), (7, 99), (119, 120)):
            assert np.array_equal(archive.read(first, last)[1], whole[first:last])
        with pytest.raises(ValueError, match="expected a stretch of the 120 pairs, got 5 to 121"):
            archive.read(5, 121)


def test_that_an_archive_may_be_groups_several_files_or_a_zarr_store(tmp_path):
    pairs = world(20)
    for role in ("background", "analysis"):
        fields = {f"{n}_{role}": n for n in ("temperature", "wind")}
        pairs[list(fields)].rename(fields).to_netcdf(tmp_path / "groups.nc", group=role, mode="a" if role == "analysis" else "w")
    for part in range(2):
        pairs.isel(time=slice(10 * part, 10 * part + 10)).to_netcdf(tmp_path / f"part{part}.nc")
    renamed = pairs.rename({n: n.replace("background", "forecast").replace("analysis", "reanalysis") for n in pairs.data_vars})
    renamed.to_netcdf(tmp_path / "renamed.nc")
    pairs.to_netcdf(tmp_path / "one.nc")
    opened = [open_archive(tmp_path / "one.nc"), open_archive(tmp_path / "groups.nc"), open_archive(tmp_path / "part*.nc")]
    opened.append(open_archive(tmp_path / "renamed.nc", roles=("forecast", "reanalysis")))
    try:
        import zarr  # noqa: F401

        pairs.to_zarr(tmp_path / "pairs.zarr", consolidated=False)
        opened.append(open_archive(tmp_path / "pairs.zarr"))
    except ImportError:
        pass
    first = opened[0].read(0, 20)
    for other in opened[1:]:
        assert all(torch.equal(x, y) for x, y in zip(first, other.read(0, 20)))
        assert other.layout["variables"] == opened[0].layout["variables"]
    assert len({a.count for a in opened}) == 1


def test_that_an_archive_that_was_changed_is_another(tmp_path):
    pairs = world(30)
    pairs.to_netcdf(tmp_path / "pairs.nc")
    with open_archive(tmp_path / "pairs.nc") as archive:
        before = archive.identity
        assert before == archive.identity
    pairs.temperature_analysis[15] += 1.0
    pairs.to_netcdf(tmp_path / "pairs.nc")
    with open_archive(tmp_path / "pairs.nc") as archive:
        assert archive.identity != before


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda p: p.drop_vars("wind_analysis"), "expected a variable 'wind_analysis'"),
        (lambda p: p.assign(wind_analysis=p.wind_analysis.assign_attrs(units="km")), "expected units"),
        (lambda p: p.isel(time=0, drop=True), "expected a dimension that counts pairs"),
        (lambda p: p.isel(time=slice(0)), "expected pairs"),
        (lambda p: p.rename(temperature_analysis="t_analysis"), "expected a variable"),
        (lambda p: p.assign(wind_analysis=("t", np.zeros(30))), "got"),
    ],
)
def test_that_an_archive_that_does_not_fit_is_one_clear_line(tmp_path, change, message):
    change(world(30)).to_netcdf(tmp_path / "pairs.nc")
    with pytest.raises(ValueError, match=message) as caught:
        open_archive(tmp_path / "pairs.nc")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "place, message",
    [
        ((7, 0, 0), "got nan in the analysis of temperature of pair 7"),
        ((9, 1, 2), "to be missing always, got values in the analysis of pair 9"),
    ],
)
def test_that_gaps_and_values_where_there_should_be_none_are_found_when_read(tmp_path, place, message):
    pairs = world(30)
    pairs.temperature_analysis[place] = np.nan if place[0] == 7 else 280.0
    pairs.to_netcdf(tmp_path / "pairs.nc")
    with open_archive(tmp_path / "pairs.nc") as archive, pytest.raises(ValueError, match=message):
        archive.read(0, 30)


def test_that_states_come_back_as_they_were(states, files):
    with xr.open_dataset(files / "today.nc") as today:
        assert states.values.shape == (1, 1, 12)
        back = states.dataset(states.values)
        assert back.equals(today) and back.temperature.attrs == today.temperature.attrs


def test_that_names_with_a_role_get_the_other_role(tmp_path, files):
    world(3).isel(time=[2]).to_netcdf(tmp_path / "roles.nc")
    with open_archive(files / "pairs.nc") as archive:
        states = read_states(tmp_path / "roles.nc", archive.state)
    assert sorted(states.dataset(states.values)) == ["temperature_analysis", "wind_analysis"]


def test_that_stations_see_what_xarray_interpolates(states, tmp_path, files):
    random = np.random.default_rng(3)
    lat, lon = random.uniform(41, 59, 40), random.uniform(0, 270, 40)
    away = np.abs(lon - 180) > 90  # from the hole, which interpolation would touch
    lat, lon = lat[away], lon[away]
    count = len(lat)
    assert count > 5
    listed = stations(
        value=("station", np.zeros(count)),
        error=("station", np.ones(count)),
        variable=None,
        units=None,
        lat=("station", lat),
        lon=("station", lon),
    ).rename(value="temperature", error="temperature_error")
    listed.temperature.attrs["units"] = "K"
    listed.to_netcdf(tmp_path / "s.nc")
    with xr.open_dataset(files / "today.nc") as today:
        wanted = today.temperature[0].interp(lat=("s", lat), lon=("s", lon)).values
    sightings = read_observations(tmp_path / "s.nc", states)
    assert isinstance(sightings.operator, Interpolate) and np.allclose(sightings.operator(states.values[0, 0]), wanted)


def test_that_a_value_sees_its_point_by_index_and_by_coordinate(states, tmp_path):
    stations(lat=None, lon=None, lat_index=("station", [1, 2, 0]), lon_index=("station", [1, 3, 0])).to_netcdf(tmp_path / "i.nc")
    stations(lat=None, lon=None, index=("station", [5, 11, 0])).to_netcdf(tmp_path / "f.nc")
    stations(lat=("station", [50.0, 40.0, 0.0]), lon=("station", [90.0, 270.0, 0.0])).to_netcdf(tmp_path / "c.nc")
    operators = [read_observations(tmp_path / name, states).operator for name in ("i.nc", "f.nc", "c.nc")]
    assert all(isinstance(H, Select) and H.indices == (5, 10, 11) for H in operators)  # point 6 is not in the state


def test_that_a_packed_background_gives_an_analysis_that_is_not_cut(files, tmp_path):
    with xr.open_dataset(files / "today.nc") as today:
        packed = today.load()
    packing = {"dtype": "int16", "scale_factor": 1e-3, "add_offset": 280.0, "_FillValue": -32768}
    packed.to_netcdf(tmp_path / "packed.nc", encoding={"temperature": packing})
    with open_archive(files / "pairs.nc") as archive:
        states = read_states(tmp_path / "packed.nc", archive.state)
    states.dataset(states.values + 50).to_netcdf(tmp_path / "out.nc")
    with xr.open_dataset(tmp_path / "out.nc") as out:
        moved = (out.temperature - packed.temperature).values
    assert np.isfinite(moved).sum() == 11 and np.nanmax(np.abs(moved - 50)) < 2e-3


def test_that_files_of_an_archive_come_in_their_order_and_once(tmp_path):
    pairs = world(30)
    pairs = pairs.assign_coords(time=np.datetime64("2020-01-01", "ns") + np.arange(30) * np.timedelta64(1, "D"))
    for part in (1, 2, 10):
        first = {1: 0, 2: 10, 10: 20}[part]
        pairs.isel(time=slice(first, first + 10)).to_netcdf(tmp_path / f"y_{part}.nc")
    pairs.to_netcdf(tmp_path / "whole.nc")
    with open_archive(tmp_path / "y_*.nc") as parts, open_archive(tmp_path / "whole.nc") as whole:
        assert torch.equal(parts.read(0, 30)[0], whole.read(0, 30)[0])
    pairs.isel(time=slice(10)).to_netcdf(tmp_path / "y_11.nc")
    with pytest.raises(ValueError, match="files of different times"):
        open_archive(tmp_path / "y_*.nc")


def test_that_what_is_seen_twice_counts_twice(states, tmp_path):
    stations(lat=("station", [50.0, 50.0, 0.0]), lon=("station", [90.0, 90.0, 0.0])).to_netcdf(tmp_path / "twice.nc")
    H = read_observations(tmp_path / "twice.nc", states).operator
    assert H.size == 3 and torch.equal(H.jacobian(states.values[0, 0])[0], H.jacobian(states.values[0, 0])[1])


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"units": ("station", ["K", "K", "km"])}, "expected units 'm s-1' as of wind"),
        ({"units": None}, "got none"),
        ({"variable": None}, "names the field of each station"),
        ({"variable": ("station", ["temperature", "salt", "wind"])}, "expected one of temperature, wind, got 'salt'"),
        ({"error": None}, "standard deviations"),
        ({"error": ("station", [0.1, -0.2, 0.1])}, "expected positive standard deviations of errors, got -0.2 for station 2"),
        ({"lat": ("station", [50.0, 70.0, 0.0])}, "expected stations between 40 and 60, got 70 for station 2"),
        ({"lat": None}, "expected where stations are along lat"),
        (
            {"lat": ("station", [50.0, 50.0, 0.0]), "lon": ("station", [90.0, 180.0, 0.0])},
            "station 2 .lat 50, lon 180. at points that the archive leaves out",
        ),
        ({"value": ("station", [np.inf, 279.0, 0.5])}, "1 infinite"),
        ({"value": ("station", [np.nan, np.nan, np.nan])}, "at least one value"),
        ({"value": None}, "expected a variable 'value' or one named as a field"),
        ({"index": ("station", [0, 12, 0]), "lat": None, "lon": None}, "whole numbers from 0 to 11, got 12"),
        ({"index": ("station", [5, 0, 0])}, "to name the same places"),
        ({"time": ("time", [5])}, "expected the background's time"),
    ],
)
def test_that_observations_that_do_not_fit_are_one_clear_line(states, tmp_path, changes, message):
    data = stations(**changes)
    (data.set_coords("time") if "time" in changes else data).to_netcdf(tmp_path / "wrong.nc")
    with pytest.raises(ValueError, match=message) as caught:
        read_observations(tmp_path / "wrong.nc", states, strict=True)
    assert "\n" not in str(caught.value)


def test_that_members_of_one_time_stay_together_whatever_the_order_in_the_file(tmp_path):
    pairs = world(10).expand_dims(member=3)
    for name, order in (("a", ("member", "time", "lat", "lon")), ("b", ("time", "member", "lat", "lon"))):
        pairs.transpose(*order).to_netcdf(tmp_path / f"{name}.nc")
    with open_archive(tmp_path / "a.nc") as a, open_archive(tmp_path / "b.nc") as b:
        assert all(torch.equal(x, y) for x, y in zip(a.read(0, 30), b.read(0, 30)))
        x = a.read(0, 6)[1]
        assert torch.equal(x[0], x[2]) and not torch.equal(x[2], x[3])  # three members of the first time, then the next


@pytest.mark.parametrize(
    "text, message",
    [
        (
            "value, error, variable, units, lat, lon, time\n281, 0.1, temperature, K, 50, 90, 1999-09-09\n",
            "expected the background's time",
        ),
        (
            "value,error,variable,units,lat,lon\nwarm,0.1,temperature,K,50,90\n2,0.1,temperature,K,50,90\n",
            "expected numbers in column 'value', got 'warm' in row 1",
        ),
        ("value;error;variable\n281;0.1;temperature\n", "separated by commas, got semicolons"),
        ("value,error,variable,lat,lon\n281,0.1,temperature,50,90\n", "got none (an attribute `units`, or a column of a table)"),
        ("value,error,time\n1,2,2020-01-01\n3,4,2021-01-01\n", "expected the background's time (2026-11-22), got 2020-01-01"),
    ],
)
def test_that_a_table_that_does_not_fit_is_one_clear_line(files, tmp_path, text, message):
    (tmp_path / "s.csv").write_text(text)
    with open_archive(files / "pairs.nc") as archive, xr.open_dataset(files / "today.nc") as today:
        dated = today.load().assign_coords(time=[np.datetime64("2026-11-22", "ns")])
        dated.to_netcdf(tmp_path / "dated.nc")
        states = read_states(tmp_path / "dated.nc", archive.state)
    with pytest.raises(ValueError, match=message.replace("(", r"\(").replace(")", r"\)")):
        read_observations(tmp_path / "s.csv", states, strict=True)


def test_that_a_table_with_blanks_and_gaps_is_read(states, tmp_path):
    (tmp_path / "s.csv").write_text(
        "value, error, variable, units, lat, lon\n281, 0.1, temperature, K, 50, 90\n , 0.1, wind, m s-1, , \n0.5, 0.1, "
        "wind, m s-1, , \n"
    )
    sightings = read_observations(tmp_path / "s.csv", states)
    assert sightings.values.tolist() == [[281, 0.5]] and sightings.skipped == (("without a value", 1, ("row 2",)),)
    assert read_observations(tmp_path / "s.csv", states, strict=True).values.shape == (1, 3)


# ---------------------------------------------------------------- operations


def test_that_the_pairs_set_aside_are_the_last_and_never_trained_on(files):
    with open_archive(files / "pairs.nc") as archive:
        parts = set_aside(archive)
        assert [p.count for p in parts] == [320, 40, 40]
        joined = [torch.cat(x) for x in zip(*(p.read() for p in parts))]
        assert all(torch.equal(x, y) for x, y in zip(joined, archive.read(0, 400)))
        assert len({p.identity for p in parts}) == 3
        with pytest.raises(ValueError, match="at least 50 pairs, got 49"):
            set_aside(Part(archive, 0, 49))


def test_that_the_errors_measured_around_a_conditional_mean_have_its_covariance():
    dim, n = 3, 40_000
    A = torch.tensor([[0.9, 0.1, 0], [0, 0.8, 0.1], [0.1, 0, 0.7]], dtype=torch.float64)
    S = torch.tensor([[0.5, 0.3, 0.1], [0.3, 0.4, 0.2], [0.1, 0.2, 0.3]], dtype=torch.float64)
    background = standard_normal((n, dim), stream(1))
    analysis = background @ A.T + standard_normal((n, dim), stream(2)) @ torch.linalg.cholesky(S).T

    class Exact:
        """The conditional mean at pseudo-time 0, which is all that one iteration asks for."""

        def __init__(self):
            self.dim, self.attached = dim, {}

        def source(self, shape, generator):
            return standard_normal(shape, generator)

        def __call__(self, b):
            return Fixed(dim, lambda b: b @ A.T)(b)

    from pnpda_nb.operations.errors import Fixed
    from pnpda_nb.pnp import residual_covariance

    measured = residual_covariance(Exact(), background, analysis, (0.0,), stream(3), rank=dim).errors[0]
    assert torch.allclose(measured.factor @ measured.factor.T, S, atol=0.02)


def test_that_attached_errors_survive_the_file(files, tmp_path):
    prior = FlowPrior.load(files / "prior.safetensors")
    with open_archive(files / "pairs.nc") as archive:
        again = attach_errors(prior, *archive.read(300, 400), stream(0))
    loaded = FlowPrior.load(again.save(tmp_path / "p.safetensors"))
    assert len(attached_errors(loaded).errors) == 6 and loaded.layout == prior.layout
    assert torch.equal(attached_errors(loaded).errors[3].factor, attached_errors(again).errors[3].factor)
    assert pnpda_with(loaded).data_step == "kalman" and pnpda_with(loaded, 7).iterations == 7
    bare = FlowPrior(prior.network, prior.location, prior.scale, prior.architecture, factor=prior.factor, units=prior.units)
    assert attached_errors(bare) is None and pnpda_with(bare).data_step == "gradient"


def test_that_a_report_escapes_what_it_is_given_and_is_only_html_or_markdown(tmp_path):
    report = Report("a < b & c")
    report.text("<script>")
    assert "<script>" not in report.html() and "a &lt; b &amp; c" in report.html()
    with pytest.raises(ValueError, match="ends in .html or .md"):
        report.write(tmp_path / "report.pdf")
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- from the shell


def test_that_the_shell_trains_and_assimilates_as_python_does(files, tmp_path, forked):
    words = ["--kind", "blind", "--epochs", "2", "--report", "p.md"]
    trained = forked("train", files / "pairs.nc", "--out", "p.safetensors", *words, folder=tmp_path)
    assert trained.returncode == 0 and "pairs that were set aside" in trained.stdout, trained.stderr
    assert (tmp_path / "p.md").read_text().count("![") == 2 and len(list((tmp_path / "p_files").glob("*.png"))) == 2
    assert FlowPrior.load(tmp_path / "p.safetensors").layout["variables"][0]["units"] == "K"
    for name in ("a", "b"):
        line = [
            "assimilate",
            "--prior",
            "p.safetensors",
            "--background",
            files / "today.nc",
            "--observations",
            files / "stations.nc",
        ]
        done = forked(*line, "--out", f"{name}.nc", folder=tmp_path)
        assert done.returncode == 0, done.stderr
    with (
        xr.open_dataset(tmp_path / "a.nc") as a,
        xr.open_dataset(tmp_path / "b.nc") as b,
        xr.open_dataset(files / "today.nc") as today,
    ):
        assert a.equals(b) and a.sizes == today.sizes and a.temperature.attrs["units"] == "K"
        assert np.isnan(a.temperature[0, 1, 2]) and not a.equals(today)
        assert abs(float(a.wind[0]) - 0.5) < abs(float(today.wind[0]) - 0.5)
    assert "data:image/png;base64," in (tmp_path / "a.html").read_text()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.html", "a.nc", "b.html", "b.nc", "p.md", "p.safetensors", "p_files"]


def test_that_describe_says_what_a_file_is(files, forked):
    prior = forked("describe", files / "prior.safetensors")
    assert prior.returncode == 0 and "temperature" in prior.stdout and "FlowPrior" in prior.stdout
    archive = forked("describe", files / "pairs.nc")
    assert (
        archive.returncode == 0
        and "400 pairs of states of 12 numbers" in archive.stdout
        and "1 points are missing" in archive.stdout
    )


@pytest.mark.parametrize(
    "words, message",
    [
        ("train {}/today.nc --out n.safetensors", "expected a variable 'background'"),
        ("train {}/nowhere.nc --out n.safetensors", "no file"),
        ("train {}/pairs.nc --out n.safetensors --report n.pdf", "ends in .html or .md"),
        ("train {}/pairs.nc --out n.safetensors --memory 0", "memory: expected at least 1"),
        ("train {}/pairs.nc --out {}/pairs.nc", "which is read"),
        ("train {}/pairs.nc --out n.safetensors --names forecast", "expected two names"),
        ("train {}/pairs.nc --out n.safetensors --epochs 0", "epochs: expected at least 1, got 0"),
        ("train {}/pairs.nc --out .", "expected a file to write, got the folder ."),
        (
            "assimilate --prior {}/prior.safetensors --background {}/today.nc --observations {}/stations.nc --out n.csv",
            "ends in .nc",
        ),
        (
            "assimilate --prior {}/prior.safetensors --background {}/today.nc --observations {}/stations.nc --out n.nc "
            "--ensemble 0",
            "ensemble: expected at least 1",
        ),
        ("assimilate --prior {}/pairs.nc --background {}/today.nc --observations {}/stations.nc --out n.nc", "prior: "),
        (
            "assimilate --prior {}/prior.safetensors --background {}/stations.nc --observations {}/stations.nc --out n.nc",
            "expected a variable 'temperature'",
        ),
        (
            "assimilate --prior {}/prior.safetensors --background {}/today.nc --observations {}/today.nc --out n.nc",
            "standard deviations",
        ),
        (
            "assimilate --prior {}/prior.safetensors --background {}/today.nc --observations {}/stations.nc --out {}/today.nc",
            "which is read",
        ),
        (
            "assimilate --prior {}/prior.safetensors --background {}/today.nc --observations {}/stations.nc --out n.nc "
            "--iterations 0",
            "iterations: expected",
        ),
    ],
)
def test_that_a_wrong_command_is_one_line_and_writes_nothing(files, tmp_path, forked, words, message):
    before = {p.name: p.stat().st_mtime_ns for p in files.iterdir()}
    answer = forked(*words.replace("{}", str(files)).split(), folder=tmp_path)
    assert answer.returncode == 2 and message in answer.stderr and len(answer.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir()) and {p.name: p.stat().st_mtime_ns for p in files.iterdir()} == before


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.isel(lat=slice(2)), "with 3 points along lat, got 2"),
        (lambda t: t.assign(wind=t.wind.assign_attrs(units="K")), "expected units"),
        (lambda t: t.assign(temperature=t.temperature.isel(lon=0, drop=True)), "expected 'temperature' with dimensions (lat, lon)"),
        (lambda t: t.assign(temperature=t.temperature.where(t.lat < 60)), "expected finite values"),
    ],
)
def test_that_a_background_of_another_kind_is_refused_by_the_shell(files, tmp_path, forked, change, message):
    with xr.open_dataset(files / "today.nc") as today:
        change(today.load()).to_netcdf(tmp_path / "other.nc")
    line = [
        "assimilate",
        "--prior",
        files / "prior.safetensors",
        "--background",
        "other.nc",
        "--observations",
        files / "stations.nc",
        "--out",
        "new.nc",
    ]
    answer = forked(*line, folder=tmp_path)
    assert answer.returncode == 2 and message in answer.stderr and [p.name for p in tmp_path.iterdir()] == ["other.nc"]


def test_that_an_interrupted_training_from_a_shell_goes_on_where_it_was(files, tmp_path, forked):
    stop_after_two_epochs = """
from pnpda_nb.operations import pipeline
whole = pipeline.train_from
def interrupted(source, settings, **options):
    def stop(epoch, row):
        if epoch == 2: raise KeyboardInterrupt
    return whole(source, settings, callback=stop, **options)
pipeline.train_from = interrupted
"""
    line = ["train", files / "pairs.nc", "--out", "p.safetensors", "--kind", "blind", "--epochs", "4"]
    stopped = forked(*line, folder=tmp_path, before=stop_after_two_epochs)
    assert stopped.returncode == 130 and [p.name for p in tmp_path.iterdir()] == ["p.safetensors.training"], stopped.stderr
    assert forked(*line, folder=tmp_path).returncode == 0
    assert not Path(tmp_path / "p.safetensors.training").exists()
    assert FlowPrior.load(tmp_path / "p.safetensors").training["epochs"] == 4  # that they are the same: test_prior_files
