# SPDX-License-Identifier: Apache-2.0
"""What clients have asked of a server: requests and bytes, by command."""

from nbdstream.server.constants import Command


class Traffic:
    """Counts since the server began. Each list has an entry for each `Command`.

    Attributes:
        done: requests that were carried out.
        bytes: of those; 0 for a flush.
        failed: requests that were not, because of an error below.
        refused: requests that the protocol or the export does not allow.
    """

    def __init__(self) -> None:
        count = max(Command) + 1
        self.done = [0] * count
        self.bytes = [0] * count
        self.failed = [0] * count
        self.refused = [0] * count

    def add(self, command: int, length: int) -> None:
        """A request was carried out."""
        self.done[command] += 1
        self.bytes[command] += length

    def refuse(self, command: int) -> None:
        """A request was refused; its command may be none that we know."""
        if command < len(self.refused):
            self.refused[command] += 1
