"""A stage of training as one object, derived from its recipe before any data or weight is read.

train.py, the dry run and the benchmarks all start here, each on devices of its own choice.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import optax
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh
from ml_collections import ConfigDict

from llava_jax.data.augment import Augmentation
from llava_jax.data.pipeline import TrainingData
from llava_jax.data.records import holds_images, open_records
from llava_jax.data.rows import RowFormat, batch_spec
from llava_jax.errors import LlavaError
from llava_jax.models.llava import LlavaModel
from llava_jax.models.lora import LoraConfig
from llava_jax.models.precision import compute_precision
from llava_jax.models.quantization import is_kernel
from llava_jax.parallel.mesh import BATCH_AXES, make_mesh, microbatches
from llava_jax.parallel.sharding import RULES, batch_sharding, process_part, put_batch
from llava_jax.training import config_values, recipe
from llava_jax.training.optimizer import adamw, warmup_cosine
from llava_jax.training.preferences import PreferenceLoss
from llava_jax.training.state import abstract_model, abstract_state, fresh_state, joined, place
from llava_jax.training.step import (
    COMPILER_OPTIONS,
    REFERENCE,
    AnswerLoss,
    Loss,
    TrainState,
    make_eval_step,
    make_train_step,
)
from llava_jax.weights.run_directory import RunModel


@dataclasses.dataclass(frozen=True, eq=False)
class Stage:
    """Everything about the steps of a stage that its recipe and the devices decide.

    Attributes:
      config: the recipe as given. It is never changed.
      mesh: the devices.
      model: the module, with dtype, remat policy and attention chosen for the devices.
      lora: None without LoRA.
      microbatches: parts that a batch is cut into: config.accumulation, or fewer if a device would
        get no row.
      row_format: how records become rows of a batch.
      refused: the devices' own kernel of attention and why the model does without; often empty.
    """

    config: ConfigDict
    mesh: Mesh
    model: LlavaModel
    lora: LoraConfig | None
    microbatches: int
    row_format: RowFormat
    refused: str

    @classmethod
    def of(cls, config: ConfigDict, devices: Sequence[jax.Device] | None = None) -> "Stage":
        """The stage of a recipe, on all devices or on some, which need not be attached.

        Raises:
          LlavaError: a value that no run could use, or one that does not suit the devices.
        """
        config_values.check_config(config)
        model_config = recipe.model_config(config)
        lora = recipe.lora_config(config, model_config)
        mesh = make_mesh(**config.mesh, devices=devices and list(devices))
        parts = microbatches(mesh, config.batch_size, config.accumulation)
        model, refused = recipe.training_model(config, model_config, mesh)
        rows = recipe.row_format(config, model_config)
        stage = cls(config, mesh, model, lora, parts, rows, refused)
        if stage.from_features:
            stage._check_features()
        return stage

    @functools.cached_property
    def _abstract(self) -> tuple[TrainState, dict]:
        optimizer = self.optimizer(lambda step: 1.0)  # the schedule changes no shape
        boxed = abstract_model(self.model.config, self.lora)
        form = self.config.model.quantize
        state, frozen = abstract_state(
            self.mesh, boxed, self.groups, optimizer, self.model.dtype, self.compares, form
        )
        training = [path for path in flatten_dict(state.params) if is_kernel(path, head=False)]
        if form and training:
            raise LlavaError(
                f"config.model.quantize is {form}, but config.trainable ({', '.join(self.groups)}) "
                f"trains {'/'.join(training[0])}: what is quantized stays as it is; train lora"
            )
        return state, frozen

    @property
    def state(self) -> TrainState:
        """Shapes, dtypes and shardings of the training state, as jax.ShapeDtypeStruct.

        Raises:
          LlavaError: config.trainable names something that the model does not have.
        """
        return self._abstract[0]

    @property
    def frozen(self) -> dict:
        """The same of the frozen parameters."""
        return self._abstract[1]

    @property
    def join(self) -> Callable[..., dict]:
        """(trainable, frozen[, keys of the rows]) -> parameters as the model takes them."""
        return joined(self.lora)

    @property
    def compares(self) -> bool:
        """Whether pairs of answers are learnt from, in comparison with the model at the start."""
        return self.config.loss == "dpo"

    @property
    def loss(self) -> Loss:
        """What is minimised."""
        chunk = self.config.loss_chunk
        if not self.compares:
            return AnswerLoss(self.model, chunk)
        return PreferenceLoss(self.model, chunk, self.config.dpo.beta, "vision" not in self.learns)

    @property
    def groups(self) -> dict[str, float]:
        """What trains: path prefix -> peak learning rate."""
        return self.config.trainable.to_dict()

    @property
    def trainable(self) -> set[str]:
        """Top-level components with trained parameters."""
        return set(self.state.params)

    @property
    def learns(self) -> set[str]:
        """The components that are other at the end: those trained themselves, or adapted."""
        paths = flatten_dict(self.state.params)
        return {path[1] if path[0] == "lora" else path[0] for path in paths}

    @property
    def from_features(self) -> bool:
        """Whether steps take what the encoder sees of pictures from a store; see `features`."""
        return bool(self.config.features.folder)

    @functools.cached_property
    def seen(self) -> tuple[tuple[int, ...], np.dtype]:
        """Shape and dtype of what the encoder sees of a tile, [P, D]."""
        side = self.model.config.image.size
        tile = jax.ShapeDtypeStruct((1, side, side, 3), np.uint8)
        see = lambda params, tile: self.model.apply(params, tile, method=LlavaModel.see)
        seen = jax.eval_shape(see, {"params": {"vision": self.frozen["vision"]}}, tile)
        return seen.shape[1:], seen.dtype

    @property
    def batch_format(self) -> RowFormat:
        """`row_format`, with what the encoder sees in place of pixels if that is stored."""
        return dataclasses.replace(self.row_format, seen=self.seen if self.from_features else None)

    def _check_features(self) -> None:
        if "vision" in self.learns:
            raise LlavaError(
                "config.features.folder keeps what a frozen encoder sees, but config.trainable "
                f"({', '.join(self.groups)}) changes the vision: leave one of them out"
            )
        for key in ("flip", "crop"):
            if self.config.data[key]:
                raise LlavaError(
                    f"config.data.{key} changes pictures anew in every step, but "
                    "config.features.folder keeps what the encoder sees of each once: leave one of "
                    "them out"
                )

    def of_steps(self, frozen: dict) -> dict:
        """The frozen parameters without the encoder, if steps do without it."""
        return {k: v for k, v in frozen.items() if k != "vision" or not self.from_features}

    def description(self, state: TrainState, frozen: dict, steps: int) -> str:
        """What is about to run, on what: where to look if something is not as expected."""
        count = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree)) / 1e6
        devices = f"{self.mesh.size} x {self.mesh.devices.flat[0].device_kind}"
        if jax.process_count() > 1:
            devices += f" of {jax.process_count()} processes"
        reference = count(frozen.get(REFERENCE, {}))
        copied = f" and {reference:,.1f}M more as they start" if reference else ""
        text = (
            f"{devices} as {dict(self.mesh.shape)}; parameters: {count(state.params):,.1f}M "
            f"trained ({', '.join(state.params)}), {count(frozen) - reference:,.1f}M "
            f"frozen{copied}; image: {self.model.config.image_words}; steps: {int(state.step)} of "
            f"{steps} done"
        )
        return (
            f"{text}\nattention: {self.model.attention}, not {self.refused}"
            if self.refused
            else text
        )

    @property
    def platform(self) -> str:
        return self.mesh.devices.flat[0].platform

    @property
    def batch_shards(self) -> int:
        """Devices, or groups of devices, that share the rows of a batch."""
        return math.prod(self.mesh.shape[axis] for axis in BATCH_AXES)

    def schedule(self, steps: int) -> Callable[[jax.Array], jax.Array]:
        """Step -> share of the peak learning rate, over a run of `steps`."""
        return warmup_cosine(steps, self.config.optimizer.warmup_ratio)

    def optimizer(self, schedule: Callable) -> optax.GradientTransformation:
        return adamw(self.groups, schedule, **recipe.optimizer_options(self.config))

    @contextlib.contextmanager
    def scope(self) -> Iterator[None]:
        """The mesh, the sharding rules and the precision of products that steps are compiled in."""
        _, precision = compute_precision(self.config.model.dtype, self.platform)
        _ = self._abstract  # its shapes carry no sharding of activations: traced outside the mesh
        with (
            jax.set_mesh(self.mesh),
            nn.logical_axis_rules(RULES),
            jax.default_matmul_precision(precision),
        ):
            yield

    def compile_step(
        self, optimizer: optax.GradientTransformation, state: TrainState, frozen: dict, batch: dict
    ) -> jax.stages.Compiled:
        """The training step, compiled for these arrays, or for their shapes and shardings.

        To be called within `scope`.

        Returns:
          (state, frozen, batch) -> (state, metrics); it consumes the state.
        """
        c = self.config
        step = make_train_step(self.loss, optimizer, self.microbatches, self.join, c.parity, c.seed)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
        jitted = jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))
        return jitted.lower(state, frozen, batch).compile(COMPILER_OPTIONS.get(self.platform))

    def eval_step(self) -> Callable:
        """(trainable, frozen, batch) -> (sums of losses and other figures, number of units)."""
        return jax.jit(make_eval_step(self.loss, self.join))

    def starting_state(
        self,
        sources: dict[str, Path],
        optimizer: optax.GradientTransformation,
        resumed: TrainState | None = None,
    ) -> tuple[TrainState, dict]:
        """(state, frozen parameters) on the devices: what was resumed, or a fresh start.

        Only the components that are needed are read.

        Args:
          sources: component -> folder that it starts from; see `recipe.starting_sources`.
        """
        components = {*self.frozen, *self.frozen.get(REFERENCE, ())} - {REFERENCE}
        components |= set(() if resumed else self.state.params)
        params = recipe.starting_params(
            self.model.config,
            self.lora,
            sources,
            components,
            self.config.seed,
            self.frozen,
            resumed is not None,
        )
        frozen = place(params, self.frozen, self.config.model.quantize)
        return resumed or fresh_state(self.state, params, optimizer), frozen

    def batch_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes, dtypes and shardings of a step's batch."""
        spec = batch_spec(self.batch_format, self.config.batch_size)
        place = functools.partial(jax.ShapeDtypeStruct, sharding=batch_sharding(self.mesh))
        return {name: place(array.shape, array.dtype) for name, array in spec.items()}

    def run_model(self, sources: dict[str, Path]) -> RunModel:
        """The contents of a run's model.json.

        Args:
          sources: component -> folder that it starts from; see `recipe.starting_sources`.

        Raises:
          LlavaError: a frozen component starts from no folder.
        """
        components = set(self.frozen) - {REFERENCE}
        frozen = recipe.frozen_sources(sources, components)
        return RunModel(
            self.model.config,
            self.config.model.template,
            frozen,
            self.lora,
            self.row_format.box_convention,
            self.config.model.quantize,
        )

    def reference_checksums(self, sources: dict[str, Path]) -> dict[str, str]:
        """Component -> checksum of the folder that the reference is read from, if there is one.

        A run that is resumed reads it again.
        """
        components = self.frozen.get(REFERENCE, ())
        return {
            c: source.checksum for c, source in recipe.frozen_sources(sources, components).items()
        }

    @functools.cached_property
    def part(self) -> tuple[int, int]:
        """(index, count): the part of every batch that this process reads."""
        return process_part(self.mesh)

    def put(self, arrays: dict) -> dict[str, jax.Array]:
        """This process's rows of a batch -> the global batch on the devices."""
        return put_batch(self.mesh, arrays)

    def training_data(self, tokenizer, **changes) -> TrainingData:
        """The recipe's data, every record checked.

        Args:
          tokenizer: a Hugging Face fast tokenizer.
          changes: arguments of `TrainingData` to be other than in the recipe.
        """
        arguments = self.data_arguments() | changes
        records = self.records(cache_dir=arguments["cache_dir"])
        return TrainingData(records, tokenizer, self.row_format, **arguments)

    def held_out_data(self, tokenizer) -> TrainingData | None:
        """One pass over the held-out data; None without any."""
        if not self.config.data.validation:
            return None
        arguments = self.data_arguments(held_out=True)
        records = self.records(held_out=True, cache_dir=arguments["cache_dir"])
        return TrainingData(records, tokenizer, self.row_format, **arguments)

    def records(self, held_out: bool = False, cache_dir: Path | None = None):
        """The records of the training data, or of the held-out data, not yet checked.

        cache_dir: as in `open_records`.
        """
        data = self.config.data
        path, split = data.train, data.train_split
        if held_out:
            path, split = data.validation, data.validation_split
        root = None if holds_images(path) else data.image_root or None
        options = {"columns": data.columns.to_dict(), "pairs": self.config.loss == "dpo"}
        return open_records(path, root, split, self.config.seed, cache_dir=cache_dir, **options)

    def data_arguments(self, held_out: bool = False) -> dict:
        """Arguments of `TrainingData`; held-out data come in batches of a microbatch's size."""
        c = self.config
        length = {"batch_size": c.batch_size, "epochs": c.epochs, "steps": c.steps}
        if held_out:
            rows = c.batch_size // self.microbatches
            length = {"batch_size": rows, "epochs": 1, "pad_final_batch": True}
        else:
            length["augmentation"] = Augmentation(c.data.flip, c.data.crop, c.seed)
        return length | {
            "seed": c.seed,
            "bad_image": c.data.bad_image,
            "bad_image_ceiling": c.data.bad_image_ceiling,
            "workers": c.data.workers,
            "cache_dir": Path(c.workdir) / "cache",
            "host": (jax.process_index(), jax.process_count()),
        }

    def check_reach(self, data: TrainingData, report: Callable[[str], None]) -> None:
        """Refuses data from which nothing of what trains can learn; reports what part cannot.

        Without pictures no gradient reaches the encoder and the projector.
        """
        names = self.learns  # checks config.trainable, in any case
        idle = sorted(names & {"vision", "projector"})
        if data.tiles_per_epoch:
            return
        fault = f"no record of {data.records.path} has a picture"
        if idle and names == set(idle):
            raise LlavaError(
                f"{fault}, so the {' and the '.join(idle)} would learn nothing and nothing else "
                "trains: give data with pictures, or train the decoder too, with "
                "config.trainable.decoder"
            )
        if idle:
            report(f"{fault}: the {' and the '.join(idle)} will learn nothing")
