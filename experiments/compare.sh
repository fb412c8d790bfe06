#!/usr/bin/env bash
# The paper's comparison at a size for a laptop: bash experiments/compare.sh, from the project's root.
#
# One VAE is trained by its own losses (base). From it each regime trains a SiT for STEPS steps, all else equal. The
# frozen regimes take that VAE after STEPS more steps by itself (vae), so that every VAE but the one from random
# weights has had equally many, at equal rates. The regimes, once a seed:
#     sit      VAE frozen, no alignment              naive    diffusion loss into the VAE
#     repa     VAE frozen, alignment                 noalign  neither into the VAE, which its own losses train on
#     repae    alignment into the VAE (REPA-E)       scratch  REPA-E from a VAE of random weights
#     second   REPA over the frozen VAE of the same seed's repae; control: over that of its noalign
# and, with the first seed, what REPA-E is without one of its parts, or with another:
#     both     diffusion loss and alignment into the VAE      weight   the paper's weight in the VAE's pass, 1.5
#     nonorm   latent statistics that stay as at the start    irepa    iREPA's projector and norm of the features
#     lite0    another teacher, EfficientNet-Lite0            float32  the same in float32
#
# The teacher is ENC_TYPE, from the hub or, without network, from the file ENC_CKPT (experiments/dinov2.py makes one).
# What judges is FEATURES, a network that teaches none of the runs (the perceptual distance of all of them is over
# EfficientNet-Lite0).
#
# Run it again at any time: what is done is not done twice, and a stopped run goes on where it was. Everything goes
# to OUT, a run's output to OUT/logs. At the end: the table (OUT/table.md) and the pictures beside it.
# Another architecture: VAE=f4d8 MODEL=SiT-T/2 OUT=exps/other bash experiments/compare.sh
# Another length: STEPS=6400 EVERY=400 POINTS="400 800 1600 3200 6400" SEEDS=1 REGIMES="repae repa second" \
#     ABLATIONS= OUT=exps/longer bash experiments/compare.sh
set -euo pipefail

export OUT=${OUT:-exps/compare}
export SEEDS=${SEEDS:-1 2 3}
export REGIMES=${REGIMES:-repae noalign naive sit repa scratch second control}              # some of the eight
export ABLATIONS=${ABLATIONS-weight lite0 both nonorm irepa float32}                        # and of the six
export ENC_TYPE=${ENC_TYPE:-dinov2-vit-s}                   # the teacher
export ENC_CKPT=${ENC_CKPT:-}                               # its weights; without, the hub's
export MODEL=${MODEL:-SiT-T/1}
export VAE=${VAE:-f4d32}                                    # the VAE's architecture
export BASE_STEPS=${BASE_STEPS:-1000}                       # of the VAE that all start from
export STEPS=${STEPS:-1600}                                 # of each regime
export EVERY=${EVERY:-$((STEPS / 4))}                       # checkpoints are kept so often
export POINTS=${POINTS:-$((STEPS / 4)) $((STEPS / 2)) $STEPS}           # the steps at which a run is judged
export SAMPLES=${SAMPLES:-2000}                             # at each of them
export SAMPLER_STEPS=${SAMPLER_STEPS:-20}                   # Euler steps, without guidance
export FEATURES=${FEATURES:-efficientnet-lite2}             # the network of the Frechet distance
# More flags for each train.py: the KL term is the paper's; docs/results.md says how the other was chosen.
export FLAGS=${FLAGS:---kl-weight 1e-6 --vae-align-proj-coeff 0.5}
export RESOLUTION=${RESOLUTION:-32}
export DATA=${DATA:-data/openmoji-$RESOLUTION}              # DATA/train and DATA/val; drawn where it is missing
PROCESSES=${PROCESSES:-2}                                   # runs at a time
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}                # threads of each

fail() { echo "error: $*" >&2; exit 2; }

checkpoint() { printf "$OUT/%s/checkpoints/%07d.pt" "$1" "$2"; }                            # RUN STEP

# train RUN STEPS SEED FLAG...: until the checkpoint of step STEPS is there
train() {
    local run=$1 steps=$2 seed=$3
    shift 3
    [ -f "$(checkpoint $run $steps)" ] && return
    python train.py --output-dir "$OUT" --exp-name $run --data-dir "$DATA/train" --val-dir "$DATA/val" \
        --resolution $RESOLUTION --vae $VAE --model $MODEL --max-train-steps $steps --checkpointing-steps $EVERY \
        --keep-every $EVERY --sampling-steps $steps --cfg-scale 1 --seed $seed --resume --enc-type "$ENC_TYPE" \
        ${ENC_CKPT:+--enc-ckpt "$ENC_CKPT"} $FLAGS "$@"
    [ -f "$(checkpoint $run $steps)" ] || { echo "$run: stopped before step $steps"; return 1; }
}

