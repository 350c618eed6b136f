# SPDX-License-Identifier: Apache-2.0
"""QEMU's iotests: all that run on an image behind NBD, and those that start qemu-nbd."""

import re
import shutil
import subprocess
from pathlib import Path

from testbed.suites.result import (
    FAIL,
    PASS,
    SKIP,
    Outcome,
    environment,
    ours_in,
    without_what_varies,
)

# Image format and protocol, and which tests: all, or those that start the server.
GROUPS = (
    ("raw", "nbd", True),
    ("raw", "file", False),
    ("qcow2", "file", False),
    ("qed", "file", False),
)
STARTS = re.compile(r"QEMU_NBD|qemu_nbd|nbd_server_start|qemu-nbd")
TEST_SECONDS = 120


class Iotests:
    """The suite in a source tree of QEMU."""

    def __init__(self, source: Path, directory: Path) -> None:
        """``directory``: for images, sockets and logs."""
        self._place = source / "tests" / "qemu-iotests"
        self._directory = directory
        # QEMU as Debian builds it has no accelerator 'qtest'.
        qemu = directory / "qemu-system-x86_64"
        real = shutil.which("qemu-system-x86_64")
        qemu.write_text(
            '#!/bin/bash\nwords=()\nfor word in "$@"; do\n'
            '    [ "$word" = qtest ] && word=tcg\n    words+=("$word")\ndone\n'
            f'exec {real} "${{words[@]}}"\n'
        )
        qemu.chmod(0o755)
        self._qemu = qemu

    def names(self) -> list[str]:
        """As 'FORMAT PROTOCOL TEST'."""
        tests = sorted(
            path
            for path in [*self._place.glob("[0-9][0-9][0-9]"), *self._place.glob("tests/*")]
            if path.suffix == "" and path.is_file()
        )
        found = []
        for image_format, protocol, every in GROUPS:
            for path in tests:
                if every or STARTS.search(path.read_text(errors="replace")):
                    found.append(f"{image_format} {protocol} {path.relative_to(self._place)}")
        return found

    def run(self, name: str, server: Path) -> Outcome:
        """Run a test with a ``qemu-nbd``."""
        image_format, protocol, test = name.split()
        work = self._directory / server.parent.parent.name
        log = work / "stand-in.log"
        scratch = work / "scratch"
        # Short enough for sockets. Not inside scratch: the suite replaces that path first.
        sockets = work / "s"
        for place in (scratch, sockets):
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir(parents=True)
        environ = environment(log) | {
            "QEMU_PROG": str(self._qemu),
            "QEMU_NBD_PROG": str(server),
            "TEST_DIR": str(scratch),
            "SOCK_DIR": str(sockets),
        }
        for variable, tool in (("IMG", "img"), ("IO", "io")):
            environ[f"QEMU_{variable}_PROG"] = shutil.which(f"qemu-{tool}") or ""
        environ["QSD_PROG"] = shutil.which("qemu-storage-daemon") or ""
        command = [
            "timeout",
            "-k",
            "5",
            str(TEST_SECONDS),
            "./check",
            f"-{image_format}",
            f"-{protocol}",
            Path(test).name,
        ]
        done = subprocess.run(
            command,
            cwd=self._place,
            env=environ,
            capture_output=True,
            text=True,
            errors="replace",
            stdin=subprocess.DEVNULL,
        )
        self._end_what_is_left(scratch)
        output = done.stdout + done.stderr
        (work / "output" / image_format / protocol).mkdir(parents=True, exist_ok=True)
        (work / "output" / image_format / protocol / test.replace("/", "-")).write_text(output)
        if "Not run: " in output:
            return Outcome(SKIP)
        if done.returncode == 0 and "Passed all 1 " in output:
            return Outcome(PASS, "", ours_in(log))
        shown = output.partition("\n---")[2]  # where the words differ from those expected
        return Outcome(FAIL, without_what_varies(shown), ours_in(log))

    def _end_what_is_left(self, scratch: Path) -> None:
        """Servers of a test that was cut off."""
        for pid_file in scratch.glob("*.pid"):
            subprocess.run(["kill", pid_file.read_text().strip()], stderr=subprocess.DEVNULL)
