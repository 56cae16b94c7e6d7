"""Sums of squares of gradients that are in several ranks: of blocks, and of all elements.

All of them, and whether any rank has found a gradient that is not finite, travel in one all-reduce
a step for each set of ranks that share parameters.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from commrt import ops
from commrt.collectives.agreement import check_agreement, gather_texts
from commrt.optim.sections import Layout
from commrt.optim.shards import Groups

_NORM, _FOUND_INF, _FIRST_SLOT = 0, 1, 2
_NORM_COLS = 4096

Gradients = Mapping[Layout, Tensor]
Ranges = list[tuple[int, int]]


class Totals:
    """What a step has to know of the gradients before it can begin.

    Args:
        layouts: Of all parameters, in the same order on all ranks that share them.
        devices: Of each.
        settings: What the ranks have to agree on.
        wants_norm: Whether :attr:`square_norm` is needed.
        wants_blocks: Whether :meth:`update_second` is.
        wants_all_blocks: Also for blocks of rows that this rank has whole.

    Ranks: all must call.

    Raises:
        PeerMismatchError: The ranks disagree.
    """

    def __init__(
        self,
        layouts: Sequence[Layout],
        devices: Sequence[torch.device],
        settings: dict[str, Any],
        *,
        wants_norm: bool,
        wants_blocks: bool,
        wants_all_blocks: bool = False,
    ) -> None:
        self._wants_norm = wants_norm
        shared: dict[tuple[Groups, torch.device], list[Layout]] = {}
        for layout, device in zip(layouts, devices, strict=True):
            shared.setdefault((layout.shard.groups, device), []).append(layout)
        self._pools: list[_Pool] = []
        for (groups, device), some in shared.items():
            ranges = [_merged(_cut_blocks(layout) if wants_blocks else []) for layout in some]
            for group in groups:
                check_agreement({**settings, **_described(some)}, group, _carrier(group, device))
                ranges = _united(ranges, group, _carrier(group, device))
            own = [
                _merged(_whole_blocks(layout, wants_all_blocks) if wants_blocks else [])
                for layout in some
            ]
            self._pools.append(_Pool(some, ranges, own, groups, device, wants_all_blocks))

    def average(self, values: Gradients) -> None:
        """Sum these values themselves, so that ``update_second`` makes the blocks' means of them.

        Ranks: all must call.
        """
        for pool in self._pools:
            pool.sum(values, None, wants_norm=False, of_squares=False)

    def sum(self, grads: Gradients, found_inf: Tensor | None) -> None:
        """Sum the squares of these gradients.

        Args:
            grads: What this rank has, flat; a layout that is missing has no gradient here.
            found_inf: Not 0 if a gradient is not finite.

        Ranks: all must call, with or without gradients.
        """
        for pool in self._pools:
            pool.sum(grads, found_inf if pool.groups else None, wants_norm=self._wants_norm)

    @property
    def square_norm(self) -> Tensor:
        """Of all gradients, fp64."""
        if not self._pools:
            return torch.zeros((), dtype=torch.float64)
        first = self._pools[0].buffer
        return torch.stack([pool.buffer[_NORM].to(first.device) for pool in self._pools]).sum()

    @property
    def found_inf(self) -> bool:
        """Whether any rank that was asked has found one."""
        return any(bool(pool.buffer[_FOUND_INF]) for pool in self._pools if pool.was_reduced)

    def update_second(
        self, layout: Layout, second: Tensor, beta2: float, grad_factor: Tensor | None
    ) -> None:
        """Update the second moments of blocks that the kernel cannot sum.

        Args:
            layout: Whose they are.
            second: All that the rank has of it, flat.
            beta2: Their decay.
            grad_factor: What gradients are multiplied by.
        """
        for pool in self._pools:
            pool.update_second(layout, second, beta2, grad_factor)


class _Pool:
    """The sums of some ranks on a device: norm, non-finite gradients, and blocks."""

    def __init__(
        self,
        layouts: Sequence[Layout],
        ranges: Sequence[Ranges],
        own: Sequence[Ranges],
        groups: Groups,
        device: torch.device,
        has_all_blocks: bool,
    ) -> None:
        self.groups, self.device = groups, device
        self.was_reduced = False
        self._layouts = layouts
        self._slots: dict[Layout, _Slots] = {}
        # What travels first, and then what only this rank has.
        after_shared = _FIRST_SLOT + sum(map(_number, ranges))
        at_shared, at_own = _FIRST_SLOT, after_shared
        for layout, shared, private in zip(layouts, ranges, own, strict=True):
            if shared or private:
                starts = [(at_shared, shared), (at_own, private)]
                self._slots[layout] = _Slots(layout, starts, device, has_all_blocks)
            at_shared += _number(shared)
            at_own += _number(private)
        self.buffer = torch.zeros(at_own, dtype=torch.float64, device=device)
        self._shared = self.buffer[:after_shared]

    def sum(
        self,
        grads: Gradients,
        found_inf: Tensor | None,
        *,
        wants_norm: bool,
        of_squares: bool = True,
    ) -> None:
        self.buffer.zero_()
        jobs = _Jobs(self.device, of_squares=of_squares)
        for layout in self._layouts:
            grad = grads.get(layout)
            if grad is None:
                continue
            if wants_norm:
                jobs.add_norm(grad)
            if layout in self._slots:
                self._slots[layout].add(jobs, grad)
        jobs.run(self.buffer)
        has_blocks = self._shared.numel() > _FIRST_SLOT
        self.was_reduced = bool(self.groups) and (wants_norm or has_blocks or found_inf is not None)
        if not self.was_reduced:
            return
        if found_inf is not None:
            self.buffer[_FOUND_INF] = found_inf.sum().to(self.device, torch.float64)
        sum_over(self._shared, self.groups)

    def update_second(
        self, layout: Layout, second: Tensor, beta2: float, grad_factor: Tensor | None
    ) -> None:
        slots = self._slots.get(layout)
        if slots is None or not slots.lines_N.numel():
            return
        mean_N = self.buffer[slots.slot_N] / slots.numel_N
        if grad_factor is not None:
            mean_N *= grad_factor.double() ** 2
        keep = torch.tensor(beta2, device=second.device)  # fp32, as in the kernel
        lines_N, mean_N = slots.lines_N.to(second.device), mean_N.float().to(second.device)
        second[lines_N] = keep * second[lines_N] + (1 - keep) * mean_N


class _Slots:
    """Where a tensor's blocks are in the buffer of sums.

    Attributes:
        lines_N: Places of second moments in the rank's state.
        slot_N: The slot of each.
        numel_N: Elements of each one's block.
    """

    def __init__(
        self,
        layout: Layout,
        starts: Sequence[tuple[int, Ranges]],
        device: torch.device,
        has_all_blocks: bool,
    ) -> None:
        self._cut = [s for s in layout.sections if has_all_blocks or not s.is_whole]
        self._columns = layout.columns
        slot_of: dict[int, int] = {}
        for first, ranges in starts:
            numbers = (block for begin, end in ranges for block in range(begin, end))
            slot_of |= {block: slot for slot, block in enumerate(numbers, first)}

        def slots(blocks: Tensor) -> Tensor:
            return torch.tensor([slot_of[block] for block in blocks.tolist()], dtype=torch.int64)

        lines, blocks = [_nothing()], [_nothing()]
        self._slots_of_sections = []
        for section in self._cut:
            piece = section.piece
            block_K = section.block + torch.arange(section.num_blocks)
            self._slots_of_sections.append(slots(block_K).to(device))
            lines.append(piece.line + torch.arange(piece.rows))
            blocks.append(block_K.repeat_interleave(section.block_rows))
        self._slots_of_columns = []
        for columns in self._columns:
            self._slots_of_columns.append(slots(columns.block_of).to(device))
            lines.append(columns.second + torch.arange(columns.piece.cols))
            blocks.append(columns.block_of)
        block_of = dict(zip(torch.cat(lines).tolist(), torch.cat(blocks).tolist(), strict=True))
        self.lines_N = torch.tensor(list(block_of), dtype=torch.int64, device=device)
        block_N = torch.tensor(list(block_of.values()), dtype=torch.int64)
        self.slot_N = slots(block_N).to(device)
        self.numel_N = layout.block_numel(block_N).to(device)

    def add(self, jobs: _Jobs, grad: Tensor) -> None:
        for section, slots in zip(self._cut, self._slots_of_sections, strict=True):
            piece = section.piece
            part = piece.elements_of(grad)
            jobs.add(part, (section.num_blocks, section.block_rows * piece.cols), slots)
        for columns, slots in zip(self._columns, self._slots_of_columns, strict=True):
            piece = columns.piece
            part = piece.elements_of(grad)
            jobs.add(part, (piece.rows, piece.cols), slots, by_column=True)


class _Jobs:
    """Sums for one call of the kernel, and the slots they are added to."""

    def __init__(self, device: torch.device, *, of_squares: bool) -> None:
        self._device, self._of_squares = device, of_squares
        self._grads: list[Tensor] = []
        self._shapes: list[tuple[int, int]] = []
        self._by_column: list[bool] = []
        self._sums: list[Tensor] = []
        self._slots: list[Tensor] = []
        self._of_slots: list[Tensor] = []
        self._of_norm: list[Tensor] = []

    def add(
        self, grad: Tensor, shape: tuple[int, int], slots: Tensor, *, by_column: bool = False
    ) -> None:
        """Add the sum of each row, or column, to a slot."""
        self._slots.append(slots)
        self._of_slots.append(self._sum(grad, shape, by_column))

    def add_norm(self, grad: Tensor) -> None:
        """Add all to the norm, in rows, so that there is work for many threads."""
        rows = grad.numel() // _NORM_COLS
        after = grad[rows * _NORM_COLS :]
        if rows:
            whole = self._sum(grad[: rows * _NORM_COLS], (rows, _NORM_COLS))
            self._of_norm.append(whole)
        if after.numel():
            self._of_norm.append(self._sum(after, (1, after.numel())))

    def _sum(self, grad: Tensor, shape: tuple[int, int], by_column: bool = False) -> Tensor:
        sums = torch.empty(shape[by_column], dtype=torch.float64, device=self._device)
        self._grads.append(grad)
        self._shapes.append(shape)
        self._by_column.append(by_column)
        self._sums.append(sums)
        return sums

    def run(self, buffer: Tensor) -> None:
        if self._of_squares:
            ops.square_sums(self._grads, self._sums, self._shapes, by_column=self._by_column)
        else:
            for grad, sums, shape, by_column in zip(
                self._grads, self._sums, self._shapes, self._by_column, strict=True
            ):
                sums.copy_(grad.double().view(shape).sum(dim=0 if by_column else 1))
        if self._of_norm:
            buffer[_NORM] = torch.cat(self._of_norm).sum()
        if self._slots:
            # Unlike index_add_, in the same order on every replica.
            slots, sums = torch.cat(self._slots), torch.cat(self._of_slots)
            buffer.index_put_((slots,), sums, accumulate=True)


def sum_over(values: Tensor, groups: Groups) -> None:
    """All-reduce in place, over one group after the other."""
    for group in groups:
        travelling = values.to(_carrier(group, values.device))
        dist.all_reduce(travelling, group=group)
        values.copy_(travelling)


def _nothing() -> Tensor:
    return torch.empty(0, dtype=torch.int64)


def _cut_blocks(layout: Layout) -> Iterator[tuple[int, int]]:
    """Ranges of the blocks of which this rank has a part."""
    for section in layout.sections:
        if not section.is_whole:
            yield section.block, section.block + section.num_blocks
    for columns in layout.columns:
        if not columns.is_whole:
            yield int(columns.block_of[0]), int(columns.block_of[-1]) + 1


def _whole_blocks(layout: Layout, with_rows: bool) -> Iterator[tuple[int, int]]:
    """Ranges of blocks of columns that this rank has; of rows, too, if they are wanted."""
    for section in layout.sections:
        if with_rows and section.is_whole:
            yield section.block, section.block + section.num_blocks
    for columns in layout.columns:
        if columns.is_whole:
            yield int(columns.block_of[0]), int(columns.block_of[-1]) + 1


def _number(ranges: Ranges) -> int:
    return sum(end - begin for begin, end in ranges)


def _merged(ranges: Iterator[tuple[int, int]] | Ranges) -> Ranges:
    merged: Ranges = []
    for begin, end in sorted(ranges):
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((begin, end))
    return merged


def _united(
    ranges: Sequence[Ranges], group: dist.ProcessGroup, device: torch.device
) -> list[Ranges]:
    """Of all ranks of the group."""
    peers = [json.loads(text) for text in gather_texts(json.dumps(ranges), group, device)]
    return [
        _merged([(begin, end) for some in of_ranks for begin, end in some])
        for of_ranks in zip(*peers, strict=True)
    ]


def _described(layouts: Sequence[Layout]) -> dict[str, str | int | float]:
    named = [(layout.shard.name, list(layout.shard.shape), layout.blocks) for layout in layouts]
    return {
        f"parameter {i}": f"{name} {shape}, blocks: {blocks.axis} {blocks.runs}"
        for i, (name, shape, blocks) in enumerate(named)
    }


def _carrier(group: dist.ProcessGroup, device: torch.device) -> torch.device:
    """Where a group can take tensors of a device."""
    types = group._device_types
    return device if device.type in {other.type for other in types} else types[0]
