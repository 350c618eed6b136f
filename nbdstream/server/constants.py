# SPDX-License-Identifier: Apache-2.0
"""The numbers of the NBD protocol, under the names that doc/proto.md gives them.

Names lose their ``NBD_`` prefix and become members of the enum of their kind. The
structs are the fixed-size messages; every integer on the wire is big-endian. Nothing
here does anything; limits that are our own choice come last.
"""

import enum
from struct import Struct

# Magic numbers.
INIT_PASSWD = 0x4E42444D41474943  # "NBDMAGIC"
IHAVEOPT = 0x49484156454F5054  # "IHAVEOPT"
OPTION_REPLY_MAGIC = 0x3E889045565A9
REQUEST_MAGIC = 0x25609513
SIMPLE_REPLY_MAGIC = 0x67446698
STRUCTURED_REPLY_MAGIC = 0x668E33EF


class HandshakeFlag(enum.IntFlag):
    """Sent by the server; the client answers with the same bits (NBD_FLAG_C_...)."""

    FIXED_NEWSTYLE = 1 << 0
    NO_ZEROES = 1 << 1


class TransmissionFlag(enum.IntFlag):
    """What an export can do (NBD_FLAG_...)."""

    HAS_FLAGS = 1 << 0
    READ_ONLY = 1 << 1
    SEND_FLUSH = 1 << 2
    SEND_FUA = 1 << 3
    ROTATIONAL = 1 << 4
    SEND_TRIM = 1 << 5
    SEND_WRITE_ZEROES = 1 << 6
    SEND_DF = 1 << 7
    CAN_MULTI_CONN = 1 << 8
    SEND_RESIZE = 1 << 9
    SEND_CACHE = 1 << 10
    SEND_FAST_ZERO = 1 << 11


class Option(enum.IntEnum):
    """NBD_OPT_..."""

    EXPORT_NAME = 1
    ABORT = 2
    LIST = 3
    STARTTLS = 5
    INFO = 6
    GO = 7
    STRUCTURED_REPLY = 8
    LIST_META_CONTEXT = 9
    SET_META_CONTEXT = 10


class OptionReply(enum.IntEnum):
    """NBD_REP_...; errors have bit 31 set."""

    ACK = 1
    SERVER = 2
    INFO = 3
    META_CONTEXT = 4
    ERR_UNSUP = (1 << 31) + 1
    ERR_POLICY = (1 << 31) + 2
    ERR_INVALID = (1 << 31) + 3
    ERR_PLATFORM = (1 << 31) + 4
    ERR_TLS_REQD = (1 << 31) + 5
    ERR_UNKNOWN = (1 << 31) + 6
    ERR_SHUTDOWN = (1 << 31) + 7
    ERR_BLOCK_SIZE_REQD = (1 << 31) + 8
    ERR_TOO_BIG = (1 << 31) + 9


class Info(enum.IntEnum):
    """NBD_INFO_..."""

    EXPORT = 0
    NAME = 1
    DESCRIPTION = 2
    BLOCK_SIZE = 3


class Command(enum.IntEnum):
    """NBD_CMD_..."""

    READ = 0
    WRITE = 1
    DISC = 2
    FLUSH = 3
    TRIM = 4
    CACHE = 5
    WRITE_ZEROES = 6
    BLOCK_STATUS = 7


class CommandFlag(enum.IntFlag):
    """NBD_CMD_FLAG_..."""

    FUA = 1 << 0
    NO_HOLE = 1 << 1
    DF = 1 << 2
    REQ_ONE = 1 << 3
    FAST_ZERO = 1 << 4


class Chunk(enum.IntEnum):
    """NBD_REPLY_TYPE_..."""

    NONE = 0
    OFFSET_DATA = 1
    OFFSET_HOLE = 2
    BLOCK_STATUS = 5
    ERROR = (1 << 15) + 1
    ERROR_OFFSET = (1 << 15) + 2


CHUNK_DONE = 1  # NBD_REPLY_FLAG_DONE, the only flag of a chunk


class Error(enum.IntEnum):
    """The values of the error field: these numbers, whatever the system's errno are."""

    EPERM = 1
    EIO = 5
    ENOMEM = 12
    EINVAL = 22
    ENOSPC = 28
    EOVERFLOW = 75
    ENOTSUP = 95
    ESHUTDOWN = 108


STATE_HOLE = 1  # base:allocation
STATE_ZERO = 2

# Messages. Handshake:
GREETING = Struct(">QQH")  # INIT_PASSWD, IHAVEOPT, handshake flags
OPTION = Struct(">QII")  # IHAVEOPT, option, length of the data that follows
OPTION_REPLY = Struct(">QIII")  # magic, option, type, length of the data that follows
EXPORT_NAME_REPLY = Struct(">QH")  # size, transmission flags; then perhaps 124 zeroes
INFO_EXPORT = Struct(">HQH")  # type, size, transmission flags
INFO_BLOCK_SIZE = Struct(">HIII")  # type, minimum, preferred, maximum payload
# Transmission:
REQUEST = Struct(">IHHQQI")  # magic, flags, command, cookie, offset, length
SIMPLE_REPLY = Struct(">IIQ")  # magic, error, cookie
CHUNK = Struct(">IHHQI")  # magic, flags, type, cookie, length of the payload
DATA_CHUNK = Struct(">IHHQIQ")  # the same, with the offset that begins its payload
HOLE_CHUNK = Struct(">IHHQIQI")  # the same, and the length of the hole

# Limits.
MAX_STRING = 4096  # "Conventions": a string MUST NOT be longer
MAX_PAYLOAD = 32 << 20  # advertised in NBD_INFO_BLOCK_SIZE: 2^25, the least to support
# A longer write is read and thrown away to answer it properly, up to this length; beyond
# it, "Size constraints" lets us call it a denial of service and hang up.
MAX_SKIPPED_PAYLOAD = 2 * MAX_PAYLOAD
