"""fid.py: evaluation metrics: FID, sFID, Inception Score, KID, precision and recall in one pass.

    python fid.py                                            the newest run under exps/ against its own data
    python fid.py REF SAMPLES                                each a folder of images or an ADM-format .npz
    python fid.py REF --ckpt X.pt --num-samples 50000        generate the samples, evaluate them in memory
    python fid.py --ckpt X.pt --data-dir DIR --reconstruct   the VAE alone: rFID, PSNR, SSIM
    torchrun --nproc_per_node=8 fid.py ...                   the same numbers, computed by 8 processes

FID, sFID, IS, precision and recall follow the ADM evaluator (guided-diffusion), without its TensorFlow; KID
follows arXiv 1801.01401. Over other features (--features dinov2) the Frechet distance is called fd_NAME.
"""
import hashlib
import json
import math
import os
import time
import zipfile
from pathlib import Path

import numpy as np
import timm
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from data.images import how_to_unpack, list_images, load_batches, read_image
from repa import EMBEDDED, LITE2, create_encoder, fold_batch_norms, timm_name
from sample import (add_sampler_flags, check_finite, class_for_sample, load_checkpoint, sample_images,
                    sampler_settings, warn_of_short_average)
from support.checkpoints import newest_checkpoint
from support.commands import (Parser, UserError, check_output, count, existing_path, one_line, path_name,
                              positive_int, require, run_command)
from support.devices import (Processes, can_compile, choose_precision, end_processes, full_float32,
                             memory_format, pick_device, start_processes)
from support.files import READ_ERRORS, hash_tensors, load_into, load_tensors, save_npz, write_atomic
from support.grids import to_float, to_uint8
from vae import psnr, reconstruct, ssim

SPATIAL = 17 * 17 * 7                                  # sFID's features: 7 channels of a 17 x 17 map
METRICS = {"fid": "pool", "sfid": "spatial", "is": "logits",    # what each is computed from, see `collect`
           "kid": "features", "precision": "features", "recall": "features"}
STATISTICS = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}         # arrays in an ADM-format .npz
WEIGHTS = ("pt_inception-2015-12-05-6726825d.pth", "weights-inception-2015-12-05-6726825d.pth")
URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{WEIGHTS[0]}"


# --- Feature networks: uint8 images [B, 3, H, W] -> {output: [B, D]} in full float32 ------------------------

def resize_tf1(images, size):
    """uint8 [B, 3, H, W] -> float32 [B, 3, size, size], bilinear as in TensorFlow 1: output pixel i reads the
    input at i * H / size (corners are not centred), without antialiasing."""
    def taps(n):
        at = torch.arange(size, device=images.device, dtype=torch.float32) * torch.tensor(n / size)
        low = at.long()
        return low, (low + 1).clamp_max(n - 1), at - low

    (top, bottom, dy), (left, right, dx) = taps(images.shape[2]), taps(images.shape[3])
    x = images.float()
    x = torch.lerp(x[..., left], x[..., right], dx)                                          # [B, 3, H, size]
    return torch.lerp(x[:, :, top], x[:, :, bottom], dy[:, None])


def resize_pillow(images, size, mode):
    """uint8 [B, 3, H, W] -> float32 [B, 3, size, size]. Emulates Pillow's antialiased resize of uint8 images:
    two passes, the width first, each rounded to integers in [0, 255]."""
    x = images.cpu() if images.device.type == "mps" else images     # antialias on MPS needs PyTorch 2.8
    x = F.interpolate(x.float(), (x.shape[2], size), mode=mode, antialias=True).round().clamp(0, 255)
    x = F.interpolate(x, (size, size), mode=mode, antialias=True).round().clamp(0, 255)
    return x.to(images.device)


class FIDPoolBranch(nn.Module):
    """A block of timm's Inception-v3 with another pool before its last branch (timm's average pool counts the
    zero padding). pool: keeps height and width."""

    def __init__(self, block, pool):
        super().__init__()
        self.pool, self.branch_pool = pool, block.branch_pool
        block.branch_pool = nn.Identity()              # the block's last channels are now its own pool of x
        self.block = block

    def forward(self, x):
        return torch.cat([self.block(x)[:, :-x.shape[1]], self.branch_pool(self.pool(x))], dim=1)


