#!/usr/bin/env bash
# sbatch clusters/slurm.sh examples/dolly_flex.yaml [KEY=VALUE]...
#
# A Ray cluster inside one Slurm job: a head on the first node, a worker on each of the others, one run, and everything ends with the job.
# fedgraft is installed in VENV, on a file system that all nodes share; runs lie in RUNS, which they share, too.
#SBATCH --job-name=fedgraft
#SBATCH --nodes=3
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --gpus-per-node=1
#SBATCH --time=12:00:00
set -euo pipefail

VENV=${VENV:-$HOME/fedgraft/.venv}
RUNS=${RUNS:-$HOME/fedgraft-runs}
PORT=${PORT:-6379}
# One secret for this job's Ray only: another user of a node must not talk to it.
export RAY_AUTH_MODE=token
RAY_AUTH_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')
export RAY_AUTH_TOKEN RAY_USAGE_STATS_ENABLED=0

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
address=$(srun --nodes=1 --ntasks=1 -w "${nodes[0]}" hostname --ip-address | awk '{print $1}')

srun --nodes=1 --ntasks=1 -w "${nodes[0]}" \
    "$VENV/bin/ray" start --head --block --node-ip-address="$address" --port="$PORT" --dashboard-host=127.0.0.1 \
    --num-cpus="$SLURM_CPUS_PER_TASK" &
for attempt in $(seq 60); do
    "$VENV/bin/ray" status --address="$address:$PORT" >/dev/null 2>&1 && break
    [ "$attempt" -lt 60 ] || { echo "the Ray head on ${nodes[0]} did not start within 5 minutes" >&2; exit 3; }
    sleep 5
done
for node in "${nodes[@]:1}"; do
    srun --nodes=1 --ntasks=1 -w "$node" \
        "$VENV/bin/ray" start --block --address="$address:$PORT" --num-cpus="$SLURM_CPUS_PER_TASK" &
done

# srun's steps end with the job, whatever the run's exit code is; a run that was cut off goes on with: fedgraft run --resume.
RAY_ADDRESS="$address:$PORT" "$VENV/bin/fedgraft" run "$@" "output.folder=$RUNS"
