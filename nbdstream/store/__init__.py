# SPDX-License-Identifier: Apache-2.0
"""The image store of a host: remote images that many guests share, each fetched once.

docs/store.md describes it. An image is a raw leaf in a directory of its own, served to guests'
servers by one process, which the first user starts and which ends when no server uses the image.
"""
