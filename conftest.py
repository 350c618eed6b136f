# SPDX-License-Identifier: Apache-2.0
"""What holds for every test of the checkout: no skips, and guests' images for those that ask."""

pytest_plugins = ["testbed.strict", "testbed.guests.fixtures"]
