"""What people's files hold: pixel formats, folders with odd names and links, autoencoders as they were saved."""
import argparse
import errno
import io
import json
import math
import os
import struct
import sys
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from support import commands, files
import vae
from support.commands import UserError


# --- pixels ---------------------------------------------------------------------------------------------------

def rgba(*pixel):
    return Image.new("RGBA", (8, 8), pixel)


def grey16(values, mode="<u2"):
    return Image.fromarray(np.full((8, 8), values, np.dtype(mode)))


def png16(colour_type, samples, trns=b""):
    """An 8x8 PNG of 16 bits a sample, every pixel the same (Pillow writes 16 bits for grey alone)."""
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    row = b"\0" + struct.pack(f">{len(samples)}H", *samples) * 8
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 16, colour_type, 0, 0, 0))
            + (chunk(b"tRNS", trns) if trns else b"") + chunk(b"IDAT", zlib.compress(row * 8)) + chunk(b"IEND", b""))


def srgb_of_lab(l, a, b):
    """CIE L*a*b* (D50) -> sRGB in 0..255: the formulas of CIE 15 and the Bradford-adapted matrix of sRGB."""
    f = (l + 16) / 116
    xyz = [w * (t ** 3 if t > 6 / 29 else 3 * (6 / 29) ** 2 * (t - 4 / 29))
           for w, t in zip((0.9642, 1.0, 0.8249), (f + a / 500, f, f - b / 200))]
    matrix = [[3.1338561, -1.6168667, -0.4906146], [-0.9787684, 1.9161415, 0.0334540], [0.0719453, -0.2289914, 1.4052427]]
    linear = [sum(m * v for m, v in zip(row, xyz)) for row in matrix]
    return [255 * (12.92 * c if c <= 0.0031308 else 1.055 * c ** (1 / 2.4) - 0.055) for c in linear]


half = np.zeros((8, 8), np.uint16)
half[:, 4:] = 40000
unit = np.full((8, 8), 0.5, np.float32)
palette = Image.new("P", (8, 8), 1)
palette.putpalette([0, 0, 0, 10, 20, 30])
FORMATS = [                                                # name, image or bytes, what saves it, mean of R, G, B
    ("1.png", Image.new("1", (8, 8), 1), {}, [255] * 3),
    ("L.png", Image.new("L", (8, 8), 100), {}, [100] * 3),
    ("L-trns.png", Image.new("L", (8, 8), 100), dict(transparency=100), [255] * 3),
    ("LA.png", Image.new("LA", (8, 8), (100, 51)), {}, [255 - 155 * 0.2] * 3),
    ("P.png", palette, {}, [10, 20, 30]),
    ("P-trns.png", palette, dict(transparency=1), [255] * 3),
    ("P.gif", palette, {}, [10, 20, 30]),
    ("RGB-trns.png", Image.new("RGB", (8, 8), (1, 2, 3)), dict(transparency=(1, 2, 3)), [255] * 3),
    ("RGBA.png", rgba(200, 100, 0, 51), {}, [255 - 55 * 0.2, 255 - 155 * 0.2, 255 - 255 * 0.2]),
    ("RGBA.webp", rgba(200, 100, 0, 51), dict(lossless=True), [255 - 55 * 0.2, 255 - 155 * 0.2, 255 - 255 * 0.2]),
    ("RGBA.tiff", rgba(200, 100, 0, 51), {}, [255 - 55 * 0.2, 255 - 155 * 0.2, 255 - 255 * 0.2]),
    ("16.png", grey16(32896), {}, [128] * 3),
    ("16-trns.png", Image.fromarray(half), dict(transparency=0), [(255 + 40000 / 257) / 2] * 3),
    ("16-trns-unused.png", Image.fromarray(half), dict(transparency=7), [40000 / 257 / 2] * 3),
    ("16.tiff", grey16(32896), {}, [128] * 3),
    ("16-big-endian.tiff", grey16(32896, ">u2"), {}, [128] * 3),
    ("16-white-is-0.tiff", grey16(12850), dict(tiffinfo={262: 0}), [205] * 3),
    ("I.tiff", grey16(32896, "<i4"), {}, [128] * 3),
    ("16.pgm", grey16(32896), {}, [128] * 3),
    ("RGB16.png", png16(2, (51400, 25700, 0)), {}, [200, 100, 0]),
    ("RGBA16.png", png16(6, (51400, 25700, 0, 13107)), {}, [255 - 55 * 0.2, 255 - 155 * 0.2, 255 - 255 * 0.2]),
    ("LA16.png", png16(4, (25700, 13107)), {}, [255 - 155 * 0.2] * 3),
    ("F-unit.tiff", Image.fromarray(unit), {}, [127.5] * 3),
    ("F-overshoot.tiff", Image.fromarray(unit * 2.1), {}, [255] * 3),
    ("F-255.tiff", Image.fromarray(unit * 200), {}, [100] * 3),
    ("F.pfm", Image.fromarray(unit), {}, [127.5] * 3),
    ("CMYK.jpg", Image.new("CMYK", (8, 8), (0, 255, 255, 0)), dict(quality=100), [255, 0, 0]),
    ("CMYK.tiff", Image.new("CMYK", (8, 8), (51, 0, 255, 51)), {}, [204 * 204 / 255, 204, 0]),
    ("YCbCr.jpg", Image.new("RGB", (8, 8), (200, 100, 50)), dict(quality=100), [200, 100, 50]),
    ("YCbCr.tiff", Image.new("YCbCr", (8, 8), (128, 128, 208)), {}, [128 + 1.402 * 80, 128 - 0.714 * 80, 128]),
    ("LAB.tiff", Image.new("LAB", (8, 8), (128, 148, 158)), {}, srgb_of_lab(128 / 2.55, 20, 30)),
    ("RGB.ppm", Image.new("RGB", (8, 8), (200, 100, 50)), {}, [200, 100, 50]),
]


