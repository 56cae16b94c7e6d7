"""Speed and error of every kernel, against what this core's memory can do in the same run.

Sizes as in nccl-tests: `size(B)` is the uncompressed gradient, `wire(B)` the payload, `GB/s` the
bytes the kernel must move (`moved`: read and written) a second, and `of_copy` that rate over the
one of a non-temporal copy measured in the same interleaved rounds. Every instruction set is checked
against the reference before it is timed; `#wrong` counts the bytes that differ. `Melem/s` are
elements a second; those of the dither have the name of their lattice in the place of bits.

The rows of rANS code Gaussian residuals of about `bits` each, in as many lanes as `block` says;
`size(B)` is of the codes, two bytes each, so that size / 2 / time are symbols a second.

    python -m bench.codecs -b 128M -n 20 -J bench/results/codecs.json
    python -m bench.codecs --device cuda -b 1G    # by CUDA events; the copy is torch's
"""

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import harness
from commrt import ops
from commrt.codecs.code_tables import NUM_PHASES, coded_range
from commrt.codecs.entropy import count_codes, entropy_tables, fit_rows
from commrt.ops import BlockFormat, reference
from commrt.ops.dither import LATTICES
from commrt.ops.native import native
from commrt.ops.rans import LANES

CHECKED_BLOCKS = 512
NUM_PAYLOADS = 4
STEP = 0.5  # of the dither; the gradient's standard deviation is about 0.58
MOST_CODES = 1 << 22
# Of residuals in steps, by the bits that their codes have.
SIGMA = {0.4: 0.15, 1.0: 0.39, 2.0: 0.93, 4.0: 3.86}
CUDA = "cuda"  # in the place of an instruction set
COLUMNS = [
    "kernel", "isa", "bits", "block", "dtype", "size(B)", "wire(B)", "time(us)", "p10", "p90",
    "GB/s", "Melem/s", "of_copy", "nmse", "#wrong",
]  # fmt: skip


@dataclasses.dataclass
class Case:
    """A kernel on given tensors."""

    row: dict[str, Any]
    isa: str
    moved: float
    numel: int
    call: Callable[[], object]
    times_s: list[float] = dataclasses.field(default_factory=list)

    def time_once(self) -> None:
        """One timed call."""
        timed = _time_on_gpu if self.isa == CUDA else _time_on_cpu
        _select(self.isa)
        self.times_s.append(timed(self.call))


