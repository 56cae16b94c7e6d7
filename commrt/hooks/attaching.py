"""``commrt.attach``: one line after the model is wrapped."""

import sys
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.amp import GradScaler
from torch.nn.parallel import DistributedDataParallel

from commrt.codecs import Codec, DeltaCodec, parse
from commrt.errors import ConfigError
from commrt.hooks.base import BaseComm
from commrt.hooks.ddp import attach_ddp
from commrt.hooks.sharded import ShardedComm


def attach(
    model: nn.Module,
    codec: str | Codec = "loco4",
    gather: str | Codec | None = None,
    *,
    min_numel: int = 1024,
    group: dist.ProcessGroup | None = None,
    seed: int = 0,
    warmup: int = 0,
    hierarchy: int | Sequence[Sequence[int]] | None = None,
    intra: str | Codec = "none",
    small: str | Codec = "none",
    returns: str | Codec | None = None,
    grad_scaler: GradScaler | None = None,
    residuals: str = "device",
) -> BaseComm:
    """Send the gradients of a DDP or FSDP model at low bits, error-compensated; weights if asked.

    The default sends 4-bit LoCo codes. Residuals are kept by parameter name, so DDP may rebuild its
    buckets, and a state goes from any of these kinds of model to any other:

    * ``DistributedDataParallel``: codes to the owners, the mean back in ``gather``.
    * ``fully_shard`` (FSDP2): codes in the reduce-scatter, weights in ``gather``. With a mesh of
      two dimensions (HSDP) codes travel between replicas, and back in ``returns``; inside a shard
      group gradients travel in ``intra``. Every module keeps its settings:
      ``reshard_after_forward``, mixed precision, offloading, prefetch, divide factors.
    * ``FullyShardedDataParallel`` (FSDP1): codes in the reduce-scatter; with ``NO_SHARD`` to their
      owners and back in ``returns``. Its hook does not reach the weights, and hybrid strategies
      call none.

    Args:
        model: Wrapped, without a communication hook.
        codec: Spec string or codec of the reduce leg, see :func:`commrt.parse`.
        gather: DDP: of the return leg, ``"block8"`` (default), another block codec or ``"none"``,
            fp32. FSDP2: of the weights, ``"none"`` (default), ``"block8"``, or ``"delta4"``, their
            differences, for modules with ``reshard_after_forward=False``.
        min_numel: Parameters with fewer elements travel uncompressed, as do those with fewer than
            two dimensions and, of sharded models, those whose shards do not fill a block.
        group: All ranks that train the model. Default: the model's own process group.
        seed: Of stochastic rounding, where a codec uses it.
        warmup: Steps at the start that are averaged uncompressed.
        hierarchy: Ranks a node (consecutive ranks being neighbours; under torchrun
            ``int(os.environ["LOCAL_WORLD_SIZE"])``; fewer beside tensor parallelism), or the ranks
            of each node: gradients are averaged inside each node first, and only the node's mean is
            compressed.
        intra: Codec inside a node: ``"none"`` or a block codec such as ``"block8"``.
        small: Codec of the parameters that are exempt by size: ``"none"`` or ``"block8"``.
        returns: FSDP with replicas: of the mean's way back, as ``gather`` is for DDP.
        residuals: FSDP: ``"device"``, or ``"host"`` to keep them in (pinned) host memory and on the
            device only those of two units at a time.
        grad_scaler: The ``torch.amp.GradScaler`` of the loss, if there is one: a change of the loss
            scale then rescales the residuals.

    Returns:
        The communication of the model: ``state_dict``, ``load_state_dict``, ``stats``, ``report``,
        ``detach``.

    Raises:
        ConfigError: For another model, one with a hook, a bad codec, or what a kind of model cannot
            do; before any communication.
        PeerMismatchError: On every rank, if ranks have attached different settings.

    Ranks: all ranks of the group, at the same point of the program.

    Cost: memory of 1.02 bytes a parameter for the residual, 0.52 with ``residual=4``, sharded or
    not (with a hierarchy, divided by the ranks of a node; with HSDP, by those of a shard group),
    and less than two buckets or units for payloads. On a CPU the gradients of up to five FSDP2
    units are alive at a time, on their way beside backward.

    GradScaler: an overflow shows on every rank, which so skip the step together (with FSDP1 only
    under torch's ShardedGradScaler); residuals of the blocks that were not finite stay as they
    were.

    FSDP2: gradients of unused parameters are zeros, not None, since buffers must keep their layout.
    So ``torch.autograd.grad`` leaves gradients of zeros, and a module that is called several times
    in a forward is reduced as often. On a CPU gradients of other modules are not to be looked at
    before backward ends, but by hooks on parameters.
    """
    settings: dict[str, Any] = {
        "min_numel": min_numel,
        "group": group,
        "seed": seed,
        "warmup": warmup,
        "hierarchy": hierarchy,
        "intra": intra,
        "small": small,
        "grad_scaler": grad_scaler,
    }
    if isinstance(model, DistributedDataParallel):
        if returns is not None:
            raise ConfigError(f"returns={returns!r}: must be None with DDP, where it is gather=")
        if residuals != "device":
            raise ConfigError(f"residuals={residuals!r}: must be 'device' with DDP")
        return attach_ddp(model, codec, gather, **settings)
    if _is_of_fsdp(model, "FSDPModule"):
        return _attach_fsdp2(model, codec, gather, returns=returns, residuals=residuals, **settings)
    if _is_of_fsdp(model, "FullyShardedDataParallel"):
        return _attach_fsdp1(model, codec, gather, returns=returns, residuals=residuals, **settings)
    if hasattr(model, "_orig_mod"):
        raise ConfigError("model is compiled: attach before torch.compile")
    raise ConfigError(
        f"model is a {type(model).__name__}: must be a DistributedDataParallel, a "
        "FullyShardedDataParallel or sharded by fully_shard; attach after wrapping"
    )


def _is_of_fsdp(model: nn.Module, kind: str) -> bool:
    """Whether it is; without importing FSDP, which takes long, for those who do not use it."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(model, getattr(fsdp, kind))


def _attach_fsdp2(
    model: nn.Module,
    codec: str | Codec,
    gather: str | Codec | None,
    *,
    group: dist.ProcessGroup | None,
    **settings: Any,
) -> ShardedComm:
    from commrt.hooks import fsdp2

    found = fsdp2.find_units(model)
    if gather is not None and isinstance(parse(gather), DeltaCodec):
        fsdp2.check_stays_gathered(found)
    kind = "HSDP" if any(unit.replicas for _, _, unit in found) else "FSDP2"
    units = [unit for _, _, unit in found]
    group = group or fsdp2.parent_group(found)
    comm = ShardedComm(kind, units, codec, gather, group=group, **settings)
    comm.start()
    fsdp2.install(comm, found)
    return comm


def _attach_fsdp1(
    model: Any,
    codec: str | Codec,
    gather: str | Codec | None,
    *,
    group: dist.ProcessGroup | None,
    **settings: Any,
) -> ShardedComm:
    from commrt.hooks import fsdp1

    if gather not in (None, "none"):
        raise ConfigError(f"gather={gather!r}: FSDP1 has no hook for its weights; use fully_shard")
    found = fsdp1.find_units(model)
    units = [unit for _, unit in found]
    comm = ShardedComm("FSDP1", units, codec, gather, group=group or units[0].shards, **settings)
    comm.start()
    fsdp1.install(comm, model, found)
    return comm
