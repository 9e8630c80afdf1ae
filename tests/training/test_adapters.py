"""Adapters train in fp32 beside rounded weights, without casts, and give what PEFT gives."""

import copy

import peft
import pytest
import torch

from vitlib import finetune
from vitlib.finetune import Base
from vitlib.network import checkpoint
from vitlib.pictures import preprocess
from vitlib.study import params
from vitlib.study.study import Study
from vitlib.training import adapters, trainer

CPU = torch.device("cpu")


def settings(**changes):
    return Study.of(params.check({"study": "unit", "precision": "bf16", **changes}))


@pytest.fixture
def base(labels):
    torch.manual_seed(0)
    return Base(checkpoint.new("vit-micro", image_size=32, labels=labels), preprocess.new(32), labels, CPU, {})


def stir(model):
    """Values that training could have given to what is trained."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def pair(base):
    """The same stirred network with PEFT's linears and with summed ones."""
    made = []
    for summed in (False, True):
        settled = {"rank": 4, "alpha": 8, "dropout": 0.0, "head": "classifier", "summed": summed}
        made.append(adapters.attach(copy.deepcopy(base.model), **settled))
    stir(made[0])
    made[1].load_state_dict(made[0].state_dict())
    return made


def test_summed_adapters_give_pefts_logits_and_gradients(base):
    gradients, logits = [], []
    for model in pair(base):
        out = model(pixel_values=torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))).logits
        out.square().sum().backward()
        logits.append(out)
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert sum("lora_" in name for name in gradients[1]) == 48
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-4, atol=1e-5)
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("rounded_first", [False, True])
def test_an_adapter_below_the_rounding_of_bf16_still_changes_the_output(rounded_first):
    """If the weight were rounded first, W + s B A would round back to W, and early training would see no change."""
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, lora_alpha=4)
    layer = adapters.SummedLinear(torch.nn.Linear(512, 512), "default", config=config, r=4, lora_alpha=4)
    if rounded_first:
        layer.base_layer.weight.data = layer.base_layer.weight.data.bfloat16()
    x = torch.randn(256, 512).bfloat16()
    with torch.no_grad():
        before = layer(x).double()
        layer.lora_B["default"].weight.normal_(std=1e-4)
        wanted, found = x.double() @ layer.get_delta_weight("default").double().T, layer(x).double() - before
    arrived = ((wanted * found).sum() / wanted.square().sum()).item()  # share of the adapter's own output
    assert (arrived < 0.7) if rounded_first else (arrived == pytest.approx(1, abs=0.15))


def test_dropout_and_summed_adapters_are_refused_together():
    with pytest.raises(ValueError, match="set it to 0"):
        adapters.attach(torch.nn.Linear(2, 2), rank=4, alpha=8, dropout=0.1, head="classifier", summed=True)


@pytest.mark.parametrize("dropout", [0.1, 0.0])
def test_frozen_weights_are_rounded_and_trained_ones_are_not(base, dropout):
    model = finetune.make_trainable(settings(lora_dropout=dropout), base)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    frozen = {name: p.dtype for name, p in model.named_parameters() if not p.requires_grad}
    exact = {name for name, dtype in frozen.items() if dtype != torch.bfloat16}
    assert len(exact) == (0 if dropout else 24)  # the summed weights of 4 blocks
    assert all(name.endswith("base_layer.weight") for name in exact)


def test_the_method_full_and_fp32_round_nothing(base):
    for changes in ({"method": "full"}, {"precision": "fp32"}):
        model = finetune.make_trainable(settings(**changes), copy.deepcopy(base))
        assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("changes", [{}, {"lora_dropout": 0.0}, {"method": "head"}])
def test_what_is_merged_is_what_was_trained_on_rounded_weights(base, changes):
    chosen = settings(**changes)
    unrounded = copy.deepcopy(base.model)
    model = stir(finetune.make_trainable(chosen, base)).eval()
    x = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        expected = copy.deepcopy(model).float()(pixel_values=x).logits
        merged = finetune.merge(chosen, model, base)
        found = merged(pixel_values=x.half()).logits.float()
    assert {p.dtype for p in merged.parameters()} == {torch.float16}
    assert (found - expected).norm() / expected.norm() < 2e-3
    position = merged.vit.embeddings.position_embeddings
    assert torch.equal(position, unrounded.vit.embeddings.position_embeddings.bfloat16().half())


@pytest.mark.parametrize("changes", [{}, {"lora_dropout": 0.0}])
def test_training_in_bf16_casts_no_adapter_input_and_leaves_frozen_weights_alone(base, tmp_path, changes):
    chosen = settings(epochs=1, train_batch_size=8, **changes)
    model, seen = finetune.make_trainable(chosen, base), set()
    for name, module in model.named_modules():
        if name.endswith(("o_proj.lora_A.default", "fc2.lora_A.default")):  # behind products, which give bf16
            module.register_forward_pre_hook(lambda _, args: seen.add(args[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):  # out of the box PEFT casts them to the adapters' fp32
        model(pixel_values=torch.randn(2, 3, 32, 32))
    assert seen == (set() if changes else {torch.float32})  # summed adapters have no product of their own
    seen.clear()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    draw = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (16, 3, 32, 32), dtype=torch.uint8, generator=draw)
    examples = dict.fromkeys(("train", "valid"), trainer.Examples(pixels, torch.arange(16) % 3))
    recipe = trainer.Recipe.of(chosen.settings)
    history = trainer.train(model, examples, pre=base.preprocess, recipe=recipe, folder=tmp_path, device=CPU)
    assert history["train_loss"].notna().all()
    assert seen == (set() if changes else {torch.bfloat16})
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name
    finetune.merge(chosen, model, base)
