"""Make README.md from nbs/index.ipynb: `python tools/readme.py`, or `--check` to only say whether it is out of step.

Prose goes through pandoc, code cells and printed outputs become fenced blocks, pictures become files beside the notebook.
"""

from __future__ import annotations

import argparse
import base64
import json
import posixpath
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pypandoc
import yaml

ROOT = Path(__file__).resolve().parents[1]
NBS = ROOT / "nbs"
INDEX = NBS / "index.ipynb"
README = ROOT / "README.md"
PICTURES = "index_files"  # below nbs/, so that the notebook's folder holds all that belongs to it
NOTICE = "<!-- Made from nbs/index.ipynb by tools/readme.py: edit the notebook. -->\n\n"
FORMATS = ("--from=markdown-implicit_figures", "--to=gfm-tex_math_gfm+tex_math_dollars")  # $…$ stays $…$
HIDDEN = re.compile(r"^#\| *(hide|exporti?|default_exp|include: *false)\b", re.MULTILINE)
ANSI = re.compile(r"\x1b(?:[@-Z\\-_]|\[[0-?]*[ -/]*[@-~])")


def fence(text: str, language: str = "text") -> str:
    ticks = "`" * max([3, *(len(run) + 1 for run in re.findall(r"`{3,}", text))])
    return f"{ticks}{language}\n{text.rstrip()}\n{ticks}"


def cell_parts(number: int, cell: dict[str, Any], files: dict[Path, bytes]) -> list[str]:
    """One cell as markdown; its pictures are added to `files`."""
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        return [source]
    if cell["cell_type"] != "code" or HIDDEN.search(source):
        return []
    options = dict(re.findall(r"^#\| *([\w-]+): *(.*?) *$", source, re.MULTILINE))
    code = "\n".join(line for line in source.splitlines() if not line.startswith("#|")).strip("\n")
    parts = [fence(code, "python")] if code and options.get("echo") != "false" else []
    for output in cell["outputs"] if options.get("output") != "false" else []:
        data = output.get("data", {})
        if output["output_type"] == "stream" and output["name"] == "stdout":
            parts.append(fence(ANSI.sub("", "".join(output["text"]))))
        elif "image/png" in data:
            path = NBS / PICTURES / f"{options.get('label', f'cell-{number}')}.png"
            files[path] = base64.b64decode("".join(data["image/png"]))
            caption = yaml.safe_load(options.get("fig-cap", "''"))
            alt = yaml.safe_load(options.get("fig-alt", "''")) or caption
            parts += [f"![{alt}]({PICTURES}/{path.name})", caption]
        elif "text/markdown" in data:
            parts.append("".join(data["text/markdown"]))
        elif "text/plain" in data:
            parts.append(fence(ANSI.sub("", "".join(data["text/plain"]))))
    return parts


def from_the_top(markdown: str) -> str:
    """Links and pictures, written for nbs/, as seen from the folder above; what stands in code is left alone."""
    pattern = r"^(`{3,}).*?^\1[ \t]*$|(`+).+?\2|\]\((?!#|/|[a-z][a-z+.-]*:)(?P<path>[^)\s]+)"

    def rebase(match: re.Match[str]) -> str:
        return f"]({posixpath.normpath('nbs/' + match['path'])}" if match["path"] else match[0]

    return re.sub(pattern, rebase, markdown, flags=re.MULTILINE | re.DOTALL)


def make() -> tuple[str, dict[Path, bytes]]:
    """The text of README.md and the picture files that it shows."""
    files: dict[Path, bytes] = {}
    cells = json.loads(INDEX.read_text(encoding="utf-8"))["cells"]
    parts = [part for number, cell in enumerate(cells) for part in cell_parts(number, cell, files)]
    command = [pypandoc.get_pandoc_path(), *FORMATS, "--wrap=preserve", "--preserve-tabs"]
    config = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))
    bibliography = config.get("bibliography")
    if bibliography and (NBS / bibliography).exists():
        command += ["--citeproc", f"--bibliography={bibliography}"]
    done = subprocess.run(command, input="\n\n".join(parts) + "\n", capture_output=True, encoding="utf-8", cwd=NBS, check=False)
    if done.returncode or done.stderr.strip():
        raise RuntimeError(" ".join(done.stderr.split()))
    text = re.sub(r"^(`{3,}) (\w+)$", r"\1\2", done.stdout, flags=re.MULTILINE)  # pandoc writes "``` sh"
    if "\n## References\n" not in text:
        text = text.replace('<div id="refs"', '## References\n\n<div id="refs"')
    return NOTICE + from_the_top(text), files


def main() -> int:
    parser = argparse.ArgumentParser(description="Make README.md from nbs/index.ipynb.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with status 1 if README.md is out of step")
    check = parser.parse_args().check
    try:
        text, files = make()
    except (RuntimeError, OSError, KeyError, ValueError) as error:
        print(f"README.md cannot be made from nbs/index.ipynb: {error}", file=sys.stderr)
        return 1
    wanted = {README: text.encode(), **files}
    left_over = set((NBS / PICTURES).glob("*")) - files.keys()
    stale = [path for path, content in wanted.items() if not path.exists() or path.read_bytes() != content] + sorted(left_over)
    if check:
        if stale:
            names = ", ".join(str(path.relative_to(ROOT)) for path in stale)
            print(f"out of step with nbs/index.ipynb: {names}; run: python tools/readme.py", file=sys.stderr)
        return 1 if stale else 0
    for path in stale:
        if path in wanted:
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(wanted[path])
        else:
            path.unlink()
        print(path.relative_to(ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main())
