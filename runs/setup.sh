#!/usr/bin/env bash
# Makes .venv in this checkout and installs nanochat into it: bash runs/setup.sh [dev|wandb|tensorboard ...]
# Uses uv if it is installed and can reach the network, else python -m venv and pip. Does nothing if run again.
set -euo pipefail
cd "$(dirname "$0")/.."

say() { printf 'setup: %s\n' "$*"; }
fail() { printf 'error: %s\n' "$*" >&2; exit 1; }

if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi >/dev/null 2>&1; then device=gpu; else device=cpu; fi
stamp=.venv/.nanochat-installed
# An installation for a GPU also works without one; the other way round, pip would keep the build for the CPU.
case ",$(cut -d ' ' -f 1 "$stamp" 2>/dev/null)," in
    *,gpu,*) device=gpu ;;
    *,cpu,*) [ "$device" = cpu ] || { say "a GPU is here now: making .venv anew"; rm -rf .venv; } ;;
esac
# What earlier calls installed is kept, so a call that asks for fewer extras has nothing to do.
extras=$(cut -d ' ' -f 1 "$stamp" 2>/dev/null || true)
for extra in "$device" "$@"; do
    case ",$extras," in *",$extra,"*) ;; *) extras="${extras:+$extras,}$extra" ;; esac
done
wanted="$extras $(cksum <pyproject.toml)"
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then exit 0; fi

find_python() {
    local candidate
    for candidate in python3 python3.14 python3.13 python3.12 python3.11 python3.10 python; do
        if command -v "$candidate" >/dev/null 2>&1 \
            && "$candidate" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info)' 2>/dev/null; then
            printf '%s' "$candidate"
            return
        fi
    done
    fail "Python 3.10 or later is needed, and none was found: install it from python.org or your system's packages"
}

# Runs a command with its output hidden; shows the end of it if the command fails.
quietly() {
    local log status=0
    log=$(mktemp)
    "$@" >"$log" 2>&1 || status=$?
    [ "$status" -eq 0 ] || tail -n 15 "$log" >&2
    rm -f "$log"
    return "$status"
}

install_with_uv() {
    if [ -n "${PIP_FIND_LINKS:-}" ]; then export UV_FIND_LINKS="${UV_FIND_LINKS:-$PIP_FIND_LINKS}"; fi
    say "installing with uv ($extras); a first time takes some minutes"
    quietly uv venv --quiet --allow-existing .venv && quietly uv pip install --python .venv --quiet -e ".[$extras]"
}

install_with_pip() {
    local python pip
    python=$(find_python)
    [ -x .venv/bin/python ] && .venv/bin/python -m pip --version >/dev/null 2>&1 || rm -rf .venv
    [ -d .venv ] || quietly "$python" -m venv .venv \
        || fail "python -m venv failed: on Debian and Ubuntu, apt-get install python3-venv"
    pip=(.venv/bin/python -m pip install --quiet --disable-pip-version-check)
    if [ "$device" = cpu ] && [ "$(uname -s)" = Linux ] && [ -z "${PIP_FIND_LINKS:-}" ]; then
        # PyPI's build for Linux brings gigabytes of CUDA along; PyTorch's own index has one without.
        say "installing PyTorch for the CPU"
        quietly "${pip[@]}" --timeout 20 --retries 1 "torch==2.13.0" --index-url https://download.pytorch.org/whl/cpu \
            || say "PyTorch's index cannot be reached: taking the build that pip finds"
    fi
    say "installing with pip ($extras); a first time takes some minutes"
    quietly "${pip[@]}" -e ".[$extras]" || fail "the installation failed: see above"
}

if command -v uv >/dev/null 2>&1; then
    install_with_uv || { say "uv failed: using pip"; install_with_pip; }
else
    install_with_pip
fi
if [ "$device" = cpu ]; then
    # Make the C++ compiler's precompiled header now, so that the first training step need not wait for it. Optional: without
    # a compiler, training runs eagerly and says so.
    .venv/bin/python -c 'import torch; torch.compile(lambda x: x + 1)(torch.zeros(64))' >/dev/null 2>&1 || true
fi
printf '%s' "$wanted" >"$stamp"
say "done: source .venv/bin/activate"
