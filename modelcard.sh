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
RELEASES=https://github.com/MzeroMiko/VMamba/releases/download

# name, published top-1 on ImageNet-1K (-: none), release and released file (-: none)
MODELS="
vmamba_tiny        82.2  %23v0cls/vssmtiny_dp01_ckpt_epoch_292.pth
vmamba_small       83.5  %23v0cls/vssmsmall_dp03_ckpt_epoch_238.pth
vmamba_base        84.0  %23v0cls/vssmbase_dp06_ckpt_epoch_241.pth
vmamba_tiny_s2l5   82.5  %23v2cls/vssm_tiny_0230_ckpt_epoch_262.pth
vmamba_small_s2l15 83.6  %23v2cls/vssm_small_0229_ckpt_epoch_222.pth
vmamba_base_s2l15  83.9  %23v2cls/vssm_base_0229_ckpt_epoch_237.pth
vmamba_tiny_s1l8   82.6  %23v2cls/vssm1_tiny_0230s_ckpt_epoch_264.pth
vmamba_small_s1l20 83.3  %23v2cls/vssm1_small_0229s_ckpt_epoch_240.pth
vmamba_base_s1l20  83.8  %23v2cls/vssm1_base_0229s_ckpt_epoch_225.pth
vmamba_tiny_m2     -     -
vmamba_small_m2    -     -
vmamba_base_m2     -     -
"

fail() {
    echo "modelcard.sh: $1" >&2
    exit 2
}

# The command of model $1, task $2, as the array COMMAND; further arguments go to main.py.
compose() {
    local name=$1 task=$2 row released
    shift 2
    row=$(awk -v name="$name" '$1 == name' <<<"$MODELS")
    [[ $row ]] || fail "unknown model '$name'; ./modelcard.sh lists them"
    released=$(awk '{ print $3 }' <<<"$row")
    COMMAND=(torchrun --nproc_per_node "$GPUS" main.py --cfg "configs/$name.yaml" --data-path "$DATA")
    case $task in
        train) ;;
        eval)
            local weights=output/$name/default/best.pth
            [[ $released == - ]] || weights=weights/${released##*/}
            COMMAND+=(--eval --pretrained "${WEIGHTS:-$weights}")
            ;;
        *) fail "unknown task '$task'; train or eval" ;;
    esac
    COMMAND+=("$@")
}

list() {
    local name accuracy released task
    while read -r name accuracy released; do
        [[ $name ]] || continue
        [[ $accuracy == - ]] && echo "# $name: no published number" || echo "# $name: $accuracy% top-1"
        for task in train eval; do
            [[ $task == eval && $released != - ]] && echo "curl --location --create-dirs -o weights/${released##*/} $RELEASES/$released"
            compose "$name" "$task"
            echo "${COMMAND[*]}"
        done
    done <<<"$MODELS"
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
compose "$@"
[[ $DRY_RUN ]] && echo "${COMMAND[*]}" && exit
exec "${COMMAND[@]}"
