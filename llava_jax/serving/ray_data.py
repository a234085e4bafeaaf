"""A stage of Ray Data: rows of pictures and questions in, the same rows with their answers out.

    import ray
    from llava_jax.serving.ray_data import Answerer

    rows = ray.data.read_parquet("questions.parquet")  # prompt, image, and any other columns
    rows = rows.map_batches(
        Answerer,
        fn_constructor_kwargs={"checkpoint": "runs/llava", "sampling": {"max_tokens": 64}},
        compute=ray.data.ActorPoolStrategy(size=4),
        num_gpus=1,
        batch_size=256,
        batch_format="pyarrow",
    )
    rows.write_parquet("answers")

Each actor loads the model once. An answer depends on its row alone, so it is that of `llava-jax
generate`, whatever the batches, the actors and their faults are.
"""

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path

import pyarrow as pa

from llava_jax.errors import LlavaError
from llava_jax.inference.jobs import Request
from llava_jax.inference.sampling import ALIASES, SamplingParams
from llava_jax.serving.command_line import add_model_arguments, from_keywords, load_from_arguments
from llava_jax.serving.generate import Requests, answer_lines
from llava_jax.serving.requests import OWN_KEYS, read_request

COLUMNS = {
    "text": pa.string(),
    "finish_reason": pa.string(),
    "prompt_tokens": pa.int64(),
    "completion_tokens": pa.int64(),
    "error": pa.string(),
}
# Parameter of the stage -> the column that it adds; log probabilities are JSON.
ON_REQUEST = {
    "n": ("texts", pa.list_(pa.string())),
    "logprobs": ("logprobs", pa.string()),
    "prompt_logprobs": ("prompt_logprobs", pa.string()),
}
FIELDS = {field.name for field in dataclasses.fields(SamplingParams)}
KEYS = {*OWN_KEYS, *FIELDS, *ALIASES, "do_sample"} - {*ON_REQUEST, "num_return_sequences"}


class Answerer:
    """Answers batches of rows; for `map_batches` with `batch_format="pyarrow"`.

    Columns with the names of KEYS are the request, as in a line for `llava-jax generate`: `prompt`,
    `image` or `images`, `history`, `system`, `seed` and so on; a null counts as left out. A picture
    is a path, an address, encoded bytes, or a struct of `bytes` and `path`, as `datasets` writes
    it. All columns are kept and COLUMNS added; a row that cannot be answered has its `error` alone.

    Args:
      checkpoint, model: as the flags of `llava-jax generate` that name a model, such as `dtype`.
      prompt: of rows that have none.
      image_root: folder of the paths of pictures.
      sampling: parameters of rows that do not give their own.
      batch_size: rows computed at once. `map_batches` should give several times as many.
    """

    def __init__(
        self,
        checkpoint: str | os.PathLike,
        *,
        prompt: str | None = None,
        image_root: str | os.PathLike = ".",
        sampling: Mapping | None = None,
        batch_size: int = 32,
        **model,
    ):
        if batch_size < 1:
            raise LlavaError(f"batch_size must be at least 1, not {batch_size}")
        params = SamplingParams.from_names(sampling or {})
        asked = {"n": params.n > 1} | {
            name: getattr(params, name) is not None for name in ("logprobs", "prompt_logprobs")
        }
        self._columns = COLUMNS | dict(ON_REQUEST[name] for name in asked if asked[name])
        self._prompt, self._root = prompt, Path(image_root)
        self._sampling, self._batch_size = dict(sampling or {}), batch_size
        args = from_keywords(add_model_arguments, {"checkpoint": checkpoint, **model})
        self._model = load_from_arguments(args)

    def __call__(self, rows: pa.Table) -> pa.Table:
        """The rows with their answers, in their order."""
        if not isinstance(rows, pa.Table):
            raise LlavaError('the rows are not a table: give map_batches batch_format="pyarrow"')
        if taken := [name for name in self._columns if name in rows.column_names]:
            raise LlavaError(f"the rows have a column {taken[0]!r} already: rename it first")
        requests = Requests(self._model, rows.to_pylist(), range(len(rows)), self._read)
        lines = list(answer_lines(self._model, requests, self._batch_size))
        for name, kind in self._columns.items():
            values = [line.get(name) for line in lines]
            if name in ("logprobs", "prompt_logprobs"):
                values = [value and json.dumps(value) for value in values]
            rows = rows.append_column(name, pa.array(values, kind))
        return rows

    def _read(self, row: dict) -> Request:
        """The request of a row; LlavaError if it is wrong."""
        item = {key: row[key] for key in row if key in KEYS and row[key] is not None}
        if self._prompt is not None:
            item.setdefault("prompt", self._prompt)
        for key in ("image", "images"):
            if isinstance(item.get(key), list):
                item[key] = [_picture(value) for value in item[key]]
            elif key in item:
                item[key] = _picture(item[key])
        return read_request(self._model, item, self._root, self._sampling)


def _picture(value):
    """The bytes or the path of a picture of `datasets`; any other value as it is."""
    if isinstance(value, dict) and {*value} == {"bytes", "path"}:
        return value["path"] if value["bytes"] is None else value["bytes"]
    return value
