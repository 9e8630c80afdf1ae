"""Train a ViT from random initialisation, fast: a stand-in for pretrained weights that cannot be had. Level 3.

Two stages on the training split of the study's own data: a long one on small pictures, where a step is cheap, and a
short one at full size. Each has a budget in seconds that its learning rate follows, so a slower card ends on time with
fewer epochs. Every picture is decoded once and lies on the device; augmentation, mixing and stochastic depth draw their
random numbers there.

    python -m vitlib.standin --data data/flowers102 --out outputs/flowers102/standin --workers 16
"""

import argparse
import math
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn
from transformers import set_seed

from vitlib import checkpoint, data, preprocess, provenance, records
from vitlib.data import Dataset, Labels
from vitlib.preprocess import Preprocess
from vitlib.training import Examples
from vitlib.variants import nearest

ORIGIN = (
    "trained from random initialisation on the training split of the same data: a stand-in for pretrained weights, "
    "which saw no other picture"
)
WARMUP_SHARE = 0.15  # of a stage: where a card is too slow for `warmup_steps`, warming up must not eat the budget
POSITIONS = "vit.embeddings.position_embeddings"
GREY = (0.299, 0.587, 0.114)  # ITU-R BT.601, as PIL's convert("L")


class StandInError(ValueError):
    """Settings or a training that cannot be used; the message says what is wrong."""


def _setting(default: object, meaning: str) -> object:
    return field(default=default, metadata={"meaning": meaning})


@dataclass(frozen=True)
class Stage:
    """One stage: pictures of side × side pixels, for `seconds` or, where it is not 0, for `steps`."""

    number: int
    side: int
    seconds: float
    steps: int
    batch_size: int
    learning_rate: float
    warmup_steps: int
    mixing: bool


@dataclass(frozen=True)
class StandIn:
    """How to train. The defaults are those of a ViT-L/16 in 400 s on one H200."""

    architecture: str = _setting("vit-large", "a row of checkpoint.ARCHITECTURES")
    seed: int = _setting(0, "of initialisation, order, augmentation and mixing")
    workers: int = _setting(2, "threads that decode pictures")
    decode_side: int = _setting(176, "side in pixels of the training pictures kept on the device")
    stage1_side: int = _setting(112, "side in pixels")
    stage1_seconds: float = _setting(288.0, "training time, without compilation and validation")
    stage1_steps: int = _setting(0, "if not 0, the stage ends after so many steps, whatever the time")
    stage1_batch_size: int = _setting(512, "pictures a step")
    stage1_learning_rate: float = _setting(6e-4, "peak of the schedule")
    stage1_warmup_steps: int = _setting(300, f"steps of warm-up, at most {WARMUP_SHARE} of the stage")
    stage2_side: int = _setting(224, "side in pixels, of both checkpoints")
    stage2_seconds: float = _setting(112.0, "training time, without compilation and validation")
    stage2_steps: int = _setting(0, "if not 0, the stage ends after so many steps, whatever the time")
    stage2_batch_size: int = _setting(192, "pictures a step")
    stage2_learning_rate: float = _setting(1.5e-4, "peak of the schedule")
    stage2_warmup_steps: int = _setting(50, f"steps of warm-up, at most {WARMUP_SHARE} of the stage")
    beta1: float = _setting(0.9, "of AdamW")
    beta2: float = _setting(0.99, "of AdamW")
    weight_decay: float = _setting(0.1, "AdamW, matrices only")
    clip: float = _setting(1.0, "largest norm of the gradient")
    label_smoothing: float = _setting(0.1, "share of the target spread over all classes")
    drop_path: float = _setting(0.2, "share of pictures that skip the last block's branches")
    mix_alpha: float = _setting(0.8, "mixup and cutmix draw their share from Beta(alpha, alpha), stage 1 only")
    crop_area: float = _setting(0.25, "smallest share of a picture that a crop keeps")
    rotation: float = _setting(20.0, "largest angle in degrees")
    jitter: float = _setting(0.3, "largest change of brightness, contrast and saturation")
    compile: bool = _setting(True, "torch.compile of the block, on a GPU")
    log_seconds: float = _setting(20.0, "between two rows of the history")

    def __post_init__(self) -> None:
        if self.architecture not in checkpoint.ARCHITECTURES:
            raise StandInError(f"architecture: {nearest(self.architecture, list(checkpoint.ARCHITECTURES))}")
        patch = checkpoint.ARCHITECTURES[self.architecture][-1]
        for stage in self.stages():
            name = f"stage{stage.number}"
            if stage.side < patch or stage.side % patch:
                raise StandInError(f"{name}_side: {stage.side} is not a multiple of the patch of {patch} pixels")
            if min(stage.batch_size, stage.warmup_steps) < 1 or stage.steps < 0 or stage.learning_rate <= 0:
                raise StandInError(f"{name}: batch size, warm-up steps and learning rate must be positive")
            if not stage.steps and not (0 < stage.seconds < math.inf):
                raise StandInError(f"{name}_seconds: must be positive, it is {stage.seconds}")
        if not (0 <= self.drop_path < 1 and 0 < self.crop_area <= 1 and 0 <= self.jitter < 1 and self.mix_alpha > 0):
            raise StandInError("drop_path and jitter lie in [0, 1), crop_area in (0, 1], mix_alpha is positive")
        if min(self.workers, self.decode_side) < 1:
            raise StandInError("workers and decode_side must be positive")

    def stages(self) -> tuple[Stage, Stage]:
        """Both stages; only the first mixes pictures."""
        names = [spec.name for spec in fields(Stage) if spec.name not in ("number", "mixing")]
        first, second = ({name: getattr(self, f"stage{number}_{name}") for name in names} for number in (1, 2))
        return Stage(1, **first, mixing=True), Stage(2, **second, mixing=False)


