"""Subtractive dither on a lattice, and what goes with it; see :mod:`commrt.ops`.

The encoder adds a dither u that it shares with the decoder and rounds to the lattice, the decoder
takes u away again: what it has is the value plus a noise that is uniform on the lattice's cell and
independent of the value, so the channel U = X + Z that distributed source coding is told with.

Element i of a whole tensor has ``word = philox(seed, 4, i // 4)[i % 4]``, and of that the uniform
number ``z = (word >> 8) * 2**-24`` on [0, 1) and the phase ``word >> 28``. Lattices:

``"z"``
    The integers. u = z - 1/2, on [-1/2, 1/2), so that the phase is floor(16 (u + 1/2)); the code
    is the integer.
``"e8"``
    E8 on each eight elements, from the first one on: all vectors of integers whose sum is even,
    and these moved by 1/2 in every coordinate. Its cells have a volume of 1, as those of the
    integers have, and less noise. u = 2 z - Q(2 z) with Q the nearest point: uniform on the cell
    around zero, since a cube of side 2 is a cell of 2 Z^8, which is in E8. The phase is
    floor(8 (u + 1)), at most 15. The code is twice the coordinate: a point's codes are all even or
    all odd.
"""

import torch
from torch import Tensor

from commrt.errors import ConfigError
from commrt.ops.arrays import takes_arrays
from commrt.ops.checks import check_device, check_like, check_matrix, check_vector

LATTICES = ("z", "e8")
# Elements that a point of the lattice has.
DIMENSION = {"z": 1, "e8": 8}
# Of the noise, an element, in steps squared (Conway and Sloane, 1982: E8 has 929 / 12960).
SECOND_MOMENT = {"z": 1 / 12, "e8": 929 / 12960}
# The code of what is no number.
NAN_CODE = -32768
PHASES = 16
MAX_CLASSES = 64
MAX_STACK = 1024
# Steps whose inverse is a normal number as well.
MIN_STEP, MAX_STEP = 2.0**-126, 2.0**126


@takes_arrays("codes")
def dither_quantise(
    values: Tensor,
    predicted: Tensor | None,
    codes: Tensor,
    step: float,
    seed: int,
    *,
    first_index: int = 0,
    lattice: str = "z",
) -> None:
    """Write the codes of ``values - predicted`` in steps, dithered.

    What :func:`dither_dequantise` makes of them has an error of mean zero and a variance of
    ``step**2 * SECOND_MOMENT[lattice]`` an element, uniform on the cell and independent of the
    values.

    With t = (values - predicted) * (1 / step), each operation rounded to fp32: the point of the
    lattice nearest to t + u. Of the integers, with ``"z"``, the even one of two that are as near.
    With ``"e8"`` the rules are those of :func:`commrt.ops.reference.nearest_e8`.

    Args:
        values: fp32, N elements; a multiple of 8 with ``"e8"``.
        predicted: As ``values``, or None for zeros.
        codes: int16, N elements, overwritten: -32767 to 32767, where larger ones are clamped (with
            ``"e8"``, t + u is clamped to +-16382 before), and -32768 for what is no number. With
            ``"e8"`` all eight elements of a point have that code if one of them is none.
        step: From 2**-126 to 2**126; rounded to fp32.
        seed: In [0, 2**63). Of the tensor: never to be used for another one.
        first_index: Index of the first element in the whole tensor, whose windows may be coded one
            by one; a multiple of 8 with ``"e8"``.
        lattice: ``"z"`` or ``"e8"``.

    Raises:
        ConfigError: A tensor or an argument is not as above.

    Cost: reads 8 bytes an element, 4 without ``predicted``; writes 2.

    Source: Zamir and Feder, "On lattice quantization noise", IEEE Trans. Inf. Theory 42(4), 1996;
    E8 and its nearest point: Conway and Sloane, "Fast quantizing and decoding algorithms for
    lattice quantizers and codes", IEEE Trans. Inf. Theory 28(2), 1982.
    """
    check_vector("values", values, torch.float32)
    check_like(values, "values", predicted=(predicted, torch.float32), codes=(codes, torch.int16))
    check_step(step)
    check_dither(values.numel(), seed, first_index, lattice)
    torch.ops.commrt.dither_quantise(values, predicted, codes, step, seed, first_index, lattice)


@takes_arrays("values")
def dither_dequantise(
    codes: Tensor,
    predicted: Tensor | None,
    values: Tensor,
    step: float,
    seed: int,
    *,
    first_index: int = 0,
    lattice: str = "z",
) -> None:
    """Write ``predicted + step * (point - u)``: the other end of :func:`dither_quantise`.

    point - u is rounded to fp32, and so is the product and sum, once: a fused multiply-add.

    Args:
        codes: int16, N elements: any, also such as no encoder writes. -32768 becomes NaN.
        predicted: fp32, N elements, or None for zeros; to the bit what the encoder had.
        values: fp32, N elements, overwritten.
        step: What the encoder had, as the others.
        seed: See there.
        first_index: See there.
        lattice: See there.

    Raises:
        ConfigError: A tensor or an argument is not as above.

    Cost: reads 6 bytes an element, 2 without ``predicted``; writes 4.
    """
    check_vector("codes", codes, torch.int16)
    check_like(codes, "codes", predicted=(predicted, torch.float32), values=(values, torch.float32))
    check_step(step)
    check_dither(codes.numel(), seed, first_index, lattice)
    torch.ops.commrt.dither_dequantise(codes, predicted, values, step, seed, first_index, lattice)


