"""Whole sequences in one pass: their logits, and the log probabilities of prompts.

B rows, T length of a row, F slots of the feature store, P features of a tile, V vocabulary.
"""

import jax
import jax.numpy as jnp

from llava_jax.inference.sampling import Logprobs, logprobs_of
from llava_jax.models.llava import LlavaModel

POSITIONS_AT_A_TIME = 16  # the logits of a whole prompt would not fit


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
        features = store.reshape(1, -1, store.shape[-1])  # [1, F * P, D]
        weights = feature_weights
        embeddings = model.embed(input_ids, features, feature_ids, feature_weights=weights)
        return model.decoder(embeddings, positions, jnp.ones_like(positions))

    hidden = model.apply({"params": params}, method=read)
    pieces = (-1, POSITIONS_AT_A_TIME, hidden.shape[-1])

    def some(piece):
        hidden, targets = piece
        logits = model.apply({"params": params}, hidden, method=LlavaModel.attend)
        return logprobs_of(logits, jnp.maximum(targets, 0))

    logprobs = jax.lax.map(some, (hidden.reshape(pieces), targets.reshape(pieces[:2])))
    return jax.tree.map(lambda x: x.reshape(*targets.shape, *x.shape[2:]), logprobs)


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
