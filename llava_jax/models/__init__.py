"""Flax Linen modules and their configs. They know arrays and logical axis names, nothing else."""
