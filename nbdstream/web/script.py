# SPDX-License-Identifier: Apache-2.0
"""What nbdkit loads: ``nbdkit python script.py config=FILE``. See `nbdstream.web.plugin`.

nbdkit embeds the system's Python, which does not know where nbdstream is. The sandbox shows it
the package, and not the directory around it, so it cannot be looked for: it is named.
"""

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent.parent
_spec = spec_from_file_location(
    "nbdstream", _PACKAGE / "__init__.py", submodule_search_locations=[str(_PACKAGE)]
)
assert _spec is not None and _spec.loader is not None
sys.modules["nbdstream"] = module_from_spec(_spec)
_spec.loader.exec_module(sys.modules["nbdstream"])

try:
    from nbdstream.web.plugin import (
        after_fork,
        can_multi_conn,
        can_write,
        config,
        config_complete,
        get_size,
        open,  # noqa: A004 - the name is nbdkit's
        pread,
        thread_model,
    )
except ModuleNotFoundError as error:
    if error.name != "pycurl":
        raise
    raise RuntimeError(
        "libcurl's Python module is missing (apt install python3-pycurl; dnf install "
        "python3-pycurl; apk add py3-curl)"
    ) from error

__all__ = [
    "after_fork",
    "can_multi_conn",
    "can_write",
    "config",
    "config_complete",
    "get_size",
    "open",
    "pread",
    "thread_model",
]
API_VERSION = 2
