"""Gradients that come to the host while backward goes on."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from commrt.optim.offloading.checksums import checksum, differ
from commrt.optim.shards import is_flat


class _Seen(NamedTuple):
    """A gradient as it was.

    Attributes:
        address: Where.
        version: How often it had been changed.
        checksum: Of a DTensor, whose versions do not count what is done to several at once.
    """

    address: int
    version: int
    checksum: Tensor | None


@torch.no_grad()
def _seen(grad: Tensor) -> _Seen:
    if not isinstance(grad, DTensor):
        return _Seen(grad.data_ptr(), grad._version, None)
    local = grad.to_local()
    return _Seen(local.data_ptr(), grad._version, checksum(local))


def may_come_early(parameter: nn.Parameter) -> bool:
    """Whether nothing but this process changes a gradient after it has been accumulated.

    DDP, and who averages gradients by hand, do so without a trace; FSDP2 says when it has.
    """
    if is_flat(parameter):
        return False
    is_alone = not dist.is_initialized() or dist.get_world_size() == 1
    return is_alone or isinstance(parameter, DTensor)


class Early:
    """Knows which gradients are final while backward goes on.

    A gradient is taken to be final when it has been accumulated as often as before the last step;
    whether it was is found out in the step. After one that was not, because gradients are clipped
    or unscaled in place, all gradients come in the step.

    Args:
        parameters: For which :func:`may_come_early` holds.
        take: Called with a parameter whose gradient is final.

    Attributes:
        was_wrong: Whether a gradient was not final.
    """

    def __init__(
        self, parameters: Collection[nn.Parameter], take: Callable[[nn.Parameter], None]
    ) -> None:
        self._take = take
        self._expected: dict[nn.Parameter, int] = {}
        self._counts: dict[nn.Parameter, int] = {}
        self._taken: dict[nn.Parameter, _Seen] = {}
        self.was_wrong = False
        self._hooks = [p.register_post_accumulate_grad_hook(self._count) for p in parameters]

    def remove(self) -> None:
        """Take the hooks away."""
        for hook in self._hooks:
            hook.remove()

    def unchanged(self) -> set[nn.Parameter]:
        """Whose gradients were taken early, and are still what they were."""
        now = {p: _seen(p.grad) for p in self._taken if p.grad is not None}
        pairs = [(p, self._taken[p], now[p]) for p in now]
        if not pairs or self.was_wrong:
            return set()
        sums = [(p, a.checksum, b.checksum) for p, a, b in pairs]
        summed = [(p, a, b) for p, a, b in sums if a is not None and b is not None]
        others = differ([(a, b) for _, a, b in summed])
        changed = {p for (p, _, _), is_other in zip(summed, others, strict=True) if is_other}
        same = {p for p, a, b in pairs if a[:2] == b[:2] and p not in changed}
        self.was_wrong = len(same) < len(self._taken)
        return same

    def end(self) -> None:
        """The step has been taken."""
        self._expected, self._counts = self._counts, {}
        self._taken.clear()

    def _count(self, parameter: nn.Parameter) -> None:
        self._counts[parameter] = count = self._counts.get(parameter, 0) + 1
        if self.was_wrong or count != self._expected.get(parameter):
            return
        assert parameter.grad is not None
        self._taken[parameter] = _seen(parameter.grad)
        self._take(parameter)
