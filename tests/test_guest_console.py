# SPDX-License-Identifier: Apache-2.0
"""The console: matching what a guest prints, in order, and what happens when it does not."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from nbdstream.guest import console as console_module
from nbdstream.guest.console import (
    Console,
    ConsoleClosedError,
    ConsoleTimeoutError,
    GuestCommandError,
)


@asynccontextmanager
async def open_console() -> AsyncIterator[tuple[Console, trio.abc.Stream]]:
    here, there = trio.testing.memory_stream_pair()
    console = Console(here)
    async with trio.open_nursery() as nursery, here, there:
        nursery.start_soon(console.pump)
        yield console, there


async def test_each_line_is_matched_once_and_in_order() -> None:
    async with open_console() as (console, guest):
        await guest.send_all(b"one 1\r\ntwo 2\r\none 3\r\n")
        assert (await console.wait_for(r"^one (\d)$", 5))[1] == "1"
        assert (await console.wait_for(r"^one (\d)$", 5))[1] == "3"
        assert console.transcript == "one 1\ntwo 2\none 3\n"


async def test_a_match_may_arrive_in_pieces() -> None:
    async with open_console() as (console, guest), trio.open_nursery() as nursery:
        nursery.start_soon(console.wait_for, "grüße\n", 5)
        for byte in "grüße\r\n".encode():
            await trio.testing.wait_all_tasks_blocked()
            await guest.send_all(bytes([byte]))


async def test_the_end_of_the_console_ends_the_wait_and_shows_the_tail() -> None:
    async with open_console() as (console, guest):
        await guest.send_all(b"Kernel panic\n")
        await guest.aclose()
        with pytest.raises(ConsoleClosedError, match="Kernel panic"):
            await console.wait_for("login:", 5)
        with pytest.raises(ConsoleClosedError, match="Kernel panic"):
            await console.send("hello\n")


async def test_what_was_printed_before_the_end_still_matches() -> None:
    async with open_console() as (console, guest):
        await guest.send_all(b"login:")
        await guest.aclose()
        await console.wait_for("login:", 5)


async def test_a_timeout_shows_the_tail(autojump_clock: trio.testing.MockClock) -> None:
    async with open_console() as (console, guest):
        await guest.send_all(b"still booting\n")
        with pytest.raises(ConsoleTimeoutError, match=r"'login:' in 60 s(.|\n)*still booting"):
            await console.wait_for("login:", 60)
        assert trio.current_time() >= 60


async def test_a_babbling_guest_does_not_fill_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console_module, "TRANSCRIPT_LIMIT", 100)
    async with open_console() as (console, guest):
        await guest.send_all(b"first\n")
        await console.wait_for("first", 5)
        for _ in range(50):
            await guest.send_all(b"babble\n" * 10)
        await guest.send_all(b"last\n")
        await console.wait_for("last", 5)
        assert len(console.transcript) == 100


async def shell(guest: trio.abc.Stream) -> None:
    """A real shell behind a real terminal's habits: echo, and CR LF at line ends."""
    buffer = b""
    async for data in guest:
        buffer += data
        while b"\n" in buffer:
            line, _, buffer = buffer.partition(b"\n")
            await guest.send_all(b"# " + line + b"\r\n")
            done = await trio.run_process(["sh", "-c", line.decode()], capture_stdout=True)
            await guest.send_all(done.stdout.replace(b"\n", b"\r\n"))


async def test_commands_return_their_output_without_the_echo() -> None:
    async with open_console() as (console, guest), trio.open_nursery() as nursery:
        nursery.start_soon(shell, guest)
        assert await console.run("echo hello; echo again >&2") == "hello\nagain\n"
        assert await console.run("true") == ""
        assert await console.run("printf 'no newline'; echo") == "no newline\n"
        with pytest.raises(GuestCommandError) as caught:
            await console.run("echo why; (exit 3)")
        assert (caught.value.status, caught.value.output) == (3, "why\n")
        nursery.cancel_scope.cancel()
