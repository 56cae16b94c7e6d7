"""Which instruction sets there are, and how one is chosen."""

import pytest
import torch

from commrt import _C, ops
from tests.native import cases
from tests.native.isolated import run_python

# The reasons are those that tests/conftest.py knows.
MISSING = {"avx2": "not run: CPU without AVX2", "avx512": "not run: CPU without AVX-512"}


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_a_chosen_isa_runs_and_is_reported(isa: str) -> None:
    """So that a machine that lacks one shows it: every other test covers those that are there."""
    if isa not in _C.available_isas():
        pytest.skip(MISSING[isa])
    with cases.using_isa(isa):
        assert ops.status() == f"native {isa}"
        payload = cases.empty_payload(cases.formats((32,))[0], 2)
        ops.block_encode(torch.ones(64), payload, cases.formats((32,))[0])
        assert payload.tolist() == [0] * 8 + [0x80, 0x3F] * 2


def test_the_best_one_is_the_default() -> None:
    assert _C.available_isas()[0] == "portable"
    assert _C.active_isa() == _C.available_isas()[-1]


def test_an_unknown_isa_is_refused_and_changes_nothing() -> None:
    before = _C.active_isa()
    assert not _C.select_isa("sse9")
    assert _C.active_isa() == before


def test_the_environment_chooses_one() -> None:
    found = run_python("from commrt import ops; print(ops.status())", COMMRT_ISA="portable")
    assert found.stdout == "native portable\n"
    assert found.stderr == ""


def test_a_bad_choice_names_what_is_allowed() -> None:
    program = """
try:
    import commrt.ops
except ValueError as error:
    print(error)
"""
    found = run_python(program, COMMRT_ISA="sse9")
    assert found.stdout.startswith("COMMRT_ISA='sse9': ")
    assert ", ".join(_C.available_isas()) in found.stdout
