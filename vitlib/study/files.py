"""Paths of the project, writes that are whole or not at all, and checksums. No torch."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

STUDY_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"  # it becomes a folder, a link and a word of a command line
_BEFORE = ".before"  # holds what a run may change, as it was, and this list of what there was:
_EXISTED = "existed.json"
_FULL = 2**16  # bytes free at most, where an error in writing is taken for one of a full disk
_STALE_SECONDS = 3600  # a temporary sibling untouched this long belongs to a run that was killed


def project_root() -> Path:
    """Folder of the project: the nearest of the working directory and its parents with vitlib/ and params/.

    Notebooks start in different folders (JupyterLab in notebooks/, papermill where it was called). Else the checkout
    that this file is in, if it has `params/`; else the working directory, as on Colab with vitlib installed.
    """
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / "vitlib").is_dir() and (folder / "params").is_dir():
            return folder
    checkout = Path(__file__).resolve().parents[2]
    return checkout if (checkout / "params").is_dir() else here


def study_folder(study: str, *, root: Path | str | None = None) -> Path:
    """Folder of a study, `<root>/outputs/<study>`, which is not created. `root` defaults to the project's.

    Raises ValueError unless the name is a STUDY_NAME.
    """
    if not isinstance(study, str) or not re.fullmatch(STUDY_NAME, study) or len(study) > 100:
        raise ValueError(
            f"{study!r} cannot name a study: use at most 100 letters, digits, '.', '_' or '-', a letter or digit "
            "first, such as the name of a file in params/ without .yaml"
        )
    return Path(root or project_root()) / "outputs" / study


def resolve(path: Path | str) -> Path:
    """The path that a user means: `~` is their home, and a relative path is looked for from the project's root.

    Not from the working directory: a parameter file must mean the same to JupyterLab, which starts in notebooks/.
    """
    return project_root() / os.path.expanduser(path)  # joined to an absolute path, the root falls away


def elsewhere(path: Path) -> str:
    """A clause with the other studies that have what is missing at `path`, `<study>/<room>/<name>`; '' for none."""
    study, place = path.absolute().parents[1], f"*/{path.parent.name}/{path.name}"
    found = sorted(other.parents[1].name for other in study.parent.glob(place))
    return f", or set `study` to one that has it: {', '.join(found)}" if found else ""


@contextmanager
def atomic_path(path: Path | str) -> Iterator[Path]:
    """A temporary sibling to write a file or a folder to; it takes the place of `path` if the block succeeds.

    On an error in the block it is removed and `path` is as before. A killed process leaves `path` as before and a
    hidden sibling, which a later call removes an hour on. Contents are flushed to the disk before the rename. A file is
    replaced in one step. A folder needs two (aside, then in place): killed just between them, the next call for that
    path puts the old folder back. Parents are created; the suffix is kept, for writers that look at it.

    Raises FileNotFoundError if the block wrote nothing there.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    _clean_leftovers(target)
    temporary = _sibling(target, "tmp")
    try:
        with naming_what_lacks_room(target):
            yield temporary
            if not temporary.exists():
                raise FileNotFoundError(f"nothing was written for {target.name}: write to the path that was given")
            for written in (temporary, *(temporary.rglob("*") if temporary.is_dir() else ())):
                _flush(written)
            _replace(temporary, target)
    except BaseException:  # a KeyboardInterrupt too must leave nothing behind
        _remove(temporary)
        raise


def changed(folder: Path, known: Mapping[str, str]) -> list[str]:
    """The files of `folder` that are missing or have other checksums than those `known` by name."""
    return [name for name, sum_ in known.items() if not (folder / name).is_file() or checksum(folder / name) != sum_]


@contextmanager
def naming_what_lacks_room(target: Path) -> Iterator[None]:
    """On a full disk an error of the block, whatever a library makes of it, becomes an OSError that names `target`."""
    try:
        yield
    except Exception as error:
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "os error 28" in str(error)
        if full or shutil.disk_usage(target.parent).free < _FULL:  # safetensors' words, and any of torch's
            said = f"no room on the disk for {short_path(target)}: free some and run again"
            raise OSError(errno.ENOSPC, said) from error
        raise