@pytest.mark.parametrize("name, image, how, means", FORMATS, ids=[row[0] for row in FORMATS])
def test_pixels_of_every_format(name, image, how, means, tmp_path):
    if isinstance(image, bytes):
        (tmp_path / name).write_bytes(image)
    else:
        image.save(tmp_path / name, **how)
    for size in (None, 8):
        read = images.read_image(tmp_path / name, size)
        assert read.dtype == torch.uint8 and read.shape == (3, 8, 8)
        assert read.float().mean((1, 2)).tolist() == pytest.approx(means, abs=1.5)


@pytest.mark.parametrize("values", [np.full((8, 8), 70000, np.int32), np.full((8, 8), -1, np.int32),
                                    np.full((8, 8), 4000, np.float32), np.full((8, 8), np.nan, np.float32)])
def test_grey_values_of_unknown_range_are_refused(values, tmp_path):
    Image.fromarray(values).save(tmp_path / "odd.tiff")
    with pytest.raises(UserError, match="odd.tiff: cannot be read .grey values from"):
        images.read_image(tmp_path / "odd.tiff")


def test_12_bit_tiff(tmp_path):
    """Pillow reads 12 bits but does not write them: two samples 0x800 in three bytes, in a TIFF made by hand."""
    data = bytes([0x80, 0x08, 0x00] * 32)
    tags = {256: 8, 257: 8, 258: 12, 259: 1, 262: 1, 273: 8, 277: 1, 278: 8, 279: len(data)}
    ifd = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHIHH", k, 3, 1, v, 0) for k, v in tags.items())
    (tmp_path / "a.tiff").write_bytes(struct.pack("<2sHI", b"II", 42, 8 + len(data)) + data + ifd + bytes(4))
    assert images.read_image(tmp_path / "a.tiff").float().mean().item() == pytest.approx(2048 / 4095 * 255, abs=0.5)


def test_jpegs_are_read_exactly_unless_fast(tmp_path):
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)).resize((256, 256), Image.BICUBIC)
    picture.save(tmp_path / "a.jpg", quality=95)
    exact, fast = (images.read_image(tmp_path / "a.jpg", 64, fast).permute(1, 2, 0).numpy() for fast in (False, True))
    decoded = Image.open(tmp_path / "a.jpg").convert("RGB")
    assert np.array_equal(exact, decoded.resize((128, 128), Image.BOX).resize((64, 64), Image.BOX))
    assert 0.05 < abs(fast.astype(int) - exact).mean() < 10
    small = Image.fromarray(rng.integers(0, 256, (100, 130, 3), np.uint8))
    small.save(tmp_path / "b.jpg")
    assert torch.equal(images.read_image(tmp_path / "b.jpg", 64), images.read_image(tmp_path / "b.jpg", 64, fast=True))


