"""fid.py: how good the pictures are. FID, sFID, Inception Score, KID, precision and recall in one pass.

    python fid.py                                            the newest run under exps/ against its own data
    python fid.py REF SAMPLES                                each a folder of images or an ADM .npz
    python fid.py REF --ckpt X.pt --num-samples 50000        draw the samples, evaluate them in memory
    python fid.py --ckpt X.pt --data-dir DIR --reconstruct   the VAE alone: rFID, PSNR, SSIM
    torchrun --nproc_per_node=8 fid.py ...                   the same numbers, the work split

FID, sFID, IS, precision and recall are those of the ADM evaluator (guided-diffusion), without its TensorFlow;
KID is arXiv 1801.01401's. Over other features (--features dinov2) the Frechet distance is called fd_NAME.
"""
import hashlib
import json
import math
import os
import time
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import timm
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import DataLoader
from tqdm import tqdm

from data.images import how_to_unpack, list_images, read_image, several_frames
from repa import EMBEDDED, LITE2, FrozenEncoder, fold_batch_norms
from sample import (add_sampler_flags, check_finite, label_of, load_checkpoint, sample_images,
                    sampler_settings, warn_of_short_average)
from support.checkpoints import newest_checkpoint
from support.commands import (Parser, UserError, check_output, count, existing_path, one_line, path_name,
                              positive_int, run_command)
from support.devices import (choose_precision, end_processes, full_float32, memory_format, pick_device,
                             start_processes)
from support.files import READ_ERRORS, hash_tensors, load_into, load_tensors, save_npz, write_atomic
from support.pictures import to_float, to_uint8
from vae import psnr, ssim

SPATIAL = 17 * 17 * 7                                  # sFID's features: 7 channels of a 17 x 17 map
METRICS = {"fid": "pool", "sfid": "spatial", "is": "logits",           # and what each is computed from,
           "kid": "rows", "precision": "rows", "recall": "rows"}        # see `collect`
WEIGHTS = ("pt_inception-2015-12-05-6726825d.pth", "weights-inception-2015-12-05-6726825d.pth")
URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{WEIGHTS[0]}"


# --- Networks: FrozenEncoder's pooled features, or the Inception-v3 of FID ----------------------------------

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


class Pooled(nn.Module):
    """A block of timm's Inception-v3 with another pool before its last branch: its own pads with zeros and
    counts them. pool: keeps height and width."""

    def __init__(self, block, pool):
        super().__init__()
        self.pool, self.branch_pool = pool, block.branch_pool
        block.branch_pool = nn.Identity()                # so the block's last channels are its own pool of x
        self.block = block

    def forward(self, x):
        return torch.cat([self.block(x)[:, :-x.shape[1]], self.branch_pool(self.pool(x))], dim=1)


class Inception(nn.Module):
    """The Inception-v3 of FID (TensorFlow's graph of 2015-12-05) out of timm's blocks. It differs from timm's
    in its resize and scaling, its 1008 logits, average pools that leave the padding out, and a max pool in
    the last block. file: either public weights file (WEIGHTS). Raises UserError."""
    name, channels, size = "inception", 2048, 299

    def __init__(self, file):
        super().__init__()
        with torch.device("meta"):
            net = timm.create_model("inception_v3", num_classes=1008, aux_logits=False)
        net = net.to_empty(device="cpu").eval().requires_grad_(False)
        load_into(net, load_tensors(file), file)
        fold_batch_norms(net)
        for name, block in list(net.named_children()):
            if name == "Mixed_7c":
                setattr(net, name, Pooled(block, nn.MaxPool2d(3, stride=1, padding=1)))
            elif hasattr(block, "branch_pool"):
                setattr(net, name, Pooled(block, nn.AvgPool2d(3, 1, padding=1, count_include_pad=False)))
        self.net = net
        self.sha256 = hashlib.sha256(Path(file).read_bytes()).hexdigest()

    def forward(self, images):
        """uint8 [B, 3, H, W] -> {'pool' [B, 2048], 'spatial' [B, 2023], 'logits' [B, 1008]}, in full float32
        whatever the switches are."""
        x = (resize_tf1(images, self.size) - 128) / 128
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


