"""Observations as their users have them: several times in one file, some times only, errors that change, grids in another order."""

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr

from pnpda_nb import sweep
from pnpda_nb.cli import training
from pnpda_nb.core import standard_normal, stream
from pnpda_nb.files import Axis, Field, Layout, read_observations, read_states
from pnpda_nb.files.layout import layout_record
from pnpda_nb.files.states import States
from pnpda_nb.files.stations import StationObservations
from pnpda_nb.flow_matching import TensorPairs, TrainingSettings
from pnpda_nb.observing import DiagonalCovariance, Interpolate, Linear, Observations, Select, kalman_update
from pnpda_nb.operations import AwarePrior, AwareSettings, Networks, learn_archive, train_archive, verdicts
from pnpda_nb.operations.aware import look_at
from pnpda_nb.operations.errors import attached_errors
from pnpda_nb.operations.quality import _covariance, check_observations, likely
from pnpda_nb.operations.report import innovations

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
        ("b,280,0.6", "b,280,", "expected positive standard deviations of errors, got nan for row 4 (b)"),
        ("b,280,0.6", "b,many,0.6", "expected numbers in column 'value', got 'many' in row 4"),
        (",time", ",when", "with the dimension time of the background"),
    ],
)
def test_that_a_table_of_other_times_is_one_line(files, forked, old, new, said):
    (files / "wrong.csv").write_text(rows(ROWS.replace(old, new)))
    before = sorted(p.name for p in files.iterdir())
    answer = analysed(files, forked, "wrong", "--observations", "wrong.csv", "--strict", status=2)
    assert said in answer.stderr and answer.stderr.count("\n") == 1 and before == sorted(p.name for p in files.iterdir())


BAD = """station,value,error,units,lat,lon,time
a,281,0.2,K,50,60,{0}
b,279,0.3,K,-50,120,{0}
c,280,0.2,K,50,60,2031-01-01
c,280,0.2,K,50,60,yesterday
d,280,0.2,K,85,60,{0}
,280,0.2,K,0,240,{2}
e,,0.2,K,50,60,{2}
f,many,0.2,K,50,60,{2}
g,281,-9,K,50,60,{2}
h,281,,K,50,60,{2}
i,inf,0.2,K,50,60,{2}
j,281,0.2,K,here,60,{2}
a,280.5,0.2,K,50,60,{2}
k,-9999,0.2,K,50,0,{2}
"""
WHY = {
    "without a value": (1, "row 7 (e)"),
    "with a value that is no number": (2, "row 8 (f): many"),
    "with an error that is not positive": (2, "row 9 (g): -9"),
    "of a time that the background does not have": (2, "row 3 (c): time 2031-01-01"),
    "outside the grid": (1, "row 5 (d): lat 85"),
    "without a place": (1, "row 12 (j): lat here"),
    "on land, or other points that the archive leaves out": (1, "row 6 (lat 0, lon 240)"),
}


def test_that_bad_rows_are_left_out_counted_and_listed_and_the_others_used(files, states, forked, tmp_path):
    (files / "bad.csv").write_text(rows(BAD))
    believing = replace(states, layout=states.layout.with_held({"t": (270.0, 290.0)}))
    seen = read_observations(files / "bad.csv", believing)
    assert np.array_equal(seen.values[[0, 2]], [[281, 279, np.nan], [280.5, np.nan, np.nan]], equal_nan=True)
    assert {reason: (count, first[0]) for reason, count, first in seen.skipped} == WHY
    assert seen.refused == (("t", "row 14 (k)", -9999.0),) and seen.unused.startswith("10 of 14 observations were not used")
    whole, said = analysed(files, forked, "bad", "--observations", "bad.csv")
    good = "\n".join(line for line in rows(BAD).splitlines() if line[0] in "ab" or line.startswith(("station", "k")))
    (files / "good.csv").write_text(good)
    (warning,) = [line for line in said.splitlines() if line.startswith("WARNING: 10 of 14")]
    page = (files / "bad.html").read_text()
    assert all(first in warning and first in page for _, first in WHY.values())
    fine, said = analysed(files, forked, "good", "--observations", "good.csv")
    assert np.allclose(whole.t_analysis, fine.t_analysis, equal_nan=True) and "WARNING" not in said
    head, *others = rows(BAD).splitlines()
    for text, words in (
        ("\n".join([head, *others[2:12]]), "time: expected"),
        (rows(BAD).replace("units", "unit"), "expected units"),
    ):
        (tmp_path / "none.csv").write_text(text)
        with pytest.raises(ValueError, match=f"^observations .*{words}") as caught:
            read_observations(tmp_path / "none.csv", states)
        assert "\n" not in str(caught.value)


