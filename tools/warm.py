"""What a process does once, before chapters or commands are forked from it, that each of them would otherwise do again."""

from numba import njit


@njit
def nothing(x):
    return x


nothing(1.0)  # the compiler is set up when it is needed first