# ------------------------------------------------------------------------------------------ the network, functionally


def block(
    x: torch.Tensor, keep: torch.Tensor | None, weights: list[torch.Tensor], heads: int, eps: float, dtype: torch.dtype
) -> torch.Tensor:
    """One pre-norm transformer block: (n, tokens, hidden) in float32 to the same, matrix products in `dtype`.

    `weights` are those of `block_weights`; `keep` (2, n) scales the attention's and the MLP's branch of each picture
    (stochastic depth, Huang et al. 2016), None leaves them as they are. Everything that differs between blocks is a
    tensor, so one compilation serves them all; and no mask is passed, or SDPA could not take its fused kernels.
    """
    norm1, norm1_b, q, q_b, k, k_b, v, v_b, o, o_b, norm2, norm2_b, fc1, fc1_b, fc2, fc2_b = weights
    count, tokens, hidden = x.shape
    h = F.layer_norm(x, (hidden,), norm1, norm1_b, eps).to(dtype)
    qkv = F.linear(h, torch.cat((q, k, v)).to(dtype), torch.cat((q_b, k_b, v_b)).to(dtype))
    qkv = qkv.view(count, tokens, 3, heads, hidden // heads).permute(2, 0, 3, 1, 4)
    h = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2])
    h = F.linear(h.transpose(1, 2).reshape(count, tokens, hidden), o.to(dtype), o_b.to(dtype))
    x = x + (h if keep is None else h * keep[0, :, None, None])
    h = F.layer_norm(x, (hidden,), norm2, norm2_b, eps).to(dtype)
    h = F.linear(F.gelu(F.linear(h, fc1.to(dtype), fc1_b.to(dtype))), fc2.to(dtype), fc2_b.to(dtype))
    return x + (h if keep is None else h * keep[1, :, None, None])


