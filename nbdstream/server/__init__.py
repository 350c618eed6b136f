# SPDX-License-Identifier: Apache-2.0
"""The NBD server: the wire, and nothing of disks but `nbdstream.export`.

From the outside in: `server` accepts clients; a `connection` moves the bytes of one
client over its `wire`. Without I/O: `handshake` (with `options`, `cursor`) and
`transmission` (with `requests`, `replies`, `contexts`, `constants`). `execute` is the way
of one request through the disk's async methods. docs/protocol.md says what of the protocol
is supported.
"""
