"""Builds the module with nvcc, as a user does who has a CUDA compiler, and reads what it says.

python -m tests.cuda.nvcc    writes registers.json anew
"""

import json
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tests.cuda.building import CSRC, built_once, folder_of, run

ARCHITECTURES = ("sm_80", "sm_90")
TABLE = Path(__file__).with_name("registers.json")


class Usage(NamedTuple):
    """What ptxas says of a kernel."""

    kernel: str
    architecture: str
    registers: int
    spilled_bytes: int


def find_nvcc() -> Path | None:
    """On the path, where CUDA is installed, or from pip: launch/test installs it if missing."""
    from_pip = Path(sysconfig.get_path("purelib"), "nvidia/cu13/bin/nvcc")
    for place in (shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc", from_pip):
        if place and Path(place).exists():
            return Path(place)
    return None


def build(nvcc: Path) -> Path:
    """The folder with the module, the PTX of every kernel, and said.txt."""
    folder = folder_of("nvcc")
    with built_once(folder) as is_built:
        if not is_built:
            folder.mkdir()
            options = {
                "CMAKE_BUILD_TYPE": "Release",
                "CMAKE_CXX_FLAGS_RELEASE": "-O0",  # of the CPU's kernels, which others test
                "COMMRT_PORTABLE": "ON",
                "CMAKE_CUDA_COMPILER": nvcc,
                "CMAKE_CUDA_FLAGS": f"-Xptxas=-v -Werror=all-warnings --keep --keep-dir={folder}",
                "COMMRT_CUDA": "ON",
                "Python_EXECUTABLE": sys.executable,
                "nanobind_DIR": run([sys.executable, "-m", "nanobind", "--cmake_dir"]).strip(),
            }
            definitions = [f"-D{name}={value}" for name, value in options.items()]
            libraries = str(nvcc.parents[1] / "lib")  # of a compiler from pip
            configure = ["cmake", "-G", "Ninja", "-S", CSRC, "-B", folder, *definitions]
            run(configure, LIBRARY_PATH=libraries)
            said = run(["cmake", "--build", folder], LIBRARY_PATH=libraries)
            (folder / "said.txt").write_text(said)
    return folder


def usage(folder: Path) -> Iterator[Usage]:
    """Of every kernel on every architecture."""
    said = demangled((folder / "said.txt").read_text())
    for part in said.split("Compiling entry function '")[1:]:
        name, architecture = re.match(r"(.+?)' for '(sm_\d+)'", part).groups()
        spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", part)
        registers = int(re.search(r"Used (\d+) registers", part)[1])
        yield Usage(short(name), architecture, registers, sum(map(int, spills.groups())))


def ptx_by_kernel(folder: Path) -> Iterator[tuple[str, str]]:
    """The name and the body of every kernel, for every architecture that has PTX."""
    for path in folder.glob("*.ptx"):
        for part in path.read_text().split(".entry ")[1:]:
            name, _, body = part.partition("(")
            yield short(demangled(name)), body


def demangled(text: str) -> str:
    return subprocess.run(
        ["c++filt"], input=text, capture_output=True, text=True, check=True
    ).stdout


def short(name: str) -> str:
    """Without namespaces and arguments: ``loco_encode_kernel<4, 8, 1>``."""
    return re.search(r"(\w+<[^>]*>)\(", f"{name}(")[1]


def table(folder: Path) -> dict[str, dict[str, int]]:
    """Registers, by kernel and architecture."""
    found: dict[str, dict[str, int]] = {}
    for row in usage(folder):
        found.setdefault(row.kernel, {})[row.architecture] = row.registers
    return dict(sorted(found.items()))


if __name__ == "__main__":
    TABLE.write_text(json.dumps(table(build(find_nvcc())), indent=1) + "\n")
