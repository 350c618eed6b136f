# SPDX-License-Identifier: Apache-2.0
"""The fuzz targets over their corpus, over what once broke a rule, and over fresh inputs."""

import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fuzz.known import KNOWN, is_known_input
from fuzz.mutate import KINDS, edited
from fuzz.target import HERE, NAMES, Checker, Finding, Hang, Target, load

EDITS = st.lists(
    st.tuples(st.integers(0, 1 << 16), st.integers(0, KINDS - 1), st.binary(max_size=7)),
    max_size=8,
)


@pytest.mark.parametrize("name", NAMES)
def test_stored_inputs_keep_the_rules(name: str) -> None:
    target = load(name)
    # An input of the corpus may come by a known finding, a regression may not any more.
    corpus, regressions = Checker(target, tolerate_known=True), Checker(target)
    for data in target.seeds():
        corpus.check(data, thorough=False)
    for path in target.stored():
        if path.parent == target.corpus:
            corpus.check(path.read_bytes(), thorough=False)
        elif not is_known_input(name, path.name):
            regressions.check(path.read_bytes(), thorough=True)
    assert corpus.executions > 0


def test_known_findings_are_still_there() -> None:
    """What is fixed has to leave the list, and becomes a regression like any other."""
    for known in KNOWN:
        for file in known.inputs:
            target = load(known.target)
            with pytest.raises((Exception, Hang)):
                Checker(target).check((target.regressions / file).read_bytes(), thorough=True)


@pytest.mark.parametrize("name", NAMES)
def test_fresh_inputs_keep_the_rules(name: str) -> None:
    target = load(name)
    checker = Checker(target, tolerate_known=True)
    stored = [*target.seeds(), *(path.read_bytes() for path in target.stored())]

    @settings(
        max_examples=target.examples,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.sampled_from(stored), EDITS)
    def check(data: bytes, edits: list[tuple[int, int, bytes]]) -> None:
        checker.check(edited(data, edits)[: target.longest])

    check()


def test_the_corpus_is_small_and_belongs_to_targets() -> None:
    folders = [*(HERE / "corpus").iterdir(), *(HERE / "regressions").iterdir()]
    assert {folder.name for folder in folders} <= set(NAMES)
    total = sum(path.stat().st_size for folder in folders for path in folder.iterdir())
    assert 0 < total < 512 << 10


# -- the checks can fail ---------------------------------------------------------------------


def target(run: object, *, memory: int = 1 << 20, seconds: float = 0.2) -> Target:
    def call(data: bytes) -> object:
        assert callable(run)
        return run(data)

    return Target("test", call, (ValueError,), list, memory=memory, seconds=seconds)


def test_an_error_that_the_target_names_is_a_refusal() -> None:
    Checker(target(lambda data: int(data))).check(b"x", thorough=True)


def test_any_other_error_is_a_finding() -> None:
    with pytest.raises(ZeroDivisionError):
        Checker(target(lambda _data: 1 // 0)).check(b"")


def test_a_hang_is_a_finding_though_the_code_catches_everything() -> None:
    def spin(_data: bytes) -> None:
        while True:
            try:
                sum(range(1000))
            except Exception:
                pass

    with pytest.raises(Hang):
        Checker(target(spin)).check(b"")


def test_growth_is_a_finding() -> None:
    with pytest.raises(Finding, match="growth"):
        Checker(target(lambda _data: len(bytes(2 << 20)))).check(b"", thorough=True)


def test_a_leaked_descriptor_is_a_finding() -> None:
    opened = []

    def leak(_data: bytes) -> None:
        opened.append(open(sys.executable, "rb"))  # noqa: SIM115 - it is to be left open

    with pytest.raises(Finding, match="leak"):
        Checker(target(leak)).check(b"", thorough=True)
    for file in opened:
        file.close()


def test_another_outcome_for_the_same_input_is_a_finding() -> None:
    seen: list[bytes] = []

    def count(data: bytes) -> int:
        seen.append(data)
        return len(seen)

    with pytest.raises(Finding, match="deterministic"):
        Checker(target(count)).check(b"", thorough=True)
