# RIGHT: status 0, attributes written in a form that NetCDF can hold
"""A Zarr background with a Boolean attribute: a traceback (Python: CompatibilityError) after all the work; dict and None: an error after it."""
import tempfile
from pathlib import Path
import numpy as np, xarray as xr
from pnpda_nb.files import Layout, read_states
from pnpda_nb.core import write_netcdf

here = Path(tempfile.mkdtemp())
for n, value in enumerate((True, None, {"a": 1})):
    day = xr.Dataset({"t": (("time", "lon"), np.full((1, 4), 280.0), {"units": "K", "note": value})}, coords={"time": [0], "lon": np.arange(4.0)})
    day.to_zarr(here / f"b{n}.zarr", consolidated=False)
    states = read_states(here / f"b{n}.zarr", Layout.of(day.data_vars, ("time",)))
    try:
        write_netcdf(states.dataset(states.values), here / "analysis.nc")
    except Exception as error:
        print(repr(value), type(error).__module__, type(error).__name__, error)
