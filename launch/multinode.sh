#!/usr/bin/env bash
# Ranks on several hosts, over ssh, with the bare launcher. `lmtrain launch --hostfile my-hostfile CONFIG` does the same
# with checks beforehand, restarts, and safe ways for spaces, quotes, tokens and keys; it is what to use. This shows what
# is left to you without it:
#
#   launch/multinode.sh my-hostfile configs/gpt-small-sotu.yaml engine.zero_stage=2
#
# Before: ssh to every host without a password, pdsh here, and on every host this folder, its .venv, the corpus and the
# run folder at the same path (a shared file system). `lmtrain doctor --hostfile my-hostfile` on the first host.
#
# - Give no spaces or quotes in overrides: they pass through a remote shell unquoted.
# - Variables of this shell stay here, but for PYTHON*, NCCL* and the like. Others go into a file .deepspeed_env in this
#   folder, KEY=VALUE lines only, no comment, no blank line. Its values are printed: never put a key there. W&B finds its
#   key in the netrc file of the first host (`wandb login`).
# - Keep-alives let ssh notice a host that died; without them the launcher would wait for it for ever.
# - Ctrl-C here ends every deepspeed job of yours on these hosts. To stop this run alone and save: touch RUN/STOP.
set -euo pipefail
hostfile=$1
shift
test -f "$hostfile" # the launcher would take a missing one for one machine, without an error
export PDSH_SSH_ARGS_APPEND="-o ServerAliveInterval=10 -o ServerAliveCountMax=3 ${PDSH_SSH_ARGS_APPEND:-}"
exec deepspeed --hostfile "$hostfile" --module lmtrain train "$@"
