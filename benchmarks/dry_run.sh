#!/usr/bin/env bash
# A dry run, without a GPU, of the README's commands for ImageNet on 8 GPUs: bash benchmarks/dry_run.sh, on Linux.
#
# It writes dummy data and weights (benchmarks/dummy_data.py) and runs each command of the README, with more flags at
# its end that make it short and name files in place of the hub. For two presets: training, sampling to an .npz,
# fid.py against ADM's batch and for the rFID, export, the second stage; for sdvae-xl2 also 512 pixels, and training
# that a signal stops and --resume resumes, compared with training that was not stopped; for sd35-xl2 a discriminator
# for a VAE without one, tuning, export. It prints seconds, memory and the sizes of the files written, and ends with an
# error where a check fails.
#
# SIZE=XL takes the real models and one process: about 17 GB of memory and 30 GB of disk. SIZE=S takes SiT-S and two
# processes. Safe to rerun: what is done is skipped. Everything goes to OUT.
cd "$(dirname "$0")/.."
. experiments/common.sh

SIZE=${SIZE:-XL}
OUT=${OUT:-exps/dry-run-$SIZE}
PROCESSES=${PROCESSES:-$([ "$SIZE" = XL ] && echo 1 || echo 2)}         # instead of 8
BATCH=${BATCH:-2}                                           # instead of 256
STEPS=${STEPS:-4}                                           # instead of 400,000; training stops after step 1 or 2,
                                                            # and later steps show that AdamW's moments are restored
SAMPLES=${SAMPLES:-8}                                       # instead of 50,000
NUM_STEPS=${NUM_STEPS:-4}                                   # of the sampler, instead of 250
RESOLUTION=${RESOLUTION:-256}                               # and once twice that
PRESETS=${PRESETS:-sdvae-xl2 vavae-xl1 sd35-xl2}            # or some of them
FLAGS=${FLAGS:-}                                            # more flags for each train.py

is_done() { grep -qsF "\"name\": \"$1\"" results.jsonl; }               # NAME

# run_once NAME COMMAND...: measured by dry_run.py; stopped when the file STOP_AT, if it is set, has a row
run_once() { is_done "$1" || python "$ROOT/benchmarks/dry_run.py" run "${STOP_AT:-}" "$@"; }

# check WORDS: one of dry_run.py's checks
check() { is_done "$*" || python "$ROOT/benchmarks/dry_run.py" "$@"; }

