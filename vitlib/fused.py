"""A Vision Transformer rewritten for speed, with the outputs of the checkpoint it is made from. Level 2.

The same changes for every weight format: one product for query, key and value; the patch embedding as a product; bias
and, where the form allows, GELU in the product's epilogue; residual and norm in one step; attention on views of the
QKV product; and after the attention of the last block only the class token, as nothing else reaches the head (an
exact saving: nothing that is left out enters the logits). The checkpoint stays a plain one.
"""

from collections import Counter
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

from vitlib import attention, kernels, linears, quantize
from vitlib.ahead import Ahead, BlockWeights, can_run
from vitlib.linears import Linear, Quantized, Tuned, tune, tuning_table
from vitlib.models import Loaded

__all__ = ["FusedViT", "add_layer_norm", "fuse", "fused_loaded", "gelu_difference", "tune", "tuning_table"]

# The names of transformers whose function is the exact GELU or its tanh form; anything else runs by itself.
_GELU = {
    **dict.fromkeys(("gelu", "gelu_python"), "erf"),
    **dict.fromkeys(("gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_accurate"), "tanh"),
}


def add_layer_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum of `x` and `residual` (M, H), and its layer norm; one kernel where there is one."""
    if linears.use_kernels(x.device) and x.shape[1] <= kernels.ROW_LIMIT:
        return linears.add_layer_norm_kernel(x, residual, weight, bias, eps)
    total = x + residual
    return total, F.layer_norm(total, weight.shape, weight, bias, eps)


class AddNorm(nn.Module):
    """`add_layer_norm` with the weights of a layer norm of the network.

    Where all that reads the norm is one layer with 8-bit inputs, `reader`, the same kernel quantizes the rows for it.
    """

    part = "norm"

    def __init__(self, norm: nn.LayerNorm, reader: Linear | None = None) -> None:
        super().__init__()
        self.register_buffer("weight", norm.weight.detach())
        self.register_buffer("bias", norm.bias.detach())
        self.eps = norm.eps
        self.codes = _codes_for(reader)

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | Quantized]:
        if self.codes is None:
            return add_layer_norm(x, residual, self.weight, self.bias, self.eps)
        total, *codes = linears.add_layer_norm_quantize(x, residual, self.weight, self.bias, self.eps, self.codes)
        return total, Quantized(*codes, total.dtype)


def _codes_for(reader: Linear | None) -> torch.dtype | None:
    """In which 8-bit format a norm may hand its rows to `reader`, the one layer that reads them; None: in 16 bit."""
    if not isinstance(reader, linears.EightBit) or reader.in_features > kernels.ROW_LIMIT:
        return None
    fp8 = reader.codes_dtype == torch.float8_e4m3fn
    reader.norm_quantizes = linears.use_kernels(reader.rows.device, fp8=fp8)
    return reader.codes_dtype if reader.norm_quantizes else None


class Embedding(nn.Module):
    """Pixels (n, 3, h, w) to tokens (n, 1 + patches, H): patches as rows of one product, class token, positions."""

    part = "patch embedding"

    def __init__(self, embeddings: nn.Module) -> None:
        super().__init__()
        convolution = embeddings.patch_embeddings.projection
        self.patch, self.side = convolution.kernel_size, tuple(embeddings.patch_embeddings.image_size)
        self.projection = linears.Dense(convolution.weight.flatten(1), convolution.bias)
        self.projection.rows_per_picture = embeddings.position_embeddings.shape[1] - 1
        self.register_buffer("class_token", embeddings.cls_token.detach())
        self.register_buffer("positions", embeddings.position_embeddings.detach())

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Tokens (n, 1 + patches, H). ValueError for pictures of another size."""
        count, channels, height, width = pixel_values.shape
        if (height, width) != self.side:
            raise ValueError(f"pictures are {height}×{width}, the network takes {self.side[0]}×{self.side[1]}")
        down, across = height // self.patch[0], width // self.patch[1]
        patches = pixel_values.reshape(count, channels, down, self.patch[0], across, self.patch[1])
        patches = patches.permute(0, 2, 4, 1, 3, 5).reshape(count * down * across, -1)
        tokens = self.projection(patches).view(count, down * across, -1)
        return torch.cat((self.class_token.expand(count, -1, -1), tokens), dim=1) + self.positions


