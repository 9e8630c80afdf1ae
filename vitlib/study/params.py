"""Parameter sets: the only place with each parameter's type, default, range and meaning. No torch.

A study is a YAML file under `params/` that holds only the differences from these defaults. Its loader accepts plain
values only. `python -m vitlib.study.params 2_evaluate` prints the parameters cell of a notebook; a test compares the
two.
"""

import ast
import json
import os
import re
import sys
from collections.abc import Container, Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic.fields import FieldInfo

from vitlib.study import files
from vitlib.study.variants import DEFAULTS, find, nearest

NOTEBOOKS = ("1_finetune", "2_evaluate", "3_ablation", "4_inference", "5_claims", "6_speed")
"""The notebooks of a study, in their order."""

MISSING = {
    "data_source": (
        "there is no data folder {!r} (looked from the project's root): put or link the pictures there as "
        "train/<class>/ and valid/<class>/, or set `data_source: synthetic`"
    ),
    "pictures": "there is no folder of pictures {!r} (relative to the project's root)",
    "base_model": (
        "base_model {!r} is neither pretrain, random, a folder nor a Hub id (owner/name); `python -m "
        "vitlib.pretrained` makes the folder outputs/pretrained/vit-s14"
    ),
}
RECIPES = ("head", "lora-frozen-head", "lora", "qlora", "full")
"""Ways to fine-tune that notebook 1 can compare; `training.recipes` has what they are."""

PATCHES = {"vit-micro": 8, **dict.fromkeys(("vit-mini", "vit-tiny", "vit-small", "vit-base", "vit-large"), 16)}
"""Architectures of a base that is not loaded, with the side of a patch in pixels; `network.checkpoint` has the rest."""

VERDICT_ROUNDS = 8  # `measure.stats.MINIMUM_ROUNDS`; a test holds the two together


class ParameterError(ValueError):
    """A parameter set that cannot be used; the message names the key, the reason and the allowed values."""


def _field(default: Any, meaning: str, *notebooks: int, **limits: Any) -> Any:
    """A parameter of the notebooks with these numbers; without numbers, of 1 to 5, which read pictures."""
    return Field(default, description=meaning, json_schema_extra={"notebooks": notebooks or (1, 2, 3, 4, 5)}, **limits)


