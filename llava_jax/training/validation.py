"""Held-out loss, and a few fixed questions answered, while training."""

import collections
from collections.abc import Sequence

import jax
from tqdm import tqdm

from llava_jax.data.media import load_image
from llava_jax.data.pipeline import TrainingData
from llava_jax.data.record_boxes import placed_boxes
from llava_jax.data.records import Record
from llava_jax.data.sources import look_at
from llava_jax.data.video import Video
from llava_jax.inference.model import Llava
from llava_jax.inference.sampling import SamplingParams
from llava_jax.text.conversation import Turn
from llava_jax.training.metrics import MetricsLog, NoLog
from llava_jax.training.stage import Stage
from llava_jax.training.step import TrainState


class Validation:
    """Called with a state and its step; writes `validation_loss` and sample answers to the log.

    So are the loss's other figures, if it has any, such as `validation_reward/accuracy`.

    Args:
      data: held-out data, one pass. The first question of each of the first `config.samples`
        records that can be used is answered, greedily.
      tokenizer: a Hugging Face fast tokenizer.
      frozen: the frozen parameters.
    """

    def __init__(
        self, stage: Stage, data: TrainingData, tokenizer, frozen: dict, log: MetricsLog | NoLog
    ):
        self._stage, self._data, self._frozen, self._log = stage, data, frozen, log
        self._eval_step = stage.eval_step()
        config = stage.config
        self._answerer = Llava(
            stage.model.config,
            {},  # the current parameters are put in each time
            tokenizer,
            template=config.model.template,
            dtype=config.model.dtype,
            box_convention=stage.row_format.box_convention,
        )
        # Answers of a model spread over several hosts are not gathered: held-out loss alone there.
        samples = config.samples if jax.process_count() == 1 else 0
        records = [data.records[int(i)] for i in data.usable[:samples]]
        self._samples = [(r, *self._turns(r)[:2]) for r in records if len(r.turns) > 1]
        self._sampling = SamplingParams(config.sample_tokens, 0.0, 1.0, 0)

    def __call__(self, state: TrainState, step: int) -> None:
        batches = self._data.batch_iterator(0, *self._stage.part)
        totals, units = collections.Counter(), 0.0
        for batch in tqdm(batches, total=self._data.steps, desc="validation", leave=False, delay=2):
            arrays = self._stage.put(batch.arrays)
            sums, count = self._eval_step(state.params, self._frozen, arrays)
            for name, value in sums.items():
                totals[f"validation_{name}"] += float(value)
            units += float(count)
        means = {name: total / max(units, 1) for name, total in totals.items()}
        self._log.scalars(step, means)
        self._answer(state, step)

    def _answer(self, state: TrainState, step: int) -> None:
        if not self._samples:
            return
        self._answerer.replace_params(self._stage.join(state.params, self._frozen))
        requests = [self._request(record, question) for record, question, _ in self._samples]
        answers = self._answerer.answer(requests, batch_size=len(requests))
        for (record, question, reference), answer in zip(self._samples, answers, strict=True):
            self._log.sample(
                step,
                {
                    "id": record.id,
                    "question": question.text,
                    "prediction": answer,
                    "reference": reference.text,
                },
            )

    def _request(self, record: Record, question: Turn):
        # Only the images that the first question shows.
        shown = record.turns[0].images
        images = [
            source if isinstance(source, Video) else load_image(source, name)
            for source, name in zip(record.images[:shown], record.image_names, strict=False)
        ]
        return self._answerer.request(question.text, images, self._sampling)

    def _turns(self, record: Record) -> Sequence[Turn]:
        """Its turns as the model reads them, boxes written."""
        if not record.boxes:
            return record.turns
        named = zip(record.images, record.image_names, strict=True)
        sizes = [
            look_at(source, self._answerer.config.image, name).source for source, name in named
        ]
        return placed_boxes(record.turns, record.boxes, sizes, self._answerer.boxes)
