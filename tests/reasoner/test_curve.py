"""The loss curve is drawn where matplotlib is installed, and its absence does not hurt."""

import json
import sys

import pytest

from tools.train_reasoner.card import plot_curve


@pytest.mark.slow
def test_curve_is_a_png_of_all_records(tmp_path):
    pytest.importorskip("matplotlib")
    records = [{"tokens": 1000 * i, "loss": 6.0 / i, "longest": 4 + i} for i in range(1, 9)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    plot_curve(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_training_needs_no_matplotlib(tmp_path, tiny_config, monkeypatch):
    from dataclasses import replace

    from tools.train_reasoner.trainer import train

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr("tools.train_reasoner.trainer.find_spec", lambda name: None)
    result = train(replace(tiny_config, tokens=1000), out=tmp_path)
    assert result.model is not None
    assert not (tmp_path / "loss.png").exists()
