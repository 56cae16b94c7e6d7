"""What the server does with the mean of updates: it takes it for a gradient."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from commrt.errors import ConfigError, StateError
from commrt.federated import Layout


class Optimizer(Protocol):
    """What is asked of an optimizer of torch."""

    def step(self) -> Any:
        """Move the parameters by their gradients."""

    def state_dict(self) -> dict[str, Any]:
        """What it remembers."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""


# Optimizers of torch import its compiler when they are made, those of commrt DTensor when they are
# imported: seconds of every rank, for nothing where the mean is just added.
class _PlainSgd:
    """SGD without momentum."""

    def __init__(self, params: list[nn.Parameter], lr: float) -> None:
        self._params, self._lr = params, lr

    @torch.no_grad()
    def step(self) -> None:
        for param in self._params:
            assert param.grad is not None
            param.add_(param.grad, alpha=-self._lr)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict:
            raise ValueError(f"state has {sorted(state_dict)}: SGD without momentum has none")


def _sgd(params: list[nn.Parameter], config: "ServerConfig") -> Optimizer:
    if not config.momentum:
        return _PlainSgd(params, config.lr)
    return torch.optim.SGD(params, lr=config.lr, momentum=config.momentum)


def _adam_mini(params: list[nn.Parameter], config: "ServerConfig") -> Optimizer:
    from commrt.optim import AdamMini

    betas = config.momentum, config.beta2
    return AdamMini(params, config.lr, betas, eps=config.eps, weight_decay=0.0)


def _lion(params: list[nn.Parameter], config: "ServerConfig") -> Optimizer:
    from commrt.optim import Lion

    return Lion(params, config.lr, (config.momentum, config.beta2), weight_decay=0.0)


Make = Callable[[list[nn.Parameter], "ServerConfig"], Optimizer]

_OPTIMIZERS: dict[str, Make] = {
    "sgd": _sgd,
    "adagrad": lambda params, c: torch.optim.Adagrad(params, lr=c.lr, eps=c.eps),
    "adam": lambda params, c: torch.optim.Adam(params, c.lr, (c.momentum, c.beta2), eps=c.eps),
    "adam-mini": _adam_mini,
    "lion": _lion,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """The server's optimizer.

    With ``sgd``, a learning rate of 1 and no momentum the mean is added as it is: FedAvg. With a
    momentum it is FedAvgM, with ``adagrad`` and ``adam`` FedAdagrad and FedAdam.

    Source: Reddi et al., "Adaptive Federated Optimization", ICLR 2021, algorithm 2.

    Attributes:
        optimizer: ``sgd``, ``adagrad``, ``adam``, ``adam-mini`` or ``lion``.
        lr: Learning rate.
        momentum: Of SGD; beta 1 of the others.
        beta2: Of the others.
        eps: What they add to a root; the paper's tau.

    Raises:
        ConfigError: A value out of range.
    """

    optimizer: str = "sgd"
    lr: float = 1.0
    momentum: float = 0.0
    beta2: float = 0.99
    eps: float = 1e-3

    def __post_init__(self) -> None:
        if self.optimizer not in _OPTIMIZERS:
            raise ConfigError(
                f"optimizer is {self.optimizer!r}: must be one of {', '.join(_OPTIMIZERS)}"
            )
        for name in ("lr", "eps"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name} is {getattr(self, name)}: must be positive and finite")
        for name in ("momentum", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}: must be from 0 to below 1")


class ServerStep:
    """The server's model; the same on every rank, which all do the same.

    Args:
        config: Which optimizer.
        layout: Of the weights.
        weights: To begin with, fp32 (N,).
    """

    def __init__(self, config: ServerConfig, layout: Layout, weights: Tensor) -> None:
        self._layout = layout
        parts = layout.split(weights).values()
        self._parameters = [nn.Parameter(part.clone()) for part in parts]
        self._optimizer = _OPTIMIZERS[config.optimizer](self._parameters, config)

    @property
    def weights(self) -> Tensor:
        """A copy, fp32 (N,)."""
        return torch.cat([parameter.detach().reshape(-1) for parameter in self._parameters])

    def step(self, mean: Tensor) -> Tensor:
        """Take the mean of updates, fp32 (N,), as minus a gradient; the new weights."""
        gradients = self._layout.split(mean.neg()).values()
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            parameter.grad = gradient
        self._optimizer.step()
        return self.weights

    def replace(self, weights: Tensor) -> Tensor:
        """Take other weights, fp32 (N,), without a step."""
        with torch.no_grad():
            parts = self._layout.split(weights).values()
            for parameter, part in zip(self._parameters, parts, strict=True):
                parameter.copy_(part)
        return self.weights

    def state_dict(self) -> dict[str, Any]:
        """Weights and the optimizer's state."""
        return {"weights": self.weights, "optimizer": self._optimizer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`.

        Raises:
            StateError: It is of another model or optimizer.
        """
        try:
            self.replace(self._layout.check(state["weights"], "weights"))
            self._optimizer.load_state_dict(state["optimizer"])
        except (KeyError, ValueError) as error:
            raise StateError(f"not a state of this server: {error}") from error
