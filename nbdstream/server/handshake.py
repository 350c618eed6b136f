# SPDX-License-Identifier: Apache-2.0
"""The handshake, from the server's side, without I/O: bytes in, bytes out.

A `Handshake` begins with `greeting`; everything that arrives goes through `receive`,
which returns what to send. When ``outcome`` is set, option haggling is over: `Agreement`
means that the transmission phase begins (with the bytes in ``unconsumed``), `Goodbye`
that the client took its leave. When ``starting_tls`` is set, the replies go out and a TLS
handshake follows; after `secured` everything goes through TLS. A client that breaks the
protocol makes `receive` raise `ProtocolError`, after which the connection cannot be used any more.

The conversation is one generator that asks for an exact number of bytes at a time, so
that it reads from top to bottom like "Fixed newstyle negotiation" in doc/proto.md.
"""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import ClassVar, NamedTuple

from nbdstream.errors import NbdstreamError
from nbdstream.export import Export
from nbdstream.server import options
from nbdstream.server.constants import (
    EXPORT_NAME_REPLY,
    GREETING,
    IHAVEOPT,
    INIT_PASSWD,
    OPTION,
    HandshakeFlag,
    Option,
    OptionReply,
    TransmissionFlag,
)
from nbdstream.server.contexts import MetaContext, list_matches, set_matches
from nbdstream.server.cursor import MalformedError, TooMuchError

# Options in one handshake; a client needs about five.
MAX_OPTIONS = 1024
# Data of an option that is kept in memory: names and queries of any sensible length.
MAX_OPTION_DATA = 64 << 10
# Data of an option that is read and thrown away to answer it properly.
MAX_SKIPPED_DATA = 32 << 20

# An int, because inverting an IntFlag loses the bits that have no name.
_SERVER_FLAGS = int(HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES)


class ProtocolError(NbdstreamError):
    """The client broke the protocol so that the connection cannot go on."""


class Agreement(NamedTuple):
    """What the transmission phase goes by."""

    export: Export
    structured: bool
    contexts: tuple[MetaContext, ...]


@dataclass(frozen=True)
class Goodbye:
    """The client ended the session with NBD_OPT_ABORT."""


Outcome = Agreement | Goodbye
# Yields the number of bytes wanted, is sent exactly so many, returns the outcome.
_Conversation = Generator[int, bytes, Outcome]
_Answer = Callable[["Handshake", int, bytes], Agreement | None]


def find_export(exports: Sequence[Export], name: str) -> Export | None:
    """The export of that name; the empty name also stands for the only export there is."""
    for export in exports:
        if export.name == name:
            return export
    if not name and len(exports) == 1:
        return exports[0]
    return None


def transmission_flags(export: Export, *, structured: bool) -> TransmissionFlag:
    """What the export offers ("Transmission flags")."""
    flags = (
        TransmissionFlag.HAS_FLAGS
        | TransmissionFlag.SEND_FLUSH
        | TransmissionFlag.SEND_FUA
        | TransmissionFlag.SEND_CACHE
        | TransmissionFlag.CAN_MULTI_CONN  # all connections share one disk
    )
    if structured:
        flags |= TransmissionFlag.SEND_DF
    if export.read_only:
        return flags | TransmissionFlag.READ_ONLY
    return (
        flags
        | TransmissionFlag.SEND_TRIM
        | TransmissionFlag.SEND_WRITE_ZEROES
        | TransmissionFlag.SEND_FAST_ZERO
    )


class Tls(Enum):
    """What the server offers of TLS ("Server-side requirements": NOTLS, SELECTIVETLS without
    exports that demand it, FORCEDTLS)."""

    OFF = "off"
    ON = "on"
    REQUIRED = "require"


