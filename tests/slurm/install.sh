#!/usr/bin/env bash
# Put Debian's SLURM on this machine for tests/slurm; says why and leaves with 0 where it cannot.
set -euo pipefail
if command -v slurmctld > /dev/null && command -v slurmd > /dev/null && command -v sbatch > /dev/null; then
    exit 0
fi
if ! command -v apt-get > /dev/null; then
    echo "SLURM is not installed (no apt-get here): tests/slurm will be skipped"
    exit 0
fi
if [ "$(id -u)" -ne 0 ]; then
    echo "SLURM is not installed (needs root): tests/slurm will be skipped;" \
        "sudo apt-get install --no-install-recommends slurmctld slurmd slurm-client"
    exit 0
fi
export DEBIAN_FRONTEND=noninteractive
install() { apt-get install --quiet=2 --no-install-recommends slurmctld slurmd slurm-client > /dev/null; }
# The lists of packages may be old or missing; refreshing them is only worth its time then.
install 2> /dev/null || { apt-get update --quiet=2 && install; } ||
    echo "SLURM could not be installed: tests/slurm will be skipped"
