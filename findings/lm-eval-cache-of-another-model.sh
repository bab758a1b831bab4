#!/bin/sh
# lm-eval gives a model the scores of another model, if both use the same use_cache path.
#
# Versions: lm_eval 0.4.13, datasets 5.2.0, Python 3.11.
#
# What a good engineer would guess: use_cache ("skips repeated inference") finds the answers of the same model to the same requests. An
# evaluation of another model, or of a later checkpoint, runs the model.
#
# Behaviour: the key of the cache is a hash of the kind of request and of its text. It has nothing of the model: no name, no arguments, no
# weights. So the second model is not called. Its results have the first model's scores, without a warning. This is
# EleutherAI/lm-evaluation-harness issue 4063, which is open.
#
# Consequence: a script that evaluates every checkpoint of a run with one cache path reports the scores of the first checkpoint for all.
# The curve is flat, and the training looks as if it had no effect.
#
# Output seen:
#   lm_eval 0.4.13, two questions with the answer yes: accuracy and number of calls of the model
#   no cache: a model that says no has 0.0 (4 calls), a model that says yes has 1.0 (4 calls)
#   same cache: a model that says no has 0.0 (4 calls), a model that says yes has 0.0 (0 calls)
# Exit status: 0 if the second model still gets the scores of the first, 1 if the behaviour changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet lm_eval==0.4.13 datasets==5.2.0
cat > "$folder/program.py" <<'PROGRAM'
import importlib.metadata
import sys

from lm_eval import simple_evaluate
from lm_eval.api.model import LM
from lm_eval.api.task import ConfigurableTask


class Says(LM):
    """A model that finds one answer likely, whatever the question is."""

    def __init__(self, answer):
        super().__init__()
        self.answer, self.calls = answer, 0

    def loglikelihood(self, requests):
        self.calls += len(requests)
        return [(0.0 if request.args[1].strip() == self.answer else -9.0, False) for request in requests]

    def loglikelihood_rolling(self, requests):
        raise NotImplementedError

    def generate_until(self, requests):
        raise NotImplementedError


TASK = dict(
    task="questions", dataset_path="json", dataset_kwargs={"data_files": {"test": "questions.jsonl"}}, test_split="test",
    output_type="multiple_choice", doc_to_text="{{question}}", doc_to_choice=["yes", "no"], doc_to_target="yes",
    metric_list=[{"metric": "acc", "aggregation": "mean", "higher_is_better": True}])


def score(answer, cache):
    model = Says(answer)
    results = simple_evaluate(model, tasks=[ConfigurableTask(config=dict(TASK))], use_cache=cache, bootstrap_iters=0)
    return results["results"]["questions"]["acc,none"], model.calls


print(f"lm_eval {importlib.metadata.version('lm_eval')}, two questions with the answer yes: accuracy and number of calls of the model")
found = []
for name, cache in (("no cache", None), ("same cache", "cache")):
    found += [score("no", cache), score("yes", cache)]
    (no, no_calls), (yes, yes_calls) = found[-2:]
    print(f"{name}: a model that says no has {no} ({no_calls} calls), a model that says yes has {yes} ({yes_calls} calls)")
if found != [(0.0, 4), (1.0, 4), (0.0, 4), (0.0, 0)]:
    sys.exit("changed: the second model is evaluated")
PROGRAM
cd "$folder"
printf '{"question": "Is 1 odd?"}\n{"question": "Is 2 even?"}\n' > questions.jsonl
HF_HOME="$folder/home" HF_HUB_OFFLINE=1 "$folder/env/bin/python" program.py 2> errors || { cat errors >&2; exit 1; }
