"""The kernel's byte counters, to check what a codec says it sends against what was sent."""

import os
import socket
import stat
import struct
from pathlib import Path

# tcpi_bytes_sent and tcpi_bytes_retrans in struct tcp_info (linux/tcp.h), there since Linux 4.19.
_SENT_AND_RESENT = struct.Struct("=200x2Q")


def loopback_bytes() -> int:
    """Return the bytes sent over the loopback interface since it came up.

    See `interface_bytes`.
    """
    return interface_bytes("lo")


def interface_bytes(name: str) -> int:
    """Return the bytes sent over a network interface since it came up.

    Counts headers and packets sent twice, and everyone's traffic: a test that reads it wants a
    network namespace (or a machine) to itself. Otherwise use `tcp_bytes_sent`.

    Raises:
        OSError: /proc/net/dev cannot be read or does not list the interface.
    """
    for line in Path("/proc/net/dev").read_text().splitlines():
        interface, _, counters = line.partition(":")
        if interface.strip() == name:
            return int(counters.split()[8])
    raise OSError(f"/proc/net/dev lists no interface {name}")


def tcp_bytes_sent() -> int:
    """Return the bytes this process has sent over the TCP connections it holds open.

    Without packet headers and packets sent twice. Gloo keeps its connections open as long as the
    process group lives, so the difference of two calls in one rank is what that rank sent in
    between, whatever else the machine was doing.

    Raises:
        OSError: the kernel does not count them (older than Linux 4.19, or not Linux).
    """
    total = 0
    for fd in os.listdir("/proc/self/fd"):
        try:
            if not stat.S_ISSOCK(os.fstat(int(fd)).st_mode):
                continue
            connection = socket.socket(fileno=os.dup(int(fd)))
        except OSError:  # closed since it was listed
            continue
        with connection:
            if connection.type == socket.SOCK_STREAM and connection.family != socket.AF_UNIX:
                total += _bytes_sent(connection)
    return total


def _bytes_sent(connection: socket.socket) -> int:
    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _SENT_AND_RESENT.size)
    if len(info) < _SENT_AND_RESENT.size:
        raise OSError("this kernel's TCP_INFO has no tcpi_bytes_sent")
    sent, resent = _SENT_AND_RESENT.unpack(info)
    return int(sent - resent)
