"""Writes small benchmark folders in the published layouts."""

import io
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
from PIL import Image


def write(root: Path, name: str, value) -> None:
    """JSON, or JSON lines for a .jsonl and POPE's files, or text."""
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(value, str):
        path.write_text(value, encoding="utf-8")
    elif name.endswith(".jsonl") or "pope" in name:
        path.write_text("".join(json.dumps(line) + "\n" for line in value), encoding="utf-8")
    else:
        path.write_text(json.dumps(value), encoding="utf-8")


def lines(scores) -> dict:
    """Score lines by kind: (count, values rounded to 4 places)."""
    return {s.kind: (s.count, {k: round(v, 4) for k, v in s.values.items()}) for s in scores}


def prompts(benchmark) -> list[str]:
    return [question.prompt for question in benchmark.questions]


def png(value: int = 0, size: tuple[int, int] = (9, 7)) -> bytes:
    """An encoded picture of one grey value."""
    buffer = io.BytesIO()
    Image.new("L", size, value).save(buffer, "PNG")
    return buffer.getvalue()


def stored(value: int = 0) -> dict:
    """A picture as Parquet files of the Hugging Face hub hold it."""
    return {"bytes": png(value), "path": f"{value}.png"}


def write_parquet(root: Path, name: str, rows: list[dict], group: int = 2) -> None:
    """Rows in groups of `group`, as large published files have many groups."""
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=group)
