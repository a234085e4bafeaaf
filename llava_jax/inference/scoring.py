"""Whole sequences in one pass: logits, log probabilities of prompts, and what answers attend to.

B rows, T length of a row, F slots of the feature store, P features of a tile, D model size, V
vocabulary.
"""

import jax
import jax.numpy as jnp

from llava_jax.inference.sampling import Logprobs, logprobs_of
from llava_jax.models.llava import LlavaModel

POSITIONS_AT_A_TIME = 16  # the logits of a whole prompt would not fit
TRACED = 64  # tokens of an answer that a pass traces


def prompt_logprobs(
    model: LlavaModel,
    params: dict,
    store: jax.Array,
    input_ids: jax.Array,
    feature_ids: jax.Array,
    feature_weights: jax.Array | None,
    targets: jax.Array,
) -> Logprobs:
    """Log probabilities [1, T] of targets int32[1, T], which follow the tokens of a prompt.

    The prompt int32[1, T] may be padded on the right; `feature_ids` and `feature_weights` as in
    `Prompts`, of one row.
    """

    def read(model: LlavaModel):
        positions = jnp.arange(input_ids.shape[1])[None]
        embeddings = _embed(model, store, input_ids, feature_ids, feature_weights)
        return model.decoder(embeddings, positions, jnp.ones_like(positions))

    hidden = model.apply({"params": params}, method=read)
    pieces = (-1, POSITIONS_AT_A_TIME, hidden.shape[-1])

    def some(piece):
        hidden, targets = piece
        logits = model.apply({"params": params}, hidden, method=LlavaModel.attend)
        return logprobs_of(logits, jnp.maximum(targets, 0))

    logprobs = jax.lax.map(some, (hidden.reshape(pieces), targets.reshape(pieces[:2])))
    return jax.tree.map(lambda x: x.reshape(*targets.shape, *x.shape[2:]), logprobs)


def trace(
    model: LlavaModel,
    params: dict,
    store: jax.Array,
    input_ids: jax.Array,
    feature_ids: jax.Array,
    feature_weights: jax.Array | None,
    first: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Log probabilities of TRACED tokens from `first` on, and where each was looked for.

    Arguments as in `prompt_logprobs`; the tokens may reach into the padding, and mean nothing
    there.

    Returns:
      float32[TRACED], the log probability of each token after those in front of it, and
      float32[TRACED, T], how the token in front of it, from which it is predicted, attends to each
      token; see `Decoder.attended`.
    """
    last = input_ids.shape[1] - 1
    rows = jnp.clip(first - 1 + jnp.arange(TRACED), 0, last - 1)

    def read(model: LlavaModel):
        embeddings = _embed(model, store, input_ids, feature_ids, feature_weights)
        return model.decoder.attended(embeddings, rows)

    hidden, shares = model.apply({"params": params}, method=read)
    logits = model.apply({"params": params}, hidden[0, rows], method=LlavaModel.attend)
    chosen = jnp.maximum(input_ids[0, rows + 1], 0)
    return logprobs_of(logits, chosen).chosen, shares[0]


def _embed(model: LlavaModel, store, input_ids, feature_ids, feature_weights) -> jax.Array:
    """[1, T, D] of a prompt int32[1, T] whose features are in the store."""
    features = store.reshape(1, -1, store.shape[-1])  # [1, F * P, D]
    return model.embed(input_ids, features, feature_ids, feature_weights=feature_weights)


def all_logits(
    model: LlavaModel,
    params: dict,
    input_ids: jax.Array,
    tiles: jax.Array | None,
    feature_ids: jax.Array,
    feature_weights: jax.Array | None,
    attention_mask: jax.Array,
) -> jax.Array:
    """Float32 logits [B, T, V] of whole sequences, padded on either side.

    Args:
      input_ids, feature_ids, feature_weights: as in `LlavaModel.embed`; features are counted over
        the tiles of all rows.
      tiles: uint8 or normalised [N, S, S, 3], or None.
      attention_mask: int[B, T], 1 for real tokens.
    """
    positions = jnp.maximum(jnp.cumsum(attention_mask, axis=1) - 1, 0)

    def read(model: LlavaModel):
        features = None
        if tiles is not None:
            features = model.encode_images(tiles)
            features = features.reshape(-1, features.shape[-1])  # [N * P, D]
        # As one row, which all tiles are of.
        ids, weights = feature_ids.reshape(-1, *feature_ids.shape[2:]), feature_weights
        weights = None if weights is None else weights.reshape(ids.shape)
        embeddings = model.embed(input_ids.reshape(-1), features, ids, feature_weights=weights)
        embeddings = embeddings.reshape(*input_ids.shape, -1)  # [B, T, D]
        return model.decoder(embeddings, positions, attention_mask)

    hidden = model.apply({"params": params}, method=read)
    return model.apply({"params": params}, hidden, method=LlavaModel.attend)
