"""A run directory, what train.py leaves behind, and how a whole model is read out of one.

config.json              the recipe, as the command line left it
model.json               model config, template, and where frozen parameters came from
tokenizer/               a copy of the tokenizer
checkpoints/STEP/        Orbax items: params (the trainable tree), opt_state
metrics.jsonl, samples.jsonl, loss.png, tensorboard/
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
from absl import logging
from flax.traverse_util import flatten_dict, unflatten_dict

from llava_jax.errors import LlavaError
from llava_jax.files import write_json
from llava_jax.models.decoder import DecoderConfig, RopeScaling
from llava_jax.models.images import ImageSpec
from llava_jax.models.llava import LlavaConfig, abstract_params
from llava_jax.models.lora import LoraConfig, abstract_lora, merge_lora
from llava_jax.models.vit import ViTConfig, num_blocks
from llava_jax.weights.checksums import CHECKSUMS_FILE, read_checksums, sha256
from llava_jax.weights.hub import local_folder
from llava_jax.weights.lazy import LazyParameter, read_tree
from llava_jax.weights.read.fields import read_json
from llava_jax.weights.read.llava_folder import (
    is_llava_folder,
    open_decoder,
    open_llava,
    open_vision,
)

COMPONENTS = ("vision", "projector", "decoder")


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a component's starting parameters lie.

    Attributes:
      path: a folder in Hugging Face's layout, or a step folder of an earlier run.
      checksum: SHA-256 over its weight files.
    """

    path: Path
    checksum: str


