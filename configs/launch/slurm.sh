#!/usr/bin/env bash
# sbatch --nodes=4 configs/launch/slurm.sh
#
# Multi-node training with vLLM servers on nodes of their own: the first SERVER_NODES nodes serve, one server a GPU, the
# others train, one process a GPU. Submit it from the repository's root, which every node has to see, and with
# OUTPUT_DIR on a shared file system. Submitted again, it goes on from the last checkpoint. How many nodes of each:
#   vlm-reason plan CONFIG --device h100 --devices 32 --nodes 4 --sampling-devices 16 engine.kind=vllm ...
#SBATCH --job-name=vlm-reason
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log
set -euo pipefail

export CONFIG="${CONFIG:-configs/recipes/vr_gsm8k.yaml}"
export OVERRIDES="${OVERRIDES:-model=Qwen/Qwen3-1.7B}"
export OUTPUT_DIR="${OUTPUT_DIR:-$PWD/runs/slurm}"
export GPUS="${GPUS:-8}" PORT="${PORT:-8000}" SHARDING="${SHARDING:-ddp}"
SERVER_NODES="${SERVER_NODES:-2}"

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
if ((SERVER_NODES < 1 || SERVER_NODES >= ${#nodes[@]})); then
  echo "SERVER_NODES is $SERVER_NODES of ${#nodes[@]} nodes: at least one has to serve and one to train" >&2
  exit 2
fi
servers=("${nodes[@]:0:SERVER_NODES}")
trainers=("${nodes[@]:SERVER_NODES}")
export SERVER_HOSTS="${servers[*]}" TRAIN_HOSTS="${trainers[*]}"

join() { local IFS=,; echo "$*"; }

srun --nodes="${#servers[@]}" --ntasks="${#servers[@]}" --nodelist="$(join "${servers[@]}")" \
  --output="%x-%j-serve-%n.log" bash configs/launch/node.sh serve &
serving=$!
trap 'kill "$serving" 2>/dev/null || true' EXIT

# SLURM_PROCID is known on the node only
# shellcheck disable=SC2016
srun --nodes="${#trainers[@]}" --ntasks="${#trainers[@]}" --nodelist="$(join "${trainers[@]}")" \
  --kill-on-bad-exit=1 bash -c 'NODE_INDEX="$SLURM_PROCID" exec bash configs/launch/node.sh train' &
training=$!

wait -n "$serving" "$training" # training that is done, or whichever failed
