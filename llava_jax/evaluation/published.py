"""Scores published for models of the LLaVA family, by benchmark.

LLaVA-1.5 and 1.6 (LLaVA-NeXT): the model zoo of https://github.com/haotian-liu/LLaVA. OneVision
0.5B and 72B (single-image): their model cards; 7B: the measurements of lmms-eval 0.4. LLaVA-Video
and LLaVA-NeXT-Video 32B (Video-MME without subtitles): their model cards. MM-Vet, LLaVA-Bench and
MathVista were graded by language models of the time, which no later grading reproduces.
"""

PUBLISHED: dict[str, dict[str, float]] = {}


def _add(models: tuple[str, ...], scores: dict[str, tuple[float | None, ...]]) -> None:
    for benchmark, values in scores.items():
        row = PUBLISHED.setdefault(benchmark, {})
        row.update({m: v for m, v in zip(models, values, strict=True) if v is not None})


_add(
    ("LLaVA-1.5 7B", "1.5 13B"),
    {
        "vqav2/test-dev2015": (78.5, 80.0),
        "gqa": (62.0, 63.3),
        "vizwiz": (50.0, 53.6),
        "scienceqa": (66.8, 71.6),
        "textvqa": (58.2, 61.3),
        "pope": (85.9, 85.9),
        "mme": (1510.7, 1531.3),
        "mmbench/mmbench_dev_20230712": (64.3, 67.7),
        "mmbench/mmbench_dev_cn_20231003": (58.3, 63.6),
        "seed": (58.6, 61.6),
        "llava_bench": (65.4, 72.5),
        "mmvet": (31.1, 36.1),
    },
)
_add(
    ("1.6 Vicuna 7B", "1.6 Mistral 7B", "1.6 Vicuna 13B", "1.6 Yi 34B"),
    {
        "vqav2/test-dev2015": (81.8, 82.2, 82.8, 83.7),
        "gqa": (64.2, 64.8, 65.4, 67.1),
        "vizwiz": (57.6, 60.0, 60.5, 63.8),
        "scienceqa": (70.1, 72.8, 73.6, 81.8),
        "textvqa": (64.9, 65.7, 67.1, 69.5),
        "pope": (86.5, 86.7, 86.2, 87.7),
        "mme": (1519.0, 1498.0, 1575.0, 1631.0),
        "mmbench/mmbench_dev_20230712": (67.4, 68.7, 70.0, 79.3),
        "mmbench/mmbench_dev_cn_20231003": (60.6, 61.2, 64.4, 79.0),
        "llava_bench": (81.6, 83.2, 87.3, 89.6),
        "mmvet": (43.9, 47.3, 48.4, 57.4),
        "mmmu": (35.8, 35.3, 36.2, 51.1),
        "mathvista/testmini": (34.6, 37.7, 35.3, 46.5),
    },
)
_add(
    ("OneVision 0.5B", "OneVision 7B", "OneVision 72B-si"),
    {
        "ai2d": (57.1, 81.4, 85.1),
        "chartqa": (61.4, 80.0, 84.9),
        "docvqa/validation": (73.7, 87.1, None),
        "infovqa/validation": (46.3, None, None),
        "mmmu": (31.4, None, 57.4),
        "mathvista/testmini": (34.8, 60.5, 66.5),
        "mme": (1238.0, 1579.0, None),
        "realworldqa": (None, 66.3, None),
        "ocrbench": (None, 621.0, None),
    },
)
_add(
    ("LLaVA-Video 7B", "LLaVA-Video 72B", "NeXT-Video 32B"),
    {
        "mvbench": (58.6, 64.1, None),
        "nextqa": (None, 85.4, 77.3),
        "videomme": (None, None, 60.2),
    },
)

# The models, in the order in which reports show them.
MODELS = tuple(dict.fromkeys(model for row in PUBLISHED.values() for model in row))
