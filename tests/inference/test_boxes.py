"""Boxes: parsed out of text, on the padded square, drawn."""

from PIL import Image

from llava_jax.inference.boxes import draw_boxes, parse_boxes, to_pixels


def test_boxes_are_found_in_text():
    assert parse_boxes("[0.1, 0.2,0.30,1]") == [(0.1, 0.2, 0.3, 1.0)]
    assert parse_boxes("It is [.5, 0, 1.0, 1.] or [0,0,1,1].") == [(0.5, 0, 1, 1), (0, 0, 1, 1)]
    for text in ("", "0.1, 0.2, 0.3, 0.4", "[0.1, 0.2, 0.3]", "[a, b, c, d]", "[0.1 0.2 0.3 0.4]"):
        assert parse_boxes(text) == []


def test_a_box_lies_on_the_padded_square():
    # 200 x 100 has 50 pixels above; 101 x 200 has 49 (not 49.5) to the left.
    assert to_pixels((0.25, 0.25, 0.75, 0.5), (200, 100)) == (50, 0, 150, 50)
    assert to_pixels((0.25, 0.5, 0.5, 1), (101, 200)) == (1, 100, 51, 200)


def test_boxes_are_drawn_where_they_are():
    image = Image.new("RGB", (200, 100))
    drawn = draw_boxes(image, [(150, 50, 50, 10)], "lime")  # corners in any order
    assert drawn.getpixel((50, 30)) == drawn.getpixel((100, 10)) == (0, 255, 0)
    assert drawn.getpixel((100, 30)) == image.getpixel((50, 30)) == (0, 0, 0)
