#!/bin/bash
# One run on several Slurm nodes, one task a GPU:
#
#   sbatch --nodes=4 scripts/launch/slurm_multi_node.sh dense_1b --mesh.fsdp 8
#
# What follows the script's name goes to scripts/pretrain.py. JAX reads the number of tasks, this task's number and the address of
# the first node from Slurm (--distributed.cluster slurm); no address has to be written down.
#
# Slurm sends SIGTERM to all tasks before it takes the nodes away: the run saves and exits with 75. A task that dies makes the others
# exit with 75 within --distributed.peer-timeout-s, with its name in their output. Both put the job back into the queue (see the end),
# and the job goes on after its last finished save.

#SBATCH --job-name=sparse_lm
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.out
# Five minutes before the end of the time: longer than a step and a save take.
#SBATCH --signal=TERM@300

set -u
recipe=${1:?usage: sbatch slurm_multi_node.sh RECIPE [options of scripts/pretrain.py]}
shift

# The run directory and data.directory must be on a disk that all nodes see.
srun --kill-on-bad-exit=0 --wait=0 \
    "${PYTHON:-python}" scripts/pretrain.py "$recipe" --run-dir "runs/$recipe" --distributed.cluster slurm "$@"
code=$?

# 75: saved, or another task died; 128 and more: a task was killed. Errors of the run itself (1, 2) would only be met again.
if [ "$code" -eq 75 ] || [ "$code" -ge 128 ]; then
    echo "resumable ($code): back into the queue"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
