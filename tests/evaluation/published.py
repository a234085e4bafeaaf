"""Writes small benchmark folders in the published layouts."""

import json
from pathlib import Path


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
