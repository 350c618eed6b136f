# SPDX-License-Identifier: Apache-2.0
"""Where clients connect: TCP, Unix sockets, stale ones, and systemd's socket activation."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdstream.errors import UsageError
from nbdstream.net.listeners import Listener, close_all, from_systemd, listen_tcp, listen_unix
from testbed.peers import run, temporary_directory


@pytest.fixture
def directory() -> Iterator[Path]:
    with temporary_directory() as path:
        yield path


def connects(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as client:
        try:
            client.connect(str(path))
        except (ConnectionRefusedError, FileNotFoundError):
            return False
    return True


# --- Unix sockets -----------------------------------------------------------------------


def test_a_unix_socket_appears_and_is_removed(directory: Path) -> None:
    path = directory / "nbd"
    listener = listen_unix(path)
    assert connects(path)
    listener.close()
    assert not path.exists()
    listener.close()  # twice is fine


def test_a_stale_socket_is_replaced(directory: Path) -> None:
    path = directory / "nbd"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    assert path.is_socket()
    listener = listen_unix(path)
    assert connects(path)
    listener.close()


def test_a_socket_in_use_is_left_alone(directory: Path) -> None:
    path = directory / "nbd"
    listener = listen_unix(path)
    with pytest.raises(UsageError, match="another server"):
        listen_unix(path)
    assert connects(path)
    listener.close()


def test_a_server_with_a_full_backlog_is_in_use(directory: Path) -> None:
    path = directory / "nbd"
    with socket.socket(socket.AF_UNIX) as busy:
        busy.bind(str(path))
        busy.listen(0)
        with socket.socket(socket.AF_UNIX) as waiting:
            waiting.connect(str(path))
            with pytest.raises(UsageError, match="another server"):
                listen_unix(path)


def test_a_file_that_is_no_socket_is_left_alone(directory: Path) -> None:
    path = directory / "nbd"
    path.write_text("precious")
    with pytest.raises(UsageError, match="not a socket"):
        listen_unix(path)
    assert path.read_text() == "precious"


def test_a_path_that_is_too_long_or_nowhere(directory: Path) -> None:
    with pytest.raises(UsageError, match="longer than 107 bytes"):
        listen_unix(directory / ("x" * 120))
    with pytest.raises(FileNotFoundError):
        listen_unix(directory / "nowhere" / "nbd")


def test_a_socket_that_another_server_took_over_is_not_removed(directory: Path) -> None:
    path = directory / "nbd"
    first = listen_unix(path)
    path.unlink()
    second = listen_unix(path)
    first.close()
    assert connects(path)
    second.close()


@pytest.mark.parametrize("call", ["stat", "unlink"])
@pytest.mark.parametrize("failure", [FileNotFoundError, PermissionError, NotADirectoryError])
def test_a_file_that_cannot_be_removed_is_no_trouble(
    directory: Path, monkeypatch: pytest.MonkeyPatch, call: str, failure: type[OSError]
) -> None:
    """Somebody who stops a server removes its socket at the same time."""

    def fail(path: Path) -> None:
        raise failure(path)

    listener = listen_unix(directory / "nbd")
    with monkeypatch.context() as patched:
        patched.setattr(Path, call, fail)
        listener.close()
    listen_unix(directory / "nbd").close()
    assert not (directory / "nbd").exists()


def test_unix_uri(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listener = listen_unix(directory / "a b")
    assert listener.uri("x/y z") == f"nbd+unix:///x%2Fy%20z?socket={directory}/a%20b"
    listener.close()
    monkeypatch.chdir(directory)
    relative = listen_unix(Path("nbd"))
    assert relative.uri() == f"nbd+unix:///?socket={directory}/nbd"
    relative.close()


# --- TCP --------------------------------------------------------------------------------


def test_tcp_on_a_port_of_the_systems_choice() -> None:
    listeners = listen_tcp("127.0.0.1", 0)
    [listener] = listeners
    host, port = listener.socket.getsockname()
    assert listener.uri("disk") == f"nbd://127.0.0.1:{port}/disk"
    with socket.create_connection((host, port)):
        accepted, where = listener.accept()
        assert where.startswith("127.0.0.1:")
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert not accepted.getblocking()
        accepted.close()
    with pytest.raises(BlockingIOError):
        listener.accept()
    close_all(listeners)


def test_all_addresses_of_a_host_share_one_port() -> None:
    listeners = listen_tcp("localhost", 0)
    assert len({listener.socket.getsockname()[1] for listener in listeners}) == 1
    close_all(listeners)


def test_a_port_in_use() -> None:
    listeners = listen_tcp("127.0.0.1", 0)
    port = listeners[0].socket.getsockname()[1]
    with pytest.raises(UsageError, match=f"port {port} of host '127.0.0.1' is in use"):
        listen_tcp("127.0.0.1", port)
    close_all(listeners)


@pytest.mark.parametrize("host", ["no.such.host.invalid", "192.0.2.1"])
def test_a_host_that_is_not_ours(host: str) -> None:
    with pytest.raises(UsageError, match=f"cannot listen on host '{host}'"):
        listen_tcp(host, 0)


def test_ipv6_uri() -> None:
    [listener] = listen_tcp("::1", 0)
    port = listener.socket.getsockname()[1]
    assert listener.uri() == f"nbd://[::1]:{port}/"
    listener.close()


# --- socket activation ------------------------------------------------------------------


def test_without_activation_there_is_nothing() -> None:
    assert from_systemd({}) == []
    # Meant for another process: a parent of ours, most likely.
    environment = {"LISTEN_PID": "1", "LISTEN_FDS": "1", "LISTEN_FDNAMES": "nbd", "HOME": "/"}
    assert from_systemd(environment) == []
    assert environment == {"HOME": "/"}


def test_activation_with_nonsense() -> None:
    with pytest.raises(UsageError, match="LISTEN_FDS"):
        from_systemd({"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "x"})


# A program that serves a file on the sockets it is handed, until SIGTERM.
_SERVE = """
import os, pathlib, signal, sys, trio
from nbdstream.errors import UsageError
from nbdstream.net.listeners import from_systemd
from nbdstream.server.server import Server
from tests.file_export import FileExport

