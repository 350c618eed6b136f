# SPDX-License-Identifier: Apache-2.0
"""Local images: open and create them, whatever their format."""
