# SPDX-License-Identifier: Apache-2.0
"""docs/control.md describes every command, argument, statistic and event that there is."""

import json
import re
from dataclasses import replace
from pathlib import Path

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families

from nbdstream.backing.latency import Latency
from nbdstream.cli.parameters import rebase, set_
from nbdstream.cli.report import report as write_report
from nbdstream.cli.steer import cancel, pause, resume, speed, status, stream
from nbdstream.cli.watch import watch
from nbdstream.control.disks import DiskCommands
from nbdstream.control.jobs import JobCommands
from nbdstream.control.metrics import DiskCollector
from nbdstream.control.process import ProcessCommands
from nbdstream.control.report import statistics
from nbdstream.control.table import CommandTable
from nbdstream.server.traffic import Traffic
from tests.control_room import DEVICE, Room, control_room

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
    # And the other way round; in brackets are those that are not always there.
    values = {"null", "demand", "readahead", "prefetch", "stream"}
    for group in ("disk", "job", "backing"):
        row = re.search(rf"^ *\| `{group}` \| (.*) \|$", text, re.M)
        assert row
        described = set(re.findall(r"`([a-z-]+)`", row[1])) - values
        assert described <= set(report[group]), described - set(report[group])


async def test_the_dashboard_asks_for_metrics_that_there_are(tmp_path: Path) -> None:
    """And each metric of the stream and the backing that goes up and down is in a panel."""
    dashboard = json.loads((Path(__file__).parent.parent / "docs" / "grafana.json").read_text())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    expressions += [
        variable["query"]["query"]
        for variable in dashboard["templating"]["list"]
        if variable["type"] == "query"
    ]
    asked = set(re.findall(r"nbdstream_\w+", " ".join(expressions)))
    async with control_room(tmp_path) as room:
        now = replace(room.backing.statistics(), latency={"demand": Latency().counts()})
        room.backing.statistics = lambda: now  # type: ignore[method-assign]
        families = scraped(room)
        labels = {
            (sample.name, label) for family in families for sample in family.samples
            for label in sample.labels
        }  # fmt: skip
    known = {sample.name for family in families for sample in family.samples}
    known |= {f"nbdstream_backing_read_{what}_total" for what in ("requests", "bytes")}
    assert len(asked) > 10 and asked <= known, asked - known
    assert ("nbdstream_backing_read_seconds_bucket", "priority") in labels
    assert all("$device" in each or "label_values" in each for each in expressions)
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(ids) == len(set(ids))


def scraped(room: Room) -> list[Metric]:
    registry = CollectorRegistry()
    registry.register(DiskCollector(room.disk, room.job, Traffic(), DEVICE))
    return list(text_string_to_metric_families(generate_latest(registry).decode()))


async def test_every_metric_that_is_not_a_statistic_of_the_disk(tmp_path: Path) -> None:
    async with control_room(tmp_path) as room:
        families = scraped(room)
    for family in families:
        counted = family.type == "counter" and family.name.startswith("nbdstream_disk_")
        last = family.name.removeprefix("nbdstream_").partition("_")[2]
        assert counted or family.name in PAGE or f"…_{last}" in PAGE, family.name
