"""Thousands of command lines, most of them wrong: one line, a status that is known, and nobody's files changed. Long ones with
`--slow`.
"""

import contextlib
import glob
import hashlib
import io
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from pnpda_nb import cli
from pnpda_nb.experiments import STUDIES

STATUSES = {0, 2, 130}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A small one of everything that a command reads."""
    folder, r = tmp_path_factory.mktemp("inputs"), np.random.default_rng(0)
    b = r.standard_normal((60, 3))
    pairs = xr.Dataset({"T_background": (("time", "x"), b), "T_analysis": (("time", "x"), b + 0.1 * r.standard_normal(b.shape))})
    pairs.to_netcdf(folder / "pairs.nc")
    for number in (1, 2):
        pairs.isel(time=slice(30 * number - 30, 30 * number)).to_netcdf(folder / f"part_{number}.nc")
    pairs.isel(time=slice(0, 1))[["T_background"]].to_netcdf(folder / "today.nc")
    with contextlib.suppress(ImportError):
        pairs.to_zarr(folder / "pairs.zarr", zarr_format=2, consolidated=False)
    (folder / "seen.csv").write_text("value,error,x_index\n0.5,0.1,1\n")
    status, said = in_process(
        ["train", str(folder / "pairs.nc"), "--out", str(folder / "prior.safetensors"), "--epochs", "1", "--paper"], folder
    )
    assert status == 0, said
    (folder / "prior.html").unlink()
    content = (folder / "prior.safetensors").read_bytes()
    (folder / "half.safetensors").write_bytes(content[: len(content) // 2])
    (folder / "half.nc").write_bytes((folder / "pairs.nc").read_bytes()[:3000])
    (folder / "empty.nc").touch(), (folder / "text.csv").write_text("no table\n\x00\xff"), (folder / "folder").mkdir()
    (
        (folder / "link.nc").symlink_to("pairs.nc"),
        (folder / "loop.nc").symlink_to("loop.nc"),
        (folder / "nowhere.nc").symlink_to("gone/there.nc"),
    )
    os.link(folder / "today.nc", folder / "hard.nc")
    return folder


def contents(folder: Path) -> dict[str, str]:
    """What every path below a folder is: the digest of a file, where a link leads, or a folder."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        found[name] = (
            f"to {os.readlink(path)}"
            if path.is_symlink()
            else hashlib.sha256(path.read_bytes()).hexdigest()
            if path.is_file()
            else "folder"
        )
    return found


def in_process(words: list[str], folder: Path) -> tuple[int, str]:
    """The status of a command, and what it wrote where errors go."""
    before, argv = os.getcwd(), sys.argv
    out, err = io.TextIOWrapper(io.BytesIO(), "ascii"), io.TextIOWrapper(io.BytesIO(), "ascii")
    os.chdir(folder)
    sys.argv, status = ["pnpda", *words], None
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            cli.main()
    except SystemExit as end:
        status = end.code
    finally:
        sys.argv = argv
        os.chdir(before)
    texts = [(t.flush(), t.buffer.getvalue().decode("ascii"))[1] for t in (out, err)]
    assert "\x1b" not in texts[0]
    return status, texts[1]


def by_subprocess(words: list[str], folder: Path) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "pnpda_nb", *words],
        cwd=folder,
        capture_output=True,
        env=os.environ | {"PYTHONPATH": str(Path(cli.__file__).parents[1])},
    )
    return done.returncode, done.stderr.decode("utf-8", "surrogateescape")


def complaint(status: int | None, said: str, before: dict, after: dict) -> str:
    """What is wrong with what a command did, or nothing. `before` and `after` are the contents of the inputs' folder."""
    lines = [line for line in said.splitlines() if not line.startswith("pnpda: warning: ")]
    if status not in STATUSES:
        return f"status {status}"
    if "Traceback" in said or "unexpected error" in said:
        return "nobody foresaw it"
    if status and (len(lines) != 1 or not lines[0].startswith("pnpda: ") or len(lines[0]) < 12):
        return f"{len(lines)} lines"
    if any(ord(c) < 32 and c != "\n" for c in said):
        return "control characters"
    if changed := sorted(name for name in before if before[name] != after.get(name)):
        return f"inputs changed: {changed}"
    if left := sorted(name for name in after if ".part" in Path(name).name):
        return f"left over: {left}"
    return ""


