"""LoRA adapters that train fast: no needless casts, and on request added into the weights.

PEFT computes W x + s B A dropout(x). The second product is small, but its dropout, its cast to the adapters' fp32 and
its sum with the first pass over every activation several times, and that traffic takes longer than the products.
There are two remedies: under autocast the input is not cast (autocast casts the small matrices instead), and without
dropout (W + s B A) x is the same function, for which nothing but the product itself passes over the activations.
"""

import warnings

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

ENCODER_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2")


class AdapterError(RuntimeError):
    """Adapters or a head that would not be trained; the message says which."""


class _Summed(torch.autograd.Function):
    """x (W + s B A)ᵀ + bias with gradients of x, A and B only; that of the frozen W is never formed."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float):
        # Summed in fp32 and rounded once. Rounding W first would swallow a small s B A: the sum would round back to W.
        summed = torch.addmm(weight.to(b.dtype), b, a, alpha=scaling).to(x.dtype)
        ctx.save_for_backward(x, summed, a, b)
        ctx.scaling = scaling
        return nn.functional.linear(x, summed, None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple:
        x, summed, a, b = ctx.saved_tensors
        rows, grads = x.flatten(0, -2), grad.flatten(0, -2)
        inner = rows @ a.to(x.dtype).T  # (rows, rank): through it no product is larger than the adapters'
        grad_b = (grads.T @ inner).to(b.dtype) * ctx.scaling
        grad_a = ((grads @ b.to(x.dtype)).T @ rows).to(a.dtype) * ctx.scaling
        grad_x = grad @ summed if ctx.needs_input_grad[0] else None
        return grad_x, None, None, grad_a, grad_b, None


class SummedLinear(LoraLinear):
    """PEFT's adapted linear whose adapter is added to the weight before the product. One adapter, no dropout.

    Parameters, files and merging are PEFT's own. The weight should stay in fp32, see `_Summed`.
    """

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        """(…, in) to (…, out) in the arithmetic of autocast, else in that of x."""
        if self.disable_adapters or self.merged:
            return super().forward(x, *args, **kwargs)
        (name,) = self.active_adapters
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        a, b, layer = self.lora_A[name].weight, self.lora_B[name].weight, self.base_layer
        with torch.autocast(kind, enabled=False):
            return _Summed.apply(x.to(dtype), layer.weight, layer.bias, a, b, self.scaling[name])


def attach(model: nn.Module, *, rank: int, alpha: int, dropout: float, head: str, summed: bool) -> PeftModel:
    """`model` with adapters on every linear of the encoder, and `head` trained as a whole; AdapterError otherwise.

    A `head` of "" leaves it frozen. A list of names that matches nothing, or a head left at random, would train without
    an error. `summed` takes `SummedLinear`; ValueError with dropout: W sees the whole input and B A a part of it, so
    there is no sum of them.
    """
    if summed and dropout:
        raise ValueError(f"adapters cannot be added into the weights while lora_dropout is {dropout}: set it to 0")
    targets = {"target_modules": list(ENCODER_LINEARS), "modules_to_save": [head] if head else None}
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, **targets)
    if summed:
        config._register_custom_module({nn.Linear: SummedLinear})
    with warnings.catch_warnings():  # of a name that peft still uses and transformers will drop
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`")
        adapted = get_peft_model(model, config)
    check(adapted, head)
    return adapted


def check(model: PeftModel, head: str) -> None:
    """AdapterError unless `head` is trained and every linear of the encoder has an adapter."""
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not any(head in name for name in trained):
        raise AdapterError("the classifier is frozen: it would stay at its random initialisation")
    found, wanted = sum("lora_A" in name for name in trained), model.config.num_hidden_layers * len(ENCODER_LINEARS)
    if found != wanted:
        raise AdapterError(
            f"{found} linears have an adapter, the encoder has {wanted}: the base has other module names"
        )


def round_frozen(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Store what is not trained in `dtype`; adapters and head keep fp32, in which small steps are not lost.

    In place. The weights below a `SummedLinear` stay as they are; their biases do not.
    """
    kept = {id(m.get_base_layer().weight) for m in model.modules() if isinstance(m, SummedLinear)}
    for parameter in model.parameters():
        if not parameter.requires_grad and parameter.is_floating_point() and id(parameter) not in kept:
            parameter.data = parameter.data.to(dtype)
    return model


def merged(model: PeftModel, *, quantized: bool) -> nn.Module:
    """The plain network in fp16 with the adapters added to the weights that they were trained on.

    For a `quantized` (NF4) base these are the dequantized weights: bitsandbytes would round the sum to NF4 again.
    """
    if not quantized:
        return model.merge_and_unload().half()
    deltas = {
        name.removeprefix("base_model.model."): module.get_delta_weight("default").float()
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }
    dense = model.unload().dequantize(dtype=torch.float32).float()
    for name, delta in deltas.items():
        dense.get_submodule(name).weight.data += delta
    return dense.eval().half()
