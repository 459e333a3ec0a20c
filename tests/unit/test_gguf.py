"""Models from GGUF files, which transformers turns into ordinary ones."""

import numpy as np
import pytest
import torch

import longthink
from longthink.models import load_config, load_model

gguf = pytest.importorskip("gguf")
WORDS, WIDTH, HEADS = 40, 32, 4


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A tiny Llama with a byte-level tokenizer, in float32."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    drawn = np.random.default_rng(0)
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(1)
    writer.add_feed_forward_length(48)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(WORDS)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*(chr(ord("!") + i) for i in range(WORDS - 1)), "!!"])
    writer.add_token_types([1] * WORDS)
    writer.add_token_merges(["! !"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    shapes = {
        "token_embd": (WORDS, WIDTH),
        "output_norm": (WIDTH,),
        "output": (WORDS, WIDTH),
        "blk.0.attn_norm": (WIDTH,),
        "blk.0.attn_q": (WIDTH, WIDTH),
        "blk.0.attn_k": (WIDTH // 2, WIDTH),
        "blk.0.attn_v": (WIDTH // 2, WIDTH),
        "blk.0.attn_output": (WIDTH, WIDTH),
        "blk.0.ffn_norm": (WIDTH,),
        "blk.0.ffn_gate": (48, WIDTH),
        "blk.0.ffn_up": (48, WIDTH),
        "blk.0.ffn_down": (WIDTH, 48),
    }
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", drawn.standard_normal(shape, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.slow
def test_a_file_is_loaded_like_any_other_model(path):
    loaded = load_model(str(path), device="cpu")
    model = loaded.model
    expected = np.random.default_rng(0).standard_normal((WORDS, WIDTH), dtype=np.float32)
    assert np.array_equal(model.get_input_embeddings().weight.detach().numpy(), expected)
    assert (model.dtype, load_config(str(path)).num_key_value_heads) == (torch.float32, 2)
    ids = torch.tensor([[5, 6, 7]])
    greedy = dict(max_new_tokens=4, do_sample=False)
    assert torch.equal(longthink.generate(model, ids, budget=64, **greedy), model.generate(ids, **greedy))


def test_what_is_not_there_or_is_no_gguf_says_so(tmp_path):
    with pytest.raises(ValueError, match="there is no such file"):
        load_model(str(tmp_path / "none.gguf"))
    (tmp_path / "bad.gguf").write_bytes(b"nothing of the kind, and longer than a magic number")
    with pytest.raises(ValueError, match="cannot be read as GGUF"):
        load_model(str(tmp_path / "bad.gguf"))
