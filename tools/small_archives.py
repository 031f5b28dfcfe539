"""Small archives of backgrounds and analyses, of worlds that are not in the book, to try `pnpda train` on.

    python tools/small_archives.py FOLDER [NAME ...]    write FOLDER/NAME.nc: plane, sphere, ring, loose, gaussian, smoke, eddies

In the first four the errors of backgrounds depend on the state, so that there is something to learn: a front and a height on a
doubly periodic plane that are displaced together; temperature and humidity on a sphere with land, packed, from north to south;
wind and smoke on a ring of twelve points with a wrong forcing; four coupled Lorenz-63 without neighbours. In the last one pairs are
jointly Gaussian.

Two have times and a forecast model, for `pnpda train FOLDER/NAME.nc --model tools/small_archives.py:NAME_forecast`: the ring again,
`smoke`, and vorticity with a tracer on a doubly periodic plane, `eddies`. Their backgrounds are forecasts from the analysis before,
with errors.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import xarray as xr


def smooth(random: np.random.Generator, count: int, shape: tuple[int, ...], waves: float) -> np.ndarray:
    """Periodic Gaussian fields `(count, *shape)` of variance one, with wavenumbers up to about `waves`."""
    axes = tuple(range(1, 1 + len(shape)))
    numbers = [n * np.fft.fftfreq(n) for n in shape[:-1]] + [shape[-1] * np.fft.rfftfreq(shape[-1])]
    squares = sum(k**2 for k in np.meshgrid(*numbers, indexing="ij"))
    spectrum = np.fft.rfftn(random.standard_normal((count, *shape)), axes=axes) * np.exp(-squares / (2 * waves**2))
    fields = np.fft.irfftn(spectrum, s=shape, axes=axes)
    return fields / fields.std()


def displaced(fields: np.ndarray, east: np.ndarray, north: np.ndarray) -> np.ndarray:
    """Periodic `fields` `(count, y, x)` at places that are so many points away."""
    count, ny, nx = fields.shape
    row, column = np.meshgrid(np.arange(ny), np.arange(nx), indexing="ij")
    y, x, sample = (row + north) % ny, (column + east) % nx, np.arange(count)[:, None, None]
    i, j = np.floor(y).astype(int) % ny, np.floor(x).astype(int) % nx
    b, a = y - np.floor(y), x - np.floor(x)

    def corner(k: int, m: int) -> np.ndarray:
        return fields[sample, (i + k) % ny, (j + m) % nx]

    return (1 - b) * ((1 - a) * corner(0, 0) + a * corner(0, 1)) + b * ((1 - a) * corner(1, 0) + a * corner(1, 1))


def walked(tendency: Callable[[np.ndarray], np.ndarray], state: np.ndarray, steps: int, dt: float) -> np.ndarray:
    """States after so many steps of Runge and Kutta's."""
    for _ in range(steps):
        a = tendency(state)
        b = tendency(state + dt / 2 * a)
        c = tendency(state + dt / 2 * b)
        state = state + dt / 6 * (a + 2 * b + 2 * c + tendency(state + dt * c))
    return state


def named(fields: dict, dims: tuple[str, ...], coords: dict) -> xr.Dataset:
    """`fields` by name, each with units, background and analysis."""
    pairs = {}
    for name, (units, background, analysis) in fields.items():
        for role, x in (("background", background), ("analysis", analysis)):
            pairs[f"{name}_{role}"] = (("time", *dims), x, {"units": units})
    return xr.Dataset(pairs, coords=coords | {"time": np.arange(len(analysis))})


