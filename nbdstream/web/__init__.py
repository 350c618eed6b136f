# SPDX-License-Identifier: Apache-2.0
"""Images on web servers: a plugin for nbdkit, on libcurl.

script    what nbdkit loads
plugin    nbdkit's callbacks
image     one image: where redirects lead, that it stays the same, what is tried again
exchange  one request for a range, and what may come as its answer
transfers libcurl's event loop, in a thread
answers   what the headers of an answer say
settings  the user's file: credentials, headers, certificates, proxies

It runs in nbdkit's process, in the system's Python, and has to start fast: nothing here imports
another room of the package. Outside of nbdkit only `settings` is used.

Sources: RFC 9110 (ranges, conditional requests, redirects, Retry-After), libcurl's manual pages.
"""
