# SPDX-License-Identifier: Apache-2.0
"""What does a web server cost beside an NBD server? A Debian guest boots over a link of 100
Mbit/s and 50 ms round trip: from NBD, and from HTTPS behind a redirect; then the rate at which an
image becomes local over longer links, beside nbdkit's own curl plugin.

The web server is nginx, the NBD server nbdkit with the same file. The clock of a boot starts
when the guest is asked for, and stops at the login prompt (`benchmarks.boot`). A rate is an
image's size over the life of `serve --exit-when-complete`, starting up and all. nbdkit's curl
plugin is used as `nbdkit:curl?url=...`, without a redirect: it would follow it for every block.

`--seconds` means nothing here.
"""

import contextlib
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import quote

from benchmarks.boot import until_login
from benchmarks.report import Cell, Options, Report, judged, median, progress, ratio
from nbdstream.guest.disks import Disk
from testbed.far import BACKING_THREADS, memory_directory
from testbed.guests.images import debian
from testbed.link.control import link_process
from testbed.link.model import Shape
from testbed.peers import binary, make_image, nbdkit, nbdstream_serve, temporary_directory
from testbed.processes import children_seconds
from testbed.remotes import free_port
from testbed.web import WebServer, nginx

SIZE = 256 << 20
ROUND_TRIPS = (0.0, 0.050)
BOOT_LINK = Shape(rate=100e6, delay=0.025)
REDIRECT = "absolute_redirect off; location /latest/ { rewrite ^/latest/(.*) /$1 redirect; }"

NBD, HTTPS, HTTP1, CURL = "NBD", "HTTPS", "HTTPS, HTTP/1.1", "nbdkit's curl plugin, HTTPS"


@contextlib.contextmanager
def nbd_uri(image: Path, shape: Shape) -> Iterator[str]:
    with nbdkit("file", image, readonly=True, threads=BACKING_THREADS) as server:
        with temporary_directory() as directory:
            with link_process(f"unix:{directory}/l", f"unix:{server.socket}", shape) as link:
                yield link.uri()


@contextlib.contextmanager
def web_url(web: WebServer, path: str, shape: Shape, settings: str = "") -> Iterator[str]:
    """A URL of an image through a link. The server's authority is known."""
    port = free_port()
    with temporary_directory() as directory:
        with link_process(f"127.0.0.1:{port}", f"127.0.0.1:{web.tls_port}", shape):
            place = f"https://localhost:{port}/"
            file = directory / "http.toml"
            file.write_text(f'["{place}"]\nca-file = "{web.authority}"\n{settings}\n')
            os.environ["NBDSTREAM_HTTP"] = str(file)
            yield place + path


@contextlib.contextmanager
def curl_url(web: WebServer, path: str, shape: Shape) -> Iterator[str]:
    with web_url(web, path, shape) as url:
        yield f"nbdkit:curl?url={quote(url)}&cainfo={quote(str(web.authority))}"


def boot(uri: str, directory: Path) -> float:
    """Seconds until a guest's login, from a new leaf."""
    began = time.monotonic()
    with nbdstream_serve(directory / "leaf.raw", uri, "--prefetch", "off") as server:
        return until_login(began, Disk.nbd(server.uri))[0]


def stream(uri: str, directory: Path) -> tuple[float, float]:
    """The rate in MB/s at which an image becomes local, and processor seconds per GiB."""
    command = [binary("NBDSTREAM"), "serve", str(directory / "leaf.raw"), "-b", uri]
    command += ["-U", str(directory / "nbd"), "--prefetch", "off", "--exit-when-complete"]
    used, began = children_seconds(), time.monotonic()
    subprocess.run(command, check=True, timeout=300, stdout=subprocess.DEVNULL)
    took = time.monotonic() - began
    return SIZE / took / 1e6, (children_seconds() - used) * 2**30 / SIZE


Way = Callable[[Path, WebServer, Shape, str], contextlib.AbstractContextManager[str]]
WAYS: dict[str, Way] = {
    NBD: lambda image, _web, shape, _path: nbd_uri(image, shape),
    HTTPS: lambda _image, web, shape, path: web_url(web, path, shape),
    HTTP1: lambda _image, web, shape, path: web_url(web, path, shape, "http2 = false"),
}


def run(options: Options) -> Report:
    columns = ["boot after s"]
    columns += [f"{1000 * rtt:g} ms {unit}" for rtt in ROUND_TRIPS for unit in ("MB/s", "s/GiB")]
    report = Report("A web server beside an NBD server", ["", *columns])
    report.notes.append("boot: 100 Mbit/s, 50 ms; HTTPS behind a redirect. Rates: unlimited link.")
    report.notes.append("s/GiB: processor seconds of the receiving side per GiB streamed.")
    boots: dict[str, list[float]] = {}
    rates: dict[tuple[str, float], list[tuple[float, float]]] = {}
    with memory_directory() as root:
        image = debian() / "disk.raw"
        with nginx(image.parent, REDIRECT) as web:
            for _ in range(options.rounds):
                for name, way in WAYS.items():
                    with way(image, web, BOOT_LINK, "latest/disk.raw") as uri:
                        with temporary_directory() as scratch:
                            boots.setdefault(name, []).append(boot(uri, scratch))
                    progress(name, f"{boots[name][-1]:.1f} s")
        image = root / "far.raw"
        make_image(image, SIZE, sparse=False)
        ways = WAYS | {CURL: lambda _image, web, shape, path: curl_url(web, path, shape)}
        with nginx(root) as web:
            for round_trip in ROUND_TRIPS:
                for _ in range(options.rounds):
                    for name, way in ways.items():
                        progress(f"{1000 * round_trip:g} ms", name)
                        with way(image, web, Shape(delay=round_trip / 2), "far.raw") as uri:
                            with memory_directory() as scratch:
                                sample = stream(uri, scratch)
                        rates.setdefault((name, round_trip), []).append(sample)
    report.add_link("--rate", "100M", "--delay", "25ms")
    report.add_recipe(["nbdstream", "serve", "leaf.raw", "-b", "URI", "--exit-when-complete"])
    _fill(report, boots, rates)
    return report


def _fill(
    report: Report,
    boots: dict[str, list[float]],
    rates: dict[tuple[str, float], list[tuple[float, float]]],
) -> None:
    login = {name: median(found) for name, found in boots.items()}
    rate = {key: median(sample[0] for sample in found) for key, found in rates.items()}
    cost = {key: median(sample[1] for sample in found) for key, found in rates.items()}
    for name in [*WAYS, CURL]:
        figures: list[Cell] = [
            figures[name, rtt] for rtt in ROUND_TRIPS for figures in (rate, cost)
        ]
        report.rows.append([name, login.get(name), *figures])
    blank: list[Cell] = [None] * (2 * len(ROUND_TRIPS))
    boot_ratio = judged(ratio(login[HTTPS], login[NBD]), most=1.1)
    report.ratios.append(["boot from HTTPS behind a redirect / from NBD", boot_ratio, *blank])
    against_curl: list[Cell] = [
        cell for rtt in ROUND_TRIPS for cell in (ratio(rate[HTTPS, rtt], rate[CURL, rtt]), None)
    ]
    report.ratios.append(["rate / that of nbdkit's curl plugin", None, *against_curl])
