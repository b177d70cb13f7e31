"""Batches of utterances of similar length: the same for any number of processes, and resumable at any step.

An epoch consists of batches of at most ``max_seconds`` of audio, padding included.  Utterances are sorted by length, with
random jitter, so that they meet other utterances in every epoch.  A new batch begins where the limit on audio or padding
would be exceeded, and the batches are shuffled.  All of this depends on (seed, epoch) alone.  At step ``step``, rank ``rank``
gets batch ``step * world_size + rank``: together, the ranks get in one step what a single process gets in ``world_size``
consecutive steps, that is, with gradients accumulated over ``world_size`` batches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from .corpora import BadAudioError, Corpus
from .features import FRAME_SHIFT, SAMPLE_RATE, frame_count
from .phones import IGNORE, frame_labels
from .utterance import Utterance

_JITTER = 0.1  # part of the length, in the sorting key


@dataclass(frozen=True)
class Batch:
    """A padded batch.

    ids: B utterance ids. audio: ``[B, S]`` float32, zero-padded. lengths: ``[B]`` int64 samples.
    labels: ``[B, frame_count(S)]`` int64 phone classes of the 10 ms frames, -100 where unknown; or None.
    """

    ids: tuple[str, ...]
    audio: torch.Tensor
    lengths: torch.Tensor
    labels: torch.Tensor | None = None

    def to(self, device: torch.device | str) -> Batch:
        labels = None if self.labels is None else self.labels.to(device, non_blocking=True)
        return replace(
            self,
            audio=self.audio.to(device, non_blocking=True),
            lengths=self.lengths.to(device, non_blocking=True),
            labels=labels,
        )


def plan_batches(
    lengths: Sequence[int], *, budget: int, max_padding: float = 0.2, rng: np.random.Generator | None = None
) -> list[list[int]]:
    """Group indices into ``lengths``, each exactly once, into batches of similar length.

    The size of a batch (count x longest) is at most ``budget``, and the part of it that is padding at most ``max_padding``.
    With ``rng`` the order is random; without, batches go from the longest to the shortest.

    Raises:
        ValueError: a length exceeds ``budget`` or is not positive.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    if len(sizes) and not 0 < sizes.min() <= sizes.max() <= budget:
        raise ValueError(f"lengths must be in 1 ... budget={budget}, got {sizes.min()} ... {sizes.max()}")
    keys = sizes.astype(np.float64)
    if rng is not None:
        keys *= rng.uniform(1.0, 1.0 + _JITTER, len(sizes))
    batches: list[list[int]] = []
    longest = total = 0
    for index in np.argsort(-keys, kind="stable"):
        size = int(sizes[index])
        longest, total = max(longest, size), total + size
        padded = longest * (len(batches[-1]) + 1) if batches else 0
        if not batches or padded > budget or padded - total > max_padding * padded:
            batches.append([])
            longest = total = size
        batches[-1].append(int(index))
    if rng is not None:
        rng.shuffle(batches)
    return batches


