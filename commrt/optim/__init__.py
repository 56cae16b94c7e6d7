"""Optimizers with a fraction of Adam's state."""

from commrt.optim.adam_mini import AdamMini

__all__ = ["AdamMini"]
