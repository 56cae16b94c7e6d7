"""Polar codes of bit planes: how much more than the entropy they take, how often they fail, speed.

Gaussian numbers are rounded with a dither to integers; the receiver knows each but for a Gaussian
error of ``sigma`` quantizer steps. Everything is really decoded. Two tables:

- Planes by themselves: what has to be sent beyond the entropy for 5 % of the blocks to fail, with
  each number of paths; and, made anew, the fit that commrt.codecs.polar.bits_needed() has.
- Whole integers: all planes that are sent, each given those below as they were decoded. ``gap`` is
  what is sent less H(n | side information). A block fails if any integer of it is wrong. Speed is
  of all that the receiver does, by the time of one core.

    python -m bench.polar -o bench/results/polar.json
"""

import argparse
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench import harness
from commrt import ops
from commrt.codecs import polar
from commrt.ops.polar import PATHS

LIMIT = 0.05
SHARES = (2.2, 1.8, 1.5, 1.3, 1.15, 1.0, 0.9, 0.8, 0.7, 0.6)  # of the gap of bits_needed()
# (sigma, plane): entropies from 0.003 to 0.98.
PLANES = (
    *((0.1, 0), (0.15, 0), (0.2, 0), (0.3, 0), (0.4, 0), (0.5, 0), (0.6, 0)),
    *((0.2, 1), (0.25, 1), (0.3, 1), (0.4, 1), (0.5, 1), (0.6, 1), (0.8, 1)),
    *((1.0, 2), (1.5, 2), (2.0, 3), (4.0, 3)),
)
SIGMAS = (0.1, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 1.0, 2.0, 4.0)
PLANE_COLUMNS = ("log2_size", "sigma", "plane", "entropy", "paths", "gap", "fit", "failures")
WHOLE_COLUMNS = ("log2_size", "sigma", "margin", "entropy", "gap", "failures", "mcoords_per_s")
FIT_COLUMNS = ("constant", "measured", "used")


def sample(sigma: float, shape: tuple[int, int], seed: int) -> tuple[Tensor, Tensor]:
    """Integers and the positions that the receiver has for them, in steps."""
    generator = torch.Generator().manual_seed(seed)
    side, error = torch.randn((2, *shape), generator=generator)
    dither = torch.rand(shape, generator=generator) - 0.5
    codes = (10 * side + sigma * error + dither).round().to(torch.int16)
    return codes, 10 * side + dither


def plane_llr(position: Tensor, below: Tensor, sigma: float, plane: int) -> Tensor:
    """Given the bits below."""
    table = polar.plane_table(sigma * 2.0**-plane, 2.0**-plane)
    llr = torch.empty(position.numel())
    ops.coset_llr(position.flatten(), below.flatten(), plane, table, llr)
    return llr.view(position.shape)


def entropy_of(sigma: float, plane: int) -> float:
    return polar.plane_entropy(sigma * 2.0**-plane, 2.0**-plane)


def failing(bits: Tensor, llr: Tensor, entropy: float, count: int, paths: int) -> float:
    """The share of blocks that are not decoded."""
    entropy_bin = polar.entropy_bin_of(entropy)
    sent = polar.encode_plane(bits, entropy_bin, count)
    decoded = polar.decode_plane(llr, sent, entropy_bin, paths=paths)
    return float((decoded != bits).any(dim=1).double().mean())


def gap_at_limit(bits: Tensor, llr: Tensor, entropy: float, fit: float, paths: int) -> float | None:
    """Bits a bit beyond the entropy where 5 % fail, between the counts nearest to that."""
    num_blocks, size = bits.shape
    gap, failures = math.nan, LIMIT
    for share in SHARES:
        former_gap, former_failures = gap, failures
        count = min(size, 8 * round(size * (entropy + share * fit) / 8))
        gap = count / size - entropy
        failures = max(failing(bits, llr, entropy, count, paths), 0.3 / num_blocks)
        if failures > LIMIT:
            part = math.log(LIMIT / former_failures) / math.log(failures / former_failures)
            return former_gap + part * (gap - former_gap)
    return None


