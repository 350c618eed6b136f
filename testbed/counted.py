# SPDX-License-Identifier: Apache-2.0
"""nbdstream, with its tasks counted for a look from outside.

    python -m testbed.counted FILE nbdstream serve ...

At each SIGUSR1 the number of trio tasks and of Python objects is written to FILE, as JSON.
"""

import gc
import json
import signal
import sys
from pathlib import Path
from typing import Any

import trio

from nbdstream.cli import main


class _Tasks(trio.abc.Instrument):
    def __init__(self) -> None:
        self.living = 0

    def task_spawned(self, task: trio.lowlevel.Task) -> None:
        self.living += 1

    def task_exited(self, task: trio.lowlevel.Task) -> None:
        self.living -= 1


def _run() -> None:
    report, tasks, run = Path(sys.argv[1]), _Tasks(), trio.run
    del sys.argv[1:3]

    def write(*_: object) -> None:
        gc.collect()
        # What the server has frozen does not count: it is the same at all times.
        found = {"tasks": tasks.living, "objects": len(gc.get_objects())}
        waiting = report.with_suffix(".new")
        waiting.write_text(json.dumps(found))
        waiting.rename(report)

    def counted(*arguments: Any, **named: Any) -> Any:
        return run(*arguments, instruments=[tasks], **named)

    signal.signal(signal.SIGUSR1, write)
    trio.run = counted  # type: ignore[assignment]
    main()


if __name__ == "__main__":
    _run()
