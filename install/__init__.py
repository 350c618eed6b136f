# SPDX-License-Identifier: Apache-2.0
"""What makes the project installable: packages and man pages."""