def plane(count: int = 6000, size: int = 16) -> xr.Dataset:
    random, shape = np.random.default_rng(0), (size, size)
    height = smooth(random, count, shape, 2.0)
    front = np.tanh(2.0 * smooth(random, count, shape, 2.5) + 0.7 * height)
    east, north = (1.2 * smooth(random, count, shape, 1.2) for _ in range(2))
    wrong = [displaced(x, east, north) for x in (height, front)]
    wrong[0] = wrong[0] * (1 + 0.05 * smooth(random, count, shape, 1.0)) + 0.05 * smooth(random, count, shape, 4.0)
    wrong[1] = wrong[1] + 0.05 * smooth(random, count, shape, 4.0)
    along = (100.0 * np.arange(size), {"units": "km", "period": 100.0 * size})
    fields = {"height": ("m", wrong[0], height), "tracer": ("kg m-3", wrong[1], front)}
    return named(fields, ("y", "x"), {axis: (axis, *along) for axis in ("y", "x")})


def sphere(count: int = 6000, rows: int = 12, columns: int = 24) -> xr.Dataset:
    random, whole = np.random.default_rng(1), (2 * rows, columns)
    latitude = 90.0 - 180 / rows * (np.arange(rows) + 0.5)
    land = smooth(np.random.default_rng(99), 1, whole, 2.0)[0, :rows] > 0.6

    def field(waves: float) -> np.ndarray:
        return smooth(random, count, whole, waves)[:, :rows]

    weather = field(2.5)
    temperature = 285 - 30 * np.sin(np.deg2rad(latitude))[:, None] ** 2 + 4 * weather
    east, north = (0.6 * field(1.5) for _ in range(2))

    def moved(x: np.ndarray) -> np.ndarray:
        both = [np.concatenate(pair, 1) for pair in ((x, x[:, ::-1]), (east, east), (north, -north))]
        return displaced(*both)[:, :rows]

    def saturated(t: np.ndarray) -> np.ndarray:
        return 3.8e-3 * np.exp(0.0687 * (t - 273.15))

    warm = moved(temperature) + 0.3 * field(3.0) + 0.02 * (temperature - 285) * field(2.0)
    relative = 1 / (1 + np.exp(-2 * field(3.0) - 0.3 * weather))
    wet = moved(relative) * saturated(warm) * np.exp(0.1 * field(2.5))
    fields = {"temperature": ("K", warm, temperature), "humidity": ("kg kg-1", wet, relative * saturated(temperature))}
    masked = {name: (units, *(np.where(land, np.nan, x) for x in pair)) for name, (units, *pair) in fields.items()}
    longitude = ("lon", 360 / columns * np.arange(columns), {"units": "degrees_east"})
    made = named(masked, ("lat", "lon"), {"lat": ("lat", latitude, {"units": "degrees_north"}), "lon": longitude})
    for x in made.data_vars.values():
        low, high = float(x.min()), float(x.max())
        packing = {"scale_factor": (high - low) / 64_000, "add_offset": (high + low) / 2}
        x.encoding = packing | {"dtype": "int16", "_FillValue": -32768}
    return made


