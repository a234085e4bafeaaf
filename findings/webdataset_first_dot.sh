#!/usr/bin/env bash
# webdataset 1.0.2: a sample's key is the file's name up to its FIRST dot. Files img.1.jpg and
# img.2.jpg, or frames named v1.5_0001.jpg, share a key: they become one sample, in which the fields
# are called "1.jpg" and "2.jpg", and code that asks for "jpg" finds nothing.
# Who meets it: anybody who packs pictures whose names hold version numbers or times into tar files.
# Seen: "1 sample: ['1.jpg', '2.jpg']".
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet webdataset==1.0.2 numpy==2.3.5
"$dir/venv/bin/python" - "$dir/set.tar" <<'PYTHON'
import io
import sys
import tarfile

import webdataset

with tarfile.open(sys.argv[1], "w") as archive:
    for name in ("img.1.jpg", "img.2.jpg"):
        entry = tarfile.TarInfo(name)
        entry.size = 3
        archive.addfile(entry, io.BytesIO(b"jpg"))
samples = list(webdataset.WebDataset(sys.argv[1], shardshuffle=False))
fields = [sorted(key for key in sample if not key.startswith("__")) for sample in samples]
print(f"{len(samples)} sample: {fields[0]}")
assert fields == [["1.jpg", "2.jpg"]]
PYTHON
