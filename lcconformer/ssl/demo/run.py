"""The demo: the whole idea on real speech, in minutes, on two CPU cores.

Two encoders of one shared layer are pretrained from the same weights on the same batches.  One draws its number of loops
anew for every step (arXiv 2105.00812), its twin always runs all loops.  Then their depths are compared with each other and
with those of untrained weights, and a report is written.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from ...data import Corpus
from ..evaluation import random_init_like
from ..evaluation.figures import require_matplotlib
from ..evaluation.output import write_json
from .measurements import STAGES, measure
from .plan import DemoPlan
from .report import write_report
from .results import make_results
from .stages import Stages
from .training import FIXED, RANDOM, SAMPLED, train_model

__all__ = ["run_demo"]


def run_demo(
    train: Corpus, test: Corpus, plan: DemoPlan, out: str | os.PathLike[str], *, progress: bool = True
) -> dict[str, Any]:
    """Run both trainings and every measurement; write ``results.json``, ``report.html`` and the PNG files to ``out``.

    Everything is written at the end.  Without phone alignments the probes are left out.

    Args:
        train, test: speech; ``test`` is used for held-out losses, consistency, inference times and probe accuracy.
        plan: what to train and measure.
        out: folder; made if missing.
        progress: show it on the standard error.

    Returns:
        The content of ``results.json``.

    Raises:
        KeyboardInterrupt: Ctrl-C; nothing was written.
        ImportError: tqdm or matplotlib is missing.
    """
    require_matplotlib()  # before the minutes of training
    began, cpu_began = time.perf_counter(), time.process_time()
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    settings = plan.settings
    probes = any(u.phones for u in train) and any(u.phones for u in test)
    runs = {SAMPLED: settings, FIXED: dataclasses.replace(settings, depth="fixed")}
    with contextlib.ExitStack() as stack:
        stages = stack.enter_context(contextlib.closing(Stages(_shares(plan, probes), progress)))
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=".running-", dir=out)))
        trained = {}
        for name, own in runs.items():
            with stages.stage(f"training, {name}") as report:
                trained[name] = train_model(own, train, test, scratch / own.depth, report)
        models = {name: run.model for name, run in trained.items()}
        models[RANDOM] = random_init_like(models[SAMPLED], settings.seed)
        measured = measure(models, train, test, plan, stages, probes)
        facts = {name: run.facts for name, run in trained.items()}
        results = make_results(plan, train, test, facts, measured)
        results["setup"]["wall_seconds"] = time.perf_counter() - began
        results["setup"]["cpu_seconds"] = time.process_time() - cpu_began
        for name, run in trained.items():
            os.replace(run.checkpoint, out / f"{runs[name].depth}.safetensors")
    write_report(out, results)
    write_json(out / "results.json", results)
    return results


def _shares(plan: DemoPlan, probes: bool) -> dict[str, float]:
    """All stages in order, and how long each takes, in units of the fixed-depth training."""
    sampler = plan.settings.sampler()
    return {
        f"training, {SAMPLED}": sampler.mean_depth(plan.settings.steps) / sampler.num_layers,
        f"training, {FIXED}": 1.0,
        **{name: share for name, share in STAGES.items() if probes or name != "probes"},
    }
