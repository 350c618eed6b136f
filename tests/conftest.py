# SPDX-License-Identifier: Apache-2.0
"""Fixtures that several modules of tests share."""

from collections.abc import Iterator

import pytest

from testbed.peers import temporary_directory
from tests.pki import Pki, make_pki


@pytest.fixture(scope="module")
def pki() -> Iterator[Pki]:
    with temporary_directory() as directory:
        yield make_pki(directory)
