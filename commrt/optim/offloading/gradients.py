"""How gradients come to the host: as they are, in bf16, or by a codec."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from commrt import ops
from commrt.codecs import BlockCodec, parse
from commrt.codecs.base import Window
from commrt.collectives import order
from commrt.errors import ConfigError
from commrt.optim.offloading.chunks import Row
from commrt.optim.offloading.link import Copies, Copy
from commrt.optim.parts import Part
from commrt.optim.sections import Layout
from commrt.optim.shards import Piece

_LEAST_CODED_NUMEL = 1024


class Gradients:
    """Brings gradients to the host.

    Args:
        spec: "none": as they are; "bf16"; or the spec string of a block or LoCo codec, which holds
            for tensors of two dimensions or more and 1,024 elements.
        seed_of: Of a tensor's random numbers in a step.

    Raises:
        ConfigError: It is another one.
    """

    def __init__(self, spec: str, seed_of: Callable[[Layout, int], int]) -> None:
        self.spec, self._seed_of = spec, seed_of
        self.codec: BlockCodec | None = None
        if spec not in ("none", "bf16"):
            codec = parse(spec)
            if not isinstance(codec, BlockCodec):
                raise ConfigError(f"grads={spec!r}: must be none, bf16, or a loco or block codec")
            self.codec = codec
        self._coded: dict[Layout, _Coded] = {}
        self._sent: set[Layout] = set()

    def begin(self) -> None:
        """Another step: gradients are new."""
        self._sent.clear()

    def dtype(self, weights: torch.dtype) -> torch.dtype:
        """Of the host's copies."""
        return torch.bfloat16 if self.spec == "bf16" else weights

    def is_coded(self, layout: Layout) -> bool:
        """Whether the codec holds for a tensor."""
        is_large = layout.numel >= _LEAST_CODED_NUMEL
        return self.codec is not None and is_large and len(layout.shard.shape) > 1

    def bytes_of(self, layout: Layout, weights: torch.dtype) -> int:
        """That come for a tensor."""
        if self.codec is not None and self.is_coded(layout):
            return self.codec.payload_bytes(self.codec.num_blocks(layout.numel))
        return layout.numel * self.dtype(weights).itemsize

    @property
    def is_exact(self) -> bool:
        """Whether the host has the gradients as they are."""
        return self.spec == "none"

    def arriving(self, host: Part, device: Part, pieces: Sequence[Piece]) -> Copies:
        """What has to be copied of some rows; a coded tensor all at once, with its first rows."""
        if self.is_coded(host.layout):
            if host.layout in self._sent:
                return []
            self._sent.add(host.layout)
            seed = self._seed_of(device.layout, device.step)
            return [self._coded[device.layout].encode(device.grad, seed)]
        if device.grad.element_size() > host.grad.element_size() and self.is_exact:
            raise ConfigError(
                f"a gradient of {host.layout.shard.name!r} is {device.grad.dtype}: must be "
                f"{host.grad.dtype}, as the weights are, unless grads is bf16 or a codec"
            )
        return [
            Copy(piece.elements_of(host.grad), piece.elements_of(device.grad).to(host.grad.dtype))
            for piece in pieces
        ]

    def decode(self, layout: Layout, piece: Piece, scratch: Tensor) -> None:
        """Rows that have arrived, to where :meth:`decoded` says."""
        self._coded[layout].decode(piece, scratch)

    def decoded(self, piece: Piece, scratch: Tensor) -> Tensor:
        """Where in ``scratch`` rows are decoded to, fp32."""
        assert self.codec is not None
        begin = piece.start % self.codec.block
        return scratch[begin : begin + piece.rows * piece.cols]

    def scratch_numel(self, row: Row) -> int:
        """Elements that :meth:`decode` needs."""
        assert self.codec is not None
        return row.piece.rows * row.piece.cols + 2 * self.codec.block

    def residual(self, layout: Layout) -> Tensor | None:
        """What the codec still owes of a tensor, fp32 and flat, if it has a memory."""
        coded = self._coded.get(layout)
        return None if coded is None else coded.residual()

    def owe(self, layout: Layout, value: Tensor) -> bool:
        """Owe this much of a tensor; returns whether that can be."""
        if not self.is_coded(layout):
            return not value.count_nonzero()
        return self._coded[layout].owe(value)

    def reserve(self, layout: Layout, like: Tensor) -> None:
        """Memory for a coded tensor, before its first gradient."""
        assert self.codec is not None
        self._coded[layout] = _Coded(self.codec, like.numel(), like.device)

    def forget_owed(self) -> None:
        """Owe nothing."""
        for coded in self._coded.values():
            coded.forget()


class _Coded:
    """A tensor's gradient on its way, and what the codec owes of it."""

    def __init__(self, codec: BlockCodec, numel: int, device: torch.device) -> None:
        self._codec, self._numel = codec, numel
        self._window = Window(0, codec.num_blocks(numel), 0)
        num_bytes = codec.payload_bytes(self._window.num_blocks)
        self._payload = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
        pinned = order.is_queued(device)
        self._received = torch.zeros(num_bytes, dtype=torch.uint8, device="cpu", pin_memory=pinned)
        self._residual: Tensor | None = None
        if codec.residual_fmt is not None:
            size = codec.residual_bytes(numel)
            self._residual = torch.zeros(size, dtype=torch.uint8, device=device)

    def encode(self, grad: Tensor, seed: int) -> Copy:
        self._codec.encode(grad, self._payload, self._window, residual=self._residual, seed=seed)
        return Copy(self._received, self._payload)

    def decode(self, piece: Piece, scratch: Tensor) -> None:
        block, numel = self._codec.block, piece.rows * piece.cols
        first, after = piece.start // block, -(-(piece.start + numel) // block)
        covered = scratch[: min(after * block, self._numel) - first * block]
        self._codec.decode(self._received, covered, Window(0, after - first, first))

    def residual(self) -> Tensor | None:
        if self._residual is None:
            return None
        value = torch.empty(self._numel, device=self._residual.device)
        self._codec.decode_residual(self._residual, value)
        return value

    def forget(self) -> None:
        if self._residual is not None:
            self._residual.zero_()

    def owe(self, value: Tensor) -> bool:
        fmt = self._codec.residual_fmt
        if self._residual is not None and fmt is not None:
            # Not stochastically, as else: the values are nearly those of a payload.
            ops.block_encode(value.float().contiguous(), self._residual, fmt)
        return self._residual is not None
