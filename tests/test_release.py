# SPDX-License-Identifier: Apache-2.0
"""What `./dev release` checks before and after the tests, in real git repositories."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from install.release import NotReadyError, check, tag
from nbdstream import __version__

CHANGELOG = """# Changelog

## [1.2.3] - 2026-01-31

### Added

- Something.

## [1.2.2] - 2026-01-01

- Older.

[1.2.3]: https://example.org
"""


def git(top: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=Test", "-c", "user.email=test@example.org"]
    command = ["git", "-C", str(top), *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for role in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{role}_NAME", "Test")
        monkeypatch.setenv(f"GIT_{role}_EMAIL", "test@example.org")
    (tmp_path / "nbdstream").mkdir()
    (tmp_path / "nbdstream/__init__.py").write_text('__version__ = "1.2.3"\n')
    (tmp_path / "CHANGELOG.md").write_text(CHANGELOG)
    git(tmp_path, "init", "-q", "-b", "main")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "All of it")
    return tmp_path


def test_the_tag_says_what_is_new(checkout: Path) -> None:
    assert check(checkout) == "v1.2.3"
    assert git(checkout, "tag") == ""
    assert tag(checkout) == "v1.2.3"
    message = git(checkout, "tag", "-l", "--format=%(contents)", "v1.2.3")
    assert message == "nbdstream 1.2.3\n\n### Added\n\n- Something."
    assert git(checkout, "rev-parse", "v1.2.3^{commit}") == git(checkout, "rev-parse", "HEAD")


def _rename_section(top: Path) -> None:
    (top / "CHANGELOG.md").write_text(CHANGELOG.replace("[1.2.3] - 2026-01-31", "[Unreleased]"))


def _empty_section(top: Path) -> None:
    (top / "CHANGELOG.md").write_text(CHANGELOG.replace("### Added\n\n- Something.\n", ""))


def _no_version(top: Path) -> None:
    (top / "nbdstream/__init__.py").write_text('__version__ = "soon"\n')


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (_rename_section, r"no section '## \[1.2.3\] - YYYY-MM-DD'"),
        (_empty_section, "the section on 1.2.3 is empty"),
        (_no_version, "not of the form 1.2.3"),
        (lambda top: (top / "new").touch(), "uncommitted changes: .*new"),
        (lambda top: git(top, "switch", "-q", "-c", "other"), "made from main, and this is other"),
        (lambda top: git(top, "tag", "v1.2.3"), "v1.2.3 exists already"),
    ],
)
def test_what_is_not_ready_is_not_tagged(
    checkout: Path, spoil: Callable[[Path], object], words: str
) -> None:
    spoil(checkout)
    before = git(checkout, "tag")
    with pytest.raises(NotReadyError, match=words):
        tag(checkout)
    assert git(checkout, "tag") == before


def test_the_version_stands_in_one_place() -> None:
    """All code reads it there; the changelog and examples name it."""
    top = Path(__file__).parent.parent
    command = ["git", "-C", str(top), "grep", "-lF", __version__, "--", "nbdstream", "install"]
    found = subprocess.run(
        [*command, "pyproject.toml", "dev", "README.md"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split()
    assert found == ["nbdstream/__init__.py"]
