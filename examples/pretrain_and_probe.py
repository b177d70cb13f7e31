"""Pretrain a small shared encoder on the speech that comes with the package, then probe every depth for phones.

    python examples/pretrain_and_probe.py --out runs/example

Takes about a minute on two cores and needs ``pip install "lcconformer[speech]"``.  Every step draws its number of loops
anew, so that every depth can be used afterwards; ``--depth fixed`` trains the full depth alone, for comparison.
"""

from __future__ import annotations

import argparse

from lcconformer import ConformerConfig
from lcconformer.data import demo_corpus
from lcconformer.ssl import load_model
from lcconformer.ssl.evaluation import ProbeSettings, accuracies, probe_model, smallest_depth, split_validation
from lcconformer.ssl.pretraining import PretrainSettings, pretrain


def main() -> None:
    parser = argparse.ArgumentParser(description="Pretrain on the demo speech, then probe every depth.")
    parser.add_argument("--out", required=True, help="folder for checkpoints and logs")
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps (default 200)")
    parser.add_argument("--depth", choices=("uniform", "fixed"), default="uniform", help="loops of a training step")
    parser.add_argument("--probe-frames", type=int, default=20_000, help="frames the probes train on (default 20000)")
    args = parser.parse_args()

    corpus = demo_corpus()
    train, test = corpus.select(splits=["train"]).preload(), corpus.select(splits=["test"]).preload()

    # one Conformer layer for all 8 depths, on stacks of four log-mel frames
    config = ConformerConfig(
        d_model=128,
        num_heads=4,
        ffn_dim=512,
        num_layers=8,
        conv_kernel_size=15,
        dropout=0.0,
        input_dim=80,
        subsampling="stack",
        subsampling_factor=4,
    )
    settings = PretrainSettings(
        config, depth=args.depth, steps=args.steps, learning_rate=5e-4, batch_seconds=20.0, validate_every=args.steps
    )
    result = pretrain(settings, train, test, out=args.out)
    _, losses = result.validation[-1]
    print("held-out loss by depth: ", " ".join(f"{loss:.3f}" for loss in losses))

    # a probe needs nothing but the checkpoint
    model = load_model(result.checkpoint)
    depths = range(config.num_layers + 1)  # 0 is the front end
    probe = ProbeSettings(max_frames=args.probe_frames, hidden=128)
    seen, validation = split_validation(train)  # validation speech chooses the depth
    rows = probe_model(model, seen, validation, test, depths, settings=probe, name="pretrained")
    accuracy = accuracies(rows, "pretrained", "linear")
    print("phone accuracy by depth:", " ".join(f"{value:.1%}" for value in accuracy.values()))
    depth = smallest_depth(accuracies(rows, "pretrained", "linear", "validation"))
    print(f"{depth} of {config.num_layers} loops are within 1% of the best")


if __name__ == "__main__":
    main()
