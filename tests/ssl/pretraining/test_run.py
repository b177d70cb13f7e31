"""The loop: exact resume, clean stops, bad gradients, and runs that cannot begin."""

import csv
import dataclasses
import itertools
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lcconformer import ConformerConfig
from lcconformer.data import BatchLoader, Corpus, frame_count, load_corpus
from lcconformer.ssl import FeatureSettings, ObjectiveSettings, PretrainingModel, load_checkpoint, load_model
from lcconformer.ssl.checkpoint import find_checkpoints, save_checkpoint
from lcconformer.ssl.masking import draw_masks
from lcconformer.ssl.pretraining.run import pretrain
from lcconformer.ssl.pretraining.settings import PretrainResult, PretrainSettings, StepRecord

CONFIG = ConformerConfig(
    d_model=16,
    num_heads=2,
    ffn_dim=32,
    num_layers=3,
    conv_kernel_size=3,
    input_dim=20,
    subsampling="stack",
    subsampling_factor=2,
)
SETTINGS = PretrainSettings(
    config=CONFIG,
    features=FeatureSettings(20),
    steps=8,
    batch_seconds=3.0,
    crop_seconds=1.0,
    validate_every=4,
    checkpoint_every=3,
    device="cpu",
)


@pytest.fixture(scope="module")
def corpora(speech_folder: Path) -> tuple[Corpus, Corpus]:
    corpus = load_corpus(speech_folder).preload()
    return corpus.select(speakers=["a", "b", "c"]), corpus.select(speakers=["d"])


def settings(**changes: object) -> PretrainSettings:
    return dataclasses.replace(SETTINGS, **changes)


def signal_at(step: int, number: signal.Signals = signal.SIGINT):
    """A callback that sends this process a signal in a step."""

    def callback(record: StepRecord) -> None:
        if record.step == step:
            os.kill(os.getpid(), number)

    return callback


def losses(*results: PretrainResult) -> list[float]:
    return [record.loss for result in results for record in result.history]


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


