"""A codec and a process group become all_reduce_, reduce_scatter and all_gather."""

from commrt.collectives.agreement import check_agreement, gather_texts
from commrt.collectives.compressed import (
    all_gather,
    all_reduce_,
    new_residuals,
    reduce_scatter,
)
from commrt.collectives.groups import GroupMaker, LegGroups, find_nodes, give_back
from commrt.collectives.hierarchy import TwoLevelReducer
from commrt.collectives.layout import balanced, share_of
from commrt.collectives.lowrank import LowRankReducer
from commrt.collectives.order import Pipeline, StreamPipeline, ThreadPipeline
from commrt.collectives.reducer import (
    Averager,
    Item,
    Reducer,
    all_reduce_exact_,
    check_gather,
    timed,
)
from commrt.collectives.sharded import Scatterer, ShardReducer, TwoLevelScatterer
from commrt.collectives.traffic import Traffic, ring_all_reduce_bytes, ring_scatter_bytes

__all__ = [
    "Averager",
    "GroupMaker",
    "Item",
    "LegGroups",
    "LowRankReducer",
    "Pipeline",
    "Reducer",
    "Scatterer",
    "ShardReducer",
    "StreamPipeline",
    "ThreadPipeline",
    "Traffic",
    "TwoLevelReducer",
    "TwoLevelScatterer",
    "all_gather",
    "all_reduce_",
    "all_reduce_exact_",
    "balanced",
    "check_agreement",
    "check_gather",
    "find_nodes",
    "gather_texts",
    "give_back",
    "new_residuals",
    "reduce_scatter",
    "ring_all_reduce_bytes",
    "ring_scatter_bytes",
    "share_of",
    "timed",
]
