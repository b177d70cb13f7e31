"""Probes learn what is there to learn, and training all depths together changes nothing for any of them."""

import pytest
import torch

from lcconformer.data import IGNORE
from lcconformer.ssl.evaluation.classifiers import train_probes


def clusters(frames=2000, classes=4, dim=6, spread=0.3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, dim, generator=generator) * 2
    labels = torch.randint(classes, (frames,), generator=generator)
    return centres[labels] + spread * torch.randn(frames, dim, generator=generator), labels


def one_sequence(count):
    return torch.tensor([0, count - 1]).expand(count, 2)


def train(features, labels, **options):
    """Probes of single vectors with one label each."""
    return train_probes(
        features, labels[:, None], one_sequence(len(labels)), **{"context": 0, "whiten": True, **options}
    )


def logits(probes, x):
    """Logits [G, U, C] of both probes."""
    return [y[:, :, 0] for y in probes.logits(x, one_sequence(x.shape[1]))]


def accuracy(probes, features, labels):
    return probes.correct(features, labels[:, None], one_sequence(len(labels))) / len(labels)


def test_separated_clusters_are_learned_and_noise_is_not():
    x, labels = clusters()
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    features = torch.stack([x, noise])
    probes = train(features[:, :1000], labels[:1000], classes=4, hidden=16, epochs=40, batch=32, learning_rate=1e-2)
    result = accuracy(probes, features[:, 1000:], labels[1000:])  # [2, G]
    assert (result[:, 0] > 0.98).all()
    assert (result[:, 1] < 0.35).all()


def test_only_the_hidden_layer_learns_exclusive_or():
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(3000, 2, generator=generator) * 2 - 1
    labels = (x.prod(1) > 0).long()
    probes = train(x[None], labels, classes=2, hidden=32, epochs=40, batch=128, learning_rate=2e-3)
    linear, hidden = accuracy(probes, x[None], labels)[:, 0]
    assert linear < 0.65
    assert hidden > 0.95


