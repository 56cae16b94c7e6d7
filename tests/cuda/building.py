"""Builds csrc/checks: every CUDA kernel through the shim, beside the CPU's, and the shim by itself.

Objects stay in build/checks, by a digest of all they depend on; workers wait for each other. The
CPU's kernels are the objects of the module, in all tiers.
"""

import contextlib
import fcntl
import functools
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
BUILD = ROOT / "build/checks"
CXX = os.environ.get("CXX", "g++")
CXX_FLAGS = (
    "-std=c++20",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wno-unknown-pragmas",
    "-ffp-contract=off",
    "-pthread",
)
TIERS = {
    # No sanitizer, but counts of lines; with the shim as it is on other processors.
    "plain": ("-O0", "--coverage", "-DCOMMRT_SHIM_UCONTEXT"),
    # Not optimised: g++ takes six times as long to compile what it checks twice over.
    "asan": ("-O0", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
    # Lines only: g++ takes up to three times as long to follow variables through these checks.
    "tsan": ("-O1", "-g1", "-fsanitize=thread"),
}
# Of the shim by itself. Not optimised, frames of fibers that are given up look overwritten to asan.
SHIM_TIERS = {
    "plain": ("-O2",),
    "asan": ("-O1", *TIERS["asan"][1:]),
    "tsan": TIERS["tsan"],
    "ucontext": ("-O1", "-DCOMMRT_SHIM_UCONTEXT"),
}
OPS = (
    *("block_decode", "block_encode", "decode_average", "decode_average_encode"),
    *("loco_encode", "patch_apply", "rans_decode", "rans_encode", "rescale"),
    *("adam_mini", "adamw", "adan", "lion", "mofo", "square_sums"),
    *("dither_quantise", "dither_dequantise", "scale_rows", "lmmse_combine"),
    *("polar_transform", "polar_decode", "coset_llr", "coset_decode"),
)
# Which are checked as well, but run on the CPU only.
CPU_OPS = (
    *("source_energies", "source_prediction", "source_products", "source_history"),
    "update_add",
)
# Kernels have the names of ops; those of the steps share these two.
SHARED_KERNELS = {"step": ("adamw", "adan", "lion", "mofo"), "second": ("adam_mini",)}


def check_program(tier: str) -> Path:
    """The program as this tier builds it."""
    folder = folder_of(tier)
    with built_once(folder) as is_built:
        if not is_built:
            parts = ("kernel", "dither", "patch", "polar", "rans", "source", "step")
            checks = [CSRC / f"checks/{part}_check.cpp" for part in parts]
            sources = [*cuda_sources(CSRC), *shim_sources(CSRC), *checks]
            objects = compile_all(sources, TIERS[tier], folder)
            link([*objects, *_cpu_objects()], TIERS[tier], folder / "kernel_check")
    return folder / "kernel_check"


def shim_program(tier: str) -> Path:
    """csrc/checks/shim_check.cpp, as this tier builds it."""
    folder = folder_of(f"shim_{tier}")
    with built_once(folder) as is_built:
        if not is_built:
            sources = [*shim_sources(CSRC), CSRC / "checks/shim_check.cpp"]
            objects = compile_all(sources, SHIM_TIERS[tier], folder)
            link(objects, SHIM_TIERS[tier], folder / "shim_check")
    return folder / "shim_check"


def mutant_program(tier: str, csrc: Path, ops: Sequence[str], folder: Path) -> Path:
    """The program with the kernels of these ops from another copy of the sources."""
    check_program(tier)
    changed = [csrc / f"cuda/{op}.cu" for op in ops]
    # What is no error of memory takes half of the time, and is not what mutants have.
    flags = [*TIERS[tier], "-fno-sanitize=undefined"]
    objects = compile_all(changed, flags, folder)
    names = {built.name for built in objects}
    objects += [built for built in folder_of(tier).glob("*.o") if built.name not in names]
    return link([*objects, *_cpu_objects()], TIERS[tier], folder / "kernel_check")


def cuda_sources(csrc: Path) -> list[Path]:
    return sorted((csrc / "cuda").glob("*.cu"))


def shim_sources(csrc: Path) -> list[Path]:
    return sorted((csrc / "shim").glob("*.cpp"))


def compile_all(sources: Sequence[Path], flags: Sequence[str], folder: Path) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)

    def compile_one(source: Path) -> Path:
        built = folder / f"{source.parent.name}-{source.stem}.o"
        run([CXX, *CXX_FLAGS, *flags, "-xc++", "-c", source, "-o", built])
        return built

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(compile_one, sources))


def link(objects: Sequence[Path], flags: Sequence[str], program: Path) -> Path:
    run([CXX, *flags, "-pthread", *objects, "-o", program])
    return program


def run(command: Sequence[str | Path], **environment: str) -> str:
    """Run a command that must succeed; its output, both streams."""
    found = attempt(command, **environment)
    assert found.returncode == 0, f"{' '.join(map(str, command))}\n{found.stdout}"
    return found.stdout


def attempt(command: Sequence[str | Path], **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command; cmake and ninja are those of this Python's environment."""
    tools = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": tools, **environment}
    return subprocess.run(
        command, stdout=-1, stderr=subprocess.STDOUT, text=True, check=False, env=environment
    )


def _cpu_objects() -> list[Path]:
    """The module's own, as launch/test has built them for this Python."""
    version = "".join(map(str, sys.version_info[:2]))
    others = ("bandwidth", "dispatch", "thread_pool")
    names = {f"{path.name}.o" for path in (CSRC / "cpu").glob("*.cpp") if path.stem not in others}
    found = ROOT.glob(f"build/cp{version}-*/CMakeFiles/kernels_portable.dir/cpu/*.o")
    objects = sorted(path for path in found if path.name in names)
    assert {path.name for path in objects} == names, "build/ lacks objects: run launch/test"
    return objects


def folder_of(kind: str) -> Path:
    return BUILD / f"{kind}-{digest(kind)}"


@functools.cache
def digest(kind: str) -> str:
    """Of the sources, the flags and the compiler."""
    total = hashlib.blake2b(digest_size=8)
    version = subprocess.run([CXX, "--version"], capture_output=True, check=True).stdout
    total.update(repr((CXX_FLAGS, TIERS.get(kind), SHIM_TIERS.get(kind[5:]), version)).encode())
    for path in sorted(CSRC.rglob("*")):
        if path.is_file():
            total.update(str(path.relative_to(CSRC)).encode() + path.read_bytes())
    return total.hexdigest()


@contextlib.contextmanager
def built_once(folder: Path) -> Iterator[bool]:
    """Whether the folder is there already; if not, it is when this ends without an exception."""
    BUILD.mkdir(parents=True, exist_ok=True)
    kind = folder.name.partition("-")[0]
    with (BUILD / f"{kind}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        is_built = (folder / "done").exists()
        if not is_built:
            for former in BUILD.glob(f"{kind}-*"):
                shutil.rmtree(former)
        yield is_built
        (folder / "done").touch()
