#!/usr/bin/env bash
# Several ranks on this machine, one a card (on a CPU: RANKS processes that share the cores).
#
#   RANKS=2 launch/local.sh configs/gpt-tiny-sotu.yaml engine.zero_stage=2
#
# One process needs no launcher: lmtrain train CONFIG.
set -euo pipefail
exec deepspeed --num_gpus "${RANKS:-2}" --module lmtrain train "$@"
