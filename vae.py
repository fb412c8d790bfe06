"""vae.py: the autoencoder between pixels and latents.

    python vae.py export CKPT DIR       writes the VAE of a training checkpoint as a diffusers AutoencoderKL

From top to bottom: AutoencoderKL; its discriminator, losses and measures; its file formats; the command.
Images are float tensors [B, 3, H, W] in [-1, 1]; latents are [B, C, h, w].
"""
import importlib.util
import json
import os
import re
import shutil
from collections import OrderedDict
from pathlib import Path

import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from safetensors.torch import save_file

from support.checkpoints import is_checkpoint, plain_checkpoint
from support.commands import Parser, UserError, one_line, positive_int, run_command
from support.files import HUB_ERRORS, load_into, load_tensors, strip_wrappers, write_atomic

# --- The autoencoder (parameter names of CompVis' latent-diffusion, as in the released checkpoints) ---------

LATENT_EPS = 1e-4                                          # of the latent norm between VAE and SiT

# ch * ch_mult: channels of the resolution levels, full resolution first. Attention keeps its levels at any
# input size: f16d32 was built for 256 pixels with attention at 16x16. The last two are for 32 pixels: f4d8 is
# the tiny preset's, f4d32 that of experiments/compare.sh.
VAES = {
    "f8d4": dict(ch=128, ch_mult=(1, 2, 4, 4), num_res_blocks=2, attn_levels=(), latent_channels=4),
    "f16d32": dict(ch=128, ch_mult=(1, 1, 2, 2, 4), num_res_blocks=2, attn_levels=(4,), latent_channels=32),
    "f4d8": dict(ch=32, ch_mult=(1, 2, 4), num_res_blocks=1, attn_levels=(), latent_channels=8, groups=1),
    "f4d32": dict(ch=32, ch_mult=(1, 2, 4), num_res_blocks=1, attn_levels=(), latent_channels=32, groups=1),
}
VAE_DEFAULTS = dict(groups=32, mid_attention=True, quant_conv=True, post_quant_conv=True)


class ResnetBlock(nn.Module):
    def __init__(self, cin, cout, groups):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, cin, eps=1e-6)
        self.conv1 = nn.Conv2d(cin, cout, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, cout, eps=1e-6)
        self.conv2 = nn.Conv2d(cout, cout, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(cin, cout, 1) if cin != cout else nn.Identity()

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        return self.conv2(F.silu(self.norm2(h))) + self.nin_shortcut(x)


class AttnBlock(nn.Module):
    """Single-head self-attention over all positions."""

    def __init__(self, c, groups):
        super().__init__()
        self.norm = nn.GroupNorm(groups, c, eps=1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(c, c, 1) for _ in range(4))

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (conv(h).flatten(2).mT.unsqueeze(1) for conv in (self.q, self.k, self.v))    # [B, 1, HW, C]
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(h.squeeze(1).mT.reshape(x.shape))


class Level(nn.Module):
    """The blocks of one resolution, each followed by attention where the level has it."""

    def __init__(self, cin, cout, blocks, attention, groups):
        super().__init__()
        self.block = nn.ModuleList(ResnetBlock(cin if j == 0 else cout, cout, groups) for j in range(blocks))
        attn = (AttnBlock(cout, groups) if attention else nn.Identity() for _ in range(blocks))
        self.attn = nn.ModuleList(attn)

    def forward(self, h):
        for block, attn in zip(self.block, self.attn, strict=True):
            h = attn(block(h))
        return h


class Middle(nn.Module):
    def __init__(self, c, attention, groups):
        super().__init__()
        self.block_1, self.block_2 = ResnetBlock(c, c, groups), ResnetBlock(c, c, groups)
        self.attn_1 = AttnBlock(c, groups) if attention else nn.Identity()

    def forward(self, h):
        return self.block_2(self.attn_1(self.block_1(h)))


class Encoder(nn.Module):
    """Images [B, 3, H, W] -> moments [B, 2C, h, w], before quant_conv; the arguments are those of VAES."""

    def __init__(self, ch, ch_mult, num_res_blocks, attn_levels, latent_channels, groups, mid_attention):
        super().__init__()
        widths = [round(ch * m) for m in ch_mult]
        self.conv_in = nn.Conv2d(3, ch, 3, padding=1)
        self.down = nn.ModuleList()
        for i, (cin, cout) in enumerate(zip([ch] + widths, widths)):
            level = Level(cin, cout, num_res_blocks, i in attn_levels, groups)
            level.downsample = nn.Identity() if i == len(widths) - 1 else nn.Sequential(OrderedDict(
                pad=nn.ZeroPad2d((0, 1, 0, 1)), conv=nn.Conv2d(cout, cout, 3, stride=2)))
            self.down.append(level)
        self.mid = Middle(widths[-1], mid_attention, groups)
        self.norm_out = nn.GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], 2 * latent_channels, 3, padding=1)

    def forward(self, x):
        h = self.conv_in(x)
        for level in self.down:
            h = level.downsample(level(h))
        return self.conv_out(F.silu(self.norm_out(self.mid(h))))


