"""Parameter sets: the only place with each parameter's type, default, range and meaning. No torch.

A study is a YAML file under `params/` that holds only the differences from these defaults. Its loader accepts plain
values only. The parameters cell of each notebook is printed from this module (`python -m vitlib.params 2_evaluate`);
a test compares the two.
"""

import ast
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic.fields import FieldInfo

from vitlib import files
from vitlib import variants as variant_table
from vitlib.variants import nearest

NOTEBOOKS = ("1_finetune", "2_evaluate", "3_ablation", "4_inference", "5_claims", "6_speed")
"""The notebooks of a study, in their order."""

_MOST_BYTES = 1_000_000  # of a parameter file


class ParameterError(ValueError):
    """A parameter set that cannot be used; the message names the key, the reason and the allowed values."""


def _parameter(default: Any, meaning: str, *notebooks: int, **limits: Any) -> Any:
    """A field of the notebooks with these numbers; without numbers, of 1 to 5, which read pictures."""
    used_by = [name for name in NOTEBOOKS if int(name[0]) in (notebooks or range(1, 6))]
    return Field(default, description=meaning, json_schema_extra={"notebooks": used_by}, **limits)


class Parameters(BaseModel):
    """Every parameter of the notebooks. Immutable; unknown keys and values of another type are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    study: str = _parameter("demo", "results go to outputs/<study>/", *range(1, 7))
    data_source: str = _parameter(
        "synthetic", "synthetic, a folder with train/ and valid/, hub:<data set>, or torchvision:<folder>"
    )
    device: Literal["auto", "cpu", "cuda"] = _parameter("auto", "auto is the GPU if there is one")
    seed: int = _parameter(0, "seed of initialisation, order and augmentation", ge=0, lt=2**32)
    limit: int = _parameter(0, "pictures used of each split, spread over the classes; 0: all", ge=0)
    pictures_per_class: int = _parameter(60, "training pictures per class (synthetic data only)", ge=4, le=5000)
    max_megapixels: float = _parameter(50.0, "larger pictures are skipped and reported", gt=0)
    workers: int = _parameter(2, "threads that decode pictures", ge=1, le=64)

    base_model: str = _parameter("pretrain", "pretrain (on other synthetic flowers), random, a folder, or a Hub id", 1)
    base_revision: str = _parameter("", "commit of a base from the Hub; required there", 1)
    architecture: str = _parameter("vit-micro", "architecture of a base that is not loaded", 1)
    image_size: int = _parameter(
        48, "side in pixels of synthetic pictures and of a base that is not loaded", ge=16, le=1024
    )
    pretrain_epochs: int = _parameter(10, "epochs of pretraining if base_model is pretrain", 1, ge=1, le=1000)
    method: Literal["lora", "qlora", "full", "head"] = _parameter("lora", "what is trained in addition to the head", 1)
    lora_rank: int = _parameter(8, "rank r of the adapters", 1, ge=1, le=1024)
    lora_alpha: int = _parameter(32, "adapters are scaled by lora_alpha / lora_rank", 1, ge=1)
    lora_dropout: float = _parameter(0.1, "dropout on the inputs of the adapters", 1, ge=0, lt=1)
    epochs: int = _parameter(6, "epochs of fine-tuning", 1, ge=1, le=10000)
    train_batch_size: int = _parameter(32, "batch size in training", 1, ge=1)
    learning_rate: float = _parameter(3e-3, "peak of the schedule", 1, gt=0, le=1)
    weight_decay: float = _parameter(0.01, "of AdamW, on weight matrices only", 1, ge=0, lt=1)
    warmup: float = _parameter(0.1, "fraction of the steps in which the learning rate rises", 1, ge=0, lt=1)
    label_smoothing: float = _parameter(0.0, "fraction of the target that is spread over all classes", 1, ge=0, lt=1)
    crop_area: float = _parameter(0.6, "smallest fraction of a picture's area in a training crop", 1, gt=0, le=1)
    precision: Literal["auto", "fp32", "fp16", "bf16"] = _parameter(
        "auto", "training arithmetic; auto is FP16 or BF16 on a GPU", 1
    )
    compile_training: Literal["auto", "always", "never"] = _parameter(
        "auto", "compile the blocks; auto does so in long runs on a GPU", 1
    )
    resume: bool = _parameter(False, "continue from the last complete training checkpoint", 1)

    variants: list[str] = _parameter(
        [variant.name for variant in variant_table.DEFAULTS],
        "rows of the table of variants; the first is the baseline",
        2,
        min_length=1,
    )
    batch_sizes: list[int] = _parameter([1, 8, 32], "batch sizes for latency and throughput", 2, min_length=1)
    rounds: int = _parameter(
        20, "all variants are measured once per round, in shuffled order; verdicts on speed need 8", 2, ge=2, le=1000
    )
    samples: int = _parameter(24, "most calls per round and batch size", 2, ge=1, le=10000)
    round_seconds: float = _parameter(0.05, "most seconds per round and batch size", 2, gt=0, le=600)
    cpu_samples: int = _parameter(10, "calls at batch size 1 on the CPU, of variants that run there", 2, ge=0, le=1000)
    profile_batch_size: int = _parameter(8, "batch size of the profiled call", 2, ge=1)
    eval_batch_size: int = _parameter(32, "batch size where only the outputs matter", 2, 3, 4, 5, ge=1)
    margin: float = _parameter(0.02, "fraction of pictures that a non-inferior variant may lose", 2, gt=0, lt=1)

    ablation_bits: list[int] = _parameter([4, 8], "4 is NF4, 8 is int8", 3, min_length=1)
    ablation_pictures: int = _parameter(0, "validation pictures used, spread over the classes; 0: all", 3, ge=0)

    pictures: str = _parameter("", "folder of pictures, flat or in class folders; empty: the test split", 4)
    variant: str = _parameter("auto", "name of a variant; auto is the fastest that this study measured", 4)
    checkpoints_of: str = _parameter(
        "", "study whose checkpoints are used; empty: this one", 4, pattern=r"^([A-Za-z0-9][A-Za-z0-9._-]*)?$"
    )
    decoder: Literal["pil", "nvjpeg", "auto"] = _parameter(
        "pil", "auto is nvJPEG on the GPU where it works; its pixels differ slightly", 4
    )
    grid: int = _parameter(12, "pictures shown", 4, ge=1, le=100)

    @field_validator("study")
    @classmethod
    def _plain_name(cls, name: str) -> str:
        files.study_folder(name)
        return name

    @field_validator("variants")
    @classmethod
    def _known_variants(cls, names: list[str]) -> list[str]:
        rows = [variant_table.find(name) for name in names]
        if len(set(rows)) < len(rows):
            raise ValueError("a variant is named twice")
        if rows[0].quantized:
            raise ValueError(f"the first row is the baseline and must not be quantized, {names[0]!r} is")
        return names

    @field_validator("variant")
    @classmethod
    def _known_variant(cls, name: str) -> str:
        return name if name == "auto" else variant_table.find(name).name

    @field_validator("batch_sizes")
    @classmethod
    def _rising(cls, sizes: list[int]) -> list[int]:
        if sizes != sorted(set(sizes)) or sizes[0] < 1:
            raise ValueError("batch sizes are positive, rising and different")
        return sizes

    @field_validator("ablation_bits")
    @classmethod
    def _bits(cls, bits: list[int]) -> list[int]:
        if not set(bits) <= {4, 8} or len(set(bits)) < len(bits):
            raise ValueError("allowed are 4 and 8, each once")
        return bits

    @model_validator(mode="after")
    def _pinned(self) -> "Parameters":
        if is_hub_id(self.base_model) and not self.base_revision:
            raise ValueError(
                f"base_model {self.base_model!r} is no folder of the project, so it must be a repository of the Hub: "
                "correct the path, or set base_revision to a commit"
            )
        return self


def used_by(settings: Parameters, notebook: str) -> dict[str, Any]:
    """The parameters that `notebook` declares, with their values, for the record of its run."""
    fields = Parameters.model_fields.items()
    return {name: getattr(settings, name) for name, field in fields if notebook in _notebooks(field)}


def _notebooks(field: FieldInfo) -> list[str]:
    return field.json_schema_extra["notebooks"]


def is_hub_id(base: str) -> bool:
    """Whether `base` names a Hub repository (owner/name) rather than a folder or a keyword."""
    return base.count("/") == 1 and not base.startswith((".", "/", "~")) and not files.resolve(base).exists()


class _PlainLoader(yaml.SafeLoader):
    """YAML of plain values (mappings, sequences, text, numbers, booleans, null): no tags, no aliases."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        """The next node, refused if it is an alias or carries a tag."""
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            raise _fault(event, "an alias (*) is not allowed, write the value out")
        if getattr(event, "tag", None) is not None:
            raise _fault(event, f"the tag {event.tag!r} is not allowed, write a plain value")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict:
        """A mapping whose keys are plain names, each once."""
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or not key.value.isidentifier():
                raise _fault(key, "a key must be a parameter's name")
            if key.value in seen:
                raise _fault(key, f"{key.value!r} is set twice")
            seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


def _fault(place: Any, reason: str) -> ParameterError:
    return ParameterError(f"line {place.start_mark.line + 1}: {reason}")


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The plain mapping in a YAML file. ParameterError if it holds anything else, with the line."""
    path = Path(path)
    if not path.is_file():
        known = sorted(file.stem for file in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        raise ParameterError(f"there is no parameter set {path.name!r}; {nearest(path.stem, known)}")
    if path.stat().st_size > _MOST_BYTES:
        raise ParameterError(f"{path.name} has more than {_MOST_BYTES:,} bytes: it is no parameter set")
    try:
        loaded = yaml.load(path.read_text(encoding="utf-8"), Loader=_PlainLoader)  # a stricter SafeLoader
    except RecursionError:
        raise ParameterError(f"{path.name} is nested too deeply: write `name: value` lines") from None
    except (yaml.YAMLError, ValueError) as error:  # not YAML, not UTF-8, or no date or number: 2024-99-99, 0x_
        raise ParameterError(f"{path.name}, {error}") from None
    if loaded is not None and not isinstance(loaded, dict):
        raise ParameterError(f"{path.name} must hold `name: value` lines, it holds a {type(loaded).__name__}")
    return loaded or {}


def check(values: Mapping[str, Any]) -> Parameters:
    """Parameters with `values` in place of the defaults; ParameterError lists every fault at once."""
    try:
        return Parameters(**values)
    except ValidationError as error:
        raise ParameterError("\n".join(_explain(fault) for fault in error.errors())) from None


def load(path: str | Path) -> dict[str, Any]:
    """The explicit values of a parameter file, checked: what papermill may be given."""
    values = read_yaml(path)
    check(values)
    return values


def _explain(fault: Mapping[str, Any]) -> str:
    where = ".".join(str(part) for part in fault["loc"]) or "the set as a whole"
    if fault["type"] == "extra_forbidden":
        return f"unknown parameter {where!r}: {nearest(where, list(Parameters.model_fields))}"
    reason = fault["msg"].removeprefix("Value error, ")
    got = "" if fault["type"] == "value_error" else f", it is {fault['input']!r}"
    hint = ""
    if fault["type"] == "float_type" and isinstance(fault["input"], str):
        hint = " (YAML reads 1e-3 as text: write 1.0e-3)"
    return f"{where}: {reason}{got}{hint}"


def collect(namespace: Mapping[str, Any]) -> Parameters:
    """The parameters in a notebook's `namespace` (call it with `globals()`).

    papermill writes the values of `-f` or `-p` into a cell of their own and only warns of a name that no cell
    declares. Such a name is an error here, found in that cell's source (IPython keeps it in `In`).
    """
    known = Parameters.model_fields
    for source in namespace.get("In", ()):
        # The cell that papermill writes, and the notebook's own, to which a user of JupyterLab may have added a line.
        if source.startswith(("# Parameters\n", "study: str = ")):
            unknown = [name for name in assigned(source) if name not in known]
            if unknown:
                check(dict.fromkeys(unknown))
    return check({name: namespace[name] for name in known if name in namespace})


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


def cell(notebook: str) -> str:
    """The source of `notebook`'s parameters cell: one annotated literal a line, with its meaning."""
    lines = []
    for name, field in Parameters.model_fields.items():
        if notebook in _notebooks(field):
            kind, meaning = field.annotation, field.description
            if get_origin(kind) is Literal:
                meaning = f"{', '.join(get_args(kind))}; {meaning}"
                kind = str
            kind_name = str(kind) if get_origin(kind) else kind.__name__
            literal = json.dumps(field.default) if isinstance(field.default, (str, list)) else repr(field.default)
            lines.append(f"{name}: {kind_name} = {literal}  # {meaning}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(cell(sys.argv[1]))
