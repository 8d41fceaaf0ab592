"""Fused steps of a quantized network: what its own modules compute, in every family."""

import copy

import pytest
import torch

from benchmarks.decode_profile import unfused
from tailor_engine.modules import FusedLinears
from tailor_engine.stages import get
from tests.tiny import FAMILIES, tiny

IDS = torch.randint(6, 300, (2, 21), generator=torch.Generator().manual_seed(0))
CONFIG = {"bits": 8, "rows": 0, "method": "nearest", "clip_search": False}


def quantized(family, **changes):
    return get("quantize")(tiny(family), CONFIG | changes, None)[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_and_the_tokens_after_it(family):
    # Activations as they are: where they are quantized, a code at a boundary may round either way.
    network = quantized(family, quantize_activations=False).network
    assert any("forward" in vars(module) for module in network.modules())
    caches, networks = [None, None], [network, unfused(network)]
    with torch.inference_mode():
        for part in (IDS[:, :15], IDS[:, 15:16], IDS[:, 16:17], IDS[:, 17:]):
            outputs = [
                each(part, past_key_values=cache, use_cache=True)
                for each, cache in zip(networks, caches, strict=True)
            ]
            caches = [output.past_key_values for output in outputs]
            left, right = (output.logits for output in outputs)
            torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_is_not_attended_to(family):
    network = quantized(family, quantize_activations=False).network
    mask = torch.ones_like(IDS)
    mask[0, :6] = 0
    with torch.inference_mode():
        left, right = (
            each(IDS, attention_mask=mask).logits for each in (network, unfused(network))
        )
    torch.testing.assert_close(left[mask > 0], right[mask > 0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_linears_of_one_input_run_as_one(family):
    model = quantized(family)
    block = model.family.blocks_of(model.network)[0]
    for parts in (("query", "key", "value"), ("gate", "up")):
        fused = {id(model.family.part(block, part).fused) for part in parts}
        assert len(fused) == 1
        assert isinstance(model.family.part(block, parts[0]).fused, FusedLinears)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_pass_through_as_before(family):
    network = quantized(family).network
    states = torch.randn(2, 9, network.config.hidden_size)
    gradients = []
    for each in (network, unfused(network)):
        inputs = states.clone().requires_grad_()
        each(inputs_embeds=inputs).logits.square().mean().backward()
        gradients.append(inputs.grad)
    assert bool(gradients[0].any())
    assert torch.equal(*gradients)


def test_a_copy_stands_alone():
    network = quantized("qwen3", quantize_activations=False).network
    copied = copy.deepcopy(network)
    with torch.inference_mode():
        before = network(IDS).logits
        for name, module in copied.named_modules():
            if name.endswith(("layernorm", "q_norm")):
                module.weight.mul_(-0.5)
        assert torch.equal(network(IDS).logits, before)
        left, right = (each(IDS).logits for each in (copied, unfused(copied)))
        assert float((left - before).norm() / before.norm()) > 0.1
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5)


def test_a_module_that_computes_otherwise_keeps_its_own_forward():
    model = tiny()
    blocks = model.family.blocks_of(model.network)

    class WithoutRotation(type(blocks[1].self_attn)):
        def forward(self, hidden_states, position_embeddings, *rest, **options):
            cosine, sine = position_embeddings
            still = torch.ones_like(cosine), torch.zeros_like(sine)
            return super().forward(hidden_states, still, *rest, **options)

    blocks[1].self_attn.__class__ = WithoutRotation
    blocks[1].mlp.act_fn = torch.nn.Tanh()
    network = get("quantize")(model, CONFIG, None)[0].network
    blocks = model.family.blocks_of(network)
    for name in ("self_attn", "mlp"):
        assert "forward" in vars(getattr(blocks[0], name))
        assert "forward" not in vars(getattr(blocks[1], name))
    assert "forward" in vars(blocks[1].input_layernorm)


def test_bfloat16_stays_near_its_own_modules():
    network = quantized("llama", quantize_activations=False).network.bfloat16()
    with torch.inference_mode():
        left, right = (each(IDS).logits.float() for each in (network, unfused(network)))
    assert float((left - right).norm() / right.norm()) < 0.02
