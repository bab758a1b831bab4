"""Checks the #SBATCH lines of a job script. Pure."""

from __future__ import annotations

import shlex
from collections.abc import Iterator

from mpidp.doctor.findings import CheckResult

GPU_OPTIONS = ("--gpus-per-node", "--gpus", "--gpus-per-task", "--gpus-per-socket")
SHORT = {"-G": "--gpus"}


def check_job_script(text: str, name: str) -> CheckResult:
    """Check that a job script requests GPUs only once. For Slurm, --gres=gpu and --gpus-per-node are two requests. `text`: the
    contents of the script. `name`: the name of the script. The result names it. Pure."""
    given = dict(sbatch_options(text))
    gres = [one for one in given.get("--gres", "").split(",") if one.partition(":")[0] == "gpu"]
    others = [f"{option}={given[option]}" for option in GPU_OPTIONS if option in given]
    if gres and others:
        same = others[0].rpartition("=")[0] == "--gpus-per-node" and _count(gres[0]) == _count(f"gpu:{given['--gpus-per-node']}")
        words = f"{name}: --gres={gres[0]} and {others[0]} " + (
            "request the same GPUs twice" if same else "are two different requests for GPUs"
        )
        return CheckResult("job script", "warning", f"{words}; since 26.05 Slurm rejects a job with both",
                           f"remove --gres, and keep {others[0]}; if your site wants --gres, remove {others[0]}")
    requests = [*(f"--gres={one}" for one in gres), *others]
    return CheckResult("job script", "ok", f"{name}: {', '.join(requests) or 'no GPUs requested'}")


def sbatch_options(text: str) -> Iterator[tuple[str, str]]:
    """Yield (option, value) for the options on #SBATCH lines. Lines after the first command are ignored, as in Slurm. Pure."""
    for line in text.splitlines():
        if line.strip() and not line.startswith("#"):
            return
        if not line.startswith("#SBATCH"):
            continue
        try:
            words = shlex.split(line.removeprefix("#SBATCH"), comments=True)
        except ValueError:  # a quotation mark is not closed; sbatch reports this
            continue
        for i, word in enumerate(words):
            option, _, value = word.partition("=")
            if option.startswith("-"):
                after = words[i + 1] if not value and i + 1 < len(words) and not words[i + 1].startswith("-") else value
                yield SHORT.get(option, option), after


def _count(request: str) -> str:
    """Return the number of GPUs in a request, as a string. A request has the form gpu, gpu:N or gpu:TYPE:N. Without N, the number
    is 1."""
    last = request.rpartition(":")[2]
    return last if last.isdigit() else "1"
