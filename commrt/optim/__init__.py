"""Optimizers with a fraction of Adam's state."""
