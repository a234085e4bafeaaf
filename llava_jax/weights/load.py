"""Whole models, or some of their components, out of any folder: a run of ours or a LLaVA.

What a folder holds is LazyParameter until it is placed: each device's slices are read from disk.
"""

import argparse
import dataclasses
from collections.abc import Callable, Collection
from pathlib import Path

import jax
from flax.traverse_util import flatten_dict, unflatten_dict

from llava_jax.errors import LlavaError
from llava_jax.models.images import MODES
from llava_jax.models.llava import LlavaConfig
from llava_jax.models.lora import LoraConfig, merge_lora
from llava_jax.models.vit import num_blocks
from llava_jax.parallel import hosts
from llava_jax.weights.hub import local_folder
from llava_jax.weights.quantized import round_kernels
from llava_jax.weights.read.llava_folder import (
    is_llava_folder,
    open_llava,
    open_part,
)
from llava_jax.weights.read.prompt_words import PromptWords, run_words
from llava_jax.weights.read.tiled_pictures import PINPOINT_ORDERS
from llava_jax.weights.run_directory import (
    COMPONENTS,
    RunModel,
    check_complete,
    check_params,
    checkpoint_of,
    expected_shapes,
    read_run_model,
    read_trained,
    weights_checksum,
)
from llava_jax.weights.tensors import LazyParameter, read_tree


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A model ready for use.

    Attributes:
      config: the model's.
      params: nested dict of parameters, on the device or devices asked for.
      tokenizer_dir: the folder of its tokenizer.
      words: how it is asked, and where its answers end.
      added_tokens: tokens to add to the tokenizer first, in this order.
    """

    config: LlavaConfig
    params: dict
    tokenizer_dir: Path
    words: PromptWords
    added_tokens: tuple[str, ...] = ()

    @property
    def template(self) -> str:
        return self.words.template

    @property
    def chat_template(self) -> str | None:
        return self.words.chat_template

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        return self.words.stop_token_ids

    @property
    def box_convention(self) -> str:
        return self.words.box_convention


def source_config(path: Path, **options) -> LlavaConfig:
    """The model config of a run, a step folder, or a LLaVA of another program.

    options: of `open_llava`, for a folder of another program.
    """
    if is_llava_folder(path):
        opened = open_llava(path, **options)
        for note in opened.notes:
            hosts.report(note)
        return opened.config
    run = checkpoint_of(path).parent.parent
    _refuse(options, path)
    return read_run_model(run).config


def open_components(
    path: Path,
    components: list[str],
    config: LlavaConfig,
    optional: Collection[tuple[str, ...]] = (),
) -> dict:
    """Parameters of some components, from any kind of source: checked, but not read yet.

    Args:
      path: a LLaVA folder, one of an encoder or of a language model alone, a run, or a step of one.
      config: the model wanted.
      optional: paths of parameters that the source may lack.
    Returns:
      A nested dict of LazyParameter; what a run trained is read, as float32 arrays.
    """
    if is_llava_folder(path):
        found = open_llava(path).params
    elif not (path / "config.json").is_file() or (path / "model.json").is_file():
        found = flatten_dict(open_run(checkpoint_of(path), components)[1], sep="/")
    elif components in (["vision"], ["decoder"]):
        (part,) = components
        blocks = num_blocks(config.vision, config.feature_layer) if part == "vision" else None
        _, params = open_part(part, path, blocks, getattr(config, part))
        return {part: unflatten_dict(params, sep="/")}
    else:
        raise LlavaError(f"{path} is not a whole LLaVA: it cannot give the {components[-1]}")
    found = {tuple(name.split("/")): leaf for name, leaf in found.items()}
    found = {name: leaf for name, leaf in found.items() if name[0] in components}
    expected = expected_shapes(config)
    check_params(str(path), found, expected)
    needed = {name: leaf for name, leaf in expected.items() if name not in optional}
    check_complete(str(path), found, needed, components)
    return {component: {} for component in components} | unflatten_dict(found)


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
    """The model of a checkpoint, or some of its components: the base, then the trained tree.

    The base is LazyParameter, not read yet, except kernels that LoRA is added to; the trained tree
    is read.

    Raises:
      LlavaError: the base is gone or changed since the run, or the checkpoint does not fit it.
    """
    run = read_run_model(step_folder.parent.parent)
    params, trained = {}, flatten_dict(read_trained(step_folder, run))
    for component in set(run.sources) & set(components):
        source = run.sources[component]
        if weights_checksum(source.path) != source.checksum:
            raise LlavaError(
                f"the weights in {source.path} changed since {step_folder.parent.parent} was "
                f"trained on them: its {component} would not be the model that was trained"
            )
        params |= open_components(source.path, [component], run.config, optional=trained)
    if run.quantize:
        params = unflatten_dict(round_kernels(flatten_dict(params), run.quantize))
    here = lambda path: path[1 if path[0] == "lora" else 0] in components
    merged = {**flatten_dict(params), **{p: leaf for p, leaf in trained.items() if here(p)}}
    check_complete(str(step_folder), merged, expected_shapes(run.config, run.lora), components)
    if any(path[0] == "lora" for path in merged):
        merged = _with_lora(merged, run.lora, step_folder.parent.parent.name)
    return run, unflatten_dict(merged)


def _with_lora(flat: dict, lora: LoraConfig, name: str) -> dict:
    """Path -> parameter with the update added; only the kernels that it changes are read."""
    adapted = {(*path[1:-1], "kernel") for path in flat if path[0] == "lora"}
    chosen = {p: leaf for p, leaf in flat.items() if p[0] == "lora" or p in adapted}
    merged = flatten_dict(merge_lora(_read_lazy(unflatten_dict(chosen), name), lora))
    return {p: leaf for p, leaf in flat.items() if p not in chosen} | merged


def _all_components(params: dict[str, LazyParameter]) -> dict:
    """A nested dict with every component, also a projector without parameters."""
    return {component: {} for component in COMPONENTS} | unflatten_dict(params, sep="/")


def load_model(
    path: str | Path,
    dtype: str = "float32",
    place: Callable[[LlavaConfig, dict], dict] | None = None,
    template: str | None = None,
    **options,
) -> LoadedModel:
    """A model from a run directory, one of its step folders, or a LLaVA of another program.

    What had to be assumed or guessed, such as the words in which it is asked, is said on stderr.

    Args:
      dtype: of the parameters: float32 or bfloat16.
      place: (config, tree of LazyParameter) -> parameters on their devices; None for the
        default device.
      template: the words in which it is asked, in place of the folder's own; see `prompt_words`.
      options: of `open_llava`, for a folder of another program.
    """
    path = local_folder(path, options.get("allow_pickle", False))
    if is_llava_folder(path) or options.get("vision_tower"):
        opened = open_llava(path, **options)
        tokenizer_dir, words = opened.needed_tokenizer(), opened.words(template)
        for note in opened.notes:
            hosts.report(note)
        config, added_tokens = opened.config, opened.added_tokens
        if place:
            params = place(config, _all_components(opened.params))
        else:
            params = jax.device_put(opened.read(dtype))
    else:
        step_folder = checkpoint_of(path)
        _refuse(options, path)
        tokenizer_dir, added_tokens = step_folder.parent.parent / "tokenizer", ()
        run, params = open_run(step_folder) if place else load_run(step_folder)
        config = run.config
        words = run_words(tokenizer_dir, run.template, template, run.box_convention)
        if place:
            params = place(config, params)
        else:
            params = jax.tree.map(lambda leaf: jax.numpy.asarray(leaf, dtype), params)
    if words.warning:
        hosts.report(words.warning)
    return LoadedModel(config, params, tokenizer_dir, words, added_tokens)


def _refuse(options: dict, run: Path) -> None:
    """LlavaError if options of `open_llava` are given for a run, which says all of itself."""
    if given := [name for name, value in options.items() if value]:
        raise LlavaError(f"{run} is a run of train.py: leave out {', '.join(given)}")


def add_picture_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `open_llava` for folders that do not say how they are to be read."""
    parser.add_argument(
        "--pinpoint_order",
        choices=PINPOINT_ORDERS,
        help="whose code chooses the tiles of a picture: transformers or the original; default: "
        "that of the folder's form",
    )
    parser.add_argument(
        "--image_mode",
        choices=tuple(MODES),
        help="show each picture as one view in this mode, whatever the folder says of tiles",
    )


def picture_options(args: argparse.Namespace) -> dict[str, str | None]:
    """The options of `add_picture_arguments`."""
    return {"pinpoint_order": args.pinpoint_order, "image_mode": args.image_mode}
