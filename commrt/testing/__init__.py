"""Helpers for multi-rank tests, shipped so that users can test their own codecs.

run_ranks(fn, ...)    run a function on several real processes joined by a process group
tcp_bytes_sent()      bytes this process has sent over its open TCP connections
interface_bytes(name) bytes the whole machine has sent over a network interface
loopback_bytes()      bytes the whole machine has sent over the loopback interface
"""

from commrt.testing.counters import interface_bytes, loopback_bytes, tcp_bytes_sent
from commrt.testing.multirank import RankError, run_ranks

__all__ = ["RankError", "interface_bytes", "loopback_bytes", "run_ranks", "tcp_bytes_sent"]
