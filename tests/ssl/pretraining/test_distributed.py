"""Two processes under torchrun take the steps of one process with twice the batches."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lcconformer.ssl import load_checkpoint

pytestmark = pytest.mark.timeout(900)  # the first test waits for two runs of five minutes at most

# run once with one process and accumulate=2, once with two processes and accumulate=1
WORKER = """
import dataclasses, json, os, sys
import torch
from lcconformer import ConformerConfig
from lcconformer.data import load_corpus
from lcconformer.ssl import FeatureSettings, ObjectiveSettings, PretrainingModel
from lcconformer.ssl.pretraining.settings import PretrainSettings
from lcconformer.ssl.pretraining.run import pretrain

def double(self):  # float64, so that equal means equal
    model = PretrainingModel(self.config, self.features, self.objective)
    model.encoder.double(), model.objective.double()
    return model

PretrainSettings.build_model = double
torch.set_num_threads(1)
folder, out, accumulate = sys.argv[1], sys.argv[2], int(sys.argv[3])
rank = int(os.environ.get("RANK", 0))
corpus = load_corpus(folder).preload()
config = ConformerConfig(d_model=16, num_heads=2, ffn_dim=32, num_layers=4, conv_kernel_size=3, input_dim=20)
base = PretrainSettings(config, FeatureSettings(20), steps=5, batch_seconds=2.0, learning_rate=1e-2, accumulate=accumulate,
                        device="cpu", checkpoint_every=100)
for name, changes in {
    "shared": {},
    "unshared": {"config": config.replace(sharing="none")},
    "sandwich": {"depth": "sandwich", "distill": 0.5, "objective": ObjectiveSettings("best_rq", codebook_size=16)},
}.items():
    train, held = corpus.select(exclude_speakers=["d"]), corpus.select(speakers=["d"])
    result = pretrain(dataclasses.replace(base, **changes), train, held, out=f"{out}/{name}", progress=False)
    with open(f"{out}/{name}-{rank}.json", "w") as file:
        json.dump([[r.loss, r.depths, r.grad_norm, r.utterances] for r in result.history], file)
"""


@pytest.fixture(scope="module")
def runs(speech_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("ranks")
    worker = folder / "worker.py"
    worker.write_text(WORKER)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    outs = []
    for name, launcher, accumulate in (("one", [sys.executable], "2"), ("two", torchrun, "1")):
        command = [*launcher, str(worker), str(speech_folder), str(folder / name), accumulate]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        assert done.returncode == 0, done.stderr[-3000:]
        outs.append(folder / name)
    return outs[0], outs[1]


NAMES = ["shared", "unshared", "sandwich"]


@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_equal_one_with_twice_the_batches(name: str, runs: tuple[Path, Path]) -> None:
    one, two = (load_checkpoint(run / name) for run in runs)
    assert one.tensors.keys() == two.tensors.keys()
    assert one.tensors["model.encoder.layers.0.norm.weight"].dtype == torch.float64
    for tensor in one.tensors:
        torch.testing.assert_close(one.tensors[tensor], two.tensors[tensor], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_losses_norms_and_utterances_are_those_of_all_ranks(name: str, runs: tuple[Path, Path]) -> None:
    alone = json.loads((runs[0] / f"{name}-0.json").read_text())
    for rank in (0, 1):
        rows = json.loads((runs[1] / f"{name}-{rank}.json").read_text())
        for (loss, _, norm, utterances), (loss2, _, norm2, utterances2) in zip(alone, rows, strict=True):
            assert (loss2, norm2) == pytest.approx((loss, norm), rel=1e-6)
            assert utterances2 == utterances


@pytest.mark.parametrize("name", NAMES)
def test_every_rank_trains_the_same_depths(name: str, runs: tuple[Path, Path]) -> None:
    depths = [[row[1] for row in json.loads((runs[1] / f"{name}-{rank}.json").read_text())] for rank in (0, 1)]
    assert depths[0] == depths[1]
    assert len({tuple(d) for d in depths[0]}) > 1
