#!/bin/bash
# One run on all hosts of a Cloud TPU VM slice, over ssh:
#
#   scripts/launch/tpu_vm.sh NAME ZONE dense_1b gs://BUCKET/dense_1b --mesh.fsdp 16
#
# The code must be installed on every host (~/sparse_lm with its .venv). The hosts find each other through the TPU's metadata
# (--distributed.cluster gcetpu). They share no disk, so checkpoints go to a bucket, every host prepares the data for itself (the run
# refuses to start if their hashes differ), and metrics.jsonl and the report are written on host 0.
#
# Each host starts its process again as long as that ends with 75 (saved, or another host died) or was killed; they meet again within
# --distributed.connect-timeout-s. Spot slices that are gone have to be made anew (gcloud compute tpus tpu-vm create ...) before this
# script is started again; the run goes on after its last finished save.

set -u
name=${1:?usage: tpu_vm.sh NAME ZONE RECIPE BUCKET_DIRECTORY [options of scripts/pretrain.py]}
zone=${2:?zone}
recipe=${3:?recipe}
bucket=${4:?gs://... directory of the run}
shift 4

# Rows of experts travel beside other work only with this flag (docs/scale.md).
overlap="LIBTPU_INIT_ARGS=--xla_tpu_enable_async_ragged_all_to_all=true"
train="cd ~/sparse_lm && $overlap .venv/bin/python scripts/pretrain.py $recipe --run-dir runs/$recipe"
train="$train --checkpoint.directory $bucket/checkpoints --distributed.cluster gcetpu $*"

again="while :; do $train; code=\$?; [ \$code -eq 75 ] || [ \$code -ge 128 ] || exit \$code; sleep 30; done"
exec gcloud compute tpus tpu-vm ssh "$name" --zone "$zone" --worker=all --command "$again"
