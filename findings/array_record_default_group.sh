#!/usr/bin/env bash
# array_record 0.8.6: the writer's default is one record a group, and each group is compressed alone.
# Short records, such as conversations without pictures, take about as many bytes as they have; in
# groups of 16 they take a quarter.
# Who meets it: anybody who writes text records with ArrayRecordWriter(path) and expects compression.
# Seen: options "group_size:1,...", default 0.99, group_size:16 0.26 times the bytes of the records.
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet array_record==0.8.6
"$dir/venv/bin/python" - "$dir" <<'PYTHON'
import json
import os
import random
import sys

from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

random.seed(0)
words = "what color is the shape in this picture it a blue red green large small circle".split()


def conversation(i):
    question, answer = (" ".join(random.choices(words, k=12)) for _ in range(2))
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return json.dumps({"id": str(i), "conversations": turns}).encode()


records = [conversation(i) for i in range(20_000)]
raw = sum(map(len, records))


def share(options):
    path = os.path.join(sys.argv[1], "records")
    writer = ArrayRecordWriter(path, *options)
    for record in records:
        writer.write(record)
    writer.close()
    reader = ArrayRecordReader(path)
    options = reader.writer_options_string()
    print(options)
    return os.path.getsize(path) / raw, options


(default, options), (grouped, _) = share([]), share(["group_size:16"])
print(f"default {default:.2f}, group_size:16 {grouped:.2f} times the bytes of the records")
assert options.startswith("group_size:1,") and default > 0.9 and grouped < 0.4
PYTHON
