# SPDX-License-Identifier: Apache-2.0
"""Confine this process, then become another program: ``main([POLICY, *COMMAND])``.

Helpers parse bytes that strangers wrote: image formats above all. What such a program
opens must not depend on those bytes (invariant 13), so it is started by this script, which
takes away everything that it does not need, as an unprivileged process can:

- *namespaces* (user, mount, IPC and, without network, network): a root directory that
  holds the program's libraries, the one image or socket, and nothing else;
- *Landlock*: the same again, by the kernel's own list of what may be opened and run, and to
  which TCP port it may connect;
- *seccomp*: system calls that such a program never needs, and other kinds of sockets;
- *no_new_privs*, no capabilities, resource limits, and a parent whose death kills it.

Each is used where the kernel has it. One line on standard error says which were used; that
line always comes first. A ``strict`` policy demands namespaces or Landlock: without both,
nothing is started.

It runs alone, on the standard library: as a module of the package it would load all of that.
A guest waits for the helper, so this module has to load fast: no pathlib, no json, no typing,
nothing that needs `re` or `enum`. `nbdstream.backing.sandbox` is what calls it.

Sources: landlock(7), seccomp(2), user_namespaces(7), pivot_root(2), capset(2); the numbers are
those of the kernel's uapi headers.
"""

# ruff: noqa: PTH103, PTH110, PTH112, PTH114, PTH115, PTH116, PTH120, PTH208, PTH211

from __future__ import annotations

import ctypes
import errno
import marshal
import os
import resource
import stat
import struct
from collections.abc import Callable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn

# What the first line on standard error begins with.
REPORT = "sandbox: "
# Stands for the image's path in the command.
IMAGE = "/nbdstream-image"
# The exit status if nothing was started, as a shell's for a program that it cannot run.
REFUSED = 126

_libc = ctypes.CDLL(None, use_errno=True)

_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS = 1, 22, 24, 38

_SIGKILL = 9  # the same on every architecture; importing `signal` would load `enum`

# Files that programs need besides their libraries.
_DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random")


def _check(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def _syscall(number: int, *arguments: object) -> int:
    return _check(_libc.syscall(number, *arguments), f"system call {number}")


def _prctl(option: int, *arguments: int) -> None:
    words = [ctypes.c_ulong(argument) for argument in (*arguments, 0, 0, 0, 0)[:4]]
    _check(_libc.prctl(option, *words), f"prctl {option}")


# -- namespaces ------------------------------------------------------------------------------

_CLONE_NEWNS, _CLONE_NEWIPC, _CLONE_NEWUSER, _CLONE_NEWNET = (
    0x00020000,
    0x08000000,
    0x10000000,
    0x40000000,
)
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_NOEXEC = 1, 2, 4, 8
_MS_REMOUNT, _MS_BIND, _MS_REC, _MS_PRIVATE = 32, 4096, 16384, 1 << 18
_MNT_DETACH = 2
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}


def _mount(source: str, target: str, kind: str, flags: int, data: str = "") -> None:
    arguments = (source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags))
    _check(_libc.mount(*arguments, data.encode()), f"mount on {target}")


def _bind(root: str, path: str, name: str) -> None:
    """Show a file or a directory in the new root, read-only."""
    target = root + name
    if os.path.islink(path) and os.path.isdir(path):
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.symlink(os.readlink(path), target)
        return
    if os.path.isdir(path):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.close(os.open(target, os.O_CREAT | os.O_RDONLY, 0o600))
    _mount(os.path.realpath(path), target, "", _MS_BIND | _MS_REC)
    # Flags of the original mount that a user namespace may not clear have to be repeated.
    flags = os.statvfs(target).f_flag & (_MS_NOSUID | _MS_NODEV | _MS_NOEXEC | 1024 | 2048)
    _mount("", target, "", _MS_BIND | _MS_REMOUNT | _MS_RDONLY | _MS_NOSUID | flags)


def _enter_namespaces(policy: dict[str, Any], *, landlock: bool) -> None:
    """Put the process into a root directory of its own. Raises OSError."""
    uid, gid = os.geteuid(), os.getegid()
    network = 0 if policy["ports"] is None or policy["ports"] else _CLONE_NEWNET
    flags = _CLONE_NEWUSER | _CLONE_NEWNS | _CLONE_NEWIPC | network
    _check(_libc.unshare(flags), "unshare")
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{uid} {uid} 1"),
        ("gid_map", f"{gid} {gid} 1"),
    ):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    root = policy["root"]
    _mount("none", "/", "", _MS_REC | _MS_PRIVATE)
    _mount("tmpfs", root, "tmpfs", _MS_NOSUID | _MS_NODEV, "size=256k,mode=0700")
    for path in (*policy["libraries"], *policy["files"], *_DEVICES):
        if os.path.exists(path):
            _bind(root, path, path)
    # A server that is started again makes its socket again. With Landlock below, the
    # directory may be seen, since nothing in it can be opened but sockets.
    for shown in {os.path.dirname(path) if landlock else path for path in policy["sockets"]}:
        _bind(root, shown, shown)
    if policy["image"]:
        _bind(root, policy["image"], IMAGE)
        if os.stat(root + IMAGE) != os.fstat(policy["image_fd"]):
            raise OSError(errno.ESTALE, "the image's path leads elsewhere by now")
    os.chdir(root)
    _syscall(_PIVOT_ROOT[os.uname().machine], b".", b".")
    _check(_libc.umount2(b".", _MNT_DETACH), "umount")
    os.chdir("/")
    _mount("", "/", "", _MS_REMOUNT | _MS_BIND | _MS_RDONLY | _MS_NOSUID | _MS_NODEV)


