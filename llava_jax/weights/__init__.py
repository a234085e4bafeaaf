"""Checkpoints of other programs <-> our parameter tree, read and written tensor by tensor."""
