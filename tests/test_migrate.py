# SPDX-License-Identifier: Apache-2.0
"""Migration without guests: the plan, the rule, the seal, and two servers that hand over."""

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import nbd
import pytest
import trio

from nbdstream.errors import LeafFormatError, UsageError
from nbdstream.handover.generation import export_name, generation_of, new_generation
from nbdstream.handover.seal import Seal, read_seal, remove_seal, stamp_of, write_seal
from nbdstream.migrate.memory import default_settings
from nbdstream.migrate.plan import DiskPlan, MigrationPlan
from nbdstream.migrate.switchover import PHASE_WORDS, Phase, There, Undo, owner, undo, why_kept
from nbdstream.qmp.client import QMPClient
from nbdstream.qmp.protocol import GenericError
from nbdstream.server.server import STOP_TIMEOUT
from testbed.peers import (
    Peer,
    PeerError,
    assert_same,
    binary,
    make_image,
    nbdkit,
    nbdstream_serve,
    run,
)

DISK = "source-node=disk0,listen=127.0.0.1:10900,leaf={},socket=/s,control=/c"
SIZE = 2 << 20


# -- the plan ------------------------------------------------------------------------------


def plan(*disks: DiskPlan) -> MigrationPlan:
    return MigrationPlan("/source.qmp", "/there.qmp", "unix:/memory", disks)