# readme WORDS: the README's torchrun command with these words on one line, for $preset, PROCESSES and STEPS
readme() {
    local line
    line=$(sed -e ':a' -e '/\\$/{N;s/ *\\\n */ /;ba' -e '}' "$ROOT/README.md" | grep '^torchrun' | grep -e "$1" |
        sed -n '1{s/ *#.*//;p}') || fail "README.md: no torchrun command with $1"
    line=${line/nproc_per_node=8/nproc_per_node=$PROCESSES}
    line=${line/0400000/$(printf %07d $STEPS)} line=${line/0020000/$(printf %07d $STEPS)}
    line=${line/\$VAE/pretrained/sd35}
    if [ $preset = vavae-xl1 ]; then                                            # what "likewise" means there
        line=${line//sdvae-xl2/vavae-xl1} line=${line//sdvae\/sdvae-f8d4/vavae/vavae-f16d32}
        line=${line/2.2 --guidance-high 0.65/1.9 --guidance-high 0.825}
    fi
    echo "$line"
}

# run_preset PRESET: the README's commands for it, in their order
run_preset() {
    local preset=$1 run=exps/$1 short train sample fid second ckpt vae_ckpt
    short="$SHORT --model SiT-$SIZE/${preset: -1}"
    train="$(readme "--preset sdvae-xl2") $short"
    sample="$(readme sample.py) --num-samples $SAMPLES --num-steps $NUM_STEPS"
    fid="$(readme fid.py) --json $run/fid.json"
    second="$(readme "--preset e2e-sdvae-xl2") $short --data-dir imagenet/few"
    ckpt=$run/checkpoints/$(printf %07d $STEPS).pt
    vae_ckpt=${train#*--vae-ckpt } vae_ckpt=${vae_ckpt%% *}

    if [ $preset = sdvae-xl2 ]; then
        run_once $((2 * RESOLUTION))-pixels $train --exp-name large --resolution $((2 * RESOLUTION)) \
            --batch-size $PROCESSES --max-train-steps 1
        check losses exps/large 1
        rm -rf exps/large/checkpoints                                           # at XL 12 GB
        is_done unstopped || rm -rf exps/unstopped
        run_once unstopped $train --exp-name unstopped
        rm -rf exps/unstopped/checkpoints
        grep -q "skipped an unreadable image" logs/unstopped.log || fail "training did not read the damaged image"
        is_done stopped || rm -rf $run
        STOP_AT=$run/metrics.jsonl run_once stopped $train
    fi
    run_once $preset $train                                                     # of sdvae-xl2: resume
    check losses $run $STEPS $([ $preset != sdvae-xl2 ] || echo exps/unstopped)
    check vae trained $ckpt $vae_ckpt
    find $run/checkpoints -name '*.pt' ! -path $ckpt -delete 2> /dev/null || true           # of the stop

    run_once $preset-sample $sample
    cp samples.npz $run/samples.npz                                             # the other preset overwrites it
    check batch $run/samples.npz $SAMPLES $RESOLUTION
    run_once $preset-fid $fid
    check scores $run/fid.json $SAMPLES
    run_once $preset-rfid $(readme --reconstruct)
    run_once $preset-export python vae.py export $ckpt e2e-vae-$preset --resolution $RESOLUTION
    check vae same e2e-vae-$preset $ckpt

    run_once e2e-$preset $second
    check losses exps/e2e-$preset $STEPS
    check vae same exps/e2e-$preset/checkpoints/$(printf %07d $STEPS).pt $ckpt
    rm -rf $run/checkpoints exps/e2e-$preset/checkpoints
}

# run_own_vae: the README's commands for a VAE that comes without a discriminator
run_own_vae() {
    local preset=sd35-xl2 short="$SHORT --model SiT-$SIZE/2" ckpt
    ckpt=checkpoints/$(printf %07d $STEPS).pt
    run_once disc $(readme "--vae-only") $short
    check losses exps/disc $STEPS
    check vae same exps/disc/$ckpt pretrained/sd35
    run_once $preset $(readme "sd35-xl2.*disc-pretrained") $short
    check losses exps/$preset $STEPS
    check vae trained exps/$preset/$ckpt pretrained/sd35
    run_once $preset-export python vae.py export exps/$preset/$ckpt e2e-vae --resolution $RESOLUTION
    check vae same e2e-vae exps/$preset/$ckpt
    rm -rf exps/$preset/checkpoints exps/disc/checkpoints
}

main() {                                                    # parsed as a whole, so this file may change meanwhile
    command -v pkill > /dev/null || fail "pkill is missing; it is part of procps"
    [[ $SIZE = XL || $SIZE = S ]] || fail "SIZE=$SIZE: choose XL or S"
    keep_settings "$OUT/settings" SIZE PROCESSES BATCH STEPS SAMPLES NUM_STEPS RESOLUTION FLAGS
    ROOT=$PWD
    cd "$OUT"
    mkdir -p logs
    echo "dry run with $(cat settings)"

    ln -sf "$ROOT"/{train,sample,fid,vae}.py .
    export TORCH_HOME=$PWD/torch HF_HUB_OFFLINE=1                               # all weights come from files here
    export PET_STANDALONE=1                                                     # torchrun takes a free port
    SHORT="--enc-ckpt pretrained/dinov2_vitb14_pretrain.pth --vgg-ckpt pretrained/vgg16-397923af.pth"
    SHORT+=" --lpips-ckpt pretrained/lpips-vgg.pth --resolution $RESOLUTION --batch-size $BATCH"
    SHORT+=" --max-train-steps $STEPS --log-steps 1 --sampling-steps 0 $FLAGS"
    # Loader processes are forked after the networks are built and keep the weights of that moment, which on a CPU
    # are in the same memory: SiT, its EMA and the VAE, 5.8 GB more at XL.
    [ $SIZE = S ] || SHORT+=" --num-workers 0"
    run_once dummy-data python "$ROOT/benchmarks/dummy_data.py" .
    for preset in $PRESETS; do
        if [ $preset = sd35-xl2 ]; then run_own_vae; else run_preset $preset; fi
    done
    python "$ROOT/benchmarks/dry_run.py" table
}

main; exit
