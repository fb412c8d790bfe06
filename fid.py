"""fid.py: evaluation metrics: FID, sFID, Inception Score, KID, MIND, precision and recall in one pass.

    python fid.py                                         the newest run under exps/ against its own data
    python fid.py REF SAMPLES                             each a folder of images or an ADM-format .npz
    python fid.py REF --ckpt X.pt --num-samples 50000     generate the samples, evaluate them in memory
    python fid.py REF --ckpt X.pt --reconstruct           the VAE alone: rFID, PSNR, SSIM, LPIPS
    torchrun --nproc_per_node=8 fid.py ...                the same numbers, computed by 8 processes

FID, sFID, IS, precision and recall follow the ADM evaluator (guided-diffusion), without its TensorFlow. Over
other networks than Inception (--features dinov2) the names end in theirs: the Frechet distance is fd_dinov2.
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
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from data.images import how_to_unpack, list_images, load_batches, read_image
from repa import EMBEDDED, LITE2, create_encoder, fold_batch_norms, timm_name
from sample import add_sampler_flags, check_finite, choose_labels, open_sampler, sample_images
from sit import interpolate
from support.commands import (
    Parser,
    UserError,
    check_output,
    count,
    existing_path,
    one_line,
    path_name,
    positive_int,
    require,
    run_command,
)
from support.devices import (
    Processes,
    end_processes,
    full_float32,
    memory_format,
    pick_device,
    start_processes,
)
from support.files import READ_ERRORS, hash_tensors, load_into, load_tensors, save_npz, write_atomic
from support.grids import to_float, to_uint8
from vae import LPIPS, Normalize, psnr, reconstruct, ssim

SPATIAL = 17 * 17 * 7                                  # sFID's features: 7 channels of a 17 x 17 map
STATISTICS = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}         # arrays in an ADM-format .npz
INCEPTION = ("pt_inception-2015-12-05-6726825d.pth", "weights-inception-2015-12-05-6726825d.pth")
URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{INCEPTION[0]}"


# --- Feature networks: uint8 images [B, 3, H, W] -> {output: [B, D]} in full float32 ------------------------
# Each has: name; outputs, {output: its width D}; sha256, of the weights; id, the name and the hash's start.

def resize_tf1(images, size):
    """uint8 [B, 3, H, W] -> float32 [B, 3, size, size], bilinear as in TensorFlow 1: output pixel i reads the
    input at i * H / size (corners are not centred), without antialiasing. That is aligned corners if the last
    row and column are repeated: H / size = ((H + 1) - 1) / ((size + 1) - 1)."""
    x = F.pad(images.float(), (0, 1, 0, 1), mode="replicate")
    return F.interpolate(x, (size + 1, size + 1), mode="bilinear", align_corners=True)[..., :size, :size]


def resize_pillow(images, size, mode):
    """uint8 [B, 3, H, W] -> float32 [B, 3, size, size]. Emulates Pillow's antialiased resize of uint8 images:
    two passes, the width first, each rounded to integers in [0, 255]."""
    x = images.cpu() if images.device.type == "mps" else images     # antialias on MPS needs PyTorch 2.8
    for height in (x.shape[2], size):
        x = F.interpolate(x.float(), (height, size), mode=mode, antialias=True).round().clamp(0, 255)
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
    block. file: one of the public weights files (INCEPTION). Raises UserError."""
    name, outputs = "inception", dict(pool=2048, spatial=SPATIAL, logits=1008)

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
        self.id = f"{self.name} {self.sha256[:8]}"

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

    def __init__(self, name, ckpt=""):
        super().__init__()
        encoder = timm_name("dinov2-vit-l" if name == "dinov2" else name)
        grid = 16 if "dinov2" in encoder else None                             # of patches of 14 x 14 pixels
        net, config = create_encoder(encoder, ckpt, grid=grid)
        self.net = net.eval().requires_grad_(False)
        self.size = 14 * grid if grid else config["input_size"][-1]
        self.interpolation = config["interpolation"]                           # "bilinear" or "bicubic"
        self.normalize = Normalize(config["mean"], config["std"])
        self.name, self.sha256 = name, hash_tensors(self).hexdigest()
        self.id = f"{name} {self.sha256[:8]}"
        self.outputs = dict(pool=self(torch.zeros(1, 3, 32, 32))["pool"].shape[1])

    def forward(self, images):
        """-> 'pool' [B, D]."""
        with full_float32(images.device):
            x = self.normalize(resize_pillow(images, self.size, self.interpolation) / 255)
            x = x.contiguous(memory_format=memory_format(x.device))
            return dict(pool=self.net.forward_head(self.net.forward_features(x), pre_logits=True).float())


