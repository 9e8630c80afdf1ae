"""A base to fine-tune where no pretrained weights are available: a stand-in for those of a large network.

It is a ViT trained fast from random initialisation on the study's own training split, in two stages: a long
one on small pictures, where a step is cheap, and a short one at full size. Each has a budget in seconds that its
learning rate follows, so a slower card ends on time with fewer epochs. Every picture stays decoded on the device.

    python tools/standin.py --data data/flowers102 --out outputs/flowers102/standin --workers 16
"""

import math
import sys
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn
from transformers import HfArgumentParser, set_seed

from vitlib.measure import stats
from vitlib.network import checkpoint
from vitlib.pictures import preprocess, sources
from vitlib.pictures.preprocess import Preprocess
from vitlib.pictures.sources import Dataset, Labels
from vitlib.study import provenance, records
from vitlib.study.variants import nearest
from vitlib.training import trainer
from vitlib.training.trainer import Examples

ORIGIN = (
    "trained from random initialisation on the training split of the same data: a stand-in for pretrained weights, "
    "which saw no other picture"
)
WARMUP_SHARE = 0.15  # of a stage at most: on a slow card `warmup_steps` must not use up the budget
POSITIONS = "vit.embeddings.position_embeddings"
BETAS, WEIGHT_DECAY, CLIP, LABEL_SMOOTHING = (0.9, 0.99), 0.1, 1.0, 0.1  # AdamW, largest gradient norm, cross entropy
MIX_ALPHA = 0.8  # mixup and cutmix draw their share from Beta(alpha, alpha)
CROPS, JITTER = {"crop_area": 0.25, "rotation": 20.0}, 0.3
GREY = (0.299, 0.587, 0.114)  # ITU-R BT.601, as PIL's convert("L")


class StandInError(ValueError):
    """Settings or a training that cannot be used; the message says what is wrong."""


@dataclass(frozen=True)
class Stage:
    """One stage: pictures of side × side pixels, for `seconds` or, where it is not 0, for `steps`."""

    number: int
    side: int
    batch_size: int
    learning_rate: float  # peak
    warmup_steps: int
    mixing: bool
    seconds: float
    steps: int


@dataclass(frozen=True)
class StandIn:
    """How to train; every field is a flag of the command line. The defaults are a ViT-L/16 in 400 s on one H200."""

    architecture: str = "vit-large"
    seed: int = 0
    workers: int = 2
    decode_side: int = 176
    drop_path: float = 0.2
    stage1_side: int = 112
    stage1_seconds: float = 288.0
    stage1_steps: int = 0
    stage1_batch_size: int = 512
    stage2_side: int = 224
    stage2_seconds: float = 112.0
    stage2_steps: int = 0
    stage2_batch_size: int = 192
    log_seconds: float = 20.0

    def __post_init__(self) -> None:
        if self.architecture not in checkpoint.ARCHITECTURES:
            raise StandInError(f"architecture: {nearest(self.architecture, list(checkpoint.ARCHITECTURES))}")
        patch = checkpoint.ARCHITECTURES[self.architecture][-1]
        for stage in self.stages():
            if stage.side < patch or stage.side % patch:
                raise StandInError(f"stage{stage.number}_side: {stage.side} is not a multiple of the patch of {patch}")
            if min(stage.batch_size, stage.steps or stage.seconds) <= 0:
                raise StandInError(f"stage{stage.number}: batch size and seconds must be positive")

    def stages(self) -> tuple[Stage, Stage]:
        """Both stages; only the first mixes pictures."""
        one = (self.stage1_side, self.stage1_batch_size, 6e-4, 300, True, self.stage1_seconds, self.stage1_steps)
        two = (self.stage2_side, self.stage2_batch_size, 1.5e-4, 50, False, self.stage2_seconds, self.stage2_steps)
        return Stage(1, *one), Stage(2, *two)


class DropPath(nn.Module):
    """Stochastic depth (Huang et al. 2016): in training a picture's branch is left out with probability `rate`."""

    def __init__(self, rate: float, device: torch.device) -> None:
        super().__init__()
        # A tensor: blocks with different rates share one compilation.
        self.register_buffer("rate", torch.tensor(rate, device=device), persistent=False)

    def forward(self, branch: torch.Tensor) -> torch.Tensor:
        """(n, tokens, hidden) to the same; the expected value of the output is the input."""
        if not self.training:
            return branch
        kept = torch.rand(branch.shape[0], 1, 1, device=branch.device) >= self.rate
        return branch * (kept / (1 - self.rate))


