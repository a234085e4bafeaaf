"""Checkpoints of other programs, read into our configuration and parameter tree."""
