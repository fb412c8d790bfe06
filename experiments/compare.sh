#!/usr/bin/env bash
# The paper's comparison at the size of a laptop: bash experiments/compare.sh
#
# One VAE is trained by its own losses (base). From it each regime of experiments/common.sh trains a SiT for STEPS
# steps, all else equal: REGIMES with each of SEEDS, ABLATIONS with the first. The frozen regimes get that VAE after
# STEPS more steps on its own (vae). So all VAEs but scratch's have had as many steps, at the same learning rates.
#
# The target encoder is ENC_TYPE, its weights from the hub or, offline, from the file ENC_CKPT (experiments/dinov2.py
# makes one). FEATURES is the evaluation network: no run is trained with it. All runs have the perceptual distance
# over EfficientNet-Lite0.
#
# Safe to rerun: finished runs are skipped, interrupted runs resume. OUT gets a folder per run, logs, table.md and the
# charts. Other architectures, other lengths:
#     VAE=f4d8 MODEL=SiT-T/2 OUT=exps/other bash experiments/compare.sh
#     STEPS=6400 EVERY=400 POINTS="400 800 1600 3200 6400" SEEDS=1 REGIMES="repae repa second" ABLATIONS= \
#         OUT=exps/longer bash experiments/compare.sh
cd "$(dirname "$0")/.."
. experiments/common.sh

export OUT=${OUT:-exps/compare}
export SEEDS=${SEEDS:-1 2 3}
export REGIMES=${REGIMES:-repae noalign naive sit repa scratch second control}
export ABLATIONS=${ABLATIONS-weight lite0 both nonorm irepa float32}
export ENC_TYPE=${ENC_TYPE:-dinov2-vit-s}
export ENC_CKPT=${ENC_CKPT:-}
export MODEL=${MODEL:-SiT-T/1}
export VAE=${VAE:-f4d32}                                    # architecture
export BASE_STEPS=${BASE_STEPS:-1000}                       # of the VAE that all regimes start from
export STEPS=${STEPS:-1600}                                 # of each regime
export EVERY=${EVERY:-$((STEPS / 4))}                       # steps between the checkpoints that are kept
export POINTS=${POINTS:-$((STEPS / 4)) $((STEPS / 2)) $STEPS}           # steps at which a run is evaluated
export SAMPLES=${SAMPLES:-2000}                             # at each of them
export SAMPLER_STEPS=${SAMPLER_STEPS:-20}                   # Euler steps, without guidance
export FEATURES=${FEATURES:-efficientnet-lite2}
# More flags for each train.py: the KL term is the paper's; docs/history.md says how the other was chosen.
export FLAGS=${FLAGS:---kl-weight 1e-6 --vae-align-proj-coeff 0.5}
export RESOLUTION=${RESOLUTION:-32}
export DATA=${DATA:-data/openmoji-$RESOLUTION}              # DATA/train and DATA/val; rendered if missing
PROCESSES=${PROCESSES:-2}                                   # runs at a time
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}                # threads per run

# train RUN STEPS SEED FLAG...: until the checkpoint of step STEPS exists
train() {
    local run=$1 steps=$2 file
    file=$(checkpoint $run $steps)
    [ ! -f "$file" ] || return 0
    python train.py --output-dir "$OUT" --exp-name $run --data-dir "$DATA/train" --val-dir "$DATA/val" \
        --resolution $RESOLUTION --vae $VAE --model $MODEL --max-train-steps $steps --checkpointing-steps $EVERY \
        --keep-every $EVERY --sampling-steps $steps --cfg-scale 1 --seed $3 --resume --enc-type "$ENC_TYPE" \
        ${ENC_CKPT:+--enc-ckpt "$ENC_CKPT"} $FLAGS "${@:4}"
    [ -f "$file" ] || fail "$run: stopped before step $steps"
}

# scaled_noise RUN OTHER NAME: the VAE of RUN with as much posterior noise as OTHER's; prints the file
scaled_noise() {
    local file=$OUT/$3-vae.pt
    [ -f "$file" ] || python experiments/analyze.py noise "$DATA/train" "$(checkpoint $1 $STEPS)" "$2" \
        --resolution $RESOLUTION --out "$file" >&2
    echo "$file"
}

