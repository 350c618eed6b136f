# SPDX-License-Identifier: Apache-2.0
"""NBD_OPT_STARTTLS in the handshake, without I/O."""

import pytest

from nbdstream.server.constants import (
    OPTION_REPLY,
    Option,
    OptionReply,
)
from nbdstream.server.handshake import Goodbye, Handshake, ProtocolError, Tls
from tests.memory_export import MemoryExport
from tests.server_support import (
    context_data,
    info_data,
    option,
)

MIB = 1 << 20
FLAGS = (3).to_bytes(4, "big")


def answer(handshake: Handshake, data: bytes) -> int:
    """The type of the one reply."""
    output = handshake.receive(data)
    _, _, kind, length = OPTION_REPLY.unpack_from(output)
    assert len(output) == OPTION_REPLY.size + length
    return int(kind)


def shaking(tls: Tls) -> Handshake:
    handshake = Handshake([MemoryExport(4096)], tls=tls)
    handshake.receive(FLAGS)
    return handshake


def test_without_tls_the_option_is_refused_by_policy() -> None:
    handshake = shaking(Tls.OFF)
    assert answer(handshake, option(Option.STARTTLS)) == OptionReply.ERR_POLICY
    assert not handshake.starting_tls


@pytest.mark.parametrize(
    "asked",
    [
        option(Option.LIST),
        option(Option.INFO, info_data(b"")),
        option(Option.GO, info_data(b"")),
        option(Option.STRUCTURED_REPLY),
        option(Option.LIST_META_CONTEXT, context_data(b"")),
        option(Option.SET_META_CONTEXT, context_data(b"", b"base:allocation")),
        option(Option.LIST, b"not empty"),
        option(Option.GO, bytes(100_000)),
        option(99, b"unknown"),
    ],
)
def test_where_tls_is_required_nothing_else_is_answered(asked: bytes) -> None:
    handshake = shaking(Tls.REQUIRED)
    assert answer(handshake, asked) == OptionReply.ERR_TLS_REQD
    assert answer(handshake, option(Option.STARTTLS)) == OptionReply.ACK
    assert handshake.starting_tls


def test_where_tls_is_required_an_export_chosen_in_clear_ends_the_session() -> None:
    with pytest.raises(ProtocolError, match="TLS"):
        shaking(Tls.REQUIRED).receive(option(Option.EXPORT_NAME))


def test_where_tls_is_required_a_client_can_still_leave() -> None:
    handshake = shaking(Tls.REQUIRED)
    assert answer(handshake, option(Option.ABORT)) == OptionReply.ERR_TLS_REQD
    assert isinstance(handshake.outcome, Goodbye)


@pytest.mark.parametrize("tls", [Tls.ON, Tls.REQUIRED])
def test_what_is_sent_in_clear_behind_the_option_is_never_taken_for_secure(tls: Tls) -> None:
    with pytest.raises(ProtocolError, match="clear"):
        shaking(tls).receive(option(Option.STARTTLS) + option(Option.LIST))


@pytest.mark.parametrize("tls", [Tls.ON, Tls.REQUIRED])
def test_the_option_has_no_data_and_comes_once(tls: Tls) -> None:
    handshake = shaking(tls)
    assert answer(handshake, option(Option.STARTTLS, b"x")) == OptionReply.ERR_INVALID
    assert answer(handshake, option(Option.STARTTLS, bytes(100_000))) == OptionReply.ERR_TOO_BIG
    assert not handshake.starting_tls
    assert answer(handshake, option(Option.STARTTLS)) == OptionReply.ACK
    handshake.secured()
    assert answer(handshake, option(Option.STARTTLS)) == OptionReply.ERR_INVALID
    assert answer(handshake, option(Option.STRUCTURED_REPLY)) == OptionReply.ACK


def test_what_was_negotiated_in_clear_is_forgotten() -> None:
    handshake = shaking(Tls.ON)
    handshake.receive(option(Option.STRUCTURED_REPLY))
    handshake.receive(option(Option.SET_META_CONTEXT, context_data(b"", b"base:allocation")))
    handshake.receive(option(Option.STARTTLS))
    handshake.secured()
    contexts = option(Option.SET_META_CONTEXT, context_data(b"", b"base:allocation"))
    assert answer(handshake, contexts) == OptionReply.ERR_INVALID
    handshake.receive(option(Option.GO, info_data(b"")))
    assert handshake.outcome is not None and not isinstance(handshake.outcome, Goodbye)
    assert not handshake.outcome.structured and not handshake.outcome.contexts
