"""What is compiled before the first request is what requests run."""

import threading

import jax
import pytest

from llava_jax.inference.device import compile_all
from llava_jax.inference.model import Llava
from llava_jax.parallel.mesh import make_mesh
from tests.tiny_model import CONFIG, byte_tokenizer, random_image, random_params

OURS = {"encode", "prefill", "decode"}


def loaded(mesh) -> Llava:
    """A model whose parameters are on devices of their own choice, as those of files are."""
    params = random_params(CONFIG, 0)
    if mesh is None:
        params = jax.device_put(params, jax.devices()[0])
    return Llava(CONFIG, params, byte_tokenizer(), "chatml", mesh=mesh)


@pytest.mark.parametrize("devices", [1, 4])
def test_after_a_warm_up_xla_compiles_no_call_of_the_engine(devices):
    """Also none that was traced: JAX lowers it anew for arrays that lie elsewhere."""
    mesh = make_mesh(1, 2, 2, devices=jax.devices()[:4]) if devices > 1 else None
    model, compiled = loaded(mesh), []
    model.engine.warm_up(2, 256, few=True)
    heard = lambda event, *_, fun_name="", **__: compiled.append((event, fun_name))
    jax.monitoring.register_event_duration_secs_listener(heard)
    try:
        model.generate(
            ["a?", "what is it?", "no picture"],
            images=[random_image(0), [random_image(1)], []],
            max_tokens=12,
            batch_size=2,
            ignore_eos=True,
        )
    finally:
        jax.monitoring.unregister_event_duration_listener(heard)
    again = {name for event, name in compiled if "backend_compile" in event}
    assert not {name for name in again if any(ours in name for ours in OURS)}, again


def test_a_program_is_reported_before_all_are_traced_and_its_fault_is_raised():
    reported, first = [], threading.Event()

    class Program:
        def __init__(self, fault: Exception | None = None):
            self.fault = fault

        def compile(self):
            if self.fault:
                raise self.fault

    def traced():
        yield Program()
        assert first.wait(30)
        yield Program(MemoryError("of the compiler"))

    with pytest.raises(MemoryError, match="of the compiler"):
        compile_all(traced(), lambda number: (reported.append(number), first.set()))
    assert reported == [1]