def test_exif_does_not_rotate(tmp_path):
    picture, exif = Image.new("RGB", (10, 20), "red"), Image.Exif()
    exif[274] = 6
    picture.save(tmp_path / "a.jpg", exif=exif)
    assert images.read_image(tmp_path / "a.jpg").shape == (3, 20, 10)


# --- folders --------------------------------------------------------------------------------------------------

def test_suffixes(tmp_path):
    pictures = ("png PNG jpg jpeg jpe jfif webp bmp gif tif tiff ppm pgm pbm pnm tga jp2 avif ico qoi mpo dds").split()
    others = "pdf mpg mpeg h5 hdf bufr grib eps ps wmf emf fits txt npy json".split()
    for i, suffix in enumerate(pictures + others):
        (tmp_path / f"{i:02d}.{suffix}").touch()
    (tmp_path / "README").touch()
    (tmp_path / ".hidden.png").touch()
    counts = Counter()
    found = images.list_images(tmp_path, others=counts)
    assert [path.name.split(".")[1] for path in found] == pictures
    assert counts == Counter({f".{suffix}": 1 for suffix in others} | {"no suffix": 1})


def test_folders_without_images(tmp_path):
    with pytest.raises(UserError, match="no images in it, it is empty"):
        images.list_images(tmp_path)
    for name in ("a.npz", "b.npz", "c.txt"):
        (tmp_path / name).touch()
    with pytest.raises(UserError, match="no images in it, 2 of .npz, 1 of .txt"):
        images.list_images(tmp_path)
    with pytest.raises(UserError, match="nowhere: no such folder"):
        images.list_images(tmp_path / "nowhere")


def test_links(tmp_path):
    """Links are followed, each path listed; links to nothing, to themselves and up the tree end nothing."""
    (tmp_path / "data/a").mkdir(parents=True)
    (tmp_path / "store").mkdir()
    for file in ("data/a/0.png", "store/1.png"):
        (tmp_path / file).touch()
    links = dict(linked="../store", again="../store", up="..", here="a", gone="nowhere", itself="itself")
    for name, target in links.items():
        os.symlink(target, tmp_path / "data" / name)
    for name, target in {"gone.png": "nowhere.png", "itself.png": "itself.png", "file.png": "0.png", "loop": "."}.items():
        os.symlink(target, tmp_path / "data/a" / name)
    os.mkfifo(tmp_path / "data/a/pipe.png")                                  # opening it would wait for ever
    found = [str(path.relative_to(tmp_path / "data")) for path in images.list_images(tmp_path / "data")]
    inside = ["a/0.png", "a/file.png", "again/1.png", "here/0.png", "here/file.png", "linked/1.png"]
    assert [path for path in found if not path.startswith("up/")] == inside
    assert [path for path in found if path.startswith("up/")] == ["up/store/1.png"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_folder_is_not_passed_over(tmp_path):
    (tmp_path / "0.png").touch()
    (tmp_path / "locked").mkdir(mode=0)
    with pytest.raises(UserError, match="locked: no such folder, or not readable .Permission denied"):
        images.list_images(tmp_path)


@pytest.fixture
def command(monkeypatch):
    """What a command of ours prints on strictly UTF-8 streams, and its exit code."""
    def run(main):
        streams = [io.TextIOWrapper(io.BytesIO(), "utf-8", errors="strict") for _ in range(2)]
        monkeypatch.setattr(sys, "stdout", streams[0])
        monkeypatch.setattr(sys, "stderr", streams[1])
        with pytest.raises(SystemExit) as e:
            commands.run_command(main)
        for stream in streams:
            stream.flush()
        return *(stream.buffer.getvalue().decode() for stream in streams), e.value.code
    return run


def test_names_that_are_no_utf8(tmp_path, command):
    name = os.path.join(os.fsencode(tmp_path), b"caf\xe9.png")
    Image.new("RGB", (8, 8), (1, 2, 3)).save(tmp_path / "a.tmp", format="PNG")
    os.rename(tmp_path / "a.tmp", name)
    (path,) = images.list_images(tmp_path)
    assert os.fsencode(path) == name and images.read_image(path).float().mean((1, 2)).tolist() == [1, 2, 3]

    def main():
        print(path)
        raise UserError(f"{path}: as it is")

    out, err, code = command(main)
    assert out.endswith("caf\\udce9.png\n") and err.endswith("caf\\udce9.png: as it is\n") and code == 2


@pytest.mark.parametrize("path", ["/proc/nowhere/out.png", "/dev/null/out.png", "{tmp}/file/out.png", "{tmp}/" + "n" * 300,
                                  "{tmp}/folder", "{tmp}"])
def test_files_that_cannot_be_written(path, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    path = path.format(tmp=tmp_path)
    with pytest.raises(UserError, match="^cannot write [^\n]*$"):
        files.write_atomic(path, lambda tmp: Path(tmp).write_text("x"))
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file", "folder"]


def test_which_errors_are_one_line(command):
    for main, words in ((lambda: os.makedirs("/proc/nowhere/x"), "/proc/nowhere"), (lambda: open("/nowhere"), "/nowhere")):
        out, err, code = command(main)
        assert code == 2 and err.startswith("error: ") and err.count("\n") == 1 and words in err

    def fail(*args):
        raise OSError(*args)

    out, err, code = command(lambda: fail(errno.ENOSPC, "full"))
    assert code == 2 and err.count("\n") == 1 and "full" in err
    with pytest.raises(OSError, match="a bug"):
        commands.run_command(lambda: fail("a bug"))


# --- arguments ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind, good, bad", [
    ("positive_int", {"1": 1, "20": 20}, ["0", "-1", "1.5", "x", ""]),
    ("count", {"0": 0, "7": 7}, ["-1", "0.5", "nan"]),
    ("positive", {"1e-4": 1e-4, "3": 3.0}, ["0", "-1", "inf", "nan", "x"]),
    ("non_negative", {"0": 0.0, "2.5": 2.5}, ["-1e-9", "inf", "nan", "x"]),
    ("fraction", {"0": 0.0, "1": 1.0, "0.1": 0.1}, ["-0.1", "1.1", "nan", "inf", ""]),
    ("existing_path", {"/": "/", __file__: __file__}, ["/nowhere", ""]),
    ("existing_folder", {"/": "/"}, ["/nowhere", __file__])])