class Decoder(nn.Module):
    """Latents [B, C, h, w], after post_quant_conv -> images [B, 3, H, W]; `up.0`, full size, runs last."""

    def __init__(self, ch, ch_mult, num_res_blocks, attn_levels, latent_channels, groups, mid_attention):
        super().__init__()
        widths = [round(ch * m) for m in ch_mult]
        self.conv_in = nn.Conv2d(latent_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], mid_attention, groups)
        self.up = nn.ModuleList()
        for i, (cin, cout) in enumerate(zip(widths[1:] + widths[-1:], widths)):
            level = Level(cin, cout, num_res_blocks + 1, i in attn_levels, groups)
            level.upsample = nn.Identity() if i == 0 else nn.Sequential(OrderedDict(
                scale=nn.Upsample(scale_factor=2), conv=nn.Conv2d(cout, cout, 3, padding=1)))
            self.up.append(level)
        self.norm_out = nn.GroupNorm(groups, widths[0], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, z):
        h = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            h = level.upsample(level(h))
        return self.conv_out(F.silu(self.norm_out(h)))


class DiagonalGaussian:
    """The posterior q(z|x): N(mean, exp(logvar)) per latent value. moments: [B, 2C, h, w], kept as given."""

    def __init__(self, moments):
        self.moments = moments
        self.mean, logvar = moments.float().chunk(2, dim=1)
        self.logvar = logvar.clamp(-30, 20)

    def sample(self, noise):
        """mean + std * noise, with noise ~ N(0, I) of the mean's shape [B, C, h, w]."""
        return self.mean + (0.5 * self.logvar).exp() * noise

    def kl(self):
        """KL(q || N(0, I)) in nats, summed over the latent's dimensions: [B]."""
        return 0.5 * (self.mean.square() + self.logvar.exp() - 1 - self.logvar).sum(dim=(1, 2, 3))


