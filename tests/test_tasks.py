# SPDX-License-Identifier: Apache-2.0
"""What leaves a background task, and what does not."""

import logging

import pytest
import trio
import trio.testing

from nbdstream.errors import LeafFormatError, sole_error
from nbdstream.health import KEPT, Health
from nbdstream.tasks import open_background_nursery, start_contained


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
