"""The files of a Hugging Face LLaVA besides its weights: config, processor, tokenizer.

Names and keys are those of the llava-hf checkpoints, which transformers, vLLM and llama.cpp read.
"""

import dataclasses
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from tokenizers import AddedToken, Tokenizer

from llava_jax.files import write_json
from llava_jax.models.images import IMAGE_TOKEN_ID
from llava_jax.models.llava import LlavaConfig
from llava_jax.text.chat_template import chat_template
from llava_jax.text.conversation import IMAGE_TOKEN, Turn
from llava_jax.text.processor_prompt import processor_placeholder
from llava_jax.text.templates import Template, get_template, render
from llava_jax.text.tokenization import SegmentTokenizer
from llava_jax.text.tokenizer import load_tokenizer
from llava_jax.weights.checksums import CHECKSUMS_FILE
from llava_jax.weights.families import decoder_to_hf, encoder_to_hf
from llava_jax.weights.read.fields import read_json
from llava_jax.weights.read.image_settings import BICUBIC
from llava_jax.weights.read.llava_folder import LlavaFolder
from llava_jax.weights.read.prompt_words import PromptWords

PADDED_TO = 64  # rows of a grown vocabulary, as in the llava-hf checkpoints
COPIED_FILES = (  # of a tokenizer, whichever are there
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)


@dataclasses.dataclass(frozen=True)
class HFTokenizer:
    """A tokenizer made ready for a Hugging Face LLaVA.

    Attributes:
      core: its Rust core, with a token for an image.
      image_token: the text of that token.
      ids: bos_token_id, eos_token_id and pad_token_id, as far as it has them.
      settings: contents of tokenizer_config.json.
      source: the folder it came from.
    """

    core: Tokenizer
    image_token: str
    ids: dict[str, int]
    settings: dict
    source: Path

    @property
    def image_id(self) -> int:
        return self.core.token_to_id(self.image_token)

    def write(self, folder: Path) -> None:
        """Writes tokenizer.json, tokenizer_config.json and chat_template.jinja."""
        for name in COPIED_FILES:
            if (self.source / name).is_file():
                shutil.copyfile(self.source / name, folder / name)
        self.core.save(str(folder / "tokenizer.json"))
        write_json(folder / "tokenizer_config.json", self.settings)
        (folder / "chat_template.jinja").write_text(self.settings["chat_template"])


def is_hf_folder(folder: Path) -> bool:
    """True for a whole LLaVA of transformers."""
    path = folder / "config.json"
    adapter = (folder / "adapter_config.json").exists()
    return path.is_file() and not adapter and "text_config" in read_json(path)


def prepare_tokenizer(
    source: Path,
    jinja: str,
    vocab_size: int,
    added_tokens: Sequence[str] = (),
    image_token_id: int = IMAGE_TOKEN_ID,
) -> HFTokenizer:
    """The tokenizer of a folder; `<image>` is added if it is not a token yet.

    Args:
      jinja: the chat template.
      vocab_size, added_tokens: see `load_tokenizer`.
      image_token_id: the model's placeholder, which is kept if it is a token.
    """
    tokenizer = load_tokenizer(source, vocab_size, added_tokens)
    core = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    core.no_padding()
    core.no_truncation()
    image_token = processor_placeholder(tokenizer, jinja, image_token_id) or IMAGE_TOKEN
    core.add_special_tokens([AddedToken(image_token, normalized=False, special=True)])
    path = source / "tokenizer_config.json"
    settings = read_json(path) if path.exists() else {}
    names = {name: getattr(tokenizer, name) for name in ("bos_token", "eos_token", "unk_token")}
    # As the original LLaVA: padding is masked, so any token will do.
    names["pad_token"] = tokenizer.pad_token or tokenizer.unk_token or tokenizer.eos_token
    names = {name: token for name, token in names.items() if token is not None}
    # tokenizer.json must be read as it is: transformers 5 chooses the class by config.json too, and
    # Llama's class builds another tokenizer of the same file.
    plain = type(tokenizer).__name__ == "TokenizersBackend"  # a name unknown before 5
    if plain or settings.get("tokenizer_class") in (None, "TokenizersBackend"):
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    settings |= names | {
        "padding_side": "left",
        "processor_class": "LlavaProcessor",
        "chat_template": jinja,
    }
    ids = {f"{name}_id": core.token_to_id(t) for name, t in names.items() if name != "unk_token"}
    return HFTokenizer(core, image_token, ids, settings, source)


