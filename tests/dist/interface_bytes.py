"""Program of test_traffic: LoCo steps on the only traffic of a network namespace of its own.

Prints, as JSON, the bytes that two ranks counted and those that the loopback interface sent.
"""

import fcntl
import json
import os
import socket
import struct

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import commrt
from commrt.testing import loopback_bytes, run_ranks

SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP = 0x8913, 0x8914, 1


def raise_loopback() -> None:
    """A new namespace has its loopback interface down."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        request = fcntl.ioctl(any_socket, SIOCGIFFLAGS, struct.pack("16sh14x", b"lo", 0))
        name, flags = struct.unpack("16sh14x", request)
        fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sh14x", name, flags | IFF_UP))


def step_bytes() -> tuple[int, int]:
    """Of three steps after the first: counted by this rank, and sent over the interface."""
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Sequential(nn.Linear(1024, 1024), nn.Linear(1024, 512)))
    comm = commrt.attach(model)
    inputs = torch.randn(4, 1024)
    model(inputs).sum().backward()
    dist.barrier()
    counted, sent = comm.stats().wire_bytes, loopback_bytes()
    for _ in range(3):
        model(inputs).sum().backward()
    dist.barrier()
    return comm.stats().wire_bytes - counted, loopback_bytes() - sent


if __name__ == "__main__":
    raise_loopback()
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    ranks = run_ranks(step_bytes, world_size=2)
    print(json.dumps({"counted": sum(own for own, _ in ranks), "sent": ranks[0][1]}))
