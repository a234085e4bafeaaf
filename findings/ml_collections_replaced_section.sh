#!/usr/bin/env bash
# ml_collections 1.1.0: a command line flag that names a section, --config.optimizer={'b1':0.8},
# replaces the whole section, although the config is locked: keys that it leaves out are gone, keys
# that it adds are taken. Only a flag of a single unknown key is refused.
# Who meets it: anybody whose program reads config.optimizer.b2 afterwards, hours later or never.
# Seen: "{'b1': 0.8, 'typo': 1}".
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet ml_collections==1.1.0
cat > "$dir/config.py" <<'PYTHON'
from ml_collections import ConfigDict


def get_config():
    return ConfigDict({"optimizer": {"b1": 0.9, "b2": 0.999}})
PYTHON
cat > "$dir/main.py" <<'PYTHON'
from absl import app
from ml_collections import config_flags

CONFIG = config_flags.DEFINE_config_file("config", None, lock_config=True)


def main(_):
    section = CONFIG.value.optimizer.to_dict()
    print(section)
    assert CONFIG.value.is_locked and section == {"b1": 0.8, "typo": 1}


app.run(main)
PYTHON
"$dir/venv/bin/python" "$dir/main.py" --config="$dir/config.py" "--config.optimizer={'b1':0.8,'typo':1}"
