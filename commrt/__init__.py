"""commrt: gradients, client updates and optimizer state in far fewer bytes.

Names are loaded when first used; importing the package changes nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from commrt import optim
    from commrt.codecs import BlockCodec, Codec, ExactCodec, LocoCodec, NoopCodec, parse
    from commrt.collectives import all_gather, all_reduce_, new_residuals, reduce_scatter
    from commrt.hooks import Comm, CommStats, ShardedComm, attach, ddp_hook

__all__ = [
    "BlockCodec",
    "Codec",
    "Comm",
    "CommStats",
    "ExactCodec",
    "LocoCodec",
    "NoopCodec",
    "ShardedComm",
    "all_gather",
    "all_reduce_",
    "attach",
    "ddp_hook",
    "new_residuals",
    "optim",
    "parse",
    "reduce_scatter",
]

_HOME = {
    "commrt.codecs": ("BlockCodec", "Codec", "ExactCodec", "LocoCodec", "NoopCodec", "parse"),
    "commrt.collectives": ("all_gather", "all_reduce_", "new_residuals", "reduce_scatter"),
    "commrt.hooks": ("Comm", "CommStats", "ShardedComm", "attach", "ddp_hook"),
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("commrt")
    if name == "optim":
        return importlib.import_module("commrt.optim")
    for module, names in _HOME.items():
        if name in names:
            return getattr(importlib.import_module(module), name)
    raise AttributeError(f"module 'commrt' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
