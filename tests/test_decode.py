"""The native step: what the modules compute, behind the same forward, generate and caches."""

import concurrent.futures
import copy
import pickle
import types

import pytest
import torch
import transformers

import tailor_engine
from tailor_engine import families
from tailor_engine.decode import Decoder, supported
from tailor_engine.errors import UserError
from tailor_engine.stages import get
from tests.tiny import FAMILIES, tiny

CONFIG = {"rows": 0, "method": "nearest", "clip_search": False, "smoothing": 0.0}
IDS = torch.randint(6, 300, (1, 40), generator=torch.Generator().manual_seed(0))


def quantized(model, **changes):
    return get("quantize")(model, CONFIG | {"bits": 8} | changes, None)[0].network


def plain(network):
    """Return the network's own forward."""

    def forward(*args, **options):
        return type(network).forward(network, *args, **options)

    return forward


def fresh(network):
    return transformers.DynamicCache(config=network.config)


@pytest.fixture
def steps(monkeypatch):
    """Return the list of tokens that took the native step."""
    from tailor_engine.decode._step import Stepper

    seen, step = [], Stepper.step

    def counted(self, token, cache, place=None):
        logits = step(self, token, cache, place)
        if logits is not None:
            seen.append(token)
        return logits

    monkeypatch.setattr(Stepper, "step", counted)
    return seen


def assert_alike(network, prompt=10, ids=IDS):
    """Compare prompt and tokens with the network's own forward; most of them are equal."""
    own, ours = fresh(network), fresh(network)
    errors = []
    with torch.inference_mode():
        for part in (ids[:, :prompt], *ids[:, prompt:].split(1, 1)):
            expected = plain(network)(part, past_key_values=own, use_cache=True)
            found = network(part, past_key_values=ours, use_cache=True)
            assert found.logits.shape[-2:] == (part.shape[1], expected.logits.shape[-1])
            distance = (found.logits - expected.logits)[:, -1].norm()
            errors.append(float(distance / expected.logits[:, -1].norm()))
    for left, right in zip(own.layers, ours.layers, strict=True):
        torch.testing.assert_close(left.keys, right.keys, rtol=0.1, atol=0.1)
        torch.testing.assert_close(left.values, right.values, rtol=0.1, atol=0.1)
        assert left.get_seq_length() == right.get_seq_length() == ids.shape[1]
    # An activation between two codes rounds either way, and changes what comes after it by 1 %.
    assert sorted(errors)[len(errors) // 2] < 1e-5
    assert max(errors) < 0.1


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("bits", [8, 4])
def test_as_the_modules(family, bits, steps):
    network = quantized(tiny(family), bits=bits, symmetric=family == "llama")
    assert supported(network) is None
    assert_alike(network)
    assert len(steps) >= 30


@pytest.mark.parametrize("level", ["cpu.baseline", "cpu.avx2", "cpu.avx512vnni"])
def test_every_level(level, steps):
    if tailor_engine.ops.unavailable(level):
        pytest.skip(tailor_engine.ops.unavailable(level))
    network = quantized(tiny("qwen3", hidden=80, ffn=104, heads=4), bits=4, embedding_bits=4)
    with tailor_engine.backend(level):
        assert_alike(network)
    assert len(steps) >= 30


def test_several_threads(steps, monkeypatch):
    from tailor_engine.decode import _step

    monkeypatch.setattr(_step, "threads", lambda: 3)
    monkeypatch.setattr(_step, "SMALL_BLOCK", 0)
    assert_alike(quantized(tiny("gemma3"), bits=4), prompt=1)
    assert len(steps) >= 39


def test_pruned_shapes(steps):
    model = tiny("qwen3", heads=8, kv=4, ffn=96)
    network, family = model.network, model.family
    blocks = family.blocks_of(network)
    for part, rows in (("query", 32), ("key", 16), ("value", 16), ("gate", 41), ("up", 41)):
        weight = family.part(blocks[1], part).weight
        families.replace_linear(blocks[1], part, weight[:rows].clone())
    for part, columns in (("output", 32), ("down", 41)):
        weight = family.part(blocks[1], part).weight
        families.replace_linear(blocks[1], part, weight[:, :columns].clone())
    families.leave_out(family, blocks[0], "attention")
    families.leave_out(family, blocks[2], "mlp")
    families.write_shapes(network)
    for bits in (8, 4):
        assert_alike(quantized(model, bits=bits, eight_bits=["down", "key"]))
    families.leave_out(family, blocks[2], "attention")
    assert_alike(quantized(model))
    assert len(steps) >= 90


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_generate(family, steps, tmp_path):
    model = tiny(family)
    made = model.replace(network=quantized(model))
    tailor_engine.save(made, tmp_path / "model")
    network = tailor_engine.load(tmp_path / "model").network
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "pad_token_id": 0}
    greedy = network.generate(IDS[:, :9], do_sample=False, **options)
    assert len(steps) >= 11
    del network.forward
    assert torch.equal(network.generate(IDS[:, :9], do_sample=False, **options), greedy)
    assert Decoder(network).generate(IDS[0, :9].tolist(), 12) == greedy[0, 9:].tolist()