def test_a_disk_is_parsed(tmp_path: Path) -> None:
    disk = DiskPlan.parse(DISK.format(tmp_path / "new.qcow2"))
    assert disk.source_node == "disk0"
    assert disk.listen == "127.0.0.1:10900"
    assert disk.leaf == str(tmp_path / "new.qcow2")
    assert "node disk0" in disk.source


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "KEY=VALUE"),
        ("leaf", "KEY=VALUE"),
        ("leaf=", "KEY=VALUE"),
        ("colour=red", "KEY=VALUE"),
        ("leaf=a.raw,leaf=b.raw", "KEY=VALUE"),
        ("leaf=a.raw,socket=/s,control=/c", "needs listen"),
        (DISK.format("a.raw").replace("source-node=disk0,", ""), "one of them"),
        (DISK.format("a.raw") + ",source-control=/x", "one of them"),
        (DISK.format("a.iso"), "format"),
    ],
)
def test_a_disk_that_makes_no_sense_is_refused(text: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        DiskPlan.parse(text)


def test_a_plan_that_cannot_work_is_refused(tmp_path: Path) -> None:
    one = DiskPlan.parse(DISK.format(tmp_path / "one.qcow2"))
    with pytest.raises(UsageError, match="no disk"):
        plan().check()
    with pytest.raises(UsageError, match="the same leaf"):
        plan(one, one).check()
    Path(one.leaf).touch()
    with pytest.raises(UsageError, match="exists already"):
        plan(one).check()


def test_a_dry_run_says_all_and_does_nothing(tmp_path: Path) -> None:
    leaf = tmp_path / "new.qcow2"
    command = [binary("NBDSTREAM"), "migrate", "--dry-run", "--memory", "unix:/m"]
    command += ["--source-qmp", "/none", "--destination-qmp", "/none", "--disk", DISK.format(leaf)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    for word in ("offer", str(leaf), "seal", "activate", "stream", "deleted"):
        assert word in output
    assert not leaf.exists()


# -- the rule ------------------------------------------------------------------------------


def test_the_source_may_run_again_as_long_as_the_destination_was_not_told_to() -> None:
    for phase in Phase:
        assert phase in PHASE_WORDS
        steps = undo(phase)
        if phase >= Phase.TOLD:
            assert owner(phase) == "destination"
            assert steps == ()
            continue
        assert owner(phase) == "source"
        # Nothing is left that could run at the destination before the source may write, and
        # the source may write before it can run.
        assert steps.index(Undo.QUIT_DESTINATION) < steps.index(Undo.UNSEAL)
        if phase >= Phase.MEMORY:
            assert steps.index(Undo.UNSEAL) < steps.index(Undo.CANCEL_MEMORY)
            assert steps.index(Undo.CANCEL_MEMORY) < steps.index(Undo.RESUME_SOURCE)
            # QEMU takes no settings while it migrates, and the guest has waited enough.
            assert steps.index(Undo.RESUME_SOURCE) < steps.index(Undo.RESTORE_SETTINGS)
        assert steps[-1] is Undo.DISCARD


@pytest.mark.parametrize("postcopy", [False, True])
@pytest.mark.parametrize("there", There)
@pytest.mark.parametrize("here", ["", "device", "failed", "completed", "postcopy-active"])
def test_a_copy_that_may_be_the_only_complete_one_is_kept(
    here: str, there: There, postcopy: bool
) -> None:
    kept = bool(why_kept(here, there, postcopy=postcopy))
    if there is There.RUNNING or here == "postcopy-active":
        assert kept
    elif here:
        assert not kept  # the source has the guest, and can go on
    else:
        assert kept == (postcopy or there in (There.COMPLETE, There.SILENT))


def test_what_was_not_asked_for_is_not_set_back() -> None:
    """By a tool that does not know how it was before."""
    asked = replace(plan(), max_bandwidth=1 << 20)
    assert default_settings(asked).parameters == {"max-bandwidth": 128 << 20}
    assert default_settings(replace(plan(), downtime_limit=1.5)).parameters == {
        "downtime-limit": 300
    }
    assert not any(default_settings(asked).capabilities.values())


# -- the seal ------------------------------------------------------------------------------


def test_a_seal_is_what_was_written(tmp_path: Path) -> None:
    leaf = str(tmp_path / "leaf.raw")
    seal = Seal(new_generation(), "disk0@x", "127.0.0.1:1")
    assert read_seal(leaf) is None
    write_seal(leaf, seal)
    assert read_seal(leaf) == seal
    remove_seal(leaf)
    remove_seal(leaf)
    assert list(tmp_path.iterdir()) == []


def test_a_stamp_goes_with_the_image(tmp_path: Path) -> None:
    image = tmp_path / "disk.raw"
    image.write_bytes(bytes(4096))
    stamp = stamp_of(str(image))
    seal = Seal(new_generation(), "disk0@x", "127.0.0.1:1", stamp=stamp, format="raw")
    write_seal(str(image), seal)
    assert read_seal(str(image)) == seal
    os.utime(image, ns=(0, image.stat().st_mtime_ns + 1))
    with pytest.raises(LeafFormatError, match="changed after it was handed over"):
        read_seal(str(image))
    image.unlink()
    with pytest.raises(LeafFormatError, match="changed after it was handed over"):
        read_seal(str(image))


@pytest.mark.parametrize("text", ["", "{", "[]", '{"generation": "x"}'])
def test_a_damaged_seal_is_no_licence_to_write(tmp_path: Path, text: str) -> None:
    (tmp_path / "leaf.raw.sealed").write_text(text)
    with pytest.raises(LeafFormatError, match="damaged"):
        read_seal(str(tmp_path / "leaf.raw"))


def test_the_generation_is_found_in_nbd_uris_only() -> None:
    generation = new_generation()
    assert generation != new_generation()
    name = export_name("disk0", generation)
    assert generation_of(f"nbd://host:1/{name}") == generation
    assert generation_of(f"nbd+unix:///{name.replace('@', '%40')}?socket=/a@b") == generation
    assert generation_of("nbd://user@host/disk") == ""
    assert generation_of(f"/images/{name}") == ""


# -- two servers ---------------------------------------------------------------------------


async def ask(peer: Peer, command: str, **arguments: Any) -> Any:
    spelled = {name.replace("_", "-"): value for name, value in arguments.items()}
    async with QMPClient.connect(str(peer.control)) as qmp:
        return await qmp.execute(command, spelled)


def write(uri: str, text: str) -> None:
    run(["qemu-io", "-f", "raw", "-c", text, uri])


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    make_image(path, SIZE)
    return path


async def wait_local(peer: Peer) -> None:
    with trio.fail_after(20):
        while "backing" in await ask(peer, "x-nbdstream-stats"):  # noqa: ASYNC110
            await trio.sleep(0.01)


@pytest.mark.parametrize("there_suffix", ["raw", "qcow2", "qed"])
@pytest.mark.parametrize("here_suffix", ["raw", "qcow2", "qed"])
async def test_a_disk_of_odd_size_is_handed_over(
    tmp_path: Path, image: Path, here_suffix: str, there_suffix: str
) -> None:
    """No multiple of 512: some formats round it up, and the guest stands still by then."""
    with image.open("ab") as file:
        file.write(b"the end" * 9)
    here, there = tmp_path / f"here.{here_suffix}", tmp_path / f"there.{there_suffix}"
    with nbdkit("file", image, readonly=True) as far:
        with nbdstream_serve(here, far.uri, "--stream", "off") as source:
            listen = f"unix:{tmp_path / 'offer'}"
            offer = await ask(source, "x-nbdstream-export-add", listen_at=listen)
            agreed = {"generation": offer["generation"], "size": offer["size"]}
            with nbdstream_serve(there, offer["uri"], "--standby") as destination:
                await ask(destination, "x-nbdstream-activate", check=True, **agreed)
                assert not (await ask(destination, "x-nbdstream-stats"))["owner"]
                await ask(source, "x-nbdstream-seal", generation=offer["generation"])
                await ask(destination, "x-nbdstream-activate", **agreed)
                await wait_local(destination)
            with nbdstream_serve(there) as destination:
                content = image.read_bytes()  # noqa: ASYNC240
                client = nbd.NBD()
                client.connect_uri(destination.uri)
                size = client.get_size()
                assert client.pread(size, 0) == content.ljust(size, b"\0")


@pytest.mark.parametrize("suffix", ["raw", "qcow2", "qed"])
async def test_a_disk_is_handed_over(tmp_path: Path, image: Path, suffix: str) -> None:
    here, there = tmp_path / f"here.{suffix}", tmp_path / f"there.{suffix}"
    listen = f"unix:{tmp_path / 'offer'}"
    with nbdkit("file", image, readonly=True) as far:
        with nbdstream_serve(here, far.uri, "--stream", "off") as source:
            offer = await ask(source, "x-nbdstream-export-add", listen_at=listen)
            generation = offer["generation"]
            with nbdstream_serve(there, offer["uri"], "--standby") as destination:
                # Nothing that is read while the source may still write is kept.
                run(["qemu-io", "-r", "-f", "raw", "-c", "read 0 64k", destination.uri])
                write(source.uri, "write -P 0x5a 0 64k")
                with pytest.raises(PeerError):
                    write(destination.uri, "write 0 4k")
                with pytest.raises(GenericError, match="stands by for generation"):
                    wrong = new_generation()
                    await ask(destination, "x-nbdstream-activate", generation=wrong, size=SIZE)
                assert not (await ask(destination, "x-nbdstream-stats"))["owner"]
                sealed = await ask(source, "x-nbdstream-seal", generation=generation)
                assert read_seal(str(here)) is not None
                await ask(
                    destination,
                    "x-nbdstream-activate",
                    generation=generation,
                    size=sealed["size"],
                )
                assert (await ask(destination, "x-nbdstream-stats"))["owner"]
                run(["qemu-io", "-f", "raw", "-c", "read -P 0x5a 0 64k", destination.uri])
                write(destination.uri, "write -P 0x33 64k 4k")
                await wait_local(destination)
                made_for = await ask(destination, "x-nbdstream-standby-query")
                assert made_for == {"generation": generation}
                await ask(source, "x-nbdstream-export-remove", generation=generation)
                run(["qemu-io", "-f", "raw", "-c", "read -P 0x33 64k 4k", destination.uri])
                assert not (await ask(source, "x-nbdstream-stats"))["owner"]


async def test_a_disk_that_comes_back_takes_its_content_from_the_destination(
    tmp_path: Path, image: Path
) -> None:
    """Unsealed after it was activated: the destination can never read the source again."""
    here, there = tmp_path / "here.qcow2", tmp_path / "there.qcow2"
    listen = f"unix:{tmp_path / 'offer'}"
    with nbdkit("file", image, readonly=True) as far:
        with nbdstream_serve(here, far.uri) as source:
            offer = await ask(source, "x-nbdstream-export-add", listen_at=listen)
            generation = offer["generation"]
            with nbdstream_serve(
                there, offer["uri"], "--standby", "--stream", "off"
            ) as destination:
                await ask(source, "x-nbdstream-seal", generation=generation)
                await ask(destination, "x-nbdstream-activate", generation=generation, size=SIZE)
                await ask(source, "x-nbdstream-unseal", generation=generation)
                assert read_seal(str(here)) is None
                write(source.uri, "write 0 4k")
                again = await ask(source, "x-nbdstream-export-add", listen_at=listen)
                assert again["generation"] != generation
                backing = (await ask(destination, "x-nbdstream-stats"))["backing"]
                assert not backing["connected"]
            with pytest.raises(PeerError, match=f"not generation {generation}"):
                with nbdstream_serve(there, again["uri"]):
                    pass


async def test_an_offer_ends_though_its_client_takes_no_replies(
    tmp_path: Path, image: Path
) -> None:
    """As one at the far end of a link that is cut: the guest waits for the seal to come off."""
    listen = f"unix:{tmp_path / 'offer'}"
    with nbdkit("file", image, readonly=True) as far:
        with nbdstream_serve(tmp_path / "here.qcow2", far.uri) as source:
            offer = await ask(source, "x-nbdstream-export-add", listen_at=listen)
            await ask(source, "x-nbdstream-seal", generation=offer["generation"])
            client = nbd.NBD()
            client.connect_uri(offer["uri"])
            buffers = [nbd.Buffer(SIZE) for _ in range(8)]  # far more than a socket holds
            for buffer in buffers:
                client.aio_pread(buffer, 0)
            with trio.fail_after(STOP_TIMEOUT / 2):
                await ask(source, "x-nbdstream-unseal", generation=offer["generation"])
            write(source.uri, "write 0 4k")


async def test_a_leaf_that_only_stood_by_is_no_disk(tmp_path: Path, image: Path) -> None:
    leaf = tmp_path / "leaf.qcow2"
    with nbdkit("file", image, readonly=True) as far:
        with nbdstream_serve(leaf, far.uri, "--standby"):
            pass
        with pytest.raises(PeerError, match="only stood by"):
            with nbdstream_serve(leaf, far.uri):
                pass


async def test_a_sealed_leaf_is_not_changed_by_the_next_process_before_it_is_unsealed(
    tmp_path: Path, image: Path
) -> None:
    leaf, listen = tmp_path / "leaf.qcow2", f"unix:{tmp_path / 'offer'}"
    with nbdkit("file", image, readonly=True) as far:
        with nbdstream_serve(leaf, far.uri) as source:
            offer = await ask(source, "x-nbdstream-export-add", listen_at=listen)
            await ask(source, "x-nbdstream-seal", generation=offer["generation"])
            source.kill()
        with nbdstream_serve(leaf) as source:
            # A guest's QEMU that connects again would die of an export that has become read-only.
            client = nbd.NBD()
            client.connect_uri(source.uri)
            assert not client.is_read_only()
            buffer = nbd.Buffer.from_bytearray(bytearray(b"\x77" * 4096))
            cookie = client.aio_pwrite(buffer, 4096)
            assert client.pread(4096, 4096) == image.read_bytes()[4096:8192]  # noqa: ASYNC240
            assert not client.aio_command_completed(cookie)
            assert_same(offer["uri"], image)
            query = await ask(source, "x-nbdstream-export-query")
            assert query["generation"] == offer["generation"]
            with pytest.raises(GenericError, match="offered already"):
                await ask(source, "x-nbdstream-export-add", listen_at=listen)
            await ask(source, "x-nbdstream-unseal", generation=offer["generation"])
            while not client.aio_command_completed(cookie):
                client.poll(-1)
            assert client.pread(4096, 4096) == b"\x77" * 4096
            client.shutdown()


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
async def test_an_image_that_qemu_has_left_is_offered_again_as_long_as_it_was_not_written(
    tmp_path: Path, image: Path, image_format: str
) -> None:
    """The name says nothing about the format, and neither does what a guest may have written."""
    plain, listen = tmp_path / "plain.img", f"unix:{tmp_path / 'offer'}"
    run(["qemu-img", "convert", "-f", "raw", "-O", image_format, image, plain])
    generation = new_generation()
    export = export_name("disk0", generation)
    stamp = stamp_of(str(plain))
    write_seal(str(plain), Seal(generation, export, listen, stamp=stamp, format=image_format))
    for _ in range(2):
        with nbdstream_serve(plain) as source:
            info = json.loads(run(["nbdinfo", "--json", source.uri]))
            assert info["exports"][0]["is_read_only"]
            query = await ask(source, "x-nbdstream-export-query")
            assert query["generation"] == generation
            assert_same(query["uri"], image)
            assert_same(source.uri, image)
    run(["qemu-io", "-f", image_format, "-c", "write 1M 512", plain])
    with pytest.raises(PeerError, match="changed after it was handed over"):
        with nbdstream_serve(plain):
            pass