@takes_arrays("contexts", "rows")
def scale_rows(
    energies: Tensor | None,
    rows_of_class: Tensor,
    ends: Tensor,
    rows: Tensor,
    seed: int,
    *,
    base: int,
    contexts: Tensor | None = None,
    first_index: int = 0,
    lattice: str = "z",
) -> None:
    """Write the row of the coder's tables that each element has: by its scale and its dither.

    An element's class is the exponent of its energy and the highest bit of the mantissa, so half
    an octave, less ``base`` and clamped to [0, C): class 0 for zero, C - 1 for infinity and for
    what is no number. Its context is its class times 16 plus its phase, which is 0 to 15; its row
    is ``rows_of_class[group, class]`` plus its phase.

    Args:
        energies: fp32, N elements, at least 0; or None for zeros.
        rows_of_class: int16 (G, C), C from 1 to 64: the first of a class's 16 rows, for each of
            the groups that the elements are of.
        ends: int64, G elements: before which of the N a group ends, ascending. The last group has
            all that is left.
        rows: int16, N elements, overwritten.
        seed: That of :func:`dither_quantise`.
        base: The first class's ``bits(energy) >> 22``, 0 to 511.
        contexts: int16, N elements, overwritten; None where they are not asked for.
        first_index: As there.
        lattice: As there; it decides what the phase is.

    Raises:
        ConfigError: A tensor or an argument is not as above. What ``rows_of_class`` and ``ends``
            hold is not looked at.

    Cost: reads 4 bytes an element, none without ``energies``, and writes 2, with ``contexts`` 4.
    """
    check_vector("rows", rows, torch.int16)
    check_like(rows, "rows", energies=(energies, torch.float32), contexts=(contexts, torch.int16))
    check_vector("ends", ends, torch.int64)
    check_matrix("rows_of_class", rows_of_class, torch.int16, ends.numel())
    num_groups, num_classes = rows_of_class.shape
    if num_groups < 1 or not 1 <= num_classes <= MAX_CLASSES:
        raise ConfigError(
            f"rows_of_class has {num_groups} groups of {num_classes} classes: must have a group "
            f"and 1 to {MAX_CLASSES}"
        )
    check_device("ends", ends, "rows", rows)
    check_device("rows_of_class", rows_of_class, "rows", rows)
    if not 0 <= base < 512:
        raise ConfigError(f"base={base}: must be in [0, 512)")
    check_dither(rows.numel(), seed, first_index, lattice)
    torch.ops.commrt.scale_rows(
        rows, contexts, energies, rows_of_class, ends, base, seed, first_index, lattice
    )


@takes_arrays("out")
def lmmse_combine(stack: Tensor, weights: Tensor, out: Tensor) -> None:
    """Write the sum of ``weights[k] * stack[k]``, by fused multiply-adds in the order of k.

    The linear estimate of a mean from what is decoded of K clients.

    Args:
        stack: fp32 (K, N), K from 1 to 1024; each row contiguous, rows anywhere.
        weights: fp32, K elements, on the same device, where they stay.
        out: fp32, N elements, overwritten.

    Raises:
        ConfigError: A tensor is not as above.

    Cost: reads 4 K bytes an element, writes 4.
    """
    if stack.dtype != torch.float32 or stack.dim() != 2 or not 1 <= stack.shape[0] <= MAX_STACK:
        raise ConfigError(
            f"stack is {stack.dtype} {tuple(stack.shape)}: must be torch.float32 of 1 to "
            f"{MAX_STACK} rows"
        )
    if stack.shape[1] > 1 and stack.stride(1) != 1:
        raise ConfigError("stack has strided rows: each row must be contiguous")
    for name, tensor, numel in (("weights", weights, stack.shape[0]), ("out", out, stack.shape[1])):
        check_vector(name, tensor, torch.float32)
        if tensor.numel() != numel:
            raise ConfigError(f"{name} has {tensor.numel()} elements: must have {numel}")
        check_device(name, tensor, "stack", stack)
    torch.ops.commrt.lmmse_combine(stack, weights, out)


def check_step(step: float) -> None:
    """That it and its inverse are normal numbers."""
    if not MIN_STEP <= step <= MAX_STEP:
        raise ConfigError(f"step={step!r}: must be from 2**-126 to 2**126")


def check_dither(numel: int, seed: int, first_index: int, lattice: str) -> None:
    """That there is such a lattice, with whole points."""
    if lattice not in LATTICES:
        raise ConfigError(f"lattice={lattice!r}: must be one of {LATTICES}")
    if not 0 <= seed < 1 << 63:
        raise ConfigError(f"seed={seed}: must be in [0, 2**63)")
    if not 0 <= first_index < 1 << 62:
        raise ConfigError(f"first_index={first_index}: must be in [0, 2**62)")
    if numel % DIMENSION[lattice] or first_index % DIMENSION[lattice]:
        raise ConfigError(
            f"{numel} elements from first_index={first_index} on: lattice={lattice!r} needs "
            f"multiples of {DIMENSION[lattice]}"
        )
