"""Sweeps: the same results whoever computes them, nothing done twice, nothing lost."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from naps import slow_sweep

from pnpda_nb import sweep
from pnpda_nb.experiments import STUDIES
from pnpda_nb.studies.parts import cycle_task, tuning_task
from pnpda_nb.sweep import Store, Task, run_tasks
from pnpda_nb.twin import scores

WELL = {"name": "double_well", "cycles": 10}
FEW = {"runs": 4, "seed": 3}


def small_sweep() -> list[Task]:
    """A tuning and what needs it, two methods that need nothing, and the same task twice."""
    tuned = tuning_task(WELL, {"name": "enkf"}, {"inflation": [1.0, 1.2]}, members=5, **FEW)
    free = cycle_task(WELL, {"name": "free_run"}, **FEW)
    again = cycle_task(WELL, {"name": "free_run"}, name="free run", **FEW)
    particles = cycle_task(WELL, {"name": "particle_filter"}, members=50, **FEW)
    return [cycle_task(WELL, {"name": "enkf"}, members=5, tuned=tuned, **FEW), free, again, particles]


@pytest.fixture(scope="module")
def in_this_process(tmp_path_factory) -> list[xr.Dataset]:
    return run_tasks(small_sweep(), Store(tmp_path_factory.mktemp("one")))


def identical(left: list[xr.Dataset], right: list[xr.Dataset]) -> bool:
    return all(a.identical(b) for a, b in zip(left, right, strict=True))


@pytest.mark.slow  # quick: the rows of the command line, byte for byte
def test_that_two_processes_give_what_one_gives(tmp_path, in_this_process):
    assert identical(run_tasks(small_sweep(), Store(tmp_path), workers=2), in_this_process)


@pytest.fixture
def cluster(tmp_path):
    """A Dask scheduler and two workers as processes of their own."""
    pytest.importorskip("distributed")
    address = tmp_path / "scheduler.json"
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": tmp_path}
    dask = [str(Path(sys.executable).with_name("dask"))]
    options = ["--no-dashboard", "--scheduler-file", str(address)]
    processes = [subprocess.Popen([*dask, "scheduler", "--host", "127.0.0.1", "--port", "0", *options], **quiet)]
    try:
        until = time.monotonic() + 60
        while not address.exists() or not address.read_text().strip():
            assert time.monotonic() < until and processes[0].poll() is None, "the scheduler did not start"
            time.sleep(0.1)
        uri = json.loads(address.read_text())["address"]
        for _ in range(2):
            command = [*dask, "worker", uri, "--nthreads", "1", "--no-nanny", "--no-dashboard", "--local-directory", str(tmp_path)]
            processes.append(subprocess.Popen(command, **quiet))
        yield uri
    finally:
        for process in reversed(processes):
            process.kill()
        for process in processes:
            process.wait(30)


@pytest.fixture
def threads():
    """A Dask scheduler and two workers in threads of this process."""
    with pytest.importorskip("distributed").LocalCluster(
        2, processes=False, protocol="tcp://", threads_per_worker=1, dashboard_address=None
    ) as here:
        yield here.scheduler_address


@pytest.mark.parametrize("workers", ["threads", pytest.param("cluster", marks=pytest.mark.slow)])
def test_that_a_dask_cluster_gives_what_one_process_gives_and_repeats_nothing(tmp_path, workers, in_this_process, request):
    store, cluster = Store(tmp_path / "out"), request.getfixturevalue(workers)
    assert identical(run_tasks(small_sweep(), store, scheduler=cluster), in_this_process)
    made = {path: path.stat().st_mtime_ns for path in store.parts.iterdir()}
    assert len(made) == 4  # two tasks were one
    run_tasks(small_sweep(), store, scheduler=cluster)
    assert made == {path: path.stat().st_mtime_ns for path in store.parts.iterdir()}


KILLED = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from naps import slow_sweep
from pnpda_nb.sweep import Store, run_tasks
if __name__ == "__main__":
    run_tasks(slow_sweep(), Store(sys.argv[1]), workers=int(sys.argv[2]))
"""


