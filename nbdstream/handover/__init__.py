# SPDX-License-Identifier: Apache-2.0
"""Hand-over: a disk is given away by one process and taken over by another.

`generation` names content that was handed over; `seal` is the durable mark on an image whose
disk has moved; `offer` is the giving side's commands, `standby` the taking side's. What they
all serve: at every instant at most one process may write a disk.
"""
