"""The device mesh and the one table of sharding rules."""
