#!/bin/bash
# Independent runs, one Slurm array task each, on one GPU; here the seeds of one recipe:
#
#   sbatch --array=0-4 scripts/launch/slurm_array.sh dense_400m --optimizer.learning-rate 1e-3
#
# The tasks do not talk to each other: each is a run of one process. To sweep something else, change the line with `seed`.

#SBATCH --job-name=sparse_lm_array
#SBATCH --array=0-3
#SBATCH --ntasks=1
#SBATCH --gpus=1
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%A_%a.out
#SBATCH --signal=TERM@300

set -u
recipe=${1:?usage: sbatch --array=0-4 slurm_array.sh RECIPE [options of scripts/pretrain.py]}
shift
seed=$SLURM_ARRAY_TASK_ID

# --distributed.cluster none: JAX must not take the tasks of the array for the processes of one run.
srun "${PYTHON:-python}" scripts/pretrain.py "$recipe" --run-dir "runs/$recipe-seed$seed" --seed "$seed" \
    --distributed.cluster none "$@"
code=$?

# 75: saved, or another task died; 128 and more: a task was killed. Errors of the run itself (1, 2) would only be met again.
if [ "$code" -eq 75 ] || [ "$code" -ge 128 ]; then
    echo "resumable ($code): back into the queue"
    scontrol requeue "${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}"
fi
exit "$code"
