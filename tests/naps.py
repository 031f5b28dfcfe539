"""Tasks that take a while, in a module that other processes import fast."""

import os
import time

from pnpda_nb.sweep import Task


def nap(settings: dict, **needs) -> dict:
    """A task that takes a while and writes down that it was done."""
    time.sleep(settings["seconds"])
    with open(settings["log"], "a") as log:
        log.write(f"{settings['number']}\n")
    return {"number": settings["number"], "sum": sum(need["number"] for need in needs.values())}


def slow_sweep(log: str | None = None) -> list[Task]:
    log = log or os.environ["PNPDA_TEST_LOG"]
    short = [Task(f"short {i}", nap, {"number": i, "seconds": 0.05, "log": log}, format="record") for i in range(4)]
    needs = {f"short_{i}": task for i, task in enumerate(short)}
    return [*short, Task("long", nap, {"number": 9, "seconds": 1.2, "log": log}, needs, "record")]
