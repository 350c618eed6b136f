# SPDX-License-Identifier: Apache-2.0
"""A request of the transmission phase, and whether it makes sense ("Request types").

`refusal` is the only place that judges requests; what it lets pass keeps the promises
that `Export` is given: a range that is non-empty and within the export.
"""

from typing import NamedTuple

from nbdstream.server.constants import MAX_PAYLOAD, Command, CommandFlag, Error
from nbdstream.server.handshake import Agreement


class Request(NamedTuple):
    """The fields of the header. ``command`` may be a number that is no `Command`."""

    flags: int
    command: int
    cookie: int
    offset: int
    length: int


class Refusal(NamedTuple):
    """An error for the client; ``offset`` where it is about one place in the range."""

    error: Error
    message: str
    offset: int | None = None


# As ints, because inverting an IntFlag loses the bits that have no name.
_KNOWN_FLAGS: dict[int, int] = {
    # FUA is "valid for all commands"; it means nothing to those that write nothing.
    Command.READ: int(CommandFlag.FUA | CommandFlag.DF),
    Command.WRITE: int(CommandFlag.FUA),
    Command.FLUSH: int(CommandFlag.FUA),
    Command.TRIM: int(CommandFlag.FUA),
    Command.CACHE: int(CommandFlag.FUA),
    Command.WRITE_ZEROES: int(CommandFlag.FUA | CommandFlag.NO_HOLE | CommandFlag.FAST_ZERO),
    Command.BLOCK_STATUS: int(CommandFlag.FUA | CommandFlag.REQ_ONE),
}
_CHANGING = (Command.WRITE, Command.TRIM, Command.WRITE_ZEROES)


def is_change(request: Request) -> bool:
    """Whether the request would change the disk, or waits for changes to be durable."""
    return request.command in _CHANGING or request.command == Command.FLUSH


def describe(request: Request) -> str:
    """The request as a message names it: its command, length and offset."""
    try:
        name = f"NBD_CMD_{Command(request.command).name}"
    except ValueError:
        name = f"command {request.command}"
    return f"{name} of {request.length} bytes at offset {request.offset}"


def refusal(request: Request, agreement: Agreement) -> Refusal | None:
    """Why the request cannot be served at all, or None."""
    found = _refusal(request, agreement)
    if found is None:
        return None
    return found._replace(message=f"{describe(request)}: {found.message}")


def _refusal(request: Request, agreement: Agreement) -> Refusal | None:
    known_flags = _KNOWN_FLAGS.get(request.command)
    if known_flags is None:
        return Refusal(Error.EINVAL, "there is no such command")
    if request.command == Command.READ and not agreement.structured:
        known_flags &= ~int(CommandFlag.DF)
    if unknown := request.flags & ~known_flags:
        return Refusal(Error.EINVAL, f"the command has no flags {unknown:#x}")
    if request.command in _CHANGING and agreement.export.read_only:
        return Refusal(Error.EPERM, "the export is read-only")
    if request.command == Command.FLUSH:
        if request.offset or request.length:
            return Refusal(Error.EINVAL, "a flush has neither offset nor length")
        return None
    if request.command == Command.BLOCK_STATUS and not agreement.contexts:
        return Refusal(Error.EINVAL, "no metadata context was negotiated")
    return _range_refusal(request, agreement)


def _range_refusal(request: Request, agreement: Agreement) -> Refusal | None:
    size = agreement.export.size
    if request.length == 0:
        return Refusal(Error.EINVAL, "the length is 0")
    if request.offset + request.length > size:
        beyond = request.command in (Command.WRITE, Command.WRITE_ZEROES)
        return Refusal(
            Error.ENOSPC if beyond else Error.EINVAL,
            f"this is beyond the end of the export, which has {size} bytes",
            max(request.offset, size),
        )
    if request.command in (Command.READ, Command.WRITE) and request.length > MAX_PAYLOAD:
        # "The server SHOULD NOT return NBD_EOVERFLOW except ... in response to
        # NBD_CMD_READ when NBD_CMD_FLAG_DF is supported".
        overflow = request.command == Command.READ and agreement.structured
        return Refusal(
            Error.EOVERFLOW if overflow else Error.EINVAL,
            f"the maximum payload is {MAX_PAYLOAD} bytes",
        )
    return None
