"""Options and fixtures shared by all tests. Long tests are marked `slow` and run with `pytest --slow`."""

import gc
import json
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

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import settings  # noqa: E402

from pnpda_nb.core import stream  # noqa: E402
from pnpda_nb.flow_matching import FlowPrior, VelocityMLP  # noqa: E402

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import chapters as loop  # noqa: E402

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
    compile_dir(ROOT / "pnpda_nb", quiet=1)  # once, and not by every chapter where Python is told to keep no bytecode
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


# Importing torch takes longer than most commands. One process imports everything, what a command imports only when it needs it
# included, and looks up of which files a part of a study is made; every command is a fork of it.
FORKS = """
import gc, importlib, json, os, resource, sys, tempfile
gc.disable()
import pnpda_nb.cli, pnpda_nb.dynamics, pnpda_nb.experiments, pnpda_nb.interop, pnpda_nb.twin
at_once = {"numba", "dapper"} & {*sys.modules}  # which should wait until they are needed
import pnpda_nb.bench, pnpda_nb.dynamics.kernels, pnpda_nb.flow_matching, pnpda_nb.learned, pnpda_nb.operations
for name in sys.argv[1:]:
    importlib.import_module(name)
pnpda_nb.sweep.code_version("pnpda_nb.studies.parts")
gc.freeze()
gc.enable()
for line in sys.stdin:
    words, folder, before = json.loads(line)
    out, err = tempfile.TemporaryFile(), tempfile.TemporaryFile()
    child = os.fork()
    if not child:
        os.chdir(folder)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0), os.dup2(out.fileno(), 1), os.dup2(err.fileno(), 2)
        sys.argv, status = ["pnpda", *words], 1
        exec(before)
        try:
            pnpda_nb.cli.main()
        except SystemExit as end:
            status = end.code or 0
        finally:
            for stream in filter(None, (sys.stdout, sys.stderr)):
                stream.flush()
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    texts = [(f.seek(0), f.read().decode())[1] for f in (out, err)]
    print(json.dumps([status, *texts]), flush=True)
"""


@pytest.fixture(scope="session")
def forked():
    """The `pnpda` command in a process of its own that does not have to import the libraries first."""
    libraries = [name for name in loop.LIBRARIES if name.split(".")[0] not in ("IPython", "execnb", "nbdev", "pygments")]
    line, tools = [sys.executable, "-c", FORKS, *libraries], {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | tools) as server:

        def pnpda(*words, folder=".", before="") -> subprocess.CompletedProcess:  # with `before`, code that the process runs first
            print(json.dumps([[str(w) for w in words], str(folder), before]), file=server.stdin, flush=True)
            return subprocess.CompletedProcess(words, *json.loads(server.stdout.readline()))

        yield pnpda
        server.stdin.close()  # ends it


@pytest.fixture(scope="session")
def untrained_prior() -> FlowPrior:
    """A prior for Lorenz-63 with random weights: enough wherever what it has learned does not matter."""
    network = VelocityMLP(3, (16, 16), 8, stream(0, "untrained"))
    architecture = {"network": "VelocityMLP", "dim": 3, "hidden": [16, 16], "embedding": 8, "linear_skip": False}
    zeros, ones = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    return FlowPrior(network, zeros, ones, architecture)
