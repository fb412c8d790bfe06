"""SiT: its names and sizes, and the weights it starts from."""
import math

import pytest
import torch
import torch.nn as nn

import repa
import sit
from conftest import digest


def test_state_dicts_are_the_released_ones():
    """Digests of the sorted lines 'name shape' of the released checkpoints; their numbers of parameters."""
    with torch.device("meta"):
        b2 = sit.SiT("SiT-B/2", 32, 4, 1000, projectors=[repa.projector("mlp", 768, 768)])
        assert digest(b2) == (141, "7a480aff60336788")
        xl2 = sit.SiT("SiT-XL/2", 32, 4, 1000, projectors=[repa.projector("mlp", 1152, 768)])
        xl1 = sit.SiT("SiT-XL/1", 16, 32, 1000, projectors=[repa.projector("mlp", 1152, 768)])
        assert sum(p.numel() for p in xl2.parameters()) == 683_242_512
        assert sum(p.numel() for p in xl1.parameters()) == 683_279_392
        assert sit.SiT("SiT-B/2", 32, 4, 1000, cfg_prob=0).y_embedder.embedding_table.weight.shape == (1000,
                                                                                                       768)


def test_initialization():
    torch.manual_seed(0)
    net = sit.SiT("SiT-T/2", 8, 8, 1000, encoder_depth=2, projectors=[repa.projector("mlp", 256, 112, 64)])
    assert net(torch.randn(2, 8, 8, 8), torch.rand(2), torch.tensor([1, 2]))[0].abs().max() == 0  # zero head
    zeros = [block.adaLN_modulation[1] for block in (*net.blocks, net.final_layer)] + [net.final_layer.linear]
    normals = [net.y_embedder.embedding_table.weight, net.t_embedder.mlp[0].weight,
               net.t_embedder.mlp[2].weight]
    for p in normals:
        assert p.std().item() == pytest.approx(0.02, rel=0.05) and abs(p.mean()) < 2e-3
    for module in net.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            assert module.bias.abs().max() == 0
            if any(module is other for other in zeros):
                assert module.weight.abs().max() == 0
            elif not any(module.weight is p for p in normals):
                limit = math.sqrt(6 / (module.weight.shape[0] + module.weight[0].numel()))  # Xavier
                assert 0.98 * limit < module.weight.abs().max() <= limit * (1 + 1e-6)
                assert module.weight.std().item() == pytest.approx(limit / math.sqrt(3), rel=0.05)
