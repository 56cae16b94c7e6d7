"""Frames that leave the machine, and how they are read when nothing about them can be trusted.

A frame is ``version and kind | round | body | check``::

    version and kind   1 byte    WIRE_VERSION in the high half
    round              1 byte    the round's lowest eight bits
    body               the rest
    check              4 bytes   CRC-32, little endian

The check covers, besides the frame, a context that both ends know and nobody sends: the codec, the
layout, the whole number of the round, the client, the states that predictions are made from. So a
frame that comes to the wrong place, or meets the wrong state, is refused as a damaged one is.
"""

import enum
import struct
import zlib

from commrt.codecs.base import told
from commrt.errors import WireFormatError

WIRE_VERSION = 1
HEAD_BYTES = 2
CHECK_BYTES = 4


class Kind(enum.IntEnum):
    """What a frame says."""

    PARAMETERS = 1
    UPDATE = 2
    REQUEST = 3
    ANSWER = 4


def context_of(*known: int | str) -> bytes:
    """What both ends know, as bytes."""
    return told(known)


def seal(kind: Kind, round_index: int, body: bytes, context: bytes) -> bytes:
    """The frame around ``body``, 6 bytes longer."""
    head = bytes((WIRE_VERSION << 4 | kind, round_index & 0xFF))
    check = zlib.crc32(body, zlib.crc32(head, zlib.crc32(context)))
    return b"".join((head, body, struct.pack("<I", check)))


def unseal(kind: Kind, round_index: int, frame: bytes, context: bytes) -> bytes:
    """The body of a frame.

    Raises:
        WireFormatError: The frame is damaged, or is not what is expected; says in what.
    """
    if len(frame) < HEAD_BYTES + CHECK_BYTES:
        raise WireFormatError(f"a frame of {len(frame)} bytes: has at least 6")
    version, found = frame[0] >> 4, frame[0] & 0xF
    if version != WIRE_VERSION:
        raise WireFormatError(f"a frame of version {version}: must be of {WIRE_VERSION}")
    if found != kind:
        raise WireFormatError(f"a frame of kind {found}: must be {kind.name.lower()}, {kind:d}")
    if frame[1] != round_index & 0xFF:
        raise WireFormatError(f"a frame of round {frame[1]}, mod 256: is round {round_index}")
    whole, (check,) = memoryview(frame)[:-CHECK_BYTES], struct.unpack("<I", frame[-CHECK_BYTES:])
    if zlib.crc32(whole, zlib.crc32(context)) != check:
        raise WireFormatError("the check fails: a damaged frame, or of another client or state")
    return frame[HEAD_BYTES:-CHECK_BYTES]


def check_of(frame: bytes) -> int:
    """What a sealed frame ends with, by which it is told from others.

    A CRC-32 of the whole frame would not tell it: over a message and its own check it is the same
    for all messages of that length.
    """
    return int.from_bytes(frame[-CHECK_BYTES:], "little")


def varint(number: int) -> bytes:
    """LEB128: seven bits a byte, the lowest first."""
    encoded = bytearray()
    while number >= 0x80:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)


class Reader:
    """Takes a body apart; every take checks that there is so much.

    Raises:
        WireFormatError: From any method, where the body is too short or the number too large.
    """

    def __init__(self, body: bytes) -> None:
        self._body = body
        self._at = 0

    @property
    def left(self) -> int:
        """Bytes not yet taken."""
        return len(self._body) - self._at

    def take(self, num_bytes: int) -> bytes:
        """The next bytes."""
        if not 0 <= num_bytes <= self.left:
            raise WireFormatError(f"{num_bytes} bytes expected where {self.left} are left")
        self._at += num_bytes
        return self._body[self._at - num_bytes : self._at]

    def unpack(self, form: str) -> tuple[int | float, ...]:
        """What ``struct`` makes of the next bytes, in little endian."""
        return struct.unpack("<" + form, self.take(struct.calcsize("<" + form)))

    def varint(self, most: int) -> int:
        """A number of at most ``most``."""
        number = 0
        for shift in range(0, 63, 7):
            byte = self.take(1)[0]
            number |= (byte & 0x7F) << shift
            if byte < 0x80:
                break
        if number > most or byte >= 0x80:
            raise WireFormatError(f"a number of {number} or more where {most} is the most")
        return number

    def end(self) -> None:
        """Nothing may be left."""
        if self.left:
            raise WireFormatError(f"{self.left} bytes too many")