def test_what_generate_offers(steps):
    network = quantized(tiny("llama"))
    bare = copy.deepcopy(network)
    del bare.forward
    two = torch.cat((IDS[:, :9], IDS[:, 9:18]))
    padded = torch.ones_like(IDS[:, :9])
    padded[0, :3] = 0
    for ids, native, options in (
        (IDS[:, :9], True, {"do_sample": True, "temperature": 1.3}),
        (IDS[:, :9], True, {"prompt_lookup_num_tokens": 2}),
        (IDS[:, :9], False, {"num_beams": 3}),
        (two, False, {}),
        (IDS[:, :9], False, {"attention_mask": padded}),
        (IDS[:, :9], False, {"cache_implementation": "static", "disable_compile": True}),
        (IDS[:, :9], False, {"use_cache": False}),
    ):
        network.forward.stepper.open()
        del steps[:]
        outputs = []
        for each in (network, bare):
            torch.manual_seed(0)
            outputs.append(each.generate(ids, max_new_tokens=9, pad_token_id=0, **options))
        assert torch.equal(*outputs), options
        if "prompt_lookup_num_tokens" not in options:
            assert bool(steps) == native, options


@torch.inference_mode()
def test_cache_is_cropped_copied_and_reset(steps):
    network = quantized(tiny("llama"))
    cache = fresh(network)

    def follow(ids, cache):
        return [network(token[None, None], past_key_values=cache).logits.flatten() for token in ids]

    network(IDS[:, :8], past_key_values=cache)
    first = follow(IDS[0, 8:14], cache)
    twin = copy.deepcopy(cache)
    cache.crop(-6)
    again = follow(IDS[0, 8:14], cache)
    more = follow(IDS[0, 14:16], twin)
    assert cache.get_seq_length() == 14 and twin.get_seq_length() == 16
    torch.testing.assert_close(torch.stack(again), torch.stack(first))
    torch.testing.assert_close(torch.stack(follow(IDS[0, 14:16], cache)), torch.stack(more))
    network(IDS[:, 16:20], past_key_values=cache)  # several tokens at once, in between
    expected = plain(network)(IDS[:, :21], use_cache=False).logits[0, -1]
    assert torch.dist(follow(IDS[0, 20:21], cache)[0], expected) < 0.1 * expected.norm()
    cache.reset()
    network(IDS[:, :8], past_key_values=cache)
    torch.testing.assert_close(torch.stack(follow(IDS[0, 8:14], cache)), torch.stack(first))
    assert len(steps) >= 23


@torch.inference_mode()
def test_more_tokens_than_there_is_room_for(steps, monkeypatch):
    from tailor_engine.decode import _cache

    monkeypatch.setattr(_cache, "LEAST", 4)
    assert_alike(quantized(tiny("mistral")), prompt=2)
    assert len(steps) >= 38


@torch.inference_mode()
def test_a_network_that_changes(steps):
    network = quantized(tiny("llama"))
    cache = fresh(network)
    network(IDS[:, :8], past_key_values=cache)

    def count():
        del steps[:]
        network(IDS[:, 8:9], past_key_values=cache)
        return len(steps)

    count()
    assert count() == 1
    seen = []
    handle = network.model.layers[1].mlp.register_forward_hook(lambda *_: seen.append(1))
    assert count() == 0 and seen
    handle.remove()
    assert count() == 1
    network.train()
    assert count() == 0
    network.eval()
    with tailor_engine.backend("reference"):
        assert count() == 0
    mlp = network.model.layers[1].mlp
    dense = tiny("llama").network.model.layers[1].mlp.down_proj
    mlp.down_proj = dense
    assert count() == 0
    assert supported(network) == "block 1: its down is not quantized"
    with pytest.raises(UserError, match="down is not quantized"):
        Decoder(network)


@torch.inference_mode()
def test_hooks_see_every_token_and_no_other(steps):
    network = quantized(tiny("llama"))
    seen = []
    for register in (
        network.model.layers[1].mlp.register_forward_hook,
        torch.nn.modules.module.register_module_forward_pre_hook,
    ):
        del seen[:], steps[:]
        handle = register(lambda module, *_: seen.append(module))
        try:
            cache = fresh(network)
            for part in (IDS[:, :8], IDS[:, 8:9], IDS[:, 9:10]):
                network(part, past_key_values=cache)
        finally:
            handle.remove()
        assert not steps and seen.count(network.model.layers[1].mlp) == 3
        network(IDS[:, 10:11], past_key_values=cache)
        assert steps