def test_that_times_places_and_errors_of_a_netcdf_file_that_cannot_be_used_are_left_out(states, tmp_path):
    data = {"value": (("time", "station"), np.full((2, 3), 281.0), {"units": "K"}), "error": (("time", "station"), np.ones((2, 3)))}
    where = {"lat": ("station", [50.0, -50.0, 85.0]), "lon": ("station", [60.0, 120.0, 0.0]), "time": TIMES[[116, 117]]}
    world = xr.Dataset(data, where)
    world.error[1, 1] = 0.0
    world.to_netcdf(tmp_path / "o.nc")
    seen = read_observations(tmp_path / "o.nc", states)
    assert np.array_equal(seen.values[0], [281, np.nan], equal_nan=True) and np.isnan(seen.values[1:]).all()
    count = {reason: count for reason, count, _ in seen.skipped}
    assert count == {
        "with an error that is not positive": 1,
        "of a time that the background does not have": 3,
        "outside the grid": 1,
    }
    assert "station 3 (lat 85, lon 0): lat 85" in seen.unused and "5 of 6 observations" in seen.unused
    field = xr.DataArray(
        np.full((3, 3, 6), 281.0), {k: states.arrays["t"][k] for k in ("time", "lat", "lon")}, attrs={"units": "K"}
    )
    xr.Dataset({"t": field, "t_error": 0.5}).isel(lat=[2, 1, 0]).to_netcdf(tmp_path / "g.nc")
    grid = read_observations(tmp_path / "g.nc", states)
    assert grid.values.shape == (3, 17) and grid.skipped[0][1] == 3 and "lat 0, lon 240" in grid.unused
    with pytest.raises(ValueError, match="at the 1 points that the archive leaves out"):
        read_observations(tmp_path / "g.nc", states, strict=True)


def test_that_stations_that_move_are_said_to_and_not_to_be_missing(states, tmp_path):
    lines = [f"ship,{280 + k},0.2,K,50,{60 * k},{{{k}}}" for k in range(3)]
    (tmp_path / "o.csv").write_text(rows("\n".join([ROWS.splitlines()[0], *lines])))
    seen = read_observations(tmp_path / "o.csv", states)
    assert repr(seen) == "StationObservations(3 values of t at 3 places, of stations that move)"
    assert "missing" not in innovations(states, states.values, seen)
    (tmp_path / "o.csv").write_text(rows())
    assert "missing" in innovations(states, states.values, read_observations(tmp_path / "o.csv", states))


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


def test_that_workers_of_a_cluster_give_the_bytes_of_none(files, forked):
    (files / "w.csv").write_text(rows())
    given = "--observations", "w.csv", "--members", 2
    here, _ = analysed(files, forked, "here", *given)
    distributed = pytest.importorskip("distributed")
    options = {"processes": False, "protocol": "tcp://", "threads_per_worker": 1, "dashboard_address": None}
    with distributed.LocalCluster(2, **options) as cluster:
        there, _ = analysed(files, forked, "there", *given, "--scheduler", cluster.scheduler_address)
    for name in here.data_vars:
        assert here[name].values.tobytes() == there[name].values.tobytes()
    answer = analysed(files, forked, "nowhere", *given, "--scheduler", "nowhere", status=2)
    assert "scheduler: expected an address such as tcp://host:8786, got 'nowhere'" in answer.stderr


