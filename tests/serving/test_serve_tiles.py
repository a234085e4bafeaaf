"""A server whose model cuts pictures into tiles, so that they take tokens by their size."""

import concurrent.futures
import dataclasses

import openai
import pytest

from llava_jax.inference.sampling import SamplingParams
from llava_jax.models.anyres import Tiling
from llava_jax.models.images import ImageSpec
from llava_jax.text.conversation import Turn
from tests.serving.live_server import LiveServer, data_url, question, warm_model
from tests.tiny_model import CONFIG, random_image

pytestmark = pytest.mark.slow
SPEC = ImageSpec(8, "anyres", tiling=Tiling(cap=2, one_view=True))
SIZES = [(9, 8), (30, 10), (17, 16), (300, 3)]


@pytest.fixture(scope="module")
def live():
    live = LiveServer(warm_model(config=dataclasses.replace(CONFIG, image=SPEC)), queue=64)
    yield live
    live.close()


@pytest.fixture(scope="module")
def client(live):
    return openai.OpenAI(base_url=f"{live.url}/v1", api_key="any", max_retries=0, timeout=60)


def ask(client, *messages):
    return client.chat.completions.create(
        model="tiny", messages=list(messages), max_tokens=9, temperature=0
    )


def test_pictures_of_every_size_at_once_are_each_as_from_python(live, client):
    before = live.model.engine.counts.compilations
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        shown = [data_url(i, size) for i, size in enumerate(SIZES)]
        found = list(pool.map(lambda url: ask(client, question("what?", url)), shown))
    assert live.model.engine.counts.compilations == before
    live.wait_idle()
    pictures = [random_image(i, size) for i, size in enumerate(SIZES)]
    texts = live.model.generate(["<image>\nwhat?"] * len(SIZES), pictures, max_tokens=9)
    assert [answer.choices[0].message.content for answer in found] == texts
    counts = [len(layout) for size in SIZES for layout in live.model.config.layouts([size])]
    assert len(set(counts)) > 2
    usage = [answer.usage.prompt_tokens_details.image_tokens for answer in found]
    assert usage == counts


def test_pictures_of_all_turns_count_as_several(live, client):
    first, second = data_url(0, SIZES[0]), data_url(1, SIZES[2])
    turns = [question("what?", first), {"role": "assistant", "content": "a"}]
    turns.append(question("and this?", second))
    answer = ask(client, *turns)
    assert answer.usage.prompt_tokens_details.image_tokens == 2 * 5  # one view and a newline each
    live.wait_idle()
    pictures = [
        live.model.picture(random_image(i, size), several=True)
        for i, size in enumerate((SIZES[0], SIZES[2]))
    ]
    texts = ("<image>\nwhat?", "a", "<image>\nand this?")
    turns = [Turn(("human", "gpt")[i % 2], text) for i, text in enumerate(texts)]
    request = live.model.conversation_request(turns, pictures, SamplingParams(9))
    assert live.model.answer([request], 4) == [answer.choices[0].message.content]


def test_pictures_that_fill_the_context_are_refused_with_their_tokens(client):
    with pytest.raises(openai.BadRequestError, match=r"has \d+ tokens.* send fewer pictures"):
        ask(client, question("what? " * 20, *(data_url(i, SIZES[2]) for i in range(4))))
