"""Where a model is attached."""

from commrt.hooks.comm import Comm, CommStats
from commrt.hooks.ddp import attach, ddp_hook

__all__ = ["Comm", "CommStats", "attach", "ddp_hook"]