def _succeeds(step: Callable[[], None]) -> bool:
    """Whether a step works, tried in a child: a step that fails half-way cannot be undone."""
    child = os.fork()
    if child == 0:
        try:
            step()
        except (OSError, KeyError):
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


# -- Landlock --------------------------------------------------------------------------------

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # the same on every architecture
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR, _IOCTL_DEV = 1, 2, 4, 8, 1 << 15
_FILE_RIGHTS = _EXECUTE | _WRITE_FILE | _READ_FILE | 1 << 14 | _IOCTL_DEV
_BIND_TCP, _CONNECT_TCP = 1, 2
_SCOPES = 3  # abstract Unix sockets, signals
_RULE_PATH, _RULE_PORT = 1, 2


def _landlock_version() -> int:
    """The version of the kernel's Landlock, 0 for none."""
    version: int = _libc.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), 1)
    return max(version, 0)


def _handled(version: int) -> int:
    """All rights on files that a version knows: what no rule grants is denied."""
    rights = (1 << 13) - 1
    for since, right in ((2, 1 << 13), (3, 1 << 14), (5, _IOCTL_DEV)):
        rights |= right if version >= since else 0
    return rights


def _restrict(policy: dict[str, Any], version: int) -> None:
    """Restrict the process by Landlock. Raises OSError."""
    handled = _handled(version)
    # Without ports, none can be reached; a None leaves the network alone.
    network = _BIND_TCP | _CONNECT_TCP if policy["ports"] is not None else 0
    fields = [handled, network, _SCOPES][: 1 + (version >= 4) + (version >= 6)]
    attributes = struct.pack(f"={len(fields)}Q", *fields)
    ruleset = _syscall(_CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), 0)
    granted: dict[str, int] = {}
    for path in (*policy["libraries"], *policy["files"], *policy["trees"]):
        granted[path] = _READ_FILE | _READ_DIR
    if policy["runs"]:
        for path in policy["trees"]:
            granted[path] |= _EXECUTE
        granted["/tmp"] = handled  # nbdkit's sh plugin has to have a directory there
    for path in _DEVICES:
        granted[path] = _READ_FILE | _WRITE_FILE
    for path in (policy["program"], *_loaders()):
        granted[path] = _READ_FILE | _EXECUTE
    if not _loaders():
        for path in policy["libraries"]:
            granted[path] |= _EXECUTE
    for path, rights in granted.items():
        try:
            fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue
        _allow(ruleset, fd, rights & handled)
        os.close(fd)
    if policy["image"]:
        _allow(ruleset, policy["image_fd"], (_READ_FILE | _IOCTL_DEV) & handled)
    if version >= 4:
        for port in policy["ports"] or ():
            rule = struct.pack("=QQ", _CONNECT_TCP, port)
            _syscall(_ADD_RULE, ruleset, _RULE_PORT, rule, 0)
    _syscall(_RESTRICT_SELF, ruleset, 0)
    os.close(ruleset)


def _allow(ruleset: int, fd: int, rights: int) -> None:
    if not stat.S_ISDIR(os.fstat(fd).st_mode):
        rights &= _FILE_RIGHTS
    _syscall(_ADD_RULE, ruleset, _RULE_PATH, struct.pack("=Qi", rights, fd), 0)


def _loaders() -> list[str]:
    """The dynamic loaders, which the kernel runs for a program."""
    found = []
    for directory in filter(os.path.isdir, ("/lib64", "/lib")):
        names = os.listdir(directory)
        found += [
            f"{directory}/{name}" for name in names if name.startswith("ld-") and ".so" in name
        ]
    return found


# -- seccomp, capabilities, limits -----------------------------------------------------------

# Architecture by AUDIT_ARCH, then numbers of system calls.
# In this order: ptrace process_vm_readv process_vm_writev mount umount2 pivot_root chroot unshare
# setns bpf userfaultfd perf_event_open keyctl add_key request_key init_module finit_module
# delete_module kexec_load open_by_handle_at io_uring_setup swapon reboot personality.
# fmt: off
_ARCHITECTURES = {
    "x86_64": (
        0xC000003E,
        41,
        (101, 310, 311, 165, 166, 155, 161, 272, 308, 321, 323, 298, 250, 248, 249, 175, 313, 176,
         246, 304, 425, 167, 169, 135),
    ),
    "aarch64": (
        0xC00000B7,
        198,
        (117, 270, 271, 40, 39, 41, 51, 97, 268, 280, 282, 241, 219, 217, 218, 105, 273, 106,
         104, 265, 425, 224, 142, 92),
    ),
}
# fmt: on
_X32 = 0x40000000
_AF_UNIX, _AF_INET, _AF_INET6, _AF_NETLINK = 1, 2, 10, 16
_LOAD, _EQUAL, _AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06
_DENY = 0x00050000 | errno.EPERM
_KILL = 0x80000000
_PERMIT = 0x7FFF0000


