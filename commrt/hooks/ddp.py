"""DistributedDataParallel: the hook, and attaching it."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import GradBucket
from torch.amp import GradScaler
from torch.nn.parallel import DistributedDataParallel

from commrt.codecs import Codec
from commrt.errors import ConfigError
from commrt.hooks.comm import SPARSE, Comm


def attach(
    model: DistributedDataParallel,
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
    grad_scaler: GradScaler | None = None,
) -> Comm:
    """Send a DDP model's gradients at low bits, error-compensated.

    The default sends 4-bit LoCo codes and returns the mean at 8 bits: about 5 times fewer bytes
    than fp32. Residuals are kept by parameter name, so DDP may rebuild its buckets.

    Args:
        model: Wrapped in ``DistributedDataParallel``, without a communication hook.
        codec: Spec string or codec of the reduce leg, see :func:`commrt.parse`.
        gather: Of the return leg: ``"block8"`` (default), another block codec, or ``"none"``, fp32.
        min_numel: Parameters with fewer elements travel uncompressed, as do those with fewer than
            two dimensions.
        group: Default: the model's own process group.
        seed: Of stochastic rounding, where a codec uses it.
        warmup: Steps at the start that are averaged uncompressed.
        hierarchy: Ranks a node (consecutive ranks being neighbours; under torchrun
            ``int(os.environ["LOCAL_WORLD_SIZE"])``), or the ranks of each node: gradients are
            averaged inside each node first, and only the node's mean is compressed.
        intra: Codec inside a node: ``"none"`` or a block codec such as ``"block8"``.
        small: Codec of the parameters that are exempt by size: ``"none"`` or ``"block8"``.
        grad_scaler: The ``torch.amp.GradScaler`` of the loss, if there is one: a change of the loss
            scale then rescales the residuals.

    Returns:
        The :class:`Comm` of the model: ``state_dict``, ``load_state_dict``, ``stats``, ``report``,
        ``detach``.

    Raises:
        ConfigError: For a model that is not DDP or has a hook, or a bad codec; before any
            communication.
        PeerMismatchError: On every rank, if ranks have attached different settings.

    Ranks: all ranks of the group, at the same point of the program.

    Cost: memory of 1.02 bytes a parameter for the residual (with a hierarchy, divided by the ranks
    of a node) and less than two buckets for payloads.

    GradScaler: an overflow shows on every rank, which so skip the step together; residuals of the
    blocks that were not finite stay as they were.
    """
    if not isinstance(model, DistributedDataParallel):
        raise ConfigError(
            f"model is a {type(model).__name__}: must be a DistributedDataParallel; "
            "attach after wrapping"
        )
    if getattr(model, "skip_all_reduce_unused_params", False):
        raise ConfigError(
            "skip_all_reduce_unused_params=True: must be False, or steps go uncounted"
        )
    if not hasattr(model, "reducer"):
        raise ConfigError(
            "model has no buckets: delay_all_reduce_named_params names all its parameters"
        )
    comm = Comm(
        codec,
        gather,
        min_numel,
        group or model.process_group,
        seed,
        warmup=warmup,
        hierarchy=hierarchy,
        intra=intra,
        small=small,
        grad_scaler=grad_scaler,
    )
    comm.may_have_unused = model.find_unused_parameters or model.static_graph
    parameters = {_plain(name): part for name, part in model.module.named_parameters()}
    comm.bind(parameters.items(), _exempt(model))
    try:
        model.register_comm_hook(comm, ddp_hook)
    except RuntimeError as error:
        raise ConfigError(
            "model has a communication hook already: DDP takes one, wrap the model anew"
        ) from error
    comm.start(model.device or next(model.parameters()).device)
    return comm


def _plain(name: str) -> str:
    """Without what torch.compile adds, so that a state fits the model compiled or not."""
    return name.replace("_orig_mod.", "")


def _exempt(model: DistributedDataParallel) -> dict[str, str]:
    reasons = dict.fromkeys(
        map(_plain, model.parameters_to_ignore), "DDP does not hand it to the hook"
    )
    for name, module in model.module.named_modules():
        if getattr(module, "sparse", False) and isinstance(module, nn.Embedding | nn.EmbeddingBag):
            reasons[_plain(f"{name}.weight".removeprefix("."))] = SPARSE
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
