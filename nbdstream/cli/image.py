# SPDX-License-Identifier: Apache-2.0
"""image: the images of a host's store: pulled, listed, removed, served."""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial

import click
import trio

from nbdstream.cli.detach import detached
from nbdstream.cli.output import emit, say
from nbdstream.cli.params import SIZE
from nbdstream.cli.places import open_store
from nbdstream.cli.run import end_on_signals
from nbdstream.cli.steer import run_on
from nbdstream.cli.watch import watch_job
from nbdstream.errors import StoreError
from nbdstream.qmp.protocol import QMPConnectionError
from nbdstream.store.layout import Image
from nbdstream.store.process import serve_image
from nbdstream.store.resolve import resolve, whole_uri
from nbdstream.store.upkeep import Facts, all_facts, facts_of, remove
from nbdstream.store.upkeep import prune as prune_store
from nbdstream.store.upkeep import pull as pull_image
from nbdstream.store.verify import verify as verify_image
from nbdstream.tasks import open_background_nursery
from nbdstream.units import format_count, format_duration, format_size

# How often `pull --wait` starts over when the image's process is killed.
PULL_ATTEMPTS = 5

_TITLES: tuple[str, ...] = ("IMAGE", "SIZE", "LOCAL", "STORED", "USERS", "LAST USE", "URI")

_store = click.option(
    "--store", default="", metavar="DIR", help="The store.  [default: the host's]"
)
_as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
_image = click.argument("name", metavar="IMAGE")


@click.group()
def image() -> None:
    """Manage the host's image store, which guests share.

    `nbdstream serve --store` and `nbdstream boot --store` fetch through the store: each cluster
    of an image crosses the link once, whatever the number of guests. IMAGE is the beginning of
    an image's ID, or a URI, which means its newest image.
    """


@image.command()
@click.argument("uri")
@_store
@click.option("--wait", is_flag=True, help="Return when the whole image is local; show progress.")
def pull(uri: str, store: str, wait: bool) -> None:
    """Fetch a whole image into the store.

    Prints the image's ID. Without --wait the image is fetched in the background.
    """
    uri = whole_uri(uri)
    found = trio.run(resolve, open_store(store), uri)
    emit(found.id)
    trio.run(pull_image, found, uri)
    if wait:
        _wait(found, uri)


def _wait(found: Image, uri: str) -> None:
    for _ in range(PULL_ATTEMPTS):
        if found.complete:
            return
        try:
            run_on(str(found.control), watch_job)
        except (QMPConnectionError, OSError):
            # The image's process ended: because all is local, or it was killed.
            trio.run(pull_image, found, uri)
    if not found.complete:
        raise StoreError(f"image {found.id}: its process ends too often; see {found.log}")