class Inception(nn.Module):
    """The Inception-v3 of FID (TensorFlow graph of 2015-12-05), from timm's blocks. Differences from timm's:
    resize and scaling, 1008 logits, average pools that do not count the padding, a max pool in the last
    block. file: one of the public weights files (WEIGHTS). Raises UserError."""
    name, distance, outputs = "inception", "fid", ("pool", "spatial", "logits")
    channels = 2048

    def __init__(self, file):
        super().__init__()
        net = timm.create_model("inception_v3", num_classes=1008, aux_logits=False)
        net.eval().requires_grad_(False)
        load_into(net, load_tensors(file), file)
        fold_batch_norms(net)
        for name, block in list(net.named_children()):
            pool = nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)
            if name == "Mixed_7c":
                pool = nn.MaxPool2d(3, stride=1, padding=1)
            if hasattr(block, "branch_pool"):
                setattr(net, name, FIDPoolBranch(block, pool))
        self.net = net
        self.sha256 = hashlib.sha256(Path(file).read_bytes()).hexdigest()

    def forward(self, images):
        """-> 'pool' [B, 2048], 'spatial' [B, 2023], 'logits' [B, 1008]."""
        x = (resize_tf1(images, 299) - 128) / 128
        x = x.contiguous(memory_format=memory_format(x.device))
        with full_float32(x.device):
            for name, layer in self.net.named_children():
                if name == "global_pool":
                    break
                x = layer(x)
                if name == "Mixed_6d":                       # ADM's mixed_6/conv is its first branch
                    spatial = x[:, :7].permute(0, 2, 3, 1).flatten(1)
            pool = x.mean((2, 3))
            return dict(pool=pool, spatial=spatial, logits=pool @ self.net.fc.weight.T)    # ADM: no bias


class PooledFeatures(nn.Module):
    """A frozen timm encoder up to its classifier: DINOv2's normalised class token at 224 pixels (as in arXiv
    2306.04675), a convolutional network's pooled last feature map. name: "dinov2" (ViT-L), or as `timm_name`
    takes it; ckpt: a weights file instead of the hub's. Raises UserError."""
    outputs = ("pool",)

    def __init__(self, name, ckpt=""):
        super().__init__()
        encoder = timm_name("dinov2-vit-l" if name == "dinov2" else name)
        grid = 16 if "dinov2" in encoder else None                             # of patches of 14 x 14 pixels
        net, config = create_encoder(encoder, ckpt, grid=grid)
        self.net = net.eval().requires_grad_(False)
        self.size = 14 * grid if grid else config["input_size"][-1]
        self.interpolation = config["interpolation"]                           # "bilinear" or "bicubic"
        for key in ("mean", "std"):
            value = 255 * torch.tensor(config[key]).view(3, 1, 1)
            self.register_buffer(key, value, persistent=False)
        self.name, self.distance, self.sha256 = name, f"fd_{name}", hash_tensors(self).hexdigest()
        self.channels = self(torch.zeros(1, 3, 32, 32))["pool"].shape[1]

    def forward(self, images):
        """-> 'pool' [B, D]."""
        x = (resize_pillow(images, self.size, self.interpolation) - self.mean) / self.std
        x = x.contiguous(memory_format=memory_format(x.device))
        with full_float32(x.device):
            return dict(pool=self.net.forward_head(self.net.forward_features(x), pre_logits=True).float())


INSTEAD = f"give {URL} by --inception-weights FILE, or take --features {LITE2}"


def download_inception(processes):
    """The first process of each machine downloads Inception's weights; the others wait."""
    try:
        if int(os.environ.get("LOCAL_RANK", 0)) == 0:
            torch.hub.load_state_dict_from_url(URL, check_hash=True, weights_only=True)
    except (OSError, RuntimeError) as e:
        raise UserError(f"--download: cannot fetch the weights ({one_line(e)}); {INSTEAD}") from None
    processes.any(False)


