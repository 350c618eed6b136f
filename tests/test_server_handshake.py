# SPDX-License-Identifier: Apache-2.0
"""The handshake without I/O: every option, every refusal, in pieces of every size."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdstream.server.constants import (
    EXPORT_NAME_REPLY,
    GREETING,
    IHAVEOPT,
    INIT_PASSWD,
    MAX_PAYLOAD,
    OPTION,
    OPTION_REPLY,
    OPTION_REPLY_MAGIC,
    Info,
    Option,
    OptionReply,
    TransmissionFlag,
)
from nbdstream.server.contexts import CONTEXTS
from nbdstream.server.handshake import (
    MAX_OPTION_DATA,
    MAX_SKIPPED_DATA,
    Agreement,
    Goodbye,
    Handshake,
    ProtocolError,
)
from tests.memory_export import MemoryExport
from tests.server_support import context_data, info_data, option

DISK = MemoryExport(1 << 20)
OTHER = MemoryExport(4096, name="other", read_only=True)
FLAGS = (3).to_bytes(4, "big")  # fixed newstyle, no zeroes
STRUCTURED = option(Option.STRUCTURED_REPLY)


def replies(data: bytes) -> list[tuple[int, int, bytes]]:
    """Option replies taken apart: (option, type, data)."""
    found = []
    while data:
        magic, kind, reply, length = OPTION_REPLY.unpack_from(data)
        assert magic == OPTION_REPLY_MAGIC
        end = OPTION_REPLY.size + length
        assert len(data) >= end
        found.append((kind, reply, data[OPTION_REPLY.size : end]))
        data = data[end:]
    return found


def ask(
    *options: bytes, exports: tuple[MemoryExport, ...] = (DISK,)
) -> list[tuple[int, int, bytes]]:
    """The replies to the last option of a session."""
    handshake = Handshake(exports)
    output = handshake.receive(FLAGS)
    for one in options:
        output = handshake.receive(one)
    return replies(output)


def agree(*options: bytes, exports: tuple[MemoryExport, ...] = (DISK,)) -> Agreement:
    """What a session agrees on."""
    handshake = Handshake(exports)
    handshake.receive(FLAGS + b"".join(options))
    assert isinstance(handshake.outcome, Agreement)
    return handshake.outcome


def test_greeting_offers_fixed_newstyle_and_no_zeroes() -> None:
    assert Handshake([DISK]).greeting() == GREETING.pack(INIT_PASSWD, IHAVEOPT, 3)


SESSION = (
    FLAGS
    + option(Option.LIST)
    + STRUCTURED
    + option(99, b"whatever this is")
    + option(Option.SET_META_CONTEXT, context_data(b"disk", b"base:allocation"))
    + option(Option.INFO, info_data(b"disk", Info.DESCRIPTION))
    + option(Option.GO, info_data(b"", Info.NAME, Info.BLOCK_SIZE))
)


def test_a_session_is_the_same_whole_and_byte_by_byte_and_keeps_what_follows() -> None:
    whole = Handshake([DISK])
    output = whole.receive(SESSION + b"next")
    assert whole.outcome == Agreement(DISK, True, CONTEXTS[:1])
    assert whole.unconsumed == b"next"

    slow = Handshake([DISK])
    pieces = []
    for index in range(len(SESSION)):
        assert slow.outcome is None
        pieces.append(slow.receive(SESSION[index : index + 1]))
    assert b"".join(pieces) == output
    assert slow.outcome == whole.outcome
    assert slow.unconsumed == b""


def test_go_tells_size_flags_block_sizes_and_what_was_asked_for() -> None:
    found = ask(STRUCTURED, option(Option.GO, info_data(b"disk", Info.NAME, Info.DESCRIPTION, 77)))
    infos = {int.from_bytes(data[:2], "big"): data[2:] for _, kind, data in found[:-1]}
    assert {kind for _, kind, _ in found[:-1]} == {OptionReply.INFO}
    assert found[-1] == (Option.GO, OptionReply.ACK, b"")
    size, flags = EXPORT_NAME_REPLY.unpack(infos[Info.EXPORT])
    assert size == DISK.size
    assert TransmissionFlag(flags) == (
        TransmissionFlag.HAS_FLAGS
        | TransmissionFlag.SEND_FLUSH
        | TransmissionFlag.SEND_FUA
        | TransmissionFlag.SEND_TRIM
        | TransmissionFlag.SEND_WRITE_ZEROES
        | TransmissionFlag.SEND_DF
        | TransmissionFlag.CAN_MULTI_CONN
        | TransmissionFlag.SEND_CACHE
        | TransmissionFlag.SEND_FAST_ZERO
    )
    sizes = infos[Info.BLOCK_SIZE]
    assert [int.from_bytes(sizes[i : i + 4], "big") for i in (0, 4, 8)] == [1, 4096, MAX_PAYLOAD]
    assert infos[Info.NAME] == b"disk"
    assert infos[Info.DESCRIPTION] == DISK.description.encode()


def test_df_is_not_offered_without_structured_replies() -> None:
    data = ask(option(Option.INFO, info_data(b"disk")))[0][2]
    assert not TransmissionFlag.SEND_DF & int.from_bytes(data[10:12], "big")


def test_a_read_only_export_says_so_and_offers_no_changes() -> None:
    data = ask(option(Option.INFO, info_data(b"other")), exports=(DISK, OTHER))[0][2]
    flags = TransmissionFlag(int.from_bytes(data[10:12], "big"))
    assert TransmissionFlag.READ_ONLY in flags
    assert not flags & (
        TransmissionFlag.SEND_TRIM
        | TransmissionFlag.SEND_WRITE_ZEROES
        | TransmissionFlag.SEND_FAST_ZERO
    )


def test_info_does_not_end_the_haggling() -> None:
    handshake = Handshake([DISK])
    handshake.receive(FLAGS + option(Option.INFO, info_data(b"disk")))
    assert handshake.outcome is None


def test_list_names_every_export() -> None:
    found = ask(option(Option.LIST), exports=(DISK, OTHER))
    names = [data[4 : 4 + int.from_bytes(data[:4], "big")] for _, _, data in found[:-1]]
    assert names == [b"disk", b"other"]
    assert found[0][2].endswith(DISK.description.encode())
    assert found[-1][1] == OptionReply.ACK


def test_the_empty_name_is_the_only_export_but_not_one_of_several() -> None:
    assert agree(option(Option.GO, info_data(b""))).export is DISK
    [(_, kind, _)] = ask(option(Option.GO, info_data(b"")), exports=(DISK, OTHER))
    assert kind == OptionReply.ERR_UNKNOWN


def test_an_unknown_name_is_refused_and_the_haggling_goes_on() -> None:
    handshake = Handshake([DISK])
    handshake.receive(FLAGS)
    [(_, kind, message)] = replies(handshake.receive(option(Option.GO, info_data(b"desk"))))
    assert kind == OptionReply.ERR_UNKNOWN
    assert b"desk" in message
    handshake.receive(option(Option.GO, info_data(b"disk")))
    assert isinstance(handshake.outcome, Agreement)


@pytest.mark.parametrize(("client_flags", "zeroes"), [(3, 0), (1, 124)])
def test_export_name_ends_the_haggling_with_or_without_zeroes(
    client_flags: int, zeroes: int
) -> None:
    handshake = Handshake([DISK])
    output = handshake.receive(client_flags.to_bytes(4, "big") + option(1, b"disk"))
    assert len(output) == EXPORT_NAME_REPLY.size + zeroes
    assert EXPORT_NAME_REPLY.unpack_from(output)[0] == DISK.size
    assert handshake.outcome == Agreement(DISK, False, ())


@pytest.mark.parametrize("name", [b"desk", b"\xff", b"di\0sk", bytes(5000), bytes(100_000)])
def test_an_export_name_that_does_not_exist_ends_the_session(name: bytes) -> None:
    with pytest.raises(ProtocolError):
        Handshake([DISK]).receive(FLAGS + option(Option.EXPORT_NAME, name))


@pytest.mark.parametrize("data", [b"", b"is ignored", bytes(MAX_OPTION_DATA + 1)])
def test_abort_is_acknowledged(data: bytes) -> None:
    handshake = Handshake([DISK])
    handshake.receive(FLAGS)
    assert replies(handshake.receive(option(Option.ABORT, data))) == [
        (Option.ABORT, OptionReply.ACK, b"")
    ]
    assert handshake.outcome == Goodbye()


@pytest.mark.parametrize("kind", [0, 4, 11, 2**32 - 1])
@pytest.mark.parametrize("length", [0, 20, MAX_OPTION_DATA + 1])
def test_unknown_options_are_unsupported_and_their_data_is_skipped(kind: int, length: int) -> None:
    handshake = Handshake([DISK])
    output = handshake.receive(FLAGS + option(kind, bytes(length)) + option(Option.LIST))
    found = replies(output)
    assert found[0][:2] == (kind, OptionReply.ERR_UNSUP)
    assert found[-1] == (Option.LIST, OptionReply.ACK, b"")


@pytest.mark.parametrize(
    ("kind", "data"),
    [
        (Option.LIST, b"x"),
        (Option.STRUCTURED_REPLY, b"x"),
        (Option.GO, b""),
        (Option.GO, b"\0\0\0"),
        (Option.GO, b"\xff\xff\xff\xffdisk\0\0"),
        (Option.GO, info_data(b"disk")[:-1]),
        (Option.GO, info_data(b"disk") + b"x"),
        (Option.GO, info_data(b"disk")[:-2] + b"\xff\xff"),
        (Option.GO, info_data(b"\xff\xfe")),
        (Option.GO, info_data(b"di\0sk")),
        (Option.GO, info_data(b"d" * 4097)),
        (Option.INFO, b"\0\0\0\5disk\0\0"),
        (Option.LIST_META_CONTEXT, b"\0\0\0\4disk\xff\xff\xff\xff"),
        (Option.LIST_META_CONTEXT, context_data(b"disk", b"base:") + b"x"),
        (Option.SET_META_CONTEXT, context_data(b"disk", b"base:" + b"x" * 4096)),
        (Option.SET_META_CONTEXT, context_data(b"disk", b"base:allocation")[:-1]),
    ],
)
def test_malformed_options_are_invalid_and_the_haggling_goes_on(kind: int, data: bytes) -> None:
    handshake = Handshake([DISK])
    handshake.receive(FLAGS + (b"" if kind == Option.STRUCTURED_REPLY else STRUCTURED))
    [(answered, reply, _)] = replies(handshake.receive(option(kind, data)))
    assert (answered, reply) == (kind, OptionReply.ERR_INVALID)
    handshake.receive(option(Option.GO, info_data(b"disk")))
    assert isinstance(handshake.outcome, Agreement)


def test_options_too_long_to_keep_are_too_big() -> None:
    queries = [b"x-%d:y" % number for number in range(10_000)]
    [(_, kind, _)] = ask(
        STRUCTURED, option(Option.SET_META_CONTEXT, context_data(b"disk", *queries))
    )
    assert kind == OptionReply.ERR_TOO_BIG


def test_options_of_absurd_length_end_the_session_before_they_arrive() -> None:
    header = OPTION.pack(IHAVEOPT, Option.GO, MAX_SKIPPED_DATA + 1)
    with pytest.raises(ProtocolError, match=str(MAX_SKIPPED_DATA + 1)):
        Handshake([DISK]).receive(FLAGS + header)


@pytest.mark.parametrize("flags", [4, 0x80000000, 0xFFFFFFFF])
def test_unknown_client_flags_end_the_session(flags: int) -> None:
    with pytest.raises(ProtocolError):
        Handshake([DISK]).receive(flags.to_bytes(4, "big"))


def test_bad_option_magic_ends_the_session() -> None:
    with pytest.raises(ProtocolError, match="magic"):
        Handshake([DISK]).receive(FLAGS + b"GET / HTTP/1.1\r\n")


ALL = [b"base:allocation", b"qemu:allocation-depth", b"nbdstream:local"]


@pytest.mark.parametrize(
    ("queries", "names"),
    [
        ([], ALL),
        ([b"base:"], ALL[:1]),
        ([b"qemu:"], ALL[1:2]),
        ([b"nbdstream:"], ALL[2:]),
        ([b"nbdstream:local", b"base:allocation", b"base:"], [ALL[0], ALL[2]]),
        ([b"base:unknown", b"x-unknown:", b"no colon", b""], []),
    ],
)
def test_contexts_are_listed_by_name_and_namespace(
    queries: list[bytes], names: list[bytes]
) -> None:
    found = ask(STRUCTURED, option(Option.LIST_META_CONTEXT, context_data(b"disk", *queries)))
    assert [(kind, data) for _, kind, data in found] == [
        *((OptionReply.META_CONTEXT, bytes(4) + name) for name in names),
        (OptionReply.ACK, b""),
    ]


@pytest.mark.parametrize(
    ("queries", "names"),
    [
        ([], []),
        ([b"base:"], []),  # a wildcard selects nothing
        ([b"base:allocation", b"base:allocation"], ALL[:1]),
        ([*reversed(ALL), b"qemu:dirty-bitmap:x"], ALL),
    ],
)
def test_contexts_are_set_by_name(queries: list[bytes], names: list[bytes]) -> None:
    choice = option(Option.SET_META_CONTEXT, context_data(b"disk", *queries))
    found = ask(STRUCTURED, choice)
    assert [data[4:] for _, kind, data in found if kind == OptionReply.META_CONTEXT] == names
    identities = {data[:4] for _, kind, data in found if kind == OptionReply.META_CONTEXT}
    assert len(identities) == len(names)
    agreed = agree(STRUCTURED, choice, option(Option.GO, info_data(b"disk")))
    assert [context.name.encode() for context in agreed.contexts] == names


@pytest.mark.parametrize("kind", [Option.LIST_META_CONTEXT, Option.SET_META_CONTEXT])
def test_contexts_need_structured_replies_and_a_known_export(kind: int) -> None:
    assert ask(option(kind, context_data(b"disk")))[0][1] == OptionReply.ERR_INVALID
    assert ask(STRUCTURED, option(kind, context_data(b"x")))[0][1] == OptionReply.ERR_UNKNOWN


def test_contexts_are_forgotten_when_setting_them_again_fails() -> None:
    set_again = [
        option(Option.SET_META_CONTEXT, context_data(b"disk", b"base:allocation")[:-1]),
        option(Option.SET_META_CONTEXT, context_data(b"nowhere", b"base:allocation")),
        option(Option.SET_META_CONTEXT, bytes(MAX_OPTION_DATA + 1)),
    ]
    for again in set_again:
        agreed = agree(
            STRUCTURED,
            option(Option.SET_META_CONTEXT, context_data(b"disk", b"base:allocation")),
            again,
            option(Option.GO, info_data(b"disk")),
        )
        assert agreed.contexts == ()


def test_contexts_count_only_for_the_export_they_were_set_for() -> None:
    agreed = agree(
        STRUCTURED,
        option(Option.SET_META_CONTEXT, context_data(b"other", b"base:allocation")),
        option(Option.GO, info_data(b"disk")),
        exports=(DISK, OTHER),
    )
    assert agreed == Agreement(DISK, True, ())


def _options() -> st.SearchStrategy[bytes]:
    kinds = st.sampled_from([*map(int, Option), 0, 11, 2**31])
    names = st.sampled_from([b"disk", b"", b"desk", b"\xff"])
    queries = st.lists(st.sampled_from([*ALL, b"base:", b"x", b""]), max_size=3)
    data = st.one_of(
        st.binary(max_size=40),
        st.builds(lambda name, infos: info_data(name, *infos), names, st.lists(st.integers(0, 9))),
        st.builds(lambda name, asked: context_data(name, *asked), names, queries),
    )
    return st.builds(option, kinds, data)


@given(
    st.one_of(st.just(FLAGS), st.binary(max_size=4)),
    st.lists(st.one_of(_options(), st.binary(max_size=30)), max_size=6),
    st.lists(st.integers(1, 50), max_size=30),
)
def test_fuzz_any_input_is_answered_or_a_protocol_error(
    flags: bytes, session: list[bytes], sizes: list[int]
) -> None:
    data = flags + b"".join(session)
    handshake = Handshake([DISK])
    output = b""
    try:
        for size in [*sizes, len(data)]:
            output += handshake.receive(data[:size])
            data = data[size:]
    except ProtocolError:
        return
    # Whatever came out is well-formed, except behind the one option without a reply message.
    if not (isinstance(handshake.outcome, Agreement) and option(1)[:12] in b"".join(session)):
        replies(output)
