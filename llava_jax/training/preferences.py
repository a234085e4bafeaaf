"""Direct preference optimisation (Rafailov et al. 2023, arXiv:2305.18290) of pairs of answers.

The model that a stage starts from is the reference. Nothing of it that does not train is there
twice, and a frozen encoder looks at the pictures once for both.

B rows, T length, A answers in a row: of its pair n the chosen is number 2n, the rejected 2n + 1.
"""

import dataclasses

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from llava_jax.errors import LlavaError
from llava_jax.models.decoder import output_embedding
from llava_jax.models.llava import LlavaModel
from llava_jax.text.templates import get_template
from llava_jax.text.tokenization import IGNORE_INDEX
from llava_jax.training.losses import answer_log_probs
from llava_jax.training.optimizer import merge_params
from llava_jax.training.step import REFERENCE, batch_targets, model_inputs

PAIR_TOKENS = 4  # of the shortest: of each answer one token, and the one before it


def check_preferences(config: ConfigDict) -> None:
    """Raises LlavaError for values of a recipe that do not go with pairs of answers."""
    if config.loss != "dpo":
        return
    if not config.init.checkpoint:
        raise LlavaError(
            "config.loss is dpo and config.init.checkpoint is empty: name the trained model to "
            "start from, which is also what the new one is compared with"
        )
    if get_template(config.model.template).image_only_question:
        # The last token before an answer, of which each has its own, would be a picture's.
        raise LlavaError(
            f"config.model.template is {config.model.template!r}, which writes captions alone: "
            "config.loss=dpo needs the template of the model that it starts from"
        )
    idle = {
        "data.turns": (config.data.turns, "conversation"),
        "data.labels": (config.data.labels, None),
        "parity": (config.parity, False),
    }
    for key, (value, default) in idle.items():
        if value != default:
            raise LlavaError(
                f"config.{key} is {value!r}, which means nothing with config.loss=dpo: leave it out"
            )


def reference_params(frozen: dict) -> dict:
    """The model that a stage starts from, as the model takes it, of the stage's frozen parameters.

    LoRA is part of none: its update is zero at the start.
    """
    rest = {name: tree for name, tree in frozen.items() if name != REFERENCE}
    return merge_params(frozen.get(REFERENCE, {}), rest)


def dpo_loss(log_probs: jax.Array, reference: jax.Array, beta: float) -> tuple[jax.Array, ...]:
    """The loss of pairs, and the rewards of their answers.

    A reward is beta times log p less that of the reference; the loss is -log sigmoid of the chosen
    answer's reward less the rejected one's.

    Args:
      log_probs, reference: float32 [..., 2], of the chosen and the rejected answer.

    Returns:
      float32 [...] and [..., 2].
    """
    rewards = beta * (log_probs - reference)
    return -jax.nn.log_sigmoid(rewards[..., 0] - rewards[..., 1]), rewards


@dataclasses.dataclass(frozen=True)
class PreferenceLoss:
    """`dpo_loss` of the pairs of a batch; a `training.step.Loss`, whose units are pairs.

    A pair is a segment of a row: its prompt is stored once, as turn 0, and each of its answers,
    turns 1 and 2, sees the prompt and itself.

    Attributes:
      model: the module.
      chunk: see `answer_log_probs`.
      beta: how dear it is to leave the reference.
      one_tower: whether the encoder is the same in the reference.
    """

    model: LlavaModel
    chunk: int
    beta: float
    one_tower: bool
    figures = tuple(f"reward/{name}" for name in ("accuracy", "margin", "chosen", "rejected"))
    figures += ("log_prob/chosen", "log_prob/rejected")

    def units(self, batch: dict) -> jax.Array:
        return jnp.max(batch["segment_ids"], axis=1)

    def __call__(self, params, frozen, batch, weights):
        reference, seen, tiles = reference_params(frozen), batch.get("seen"), batch.get("tiles")
        if seen is None and self.one_tower and tiles.shape[1]:
            flat = tiles.reshape(-1, *tiles.shape[2:])
            seen = self.model.apply({"params": reference}, flat, method=LlavaModel.see)
            seen = seen.reshape(*tiles.shape[:2], *seen.shape[1:])
        log_probs = self.log_probs(params, batch, seen)  # [B, A / 2, 2]
        losses, rewards = dpo_loss(log_probs, self.log_probs(reference, batch, seen), self.beta)
        is_pair = jnp.arange(losses.shape[1]) < self.units(batch)[:, None]
        weights = jnp.where(is_pair, weights[:, None], 0.0)
        total = lambda values: jnp.sum(weights * values)
        chosen, rejected = rewards[..., 0], rewards[..., 1]
        sums = (chosen > rejected, chosen - rejected, chosen, rejected)
        sums += (log_probs[..., 0], log_probs[..., 1])
        return total(losses), dict(zip(self.figures, map(total, sums), strict=True))

    def log_probs(self, params: dict, batch: dict, seen: jax.Array | None = None) -> jax.Array:
        """log p of each answer under a model, float32 [B, A / 2, 2]; 0 where there is no pair.

        Args:
          seen: see `LlavaModel`.
        """
        inputs, more = model_inputs(batch)
        hidden_states = self.model.apply({"params": params}, *inputs, **more | {"seen": seen})
        turns = batch["turn_ids"]
        targets = jnp.where(turns > 0, batch_targets(batch), IGNORE_INDEX)
        answers = 2 * (batch["segment_ids"] - 1) + turns - 1
        count = 2 * (turns.shape[1] // PAIR_TOKENS)
        sums = answer_log_probs(
            hidden_states,
            output_embedding(params["decoder"]),
            targets,
            jnp.clip(answers, 0, count - 1),
            count,
            self.chunk,
        )
        return sums.reshape(len(sums), -1, 2)
