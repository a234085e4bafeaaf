#!/usr/bin/env bash
# datasets 5.2.0: load_dataset("json") guesses the type of a column from its values. Ids that look
# like dates become datetimes, so that str(id) is another text than in the file; as LLaVA's records
# name pictures and results by id, look-ups by it fail.
# Seen: "2014-05-03" -> datetime.datetime(2014, 5, 3, 0, 0).
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet datasets==5.2.0
HF_HUB_OFFLINE=1 HF_HOME="$dir/hub" "$dir/venv/bin/python" - "$dir/records.json" <<'PYTHON'
import datetime
import json
import sys

import datasets

with open(sys.argv[1], "w") as file:
    json.dump([{"id": "2014-05-03"}, {"id": "2014-05-04"}], file)
loaded = datasets.load_dataset("json", data_files=sys.argv[1], split="train")
print("2014-05-03 ->", repr(loaded[0]["id"]))
assert loaded[0]["id"] == datetime.datetime(2014, 5, 3)
PYTHON
