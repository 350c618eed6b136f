# SPDX-License-Identifier: Apache-2.0
"""docs/control.md describes every command, argument, statistic and event that there is."""

import re
from pathlib import Path

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from nbdstream.cli.parameters import rebase, set_
from nbdstream.cli.report import report as write_report
from nbdstream.cli.steer import cancel, pause, resume, speed, status, stream, watch
from nbdstream.control.disks import DiskCommands
from nbdstream.control.jobs import JobCommands
from nbdstream.control.metrics import DiskCollector
from nbdstream.control.process import ProcessCommands
from nbdstream.control.report import statistics
from nbdstream.control.table import CommandTable
from tests.control_room import DEVICE, control_room

PAGE = (Path(__file__).parent.parent / "docs" / "control.md").read_text()


def entry(name: str) -> str:
    """The text of one command, from its bold name to the next bold one or heading."""
    found = re.search(rf"\*\*{re.escape(name)}\*\*(.*?)(?=^\*\*|^#|\Z)", PAGE, re.S | re.M)
    assert found, f"docs/control.md does not describe {name}"
    return found[1]


def test_every_command_and_each_of_its_arguments() -> None:
    groups = [ProcessCommands(lambda: None)]
    table = CommandTable(*groups, JobCommands(None, DEVICE), DiskCommands(None, None, DEVICE))  # type: ignore[arg-type]
    for name, (_, parameters) in table._commands.items():
        heading = entry(name).partition("\n")[0]
        for parameter in parameters:
            assert parameter in heading, f"{name}: {parameter}"


def test_every_command_on_the_command_line() -> None:
    for command in (
        status,
        watch,
        pause,
        resume,
        speed,
        cancel,
        stream,
        set_,
        rebase,
        write_report,
    ):
        text = entry(str(command.name))
        for parameter in command.params:
            assert parameter.name is not None
            metavar = parameter.metavar or parameter.name.upper()
            assert (parameter.opts[0] if parameter.opts[0].startswith("-") else metavar) in text


async def test_every_statistic(tmp_path: Path) -> None:
    async with control_room(tmp_path) as room:
        report = statistics(room.disk, room.job)
    text = entry("x-nbdstream-stats")
    for name in [*report, *report["disk"], *report["job"], *report["backing"]]:
        assert f"`{name}`" in text, name


async def test_every_metric_that_is_not_a_statistic_of_the_disk(tmp_path: Path) -> None:
    async with control_room(tmp_path) as room:
        registry = CollectorRegistry()
        registry.register(DiskCollector(room.disk, room.job, DEVICE))
        text = generate_latest(registry).decode()
    for family in text_string_to_metric_families(text):
        counted = family.type == "counter" and family.name.startswith("nbdstream_disk_")
        last = family.name.removeprefix("nbdstream_").partition("_")[2]
        assert counted or family.name in PAGE or f"…_{last}" in PAGE, family.name
