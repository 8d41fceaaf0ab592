"""Families, structure changes, and folders that load again in a new process."""

import copy
import json
import os
import pickle
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import tailor_engine
from tailor_engine import families
from tailor_engine.errors import UserError
from tailor_engine.families import PARTS
from tailor_engine.io import files, models
from tailor_engine.stages.prune.cut import cut_channels, cut_heads
from tests.shapes import IDS, PLAIN, logits_of, variants
from tests.tiny import FAMILIES, tiny

# In a new process: the plain folders with transformers alone, then all of them with us.
RELOAD = """
import json, sys, torch, transformers
transformers.utils.logging.set_verbosity_error()
torch.set_num_threads(1)
Auto, ids = transformers.AutoModelForCausalLM, torch.load(sys.argv[2])
logits, refused = {}, {}
for name, folder in json.loads(sys.argv[1]).items():
    try:
        with torch.inference_mode():
            logits["stock", name] = Auto.from_pretrained(folder)(ids).logits
    except Exception as error:
        refused[name] = type(error).__name__
assert "tailor_engine" not in sys.modules
import tailor_engine
for name, folder in json.loads(sys.argv[1]).items():
    model = tailor_engine.load(folder)
    with torch.inference_mode():
        logits["ours", name] = model.network(ids).logits
        if "quantized" not in name:
            logits["auto", name] = Auto.from_pretrained(folder)(ids).logits
torch.save((logits, refused), sys.argv[3])
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Save every variant of every family and load them all in one new process."""
    root = tmp_path_factory.mktemp("models")
    expected, folders = {}, {}
    for family_name in FAMILIES:
        for variant, model in variants(family_name).items():
            name = f"{family_name}.{variant}"
            folders[name] = str(root / name)
            models.save(model, folders[name])
            expected[name] = logits_of(model.network)
    torch.save(IDS, root / "ids")
    command = [sys.executable, "-c", RELOAD, json.dumps(folders), root / "ids", root / "logits"]
    subprocess.run(command, check=True, cwd=root, env=os.environ | path_to_us(), timeout=300)
    logits, refused = torch.load(root / "logits")
    return folders, expected, logits, refused


