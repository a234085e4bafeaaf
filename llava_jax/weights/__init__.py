"""Checkpoints of others <-> our parameter tree: folders read and written tensor by tensor."""
