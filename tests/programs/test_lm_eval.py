"""lm-eval: `mpidp evaluate --tasks` gives the figures that lm-eval's own model type `hf` gives for the export, item by item, on 1
and on 3 ranks."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tests.faults.commands import Shell, expect
from tests.programs.packages import needed
from tests.unit.test_special_tokens import model_folder

WORDS = "the rank of a tree adds its lanes in order so that no one can tell who was there when it was done"
CHOICES = [
    {"question": "the rank of a", "choices": ["tree", "lane", "zzz"], "answer": 0},
    {"question": "no one can ", "choices": ["tell", "was"], "answer": 1},
    {"question": "who was there when it", "choices": ["was done", "xyz", "adds its lanes in order so that no one"], "answer": 0},
    {"question": "", "choices": ["the", "order"], "answer": 1},
    {"question": f"{WORDS} and {WORDS} and {WORDS}", "choices": ["the", "order of it"], "answer": 1},
]
TEXTS = [{"text": WORDS * 4}, {"text": "é was there"}, {"text": "x"}]
ANSWERS = [
    {"text": "the rank of", "answer": "a tree"}, {"text": "so that no", "answer": "one"}, {"text": "who", "answer": "was"},
    {"text": f"{WORDS}. {WORDS}", "answer": "yes"},
]
TASKS = {
    "small_choices": (CHOICES, {
        "output_type": "multiple_choice", "doc_to_text": "{{question}}", "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer", "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }),
    "small_texts": (TEXTS, {
        "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    }),
    "small_answers": (ANSWERS, {
        "output_type": "generate_until", "doc_to_text": "{{text}}", "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["in", "."], "max_gen_toks": 12, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    }),
}
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SMALL = ["--model.num_layers=2", "--model.model_dim=64", "--model.seq_len=64", "--train.steps=40", "--train.threads=1",
         "--train.device=cpu"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with task files, a run and its export, and the folder of a model with BOS and a chat template."""
    needed("lm_eval", "lm-eval")
    out = tmp_path_factory.mktemp("tasks")
    (out / "tasks").mkdir()
    for name, (rows, task) in TASKS.items():
        file = out / "tasks" / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        about = {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(file)}},
                 "test_split": "test", "fewshot_split": "test"}
        (out / "tasks" / f"{name}.yaml").write_text(json.dumps(about | task))  # JSON is YAML
    shell = Shell(out)
    (out / "text.txt").write_text(f"{WORDS}. " * 60)
    assert shell.run("-m", "data_tools.prepare", "--source", "text.txt", "--tokenizer", "bpe:300", "--out", "shards").code == 0
    assert shell.run("-m", "mpidp.train", "--data.path=shards", "--run.dir=run", *SMALL).code == 0
    assert shell.run("-m", "mpidp.export", "run", "--out", "exported").code == 0
    with_bos(out / "folder")
    return out


def with_bos(folder: Path) -> None:
    import torch
    import transformers

    names = {"bos_token": "<s>", "eos_token": "<|im_end|>"}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": CHATML}
    model_folder(folder, bos=True, tokenizer_config__json=config | names)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ends = [tokenizer.convert_tokens_to_ids(name) for name in ("<|endoftext|>", "<|im_end|>")]
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        max_position_embeddings=96, vocab_size=len(tokenizer), bos_token_id=tokenizer.bos_token_id, eos_token_id=ends))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3) if parameter.dim() > 1 else parameter.fill_(1.0)
    model.save_pretrained(folder)


def theirs(place: Path, folder: str, **options: Any) -> dict[str, Any]:
    """The results of lm-eval's own model type."""
    lm_eval = needed("lm_eval", "lm-eval")
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(place / "tasks"), include_defaults=False)
    found: dict[str, Any] = lm_eval.simple_evaluate(
        "hf", {"pretrained": str(place / folder), "dtype": "float32"}, list(TASKS), device="cpu", batch_size=1,
        bootstrap_iters=0, task_manager=manager, **options,
    )
    return found


def ours(place: Path, model: str, ranks: int, *words: object) -> dict[str, Any]:
    """What `mpidp evaluate` writes on this many ranks."""
    out = place / f"{model}{ranks}.json"
    ended = Shell(place).run("-m", "mpidp.evaluate", model, "--tasks", ",".join(TASKS), "--tasks-dir", "tasks", "--threads=1",
                             "--device=cpu", "--out", out, *words, ranks=ranks, HF_HUB_OFFLINE="1")
    assert ended.code == 0, ended
    assert "bits_per_byte" in ended.out
    return json.loads(out.read_text())


