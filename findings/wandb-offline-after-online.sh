#!/bin/sh
# If wandb.init() could not reach the server, a second call, wandb.init(mode="offline"), with the same run id fails, too.
#
# Versions: wandb 0.31.0, Python 3.11, Linux x86-64.
#
# What a good engineer would guess: wandb.init() raises CommError if the server does not answer. Then no run exists. So a program can
# catch the error and call wandb.init() again with mode="offline", which needs no server.
#
# Behaviour: wandb's service process keeps the run of the failed call. The second call raises ServerResponseError: "run ID ... is in
# use". After wandb.teardown(), the second call works.
#
# Consequence: if the server is not available, a program that then uses the offline mode ends with an error, or records nothing.
#
# Output seen:
#   online:                 CommError
#   offline:                ServerResponseError: run ID same1 is in use
#   offline after teardown: offline
# Exit status: 0 if the second call still fails, 1 if the behaviour changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet wandb==0.31.0
cat > "$folder/program.py" <<'PROGRAM'
import os
import sys

os.environ |= {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "0123456789" * 4, "WANDB_SILENT": "true"}
import wandb  # noqa: E402


def begin(mode):
    settings = wandb.Settings(init_timeout=5, console="off")
    try:
        run = wandb.init(project="p", id="same1", mode=mode, dir=sys.argv[1], settings=settings)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    run.finish()
    return "offline" if run.offline else "online"


seen = [begin("online"), begin("offline")]
wandb.teardown()
seen.append(begin("offline"))
for name, result in zip(("online:", "offline:", "offline after teardown:"), seen):
    print(f"{name:<23} {result.splitlines()[0] if name != 'online:' else result.partition(':')[0]}")
if not (seen[0].startswith("CommError") and "is in use" in seen[1] and seen[2] == "offline"):
    sys.exit("changed: the second call works")
PROGRAM
cd "$folder"
"$folder/env/bin/python" "$folder/program.py" "$folder"