def forecasts(
    nature: Callable, forecast: Callable, state: np.ndarray, errors: np.ndarray, count: int, steps: tuple[int, int],
    dt: float, random: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Pairs `(count, dim)`: forecasts over `steps[0]` from states with `errors`, `steps[1]` apart, and nature."""
    background, analysis = [], []
    for _ in range(count // len(state)):
        start = state + errors * random.standard_normal(state.shape)
        state = walked(nature, state, steps[0], dt)
        background.append(walked(forecast, start, steps[0], dt))
        analysis.append(state)
        state = walked(nature, state, steps[1], dt)
    return np.concatenate(background), np.concatenate(analysis)


POINTS = 12  # of the ring


def blown(state: np.ndarray, forcing: float, decay: float) -> np.ndarray:
    """Change of wind round a circle, and of the smoke of a chimney that it carries."""
    wind, smoke = state[..., :POINTS], state[..., POINTS:]
    chimney = np.where(np.arange(POINTS) == 3, 4.0, 0.0)
    gusts = (np.roll(wind, -1, -1) - np.roll(wind, 2, -1)) * np.roll(wind, 1, -1) - wind + forcing
    carried = np.where(wind > 0, wind * (smoke - np.roll(smoke, 1, -1)), wind * (np.roll(smoke, -1, -1) - smoke)) / 4
    return np.concatenate([gusts, chimney - carried - decay * smoke], -1)


def blown_world(forcing: float, decay: float) -> Callable[[np.ndarray], np.ndarray]:
    return lambda state: blown(state, forcing, decay)


def on_ring(b: np.ndarray, a: np.ndarray, dims: tuple[str, ...] = ("longitude",)) -> xr.Dataset:
    pairs = (("wind", "m s-1", slice(POINTS)), ("smoke", "g m-3", slice(POINTS, None)))
    longitude = ("longitude", 360 / POINTS * np.arange(POINTS), {"units": "degrees_east"})
    return named({n: (units, b[..., own], a[..., own]) for n, units, own in pairs}, dims, {"longitude": longitude})


def ring(count: int = 6000) -> xr.Dataset:
    random = np.random.default_rng(2)
    state = np.concatenate([8 + random.standard_normal((60, POINTS)), np.ones((60, POINTS))], -1)
    state, errors = walked(blown_world(8.0, 0.5), state, 400, 0.025), np.repeat([0.4, 0.1], POINTS)
    return on_ring(*forecasts(blown_world(8.0, 0.5), blown_world(7.2, 0.4), state, errors, count, (20, 20), 0.025, random))


def loose(count: int = 6000) -> xr.Dataset:
    random = np.random.default_rng(3)

    def world(rho: float) -> Callable[[np.ndarray], np.ndarray]:
        def tendency(state: np.ndarray) -> np.ndarray:
            x, y, z = state[..., :4], state[..., 4:8], state[..., 8:]
            pulled = 10 * (y - x) + 0.5 * (x.mean(-1, keepdims=True) - x)
            return np.concatenate([pulled, x * (rho - z) - y, x * y - 8 / 3 * z], -1)

        return tendency

    state = 5 * random.standard_normal((60, 12)) + np.repeat([0.0, 25.0], (8, 4))
    state = walked(world(28.0), state, 1000, 0.01)
    b, a = forecasts(world(28.0), world(26.5), state, np.full(12, 0.8), count, (40, 30), 0.01, random)
    return named({f"{'xyz'[i // 4]}{i % 4}": ("1", b[:, i], a[:, i]) for i in range(12)}, (), {})


def gaussian(count: int = 6000, points: int = 24) -> xr.Dataset:
    random = np.random.default_rng(4)
    b = smooth(random, count, (points,), 2.0)
    a = 0.9 * b + 0.2 * np.roll(b, 1, -1) + 0.5 * smooth(random, count, (points,), 3.0)
    return named({"u": ("m s-1", b, a)}, ("x",), {"x": ("x", np.arange(float(points)), {"units": "km", "period": float(points)})})


def cycles(
    nature: Callable, forecast: Callable, state: np.ndarray, errors: Callable[[], np.ndarray], times: int
) -> tuple[np.ndarray, np.ndarray]:
    """Pairs `(time, run, dim)`: nature, and forecasts from nature at the time before, with `errors`."""
    background, analysis = [], []
    for _ in range(times):
        background.append(forecast(state + errors()))
        state = nature(state)
        analysis.append(state)
    return np.stack(background), np.stack(analysis)


def hourly(data: xr.Dataset, hours: int) -> xr.Dataset:
    """The same at times that are so many hours apart."""
    return data.assign_coords(time=np.datetime64("2020-01-01", "ns") + np.timedelta64(hours, "h") * np.arange(data.sizes["time"]))


def smoke_forecast(state: np.ndarray) -> np.ndarray:
    """Smoke and wind, in the order of the file, three hours later, by a model with too weak a forcing and too little decay."""
    return np.roll(walked(blown_world(7.2, 0.4), np.roll(state, POINTS, -1), 8, 0.025), POINTS, -1)


def smoke(times: int = 600, runs: int = 10) -> xr.Dataset:
    random = np.random.default_rng(5)
    state = np.concatenate([8 + random.standard_normal((runs, POINTS)), np.ones((runs, POINTS))], -1)
    state, size = walked(blown_world(8.0, 0.5), state, 400, 0.025), np.repeat([0.4, 0.1], POINTS)

    def nature(x: np.ndarray) -> np.ndarray:
        return walked(blown_world(8.0, 0.5), x, 8, 0.025)

    def forecast(x: np.ndarray) -> np.ndarray:
        return np.roll(smoke_forecast(np.roll(x, POINTS, -1)), POINTS, -1)

    pairs = cycles(nature, forecast, state, lambda: size * random.standard_normal(state.shape), times)
    return hourly(on_ring(*pairs, dims=("run", "longitude")), 3)


SIDE = 16  # of the plane of eddies
WAVES = np.meshgrid(SIDE * np.fft.fftfreq(SIDE), SIDE * np.fft.rfftfreq(SIDE), indexing="ij")


def stirred(state: np.ndarray, forcing: float, drag: float) -> np.ndarray:
    """Change of a tracer with a gradient to the north, and of the vorticity that stirs it, which a force in bands drives."""
    m, k = WAVES
    squares = k**2 + m**2
    fields = np.fft.rfft2(state.reshape(*state.shape[:-1], 2, SIDE, SIDE))
    stream = -fields[..., 1, :, :] / np.where(squares > 0, squares, 1.0)
    east, north = np.fft.irfft2(-1j * m * stream), np.fft.irfft2(1j * k * stream)
    slopes = [np.fft.irfft2(1j * wave * fields) for wave in (k, m)]
    change = -east[..., None, :, :] * slopes[0] - north[..., None, :, :] * slopes[1]
    change[..., 1, :, :] += forcing * np.cos(3 * 2 * np.pi / SIDE * np.arange(SIDE))[:, None]
    change[..., 0, :, :] -= north
    spectrum = np.where(np.maximum(abs(k), abs(m)) > SIDE / 3, 0.0, np.fft.rfft2(change))
    spectrum -= (drag + 5e-6 * squares**3) * fields
    return np.fft.irfft2(spectrum).reshape(state.shape)


def stirred_for(state: np.ndarray, forcing: float, drag: float, steps: int) -> np.ndarray:
    return walked(lambda x: stirred(x, forcing, drag), state, steps, 0.1)


def eddies_forecast(state: np.ndarray) -> np.ndarray:
    """The eddies twelve hours later, by a model with too weak a force and too much drag."""
    return stirred_for(state, 0.9, 0.06, 10)


def eddies(times: int = 600, runs: int = 10) -> xr.Dataset:
    random, shape = np.random.default_rng(6), (runs, 2, SIDE, SIDE)

    def fields(waves: float) -> np.ndarray:
        return smooth(random, 2 * runs, (SIDE, SIDE), waves).reshape(runs, -1)

    state = stirred_for(fields(3.0), 1.0, 0.05, 1000)
    pairs = cycles(lambda x: stirred_for(x, 1.0, 0.05, 10), eddies_forecast, state, lambda: 0.15 * fields(4.0), times)
    b, a = (x.reshape(times, *shape) for x in pairs)
    of = {"tracer": ("kg m-3", b[:, :, 0], a[:, :, 0]), "vorticity": ("s-1", b[:, :, 1], a[:, :, 1])}
    along = (100.0 * np.arange(SIDE), {"units": "km", "period": 100.0 * SIDE})
    return hourly(named(of, ("run", "y", "x"), {axis: (axis, *along) for axis in ("y", "x")}), 12)


ARCHIVES = {
    "plane": plane, "sphere": sphere, "ring": ring, "loose": loose, "gaussian": gaussian, "smoke": smoke, "eddies": eddies,
}  # fmt: skip

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    for name in sys.argv[2:] or ARCHIVES:
        ARCHIVES[name]().to_netcdf(folder / f"{name}.nc")