def load_features(args):
    """The feature network of the flags; by default Inception if its weights are here, else LITE2."""
    cached = [Path(torch.hub.get_dir()) / "checkpoints" / name for name in WEIGHTS]
    file = args.inception_weights or next(filter(Path.is_file, cached), None)
    if file and args.features in (None, "inception"):
        return Inception(file)
    require(args.features != "inception",
            f"--features inception: no weights here; --download fetches them, or {INSTEAD}")
    return PooledFeatures(args.features or LITE2, args.features_weights or "")


# --- Sources of images --------------------------------------------------------------------------------------
# Each has: path; n, the number of images; shape, their (height, width); is_folder; stats: {} or precomputed
# {"pool": (mu, sigma), "spatial": (mu_s, sigma_s)}; and batches(indices, batch_size, num_workers): yields the
# images of a range of indices in order, uint8 [B, 3, H, W].

class ImageSet:
    """A folder of images (at any depth, sorted), or an .npz with arr_0 uint8 [N, H, W, 3], statistics, or
    both; n is 0 for statistics alone. stats_info: what --save-stats wrote with the statistics (features,
    sha256, n, shape). resolution: ADM's centre crop for the files of a folder. Raises UserError."""

    def __init__(self, path, resolution=None):
        self.path, self.resolution, self.stream = Path(path), resolution, None
        self.is_folder, self.files = not self.path.is_file(), []
        self.n, self.shape, self.stats, self.stats_info = 0, None, {}, {}
        if self.is_folder:
            self.files = list_images(path)
            self.n, self.shape = len(self.files), read_image(self.files[0], resolution).shape[1:]
            return
        try:
            self.open_npz()
        except READ_ERRORS as e:
            raise UserError(f"{path}: not a readable .npz ({one_line(e)}); give a folder or an .npz"
                            f"{how_to_unpack(path, [self.path.suffix.lower()])}") from None

    def open_npz(self):
        with np.load(self.path) as f:                                    # reads only the arrays asked for
            for key, names in STATISTICS.items():
                if all(name in f for name in names):
                    mu, sigma = (torch.from_numpy(f[name]).double() for name in names)
                    finite = mu.sum().isfinite() and sigma.sum().isfinite()
                    require(finite and mu.ndim == 1 and sigma.shape == (len(mu), len(mu)),
                            f"{self.path}: mu {[*mu.shape]}, sigma {[*sigma.shape]}; not finite [D, D]")
                    self.stats[key] = mu, sigma
            if "sha256" in f:
                self.stats_info = {k: f[k].tolist() for k in ("features", "sha256", "n", "shape") if k in f}
                self.shape = tuple(self.stats_info.get("shape", ())) or None
            if "arr_0" in f:
                with f.zip.open("arr_0.npy") as array:
                    np.lib.format.read_magic(array)
                    shape, fortran, dtype = np.lib.format.read_array_header_1_0(array)
                    self.offset = array.tell()
                require(dtype == np.uint8 and not fortran and len(shape) == 4 and shape[3] == 3,
                        f"{self.path}: arr_0 is {dtype} {list(shape)}, expected uint8 [N, H, W, 3]")
                self.n, self.shape = shape[0], shape[1:3]
            elif "pool" not in self.stats:
                raise ValueError("neither arr_0 (images) nor mu and sigma (statistics) in it")

    def __getitem__(self, i):
        """Image i, uint8 [3, H, W]."""
        if self.files:
            image = read_image(self.files[i], self.resolution)
            if image.shape[1:] != self.shape:
                raise UserError(f"{self.files[i]}: {[*image.shape[1:]]} pixels (height, width), not "
                                f"{[*self.shape]} as the first image; --resolution N crops all to N")
            return image
        try:
            if self.stream is None:
                self.stream = zipfile.ZipFile(self.path).open("arr_0.npy")
            size = math.prod(self.shape) * 3
            self.stream.seek(self.offset + i * size)
            pixels = torch.frombuffer(bytearray(self.stream.read(size)), dtype=torch.uint8)
            return pixels.view(*self.shape, 3).permute(2, 0, 1)
        except READ_ERRORS as e:
            raise UserError(f"{self.path}: damaged ({one_line(e)})") from None

    def batches(self, indices, batch_size, num_workers=0):
        batches = [indices[i:i + batch_size] for i in range(0, len(indices), batch_size)]
        workers = min(num_workers, len(batches) if self.files else 1)           # one reads an .npz in order
        return load_batches(self, batches, workers)


