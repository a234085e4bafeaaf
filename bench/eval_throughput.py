"""Questions a second with many questions a picture: our engine and Hugging Face generate.

python -m bench.eval_throughput --checkpoint=FOLDER --data=runs/quickstart/easy_vqa/test.json

FOLDER is a LLaVA in Hugging Face's layout (`llava-jax export` writes one). Both sides run
alternately in one run and read the same token ids and pixels. Hugging Face runs at each of
--hf_batch_sizes, and its best one is compared.
"""

from pathlib import Path

from absl import flags

from bench.huggingface import HuggingFace, compare
from llava_jax import command
from llava_jax.evaluation import easy_vqa
from llava_jax.inference.model import Llava
from llava_jax.inference.sampling import SamplingParams
from llava_jax.models.precision import DTYPES

CHECKPOINT = flags.DEFINE_string("checkpoint", None, "A LLaVA folder in Hugging Face's layout.")
DATA = flags.DEFINE_string("data", None, "test.json of easy-VQA, written by the quickstart.")
DTYPE = flags.DEFINE_enum("dtype", "float32", DTYPES, "Of our side.")
HF_DTYPE = flags.DEFINE_enum(
    "hf_dtype", None, ["float32", "bfloat16"], "Of transformers; default: ours."
)
LIMIT = flags.DEFINE_integer("limit", 256, "Number of questions.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 128, "Of our side.")
HF_BATCH_SIZES = flags.DEFINE_list("hf_batch_sizes", ["8", "32", "64"], "Tried on their side.")
TOKENS = flags.DEFINE_integer("tokens", 8, "Longest answer.")
ROUNDS = flags.DEFINE_integer("rounds", 2, "Of each side, alternately.")


def main() -> None:
    ours = Llava.from_pretrained(CHECKPOINT.value, dtype=DTYPE.value)
    dtype = HF_DTYPE.value or ours.engine.dtype
    theirs = HuggingFace(CHECKPOINT.value, dtype, ours)
    data = Path(DATA.value)
    questions = easy_vqa.load(data.parent, data.stem).questions[: LIMIT.value]
    params = SamplingParams(TOKENS.value)
    requests = [ours.request(q.prompt, q.images, params) for q in questions]
    pictures = len({q.images for q in questions})
    print(f"{len(questions)} questions about {pictures} pictures: ours {DTYPE.value}, "
          f"Hugging Face {dtype}")  # fmt: skip

    batches = [int(size) for size in HF_BATCH_SIZES.value]
    compare(ours, theirs, requests, BATCH_SIZE.value, batches, TOKENS.value, ROUNDS.value)


if __name__ == "__main__":
    command.run(main, required=("checkpoint", "data"))
