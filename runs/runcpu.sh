#!/usr/bin/env bash
# Half an hour on a laptop: a larger model than the demo's, on your own text if you like: bash runs/runcpu.sh [NAME|PATH]
set -euo pipefail
source "$(dirname "$0")/absolute.sh"
data="$(absolute "${1:-builtin}")"
cd "$(dirname "$0")/.."

bash runs/setup.sh
python=.venv/bin/python
tag="${MODEL_TAG:-cpu}"

# A run that has begun on this text keeps its tokenizer: with new files, it would be a different one.
base_dir=${NANOCHAT_BASE_DIR:-~/.cache/nanochat}
tokenizer="$base_dir/runs/$tag"
if [ ! -e "$tokenizer/tokenizer.json" ] || ! grep -qF "\"data\": \"$data\"" "$tokenizer/base/settings.json" 2>/dev/null; then
    tokenizer="$base_dir/tokenizers/$tag"
    "$python" -m scripts.tok_train --data="$data" --vocab-size=8192 --tokenizer="$tokenizer"
fi
"$python" -m scripts.base_train --model-tag="$tag" --resume=auto --data="$data" --tokenizer="$tokenizer" \
    --depth=6 --head-dim=64 --max-seq-len=512 --total-batch-size=8192 --expand-at=0 --target-minutes=18 \
    --eval-every=100 --eval-tokens=65536 --save-every=50
"$python" -m scripts.chat_sft --model-tag="$tag" --resume=auto --target-minutes=7 --eval-tokens=65536 --save-every=50 \
    --tasks="Arithmetic:20000,Identity:2000,DocQA*2,SpellingBee:7000,SimpleSpelling:9000,Repeat:14000"
"$python" -m scripts.base_eval --model-tag="$tag" --eval=bpb,sample --split-tokens=65536
"$python" -m scripts.chat_eval --model-tag="$tag" --task-name=Arithmetic,Identity,SpellingBee --max-problems=128
"$python" -m nanochat.report --model-tag="$tag"
"$python" -m scripts.chat_cli --model-tag="$tag"