class Samples:
    """n samples of a checkpoint, the same as sample.py's. settings: of `sample_images`; labels: "equal" or
    "random"."""
    is_folder = False

    def __init__(self, path, model, n, settings, labels="equal"):
        self.path, self.model, self.n, self.settings, self.labels = path, model, n, settings, labels
        self.stats, self.shape = {}, (model.args["resolution"],) * 2

    def batches(self, indices, batch_size, num_workers=0):
        classes, seed = range(self.model.sit.num_classes), self.settings.get("seed", 0)
        for start in range(0, len(indices), batch_size):
            batch = indices[start:start + batch_size]
            labels = [class_for_sample(i, seed, classes, self.labels, self.n) for i in batch]
            yield sample_images(self.model, batch, labels, **self.settings)


class Reconstructions:
    """The VAE's reconstructions of an ImageSet (from the posterior's mean, rounded to uint8). quality: the
    sums of PSNR and SSIM."""

    def __init__(self, path, model, originals):
        self.path, self.model, self.originals = path, model, originals
        self.n, self.shape, self.is_folder = originals.n, originals.shape, originals.is_folder
        self.stats, self.quality = {}, torch.zeros(2)

    def batches(self, indices, batch_size, num_workers=0):
        first = indices.start
        for images in self.originals.batches(indices, batch_size, num_workers):
            y = reconstruct(self.model.vae, images, batch_size)[1]
            check_finite(y, lambda b: f"{self.path}: the reconstruction of image {first + b}")
            first, y = first + len(y), to_uint8(y)
            x, rounded = to_float(images), to_float(y)
            self.quality += torch.stack([psnr(x, rounded).sum(), ssim(x, rounded).float().sum()])
            yield y


# --- Metrics ------------------------------------------------------------------------------------------------

