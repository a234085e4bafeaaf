"""Training steps of transformers' LLaVAs with PyTorch: the other side of `bench.train_step`."""

import numpy as np
from ml_collections import ConfigDict

from llava_jax.models.llava import LlavaConfig
from llava_jax.training import recipe


def huggingface_config(shape: LlavaConfig):
    """The transformers config of our shape; its image token is an id of its own, the last."""
    import transformers

    v, d = shape.vision, shape.decoder
    common = dict(
        hidden_size=v.hidden_size,
        num_hidden_layers=v.num_layers,
        num_attention_heads=v.num_heads,
        patch_size=v.patch_size,
        image_size=v.image_size,
        hidden_act=v.hidden_act,
        layer_norm_eps=v.layer_norm_eps,
    )
    if v.layer_scale:
        vision = transformers.Dinov2Config(**common, mlp_ratio=v.intermediate_size // v.hidden_size)
    else:
        kind = transformers.CLIPVisionConfig if v.class_token else transformers.SiglipVisionConfig
        more = {} if v.class_token else {"vision_use_head": False}
        vision = kind(**common, intermediate_size=v.intermediate_size, **more)
    kind = transformers.Qwen2Config if d.qkv_bias else transformers.LlamaConfig
    text = kind(
        vocab_size=d.vocab_size + 1,
        hidden_size=d.hidden_size,
        intermediate_size=d.intermediate_size,
        num_hidden_layers=d.num_layers,
        num_attention_heads=d.num_heads,
        num_key_value_heads=d.num_kv_heads,
        head_dim=d.head_dim,
        rms_norm_eps=d.rms_norm_eps,
        rope_theta=d.rope_theta,
        tie_word_embeddings=d.tie_word_embeddings,
        max_position_embeddings=d.max_position_embeddings,
    )
    tiling, more = shape.image.tiling, {}
    if tiling:
        side = shape.image.size
        more["image_grid_pinpoints"] = [[r * side, c * side] for c, r in tiling.grids]
        more["vision_feature_select_strategy"] = "default" if v.class_token else "full"
    if tiling and tiling.cap:
        kind = transformers.LlavaOnevisionConfig
        more |= {"vision_aspect_ratio": f"anyres_max_{tiling.cap}"}
        more |= {"video_token_index": d.vocab_size + 1}
    else:
        kind = transformers.LlavaNextConfig if tiling else transformers.LlavaConfig
    return kind(
        vision_config=vision,
        text_config=text,
        image_token_index=d.vocab_size,
        vision_feature_layer=shape.feature_layer,
        projector_hidden_act="gelu",
        tie_word_embeddings=d.tie_word_embeddings,
        **more,
    )


def class_of(config):
    """The class of transformers that a config of `huggingface_config` is of."""
    import transformers

    return getattr(
        transformers, type(config).__name__.replace("Config", "ForConditionalGeneration")
    )


def make_huggingface(config: ConfigDict, shape: LlavaConfig, projector: dict, device: str):
    """The model of transformers, with the parameters that the recipe names, if any."""
    import torch
    import transformers

    values = huggingface_config(shape)
    with torch.device(device):
        model = class_of(values)._from_config(
            values, attn_implementation="sdpa", dtype=torch.float32
        )
    if not config.init.vision:
        return model
    inner = model.model
    vision = transformers.AutoModel.from_pretrained(config.init.vision)
    missing, extra = inner.vision_tower.load_state_dict(vision.state_dict(), strict=False)
    assert set(missing) <= {"embeddings.mask_token"} and not extra
    decoder = transformers.AutoModelForCausalLM.from_pretrained(config.init.decoder)
    rows = shape.decoder.vocab_size
    with torch.no_grad():
        for name, tensor in decoder.model.state_dict().items():
            inner.language_model.get_parameter(name)[: len(tensor)] = tensor
        if not shape.decoder.tie_word_embeddings:
            model.lm_head.weight[:rows] = decoder.lm_head.weight
        for i, layer in enumerate(("linear_1", "linear_2")):
            ours = projector[f"linear_{i}"]
            theirs = getattr(inner.multi_modal_projector, layer)
            theirs.weight.copy_(torch.from_numpy(ours["kernel"].T.copy()))
            theirs.bias.copy_(torch.from_numpy(ours["bias"].copy()))
        if "newline" in projector:
            inner.image_newline.copy_(torch.from_numpy(projector["newline"].copy()))
    return model


def prepare(batch: dict, shape: LlavaConfig, device: str) -> dict:
    """One of our packed batches as the model of transformers takes it."""
    import torch

    ids, segments = batch["input_ids"], batch["segment_ids"]
    allowed = np.tril(segments[:, :, None] == segments[:, None, :])
    last = batch["feature_ids"].reshape(len(ids), -1).max(1)
    used = last // shape.tokens_per_tile + 1
    images = np.concatenate([row[:n] for row, n in zip(batch["tiles"], used, strict=True)])
    pixels = (images / np.float32(255) - shape.image.mean) / shape.image.std
    arrays = {
        "input_ids": np.where(ids == shape.image_token_id, shape.decoder.vocab_size, ids),
        "labels": batch["labels"],
        "position_ids": batch["position_ids"],
        "pixel_values": pixels.transpose(0, 3, 1, 2).astype(np.float32),
    }
    if (segments != 1).any():  # whole rows of one conversation need no mask: flash attention
        arrays["attention_mask"] = allowed[:, None]
    tensors = {name: torch.from_numpy(np.ascontiguousarray(a)) for name, a in arrays.items()}
    if "sizes" in batch:
        sizes = batch["sizes"]
        tensors["image_sizes"] = torch.from_numpy(sizes[:, 1::-1].copy())  # height, width
        if shape.image.tiling.one_view:
            tensors["batch_num_images"] = torch.from_numpy(
                np.unique(sizes[:, 2], return_counts=True)[1]
            )
    for name in ("input_ids", "labels", "position_ids"):
        tensors[name] = tensors[name].long()
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def start_theirs(config: ConfigDict, batches: list[dict], projector: dict, threads: int):
    """The same as `start_ours`, with transformers and PyTorch."""
    import torch

    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)  # else its steps slow down many times over
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape, o = recipe.model_config(config), config.optimizer
    model = make_huggingface(config, shape, projector, device).train()
    autocast = config.model.dtype != "float32"
    if autocast and o.moments_dtype != "float32":  # parameters and state in 16 bits, to fit
        model, autocast = model.to(torch.bfloat16), False
    names = {
        "vision": "model.vision_tower",
        "projector": ("model.multi_modal_projector", "model.image_newline"),
        "decoder": ("model.language_model", "lm_head"),
    }
    groups = []
    model.requires_grad_(False)
    for component, rate in config.trainable.items():
        chosen = [p for n, p in model.named_parameters() if n.startswith(names[component])]
        groups.append({"params": [p.requires_grad_(True) for p in chosen], "lr": rate})
    trained = [p for group in groups for p in group["params"]]
    optimizer = torch.optim.AdamW(
        groups, betas=(o.b1, o.b2), eps=o.eps, weight_decay=o.weight_decay, fused=True
    )
    if config.model.remat_policy in ("attention", "full"):
        model.gradient_checkpointing_enable({"use_reentrant": False})
    prepared = [prepare(batch, shape, device) for batch in batches]
    for arrays in prepared:
        arrays["pixel_values"] = arrays["pixel_values"].to(model.dtype)

    def run(i: int) -> float:
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            loss = model(**prepared[i % len(prepared)]).loss
        loss.backward()
        if o.clip_norm:
            torch.nn.utils.clip_grad_norm_(trained, o.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return run, lambda: torch.cuda.max_memory_allocated() if device == "cuda" else None
