"""Every op in plain torch: slow, obvious, the specification.

The native kernels give the same bits; ``tests/native`` holds them to it. All arithmetic is fp32,
but for sums of squares and products, and each operation rounds where theirs does.
"""

from commrt.ops.reference.blocks import (
    STREAM_CODES,
    STREAM_RESIDUAL,
    block_decode,
    block_encode,
    decode_average,
    decode_average_encode,
    loco_encode,
    philox,
    rescale_,
)
from commrt.ops.reference.dither import (
    STREAM_DITHER,
    dither_dequantise,
    dither_quantise,
    lmmse_combine,
    nearest_e8,
    scale_rows,
)
from commrt.ops.reference.patches import patch_apply_, patch_encode
from commrt.ops.reference.polar import coset_decode, coset_llr, polar_decode, polar_transform_
from commrt.ops.reference.rans import rans_count_, rans_decode, rans_encode
from commrt.ops.reference.sources import (
    source_energies,
    source_history,
    source_prediction,
    source_products,
)
from commrt.ops.reference.steps import adam_mini_, adamw_, adan_, lion_, mofo_, square_sums
from commrt.ops.reference.updates import (
    update_add_,
    update_codes,
    update_products,
    update_rows,
    update_values,
)

__all__ = [
    "STREAM_CODES",
    "STREAM_DITHER",
    "STREAM_RESIDUAL",
    "adam_mini_",
    "adamw_",
    "adan_",
    "block_decode",
    "block_encode",
    "coset_decode",
    "coset_llr",
    "decode_average",
    "decode_average_encode",
    "dither_dequantise",
    "dither_quantise",
    "lion_",
    "lmmse_combine",
    "loco_encode",
    "mofo_",
    "nearest_e8",
    "patch_apply_",
    "patch_encode",
    "philox",
    "polar_decode",
    "polar_transform_",
    "rans_count_",
    "rans_decode",
    "rans_encode",
    "rescale_",
    "scale_rows",
    "source_energies",
    "source_history",
    "source_prediction",
    "source_products",
    "square_sums",
    "update_add_",
    "update_codes",
    "update_products",
    "update_rows",
    "update_values",
]
