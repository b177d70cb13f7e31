"""Hidden states for probes and consistency are the encoder's own, each from the right utterance and time."""

import pytest
import torch

from lcconformer.data import IGNORE, frame_count, frame_labels, load_corpus
from lcconformer.ssl.evaluation.hidden_states import (
    choose_frames,
    choose_utterances,
    collect_sequences,
    collect_states,
    random_init_like,
    stream_sequences,
)


def alone(model, corpus, utterance):
    """Hidden states and mel of an utterance that is encoded by itself."""
    audio = corpus.audio(utterance)[None]
    length = torch.tensor([audio.shape[1]])
    with torch.no_grad():
        states, _ = model.hidden_states(audio, length)
        mel, _ = model.features(audio, length)
    return [x[0] for x in states], mel[0]


def test_sequences_are_those_of_each_utterance_alone(tiny_model, speech):
    corpus = load_corpus(speech)
    utterances = choose_utterances(corpus)
    store = collect_sequences(tiny_model, corpus, utterances, [0, 2, 3])
    assert store.hidden.dtype == store.mel.dtype == torch.float16
    start = 0
    # batches go from the longest utterance to the shortest
    for utterance in sorted(utterances, key=lambda u: -u.num_samples):
        states, mel = alone(tiny_model, corpus, utterance)
        count = len(states[0])
        rows = slice(start, start + count)
        expected = torch.stack([states[k] for k in (0, 2, 3)])
        torch.testing.assert_close(store.hidden[:, rows].float(), expected, rtol=2e-3, atol=2e-3)
        frames = store.mel[rows].flatten(0, 1).float()  # two frames under each output
        torch.testing.assert_close(frames[: len(mel)], mel, rtol=2e-3, atol=2e-3)
        assert (frames[len(mel) :] == 0).all()
        labels = store.labels[rows].flatten()
        assert torch.equal(labels[: len(mel)], frame_labels(utterance, len(mel)))
        assert (labels[len(mel) :] == IGNORE).all()
        assert (store.spans[rows] == torch.tensor([start, start + count - 1])).all()
        start += count
    assert start == len(store.labels)


def test_collected_sequences_are_the_streamed_ones(tiny_model, make_speech, monkeypatch):
    from lcconformer.ssl.evaluation import hidden_states

    monkeypatch.setattr(hidden_states, "_BATCH_SECONDS", 3.0)  # several batches
    corpus = load_corpus(make_speech("streamed", 12))
    utterances = choose_utterances(corpus)
    parts = list(stream_sequences(tiny_model, corpus, utterances, [1]))
    store = collect_sequences(tiny_model, corpus, utterances, [1])
    assert len(parts) > 1
    assert torch.equal(store.hidden, torch.cat([p.hidden for p in parts], 1))
    assert torch.equal(store.labels, torch.cat([p.labels for p in parts]))
    done = 0
    for part in parts:
        assert torch.equal(store.spans[done : done + len(part.labels)], part.spans + done)
        done += len(part.labels)


def test_utterances_are_drawn_until_there_are_enough_frames_the_same_for_the_same_seed(speech):
    corpus = load_corpus(speech)

    def drawn(**options):
        return [u.id for u in choose_utterances(corpus, **options)]

    few = choose_utterances(corpus, max_frames=150, seed=1)
    frames = [frame_count(u.num_samples) for u in few]
    assert sum(frames[:-1]) < 150 <= sum(frames)
    assert drawn(max_frames=150, seed=1) == drawn(seed=1)[: len(few)]
    assert drawn(seed=1) != drawn(seed=2)
    assert sorted(drawn()) == sorted(u.id for u in corpus)


def test_an_exact_number_of_outputs_is_drawn_the_same_for_the_same_seed(speech):
    corpus = load_corpus(speech)

    def drawn(seed):
        return {(c.utterance.id, int(p)) for c in choose_frames(corpus, max_frames=100, seed=seed) for p in c.positions}

    assert len(drawn(0)) == 100
    assert drawn(0) == drawn(0)
    assert drawn(0) != drawn(1)
    whole = choose_frames(corpus, max_frames=10_000, step=4)
    assert sum(len(c.positions) for c in whole) == sum(-(-frame_count(u.num_samples) // 4) for u in corpus)


def test_few_outputs_come_from_few_utterances_but_not_from_one(make_speech):
    corpus = load_corpus(make_speech("spread", 40))
    used = len(choose_frames(corpus, max_frames=60))
    assert 2 <= used < 10


def test_states_of_drawn_outputs_are_those_of_each_utterance_alone(tiny_model, speech):
    corpus = load_corpus(speech)
    choices = choose_frames(corpus, max_frames=150, step=2)
    hidden = collect_states(tiny_model, corpus, choices, [1, 3])
    assert hidden.dtype == torch.float16
    expected = []
    for choice in sorted(choices, key=lambda c: -c.utterance.num_samples):
        states, _ = alone(tiny_model, corpus, choice.utterance)
        expected.append(torch.stack([states[k][choice.positions] for k in (1, 3)]))
    torch.testing.assert_close(hidden.float(), torch.cat(expected, 1), rtol=2e-3, atol=2e-3)


def test_unusable_audio_is_left_out_and_counted(tiny_model, make_speech):
    folder = make_speech("broken", 5)
    corpus = load_corpus(folder)
    utterances = choose_utterances(corpus)
    outputs = {u.id: -(-frame_count(u.num_samples) // 2) for u in utterances}
    (folder / "broken03.flac").write_bytes(b"fLaC nothing behind it")
    with pytest.warns(UserWarning, match=r"broken03\.flac"):
        store = collect_sequences(tiny_model, corpus, utterances, [0])
    assert len(store.labels) == sum(outputs.values()) - outputs["broken03"]
    assert list(corpus.skipped) == ["broken03.flac"]


def test_audio_all_unusable_is_an_error(tiny_model, make_speech):
    folder = make_speech("lost", 3)
    first, second = load_corpus(folder), load_corpus(folder)
    for file in folder.glob("*.flac"):
        file.write_bytes(b"nothing")
    for collect in (
        lambda: collect_sequences(tiny_model, first, choose_utterances(first), [0]),
        lambda: collect_states(tiny_model, second, choose_frames(second, max_frames=10, step=2), [0]),
    ):
        with (
            pytest.warns(UserWarning, match="lost0"),
            pytest.raises(ValueError, match=r"none of the audio .* is usable"),
        ):
            collect()


def test_no_alignment_is_an_error(make_speech):
    with pytest.raises(ValueError, match="no utterance has a phone alignment"):
        choose_utterances(load_corpus(make_speech("bare", 3, aligned=False)))


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