class ScaledDotProduct(Tuned):
    """`attention.attend` by name, or this project's kernel where the name leaves the choice open and it is faster.

    Takes query (n, rows, heads, width), key and value (n, tokens, heads, width), as views of one product.
    """

    part = "scaled dot product"  # so that the profiler can book its kernels

    def __init__(self, source: nn.Module, name: str, make: "Maker", *, only_class: bool = False) -> None:
        super().__init__()
        self.heads, self.width = source.num_attention_heads, source.head_dim
        self.scaling, self.name, self.dtype, self.device = source.scaling, name, make.dtype, make.device
        self.tokens, self.rows_per_picture = make.tokens, 1 if only_class else make.tokens

    @property
    def shape(self) -> str:
        """For the tuning table."""
        return f"{self.heads} heads of {self.width}, {self.tokens} tokens"

    def paths(self, rows: int) -> tuple[str, ...]:
        ours = self.name == "direct" and self.dtype != torch.float32 and linears.use_kernels(self.device)
        return ("library", "fused") if ours else ("library",)

    def configurations(self, rows: int, path: str) -> tuple[str, ...]:
        if path == "library":
            return ("",)
        shape = rows // self.rows_per_picture, self.rows_per_picture, self.heads
        return tuple(map(linears.config_text, kernels.attention_configs(*shape, self.device)))

    def example(self, rows: int) -> tuple:
        count = rows // self.rows_per_picture
        made = torch.randn(count, self.tokens, 3, self.heads, self.width, device=self.device).to(self.dtype)
        query, key, value = made.unbind(2)
        return query[:, : self.rows_per_picture], key, value

    def alike(self) -> tuple:
        return type(self), self.name, self.shape, self.rows_per_picture

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return self.run(*self.chosen(query.shape[0] * query.shape[1]), query, key, value)

    def run(self, path: str, config: str, *inputs: torch.Tensor) -> torch.Tensor:
        if path == "fused":
            return linears.attention_kernel(*inputs, self.scaling, config)
        return attention.attend(self.name, *inputs, scaling=self.scaling)


class _Attention(nn.Module):
    """What both forms share: heads and the attention function."""

    part = "attention"

    def __init__(self, attend: ScaledDotProduct) -> None:
        super().__init__()
        self.heads, self.width, self.attend = attend.heads, attend.width, attend


class Attention(_Attention):
    """Self-attention of normed tokens (n·t, H) with one QKV product; the output projection included."""

    def __init__(self, source: nn.Module, name: str, make: "Maker") -> None:
        super().__init__(ScaledDotProduct(source, name, make))
        self.qkv = make(source.q_proj, source.k_proj, source.v_proj)
        self.output = make(source.o_proj)

    def forward(self, normed: "torch.Tensor | Quantized", count: int) -> torch.Tensor:
        query, key, value = self.qkv(normed).view(count, -1, 3, self.heads, self.width).unbind(2)
        mixed = self.attend(query, key, value)
        return self.output(mixed.reshape(count * mixed.shape[1], -1))


class ClassAttention(_Attention):
    """Self-attention of the class token only, the first of each picture's tokens: keys and values of all tokens."""

    def __init__(self, source: nn.Module, name: str, make: "Maker") -> None:
        super().__init__(ScaledDotProduct(source, name, make, only_class=True))
        self.query = make(source.q_proj, only_class=True)
        self.key_value = make(source.k_proj, source.v_proj)
        self.output = make(source.o_proj, only_class=True)

    def forward(self, normed: torch.Tensor, count: int) -> torch.Tensor:
        key, value = self.key_value(normed).view(count, -1, 2, self.heads, self.width).unbind(2)
        query = self.query(class_rows(normed, count)).view(count, 1, self.heads, self.width)
        mixed = self.attend(query, key, value)
        return self.output(mixed.reshape(count, -1))


def class_rows(tokens: torch.Tensor, count: int) -> torch.Tensor:
    """The first of each picture's rows (n, H) of `tokens` (n·t, H), contiguous as the 8-bit products need them."""
    return tokens.view(count, -1, tokens.shape[-1])[:, 0].contiguous()


class MLP(nn.Module):
    """The two products of a block with the activation between them, in the first one's epilogue where it can be."""

    part = "mlp"

    def __init__(self, source: nn.Module, gelu: str | None, make: "Maker", *, only_class: bool) -> None:
        super().__init__()
        self.gelu, self.activation = gelu, nn.Identity() if gelu else source.activation_fn
        self.first, self.second = (make(layer, only_class=only_class) for layer in (source.fc1, source.fc2))
        self.first.usual_gelu = gelu

    def forward(self, normed: torch.Tensor) -> torch.Tensor:
        return self.second(self.activation(self.first(normed, self.gelu)))


