"""Frames drawn for probes and consistency are the encoder's own, each from the right utterance and time."""

import pytest
import torch

from lcconformer.data import IGNORE, frame_count, frame_labels, load_corpus
from lcconformer.ssl.evaluation.hidden_states import choose_frames, collect_states, random_init_like, stream_states


def test_states_are_those_of_each_utterance_alone_repeated_to_10_ms(tiny_model, speech):
    corpus = load_corpus(speech)
    choices = choose_frames(corpus, labelled=True)
    seen = {}
    for part in stream_states(tiny_model, corpus, choices, [0, 2, 3]):
        seen.setdefault("hidden", []).append(part.hidden)
        seen.setdefault("mel", []).append(part.mel)
        seen.setdefault("labels", []).append(part.labels)
    hidden = torch.cat(seen["hidden"], 1)
    assert hidden.dtype == torch.float16

    expected_hidden, expected_mel, expected_labels = [], [], []
    # batches go from the longest utterance to the shortest
    for choice in sorted(choices, key=lambda c: -c.utterance.num_samples):
        audio = corpus.audio(choice.utterance)[None]
        length = torch.tensor([audio.shape[1]])
        with torch.no_grad():
            states, _ = tiny_model.hidden_states(audio, length)
            mel, _ = tiny_model.features(audio, length)
        labels = frame_labels(choice.utterance, frame_count(audio.shape[1]))
        known = (labels != IGNORE).nonzero()[:, 0]
        repeated = [states[k][0].repeat_interleave(2, 0)[known] for k in (0, 2, 3)]
        expected_hidden.append(torch.stack(repeated))
        expected_mel.append(mel[0, known])
        expected_labels.append(labels[known])
    torch.testing.assert_close(hidden.float(), torch.cat(expected_hidden, 1), rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(torch.cat(seen["mel"]).float(), torch.cat(expected_mel), rtol=2e-3, atol=2e-3)
    assert torch.equal(torch.cat(seen["labels"]), torch.cat(expected_labels))


def test_an_exact_number_of_frames_is_drawn_the_same_for_the_same_seed(speech):
    corpus = load_corpus(speech)

    def drawn(seed):
        return {(c.utterance.id, int(p)) for c in choose_frames(corpus, max_frames=100, seed=seed) for p in c.positions}

    assert len(drawn(0)) == 100
    assert drawn(0) == drawn(0)
    assert drawn(0) != drawn(1)
    whole = choose_frames(corpus)
    assert sum(len(c.positions) for c in whole) == sum(frame_count(u.num_samples) for u in corpus)
    assert all((c.positions % 4 == 0).all() for c in choose_frames(corpus, step=4))


def test_few_frames_come_from_few_utterances_but_not_from_one(make_speech):
    corpus = load_corpus(make_speech("spread", 40))
    used = len(choose_frames(corpus, max_frames=60))
    assert 2 <= used < 10


def test_labels_belong_to_their_frames(speech):
    corpus = load_corpus(speech)
    for choice in choose_frames(corpus, max_frames=200, labelled=True):
        labels = frame_labels(choice.utterance, frame_count(choice.utterance.num_samples))
        assert torch.equal(choice.labels, labels[choice.positions])
        assert (choice.labels != IGNORE).all()


def test_collected_states_are_the_streamed_ones(tiny_model, speech):
    corpus = load_corpus(speech)
    choices = choose_frames(corpus, max_frames=150)
    parts = list(stream_states(tiny_model, corpus, choices, [1]))
    store = collect_states(tiny_model, corpus, choices, [1])
    assert torch.equal(store.hidden, torch.cat([p.hidden for p in parts], 1))
    assert torch.equal(store.labels, torch.cat([p.labels for p in parts]))


def test_unusable_audio_is_left_out_and_counted(tiny_model, make_speech):
    folder = make_speech("broken", 5)
    corpus = load_corpus(folder)
    choices = choose_frames(corpus)
    (folder / "broken03.flac").write_bytes(b"fLaC nothing behind it")
    with pytest.warns(UserWarning, match=r"broken03\.flac"):
        store = collect_states(tiny_model, corpus, choices, [0])
    lost = next(c for c in choices if c.utterance.id == "broken03")
    assert len(store.labels) == sum(len(c.positions) for c in choices) - len(lost.positions)
    assert list(corpus.skipped) == ["broken03.flac"]


def test_audio_all_unusable_is_an_error(tiny_model, make_speech):
    folder = make_speech("lost", 3)
    corpus = load_corpus(folder)
    choices = choose_frames(corpus)
    for file in folder.glob("*.flac"):
        file.write_bytes(b"nothing")
    with pytest.warns(UserWarning, match="lost0"), pytest.raises(ValueError, match=r"none of the audio .* is usable"):
        collect_states(tiny_model, corpus, choices, [0])


def test_no_alignment_is_an_error(make_speech):
    with pytest.raises(ValueError, match="no utterance has a phone alignment"):
        choose_frames(load_corpus(make_speech("bare", 3, aligned=False)), labelled=True)


def test_random_init_control_differs_only_in_weights(tiny_model):
    before = torch.random.get_rng_state()
    first, again, other = (random_init_like(tiny_model, seed) for seed in (1, 1, 2))
    assert torch.equal(before, torch.random.get_rng_state())
    assert first.describe() == tiny_model.describe()
    weight = tiny_model.encoder.layers[0].ffn1.up.weight
    fresh = [m.encoder.layers[0].ffn1.up.weight for m in (first, again, other)]
    assert torch.equal(fresh[0], fresh[1])
    assert not torch.equal(fresh[0], fresh[2])
    assert not torch.equal(fresh[0], weight)
    assert not first.training