# ---------------------------------------------------------------- command lines

ODD = [
    "",
    " ",
    ".",
    "..",
    "/",
    "~",
    "-",
    "--",
    "=",
    ",",
    ",,",
    "a,,b",
    "nan",
    "inf",
    "-1",
    "0",
    "1e3",
    "1e400",
    "0x10",
    "9" * 20,
    "9" * 5000,
    "-" + "9" * 20,
    "None",
    "true",
    "é ü ±",
    "\u202e",
    "\x1b]0;x\x07",
    "a\nb",
    "a\rb",
    "a\tb",
    "\x00",
    "a\x00b",
    "\udcff",
    "\ud800",
    "*",
    "*.nc",
    "[",
    "[!",
    "?",
    "x" * 255,
    "x" * 300 + ".nc",
    "d/" * 2000 + "x.nc",
    "/dev/null",
    "/dev/zero",
    "/dev/full",
    "/proc/nowhere/x.nc",
    "{}",
    "%s",
    "$HOME",
    "🌍.nc",
]
NUMBERS = [
    "-5",
    "0",
    "-1",
    "1.5",
    "1e3",
    "nan",
    "inf",
    "",
    "many",
    "0x10",
    "١",
    str(2**63),
    str(2**70),
    "-" + str(2**70),
    "9" * 5000,
    "1_0",
    " 3",
    "--5",
]
FILES = [
    "pairs.nc",
    "part_*.nc",
    "part_?.nc",
    "today.nc",
    "hard.nc",
    "link.nc",
    "loop.nc",
    "nowhere.nc",
    "pairs.zarr",
    "pairs.zarr/",
    "seen.csv",
    "text.csv",
    "prior.safetensors",
    "half.safetensors",
    "half.nc",
    "empty.nc",
    "folder",
    "gone.nc",
    "*.nc",
    "../*/pairs.nc",
]
OUTS = [
    "new.nc",
    "new.html",
    "new.md",
    "new.safetensors",
    "new",
    "deep/er/new.nc",
    "d/../pairs.nc",
    "pairs.nc",
    "./today.nc",
    "link.nc",
    "hard.nc",
    "loop.nc",
    "pairs.zarr/new.nc",
    "pairs.zarr/.zattrs",
    "folder",
    "folder/",
    "seen.csv",
    "seen.csv/new.nc",
    "prior.safetensors",
    "x" * 240 + ".nc",
    "new.NC",
    "new.nc/",
]
COMMANDS = {
    "train": (
        ["ARCHIVE"],
        {
            "--out": "out",
            "--report": "out",
            "--seed": "number",
            "--epochs": "number",
            "--memory": "number",
            "--kind": "word",
            "--names": "word",
            "--samples": "word",
        },
        ["--paper"],
    ),
    "assimilate": (
        [],
        {
            "--prior": "file",
            "--background": "file",
            "--observations": "file",
            "--out": "out",
            "--report": "out",
            "--members": "number",
            "--iterations": "number",
            "--ensemble": "number",
            "--seed": "number",
            "--names": "word",
            "--samples": "word",
        },
        [],
    ),
    "describe": (["FILE"], {"--names": "word", "--samples": "word"}, []),
    "run": (
        ["EXPERIMENT"],
        {
            "--preset": "preset",
            "--methods": "method",
            "--method": "word",
            "--runs": "number",
            "--members": "number",
            "--seed": "number",
            "--set": "setting",
            "--out": "out",
            "--workers": "number",
            "--scheduler": "word",
        },
        [],
    ),
    "bench": ([], {"--only": "word", "--out": "out"}, ["--quick", "--full"]),
    "published": ([], {"--runs": "number", "--seed": "number", "--out": "out"}, ["--quick"]),
    "list": ([], {}, []),
}
NEEDED = {"train": ["--out"], "assimilate": ["--prior", "--background", "--observations", "--out"]}
RIGHT = {
    "--prior": "prior.safetensors",
    "--background": "today.nc",
    "--observations": "seen.csv",
    "ARCHIVE": "pairs.nc",
    "FILE": "pairs.nc",
}


