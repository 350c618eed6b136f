# SPDX-License-Identifier: Apache-2.0
"""A guest's serial console: wait for what it prints, type, run shell commands.

Reading is expect-like: ``wait_for`` looks at what came after the previous match, so that
each line is matched once, in order. Nothing here sleeps: a wait ends with the match, with
the console closed (the guest died), or with the caller's time limit; the two errors show the
last lines that the guest printed.
"""

import codecs
import itertools
import re
from collections.abc import Callable

import trio

from nbdstream.errors import NbdstreamError

TRANSCRIPT_LIMIT = 4 << 20
"""Characters of the transcript that are kept; a guest that babbles loses the oldest."""
TAIL_LINES = 25


class ConsoleError(NbdstreamError):
    """What was waited for did not appear."""


class ConsoleClosedError(ConsoleError):
    """The console was closed: the guest, or its QEMU, is gone."""


class ConsoleTimeoutError(ConsoleError):
    """The guest did not print it in time."""


class GuestCommandError(ConsoleError):
    """A command in the guest ended with a status other than zero."""

    def __init__(self, command: str, status: int, output: str) -> None:
        super().__init__(f"{command!r} ended with status {status} in the guest: {output}")
        self.status = status
        self.output = output


class Console:
    """The serial console on *stream*; ``pump`` must run in a task of its own.

    *on_text* is called with each piece of text as it arrives (for logs and live views).
    """

    def __init__(
        self, stream: trio.abc.Stream, on_text: Callable[[str], None] | None = None
    ) -> None:
        self._stream = stream
        self._on_text = on_text
        self._text = ""
        self._seen = 0
        self._closed = False
        self._changed = trio.lowlevel.ParkingLot()
        self._tokens = itertools.count(1)

    @property
    def transcript(self) -> str:
        """Everything that the guest has printed, up to TRANSCRIPT_LIMIT characters."""
        return self._text

    async def pump(self) -> None:
        """Read until the console closes; wakes those who wait."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        try:
            while data := await self._stream.receive_some():
                self._add(decoder.decode(data).replace("\r", ""))
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # as good as the end: those who wait are told below
        finally:
            self._closed = True
            self._changed.unpark_all()

    def _add(self, text: str) -> None:
        self._text += text
        if (excess := len(self._text) - TRANSCRIPT_LIMIT) > 0:
            self._text = self._text[excess:]
            self._seen = max(0, self._seen - excess)
        self._changed.unpark_all()
        if self._on_text is not None and text:
            self._on_text(text)

    async def wait_for(self, pattern: str, within: float) -> re.Match[str]:
        """Wait until *pattern*, a regular expression, matches what has not been matched yet.

        Lines end with a newline alone, and ``^`` and ``$`` match at each. Raises
        ConsoleTimeoutError after *within* seconds, ConsoleClosedError if the console
        closes before. Cancelled: nothing was consumed.
        """
        compiled = re.compile(pattern, re.MULTILINE)
        with trio.move_on_after(within):
            while True:
                await trio.lowlevel.checkpoint()
                if match := compiled.search(self._text, self._seen):
                    self._seen = match.end()
                    return match
                if self._closed:
                    raise ConsoleClosedError(
                        f"the guest's console closed before {pattern!r}; it ended with:\n"
                        + self.tail()
                    )
                await self._changed.park()
        raise ConsoleTimeoutError(
            f"the guest did not print {pattern!r} in {within:g} s; it ended with:\n{self.tail()}"
        )

    def tail(self) -> str:
        """The last lines that the guest printed."""
        return "\n".join(self._text.splitlines()[-TAIL_LINES:])

    async def send(self, text: str) -> None:
        """Type *text*. Raises ConsoleClosedError if QEMU has closed it."""
        try:
            await self._stream.send_all(text.encode())
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise ConsoleClosedError(f"the guest is gone; it ended with:\n{self.tail()}") from error

    async def run(self, command: str, within: float = 60) -> str:
        """Run *command* in the shell on the console and return what it printed.

        The shell must be at its prompt; *command* is one line. Raises GuestCommandError
        if it ends with a status other than zero, and what ``wait_for`` raises.
        """
        token = f"run-{next(self._tokens)}"
        # The terminal echoes what is typed. The quotes keep the echo from matching.
        await self.send(f"echo '<''{token}>'; {{ {command}; }} 2>&1; echo \"<\"'/{token} '$?'>'\n")
        await self.wait_for(f"<{token}>\n", within)
        match = await self.wait_for(rf"(?s)(.*?)</{token} (\d+)>\n", within)
        output, status = match[1], int(match[2])
        if status != 0:
            raise GuestCommandError(command, status, output)
        return output
