#!/usr/bin/env bash
# What will my GPU do? bash experiments/gpu.sh, from the project's root: within 40 minutes, without network.
#
# In this order, each with a limit of time, on one GPU:
#     tests       tests/test_gpu.py
#     startup     the largest model's way to its third step, part by part
#     steps       a step's time, rate, share of the peak and memory: MODELS, REPA-E and the second stage (cached
#                 latents), eager for 4, 8, 16, ... images until memory ends, then compiled from the most that went
#     sampling    pictures a second of the largest model, without and with guidance, eager and compiled
#     evaluating  pictures a second through fid.py's networks, Inception's with random weights
#     emoji       REPA against REPA-E from the same short VAE, with EMOJI_MODEL on emoji, judged by fid.py
#
# All weights are random, all pictures are drawn here. What fails, or runs out of memory or time, is noted and the
# next part begins. Run it again at any time: what is done is not done twice, and the rest is tried again. Everything
# goes to OUT: results.jsonl, a line a measurement; logs; table.md, which is printed too.
#
# Without CUDA, or with TOY=1, it runs through at toy size: that tries out the script, and measures nothing of use.
set -euo pipefail

OUT=${OUT:-exps/gpu}
TOY=${TOY:-0}                                               # 1: toy size, as always without CUDA
TOTAL=${TOTAL:-2400}                                        # seconds for all of it

sizes() {
    if [ "$TOY" = 1 ]; then
        MODELS=${MODELS:-SiT-T/2}                           # the first is the largest
        PRESET=${PRESET:-tiny}                              # of train.py
        RESOLUTION=${RESOLUTION:-32}
        MODES=${MODES:-eager}                               # the last is start-up's; compiling takes minutes here
        LEAST=${LEAST:-2} MOST=${MOST:-4}                   # images of a step
        START=${START:-$LEAST}                              # and of start-up's
        STEPS=${STEPS:-1}                                   # that are timed, after three
        SAMPLES=${SAMPLES:-2} SAMPLER_STEPS=${SAMPLER_STEPS:-2}             # at once, each in so many Euler steps
        EMOJI_MODEL=${EMOJI_MODEL:-SiT-T/2}
        EMOJI_FLAGS=${EMOJI_FLAGS:---batch-size 4}
        EMOJI_PIXELS=${EMOJI_PIXELS:-32}
        VAE_STEPS=${VAE_STEPS:-2} EMOJI_STEPS=${EMOJI_STEPS:-2}             # of the VAE by itself, of each run
        EMOJI_SAMPLES=${EMOJI_SAMPLES:-8}
    else
        MODELS=${MODELS:-SiT-XL/2 SiT-B/2}
        PRESET=${PRESET:-sdvae-xl2}
        RESOLUTION=${RESOLUTION:-256}
        MODES=${MODES:-eager compiled}
        LEAST=${LEAST:-4} MOST=${MOST:-256}
        START=${START:-16}                                  # what goes eagerly into 80 GB: compiled once for both
        STEPS=${STEPS:-10}
        SAMPLES=${SAMPLES:-64} SAMPLER_STEPS=${SAMPLER_STEPS:-50}
        EMOJI_MODEL=${EMOJI_MODEL:-SiT-S/2}
        EMOJI_FLAGS=${EMOJI_FLAGS:---encoder-depth 4 --batch-size 64 --num-workers 8 --compile}
        EMOJI_PIXELS=${EMOJI_PIXELS:-64}
        VAE_STEPS=${VAE_STEPS:-1000} EMOJI_STEPS=${EMOJI_STEPS:-2000}
        EMOJI_SAMPLES=${EMOJI_SAMPLES:-2000}
    fi
    DATA=${DATA:-data/openmoji-$EMOJI_PIXELS}               # DATA/train and DATA/val; drawn where it is missing
}

fail() { echo "error: $*" >&2; exit 2; }

# last_line FILE: without what a line of JSON cannot hold, and without progress bars
last_line() {
    tr '\r' '\n' < "$1" | LC_ALL=C tr -cd '[:print:]\n' | tr -d '"\\' | awk 'NF { line = $0 } END { print line }'
}

# part NAME LIMIT COMMAND...: once, within LIMIT seconds and what is left of TOTAL
part() {
    local name=$1 limit=$2 began=$SECONDS code=0 log=$OUT/logs/$1.log outcome=done
    shift 2
    [ ! -f "$OUT/done/$name" ] || return 0
    [ $limit -lt $((TOTAL - SECONDS)) ] || limit=$((TOTAL - SECONDS))
    if [ $limit -gt 0 ]; then
        echo "$(date +%H:%M) $name, at most $limit s"
        timeout --kill-after=30 $limit "$@" > "$log" 2>&1 &             # beside, so that Ctrl-C ends it at once
        wait $! || code=$?
    else
        code="no time"
    fi
    case $code in
        0)         touch "$OUT/done/$name"
                   [ $name != tests ] || outcome=$(last_line "$log") ;;
        124)       outcome="not done within $limit s" ;;
        "no time") outcome="no time was left" ;;
        *)         outcome="failed: $(last_line "$log")" ;;
    esac
    [ "$code" = 0 ] || echo "$name: $outcome; this script, started again, tries it again"
    printf '{"device": "%s", "torch": "%s", "part": "%s", "outcome": "%s", "seconds": %d}\n' \
        "$CARD" "$TORCH" "$name" "$outcome" $((SECONDS - began)) >> "$RESULTS"
}

