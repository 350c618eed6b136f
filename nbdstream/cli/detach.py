# SPDX-License-Identifier: Apache-2.0
"""Going to the background, as daemon(7) describes it, and telling the caller how it went."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

from nbdstream.cli import describe
from nbdstream.cli.output import say
from nbdstream.errors import TROUBLE, StoreError, sole_error

_READY = "ready"
# A log that is longer begins again.
LOG_MOST = 1 << 20


def detached(work: Callable[[Callable[[], None]], None], log: Path) -> None:
    """Do some work in a process of its own, which is not waited for: a session leader without a
    terminal, whose output goes to the file ``log``.

    ``work`` is given a function that it calls once it is ready; then this returns. No thread may
    run. Raises StoreError, in the words of the work's own error, if it ends before.
    """
    reader, writer = os.pipe()
    sys.stdout.flush()
    if os.fork() == 0:
        os.close(reader)
        _run(work, log, writer)
    os.close(writer)
    with open(reader) as pipe:
        words = pipe.read()
    if words != _READY:
        raise StoreError(words or f"the process ended at once; see {log}")


def _run(work: Callable[[Callable[[], None]], None], log: Path, writer: int) -> None:
    """The new process: never returns."""
    status = 1
    told = False

    def tell(words: str) -> None:
        nonlocal told
        if not told:
            told = True
            os.write(writer, words.encode())
            os.close(writer)

    try:
        os.setsid()
        _redirect(log)
        work(lambda: tell(_READY))
        status = 0
    except (*TROUBLE, ExceptionGroup) as error:
        words = describe(sole_error(error))
        say(f"nbdstream: error: {words}", err=True)
        tell(words)
    finally:
        os._exit(status)


def _redirect(log: Path) -> None:
    """Let go of the terminal and of the directory. Raises OSError."""
    fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    if os.fstat(fd).st_size > LOG_MOST:
        os.ftruncate(fd, 0)
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    for old, new in ((null, 0), (null, 1), (fd, 2)):
        os.dup2(old, new)
    os.chdir("/")
