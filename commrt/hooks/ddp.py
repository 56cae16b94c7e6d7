"""DistributedDataParallel: the hook, and attaching it."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import GradBucket
from torch.nn.parallel import DistributedDataParallel

from commrt.codecs import Codec
from commrt.collectives.wrappers import plain_name
from commrt.errors import ConfigError
from commrt.hooks.comm import SPARSE, Comm


def attach_ddp(
    model: DistributedDataParallel,
    codec: str | Codec,
    gather: str | Codec | None,
    *,
    group: dist.ProcessGroup | None,
    **settings: Any,
) -> Comm:
    """See :func:`commrt.attach`."""
    if getattr(model, "skip_all_reduce_unused_params", False):
        raise ConfigError(
            "skip_all_reduce_unused_params=True: must be False, or steps go uncounted"
        )
    if not hasattr(model, "reducer"):
        raise ConfigError(
            "model has no buckets: delay_all_reduce_named_params names all its parameters"
        )
    comm = Comm(codec, gather, group=group or model.process_group, **settings)
    comm.may_have_unused = model.find_unused_parameters or model.static_graph
    parameters = {plain_name(name): part for name, part in model.module.named_parameters()}
    comm.bind(parameters.items(), _exempt(model))
    try:
        model.register_comm_hook(comm, ddp_hook)
    except RuntimeError as error:
        raise ConfigError(
            "model has a communication hook already: DDP takes one, wrap the model anew"
        ) from error
    comm.start(model.device or next(model.parameters()).device)
    return comm


def _exempt(model: DistributedDataParallel) -> dict[str, str]:
    reasons = dict.fromkeys(
        map(plain_name, model.parameters_to_ignore), "DDP does not hand it to the hook"
    )
    for name, module in model.module.named_modules():
        if getattr(module, "sparse", False) and isinstance(module, nn.Embedding | nn.EmbeddingBag):
            reasons[plain_name(f"{name}.weight".removeprefix("."))] = SPARSE
    return reasons


def ddp_hook(state: Comm, bucket: GradBucket) -> torch.futures.Future[Tensor]:
    """The hook itself, for ``model.register_comm_hook(commrt.Comm("loco4"), commrt.ddp_hook)``.

    Returns a future of the averaged bucket at once; the work is done in the order of the buckets,
    beside backward.
    """
    buffer = bucket.buffer()
    if buffer.is_sparse:
        return state.average_sparse(buffer, bucket.parameters(), bucket.is_last())
    first = buffer.storage_offset()
    parts = []
    for parameter, gradient in zip(bucket.parameters(), bucket.gradients(), strict=True):
        begin = gradient.storage_offset() - first
        parts.append((parameter, buffer[begin : begin + gradient.numel()]))
    return state.average(buffer, parts, bucket.is_last())
