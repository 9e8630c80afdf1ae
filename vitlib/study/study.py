"""A study: one parameter set and what belongs to it in `outputs/<name>/`: checkpoints, records and reports. No torch.

No other code joins these paths.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from filelock import FileLock, Timeout

from vitlib.study import files, params, records
from vitlib.study.params import Parameters

_HELD = "VITLIB_HOLDS"  # the folder of the study that a process holds for itself and for kernels that it starts
_kernel = ExitStack()  # the study that the kernel of a notebook holds


class StudyBusy(RuntimeError):
    """Another process is running this study; the message says which."""


@dataclass(frozen=True)
class Study:
    """A parameter set and the folder that its results go to."""

    settings: Parameters
    folder: Path

    @classmethod
    def open(cls, namespace: Mapping[str, Any]) -> Study:
        """The study of a notebook: call it with `globals()`. ParameterError lists every fault of the parameters.

        A notebook may assign the result to `study` and run the cell again. Its kernel holds the study until it ends or
        opens another one, unless the run that started it does; StudyBusy where another process holds it.
        """
        study = namespace.get("study")
        opened = cls.of(params.collect({**namespace, "study": study.name} if isinstance(study, Study) else namespace))
        ipython = sys.modules.get("IPython")
        if ipython and ipython.get_ipython():
            _kernel.close()
            _kernel.enter_context(opened.locked())
        return opened

    @classmethod
    def of(cls, settings: Parameters) -> Study:
        """The study of a checked parameter set, in the project's `outputs/`."""
        return cls(settings, files.study_folder(settings.study))

    @classmethod
    def at(cls, folder: Path | str) -> Study:
        """A study to read, in a folder of any name: its own parameters are in `records/environment.json`."""
        return cls(Parameters(), Path(folder))

    @property
    def name(self) -> str:
        return self.settings.study

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def checkpoint(self, name: str) -> Path:
        """Folder of a checkpoint by its name, `variants.Format.checkpoint`."""
        return self.checkpoints / name

    def training(self, name: str) -> Path:
        """Folder for the checkpoints of a training run that may be resumed."""
        return self.folder / "training" / name

    def record(self, name: str) -> Path:
        """Path of a record. `variants` means `variants.csv`; a name with a suffix is taken as it is."""
        return self.folder / "records" / (name if "." in name else f"{name}.csv")

    def has(self, name: str) -> bool:
        """Whether the record exists."""
        return self.record(name).is_file()

    def read(self, name: str) -> pd.DataFrame:
        """A table. MissingRecord says which notebook writes it."""
        return self._named(name, records.read_table(self.record(name)))

    def write(self, name: str, frame: pd.DataFrame) -> pd.DataFrame:
        """Write a table, whole or not at all, and return it. ValueError where a column of its schema is missing."""
        records.write_table(frame, self.record(name))
        return self._named(name, frame)

    def _named(self, name: str, frame: pd.DataFrame) -> pd.DataFrame:
        """`frame` with the file that holds it, which tables name and pages link to."""
        frame.attrs["record"] = f"records/{self.record(name).name}"
        return frame

    def read_json(self, name: str) -> Any:
        """A JSON record, named with or without `.json`. MissingRecord says which notebook writes it."""
        return records.read_json(self.record(name).with_suffix(".json"))

    def write_json(self, name: str, value: Any) -> Path:
        """Write a JSON record, named with or without `.json`, whole or not at all."""
        return records.write_json(value, self.record(name).with_suffix(".json"))

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the study for this process. StudyBusy, which says who does, where another process holds it.

        The operating system releases the lock of a process that was killed; records are then as before its run.
        """
        if os.environ.get(_HELD) == str(self.folder.resolve()):  # by this process or the one that started this kernel
            yield
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        holder = self.folder / ".lock.holder"
        try:
            held = FileLock(self.folder / ".lock").acquire(blocking=False)
        except Timeout:
            who = holder.read_text(encoding="utf-8") if holder.is_file() else "unknown"
            raise StudyBusy(
                f"another process is running study {self.folder.name!r} ({who}): wait for it, or stop it (in "
                "JupyterLab, shut down the kernel of the other notebook)"
            ) from None
        with held:
            with files.atomic_path(holder) as file:
                said = f"pid {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}"
                file.write_text(said, encoding="utf-8")
            os.environ[_HELD] = str(self.folder.resolve())
            try:
                files.put_back(self.folder)
                yield
            finally:
                os.environ.pop(_HELD, None)
                holder.unlink()
