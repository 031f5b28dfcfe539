"""What a process does once, before chapters or commands are forked from it, that each of them would otherwise do again."""

import sys

at_once = {"numba", "dapper"} & {*sys.modules}  # which should wait until they are needed: so this is the last of the libraries

from numba import njit  # noqa: E402


@njit
def nothing(x):
    return x


nothing(1.0)  # the compiler is set up when it is needed first
