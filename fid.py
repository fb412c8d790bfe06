"""fid.py: how good the pictures are. FID, sFID, Inception Score, KID, precision and recall in one pass.

    python fid.py                                            the newest run under exps/ against its own data
    python fid.py REF SAMPLES                                each a folder of images or an ADM .npz
    python fid.py REF --ckpt X.pt --num-samples 50000        draw the samples, evaluate them in memory
    python fid.py --ckpt X.pt --data-dir DIR --reconstruct   the VAE alone: rFID, PSNR, SSIM
    torchrun --nproc_per_node=8 fid.py ...                   the same numbers, the work split

FID, sFID, IS, precision and recall are those of the ADM evaluator (guided-diffusion), without its TensorFlow;
KID is arXiv 1801.01401's. Over another encoder's features (--features dinov2) the Frechet distance is called
fd_NAME. Read from the top: the networks, the pictures, the metrics, the command.
"""
import hashlib
import json
import math
import os
import time
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import timm
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from torch.overrides import TorchFunctionMode
from torch.utils.data import DataLoader
from tqdm import tqdm

from repa import EMBEDDED, create_encoder, fold_batch_norms, timm_name
from sample import (add_sampler_flags, load_checkpoint, newest_checkpoint, sample_images, sampler_settings,
                    save_npz, start_processes)
from vae import (READ_ERRORS, Parser, UserError, hash_tensors, list_images, load_into, load_tensors, one_line,
                 pick_device, psnr, read_image, run_command, ssim, to_float, to_uint8, write_atomic)

SPATIAL = 17 * 17 * 7                                  # sFID's features: 7 channels of a 17 x 17 map
METRICS = ("fid", "sfid", "is", "kid", "precision", "recall")
SUMS = {"fid": "pool", "sfid": "spatial", "is": "logits"}      # metrics that take only sums over features
DINOV2_L = "vit_large_patch14_dinov2.lvd142m"
WEIGHTS = ("pt_inception-2015-12-05-6726825d.pth", "weights-inception-2015-12-05-6726825d.pth")
URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{WEIGHTS[0]}"


# ------------------------------------------------------------------------------------------------------------
# Networks: uint8 images [B, 3, H, W] -> {"pool": [B, D]}; Inception's also "spatial" [B, 2023], "logits"
# ------------------------------------------------------------------------------------------------------------

def resize_tf1(images, size):
    """uint8 [B, 3, H, W] -> float32 [B, 3, size, size], bilinear as TensorFlow 1 does it: output pixel i
    reads the input at i * H / size, so corners are not centred, and nothing is averaged when shrinking."""
    def taps(n):
        at = torch.arange(size, device=images.device, dtype=torch.float32) * torch.tensor(n / size)
        low = at.long()
        return low, (low + 1).clamp_max(n - 1), at - low

    (top, bottom, dy), (left, right, dx) = taps(images.shape[2]), taps(images.shape[3])
    x = images.float()
    x = torch.lerp(x[..., left], x[..., right], dx)                                          # [B, 3, H, size]
    return torch.lerp(x[:, :, top], x[:, :, bottom], dy[:, None])


class PoolInstead(TorchFunctionMode):
    """Inside, F.avg_pool2d means `pool`: timm's Inception blocks call it where the FID graph pools
    otherwise."""

    def __init__(self, pool):
        super().__init__()
        self.pool = pool

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return (self.pool if func is F.avg_pool2d else func)(*args, **(kwargs or {}))


