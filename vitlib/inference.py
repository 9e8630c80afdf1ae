"""Notebook 4: classify a folder of pictures."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch

from vitlib.deploy import predictor
from vitlib.deploy.predict import TOP, rows
from vitlib.deploy.predictor import Predictor
from vitlib.measure import stats
from vitlib.network import stream
from vitlib.pictures import decode, sources
from vitlib.pictures.decode import Picture
from vitlib.report.tables import NO_BREAK, Column, Markdown, text
from vitlib.study import files, records, variants
from vitlib.study.params import Parameters
from vitlib.study.study import Study

LIMITED = 1.5  # times the rate from file to class that the network alone does where decoding is said to limit it
PREDICTIONS = {"file": "file", "label_name": "class", "name_1": "prediction"}
PREDICTIONS |= {"probability_1": Column("probability (%)", ".1f", 100), "name_2": "second", "name_3": "third"}
FAULTS = {"file": "file", "reason": "reason"}
NOT_KNOWN = Markdown("The classes of these pictures are not known, so mistakes cannot be found.")
NOT_COMPARED = Markdown("NF4 and FP32 are not compared: notebook 2 has no outputs for these pictures.")


class OtherPictures(ValueError):
    """A study that has predictions of other pictures; the message says what to do."""


def open(namespace: dict[str, object]) -> Study:
    """The study of the notebook's parameters (call it with `globals()`). ParameterError where pictures are missing.

    OtherPictures where `pictures` names a folder and the study has predictions of other pictures, which its page shows.
    """
    study = Study.open(namespace)
    settings = study.settings
    if not settings.pictures:
        return study
    known = study.read_json("inference").get("source") if study.has("inference.json") else None
    if study.has("predictions") and known != _source(settings.pictures):
        raise OtherPictures(
            f"study {study.name!r} has predictions of other pictures, which its page shows: set `study` to a new name "
            f"and `checkpoints_of` to {settings.checkpoints_of or study.name!r}, the study whose checkpoints are used"
        )
    return study


def _source(pictures: str) -> str:
    """What a record may say of the folder: a checksum of its name ('' for the study's own pictures)."""
    return hashlib.sha256(pictures.encode()).hexdigest() if pictures else ""


def _source_of(study: Study) -> Study:
    """The study whose checkpoints and measurements are used, with the limits of this one."""
    return Study.of(study.settings.model_copy(update={"study": study.settings.checkpoints_of or study.name}))


def load(study: Study) -> Predictor:
    """The variant of the parameter set, with the checkpoints of `checkpoints_of` or of the study itself."""
    settings, source = study.settings, _source_of(study)
    options = {"device": settings.device, "batch_size": settings.eval_batch_size, "limits": limits(settings)}
    return predictor.load(predictor.weights_of(source), settings.variant, **options)


def limits(settings: Parameters) -> dict[str, float]:
    """The user's limits, as `recommend.ranked` takes them."""
    return {"memory_mb": settings.memory_limit_mb, "latency_ms": settings.latency_limit_ms, "margin": settings.margin}


def reason(chosen: Predictor) -> Markdown:
    """Which variant is used, and why."""
    return Markdown(f"**{chosen.variant.label}** {chosen.said}")


def recommendation(study: Study, chosen: Predictor) -> Markdown:
    """Which measured variant to deploy on this device and why the next two lose; also `records/recommendation.json`."""
    settings, device = study.settings, chosen.engine.loaded.device
    measured = predictor.weights_of(_source_of(study)).measured
    rows = predictor.recommended(measured, device, settings.eval_batch_size, limits(settings))
    text = (
        _advice(rows, study) if len(rows) else "Notebook 2 has measured no variant that runs here: none is recommended."
    )
    study.write_json("recommendation", {"sentence": text.replace("**", ""), "limits": _limits(study)})
    return Markdown(text)


def _limits(study: Study) -> list[str]:
    """The study's limits in words."""
    settings = study.settings
    limits = [f"{settings.memory_limit_mb:g} MB"] * bool(settings.memory_limit_mb)
    limits += [f"{settings.latency_limit_ms:g} ms"] * bool(settings.latency_limit_ms)
    return [*limits, f"a loss of {100 * settings.margin:g} points of Top-1"]


def _advice(rows: pd.DataFrame, study: Study) -> str:
    """The first of `predictor.recommended` in a sentence, and why the next two lose."""
    reasons = [f"{variants.label(row.variant)}: {row.why}" for row in rows.head(3).itertuples()]
    limits, best = f" Limits: {', '.join(_limits(study))}.", rows.iloc[0]
    if best["why"]:
        return f"**No measured variant is within the limits.** {'; '.join(reasons)}.{limits}"
    said = f"Deploy **{variants.label(best['variant'])}**: {best['latency_p50_ms']:.3g} ms at batch size "
    said += f"{best['batch']:.0f} and {best['peak_memory_mb']:,.0f} MB with all that a call needs."
    return said + (f" The next: {'; '.join(reasons[1:])}." if reasons[1:] else "") + limits


def find_pictures(study: Study) -> tuple[list[Picture], list[tuple[str, str]]]:
    """The files to classify, and those that are skipped without opening them (file, reason).

    `pictures` may be flat, hold class folders, or both. Without it they are the data's test split, else its validation
    split.
    """
    settings = study.settings
    if settings.pictures:
        folder, options = files.resolve(settings.pictures), {"follow_links": settings.follow_links}
        found, skipped = sources.pictures_below(folder, settings.max_megapixels, **options)
        if not (found or skipped):
            raise sources.DataError(f"the folder {settings.pictures!r} holds no picture")
        return found, skipped
    dataset = sources.load(settings)
    split = "test" if dataset.splits.get("test") else "valid"
    return dataset.splits[split], [(file, reason) for file, where, reason in dataset.skipped if where == split]


def predict(
    study: Study, chosen: Predictor, pictures: list[Picture], skipped: list[tuple[str, str]]
) -> tuple[pd.DataFrame, stream.Passed, float]:
    """Classify every picture: `records/predictions.csv` (a row a file), what was read, and images per second.

    Decoding and the network run at the same time (`stream.classify`). The rate covers decoding, resizing, the network
    and copying its results; `records/inference.json` has it with its conditions. It is NaN where no picture can be
    read; the network is not called then.
    """
    settings, start = study.settings, time.perf_counter()
    options = {"batch_size": settings.eval_batch_size, "workers": settings.workers, "decoder": settings.decoder}
    passed = stream.classify(pictures, chosen.engine, **options)
    rate = len(passed.pictures) / (time.perf_counter() - start) or np.nan
    named = [(picture.file, picture.label, "") for picture in passed.pictures]
    named += [(file, None, reason) for file, reason in [*skipped, *passed.skipped]]
    frame = rows(named, passed.logits, chosen.engine.loaded.labels)
    about = {"variant": chosen.variant.name, "device": chosen.engine.loaded.device.type}
    about |= {"decoder": passed.decoder, "decoded_on_device": passed.on_device, "batch": settings.eval_batch_size}
    about |= {"workers": settings.workers, "pictures": len(passed.pictures), "images_per_s": rate}
    study.write_json("inference", about | {"source": _source(settings.pictures)})
    return study.write("predictions", frame), passed, rate


def sample(frame: pd.DataFrame, rows: int = 8) -> pd.DataFrame:
    """Pictures spread over the files."""
    read = frame[frame["status"] == "ok"]
    return read.iloc[_chosen(len(read), rows)]


def grid(frame: pd.DataFrame, passed: stream.Passed, count: int) -> dict[str, object]:
    """Pictures spread over the files, with the prediction and whether it is right, for `plots.picture_grid`."""
    shown = []
    for row in frame.iloc[_chosen(len(passed.pictures), count)].itertuples():  # the readable pictures come first
        right = row.name_1 == row.label_name if row.label_name else None
        shown.append((passed.pictures[row.Index], _guess(row, right is False), right))
    return _looks(shown)


def _guess(row: tuple, wrong: bool = True) -> str:
    return f"{row.name_1} {100 * row.probability_1:.0f}{NO_BREAK}%" + (f"; is {row.label_name}" if wrong else "")


def _looks(shown: Sequence[tuple[Picture, str, bool | None]] = (), columns: int = 0) -> dict[str, object]:
    """What `plots.picture_grid` takes. Pictures are read again, as no pixels are kept, to at most 320 × 320 pixels."""
    images, (pictures, titles, right) = [], zip(*shown, strict=True) if shown else ((), (), ())
    for image in (picture.open() for picture in pictures):
        image.thumbnail((320, 320))
        images.append(np.asarray(image))
    return {"images": images, "titles": titles, "right": right, "columns": columns}


def _chosen(total: int, count: int) -> list[int]:
    return np.unique(np.linspace(0, total - 1, min(count, total)).round().astype(int)).tolist()


def _known(frame: pd.DataFrame, labels: sources.Labels) -> pd.DataFrame:
    """The pictures whose class the checkpoint knows, with `right` and `right_5`: whether Top-1 and Top-5 hold it."""
    known = frame[frame["label"].isin(labels.folders)]
    hits = known.filter(regex=r"^id_").eq(known["label"].map(labels.folders.index), axis=0)
    return known.assign(right=hits["id_1"], right_5=hits.any(axis=1))


def mistakes(
    frame: pd.DataFrame, passed: stream.Passed, chosen: Predictor, count: int = 10
) -> tuple[Markdown, dict[str, object]]:
    """How many pictures are classified wrongly, and the most confident of them for `plots.picture_grid`.

    Beside each is the best right example of the class that was predicted, where all of these classes have one.
    """
    known = _known(frame[frame["status"] == "ok"], chosen.engine.loaded.labels)
    known = known.sort_values("probability_1", ascending=False, kind="stable")
    wrong, example = known[~known["right"]], known[known["right"]].drop_duplicates("id_1").reset_index()
    if wrong.empty:
        none = f"No mistake: the classes of all {len(known):,} pictures are predicted correctly."
        return Markdown(none) if len(known) else NOT_KNOWN, _looks()
    example, shown = example.set_index("id_1")["index"], []
    paired = bool(wrong["id_1"].head(count).isin(example.index).all())
    for row in wrong.head(count).itertuples():
        shown.append((passed.pictures[row.Index], _guess(row), False))
        if paired:
            shown.append((passed.pictures[example[row.id_1]], f"for comparison: {row.name_1}", None))
    most, sure = wrong.iloc[0], int((wrong["probability_1"] > 0.9).sum()) or "none"
    return Markdown(
        f"**{len(wrong):,} of {len(known):,} pictures are misclassified**, {sure} of them with a probability above "
        f"90 %. In the most confident mistake, {text(most['label_name'])} is called {text(most['name_1'])} "
        f"({100 * most['probability_1']:.1f} %)."
    ), _looks(shown, 4 if paired else 0)


def disagreement(study: Study, chosen: Predictor, count: int) -> tuple[Markdown, dict[str, object]]:
    """Where NF4 and FP32 choose different classes in notebook 2's logits, and pictures for `plots.picture_grid`.

    A sentence without pictures where there is no such record, or where it is not of the study's validation pictures as
    they are now: same pixels, names and labels.
    """
    settings, loaded = study.settings, chosen.engine.loaded
    other = settings.pictures or settings.checkpoints_of not in ("", study.name)
    if other or not (study.has("logits.npz") and study.has("environment.json")):
        return NOT_COMPARED, _looks()
    with np.load(study.record("logits.npz")) as stored:
        ran = {variants.VARIANTS[name].weights: name for name in reversed(stored.files) if name in variants.VARIANTS}
        if not {"fp32", "nf4"} <= ran.keys():
            return Markdown("NF4 and FP32 are not compared: notebook 2 did not run both."), _looks()
        truth, logits = stored["labels"], torch.from_numpy(np.stack([stored[ran["fp32"]], stored[ran["nf4"]]]))
    found = sources.load(settings).splits["valid"]
    decoded = decode.decode(found, loaded.preprocess, workers=settings.workers, what="valid")
    valid, known = decoded.pictures, study.read_json("environment")["checksums"].get("data")
    if decode.checksum(decoded) != known or not np.array_equal(loaded.labels.ids(valid), truth):
        said = "The validation pictures as read here are not those that notebook 2 classified, so none is shown."
        return Markdown(f"**{said}** Run notebook 2 again."), _looks()
    best, ids = (values.numpy() for values in logits.softmax(dim=2).max(dim=2))
    right, names, shown = ids == truth, loaded.labels.names, []
    order = np.lexsort((-best.sum(axis=0), ~right.any(axis=0)))  # those that one of them gets right come first
    differ = order[(ids[0] != ids[1])[order]]
    if not len(differ):
        same = f"In notebook 2, NF4 and FP32 choose the same class for all {len(truth):,} validation pictures."
        return Markdown(same), _looks()
    for at in differ[:count]:
        fp32, nf4 = (f"{names[ids[k, at]]} {100 * best[k, at]:.0f}{NO_BREAK}%" for k in (0, 1))
        title = f"FP32: {fp32} · NF4: {nf4} · is {names[truth[at]]}"
        shown.append((valid[at], title, bool(right[1, at]) if right[:, at].any() else None))
    first, second = right[:, differ].sum(axis=1)
    neither = len(differ) - first - second
    return Markdown(
        f"In notebook 2, NF4 and FP32 choose different classes for **{len(differ)} of {len(truth):,}** validation "
        f"pictures: FP32 is right in {first}, NF4 in {second}{f', neither in {neither}' if neither else ''}."
    ), _looks(shown)


def headline(
    study: Study, frame: pd.DataFrame, chosen: Predictor, rate: float, said: Sequence[str] = (), note: str = ""
) -> Markdown:
    """What the record says, in a few sentences: with those of `mistakes` and `disagreement`, and the decoder's note."""
    read, labels = frame[frame["status"] == "ok"], chosen.engine.loaded.labels
    if read.empty:
        return Markdown(f"- No picture could be read. {_skipped(frame)}")
    known, who, place = _known(read, labels), chosen.variant.label, _where(read, study.settings.pictures)
    if known.empty:
        most = ", ".join(f"{text(name)} ({count})" for name, count in read["name_1"].value_counts().head(3).items())
        first = f"**{who}** classifies {len(read):,} pictures of {place}, most often as {most}."
    else:
        right, n = int(known["right"].sum()), len(known)
        low, high = stats.wilson(right, n)
        first = f"**{who}** classifies {right:,} of {n:,} pictures of {place} correctly: "
        first += f"Top-1 is **{100 * right / n:.1f} %**. The 95 % interval is {100 * low:.1f} … {100 * high:.1f} %."
        first += f" Top-5 is {100 * known['right_5'].mean():.1f} %." * (len(labels.names) > TOP)
        first += f" The class of {len(read) - n:,} more pictures is not known." * (n < len(read))
    speed = f"{_speed(study, chosen, rate)} {note} {_skipped(frame)}"
    told = [one for one in said if one not in (NOT_KNOWN, NOT_COMPARED)]
    drawn = predictor.drawn_only(chosen.engine.loaded) if study.settings.pictures else ""
    lines = [first, drawn, *told, speed.strip()]
    return Markdown("\n".join(f"- {line}" for line in lines if line))


def _where(read: pd.DataFrame, pictures: str) -> str:
    """The folder or the split of the study that was classified, as `find_pictures` chose it."""
    if pictures:
        return f'the folder "{text(files.resolve(pictures).name)}"'
    return f"the {'test' if read['file'].iloc[0].startswith('test') else 'validation'} split"


def _speed(study: Study, chosen: Predictor, rate: float) -> str:
    """Images per second, and those of the network alone where notebook 2 measured far more on such a device."""
    settings, cuda = study.settings, chosen.engine.loaded.device.type == "cuda"
    said = f"From file to class: {float(f'{rate:.2g}'):,g} images/s on the {'GPU' if cuda else 'CPU'}"
    own = settings.checkpoints_of in ("", study.name) and study.has("variants")
    rows = study.read("variants") if own else pd.DataFrame(columns=records.COLUMNS["variants"])
    rows = rows[(rows["variant"] == chosen.variant.name) & (rows["peak_vram_mb"].notna() == cuda)]
    for row in rows.iloc[(rows["batch"] - settings.eval_batch_size).abs().argsort()[:1]].itertuples():
        if row.throughput_img_s > LIMITED * rate:
            said += f"; the network alone does {row.throughput_img_s:,.0f} (notebook 2, batch size {row.batch:.0f}), "
            said += "so reading and decoding limit it"
    return f"{said}."


def _skipped(frame: pd.DataFrame) -> str:
    """How many files were skipped and why, naming the first three; '' without one."""
    rows = frame[frame["status"] == "skipped"]
    named = "; ".join(f"{text(row.file)} ({text(row.reason)})" for row in rows.head(3).itertuples())
    return f"{len(rows)} of {len(frame):,} files were skipped: {named}{' …' * (len(rows) > 3)}." if len(rows) else ""