INSTEAD = f"give {URL} by --inception-weights FILE, or take --features {LITE2}"


def download_inception(processes):
    """The first process of each machine downloads Inception's weights; the others wait."""
    try:
        if int(os.environ.get("LOCAL_RANK", 0)) == 0:
            torch.hub.load_state_dict_from_url(URL, check_hash=True, weights_only=True)
    except (OSError, RuntimeError) as e:
        raise UserError(f"--download: cannot fetch the weights ({one_line(e)}); {INSTEAD}") from None
    processes.wait()


def load_networks(names, device, inception_weights="", weights=""):
    """The feature networks of these names, a list, on the device. names: as in --features; "": Inception if
    its weights are here, else LITE2. weights: files of the timm models among them, in their order; models
    without a file get the hub's. Raises UserError."""
    cached = [Path(torch.hub.get_dir()) / "checkpoints" / name for name in INCEPTION]
    inception_weights = inception_weights or next(filter(Path.is_file, cached), "")
    files, nets = weights.split(",") if weights else [], []
    for name in (names or ("inception" if inception_weights else LITE2)).split(","):
        if name == "inception":
            require(inception_weights,
                    f"--features inception: no weights here; --download fetches them, or {INSTEAD}")
            net = Inception(inception_weights)
        else:
            net = PooledFeatures(name, files.pop(0) if files and name not in EMBEDDED else "")
        nets.append(net.to(device, memory_format=memory_format(device)))
    require(not files, f"--features-weights {','.join(files)}: goes with --features and a timm model's name")
    return nets


# --- Sources of images --------------------------------------------------------------------------------------
# Each has: path; n, the number of images; shape, their (height, width); is_folder; stats: precomputed
# {(id of a network, output): (mean, covariance)}; and batches(indices, batch_size, num_workers): yields the
# images of a range of indices in order, uint8 [B, 3, H, W].

class ImageSet:
    """A folder of images (at any depth, sorted), or an .npz with arr_0 uint8 [N, H, W, 3], statistics, or
    both; n is 0 for statistics alone. Statistics without a network's id, as ADM's, are those of the id "".
    stats_n: how many images --save-stats' statistics are of. resolution: ADM's centre crop for the files of a
    folder. Raises UserError."""

    def __init__(self, path, resolution=None):
        self.path, self.resolution, self.stream = Path(path), resolution, None
        self.files = [] if self.path.is_file() else list_images(path)
        self.n, self.stats_n, self.shape, self.stats = len(self.files), 0, None, {}
        self.is_folder = bool(self.files)
        if self.is_folder:
            self.shape = read_image(self.files[0], resolution).shape[1:]
            return
        try:
            self.open_npz()
        except READ_ERRORS as e:
            raise UserError(f"{path}: not a readable .npz ({one_line(e)}); give a folder or an .npz"
                            f"{how_to_unpack(path, [self.path.suffix.lower()])}") from None

    def open_npz(self):
        with np.load(self.path) as f:                                    # reads only the arrays asked for
            require("sha256" not in f, f"{self.path}: of an older version; make it again by --save-stats")
            ids = {key.rpartition(" ")[0] for key in f.files}        # of networks; "" in a file like ADM's
            for id in ids - {""} or {""}:
                for output, names in STATISTICS.items():
                    names = [f"{id} {name}".strip() for name in names]
                    if all(name in f for name in names):
                        mu, sigma = (torch.from_numpy(f[name]).double() for name in names)
                        finite = mu.sum().isfinite() and sigma.sum().isfinite()
                        require(finite and mu.ndim == 1 and sigma.shape == (len(mu), len(mu)),
                                f"{self.path}: mu {[*mu.shape]}, sigma {[*sigma.shape]}; not finite [D, D]")
                        self.stats[id, output] = mu, sigma
            if "n" in f:
                self.stats_n, self.shape = int(f["n"]), tuple(f["shape"].tolist())
            if "arr_0" in f:
                with f.zip.open("arr_0.npy") as array:
                    np.lib.format.read_magic(array)
                    shape, fortran, dtype = np.lib.format.read_array_header_1_0(array)
                    self.offset = array.tell()
                require(dtype == np.uint8 and not fortran and len(shape) == 4 and shape[3] == 3,
                        f"{self.path}: arr_0 is {dtype} {list(shape)}, expected uint8 [N, H, W, 3]")
                self.n, self.shape = shape[0], shape[1:3]
            elif not self.stats:
                raise ValueError("neither arr_0 (images) nor mu and sigma (statistics) in it")

    def __getitem__(self, i):
        """Image i, uint8 [3, H, W]."""
        if self.files:
            image = read_image(self.files[i], self.resolution)
            require(image.shape[1:] == self.shape,
                    f"{self.files[i]}: {[*image.shape[1:]]} pixels (height, width), not {[*self.shape]} as "
                    "the first image; --resolution N crops all to N")
            return image
        try:
            if self.stream is None:
                self.stream = zipfile.ZipFile(self.path).open("arr_0.npy")   # noqa: SIM115 (kept open)
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


