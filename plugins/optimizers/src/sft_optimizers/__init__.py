"""Optimizers and learning-rate schedules as sft plugins."""
