"""POST /v1/boxes: boxes of a text in pixels of a picture."""

import pytest

from llava_jax.data.boxes import Boxes
from llava_jax.models.images import ImageSpec
from llava_jax.serving.api import ApiError, Limits
from llava_jax.serving.boxes import boxes_in


def test_boxes_lie_on_the_picture():
    asked = {"text": "[0.25, 0.25, 0.75, 0.5], not [3, 1, 4, 2]", "width": 200, "height": 100}
    assert boxes_in(asked, Boxes(), Limits()) == {"boxes": [(50, 0, 150, 50)]}
    pixels = Boxes("pixel", ImageSpec(mode="resize"))
    asked |= {"text": "[20, 30, 40, 500]", "several": True}
    assert boxes_in(asked, pixels, Limits()) == {"boxes": [(20, 30, 40, 100)]}
    assert boxes_in(asked | {"text": "none"}, pixels, Limits()) == {"boxes": []}


@pytest.mark.parametrize(
    ("field", "value"),
    [("text", 1), ("text", None), ("width", 0), ("width", True), ("height", 1 << 30),
     ("height", "9"), ("several", 1)],
)  # fmt: skip
def test_a_wrong_field_is_named(field, value):
    asked = {"text": "", "width": 2, "height": 1} | {field: value}
    with pytest.raises(ApiError, match=f"^{field} must be") as error:
        boxes_in(asked, Boxes(), Limits())
    assert error.value.status == 400 and error.value.param == field


def test_a_text_that_no_context_holds_is_refused():
    asked = {"text": "[0.25, 0.25, 0.75, 0.5]", "width": 200, "height": 100}
    assert boxes_in(asked, Boxes(), Limits(characters=23))["boxes"]
    with pytest.raises(ApiError, match="^text may hold at most 22 characters") as error:
        boxes_in(asked, Boxes(), Limits(characters=22))
    assert error.value.status == 400 and error.value.param == "text"
