# SPDX-License-Identifier: Apache-2.0
"""The command table: schemas from signatures, arguments checked in QEMU's words."""

import errno
import logging
from typing import Any, Literal

import pytest

from nbdstream.control.table import CommandTable, command
from nbdstream.errors import BackingGoneError
from nbdstream.qmp.protocol import (
    Command,
    CommandNotFound,
    DeviceNotFound,
    GenericError,
    JSONObject,
)


class Sample:
    """Every kind of parameter and every way to fail."""

    @command("x-all")
    async def all_kinds(
        self,
        device: str,
        job_id: str | None = None,
        speed: int | None = None,
        force: bool = False,
        mode: Literal["on", "off"] = "on",
    ) -> JSONObject:
        return {"got": [device, job_id, speed, force, mode]}

    @command("x-nothing")
    async def nothing(self) -> None:
        pass

    @command("x-fail")
    async def fail(self, how: str) -> None:
        failures: dict[str, Exception] = {
            "qmp": DeviceNotFound("no such thing"),
            "ours": BackingGoneError("the link is down"),
            "system": OSError(errno.ENOSPC, "No space left on device"),
            "bug": KeyError("a secret of the server"),
        }
        raise failures[how]


async def run(name: str, **arguments: Any) -> Any:
    spelled = {key.replace("_", "-"): value for key, value in arguments.items()}
    return await CommandTable(Sample()).execute(Command(name, spelled))


async def test_arguments_reach_their_parameters() -> None:
    assert await run("x-all", device="d") == {"got": ["d", None, None, False, "on"]}
    everything = await run("x-all", device="d", job_id="j", speed=-5, force=True, mode="off")
    assert everything == {"got": ["d", "j", -5, True, "off"]}


async def test_no_result_is_the_empty_object() -> None:
    assert await run("x-nothing") == {}


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({}, "Parameter 'device' is missing"),
        ({"job_id": "j"}, "Parameter 'device' is missing"),
        ({"device": "d", "spede": 1}, "Parameter 'spede' is unexpected"),
        ({"device": 1}, "Invalid parameter type for 'device', expected: string"),
        ({"device": None}, "Invalid parameter type for 'device', expected: string"),
        ({"device": "d", "job_id": None}, "for 'job-id', expected: string"),
        ({"device": "d", "speed": "1"}, "for 'speed', expected: integer"),
        ({"device": "d", "speed": 1.0}, "for 'speed', expected: integer"),
        ({"device": "d", "speed": True}, "for 'speed', expected: integer"),
        ({"device": "d", "speed": 2**63}, "for 'speed', expected: integer"),
        ({"device": "d", "speed": [1]}, "for 'speed', expected: integer"),
        ({"device": "d", "force": 1}, "for 'force', expected: boolean"),
        ({"device": "d", "mode": "up"}, "Parameter 'mode' does not accept value 'up'"),
        ({"device": "d", "mode": 1}, "for 'mode', expected: string"),
    ],
)
async def test_wrong_arguments_are_named(arguments: dict[str, Any], complaint: str) -> None:
    with pytest.raises(GenericError) as caught:
        await run("x-all", **arguments)
    assert complaint in caught.value.desc


async def test_an_unknown_command_is_named() -> None:
    with pytest.raises(CommandNotFound, match="The command x-other has not been found"):
        await run("x-other")


async def test_errors_on_purpose_reach_the_client() -> None:
    with pytest.raises(DeviceNotFound, match="no such thing"):
        await run("x-fail", how="qmp")
    with pytest.raises(GenericError, match="the link is down"):
        await run("x-fail", how="ours")
    with pytest.raises(GenericError, match=r"^No space left on device$"):
        await run("x-fail", how="system")


async def test_a_bug_goes_to_the_log_and_not_to_the_client(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.ERROR), pytest.raises(GenericError) as caught:
        await run("x-fail", how="bug")
    assert "secret" not in caught.value.desc
    assert "a secret of the server" in caplog.text


async def test_the_table_lists_itself() -> None:
    listed = await CommandTable(Sample()).execute(Command("query-commands"))
    assert listed == [
        {"name": "query-commands"},
        {"name": "x-all"},
        {"name": "x-fail"},
        {"name": "x-nothing"},
    ]


def test_a_name_is_given_once() -> None:
    with pytest.raises(ValueError, match="two commands by the name of x-all"):
        CommandTable(Sample(), Sample())


def test_a_signature_that_is_no_schema_is_refused_at_once() -> None:
    class Odd:
        @command("x-odd")
        async def odd(self, ratio: float) -> None: ...

    with pytest.raises(TypeError, match="no QMP argument can be a"):
        CommandTable(Odd())
