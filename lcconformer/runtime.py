"""What every command shares while it runs: JSON, atomic writes, progress on the standard error, the commit that runs."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import secrets
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["ProgressBar", "RunError", "check_output", "commit", "read_json", "replacing", "write_atomically"]

_EVERY = 10.0  # seconds between two lines where the standard error is no terminal
_LARGEST_JSON = 1 << 23  # bytes; Python's objects may take 30 times as much


class RunError(OSError):
    """A run that cannot go on, through no fault of its options; the message says what is kept and how to continue."""


def read_json(path: str | os.PathLike[str], most: int = _LARGEST_JSON) -> Any:
    """Read a JSON file of at most ``most`` bytes; a larger one is refused before memory is taken for it.

    Raises:
        ValueError: it is larger, or no JSON; the message names it.
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"{path} has more than {most} bytes; expected a smaller file of JSON")
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON ({error})") from error


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Write a file so that readers see the old content or the new one, never half; makes its folder.

    Yields a temporary path beside ``path``. After the block its content is flushed to the disk and renamed to ``path``, with
    the permissions of any new file (0666 without the umask), whatever those of the temporary file are. If the block raises,
    ``path`` is left as it was and the temporary file is deleted.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
        yield temporary
        with open(temporary, "rb+") as file:
            if stat.S_IMODE(os.fstat(file.fileno()).st_mode) != mode:
                os.fchmod(file.fileno(), mode)  # safetensors puts a file of its own there, which is 0600
            os.fsync(file.fileno())  # or a power cut could leave the new name with no content
        os.replace(temporary, path)
        _sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def check_output(option: str, path: str | os.PathLike[str] | None, *suffixes: str, folder: bool = False) -> None:
    """Check before the work that its result can be written; None is no path and passes.

    Args:
        option: name of the option that gives the path.
        path: of a file to be written, whose folders need not exist yet.
        suffixes: endings that the file may have; none given: any.
        folder: the path is that of a folder.

    Raises:
        ValueError: the path is empty, of the wrong kind or ending, or below what is no folder or cannot be written to.
    """
    if path is None:
        return
    if not str(path):
        raise ValueError(f"{option} is empty; give the path of a {'folder' if folder else 'file'}")
    path = Path(path)
    if suffixes and path.suffix.lower() not in suffixes:
        raise ValueError(f"{option} is {path}; expected a file that ends in {', '.join(suffixes)}")
    if path.exists() and path.is_dir() != folder:
        raise ValueError(f"{option} is {path}, which is {'no' if folder else 'a'} folder; choose another name")
    place = path if folder else path.parent
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise ValueError(f"{option} is {path}, but {place} is no folder that can be written to; choose another place")


def _sync_folder(folder: Path) -> None:
    """Flush the new name of a file to the disk, where the system can do that for a folder."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_atomically(path: str | os.PathLike[str], content: str | bytes) -> Path:
    """Write ``content`` (text as UTF-8) by :func:`replacing`; returns the path."""
    with replacing(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    return Path(path)


@functools.cache
def commit() -> str:
    """Short hash of the checkout that holds this file, with ``-dirty`` after it if the working tree has changes.

    Outside of a checkout, where the history is missing: the environment variable ``LCCONFORMER_COMMIT``, or "unknown".
    """
    here = Path(__file__).resolve()

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(here.parent), *arguments], capture_output=True, text=True, check=True, timeout=20
        ).stdout.strip()

    try:
        if git("ls-files", here.name):
            changed = git("status", "--porcelain", "--untracked-files=no")
            return git("rev-parse", "--short=10", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.SubprocessError):
        pass
    return os.environ.get("LCCONFORMER_COMMIT", "unknown")


class ProgressBar:
    """Progress on the standard error: a bar on a terminal, elsewhere (a pipe, a file) one line every ten seconds.

    Use it as a context manager, or call :meth:`close`, which shows the last state.

    Args:
        text: what is running, shown beside the bar.

    Raises:
        ImportError: tqdm is not installed.
    """

    def __init__(self, text: str = "") -> None:
        try:
            from tqdm import tqdm
        except ImportError as error:
            raise ImportError('the progress bar needs tqdm: pip install "lcconformer[speech]"') from error
        self._text, self._done, self._initial = text, 0.0, 0.0
        self._began = self._shown = time.monotonic()
        self._format = tqdm.format_meter
        self._printed: tuple[float, str] | None = None
        self._bar: Any = None
        if sys.stderr.isatty():
            form = "{percentage:3.0f}%|{bar:20}| {elapsed}<{remaining} {desc}"
            self._bar = tqdm(total=1.0, bar_format=form, dynamic_ncols=True)
            self._bar.set_description_str(text)

    def start(self, done: float) -> None:
        """Begin at ``done`` (0 to 1), done before: it does not count in the estimate of the time left."""
        self._done = self._initial = done
        if self._bar is not None:
            self._bar.initial = self._bar.n = self._bar.last_print_n = done

    def update(self, done: float, text: str | None = None) -> None:
        """Show ``done`` (0 to 1, of the whole) and, if given, a new text."""
        self._done = min(done, 1.0)
        if text is not None:
            self._text = text
        if self._bar is not None:
            self._bar.set_description_str(self._text, refresh=False)
            self._bar.update(self._done - self._bar.n)
        elif time.monotonic() - self._shown >= _EVERY:
            self._print()

    def say(self, text: str) -> None:
        """Print a line without disturbing the bar."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        else:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        elif self._printed != (self._done, self._text):
            self._print()

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _print(self) -> None:
        self._shown, self._printed = time.monotonic(), (self._done, self._text)
        form = "{percentage:3.0f}% {elapsed}<{remaining} {desc}"
        elapsed = self._shown - self._began
        line = self._format(self._done, 1.0, elapsed, prefix=self._text, bar_format=form, initial=self._initial)
        print(line.rstrip(), file=sys.stderr, flush=True)
