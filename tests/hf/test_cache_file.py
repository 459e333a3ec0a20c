"""The file of a cache: whatever is wrong with it is an error that says so."""

import copy
import itertools
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import longthink
from longthink.hf.cachefile import checksum, read_cache_file, write_cache_file
from tests.models import build, prompt

pytestmark = pytest.mark.usefixtures("model_is_left_alone")


def filled(model, policy="milestone:page_size=4:young=8:alpha=0.1", lengths=(9, 23), **options):
    """A cache after evictions."""
    ids, mask = prompt(lengths)
    options = options or {"budget": 48}
    with longthink.make_cache(model, policy=policy, **options) as cache:
        model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=40, do_sample=False)
    return cache


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "cache.safetensors"
    filled(model).save(path)
    return path


def refused(model, path, match, **options):
    with pytest.raises(longthink.CacheFileError, match=match) as caught:
        longthink.load_cache(model, path, **options)
    assert str(path) in str(caught.value)


# Damage ---------------------------------------------------------------------------------------------------------


def test_a_file_cut_off_anywhere_is_refused(model, saved, tmp_path):
    data, path = saved.read_bytes(), tmp_path / "cut"
    header = 8 + int.from_bytes(data[:8], "little")
    for size in (0, 4, 8, 20, header // 2, header, header + 1, (header + len(data)) // 2, len(data) - 1):
        path.write_bytes(data[:size])
        refused(model, path, "damaged or not a safetensors file")
    path.write_bytes(data + b"\0")
    refused(model, path, "damaged or not a safetensors file")


def test_a_flipped_bit_is_refused_wherever_it_is(model, saved, tmp_path):
    data, path, generator = saved.read_bytes(), tmp_path / "flipped", torch.Generator().manual_seed(0)
    header = 8 + int.from_bytes(data[:8], "little")
    places = [torch.randint(low, high, (count,), generator=generator).tolist() for low, high, count in (
        (0, 8, 20), (8, header, 400), (header, len(data), 50),
    )]  # fmt: skip
    for i, place in enumerate(itertools.chain(*places)):
        flipped = bytearray(data)
        flipped[place] ^= 1 << i % 8
        path.write_bytes(flipped)
        refused(model, path, "damaged|expected|version|checksum|not JSON")


def test_other_files_are_refused(model, saved, tmp_path):
    path = tmp_path / "other"
    refused(model, path, "cannot read the cache.*No such file")
    refused(model, tmp_path, "cannot read the cache")
    path.write_text("a text, which is no cache")
    refused(model, path, "damaged or not a safetensors file")
    save_file({"weight": torch.ones(3)}, path)
    refused(model, path, "found format=None, expected 'longthink.cache'")
    save_file({"weight": torch.ones(3)}, path, {"format": "pt"})
    refused(model, path, "found format='pt', expected 'longthink.cache'")


def test_another_version_of_the_format_is_named(model, saved, tmp_path):
    with safe_open(saved, "pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    metadata |= {"format_version": "7", "longthink": "9.1"}
    save_file(tensors, tmp_path / "newer", metadata)
    refused(model, tmp_path / "newer", r"format version 7, written by longthink 9\.1.*reads version 1")
    metadata |= {"format_version": "1"}
    save_file(tensors, tmp_path / "edited", metadata)
    refused(model, tmp_path / "edited", "checksum does not match")
    del metadata["sha256"]
    save_file(tensors, tmp_path / "edited", metadata | {"sha256": checksum(metadata, tensors)})
    longthink.load_cache(model, tmp_path / "edited").close()


# Files that are whole and wrong ---------------------------------------------------------------------------------


def changed(saved, path, change):
    """A copy of the file with `change` made to its contents and tensors, and a checksum that fits."""
    contents, tensors = read_cache_file(saved)
    change(contents, tensors)
    write_cache_file(path, contents, tensors)
    return path


def setting(*keys, value):
    def change(contents, tensors):
        for key in keys[:-1]:
            contents = contents[key]
        contents[keys[-1]] = value

    return change


def tensor(name, change):
    def changing(contents, tensors):
        tensors[name] = change(tensors[name].clone())

    return changing


def fill(place, value):
    def change(x):
        x[place] = value
        return x

    return change


POSITIONS, TAIL, USER = (f"layers.1.{name}" for name in ("position_BKS", "tail_BK", "user_BKP"))
WRONG = {
    "no field": (lambda c, t: c.pop("kv_dtype"), "found the fields"),
    "more fields": (setting("more", value=1), "found the fields"),
    "model": (setting("model", value=[1]), "belongs to another model"),
    "policy": (setting("policy", "name", value="raas"), "found policy .* invalid: policy 'raas' has no option"),
    "unknown policy": (setting("policy", "name", value="best"), "unknown policy 'best'"),
    "nameless policy": (setting("policy", value={}), "unknown policy ''"),
    "policy of no kind": (setting("policy", value=3), "invalid"),
    "option out of range": (setting("policy", "keep", value=2), r"keep=2 is out of range"),
    "option of another type": (setting("policy", "page_size", value={"name": "raas"}), "invalid"),
    "no budget": (setting("budget", value=None), "invalid: policy 'milestone' needs a budget"),
    "budget of no kind": (setting("budget", value="48"), "invalid: budget='48'"),
    "another budget": (setting("budget", value=64), r"layer 0: cap=12 pages, expected 16"),
    "kv_dtype": (setting("kv_dtype", value="float64"), "invalid: kv_dtype='float64'"),
    "batch_size": (setting("batch_size", value=0), "invalid: batch_size=0"),
    "another batch_size": (setting("batch_size", value=3), "batch_size=3: expected 2"),
    "keys_dtype": (setting("keys_dtype", value="load"), "keys_dtype='load'"),
    "narrower keys": (setting("keys_dtype", value="float16"), "keys_BKSD: found float32 .* expected float16"),
    "layers": (setting("layers", value={}), "layers: expected a list of objects"),
    "a layer less": (lambda c, t: c["layers"].pop(), "expected the same for each of 2 layers"),
    "no layers": (setting("layers", value=[]), "expected the same for each of 2 layers"),
    "empty layers": (setting("layers", value=[{}, {}]), "no rows, but tensors"),
    "counts": (setting("layers", 1, "more", value=1), "layer 1: counts: found"),
    "lengths": (setting("layers", 1, "lengths", value=[48, 63]), "expected the same for each"),
    "caps": (setting("layers", 1, "caps", value=[12, -1]), r"layer 1: caps=\[12, -1\]: expected numbers"),
    "large caps": (setting("layers", 1, "caps", value=[12, 2**31]), r"layer 1: caps=.*: expected numbers"),
    "small caps": (setting("layers", 1, "caps", value=[12, 11]), "layer 1: cap=11 pages, expected 12"),
    "a cap less": (setting("layers", 1, "caps", value=[12]), "found 2 lengths, 1 caps, 2 spreads and 2 prompts"),
    "prompts": (setting("layers", 1, "prompts", value=[[[3]], [[0, 6]]]), "layer 1: prompts=.* expected pairs"),
    "prompt pages": (setting("layers", 1, "prompts", value=[[[4, 3]], [[0, 6]]]), r"prompt pages \[\[4, 3\]\]"),
    "prompt end": (setting("layers", 1, "prompts", value=[[[0, 3]], [[0, 99]]]), r"prompt pages \[\[0, 99\]\]"),
    "later turns": (setting("layers", 1, "later_turns", value=0), "later_turns=0"),
    "columns": (setting("columns", value=61), r"columns.real_BN: found \(2, 62\), expected bool of shape \(2, 61\)"),
    "columns of no kind": (setting("columns", value=None), "columns=None"),
    "huge columns": (setting("columns", value=2**40), "columns=1099511627776"),
    "comparable": (setting("comparable", value=1), "comparable=1"),
    "padding": (tensor("columns.real_BN", fill((0, 0), True)), r"columns=62, not padding \[49, 62\]"),
    "no padding": (lambda c, t: t.pop("columns.real_BN"), r"columns=62, not padding \[62, 62\]"),
    "padding of a type": (tensor("columns.real_BN", torch.Tensor.int), "expected bool"),
    "missing": (lambda c, t: t.pop(TAIL), "layer 1: tensor tail_BK is missing"),
    "missing keys": (lambda c, t: t.pop("layers.1.keys_BKSD"), "layer 1: keys_BKSD: found none"),
    "missing state": (lambda c, t: t.pop("layers.1.state.marked"), "tensor state.marked is missing"),
    "extra": (lambda c, t: t.update(more=torch.ones(1)), "unexpected tensors more"),
    "extra state": (lambda c, t: t.update({"layers.0.state.x": torch.ones(1)}), "state.x is not one of"),
    "rows": (tensor("layers.1.keys_BKSD", lambda x: x[:1]), r"keys_BKSD: found float32 of shape \(1, 2, 48, 16\)"),
    "head dim": (tensor("layers.1.keys_BKSD", lambda x: x[..., :8]), r"keys_BKSD: found .*expected float32 of"),
    "heads": (tensor("layers.1.values_BKSD", lambda x: x[:, :1]), r"values_BKSD: found float32 of shape \(2, 1,"),
    "half a page": (tensor("layers.1.keys_BKSD", lambda x: x[:, :, :46]), "expected whole pages of 4 tokens"),
    "few slots": (tensor("layers.1.keys_BKSD", lambda x: x[:, :, :44]), "11 page slots, expected at least 12"),
    "flat": (tensor("layers.1.keys_BKSD", torch.Tensor.flatten), "expected whole pages"),
    "dtype": (tensor(POSITIONS, torch.Tensor.long), "position_BKS: found int64 .* expected int32"),
    "keys of a dtype": (tensor("layers.0.keys_BKSD", torch.Tensor.half), "keys_BKSD: found float16"),
    "high position": (tensor(POSITIONS, fill((1, 1, 5), 62)), r"position_BKS: found -?\d+ to 62, expected"),
    "low position": (tensor(POSITIONS, fill((0, 0, 5), -2)), "position_BKS: found -2 to"),
    "a position twice": (tensor(POSITIONS, lambda x: fill((1, 0, 9), x[1, 0, 8])(x)), "is in two slots"),
    "tail": (tensor(TAIL, fill((0, 0), 12)), r"tail_BK: found \d+ to 12, expected 0 to 11"),
    "low tail": (tensor(TAIL, fill((0, 0), -1)), r"tail_BK: found -1 to"),
    "taken tail": (tensor(TAIL, fill((1, 0), 0)), "the slot of the next token is taken"),
    "now": (tensor("layers.1.now_B", fill(0, 3)), r"now_B=\[3, 62\], expected \[48, 62\]"),
    "cap": (tensor("layers.1.cap_B", fill(0, 30)), r"cap_B=\[30, 12\]"),
    "prompt": (tensor("layers.1.prompt_B", fill(0, -1)), r"prompt_B=\[-1, 23\]"),
    "user": (tensor(USER, fill((0, 0, 0), 2)), "user_BKP: expected 0 or 1"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_file_is_refused_for_what_is_wrong(model, saved, tmp_path, name):
    change, match = WRONG[name]
    refused(model, changed(saved, tmp_path / "wrong", change), match)


def test_counts_that_do_not_fit_the_tensors_are_refused(model, saved, tmp_path):
    """In every layer, so that they fit each other."""

    def change(contents, tensors):
        for counts in contents["layers"]:
            counts["lengths"] = [48, 2**31 - 1]

    refused(
        model, changed(saved, tmp_path / "wrong", change), r"now_B=\[48, 62\], expected \[48, 2147483647\]"
    )


def leaves(value, keys=()):
    if isinstance(value, dict | list):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(part, (*keys, key))
    yield keys


@pytest.mark.slow
def test_no_value_leads_to_any_other_error(model, saved, tmp_path):
    """Each number, text and list of the contents replaced: refused, or a cache that can be used."""
    contents, _ = read_cache_file(saved)
    places, used = [keys for keys in leaves(contents) if keys], 0
    for i, keys in enumerate(places):
        for value in (None, -1, 10**30, "x", [], {}, True, 0.5)[i % 2 :: 2]:
            path = changed(saved, tmp_path / "odd", setting(*keys, value=value))
            try:
                cache = longthink.load_cache(model, path)
            except longthink.CacheFileError:
                continue
            used += 1
            with cache, torch.no_grad():
                for _ in range(6):
                    model(torch.tensor([[5], [6]]), position_ids=cache.layers[0].slots.length_B[:, None], past_key_values=cache)  # fmt: skip  # noqa: E501
    assert len(places) > 50
    assert used < 30  # options of the policy


# Other models and policies --------------------------------------------------------------------------------------

OTHERS = {
    "weights": lambda: build("qwen2", seed=1),
    "class": lambda: build("qwen3"),
    "layers": lambda: build("qwen2", num_hidden_layers=3),
    "heads": lambda: build("qwen2", num_attention_heads=2),
    "kv_heads": lambda: build("qwen2", num_key_value_heads=4),
    "head_dim": lambda: build("qwen2", head_dim=12),
    "vocabulary": lambda: build("qwen2", vocab_size=98),
    "dtype": lambda: build("qwen2").to(torch.float64),
    "rope": lambda: build("qwen2", rope_parameters={"rope_type": "default", "rope_theta": 500.0}),
}


@pytest.mark.parametrize("field", OTHERS)
def test_another_model_is_refused_with_what_differs(saved, field):
    refused(OTHERS[field](), saved, f"belongs to another model: found {field}=")


@pytest.mark.parametrize(
    "name", ["model.layers.1.self_attn.k_proj.weight", "model.layers.0.input_layernorm.weight"]
)
def test_changed_weights_are_noticed_whatever_their_layout(model, saved, name):
    other = copy.deepcopy(model)
    for module in other.modules():
        if isinstance(module, torch.nn.Linear):  # transposed in memory, with the same values
            module.weight = torch.nn.Parameter(module.weight.detach().T.contiguous().T)
    longthink.load_cache(other, saved).close()
    with torch.no_grad():
        other.get_parameter(name).mul_(1.001)
    refused(other, saved, "found weights=")


def test_another_policy_than_the_caller_expects_is_refused(model, saved):
    spec = "milestone:page_size=4:young=8:alpha=0.1"
    longthink.load_cache(model, saved, policy=spec).close()
    refused(
        model, saved, "found policy .*'alpha': 0.1.*, expected 'milestone", policy="milestone:page_size=4"
    )
    refused(model, saved, "found policy .*'milestone'.*, expected 'raas'", policy="raas")
    with pytest.raises(longthink.UnknownPolicyError):
        longthink.load_cache(model, saved, policy="best")


def test_contents_are_json_and_tensors_and_nothing_else(saved):
    with safe_open(saved, "pt") as file:
        metadata = file.metadata()
    assert sorted(metadata) == ["contents", "format", "format_version", "longthink", "sha256"]
    contents = json.loads(metadata["contents"])
    assert contents["policy"]["name"] == "milestone"
    assert contents["layers"][0]["lengths"] == [48, 62]
    assert metadata["longthink"] == longthink.__version__
