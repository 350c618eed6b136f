# SPDX-License-Identifier: Apache-2.0
"""Builds what users install: an sdist, a wheel, and a package for Debian 12.

    python -m install.package [DIRECTORY]

The Debian package has its Python code in /usr/lib/nbdstream, apart from other programs'. Libraries
that Debian 12 does not have, or only older ones, are there as well (`VENDORED`), in the versions
that this checkout's virtual environment was tested with; what Debian has is a dependency.
"""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

from install import man
from nbdstream import __version__

TOP = Path(__file__).resolve().parent.parent

# Pure Python, all of them, so the package is for every architecture.
VENDORED = ("trio", "attrs", "sniffio", "rich", "markdown-it-py", "mdurl", "prometheus-client")
DEPENDS = (
    "python3 (>= 3.11)",
    "python3-click (>= 8.1)",
    "python3-idna",
    "python3-libnbd",
    "python3-outcome",
    "python3-pygments",
    "python3-sortedcontainers",
    "python3-zstandard (>= 0.20)",
    "passwd",
)
# What backings other than NBD need, and what the manual's commands use: with the package alone,
# 'nbdstream boot https://...' boots a guest.
RECOMMENDS = (
    "nbdkit",
    "nbdkit-plugin-python",
    "python3-pycurl",
    "qemu-system-x86",
    "qemu-utils",
    "ca-certificates",
)
SUGGESTS = ("python3-boto3", "libnbd-bin")
HOME = "usr/lib/nbdstream"
LAUNCHER = f"""\
#!/usr/bin/python3 -I
# -I: nothing of the user's directories and variables chooses what this runs.
import sys

sys.path.insert(0, "/{HOME}")

from nbdstream.cli import main

main()
"""
UNITS = ("nbdstream@.service", "nbdstream@.socket")
# The user stays when the package goes: files may belong to it.
POSTINST = f"""\
#!/bin/sh
set -e
if [ "$1" = configure ]; then
    py3compile -p nbdstream /{HOME}
    getent group kvm >/dev/null || groupadd --system kvm
    getent passwd nbdstream >/dev/null || useradd --system --home-dir /var/lib/nbdstream \\
        --no-create-home --shell /usr/sbin/nologin --user-group nbdstream
    if [ -d /run/systemd/system ]; then
        systemctl daemon-reload || true
        if [ -n "$2" ]; then
            systemctl try-restart 'nbdstream@*.service' || true
        fi
    fi
fi
"""
PRERM = """\
#!/bin/sh
set -e
if [ "$1" = remove ] && [ -d /run/systemd/system ]; then
    systemctl stop 'nbdstream@*.socket' 'nbdstream@*.service' || true
fi
py3clean -p nbdstream
"""
POSTRM = """\
#!/bin/sh
set -e
if [ -d /run/systemd/system ]; then
    systemctl daemon-reload || true
fi
"""
# Where each shell looks for completions, by click's name for it.
COMPLETIONS = {
    "bash": "usr/share/bash-completion/completions/nbdstream",
    "zsh": "usr/share/zsh/vendor-completions/_nbdstream",
    "fish": "usr/share/fish/vendor_completions.d/nbdstream.fish",
}


def build_python(directory: Path) -> Path:
    """The sdist, and from it the wheel; returns the wheel. Raises CalledProcessError."""
    _run(sys.executable, "-m", "build", "--outdir", directory, TOP)
    return directory / f"nbdstream-{__version__}-py3-none-any.whl"


def build_debian(wheel: Path, directory: Path) -> Path:
    """The Debian package of a wheel."""
    tree = directory / "tree"
    shutil.rmtree(tree, ignore_errors=True)
    home = tree / HOME
    home.mkdir(parents=True)
    vendored = [f"{name}=={importlib.metadata.version(name)}" for name in VENDORED]
    pip = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    _run(*pip, "--no-deps", "--no-compile", "--target", home, wheel, *vendored)
    shutil.rmtree(home / "bin", ignore_errors=True)
    _write(tree / "usr/bin/nbdstream", LAUNCHER, mode=0o755)
    manuals(tree)
    completions(tree, home)
    documents(tree, home)
    units(tree)
    control(tree)
    result = directory / f"nbdstream_{__version__}_all.deb"
    _run("dpkg-deb", "--root-owner-group", "--build", tree, result)
    return result