def with_image_token(config: LlavaConfig, image_id: int) -> LlavaConfig:
    """The config with `image_id` for images, and a vocabulary that has a row for it."""
    rows = config.decoder.vocab_size
    if image_id >= rows:
        rows = -(-(image_id + 1) // PADDED_TO) * PADDED_TO
    decoder = dataclasses.replace(config.decoder, vocab_size=rows)
    return dataclasses.replace(config, decoder=decoder, image_token_id=image_id)


def fault(config: LlavaConfig) -> str | None:
    """Why transformers' LlavaForConditionalGeneration cannot express a model, or None."""
    if config.projector != "mlp2x_gelu":
        return f"its projector is {config.projector}, and transformers has mlp2x_gelu only"
    if config.use_im_start_end:
        return "it marks images with <im_start> and <im_end>, which transformers does not"
    if config.image.mode not in ("square", "pad", "resize"):
        return f"transformers does not have the image mode {config.image.mode}"
    return None


def config_json(config: LlavaConfig, ids: dict[str, int], dtype: str) -> dict:
    """config.json of a model, the inverse of `read.huggingface.llava_config`.

    Args:
      ids: bos_token_id, eos_token_id, pad_token_id.
      dtype: of the tensors.
    """
    layer = config.feature_layer
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_token_index": config.image_token_id,
        "image_seq_length": config.tokens_per_tile,
        "ignore_index": -100,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": config.projector_bias,
        "vision_feature_layer": layer if isinstance(layer, int) else list(layer),
        "vision_feature_select_strategy": _strategy(config),
        "tie_word_embeddings": config.decoder.tie_word_embeddings,
        **({"pad_token_id": ids["pad_token_id"]} if "pad_token_id" in ids else {}),
        "text_config": decoder_to_hf(config.decoder) | ids | dtype_keys(dtype),
        "vision_config": encoder_to_hf(config.vision) | dtype_keys(dtype),
        **dtype_keys(dtype),
    }


def _strategy(config: LlavaConfig) -> str:
    drops = config.drop_first_patch or (config.vision.class_token and not config.keep_class_token)
    return "default" if drops else "full"


def dtype_keys(name: str) -> dict:
    """The keys of config.json for the dtype of the tensors."""
    return {"dtype": name, "torch_dtype": name}  # of transformers 5 and of 4


def preprocessor_config_json(config: LlavaConfig) -> dict:
    """preprocessor_config.json: our picture mode, in the keys of transformers."""
    side = config.image.size
    square, edge = {"height": side, "width": side}, {"shortest_edge": side}
    kinds = {
        "pad": ("LlavaImageProcessor", edge, {"do_pad": True}),
        "square": ("CLIPImageProcessor", edge, {}),
        "resize": ("SiglipImageProcessor", square, {}),
    }
    name, size, more = kinds[config.image.mode]
    if config.image.mode != "resize":
        more = more | {"do_center_crop": True, "crop_size": square}
    return {
        "image_processor_type": name,
        "processor_class": "LlavaProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": size,
        "resample": BICUBIC,
        **more,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(config.image.mean),
        "image_std": list(config.image.std),
    }


def processor_config_json(config: LlavaConfig, image_token: str = IMAGE_TOKEN) -> dict:
    """processor_config.json: what it takes to count the tokens of an image."""
    return {
        "processor_class": "LlavaProcessor",
        "image_token": image_token,
        "patch_size": config.vision.patch_size,
        "num_additional_image_tokens": int(config.vision.class_token),
        "vision_feature_select_strategy": _strategy(config),
    }


def generation_config_json(tokenizer: HFTokenizer, words: PromptWords) -> dict:
    """generation_config.json: an answer ends at the end-of-text token, the template's own end, or
    another that the model's folder named."""
    stops = {tokenizer.core.token_to_id(stop) for stop in get_template(words.template).stop}
    stops |= {*words.stop_token_ids, tokenizer.ids.get("eos_token_id")}
    stops = sorted(stops - {None})
    return tokenizer.ids | {"eos_token_id": stops, "do_sample": False}


