#!/usr/bin/env bash
# A dress rehearsal, without a GPU, of the README's commands for ImageNet on 8 GPUs: bash experiments/rehearse.sh,
# from the project's root, on Linux. It makes stand-ins for data and weights (experiments/standins.py), takes each
# command out of the README and runs it as it stands there, with flags at its end that make it short and name files
# in place of the hub. For two presets: training, sampling to an .npz, fid.py against ADM's batch, export, the second
# stage; for sdvae-xl2 also 512 pixels, and a stop by a signal and --resume, against a run that was not stopped. It
# prints seconds, memory, the sizes of what was written, and ends with an error where something does not hold.
#
# SIZE=XL takes the real models and one process: about 17 GB of memory and 30 GB of disk. SIZE=S takes SiT-S and two
# processes. Run it again at any time: what is done is not done twice. Everything goes to OUT.
set -euo pipefail

SIZE=${SIZE:-XL}
OUT=${OUT:-exps/rehearsal-$SIZE}
PROCESSES=${PROCESSES:-$([ "$SIZE" = XL ] && echo 1 || echo 2)}                 # in place of 8
BATCH=${BATCH:-2}                                           # in place of 256
STEPS=${STEPS:-4}                                           # in place of 400,000; the stop comes after 1 or 2, and
                                                            # two more show that no moments were lost
SAMPLES=${SAMPLES:-8}                                       # in place of 50,000
NUM_STEPS=${NUM_STEPS:-4}                                   # of the sampler, in place of 250
RESOLUTION=${RESOLUTION:-256}                               # and once twice that
PRESETS=${PRESETS:-sdvae-xl2 vavae-xl1}                     # or one of the two
FLAGS=${FLAGS:-}                                            # more flags for each train.py

fail() { echo "error: $*" >&2; exit 2; }

noted() { grep -qsF "\"name\": \"$1\"" rehearsal.jsonl; }                       # NAME: as done

# rehearse WORDS: what rehearse.py says of them, unless that is noted as done
rehearse() {
    local name=$*
    [[ $1 != run && $1 != stop ]] || name=$2
    noted "$name" || python "$ROOT/experiments/rehearse.py" "$@"
}

