#!/usr/bin/env bash
# The full pipeline at depth 24 on a node of GPUs: bash runs/speedrun.sh
# In a terminal that outlives the connection: screen -L -Logfile speedrun.log -S speedrun bash runs/speedrun.sh
# May be set: DEPTH, NPROC (or NPROC_PER_NODE), MODEL_TAG, WANDB_RUN and SHARDS (of text: 240 for depth 24, 30 for depth 12).
# If it is interrupted, run it again: it continues where it was.
set -euo pipefail
cd "$(dirname "$0")/.."

depth="${DEPTH:-24}"
tag="${MODEL_TAG:-d$depth}"
run="${WANDB_RUN:-dummy}"
nproc="${NPROC:-${NPROC_PER_NODE:-}}"
if [ -z "$nproc" ] && ! nvidia-smi --list-gpus 2>/dev/null | grep "^GPU " >/dev/null; then
    echo "error: no GPU is seen by nvidia-smi: use runs/runcpu.sh, or set NPROC" >&2
    exit 1
fi
extras=()
[ "$run" = dummy ] || extras=(wandb)
bash runs/setup.sh ${extras[@]+"${extras[@]}"}
source .venv/bin/activate
export OMP_NUM_THREADS=1
# Ask PyTorch: with an old driver or CUDA_VISIBLE_DEVICES it sees fewer GPUs than nvidia-smi.
: "${nproc:=$(python -c 'import torch; print(torch.cuda.device_count())' || echo 0)}"
if [ "$nproc" -lt 1 ]; then
    echo "error: PyTorch cannot use the GPU that nvidia-smi sees: nanochat doctor tells more" >&2
    exit 1
fi
# A stopped run has five minutes to finish its step and save it; torchrun alone would leave it 30 seconds.
launch() { torchrun --standalone --nproc_per_node="$nproc" --shutdown-timeout=300 -m -- "$@"; }

# The tokenizer needs 8 shards; the rest of the pretraining data is downloaded while it trains.
python -m nanochat.dataset --data=climbmix -n 8
python -m nanochat.dataset --data=climbmix -n "${SHARDS:-240}" &
download=$!
trap 'kill "$download" 2>/dev/null || true' EXIT
# A run that has begun keeps its tokenizer: trained again, on more shards than before, it would be a different one.
base_dir=${NANOCHAT_BASE_DIR:-~/.cache/nanochat}  # not $HOME, which may be unset
tokenizer="$base_dir/runs/$tag"
if [ ! -e "$tokenizer/tokenizer.json" ]; then
    tokenizer="$base_dir/tokenizers/$tag"
    python -m scripts.tok_train --data=climbmix --max-chars=2000000000 --vocab-size=32768 --tokenizer="$tokenizer"
    python -m scripts.tok_eval --tokenizer="$tokenizer"
fi
wait "$download" || { echo "error: the download failed; run this again to go on with it" >&2; exit 1; }
trap - EXIT

launch scripts.base_train --depth="$depth" --model-tag="$tag" --tokenizer="$tokenizer" --resume=auto --save-every=1000 --run="$run"
launch scripts.base_eval --model-tag="$tag" --eval core,bpb,sample
launch scripts.chat_sft --model-tag="$tag" --resume=auto --run="$run"
launch scripts.chat_eval --source=sft --model-tag="$tag"
python -m nanochat.report --model-tag="$tag"
echo "chat: python -m scripts.chat_cli --model-tag=$tag, or python -m scripts.chat_web --model-tag=$tag"
