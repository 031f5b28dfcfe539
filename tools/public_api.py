"""Bring tests/public_api.txt, the list of public names, up to date: `python tools/public_api.py`.

Names that are new are added. A name that is gone is an error (and stays in the list) unless it was deprecated in a
version before this one; `--remove` takes it out all the same, for names that no released version had.
"""

from __future__ import annotations

import argparse
import sys
from configparser import ConfigParser
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIST = ROOT / "tests" / "public_api.txt"
MARK = "  deprecated since "

sys.path.insert(0, str(ROOT))


def version() -> str:
    config = ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini", encoding="utf-8")
    return config["DEFAULT"]["version"]


def listed(path: Path = LIST) -> dict[str, str]:
    """`{"module.name": version in which it was deprecated, or ""}` as the list has it."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return {name: since for name, _, since in (line.partition(MARK) for line in lines if line)}


@cache
def present() -> dict[str, str]:
    """The same as the package has it."""
    from pnpda_nb.core.interface import deprecations, public_api

    since = deprecations()
    names = sorted(f"{module}.{name}" for module, names in public_api().items() for name in names)
    return {name: since.get(name, "") for name in names}


def may_go(since: str, now: str) -> bool:
    """Whether what is deprecated since a version ("": not at all) may be absent from the version `now`: in the next minor one."""
    major_minor = [tuple(map(int, text.split(".")[:2])) for text in (since, now) if text]
    return len(major_minor) == 2 and major_minor[0] < major_minor[1]


def differences(before: dict[str, str], after: dict[str, str], now: str) -> list[str]:
    """One sentence for every public name that is gone too early."""
    sentences = []
    for name, since in before.items():
        if name not in after and not may_go(since, now):
            was = f"deprecated since {since}, which is not yet a minor version ago" if since else "never deprecated"
            sentences.append(
                f"{name} was public and is gone, {was}: bring it back under @deprecated (appendix J), or, if no released"
                " version had it, run `python tools/public_api.py --remove`"
            )
    return sentences


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--remove", action="store_true", help="also take out names that are gone and were not deprecated")
    before, after = listed(), present()
    problems = [] if parser.parse_args().remove else differences(before, after, version())
    kept = {name: since for name, since in before.items() if any(p.startswith(f"{name} ") for p in problems)}
    written = dict(sorted({**after, **kept}.items()))
    LIST.write_text("".join(f"{name}{MARK + since if since else ''}\n" for name, since in written.items()), encoding="utf-8")
    changes = [f"+ {name}" for name in written if name not in before] + [f"- {name}" for name in before if name not in written]
    print("\n".join([*changes[:40], *([f"and {len(changes) - 40} more"] if len(changes) > 40 else [])]))
    print(f"{LIST.relative_to(ROOT)}: {len(written)} names")
    if problems:
        sys.exit("\n".join(problems))


if __name__ == "__main__":
    main()
