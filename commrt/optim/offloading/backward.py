"""What begins with gradients while backward goes on."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from commrt.errors import OffloadError
from commrt.optim.offloading.checksums import checksum, differ
from commrt.optim.offloading.lanes import first_cause, until_now
from commrt.optim.offloading.pipeline import Chunk, Pipeline
from commrt.optim.offloading.schedule import Group, Options, Schedule
from commrt.optim.sections import Layout
from commrt.optim.shards import is_flat

if TYPE_CHECKING:
    from commrt.optim.base import StepOptimizer


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


class Backward:
    """Brings gradients to the host during backward, and steps what streams.

    Args:
        optimizer: Whose.
        hosted: The parameters that the host steps.
        streams: Moves what the device steps.
        hosts: Moves what the host steps.
        device: Of the parameters.
        steps_streams: Step what streams when its gradients are final.

    Attributes:
        begun: What was stepped in this backward, with the options that it has taken.
        schedule: Of the last step.
    """

    def __init__(
        self,
        optimizer: StepOptimizer,
        hosted: Collection[nn.Parameter],
        streams: Pipeline,
        hosts: Pipeline,
        device: torch.device,
        *,
        steps_streams: bool,
    ) -> None:
        self._optimizer, self._streams, self._hosts = optimizer, streams, hosts
        self._device, self.steps_streams = device, steps_streams
        self.begun: dict[Chunk, Options] = {}
        self.schedule: Schedule | None = None
        self._missing: dict[Chunk, set[Layout]] = {}
        self._parameters = {
            layout: parameter
            for parameter in optimizer._parameters()
            for layout in optimizer._layouts[parameter]
        }
        early = optimizer._parameters() if steps_streams else hosted
        self._early = Early(list(filter(may_come_early, early)), self._take)

    @property
    def was_wrong(self) -> bool:
        """Whether gradients were changed after backward: they come in the step since."""
        return self._early.was_wrong

    def distrust(self) -> None:
        """Gradients are changed after backward."""
        self._early.was_wrong = True

    def remove(self) -> None:
        """Take the hooks away."""
        self._early.remove()

    def expect(self, schedule: Schedule | None) -> None:
        """Other gradients, of a step like the last one; of none that is known if None."""
        self.schedule, self.begun, self._missing = schedule, {}, {}
        if schedule is not None:
            self._early.end()
            chunks = (*schedule.hosted, *schedule.streamed)
            self._missing = {chunk: {part.layout for part in chunk.parts} for chunk in chunks}

    def check(self, schedule: Schedule, groups: Sequence[Group]) -> None:
        """Raise OffloadError if what was stepped in backward should not have been."""
        if not self.begun:
            return
        given = [group for group, _ in groups]
        unchanged = self._early.unchanged()
        parameters = {self._parameters[part.layout] for c in self.begun for part in c.parts}
        if (
            schedule is not self.schedule
            or not parameters <= unchanged
            or any(options != schedule.options(given, c) for c, options in self.begun.items())
        ):
            raise OffloadError(
                "with in_backward weights were stepped in backward, and then gradients, their "
                "number or options (the learning rate, say) were changed before step(): they must "
                "not be"
            )

    def forget(self, chunks: Sequence[Chunk]) -> BaseException | None:
        """Bring again what is not as it was, what these are not among, and what has failed.

        Returns:
            Why it has failed.
        """
        hosted = self.schedule.hosted if self.schedule is not None else ()
        brought = [(chunk, chunk.arrived) for chunk in hosted if chunk.arrived is not None]
        if not brought:
            return None
        failure = None
        unchanged = self._early.unchanged()
        for chunk, arrived in brought:
            is_right = all(self._parameters[part.layout] in unchanged for part in chunk.parts)
            if chunk not in chunks or not is_right:
                chunk.arrived = None
                continue
            try:
                arrived.wait()  # from now on gradients may be changed again
            except Exception as error:  # noqa: BLE001 - raised by the next step
                chunk.arrived, failure = None, first_cause(error)
        return failure

    def _take(self, parameter: nn.Parameter) -> None:
        """Begin with what this gradient completes."""
        schedule = self.schedule
        if schedule is None:
            return
        assert parameter.grad is not None
        for layout, own in self._optimizer._kept_of(parameter):
            weights = layout.shard.local(parameter)
            part = self._optimizer._batches.part(layout, weights, own)
            part.take(parameter.grad, int(self._optimizer.state[parameter]["step"]) + 1)
            if part not in schedule.parts:
                continue  # it has moved
            for chunk in schedule.serving.get(layout, ()):
                self._missing[chunk].discard(layout)
                if not self._missing[chunk]:
                    self._begin_with(schedule, chunk)

    def _begin_with(self, schedule: Schedule, chunk: Chunk) -> None:
        """A chunk's gradients are final."""
        if chunk in schedule.hosted:
            self._hosts.bring(chunk, is_early=True)
        elif all(part.layout.is_apart for part in chunk.parts):
            chunk.wait()
            self.begun[chunk] = schedule.options(schedule.groups, chunk)
            for part in chunk.parts:  # so that autograd sees it if they are still to be read
                torch.autograd.graph.increment_version(self._parameters[part.layout])
            self._streams.bring(chunk)
            due = schedule.bind(schedule.groups, None, chunk)
            self._streams.step(chunk, due, until_now(self._device))
            self._streams.prefetch([c for c in schedule.streamed if c not in self.begun])


def _local(grad: Tensor) -> Tensor:
    grad = grad.detach()
    return grad.to_local() if isinstance(grad, DTensor) else grad