def test_that_workers_of_another_version_and_a_cluster_that_goes_away_are_one_line(monkeypatch):
    versions = iter(["one", "another"])
    monkeypatch.setattr(sweep, "code_version", lambda: next(versions))
    with ThreadPoolExecutor(1) as pool, pytest.raises(ConnectionError, match="^scheduler: its workers cannot do this .* another"):
        list(sweep._spread_over((pool, 1, None, lambda: 1))(len, ["a"]))
    monkeypatch.undo()
    with ThreadPoolExecutor(1) as pool:
        spread = sweep._spread_over((pool, 1, None, lambda: 1))
        assert list(spread(pow, [2, 3], [3, 2])) == [8, 9]
        with pytest.raises(ValueError, match="invalid literal"):
            list(spread(int, ["x"]))
        monkeypatch.setattr(pool, "submit", lambda *given: cancelled())
        with pytest.raises(ConnectionError, match="^scheduler: the cluster went away"):
            list(spread(len, ["a"]))


def cancelled() -> Future:
    future = Future()
    future.cancel()
    future.set_running_or_notify_cancel()
    return future


def test_that_a_gross_error_in_a_mean_over_many_points_is_rejected():
    """The errors of 24 points are independent: those of their mean are much smaller."""
    points, draws = 24, stream(3)
    b = torch.randn(500, points, generator=draws).double()
    a = b + torch.randn(500, points, generator=draws).double()
    axis = Axis(tuple(range(points)), "km", float(points))
    layout = Layout((Field("u", (points,), ("x",)),), {"x": axis})
    source = TensorPairs(b[:400], a[:400], "means", 50, layout_record(layout))
    prior = learn_archive(source, AwareSettings(epochs=1, steps=3, batch=16, width=8)).prior
    states = States(b[400:, None], layout, {"u": xr.DataArray(np.empty(100), dims="case")}, ("case",), ())
    mean = a[400:].mean(1, keepdim=True).numpy() + 0.05 * np.random.default_rng(0).standard_normal((100, 1))

    def rejected(gross: float) -> int:
        whole = np.arange(points)[None], np.full((1, points), 1 / points)
        seen = StationObservations(mean + gross, np.array([0.05]), ("u",), *whole, points)
        return len(check_observations(prior, states, seen)[1])

    assert rejected(0.0) <= 2 and rejected(1.5) == 100


def test_that_runs_that_are_spread_over_workers_are_as_one_after_the_other(files, states, monkeypatch):
    (files / "s.csv").write_text(rows())
    prior, seen = AwarePrior.load(files / "prior.safetensors"), read_observations(files / "s.csv", states)
    monkeypatch.setattr(verdicts, "_TOGETHER", 1)
    parts = []
    with ThreadPoolExecutor(2) as pool:

        def spread(*given):
            parts.append(list(pool.map(*given)))
            return parts[-1]

        found = verdicts.analyse_states(prior, states, seen, draws=2, through=spread)
    assert [len(part[0]) for part in parts[0]] == [1, 1, 1]
    assert all(torch.equal(x, y) for x, y in zip(found, verdicts.analyse_states(prior, states, seen, draws=2)))


def test_that_a_field_of_which_every_value_was_refused_is_a_warning():
    values, refused = (
        np.array([[np.nan, np.nan, 0.1], [np.nan, np.nan, np.nan]]),
        (("sst", "row 1", 300.0), ("sst", "row 2", 301.0), ("u", "row 3", 99.0)),
    )
    seen = StationObservations(values, np.ones(3), ("sst", "sst", "u"), np.arange(3)[:, None], np.ones((3, 1)), 3, refused)
    said = training._unused(seen)
    assert said == "WARNING: none of 2 value(s) of sst was used, all beyond what the archive held: other units?"


