# SPDX-License-Identifier: Apache-2.0
"""An emulated link: makes a local server look far away. `python -m testbed.link` is the command."""
