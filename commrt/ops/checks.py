"""What the ops ask of the tensors they are given.

Each check first asks in the fewest steps, since small tensors are checked as often as large ones.
"""

import torch
from torch import Tensor

from commrt.errors import ConfigError


def check_vector(name: str, flat: Tensor, *dtypes: torch.dtype) -> None:
    """That it is 1-D, contiguous and of one of these dtypes."""
    if flat.dtype in dtypes and flat.dim() == 1 and flat.is_contiguous():
        return
    wanted = str(dtypes[0]) if len(dtypes) == 1 else f"one of {dtypes}"
    raise ConfigError(
        f"{name} is {flat.dtype} {tuple(flat.shape)}: must be {wanted}, 1-D and contiguous"
    )


def check_matrix(
    name: str, matrix: Tensor, dtype: torch.dtype, rows: int, cols: int | None = None
) -> None:
    """That it is contiguous and has this dtype, rows and columns; any columns for None."""
    shape = matrix.shape
    is_shape = len(shape) == 2 and shape[0] == rows and cols in (None, shape[1])
    if is_shape and matrix.dtype == dtype and matrix.is_contiguous():
        return
    wanted = f"({rows}, {'any' if cols is None else cols})"
    raise ConfigError(
        f"{name} is {matrix.dtype} {tuple(shape)}: must be {dtype} {wanted}, contiguous"
    )


def check_like(first: Tensor, of: str, **others: tuple[Tensor | None, torch.dtype]) -> None:
    """That the others are vectors with as many elements as the first, on its device."""
    numel, device = first.numel(), first.device
    for name, (tensor, dtype) in others.items():
        if tensor is None:
            continue
        if (
            tensor.dtype == dtype
            and tensor.dim() == 1
            and tensor.numel() == numel
            and tensor.device == device
            and tensor.is_contiguous()
        ):
            continue
        check_vector(name, tensor, dtype)
        if tensor.numel() != numel:
            raise ConfigError(
                f"{name} has {tensor.numel()} elements: must have {numel}, as {of} has"
            )
        check_device(name, tensor, of, first)


def check_device(name: str, tensor: Tensor, of: str, first: Tensor) -> None:
    """That it is where the first one is."""
    if tensor.device != first.device:
        raise ConfigError(f"{name} is on {tensor.device}: must be on {first.device}, as {of} is")
