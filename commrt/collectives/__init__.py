"""A codec and a process group become all_reduce_, reduce_scatter and all_gather."""

from commrt.collectives.agreement import check_agreement
from commrt.collectives.compressed import (
    Reducer,
    all_gather,
    all_reduce_,
    all_reduce_exact_,
    check_gather,
    new_residuals,
    reduce_scatter,
)
from commrt.collectives.order import Pipeline, StreamPipeline, ThreadPipeline
from commrt.collectives.traffic import Traffic, ring_all_reduce_bytes

__all__ = [
    "Pipeline",
    "Reducer",
    "StreamPipeline",
    "ThreadPipeline",
    "Traffic",
    "all_gather",
    "all_reduce_",
    "all_reduce_exact_",
    "check_agreement",
    "check_gather",
    "new_residuals",
    "reduce_scatter",
    "ring_all_reduce_bytes",
]
