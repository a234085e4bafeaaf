"""Pages of one file, which load nothing else, and pictures inside them."""

import base64
import io
from html import escape
from pathlib import Path

from PIL import Image

from llava_jax.files import whole_file

SIDE = 320  # longer side of a picture in pixels

_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title><style>
body {{ font: 15px sans-serif; margin: 2em; }}
article {{ display: flex; align-items: flex-start; gap: 1.5em; border-top: 1px solid #ccc;
 padding: 1em 0; }}
dl {{ margin: 0; }} dt {{ color: #777; }} dd {{ margin: 0 0 .6em; white-space: pre-wrap; }}
{style}</style></head><body><h1>{title}</h1>
{body}</body></html>
"""


def write_page(path: Path, title: str, body: str, style: str = "") -> None:
    """Writes a page.

    Args:
      title: text.
      body: HTML, in which whatever comes from data is escaped. Nothing else would be loaded, and
        no script run, if it were not.
    """
    page = _PAGE.format(title=escape(title), body=body, style=style)
    # A file name that is not UTF-8 contains lone surrogates, which cannot be encoded.
    with whole_file(path) as file:
        file.write(page.encode("utf-8", "backslashreplace"))


def embedded(image: Image.Image, side: int = SIDE) -> str:
    """An <img> with a picture inside, made no larger than `side`."""
    image = image.copy()
    image.thumbnail((side, side), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="" width="{image.width}" src="data:image/jpeg;base64,{data}">'
