"""Adapters exchanged with the peft library itself, on a tiny random model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from service.core.artifact import Artifact, decode, encode
from service.core.peft import CONFIG, WEIGHTS, from_peft, to_peft
from service.errors import InvalidArtifact
from tests.tiny import tiny_tokenizer

D = 16


@pytest.fixture(scope="module")
def base() -> Artifact:
    text = "Solve the problem step by step."
    ids = tuple(tiny_tokenizer().encode(text).ids)
    rows = np.random.default_rng(0).normal(0, 0.02, (len(ids), D)).astype(np.float32)
    return Artifact("math", 0, 0, "tiny", "r", "f" * 64, text, ids, np.zeros_like(rows), rows)


@pytest.fixture(scope="module")
def learned(base: Artifact) -> Artifact:
    offset = np.random.default_rng(1).normal(0, 0.01, base.anchor.shape).astype(np.float32)
    return replace(base, version=4, parent=3, offset=offset, refiner="gradient")


def config(**changes: Any) -> bytes:
    return json.dumps({"peft_type": "PROMPT_TUNING"} | changes).encode()


def test_there_and_back_is_the_same_offset(base, learned):
    back = from_peft(*to_peft(learned), base)
    assert np.abs(back.offset - learned.offset).max() < 1e-8
    assert (back.task, back.anchor_ids, back.refiner) == (base.task, base.anchor_ids, "peft")
    assert decode(encode(back)).settings == {"base_model_name_or_path": "tiny"}
    assert not from_peft(*to_peft(base), base).offset.any(), "the anchor itself is the zero offset"


@pytest.mark.parametrize(("dtype", "error"), [(np.float32, 0), (np.float16, 1e-4)])
def test_half_precision_is_read(base, dtype, error):
    soft = (base.anchor + np.float32(0.01)).astype(dtype)
    made = from_peft(config(), save({"prompt_embeddings": soft}), base)
    assert np.abs(made.offset - 0.01).max() <= error + 1e-7
    assert made.offset.dtype == np.float32


def test_what_does_not_fit_is_refused_naming_both(base):
    k = len(base.anchor)
    with pytest.raises(InvalidArtifact, match=f"{k + 2} virtual tokens; the anchor of 'math' has {k}"):
        from_peft(config(), save({"prompt_embeddings": np.zeros((k + 2, D), np.float32)}), base)
    with pytest.raises(InvalidArtifact, match="have 8 values; those of tiny have 16"):
        from_peft(config(), save({"prompt_embeddings": np.zeros((k, 8), np.float32)}), base)
    good = save({"prompt_embeddings": base.anchor})
    with pytest.raises(InvalidArtifact, match="peft_type is 'LORA'"):
        from_peft(config(peft_type="LORA"), good, base)
    for broken in (b"[]", b"{", b"\xff"):
        with pytest.raises(InvalidArtifact, match=CONFIG):
            from_peft(broken, good, base)
    for weights in (b"", b"garbage" * 10):
        with pytest.raises(InvalidArtifact, match=WEIGHTS):
            from_peft(config(), weights, base)
    with pytest.raises(InvalidArtifact, match="holds \\['x'\\], not 'prompt_embeddings'"):
        from_peft(config(), save({"x": base.anchor}), base)
    with pytest.raises(InvalidArtifact, match="I64"):
        from_peft(config(), save({"prompt_embeddings": np.zeros((k, D), np.int64)}), base)


def tiny_llama() -> Any:
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    shape = {"hidden_size": D, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    made = transformers.LlamaConfig(vocab_size=tiny_tokenizer().get_vocab_size(), num_key_value_heads=2, **shape)
    return transformers.LlamaForCausalLM(made)


def test_the_peft_library_loads_our_export(learned, tmp_path: Path):
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    for name, data in zip((CONFIG, WEIGHTS), to_peft(learned), strict=True):
        (tmp_path / name).write_bytes(data)
    model = peft.PeftModel.from_pretrained(tiny_llama(), str(tmp_path))
    theirs = model.get_prompt(batch_size=1)[0].detach().numpy()
    assert np.array_equal(theirs, learned.anchor + learned.offset)
    ids = torch.tensor([[5, 6, 7]])
    assert model(input_ids=ids).logits.shape[:2] == (1, len(learned.anchor) + 3), "and runs with it"


def test_we_load_what_the_peft_library_saved(base, tmp_path: Path):
    peft = pytest.importorskip("peft")
    made = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=len(base.anchor))
    model = peft.get_peft_model(tiny_llama(), made)
    model.save_pretrained(str(tmp_path))
    artifact = from_peft((tmp_path / CONFIG).read_bytes(), (tmp_path / WEIGHTS).read_bytes(), base)
    theirs = model.get_prompt(batch_size=1)[0].detach().numpy()
    assert np.allclose(artifact.anchor + artifact.offset, theirs, atol=1e-6)
