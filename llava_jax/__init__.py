"""LLaVA in JAX/Flax."""


def __getattr__(name: str):
    # Lazy: `import llava_jax.errors` must not pay for JAX.
    if name == "Llava":
        from llava_jax.inference.model import Llava

        return Llava
    raise AttributeError(f"module 'llava_jax' has no attribute {name!r}")
