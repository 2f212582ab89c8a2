#!/usr/bin/env bash
# One run of raydml on Slurm nodes: sbatch cluster/slurm.sh photos.yaml --set storage=/shared/raydml
# The arguments are those of `python -m pipeline.train`. The folder it is submitted from has to be shared by all nodes.
#SBATCH --job-name=raydml
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --gpus-per-node=1
#SBATCH --time=08:00:00
#SBATCH --output=raydml-%j.log
# --exclusive: `ray symmetric-run` ends with `ray stop`, which ends every Ray process of the user on the node.
set -euo pipefail

if [ "$#" -eq 0 ]; then
  echo "error: no recipe: expected sbatch cluster/slurm.sh RECIPE [--set KEY=VALUE ...]" >&2
  exit 2
fi

state=$(mktemp -d "${SLURM_SUBMIT_DIR}/.raydml-${SLURM_JOB_ID}-XXXXXX") # mode 700: holds the token
trap 'rm -rf "$state"' EXIT
(umask 077 && python -c 'import secrets; print(secrets.token_hex(32))' > "$state/auth_token")
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$state/auth_token"
export RAY_USAGE_STATS_ENABLED=0
export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=300 # Ray's own 30 s are too few for nodes that load from shared disks

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
address=${RAYDML_HEAD_ADDRESS:-$(srun --nodes=1 --ntasks=1 --nodelist="$head" hostname -I | awk '{ print $1 }')}
export RAYDML_RESULT="$state/result" RAYDML_HEAD="$address:$((20000 + SLURM_JOB_ID % 10000))"

# `ray symmetric-run` ends with status 0 also where Ray could not be started: the run's own status is kept in a file.
# shellcheck disable=SC2016 # the head's shell expands them
srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" \
  ray symmetric-run --address "$RAYDML_HEAD" --min-nodes "$SLURM_JOB_NUM_NODES" --dashboard-host=127.0.0.1 -- \
  bash -c 'status=0; RAY_ADDRESS=$RAYDML_HEAD python -m pipeline.train "$@" || status=$?; echo "$status" > "$RAYDML_RESULT"; exit "$status"' \
  train "$@" || echo "srun ended with status $?" >&2

if [ ! -s "$RAYDML_RESULT" ]; then
  echo "error: the run was not started: Ray's messages stand above; is another Ray running on one of the nodes?" >&2
  exit 1
fi
exit "$(cat "$RAYDML_RESULT")"