@pytest.mark.parametrize("how, workers", [(signal.SIGKILL, 2), pytest.param(signal.SIGINT, 1, marks=pytest.mark.slow)])
def test_that_a_killed_sweep_goes_on_where_it_was(tmp_path, workers, how):
    script, log = tmp_path / "script.py", tmp_path / "log"
    script.write_text(KILLED.format(tests=str(Path(__file__).parent)))
    environment = os.environ | {"PNPDA_TEST_LOG": str(log), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), str(tmp_path / "out"), str(workers)]
    process = subprocess.Popen(
        command,
        env=environment,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    until = time.monotonic() + 60
    while not log.exists() or len(log.read_text().split()) < 4:
        assert time.monotonic() < until and process.poll() is None, process.stderr.read().decode()
        time.sleep(0.05)
    time.sleep(0.3)  # in the middle of the long one
    process.send_signal(how)
    process.wait(30)
    assert process.returncode != 0 and sorted(log.read_text().split()) == ["0", "1", "2", "3"]
    process.stderr.close()
    results = run_tasks(slow_sweep(str(log)), Store(tmp_path / "out"))
    assert results[-1] == {"number": 9, "sum": 6}
    # what was finished was not done again (a worker whose parent was killed may have ended its task in vain)
    assert sorted(set(log.read_text().split())) == ["0", "1", "2", "3", "9"]
    assert all(log.read_text().split().count(done) == 1 for done in "0123")


@pytest.mark.slow
def test_that_a_worker_that_dies_is_one_clear_error(tmp_path):
    with pytest.raises(ChildProcessError, match="a worker process died during .*dying"):
        run_tasks([Task("dying", die, {}, format="record"), *small_sweep()[1:2]], Store(tmp_path), workers=2)


def die(settings: dict) -> dict:
    os.kill(os.getpid(), signal.SIGKILL)
    return {}


@pytest.mark.parametrize(
    "options, message",
    [({"workers": 0}, "workers: expected at least 1"), ({"scheduler": "nowhere"}, "scheduler: expected an address")],
)
def test_that_a_workplace_that_does_not_exist_is_one_clear_error(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        run_tasks(small_sweep(), Store(tmp_path), **options)


def test_that_keys_depend_on_what_a_result_depends_on_and_on_nothing_else():
    for study in STUDIES.values():
        paper = study.presets["paper"]
        plan, again = (study.plan(paper, study.methods) for _ in range(2))
        assert {k: t.key for k, t in plan.items()} == {k: t.key for k, t in again.items()}
        for name in study.methods:  # a method left out changes nothing in another
            alone = study.plan(paper, (name,))
            assert all(alone[place].key == task.key for place, task in plan.items() if place[1] == name)
        json.dumps([task.settings for task in plan.values()])  # what can be sent to another machine


def test_that_a_prior_is_shared_by_all_cycles_that_use_it():
    study = STUDIES["lorenz96"]
    plan = study.plan(study.presets["paper"], ("pnpda",))
    conditions = [c for c, _ in plan if c.startswith(("fraction", "sigma"))]
    assert len({plan[c, "pnpda"].needs["prior"].key for c in conditions}) == 1
    assert plan["training=2", "pnpda"].needs["prior"].key != plan["training=1", "pnpda"].needs["prior"].key


def test_that_methods_are_tuned_on_other_truths_than_they_are_scored_on(tmp_path):
    tuned = tuning_task(WELL, {"name": "enkf"}, {"inflation": [1.0]}, members=5, **FEW)
    record, cycled = run_tasks([tuned, cycle_task(WELL, {"name": "enkf"}, members=5, tuned=tuned, **FEW)], Store(tmp_path))
    assert not np.isclose(record["tried"][0]["mean"], float(scores(cycled).step_rmse.mean()))


def test_that_a_key_depends_on_the_modules_that_make_a_part_and_on_no_other(tmp_path):
    home = Path(sweep.__file__).parent
    names = {path.relative_to(home).as_posix() for path in sweep._sources_of("pnpda_nb.studies.parts", home)}
    assert {"studies/parts.py", "twin/cycle.py", "dynamics/base.py", "classical/ensemble.py", "flow_matching/training.py"} <= names
    assert not {"plotting/style.py", "cli/commands.py", "experiments/lorenz63.py", "bench/suite.py"} & names
    copy = shutil.copytree(home, tmp_path / "pnpda_nb")
    assert {p.relative_to(copy).as_posix() for p in sweep._sources_of("pnpda_nb.studies.parts", copy)} == names
    assert sweep._sources_of(None, copy) == sweep._sources_of("somebody.else", copy) == set(copy.rglob("*.py"))
