"""analyze.py: what a checkpoint has learned.

    python experiments/analyze.py evaluate CKPT [CKPT ...]           CKNNA by block, denoising loss by t
    python experiments/analyze.py latents IMAGES VAE [VAE ...] --resolution 32 --out latents.png
    python experiments/analyze.py reconstruct VAE IMAGES             reconstructions, PSNR, SSIM, LPIPS
    python experiments/analyze.py noise IMAGES CKPT OTHER --out NEW.pt       CKPT with OTHER's posterior noise

`evaluate` writes evaluation-STEP.json into the run's folder. `latents` draws images above the PCA of their
latents by each VAE, and the spectra of these latents. `reconstruct` draws originals beside their
reconstructions. `noise` changes nothing of a VAE but its posterior's standard deviation, by one factor.
"""
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))                                 # the six modules are there
from data.images import list_classes, list_images, read_image
from experiments.figures import chart_file, draw_strip, load_matplotlib, run_colours, save_figure
from fid import ImageSet, Reconstructions
from repa import PatchFeatures
from sample import load_checkpoint
from sit import interpolate
from support.checkpoints import read_checkpoint, run_folder
from support.commands import (
    Parser,
    UserError,
    check_output,
    existing_path,
    path_name,
    positive_int,
    require,
    run_command,
)
from support.devices import memory_format, pick_device
from support.files import write_atomic
from support.grids import image_grid, pca_rgb, save_png, to_float
from vae import LPIPS, load_vae

