# SPDX-License-Identifier: Apache-2.0
"""What has failed for good in a process that goes on serving: its degraded status.

A failure stays where it is (invariant 11), so it has to be shown: ``nbdstream status`` and
the control socket list what is said here.
"""

from collections.abc import Callable

# The first failures are the ones that explain the rest.
KEPT = 16


class Health:
    """Attributes:
    problems: what failed, in one line each, oldest first.
    on_problem: called with each.
    """

    def __init__(self) -> None:
        self.problems: list[str] = []
        self.on_problem: Callable[[str], None] = lambda _problem: None

    def report(self, name: str, error: BaseException) -> None:
        """A part that others do not depend on has failed with this error."""
        problem = f"{name}: {error or type(error).__name__}"
        if problem not in self.problems and len(self.problems) < KEPT:
            self.problems.append(problem)
            self.on_problem(problem)
