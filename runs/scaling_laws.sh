#!/usr/bin/env bash
# Models of several depths under each of several budgets of FLOPs, to see which size a budget is best spent on:
# bash runs/scaling_laws.sh [NAME|PATH] [flags of base_train]
# BUDGETS, DEPTHS, NPROC and SERIES may be set. Run again, it goes on where it was.
source "$(dirname "$0")/series.sh" "$@"
series="${SERIES:-law}"

for flops in ${BUDGETS:-1e13 2e13 4e13}; do
    for depth in ${DEPTHS:-2 3 4 5 6}; do
        # All blocks from the start: sizes are compared, not what a budget is best spent on within one.
        train "$series-$flops-d$depth" --depth="$depth" --target-flops="$flops" --expand-at=0
    done
done
python -m dev.scaling_analysis --runs="$series-*"
