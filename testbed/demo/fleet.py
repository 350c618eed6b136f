# SPDX-License-Identifier: Apache-2.0
"""The demo of a fleet: eight hosts in two racks start guests of one image at the same time.

    ./dev demo fleet [--origin 400M] [--rack 200M] [--data 512M] [--system busybox|debian]

It takes two or three minutes, and needs root for network namespaces.

1. A guest boots once, and its reads are recorded.
2. The image is published: an object store (SeaweedFS), two racks with nginx as their cache, four
   hosts with an image store in each. The origin's link and the racks' links have a rate. A real
   guest boots on one host of each rack, thin on the store's image. On all others a client replays
   what was recorded.
3. In the middle the cache of rack 2 is killed, and started again ten seconds later. One table
   shows how each host fares, and what went over each link.
"""

import argparse
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import trio
from rich.table import Table

from nbdstream.guest.disks import Disk
from nbdstream.tasks import open_background_nursery
from nbdstream.units import format_rate, format_size, parse_size
from testbed.demo.show import Show
from testbed.far import memory_directory
from testbed.fleet.hosts import IMAGE, StoreHost, store_host
from testbed.fleet.network import Machine, Network, network
from testbed.fleet.servers import Nginx, rack_cache, seaweed
from testbed.fleet.trace import Read, Replay, record
from testbed.guests import images
from testbed.guests.systems import BUSYBOX, DEBIAN, System, start
from testbed.link.control import parse_bit_rate
from testbed.peers import temporary_directory

RACKS, HOSTS_EACH = 2, 4
INTERVAL = 1.0
# Seconds for which a rack has no cache, and the part of the image that its hosts have then.
OUTAGE = 10.0
OUTAGE_AT = 0.3
LOCAL_SECONDS = 900.0
# A read that waits longer is shown.
SLOW = 1.0


@dataclass
class View:
    """What is shown of a host. Times in seconds since all began; None: not yet."""

    host: StoreHost
    rack: int
    replay: Replay | None
    begun: float = field(default_factory=time.monotonic)
    up: float | None = None
    local: float = 0.0
    complete: float | None = None

    @property
    def state(self) -> str:
        if self.up is not None:
            return f"up after {self.up:.1f} s"
        if self.replay is None:
            return "boots"
        if self.replay.waits > SLOW:
            return f"waits for {self.replay.waits:.0f} s"
        return f"{self.replay.done} of {len(self.replay.reads)} reads"

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.begun

    def look(self) -> None:
        """See how much is local (worker)."""
        self.local = self.host.local()
        if self.local == 1 and self.complete is None:
            self.complete = self.elapsed


@dataclass
class Link:
    """``read`` returns the bytes that went over it so far."""

    name: str
    read: Callable[[], int]
    before: int = 0
    moved: int = 0
    rate: float = 0.0

    def look(self, seconds: float) -> None:
        """See what has moved in the last so many seconds (worker)."""
        moved = self.read() - self.before
        self.rate, self.moved = (moved - self.moved) / seconds, moved


def main() -> None:
    """Run the demo as the command line says."""
    parser = argparse.ArgumentParser(description="Start guests of one image on eight hosts.")
    parser.add_argument("--origin", default="400M", help="its link, bits per second")
    parser.add_argument("--rack", default="200M", help="each rack's link, bits per second")
    parser.add_argument("--data", default="512M", help="added to the image")
    parser.add_argument("--system", default="busybox", choices=["busybox", "debian"])
    arguments = parser.parse_args()
    origin, rack = (parse_bit_rate(rate) for rate in (arguments.origin, arguments.rack))
    trio.run(demo, arguments.system, parse_size(arguments.data), origin, rack)


@dataclass
class Scene:
    """What the demo consists of once it is built. ``size``: of the image, holes included, which
    cross a web server's link as zeroes."""

    show: Show
    place: Path
    system: System
    size: int
    made: Network
    caches: list[Nginx]
    views: list[View]
    links: list[Link]
    stack: ExitStack


async def demo(system: str, data: int, origin_rate: float | None, rack_rate: float | None) -> float:
    """Run all parts. Returns: bytes over the origin's link / the image's size."""
    show = Show()
    what, directory = (
        (DEBIAN, images.debian()) if system == "debian" else (BUSYBOX, images.busybox())
    )
    with memory_directory() as place, temporary_directory() as short, ExitStack() as stack:
        image = images.copy_image(directory / "disk.raw", place / IMAGE)
        images.grow(image, image.stat().st_size + data, data)
        show.begin("A guest boots once, and its reads are recorded")
        reads = await record(what, image, place)
        total = format_size(sum(read.length for read in reads))
        show.note(f"{len(reads)} reads, {total}, up to the login")
        show.begin("The fleet is built")
        made = stack.enter_context(
            network(place, RACKS, HOSTS_EACH, origin_rate=origin_rate, rack_rate=rack_rate)
        )
        scene = build(show, image, place, short, made, stack, what, reads)
        show.begin("Guests start on all hosts")
        await run(scene)
        return scene.links[0].moved / scene.size


