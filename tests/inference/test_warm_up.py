"""What is compiled before the first request is what requests run."""

import jax
import numpy as np

from llava_jax.inference.model import Llava
from tests.tiny_model import CONFIG, byte_tokenizer, random_params


def test_after_a_warm_up_xla_compiles_no_call_of_the_device():
    """Parameters on a device of their own, as they are loaded; traces alone would not tell."""
    params = jax.device_put(random_params(CONFIG, 0), jax.devices()[0])
    engine = Llava(CONFIG, params, byte_tokenizer(), "chatml").engine
    device, compiled = engine.device, []
    engine.warm_up(2, 64, few=True)
    assert all(leaf.committed for leaf in jax.tree.leaves(device.state))
    before = device.state
    heard = lambda name, *_, **__: compiled.append(name)
    jax.monitoring.register_event_duration_secs_listener(heard)
    try:
        for _ in range(2):  # the second gets the state that the first returns
            device.decode(np.zeros(device.rows, bool), 1, device.size)
    finally:
        jax.monitoring.unregister_event_duration_listener(heard)
    assert device.state is not before
    assert not [name for name in compiled if "backend_compile" in name], compiled