class Parameters(BaseModel):
    """Every parameter of the notebooks. Immutable; unknown keys and values of another type are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    study: str = _field("lab", "results go to outputs/<study>/", *range(1, 7))
    data_source: str = _field(
        "synthetic", "synthetic, a folder with train/ and valid/, hub:<data set>, or torchvision:<folder>"
    )
    base_model: str = _field("pretrain", "pretrain (on other synthetic flowers), random, a folder, or a Hub id", 1)
    base_revision: str = _field("", "commit of a base from the Hub; required there", 1)
    epochs: int = _field(6, "epochs of fine-tuning", 1, ge=1, le=10000)
    method: Literal["lora", "qlora", "full", "head"] = _field("lora", "what is trained in addition to the head", 1)
    recipes: list[Literal[*RECIPES]] = _field([], f"compared with one another: any of {', '.join(RECIPES)}", 1)
    pictures: str = _field("", "folder of pictures, flat or in class folders; empty: the test split", 4)
    checkpoints_of: str = _field("", "study whose checkpoints are used; empty: this one", 4)
    variant: str = _field("auto", "name of a variant; auto is the best measured within the limits", 4)
    grid: int = _field(12, "pictures shown", 4, ge=1, le=100)

    device: Literal["auto", "cpu", "cuda"] = _field("auto", "auto is the GPU if there is one")
    seed: int = _field(0, "seed of initialisation, order and augmentation", ge=0, lt=2**32)
    limit: int = _field(0, "pictures used of each split, spread over the classes; 0: all", ge=0)
    valid_limit: int = _field(0, "the same for the splits that are not trained on; 0: as limit", ge=0)
    pictures_per_class: int = _field(60, "training pictures per class (synthetic data only)", ge=4, le=5000)
    max_megapixels: float = _field(50.0, "larger pictures are skipped and reported", gt=0)
    follow_links: bool = _field(False, "read pictures that a link leads to outside the folder")
    workers: int = _field(2, "threads that decode pictures", ge=1, le=64)

    architecture: Literal[*PATCHES] = _field("vit-micro", "if no base is loaded", 1)
    image_size: int = _field(
        48, "side in pixels of synthetic pictures and of a base that is not loaded", ge=16, le=1024
    )
    pretrain_epochs: int = _field(7, "epochs of pretraining if base_model is pretrain", 1, ge=1, le=1000)
    lora_rank: int = _field(8, "rank r of the adapters", 1, ge=1, le=1024)
    lora_alpha: int = _field(32, "adapters are scaled by lora_alpha / lora_rank", 1, ge=1)
    lora_dropout: float = _field(0.1, "dropout on the inputs of the adapters", 1, ge=0, lt=1)
    train_batch_size: int = _field(32, "batch size in training", 1, ge=1)
    learning_rate: float = _field(3e-3, "peak of the schedule", 1, gt=0, le=1)
    weight_decay: float = _field(0.01, "of AdamW, on weight matrices only", 1, ge=0, lt=1)
    warmup: float = _field(0.1, "fraction of the steps in which the learning rate rises", 1, ge=0, lt=1)
    label_smoothing: float = _field(0.0, "fraction of the target that is spread over all classes", 1, ge=0, lt=1)
    crop_area: float = _field(0.6, "smallest fraction of a picture's area in a training crop", 1, gt=0, le=1)
    precision: Literal["auto", "fp32", "fp16", "bf16"] = _field(
        "auto", "training arithmetic; auto is FP16 or BF16 on a GPU", 1
    )
    compile_training: Literal["auto", "always", "never"] = _field(
        "auto", "compile the blocks; auto does so in long runs on a GPU", 1
    )
    calibration_pictures: int = _field(
        128, "training pictures, without labels, that low precision is fitted to", 1, 3, ge=8, le=4096
    )
    resume: bool = _field(True, "continue where the same training was killed; false starts again", 1)

    variants: list[str] = _field(
        [row.name for row in DEFAULTS], "rows of the table of variants; the first is the baseline", 2, min_length=1
    )
    batch_sizes: list[int] = _field([1, 8, 32], "batch sizes for latency and throughput", 2, min_length=1)
    rounds: int = _field(
        20, "all variants are measured once per round, in shuffled order; verdicts on speed need 8", 2, ge=2, le=1000
    )
    samples: int = _field(24, "most calls per round and batch size", 2, ge=1, le=10000)
    round_seconds: float = _field(0.05, "most seconds per round and batch size", 2, gt=0, le=600)
    cpu_samples: int = _field(10, "calls at batch size 1 on the CPU, of variants that run there", 2, ge=0, le=1000)
    profile_batch_size: int = _field(8, "batch size of the profiled call", 2, ge=1)
    eval_batch_size: int = _field(32, "batch size where only the outputs matter", 2, 3, 4, 5, ge=1)
    margin: float = _field(0.02, "fraction of pictures that a non-inferior variant may lose", 2, 4, gt=0, lt=1)
    memory_limit_mb: float = _field(0.0, "most memory of a call, weights included, in MB; 0: no limit", 4, ge=0)
    latency_limit_ms: float = _field(0.0, "highest latency of a call in ms; 0: no limit", 4, ge=0)

    repair_epochs: int = _field(0, "epochs of training after quantization, for each of three ways; 0: none", 3, ge=0)
    ablation_bits: list[Literal[4, 8]] = _field([4, 8], "4 is NF4, 8 is int8", 3, min_length=1)
    ablation_pictures: int = _field(0, "validation pictures used, spread over the classes; 0: all", 3, ge=0)
    plan_bits: float = _field(4.5, "bits a weight, at most, of the plan saved as checkpoint `mixed`", 3, ge=4.2, le=16)

    decoder: Literal["pil", "nvjpeg", "auto"] = _field(
        "pil", "auto is nvJPEG on the GPU where it works; its pixels differ slightly", 4
    )

    @field_validator("study", "checkpoints_of")
    def _names_a_study(cls, name: str, field: ValidationInfo) -> str:
        if name or field.field_name == "study":
            files.study_folder(name)
        return name

    @field_validator("variants")
    def _known_variants(cls, names: list[str]) -> list[str]:
        rows = [find(name) for name in names]
        if len(set(rows)) < len(rows):
            raise ValueError("a variant is named twice")
        if rows[0].quantized:
            raise ValueError(f"the first row is the baseline and must not be quantized, {names[0]!r} is")
        return names

    @field_validator("variant")
    def _known_variant(cls, name: str) -> str:
        return name if name == "auto" else find(name).name

    @field_validator("batch_sizes")
    def _rising(cls, sizes: list[int]) -> list[int]:
        if sizes != sorted(set(sizes)) or not 1 <= sizes[0] <= sizes[-1] <= 4096:
            raise ValueError("batch sizes are positive, rising and different, and at most 4,096")
        return sizes

    @field_validator("recipes", "ablation_bits")
    def _once(cls, values: list) -> list:
        if len(set(values)) < len(values):
            raise ValueError("a value is named twice")
        return values

    @model_validator(mode="after")
    def _pinned(self) -> "Parameters":
        patch = PATCHES[self.architecture]
        if self.base_model in ("pretrain", "random") and self.image_size % patch:
            raise ValueError(
                f"image_size {self.image_size} is no multiple of {patch}, the side of a patch of {self.architecture}"
            )
        if is_hub_id(self.base_model) and self.base_revision and not re.fullmatch("[0-9a-f]{7,40}", self.base_revision):
            raise ValueError(f"base_revision {self.base_revision!r} is no commit: write its 7 to 40 digits 0-9 and a-f")
        if is_hub_id(self.base_model) and not self.base_revision:
            raise ValueError(
                f"base_model {self.base_model!r} is no folder of the project, so it must be a repository of the Hub: "
                "correct the path, or set base_revision to a commit"
            )
        if self.base_model == "random" and self.method != "full":
            raise ValueError(
                f"base_model random with method {self.method} leaves random weights frozen: set `method: full`, or "
                "base_model to a pretrained network (a folder or a Hub id)"
            )
        return self


def is_hub_id(base: str) -> bool:
    """Whether `base` names a Hub repository (owner/name) rather than a folder or a keyword."""
    return base.count("/") == 1 and not base.startswith((".", "/", "~")) and not files.resolve(base).exists()


def missing(name: str, value: str) -> str:
    """What to say where the parameter `name` names a folder that does not exist; '' if it does, or names none."""
    no_folder = {
        "data_source": value == "synthetic" or value.startswith(("hub:", "torchvision:")),
        "pictures": not value,
        "base_model": value in ("pretrain", "random") or is_hub_id(value),
    }
    return "" if no_folder[name] or os.path.isdir(files.resolve(value)) else MISSING[name].format(value)


def remarks(settings: Parameters, declared: Container[str], given: Container[str] | None = None) -> list[str]:
    """What to say before a notebook that declares these parameters starts; ParameterError for what cannot work.

    `given` are the parameters that a set names; None where nobody knows, as in JupyterLab.
    """
    names = [name for name in MISSING if name in declared]
    if "pictures" in declared and settings.pictures:  # read instead of the data
        names = [name for name in names if name != "data_source"]
    faults, said = [missing(name, getattr(settings, name)) for name in names], []
    if "base_model" in declared and settings.base_model == "pretrain" and settings.data_source != "synthetic":
        drawn = "base_model pretrain is trained on drawn flowers only, and the pictures of this study are not drawn"
        advice = "set `base_model` to a pretrained network (a folder or a Hub id), or to random with `method: full`"
        if given is None or "base_model" in given:
            said.append(f"{drawn}: expect low accuracy; better {advice}")
        else:
            faults.append(f"{drawn}: {advice}; `base_model: pretrain` if that is what you want")
    if "rounds" in declared and settings.rounds < VERDICT_ROUNDS:
        advice = f"set `rounds` to {VERDICT_ROUNDS} or more for one"
        said.append(f"{settings.rounds} rounds give no verdict on speed: {advice}")
    if faults := [fault for fault in faults if fault]:
        raise ParameterError("\n".join(faults))
    return said


def load(path: str | Path) -> dict[str, Any]:
    """The values that a parameter file sets, checked; ParameterError names the file and the line of a fault."""
    path = Path(path)
    if path.exists() and not path.is_file():
        raise ParameterError(f"{path.name} is no regular file: a parameter set is a text file")
    if not path.is_file():
        known = sorted(file.stem for file in path.parent.glob("*.yaml"))
        raise ParameterError(f"there is no parameter set {path.name!r}; {nearest(path.stem, known)}")
    if path.stat().st_size > 1_000_000:
        raise ParameterError(f"{path.name} has more than 1,000,000 bytes: it is no parameter set")
    try:
        values = _plain_yaml(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError) as error:  # not YAML, not UTF-8, or a number without end
        raise ParameterError(f"{path.name}, {error}") from None
    check(values)
    return values


def given(pairs: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """The values of (name, value) pairs from a command line, read as in a parameter file. Not yet checked."""
    try:
        return _plain_yaml("\n".join(f"{name}: {value}" for name, value in pairs))
    except (yaml.YAMLError, ValueError) as error:
        raise ParameterError(f"-p NAME VALUE: {error}") from None


class _Loader(yaml.SafeLoader):
    """Values as in YAML 1.2 (10.3.2, core schema): 1e-3 is a number; yes, 1:30 and 2024-01-01 are text."""

    yaml_implicit_resolvers: ClassVar = {}


for _kind, _pattern in {
    "null": "~|null|Null|NULL|",
    "bool": "true|True|TRUE|false|False|FALSE",
    "int": "[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+",
    "float": r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
}.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(f"(?:{_pattern})$"), None)
_Loader.add_constructor(
    "tag:yaml.org,2002:int",
    lambda _, node: int(node.value, {"0o": 8, "0x": 16}.get(node.value[:2], 10)),
)


def _plain_yaml(text: str) -> dict[str, Any]:
    """The mapping in a YAML text: no tags, anchors or aliases, and each key is a name that occurs once."""
    depth = 0
    for event in yaml.parse(text):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > 9:  # the scanner takes the square of the depth in time
            raise _fault(event, "nested too deeply, write `name: value` lines")
        if getattr(event, "anchor", None) or getattr(event, "tag", None):
            raise _fault(event, "a tag, an anchor or an alias is not allowed, write a plain value")
    root, values, seen = yaml.compose(text, Loader=_Loader), yaml.load(text, Loader=_Loader), set()
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise _fault(root, "a parameter set holds `name: value` lines")
    for key, _ in root.value:
        if not isinstance(key, yaml.ScalarNode) or not key.value.isidentifier():
            raise _fault(key, "a key must be a parameter's name")
        if key.value in seen:
            raise _fault(key, f"{key.value!r} is set twice")
        seen.add(key.value)
    return values


def _fault(place: Any, reason: str) -> ParameterError:
    return ParameterError(f"line {place.start_mark.line + 1}: {reason}")


def check(values: Mapping[str, Any]) -> Parameters:
    """Parameters with `values` in place of the defaults; ParameterError lists every fault at once."""
    try:
        return Parameters(**values)
    except ValidationError as error:
        raise ParameterError("\n".join(_explain(fault) for fault in error.errors())) from None


def _explain(fault: Mapping[str, Any]) -> str:
    where = ".".join(str(part) for part in fault["loc"]) or "the set as a whole"
    if fault["type"] == "extra_forbidden":
        return f"unknown parameter {where!r}: {nearest(where, list(Parameters.model_fields), 0.7)}"
    reason = fault["msg"].removeprefix("Value error, ")
    got = "" if fault["type"] == "value_error" else f", it is {fault['input']!r}"
    return f"{where}: {reason}{got}" + " (write true or false)" * (fault["type"] == "bool_type")


def collect(namespace: Mapping[str, Any]) -> Parameters:
    """The parameters in a notebook's `namespace` (call it with `globals()`).

    papermill writes the values of `-f` or `-p` into a cell of their own and only warns of a name that no cell
    declares. Such a name is an error here, found in that cell's source (IPython keeps it in `In`). So is what `remarks`
    refuses.
    """
    known, given = Parameters.model_fields, None
    for source in namespace.get("In", ()):
        # The cell that papermill writes, and the notebook's own, to which a user of JupyterLab may have added a line.
        if source.startswith(("# Parameters\n", "study: str = ")):
            check(dict.fromkeys(name for name in assigned(source) if name not in known))
        if source.startswith("# Parameters\n"):
            given = assigned(source)
    settings = check({name: namespace[name] for name in known if name in namespace})
    remarks(settings, namespace, given)
    return settings


def assigned(source: str) -> dict[str, ast.expr | None]:
    """The names that the top level of `source` assigns, each with its last value; {} if it is no Python.

    papermill's own reading of a parameters cell loses a line whose comment holds an `=`.
    """
    try:
        nodes = ast.parse(source).body
    except (SyntaxError, ValueError):
        return {}
    found = {}
    for node in nodes:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        found |= {target.id: node.value for target in targets if isinstance(target, ast.Name)}
    return found


def used_by(settings: Parameters, notebook: str) -> dict[str, Any]:
    """The parameters that `notebook` declares, with their values, for the record of its run."""
    return {name: getattr(settings, name) for name in _declared(notebook)}


def cell(notebook: str) -> str:
    """The source of `notebook`'s parameters cell: one annotated literal a line, with its meaning."""
    lines = []
    for name, field in _declared(notebook).items():
        kind, meaning = field.annotation, field.description
        if get_origin(kind) is Literal:
            meaning = f"{', '.join(get_args(kind))}; {meaning}"
        written = json.dumps(field.default) if isinstance(field.default, str | list) else repr(field.default)
        lines.append(f"{name}: {_type_name(kind)} = {written}  # {meaning}")
    return "\n".join(lines)


def _type_name(kind: Any) -> str:
    """A type as an annotation; a choice of values as their type."""
    if get_origin(kind) is Literal:
        return type(get_args(kind)[0]).__name__
    return f"list[{_type_name(get_args(kind)[0])}]" if get_origin(kind) is list else kind.__name__


def _declared(notebook: str) -> dict[str, FieldInfo]:
    number, fields = int(notebook[0]), Parameters.model_fields.items()
    return {name: field for name, field in fields if number in field.json_schema_extra["notebooks"]}


if __name__ == "__main__":
    print(cell(sys.argv[1]))
