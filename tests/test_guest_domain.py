# SPDX-License-Identifier: Apache-2.0
"""boot --print-xml: a guest as a domain of libvirt."""

import shlex
import subprocess
from pathlib import Path
from typing import get_args
from xml.etree import ElementTree

import pytest

from nbdstream.guest.accelerator import Accelerator
from nbdstream.guest.domain import domain_xml
from testbed.peers import binary, run

OPTIONS = ("-f", "qcow2", "--store", "--thin", "--speed", "2M", "--no-pivot")


@pytest.mark.parametrize("accelerator", get_args(Accelerator))
def test_libvirts_schema_takes_it(tmp_path: Path, accelerator: Accelerator) -> None:
    file, socket = tmp_path / "vm.xml", "/run/a 'b\" <c> & d/vm.nbd"
    file.write_text(domain_xml("a & <b>", socket, 384 << 20, accelerator))
    run(["virt-xml-validate", file, "domain"])
    domain = ElementTree.parse(file)
    assert domain.findtext("name") == "a & <b>"
    assert domain.findtext("memory") == "384"
    host = domain.find("devices/disk/source/host")
    assert host is not None and host.get("socket") == socket


def test_the_command_starts_and_makes_nothing(tmp_path: Path) -> None:
    leaf = tmp_path / "my vm.qcow2"
    command = [binary("NBDSTREAM"), "boot", "--print-xml", "-m", "256M", "--leaf", str(leaf)]
    done = subprocess.run(
        [*command, *OPTIONS, "nbd://nowhere.invalid/disk"],
        capture_output=True,
        text=True,
        check=True,
    )
    domain = ElementTree.fromstring(done.stdout)
    assert domain.findtext("name") == "my vm"
    (line,) = done.stderr.splitlines()
    served = shlex.split(line.partition("serve its disk: ")[2])
    socket = str(tmp_path / "my vm.nbd")
    assert served == [
        *("nbdstream", "serve", str(leaf), "-U", socket),
        *("-b", "nbd://nowhere.invalid/disk"),
        *("--format=qcow2", "--store", "--thin", "--speed=2097152"),
    ]
    assert socket in done.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nbd://host/disk"], "needs a leaf that stays: name it with --leaf"),
        (["--leaf", "x.qcow2", "nbd://host/disk", "--", "-vga", "std"], "add them to the XML"),
        (["--leaf", "x.qcow2", "nbd://host/disk", "--pivot"], "libvirt has to know of it"),
    ],
)
def test_what_a_domain_cannot_have_is_refused(arguments: list[str], words: str) -> None:
    done = subprocess.run(
        [binary("NBDSTREAM"), "boot", "--print-xml", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0 and not done.stdout
    assert words in done.stderr and done.stderr.count("\n") == 1
