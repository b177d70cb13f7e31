"""A shared encoder out of an unshared one: what is kept exactly, what is approximated, and by how much."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lcconformer import ConformerConfig, ConformerEncoder, depth_errors, share

BASE = ConformerConfig(
    d_model=16, num_heads=2, ffn_dim=24, num_layers=4, conv_kernel_size=5, input_dim=10, sharing="none"
)


def made(noise: float = 0.1, **changes: object) -> ConformerEncoder:
    """An unshared encoder whose layers differ by ``noise`` from one another."""
    encoder = ConformerEncoder(BASE.replace(**changes))
    with torch.no_grad():
        for layer in encoder.layers[1:]:
            layer.load_state_dict(encoder.layers[0].state_dict())
        for name, x in encoder.state_dict().items():
            if name.endswith("running_var"):
                x.uniform_(0.5, 2.0)
            elif x.is_floating_point():
                x.add_(noise * torch.randn_like(x))
    return encoder.eval()


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(3, 17, 10), torch.tensor([17, 9, 4])


def test_layers_that_are_equal_are_shared_without_error() -> None:
    encoder = made(0.0)
    for method in ("average", "first", "svd-lora"):
        shared = share(encoder, method)
        assert len(shared.layers) == 1
        assert max(depth_errors(encoder, shared, *batch())) < 1e-5


def test_average_and_first() -> None:
    encoder = made()
    weights = [layer.ffn1.up.weight for layer in encoder.layers]
    average, first = share(encoder), share(encoder, "first")
    torch.testing.assert_close(average.layers[0].ffn1.up.weight, sum(weights) / 4)
    assert torch.equal(first.layers[0].ffn1.up.weight, weights[0])
    for name, x in encoder.front_end.state_dict().items():
        assert torch.equal(first.front_end.state_dict()[name], x)
    # the first loop of "first" is the original's
    errors = depth_errors(encoder, first, *batch())
    assert errors[0] < 1e-6
    assert all(error > 1e-3 for error in errors[1:])
    assert depth_errors(encoder, average, *batch())[0] > 1e-3


def test_fewer_depths_a_layer() -> None:
    encoder = made()
    shared = share(encoder, sharing="sequence:2")
    assert shared.layer_map == (0, 0, 1, 1)
    want = (encoder.layers[2].attention.u + encoder.layers[3].attention.u) / 2
    torch.testing.assert_close(shared.layers[1].attention.u, want)
    same = share(encoder, sharing="none")
    assert all(torch.equal(x, same.state_dict()[name]) for name, x in encoder.state_dict().items())
    assert max(depth_errors(encoder, same, *batch())) == 0.0


def test_low_rank_increments_are_the_best_of_their_rank() -> None:
    encoder = made()
    shared = share(encoder, "svd-lora", lora_rank=3)
    mean = sum(layer.ffn1.up.weight for layer in encoder.layers) / 4
    for k, layer in enumerate(encoder.layers):
        values = shared.overrides(k)
        assert torch.allclose(values["norm.weight"], layer.norm.weight, atol=1e-6)
        left = layer.ffn1.up.weight - values["ffn1.up.weight"]
        spectrum = torch.linalg.svdvals(layer.ffn1.up.weight - mean)
        torch.testing.assert_close(left.norm(), spectrum[3:].norm())


def test_the_error_falls_with_the_rank() -> None:
    """To zero where all that differs can be expressed."""
    encoder = made()
    with torch.no_grad():
        for layer in encoder.layers[1:]:
            for name in ("attention.u", "attention.v_bias", "attention.pos.weight", "conv.depthwise.weight"):
                layer.get_parameter(name).copy_(encoder.layers[0].get_parameter(name))
            for name, x in layer.named_parameters():
                if name.endswith("bias") and "norm" not in name:
                    x.copy_(encoder.layers[0].get_parameter(name))
    given = batch()
    errors = [depth_errors(encoder, share(encoder, "svd-lora", lora_rank=r), *given)[-1] for r in (1, 4, 8, 16)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-5 < errors[0]
    assert errors[2] < depth_errors(encoder, share(encoder), *given)[-1]


def test_a_rank_beyond_that_of_the_matrices_can_learn() -> None:
    shared = share(made(), "svd-lora", lora_rank=40).train()
    shared(*batch())[0].square().mean().backward()
    for a, b in zip(shared.conditioning.lora_a, shared.conditioning.lora_b):
        # each of the rank has a gradient in one of its factors
        alive = (a.grad.norm(dim=2) > 0) | (b.grad.norm(dim=1) > 0)
        assert alive.all()


@pytest.mark.parametrize("statistics", ["shared", "per_depth"])
@pytest.mark.parametrize("method", ["average", "first", "svd-lora"])
def test_a_batch_norm_keeps_the_statistics_of_each_depth(method: str, statistics: str) -> None:
    encoder = made(conv_norm="batch", conv_norm_statistics=statistics)
    shared = share(encoder, method)
    assert shared.config.conv_norm_statistics == "per_depth"
    for k in range(4):
        want = encoder.layers[k].conv.depthwise_norm.running_var if statistics == "shared" else encoder.running_var[k]
        assert torch.equal(shared.running_var[k], want)


def test_dtype_mode_and_original_are_kept(tmp_path) -> None:
    encoder = made().double().train()
    before = {name: x.clone() for name, x in encoder.state_dict().items()}
    shared = share(encoder, "svd-lora")
    assert shared.training
    assert {x.dtype for x in shared.state_dict().values()} == {torch.float64}
    shared(*(batch()[0].double(),))[0].sum().backward()
    optimizer = torch.optim.SGD(shared.parameters(), 1.0)
    optimizer.step()
    assert all(torch.equal(x, before[name]) for name, x in encoder.state_dict().items())
    assert all(p.grad is None for p in encoder.parameters())
    shared.save_pretrained(tmp_path)
    loaded = ConformerEncoder.from_pretrained(tmp_path)
    assert loaded.config == shared.config


def test_refusals() -> None:
    encoder = made()
    with pytest.raises(ValueError, match=r"share: method is 'mean'; expected one of 'average', 'first', 'svd-lora'"):
        share(encoder, "mean")
    with pytest.raises(ValueError, match=r"share: the encoder's conditioning is \('step',\); expected none"):
        share(made(conditioning=("step",)))
    with pytest.raises(ValueError, match=r"lora_rank is 0; expected a positive integer"):
        share(encoder, "svd-lora", lora_rank=0)
    with pytest.raises(ValueError, match=r"sharing is 'cycle:9' with num_layers = 4"):
        share(encoder, sharing="cycle:9")
    changed = made()
    changed.layers[1].ffn1.up = torch.nn.Sequential(changed.layers[1].ffn1.up)
    with pytest.raises(
        ValueError, match=r"share: the ConformerEncoder is not what its config describes .*merge adapters"
    ):
        share(changed)
    with pytest.raises(ValueError, match=r"4 loops of width 16 and 4 of width 32; expected the same"):
        depth_errors(encoder, made(d_model=32), *batch())


def test_errors_ignore_the_padding() -> None:
    encoder, shared = made(), share(made())
    x, lengths = batch()
    changed = x.clone()
    changed[1, 9:] = 7.0
    assert depth_errors(encoder, shared, x, lengths) == depth_errors(encoder, shared, changed, lengths)
