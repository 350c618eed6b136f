# SPDX-License-Identifier: Apache-2.0
"""The handshake from the client's side: `Handshake` takes any bytes, cut anywhere.

Accepts, or raises ProtocolError. Every reply parses, answers an option that was sent, and ends
with one ACK or error for each; how the bytes are cut makes no difference. Where TLS is required,
nothing but that is answered before it, and no export is given.
"""

import struct
from collections.abc import Iterator

from fuzz.export import PatternExport
from fuzz.source import Source
from fuzz.target import Target
from nbdstream.server.constants import (
    IHAVEOPT,
    INFO_BLOCK_SIZE,
    INFO_EXPORT,
    OPTION,
    OPTION_REPLY,
    OPTION_REPLY_MAGIC,
    Info,
    Option,
    OptionReply,
)
from nbdstream.server.handshake import Agreement, Handshake, ProtocolError, Tls

EXPORTS = (PatternExport(1 << 20), PatternExport(12345, name="über", read_only=True))


def _stream(source: Source) -> bytes:
    """What the client sends: bytes as they are, or options with headers that are right."""
    if source.flag():
        return source.rest()
    flags = source.byte() % 4
    parts = [flags.to_bytes(4, "big")]
    while source.left:
        option = source.byte() % 16
        data = source.take(source.byte())
        parts.append(OPTION.pack(IHAVEOPT, option, len(data)) + data)
    return b"".join(parts)


def _feed(stream: bytes, pieces: Iterator[bytes]) -> tuple[Handshake, bytes, str]:
    handshake = Handshake(EXPORTS)
    assert len(handshake.greeting()) == 18
    output = b""
    error = ""
    for piece in pieces:
        try:
            output += handshake.receive(piece)
        except ProtocolError as broken:
            error = str(broken)
            break
        if handshake.outcome:
            break
    return handshake, output, error


def run(data: bytes) -> object:
    source = Source(data)
    seed = source.take(8)
    stream = _stream(source)
    required = _before_tls(stream, Source(seed).pieces(stream))
    whole, output, error = _feed(stream, iter([stream]))
    if isinstance(whole.outcome, Agreement):
        assert stream.endswith(whole.unconsumed)
    cut, cut_output, cut_error = _feed(stream, Source(seed).pieces(stream))
    # What was answered before the protocol was broken is only sent if it was taken before.
    assert output == cut_output if not error else cut_output.startswith(output)
    assert (whole.outcome, error) == (cut.outcome, cut_error)
    taken = stream.removesuffix(whole.unconsumed) if whole.outcome else stream
    _check_replies(taken, cut_output, whole)
    return output, repr(whole.outcome), error, required


def _before_tls(stream: bytes, pieces: Iterator[bytes]) -> object:
    """What a server that requires TLS says to the same client, until TLS starts."""
    handshake = Handshake(EXPORTS, tls=Tls.REQUIRED)
    output = b""
    try:
        for piece in pieces:
            output += handshake.receive(piece)
            if handshake.outcome or handshake.starting_tls:
                break
    except ProtocolError as broken:
        return str(broken)
    assert not isinstance(handshake.outcome, Agreement)
    for option in _options(stream):
        if not output:
            break
        _, answered, kind, length = OPTION_REPLY.unpack_from(output)
        output = output[OPTION_REPLY.size + length :]
        started = option == Option.STARTTLS and kind in (OptionReply.ACK, OptionReply.ERR_INVALID)
        assert answered == option and (started or kind == OptionReply.ERR_TLS_REQD)
    assert not output
    return handshake.starting_tls


def _check_replies(stream: bytes, output: bytes, handshake: Handshake) -> None:
    """Each reply is for the option that is due, and the last one of each says how it ended."""
    at = 0
    for option in _options(stream):
        if option == Option.EXPORT_NAME:
            if isinstance(handshake.outcome, Agreement):
                assert len(output) - at in (10, 134)
                at = len(output)
            break
        while at < len(output):
            magic, answered, kind, length = OPTION_REPLY.unpack_from(output, at)
            assert magic == OPTION_REPLY_MAGIC and answered == option
            payload = output[at + OPTION_REPLY.size :][:length]
            assert len(payload) == length
            at += OPTION_REPLY.size + length
            if kind == OptionReply.INFO:
                _check_info(payload)
            elif kind >> 31:
                payload.decode()
            if kind == OptionReply.ACK or kind >> 31:
                OptionReply(kind)
                break
    assert at == len(output)


def _check_info(payload: bytes) -> None:
    kind = int.from_bytes(payload[:2], "big")
    if kind == Info.EXPORT:
        assert INFO_EXPORT.unpack(payload)[1] in (export.size for export in EXPORTS)
    elif kind == Info.BLOCK_SIZE:
        _, least, preferred, most = INFO_BLOCK_SIZE.unpack(payload)
        assert 0 < least <= preferred <= most
    else:
        payload[2:].decode()


def _options(stream: bytes) -> Iterator[int]:
    """The options in what the client sent, as far as they are whole."""
    at = 4
    while at + OPTION.size <= len(stream):
        _, option, length = OPTION.unpack_from(stream, at)
        at += OPTION.size + length
        if at > len(stream):
            return
        yield option


def _option(option: int, data: bytes = b"") -> bytes:
    return OPTION.pack(IHAVEOPT, option, len(data)) + data


def _name(name: str) -> bytes:
    return struct.pack(">I", len(name.encode())) + name.encode()


def seeds() -> Iterator[bytes]:
    raw = bytes(8) + b"\1"
    contexts = struct.pack(">I", 2) + _name("base:allocation") + _name("qemu:")
    asked = struct.pack(">HHHH", 3, Info.NAME, Info.DESCRIPTION, Info.BLOCK_SIZE)
    talk = [
        _option(Option.STRUCTURED_REPLY),
        _option(Option.LIST),
        _option(Option.LIST_META_CONTEXT, _name("disk") + contexts),
        _option(Option.SET_META_CONTEXT, _name("disk") + contexts),
        _option(Option.INFO, _name("nothing") + asked),
        _option(Option.STARTTLS),
    ]
    start = raw + struct.pack(">I", 3) + b"".join(talk)
    yield start + _option(Option.GO, _name("disk") + asked) + b"and then"
    yield start + _option(Option.ABORT)
    yield raw + struct.pack(">I", 3) + _option(Option.LIST) + _option(Option.STARTTLS)
    yield raw + struct.pack(">I", 1) + _option(Option.EXPORT_NAME, "über".encode())
    yield raw + struct.pack(">I", 1) + _option(Option.GO, _name("über") + bytes(2))
    yield b"\1\1\1\1\1\1\1\1\0\3" + b"\10\0\3\0\7\6\0\0\0\0\0\0"


TARGET = Target("handshake", run, (), seeds, longest=1024)
