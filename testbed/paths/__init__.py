# SPDX-License-Identifier: Apache-2.0
"""Paths to a backing in virtual time: links, servers, guests and clients, without a clock.

`events` has the queue of events, `network` and `servers` what a path is made of, `guests` who
reads, `client` the rules of the scheduler and the pool around a window, `scenario` a whole
combination, and `judge` what a controller has to reach on it: the best fixed window, found by
search. `python -m testbed.paths --seed N` draws and judges fresh combinations.
"""
