"""Statistics of queries before RoPE: against hooks on the projections, in a file, and in tri_attention."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import longthink
from longthink.errors import StatsFileError
from longthink.hf.calibration import calibrate
from longthink.hf.query_stats import load_query_stats, save_query_stats
from longthink.kernels.rotation import Rotation, query_sums
from tests.models import build, prompt
from tests.variants import keep_first

TEXTS = [
    torch.randint(3, 97, (1, count), generator=torch.Generator().manual_seed(count)) for count in (23, 7)
]


@pytest.fixture(scope="module")
def model():
    return build("qwen2", num_hidden_layers=2)


@pytest.fixture(scope="module")
def made(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("stats") / "stats.safetensors"
    save_query_stats(path, model, *calibrate(model, TEXTS))
    return path


def queries_before_rope(model, ids):
    """What the projections of the queries return: no RoPE has touched it. Shape of a layer: tokens, H, D."""
    found = []

    def keep(module, args, out):
        found.append(out[0].unflatten(-1, (model.config.num_attention_heads, -1)))

    hooks = [layer.self_attn.q_proj.register_forward_hook(keep) for layer in model.model.layers]
    with torch.no_grad():
        model(ids)
    for hook in hooks:
        hook.remove()
    return found


def test_means_are_those_of_the_projections(model):
    means, tokens = calibrate(model, TEXTS)
    assert tokens == 30
    wanted = [
        torch.cat(layers) for layers in zip(*(queries_before_rope(model, ids) for ids in TEXTS), strict=True)
    ]
    for mean_H3F, query_NHD in zip(means, wanted, strict=True):
        real, imaginary = query_NHD.chunk(2, -1)
        expected = torch.stack([x.mean(0) for x in (real, imaginary, torch.hypot(real, imaginary))], 1)
        torch.testing.assert_close(mean_H3F, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("chunk", [21, 5])
def test_a_cache_keeps_the_means_of_each_row_of_a_padded_batch(model, chunk):
    ids, mask = prompt((21, 9), seed=3)
    place = (mask.cumsum(1) - 1).clamp(min=0)
    with longthink.make_cache(model, policy="tri_attention", decode_budget=16) as cache, torch.no_grad():
        with cache.begin_chunked_prefill(21):
            for first in range(0, 21, chunk):
                part, seen = slice(first, first + chunk), mask[:, : first + chunk]
                model(ids[:, part], attention_mask=seen, position_ids=place[:, part], past_key_values=cache)
        for row, count in enumerate((21, 9)):
            alone, _ = calibrate(model, [ids[row : row + 1, 21 - count :]])
            for layer, mean_H3F in zip(cache.layers, alone, strict=True):
                kept = layer.slots.store.table.query_stats_BH3F[row].float()
                torch.testing.assert_close(kept, mean_H3F, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("order", [None, [0, 2, 4, 6, 1, 3, 5, 7]])
def test_sums_take_rotation_and_layout_back(order):
    torch.manual_seed(0)
    rotation = Rotation(torch.tensor([1.0, -0.3, 0.01, 0.5]), None if order is None else torch.tensor(order))
    plain, position = (
        torch.randn(2, 3, 4, 8, dtype=torch.float64),
        torch.tensor([[-1, 0, 1, 2], [5, 6, 7, 8]]),
    )
    real, imaginary = rotation.paired(plain).chunk(2, -1)
    angle = position[:, None, :, None] * rotation.inv_freq_D.double()
    turned = torch.cat(
        [real * angle.cos() - imaginary * angle.sin(), imaginary * angle.cos() + real * angle.sin()], -1
    )
    sums = query_sums(rotation.unpaired(turned), position, rotation)
    plain[0, :, 0], real[0, :, 0], imaginary[0, :, 0] = 0, 0, 0  # padding
    expected = [x.sum(2) for x in (real, imaginary, torch.hypot(real, imaginary))]
    torch.testing.assert_close(sums, torch.stack(expected, 2), atol=1e-9, rtol=1e-9)


def test_a_file_comes_back_and_decides(model, made):
    means, _ = calibrate(model, TEXTS)
    for mine, theirs in zip(load_query_stats(made, model), means, strict=True):
        assert torch.equal(mine, theirs)
    ids, mask = prompt((33, 20))
    tokens, kept = {}, {}
    for policy in ("tri_attention:window=4", f"tri_attention:window=4:stats={made}"):
        with longthink.make_cache(model, policy=policy, decode_budget=12) as cache:
            tokens[policy] = model.generate(
                ids,
                attention_mask=mask,
                past_key_values=cache,
                max_new_tokens=60,
                do_sample=False,
                eos_token_id=None,
            )
            kept[policy] = [cache.resident_positions(layer) for layer in range(2)]
            assert cache.num_evicted > 0
    first, second = kept.values()
    assert first != second, "the file changes nothing"


def test_a_saved_cache_with_calibrated_means_goes_on(model, made, tmp_path):
    ids, _ = prompt((20,))
    with (
        longthink.make_cache(model, policy=f"tri_attention:stats={made}", decode_budget=8) as cache,
        torch.no_grad(),
    ):
        model(ids, past_key_values=cache)
        cache.save(tmp_path / "cache")
    again = longthink.load_cache(model, tmp_path / "cache")
    for mine, theirs in zip(again.layers, cache.layers, strict=True):
        pair = [layer.slots.store.table.query_stats_BH3F for layer in (mine, theirs)]
        assert torch.equal(*pair)
    again.close()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda tensors, metadata: metadata.update(format="longthink.cache"),
            "found format 'longthink.cache'",
        ),
        (lambda tensors, metadata: metadata.update(format_version="2"), "in version 2, expected"),
        (lambda tensors, metadata: metadata.update(model="{"), "does not say which model"),
        (lambda tensors, metadata: tensors.pop("layer.1"), "expected one for each of 2 layers"),
        (lambda tensors, metadata: tensors.update({"layer.0": torch.zeros(4, 3, 7)}), r"shape \(4, 3, 7\)"),
        (lambda tensors, metadata: tensors["layer.0"].fill_(torch.nan), "expected finite float32"),
    ],
)
def test_a_wrong_file_is_refused_with_the_reason(model, made, tmp_path, change, message):
    from safetensors import safe_open

    with safe_open(made, "pt") as file:
        metadata = file.metadata()
    tensors, path = load_file(made), tmp_path / "changed.safetensors"
    change(tensors, metadata)
    save_file(tensors, path, metadata)
    with pytest.raises(StatsFileError, match=message) as refusal:
        longthink.make_cache(model, policy=f"tri_attention:stats={path}", decode_budget=8)
    assert str(path) in str(refusal.value)


def test_a_file_of_another_model_is_refused_and_of_another_number_format_is_not(model, made):
    other = build("qwen2", seed=1, num_hidden_layers=2)
    with pytest.raises(StatsFileError, match="holds no statistics for this model"):
        load_query_stats(made, other)
    assert len(load_query_stats(made, build("qwen2", num_hidden_layers=2).to(torch.bfloat16))) == 2


@pytest.mark.parametrize(
    ("name", "message"), [("none", "cannot read"), ("text", "is damaged or not a safetensors")]
)
def test_a_file_that_is_none_is_refused(model, tmp_path, name, message):
    path = tmp_path / name
    if name == "text":
        path.write_text("no statistics")
    with pytest.raises(StatsFileError, match=message):
        longthink.make_cache(model, policy=f"tri_attention:stats={path}", decode_budget=8)


def test_nothing_to_read_is_an_error(model):
    with pytest.raises(StatsFileError, match="expected at least one token"):
        calibrate(model, [])


def test_a_wrapper_that_hides_the_file_is_refused(model, made):
    wrapped = keep_first()(steps=2, page_size=1, then=longthink.TriAttention(stats=str(made)))
    with pytest.raises(longthink.UnsupportedFeatureError, match="must also be `Calibrated`"):
        longthink.make_cache(model, policy=wrapped, decode_budget=8)


@pytest.mark.parametrize("path", ["", "a:b", "(a)", 3])
def test_a_path_that_a_spec_cannot_hold_is_refused(path):
    with pytest.raises(ValueError, match=r"stats=.* must be a path without colons"):
        longthink.TriAttention(stats=path)


def test_the_metadata_says_where_the_numbers_come_from(made):
    from safetensors import safe_open

    with safe_open(made, "pt") as file:
        metadata = file.metadata()
    assert (metadata["tokens"], metadata["longthink"]) == ("30", longthink.__version__)
    assert json.loads(metadata["model"])["class"] == "Qwen2ForCausalLM"
