#!/bin/bash
# 2 nodes x 8 GPUs without a scheduler. The same command on both nodes, with the address of the first and 0 or 1:
#   NODE_RANK=0 MAIN_ADDRESS=10.0.0.1 pretrain/torchrun_2x8.sh --train_data_dir data/slim_star_combined
#   NODE_RANK=1 MAIN_ADDRESS=10.0.0.1 pretrain/torchrun_2x8.sh --train_data_dir data/slim_star_combined
# Smaller, to try it on one machine without GPUs: NODES=1 GPUS=2 pretrain/torchrun_2x8.sh --accelerator cpu ...
# `fabric run --devices=8 --num-nodes=2 --node-rank=N --main-address=HOST pretrain/tinyllama.py ...` does the same.
set -euo pipefail
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}
# When torchrun is asked to stop, its processes have this many seconds to write a checkpoint (30 without).
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}
# If a rank dies all are started again, up to 20 times, from the newest checkpoint.
exec torchrun --nnodes="${NODES:-2}" --nproc-per-node="${GPUS:-8}" --node-rank="${NODE_RANK:-0}" \
    --master-addr="${MAIN_ADDRESS:-127.0.0.1}" --master-port="${MAIN_PORT:-29500}" --max-restarts="${RESTARTS:-20}" \
    pretrain/tinyllama.py --resume auto "$@"
