# SPDX-License-Identifier: Apache-2.0
"""An nbdkit Python plugin: a file whose reads take as long as a server's may.

Parameters: `file`; `tiers=SECONDS,SECONDS` for its first and its second half, or
`random=SECONDS,SECONDS` for anything between the two.
"""

import os
import random
import time
from typing import Any

import nbdkit

API_VERSION = 2

_parameters: dict[str, str] = {}


def thread_model() -> int:
    model: int = nbdkit.THREAD_MODEL_PARALLEL
    return model


def config(key: str, value: str) -> None:
    _parameters[key] = value


def open(readonly: bool) -> dict[str, Any]:  # noqa: A001 - nbdkit's name
    fd = os.open(_parameters["file"], os.O_RDONLY)
    return {"fd": fd, "size": os.fstat(fd).st_size}


def close(h: dict[str, Any]) -> None:
    os.close(h["fd"])


def get_size(h: dict[str, Any]) -> int:
    size: int = h["size"]
    return size


def can_write(h: dict[str, Any]) -> bool:
    return False


def can_multi_conn(h: dict[str, Any]) -> bool:
    return True


def pread(h: dict[str, Any], buf: bytearray, offset: int, flags: int) -> None:
    time.sleep(_seconds(offset, h["size"]))
    os.preadv(h["fd"], [buf], offset)


def _seconds(offset: int, size: int) -> float:
    if "tiers" in _parameters:
        first, second = map(float, _parameters["tiers"].split(","))
        return first if offset < size // 2 else second
    low, high = map(float, _parameters.get("random", "0,0").split(","))
    return random.uniform(low, high)
