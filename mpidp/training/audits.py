"""Audits of replicas in the training loop."""

from __future__ import annotations

from mpidp.errors import Damaged
from mpidp.faults.audit import AuditFinding
from mpidp.training.job import Job


def audit_weights(job: Job, now: bool = False) -> None:
    """Where it is due, or now: do all replicas hold the same bits? Damaged when they do not and no majority knows better.
    Collective over job.comm."""
    step = job.position.step
    if not now:
        job.faults.flip(step, list(job.engine.model.parameters()))
    if not (job.audit.due(step) or (now and job.audit.every)):
        return
    finding = job.audit.weights()
    if finding is None:
        return
    say_finding(job, step, finding, "repaired" if finding.repaired else "back to the last checkpoint")
    if not finding.repaired:
        raise Damaged.on_every_rank(f"step {step}: ranks {finding.ranks}: {finding.what}")


def say_finding(job: Job, step: int, finding: AuditFinding, then: str) -> None:
    """Of an audit: to people and to metrics.jsonl. Independent."""
    job.record({"event": "audit", "step": job.position.step, "of_step": step, "ranks": finding.ranks, "what": finding.what,
                "then": then})
    job.progress.print(f"step {step}  audit: ranks {finding.ranks}: {finding.what}; {then}")