# readme WORDS: the README's command with these words in it, on one line; for $preset, PROCESSES and STEPS
readme() {
    local line
    line=$(sed -n '/^## ImageNet on 8 GPUs/,/^```$/p' "$ROOT/README.md" |
        sed -e ':a' -e '/\\$/{N;s/ *\\\n */ /;ba' -e '}' | grep -e "$1" | sed 's/ *#.*//') ||
        fail "README.md: no $1 among the commands for ImageNet"
    line=${line/nproc_per_node=8/nproc_per_node=$PROCESSES}
    line=${line/0400000/$(printf %07d $STEPS)}
    if [ $preset = vavae-xl1 ]; then                                            # what "likewise" means there
        line=${line//sdvae-xl2/vavae-xl1} line=${line//sdvae\/sdvae-f8d4/vavae/vavae-f16d32}
        line=${line/2.2 --guidance-high 0.65/1.9 --guidance-high 0.825}
    fi
    echo "$line"
}

# afresh NAME RUN: clear what a training left that was broken off, unless NAME is done
afresh() { noted $1 || rm -rf "exps/$2"; }

# stopped TRAIN...: the same training twice, once through, and once stopped by a signal after a step or two
stopped() {
    afresh unstopped unstopped
    rehearse run unstopped "$@" --exp-name unstopped
    rm -rf exps/unstopped/checkpoints                                           # at XL 12 GB
    grep -q "skipped an unreadable image" logs/unstopped.log || fail "training did not meet the unreadable image"
    afresh stopped $preset
    rehearse stop stopped exps/$preset/metrics.jsonl "$@"
}

# all PRESET: what the README does with it, in that order
all() {
    local preset=$1 run=exps/$1 train sample fid second ckpt vae_ckpt
    train="$(readme "--preset sdvae-xl2") $SHORT --model SiT-$SIZE/${preset: -1}"
    sample="$(readme sample.py) --num-samples $SAMPLES --num-steps $NUM_STEPS"
    fid="$(readme fid.py) --json $run/fid.json"
    second="$(readme "--preset e2e-sdvae-xl2") $SHORT --model SiT-$SIZE/${preset: -1} --data-dir imagenet/few"
    ckpt=$run/checkpoints/$(printf %07d $STEPS).pt
    vae_ckpt=${train#*--vae-ckpt } vae_ckpt=${vae_ckpt%% *}

    if [ $preset = sdvae-xl2 ]; then
        rehearse run $((2 * RESOLUTION))-pixels $train --exp-name large --resolution $((2 * RESOLUTION)) \
            --batch-size $PROCESSES --max-train-steps 1
        rehearse losses exps/large 1
        rm -rf exps/large/checkpoints
        stopped $train
    fi
    rehearse run $preset $train                                                 # of sdvae-xl2 this is the resuming
    rehearse losses $run $STEPS $([ $preset != sdvae-xl2 ] || echo exps/unstopped)
    rehearse trained_vae $ckpt $vae_ckpt
    for old in $run/checkpoints/*.pt; do
        [ $old = $ckpt ] || rm -f $old                                          # the stop's
    done

    rehearse run $preset-sample $sample
    cp samples.npz $run/samples.npz                                             # the other preset has the name, too
    rehearse batch $run/samples.npz $SAMPLES $RESOLUTION
    rehearse run $preset-fid $fid
    rehearse scores $run/fid.json $SAMPLES
    rehearse run $preset-export python vae.py export $ckpt e2e-vae-$preset --resolution $RESOLUTION
    rehearse same_vae e2e-vae-$preset $ckpt

    rehearse run e2e-$preset $second
    rehearse losses exps/e2e-$preset $STEPS
    rehearse same_vae exps/e2e-$preset/checkpoints/$(printf %07d $STEPS).pt $ckpt
    rm -rf $run/checkpoints exps/e2e-$preset/checkpoints
}

main() {                                       # read whole before it starts, so that this file may change meanwhile
    [ -f train.py ] || fail "run it from the project's root: bash experiments/rehearse.sh"
    [ -f /proc/self/smaps_rollup ] || fail "memory is measured by Linux's /proc/PID/smaps_rollup: not here"
    [[ $SIZE = XL || $SIZE = S ]] || fail "SIZE=$SIZE: take XL or S"
    ROOT=$PWD

    # Runs of other settings must not mix with these: a folder belongs to the settings it was begun with.
    mkdir -p "$OUT"
    cd "$OUT"
    settings="SIZE=$SIZE PROCESSES=$PROCESSES BATCH=$BATCH STEPS=$STEPS SAMPLES=$SAMPLES NUM_STEPS=$NUM_STEPS"
    settings+=" RESOLUTION=$RESOLUTION FLAGS=$FLAGS"
    [ -f settings ] || echo "$settings" > settings
    begun=$(cat settings)
    [ "$settings" = "$begun" ] || fail "$OUT was begun with $begun: name another folder by OUT=DIR"
    echo "reduced: $settings"

    trap 'exit 130' INT TERM
    ln -sf "$ROOT"/{train,sample,fid,vae}.py .
    export TORCH_HOME=$PWD/torch HF_HUB_OFFLINE=1                               # all weights come from files here
    export PET_STANDALONE=1                                                     # torchrun takes a free port
    SHORT="--enc-ckpt pretrained/dinov2_vitb14_pretrain.pth --vgg-ckpt pretrained/vgg16-397923af.pth"
    SHORT+=" --lpips-ckpt pretrained/lpips-vgg.pth --resolution $RESOLUTION --batch-size $BATCH"
    SHORT+=" --max-train-steps $STEPS --log-steps 1 --sampling-steps 0 $FLAGS"
    # Loader processes are forked where the networks are built already, and keep the weights of that moment, which
    # on a CPU lie in the same memory: of SiT, its average and VAE 5.8 GB more at XL.
    [ $SIZE = S ] || SHORT+=" --num-workers 0"
    rehearse run standins python "$ROOT/experiments/standins.py" .
    for preset in $PRESETS; do
        all $preset
    done
    rehearse table
}

main; exit
