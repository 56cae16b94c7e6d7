"""What the ops ask of the tensors they are given."""

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
    name: str, matrix: Tensor, dtype: torch.dtype, shape: tuple[int | None, int | None]
) -> None:
    """That it is contiguous and has this dtype and shape, None for any number."""
    if (
        matrix.dtype == dtype
        and matrix.dim() == 2
        and matrix.is_contiguous()
        and all(want in (None, size) for want, size in zip(shape, matrix.shape, strict=True))
    ):
        return
    wanted = ", ".join("any" if want is None else str(want) for want in shape)
    raise ConfigError(
        f"{name} is {matrix.dtype} {tuple(matrix.shape)}: must be {dtype} ({wanted}), contiguous"
    )


def check_like(first: Tensor, of: str, **others: tuple[Tensor | None, torch.dtype]) -> None:
    """That the others have as many elements as the first, on its device."""
    for name, (tensor, dtype) in others.items():
        if tensor is None:
            continue
        check_vector(name, tensor, dtype)
        if tensor.numel() != first.numel():
            raise ConfigError(
                f"{name} has {tensor.numel()} elements: must have {first.numel()}, as {of} has"
            )
        check_device(name, tensor, of, first)


def check_device(name: str, tensor: Tensor, of: str, first: Tensor) -> None:
    """That it is where the first one is."""
    if tensor.device != first.device:
        raise ConfigError(f"{name} is on {tensor.device}: must be on {first.device}, as {of} is")