def block_weights(layer: nn.Module) -> list[torch.Tensor]:
    """The 16 parameters of a transformers ViT layer, in the order in which `block` unpacks them."""
    attention, mlp = layer.attention, layer.mlp
    parts = [layer.layernorm_before, attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
    parts += [layer.layernorm_after, mlp.fc1, mlp.fc2]
    return [tensor for part in parts for tensor in (part.weight, part.bias)]


def embed(model: nn.Module, pixel_values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Tokens (n, 1 + patches, hidden) in float32: the class token and the patches, with their positions."""
    part = model.vit.embeddings
    projection, (count, channels, height, width) = part.patch_embeddings.projection, pixel_values.shape
    p = projection.weight.shape[-1]
    # A convolution whose stride is its kernel is a matrix product over the cut-out patches, and faster as one.
    patches = pixel_values.to(dtype).reshape(count, channels, height // p, p, width // p, p).permute(0, 2, 4, 1, 3, 5)
    patches = patches.reshape(count, -1, channels * p * p)
    patches = F.linear(patches, projection.weight.flatten(1).to(dtype), projection.bias.to(dtype))
    return torch.cat((part.cls_token.expand(count, -1, -1), patches.to(part.cls_token.dtype)), 1) + (
        part.position_embeddings
    )


def forward(
    model: nn.Module,
    pixel_values: torch.Tensor,
    *,
    keep: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    run_block: Callable[..., torch.Tensor] = block,
) -> torch.Tensor:
    """float32 logits (n, classes) of `pixel_values` (n, 3, h, w) from the parameters of a transformers ViT.

    The same numbers as `model(pixel_values=…)` in evaluation mode, without the attention mask that transformers
    materialises under `torch.compile`. `keep` (blocks, 2, n) as for `block`; `run_block` may be a compiled one.
    """
    config, x = model.config, embed(model, pixel_values, dtype)
    for number, layer in enumerate(model.vit.layers):
        kept = None if keep is None else keep[number]
        x = run_block(x, kept, block_weights(layer), config.num_attention_heads, config.layer_norm_eps, dtype)
    norm, head = model.vit.layernorm, model.classifier  # the norm is per token, and only the class token is read
    h = F.layer_norm(x[:, 0], norm.normalized_shape, norm.weight, norm.bias, norm.eps).to(dtype)
    return F.linear(h, head.weight.to(dtype), head.bias.to(dtype)).float()


def at_side(model: nn.Module, settings: StandIn, side: int, labels: Labels) -> nn.Module:
    """A network for pictures of `side` pixels with the weights of `model`, which it shares but for the positions.

    Position embeddings are interpolated over the grid of patches (Dosovitskiy et al. 2021, section 3.2).
    """
    with torch.device("meta"):  # no second initialisation: every tensor comes from `model`
        resized = checkpoint.new(settings.architecture, image_size=side, labels=labels)
    grid = side // model.config.patch_size
    state = model.state_dict()
    state[POSITIONS] = interpolate_positions(state[POSITIONS], grid)
    resized.load_state_dict(state, strict=True, assign=True)
    return resized.eval()


def interpolate_positions(positions: torch.Tensor, grid: int) -> torch.Tensor:
    """Positions (1, 1 + grid², hidden) from those of another square grid (bicubic); the class token keeps its own."""
    token, patches = positions[:, :1], positions[:, 1:]
    old = math.isqrt(patches.shape[1])
    square = patches.reshape(1, old, old, -1).permute(0, 3, 1, 2)
    square = F.interpolate(square, size=(grid, grid), mode="bicubic", align_corners=False)
    return torch.cat((token, square.flatten(2).transpose(1, 2)), dim=1).contiguous()


# ------------------------------------------------------------------------- random: pictures, mixtures, skipped blocks


@torch.no_grad()
def augment(
    pixels: torch.Tensor, side: int, *, crop_area: float, rotation: float, jitter: float, generator: torch.Generator
) -> torch.Tensor:
    """Random views (n, 3, side, side), float32 in 0…1, of uint8 `pixels` (n, 3, h, w) on the generator's device.

    Crop, aspect (¾…4/3), mirror and rotation of up to `rotation` degrees are one resampling; what a rotated crop takes
    from outside is reflected. Then brightness, contrast and saturation change by a factor of 1 ± `jitter` each.
    """
    count, device = len(pixels), pixels.device

    def uniform(low: float, high: float) -> torch.Tensor:
        return torch.empty(count, device=device).uniform_(low, high, generator=generator)

    area, log_aspect = uniform(crop_area, 1).sqrt(), uniform(-1, 1) * (math.log(4 / 3) / 2)
    aspect = torch.minimum(torch.maximum(log_aspect.exp(), area), 1 / area)  # no crop wider or higher than the picture
    wide, high = area * aspect, area / aspect
    angle, mirror = uniform(-1, 1) * math.radians(rotation), uniform(0, 1).round() * 2 - 1
    cos, sin = angle.cos(), angle.sin()
    across = torch.stack((cos * wide * mirror, -sin * high, uniform(-1, 1) * (1 - wide)), dim=1)
    down = torch.stack((sin * wide * mirror, cos * high, uniform(-1, 1) * (1 - high)), dim=1)
    grid = F.affine_grid(torch.stack((across, down), dim=1), [count, 3, side, side], align_corners=False)
    views = F.grid_sample(pixels.float() / 255, grid, padding_mode="reflection", align_corners=False)
    brightness, contrast, saturation = (uniform(1 - jitter, 1 + jitter).view(-1, 1, 1, 1) for _ in range(3))
    views = views * brightness
    grey = GREY[0] * views[:, :1] + GREY[1] * views[:, 1:2] + GREY[2] * views[:, 2:]
    views = grey + (views - grey) * saturation
    mean = grey.mean(dim=(2, 3), keepdim=True)
    return (mean + (views - mean) * contrast).clamp_(0, 1)


@torch.no_grad()
def mix(images: torch.Tensor, alpha: float, rng: np.random.Generator) -> tuple[torch.Tensor, float]:
    """Each picture (n, 3, h, w) mixed with its mirror position in the batch, and the share of its own that is left.

    Half the time blended (mixup, Zhang et al. 2018), else with a rectangle pasted in (cutmix, Yun et al. 2019). One
    share from Beta(alpha, alpha) a batch, drawn on the host: it reaches the device as an argument, without a wait.
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


def draw_keep(blocks: int, count: int, drop_path: float, generator: torch.Generator) -> torch.Tensor:
    """`keep` (blocks, 2, count): 0 where a picture skips a branch, else 1 / (1 − rate), so that the mean is 1.

    The rate rises linearly from 0 in the first block to `drop_path` in the last (Huang et al. 2016, section 3).
    """
    device = generator.device
    rate = torch.linspace(0, drop_path, blocks, device=device).view(-1, 1, 1)
    return (torch.rand(blocks, 2, count, device=device, generator=generator) >= rate).float() / (1 - rate)


def batches(count: int, size: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Rows (size,) without end, each picture once a pass; batches run on over the end of a pass: all have one size."""
    rows = torch.empty(0, dtype=torch.int64, device=generator.device)
    while True:
        while len(rows) < size:
            rows = torch.cat((rows, torch.randperm(count, device=generator.device, generator=generator)))
        yield rows[:size]
        rows = rows[size:]


# ---------------------------------------------------------------------------------------------------------- training


def learning_rate(stage: Stage, step: int, progress: float) -> float:
    """The rate of step `step` (from 0) when `progress` (0…1) of the stage is over: linear warm-up times a cosine."""
    rise = min(1.0, max((step + 1) / stage.warmup_steps, progress / WARMUP_SHARE))
    return stage.learning_rate * rise * (1 + math.cos(math.pi * min(progress, 1.0))) / 2


def optimizer(model: nn.Module, settings: StandIn) -> torch.optim.AdamW:
    """AdamW, with decay on matrices (the patch embedding's kernel is one), not on tokens, positions, norms, biases."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim in (2, 4)]
    others = [parameter for parameter in model.parameters() if parameter.ndim not in (2, 4)]
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}]
    fused = True if matrices[0].is_cuda else None
    return torch.optim.AdamW(groups, lr=0.0, betas=(settings.beta1, settings.beta2), fused=fused)


@dataclass
class _Run:
    """What a stage needs beside its numbers; one for both stages, so that random streams go on."""

    settings: StandIn
    train: Examples  # on the device
    mean: torch.Tensor  # (3, 1, 1) of the preprocessing, on the device
    std: torch.Tensor
    generator: torch.Generator  # of the device: order, views, skipped blocks
    rng: np.random.Generator  # of the host: mixtures
    run_block: Callable[..., torch.Tensor]
    dtype: torch.dtype

    @property
    def device(self) -> torch.device:
        return self.generator.device


def _new_run(settings: StandIn, train: Examples, pre: Preprocess, device: torch.device) -> _Run:
    on_gpu = device.type == "cuda"
    generator = torch.Generator(device=device).manual_seed(settings.seed)
    return _Run(
        settings,
        Examples(train.pixels.to(device), train.labels.to(device)),
        # Tensors of their own: views lie in 0…1, and preprocess.normalise takes 0…255.
        torch.tensor(pre.processor.image_mean, device=device).view(3, 1, 1),
        torch.tensor(pre.processor.image_std, device=device).view(3, 1, 1),
        generator,
        np.random.default_rng(settings.seed),
        torch.compile(block, dynamic=False, fullgraph=True) if settings.compile and on_gpu else block,
        torch.bfloat16 if on_gpu else torch.float32,
    )


def _loss(run: _Run, model: nn.Module, stage: Stage, rows: torch.Tensor) -> torch.Tensor:
    """Cross entropy of one augmented batch; nothing in it waits for the device."""
    settings, labels = run.settings, run.train.labels[rows]
    images = augment(
        run.train.pixels[rows],
        stage.side,
        crop_area=settings.crop_area,
        rotation=settings.rotation,
        jitter=settings.jitter,
        generator=run.generator,
    )
    images, share = mix(images, settings.mix_alpha, run.rng) if stage.mixing else (images, 1.0)
    keep = draw_keep(model.config.num_hidden_layers, len(rows), settings.drop_path, run.generator)
    logits = forward(model, (images - run.mean) / run.std, keep=keep, dtype=run.dtype, run_block=run.run_block)
    loss = F.cross_entropy(logits, labels, label_smoothing=settings.label_smoothing)
    if stage.mixing:
        other = F.cross_entropy(logits, labels.flip(0), label_smoothing=settings.label_smoothing)
        loss = share * loss + (1 - share) * other
    return loss


def _warm_up(run: _Run, model: nn.Module, stage: Stage) -> None:
    """Compile and fill the allocator before the clock starts; the weights stay as they are."""
    if run.device.type != "cuda":
        return
    start = time.perf_counter()
    rows = torch.arange(stage.batch_size, device=run.device) % len(run.train.labels)
    for _ in range(2):
        _loss(run, model, stage, rows).backward()
        model.zero_grad(set_to_none=True)
    torch.cuda.synchronize(run.device)
    print(f"stage {stage.number}: compiled and warm after {time.perf_counter() - start:.0f} s", flush=True)


class _Pace:
    """The stage's clock. Keeps the host at most two steps ahead of the device: else it would time the launches."""

    def __init__(self, stage: Stage, device: torch.device) -> None:
        self.stage, self.device, self.marks = stage, device, deque()
        self.start = time.perf_counter()

    def elapsed(self) -> float:
        """Seconds since the first step was launched."""
        return time.perf_counter() - self.start

    def after(self, step: int) -> float:
        """Share of the stage that is over after `step` steps. Waits for the step two before; the device never does."""
        if self.device.type == "cuda":
            self.marks.append(torch.cuda.current_stream(self.device).record_event())
            if len(self.marks) > 2:
                self.marks.popleft().synchronize()
        return step / self.stage.steps if self.stage.steps else self.elapsed() / self.stage.seconds


def _train_stage(run: _Run, model: nn.Module, stage: Stage) -> list[dict[str, float]]:
    """Train `model` in place to the end of the stage's budget; rows of the history, one about every `log_seconds`."""
    settings, parameters = run.settings, list(model.parameters())
    update, rows, log = optimizer(model, settings), batches(len(run.train.labels), stage.batch_size, run.generator), []
    _warm_up(run, model, stage)
    total, logged_step, logged_s = torch.zeros((), device=run.device), 0, 0.0
    pace, step, progress = _Pace(stage, run.device), 0, 0.0
    while progress < 1:
        rate = learning_rate(stage, step, progress)
        for group in update.param_groups:
            group["lr"] = rate
        loss = _loss(run, model, stage, next(rows))
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, settings.clip)
        update.step()
        update.zero_grad(set_to_none=True)
        total += loss.detach()
        step, progress = step + 1, pace.after(step + 1)
        if progress >= 1 or pace.elapsed() - logged_s >= settings.log_seconds:
            mean_loss = total.item() / (step - logged_step)  # the only wait for the device
            seconds, pictures = pace.elapsed(), (step - logged_step) * stage.batch_size
            log.append(_row(run, stage, step, seconds, pictures / (seconds - logged_s), mean_loss, rate))
            total.zero_()
            logged_step, logged_s = step, seconds
    return log


def _row(run: _Run, stage: Stage, step: int, seconds: float, speed: float, loss: float, rate: float) -> dict:
    epoch = step * stage.batch_size / len(run.train.labels)
    print(
        f"stage {stage.number}: {seconds:6.1f} s, step {step}, epoch {epoch:.1f}, {speed:,.0f} img/s, "
        f"loss {loss:.3f}, lr {rate:.2e}",
        flush=True,
    )
    if not math.isfinite(loss):
        raise StandInError(f"the loss of stage {stage.number} is {loss} at step {step}: lower its learning rate")
    row = {"stage": stage.number, "side": stage.side, "step": step, "epoch": epoch, "seconds": seconds}
    return row | {"images_per_s": speed, "loss": loss, "learning_rate": rate}


@torch.inference_mode()
def evaluate(
    model: nn.Module, examples: Examples, pre: Preprocess, *, dtype: torch.dtype, batch_size: int = 256
) -> dict[str, float]:
    """top1 and top5 (shares, 0…1) of `examples` on the model's device, matrix products in `dtype`; not compiled."""
    device, right = model.device, []
    for pixels, labels in zip(examples.pixels.split(batch_size), examples.labels.split(batch_size), strict=True):
        logits = forward(model, pre.normalise(pixels.to(device)), dtype=dtype)
        ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels.to(device)[:, None]
        right.append(torch.stack((ranked[:, 0], ranked.any(dim=1)), dim=1))
    top1, top5 = torch.cat(right).double().mean(dim=0).tolist()
    return {"top1": top1, "top5": top5}


def _decode(settings: StandIn, dataset: Dataset, labels: Labels) -> tuple[Examples, dict[int, Examples]]:
    """Training pictures at `decode_side`, and validation pictures as each stage's preprocessing makes them, by side."""
    pre = preprocess.new(settings.decode_side)
    part = data.decode_splits(dataset, ("train",), pre, settings.workers)["train"]
    train, valid = Examples(part.pixels, labels.ids(part.pictures)), {}
    for side in {stage.side: None for stage in settings.stages()}:
        part = data.decode_splits(dataset, ("valid",), preprocess.new(side), settings.workers)["valid"]
        valid[side] = Examples(part.pixels, labels.ids(part.pictures))
    return train, valid


def train(settings: StandIn, dataset: Dataset, folder: Path, device: torch.device) -> pd.DataFrame:
    """Train both stages, write `folder`/stage1, /stage2 and /history.csv, and return the history.

    Both checkpoints are complete, in float32, for pictures of `stage2_side`. That of stage 1, with interpolated
    positions, is a base to fine-tune. A row is about `log_seconds` of training: stage, side, step, epoch, seconds,
    images_per_s, loss, learning_rate; top1 and top5 (shares of the validation split at the stage's side) stand in the
    last row of each stage. Raises DataError, StandInError. Unreadable pictures join `dataset.skipped`.
    """
    data.check(dataset)
    checkpoint.quiet_libraries()
    first, second = settings.stages()
    labels, pre = data.new_labels(dataset), preprocess.new(second.side)
    examples, valid = _decode(settings, dataset, labels)
    set_seed(settings.seed)
    model = checkpoint.new(settings.architecture, image_size=first.side, labels=labels).to(device)
    run, history, accuracy = _new_run(settings, examples, pre, device), [], []

    def measure(stage: Stage, side: int) -> dict[str, float]:
        found = evaluate(model, valid[side], preprocess.new(side), dtype=run.dtype)
        accuracy.append({"after stage": stage.number, "side": side, **found})
        shares = f"Top-1 {found['top1']:.2%}, Top-5 {found['top5']:.2%}"
        print(f"after stage {stage.number}, {side} px: {shares}", flush=True)
        return found

    with _matmul_precision("high"):
        for stage in (first, second):
            history += _train_stage(run, model, stage)
            history[-1] |= measure(stage, stage.side)
            if stage.side != second.side:  # what a user of the checkpoint gets, before anything is trained at this size
                model = at_side(model, settings, second.side, labels)
                measure(stage, second.side)
            note = _provenance(settings, history, accuracy, len(examples.labels))
            checkpoint.save(model, folder / f"stage{stage.number}", pre=pre, labels=labels, provenance=note)
    table = pd.DataFrame(history)
    records.write_table(table, folder / "history.csv")
    return table


def _provenance(settings: StandIn, history: list[dict], accuracy: list[dict], pictures: int) -> dict[str, object]:
    """What a checkpoint says about itself; top1 and top5 are its own, at its own size."""
    last = {row["stage"]: row for row in history}
    keys = ("stage", "side", "step", "epoch", "seconds")
    return {
        "origin": ORIGIN,
        "pretrained": False,
        "training pictures": pictures,
        "stages": [{key: row[key] for key in keys} for row in last.values()],
        "accuracy": list(accuracy),
        "top1": accuracy[-1]["top1"],
        "top5": accuracy[-1]["top5"],
        "weights": "fp32",
        "settings": asdict(settings),
        "versions": provenance.environment(parameters={})["versions"],
    }


@contextmanager
def _matmul_precision(name: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def summary(history: pd.DataFrame) -> pd.DataFrame:
    """A row a stage: side, steps, epochs, seconds, images per second over the stage, loss and accuracy at its end."""
    last = history.groupby("stage").tail(1).set_index("stage")
    speed = history.groupby("stage")["images_per_s"].median()
    return last.drop(columns="learning_rate").assign(images_per_s=speed)


# ------------------------------------------------------------------------------------------------------ command line


def _parser() -> argparse.ArgumentParser:
    """Every setting is a flag of its name."""
    parser = argparse.ArgumentParser(prog="python -m vitlib.standin", description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", required=True, type=Path, help="folder with train/<class>/ and valid/<class>/")
    parser.add_argument("--out", required=True, type=Path, help="folder for stage1/, stage2/ and history.csv")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="auto takes the GPU")
    parser.add_argument("--max-megapixels", default=50.0, type=float, help="larger pictures are skipped")
    for spec in fields(StandIn):
        flag, meaning = "--" + spec.name.replace("_", "-"), f"{spec.metadata['meaning']} ({spec.default})"
        if isinstance(spec.default, bool):
            parser.add_argument(flag, default=spec.default, action=argparse.BooleanOptionalAction, help=meaning)
        else:
            parser.add_argument(flag, default=spec.default, type=type(spec.default), help=meaning)
    return parser


def main(arguments: list[str] | None = None) -> None:
    """Train from the command line; one line on standard error and code 1 where that cannot be done."""
    given = vars(_parser().parse_args(arguments))
    try:
        settings = StandIn(**{spec.name: given[spec.name] for spec in fields(StandIn)})
        device = checkpoint.pick_device(given["device"])
        dataset = data.from_folder(given["data"], given["max_megapixels"])
        history = train(settings, dataset, given["out"], device)
    except (data.DataError, StandInError, checkpoint.NotRun, OSError) as error:
        sys.exit(f"standin: {error}")
    for file, split, reason in dataset.skipped:
        print(f"skipped in {split}: {file} ({reason})")
    print(summary(history).to_string(float_format=lambda value: f"{value:,.4g}"))


if __name__ == "__main__":
    main()