@contextmanager
def unchanged_on_error(folder: Path, names: Iterable[str]) -> Iterator[None]:
    """Put what is called `names` in `folder` back as it was if the block fails; `put_back` does it after a kill."""
    with atomic_path(before := folder / _BEFORE) as copy:
        copy.mkdir()
        existed = {name: (folder / name).exists() for name in names}
        for name in filter(existed.get, existed):
            (shutil.copytree if (folder / name).is_dir() else shutil.copy2)(folder / name, copy / name)
        (copy / _EXISTED).write_text(json.dumps(existed))
    try:
        yield
    except BaseException:
        put_back(folder)
        raise
    _remove(before.rename(_sibling(before, "tmp")))  # renamed, as a part of the copy must not be put back


def put_back(folder: Path) -> None:
    """Put back in `folder` what `unchanged_on_error` found, if that did not end; killed itself, it may be repeated."""
    before = folder / _BEFORE
    if not before.exists():
        return
    for name, existed in json.loads((before / _EXISTED).read_text()).items():
        if not existed:
            _remove(folder / name)
        elif (before / name).exists():
            _replace(before / name, folder / name)
    _remove(before.rename(_sibling(before, "tmp")))


def _sibling(target: Path, kind: str) -> Path:
    return target.with_name(f".{kind}-{uuid.uuid4().hex[:12]}-{target.name}")


def _replace(temporary: Path, target: Path) -> None:
    """Rename onto target; a folder cannot be renamed onto, so the old one first steps aside."""
    aside = _sibling(target, "old")
    existed = (temporary.is_dir() or target.is_dir()) and os.path.lexists(target)
    if existed:
        os.replace(target, aside)
    try:
        os.replace(temporary, target)
    except BaseException:
        if existed:
            os.replace(aside, target)
        raise
    _flush(target.parent)
    _remove(aside)


def _clean_leftovers(target: Path) -> None:
    """Put back a folder that stepped aside for a run killed in that moment; remove what killed runs left."""
    pattern = re.compile(r"\.(tmp|old)-[0-9a-f]{12}-" + re.escape(target.name))
    for leftover in sorted(file for file in target.parent.iterdir() if pattern.fullmatch(file.name)):
        with suppress(FileNotFoundError):  # another process may clean up at the same time
            if leftover.name.startswith(".old") and not target.exists():
                os.replace(leftover, target)
            elif leftover.name.startswith(".old") or time.time() - leftover.lstat().st_mtime > _STALE_SECONDS:
                _remove(leftover)


def _flush(path: Path) -> None:
    """fsync of a file or folder; a file system that cannot do that for folders is left alone."""
    if path.is_symlink():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with suppress(OSError) if path.is_dir() else nullcontext():
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def short_path(path: Path) -> str:
    """Folder and file, `records/variants.csv`: enough to find it, and no path of the machine."""
    return "/".join(path.parts[-2:])


def first_line(error: BaseException) -> str:
    """What a note of a table says of an error: the first line of its message, or its type where it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def checksum(path: Path | str) -> str:
    """SHA-256 of a file, or of a folder's manifest (each file's digest and relative name, sorted), as hex.

    A folder's checksum does not depend on where it is, on dates, or on what interrupted writes left hidden in it.
    Raises FileNotFoundError if there is nothing.
    """
    path = Path(path)
    if path.is_dir():
        manifest = hashlib.sha256()
        leftover = re.compile(r"\.(tmp|old)-[0-9a-f]{12}-")
        found = [file for file in path.rglob("*") if file.is_file() and not leftover.match(file.name)]
        for name, file in sorted((file.relative_to(path).as_posix(), file) for file in found):
            manifest.update(f"{checksum(file)}  {name}\0".encode("utf-8", errors="surrogateescape"))
        return manifest.hexdigest()
    if not path.is_file():
        raise FileNotFoundError(f"{short_path(path)} is missing: there is nothing to take a checksum of")
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