def test_that_an_error_that_grows_with_time_is_believed_less(files, forked):
    (files / "e.csv").write_text(rows("value,error,units,lat,lon,time\n285,0.1,K,0,0,{0}\n285,0.1,K,0,0,{1}\n285,9,K,0,0,{2}\n"))
    found, _ = analysed(files, forked, "e", "--observations", "e.csv", "--reject", 0)
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


GROSS = """station,value,error,units,lat,lon,time
a,{value},0.2,K,50,60,{t}
b,280.1,0.3,K,50,0,{t}
c,280.2,0.3,K,50,120,{t}
"""


def test_that_a_gross_error_is_rejected_listed_and_as_if_it_had_not_been_seen(files, forked):
    today = xr.load_dataset(files / "today.nc").t_background.isel(time=0).sel(lat=50).values
    near = GROSS.replace("280.1", f"{today[0] + 0.5}").replace("280.2", f"{today[2] + 0.5}")
    (files / "g.csv").write_text(near.format(value=today[1] + 40, t=TIMES[117]))
    (files / "l.csv").write_text("\n".join(line for line in near.format(value=0, t=TIMES[117]).splitlines() if line[0] != "a"))
    checked, said = analysed(files, forked, "checked", "--observations", "g.csv")
    assert "1 of 3 observations rejected, as less likely than 3.5 standard deviations" in said and "2026-01-30T06:00:00" in said
    page = (files / "checked.html").read_text()
    assert "rejected as unlikely" in page and "<td>a</td><td>time 2026-01-30T06:00:00</td>" in page
    less, said = analysed(files, forked, "less", "--observations", "l.csv")
    assert "0 of 2 observations rejected" in said
    assert np.allclose(checked.t_analysis, less.t_analysis, rtol=1e-7, equal_nan=True)
    believed, said = analysed(files, forked, "believed", "--observations", "g.csv", "--reject", "none")
    assert "No observation was checked" in said and abs(believed.t_analysis - checked.t_analysis).max() > 10
    for words, sign in (("-1", "-1"), ("many", "many"), ("inf", "inf")):
        answer = analysed(files, forked, "none", "--observations", "g.csv", "--reject", words, status=2)
        assert f"reject: expected a number of standard deviations, at least 0, or none, got '{sign}'" in answer.stderr


def test_that_clean_observations_are_kept_and_gross_errors_are_caught_also_between_points_and_by_a_blind_prior():
    draws = stream(3)
    b = torch.randn(700, 12, generator=draws).double()
    a = b + (b + 0.3).abs() * (b.roll(1, -1) + torch.randn(700, 12, generator=draws)) / 2  # errors depend on the state
    layout = Layout((Field("u", (12,), ("x",)),), {"x": Axis(tuple(range(12)), "km", 12.0)})
    pairs = TensorPairs(b[:400], a[:400], "tails", 50, layout_record(layout))
    settings = TrainingSettings(hidden=(16,), batch=32, epochs=2, source="background", target="increment")
    seeing = learn_archive(pairs, AwareSettings(epochs=1, steps=3, batch=16, width=8)).prior
    states = States(b[400:, None], layout, {"u": xr.DataArray(np.empty(300), dims="case")}, ("case",), ())
    points, weights = np.stack([np.arange(0, 12, 2), np.arange(1, 13, 2)], 1), np.full((6, 2), 0.5)
    truth = (a[400:, points] * torch.from_numpy(weights)).sum(-1)
    values = (truth + 0.3 * torch.randn(300, 6, generator=draws)).numpy()
    values[::7, 2] = np.nan
    seen = StationObservations(values, np.full((300, 6), 0.3), ("u",) * 6, points, weights, 12)
    wrong = torch.rand(300, 6, generator=draws).numpy() < 0.05
    for prior in (seeing, train_archive(pairs, settings).prior):
        errors = prior.linear.errors if prior is seeing else attached_errors(prior).errors[0]
        far = 10 * np.sqrt(_covariance(errors, points, weights).diagonal().numpy() + 0.09)
        kept, none = check_observations(prior, states, seen)
        less, table = check_observations(prior, states, replace(seen, values=values + far * wrong))
        gone = np.isnan(less.values) & ~np.isnan(values)
        assert len(none) < 0.01 * values.size and np.isnan(kept.values).sum() == np.isnan(values).sum() + len(none)
        assert gone[wrong & ~np.isnan(values)].mean() > 0.95 and gone[~wrong].mean() < 0.01 and len(table) == gone.sum()
    with pytest.raises(ValueError, match="reject: expected a positive number"):
        check_observations(prior, states, seen, 0.0)