def compare(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    for name, items in wanted["samples"].items():
        assert len(found["samples"][name]) == len(items)
        for mine, item in zip(found["samples"][name], items, strict=True):
            assert (mine["doc_id"], mine["prompt_hash"]) == (item["doc_id"], item["prompt_hash"])
            for answer, expected in zip(mine["resps"], item["resps"], strict=True):
                if name == "small_choices":
                    assert answer[0][0] == pytest.approx(expected[0][0], abs=1e-4) and answer[0][1] == expected[0][1]
                else:
                    assert answer[0] == (expected[0] if name == "small_answers" else pytest.approx(expected[0], rel=1e-6))
        for metric, value in wanted["results"][name].items():
            if isinstance(value, float) and math.isfinite(value):
                assert found["results"][name][metric] == pytest.approx(value, rel=1e-5), (name, metric)


def test_a_run_has_the_figures_of_its_export_on_any_number_of_ranks(place: Path) -> None:
    found = ours(place, "run", 1)
    assert ours(place, "run", 3) == found
    compare(found, theirs(place, "exported"))


def test_a_folder_with_bos_has_the_figures_of_lm_eval(place: Path) -> None:
    compare(ours(place, "folder", 1), theirs(place, "folder"))


def test_chats_with_examples(place: Path) -> None:
    found = ours(place, "folder", 3, "--chat", "--system", "Be kind.", "--few-shot", "1", "--limit", "3")
    assert all(len(items) == 3 for items in found["samples"].values())
    compare(found, theirs(place, "folder", num_fewshot=1, limit=3, apply_chat_template=True, system_instruction="Be kind."))


def test_wrong_tasks_are_refused_on_all_ranks(place: Path) -> None:
    shell = Shell(place)
    (place / "code").mkdir()
    (place / "code" / "one.yaml").write_text("task: one\ndataset_path: json\ndoc_to_text: !function helpers.text\n")
    (place / "broken").mkdir()
    (place / "broken" / "one.yaml").write_text("task: [one\n")
    (place / "empty").mkdir()
    for words, code, phrase in [
        (["--tasks", "one", "--tasks-dir", "code"], 2, "one.yaml names Python code (helpers.text)"),
        (["--tasks", "one", "--tasks-dir", "broken"], 3, "one.yaml is not a readable YAML file"),
        (["--tasks", "one", "--tasks-dir", "empty"], 2, "it has no task file"),
    ]:
        expect(shell.run("-m", "mpidp.evaluate", "run", *words, ranks=2), code, phrase)


def test_evaluation_during_training(place: Path) -> None:
    """The figures are those of `mpidp evaluate`, on any number of ranks, and the weights are the same as without evaluation.
    Tasks that cannot be evaluated do not stop the run."""
    shell, lines = Shell(place), dict[str, list[dict[str, Any]]]()
    tasks = [f"--train.eval_tasks={','.join(TASKS)}", "--train.eval_tasks_dir=tasks", "--train.eval_every=20"]
    for name, words, ranks in [("plain", [], 1), ("one", tasks, 1), ("three", tasks, 3),
                               ("short", [*tasks, "--model.seq_len=10"], 2)]:
        ended = shell.run("-m", "mpidp.train", "--data.path=shards", f"--run.dir={name}", *SMALL, *words, ranks=ranks)
        assert ended.code == 0, ended
        assert ended.said.count("train.eval_tasks cannot be evaluated: ") == (2 if name == "short" else 0), ended
        lines[name] = [json.loads(line) for line in (place / name / "metrics.jsonl").read_text().splitlines()]
    ends = {name: found[-1]["weights_sha256"] for name, found in lines.items()}
    assert ends["plain"] == ends["one"] == ends["three"]
    figures = {name: [{k: v for k, v in line.items() if "/" in k} for line in found if "val_tokens" in line]
               for name, found in lines.items()}
    assert len(figures["one"]) == 2 and figures["one"] == figures["three"] and not any(figures["plain"] + figures["short"])
    evaluated = shell.run("-m", "mpidp.evaluate", "one", "--tasks", ",".join(TASKS), "--tasks-dir", "tasks", "--threads=1",
                          "--device=cpu", "--json")
    wanted = json.loads(evaluated.out)["tasks"]
    assert figures["one"][-1] == {f"{task}/{metric}": value for task, of in wanted.items() for metric, value in of.items()
                                  if metric != "sample_len"}
