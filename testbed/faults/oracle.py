# SPDX-License-Identifier: Apache-2.0
"""What a disk may show: cell by cell, after writes that were acknowledged, failed or cut off.

Each cell is filled with one pattern that names its writer, so a byte of another place, of an
older life or of uninitialised memory is recognised. Each client changes cells of its own.
"""

from dataclasses import dataclass, field

CELL = 512
ZERO = bytes(CELL)


def backing_cell(cell: int) -> bytes:
    return (b"B%07d" % cell) * (CELL // 8)


def written_cell(client: int, serial: int) -> bytes:
    return (b"%d:%06d" % (client, serial)) * (CELL // 8)


@dataclass
class Cell:
    """`now`: what a read may show. `durable`: what may be there after a crash."""

    now: set[bytes]
    durable: set[bytes]


@dataclass
class Oracle:
    """The possible contents of every cell."""

    cells: list[Cell]
    broken: list[str] = field(default_factory=list)

    @classmethod
    def of_backing(cls, count: int) -> "Oracle":
        contents = (backing_cell(cell) for cell in range(count))
        return cls([Cell({content}, {content}) for content in contents])

    def begin(self, cells: range, content: bytes) -> None:
        """A change is under way: old and new are possible."""
        for cell in cells:
            self.cells[cell].now |= {content}
            self.cells[cell].durable |= {content}

    def acknowledge(self, cells: range, content: bytes) -> None:
        for cell in cells:
            self.cells[cell].now = {content}

    def flushed(self, owned: list[int]) -> None:
        """A flush that began after every change of these cells had ended was acknowledged."""
        for cell in owned:
            self.cells[cell].durable = set(self.cells[cell].now)

    def check(self, data: bytes, first: int, what: str, *, durable: bool = False) -> None:
        """Note every cell of `data` that shows what it must not."""
        for index in range(len(data) // CELL):
            got = bytes(data[index * CELL : (index + 1) * CELL])
            cell = self.cells[first + index]
            allowed = cell.durable if durable else cell.now
            if got not in allowed:
                wanted = sorted(value[:8] for value in allowed)
                self.broken.append(f"{what}: cell {first + index} shows {got[:8]!r}, not {wanted}")
