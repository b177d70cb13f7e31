"""All runs of a plan, what is complete left out, and the report at the end."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from ...runtime import commit
from ..demo.stages import Stages
from ..evaluation.figures import require_matplotlib
from ..evaluation.output import write_json
from ..pretraining.distributed import join_ranks
from ..pretraining.lock import lock_folder
from .execution import execute, is_complete
from .plan import PARTS, Preset, Run, plan_runs
from .report import PLAN, write_report
from .speech import ReproductionSpeech

__all__ = ["reproduce"]


def reproduce(
    preset: Preset,
    speech: ReproductionSpeech,
    out: str | os.PathLike[str],
    *,
    models: Sequence[str] = (),
    seeds: int | None = None,
    parts: Collection[str] = PARTS,
    device: str | None = None,
    mix_commits: bool = False,
    command: str = "",
    progress: bool = True,
) -> Path | None:
    """Do the runs of a plan that are not complete yet, then write the report from the files of all.

    Under torchrun only the pretrainings run, on all processes; the same call in one process does the rest.

    Args:
        preset, speech, models, seeds, parts, device: as for :func:`~lcconformer.ssl.reproduction.plan_runs`.
        out: folder; gets ``runs/``, ``reproduction.json`` (the plan), ``report.html``, ``report.md`` and plots.
        mix_commits: go on though earlier runs are of another commit of this package; the report says which.
        command: the command line, for the report.
        progress: show it on the standard error.

    Returns:
        The path of ``report.html``; None under torchrun.

    Raises:
        Stopped: a signal ended a training; the same call goes on.
        ValueError: earlier runs are of another commit, or another process works in ``out``.
        ImportError: tqdm, matplotlib or jiwer is missing.
    """
    require_matplotlib()  # before hours of training
    import jiwer  # noqa: F401

    folder = Path(out)
    runs = plan_runs(preset, speech, models=models, seeds=seeds, parts=parts, device=device)
    ranks = join_ranks(device)
    with contextlib.ExitStack() as stack:
        if ranks.first:
            stack.enter_context(lock_folder(folder))
            _check_commits(folder, runs, mix_commits)
        alone = ranks.world_size == 1
        # all processes look before any of them writes
        left = [run for run in runs if (alone or run.kind == "pretrain") and not is_complete(folder, run)]
        ranks.total([0.0])
        if ranks.first:
            write_json(folder / PLAN, _describe(preset, speech, runs, command))
        show = progress and ranks.first
        names = {run.name: run.cost for run in left}
        stages = stack.enter_context(contextlib.closing(Stages(names, show and bool(left))))
        for run in left:
            with stages.stage(run.name) as report:
                execute(run, speech, folder, ranks, report)
        return write_report(folder) if alone else None


def _describe(preset: Preset, speech: ReproductionSpeech, runs: Sequence[Run], command: str) -> dict[str, Any]:
    return {
        "preset": preset.text,
        "command": command,
        "speech": speech.describe(),
        "aligned": speech.aligned,
        "runs": [
            {"kind": run.kind, "model": run.model, "seed": run.seed, "name": run.name, "folder": run.folder}
            for run in runs
        ],
    }


def _check_commits(out: Path, runs: Sequence[Run], mix: bool) -> None:
    """Refuse to add runs of this commit to those of another, unless that is wanted.

    Raises:
        ValueError: there are complete runs of another commit.
    """
    others = set()
    for run in runs:
        if is_complete(out, run):
            others.add(json.loads((out / "runs" / run.folder / "times.json").read_text())["commit"])
    complete = all(is_complete(out, run) for run in runs)
    if others - {commit()} and not mix and not complete:
        raise ValueError(
            f"{out} has runs of commit {', '.join(sorted(others))}, and this is {commit()}: check that one out, choose "
            "another folder, or give --mix-commits, and the report will say so"
        )
