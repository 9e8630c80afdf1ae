"""A Vision Transformer rewritten for speed, with the outputs of the checkpoint it is made from.

The same changes for every weight format: one product for query, key and value; the patch embedding as a product; bias
and, where the form allows, GELU in the product's epilogue; residual and norm in one step; attention on views of the
QKV product; and after the attention of the last block only the class token, as nothing else reaches the head (an
exact saving: nothing that is left out enters the logits). The checkpoint itself is not changed.
"""

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import nn

from vitlib.network import attention, layers, plan
from vitlib.network.blocks import BlockBuffers, BlockWeights, can_run
from vitlib.network.kernels import norms
from vitlib.network.kernels.attention import AttentionConfig, attention_configs
from vitlib.network.kernels.attention import attention as attention_kernel
from vitlib.network.kernels.products import FP8
from vitlib.network.kernels.triton_support import ROW_LIMIT
from vitlib.network.layers import EightBit, Linear, Quantized
from vitlib.network.tuning import Implementation, Tuned
from vitlib.study.variants import DIRECT, Variant

# transformers' names of the exact GELU and of its tanh form; any other activation is a module of its own.
_GELU = dict.fromkeys(("gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_accurate"), "tanh")
_GELU |= {"gelu": "erf", "gelu_python": "erf"}


class AddNorm(nn.Module):
    """`x` + `residual` (M, H) and its layer norm, in one kernel that also quantizes if `reader` alone reads it."""

    part = "norm"

    def __init__(self, norm: nn.LayerNorm, reader: Linear | None = None) -> None:
        super().__init__()
        self.register_buffer("weight", norm.weight.detach())
        self.register_buffer("bias", norm.bias.detach())
        self.eps, self.codes = norm.eps, None
        if isinstance(reader, EightBit) and reader.in_features <= ROW_LIMIT:
            reader.norm_quantizes = layers.use_kernels(reader.device, fp8=reader.codes_dtype == FP8)
            self.codes = reader.codes_dtype if reader.norm_quantizes else None

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | Quantized]:
        """`x` + `residual` (rows, H), and its layer norm: as 8-bit codes where the layer that reads it takes them."""
        total, normed, scales = norms.add_layer_norm(x, residual, self.weight, self.bias, self.eps, self.codes)
        return total, normed if scales is None else Quantized(normed, scales, total.dtype)