class Inception(nn.Module):
    """The Inception-v3 of FID (TensorFlow's graph of 2015-12-05) out of timm's blocks. It differs from timm's
    in its resize and scaling, its 1008 logits, average pools that leave the padding out, and a max pool in
    the last block. file: either public weights file (WEIGHTS). Raises UserError."""
    name, width, size, resize = "inception", 2048, 299, "bilinear as TensorFlow 1 does it"

    def __init__(self, file):
        super().__init__()
        with torch.device("meta"):
            net = timm.create_model("inception_v3", num_classes=1008, aux_logits=False)
        net = net.to_empty(device="cpu").eval().requires_grad_(False)
        load_into(net, load_tensors(file), file)
        fold_batch_norms(net)
        self.net = net.to(memory_format=torch.channels_last)
        self.sha256 = hashlib.sha256(Path(file).read_bytes()).hexdigest()

    def forward(self, images):
        x = ((resize_tf1(images, self.size) - 128) / 128).contiguous(memory_format=torch.channels_last)
        average = partial(F.avg_pool2d, count_include_pad=False)
        for name, layer in self.net.named_children():
            if name == "global_pool":
                break
            with PoolInstead(F.max_pool2d if name == "Mixed_7c" else average):
                x = layer(x)
            if name == "Mixed_6d":                           # ADM's mixed_6/conv is its first branch
                spatial = x[:, :7].permute(0, 2, 3, 1).flatten(1)
        pool = x.mean((2, 3))
        return dict(pool=pool, spatial=spatial, logits=pool @ self.net.fc.weight.T)        # ADM: no bias


