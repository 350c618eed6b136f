# SPDX-License-Identifier: Apache-2.0
"""A guest waits while a server starts: what need not be loaded is not loaded."""

import re
import subprocess
import sys
from pathlib import Path

from nbdstream.backing import confine
from testbed.peers import make_image, nbdkit

# Modules, or whole packages, that `serve` needs for some options only.
NOT_BY_DEFAULT = (
    "nbdstream.cli.progress",
    "nbdstream.control",
    "nbdstream.guest",
    "nbdstream.handover.commands",
    "nbdstream.handover.offer",
    "nbdstream.leaf.qcow2",
    "nbdstream.leaf.qed",
    "nbdstream.migrate",
    "nbdstream.pivot",
    "nbdstream.qmp",
    "asyncio",
    "fractions",
    "prometheus_client",
    "rich",
    "urllib.request",
)
_IMPORTED = re.compile(r"^import time:.*\| +(\S+)$", re.MULTILINE)


def test_serve_loads_only_what_it_needs(tmp_path: Path) -> None:
    image = tmp_path / "far.raw"
    make_image(image, 1 << 20)
    with nbdkit("file", image, readonly=True) as far:
        serve = ["serve", str(tmp_path / "leaf.raw"), "-b", far.uri, "--run", "true"]
        done = subprocess.run(
            [sys.executable, "-X", "importtime", "-m", "nbdstream", *serve],
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
    imported = _IMPORTED.findall(done.stderr)
    assert "nbdstream.leaf.raw.leaf" in imported
    unwanted = [
        name
        for name in imported
        if any(name == heavy or name.startswith(f"{heavy}.") for heavy in NOT_BY_DEFAULT)
    ]
    assert unwanted == []


def test_the_sandbox_loads_few_modules() -> None:
    place = Path(confine.__file__).parent
    script = f"import sys; sys.path.append({str(place)!r}); import confine; print(*sys.modules)"
    command = [sys.executable, "-I", "-S", "-c", script]
    loaded = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    assert "ctypes" in loaded.split()
    assert not {"enum", "json", "pathlib", "re", "typing", "subprocess"} & set(loaded.split())
