"""Prompts as a checkpoint's own Hugging Face processor makes them: its chat template, its ids.

Follows LlavaProcessor of transformers: the chat template renders messages whose content is a list
of images and texts, `<image>` in what comes out grows to an image's number of tokens, and the text
is tokenized whole. Our own templates are tokenized between images instead, as the original does.
"""

from collections.abc import Sequence

import numpy as np

from llava_jax.errors import LlavaError
from llava_jax.text.conversation import IMAGE_TOKEN, Turn

_ROLES = {"human": "user", "gpt": "assistant"}


def check_image_token(tokenizer, image_token_id: int) -> None:
    """Raises LlavaError where the tokenizer's id for `<image>` is not the model's."""
    found = tokenizer.get_vocab().get(IMAGE_TOKEN)
    if found != image_token_id:
        raise LlavaError(
            f"the tokenizer in {tokenizer.name_or_path} has {IMAGE_TOKEN} as {found} and "
            f"config.json has image_token_index={image_token_id}: they belong to different "
            "models."
        )


class ProcessorPrompt:
    """Turns -> token ids that wait for an answer.

    Args:
      tokenizer: a Hugging Face tokenizer.
      chat_template: Jinja text.
      image_token_id: the placeholder id, which must be the tokenizer's for `<image>`.
    """

    def __init__(self, tokenizer, chat_template: str, image_token_id: int):
        check_image_token(tokenizer, image_token_id)
        self.tokenizer, self.chat_template = tokenizer, chat_template
        self.image_token_id = image_token_id
        self.takes_lists = self._takes_lists()

    def __call__(self, turns: Sequence[Turn], image_lengths: Sequence[int] = ()) -> np.ndarray:
        """int32 [T]; `image_lengths`: tokens of each image, in the order of their `<image>`."""
        content = _content if self.takes_lists else lambda text: text
        messages = [{"role": _ROLES[turn.role], "content": content(turn.text)} for turn in turns]
        text = self._render(messages)
        images, found = sum(turn.text.count(IMAGE_TOKEN) for turn in turns), text.count(IMAGE_TOKEN)
        if found != images:
            raise LlavaError(
                f"the chat template of {self.tokenizer.name_or_path} makes {found} {IMAGE_TOKEN} "
                f"of {images} image(s): it is not of a LLaVA."
            )
        begun = self.tokenizer.bos_token is not None and text.startswith(self.tokenizer.bos_token)
        ids = np.array(self.tokenizer(text, add_special_tokens=not begun)["input_ids"], np.int32)
        repeats = np.ones(len(ids), int)
        repeats[ids == self.image_token_id] = image_lengths
        return np.repeat(ids, repeats)

    def _takes_lists(self) -> bool:
        """False for a template written for texts alone."""
        probe = [{"role": "user", "content": _content(f"{IMAGE_TOKEN}\nx")}]
        try:
            return self._render(probe).count(IMAGE_TOKEN) == 1
        except LlavaError:
            return False

    def _render(self, messages: list[dict]) -> str:
        try:
            return self.tokenizer.apply_chat_template(
                messages,
                chat_template=self.chat_template,
                tokenize=False,
                add_generation_prompt=True,
            )
        except Exception as error:  # a template may raise anything
            raise LlavaError(
                f"the chat template of {self.tokenizer.name_or_path} cannot render this "
                f"conversation: {str(error).splitlines()[0]}"
            ) from error


def _content(text: str) -> list[dict]:
    """A text as a list of images and texts; a template writes its own line break after an image."""
    content: list[dict] = []
    for i, piece in enumerate(text.split(IMAGE_TOKEN)):
        if i:
            content.append({"type": "image"})
            piece = piece.removeprefix("\n")
        if piece:
            content.append({"type": "text", "text": piece})
    return content
