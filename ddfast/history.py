"""The numbers of a training as they come: `history.jsonl`, and TensorBoard and Weights & Biases where they are wanted.

None of it decides a byte of a result, and none of it stands in an output folder.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from ddfast.arguments import output_folder
from ddfast.errors import UsageError
from ddfast.files import make_folder
from ddfast.wording import argument

HISTORY = "history.jsonl"


def check_history(log_dir: Any, wandb: Any, *, outside: Path | None = None) -> None:
    """Refuse what no history could be written to, before the work.

    Args:
        log_dir: folder of the history, None for none.
        wandb: project of Weights & Biases, None for none.
        outside: the output folder, in which no history may stand.

    Raises:
        UsageError: a folder that cannot be written to, or inside of the output; a library that is not there.
    """
    if log_dir is not None:
        folder = output_folder(log_dir, "log_dir").resolve()
        if outside is not None and folder.is_relative_to(outside.resolve()):
            raise UsageError(
                f"{argument('log_dir')} {log_dir} lies inside of {outside}, whose content is the result alone: give "
                "a folder beside it"
            )
    if wandb is not None:
        if not isinstance(wandb, str) or not wandb:
            raise UsageError(f"{argument('wandb')} must be the name of a project, got {wandb!r}")
        if not _is_there("wandb"):
            raise UsageError(
                f"{argument('wandb')} needs the package wandb, which is not installed: pip install wandb, or leave it "
                "out"
            )


class History:
    """Context manager that keeps the numbers of one run.

    Each line of `history.jsonl` is a JSON object: "command", "run", "event", "step", then the event's own numbers (null
    where one was not measured), and "time" in seconds since 1970. Lines are added to a file that stands; a run that was
    killed and resumed may tell a step twice, of which the last line counts.

    Args:
        log_dir: folder of `history.jsonl` and, where TensorBoard is installed, of its event files; None: neither.
        wandb: project of Weights & Biases that gets the same numbers; None: none.
        command: `train-teacher` for example.
        run: what the run is called, the path of its output.
        settings: of the run, for Weights & Biases.
    """

    def __init__(
        self,
        log_dir: str | Path | None,
        wandb: str | None,
        *,
        command: str,
        run: str,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.folder = None if log_dir is None else Path(log_dir)
        self.project, self.command, self.run = wandb, command, run
        self.settings = dict(settings or {})
        self._board: Any = None
        self._project_run: Any = None

    @property
    def wanted(self) -> bool:
        """Whether anybody is told."""
        return self.folder is not None or self.project is not None

    def __enter__(self) -> History:
        if self.folder is not None:
            make_folder(self.folder)
            self._board = _board(self.folder)
        if self.project is not None:
            import wandb

            self._project_run = wandb.init(project=self.project, name=self.run, config=self.settings)
        return self

    def note(self, event: str, step: int, **values: float | str | None) -> None:
        """Tell the numbers of one event.

        Args:
            event: "epoch", "step", "stage" or "student".
            step: its number.
            values: by name; the same names for each event of a kind.
        """
        plain = {name: _plain(value) for name, value in values.items()}
        if self.folder is not None:
            line = {"command": self.command, "run": self.run, "event": event, "step": step, **plain}
            _append(
                self.folder / HISTORY, json.dumps({**line, "time": round(time.time(), 3)}, ensure_ascii=False)
            )
        numbers = {
            f"{event}/{name}": value
            for name, value in plain.items()
            if isinstance(value, (int, float)) and not isinstance(value, bool)
        }
        if self._board is not None:
            for name, value in numbers.items():
                self._board.add_scalar(name, value, step)
        if self._project_run is not None:
            self._project_run.log({f"{event}/step": step, **numbers})

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._board is not None:
            self._board.close()
        if self._project_run is not None:
            self._project_run.finish(exit_code=0 if kind is None else 1)
        self._board = self._project_run = None


def _is_there(package: str) -> bool:
    """Whether a package can be imported."""
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:  # a module that was put in place by hand has no spec
        return True


def _board(folder: Path) -> Any:
    """A writer of TensorBoard's event files, None where TensorBoard is not installed."""
    if not _is_there("tensorboard"):
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder))


def _append(path: Path, line: str) -> None:
    """Add a line by one write, so that lines of several processes do not mix."""
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        os.write(file, f"{line}\n".encode("utf-8", "surrogateescape"))
    finally:
        os.close(file)


def _plain(value: Any) -> Any:
    """A number of NumPy or torch as Python's; None for one that JSON has not."""
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value
