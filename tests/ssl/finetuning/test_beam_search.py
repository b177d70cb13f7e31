"""N-grams, and beam searches with them, against what can be computed by hand and by trying everything."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch

from lcconformer import ConformerConfig
from lcconformer.data import PHONES, Utterance
from lcconformer.ssl import FeatureSettings
from lcconformer.ssl.finetuning import (
    BeamSearch,
    Recogniser,
    TaskSettings,
    calibrate_search,
    search_rates,
    write_ngrams,
)
from lcconformer.ssl.finetuning.evaluation import Heard
from lcconformer.ssl.finetuning.units import sentences_of

TEXT = [["A", "B"], ["A", "A", "B"], ["B"], ["B", "A", "A", "B"]]
TOKENS = ("<blank>", "A", "B")


def read(path: Path) -> tuple[dict[tuple[str, ...], float], dict[tuple[str, ...], float]]:
    """Log10 probabilities and log10 back-off weights of an ARPA file."""
    probabilities, left = {}, {}
    for line in path.read_text().splitlines():
        parts = line.split("\t")
        if len(parts) > 1:
            gram = tuple(parts[1].split())
            probabilities[gram] = float(parts[0])
            left[gram] = float(parts[2]) if len(parts) > 2 else 0.0
    return probabilities, left


def log10(model, history: tuple[str, ...], token: str) -> float:
    """As back-off models are defined."""
    probabilities, left = model
    if (*history, token) in probabilities:
        return probabilities[(*history, token)]
    return left.get(history, 0.0) + log10(model, history[1:], token)


def log10_of_sentence(model, order: int, sentence) -> float:
    marked = ["<s>", *sentence, "</s>"]
    return sum(
        log10(model, tuple(marked[max(0, place - order + 1) : place]), marked[place]) for place in range(1, len(marked))
    )


def test_bigrams_by_hand(tmp_path: Path) -> None:
    probabilities, left = read(write_ngrams(tmp_path / "lm", [["A", "B"]], 2))
    # three single tokens, each once: half of 1/3, and half of the uniform law
    assert [probabilities[(t,)] for t in ("A", "B", "</s>")] == pytest.approx([math.log10(1 / 3)] * 3, abs=1e-6)
    # A came the one time that a sentence started: half, and half of what A has anyway
    assert probabilities["<s>", "A"] == pytest.approx(math.log10(1 / 2 + 1 / 2 * 1 / 3), abs=1e-6)
    assert left[("<s>",)] == pytest.approx(math.log10(1 / 2), abs=1e-6)


@pytest.mark.parametrize("order", [2, 3, 6])
def test_probabilities_of_what_follows_add_up_to_one(tmp_path: Path, order: int) -> None:
    model = read(write_ngrams(tmp_path / "lm", TEXT, order))
    for length in range(order):
        for history in itertools.product(("<s>", "A", "B"), repeat=length):
            total = sum(10.0 ** log10(model, history, token) for token in ("A", "B", "</s>"))
            assert total == pytest.approx(1.0, abs=1e-5), history


@pytest.mark.parametrize(
    ("sentences", "order", "message"),
    [
        ([], 2, "the text has no token"),
        ([["A B"]], 2, "'A B' is no token"),
        ([["<s>"]], 2, "'<s>' is no token"),
        ([[""]], 2, "'' is no token"),
        (TEXT, 7, "order is 7; expected an integer from 2 to 6"),
    ],
)
def test_no_model_of_what_is_no_text(tmp_path: Path, sentences, order: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write_ngrams(tmp_path / "lm", sentences, order)


def test_what_is_said_is_named_as_the_classes_are() -> None:
    utterance = Utterance("u", "s", "", "b a", 16_000, (("SIL", 3), ("AA1", 4), ("S", 3)), "u.wav")
    silent = Utterance("v", "s", "", "", 16_000, None, "v.wav")
    model = recogniser(" AB")
    for units, said in (("phones", ["AA", "S"]), ("characters", ["B", "|", "A"])):
        assert sentences_of([utterance, silent], units) == [said]
        assert {*said} < {*model.tokens(units)}
    assert model.tokens("phones")[1:] == tuple(PHONES[1:])
    assert model.tokens("characters") == ("<blank>", "|", "A", "B")


def recogniser(alphabet: str) -> Recogniser:
    config = ConformerConfig(
        16, 2, 32, num_layers=2, conv_kernel_size=3, input_dim=24, subsampling="stack", subsampling_factor=4
    )
    return Recogniser(config, FeatureSettings(24), TaskSettings(), alphabet).eval()


@pytest.fixture
def flashlight() -> None:
    pytest.importorskip("flashlight.lib.text.decoder", reason="pip install 'lcconformer[beam]'")


@pytest.mark.usefixtures("flashlight")
class TestSearch:
    @pytest.mark.parametrize(
        ("weight", "penalty", "order"), [(0.0, 0.0, 2), (1.5, 0.0, 2), (0.7, 0.9, 2), (4.0, -1.0, 3)]
    )
    def test_it_finds_what_trying_every_path_finds(
        self, tmp_path: Path, weight: float, penalty: float, order: int
    ) -> None:
        lm = write_ngrams(tmp_path / "lm", TEXT, order)
        search, model = BeamSearch(TOKENS, lm, weight, penalty, beam=500), read(lm)
        changed = 0
        for seed in range(6):
            logits = 2.0 * torch.randn(6, 3, generator=torch.Generator().manual_seed(seed))
            scores = logits.log_softmax(-1) - torch.tensor([penalty, 0.0, 0.0])
            best: dict[tuple[int, ...], float] = {}
            for path in itertools.product(range(3), repeat=len(logits)):
                classes = tuple(c for c, _ in itertools.groupby(path) if c)
                score = sum(float(row[c]) for row, c in zip(scores, path))
                best[classes] = max(best.get(classes, -math.inf), score)
            total = {
                classes: score + weight * log10_of_sentence(model, order, [TOKENS[c] for c in classes])
                for classes, score in best.items()
            }
            assert tuple(search(logits)) == max(total, key=total.__getitem__)
            changed += max(total, key=total.__getitem__) != max(best, key=best.__getitem__)
        assert bool(changed) == (weight > 0)

    def test_nothing_is_found_in_nothing(self, tmp_path: Path) -> None:
        search = BeamSearch(TOKENS, write_ngrams(tmp_path / "lm", TEXT, 2))
        assert search(torch.zeros(0, 3)) == []
        assert search(torch.tensor([[9.0, 0.0, 0.0]] * 4)) == []

    def test_a_language_model_tells_apart_what_sounds_alike(self, tmp_path: Path) -> None:
        model = recogniser("AB")
        aa, iy, s, blank = (PHONES.index(name) for name in ("AA", "IY", "S", "SIL"))
        logits = torch.full((4, len(PHONES)), -9.0)
        logits[[0, 1, 3], [aa, blank, blank]] = 9.0
        logits[2, s], logits[2, iy] = 1.0, 0.9  # just S, by ear
        heard = [Heard("u", {"phones": logits}, {"phones": "AA IY"})]
        lm = write_ngrams(tmp_path / "lm", [["AA", "IY"]] * 3 + [["S"]], 2)
        search = calibrate_search(model, heard, "phones", lm)
        assert (search.weight, search.blank_penalty) == (0.5, 0.0)  # the first that is right
        assert search_rates(model, heard, "phones", None) == {"per": 0.5, "phones": 2}
        assert search_rates(model, heard, "phones", search) == {"per": 0.0, "phones": 2}

    def test_transcribing_with_it(self, tmp_path: Path) -> None:
        model = recogniser(" AB")
        audio = 0.1 * torch.randn(1, 16_000)
        letters = write_ngrams(tmp_path / "letters", [["A", "|", "B"]], 2)
        search = BeamSearch(model.tokens("characters"), letters, 50.0, 30.0)
        texts, depths = model.transcribe(audio, units="characters", depth=1, search=search)
        assert depths == [1]
        assert texts != model.transcribe(audio, units="characters", depth=1)[0]
        with pytest.raises(ValueError, match=r"over 4 tokens, <blank> | A B \.\.\., and not over this model's phones"):
            model.transcribe(audio, units="phones", search=search)

    @pytest.mark.parametrize(
        ("changes", "error", "message"),
        [
            ({"lm": "nowhere"}, FileNotFoundError, "no language model at nowhere"),
            ({"lm": __file__}, ValueError, "is no language model in ARPA's or KenLM's format"),
            ({"weight": -1.0}, ValueError, "weight is -1"),
            ({"blank_penalty": math.nan}, ValueError, "blank_penalty is nan"),
            ({"beam": 0}, ValueError, "beam is 0"),
        ],
    )
    def test_what_cannot_be_is_refused(self, tmp_path: Path, changes, error, message: str) -> None:
        lm = write_ngrams(tmp_path / "lm", TEXT, 2)
        with pytest.raises(error, match=message):
            BeamSearch(**{"tokens": TOKENS, "lm": lm} | changes)