VARIANTS = {
    "reconstruction": {"accumulate": 2},
    "best_rq": {"objective": ObjectiveSettings("best_rq", codebook_size=32), "precision": "bfloat16"},
    "sandwich": {
        "depth": "sandwich",
        "distill": 0.5,
        "config": CONFIG.replace(conditioning=("film",), conv_norm="batch"),
    },
    "unshared": {"config": CONFIG.replace(sharing="none")},
    "muon": {"config": CONFIG.replace(sharing="none"), "optimizer": "muon"},
    "layer_drop": {"config": CONFIG.replace(sharing="none", num_layers=3), "depth": "layer_drop"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_resumed_run_is_the_uninterrupted_one(variant: str, corpora: tuple, tmp_path: Path) -> None:
    told = settings(**VARIANTS[variant])
    whole = pretrain(told, *corpora, out=tmp_path / "whole", progress=False)
    assert whole.history[-1].epoch > 0  # passes the end of an epoch
    # stopped in the fourth step; then killed after the seventh, whose newest checkpoint is the sixth
    first = pretrain(told, *corpora, out=tmp_path / "parts", progress=False, on_step=signal_at(4))
    assert first.stopped == "SIGINT"
    assert first.checkpoint.name == "step_00000004.safetensors"

    def die(record: StepRecord) -> None:
        if record.step == 7:
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        pretrain(told, *corpora, out=tmp_path / "parts", resume=True, progress=False, on_step=die)
    last = pretrain(told, *corpora, out=tmp_path / "parts", resume=True, progress=False)

    assert [r.step for r in last.history] == [7, 8]
    assert losses(first, last) == [loss for i, loss in enumerate(losses(whole), 1) if i not in (5, 6)]
    one, two = load_checkpoint(whole.checkpoint), load_checkpoint(last.checkpoint)
    assert one.tensors.keys() == two.tensors.keys()
    assert all(torch.equal(x, two.tensors[name]) for name, x in one.tensors.items())
    assert last.validation == whole.validation[1:]
    # the log reads as if nothing had happened
    for name in ("steps.csv", "validation.csv"):
        columns = ("step", "loss", "depths") if name == "steps.csv" else ("step", "depth", "loss")
        logs = [[[row[c] for c in columns] for row in rows(tmp_path / part / name)] for part in ("whole", "parts")]
        assert logs[0] == logs[1]
        assert len(logs[0]) == (8 if name == "steps.csv" else 6)


@pytest.mark.parametrize(("dropout", "masks", "distinct"), [(0.1, False, 4), (0.0, True, 4), (0.0, False, 1)])
def test_dropout_and_masks_differ_from_step_to_step(
    dropout: float, masks: bool, distinct: int, corpora: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not masks:
        monkeypatch.setattr(
            "lcconformer.ssl.pretraining.draws.draw_masks", lambda *a, **k: draw_masks(*a, **{**k, "step": 0})
        )
    # every step has all of the same speech and changes next to nothing
    told = settings(
        steps=4, batch_seconds=60.0, crop_seconds=None, learning_rate=1e-12, weight_decay=0.0, depth="fixed"
    )
    told = dataclasses.replace(told, config=CONFIG.replace(dropout=dropout))
    speech = corpora[0].select(speakers=["a"])
    result = pretrain(told, speech, out=tmp_path, progress=False)
    assert len({round(loss, 5) for loss in losses(result)}) == distinct


def test_every_masked_frame_of_a_step_weighs_the_same(corpora: tuple, tmp_path: Path) -> None:
    told = settings(steps=1, accumulate=3, depth="fixed", config=CONFIG.replace(dropout=0.0), clip=1e9)
    record = pretrain(told, corpora[0], out=tmp_path, progress=False).history[0]

    with torch.random.fork_rng():
        torch.manual_seed(told.seed)
        model = told.build_model()
    loader = BatchLoader(corpora[0], max_seconds=told.batch_seconds, crop_seconds=told.crop_seconds, seed=told.seed)
    total, frames, counts = torch.zeros(()), 0, set()
    for batch in itertools.islice(loader.epoch(0), 3):
        lengths = frame_count(batch.lengths).tolist()
        masks = draw_masks(batch.ids, lengths, seed=0, step=0, fraction=0.15, span=7, factor=2)
        sums, _ = model(batch.audio, batch.lengths, masks, (3,))
        total, frames = total + sums[0], frames + masks.num_chosen
        counts.add(masks.num_chosen)
    assert len(counts) > 1  # or the mean of means would do as well
    (total / frames).backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    assert record.loss == pytest.approx(float(total.detach()) / frames, rel=1e-5)
    assert record.grad_norm == pytest.approx(float(norm), rel=1e-4)


def test_training_lowers_the_validation_loss_at_every_depth(corpora: tuple, tmp_path: Path) -> None:
    told = settings(steps=60, learning_rate=1e-2, validate_every=1, checkpoint_every=1000)
    result = pretrain(dataclasses.replace(told, validate_every=59), *corpora, out=tmp_path, progress=False)
    (early, before), (late, after) = pretrain(
        dataclasses.replace(told, steps=2), *corpora, out=tmp_path / "two", progress=False
    ).validation
    assert (early, late) == (1, 2)
    final = result.validation[-1][1]
    assert len(final) == 3
    assert all(y < 0.95 * x for x, y in zip(before, final, strict=True))
    assert before != after


def test_files_of_a_run(corpora: tuple, tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = pretrain(settings(keep=2), *corpora, out=out, progress=False)
    assert [p.name for p in find_checkpoints(out)] == ["step_00000006.safetensors", "step_00000008.safetensors"]
    assert result.stopped == "steps"
    assert result.checkpoint == find_checkpoints(out)[-1]
    log = rows(out / "steps.csv")
    assert [int(row["step"]) for row in log] == list(range(1, 9))
    assert [float(row["loss"]) for row in log] == losses(result)
    assert all(float(row["compute_s"]) > 0 for row in log)
    sampler = settings().sampler()
    assert [row["depths"] for row in log] == [str(sampler.depths(step)[0]) for step in range(8)]
    assert [(row["step"], row["depth"]) for row in rows(out / "validation.csv")] == [
        (s, d) for s in "48" for d in "123"
    ]
    assert list((out / "tensorboard").glob("events*"))
    again = load_model(out)
    assert all(torch.equal(x, y) for x, y in zip(again.parameters(), result.model.parameters(), strict=True))
    # an epoch is all of the speech, cut to a second each
    epoch = [r for r in result.history if r.epoch == 0]
    assert sum(r.utterances for r in epoch) <= len(corpora[0])
    assert sum(r.seconds for r in epoch) <= sum(min(u.seconds, 1.0) for u in corpora[0])


def test_sigterm_stops_too_and_handlers_come_back(corpora: tuple, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    result = pretrain(settings(), *corpora, out=tmp_path, progress=False, on_step=signal_at(2, signal.SIGTERM))
    assert result.stopped == "SIGTERM"
    assert [r.step for r in result.history] == [1, 2]
    assert load_checkpoint(tmp_path).meta["step"] == 2
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_second_ctrl_c_ends_at_once(corpora: tuple, tmp_path: Path) -> None:
    def twice(record: StepRecord) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    # a shell's background job, as a CI step may be, inherits SIGINT ignored
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            pretrain(settings(), *corpora, out=tmp_path, progress=False, on_step=twice)
    finally:
        signal.signal(signal.SIGINT, before)


def test_generators_outside_are_left_alone(corpora: tuple, tmp_path: Path) -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    pretrain(settings(steps=2), *corpora, out=tmp_path, progress=False)
    assert torch.equal(torch.rand(2), expected)


def spoil(monkeypatch: pytest.MonkeyPatch, bad: set[int]) -> None:
    """Losses of these training batches (counted from 1) become NaN."""
    forward, calls = PretrainingModel.forward, iter(range(1, 10_000))

    def spoilt(self: PretrainingModel, *args: object) -> tuple:
        sums, apart = forward(self, *args)
        return (sums * float("nan") if self.training and next(calls) in bad else sums), apart

    monkeypatch.setattr(PretrainingModel, "forward", spoilt)


def test_a_nan_step_is_left_out(corpora: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, {3, 5})
    told = settings(checkpoint_every=1, keep=100, config=CONFIG.replace(conv_norm="batch"))
    with pytest.warns(UserWarning, match=r"left out: its gradient is not finite") as caught:
        result = pretrain(told, *corpora, out=tmp_path, progress=False)
    said = [str(w.message) for w in caught if "left out" in str(w.message)]
    assert [text.split(":")[0] for text in said] == ["step 3 left out", "step 5 left out"]
    assert "2 such steps so far, 1 in a row" in said[1]
    assert [r.skipped for r in result.history] == [0, 0, 1, 1, 2, 2, 2, 2]
    assert [r.loss == r.loss for r in result.history] == [True, True, False, True, False, True, True, True]
    assert all(torch.isfinite(p).all() for p in result.model.parameters())
    # a skipped step writes no checkpoint that could push out a good one
    assert [int(p.stem[5:]) for p in find_checkpoints(tmp_path)] == [1, 2, 4, 6, 7, 8]


def test_a_nan_step_changes_nothing(corpora: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = settings(steps=3, config=CONFIG.replace(conv_norm="batch"))
    spoil(monkeypatch, {3})
    with pytest.warns(UserWarning, match="left out"):
        three = pretrain(told, corpora[0], out=tmp_path / "three", progress=False)
    monkeypatch.undo()
    two = pretrain(told, corpora[0], out=tmp_path / "two", progress=False, on_step=signal_at(2))
    state = two.model.state_dict()
    assert all(torch.equal(x, state[n]) for n, x in three.model.state_dict().items() if "num_batches" not in n)


def test_many_nan_steps_in_a_row_end_the_run(corpora: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, set(range(5, 100)))
    with (
        pytest.warns(UserWarning, match="20 in a row"),
        pytest.raises(
            ValueError, match=r"not finite in 20 steps in a row, up to step 24: lower learning_rate.*step_00000003"
        ),
    ):
        pretrain(settings(steps=50), corpora[0], out=tmp_path, progress=False)
    assert load_checkpoint(tmp_path).meta["step"] == 3


def test_a_time_limit_ends_the_run_with_the_learning_rate(
    corpora: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # a clock that moves by 10 ms whenever it is read
    ticks = itertools.count()
    monkeypatch.setattr(
        "lcconformer.ssl.pretraining.run.time", SimpleNamespace(perf_counter=lambda: 0.01 * next(ticks))
    )
    told = settings(steps=100_000, max_minutes=0.03, validate_every=10**6, checkpoint_every=10**6)
    result = pretrain(told, corpora[0], out=tmp_path, progress=False)
    assert result.stopped == "minutes"
    assert 1.8 <= result.history[-1].elapsed_s < 1.9
    assert result.history[-1].learning_rate < 0.5 * max(r.learning_rate for r in result.history)
    assert load_checkpoint(tmp_path).meta["step"] == len(result.history)


def test_a_finished_run_resumes_to_nothing(corpora: tuple, tmp_path: Path) -> None:
    pretrain(settings(steps=2), *corpora, out=tmp_path, progress=False)
    again = pretrain(settings(steps=2), *corpora, out=tmp_path, progress=False, resume=True)
    assert (again.history, again.stopped) == ([], "steps")
    assert again.checkpoint.is_file()


def test_resume_refuses_other_settings_and_data(corpora: tuple, tmp_path: Path) -> None:
    pretrain(settings(steps=2), *corpora, out=tmp_path, progress=False)
    with pytest.raises(ValueError, match=r"holds a run already.*resume it, or choose another folder"):
        pretrain(settings(steps=2), *corpora, out=tmp_path, progress=False)
    other = settings(steps=3, config=CONFIG.replace(ffn_dim=48), checkpoint_every=1)
    with pytest.raises(ValueError, match=r"other settings: ffn_dim was 32, now 48; steps was 2, now 3: give the same"):
        pretrain(other, *corpora, out=tmp_path, progress=False, resume=True)
    with pytest.raises(ValueError, match=r"other data: it was trained on \d+ utterances"):
        pretrain(settings(steps=2), corpora[1], out=tmp_path, progress=False, resume=True)
    with pytest.raises(ValueError, match=r"steps.csv is a file; give the folder of a run, or one to be made"):
        pretrain(settings(steps=2), *corpora, out=tmp_path / "steps.csv", progress=False)
    newest = find_checkpoints(tmp_path)[-1]
    newest.write_bytes(newest.read_bytes()[:1000])
    with pytest.raises(ValueError, match="damaged"):
        pretrain(settings(steps=2), *corpora, out=tmp_path, progress=False, resume=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"precision": "float16"}, "'float16' on a CPU"),
        ({"device": "abacus"}, "device is 'abacus'; expected 'cpu'"),
        ({"device": "meta"}, "device is 'meta'; expected 'cpu'"),
        ({"accumulate": 50}, "fewer than accumulate = 50: lower accumulate or batch_seconds"),
        ({"crop_seconds": None, "batch_seconds": 0.5}, "raise max_seconds"),
    ],
)
def test_a_run_refuses(change: dict, message: str, corpora: tuple, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        pretrain(settings(**change), *corpora, out=tmp_path, progress=False)
    assert not find_checkpoints(tmp_path)


DAMAGE = {
    "no data": (lambda meta, tensors: meta.pop("data"), "it was trained on None"),
    "no step": (lambda meta, tensors: meta.pop("step"), "the counters: step is None; expected an integer"),
    "step": (lambda meta, tensors: meta.update(step="2"), "the counters: step is '2'"),
    "time": (lambda meta, tensors: meta.update(elapsed_s=-1.0), "elapsed_s is -1.0"),
    "no scaler": (lambda meta, tensors: meta.pop("scaler"), "loss scaling is damaged"),
    "scaler": (lambda meta, tensors: meta.update(scaler=3), "loss scaling is damaged"),
    "settings": (lambda meta, tensors: meta.update(settings=[]), "settings was"),
    "weight": (lambda meta, tensors: tensors.popitem(), "encoder.*is missing|objective.*is missing"),
    "no optimizer entry": (lambda meta, tensors: tensors.pop(OF_OPTIMIZER + "exp_avg"), "lacks exp_avg of encoder"),
    "optimizer's shape": (
        lambda meta, tensors: tensors.update({OF_OPTIMIZER + "exp_avg": torch.zeros(3)}),
        r"exp_avg is torch.float32 \[3\]; expected finite values of shape",
    ),
    "optimizer's values": (
        lambda meta, tensors: tensors[OF_OPTIMIZER + "exp_avg_sq"].fill_(torch.nan),
        "exp_avg_sq is .*expected finite values",
    ),
    "optimizer's name": (
        lambda meta, tensors: tensors.update({"optimizer.magic.exp_avg": torch.zeros(3)}),
        "magic.exp_avg, which is of no parameter",
    ),
}
OF_OPTIMIZER = "optimizer.encoder.layers.0.ffn1.up.weight."


@pytest.mark.parametrize("damage", DAMAGE)
def test_resuming_a_damaged_checkpoint(damage: str, corpora: tuple, tmp_path: Path) -> None:
    told = settings(steps=2, checkpoint_every=2)
    checkpoint = load_checkpoint(pretrain(told, *corpora, out=tmp_path, progress=False).checkpoint)
    change, message = DAMAGE[damage]
    meta, tensors = dict(checkpoint.meta), dict(sorted(checkpoint.tensors.items(), reverse=True))
    change(meta, tensors)
    save_checkpoint(checkpoint.path, tensors, meta)
    with pytest.raises(ValueError, match=message):
        pretrain(told, *corpora, out=tmp_path, resume=True, progress=False)


def test_what_a_killed_run_left_behind_is_cleared(corpora: tuple, tmp_path: Path) -> None:
    pretrain(settings(steps=2), *corpora, out=tmp_path, progress=False)
    (tmp_path / ".step_00000003.safetensors.0123abcd.tmp").write_bytes(b"half a checkpoint")
    (tmp_path / "notes.tmp").write_text("the user's own")
    pretrain(settings(steps=2), *corpora, out=tmp_path, resume=True, progress=False)
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".tmp"] == ["notes.tmp"]


def test_two_runs_in_one_folder(corpora: tuple, tmp_path: Path) -> None:
    """While one trains, another one in the same folder is refused, resumed or not, and disturbs nothing."""
    refused = []

    def second(record: StepRecord) -> None:
        if record.step == 2:
            for resume in (False, True):
                with pytest.raises(ValueError, match=r"another run is in .* \(process \d+ on ") as caught:
                    pretrain(SETTINGS, *corpora, out=tmp_path / "run", resume=resume, progress=False)
                refused.append(caught)

    first = pretrain(SETTINGS, *corpora, out=tmp_path / "run", progress=False, on_step=second)
    alone = pretrain(SETTINGS, *corpora, out=tmp_path / "alone", progress=False)
    assert len(refused) == 2
    assert losses(first) == losses(alone)


FULL = """
import resource, signal, sys, warnings
from pathlib import Path
from lcconformer.data import load_corpus
from lcconformer.ssl.pretraining.run import pretrain
sys.path.insert(0, sys.argv[3])
from test_run import SETTINGS, settings

def full(record):
    # from here on no file may grow beyond so many bytes, as if the disk were full; and room again later
    if record.step in (2, 7 if sys.argv[4] == "for a while" else 100):
        resource.setrlimit(resource.RLIMIT_FSIZE, (300 if record.step == 2 else -1, -1))

if sys.argv[4] == "from the start":
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, -1))
corpus = load_corpus(sys.argv[1]).preload()
result = pretrain(settings(keep=1), corpus, out=sys.argv[2], progress=False, on_step=full)
print(result.checkpoint.name)
"""


@pytest.mark.parametrize("when", ["for a while", "to the end", "from the start"])
def test_a_full_disk(when: str, speech_folder: Path, tmp_path: Path) -> None:
    """A checkpoint that finds no room costs a warning; the last one, an error that names the last good one."""
    out = tmp_path / "run"
    arguments = [str(speech_folder), str(out), str(Path(__file__).parent), when]
    done = subprocess.run([sys.executable, "-c", FULL, *arguments], capture_output=True, text=True, timeout=250)
    names = [path.name for path in find_checkpoints(out)]
    if when == "from the start":
        assert f"RunError: no checkpoint can be written to {out}" in done.stderr
        assert not names
        return
    for step in (3, 6):
        assert f"the checkpoint of step {step} cannot be written" in done.stderr
    assert "the run goes on" in done.stderr
    assert f"the logs in {out} cannot be written" in done.stderr
    if when == "for a while":
        assert done.stdout == "step_00000008.safetensors\n", done.stderr
        assert names == ["step_00000008.safetensors"]
        assert load_checkpoint(out).meta["step"] == 8
    else:
        assert "RunError: the checkpoint of step 8 cannot be written" in done.stderr
        assert "there is no earlier one: make room, then resume the run" in done.stderr
        assert not names
        assert not [path for path in out.iterdir() if path.suffix == ".tmp"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is said without CUDA")
def test_cuda_is_refused_where_there_is_none(corpora: tuple, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="sees no CUDA device; use 'cpu'"):
        pretrain(settings(device="cuda"), *corpora, out=tmp_path, progress=False)
