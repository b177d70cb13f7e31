"""Train a small shared encoder to recognise phones on the speech that comes with the package, and score every depth.

    python examples/recognise_phones.py --out runs/phones

Needs ``pip install "lcconformer[speech]"``.  The few minutes of speech of one speaker show how it is done, not what it can do.
"""

from __future__ import annotations

import argparse

from lcconformer import ConformerConfig
from lcconformer.data import demo_corpus
from lcconformer.ssl.finetuning import FinetuneSettings, TaskSettings, best_depth, evaluate, finetune


def main() -> None:
    parser = argparse.ArgumentParser(description="Recognise the phones of the demo speech.")
    parser.add_argument("--out", required=True, help="folder for checkpoints and logs")
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps (default 300)")
    args = parser.parse_args()

    corpus = demo_corpus()
    train, test = corpus.select(splits=["train"]).preload(), corpus.select(splits=["test"]).preload()
    config = ConformerConfig(
        d_model=144,
        num_heads=4,
        ffn_dim=576,
        num_layers=6,
        conv_kernel_size=15,
        input_dim=80,
        subsampling="stack",
        subsampling_factor=4,
    )
    # frame labels first lead CTC out of predicting nothing but blanks
    settings = FinetuneSettings(config, tasks=TaskSettings(frames=1.0, phones=1.0, characters=0.0), steps=args.steps)
    result = finetune(settings, train, out=args.out)
    rows = evaluate(result.model, test)
    print("phone error rate by depth:", " ".join(f"{row['per']:.1%}" for row in rows))

    (said,), _ = result.model.transcribe(test.audio(test[0])[None], depth=best_depth(rows))
    print(f"{test[0].text!r} is read as {said}")


if __name__ == "__main__":
    main()
