"""Records -> an endless, resumable stream of packed batches.

The order is a pure function of (seed, step): every epoch's packing plan is computed from the
lengths, so the rows of a batch are known from its step alone. Resuming needs no other state, gives
the same bytes, and works on any number of processes; each builds only its own rows.
"""

import dataclasses
import functools
import gc
import multiprocessing
import os
import signal
import threading
from collections.abc import Generator, Iterator

import numpy as np

from llava_jax.data.augment import UNCHANGED, Augmentation
from llava_jax.data.features import FeatureStore
from llava_jax.data.measuring import Findings, ImagePolicy, measure
from llava_jax.data.media import MAX_PIXELS
from llava_jax.data.plan import RowStream
from llava_jax.data.records import ignored_keys_text
from llava_jax.data.rows import Batch, RowBuilder, RowFormat, stack
from llava_jax.errors import LlavaError
from llava_jax.text.tokenization import SegmentTokenizer


class TrainingData:
    """Checks and measures all records once, then yields batches of fixed shape.

    records: from `open_records`. tokenizer: a Hugging Face fast tokenizer. row_format: what rows
    look like. batch_size: rows a batch, over all processes. Exactly one of `epochs` and `steps`
    says how long to go on.
    bad_image: "error" raises at the first image that is missing, over `max_pixels` or cannot be
    read; "skip" leaves its conversation out and raises when more than `bad_image_ceiling`
    different ones were left out (by one process). Most bad images show before the first step and
    are reported in `bad_images`; those met only when decoding are named in `Batch.skipped`.
    workers: processes that build rows; 0 builds them in `threads` threads of this one.
    cache_dir: where measured lengths are kept between runs; None keeps nothing.
    pad_final_batch: fill up the last batch with empty rows instead of leaving it out (epochs only).
    findings, host: see `measure`; by default the first fault is raised.
    augmentation: random changes of pictures and their boxes, by default none.

    Afterwards: `records` and their `fingerprint` (of the data's content), `steps`,
    `rows_per_epoch` (of the first epoch), `tokens_per_epoch`, `tiles_per_epoch`, `fill` and
    `tile_fill` (shares of the rows' tokens and tiles that are used), `records_total`,
    `records_used`, `usable` (their numbers), `refused` (reason -> record numbers), `bad_images`
    (messages), `records_cut` (at max_length).

    Raises LlavaError naming file, record index and id for a faulty record; when no record is
    usable; when an epoch has fewer rows than a batch.
    """

    def __init__(
        self,
        records,
        tokenizer,
        row_format: RowFormat,
        *,
        batch_size: int,
        seed: int = 0,
        epochs: int | None = None,
        steps: int | None = None,
        bad_image: str = "error",
        bad_image_ceiling: int = 0,
        workers: int = 0,
        threads: int = 4,
        cache_dir: str | os.PathLike | None = None,
        max_pixels: int = MAX_PIXELS,
        pad_final_batch: bool = False,
        progress: bool = True,
        findings: Findings | None = None,
        augmentation: Augmentation = UNCHANGED,
        host: tuple[int, int] = (0, 1),
    ):
        if (epochs is None) == (steps is None):
            raise LlavaError("give either epochs or steps")
        if bad_image not in ("error", "skip"):
            raise LlavaError(f"bad_image must be 'error' or 'skip', not {bad_image!r}")
        if pad_final_batch and epochs is None:
            raise LlavaError("pad_final_batch needs epochs: steps always fill their batches")
        self.batch_size, self.bad_image_ceiling = batch_size, bad_image_ceiling
        self._workers, self._threads = workers, threads
        f = self.row_format = row_format
        segment_tokenizer = SegmentTokenizer(tokenizer, f.image_token_id, f.use_im_start_end)
        policy = ImagePolicy(max_pixels, bad_image == "skip", bad_image_ceiling)
        measured = measure(
            records, segment_tokenizer, f, policy, cache_dir, threads, progress, findings, host
        )
        self.refused, self.bad_images = measured.refused, measured.bad_images
        self.records_cut, self._needs = measured.cut, (measured.full, measured.tiles)
        self.records, self.records_total = records, len(records)
        is_usable = np.ones(len(records), bool)
        for indices in self.refused.values():
            is_usable[indices] = False
        self.usable = usable = np.flatnonzero(is_usable)
        self.records_used = len(usable)
        if not len(usable):
            raise LlavaError(f"{records.path}: no record can be used ({self._refused_text()})")
        room = np.stack([measured.full[usable], measured.tiles[usable]], axis=1)
        self._row_builder = RowBuilder(
            records,
            usable,
            segment_tokenizer,
            f,
            max_pixels,
            policy.skip,
            room,
            augmentation,
        )
        self._rows = RowStream(measured.lengths[usable], measured.tiles[usable], row_format, seed)
        self.rows_per_epoch = self._rows.rows_before(1)
        self.tokens_per_epoch = int(measured.lengths[usable].sum())
        self.tiles_per_epoch = int(measured.tiles[usable].sum())
        self.fill = self.tokens_per_epoch / (self.rows_per_epoch * f.length)
        self.tile_fill = self.tiles_per_epoch / max(self.rows_per_epoch * f.tiles, 1)
        if self.rows_per_epoch < batch_size and not pad_final_batch:
            raise LlavaError(
                f"{records.path} fills {self.rows_per_epoch} rows of {f.length} tokens an "
                f"epoch, fewer than batch_size={batch_size}: take a smaller batch or more data"
            )
        self._total_rows = None if epochs is None else self._rows.rows_before(epochs)
        if steps is not None:
            self.steps = steps
        elif pad_final_batch:
            self.steps = -(-self._total_rows // batch_size)
        else:
            self.steps = self._total_rows // batch_size

    @functools.cached_property
    def fingerprint(self) -> str:
        """Of the content of the data."""
        return self.records.fingerprint()

    def used(self) -> np.ndarray:
        """Numbers of the records that the steps use, in the order of their first use."""
        rows = min(self.steps * self.batch_size, self.rows_per_epoch)
        return self.usable[np.concatenate([self._rows[row] for row in range(rows)])]

    def take_from(self, store: FeatureStore, row_format: RowFormat) -> None:
        """Batches then have what the encoder sees of pictures, which all must be in the store.

        row_format: that of the data, with the shape of what the store has.
        """
        self._row_builder = dataclasses.replace(
            self._row_builder, row_format=row_format, look=store.look
        )

    def _refused_text(self) -> str:
        parts = []
        for reason, indices in self.refused.items():
            first = ", ".join(map(str, indices[:3])) + (", …" if len(indices) > 3 else "")
            needed = self._needed_text(indices)
            parts.append(f"{len(indices)} refused: {reason} (index {first}){needed}")
        return "; ".join(parts) or "none refused"

    def _needed_text(self, indices: list[int]) -> str:
        """ ", needing up to 9,000 tokens" or tiles, of records that are too large."""
        (tokens, tiles), f = self._needs, self.row_format
        if all(tokens[indices] > f.max_length):
            return f", needing up to {tokens[indices].max():,} tokens"
        if f.image.by_size and all(tiles[indices] > f.tiles):
            return f", needing up to {tiles[indices].max():,} tiles"
        return ""

    def describe(self) -> str:
        """One line for the log: what is used, cut, or refused and why, how full the rows are."""
        ignored, cut = ignored_keys_text(self.records), ""
        if self.records_cut:
            cut = f"; {self.records_cut:,} cut to {self.row_format.max_length} tokens"
        full = f"{self.fill:.0%} full"
        if self.row_format.image.by_size:
            full = f"{self.fill:.0%} of tokens and {self.tile_fill:.0%} of tiles used"
        return (
            f"{self.records_used:,} of {self.records_total:,} records "
            f"({self._refused_text()}{cut}), "
            f"{self.rows_per_epoch:,} rows an epoch, {full}, {self.steps:,} steps "
            f"of {self.batch_size}"
            f"{'; ' + ignored if ignored else ''}"
        )

    def batch_iterator(
        self, start_step: int = 0, process_index: int = 0, process_count: int = 1
    ) -> Generator[Batch]:
        """The batches of steps start_step .. steps-1, this process's rows only.

        Close it if it is not read to the end: workers then stop and free what they have ready.

        Raises LlavaError if the batch does not divide over the processes, or (while iterating)
        for a bad image, as `bad_image` says.
        """
        if self.batch_size % process_count:
            raise LlavaError(
                f"batch_size={self.batch_size} cannot be split over {process_count} processes"
            )
        return self._iterate(start_step, process_index, self.batch_size // process_count)

    def _iterate(self, start_step: int, process_index: int, local: int) -> Generator[Batch]:
        batches = iter(self._grain_dataset(start_step, process_index, local))
        try:
            yield from self._checked(batches)
        finally:
            batches.close()
            if self._workers:  # the last arrays of each are in cycles of references
                del batches
                gc.collect()

    def _checked(self, batches: Iterator[Batch | LlavaError]) -> Iterator[Batch]:
        """Raises the errors among batches, and for too many images left out."""
        skipped = set()
        for batch in batches:
            if isinstance(batch, LlavaError):
                raise batch
            if self._workers:
                # Theirs is memory shared with a worker, which is freed with the array: never, if
                # something still refers to it when the interpreter exits.
                arrays = {name: np.array(array) for name, array in batch.arrays.items()}
                batch = batch._replace(arrays=arrays)
            skipped.update(batch.skipped)
            left_out = len(skipped) + len(self.bad_images)
            if left_out > self.bad_image_ceiling:
                raise LlavaError(
                    f"{left_out} conversations were left out for bad images, more than "
                    f"bad_image_ceiling={self.bad_image_ceiling}; in this run: "
                    f"{', '.join(sorted(skipped)[:5])}"
                )
            yield batch

    def _grain_dataset(self, start_step: int, process_index: int, local: int):
        import grain  # late: it imports Orbax, for seconds that the check of the data need not cost

        get_row = functools.partial(
            _get_row,
            self._row_builder,
            self._rows,
            self._total_rows,
            self.batch_size,
            process_index,
            local,
        )
        rows = grain.MapDataset.range(start_step * local, self.steps * local).map(get_row)
        # Batched before it becomes an iterator: worker processes then share out whole batches.
        batches = rows.batch(local, batch_fn=stack).to_iter_dataset(
            grain.ReadOptions(num_threads=self._threads, prefetch_buffer_size=self._threads)
        )
        if not self._workers:
            return batches
        from absl import flags

        if not flags.FLAGS.is_parsed():  # Grain reads a flag of its own in every worker
            flags.FLAGS.mark_as_parsed()
        return batches.mp_prefetch(
            grain.MultiprocessingOptions(num_workers=self._workers),
            worker_init_fn=live_as_long_as_the_run,
        )


def live_as_long_as_the_run(worker: int, workers: int) -> None:
    """SIGTERM does not end a worker; the run does, or its death.

    Slurm tells all processes of a job to end, and without rows to wait for the run could not
    finish the step that it is to save. A run that is killed tells its workers nothing.
    """
    del worker, workers
    signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def follow():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _get_row(builder, stream, total_rows, batch_size, process_index, local, number):
    """The row of one place: `number` counts this process's rows over all steps."""
    step, place = divmod(int(number), local)
    row = step * batch_size + process_index * local + place
    empty = total_rows is not None and row >= total_rows
    try:
        return builder(np.zeros(0, np.int64) if empty else stream[row], row)
    except LlavaError as error:
        # Handed on as a value: raised inside Grain it would arrive wrapped in Grain's own words.
        return error
