#!/bin/sh
# numpy's sum and mean of ml_dtypes' bfloat16 stop growing: the mean of 1000 ones is 0.2559. float16 is right.
#
# Versions: ml_dtypes 0.6.0, numpy 2.4.6, Python 3.11.
#
# What a good engineer would guess: numpy treats bfloat16 as its own float16, for which mean() uses a float32 sum. The product x @ x
# of the same array is right: 1000.
#
# Behaviour: numpy adds the elements of this type one after the other, in bfloat16. At 256, adding 1
# changes nothing, because the next bfloat16 is 258. sum() and cumsum() behave in the same way. jax-ml/ml_dtypes issue 63
# describes the sums. mean(dtype=numpy.float32) and astype(numpy.float32) are right.
#
# Consequence: means of bfloat16 weights or activations that were converted to numpy arrays, for example from JAX, are wrong by a
# factor that grows with the number of elements: 4 for 1000 ones, 4000 for a million.
#
# Output seen:
#   ml_dtypes 0.6.0, numpy 2.4.6: 1000 and 1000000 ones
#   float16: mean 1, 1
#   bfloat16: mean 0.2559, 0.0002556
#   bfloat16, dtype=float32: mean 1, 1
#   bfloat16: x @ x of 1000 ones: 1000
# Exit status: 0 if the mean is still wrong, 1 if the behaviour changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet ml_dtypes==0.6.0 numpy==2.4.6
cat > "$folder/program.py" <<'PROGRAM'
import sys

import ml_dtypes
import numpy as np

COUNTS = (1000, 1000000)
found = {
    "float16": [float(np.ones(count, np.float16).mean()) for count in COUNTS],
    "bfloat16": [float(np.ones(count, ml_dtypes.bfloat16).mean()) for count in COUNTS],
    "bfloat16, dtype=float32": [float(np.ones(count, ml_dtypes.bfloat16).mean(dtype=np.float32)) for count in COUNTS],
}
x = np.ones(1000, ml_dtypes.bfloat16)
product = float(x @ x)
print(f"ml_dtypes {ml_dtypes.__version__}, numpy {np.__version__}: 1000 and 1000000 ones")
for name, means in found.items():
    print(f"{name}: mean " + ", ".join(f"{mean:.4g}" for mean in means))
print(f"bfloat16: x @ x of 1000 ones: {product:.0f}")
if found["float16"] != [1.0, 1.0] or max(found["bfloat16"]) > 0.5 or found["bfloat16, dtype=float32"] != [1.0, 1.0] or product != 1000:
    sys.exit("changed: another set of means is right")
PROGRAM
"$folder/env/bin/python" "$folder/program.py"
