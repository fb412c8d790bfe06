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
import os
import time
import zipfile
import zlib
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
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from repa import EMBEDDED, create_encoder, fold_batch_norms, timm_name
from sample import (add_sampler_flags, load_checkpoint, newest_checkpoint, sample_images, sampler_settings,
                    start_processes)
from vae import (Parser, UserError, list_images, load_into, load_tensors, one_line, pick_device, psnr,
                 read_image, run_command, ssim, to_float, to_uint8, write_atomic)

SPATIAL = 17 * 17 * 7                                  # sFID's features: 7 channels of a 17 x 17 map
METRICS = ("fid", "sfid", "is", "kid", "precision", "recall")
DINOV2_L = "vit_large_patch14_dinov2.lvd142m"
WEIGHTS = ("pt_inception-2015-12-05-6726825d.pth", "weights-inception-2015-12-05-6726825d.pth")
READ_ERRORS = (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, EOFError,
               zipfile.BadZipFile, zlib.error, Image.DecompressionBombError)             # of damaged files
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
    the last block.

    file: either public weights file (WEIGHTS). Batch norm is folded into the convolutions. Raises
    UserError."""
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
        x = (resize_tf1(images, self.size) - 128) / 128
        x = x.contiguous(memory_format=torch.channels_last)
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
    """Pooled features of a timm encoder before its classifier: the class token of the normalised output for
    DINOv2 (as arXiv 2306.04675), the pooled last map of a convolutional network. Images are resized to the
    size in timm's own configuration (DINOv2: 224; the embedded EfficientNet-Lite0: 128) and rounded to uint8,
    as Pillow would.

    file: weights in place of the hub's. Raises UserError where there are none."""

    def __init__(self, name, file=None):
        super().__init__()
        self.name = name
        is_dinov2 = "dinov2" in name
        net, config = create_encoder(DINOV2_L if name == "dinov2" else timm_name(name), file,
                                     grid=16 if is_dinov2 else None)
        self.size = 224 if is_dinov2 else config["input_size"][-1]
        self.mode = "bilinear" if config["interpolation"] == "bilinear" else "bicubic"
        self.resize = f"{self.mode}, antialiased"
        self.register_buffer("mean", torch.tensor(config["mean"]).view(1, 3, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(config["std"]).view(1, 3, 1, 1) * 255, persistent=False)
        self.net = net.eval().requires_grad_(False).to(memory_format=torch.channels_last)
        digest = hashlib.sha256()                                # of the tensors: the hub gives no file
        for tensor in net.state_dict().values():
            digest.update(tensor.contiguous().numpy().tobytes())
        self.sha256 = digest.hexdigest()
        self.width = self(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))["pool"].shape[1]

    def forward(self, images):
        x = images.float()
        for height in (x.shape[2], self.size):                   # Pillow: columns first, each time rounded
            x = F.interpolate(x, (height, self.size), mode=self.mode, antialias=True).round().clamp(0, 255)
        x = ((x - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
        return dict(pool=self.net.forward_head(self.net.forward_features(x), pre_logits=True).float())


def load_features(args):
    """The network that the flags name; by default Inception if its weights are here, else the embedded
    one."""
    if args.features not in (None, "inception"):
        return TimmFeatures(args.features, args.features_weights)
    cache = Path(torch.hub.get_dir()) / "checkpoints"
    here = (cache / name for name in WEIGHTS if (cache / name).is_file())
    file = args.inception_weights or next(here, None)
    if not file and args.download:
        file = cache / WEIGHTS[0]
        if int(os.environ.get("LOCAL_RANK", 0)) == 0:
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
# Pictures: anything with len(), `shape` (H, W) and batches(indices, ...) -> uint8 [B, 3, H, W]
# ------------------------------------------------------------------------------------------------------------

class ImageSet(Dataset):
    """REF or SAMPLES: a folder of images (any nesting, sorted), or an .npz with arr_0 uint8 [N, H, W, 3] and,
    or only, statistics: given = {"pool": (mu, sigma), "spatial": (mu_s, sigma_s)}. Images are read when asked
    for.

    resolution: ADM's centre crop for the files of a folder. tallies: [how many images were not RGB].
    Raises UserError."""

    def __init__(self, path, resolution=None):
        self.path, self.resolution, self.given, self.made_by = Path(path), resolution, {}, {}
        self.files, self.n, self.shape, self.stream, self.tallies = None, 0, None, None, [torch.zeros(1)]
        if self.path.suffix == ".npz":
            try:
                self.open_npz()
            except READ_ERRORS as e:
                raise UserError(f"{path}: not a readable .npz ({one_line(e)})") from None
        elif self.path.is_file():
            raise UserError(f"{path}: neither a folder nor an .npz")
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
            names = f.files
            for key, mu, sigma in (("pool", "mu", "sigma"), ("spatial", "mu_s", "sigma_s")):
                if mu in f and sigma in f:
                    self.given[key] = torch.from_numpy(f[mu]).double(), torch.from_numpy(f[sigma]).double()
            self.made_by = {k: f[k].item() for k in ("features", "sha256", "n") if k in f}
        for mu, sigma in self.given.values():
            if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
                raise UserError(f"{self.path}: mu {[*mu.shape]}, sigma {[*sigma.shape]}: not [D], [D, D]")
            if not (mu.isfinite().all() and sigma.isfinite().all()):
                raise UserError(f"{self.path}: its statistics are not finite")
        if "arr_0" in names:
            with zipfile.ZipFile(self.path) as z, z.open("arr_0.npy") as f:
                v1 = np.lib.format.read_magic(f) == (1, 0)
                shape, fortran, dtype = (np.lib.format.read_array_header_1_0 if v1 else
                                         np.lib.format.read_array_header_2_0)(f)
                self.offset = f.tell()
            if dtype != np.uint8 or fortran or len(shape) != 4 or shape[3] != 3:
                raise UserError(f"{self.path}: arr_0 is {dtype} {list(shape)}, expected uint8 [N, H, W, 3]")
            self.n, self.shape = shape[0], shape[1:3]
        elif "pool" not in self.given:
            raise UserError(f"{self.path}: neither arr_0 (images) nor mu and sigma (statistics) in it")

    def __len__(self):
        return self.n

    def read(self, i):
        """Image i as uint8 [3, H, W], and whether it was not RGB; an .npz is read on from where it was
        left."""
        if self.files is None:
            self.stream = self.stream or zipfile.ZipFile(self.path).open("arr_0.npy")
            size = 3 * self.shape[0] * self.shape[1]
            self.stream.seek(self.offset + i * size)
            pixels = np.frombuffer(bytearray(self.stream.read(size)), np.uint8)
            return torch.from_numpy(pixels).view(*self.shape, 3).permute(2, 0, 1), False
        with Image.open(self.files[i]) as image:
            not_rgb = image.mode != "RGB" or "transparency" in image.info
        return read_image(self.files[i], self.resolution), not_rgb

    def __getitem__(self, indices):
        """Indices -> (uint8 [B, 3, H, W], how many were not RGB, error or ''). An error is returned, not
        raised: a loader's process would wrap it into a traceback."""
        images, not_rgb = [], 0
        for i in indices:
            name = self.files[i] if self.files else f"{self.path}: image {i}"
            try:
                image, other = self.read(i)
            except READ_ERRORS as e:
                return None, 0, (f"{name}: cannot be read ({one_line(e)}); a metric over fewer images would "
                                 "be wrong: mend it or take it away")
            (h, w), (h0, w0) = image.shape[1:], self.shape or image.shape[1:]
            if (h, w) != (h0, w0):
                return None, 0, (f"{name}: {w}x{h} pixels, but {self.files[0]} has {w0}x{h0}; --resolution N "
                                 "crops every image of a folder to N")
            images.append(image)
            not_rgb += other
        return torch.stack(images), not_rgb, ""

    def batches(self, indices, batch_size, num_workers=0):
        """The images `indices` (a range), in order, decoded in processes (an .npz: in one, which reads
        on)."""
        parts = [indices[i:i + batch_size] for i in range(0, len(indices), batch_size)]
        workers = min(num_workers, len(parts) if self.files else 1)
        for images, not_rgb, error in DataLoader(self, batch_size=None, sampler=parts, num_workers=workers):
            if error:
                raise UserError(error)
            self.tallies[0] += not_rgb
            yield images


class Samples:
    """Images that sample.py draws from a checkpoint, with labels i mod classes."""

    def __init__(self, path, model, n, settings):
        self.path, self.model, self.n, self.settings = path, model, n, settings
        self.given, self.tallies = {}, []
        self.shape = (model.args["resolution"],) * 2

    def __len__(self):
        return self.n

    def batches(self, indices, batch_size, num_workers=0):
        for i in range(0, len(indices), batch_size):
            yield sample_images(self.model, indices[i:i + batch_size], **self.settings)


class Reconstructions:
    """What the VAE makes of images (the mode of the posterior, rounded to uint8). tallies: the sums of PSNR
    and SSIM over the images passed so far."""

    def __init__(self, path, model, originals):
        self.path, self.model, self.originals, self.shape = path, model, originals, originals.shape
        self.given, self.tallies = {}, [torch.zeros(2)]

    def __len__(self):
        return len(self.originals)

    def batches(self, indices, batch_size, num_workers=0):
        for images in self.originals.batches(indices, batch_size, num_workers):
            x = to_float(images)
            z = self.model.vae.encode(x.to(self.model.device)).mode()
            y = to_uint8(self.model.vae.decode(z)).cpu()
            self.tallies[0] += torch.stack([psnr(x, to_float(y)).sum(), ssim(x, to_float(y)).sum()])
            yield y


# ------------------------------------------------------------------------------------------------------------
# Metrics
# ------------------------------------------------------------------------------------------------------------

class Moments:
    """Mean [D] and covariance [D, D] (N - 1) of rows that come in batches, summed in float64."""

    def __init__(self, width):
        self.n, self.sum = torch.zeros(1, dtype=torch.float64), torch.zeros(width, dtype=torch.float64)
        self.outer, self.waiting = torch.zeros(width, width, dtype=torch.float64), []

    def add(self, rows, start):
        self.waiting.append(rows)
        if sum(map(len, self.waiting)) >= 512:           # so that D x D sums are touched once for many rows
            self.tensors()

    def tensors(self):
        """What to add up over processes."""
        if self.waiting:
            x = torch.cat(self.waiting).double()
            self.waiting = []
            self.n += len(x)
            self.sum += x.sum(0)
            self.outer.addmm_(x.T, x)
        return self.n, self.sum, self.outer

    def result(self):
        n, total, outer = self.tensors()
        mean = total / n
        return mean, (outer - n * torch.outer(mean, mean)) / (n - 1)


def frechet_distance(mean1, cov1, mean2, cov2):
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), float64 tensors [D], [D, D] (arXiv 1706.08500, eq. 6).

    C1 C2 has the eigenvalues of A^T C2 A where C1 = A A^T, which is symmetric: no matrix square root is
    taken. A is Cholesky's factor or, where C1 is singular (few images), comes from C1's own eigenvectors,
    which takes longer."""
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

    def __init__(self, n, classes=1008):
        splits = -(-n // self.SPLIT)
        self.count, self.plogp = torch.zeros(2, splits, dtype=torch.float64)
        self.p = torch.zeros(splits, classes, dtype=torch.float64)

    def add(self, logits, start):
        """Logits [B, 1008] of the images from number `start` on."""
        log_p, split = logits.double().log_softmax(1), torch.arange(start, start + len(logits)) // self.SPLIT
        p = log_p.exp()
        self.count.index_add_(0, split, torch.ones(len(p), dtype=torch.float64))
        self.plogp.index_add_(0, split, (p * log_p).sum(1))
        self.p.index_add_(0, split, p)

    def tensors(self):
        return self.count, self.plogp, self.p

    def result(self):
        q = self.p / self.count[:, None]
        return (self.plogp / self.count - torch.special.xlogy(q, q).sum(1)).exp().mean().item()


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

    def diagonal(a, in_a):
        return in_a @ (a.cpu().double().square().sum(1) / width + 1).pow(3)

    xx, yy = (kernel_sum(f, inside, f, inside) - diagonal(f, inside) for f, inside in ((x, in_x), (y, in_y)))
    return ((xx + yy) / (size * (size - 1)) - 2 * kernel_sum(x, in_x, y, in_y) / size ** 2).mean().item()


def precision_recall(reference, samples, k=3, block=1000):
    """Share of the samples within the reference's manifold, and the reverse (arXiv 1904.06991). A manifold is
    the union of balls around its features [N, D], each as wide as the k-th nearest neighbour is far."""
    def distances(a, b):                                                                # squared, [block, N]
        return (a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T).clamp_min(0)

    def radii(x):                                        # the row's nearest is itself: index k, not k - 1
        nearest = [distances(rows, x).topk(k + 1, largest=False).values for rows in x.split(block)]
        return torch.cat(nearest)[:, k]

    radii_ref, radii_samples = radii(reference), radii(samples)
    precise, recalled = 0, torch.zeros(len(reference), dtype=torch.bool, device=reference.device)
    for rows, radius in zip(samples.split(block), radii_samples.split(block)):
        d = distances(rows, reference)
        precise += (d <= radii_ref).any(1).sum().item()
        recalled |= (d <= radius[:, None]).any(0)
    return precise / len(samples), recalled.sum().item() / len(reference)


# ------------------------------------------------------------------------------------------------------------
# From pictures to numbers
# ------------------------------------------------------------------------------------------------------------

@torch.no_grad()
def collect(source, net, keep=(), moments=(), score=False, *, device, batch_size, num_workers=0, rank=0,
            world=1, desc=""):
    """One pass over a source, every process over a run of neighbouring images. keep: ascending indices of the
    images whose features are wanted; moments: of 'pool', 'spatial'; score: whether the Inception Score is.
    Returns {'rows': features [len(keep), D] float32 (on process 0; elsewhere its own share), 'pool': (mean,
    covariance), 'spatial': (mean, covariance), 'is': score}. Raises UserError for an unreadable image or
    features not finite."""
    n = len(source)
    mine = range(rank * n // world, (rank + 1) * n // world)
    kept = [i for i in keep if i in mine]
    rows, filled, at = torch.empty(len(kept), net.width), 0, mine.start
    sums = {key: Moments(net.width if key == "pool" else SPATIAL) for key in moments}
    if score:
        sums["is"] = InceptionScore(n)
    with tqdm(total=len(mine), unit="img", desc=desc, disable=rank > 0) as bar:
        for images in source.batches(mine, batch_size, num_workers):
            parts = images.split(8 if device.type == "cpu" else len(images))   # 8: they stay in a CPU's cache
            parts = [{key: f.cpu() for key, f in net(part.to(device)).items()} for part in parts]
            f = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
            bad = (~f["pool"].isfinite().all(1)).nonzero()
            if len(bad):
                raise UserError(f"{source.path}: the features of image {at + bad[0].item()} are not finite; "
                                f"are the weights of {net.name} damaged?")
            for key, total in sums.items():
                total.add(f["logits"] if key == "is" else f[key], at)
            while filled < len(kept) and kept[filled] < at + len(images):
                rows[filled] = f["pool"][kept[filled] - at]
                filled += 1
            at += len(images)
            bar.update(len(images))
    if world > 1:
        for t in [t for total in sums.values() for t in total.tensors()] + list(source.tallies):
            shared = t.to(device)
            dist.all_reduce(shared)
            t.copy_(shared)
        parts = [None] * world if rank == 0 else None
        dist.gather_object(rows, parts)
        rows = torch.cat(parts) if rank == 0 else rows
    return dict(rows=rows) | {key: total.result() for key, total in sums.items()}


def spread(n, pool=10_000):
    """At most 10,000 of n indices, evenly spread (a folder is sorted by class): KID's, so that its memory is
    bounded. Of up to 10,000 images it takes all."""
    return [k * n // min(n, pool) for k in range(min(n, pool))]


def reason_against(metric, net, ref, samples):
    """Why a metric cannot be had from these features and inputs; '' if it can."""
    if metric in ("sfid", "is") and net.name != "inception":
        return f"is defined on Inception's features, not {net.name}'s"
    key = {"fid": "pool", "sfid": "spatial"}.get(metric)
    for source in (samples,) if metric == "is" else (ref, samples):
        if len(source) == 0 and key not in source.given:
            return f"needs images, and {source.path} holds statistics only"
        if metric in ("precision", "recall") and len(source) < 4:
            return f"needs at least 4 images, and {source.path} has {len(source)}"
    return ""


def check_statistics(source, net):
    """Statistics from a file must be of this network (unmarked ones 2048 wide are ADM's, so Inception's);
    beside images, another network's are dropped. Returns whether they were. Raises UserError."""
    if not source.given:
        return False
    width = len(source.given["pool"][0])
    name = source.made_by.get("features", "inception" if width == 2048 else net.name)
    if name != net.name and len(source):
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


def evaluate(ref, samples, net, metrics, save_stats=None, *, device, rank=0, **settings):
    """The metrics (of METRICS) of samples against ref, one pass over each: {name: value} on process 0, {}
    elsewhere. save_stats: also write the statistics of ref there. samples None: only that. settings: of
    `collect`."""
    found = []
    for source, desc in ((ref, "reference"), (samples, "samples"))[:1 if samples is None else 2]:
        save = save_stats and source is ref
        wanted = [key for key, metric in (("pool", "fid"), ("spatial", "sfid")) if key not in source.given
                  and (metric in metrics or save and (key == "pool" or net.name == "inception"))]
        n, score = len(source), "is" in metrics and source is samples
        keep = range(n) if {"precision", "recall"} & set(metrics) else spread(n) if "kid" in metrics else ()
        found.append(dict(source.given))
        if wanted or score or keep:
            found[-1] |= collect(source, net, keep, wanted, score, device=device, rank=rank, desc=desc,
                                 **settings)
    if rank > 0:
        return {}
    r, s = found[0], found[-1]
    if save_stats:
        stats = dict(zip(("mu", "sigma", "mu_s", "sigma_s"), r["pool"] + r.get("spatial", ())))

        def write(tmp):
            with open(tmp, "wb") as f:
                n = len(ref) or ref.made_by.get("n", 0)
                np.savez(f, features=net.name, sha256=net.sha256, n=n, **stats)
        write_atomic(save_stats, write)
    out = {}
    if "fid" in metrics:
        out["fid" if net.name == "inception" else f"fd_{net.name}"] = frechet_distance(*r["pool"], *s["pool"])
    if "sfid" in metrics:
        out["sfid"] = frechet_distance(*r["spatial"], *s["spatial"])
    if "is" in metrics:
        out["is"] = s["is"]
    if "kid" in metrics:
        out["kid"] = kid(*(side["rows"][spread(len(side["rows"]))].to(device) for side in (r, s)))
    if {"precision", "recall"} & set(metrics):
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
    for file in (args.inception_weights, args.features_weights, args.ckpt):
        if file and not Path(file).is_file():
            raise UserError(f"{file}: no such file")
    for file in (args.json, args.save_stats):
        if file and Path(file).is_dir():
            raise UserError(f"{file}: a folder; name a file")
    inception = args.features in (None, "inception")
    if not inception and args.features != "dinov2":
        timm_name(args.features)
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
    """(REF, SAMPLES or None) as the flags say."""
    if args.ref and not args.ckpt:
        return ImageSet(args.ref, args.resolution), args.samples and ImageSet(args.samples, args.resolution)
    ckpt = Path(args.ckpt) if args.ckpt else newest_checkpoint()
    model = load_checkpoint(ckpt, device, compile=args.compile)
    size, data = model.args["resolution"], args.ref or args.data_dir or model.args.get("data_dir")
    if not data or not Path(data).exists():
        raise UserError(f"{data or ckpt}: no such folder; give the reference images by --data-dir DIR")
    ref = ImageSet(data, size)
    if not args.reconstruct:
        n = args.num_samples or min(len(ref) or ref.made_by.get("n", 50_000), 50_000)
        return ref, Samples(ckpt, model, n, args.sampler)
    if ref.shape != (size, size):
        raise UserError(f"{data}: --reconstruct needs images, of {size}x{size} pixels")
    return ref, Reconstructions(ckpt, model, ImageSet(data, size))


def main():
    args, start = parse_args(), time.time()
    device = pick_device(args.device)
    torch.backends.cudnn.allow_tf32 = False              # its ten bits of mantissa would show in the numbers
    rank, world = start_processes(device)
    say = print if rank == 0 else lambda line: None
    ref, samples = open_sources(args, device)
    sources = [ref] if samples is None else [ref, samples]
    net = load_features(args)
    if args.features is None:
        say(f"features: {net.name}" + ("" if net.name == "inception" else
            ", since Inception's weights are not here (--inception-weights FILE or --download brings them)"))
    for source in sources:
        if check_statistics(source, net):
            say(f"{source.path}: its statistics are another network's, not used; its images are")
    metrics = (args.metrics or (["fid"] if args.reconstruct else METRICS)) if samples is not None else []
    reasons = {metric: reason_against(metric, net, ref, samples) for metric in metrics}
    if args.metrics and any(reasons.values()):
        raise UserError(next(f"--metrics {metric} {reason}" for metric, reason in reasons.items() if reason))
    if not args.metrics and max(map(len, sources)) > 100_000:      # all pairs of them: only where asked for
        reasons |= dict(precision="more than 100,000 images", recall="more than 100,000 images")
    metrics = [metric for metric in metrics if not reasons[metric]]

    shapes = {source.shape for source in sources if source.shape}
    for h, w in shapes:
        say(f"images of {w}x{h} pixels" + (f", resized to {net.size}x{net.size} ({net.resize})" if
                                           (h, w) != (net.size, net.size) else ""))
    if len(shapes) > 1:
        say("warning: reference and samples differ in size")
    for source in sources:
        if 0 < len(source) <= net.width:
            say(f"warning: {source.path}: {len(source)} images are too few for a covariance of {net.width} "
                "features; compare such a distance only with others of as many images")
    results = evaluate(ref, samples, net.to(device), metrics, args.save_stats, device=device, rank=rank,
                       world=world, batch_size=args.batch_size or (64 if device.type == "cuda" else 32),
                       num_workers=args.num_workers)
    for source in sources:
        if isinstance(source, ImageSet) and source.tallies[0] > 0:
            n = int(source.tallies[0])
            say(f"{source.path}: {n} grey, palette or transparent images, read as RGB on white")
    if args.reconstruct:
        results |= dict(zip(("psnr", "ssim"), (samples.tallies[0] / len(samples)).tolist()))
    seconds = time.time() - start
    if args.save_stats:
        say(f"statistics of {ref.path} -> {args.save_stats}")
    if samples is not None:
        theirs, ours = (f"{source.path} ({len(source) or 'statistics'})" for source in (ref, samples))
        say(f"{ours} against {theirs}, {net.name} {net.sha256[:8]}, {seconds:.0f} s")
    for name, value in results.items():
        say(f"  {'r' if args.reconstruct and name[0] == 'f' else ''}{name:<28}{value:.6g}")
    if args.json and rank == 0:
        record = results | dict(n_samples=0 if samples is None else len(samples),
                                n_reference=len(ref) or ref.made_by.get("n"), features=net.name,
                                resolution=list(sources[-1].shape or ()), weights_sha256=net.sha256,
                                seconds=round(seconds, 2))
        write_atomic(args.json, lambda tmp: tmp.write_text(json.dumps(record, indent=1) + "\n"))
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    run_command(main)
