"""What batching promises: budget, padding, every utterance once, any number of ranks alike, resumption, survival."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lcconformer.data import BatchLoader, LogMel, frame_labels, load_corpus, plan_batches

from .conftest import write_folder
from .test_corpora import bad_file

LENGTHS = st.lists(st.integers(1, 3000), min_size=1, max_size=200)


@given(
    lengths=LENGTHS,
    budget=st.integers(3000, 20000),
    max_padding=st.floats(0, 0.5),
    seed=st.none() | st.integers(0, 2**32),
)
@settings(deadline=None, max_examples=200)
def test_plan_keeps_budget_and_padding_and_loses_nothing(lengths, budget, max_padding, seed):
    rng = None if seed is None else np.random.default_rng(seed)
    plan = plan_batches(lengths, budget=budget, max_padding=max_padding, rng=rng)
    assert sorted(i for batch in plan for i in batch) == list(range(len(lengths)))
    for batch in plan:
        padded = len(batch) * max(lengths[i] for i in batch)
        assert padded <= budget
        assert padded - sum(lengths[i] for i in batch) <= max_padding * padded


def test_plan_fills_its_budget():
    # typical speech: hardly any padding, hardly any batch that could have taken one more
    rng = np.random.default_rng(0)
    lengths = (16000 * rng.gamma(4, 3, 2000)).astype(int).clip(16000, 400000)
    for order in (None, np.random.default_rng(1)):
        plan = plan_batches(lengths, budget=60 * 16000, rng=order)
        padded = sum(len(batch) * max(lengths[batch]) for batch in plan)
        assert 1 - lengths.sum() / padded < 0.06
        assert padded / len(plan) > 0.8 * 60 * 16000


def test_plan_refuses_what_cannot_fit():
    with pytest.raises(ValueError, match=r"in 1 ... budget=10, got 3 ... 11"):
        plan_batches([3, 11], budget=10)
    with pytest.raises(ValueError, match=r"got 0 \.\.\. 3"):
        plan_batches([3, 0], budget=10)


@pytest.fixture
def corpus(tmp_path):
    rng = np.random.default_rng(0)
    return load_corpus(write_folder(tmp_path / "c", [float(s) for s in rng.uniform(0.3, 2.5, 24).round(4)]))


def equal(one, two):
    return one.ids == two.ids and all(
        torch.equal(getattr(one, name), getattr(two, name)) for name in ("audio", "lengths", "labels")
    )


OPTIONS = {"max_seconds": 5.0, "crop_seconds": 1.2, "labels": True, "seed": 3}


def test_batches_hold_what_they_say(corpus):
    by_id = {u.id: u for u in corpus}
    seen = []
    for batch in BatchLoader(corpus, max_seconds=5, labels=True).epoch(0):
        seen += batch.ids
        assert batch.audio.dtype == torch.float32
        assert batch.audio.numel() <= 5 * 16000
        features, frames = LogMel(num_bins=40)(batch.audio, batch.lengths)
        assert batch.labels.shape == features.shape[:2]
        for i, name in enumerate(batch.ids):
            n = batch.lengths[i]
            assert n == by_id[name].num_samples
            assert torch.equal(batch.audio[i, :n], corpus.audio(by_id[name]))
            assert (batch.audio[i, n:] == 0).all()
            assert torch.equal(batch.labels[i, : frames[i]], frame_labels(by_id[name], int(frames[i])))
            assert (batch.labels[i, frames[i] :] == -100).all()
    assert sorted(seen) == sorted(by_id)


def test_crops_stay_aligned_with_their_labels_and_move(corpus):
    by_id = {u.id: u for u in corpus}
    starts = {}
    for epoch in range(3):
        for batch in BatchLoader(corpus, **OPTIONS).epoch(epoch):
            assert batch.audio.shape[1] <= 19200
            for name, audio, n, labels in zip(batch.ids, batch.audio, batch.lengths, batch.labels):
                u = by_id[name]
                whole = corpus.audio(u)
                assert n == min(u.num_samples, 19200)
                places = range((u.num_samples - int(n)) // 160 + 1)
                start = next(s for s in places if torch.equal(whole[160 * s :][:n], audio[:n]))
                frames = (int(n) + 80) // 160
                assert torch.equal(labels[:frames], frame_labels(u, frames, start))
                if u.num_samples > 19200 + 1600:
                    starts.setdefault(name, set()).add(start)
    assert starts
    assert all(len(places) > 1 for places in starts.values())


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_a_function_of_seed_and_epoch_alone(corpus, workers):
    loader = BatchLoader(corpus, **OPTIONS)
    first = list(loader.epoch(1))
    assert len(first) == loader.steps(1)
    again = list(BatchLoader(corpus.preload(), workers=workers, **OPTIONS).epoch(1))
    assert len(first) == len(again)
    assert all(map(equal, first, again))
    ids = [b.ids for b in first]
    assert ids != [b.ids for b in loader.epoch(2)]
    assert ids != [b.ids for b in BatchLoader(corpus, **{**OPTIONS, "seed": 4}).epoch(1)]
    assert {frozenset(i) for i in ids} != {frozenset(b.ids) for b in loader.epoch(2)}


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_the_single_process_stream(corpus, world_size):
    single = list(BatchLoader(corpus, **OPTIONS).epoch(5))
    ranks = [BatchLoader(corpus, rank=r, world_size=world_size, **OPTIONS) for r in range(world_size)]
    steps = len(single) // world_size
    assert [loader.steps(5) for loader in ranks] == [steps] * world_size
    for step, batches in enumerate(zip(*(loader.epoch(5) for loader in ranks), strict=True)):
        assert all(map(equal, batches, single[step * world_size :][:world_size]))
    assert step == steps - 1


def test_resumes_at_any_step_without_reading_what_came_before(corpus):
    loader = BatchLoader(corpus, rank=1, world_size=2, **OPTIONS)
    whole = list(loader.epoch(2))
    read = []
    audio = corpus.audio
    corpus.audio = lambda u: read.append(u.id) or audio(u)
    for start in range(len(whole) + 1):
        read.clear()
        rest = list(loader.epoch(2, start))
        assert len(rest) == len(whole) - start
        assert all(map(equal, rest, whole[start:]))
        assert sorted(read) == sorted(name for batch in rest for name in batch.ids)


def test_unshuffled_goes_from_long_to_short_and_does_not_change(corpus):
    loader = BatchLoader(corpus, max_seconds=5, shuffle=False)
    lengths = torch.cat([b.lengths for b in loader.epoch(0)])
    assert (lengths.diff() <= 0).all()
    assert loader.plan(0) == loader.plan(7)


def test_padding_is_measured(corpus):
    loader = BatchLoader(corpus, **OPTIONS)
    batches = list(loader.epoch(3))
    padded, real = sum(b.audio.numel() for b in batches), sum(int(b.lengths.sum()) for b in batches)
    assert loader.padding(3) == pytest.approx(1 - real / padded)
    assert 0 < loader.padding(3) < 0.2


def test_left_early_it_stops_decoding(corpus):
    loader = BatchLoader(corpus, workers=2, **OPTIONS)
    stream = loader.epoch(0)
    next(stream)
    stream.close()
    assert len(list(loader.epoch(0))) == loader.steps(0)


def test_bad_audio_leaves_its_batch(corpus, tmp_path):
    loader = BatchLoader(corpus, max_seconds=5)
    want = [b.ids for b in loader.epoch(0)]
    victim = next(ids for ids in want if len(ids) > 1)[1]
    bad_file(tmp_path / "c" / f"{victim}.flac", "noise")
    with pytest.warns(UserWarning, match=f"skipped audio file 1: {victim}.flac: cannot be decoded"):
        got = [b.ids for b in loader.epoch(0)]
    assert got == [tuple(name for name in ids if name != victim) for ids in want]


def test_a_batch_is_never_empty(corpus, tmp_path):
    loader = BatchLoader(corpus, max_seconds=5)
    plan = loader.plan(0)
    for index in plan[1]:
        bad_file(tmp_path / "c" / corpus[index].source, "gone")
    with pytest.warns(UserWarning, match="skipped audio file"):
        batches = list(loader.epoch(0))
    assert set(corpus.skipped) == {corpus[i].source for i in plan[1]}
    assert len(batches) == len(plan)
    assert len(batches[1].ids) == 1
    assert not {corpus[i].id for i in plan[1]} & {name for b in batches for name in b.ids}


@pytest.mark.filterwarnings("ignore:skipped audio")
def test_nothing_readable_is_an_error(corpus, tmp_path):
    for u in corpus:
        bad_file(tmp_path / "c" / u.source, "gone")
    with pytest.raises(ValueError, match=r"no audio file of .* is usable; Corpus\.skipped says why"):
        list(BatchLoader(corpus, max_seconds=5).epoch(0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_seconds": 1.0}, r"lasts 2\.\d s, a batch at most max_seconds=1: .*set crop_seconds"),
        ({"max_seconds": 5.0, "crop_seconds": 6.0}, "crop_seconds <= max_seconds, got 6.0 and 5.0"),
        ({"max_seconds": 5.0, "rank": 2, "world_size": 2}, "rank < world_size, got rank 2 and world_size 2"),
        ({"max_seconds": 5.0, "world_size": 500}, "fewer batches than the 500 ranks"),
        ({"max_seconds": 5.0, "max_padding": 1.0}, "0 <= max_padding < 1"),
        ({"max_seconds": 5.0, "seed": -1}, "seed >= 0"),
    ],
)
def test_impossible_wishes(corpus, options, message):
    with pytest.raises(ValueError, match=message):
        BatchLoader(corpus, **options)
    with pytest.raises(ValueError, match="must not be negative, got 0 and -1"):
        next(BatchLoader(corpus, max_seconds=5.0).epoch(0, -1))


def test_real_speech_pads_little(shared_data):
    corpus = load_corpus(shared_data / "ls_dev20.zip")
    loader = BatchLoader(corpus, max_seconds=80, crop_seconds=15, labels=True)
    assert loader.padding(0) < 0.05
    batch = next(loader.epoch(0))
    features, _ = LogMel(high_freq=5600)(batch.audio, batch.lengths)
    assert features.isfinite().all()
    assert (batch.labels >= 0).float().mean() > 0.9
