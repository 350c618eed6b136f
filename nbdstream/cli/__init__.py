# SPDX-License-Identifier: Apache-2.0
"""The command line: ``nbdstream COMMAND …``.

Each module here holds a few commands and nothing that another program could not do
with the package: parse, call, print. Errors go to stderr as one line, ``nbdstream:
error: …``, with exit status 1; bad usage ends with status 2, as click has it.
"""

import importlib
import logging
import os
import signal
import sys
from typing import Any

import click

import nbdstream
from nbdstream.cli.output import say
from nbdstream.errors import TROUBLE, NbdstreamError, UsageError, sole_error
from nbdstream.text import shown

# The commands, in the sections of `nbdstream --help`, each with its module. A module is
# imported only when its command is used: `nbdstream info` should not wait for QEMU's or
# Prometheus' modules to load.
_SECTIONS = {
    "Serve a disk": {
        "serve": "nbdstream.cli.serve",
        "boot": "nbdstream.cli.boot",
        "migrate": "nbdstream.cli.migrate",
        "pivot": "nbdstream.cli.pivot",
    },
    "Control a running server": {
        "status": "nbdstream.cli.steer",
        "watch": "nbdstream.cli.watch",
        "report": "nbdstream.cli.report",
        "pause": "nbdstream.cli.steer",
        "resume": "nbdstream.cli.steer",
        "speed": "nbdstream.cli.steer",
        "cancel": "nbdstream.cli.steer",
        "stream": "nbdstream.cli.steer",
        "set": "nbdstream.cli.parameters",
        "rebase": "nbdstream.cli.parameters",
    },
    "Share images among guests": {
        "image": "nbdstream.cli.image",
    },
    "Work with image files": {
        "create": "nbdstream.cli.images",
        "info": "nbdstream.cli.images",
        "map": "nbdstream.cli.images",
        "check": "nbdstream.cli.images",
        "profile": "nbdstream.cli.profile",
    },
}
_COMMANDS = {name: module for section in _SECTIONS.values() for name, module in section.items()}
# It is on no package index, and so no dependency that pip could install.
_NO_LIBNBD = (
    "libnbd's Python module is not installed for this Python: install python3-libnbd (Debian, "
    "Ubuntu, Fedora) or libnbd (Alpine); a virtual environment needs --system-site-packages to "
    "see it"
)
# Summaries are wrapped at the terminal's width and never cut.
_WHOLE_SUMMARY = 1000


# What messages of these levels begin with; others as the library calls them.
_LEVELS = {logging.WARNING: "warning", logging.ERROR: "error", logging.CRITICAL: "error"}


class _Formatter(logging.Formatter):
    """Log records with no control characters and no secrets in them, wherever they are from."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        level = _LEVELS.get(record.levelno, record.levelname)
        return shown(f"nbdstream: {level}: {super().formatMessage(record)}")

    def formatException(self, ei: Any) -> str:  # noqa: N802 - logging's name
        return shown(super().formatException(ei), keep="\n")


class _LazyGroup(click.Group):
    """A group whose commands are imported when they are used, and listed by section."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module = importlib.import_module(_COMMANDS[cmd_name])
        command: click.Command = getattr(
            module, {"map": "map_", "set": "set_"}.get(cmd_name, cmd_name)
        )
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for title, section in _SECTIONS.items():
            with formatter.section(title):
                formatter.write_dl(
                    [(name, self._summary(ctx, name)) for name in section],
                    col_max=max(map(len, _COMMANDS)),
                )

    def _summary(self, ctx: click.Context, name: str) -> str:
        command = self.get_command(ctx, name)
        assert command is not None
        return command.get_short_help_str(limit=_WHOLE_SUMMARY)


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(nbdstream.__version__, prog_name="nbdstream")
@click.option(
    "-v",
    "--verbose",
    count=True,
    help="Print more messages on stderr; give it twice for debugging.",
)
@click.option(
    "--log-format",
    type=click.Choice(["text", "json", "journal"]),
    default="text",
    show_default=True,
    help="Log for people, as JSON, or to systemd's journal; the last two with every event.",
)
def cli(verbose: int, log_format: str) -> None:
    """Boot virtual machines at once from remote disk images.

    nbdstream is an NBD server. It serves a local leaf image (qcow2, QED or raw). Data
    that the leaf does not have yet is fetched on demand from a slow remote backing
    export. A background job streams the rest until the whole disk is local.
    """
    level = (logging.WARNING, logging.INFO, logging.DEBUG)[min(verbose, 2)]
    handler: logging.Handler = logging.StreamHandler()
    handler.setFormatter(_Formatter("%(message)s"))
    if log_format != "text":
        from nbdstream.cli.log import machine_handler

        handler = machine_handler(log_format)
    logging.basicConfig(handlers=[handler], level=level)


def main() -> None:
    """The ``nbdstream`` program."""
    try:
        cli(prog_name="nbdstream")
    except (NbdstreamError, OSError, ExceptionGroup) as error:
        sys.exit(_report(error))
    except ModuleNotFoundError as error:
        if error.name != "nbd":
            raise
        say(f"nbdstream: error: {_NO_LIBNBD}", err=True)
        sys.exit(1)


def _report(error: BaseException) -> int:
    """Tell of an error of ours in one line; return the exit status. Others are raised."""
    if isinstance(error, ExceptionGroup) and error.split(TROUBLE)[1] is not None:
        raise error
    error = sole_error(error)
    if isinstance(error, BrokenPipeError):
        # The reader of our output has gone (`nbdstream map … | head`): end as quietly as
        # other programs do. Python would complain once more while it flushes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    say(f"nbdstream: error: {describe(error)}", err=True)
    return 2 if isinstance(error, UsageError) else 1


def describe(error: BaseException) -> str:
    """An error as one line for a person; text from elsewhere in it is made safe to print."""
    if isinstance(error, OSError) and error.strerror:
        place = f"{error.filename}: " if error.filename else ""
        return shown(f"{place}{error.strerror}")
    return shown(" ".join(str(error).split())) or type(error).__name__
