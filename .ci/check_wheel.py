"""Run where a wheel is installed and the checkout is not: the first example of the README, on the compiled kernels alone.

``python .ci/check_wheel.py README.md``, from any folder that holds no ``lcconformer``; needs nothing but the wheel.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

os.environ["LCCONFORMER_STRICT"] = "1"  # nothing but the fastest backend, or an error

import torch

import lcconformer
from lcconformer import extension, ops

checkout = Path(__file__).resolve().parents[1]
module = Path(lcconformer.__file__).resolve()
assert checkout not in module.parents or ".venv" in module.parts, f"{module} is the checkout's, not the wheel's"
assert extension.why_missing() is None, extension.why_missing()
assert len(extension.openmp_runtimes()) == 1, f"two OpenMP runtimes in one process: {extension.openmp_runtimes()}"

information = subprocess.run(
    [sys.executable, "-m", "lcconformer", "info"], check=True, capture_output=True, text=True
).stdout
print(information)
found = dict(re.findall(r"^  (\w+) +cpu float32: (\w+)$", information, re.M))
for op in ("residual_layer_norm", "feed_forward", "glu_depthwise_conv", "relpos_attention", "inference", "training"):
    expected = "loop" if op in ("inference", "training") else "cpu"
    assert found.get(op) == expected, f"{op} is served by {found.get(op)}, expected {expected}"

(program, *_) = re.findall(r"```python\n(.*?)```", Path(sys.argv[1]).read_text(encoding="utf-8"), re.S)
names: dict[str, object] = {}
exec(program, names)
output = names["output"]
assert isinstance(output, torch.Tensor)
assert output.shape == (2, 400, 80)
assert output.isfinite().all()

# the kernels compute, and compute what plain PyTorch does
x, weight = torch.randn(2, 37, 64), torch.randn(32, 15)
with lcconformer.backend("cpu"):
    fast = ops.glu_depthwise_conv(x, weight)
with lcconformer.backend("torch"):
    torch.testing.assert_close(fast, ops.glu_depthwise_conv(x, weight), rtol=1e-4, atol=1e-5)
print(f"the wheel at {module.parent} works on its compiled kernels")
