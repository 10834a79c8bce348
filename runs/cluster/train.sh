#!/usr/bin/env bash
# Runs on each node of a cluster, started there by slurm.sbatch, skypilot.yaml, pytorchjob.yaml or by hand.
#
# The recipe sets: NNODES, NODE_RANK (0 is the first node), RDZV_ENDPOINT (HOST:PORT of the first node; the next three ports
# are used as well), RDZV_ID (the same on all nodes, unique to the job), NANOCHAT_BASE_DIR (on a shared file system), and
# NODE_ADDR where the other nodes cannot resolve this one's host name.
# You may set: DEPTH, MODEL_TAG, NPROC or NPROC_PER_NODE, DATA (climbmix, fineweb-edu, builtin, or anything else that --data
# takes), SHARDS (how many to download of climbmix or fineweb-edu), LOCAL_DATA=1 (each node downloads its own), TOKENIZER (an
# existing one; by default one of VOCAB_SIZE tokens is trained, named after the run), STAGES, SAVE_EVERY (steps), SAVE_S
# (seconds that a stopped run has to save), WANDB_RUN, BASE_FLAGS, SFT_FLAGS and EVAL_FLAGS (more flags for scripts.base_train,
# chat_sft and chat_eval).
#
# SIGTERM or SIGUSR1 stops the run: it finishes and saves the current step, then exits with code 143. Given again, the same
# command continues from there. If a process fails, all are restarted from the newest checkpoint, up to three times.
set -euo pipefail
source "$(dirname "$0")/../absolute.sh"
data="$(absolute "${DATA:-climbmix}")"
cd "$(dirname "$0")/../.."

for name in NNODES NODE_RANK RDZV_ENDPOINT RDZV_ID NANOCHAT_BASE_DIR; do
    [ -n "${!name:-}" ] || { echo "error: $name is not set: see the first lines of runs/cluster/train.sh" >&2; exit 2; }
done
depth="${DEPTH:-24}"
tag="${MODEL_TAG:-d$depth}"
# shellcheck source=/dev/null
[ -n "${VIRTUAL_ENV:-}" ] || [ ! -f .venv/bin/activate ] || source .venv/bin/activate
nproc="${NPROC:-${NPROC_PER_NODE:-$(python -c 'import torch; print(torch.cuda.device_count())' || echo 0)}}"
if [ "$nproc" -lt 1 ]; then
    echo "error: PyTorch sees no GPU on $(hostname): nanochat doctor tells more; or set NPROC" >&2
    exit 2
fi
export NANOCHAT_BASE_DIR OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

# Bash runs traps only between commands or during `wait`, so each command runs in the background and is waited for.
# The command ignores SIGUSR1, which Slurm sends to every process of a step; it gets a single SIGTERM from this script.
stopped=""
child=""
stop() {
    stopped=1
    [ -z "$child" ] || kill -TERM "$child" 2>/dev/null || true
}
trap stop TERM USR1

run() {
    local status=0
    [ -z "$stopped" ] || exit 143
    (trap '' USR1; trap - TERM; exec "$@") &
    child=$!
    wait "$child" || status=$?
    while kill -0 "$child" 2>/dev/null; do  # a signal ended the wait, not the command
        status=0
        wait "$child" || status=$?
    done
    child=""
    [ -z "$stopped" ] || exit 143
    return "$status"
}

# The first node prepares the text and the tokenizer; until it is done, the other nodes find the first stage's port closed.
if [ "$NODE_RANK" = 0 ] || [ "${LOCAL_DATA:-}" = 1 ]; then
    case "$data" in
        climbmix | fineweb-edu) run python -m nanochat.dataset --data="$data" -n "${SHARDS:-240}" ;;
    esac
fi
# A run that began on this data keeps its tokenizer: training again, with newer files, would give a different one.
run_dir="$NANOCHAT_BASE_DIR/runs/$tag"
tokenizer="${TOKENIZER:-$NANOCHAT_BASE_DIR/tokenizers/$tag}"
begun() { [ -e "$run_dir/tokenizer.json" ] && grep -qF "\"data\": \"$data\"" "$run_dir/base/settings.json" 2>/dev/null; }
if [ -n "${TOKENIZER:-}" ]; then
    :
