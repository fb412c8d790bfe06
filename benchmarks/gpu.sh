#!/usr/bin/env bash
# What will my GPU do? bash benchmarks/gpu.sh: within 30 minutes on one GPU, offline.
#
# In this order, each with a time limit:
#     tests       tests/test_gpu.py
#     steps       time, images/s, share of the peak and memory of a step: MODELS, REPA-E and the second stage (cached
#                 latents), eager with 4, 8, 16, ... images until out of memory, then compiled from the most that fit
#     sampling    images/s of the largest model, without and with guidance, eager and compiled
#
# All weights and images are random. What fails, or runs out of memory or time, is logged and the next
# section begins. Safe to rerun: what is done is skipped, the rest is tried again. OUT gets results.jsonl, a line per
# measurement; logs; table.md, which is printed too.
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
        MODES=${MODES:-eager} LEAST=${LEAST:-2} MOST=${MOST:-4} STEPS=${STEPS:-1}
        SAMPLES=${SAMPLES:-2} SAMPLER_STEPS=${SAMPLER_STEPS:-2}
    fi
    MODELS=${MODELS:-SiT-XL/2 SiT-B/2}                      # the first is the largest
    PRESET=${PRESET:-sdvae-xl2}                             # of train.py
    RESOLUTION=${RESOLUTION:-256}
    MODES=${MODES:-eager compiled}
    LEAST=${LEAST:-4} MOST=${MOST:-256}                     # images per step
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
    printf '{"device": "%s", "torch": "%s", "part": "%s", "outcome": "%s", "seconds": %d}\n' \
        "$CARD" "$TORCH" "$name" "$outcome" $((SECONDS - began)) >> "$RESULTS"
}

# measure NAME LIMIT WHAT FLAG...: a section of measure.py
measure() {
    section $1 $2 python benchmarks/measure.py $3 "$RESULTS" "${@:4}"
}

main() {                                                    # parsed as a whole, so this file may change meanwhile
    command -v timeout > /dev/null || fail "timeout is missing; it is part of GNU coreutils"
    { read -r CARD; read -r TORCH; read -r CUDA; } < <(python -c "
import torch
cuda = torch.cuda.is_available()
print(torch.cuda.get_device_name() if cuda else 'CPU', torch.__version__, int(cuda), sep='\n')")
    [ $CUDA = 1 ] || TOY=1
    choose_sizes
    declare -A flag_of=([eager]="" [compiled]=--compile)
    keep_settings "$OUT/settings" CARD TORCH MODELS PRESET RESOLUTION STEPS SAMPLES SAMPLER_STEPS
    mkdir -p "$OUT/logs" "$OUT/done"
    RESULTS=$OUT/results.jsonl
    [ ! -f "$RESULTS" ] || python benchmarks/measure.py table "$RESULTS"

    export TORCHINDUCTOR_CACHE_DIR=$(realpath "$OUT")/compiled
    section tests 600 python -m pytest -q tests/test_gpu.py
    for model in $MODELS; do
        for stage in repae second; do
            flags="--images $LEAST --most $MOST --steps $STEPS --preset $PRESET --model $model --resolution $RESOLUTION"
            [ $stage = repae ] || flags+=" --vae-grad none --cache-latents"
            for mode in $MODES; do
                measure steps-${model/\//-}-$stage-$mode 300 steps ${flag_of[$mode]} $flags
            done
        done
    done
    flags="--images $SAMPLES --steps $SAMPLER_STEPS --preset $PRESET --model ${MODELS%% *} --resolution $RESOLUTION"
    flags+=" --vae-grad none --proj-coeff 0"
    for mode in $MODES; do
        measure sampling-$mode 120 sampling ${flag_of[$mode]} $flags
    done
    python benchmarks/measure.py table "$RESULTS" | tee "$OUT/table.md"
}

main; exit
