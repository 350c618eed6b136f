# SPDX-License-Identifier: Apache-2.0
"""``python -m nbdstream``: the same as the ``nbdstream`` program."""

from nbdstream.cli import main

main()
