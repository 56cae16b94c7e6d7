"""What is built and declared, and that a machine without a compiler can use it."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
NO_COMPILER = {"CC": "/bin/false", "CXX": "/bin/false"}


def names(requirements: list[str]) -> set[str]:
    return {re.match(r"[\w-]+", requirement)[0] for requirement in requirements}


def test_torch_is_needed_to_run_and_not_to_build():
    assert names(PROJECT["build-system"]["requires"]) == {"scikit-build-core", "nanobind"}
    assert names(PROJECT["project"]["dependencies"]) == {"torch", "numpy"}


def test_constraints_pin_every_requirement():
    pinned = set(re.findall(r"^([\w-]+)==[\d.]+$", (ROOT / "constraints.txt").read_text(), re.M))
    required = names(PROJECT["project"]["dependencies"] + PROJECT["build-system"]["requires"])
    for extra in PROJECT["project"]["optional-dependencies"].values():
        required |= names(extra)
    assert required - {"commrt"} == pinned


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of what a build reads: builds must neither see nor leave anything in the tree."""
    copy = tmp_path / "source"
    for name in ("commrt", "csrc"):
        ignored = shutil.ignore_patterns("*.so", "__pycache__")
        shutil.copytree(ROOT / name, copy / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    return copy


def pip_install(source: Path, target: Path, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation"]
    return subprocess.run(
        [*command, "--no-index", "--target", str(target), str(source)],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
    )


PROGRAM = """
import json, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch, commrt
    from commrt import ops

    fmt = ops.BlockFormat(bits=8, block=32)
    x = torch.linspace(-1, 1, 100)
    payload = torch.empty(fmt.num_blocks(x.numel()) * fmt.block_bytes, dtype=torch.uint8)
    y = torch.empty_like(x)
    for _ in range(2):
        ops.block_encode(x, payload, fmt)
        ops.block_decode(payload, y, fmt)
print(json.dumps({
    "file": commrt.__file__,
    "status": ops.status(),
    "error": (x - y).abs().max().item(),
    "warnings": [str(w.message) for w in caught if "commrt" in str(w.message)],
}))
"""


def test_without_a_compiler_the_reference_serves(source, tmp_path):
    site = tmp_path / "site"
    done = pip_install(source, site, **NO_COMPILER)
    assert done.returncode == 0, done.stderr
    assert (site / "commrt/py.typed").is_file()
    assert not list(site.rglob("*.so"))

    # -S leaves out the import hook of an editable install, which would come first.
    path = os.pathsep.join([str(site), sysconfig.get_path("purelib")])
    done = subprocess.run(
        [sys.executable, "-S", "-c", PROGRAM],
        env={**os.environ, "PYTHONPATH": path},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert Path(seen["file"]).is_relative_to(site)
    assert seen["status"].startswith("reference")
    assert seen["error"] < 0.01
    assert len(seen["warnings"]) == 1


@pytest.mark.parametrize("asked", [{"COMMRT_CUDA": "ON"}, {"SKBUILD_WHEEL_CMAKE": "1"}])
def test_a_native_build_that_was_asked_for_fails_loudly(source, tmp_path, asked):
    done = pip_install(source, tmp_path / "site", **NO_COMPILER, **asked)
    assert done.returncode != 0
    assert "CMake configuration failed" in done.stderr


def test_sdist_has_the_sources_and_no_binaries(source, tmp_path):
    build = f"from scikit_build_core.build import build_sdist; build_sdist({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        members = {name.partition("/")[2] for name in tar.getnames()}
    assert {"pyproject.toml", "LICENSE", "csrc/CMakeLists.txt", "commrt/py.typed"} <= members
    assert not [name for name in members if name.endswith(".so")]
