# SPDX-License-Identifier: Apache-2.0
"""What `./dev soak load` calls growth."""

from dataclasses import replace

import pytest

from testbed.load import MIB, Held, grown

HELD = Held(resident=50 * MIB, descriptors=25, threads=1, tasks=28, objects=1000)


def history(each: str, values: list[int]) -> list[tuple[float, Held]]:
    return [(float(minute), replace(HELD, **{each: value})) for minute, value in enumerate(values)]


@pytest.mark.parametrize(
    ("each", "step"),
    [("resident", MIB), ("descriptors", 1), ("threads", 1), ("tasks", 1), ("objects", 200)],
)
def test_what_grows_a_little_in_each_round_is_found(each: str, step: int) -> None:
    (found,) = grown(history(each, [getattr(HELD, each) + step * n for n in range(40)]))
    assert found.startswith(f"{each} grew")


def test_a_higher_value_now_and_then_is_no_growth() -> None:
    for each in ("resident", "descriptors", "threads", "tasks", "objects"):
        values = [getattr(HELD, each) * (1 + (n % 10 == 9)) for n in range(40)]
        assert grown(history(each, values)) == []


def test_what_is_allocated_at_the_start_is_no_growth() -> None:
    assert grown(history("descriptors", [5, 12, 20, *[25] * 40])) == []
