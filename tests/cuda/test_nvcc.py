"""Tier 4: what nvcc makes of the kernels for every GPU they are built for. No kernel is run."""

import json
import sys
from pathlib import Path

import pytest

from tests.cuda import nvcc
from tests.cuda.building import CSRC, OPS, SHARED_KERNELS, attempt, run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

# Kernels of the ops that read gradients, and of those that write them.
READERS = ("block_encode_kernel", "loco_encode_kernel")
WRITERS = ("block_decode_kernel", "decode_average_kernel")


@pytest.fixture(scope="module")
def folder() -> Path:
    compiler = nvcc.find_nvcc()
    if compiler is None:
        pytest.skip("not run: no nvcc")
    return nvcc.build(compiler)


def test_no_kernel_spills_or_takes_more_registers_than_it_did(folder: Path) -> None:
    """registers.json is what they took; ``python -m tests.cuda.nvcc`` writes it anew."""
    allowed = json.loads(nvcc.TABLE.read_text())
    rows = list(nvcc.usage(folder))
    assert {row.kernel for row in rows} == set(allowed)
    assert {row.architecture for row in rows} == set(nvcc.ARCHITECTURES)
    named = {row.kernel.partition("_kernel")[0] for row in rows}
    assert named >= set(SHARED_KERNELS)
    assert named.union(*SHARED_KERNELS.values()) - set(SHARED_KERNELS) == set(OPS)
    assert [row for row in rows if row.spilled_bytes] == []
    assert [row for row in rows if row.registers > allowed[row.kernel][row.architecture]] == []


def test_gradients_move_sixteen_bytes_at_a_time(folder: Path) -> None:
    kernels = list(nvcc.ptx_by_kernel(folder))
    for name, body in kernels:
        instructions = {line.split()[0] for line in body.splitlines() if line.strip()}
        if name.startswith(READERS):
            assert any(i.startswith("ld.global") and ".v4." in i for i in instructions), name
        if name.startswith(WRITERS):
            assert any(i.startswith("st.global") and ".v4." in i for i in instructions), name
    assert sum(name.startswith((*READERS, *WRITERS)) for name, _ in kernels) >= 60


def test_the_module_loads_without_a_driver(folder: Path) -> None:
    """And finds no device."""
    script = (
        "import importlib.util as u, sys\n"
        "spec = u.spec_from_file_location('_C', sys.argv[1])\n"
        "module = u.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "print(module.cuda, module.cuda_device_count())\n"
    )
    [module] = folder.glob("_C*.so")
    found = run([sys.executable, "-c", script, module], CUDA_VISIBLE_DEVICES="")
    assert found.split() == ["nvcc", "0"]


def test_who_asks_for_cuda_gets_it_or_an_error(tmp_path: Path) -> None:
    options = ["-DCOMMRT_CUDA=ON", "-DCMAKE_CUDA_COMPILER=/nonexistent/nvcc"]
    nanobind = run([sys.executable, "-m", "nanobind", "--cmake_dir"]).strip()
    places = [f"-Dnanobind_DIR={nanobind}", f"-DPython_EXECUTABLE={sys.executable}"]
    found = attempt(["cmake", "-G", "Ninja", "-S", CSRC, "-B", tmp_path, *options, *places])
    assert found.returncode != 0
    assert "/nonexistent/nvcc" in found.stdout