def load_features(args):
    """The network the flags name; by default Inception if its weights are here, else the embedded one."""
    instead = f"give {URL} by --inception-weights FILE; --features {LITE2} works meanwhile"
    if args.download:
        try:
            if int(os.environ.get("LOCAL_RANK", 0)) == 0:
                torch.hub.load_state_dict_from_url(URL, check_hash=True, weights_only=True)
            if dist.is_initialized():
                dist.barrier()
        except (OSError, RuntimeError) as e:
            raise UserError(f"--download: cannot fetch them ({one_line(e)}); {instead}") from None
    cached = [Path(torch.hub.get_dir()) / "checkpoints" / name for name in WEIGHTS]
    file = args.inception_weights or next(filter(Path.is_file, cached), None)
    if file and args.features in (None, "inception"):
        return Inception(file)
    if args.features == "inception":
        raise UserError(f"--features inception: no weights here; --download fetches them, or {instead}")
    name = args.features or LITE2
    net = FrozenEncoder("dinov2-vit-l" if name == "dinov2" else name, ckpt=args.features_weights)
    net.name, net.sha256 = name, hash_tensors(net).hexdigest()                       # the hub gives no file
    return net


# --- Pictures: n, shape (H, W), batches(indices, ...) -> uint8 [B, 3, H, W]; given: their statistics -------

class ImageSet:
    """REF or SAMPLES: a folder of images (any nesting, sorted) or an .npz with arr_0 uint8 [N, H, W, 3],
    statistics or both: given = {"pool": (mu, sigma), "spatial": (mu_s, sigma_s)}; marks: what --save-stats
    wrote beside them. resolution: ADM's centre crop for the files of a folder. Raises UserError."""

    def __init__(self, path, resolution=None):
        self.path, self.resolution, self.others = Path(path), resolution, Counter()
        self.is_folder = not self.path.is_file()
        self.files, self.n, self.shape, self.stream, self.given, self.marks = [], 0, None, None, {}, {}
        if self.is_folder:
            self.files = list_images(path, others=self.others)
            self.n, self.shape = len(self.files), read_image(self.files[0], resolution).shape[1:]
        elif self.path.suffix.lower() == ".npz":
            try:
                self.open_npz()
            except READ_ERRORS as e:
                raise UserError(f"{path}: not a readable .npz ({one_line(e)})") from None
        else:
            kind = self.path.suffix.lower()
            raise UserError(f"{path}: a file of type {kind or '?'}; give a folder or an .npz"
                            f"{how_to_unpack(path, [kind])}")

    def open_npz(self):
        with np.load(self.path) as f:                         # reads what is asked for, no array of others
            has_images = "arr_0" in f
            for key, mu, sigma in (("pool", "mu", "sigma"), ("spatial", "mu_s", "sigma_s")):
                if mu in f and sigma in f:
                    self.given[key] = torch.from_numpy(f[mu]).double(), torch.from_numpy(f[sigma]).double()
            if "sha256" in f:
                self.marks = {k: f[k].tolist() for k in ("features", "sha256", "n", "shape") if k in f}
                self.shape = tuple(self.marks.get("shape", ())) or None
        for mu, sigma in self.given.values():
            if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)) or not (mu.sum() + sigma.sum()).isfinite():
                raise UserError(f"{self.path}: mu {[*mu.shape]}, sigma {[*sigma.shape]}; not finite [D, D]")
        if has_images:
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
        """Images uint8 [B, 3, H, W], or a UserError: raised in a loader's process it becomes a traceback."""
        try:
            if self.files:
                images = [read_image(self.files[i], self.resolution) for i in indices]
                for i, image in zip(indices, images):
                    if image.shape[1:] != self.shape:
                        return UserError(f"{self.files[i]}: {[*image.shape[1:]]} pixels (height, width), not "
                                         f"{[*self.shape]} as {self.files[0]}; --resolution N crops all to N")
                return torch.stack(images)
            if self.stream is None:
                self.stream = zipfile.ZipFile(self.path).open("arr_0.npy")
            size = math.prod(self.shape) * 3
            self.stream.seek(self.offset + indices[0] * size)                       # it reads on from there
            pixels = torch.frombuffer(bytearray(self.stream.read(len(indices) * size)), dtype=torch.uint8)
            return pixels.view(len(indices), *self.shape, 3).permute(0, 3, 1, 2)
        except (UserError, *READ_ERRORS) as e:
            return e if isinstance(e, UserError) else UserError(f"{self.path}: damaged ({one_line(e)})")

    def batches(self, indices, batch_size, num_workers=0):
        """The images `indices` (a range), in order, decoded in processes (an .npz in one, which reads on)."""
        parts = [indices[i:i + batch_size] for i in range(0, len(indices), batch_size)]
        workers = min(num_workers, len(parts) if self.files else 1)
        for images in DataLoader(self, batch_size=None, sampler=parts, num_workers=workers):
            if isinstance(images, UserError):
                raise images
            yield images


