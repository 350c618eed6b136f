# SPDX-License-Identifier: Apache-2.0
"""What strangers wrote is shown without commands to a terminal; secrets are not shown."""

import pytest

from nbdstream.text import has_hidden, printable, redacted, shown, without_userinfo


@pytest.mark.parametrize(
    "text",
    [
        "\x1b]0;owned\x07",
        "a\nb",
        "\r",
        "\x00",
        "\x7f",
        "\x9b31m",
        "\u202egnp.exe",
        "\u2028",
        "\ud800",
    ],
)
def test_nothing_that_a_terminal_obeys_is_printed(text: str) -> None:
    clean = printable(f"x{text}y")
    assert clean.isprintable()
    assert clean.startswith("x") and clean.endswith("y")
    assert "\\" in clean


def test_ordinary_text_is_shown_as_it_is() -> None:
    for text in ("", "plain", "Größe 5 KiB, “quoted” …", "a/b c"):
        assert printable(text) == text
    assert printable("a\nb\t", keep="\n") == "a\nb\\t"


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("https://me:s3cret@host/x", "https://me:***@host/x"),
        ("https://me:s3:cr@t@host/x", "https://me:***@host/x"),
        ("qcow2+ssh://me:s3cret@host/x", "qcow2+ssh://me:***@host/x"),
        ("https://:s3cret@host", "https://:***@host"),
        ("https://h/x?id=5&X-Amz-Signature=s3cret", "https://h/x?id=5&X-Amz-Signature=***"),
        ("https://h/x?sig=s3cret&se=2030#f", "https://h/x?sig=***&se=2030#f"),
        ("nbd+unix:///x?socket=/run/token", "nbd+unix:///x?socket=/run/token"),
        ("https://me@host/x", "https://me@host/x"),
        ("/a/file", "/a/file"),
    ],
)
def test_secrets_are_not_shown(uri: str, expected: str) -> None:
    assert redacted(uri) == expected == redacted(expected)
    assert has_hidden(expected) == (uri != expected)
    assert not has_hidden(uri)
    assert shown(f"error in {uri} or so") == f"error in {expected} or so"


def test_a_uri_for_a_command_line_names_no_user() -> None:
    assert without_userinfo("https://me:s3cret@host:80/x?y") == "https://host:80/x?y"
