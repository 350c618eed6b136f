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
from testbed.terminal import Terminal
from testbed.web import nginx

# In the clean root: install the package as users do, and use it. A step that fails ends it.
CHECK = f"""
set -eux
export DEBIAN_FRONTEND=noninteractive
# As apt does by default, and mmdebstrap does not.
deb=/srv/nbdstream_{__version__}_all.deb
apt-get install -o APT::Install-Recommends=true -q -y $deb </dev/null
qemu-system-x86_64 --version
apt-get install -q -y libnbd-bin </dev/null
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
echo all is well
apt-get install -q -y systemd systemd-sysv dbus </dev/null
"""
# What is done when systemd has started in the root; it ends with the machine's end.
SCRIPT = r"""
set -ux
cd /srv
soon() { for i in $(seq 1200); do "$@" && return; sleep 0.1; done; }

update-ca-certificates
nbdstream boot $(cat image.url) -m 128M </dev/null >boot.out 2>&1 &
soon grep -q 'GUEST READY' boot.out && echo a guest boots from HTTPS
kill $!
wait $!

systemctl start nbdstream@vm2.socket
qemu-system-x86_64 -nodefaults -display none -accel tcg -m 32 \
    -qmp unix:/run/vm2.qmp,server=on,wait=off \
    -blockdev driver=raw,node-name=disk0,file.driver=nbd,\
file.server.type=unix,file.server.path=/run/nbdstream/vm2.sock \
    -device virtio-blk-pci,drive=disk0 &
soon chmod 666 /run/vm2.qmp
soon sh -c 'ls -l /proc/'$!'/fd | grep vm2.qcow2' && echo the guest has its leaf
soon sh -c '! systemctl is-active -q nbdstream@vm2.service'
sleep 2  # past RestartSec
systemctl show -p ActiveState,Result,NRestarts nbdstream@vm2.service
journalctl --no-pager -u nbdstream@vm2.service
kill $!

uri='nbd+unix:///?socket=/run/nbdstream/vm1.sock'
systemctl start nbdstream@vm1.socket
nbdinfo --size "$uri"
systemctl is-active nbdstream@vm1.service && echo started by a client
systemctl status --no-pager nbdstream@vm1.service
systemctl show -p StatusText nbdstream@vm1.service
systemctl restart nbdstream@vm1.service
nbdinfo --size "$uri" && echo answers after a restart
nbdstream status /run/nbdstream/vm1.qmp
pid=$(systemctl show --value -p MainPID nbdstream@vm1.service)
kill -STOP $pid
nbdinfo --size "$uri" && echo answers after the watchdog
journalctl --no-pager -u nbdstream@vm1.service
apt-get remove -q -y nbdstream
test ! -e /usr/lib/nbdstream && echo removed
systemctl poweroff
"""
# Its guest goes on from the leaf when that is complete.
PIVOTED = """
leaf = "vm2.qcow2"
backing = "qcow2+/srv/leaf.qcow2"
pivot = "/run/vm2.qmp"
"""
PROBE = """
[Unit]
After=multi-user.target
[Service]
ExecStart=/bin/sh /srv/probe.sh
StandardOutput=file:/srv/probe.out
StandardError=file:/srv/probe.err
"""
CONFIG = """
leaf = "vm1.qcow2"
backing = "qcow2+/srv/leaf.qcow2"
stream = "paused"
"""


@pytest.fixture(scope="module")
def built() -> Iterator[Path]:
    with temporary_directory() as directory:
        package.main(directory)
        yield directory


@pytest.fixture(scope="module")
def root(built: Path) -> Iterator[tuple[Path, str]]:
    """A clean Debian in which `CHECK` was run, and what that printed. Root's rights are needed."""
    with temporary_directory() as directory:
        script, place = directory / "check.sh", directory / "root"
        script.write_text(CHECK)
        deb = built / f"nbdstream_{__version__}_all.deb"
        hooks = [f'copy-in "{deb}" "{script}" /srv', 'chroot "$1" sh /srv/check.sh']
        command = ["mmdebstrap", "--variant=apt", "--format=directory"]
        command += [f"--customize-hook={hook}" for hook in hooks]
        try:
            yield place, as_root(*command, SUITE, str(place), mirror(), seconds=540)
        finally:
            as_root("rm", "-rf", "--one-file-system", str(place), seconds=300)


def as_root(*command: str, seconds: float) -> str:
    """Run a program with root's rights: all that it says. Fails with that, too."""
    done = subprocess.run(
        [*([] if os.geteuid() == 0 else ["sudo", "-n"]), *command],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=seconds,
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-6000:]
    return said