def frechet_distance(mean1, cov1, mean2, cov2):
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), float64 tensors [D], [D, D] (arXiv 1706.08500, eq. 6).
    With C1 = A A^T, the matrix C1 C2 has the eigenvalues of A^T C2 A, which is symmetric: no matrix square
    root is needed, and C1 may be singular (few images)."""
    values, vectors = torch.linalg.eigh(cov1)
    a = vectors * values.clamp_min(0).sqrt()
    root = torch.linalg.eigvalsh(a.T @ cov2 @ a).clamp_min(0).sqrt().sum()
    return ((mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2 * root).item()


def inception_score(logits, shuffle=False):
    """exp of the mean KL(p(y|x) || p(y)) of logits [N, 1008], averaged over equal splits of about 5000 images
    (arXiv 1606.03498; ADM takes ten splits of 50,000). shuffle: with a fixed seed, for images sorted by
    class."""
    if shuffle:
        logits = logits[torch.randperm(len(logits), generator=torch.Generator().manual_seed(0))]
    scores = []
    for split in logits.double().tensor_split(max(1, round(len(logits) / 5000))):
        log_p = split.log_softmax(1)
        log_mean = log_p.logsumexp(0) - math.log(len(split))
        scores.append((log_p.exp() * (log_p - log_mean)).sum(1).mean().exp().item())
    return sum(scores) / len(scores)


def kid(x, y, subsets=100, size=1000, seed=2020):
    """Kernel distance of features [N, D], [M, D] with kernel (x.y / D + 1)^3: the unbiased estimate, averaged
    over random subsets (arXiv 1801.01401), the same subsets as torch-fidelity's. In float64, because the sums
    below nearly cancel for features that lie close together."""
    x, y = x.double(), y.double()
    size, rng, values = min(size, len(x), len(y)), np.random.RandomState(seed), []
    for _ in range(subsets):
        a = x[rng.choice(len(x), size, replace=False)]
        b = y[rng.choice(len(y), size, replace=False)]
        aa, bb, ab = ((f @ g.T / x.shape[1] + 1) ** 3 for f, g in ((a, a), (b, b), (a, b)))
        within = aa.sum() - aa.trace() + bb.sum() - bb.trace()
        values.append(within / (size * (size - 1)) - 2 * ab.mean())
    return torch.stack(values).mean().item()


def precision_recall(reference, samples, k=3, block=1000):
    """Fraction of the samples within the reference's manifold, and the reverse (arXiv 1904.06991). A manifold
    is the union of balls around features [N, D], whose radius is the distance to the k-th nearest neighbour.
    In float64: in float32 `cdist` loses the distances of features that lie close together."""
    reference, samples = reference.double(), samples.double()

    def fraction_within(x, manifold):
        nearest = [torch.cdist(rows, manifold).topk(k + 1, largest=False) for rows in manifold.split(block)]
        radius = torch.cat([found.values[:, k] for found in nearest])        # the nearest of all is itself
        within = [(torch.cdist(rows, manifold) <= radius).any(1) for rows in x.split(block)]
        return torch.cat(within).double().mean().item()

    return fraction_within(samples, reference), fraction_within(reference, samples)


@torch.no_grad()
def collect(source, net, needs, device, batch_size, num_workers=0, processes=Processes()):
    """One pass over a source's images, a contiguous shard per process. needs, a set: 'pool' and 'spatial'
    give (mean, covariance) of these outputs of `net`, or the source's own statistics if it has them;
    'features' gives the pooled features [N, D], 'logits' [N, 1008]. Process 0 gets {need: value}, the others
    {}. Raises UserError for features that are not finite."""
    needs = needs - source.stats.keys()
    if not needs:
        return source.stats
    rank, world, n = processes.rank, processes.world, source.n
    shard = range(rank * n // world, (rank + 1) * n // world)
    widths = dict(pool=net.channels, spatial=SPATIAL)
    moments = {need: torch.zeros(1 + widths[need], widths[need], dtype=torch.float64)
               for need in needs & widths.keys()}        # row 0: the sum; below: the sum of outer products
    rows = {need: [] for need in needs - widths.keys()}
    with tqdm(total=len(shard), unit="img", desc=source.path.name, disable=rank > 0) as bar:
        for images in source.batches(shard, batch_size, num_workers):
            for x in images.split(8 if device.type == "cpu" else batch_size):   # the last digits depend on it
                outputs = {key: value.cpu() for key, value in net(x.to(device)).items()}
                outputs["features"] = outputs["pool"]
                require(outputs["pool"].isfinite().all(),
                        f"{source.path}: features not finite; damaged weights of {net.name}?")
                for need in moments:
                    f = outputs[need].double()
                    moments[need][0] += f.sum(0)
                    moments[need][1:].addmm_(f.T, f)
                for need in rows:
                    rows[need].append(outputs[need])
            bar.update(len(images))
    shards = [(moments, rows)]
    if world > 1:
        shards = [None] * world if rank == 0 else None
        dist.gather_object((moments, rows), shards, group=processes.host)
        if rank > 0:
            return {}
    values = {need: torch.cat([batch for _, rows in shards for batch in rows[need]]) for need in rows}
    for need in moments:
        total = sum(moments[need] for moments, _ in shards)
        mean, products = total[0] / n, total[1:]
        values[need] = mean, (products - n * torch.outer(mean, mean)) / (n - 1)
    return source.stats | values


def evaluate(ref, samples, net, metrics, device, save_stats="", processes=Processes(), **settings):
    """{name: value} of the metrics (names of METRICS) of samples against a reference on process 0, {} on the
    others. save_stats: a file for the reference's statistics; samples may then be None. settings: of
    `collect`."""
    needs = {METRICS[metric] for metric in metrics}
    saved = STATISTICS.keys() & net.outputs if save_stats else set()
    r = collect(ref, net, needs - {"logits"} | saved, device, processes=processes, **settings)
    s = collect(samples, net, needs, device, processes=processes, **settings) if samples else {}
    if processes.rank > 0:
        return {}
    if save_stats:
        arrays = {name: array for need in saved for name, array in zip(STATISTICS[need], r[need])}
        save_npz(save_stats, features=net.name, sha256=net.sha256, n=ref.n, shape=ref.shape, **arrays)
    out = {}
    if "fid" in metrics:
        out[net.distance] = frechet_distance(*r["pool"], *s["pool"])
    if "sfid" in metrics:
        out["sfid"] = frechet_distance(*r["spatial"], *s["spatial"])
    if "is" in metrics:
        out["is"] = inception_score(s["logits"], shuffle=samples.is_folder)
    if "features" in needs:
        place = "cpu" if device.type == "mps" else device                             # MPS has no float64
        features = r["features"].to(place), s["features"].to(place)
    if "kid" in metrics:
        out["kid"] = kid(*features)
    if "precision" in metrics or "recall" in metrics:
        out["precision"], out["recall"] = precision_recall(*features)
    return out


# --- The command --------------------------------------------------------------------------------------------

def parse_args(argv=None):
    """Flags, checked. metrics: a list, empty for all available; from_checkpoint: whether a checkpoint makes
    the images to evaluate."""
    parser = Parser(description="FID, sFID, Inception Score, KID, precision and recall.")
    add = parser.add_argument
    add("ref", nargs="?", metavar="REF", type=existing_path, help="a folder, an .npz, --save-stats' file")
    add("samples", nargs="?", metavar="SAMPLES", type=existing_path, help="images to evaluate, as for REF")
    add("--features", help=f"inception (default if its weights are here), dinov2, {LITE2} or a timm model")
    add("--metrics", help=f"some of {','.join(METRICS)} (default: all available); is: over splits of about "
        "5,000 images, an .npz in its order, a folder shuffled")
    add("--inception-weights", metavar="FILE", type=existing_path, help=" or ".join(WEIGHTS))
    add("--download", action="store_true", help="download the Inception weights once (95 MB)")
    add("--features-weights", metavar="FILE", type=existing_path, help="of a timm model, not the hub's")
    add("--resolution", type=positive_int, help="centre-crop the images of folders to this size, as ADM does")
    add("--save-stats", metavar="FILE", type=path_name,
        help="write REF's statistics to an .npz; SAMPLES is optional then")
    add("--json", metavar="FILE", type=path_name, help="write the results to this file")
    add("--batch-size", type=positive_int, default=64, help="per process")
    add("--num-workers", type=count, default=min(8, os.cpu_count()), help="processes that read images")
    add("--device", default="auto")
    add("--ckpt", metavar="FILE", type=existing_path,
        help="evaluate this checkpoint (without REF: the newest under exps/)")
    add("--vae-ckpt", type=path_name, help="the VAE, if the checkpoint has none: file, folder or hub id")
    add("--data-dir", metavar="DIR", type=existing_path,
        help="the checkpoint's reference images (default: its training data)")
    add("--num-samples", type=positive_int, help="default: as many as reference images, 50,000 at most")
    add("--reconstruct", action="store_true", help="evaluate the checkpoint's VAE: rFID, PSNR, SSIM")
    add_sampler_flags(parser)
    args = parser.parse_args(argv)
    args.sampler = sampler_settings(args)
    args.metrics = args.metrics.split(",") if args.metrics else []
    unknown = ",".join(set(args.metrics) - set(METRICS))
    require(not unknown, f"--metrics {unknown}: unknown; take some of {','.join(METRICS)}")
    require(not (args.json and os.path.isdir(args.json)), f"--json {args.json}: a folder; name a file")
    require(not args.features_weights or args.features not in (None, "inception", *EMBEDDED),
            "--features-weights goes with --features and a timm model's name")
    require(args.features in (None, "inception") or not (args.inception_weights or args.download),
            f"--inception-weights and --download go with --features inception, not {args.features}")
    args.from_checkpoint = bool(args.ckpt or not args.ref)
    require(args.from_checkpoint or args.samples or args.save_stats,
            "SAMPLES is missing: fid.py REF SAMPLES, or REF --ckpt FILE to generate them")
    require(args.from_checkpoint or not (args.num_samples or args.reconstruct),
            "--num-samples and --reconstruct go with --ckpt FILE, or without REF")
    require(not (args.from_checkpoint and (args.samples or args.resolution)),
            "a checkpoint generates the images to evaluate, at its resolution; drop SAMPLES and --resolution")
    require(not (args.ref and args.data_dir), "REF and --data-dir mean the same; give one of them")
    require(not (args.reconstruct and args.num_samples),
            "--reconstruct takes every image; drop --num-samples")
    inputs = args.ref, args.samples, args.ckpt, args.vae_ckpt, args.inception_weights, args.features_weights
    files = [path for path in inputs if path and not os.path.isdir(path)]
    for out in filter(None, (args.save_stats, args.json)):
        check_output(out, files)
    return args


def open_sources(args, device):
    """(reference, samples) of the flags; samples are None for --save-stats alone."""
    if not args.from_checkpoint:
        return ImageSet(args.ref, args.resolution), args.samples and ImageSet(args.samples, args.resolution)
    ckpt = Path(args.ckpt or newest_checkpoint())
    model = load_checkpoint(ckpt, device, args.vae_ckpt, args.compile, args.ema)
    size, data = model.args["resolution"], args.ref or args.data_dir or model.args.get("data_dir")
    require(data and Path(data).exists(),
            f"{data or ckpt}: no such folder; give the reference images by --data-dir DIR")
    ref = ImageSet(data, size)
    if args.reconstruct:
        require(ref.n > 0 and ref.shape == (size, size),
                f"{data}: --reconstruct needs images, of {size}x{size} pixels")
        return ref, Reconstructions(ckpt, model, ref)
    require(model.sit, f"{ckpt}: trained with --vae-only, it has no SiT to sample from; see --reconstruct")
    n = args.num_samples or min(count_images(ref) or 50_000, 50_000)
    return ref, Samples(ckpt, model, n, args.sampler, args.label_sampling)


def count_images(source):
    """The number of images, or of those behind a file's statistics (0: unknown)."""
    return source.n or source.stats_info.get("n", 0)


