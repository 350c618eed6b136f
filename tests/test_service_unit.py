# SPDX-License-Identifier: Apache-2.0
"""nbdstream as a service: the unit files, and a test that plays systemd's part."""

import os
import re
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import nbd
import pytest

from testbed.peers import (
    Qmp,
    binary,
    make_image,
    qemu_storage_daemon,
    run,
    temporary_directory,
    unix_uri,
)
from tests.serve_support import nbdstream, nbdstream_here

UNITS = Path(__file__).parent.parent / "install" / "systemd"
MIB = 1 << 20
# systemd's own words for it begin at "OK"; up to 2.0 is what the project promises.
EXPOSURE_MOST = 2.0
PATIENCE = 30.0


def test_the_service_can_do_little_but_serve() -> None:
    report = run(
        ["systemd-analyze", "security", "--offline=yes", UNITS / "nbdstream@.service"], check=False
    )
    found = re.search(r"Overall exposure level for \S+: ([0-9.]+)", report)
    assert found and float(found[1]) <= EXPOSURE_MOST, report


def test_systemd_understands_the_units(tmp_path: Path) -> None:
    for unit in UNITS.iterdir():
        text = unit.read_text().replace("/usr/bin/nbdstream", binary("NBDSTREAM"))
        name = unit.name.replace("@", "@disk")
        (tmp_path / name).write_text(text)
    for unit in tmp_path.iterdir():
        done = subprocess.run(
            ["systemd-analyze", "verify", "--man=no", unit],
            env=os.environ | {"SYSTEMD_UNIT_PATH": f"{tmp_path}:"},
            capture_output=True,
            text=True,
        )
        complaints = [line for line in done.stderr.splitlines() if "nbdstream" in line]
        assert complaints == []


class Systemd:
    """The socket of a unit, which outlives its service, and the messages of the service."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "nbd.sock"
        self.control = directory / "qmp"
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self.path))
        self._listener.listen()
        self._messages = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._messages.bind(str(directory / "notify"))
        self._messages.settimeout(PATIENCE)
        self._directory = directory

    def close(self) -> None:
        self._listener.close()
        self._messages.close()

    @contextmanager
    def service(self, config: Path, **variables: str) -> Iterator[subprocess.Popen[bytes]]:
        """The service, from its start to its end."""
        command = [binary("NBDSTREAM"), "serve", "--config", str(config)]
        words = [*command, "--control", str(self.control)]
        environment = os.environ | {"NOTIFY_SOCKET": str(self._directory / "notify")} | variables
        # As systemd does it: the socket is descriptor 3 of the process that LISTEN_PID names.
        code = f'exec 3<&{self._listener.fileno()}; LISTEN_FDS=1 LISTEN_PID=$$ exec "$@"'
        process = subprocess.Popen(
            ["bash", "-c", code, "bash", *words],
            env=environment,
            pass_fds=[self._listener.fileno()],
            stdin=subprocess.DEVNULL,
        )
        try:
            yield process
        finally:
            process.kill()
            process.wait()

    def message(self, wanted: str) -> str:
        """The next assignment of the variable ``wanted`` that the service sends."""
        while True:
            for line in self._messages.recv(4096).decode().splitlines():
                name, _, value = line.partition("=")
                if name == wanted:
                    return value


@pytest.fixture
def systemd() -> Iterator[Systemd]:
    with temporary_directory() as directory:
        double = Systemd(directory)
        yield double
        double.close()


@pytest.fixture
def config(tmp_path: Path) -> Path:
    make_image(tmp_path / "base.raw", 4 * MIB, seed=8)
    path = tmp_path / "disk.toml"
    path.write_text(
        f'leaf = "{tmp_path}/leaf.qcow2"\nbacking = "{tmp_path}/base.raw"\nstream = "paused"\n'
    )
    return path


def test_the_service_says_that_it_is_ready_and_how_it_does(systemd: Systemd, config: Path) -> None:
    with systemd.service(config, WATCHDOG_USEC="400000") as process:
        assert systemd.message("READY") == "1"
        assert re.fullmatch(r"0 clients, 0\.0 % local, .*paused.*", systemd.message("STATUS"))
        assert systemd.message("WATCHDOG") == "1"
        client = nbd.NBD()
        client.connect_unix(str(systemd.path))
        while not systemd.message("STATUS").startswith("1 client,"):
            pass
        client.shutdown()
        process.send_signal(signal.SIGTERM)
        assert systemd.message("STOPPING") == "1"
        assert process.wait(PATIENCE) == 0


def test_no_sign_of_life_comes_from_an_event_loop_that_hangs(
    systemd: Systemd, config: Path
) -> None:
    with systemd.service(config, WATCHDOG_USEC="200000") as process:
        assert systemd.message("WATCHDOG") == "1"
        process.send_signal(signal.SIGSTOP)
        systemd._messages.settimeout(1)
        with pytest.raises(TimeoutError):
            while True:
                systemd.message("WATCHDOG")


def test_a_restart_of_the_service_goes_unnoticed(systemd: Systemd, config: Path) -> None:
    """The guest is QEMU's block layer, as libvirt sets it up: it connects again."""
    blockdev = (
        f"driver=nbd,node-name=disk,server.type=unix,server.path={systemd.path},reconnect-delay=60"
    )
    with systemd.service(config) as first:
        systemd.message("READY")
        with qemu_storage_daemon("--blockdev", blockdev) as qemu:
            assert qemu.control is not None
            with Qmp(qemu.control) as qmp:
                address = {"type": "unix", "data": {"path": str(qemu.socket)}}
                qmp.execute("nbd-server-start", addr=address)
                qmp.execute(
                    "block-export-add", type="nbd", id="e", node_name="disk", name="", writable=True
                )
            guest = nbd.NBD()
            guest.connect_uri(unix_uri(qemu.socket))
            guest.pwrite(b"before" * 100, 0)
            guest.flush()
            first.send_signal(signal.SIGTERM)
            assert first.wait(PATIENCE) == 0
            with systemd.service(config):
                assert guest.pread(600, 0) == b"before" * 100
                guest.pwrite(b"after " * 100, 0)
                guest.flush()
                assert guest.pread(600, 0) == b"after " * 100
                guest.shutdown()


