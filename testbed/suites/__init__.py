# SPDX-License-Identifier: Apache-2.0
"""The peers' own suites, with our server in the place of qemu-nbd.

QEMU's iotests and libnbd's tests start qemu-nbd and look at what its clients see. Each is run
twice: with qemu-nbd, and with a stand-in that starts ``nbdstream serve``. What fails with ours
alone is a difference that users of qemu-nbd would find. `./dev suites` runs them.
"""
