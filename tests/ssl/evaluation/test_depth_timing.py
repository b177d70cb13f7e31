"""Inference time: every depth in every round, alternating, the first round thrown away, the median kept."""

import itertools

import pytest

from lcconformer.data import load_corpus
from lcconformer.ssl.evaluation import depth_timing
from lcconformer.ssl.evaluation.hidden_states import random_init_like


def test_rounds_alternate_and_the_median_is_kept(tiny_model, speech, monkeypatch):
    corpus = load_corpus(speech)
    order = []
    forward = tiny_model.encoder.forward

    def record(x, lengths, depth):
        order.append(depth)
        return forward(x, lengths, depth=depth)

    monkeypatch.setattr(tiny_model.encoder, "forward", record)
    # a clock under which call number n of the encoder takes 2^n seconds
    ticks = itertools.accumulate(itertools.chain.from_iterable((0.0, 2.0**n) for n in itertools.count()))
    monkeypatch.setattr(depth_timing.time, "perf_counter", lambda: next(ticks))
    result = depth_timing.time_depths({"m": tiny_model}, corpus, [1, 2, 3], rounds=3)["m"]
    assert order == [3, 2, 1, 1, 2, 3, 3, 2, 1, 1, 2, 3]
    # calls 3 to 11 count; each depth's median is its middle one, of the second counted round
    assert result.seconds == {1: 2.0**8, 2: 2.0**7, 3: 2.0**6}
    assert result.rounds == 3
    assert result.utterances == 8


def test_models_take_turns_within_a_round(tiny_model, speech, monkeypatch):
    other = random_init_like(tiny_model)
    order = []
    for name, model in (("a", tiny_model), ("b", other)):
        monkeypatch.setattr(model.encoder, "forward", lambda x, lengths, depth, name=name: order.append((name, depth)))
    result = depth_timing.time_depths({"a": tiny_model, "b": other}, load_corpus(speech), [1, 2], rounds=1)
    one = [("a", 1), ("a", 2), ("b", 1), ("b", 2)]
    assert order == one[::-1] + one
    assert list(result) == ["a", "b"]


def test_the_batch_is_real_speech_of_median_length(tiny_model, speech):
    corpus = load_corpus(speech)
    result = depth_timing.time_depths({"m": tiny_model}, corpus, [1], rounds=1)["m"]
    lengths = sorted(u.num_samples for u in corpus)[2:10]
    assert result.audio_seconds == pytest.approx(sum(lengths) / 16_000)
    assert result.seconds[1] > 0


def test_no_usable_audio_is_an_error(tiny_model, make_speech):
    folder = make_speech("silent", 3)
    corpus = load_corpus(folder)
    for file in folder.glob("*.flac"):
        file.write_bytes(b"nothing")
    with pytest.warns(UserWarning, match="silent0"), pytest.raises(ValueError, match="no audio to measure"):
        depth_timing.time_depths({"m": tiny_model}, corpus, [1])