def path_to_us():
    root = os.path.dirname(os.path.dirname(tailor_engine.__file__))
    return {"PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}


def test_every_structure_gives_the_same_logits_in_a_new_process(saved):
    folders, expected, logits, _ = saved
    for name in folders:
        ways = ["ours"] if name.endswith("quantized") else ["ours", "auto"]
        for way in ways:
            torch.testing.assert_close(logits[way, name], expected[name], atol=1e-6, rtol=0)


def test_plain_folders_load_in_stock_transformers_and_others_are_refused(saved):
    folders, expected, logits, refused = saved
    for name in folders:
        variant = name.split(".", 1)[1]
        if variant in PLAIN:
            torch.testing.assert_close(logits["stock", name], expected[name], atol=1e-6, rtol=0)
        elif variant == "mixed":  # which of the two depends on what the config itself looks at
            assert refused[name] in ("AmbiguousGlobalPerLayerAttributeError", "RuntimeError")
        elif variant == "layered":
            assert refused[name] == "AmbiguousGlobalPerLayerAttributeError"
        else:
            assert refused[name] == "OSError"  # no file model.safetensors


def test_config_holds_nothing_but_transformers_own_fields(saved):
    folders, *_ = saved
    for family_name in FAMILIES:
        plain, layered = (
            files.read_json(f"{folders[f'{family_name}.{variant}']}/config.json")
            for variant in ("dropped", "layered")
        )
        assert layered.keys() - plain.keys() == {"per_layer_config"}
        assert layered["per_layer_config"] == {
            "0": {"intermediate_size": 96},
            "2": {"intermediate_size": 80},
        }
        assert layered["architectures"] == plain["architectures"]
        assert layered["architectures"][0] == type(tiny(family_name).network).__name__
        assert plain["num_hidden_layers"] == 3
        assert len(plain.get("layer_types") or [0] * 3) == 3
        mixed = files.read_json(f"{folders[f'{family_name}.mixed']}/config.json")
        access = "allow_global_per_layer_attribute_access"
        assert mixed.keys() - plain.keys() == {"per_layer_config", access}
        assert mixed["per_layer_config"]["0"]["skip"] == ["attention"]
        assert mixed["per_layer_config"]["2"]["skip"] == ["mlp"]
        heads = mixed["num_attention_heads"], mixed["num_key_value_heads"]
        assert heads in ((4, 2), (2, 2))


@pytest.mark.parametrize("family_name", FAMILIES)
def test_parts_are_found_and_make_the_logits(family_name):
    model = tiny(family_name)
    network, family = model.network, model.family
    assert family is families.find(network.config) and family.name == family_name
    assert [part for index, part, _ in family.linears(network) if index == 2] == list(PARTS)
    block = family.blocks_of(network)[0]
    norms = [getattr(family, name) for name in vars(family) if name.endswith("_norm")]
    norms.remove(family.final_norm)
    found = {name for name, _ in block.named_modules() if "norm" in name}
    assert found == {name for name in norms if name}
    with torch.inference_mode():
        hidden = family.body_of(network)(IDS, use_cache=False).last_hidden_state
        logits = hidden @ family.head_weight(network).T
        cap = family.softcap(network.config)
        logits = cap * torch.tanh(logits / cap) if cap else logits
    torch.testing.assert_close(logits, logits_of(network), atol=1e-5, rtol=1e-5)
    assert (cap > 0) == (family_name == "gemma2")
    assert model.size_bytes == 4 * model.parameters


@pytest.mark.parametrize("family_name", FAMILIES)
def test_generation_with_the_cache_after_surgery(family_name):
    for name, model in variants(family_name).items():
        network = model.network
        settings = {"max_new_tokens": 8, "do_sample": False}
        cached = network.generate(IDS[:1], **settings)
        if (
            "quantized" not in name
        ):  # its activations are rounded by token: rows differ in the last bit
            assert torch.equal(cached, network.generate(IDS[:1], use_cache=False, **settings))
        assert network.config.num_hidden_layers == len(model.family.blocks_of(network))


def test_a_layered_network_is_built_copied_and_pickled():
    layered = variants("qwen3")["layered"].network
    built = tailor_engine.families._layered.layered(type(layered))(copy.deepcopy(layered.config))
    assert families.find(built.config).widths(built) == [96, 128, 80]
    assert 0 < built.model.layers[0].mlp.up_proj.weight.std() < 0.05  # transformers' own start
    built.load_state_dict(layered.state_dict())
    for twin in (built, copy.deepcopy(built), pickle.loads(pickle.dumps(built))):
        assert torch.equal(logits_of(twin.eval()), logits_of(layered))
    for wrong, words in (
        ({"head_dim": 8}, "head_dim cannot differ between blocks of qwen3"),
        ({"skip": ["norm"]}, "skip may name attention and mlp, got norm"),
    ):
        built.config.per_layer_config = {0: wrong}
        with pytest.raises(UserError, match=words):
            type(built)(built.config)


def test_surgery_refuses_what_does_not_fit():
    model = tiny("llama")
    blocks = model.family.blocks_of(model.network)
    with pytest.raises(ValueError, match=r"down: expected weight \[N, K\]"):
        families.replace_linear(blocks[0], "down", torch.zeros(3))
    with pytest.raises(KeyError, match="no part named"):
        families.replace_linear(blocks[0], "nothing", torch.zeros(3, 3))
    for kept in ([], [1, 0], [0, 3], [-1]):
        with pytest.raises(ValueError, match="kept blocks"):
            families.drop_blocks(model.network, kept)
    with pytest.raises(ValueError, match="rows of heads that share keys"):
        cut_heads(model.family, blocks[0], torch.tensor([[1, 2]]), None)
    with pytest.raises(ValueError, match="sub-layer attention or mlp, got 'norm'"):
        families.leave_out(model.family, blocks[0], "norm")
    families.replace_linear(blocks[1], "down", torch.zeros(64, 96))
    with pytest.raises(ValueError, match="block 1: gate has 128 rows"):
        families.write_shapes(model.network)
    cut_channels(model.family, blocks[1], torch.arange(96), torch.zeros(64, 96))
    families.replace_linear(blocks[1], "key", torch.zeros(48, 64))
    with pytest.raises(ValueError, match="block 1: 4 query heads, 3 key-value heads"):
        families.write_shapes(model.network)
    with pytest.raises(UserError, match=r"'gpt2' is not supported; known: gemma2.*qwen3"):
        families.find(SimpleNamespace(model_type="gpt2"))
