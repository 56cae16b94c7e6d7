"""Local training: what each of many clients adds to the model it was sent."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call

from commrt.codecs import derive_seed
from commrt.errors import ConfigError
from commrt.federated import Layout
from commrt.simulation.batches import Batches, Picked
from commrt.simulation.data import Dataset
from commrt.simulation.gradients import (
    Batch,
    LoopGradients,
    Stacks,
    gradients_of,
    stack_of,
    trained_parameters,
)

OPTIMIZERS = ("sgd", "adam")
_BETA1, _BETA2, _EPS = 0.9, 0.999, 1e-8  # of Adam
_EVALUATED = 512  # examples at a time


@dataclasses.dataclass(frozen=True, kw_only=True)
class LocalConfig:
    """How a client trains.

    Attributes:
        optimizer: ``"sgd"`` or ``"adam"``; its state begins at zero every round.
        lr: Learning rate.
        momentum: Of SGD.
        weight_decay: Times the weights, added to the gradient.
        batch_size: Examples a step; the last batch of an epoch may have fewer.
        epochs: Passes over the client's examples; None, and no ``steps`` either, for one.
        steps: Or so many steps, over as many epochs as it takes.
        prox: FedProx's mu: ``prox / 2`` times the squared distance to the weights of the round's
            beginning is added to the loss. Source: Li et al., MLSys 2020 (arXiv 1812.06127), eq. 2.
        vectorise: Train many clients at once: True, False, or ``"auto"`` where it is faster.
        chunk: Clients at once; None for a number that suits the model.

    Raises:
        ConfigError: For a value out of range, or both epochs and steps.
    """

    optimizer: str = "sgd"
    lr: float = 0.1
    momentum: float = 0.0
    weight_decay: float = 0.0
    batch_size: int = 32
    epochs: int | None = None
    steps: int | None = None
    prox: float = 0.0
    vectorise: bool | Literal["auto"] = "auto"
    chunk: int | None = None

    def __post_init__(self) -> None:
        if self.optimizer not in OPTIMIZERS:
            raise ConfigError(f"optimizer is {self.optimizer!r}: must be one of {OPTIMIZERS}")
        if not 0 < self.lr < math.inf:
            raise ConfigError(f"lr is {self.lr}: must be positive and finite")
        for name in ("momentum", "weight_decay", "prox"):
            limit = 1 if name == "momentum" else math.inf
            if not 0 <= getattr(self, name) < limit:
                raise ConfigError(
                    f"{name} is {getattr(self, name)}: must be from 0 to below {limit}"
                )
        if self.momentum and self.optimizer != "sgd":
            raise ConfigError(f"momentum is {self.momentum}: {self.optimizer} has none, must be 0")
        for name in ("batch_size", "epochs", "steps", "chunk"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}: must be at least 1")
        if self.epochs is not None and self.steps is not None:
            raise ConfigError(f"epochs is {self.epochs} and steps {self.steps}: give one of them")
        if self.vectorise not in (True, False, "auto"):
            raise ConfigError(f"vectorise is {self.vectorise!r}: must be True, False or 'auto'")


class LocalTraining:
    """Local training of the clients of a data set.

    A client's update is a function of the weights, its examples, seed, round and its number: the
    same to the bit whatever other clients are trained, in whichever order and on however many
    ranks. That is so on one thread, for the same kind of processor and torch; several threads,
    another ``vectorise``, and under vmap another ``chunk``, may round differently.

    The flat vector holds the parameters that need a gradient, and those floating-point buffers that
    are in the state dict: running means of BatchNorm are trained and averaged along. Parameters
    that need none stay as ``dataset.model(0)`` has them.

    On a GPU, data and weights of those that train are there, and what is drawn goes there; updates
    come back to the host, where they are encoded. Which examples and which weights to begin with
    are as on the CPU, updates to rounding. There no client's bits are promised: cuBLAS may choose
    kernels by how many clients train at once. Never run on a GPU.

    Args:
        dataset: Examples, model and loss; on the CPU.
        shares: Each client's examples, as of :func:`~commrt.simulation.partition.partition`.
        config: How a client trains.
        device: Where.

    Raises:
        ConfigError: ``vectorise`` is True and the model cannot be.

    Warns:
        UserWarning: ``vectorise`` is ``"auto"`` and the model cannot be.

    Cost: in memory ``chunk`` times the weights, twice with momentum, weight decay or prox, four
    times with Adam; kept from round to round. A GPU has the data set as well, and while they are
    made the updates that are asked for.

    Attributes:
        device: Where clients train.
        layout: Of the flat vector.
        sizes: Each client's number of examples.
        num_examples: On how many each trains in a round, every epoch counted.
        way: ``"batched"``, ``"vmap"`` or ``"loop"``, see :mod:`commrt.simulation.gradients`.
        reason: Why it is no other way; empty for the first.
    """

    def __init__(
        self,
        dataset: Dataset,
        shares: Sequence[NDArray[np.int64]],
        config: LocalConfig,
        *,
        device: torch.device | str = "cpu",
    ) -> None:
        self.device = torch.empty(0, device=device).device  # which has its number
        self._is_on_host = self.device.type == "cpu"
        dataset = dataset.to(self.device)
        self.dataset, self.config = dataset, config
        self._module = dataset.model(0).train().to(self.device)
        self._parameters = trained_parameters(self._module)
        self._buffers = _trained_buffers(self._module)
        self._state = [(name, b, b.clone()) for name, b in self._module.named_buffers()]
        self.layout = Layout.of(self._parameters | self._buffers)
        vectorise = None if config.vectorise == "auto" else config.vectorise
        self._gradients, self.reason = gradients_of(
            self._module, dataset,
            vectorise=vectorise, chunk=config.chunk,
            batch_size=min(config.batch_size, max(map(len, shares), default=1)),
        )  # fmt: skip
        self.way = self._gradients.name
        self._is_loop = isinstance(self._gradients, LoopGradients)
        self._batches = Batches(
            shares, batch_size=config.batch_size, steps=config.steps,
            epochs=1 if config.epochs is None and config.steps is None else config.epochs,
            granule=self._gradients.granule,
        )  # fmt: skip
        self.sizes = tuple(self._batches.sizes.tolist())
        self.num_examples = tuple(self._batches.num_examples.tolist())
        shapes = [tuple(p.shape) for p in self._parameters.values()]
        self._descent = _Descent(config, shapes, self._gradients.width, self.device)
        self._generators = [torch.default_generator]
        if not self._is_on_host:
            self._generators.append(torch.cuda.default_generators[self.device.index])

    def start(self, seed: int) -> Tensor:
        """The weights before training: flat fp32 (N,), on the host."""
        module = self.dataset.model(seed)
        return self.layout.flatten(trained_parameters(module) | _trained_buffers(module))

    def room(self, count: int) -> Tensor:
        """Where updates fit: fp32 (count, N), uninitialised, on the host; pinned for a GPU."""
        return torch.empty(count, self.layout.numel, pin_memory=not self._is_on_host)

    @torch.no_grad()
    def updates(
        self,
        weights_N: Tensor,
        clients: Sequence[int],
        round_index: int,
        seed: int,
        *,
        out: Tensor | None = None,
    ) -> Tensor:
        """What local training adds to the weights.

        Args:
            weights_N: Flat fp32, of the layout, on any device.
            clients: Their numbers, in any order.
            round_index: Of what is drawn.
            seed: Of what is drawn.
            out: Where to write, on the host, best of :meth:`room`; spares making a tensor.

        Returns:
            fp32 (K, N), on the host: new minus old weights, by the order of ``clients``. 0 for a
            client that has no examples.

        Raises:
            ConfigError: Weights that do not fit or are not finite, or an unknown client.
        """
        weights_N = self.layout.check(weights_N, "weights").to(self.device)
        chosen = np.array(clients, np.int64).reshape(-1)
        if np.any((chosen < 0) | (chosen >= len(self.sizes))):
            raise ConfigError(f"clients {list(clients)}: must be from 0 to {len(self.sizes) - 1}")
        if out is None:
            out = self.room(len(chosen))
        elif out.shape != (len(chosen), self.layout.numel) or out.dtype != torch.float32:
            wanted = (len(chosen), self.layout.numel)
            raise ConfigError(f"out is {out.dtype} {tuple(out.shape)}: must be fp32 {wanted}")
        start = self.layout.split(weights_N)
        order = self._batches.order(chosen)
        moved = out if self._is_on_host else torch.empty(out.shape, device=self.device)
        gpus = [] if self._is_on_host else [self.device.index]
        with torch.random.fork_rng(devices=gpus, enabled=self._is_loop):
            for first in range(0, len(order), self._gradients.width):
                places = order[first : first + self._gradients.width]
                self._train(start, chosen[places], round_index, seed)
                self._write(start, places, moved)
        if moved is not out:
            out.copy_(moved)
        return out

    @torch.no_grad()
    def evaluate(self, weights_N: Tensor) -> float:
        """The data set's metric on the examples to test on."""
        data, weights = self.dataset, self.layout.split(weights_N.to(self.device))
        self._module.eval()
        total = 0.0
        pieces = zip(
            data.test_inputs.split(_EVALUATED), data.test_targets.split(_EVALUATED), strict=True
        )
        for inputs, targets in pieces:
            outputs = functional_call(self._module, weights, (inputs,))
            if data.metric == "accuracy":
                total += float((outputs.argmax(-1) == targets).sum())
            else:
                total += float(data.loss(outputs, targets).double().sum())
        self._module.train()
        return total / len(data.test_inputs)

    def _train(
        self, start: dict[str, Tensor], clients: NDArray[np.int64], round_index: int, seed: int
    ) -> None:
        """Some clients at once, into ``_descent.weights``."""
        for name, buffer, fresh in self._state:
            buffer.copy_(start[name] if name in self._buffers else fresh)
        if self._is_loop:  # for what the module draws; torch.manual_seed takes 100 times as long
            for generator in self._generators:
                generator.manual_seed(
                    derive_seed("simulation.model", seed, round_index, int(clients[0]))
                )
        self._descent.begin([start[name] for name in self._parameters], len(clients))
        drawn = self._batches.draw(clients, seed=seed, round_index=round_index)
        for step, batches in enumerate(drawn, start=1):
            for picked in batches:
                self._descent.step(step, picked.rows, self._adder(picked))

    def _adder(self, picked: Picked) -> Callable[[Stacks, float], None]:
        """What adds a multiple of the gradients to stacks."""
        examples = self._placed(picked.examples)
        inputs, targets = (
            tensor.index_select(0, examples.view(-1)).view(*examples.shape, *tensor.shape[1:])
            for tensor in (self.dataset.inputs, self.dataset.targets)
        )
        batch = Batch(inputs, targets, self._placed(picked.shares))

        def add(into: Stacks, factor: float) -> None:
            self._gradients.add(into, self._descent.weights, picked.rows, batch, factor)

        return add

    def _placed(self, drawn: Tensor) -> Tensor:
        """What was drawn on the host, where clients train."""
        if self._is_on_host:
            return drawn
        # Pinned, the host need not wait for the copy, nor for the steps before it. torch keeps the
        # memory until the copy is done.
        return drawn.pin_memory().to(self.device, non_blocking=True)

    def _write(self, start: dict[str, Tensor], places: NDArray[np.int64], out: Tensor) -> None:
        """What the chunk's clients have changed, to their places."""
        count = len(places)
        trained = [stack[:count] for stack in self._descent.weights]
        trained += [b.float().expand(count, *b.shape) for b in self._buffers.values()]
        rows = self._placed(torch.from_numpy(places))
        in_order = bool((np.diff(places) == 1).all())
        parts = out.split([old.numel() for old in start.values()], dim=1)
        for new, old, part in zip(trained, start.values(), parts, strict=True):
            if in_order:
                torch.sub(new, old, out=part[places[0] : places[0] + count].view_as(new))
            else:
                part.index_copy_(0, rows, (new - old).view(count, -1))


