# SPDX-License-Identifier: Apache-2.0
"""Options that `serve` and `boot` share: how a leaf becomes local."""

from collections.abc import Callable, Sequence
from typing import Any

import click

from nbdstream.cli.params import RATE
from nbdstream.errors import UsageError

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


class StoreCommand(click.Command):
    """A command with an option ``--store[=DIR]``. click would take the next argument for DIR."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        own = args.index("--") if "--" in args else len(args)
        words = [f"{word}=" if word == "--store" else word for word in args[:own]]
        return super().parse_args(ctx, words + args[own:])


store_option = click.option(
    "--store",
    metavar="DIR",
    help="Fetch through the host's image store (--store, or --store=DIR).",
)


thin_option = click.option(
    "--thin",
    is_flag=True,
    help="Leave the leaf an overlay on the store's image: copy nothing into it (needs --store).",
)


def stream_option(choices: Sequence[str]) -> Decorator:
    """The option ``--stream`` with these choices; the default is ``on``."""
    return click.option(
        "--stream",
        type=click.Choice(choices),
        default="on",
        show_default=True,
        help="Fetch the rest of the disk in the background.",
    )


speed_option = click.option(
    "--speed", type=RATE, default=0, help="Limit of the stream job, bytes per second; 0: none."
)
prefetch_option = click.option(
    "--prefetch",
    metavar="PROFILE",
    default="auto",
    show_default=True,
    help="Fetch first what a boot profile names: auto (that of the image, if known), off, a file.",
)


def check_ending(when_complete: bool, pivot: bool, *, read_only: bool, thin: bool) -> None:
    """How a server is to end by itself, where it can. Raises UsageError."""
    if pivot and read_only:
        raise UsageError(
            "--pivot gives the leaf to the guest's QEMU: it does not go with --read-only"
        )
    if when_complete and thin:
        raise UsageError("--thin: the leaf is never complete; leave out --exit-when-complete")
