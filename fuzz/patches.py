# SPDX-License-Identifier: Apache-2.0
"""What a target changes in the code under test, for the length of one input.

Limits are made smaller, so that short inputs reach what lies beyond them; a log of errors that
"cannot happen" is made a finding.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, NoReturn


@contextmanager
def patched(module: ModuleType, **values: object) -> Iterator[None]:
    """Set attributes of a module for the length of the block; each of them has to exist."""
    missing = [name for name in values if not hasattr(module, name)]
    if missing:
        raise AttributeError(f"{module.__name__} has no {missing[0]}: adapt the target")
    before = {name: getattr(module, name) for name in values}
    vars(module).update(values)
    try:
        yield
    finally:
        vars(module).update(before)


class Loud:
    """In the place of a module's logger: what it would log as an error is raised."""

    def error(self, message: str, *arguments: object, exc_info: Any = None) -> NoReturn:
        """See `logging.Logger.error`."""
        raise AssertionError(message % arguments) from exc_info

    exception = error
