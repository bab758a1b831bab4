"""Laws of evaluation tasks: tasks that cannot be evaluated are found before the weights are loaded, and the files that a folder
of tasks includes are checked like its own."""

from __future__ import annotations

from pathlib import Path

import pytest

import mpidp.training.build
from mpidp.errors import DataError, UsageError
from mpidp.inference.tasks import _check_folder
from tests.tiny import at, corpus, job_at, tiny


def test_a_missing_harness_or_task_is_found_before_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_late(*_: object) -> None:
        raise AssertionError("the weights are loaded first")

    monkeypatch.setattr(mpidp.training.build, "make_model", too_late)
    (tmp_path / "tasks").mkdir()
    train = {"eval_tasks": "no_such_task", "eval_tasks_dir": str(tmp_path / "tasks")}
    config = tiny(corpus(tmp_path), tmp_path / "run", train=train)
    with pytest.raises(UsageError, match=r"need lm-eval|no task file"):
        at(1, lambda comm: job_at(comm, config))


INCLUDES = {
    "one file": "include: ../other/code.yaml",
    "the last of a list": "include: [../other/plain.yaml, plain.yaml, ../other/code.yaml]",
    "an alias": "metadata: {file: &it ../other/code.yaml}\ninclude: *it",
    "an alias of a list": "metadata: &them [plain.yaml, ../other/code.yaml]\ninclude: *them",
    "an alias of the key": "metadata: {file: &it include}\n*it : ../other/code.yaml",
    "a merged mapping": "base: &base {include: ../other/code.yaml}\n<<: *base",
    "a file of a file": "include: [plain.yaml, ../other/chain.yaml]",
    "a file next to a linked file": "include: link.yaml",
    "an alias that contains itself": "metadata: &it [*it]\ninclude: [plain.yaml, ../other/code.yaml]",
}


@pytest.mark.parametrize("name", INCLUDES)
def test_code_in_any_included_file_needs_permission(tmp_path: Path, name: str) -> None:
    """No harness is needed: the files are checked before it reads them."""
    pytest.importorskip("yaml")
    for place, text in {
        "tasks/it.yaml": f"task: it\n{INCLUDES[name]}\n", "tasks/plain.yaml": "task: plain\n", "other/plain.yaml": "tag: x\n",
        "other/code.yaml": "doc_to_text: !function helpers.text\n", "other/chain.yaml": "include: [plain.yaml, code.yaml]\n",
    }.items():
        (tmp_path / place).parent.mkdir(exist_ok=True)
        (tmp_path / place).write_text(text)
    if "link" in name:
        (tmp_path / "tasks/link.yaml").symlink_to("../other/chain.yaml")
    with pytest.raises(UsageError, match=r"other/code.yaml names Python code \(helpers.text\).* only with --allow-code"):
        _check_folder(tmp_path / "tasks", code=False)
    _check_folder(tmp_path / "tasks", code=True)
    (tmp_path / "other/code.yaml").write_text("include: code.yaml\n")  # a file that includes itself
    _check_folder(tmp_path / "tasks", code=False)


@pytest.mark.parametrize(("text", "words"), [
    ("a: !function [helpers.text]", r"names Python code \(!function\)"), ("a: !!python/name:os.sep x", "names Python code"),
])
def test_code_that_is_no_text_needs_permission(tmp_path: Path, text: str, words: str) -> None:
    pytest.importorskip("yaml")
    (tmp_path / "it.yaml").write_text(text)
    with pytest.raises(UsageError, match=words):
        _check_folder(tmp_path, code=False)


@pytest.mark.parametrize("text", ["[" * 1500 + "]" * 1500, "a: [", "a: 1\n---\na: 2\n", "*unknown"])
def test_a_file_that_cannot_be_checked_is_refused(tmp_path: Path, text: str) -> None:
    pytest.importorskip("yaml")
    (tmp_path / "it.yaml").write_text(text)
    with pytest.raises(DataError, match="it.yaml is not a readable YAML file"):
        _check_folder(tmp_path, code=False)
