"""The `pnpda` command in forks of one process that has imported everything, also what a command imports only when it needs it:
importing takes longer than most commands.
"""

import gc
import os
import resource
import sys
import tempfile
import traceback
from multiprocessing.connection import Connection
from typing import IO

from tqdm import tqdm

import pnpda_nb.cli


def serve(calls: Connection) -> None:
    """Answer calls (words, folder, code that the process runs first) with status, output and errors until nobody calls."""
    import warm

    tqdm.get_lock()  # one for all, which this process gives back
    known = {"at_once": warm.at_once, "os": os, "pnpda_nb": pnpda_nb, "resource": resource, "sys": sys}
    gc.freeze()
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


def command(words: list, folder: str, before: str, known: dict, out: IO, err: IO) -> None:
    """Be `pnpda` with these words, and end."""
    os.chdir(folder)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0), os.dup2(out.fileno(), 1), os.dup2(err.fileno(), 2)
    sys.argv, status = ["pnpda", *words], 1
    try:
        exec(before, known)
        pnpda_nb.cli.main()
    except SystemExit as end:
        status = end.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in filter(None, (sys.stdout, sys.stderr)):
            stream.flush()
        os._exit(status)
