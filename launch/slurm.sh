#!/usr/bin/env bash
# Train under Slurm, one launch/train.sh per node. From the repository's root (or with ITHACA_ROOT
# set):
#
#   sbatch --nodes 4 launch/slurm.sh --config FILE [--flags]
#
# Give --save on a file system that all nodes see: a requeued job goes on from its last checkpoint.
# Partition, account and quality of service are flags of sbatch, before the script's name.
#
#   CONTAINER_IMAGE   run in this container (pyxis: srun --container-image), with its own packages
#   CONTAINER_MOUNTS  further folders in it, as pyxis writes them: /data:/data,/shared:/shared
#SBATCH --job-name=ithaca
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
# Ask to save and stop this many seconds before the time limit: more than GRACE below.
#SBATCH --signal=USR1@300
set -uo pipefail

# Slurm runs a copy of this script, so its own place says nothing.
export ITHACA_ROOT=${ITHACA_ROOT:-$SLURM_SUBMIT_DIR}
if [[ ! -f $ITHACA_ROOT/launch/train.sh ]]; then
  echo "slurm.sh: no launch/train.sh in $ITHACA_ROOT." \
    "Submit from the repository's root or set ITHACA_ROOT." >&2
  exit 2
fi
container=()
if [[ -n ${CONTAINER_IMAGE:-} ]]; then
  mounts="$ITHACA_ROOT:$ITHACA_ROOT,$PWD:$PWD${CONTAINER_MOUNTS:+,$CONTAINER_MOUNTS}"
  container=(--container-image "$CONTAINER_IMAGE" --container-mounts "$mounts"
    --container-workdir "$PWD")
  export ITHACA_PYTHON=${ITHACA_PYTHON:-python3}  # the image has the packages
else
  # Once, before all nodes look at the same folder.
  bash "$ITHACA_ROOT/launch/setup.sh" || exit 1
fi

NNODES=$SLURM_JOB_NUM_NODES
GRACE=${GRACE:-240}
export NNODES GRACE
if [[ $NNODES -gt 1 ]]; then
  MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  # Another port for another job, in case two share a node. By default Linux gives those from 32768
  # to connections.
  MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 12000))}
  export MASTER_ADDR MASTER_PORT
fi

# srun passes Slurm's signals to each train.sh. One node that ends early must not cut off the
# others' save, so nothing is killed on a bad exit, and the rest gets GRACE and a little to follow.
# shellcheck disable=SC2016  # SLURM_NODEID is each task's own
srun --nodes "$NNODES" --ntasks-per-node 1 --kill-on-bad-exit=0 --wait $((GRACE + 60)) \
  ${container[@]+"${container[@]}"} \
  bash -c 'NODE_RANK=$SLURM_NODEID exec bash "$ITHACA_ROOT/launch/train.sh" "$@"' train.sh "$@"
code=$?

if [[ $code -eq 75 ]]; then
  echo "slurm.sh: stopped with its state saved; requeueing"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