class _Descent:
    """The optimizers of some clients at once.

    Args:
        config: Which one.
        shapes: Of the parameters.
        width: Clients.
        device: Of their weights.

    Attributes:
        weights: Theirs, one tensor (width, *shape) for each parameter.
    """

    def __init__(
        self,
        config: LocalConfig,
        shapes: Sequence[tuple[int, ...]],
        width: int,
        device: torch.device,
    ) -> None:
        def stacks(needed: bool) -> list[Tensor]:
            return [stack_of(width, shape, device) for shape in shapes] if needed else []

        self._config = config
        self._is_adam = config.optimizer == "adam"
        self._penalised = config.prox > 0 or config.weight_decay > 0
        keeps_one = self._is_adam or config.momentum > 0
        self.weights = stacks(True)
        self._gradients = stacks(keeps_one or self._penalised)
        self._first, self._second = stacks(keeps_one), stacks(self._is_adam)
        self._start: Sequence[Tensor] = ()

    def begin(self, start: Sequence[Tensor], count: int) -> None:
        """The first ``count`` clients have these weights, and no past."""
        self._start = start
        for stack, tensor in zip(self.weights, start, strict=True):
            stack[:count].copy_(tensor.expand(count, *tensor.shape))
        for stack in (*self._first, *self._second):
            stack[:count].zero_()

    def step(self, index: int, rows: slice, add: Callable[[Stacks, float], None]) -> None:
        """A step of the clients in ``rows``, their ``index``-th from 1.

        Args:
            index: From 1.
            rows: Which clients.
            add: Adds a multiple of the gradients of these to stacks.
        """
        if not self._gradients:  # plain SGD: the last product of backward adds to the weights
            add(self.weights, -self._config.lr)
            return
        for place in range(len(self.weights)):
            self._penalise(place, rows)
        add(self._gradients, 1.0)
        for place in range(len(self.weights)):
            if self._is_adam:
                self._adam(place, rows, index)
            else:
                self._sgd(place, rows)

    def _penalise(self, place: int, rows: slice) -> None:
        """Let the gradient be that of the penalties."""
        weights, gradient = self.weights[place][rows], self._gradients[place][rows]
        if self._config.prox:
            torch.sub(weights, self._start[place], out=gradient).mul_(self._config.prox)
        else:
            gradient.zero_()
        if self._config.weight_decay:
            gradient.add_(weights, alpha=self._config.weight_decay)

    def _sgd(self, place: int, rows: slice) -> None:
        step = self._gradients[place][rows]
        if self._config.momentum:
            step = self._first[place][rows].mul_(self._config.momentum).add_(step)
        self.weights[place][rows].add_(step, alpha=-self._config.lr)

    def _adam(self, place: int, rows: slice, index: int) -> None:
        gradient = self._gradients[place][rows]
        first = self._first[place][rows].lerp_(gradient, 1 - _BETA1)
        second = self._second[place][rows].mul_(_BETA2)
        second.addcmul_(gradient, gradient, value=1 - _BETA2)
        root = torch.div(second, 1 - _BETA2**index, out=gradient).sqrt_().add_(_EPS)
        lr = self._config.lr / (1 - _BETA1**index)
        self.weights[place][rows].addcdiv_(first, root, value=-lr)


def _trained_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Buffers that are part of the model: of floating point, and in the state dict."""
    kept = module.state_dict().keys()
    return {n: b for n, b in module.named_buffers() if n in kept and b.is_floating_point()}