class Embedding(nn.Module):
    """Pixels (n, 3, h, w) to tokens (n, 1 + patches, H): patches as rows of one product, class token, positions."""

    part = "patch embedding"

    def __init__(self, embeddings: nn.Module) -> None:
        super().__init__()
        convolution = embeddings.patch_embeddings.projection
        self.patch, self.side = convolution.kernel_size, tuple(embeddings.patch_embeddings.image_size)
        self.projection = layers.Dense([convolution])
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
    """The faster kernel for query (n, rows, heads, width), key and value (n, tokens, heads, width), strided views."""

    part = "scaled dot product"  # the profiler's name of the attention function

    def __init__(self, source: nn.Module, make: "Maker", *, only_class: bool) -> None:
        super().__init__()
        self.heads, self.width, self.scaling = source.num_attention_heads, source.head_dim, source.scaling
        self.dtype, self.device = make.dtype, make.device
        self.tokens, self.rows_per_picture = make.tokens, 1 if only_class else make.tokens

    @property
    def shape(self) -> str:
        return f"{self.heads} heads of {self.width}, {self.tokens} tokens"

    def implementations(self, rows: int) -> dict[str, Implementation]:
        ours = self.dtype != torch.float32 and layers.use_kernels(self.device)
        return {"library": ScaledDotProduct.library} | ({"fused": ScaledDotProduct.fused} if ours else {})

    def configurations(self, rows: int, name: str) -> tuple[AttentionConfig | None, ...]:
        if name == "library":
            return (None,)
        return attention_configs(rows // self.rows_per_picture, self.rows_per_picture, self.heads, self.device)

    def example(self, rows: int) -> tuple:
        count = rows // self.rows_per_picture
        made = torch.randn(count, self.tokens, 3, self.heads, self.width, device=self.device).to(self.dtype)
        query, key, value = made.unbind(2)
        return query[:, : self.rows_per_picture], key, value

    def alike(self) -> tuple:
        return type(self), self.shape, self.rows_per_picture

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return self.run_chosen(query.shape[0] * query.shape[1], query, key, value)

    def library(self, *states: torch.Tensor, config: None = None) -> torch.Tensor:
        """The kernel that PyTorch chooses."""
        return attention.attend(*states, scaling=self.scaling)

    def fused(self, *states: torch.Tensor, config: AttentionConfig | None = None) -> torch.Tensor:
        """This project's kernel."""
        return attention_kernel(*states, self.scaling, config)


class Attention(nn.Module):
    """Self-attention of normed tokens (n·t, H) with one QKV product; the output projection included.

    With `only_class` each picture's first token, the class token, attends to all: the query is a product of its own.
    """

    part = "attention"

    def __init__(self, source: nn.Module, make: "Maker", *, only_class: bool) -> None:
        super().__init__()
        self.attend = ScaledDotProduct(source, make, only_class=only_class)
        others = source.k_proj, source.v_proj
        self.query = make(source.q_proj, only_class=True) if only_class else None
        self.qkv = make(*others) if only_class else make(source.q_proj, *others)
        self.output = make(source.o_proj, only_class=only_class)

    def forward(self, normed: torch.Tensor | Quantized, count: int) -> torch.Tensor:
        heads = self.attend.heads, self.attend.width
        states = self.qkv(normed).unflatten(1, (-1, *heads)).unflatten(0, (count, -1)).unbind(2)
        if self.query is not None:
            states = self.query(class_rows(normed, count)).view(count, 1, *heads), *states
        mixed = self.attend(*states)
        return self.output(mixed.reshape(count * mixed.shape[1], -1))


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
    """Attention and MLP, from the residual stream and its norm to both after it; the last keeps the class token."""

    part = "residual"

    def __init__(self, middle: nn.LayerNorm, attention: nn.Module, mlp: MLP, following: AddNorm) -> None:
        super().__init__()
        self.attention, self.mlp = attention, mlp
        self.middle_norm, self.following_norm = AddNorm(middle, mlp.first), following

    def forward(self, stream: torch.Tensor, normed: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        mixed = self.attention(normed, count)
        if self.attention.query is not None:
            stream = class_rows(stream, count)
        stream, normed = self.middle_norm(mixed, stream)
        return self.following_norm(self.mlp(normed), stream)


class Maker(NamedTuple):
    """How the linears of a network are made: class of each in `layers.CLASSES`, tokens of a picture, dtype, device."""

    kinds: Mapping[nn.Linear, str]
    tokens: int
    dtype: torch.dtype
    device: torch.device

    def __call__(self, *sources: nn.Linear, only_class: bool = False) -> Linear:
        made = layers.make(sources, [self.kinds[source] for source in sources])
        for part in (made, *getattr(made, "parts", ())):
            part.rows_per_picture, part.dtype = 1 if only_class else self.tokens, self.dtype
        return made


class FusedViT(nn.Module):
    """`network(pixel_values) -> logits` (n, classes) of a transformers ViT, for evaluation only.

    It shares that network's tensors, but copies query, key and value into one. `kind` is the class of the encoder's
    linears, unless `config.plan` has one for each; `gelu` is what the MLPs compute in their product ("erf", "tanh", or
    None for another activation).
    """

    def __init__(self, model: nn.Module, *, kind: str, gelu: str | None) -> None:
        super().__init__()
        self.config, self.gelu = model.config, gelu
        vit, positions = model.vit, model.vit.embeddings.position_embeddings
        self.embedding = Embedding(vit.embeddings)
        chosen, named = getattr(model.config, "plan", {}), plan.linears(model)
        kinds = dict.fromkeys(named.values(), kind) | {named[name]: plan.KINDS[form] for name, form in chosen.items()}
        make = Maker(kinds, positions.shape[1], positions.dtype, positions.device)
        self.first_norm = vit.layers[0].layernorm_before
        self.blocks = nn.ModuleList(_blocks(vit, gelu, make))
        self.block_weights: list[BlockWeights] = []
        self.block_buffers: BlockBuffers | None = None  # None: each layer dequantizes its own weights
        self.classifier = layers.Dense([model.classifier])
        self.eval()

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Logits (n, classes) of normalised `pixel_values` (n, 3, h, w)."""
        buffers, count = self.block_buffers, len(pixel_values)
        stream = self.embedding(pixel_values).flatten(0, 1)
        normed = self.first_norm(stream)
        with buffers.running() if buffers else nullcontext():
            for number, block in enumerate(self.blocks):
                with buffers.block(number) if buffers else nullcontext():
                    stream, normed = block(stream, normed, count)
        return self.classifier(normed)

    def put_side_by_side(self) -> None:
        """Copy each block's quantized weights together, for one kernel (`blocks`); before anything is captured."""
        linears = [[module for module in block.modules() if isinstance(module, Linear)] for block in self.blocks]
        if all(map(can_run, linears)):
            self.block_weights = [BlockWeights(own) for own in linears]
            for block, weights in zip(self.blocks, self.block_weights, strict=True):
                if weights.repeats:
                    block.register_buffer("repeated_scales", weights.scales)


def _blocks(vit: nn.Module, gelu: str | None, make: Maker) -> Iterator[Block]:
    """The blocks of a transformers ViT, each with the norm that follows it; the last keeps the class token alone."""
    last = vit.layers[-1]
    cores = [Attention(layer.attention, make, only_class=layer is last) for layer in vit.layers]
    norms_after = [*(layer.layernorm_before for layer in vit.layers[1:]), vit.layernorm]
    # The norm before the last attention has two readers, the last norm only the classifier: neither quantizes.
    readers = [*(core.qkv for core in cores[1:-1]), None, None]
    for layer, core, following, reader in zip(vit.layers, cores, norms_after, readers[-len(cores) :], strict=True):
        mlp = MLP(layer.mlp, gelu, make, only_class=layer is last)
        yield Block(layer.layernorm_after, core, mlp, AddNorm(following, reader))


def fuse(model: nn.Module, variant: Variant) -> FusedViT:
    """The network of `variant` from the plain one, which has not run yet on a CPU and is not changed.

    Its stored format must be that of the variant (see `verify`). ValueError where it cannot be fused.
    """
    if not hasattr(model, "vit"):
        raise ValueError(f"a {type(model).__name__} cannot be fused: it must be a ViTForImageClassification")
    config, found = model.config, model.config._attn_implementation
    if not variant.fused or found != DIRECT:
        raise ValueError(f"{variant.name} with the attention {found!r} cannot be fused: load a fused variant")
    gelu = _GELU.get(config.hidden_act)
    if variant.gelu == "tanh" and gelu is None:
        raise ValueError(f"the checkpoint's activation is {config.hidden_act!r}: only a GELU has a tanh form")
    with torch.no_grad():
        return FusedViT(model, kind=variant.format.fused, gelu="tanh" if variant.gelu == "tanh" else gelu)
