# SPDX-License-Identifier: Apache-2.0
"""What leaves a background task, and what does not."""

import errno
import logging
import os
from pathlib import Path

import pytest
import trio
import trio.testing

from nbdstream import tasks
from nbdstream.errors import LeafFormatError, sole_error
from nbdstream.health import KEPT, Health
from nbdstream.tasks import in_worker, open_background_nursery, start_contained, surely


async def fail(error: Exception) -> None:
    await trio.lowlevel.checkpoint()
    raise error


async def fail_in_groups(error: Exception) -> None:
    async with trio.open_nursery() as outer:
        async with trio.open_nursery():
            outer.start_soon(trio.sleep_forever)
            raise error


@pytest.mark.parametrize("task", [fail, fail_in_groups])
@pytest.mark.parametrize(
    ("error", "trace"), [(LeafFormatError("damaged"), False), (ZeroDivisionError("a bug"), True)]
)
async def test_a_failure_stays_its_own_and_is_reported(
    task: object, error: Exception, trace: bool, caplog: pytest.LogCaptureFixture
) -> None:
    health = Health()
    async with trio.open_nursery() as nursery:
        start_contained(nursery, "part", health.report, task, error)  # type: ignore[arg-type]
        await trio.testing.wait_all_tasks_blocked()
        assert health.problems == [f"part: {error}"]
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert (record.exc_info is not None) == trace


async def test_cancellation_gets_through() -> None:
    health = Health()
    with trio.fail_after(1):
        async with trio.open_nursery() as nursery:
            start_contained(nursery, "part", health.report, trio.sleep_forever)
            nursery.cancel_scope.cancel()
    assert health.problems == []


async def test_a_failure_while_it_is_cancelled_is_contained_too() -> None:
    async def fail_at_the_end() -> None:
        try:
            await trio.sleep_forever()
        finally:
            raise LeafFormatError("damaged")

    health = Health()
    async with trio.open_nursery() as nursery:
        start_contained(nursery, "part", health.report, fail_at_the_end)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert health.problems == ["part: damaged"]


def test_the_sole_error_of_groups() -> None:
    error = ValueError("x")
    assert sole_error(ExceptionGroup("a", [ExceptionGroup("b", [error])])) is error
    assert sole_error(error) is error


def test_problems_are_bounded_and_said_once() -> None:
    health = Health()
    for number in (0, 0, *range(2 * KEPT)):
        health.report("part", ValueError(str(number)))
    assert len(health.problems) == KEPT
    assert health.problems[:2] == ["part: 0", "part: 1"]


async def test_the_error_of_a_body_comes_out_as_it_is() -> None:
    with pytest.raises(LeafFormatError):
        async with open_background_nursery() as nursery:
            nursery.start_soon(trio.sleep_forever)
            raise LeafFormatError("damaged")


@pytest.fixture
def no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """The system starts no thread any more."""

    def fail(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr("trio._core._thread_cache.ThreadCache.start_thread_soon", fail)


async def test_a_lack_of_threads_is_an_error_of_the_system(no_thread: None) -> None:
    with pytest.raises(OSError, match="no thread") as caught:
        await in_worker(os.getpid)
    assert caught.value.errno == errno.EAGAIN


async def test_what_has_to_be_done_is_done_without_a_thread(no_thread: None) -> None:
    done = []
    await surely(lambda: done.append(True))
    assert done == [True]


async def test_other_errors_of_a_worker_come_out_as_they_are() -> None:
    def fail() -> None:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        await in_worker(fail)


def test_every_worker_is_started_in_one_place() -> None:
    package = Path(tasks.__file__).parent
    found = [path.name for path in package.rglob("*.py") if "to_thread" in path.read_text()]
    assert found == ["tasks.py"]