class AutoencoderKL(nn.Module):
    """VAE of latent diffusion (arXiv 2112.10752). config: a name of VAES, or a dict with the keys of its rows
    and of VAE_DEFAULTS; groups, if given, replaces its groups. stride: pixels per latent position. Raises
    UserError for an unknown name and for groups that do not divide the channels."""

    def __init__(self, config, groups=None):
        super().__init__()
        if isinstance(config, str):
            if config not in VAES:
                raise UserError(f"--vae {config}: unknown architecture; take one of {', '.join(VAES)}")
            config = VAES[config]
        self.config = VAE_DEFAULTS | config | (dict(groups=groups) if groups else {})
        if any(round(self.config["ch"] * m) % self.config["groups"] for m in self.config["ch_mult"]):
            raise UserError(f"the VAE's channels do not divide into {self.config['groups']} groups")
        c = self.latent_channels = config["latent_channels"]
        self.stride = 2 ** (len(config["ch_mult"]) - 1)
        shape = {key: value for key, value in self.config.items() if not key.endswith("quant_conv")}
        self.encoder, self.decoder = Encoder(**shape), Decoder(**shape)
        self.quant_conv = nn.Conv2d(2 * c, 2 * c, 1) if self.config["quant_conv"] else nn.Identity()
        self.post_quant_conv = nn.Conv2d(c, c, 1) if self.config["post_quant_conv"] else nn.Identity()

    def initialize(self):
        """Weights to train from scratch with. Convolutions keep the variance of what they get (PyTorch's own
        take two thirds of it, layer by layer), blocks start as the identity, like SiT's, and the posterior
        with a std of exp(-3), so that the decoder sees more than noise."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
                nn.init.zeros_(module.bias)
                if name.endswith(("conv2", "proj_out")):                              # the last of a block
                    nn.init.zeros_(module.weight)
        moments = self.quant_conv if self.config["quant_conv"] else self.encoder.conv_out
        nn.init.constant_(moments.bias[self.latent_channels:], -6)

    def latent_size(self, resolution):
        """Height = width of the latents of square images. Raises UserError where the stride does not fit."""
        if resolution % self.stride:
            raise UserError(f"--resolution {resolution}: not divisible by the VAE's stride {self.stride}")
        return resolution // self.stride

    def encode(self, x):
        """Images [B, 3, H, W] in [-1, 1] -> DiagonalGaussian over [B, C, H/stride, W/stride]."""
        return DiagonalGaussian(self.quant_conv(self.encoder(x)))

    def decode(self, z):
        """Latents [B, C, h, w] -> images [B, 3, h*stride, w*stride], about [-1, 1], not clamped, float32."""
        return self.decoder(self.post_quant_conv(z)).float()

    def forward(self, x, noise):
        """One pass for training: (posterior, z = its sample with `noise`, reconstruction of z)."""
        posterior = self.encode(x)
        z = posterior.sample(noise)
        return posterior, z, self.decode(z)


# --- The discriminator, the VAE's losses and the measures of a reconstruction -------------------------------

class Discriminator(nn.Module):
    """PatchGAN (arXiv 1611.07004): images [B, 3, H, W] -> logits [B, 1, h, w], float32 under autocast, too.
    Its batch norm always stays in train mode, as in the release, and is not synchronised over processes."""
    MIN_SIZE = 24                                            # pixels of H and W; below there is no logit

    def __init__(self):
        super().__init__()
        layers = [nn.Conv2d(3, 64, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for cin, cout, stride in ((64, 128, 2), (128, 256, 2), (256, 512, 1)):
            conv = nn.Conv2d(cin, cout, 4, stride, padding=1, bias=False)
            layers += [conv, nn.BatchNorm2d(cout), nn.LeakyReLU(0.2)]
        self.main = nn.Sequential(*layers, nn.Conv2d(512, 1, 4, padding=1))
        for m in self.main:
            if isinstance(m, nn.Conv2d):
                nn.init.normal_(m.weight, 0, 0.02)
            elif isinstance(m, nn.BatchNorm2d):
                nn.init.normal_(m.weight, 1, 0.02)

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            return self.main(x.float())


def hinge_loss(real, fake):
    """The discriminator's loss on its logits of real and of reconstructed images."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def unit_length(f, eps=1e-10):
    """Feature maps [B, C, h, w], each position scaled to unit length, in float32."""
    f = f.float()
    return f / (torch.linalg.vector_norm(f, dim=1, keepdim=True) + eps)      # its gradient at 0 is 0, not NaN


