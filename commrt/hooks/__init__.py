"""Where a model is attached."""

from commrt.hooks.comm import Comm
from commrt.hooks.ddp import attach, ddp_hook
from commrt.hooks.report import CommStats

__all__ = ["Comm", "CommStats", "attach", "ddp_hook"]