def _filter(machine: str, families: list[int]) -> bytes:
    """The seccomp program: deny some system calls, and sockets of other families."""
    architecture, socket_call, denied = _ARCHITECTURES[machine]
    program = [
        (_LOAD, 0, 0, 4),
        (_EQUAL, 1, 0, architecture),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, 0),
        (_AT_LEAST, 0, 1, _X32),
        (_RETURN, 0, 0, _DENY),
    ]
    for number in denied:
        program += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _DENY)]
    program += [(_EQUAL, 1, 0, socket_call), (_RETURN, 0, 0, _PERMIT), (_LOAD, 0, 0, 16)]
    for family in families:
        program += [(_EQUAL, 0, 1, family), (_RETURN, 0, 0, _PERMIT)]
    program.append((_RETURN, 0, 0, _DENY))
    return b"".join(struct.pack("=HBBI", *step) for step in program)


def _filter_calls(policy: dict[str, Any]) -> None:
    """Install the seccomp filter. Raises OSError, KeyError for an unknown architecture."""
    families = [_AF_UNIX]
    if policy["ports"] is None or policy["ports"]:
        families += [_AF_INET, _AF_INET6, _AF_NETLINK]
    code = ctypes.create_string_buffer(_filter(os.uname().machine, families))
    program = struct.pack("@HP", (len(code) - 1) // 8, ctypes.addressof(code))
    buffer = ctypes.create_string_buffer(program)
    _prctl(_PR_SET_SECCOMP, 2, ctypes.addressof(buffer))


def _drop_capabilities(keep: bool) -> None:
    """Give up all capabilities; ``keep`` those that let root read files of others."""
    kept = 1 << 1 | 1 << 2 if keep else 0  # DAC_OVERRIDE, DAC_READ_SEARCH
    for capability in range(64):
        try:
            if not kept >> capability & 1:
                _prctl(_PR_CAPBSET_DROP, capability)
        except OSError:
            break
    header = struct.pack("=Ii", 0x20080522, 0)
    kept_now = kept if os.geteuid() == 0 else 0
    data = struct.pack("=6I", kept_now, kept_now, 0, 0, 0, 0)
    _check(_libc.capset(header, data), "capset")


def _limit(limits: dict[str, int]) -> None:
    for name, value in limits.items():
        number = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(number)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(number, (value, value))


# -- all of it -------------------------------------------------------------------------------


def _confine(policy: dict[str, Any]) -> tuple[list[str], bool]:
    """Confine the process; return what was used, and whether the root is a new one."""
    used = []
    version = _landlock_version()
    _limit(policy["limits"])
    inside = policy["namespaces"] and _succeeds(
        lambda: _enter_namespaces(policy, landlock=version > 0)
    )
    if inside:
        _enter_namespaces(policy, landlock=version > 0)
        used.append("namespaces")
    _drop_capabilities(keep=policy["privileged"])
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    if version:
        _restrict(policy, version)
        used.append(f"Landlock {version}")
    if policy["strict"] and not used:
        _refuse(
            "this system offers neither Landlock nor user namespaces, without which images in "
            "foreign formats are not read: convert it to raw"
        )
    try:
        _filter_calls(policy)
        used.append("seccomp")
    except (OSError, KeyError):
        pass  # the report says so
    return [*used, "no_new_privs", "limits"], inside


def _refuse(words: str) -> NoReturn:
    os.write(2, f"{REPORT}none\n{words}\n".encode())
    os._exit(REFUSED)


def encode(policy: dict[str, Any]) -> str:
    """A policy as an argument for `main`. Text and numbers only: the parent is trusted."""
    return marshal.dumps(policy).hex()


def main(arguments: list[str]) -> NoReturn:
    """Confine, report, and become the command. The first argument is an encoded policy."""
    policy, command = marshal.loads(bytes.fromhex(arguments[0])), arguments[1:]
    parent = policy["parent"]
    os.chdir(policy["root"])
    try:
        used, inside = _confine(policy)
        _prctl(_PR_SET_PDEATHSIG, _SIGKILL)
    except OSError as error:
        _refuse(f"the sandbox could not be set up: {error.strerror}")
    if os.getppid() not in (parent, 0):
        os._exit(REFUSED)  # the parent is gone already, and will not kill us
    if policy["image"]:
        os.set_inheritable(policy["image_fd"], False)
    image = IMAGE if inside else policy["image"]
    command = [word.replace(IMAGE, image) for word in command]
    os.write(2, f"{REPORT}{', '.join(used)}\n".encode())
    try:
        os.execve(policy["program"], command, {**os.environ, "LISTEN_PID": str(os.getpid())})
    except OSError as error:
        os.write(2, f"{policy['program']}: {error.strerror}\n".encode())
        os._exit(REFUSED)
