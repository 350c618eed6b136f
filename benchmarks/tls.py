# SPDX-License-Identifier: Apache-2.0
"""Local data through TLS: what encryption costs here and at nbdkit.

As `hotpath`, with certificates for both servers from one authority. libnbd, which fio uses, speaks
GnuTLS; so does nbdkit, and nbdstream OpenSSL.
"""

import shutil
from contextlib import ExitStack
from pathlib import Path

from benchmarks.load import fio, fio_command
from benchmarks.report import Options, Report, judged, median, progress, ratio
from testbed.certificates import make_authority
from testbed.peers import Peer, make_image, nbdkit, nbdstream_serve, temporary_directory

IMAGE_SIZE = 512 << 20
LOADS = {
    "4k randread qd16 IOPS": ("randread", "4k", 16),
    "4k randwrite qd16 IOPS": ("randwrite", "4k", 16),
    "256k read qd16 MB/s": ("read", "256k", 16),
    "256k write qd16 MB/s": ("write", "256k", 16),
    "4k randread qd1 IOPS": ("randread", "4k", 1),
}
TARGET = 0.8


def run(options: Options) -> Report:
    report = Report("Local data through TLS, page cache warm", ["server", *LOADS])
    samples: dict[tuple[str, str], list[float]] = {}
    with temporary_directory() as directory, ExitStack() as stack:
        servers = _servers(directory, stack)
        for peer, _ in servers.values():
            report.add_peer(peer, directory)
        for load, (rw, block, depth) in LOADS.items():
            report.add_recipe(fio_command("URI", rw, block, depth, "--time_based"))
            for _ in range(options.rounds):
                for name, (_, uri) in servers.items():
                    progress(load, name)
                    result = fio(uri, rw, block, depth, options.seconds)
                    figure = result.rate / 1e6 if "MB/s" in load else result.iops
                    samples.setdefault((name, load), []).append(figure)
    medians = {key: median(values) for key, values in samples.items()}
    for name in servers:
        report.rows.append([name, *(medians[name, load] for load in LOADS)])
    for a, b, least in (
        ("nbdstream TLS", "nbdkit TLS", TARGET),
        ("nbdstream TLS", "nbdstream", None),
        ("nbdkit TLS", "nbdkit", None),
    ):
        values = [ratio(medians[a, load], medians[b, load]) for load in LOADS]
        judgements = [value if least is None else judged(value, least=least) for value in values]
        report.ratios.append([f"{a} / {b}", *judgements])
    return report


def _servers(directory: Path, stack: ExitStack) -> dict[str, tuple[Peer, str]]:
    """Each server by name, with the URI for its load."""
    pki = make_authority(directory / "authority").issue(directory / "pki", "server")
    source = directory / "source.raw"
    make_image(source, IMAGE_SIZE, sparse=False)
    ours, theirs = directory / "nbdstream.raw", directory / "nbdkit.raw"
    shutil.copyfile(source, ours)
    source.rename(theirs)
    tls = f"--tls-certificates={pki}"
    # In clear and through TLS on the same socket; the client chooses.
    peers = {
        "nbdstream": stack.enter_context(nbdstream_serve(ours, None, tls, "--tls=on")),
        "nbdkit": stack.enter_context(nbdkit(tls, "--tls=on", "file", theirs)),
    }
    # fio does not let a URI name files, so libnbd knows no authority here.
    secure = {
        f"{name} TLS": (peer, f"{peer.uri.replace('nbd+', 'nbds+', 1)}&tls-verify-peer=false")
        for name, peer in peers.items()
    }
    return {name: (peer, peer.uri) for name, peer in peers.items()} | secure
