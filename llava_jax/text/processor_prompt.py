"""Prompts as a checkpoint's own Hugging Face processor makes them: its chat template, its ids.

Follows LlavaProcessor of transformers: the chat template renders messages whose content is a list
of images and texts, the image token in the result grows to an image's number of tokens, and the
text is tokenized whole. Our own templates are tokenized between images, as the original does.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from llava_jax.errors import LlavaError
from llava_jax.text.conversation import BREAK, IMAGE_TOKEN, MARKS, VIDEO_TOKEN, Turn, images_in
from llava_jax.text.templates import check_plain_text
from llava_jax.text.tokenization import continued, fast_core, other_models, placeholder

_ROLES = {"human": "user", "gpt": "assistant"}


def processor_placeholder(tokenizer, chat_template: str, image_token_id: int) -> str | None:
    """`placeholder`, after checking that it is what the chat template writes for an image.

    Raises:
      LlavaError: also if `<image>` is another token, and the chat template does not write the
        model's.
    """
    token = placeholder(tokenizer, image_token_id)
    named = tokenizer.get_vocab().get(IMAGE_TOKEN, image_token_id)
    if 0 <= image_token_id != named and (token is None or token not in chat_template):
        raise other_models(tokenizer, image_token_id)
    return token


class ProcessorPrompt:
    """Turns -> token ids that wait for an answer.

    If the placeholder is no token of the tokenizer (in the original LLaVA's form), the text is
    tokenized between images.

    Args:
      tokenizer: a Hugging Face tokenizer.
      chat_template: Jinja text.
      image_token_id: the placeholder id.
    """

    def __init__(self, tokenizer, chat_template: str, image_token_id: int):
        self.placeholder = processor_placeholder(tokenizer, chat_template, image_token_id)
        self.tokenizer, self.chat_template = tokenizer, chat_template
        self._core = fast_core(tokenizer)
        self.image_token_id = image_token_id
        self.takes_lists = self._takes_lists()

    @property
    def takes_system(self) -> bool:
        """Whether the template has a place for a system prompt."""
        try:
            return "probe" in self._render(self._messages([Turn("human", "x")], "probe", ()))
        except LlavaError:
            return False

    def __call__(
        self,
        turns: Sequence[Turn],
        image_lengths: Sequence[int] = (),
        system: str | None = None,
        videos: Sequence[bool] | None = None,
    ) -> np.ndarray:
        """int32 [T].

        Args:
          image_lengths: tokens of each image or video, in the order of their `<image>`.
          system: a system prompt.
          videos: which of them are videos; none by default.
        """
        if system and not self.takes_system:
            raise LlavaError(
                f"the chat template of {self.tokenizer.name_or_path} has no place for a system "
                "prompt: remove it, or put it into the question"
            )
        for turn in turns:
            check_plain_text(turn.text, self.placeholder)
        images = sum(turn.images for turn in turns)
        videos = [False] * images if videos is None else list(videos)
        text = self._render(self._messages(turns, system, videos))
        if any(videos):
            text = self._in_order(text, videos)
        chunks = text.split(IMAGE_TOKEN)
        if len(chunks) - 1 != images:
            raise LlavaError(
                f"the chat template of {self.tokenizer.name_or_path} makes {len(chunks) - 1} "
                f"{IMAGE_TOKEN} of {images} image(s): it is not of a LLaVA"
            )
        bos = self.tokenizer.bos_token
        begun = bos is not None and chunks[0].startswith(bos)
        if self.placeholder is None:
            rows = [self._ids(text, not (i or begun)) for i, text in enumerate(chunks)]
            for i, length in enumerate(image_lengths):
                image = np.full(length, self.image_token_id, np.int32)
                rows[i + 1] = np.concatenate([image, rows[i + 1]])
            return np.concatenate(rows)
        ids = self._ids(self.placeholder.join(chunks), not begun)
        repeats = np.ones(len(ids), int)
        repeats[ids == self.image_token_id] = image_lengths
        return np.repeat(ids, repeats)

    def _in_order(self, text: str, videos: Sequence[bool]) -> str:
        """A rendered text with `<image>` for videos too, which must stand where they are given."""
        found = [mark == VIDEO_TOKEN for mark in MARKS.findall(text)]
        if sorted(found) == sorted(videos) and found != list(videos):
            raise LlavaError(
                f"the chat template of {self.tokenizer.name_or_path} moves pictures and videos of "
                "a message: give its pictures first, then its videos"
            )
        return text.replace(VIDEO_TOKEN, IMAGE_TOKEN)

    def _ids(self, text: str, add_special_tokens: bool) -> np.ndarray:
        text, *pieces = text.split(BREAK)
        ids = self._core.encode(text, add_special_tokens=add_special_tokens).ids
        rest = [continued(self._core, piece)[0] for piece in pieces]
        return np.concatenate([np.array(ids, np.int32), *rest])

    def _messages(
        self, turns: Sequence[Turn], system: str | None, videos: Sequence[bool]
    ) -> list[dict]:
        kinds = iter(["video" if is_video else "image" for is_video in videos])
        content = (lambda text: _content(text, kinds)) if self.takes_lists else lambda text: text
        messages = [{"role": _ROLES[turn.role], "content": content(turn.text)} for turn in turns]
        if system:
            messages.insert(0, {"role": "system", "content": content(system)})
        return messages

    def _takes_lists(self) -> bool:
        """False for a template written for texts alone."""
        probe = [{"role": "user", "content": _content(f"{IMAGE_TOKEN}\nx", iter(["image"]))}]
        try:
            return images_in(self._render(probe)) == 1
        except LlavaError:
            return False

    def _render(self, messages: list[dict]) -> str:
        """The text, with `<image>` for an image whatever the template writes."""
        try:
            text = self.tokenizer.apply_chat_template(
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
        return text.replace(self.placeholder or IMAGE_TOKEN, IMAGE_TOKEN)


def _content(text: str, kinds: Iterator[str]) -> list[dict]:
    """A text as a list of images, videos and texts.

    A template writes its own line break after an image. kinds: of the marks, from the first on.
    """
    content: list[dict] = []
    for i, piece in enumerate(text.split(IMAGE_TOKEN)):
        if i:
            content.append({"type": next(kinds)})
            piece = piece.removeprefix("\n")
        if piece:
            content.append({"type": "text", "text": piece})
    return content
