# SPDX-License-Identifier: Apache-2.0
"""Running QEMU: start, look, stop; refusals and deaths are told in QEMU's own words."""

import os
import signal
from pathlib import Path

import pytest
import trio

from nbdstream.errors import UsageError
from nbdstream.guest import accelerator, qemu
from nbdstream.guest.accelerator import probe_accelerator, runs_guest_code
from nbdstream.guest.console import ConsoleClosedError
from nbdstream.guest.disks import Disk
from nbdstream.guest.qemu import Machine, MiB, QEMUError, run_qemu

NO_DISK = Machine(memory=32 * MiB, accelerator="tcg")
FIRMWARE = "SeaBIOS"


def fake_qemu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    path = tmp_path / "qemu"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setenv("NBDSTREAM_QEMU", str(path))


async def test_firmware_speaks_on_the_console_and_qemu_quits_with_the_block() -> None:
    heard: list[str] = []
    async with run_qemu(NO_DISK, heard.append) as guest:
        await guest.console.wait_for(FIRMWARE, 30)
        status = await guest.qmp.execute("query-status")
        assert status["running"] is True
    assert guest.process.returncode == 0
    assert FIRMWARE in "".join(heard)


async def test_disks_and_memory_are_what_was_asked_for(tmp_path: Path) -> None:
    disk = tmp_path / "disk.raw"
    disk.write_bytes(bytes(5 * MiB))
    machine = Machine(disks=(Disk.file(disk),), memory=48 * MiB, accelerator="tcg", network=True)
    async with run_qemu(machine) as guest:
        (block,) = await guest.qmp.execute("query-block")
        assert block["inserted"]["node-name"] == "disk0"
        assert block["inserted"]["image"]["virtual-size"] == 5 * MiB
        memory = await guest.qmp.execute("query-memory-size-summary")
        assert memory["base-memory"] == 48 * MiB


async def test_qemus_refusal_is_told(tmp_path: Path) -> None:
    machine = Machine(disks=(Disk.file(tmp_path / "missing.raw"),), accelerator="tcg")
    with pytest.raises(QEMUError, match=r"status 1: .*missing\.raw.*No such file"):
        async with run_qemu(machine):
            pass


async def test_a_qemu_that_is_not_installed_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NBDSTREAM_QEMU", "qemu-system-nowhere")
    with pytest.raises(UsageError, match="qemu-system-nowhere is not installed"):
        async with run_qemu(NO_DISK):
            pass
    with pytest.raises(UsageError, match="qemu-system-nowhere is not installed"):
        await runs_guest_code("tcg")


async def test_a_death_ends_all_waits() -> None:
    with pytest.raises(QEMUError, match=f"status -{int(signal.SIGKILL)}") as caught:
        async with run_qemu(NO_DISK) as guest:
            await guest.console.wait_for(FIRMWARE, 30)
            os.kill(guest.process.pid, signal.SIGKILL)
            await guest.console.wait_for("never printed", 30)
    assert isinstance(caught.value.__cause__, ConsoleClosedError)


async def test_a_guest_that_ends_by_itself_is_no_error() -> None:
    async with run_qemu(NO_DISK) as guest:
        await guest.qmp.execute("quit")
        assert await guest.wait() == 0


async def test_an_error_of_the_block_comes_out_and_qemu_is_ended() -> None:
    with pytest.raises(ZeroDivisionError):
        async with run_qemu(NO_DISK) as guest:
            raise ZeroDivisionError
    assert guest.process.returncode == 0


async def test_cancellation_ends_qemu() -> None:
    with trio.CancelScope() as scope:
        async with run_qemu(NO_DISK) as guest:
            scope.cancel()
            await trio.sleep_forever()
    assert scope.cancelled_caught and guest.process.returncode == 0


async def test_a_qemu_that_does_not_quit_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qemu, "QUIT_TIMEOUT", 0.2)
    async with run_qemu(NO_DISK) as guest:
        os.kill(guest.process.pid, signal.SIGSTOP)
    assert guest.process.returncode == -signal.SIGKILL


async def test_a_serial_port_sent_elsewhere_is_no_console(tmp_path: Path) -> None:
    log = tmp_path / "serial"
    machine = Machine(memory=32 * MiB, accelerator="tcg", serial=f"file:{log}")
    async with run_qemu(machine) as guest:
        with pytest.raises(UsageError, match="sent elsewhere"):
            _ = guest.console
    assert log.exists()


async def test_tcg_runs_guest_code() -> None:
    assert await runs_guest_code("tcg")


@pytest.mark.parametrize("script", ["exec sleep 1000", "exit 0", "exit 1"], ids=str)
async def test_an_accelerator_that_hangs_or_fails_is_not_used(
    script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_qemu(tmp_path, monkeypatch, script)
    monkeypatch.setattr(accelerator, "PROBE_TIMEOUT", 0.2)
    assert not await runs_guest_code("kvm")


async def test_the_probe_runs_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = tmp_path / "calls"
    fake_qemu(tmp_path, monkeypatch, f"echo call >> {calls}; exit 85")
    monkeypatch.setattr(accelerator, "_known", None)
    monkeypatch.setattr(os, "access", lambda *_: True)
    assert [await probe_accelerator() for _ in range(3)] == ["kvm"] * 3
    assert calls.read_text() == "call\n"


async def test_without_kvm_nothing_is_probed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerator, "_known", None)
    monkeypatch.setattr(os, "access", lambda *_: False)
    monkeypatch.setenv("NBDSTREAM_QEMU", "qemu-system-nowhere")
    assert await probe_accelerator() == "tcg"
