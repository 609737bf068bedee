"""A whole model folder of a few kilobytes, with a real byte-level BPE tokenizer and a ChatML template."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
DEFAULT_SYSTEM = "You are Tiny, a default nobody asked for."
CHATML = (
    "{%- if messages[0]['role'] != 'system' %}{{- '<|im_start|>system\n"
    + DEFAULT_SYSTEM
    + "<|im_end|>\n' }}{%- endif %}"
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
_TEXTS = [
    "Solve the problem step by step, then give the final number after 'The answer is'.",
    "system user assistant Tom has three apples and gives two of them to Ann. How many apples are left?",
    "def f(x):\n    return x + 1\n\nprint(f(2))\n\n\nDone.",
]
_QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def tiny_tokenizer() -> Tokenizer:
    """Pre-tokenises like Qwen2; a thousand merges at most, learned from a few sentences."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_QWEN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1_000,
        show_progress=False,
        special_tokens=[AddedToken(text, special=True, normalized=False) for text in SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(_TEXTS * 3, trainer)
    return tokenizer


def tiny_folder(folder: Path, *, hidden_size: int = 16, template: str = CHATML) -> Path:
    """Writes config, weights (the embedding table only), tokenizer, chat template and stop ids."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = tiny_tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(template)
    size = tokenizer.get_vocab_size()
    table = np.random.default_rng(0).normal(0, 0.02, (size, hidden_size)).astype(np.float32)
    save_file({"model.embed_tokens.weight": table}, folder / "model.safetensors")
    _write(
        folder / "config.json",
        {"model_type": "tiny", "vocab_size": size, "hidden_size": hidden_size, "eos_token_id": 2},
    )
    _write(folder / "generation_config.json", {"eos_token_id": [2, 0]})
    _write(folder / "tokenizer_config.json", {"bos_token": None, "eos_token": "<|im_end|>"})
    return folder


def _write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value))