def test_that_a_training_may_have_networks_like_those_of_an_example(files, forked):
    (files / "like.csv").write_text(ROWS.format("one", "two", "three"))  # times of no archive
    words = ["train", "pairs.nc", "--out", "like.safetensors", "--epochs", 1, "--observations", "like.csv"]
    answer = forked(*words, folder=files)
    assert answer.returncode == 0, answer.stderr
    wanted = "The networks saw 0.078 to 0.18 of the points of t (errors of 0.133 to 0.9 K)"
    assert wanted in answer.stdout and "0.078 to 0.18 of the points of t" in (files / "like.html").read_text()
    low, high, small, large = AwarePrior.load(files / "like.safetensors").training["networks"]["fields"][0]
    assert (low, high) == pytest.approx((2 / 17 / 1.5, 2 / 17 * 1.5)) and (small, large) == pytest.approx((0.2 / 1.5, 0.9))
    for more, said in ((["--kind", "blind"], "observations: expected none with a prior of kind blind"), ([], "expected units 'K'")):
        (files / "like.csv").write_text(ROWS.replace("units", "unit") if not more else ROWS)
        answer = forked(*words, *more, folder=files)
        assert answer.returncode == 2 and said in answer.stderr and answer.stderr.count("\n") == 1


def test_that_networks_like_an_example_have_its_shares_and_errors_field_by_field():
    layout = Layout((Field("p", (400,), ("x",)), Field("q", (400,), ("x",)), Field("w", (2,), ("z",))), {})
    points = np.concatenate([np.arange(0, 400, 10), 400 + np.arange(0, 400, 2), 400 + np.arange(0, 400, 2)])  # q seen twice
    names = ("p",) * 40 + ("q",) * 400
    seen = StationObservations(
        np.zeros((2, 440)), np.repeat([0.5, 20.0], [40, 400]), names, points[:, None], np.ones((440, 1)), 802
    )
    networks, unit = Networks.like(seen, layout, around=1.0), torch.ones(802).double().index_fill(0, torch.arange(200), 0.0)
    mask, error = networks.draw(300, unit, list(layout.parts().values()), stream(0))
    assert not mask[:, :200].any() and not mask[:, 800:].any() and mask.any(1).all()
    assert float(mask[:, 200:400].double().mean()) == pytest.approx(0.1, rel=0.05)
    assert float(mask[:, 400:800].double().mean()) == pytest.approx(0.5, rel=0.05)
    assert torch.allclose(error[:, :400], torch.tensor(0.5).double()) and torch.allclose(
        error[:, 400:800], torch.tensor(20.0).double()
    )
    wide, error = Networks.like(seen, layout, around=2.0).draw(300, unit, list(layout.parts().values()), stream(0))
    shares = wide[:, 400:800].double().mean(1)
    assert 0.2 < shares.min() < 0.35 and shares.max() > 0.9 and 0.25 <= error[:, 0].min() < 0.3 and 0.9 < error[:, 0].max() <= 1.0
    for fields in (((0.5, 0.2, 1.0, 1.0),), ((0.1, 0.2, 2.0, 1.0),), ((0.0, 0.0, 1.0, 1.0),)):
        with pytest.raises(ValueError, match="fields: expected"):
            Networks(fields=fields)


