"""A SLURM of its own: slurmctld and two slurmd on this machine, as this user, without munge.

Each fake node says that it has 8 GPUs; what stands for them are ordinary device files.
"""

import getpass
import os
import re
import shutil
import socket
import subprocess
import time
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

NODES = ("n1", "n2")
GPUS_PER_NODE = 8
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol")
START_SECONDS = 20
LOOK_SECONDS = 0.5  # each look costs a process, on cores that the jobs need
JOB_SECONDS = 200  # several starts of a job, on cores that others use too
# SLURM sets CUDA_VISIBLE_DEVICES for gres that have files; 8 files for 8 GPUs.
DEVICES = "/dev/null,/dev/zero,/dev/full,/dev/random,/dev/urandom,/dev/tty,/dev/ptmx,/dev/kmsg"

CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
CredType=cred/none
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
ReturnToService=2
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,sched_min_interval=100000
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
KillWait=5
{nodes}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=gpu Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=30
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=2 PreemptMode=OFF
"""


def missing() -> str | None:
    """Why no SLURM can be started here; None if one can."""
    absent = [program for program in PROGRAMS if which(program) is None]
    return f"{', '.join(absent)} not installed; run tests/slurm/install.sh" if absent else None


def which(program: str) -> str | None:
    """The program's path; the daemons live where only root's PATH looks."""
    return shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


@dataclass
class Cluster:
    """The running daemons, and what the tests do with them."""

    folder: Path
    processes: list[subprocess.Popen] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.environment = os.environ | {"SLURM_CONF": str(self.folder / "slurm.conf")}

    def start(self) -> None:
        """Write the configuration, start the daemons, wait until both nodes are idle."""
        (self.folder / "state").mkdir()
        ports = free_ports(1 + len(NODES))
        host = socket.gethostname().split(".")[0]
        nodes = "\n".join(
            f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=8 "
            f"Gres=gpu:h100:{GPUS_PER_NODE} State=UNKNOWN"
            for node, port in zip(NODES, ports[1:], strict=True)
        )
        (self.folder / "slurm.conf").write_text(
            CONFIGURATION.format(
                host=host, ports=ports, user=getpass.getuser(), folder=self.folder, nodes=nodes
            )
        )
        (self.folder / "gres.conf").write_text(
            f"NodeName={','.join(NODES)} Name=gpu Type=h100 File={DEVICES}\n"
        )
        self._daemon("slurmctld", "-D", "-c")
        for node in NODES:
            self._daemon("slurmd", "-D", "-N", node)
        deadline = time.monotonic() + START_SECONDS
        while self.ask("sinfo", "-h", "-o", "%T %D", check=False).strip() != f"idle {len(NODES)}":
            if time.monotonic() > deadline:
                raise RuntimeError(f"no idle nodes after {START_SECONDS} s: {self.last_words()}")
            time.sleep(0.1)

    def _daemon(self, program: str, *options: str) -> None:
        path = which(program)
        assert path is not None
        log = (self.folder / f"{program}{options[-1]}.out").open("w")
        self.processes.append(
            subprocess.Popen([path, *options], env=self.environment, stdout=log, stderr=log)
        )

    def stop(self) -> None:
        """Cancel what runs, wait for its end and end the daemons."""
        self.ask("scancel", f"--user={getpass.getuser()}", check=False)
        deadline = time.monotonic() + START_SECONDS
        while self.ask("squeue", "--noheader", check=False) and time.monotonic() < deadline:
            time.sleep(LOOK_SECONDS)
        for process in reversed(self.processes):
            process.terminate()
        for process in self.processes:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def last_words(self) -> str:
        """The end of the daemons' logs."""
        logs = (path for path in sorted(self.folder.glob("*.log")) if path.is_file())
        return " | ".join(f"{path.name}: {path.read_text()[-400:]}" for path in logs)

    def ask(self, *command: str, check: bool = True) -> str:
        """What one of SLURM's commands answers."""
        answer = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, check=False, timeout=30
        )
        assert not check or answer.returncode == 0, f"{command}: {answer.stderr}"
        return answer.stdout

    def submit(self, *words: str, cwd: Path, **environment: str) -> str:
        """sbatch; returns the job's id."""
        answer = subprocess.run(
            ["sbatch", "--parsable", *words],
            env=self.environment | environment,
            cwd=cwd,
            capture_output=True,
            text=True,
            check=False,
            timeout=30,
        )
        assert answer.returncode == 0, answer.stderr
        return answer.stdout.strip()

    def jobs(self) -> dict[str, dict[str, str]]:
        """What SLURM knows of each job, by id; of an array's element by `<array>_<element>` too."""
        known = {}
        for line in self.ask("scontrol", "-o", "show", "job").splitlines():
            job = dict(re.findall(r"(\S+?)=(\S*)", line))
            known[job["JobId"]] = job
            if "ArrayJobId" in job:
                known[f"{job['ArrayJobId']}_{job['ArrayTaskId']}"] = job
        return known

    def look(self) -> dict[str, dict[str, str]]:
        """The same, and a requeued job need not wait its two minutes."""
        known = self.jobs()
        for job in known.values():
            if job.get("Reason") == "BeginTime" and starts_in(job) > 3:
                # In the same second the node would still hold the job for cancelled.
                number = f"JobId={job['JobId']}"
                self.ask("scontrol", "update", number, "StartTime=now+2", check=False)
        return known

    def wait(self, job_id: str, *states: str) -> dict[str, str]:
        """Wait for a job to reach one of these states."""
        deadline = time.monotonic() + JOB_SECONDS
        while (job := self.look()[job_id])["JobState"] not in states:
            assert time.monotonic() < deadline, f"job {job_id} is {job['JobState']}: {job}"
            time.sleep(LOOK_SECONDS)
        return job


def starts_in(job: dict[str, str]) -> float:
    """Seconds until SLURM may start a job that waits for its time."""
    return (datetime.fromisoformat(job["EligibleTime"]) - datetime.now()).total_seconds()


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now."""
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports
