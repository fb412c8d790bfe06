"""vae.py: the autoencoder between images and latents; its discriminator, losses, metrics and file formats.

    python vae.py export CKPT DIR       writes the VAE of a training checkpoint as a diffusers AutoencoderKL

The other files use of a tokenizer (images: float [B, 3, H, W] in [-1, 1]; latents: [B, C, h, w]):

    encode(images)         the posterior: an object with mean, logvar [B, C, h, w], sample(noise) -> latents,
                           kl() -> [B], and moments [B, 2C, h, w], from which DiagonalGaussian restores it
    decode(latents)        images
    forward(images, noise) (posterior, latents sampled with the noise, their reconstruction), for training
    stride                 pixels per latent position along a side
    latent_channels        C
    latent_size(R)         h = w of the latents of R x R images
    config                 the architecture, a dict with the keys of a row of VAES and of VAE_DEFAULTS
    initialize()           sets the weights that training from scratch starts with
"""
import importlib.util
import json
import math
import re
from collections import OrderedDict
from contextlib import nullcontext
from pathlib import Path

import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from safetensors.torch import save_file
from torch.nn.attention import SDPBackend, sdpa_kernel

from support.checkpoints import is_checkpoint, plain_checkpoint
from support.commands import Parser, UserError, one_line, path_name, positive_int, require, run_command
from support.devices import memory_format
from support.files import HUB_ERRORS, load_into, load_tensors, strip_wrappers, write_atomic
from support.grids import to_float

# --- The autoencoder (parameter names of CompVis' latent-diffusion, as in the released checkpoints) ---------

LATENT_EPS = 1e-4      # of the latent norm (sit.py): load_vae returns its standard deviation

# Architectures by name, f(stride)d(latent channels). Level i (0: full resolution) has ch * ch_mult[i]
# channels and num_res_blocks residual blocks, one more in the decoder. attn_levels have attention, at any
# image size: f16d32 was built for 256 pixels, with attention over 16 x 16 positions.
VAES = {
    "f8d4": dict(ch=128, ch_mult=(1, 2, 4, 4), num_res_blocks=2, attn_levels=(), latent_channels=4),
    "f16d32": dict(ch=128, ch_mult=(1, 1, 2, 2, 4), num_res_blocks=2, attn_levels=(4,), latent_channels=32),
    # of Stable Diffusion 3.5 and FLUX.1, which have no 1x1 convolutions around the latents
    "f8d16": dict(ch=128, ch_mult=(1, 2, 4, 4), num_res_blocks=2, attn_levels=(), latent_channels=16,
                  quant_conv=False, post_quant_conv=False),
    # for 32 x 32 pixels: f4d8 in the tiny preset, f4d32 in experiments/compare.sh
    "f4d8": dict(ch=32, ch_mult=(1, 2, 4), num_res_blocks=1, attn_levels=(), latent_channels=8, groups=1),
    "f4d32": dict(ch=32, ch_mult=(1, 2, 4), num_res_blocks=1, attn_levels=(), latent_channels=32, groups=1),
}
# groups: of every group norm; mid_attention: at the lowest resolution, between down and up; quant_conv and
# post_quant_conv: a 1x1 convolution after the encoder and one before the decoder.
VAE_DEFAULTS = dict(groups=32, mid_attention=True, quant_conv=True, post_quant_conv=True)


def level_channels(config):
    """Channels of each resolution level, full resolution first."""
    return [round(config["ch"] * factor) for factor in config["ch_mult"]]


def on_cuda(x):
    """Whether GroupNorm, Upsample and AttnBlock compute in the form that suits CUDA. Elsewhere they are
    PyTorch's modules."""
    return x.is_cuda


class GroupNorm(nn.GroupNorm):
    """nn.GroupNorm that keeps channels last on CUDA, where PyTorch's kernel returns NCHW (its issue 111824)
    and each convolution would copy back. Moments per channel come first, then per group, in float32."""

    def forward(self, x):
        if not on_cuda(x):
            return super().forward(x)
        h = x.to(torch.promote_types(x.dtype, torch.float32))
        n, c = x.shape[:2]
        var, mean = (m.view(n, self.num_groups, -1) for m in torch.var_mean(h, (2, 3), correction=0))
        center = mean.mean(2, keepdim=True)                               # of the group
        var = (var + (mean - center).square()).mean(2, keepdim=True)
        scale = self.weight.view(self.num_groups, -1) * (var + self.eps).rsqrt()     # [N, groups, C/groups]
        shift = self.bias.view(self.num_groups, -1) - center * scale
        return torch.addcmul(shift.view(n, c, 1, 1), h, scale.view(n, c, 1, 1))            # shift + h * scale


class ResnetBlock(nn.Module):
    def __init__(self, cin, cout, groups):
        super().__init__()
        self.norm1 = GroupNorm(groups, cin, eps=1e-6)
        self.conv1 = nn.Conv2d(cin, cout, 3, padding=1)
        self.norm2 = GroupNorm(groups, cout, eps=1e-6)
        self.conv2 = nn.Conv2d(cout, cout, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(cin, cout, 1) if cin != cout else nn.Identity()

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        return self.conv2(F.silu(self.norm2(h))) + self.nin_shortcut(x)


class AttnBlock(nn.Module):
    """Single-head self-attention over all positions."""

    def __init__(self, c, groups):
        super().__init__()
        self.norm = GroupNorm(groups, c, eps=1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(c, c, 1) for _ in range(4))

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (conv(h).flatten(2).mT.unsqueeze(1) for conv in (self.q, self.k, self.v))    # [B, 1, HW, C]
        with self.kernel(q):
            h = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(h.squeeze(1).mT.reshape(x.shape))

    def kernel(self, q):
        """CUDA has no fast kernel for heads of over 256 channels; products are faster while they fit."""
        products = on_cuda(q) and q.shape[3] > 256 and q.shape[2] <= 4096
        return sdpa_kernel(SDPBackend.MATH) if products else nullcontext()


class Upsample(nn.Sequential):
    """Nearest-neighbour upsampling by 2, then a 3x3 convolution. On CUDA both are one transposed convolution,
    with 4 taps per output in place of 9: its kernel is the 3x3 one convolved with 2x2 ones."""

    def __init__(self, c):
        super().__init__(OrderedDict(scale=nn.Upsample(scale_factor=2), conv=nn.Conv2d(c, c, 3, padding=1)))

    def forward(self, x):
        if not on_cuda(x):
            return super().forward(x)
        kernel = F.avg_pool2d(self.conv.weight.flip(2, 3), 2, stride=1, padding=1, divisor_override=1)
        kernel = kernel.transpose(0, 1).contiguous(memory_format=torch.channels_last)        # [in, out, 4, 4]
        return F.conv_transpose2d(x, kernel, self.conv.bias, stride=2, padding=1)


class Level(nn.Module):
    """One resolution: residual blocks, each followed by attention if the level has it, then, if asked for,
    downsampling (encoder) or upsampling (decoder) by 2."""

    def __init__(self, cin, cout, blocks, attention, groups, downsample=False, upsample=False):
        super().__init__()
        self.block = nn.ModuleList(ResnetBlock(cin if j == 0 else cout, cout, groups) for j in range(blocks))
        attn = (AttnBlock(cout, groups) if attention else nn.Identity() for _ in range(blocks))
        self.attn = nn.ModuleList(attn)
        self.downsample = self.upsample = nn.Identity()
        if downsample:
            self.downsample = nn.Sequential(OrderedDict(
                pad=nn.ZeroPad2d((0, 1, 0, 1)), conv=nn.Conv2d(cout, cout, 3, stride=2)))
        if upsample:
            self.upsample = Upsample(cout)

    def forward(self, h):
        for block, attn in zip(self.block, self.attn, strict=True):
            h = attn(block(h))
        return self.upsample(self.downsample(h))


class Middle(nn.Module):
    """The lowest resolution, between down and up."""

    def __init__(self, c, attention, groups):
        super().__init__()
        self.block_1, self.block_2 = ResnetBlock(c, c, groups), ResnetBlock(c, c, groups)
        self.attn_1 = AttnBlock(c, groups) if attention else nn.Identity()

    def forward(self, h):
        return self.block_2(self.attn_1(self.block_1(h)))


class Encoder(nn.Module):
    """Images [B, 3, H, W] -> moments [B, 2C, h, w], before quant_conv."""

    def __init__(self, config):
        super().__init__()
        ch, channels, groups = config["ch"], level_channels(config), config["groups"]
        self.conv_in = nn.Conv2d(3, ch, 3, padding=1)
        self.down = nn.Sequential()
        for i, (cin, cout) in enumerate(zip([ch] + channels[:-1], channels, strict=True)):
            self.down.append(Level(cin, cout, config["num_res_blocks"], i in config["attn_levels"], groups,
                                   downsample=i < len(channels) - 1))
        self.mid = Middle(channels[-1], config["mid_attention"], groups)
        self.norm_out = GroupNorm(groups, channels[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(channels[-1], 2 * config["latent_channels"], 3, padding=1)

    def forward(self, x):
        h = self.mid(self.down(self.conv_in(x)))
        return self.conv_out(F.silu(self.norm_out(h)))


class Decoder(nn.Module):
    """Latents [B, C, h, w], after post_quant_conv -> images [B, 3, H, W]. Runs `up` from last to first."""

    def __init__(self, config):
        super().__init__()
        channels, groups = level_channels(config), config["groups"]
        self.conv_in = nn.Conv2d(config["latent_channels"], channels[-1], 3, padding=1)
        self.mid = Middle(channels[-1], config["mid_attention"], groups)
        self.up = nn.ModuleList()
        for i, (cin, cout) in enumerate(zip(channels[1:] + channels[-1:], channels, strict=True)):
            self.up.append(Level(cin, cout, config["num_res_blocks"] + 1, i in config["attn_levels"], groups,
                                 upsample=i > 0))
        self.norm_out = GroupNorm(groups, channels[0], eps=1e-6)
        self.conv_out = nn.Conv2d(channels[0], 3, 3, padding=1)

    def forward(self, z):
        h = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(h)))


class DiagonalGaussian:
    """The posterior q(z|x): N(mean, exp(logvar)) per latent value. moments: [B, 2C, h, w], the raw encoder
    output."""

    def __init__(self, moments):
        self.moments = moments
        self.mean, logvar = moments.float().chunk(2, dim=1)
        self.logvar = logvar.clamp(-30, 20)

    def sample(self, noise):
        """mean + std * noise; noise ~ N(0, I), [B, C, h, w]."""
        return self.mean + (0.5 * self.logvar).exp() * noise

    def kl(self):
        """KL(q || N(0, I)) in nats, summed over the latent's dimensions: [B]."""
        return 0.5 * (self.mean.square() + self.logvar.exp() - 1 - self.logvar).sum(dim=(1, 2, 3))

    def entropy(self):
        """H(q) in nats: [B]. It is a part of the KL: KL(q || p) = -E_q[log p(z)] - H(q)."""
        return 0.5 * (math.log(2 * math.pi) + 1 + self.logvar).sum(dim=(1, 2, 3))


class AutoencoderKL(nn.Module):
    """The VAE of latent diffusion (arXiv 2112.10752). config: a name in VAES, or a dict like its rows; the
    keys of VAE_DEFAULTS are optional. Raises UserError for an unknown name and for groups that do not divide
    the channels."""

    def __init__(self, config):
        super().__init__()
        if isinstance(config, str):
            if config not in VAES:
                raise UserError(f"--vae {config}: unknown architecture; take one of {', '.join(VAES)}")
            config = VAES[config]
        self.config = config = VAE_DEFAULTS | config
        if any(channels % config["groups"] for channels in level_channels(config)):
            raise UserError(f"the VAE's channels do not divide into {config['groups']} groups")
        c = self.latent_channels = config["latent_channels"]
        self.stride = 2 ** (len(config["ch_mult"]) - 1)
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.quant_conv = nn.Conv2d(2 * c, 2 * c, 1) if config["quant_conv"] else nn.Identity()
        self.post_quant_conv = nn.Conv2d(c, c, 1) if config["post_quant_conv"] else nn.Identity()

    def initialize(self):
        """Set weights for training from scratch:
        - convolutions preserve their input's variance (PyTorch's default leaves a third of it, per layer);
        - residual and attention blocks are the identity (their last convolution is 0), like SiT's;
        - the posterior's std is about exp(-3), so that the decoder sees more than noise."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
                nn.init.zeros_(module.bias)
                if name.endswith(("conv2", "proj_out")):
                    nn.init.zeros_(module.weight)
        nn.init.constant_(self.last_convolution().bias[self.latent_channels:], -6)                   # logvar

    def last_convolution(self):
        """The one that gives the posterior's moments."""
        return self.quant_conv if self.config["quant_conv"] else self.encoder.conv_out

    def fix_posterior_std(self, std):
        """From now on the posterior's standard deviation is `std` everywhere and does not train (as in
        SimFlow, arXiv 2512.04084). It is in the weights: the last convolution's rows for logvar are 0, their
        bias is 2 log std, and no gradient reaches them."""
        last, c = self.last_convolution(), self.latent_channels
        with torch.no_grad():
            last.weight[c:] = 0
            last.bias[c:] = 2 * math.log(std)
        for parameter in (last.weight, last.bias):
            parameter.register_hook(lambda grad: torch.cat([grad[:c], torch.zeros_like(grad[c:])]))

    def latent_size(self, resolution):
        """Height = width of the latents of square images. Raises UserError for a resolution that the stride
        does not divide."""
        if resolution % self.stride:
            raise UserError(f"--resolution {resolution}: not divisible by the VAE's stride {self.stride}")
        return resolution // self.stride

    def encode(self, x):
        """Images [B, 3, H, W] in [-1, 1] -> DiagonalGaussian over [B, C, H/stride, W/stride]."""
        return DiagonalGaussian(self.quant_conv(self.encoder(x)))

    def decode(self, z):
        """Latents [B, C, h, w] -> images [B, 3, h*stride, w*stride], float32, about [-1, 1], not clamped."""
        return self.decoder(self.post_quant_conv(z)).float()

    def forward(self, x, noise):
        """(posterior, z = its sample with `noise`, reconstruction of z)."""
        posterior = self.encode(x)
        z = posterior.sample(noise)
        return posterior, z, self.decode(z)


@torch.no_grad()
def reconstruct(vae, images, batch_size=32):
    """uint8 images [N, 3, H, W] -> (posterior means [N, C, h, w], their decodings, float32 [N, 3, H, W] in
    about [-1, 1]), both on the CPU."""
    device, means, decoded = next(vae.parameters()).device, [], []
    for x in to_float(images).split(batch_size):
        mean = vae.encode(x.to(device, memory_format=memory_format(device))).mean
        means.append(mean.cpu())
        decoded.append(vae.decode(mean).cpu())
    return torch.cat(means), torch.cat(decoded)


# --- The discriminator, the VAE's losses, and metrics of reconstructions ------------------------------------

class Discriminator(nn.Module):
    """PatchGAN (arXiv 1611.07004): images [B, 3, H, W] -> logits [B, 1, h, w], float32 even under autocast.
    Stays in train mode, as in the official code: batch norm uses the statistics of the batch, which are not
    synchronized over processes."""
    MIN_SIZE = 24                                                    # pixels; smaller images give no logit

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
    """The discriminator's loss from its logits of real images and of reconstructions."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


class Normalize(nn.Module):
    """(images [B, 3, H, W] - mean) / std, per color channel."""

    def __init__(self, mean, std):
        super().__init__()
        self.register_buffer("mean_std", torch.tensor([mean, std])[..., None, None], persistent=False)

    def forward(self, x):
        mean, std = self.mean_std                                                                # [3, 1, 1]
        return (x - mean) / std


def unit_length(f, eps=1e-10):
    """Feature maps [B, C, h, w], each position scaled to unit length, in float32."""
    f = f.float()
    return f / (torch.linalg.vector_norm(f, dim=1, keepdim=True) + eps)      # its gradient at 0 is 0, not NaN


def squared_differences(features, x, target):
    """[(a - b)^2] of the feature maps a of x and b of the target, [B, C_i, h_i, w_i]; no gradient into the
    target. features: images -> [maps]."""
    with torch.no_grad():
        target = features(target)
    return [(a - b).square() for a, b in zip(features(x), target, strict=True)]


class LPIPS(nn.Module):
    """Learned perceptual distance (arXiv 1801.03924): squared differences of unit-length VGG16 features,
    weighted by channel, averaged over batch and positions, summed over five layers. heads, vgg: files of the
    channel weights and of torchvision's VGG16; by default those of the `lpips` package and the Hugging Face
    Hub; random: random VGG16, equal weights. Raises UserError for missing weights."""
    LAYERS = {3: 64, 8: 128, 15: 256, 22: 512, 29: 512}                  # relu1_2 ... relu5_3 -> channels

    def __init__(self, heads="", vgg="", random=False):
        super().__init__()
        if not heads and not random:
            spec = importlib.util.find_spec("lpips")                           # found, not imported
            if spec is None:
                raise UserError("LPIPS: no linear heads; pip install lpips, or give the file by --lpips-ckpt")
            heads = Path(spec.origin).parent / "weights/v0.1/vgg.pth"
        try:
            with torch.device("meta" if vgg else "cpu"):                 # a file's weights: initialize none
                net = timm.create_model("vgg16.tv_in1k", pretrained=not (vgg or random))
        except HUB_ERRORS as e:
            reason = type(e).__name__
            raise UserError(f"LPIPS: could not download VGG16 ({reason}); give it by --vgg-ckpt") from None
        self.vgg = net.features[:30]
        self.heads = nn.ParameterList(torch.ones(1, c, 1, 1) / c for c in self.LAYERS.values())
        if vgg:
            state = {key[9:]: t for key, t in load_tensors(vgg).items() if key.startswith("features.")}
            load_into(self.vgg.to_empty(device="cpu"), state, vgg)
        if heads:                                                # lin0.model.1.weight ... lin4.model.1.weight
            state = {key[3]: t for key, t in load_tensors(heads).items() if key.endswith("model.1.weight")}
            load_into(self.heads, state, heads)
        self.normalize = Normalize((-.030, -.088, -.188), (.458, .448, .450))
        self.requires_grad_(False)

    def features(self, x):
        """Images [B, 3, H, W] in [-1, 1] -> five unit-length feature maps. (The official code scaled them to
        [-3, 1] first, until a later fix: its LPIPS values from before are not comparable.)"""
        h, maps = self.normalize(x), []
        for i, layer in enumerate(self.vgg):
            h = layer(h)
            if i in self.LAYERS:
                maps.append(unit_length(h))
        return maps

    def forward(self, x, target):
        """Distance [] of images x from images `target`."""
        layers = zip(squared_differences(self.features, x, target), self.heads, strict=True)
        return sum((square * head).sum(1).mean() for square, head in layers)


def psnr(x, y):
    """Peak signal-to-noise ratio in dB, [B], of images clamped to [-1, 1] (peak 2)."""
    mse = (x.clamp(-1, 1).float() - y.clamp(-1, 1).float()).square().mean(dim=(1, 2, 3))
    return 10 * torch.log10(4 / mse.clamp_min(1e-10))


def ssim(x, y):
    """Structural similarity [B] of images [B, C, H, W] in [-1, 1] (Wang et al. 2004), in float64, averaged
    over channels and over the positions of the Gaussian window (11 x 11, sigma 1.5) inside the image. Raises
    UserError for smaller images."""
    height, width = x.shape[2:]
    require(min(height, width) >= 11, f"SSIM needs images of at least 11 x 11 pixels, not {height} x {width}")
    if x.device.type == "mps":                                                      # it has no float64
        x, y = x.cpu(), y.cpu()
    g = torch.exp(-torch.arange(-5, 6, dtype=torch.float64, device=x.device).square() / (2 * 1.5 ** 2))
    g = (g / g.sum()).view(1, 1, 1, 11)

    def blur(z):                                                  # the Gaussian window, along x, then along y
        return F.conv2d(F.conv2d(z.flatten(0, 1)[:, None], g), g.mT)[:, 0].unflatten(0, z.shape[:2])

    x, y, c1, c2 = (x.double() + 1) / 2, (y.double() + 1) / 2, 0.01 ** 2, 0.03 ** 2
    mx, my, mxx, myy, mxy = (blur(z) for z in (x, y, x * x, y * y, x * y))
    vx, vy, cov = mxx - mx ** 2, myy - my ** 2, mxy - mx * my
    return ((2 * mx * my + c1) * (2 * cov + c2) / ((mx ** 2 + my ** 2 + c1) * (vx + vy + c2))).mean((1, 2, 3))


# --- File formats -------------------------------------------------------------------------------------------

WEIGHTS = [f"diffusion_pytorch_model.{end}" for end in ("safetensors", "fp16.safetensors", "bin", "fp16.bin")]
# Parts of parameter names, CompVis' (ours) -> diffusers'. `up` is also numbered in reverse: with four levels,
# decoder.up.3.block.0.conv1.weight -> decoder.up_blocks.0.resnets.0.conv1.weight.
RENAMED = {
    ".mid.block_1.": ".mid_block.resnets.0.", ".mid.block_2.": ".mid_block.resnets.1.",
    ".mid.attn_1.": ".mid_block.attentions.0.", ".down.": ".down_blocks.", ".up.": ".up_blocks.",
    ".block.": ".resnets.", ".attn.": ".attentions.", ".downsample.": ".downsamplers.0.",
    ".upsample.": ".upsamplers.0.", ".nin_shortcut.": ".conv_shortcut.", ".norm_out.": ".conv_norm_out.",
    ".norm.": ".group_norm.", ".q.": ".to_q.", ".k.": ".to_k.", ".v.": ".to_v.", ".proj_out.": ".to_out.0."}
# diffusers' -> ours, and four names of diffusers before 0.18.
OURS = {theirs: ours for ours, theirs in RENAMED.items()} | {
    ".query.": ".q.", ".key.": ".k.", ".value.": ".v.", ".proj_attn.": ".proj_out."}


def rename(name, levels, table):
    """A parameter's name in diffusers (table RENAMED) or in CompVis' code (table OURS)."""
    name = re.sub(r"(\.up(?:_blocks)?\.)(\d+)", lambda m: f"{m[1]}{levels - 1 - int(m[2])}", name)
    for old, new in table.items():
        name = name.replace(old, new)
    return name


def find_vae(state, what):
    """A VAE's tensors under CompVis' names. They may be nested under "state_dict", "vae" or "model", have a
    prefix (first_stage_model.encoder.conv_in.weight), and be among others (loss.logvar). what: the file, for
    messages. Raises UserError."""
    for key in ("state_dict", "vae", "model"):
        if isinstance(state.get(key), dict):
            state = state[key]
    state, first = strip_wrappers(state), "encoder.conv_in.weight"
    prefixes = sorted(key.removesuffix(first) for key in state if f".{key}".endswith(f".{first}"))
    if len(prefixes) != 1 and "" not in prefixes:
        raise UserError(f"{what}: {len(prefixes) or 'no'} VAEs in it (keys ending in {first})")
    prefix = prefixes[0]                                             # "" where it is one of several
    parts = tuple(prefix + part for part in ("encoder.", "decoder.", "quant_conv.", "post_quant_conv."))
    tensors = {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(parts)}
    for key, tensor in tensors.items():
        floats = isinstance(tensor, torch.Tensor) and tensor.is_floating_point()             # not quantized
        if not floats or not tensor.float().isfinite().all():
            raise UserError(f"{what}: {key} holds values that are not finite floats")
    levels = len({key.split(".")[2] for key in tensors if key.startswith("decoder.up_blocks.")})
    if levels:              # diffusers' names; its attention has linear layers, ours 1x1 convolutions
        tensors = {rename(key, levels, OURS): tensor[..., None, None] if tensor.ndim == 2 else tensor
                   for key, tensor in tensors.items()}
    return tensors


def read_architecture(state, what):
    """The config of a VAE, inferred from its tensors: the row of VAES that has their shapes, else a dict like
    one without `groups`, which cannot be inferred. Raises UserError."""
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
        if VAE_DEFAULTS | row | config == VAE_DEFAULTS | row:
            return row
    return config


def read_diffusers_folder(folder):
    """(weights file, groups, (mean [C], std [C]) of the latents) of a diffusers AutoencoderKL folder, with
    diffusers' defaults for keys that config.json lacks. FLUX.2's VAE is an AutoencoderKL with a batch norm of
    patches of its latents; the norm is left out, and there are no statistics (None). Raises UserError."""
    try:
        config = json.loads((folder / "config.json").read_text())
        kind, activation = config.get("_class_name", "AutoencoderKL"), config.get("act_fn", "silu")
        scale, groups = config.get("scaling_factor", 0.18215), config.get("norm_num_groups", 32)
        if kind == "AutoencoderKLQwenImage":
            raise ValueError("AutoencoderKLQwenImage, a causal 3D VAE")
        if (kind not in ("AutoencoderKL", "AutoencoderKLFlux2") or activation != "silu"
                or not isinstance(groups, int) or groups < 1):
            raise ValueError(f"{kind}, {activation}, {groups} groups")
        ones = torch.ones(config.get("latent_channels", 4))
        mean = ones * torch.tensor(config.get("latents_mean") or config.get("shift_factor") or 0.0)
        std = ones * torch.tensor(config.get("latents_std") or 1.0)   # pipelines take z * std / scale + mean
        stats = mean, std / (1.0 if scale is None else scale)
        if kind == "AutoencoderKLFlux2":
            stats = None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError) as e:
        raise UserError(f"{folder}: not a diffusers AutoencoderKL (config.json: {one_line(e)})") from None
    for weights in WEIGHTS:
        if (folder / weights).is_file():
            return folder / weights, groups, stats
    raise UserError(f"{folder}: no weights in it; looked for {', '.join(WEIGHTS)}")


def fetch(hub_id):
    """Download config.json and weights of a VAE, OWNER/NAME or OWNER/NAME/SUBFOLDER, from the Hugging Face
    Hub; its folder. Raises UserError."""
    owner, name, *subfolder = hub_id.split("/")
    inside = "".join(f"{part}/" for part in subfolder)
    try:
        for weights in WEIGHTS:
            patterns = [f"{inside}config.json", f"{inside}{weights}"]
            folder = Path(snapshot_download(f"{owner}/{name}", allow_patterns=patterns), inside)
            if (folder / weights).exists():
                break
    except HUB_ERRORS as e:
        raise UserError(f"{hub_id}: not found locally and could not be downloaded ({type(e).__name__}); give "
                        "a local path, or accept the repository's licence and type hf auth login") from None
    require((folder / "config.json").is_file(),
            f"{hub_id}: no config.json there; the VAE of a pipeline is OWNER/NAME/vae")
    return folder


def read_statistics(file):
    """(mean [C], std [C]) from the official code's NAME-latents-stats.pt. Raises UserError."""
    saved = load_tensors(file)
    try:
        return saved["latents_bias"].flatten().float(), 1 / saved["latents_scale"].flatten().float()
    except (TypeError, KeyError, AttributeError):
        raise UserError(f"{file}: latents_scale and latents_bias are not in it") from None


def load_vae(path):
    """Load a VAE from a weights file, a training checkpoint, a diffusers folder or a Hugging Face Hub id.
    Returns (AutoencoderKL in float32, (mean [C], std [C]) of its latents or None). The statistics come from
    - a training checkpoint's latent norm,
    - a diffusers folder's config.json, or
    - for weights NAME.pt, the official code's NAME-latents-stats.pt beside it (latents_bias = mean,
      latents_scale = 1 / std).
    Raises UserError."""
    file, groups, stats = Path(path), None, None
    is_weights = file.suffix in (".pt", ".pth", ".ckpt", ".bin", ".safetensors")
    if not file.exists() and not is_weights and re.fullmatch(r"[\w-]+(/[\w.-]+)+", str(path)):  # OWNER/NAME
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
        groups = ckpt["args"].get("vae_groups")                          # not in the official checkpoints
    tensors = find_vae(content, path)
    config = read_architecture(tensors, path)
    if groups:
        config = config | dict(groups=groups)
    with torch.device("meta"):
        vae = AutoencoderKL(config)
    load_into(vae.to_empty(device="cpu"), tensors, path)
    if stats and not all(s.shape == (vae.latent_channels,) and s.isfinite().all() for s in stats):
        raise UserError(f"{path}: its latent statistics are not {vae.latent_channels} finite numbers")
    return vae, stats


def export_vae(vae, stats, resolution, folder):
    """Write a diffusers AutoencoderKL folder; config.json last, so that a folder is whole if it has one.
    stats: (mean, std) of the latents, [C]. Raises UserError where `folder` exists."""
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
        block_out_channels=level_channels(cfg),
        layers_per_block=cfg["num_res_blocks"], latent_channels=vae.latent_channels,
        norm_num_groups=cfg["groups"], mid_block_add_attention=cfg["mid_attention"],
        use_quant_conv=cfg["quant_conv"], use_post_quant_conv=cfg["post_quant_conv"],
        scaling_factor=1.0,                                     # pipelines apply it as well as latents_std
        latents_mean=stats[0].tolist(), latents_std=stats[1].tolist())
    tensors = {}
    for name, tensor in vae.state_dict().items():
        linear = ".attn" in name and tensor.ndim == 4
        tensors[rename(name, levels, RENAMED)] = (tensor[..., 0, 0] if linear else tensor).contiguous()
    write_atomic(folder / WEIGHTS[0], lambda file: save_file(tensors, file, metadata={"format": "pt"}))
    write_atomic(folder / "config.json", lambda file: file.write_text(json.dumps(config, indent=2) + "\n"))


# --- The command --------------------------------------------------------------------------------------------

def main():
    parser = Parser(description="Write a training checkpoint's VAE as a diffusers AutoencoderKL folder.")
    parser.add_argument("command", choices=["export"])
    parser.add_argument("vae", metavar="CKPT", type=path_name,
                        help="a training checkpoint, ours or the official code's")
    parser.add_argument("out", metavar="DIR", type=path_name, help="a new folder")
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
