"""LLaVA in JAX/Flax."""


def __getattr__(name: str):
    # Lazy: `import llava_jax.errors` must not pay for JAX.
    if name == "Llava":
        from llava_jax.inference.model import Llava

        return Llava
    if name == "Video":
        from llava_jax.data.video import Video

        return Video
    raise AttributeError(f"module 'llava_jax' has no attribute {name!r}")
