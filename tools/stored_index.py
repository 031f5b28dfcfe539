"""List the stored results for the package: `python tools/stored_index.py [--check]`.

Writes `pnpda_nb/results.json`, the digest of every file of `nbs/results`, the version and the address from which a file is
fetched by whoever has no clone. With `--check` nothing is written; the exit status is 1 where the list is not that of the files.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIST, RESULTS = ROOT / "pnpda_nb" / "results.json", ROOT / "nbs" / "results"
sys.path.insert(0, str(ROOT))
from pnpda_nb.core.disk import record_bytes  # noqa: E402


def listed() -> bytes:
    config = ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini", encoding="utf-8")
    about = config["DEFAULT"]
    files = sorted(path for path in RESULTS.rglob("*") if path.is_file())
    return record_bytes(
        {
            "version": about["version"],
            "address": f"{about['git_url']}/raw/{about['branch']}/nbs/results",
            "files": {path.relative_to(RESULTS).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files},
        }
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the list is old")
    if parser.parse_args().check:
        same = LIST.is_file() and LIST.read_bytes() == listed()
        print(f"{LIST.relative_to(ROOT)}: {'as the files are' if same else 'old: run python tools/stored_index.py'}")
        return int(not same)
    LIST.write_bytes(listed())
    return 0


if __name__ == "__main__":
    sys.exit(main())
