"""NVIDIA GPUs that are not there: XLA's compiler for them takes a description of the card.

It needs no card and no driver, only the wheels of the extra `gpu_dry_run`. Two things that a card
brings are missing: what cuDNN asks for on top of its operands, counted here by formula, and the
measuring of kernels, so the compiler's first choices stand.
"""

import importlib.util
import os
import re

import jax
import jaxlib

from llava_jax.dry_run.chips import Gpu
from llava_jax.dry_run.program import instructions, read_program
from llava_jax.errors import LlavaError

CUDA, CUDNN = "13.0.0", "9.10.0"
DEFAULT_SHARE = 0.75  # of a card's memory, which JAX takes at the start


def gpu_devices(name: str, gpu: Gpu, hosts: int, cards: int) -> tuple[jax.Device, ...]:
    """Cards to compile for, those of a host one after another.

    Args:
      name: of the topology, for errors.

    Raises:
      LlavaError: the compiler is not installed, or not of this jax's version.
    """
    wheels = f"jax-cuda13-pjrt=={jax.__version__} jax-cuda13-plugin=={jax.__version__}"
    remedy = f"pip install {wheels} in an environment of its own (no GPU is needed)"
    plugins = importlib.util.find_spec("jax_plugins")
    if not plugins or not importlib.util.find_spec("jax_plugins.xla_cuda13"):
        raise LlavaError(
            f"dry_run={name} needs the compiler for NVIDIA GPUs: {remedy}, or take --dry_run=cpu:8"
        )
    from jax.experimental import topologies

    try:
        description = topologies.get_topology_desc(
            platform="cuda", target_config=described(gpu), topology=f"1x{hosts}x{cards}"
        )
    except (jax.errors.JaxRuntimeError, NotImplementedError, RuntimeError) as error:
        raise LlavaError(
            f"dry_run={name}: the compiler for NVIDIA GPUs does not start with jaxlib "
            f"{jaxlib.__version__} ({error}): {remedy}"
        ) from None
    _answer_jax_for(gpu)
    return tuple(description.devices)


def described(gpu: Gpu) -> str:
    """The card as XLA reads it: a `stream_executor.GpuTargetConfigProto` as text."""
    major, minor = gpu.capability.split(".")
    features = "ACCELERATED_FEATURES" if int(major) >= 9 else "NONE"
    dnn = dict(zip(("major", "minor", "patch"), CUDNN.split("."), strict=True))
    return f"""
gpu_device_info {{
  name: "{gpu.kind}" device_vendor: "NVIDIA Corporation" ecc_enabled: true
  cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: {features} }}
  device_memory_size: {gpu.hbm} memory_bandwidth: {int(gpu.hbm_bandwidth)}
  core_count: {gpu.cores} fpus_per_core: {gpu.fpus} clock_rate_ghz: {gpu.clock}
  l2_cache_size: {gpu.cache} shared_memory_per_core: {gpu.shared}
  shared_memory_per_block: 49152 shared_memory_per_block_optin: {gpu.shared - 1024}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  device_address_bits: 64 pcie_bandwidth: 34359738368
  device_interconnect_info {{ active_links: {gpu.links} }}
  driver_version: "{CUDA}" runtime_version: "{CUDA}" compile_time_toolkit_version: "{CUDA}"
  dnn_version: "{CUDNN}"
}}
platform_name: "CUDA"
dnn_version_info {{ {" ".join(f"{part}: {number}" for part, number in dnn.items())} }}
device_description_str: "{gpu.kind}"
"""


def _answer_jax_for(gpu: Gpu) -> None:
    """Makes jax check attention for this card, where it would ask this machine's driver."""
    from jax._src.cudnn import fused_attention_stablehlo as library

    number = lambda version: tuple(map(int, version.split(".")))
    major, minor, patch = number(CUDNN)
    has = number(gpu.capability)
    library.check_cudnn_version = lambda: major * 10000 + minor * 100 + patch
    library.check_compute_capability = lambda least: has >= number(least)
    library.is_cuda_compute_capability_equal = lambda wanted: has == number(wanted)


def usable_share() -> float:
    """The share of a card's memory that JAX would take here, by the variable that sets it."""
    for variable in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        if text := os.environ.get(variable):
            try:
                share = float(text)
            except ValueError:
                share = 0.0
            if not 0 < share <= 1:
                raise LlavaError(f"{variable} is {text!r}: give a number above 0 and up to 1")
            return share
    return DEFAULT_SHARE


def cudnn_workspace(text: str, capability: str) -> int:
    """Bytes that cuDNN's attention takes besides its operands, which no compiler counts.

    Its backward pass sums the queries' gradient in float32, before Hopper twice, and gives grouped
    kv heads a gradient for each query head: B x T x N x H numbers, twice. With the gradient of the
    mask, which jax before 0.11.2 asks for, it keeps that of the scores instead: B x N x T x T
    numbers. So cuDNN 9.28's plans have it for heads of 64 to 128 on A100 and H100, to 1 MiB.

    Args:
      text: of the compiled program.
      capability: of the card.
    """
    largest = 0
    computations, _ = read_program(text)
    for lines in computations.values():
        for result, opcode, rest in instructions(lines):
            if opcode != "custom-call" or not re.search(r'"__cudnn\$fmha\w*Backward"', rest):
                continue
            shapes = [
                tuple(map(int, sizes.split(","))) for sizes in re.findall(r"16\[([\d,]+)\]", result)
            ]
            (b, n, t, h), (_, kv_heads, *_) = shapes[:2]
            sums = 4 * b * t * n * h * (1 if float(capability) >= 9 else 2)
            if len(shapes) > 3:  # the mask's gradient
                sums = 2 * b * n * t * t
            copies = 2 * 2 * b * t * n * h if kv_heads < n else 0
            largest = max(largest, sums + copies + 2**20)
    return largest