class LPIPS(nn.Module):
    """Learned perceptual distance (arXiv 1801.03924): squared differences of unit-length VGG16 features,
    weighted by linear heads, averaged over positions, summed over five layers. heads, vgg: files of the heads
    and of torchvision's VGG16, by default the `lpips` package's and the hub's; random: neither is read.
    Raises UserError where one is missing."""
    LAYERS = {3: 64, 8: 128, 15: 256, 22: 512, 29: 512}                  # relu1_2 ... relu5_3 -> channels

    def __init__(self, heads=None, vgg=None, random=False):
        super().__init__()
        if heads is None and not random:
            spec = importlib.util.find_spec("lpips")                           # found, not imported
            if spec is None:
                raise UserError("LPIPS: no linear heads; pip install lpips, or give the file by --lpips-ckpt")
            heads = Path(spec.origin).parent / "weights/v0.1/vgg.pth"
        try:
            net = timm.create_model("vgg16.tv_in1k", pretrained=vgg is None and not random)
        except HUB_ERRORS as e:
            raise UserError(f"LPIPS: no VGG16 fetched ({type(e).__name__}); give it by --vgg-ckpt") from None
        self.vgg = net.features[:30]
        self.heads = nn.ParameterList(torch.ones(1, c, 1, 1) / c for c in self.LAYERS.values())
        if vgg is not None:
            features = [(key, t) for key, t in load_tensors(vgg).items() if key.startswith("features.")]
            load_into(self.vgg, {key.removeprefix("features."): t for key, t in features}, vgg)
        if heads is not None:
            linear = [(key, t) for key, t in load_tensors(heads).items() if key.endswith(".model.1.weight")]
            load_into(self.heads, {key[3]: t for key, t in linear}, heads)           # lin0 ... lin4
        self.register_buffer("shift", torch.tensor([-.030, -.088, -.188]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor([.458, .448, .450]).view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False)

    def features(self, x):
        """Images [B, 3, H, W] in [-1, 1] -> five unit-length feature maps. (The release scales twice.)"""
        h, maps = (x - self.shift) / self.scale, []
        for i, layer in enumerate(self.vgg):
            h = layer(h)
            if i in self.LAYERS:
                maps.append(unit_length(h))
        return maps

    def forward(self, x, target):
        """Distance [] of images x from images `target`, mean over the batch; no gradient into the target."""
        with torch.no_grad():
            target = self.features(target)
        layers = zip(self.features(x), target, self.heads, strict=True)
        return sum(((a - b).square() * head).sum(1).mean() for a, b, head in layers)


def psnr(x, y):
    """Peak signal-to-noise ratio in dB, [B], of images in [-1, 1] (so of peak 2), clamped to that range."""
    mse = (x.clamp(-1, 1).float() - y.clamp(-1, 1).float()).square().mean(dim=(1, 2, 3))
    return 10 * torch.log10(4 / mse.clamp_min(1e-10))


def chroma_error(x, y):
    """Mean absolute difference [B] of the chroma Cb, Cr (BT.601, of 255 levels) of images [B, 3, H, W] in
    [-1, 1], each first averaged over blocks of 4 x 4 pixels: whether the colours are right, not the edges."""
    red, green, blue = F.avg_pool2d((x.clamp(-1, 1) - y.clamp(-1, 1)).float() * 127.5, 4).unbind(1)
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    return torch.stack([(blue - luma) / 1.772, (red - luma) / 1.402]).abs().mean(dim=(0, 2, 3))


def ssim(x, y):
    """Structural similarity [B] of images [B, C, H, W] in [-1, 1] (Wang et al. 2004), averaged over channels
    and positions where its Gaussian window (11 x 11, sigma 1.5) fits; in float64, so for MPS on the CPU.
    Raises UserError where the window does not fit."""
    if min(x.shape[2:]) < 11:
        raise UserError(f"SSIM needs images of at least 11 x 11 pixels, not {x.shape[2]} x {x.shape[3]}")
    if x.device.type == "mps":                                               # it has no float64
        x, y = x.cpu(), y.cpu()
    g = torch.exp(-torch.arange(-5, 6, dtype=torch.float64, device=x.device).square() / (2 * 1.5 ** 2))
    kernel = torch.outer(g / g.sum(), g / g.sum()).expand(x.shape[1], 1, 11, 11)
    x, y, c1, c2 = (x.double() + 1) / 2, (y.double() + 1) / 2, 0.01 ** 2, 0.03 ** 2
    mx, my, mxx, myy, mxy = (F.conv2d(z, kernel, groups=x.shape[1]) for z in (x, y, x * x, y * y, x * y))
    vx, vy, cov = mxx - mx ** 2, myy - my ** 2, mxy - mx * my
    return ((2 * mx * my + c1) * (2 * cov + c2) / ((mx ** 2 + my ** 2 + c1) * (vx + vy + c2))).mean((1, 2, 3))


# --- The autoencoder's file formats -------------------------------------------------------------------------

WEIGHTS = [f"diffusion_pytorch_model.{end}" for end in ("safetensors", "fp16.safetensors", "bin", "fp16.bin")]
RENAMED = {                                                # parts of our (CompVis') names and diffusers'
    ".mid.block_1.": ".mid_block.resnets.0.", ".mid.block_2.": ".mid_block.resnets.1.",
    ".mid.attn_1.": ".mid_block.attentions.0.", ".down.": ".down_blocks.", ".up.": ".up_blocks.",
    ".block.": ".resnets.", ".attn.": ".attentions.", ".downsample.": ".downsamplers.0.",
    ".upsample.": ".upsamplers.0.", ".nin_shortcut.": ".conv_shortcut.", ".norm_out.": ".conv_norm_out.",
    ".norm.": ".group_norm.", ".q.": ".to_q.", ".k.": ".to_k.", ".v.": ".to_v.", ".proj_out.": ".to_out.0."}
OURS = {theirs: ours for ours, theirs in RENAMED.items()} | {                # the rest: before diffusers 0.18
    ".query.": ".q.", ".key.": ".k.", ".value.": ".v.", ".proj_attn.": ".proj_out."}


def rename(name, levels, table=RENAMED):
    """diffusers' name of a parameter of ours, with the table OURS the reverse (`up` counts from the end)."""
    name = re.sub(r"(\.up(?:_blocks)?\.)(\d+)", lambda m: f"{m[1]}{levels - 1 - int(m[2])}", name)
    for old, new in table.items():
        name = name.replace(old, new)
    return name


def find_vae(state, what):
    """A VAE's tensors, by CompVis' names, in a state dict, bare or under "state_dict", "vae" or "model"; it
    may have other keys (loss.) and prefixes (first_stage_model.). Raises UserError."""
    for key in ("state_dict", "vae", "model"):
        if isinstance(state.get(key), dict):
            state = state[key]
    state, first = strip_wrappers(state), "encoder.conv_in.weight"
    prefixes = [key.removesuffix(first) for key in state if f".{key}".endswith(f".{first}")]
    if "" in prefixes:                                     # the one without prefix is meant
        prefix = ""
    elif len(prefixes) == 1:
        prefix = prefixes[0]
    else:
        raise UserError(f"{what}: {len(prefixes) or 'no'} VAEs in it (keys ending in {first}); its keys are "
                        f"{', '.join(prefixes or list(state)[:3])}...")
    parts = tuple(prefix + part for part in ("encoder.", "decoder.", "quant_conv.", "post_quant_conv."))
    tensors = {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(parts)}
    for key, tensor in tensors.items():
        floats = isinstance(tensor, torch.Tensor) and tensor.is_floating_point()         # not quantised ones
        if not floats or not tensor.float().isfinite().all():
            raise UserError(f"{what}: {key} holds values that are not finite floats")
    levels = len({key.split(".")[2] for key in tensors if key.startswith("decoder.up_blocks.")})
    if levels:                                             # diffusers' names, and attention as linear layers
        tensors = {rename(key, levels, OURS): tensor[..., None, None] if tensor.ndim == 2 else tensor
                   for key, tensor in tensors.items()}
    return tensors


def read_architecture(state, what):
    """The row of VAES of a VAE with these tensors, or else a dict like one, without groups: no tensor shows
    those of its norms. Raises UserError where the tensors are no AutoencoderKL's."""
    def count(modules):
        return len({key.removeprefix(modules).split(".")[0] for key in state if key.startswith(modules)})

    try:
        ch, levels = len(state["encoder.conv_in.weight"]), range(max(1, count("encoder.down.")))
        config = dict(
            ch=ch, ch_mult=tuple(len(state[f"encoder.down.{i}.block.0.conv1.weight"]) / ch for i in levels),
            num_res_blocks=count("encoder.down.0.block."),
            attn_levels=tuple(i for i in levels if f"encoder.down.{i}.attn.0.norm.weight" in state),
            latent_channels=state["decoder.conv_in.weight"].shape[1],
            mid_attention="encoder.mid.attn_1.norm.weight" in state,
            quant_conv="quant_conv.weight" in state, post_quant_conv="post_quant_conv.weight" in state)
    except (KeyError, IndexError) as e:
        raise UserError(f"{what}: no AutoencoderKL in it ({e})") from None
    for row in VAES.values():
        whole = VAE_DEFAULTS | row
        if all(whole[key] == value for key, value in config.items()):
            return row
    return config


def read_diffusers_folder(folder):
    """(weights file, groups, (mean [C], std [C]) of the latents) of a diffusers AutoencoderKL directory, with
    diffusers' defaults for what config.json leaves out. Raises UserError."""
    try:
        config = json.loads((folder / "config.json").read_text())
        kind, activation = config.get("_class_name", "AutoencoderKL"), config.get("act_fn", "silu")
        scale, groups = config.get("scaling_factor", 0.18215), config.get("norm_num_groups", 32)
        if kind != "AutoencoderKL" or activation != "silu" or not isinstance(groups, int) or groups < 1:
            raise ValueError(f"{kind}, {activation}, {groups} groups")
        ones = torch.ones(config.get("latent_channels", 4))
        mean = ones * torch.tensor(config.get("latents_mean") or config.get("shift_factor") or 0.0)
        std = ones * torch.tensor(config.get("latents_std") or 1.0)   # pipelines take z * std / scale + mean
        stats = mean, std / (1.0 if scale is None else scale)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError) as e:
        raise UserError(f"{folder}: not a diffusers AutoencoderKL (config.json: {one_line(e)})") from None
    for weights in WEIGHTS:
        if (folder / weights).is_file():
            return folder / weights, groups, stats
    raise UserError(f"{folder}: no weights in it; looked for {', '.join(WEIGHTS)}")


