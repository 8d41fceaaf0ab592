"""Tiny random models of every family, with a real byte-level tokenizer; no network, no files."""

from __future__ import annotations

import functools

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from tailor_engine import families
from tailor_engine.model import Model

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "smollm3")

SENTENCES = [
    "The quick brown fox jumps over the lazy dog and the dog does not mind at all.",
    "def add(left, right): return left + right",
    "A list holds its items in order; a set holds each of its items once.",
    "The function returns None when the key is not in the dictionary.",
    "What does the method do? It returns the number of items in the list.",
    "Open the file, read every line, and close the file when the work is done.",
    "Numbers such as 0, 1, 2, 34 and 567 are integers; 3.14 is a float.",
    "Élodie mesure 180 µm, naïvely: ça va.",
]

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}</s>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

_CONFIGS = {
    "llama": ("LlamaConfig", {"tie_word_embeddings": True}),
    "mistral": ("MistralConfig", {"sliding_window": 16}),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {"tie_word_embeddings": False}),
    "gemma2": ("Gemma2Config", {"sliding_window": 16, "query_pre_attn_scalar": 16}),
    "smollm3": ("SmolLM3Config", {"tie_word_embeddings": True}),
    "gemma3": ("Gemma3TextConfig", {"sliding_window": 16, "query_pre_attn_scalar": 16}),
}


@functools.lru_cache
def _trained(vocabulary: int) -> str:
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES * 4, trainer)
    return tokenizer.to_str()


def tiny_tokenizer(vocabulary: int = 320) -> transformers.PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer (any text round-trips) with a chat template."""
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained(vocabulary)),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        model_max_length=2048,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def tiny_config(
    family_name: str = "llama",
    layers: int = 3,
    vocabulary: int = 320,
    hidden: int = 64,
    ffn: int = 128,
    heads: int = 4,
    kv: int = 2,
):
    """Return the transformers config of a tiny model."""
    class_name, extra = _CONFIGS[family_name]
    extra = dict(extra)
    if family_name in ("gemma2", "gemma3"):
        kinds = ["sliding_attention", "full_attention"]
        extra["layer_types"] = [kinds[index % 2] for index in range(layers)]
    return getattr(transformers, class_name)(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        head_dim=hidden // heads,
        max_position_embeddings=2048,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **extra,
    )


def tiny(family_name: str = "llama", *, seed: int = 0, vocabulary: int = 320, **shape) -> Model:
    """Return a random Model of a family; `shape` as in `tiny_config`.

    Weights are larger than a fresh initialisation's and norms are not all ones, so that logits are
    far from flat and a mistake in any part shows in them.
    """
    config = tiny_config(family_name, vocabulary=vocabulary, **shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for name, parameter in network.named_parameters():
            if "norm" in name:
                parameter.data += 0.1 * torch.randn_like(parameter)
            elif name.endswith("bias"):
                parameter.data = 0.1 * torch.randn_like(parameter)
            else:
                parameter.data *= 4
    return Model(
        network=network.eval(),
        tokenizer=tiny_tokenizer(vocabulary),
        family=families.find(config),
        source=f"tiny:{family_name}",
    )
