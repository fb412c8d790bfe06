"""latents.py: the latents of a frozen VAE, written to files once; data/images.py's ImageFolder reads them."""
import json
import math
import os
from functools import partial

import torch
from tqdm import tqdm

from data import images
from support.devices import memory_format
from support.files import hash_tensors, is_whole_archive, write_atomic
from support.grids import to_float


def write_latents(dataset, folder, numbers, encode, num_workers, show):
    """Write the chunk files of these numbers, each atomically; one set of loader processes for all."""
    chunks = [range(k * images.CHUNK, min((k + 1) * images.CHUNK, len(dataset))) for k in numbers]
    batches = [chunk[start:start + 32] for chunk in chunks for start in range(0, len(chunk), 32)]
    loader, known = images.load_batches(dataset, batches, num_workers), set()
    for k, chunk in zip(numbers, tqdm(chunks, "caching latents", disable=not show), strict=True):
        rows = []
        for _ in range(0, len(chunk), 32):
            x, _, errors = next(loader)
            images.report_unreadable(errors, known, len(dataset))
            rows.append(encode(x).half().cpu())
            rows[-1][torch.tensor([error != "" for error in errors])] = math.nan
        write_atomic(images.chunk_file(folder, k), partial(torch.save, torch.cat(rows)))


def use_cached_latents(dataset, vae, device, cfg, processes):
    """Let an ImageFolder give the posterior's moments of a frozen VAE (an AutoencoderKL on this device),
    computed in float32 as without a cache.

    They are in files of 1024 images, float16 [1024, 2C, h, w] (NaN: an unreadable image), in a folder whose
    name is a hash of VAE, resolution and images. Files of an earlier run stay, unless a checksum in them is
    wrong; the others are written first, the work split over the processes."""
    @torch.no_grad()
    def encode(pixels):
        return vae.encode(to_float(pixels.to(device, memory_format=memory_format(device)))).moments

    folder = None
    if processes.rank == 0:
        digest = hash_tensors(vae)
        digest.update(json.dumps([vae.config, cfg.resolution]).encode())
        for path in dataset.files:              # names, sizes, times of change (ctime cannot be set by hand)
            stat = os.stat(path)
            digest.update(path + f" {stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns} ".encode())
        folder = f"{cfg.output_dir}/latents-{digest.hexdigest()[:16]}"
    folder = processes.from_first(folder)
    local_rank, local_world = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    files = math.ceil(len(dataset) / images.CHUNK)
    everywhere = range(processes.rank, files, processes.world)
    on_this_machine = range(local_rank, files, local_world)      # others' as well, where disks are not shared
    show, whole = processes.rank == 0, set()
    for mine in (everywhere, on_this_machine):
        unchecked = [k for k in mine if k not in whole]
        bar = tqdm(unchecked, "checking latents", delay=2, disable=not show)
        missing = [k for k in bar if not is_whole_archive(images.chunk_file(folder, k))]
        damaged = sum(images.chunk_file(folder, k).is_file() for k in missing)
        if damaged:
            tqdm.write(f"{folder}: {damaged} damaged files, written again")
        if missing:
            write_latents(dataset, folder, missing, encode, cfg.num_workers, show)
        whole.update(mine)
        processes.wait()
    processes.log(f"latents: read from {folder}")
    dataset.cached = folder
