"""Audits in the training loop. They compare the replicas, and report differences."""

from __future__ import annotations

from mpidp.errors import Damaged
from mpidp.faults.audit import AuditFinding
from mpidp.training.job import Job


def audit_weights(job: Job, now: bool = False) -> None:
    """If an audit is due, or if `now` is true, check that all replicas hold the same bits. Raises Damaged if they differ and no
    majority of them is equal. Collective over job.comm."""
    step = job.position.step
    if not now:
        job.services.faults.flip(step, list(job.engine.model.parameters()))
    if not (job.audit.due(step) or (now and job.audit.every)):
        return
    finding = job.audit.weights()
    if finding is None:
        return
    report_finding(job, step, finding, "repaired" if finding.repaired else "back to the last checkpoint")
    if not finding.repaired:
        raise Damaged.on_every_rank(f"step {step}: ranks {finding.ranks}: {finding.what}")


def report_finding(job: Job, step: int, finding: AuditFinding, action: str) -> None:
    """Write the finding to metrics.jsonl and print it. Independent."""
    job.record.write({"event": "audit", "step": job.position.step, "of_step": step, "ranks": finding.ranks, "what": finding.what,
                      "then": action})
    job.services.progress.print(f"step {step}  audit: ranks {finding.ranks}: {finding.what}; {action}")
