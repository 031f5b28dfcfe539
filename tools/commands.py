"""The `pnpda` command in forks of one process that has imported everything, also what a command imports only when it needs it, and
has looked up of which files a part of a study is made. Importing takes longer than most commands.
"""

import gc
import importlib
import os
import resource  # noqa: F401  (for code that runs before a command)
import sys
import tempfile
import traceback
from multiprocessing.connection import Connection
from typing import IO


def serve(calls: Connection) -> None:
    """Answer calls (words, folder, code that the process runs first) with status, output and errors until nobody calls."""
    gc.disable()
    known = imported()
    gc.freeze()
    gc.enable()
    while True:
        try:
            words, folder, before = calls.recv()
        except EOFError:
            return
        out, err = tempfile.TemporaryFile(), tempfile.TemporaryFile()
        if not (child := os.fork()):
            command(words, folder, before, known, out, err)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        calls.send((status, *((f.seek(0), f.read().decode())[1] for f in (out, err))))


def imported() -> dict:
    """What is imported, by name, for code that runs before a command."""
    from warm import at_once

    wait = {name: sys.modules.pop(name) for name in [*sys.modules] if name.partition(".")[0] in ("numba", "dapper")}
    for name in ("cli", "dynamics", "experiments", "interop", "twin"):
        importlib.import_module(f"pnpda_nb.{name}")
    at_once = at_once | wait.keys() & sys.modules.keys()
    sys.modules |= wait
    for name in ("bench", "dynamics.kernels", "flow_matching", "learned", "operations"):
        importlib.import_module(f"pnpda_nb.{name}")
    sys.modules["pnpda_nb.sweep"].code_version("pnpda_nb.studies.parts")
    sys.modules["tqdm"].tqdm.get_lock()  # one for all, which this process gives back
    return {name: sys.modules[name] for name in ("os", "pnpda_nb", "resource", "sys")} | {"at_once": at_once}


def command(words: list, folder: str, before: str, known: dict, out: IO, err: IO) -> None:
    """Be `pnpda` with these words, and end."""
    os.chdir(folder)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0), os.dup2(out.fileno(), 1), os.dup2(err.fileno(), 2)
    sys.argv, status = ["pnpda", *words], 1
    try:
        exec(before, known)
        known["pnpda_nb"].cli.main()
    except SystemExit as end:
        status = end.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in filter(None, (sys.stdout, sys.stderr)):
            stream.flush()
        os._exit(status)
