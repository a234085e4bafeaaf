"""The mode that docs/extend/picture_mode.md adds works as the page says."""

import dataclasses
import re
from pathlib import Path

import numpy as np
from PIL import Image

from llava_jax.data.media import preprocess
from llava_jax.models import images
from llava_jax.models.images import MODES, ImageSpec, layouts
from llava_jax.weights.write import huggingface, original
from tests.tiny_model import CONFIG

PAGE = Path(__file__).parent.parent.parent / "docs/extend/picture_mode.md"


def test_the_page_adds_a_mode(monkeypatch):
    monkeypatch.setattr(images, "MODES", dict(MODES))
    names = dict(vars(images))
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL):
        exec(block, names)
    spec = ImageSpec(28, "halves")
    assert spec.by_size
    config = dataclasses.replace(CONFIG, image=spec)
    for program in (huggingface, original):
        assert "does not have the image mode halves" in program.fault(config)
        assert program.fault(CONFIG) is None
    for size, tiles in {(100, 40): 2, (40, 100): 1, (60, 40): 1, (61, 40): 2}.items():
        (found,) = layouts(spec, 4, [size])
        assert found.tiles == tiles and found.features.tolist() == list(range(4 * tiles))
        pixels = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), np.uint8)
        cut = preprocess(Image.fromarray(pixels), spec)
        assert cut.shape == (tiles, 28, 28, 3)
        whole = Image.fromarray(pixels).resize((28 * tiles, 28), Image.Resampling.BICUBIC)
        np.testing.assert_array_equal(np.concatenate(list(cut), axis=1), np.asarray(whole))
