# SPDX-License-Identifier: Apache-2.0
"""Which accelerator really runs guests here: KVM if a probe says so, else TCG.

That ``/dev/kvm`` opens proves little, and that it executes an instruction not much more:
under some nested hypervisors guests run a hundred times slower than under TCG, and look
as if they hung. So the probe runs a small guest against the clock: the firmware, and then
a boot sector of ours that counts to sixteen million and ends QEMU through its debug-exit
device, with a status that nothing else produces.
"""

import os
import subprocess
import tempfile
from pathlib import Path
from typing import Literal

import trio

from nbdstream.errors import UsageError

Accelerator = Literal["kvm", "tcg"]

PROBE_TIMEOUT = 3.0
"""Seconds. A working KVM needs a tenth of one, as TCG does; one that is not worth having, many."""

_EXIT_PORT = 0xF4
_EXIT_VALUE = 0x2A
# isa-debug-exit: QEMU's exit status is (value << 1) | 1
_EXIT_STATUS = _EXIT_VALUE << 1 | 1

# Real mode, wherever the firmware loads it:
#     mov ecx, 1 << 24;  count: dec ecx;  jnz count
#     mov al, VALUE;  out PORT, al;  spin: hlt;  jmp spin
_CODE = (
    bytes([0x66, 0xB9, 0x00, 0x00, 0x00, 0x01, 0x66, 0x49, 0x75, 0xFC])
    + bytes([0xB0, _EXIT_VALUE, 0xE6, _EXIT_PORT, 0xF4, 0xEB, 0xFD])
)  # fmt: skip
_BOOT_SECTOR = _CODE.ljust(510, b"\0") + b"\x55\xaa"

_known: Accelerator | None = None


def qemu_binary() -> str:
    """The QEMU to run: ``$NBDSTREAM_QEMU``, or the usual name on the PATH."""
    return os.environ.get("NBDSTREAM_QEMU", "qemu-system-x86_64")


async def probe_accelerator() -> Accelerator:
    """Return the accelerator to use; probed once, then remembered for the process.

    Raises UsageError if QEMU is not installed.
    """
    global _known
    if _known is None:
        usable = os.access("/dev/kvm", os.R_OK | os.W_OK) and await runs_guest_code("kvm")
        _known = "kvm" if usable else "tcg"
    return _known


async def runs_guest_code(accelerator: Accelerator) -> bool:
    """Whether *accelerator* runs a small guest, and no slower than makes sense.

    Takes at most PROBE_TIMEOUT seconds. Raises UsageError if QEMU is not installed.
    """
    with tempfile.TemporaryDirectory(prefix="nbdstream-probe-") as directory:
        disk = Path(directory, "probe.raw")
        disk.write_bytes(_BOOT_SECTOR)  # noqa: ASYNC240 (one sector)
        command = [
            qemu_binary(), "-accel", accelerator, "-machine", "pc", "-m", "16",
            "-nodefaults", "-no-user-config", "-display", "none",
            "-drive", f"file={disk},format=raw,snapshot=on",
            "-device", f"isa-debug-exit,iobase={_EXIT_PORT:#x},iosize=1",
        ]  # fmt: skip
        with trio.move_on_after(PROBE_TIMEOUT):
            try:
                result = await trio.run_process(
                    command,
                    check=False,
                    stdin=subprocess.DEVNULL,
                    capture_stdout=True,
                    capture_stderr=True,
                    deliver_cancel=_kill,
                )
            except FileNotFoundError as error:
                raise UsageError(f"{command[0]} is not installed (qemu-system-x86)") from error
            return result.returncode == _EXIT_STATUS
    return False


async def _kill(process: trio.Process) -> None:
    """A guest that hangs in the kernel does not answer SIGTERM."""
    process.kill()
