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
from llava_jax.text.conversation import IMAGE_TOKEN, VIDEO_TOKEN, Turn
from llava_jax.text.processor_prompt import processor_placeholder
from llava_jax.text.templates import Template, get_template, render
from llava_jax.text.tokenization import SegmentTokenizer
from llava_jax.text.tokenizer import load_tokenizer
from llava_jax.weights.checksums import CHECKSUMS_FILE
from llava_jax.weights.families import decoder_to_hf, encoder_to_hf
from llava_jax.weights.formats.packed import PACKING_FILES, PACKING_KEY
from llava_jax.weights.llava_classes import (
    LLAVA,
    PINPOINTS,
    LlavaClass,
    class_of,
    is_hugging_face,
)
from llava_jax.weights.own_keys import OWN_KEY, in_words, own_keys
from llava_jax.weights.read.fields import read_json
from llava_jax.weights.read.huggingface import llava_class, llava_config
from llava_jax.weights.read.llava_folder import LlavaFolder
from llava_jax.weights.read.prompt_words import PromptWords
from llava_jax.weights.read.tiled_pictures import frame_settings
from llava_jax.weights.write.processor import (
    FRAMES,
    PICTURES,
    PROCESSOR,
    picture_keys,
    pinpoints,
    preprocessor_config_json,
    processor_config_json,
    video_preprocessor_config_json,
    write_processor,
)

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
      video_token: the text of a video's, None of classes that take none.
      ids: bos_token_id, eos_token_id and pad_token_id, as far as it has them.
      settings: contents of tokenizer_config.json.
      source: the folder it came from.
    """

    core: Tokenizer
    image_token: str
    video_token: str | None
    ids: dict[str, int]
    settings: dict
    source: Path

    @property
    def image_id(self) -> int:
        return self.core.token_to_id(self.image_token)

    @property
    def video_id(self) -> int | None:
        return self.video_token and self.core.token_to_id(self.video_token)

    def write(self, folder: Path) -> None:
        """Writes tokenizer.json, tokenizer_config.json and chat_template.jinja."""
        for name in COPIED_FILES:
            if (self.source / name).is_file():
                shutil.copyfile(self.source / name, folder / name)
        self.core.save(str(folder / "tokenizer.json"))
        write_json(folder / "tokenizer_config.json", self.settings)
        (folder / "chat_template.jinja").write_text(self.settings["chat_template"])


def is_copied(checkpoint: LlavaFolder) -> bool:
    """Whether a folder's config and processor are of the class that its model is written as."""
    path = checkpoint.folder / "config.json"
    if not path.is_file() or (checkpoint.folder / "adapter_config.json").exists():
        return False
    values = read_json(path)
    if not is_hugging_face(values):
        return False
    return llava_class(values, str(path)) is class_of(checkpoint.config.image)


def prepare_tokenizer(
    source: Path,
    jinja: str,
    vocab_size: int,
    added_tokens: Sequence[str] = (),
    image_token_id: int = IMAGE_TOKEN_ID,
    llava: LlavaClass = LLAVA,
    video_token_id: int | None = None,
) -> HFTokenizer:
    """The tokenizer of a folder; `<image>` is added if it is not a token yet, and `<video>`.

    Args:
      jinja: the chat template.
      vocab_size, added_tokens: see `load_tokenizer`.
      image_token_id, video_token_id: the model's placeholders, which are kept if they are tokens.
      llava: the class of the model in transformers.
    """
    tokenizer = load_tokenizer(source, vocab_size, added_tokens)
    core = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    core.no_padding()
    core.no_truncation()
    image_token = processor_placeholder(tokenizer, jinja, image_token_id) or IMAGE_TOKEN
    video_token = None
    if llava.video:
        held = None if video_token_id is None else core.id_to_token(video_token_id)
        video_token = held or VIDEO_TOKEN
    added = [token for token in (image_token, video_token) if token]
    core.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in added])
    path = source / "tokenizer_config.json"
    settings = read_json(path) if path.exists() else {}
    names = {name: getattr(tokenizer, name) for name in ("bos_token", "eos_token", "unk_token")}
    # As the original LLaVA: padding is masked, so any token will do.
    names["pad_token"] = tokenizer.pad_token or tokenizer.unk_token or tokenizer.eos_token
    names = {name: token for name, token in names.items() if token is not None}
    # tokenizer.json must be read as it is: transformers 5 chooses the class by config.json too, and
    # Llama's class builds another tokenizer of the same file.
    plain = type(tokenizer).__name__ == "TokenizersBackend"
    settings = _with_known_class(settings)
    if plain or settings.get("tokenizer_class") is None:
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    settings |= names | {
        "padding_side": "left",
        "processor_class": f"{llava.name}Processor",
        "chat_template": jinja,
    }
    ids = {f"{name}_id": core.token_to_id(t) for name, t in names.items() if name != "unk_token"}
    return HFTokenizer(core, image_token, video_token, ids, settings, source)