# run_regime REGIME SEED: train and evaluate it
run_regime() {
    set -euo pipefail
    local run=$1-$2 flags vae
    [ ! -f "$OUT/$run/evaluation-$(printf %07d $STEPS).json" ] || return 0                  # the last file of a run
    case $1 in
        sit | repa | repa-mse) vae=$(checkpoint vae $STEPS) ;;
        second)     vae=$(checkpoint repae-$2 $STEPS) ;;
        control)    vae=$(checkpoint noalign-$2 $STEPS) ;;
        gen-first-second) vae=$(checkpoint gen-first-$2 $STEPS) ;;
        less-noise) vae=$(scaled_noise vae $(checkpoint repae-$2 $STEPS) $run) ;;
        more-noise) vae=$(scaled_noise repae-$2 $(checkpoint vae $STEPS) $run) ;;
        scratch)    vae= ;;
        *)          vae=$(checkpoint base $BASE_STEPS) ;;
    esac
    flags=$(regime_flags $1)
    [[ $flags != *"--vae-grad none"* ]] || flags+=" --cache-latents"
    case $1 in gen-first | gen-first-repae)                 # the first half: ten times these weights
        train $run $((STEPS / 2)) $2 --vae-ckpt "$vae" $flags --entropy-weight 5e-4 --vae-denoising-coeff 1 \
            --lr-decay-steps 0 ;;
    esac
    train $run $STEPS $2 ${vae:+--vae-ckpt "$vae"} $flags
    python experiments/evaluate.py "$OUT/$run" --points $POINTS --samples $SAMPLES --num-steps $SAMPLER_STEPS \
        --features $FEATURES
    python experiments/analyze.py evaluate "$(checkpoint $run $STEPS)" --enc-type "$ENC_TYPE" \
        ${ENC_CKPT:+--enc-ckpt "$ENC_CKPT"}
}

# log_regime REGIME SEED: the same with its output in a file; a run that fails does not stop the others
log_regime() {
    if bash -c 'run_regime $0 $1' $1 $2 >> "$OUT/logs/$1-$2.log" 2>&1; then
        echo "$(date +%H:%M) $1-$2 done"
    else
        echo "$(date +%H:%M) $1-$2 failed: see $OUT/logs/$1-$2.log; rerun this script to resume"
    fi
}
export -f fail checkpoint regime_flags train scaled_noise run_regime log_regime

# run_all "SEED..." REGIME...: every seed of each regime, PROCESSES at a time
run_all() {
    for seed in $1; do for regime in "${@:2}"; do echo $regime $seed; done; done |
        xargs -r -P $PROCESSES -L 1 bash -c 'log_regime $0 $1'
}

main() {                                                    # parsed as a whole, so this file may change meanwhile
    for step in $POINTS $STEPS; do
        [ $((step % EVERY)) = 0 ] && [ $step -le $STEPS ] || fail "$step: not a multiple of EVERY=$EVERY up to STEPS"
    done
    check_matplotlib
    keep_settings "$OUT/settings" MODEL VAE BASE_STEPS STEPS EVERY FLAGS DATA RESOLUTION ENC_TYPE SAMPLER_STEPS \
        FEATURES SAMPLES POINTS
    mkdir -p "$OUT/logs"
    [ -d "$DATA" ] || python data/openmoji.py --size $RESOLUTION --out "$DATA"

    base=$(checkpoint base $BASE_STEPS)
    threads=$OMP_NUM_THREADS OMP_NUM_THREADS=$((PROCESSES * OMP_NUM_THREADS))               # one run at a time here
    (train base $BASE_STEPS 0 --vae-only >> "$OUT/logs/base.log" 2>&1) || fail "base: see $OUT/logs/base.log"
    (train vae $STEPS 0 --vae-only --vae-ckpt "$base" >> "$OUT/logs/vae.log" 2>&1) || fail "vae: see $OUT/logs/vae.log"
    OMP_NUM_THREADS=$threads
    early= late=                                                        # the late ones need the VAE of another run
    for regime in $REGIMES; do
        case $regime in second | control | gen-first-second | *-noise) late+=" $regime" ;; *) early+=" $regime" ;; esac
    done
    seed=${SEEDS%% *}
    run_all "$SEEDS" $early
    run_all "$SEEDS" $late
    run_all $seed $ABLATIONS

    python experiments/compare.py "$OUT" --seeds $SEEDS > "$OUT/table.md"
    [ -s "$OUT/floor.md" ] ||
        python experiments/evaluate.py --floor "$DATA" --samples $SAMPLES --features $FEATURES > "$OUT/floor.md"
    cat "$OUT/table.md" "$OUT/floor.md"
    runs=() vaes=("$base")
    for regime in $REGIMES; do
        [ ! -f "$OUT/$regime-$seed/metrics.jsonl" ] || runs+=("$OUT/$regime-$seed")
    done
    python experiments/curves.py "${runs[@]}" --out "$OUT/curves.png"
    for run in repae-$seed naive-$seed; do
        [ ! -f "$(checkpoint $run $STEPS)" ] || vaes+=("$(checkpoint $run $EVERY)" "$(checkpoint $run $STEPS)")
    done
    python experiments/analyze.py latents "$DATA/val" "${vaes[@]}" --resolution $RESOLUTION --out "$OUT/latents.png"
}

main; exit
