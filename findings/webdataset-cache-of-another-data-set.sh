#!/bin/sh
# webdataset: two data sets with the same names of shards and the same cache_dir read the same shards, so validation reads training data.
#
# Versions: webdataset 1.0.2, numpy 2.4.6, Python 3.11, with the programs curl and file.
#
# What a good engineer would guess: a cache distinguishes the URLs. If cache_dir is shared, only the same URL is read from the same file.
#
# Behaviour: the name in the cache is the last part of the URL, without the host and the folders. The first data set that is read
# decides what train/000000.tar and val/000000.tar contain. The parameter url_to_name does not help, because WebDataset does not pass it
# on (pull request 470, open). Issue 471, also open, reports duplicate samples for this reason.
#
# Consequence: the usual names are train/000000.tar and val/000000.tar. With one cache_dir for both, the validation loss is computed on the
# training data, and looks very good. A new version of the data set under another folder is never read.
#
# Output seen:
#   webdataset 1.0.2: train/000000.tar, then val/000000.tar
#   one cache_dir: text of train, text of train
#   one cache_dir, url_to_name: text of train
#   two folders: text of train, text of val
# Exit status: 0 if the cache still mixes the data sets, 1 if the behaviour changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet webdataset==1.0.2 numpy==2.4.6
cat > "$folder/program.py" <<'PROGRAM'
import functools
import http.server
import importlib.metadata
import os
import sys
import threading

from webdataset import TarWriter, WebDataset

for name in ("train", "val"):
    os.makedirs(f"served/{name}")
    with TarWriter(f"served/{name}/000000.tar") as writer:
        writer.write({"__key__": "0", "txt": f"text of {name}"})
for name in ("cache", "cache-train", "cache-val"):
    os.makedirs(name)
handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory="served")
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
threading.Thread(target=server.serve_forever, daemon=True).start()


def texts(name, cache, **options):
    """Read the texts of this data set through this cache."""
    url = f"http://127.0.0.1:{server.server_port}/{name}/000000.tar"
    return [sample["txt"].decode() for sample in WebDataset(url, cache_dir=cache, shardshuffle=False, **options)]


print(f"webdataset {importlib.metadata.version('webdataset')}: train/000000.tar, then val/000000.tar")
found = {
    "one cache_dir": texts("train", "cache") + texts("val", "cache"),
    "one cache_dir, url_to_name": texts("val", "cache", url_to_name=lambda url: url.replace("/", "-")),
    "two folders": texts("train", "cache-train") + texts("val", "cache-val"),
}
for name, read in found.items():
    print(f"{name}:", ", ".join(read))
train, val = "text of train", "text of val"
if list(found.values()) != [[train, train], [train], [train, val]]:
    sys.exit("changed: the cache distinguishes the data sets")
PROGRAM
cd "$folder"
no_proxy=127.0.0.1 "$folder/env/bin/python" program.py 2> log || { tail -5 log; exit 1; }
