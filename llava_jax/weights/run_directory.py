"""A run directory, which train.py writes: its files, its steps, and the trained tree of a step.

config.json              the recipe, as the command line left it
model.json               model config, words, boxes, and where frozen parameters came from
tokenizer/               a copy of the tokenizer
checkpoints/STEP/        Orbax items: params (the trainable tree), opt_state
metrics.jsonl, samples.jsonl, loss.png, tensorboard/
"""

import contextlib
import dataclasses
import hashlib
import json
import os
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
from absl import logging
from flax.traverse_util import flatten_dict

from llava_jax.errors import LlavaError
from llava_jax.files import write_json
from llava_jax.models.decoder import DecoderConfig, RopeScaling
from llava_jax.models.images import ImageSpec
from llava_jax.models.llava import LlavaConfig, abstract_params
from llava_jax.models.lora import LoraConfig, abstract_lora
from llava_jax.models.vit import ViTConfig
from llava_jax.weights.checksums import CHECKSUMS_FILE, read_checksums, sha256
from llava_jax.weights.read.fields import read_json

COMPONENTS = ("vision", "projector", "decoder")


@dataclasses.dataclass(frozen=True)
class Source:
    """The folder of a component's starting parameters.

    Attributes:
      path: a folder in Hugging Face's layout, or a step folder of an earlier run.
      checksum: SHA-256 over its weight files.
    """

    path: Path
    checksum: str


@dataclasses.dataclass(frozen=True)
class RunModel:
    """Contents of model.json: with the trained tree, all that is needed to rebuild the model."""

    config: LlavaConfig
    template: str
    sources: dict[str, Source]  # component -> source, for components with frozen parameters
    lora: LoraConfig | None = None
    box_convention: str = "llava"  # see data.boxes
    quantize: str | None = None  # form of the frozen kernels of the language model's layers


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
        "image": ImageSpec.from_values(image),
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
            "box_convention": model.box_convention,
            "sources": sources,
            "lora": model.lora and dataclasses.asdict(model.lora),
            "quantize": model.quantize,
        },
    )


def check_sources(workdir: Path, model: RunModel) -> None:
    """Raises LlavaError unless a model is frozen where the run was, on the same weights."""
    trained_on = read_json(workdir / "model.json").get("sources", {})
    for component, source in model.sources.items():
        if source.checksum != trained_on.get(component, {}).get("checksum"):
            raise LlavaError(
                f"the weights in {source.path} are not those that {workdir} was trained on so far: "
                f"put its {component} back, or choose another config.workdir"
            )


def read_run_model(workdir: Path) -> RunModel:
    path = workdir / "model.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        sources = {c: _find_source(workdir, c, s) for c, s in values["sources"].items()}
        lora = values.get("lora")
        lora = lora and LoraConfig(**lora | {"targets": tuple(lora["targets"])})
        return RunModel(
            config_from_dict(values["config"]),
            values["template"],
            sources,
            lora,
            values.get("box_convention", "llava"),
            values.get("quantize"),
        )
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise LlavaError(f"{path} is damaged ({error!r}): it is written by train.py") from None


def _find_source(workdir: Path, component: str, values: dict) -> Source:
    # Either the run was moved together with its base, or the base is where it was.
    for path in (Path(values["path"]), workdir / values["relative"]):
        if path.exists():
            return Source(path, values["checksum"])
    raise LlavaError(
        f"{workdir} was trained on a frozen {component} from {values['path']}, which is not there: "
        "put that folder back"
    )


def latest_step(workdir: Path) -> int | None:
    """The newest complete checkpoint of a run, or None: as Orbax counts, which skips `0009`."""
    folder = workdir / "checkpoints"
    if not folder.is_dir():
        return None
    return max((int(p.name) for p in folder.iterdir() if _is_step(p)), default=None)


def _is_step(path: Path) -> bool:
    """Whether Orbax takes a path below checkpoints/ for a step: a folder named by a number."""
    return path.name.isdecimal() and str(int(path.name)) == path.name and path.is_dir()


def checkpoint_of(path: str | Path) -> Path:
    """The step folder of a path: the newest of a run directory, or the path itself.

    Raises:
      LlavaError: the path is neither, or the run has no complete checkpoint yet.
    """
    path = Path(path)
    if path.parent.name == "checkpoints" and _is_step(path):
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
    """SHA-256 over the digests of a source's weight files: safetensors, or an Orbax params item.

    Digests in the folder's checksums.json are used: they are verified when it is opened.
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


def expected_shapes(
    config: LlavaConfig, lora: LoraConfig | None = None
) -> dict[tuple[str, ...], jax.ShapeDtypeStruct]:
    """Path -> shape of every parameter of the model."""
    boxed = abstract_params(config)
    if lora is not None:
        boxed = boxed | {"lora": abstract_lora(lora, boxed)}
    return flatten_dict(nn.meta.unbox(boxed))


def first_line(error: Exception) -> str:
    """The first line of an error of Orbax, without the details after it."""
    line = (str(error) or type(error).__name__).splitlines()[0]
    return line.split(". See full TensorStore")[0]


def saved_params(step_folder: Path) -> dict:
    """The trained tree of a checkpoint, with shape and dtype in place of each array."""
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
    check_params(str(step_folder), flatten_dict(saved), expected_shapes(run.config, run.lora))
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
    """Compares arrays with the sums of their bits that `training.checkpoint` saved.

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
    """Raises LlavaError if `found` has a parameter that `expected` lacks, or of another shape.

    Both map paths to things with a shape.
    """
    extra = [path for path in found if path not in expected]
    misshapen = [p for p in found if p in expected and found[p].shape != expected[p].shape]
    if extra:
        raise LlavaError(f"{where} has parameters that the model does not have: {_names(extra)}")
    if misshapen:
        path = misshapen[0]
        raise LlavaError(
            f"{where} has parameters of another shape than the model: {_names(misshapen)} "
            f"({found[path].shape} and not {expected[path].shape})"
        )


def check_complete(where: str, found: dict, expected: dict, components) -> None:
    """Raises LlavaError if `found` lacks a parameter of some components."""
    missing = [path for path in expected if path[0] in components and path not in found]
    if missing:
        raise LlavaError(f"{where} lacks parameters of the model: {_names(missing)}")


def _names(paths: list[tuple[str, ...]]) -> str:
    shown = ", ".join("/".join(path) for path in paths[:5])
    return shown + (f" and {len(paths) - 5} more" if len(paths) > 5 else "")
