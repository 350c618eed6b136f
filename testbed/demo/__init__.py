# SPDX-License-Identifier: Apache-2.0
"""The demos, and the three ways of booting and of moving a guest that they compare."""
