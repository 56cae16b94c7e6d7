"""Where a model is attached."""

from commrt.hooks.attaching import attach
from commrt.hooks.base import BaseComm
from commrt.hooks.comm import Comm
from commrt.hooks.ddp import ddp_hook
from commrt.hooks.report import CommStats
from commrt.hooks.sharded import ShardedComm

__all__ = ["BaseComm", "Comm", "CommStats", "ShardedComm", "attach", "ddp_hook"]
