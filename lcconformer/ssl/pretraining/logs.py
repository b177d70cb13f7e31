"""Reports of a run: progress on the terminal, CSV files and, where it is installed, TensorBoard logs."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import importlib.util
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from ...runtime import ProgressBar, replacing
from .settings import StepRecord

__all__ = ["CsvLog", "Reports", "RunLog", "StepBar"]


_LONGEST_LINE = 1 << 16  # characters


class CsvLog:
    """A CSV file that is flushed after every row; of an existing file, the rows up to step ``last_step`` are kept."""

    def __init__(self, path: Path, columns: Sequence[str], last_step: int) -> None:
        self._columns = list(columns)
        with replacing(path) as temporary, open(temporary, "w", newline="") as file:
            writer = csv.DictWriter(file, self._columns)
            writer.writeheader()
            if path.is_file() and last_step > 0:
                with open(path, newline="") as old:
                    try:
                        # row by row: the log of a long run does not fit into memory
                        writer.writerows(_rows(old, last_step))
                    except (ValueError, KeyError, csv.Error) as error:
                        raise ValueError(
                            f"{path} is no log of this run ({error!r}): move it away, then resume the run"
                        ) from error
        self._file = open(path, "a", newline="")  # noqa: SIM115 (closed by close)
        self._writer = csv.DictWriter(self._file, self._columns)

    def write(self, **row: Any) -> None:
        self._writer.writerow(row)
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _rows(log: TextIO, last_step: int) -> Iterator[dict[str, str]]:
    """Yield the rows of a log up to step ``last_step``; a killed process may have left half a row, which is left out."""
    for row in csv.DictReader(iter(lambda: log.readline(_LONGEST_LINE), "")):
        if None not in row.values() and int(row["step"]) <= last_step:
            yield row


class RunLog:
    """Log files in the folder of a run: ``steps.csv``, ``validation.csv`` and ``tensorboard/``.

    Args:
        folder: folder of the run.
        last_step: steps done before.  Later rows of an interrupted part are dropped, because their steps are done again.
    """

    def __init__(self, folder: Path, last_step: int) -> None:
        self._folder, self._failed = folder, False
        columns = [f.name for f in dataclasses.fields(StepRecord)]
        self._steps = CsvLog(folder / "steps.csv", columns, last_step)
        self._validation = CsvLog(folder / "validation.csv", ["step", "depth", "loss"], last_step)
        self._board: Any = None
        if importlib.util.find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=last_step + 1)

    def step(self, record: StepRecord) -> None:
        row = dataclasses.asdict(record)
        with self._going_on():
            self._steps.write(**{**row, "depths": "+".join(map(str, record.depths))})
        if self._board is not None:
            with self._going_on():
                for name in ("loss", "grad_norm", "learning_rate"):
                    self._board.add_scalar(f"train/{name}", row[name], record.step)
                self._board.add_scalar("train/depth", record.depths[0], record.step)

    def validation(self, step: int, losses: Sequence[float]) -> None:
        for depth, loss in enumerate(losses, 1):
            with self._going_on():
                self._validation.write(step=step, depth=depth, loss=loss)
            if self._board is not None:
                with self._going_on():
                    self._board.add_scalar(f"validation/depth_{depth}", loss, step)

    def close(self) -> None:
        for log in (self._steps, self._validation, self._board):
            if log is not None:
                with self._going_on():
                    log.close()

    @contextlib.contextmanager
    def _going_on(self) -> Iterator[None]:
        """Warn, once, of a log that cannot be written (a full disk): a training is worth more than a row."""
        try:
            yield
        except OSError as error:
            if not self._failed:
                self._failed = True
                warnings.warn(
                    f"the logs in {self._folder} cannot be written ({error}) and will lack rows; the run goes on",
                    UserWarning,
                    stacklevel=4,
                )


class StepBar(ProgressBar):
    """Progress through ``steps`` steps, with loss, depth and utterances per second.

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


class Reports:
    """Reports of the first rank: log files, progress, warnings, and calls of ``on_step``.

    Args:
        folder: folder of the run.
        last_step: steps done before.
        steps: steps of the whole run, to show progress on the standard error; None: show nothing.
        on_step: called after each step.
    """

    def __init__(
        self, folder: Path, last_step: int, steps: int | None, on_step: Callable[[StepRecord], None] | None
    ) -> None:
        self._log, self._on_step = RunLog(folder, last_step), on_step
        try:
            self._bar = None if steps is None else StepBar(steps)
        except ImportError:
            self._log.close()
            raise

    def start(self, done: float) -> None:
        """Begin; ``done`` (0 to 1) of the run is over."""
        if self._bar is not None:
            self._bar.start(done)

    def step(self, record: StepRecord, done: float) -> None:
        """Report a step; ``done`` (0 to 1) of the run is over."""
        self._log.step(record)
        if self._bar is not None:
            self._bar.step(record, done)
        if self._on_step is not None:
            self._on_step(record)

    def skipped(self, record: StepRecord, in_a_row: int, most: int) -> None:
        """Warn of a step that was left out, the last of ``in_a_row`` such steps; ``most`` of them end the run."""
        warnings.warn(
            f"step {record.step} left out: its gradient is not finite ({record.skipped} such steps so far, {in_a_row} in "
            f"a row; the run ends at {most})",
            UserWarning,
            stacklevel=2,
        )

    def validation(self, step: int, losses: Sequence[float]) -> None:
        """Report the losses at depth 1 ... N."""
        self._log.validation(step, losses)
        if self._bar is not None:
            self._bar.say(f"step {step}: validation loss {losses[-1]:.4f} at depth {len(losses)}")

    def close(self) -> None:
        self._log.close()
        if self._bar is not None:
            self._bar.close()