class Data:
    """Inputs that all cases share, and one case for each kernel and format."""

    def __init__(self, numel: int, dtype: torch.dtype, device: str) -> None:
        generator = torch.Generator().manual_seed(0)
        normal = torch.randn(numel, generator=generator)
        self.grad = (normal * torch.rand(numel, generator=generator)).to(device, dtype)
        self.output = torch.zeros(numel, dtype=dtype, device=device)
        self.dtype = dtype
        self.device = device
        self.numel = numel

    def payload(self, fmt: BlockFormat) -> Tensor:
        """Zeros of a payload's size; touched, so that no page fault is timed."""
        size = fmt.payload_bytes(fmt.num_blocks(self.numel))
        return torch.zeros(size, dtype=torch.uint8, device=self.device)

    def cases(self, isa: str, bits: int, block: int) -> list[Case]:
        """Every kernel of one format."""
        fmt = BlockFormat(bits=bits, block=block, levels="mean" if bits <= 2 else "absmax")
        back = BlockFormat(bits=8, block=block)
        payload, residual, returned = self.payload(fmt), self.payload(back), self.payload(back)
        stack = payload.repeat(NUM_PAYLOADS, 1)
        for row in stack:
            ops.block_encode(self.grad, row, fmt)
        dense = self.grad.element_size()
        coded, returned_bytes = fmt.block_bytes / block, back.block_bytes / block
        grad, output = self.grad, self.output
        make = {
            "block_encode": (
                dense + coded,
                lambda: ops.block_encode(grad, payload, fmt),
            ),
            "loco_encode": (
                dense + coded + 2 * returned_bytes,
                lambda: ops.loco_encode(grad, residual, payload, fmt),
            ),
            "decode_average": (
                NUM_PAYLOADS * coded + dense,
                lambda: ops.decode_average(stack, output, fmt),
            ),
            "decode_average_encode": (
                NUM_PAYLOADS * coded + returned_bytes,
                lambda: ops.decode_average_encode(stack, returned, fmt, back),
            ),
            "block_decode": (
                dense + coded,
                lambda: ops.block_decode(payload, output, fmt),
            ),
        }
        error = _nmse(self.grad, fmt)
        shared = {
            "isa": isa,
            "bits": bits,
            "block": block,
            "dtype": str(self.dtype).removeprefix("torch."),
            "size(B)": self.numel * dense,
            "wire(B)": payload.numel(),
            "nmse": error,
            "#wrong": _num_wrong(isa, self.grad, fmt),
        }
        return [
            Case({"kernel": kernel, **shared}, isa, moved * self.numel, self.numel, call)
            for kernel, (moved, call) in make.items()
        ]

    def dither_cases(self, isa: str, lattice: str) -> list[Case]:
        """Every op of the dither on one lattice, all with a prediction."""
        values, predicted = self.grad.float(), torch.zeros(self.numel, device=self.device)
        codes, rows = torch.zeros(2, self.numel, dtype=torch.int16, device=self.device)
        decoded = torch.zeros_like(values)
        first_rows = torch.arange(0, 56 * 16, 16, dtype=torch.int16, device=self.device)[None]
        energies, ends = values * values, torch.tensor([self.numel], device=self.device)
        options = {"lattice": lattice}
        ops.dither_quantise(values, predicted, codes, STEP, 0, **options)
        ops.dither_dequantise(codes, predicted, decoded, STEP, 0, **options)
        make = {
            "dither_quantise": (
                10,
                lambda: ops.dither_quantise(values, predicted, codes, STEP, 0, **options),
            ),
            "dither_dequantise": (
                10,
                lambda: ops.dither_dequantise(codes, predicted, decoded, STEP, 0, **options),
            ),
            "scale_rows": (
                6,
                lambda: ops.scale_rows(energies, first_rows, ends, rows, 0, base=220, **options),
            ),
        }
        shared = {
            "isa": isa,
            "bits": lattice,
            "block": "-",
            "dtype": "float32",
            "size(B)": 4 * self.numel,
            "wire(B)": "-",
            "nmse": float((decoded - values).square().sum() / values.square().sum()),
            "#wrong": _num_wrong_of_dither(isa, values, lattice),
        }
        return [
            Case({"kernel": kernel, **shared}, isa, moved * self.numel, self.numel, call)
            for kernel, (moved, call) in make.items()
        ]

    def combine_case(self, isa: str) -> Case:
        """A weighted sum of as many rows as there are payloads elsewhere."""
        stack = self.grad.float().view(NUM_PAYLOADS, -1)
        weights = torch.linspace(0.1, 1.0, NUM_PAYLOADS, device=self.device)
        total = torch.zeros(stack.shape[1], device=self.device)
        expected = torch.zeros(1 << 12)
        _select(isa)
        ops.lmmse_combine(stack, weights, total)
        reference.lmmse_combine(stack[:, : 1 << 12].cpu(), weights.cpu(), expected)
        wrong = int((total[: 1 << 12].cpu() != expected).sum())
        blank = {column: "-" for column in COLUMNS}
        row = {**blank, "kernel": "lmmse_combine", "isa": isa, "dtype": "float32"}
        moved = 4 * stack.numel() + 4 * total.numel()
        return Case(
            {**row, "size(B)": 4 * stack.numel(), "#wrong": wrong},
            isa,
            moved,
            stack.numel(),
            lambda: ops.lmmse_combine(stack, weights, total),
        )

    def yardsticks(self, isa: str) -> list[Case]:
        """The non-temporal copy and the plain read; on a GPU torch's copy."""
        source = torch.ones(self.numel, device=self.device)
        target = torch.zeros(self.numel, device=self.device)
        blank = {column: "-" for column in COLUMNS}
        common = {**blank, "isa": isa, "dtype": "float32", "size(B)": 4 * self.numel, "#wrong": 0}
        if isa == CUDA:
            row = {**common, "kernel": "copy (torch)"}
            return [Case(row, isa, 8 * self.numel, self.numel, lambda: target.copy_(source))]
        addresses = source.data_ptr(), target.data_ptr()
        return [
            Case(
                {**common, "kernel": "copy (non-temporal)"},
                isa,
                8 * self.numel,
                self.numel,
                lambda: (native.copy_stream(*addresses, self.numel), source, target),
            ),
            Case(
                {**common, "kernel": "read"},
                isa,
                4 * self.numel,
                self.numel,
                lambda: (native.read_all(addresses[0], self.numel), source),
            ),
        ]


