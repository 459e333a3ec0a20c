"""What is recorded is what the model's own attention says, whatever the form, and a kill costs one problem."""

import json
import os
import signal
import subprocess
import sys
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from longthink.errors import TraceError, UnsupportedModelError
from longthink.lab.analyze.recorder import _Tape, record
from longthink.lab.analyze.store import CHUNK_STEPS, Trace, TraceStore, TraceWriter
from tests.analyze.making import Words, dense, recorded
from tests.families.tiny import tiny
from tests.models import build


def attention_of(architecture, trace):
    """Attention that the library itself computes for the same text, M x T x N."""
    model = build(architecture)
    model.set_attn_implementation("eager")
    header = trace.header
    ids = torch.tensor([header.token_ids[: header.steps.stop]])
    with torch.no_grad():
        all_LHNN = torch.cat(model(ids, output_attentions=True, use_cache=False).attentions)
    return all_LHNN, all_LHNN[:, :, header.prompt_tokens :].flatten(0, 1).numpy()


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["qwen2", "mistral"])
def test_recorded_mass_is_the_models_own_attention(tmp_path, architecture):
    (trace,) = recorded(tmp_path / "t", architecture, new=80).traces()
    all_LHNN, wanted_MTN = attention_of(architecture, trace)
    np.testing.assert_allclose(dense(trace), wanted_MTN, atol=6e-4)
    assert len(trace.header.steps) == 79 and trace.header.token_ids[:9] != trace.header.token_ids[9:18]
    prompt = trace.prompt()
    found_KN = np.zeros((4, 9))
    found_KN[prompt.head, prompt.page] = prompt.mass
    wanted_KN = all_LHNN[:, :, :9, :9].unflatten(1, (2, 2)).sum((2, 3)).flatten(0, 1).numpy()
    np.testing.assert_allclose(found_KN, wanted_KN, rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("page_size", [2, 5, 32])
def test_pages_add_up_tokens(tmp_path, page_size):
    (by_token,) = recorded(tmp_path / "a").traces()
    (by_page,) = recorded(tmp_path / "b", page_size=page_size).traces()
    tokens, pages = dense(by_token), dense(by_page)
    for page in range(pages.shape[2]):
        part = tokens[:, :, page * page_size : (page + 1) * page_size].sum(2)
        np.testing.assert_allclose(pages[:, :, page], part, atol=2e-3)


def test_top_keeps_the_largest_and_the_sum_of_the_others(tmp_path):
    (everything,) = recorded(tmp_path / "a").traces()
    (some,) = recorded(tmp_path / "b", top=3).traces()
    for full, short in zip(everything.steps(), some.steps(), strict=True):
        assert full.now == short.now and (np.bincount(short.head) == 3).all()
        for head in range(8):
            masses = np.sort(full.mass[full.head == head])
            np.testing.assert_allclose(np.sort(short.mass[short.head == head]), masses[-3:], atol=1e-3)
            assert short.rest[head] == pytest.approx(masses[:-3].sum(), abs=3e-3)


def test_vectors_give_the_attention_back(tmp_path):
    (trace,) = recorded(tmp_path / "t", vectors=True, new=12).traces()
    header, prompt = trace.header, trace.prompt()
    keys = torch.from_numpy(prompt.key).view(2, 2, header.prompt_tokens, -1)
    for step in trace.steps():
        keys = torch.cat([keys, torch.from_numpy(step.key)[:, :, None]], 2)
        query = torch.from_numpy(step.query).unflatten(1, (2, 2))
        weights = (query @ keys.transpose(2, 3) * header.scaling).softmax(-1).flatten(0, 2)
        np.testing.assert_allclose(weights[step.head, step.page], step.mass, atol=1e-3)


def test_what_is_there_is_not_decoded_again(tmp_path):
    store = recorded(tmp_path / "t", problems=1)
    (path,) = [one.path for one in store.traces()]
    before = path.stat().st_mtime_ns
    assert len(recorded(tmp_path / "t", problems=3).traces()) == 3
    assert path.stat().st_mtime_ns == before


def test_refusals_name_what_is_wrong(tmp_path):
    recorded(tmp_path / "t")
    with pytest.raises(TraceError, match="other settings \\(top\\)"):
        recorded(tmp_path / "t", top=5)
    with pytest.raises(TraceError, match="something else"):
        recorded(tmp_path)
    with pytest.raises(TraceError, match="no traces"):
        TraceStore(tmp_path)
    for name, value in (("page_size", 33), ("page_size", 0), ("top", -1)):
        with pytest.raises(ValueError, match=f"{name}={value}"):
            recorded(tmp_path / "u", **{name: value})
    with pytest.raises(ValueError, match="page_size=4 must be 1"):
        recorded(tmp_path / "u", page_size=4, vectors=True)
    with pytest.raises(UnsupportedModelError):
        record(build("mistral", sliding_window=8), Words(), [], tmp_path / "u")
    with pytest.raises(UnsupportedModelError, match="all layers"):
        record(tiny("lfm2"), Words(), [], tmp_path / "u")
    assert not (tmp_path / "u").exists()


def test_a_damaged_file_is_named(tmp_path):
    (trace,) = recorded(tmp_path / "t").traces()
    data = bytearray(trace.path.read_bytes())
    data[300] ^= 255
    trace.path.write_bytes(data)
    with pytest.raises(TraceError, match=trace.path.name):
        list(TraceStore(tmp_path / "t").traces()[0].steps())
    trace.path.write_bytes(data[:500])
    with pytest.raises(TraceError, match=trace.path.name):
        TraceStore(tmp_path / "t").traces()


def test_an_error_leaves_no_file_behind(tmp_path):
    def stop(prompt, tokens):
        if tokens == 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        recorded(tmp_path / "t", on_step=stop)
    assert [path.name for path in (tmp_path / "t").iterdir()] == ["longthink-trace"]


@pytest.mark.slow
def test_memory_does_not_grow_with_the_text(tmp_path):
    """The tape gets the same steps for a short and a long time; the model's own cache is not part of it."""
    weights = torch.rand(1, 2, 2, 4096)

    def peak(steps):
        tracemalloc.start()
        with TraceWriter(tmp_path / f"{steps}.parquet", vectors=False) as writer:
            tape = _Tape(writer, page_size=1, top=64, vectors=False)
            for now in range(2000, 2000 + steps):
                for layer in range(2):
                    table = SimpleNamespace(now_B=torch.tensor([now]))
                    tape.step(layer, table, SimpleNamespace(weights_BKGS=weights, scaling=1.0))
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    peak(2)  # what is imported and cached on the way
    assert peak(8 * CHUNK_STEPS) < 1.25 * peak(CHUNK_STEPS + 8)


KILLED = """
import os, signal, sys
from tests.analyze.making import recorded
def stop(prompt, tokens):
    if prompt.problem == "1" and tokens == 90:
        os.kill(os.getpid(), signal.SIGKILL)
recorded(sys.argv[1], problems=3, new=100, on_step=stop)
"""


def test_what_a_kill_left_behind_goes_in_time(tmp_path):
    recorded(tmp_path / "t")
    fresh, stale = (tmp_path / "t" / f".{name}.parquet-7.tmp" for name in ("fresh", "stale"))
    fresh.touch()
    stale.touch()
    os.utime(stale, (0, 0))
    TraceStore(tmp_path / "t")
    assert stale.exists(), "who only reads deletes nothing"
    recorded(tmp_path / "t")
    assert fresh.exists() and not stale.exists()


@pytest.mark.slow
def test_a_kill_costs_the_problem_it_was_at(tmp_path):
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "t")], env=os.environ, timeout=120)
    assert done.returncode == -signal.SIGKILL
    assert [one.header.problem for one in TraceStore(tmp_path / "t").traces()] == ["0"]
    seen = []
    store = recorded(
        tmp_path / "t", problems=3, new=100, on_step=lambda prompt, n: seen.append(prompt.problem)
    )
    assert set(seen) == {"1", "2"}
    again = recorded(tmp_path / "whole", problems=3, new=100)
    for one, other in zip(store.traces(), again.traces(), strict=True):
        assert one.header == other.header
        np.testing.assert_array_equal(dense(one), dense(other))


@pytest.mark.slow
def test_size_on_disk_of_a_model_of_28_layers(tmp_path):
    """docs/analyze.md says 170 to 190 bytes for a head and step; here chunks are small and heads few."""
    (trace,) = recorded(tmp_path / "t", new=400, top=64).traces()
    per_head = trace.path.stat().st_size / len(trace.header.steps) / 8
    assert per_head < 230


def test_header_survives_json(tmp_path):
    (trace,) = recorded(tmp_path / "t").traces()
    assert type(trace.header).from_json(trace.header.to_json()) == trace.header
    assert json.loads(trace.header.to_json())["page_size"] == 1
    assert Trace.open(trace.path).header == trace.header
