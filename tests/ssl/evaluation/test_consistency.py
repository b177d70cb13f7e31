"""The consistency measures against closed forms, and what they must not depend on."""

import numpy as np
import pytest
import torch

from lcconformer.data import load_corpus
from lcconformer.ssl.evaluation.consistency import MEASURES, consistency, model_consistency, summarise


def states(frames=500, dim=12, count=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(count, dim, dim, generator=generator, dtype=torch.float64)
    shift = torch.randn(count, dim, generator=generator, dtype=torch.float64)
    x = torch.randn(frames, dim, generator=generator, dtype=torch.float64)
    noise = torch.randn(count, frames, dim, generator=generator, dtype=torch.float64)
    return [x @ m + 0.5 * e + s for m, e, s in zip(mix, noise, shift)]


def test_identical_states_are_fully_consistent():
    h = states(count=1)[0]
    out = consistency([h, h.clone(), h.clone()])
    assert set(out) == set(MEASURES)
    np.testing.assert_allclose(out["cosine"], np.ones((3, 3)), atol=1e-12)
    np.testing.assert_allclose(out["cka"], np.ones((3, 3)), atol=1e-12)
    np.testing.assert_allclose(out["frechet"], np.zeros((3, 3)), atol=1e-9)


def test_every_measure_is_symmetric_and_in_range():
    out = consistency(states(count=4))
    for name in MEASURES:
        np.testing.assert_array_equal(out[name], out[name].T)
    assert (np.abs(out["cosine"]) <= 1 + 1e-12).all()
    for name in ("cka", "knn", "frechet"):
        assert (out[name] >= 0).all()
        assert (out[name] <= 1 + 1e-12).all()
    off = ~np.eye(4, dtype=bool)
    assert (out["cka"][off] < 0.9).all()
    assert (out["frechet"][off] > 0.01).all()


def test_cka_ignores_rotation_shift_and_scale_and_the_others_do_not():
    a, b, _ = states()
    q, _ = torch.linalg.qr(torch.randn(12, 12, generator=torch.Generator().manual_seed(5), dtype=torch.float64))
    turned = 3.0 * b @ q + 7.0
    before, after = consistency([a, b]), consistency([a, turned])
    assert after["cka"][0, 1] == pytest.approx(before["cka"][0, 1], abs=1e-12)
    assert consistency([b, turned])["cka"][0, 1] == pytest.approx(1.0, abs=1e-12)
    assert abs(after["cosine"][0, 1] - before["cosine"][0, 1]) > 0.05
    assert abs(after["frechet"][0, 1] - before["frechet"][0, 1]) > 0.05


def test_cka_equals_its_gram_matrix_form():
    a, b, _ = states(frames=60)

    def gram(h):
        centre = torch.eye(60, dtype=torch.float64) - 1.0 / 60
        return centre @ (h @ h.T) @ centre

    ka, kb = gram(a), gram(b)
    expected = (ka * kb).sum() / (ka.norm() * kb.norm())
    assert consistency([a, b])["cka"][0, 1] == pytest.approx(float(expected), abs=1e-12)


def test_cosine_by_hand():
    a = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
    b = torch.tensor([[5.0, 0.0], [1.0, 0.0], [-1.0, -1.0]])
    assert consistency([a, b])["cosine"][0, 1] == pytest.approx((1.0 + 0.0 - 1.0) / 3)


def test_mutual_neighbours_by_hand():
    # eight directions a step of 10 degrees apart, and the same with the outer ones exchanged
    def directions(degrees):
        angle = torch.deg2rad(torch.tensor(degrees, dtype=torch.float64))
        return torch.stack([angle.cos(), angle.sin()], 1)

    count = 12  # each frame has 11 others, of which the 10 nearest leave out the farthest
    line = [5.0 * i for i in range(count)]
    swapped = [line[-1], *line[1:-1], line[0]]
    out = consistency([directions(line), directions(swapped)])["knn"]
    assert out[0, 0] == out[1, 1] == 1.0
    # the farthest is frame 11 of the first half (0 of the second), which the exchange turns into the other: 9 of 10 agree;
    # of frames 0 and 11 themselves it is the other in both
    assert out[0, 1] == pytest.approx((10 * 9 + 2 * 10) / (12 * 10))


def test_mutual_neighbours_ignore_rotation_and_size_and_are_few_by_chance():
    a, b = (torch.randn(3000, 16, generator=torch.Generator().manual_seed(s), dtype=torch.float64) for s in (0, 1))
    q, _ = torch.linalg.qr(b[:16])
    out = consistency([a, 2.0 * a @ q, b])["knn"]
    assert out[0, 1] == 1.0
    chance = 10 / 1499  # of the 1500 frames that are looked at
    assert out[0, 2] == pytest.approx(chance, rel=0.2)


def test_frechet_of_axis_aligned_gaussians_by_hand():
    # four points at (+-p, +-q): mean 0, covariance diag(p^2, q^2); commuting covariances: sum of (sigma1 - sigma2)^2
    def points(p, q, mean=(0.0, 0.0)):
        signs = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]], dtype=torch.float64)
        return signs * torch.tensor([p, q]) + torch.tensor(mean)

    out = consistency([points(1, 2), points(3, 5, (1.0, -2.0))])["frechet"][0, 1]
    shift, total = 5.0, 5.0 + (1 + 4) + (9 + 25)
    assert out == pytest.approx((shift + (3 - 1) ** 2 + (5 - 2) ** 2) / total, abs=1e-12)
    # supports at right angles have nothing in common
    assert consistency([points(1, 0), points(0, 1)])["frechet"][0, 1] == pytest.approx(1.0, abs=1e-12)