def measure_plane(
    log2_size: int, sigma: float, plane: int, all_paths: list[int], num_bits: int
) -> list[dict[str, Any]]:
    """A row for each number of paths."""
    codes, position = sample(sigma, (num_bits >> log2_size, 1 << log2_size), seed=plane)
    llr = plane_llr(position, codes & ((1 << plane) - 1), sigma, plane)
    bits = (codes >> plane & 1).to(torch.uint8)
    entropy = entropy_of(sigma, plane)
    count = polar.bits_needed(log2_size, entropy)
    fit = count / codes.shape[1] - entropy
    rows = []
    for paths in all_paths:
        gap = gap_at_limit(bits, llr, entropy, fit, paths)
        failures = failing(bits, llr, entropy, count, paths)
        values = (log2_size, sigma, plane, entropy, paths, gap, fit, failures)
        rows.append(dict(zip(PLANE_COLUMNS, values, strict=True)))
    return rows


def measure_whole(log2_size: int, sigma: float, margin: float, num_bits: int) -> dict[str, Any]:
    """All planes after each other."""
    codes, position = sample(sigma, (num_bits >> log2_size, 1 << log2_size), seed=17)
    decoded, found = torch.zeros_like(codes), torch.empty_like(codes)
    sent_bits, entropy, plane, seconds = 0, 0.0, 0, 0.0
    while (of_plane := entropy_of(sigma, plane)) * codes.shape[1] > polar.NEGLIGIBLE:
        count = polar.bits_needed(log2_size, of_plane, margin)
        entropy_bin = polar.entropy_bin_of(of_plane)
        sent = polar.encode_plane((codes >> plane & 1).to(torch.uint8), entropy_bin, count)
        began = time.process_time()
        bits = polar.decode_plane(plane_llr(position, decoded, sigma, plane), sent, entropy_bin)
        decoded += bits.to(torch.int16) << plane
        seconds += time.process_time() - began
        sent_bits, entropy, plane = sent_bits + 8 * sent.shape[1], entropy + of_plane, plane + 1
    ops.coset_decode(position.flatten(), decoded.flatten(), 1 << plane, found.flatten())
    failures = float((found != codes).any(dim=1).double().mean())
    gap, mcoords = sent_bits / codes.shape[1] - entropy, 1e-6 * codes.numel() / seconds
    values = (log2_size, sigma, margin, entropy, gap, failures, mcoords)
    return dict(zip(WHOLE_COLUMNS, values, strict=True))


def fitted(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The constants of bits_needed(): least squares of the gap's logarithm, with four paths."""
    used = [row for row in rows if row["paths"] == polar.DEFAULT_PATHS and row["gap"]]
    factors = [
        (1, -row["log2_size"], math.log2(row["entropy"]), math.log2(1 - row["entropy"]))
        for row in used
    ]
    gaps = [math.log2(row["gap"]) for row in used]
    first, *others = np.linalg.lstsq(np.array(factors), np.array(gaps), rcond=None)[0]
    names = ("GAP", "SHRINK", "LOW", "HIGH")
    measured = (float(2**first), *map(float, others))
    values = zip(names, measured, (getattr(polar, name) for name in names), strict=True)
    return [dict(zip(FIT_COLUMNS, each, strict=True)) for each in values]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--log2-sizes", type=int, nargs="+", default=[12, 14, 16])
    parser.add_argument("--paths", type=int, nargs="+", default=PATHS)
    parser.add_argument("--margin", type=float, nargs="+", default=[0.0, 0.1])
    parser.add_argument("--num-bits", type=int, default=1 << 22, help="of a measurement")
    parser.add_argument("-o", "--output", type=Path, help="JSON file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    planes, whole = [], []
    for log2_size in args.log2_sizes:
        for sigma, plane in PLANES:
            planes += measure_plane(log2_size, sigma, plane, args.paths, args.num_bits)
        for sigma in SIGMAS:
            whole += [measure_whole(log2_size, sigma, each, args.num_bits) for each in args.margin]
    fit = fitted(planes)
    harness.print_table(PLANE_COLUMNS, planes)
    harness.print_table(WHOLE_COLUMNS, whole)
    harness.print_table(FIT_COLUMNS, fit)
    if args.output:
        config = {"num_bits": args.num_bits, "fit": fit}
        harness.save(args.output, config=config, results=[*planes, *whole])


if __name__ == "__main__":
    main()
