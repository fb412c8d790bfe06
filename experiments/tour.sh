#!/usr/bin/env bash
# The experiments of docs/tour.md: bash experiments/tour.sh, from the project's root. On two idle cores it should take
# about a quarter of an hour.
#
# One VAE is trained by its own losses (base). From it five runs train a fresh SiT, all else equal:
#     naive    the diffusion loss into the VAE        nonorm   REPA-E, latent statistics that stay as at the start
#     repae    the alignment into the VAE (REPA-E)    noalign  REPA-E, no alignment in the VAE's pass
#     repa     the VAE frozen, SiT aligned (REPA)
#
# Run it again at any time: what is done is not done twice, and a stopped run goes on where it was. Everything goes
# to OUT: a folder a run, table.md, latents.png, curves.png. Another length: STEPS=1000 OUT=exps/longer bash ...
set -euo pipefail

OUT=${OUT:-exps/tour}
RUNS=${RUNS:-naive repae nonorm noalign repa}               # some of the five
MODEL=${MODEL:-SiT-T/2}
VAE=${VAE:-f4d32}                                           # the VAE's architecture
BASE_STEPS=${BASE_STEPS:-800}                               # of the VAE that all start from
STEPS=${STEPS:-300}                                         # of each run
LOG_STEPS=${LOG_STEPS:-20}
FLAGS=${FLAGS:---kl-weight 1e-6}                            # more flags for each train.py: the paper's KL term
RESOLUTION=${RESOLUTION:-32}
DATA=${DATA:-data/openmoji-$RESOLUTION}                     # DATA/train and DATA/val; drawn where it is missing

fail() { echo "error: $*" >&2; exit 2; }

checkpoint() { printf "$OUT/%s/checkpoints/%07d.pt" "$1" "$2"; }                            # RUN STEP

# train RUN STEPS FLAG...: until the checkpoint of step STEPS is there. The rates decay over the last three fifths.
train() {
    local run=$1 steps=$2
    shift 2
    [ ! -f "$(checkpoint $run $steps)" ] || return 0
    echo "== $run: $*"
    python train.py --output-dir "$OUT" --exp-name $run --data-dir "$DATA/train" --val-dir "$DATA/val" \
        --resolution $RESOLUTION --vae $VAE --model $MODEL --max-train-steps $steps --sampling-steps $steps \
        --lr-decay-steps $((steps * 3 / 5)) --log-steps $LOG_STEPS --resume $FLAGS "$@"
    [ -f "$(checkpoint $run $steps)" ] || fail "$run: stopped before step $steps; start this script again to go on"
}

main() {                                       # read whole before it starts, so that this file may change meanwhile
    [ -f train.py ] || fail "run it from the project's root: bash experiments/tour.sh"
    python -c "import matplotlib" 2> /dev/null || fail "the charts need matplotlib: pip install matplotlib"

    # Runs of other settings must not mix with these: a folder belongs to the settings it was begun with.
    mkdir -p "$OUT"
    settings="MODEL=$MODEL VAE=$VAE BASE_STEPS=$BASE_STEPS STEPS=$STEPS LOG_STEPS=$LOG_STEPS FLAGS=$FLAGS"
    settings+=" RESOLUTION=$RESOLUTION DATA=$DATA"
    [ -f "$OUT/settings" ] || echo "$settings" > "$OUT/settings"
    begun=$(cat "$OUT/settings")
    [ "$settings" = "$begun" ] || fail "$OUT was begun with $begun: name another folder by OUT=DIR"

    trap 'exit 130' INT TERM
    [ -d "$DATA" ] || python data/openmoji.py --size $RESOLUTION --out "$DATA"
    train base $BASE_STEPS --vae-only
    base=$(checkpoint base $BASE_STEPS)
    folders=() vaes=("$base")
    for run in $RUNS; do
        case $run in
            naive)   train $run $STEPS --vae-ckpt "$base" --vae-grad diffusion ;;
            repae)   train $run $STEPS --vae-ckpt "$base" ;;
            nonorm)  train $run $STEPS --vae-ckpt "$base" --no-latent-norm ;;
            noalign) train $run $STEPS --vae-ckpt "$base" --vae-align-proj-coeff 0 ;;
            repa)    train $run $STEPS --vae-ckpt "$base" --vae-grad none ;;
            *)       fail "$run: no run of the tour; RUNS names some of those above" ;;
        esac
        folders+=("$OUT/$run")
        [ $run = repa ] || vaes+=("$(checkpoint $run $STEPS)")                              # its VAE is base's
    done

    metrics="latent_variance proj_loss denoising_loss"
    python experiments/curves.py "${folders[@]}" --metrics $metrics --table --out "$OUT/curves.png" > "$OUT/table.md"
    python experiments/analyze.py latents "$DATA/val" "${vaes[@]}" --resolution $RESOLUTION \
        --out "$OUT/latents.png" >> "$OUT/table.md"
    cat "$OUT/table.md"
}

main; exit