class Samples:
    """n samples of a checkpoint, those of sample.py. labels: "equal" or "random"; settings: of
    `sample_images`."""
    is_folder = False

    def __init__(self, path, model, n, settings, labels="equal"):
        self.path, self.model, self.n, self.settings, self.labels = path, model, n, settings, labels
        self.given, self.shape = {}, (model.args["resolution"],) * 2

    def batches(self, indices, batch_size, num_workers=0):
        classes, seed = range(self.model.sit.num_classes), self.settings.get("seed", 0)
        for start in range(0, len(indices), batch_size):
            part = indices[start:start + batch_size]
            labels = [label_of(i, seed, classes, self.labels, self.n) for i in part]
            yield sample_images(self.model, part, labels, **self.settings)


class Reconstructions:
    """What the VAE makes of images (the posterior's mode, as uint8). quality: the sums of PSNR and SSIM."""

    def __init__(self, path, model, originals):
        self.path, self.model, self.originals, self.n = path, model, originals, originals.n
        self.given, self.shape, self.quality = {}, originals.shape, torch.zeros(2)
        self.is_folder = originals.is_folder

    def batches(self, indices, batch_size, num_workers=0):
        done = indices.start
        for images in self.originals.batches(indices, batch_size, num_workers):
            x = to_float(images)
            y = self.model.vae.decode(self.model.vae.encode(x.to(self.model.device)).mean)
            check_finite(y, lambda b: f"{self.path}: the reconstruction of image {done + b}")
            done, y = done + len(y), to_uint8(y).cpu()
            scores = torch.stack([psnr(x, to_float(y)), ssim(x, to_float(y)).float()])               # [2, B]
            self.quality += scores.sum(1)
            yield y


# --- Metrics ------------------------------------------------------------------------------------------------

def mean_and_covariance(sums):
    """Mean [D] and covariance [D, D] (N - 1) of N rows, from the sum [1 + D, 1 + D] of their outer products,
    each row with a one before it: so it holds N, the sum of the rows and the sum of their products."""
    n, mean = sums[0, 0], sums[0, 1:] / sums[0, 0]
    return mean, (sums[1:, 1:] - n * torch.outer(mean, mean)) / (n - 1)


