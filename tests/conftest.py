"""Options and fixtures shared by all tests. Long tests are marked `slow` and run with `pytest --slow`."""

import gc
import os
import subprocess
import sys
from collections import deque
from compileall import compile_dir
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

# before torch is imported: tests run beside chapters that are executed in other processes
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

ROOT = Path(__file__).parent.parent
compile_dir(ROOT / "pnpda_nb", quiet=1)  # once, and not by every process where Python is told to keep no bytecode

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import settings  # noqa: E402

from pnpda_nb.core import stream  # noqa: E402
from pnpda_nb.flow_matching import FlowPrior, VelocityMLP  # noqa: E402

sys.path.insert(0, str(ROOT / "tools"))
import chapters as loop  # noqa: E402
import commands  # noqa: E402

settings.register_profile("book", deadline=None, max_examples=12, derandomize=True)
settings.register_profile("slow", deadline=None, max_examples=60, derandomize=True)
settings.load_profile("book")


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the tests marked slow, too")
    parser.addoption("--site", metavar="DIR", help="a site that tools/site.py has built, to be opened in a browser")


def pytest_configure(config):
    settings.load_profile("slow" if config.getoption("--slow") else "book")
    config.addinivalue_line("markers", "slow: takes minutes; run with --slow")
    config.addinivalue_line("markers", "gpu: needs a GPU, and is skipped without one")


def pytest_collection_finish(session):
    gc.freeze()  # what was imported need not be looked at again and again
    gc.set_threshold(50_000, 20, 50)


def pytest_collection_modifyitems(config, items):
    # last, since these only wait: see `executions`
    items.sort(key=lambda item: (item.path.name == "test_chapters.py", "executed" in item.fixturenames))
    if not config.getoption("--slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="slow; run with --slow"))


@pytest.fixture(scope="session", autouse=True)
def executions(request):
    """Chapters are executed in other processes, each in a fresh one, and nothing is written back: one at a time while the other
    tests run.
    """
    names = deque(sorted({item.callspec.params["name"] for item in request.session.items if "executed" in item.fixturenames}))
    if not names:
        yield {}, None
        return
    done = {name: Future() for name in names}

    def take():
        while names:
            try:
                name = names.popleft()
            except IndexError:  # the other one was faster
                return
            try:
                done[name].set_result(processes.submit(loop.execute, name, False).result())
            except Exception as error:
                done[name].set_exception(error)

    with loop.fresh_processes(2) as processes, ThreadPoolExecutor(2) as takers:
        takers.submit(take)
        yield done, lambda: takers.submit(take)
        names.clear()  # when tests were interrupted


@pytest.fixture(scope="session")
def executed(executions):
    """What became of every chapter. Who asks has nothing else to do: from now on, two of those that are left are executed at a
    time.
    """
    done, take_too = executions
    take_too()
    return done


@pytest.fixture(scope="session")
def forked():
    """The `pnpda` command in a process of its own that does not have to import the libraries first."""
    context = loop.warm_context()
    here, there = context.Pipe()
    server = context.Process(target=commands.serve, args=(there,))
    server.start()
    there.close()

    def pnpda(*words, folder=".", before="") -> subprocess.CompletedProcess:  # with `before`, code that the process runs first
        here.send(([str(w) for w in words], str(folder), before))
        return subprocess.CompletedProcess(words, *here.recv())

    yield pnpda
    here.close()  # ends it
    server.join()


@pytest.fixture(scope="session")
def untrained_prior() -> FlowPrior:
    """A prior for Lorenz-63 with random weights: enough wherever what it has learned does not matter."""
    network = VelocityMLP(3, (16, 16), 8, stream(0, "untrained"))
    architecture = {"network": "VelocityMLP", "dim": 3, "hidden": [16, 16], "embedding": 8, "linear_skip": False}
    zeros, ones = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    return FlowPrior(network, zeros, ones, architecture)
