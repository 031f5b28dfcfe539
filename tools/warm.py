"""What a process does once, before chapters or commands are forked from it, that each of them would otherwise do again: after the
libraries it imports the package, and looks up of which files a part of a study is made.
"""

import sys
from contextlib import suppress
from importlib import import_module
from pathlib import Path

LATE = {"numba", "dapper"}  # which should wait until they are needed
AT_ONCE = ("cli", "dynamics", "experiments", "interop", "learned", "operations", "plotting", "twin")

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
with suppress(Exception):  # whoever needs it will say what is wrong
    for name in AT_ONCE:
        import_module(f"pnpda_nb.{name}")
at_once = LATE & {*sys.modules}
with suppress(Exception):
    for name in ("bench", "dynamics.kernels"):
        import_module(f"pnpda_nb.{name}")
    sys.modules["pnpda_nb.sweep"].code_version("pnpda_nb.studies.parts")

from numba import njit  # noqa: E402


@njit
def nothing(x):
    return x


nothing(1.0)  # the compiler is set up when it is needed first
