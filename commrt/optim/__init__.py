"""Optimizers with a fraction of Adam's state."""

from commrt.optim.adam_mini import AdamMini
from commrt.optim.adamw import AdamW8bit
from commrt.optim.adan import Adan
from commrt.optim.base import StepOptimizer
from commrt.optim.lion import Lion
from commrt.optim.mofo import MoFO
from commrt.optim.offloading.offload import offload

__all__ = ["AdamMini", "AdamW8bit", "Adan", "Lion", "MoFO", "StepOptimizer", "offload"]