def test_argument_types(kind, good, bad):
    parser = commands.Parser()
    parser.add_argument("--x", type=getattr(vae, kind))
    for text, value in good.items():
        x = parser.parse_args([f"--x={text}"]).x
        assert x == value and type(x) is type(value)
    for text in bad:
        with pytest.raises(UserError, match="^argument --x: must be [^\n]*see --help.$"):
            parser.parse_args([f"--x={text}"])


# --- autoencoders as they were saved --------------------------------------------------------------------------

SMALL = dict(ch=32, ch_mult=(1, 2), num_res_blocks=1, attn_levels=(), latent_channels=4)


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    return vae.AutoencoderKL(SMALL)


def same(net, state):
    own = net.state_dict()
    return own.keys() == state.keys() and all(torch.equal(t, state[k].float()) for k, t in own.items())


WRAPPED = {
    "bare": lambda s: s,
    "state_dict": lambda s: {"epoch": 3, "state_dict": s},
    "beside": lambda s: {"state_dict": s | {"loss.logvar": torch.zeros(()), "loss.discriminator.main.0.weight": torch.ones(2),
                                            "model_ema.num_updates": torch.tensor(5), "linear_proj.weight": torch.ones(2, 2)}},
    "first_stage": lambda s: {f"first_stage_model.{k}": t for k, t in s.items()} | {"model.diffusion_model.out.weight": torch.ones(2)},
    "ddp": lambda s: {f"module.{k}": t for k, t in s.items()},
    "compiled": lambda s: {f"_orig_mod.module.{k}": t for k, t in s.items()},
    "compiled parts": lambda s: {k.replace("coder.", "coder._orig_mod."): t for k, t in s.items()},
    "half": lambda s: {k: t.half() for k, t in s.items()},
    "vae": lambda s: {"vae": s, "steps": 4},
}


@pytest.mark.parametrize("form", WRAPPED)
@pytest.mark.parametrize("suffix", ["pt", "bin", "ckpt"])
def test_a_vae_as_it_was_saved(form, suffix, small, tmp_path):
    torch.save(WRAPPED[form](small.state_dict()), tmp_path / f"a.{suffix}")
    net, stats = vae.load_vae(tmp_path / f"a.{suffix}")
    state = small.state_dict()
    assert same(net, {k: t.half() for k, t in state.items()} if form == "half" else state) and stats is None
    assert all(t.dtype == torch.float32 for t in net.state_dict().values())


