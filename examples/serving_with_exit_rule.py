"""Serve features of speech with as few loops as each utterance needs.

    python examples/serving_with_exit_rule.py --checkpoint runs/example

Utterances of different lengths go through the encoder as one batch.  An utterance leaves the batch when a loop changes
its hidden state by less than the threshold; the distances printed first show which threshold gives which depth.
Without ``--checkpoint`` the weights are random, and only the mechanism is shown.  Needs ``pip install "lcconformer[speech]"``.
"""

from __future__ import annotations

import argparse
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lcconformer import ConformerConfig, ExitRule
from lcconformer.data import demo_corpus
from lcconformer.ssl import FeatureSettings, ObjectiveSettings, PretrainingModel, load_model


def serve(model: PretrainingModel, requests: list[Tensor], rule: ExitRule) -> list[tuple[Tensor, int]]:
    """Features ``[T', d_model]`` of each request (audio ``[S]``, 16 kHz) and the loops it took."""
    samples = torch.tensor([len(audio) for audio in requests])
    features, frames = model.features(pad_sequence(requests, batch_first=True), samples)
    output, frames, depths = model.encoder.adaptive(features, frames, rule)
    return [(output[i, :n], int(k)) for i, (n, k) in enumerate(zip(frames.tolist(), depths))]


@torch.no_grad()
def distances(model: PretrainingModel, requests: list[Tensor], rule: ExitRule) -> list[float]:
    """What ``rule`` compares with its threshold, after loops 1 ... N, as a mean over the requests."""
    samples = torch.tensor([len(audio) for audio in requests])
    hidden, frames = model.hidden_states(pad_sequence(requests, batch_first=True), samples)
    return [rule.distance(new, old, frames).mean().item() for old, new in pairwise(hidden)]


def main() -> None:
    parser = argparse.ArgumentParser(description="Serve features with an exit rule.")
    parser.add_argument("--checkpoint", help="a checkpoint, or the folder of a run (default: random weights)")
    parser.add_argument("--threshold", type=float, default=0.15, help="of the relative change (default 0.15)")
    args = parser.parse_args()
    torch.manual_seed(0)

    if args.checkpoint:
        model = load_model(args.checkpoint)
    else:
        config = ConformerConfig(
            d_model=128, ffn_dim=512, num_layers=8, input_dim=80, subsampling="stack", subsampling_factor=4
        )
        model = PretrainingModel(config, FeatureSettings(), ObjectiveSettings()).eval()

    corpus = demo_corpus()
    requests = [corpus.audio(utterance) for utterance in corpus[:4]]
    rule = ExitRule("change", threshold=args.threshold)
    print("change by loop:", " ".join(f"{d:.2f}" for d in distances(model, requests, rule)))
    for name, chosen in (("change", rule), ("fixed", ExitRule("fixed", depth=2))):
        for features, depth in serve(model, requests, chosen):
            print(f"{name}: {features.shape[0]} frames after {depth} of {model.config.num_layers} loops")


if __name__ == "__main__":
    main()
