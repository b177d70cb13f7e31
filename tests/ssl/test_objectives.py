"""Losses against values computed by hand, and what the encoder may see."""

import math

import pytest
import torch

from lcconformer import ConformerConfig
from lcconformer.ssl import FeatureSettings, ObjectiveSettings, PretrainingModel
from lcconformer.ssl.masking import Masks, draw_masks
from lcconformer.ssl.objectives import BestRQ, Reconstruction, make_objective

BINS, WIDTH = 5, 8


def masks_for(frames: list[int], factor: int, bert: bool, step: int = 0) -> Masks:
    ids = [f"u{i}" for i in range(len(frames))]
    return draw_masks(ids, frames, seed=0, step=step, fraction=0.3, span=4, factor=factor, bert=bert)


def padded(frames: list[int]) -> torch.Tensor:
    x = torch.randn(len(frames), max(frames), BINS)
    for row, count in enumerate(frames):
        x[row, count:] = 0.0
    return x


@pytest.mark.parametrize("factor", [1, 3])
def test_reconstruction_is_the_mean_error_of_each_chosen_frame(factor: int) -> None:
    frames = [29, 17]
    objective = Reconstruction(WIDTH, BINS, factor)
    features, masks = padded(frames), masks_for(frames, factor, bert=True)
    hidden = torch.randn(2, -(-29 // factor), WIDTH)
    expected, chosen = 0.0, 0
    for b, t in masks.chosen.nonzero().tolist():
        prediction = objective.head(hidden[b, t // factor]).detach().view(factor, BINS)[t % factor]
        expected += sum(abs(float(p) - float(x)) for p, x in zip(prediction, features[b, t])) / BINS
        chosen += 1
    assert float(objective.loss(hidden, features, masks)) == pytest.approx(expected, rel=1e-5)
    assert objective.count(masks) == chosen


@pytest.mark.parametrize("factor", [1, 4])
def test_best_rq_label_is_the_nearest_codebook_entry(factor: int) -> None:
    objective = BestRQ(WIDTH, BINS, factor, codebook_size=50, codebook_dim=6)
    features = padded([22, 13])
    steps = -(-22 // factor)
    stacked = torch.zeros(2, steps * factor, BINS)
    stacked[:, :22] = features
    projected = stacked.view(2 * steps, factor * BINS) @ objective.projection
    seen = projected.norm(dim=1) > 0  # padding has no direction
    unit = projected[seen] / projected[seen].norm(dim=1, keepdim=True)
    distance = (unit[:, None] - objective.codebook / objective.codebook.norm(dim=1, keepdim=True)).norm(dim=-1)
    labels = objective.labels(features)
    assert torch.equal(labels[seen], distance.argmin(1))
    assert len(labels.unique()) > 5
    # the length of a vector does not matter
    assert torch.equal(objective.labels(3.0 * features), labels)


def test_best_rq_is_the_negative_log_likelihood_of_the_labels() -> None:
    frames, factor = [26, 18], 2
    objective = BestRQ(WIDTH, BINS, factor, codebook_size=11, codebook_dim=4)
    features, masks = padded(frames), masks_for(frames, factor, bert=False)
    hidden = torch.randn(2, 13, WIDTH)
    labels = objective.labels(features)
    expected = 0.0
    for place in masks.outputs.tolist():
        logits = objective.head(hidden.view(-1, WIDTH)[place]).tolist()
        expected += math.log(sum(math.exp(x) for x in logits)) - logits[labels[place]]
    assert float(objective.loss(hidden, features, masks)) == pytest.approx(expected, rel=1e-5)
    assert objective.count(masks) == len(masks.outputs)


def test_codebook_and_projection_are_stored_and_never_trained() -> None:
    objective = BestRQ(WIDTH, BINS, 1, codebook_size=11, codebook_dim=4)
    assert {"codebook", "projection"} <= set(objective.state_dict())
    assert {name for name, _ in objective.named_parameters()} == {"head.weight", "head.bias"}


@pytest.mark.parametrize("kind", ["reconstruction", "best_rq"])
def test_the_encoder_sees_nothing_of_hidden_frames_and_all_of_the_others(kind: str) -> None:
    frames = [60, 44, 60, 31]
    objective = make_objective(ObjectiveSettings(kind, codebook_size=8), WIDTH, BINS, 1)
    masks, features = masks_for(frames, 1, objective.bert), padded(frames)
    assert masks.hidden.any()
    other = features + masks.hidden[..., None] * torch.randn_like(features)
    shown = []
    for x in (features, other):
        torch.manual_seed(5)
        shown.append(objective.corrupt(x, masks))
    # a replaced frame may show a hidden one only if another utterance is meant, so rows do not mix
    assert torch.equal(shown[0], shown[1])
    untouched = ~masks.chosen
    assert torch.equal(shown[0][untouched], features[untouched])


def test_replaced_frames_show_their_source_and_zeroed_ones_zero() -> None:
    frames = [50] * 60
    objective = Reconstruction(WIDTH, BINS, 1)
    masks, features = masks_for(frames, 1, bert=True), padded(frames)
    shown = objective.corrupt(features, masks)
    assert (shown[masks.hidden] == 0).all()
    moved = (masks.source != torch.arange(50)).nonzero().tolist()
    assert len(moved) > 50
    for b, t in moved:
        assert torch.equal(shown[b, t], features[b, masks.source[b, t]])


def test_best_rq_hides_behind_weak_noise() -> None:
    frames = [400] * 8
    objective = BestRQ(WIDTH, BINS, 1, codebook_size=8, codebook_dim=4)
    masks = masks_for(frames, 1, bert=False)
    noise = objective.corrupt(padded(frames), masks)[masks.hidden]
    assert float(noise.std()) == pytest.approx(0.1, rel=0.05)
    assert abs(float(noise.mean())) < 0.01


def model_of(kind: str = "reconstruction", **changes: object) -> PretrainingModel:
    config = ConformerConfig(
        d_model=16, num_heads=2, ffn_dim=32, num_layers=3, conv_kernel_size=3, input_dim=20, **changes
    )
    return PretrainingModel(config, FeatureSettings(20), ObjectiveSettings(kind, codebook_size=32))


@pytest.mark.parametrize("kind", ["reconstruction", "best_rq"])
@pytest.mark.parametrize("subsampling", [("none", 1), ("stack", 3), ("conv", 4)])
def test_depths_of_one_run_are_separate_runs(kind: str, subsampling: tuple[str, int]) -> None:
    model = model_of(kind, subsampling=subsampling[0], subsampling_factor=subsampling[1]).eval()
    audio, lengths = 0.1 * torch.randn(2, 8000), torch.tensor([8000, 5600])
    masks = masks_for([50, 35], subsampling[1], model.objective.bert)
    together, separate = [], []
    for depths in ((3, 2, 1), (3,), (2,), (1,)):
        torch.manual_seed(1)  # the noise of best_rq
        sums, apart = model(audio, lengths, masks, depths)
        if len(depths) == 3:
            together = sums.tolist()
            assert apart > 0
        else:
            separate += sums.tolist()
            assert apart == 0
    assert together == separate


def test_shallow_states_are_pulled_to_the_deepest_and_never_the_other_way() -> None:
    model = model_of(dropout=0.0)
    audio, lengths = 0.1 * torch.randn(2, 8000), torch.tensor([8000, 5600])
    masks = masks_for([50, 35], 1, bert=True)
    _, apart = model(audio, lengths, masks, (3, 2, 1))
    apart.backward()
    got = [p.grad.clone() for p in model.encoder.parameters()]

    features, frames = model.features(audio, lengths)
    shown = model.objective.corrupt(features, masks)
    with torch.no_grad():
        fixed, _ = model.encoder(shown, frames)
    _, _, hidden = model.encoder(shown, frames, return_hidden_states=True)
    expected = 0.0
    for k in (2, 1):
        for b, count in enumerate((50, 35)):
            expected = expected + ((hidden[k][b, :count] - fixed[b, :count]) ** 2).sum() / 16 / 2
    assert float(apart) == pytest.approx(float(expected), rel=1e-5)
    model.zero_grad()
    expected.backward()
    for mine, parameter in zip(got, model.encoder.parameters()):
        torch.testing.assert_close(mine, parameter.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "cpc"}, "'cpc'; expected one of reconstruction, best_rq"),
        ({"mask_fraction": 1.5}, "mask_fraction is 1.5"),
        ({"kind": []}, r"\[\]; expected one of reconstruction"),
        ({"mask_fraction": float("nan")}, "mask_fraction is nan"),
        ({"mask_span": 0}, "mask_span is 0"),
        ({"mask_span": 7.5}, "mask_span is 7.5"),
        ({"codebook_size": 10**12}, "codebook_size is 1000000000000"),
        ({"codebook_size": 1}, "codebook_size is 1"),
        ({"codebook_dim": 0}, "codebook_dim is 0"),
    ],
)
def test_settings_refuse(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ObjectiveSettings(**change)


def test_model_refuses_another_number_of_bins() -> None:
    config = ConformerConfig(d_model=16, num_heads=2, ffn_dim=32, num_layers=1, input_dim=40)
    with pytest.raises(ValueError, match="input_dim is 40 but there are 80 mel bins"):
        PretrainingModel(config, FeatureSettings(), ObjectiveSettings())


def test_description_round_trip_and_refusal() -> None:
    model = model_of("best_rq", conditioning=("step",), sharing="cycle:2")
    again = PretrainingModel.from_description(model.describe())
    assert again.describe() == model.describe()
    assert {n: p.shape for n, p in again.state_dict().items()} == {n: p.shape for n, p in model.state_dict().items()}
    with pytest.raises(ValueError, match="does not fit this version"):
        PretrainingModel.from_description({**model.describe(), "features": {"bands": 3}})
