"""Gradients of many clients, each at weights of its own: three ways, the same up to rounding.

batched   layers written out for many clients; where the model is a Sequential of some kinds of
          layers and the loss is the cross-entropy of one class an example
vmap      torch.func; for any model that treats examples one by one and draws nothing
loop      a client after another through one module; for any model
"""

import abc
import math
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from commrt.errors import ConfigError
from commrt.simulation.data import Dataset, cross_entropy
from commrt.simulation.layers import ALIGNED, Layer, layers_of

Stacks = Sequence[Tensor]
"""The parameters of several clients: one tensor (C, *shape) for each."""


def stack_of(width: int, shape: Sequence[int], device: torch.device) -> Tensor:
    """Zeros (width, *shape) in which every row is aligned."""
    size = math.prod(shape)
    rows = torch.zeros(width, -(-size // ALIGNED) * ALIGNED, device=device)
    return rows[:, :size].view(width, *shape)


def trained_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """By name, those that need a gradient."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


class Batch(NamedTuple):
    """What n clients train on in a step: inputs and targets (n, B, ...), shares (n, B)."""

    inputs: Tensor
    targets: Tensor
    shares: Tensor


class Gradients(abc.ABC):
    """A way to calculate gradients.

    What it gives for a client is the same to the bit whatever the others are and however many.

    Attributes:
        name: ``"batched"``, ``"vmap"`` or ``"loop"``.
        granule: Batches must be filled up to a multiple of it, with shares of 0.
        width: Rows that stacks have.
    """

    name: str
    granule: int = ALIGNED
    width: int

    @abc.abstractmethod
    def add(self, into: Stacks, weights: Stacks, rows: slice, batch: Batch, factor: float) -> None:
        """Add ``factor`` times the gradients of the clients in ``rows`` to theirs of ``into``.

        Args:
            into: Of ``width`` rows; may be ``weights`` itself.
            weights: Of ``width`` rows.
            rows: Whose clients' ``batch`` is.
            batch: Of these clients.
            factor: Negative to descend.
        """


class BatchedGradients(Gradients):
    """Forward and backward written out, a batched matrix product a layer.

    Args:
        layers: Of the model.
        width: Clients at once.
    """

    name = "batched"

    def __init__(self, layers: Sequence[Layer], width: int) -> None:
        self._layers, self.width = layers, width
        self._first = next((i for i, layer in enumerate(layers) if layer.parameters), 0)

    def add(self, into: Stacks, weights: Stacks, rows: slice, batch: Batch, factor: float) -> None:
        """See :class:`Gradients`."""
        into, weights = [s[rows] for s in into], [s[rows] for s in weights]
        x, seen = batch.inputs, []
        for layer in self._layers:
            y, kept = layer.forward(x, [weights[p] for p in layer.parameters])
            seen.append(kept)
            x = y
        slope = _slope(x, batch.targets, batch.shares * factor)
        for i in range(len(self._layers) - 1, self._first - 1, -1):
            layer, after = self._layers[i], slope
            if i > self._first:  # before it learns, which may change its weights
                slope = layer.backward(slope, seen[i], [weights[p] for p in layer.parameters])
            layer.learn(after, seen[i], [into[p] for p in layer.parameters])


def _slope(logits: Tensor, targets: Tensor, shares: Tensor) -> Tensor:
    """Gradient of the cross-entropy, (n, B, classes)."""
    # softmax over few classes takes torch three times as long
    slope = (logits - logits.amax(-1, keepdim=True)).exp_()
    slope.div_(slope.sum(-1, keepdim=True))
    minus_one = slope.new_full((1, 1, 1), -1.0).expand(*targets.shape, 1)
    return slope.scatter_add_(-1, targets[..., None], minus_one).mul_(shares[..., None])


class VmapGradients(Gradients):
    """torch.func's gradients, always of ``width`` clients: kernels may go by their number.

    Args:
        module: Of the model.
        dataset: Whose loss it is.
        width: Clients at once.
    """

    name = "vmap"

    def __init__(self, module: nn.Module, dataset: Dataset, width: int) -> None:
        self._module, self._loss = module, dataset.loss
        self._names = list(trained_parameters(module))
        self._gradients = vmap(grad(self._weighted))
        self.width = width

    def add(self, into: Stacks, weights: Stacks, rows: slice, batch: Batch, factor: float) -> None:
        """See :class:`Gradients`."""
        found = self.of(weights, Batch(*(self._widened(part, rows) for part in batch)))
        for name, stack in zip(self._names, into, strict=True):
            stack[rows].add_(found[name][rows], alpha=factor)

    def of(self, weights: Stacks, batch: Batch) -> dict[str, Tensor]:
        """Gradients by name; all have as many rows."""
        with sdpa_kernel(SDPBackend.MATH):  # vmap has no rule for the fused ones
            found: dict[str, Tensor] = self._gradients(
                dict(zip(self._names, weights, strict=True)), *batch
            )
        return found

    def _weighted(
        self, weights: dict[str, Tensor], inputs: Tensor, targets: Tensor, shares: Tensor
    ) -> Tensor:
        losses = self._loss(functional_call(self._module, weights, (inputs,)), targets)
        return (losses * shares).sum()

    def _widened(self, part: Tensor, rows: slice) -> Tensor:
        if len(part) == self.width:
            return part
        wide = part.new_zeros(self.width, *part.shape[1:])
        wide[rows] = part
        return wide


class LoopGradients(Gradients):
    """Autograd of one module, whose parameters are the weights of one client at a time.

    Args:
        module: In training mode; its buffers change as it wants.
        dataset: Whose loss it is.
    """

    name, granule, width = "loop", 1, 1

    def __init__(self, module: nn.Module, dataset: Dataset) -> None:
        self._module, self._loss = module, dataset.loss
        self._parameters = list(trained_parameters(module).values())

    def add(self, into: Stacks, weights: Stacks, rows: slice, batch: Batch, factor: float) -> None:
        """See :class:`Gradients`."""
        for parameter, stack in zip(self._parameters, weights, strict=True):
            if parameter.data_ptr() != stack.data_ptr():
                parameter.data = stack[0]
        inputs, targets, shares = (part[0] for part in batch)
        with torch.enable_grad():
            loss = (self._loss(self._module(inputs), targets) * shares).sum()
            found = torch.autograd.grad(loss, self._parameters, allow_unused=True)
        for stack, gradient in zip(into, found, strict=True):
            if gradient is not None:
                stack[0].add_(gradient, alpha=factor)


class _Bounds(NamedTuple):
    """What suits a kind of device.

    Attributes:
        vmap_weights: Below about so many, what of vmap's overhead a client saves is more than what
            its own kernels lose.
        stack_bytes: Of the weights of clients at once.
        most_batched: Clients at once.
        most_vmap: Likewise, under vmap, which always calculates all of them.
    """

    vmap_weights: int
    stack_bytes: int
    most_batched: int
    most_vmap: int


# Measured on a CPU, where the weights of a few clients stay in cache and share overheads. A GPU
# wants large kernels; how large is a guess.
_BOUNDS = {"cpu": _Bounds(1 << 15, 4 << 20, 64, 16), "cuda": _Bounds(1 << 22, 256 << 20, 512, 64)}


def gradients_of(
    module: nn.Module,
    dataset: Dataset,
    *,
    vectorise: bool | None,
    chunk: int | None,
    batch_size: int,
) -> tuple[Gradients, str]:
    """The way to calculate a model's gradients, and why not another one.

    Args:
        module: In training mode.
        dataset: Whose loss and examples it is for; on the module's device.
        vectorise: False for the loop, True for one of the others, None for what is fastest.
        chunk: Clients at once; None for a number that suits the model.
        batch_size: Largest number of examples a step.

    Returns:
        It, and what speaks against the ways before it, empty if nothing does.

    Raises:
        ConfigError: ``vectorise`` is True and the model cannot be.
    """
    if vectorise is False:
        return LoopGradients(module, dataset), "vectorise is False"
    num_weights = sum(parameter.numel() for parameter in trained_parameters(module).values())
    bounds = _BOUNDS.get(dataset.inputs.device.type, _BOUNDS["cuda"])
    fitting = max(1, bounds.stack_bytes // (4 * max(1, num_weights)))
    layers, against = layers_of(module, dataset.inputs)
    if layers and dataset.loss is cross_entropy and dataset.targets.dim() == 1:
        return BatchedGradients(layers, chunk or min(fitting, bounds.most_batched)), ""
    against = against or "the loss is no cross-entropy of one class an example"
    if vectorise is None and num_weights > bounds.vmap_weights:
        return LoopGradients(module, dataset), f"{against}; {num_weights} weights: no gain by vmap"
    way = VmapGradients(module, dataset, chunk or min(fitting, bounds.most_vmap))
    if not (obstacle := _obstacle(way, module, dataset, batch_size)):
        return way, against
    if vectorise:
        raise ConfigError(f"vectorise is True, but the model cannot be: {against}; {obstacle}")
    warnings.warn(f"clients train one after another: {against}; {obstacle}", stacklevel=3)
    return LoopGradients(module, dataset), f"{against}; {obstacle}"


def _obstacle(way: VmapGradients, module: nn.Module, dataset: Dataset, batch_size: int) -> str:
    """Why vmap cannot serve a model, found by trying: empty if it can."""
    parameters = trained_parameters(module).values()
    device = dataset.inputs.device
    weights = [stack_of(way.width, p.shape, device).copy_(p.detach()) for p in parameters]

    def attempt(size: int, counted: int) -> dict[str, Tensor]:
        """Gradients of the same examples in all rows; those beyond ``counted`` have no share."""
        place = torch.arange(size, device=device) % len(dataset)
        share = (torch.arange(size, device=device) < counted) / counted
        parts = (dataset.inputs[place], dataset.targets[place], share)
        return way.of(weights, Batch(*(p.expand(way.width, *p.shape).contiguous() for p in parts)))

    try:
        plain, filled = attempt(2, 2), attempt(ALIGNED, 2)
        full = [attempt(n, n) for n in {ALIGNED, 2 * ALIGNED, -(-batch_size // ALIGNED) * ALIGNED}]
    except (RuntimeError, ValueError, TypeError) as error:
        return f"vmap: {str(error).strip().splitlines()[0]}"
    if not all(torch.allclose(plain[n], filled[n], rtol=1e-3, atol=1e-5) for n in plain):
        return "examples of a batch act on each other, so batches cannot be filled up"
    if not all(bool((g == g[:1]).all()) for found in full for g in found.values()):
        return "vmap: its kernels round by the place in a chunk"
    return ""
