# SPDX-License-Identifier: Apache-2.0
"""The data of handshake options, and the replies to them, as bytes.

Parsers take the option's data as received and raise `MalformedError` if its layout is
not the one that "Option types" gives; they hold no state and know no export.
"""

from typing import NamedTuple

from nbdstream.export import Export
from nbdstream.server.constants import (
    INFO_BLOCK_SIZE,
    INFO_EXPORT,
    MAX_PAYLOAD,
    OPTION_REPLY,
    OPTION_REPLY_MAGIC,
    Info,
    OptionReply,
    TransmissionFlag,
)
from nbdstream.server.contexts import MetaContext
from nbdstream.server.cursor import Cursor

# There are four kinds of information, and three metadata contexts; clients may ask for what
# we do not know, but more than this would keep the event loop busy for nothing.
MAX_INFOS = 256
MAX_QUERIES = 256


class InfoRequest(NamedTuple):
    """NBD_OPT_INFO and NBD_OPT_GO. Unknown kinds of information are left in the list."""

    name: str
    infos: frozenset[int]


class ContextRequest(NamedTuple):
    """NBD_OPT_LIST_META_CONTEXT and NBD_OPT_SET_META_CONTEXT."""

    name: str
    queries: list[str]


def parse_export_name(data: bytes) -> str:
    """NBD_OPT_EXPORT_NAME: nothing but the name."""
    return Cursor(data).string(len(data))


def parse_info(data: bytes) -> InfoRequest:
    """32 bits length of the name, the name, 16 bits count, so many 16-bit kinds."""
    cursor = Cursor(data)
    name = cursor.string(cursor.u32())
    count = cursor.room_for(cursor.u16(), 2, MAX_INFOS, "kinds of information")
    infos = frozenset(cursor.u16() for _ in range(count))
    cursor.finish()
    return InfoRequest(name, infos)


def parse_contexts(data: bytes) -> ContextRequest:
    """32 bits length of the name, the name, 32 bits count, so many queries, each 32 bits
    length and a string."""
    cursor = Cursor(data)
    name = cursor.string(cursor.u32())
    count = cursor.room_for(cursor.u32(), 4, MAX_QUERIES, "queries")
    queries = [cursor.string(cursor.u32()) for _ in range(count)]
    cursor.finish()
    return ContextRequest(name, queries)


def reply(option: int, kind: OptionReply, data: bytes = b"") -> bytes:
    """One option reply message."""
    return OPTION_REPLY.pack(OPTION_REPLY_MAGIC, option, kind, len(data)) + data


def server_reply(option: int, export: Export) -> bytes:
    """NBD_REP_SERVER: one export of a list."""
    name = export.name.encode()
    data = len(name).to_bytes(4, "big") + name + export.description.encode()
    return reply(option, OptionReply.SERVER, data)


def context_reply(option: int, context: MetaContext) -> bytes:
    """NBD_REP_META_CONTEXT."""
    data = context.id.to_bytes(4, "big") + context.name.encode()
    return reply(option, OptionReply.META_CONTEXT, data)


def info_replies(
    option: int, export: Export, flags: TransmissionFlag, infos: frozenset[int]
) -> bytes:
    """NBD_REP_INFO, once for each kind: size and flags, the block sizes, and the texts
    that were asked for."""
    found = [
        INFO_EXPORT.pack(Info.EXPORT, export.size, flags),
        # Any alignment is accepted, so a client that did not ask for it loses nothing.
        INFO_BLOCK_SIZE.pack(Info.BLOCK_SIZE, 1, export.preferred_block_size, MAX_PAYLOAD),
    ]
    for kind, text in ((Info.NAME, export.name), (Info.DESCRIPTION, export.description)):
        if kind in infos:
            found.append(kind.to_bytes(2, "big") + text.encode())
    return b"".join(reply(option, OptionReply.INFO, data) for data in found)
