"""What a collective sent, counted from the buffers it handed to the process group."""

import dataclasses


@dataclasses.dataclass
class Traffic:
    """Bytes this rank sent to other ranks, and where the time went.

    Attributes:
        reduce_bytes: On the reduce-scatter leg: payloads to their owners.
        gather_bytes: On the gather leg: the mean, coded again, back to everybody.
        weight_bytes: Weights of a sharded model, from their owners to everybody.
        node_bytes: Inside a node, where the collective has two levels; the others are then what
            travels between nodes.
        exact_bytes: By uncompressed all-reduces, as a ring all-reduce moves them.
        codec_s: Seconds spent encoding, averaging and decoding; on a GPU, queueing it.
        network_s: Seconds spent inside the process group, likewise.
    """

    reduce_bytes: int = 0
    gather_bytes: int = 0
    weight_bytes: int = 0
    node_bytes: int = 0
    exact_bytes: int = 0
    codec_s: float = 0.0
    network_s: float = 0.0

    @property
    def wire_bytes(self) -> int:
        """All bytes sent, but for those that stay inside a node."""
        return self.reduce_bytes + self.gather_bytes + self.weight_bytes + self.exact_bytes

    def keep_inside(self) -> None:
        """Count all of it as sent inside a node."""
        self.node_bytes += self.wire_bytes
        self.reduce_bytes = self.gather_bytes = self.weight_bytes = self.exact_bytes = 0

    def add(self, other: "Traffic") -> None:
        """Add another count to this one."""
        for field in dataclasses.fields(self):
            total = getattr(self, field.name) + getattr(other, field.name)
            setattr(self, field.name, total)


def ring_all_reduce_bytes(num_bytes: int, world_size: int) -> int:
    """Bytes each rank sends in a ring all-reduce of ``num_bytes``."""
    return 2 * num_bytes * (world_size - 1) // world_size


def ring_scatter_bytes(num_bytes: int, world_size: int) -> int:
    """Bytes each rank sends in a ring reduce-scatter or all-gather, ``num_bytes`` unsharded."""
    return num_bytes * (world_size - 1) // world_size