def check_source(source, net):
    """Raises UserError for fewer than four images and for statistics of another network; beside images such
    statistics are dropped."""
    if source.stats:
        width = len(source.stats["pool"][0])
        name = source.stats_info.get("features", "inception" if width == 2048 else net.name)
        sha256 = source.stats_info.get("sha256", net.sha256)
        if (name, sha256, width) != (net.name, net.sha256, net.channels):
            require(source.n > 0, f"{source.path}: statistics of {name}'s {width} features ({sha256[:8]}), "
                    f"not of {net.name}'s {net.channels} ({net.sha256[:8]}); see --features")
            source.stats = {}
    require(source.n >= 4 or source.stats,
            f"{source.path}: {source.n} image(s); a distribution needs at least four")


def find_warnings(sources, net):
    """Lines about what could be misread."""
    lines, shapes = [], {tuple(source.shape) for source in sources if source.shape}
    for source in sources:
        n = count_images(source)
        if source.stats and not source.stats_info and "spatial" not in source.stats:        # ADM's have it
            origin = "ADM's (TensorFlow's resize)" if net.name == "inception" else f"{net.name}'s"
            lines.append(f"{source.path}: statistics of unknown origin, assumed to be {origin}; those of "
                         "tools with another resize, such as pytorch-fid, are not comparable")
        if 0 < n <= net.channels:
            lines.append(f"warning: {source.path}: {n} images are too few for {net.channels} features; "
                         "compare such a distance only with others of as many images")
    if len(shapes) > 1:
        lines.append(f"warning: reference and samples differ in size (height, width): {sorted(shapes)}")
    ref, samples = sources[0].path.resolve(), sources[-1].path.resolve()
    if len(sources) == 2 and (ref.is_relative_to(samples) or samples.is_relative_to(ref)):
        lines.append("warning: reference and samples are the same, or one is part of the other")
    return lines


