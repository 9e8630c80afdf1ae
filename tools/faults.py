"""`make faults`: kill, damage, fill up and mislead the project, and count what went wrong without a word.

Each row of outputs/gallery/faults.csv is a kind of fault: how many cases, how many of them went wrong (another result
in silence, a torn file, a hang, a crash), and the first of these. The tests have the quick half of most. The program
works in a copy of the project in a temporary folder; where it runs as root, the part on permissions runs as another
user.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import safetensors.torch
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path += [str(ROOT / "tests" / room) for room in ("pictures", "study")]  # which build most of the odd files

import test_decode as odd  # noqa: E402
from test_params import HOSTILE  # noqa: E402

from vitlib.network import checkpoint, engine, plan  # noqa: E402
from vitlib.pictures import preprocess  # noqa: E402
from vitlib.pictures.sources import Labels  # noqa: E402
from vitlib.report import page  # noqa: E402
from vitlib.study import files, params, records  # noqa: E402
from vitlib.study.study import Study  # noqa: E402
from vitlib.study.variants import Variant  # noqa: E402
from vitlib.training import adapters, trainer  # noqa: E402
from vitlib.training.trainer import Examples, Recipe  # noqa: E402

CPU = torch.device("cpu")
STUDY = "smoke"
TABLE = "outputs/gallery/faults.csv"
SLOW = 400  # seconds after which a command counts as hanging
NOBODY = 65534
Cases = Iterator[tuple[str, str]]  # what was tried, and what went wrong ('' for nothing)
KINDS: dict[str, Callable[[Path], Cases]] = {}


def kind(meaning: str) -> Callable[[Callable[[Path], Cases]], Callable[[Path], Cases]]:
    """Register a function that is given the scratch project and yields cases."""

    def add(function: Callable[[Path], Cases]) -> Callable[[Path], Cases]:
        KINDS[meaning] = function
        return function

    return add


# Tools


def forked(work: Callable[[], None], after: float = SLOW) -> int:
    """Exit code of a process that does `work`: −9 where it was killed, by itself or `after` so many seconds."""
    with warnings.catch_warnings(action="ignore"):  # of threads, which the child leaves alone
        child = os.fork()
    if child == 0:
        code = 1
        try:
            with open(os.devnull, "w") as sink:
                os.dup2(sink.fileno(), 1)
                os.dup2(sink.fileno(), 2)
            work()
            code = 0
        finally:
            os._exit(code)
    end = time.monotonic() + after
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def die(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def command(project: Path, *words: str, user: int | None = None, **environment: str) -> subprocess.CompletedProcess:
    """Run `python -m …` in the project, as `user` if given; TimeoutExpired where it hangs."""
    own = {"PYTHONPATH": str(project), "PATH": os.environ["PATH"], "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    own |= {"HOME": os.environ.get("HOME", "/"), "PYTHONDONTWRITEBYTECODE": "1"} | environment
    options = {"cwd": project, "env": own, "capture_output": True, "text": True, "timeout": SLOW}
    who = {} if user is None else {"user": user, "group": user, "extra_groups": []}
    return subprocess.run([sys.executable, "-m", *words], **options, **who)


def traced(done: subprocess.CompletedProcess) -> str:
    """What is wrong with how a command ended, where it should say one line: '' or a reason."""
    if "Traceback" in done.stderr:
        return f"a traceback: {done.stderr.strip().splitlines()[-1]}"
    return "" if done.returncode >= 0 else f"ended by signal {-done.returncode}"


def report(project: Path, notebook: str, study: str, *pairs: tuple[str, str], **more) -> subprocess.CompletedProcess:
    given = [word for pair in pairs for word in ("-p", *pair)]
    words = ["vitlib.report", "run", f"notebooks/{notebook}.ipynb", "--study", study, *given]
    return command(project, *words, **more)


def predicted(project: Path, folder: Path, *words: str, **more) -> tuple[subprocess.CompletedProcess, pd.DataFrame]:
    """The command `predict` on a folder, and its rows."""
    output = project / f"{folder.name}.csv"
    output.unlink(missing_ok=True)
    given = ["--checkpoint", f"outputs/{STUDY}", "--variant", "fp32-sdpa", "--output", str(output), *words]
    done = command(project, "vitlib", "predict", str(folder), *given, **more)
    return done, records.read_table(output) if output.is_file() else pd.DataFrame(columns=["file"])


# Training


def training(folder: Path, method: str) -> None:
    """Train a small network in `folder`, resuming, and write the checksum of its weights."""
    torch.manual_seed(0)
    labels = Labels(("a", "b"), ("a", "b"))
    draw = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (48, 3, 32, 32), dtype=torch.uint8, generator=draw)
    data = {split: Examples(pixels, torch.arange(48) % 2) for split in ("train", "valid")}
    network = checkpoint.new("vit-micro", image_size=32, labels=labels)
    if method == "lora":
        network = adapters.attach(network, rank=8, alpha=32, dropout=0.1, head="classifier", summed=False)
    recipe = Recipe(4, 16, 1e-3, 0.01, 0.1, 0.0, 0.6, "fp32", 0)
    trainer.train(
        network, data, pre=preprocess.new(32), recipe=recipe, folder=folder / "training", device=CPU, resume=True
    )
    held = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    safetensors.torch.save_file(held, folder / "weights")
    (folder / "sum").write_text(files.checksum(folder / "weights"))


def _dying_at(moment: str, epoch: int) -> None:
    """From now on this process ends in the given moment of saving the training checkpoint of an epoch."""
    saves = itertools.count(1)
    before = trainer.ImageTrainer._save_checkpoint

    def save(self, model, trial):
        if next(saves) != epoch:
            return before(self, model, trial)
        if moment == "before":
            die()
        if moment == "weights":
            safetensors.torch.save_file = _half_written
        if moment == "optimizer":
            torch.save = _half_written
        if moment == "manifest":
            records.write_json = die
        before(self, model, trial)
        return die()  # "after", and where the library saves by another function

    trainer.ImageTrainer._save_checkpoint = save


def _half_written(*_: object, **__: object) -> None:
    die()


def _ended(folder: Path, method: str, whole: str) -> str:
    """Train to the end in `folder`; what is wrong with the result."""
    if code := forked(lambda: training(folder, method)):
        return f"the rerun ended with {code}"
    return "" if (folder / "sum").read_text() == whole else "other weights than those of a run that was not killed"


@kind("kills in training, then run again: the same weights")
def kills_in_training(project: Path) -> Cases:
    for method in ("full", "lora"):
        whole = project / f"whole-{method}"
        whole.mkdir()
        start = time.monotonic()
        if code := forked(lambda method=method, whole=whole: training(whole, method)):
            yield method, f"a run without a kill ended with {code}"
            continue
        took, same = time.monotonic() - start, (whole / "sum").read_text()
        moments = [(f"saving epoch {n}, {what}", what, n) for n in (1, 3) for what in ("before", "weights", "manifest")]
        moments += [("saving epoch 2, optimizer", "optimizer", 2), ("saving epoch 2, after", "after", 2)]
        for name, what, epoch in moments:
            folder = project / "killed"
            folder.mkdir()

            def run(folder=folder, method=method, what=what, epoch=epoch):
                _dying_at(what, epoch)
                training(folder, method)

            code = forked(run)
            yield f"{method}: {name}", _ended(folder, method, same) if code == -9 else f"was not killed ({code})"
            shutil.rmtree(folder)
        for share in (0.3, 0.6, 0.8, 0.95):
            folder = project / "killed"
            folder.mkdir()
            forked(lambda folder=folder, method=method: training(folder, method), after=share * took)
            yield f"{method}: after {100 * share:.0f} % of the time", _ended(folder, method, same)
            shutil.rmtree(folder)


def _flip(file: Path, where: float = 0.5) -> None:
    content = bytearray(file.read_bytes())
    content[min(int(where * len(content)), len(content) - 1)] ^= 1
    file.write_bytes(content)


DAMAGES = {
    "one bit changed": _flip,
    "cut in half": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "empty": lambda file: file.write_bytes(b""),
    "removed": Path.unlink,
    "zeros": lambda file: file.write_bytes(bytes(file.stat().st_size)),
}


@kind("damaged training checkpoints: the same weights")
def damaged_training(project: Path) -> Cases:
    start = project / "start"
    start.mkdir()

    def until_saved():
        _dying_at("after", 3)
        training(start, "lora")

    forked(until_saved)
    same = (project / "whole-lora" / "sum").read_text()
    newest = sorted((start / "training").glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]))[-1]
    for file, (name, damage) in itertools.product(sorted(newest.iterdir()), DAMAGES.items()):
        folder = project / "damaged"
        shutil.copytree(start, folder)
        damage(folder / file.relative_to(start))
        yield f"{file.name} {name}", _ended(folder, "lora", same)
        shutil.rmtree(folder)


# Reports


def _publish(study: Study, version: int) -> None:
    """What a run of a notebook does to the study's files."""
    from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

    said = [new_markdown_cell("# Finetune"), new_markdown_cell(f"version {version} " * 2000), new_code_cell("1")]
    executed = new_notebook(cells=said, metadata={"vitlib": {"made": "now"}})
    changes = ("records", "1_finetune.ipynb", "1_finetune.html")
    with study.locked(), files.unchanged_on_error(study.folder, changes):
        for name in ("a", "b"):
            records.write_json({"version": version}, study.record(f"{name}.json"))
        page.write(executed, study.folder / "1_finetune.ipynb")


