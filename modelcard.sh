#!/usr/bin/env bash
# One command a published number of the three tables: how each model is trained, and how its number is measured.
#
#   ./modelcard.sh                                    every command
#   ./modelcard.sh CONFIG train|eval [ARGUMENT ...]   run one, with further arguments for main.py
#   ./modelcard.sh --dry-run CONFIG train|eval [...]  print it
#
# CONFIG is a file below configs/ without its .yaml.  DATA: folder of ImageNet's train/ and val/ (data/imagenet); COCO
# and ADE likewise (data/coco, data/ADEChallengeData2016).  GPUS: of this host (8).  WEIGHTS: what eval measures;
# without it the released file in weights/, where there is one, else the best checkpoint of the training command.
set -euo pipefail
cd "$(dirname "$0")"
PATH=$PWD/.venv/bin:$PATH  # what make sets up

GPUS=${GPUS:-8}
fail() {
    echo "modelcard.sh: $1" >&2
    exit 2
}

# A line a row of the tables: config, addresses of the released file and of the weights that training starts from (-:
# none), name and published numbers.
models() {
    local remedy="make setup installs what it needs"
    PYTHONPATH=$PWD:$PWD/kernels python -m vmamba.models.published 2>/dev/null || fail "cannot read vmamba/models/published.py; $remedy"
}

# The command of config $1 with the addresses $2 and $3, for task $4, as the array COMMAND; the rest is main.py's.
compose() {
    local config=$1 released=$2 start=$3 task=$4 data
    shift 4
    case $config in
        detection/*) data=${COCO:-data/coco} ;;
        segmentation/*) data=${ADE:-data/ADEChallengeData2016} ;;
        *) data=${DATA:-data/imagenet} ;;
    esac
    COMMAND=(torchrun --nproc_per_node "$GPUS" main.py --cfg "configs/$config.yaml" --data-path "$data")
    local weights=output/${config##*/}/default/best.pth
    [[ $released == - ]] || weights=weights/$(file_of "$released")
    if [[ $task == eval ]]; then
        COMMAND+=(--eval --pretrained "${WEIGHTS:-$weights}")
    elif [[ $start != - ]]; then
        COMMAND+=(--pretrained "$start")
    fi
    COMMAND+=("$@")
}

# What a released file is called here: timm's are all called model.safetensors there.
file_of() {
    case $1 in
        */model.safetensors) local hub=${1%/resolve/*}; echo "${hub##*/}.safetensors" ;;
        *) echo "${1##*/}" ;;
    esac
}

list() {
    local config released start text task
    models | while IFS=$'\t' read -r config released start text; do
        echo "# $text"
        for task in train eval; do
            [[ $task == eval && $released != - ]] && echo "curl --location --create-dirs -o weights/$(file_of "$released") $released"
            compose "$config" "$released" "$start" "$task"
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
[[ $# -ge 2 ]] || fail "expected CONFIG and train or eval; without arguments it lists every command"
[[ $2 == train || $2 == eval ]] || fail "unknown task '$2'; train or eval"
row=$(models | awk -F '\t' -v name="$1" '$1 == name { print $2, $3 }')
[[ $row ]] || fail "unknown model '$1'; ./modelcard.sh lists them"
compose "$1" "${row% *}" "${row#* }" "${@:2}"
[[ $DRY_RUN ]] && echo "${COMMAND[*]}" && exit
exec "${COMMAND[@]}"