@image.command()
@_store
@_as_json
def ls(store: str, as_json: bool) -> None:
    """List the images of the store."""
    found = all_facts(open_store(store))
    if as_json:
        emit(json.dumps([_as_dict(facts) for facts in found], indent=4))
        return
    rows = [_TITLES, *map(_row, found)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        say("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _row(facts: Facts) -> tuple[str, ...]:
    record = facts.image.record
    local = f"{100 * facts.local / record.size:.1f} %" + (" (pulling)" if facts.pulling else "")
    age = format_duration(max(time.time() - facts.last_used, 0))
    running = "running" in facts.users_text
    return (
        facts.image.id,
        format_size(record.size),
        local,
        format_size(facts.stored),
        facts.users_text,
        "now" if running else f"{age} ago",
        record.uri,
    )


def _as_dict(facts: Facts) -> dict[str, object]:
    found = facts.image
    return {
        "id": found.id,
        "uri": found.record.uri,
        "identity": found.record.identity,
        "size": found.record.size,
        "local": facts.local,
        "stored": facts.stored,
        "pulling": facts.pulling,
        "created": found.record.created,
        "last-used": facts.last_used,
        "served": facts.served,
        "leaf": str(found.leaf),
        "socket": str(found.socket),
        "control": str(found.control),
        "users": [asdict(user) | {"state": user.state.value} for user in facts.users],
    }


@image.command()
@_image
@_store
@_as_json
def inspect(name: str, store: str, as_json: bool) -> None:
    """Show all that the store knows of an image."""
    facts = facts_of(open_store(store).named(name))
    values = _as_dict(facts)
    if as_json:
        emit(json.dumps(values, indent=4))
        return
    users = values.pop("users")
    for key, value in values.items():
        say(f"{key + ':':<10} {_readable(key, value)}")
    assert isinstance(users, list)
    for user in users:
        process = f", process {user['pid']}" if user["state"] == "running" else ""
        say(f"{'user:':<10} {user['leaf']} ({user['state']}{process})")


def _readable(key: str, value: object) -> str:
    if key in ("size", "local", "stored") and isinstance(value, int):
        return f"{format_size(value)} ({value} bytes)"
    if key in ("created", "last-used") and isinstance(value, float):
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(value))
    return ("yes" if value else "no") if isinstance(value, bool) else str(value)


@image.command()
@_image
@_store
@click.option(
    "--uri", metavar="URI", help="The image's source, if its recorded URI lacks a secret."
)
def verify(name: str, store: str, uri: str | None) -> None:
    """Compare what is local of an image with its source.

    All of that crosses the link once more. Guests can go on meanwhile. The exit status is 1 if
    something differs.
    """
    found = open_store(store).named(name)
    result = trio.run(verify_image, found, whole_uri(uri or found.record.uri))
    for offset, length in result.ranges:
        say(f"differs: {length} bytes at {offset}")
    say(f"{format_size(result.compared)} compared, {format_size(result.differing)} differ")
    if result.differing:
        sys.exit(1)


@image.command()
@click.argument("names", metavar="IMAGE...", nargs=-1, required=True)
@_store
def rm(names: tuple[str, ...], store: str) -> None:
    """Remove images that no guest needs.

    An image is needed by running guests, and by leaves that are not complete: without it they
    could not get the rest of their disk if the image's source has changed.
    """
    place = open_store(store)
    for found in [place.named(name) for name in names]:
        trio.run(remove, place, found)
        say(f"removed {found.id}")


@image.command()
@_store
@click.option(
    "--keep", type=SIZE, required=True, help="Remove unused images beyond this size in total."
)
def prune(store: str, keep: int) -> None:
    """Remove unused images, those first that were used longest ago.

    Images that a guest needs, or that are being pulled, stay. `--keep 0` removes all others.
    """
    place = open_store(store)
    removed = trio.run(prune_store, place, keep)
    for facts in removed:
        say(f"removed {facts.image.id} ({facts.image.record.uri})")
    freed = sum(facts.stored for facts in removed)
    say(f"{format_count(len(removed), 'image')} removed, {format_size(freed)} freed")


@image.command()
@_image
@_store
@click.option(
    "--uri", metavar="URI", help="The image's source, with secrets ('-': read it from stdin)."
)
@click.option("--detach", is_flag=True, help="Go to the background once clients can connect.")
def serve(name: str, store: str, uri: str | None, detach: bool) -> None:
    """Serve an image until it is unused.

    The servers of guests start this by themselves. --uri is needed if the source's URI has a
    password or a token, which the store does not record.
    """
    found = open_store(store).named(name)
    if uri == "-":
        uri = sys.stdin.readline().strip()
    work = partial(_serve_image, found, whole_uri(uri or found.record.uri))
    if detach:
        detached(work, found.log)
    else:
        work(lambda: emit(str(found.socket)))


def _serve_image(found: Image, uri: str, ready: Callable[[], None]) -> None:
    async def main() -> None:
        stop = trio.Event()
        async with open_background_nursery() as nursery:
            await nursery.start(end_on_signals, stop.set)
            await serve_image(found, uri, ready=ready, stop=stop)

    trio.run(main)