def test_wrappers_go_wherever_they_stand():
    state = {"module.a.weight": 1, "b._orig_mod.c": 2, "_orig_mod.module.d": 3, "submodule.e": 4, "modules.f": 5}
    assert files.strip_wrappers(state) == {"a.weight": 1, "b.c": 2, "d": 3, "submodule.e": 4, "modules.f": 5}


@pytest.mark.parametrize("state, message", [
    ({"blocks.0.weight": torch.ones(2)}, "no VAEs in it .keys ending in encoder.conv_in.weight.; its keys are blocks.0.weight"),
    ([torch.ones(2)], "no state dict in it"),
    ({"encoder.conv_in.weight": torch.ones(4, 3, 3, 3)}, "no AutoencoderKL in it"),
    ({"encoder.conv_in.weight": torch.ones(4, 3, 3, 3, dtype=torch.int8)}, "encoder.conv_in.weight holds values that are not finite floats"),
    ({f"{k}.encoder.conv_in.weight": torch.ones(4, 3, 3, 3) for k in "ab"}, "2 VAEs in it .*its keys are a., b."),
    ({"encoder.conv_in.weight": torch.full((4, 3, 3, 3), math.inf)}, "not finite")])
def test_what_is_no_vae_is_said_truly(state, message, tmp_path):
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(UserError, match=f"^[^\n]*a.pt: [^\n]*{message}"):
        vae.load_vae(tmp_path / "a.pt")


def test_groups_are_the_named_ones_or_the_checkpoints(tmp_path):
    """No tensor shows the groups of a norm: f4d8's shapes have 1, other VAEs 32, unless the file says otherwise."""
    torch.manual_seed(0)
    for config, groups, saved in (("f4d8", 1, {}), ("f4d32", 1, {}), (SMALL, 32, {}),
                                  (SMALL | dict(groups=16), 16, dict(vae_groups=16))):
        net = vae.AutoencoderKL(config)
        ckpt = dict(ema={}, model={}, args=saved, steps=0, vae=net.state_dict())
        torch.save(ckpt, tmp_path / "a.pt")
        assert vae.load_vae(tmp_path / "a.pt")[0].config == net.config and net.config["groups"] == groups
        torch.save(ckpt | dict(args=argparse.Namespace(**saved)), tmp_path / "a.pt")
        assert vae.load_vae(tmp_path / "a.pt")[0].config == net.config
    torch.save(vae.AutoencoderKL(SMALL | dict(ch=24, groups=8)).state_dict(), tmp_path / "odd.pt")
    with pytest.raises(UserError, match="do not divide into 32 groups"):
        vae.load_vae(tmp_path / "odd.pt")


def test_a_name_asks_for_its_architecture(small, tmp_path):
    torch.save(small.state_dict(), tmp_path / "a.pt")
    with pytest.raises(UserError, match="size mismatch|Missing|Unexpected"):
        vae.load_vae(tmp_path / "a.pt", "f4d8")
    with pytest.raises(UserError, match="f9d9: unknown architecture; take one of f8d4, f16d32, f4d8, f4d32"):
        vae.load_vae(tmp_path / "a.pt", "f9d9")
    torch.manual_seed(0)
    net = vae.AutoencoderKL("f4d8")
    vae.export_vae(net, (torch.zeros(8), torch.ones(8)), 32, tmp_path / "out")
    older = {name: t for name, t in files.load_file(tmp_path / "out/diffusion_pytorch_model.safetensors").items()}
    for new, old in dict(to_q="query", to_k="key", to_v="value").items():            # as diffusers wrote before 0.18
        older = {name.replace(f".{new}.", f".{old}."): t for name, t in older.items()}
    torch.save({name.replace(".to_out.0.", ".proj_attn."): t for name, t in older.items()}, tmp_path / "older.pt")
    for name in (None, "f4d8"):
        assert same(vae.load_vae(tmp_path / "older.pt", name)[0], net.state_dict())