@dataclasses.dataclass(frozen=True)
class RunModel:
    """Contents of model.json: all that is needed to rebuild the model beside the trained tree."""

    config: LlavaConfig
    template: str
    sources: dict[str, Source]  # component -> source, for components with frozen parameters
    lora: LoraConfig | None = None


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A model ready for use: parameters as a nested dict, on the device or devices asked for."""

    config: LlavaConfig
    params: dict
    tokenizer_dir: Path
    template: str
    added_tokens: tuple[str, ...] = ()  # see LlavaFolder
    chat_template: str | None = None


def config_from_dict(values: dict) -> LlavaConfig:
    """The inverse of `dataclasses.asdict` on a LlavaConfig, also after a trip through JSON."""
    decoder = dict(values["decoder"])
    if decoder["rope_scaling"] is not None:
        decoder["rope_scaling"] = RopeScaling(**decoder["rope_scaling"])
    fields, image = _as_tuples(values), values.get("image")
    if image is None:  # before ImageSpec there were image_size, image_mode, image_mean, image_std
        image = {name: fields.pop(f"image_{name}") for name in ("size", "mode", "mean", "std")}
    fields |= {
        "vision": ViTConfig(**values["vision"]),
        "decoder": DecoderConfig(**decoder),
        "image": ImageSpec(**_as_tuples(image)),
    }
    return LlavaConfig(**fields)


def _as_tuples(values: dict) -> dict:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}


def write_run_model(workdir: Path, model: RunModel) -> None:
    sources = {
        component: {
            "path": str(source.path.resolve()),
            "relative": os.path.relpath(source.path.resolve(), workdir.resolve()),
            "checksum": source.checksum,
        }
        for component, source in model.sources.items()
    }
    write_json(
        workdir / "model.json",
        {
            "config": dataclasses.asdict(model.config),
            "template": model.template,
            "sources": sources,
            "lora": model.lora and dataclasses.asdict(model.lora),
        },
    )


def read_run_model(workdir: Path) -> RunModel:
    path = workdir / "model.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        sources = {c: _find_source(workdir, c, s) for c, s in values["sources"].items()}
        lora = values.get("lora")
        lora = lora and LoraConfig(**lora | {"targets": tuple(lora["targets"])})
        return RunModel(config_from_dict(values["config"]), values["template"], sources, lora)
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise LlavaError(f"{path} is damaged ({error!r}): it is written by train.py") from None


def _find_source(workdir: Path, component: str, values: dict) -> Source:
    # The run may have been moved together with its base, or the base may stand where it stood.
    for path in (Path(values["path"]), workdir / values["relative"]):
        if path.exists():
            return Source(path, values["checksum"])
    raise LlavaError(
        f"{workdir} was trained on a frozen {component} from {values['path']}, which is not there: "
        "put that folder back"
    )


def latest_step(workdir: Path) -> int | None:
    """The newest complete checkpoint of a run, or None.

    As Orbax does, it counts folders named by a plain number, not a file `9` or a folder `0009`.
    """
    folders = (path for path in (workdir / "checkpoints").glob("*") if path.is_dir())
    steps = (path.name for path in folders if re.fullmatch("0|[1-9][0-9]*", path.name))
    return max(map(int, steps), default=None)


def checkpoint_of(path: str | Path) -> Path:
    """The step folder meant by a run directory (its newest) or by a step folder itself.

    Raises:
      LlavaError: the path is neither, or the run has no complete checkpoint yet.
    """
    path = Path(path)
    if path.name.isdigit() and path.parent.name == "checkpoints" and path.is_dir():
        return path
    if not (path / "model.json").is_file():
        raise LlavaError(
            f"{path} is no checkpoint: give a run directory of train.py, one of its "
            "checkpoints/STEP folders, or a Hugging Face LLaVA folder"
        )
    step = latest_step(path)
    if step is None:
        raise LlavaError(f"{path} holds no finished checkpoint yet")
    return path / "checkpoints" / str(step)


def weights_checksum(folder: Path) -> str:
    """SHA-256 over those of a source's weight files: safetensors, or an Orbax params item.

    Digests that the folder lists itself are taken from there: they are verified when it is opened.
    """
    if (folder / "params").is_dir():
        files = [p for p in (folder / "params").rglob("*") if p.is_file()]
    else:
        files = list(folder.glob("*.safetensors"))
    listed = read_checksums(folder) if (folder / CHECKSUMS_FILE).exists() else {}
    digest = hashlib.sha256()
    for path in sorted(files):
        name = path.relative_to(folder).as_posix()
        digest.update(name.encode())
        digest.update(bytes.fromhex(listed.get(name) or sha256(path)))
    return digest.hexdigest()


def source_config(path: Path) -> LlavaConfig:
    """The model config of a run, a step folder, or a LLaVA folder of others."""
    if is_llava_folder(path):
        return open_llava(path).config
    return read_run_model(checkpoint_of(path).parent.parent).config


def open_components(path: Path, components: list[str], config: LlavaConfig) -> dict:
    """Parameters of some components, from any kind of source, checked to fit but not yet read.

    Args:
      path: a LLaVA folder, one of an encoder or of a language model alone, a run, or a step of one.
      config: the model wanted.
    Returns:
      A nested dict of LazyParameter; what a run trained is read, as float32 arrays.
    """
    if is_llava_folder(path):
        found = open_llava(path).params
    elif not (path / "config.json").is_file() or (path / "model.json").is_file():
        found = flatten_dict(open_run(checkpoint_of(path), components)[1], sep="/")
    elif components == ["vision"]:
        blocks = num_blocks(config.vision, config.feature_layer)
        found = _below("vision", open_vision(path, blocks, config.vision)[1])
    elif components == ["decoder"]:
        found = _below("decoder", open_decoder(path, config.decoder)[1])
    else:
        raise LlavaError(f"{path} is not a whole LLaVA: it cannot give the {components[-1]}")
    found = {tuple(name.split("/")): leaf for name, leaf in found.items()}
    found = {name: leaf for name, leaf in found.items() if name[0] in components}
    expected = _expected(config)
    check_params(str(path), found, expected)
    check_complete(str(path), found, expected, components)
    return {component: {} for component in components} | unflatten_dict(found)


def _below(component: str, params: dict) -> dict:
    return {f"{component}/{name}": leaf for name, leaf in params.items()}


def load_components(path: Path, components: list[str], config: LlavaConfig) -> dict:
    """What `open_components` finds, read: float32 arrays."""
    found = open_components(path, components, config)
    return {component: {} for component in components} | _read_lazy(found, path.name)


def _read_lazy(params: dict, name: str) -> dict:
    """A tree with every LazyParameter in it read, in float32."""
    flat = flatten_dict(params, sep="/")
    lazy = {path: leaf for path, leaf in flat.items() if isinstance(leaf, LazyParameter)}
    read = flatten_dict(read_tree(lazy, "float32", name), sep="/")
    return unflatten_dict(flat | read, sep="/")


def load_run(step_folder: Path, components=COMPONENTS) -> tuple[RunModel, dict]:
    """What `open_run` finds, read: float32 arrays."""
    run, params = open_run(step_folder, components)
    return run, _read_lazy(params, step_folder.parent.parent.name)


def open_run(step_folder: Path, components=COMPONENTS) -> tuple[RunModel, dict]:
    """The model of a checkpoint, or some of its components: base and trained tree laid over it.

    What it was trained on is LazyParameter, not yet read; the trained tree is read. LoRA is added
    to the kernels it belongs to, which are read for that.

    Raises:
      LlavaError: the base is gone or changed since the run, or the checkpoint does not fit it.
    """
    run = read_run_model(step_folder.parent.parent)
    params = {}
    for component in set(run.sources) & set(components):
        source = run.sources[component]
        if weights_checksum(source.path) != source.checksum:
            raise LlavaError(
                f"the weights in {source.path} changed since {step_folder.parent.parent} was "
                f"trained on them: its {component} would not be the model that was trained"
            )
        params |= open_components(source.path, [component], run.config)
    trained = flatten_dict(read_trained(step_folder, run))
    here = lambda path: path[1 if path[0] == "lora" else 0] in components
    merged = {**flatten_dict(params), **{p: leaf for p, leaf in trained.items() if here(p)}}
    check_complete(str(step_folder), merged, _expected(run.config, run.lora), components)
    if any(path[0] == "lora" for path in merged):
        merged = _with_lora(merged, run.lora, step_folder.parent.parent.name)
    return run, unflatten_dict(merged)


def _with_lora(flat: dict, lora: LoraConfig, name: str) -> dict:
    """Paths -> parameters with the update added; of the lazy ones its kernels alone are read."""
    adapted = {(*path[1:-1], "kernel") for path in flat if path[0] == "lora"}
    chosen = {p: leaf for p, leaf in flat.items() if p[0] == "lora" or p in adapted}
    merged = flatten_dict(merge_lora(_read_lazy(unflatten_dict(chosen), name), lora))
    return {p: leaf for p, leaf in flat.items() if p not in chosen} | merged


def _expected(
    config: LlavaConfig, lora: LoraConfig | None = None
) -> dict[tuple[str, ...], jax.ShapeDtypeStruct]:
    """Path -> shape of every parameter of the model."""
    boxed = abstract_params(config)
    if lora is not None:
        boxed = boxed | {"lora": abstract_lora(lora, boxed)}
    return flatten_dict(nn.meta.unbox(boxed))


def first_line(error: Exception) -> str:
    """What an error of Orbax says, without the details that it hangs on."""
    line = (str(error) or type(error).__name__).splitlines()[0]
    return line.split(". See full TensorStore")[0]


def saved_params(step_folder: Path) -> dict:
    """The trained tree of a checkpoint, each leaf told by its shape and dtype alone."""
    import orbax.checkpoint as ocp  # late: seconds, which runs from other folders need not pay

    with _orbax_warnings_off(), ocp.StandardCheckpointer() as reader:
        try:
            saved = reader.metadata(step_folder.resolve() / "params").item_metadata
        except Exception as error:
            raise LlavaError(f"{step_folder} cannot be read as a checkpoint: {error}") from None
    if saved is None:
        raise LlavaError(f"{step_folder} is damaged: its list of parameters cannot be read")
    return saved.tree


def read_trained(step_folder: Path, run: RunModel) -> dict:
    """The trained tree of a checkpoint, on the host, after checking names and shapes."""
    import orbax.checkpoint as ocp  # late, as above

    saved = saved_params(step_folder)
    check_params(str(step_folder), flatten_dict(saved), _expected(run.config, run.lora))
    on_host = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), saved)
    with _orbax_warnings_off(), ocp.PyTreeCheckpointer() as reader:
        try:
            restore = ocp.args.PyTreeRestore(restore_args=on_host)
            trained = reader.restore(step_folder.resolve() / "params", args=restore)
        except MemoryError:
            raise
        except Exception as error:  # Orbax and TensorStore raise many kinds, a bare one for arrays
            raise LlavaError(f"{step_folder} is damaged: {first_line(error)}") from None
    _check_bit_sums(step_folder, trained)
    return trained


def _check_bit_sums(step_folder: Path, trained: dict) -> None:
    """Compares arrays with the sums of their bits that `training.checkpoint` wrote beside them.

    On the host: its own `bit_sums` would copy every array to a device.
    """
    path = step_folder / "bit_sums" / "metadata"
    if not path.is_file():
        return
    sums = read_json(path)
    for name, array in jax.tree_util.tree_leaves_with_path({"params": trained}):
        words = np.ascontiguousarray(array).view(f"u{array.dtype.itemsize}")
        key = jax.tree_util.keystr(name)
        if sums.get(key) != int(np.sum(words, dtype=np.uint32)):
            raise LlavaError(f"{step_folder} is damaged: the bits of {key} have changed")


@contextlib.contextmanager
def _orbax_warnings_off():
    """Orbax warns that an item read by itself lacks the metadata of the step folder around it."""
    before = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(before)


def check_params(where: str, found: dict, expected: dict) -> None:
    """Raises LlavaError when `found` has a parameter that `expected` has not, or in another shape.

    Both map paths to things with a shape.
    """
    extra = [path for path in found if path not in expected]
    misshapen = [p for p in found if p in expected and found[p].shape != expected[p].shape]
    if extra:
        raise LlavaError(f"{where} has parameters that the model has not: {_names(extra)}")
    if misshapen:
        path = misshapen[0]
        raise LlavaError(
            f"{where} has parameters of another shape than the model: {_names(misshapen)} "
            f"({found[path].shape} and not {expected[path].shape})"
        )


def check_complete(where: str, found: dict, expected: dict, components) -> None:
    """Raises LlavaError when `found` lacks a parameter that some components should have."""
    missing = [path for path in expected if path[0] in components and path not in found]
    if missing:
        raise LlavaError(f"{where} lacks parameters of the model: {_names(missing)}")


def _names(paths: list[tuple[str, ...]]) -> str:
    shown = ", ".join("/".join(path) for path in paths[:5])
    return shown + (f" and {len(paths) - 5} more" if len(paths) > 5 else "")


def _all_components(params: dict[str, LazyParameter]) -> dict:
    """As a nested dict; a projector without parameters is there too."""
    return {component: {} for component in COMPONENTS} | unflatten_dict(params, sep="/")


def load_model(
    path: str | Path,
    dtype: str = "float32",
    place: Callable[[LlavaConfig, dict], dict] | None = None,
    **options,
) -> LoadedModel:
    """A model from a run directory, one of its step folders, or a LLaVA folder of others.

    Args:
      dtype: of the parameters: float32 or bfloat16.
      place: given the config and a tree of what has a shape and gives arrays for slices
        (LazyParameter), returns the parameters on their devices. None: on the default device.
      options: of `weights.load.open_llava`, for a folder of others.
    """
    path = local_folder(path, options.get("allow_pickle", False))
    if is_llava_folder(path) or options.get("vision_tower"):
        checkpoint = open_llava(path, **options)
        if checkpoint.tokenizer_dir is None:
            raise LlavaError(
                f"{path} has no tokenizer: copy tokenizer.json or tokenizer.model there"
            )
        return LoadedModel(
            checkpoint.config,
            place(checkpoint.config, _all_components(checkpoint.params))
            if place
            else jax.device_put(checkpoint.read(dtype)),
            checkpoint.tokenizer_dir,
            checkpoint.template,
            checkpoint.added_tokens,
            checkpoint.chat_template,
        )
    step_folder = checkpoint_of(path)
    if any(options.values()):
        raise LlavaError(f"{path} is a run of train.py: leave out {', '.join(options)}")
    if place:
        run, params = open_run(step_folder)
        params = place(run.config, params)
    else:
        run, params = load_run(step_folder)
        params = jax.tree.map(lambda leaf: jax.numpy.asarray(leaf, dtype), params)
    return LoadedModel(run.config, params, step_folder.parent.parent / "tokenizer", run.template)
