#!/bin/sh
# trackio: import_csv() cuts the names of metrics to 10 characters, so train/loss can contain the values of train/loss_ema.
#
# Versions: trackio 0.43.0, Python 3.11.
#
# What a good engineer would guess: each column becomes a metric with the name of the column, as trackio.log() keeps any name. At most,
# names that are not allowed are changed, and never to the name of another column.
#
# Behaviour: import_csv() removes all characters except letters, digits and "/", and keeps the first 10. If two names become equal, the
# second one gets the suffix _1. So the order of the columns decides: after the column train/loss_ema, the column train/loss is named
# train/loss_1, and train/loss is the smoothed loss. The documentation of import_csv() does not mention this; one printed line shows the
# new names.
#
# Consequence: a run that is moved from another tracker by CSV shows a wrong curve under the right name, and a comparison with runs that
# were logged directly is wrong. validation/loss and validation/accuracy become validation and validation_1.
#
# Output seen:
#   trackio 0.43.0, first row: train/loss_ema 9.5, train/loss 2.5, validation/accuracy 0.75
#   train/loss_ema: no such metric
#   train/loss: 9.5
#   train/loss_1: 2.5
#   validation/accuracy: no such metric
#   validation: 0.75
# Exit status: 0 if the names are still cut, 1 if the behaviour changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet trackio==0.43.0
cat > "$folder/program.py" <<'PROGRAM'
import json
import os
import subprocess
import sys
import sysconfig

import trackio

SCRIPT = os.path.join(sysconfig.get_path("scripts"), "trackio")


def value(metric):
    """Return the first value of this metric, as the command line prints it, or None."""
    command = [SCRIPT, "get", "metric", "--project", "p", "--run", "r", "--metric", metric, "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    return json.loads(done.stdout)["values"][0]["value"] if done.returncode == 0 else None


with open("metrics.csv", "w") as file:
    file.write("step,train/loss_ema,train/loss,validation/accuracy\n0,9.5,2.5,0.75\n1,9.0,2.25,0.8\n")
trackio.import_csv("metrics.csv", project="p", name="r")
names = ["train/loss_ema", "train/loss", "train/loss_1", "validation/accuracy", "validation"]
found = {name: value(name) for name in names}
with open("result.txt", "w") as file:
    print(f"trackio {trackio.__version__}, first row: train/loss_ema 9.5, train/loss 2.5, validation/accuracy 0.75", file=file)
    for name, first in found.items():
        print(f"{name}: {'no such metric' if first is None else first}", file=file)
if list(found.values()) != [None, 9.5, 2.5, None, 0.75]:
    sys.exit("changed: the metrics have other names")
PROGRAM
cd "$folder"
HF_HOME="$folder/cache" HF_HUB_OFFLINE=1 "$folder/env/bin/python" program.py > log 2>&1 || { tail -5 log; exit 1; }
cat result.txt