CONFIGS = {                                                # diffusers' settings -> ours, written out
    "sd3-like": (dict(block_out_channels=(32, 64, 64, 128), layers_per_block=1, latent_channels=16, use_quant_conv=False,
                      use_post_quant_conv=False, scaling_factor=1.5305, shift_factor=0.0609), (),
                 dict(ch=32, ch_mult=(1, 2, 2, 4), num_res_blocks=1, attn_levels=(), latent_channels=16, groups=32,
                      quant_conv=False, post_quant_conv=False, mid_attention=True)),
    "attention": (dict(block_out_channels=(32, 64, 96), layers_per_block=2, latent_channels=4), (1, 2),
                  dict(ch=32, ch_mult=(1, 2, 3), num_res_blocks=2, attn_levels=(1, 2), latent_channels=4, groups=32,
                       quant_conv=True, post_quant_conv=True, mid_attention=True)),
    "plain middle": (dict(block_out_channels=(64, 96), layers_per_block=1, latent_channels=3, mid_block_add_attention=False,
                          use_post_quant_conv=False, norm_num_groups=16), (),
                     dict(ch=64, ch_mult=(1, 1.5), num_res_blocks=1, attn_levels=(), latent_channels=3, groups=16,
                          quant_conv=True, post_quant_conv=False, mid_attention=False)),
}


@pytest.fixture(scope="module", params=CONFIGS)
def theirs(request):
    """A randomly initialised AutoencoderKL of diffusers (norms and biases too), and the config that ours should have."""
    diffusers = pytest.importorskip("diffusers")
    settings, attention, ours = CONFIGS[request.param]
    levels = range(len(settings["block_out_channels"]))
    kinds = ["Attn" if i in attention else "" for i in levels]
    torch.manual_seed(1)
    net = diffusers.AutoencoderKL(down_block_types=[f"{kind}DownEncoderBlock2D" for kind in kinds],
                                  up_block_types=[f"{kind}UpDecoderBlock2D" for kind in kinds[::-1]], **settings).eval()
    for parameter in net.parameters():
        if parameter.ndim == 1:
            parameter.data.add_(torch.randn_like(parameter) * 0.2)
    return net, ours


def agree(ours, theirs):
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        expected, got = theirs.encode(x).latent_dist, ours.encode(x)
        assert torch.allclose(got.moments, expected.parameters, rtol=1e-4, atol=1e-5) and expected.parameters.std() > 0.05
        rec = theirs.decode(expected.mean).sample
        assert torch.allclose(ours.decode(expected.mean), rec, rtol=1e-4, atol=1e-5) and rec.std() > 0.05


@pytest.mark.parametrize("how", [{}, dict(safe_serialization=False), dict(variant="fp16"),
                                 dict(variant="fp16", safe_serialization=False)], ids=str)
def test_any_autoencoder_of_diffusers(how, theirs, tmp_path):
    net, config = theirs
    net.save_pretrained(tmp_path, **how)
    ours, (mean, std) = vae.load_vae(tmp_path)
    assert ours.config == config and ours.stride == 2 ** (len(config["ch_mult"]) - 1)
    agree(ours, net)
    channels = config["latent_channels"]
    assert torch.allclose(mean, torch.full((channels,), net.config.shift_factor or 0.0))
    assert torch.allclose(std, torch.full((channels,), 1 / net.config.scaling_factor))


def test_any_autoencoder_is_exported(theirs, tmp_path):
    net, config = theirs
    torch.manual_seed(2)
    ours, channels = vae.AutoencoderKL(config).eval(), config["latent_channels"]
    stats = torch.linspace(-1, 1, channels), torch.linspace(0.5, 2, channels)
    vae.export_vae(ours, stats, 32, tmp_path / "out")
    back = type(net).from_pretrained(tmp_path / "out").eval()
    agree(ours, back)
    assert back.config.latents_std == pytest.approx(stats[1].tolist()) and back.config.scaling_factor == 1
    again, stats_again = vae.load_vae(tmp_path / "out")
    assert again.config == config and same(again, ours.state_dict())
    assert all(torch.allclose(a, b) for a, b in zip(stats, stats_again))


def test_compvis_names_of_any_autoencoder(theirs, tmp_path):
    """The same tensors under CompVis' names, as FLUX' own ae.safetensors has them."""
    net, config = theirs
    net.save_pretrained(tmp_path / "folder")
    ours, _ = vae.load_vae(tmp_path / "folder")
    vae.save_file(ours.state_dict(), tmp_path / "ae.safetensors")
    if config["groups"] == 32:
        agree(vae.load_vae(tmp_path / "ae.safetensors")[0], net)


