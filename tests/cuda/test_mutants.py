"""Tier 5: seeded mistakes in the kernels, each of which a named tier has to catch.

So the tiers are known to be able to fail.
"""

import dataclasses
import shutil
from pathlib import Path

import pytest

from tests.cuda.building import CSRC, attempt, mutant_program

DIFFERENT, RACE, OVERFLOW = "DIFFERENT", "data race", "heap-buffer-overflow"
# Ops whose kernels are in a file of another name.
STEPS = ("adam_mini", "adamw", "adan", "lion", "mofo", "square_sums")
SOURCES = {
    **dict.fromkeys(("block_decode", "decode_average"), "decode"),
    **dict.fromkeys(("coset_llr", "coset_decode"), "coset"),
    **dict.fromkeys(("dither_quantise", "dither_dequantise", "scale_rows"), "dither"),
    **dict.fromkeys(("rans_encode", "rans_decode"), "rans"),
    **dict.fromkeys(STEPS, "step"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mutant:
    """A mistake: text of a file of csrc/cuda replaced, and what the tier says of it."""

    tier: str
    op: str
    file: str
    old: str
    new: str
    says: str


MUTANTS = {
    "no barrier between staging and summing": Mutant(
        tier="tsan",
        op="block_encode",
        file="tile.cuh",
        old="  __syncwarp();\n  const auto column",
        new="  const auto column",
        says=RACE,
    ),
    "no barrier before the residual's scale is replaced": Mutant(
        tier="tsan",
        op="loco_encode",
        file="encode.cuh",
        old="  __syncwarp();  // all lanes have read the old scale\n",
        new="",
        says=RACE,
    ),
    "every thread block has the same scales": Mutant(
        tier="tsan",
        op="rescale",
        file="rescale.cuh",
        old="std::int64_t{blockIdx.x} * threads + threadIdx.x",
        new="std::int64_t{threadIdx.x}",
        says=RACE,
    ),
    "a row that forgets changes of the one before": Mutant(
        tier="plain",
        op="patch_apply",
        file="patch_apply.cuh",
        old="num_changed += changes.total;",
        new="num_changed += changes.before;",
        says=DIFFERENT,
    ),
    "codes that are read where none are left": Mutant(
        tier="asan",
        op="patch_apply",
        file="patch_apply.cuh",
        old="if (skipped + count > 8) eight",
        new="if (skipped > 0) eight",
        says=OVERFLOW,
    ),
    "words in the order of the other lanes": Mutant(
        tier="plain",
        op="rans_encode",
        file="rans.cuh",
        old="next[votes_before(votes, lane.index)] = static_cast<std::uint16_t>(state);",
        new="next[__popc(votes) - 1 - votes_before(votes, lane.index)] =\n"
        "          static_cast<std::uint16_t>(state);",
        says=DIFFERENT,
    ),
    "words that are moved before others have read them": Mutant(
        tier="tsan",
        op="rans_encode",
        file="rans.cuh",
        old="    __syncwarp();  // all have read what others overwrite\n",
        new="",
        says=RACE,
    ),
    "codes that escape in the order of the other lanes": Mutant(
        tier="plain",
        op="rans_encode",
        file="rans.cuh",
        old="first_escaped + votes_before(escaping, lane.index);",
        new="first_escaped + __popc(escaping) - 1 - votes_before(escaping, lane.index);",
        says=DIFFERENT,
    ),
    "a stream that is read behind its end": Mutant(
        tier="asan",
        op="rans_decode",
        file="rans.cuh",
        old="is_good &= !takes || place < length;",
        new="is_good &= !takes || place <= length;",
        says=OVERFLOW,
    ),
    "a decoder that ends anywhere": Mutant(
        tier="plain",
        op="rans_decode",
        file="rans.cuh",
        old="lane.index == 0 ? state >> kWordBits == 1 : state == kLeastState",
        new="lane.index == 0 || state == kLeastState",
        says=DIFFERENT,
    ),
    "a store one element too far": Mutant(
        tier="asan",
        op="block_decode",
        file="memory.cuh",
        old="if (i < valid) to[i] = x[i];",
        new="if (i <= valid) to[i] = x[i];",
        says=OVERFLOW,
    ),
    "a load one element too far": Mutant(
        tier="asan",
        op="block_encode",
        file="memory.cuh",
        old="x[i] = i < valid ? from[i] : 0.0f;",
        new="x[i] = i <= valid ? from[i] : 0.0f;",
        says=OVERFLOW,
    ),
    "blocks that do not exist are written": Mutant(
        tier="asan",
        op="block_encode",
        file="tile.cuh",
        old="is_block = block < num_blocks;",
        new="is_block = block <= num_blocks;",
        says=OVERFLOW,
    ),
    "a mask without half of the warp": Mutant(
        tier="plain",
        op="block_encode",
        file="tile.cuh",
        old="__shfl_xor_sync(kAllLanes, x, distance);\n    x = other",
        new="__shfl_xor_sync(0xffffu, x, distance);\n    x = other",
        says="the mask does not name the lane that calls",
    ),
    "lanes without a block leave early": Mutant(
        tier="plain",
        op="block_encode",
        file="encode.cuh",
        old="  float x[rows][kPerLane];\n",
        new="  if (!place.is_block) return;\n  float x[rows][kPerLane];\n",
        says="threads wait for each other",
    ),
    "codes of the wrong neighbour": Mutant(
        tier="plain",
        op="block_encode",
        file="tile.cuh",
        old="is_second ? low : high, 2);\n    return",
        new="is_second ? low : high, 1);\n    return",
        says=DIFFERENT,
    ),
    "vectors at any address": Mutant(
        tier="plain",
        op="block_encode",
        file="memory.cuh",
        old="if (valid == kPerLane && is_aligned(from, 16)) {\n    const auto* vectors",
        new="if (valid == kPerLane) {\n    const auto* vectors",
        says="misaligned address of a 16-byte access",
    ),
    "a fused multiply-add that rounds once": Mutant(
        tier="plain",
        op="loco_encode",
        file="encode.cuh",
        old="h[row][i] = error[i] * keep + release * missed;",
        new="h[row][i] = fmaf(error[i], keep, release * missed);",
        says=DIFFERENT,
    ),
    "random numbers of the codes for the residual": Mutant(
        tier="plain",
        op="loco_encode",
        file="encode.cuh",
        old="Stream::kResidual",
        new="Stream::kCodes",
        says=DIFFERENT,
    ),
    "the last thread block is not launched": Mutant(
        tier="plain",
        op="decode_average_encode",
        file="launch.cuh",
        old="(tiles + kWarps - 1) / kWarps",
        new="(tiles + kWarps - 1) / kWarps - (tiles > kWarps)",
        says=DIFFERENT,
    ),
    "a scale replaced before all lanes have read it": Mutant(
        tier="tsan",
        op="lion",
        file="step.cuh",
        old="    __syncwarp();  // all lanes have read the former scale\n",
        new="",
        says=RACE,
    ),
    "the largest of half a segment": Mutant(
        tier="plain",
        op="lion",
        file="step.cuh",
        old="moment_scale(max_over(kWarp, most), format)",
        new="moment_scale(max_over(kWarp / 2, most), format)",
        says=DIFFERENT,
    ),
    "squares that are left out": Mutant(
        tier="plain",
        op="square_sums",
        file="step.cuh",
        old="x[i] += x[i + width];",
        new="x[i] = x[i + width];",
        says=DIFFERENT,
    ),
    "second moments of the first row only": Mutant(
        tier="plain",
        op="adam_mini",
        file="step.cuh",
        old="row < first + tensor.block_rows; row += kWarp",
        new="row <= first; row += kWarp",
        says=DIFFERENT,
    ),
    "elements before the window are written": Mutant(
        tier="asan",
        op="dither_quantise",
        file="dither.cuh",
        old="return i >= begin && i < end;",
        new="return i < end;",
        says=OVERFLOW,
    ),
    "four elements with the dither of the four before": Mutant(
        tier="plain",
        op="scale_rows",
        file="dither.cuh",
        old="Stream::kDither, (index + i) / 4)",
        new="Stream::kDither, index / 4)",
        says=DIFFERENT,
    ),
    "the rows of the first element's group": Mutant(
        tier="plain",
        op="scale_rows",
        file="dither.cuh",
        old="    group = next_group(args.groups, group, at.element + i);\n",
        new="",
        says=DIFFERENT,
    ),
    "a decoded value that is rounded twice": Mutant(
        tier="plain",
        op="dither_dequantise",
        file="dither.cuh",
        old="fmaf(args.step, offset, x[i])",
        new="args.step * offset + x[i]",
        says=DIFFERENT,
    ),
    "whole vectors where rows end": Mutant(
        tier="asan",
        op="lmmse_combine",
        file="lmmse_combine.cuh",
        old="store_floats(args.out + element, valid, sum)",
        new="store_floats(args.out + element, kPerLane, sum)",
        says=OVERFLOW,
    ),
    "a weight of the row before": Mutant(
        tier="plain",
        op="lmmse_combine",
        file="lmmse_combine.cuh",
        old="args.weights[k]",
        new="args.weights[k > 0 ? k - 1 : 0]",
        says=DIFFERENT,
    ),
    "a path goes on before the others have said what their ways cost": Mutant(
        tier="tsan",
        op="polar_decode",
        file="polar_decode.cuh",
        old="      if (is_active()) offer_ways(level, each);\n      __syncthreads();\n",
        new="      if (is_active()) offer_ways(level, each);\n",
        says=RACE,
    ),
    "a right half whose LLRs are those of the path's number, not of its origin": Mutant(
        tier="plain",
        op="polar_decode",
        file="polar_decode.cuh",
        old="const float* from = llr_of(level + 1, origin);",
        new="const float* from = llr_of(level + 1, origin * 0 + path_);",
        says=DIFFERENT,
    ),
    "scratch for one path more than there are": Mutant(
        tier="asan",
        op="polar_decode",
        file="polar_decode.cuh",
        old="return levels + ((paths + path) << level);",
        new="return levels + ((paths + 1 + path) << level);",
        says=OVERFLOW,
    ),
    "a step of the transform that overtakes the one before": Mutant(
        tier="tsan",
        op="polar_transform",
        file="polar_transform.cuh",
        old="    __syncthreads();\n    for (int i = static_cast<int>(threadIdx.x)",
        new="    for (int i = static_cast<int>(threadIdx.x)",
        says=RACE,
    ),
    "a step of the transform too few": Mutant(
        tier="plain",
        op="polar_transform",
        file="polar_bits.cuh",
        old="return word ^ word >> 16;",
        new="return word;",
        says=DIFFERENT,
    ),
    "an LLR of an element behind the last": Mutant(
        tier="asan",
        op="coset_llr",
        file="coset.cuh",
        old="if (i >= args.numel) return;\n  args.llr",
        new="if (i > args.numel) return;\n  args.llr",
        says=OVERFLOW,
    ),
    "a coset that is searched with the modulus twice": Mutant(
        tier="plain",
        op="coset_decode",
        file="coset.cuh",
        old="args.residues[i], args.modulus, args.inverse_modulus",
        new="args.residues[i], args.modulus, args.modulus",
        says=DIFFERENT,
    ),
    "ranks are summed in the wrong order": Mutant(
        tier="plain",
        op="decode_average",
        file="decode.cuh",
        old="mean[row][i] = fmaf(code[i], scale, mean[row][i]);",
        new="mean[row][i] = fmaf(code[i], scale / 3, mean[row][i]) + code[i] * (scale * 2 / 3);",
        says=DIFFERENT,
    ),
}


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", MUTANTS)
def test_a_tier_catches(name: str, tmp_path: Path) -> None:
    """By its own name for the mistake, and with a failing exit code."""
    mutant = MUTANTS[name]
    csrc = tmp_path / "csrc"
    shutil.copytree(CSRC, csrc)
    path = csrc / "cuda" / mutant.file
    text = path.read_text()
    assert text.count(mutant.old) == 1
    path.write_text(text.replace(mutant.old, mutant.new))
    source = SOURCES.get(mutant.op, mutant.op)
    program = mutant_program(mutant.tier, csrc, [source], tmp_path / "built")
    # The lines it runs must not count as covered by the checks.
    environment = {"GCOV_PREFIX": str(tmp_path), "TSAN_OPTIONS": "halt_on_error=1"}
    found = attempt([program, mutant.op], **environment)
    assert found.returncode != 0
    assert mutant.says in found.stdout