# one REGIME SEED: train it and judge it
one() {
    set -euo pipefail
    local run=$1-$2 base vae judged
    judged=$OUT/$run/evaluation-$(printf %07d $STEPS).json                                  # the last that is written
    [ ! -f "$judged" ] || return 0
    base=$(checkpoint base $BASE_STEPS) vae=$(checkpoint vae $STEPS)
    case $1 in
        sit)     train $run $STEPS $2 --vae-grad none --cache-latents --vae-ckpt "$vae" --proj-coeff 0 ;;
        repa)    train $run $STEPS $2 --vae-grad none --cache-latents --vae-ckpt "$vae" ;;
        second)  train $run $STEPS $2 --vae-grad none --cache-latents --vae-ckpt "$(checkpoint repae-$2 $STEPS)" ;;
        control) train $run $STEPS $2 --vae-grad none --cache-latents --vae-ckpt "$(checkpoint noalign-$2 $STEPS)" ;;
        naive)   train $run $STEPS $2 --vae-ckpt "$base" --vae-grad diffusion ;;
        repae)   train $run $STEPS $2 --vae-ckpt "$base" ;;
        noalign) train $run $STEPS $2 --vae-ckpt "$base" --vae-align-proj-coeff 0 ;;
        scratch) train $run $STEPS $2 --vae-from-scratch ;;
        both)    train $run $STEPS $2 --vae-ckpt "$base" --vae-grad both ;;
        nonorm)  train $run $STEPS $2 --vae-ckpt "$base" --no-latent-norm ;;
        irepa)   train $run $STEPS $2 --vae-ckpt "$base" --projector conv --spatial-norm 0.6 --proj-coeff 1 ;;
        lite0)   train $run $STEPS $2 --vae-ckpt "$base" --enc-type efficientnet-lite0 ;;
        weight)  train $run $STEPS $2 --vae-ckpt "$base" --vae-align-proj-coeff 1.5 ;;
        float32) train $run $STEPS $2 --vae-ckpt "$base" --mixed-precision no ;;
        *)       fail "$1: no regime; REGIMES and ABLATIONS name those above" ;;
    esac
    python experiments/judge.py "$OUT/$run" --points $POINTS --samples $SAMPLES --num-steps $SAMPLER_STEPS \
        --features $FEATURES
    python experiments/analyze.py evaluate "$(checkpoint $run $STEPS)" --enc-type "$ENC_TYPE" \
        ${ENC_CKPT:+--enc-ckpt "$ENC_CKPT"}
}

# logged REGIME SEED: the same, its output in a file; a run that fails does not stop the others
logged() {
    if bash -c 'one $0 $1' $1 $2 >> "$OUT/logs/$1-$2.log" 2>&1; then
        echo "$(date +%H:%M) $1-$2 done"
    else
        echo "$(date +%H:%M) $1-$2 failed: see $OUT/logs/$1-$2.log; start this script again to go on"
    fi
}
export -f fail checkpoint train one logged

all() {                                                         # "SEED..." REGIME...: every seed of each
    local seeds=$1
    shift
    for seed in $seeds; do for regime in "$@"; do echo $regime $seed; done; done |
        xargs -r -P $PROCESSES -L 1 bash -c 'logged $0 $1'
}

main() {                                       # read whole before it starts, so that this file may change meanwhile
    [ -f train.py ] || fail "run it from the project's root: bash experiments/compare.sh"
    for step in $POINTS $STEPS; do
        [ $((step % EVERY)) = 0 ] && [ $step -le $STEPS ] || fail "$step: not a multiple of EVERY=$EVERY up to STEPS"
    done
    python -c "import matplotlib" 2> /dev/null || fail "the charts need matplotlib: pip install matplotlib"

    # Runs of other settings must not mix with these: a folder belongs to the settings it was begun with.
    mkdir -p "$OUT/logs"
    settings="MODEL=$MODEL VAE=$VAE BASE_STEPS=$BASE_STEPS STEPS=$STEPS EVERY=$EVERY FLAGS=$FLAGS DATA=$DATA"
    settings+=" RESOLUTION=$RESOLUTION ENC_TYPE=$ENC_TYPE SAMPLER_STEPS=$SAMPLER_STEPS FEATURES=$FEATURES"
    settings+=" SAMPLES=$SAMPLES POINTS=$POINTS"
    [ -f "$OUT/settings" ] || echo "$settings" > "$OUT/settings"
    begun=$(cat "$OUT/settings")
    [ "$settings" = "$begun" ] || fail "$OUT was begun with $begun: name another folder by OUT=DIR"

    trap 'exit 130' INT TERM
    [ -d "$DATA" ] || python data/openmoji.py --size $RESOLUTION --out "$DATA"
    base=$(checkpoint base $BASE_STEPS)
    threads=$OMP_NUM_THREADS OMP_NUM_THREADS=$((PROCESSES * OMP_NUM_THREADS))           # these two run by themselves
    train base $BASE_STEPS 0 --vae-only >> "$OUT/logs/base.log" 2>&1 || fail "base: see $OUT/logs/base.log"
    train vae $STEPS 0 --vae-only --vae-ckpt "$base" >> "$OUT/logs/vae.log" 2>&1 || fail "vae: see $OUT/logs/vae.log"
    OMP_NUM_THREADS=$threads
    seed=${SEEDS%% *}
    early= late=                                                    # the late ones need the VAE of a finished run
    for regime in $REGIMES; do
        case $regime in second | control) late+=" $regime" ;; *) early+=" $regime" ;; esac
    done
    all "$SEEDS" $early
    all "$SEEDS" $late
    all $seed $ABLATIONS

    python experiments/compare.py "$OUT" --seeds $SEEDS --out "$OUT/comparison.png" > "$OUT/table.md"
    [ -s "$OUT/floor.md" ] ||
        python experiments/judge.py --floor "$DATA" --samples $SAMPLES --features $FEATURES > "$OUT/floor.md"
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