NEIGHBOURS = 10                                                        # k of CKNNA, as in REPA
MOST = 10_000                                                          # images that `evaluate` uses


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
    label; a single class takes all. Raises UserError for a class that is none of them."""
    images = []
    for name, files in list_classes(folder).items():
        require(name in classes or len(classes) == 1,
                f"{folder}: class {name} is none of those that the checkpoint was trained on")
        label = classes.index(name) if len(classes) > 1 else 0
        images += [(file, label) for file in files]
    return images


@torch.no_grad()
def measure_alignment(sampler, encoder, images):
    """CKNNA by block and denoising loss by t of a Sampler, with the same noise for every checkpoint.

    images: [(file, label)], of which at most MOST are used; encoder: PatchFeatures on SiT's token grid.
    CKNNA compares each block of SiT's EMA at t = 0.5 with the encoder, both averaged over tokens. Returns
    ([blocks], {t: mean squared error of the velocity})."""
    sit, vae, args, _, device = sampler
    resolution, path_type = args["resolution"], args.get("path_type", "linear")
    averages, hidden, targets = [], [], []
    losses = {k / 10: 0.0 for k in range(1, 10)}
    for block in sit.blocks:
        block.register_forward_hook(lambda block, args, h: averages.append(h.mean(1)))      # [B, D]
    chosen = np.random.default_rng(0).permutation(len(images))[:MOST]
    for indices in tqdm(np.array_split(chosen, math.ceil(len(chosen) / 32)), desc="evaluating", unit="batch"):
        x = to_float(torch.stack([read_image(images[i][0], resolution) for i in indices])).to(device)
        y = torch.tensor([images[i][1] for i in indices], device=device)
        noise = [np.random.default_rng(i).standard_normal((2, sit.channels, sit.size, sit.size), np.float32)
                 for i in indices]
        posterior_noise, eps = torch.from_numpy(np.stack(noise)).to(device).unbind(1)        # [B, C, h, w]
        z = sit.bn.normalize(vae.encode(x).sample(posterior_noise))
        for t in losses:
            averages.clear()
            timesteps = torch.full((len(x),), t, device=device)
            x_t, velocity = interpolate(z, timesteps, eps, path_type)
            squares = (sit(x_t, timesteps, y)[0] - velocity).square().mean((1, 2, 3))        # [B]
            losses[t] += squares.sum().item() / len(chosen)
            if t == 0.5:
                hidden.append(torch.stack(averages))                                   # [blocks, B, D]
        targets.append(encoder(x).mean(1))                                             # [B, E]
    targets = torch.cat(targets)
    return [cknna(h, targets) for h in torch.cat(hidden, 1)], losses


def evaluate_command(args):
    """Measure each checkpoint on held-out images; print the numbers and write them as .json."""
    device = pick_device(args.device)
    for ckpt in map(Path, args.ckpts):
        sampler = load_checkpoint(ckpt, device, args.vae_ckpt)
        require(sampler.sit, f"{ckpt}: trained with --vae-only, it has no SiT to evaluate")
        saved = read_checkpoint(ckpt)["args"]                                   # as they are in the file
        train_dir = args.data_dir or saved.get("data_dir")
        folder = args.val_dir or saved.get("val_dir") or train_dir
        classes = None if args.data_dir else saved.get("classes")
        require(folder and (classes or train_dir), f"{ckpt}: does not name its data; give --data-dir")
        classes = classes or list(list_classes(train_dir))
        images = labelled_images(folder, classes[:sampler.sit.num_classes])
        require(len(images) > NEIGHBOURS,
                f"{folder}: {len(images)} images; CKNNA needs more than {NEIGHBOURS}")
        name = args.enc_type or saved.get("enc_type", "").split(",")[0]
        torch.manual_seed(0)                                                    # for random encoder weights
        encoder = PatchFeatures(name, sampler.sit.size // sampler.sit.patch,
                                args.enc_ckpt or saved.get("enc_ckpt"),
                                saved.get("allow_random_weights", False)).to(device)
        alignment, losses = measure_alignment(sampler, encoder, images)

        file, count = run_folder(ckpt) / f"evaluation-{ckpt.stem}.json", min(len(images), MOST)
        text = json.dumps(dict(images=count, encoder=name, cknna=alignment, denoising_loss=losses), indent=1)
        write_atomic(file, lambda tmp, text=text: tmp.write_text(text + "\n"))
        print(f"{ckpt}: {count} images of {folder}, {name} -> {file}")
        print("  CKNNA by block       " + "  ".join(f"{k}: {v:.3f}" for k, v in enumerate(alignment, 1)))
        print("  denoising loss by t  " + "  ".join(f"{t}: {value:.3f}" for t, value in losses.items()))


# --- VAEs ---------------------------------------------------------------------------------------------------

def open_vae(path, args):
    """The VAE of a file on the device of the flags. Raises UserError if the resolution does not fit it."""
    vae, _ = load_vae(path)
    vae.latent_size(args.resolution)
    device = pick_device(args.device)
    return vae.to(device, memory_format=memory_format(device)).eval(), device


def vae_title(path, taken):
    """A short name for a VAE's row: 'RUN STEP' of a checkpoint, else the file's name; if that is taken, the
    whole path."""
    file = Path(path)
    name = f"{file.parent.parent.name} {file.stem}" if file.parent.name == "checkpoints" else file.stem
    return str(path) if name in taken else name


def encode_images(path, files, args):
    """A VAE's posteriors of image files: means [N, C, h, w] and variances of the noise around them [C] (mean
    over images and positions); and the VAE."""
    vae, device = open_vae(path, args)
    means, noise = [], []
    for chunk in tqdm(np.array_split(files, math.ceil(len(files) / 16)), desc=str(path)):
        x = to_float(torch.stack([read_image(file, args.resolution) for file in chunk]))
        posterior = vae.encode(x.to(device))
        means.append(posterior.mean.cpu())
        noise.append(posterior.logvar.exp().mean((2, 3)).cpu())
    return torch.cat(means), torch.cat(noise).mean(0), vae


def some_files(folder, count=256):
    """At most `count` of a folder's images, evenly spaced."""
    files = list_images(folder)
    count = min(len(files), count)
    return [files[i * len(files) // count] for i in range(count)]


def draw_latents(rows, spectra, path):
    """One row of images per name, and below them the spectra. rows: {name: uint8 [n, 3, R, R]}; spectra:
    {name: variances [C], largest first}."""
    strips = {name: image_grid(images, len(images), max(1, 64 // images.shape[-1]))
              for name, images in rows.items()}
    heights = [8.2 * strip.height / strip.width for strip in strips.values()]               # inches
    figure = load_matplotlib()(figsize=(10, sum(heights) * 1.12 + 3.2), layout="constrained")
    *axes, below = figure.subplots(len(strips) + 1, 1, height_ratios=heights + [2.8])
    for axis, (name, strip) in zip(axes, strips.items(), strict=True):
        draw_strip(axis, name, strip)
    colours, used = run_colours(spectra), set()
    for name, variances in spectra.items():
        fractions = (variances / variances.sum()).clamp_min(1e-8)
        style = "o:" if colours[name] in used else "o-"                        # dotted: a run's later VAE
        used.add(colours[name])
        below.semilogy(range(1, len(fractions) + 1), fractions, style, color=colours[name], markersize=4,
                       label=name)
    below.set(xlabel="principal component of the latents", ylabel="fraction of the variance")
    below.xaxis.get_major_locator().set_params(integer=True)
    below.legend()
    save_figure(figure, path)


@torch.no_grad()
def latents_command(args):
    """A row of images, and for each VAE a row with the PCA of their latents (each with its own components);
    below, each component's fraction of the variance (over at most 256 images). Prints the latents' variance
    and what sampling from the posterior adds to it, averaged over channels."""
    load_matplotlib()
    check_output(args.out, [args.images, *args.vaes])
    files = some_files(args.images)
    shown = list(range(0, len(files), math.ceil(len(files) / 12)))
    rows = {"images": torch.stack([read_image(files[i], args.resolution) for i in shown])}
    spectra = {}
    for path in args.vaes:
        z, noise, vae = encode_images(path, files, args)
        covariance = torch.cov(z.transpose(0, 1).flatten(1), correction=0)     # [C, C]
        variances = torch.linalg.eigvalsh(covariance).flip(0).clamp_min(0)     # largest first
        name = vae_title(path, rows)
        rows[name] = pca_rgb(z, vae.stride)[shown]
        spectra[name] = variances
        dimensions = variances.sum() ** 2 / variances.square().sum()           # 1 to C
        added = (noise / covariance.diagonal()).mean()
        print(f"{path}: variance {variances.mean():.4g}, {dimensions:.2f} effective dimensions of "
              f"{len(variances)}; sampling adds {added:.2%}")
    draw_latents(rows, spectra, args.out)
    print(f"{len(files)} images -> {args.out}")


@torch.no_grad()
def noise_command(args):
    """Write a copy of CKPT whose posterior's standard deviation is multiplied by one factor, so that its
    noise is as large a share of the latents' variance as OTHER's, averaged over channels. The latent
    statistics in the copy are those with the new noise."""
    check_output(args.out, [args.ckpt, args.other])
    shares, files = [], some_files(args.images)
    for path in (args.ckpt, args.other):
        z, noise, vae = encode_images(path, files, args)
        shares.append((noise / z.var((0, 2, 3), correction=0)).mean())
        if path == args.ckpt:
            own, changed = noise, vae
    factor, ckpt = (shares[1] / shares[0]).sqrt(), read_checkpoint(args.ckpt)
    changed.last_convolution().bias[changed.latent_channels:] += 2 * factor.log()       # of the log-variance
    ckpt["vae"] = changed.cpu().state_dict()
    for state in (ckpt["model"], ckpt["ema"]):
        state["bn.running_var"] = state["bn.running_var"] + (factor.square() - 1) * own
    write_atomic(args.out, lambda tmp: torch.save(ckpt, tmp))
    print(f"sampling adds {shares[0]:.2%} to the variance of {args.ckpt}, {shares[1]:.2%} to that of "
          f"{args.other}; in {args.out} the standard deviation is multiplied by {factor:.3f}")


@torch.no_grad()
def reconstruct_command(args):
    """PSNR, SSIM and, if its weights are available, LPIPS of a VAE's reconstructions (of the posterior's
    mean); an image of the first 24 originals beside their reconstructions."""
    check_output(args.out, [args.images, args.vae])
    vae, device = open_vae(args.vae, args)
    originals, measures, shown = ImageSet(args.images, args.resolution), {}, []
    size, n = args.resolution, originals.n
    require(n and originals.shape == (size, size),
            f"{args.images}: no images of {size}x{size} pixels in it; see --resolution")
    try:
        lpips = LPIPS(args.lpips_ckpt, args.vgg_ckpt).to(device)
        measures["lpips"] = lambda x, y: len(x) * lpips(y.to(device), x.to(device))
    except UserError as e:
        print(f"no LPIPS: {e}")
    made = Reconstructions(args.vae, SimpleNamespace(vae=vae), originals, **measures)
    for i, y in enumerate(tqdm(made.batches(range(n), 1), total=n, unit="img")):              # [1, 3, R, R]
        if i < 24:
            shown += [originals[i], y[0]]
    save_png(image_grid(torch.stack(shown), 8, max(1, 64 // size)), args.out)
    for name, total in made.sums.items():
        print(f"  {name.upper()} {total / n:.4f}" + (" dB" if name == "psnr" else ""))
    print(f"{n} images; originals beside reconstructions in {args.out}")


def main():
    parser = Parser(description="What a checkpoint has learned.")
    commands = parser.add_subparsers(dest="command", required=True,
                                     metavar="evaluate|latents|reconstruct|noise")

    def add_command(run, name, help):
        command = commands.add_parser(name, help=help)
        command.set_defaults(run=run)
        command.add_argument("--device", default="auto")
        return command.add_argument

    add = add_command(evaluate_command, "evaluate", "CKNNA by block, denoising loss by t, on held-out images")
    add("ckpts", metavar="CKPT", nargs="+", type=path_name, help="training checkpoints")
    add("--val-dir", type=path_name, help="images as DIR/CLASS/*.jpg (default: the run's)")
    add("--data-dir", type=path_name, help="training images, for their classes")
    add("--vae-ckpt", type=path_name, help="the VAE, if the checkpoint has none: file, folder or hub id")
    add("--enc-type", help="the encoder to compare with (default: the run's first)")
    add("--enc-ckpt", type=path_name, help="its weights, instead of the hub's")
    add = add_command(latents_command, "latents", "PCA of the latents of several VAEs, and their spectra")
    add("images", type=path_name, help="a folder of images")
    add("vaes", metavar="VAE", nargs="+", type=path_name, help="checkpoints, weights, diffusers folders")
    add("--out", type=chart_file, default="latents.png", help="the chart (latents.png)")
    add("--resolution", type=positive_int, default=256, help="pixels (256)")
    add = add_command(reconstruct_command, "reconstruct", "reconstructions, PSNR, SSIM, LPIPS")
    add("vae", type=path_name, help="checkpoint, weights, diffusers folder or hub id")
    add("images", type=existing_path, help="a folder or an .npz")
    add("--out", type=path_name, default="reconstructions.png", help="the image (reconstructions.png)")
    add("--lpips-ckpt", type=path_name, help="LPIPS' linear heads, instead of the lpips package's")
    add("--vgg-ckpt", type=path_name, help="torchvision's VGG16 weights, instead of the hub's")
    add("--resolution", type=positive_int, default=256, help="pixels (256)")
    add = add_command(noise_command, "noise", "a checkpoint with the posterior noise of another")
    add("images", type=path_name, help="a folder of images, on which the noise is measured")
    add("ckpt", metavar="CKPT", type=existing_path, help="a training checkpoint")
    add("other", metavar="OTHER", type=path_name, help="the VAE with the wanted noise")
    add("--out", type=path_name, required=True, help="the new file")
    add("--resolution", type=positive_int, default=256, help="pixels (256)")
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    run_command(main)
