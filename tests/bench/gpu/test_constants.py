"""Constants of the machine."""

import json

import pytest
from lcconformer.bench.gpu import constants


def test_constants_without_a_gpu_say_what_is_missing(tmp_path):
    path = tmp_path / "machine.json"
    found = constants.measure(path, tmp_path, "cpu", small=True)
    assert json.loads(path.read_text()) == found
    assert found["missing"] == dict.fromkeys(("launch_and_chip", "cluster_loop"), "needs a CUDA device")
    assert len(found["matrix_products_tflops"]) == 5
    assert all(
        rate > 0 for rate in (*found["matrix_products_tflops"].values(), *found["torch_depthwise_gb_per_s"].values())
    )


def test_the_program_of_a_cluster_is_for_one_architecture(monkeypatch):
    monkeypatch.setattr(constants.torch.cuda, "get_device_capability", lambda: (8, 0))
    monkeypatch.setattr(constants.shutil, "which", lambda name, path=None: name)
    with pytest.raises(RuntimeError, match="needs sm_90, this GPU is sm_80"):
        constants._native("cuda", constants.CLUSTER_PHASES, only=9)
