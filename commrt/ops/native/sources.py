"""The operators on sources, by the native module; on the CPU only."""

from collections.abc import Callable, Sequence

from torch import Tensor

from commrt.ops.native.module import DTYPE_CODE, native, threads

SCHEMAS = (
    "source_energies(Tensor(a!) energies, Tensor? previous, Tensor? own, float previous_weight, "
    "int[] shapes) -> ()",
    "source_prediction(Tensor(a!) predicted, Tensor? previous, Tensor? own, float[] weights, "
    "Tensor ends) -> ()",
    "source_products(Tensor(a!) products, Tensor update, Tensor? previous, Tensor? own, "
    "Tensor ends) -> ()",
    "source_history(Tensor(a!) kept, Tensor decoded, Tensor predicted, Tensor rows, "
    "Tensor shares) -> ()",
)


def _source(tensor: Tensor | None) -> object:
    if tensor is None:
        return native.Source(0, 0)
    return native.Source(tensor.data_ptr(), DTYPE_CODE[tensor.dtype])


def source_energies(
    energies: Tensor,
    previous: Tensor | None,
    own: Tensor | None,
    previous_weight: float,
    shapes: Sequence[int],
) -> None:
    """See :func:`commrt.ops.source_energies`."""
    native.source_energies(
        energies.data_ptr(), _source(previous), _source(own), previous_weight, shapes, threads()
    )


def source_prediction(
    predicted: Tensor,
    previous: Tensor | None,
    own: Tensor | None,
    weights: Sequence[float],
    ends: Tensor,
) -> None:
    """See :func:`commrt.ops.source_prediction`."""
    native.source_prediction(
        predicted.data_ptr(),
        predicted.numel(),
        _source(previous),
        _source(own),
        weights,
        native.Groups(ends.data_ptr(), ends.numel()),
        threads(),
    )


def source_products(
    products: Tensor, update: Tensor, previous: Tensor | None, own: Tensor | None, ends: Tensor
) -> None:
    """See :func:`commrt.ops.source_products`."""
    native.source_products(
        products.data_ptr(),
        update.data_ptr(),
        update.numel(),
        _source(previous),
        _source(own),
        native.Groups(ends.data_ptr(), ends.numel()),
        threads(),
    )


def source_history(
    kept: Tensor, decoded: Tensor, predicted: Tensor, rows: Tensor, shares: Tensor
) -> None:
    """See :func:`commrt.ops.source_history`."""
    native.source_history(
        kept.data_ptr(),
        decoded.data_ptr(),
        predicted.data_ptr(),
        rows.data_ptr(),
        kept.numel(),
        shares.data_ptr(),
        shares.numel(),
        threads(),
    )


KERNELS: tuple[Callable[..., None], ...] = ()
CPU_KERNELS: tuple[Callable[..., None], ...] = (
    source_energies,
    source_prediction,
    source_products,
    source_history,
)