def build(
    show: Show,
    image: Path,
    place: Path,
    short: Path,
    made: Network,
    stack: ExitStack,
    system: System,
    reads: list[Read],
) -> Scene:
    """Publish the image, and start the caches."""
    origin = stack.enter_context(seaweed(made.origin, place / "origin"))
    origin.put(f"images/{IMAGE}", image)
    show.note(f"origin: SeaweedFS has {format_size(image.stat().st_size)} as images/{IMAGE}")
    racks = [rack.cache for rack in made.racks]
    caches = [stack.enter_context(rack_cache(rack, place / rack.name)) for rack in racks]
    show.note(f"{len(racks)} racks: nginx as the cache, {HOSTS_EACH} hosts with a store in each")
    views = []
    for number, machine in enumerate(made.hosts):
        host = stack.enter_context(store_host(machine, short))
        replay = Replay(reads) if number % HOSTS_EACH else None
        views.append(View(host, number // HOSTS_EACH, replay))
    links = [Link("origin", made.origin.sent), *(Link(rack.name, rack.received) for rack in racks)]
    for link in links:
        link.before = link.read()
    size = image.stat().st_size
    image.unlink()
    return Scene(show, place, system, size, made, caches, views, links, stack)


async def run(scene: Scene) -> None:
    """Start everything, kill a cache in the middle, and wait until all is local."""
    show = scene.show
    with show.live(), trio.fail_after(LOCAL_SECONDS):
        async with open_background_nursery() as nursery:
            begun = time.monotonic()
            for view in scene.views:
                view.begun = begun
                nursery.start_soon(_use, scene, view)
            nursery.start_soon(_strike, scene, scene.made.racks[-1].cache)
            while any(view.complete is None or view.up is None for view in scene.views):
                await trio.sleep(INTERVAL)
                await trio.to_thread.run_sync(_look, scene)
                up = sum(view.up is not None for view in scene.views)
                local = sum(view.local for view in scene.views) / len(scene.views)
                moved = ", ".join(f"{link.name} {format_size(link.moved)}" for link in scene.links)
                show.watch(
                    picture(scene), f"{up} guests are up, {100 * local:.0f} % local; {moved}"
                )
            nursery.cancel_scope.cancel()
    show.print(picture(scene))
    show.note(f"over the origin's link / image: {scene.links[0].moved / scene.size:.2f}")


def _look(scene: Scene) -> None:
    for view in scene.views:
        view.look()
    for link in scene.links:
        link.look(INTERVAL)


async def _use(scene: Scene, view: View) -> None:
    """The guest of a host, or the client in its place."""
    opening = view.host.guest("leaf.qcow2", "--thin")
    server = await trio.to_thread.run_sync(scene.stack.enter_context, opening)
    if view.replay is not None:
        await trio.to_thread.run_sync(view.replay.run, server.uri, abandon_on_cancel=True)
        view.up = view.elapsed
        return
    async with start(scene.system, Disk.nbd(server.uri)) as guest:
        await guest.wait_login()
        view.up = view.elapsed
        scene.show.note(f"the guest on {view.host.machine.name} is up")
        await trio.sleep_forever()


async def _strike(scene: Scene, rack: Machine) -> None:
    """Kill the rack's cache in the middle, and start it again later."""
    views = [view for view in scene.views if view.rack == len(scene.caches) - 1]
    while sum(view.local for view in views) / len(views) < OUTAGE_AT:  # noqa: ASYNC110
        await trio.sleep(INTERVAL)
    await trio.to_thread.run_sync(scene.caches[-1].kill)
    scene.show.note(f"{rack.name}: its cache is killed; its hosts go on with what they have")
    await trio.sleep(OUTAGE)
    again = rack_cache(rack, scene.place / rack.name)
    scene.caches[-1] = await trio.to_thread.run_sync(scene.stack.enter_context, again)
    scene.show.note(f"{rack.name}: its cache is back, with what it had on its disk")


def picture(scene: Scene) -> Table:
    """How each host fares, and what went over each link."""
    table = Table(title="Eight hosts, two racks, one image", title_justify="left")
    for heading in ("where", "what", "how it is", "local"):
        table.add_column(heading, no_wrap=True)
    origin, *racks = scene.links
    table.add_row(origin.name, "SeaweedFS", f"sent {_shown(origin, scene.size)}", "")
    for number, link in enumerate(racks):
        table.add_section()
        alive = scene.caches[number].peer.process.poll() is None
        state = "" if alive else "[bold red]DEAD[/], "
        table.add_row(link.name, "nginx", f"{state}received {_shown(link, scene.size)}", "")
        for view in scene.views:
            if view.rack == number:
                after = f" after {view.complete:.0f} s" if view.complete is not None else ""
                kind = "replay" if view.replay is not None else "guest"
                share = f"{100 * view.local:3.0f} %{after}"
                table.add_row(view.host.machine.name, kind, view.state, share)
    return table


def _shown(link: Link, size: int) -> str:
    return f"{link.moved / size:.2f} images, {format_rate(link.rate)}"


if __name__ == "__main__":
    main()