# --- the configuration ------------------------------------------------------------------


def check(config: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return nbdstream_here("serve", "--check", "--config", config, *arguments, cwd=config.parent)


def test_a_good_configuration_passes_and_changes_nothing(config: Path) -> None:
    before = sorted(config.parent.iterdir())
    for done in (check(config), nbdstream("serve", "--check", "--config", config)):
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert sorted(config.parent.iterdir()) == before


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ("nonsense = 1", "there is no option 'nonsense'"),
        ("speed = 'fast'", "not a rate"),
        ("speed = [1]", "'speed' is a string or a number"),
        ("read-only = 'yes'", "'read-only' is true or false"),
        ("tls = true", "'tls' is a string"),
        ("export = ", "not TOML"),
        ("config = 'other.toml'", "there is no option 'config'"),
        ("finish-in = '2h'", "--stream off"),
        ("unix = 'a'\nlisten = 'localhost:1'", "one of -U"),
        ("metrics = 'nowhere'", "HOST:PORT"),
        ("tls-certificates = 'none'", "server-cert.pem: No such file"),
        ("prefetch = 'none'", "none: No such file"),
    ],
)
def test_a_bad_configuration_is_refused_in_one_line(config: Path, more: str, words: str) -> None:
    config.write_text(config.read_text().replace("paused", "off") + more + "\n")
    done = check(config)
    assert done.returncode in (1, 2)
    assert words in done.stderr.splitlines()[-1]


def test_without_a_leaf_or_a_backing(config: Path) -> None:
    config.write_text("leaf = 'none.qcow2'\n")
    assert "name its backing" in check(config).stderr
    config.write_text("backing = 'base.raw'\n")
    assert "LEAF" in check(config).stderr


def test_every_option_can_stand_in_the_file(config: Path) -> None:
    from nbdstream.cli.serve import serve

    for parameter in serve.params:
        key = max(parameter.opts, key=len).removeprefix("--")
        if key not in ("config", "leaf", "backing"):
            flag = getattr(parameter, "is_flag", False)
            config.write_text(
                f"leaf = 'x.qcow2'\nbacking = 'b'\n{key} = {'false' if flag else 1}\n"
            )
            assert "no option" not in check(config).stderr


def test_the_command_line_goes_before_the_file(config: Path) -> None:
    config.write_text(config.read_text() + "finish-in = 60\n")
    assert check(config).returncode == 0
    assert "--stream off" in check(config, "--stream", "off").stderr
