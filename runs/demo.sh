#!/usr/bin/env bash
# From nothing to a chat with a model of your own, on a laptop, without any download of data: bash runs/demo.sh
# If it is run again, stages are reused or resumed. Writes below NANOCHAT_BASE_DIR (default ~/.cache/nanochat).
set -euo pipefail
cd "$(dirname "$0")/.."

bash runs/setup.sh
python=.venv/bin/python
tag=demo
tasks="Arithmetic:9000,Identity:2000,DocQA*2,SpellingBee:6500,SimpleSpelling:8000,Repeat:13000"

# stage NUMBER COMMAND...: run one step, with its number in the progress display
stage() {
    export NANOCHAT_STAGE="$1/6"
    shift
    "$python" -m "$@"
}

stage 1 scripts.tok_train --data=builtin --vocab-size=2048 --tokenizer=demo
stage 2 scripts.base_train --model-tag=$tag --resume=auto --data=builtin --tokenizer=demo \
    --depth=4 --aspect-ratio=48 --head-dim=64 --max-seq-len=512 --total-batch-size=2048 --expand-at=0 --target-minutes=3 \
    --warmup-steps=10 --eval-every=250 --eval-tokens=65536 --save-every=100 --sample-every=-1
stage 3 scripts.chat_sft --model-tag=$tag --resume=auto --tasks="$tasks" --target-minutes=5 --init-lr-frac=1 \
    --eval-every=-1 --eval-tokens=32768 --save-every=100
stage 4 scripts.base_eval --model-tag=$tag --eval=bpb,sample --split-tokens=32768
stage 5 scripts.chat_eval --model-tag=$tag --task-name=Arithmetic,Identity,SpellingBee --max-problems=200
stage 6 nanochat.report --model-tag=$tag

printf '\nYou: %s\nnanochat: ' "What is 23 + 58?"
"$python" -m scripts.chat_cli --model-tag=$tag --temperature=0 --prompt="What is 23 + 58?"
cat <<END

This model is yours. Talk to it:
  source .venv/bin/activate
  python -m scripts.chat_cli --model-tag=$tag        in the terminal
  python -m scripts.chat_web --model-tag=$tag        in the browser, at http://127.0.0.1:8000
END
