# SPDX-License-Identifier: Apache-2.0
"""Sockets that know nothing of what is said over them: addresses, listeners."""