class Streams:
    """Codes and their rows in the entropy coder's tables, and a case for each way of coding."""

    def __init__(self, numel: int, bits: float, device: str) -> None:
        generator = torch.Generator().manual_seed(0)
        dither = torch.rand(numel, generator=generator) - 0.5
        residual = SIGMA[bits] * torch.randn(numel, generator=generator)
        phase = (NUM_PHASES * (dither + 0.5)).to(torch.int16)
        codes = (residual + dither).round().to(torch.int16)
        rows = phase + fit_rows(count_codes(codes, phase, 1))[0]
        lowest, highest = (ends[rows.long()] for ends in coded_range())
        self.codes, self.rows = codes.clamp(lowest, highest).to(device), rows.to(device)
        self.tables = entropy_tables(device)
        self.bits = bits

    def cases(self, isa: str, lanes: int) -> list[Case]:
        """Encoding and decoding."""
        _select(isa)
        codes, rows, tables, numel = self.codes, self.rows, self.tables, self.codes.numel()
        capacity, segments = ops.rans_capacity(numel, lanes), ops.rans_segments(numel)
        words = codes.new_zeros(segments, capacity, dtype=torch.uint16)
        lengths = codes.new_zeros(segments, dtype=torch.int32)
        checks, used, output = lengths.to(torch.uint16), lengths.clone(), torch.zeros_like(codes)
        coded = codes, rows, tables, checks, words, lengths
        streams = words, lengths, rows, tables, output, checks, used
        ops.rans_encode(*coded, lanes=lanes)
        ops.rans_decode(*streams, lanes=lanes)
        wire_bytes = 2 * int(lengths.sum())
        blank = {column: "-" for column in COLUMNS}
        row = {
            **blank,
            "isa": isa,
            "bits": self.bits,
            "block": lanes,
            "dtype": "int16",
            "size(B)": 2 * numel,
            "wire(B)": wire_bytes,
            "#wrong": int((output != codes).sum()),
        }
        calls: dict[str, Callable[[], object]] = {
            "rans_encode": lambda: ops.rans_encode(*coded, lanes=lanes),
            "rans_decode": lambda: ops.rans_decode(*streams, lanes=lanes),
        }
        moved = 4 * numel + wire_bytes
        return [
            Case({**row, "kernel": kernel}, isa, moved, numel, call)
            for kernel, call in calls.items()
        ]


def measure(cases: list[Case], iterations: int, warmup: int) -> list[dict[str, Any]]:
    """Time all cases in interleaved rounds; rows with medians, the first case being the copy."""
    for _ in range(warmup):
        for case in cases:
            case.call()
    for _ in range(iterations):
        for case in cases:
            case.time_once()
    rates = [case.moved / statistics.median(case.times_s) / 1e9 for case in cases]
    rows = []
    for case, rate in zip(cases, rates, strict=True):
        deciles = statistics.quantiles(case.times_s, n=10)
        times = {
            "time(us)": statistics.median(case.times_s) * 1e6,
            "p10": deciles[0] * 1e6,
            "p90": deciles[-1] * 1e6,
            "GB/s": rate,
            "Melem/s": case.numel / statistics.median(case.times_s) / 1e6,
            "of_copy": rate / rates[0],
        }
        rows.append({**case.row, **times, "moved": case.moved})
    return rows