elif begun; then
    tokenizer="$run_dir"
    echo "run $tag goes on with the tokenizer that it keeps"
elif [ "$NODE_RANK" = 0 ]; then
    run python -m scripts.tok_train --data="$data" --vocab-size="${VOCAB_SIZE:-32768}" --tokenizer="$tokenizer"
else  # a mounted bucket shows a new file only after some seconds
    echo "node $NODE_RANK waits for the tokenizer that the first node trains"
    until [ -e "$tokenizer/tokenizer.json" ]; do run sleep 2; done
fi

# launch STAGE FLAG...: run a stage on all processes of all nodes; each stage has its own port
host="${RDZV_ENDPOINT%:*}"
port="${RDZV_ENDPOINT##*:}"
read -ra stages <<<"${STAGES:-base_train chat_sft base_eval chat_eval}"
last_port=$((port + ${#stages[@]} - 1))
answers() { (exec 3<>"/dev/tcp/$host/$1") 2>/dev/null; }
launch() {
    local stage="$1" later
    shift
    if [ "$NODE_RANK" != 0 ] && ! answers "$port"; then
        echo "$stage: node $NODE_RANK waits for the first node to open $host:$port"
        until answers "$port"; do
            for ((later = port + 1; later <= last_port; later++)); do
                if answers "$later"; then  # this node was restarted late, and the stage is already done
                    echo "$stage: passed over, since the first node is in a later stage"
                    port=$((port + 1))
                    return
                fi
            done
            run sleep 2
        done
    fi
    if [ "$NODE_RANK" = 0 ] && ! python -c "import socket; socket.create_server(('', $port))" 2>/dev/null; then
        echo "error: $stage: something else listens on port $port of this node: give RDZV_ENDPOINT another" >&2
        exit 2  # torchrun would mistake it for this job's rendezvous, and wait
    fi
    echo "$stage: $nproc processes on node $NODE_RANK of $NNODES"
    # After "--", torchrun takes no --run for an abbreviation of its own --run-path.
    run torchrun --nnodes="$NNODES" --nproc-per-node="$nproc" --max-restarts=3 --shutdown-timeout="${SAVE_S:-300}" \
        --rdzv-backend=c10d --rdzv-endpoint="$host:$port" --rdzv-id="$RDZV_ID-$stage" --rdzv-conf=join_timeout=900 \
        ${NODE_ADDR:+--local-addr="$NODE_ADDR"} -m -- "scripts.$stage" --model-tag="$tag" "$@"
    port=$((port + 1))
}

# Extra flags, expanded below in a way that suits macOS's old Bash, which treats an empty array as unset.
read -ra base_flags <<<"${BASE_FLAGS:-}"
read -ra sft_flags <<<"${SFT_FLAGS:-}"
read -ra eval_flags <<<"${EVAL_FLAGS:-}"
resumable=(--resume=auto --save-every="${SAVE_EVERY:-250}" --run="${WANDB_RUN:-dummy}")
for stage in "${stages[@]}"; do
    case "$stage" in
        base_train)
            launch base_train --depth="$depth" --data="$data" --tokenizer="$tokenizer" "${resumable[@]}" \
                ${base_flags[@]+"${base_flags[@]}"}
            ;;
        chat_sft) launch chat_sft "${resumable[@]}" ${sft_flags[@]+"${sft_flags[@]}"} ;;
        base_eval) launch base_eval ;;
        chat_eval) launch chat_eval --source=sft ${eval_flags[@]+"${eval_flags[@]}"} ;;
        *) echo "error: stage '$stage' is none of base_train, chat_sft, base_eval, chat_eval" >&2; exit 2 ;;
    esac
done
if [ "$NODE_RANK" = 0 ]; then run python -m nanochat.report --model-tag="$tag"; fi