def fetch(hub_id):
    """The folder of a hub's VAE, after fetching its config.json and weights. Raises UserError."""
    try:
        for weights in WEIGHTS:
            folder = Path(snapshot_download(hub_id, allow_patterns=["config.json", weights]))
            if (folder / weights).exists():
                break
    except HUB_ERRORS as e:
        raise UserError(f"{hub_id}: no such folder here, and not to be fetched from the hub "
                        f"({type(e).__name__}); offline give a local path") from None
    return folder


def read_statistics(file):
    """(mean [C], std [C]) in the release's NAME-latents-stats.pt. Raises UserError."""
    saved = load_tensors(file)
    try:
        return saved["latents_bias"].flatten().float(), 1 / saved["latents_scale"].flatten().float()
    except (TypeError, KeyError, AttributeError):
        raise UserError(f"{file}: latents_scale and latents_bias are not in it") from None


def load_vae(path):
    """(AutoencoderKL in float32, its latents' (mean [C], std [C]) or None) from a weights file, a training
    checkpoint, a diffusers directory or a hub id. The statistics are of the checkpoint's latent norm, the
    directory's config.json, or the release's NAME-latents-stats.pt beside NAME.pt (latents_scale = 1 / std,
    latents_bias = mean). Raises UserError."""
    file, groups, stats = Path(path), None, None
    is_weights = file.suffix in (".pt", ".pth", ".ckpt", ".bin", ".safetensors")
    if not file.exists() and not is_weights and re.fullmatch(r"[\w-]+/[\w.-]+", str(path)):     # OWNER/NAME
        file = fetch(str(path))
    beside = file.parent / f"{file.stem}-latents-stats.pt"
    if file.is_dir():
        file, groups, stats = read_diffusers_folder(file)
    elif beside.is_file():
        stats = read_statistics(beside)
    content = load_tensors(file)
    if is_checkpoint(content):
        ckpt = plain_checkpoint(content, path)
        if "vae" not in ckpt:
            raise UserError(f"{path}: no VAE in this checkpoint, it was frozen; give its file by --vae-ckpt")
        if "bn.running_mean" in ckpt["ema"]:
            stats = ckpt["ema"]["bn.running_mean"], (ckpt["ema"]["bn.running_var"] + LATENT_EPS).sqrt()
        groups = ckpt["args"].get("vae_groups")                          # none in the release's
    tensors = find_vae(content, path)
    with torch.device("meta"):
        vae = AutoencoderKL(read_architecture(tensors, path), groups)
    load_into(vae.to_empty(device="cpu"), tensors, path)
    if stats and not all(s.shape == (vae.latent_channels,) and s.isfinite().all() for s in stats):
        raise UserError(f"{path}: its latent statistics are not {vae.latent_channels} finite numbers")
    return vae, stats