class Block(nn.Module):
    """Attention and MLP. Takes the residual stream and its norm, and returns both for the block after it.

    The last block goes on with the class token alone.
    """

    part = "residual"

    def __init__(
        self, source: nn.Module, following: nn.LayerNorm, mlp: MLP, core: nn.Module, reader: Linear | None
    ) -> None:
        super().__init__()
        self.attention, self.mlp = core, mlp
        self.middle_norm, self.following_norm = AddNorm(source.layernorm_after, mlp.first), AddNorm(following, reader)

    def layers(self) -> list[Linear]:
        """Its linears."""
        return [module for module in self.modules() if isinstance(module, Linear)]

    def forward(self, stream: torch.Tensor, normed: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        mixed = self.attention(normed, count)
        if isinstance(self.attention, ClassAttention):
            stream = class_rows(stream, count)
        stream, normed = self.middle_norm(mixed, stream)
        return self.following_norm(self.mlp(normed), stream)


class Maker(NamedTuple):
    """How the linears of a network are made: format, NF4 scales, the tokens of a picture, 16 or 32 bit, and where."""

    weights: str | None
    scales: str
    tokens: int
    dtype: torch.dtype
    device: torch.device

    def __call__(self, *layers: nn.Linear, only_class: bool = False) -> Linear:
        made = linears.of(list(layers), self.weights, scales=self.scales)
        made.rows_per_picture, made.dtype = 1 if only_class else self.tokens, self.dtype
        return made


class FusedViT(nn.Module):
    """`network(pixel_values) -> logits` (n, classes) of a transformers ViT, from its own tensors.

    Tensors that keep their layout are shared with the network it is made from, those of query, key and value are
    copied into one. `config` is the network's. Evaluation only.
    """

    def __init__(self, model: nn.Module, *, weights: str | None, name: str, gelu: str | None, scales: str) -> None:
        super().__init__()
        self.config, self.attention_name, self.gelu = model.config, name, gelu
        vit = model.vit
        self.embedding = Embedding(vit.embeddings)
        positions = vit.embeddings.position_embeddings
        make = Maker(weights, scales, positions.shape[1], positions.dtype, positions.device)
        norms = [*(layer.layernorm_before for layer in vit.layers), vit.layernorm]
        self.first_norm = norms[0]
        end = len(vit.layers) - 1
        cores = [
            (Attention if number < end else ClassAttention)(layer.attention, name, make)
            for number, layer in enumerate(vit.layers)
        ]
        readers = [core.qkv if isinstance(core, Attention) else None for core in cores[1:]] + [None]
        self.blocks = nn.ModuleList(
            Block(
                layer,
                norms[number + 1],
                MLP(layer.mlp, gelu, make, only_class=number == end),
                cores[number],
                readers[number],
            )
            for number, layer in enumerate(vit.layers)
        )
        self.block_weights: list[BlockWeights] = []
        self.ahead: Ahead | None = None
        self.classifier = linears.Dense(model.classifier.weight, model.classifier.bias)
        self.eval()

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Logits (n, classes) of normalised `pixel_values` (n, 3, h, w)."""
        tokens = self.embedding(pixel_values)
        count = tokens.shape[0]
        stream = tokens.view(-1, tokens.shape[-1])
        normed = self.first_norm(stream)
        ahead = self.ahead
        if ahead is None:
            for block in self.blocks:
                stream, normed = block(stream, normed, count)
            return self.classifier(normed)
        with ahead.running():
            for number, block in enumerate(self.blocks):
                with ahead.block(number):
                    stream, normed = block(stream, normed, count)
        return self.classifier(normed)

    def lay_side_by_side(self) -> None:
        """Move the quantized weights of each block together, where that lets one kernel dequantize them (`ahead`).

        Before anything is captured. What a network that was loaded plainly shares with it is copied then.
        """
        layers = [block.layers() for block in self.blocks]
        if all(map(can_run, layers)):
            self.block_weights = [BlockWeights(own) for own in layers]
            for block, weights in zip(self.blocks, self.block_weights, strict=True):
                if isinstance(weights.layers[0], linears.Int8WeightOnly):  # NF4's are the layers' own
                    block.register_buffer("repeated_scales", weights.scales)

    @property
    def scales_extra_mb(self) -> float:
        """Megabytes that NF4 scales weigh more than in the checkpoint because they were expanded to fp32."""
        return sum(module.scales_extra_mb for module in self.modules() if isinstance(module, linears.NF4))

    def evidence(self) -> dict[str, object]:
        """What the network really is, in the words of `models.evidence`."""
        inside = [module for module in self.blocks.modules() if isinstance(module, Linear)]
        other = []
        for module in self.modules():
            held = dict(module.named_parameters(recurse=False)) | dict(module.named_buffers(recurse=False))
            # What a block itself holds are scales of its quantized weights (`lay_side_by_side`).
            quantized = isinstance(module, (Block, Linear)) and not isinstance(module, linears.Dense)
            other += [tensor for name, tensor in held.items() if name == "bias" or not quantized]
        return {
            "encoder_linears": dict(Counter(type(layer).__name__ for layer in inside)),
            "dtypes": sorted({str(tensor.dtype).removeprefix("torch.") for tensor in other}),
            "compute_dtypes": [],
            "attention": self.attention_name,
            "classifier": "Linear" if isinstance(self.classifier, linears.Dense) else type(self.classifier).__name__,
            "training": self.training,
        }


def _activation(config: object, gelu: str) -> str | None:
    """Which GELU the products may compute in their epilogue; None where the activation is another function."""
    if gelu not in ("checkpoint", "tanh"):
        raise ValueError(f"gelu is {gelu!r}: it must be 'checkpoint' or 'tanh'")
    own = _GELU.get(config.hidden_act) if config.hidden_act in ACT2FN else None
    if own is None and gelu == "tanh":
        raise ValueError(f"the checkpoint's activation is {config.hidden_act!r}: only a GELU has a tanh form")
    return "tanh" if gelu == "tanh" else own


def fuse(loaded: Loaded, *, gelu: str = "checkpoint", scales: str = "expanded", weights: str | None = None) -> FusedViT:
    """The network of `loaded` as a `FusedViT`; `loaded` keeps its own, which may not have run yet on a CPU.

    `gelu`: "checkpoint" computes what its config says, "tanh" the approximation (see `gelu_difference`). `scales` of
    NF4: "expanded" to fp32, or "nested" as stored. `weights`: the format of `linears.of`; by default that of
    `loaded.variant`, else the stored one. While both live the query, key and value weights are there twice;
    `fused_loaded` lets go of the original. ValueError where the parts do not fit.
    """
    if scales not in ("expanded", "nested"):
        raise ValueError(f"scales is {scales!r}: it must be 'expanded' or 'nested'")
    model, variant = loaded.model, loaded.variant
    if not hasattr(model, "vit"):
        raise ValueError(f"a {type(model).__name__} cannot be fused: it must be a ViTForImageClassification")
    if weights is None and variant is not None and variant.fused:
        weights = variant.weights if variant.weights in ("nf4", "w8a16", "w8a8", "fp8") else "dense"
    name = attention.DIRECT_OF.get(model.config._attn_implementation)
    if name is None:
        raise ValueError(f"the attention {model.config._attn_implementation!r} is unknown to a fused network")
    with torch.no_grad():
        return FusedViT(model, weights=weights, name=name, gelu=_activation(model.config, gelu), scales=scales)


def fused_loaded(
    loaded: Loaded, *, gelu: str = "checkpoint", scales: str = "expanded", side_by_side: bool = False
) -> Loaded:
    """`loaded` with the fused network in place of the plain one and its weight in MB; see `lay_side_by_side`.

    The plain network's query, key and value weights are freed once the caller drops `loaded` too.
    """
    network = fuse(loaded, gelu=gelu, scales=scales)
    if side_by_side:
        network.lay_side_by_side()
    return replace(loaded, model=network, weights_mb=quantize.model_mb(network))


class Difference(NamedTuple):
    """Between two sets of logits: the largest absolute one, and the norm of the difference over the norm."""

    max_abs: float
    relative: float


@torch.inference_mode()
def gelu_difference(loaded: Loaded, pixel_values: torch.Tensor) -> Difference:
    """How far the logits of normalised `pixel_values` (n, 3, h, w) move when GELU is computed in its tanh form."""
    exact, tanh = (fuse(loaded, gelu=form)(pixel_values) for form in ("checkpoint", "tanh"))
    return Difference((tanh - exact).abs().max().item(), quantize.relative_error(tanh, exact))
