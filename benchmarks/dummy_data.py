"""dummy_data.py: files as the paper's commands read them, with random images and weights in them.

    python benchmarks/dummy_data.py DIR

writes into DIR:

    imagenet/train/n00000000/...       1,000 folders of two JPEGs, RGB, grey or CMYK; the first that training
                                       reads is damaged
    imagenet/few/...                   copies of some of the folders
    pretrained/sdvae/sdvae-f8d4.pt     and beside it its latents' statistics and its discriminator
    pretrained/vavae/...               the same of an f16d32
    pretrained/sd35/                   an f8d16 as a folder of diffusers
    pretrained/...                     DINOv2-B, VGG16 and LPIPS' heads in their authors' formats
    torch/hub/checkpoints/...          Inception, as fid.py --download writes it if TORCH_HOME is DIR/torch
    VIRTUAL_imagenet256_labeled.npz    ADM's reference batch: 64 images, and statistics
"""
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import timm
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))                                 # the six modules are there
from data.images import ImageFolder, step_batches
from fid import INCEPTION, SPATIAL
from repa import DINOV2_B
from support.commands import Parser, run_command
from support.files import save_npz
from vae import LPIPS, AutoencoderKL, Discriminator, export_vae

CLASSES, IMAGES, FEW = 1000, 2, 12                        # folders, files in each, folders in imagenet/few


def random_image(rng, width=320, height=280):
    """A PIL image of smooth random colours."""
    coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8))
    return coarse.resize((width, height), Image.BILINEAR)


def write_imagenet(root, rng):
    """CLASSES folders in root/train, RGB, grey and CMYK in turn, the first file that training reads damaged;
    copies of FEW folders in root/few and root/val, not of the damaged file's."""
    for k in range(CLASSES):
        folder = root / f"train/n{k:08d}"
        folder.mkdir(parents=True, exist_ok=True)
        for i in range(IMAGES):
            random_image(rng).convert(("RGB", "L", "CMYK")[k % 3]).save(folder / f"{folder.name}_{i}.JPEG")
    dataset = ImageFolder(root / "train", 256)
    settings = SimpleNamespace(seed=0, batch_size=1, max_train_steps=1)
    batch, = step_batches(len(dataset), settings, 0, 0, 1)
    damaged = Path(os.fsdecode(dataset.files[batch[0]]))
    damaged.write_bytes(damaged.read_bytes()[:1000])
    intact = [folder for folder in sorted((root / "train").iterdir()) if folder != damaged.parent]
    for folder in intact[:FEW]:
        shutil.copytree(folder, root / "few" / folder.name, dirs_exist_ok=True)
        shutil.copytree(folder, root / "val" / folder.name, dirs_exist_ok=True)


def save(state, file):
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, file)


def write_vae(name, folder):
    """A VAE's bare state dict, its latents' statistics, and a discriminator's state dict."""
    vae = AutoencoderKL(name.split("-")[1])
    vae.initialize()
    save(vae.state_dict(), folder / f"{name}.pt")
    shape = 1, vae.latent_channels, 1, 1
    save(dict(latents_scale=0.5 + torch.rand(shape), latents_bias=torch.randn(shape)),
         folder / f"{name}-latents-stats.pt")
    save(Discriminator().state_dict(), folder / f"{name}-discriminator-ckpt.pt")


def write_encoders(folder, hub):
    dinov2 = timm.create_model(DINOV2_B, num_classes=0).state_dict()
    save(dinov2 | dict(mask_token=torch.zeros(1, 768)), folder / "dinov2_vitb14_pretrain.pth")
    vgg = {f"features.{name}": tensor for name, tensor in LPIPS(random=True).vgg.state_dict().items()}
    save(vgg | {"classifier.0.weight": torch.zeros(1)}, folder / "vgg16-397923af.pth")     # is not used
    save({f"lin{k}.model.1.weight": torch.rand(1, channels, 1, 1) / channels
          for k, channels in enumerate(LPIPS.LAYERS.values())}, folder / "lpips-vgg.pth")
    inception = timm.create_model("inception_v3", num_classes=1008, aux_logits=False)
    save(inception.state_dict(), hub / "checkpoints" / INCEPTION[0])


def write_reference(file, rng, images=64):
    """arr_0 uint8 [N, 256, 256, 3], mu [2048], sigma [2048, 2048], mu_s [2023], sigma_s [2023, 2023]."""
    arrays = dict(arr_0=np.stack([np.array(random_image(rng, 256, 256)) for _ in range(images)]))
    for end, width in (("", 2048), ("_s", SPATIAL)):
        features = rng.random((images, width))
        arrays |= {f"mu{end}": features.mean(0), f"sigma{end}": np.cov(features, rowvar=False)}
    save_npz(file, **arrays)


def main():
    parser = Parser(description="Write dummy files for the paper's commands.")
    parser.add_argument("dir", type=Path, help="the folder they go to")
    root, rng = parser.parse_args().dir, np.random.default_rng(0)
    torch.manual_seed(0)
    write_imagenet(root / "imagenet", rng)
    write_vae("sdvae-f8d4", root / "pretrained/sdvae")
    write_vae("vavae-f16d32", root / "pretrained/vavae")
    vae = AutoencoderKL("f8d16")
    vae.initialize()
    export_vae(vae, (torch.zeros(16), torch.ones(16)), 256, root / "pretrained/sd35")
    write_encoders(root / "pretrained", root / "torch/hub")
    write_reference(root / "VIRTUAL_imagenet256_labeled.npz", rng)


if __name__ == "__main__":
    run_command(main)
