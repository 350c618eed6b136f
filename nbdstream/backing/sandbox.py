# SPDX-License-Identifier: Apache-2.0
"""What a helper process may open: policies for `nbdstream.backing.confine`, which enforces them.

A helper that reads an image format is confined strictly: it gets one image or one NBD server,
its libraries, and nothing else. A helper that only speaks a protocol (HTTPS, SSH, S3) needs
the network, certificates and keys; it may read the system's configuration, and from the
user's home directory only what belongs to its protocol.

The image itself is opened here, once, and passed on as a descriptor: what its path leads to
later does not matter. ``confine.IMAGE`` stands for it in a command.
"""

import os
import shutil
import stat
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nbdstream.backing import confine
from nbdstream.errors import BackingError

# Where libraries and QEMU's and nbdkit's modules lie, in distributions of all kinds.
LIBRARIES: tuple[str, ...] = ("/usr/lib", "/usr/lib64", "/usr/local/lib", "/lib", "/lib64")
LIBRARIES += ("/nix/store", "/gnu/store")
LIBRARY_FILES = ("/etc/ld.so.cache", "/etc/ld.so.conf")
# What a program needs besides to find hosts and to verify who they are.
SYSTEM = ("/usr", "/etc", "/run/systemd/resolve", "/run/resolvconf", "/var/lib/ca-certificates")
# Of the environment, what any program gets; others are named with the policy.
ENVIRONMENT = ("LANG", "LC_ALL", "TZ", "LD_LIBRARY_PATH", "QEMU_MODULE_DIR")

GIB = 1 << 30
# DATA bounds what hostile tables and compressed clusters can make a program allocate; FSIZE 0
# lets it write to no file at all.
LIMITS = {"CORE": 0, "DATA": 2 * GIB, "FSIZE": 0, "NOFILE": 1024}
# Fewer of malloc's arenas, whose reserve would count against DATA.
TUNING = {"MALLOC_ARENA_MAX": "4"}

# Imported, and not run as a script, so that Python keeps its bytecode.
_LAUNCHER = "import sys; sys.path.append(sys.argv[1]); import confine; confine.main(sys.argv[2:])"


@dataclass(frozen=True)
class Policy:
    """What a program may do besides reading its libraries.

    ``image``: an open descriptor of the one file that it reads, -1 for none, and ``path`` where
    it is. ``sockets``: the Unix sockets that it connects to. ``ports``: the TCP ports that it
    may connect to, None for any. ``files`` and ``trees``: what else it may read, single files and
    directories; a strict program has the files only. ``runs``: it may run programs from the
    trees, and write below ``/tmp``. ``environment``: the names of further variables that it
    gets. ``strict``: it parses what strangers wrote, and does not start unconfined.
    """

    strict: bool = True
    image: int = -1
    path: str = ""
    sockets: tuple[str, ...] = ()
    ports: tuple[int, ...] | None = ()
    files: tuple[str, ...] = ()
    trees: tuple[str, ...] = ()
    runs: bool = False
    environment: tuple[str, ...] = ()
    limits: dict[str, int] = field(default_factory=lambda: dict(LIMITS))

    def command(self, command: Sequence[str], directory: str, image_fd: int) -> list[str]:
        """The command that confines itself and then becomes ``command``, whose first word is a
        program's path. For a child of this process. ``directory``: an empty one of its own.
        ``image_fd``: the image's descriptor in the child."""
        privileged = os.geteuid() == 0 and any(
            map(_needs_root, (self.path, *self.sockets, *self.files))
        )
        policy = {
            "parent": os.getpid(),
            "program": os.path.realpath(command[0]),
            "root": directory,
            "strict": self.strict,
            # In a user namespace, root is not root for the files of others.
            "namespaces": self.strict and not privileged,
            "privileged": privileged,
            "libraries": [path for path in LIBRARIES if Path(path).is_dir()],
            "files": [*LIBRARY_FILES, os.path.realpath(command[0]), *self.files],
            "trees": list(self.trees),
            "runs": self.runs,
            "image": self.path,
            "image_fd": image_fd,
            "sockets": list(self.sockets),
            "ports": self.ports if self.ports is None else list(self.ports),
            "limits": self.limits,
        }
        place = str(Path(confine.__file__).parent)
        return [_python(), "-I", "-S", "-c", _LAUNCHER, place, confine.encode(policy), *command]

    def variables(self) -> dict[str, str]:
        """The environment of the program."""
        names = (*ENVIRONMENT, *self.environment)
        given = {
            name: value
            for name, value in os.environ.items()
            if name in names or any(name.startswith(n[:-1]) for n in names if n.endswith("*"))
        }
        return given | {"PATH": _path()} | TUNING


def source_policy(
    trees: Sequence[str], environment: Sequence[str], *, runs: bool = False
) -> Policy:
    """The policy of a helper that speaks a protocol and reads no format."""
    return Policy(
        strict=False,
        runs=runs,
        ports=None,
        trees=(*SYSTEM, *map(os.path.expanduser, trees), *_named_by(environment)),
        environment=("HOME", *environment),
        limits={"CORE": 0},
    )


def _named_by(environment: Sequence[str]) -> list[str]:
    """The files that variables of the environment name, such as certificates."""
    values = [os.environ.get(name, "") for name in environment]
    return [value for value in values if value.startswith("/")]


def open_image(path: str) -> int:
    """Open an image that the user has named, to be passed on. Raises BackingError."""
    try:
        # O_NONBLOCK: opening a FIFO would wait for a peer.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise BackingError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise BackingError(f"{path}: no path has a NUL in it") from error
    mode = os.fstat(fd).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
        os.close(fd)
        raise BackingError(f"{path}: neither a file nor a block device")
    return fd


def _needs_root(path: str) -> bool:
    """Whether a file's owner does not let others read it (or write to a socket)."""
    try:
        status = Path(path).stat()
    except OSError:
        return False
    needed = stat.S_IROTH | stat.S_IWOTH if stat.S_ISSOCK(status.st_mode) else stat.S_IROTH
    return status.st_uid != os.geteuid() and status.st_mode & needed != needed


def _path() -> str:
    """The search path, without virtual environments: nbdkit's Python would take an activated one
    for its own, and may not read it."""
    places = os.environ.get("PATH", os.defpath).split(os.pathsep)
    return os.pathsep.join(
        place for place in places if not os.access(f"{place}/../pyvenv.cfg", os.F_OK)
    )


def _python() -> str:
    """This interpreter's program; where it is embedded (in nbdkit), the system's."""
    if os.path.basename(sys.executable).startswith("python"):
        return sys.executable
    return shutil.which("python3") or "/usr/bin/python3"
