"""Held-out loss, and a few fixed questions answered, while training."""

from collections.abc import Callable

import jax
from tqdm import tqdm

from llava_jax.data.media import load_image
from llava_jax.data.pipeline import TrainingData
from llava_jax.data.records import Record
from llava_jax.inference.model import Llava
from llava_jax.inference.sampling import SamplingParams
from llava_jax.training.metrics import MetricsLog
from llava_jax.training.step import TrainState


class Validation:
    """Called with a state and its step; writes `validation_loss` and the samples to the log.

    Args:
      data: held-out data, one pass; of its records the first `samples` are answered: each its
        first question, greedily.
      eval_step: compiled (state, batch) -> (sum of token losses, supervised tokens).
      put: host batch arrays -> device arrays.
      part: (index, count), this process's part of a batch, as `batch_iterator` takes it.
      answerer: a `Llava` of the same model, given the current parameters each time.
      params: state -> parameters of the whole model.
    """

    def __init__(
        self,
        data: TrainingData,
        eval_step: Callable,
        put: Callable,
        part: tuple[int, int],
        answerer: Llava,
        params: Callable,
        samples: int,
        sample_tokens: int,
        log: MetricsLog,
    ):
        self._data, self._eval_step, self._put, self._part = data, eval_step, put, part
        self._answerer, self._model_params, self._log = answerer, params, log
        # Answers of a model spread over several hosts are not gathered: held-out loss alone there.
        samples = samples if jax.process_count() == 1 else 0
        records = [data.records[i] for i in range(min(samples, len(data.records)))]
        self._records = [r for r in records if len(r.turns) > 1]
        self._sampling = SamplingParams(sample_tokens, 0.0, 1.0, 0)

    def __call__(self, state: TrainState, step: int) -> None:
        batches = self._data.batch_iterator(0, *self._part)
        total = tokens = 0.0
        for batch in tqdm(batches, total=self._data.steps, desc="validation", leave=False, delay=2):
            loss, count = self._eval_step(state, self._put(batch.arrays))
            total, tokens = total + float(loss), tokens + float(count)
        self._log.scalars(step, {"validation_loss": total / max(tokens, 1)})
        self._answer(state, step)

    def _answer(self, state: TrainState, step: int) -> None:
        if not self._records:
            return
        self._answerer.replace_params(self._model_params(state))
        requests = [self._request(record) for record in self._records]
        answers = self._answerer.answer(requests, batch_size=len(requests))
        for record, answer in zip(self._records, answers, strict=True):
            question, reference = record.turns[:2]
            self._log.sample(
                step,
                {
                    "id": record.id,
                    "question": question.text,
                    "prediction": answer,
                    "reference": reference.text,
                },
            )

    def _request(self, record: Record):
        # Only the images that the first question shows.
        shown = record.turns[0].text.count("<image>")
        images = [
            load_image(source, name)
            for source, name in zip(record.images[:shown], record.image_names, strict=False)
        ]
        return self._answerer.request(record.turns[0].text, images, self._sampling)
