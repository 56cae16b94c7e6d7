"""What bench.offload compares: commrt's offloading, and layouts of others on the same link."""

import dataclasses
import importlib
import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from commrt import optim
from commrt.optim.offloading.lanes import Done
from commrt.optim.offloading.link import Copy, Link

BF16 = torch.bfloat16
SMALL_LR = 1e-5  # of fine-tuning, where few bits of bf16 weights change


class Trained(Protocol):
    """A model's optimizer, at one end of an emulated link or without one."""

    link: Link | None

    def step(self) -> None:
        """Update the weights; some may come later, to a model that waits for them."""

    def settle(self) -> None:
        """Return when everything has crossed the link."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scheme:
    """A way to keep an optimizer's state.

    Attributes:
        name: Of the row.
        make: From a model, the link's rate, and whether steps overlap the model.
        make_plain: The same optimizer without a link, to compare with.
        plain: Name of that; schemes that share it share its measurements.
        most_bytes: Goal: a parameter and step, in both directions.
        dtype: Of weights and gradients.
        is_exact: Whether weights are those of the optimizer without a link, to the bit.
        is_planned: Whether what is done depends on the rate.
    """

    name: str
    make: Callable[[nn.Module, float | None, bool], Trained]
    make_plain: Callable[[nn.Module], Trained]
    plain: str
    most_bytes: float | None = None
    dtype: torch.dtype = torch.float32
    is_exact: bool = True
    is_planned: bool = False


class Plain:
    """An optimizer with its state where the weights are."""

    link = None

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def step(self) -> None:
        self.optimizer.step()

    def settle(self) -> None:
        """Nothing is on its way."""


class Ours:
    """commrt.optim.offload."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer
        self.link: Link = optimizer.offloaded.link

    def step(self) -> None:
        self.optimizer.step()

    def settle(self) -> None:
        self.optimizer.offloaded.settle()
        drain(self.link)  # of what is fetched for the next step


def drain(link: Link) -> None:
    """Return when all copies are done that are queued."""
    for way in (link.up, link.down):
        way.move([]).settle()


def set_rate(link: Link, rate: float | None) -> None:
    """Hold an emulated link, on which nothing is on its way, to another rate."""
    for way in (link.up, link.down):
        way._rate = math.inf if rate is None else rate


def _ours(
    name: str, optimizer: str, lr: float, options: dict[str, Any], how: dict[str, Any], **more: Any
) -> Scheme:
    def make_bare(model: nn.Module) -> Any:
        return getattr(optim, optimizer)(model, lr=lr, **options)

    def make(model: nn.Module, rate: float | None, overlaps: bool) -> Trained:
        options = dict(how)
        if overlaps:
            options["model"] = model
        else:
            options.pop("in_backward", None)
        return Ours(optim.offload(make_bare(model), link_rate=rate, **options))

    detail = ",".join(map(str, options.values()))
    return Scheme(
        name=name,
        make=make,
        make_plain=lambda model: Plain(make_bare(model)),
        plain=f"{optimizer}({detail},{lr:g},{more.get('dtype', torch.float32)})",
        **more,
    )


# -- layouts of others ----------------------------------------------------------------------------


class HostStepped:
    """torch's fused AdamW on the host, with weights, gradients and state of fp32 there.

    Gradients go down during backward. How weights come up is the difference:

    gathered: as FSDP2 with CPUOffloadPolicy on one rank. Weights come up for the forward, layer by
        layer, and once more for backward; the host steps when all gradients are there.
    else: as torchao's CPUOffloadOptimizer. The host steps tensor by tensor as gradients arrive, and
        sends each tensor's weights once; the step ends when all are there.

    Both are given more than they have: copies wait for nothing but their turn.

    Args:
        model: Whose weights are on the device.
        rate: Of the link.
        overlaps: Copy during forward and backward; else all in :meth:`step`.
        gathered: See above.
    """

    def __init__(
        self, model: nn.Module, rate: float | None, overlaps: bool, *, gathered: bool
    ) -> None:
        self.link: Link = Link(torch.device("cpu"), rate)
        self._device = list(model.parameters())
        self._host = [nn.Parameter(p.detach().clone()) for p in self._device]
        for host in self._host:
            host.grad = torch.zeros_like(host)
        self._gathered, self._overlaps = gathered, overlaps
        groups = [self._host] if gathered else [[host] for host in self._host]
        self._optimizers = [torch.optim.AdamW(some, lr=LR, fused=True) for some in groups]
        self._places = {p: place for place, p in enumerate(self._device)}
        self._down: dict[int, Done] = {}
        self._up: dict[int, Done] = {}
        if overlaps:
            for parameter in self._device:
                parameter.register_post_accumulate_grad_hook(self._send)
            if gathered:
                self._gather_for(model)

    def step(self) -> None:
        if not self._overlaps:
            for parameter in self._device:
                self._send(parameter)
        order = list(self._down)
        if self._gathered:
            for done in self._down.values():
                done.settle()
            self._optimizers[0].step()
        else:
            for place in order:
                self._down[place].settle()
                self._optimizers[place].step()
                self._bring([place])
        self._down.clear()
        if self._gathered and not self._overlaps:
            self._bring(range(len(self._host)))
            self._bring(range(len(self._host)))
        if not self._gathered:
            drain(self.link)

    def settle(self) -> None:
        drain(self.link)
        with torch.no_grad():  # for whoever looks at them; the next forward brings them
            torch._foreach_copy_(self._device, self._host)

    def _send(self, parameter: nn.Parameter) -> None:
        place = self._places[parameter]
        copy = Copy(self._host[place].grad, parameter.grad)
        self._down[place] = self.link.down.move([copy])

    def _bring(self, places: Sequence[int]) -> None:
        for place in places:
            # .data: autograd must not take the weights for changed, which are the same again.
            copy = Copy(self._device[place].data, self._host[place].detach())
            self._up[place] = self.link.up.move([copy])

    def _gather_for(self, model: nn.Module) -> None:
        layers = [
            module for module in model.modules() if any(True for _ in module.parameters(False))
        ]
        places = {
            layer: [self._places[p] for p in layer.parameters(recurse=False)] for layer in layers
        }
        everything = list(range(len(self._device)))
        own = places.get(model, []) + places.get(getattr(model, "embedding", model), [])

        def wait(layer: nn.Module, *_: Any) -> None:
            for place in places[layer]:
                self._up[place].settle()

        def begin(*_: Any) -> None:
            self._bring(everything)
            for place in own:
                self._up[place].settle()

        def begin_backward(*_: Any) -> None:
            self._bring(everything[::-1])

        model.register_forward_pre_hook(begin)
        model.register_full_backward_pre_hook(begin_backward)
        for layer in layers:
            if layer is not model:
                layer.register_forward_pre_hook(wait)
                layer.register_full_backward_pre_hook(wait)