class Handshake:
    """One client's handshake.

    ``admit`` is called when the client has chosen an export; it returns why it is not
    served now, or "" if it is.
    """

    def __init__(
        self,
        exports: Sequence[Export],
        admit: Callable[[], str] = lambda: "",
        tls: Tls = Tls.OFF,
    ) -> None:
        self.outcome: Outcome | None = None
        self.starting_tls = False
        self._exports = exports
        self._admit = admit
        self._tls = tls
        self._secure = False
        self._structured = False
        self._contexts: tuple[MetaContext, ...] = ()
        self._contexts_export: Export | None = None
        self._input = bytearray()
        self._output = bytearray()
        self._conversation = self._converse()
        self._wanted = next(self._conversation)

    @property
    def unconsumed(self) -> bytes:
        """What arrived after the end of the handshake."""
        return bytes(self._input)

    def greeting(self) -> bytes:
        """What the server sends first."""
        return GREETING.pack(INIT_PASSWD, IHAVEOPT, _SERVER_FLAGS)

    def receive(self, data: bytes) -> bytes:
        """Take what the client sent, in pieces of any size; return what to send to it.

        Raises ProtocolError; there is no way on after that.
        """
        self._input += data
        while not self.outcome and not self.starting_tls and len(self._input) >= self._wanted:
            piece = bytes(self._input[: self._wanted])
            del self._input[: self._wanted]
            try:
                self._wanted = self._conversation.send(piece)
            except StopIteration as end:
                self.outcome = end.value
        if self.starting_tls and self._input:
            # Never to be taken for what comes through TLS: an attacker on the way may have sent it.
            raise ProtocolError("data in clear behind NBD_OPT_STARTTLS")
        output = bytes(self._output)
        self._output.clear()
        return output

    def secured(self) -> None:
        """The TLS handshake is done. What was negotiated in clear is forgotten."""
        self.starting_tls = False
        self._secure = True
        self._structured = False
        self._contexts, self._contexts_export = (), None

    def _converse(self) -> _Conversation:
        client_flags = int.from_bytes((yield 4), "big")
        if client_flags & ~_SERVER_FLAGS:
            raise ProtocolError(f"unknown client flags {client_flags:#x} in the handshake")
        no_zeroes = bool(client_flags & HandshakeFlag.NO_ZEROES)
        for _ in range(MAX_OPTIONS):
            magic, option, length = OPTION.unpack((yield OPTION.size))
            if magic != IHAVEOPT:
                raise ProtocolError(f"bad magic {magic:#x} instead of an option")
            if length > MAX_SKIPPED_DATA:
                raise ProtocolError(f"option {option} with {length} bytes of data")
            if length > MAX_OPTION_DATA:
                yield from _skip(length)
                outcome = self._answer_long(option, length)
            elif option == Option.EXPORT_NAME:
                outcome = self._export_name((yield length) if length else b"", no_zeroes)
            else:
                outcome = self._answer(option, (yield length) if length else b"")
            if outcome:
                return outcome
        raise ProtocolError(f"more than {MAX_OPTIONS} options")

    def _answer(self, option: int, data: bytes) -> Outcome | None:
        """Answer an option other than NBD_OPT_EXPORT_NAME; the outcome if it ends here."""
        if self._wants_tls_before(option):
            self._reply(
                option, OptionReply.ERR_TLS_REQD, "this server wants NBD_OPT_STARTTLS first"
            )
            return Goodbye() if option == Option.ABORT else None
        if option == Option.ABORT:
            # "a server SHOULD ignore any data sent by the client"
            self._reply(option, OptionReply.ACK)
            return Goodbye()
        if option == Option.STARTTLS and self._tls is Tls.OFF:
            self._reply(option, OptionReply.ERR_POLICY, "TLS is not configured")
            return None
        answer = self._ANSWERS.get(option)
        if answer is None:
            self._reply(option, OptionReply.ERR_UNSUP, f"option {option} is not supported")
            return None
        try:
            return answer(self, option, data)
        except TooMuchError as error:
            self._reply(option, OptionReply.ERR_TOO_BIG, str(error))
            return None
        except MalformedError as error:
            self._reply(option, OptionReply.ERR_INVALID, f"malformed option: {error}")
            return None

    def _wants_tls_before(self, option: int) -> bool:
        secure = self._secure or self._tls is not Tls.REQUIRED
        return not secure and option != Option.STARTTLS

    def _export_name(self, data: bytes, no_zeroes: bool) -> Agreement:
        if self._wants_tls_before(Option.EXPORT_NAME):
            raise ProtocolError("it chose an export in clear, and this server wants TLS")
        try:
            name = options.parse_export_name(data)
        except MalformedError as error:
            raise ProtocolError(f"malformed export name: {error}") from error
        export = find_export(self._exports, name)
        # This option has no reply for errors: the session must end.
        if export is None:
            raise ProtocolError(f"no export is named {name!r}")
        if refusal := self._admit():
            raise ProtocolError(refusal)
        flags = transmission_flags(export, structured=self._structured)
        self._output += EXPORT_NAME_REPLY.pack(export.size, flags)
        if not no_zeroes:
            self._output += bytes(124)
        return self._agree(export)

    def _list(self, option: int, data: bytes) -> None:
        _expect_no_data(data)
        for export in self._exports:
            self._output += options.server_reply(option, export)
        self._reply(option, OptionReply.ACK)

    def _structured_reply(self, option: int, data: bytes) -> None:
        _expect_no_data(data)
        self._structured = True
        self._reply(option, OptionReply.ACK)

    def _info(self, option: int, data: bytes) -> Agreement | None:
        """NBD_OPT_INFO and NBD_OPT_GO."""
        request = options.parse_info(data)
        export = self._known_export(option, request.name)
        if export is None:
            return None
        if option == Option.GO and (refusal := self._admit()):
            self._reply(option, OptionReply.ERR_POLICY, refusal)
            return None
        flags = transmission_flags(export, structured=self._structured)
        self._output += options.info_replies(option, export, flags, request.infos)
        self._reply(option, OptionReply.ACK)
        return self._agree(export) if option == Option.GO else None

    def _list_contexts(self, option: int, data: bytes) -> None:
        request = options.parse_contexts(data)
        if self._contexts_allowed(option) and self._known_export(option, request.name):
            for context in list_matches(request.queries):
                # "The metadata context ID in these replies ... SHOULD be set to zero".
                self._output += options.context_reply(option, context._replace(id=0))
            self._reply(option, OptionReply.ACK)

    def _set_contexts(self, option: int, data: bytes) -> None:
        # "replaces all previously-set metadata contexts (including when this command fails)"
        self._contexts, self._contexts_export = (), None
        request = options.parse_contexts(data)
        if not self._contexts_allowed(option):
            return
        export = self._known_export(option, request.name)
        if export is None:
            return
        self._contexts, self._contexts_export = tuple(set_matches(request.queries)), export
        for context in self._contexts:
            self._output += options.context_reply(option, context)
        self._reply(option, OptionReply.ACK)

    def _start_tls(self, option: int, data: bytes) -> None:
        _expect_no_data(data)
        if self._secure:
            raise MalformedError("TLS has been started already")
        self._reply(option, OptionReply.ACK)
        self.starting_tls = True

    _ANSWERS: ClassVar[dict[int, _Answer]] = {
        Option.LIST: _list,
        Option.INFO: _info,
        Option.GO: _info,
        Option.STARTTLS: _start_tls,
        Option.STRUCTURED_REPLY: _structured_reply,
        Option.LIST_META_CONTEXT: _list_contexts,
        Option.SET_META_CONTEXT: _set_contexts,
    }

    def _agree(self, export: Export) -> Agreement:
        # Contexts count only for the export that they were chosen for.
        contexts = self._contexts if self._contexts_export is export else ()
        return Agreement(export, self._structured, contexts)

    def _known_export(self, option: int, name: str) -> Export | None:
        """The export, or None after an error reply."""
        export = find_export(self._exports, name)
        if export is None:
            self._reply(option, OptionReply.ERR_UNKNOWN, f"no export is named {name[:256]!r}")
        return export

    def _contexts_allowed(self, option: int) -> bool:
        if not self._structured:
            message = "metadata contexts need structured replies"
            self._reply(option, OptionReply.ERR_INVALID, message)
        return self._structured

    def _answer_long(self, option: int, length: int) -> Outcome | None:
        """Answer an option whose data was too long to be kept."""
        if option == Option.EXPORT_NAME:
            raise ProtocolError(f"an export name of {length} bytes")
        if self._ANSWERS.get(option) is None or self._wants_tls_before(option):
            return self._answer(option, b"")
        if option == Option.SET_META_CONTEXT:
            self._contexts, self._contexts_export = (), None
        message = f"{length} bytes of data; at most {MAX_OPTION_DATA} are accepted"
        self._reply(option, OptionReply.ERR_TOO_BIG, message)
        return None

    def _reply(self, option: int, kind: OptionReply, message: str = "") -> None:
        self._output += options.reply(option, kind, message.encode())


def _skip(length: int) -> Generator[int, bytes, None]:
    """Have ``length`` bytes thrown away, a few at a time."""
    while length:
        length -= len((yield min(length, MAX_OPTION_DATA)))


def _expect_no_data(data: bytes) -> None:
    if data:
        raise MalformedError(f"{len(data)} bytes of data where none belong")
