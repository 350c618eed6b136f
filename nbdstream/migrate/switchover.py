# SPDX-License-Identifier: Apache-2.0
"""How far a migration has come, whose copy of the disk counts, and what takes it back.

Pure: no I/O, so that every row of the table in docs/migration.md can be tested. The one
rule that all of it serves: **the source may run again exactly as long as the destination
has not been told to run.** That is `Phase.TOLD`; it is entered before the command is sent,
because it cannot be known whether a command that failed was carried out.
"""

import enum


class Phase(enum.IntEnum):
    """In order; each is entered before its first step is taken."""

    PREPARING = 0  # offer the disks, start the destination
    MEMORY = 1  # the guest runs at the source while its memory is copied
    STOPPED = 2  # the guest stands still, its disks flushed
    SEALING = 3  # the source gives up the right to write
    ACTIVATING = 4  # the destination records what it may rely on
    HANDING = 5  # the rest of the guest's state goes over
    TOLD = 6  # the destination may run: no way back
    RUNNING = 7  # it does; its disks follow
    LOCAL = 8  # nothing depends on the source any more


class Undo(enum.Enum):
    """Steps back, in the order in which they must be taken."""

    QUIT_DESTINATION = "end the QEMU at the destination"
    UNSEAL = "end the offers for good, take the seals off"
    CANCEL_MEMORY = "cancel the migration of memory"
    RESUME_SOURCE = "let the guest go on at the source"
    RESTORE_SETTINGS = "give the source's QEMU its migration settings back"
    DISCARD = "delete what was made at the destination"


# Those that the source's QEMU carries out.
AT_SOURCE = (Undo.CANCEL_MEMORY, Undo.RESUME_SOURCE, Undo.RESTORE_SETTINGS)


class There(enum.Enum):
    """What the destination's QEMU is found to be, when the outcome of `Phase.HANDING` is not
    known."""

    GONE = "it is not there"
    SILENT = "it does not answer"
    WAITING = "it waits for the rest of the guest"
    COMPLETE = "it has all of the guest, and does not run it"
    RUNNING = "it runs the guest"


# Statuses of QEMU's migration: the guest is in two pieces, and neither end can go back.
SPLIT = ("postcopy-active", "postcopy-paused", "postcopy-recover")


PHASE_WORDS = {
    Phase.PREPARING: "preparing the destination",
    Phase.MEMORY: "copying memory",
    Phase.STOPPED: "guest stopped",
    Phase.SEALING: "sealing the source",
    Phase.ACTIVATING: "activating the destination's disks",
    Phase.HANDING: "handing over the guest's state",
    Phase.TOLD: "starting the guest at the destination",
    Phase.RUNNING: "the guest runs at the destination; streaming its disks",
    Phase.LOCAL: "the disks are local",
}


def owner(phase: Phase) -> str:
    """Which end owns the guest and its disks: "source" or "destination"."""
    return "destination" if phase >= Phase.TOLD else "source"


def why_kept(here: str, there: There, *, postcopy: bool) -> str:
    """Why a migration that failed in `Phase.HANDING` may not be taken back; "" if it may.

    The destination may then have the only complete copy of the guest, which nothing but its
    user may end.

    Args:
        here: query-migrate's status at the source, "" if that QEMU does not answer.
        there: what the destination's QEMU is.
        postcopy: whether memory was to go by post-copy.
    """
    if there is There.RUNNING:
        return "the guest runs at the destination already"
    if here in SPLIT or (postcopy and not here):
        return "by post-copy its memory may be there only: continue the guest there"
    if here or there in (There.WAITING, There.GONE):
        return ""
    if there is There.COMPLETE:
        return (
            "the destination has all of the guest, and the source's QEMU does not answer: "
            "once that has ended, continue the guest at the destination (QMP 'cont')"
        )
    return (
        "neither QEMU answers, so nothing was ended: the guest is paused at one of them, or at "
        "both; continue it at one of them, and end the other one before"
    )


def undo(phase: Phase) -> tuple[Undo, ...]:
    """What takes a migration back that failed or was cancelled in this phase.

    The destination's QEMU goes first: it never ran, and now never will. Then the seals, so
    that a source that goes on by itself when its migration is cancelled may write.
    """
    if phase >= Phase.TOLD:
        return ()
    steps = [Undo.QUIT_DESTINATION, Undo.UNSEAL]
    if phase >= Phase.MEMORY:
        steps += [Undo.CANCEL_MEMORY, Undo.RESUME_SOURCE, Undo.RESTORE_SETTINGS]
    return (*steps, Undo.DISCARD)
