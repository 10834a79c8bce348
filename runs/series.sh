# Shared by the two series, which source it with their arguments: [NAME|PATH] [flags of base_train]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/absolute.sh"
data=()  # none given: climbmix where it was downloaded, else the builtin text
[ -z "${1:-}" ] || data=(--data="$(absolute "$1")")
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash runs/setup.sh
source .venv/bin/activate
flags=("${@:2}")  # used below as macOS's old Bash wants it, which takes an empty list for an unset one
launch=(python -m)
nproc="${NPROC:-${NPROC_PER_NODE:-1}}"
[ "$nproc" = 1 ] || launch=(torchrun --standalone --nproc_per_node="$nproc" --shutdown-timeout=300 -m --)

# train TAG FLAGS...: start or resume one run of a series. There are many, so each keeps only its newest and best checkpoint.
train() {
    "${launch[@]}" scripts.base_train ${data[@]+"${data[@]}"} --model-tag="$1" --resume=auto --sample-every=-1 --keep-last=1 "${@:2}" ${flags[@]+"${flags[@]}"}
}