def _versions(study: Study) -> set[int]:
    """Which versions the study's files are of, after the next run has begun."""
    with study.locked():
        found = {records.read_json(study.record(f"{name}.json"))["version"] for name in ("a", "b")}
        for text in ((study.folder / f"1_finetune{suffix}").read_text() for suffix in (".ipynb", ".html")):
            found |= {version for version in (1, 2) if f"version {version} " in text}
        page.read(study.folder / "1_finetune.ipynb")
    return found


@kind("kills while a report is saved: all old or all new")
def kills_in_saving(project: Path) -> Cases:
    """At every rename that saving makes, before and after it, and at random moments; also while it is undone."""

    def dying(work: Callable[[], object], at: int, after: bool) -> Callable[[], None]:
        def run() -> None:
            calls, rename = itertools.count(1), os.replace

            def replace(source, target):
                number = next(calls)
                if number == at and not after:
                    die()
                rename(source, target)
                if number == at:
                    die()

            os.replace = replace
            work()

        return run

    study = Study.at(project / "outputs" / "killed")

    def again() -> None:
        shutil.rmtree(study.folder, ignore_errors=True)
        forked(lambda: _publish(study, 1))

    for at, after in ((number // 2, bool(number % 2)) for number in itertools.count(2)):
        again()
        if forked(dying(lambda: _publish(study, 2), at, after)) == 0:
            break
        forked(dying(lambda: _versions(study), 1 + at % 4, after))  # the next run is killed while it undoes this one
        found = _versions(study)
        yield f"{'after' if after else 'before'} rename {at}", f"files of versions {found}" * (len(found) > 1)
    chance = random.Random(0)
    again()
    start = time.monotonic()
    forked(lambda: _publish(study, 2))
    took = time.monotonic() - start
    for number in range(20):
        again()
        forked(lambda: _publish(study, 2), after=chance.uniform(0, took))
        found = _versions(study)
        yield f"random moment {number}", f"files of versions {found}" * (len(found) > 1)


@kind("two runs of one study: the second is refused")
def two_runs(project: Path) -> Cases:
    own = os.environ | {"PYTHONPATH": str(project), "HF_HUB_OFFLINE": "1"}
    words = [sys.executable, "-m", "vitlib.report", "run", "notebooks/4_inference.ipynb", "--study", STUDY]
    with subprocess.Popen(words, cwd=project, env=own, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as first:
        while not (project / "outputs" / STUDY / ".lock.holder").exists() and first.poll() is None:
            time.sleep(0.02)
        for notebook in ("4_inference", "5_claims"):
            second = report(project, notebook, STUDY)
            right = second.returncode == 1 and f"pid {first.pid}" in second.stderr and not traced(second)
            yield f"{notebook} beside 4_inference", "" if right else f"exit {second.returncode}: {second.stderr[-200:]}"
        first.communicate()
        yield "the first", "" if first.returncode == 0 else f"exit {first.returncode}"
    with subprocess.Popen(words, cwd=project, env=own, stderr=subprocess.DEVNULL) as killed:
        while not (project / "outputs" / STUDY / ".lock.holder").exists() and killed.poll() is None:
            time.sleep(0.02)
        time.sleep(2)
        killed.kill()
    third = report(project, "4_inference", STUDY)
    yield "after the first was killed", "" if third.returncode == 0 else third.stderr[-200:]


@kind("full disk: said with the file, old report kept")
def full_disk(project: Path) -> Cases:
    study = project / "outputs" / "full"
    study.mkdir()
    size = 60 * 2**20
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", study], capture_output=True)
    if mounted.returncode:
        yield "not tried: mounting a small disk needs root", ""
        return
    try:
        shutil.copytree(project / "outputs" / STUDY / "checkpoints", study / "checkpoints")
        pairs = [("data_source", "synthetic"), ("limit", "9"), ("variant", "fp32-sdpa")]
        first = report(project, "4_inference", "full", *pairs)
        if first.returncode:
            yield "a run with room", first.stderr[-300:]
            return
        kept = {name: files.checksum(study / name) for name in ("4_inference.html", "4_inference.ipynb", "records")}
        for free in (0, 100, 300, 700, 2_000, 9_000):
            filler = study / "filler"
            filler.write_bytes(os.urandom(max(shutil.disk_usage(study).free - 1024 * free, 0)))
            done = report(project, "4_inference", "full", *pairs)
            filler.unlink()
            now = {name: files.checksum(study / name) for name in kept}
            said = "no room on the disk for" in done.stderr or done.returncode == 0
            wrong = traced(done) or ("" if said else f"unclear: {done.stderr.strip()[-200:]}")
            wrong = wrong or ("" if done.returncode == 0 or now == kept else "the old report is not whole")
            yield f"{free:,} KB free", wrong
            kept = now
    finally:
        subprocess.run(["umount", "-l", study], check=True)


# Checkpoints


def _edits(folder: Path) -> dict[str, Callable[[Path], None]]:
    """What rot, a slip or another tool does to a checkpoint, by name."""
    edits = {}
    for file in sorted(folder.iterdir()):
        for name, damage in DAMAGES.items():
            edits[f"{file.name} {name}"] = lambda copy, file=file, damage=damage: damage(copy / file.name)
        for tenth in range(1, 10, 2):
            edits[f"{file.name} bit at {tenth}0 %"] = lambda copy, file=file, t=tenth: _flip(copy / file.name, t / 10)

    def change(name: str, **values: object) -> Callable[[Path], None]:
        return lambda copy: (copy / name).write_text(json.dumps(json.loads((copy / name).read_text()) | values))

    edits |= {
        "other mean": change("preprocessor_config.json", image_mean=[0.5, 0.4, 0.3]),
        "std of 0": change("preprocessor_config.json", image_std=[0, 0, 0]),
        "no normalisation": change("preprocessor_config.json", do_normalize=False),
        "other size": change("preprocessor_config.json", size={"height": 32, "width": 32}),
        "one block less": change("config.json", num_hidden_layers=3),
        "other heads": change("config.json", num_attention_heads=4),
        "other epsilon": change("config.json", layer_norm_eps=0.1),
        "ReLU": change("config.json", hidden_act="relu"),
        "remote code": change("config.json", auto_map={"AutoConfig": "evil--evil.Evil"}),
        "no checksums": change("provenance.json", files={}),
        "adapter beside it": lambda copy: (copy / "adapter_config.json").write_text("{}"),
        "another checkpoint's weights": lambda copy: shutil.copy(
            copy.parent / ("int8" if copy.name != "int8" else "nf4") / "model.safetensors", copy
        ),
    }
    return edits


@kind("checkpoints edited or damaged: refused, or the same logits")
def edited_checkpoints(project: Path) -> Cases:
    folder = project / "outputs" / STUDY / "checkpoints"
    pixels = torch.randint(0, 256, (4, 3, 48, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for weights in ("fp16", "nf4", "nf4c", "int8", "mixed"):
        attention = ("direct", "fused") if weights == "mixed" else ()
        variant = Variant(weights, *attention)
        same = _logits(folder, variant, pixels)
        for name, edit in _edits(folder / variant.checkpoint).items():
            copy = project / "edited"
            shutil.copytree(folder, copy)
            edit(copy / variant.checkpoint)
            yield f"{weights}: {name}", _silent(copy, variant, pixels, same)
            shutil.rmtree(copy)


@kind("one tensor missing, no checksums: refused, or the same logits")
def missing_tensors(project: Path) -> Cases:
    folder = project / "outputs" / STUDY / "checkpoints"
    pixels = torch.randint(0, 256, (4, 3, 48, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for weights in ("fp16", "nf4", "int8"):
        variant, copy = Variant(weights), project / "missing"
        same = _logits(folder, variant, pixels)
        shutil.copytree(folder / variant.checkpoint, copy / variant.checkpoint)
        (copy / variant.checkpoint / "provenance.json").unlink()
        file = copy / variant.checkpoint / "model.safetensors"
        tensors = safetensors.torch.load_file(file)
        for name in tensors:
            rest = {other: tensor for other, tensor in tensors.items() if other != name}
            safetensors.torch.save_file(rest, file, metadata={"format": "pt"})
            yield f"{weights}: {name}", _silent(copy, variant, pixels, same)
        shutil.rmtree(copy)


def _logits(folder: Path, variant: Variant, pixels: torch.Tensor) -> torch.Tensor:
    loaded = checkpoint.load(folder, variant, CPU)
    return engine.logits(engine.Engine(loaded, variant.execution, (len(pixels),)), pixels, len(pixels))


def _silent(folder: Path, variant: Variant, pixels: torch.Tensor, same: torch.Tensor) -> str:
    try:
        found = _logits(folder, variant, pixels)
    except (ValueError, RuntimeError, OSError, FloatingPointError):
        return ""
    return "" if torch.equal(found, same) else f"other logits, by {(found - same).abs().max():.3g}"


# Pictures, names and parameters


def _odd_pictures(folder: Path) -> None:
    """Over 150 files of many formats, modes, sizes and kinds of damage."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    modes = {
        "JPEG": ("RGB", "L", "CMYK"),
        "PNG": ("RGB", "L", "P", "1", "LA", "RGBA", "I;16"),
        "TIFF": ("RGB", "L", "P", "1", "LA", "RGBA", "CMYK", "YCbCr", "LAB", "I", "F", "I;16"),
        "WEBP": ("RGB", "RGBA"),
        "GIF": ("L", "P", "1"),
        "BMP": ("RGB", "L", "P", "1"),
        "PPM": ("RGB", "L", "1"),
        "TGA": ("RGB", "L", "RGBA"),
        "JPEG2000": ("RGB", "L", "RGBA"),
        "ICO": ("RGBA",),
        "PCX": ("RGB", "L"),
        "DDS": ("RGB", "RGBA"),
    }
    for form, names in modes.items():
        for mode, size in itertools.product(names, ((37, 21), (1, 300), (2, 2))):
            mark = f"{form}-{mode.replace(';', '_')}-{size[0]}x{size[1]}"
            pixels = Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
            with warnings.catch_warnings(action="ignore"):
                image = Image.new(mode, size, 1000) if mode in ("I;16", "I", "F") else pixels.convert(mode)
                try:
                    image.save(folder / mark, form)
                except (OSError, ValueError, KeyError):  # a size or mode that the format does not have
                    (folder / mark).write_bytes(f"{form} {mode}".encode())
    grey = np.linspace(0, 1, 96).reshape(8, 12)
    for bits, values in {"16": np.uint16(grey * 65535), "32": np.int32(grey * 2**30), "f": np.float32(grey)}.items():
        odd.tiff(folder / f"grey-{bits}.tif", values)
        odd.tiff(folder / f"white-is-0-{bits}.tif", values, {262: 0})
    odd.tiff(folder / "float-over-1.tif", np.float32(grey * 1.02))
    odd.tiff(folder / "float-nan.tif", np.where(grey > 0.9, np.nan, grey).astype("f4"))
    for side in (7_000, 20_000, 60_000, 2**31 - 1):
        (folder / f"header-{side}.png").write_bytes(odd.png_header(side, side))
    broken = {"empty.jpg": b"", "text.jpg": b"404", "zeros.png": bytes(4096), "head.jpg": b"\xff\xd8"}
    for name, content in broken.items():
        (folder / name).write_bytes(content)
    os.mkfifo(folder / "fifo.jpg")
    (folder / "nowhere.jpg").symlink_to("absent")
    (folder / "itself.jpg").symlink_to("itself.jpg")
    for orientation in range(1, 10):
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.new("RGB", (20, 10)).save(folder / f"turned-{orientation}.jpg", exif=exif)
    for form in ("JPEG", "PNG", "WEBP", "GIF"):
        content = odd.encode(form)
        for share in (0.1, 0.5, 0.9, 0.99):
            (folder / f"cut-{form}-{share}").write_bytes(content[: int(share * len(content))])


def _one_row_each(project: Path, folder: Path) -> Cases:
    try:
        done, rows = predicted(project, folder, "--workers", "4")
    except subprocess.TimeoutExpired:
        yield "all", "hangs"
        return
    if wrong := traced(done):
        yield "all", wrong
    counted = rows["file"].value_counts()
    for file in sorted(os.listdir(folder)):
        count = int(counted.get(file, 0))
        hidden = (folder / file).is_symlink()  # links that lead nowhere are no file
        yield file, "" if count == 1 or hidden else f"{count} rows"


@kind("odd pictures: one row each")
def odd_pictures(project: Path) -> Cases:
    folder = project / "odd"
    _odd_pictures(folder)
    yield from _one_row_each(project, folder)


@kind("mutated pictures: one row each")
def mutated_pictures(project: Path) -> Cases:
    folder, chance = project / "mutated", random.Random(20261124)
    folder.mkdir()
    forms = [(form, odd.encode(form, **options)) for form, options in odd.FORMS]
    for number in range(3_000):
        form, content = forms[number % len(forms)]
        (folder / f"{number:04d}-{form}").write_bytes(odd.mutate(content, chance) or b"\0")
    yield from _one_row_each(project, folder)


@kind("50-megapixel pictures in 4 threads: under 1,000 MB")
def large_pictures(project: Path) -> Cases:
    folder = project / "large"
    folder.mkdir()
    for number, mode in enumerate(("I;16", "RGB", "RGBA", "L", "P", "LA", "CMYK", "I;16")):
        form = "TIFF" if mode == "CMYK" else "PNG"
        options = {"compression": "tiff_deflate"} if form == "TIFF" else {"compress_level": 1}
        Image.new(mode, (7_071, 7_071)).save(folder / f"{number}-{mode.replace(';', '_')}", form, **options)

    def run() -> None:
        done, rows = predicted(project, folder, "--workers", "4")
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
        (project / "large.json").write_text(json.dumps([peak, len(rows), traced(done)]))

    forked(run)
    peak, rows, wrong = json.loads((project / "large.json").read_text())
    yield f"peak {peak:,.0f} MB", wrong or ("" if peak < 1_000 and rows == 8 else f"{peak:,.0f} MB, {rows} rows")


VECTORS = ("<img src=x onerror=alert(1)>", "<script>alert(1)<!-- ", "<svg onload=alert(1)>", "<!--", "</table><style>")
VECTORS += ("[x](javascript:alert(1))", "$\\notacommand$", "$a$ & $b$", "`x`|y", "&lt;b&gt;", "%3Cb%3E", "\u202egpj")
FORMULAS = ("=1+1", "+1", "-1", "@SUM(1)", "=cmd|' C'!A0", "\t=1", "'=1")


@kind("names that are markup, mathematics or formulas: text everywhere")
def hostile_names(project: Path) -> Cases:
    from bs4 import BeautifulSoup

    folder = project / "named"
    names = [f"{name.replace('/', '∕')}.png" for name in (*VECTORS, *FORMULAS)]
    for name in names:
        target = folder / name.removesuffix(".png") / name
        target.parent.mkdir(parents=True)
        Image.new("RGB", (9, 9)).save(target)
    done = report(project, "4_inference", "named", ("pictures", str(folder)), ("checkpoints_of", STUDY), ("grid", "30"))
    if done.returncode:
        yield "notebook 4", done.stderr[-300:]
        return
    study = Study.at(project / "outputs" / "named")
    found = set(study.read("predictions")["file"])
    raw = study.record("predictions").read_text(encoding="utf-8")
    shown = BeautifulSoup((study.folder / "4_inference.html").read_text(encoding="utf-8"), "html.parser")
    outputs = (study.folder / "4_inference.ipynb").read_text(encoding="utf-8")
    for name in names:
        file = f"{name.removesuffix('.png')}/{name}"
        wrong = "" if file in found else "not in the record"
        if any(line.startswith(tuple("=+-@\t")) for line in raw.splitlines() if name in line):
            wrong = "a formula in the record"
        yield name, wrong
    tags = [tag for tag in shown.find_all(True) if any(key.startswith("on") for key in tag.attrs)]
    yield "attributes that run", f"{len(tags)} of them" * bool(tags)
    yield "in the notebook", "live markup" if "<img src=x onerror" in outputs.replace("\\\\", "\\") else ""


@kind("hostile or wrong parameter files: refused, nothing executed")
def parameter_files(project: Path) -> Cases:
    os.chdir(project)
    more = {
        "200 MB": "study: demo\n#" + "x" * 200_000_000,
        "octal": "seed: 010",
        "sexagesimal": "seed: 1:30",
        "another type": "seed: [1]",
        "outside": "study: ../../x",
        "long name": f"study: {'x' * 300}",
        "misspelt": "epohcs: 3",
        "negative": "epochs: -1",
        "too large": "batch_sizes: [100000000]",
        "no user": "data_source: ~nosuchuser/x",
        "no architecture": "architecture: vit-huge",
        "odd size": "image_size: 17",
    }
    read_as_they_are = {"octal"}  # 10 in YAML 1.2
    for name, content in (HOSTILE | more).items():
        file = project / "params" / "set.yaml"
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        start = time.monotonic()
        try:
            settings = params.check(params.load(file))
            wrong = "" if name in read_as_they_are and settings.seed == 10 else "accepted"
            if name == "no user":
                Study.of(settings)
                wrong = ""  # judged when the folder is looked for
        except params.ParameterError:
            wrong = ""
        took = time.monotonic() - start
        wrong = wrong or "executed" * (project / "trap").exists() or f"takes {took:.0f} s" * (took > 5)
        yield name, wrong
        file.unlink()


@kind("without permission: one line, no traceback")
def permissions(project: Path) -> Cases:
    """As another user than the owner of the files."""
    user = NOBODY if os.geteuid() == 0 else None
    project.chmod(0o755)
    pictures, caches = project / "pictures", {"HF_HOME": "/nowhere", "MPLCONFIGDIR": "/nowhere", "HOME": "/nowhere"}
    pictures.mkdir()
    for name in ("a.png", "b.png"):
        Image.new("RGB", (9, 9)).save(pictures / name)
    out = project / "written"
    out.mkdir(mode=0o777)
    out.chmod(0o777)
    words = ["vitlib", "predict", str(pictures), "--checkpoint", f"outputs/{STUDY}", "--variant", "fp32-sdpa"]

    def run(
        name: str, status: int, says: str = "", output: Path = out / "p.csv", **environment: str
    ) -> tuple[str, str]:
        output.unlink(missing_ok=True)
        done = command(project, *words, "--output", str(output), user=user, **environment)
        right = done.returncode == status and says in done.stderr
        return name, traced(done) or ("" if right else f"exit {done.returncode}: {done.stderr.strip()[-200:]}")

    yield run("caches that cannot be written", 0, **caches)
    (pictures / "a.png").chmod(0)
    yield run("an unreadable picture", 2)
    (pictures / "a.png").chmod(0o644)
    pictures.chmod(0)
    yield run("an unreadable folder", 1, "ermission")
    pictures.chmod(0o755)
    yield run("an output folder that cannot be written", 1, "ermission", project / "outputs" / "p.csv")
    weights = project / "outputs" / STUDY / "checkpoints" / "merged" / "model.safetensors"
    weights.chmod(0)
    yield run("unreadable weights", 1, "ermission")
    weights.chmod(0o644)


# All of it


def scratch(folder: Path) -> Path:
    """A copy of the project with the smallest study, whose checkpoints are whole."""
    project = folder / "project"
    for name in ("vitlib", "notebooks", "params"):
        shutil.copytree(ROOT / name, project / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", project)
    done = report(project, "1_finetune", STUDY)
    if done.returncode:
        raise RuntimeError(f"the study whose files are damaged could not be made: {done.stderr}")
    checkpoints = project / "outputs" / STUDY / "checkpoints"
    names = plan.linears(checkpoint.load(checkpoints, Variant("fp16"), CPU).model)
    chosen = dict(zip(names, itertools.cycle(["int8", "nf4", "fp16"]), strict=False))
    checkpoint.save_mixed(checkpoints, chosen, CPU, {})
    return project


def tried(meaning: str, function: Callable[[Path], Cases], project: Path) -> dict[str, object]:
    """A row of the table; a fault of this program counts as a case that went wrong."""
    start, cases = time.monotonic(), []
    try:
        cases += function(project)
    except Exception as error:
        traceback.print_exc()
        cases.append(("this program", f"{type(error).__name__}: {error}"))
    wrong = [f"{name}: {said}" for name, said in cases if said]
    row = {"fault": meaning, "cases": len(cases), "wrong": len(wrong), "first_wrong": (wrong or [""])[0]}
    if len(cases) == 1 or (cases and cases[0][0].startswith(("peak", "not tried"))):
        row["note"] = cases[0][0]
    print(f"{row['cases']:>5} cases, {row['wrong']} wrong, {time.monotonic() - start:4.0f} s  {meaning}")
    for said in wrong[:20]:
        print(f"      {said}")
    return row | {"seconds": round(time.monotonic() - start, 1)}


def main(chosen: list[str]) -> int:
    """Try the kinds whose functions are named, or all; only all of them together write the table."""
    torch.set_num_threads(1)  # a process with several threads cannot be forked
    checkpoint.quiet_libraries()
    here = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        project = scratch(Path(folder))
        kinds = {what: each for what, each in KINDS.items() if not chosen or each.__name__ in chosen}
        table = pd.DataFrame([tried(what, each, project) for what, each in kinds.items()])
        os.chdir(here)
    if not chosen:
        table.to_csv(ROOT / TABLE, index=False)
    return int(table["wrong"].sum() > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
