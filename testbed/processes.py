# SPDX-License-Identifier: Apache-2.0
"""Processes that run modules of this checkout, and what a process costs, from /proc."""

import os
import resource
from pathlib import Path

TOP = Path(__file__).resolve().parent.parent


def python_environment() -> dict[str, str]:
    """The environment in which `python -m testbed.…` finds this checkout from any directory."""
    path = [str(TOP), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(path)}


def processor_seconds(pid: int) -> float:
    """Processor time, user and system, that the process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def children_seconds() -> float:
    """Processor time of all processes that this one has started and waited for, and of theirs."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def resident_bytes(pid: int, *, peak: bool = False) -> int:
    """Resident memory now, or the most that it ever was."""
    wanted = "VmHWM:" if peak else "VmRSS:"
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(wanted):
            return int(line.split()[1]) * 1024
    raise LookupError(f"/proc/{pid}/status has no {wanted}")


def children(pid: int) -> set[int]:
    """The processes that a process has started and that still run."""
    found = set()
    for task in Path(f"/proc/{pid}/task").iterdir():
        try:
            found |= set(map(int, (task / "children").read_text().split()))
        except (FileNotFoundError, ProcessLookupError):
            continue  # the thread has ended
    return {child for child in found if _runs(child)}


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
