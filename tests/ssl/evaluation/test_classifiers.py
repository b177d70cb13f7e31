"""Probes learn what is there to learn, and training all depths together changes nothing for any of them."""

import pytest
import torch

from lcconformer.ssl.evaluation.classifiers import train_probes


def clusters(frames=2000, classes=4, dim=6, spread=0.3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, dim, generator=generator) * 2
    labels = torch.randint(classes, (frames,), generator=generator)
    return centres[labels] + spread * torch.randn(frames, dim, generator=generator), labels


def accuracy(probes, features, labels):
    return probes.correct(features, labels) / len(labels)


def test_separated_clusters_are_learned_and_noise_is_not():
    x, labels = clusters()
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    features = torch.stack([x, noise])
    probes = train_probes(
        features[:, :1000], labels[:1000], classes=4, hidden=16, epochs=40, batch_frames=32, learning_rate=1e-2
    )
    result = accuracy(probes, features[:, 1000:], labels[1000:])  # [2, G]
    assert (result[:, 0] > 0.98).all()
    assert (result[:, 1] < 0.35).all()


def test_only_the_hidden_layer_learns_exclusive_or():
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(3000, 2, generator=generator) * 2 - 1
    labels = (x.prod(1) > 0).long()
    probes = train_probes(x[None], labels, classes=2, hidden=32, epochs=40, batch_frames=128)
    linear, hidden = accuracy(probes, x[None], labels)[:, 0]
    assert linear < 0.65
    assert hidden > 0.95


def test_training_together_gives_what_training_alone_gives():
    a, labels = clusters()
    b = torch.randn(a.shape, generator=torch.Generator().manual_seed(3)) + a
    options = {"classes": 4, "hidden": 8, "epochs": 3, "batch_frames": 100, "seed": 5}
    both = train_probes(torch.stack([a, b]), labels, **options)
    for i, x in enumerate((a, b)):
        alone = train_probes(x[None], labels, **options)
        for together, single in zip(both.logits(torch.stack([a, b])), alone.logits(x[None])):
            torch.testing.assert_close(together[i], single[0], rtol=1e-4, atol=1e-4)


def test_the_same_features_give_the_same_probe_and_seeds_matter():
    x, labels = clusters(frames=500)
    twice = x.expand(2, -1, -1)
    first, again, other = (
        train_probes(twice, labels, classes=4, hidden=8, epochs=2, seed=s).logits(twice)[1] for s in (0, 0, 1)
    )
    torch.testing.assert_close(first[0], first[1], rtol=0, atol=1e-6)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_unit_and_offset_of_a_channel_do_not_matter():
    x, labels = clusters()
    scaled = x * torch.tensor([1.0, 10.0, 100.0, 0.1, 1.0, 5.0]) + 3.0
    options = {"classes": 4, "hidden": 8, "epochs": 2}
    for plain, other in zip(
        train_probes(x[None], labels, **options).logits(x[None]),
        train_probes(scaled[None], labels, **options).logits(scaled[None]),
    ):
        torch.testing.assert_close(plain, other, rtol=1e-2, atol=1e-2)


def test_correlated_channels_are_told_apart_within_a_few_steps():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(2, (2000,), generator=generator)
    loud = torch.randn(2000, 1, generator=generator)
    # the label hides in the difference of two nearly equal channels
    x = torch.cat([loud, loud + 0.06 * (labels[:, None] - 0.5)], 1) + 1e-3 * torch.randn(2000, 2, generator=generator)
    probes = train_probes(x[None], labels, classes=2, hidden=8, epochs=20, batch_frames=100)
    white = (x[None] - probes.mean) @ probes.whitener
    torch.testing.assert_close(white[0].T @ white[0] / len(x), torch.eye(2), rtol=0.05, atol=0.05)
    assert (accuracy(probes, x[None], labels) > 0.99).all()


def test_a_channel_that_does_not_vary_is_ignored():
    x, labels = clusters()
    x[:, 0] = 7.0
    probes = train_probes(x[None], labels, classes=4, hidden=8, epochs=5, batch_frames=128)
    assert (probes.whitener[0, 0] == 0).all()
    moved = x.clone()
    moved[:, 0] = 1e4
    torch.testing.assert_close(probes.logits(moved[None])[1], probes.logits(x[None])[1])


def test_progress_is_told_every_epoch():
    x, labels = clusters(frames=50)
    calls = []
    train_probes(x[None], labels, classes=4, epochs=3, progress=lambda: calls.append(1))
    assert len(calls) == 3


@pytest.mark.parametrize(
    ("features", "labels", "match"),
    [
        (torch.zeros(5, 3), torch.zeros(5, dtype=torch.int64), r"features \[5, 3\]"),
        (torch.zeros(2, 5, 3), torch.zeros(4, dtype=torch.int64), r"labels \[4\]"),
        (torch.zeros(2, 0, 3), torch.zeros(0, dtype=torch.int64), "F >= 1"),
        (torch.randn(1, 5, 3), torch.tensor([0, 1, 2, 3, 4]), "labels 0 ... 4; expected 0 ... 3"),
        (torch.randn(1, 2, 3), torch.tensor([0, -100]), "labels -100 ... 0"),
        (torch.full((1, 2, 3), float("inf")), torch.tensor([0, 1]), "NaN or infinity"),
    ],
)
def test_bad_input_is_refused(features, labels, match):
    with pytest.raises(ValueError, match=match):
        train_probes(features, labels, classes=4)