# measure NAME LIMIT WHAT FLAG...: a part that is measure.py's
measure() {
    local name=$1 limit=$2 what=$3
    shift 3
    part $name $limit python experiments/measure.py $what "$RESULTS" "$@"
}

# emoji RUN STEPS FLAG...: a run of train.py, which goes on where its time ended
emoji() {
    local run=$1 steps=$2
    shift 2
    part emoji-$run 300 python train.py --output-dir "$OUT/emoji" --exp-name $run --data-dir "$DATA/train" \
        --val-dir "$DATA/val" --resolution $EMOJI_PIXELS --model $EMOJI_MODEL --max-train-steps $steps \
        --lr-decay-steps $((steps * 3 / 5)) --sampling-steps $steps --cfg-scale 1 --resume $EMOJI_FLAGS "$@"
}

# judge RUN: Frechet distance of samples to the training pictures
judge() {
    part judge-$1 180 python fid.py "$DATA/train" --ckpt "$(checkpoint $1 $EMOJI_STEPS)" --num-steps 20 \
        --num-samples $EMOJI_SAMPLES --metrics fid --json "$OUT/emoji/$1/fd.json"
}

checkpoint() { printf "$OUT/emoji/%s/checkpoints/%07d.pt" $1 $2; }                          # RUN STEP

main() {                                       # read whole before it starts, so that this file may change meanwhile
    [ -f train.py ] || fail "run it from the project's root: bash experiments/gpu.sh"
    command -v timeout > /dev/null || fail "timeout is missing; it is in GNU coreutils"
    { read -r CARD; read -r TORCH; read -r CUDA; } < <(python -c "
import torch
here = torch.cuda.is_available()
print(torch.cuda.get_device_name() if here else 'CPU', torch.__version__, int(here), sep='\n')")
    [ $CUDA = 1 ] || TOY=1
    sizes
    declare -A how=([eager]="" [compiled]=--compile)

    # Measurements of other settings must not mix with these: a folder belongs to those that it was begun with.
    mkdir -p "$OUT/logs" "$OUT/done"
    RESULTS=$OUT/results.jsonl
    settings="$CARD, PyTorch $TORCH MODELS=$MODELS PRESET=$PRESET RESOLUTION=$RESOLUTION STEPS=$STEPS"
    settings+=" SAMPLES=$SAMPLES SAMPLER_STEPS=$SAMPLER_STEPS EMOJI_MODEL=$EMOJI_MODEL EMOJI_FLAGS=$EMOJI_FLAGS"
    settings+=" VAE_STEPS=$VAE_STEPS EMOJI_STEPS=$EMOJI_STEPS EMOJI_SAMPLES=$EMOJI_SAMPLES DATA=$DATA"
    [ -f "$OUT/settings" ] || echo "$settings" > "$OUT/settings"
    begun=$(cat "$OUT/settings")
    [ "$settings" = "$begun" ] || fail "$OUT was begun with $begun: name another folder by OUT=DIR"
    [ ! -f "$RESULTS" ] || python experiments/measure.py table "$RESULTS"

    trap 'kill $(jobs -p) 2> /dev/null; exit 130' INT TERM
    export TORCHINDUCTOR_CACHE_DIR=$(realpath "$OUT")/compiled
    largest="--preset $PRESET --model ${MODELS%% *} --resolution $RESOLUTION"
    part tests 600 python -m pytest -q tests/test_gpu.py
    [ -d "$DATA" ] || part drawing 120 python data/openmoji.py --size $EMOJI_PIXELS --out "$DATA"
    [ -f "$OUT/done/startup" ] || rm -rf "$TORCHINDUCTOR_CACHE_DIR"                         # it compiles all anew
    measure startup 300 startup ${how[${MODES##* }]} --images $START --data-dir "$DATA/train" $largest
    for model in $MODELS; do
        for stage in repae second; do
            flags="--images $LEAST --most $MOST --steps $STEPS --preset $PRESET --model $model --resolution $RESOLUTION"
            [ $stage = repae ] || flags+=" --vae-grad none --cache-latents"
            for mode in $MODES; do
                measure steps-${model/\//-}-$stage-$mode 300 steps ${how[$mode]} $flags
            done
        done
    done
    flags="--images $SAMPLES --steps $SAMPLER_STEPS $largest --vae-grad none --proj-coeff 0"
    for mode in $MODES; do
        measure sampling-$mode 120 sampling ${how[$mode]} $flags
    done
    measure evaluating 90 evaluating --images $SAMPLES --steps $STEPS --resolution $RESOLUTION

    emoji vae $VAE_STEPS --vae-only
    vae=$(checkpoint vae $VAE_STEPS)
    emoji repa $EMOJI_STEPS --vae-ckpt "$vae" --vae-grad none --cache-latents
    emoji repae $EMOJI_STEPS --vae-ckpt "$vae"
    judge repa
    judge repae
    measure comparison 60 comparison "$OUT/emoji/repa" "$OUT/emoji/repae"

    python experiments/measure.py table "$RESULTS" | tee "$OUT/table.md"
}

main; exit
