"""Files of caches whose layers differ: windows, chunks, states, convolutions and latents."""

import copy

import pytest
import torch
from transformers.cache_utils import LinearAttentionLayer

import longthink
from longthink.hf import DecodeStep
from longthink.hf.cachefile import read_cache_file, write_cache_file
from tests.families.tiny import tiny
from tests.models import prompt

KINDS = ("gemma3_text", "llama4_text", "qwen3_next", "lfm2", "falcon_h1", "deepseek_v3", "gemma4_text")
TIGHT = dict(policy="h2o:pin_prompt=True", decode_budget=8)
GREEDY = dict(max_new_tokens=9, do_sample=False)
IDS, MASK = prompt((40, 29))
IDS %= 90


@pytest.fixture(scope="module")
def models():
    return {kind: tiny(kind) for kind in KINDS}


@pytest.fixture(params=KINDS)
def model(request, models):
    return models[request.param]


def filled(model, ids=IDS, mask=MASK):
    """A cache after a prompt and some steps, and its text."""
    with longthink.make_cache(model, **TIGHT) as cache:
        text = model.generate(ids, attention_mask=mask, past_key_values=cache, **GREEDY)
    return cache, text


@pytest.fixture(scope="module")
def saved(models, tmp_path_factory):
    """Contents and tensors of a file, by family."""
    folder = tmp_path_factory.mktemp("saved")
    for kind in ("gemma3_text", "lfm2"):
        filled(models[kind])[0].save(folder / kind)
    return {kind: read_cache_file(folder / kind) for kind in ("gemma3_text", "lfm2")}


def goes_on(model, cache, text, mask=MASK):
    """Tokens of another turn."""
    text = torch.cat([text, torch.tensor([[5, 6, 7]] * len(text))], 1)
    mask = torch.cat([mask, torch.ones(len(text), text.shape[1] - mask.shape[1])], 1).long()
    with cache:
        return model.generate(text, attention_mask=mask, past_key_values=cache, **GREEDY).tolist()


def test_a_cache_from_a_file_goes_on_as_the_original(model, tmp_path):
    cache, text = filled(model)
    cache.save(tmp_path / "cache")
    expected = goes_on(model, cache, text)
    for _ in range(2):
        loaded = longthink.load_cache(model, tmp_path / "cache")
        assert loaded.kv_bytes > 0
        assert goes_on(model, loaded, text) == expected


@pytest.mark.slow
def test_steps_go_on_as_with_the_original(model, tmp_path):
    cache, _ = filled(model)
    cache.save(tmp_path / "cache")
    loaded = longthink.load_cache(model, tmp_path / "cache")
    assert loaded.kv_bytes_parts == cache.kv_bytes_parts
    found = []
    for one in (cache, loaded):
        with one:
            step = DecodeStep(model, one, compile=False)
            found.append([step(torch.tensor([[token], [3]])) for token in range(4, 14)])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


@pytest.mark.slow
def test_a_window_that_is_not_full_and_an_empty_cache(model, tmp_path):
    cache, text = filled(model, IDS[:, :5], torch.ones(2, 5).long())
    cache.save(tmp_path / "short")
    expected = goes_on(model, cache, text, torch.ones(2, 5))
    assert goes_on(model, longthink.load_cache(model, tmp_path / "short"), text, torch.ones(2, 5)) == expected
    with longthink.make_cache(model, **TIGHT) as empty:
        empty.save(tmp_path / "empty")
    with longthink.load_cache(model, tmp_path / "empty") as loaded:
        assert loaded.columns == loaded.rows == 0
        assert model.generate(IDS, attention_mask=MASK, past_key_values=loaded, **GREEDY).shape[1] == 49


# What is refused ------------------------------------------------------------------------------------------------


def refused(model, saved, path, change, match):
    contents, tensors = copy.deepcopy(saved)
    change(contents, tensors)
    write_cache_file(path, contents, tensors)
    with pytest.raises(longthink.CacheFileError, match=match):
        longthink.load_cache(model, path)


def keys_of(tensors, end):
    return sorted(name for name in tensors if name.startswith("natives") and name.endswith(end))


