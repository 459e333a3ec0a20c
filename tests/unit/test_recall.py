"""The regression behind `recall`'s likeness: leaving a token out is really leaving it out."""

import pytest
import torch

from longthink.policies.recall import leave_one_out_ridge

TOKENS, DIM, RIDGE = 40, 5, 0.03


def data(seed, marked=8):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(1, 1, TOKENS, DIM, dtype=torch.float64, generator=generator)
    marks = torch.zeros(1, 1, TOKENS, dtype=torch.bool)
    marks[..., torch.randperm(TOKENS, generator=generator)[:marked]] = True
    resident = torch.ones(1, 1, TOKENS, dtype=torch.bool)
    resident[..., 30:34] = False
    return features, marks & resident, resident


def refitted(features, marks, resident):
    """R^2 by fitting once for every token, without it; the penalty stays that of all tokens."""
    x, y = features[0, 0][resident[0, 0]], marks[0, 0][resident[0, 0]].double()
    n = len(x)
    centred = x - x.mean(0)
    penalty = RIDGE * (centred**2).sum() / DIM * torch.eye(DIM, dtype=x.dtype)
    missed = total = 0.0
    for i in range(n):
        rest = torch.arange(n) != i
        mean, share = x[rest].mean(0), y[rest].mean()
        inner = x[rest] - mean
        weights = torch.linalg.solve(inner.T @ inner + penalty, inner.T @ (y[rest] - share))
        missed += float((y[i] - share - (x[i] - mean) @ weights) ** 2)
        total += float((y[i] - share) ** 2)
    return 1 - missed / total


@pytest.mark.parametrize("seed", range(4))
def test_r2_is_that_of_refitting_without_each_token(seed):
    features, marks, resident = data(seed)
    if seed % 2:
        features[..., 0] += 3 * marks
    _, r2 = leave_one_out_ridge(features, marks, resident, RIDGE)
    assert float(r2) == pytest.approx(refitted(features, marks, resident), abs=1e-9)
    assert (float(r2) > 0.2) == bool(seed % 2)


def test_noise_is_not_trusted_where_the_fit_itself_looks_good():
    """Few tokens and many features: a fit explains the marks that it has seen."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(1, 1, 60, 40, dtype=torch.float64, generator=generator)
    marks = torch.zeros(1, 1, 60, dtype=torch.bool)
    marks[..., ::7] = True
    fit, r2 = leave_one_out_ridge(features, marks, torch.ones_like(marks), 0.001)
    centred = marks.double() - marks.double().mean()
    assert 1 - float(((centred - fit) ** 2).sum() / (centred**2).sum()) > 0.5
    assert float(r2) < 0


@pytest.mark.parametrize("broken", [0.0, torch.nan, torch.inf])
def test_equal_or_broken_features_give_a_finite_r2(broken):
    _, marks, resident = data(0)
    features = torch.full((1, 1, TOKENS, DIM), broken)
    _, r2 = leave_one_out_ridge(features, marks, resident, RIDGE)
    assert torch.isfinite(r2).all() and float(r2) <= 0