def choose_metrics(asked, ref, samples, net):
    """The names in `asked`; if empty, all that the sources and the network allow, without those that compare
    all pairs of more than 100,000 images. Raises UserError for one that is not available."""
    def has(source, need):
        return need in (*net.outputs, "features") if source.n >= 4 else need in source.stats

    available = [metric for metric, need in METRICS.items()
                 if has(samples, need) and (metric == "is" or has(ref, need))]
    missing = ",".join(set(asked) - set(available))
    require(not missing, f"--metrics {missing}: not available: sfid and is are defined on Inception's "
            "features; statistics without images give only fid and sfid")
    if max(ref.n, samples.n) > 100_000:
        available = [metric for metric in available if METRICS[metric] != "features"]
    return asked or available


def main():
    args, start = parse_args(), time.time()
    device = pick_device(args.device)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True      # as sample.py samples
    processes = start_processes(device)
    args.compile = args.compile and can_compile(device, processes)
    if args.download:
        download_inception(processes)
    if args.from_checkpoint and not args.reconstruct:
        args.sampler["mixed_precision"] = choose_precision(args.mixed_precision, device, processes)
    ref, samples = open_sources(args, device)
    net, sources = load_features(args), [ref, samples] if samples else [ref]
    for source in sources:
        check_source(source, net)
    lines = find_warnings(sources, net)
    if args.ema and isinstance(samples, Samples):
        lines.append(warn_of_short_average(samples.model))
    if args.features is None and net.name == LITE2:
        lines.append(f"features: {LITE2}; Inception's weights are not here (see --download)")
    asked = args.metrics or (["fid"] if args.reconstruct else [])
    metrics = choose_metrics(asked, ref, samples, net) if samples else []
    require(not args.save_stats or ref.n >= 4,
            f"--save-stats: {ref.path} holds statistics already, and {ref.n} images")
    here = [net.sha256, *((source.n, source.shape) for source in sources)]
    first = processes.from_first(here)
    if processes.any(here != first):                                  # each machine reads its own files
        raise UserError(f"the machines hold different images or weights: {here}, on process 0 {first}")
    for line in filter(None, lines):
        processes.say(line)
    net.to(device, memory_format=memory_format(device))
    results = evaluate(ref, samples, net, metrics, device, args.save_stats, processes,
                       batch_size=args.batch_size, num_workers=args.num_workers)
    if args.reconstruct:
        if processes.world > 1:
            dist.all_reduce(samples.quality, group=processes.host)
        results["psnr"], results["ssim"] = (samples.quality / samples.n).tolist()
    if processes.rank == 0:
        names = [f"{source.path} ({source.n or 'statistics'})" for source in reversed(sources)]
        print(f"{net.name} {net.sha256[:8]}: " + " against ".join(names))
        for name, value in results.items():
            label = f"r{name}" if args.reconstruct and name == net.distance else name
            print(f"  {label:<28}{value:.6g}")
    if processes.rank == 0 and args.json:
        n_samples = count_images(samples) if samples else 0
        record = results | dict(n_reference=count_images(ref), n_samples=n_samples,
                                features=net.name, weights_sha256=net.sha256,
                                resolution=list(sources[-1].shape or ()),
                                seconds=round(time.time() - start, 2))
        write_atomic(args.json, lambda tmp: tmp.write_text(json.dumps(record, indent=1) + "\n"))
    end_processes(processes)


if __name__ == "__main__":
    run_command(main)