def test_a_config_that_leaves_things_out(small, tmp_path):
    """As diffusers reads it: sd-vae-ft-mse's config.json has no scaling_factor, and SD's is 0.18215."""
    stats = torch.zeros(4), torch.ones(4)
    vae.export_vae(small, stats, 32, tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    for key in ("scaling_factor", "latents_mean", "latents_std", "norm_num_groups", "use_quant_conv"):
        del config[key]
    (tmp_path / "out/config.json").write_text(json.dumps(config))
    net, (mean, std) = vae.load_vae(tmp_path / "out")
    assert same(net, small.state_dict()) and mean.tolist() == [0] * 4 and std.tolist() == pytest.approx([1 / 0.18215] * 4)
    for change, message in ((dict(_class_name="AutoencoderDC"), "AutoencoderDC"), (dict(act_fn="relu"), "relu"),
                            (dict(norm_num_groups=-8), "-8 groups"), (dict(scaling_factor=0), "not 4 finite"),
                            (dict(norm_num_groups=12), "do not divide into 12 groups")):
        (tmp_path / "out/config.json").write_text(json.dumps(config | change))
        with pytest.raises(UserError, match=message):
            vae.load_vae(tmp_path / "out")
    (tmp_path / "out/config.json").write_text(json.dumps(config))
    (tmp_path / "out/diffusion_pytorch_model.safetensors").rename(tmp_path / "out/model.safetensors")
    with pytest.raises(UserError, match="no weights in it; looked for diffusion_pytorch_model.safetensors"):
        vae.load_vae(tmp_path / "out")


def test_a_checkpoint_with_a_frozen_vae_says_what_to_give(tmp_path):
    torch.save(dict(ema={}, model={}, args={}, steps=0), tmp_path / "a.pt")
    with pytest.raises(UserError, match="a.pt: no VAE in this checkpoint, it was frozen; give its file by --vae-ckpt"):
        vae.load_vae(tmp_path / "a.pt")


def test_export_command(small, tmp_path, command, monkeypatch):
    ema = {"bn.running_mean": torch.arange(4.0), "bn.running_var": torch.ones(4)}
    torch.save(dict(ema=ema, model={}, args={}, steps=0, vae=small.state_dict()), tmp_path / "a.pt")
    monkeypatch.setattr(sys, "argv", ["vae.py", "export", str(tmp_path / "a.pt"), str(tmp_path / "out"), "--resolution=64"])
    vae.main()
    net, (mean, std) = vae.load_vae(tmp_path / "out")
    assert same(net, small.state_dict()) and mean.tolist() == [0, 1, 2, 3]
    assert std.tolist() == pytest.approx([math.sqrt(1 + 1e-4)] * 4)
    assert json.loads((tmp_path / "out/config.json").read_text())["sample_size"] == 64
    assert "out: exists already" in command(vae.main)[1]
    torch.save(small.state_dict(), tmp_path / "a.pt")
    assert "a.pt: no latent statistics" in command(vae.main)[1]
    monkeypatch.setattr(sys, "argv", ["vae.py", "import", "x", "y"])
    assert "invalid choice" in command(vae.main)[1]


@pytest.mark.parametrize("n, columns, scale, size", [(5, 3, 1, (28, 18)), (1, 4, 2, (76, 16)), (6, 3, 2, (56, 36))])
def test_image_grid(n, columns, scale, size):
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 255, (n, 3, 8, 8), np.uint8))
    grid = pictures.image_grid(images, columns, scale)
    assert grid.size == size
    pixels, white = np.asarray(grid)[::scale, ::scale], np.ones((size[1] // scale, size[0] // scale), bool)
    for i, image in enumerate(images):
        top, left = i // columns * 10, i % columns * 10
        assert np.array_equal(pixels[top:top + 8, left:left + 8], image.permute(1, 2, 0))
        white[top:top + 8, left:left + 8] = False
    assert (pixels[white] == 255).all()


def test_what_diffusers_cannot_hold_is_not_exported(tmp_path):
    net = vae.AutoencoderKL(SMALL | dict(ch_mult=(2, 2)))
    with pytest.raises(UserError, match="first level"):
        vae.export_vae(net, (torch.zeros(4), torch.ones(4)), 32, tmp_path / "out")
    assert not (tmp_path / "out").exists()