@pytest.mark.timeout(600)
def test_the_debian_package_on_a_clean_system(root: tuple[Path, str]) -> None:
    assert "all is well" in root[1]


@pytest.mark.timeout(400)
def test_the_service_under_systemd(
    root: tuple[Path, str], tmp_path: Path, busybox_image: Path
) -> None:
    """A container that is booted: the unit with all of its hardening, and systemd's watchdog. And
    what needs no more than the package: a guest from HTTPS, and one that goes on from its leaf."""
    place = root[0]
    with nginx(busybox_image) as web:
        trusted = place / "usr/local/share/ca-certificates/tests.crt"
        as_root("install", "-D", "-m644", str(web.authority), str(trusted), seconds=10)
        said = in_container(place, tmp_path, web.tls_url("disk.raw"))
    for words in (
        "a guest boots from HTTPS",
        "the guest has its leaf",
        "Result=success\nNRestarts=0\nActiveState=inactive\n",
        "started by a client",
        "StatusText=",
        "paused",
        "answers after a restart",
        "answers after the watchdog",
        "Watchdog timeout",
        "sandbox:      namespaces",
        "removed",
    ):
        assert words in said, said
    assert "status=1/FAILURE" not in said
    assert "disconnected" not in said  # the backing's helper is there until the server ends


def in_container(place: Path, tmp_path: Path, image: str) -> str:
    """Boot it, and carry out `SCRIPT` in it: what that says."""
    wants = "etc/systemd/system/multi-user.target.wants"
    files = {
        "srv/probe.sh": SCRIPT,
        "etc/systemd/system/probe.service": PROBE,
        "srv/image.url": image,
        "etc/nbdstream/vm1.toml": CONFIG,
        "etc/nbdstream/vm2.toml": PIVOTED,
        # Not half a minute of waiting.
        "etc/systemd/system/nbdstream@.service.d/test.conf": "[Service]\nWatchdogSec=3\n",
    }
    for name, text in files.items():
        (tmp_path / "file").write_text(text)
        as_root("install", "-D", "-m644", str(tmp_path / "file"), str(place / name), seconds=10)
    as_root("mkdir", "-p", str(place / wants), seconds=10)
    as_root("ln", "-s", "../probe.service", str(place / wants / "probe.service"), seconds=10)
    as_root(
        "systemd-nspawn", "--register=no", "--keep-unit", "-q", "-D", str(place), "-b", seconds=300
    )
    return as_root("cat", str(place / "srv/probe.out"), seconds=10)


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

    assert completed("nbdstream", "s") == {"serve", "set", "status", "speed", "stream"}
    assert {"--tls", "--tls-certificates"} <= completed("nbdstream", "serve", "--tl")
    assert completed("nbdstream", "serve", "--tls", "re") == {"require"}


def test_fish_completes_commands_and_options(built: Path) -> None:
    script = built / "tree" / package.COMPLETIONS["fish"]
    programs = f"{Path(sys.executable).parent}:{os.environ['PATH']}"

    def completed(line: str) -> set[str]:
        code = f"source '{script}'; complete -C '{line}'"
        done = subprocess.run(
            ["fish", "--no-config", "-c", code],
            env={"PATH": programs, "HOME": "/nonexistent"},
            capture_output=True,
            text=True,
            check=True,
        )
        return {line.split("\t")[0] for line in done.stdout.splitlines()}

    assert completed("nbdstream s") >= {"serve", "set", "status", "speed", "stream"}
    assert {"--tls", "--tls-certificates"} <= completed("nbdstream serve --tl")
    assert completed("nbdstream serve --tls re") == {"require"}


def test_zsh_completes_commands_and_options(built: Path, tmp_path: Path) -> None:
    """In a shell on a terminal, by the Tab key."""
    functions = (built / "tree" / package.COMPLETIONS["zsh"]).parent
    programs = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    (tmp_path / ".zshrc").write_text(
        f"fpath=({functions} $fpath); path=({programs.replace(':', ' ')})\n"
        "autoload -Uz compinit; compinit -u; PS1='ready> '\n"
    )
    with temporary_directory() as directory:
        terminal = Terminal(directory, ["env", f"ZDOTDIR={tmp_path}", "zsh", "-i"], 100, 24)
        try:
            terminal.wait_for(lambda text: "ready>" in text)
            terminal.press("nbdstream s", "Tab")
            terminal.wait_for(lambda text: all(word in text for word in ("serve", "speed", "stat")))
            terminal.press("C-c")
            terminal.wait_for(lambda text: text.rstrip().endswith("ready>"))
            terminal.press("nbdstream serve --tls re", "Tab")
            terminal.wait_for(lambda text: "nbdstream serve --tls require" in text)
        finally:
            terminal.close()