def _time_on_cpu(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def _time_on_gpu(call: Callable[[], object]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def _select(isa: str) -> None:
    if isa != CUDA:
        native.select_isa(isa)


def _nmse(grad: Tensor, fmt: BlockFormat) -> float:
    sample = grad[: 1 << 20]
    size = fmt.payload_bytes(fmt.num_blocks(sample.numel()))
    payload = torch.empty(size, dtype=torch.uint8, device=grad.device)
    decoded = torch.empty(sample.numel(), device=grad.device)
    ops.block_encode(sample, payload, fmt)
    ops.block_decode(payload, decoded, fmt)
    exact = sample.float()
    return float((decoded - exact).square().sum() / exact.square().sum())


def _num_wrong(isa: str, grad: Tensor, fmt: BlockFormat) -> int:
    """Bytes in which this path's LoCo payload and residual differ from the reference's."""
    _select(isa)
    sample = grad[: CHECKED_BLOCKS * fmt.block]
    blocks = fmt.num_blocks(sample.numel())
    back = BlockFormat(bits=8, block=fmt.block)
    sizes = (fmt.payload_bytes(blocks), back.payload_bytes(blocks))
    own, expected = ([torch.zeros(size, dtype=torch.uint8) for size in sizes] for _ in range(2))
    own = [mine.to(grad.device) for mine in own]
    for _ in range(3):
        ops.loco_encode(sample, own[1], own[0], fmt)
        reference.loco_encode(
            sample.cpu(), expected[1], expected[0], fmt.bits, fmt.block, fmt.mean_levels,
            0.8, 8, False, 0, 0, blocks, 0,
        )  # fmt: skip
    pairs = zip(own, expected, strict=True)
    return sum(int((mine.cpu() != theirs).sum()) for mine, theirs in pairs)


def _num_wrong_of_dither(isa: str, values: Tensor, lattice: str) -> int:
    """Codes and decoded values that differ from the reference's."""
    _select(isa)
    sample = values[: 1 << 16]
    codes = torch.zeros(sample.numel(), dtype=torch.int16, device=values.device)
    decoded = torch.zeros_like(sample)
    ops.dither_quantise(sample, None, codes, STEP, 1, lattice=lattice)
    ops.dither_dequantise(codes, None, decoded, STEP, 1, lattice=lattice)
    own, expected = (codes.cpu(), decoded.cpu()), (codes.cpu() + 1, decoded.cpu() + 1)
    reference.dither_quantise(sample.cpu(), None, expected[0], STEP, 1, 0, lattice)
    reference.dither_dequantise(own[0], None, expected[1], STEP, 1, 0, lattice)
    return sum(int((mine != theirs).sum()) for mine, theirs in zip(own, expected, strict=True))


def _parse_size(text: str) -> int:
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    return int(text[:-1]) * units[text[-1]] if text[-1] in units else int(text)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-b", "--bytes", type=_parse_size, default=128 << 20, help="fp32 size")
    parser.add_argument("-n", "--iterations", type=int, default=20)
    parser.add_argument("-w", "--warmup", type=int, default=2)
    parser.add_argument(
        "-d", "--dtype", default="float32", choices=["float32", "bfloat16", "float16"]
    )
    parser.add_argument("--device", default="cpu", choices=["cpu", CUDA])
    parser.add_argument("-t", "--threads", type=int, default=1)
    parser.add_argument("--bits", nargs="+", type=int, default=[1, 2, 4, 8])
    parser.add_argument("--blocks", nargs="+", type=int, default=[128])
    parser.add_argument("--isa", nargs="+", help="default: all that this machine has")
    parser.add_argument("-J", "--json", type=Path, help="JSON file")
    args = parser.parse_args()
    if native is None:
        parser.exit(1, f"no native module: {ops.status()}\n")
    if args.device == CUDA and (native.cuda != "nvcc" or not torch.cuda.is_available()):
        parser.exit(1, "no CUDA: needs a GPU, torch for it, and COMMRT_CUDA=ON pip install .\n")
    torch.set_num_threads(args.threads)
    data = Data(args.bytes // 4, getattr(torch, args.dtype), args.device)
    numel = min(args.bytes // 4, MOST_CODES)
    streams = [Streams(numel, bits, args.device) for bits in SIGMA]
    rows = []
    isas = [CUDA] if args.device == CUDA else args.isa or native.available_isas()
    for isa in isas:
        cases = data.yardsticks(isa)
        for block in args.blocks:
            for bits in args.bits:
                cases += data.cases(isa, bits, block)
        for lattice in LATTICES:
            cases += data.dither_cases(isa, lattice)
        cases.append(data.combine_case(isa))
        for stream in streams:
            cases += [case for lanes in LANES for case in stream.cases(isa, lanes)]
        rows += measure(cases, args.iterations, args.warmup)
    harness.print_table(COLUMNS, rows)
    wrong = sum(row["#wrong"] for row in rows)
    print(f"# Out of bounds values : {wrong} {'OK' if wrong == 0 else 'FAILED'}")
    if args.json:
        config = {key: value for key, value in vars(args).items() if key != "json"}
        harness.save(args.json, config=config, results=rows)
    parser.exit(0 if wrong == 0 else 1)


if __name__ == "__main__":
    main()
