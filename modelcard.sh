#!/usr/bin/env bash
# One command a published number: how each classification model is trained, and how its number is measured.
#
#   ./modelcard.sh                                  every command
#   ./modelcard.sh NAME train|eval [ARGUMENT ...]   run one, with further arguments for main.py
#   ./modelcard.sh --dry-run NAME train|eval [...]  print it
#
# DATA: folder of ImageNet's train/ and val/ (data/imagenet).  GPUS: of this host (8).  WEIGHTS: what eval measures;
# without it the released file in weights/, where there is one, else the best checkpoint of the training command.
set -euo pipefail
cd "$(dirname "$0")"
PATH=$PWD/.venv/bin:$PATH  # what make sets up

DATA=${DATA:-data/imagenet}
GPUS=${GPUS:-8}
fail() {
    echo "modelcard.sh: $1" >&2
    exit 2
}

# A line a model: name, published top-1 on ImageNet-1K (-: none), address of the released file (-: none).
models() {
    local remedy="make setup installs what it needs"
    PYTHONPATH=$PWD:$PWD/kernels python -c '
from vmamba.models.variants import VARIANTS
for name, variant in VARIANTS.items():
    if variant.released_as:
        print(name, variant.accuracy or "-", variant.weights or "-")' 2>/dev/null || fail "cannot read vmamba/models/variants.py; $remedy"
}

# The command of model $1, whose released file is $2 (-: none), for task $3, as the array COMMAND; the rest is main.py's.
compose() {
    local name=$1 released=$2 task=$3
    shift 3
    COMMAND=(torchrun --nproc_per_node "$GPUS" main.py --cfg "configs/$name.yaml" --data-path "$DATA")
    if [[ $task == eval ]]; then
        local weights=output/$name/default/best.pth
        [[ $released == - ]] || weights=weights/${released##*/}
        COMMAND+=(--eval --pretrained "${WEIGHTS:-$weights}")
    fi
    COMMAND+=("$@")
}

list() {
    local name accuracy released task
    models | while read -r name accuracy released; do
        [[ $accuracy == - ]] && echo "# $name: no published number" || echo "# $name: $accuracy% top-1"
        for task in train eval; do
            [[ $task == eval && $released != - ]] && echo "curl --location --create-dirs -o weights/${released##*/} $released"
            compose "$name" "$released" "$task"
            echo "${COMMAND[*]}"
        done
    done
}

if [[ $# == 0 ]]; then
    list
    exit
fi
DRY_RUN=
if [[ $1 == --dry-run ]]; then
    DRY_RUN=yes
    shift
fi
[[ $# -ge 2 ]] || fail "expected NAME and train or eval; without arguments it lists every command"
[[ $2 == train || $2 == eval ]] || fail "unknown task '$2'; train or eval"
row=$(models | awk -v name="$1" '$1 == name')
[[ $row ]] || fail "unknown model '$1'; ./modelcard.sh lists them"
compose "$1" "${row##* }" "${@:2}"
[[ $DRY_RUN ]] && echo "${COMMAND[*]}" && exit
exec "${COMMAND[@]}"
