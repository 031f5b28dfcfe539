"""Options and fixtures shared by all tests. Long tests are marked `slow` and run with `pytest --slow`."""

import os
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

# before torch is imported: tests run beside chapters that are executed in other processes
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import settings  # noqa: E402

from pnpda_nb.dynamics import stream  # noqa: E402
from pnpda_nb.flow_matching import FlowPrior, VelocityMLP  # noqa: E402

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import chapters as loop  # noqa: E402

settings.register_profile("book", deadline=None, max_examples=25, derandomize=True)
settings.load_profile("book")


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the tests marked slow, too")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes minutes; run with --slow")


def pytest_collection_modifyitems(config, items):
    items.sort(key=lambda item: item.path.name == "test_chapters.py")   # last: see `executions`
    if not config.getoption("--slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="slow; run with --slow"))


@pytest.fixture(scope="session", autouse=True)
def executions(request):
    """Chapters that are executed in another process, each in a fresh one, while the other tests run; nothing is written back."""
    wanted = {item.callspec.params["name"] for item in request.session.items if "executions" in item.fixturenames and hasattr(item, "callspec") and "name" in item.callspec.params and item.path.name == "test_chapters.py"}
    if not wanted:
        yield {}
        return
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        yield {name: pool.submit(loop.execute, name, False) for name in sorted(wanted)}


@pytest.fixture(scope="session")
def untrained_prior() -> FlowPrior:
    """A prior for Lorenz-63 with random weights: enough wherever what it has learned does not matter."""
    network = VelocityMLP(3, (16, 16), 8, stream(0, "untrained"))
    architecture = {"network": "VelocityMLP", "dim": 3, "hidden": [16, 16], "embedding": 8, "linear_skip": False}
    zeros, ones = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    return FlowPrior(network, zeros, ones, architecture)
