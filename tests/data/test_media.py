"""Pixels against the Pillow-based processors of transformers 5; faults of image files."""

import io
import pickle
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from llava_jax.data.media import ImageError, inspect_image, load_image, preprocess
from llava_jax.errors import LlavaError
from llava_jax.models.images import CLIP_MEAN, CLIP_STD, ImageSpec
from llava_jax.models.llava import normalize_images

MEAN = (0.48145466, 0.4578275, 0.40821073)
SIZES = [(64, 48), (48, 64), (33, 47), (224, 224), (1, 1), (1, 9), (300, 7), (7, 300), (17, 500)]


def noise(size, mode="RGB", seed=0):
    channels = {"L": (), "RGB": (3,), "RGBA": (4,), "CMYK": (4,)}[mode]
    random = np.random.default_rng(seed)
    pixels = random.integers(0, 256, (size[1], size[0], *channels), np.uint8)
    return Image.fromarray(pixels, mode) if mode == "CMYK" else Image.fromarray(pixels)


def encoded(image, format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def processor(mode, size):
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    options = {"do_rescale": False, "do_normalize": False}
    square = {"height": size, "width": size}
    if mode == "resize":
        return SiglipImageProcessorPil(size=square, resample=Image.Resampling.BICUBIC, **options)
    options |= {"size": {"shortest_edge": size}, "crop_size": square}
    if mode == "pad":
        return LlavaImageProcessorPil(do_pad=True, image_mean=MEAN, **options)
    return CLIPImageProcessorPil(**options)


def expected(image, mode, size):
    pixels = processor(mode, size)(image, return_tensors="np")["pixel_values"][0]
    return np.asarray(pixels).transpose(1, 2, 0)


@pytest.mark.parametrize("mode", ["square", "pad", "resize"])
@pytest.mark.parametrize("size", SIZES)
def test_pixels_equal_transformers(mode, size):
    image = noise(size)
    for side in (56, 37):
        ours = preprocess(load_image(encoded(image)), ImageSpec(side, mode, MEAN))
        assert ours.dtype == np.uint8 and ours.shape == (1, side, side, 3)
        np.testing.assert_array_equal(ours[0], expected(image, mode, side))


@pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK", "P", "1", "LA", "P+transparency"])
def test_other_modes_equal_transformers(mode):
    if mode in ("L", "RGBA", "CMYK"):
        image = noise((40, 30), mode)
    else:
        image = noise((40, 30)).convert(mode.removesuffix("+transparency"))
    options = {"transparency": 3} if "transparency" in mode else {}
    data = encoded(image, "TIFF" if mode == "CMYK" else "PNG", **options)
    reopened = Image.open(io.BytesIO(data))
    np.testing.assert_array_equal(
        preprocess(load_image(data), ImageSpec(28, "square"))[0], expected(reopened, "square", 28)
    )


def test_orientation_is_applied():
    image = noise((30, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees
    data = encoded(image, exif=exif)
    upright = np.asarray(image.transpose(Image.Transpose.ROTATE_270))
    np.testing.assert_array_equal(np.asarray(load_image(data)), upright)


def test_the_size_is_upright_wherever_the_orientation_stands():
    """Before the pixels of a PNG, behind them, and in a picture that was opened."""
    image = noise((30, 20))
    exif = Image.Exif()
    exif[0x0112] = 6
    plain, end = encoded(image), b"\x00\x00\x00\x00IEND"
    body = b"eXIf" + exif.tobytes()[6:]  # without "Exif" and two zeros
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    late = plain.replace(end, chunk + end)
    for data, size in ((plain, (30, 20)), (encoded(image, exif=exif), (20, 30)), (late, (20, 30))):
        assert inspect_image(data) == load_image(data).size == size
        assert inspect_image(Image.open(io.BytesIO(data))) == size


def photograph(size):
    """Smooth colours with edges and a little noise."""
    y, x = np.mgrid[: size[1], : size[0]] / max(size)
    waves = [np.sin(9 * x + k) + np.cos(7 * y * k) + (x + k * y > 0.8) for k in range(3)]
    grain = np.random.default_rng(0).normal(0, 4, (size[1], size[0], 3))
    return Image.fromarray(np.clip(60 * np.stack(waves, -1) + 90 + grain, 0, 255).astype(np.uint8))


def turned(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return {"exif": exif}


FILES = {
    "photograph": lambda: encoded(photograph((640, 427)), "JPEG", quality=85),
    "grey photograph": lambda: encoded(photograph((427, 640)).convert("L"), "JPEG"),
    "CMYK photograph": lambda: encoded(photograph((300, 200)).convert("CMYK"), "JPEG"),
    "huge": lambda: encoded(photograph((2600, 1700)), "JPEG", quality=60),
    "tiny": lambda: encoded(noise((2, 3)), "PNG"),
    "alpha": lambda: encoded(noise((61, 47), "RGBA"), "WEBP", lossless=True),
    "palette": lambda: encoded(photograph((90, 70)).quantize(16), "GIF"),
    **{
        f"turned {i}": lambda i=i: encoded(noise((40, 30)), "PNG", **turned(i)) for i in range(1, 9)
    },
}


@pytest.mark.parametrize("name", FILES)
def test_what_the_model_gets_equals_transformers(name, tmp_path):
    """From a file to normalised pixels, with the processors of the three kinds of encoder."""
    from transformers.image_utils import load_image as their_load_image
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    path = str(tmp_path / "image")
    (tmp_path / "image").write_bytes(FILES[name]())
    side, square = 48, {"height": 48, "width": 48}
    crop = {"size": {"shortest_edge": side}, "crop_size": square}
    processors = {
        "square": CLIPImageProcessorPil(**crop),
        "pad": LlavaImageProcessorPil(
            do_pad=True, image_mean=CLIP_MEAN, image_std=CLIP_STD, **crop
        ),
        "resize": SiglipImageProcessorPil(size=square),
    }
    for mode, theirs in processors.items():
        # Their loader drops the alpha channel, their processors lay it over white, as we do.
        image = Image.open(path) if name == "alpha" else their_load_image(path)
        expected = theirs(image, return_tensors="np")["pixel_values"][0]
        spec = ImageSpec(side, mode, tuple(theirs.image_mean), tuple(theirs.image_std))
        (pixels,) = preprocess(load_image(path), spec)
        ours = np.asarray(normalize_images(spec, pixels)).transpose(2, 0, 1)
        np.testing.assert_allclose(ours, expected, atol=2e-6)


def test_sixteen_bit_grey_is_scaled_not_clipped():
    levels = np.array([[0, 256, 65535, 32768]], np.uint16)
    image = load_image(encoded(Image.fromarray(levels)))
    assert np.asarray(image)[0, :, 0].tolist() == [0, 1, 255, 128]


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_formats(format, tmp_path):
    path = tmp_path / "image"
    path.write_bytes(encoded(noise((20, 10)), format))
    assert load_image(str(path)).size == (20, 10)
    assert load_image(path.read_bytes()).mode == "RGB"
    assert inspect_image(str(path)) == inspect_image(path.read_bytes()) == (20, 10)


def test_inspecting_accepts_what_follows_an_image(tmp_path):
    path = tmp_path / "image.jpg"
    path.write_bytes(encoded(noise((20, 10)), "JPEG") + b"\0\0trailer")
    assert inspect_image(str(path)) == (20, 10)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_truncated_files_are_named(format, tmp_path):
    path = tmp_path / f"cut.{format}"
    data = encoded(noise((90, 90)), format)
    for length in (len(data) // 2, len(data) - 40, 30):
        path.write_bytes(data[:length])
        for look in (load_image, inspect_image):
            with pytest.raises(ImageError, match="cut"):
                look(str(path))


@pytest.mark.parametrize("data", [b"", b"<html></html>", b"<svg/>", b"\x89PNG\r\n\x1a\n", b"BM"])
def test_non_images_are_named(data, tmp_path):
    path = tmp_path / "page.png"
    path.write_bytes(data)
    with pytest.raises(ImageError, match="page.png"):
        load_image(str(path))
    with pytest.raises(ImageError, match="from the set"):
        load_image(data, "from the set")


def test_other_formats_are_not_opened():
    with pytest.raises(ImageError, match="is not an image"):
        load_image(encoded(noise((20, 10)), "PPM"), "x")


def test_missing_file():
    with pytest.raises(ImageError, match="/no/such.png") as caught:
        load_image("/no/such.png")
    assert caught.value.kind == "missing image"
    assert pickle.loads(pickle.dumps(caught.value)).kind == "missing image"


def test_pixel_limit_comes_before_decoding(tmp_path):
    path = tmp_path / "big.png"
    # The header says 7000x7000; there is no pixel data behind it.
    path.write_bytes(encoded(Image.new("1", (7000, 7000)))[:60])
    with pytest.raises(ImageError, match=r"big.png.*7000x7000.*49,000,000.*40,000,000"):
        load_image(str(path))
    assert load_image(encoded(noise((10, 10))), max_pixels=100).size == (10, 10)
    with pytest.raises(ImageError, match="limit of 99"):
        load_image(encoded(noise((10, 10))), max_pixels=99)
    with pytest.raises(ImageError, match="limit of 99"):
        load_image(noise((10, 10)), max_pixels=99)


def test_a_bomb_is_refused(tmp_path):
    path = tmp_path / "bomb.png"
    path.write_bytes(encoded(Image.new("1", (16000, 16000)))[:60])
    with warnings.catch_warnings(), pytest.raises(ImageError, match="bomb.png"):
        warnings.simplefilter("ignore")
        load_image(str(path))


@pytest.mark.parametrize("mode", ["square", "pad"])
def test_very_long_images_are_refused_not_blown_up(mode):
    image = Image.new("RGB", (1_000_000, 2))
    with pytest.raises(ImageError, match="1000000x2.*too elongated"):
        preprocess(image, ImageSpec(336, mode, MEAN), name="strip")
    assert preprocess(image, ImageSpec(336, "resize")).shape == (1, 336, 336, 3)
    with pytest.raises(LlavaError, match="image_mode is 'stretch': choose one of square, pad"):
        ImageSpec(336, "stretch")