class TimmFeatures(nn.Module):
    """Pooled features of a timm encoder before its classifier: DINOv2's normalised class token (as arXiv
    2306.04675), a convolutional network's pooled last map. Images are resized to the size timm names (DINOv2:
    224) and rounded, as Pillow would. file: weights in place of the hub's. Raises UserError without any."""

    def __init__(self, name, file=None):
        super().__init__()
        self.name = name
        is_dinov2 = "dinov2" in name
        net, config = create_encoder(DINOV2_L if name == "dinov2" else timm_name(name), file,
                                     grid=16 if is_dinov2 else None)
        self.size = 224 if is_dinov2 else config["input_size"][-1]
        self.mode = "bilinear" if config["interpolation"] == "bilinear" else "bicubic"
        self.resize = f"{self.mode}, antialiased"
        for key in ("mean", "std"):
            self.register_buffer(key, torch.tensor(config[key]).view(1, 3, 1, 1) * 255)
        self.net = net.eval().requires_grad_(False).to(memory_format=torch.channels_last)
        self.sha256 = hash_tensors(net).hexdigest()              # the hub gives no file
        self.width = self(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))["pool"].shape[1]

    def forward(self, images):
        x = images.float()
        for height in (x.shape[2], self.size):                   # Pillow: columns first, each time rounded
            x = F.interpolate(x, (height, self.size), mode=self.mode, antialias=True).round().clamp(0, 255)
        x = ((x - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
        return dict(pool=self.net.forward_head(self.net.forward_features(x), pre_logits=True).float())


def load_features(args):
    """The network the flags name; by default Inception if its weights are here, else the embedded one."""
    if args.features not in (None, "inception"):
        return TimmFeatures(args.features, args.features_weights)
    cache = Path(torch.hub.get_dir()) / "checkpoints"
    file = args.inception_weights or next((cache / w for w in WEIGHTS if (cache / w).is_file()), None)
    if args.download and not args.inception_weights:
        file = file or cache / WEIGHTS[0]
        if int(os.environ.get("LOCAL_RANK", 0)) == 0 and not file.is_file():
            try:
                cache.mkdir(parents=True, exist_ok=True)            # the name ends in the hash's first digits
                torch.hub.download_url_to_file(URL, file, hash_prefix=file.stem.rpartition("-")[2])
            except (OSError, RuntimeError) as e:
                raise UserError(f"--download: cannot fetch {URL} ({str(e)[:60]}); bring that file by "
                                f"--inception-weights FILE; --features {EMBEDDED} works meanwhile") from None
        if dist.is_initialized():
            dist.barrier()
    if file:
        return Inception(file)
    if args.features:
        raise UserError(f"--features inception: its weights are not here; give {URL} by --inception-weights "
                        f"FILE, or --download; --features {EMBEDDED} works meanwhile")
    return TimmFeatures(EMBEDDED)


# ------------------------------------------------------------------------------------------------------------
# Pictures: `n` of them, `shape` (H, W), batches(indices, ...) -> uint8 [B, 3, H, W], `tallies` over those
# ------------------------------------------------------------------------------------------------------------

class ImageSet:
    """REF or SAMPLES, read when asked for: a folder of images (any nesting, sorted), or an .npz with arr_0
    uint8 [N, H, W, 3] and, or only, statistics: given = {"pool": (mu, sigma), "spatial": (mu_s, sigma_s)}.

    resolution: ADM's centre crop for the files of a folder. tallies: [how many images were not RGB].
    Raises UserError."""

    def __init__(self, path, resolution=None):
        self.path, self.resolution, self.given, self.made_by = Path(path), resolution, {}, {}
        self.files, self.n, self.shape, self.stream, self.tallies = None, 0, None, None, torch.zeros(1)
        if self.path.suffix == ".npz":
            try:
                self.open_npz()
            except READ_ERRORS as e:
                raise UserError(f"{path}: not a readable .npz ({one_line(e)})") from None
        else:
            self.files = list_images(path)
            self.n = len(self.files)
            first, _, error = self[[0]]
            if error:
                raise UserError(error)
            self.shape = tuple(first.shape[2:])
        if self.n < 2 and not self.given:
            raise UserError(f"{path}: {self.n} image(s); a distribution needs at least two")

    def open_npz(self):
        with np.load(self.path) as f:
            has_images = "arr_0" in f
            for key, mu, sigma in (("pool", "mu", "sigma"), ("spatial", "mu_s", "sigma_s")):
                if mu in f and sigma in f:
                    self.given[key] = torch.from_numpy(f[mu]).double(), torch.from_numpy(f[sigma]).double()
            self.made_by = {k: f[k].item() for k in ("features", "sha256", "n") if k in f}
        for mu, sigma in self.given.values():
            if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
                raise UserError(f"{self.path}: mu {[*mu.shape]}, sigma {[*sigma.shape]}: not [D], [D, D]")
            if not (mu.isfinite().all() and sigma.isfinite().all()):
                raise UserError(f"{self.path}: its statistics are not finite")
        if has_images:
            self.given = self.given if "pool" in self.given else {}
            with zipfile.ZipFile(self.path) as z, z.open("arr_0.npy") as f:
                np.lib.format.read_magic(f)
                shape, fortran, dtype = np.lib.format.read_array_header_1_0(f)
                self.offset = f.tell()
            if dtype != np.uint8 or fortran or len(shape) != 4 or shape[3] != 3:
                raise UserError(f"{self.path}: arr_0 is {dtype} {list(shape)}, expected uint8 [N, H, W, 3]")
            self.n, self.shape = shape[0], shape[1:3]
        elif "pool" not in self.given:
            raise UserError(f"{self.path}: neither arr_0 (images) nor mu and sigma (statistics) in it")

    def __getitem__(self, indices):
        """Indices -> (uint8 [B, 3, H, W], how many were not RGB, error or ''): raised in a loader's process,
        an error would become a traceback."""
        images, not_rgb = [], 0
        for i in indices:
            name = self.files[i] if self.files else f"{self.path}: image {i}"
            try:
                if self.files:
                    with Image.open(self.files[i]) as file:
                        not_rgb += file.mode != "RGB" or "transparency" in file.info
                    images.append(read_image(self.files[i], self.resolution))
                else:
                    self.stream = self.stream or zipfile.ZipFile(self.path).open("arr_0.npy")
                    size = math.prod(self.shape) * 3
                    self.stream.seek(self.offset + i * size)         # where it is already, but at the start
                    pixels = torch.frombuffer(bytearray(self.stream.read(size)), dtype=torch.uint8)
                    images.append(pixels.view(*self.shape, 3).permute(2, 0, 1))
            except (*READ_ERRORS, UserError) as e:
                error = e if isinstance(e, UserError) else f"{name}: cannot be read ({one_line(e)})"
                return None, 0, f"{error}; a metric over fewer images would be wrong: mend it or take it away"
            (h, w), (h0, w0) = images[-1].shape[1:], self.shape or images[0].shape[1:]
            if (h, w) != (h0, w0):
                return None, 0, (f"{name}: {w}x{h} pixels, but {self.files[0]} has {w0}x{h0}; --resolution N "
                                 "crops every image of a folder to N")
        return torch.stack(images), not_rgb, ""

    def batches(self, indices, batch_size, num_workers=0):
        """The images `indices` (a range), in order, decoded in processes (an .npz in one, which reads on)."""
        parts = [indices[i:i + batch_size] for i in range(0, len(indices), batch_size)]
        workers = min(num_workers, len(parts) if self.files else 1)
        for images, not_rgb, error in DataLoader(self, batch_size=None, sampler=parts, num_workers=workers):
            if error:
                raise UserError(error)
            self.tallies += not_rgb
            yield images


class Samples:
    """Images that sample.py draws from a checkpoint, with labels i mod classes."""

    def __init__(self, path, model, n, settings):
        self.path, self.model, self.n, self.settings = path, model, n, settings
        self.given, self.tallies, self.shape = {}, torch.zeros(1), (model.args["resolution"],) * 2

    def batches(self, indices, batch_size, num_workers=0):
        for i in range(0, len(indices), batch_size):
            yield sample_images(self.model, indices[i:i + batch_size], **self.settings)


class Reconstructions:
    """What the VAE makes of images (the posterior's mode, as uint8). tallies: the sums of PSNR and SSIM."""

    def __init__(self, path, model, originals):
        self.path, self.model, self.originals, self.n = path, model, originals, originals.n
        self.given, self.tallies, self.shape = {}, torch.zeros(2), originals.shape

    def batches(self, indices, batch_size, num_workers=0):
        for images in self.originals.batches(indices, batch_size, num_workers):
            x = to_float(images)
            z = self.model.vae.encode(x.to(self.model.device)).mean
            y = to_uint8(self.model.vae.decode(z)).cpu()
            self.tallies += torch.stack([psnr(x, to_float(y)).sum(), ssim(x, to_float(y)).sum()])
            yield y


# ------------------------------------------------------------------------------------------------------------
# Metrics
# ------------------------------------------------------------------------------------------------------------

class Moments:
    """Mean [D] and covariance [D, D] (N - 1) of rows that come in batches, summed in float64."""

    def __init__(self, width):
        self.n, self.sum, self.outer = (torch.zeros(*shape, dtype=torch.float64)
                                        for shape in ((1,), (width,), (width, width)))

    def add(self, rows, start):
        x = rows.double()
        self.n += len(x)
        self.sum += x.sum(0)
        self.outer.addmm_(x.T, x)

    def result(self):
        mean = self.sum / self.n
        return mean, (self.outer - self.n * torch.outer(mean, mean)) / (self.n - 1)


def frechet_distance(mean1, cov1, mean2, cov2):
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), float64 tensors [D], [D, D] (arXiv 1706.08500, eq. 6).

    C1 C2 has the eigenvalues of A^T C2 A where C1 = A A^T, which is symmetric: no matrix square root is
    taken. A is Cholesky's factor or, where C1 is singular (few images), from C1's own eigenvectors."""
    a, singular = torch.linalg.cholesky_ex(cov1)
    if singular:
        values, vectors = torch.linalg.eigh(cov1)
        a = vectors * values.clamp_min(0).sqrt()
    root = torch.linalg.eigvalsh(a.T @ cov2 @ a).clamp_min(0).sqrt().sum()
    return ((mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2 * root).item()


class InceptionScore:
    """exp of the mean KL(p(y|x) || p(y)), averaged over splits of 5000 images in their order (arXiv
    1606.03498, as ADM computes it). Per split it needs only the sums of p and of p log p."""
    SPLIT = 5000

    def __init__(self, n):
        self.p = torch.zeros(-(-n // self.SPLIT), 1008, dtype=torch.float64)
        self.plogp = torch.zeros(len(self.p), dtype=torch.float64)

    def add(self, logits, start):
        """Logits [B, 1008] of the images from number `start` on."""
        log_p, split = logits.double().log_softmax(1), torch.arange(start, start + len(logits)) // self.SPLIT
        self.p.index_add_(0, split, log_p.exp())
        self.plogp.index_add_(0, split, (log_p.exp() * log_p).sum(1))

    def result(self):
        n = self.p.sum(1)                                                                # each p sums to 1
        q = self.p / n[:, None]
        return (self.plogp / n - torch.special.xlogy(q, q).sum(1)).exp().mean().item()


def kid(x, y, subsets=100, size=1000, seed=2020):
    """Kernel distance of features [N, D], [M, D] with kernel (x.y / D + 1)^3: the unbiased estimate averaged
    over random subsets (arXiv 1801.01401), which are those that torch-fidelity draws. Every kernel value is
    computed once; a subset's sum is a product with its indicator."""
    size, rng, width = min(size, len(x), len(y)), np.random.RandomState(seed), x.shape[1]
    in_x, in_y = (torch.zeros(subsets, len(f), dtype=torch.float64) for f in (x, y))
    for k in range(subsets):
        for inside in (in_x, in_y):
            inside[k, rng.choice(inside.shape[1], size, replace=False)] = 1

    def kernel_sum(a, in_a, b, in_b):
        total = torch.zeros(subsets, dtype=torch.float64)
        for rows, inside in zip(a.split(1000), in_a.split(1000, dim=1)):
            total += (inside @ (rows @ b.T / width + 1).cpu().double().pow(3) * in_b).sum(1)
        return total

    within = 0
    for f, inside in ((x, in_x), (y, in_y)):
        diagonal = inside @ (f.cpu().double().square().sum(1) / width + 1).pow(3)
        within += kernel_sum(f, inside, f, inside) - diagonal
    return (within / (size * (size - 1)) - 2 * kernel_sum(x, in_x, y, in_y) / size ** 2).mean().item()


def precision_recall(reference, samples, k=3, block=1000):
    """Share of the samples within the reference's manifold, and the reverse (arXiv 1904.06991). A manifold is
    the union of balls around its features [N, D], each as wide as the k-th nearest neighbour is far."""
    def radii(x):                                        # the row's nearest is itself: index k, not k - 1
        nearest = [torch.cdist(rows, x).topk(k + 1, largest=False).values for rows in x.split(block)]
        return torch.cat(nearest)[:, k]

    radii_ref, radii_samples = radii(reference), radii(samples)
    precise, recalled = 0, torch.zeros(len(reference), dtype=torch.bool, device=reference.device)
    for rows, radius in zip(samples.split(block), radii_samples.split(block)):
        d = torch.cdist(rows, reference)
        precise += (d <= radii_ref).any(1).sum().item()
        recalled |= (d <= radius[:, None]).any(0)
    return precise / len(samples), recalled.sum().item() / len(reference)


# ------------------------------------------------------------------------------------------------------------
# From pictures to numbers
# ------------------------------------------------------------------------------------------------------------

@torch.no_grad()
def collect(source, net, keep=(), sums=(), *, device, batch_size, num_workers=0, rank=0, world=1, desc=""):
    """One pass over a source, every process over a run of neighbouring images. keep: numbers of the images
    whose features are wanted; sums: of 'pool', 'spatial', 'logits'. Returns {'rows': features [len(keep), D]
    float32 (on process 0), 'pool': (mean, covariance), 'spatial': (mean, covariance), 'logits': Inception
    Score}. Raises UserError for an unreadable image or features not finite."""
    mine = range(rank * source.n // world, (rank + 1) * source.n // world)
    at, keep, rows = mine.start, set(keep), [torch.empty(0, net.width)]
    totals = {key: InceptionScore(source.n) if key == "logits" else
              Moments(SPATIAL if key == "spatial" else net.width) for key in sums}
    with tqdm(total=len(mine), unit="img", desc=desc, disable=rank > 0) as bar:
        for images in source.batches(mine, batch_size, num_workers):
            parts = images.split(8 if device.type == "cpu" else len(images))   # 8: they stay in a CPU's cache
            parts = [{key: f.cpu() for key, f in net(part.to(device)).items()} for part in parts]
            f = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
            bad = (~f["pool"].isfinite().all(1)).nonzero()
            if len(bad):
                raise UserError(f"{source.path}: the features of image {at + bad[0].item()} are not finite; "
                                f"are the weights of {net.name} damaged?")
            for key, total in totals.items():
                total.add(f[key], at)
            rows.append(f["pool"][[i for i in range(len(images)) if at + i in keep]])
            at += len(images)
            bar.update(len(images))
    rows = torch.cat(rows)
    if world > 1:
        for t in [t for total in totals.values() for t in vars(total).values()] + [source.tallies]:
            shared = t.to(device)
            dist.all_reduce(shared)
            t.copy_(shared)
        parts = [None] * world if rank == 0 else None
        dist.gather_object(rows, parts)
        rows = torch.cat(parts) if rank == 0 else rows
    return dict(rows=rows) | {key: total.result() for key, total in totals.items()}


def spread(n, most=10_000):
    """At most 10,000 of n indices, evenly spread (a folder is sorted by class): they bound KID's memory."""
    return [k * n // min(n, most) for k in range(min(n, most))]


def reason_against(metric, net, sources):
    """Why a metric cannot be had from these features and inputs; '' if it can."""
    if metric in ("sfid", "is") and net.name != "inception":
        return f"is defined on Inception's features, not {net.name}'s"
    for source in sources[1:] if metric == "is" else sources:
        if source.n == 0 and SUMS.get(metric) not in source.given:
            return f"needs images, and {source.path} holds statistics only"
        if metric in ("precision", "recall") and source.n < 4:
            return f"needs at least 4 images, and {source.path} has {source.n}"
    return ""


def check_statistics(source, net):
    """Statistics from a file must be of this network (unmarked ones 2048 wide are ADM's, so Inception's);
    beside images, another network's are dropped. Returns whether they were. Raises UserError."""
    if not source.given:
        return False
    width = len(source.given["pool"][0])
    name = source.made_by.get("features", "inception" if width == 2048 else net.name)
    if name != net.name and source.n:
        source.given = {}
        return True
    if name != net.name:
        raise UserError(f"{source.path}: statistics of {name}'s features, not {net.name}'s; take --features "
                        + name + (" with --inception-weights FILE" if name == "inception" else ""))
    if source.made_by.get("sha256", net.sha256) != net.sha256:
        raise UserError(f"{source.path}: statistics made with other weights of {name}")
    if width != net.width or len(source.given.get("spatial", [range(SPATIAL)])[0]) != SPATIAL:
        raise UserError(f"{source.path}: statistics of {width} features, {name} has {net.width}")
    return False


def evaluate(sources, net, metrics, save_stats=None, *, device, rank=0, **settings):
    """The metrics (of METRICS) of samples against a reference, sources = [reference, samples], one pass over
    each: {name: value} on process 0, {} elsewhere. save_stats: also write the reference's statistics there;
    [reference] alone will do for that. settings: of `collect`."""
    manifold, found = {"precision", "recall"} & set(metrics), []
    for source, desc in zip(sources, ("reference", "samples")):
        sums = [SUMS[m] for m in metrics if m in SUMS and not (m == "is" and desc == "reference")]
        if save_stats and desc == "reference":
            sums = ["pool", "spatial"] if net.name == "inception" else ["pool"]
        sums = [key for key in sums if key not in source.given]
        keep = range(source.n) if manifold else spread(source.n) if "kid" in metrics else ()
        found.append(dict(source.given))
        if source.n and (sums or keep):
            found[-1] |= collect(source, net, keep, sums, device=device, rank=rank, desc=desc, **settings)
    if rank > 0:
        return {}
    ref, (r, s) = sources[0], (found[0], found[-1])
    if save_stats:
        stats = dict(zip(("mu", "sigma", "mu_s", "sigma_s"), r["pool"] + r.get("spatial", ())))
        n = ref.n or ref.made_by.get("n", 0)
        save_npz(save_stats, features=net.name, sha256=net.sha256, n=n, **stats)
    out = {}
    if "fid" in metrics:
        out["fid" if net.name == "inception" else f"fd_{net.name}"] = frechet_distance(*r["pool"], *s["pool"])
    if "sfid" in metrics:
        out["sfid"] = frechet_distance(*r["spatial"], *s["spatial"])
    if "is" in metrics:
        out["is"] = s["logits"]
    if "kid" in metrics:
        out["kid"] = kid(*(side["rows"][spread(len(side["rows"]))].to(device) for side in (r, s)))
    if manifold:
        both = zip(("precision", "recall"), precision_recall(r["rows"].to(device), s["rows"].to(device)))
        out |= {name: value for name, value in both if name in metrics}
    return out


# ------------------------------------------------------------------------------------------------------------
# The command
# ------------------------------------------------------------------------------------------------------------

def parse_args(argv=None):
    """Flags, checked without opening a file. `metrics` becomes a list, or stays None: all that can be had."""
    parser = Parser(description="FID, sFID, Inception Score, KID, precision and recall.")
    add = parser.add_argument
    add("ref", nargs="?", metavar="REF", help="what to compare with: a folder, an .npz, --save-stats' file")
    add("samples", nargs="?", metavar="SAMPLES", help="images to judge: a folder or an .npz")
    add("--features", help=f"inception (default if its weights are here), dinov2, {EMBEDDED} or a timm model")
    add("--metrics", help=f"some of {','.join(METRICS)} (default: all that can be had)")
    add("--inception-weights", metavar="FILE", help=" or ".join(WEIGHTS))
    add("--download", action="store_true", help="fetch the Inception weights once (95 MB)")
    add("--features-weights", metavar="FILE", help="weights of a timm model, in place of the hub's")
    add("--resolution", type=int, help="centre-crop the images of folders to this size, as ADM does")
    add("--save-stats", metavar="FILE", help="write REF's statistics to an .npz; SAMPLES may be left out")
    add("--json", metavar="FILE", help="write the numbers there")
    add("--batch-size", type=int, help="per process (default: 64 on a GPU, 32 elsewhere)")
    add("--num-workers", type=int, default=min(8, os.cpu_count()), help="decoding processes")
    add("--device", default="auto")
    add("--ckpt", metavar="FILE", help="judge this checkpoint (without REF: the newest under exps/)")
    add("--vae-ckpt", help="the VAE, where the checkpoint has none: file, folder or hub id")
    add("--data-dir", metavar="DIR", help="its reference images (default: the run's own)")
    add("--num-samples", type=int, help="default: as many as reference images, 50,000 at most")
    add("--reconstruct", action="store_true", help="judge the checkpoint's VAE: rFID, PSNR, SSIM")
    add_sampler_flags(parser)
    args = parser.parse_args(argv)
    args.metrics = args.metrics and args.metrics.split(",")
    args.sampler = sampler_settings(args)
    for name in args.metrics or ():
        if name not in METRICS:
            raise UserError(f"--metrics {name}: unknown; take some of {','.join(METRICS)}")
    for name, low in (("batch_size", 1), ("num_workers", 0), ("resolution", 1), ("num_samples", 2)):
        if getattr(args, name) is not None and getattr(args, name) < low:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: at least {low}")
    for file in (args.json, args.save_stats):
        if file and Path(file).is_dir():
            raise UserError(f"{file}: a folder; name a file")
    inception = args.features in (None, "inception")
    for wrong, line in (
            (not inception and (args.inception_weights or args.download),
             f"--inception-weights and --download go with --features inception, not {args.features}"),
            (args.features_weights and (inception or args.features == EMBEDDED),
             "--features-weights goes with --features and a timm model's name"),
            (args.save_stats and Path(args.save_stats).suffix != ".npz",
             f"--save-stats {args.save_stats}: the name must end in .npz"),
            (args.ref and args.data_dir, "REF and --data-dir mean the same; give one of them"),
            (args.samples and (args.ckpt or args.num_samples or args.reconstruct),
             "--ckpt, --num-samples and --reconstruct make the images to judge; SAMPLES names others"),
            (args.ref and not (args.samples or args.ckpt or args.save_stats),
             "SAMPLES is missing: fid.py REF SAMPLES, or REF --ckpt FILE to draw them"),
            (args.reconstruct and args.num_samples,
             "--reconstruct takes every reference image; drop --num-samples"),
            (args.resolution and (args.ckpt or not args.ref),
             "--resolution: a checkpoint brings its own; drop it")):
        if wrong:
            raise UserError(line)
    return args


def open_sources(args, device):
    """[REF, SAMPLES], or [REF] for its statistics alone, as the flags say."""
    if args.ref and not args.ckpt:
        return [ImageSet(path, args.resolution) for path in (args.ref, args.samples) if path]
    ckpt = Path(args.ckpt) if args.ckpt else newest_checkpoint()
    model = load_checkpoint(ckpt, device, args.vae_ckpt, args.compile)
    size, data = model.args["resolution"], args.ref or args.data_dir or model.args.get("data_dir")
    if not data or not Path(data).exists():
        raise UserError(f"{data or ckpt}: no such folder; give the reference images by --data-dir DIR")
    ref = ImageSet(data, size)
    if not args.reconstruct:
        n = args.num_samples or min(ref.n or ref.made_by.get("n") or 50_000, 50_000)
        return [ref, Samples(ckpt, model, n, args.sampler)]
    if ref.shape != (size, size):
        raise UserError(f"{data}: --reconstruct needs images, of {size}x{size} pixels")
    return [ref, Reconstructions(ckpt, model, ImageSet(data, size))]


def main():
    args, start = parse_args(), time.time()
    device = pick_device(args.device)
    torch.backends.cudnn.allow_tf32 = False              # its ten bits of mantissa would show in the numbers
    rank, world = start_processes(device)
    say = print if rank == 0 else lambda line: None
    sources = open_sources(args, device)
    ref, samples = sources[0], sources[-1]
    net = load_features(args)
    if args.features is None:
        say(f"features: {net.name}" + ("" if net.name == "inception" else
            ", since Inception's weights are not here (--inception-weights FILE or --download brings them)"))
    for source in sources:
        if check_statistics(source, net):
            say(f"{source.path}: its statistics are another network's, not used; its images are")
    wanted = args.metrics or (["fid"] if args.reconstruct else METRICS)
    reasons = {metric: reason_against(metric, net, sources) for metric in wanted if len(sources) == 2}
    for metric, reason in reasons.items():
        if reason and args.metrics:
            raise UserError(f"--metrics {metric} {reason}")
    metrics = [metric for metric, reason in reasons.items() if not reason]
    if not args.metrics and max(ref.n, samples.n) > 100_000:       # all pairs of them: only where asked for
        metrics = [metric for metric in metrics if metric not in ("precision", "recall")]

    shapes = {source.shape for source in sources if source.shape}
    for h, w in shapes:
        resized = f", resized to {net.size}x{net.size} ({net.resize})" if {h, w} != {net.size} else ""
        say(f"images of {w}x{h} pixels{resized}")
    if len(shapes) > 1:
        say("warning: reference and samples differ in size")
    for source in sources:
        if 0 < source.n <= net.width:
            say(f"warning: {source.path}: {source.n} images are too few for a covariance of {net.width} "
                "features; compare such a distance only with others of as many images")
    results = evaluate(sources, net.to(device), metrics, args.save_stats, device=device, rank=rank,
                       world=world, batch_size=args.batch_size or (64 if device.type == "cuda" else 32),
                       num_workers=args.num_workers)
    for source in sources:
        if isinstance(source, ImageSet) and source.tallies > 0:
            n = int(source.tallies)
            say(f"{source.path}: {n} grey, palette or transparent images, read as RGB on white")
    if args.reconstruct:
        results |= dict(zip(("psnr", "ssim"), (samples.tallies / samples.n).tolist()))
    seconds = time.time() - start
    if args.save_stats:
        say(f"statistics of {ref.path} -> {args.save_stats}")
    if len(sources) == 2:
        theirs, ours = (f"{source.path} ({source.n or 'statistics'})" for source in sources)
        say(f"{ours} against {theirs}, {net.name} {net.sha256[:8]}, {seconds:.0f} s")
    for name, value in results.items():
        say(f"  {'r' if args.reconstruct and name[0] == 'f' else ''}{name:<28}{value:.6g}")
    if args.json and rank == 0:
        record = results | dict(n_samples=sum(source.n for source in sources[1:]), features=net.name,
                                n_reference=ref.n or ref.made_by.get("n"), weights_sha256=net.sha256,
                                resolution=list(samples.shape or ()), seconds=round(seconds, 2))
        write_atomic(args.json, lambda tmp: tmp.write_text(json.dumps(record, indent=1) + "\n"))
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    run_command(main)
