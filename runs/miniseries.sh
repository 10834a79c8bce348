#!/usr/bin/env bash
# One model for each depth, with the settings that its depth implies: bash runs/miniseries.sh [NAME|PATH] [flags of base_train]
# For a GPU; a laptop can do DEPTHS="2 3 4". DEPTHS, NPROC and SERIES (the prefix of the runs' names) may be set. If it is
# run again, it continues where it was.
source "$(dirname "$0")/series.sh" "$@"
series="${SERIES:-mini}"

for depth in ${DEPTHS:-2 3 4 5 6 8 10 12}; do
    train "$series-d$depth" --depth="$depth" --save-every=500
done
python -m dev.scaling_analysis --runs="$series-d*"
