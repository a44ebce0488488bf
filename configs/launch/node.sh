#!/usr/bin/env bash
# What one node of a multi-node run does; slurm.sh and skypilot.yaml start it on every node.
#
#   bash configs/launch/node.sh serve     one vLLM server a GPU, ports PORT, PORT + 1, ...
#   bash configs/launch/node.sh train     wait for the servers, then train on this node's GPUs
#
# From the environment:
#   CONFIG       recipe; OVERRIDES: key=value words behind it, the same for both roles
#   OUTPUT_DIR   on a file system that every node sees under this path: adapters reach the servers through it
#   GPUS         GPUs a node (8)                    PORT          first port of the servers on a node (8000)
#   SERVER_HOSTS hosts that serve                   TRAIN_HOSTS   hosts that train, the main one first
#   NODE_INDEX   of this host among TRAIN_HOSTS     MAIN_PORT     of the main training host (29500)
#   SHARDING     configs/accelerate/SHARDING.yaml: ddp (default) or fsdp2
#   WAIT         seconds until every server must answer (900)
set -euo pipefail

PORT="${PORT:-8000}"
GPUS="${GPUS:-8}"
read -r -a overrides <<<"${OVERRIDES:-}"

# `vlm-reason serve` is `vllm serve` with what the engine relies on: the adapters' rank, processed log-probabilities,
# VLLM_SERVER_DEV_MODE=1 and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1, since adapters and weights change while it runs.
serve() {
  local gpu
  servers=()
  trap 'kill "${servers[@]}" 2>/dev/null || true' EXIT
  for ((gpu = 0; gpu < GPUS; gpu++)); do
    CUDA_VISIBLE_DEVICES="$gpu" vlm-reason serve "$CONFIG" --host 0.0.0.0 --port "$((PORT + gpu))" \
      engine.kind=vllm "${overrides[@]}" &
    servers+=("$!")
  done
  wait -n # one that ends takes the others, and with them the job, down
}

urls() {
  local host gpu list=""
  for host in $SERVER_HOSTS; do
    for ((gpu = 0; gpu < GPUS; gpu++)); do
      list+="${list:+,}http://$host:$((PORT + gpu))"
    done
  done
  echo "$list"
}

wait_for_servers() {
  local url deadline=$((SECONDS + ${WAIT:-900}))
  for url in $(urls | tr , ' '); do
    until curl --silent --fail --max-time 5 --output /dev/null "$url/health"; do
      if ((SECONDS >= deadline)); then
        echo "no answer from $url/health within ${WAIT:-900} s: see that server's log" >&2
        exit 1
      fi
      sleep 5
    done
  done
}

train() {
  local -a hosts
  read -r -a hosts <<<"$TRAIN_HOSTS"
  wait_for_servers
  accelerate launch --config_file "configs/accelerate/${SHARDING:-ddp}.yaml" \
    --num_machines "${#hosts[@]}" --num_processes "$((${#hosts[@]} * GPUS))" --machine_rank "$NODE_INDEX" \
    --main_process_ip "${hosts[0]}" --main_process_port "${MAIN_PORT:-29500}" \
    scripts/train.py --config "$CONFIG" \
    "output_dir=$OUTPUT_DIR" engine.kind=vllm engine.mode=server "engine.urls=[$(urls)]" "${overrides[@]}"
}

case "${1:-}" in
  serve | train) "$1" ;;
  *)
    echo "usage: node.sh serve|train" >&2
    exit 2
    ;;
esac
