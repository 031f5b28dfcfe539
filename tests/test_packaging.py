"""What is installed, what is public, and how quickly the command answers."""

import ast
import importlib
import importlib.metadata
import inspect
import json
import os
import re
import subprocess
import sys
import warnings
from configparser import ConfigParser
from pathlib import Path

import pytest

import pnpda_nb
from pnpda_nb.core import deprecated
from pnpda_nb.core.interface import deprecations, public_api

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "pnpda_nb"
sys.path.insert(0, str(ROOT / "tools"))
import public_api as listing  # noqa: E402

SETTINGS = ConfigParser(delimiters=["="])
SETTINGS.read(ROOT / "settings.ini", encoding="utf-8")
SETTINGS = SETTINGS["DEFAULT"]

# Public callables that still lack an annotation. Nothing may be added; what has been annotated may go.
UNANNOTATED = {
    "learned.AmortisedAnalysis.analyse", "learned.AnalysisPrior.make",
    "experiments.lorenz63.Lorenz63Settings.experiment", "experiments.lorenz63.Lorenz63Settings.world",
    "experiments.lorenz63.figure_phase", "experiments.lorenz63.figure_time", "experiments.lorenz63.figure_trajectories",
    "experiments.lorenz96.figure_lorenz96",
    "windows.IncrementalPrior.make", "windows.NeuralIncremental.analyse", "windows.incremental_loss",
    "plotting.mean_and_band",
    "pnp.PnPDA4D.misfit", "pnp.WindowMisfit.__init__", "pnp.analysis_ensemble", "pnp.convergence",
}  # fmt: skip


def meta_of_setup() -> dict:
    """What setup.py hands to setuptools."""
    program = "import json, setuptools; setuptools.setup = lambda **k: print(json.dumps(k)); "
    program += "exec(open('setup.py').read(), {'__file__': 'setup.py'})"
    return json.loads(subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True).stdout)


def test_that_everything_takes_the_version_from_settings():
    assert pnpda_nb.__version__ == SETTINGS["version"] == importlib.metadata.version("pnpda_nb")
    assert re.fullmatch(r"\d+\.\d+\.\d+", SETTINGS["version"])
    assert re.search(rf"^## {re.escape(SETTINGS['version'])}\b", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)


def test_that_setup_says_what_settings_say_and_ships_types():
    pytest.importorskip("setuptools")
    meta = meta_of_setup()
    assert meta["version"] == SETTINGS["version"] and meta["python_requires"] == f">={SETTINGS['min_python']}"
    assert "py.typed" in meta["package_data"]["pnpda_nb"] and (PACKAGE / "py.typed").exists()
    assert (
        "Typing :: Typed" in meta["classifiers"]
        and f"Programming Language :: Python :: {SETTINGS['max_python']}" in meta["classifiers"]
    )
    assert {"Documentation", "Source", "Issues", "Changelog"} <= set(meta["project_urls"])
    assert all(url.startswith("https://") for url in meta["project_urls"].values())
    extras = {key.removesuffix("_requirements") for key in SETTINGS if key.endswith("_requirements")}
    assert set(meta["extras_require"]) == extras
    assert {p for p in meta["packages"]} == {".".join(p.parent.relative_to(ROOT).parts) for p in PACKAGE.rglob("__init__.py")}


def test_that_what_is_imported_is_required():
    wanted = {re.split(r"[<>=\[]", word)[0].lower() for word in SETTINGS["requirements"].split()}
    # distributed under another name, or by something that is required
    names = {"ot": "pot", "PIL": "matplotlib", "IPython": "ipywidgets", "annotated_types": "annotated-types"}
    optional = {
        re.split(r"[<>=\[]", word)[0]
        for key in SETTINGS
        if key.endswith("_requirements") and key != "dev_requirements"
        for word in SETTINGS[key].split()
    }
    imported = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            modules = (
                [a.name for a in node.names]
                if isinstance(node, ast.Import)
                else [node.module]
                if isinstance(node, ast.ImportFrom) and not node.level
                else []
            )
            imported |= {m.split(".")[0] for m in modules}
    others = imported - set(sys.stdlib_module_names) - {"pnpda_nb"} - optional
    assert {names.get(name, name) for name in others} <= wanted


def test_that_help_imports_nothing_heavy():
    heavy = {"torch", "numpy", "xarray", "matplotlib", "pandas", "scipy"}
    program = "import sys\nsys.argv = ['pnpda', '--help']\nfrom pnpda_nb.cli import main\n"
    program += f"try: main()\nfinally: print({heavy} & set(sys.modules))"
    before = os.times()
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert answer.stdout.endswith("set()\n") and "Usage" in answer.stdout, answer.stdout + answer.stderr
    after = os.times()  # processor time: it does not matter what else the machine does
    assert after.children_user + after.children_system - before.children_user - before.children_system < 1


# ---------------------------------------------------------------------------------------------- public names


def test_that_no_public_name_disappears_without_having_been_deprecated():
    gone = listing.differences(listing.listed(), listing.present(), SETTINGS["version"])
    assert not gone, "\n".join(gone)


def test_that_every_public_name_is_in_the_list():
    before, now = listing.listed(), listing.present()
    new = [name for name, since in now.items() if before.get(name) != since]
    assert not new, (
        f"{', '.join(new[:10])}: new or newly deprecated; run `python tools/public_api.py` and commit tests/public_api.txt"
    )


