"""``commrt.optim.offload``: an optimizer's state in host memory."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, TypeVar

import torch
from torch import nn

from commrt.collectives import order
from commrt.errors import ConfigError
from commrt.optim.base import StepOptimizer
from commrt.optim.offloading import plan as planning
from commrt.optim.offloading.engine import Engine
from commrt.optim.offloading.gates import root_of
from commrt.optim.offloading.gradients import Gradients
from commrt.optim.offloading.lanes import Lane, StreamLane, ThreadLane
from commrt.optim.offloading.link import Link, parse_rate

Mode = Literal["stream", "cpu", "auto"]
MODES = ("stream", "cpu", "auto")
WEIGHTS = ("whole", "changed")
_LEAST_CHUNK, _MOST_CHUNK, _CHUNKS = 1 << 18, 64 << 20, 24

T = TypeVar("T", bound=StepOptimizer)


def offload(
    optimizer: T,
    mode: Mode = "auto",
    *,
    model: nn.Module | None = None,
    grads: str = "none",
    weights: Literal["whole", "changed"] = "whole",
    folder: str | Path | None = None,
    link_rate: float | str | None = None,
    chunk_bytes: int | None = None,
    in_backward: bool = False,
) -> T:
    """Keep an optimizer's state in host memory, in pieces that come and go beside the step.

    The optimizer stays what it is, for schedulers, ``GradScaler``, clipping and checkpoints: the
    same weights and the same ``state_dict()``, to the bit, unless ``grads`` is a codec or bf16. The
    factor of clipping is that of this step, in every mode.

    Args:
        optimizer: One of commrt's; for AdamW's rule ``AdamW8bit(momentum_dtype="fp32")``. All its
            parameters are on one device.
        mode: Where a step is taken. "stream": on the device, to which the moments come in chunks,
            and go back. "cpu": on the host, to which gradients come, and from which weights go;
            master weights are there, too. "auto": some there, some here, by the measured rates of
            link, device and host; ``optimizer.offloaded.report()`` says how.
        model: Lets ``step()`` return at once, and each layer of this model wait for its own weights
            in the next forward; gradients come to the host during backward. Weights that are read
            elsewhere before that forward ends must be waited for: ``optimizer.offloaded.wait()``;
            the model's ``state_dict()`` does.
        grads: With "cpu": how gradients come: "none" (as they are), "bf16", or the spec string of a
            LoCo or block codec, such as "loco4", for matrices. What LoCo owes is in the
            ``state_dict()`` as ``grad_residual``. Block sums and norm are of the gradients as they
            were.
        weights: With "cpu": how weights go: "whole", or "changed", only the bits that differ, which
            pays for bf16 weights and small learning rates, and for MoFO.
        folder: With "stream": keep the state in a file there; host memory is then bounded by three
            chunks.
        link_rate: Bytes a second in each direction, or a text ("12GB/s"), that an emulated link is
            held to. Only without a GPU; there, copies are counted and ordered as on a real link.
        chunk_bytes: Of state in a chunk, of which three are on the device. Default: a
            twenty-fourth, at most 64 MiB.
        in_backward: With "stream", a model and no clipping: step a chunk as soon as its gradients
            are final, from the second step on. Between backward and ``step()`` neither gradients
            nor options may be changed, and ``step()`` may not be left out: else it raises. Not
            under DDP, whose gradients are final only when backward ends, nor with ``GradScaler``.

    Returns:
        The optimizer.

    Raises:
        ConfigError: A value is out of range, or the optimizer is not one of ours.
        OffloadError: There is not as much host memory, or room in ``folder``.

    Ranks: each for itself; call it before the first collective, since pinned memory is allocated.

    Cost: bytes a parameter and step over the link, both directions: "stream" twice the moments (16
    with AdamW, 8 with AdamMini, 4 in bf16, 2.03 with int8); "cpu" a gradient and a weight (8 in
    fp32, 4 in bf16, 2.52 with "loco4" and bf16 weights, below 1 with "changed", too). Memory of the
    host: the state; with "cpu" weights and gradients, too. Of the device: three chunks.
    """
    _check(optimizer, mode, grads, weights, folder)
    if model is not None:
        root_of(model)  # which may refuse it
    if in_backward and (mode != "stream" or model is None or optimizer.max_grad_norm is not None):
        raise ConfigError(
            f"in_backward=True with mode={mode!r}, max_grad_norm={optimizer.max_grad_norm}: must "
            "be stream, with a model, and None"
        )
    parameters = list(optimizer._parameters())
    device = parameters[0].device
    total = sum(optimizer.state_bytes_of(parameter) for parameter in parameters)
    if chunk_bytes is None:
        chunk_bytes = min(max(total // _CHUNKS, _LEAST_CHUNK), _MOST_CHUNK)
    if chunk_bytes < 1:
        raise ConfigError(f"chunk_bytes={chunk_bytes}: must be at least 1")
    gradients = Gradients(grads, optimizer._seed)
    link = Link(device, parse_rate(link_rate))
    is_patched = weights == "changed"
    engine = Engine(
        optimizer,
        _plan(optimizer, mode, link, gradients, is_patched=is_patched),
        link,
        _lanes(device),
        gradients,
        is_patched=is_patched,
        folder=None if folder is None else Path(folder),
        chunk_bytes=chunk_bytes,
    )
    optimizer.offloaded = engine
    optimizer._totals = None  # which may have to sum other blocks now
    for parameter in parameters:
        if parameter in optimizer.state:
            engine.adopt(parameter, optimizer.state[parameter])
    if model is not None:
        engine.overlap(model, in_backward=in_backward)
    return optimizer


def _lanes(device: torch.device) -> tuple[Lane, Lane]:
    """Of the device's steps, and of the host's."""
    threads = torch.get_num_threads()
    on_host = ThreadLane("commrt-host", threads)
    if order.is_queued(device):
        return StreamLane(device), on_host
    return ThreadLane("commrt-device", threads), on_host


def _plan(
    optimizer: StepOptimizer, mode: Mode, link: Link, gradients: Gradients, *, is_patched: bool
) -> planning.Plan:
    loads = planning.loads(optimizer, gradients, is_patched=is_patched)
    rates = planning.measure(optimizer, link)
    if mode == "auto" and not optimizer._READS_MOMENTA:
        return planning.choose(loads, rates)
    if mode == "stream":
        return planning.predict(loads, [], rates)
    return planning.predict([], loads, rates)


def _check(
    optimizer: StepOptimizer, mode: Mode, grads: str, weights: str, folder: str | Path | None
) -> None:
    if not isinstance(optimizer, StepOptimizer):
        raise ConfigError(
            f"optimizer is a {type(optimizer).__name__}: must be one of commrt's; for AdamW's rule "
            'AdamW8bit(momentum_dtype="fp32")'
        )
    for name, value, allowed in (("mode", mode, MODES), ("weights", weights, WEIGHTS)):
        if value not in allowed:
            raise ConfigError(f"{name}={value!r}: must be one of {', '.join(allowed)}")
    if optimizer.offloaded is not None:
        raise ConfigError("the optimizer is offloaded already")
    if mode == "stream" and optimizer._READS_MOMENTA:
        raise ConfigError(
            f"mode='stream' with {type(optimizer).__name__}, which reads all momenta before it "
            "steps: must be cpu"
        )
    if mode == "stream" and (grads, weights) != ("none", "whole"):
        raise ConfigError(f"grads={grads!r}, weights={weights!r}: must be none, whole with stream")
    if mode != "stream" and folder is not None:
        raise ConfigError(f"folder={str(folder)!r} with mode={mode!r}: must be stream")
    devices = {parameter.device for parameter in optimizer._parameters()}
    if len(devices) != 1:
        raise ConfigError(f"parameters are on {sorted(map(str, devices))}: must be on one device")
