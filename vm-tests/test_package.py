# SPDX-License-Identifier: Apache-2.0
"""What users install, built and used: the wheel, the man pages, the Debian package."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from install import man, package
from nbdstream import __version__
from testbed.guests.debian_image import SUITE, mirror
from testbed.peers import run, temporary_directory

# In the clean root: install the package as users do, use it, remove it. Each step ends it.
CHECK = f"""
set -eux
export DEBIAN_FRONTEND=noninteractive
tools="nbdkit qemu-utils libnbd-bin"
apt-get install -q -y /srv/nbdstream_{__version__}_all.deb $tools </dev/null
cd /srv
test "$(nbdstream --version)" = "nbdstream, version {__version__}"
head -c 8M /dev/urandom >base.raw
nbdstream serve leaf.qcow2 -b base.raw -U - --exit-when-complete
nbdstream check leaf.qcow2
qemu-img compare -f qcow2 -F raw leaf.qcow2 base.raw
nbdstream serve leaf.qcow2 --run 'test "$(nbdinfo --size "$uri")" = 8388608'
nbdstream serve leaf.qcow2 --metrics 127.0.0.1:0 --read-only --run true
nbdstream serve tables.qcow2 -b qcow2+/srv/leaf.qcow2 -U - --exit-when-complete
python3 -I - <<'END'
# Each requirement of each library in /usr/lib/nbdstream is met.
import importlib.metadata, re, sys
sys.path.insert(0, "/usr/lib/nbdstream")
def number(text):
    return [int(part) for part in re.findall(r"[0-9]+", text)[:3]]
for found in importlib.metadata.distributions(path=["/usr/lib/nbdstream"]):
    for text in found.requires or ():
        if ";" in text:
            continue
        name, least = re.fullmatch(r"([A-Za-z0-9_.-]+).*?(?:>=([0-9.]+).*)?", text).groups()
        version = importlib.metadata.version(name)
        assert not least or number(version) >= number(least), (found.name, text, version)
        print(found.name, "has", name, version)
END
apt-get remove -q -y nbdstream
test ! -e /usr/lib/nbdstream
echo all is well
"""


@pytest.fixture(scope="module")
def built() -> Iterator[Path]:
    with temporary_directory() as directory:
        package.main(directory)
        yield directory


@pytest.mark.timeout(600)
def test_the_debian_package_on_a_clean_system(built: Path, tmp_path: Path) -> None:
    script = tmp_path / "check.sh"
    script.write_text(CHECK)
    deb = built / f"nbdstream_{__version__}_all.deb"
    hooks = [f'copy-in "{deb}" "{script}" /srv', 'chroot "$1" sh /srv/check.sh']
    command = ["mmdebstrap", "--variant=apt", "--format=null", "--aptopt=Acquire::Retries 3"]
    command += [f"--customize-hook={hook}" for hook in hooks]
    done = subprocess.run(
        [*command, SUITE, os.devnull, mirror()],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=540,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "all is well" in done.stdout


def test_the_wheel_in_a_virtual_environment(built: Path, tmp_path: Path) -> None:
    run(["/usr/bin/python3", "-m", "venv", "--system-site-packages", tmp_path / "venv"])
    pip, wheel = tmp_path / "venv/bin/pip", built / f"nbdstream-{__version__}-py3-none-any.whl"
    run([pip, "install", "-q", "--disable-pip-version-check", wheel], timeout=300)
    nbdstream = tmp_path / "venv/bin/nbdstream"
    assert run([nbdstream, "--version"]).strip() == f"nbdstream, version {__version__}"
    run([nbdstream, "create", tmp_path / "leaf.qcow2", "--size", "1M"])
    assert "virtual size: 1.0 MiB" in run([nbdstream, "info", tmp_path / "leaf.qcow2"])


def test_the_sdist_has_what_the_wheel_is_made_of(built: Path) -> None:
    names = run(["tar", "-tzf", built / f"nbdstream-{__version__}.tar.gz"]).splitlines()
    for name in ("pyproject.toml", "LICENSE", "README.md", "nbdstream/py.typed"):
        assert f"nbdstream-{__version__}/{name}" in names


def test_man_pages_are_what_man_can_show(built: Path) -> None:
    """Without complaints but those about the width of tables, and with a name for whatis."""
    pages = sorted((built / "tree/usr/share/man").rglob("*.gz"))
    assert len(pages) == len(list(man.pages())) > 20
    for page in pages:
        text = run(["zcat", page])
        assert f'"{page.name.split(".")[0].upper()}"' in text
        shown = subprocess.run(
            ["groff", "-man", "-Tutf8", "-t", "-ww", "-z", "-rLL=80n"],
            input=text,
            capture_output=True,
            text=True,
            check=True,
        ).stderr
        layout = ("table", "around line", "adjust line", "break line")
        assert not [line for line in shown.splitlines() if not any(map(line.count, layout))]
        name = run(["lexgrog", page]).split('"')[1]
        assert name.startswith(page.name.split(".")[0] + " - ")
        assert not re.search(r"\]\((?!\d\))", text)


def test_bash_completes_commands_and_options(built: Path) -> None:
    script = built / "tree" / package.COMPLETIONS["bash"]

    def completed(*words: str) -> set[str]:
        line = " ".join(f"'{word}'" for word in words)
        code = (
            f"source '{script}'; COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; "
            '_nbdstream_completion nbdstream; echo "${COMPREPLY[@]}"'
        )
        programs = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        done = subprocess.run(
            ["bash", "-c", code], env={"PATH": programs}, capture_output=True, text=True, check=True
        )
        return set(done.stdout.split())

    assert completed("nbdstream", "s") == {"serve", "status", "speed", "stream"}
    assert {"--tls", "--tls-certificates"} <= completed("nbdstream", "serve", "--tl")
    assert completed("nbdstream", "serve", "--tls", "re") == {"require"}


def test_completions_for_other_shells_are_there(built: Path) -> None:
    for shell in ("zsh", "fish"):
        text = (built / "tree" / package.COMPLETIONS[shell]).read_text()
        assert f"_NBDSTREAM_COMPLETE={shell}_complete" in text
