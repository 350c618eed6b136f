# SPDX-License-Identifier: Apache-2.0
"""Exports that are added and deleted at run time, and events, seen by QEMU's own QMP library."""

import asyncio
import json
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nbd
import pytest
from qemu.qmp import ExecuteError, QMPClient

from testbed.peers import (
    Peer,
    PeerError,
    Qmp,
    binary,
    nbdstream_serve,
    qemu_storage_daemon,
    run,
    unix_uri,
)
from tests.serve_support import client, far_megabyte

MIB = 1 << 20


far = pytest.fixture(far_megabyte)


@pytest.fixture
def server(tmp_path: Path, far: Peer) -> Iterator[Peer]:
    leaf = tmp_path / "leaf.qcow2"
    with nbdstream_serve(leaf, far.uri, "--stream", "off", export="disk0") as peer:
        yield peer


@contextmanager
def daemon(directory: Path) -> Iterator[tuple[Qmp, Path]]:
    """QEMU's storage daemon, which serves the same kind of disk; with its NBD socket."""
    image = directory / "theirs.qcow2"
    run(["qemu-img", "create", "-q", "-f", "qcow2", image, str(MIB)])
    blockdev = f"driver=qcow2,node-name=disk0,file.driver=file,file.filename={image}"
    with qemu_storage_daemon("--blockdev", blockdev) as peer:
        assert peer.control is not None
        with Qmp(peer.control) as qmp:
            address = {"type": "unix", "data": {"path": str(peer.socket)}}
            qmp.execute("nbd-server-start", addr=address)
            own = {"type": "nbd", "id": "disk0", "node_name": "disk0", "writable": True}
            qmp.execute("block-export-add", **own)
            yield qmp, peer.socket


def outcome(qmp: Qmp, command: str, /, **arguments: Any) -> Any:
    """What a command returns, or how the error begins."""
    try:
        return qmp.execute(command, **arguments)
    except PeerError as error:
        return str(error)


def session(qmp: Qmp, connect: Callable[[str], nbd.NBD]) -> list[Any]:
    """The life of an export."""
    add = {"type": "nbd", "node_name": "disk0"}
    seen = [
        outcome(qmp, "query-block-exports"),
        outcome(qmp, "block-export-add", id="copy", name="copy", **add),
        outcome(qmp, "block-export-add", id="copy", name="other", **add),
        outcome(qmp, "block-export-add", id="other", name="copy", **add),
        outcome(qmp, "block-export-add", id="x", name="n" * 5000, **add),
        outcome(qmp, "block-export-add", id="x", type="nbd"),
        outcome(qmp, "query-block-exports"),
    ]
    handle = connect("copy")
    assert handle.is_read_only()
    assert handle.pread(512, 0) is not None
    seen.append(outcome(qmp, "block-export-del", id="copy"))
    seen.append(outcome(qmp, "block-export-del", id="copy", mode="hard"))
    event = qmp.wait_event("BLOCK_EXPORT_DELETED")
    seen.append((event["event"], event["data"]))
    with pytest.raises(nbd.Error):
        while True:
            handle.pread(512, 0)
    seen.append(outcome(qmp, "query-block-exports"))
    seen.append(outcome(qmp, "block-export-del", id="copy"))
    return seen


def connecting(path: Path) -> Callable[[str], nbd.NBD]:
    """Connects to an export by its name."""

    def connect(name: str) -> nbd.NBD:
        handle = nbd.NBD()
        handle.connect_uri(unix_uri(path, name))
        return handle

    return connect


def test_exports_live_and_die_as_those_of_qemu(tmp_path: Path, server: Peer) -> None:
    with daemon(tmp_path) as (qmp, path):
        theirs = session(qmp, connecting(path))
    assert server.control is not None
    with Qmp(server.control) as qmp:
        ours = session(qmp, connecting(server.socket))
        assert "is the disk's own" in outcome(qmp, "block-export-del", id="disk0")
    assert ours == theirs


@pytest.mark.parametrize("text", ["a\0b", "\ud800", "x" * 4097])
def test_what_nbd_cannot_carry_is_no_name_and_no_description(server: Peer, text: str) -> None:
    assert server.control is not None
    with Qmp(server.control) as qmp:
        added = {"type": "nbd", "id": "more", "node_name": "disk0"}
        for member in ("name", "description"):
            with pytest.raises(PeerError, match=f"{member} '"):
                qmp.execute("block-export-add", **added, **{member: text})
        assert len(qmp.execute("query-block-exports")) == 1


def test_a_writable_export_writes_the_disk(server: Peer) -> None:
    assert server.control is not None
    with Qmp(server.control) as qmp:
        qmp.execute(
            "block-export-add", type="nbd", id="rw", node_name="disk0", name="b", writable=True
        )
        with client(unix_uri(server.socket, "b")) as other, client(server.uri) as own:
            other.pwrite(b"x" * 4096, 8192)
            assert own.pread(4096, 8192) == b"x" * 4096
        names = json.loads(run(["nbdinfo", "--list", "--json", unix_uri(server.socket)]))
        assert {each["export-name"] for each in names["exports"]} == {"disk0", "b"}


def test_the_node_has_the_members_that_qemu_always_gives(tmp_path: Path, server: Peer) -> None:
    with daemon(tmp_path) as (qmp, _):
        nodes = qmp.execute("query-named-block-nodes")
    (theirs,) = [node for node in nodes if node["node-name"] == "disk0"]
    assert server.control is not None
    with Qmp(server.control) as qmp:
        (ours,) = qmp.execute("query-named-block-nodes", flat=True)
    assert set(theirs) <= set(ours)
    kinds = {name: type(value) for name, value in theirs.items()}
    assert {name: type(ours[name]) for name in theirs} == kinds
    assert set(theirs["image"]) - {"format-specific"} <= set(ours["image"])


def test_qemus_own_library_sees_changes_as_events(far: Peer, server: Peer) -> None:
    async def main() -> list[tuple[str, Any]]:
        seen: list[tuple[str, Any]] = []
        qmp = QMPClient("test")
        await qmp.connect(str(server.control))
        try:
            with qmp.listener() as events:

                async def until(name: str) -> None:
                    async for event in events:
                        seen.append((str(event["event"]), event.get("data")))
                        if event["event"] == name:
                            return

                with client(server.uri):
                    await until("X_NBDSTREAM_CLIENTS_CHANGE")
                await until("X_NBDSTREAM_CLIENTS_CHANGE")
                far.kill()
                await until("X_NBDSTREAM_BACKING_CHANGE")
            with pytest.raises(ExecuteError, match="not found"):
                await qmp.execute("block-export-del", {"id": "none"})
        finally:
            await qmp.disconnect()
        return seen

    seen = asyncio.run(asyncio.wait_for(main(), 30))
    clients = [data["clients"] for name, data in seen if name == "X_NBDSTREAM_CLIENTS_CHANGE"]
    assert clients == [1, 0]
    name, data = seen[-1]
    assert name == "X_NBDSTREAM_BACKING_CHANGE"
    assert data["connected"] is False and data["uri"] == far.uri


def test_qmp_shell_adds_an_export(server: Peer) -> None:
    done = subprocess.run(
        [binary("QMP_SHELL"), str(server.control)],
        input="block-export-add type=nbd id=a node-name=disk0 name=a writable=true\n"
        "query-block-exports\n",
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert "'id': 'a'" in done.stdout.replace('"', "'"), done
