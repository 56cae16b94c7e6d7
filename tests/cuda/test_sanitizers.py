"""Tiers 2 and 3: every kernel through the shim under the sanitizers, and how much of it is run.

Tier 1 is tests/native, where the same kernels, optimised, are one of the paths of every op.
"""

import json
import re
import subprocess
from pathlib import Path

import pytest

from tests.cuda.building import BUILD, CPU_OPS, CSRC, OPS, attempt, check_program, run, shim_program

LEAST_COVERAGE = 0.95


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("tier", ["asan", "tsan"])
def test_kernels_pass(tier: str) -> None:
    """Bit-identical with the CPU's, no access out of bounds, no race; each op in many cases."""
    program = check_program(tier)
    # A process of ThreadSanitizer has 8,128 fibers at most, fewer than all ops together take.
    runs = [[program, op] for op in (*OPS, *CPU_OPS)] if tier == "tsan" else [[program]]
    found = "".join(run(command) for command in runs)
    print(found)
    cases = dict(re.findall(r"^(\w+): (\d+) cases$", found, re.MULTILINE))
    assert sorted(cases) == sorted((*OPS, *CPU_OPS))
    assert all(int(count) >= 48 for count in cases.values())


@pytest.mark.parametrize("tier", ["plain", "asan", "ucontext"])
def test_the_shim_does_what_cuda_does_and_names_what_is_undefined(tier: str) -> None:
    found = run([shim_program(tier)])
    assert found.count(": ok\n") == 11


def test_the_shim_orders_what_a_barrier_orders_and_nothing_else() -> None:
    program = shim_program("tsan")
    assert run([program, "right"]).count(": ok\n") == 3
    racing = attempt([program, "race"])
    assert racing.returncode != 0
    assert "data race" in racing.stdout


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_lines_of_the_kernels_are_run() -> None:
    """At least 95 % of the lines of csrc/cuda, by gcov; with the shim of other processors."""
    program = check_program("plain")
    for former in program.parent.glob("*.gcda"):
        former.unlink()
    run([program])
    lines = covered_lines(program)
    share = sum(lines.values()) / len(lines)
    missed = sorted(place for place, is_run in lines.items() if not is_run)
    print(f"{share:.1%} of {len(lines)} lines of csrc/cuda; not run: {missed}")
    assert share >= LEAST_COVERAGE


def covered_lines(program: Path) -> dict[tuple[str, int], bool]:
    """Whether each line of csrc/cuda was run, in any instance of its template."""
    command = ["gcov", "--json-format", "--stdout", *sorted(program.parent.glob("*.gcda"))]
    found = subprocess.run(command, stdout=-1, stderr=-1, text=True, check=True, cwd=BUILD).stdout
    lines: dict[tuple[str, int], bool] = {}
    for report in found.splitlines():
        for file in json.loads(report)["files"]:
            path = (BUILD / file["file"]).resolve()
            if path.parent == CSRC / "cuda":
                for line in file["lines"]:
                    place = path.name, line["line_number"]
                    lines[place] = lines.get(place, False) or line["count"] > 0
    return lines
