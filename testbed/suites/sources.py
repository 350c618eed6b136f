# SPDX-License-Identifier: Apache-2.0
"""The sources of Debian packages, of the version that the system's own packages have.

They are fetched by apt, from the places that the system's packages come from, without a change to
the system's list of places.
"""

import subprocess
from pathlib import Path

from testbed.peers import run

APT = Path("/etc/apt")
FETCH_SECONDS = 600


def source(package: str, directory: Path) -> Path:
    """The unpacked source of a package, which stays in ``directory``. Raises PeerError."""
    directory.mkdir(parents=True, exist_ok=True)
    if not list(directory.glob(f"{package}-*/")):
        apt = ["apt-get", "-q", *_options(directory)]
        run([*apt, "update"], timeout=FETCH_SECONDS)
        subprocess.run(
            [*apt, "source", "--only-source", package],
            cwd=directory,
            check=True,
            timeout=FETCH_SECONDS,
            stdout=subprocess.DEVNULL,
        )
    return next(directory.glob(f"{package}-*/"))


def _options(directory: Path) -> list[str]:
    """apt's, for lists of its own in which each place has sources."""
    places = directory / "sources.list.d"
    places.mkdir(exist_ok=True)
    for old in sorted(APT.glob("sources.list*/*")) + sorted(APT.glob("sources.list")):
        if old.suffix == ".sources":
            text = old.read_text().replace("Types: deb\n", "Types: deb-src\n")
        elif old.suffix == ".list":
            lines = [line for line in old.read_text().splitlines() if line.startswith("deb ")]
            text = "".join(f"deb-src {line.removeprefix('deb ')}\n" for line in lines)
        else:
            continue
        (places / old.name).write_text(text)
    lists = directory / "lists"
    lists.mkdir(exist_ok=True)
    return [
        *("-o", "Dir::Etc::SourceList=/dev/null", "-o", f"Dir::Etc::SourceParts={places}"),
        *("-o", f"Dir::State::Lists={lists}"),
        *("-o", "APT::Sandbox::User=root"),
    ]