@torch.inference_mode()
def test_a_parameter_that_is_replaced(steps):
    network = quantized(tiny("llama"))
    assert_alike(network)
    norm = network.model.layers[0].input_layernorm
    norm.weight = torch.nn.Parameter(3 * norm.weight, requires_grad=False)
    network.model.norm.weight = torch.nn.Parameter(network.model.norm.weight.flip(0))
    assert_alike(network)
    del steps[:]
    assert_alike(network)
    assert len(steps) >= 30


@torch.inference_mode()
def test_what_forward_is_asked_for(steps):
    network = quantized(tiny("llama"))
    cache = fresh(network)
    network(IDS[:, :8], past_key_values=cache)
    network(IDS[:, 8:9], past_key_values=cache, position_ids=torch.tensor([[8]]))
    del steps[:]
    network(IDS[:, 9:10], past_key_values=cache, position_ids=torch.tensor([[1 << 30]]))
    network.config.output_hidden_states = True
    output = network(IDS[:, 10:11], past_key_values=cache)
    assert len(output.hidden_states) == network.config.num_hidden_layers + 1 and not steps


@torch.inference_mode()
def test_an_interrupted_step_leaves_the_cache_as_it_was(steps, monkeypatch):
    from tailor_engine.decode import _step

    network, level = quantized(tiny("llama")), _step.kernels()
    cache = fresh(network)
    for part in (IDS[:, :8], IDS[:, 8:9]):
        network(part, past_key_values=cache)
    before = copy.deepcopy(cache)

    def interrupted(*arguments):
        level.decode_step(*arguments)
        raise KeyboardInterrupt

    native = types.SimpleNamespace(decode_step=interrupted, decode_bytes=level.decode_bytes)
    with monkeypatch.context() as patch:
        patch.setattr(_step, "kernels", lambda: native)
        with pytest.raises(KeyboardInterrupt):
            network(IDS[:, 20:21], past_key_values=cache)
    outputs = [network(IDS[:, 9:10], past_key_values=each).logits for each in (cache, before)]
    torch.testing.assert_close(*outputs)
    assert cache.get_seq_length() == 10 and len(steps) >= 3


def test_two_callers_at_once(steps):
    network = quantized(tiny("llama"))
    options = {"max_new_tokens": 20, "min_new_tokens": 20, "pad_token_id": 0, "do_sample": False}
    prompts = [IDS[:, 5 * i : 5 * i + 9] for i in range(4)]
    expected = [network.generate(prompt, **options) for prompt in prompts]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda prompt: network.generate(prompt, **options), prompts))
    assert all(map(torch.equal, found, expected))


@torch.inference_mode()
def test_copies_have_a_step_of_their_own(steps):
    network = quantized(tiny("llama"))
    twin, third = copy.deepcopy(network), pickle.loads(pickle.dumps(network))
    twin.model.norm.weight.mul_(2)
    assert twin.forward.network is twin and third.forward.network is third
    assert_alike(network)
    assert_alike(twin)
    assert_alike(third)


def test_gradients_go_the_long_way(steps):
    network = quantized(tiny("llama"))
    cache = fresh(network)
    network(IDS[:, :8], past_key_values=cache)
    network(IDS[:, 8:9], past_key_values=cache)
    assert not steps


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"skip": ["down"]}, "block 0: its down is not quantized"),
        ({"embedding_bits": 32}, "its embedding is not quantized"),
        ({"quantize_activations": False}, "its head reads activations that are not quantized"),
    ],
)
def test_reasons(changes, reason):
    network = quantized(tiny("llama"), **changes)
    assert supported(network) == reason
    with torch.inference_mode():
        cache = fresh(network)
        network(IDS[:, :8], past_key_values=cache)
        network(IDS[:, 8:9], past_key_values=cache)
    assert cache.get_seq_length() == 9


def test_gathered_tensors_are_what_they_were():
    from tailor_engine.decode._memory import gather

    a, b, c = torch.randn(100), torch.arange(33).half(), torch.empty(0)
    part, before = a[3:50], (a.clone(), b.clone())
    gather([a, part, b, part, c])
    assert torch.equal(a, before[0]) and torch.equal(b, before[1]) and c.numel() == 0
    a[3] = 7
    assert part[0] == 7
    assert b.data_ptr() - a.data_ptr() == 448
    assert len(pickle.dumps(b)) < 1000
