#!/bin/sh
# gcsfs prints the traceback of an exception on standard error before it raises the exception. For a refused connection, it raises the
# exception only after half a minute.
#
# Versions: gcsfs 2026.10.1, fsspec 2026.9.0, Python 3.11, Linux x86-64.
#
# What a good engineer would guess: a request to a port on which no program listens raises an exception within a few seconds. The
# library does not print anything. So the program that catches the exception decides which message a user sees.
#
# Behaviour: gcsfs repeats the refused connection with growing pauses. Then it calls logger.exception() and raises the exception. If the
# logger "gcsfs" has no handler, Python's logging prints the traceback on standard error, although the program catches the exception.
#
# Consequence: users see tracebacks before the message of the program. A program that limits the time of its own retries waits much
# longer than this limit. logging.getLogger("gcsfs").addHandler(logging.NullHandler()) suppresses the traceback.
#
# Output seen:
#   caught: ClientConnectorError, after more than 5 s: True, traceback on standard error: True
#   with a NullHandler:    traceback on standard error: False
# Exit status: 0 if the behaviour is as described, 1 if it changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet gcsfs==2026.10.1 fsspec==2026.9.0
cat > "$folder/program.py" <<'PROGRAM'
import logging
import sys
import time

if sys.argv[1:] == ["quiet"]:
    logging.getLogger("gcsfs").addHandler(logging.NullHandler())
import gcsfs  # noqa: E402

began = time.monotonic()
try:
    gcsfs.GCSFileSystem(token="anon").cat_file("bucket/name")
except Exception as error:
    print(f"{type(error).__name__}, after more than 5 s: {time.monotonic() - began > 5}")
PROGRAM
export STORAGE_EMULATOR_HOST=http://127.0.0.1:9 GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT=false
cd "$folder"
said=$(env/bin/python program.py 2> loud)
env/bin/python program.py quiet > /dev/null 2> quiet
loud=$(grep -q "^Traceback" loud && echo True || echo False)
quiet=$(grep -q "^Traceback" quiet && echo True || echo False)
echo "caught: $said, traceback on standard error: $loud"
echo "with a NullHandler:    traceback on standard error: $quiet"
case "$said/$loud/$quiet" in
    "ClientConnectorError, after more than 5 s: True/True/False") ;;
    *) echo "changed" >&2; exit 1 ;;
esac
