#!/usr/bin/env bash
# Models of several depths under each of several FLOPs budgets, to see which size is best for a budget:
# bash runs/scaling_laws.sh [NAME|PATH] [flags of base_train]
# BUDGETS, DEPTHS, NPROC and SERIES may be set. If it is run again, it continues where it was.
source "$(dirname "$0")/series.sh" "$@"
series="${SERIES:-law}"

for flops in ${BUDGETS:-1e13 2e13 4e13}; do
    for depth in ${DEPTHS:-2 3 4 5 6}; do
        # Train all blocks from the start: this compares sizes, not ways to train one size.
        train "$series-$flops-d$depth" --depth="$depth" --target-flops="$flops" --expand-at=0
    done
done
python -m dev.scaling_analysis --runs="$series-*"