def value_for(kind: str, r: random.Random, inputs: Path, scratch: Path) -> str:
    if r.random() < 0.25:
        return r.choice(ODD)
    if kind == "file":
        return f"{inputs}/{r.choice(FILES)}"
    if kind == "out":
        return f"{r.choice([inputs, scratch, scratch])}/{r.choice(OUTS)}"
    if kind == "number":
        return r.choice(NUMBERS)
    if kind == "setting":
        settings = vars(next(iter(r.choice(list(STUDIES.values())).presets.values())))
        name = r.choice([*settings, "speed", "archive", "prior"])
        odd = [*ODD, *NUMBERS, "1e300", "1e-300", "1000000", "1,,2", ",", "0,0", "1,x", "nan,1"]
        return f"{name}={r.choice([*odd, f'{inputs}/half.nc', f'{inputs}/half.safetensors'])}"
    return r.choice(
        {
            "preset": ["smoke", "paper", "huge"],
            "method": ["free_run", "enkf", "pnpda", "var3d_gc", "4dvar", "free_run,free_run"],
            "word": ["T", "time", "background,analysis", "analysis,background", "T,T", "x", "enkf,nothing", "tcp://", "host:0"],
        }[kind]
    )


def command_line(r: random.Random, inputs: Path, scratch: Path) -> list[str]:
    """A command line of which something is wrong, or that is quick."""
    name = r.choice(list(COMMANDS)) if r.random() < 0.98 else r.choice(ODD)
    positional, options, flags = COMMANDS.get(name, ([], {}, []))
    words = [name]
    for kind in positional:
        if r.random() < 0.95:
            right = r.choice(list(STUDIES)) if kind == "EXPERIMENT" else f"{inputs}/{RIGHT[kind]}"
            words.append(right if r.random() < 0.6 else value_for("file", r, inputs, scratch))
    needed = NEEDED.get(name, [])
    for option in r.sample([o for o in options if o not in needed], k=r.randint(0, min(3, len(options) - len(needed)))):
        words += [option, value_for(options[option], r, inputs, scratch)]
    for option in needed:
        if r.random() < 0.97:
            right = f"{inputs}/{RIGHT[option]}" if option in RIGHT else f"{scratch}/new.nc"
            words += [option, right if r.random() < 0.7 else value_for(options[option], r, inputs, scratch)]
    words += [flag for flag in flags if r.random() < 0.3]
    if r.random() < 0.1:
        words.insert(r.randint(1, len(words)), r.choice(["--bogus", "-x", "--out", "--seed", "--set", *ODD]))
    if name == "train" and "--epochs" not in words:
        words += ["--epochs", "1"]
    if name in ("run", "bench", "published"):  # with nothing wrong they take minutes, so that something is
        words += r.choice(
            {
                "run": [["--runs", "0"], ["--set", "speed=3"], ["--methods", "4dvar"], *3 * [["--out", f"{inputs}/seen.csv"]]],
                "bench": [["--only", "nothing"], ["--quick", "--full"], ["--out", f"{inputs}/seen.csv"]],
                "published": [["--runs", "0"], ["--seed", "x"], ["--out", f"{inputs}/seen.csv"]],
            }[name]
        )
    return words


def may_replace(words: list[str], inputs: Path) -> set[str]:
    """Names below `inputs` that a command line says are to be written, and does not read."""
    after = {
        option: word
        for option, word in zip(words, words[1:])
        if option in ("--out", "--report", "--prior", "--background", "--observations")
    }
    read = [*words[1:2], *(after.get(option, "") for option in ("--prior", "--background", "--observations"))]
    read = {os.path.realpath(path) for text in read for path in (text, *glob.glob(text))} if "\x00" not in "".join(read) else set()
    written = {
        str(path)
        for option in ("--out", "--report")
        if option in after
        for path in (Path(after[option]), Path(after[option]).with_suffix(".html"))
    }
    return {
        os.path.relpath(path, inputs)
        for path in written
        if not any(f"{os.path.realpath(path)}/".startswith(f"{other}/") for other in read)
    }