def manuals(tree: Path) -> None:
    for page in man.pages():
        place = tree / f"usr/share/man/man{page.section}"
        place.mkdir(parents=True, exist_ok=True)
        _run("gzip", "-9n", man.write(page, place))


def completions(tree: Path, home: Path) -> None:
    """What click says for each shell."""
    for shell, path in COMPLETIONS.items():
        environment = os.environ | {"_NBDSTREAM_COMPLETE": f"{shell}_source"}
        environment["PYTHONPATH"] = str(home)
        command = [sys.executable, "-m", "nbdstream"]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
        text = done.stdout.decode()
        _write(tree / path, _called_each_time(text) if shell == "zsh" else text)


def _called_each_time(script: str) -> str:
    """zsh runs the whole file as a function each time. click's script expects that for the first
    time only, and completes nothing the second time."""
    body, condition, _ = script.partition("\nif [[ $zsh_eval_context[-1] == loadautofunc ]]")
    if not condition:
        raise RuntimeError("click's script for zsh has changed: look at how it ends")
    return f'{body}\n_nbdstream_completion "$@"\n'


def documents(tree: Path, home: Path) -> None:
    """Licences, the changelog, and the README."""
    place = tree / "usr/share/doc/nbdstream"
    place.mkdir(parents=True)
    for name in ("CHANGELOG.md", "README.md", "SECURITY.md"):
        shutil.copyfile(TOP / name, place / name)
    lines = ["nbdstream is under the Apache License 2.0: /usr/share/common-licenses/Apache-2.0", ""]
    lines.append(f"In /{HOME} there are also, with their licences in .dist-info directories:")
    for found in sorted(importlib.metadata.distributions(path=[str(home)]), key=lambda d: d.name):
        metadata = found.metadata
        if found.name != "nbdstream":
            licence = metadata["License-Expression"] or metadata["License"] or "see there"
            lines.append(f"  {found.name} {found.version}: {licence.splitlines()[0]}")
    _write(place / "copyright", "\n".join(lines) + "\n")


def units(tree: Path) -> None:
    """systemd's units, and the directory of the configurations."""
    for name in UNITS:
        text = (TOP / "install" / "systemd" / name).read_text()
        _write(tree / "lib/systemd/system" / name, text)
    (tree / "etc/nbdstream").mkdir(parents=True)


def control(tree: Path) -> None:
    """What dpkg is told."""
    size = sum(path.lstat().st_size for path in tree.rglob("*") if not path.is_dir())
    description = """\
        An NBD server that serves a local image at once. Data that it does not have yet comes on
        demand from a remote one, over NBD, HTTPS, SSH or S3, and a background job fetches the
        rest. Commands boot a guest from a URI, migrate a running guest without shared storage, and
        let QEMU open the image itself when all is local."""
    fields = {
        "Package": "nbdstream",
        "Version": __version__,
        "Architecture": "all",
        "Maintainer": "the nbdstream developers <root@localhost>",
        "Installed-Size": str(size // 1024),
        "Depends": ", ".join(DEPENDS),
        "Recommends": ", ".join(RECOMMENDS),
        "Suggests": ", ".join(SUGGESTS),
        "Section": "admin",
        "Priority": "optional",
        "Description": "boot virtual machines at once from remote disk images\n"
        + textwrap.indent(textwrap.fill(" ".join(description.split()), 76), " "),
    }
    lines = "".join(f"{name}: {value}\n" for name, value in fields.items())
    _write(tree / "DEBIAN/control", lines)
    _write(tree / "DEBIAN/postinst", POSTINST, mode=0o755)
    _write(tree / "DEBIAN/prerm", PRERM, mode=0o755)
    _write(tree / "DEBIAN/postrm", POSTRM, mode=0o755)


def _write(path: Path, text: str, mode: int = 0o644) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(mode)


def _run(*command: str | Path) -> None:
    subprocess.run([str(word) for word in command], check=True)


def main(directory: Path) -> None:
    os.umask(0o022)
    directory.mkdir(parents=True, exist_ok=True)
    wheel = build_python(directory)
    print(build_debian(wheel, directory))


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else TOP / "build" / "package")
