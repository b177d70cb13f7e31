"""Constants of the machine."""

import json

from lcconformer.bench.gpu import constants


def test_constants_without_a_gpu_say_what_is_missing(tmp_path):
    path = tmp_path / "machine.json"
    found = constants.measure(path, "cpu", small=True)
    assert json.loads(path.read_text()) == found
    assert found["missing"] == {"launch_and_chip": "needs a CUDA device"}
    assert len(found["matrix_products_tflops"]) == 5
    assert all(
        rate > 0 for rate in (*found["matrix_products_tflops"].values(), *found["torch_depthwise_gb_per_s"].values())
    )
