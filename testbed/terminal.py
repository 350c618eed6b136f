# SPDX-License-Identifier: Apache-2.0
"""A real terminal, by tmux: what is on the screen, keys, and another size."""

import time
from collections.abc import Callable
from pathlib import Path

from testbed.peers import run

PATIENCE = 30.0
"""Seconds for something to appear on the screen."""


class Terminal:
    """A tmux of its own with one program in it."""

    def __init__(self, directory: Path, command: list[str], width: int, height: int) -> None:
        self._tmux = ["tmux", "-u", "-f", "/dev/null", "-S", str(directory / "tmux")]
        # Behind the program, what a user's shell would be.
        behind = 'trap : INT; "$@"; echo "status $?"; exec sleep 600'
        words = [
            "env",
            "-u",
            "COLUMNS",
            "-u",
            "LINES",
            "LANG=C.UTF-8",
            "sh",
            "-c",
            behind,
            "sh",
            *command,
        ]
        run([*self._tmux, "new-session", "-d", "-x", str(width), "-y", str(height), *words])

    def screen(self) -> str:
        return run([*self._tmux, "capture-pane", "-p"])

    def wait_for(self, what: Callable[[str], object]) -> str:
        """The screen as soon as it is as wanted."""
        deadline = time.monotonic() + PATIENCE
        while True:
            text = self.screen()
            if what(text):
                return text
            assert time.monotonic() < deadline, text
            time.sleep(0.05)

    def press(self, *keys: str) -> None:
        run([*self._tmux, "send-keys", *keys])

    def resize(self, width: int, height: int) -> None:
        run([*self._tmux, "resize-window", "-x", str(width), "-y", str(height)])

    def close(self) -> None:
        run([*self._tmux, "kill-server"], check=False)
