# SPDX-License-Identifier: Apache-2.0
"""A sample of all injected faults; `./dev soak` runs many more, with fresh seeds.

Each failure prints the command that repeats it.
"""

import os
from collections.abc import Iterable

import pytest

from nbdstream.backing.connection import Connection
from nbdstream.leaf.raw import leaf as raw_leaf
from testbed.faults.__main__ import drawn
from testbed.faults.far import FAR_FAULTS
from testbed.faults.oracle import CELL, Oracle, backing_cell, written_cell
from testbed.faults.scenario import CELLS
from testbed.faults.shim import FAULTS, SERVER_FAULTS
from testbed.faults.trial import (
    CANCEL,
    CANCELLED,
    FAR,
    FORMATS,
    HELPER,
    SERVED,
    Point,
    broken_rules,
    points,
)

SAMPLE = 40
SAMPLE_SERVED = 12  # half a second each
SEED = int(os.environ.get("NBDSTREAM_SEED", "1"))


def broken_by(chosen: Iterable[Point]) -> dict[str, list[str]]:
    """What is broken, by the command that shows it."""
    found = ((point, broken_rules(point)) for point in chosen)
    return {f"python -m testbed.faults {point}": broken for point, broken in found if broken}


@pytest.mark.parametrize("image_format", FORMATS)
def test_a_sample_of_all_faults_breaks_no_rule(image_format: str) -> None:
    assert broken_by(drawn([image_format], SEED, SAMPLE)) == {}


@pytest.mark.parametrize("image_format", FAR)
def test_a_sample_of_a_far_servers_faults_breaks_no_rule(image_format: str) -> None:
    assert broken_by(drawn([image_format], SEED, SAMPLE)) == {}


def test_a_far_server_fails_in_each_way_at_each_of_its_replies() -> None:
    every = list(points("far-raw", SEED))
    assert every == list(points("far-raw", SEED))
    assert len(every) > 1000
    assert {(point.kind, point.fault) for point in every} == {
        (kind, fault) for kind, faults in FAR_FAULTS.items() for fault in faults
    }


def test_a_client_that_takes_errors_for_data_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Connection, "_reply_error", lambda _self, _error: None)
    wrong = [p for p in points("far-raw", 1) if (p.kind, p.fault) == ("far-read", "EIO")]
    assert any("shows" in line for point in wrong for line in broken_rules(point))


@pytest.mark.parametrize("image_format", HELPER)
def test_a_helper_that_is_killed_fails_no_request(image_format: str) -> None:
    assert broken_by(drawn([image_format], SEED, SAMPLE_SERVED)) == {}


@pytest.mark.parametrize("image_format", CANCELLED)
def test_a_stop_a_cancellation_or_a_hang_up_at_any_step_breaks_no_rule(image_format: str) -> None:
    assert broken_by(drawn([image_format], SEED, SAMPLE_SERVED)) == {}


def test_a_change_that_fails_after_a_failed_sync_without_need_is_found_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write = raw_leaf.RawLeaf.write

    def refusing(leaf: raw_leaf.RawLeaf, offset: int, view: memoryview) -> None:
        leaf._syncs.require()
        write(leaf, offset, view)

    monkeypatch.setattr(raw_leaf.RawLeaf, "write", refusing)
    failing = [p for p in points("raw", 1) if p.kind == "fdatasync"]
    assert any("needed no flush" in line for point in failing for line in broken_rules(point))


@pytest.mark.parametrize("image_format", SERVED)
def test_a_sample_of_faults_of_a_whole_server_breaks_no_rule(image_format: str) -> None:
    assert broken_by(drawn([image_format], SEED, SAMPLE_SERVED)) == {}


def test_a_whole_server_survives_what_it_seldom_meets() -> None:
    """No thread, no process, no pipe; and a socket that cannot be shut down, which once kept the
    event loop busy for ever."""
    rare = {"thread", "posix_spawn", "pidfd_open", "pipe", "shutdown", "accept", "connect"}
    every = list(points("served-raw", SEED))
    assert {point.kind for point in every} > rare | {"recv_into", "sendmsg", "preadv", "pwrite"}
    assert {point.kind for point in every} <= set(SERVER_FAULTS)
    first = {(point.kind, point.fault): point for point in reversed(every) if point.kind in rare}
    assert (
        broken_by([*first.values(), *(point for point in every if point.kind == "shutdown")]) == {}
    )


def test_points_are_of_every_kind_and_the_same_each_time() -> None:
    every = list(points("qcow2", 3))
    assert every == list(points("qcow2", 3))
    assert len(every) > 500
    kinds = {point.kind for point in every}
    assert {"pread", "pwrite", "fdatasync", "ftruncate", "fcntl", "open"} <= kinds
    assert kinds - set(FAULTS) == {"client0", "client1", "client2", "job", "service"}
    assert all(Point.parse(str(point)) == point for point in every)
    assert any(point.fault == CANCEL for point in every)


def test_the_oracle_tells_what_was_lost_and_what_is_foreign() -> None:
    oracle = Oracle.of_backing(CELLS)
    oracle.begin(range(2, 4), written_cell(1, 1))
    oracle.check(backing_cell(2) + written_cell(1, 1), 2, "either")
    oracle.acknowledge(range(2, 4), written_cell(1, 1))
    oracle.check(backing_cell(2), 2, "not flushed", durable=True)
    assert oracle.broken == []
    oracle.flushed([2])
    oracle.check(backing_cell(2), 2, "flushed", durable=True)
    oracle.check(backing_cell(4), 3, "of another place")
    oracle.check(bytes(CELL), 5, "never written")
    assert [line.split(":")[0] for line in oracle.broken] == [
        "flushed",
        "of another place",
        "never written",
    ]


def test_a_product_that_ignores_short_writes_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def careless(fd: int, view: memoryview, offset: int) -> None:
        os.pwrite(fd, view, offset)

    monkeypatch.setattr(raw_leaf, "write_exactly", careless)
    short = [p for p in points("raw", 1) if (p.kind, p.fault) == ("pwrite", "short")]
    assert any("shows" in line for point in short for line in broken_rules(point))
