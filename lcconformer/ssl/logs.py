"""What a run leaves to look at: a progress bar, CSV files and, where it is installed, TensorBoard."""

from __future__ import annotations

import csv
import dataclasses
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .settings import StepRecord

__all__ = ["CsvLog", "ProgressBar", "RunLog"]


class CsvLog:
    """A CSV file, flushed at every row; rows of steps after ``last_step`` are dropped from an older file."""

    def __init__(self, path: Path, columns: Sequence[str], last_step: int) -> None:
        self._columns = list(columns)
        rows: list[dict[str, str]] = []
        if path.is_file() and last_step > 0:
            with open(path, newline="") as old:
                # a killed process may have left half a row
                rows = [r for r in csv.DictReader(old) if None not in r.values() and int(r["step"]) <= last_step]
        temporary = path.with_name(f".{path.name}.tmp")
        with open(temporary, "w", newline="") as file:
            writer = csv.DictWriter(file, self._columns)
            writer.writeheader()
            writer.writerows(rows)
        os.replace(temporary, path)
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


class ProgressBar:
    """A bar on the standard error with loss, depth, utterances/s and the time left.

    Raises:
        ImportError: tqdm is not installed.
    """

    def __init__(self, steps: int) -> None:
        try:
            from tqdm import tqdm
        except ImportError as error:
            raise ImportError('the progress bar needs tqdm: pip install "lcconformer[speech]"') from error
        self._steps, self._rate = steps, 0.0
        # counted in hundredths, so that a run limited by the clock shows its time left too
        self._bar = tqdm(
            total=100.0,
            bar_format="{percentage:3.0f}%|{bar:20}| {desc} [{elapsed}<{remaining}]",
            mininterval=0.2 if sys.stderr.isatty() else 10.0,
            dynamic_ncols=True,
        )

    def start(self, progress: float) -> None:
        """A resumed run begins at ``progress`` (0 to 1)."""
        self._bar.initial = self._bar.n = self._bar.last_print_n = 100.0 * progress

    def step(self, record: StepRecord, progress: float) -> None:
        rate = record.utterances / max(1e-9, record.compute_s + record.data_s)
        self._rate = rate if not self._rate else 0.9 * self._rate + 0.1 * rate
        depth = "+".join(map(str, record.depths))
        self._bar.set_description_str(
            f"step {record.step}/{self._steps}  loss {record.loss:.4f}  depth {depth}  {self._rate:.1f} utterances/s",
            refresh=False,
        )
        self._bar.update(min(100.0, 100.0 * progress) - self._bar.n)

    def say(self, text: str) -> None:
        self._bar.write(text, file=sys.stderr)

    def close(self) -> None:
        self._bar.close()