def test_that_a_mean_over_a_box_is_seen_as_one(files, forked, states, tmp_path):
    (tmp_path / "o.csv").write_text(
        rows("value,error,units,lat,lon,lat_half_width,lon_half_width,time\n281,0.2,K,0,240,60,70,{0}\n281,0.2,K,25,30,,,{0}\n")
    )
    seen = read_observations(tmp_path / "o.csv", states)
    H = seen.operator.jacobian(torch.zeros(17).double())
    box = np.zeros((3, 6))
    box[:, 3:] = 1 / 8
    box[1, 4] = 0  # land
    assert np.allclose(H[0], np.delete(box.ravel(), 10)) and np.allclose(sorted(H[1][H[1] > 0]), 0.25)
    prior = AwarePrior.load(files / "prior.safetensors")
    prior = AwarePrior(prior.fields, prior.linear, prior.attached | {"learned": torch.zeros(()).double()}, prior.layout)
    R, R1 = DiagonalCovariance([0.04, 0.04]), DiagonalCovariance([0.04])
    given = [Observations(torch.from_numpy(seen.values[:1]), x, R) for x in (seen.operator, Linear(H))]
    by_matrix = kalman_update(prior.linear.errors, prior.linear.line(states.values[:1]), given[1])
    assert torch.allclose(look_at(prior, states.values[:1], given[0]).mean, by_matrix)
    at = seen.points[0, seen.weights[0].argmax()]
    point = Observations(torch.tensor([[281.0]]).double(), Select((int(at),), 17), R1)
    alone = Observations(
        given[0].values[:, :1], Interpolate(*(torch.from_numpy(x[:1]) for x in (seen.points, seen.weights)), 17), R1
    )
    narrow, wide = (look_at(prior, states.values[:1], x).residual.diagonal[0, 0, at] for x in (point, alone))
    B, factor = prior.linear.errors.matrix, prior.attached["calibration_seen"][at] ** 2
    exact = factor * (B[at, at] - (H[0] @ B[at]) ** 2 / (H[0] @ B @ H[0] + 0.04))
    assert narrow < wide and torch.isclose(wide, exact, rtol=1e-4)
    for old, new, said in (
        ("60,70", "-60,70", "to be positive or missing, got"),
        ("60,70", "some,70", "expected numbers in column"),
    ):
        text = (tmp_path / "o.csv").read_text().replace(old, new)
        (files / "box.csv").write_text(text)
        answer = analysed(files, forked, "none", "--observations", "box.csv", status=2)
        assert said in answer.stderr and answer.stderr.count("\n") == 1
    (files / "box.csv").write_text((tmp_path / "o.csv").read_text())
    _, said = analysed(files, forked, "box", "--observations", "box.csv")
    assert "of 2 observations rejected" in said


def test_that_one_gross_error_among_many_neighbours_is_alone_rejected():
    apart = (torch.arange(100)[:, None] - torch.arange(100)).abs()
    S = (torch.exp(-((apart / 8) ** 2)) + 0.01 * torch.eye(100)).double()
    d = torch.linalg.cholesky(S) @ standard_normal((40, 100, 1), stream(1, "innovations"))
    d[::2, 50] += 10.0
    kept, left, spread = likely(S.expand(40, -1, -1), d.squeeze(-1), torch.ones(40, 100, dtype=torch.bool), 4.0)
    assert not kept[::2, 50].any() and (~kept).sum() <= 22
    told = left[0, 50] / spread[0, 50], (d[0, 50] - S[50, kept[0]] @ torch.linalg.solve(S[kept[0]][:, kept[0]], d[0, kept[0]]))
    assert told[0] > 4 and torch.allclose(left[0, 50], told[1])
