# SPDX-License-Identifier: Apache-2.0
"""Those of libnbd's tests that start qemu-nbd: interoperability, nbdcopy, nbdinfo, nbddump."""

import os
import re
import subprocess
from pathlib import Path

from testbed.suites.result import FAIL, PASS, SKIP, Outcome, environment, ours_in

TESTS = {
    "interop": (
        *("interop-qemu-nbd", "interop-qemu-nbd-tls-certs", "interop-qemu-nbd-tls-psk"),
        *("list-exports-qemu-nbd", "socket-activation-qemu-nbd", "dirty-bitmap.sh"),
        *("structured-read.sh", "interop-qemu-block-size.sh"),
    ),
    "copy": ("copy-file-to-qcow2.sh", "copy-file-to-qcow2-compressed.sh"),
    "info": (
        *("info-description-qemu.sh", "info-list-qemu.sh", "info-list-json-qemu.sh"),
        *("info-map-qemu-allocation-depth.sh", "info-map-qemu-dirty-bitmap.sh"),
    ),
    "dump": ("dump-empty-qcow2.sh",),
}
WITHOUT = ("ocaml", "golang", "python", "fuse", "ublk")
BUILD_SECONDS = 900
TEST_SECONDS = 120
_RESULTS = {"PASS": PASS, "SKIP": SKIP}


class Libnbd:
    """The suite in a source tree of libnbd, which is built if it is not."""

    def __init__(self, source: Path, directory: Path) -> None:
        """``directory``: for logs."""
        self._source, self._directory = source, directory
        if not (source / "interop" / "requires.c").exists():
            self._build()

    def _build(self) -> None:
        source = self._source
        requires = source / "tests" / "requires.c"
        # It runs by sh, which on Debian knows no '|&'.
        requires.write_text(requires.read_text().replace("|& grep", "2>&1 | grep"))
        for command in (
            ["./configure", *(f"--disable-{part}" for part in WITHOUT)],
            ["make", f"-j{os.cpu_count()}"],
            ["make", "-C", "tests", "pki/stamp-pki", "keys.psk"],
        ):
            subprocess.run(
                command,
                cwd=source,
                check=True,
                timeout=BUILD_SECONDS,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        # That of the tree has no Python here: /usr/bin/nbdsh is next.
        (source / "sh" / "nbdsh").unlink()

    def names(self) -> list[str]:
        """As 'DIRECTORY/TEST'."""
        return [f"{directory}/{test}" for directory, tests in TESTS.items() for test in tests]

    def run(self, name: str, server: Path) -> Outcome:
        """Run a test with a ``qemu-nbd``, which has to be called that."""
        directory, test = name.split("/")
        work = self._directory / server.parent.parent.name
        log = work / "stand-in.log"
        environ = environment(log)
        environ["PATH"] = f"{server.parent}:{environ['PATH']}"
        place = self._source / directory
        # The programs have the server's path in them.
        for made in [place / test, *place.glob(f"{test}.o"), place / f"{test}.trs"]:
            if not test.endswith(".sh") or made.suffix == ".trs":
                made.unlink(missing_ok=True)
        for built in place.glob("*_qemu_nbd*.o"):
            built.unlink()
        for built in place.glob("*qemu_nbd*-*.o"):
            built.unlink()
        command = ["timeout", "-k", "5", str(TEST_SECONDS), "make", "-C", str(place), "check"]
        done = subprocess.run(
            [*command, f"TESTS={test}", f"QEMU_NBD={server}"],
            env=environ,
            capture_output=True,
            text=True,
            errors="replace",
            stdin=subprocess.DEVNULL,
        )
        log_file = place / f"{test}.log"
        output = log_file.read_text(errors="replace") if log_file.exists() else ""
        kept = work / "output" / directory
        kept.mkdir(parents=True, exist_ok=True)
        (kept / test).write_text(done.stdout + done.stderr + output)
        found = re.search(rf"^([A-Z]+): {re.escape(test)}", done.stdout, re.MULTILINE)
        # The output of a failure is full of addresses: two failures count as the same.
        return Outcome(_RESULTS.get(found[1] if found else "", FAIL), "", ours_in(log))
