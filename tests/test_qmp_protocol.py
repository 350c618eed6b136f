# SPDX-License-Identifier: Apache-2.0
"""The QMP messages and lines: both roles, cut anywhere, and whatever bytes come in."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nbdstream.qmp.protocol import (
    COMMAND_LIMIT,
    Command,
    CommandError,
    CommandNotFound,
    CommandReader,
    DeviceNotActive,
    DeviceNotFound,
    Event,
    Failure,
    GenericError,
    Greeting,
    JSONObject,
    LineReader,
    Message,
    QMPError,
    QMPProtocolError,
    Return,
    ServerSession,
    decode,
    encode,
    parse_command,
    parse_server_message,
)

VERSION = {"qemu": {"major": 7, "minor": 2, "micro": 0}, "package": ""}

SERVER_MESSAGES: list[Message] = [
    Greeting(VERSION, ["oob"]),
    Return({}, 1),
    Return([1, "two"], {"any": "thing"}),
    Return({"no": "id"}),
    Event("STOP", {}, 1500000000.25),
    Event("JOB_STATUS_CHANGE", {"id": "job0", "status": "running"}, 1500000000.5),
]


@pytest.mark.parametrize("message", SERVER_MESSAGES, ids=lambda message: type(message).__name__)
def test_what_a_server_sends_a_client_reads(message: Message) -> None:
    assert parse_server_message(decode(encode(message))) == message


@pytest.mark.parametrize("kind", [GenericError, CommandNotFound, DeviceNotActive, DeviceNotFound])
def test_an_error_keeps_its_class_description_and_id(kind: type[CommandError]) -> None:
    line = encode(Failure(kind("no way"), "x"))
    assert json.loads(line) == {"error": {"class": kind.__name__, "desc": "no way"}, "id": "x"}
    message = parse_server_message(decode(line))
    assert isinstance(message, Failure) and type(message.error) is kind
    assert (message.error.desc, message.id) == ("no way", "x")


def test_an_unknown_error_class_is_a_generic_error() -> None:
    message = parse_server_message({"error": {"class": "KVMMissingCap", "desc": "d"}})
    assert isinstance(message, Failure) and type(message.error) is GenericError


def test_what_a_client_sends_a_server_reads() -> None:
    command = Command("block-stream", {"device": "disk0"}, 7)
    assert parse_command(decode(encode(command))) == command
    assert json.loads(encode(Command("quit"))) == {"execute": "quit"}


@pytest.mark.parametrize(
    "line",
    [
        {"event": 1, "timestamp": {"seconds": 1, "microseconds": 0}},
        {"event": "STOP"},
        {"event": "STOP", "timestamp": {"seconds": "1", "microseconds": 0}},
        {"error": "no"},
        {"error": {"class": "GenericError"}},
        {"QMP": {}},
        {"hello": "x" * 1000},
    ],
)
def test_a_client_refuses_what_no_server_says(line: dict[str, object]) -> None:
    with pytest.raises(QMPProtocolError) as caught:
        parse_server_message(line)
    assert len(str(caught.value)) < 300


LINES = encode(SERVER_MESSAGES[0]) + b"\n  \r\n" + encode(SERVER_MESSAGES[3])


def test_lines_may_be_cut_anywhere() -> None:
    whole = LineReader(1000)
    whole.feed(LINES)
    expected = list(whole.messages())
    assert len(expected) == 2
    bytewise = LineReader(1000)
    got: list[JSONObject] = []
    for byte in LINES:
        bytewise.feed(bytes([byte]))
        got += bytewise.messages()
    assert got == expected


JSON_TEXT = st.text(alphabet=st.sampled_from('a{}[]"\\\n\u2028é'), max_size=8)
JSON_OBJECTS = st.dictionaries(
    JSON_TEXT,
    st.recursive(JSON_TEXT | st.integers() | st.none(), lambda inner: st.lists(inner, max_size=3)),
    max_size=3,
)


@given(st.lists(JSON_OBJECTS, max_size=4), st.sampled_from(["", " ", "\r\n"]), st.data())
def test_commands_need_no_line_end(objects: list[object], end: str, data: st.DataObject) -> None:
    """qemu.qmp, and with it qmp-shell, sends none."""
    stream = "".join(json.dumps(each) + end for each in objects).encode()
    reader = CommandReader(1000)
    got: list[object] = []
    while stream:
        cut = data.draw(st.integers(1, len(stream)))
        reader.feed(stream[:cut])
        got += reader.messages()
        stream = stream[cut:]
    assert got == objects


@pytest.mark.parametrize("broken", [b'{"a" "b"', b"[[[{", b'{"open', b'{"x\\', b"}}]", b"word"])
def test_a_broken_command_costs_no_more_than_its_line(broken: bytes) -> None:
    reader = CommandReader(1000)
    reader.feed(broken + b'\n{"execute": "quit"}')
    assert list(reader.lines()) == [broken, b'{"execute": "quit"}']


@pytest.mark.parametrize("end", [b"", b"\n"], ids=["endless", "complete"])
def test_a_line_over_the_limit_breaks_the_reader_for_good(end: bytes) -> None:
    reader = LineReader(100)
    reader.feed(b'{"return": 1}\n' + b"x" * 101 + end)
    lines = reader.lines()
    assert next(lines) == b'{"return": 1}'
    for _ in range(2):
        with pytest.raises(QMPProtocolError, match="more than 100 bytes"):
            next(reader.lines())
    reader.feed(b'{"return": 1}\n')
    with pytest.raises(QMPProtocolError):
        next(reader.lines())


def test_a_line_at_the_limit_is_taken() -> None:
    reader = LineReader(100)
    reader.feed(b"y" * 100 + b"\n")
    assert list(reader.lines()) == [b"y" * 100]


@pytest.mark.parametrize(
    "line",
    [b"[1]", b"nonsense", b"{", b'{"a": NaN}', b"\xff\xfe", b"[" * 100_000, b"9" * 5000],
    ids=["array", "word", "half", "nan", "not-utf8", "deep", "huge-number"],
)
def test_only_json_objects_are_messages(line: bytes) -> None:
    with pytest.raises(QMPProtocolError):
        decode(line)


def replies(session: ServerSession, *messages: object) -> list[object]:
    data = b"".join(json.dumps(message).encode() + b"\n" for message in messages)
    return list(session.receive(data))


def negotiated() -> ServerSession:
    session = ServerSession(VERSION)
    assert replies(session, {"execute": "qmp_capabilities", "id": 1}) == [Return({}, 1)]
    assert session.negotiated
    return session


def test_the_server_greets_with_its_version() -> None:
    greeting = parse_server_message(decode(ServerSession(VERSION).greeting()))
    assert greeting == Greeting(VERSION, [])


def refusal(reply: object) -> tuple[type, object]:
    assert isinstance(reply, Failure)
    return type(reply.error), reply.id


def test_commands_must_wait_for_the_negotiation() -> None:
    session = ServerSession(VERSION)
    early, done, command = replies(
        session,
        {"execute": "query-version", "id": 1},
        {"execute": "qmp_capabilities", "arguments": {"enable": []}, "id": 2},
        {"execute": "query-version", "id": 3},
    )
    assert refusal(early) == (CommandNotFound, 1)
    assert done == Return({}, 2)
    assert command == Command("query-version", {}, 3)


def test_capabilities_are_negotiated_once_and_none_can_be_enabled() -> None:
    fresh = ServerSession(VERSION)
    enable = {"execute": "qmp_capabilities", "arguments": {"enable": ["oob"]}}
    unknown = {"execute": "qmp_capabilities", "arguments": {"disable": []}}
    assert [refusal(reply) for reply in replies(fresh, enable, unknown)] == [
        (GenericError, None),
        (GenericError, None),
    ]
    assert not fresh.negotiated
    (again,) = replies(negotiated(), {"execute": "qmp_capabilities", "id": 2})
    assert refusal(again) == (CommandNotFound, 2)


@pytest.mark.parametrize(
    "message",
    [
        {"id": 5},
        {"execute": 1, "id": 5},
        {"execute": "x", "arguments": [], "id": 5},
        {"execute": "x", "argument": {}, "id": 5},
    ],
)
def test_a_malformed_command_is_answered_under_its_id(message: object) -> None:
    (reply,) = replies(negotiated(), message)
    assert refusal(reply) == (GenericError, 5)


def test_broken_json_costs_one_reply_and_not_the_connection() -> None:
    session = negotiated()
    broken, command = session.receive(b'{"execute": \n{"execute": "stop"}\n')
    assert refusal(broken) == (GenericError, None)
    assert command == Command("stop")


def test_an_endless_line_ends_the_session() -> None:
    session = negotiated()
    with pytest.raises(QMPProtocolError):
        list(session.receive(b" " * (COMMAND_LIMIT + 1)))


short_text = st.text('ab{"\n', max_size=4)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | short_text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(short_text, inner, max_size=3),
    max_leaves=8,
)
members = st.sampled_from(
    ["execute", "arguments", "id", "return", "error", "event", "QMP", "timestamp", "data"]
)
lines = st.binary(max_size=80) | st.dictionaries(members, json_values).map(
    lambda message: json.dumps(message).encode()
)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(lines, max_size=6))
def test_a_server_answers_any_bytes_or_hangs_up(received: list[bytes]) -> None:
    session = negotiated()
    for reply in session.receive(b"\n".join(received) + b"\n"):
        assert isinstance(reply, Command) or parse_server_message(decode(encode(reply)))


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(lines)
def test_a_client_reads_any_bytes_or_raises_a_protocol_error(line: bytes) -> None:
    reader = LineReader(60)
    reader.feed(line + b"\n")
    try:
        for message in reader.messages():
            parse_server_message(message)
    except QMPError as error:
        assert type(error) is QMPProtocolError
