"""The end of a SLURM job's start, for its batch script: `... -m gns_pretrain.launch.requeue CODE`.

CODE is srun's. A run that was saved after a signal is requeued. One that failed is reported, root
cause first, and requeued at most N times. One that finished, or would fail again, is not.
"""

import argparse
import shutil
import signal
import sys

from gns_pretrain.errors import EXIT_BAD_INPUT, EXIT_FINISHED, EXIT_STOPPED, EXIT_TRAINING
from gns_pretrain.launch.crash_report import read_crash_reports
from gns_pretrain.runs.history import append_end, read_starts
from gns_pretrain.system.slurm import SlurmJob, job_state, requeue
from gns_pretrain.system.terminal import write

FAILURES = "failures.log"  # in the job's folder, one line a failed start
# Of a rank that got a signal while it was still starting, as the shell has it.
EXIT_EARLY = {128 + number for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)}
WOULD_FAIL_AGAIN = {
    EXIT_BAD_INPUT: "a setting or a file has to be mended",
    EXIT_TRAINING: "the run cannot continue by itself",
}


def decide(code: int, *, state: str | None, failures: int, at_most: int) -> tuple[bool, str]:
    """Whether to requeue the job, and the line that says why.

    Args:
        code: srun's.
        state: of the job, from SLURM: one that was cancelled, or that SLURM requeues itself, is
            not RUNNING any more.
        failures: starts of this job that have failed, this one included.
        at_most: how often a failed job is requeued.
    """
    if code == EXIT_FINISHED:
        return False, "finished"
    if code in WOULD_FAIL_AGAIN:
        return False, f"not requeued: {WOULD_FAIL_AGAIN[code]}"
    if state != "RUNNING":
        return False, f"not requeued from here: SLURM says {state}"
    if code == EXIT_STOPPED:
        return True, "saved, and requeued to resume from there"
    if failures > at_most:
        return False, f"not requeued: failed {failures} times, at most {at_most} are allowed"
    return True, f"failed, and requeued from the last checkpoint: {failures} of at most {at_most}"


def main() -> int:
    """Report what happened, and requeue where that helps; exit code 0."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("code", type=int, help="exit code of srun")
    parser.add_argument("--at-most", type=int, default=3, help="starts after a failure (3)")
    arguments = parser.parse_args()
    job = SlurmJob.current()
    if job is None or job.folder is None:
        return 0
    if arguments.code == EXIT_FINISHED:
        shutil.rmtree(job.folder, ignore_errors=True)  # nothing to report
        return 0
    code, failures = arguments.code, 0
    summary = read_crash_reports(job.folder)
    if code in EXIT_EARLY and not summary.ranks:
        code = EXIT_STOPPED
    if code != EXIT_STOPPED:
        header = f"==== job {job.id}, start {job.starts}: failed with code {code} ===="
        write(f"\n{header}\n{summary.text}\n")
        log = job.folder.parent / FAILURES
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a") as file:
            file.write(summary.cause + "\n")
        failures = len(log.read_text().splitlines())
        if (directory := summary.run_directory) is not None:
            events = read_starts(directory)
            if not events or events[-1]["event"] != "end":
                append_end(directory, "failed", summary.cause)
    again, why = decide(code, state=job_state(job.id), failures=failures, at_most=arguments.at_most)
    write(f"job {job.id}: {why}")
    if again and not requeue(job.id):
        write(f"job {job.id}: SLURM refused to requeue it; start the same command again")
    return 0


if __name__ == "__main__":
    sys.exit(main())
