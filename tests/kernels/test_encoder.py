"""The encoder on the Triton kernels: output and every parameter's gradient against the references, and compiled."""

import copy

import pytest
import torch

from lcconformer import ConformerConfig, ConformerEncoder, backend

LENGTHS = (17, 9, 0)


def run(encoder, x, lengths, name):
    encoder.zero_grad()
    x = x.detach().requires_grad_()
    with backend(name):
        out, _ = encoder(x, lengths)
        keep = torch.ones_like(out[..., :1]) if lengths is None else (torch.arange(17) < lengths[:, None])[..., None]
        out = out * keep
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    grads = {name: p.grad.clone() for name, p in encoder.named_parameters()} | {"x": x.grad}
    return out.detach(), grads


def error(a, b):
    return (a.double() - b.double()).abs().max().item()


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("conv_norm", ["layer", "batch"])
@pytest.mark.parametrize("position", ["relative", "rotary", "none"])
def test_output_and_gradients(position, conv_norm, padded):
    config = ConformerConfig(
        d_model=32, num_heads=2, ffn_dim=48, num_layers=2, conv_kernel_size=5, dropout=0.0, position=position,
        conv_norm=conv_norm,
    )  # fmt: skip
    torch.manual_seed(0)
    encoder = ConformerEncoder(config)
    for p in encoder.parameters():  # biases and norms away from their zeros and ones
        p.data.add_(0.1 * torch.randn_like(p))
    x = torch.randn(3, 17, 32)
    lengths = torch.tensor(LENGTHS) if padded else None
    start = {k: v.clone() for k, v in encoder.state_dict().items()}
    low, low_grads = run(encoder, x, lengths, "torch")
    encoder.load_state_dict(start)  # running statistics as they were
    out, grads = run(encoder, x, lengths, "triton")
    encoder.load_state_dict(start)
    ref, ref_grads = run(encoder.double(), x.double(), lengths, "torch")

    floor = 2 * torch.finfo(torch.float32).eps
    assert error(out, ref) <= 2 * error(low, ref) + floor * ref.abs().max().item()
    for name, ref_grad in ref_grads.items():
        if conv_norm == "batch" and name.endswith("depthwise.bias"):
            # BatchNorm takes the mean away again: the gradient is zero, what is left are rounding errors of its sum
            assert error(ref_grad, torch.zeros_like(ref_grad)) < 1e-13
            assert error(grads[name], ref_grad) <= floor * ref_grads[name.replace("bias", "weight")].abs().sum().item()
            continue
        scale = ref_grad.abs().max().item()
        bound = 3 * error(low_grads[name], ref_grad) + 4 * floor * scale
        assert error(grads[name], ref_grad) <= bound, f"{name}: {error(grads[name], ref_grad):.2e} > {bound:.2e}"


def test_compiled_is_one_graph_for_all_lengths():
    """The loops of a shared layer call each op again with the same weights and the same Python floats."""
    torch._dynamo.reset()
    config = ConformerConfig(d_model=16, num_heads=2, ffn_dim=24, num_layers=2, conv_kernel_size=5, dropout=0.1)
    eager = ConformerEncoder(config)
    compiled = torch.compile(copy.deepcopy(eager), backend="aot_eager", fullgraph=True, dynamic=True)
    for frames in (6, 4):
        x, found = torch.randn(2, frames, 16), []
        for encoder in (eager, compiled):
            torch.manual_seed(1)  # of dropout
            encoder.zero_grad()
            with backend("triton"), torch.compiler.set_stance("default" if frames == 6 else "fail_on_recompile"):
                out, _ = encoder(x, torch.tensor([frames, 2]))
                (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
            found.append([out, *(p.grad for p in encoder.parameters())])
        torch.testing.assert_close(found[1], found[0])


@pytest.fixture
def deterministic(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or PyTorch refuses cuBLAS
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def steps_in_deterministic_mode(device, dtype, runs):
    """Gradients and outputs of one training step with dropout, again and again."""
    torch.manual_seed(0)
    config = ConformerConfig(d_model=32, num_heads=2, ffn_dim=48, num_layers=2, conv_kernel_size=5, conv_norm="batch")
    encoder, found = ConformerEncoder(config).to(device, dtype), []
    start = {k: v.clone() for k, v in encoder.state_dict().items()}
    x, lengths = torch.randn(3, 17, 32).to(device, dtype), torch.tensor(LENGTHS, device=device)
    for _ in range(runs):
        encoder.load_state_dict(start)
        encoder.zero_grad()
        torch.manual_seed(1)
        with backend("triton"):
            out, _ = encoder(x, lengths)
            out.float().square().sum().backward()
        found.append([out.detach(), *(p.grad.clone() for p in encoder.parameters())])
    return found


@pytest.mark.usefixtures("deterministic")
def test_deterministic_mode():
    """No kernel asks PyTorch for an operator that this mode refuses."""
    first, second = steps_in_deterministic_mode(torch.device("cpu"), torch.float32, 2)
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.gpu
@pytest.mark.usefixtures("deterministic")
def test_gpu_deterministic_mode():
    first, *others = steps_in_deterministic_mode(torch.device("cuda"), torch.bfloat16, 30)
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other))
