"""The double of CUDA streams: what is ordered stays so, what is not comes out otherwise."""

import pytest
import torch
from torch import Tensor

from commrt.testing.streams import HostWaitError, Recorder

SEEDS = range(30)


def outcomes(recorder: Recorder, result: Tensor) -> set[tuple[float, ...]]:
    found = set()
    for seed in SEEDS:
        recorder.replay(seed)
        found.add(tuple(result.tolist()))
    return found


def handed_over(*, waits: bool) -> tuple[Recorder, Tensor]:
    """A side stream doubles what the main stream has written."""
    values = torch.zeros(3)
    with Recorder() as recorder:
        side = torch.cuda.Stream()
        values.fill_(2.0)
        if waits:
            side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            result = values * 2
        assert torch.cuda.current_stream() is recorder.main
    return recorder, result


def test_a_wait_orders_streams() -> None:
    assert outcomes(*handed_over(waits=True)) == {(4.0, 4.0, 4.0)}


def test_a_missing_wait_shows() -> None:
    assert outcomes(*handed_over(waits=False)) == {(4.0, 4.0, 4.0), (0.0, 0.0, 0.0)}


def test_a_wait_is_for_what_was_queued_before_it() -> None:
    values = torch.zeros(1)
    with Recorder() as recorder:
        side = torch.cuda.Stream()
        values.add_(1)
        side.wait_stream(recorder.main)
        values.add_(1)
        with torch.cuda.stream(side):
            copy = values.clone()
    assert outcomes(recorder, copy) == {(1.0,), (2.0,)}


def test_what_is_read_by_the_host_raises() -> None:
    values = torch.ones(3)
    reads = [
        lambda: float(values.sum()),
        lambda: values.nonzero(),
        lambda: values[values > 0],
        lambda: torch.equal(values, values),
        lambda: torch.allclose(values, values),
        lambda: values.unique(),
        lambda: values.tolist(),
        lambda: values.numpy(),
        lambda: values.to("cpu", copy=True),
    ]
    with Recorder():
        for read in reads:
            with pytest.raises(HostWaitError, match="read by the host"):
                read()
        with pytest.raises(HostWaitError, match="'side' is waited for"):
            torch.cuda.Stream().synchronize()


def test_memory_that_another_stream_still_reads() -> None:
    """Is named unless it was given to record_stream()."""
    values = torch.ones(3)
    for is_recorded in (False, True):
        with Recorder() as recorder:
            side = torch.cuda.Stream()
            doubled = values * 2
            side.wait_stream(recorder.main)
            with torch.cuda.stream(side):
                doubled.add_(1)
                if is_recorded:
                    doubled.record_stream(side)
        assert recorder.strays() == ([] if is_recorded else ["aten.add_.Tensor on side"])