def frechet_distance(mean1, cov1, mean2, cov2):
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), float64 tensors [D], [D, D] (arXiv 1706.08500, eq. 6).
    C1 C2 has the eigenvalues of A^T C2 A where C1 = A A^T, which is symmetric: no matrix square root is
    taken, and C1 may be singular (few images)."""
    values, vectors = torch.linalg.eigh(cov1)
    a = vectors * values.clamp_min(0).sqrt()
    root = torch.linalg.eigvalsh(a.T @ cov2 @ a).clamp_min(0).sqrt().sum()
    return ((mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2 * root).item()


def inception_score(logits, shuffle=False):
    """exp of the mean KL(p(y|x) || p(y)) of logits [N, 1008], averaged over equal splits of about 5000 images
    (arXiv 1606.03498; ADM's ten of 50,000). shuffle: by a fixed seed, for images that are sorted by class."""
    scores = []
    if shuffle:
        logits = logits[torch.randperm(len(logits), generator=torch.Generator().manual_seed(0))]
    for part in logits.double().tensor_split(max(1, round(len(logits) / 5000))):
        log_p = part.log_softmax(1)
        log_mean = log_p.logsumexp(0) - math.log(len(part))
        scores.append((log_p.exp() * (log_p - log_mean)).sum(1).mean().exp().item())
    return sum(scores) / len(scores)


def to_float64(x):
    """On the CPU where its device has no float64."""
    return (x.cpu() if x.device.type == "mps" else x).double()


def kid(x, y, subsets=100, size=1000, seed=2020):
    """Kernel distance of features [N, D], [M, D] with kernel (x.y / D + 1)^3: the unbiased estimate averaged
    over random subsets (arXiv 1801.01401), which are those that torch-fidelity draws. In float64: where
    features lie close together, the sums below nearly cancel."""
    x, y = to_float64(x), to_float64(y)
    size, rng, values = min(size, len(x), len(y)), np.random.RandomState(seed), []
    for _ in range(subsets):
        a = x[rng.choice(len(x), size, replace=False)]
        b = y[rng.choice(len(y), size, replace=False)]
        aa, bb, ab = ((f @ g.T / x.shape[1] + 1) ** 3 for f, g in ((a, a), (b, b), (a, b)))
        within = aa.sum() - aa.trace() + bb.sum() - bb.trace()
        values.append(within / (size * (size - 1)) - 2 * ab.mean())
    return torch.stack(values).mean().item()


def precision_recall(reference, samples, k=3, block=1000):
    """Share of the samples within the reference's manifold, and the reverse (arXiv 1904.06991). A manifold is
    the union of balls around its features [N, D], each as wide as the k-th nearest neighbour is far. In
    float64: in float32 `cdist` loses the distances of features that lie close together."""
    reference, samples = to_float64(reference), to_float64(samples)

    def share_within(x, manifold):                       # each row's nearest is itself: k + 1 of them
        radius = [torch.cdist(rows, manifold).topk(k + 1, largest=False) for rows in manifold.split(block)]
        radius = torch.cat([nearest.values[:, k] for nearest in radius])
        within = [(torch.cdist(rows, manifold) <= radius).any(1) for rows in x.split(block)]
        return torch.cat(within).double().mean().item()

    return share_within(samples, reference), share_within(reference, samples)


@torch.no_grad()
def collect(source, net, needs, *, device, batch_size, num_workers=0, rank=0, world=1, group=None, desc=""):
    """One pass over a source, every process over a run of neighbouring images. needs, a set: 'pool' and
    'spatial' (-> mean and covariance, those of the file where it has them), 'rows' (pooled features [N, D]),
    'logits' ([N, 1008]). Process 0 gets {need: value}, the others {}; group: by which they send it, the
    processes' host group for long passes. Raises UserError."""
    needs = needs - source.given.keys()
    mine = range(rank * source.n // world, (rank + 1) * source.n // world) if needs else range(0)
    widths = {"pool": net.channels, "spatial": SPATIAL}
    sums = {key: torch.zeros(1 + n, 1 + n, dtype=torch.float64) for key, n in widths.items() if key in needs}
    rows = {key: [] for key in needs & {"rows", "logits"}}
    with tqdm(total=len(mine), unit="img", desc=desc, disable=rank > 0 or not needs) as bar:
        for images in source.batches(mine, batch_size, num_workers):
            for part in images.split(8 if device.type == "cpu" else len(images)):    # 8 stay in a CPU's cache
                part = part.to(device)
                f = net(part) if net.name == "inception" else dict(pool=net.pooled(part))
                f = {key: value.cpu() for key, value in f.items()}
                if not f["pool"].isfinite().all():
                    raise UserError(f"{source.path}: features not finite; damaged weights of {net.name}?")
                for key in sums:
                    x = F.pad(f[key].double(), (1, 0), value=1)
                    sums[key].addmm_(x.T, x)
                for key in rows:
                    rows[key].append(f["pool" if key == "rows" else key])
            bar.update(len(images))
    parts = [(sums, rows)]
    if world > 1:
        parts = [None] * world if rank == 0 else None
        dist.gather_object((sums, rows), parts, group=group)
        if rank > 0:
            return {}
    found = {key: torch.cat([batch for _, part in parts for batch in part[key]]) for key in rows}
    found |= {key: mean_and_covariance(sum(part[key] for part, _ in parts)) for key in sums}
    return source.given | found


def evaluate(sources, net, metrics, save_stats=None, *, rank=0, **settings):
    """The metrics (of METRICS) of samples against a reference, sources = [reference, samples], one pass over
    each: {name: value} on process 0, {} elsewhere. save_stats: also write the reference's statistics there;
    [reference] alone will do for that. settings: of `collect`."""
    ref, samples, device = sources[0], sources[-1], settings["device"]
    needs = {METRICS[metric] for metric in metrics}
    saved = ({"pool", "spatial"} if net.name == "inception" else {"pool"}) if save_stats else set()
    r = collect(ref, net, needs - {"logits"} | saved, rank=rank, desc="reference", **settings)
    s = collect(samples, net, needs, rank=rank, desc="samples", **settings)
    if rank > 0:
        return {}
    if save_stats:
        arrays = dict(zip(("mu", "sigma", "mu_s", "sigma_s"), r["pool"] + r.get("spatial", ())))
        save_npz(save_stats, features=net.name, sha256=net.sha256, n=ref.n, shape=ref.shape, **arrays)
    out = {}
    if "fid" in metrics:
        out["fid" if net.name == "inception" else f"fd_{net.name}"] = frechet_distance(*r["pool"], *s["pool"])
    if "sfid" in metrics:
        out["sfid"] = frechet_distance(*r["spatial"], *s["spatial"])
    if "is" in metrics:
        out["is"] = inception_score(s["logits"], shuffle=samples.is_folder)
    if "kid" in metrics:
        out["kid"] = kid(r["rows"].to(device), s["rows"].to(device))
    if "precision" in metrics or "recall" in metrics:
        out["precision"], out["recall"] = precision_recall(r["rows"].to(device), s["rows"].to(device))
    return out


# --- The command --------------------------------------------------------------------------------------------

def parse_args(argv=None):
    """Flags, checked. `metrics` becomes a list, or stays None: all that can be had."""
    parser = Parser(description="FID, sFID, Inception Score, KID, precision and recall.")
    add = parser.add_argument
    add("ref", nargs="?", metavar="REF", type=existing_path, help="a folder, an .npz, --save-stats' file")
    add("samples", nargs="?", metavar="SAMPLES", type=existing_path, help="images to judge; in these forms")
    add("--features", help=f"inception (default if its weights are here), dinov2, {LITE2} or a timm model")
    add("--metrics", help=f"some of {','.join(METRICS)} (default: all that can be had); is: over splits of "
        "about 5,000 images, an .npz in its order, a folder shuffled")
    add("--inception-weights", metavar="FILE", type=existing_path, help=" or ".join(WEIGHTS))
    add("--download", action="store_true", help="fetch the Inception weights once (95 MB)")
    add("--features-weights", metavar="FILE", type=existing_path, help="of a timm model, not the hub's")
    add("--resolution", type=positive_int, help="centre-crop the images of folders to this size, as ADM does")
    add("--save-stats", metavar="FILE", type=path_name,
        help="write REF's statistics to an .npz; SAMPLES may be left out")
    add("--json", metavar="FILE", type=path_name, help="write the numbers there")
    add("--batch-size", type=positive_int, default=64, help="per process")
    add("--num-workers", type=count, default=min(8, os.cpu_count()), help="decoding processes")
    add("--device", default="auto")
    add("--ckpt", metavar="FILE", type=existing_path, help="judge this (without REF: the newest under exps/)")
    add("--vae-ckpt", type=path_name,
        help="the VAE, where the checkpoint has none: file, folder or hub id")
    add("--data-dir", metavar="DIR", type=existing_path, help="its reference images (default: the run's own)")
    add("--num-samples", type=positive_int, help="default: as many as reference images, 50,000 at most")
    add("--reconstruct", action="store_true", help="judge the checkpoint's VAE: rFID, PSNR, SSIM")
    add_sampler_flags(parser)
    args = parser.parse_args(argv)
    args.sampler = sampler_settings(args)
    args.metrics = args.metrics and args.metrics.split(",")
    unknown = set(args.metrics or ()) - METRICS.keys()
    for wrong, line in (
            (unknown, f"--metrics {','.join(unknown)}: unknown; take some of {','.join(METRICS)}"),
            (args.features_weights and args.features in (None, "inception", *EMBEDDED),
             "--features-weights goes with --features and a timm model's name"),
            ((args.inception_weights or args.download) and args.features not in (None, "inception"),
             f"--inception-weights and --download go with --features inception, not {args.features}"),
            (args.save_stats and not args.save_stats.endswith(".npz"), "--save-stats: FILE must end in .npz"),
            (args.json and os.path.isdir(args.json), f"--json {args.json}: a folder; name a file"),
            (args.ref and args.data_dir, "REF and --data-dir mean the same; give one of them"),
            (args.samples and (args.ckpt or args.num_samples or args.reconstruct),
             "--ckpt, --num-samples and --reconstruct make the images to judge; SAMPLES names others"),
            (args.ref and not args.ckpt and (args.num_samples or args.reconstruct),
             "--num-samples and --reconstruct go with --ckpt FILE, or without REF"),
            (args.ref and not (args.samples or args.ckpt or args.save_stats),
             "SAMPLES is missing: fid.py REF SAMPLES, or REF --ckpt FILE to draw them"),
            (args.reconstruct and args.num_samples, "--reconstruct takes every image; drop --num-samples"),
            (args.resolution and (args.ckpt or not args.ref), "--resolution: a checkpoint brings its own")):
        if wrong:
            raise UserError(line)
    inputs = args.ref, args.samples, args.ckpt, args.vae_ckpt, args.inception_weights, args.features_weights
    for out in filter(None, (args.save_stats, args.json)):
        check_output(out, [path for path in inputs if path and not os.path.isdir(path)])
    return args


def open_sources(args, device):
    """[REF, SAMPLES], or [REF] for its statistics alone, as the flags say."""
    if args.ref and not args.ckpt:
        return [ImageSet(path, args.resolution) for path in (args.ref, args.samples) if path]
    ckpt = Path(args.ckpt) if args.ckpt else newest_checkpoint()
    model = load_checkpoint(ckpt, device, args.vae_ckpt, args.compile, args.ema)
    size, data = model.args["resolution"], args.ref or args.data_dir or model.args.get("data_dir")
    if not data or not Path(data).exists():
        raise UserError(f"{data or ckpt}: no such folder; give the reference images by --data-dir DIR")
    ref = ImageSet(data, size)
    if not args.reconstruct:
        n = args.num_samples or min(ref.n or ref.marks.get("n") or 50_000, 50_000)
        return [ref, Samples(ckpt, model, n, args.sampler, args.label_sampling)]
    if ref.n == 0 or ref.shape != (size, size):
        raise UserError(f"{data}: --reconstruct needs images, of {size}x{size} pixels")
    return [ref, Reconstructions(ckpt, model, ImageSet(data, size))]


def check(sources, net):
    """Refuse what would give a wrong number, and return lines on what could be misread. Statistics in a file
    must be of this network; beside images, those of another are not used. Raises UserError."""
    lines, shapes = [], {tuple(source.shape) for source in sources if source.shape}
    for source in [source for source in sources if isinstance(source, ImageSet)]:
        if source.others:
            lines.append(f"{source.path}: {source.n} images; not read, other files: {dict(source.others)}")
        lines += filter(None, [several_frames(source.path, source.files)])
        width = len(source.given["pool"][0]) if source.given else net.channels
        name = source.marks.get("features", "inception" if width == 2048 else net.name)
        sha256 = source.marks.get("sha256", net.sha256)
        if source.given and (name, sha256, width) != (net.name, net.sha256, net.channels):
            source.given = {}
            if source.n == 0:
                raise UserError(f"{source.path}: statistics of {name}'s {width} features ({sha256[:8]}), not "
                                f"of {net.name}'s {net.channels} ({net.sha256[:8]}); see --features")
        if source.given and not source.marks and "spatial" not in source.given:     # sFID's only ADM writes
            meant = f"{name}'s" if name != "inception" else "ADM's (TensorFlow's resize)"
            lines.append(f"{source.path}: unmarked statistics, taken for {meant}; those of tools that resize "
                         "otherwise, as pytorch-fid's own files, do not fit")
    for source in sources:
        n = source.n or (source.marks.get("n", 0) if source.given else 0)
        if source.n < 4 and not source.given:
            raise UserError(f"{source.path}: {n} image(s); a distribution needs at least four")
        if 0 < n <= net.channels:
            lines.append(f"warning: {source.path}: {n} images are too few for {net.channels} features; "
                         "compare such a distance only with others of as many images")
    if len(shapes) > 1:
        lines.append(f"warning: reference and samples differ in size (height, width): {sorted(shapes)}")
    ref, samples = (source.path.resolve() for source in (sources[0], sources[-1]))
    if len(sources) == 2 and (ref.is_relative_to(samples) or samples.is_relative_to(ref)):
        lines.append("warning: reference and samples are the same, or one is part of the other")
    return lines


def main():
    args, start = parse_args(), time.time()
    device = pick_device(args.device)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True      # as sample.py samples
    processes = start_processes(device)
    rank, world = processes.rank, processes.world
    if (args.ckpt or not args.ref) and not args.reconstruct:                         # it draws
        args.sampler["mixed_precision"] = choose_precision(args.mixed_precision, device, processes)
    sources, net = open_sources(args, device), load_features(args)
    ref, samples, lines = sources[0], sources[-1], check(sources, net)
    if args.ema and isinstance(samples, Samples):
        lines += filter(None, [warn_of_short_average(samples.model)])
    if args.features is None and net.name == LITE2:
        lines.append(f"features: {LITE2}; Inception's weights are not here (see --download)")
    wanted = args.metrics or (["fid"] if args.reconstruct else list(METRICS))
    every = {"pool", "spatial", "logits", "rows"} if net.name == "inception" else {"pool", "rows"}
    r, s = (every if source.n >= 4 else source.given.keys() for source in (ref, samples))
    metrics = [m for m in wanted if METRICS[m] in s and (m == "is" or METRICS[m] in r)]
    if args.metrics and metrics != wanted:
        raise UserError(f"--metrics {','.join(set(wanted) - set(metrics))}: sfid and is are defined on "
                        "Inception's features; statistics without images give only fid and sfid")
    if not args.metrics and max(ref.n, samples.n) > 100_000:        # all pairs of them: only where asked for
        metrics = [m for m in metrics if METRICS[m] != "rows"]
    if args.save_stats and ref.n < 4:
        raise UserError(f"--save-stats: {ref.path} holds statistics already, and {ref.n} images")
    if world > 1:                                               # each machine reads its own copies: the same?
        seen = [None] * world
        here = [net.sha256[:8], *((source.n, source.shape) for source in sources)]
        dist.all_gather_object(seen, here, group=processes.host)
        if any(other != seen[0] for other in seen):
            raise UserError(f"the machines hold different images or weights: {seen}")
    if rank == 0 and lines:
        print(*lines, sep="\n")
    net.to(device, memory_format=memory_format(device))
    results = evaluate(sources, net, metrics if len(sources) == 2 else [], args.save_stats,
                       device=device, rank=rank, world=world, group=processes.host,
                       num_workers=args.num_workers, batch_size=args.batch_size)
    if args.reconstruct:
        if world > 1:
            dist.all_reduce(samples.quality, group=processes.host)
        results |= dict(zip(("psnr", "ssim"), (samples.quality / samples.n).tolist()))
    if rank == 0:
        names = [f"{source.path} ({source.n or 'statistics'})" for source in reversed(sources)]
        print(f"{net.name} {net.sha256[:8]}: " + " against ".join(names))
        for name, value in results.items():
            label = f"r{name}" if args.reconstruct and name.startswith("f") else name
            print(f"  {label:<28}{value:.6g}")
    if rank == 0 and args.json:
        n = [source.n or source.marks.get("n", 0) for source in sources]
        record = results | dict(n_reference=n[0], n_samples=sum(n[1:]), features=net.name,
                                weights_sha256=net.sha256, resolution=list(samples.shape or ()),
                                seconds=round(time.time() - start, 2))
        write_atomic(args.json, lambda tmp: tmp.write_text(json.dumps(record, indent=1) + "\n"))
    end_processes(processes)


if __name__ == "__main__":
    run_command(main)