def test_that_a_name_may_go_only_in_a_minor_version_after_its_deprecation():
    before = {"m.kept": "", "m.gone": "", "m.old": "0.1.3", "m.new": "0.2.0"}
    said = listing.differences(before, {"m.kept": ""}, "0.2.1")
    assert [s.split()[0] for s in said] == ["m.gone", "m.new"] and all("bring it back under @deprecated" in s for s in said)
    assert not listing.differences(before, {"m.kept": "", "m.gone": "0.2.0", "m.new": "0.2.0"}, "0.2.1")
    assert listing.may_go("0.9.0", "0.10.0") and not listing.may_go("0.10.0", "0.9.9")


def test_that_public_names_are_those_that_a_module_has():
    api = public_api()
    for module in ("pnpda_nb.twin", "pnpda_nb.classical", "pnpda_nb.sweep", "pnpda_nb.experiments"):
        there = importlib.import_module(module)
        assert list(api[module]) == list(there.__all__) and all(hasattr(there, name) for name in there.__all__)
    assert not any("_modidx" in module for module in api)
    with pytest.raises(ModuleNotFoundError, match="^package: expected the name of an installed package, got 'no_such"):
        public_api("no_such_package")


def test_that_deprecations_are_found_in_files(tmp_path, monkeypatch):
    (tmp_path / "leaving").mkdir()
    (tmp_path / "leaving" / "__init__.py").write_text("")
    (tmp_path / "leaving" / "part.py").write_text(
        '__all__ = ["f", "g", "C", "h"]\n@deprecated("0.1.0", "g")\ndef f(): ...\n'
        '@deprecated("0.1.0", old="new")\ndef g(new): ...\n'
        '@deprecated(since="0.2.0", instead="f")\nclass C: ...\ndef h(): ...\n@deprecated("0.1.0", "h")\ndef _i(): ...\n'
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert public_api("leaving") == {"leaving.part": ("f", "g", "C", "h")}
    assert deprecations("leaving") == {"leaving.part.f": "0.1.0", "leaving.part.C": "0.2.0"}


# ---------------------------------------------------------------------------------------------- deprecations


@deprecated("0.1.0", "new")
def old(x):
    """Twice x."""
    return 2 * x


@deprecated("0.1.0", size="width", colour="shade")
def box(width, shade="grey"):
    return width, shade


@deprecated("0.1.0", "Square")
class Rectangle:
    def __init__(self, side):
        self.side = side


def heard(call) -> tuple[object, list]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        return call(), caught


def test_that_a_deprecated_call_warns_on_the_line_of_the_caller():
    for call, said in (
        (lambda: old(2), "old is deprecated since 0.1.0: use new"),
        (lambda: box(size=2), "size of box is deprecated since 0.1.0: use width"),
        (lambda: Rectangle(2), "Rectangle is deprecated since 0.1.0: use Square"),
    ):
        _, (warning,) = heard(call)
        assert str(warning.message) == said and warning.category is FutureWarning
        assert Path(warning.filename) == Path(__file__) and warning.lineno == inspect.getsourcelines(call)[1]


def test_that_what_is_deprecated_still_works_and_looks_as_before():
    assert heard(lambda: old(3))[0] == 6 and old.__name__ == "old" and old.__doc__ == "Twice x."
    assert list(inspect.signature(box).parameters) == ["width", "shade"]
    assert isinstance(heard(lambda: Rectangle(2))[0], Rectangle) and isinstance(Rectangle, type)
    answer, both = heard(lambda: box(size=2, colour="red"))
    assert answer == (2, "red") and len(both) == 2


def test_that_new_names_are_silent_and_both_names_an_error():
    assert not heard(lambda: box(2, shade="red"))[1]
    with pytest.raises(TypeError, match="^size: expected width alone, which is its new name, got both"):
        heard(lambda: box(width=2, size=2))
    for wrong in ({}, {"instead": "new", "size": "width"}):
        with pytest.raises(ValueError, match="^instead: expected either"):
            deprecated("0.1.0", **wrong)


# ---------------------------------------------------------------------------------------------- annotations


def unannotated() -> dict[str, list[str]]:
    """`{"module.callable": parameters without annotation}` of public functions, and of public methods of public classes."""
    found = {}
    for module, names in public_api().items():
        stem = module.removeprefix("pnpda_nb.")
        path = PACKAGE.joinpath(*stem.split(".")).with_suffix(".py")
        path = path if path.exists() else PACKAGE.joinpath(*stem.split("."), "__init__.py")
        for node in ast.parse(path.read_text()).body:
            if getattr(node, "name", None) not in names:
                continue
            inside = node.body if isinstance(node, ast.ClassDef) else [node]
            for f in inside:
                if isinstance(f, ast.FunctionDef) and (not f.name.startswith("_") or f.name in ("__init__", "__call__")):
                    if missing := without_annotation(f, method=f is not node):
                        found[f"{stem}.{node.name}{'' if f is node else '.' + f.name}"] = missing
    return found


def without_annotation(f: ast.FunctionDef, method: bool) -> list[str]:
    static = any(getattr(d, "id", "") == "staticmethod" for d in f.decorator_list)
    places = (f.args.posonlyargs + f.args.args)[int(method and not static) :]
    rest = [a for a in (f.args.vararg, f.args.kwarg) if a is not None]
    missing = [a.arg for a in [*places, *f.args.kwonlyargs, *rest] if a.annotation is None]
    return missing + ["return"] * (f.returns is None and f.name != "__init__")


def test_that_everything_public_is_annotated():
    missing = {name: what for name, what in unannotated().items() if name not in UNANNOTATED}
    assert not missing, "\n".join(f"{name}: annotate {', '.join(what)}" for name, what in missing.items())


def test_that_a_missing_annotation_would_be_found():
    tree = ast.parse("class A:\n def f(self, x, *a, y: int = 1, **k) -> int: ...\n @staticmethod\n def g(x: int): ...").body[0]
    assert [without_annotation(f, True) for f in tree.body] == [["x", "a", "k"], ["return"]]