def try_out(count: int, seed: int, run, inputs: Path, scratch: Path) -> tuple[list[str], dict[int, int]]:
    """The complaints about `count` command lines, and how often each status came."""
    r, wrong, statuses, before = random.Random(seed), [], {}, contents(inputs)
    original = {
        name: (inputs / name).read_bytes() for name in before if (inputs / name).is_file() and not (inputs / name).is_symlink()
    }
    for _ in range(count):
        words = command_line(r, inputs, scratch)
        if run is by_subprocess:  # which the system would not start
            words = [
                w.replace("\x00", "0")
                .encode("utf-8", "surrogatepass" if "\ud800" in w else "surrogateescape")
                .decode("utf-8", "surrogateescape")
                for w in words
            ]
        status, said = run(words, scratch)
        statuses[status] = statuses.get(status, 0) + 1
        after = contents(inputs)
        if status == 0:
            for name in may_replace(words, inputs) & {name for name in before if before[name] != after.get(name)}:
                (inputs / name).unlink()
                (inputs / name).write_bytes(original[name]) if name in original else (inputs / name).symlink_to(
                    before[name].removeprefix("to ")
                )
                after[name] = before[name]
        if problem := complaint(status, said, before, after | {f"new/{name}": what for name, what in contents(scratch).items()}):
            wrong.append(f"{problem}: {words!r} said {said[-300:]!r}")
        for name in sorted(after.keys() - before.keys(), reverse=True):
            (inputs / name).rmdir() if after[name] == "folder" else (inputs / name).unlink()
        before = {name: what for name, what in after.items() if name in before}
    return wrong, statuses


def test_that_command_lines_end_as_they_should(inputs, tmp_path):
    wrong, statuses = try_out(100, 1, in_process, inputs, tmp_path)
    assert not wrong, "\n".join(wrong)
    assert statuses.get(0, 0) > 3 and statuses[2] > 50  # they do not all fail at the first word


def test_that_command_lines_in_a_shell_end_as_they_should(inputs, tmp_path):
    wrong, _ = try_out(1, 2, by_subprocess, inputs, tmp_path)
    assert not wrong, "\n".join(wrong)


@pytest.mark.slow
@pytest.mark.parametrize("count, run", [(2000, in_process), (100, by_subprocess)])
def test_that_thousands_of_command_lines_end_as_they_should(inputs, tmp_path, count, run):
    wrong, _ = try_out(count, int(os.environ.get("PNPDA_FUZZ_SEED", 3)), run, inputs, tmp_path)
    assert not wrong, f"{len(wrong)}\n" + "\n".join(wrong)


@pytest.mark.parametrize(
    "harm, found",
    [
        (lambda folder: 1 / 0, "nobody foresaw it"),
        (lambda folder: (folder / "pairs.nc").write_bytes(b""), "inputs changed: ['pairs.nc']"),
        (lambda folder: (folder / ".1.part.x.nc").touch(), "left over: ['.1.part.x.nc']"),
        (lambda folder: print("one\ntwo", file=sys.stderr) or int("x"), "3 lines"),
        (lambda folder: os._exit, ""),
    ],
)
def test_that_harm_would_be_found(inputs, tmp_path, monkeypatch, harm, found):
    (tmp_path / "pairs.nc").write_bytes(b"a")
    before = contents(tmp_path)
    listing = next(command for command in cli.app.registered_commands if command.name == "list")
    monkeypatch.setattr(listing, "callback", lambda: harm(tmp_path) and None)
    status, said = in_process(["list"], tmp_path)
    assert complaint(status, said, before, contents(tmp_path)) == found
