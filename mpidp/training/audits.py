"""Audits in the training loop: compares the replicas, and reports differences."""

from __future__ import annotations

from mpidp.errors import Damaged
from mpidp.faults.audit import AuditFinding
from mpidp.training.job import Job


def audit_weights(job: Job, now: bool = False) -> None:
    """If an audit is due, check that all replicas hold the same parameters and optimizer state, and repair the replicas that
    differ from the majority. `now`: whether to check at this step even if no audit is due (only with train.audit_every above
    0). Raises Damaged if a repair is not possible. Collective over job.comm."""
    step = job.position.step
    if not now:
        job.services.faults.flip(step, list(job.engine.model.parameters()))
    if not (job.audit.due(step) or (now and job.audit.every)):
        return
    finding = job.audit.weights()
    if finding is None:
        return
    report_finding(job, step, finding, "repaired" if finding.repaired else "the run returns to the last checkpoint")
    if not finding.repaired:
        raise Damaged.on_every_rank(f"step {step}: ranks {finding.ranks}: {finding.what}")


def report_finding(job: Job, step: int, finding: AuditFinding, action: str) -> None:
    """Write a finding to metrics.jsonl and print it. `step`: the audited step. `action`: a description of what the run does
    next. Independent."""
    job.record.write({"event": "audit", "step": job.position.step, "of_step": step, "ranks": finding.ranks, "what": finding.what,
                      "then": action})
    job.services.progress.print(f"step {step}  audit: ranks {finding.ranks}: {finding.what}; {action}")
