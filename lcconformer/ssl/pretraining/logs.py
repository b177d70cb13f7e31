"""What a run leaves to look at: a progress bar, CSV files and, where it is installed, TensorBoard."""

from __future__ import annotations

import csv
import dataclasses
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...runtime import ProgressBar, replacing
from .settings import StepRecord

__all__ = ["CsvLog", "RunLog", "StepBar"]


class CsvLog:
    """A CSV file, flushed at every row; rows of steps after ``last_step`` are dropped from an older file."""

    def __init__(self, path: Path, columns: Sequence[str], last_step: int) -> None:
        self._columns = list(columns)
        rows: list[dict[str, str]] = []
        if path.is_file() and last_step > 0:
            with open(path, newline="") as old:
                # a killed process may have left half a row
                rows = [r for r in csv.DictReader(old) if None not in r.values() and int(r["step"]) <= last_step]
        with replacing(path) as temporary, open(temporary, "w", newline="") as file:
            writer = csv.DictWriter(file, self._columns)
            writer.writeheader()
            writer.writerows(rows)
        self._file = open(path, "a", newline="")  # noqa: SIM115 (closed by close)
        self._writer = csv.DictWriter(self._file, self._columns)

    def write(self, **row: Any) -> None:
        self._writer.writerow(row)
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class RunLog:
    """``steps.csv``, ``validation.csv`` and ``tensorboard/`` in the folder of a run.

    Args:
        folder: of the run.
        last_step: steps done before; later rows of an earlier part are dropped, they will be done again.
    """

    def __init__(self, folder: Path, last_step: int) -> None:
        columns = [f.name for f in dataclasses.fields(StepRecord)]
        self._steps = CsvLog(folder / "steps.csv", columns, last_step)
        self._validation = CsvLog(folder / "validation.csv", ["step", "depth", "loss"], last_step)
        self._board: Any = None
        if importlib.util.find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=last_step + 1)

    def step(self, record: StepRecord) -> None:
        row = dataclasses.asdict(record)
        self._steps.write(**{**row, "depths": "+".join(map(str, record.depths))})
        if self._board is not None:
            for name in ("loss", "grad_norm", "learning_rate"):
                self._board.add_scalar(f"train/{name}", row[name], record.step)
            self._board.add_scalar("train/depth", record.depths[0], record.step)

    def validation(self, step: int, losses: Sequence[float]) -> None:
        for depth, loss in enumerate(losses, 1):
            self._validation.write(step=step, depth=depth, loss=loss)
            if self._board is not None:
                self._board.add_scalar(f"validation/depth_{depth}", loss, step)

    def close(self) -> None:
        self._steps.close()
        self._validation.close()
        if self._board is not None:
            self._board.close()


class StepBar(ProgressBar):
    """Progress of a run of ``steps`` steps, with loss, depth and utterances/s.

    Raises:
        ImportError: tqdm is not installed.
    """

    def __init__(self, steps: int) -> None:
        super().__init__()
        self._steps, self._rate = steps, 0.0

    def step(self, record: StepRecord, done: float) -> None:
        """Show a step; ``done`` (0 to 1) of the run, by steps or by the clock."""
        rate = record.utterances / max(1e-9, record.compute_s + record.data_s)
        self._rate = rate if not self._rate else 0.9 * self._rate + 0.1 * rate
        depth = "+".join(map(str, record.depths))
        self.update(
            done,
            f"step {record.step}/{self._steps}  loss {record.loss:.4f}  depth {depth}  {self._rate:.1f} utterances/s",
        )
