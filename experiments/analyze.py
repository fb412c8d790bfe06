"""analyze.py: what a checkpoint has learnt.

    python experiments/analyze.py evaluate CKPT [CKPT ...]           CKNNA by block, denoising loss by t
    python experiments/analyze.py latents IMAGES VAE [VAE ...] --resolution 32 --out latents.png
    python experiments/analyze.py reconstruct VAE IMAGES             pictures, PSNR, SSIM, LPIPS

`evaluate` writes evaluation-STEP.json and .png into the run's folder. `latents` draws images and their
latents in colour side by side, and the spectra of these latents. `reconstruct` draws originals beside their
reconstructions.
"""
import json
import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))                       # the six modules are there
from data.images import list_classes, list_images, read_image
from experiments.figures import COLOURS, load_matplotlib, picture_file, save_figure
from repa import FrozenEncoder
from sample import load_checkpoint
from sit import interpolate
from support.checkpoints import read_checkpoint
from support.commands import Parser, UserError, check_output, existing_path, positive_int, run_command
from support.devices import memory_format, pick_device
from support.files import write_atomic
from support.pictures import image_grid, latents_in_colour, save_png, to_float, to_uint8
from vae import LPIPS, load_vae, psnr, ssim

NEIGHBOURS = 10                                                        # k of CKNNA, as in REPA


# --- Alignment and denoising --------------------------------------------------------------------------------

def cknna(a, b, k=NEIGHBOURS):
    """Centred kernel nearest-neighbour alignment of features [N, D], [N, E] of the same N inputs (arXiv
    2405.07987; REPA measures alignment by it): CKA with the unbiased HSIC (Song et al. 2012, eq. 5), where a
    pair of inputs counts only if the second is among the first's k nearest neighbours in both. 1: the same
    neighbourhoods, 0: none in common."""
    kernels, near = [], []
    for f in (a, b):
        f = F.normalize(f.float(), dim=1)
        kernel = (f @ f.T).fill_diagonal_(-math.inf)                                         # [N, N]
        near.append(torch.zeros_like(kernel).scatter_(1, kernel.topk(k).indices, 1))
        kernels.append(kernel.fill_diagonal_(0))

    def hsic(i, j):
        mask, n = near[i] * near[j], len(a)
        x, y = mask * kernels[i], mask * kernels[j]
        total = (x * y.T).sum() + x.sum() * y.sum() / ((n - 1) * (n - 2)) - 2 * x.sum(0) @ y.sum(1) / (n - 2)
        return total / (n * (n - 3))

    return (hsic(0, 1) / (hsic(0, 0) * hsic(1, 1)).sqrt()).item()


def labelled_images(folder, classes):
    """[(image file, label)] of a data set as train.py reads it, where `classes` are the training classes by
    label. Raises UserError for a class that is none of them."""
    images = []
    for name, files in list_classes(folder).items():
        if name not in classes:
            raise UserError(f"{folder}: class {name} is none of those that the checkpoint was trained on")
        images += [(file, classes.index(name)) for file in files]
    return images


