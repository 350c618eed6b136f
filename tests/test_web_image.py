# SPDX-License-Identifier: Apache-2.0
"""`RemoteImage` by itself, in this process, against servers that are drawn at random."""

import os
import random
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nbdstream.web import image as web_image
from nbdstream.web.answers import Answer, Validator
from nbdstream.web.errors import LinkError, ReplacedError, WebError
from nbdstream.web.exchange import Exchange
from nbdstream.web.image import REDIRECTS_MOST, Keeper, RemoteImage
from nbdstream.web.settings import Settings
from nbdstream.web.transfers import Transfers
from tests.web_liar import Liar, liar

SIZE = 200_000
CONTENT = random.Random(1).randbytes(SIZE)
ANOTHER = random.Random(2).randbytes(SIZE)


@pytest.fixture(scope="module")
def transfers() -> Transfers:
    started = Transfers()
    started.start()
    return started


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web_image, "LINK_PAUSES", (0.0, 0.0, 0.0))


@pytest.fixture(scope="module")
def keeper(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], Keeper]]:
    """A function that makes a keeper of an empty file."""
    paths: list[int] = []

    def make() -> Keeper:
        path = tmp_path_factory.mktemp("keeper") / "state"
        paths.append(os.open(path, os.O_RDWR | os.O_CREAT))
        return Keeper(paths[-1])

    yield make
    for fd in paths:
        os.close(fd)


def opened(url: str, transfers: Transfers, keeper: Keeper, settings: Path | None = None) -> Any:
    image = RemoteImage(url, str(settings or ""), lambda: transfers, keeper)
    image.ready()
    return image


def read(image: RemoteImage, offset: int, length: int) -> bytes:
    buffer = bytearray(length)
    image.read(memoryview(buffer), offset)
    return bytes(buffer)


