#!/usr/bin/env bash
# The experiments of docs/tour.md: bash experiments/tour.sh. On two idle cores it should take about 15 minutes.
#
# One VAE is trained by its own losses (base). From it each of RUNS trains a new SiT, all else equal: regimes of
# experiments/common.sh. A run of your own, in the same table and charts:
#     MINE="--projector conv" RUNS="repae repa mine" bash experiments/tour.sh
#
# Safe to rerun: finished runs are skipped, interrupted runs resume. OUT gets a folder per run, table.md, curves.png,
# latents.png and samples.png. Longer runs: STEPS=1000 OUT=exps/longer bash experiments/tour.sh
cd "$(dirname "$0")/.."
. experiments/common.sh

OUT=${OUT:-exps/tour}
RUNS=${RUNS:-naive repae nonorm noalign repa}
MODEL=${MODEL:-SiT-T/2}
VAE=${VAE:-f4d32}                                           # architecture
BASE_STEPS=${BASE_STEPS:-800}                               # of the VAE that all runs start from
STEPS=${STEPS:-300}                                         # of each run
LOG_STEPS=${LOG_STEPS:-20}
FLAGS=${FLAGS:---kl-weight 1e-6}                            # more flags for each train.py: the paper's KL term
RESOLUTION=${RESOLUTION:-32}
DATA=${DATA:-data/openmoji-$RESOLUTION}                     # DATA/train and DATA/val; rendered if missing

# train RUN STEPS FLAG...: until the checkpoint of step STEPS exists. Learning rates decay over the last three fifths.
train() {
    local run=$1 steps=$2 file
    file=$(checkpoint $run $steps)
    [ ! -f "$file" ] || return 0
    echo "== $run: ${*:3}"
    python train.py --output-dir "$OUT" --exp-name $run --data-dir "$DATA/train" --val-dir "$DATA/val" \
        --resolution $RESOLUTION --vae $VAE --model $MODEL --max-train-steps $steps --sampling-steps $steps \
        --lr-decay-steps $((steps * 3 / 5)) --log-steps $LOG_STEPS --resume $FLAGS "${@:3}"
    [ -f "$file" ] || fail "$run: stopped before step $steps; rerun this script to resume"
}

main() {                                                    # parsed as a whole, so this file may change meanwhile
    check_matplotlib
    keep_settings "$OUT/settings" MODEL VAE BASE_STEPS STEPS LOG_STEPS FLAGS RESOLUTION DATA
    [ -d "$DATA" ] || python data/openmoji.py --size $RESOLUTION --out "$DATA"
    train base $BASE_STEPS --vae-only
    base=$(checkpoint base $BASE_STEPS)
    folders=() vaes=("$base")
    for run in $RUNS; do
        flags=$(regime_flags $run)
        [ $run != mine ] || keep_settings "$OUT/mine-settings" MINE
        train $run $STEPS --vae-ckpt "$base" $flags
        folders+=("$OUT/$run")
        [ $run = repa ] || vaes+=("$(checkpoint $run $STEPS)")                              # repa's VAE is base's
    done
    python experiments/strips.py "${folders[@]}" --out "$OUT/samples.png"
    python experiments/curves.py "${folders[@]}" --table --out "$OUT/curves.png" \
        --metrics latent_variance proj_loss denoising_loss val_psnr > "$OUT/table.md"
    python experiments/analyze.py latents "$DATA/val" "${vaes[@]}" --resolution $RESOLUTION \
        --out "$OUT/latents.png" >> "$OUT/table.md"
    cat "$OUT/table.md"
}

main; exit