def drop_paths(model: nn.Module, last: float) -> None:
    """Give each block of a transformers ViT stochastic depth, with a rate that rises linearly from 0 to `last`."""
    layers = model.vit.layers
    for layer, rate in zip(layers, torch.linspace(0, last, len(layers)).tolist(), strict=True):
        layer.dropout = DropPath(rate, model.device)  # applied to both branches of the block, and only there


def at_side(model: nn.Module, settings: StandIn, side: int, labels: Labels) -> nn.Module:
    """`model` for pictures of `side` pixels: positions interpolated (Dosovitskiy et al. 2021, 3.2), the rest shared."""
    with torch.device("meta"):  # no second initialisation: every tensor comes from `model`
        resized = checkpoint.new(settings.architecture, image_size=side, labels=labels)
    state, embeddings = model.state_dict(), model.vit.embeddings
    tokens = state[POSITIONS].new_empty(1, 1 + (side // model.config.patch_size) ** 2, model.config.hidden_size)
    with torch.no_grad():
        state[POSITIONS] = embeddings.interpolate_pos_encoding(tokens, side, side).contiguous()
    resized.load_state_dict(state, strict=True, assign=True)
    return resized


def mix(images: torch.Tensor, alpha: float, rng: np.random.Generator) -> tuple[torch.Tensor, float]:
    """Each picture (n, 3, h, w) mixed with its mirror position in the batch, and the share of its own that is left.

    Half the time blended (mixup, Zhang et al. 2018), else with a rectangle pasted in (cutmix, Yun et al. 2019). One
    share from Beta(alpha, alpha) a batch; drawn on the host, it reaches the device as an argument, without a wait.
    """
    share = float(rng.beta(alpha, alpha))
    if rng.random() < 0.5:
        return images * share + images.flip(0) * (1 - share), share
    height, width = images.shape[2:]
    half_h, half_w = (round(length * math.sqrt(1 - share) / 2) for length in (height, width))
    y, x = int(rng.integers(height)), int(rng.integers(width))
    top, bottom, left, right = max(y - half_h, 0), min(y + half_h, height), max(x - half_w, 0), min(x + half_w, width)
    mixed = images.clone()
    mixed[:, :, top:bottom, left:right] = images.flip(0)[:, :, top:bottom, left:right]
    return mixed, 1 - (bottom - top) * (right - left) / (height * width)  # of what was pasted: the border cuts it


def batches(count: int, size: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Rows (size,) without end, each picture once a pass; a batch may span two passes, so all have one size."""
    rows = torch.empty(0, dtype=torch.int64, device=generator.device)
    while True:
        while len(rows) < size:
            rows = torch.cat((rows, torch.randperm(count, device=generator.device, generator=generator)))
        yield rows[:size]
        rows = rows[size:]


def learning_rate(stage: Stage, step: int, progress: float) -> float:
    """The rate of step `step` (from 0) when `progress` (0…1) of the stage is over: linear warm-up times a cosine."""
    rise = min(1.0, max((step + 1) / stage.warmup_steps, progress / WARMUP_SHARE))
    return stage.learning_rate * rise * (1 + math.cos(math.pi * min(progress, 1.0))) / 2


def optimizer(model: nn.Module) -> torch.optim.AdamW:
    """AdamW, with decay on matrices (the patch embedding's kernel is one), not on tokens, positions, norms, biases."""
    groups = [{"params": [], "weight_decay": decay} for decay in (WEIGHT_DECAY, 0.0)]
    for parameter in model.parameters():
        groups[parameter.ndim not in (2, 4)]["params"].append(parameter)
    return torch.optim.AdamW(groups, lr=0.0, betas=BETAS, fused=model.device.type == "cuda" or None)


@dataclass
class _Run:
    """What both stages share, so that random streams continue; examples and generator are on the device."""

    settings: StandIn
    train: Examples
    pre: Preprocess
    generator: torch.Generator
    rng: np.random.Generator


def jittered(views: torch.Tensor, most: float, generator: torch.Generator) -> torch.Tensor:
    """Pictures (n, 3, h, w) of 0…255 whose brightness, saturation and contrast change by a factor of 1 ± `most`."""
    factors = (torch.empty(len(views), device=generator.device) for _ in range(3))
    drawn = (each.uniform_(1 - most, 1 + most, generator=generator).view(-1, 1, 1, 1) for each in factors)
    light, colour, contrast = (each.to(views.device) for each in drawn)
    views = views * light
    grey = GREY[0] * views[:, :1] + GREY[1] * views[:, 1:2] + GREY[2] * views[:, 2:]
    mean = grey.mean(dim=(2, 3), keepdim=True)
    views = grey + (views - grey) * colour
    return (mean + (views - mean) * contrast).clamp_(0, 255)


def _loss(run: _Run, model: nn.Module, stage: Stage, rows: torch.Tensor) -> torch.Tensor:
    """Cross entropy of one augmented batch; nothing in it waits for the device."""
    labels = run.train.labels[rows]
    views = preprocess.augment(run.train.pixels[rows], side=stage.side, generator=run.generator, **CROPS)
    views = jittered(views, JITTER, run.generator)
    views, share = mix(views, MIX_ALPHA, run.rng) if stage.mixing else (views, 1.0)
    with torch.autocast(rows.device.type, torch.bfloat16, enabled=rows.is_cuda):  # weights and norms stay in fp32
        logits = model(pixel_values=run.pre.normalise(views)).logits.float()
    loss = nn.CrossEntropyLoss(label_smoothing=LABEL_SMOOTHING)
    own = loss(logits, labels)
    return share * own + (1 - share) * loss(logits, labels.flip(0)) if stage.mixing else own


def _train_stage(run: _Run, model: nn.Module, stage: Stage) -> list[dict[str, float]]:
    """Train `model` in place to the end of the stage's budget; rows of the history, one about every `log_seconds`."""
    parameters, update, log = list(model.parameters()), optimizer(model), []
    rows = batches(len(run.train.labels), stage.batch_size, run.generator)
    if run.train.labels.is_cuda:  # compile and fill the allocator before the clock starts; weights stay as they are
        first = torch.arange(stage.batch_size, device=run.train.labels.device) % len(run.train.labels)
        for _ in range(2):
            _loss(run, model, stage, first).backward()
            model.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
    total, logged, step, progress, queued = 0.0, (0, 0.0), 0, 0.0, deque()
    start = time.perf_counter()
    while progress < 1:
        rate = learning_rate(stage, step, progress)
        for group in update.param_groups:
            group["lr"] = rate
        loss = _loss(run, model, stage, next(rows))
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, CLIP)
        update.step()
        update.zero_grad(set_to_none=True)
        total, step = total + loss.detach(), step + 1
        if loss.is_cuda:  # the host stays at most two steps ahead: else the clock would time the launches
            queued.append(torch.cuda.current_stream(loss.device).record_event())
            if len(queued) > 2:
                queued.popleft().synchronize()
        seconds = time.perf_counter() - start
        progress = step / stage.steps if stage.steps else seconds / stage.seconds
        if progress >= 1 or seconds - logged[1] >= run.settings.log_seconds:
            mean_loss = total.item() / (step - logged[0])  # the only wait for the device
            seconds, epoch = time.perf_counter() - start, step * stage.batch_size / len(run.train.labels)
            speed = (step - logged[0]) * stage.batch_size / (seconds - logged[1])
            row = {"stage": stage.number, "side": stage.side, "step": step, "epoch": epoch, "seconds": seconds}
            log.append(row | {"images_per_s": speed, "loss": mean_loss, "learning_rate": rate})
            print(", ".join(f"{key} {value:,.6g}" for key, value in log[-1].items()), flush=True)
            if not math.isfinite(mean_loss):
                raise StandInError(f"the loss of stage {stage.number} is {mean_loss} at step {step}")
            total, logged = 0.0, (step, seconds)
    return log


@torch.inference_mode()
def evaluate(model: nn.Module, examples: Examples, pre: Preprocess, batch_size: int = 256) -> dict[str, float]:
    """top1 and top5 (shares, 0…1) of `examples` on the model's device, in the arithmetic of training; not compiled."""
    with torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type == "cuda"):
        chunks = (pre.normalise(pixels.to(model.device)) for pixels in examples.pixels.split(batch_size))
        logits = torch.cat([model.eval()(pixel_values=chunk).logits.float().cpu() for chunk in chunks])
    return {f"top{k}": stats.topk_accuracy(logits, examples.labels, k) for k in (1, 5)}


def train(settings: StandIn, dataset: Dataset, folder: Path, device: torch.device) -> pd.DataFrame:
    """Train both stages, write `folder`/stage1, /stage2 and /history.csv, and return the history.

    Both checkpoints are complete, in float32, for pictures of `stage2_side`. A row is about `log_seconds` of training;
    the last of each stage has top1 and top5 of the validation split at its side. Raises DataError, StandInError.
    """
    sources.check(dataset)
    checkpoint.quiet_libraries()
    labels, (first, second) = sources.new_labels(dataset), settings.stages()

    def examples(split: str, side: int) -> Examples:
        decoded = sources.decode_splits(dataset, (split,), preprocess.new(side), settings.workers)
        return Examples.of(decoded[split], labels)

    on_device = examples("train", settings.decode_side).to(device)
    valid = {side: examples("valid", side) for side in {first.side, second.side}}
    set_seed(settings.seed)
    generator, rng = torch.Generator(device).manual_seed(settings.seed), np.random.default_rng(settings.seed)
    run = _Run(settings, on_device, preprocess.new(second.side), generator, rng)
    model = checkpoint.new(settings.architecture, image_size=first.side, labels=labels).to(device)
    history, accuracy = [], []
    for stage in (first, second):
        drop_paths(model, settings.drop_path)
        with trainer.compiled_blocks(model, "inductor" if device.type == "cuda" else None):
            history += _train_stage(run, model.train(), stage)
        for side in dict.fromkeys((stage.side, second.side)):
            if side != model.config.image_size:  # what a user of the checkpoint gets, before it is trained at this size
                model = at_side(model, settings, side, labels)
            found = evaluate(model, valid[side], preprocess.new(side))
            accuracy.append({"after stage": stage.number, "side": side, **found})
            if side == stage.side:
                history[-1] |= found
            print(", ".join(f"{key} {value:.4g}" for key, value in accuracy[-1].items()), flush=True)
        note = {"origin": ORIGIN, "pretrained": False, "training pictures": len(on_device.labels), "weights": "fp32"}
        note |= {"accuracy": list(accuracy), "top1": accuracy[-1]["top1"], "top5": accuracy[-1]["top5"]}
        note |= {"settings": asdict(settings), "versions": provenance.environment(parameters={})["versions"]}
        checkpoint.save(model, folder / f"stage{stage.number}", pre=run.pre, labels=labels, provenance=note)
    table = pd.DataFrame(history)
    records.write_table(table, folder / "history.csv")
    return table


def main(arguments: list[str] | None = None) -> None:
    """Train from the command line; one line on standard error and code 1 where that is impossible."""
    about = __doc__.split("\n\n")[0]
    parser = HfArgumentParser(StandIn, prog="tools/standin.py", description=about)
    parser.add_argument("--data", required=True, help="folder with train/<class>/ and valid/<class>/")
    parser.add_argument("--out", required=True, type=Path, help="folder for stage1/, stage2/ and history.csv")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="auto takes the GPU")
    parser.add_argument("--max-megapixels", default=50.0, type=float, help="larger pictures are skipped")
    try:
        settings, given = parser.parse_args_into_dataclasses(arguments)
        dataset = sources.from_folder(sources.existing_folder(given.data), given.max_megapixels)
        history = train(settings, dataset, given.out, checkpoint.pick_device(given.device))
    except (sources.DataError, StandInError, checkpoint.NotRun, OSError) as error:
        sys.exit(f"standin: {error}")
    for file, split, reason in dataset.skipped:
        print(f"skipped in {split}: {file} ({reason})")
    ends = history.groupby("stage").tail(1).set_index("stage")
    print(ends.to_string(float_format=lambda value: f"{value:,.4g}"))


if __name__ == "__main__":
    main()