@torch.no_grad()
def measure_alignment(model, encoder, images, most=10_000):
    """CKNNA by block and denoising loss by t of a sampling Model, with the same noise for every checkpoint.

    images: [(file, label)], of which at most 10,000 are taken; encoder: FrozenEncoder on the model's token
    grid. CKNNA compares each block of the averaged SiT at t = 0.5 with the encoder, both averaged over
    tokens. Returns ([blocks], {t: mean squared error of the velocity})."""
    sit, device = model.sit, model.device
    resolution, path_type = model.args["resolution"], model.args.get("path_type", "linear")
    size = model.vae.latent_size(resolution)
    averages, hidden, targets = [], [], []
    losses = {k / 10: 0.0 for k in range(1, 10)}
    hooks = [block.register_forward_hook(lambda block, args, h: averages.append(h.mean(1)))         # [B, D]
             for block in sit.blocks]
    chosen = np.random.default_rng(0).permutation(len(images))[:most]
    for indices in tqdm(np.array_split(chosen, -(-len(chosen) // 32)), desc="evaluating", unit="batch"):
        x = to_float(torch.stack([read_image(images[i][0], resolution) for i in indices])).to(device)
        y = torch.tensor([images[i][1] for i in indices], device=device)
        noise = [np.random.default_rng(i).standard_normal((2, sit.channels, size, size), np.float32)
                 for i in indices]
        posterior_noise, eps = torch.from_numpy(np.stack(noise)).to(device).unbind(1)        # [B, C, h, w]
        z = sit.bn.normalize(model.vae.encode(x).sample(posterior_noise))
        for t in losses:
            averages.clear()
            times = torch.full((len(x),), t, device=device)
            x_t, velocity = interpolate(z, times, eps, path_type)
            squares = (sit(x_t, times, y)[0] - velocity).square().mean((1, 2, 3))            # [B]
            losses[t] += squares.sum().item() / len(chosen)
            if t == 0.5:
                hidden.append(torch.stack(averages))                                   # [blocks, B, D]
        targets.append(encoder(x).mean(1))                                             # [B, E]
    for hook in hooks:
        hook.remove()
    targets = torch.cat(targets)
    return [cknna(h, targets) for h in torch.cat(hidden, 1)], losses


def draw_alignment(alignment, losses, title, aligned_block, path):
    """CKNNA by block and denoising loss by t side by side, from the results of `measure_alignment`."""
    figure = load_matplotlib()(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    figure.suptitle(title, fontsize=10)
    left.plot(range(1, len(alignment) + 1), alignment, "o-", color=COLOURS[0])
    if aligned_block:
        left.axvline(aligned_block, color="#888888", linestyle=":")
        left.annotate("aligned", (aligned_block, 0.02), xycoords=("data", "axes fraction"), xytext=(4, 0),
                      textcoords="offset points", color="#666666")
    left.set(title=f"CKNNA (k = {NEIGHBOURS}, t = 0.5)", xlabel="block")
    left.set_ylim(bottom=min(0, *alignment), top=max(0.1, *alignment) * 1.05)
    left.xaxis.get_major_locator().set_params(integer=True)
    right.plot(list(losses), list(losses.values()), "o-", color=COLOURS[1])
    right.set(title="denoising loss", xlabel="t (0: data, 1: noise)", ylim=(0, max(losses.values()) * 1.05))
    save_figure(figure, path)


def evaluate_command(args):
    """Measure each checkpoint on held-out images; print the numbers, write them as .json and .png."""
    load_matplotlib()
    device = pick_device(args.device)
    for file in args.ckpts:
        ckpt = Path(file)
        model = load_checkpoint(ckpt, device, args.vae_ckpt)
        saved = read_checkpoint(ckpt)["args"]                                   # as they are in the file
        if saved.get("vae_only"):
            raise UserError(f"{ckpt}: trained with --vae-only, it has no SiT to evaluate")
        train_dir = args.data_dir or saved.get("data_dir") or "(--data-dir is not given)"
        folder = args.val_dir or saved.get("val_dir") or train_dir
        classes = saved.get("classes")
        if args.data_dir or not classes:
            classes = list(list_classes(train_dir))
        images = labelled_images(folder, classes[:model.sit.num_classes])
        if len(images) <= NEIGHBOURS:
            raise UserError(f"{folder}: {len(images)} images; CKNNA is over each one's {NEIGHBOURS} nearest "
                            "neighbours")
        name = args.enc_type or saved.get("enc_type", "").split(",")[0]
        grid = model.vae.latent_size(model.args["resolution"]) // model.sit.patch
        torch.manual_seed(0)                                  # for an encoder of random weights, if it is one
        encoder = FrozenEncoder(name, grid, args.enc_ckpt or saved.get("enc_ckpt") or None,
                                saved.get("allow_random_weights", False)).to(device)
        alignment, losses = measure_alignment(model, encoder, images)

        run = ckpt.parent.parent if ckpt.parent.name == "checkpoints" else ckpt.parent
        out = run / f"evaluation-{ckpt.stem}"
        record = dict(images=min(len(images), 10_000), encoder=name, cknna=alignment, denoising_loss=losses)
        text = json.dumps(record, indent=1) + "\n"
        write_atomic(f"{out}.json", lambda tmp: tmp.write_text(text))
        aligned = saved.get("encoder_depth") if saved.get("proj_coeff", 0) > 0 else None
        draw_alignment(alignment, losses, f"{ckpt}, {record['images']} images", aligned, f"{out}.png")
        print(f"{ckpt}: {record['images']} images of {folder}, {name} -> {out}.json, .png")
        print("  CKNNA by block       " + "  ".join(f"{k}: {v:.3f}" for k, v in enumerate(alignment, 1)))
        print("  denoising loss by t  " + "  ".join(f"{t}: {value:.3f}" for t, value in losses.items()))


# --- Latents ------------------------------------------------------------------------------------------------

def vae_title(path, taken):
    """A short name for a VAE's row: 'RUN STEP' of a checkpoint, else the file's name; the whole path where
    that is taken."""
    file = Path(path)
    name = f"{file.parent.parent.name} {file.stem}" if file.parent.name == "checkpoints" else file.stem
    return str(path) if name in taken else name


def draw_latents(rows, spectra, path):
    """A strip of pictures a row, and below them the spectra. rows: {name: uint8 [n, 3, R, R]}; spectra:
    {name: variances [C], largest first}."""
    strips = {}
    for name, pictures in rows.items():
        strips[name] = image_grid(pictures, len(pictures), max(1, 64 // pictures.shape[-1]))
    heights = [8.2 * strip.height / strip.width for strip in strips.values()]               # inches
    figure = load_matplotlib()(figsize=(10, sum(heights) * 1.12 + 3.2), layout="constrained")
    axes = figure.subplots(len(strips) + 1, 1, height_ratios=heights + [2.8])
    for axis, (name, strip) in zip(axes, strips.items()):
        axis.imshow(strip, interpolation="nearest")
        axis.set_ylabel(name, rotation=0, ha="right", va="center")
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    for (name, variances), colour in zip(spectra.items(), COLOURS * len(spectra)):
        share = variances / variances.sum()
        axes[-1].semilogy(range(1, len(share) + 1), share.clamp_min(1e-8), "o-", color=colour, markersize=4,
                          label=name)
    axes[-1].set(xlabel="principal component of the latents", ylabel="share of the variance")
    axes[-1].xaxis.get_major_locator().set_params(integer=True)
    axes[-1].legend()
    save_figure(figure, path)


@torch.no_grad()
def latents_command(args):
    """A row of images, and for each VAE a row of their latents in colour; below, the variance of each
    principal component of the latents, as shares of the whole (over at most 256 images). Printed are also
    the variance and what the posterior's noise adds, as a share of it; both of a channel, on average."""
    load_matplotlib()
    check_output(args.out, [args.images, *args.vaes])
    files, device = list_images(args.images), pick_device(args.device)
    count = min(len(files), 256)
    files = [files[i * len(files) // count] for i in range(count)]
    images = torch.stack([read_image(file, args.resolution) for file in files])
    shown = list(range(0, count, -(-count // 12)))
    rows, spectra = {"images": images[shown]}, {}
    for path in args.vaes:
        vae, _ = load_vae(path)
        vae.latent_size(args.resolution)                                       # raises where it does not fit
        vae.to(device, memory_format=memory_format(device)).eval()
        batches = tqdm(to_float(images).split(16), desc=path)
        posteriors = [vae.encode(x.to(device)) for x in batches]
        z = torch.cat([posterior.mean.cpu() for posterior in posteriors])
        noise = torch.cat([posterior.logvar.exp().cpu() for posterior in posteriors]).mean((0, 2, 3))    # [C]
        covariance = torch.cov(z.transpose(0, 1).flatten(1), correction=0)     # [C, C]
        variances = torch.linalg.eigvalsh(covariance).flip(0).clamp_min(0)     # largest first
        name = vae_title(path, rows)
        rows[name] = latents_in_colour(z, vae.stride)[shown]
        spectra[name] = variances
        dimensions = variances.sum() ** 2 / variances.square().sum()           # 1 to C
        added = (noise / covariance.diagonal()).mean()
        print(f"{path}: variance {variances.mean():.4g}, {dimensions:.2f} effective dimensions of "
              f"{len(variances)}; sampling adds {added:.2%}")
    draw_latents(rows, spectra, args.out)
    print(f"{count} images -> {args.out}")


# --- Reconstructions ----------------------------------------------------------------------------------------

@torch.no_grad()
def reconstruct_command(args):
    """PSNR, SSIM and, where its weights are to be had, LPIPS of a VAE's reconstructions (of the posterior's
    mean); a picture of the first 24 images beside their reconstructions."""
    check_output(args.out, [args.images, args.vae])
    vae, _ = load_vae(args.vae)
    vae.latent_size(args.resolution)                                           # raises where it does not fit
    device = pick_device(args.device)
    vae.to(device, memory_format=memory_format(device)).eval()
    files = [Path(args.images)] if Path(args.images).is_file() else list_images(args.images)
    lpips, shown, scores = None, [], []
    try:
        lpips = LPIPS(args.lpips_ckpt, args.vgg_ckpt).to(device)
    except UserError as e:
        print(f"no LPIPS: {e}")
    for file in tqdm(files, unit="img"):
        image = read_image(file, args.resolution)
        x = to_float(image[None]).to(device)
        y = to_uint8(vae.decode(vae.encode(x).mean))
        pair = x.cpu(), to_float(y).cpu()
        distance = [] if lpips is None else [lpips(to_float(y), x).item()]
        scores.append([psnr(*pair).item(), ssim(*pair).item(), *distance])
        if len(shown) < 48:
            shown += [image, y[0].cpu()]
    save_png(image_grid(torch.stack(shown), 8, max(1, 64 // args.resolution)), args.out)
    for name, value in zip(("PSNR (dB)", "SSIM", "LPIPS"), np.mean(scores, 0)):
        print(f"  {name:<12}{value:.4f}")
    print(f"{len(files)} images; originals beside reconstructions in {args.out}")


def main():
    parser = Parser(description="What a checkpoint has learnt.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="evaluate|latents|reconstruct")
    evaluate = commands.add_parser("evaluate", help="CKNNA by block, denoising loss by t, on held-out images")
    evaluate.add_argument("ckpts", metavar="CKPT", nargs="+", help="training checkpoints")
    evaluate.add_argument("--val-dir", metavar="DIR", help="images as DIR/CLASS/*.jpg (the run's own)")
    evaluate.add_argument("--data-dir", metavar="DIR", help="training images, for their classes (the run's)")
    evaluate.add_argument("--vae-ckpt", help="the VAE, where the checkpoint has none: file, folder or hub id")
    evaluate.add_argument("--enc-type", help="the encoder to compare with (the run's first)")
    evaluate.add_argument("--enc-ckpt", metavar="FILE", help="its weights, in place of the hub's")
    latents = commands.add_parser("latents", help="latents in colour side by side, and their spectra")
    latents.add_argument("images", metavar="IMAGES", help="a folder of images")
    latents.add_argument("vaes", metavar="VAE", nargs="+", help="checkpoints, weights, diffusers folders")
    latents.add_argument("--out", type=picture_file, default="latents.png", help="the picture (latents.png)")
    reconstruct = commands.add_parser("reconstruct", help="pictures, PSNR, SSIM, LPIPS of reconstructions")
    reconstruct.add_argument("vae", metavar="VAE", help="checkpoint, weights, diffusers folder or hub id")
    reconstruct.add_argument("images", metavar="IMAGES", type=existing_path, help="a folder or an image")
    reconstruct.add_argument("--out", default="reconstructions.png", help="the picture (reconstructions.png)")
    reconstruct.add_argument("--lpips-ckpt", help="LPIPS' linear heads, in place of the lpips package's")
    reconstruct.add_argument("--vgg-ckpt", help="torchvision's VGG16 weights, in place of the hub's")
    for command in (latents, reconstruct):
        command.add_argument("--resolution", type=positive_int, default=256, help="pixels (256)")
    for command in (evaluate, latents, reconstruct):
        command.add_argument("--device", default="auto")
    args = parser.parse_args()
    if args.command == "evaluate":
        evaluate_command(args)
    elif args.command == "latents":
        latents_command(args)
    else:
        reconstruct_command(args)


if __name__ == "__main__":
    run_command(main)
