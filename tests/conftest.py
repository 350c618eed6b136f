# SPDX-License-Identifier: Apache-2.0
"""What all tests share: a missing peer skips a trio test too."""

from collections.abc import Generator

import pytest

from testbed.peers import MissingPeer


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None, object, object]:
    """pytest knows a skip by its type, which trio's nurseries hide in an exception group."""
    try:
        return (yield)
    except BaseExceptionGroup as group:
        missing, rest = group.split(MissingPeer)
        if missing is None or rest is not None:
            raise
        first: BaseException = missing
        while isinstance(first, BaseExceptionGroup):
            first = first.exceptions[0]
        pytest.skip(str(first))
