#!/usr/bin/env bash
# The laws with several ranks on one GPU, and what only a GPU can show. `make gpu`; python and mpirun are those on the PATH, and what
# each part printed is left in OUT. Correctness alone: ranks that share a GPU take turns on it.
set -uo pipefail
cd "$(dirname "$0")/../.."
OUT=${OUT:-gpu-check}
PARTS=${*:-doctor ranks c10d recompute speed big hybrid laws methods}
mkdir -p "$OUT"
export MPIDP_TEST_DEVICE=cuda OMP_NUM_THREADS=1 PYTHONUNBUFFERED=1
pytest="python -m mpi4py -m pytest -q --with-mpi --timeout=150 --timeout-method=thread -p no:cacheprovider"
status=0

part() { # name, seconds, command
    local name=$1 limit=$2 began=$SECONDS
    shift 2
    case " $PARTS " in *" $name "*) ;; *) return ;; esac
    timeout -k 5 "$limit" "$@" >"$OUT/$name.log" 2>&1
    local rc=$?
    [ $rc = 0 ] || status=1
    echo "== $name: exit $rc after $((SECONDS - began)) s"
    tail -n "${SHOW:-12}" "$OUT/$name.log"
}

quickstart="--train.steps=40 --train.eval_every=0 --train.device=cuda --train.global_batch=16"
ranks() { # the same bits at any number of ranks, through a real command and a real probe
    for n in 1 2 4; do
        mpirun -np $n python -m mpidp.train $quickstart --run.dir="$OUT/at$n" || return 1
    done
    mpirun -np 1 python -m mpidp.train $quickstart --run.dir="$OUT/nccl" --comm.gpu=nccl || return 1
    python -m mpidp.generate "$OUT/at4" --prompt "def " --tokens 40 || return 1
    python - "$OUT" <<'END'
import json, sys
ends = [json.loads(open(f"{sys.argv[1]}/{name}/metrics.jsonl").read().splitlines()[-1]) for name in ("at1", "at2", "at4", "nccl")]
hashes = {end["weights_sha256"] for end in ends}
print("peak GiB by rank:", [[round(b / 2**30, 2) for b in end["gpu_peak_bytes"]] for end in ends])
print("one hash" if len(hashes) == 1 else f"DIFFERENT: {hashes}")
sys.exit(len(hashes) != 1)
END
}
speed() { # one rank alone: tokens a second and MFU
    for compile in false true; do
        mpirun -np 1 python -m mpidp.train --run.dir="$OUT/speed-$compile" --train.compile=$compile --train.device=cuda \
            --model.num_layers=12 --model.num_heads=12 --model.model_dim=768 --model.seq_len=1024 --train.global_batch=64 \
            --train.micro_batch=32 --train.steps=30 --train.eval_every=0 --train.save_every=0 || return 1
    done
    for run in speed-false speed-true; do tail -n 3 "$OUT/$run/metrics.jsonl"; done
}
big() { # 1 B parameters in four shards, beside what plan mesh says
    python -m mpidp.plan mesh --config tests/gpu/big.toml --ranks 4 --memory 9 --gpus-per-node 1 --top 12 --recompute true || return 1
    mpirun -np 4 python -m mpidp.train tests/gpu/big.toml --run.dir="$OUT/big" --train.device=cuda --mesh.shard=3 || return 1
    cat "$OUT/big/metrics.jsonl"
    rm -rf "$OUT/big/checkpoints"
}
export -f ranks speed big
export quickstart OUT

part doctor 60 mpirun -np 2 python -m mpidp.doctor --gpu
part ranks 120 bash -c ranks
part c10d 60 mpirun -np 4 $pytest tests/gpu
MPIDP_LONG=1 part recompute 60 mpirun -np 4 $pytest tests/hybrid -k "compose and recompute"
part speed 90 bash -c speed
part big 120 bash -c big
part hybrid ${HYBRID:-300} mpirun -np 4 $pytest --maxfail=3 tests/hybrid
part laws 300 mpirun -np 4 $pytest --maxfail=3 tests/laws/test_ranks.py tests/laws/test_resume.py tests/laws/test_evaluate.py
part methods 300 mpirun -np 4 $pytest --maxfail=3 tests/methods
exit $status