def one_slot_less(contents, tensors):
    for end, dim in (("keys_BKSD", 2), ("values_BKSD", 2), ("column_BS", 1)):
        name = keys_of(tensors, end)[0]
        tensors[name] = tensors[name].narrow(dim, 0, tensors[name].shape[dim] - 1)


def of(end, change):
    def edit(contents, tensors):
        name = keys_of(tensors, end)[0]
        tensors[name] = change(tensors[name])

    return edit


def counted(**counts):
    def edit(contents, tensors):
        contents["natives"]["0"].update(counts)

    return edit


FAULTS = {
    "a tensor less": (lambda c, t: t.pop(keys_of(t, "now_B")[0]), "tensor now_B is missing"),
    "another tensor": (lambda c, t: t.update({"natives.0.more": torch.ones(1)}), "more is not one of this"),
    "another window": (counted(size=9), "found a window of .*9.*expected .*8"),
    "chunks": (counted(chunked=True), "found a window of .*True"),
    "another count": (counted(columns=47), "expected a bool and 48 columns"),
    "not a count": (counted(columns="48"), "expected a bool and 48 columns"),
    "no windows": (lambda c, t: c.pop("natives"), "natives: found windows in layers .., expected"),
    "a window less": (lambda c, t: c["natives"].pop("0"), "natives: found windows in layers"),
    "fewer slots": (one_slot_less, "not the last columns"),
    "slots that differ": (of("keys_BKSD", lambda x: x[:, :, 1:]), "not the last columns"),
    "fewer heads": (of("keys_BKSD", lambda x: x[:, 1:]), "tensor keys_BKSD: found .*expected"),
    "one row": (of("keys_BKSD", lambda x: x[:1]), "tensor keys_BKSD: found .*expected"),
    "columns to come": (of("column_BS", lambda x: x + 8), "not the last columns"),
    "columns of long ago": (of("column_BS", lambda x: (x - 8).clamp(min=-1)), "not the last columns"),
    "columns elsewhere": (of("column_BS", lambda x: x.roll(1, 1)), "not the last columns"),
    "floating columns": (of("column_BS", torch.Tensor.float), "tensor column_BS: found"),
    "short columns": (of("column_BS", torch.Tensor.int), "tensor column_BS: found"),
    "a row behind": (of("now_B", lambda x: x - 1), "not the last columns"),
    "a late start": (of("start_B", lambda x: x + 100), "not the last columns"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_windows_that_do_not_fit_are_refused(models, saved, tmp_path, fault):
    refused(models["gemma3_text"], saved["gemma3_text"], tmp_path / "cache", *FAULTS[fault])


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda c, t: t.pop(keys_of(t, "conv_states.0")[0]), "conv_states.0 is missing"),
        (of("conv_states.0", lambda x: x[..., 1:]), "tensor conv_states.0: found"),
        (of("conv_states.0", lambda x: x[:1]), "tensor conv_states.0: found"),
        (of("conv_states.0", torch.Tensor.long), "tensor conv_states.0: found"),
    ],
)
def test_states_that_do_not_fit_are_refused(models, saved, tmp_path, change, match):
    refused(models["lfm2"], saved["lfm2"], tmp_path / "cache", change, match)


def test_layers_of_another_kind_are_refused(models, saved, tmp_path):
    other = copy.deepcopy(models["gemma3_text"])
    other.config.layer_types = ["full_attention"] * 2 + ["sliding_attention", "full_attention"]
    refused(
        other, saved["gemma3_text"], tmp_path / "cache", lambda *_: None, "expected the same for each of 3"
    )


def test_a_state_that_is_not_known_is_refused_before_anything_is_written(models, tmp_path):
    cache, _ = filled(models["lfm2"])
    layer = next(layer for layer in cache.layers if isinstance(layer, LinearAttentionLayer))
    layer.ssm_scales = torch.ones(2)
    with pytest.raises(
        longthink.UnsupportedFeatureError, match=r"LinearAttentionLayer.*ssm_scales.*deepcopy"
    ):
        cache.save(tmp_path / "cache")
    assert not [*tmp_path.iterdir()]