def stored_statistics(source, net, need):
    """The (mean, covariance) of a network's output that came with a source, or None. Statistics without an id
    are taken for the network's if the width fits; 2,048 fits Inception only."""
    plain, own = source.stats.get(("", need)), source.stats.get((net.id, need))
    width = len(plain[0]) if plain else 0
    fits = width == net.outputs.get(need) and (net.name == "inception" or width != 2048)
    return plain if fits else own


class Samples:
    """Samples of a checkpoint with these labels, the same as sample.py's. settings: of `sample_images`."""
    is_folder = False

    def __init__(self, path, model, labels, settings):
        self.path, self.model, self.labels, self.settings = path, model, labels, settings
        self.n, self.stats, self.shape = len(labels), {}, (model.args["resolution"],) * 2

    def batches(self, indices, batch_size, num_workers=0):
        for start in range(0, len(indices), batch_size):
            batch = indices[start:start + batch_size]
            yield sample_images(self.model, batch, [self.labels[i] for i in batch], **self.settings)


class Reconstructions:
    """The VAE's reconstructions of an ImageSet (from the posterior's mean, rounded to uint8). measures:
    functions of images and reconstructions [B, 3, H, W] in [-1, 1] that give a value per image, or the sum;
    sums: of these values over all images so far, by name."""

    def __init__(self, path, model, originals, **measures):
        self.path, self.model, self.originals = path, model, originals
        self.n, self.shape, self.is_folder = originals.n, originals.shape, originals.is_folder
        self.measures = dict(psnr=psnr, ssim=ssim) | measures
        self.stats, self.sums = {}, dict.fromkeys(self.measures, 0.0)

    def batches(self, indices, batch_size, num_workers=0):
        first = indices.start
        for images in self.originals.batches(indices, batch_size, num_workers):
            y = reconstruct(self.model.vae, images, batch_size)[1]
            check_finite(y, f"{self.path}: the reconstruction of image", range(first, first + len(y)))
            first, y = first + len(y), to_uint8(y)
            for name, measure in self.measures.items():
                self.sums[name] += measure(to_float(images), to_float(y)).sum().item()
            yield y


# --- Metrics ------------------------------------------------------------------------------------------------

