"""Gradients that come to the host while backward goes on."""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from commrt.optim.offloading.checksums import checksum, differ
from commrt.optim.shards import is_flat


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
        self._taken: dict[nn.Parameter, tuple[Tensor, Tensor]] = {}
        self.was_wrong = False
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        self._hooks = [p.register_post_accumulate_grad_hook(self._count) for p in trained]

    def remove(self) -> None:
        """Take the hooks away."""
        for hook in self._hooks:
            hook.remove()

    def unchanged(self) -> set[nn.Parameter]:
        """Whose gradients were taken early, and are still what they were."""
        # More were accumulated since, perhaps of a batch that was given up.
        last = [p for p in self._taken if self._counts[p] == self._expected[p]]
        if not last or self.was_wrong:
            return set()
        pairs = [(self._taken[p][1], checksum(_local(p.grad))) for p in last if p.grad is not None]
        if len(pairs) < len(last):
            return set()
        same = {p for p, is_other in zip(last, differ(pairs), strict=True) if not is_other}
        self.was_wrong = len(same) < len(last)
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
        grad = _local(parameter.grad)
        self._taken[parameter] = grad, checksum(grad)
        self._take(parameter)


def _local(grad: Tensor) -> Tensor:
    grad = grad.detach()
    return grad.to_local() if isinstance(grad, DTensor) else grad
