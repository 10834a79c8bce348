#!/usr/bin/env bash
# Installs what the tests need and runs them: bash runs/test.sh [arguments of pytest], for example -m "not slow"
set -euo pipefail
cd "$(dirname "$0")/.."
bash runs/setup.sh dev
# Tests run in parallel, each process with one thread. Some wait for other processes: one more keeps all cores busy.
export OMP_NUM_THREADS=1
exec .venv/bin/python -m pytest -n "$(($(getconf _NPROCESSORS_ONLN) + 1))" "$@"
