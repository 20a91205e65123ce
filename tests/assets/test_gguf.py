"""A quantized GGUF model as a folder of safetensors: what the quantization kept, and what it lost."""

import json

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from support.language import byte_tokenizer
from twinbench.assets.gguf import dequantized
from twinbench.assets.sources import fetch

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.layers.": "blk.",
}


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "tie_word_embeddings": True}
    return LlamaForCausalLM(LlamaConfig(**SIZES, **heads, vocab_size=len(byte_tokenizer()))).eval()


@pytest.fixture(scope="module")
def file(model, tmp_path_factory):
    """The model with its matrices in 8 bits, and its tokenizer."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(256)
    writer.add_embedding_length(64)
    writer.add_block_count(2)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(16)
    tokens = byte_tokenizer()
    vocabulary = sorted(tokens.get_vocab(), key=tokens.get_vocab().get)
    writer.add_vocab_size(len(vocabulary))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(vocabulary)
    writer.add_token_types([3 if at < 3 else 1 for at in range(len(vocabulary))])
    writer.add_token_merges(["t h"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template(tokens.chat_template)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        values = tensor.numpy()
        if name.endswith(("q_proj.weight", "k_proj.weight")):  # GGUF keeps the halves of a head's rotation interleaved
            values = values.reshape(4, 2, 8, 64).swapaxes(1, 2).reshape(64, 64)
        for theirs, ours in NAMES.items():
            name = name.replace(theirs, ours)
        if tensor.dim() == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_model_comes_back_up_to_its_quantization(model, file, tmp_path):
    folder = dequantized(file, tmp_path / "model")
    read = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    assert {p.suffix for p in folder.glob("[!.]*")} <= {".json", ".safetensors", ".jinja"}
    for name, tensor in model.state_dict().items():
        got = read.state_dict()[name]
        assert got.dtype == torch.float32
        assert torch.allclose(got, tensor, atol=float(tensor.abs().max()) / 120), name
    ids = torch.arange(20)[None]
    with torch.inference_mode():
        assert torch.allclose(read(ids).logits, model(ids).logits, atol=0.05)
    tokenizer, text = AutoTokenizer.from_pretrained(folder), "Who was it? Ünknown."
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text and tokenizer.chat_template
    stamp = (folder / "model.safetensors").stat().st_mtime_ns
    assert dequantized(file, folder) == folder and (folder / "model.safetensors").stat().st_mtime_ns == stamp


def test_a_gguf_source_is_fetched_dequantized(file, tmp_path, monkeypatch):
    monkeypatch.setenv("TWINBENCH_CACHE", str(tmp_path))
    folder = fetch({"path": str(file)})
    assert (folder / "model.safetensors").exists() and tmp_path in folder.parents


def test_a_file_that_is_no_gguf_is_refused_and_nothing_is_left(tmp_path):
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(np.arange(100, dtype=np.uint8).tobytes())
    with pytest.raises(ValueError, match=r"bad\.gguf is no GGUF model"):
        dequantized(bad, tmp_path / "model")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.gguf"]
