# SPDX-License-Identifier: Apache-2.0
"""A bounds-checked reader of a few bytes.

All option data is taken apart through this class, so that no length sent by a client is
believed: a field that does not fit raises `MalformedError` and never reads less than asked.
"""

from nbdstream.server.constants import MAX_STRING


class MalformedError(ValueError):
    """The bytes do not have the layout that they must have; the message says where."""


class TooMuchError(MalformedError):
    """The layout is right, but there is more than makes sense to look at."""


class Cursor:
    """Reads ``data`` from front to back."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._offset = 0

    @property
    def remaining(self) -> int:
        return len(self._data) - self._offset

    def take(self, length: int) -> bytes:
        """The next ``length`` bytes. Raises MalformedError if there are not as many."""
        if length > self.remaining:
            raise MalformedError(
                f"{length} bytes wanted at byte {self._offset} of {len(self._data)}"
            )
        start = self._offset
        self._offset += length
        return self._data[start : self._offset]

    def u16(self) -> int:
        return int.from_bytes(self.take(2), "big")

    def u32(self) -> int:
        return int.from_bytes(self.take(4), "big")

    def room_for(self, number: int, size: int, limit: int, what: str) -> int:
        """``number``, of items that have at least ``size`` bytes each and are yet to come.

        Raises:
            MalformedError: they do not fit into the data.
            TooMuchError: they are more than ``limit``.
        """
        if number * size > self.remaining:
            raise MalformedError(f"{number} {what} in {self.remaining} bytes")
        if number > limit:
            raise TooMuchError(f"{number} {what}; at most {limit} are accepted")
        return number

    def string(self, length: int) -> str:
        """The next ``length`` bytes as a string ("Conventions": UTF-8, without NUL).

        Raises:
            MalformedError: there are not as many, they are more than a string may have, or they
                are no such string.
        """
        if length > MAX_STRING:
            raise MalformedError(f"a string of {length} bytes; at most {MAX_STRING} are allowed")
        try:
            text = self.take(length).decode()
        except UnicodeDecodeError as error:
            raise MalformedError(f"a string that is not UTF-8: {error}") from error
        if "\0" in text:
            raise MalformedError("a string with a NUL in it")
        return text

    def finish(self) -> None:
        """Check that everything has been read. Raises MalformedError if not."""
        if self.remaining:
            raise MalformedError(f"{self.remaining} bytes too many")


def string_fault(text: str) -> str:
    """What keeps a text from being a string of NBD ("Conventions"): it is "too long", say. "" if
    nothing does."""
    try:
        length = len(text.encode())
    except UnicodeEncodeError:
        return "not UTF-8"
    if "\0" in text:
        return "not free of NUL"
    return "too long" if length > MAX_STRING else ""
