"""A method of somebody's own, scored from the shell beside the rows of a study."""

import json
import textwrap

import pandas as pd
import pytest

from pnpda_nb.core.strangers import _sources
from pnpda_nb.experiments import find_study
from pnpda_nb.studies.own import _with_own

UNDRAWN = "import matplotlib.figure\nmatplotlib.figure.Figure.draw = lambda *_: None\n"
RUN = ["run", "lorenz63", "--runs", 3, "--set", "cycles=4", "--workers", 1]
MINE = """
from dataclasses import dataclass

import numpy as np
import torch

from helper import SHARE
from pnpda_nb.classical import EnKF
from pnpda_nb.core import standard_normal


def idle(background, observations):
    return background


@dataclass
class Idle:
    share: float = SHARE
    window: int = 1

    def analyse(self, background, observations, *, forecast, generator):
        return background + 0 * standard_normal(background.shape, generator)


def made(experiment):
    assert experiment.dim == 3
    return Idle()


enkf = EnKF(inflation=1.2)


def broken(background, observations):
    return background / 0 + unknown


def narrow(background, observations):
    return background[..., :2]


def array(background, observations):
    return background.numpy()


def lost(background, observations):
    return background - background.var(-2, keepdim=True)


def nothing():
    return None


def stubborn(experiment):
    raise SystemExit("no, thanks")


calls = []


def tired(background, observations):
    calls.append(len(background))
    if len(calls) == 3:
        raise RuntimeError(f"after {len(calls)} calls\\nand more")
    return background


number = 7
"""


@pytest.fixture(scope="module")
def mine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mine")
    (folder / "statistics.py").write_text(MINE)  # a name that a library has
    (folder / "helper.py").write_text("SHARE = 0.5")
    (folder / "wrong.py").write_text("def mine(background, observations):\n    return background +")
    return folder


def row(path, method, metric="step_rmse"):
    table = pd.read_csv(path / "scores.csv")
    return table[(table.method == method) & (table.metric == metric)]["mean"].tolist()


@pytest.mark.parametrize("name", ["idle", "made"])
def test_that_one_who_does_nothing_has_the_scores_of_a_free_run(name, mine, tmp_path, forked):
    words = ["--method", f"statistics.py:{name}", "--methods", "free_run", "--out", tmp_path]
    answer = forked(*RUN, *words, folder=mine, before=UNDRAWN)
    assert answer.returncode == 0, answer.stderr
    assert row(tmp_path, name) == row(tmp_path, "free_run") != []
    compared = pd.read_csv(tmp_path / "comparison.csv").set_index("method")
    assert list(compared.index) == [name, "free_run"] and (compared.runs == 3).all()
    assert compared.above["free_run"] == compared.above_error["free_run"] == 0 and compared.pairs["free_run"] == 3
    about = json.loads((tmp_path / "manifest.json").read_text())["method"]
    assert about["name"] == about["function"] == name and about["module"] == str(mine / "statistics.py") and about["members"] == 1
    assert about["sources"] == _sources(f"{mine / 'statistics.py'}:{name}", "method") and len(about["sources"]) == 2


def test_that_another_file_is_computed_anew_and_the_same_is_not(tmp_path, forked):
    def run(share, module="mine.py"):
        (tmp_path / "part.py").write_text(f"SHARE = {share}")
        (tmp_path / "mine.py").write_text(
            "from part import SHARE\n\ndef var3d(background, observations):\n    H = observations.operator\n"
            "    return background + SHARE * H.adjoint(background, observations.innovation(background))"
        )
        words = ["--method", f"{module}:var3d", "--methods", "free_run", "--out", "out"]
        answer = forked(*RUN, *words, folder=tmp_path, before=UNDRAWN)
        assert answer.returncode == 0, answer.stderr
        return {path.name for path in (tmp_path / "out" / "parts").iterdir()}, row(tmp_path / "out", "mine.var3d")

    first, score = run(0.5)
    assert run(0.5) == (first, score)
    second, other = run(0.6, "mine")  # a module of the current folder
    assert len(second) == len(first) + 1 and other != score


def test_that_members_are_those_that_are_asked_for(mine, tmp_path, forked):
    words = ["--method", "statistics.py:enkf", "--methods", "free_run", "--members", 5, "--out", tmp_path]
    answer = forked(*RUN, *words, folder=mine, before=UNDRAWN)
    assert answer.returncode == 0, answer.stderr
    assert row(tmp_path, "statistics.enkf", "spread")[0] > 0
    assert "+" in answer.stdout.split("\nfree run ")[1]  # above the EnKF