async def main(listeners):
    server = Server([FileExport(pathlib.Path(sys.argv[1]), read_only=True)])
    with trio.open_signal_receiver(signal.SIGTERM) as signals:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server.run, listeners)
            async for _ in signals:
                server.stop()
                break

try:
    listeners = from_systemd(os.environ)
except UsageError as error:
    sys.exit(str(error))
assert "LISTEN_FDS" not in os.environ
trio.run(main, listeners)
"""


def test_nbdinfo_and_nbdcopy_start_the_server_by_activation(directory: Path) -> None:
    image = directory / "disk.raw"
    image.write_bytes(os.urandom(1 << 20))
    server = [sys.executable, "-c", _SERVE, str(image)]
    assert run(["nbdinfo", "--size", "--", "[", *server, "]"]) == f"{1 << 20}\n"
    run(["nbdcopy", "--", "[", *server, "]", directory / "copy"])
    assert (directory / "copy").read_bytes() == image.read_bytes()


# LISTEN_PID is the process's own, so only the process itself knows it early enough; and
# descriptor 3 is what a test wants it to be.
_ACTIVATE = """
import os
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="1")
handed = int(os.environ["HANDED"])
os.dup2(handed, 3) if handed >= 0 else os.closerange(3, 4)
"""


def _activate(image: Path, handed: int) -> subprocess.CompletedProcess[str]:
    """Run the program as systemd would, with ``handed`` as descriptor 3, or none if -1."""
    return subprocess.run(
        [sys.executable, "-c", _ACTIVATE + _SERVE, image],
        env={**os.environ, "HANDED": str(handed)},
        pass_fds=[handed] if handed >= 0 else [],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


@pytest.mark.parametrize("kind", ["none", "connected", "datagram"])
def test_activation_with_something_else_than_a_listening_socket(directory: Path, kind: str) -> None:
    image = directory / "disk.raw"
    image.write_bytes(bytes(4096))
    one, two = socket.socketpair(
        socket.AF_UNIX, socket.SOCK_DGRAM if kind == "datagram" else socket.SOCK_STREAM
    )
    with one, two:
        done = _activate(image, -1 if kind == "none" else one.fileno())
    assert done.returncode == 1
    assert "file descriptor 3 from LISTEN_FDS" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_inherited_socket_keeps_its_file(directory: Path) -> None:
    path = directory / "nbd"
    with socket.socket(socket.AF_UNIX) as ours:
        ours.bind(str(path))
        ours.listen()
        inherited = Listener(ours.dup())
        assert inherited.uri() == f"nbd+unix:///?socket={path}"
        inherited.close()
    assert path.exists()


def test_abstract_socket_uri() -> None:
    with socket.socket(socket.AF_UNIX) as ours:
        ours.bind(b"\0nbdstream test")
        ours.listen()
        listener = Listener(ours.dup())
        assert listener.uri("disk") == "nbd+unix:///disk?socket=%00nbdstream%20test"
        listener.close()