def export_vae(vae, stats, resolution, folder):
    """Write a diffusers AutoencoderKL directory, whole or not at all. stats: (mean, std) of the latents, [C];
    beside them scaling_factor is 1, as pipelines apply both. Raises UserError where `folder` exists."""
    folder, cfg, levels = Path(folder), vae.config, len(vae.config["ch_mult"])
    if folder.exists():
        raise UserError(f"{folder}: exists already; name a new folder")
    if cfg["ch_mult"][0] != 1:
        raise UserError("diffusers has no VAE whose first level is wider than its first convolution")
    kinds = ["Attn" if i in cfg["attn_levels"] else "" for i in range(levels)]
    config = dict(
        _class_name="AutoencoderKL", in_channels=3, out_channels=3, act_fn="silu", sample_size=resolution,
        down_block_types=[f"{kind}DownEncoderBlock2D" for kind in kinds],
        up_block_types=[f"{kind}UpDecoderBlock2D" for kind in reversed(kinds)],
        block_out_channels=[round(cfg["ch"] * m) for m in cfg["ch_mult"]],
        layers_per_block=cfg["num_res_blocks"], latent_channels=cfg["latent_channels"],
        norm_num_groups=cfg["groups"], mid_block_add_attention=cfg["mid_attention"],
        use_quant_conv=cfg["quant_conv"], use_post_quant_conv=cfg["post_quant_conv"], scaling_factor=1.0,
        latents_mean=stats[0].tolist(), latents_std=stats[1].tolist())
    tensors = {}
    for name, tensor in vae.state_dict().items():
        linear = ".attn" in name and tensor.ndim == 4
        tensors[rename(name, levels)] = tensor[..., 0, 0].contiguous() if linear else tensor.contiguous()
    tmp = folder.parent / f".{folder.name}.{os.getpid()}.tmp"
    try:
        write_atomic(tmp / WEIGHTS[0], lambda file: save_file(tensors, file, metadata={"format": "pt"}))
        write_atomic(tmp / "config.json", lambda file: file.write_text(json.dumps(config, indent=2) + "\n"))
        tmp.rename(folder)
    finally:
        shutil.rmtree(tmp, ignore_errors=True)


# --- The command --------------------------------------------------------------------------------------------

def main():
    parser = Parser(description="Write a training checkpoint's VAE as a diffusers AutoencoderKL directory.")
    parser.add_argument("command", choices=["export"])
    parser.add_argument("vae", metavar="CKPT", help="a training checkpoint, ours or the release's")
    parser.add_argument("out", metavar="DIR", help="a new folder")
    parser.add_argument("--resolution", type=positive_int, default=256, help="pixels (256)")
    args = parser.parse_args()
    vae, stats = load_vae(args.vae)
    if stats is None:
        raise UserError(f"{args.vae}: no latent statistics in it nor in NAME-latents-stats.pt beside it; "
                        "give a training checkpoint")
    export_vae(vae, stats, args.resolution, args.out)
    print(f"{args.out}: diffusers AutoencoderKL, stride {vae.stride}, {vae.latent_channels} channels")


if __name__ == "__main__":
    run_command(main)
