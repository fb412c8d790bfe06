# What the scripts of experiments/ and benchmarks/ share; they source it in the project's root.
set -euo pipefail
trap 'kill $(jobs -p) 2> /dev/null || true; exit 130' INT TERM

fail() { echo "error: $*" >&2; exit 2; }

checkpoint() { printf "$OUT/%s/checkpoints/%07d.pt" "$1" "$2"; }                            # RUN STEP

check_matplotlib() {
    python -c "import matplotlib" 2> /dev/null || fail "the charts need matplotlib: pip install matplotlib"
}

# keep_settings FILE NAME...: results of different settings must not mix. The first call writes these variables to
# FILE; a later one with other values fails.
keep_settings() {
    local file=$1 name settings= before
    mkdir -p "$(dirname "$file")"
    for name in "${@:2}"; do settings+="${settings:+ }$name=${!name}"; done
    [ -f "$file" ] || echo "$settings" > "$file"
    before=$(cat "$file")
    [ "$settings" = "$before" ] || fail "$file has other settings ($before): choose another folder with OUT=DIR"
}

# regime_flags REGIME: its flags of train.py, for tour.sh and compare.sh. All regimes but scratch also get a VAE.
regime_flags() {
    case $1 in
        sit)     echo --vae-grad none --proj-coeff 0 ;;                 # VAE frozen, no alignment
        repa)    echo --vae-grad none ;;                                # VAE frozen, alignment
        second)  echo --vae-grad none ;;                                # REPA with the VAE that repae has trained
        control) echo --vae-grad none ;;                                # REPA with the VAE that noalign has trained
        repae)   ;;                                                     # alignment into the VAE: REPA-E
        naive)   echo --vae-grad diffusion ;;                           # diffusion loss into the VAE
        noalign) echo --vae-align-proj-coeff 0 ;;                       # neither: the VAE has its own losses only
        nonorm)  echo --fixed-latent-stats ;;                           # latent statistics stay as at the start
        scratch) echo --vae-from-scratch ;;                             # REPA-E, the VAE trained from scratch
        both)    echo --vae-grad both ;;                                # diffusion loss and alignment into the VAE
        irepa)   echo --projector conv --spatial-norm 0.6 --proj-coeff 1 ;;         # iREPA's alignment
        lite0)   echo --enc-type efficientnet-lite0 ;;                  # another target encoder
        weight)  echo --vae-align-proj-coeff 1.5 ;;                     # the paper's weight in the VAE's pass
        float32) echo --mixed-precision no ;;
        fixed-noise)       echo --vae-grad diffusion --posterior-std 0.5 ;;             # as in SimFlow
        fixed-noise-repae) echo --posterior-std 0.5 ;;
        gen-first)         echo --vae-grad diffusion --entropy-weight 5e-5 --vae-denoising-coeff 0.1 ;;  # as in GenFirst
        gen-first-repae)   echo --entropy-weight 5e-5 ;;
        gen-first-second)  echo --vae-grad none ;;                      # REPA with the VAE that gen-first has trained
        less-noise | more-noise) echo --vae-grad none ;;                # REPA, second: with the posterior's noise of the other
        mse)      echo --align-loss mse --proj-coeff 0.1 --vae-align-proj-coeff 0.1 ;;      # alignment by squared error
        repa-mse) echo --vae-grad none --align-loss mse --proj-coeff 0.1 ;;
        mine)    [ -n "${MINE:-}" ] || fail "mine: set MINE to its flags of train.py"
                 echo $MINE ;;                                          # a run of your own
        *)       fail "$1: unknown regime; experiments/common.sh lists them" ;;
    esac
}
