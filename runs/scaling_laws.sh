#!/usr/bin/env bash
# Models of several depths under each of several budgets of FLOPs, to see which size a budget is best spent on:
# bash runs/scaling_laws.sh [NAME|PATH] [flags of base_train]
# BUDGETS, DEPTHS, NPROC and SERIES may be set. Run again, it goes on where it was.
set -euo pipefail
cd "$(dirname "$0")/.."

bash runs/setup.sh
source .venv/bin/activate
data="${1:-builtin}"
shift || true
series="${SERIES:-law}"
launch=(python -m)
[ "${NPROC:-1}" = 1 ] || launch=(torchrun --standalone --nproc_per_node="$NPROC" -m --)

for flops in ${BUDGETS:-1e13 2e13 4e13}; do
    for depth in ${DEPTHS:-2 3 4 5 6}; do
        "${launch[@]}" scripts.base_train --data="$data" --depth="$depth" --target-flops="$flops" \
            --model-tag="$series-$flops-d$depth" --resume=auto --sample-every=-1 "$@"
    done
done
python -m dev.scaling_analysis --runs="$series-*"