def test_context_shows_the_neighbours_in_the_same_sequence_and_no_others():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 1, generator=generator)
    spans = torch.tensor([[8 * (i // 8), 8 * (i // 8) + 7] for i in range(4000)])  # 500 sequences of 8
    before = (torch.arange(4000) - 1).maximum(spans[:, 0])
    labels = (x[before, 0] > 0).long()[:, None]  # the vector before, the first one its own
    options = {"classes": 2, "whiten": True, "hidden": 16, "epochs": 20, "batch": 64, "learning_rate": 1e-2}
    seeing, blind = (train_probes(x[None], labels, spans, context=c, **options) for c in (1, 0))
    inner = (torch.arange(4000) > spans[:, 0]).nonzero()[:, 0]
    for probes, least, most in ((seeing, 0.95, 1.0), (blind, 0.0, 0.6)):
        for y in probes.logits(x[None], spans, inner):
            assert least <= float((y[0, :, 0].argmax(-1) == labels[inner, 0]).float().mean()) <= most
    # nothing beyond the ends of a sequence is seen
    one = seeing.logits(x[None], spans, torch.arange(8, 16))
    cut = seeing.logits(x[None, 8:16], one_sequence(8))
    for whole, part in zip(one, cut):
        torch.testing.assert_close(whole, part)


def test_each_label_of_a_vector_has_its_own_classifier_and_unknown_ones_do_not_count():
    x, first = clusters()
    second = (first + 1) % 4
    labels = torch.stack([first, second], 1)
    labels[::3, 1] = IGNORE
    labels[::6] = IGNORE
    spans = one_sequence(len(x))
    probes = train_probes(
        x[None], labels, spans, classes=4, context=0, whiten=False, hidden=16, epochs=20, batch=32, learning_rate=1e-2
    )
    for y in probes.logits(x[None], spans):
        right = y[0].argmax(-1) == torch.stack([first, second], 1)
        assert (right.float().mean(0) > 0.98).all()
    known = int((labels != IGNORE).sum())
    assert (probes.correct(x[None], labels, spans) > 0.98 * known).all()
    assert (probes.correct(x[None], labels, spans) <= known).all()


def test_training_together_gives_what_training_alone_gives():
    a, labels = clusters()
    b = torch.randn(a.shape, generator=torch.Generator().manual_seed(3)) + a
    options = {"classes": 4, "hidden": 8, "epochs": 3, "batch": 100, "seed": 5}
    both = train(torch.stack([a, b]), labels, **options)
    for i, x in enumerate((a, b)):
        alone = train(x[None], labels, **options)
        for together, single in zip(logits(both, torch.stack([a, b])), logits(alone, x[None])):
            torch.testing.assert_close(together[i], single[0], rtol=1e-4, atol=1e-4)


def test_the_same_features_give_the_same_probe_and_seeds_matter():
    x, labels = clusters(frames=500)
    twice = x.expand(2, -1, -1)
    first, again, other = (
        logits(train(twice, labels, classes=4, hidden=8, epochs=2, seed=s), twice)[1] for s in (0, 0, 1)
    )
    torch.testing.assert_close(first[0], first[1], rtol=0, atol=1e-6)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_unit_and_offset_of_a_channel_do_not_matter():
    x, labels = clusters()
    scaled = x * torch.tensor([1.0, 10.0, 100.0, 0.1, 1.0, 5.0]) + 3.0
    options = {"classes": 4, "hidden": 8, "epochs": 2}
    for plain, other in zip(
        logits(train(x[None], labels, **options), x[None]), logits(train(scaled[None], labels, **options), scaled[None])
    ):
        torch.testing.assert_close(plain, other, rtol=1e-2, atol=1e-2)


def test_whitening_decorrelates_channels_and_standardising_does_not():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2000, 2, generator=generator) @ torch.tensor([[3.0, 2.0], [0.0, 1.0]])
    labels = torch.randint(2, (2000,), generator=generator)
    standard = (x - x.mean(0)) / x.std(0, correction=0)
    correlations = standard.T @ standard / len(x)
    white = correlations @ torch.linalg.inv(correlations + 0.01 * torch.eye(2))
    for whiten, expected in ((True, white), (False, correlations)):
        probes = train(x[None], labels, classes=2, hidden=4, epochs=1, whiten=whiten)
        seen = ((x[None] - probes.mean) @ probes.whitener)[0]
        torch.testing.assert_close(seen.T @ seen / len(x), expected, rtol=1e-4, atol=1e-4)
    assert abs(white[0, 1]) < 0.1 < abs(correlations[0, 1])


def test_correlated_channels_are_learned_in_few_steps():
    """The class is in a direction with a hundredth of the variance of the rest, as in hidden states of a deep loop."""
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(4000, 1, generator=generator)
    labels = torch.randint(2, (4000,), generator=generator)
    sign = torch.tensor([1.0, -1.0, 1.0, -1.0]) * (2.0 * labels[:, None] - 1.0)
    x = common + 0.1 * sign + 0.05 * torch.randn(4000, 4, generator=generator)
    probes = train(x[None], labels, classes=2, hidden=8, epochs=2, batch=128, learning_rate=1e-2)
    assert (accuracy(probes, x[None], labels) > 0.95).all()


def test_a_step_has_as_many_labels_whatever_the_number_per_vector(monkeypatch):
    x, labels = clusters(frames=400)
    sizes, own = [], torch.nn.functional.cross_entropy
    monkeypatch.setattr(
        torch.nn.functional, "cross_entropy", lambda y, t, **k: (sizes.append(len(t)), own(y, t, **k))[1]
    )
    options = {"classes": 4, "context": 0, "whiten": True, "epochs": 1, "batch": 100}
    for each in (1, 4):
        train_probes(x[None], labels[:, None].expand(-1, each), one_sequence(len(x)), **options)
    assert set(sizes) == {100}


def test_a_channel_that_does_not_vary_is_ignored():
    x, labels = clusters()
    x[:, 0] = 7.0
    probes = train(x[None], labels, classes=4, hidden=8, epochs=5, batch=128)
    assert (probes.whitener[0, 0] == 0).all()
    moved = x.clone()
    moved[:, 0] = 1e4
    torch.testing.assert_close(logits(probes, moved[None])[1], logits(probes, x[None])[1])


def test_progress_is_told_every_epoch():
    x, labels = clusters(frames=50)
    calls = []
    train(x[None], labels, classes=4, epochs=3, progress=lambda: calls.append(1))
    assert len(calls) == 3


@pytest.mark.parametrize(
    ("features", "labels", "match"),
    [
        (torch.zeros(5, 3), torch.zeros(5, 1, dtype=torch.int64), r"features \[5, 3\]"),
        (torch.zeros(2, 5, 3), torch.zeros(4, 1, dtype=torch.int64), r"labels \[4, 1\]"),
        (torch.zeros(2, 5, 3), torch.zeros(5, dtype=torch.int64), r"labels \[5\]"),
        (torch.zeros(2, 0, 3), torch.zeros(0, 1, dtype=torch.int64), "no known label"),
        (torch.randn(1, 5, 3), torch.tensor([[0, 1, 2, 3, 4]]).T, "labels 0 ... 4; expected 0 ... 3"),
        (torch.randn(1, 2, 3), torch.tensor([[-1], [1]]), "labels -1 ... 1"),
        (torch.randn(1, 2, 3), torch.full((2, 1), IGNORE), "no known label"),
        (torch.full((1, 2, 3), float("inf")), torch.tensor([[0], [1]]), "NaN or infinity"),
    ],
)
def test_bad_input_is_refused(features, labels, match):
    with pytest.raises(ValueError, match=match):
        train_probes(features, labels, one_sequence(features.shape[-2]), classes=4, context=0, whiten=True)