def _with_known_class(settings: dict) -> dict:
    """tokenizer_config.json with the name that transformers 4 has for the plain class of 5."""
    plain = settings.get("tokenizer_class") == "TokenizersBackend"
    return settings | ({"tokenizer_class": "PreTrainedTokenizerFast"} if plain else {})


def jinja_of(words: PromptWords, config: LlavaConfig) -> str:
    """The chat template of a model's words."""
    videos = config.image.video is not None
    return words.chat_template or chat_template(get_template(words.template), videos)


def with_placeholders(
    config: LlavaConfig, image_id: int, video_id: int | None = None
) -> LlavaConfig:
    """The config with these ids for images and videos, and a vocabulary with rows for them.

    A model that takes no videos has no id for them, only the row that its class has one for.
    """
    rows, last = config.decoder.vocab_size, max(image_id, video_id or 0)
    if last >= rows:
        rows = -(-(last + 1) // PADDED_TO) * PADDED_TO
    decoder = dataclasses.replace(config.decoder, vocab_size=rows)
    video_id = video_id if config.image.video else None
    return dataclasses.replace(
        config, decoder=decoder, image_token_id=image_id, video_token_id=video_id
    )


def fault(config: LlavaConfig) -> str | None:
    """Why no LLaVA class of transformers can express a model, or None."""
    if config.projector != "mlp2x_gelu":
        return f"its projector is {config.projector}, and transformers has mlp2x_gelu only"
    if config.use_im_start_end:
        return "it marks images with <im_start> and <im_end>, which transformers does not"
    image = config.image
    if image.mode not in ("square", "pad", "resize", "anyres"):
        return f"transformers does not have the image mode {image.mode}"
    if image.tiling is None:
        return "it takes videos without pictures in tiles" if image.video else None
    if image.tiling.merge != "spatial_unpad":
        return f"transformers does not merge tiles as {image.tiling.merge}"
    if image.size != config.vision.image_size:
        return f"its tiles have {image.size} pixels, and its encoder {config.vision.image_size}"
    return None


def config_json(
    config: LlavaConfig, ids: dict[str, int], dtype: str, video_id: int | None = None
) -> dict:
    """config.json of a model, the inverse of `read.huggingface.llava_config`.

    Args:
      ids: bos_token_id, eos_token_id, pad_token_id.
      dtype: of the tensors.
      video_id: of a class that takes videos, the token of one.
    """
    layer, llava = config.feature_layer, class_of(config.image)
    return {
        "architectures": [llava.class_name],
        "model_type": llava.model_type,
        "image_token_index": config.image_token_id,
        **({} if video_id is None else {"video_token_index": video_id}),
        "ignore_index": -100,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": config.projector_bias,
        "vision_feature_layer": layer if isinstance(layer, int) else list(layer),
        **picture_keys(config),
        "tie_word_embeddings": config.decoder.tie_word_embeddings,
        **({"pad_token_id": ids["pad_token_id"]} if "pad_token_id" in ids else {}),
        "text_config": decoder_to_hf(config.decoder) | ids | dtype_keys(dtype),
        "vision_config": encoder_to_hf(config.vision) | dtype_keys(dtype),
        **dtype_keys(dtype),
    }


def dtype_keys(name: str) -> dict:
    """The keys of config.json for the dtype of the tensors."""
    return {"dtype": name, "torch_dtype": name}  # of transformers 5 and of 4


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
    of an image; that follows from the model, so it is written anew. So is how a picture is prepared
    if another mode was asked for.

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
    jinja = jinja_of(words, config)
    dropped = (OWN_KEY, PACKING_KEY)  # kernels are written as floats
    model = {k: v for k, v in read_json(source / "config.json").items() if k not in dropped}
    if isinstance(model.get("text_config"), dict):
        model["text_config"].pop(PACKING_KEY, None)
    other_mode = llava_config(source, model)[0].image.mode != config.image.mode

    def write(folder: Path) -> None:
        for path in source.iterdir():
            of_weights = path.name in (CHECKSUMS_FILE, *PACKING_FILES)
            of_weights |= path.name.endswith(".index.json")
            if path.suffix in (".json", ".jinja", ".model", ".txt") and not of_weights:
                shutil.copyfile(path, folder / path.name)
        if (source / "chat_templates").is_dir():
            shutil.copytree(source / "chat_templates", folder / "chat_templates")
        grids = {PINPOINTS: pinpoints(config.image)} if config.image.tiling else {}
        write_json(folder / "config.json", model | grids | dtype_keys(dtype))
        settings = folder / "tokenizer_config.json"
        if settings.exists():
            write_json(settings, _with_known_class(read_json(settings)))
        processor = folder / PROCESSOR
        values = read_json(processor) if processor.exists() else {}
        if reworded or not words.guessed:  # in the one file that transformers reads for all
            values.pop("chat_template", None)
            (folder / "chat_template.json").unlink(missing_ok=True)
            (folder / "chat_template.jinja").write_text(jinja, encoding="utf-8")
        if other_mode:
            values.pop("image_processor", None)
        elif isinstance(values.get("image_processor"), dict):
            values["image_processor"] |= grids
        write_json(processor, values | processor_config_json(config, image_token or IMAGE_TOKEN))
        pictures = folder / PICTURES
        values = read_json(pictures) if pictures.exists() else {}
        if other_mode or not values.keys() & {"image_processor_type", "feature_extractor_type"}:
            values = preprocessor_config_json(config)
        write_json(pictures, values | grids)
        if config.image.video and frame_settings(folder) is None:
            write_json(folder / FRAMES, video_preprocessor_config_json(config))
        add_own_keys(folder, config, log)
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
    log: Callable[[str], None],
) -> None:
    """Writes every file of the folder but the weights and their checksums.

    Args:
      vision_use_head: whether SigLIP's pooling head, which LLaVA never uses, is in the weights.
      log: is given what transformers will do otherwise.
    """
    values = config_json(config, tokenizer.ids, dtype, tokenizer.video_id) | words.box_keys
    if values["vision_config"]["model_type"] == "siglip_vision_model":
        values["vision_config"]["vision_use_head"] = vision_use_head
    write_json(folder / "config.json", values)
    write_processor(folder, config, tokenizer.image_token)
    add_own_keys(folder, config, log)
    write_json(folder / "generation_config.json", generation_config_json(tokenizer, words))
    tokenizer.write(folder)


def add_own_keys(folder: Path, config: LlavaConfig, log: Callable[[str], None]) -> None:
    """Adds to config.json what transformers' class cannot say of the pictures and videos."""
    own = own_keys(llava_config(folder)[0].image, config.image)
    if own:
        values = read_json(folder / "config.json")
        write_json(folder / "config.json", values | own)
        log(
            f"config.json keeps {in_words(own[OWN_KEY])} for llava-jax: transformers does not read "
            "that, and shows such pictures and videos in its own way"
        )