def warn_of_other_tokens(
    tokenizer: HFTokenizer, template: Template, log: Callable[[str], None]
) -> None:
    """Warns if transformers will tokenize a conversation otherwise than training did.

    Training tokenizes each stretch of text between images on its own, and transformers does not.
    """
    turns = [Turn("human", f"{IMAGE_TOKEN}\nWhat is this?"), Turn("gpt", "A dog.")]
    segments = render(template, turns)
    trained = SegmentTokenizer(load_tokenizer(tokenizer.source), tokenizer.image_id)
    theirs = tokenizer.core.encode("".join(segment.text for segment in segments)).ids
    if theirs != trained(segments, [1]).input_ids.tolist():
        log(
            f"warning: next to an image the tokenizer of {tokenizer.source} cuts text into other "
            "tokens in transformers than in training: answers may differ a little"
        )


def copied_side_files(
    checkpoint: LlavaFolder,
    words: PromptWords,
    reworded: bool,
    dtype: str,
    log: Callable[[str], None],
) -> Callable[[Path], None]:
    """A function that writes the files besides the weights: copies of the folder's, completed.

    transformers 4.36 to 4.45 saved processors without what later versions need to count the tokens
    of an image; that follows from the model, so it is written anew.

    Args:
      reworded: whether `words` are not the folder's own, but were asked for.
      log: is given a warning.
    Raises:
      LlavaError: there is no tokenizer, or it belongs to another model.
    """
    source, config = checkpoint.folder, checkpoint.config
    tokenizer = load_tokenizer(checkpoint.needed_tokenizer(), config.decoder.vocab_size)
    image_token = processor_placeholder(tokenizer, words.chat_template or "", config.image_token_id)
    if image_token is None:
        log(
            f"warning: the tokenizer in {source} has no token {config.image_token_id}, which "
            "config.json gives as image_token_index: transformers cannot put an image into a prompt"
        )
    jinja = words.chat_template or chat_template(get_template(words.template))

    def write(folder: Path) -> None:
        for path in source.iterdir():
            of_weights = path.name == CHECKSUMS_FILE or path.name.endswith(".index.json")
            if path.suffix in (".json", ".jinja", ".model", ".txt") and not of_weights:
                shutil.copyfile(path, folder / path.name)
        if (source / "chat_templates").is_dir():
            shutil.copytree(source / "chat_templates", folder / "chat_templates")
        values = read_json(source / "config.json")
        write_json(folder / "config.json", values | dtype_keys(dtype))
        processor = folder / "processor_config.json"
        values = read_json(processor) if processor.exists() else {}
        if reworded or not words.guessed:  # in the one file that transformers reads for all
            values.pop("chat_template", None)
            (folder / "chat_template.json").unlink(missing_ok=True)
            (folder / "chat_template.jinja").write_text(jinja, encoding="utf-8")
        write_json(processor, values | processor_config_json(config, image_token or IMAGE_TOKEN))
        pictures = folder / "preprocessor_config.json"
        values = read_json(pictures) if pictures.exists() else {}
        if not values.keys() & {"image_processor_type", "feature_extractor_type"}:
            write_json(pictures, preprocessor_config_json(config))
        generation = folder / "generation_config.json"
        if words.stop_token_ids and not generation.exists():
            write_json(generation, {"eos_token_id": list(words.stop_token_ids)})

    return write


def write_side_files(
    folder: Path,
    config: LlavaConfig,
    tokenizer: HFTokenizer,
    words: PromptWords,
    dtype: str,
    vision_use_head: bool,
) -> None:
    """Writes every file of the folder but the weights and their checksums.

    vision_use_head: whether SigLIP's pooling head, which LLaVA never uses, is in the weights.
    """
    values = config_json(config, tokenizer.ids, dtype)
    if values["vision_config"]["model_type"] == "siglip_vision_model":
        values["vision_config"]["vision_use_head"] = vision_use_head
    write_json(folder / "config.json", values)
    write_json(folder / "preprocessor_config.json", preprocessor_config_json(config))
    processor = processor_config_json(config, tokenizer.image_token)
    write_json(folder / "processor_config.json", processor)
    write_json(folder / "generation_config.json", generation_config_json(tokenizer, words))
    tokenizer.write(folder)
