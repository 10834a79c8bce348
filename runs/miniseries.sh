#!/usr/bin/env bash
# One model of each depth, each with the settings that its depth implies: bash runs/miniseries.sh [NAME|PATH] [flags of base_train]
# On a GPU; a laptop manages DEPTHS="2 3 4". DEPTHS, NPROC and SERIES (the beginning of the runs' names) may be set. Run
# again, it goes on where it was.
source "$(dirname "$0")/series.sh" "$@"
series="${SERIES:-mini}"

for depth in ${DEPTHS:-2 3 4 5 6 8 10 12}; do
    train "$series-d$depth" --depth="$depth" --save-every=500
done
python -m dev.scaling_analysis --runs="$series-d*"
