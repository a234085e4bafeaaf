#!/usr/bin/env bash
# transformers 5.24.0 saves the vision tower of a LLaVA-NeXT without the `vision_model.` in its
# names; transformers 4.57.6 then finds none of them and loads a tower of random numbers: a warning,
# no error, and a model that does not see. The other way round works.
# Who meets it: anybody who fine-tunes with transformers 5 and serves with a program that pins 4.
# Seen: 39 keys of the tower missing, 39 unexpected, from_pretrained returns.
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
cat > "$dir/model.py" <<'PYTHON'
import sys

import transformers
from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextConfig
from transformers import LlavaNextForConditionalGeneration as Model

small = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
if sys.argv[1] == "save":
    vision = CLIPVisionConfig(**small, image_size=28, patch_size=14, projection_dim=16)
    text = LlamaConfig(**small, vocab_size=64)
    config = LlavaNextConfig(vision_config=vision, text_config=text, image_token_index=63)
    Model(config).save_pretrained(sys.argv[2])
else:
    _, info = Model.from_pretrained(sys.argv[2], output_loading_info=True)
    missing = [key for key in info["missing_keys"] if "vision_tower" in key]
    unexpected = [key for key in info["unexpected_keys"] if "vision_tower" in key]
    print(transformers.__version__, len(missing), "missing", len(unexpected), "unexpected")
    assert len(missing) == len(unexpected) == int(sys.argv[3])
PYTHON
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet transformers==5.24.0 torch==2.13.0 numpy==2.3.5
"$dir/venv/bin/python" "$dir/model.py" save "$dir/new"
"$dir/venv/bin/pip" install --quiet transformers==4.57.6
"$dir/venv/bin/python" "$dir/model.py" save "$dir/old"
"$dir/venv/bin/python" "$dir/model.py" load "$dir/new" 39
"$dir/venv/bin/pip" install --quiet transformers==5.24.0
"$dir/venv/bin/python" "$dir/model.py" load "$dir/old" 0
