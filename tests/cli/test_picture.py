"""The picture of what stayed alive, from made-up residents."""

import io
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console

from longthink.lab.cli.picture import Panel, render, save_png
from longthink.lab.cli.race import ResidentLog, pooled
from tests.cli.test_demo import is_picture


def cache(*heads, length):
    """Stand-in for a cache of one layer: what each KV head holds."""
    held = [sorted(head) for head in heads]
    return SimpleNamespace(
        paged=[SimpleNamespace(index=0)],
        resident_positions=lambda layer: [held],
        get_seq_length=lambda: length,
    )


@pytest.fixture
def log():
    """Prompt of 4; after 8 and 16 tokens one head has lost position 5 and both have lost 6."""
    log = ResidentLog(prompt=4)
    log.sample(cache(range(12), range(12), length=12), 8)
    log.sample(cache(set(range(20)) - {6}, set(range(20)) - {5, 6}, length=20), 16)
    return log


def test_share_of_tables_that_hold_a_token(log):
    share_YX = log.share_YX()
    assert share_YX.shape == (20, 2)
    assert np.isnan(share_YX[12:, 0]).all()
    assert (share_YX[:12, 0] == 1).all()
    assert share_YX[[4, 5, 6, 7], 1].tolist() == [1, 0.5, 0, 1]


def test_pooled_cells_are_means_over_positions(log):
    grid = pooled(log, rows=10, columns=2, positions=20, steps=16)
    assert grid[:6, 0].tolist() == [1] * 6
    assert np.isnan(grid[6:, 0]).all()
    assert grid[2:4, 1].tolist() == [0.75, 0.5]


def test_a_text_that_ended_early_leaves_the_rest_empty(log):
    grid = pooled(log, rows=20, columns=4, positions=40, steps=32)
    assert np.isnan(grid[:, 3]).all()
    assert np.isnan(grid[10:]).all()


def lines(panels, width=100, **options):
    console = Console(file=io.StringIO(), width=width, **options)
    return render(panels, console), console


def test_terminal_without_colour_uses_shades(log):
    text, _ = lines([Panel(name="raas", verdict="right", log=log)])
    plain = [line.plain for line in text]
    assert plain[0].strip() == "raas"
    assert plain[1].strip() == "right"
    assert any("." in line and "█" in line for line in plain[2:-3])
    assert "16" in plain[-3]
    assert "▀" not in "".join(plain)


def test_terminal_with_colour_uses_half_blocks(log):
    text, console = lines(
        [Panel(name="raas", verdict="right", log=log)], force_terminal=True, color_system="truecolor"
    )
    for line in text:
        console.print(line)
    written = console.file.getvalue()
    assert "▀" in written
    assert "\x1b[38;2;" in written


@pytest.mark.parametrize(("width", "side_by_side"), [(200, 3), (80, 3), (40, 1)])
def test_panels_fit_the_width(log, width, side_by_side):
    panels = [Panel(name=name, verdict="right", log=log) for name in ("one", "two", "three")]
    text, _ = lines(panels, width=width)
    assert text[0].plain.split() == ["one", "two", "three"][:side_by_side]
    assert all(len(line.plain) <= max(width, 26) for line in text[:-2])


@pytest.mark.slow
def test_png_has_a_panel_for_each_policy(log, tmp_path):
    paths = [tmp_path / f"{count}.png" for count in (1, 3)]
    for path, count in zip(paths, (1, 3), strict=True):
        save_png([Panel(name="a_$b$", verdict="right", log=log)] * count, path, title="$x_1$ of 3")
        assert is_picture(path)
    narrow, wide = (int.from_bytes(path.read_bytes()[16:20]) for path in paths)
    assert wide > 2 * narrow