# What one read meets: the fields of the server that are set before it.
TROUBLE = st.one_of(
    st.just({}),
    st.builds(lambda n: {"cut_after": n}, st.just(0) | st.integers(SIZE // 8, SIZE // 2)),
    st.builds(lambda n: {"most": n}, st.integers(SIZE // 8, SIZE // 2)),
    st.builds(
        lambda statuses, retry: {"busy": statuses, "retry_after": retry},
        st.lists(st.sampled_from([401, 403, 404, 410, 412, 416, 429, 500, 503]), max_size=3),
        st.sampled_from(["", "0"]),
    ),
    st.builds(
        lambda words: {"content_range": [words]},
        st.sampled_from(["", "bytes 0-0/1", "bytes */200000", "bytes 5-4/200000", "pages 1-2/3"]),
    ),
    st.sampled_from([{"version": "another"}, {"version": "shorter"}]),
)
VERSIONS = {
    "first": ('"one"', CONTENT),
    "another": ('"two"', ANOTHER),
    "shorter": ('"one"', CONTENT[:-512]),
}
QUIET = {"cut_after": None, "most": None, "retry_after": "", "busy": (), "content_range": ()}


def set_up(server: Liar, trouble: dict[str, Any]) -> None:
    """Have the server behave like this from now on."""
    server.etag, server.content = VERSIONS[trouble.get("version", "first")]
    for field, usual in QUIET.items():
        value = trouble.get(field, usual)
        setattr(server, field, list(value) if isinstance(value, list | tuple) else value)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    steps=st.lists(
        st.tuples(TROUBLE, st.integers(0, SIZE - 1), st.integers(1, SIZE)), min_size=1, max_size=8
    ),
    redirected=st.booleans(),
)
def test_what_is_read_is_the_pinned_image_or_an_error(
    transfers: Transfers,
    keeper: Callable[[], Keeper],
    steps: list[tuple[dict[str, Any], int, int]],
    redirected: bool,
) -> None:
    """Whatever the server does: never bytes of another image, and once it is seen to be
    replaced it is refused for good, also by the helper that comes after this one."""
    kept = keeper()
    with liar(Liar.serving(CONTENT)) as server, liar(Liar.redirecting(server.url)) as start:
        image = opened(start.url if redirected else server.url, transfers, kept)
        refused = False
        for trouble, offset, length in steps:
            length = min(length, SIZE - offset)
            set_up(server, trouble)
            try:
                got = read(image, offset, length)
            except ReplacedError:
                refused = True
            except WebError:
                assert trouble and not refused
            else:
                assert got == CONTENT[offset : offset + length]
                assert not refused and "version" not in trouble
        set_up(server, {})
        after = RemoteImage(server.url, "", lambda: transfers, kept)
        if refused:
            with pytest.raises(ReplacedError):
                after.ready()
        else:
            after.ready()
            assert read(after, 0, SIZE) == CONTENT
            assert after.size == SIZE


def test_redirects_in_a_circle_end(transfers: Transfers, keeper: Callable[[], Keeper]) -> None:
    with liar(Liar.redirecting("")) as start:
        start.target = start.url
        with pytest.raises(WebError, match="more than 10 redirects"):
            opened(start.url, transfers, keeper())
        assert len(start.asked) == REDIRECTS_MOST + 1


def test_a_redirect_to_another_kind_of_source_is_refused(
    transfers: Transfers, keeper: Callable[[], Keeper]
) -> None:
    with (
        liar(Liar.redirecting("file:///etc/passwd")) as start,
        pytest.raises(WebError, match="redirects to file://"),
    ):
        opened(start.url, transfers, keeper())


def test_a_mirror_with_another_image_is_not_taken(
    transfers: Transfers, keeper: Callable[[], Keeper]
) -> None:
    """Each server makes up tags of its own: without a date nothing says that it is the same."""
    with (
        liar(Liar.serving(CONTENT)) as first,
        liar(Liar.serving(ANOTHER)) as second,
        liar(Liar.redirecting(first.url)) as start,
    ):
        image = opened(start.url, transfers, keeper())
        second.etag = '"two"'
        start.target, first.busy = second.url, [404]
        with pytest.raises(WebError, match="this server has another one"):
            read(image, 0, 512)
        start.target = first.url
        assert read(image, 0, 512) == CONTENT[:512]


def test_settings_are_read_again_when_they_no_longer_suffice(
    transfers: Transfers, keeper: Callable[[], Keeper], tmp_path: Path
) -> None:
    with liar(Liar.serving(CONTENT)) as server:
        file = tmp_path / "http.toml"
        file.write_text(f'["{server.url}"]\nheaders = ["X-Key: old"]\nuser-agent = "mine"\n')
        image = opened(server.url, transfers, keeper(), file)
        assert "X-Key: old" in server.asked[-1] and "user-agent: mine" in server.asked[-1].lower()
        fresh = tmp_path / "fresh"
        fresh.write_text(f'["{server.url}"]\nheaders = ["X-Key: new"]\nconnections = 3\n')
        fresh.rename(file)
        server.busy = [401]
        assert read(image, 7, 700) == CONTENT[7:707]
        assert "X-Key: new" in server.asked[-1]
        assert image.connections == 3
        file.write_text("no settings")
        server.busy = [401]
        with pytest.raises(WebError, match="401"):
            read(image, 0, 512)
        assert read(image, 0, 512) == CONTENT[:512]


def test_a_users_name_goes_to_the_first_server_only(
    transfers: Transfers, keeper: Callable[[], Keeper]
) -> None:
    with liar(Liar.serving(CONTENT)) as server, liar(Liar.redirecting(server.url)) as start:
        image = opened(start.url.replace("//", "//me:s3cret@"), transfers, keeper())
        assert read(image, 0, 512) == CONTENT[:512]
        assert "authorization: basic" in start.asked[0].lower()
        assert "s3cret" not in image.url
        assert not any("authorization" in head.lower() for head in server.asked)


def test_a_server_that_wants_a_long_rest_fails_the_read(
    transfers: Transfers, keeper: Callable[[], Keeper]
) -> None:
    with liar(Liar.serving(CONTENT)) as server:
        image = opened(server.url, transfers, keeper())
        server.busy, server.retry_after = [503], "3600"
        with pytest.raises(WebError, match="wants to be left alone"):
            read(image, 0, 512)
        assert len(server.asked) == 2


def test_a_server_that_is_not_there_is_an_error_of_the_link(
    transfers: Transfers, keeper: Callable[[], Keeper]
) -> None:
    with liar(Liar.serving(CONTENT)) as server:
        url = server.url
    with pytest.raises(LinkError, match="connect"):
        opened(url, transfers, keeper())


def test_a_url_that_is_none_is_not_tried_again(transfers: Transfers) -> None:
    view = memoryview(bytearray(1))
    exchange = Exchange("http://[::1", "", 0, view)
    with pytest.raises(WebError) as caught:
        exchange.perform(transfers, Settings(), "", "")
    assert not isinstance(caught.value, LinkError)


# -- what an answer says ---------------------------------------------------------------------


@given(st.integers(0, 1 << 60), st.integers(0, 1 << 40), st.integers(0, 1 << 40))
def test_a_content_range_is_read_as_it_is_written(first: int, more: int, after: int) -> None:
    last, total = first + more, first + more + 1 + after
    answer = Answer(206, headers={"content-range": f"bytes {first}-{last}/{total}"})
    assert answer.content_range() == (first, last, total)


@given(st.text(alphabet="bytes 0123456789-/*", max_size=24))
def test_a_content_range_is_whole_or_none(words: str) -> None:
    found = Answer(206, headers={"content-range": words}).content_range()
    assert found is None or 0 <= found[0] <= found[1] < found[2]


@given(st.lists(st.binary(max_size=60), max_size=10))
def test_any_head_is_taken(lines: list[bytes]) -> None:
    """No line of a server's raises: it ends as a status that is not good."""
    answer = Answer()
    answer.take(b"HTTP/1.1 206 Partial Content\r\n")
    for line in lines:
        answer.take(line)
    answer.content_range()
    answer.retry_after()
    assert 0 <= answer.status <= 999


TAGS = st.sampled_from(["", '"a"', '"b"', 'W/"a"', 'W/"b"'])
DATES = st.sampled_from(["", "Thu, 01 Jan 2026 00:00:00 GMT", "Fri, 02 Jan 2026 00:00:00 GMT"])
VALIDATORS = st.builds(Validator, TAGS, DATES)


@given(VALIDATORS, VALIDATORS)
def test_validators_contradict_each_other_both_ways_or_not_at_all(
    one: Validator, other: Validator
) -> None:
    assert one.contradicts(other) == other.contradicts(one)
    assert one.confirms(other) == other.confirms(one)
    assert not one.contradicts(one)
    assert one.confirms(one) == bool(one)


def test_when_to_come_back() -> None:
    now = datetime(2026, 1, 1, tzinfo=UTC)

    def after(value: str) -> float | None:
        return Answer(503, headers={"retry-after": value}).retry_after(now)

    assert after("7") == 7
    assert after("Thu, 01 Jan 2026 00:01:00 GMT") == 60
    assert after("Wed, 31 Dec 2025 00:00:00 GMT") == 0
    assert after("soon") is None
    assert after("") is None