class BatchLoader:
    """Batches of a corpus for one rank.

    Args:
        corpus: where the utterances come from; ``corpus.preload()`` keeps decoded audio in memory.
        max_seconds: largest amount of audio in a batch, padding included.
        crop_seconds: longer utterances are cut to this length. When shuffling, the cut begins at a random 10 ms frame, so
            that labels stay aligned; otherwise, at the start. None: they are never cut.
        max_padding: largest part of a batch that may be padding.
        shuffle: True: random batches and crops; False: batches from the longest to the shortest utterance.
        labels: whether batches have phone labels.
        seed, rank, world_size: see the module's docstring. Batches at the end of an epoch that would not reach every rank
            are left out.
        workers: threads that decode ahead; 0: decode on demand.

    An utterance whose audio turns out to be unusable is left out of its batch, with a warning, and counted in
    ``corpus.skipped``. If nothing of a batch is left, it takes the next usable utterance of the corpus instead, so that all
    ranks do the same number of steps.

    Raises:
        ValueError: a size is out of range, or an utterance is longer than ``max_seconds`` and there is no ``crop_seconds``.
    """

    def __init__(
        self,
        corpus: Corpus,
        *,
        max_seconds: float,
        crop_seconds: float | None = None,
        max_padding: float = 0.2,
        shuffle: bool = True,
        labels: bool = False,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 1,
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"need 0 <= rank < world_size, got rank {rank} and world_size {world_size}")
        if seed < 0 or workers < 0 or not 0 <= max_padding < 1:
            raise ValueError(
                f"need seed >= 0, workers >= 0, 0 <= max_padding < 1, got {seed}, {workers}, {max_padding}"
            )
        if crop_seconds is not None and not 0.01 <= crop_seconds <= max_seconds:
            raise ValueError(f"need 0.01 <= crop_seconds <= max_seconds, got {crop_seconds} and {max_seconds}")
        self.corpus, self.shuffle, self.labels, self.seed = corpus, shuffle, labels, seed
        self.rank, self.world_size, self.workers = rank, world_size, workers
        self._max_padding = max_padding
        self._budget = int(max_seconds * SAMPLE_RATE)
        self._crop = None if crop_seconds is None else int(crop_seconds * SAMPLE_RATE) // FRAME_SHIFT * FRAME_SHIFT
        self._sizes = [min(u.num_samples, self._crop or u.num_samples) for u in corpus]
        longest = max(corpus, key=lambda u: u.num_samples)
        if max(self._sizes) > self._budget:
            raise ValueError(
                f"utterance {longest.id} lasts {longest.seconds:.1f} s, a batch at most max_seconds={max_seconds:g}: "
                "raise max_seconds, or set crop_seconds, or load the corpus with a smaller max_seconds"
            )
        if not self.steps(0):
            raise ValueError(
                f"{len(corpus)} utterances make fewer batches than the {world_size} ranks: "
                "lower max_seconds or world_size"
            )

    def plan(self, epoch: int) -> list[list[int]]:
        """Batches of an epoch for all ranks, as indices into the corpus."""
        rng = np.random.default_rng((self.seed, epoch)) if self.shuffle else None
        return plan_batches(self._sizes, budget=self._budget, max_padding=self._max_padding, rng=rng)

    def steps(self, epoch: int) -> int:
        """Number of steps in an epoch, the same on every rank."""
        return len(self.plan(epoch)) // self.world_size

    def padding(self, epoch: int) -> float:
        """Part of an epoch's audio, over all ranks, that is padding."""
        padded = sum(len(batch) * max(self._sizes[i] for i in batch) for batch in self.plan(epoch))
        return 1.0 - sum(self._sizes) / padded

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Iterate over this rank's batches of an epoch, from step ``start`` on; earlier ones are not decoded.

        Raises:
            ValueError: ``epoch`` or ``start`` is negative, or the corpus has no usable file.
        """
        if epoch < 0 or start < 0:
            raise ValueError(f"epoch and start must not be negative, got {epoch} and {start}")
        mine = self.plan(epoch)[self.rank :: self.world_size][: self.steps(epoch)][start:]
        if self.workers == 0:
            for indices in mine:
                yield self._load(epoch, indices)
            return
        pool = ThreadPoolExecutor(self.workers, thread_name_prefix="lcconformer-audio")
        try:
            ahead = 2 * self.workers
            pending = [pool.submit(self._load, epoch, indices) for indices in mine[:ahead]]
            for step in range(len(mine)):
                batch = pending.pop(0).result()
                if step + ahead < len(mine):
                    pending.append(pool.submit(self._load, epoch, mine[step + ahead]))
                yield batch
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _load(self, epoch: int, indices: list[int]) -> Batch:
        items = [item for index in indices if (item := self._item(epoch, index)) is not None]
        for step in range(1, len(self.corpus)):
            if items:
                break
            item = self._item(epoch, (indices[0] + step) % len(self.corpus))
            items = [] if item is None else [item]
        if not items:
            raise ValueError(f"no audio file of {self.corpus.name} is usable; Corpus.skipped says why")
        audio = [samples for _, samples, _ in items]
        labels = None
        if self.labels:
            tracks = [frame_labels(utterance, frame_count(len(samples)), start) for utterance, samples, start in items]
            labels = pad_sequence(tracks, batch_first=True, padding_value=IGNORE)
        return Batch(
            ids=tuple(utterance.id for utterance, _, _ in items),
            audio=pad_sequence(audio, batch_first=True),
            lengths=torch.tensor([len(samples) for samples in audio], dtype=torch.int64),
            labels=labels,
        )

    def _item(self, epoch: int, index: int) -> tuple[Utterance, torch.Tensor, int] | None:
        """Load an utterance: itself, its cropped audio and the first frame of the crop; None if it is unusable."""
        utterance = self.corpus[index]
        try:
            audio = self.corpus.audio(utterance)
        except BadAudioError as error:
            self.corpus.skipped.add(utterance.source, str(error))
            return None
        first = 0
        if self._crop is not None and len(audio) > self._crop:
            if self.shuffle:
                places = (len(audio) - self._crop) // FRAME_SHIFT + 1
                first = int(np.random.default_rng((self.seed, epoch, index)).integers(places))
            audio = audio[first * FRAME_SHIFT :][: self._crop]
        return utterance, audio, first
