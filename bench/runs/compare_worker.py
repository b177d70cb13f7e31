"""Time the encoder of one commit on request, in a process of its own because two commits cannot be imported together.

Uses only the public interface, so that it runs with older commits.  Reads a case as a line of JSON and answers "ready"; then
makes one call for each line and answers with its milliseconds.
"""

from __future__ import annotations

import faulthandler
import json
import sys
import time


def main() -> None:
    faulthandler.enable()  # a process that hangs is aborted, and shows where it was
    case = json.loads(sys.stdin.readline())
    import torch

    import lcconformer

    torch.set_num_threads(case["threads"])
    torch.manual_seed(0)
    device, dtype = case["device"], getattr(torch, case["dtype"])
    encoder = lcconformer.ConformerEncoder(
        lcconformer.ConformerConfig(
            d_model=case["d_model"],
            num_heads=case["num_heads"],
            ffn_dim=case["ffn_dim"],
            num_layers=case["layers"],
            conv_kernel_size=case["kernel"],
            dropout=case["dropout"],
        )
    ).to(device, dtype)
    training = case["mode"] == "training"
    encoder.train(training)
    x = torch.randn(case["batch"], case["frames"], case["d_model"]).to(device, dtype).requires_grad_(training)
    parameters = list(encoder.parameters())

    def call() -> None:
        with torch.set_grad_enabled(training):
            out = encoder(x, depth=case["depth"])[0]
        if training:
            torch.autograd.grad(out, [x, *parameters], torch.ones_like(out))
        if device == "cuda":
            torch.cuda.synchronize()

    for _ in range(3):
        call()
    print("ready", flush=True)
    for _ in sys.stdin:
        begin = time.perf_counter()
        call()
        print((time.perf_counter() - begin) * 1e3, flush=True)


if __name__ == "__main__":
    main()
