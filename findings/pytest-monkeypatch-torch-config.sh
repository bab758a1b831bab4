#!/bin/sh
# pytest's monkeypatch deletes a setting of torch's compiler at the end of a test, instead of restoring it.
#
# Versions: pytest 9.2.0, torch 2.13.0 (CPU), Python 3.11.
#
# What a good engineer would guess: monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 16) holds for one test. Afterwards
# the setting has its old value, as with every other module. pytest 9.1 does this.
#
# Behaviour: pytest 9.2 looks for the old value in the module's __dict__. torch does not keep its settings there; it returns them in
# __getattr__. So pytest assumes that the test added the setting, and deletes it. Afterwards, reading the setting raises AttributeError.
#
# Consequence: the test passes, but later tests in the same process fail inside torch.compile, with an error that does not name the
# cause. torch._dynamo.config.patch(recompile_limit=16) sets the value for one test and then restores the old value.
#
# Output seen:
#   pytest 9.1.0, torch 2.13.0: 8, then 16, then 8
#   pytest 9.2.0, torch 2.13.0: 8, then 16, then AttributeError: torch._dynamo.config.recompile_limit does not exist
# Exit status: 0 if pytest 9.2.0 still deletes the setting and 9.1.0 restores it, 1 if the behaviour changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 numpy
cat > "$folder/program.py" <<'PROGRAM'
import pytest
import torch
from torch._dynamo import config

seen = [config.recompile_limit]
patch = pytest.MonkeyPatch()
patch.setattr(config, "recompile_limit", 16)
seen.append(config.recompile_limit)
patch.undo()
try:
    seen.append(config.recompile_limit)
except AttributeError as error:
    seen.append(f"AttributeError: {error}")
print(f"pytest {pytest.__version__}, torch {torch.__version__.partition('+')[0]}: " + ", then ".join(map(str, seen)))
PROGRAM
for version in 9.1.0 9.2.0; do
    "$folder/env/bin/pip" install --quiet "pytest==$version"
    "$folder/env/bin/python" "$folder/program.py" | tee -a "$folder/seen"
done
grep -q "^pytest 9.1.0.*then 8$" "$folder/seen" && grep -q "^pytest 9.2.0.*AttributeError" "$folder/seen" || {
    echo "changed: other values than in the header"
    exit 1
}