def test_frechet_does_not_depend_on_which_frame_is_which():
    a, b, _ = states()
    shuffled = b[torch.randperm(len(b), generator=torch.Generator().manual_seed(1))]
    first, second = consistency([a, b]), consistency([a, shuffled])
    assert second["frechet"][0, 1] == pytest.approx(first["frechet"][0, 1], abs=1e-12)
    assert abs(second["cka"][0, 1] - first["cka"][0, 1]) > 0.05


def test_frames_that_do_not_vary_are_no_division_by_zero():
    out = consistency([torch.ones(5, 3), torch.ones(5, 3), torch.full((5, 3), 2.0)])
    np.testing.assert_allclose(out["cosine"], np.ones((3, 3)))
    np.testing.assert_allclose(out["cka"], np.ones((3, 3)))
    assert out["frechet"][0, 1] == 0.0
    assert out["frechet"][0, 2] == 1.0


@pytest.mark.parametrize(
    ("bad", "match"),
    [
        ([], "no hidden states"),
        ([torch.zeros(4, 3), torch.zeros(4, 2)], r"\[\[4, 2\], \[4, 3\]\]"),
        ([torch.zeros(1, 3)], "F >= 2"),
        ([torch.zeros(2, 4, 3)], r"expected one shape \[F, D\]"),
        ([torch.full((4, 3), float("nan"))], "NaN or infinity"),
    ],
)
def test_bad_hidden_states_are_refused(bad, match):
    with pytest.raises(ValueError, match=match):
        consistency(bad)


def test_a_layer_that_adds_nothing_leaves_all_depths_alike(tiny_model, speech):
    layer = tiny_model.encoder.layers[0]
    for linear in (layer.ffn1.down, layer.ffn2.down, layer.attention.out, layer.conv.pointwise2):
        torch.nn.init.zeros_(linear.weight)
        torch.nn.init.zeros_(linear.bias)
    matrices = model_consistency(tiny_model, load_corpus(speech), max_frames=300)
    ones = np.ones((3, 3))
    # depth 0 lacks the layer's last norm
    np.testing.assert_allclose(matrices["cosine"][1:, 1:], ones, atol=1e-5)
    np.testing.assert_allclose(matrices["cka"][1:, 1:], ones, atol=1e-5)
    np.testing.assert_allclose(matrices["frechet"][1:, 1:], 0 * ones, atol=1e-4)
    assert summarise(matrices)["cka"] == pytest.approx(1.0, abs=1e-5)


def test_only_real_frames_count_and_the_draw_is_seeded(tiny_model, speech):
    corpus = load_corpus(speech)
    first, again, other = (model_consistency(tiny_model, corpus, max_frames=150, seed=s) for s in (0, 0, 1))
    for measure in MEASURES:
        np.testing.assert_array_equal(first[measure], again[measure])
        assert not np.array_equal(first[measure], other[measure])
    # an utterance of its own length in a padded batch gives the states it gives alone
    one = corpus.select(ids=[corpus[0].id])
    audio = one.audio(one[0])[None]
    with torch.no_grad():
        hidden, _ = tiny_model.hidden_states(audio, torch.tensor([audio.shape[1]]))
    expected = torch.cosine_similarity(hidden[1][0], hidden[3][0], -1).mean()
    assert model_consistency(tiny_model, one)["cosine"][1, 3] == pytest.approx(float(expected), abs=2e-3)


def test_summary_leaves_out_the_front_end_and_the_diagonal():
    matrix = np.array([[9.0, 9, 9, 9], [9, 1, 0.5, 0.2], [9, 0.5, 1, 0.8], [9, 0.2, 0.8, 1]])
    assert summarise({m: matrix for m in MEASURES})["cka"] == pytest.approx(0.5)
