"""Presets, and the plan of a reproduction: its runs, each with a key that is the hash of all that decides its numbers."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ...config import ConformerConfig
from ..evaluation.probes import ProbeSettings
from ..finetuning import AugmentSettings, FinetuneSettings, TaskSettings
from ..model import FeatureSettings
from ..pretraining import PretrainSettings
from .models import MODELS, Model
from .speech import ReproductionSpeech

__all__ = ["PARTS", "PRESETS", "Preset", "Run", "plan_runs"]

PARTS = ("supervised", "pretraining")
_FORMAT = 1  # of the files of a run; counts up when they change, so that older ones are not taken for new ones
# fields of a configuration that are younger than the format: at this value a run is what it was before them
_YOUNGER = {"weights": "float"}


@dataclass(frozen=True)
class Preset:
    """Sizes of a reproduction.

    Attributes:
        text: what it is for.
        finetune, pretrain: settings of the trainings of C; encoder and features are those of ``finetune``.
        probe: settings of the probes.
        models: the models that are compared unless others are named.
        seeds: number of seeds unless another is given.
        timing_rounds: measurements of each time.
        consistency_frames: frames on which the depths are compared.
    """

    text: str
    finetune: FinetuneSettings
    pretrain: PretrainSettings
    probe: ProbeSettings
    models: tuple[str, ...]
    seeds: int
    timing_rounds: int = 9
    consistency_frames: int = 8192


def _preset(
    text: str,
    config: ConformerConfig,
    features: FeatureSettings,
    finetune: dict[str, Any],
    pretrain: dict[str, Any],
    **more: Any,
) -> Preset:
    often = {"checkpoint_every": 100}
    tuned = FinetuneSettings(config, features, **often | finetune)
    return Preset(text, tuned, PretrainSettings(config, features, **often | pretrain), **more)


def _encoder(d_model: int, num_layers: int, kernel: int, dropout: float) -> ConformerConfig:
    return ConformerConfig(
        d_model=d_model,
        num_heads=4,
        ffn_dim=4 * d_model,
        num_layers=num_layers,
        conv_kernel_size=kernel,
        dropout=dropout,
        input_dim=80,
        subsampling="stack",
        subsampling_factor=4,
    )


# without characters: no text comes out of a few hours of speech and a thousand steps
_PHONES = TaskSettings(frames=1.0, phones=1.0, characters=0.0)
_NARROW = FeatureSettings(80, 20.0, 5600.0)  # MP3 of telephone quality has nothing above
PRESETS: dict[str, Preset] = {
    "tiny": _preset(
        "two CPU cores and two hours of aligned speech",
        _encoder(128, 9, 15, 0.05),
        _NARROW,
        {
            "tasks": _PHONES,
            "augment": AugmentSettings(frequency_width=10),
            "steps": 3000,
            "batch_seconds": 30.0,
            "warmup": 0.08,
            "optimizer": "muon",
            "learning_rate": 1.2e-3,
        },
        {"steps": 600, "batch_seconds": 40.0},
        probe=ProbeSettings(max_frames=200_000, epochs=4),
        models=("A", "C", "D"),
        seeds=3,
    ),
    "small": _preset(
        "one GPU and some hours of aligned speech",
        _encoder(256, 12, 31, 0.1),
        _NARROW,
        {
            "tasks": _PHONES,
            "augment": AugmentSettings(frequency_width=10),
            "steps": 1500,
            "batch_seconds": 120.0,
            "precision": "bfloat16",
            "workers": 4,
        },
        {"steps": 1500, "batch_seconds": 240.0, "precision": "bfloat16", "workers": 4},
        probe=ProbeSettings(),
        models=("A", "C"),
        seeds=1,
    ),
    "paper": _preset(
        "LibriSpeech 960 h and several GPUs: pretraining by torchrun, then the rest by one process",
        _encoder(256, 12, 31, 0.1),
        FeatureSettings(80, 20.0, 8000.0),
        {
            "steps": 100_000,
            "checkpoint_every": 1000,
            "batch_seconds": 320.0,
            "precision": "bfloat16",
            "workers": 8,
            "learning_rate": 1e-3,
        },
        {"steps": 200_000, "checkpoint_every": 1000, "batch_seconds": 480.0, "precision": "bfloat16", "workers": 8},
        probe=ProbeSettings(),
        models=("A", "B", "C", "D"),
        seeds=1,
    ),
}


@dataclass(frozen=True)
class Run:
    """One run: a training with its measurements, or measurements alone.

    Attributes:
        kind: ``"scratch"``, ``"pretrained"`` (fine-tuning from random weights and from the pretrained ones), ``"frozen"`` (of
            the heads alone, on the pretrained encoder as it is), ``"pretrain"``, ``"probe"``, ``"random"`` (probes of
            pretrained and of random weights) or ``"timing"``.
        model: name of the model; empty for ``"timing"``.
        seed: seed of all that is random.
        settings: settings by name; those of the kind, and of what it is measured by.
        data: fingerprints of the speech that it uses, by role.
        after: runs that come before it because their models are used.
    """

    kind: str
    model: str
    seed: int
    settings: tuple[tuple[str, Any], ...]
    data: tuple[tuple[str, str], ...]
    after: tuple[Run, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.model}-seed{self.seed}" if self.model else self.kind

    @cached_property
    def description(self) -> dict[str, Any]:
        """All that decides the numbers of this run, ready for JSON."""
        return json.loads(
            json.dumps(
                {
                    "format": _FORMAT,
                    "kind": self.kind,
                    "model": self.model,
                    "seed": self.seed,
                    "settings": {name: _describe(value) for name, value in self.settings},
                    "data": dict(self.data),
                    "after": [run.key for run in self.after],
                }
            )
        )

    @cached_property
    def key(self) -> str:
        """Hash of the description."""
        text = json.dumps(self.description, sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()

    @property
    def folder(self) -> str:
        return f"{self.name}-{self.key}"

    @property
    def cost(self) -> float:
        """About how long it takes, in loops of a training step of one second of audio."""
        own = dict(self.settings)
        if "training" in own:
            settings = own["training"]
            loops = settings.sampler().mean_depth(settings.steps) + 1.0
            return settings.steps * loops * settings.batch_seconds * (1.1 if self.kind != "pretrain" else 1.0)
        return 20_000.0 if self.kind in ("probe", "random") else 5_000.0


def _describe(value: Any) -> Any:
    if isinstance(value, (FinetuneSettings, PretrainSettings)):
        nested = ("config", "features", "objective", "tasks")
        parts = {name: dataclasses.asdict(getattr(value, name)) for name in nested if hasattr(value, name)}
        parts["config"] = {k: v for k, v in parts["config"].items() if k not in _YOUNGER or _YOUNGER[k] != v}
        return parts | value.describe()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return value


def plan_runs(
    preset: Preset,
    speech: ReproductionSpeech,
    *,
    models: Sequence[str] = (),
    seeds: int | None = None,
    parts: Collection[str] = PARTS,
    device: str | None = None,
) -> list[Run]:
    """Plan the runs, in their order: the supervised models, seed by seed, their times, then pretraining.

    Args:
        preset: sizes.
        speech: speech of the reproduction; without alignments characters are the task, and nothing is probed.
        models: names from ``MODELS``; empty: those of the preset.
        seeds: number of seeds, from 0 on; None: that of the preset.
        parts: ``"supervised"``, ``"pretraining"`` or both.
        device: ``"cpu"``, ``"cuda"``, ``"cuda:N"``; None: a CUDA device if there is one.

    Raises:
        ValueError: an unknown model or part, no seed, or C is missing, which everything is compared with.
    """
    names = tuple(models or preset.models)
    if unknown := [name for name in names if name not in MODELS]:
        raise ValueError(f"there is no model {', '.join(unknown)}; there are {', '.join(MODELS)}")
    if not {"A", "C"} <= {*names}:
        raise ValueError(f"the models are {', '.join(names)}; A and C must be among them: they are the comparison")
    if wrong := [part for part in parts if part not in PARTS]:
        raise ValueError(f"there is no part {', '.join(wrong)}; there are {', '.join(PARTS)}")
    seeds = preset.seeds if seeds is None else seeds
    if seeds < 1:
        raise ValueError(f"the number of seeds is {seeds}; expected 1 or more")
    chosen = [MODELS[name] for name in dict.fromkeys(names)]
    prints = {name: value["fingerprint"] for name, value in speech.describe().items()}
    make = _Maker(preset, speech, prints, device)
    runs: list[Run] = []
    if "supervised" in parts:
        for seed in range(seeds):
            runs += [make.finetune("scratch", model, seed) for model in chosen]
        runs.append(make.timing(runs[: len(chosen)]))
    if "pretraining" in parts:
        for seed in range(seeds):
            if speech.aligned:
                runs.append(make.probe("random", MODELS["C"], seed))
            for model in chosen:
                first = make.pretrain(model, seed)
                runs += [first, *(make.finetune(kind, model, seed, first) for kind in ("pretrained", "frozen"))]
                if speech.aligned:
                    runs.append(make.probe("probe", model, seed, first))
    return runs


@dataclass(frozen=True)
class _Maker:
    preset: Preset
    speech: ReproductionSpeech
    prints: dict[str, Any]
    device: str | None

    def data(self, *roles: str) -> tuple[tuple[str, str], ...]:
        return tuple((role, self.prints[role]) for role in roles)

    def training(self, base: Any, model: Model, seed: int, **more: Any) -> Any:
        """The settings of C's training, for another model."""
        steps = model.steps(base.steps, base.config)
        return dataclasses.replace(
            base,
            config=model.encoder(base.config),
            depth=model.depth,
            seed=seed,
            steps=steps,
            device=self.device,
            validate_every=steps,
            checkpoint_every=min(steps, base.checkpoint_every),
            keep=1,
            **more,
        )

    def finetune(self, kind: str, model: Model, seed: int, *after: Run) -> Run:
        base, speech = self.preset.finetune, self.speech
        more: dict[str, Any] = {}
        if not speech.aligned:
            more["tasks"] = TaskSettings(frames=0.0, phones=0.0, characters=1.0)
        # utterances are never cut
        longest = max(u.seconds for corpus in (speech.train, speech.validation) for u in corpus)
        more["batch_seconds"] = max(base.batch_seconds, longest)
        more["freeze_encoder"] = kind == "frozen"
        settings = self.training(base, model, seed, **more)
        frames = self.preset.consistency_frames
        own = (("training", settings), ("consistency_frames", frames))
        return Run(kind, model.name, seed, own, self.data("train", "validation", "test"), after)

    def pretrain(self, model: Model, seed: int) -> Run:
        settings = self.training(self.preset.pretrain, model, seed)
        return Run("pretrain", model.name, seed, (("training", settings),), self.data("pretraining", "validation"))

    def probe(self, kind: str, model: Model, seed: int, *after: Run) -> Run:
        own: tuple[tuple[str, Any], ...] = (("probe", dataclasses.replace(self.preset.probe, seed=seed)),)
        if not after:
            config = model.encoder(self.preset.pretrain.config)
            own += (("encoder", config), ("features", self.preset.pretrain.features))
        return Run(kind, model.name, seed, own, self.data("train", "validation", "test"), after)

    def timing(self, runs: Sequence[Run]) -> Run:
        """Times of the models that ``runs`` train."""
        own = (("rounds", self.preset.timing_rounds), *((run.model, dict(run.settings)["training"]) for run in runs))
        return Run("timing", "", 0, own, self.data("train", "test"))
