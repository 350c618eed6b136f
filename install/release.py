# SPDX-License-Identifier: Apache-2.0
"""Whether a checkout can be released, and the tag that does it. Nothing is ever pushed.

    python -m install.release check | tag

`./dev release` runs all tests and builds the packages between the two. The version is the one in
nbdstream/__init__.py; CHANGELOG.md has to have a section for it, which becomes the tag's message.
"""

import re
import subprocess
import sys
from pathlib import Path

TOP = Path(__file__).resolve().parent.parent
BRANCH = "main"


class NotReadyError(Exception):
    """Why the checkout cannot be released, in one line that says what to do."""


def version(top: Path = TOP) -> str:
    """The version of a checkout. Raises NotReadyError."""
    found = re.search(
        r'^__version__ = "(\d+\.\d+\.\d+)"$', (top / "nbdstream/__init__.py").read_text(), re.M
    )
    if found is None:
        raise NotReadyError("nbdstream/__init__.py: __version__ is not of the form 1.2.3")
    return found[1]


def notes(top: Path = TOP) -> str:
    """The changelog's section on the version. Raises NotReadyError."""
    wanted = version(top)
    text = (top / "CHANGELOG.md").read_text()
    section = re.search(
        rf"^## \[{re.escape(wanted)}\] - \d{{4}}-\d\d-\d\d\n(.*?)(?=^## |^\[|\Z)", text, re.M | re.S
    )
    if section is None:
        raise NotReadyError(
            f"CHANGELOG.md has no section '## [{wanted}] - YYYY-MM-DD': give that title to what is "
            "unreleased"
        )
    if not section[1].strip():
        raise NotReadyError(f"CHANGELOG.md: the section on {wanted} is empty")
    return section[1].strip()


def check(top: Path = TOP) -> str:
    """The tag that a checkout can be given. Raises NotReadyError."""
    notes(top)
    if changed := _git(top, "status", "--porcelain"):
        raise NotReadyError(f"there are uncommitted changes: {changed.splitlines()[0].strip()}")
    branch = _git(top, "branch", "--show-current")
    if branch != BRANCH:
        raise NotReadyError(f"releases are made from {BRANCH}, and this is {branch or 'no branch'}")
    name = f"v{version(top)}"
    if _git(top, "tag", "--list", name):
        raise NotReadyError(f"{name} exists already: set the next version in nbdstream/__init__.py")
    return name


def tag(top: Path = TOP) -> str:
    """Tag the checkout; returns the tag's name. Raises NotReadyError."""
    name = check(top)
    message = f"nbdstream {version(top)}\n\n{notes(top)}\n"
    # Headings of the changelog begin with #, which git would take for comments.
    _git(top, "tag", "--annotate", "--cleanup=whitespace", f"--message={message}", name)
    return name


def _git(top: Path, *arguments: str) -> str:
    command = ["git", "-C", str(top), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise NotReadyError(f"git {arguments[0]}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout.strip()


def main(step: str) -> None:
    try:
        name = {"check": check, "tag": tag}[step]()
    except NotReadyError as error:
        sys.exit(f"release: error: {error}")
    if step == "tag":
        print(f"{name} is tagged. To publish it: git push origin {BRANCH} {name}")


if __name__ == "__main__":
    main(sys.argv[1])
