"""Which frames are chosen, and what is shown in their place."""

import numpy as np
import pytest
import torch

from lcconformer.ssl.masking import Masks, draw_masks

BERT = {"fraction": 0.15, "span": 7}


def draw(ids: list[str], frames: list[int], seed: int = 0, step: int = 0, **more: object) -> Masks:
    return draw_masks(ids, frames, seed=seed, step=step, **{**BERT, **more})


def names(count: int) -> list[str]:
    return [f"utterance-{i}" for i in range(count)]


def run_lengths(row: torch.Tensor) -> list[int]:
    """Lengths of the runs of True."""
    padded = np.concatenate(([0], row.numpy().astype(int), [0]))
    edges = np.flatnonzero(np.diff(padded))
    return (edges[1::2] - edges[::2]).tolist()


def test_an_utterance_has_the_same_mask_in_any_batch() -> None:
    frames = [310, 120, 77]
    batch = draw(names(3), frames, seed=3, step=8)
    for i, count in enumerate(frames):
        alone = draw([names(3)[i]], [count], seed=3, step=8)
        assert torch.equal(batch.chosen[i, :count], alone.chosen[0])
        assert torch.equal(batch.hidden[i, :count], alone.hidden[0])
        assert torch.equal(batch.source[i, :count], alone.source[0])
        assert not batch.chosen[i, count:].any()


def test_seed_step_and_utterance_each_change_the_mask() -> None:
    base = draw(["a"], [500]).chosen
    assert torch.equal(base, draw(["a"], [500]).chosen)
    for other in (draw(["a"], [500], seed=1), draw(["a"], [500], step=1), draw(["b"], [500])):
        assert not torch.equal(base, other.chosen)


def test_chosen_fraction_is_that_of_overlapping_spans() -> None:
    count, frames = 400, 1000
    masks = draw(names(count), [frames] * count)
    spans, places = round(frames * 0.15 / 7), frames - 6
    # a frame is left if none of the 7 places that would cover it is drawn (without replacement)
    left = np.prod([(places - 7 - i) / (places - i) for i in range(spans)])
    assert masks.chosen.float().mean() == pytest.approx(1 - left, abs=0.002)
    assert masks.num_chosen == int(masks.chosen.sum())


def test_spans_are_whole() -> None:
    masks = draw(names(50), [400] * 50)
    lengths = [n for row in masks.chosen for n in run_lengths(row)]
    assert min(lengths) == 7
    assert max(lengths) <= 7 * round(400 * 0.15 / 7)


def test_eighty_ten_ten_of_the_utterances() -> None:
    count, frames = 4000, 60
    masks = draw(names(count), [frames] * count)
    moved = masks.source != torch.arange(frames)
    zeroed, replaced = masks.hidden.any(1), moved.any(1)
    assert not (zeroed & replaced).any()
    assert zeroed.float().mean() == pytest.approx(0.8, abs=0.02)  # 3 standard deviations
    assert replaced.float().mean() == pytest.approx(0.1, abs=0.015)
    # all chosen frames of an utterance share its fate
    assert torch.equal(masks.hidden[zeroed], masks.chosen[zeroed])
    assert torch.equal(moved[replaced], masks.chosen[replaced])


def test_replacements_come_from_the_same_utterance_and_never_from_the_frame_itself() -> None:
    frames = [2 + i % 60 for i in range(1000)]
    masks = draw(names(1000), frames)
    places = torch.arange(max(frames))
    for row, count in enumerate(frames):
        assert masks.source[row, :count].max() < count
        assert torch.equal(masks.source[row, count:], places[count:])
    moved = (masks.source != places) & masks.chosen
    kept = ~masks.hidden.any(1) & ~moved.any(1)
    assert 0.05 < kept.float().mean() < 0.15


@pytest.mark.parametrize("frames", [1, 2, 6, 7, 8, 20])
def test_short_utterances_have_a_chosen_frame(frames: int) -> None:
    masks = draw(names(20), [frames] * 20)
    assert (masks.chosen.sum(1) == min(7, frames)).all()


@pytest.mark.parametrize("frames", [101, 96])
def test_whole_outputs_are_hidden_without_bert(frames: int) -> None:
    masks = draw(names(30), [frames] * 30, fraction=0.4, span=20, factor=4, bert=False)
    assert torch.equal(masks.hidden, masks.chosen)
    assert torch.equal(masks.source, torch.arange(frames).expand(30, frames))
    groups = torch.nn.functional.pad(masks.chosen, (0, -frames % 4)).view(30, -1, 4)
    whole = groups[:, : frames // 4]
    assert torch.equal(whole.any(-1), whole.all(-1))
    assert {n % 20 for row in masks.chosen for n in run_lengths(row) if n < 20} <= {20 - 4 + frames % 4, 0}


@pytest.mark.parametrize("factor", [1, 3, 4])
def test_outputs_are_those_that_cover_a_chosen_frame(factor: int) -> None:
    frames = [50, 47]
    masks = draw(names(2), frames, factor=factor)
    steps = -(-50 // factor)
    expected = sorted({b * steps + t // factor for b, t in masks.chosen.nonzero().tolist()})
    assert masks.outputs.tolist() == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"frames": [0]}, "1 or more each"),
        ({"frames": [5, 5]}, "1 utterances with frames"),
        ({"fraction": 0.0}, "fraction 0.0.*0 < fraction < 1"),
        ({"fraction": 1.0}, "fraction 1.0"),
        ({"span": 0}, "span 0"),
        ({"factor": 0}, "factor 0"),
        ({"seed": -1}, "seed -1"),
        ({"step": -1}, "step -1"),
    ],
)
def test_refuses(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw_masks(**{"utterances": ["a"], "frames": [100], "seed": 0, "step": 0, **BERT, **change})
