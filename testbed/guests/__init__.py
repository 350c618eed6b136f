# SPDX-License-Identifier: Apache-2.0
"""Guests for tests and demos: disk images, and systems that boot from them."""
