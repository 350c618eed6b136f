# SPDX-License-Identifier: Apache-2.0
"""Random QMP commands: each is answered with JSON, or refused with a CommandError."""

import json
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nbdstream.control.disks import DiskCommands
from nbdstream.control.jobs import JobCommands
from nbdstream.control.process import ProcessCommands
from nbdstream.control.table import CommandTable
from nbdstream.qmp.protocol import (
    Command,
    CommandError,
)
from tests.control_room import DEVICE, ask, control_room

VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(min_value=-(2**70), max_value=2**70),
    st.floats(allow_nan=False),
    st.sampled_from([DEVICE, "", "other", "stop", "x" * 5000]),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)
NAMES = ["device", "job-id", "id", "speed", "offset", "length", "limit", "enable", "force"]
NAMES += ["seconds", "odd"]
COMMANDS = [
    "block-stream", "query-block-jobs", "query-jobs", "block-job-set-speed", "block-job-pause",
    "block-job-resume", "block-job-cancel", "block-job-complete", "job-pause", "job-resume",
    "job-cancel", "job-complete", "query-block", "query-version", "query-commands", "quit",
    "x-nbdstream-stats", "x-nbdstream-map", "x-nbdstream-stream", "x-nbdstream-copy-on-read",
    "x-nbdstream-finish-by", "x-nbdstream-finish-in", "query-named-block-nodes",
]  # fmt: skip
REQUESTS = st.lists(
    st.builds(
        Command,
        st.sampled_from(COMMANDS),
        st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=3),
    ),
    max_size=12,
)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(requests=REQUESTS)
async def test_any_command_is_answered_or_refused(tmp_path: Path, requests: list[Command]) -> None:
    """Nothing but a JSON value or a CommandError ever comes of a command, never "internal"."""
    async with control_room(tmp_path) as room:
        table = CommandTable(
            ProcessCommands(room.stopped.set),
            JobCommands(room.job, DEVICE),
            DiskCommands(room.disk, room.job, DEVICE),
        )
        for request in requests:
            try:
                json.dumps(await table.execute(request), allow_nan=False)
            except CommandError as error:
                assert "internal error" not in error.desc


async def test_the_fuzzed_commands_are_all_there_are(tmp_path: Path) -> None:
    async with control_room(tmp_path) as room:
        names = [entry["name"] for entry in await ask(room, "query-commands")]
        assert names == sorted(COMMANDS)
