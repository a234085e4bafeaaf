"""LLaVA in JAX/Flax."""
