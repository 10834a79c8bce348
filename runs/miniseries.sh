#!/usr/bin/env bash
# One model of each depth, each with the settings that its depth implies: bash runs/miniseries.sh [NAME|PATH] [flags of base_train]
# DEPTHS, NPROC and SERIES (the beginning of the runs' names) may be set. Run again, it goes on where it was.
# Table and plot: dev/scaling_analysis.py, which runs at the end.
set -euo pipefail
cd "$(dirname "$0")/.."

bash runs/setup.sh
source .venv/bin/activate
data="${1:-builtin}"
shift || true
series="${SERIES:-mini}"
launch=(python -m)
[ "${NPROC:-1}" = 1 ] || launch=(torchrun --standalone --nproc_per_node="$NPROC" -m --)

for depth in ${DEPTHS:-2 3 4 5 6 8 10 12}; do
    "${launch[@]}" scripts.base_train --data="$data" --depth="$depth" --model-tag="$series-d$depth" --resume=auto \
        --save-every=500 --sample-every=-1 "$@"
done
python -m dev.scaling_analysis --runs="$series-d*"
