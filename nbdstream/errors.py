# SPDX-License-Identifier: Apache-2.0
"""What can go wrong, as a tree split by what the caller can do about it.

    NbdstreamError
    ├── UsageError            the caller asked for something that makes no sense
    ├── ProfileError          a boot profile that is none, or is damaged
    ├── StoreError            the host's store of images
    │   └── ImageGoneError        the image was removed meanwhile
    ├── LeafError             the local image
    │   ├── LeafFormatError       not what it claims to be, or damaged
    │   ├── LeafUnsupportedError  well-formed, but uses a feature that we refuse by name
    │   └── LeafInUseError        another process has it open
    └── BackingError          the remote image
        ├── BackingMismatchError  not the image that the leaf belongs to: never retried
        │   └── VerificationError     a block does not fit the root hash
        ├── BackingReadError      the server answered this request with an error
        └── BackingGoneError      the link is down, for longer than we are willing to wait

Each message is one line that says what to do; the command line prints it behind
``nbdstream: error:``. Plain ``OSError`` is left alone where the errno says it all
(a full disk, a missing file): the server maps it to the NBD error of the same name.
"""


class NbdstreamError(Exception):
    """Base of all errors that nbdstream raises on purpose."""


class UsageError(NbdstreamError):
    """An argument that makes no sense, alone or together with another one."""


class ProfileError(NbdstreamError):
    """A file that is not a boot profile, is damaged, or does not fit another one."""


class StoreError(NbdstreamError):
    """Trouble with the host's store of images, or an image that is in use there."""


class ImageGoneError(StoreError):
    """An image is not in the store any more."""


class LeafError(NbdstreamError):
    """Trouble with the local image."""


class LeafFormatError(LeafError):
    """The image is not what it claims to be, or is damaged."""


class LeafUnsupportedError(LeafError):
    """The image is well-formed but uses a feature that is refused by name."""


class LeafInUseError(LeafError):
    """Another process holds the image's lock."""


class BackingError(NbdstreamError):
    """Trouble with the remote image."""


class BackingMismatchError(BackingError):
    """The backing is not the image that the leaf belongs to."""


class VerificationError(BackingMismatchError):
    """A block, or the hash tree that proves it, does not fit the root hash, at the second attempt
    as well: background work stops and says so."""


class BackingReadError(BackingError):
    """The backing's server answered a request with an error, ``errno``; retried later."""

    errno = 0


class BackingGoneError(BackingError):
    """The backing stayed out of reach for longer than the backing timeout."""


# What a piece of background work may fail with, and has to deal with; all else is a bug.
TROUBLE = (NbdstreamError, OSError)


def sole_error(error: BaseException) -> BaseException:
    """The first error of a group, through groups of groups; of anything else itself.

    trio's nurseries wrap even a single error in a group.
    """
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
