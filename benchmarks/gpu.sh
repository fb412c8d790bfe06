#!/usr/bin/env bash
# What will my GPU do? bash benchmarks/gpu.sh: within 30 minutes on one GPU, offline.
#
# In this order, each with a time limit; the first four within a quarter of an hour (TOTAL=900):
#     parts       layers of the VAE alone, in PyTorch's forms and in ours for CUDA
#     changes     steps of IMAGES images of the largest model, eager and compiled, with milliseconds per kind of
#                 kernel: with the VAE's layers in PyTorch's forms (plain), in ours, and with all of cuDNN's plans
#     release     the same step of the authors' code; RELEASE is a folder with its models/ and loss/
#     second      the second stage of the largest model, and with torch.compile's autotuning
#     tests       tests/test_gpu.py
#     steps       time, images/s, share of the peak and memory of a step: MODELS, REPA-E and the second stage (cached
#                 latents), eager with 4, 8, 16, ... images until out of memory, then compiled from the most that fit
#     sampling    images/s of the largest model, without and with guidance, eager and compiled
#
# All weights and images are random. What fails, or runs out of memory or time, is logged and the next
# section begins. Safe to rerun: what is done is skipped, the rest is tried again. OUT gets results.jsonl, a line per
# measurement; logs; tables.md, which is printed too.
#
# Without CUDA, or with TOY=1, it runs at toy size: this tests the script and measures nothing of use.
cd "$(dirname "$0")/.."
. experiments/common.sh

OUT=${OUT:-exps/gpu}
TOY=${TOY:-0}
TOTAL=${TOTAL:-1800}                                        # seconds for all of it

# choose_sizes: defaults at toy size or at full size
choose_sizes() {
    if [ "$TOY" = 1 ]; then
        MODELS=${MODELS:-SiT-T/2} PRESET=${PRESET:-tiny} RESOLUTION=${RESOLUTION:-32}
        COMPILE=${COMPILE:-0} LEAST=${LEAST:-2} MOST=${MOST:-4} IMAGES=${IMAGES:-2} STEPS=${STEPS:-1}
        SAMPLES=${SAMPLES:-2} SAMPLER_STEPS=${SAMPLER_STEPS:-2}
    fi
    MODELS=${MODELS:-SiT-XL/2 SiT-B/2}                      # the first is the largest
    PRESET=${PRESET:-sdvae-xl2}                             # of train.py
    RESOLUTION=${RESOLUTION:-256}
    COMPILE=${COMPILE:-1}                                   # 0: eager only
    LEAST=${LEAST:-4} MOST=${MOST:-256}                     # images per step
    IMAGES=${IMAGES:-32}                                    # per step, where forms are compared
    STEPS=${STEPS:-10}                                      # timed steps, after three others
    SAMPLES=${SAMPLES:-64} SAMPLER_STEPS=${SAMPLER_STEPS:-50}           # images at once, Euler steps
}

# last_line FILE: without progress bars and what a JSON string cannot hold
last_line() {
    tr '\r' '\n' < "$1" | LC_ALL=C tr -cd '[:print:]\n' | tr -d '"\\' | awk 'NF { line = $0 } END { print line }'
}

# section NAME LIMIT COMMAND...: once, within LIMIT seconds and what is left of TOTAL
section() {
    local name=$1 limit=$2 began=$SECONDS code=0 log=$OUT/logs/$1.log outcome=done
    [ ! -f "$OUT/done/$name" ] || return 0
    [ $limit -lt $((TOTAL - SECONDS)) ] || limit=$((TOTAL - SECONDS))
    if [ $limit -gt 0 ]; then
        echo "$(date +%H:%M) $name, at most $limit s"
        timeout --kill-after=30 $limit "${@:3}" > "$log" 2>&1 &         # in the background: Ctrl-C ends it at once
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
    [ "$code" = 0 ] || echo "$name: $outcome; rerun this script to try it again"
    printf '{"device": "%s", "torch": "%s", "measured": "section", "section": "%s", "outcome": "%s", "seconds": %d}\n' \
        "$CARD" "$TORCH" "$name" "$outcome" $((SECONDS - began)) >> "$RESULTS"
}

# measure NAME LIMIT WHAT FLAG...: a section of measure.py
measure() {
    section $1 $2 python benchmarks/measure.py $3 "$RESULTS" --preset $PRESET --resolution $RESOLUTION "${@:4}"
}

main() {                                                    # parsed as a whole, so this file may change meanwhile
    command -v timeout > /dev/null || fail "timeout is missing; it is part of GNU coreutils"
    { read -r CARD; read -r TORCH; read -r CUDA; } < <(python -c "
import torch
cuda = torch.cuda.is_available()
print(torch.cuda.get_device_name() if cuda else 'CPU', torch.__version__, int(cuda), sep='\n')")
    [ $CUDA = 1 ] || TOY=1
    choose_sizes
    keep_settings "$OUT/settings" CARD TORCH MODELS PRESET RESOLUTION IMAGES STEPS SAMPLES SAMPLER_STEPS
    mkdir -p "$OUT/logs" "$OUT/done"
    RESULTS=$OUT/results.jsonl
    [ ! -f "$RESULTS" ] || python benchmarks/measure.py tables "$RESULTS"
    export TORCHINDUCTOR_CACHE_DIR=$(realpath "$OUT")/compiled PYTHONUNBUFFERED=1
    local compile= largest=${MODELS%% *} second="--vae-grad none --cache-latents"
    [ $COMPILE = 0 ] || compile=--compile

    local step="steps $compile --steps $STEPS --model $largest"
    local same="$step --images $IMAGES --most $IMAGES" twice="--images $((2 * IMAGES)) --most $((2 * IMAGES))"
    local theirs="release --release ${RELEASE:-} --steps $STEPS --model $largest --images $IMAGES"
    measure parts 130 parts $compile --images $IMAGES --vae-only
    measure changes-plain 200 $same --variant plain
    measure changes-ours 150 $same
    measure changes-plans 90 $same --variant plans
    if [ -n "${RELEASE:-}" ]; then
        measure release 60 $theirs
        [ $COMPILE = 0 ] || measure release-compiled 145 $theirs --compile
    fi
    measure second 50 $same $second
    measure second-twice 60 $step $twice $second
    measure second-autotune 160 $step $twice $second --variant autotune

    section tests 600 python -m pytest -q tests/test_gpu.py
    for model in $MODELS; do
        step="steps $compile --images $LEAST --most $MOST --steps $STEPS --model $model"
        measure steps-${model/\//-}-repae 480 $step
        measure steps-${model/\//-}-second 300 $step $second
    done
    local samples="sampling --images $SAMPLES --steps $SAMPLER_STEPS --model $largest --vae-grad none --proj-coeff 0"
    measure sampling-eager 120 $samples
    [ $COMPILE = 0 ] || measure sampling-compiled 120 $samples --compile
    python benchmarks/measure.py tables "$RESULTS" | tee "$OUT/tables.md"
}

main; exit