def frechet_distance(reference, samples):
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) of two pairs of mean and covariance, float64 tensors [D],
    [D, D] (arXiv 1706.08500, eq. 6). With C1 = A A^T, the matrix C1 C2 has the eigenvalues of A^T C2 A, which
    is symmetric: no matrix square root is taken, and C1 may be singular (few images)."""
    (mean1, cov1), (mean2, cov2) = reference, samples
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
        z = torch.cat([f[rng.choice(len(f), size, replace=False)] for f in (x, y)])
        k = ((z @ z.T / z.shape[1] + 1) ** 3).fill_diagonal_(0)                          # [2 size, 2 size]
        within = k[:size, :size].sum() + k[size:, size:].sum()
        values.append(within / (size * (size - 1)) - 2 * k[:size, size:].mean())
    return torch.stack(values).mean().item()


def mind(x, y, directions=1000, seed=2020):
    """Monge-Inception distance (arXiv 2605.06797) of features [N, D], [M, D]: the squared Wasserstein
    distance of their projections, averaged over random directions, times 3 D (the paper's alpha). Of the
    larger set a random subset counts; the random numbers are torch-fidelity's. In float64, as `kid`."""
    rng, n = torch.Generator().manual_seed(seed), min(len(x), len(y))
    x, y = (f[torch.randperm(len(f), generator=rng)[:n]] if len(f) > n else f
            for f in (x.double(), y.double()))
    u = F.normalize(torch.randn(directions, x.shape[1], generator=rng)).to(x)
    gaps = (x @ u.T).sort(0).values - (y @ u.T).sort(0).values                              # [n, directions]
    return 3 * x.shape[1] * gaps.square().mean().item()


def precision(reference, samples, k=3, block=1000):
    """Fraction of the samples within the reference's manifold (arXiv 1904.06991), the union of balls around
    its features [N, D], each with the distance to the k-th nearest neighbour as radius. In float64: in
    float32 `cdist` loses the distances of features that lie close together."""
    reference, samples = reference.double(), samples.double()
    nearest = [torch.cdist(rows, reference).topk(k + 1, largest=False) for rows in reference.split(block)]
    radius = torch.cat([found.values[:, k] for found in nearest])            # the nearest of all is itself
    within = [(torch.cdist(rows, reference) <= radius).any(1) for rows in samples.split(block)]
    return torch.cat(within).double().mean().item()


def recall(reference, samples):
    """Fraction of the reference within the samples' manifold."""
    return precision(samples, reference)


# {metric: (what it is computed from, see `collect`; its function of the reference's and the samples')}
METRICS = {"fid": ("pool", frechet_distance), "sfid": ("spatial", frechet_distance),
           "is": ("logits", inception_score), "kid": ("features", kid), "mind": ("features", mind),
           "precision": ("features", precision), "recall": ("features", recall)}


def metric_name(net, metric):
    """Its name in the results: Inception's metrics have plain names, others end in the network's."""
    if net.name == "inception":
        return metric
    return ("fd" if metric == "fid" else metric) + f"_{net.name}"


@torch.no_grad()
def collect(source, needs, device, batch_size, num_workers=0, processes=Processes()):
    """What metrics are computed from, in one pass over a source's images, a contiguous shard per process.
    needs: pairs (network, need). The needs 'pool' and 'spatial' give (mean, covariance) of these outputs, or
    the source's own statistics if it has them; 'features' gives the pooled features [N, D], 'logits'
    [N, 1008]. Process 0 gets {(id of the network, need): value}. Raises UserError for features that are not
    finite."""
    rank, world, n = processes.rank, processes.world, source.n
    values = {(net.id, need): stored_statistics(source, net, need) for net, need in needs}
    needs = dict.fromkeys((net, need) for net, need in needs if not values[net.id, need])          # each once
    if not needs:
        return values if rank == 0 else {}
    indices, kept = range(rank * n // world, (rank + 1) * n // world), {}
    for net, need in needs:
        kept[net.id, need] = []
        if need in STATISTICS:                           # row 0: the sum; below: the sum of outer products
            kept[net.id, need] = torch.zeros(1 + net.outputs[need], net.outputs[need], dtype=torch.float64)
    batches, total = source.batches(indices, batch_size, num_workers), math.ceil(len(indices) / batch_size)
    for images in tqdm(batches, source.path.name, total, disable=rank > 0):
        for x in images.split(8 if device.type == "cpu" else batch_size):           # 8 fit into a CPU's cache
            outputs = {net: net(x.to(device)) for net in {net for net, _ in needs}}
            for net, need in needs:
                pool = outputs[net]["pool"]
                require(pool.isfinite().all(),
                        f"{source.path}: features not finite; damaged weights of {net.name}?")
                f, own = outputs[net].get(need, pool).cpu(), kept[net.id, need]
                if need in STATISTICS:
                    f = f.double()
                    own[0] += f.sum(0)
                    own[1:].addmm_(f.T, f)
                else:
                    own.append(f)
    shards = processes.gather(kept)
    if rank > 0:
        return {}
    for key in kept:
        parts = [shard[key] for shard in shards]
        if key[1] in STATISTICS:
            sums = sum(parts)
            mean, products = sums[0] / n, sums[1:]
            values[key] = mean, (products - n * torch.outer(mean, mean)) / (n - 1)
        else:
            values[key] = torch.cat(sum(parts, []))
    return values


def evaluate(reference, samples, metrics, device, **settings):
    """{name: value} of the metrics of a source, pairs (network, name in METRICS), on process 0; {} on the
    others. reference: what `collect` returned of the reference; settings: of `collect`."""
    found = collect(samples, [(net, METRICS[metric][0]) for net, metric in metrics], device, **settings)
    place, results = "cpu" if device.type == "mps" else device, {}                    # MPS has no float64
    if not found:
        return {}
    for net, metric in metrics:
        need, compute = METRICS[metric]
        a, b = reference.get((net.id, need)), found[net.id, need]
        if need == "features":
            a, b = a.to(place), b.to(place)
        name = metric_name(net, metric)
        results[name] = compute(b, samples.is_folder) if metric == "is" else compute(a, b)
    return results


class RunEvaluation:
    """Evaluates a run's samples while it trains: the Frechet distance that fid.py --ckpt gives (50 ODE
    steps), over Inception if its weights are in the cache, else LITE2. source: the reference, images or
    statistics; statistics computed from images are saved in `folder` and reused on resuming. All processes
    call it. Raises UserError."""

    def __init__(self, folder, source, resolution, n, device, num_workers, processes):
        self.folder, self.n = folder, n
        self.settings = dict(device=device, batch_size=32, num_workers=num_workers, processes=processes)
        self.nets, self.reference = load_networks("", device), {}
        check_same(self.nets, [], processes)
        key = hashlib.sha256(f"{Path(source).resolve()} {resolution} {self.nets[0].id}".encode())
        saved = folder / f"reference-{key.hexdigest()[:8]}.npz"
        if processes.from_first(saved.is_file()):
            if processes.rank > 0:                                         # only process 0 needs it
                return
            source = saved
        images = ImageSet(source, resolution)
        check_source(images, self.nets)
        if source != saved:
            check_same([], [images], processes)
        self.reference = collect(images, [(self.nets[0], "pool")], **self.settings)
        if processes.rank == 0 and images.n:
            save_stats(saved, images, self.reference)

    def run(self, sampler, cfg_scale, held_out):
        """On process 0 a row for the log: the distance; "eval_seconds", the time it took; and of held_out,
        (images uint8 [N, 3, R, R], labels [N]), the `denoising_loss`."""
        start = time.time()
        labels = choose_labels(self.n, range(sampler.sit.num_classes))
        samples = Samples(self.folder / "evaluation", sampler, labels, dict(cfg_scale=cfg_scale))
        values = evaluate(self.reference, samples, [(self.nets[0], "fid")], **self.settings)
        if not values:
            return {}
        name = "val_denoising_loss" if sampler.args["val_dir"] else "train_denoising_loss"
        return values | {name: denoising_loss(sampler, *held_out), "eval_seconds": time.time() - start}


@torch.no_grad()
def denoising_loss(sampler, images, labels):
    """The denoising loss of a Sampler on images uint8 [N, 3, R, R] with labels [N], in float32. Timesteps,
    uniform, and noise are the same at each call."""
    (sit, vae, args, _, device), n, total = sampler, len(images), 0.0
    generator = torch.Generator().manual_seed(0)
    noise, eps = torch.randn(2, n, sit.channels, sit.size, sit.size, generator=generator)
    t = torch.rand(n, generator=generator)
    for k in torch.arange(n).split(32):
        x, y, noise_k, eps_k, t_k = (values[k].to(device) for values in (images, labels, noise, eps, t))
        x = to_float(x).contiguous(memory_format=memory_format(device))
        z = sit.bn.normalize(vae.encode(x).sample(noise_k))
        x_t, velocity = interpolate(z, t_k, eps_k, args["path_type"])
        total += (sit(x_t, t_k, y)[0] - velocity).square().mean((1, 2, 3)).sum().item()
    return total / n


# --- The command --------------------------------------------------------------------------------------------

def parse_args(argv=None):
    """Flags, checked. metrics: a list, empty for all available; from_checkpoint: whether a checkpoint makes
    the images to evaluate."""
    parser = Parser(description="FID, sFID, Inception Score, KID, MIND, precision and recall.")
    add = parser.add_argument
    add("ref", nargs="?", metavar="REF", type=existing_path,
        help="a folder, an .npz, --save-stats' file (default: the checkpoint's training data)")
    add("samples", nargs="?", metavar="SAMPLES", type=existing_path, help="images to evaluate, as for REF")
    add("--features", default="", help="networks, with commas: inception (default if its weights are here), "
        f"dinov2, {LITE2} or a timm model")
    add("--metrics", help=f"some of {','.join(METRICS)} (default: all available); is: over splits of about "
        "5,000 images, an .npz in its order, a folder shuffled")
    add("--ratio", metavar="VAL", type=existing_path, help="held-out images, as for REF: divide each Frechet "
        "distance by theirs (FDr), and average over the networks")
    add("--inception-weights", metavar="FILE", type=existing_path, help=" or ".join(INCEPTION))
    add("--download", action="store_true", help="download the Inception weights once (95 MB)")
    add("--features-weights", metavar="FILE,...", default="", help="of the timm models, not the hub's")
    add("--resolution", type=positive_int, help="centre-crop the images of folders to this size, as ADM does")
    add("--save-stats", metavar="FILE", type=path_name,
        help="write REF's statistics to an .npz; SAMPLES is optional then")
    add("--json", metavar="FILE", type=path_name, help="write the results to this file")
    add("--num-workers", type=count, default=min(8, os.cpu_count()), help="processes that read images")
    add("--num-samples", type=positive_int, help="default: as many as reference images, 50,000 at most")
    add("--reconstruct", action="store_true", help="evaluate the checkpoint's VAE: rFID, PSNR, SSIM, LPIPS")
    add_sampler_flags(parser)
    args = parser.parse_args(argv)
    args.metrics = args.metrics.split(",") if args.metrics else ["fid"] if args.reconstruct else []
    unknown = ",".join(set(args.metrics) - set(METRICS))
    require(not unknown, f"--metrics {unknown}: unknown; take some of {','.join(METRICS)}")
    require(not args.ratio or "fid" in (args.metrics or METRICS), "--ratio divides fid: name it in --metrics")
    require("inception" in (args.features or "inception").split(",")
            or not (args.inception_weights or args.download),
            f"--inception-weights and --download go with --features inception, not {args.features}")
    args.from_checkpoint = bool(args.ckpt or not args.ref)
    require(args.from_checkpoint or args.samples or args.save_stats and not args.ratio,
            "SAMPLES is missing: fid.py REF SAMPLES, or REF --ckpt FILE to generate them")
    require(args.from_checkpoint or not (args.num_samples or args.reconstruct),
            "--num-samples and --reconstruct go with --ckpt FILE, or without REF")
    require(not (args.from_checkpoint and (args.samples or args.resolution)),
            "a checkpoint generates the images to evaluate, at its resolution; drop SAMPLES and --resolution")
    require(not (args.reconstruct and args.num_samples),
            "--reconstruct takes every image; drop --num-samples")
    if args.reconstruct:                               # the VAE has no average, and computes in float32
        args.ema, args.mixed_precision = False, "no"
    inputs = (args.ref, args.samples, args.ratio, args.ckpt, args.vae_ckpt, args.inception_weights,
              *args.features_weights.split(","))
    files = [path for path in inputs if path and not os.path.isdir(path)]
    for out in filter(None, (args.save_stats, args.json)):
        require(not os.path.isdir(out), f"{out}: a folder; name a file")
        check_output(out, files)
    return args


def open_sources(args, device, processes):
    """[reference, samples, held-out images] of the flags; samples are None for --save-stats alone, held-out
    images without --ratio."""
    size = args.resolution
    if args.from_checkpoint:
        ckpt, model, settings = open_sampler(args, device, processes)
        size, args.ref = model.args["resolution"], args.ref or model.args.get("data_dir")
        require(args.ref and Path(args.ref).exists(),
                f"{args.ref or ckpt}: no such folder; give the reference images: fid.py REF --ckpt {ckpt}")
    ref, samples, val = [path and ImageSet(path, size) for path in (args.ref, args.samples, args.ratio)]
    require(not val or val.path.resolve() != ref.path.resolve(),
            f"--ratio {args.ratio}: the reference itself; give held-out images")
    if args.reconstruct:
        require(ref.n > 0 and ref.shape == (size, size),
                f"{ref.path}: --reconstruct needs images, of {size}x{size} pixels")
        samples = Reconstructions(ckpt, model, ref, **load_lpips(model, processes))
    elif args.from_checkpoint:
        require(model.sit,
                f"{ckpt}: trained with --vae-only, it has no SiT to sample from; see --reconstruct")
        n = args.num_samples or min(count_images(ref) or 50_000, 50_000)
        labels = choose_labels(n, range(model.sit.num_classes), args.label_sampling, args.seed)
        samples = Samples(ckpt, model, labels, settings)
    return ref, samples, val


def load_lpips(model, processes):
    """{"lpips": a measure for `Reconstructions`}; {} if the run trained without LPIPS, or if its weights
    are missing here."""
    lpips, trained = None, model.args
    if trained.get("perceptual", "lpips") == "lpips":
        try:
            lpips = LPIPS(trained.get("lpips_ckpt"), trained.get("vgg_ckpt")).to(model.device)
        except UserError as e:
            processes.log(f"LPIPS is left out: {e} (flags of train.py)")
    if processes.any(not lpips):
        return {}
    return dict(lpips=lambda x, y: len(x) * lpips(y.to(model.device), x.to(model.device)))


def count_images(source):
    """The number of images, or of those behind a file's statistics (0: unknown)."""
    return source.n or source.stats_n


def check_source(source, nets):
    """Raises UserError where a source has neither four images nor statistics of each network."""
    for net in nets:
        found = ", ".join(f"{id or 'unknown'} ({len(stats[0])} features)"
                          for (id, need), stats in source.stats.items() if need == "pool")
        require(source.n >= 4 or stored_statistics(source, net, "pool"),
                f"{source.path}: {source.n} image(s), statistics of {found or 'no network'}; it takes four "
                f"images or more, or statistics of {net.id} ({net.outputs['pool']} features)")


def check_same(nets, sources, processes):
    """Raises UserError where the machines, each of which reads its own files, hold different ones."""
    here = [[net.sha256 for net in nets], [(source.n, source.shape) for source in sources]]
    differ = processes.any(here != processes.from_first(here))
    require(not differ, f"the machines hold different images or weights, here {here}")


def find_warnings(sources, nets):
    """Lines about what could be misread."""
    lines, shapes = [], {tuple(source.shape) for source in sources if source.shape}
    for source in sources:
        plain = source.stats.get(("", "pool"))
        for net in nets:                                                                    # ADM's have both
            unknown = plain and stored_statistics(source, net, "pool") is plain
            if unknown and ("", "spatial") not in source.stats:
                lines.append(f"{source.path}: statistics of unknown origin, assumed to be {net.name}'s; of "
                             "tools with another resize, such as pytorch-fid, they are not comparable")
        n = count_images(source)
        lines += [f"warning: {source.path}: {n} images are too few for {net.outputs['pool']} features; "
                  "compare such a distance only with others of as many images"
                  for net in nets if 0 < n <= net.outputs["pool"]]
    if len(shapes) > 1:
        lines.append(f"warning: reference and samples differ in size (height, width): {sorted(shapes)}")
    paths = [source.path.resolve() for source in sources]
    if len(paths) > 1 and (paths[0].is_relative_to(paths[1]) or paths[1].is_relative_to(paths[0])):
        lines.append("warning: reference and samples are the same, or one is part of the other")
    return lines


def choose_metrics(asked, ref, samples, nets):
    """Pairs (network, metric): of the names in `asked`; if empty, all that the sources and the networks
    allow, without those that compare all pairs of more than 100,000 images. Raises UserError for a metric
    that no network allows."""
    small = max(ref.n, samples.n) <= 100_000

    def has(source, net, need):
        return need in (*net.outputs, "features") if source.n >= 4 else stored_statistics(source, net, need)

    pairs = [(net, metric) for net in nets for metric, (need, _) in METRICS.items()
             if has(samples, net, need) and (metric == "is" or has(ref, net, need))
             and (metric in asked or not asked and (small or need != "features"))]
    missing = ",".join(set(asked) - {metric for _, metric in pairs})
    require(not missing, f"--metrics {missing}: not available: sfid and is are defined on Inception's "
            "features; statistics without images give only fid and sfid")
    return pairs


def save_stats(file, ref, values):
    """Write a reference's statistics, `values` of `collect`; Inception's also under ADM's names, without the
    network's id."""
    arrays = {}
    for (id, need), pair in values.items():
        if need in STATISTICS:
            named = dict(zip(STATISTICS[need], pair, strict=True))
            arrays |= {f"{id} {name}": array for name, array in named.items()}
            arrays |= named if id.startswith("inception ") else {}
    save_npz(file, n=ref.n, shape=ref.shape, **arrays)


def main():
    args = parse_args()
    device = pick_device(args.device)
    processes = start_processes(device)
    settings = dict(device=device, batch_size=args.batch_size, num_workers=args.num_workers,
                    processes=processes)
    if args.download:
        download_inception(processes)
    ref, samples, val = open_sources(args, device, processes)
    nets = load_networks(args.features, device, args.inception_weights, args.features_weights)
    sources = [source for source in (ref, samples, val) if source]
    for source in sources:
        check_source(source, nets)
    metrics = choose_metrics(args.metrics, ref, samples, nets) if samples else []
    require(not args.save_stats or ref.n >= 4,
            f"--save-stats: {ref.path} holds statistics already, and {ref.n} images")
    check_same(nets, sources, processes)
    for line in find_warnings(sources, nets):
        processes.log(line)
    if not args.features and nets[0].name == LITE2:
        processes.log(f"features: {LITE2}; Inception's weights are not here (see --download)")

    needs = [(net, METRICS[metric][0]) for net, metric in metrics if metric != "is"]
    if args.save_stats:
        needs += [(net, need) for net in nets for need in STATISTICS.keys() & net.outputs.keys()]
    reference = collect(ref, needs, **settings)
    if args.save_stats and processes.rank == 0:
        save_stats(args.save_stats, ref, reference)
    results = evaluate(reference, samples, metrics, **settings) if samples else {}
    distances = [(net, "fid") for net in nets]
    denominators = evaluate(reference, val, distances, **settings) if val else {}
    ratios = {f"{name}_ratio": results[name] / value for name, value in denominators.items()}
    if ratios:
        results |= ratios | {f"fdr^{len(nets)}": sum(ratios.values()) / len(nets)}
    if args.reconstruct:
        names = [metric_name(*pair) for pair in distances]
        results = {f"r{name}" if name in names else name: value for name, value in results.items()}
        parts = processes.gather(samples.sums)
        if processes.rank == 0:
            results |= {name: sum(part[name] for part in parts) / samples.n for name in samples.sums}

    if processes.rank == 0:
        names = [f"{source.path} ({source.n or 'statistics'})" for source in (samples, ref) if source]
        print(", ".join(net.id for net in nets) + ":", " against ".join(names))
        width = 2 + max(map(len, results), default=0)
        for name, value in results.items():
            print(f"  {name:<{width}}{value:.6g}")
    if processes.rank == 0 and args.json:
        record = dict(n_reference=count_images(ref), n_samples=count_images(samples) if samples else 0,
                      features=",".join(net.name for net in nets),
                      weights_sha256=",".join(net.sha256 for net in nets),
                      resolution=list((samples or ref).shape or ()))
        text = json.dumps(results | record, indent=1) + "\n"
        write_atomic(args.json, lambda tmp: tmp.write_text(text))
    end_processes(processes)


if __name__ == "__main__":
    run_command(main)
