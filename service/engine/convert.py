"""GGUF file -> Hugging Face model folder: `python -m service.engine.convert GGUF FOLDER`.

Runs in a process of its own, so that the memory it takes is given back. Weights become bfloat16 safetensors. What a
GGUF file does not carry is put right: the normalizer and digit splitting of the tokenizer, and the stop ids.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

_END_TOKENS = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|end|>", "</s>")


def convert(gguf: Path, folder: Path) -> None:
    """Writes config, generation config, weights, tokenizer and chat template to `folder`."""
    from gguf import GGUFReader
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    kind = GGUFReader(str(gguf)).fields["tokenizer.ggml.pre"].contents()
    where: dict[str, Any] = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    AutoTokenizer.from_pretrained(**where).save_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(
        **where, quantization_config=GgufConfig(dequantize=True), dtype="bfloat16"
    )
    model.save_pretrained(folder)
    _edit(folder / "tokenizer.json", lambda spec: _tokenizer_as_trained(spec, kind))
    stops = _stop_ids(json.loads((folder / "tokenizer.json").read_bytes()), model.config.eos_token_id)
    _edit(folder / "generation_config.json", lambda config: config | {"eos_token_id": stops})


def _tokenizer_as_trained(spec: dict[str, Any], kind: str) -> dict[str, Any]:
    """The tokenizer as its authors published it; `kind` is GGUF's name of the pre-tokenizer."""
    if kind == "qwen2":
        return spec | {"normalizer": {"type": "NFC"}}
    if kind == "smollm":
        split = {"type": "Digits", "individual_digits": True}
        return spec | {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, spec["pre_tokenizer"]]}}
    return spec


def _stop_ids(spec: dict[str, Any], own: int | list[int] | None) -> list[int]:
    """The model's own end-of-sequence ids first, then every other token that ends a turn or a text."""
    ids = {token["content"]: token["id"] for token in spec["added_tokens"]}
    known = own if isinstance(own, list) else [] if own is None else [own]
    return list(dict.fromkeys([*known, *(ids[name] for name in _END_TOKENS if name in ids)]))


def _edit(path: Path, change: Any) -> None:
    path.write_text(json.dumps(change(json.loads(path.read_bytes())), ensure_ascii=False, indent=2), "utf-8")


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
