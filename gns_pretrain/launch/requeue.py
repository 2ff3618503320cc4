"""The end of a SLURM job's start, for its batch script: `... -m gns_pretrain.launch.requeue CODE`.

CODE is srun's. Saved after a signal: start again. Failed: say whose error it was, and start again,
at most N times. Finished, or a mistake that another start would repeat: nothing.
"""

import argparse
import os
import shutil
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

from gns_pretrain.launch.crash_report import Report, read_words
from gns_pretrain.runs.history import has_ended, note_end
from gns_pretrain.system.processes import EXIT_STOPPED
from gns_pretrain.system.slurm import Job, job_state, requeue

FAILURES = "failures.log"  # in the job's folder, one line a failed start
# Of a rank that was asked to end while it was still starting, as the shell has it.
EXIT_EARLY = {128 + number for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)}
WOULD_FAIL_AGAIN = {2: "a setting or a file has to be mended", 3: "the run cannot go on by itself"}


@dataclass(frozen=True)
class Decision:
    """Whether to start the job again, and the line that says why."""

    again: bool
    why: str


def decide(code: int, *, state: str | None, failures: int, at_most: int) -> Decision:
    """What to do after srun has ended.

    Args:
        code: srun's.
        state: of the job, from SLURM: a job that somebody cancelled, or that SLURM requeues
            itself, is not RUNNING any more.
        failures: starts of this job that have failed, this one included.
        at_most: how often a failed job is started again.
    """
    if code == 0:
        return Decision(False, "finished")
    if code in WOULD_FAIL_AGAIN:
        return Decision(False, f"not started again: {WOULD_FAIL_AGAIN[code]}")
    if state != "RUNNING":
        return Decision(False, f"not started again from here: SLURM says {state}")
    if code == EXIT_STOPPED:
        return Decision(True, "saved, and started again from there")
    if failures > at_most:
        return Decision(
            False, f"not started again: failed {failures} times, at most {at_most} are mended"
        )
    return Decision(
        True, f"failed, and started again from the last checkpoint: {failures} of at most {at_most}"
    )


def main() -> int:
    """Say what happened, and requeue where that helps; exit code 0."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("code", type=int, help="exit code of srun")
    parser.add_argument("--at-most", type=int, default=3, help="starts after a failure (3)")
    arguments = parser.parse_args()
    job = Job.current()
    if job is None or job.folder is None:
        return 0
    if arguments.code == 0:
        shutil.rmtree(job.folder, ignore_errors=True)  # nobody has to be told anything
        return 0
    code, failures = arguments.code, 0
    report = read_words(job.folder)
    if code in EXIT_EARLY and not report.ranks:
        code = EXIT_STOPPED
    if code != EXIT_STOPPED:
        tell(job, code, report)
        failures = count_failure(job.folder.parent / FAILURES, report.cause)
        if report.run_directory is not None and not has_ended(report.run_directory):
            note_end(report.run_directory, "failed", report.cause)
    decision = decide(code, state=job_state(job.id), failures=failures, at_most=arguments.at_most)
    say(f"job {job.id}: {decision.why}")
    if decision.again and not requeue(job.id):
        say(f"job {job.id}: SLURM refused to requeue it; start the same command again")
    return 0


def tell(job: Job, code: int, report: Report) -> None:
    """The failure, its cause first."""
    say(f"\n==== job {job.id}, start {job.starts}: failed with code {code} ====\n{report.text}\n")


def count_failure(path: Path, cause: str) -> int:
    """Note a failure; returns how many there are by now."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(cause + os.linesep)
    return len(path.read_text().splitlines())


def say(text: str) -> None:
    """Into the job's log."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