WRONG = [
    ("nowhere.py:f", "method: no file nowhere.py"),
    ("statistics.py", "method: expected MODULE:FUNCTION, got 'statistics.py'"),
    ("statistics.py:many", "method: statistics.py has no 'many'; it has "),
    ("no_such_package:f", "method: cannot import no_such_package:f (ModuleNotFoundError: No module named 'no_such_package')"),
    ("wrong.py:mine", "method: cannot import wrong.py:mine (SyntaxError: invalid syntax (wrong.py, line 2))"),
    ("statistics.py:broken", "statistics.broken: NameError: name 'unknown' is not defined (statistics.py, line 34, in broken)"),
    ("statistics.py:narrow", "statistics.narrow: expected an analysis of shape (2, 1, 3), got (2, 1, 2)"),
    ("statistics.py:array", "statistics.array: expected a tensor of shape (2, 1, 3), got ndarray; torch.from_numpy makes one"),
    ("statistics.py:lost", "expected a finite analysis, got one that is not in 2 of 2 runs; it has a single member, and --members"),
    ("statistics.py:nothing", "statistics.nothing: expected it to return an object with analyse, or a function of background"),
    ("statistics.py:stubborn", "statistics.stubborn: SystemExit: no, thanks (statistics.py, line 54, in stubborn)"),
    ("statistics.py:number", "method: expected a function, a class or a method as statistics.number, got int"),
    ("statistics.py:enkf", "statistics.enkf: ValueError: members: EnKF needs an ensemble of at least 2"),
    ("statistics.py:tired", "statistics.tired: RuntimeError: after 3 calls (statistics.py, line 63, in tired) (in the task tired)"),
]


@pytest.mark.parametrize("words, said", WRONG, ids=[words for words, _ in WRONG])
def test_that_what_is_wrong_with_a_method_is_one_line_and_nothing_is_written(words, said, mine, tmp_path, forked):
    answer = forked(*RUN, "--method", words, "--methods", "free_run", "--out", tmp_path / "out", folder=mine)
    assert answer.returncode == 2 and not answer.stdout and said in answer.stderr, answer.stderr
    assert len([line for line in answer.stderr.splitlines() if line.startswith("pnpda: ")]) == 1
    assert not (tmp_path / "out" / "scores.csv").exists()


def test_that_a_study_without_rows_to_put_it_beside_says_so(mine, forked):
    answer = forked("run", "ablations", "--method", "statistics.py:idle", folder=mine)
    assert answer.returncode == 2 and "expected an experiment whose methods are cycled and tuned" in answer.stderr


PLANS = [
    ("lorenz63", "smoke", ()),
    ("lorenz96", "smoke", ()),
    ("lorenz96", "smoke", ("free_run",)),
    ("lorenz96", "smoke", ("free_run", "pnpda")),
    ("lorenz96", "beyond_smoke", ()),
    ("kuramoto_sivashinsky", "smoke", ()),
    ("kuramoto_sivashinsky", "smoke", ("conditional_mean",)),
    ("kuramoto_sivashinsky", "beyond_smoke", ()),
    ("sqg", "smoke", ()),
    ("beyond", "smoke", ()),
    ("beyond", "smoke", ("amortised",)),
]


@pytest.mark.parametrize("experiment, preset, others", PLANS)
def test_that_under_every_condition_the_truths_are_those_of_a_method_that_sees(experiment, preset, others):
    study = find_study(experiment).with_preset(preset)
    settings = study.settings(preset)
    with_mine = _with_own(study, "mine", {"module": "my.py", "function": "mine", "sources": {}}, 3)
    plan = with_mine.plan(settings, (*(others or study.beside), "mine"))
    whole = study.plan(settings, study.methods)
    mine = {condition: task for (condition, name), task in plan.items() if name == "mine"}
    assert list(mine) == list(dict.fromkeys(condition for condition, _ in plan)) and mine
    for condition, task in mine.items():
        seen = [t for (c, name), t in whole.items() if c == condition and name not in ("free_run", "conditional_mean")]
        for name in ("testbed", "runs", "seed"):
            assert all(task.settings[name] == other.settings[name] for other in seen), (condition, name)
        assert task.settings["members"] == 3 and not task.needs and task.function in {other.function for other in seen}
    kept = with_mine.kept(settings, ("mine",)), study.kept(settings, ())
    assert len({tuple((name, task.key) for name, task in one.items()) for one in kept}) == 1


def test_that_the_program_says_that_there_is_such_an_option(forked):
    said = forked("run", "--help").stdout
    assert "--method " in said and "my.py:mine" in textwrap.dedent(said)
