"""The learning rate, what decays, and Muon."""

import pytest
import torch

from lcconformer import ConformerConfig
from lcconformer.ssl import FeatureSettings, ObjectiveSettings, PretrainingModel
from lcconformer.ssl.pretraining.optim import Muon, learning_rate_scale, make_optimizers, orthogonalise

CONFIG = ConformerConfig(
    d_model=16,
    num_heads=2,
    ffn_dim=32,
    num_layers=3,
    conv_kernel_size=3,
    input_dim=20,
    subsampling="stack",
    subsampling_factor=2,
)


def test_learning_rate_rises_and_falls_linearly() -> None:
    assert [learning_rate_scale(p, 0.1) for p in (0.0, 0.05, 0.1, 0.55, 1.0)] == pytest.approx([0, 0.5, 1, 0.5, 0])
    assert learning_rate_scale(0.0, 0.0) == 1.0
    assert learning_rate_scale(1.5, 0.1) == 0.0


def test_only_matrices_decay() -> None:
    model = PretrainingModel(
        CONFIG.replace(conditioning=("layer_norm", "step", "film")), FeatureSettings(20), ObjectiveSettings()
    )
    (adamw,) = make_optimizers(model, "adamw", 0.1)
    decayed, kept = ({id(p) for p in group["params"]} for group in adamw.param_groups)
    names = {name: id(p) in decayed for name, p in model.named_parameters()}
    assert len(decayed) + len(kept) == len(names)
    assert all(names[n] for n in names if n.endswith(("up.weight", "qkv.weight", "depthwise.weight", "project.weight")))
    assert not any(names[n] for n in names if n.endswith(("bias", "norm.weight", ".u")) or "conditioning" in n)


def test_muon_takes_the_matrices_of_the_layers() -> None:
    model = PretrainingModel(CONFIG.replace(sharing="none"), FeatureSettings(20), ObjectiveSettings())
    adamw, muon = make_optimizers(model, "muon", 0.1)
    taken = {id(p) for group in muon.param_groups for p in group["params"]}
    names = {name for name, p in model.named_parameters() if id(p) in taken}
    linear = ("ffn1.up", "ffn1.down", "attention.qkv", "attention.pos", "attention.out", "conv.pointwise1")
    linear += ("conv.pointwise2", "ffn2.up", "ffn2.down")
    assert names == {f"encoder.layers.{k}.{part}.weight" for k in range(CONFIG.num_layers) for part in linear}
    others = {id(p) for group in adamw.param_groups for p in group["params"]}
    assert not taken & others
    assert len(taken) + len(others) == len(list(model.parameters()))
    assert [group["weight_decay"] for group in adamw.param_groups] == [0.1, 0.0]
    assert muon.param_groups[0]["weight_decay"] == 0.1


def test_singular_values_come_near_to_one() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 24, 40, generator=generator) * torch.tensor([1e-6, 1.0, 1e6])[:, None, None]
    values = torch.linalg.svdvals(orthogonalise(x))
    assert ((values > 0.6) & (values < 1.3)).all()
    # with its singular vectors: what is left is the rotation of the matrix
    u, _, vt = torch.linalg.svd(x[1], full_matrices=False)
    diagonal = u.T @ orthogonalise(x)[1] @ vt.T
    assert (diagonal - torch.diag(diagonal.diagonal())).abs().max() < 1e-4
    assert orthogonalise(torch.zeros(1, 2, 3)).eq(0).all()


def test_muon_is_that_of_torch() -> None:
    """torch.optim.Muon multiplies in bfloat16: equal to its precision, whatever is tall or wide."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(24, 40), (40, 24), (24, 24), (24, 40)]
    ours = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    start = [p.detach().clone() for p in ours]
    muon = Muon(ours, lr=0.01, weight_decay=0.1)
    # its rate is ours: a step of 0.2 times the rate in the root mean square
    other = torch.optim.Muon(theirs, lr=0.05, weight_decay=0.02, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        for a, b in zip(ours, theirs):
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad.clone()
        muon.step()
        other.step()
    for a, b, first in zip(ours, theirs, start):
        size = (b - first).square().mean().sqrt()
        assert (a - b).square().mean().sqrt() < 0.03 * size
        assert 0.01 < size < 0.06


def test_muon_refuses_what_is_no_matrix_and_leaves_what_has_no_gradient() -> None:
    with pytest.raises(ValueError, match=r"takes matrices, got a parameter of shape \[3\]"):
        Muon([torch.nn.Parameter(torch.zeros(3))])
    still, moved = torch.nn.Parameter(torch.ones(2, 3)), torch.nn.Parameter(torch.ones(2, 3))
    moved.grad = torch.ones(2, 3)
    Muon([still, moved], weight_decay=0.5).step()
    assert still.eq(1).all()
    assert moved.ne(1).any()