def _layout(name: str, most_bytes: float, **how: Any) -> Scheme:
    return Scheme(
        name=name,
        make=lambda model, rate, overlaps: HostStepped(model, rate, overlaps, **how),
        make_plain=lambda model: Plain(torch.optim.AdamW(model.parameters(), lr=LR, fused=True)),
        plain="torch AdamW fused",
        most_bytes=most_bytes,
    )


def why_torchao_does_not_run() -> str:
    """The first line of its error on this machine."""
    try:
        peer = importlib.import_module("torchao.optim").CPUOffloadOptimizer
        peer([nn.Parameter(torch.zeros(8192))])
    except Exception as error:  # noqa: BLE001 - whatever it is, it is the reason
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return "it runs here, but its copies are not on an emulated link, and not counted"


# -- all ------------------------------------------------------------------------------------------

LR = 1e-3
FP32 = {"momentum_dtype": "fp32"}
STREAM = {"mode": "stream"}
EARLY = {"mode": "stream", "in_backward": True}
CPU = {"mode": "cpu"}
HALF: dict[str, Any] = {"dtype": BF16}
CHANGED = {"weights": "changed"}
MASTER = {"weight_mode": "master"}

ADAMW = "AdamW fp32, stream"
MINI = "AdamMini int8, stream"
SCHEMES = (
    _ours(ADAMW, "AdamW8bit", LR, FP32, STREAM, most_bytes=16.0),
    _ours("AdamW8bit, stream", "AdamW8bit", LR, {}, STREAM, most_bytes=4.1),
    _ours("AdamMini fp32, stream", "AdamMini", LR, FP32, STREAM, most_bytes=8.0),
    _ours(
        *("AdamMini bf16, stream", "AdamMini", LR, {"momentum_dtype": "bf16"}, STREAM),
        most_bytes=4.0,
    ),
    _ours(MINI, "AdamMini", LR, {"momentum_dtype": "int8"}, STREAM, most_bytes=2.05),
    _ours(
        *("AdamW fp32, stream in backward", "AdamW8bit", LR, FP32, EARLY),
        most_bytes=16.0,
    ),
    _ours(
        *("AdamMini fp32, stream in backward", "AdamMini", LR, FP32, EARLY),
        most_bytes=8.0,
    ),
    _ours(
        *("AdamMini int8, stream in backward", "AdamMini", LR, {"momentum_dtype": "int8"}, EARLY),
        most_bytes=2.05,
    ),
    _ours("AdamMini bf16 w, cpu", "AdamMini", LR, MASTER, CPU, most_bytes=4.0, **HALF),
    _ours(
        *("AdamMini bf16 w, cpu, loco4", "AdamMini", LR, MASTER, {**CPU, "grads": "loco4"}),
        most_bytes=2.6,
        is_exact=False,
        **HALF,
    ),
    _ours(
        *("AdamMini bf16 w, cpu, loco4, changed", "AdamMini", SMALL_LR, MASTER),
        {**CPU, **CHANGED, "grads": "loco4"},
        most_bytes=1.0,
        is_exact=False,
        **HALF,
    ),
    _ours("MoFO bf16 w, cpu, changed", "MoFO", SMALL_LR, MASTER, {**CPU, **CHANGED}, **HALF),
    _ours(
        "AdamMini bf16 w, auto", "AdamMini", LR, MASTER, {"mode": "auto"}, is_planned=True, **HALF
    ),
    _layout("layout of FSDP2 CPUOffloadPolicy", 12.0, gathered=True),
    _layout("layout of torchao CPUOffloadOptimizer", 8.0, gathered=False),
)
