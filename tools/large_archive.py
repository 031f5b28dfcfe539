"""A large archive of backgrounds and analyses on the globe, to try what `pnpda train` takes.

    python tools/large_archive.py FOLDER TIMES [PIECE]    write FOLDER/pairs_NNN.nc, of PIECE times each (250)

Temperature and zonal wind on 181 × 360 points, from north to south and from 0 to 359 degrees east, missing on land, packed as
16-bit integers: a time takes half a megabyte, so 20 000 times are 10 GB. Weather drifts from time to time. Backgrounds have it
displaced, by more where it is strong, and too weak; one piece is in memory at a time.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import xarray as xr
from scipy import fft

ROWS, COLUMNS = 181, 360
WHOLE = (2 * ROWS, COLUMNS)  # so that what goes over a pole comes back on the other side
NORTH = np.linspace(90, -90, ROWS)


def filtered(waves: float) -> np.ndarray:
    """The amplitudes of smooth fields on `WHOLE`, of wavenumbers up to about `waves`, and of variance one: `(south, east)` without
    the waves that are too short to matter, half of them southwards and half of them northwards.
    """
    most = min(math.ceil(4 * waves), COLUMNS // 2 - 1)
    south, east = np.r_[: most + 1, -most:0], np.arange(most + 1)
    amplitude = np.exp(-(south[:, None] ** 2 + east**2) / (2 * waves**2))
    halves = np.where(east > 0, 2.0, 1.0)
    return (amplitude / np.sqrt((halves * amplitude**2).sum())).astype("float32")


def field(random: np.random.Generator, amplitude: np.ndarray) -> np.ndarray:
    """A random field `(row, column)` with Fourier coefficients of these amplitudes."""
    most = amplitude.shape[1] - 1
    real, imaginary = random.standard_normal((2, *amplitude.shape), dtype="float32") / np.float32(2**0.5)
    waves = np.zeros((WHOLE[0], COLUMNS // 2 + 1), "complex64")
    waves[np.r_[: most + 1, -most:0], : most + 1] = amplitude * (real + 1j * imaginary)
    of_circle = waves[:, 0]  # that of a real field is its own conjugate, read backwards
    waves[:, 0] = (of_circle + np.conj(np.roll(of_circle[::-1], 1))) / np.float32(2**0.5)
    return fft.irfft2(waves, s=WHOLE, norm="forward")[:ROWS]


def moved(x: np.ndarray, east: np.ndarray, south: np.ndarray) -> np.ndarray:
    """A field `(row, column)` at places that are so many points away."""
    row = np.clip(np.arange(ROWS)[:, None] + south, 0, ROWS - 1.001)
    column = (np.arange(COLUMNS) + east) % COLUMNS
    i, j = row.astype(int), column.astype(int) % COLUMNS
    b, a = row - i, column - np.floor(column)
    here, step = i * COLUMNS + j, np.where(j == COLUMNS - 1, 1 - COLUMNS, 1)
    above, below = (x.take(n) + a * (x.take(n + step) - x.take(n)) for n in (here, here + COLUMNS))
    return above + b * (below - above)


def pieces(times: int, size: int) -> Iterator[xr.Dataset]:
    """Datasets of `size` times each."""
    random, cool = np.random.default_rng(0), np.sin(np.deg2rad(NORTH))[:, None] ** 2
    broad, fine, steering = filtered(6.0), filtered(14.0), filtered(4.0)
    land = field(np.random.default_rng(99), steering) > 0.6
    weather, gust = field(random, broad), field(random, fine)
    axes = {"lat": ("lat", NORTH, {"units": "degrees_north"}), "lon": ("lon", np.arange(float(COLUMNS)), {"units": "degrees_east"})}
    for first in range(0, times, size):
        count = min(size, times - first)
        made = {f"{n}_{r}": np.empty((count, ROWS, COLUMNS), "float32") for n in ("t", "u") for r in ("background", "analysis")}
        for k in range(count):
            weather = 0.9 * weather + 0.19**0.5 * field(random, broad)
            gust = 0.7 * gust + 0.51**0.5 * field(random, fine)
            east, south = (1.5 * field(random, steering) * (1 + 0.5 * np.tanh(weather)) for _ in range(2))
            t = 288 - 40 * cool + 5 * np.tanh(1.5 * weather) + gust
            u = 25 * np.sin(2 * np.deg2rad(NORTH))[:, None] ** 2 + 6 * weather + 4 * gust
            made["t_analysis"][k], made["u_analysis"][k] = t, u
            made["t_background"][k] = moved(t, east, south) + 0.3 * field(random, fine) - 0.4 * gust
            made["u_background"][k] = moved(u, east, south) + 1.2 * field(random, fine) - 1.6 * gust
        data = {}
        for name, x in made.items():
            x[:, land] = np.nan
            data[name] = (("time", "lat", "lon"), x, {"units": "K" if name[0] == "t" else "m s-1"})
        time = ("time", 6 * np.arange(first, first + count), {"units": "hours since 2000-01-01"})
        world = xr.Dataset(data, axes | {"time": time})
        for name, x in world.data_vars.items():
            middle, width = (280.0, 200.0) if name[0] == "t" else (0.0, 300.0)
            packing = {"scale_factor": width / 64_000, "add_offset": middle, "dtype": "int16", "_FillValue": -32768}
            x.encoding = packing | {"chunksizes": (1, ROWS, COLUMNS)}
        yield world


if __name__ == "__main__":
    folder, times, size = Path(sys.argv[1]), int(sys.argv[2]), int((sys.argv[3:] or ["250"])[0])
    for number, world in enumerate(pieces(times, size)):
        world.to_netcdf(folder / f"pairs_{number:03d}.nc")
