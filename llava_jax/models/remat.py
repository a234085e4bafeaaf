"""Which activations of a block the backward pass keeps, and which it computes again."""

import flax.linen as nn
import jax

from llava_jax.models.flash_attention import ATTENTION_OUT
from llava_jax.models.linear import LINEAR_OUT

REMAT_POLICIES = {
    "none": None,  # keep every activation
    "linear": jax.checkpoint_policies.save_only_these_names(LINEAR_OUT, ATTENTION_OUT),
    "attention": jax.checkpoint_policies.save_only_these_names(ATTENTION_OUT),
    "full": jax.checkpoint_policies.nothing_saveable,
}


def rematted(block: type[nn.Module], policy: str) -> type[nn.Module]:
    """A block of a scan under a key of REMAT_POLICIES."""
    if policy == "none":
        return block
    return nn.remat(block, prevent_cse=False, policy=REMAT_POLICIES[policy])
