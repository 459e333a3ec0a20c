"""What-if analysis: any policy at any budget on a recorded trace, without decoding again.

The attention is that of the dense run (teacher forcing): a policy that evicts something still sees the queries of a
model that has not lost it. Recall says what was lost, not how the text would have continued. Shapes: C budgets, L
layers, K KV heads, G query heads each, H query heads, M = L * H maps, N tokens, T decode steps, D head dim.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from longthink.config import Budget
from longthink.errors import TraceError
from longthink.lab.analyze.clairvoyant import Belady, Future, OptimalRun
from longthink.lab.analyze.replayed_layers import ReplayedLayers
from longthink.lab.analyze.replays import BELADY, OPTIMUM, Replay
from longthink.lab.analyze.rules import Rules
from longthink.lab.analyze.store import Trace, TraceStep
from longthink.policies import Policy, grows, needs_budget, policy_spec, reads_vectors


def check_replayable(policy: Policy, trace: Trace) -> None:
    """Raise `TraceError`, with the option of ``longthink trace`` to use, if the trace lacks what the policy needs."""
    if "query_stats" in policy.needs:
        raise TraceError(
            f"policy {policy_spec(policy)!r} needs the queries of the prompt, which no trace holds"
        )
    if reads_vectors(policy.needs) and not trace.header.vectors:
        raise TraceError(
            f"policy {policy_spec(policy)!r} reads queries, keys or values, and the trace of {trace.header.task} "
            f"{trace.header.problem} has none: record with --with-vectors"
        )
    if policy.page_size % trace.header.page_size:
        raise TraceError(
            f"policy {policy_spec(policy)!r} has pages of {policy.page_size} tokens, and the trace pages of "
            f"{trace.header.page_size}: record with --page-size 1, or a divisor of the policy's"
        )


def what_if(
    trace: Trace, policies: Sequence[Policy], budgets: Sequence[Budget], *, rules: Rules | None = None,
    clairvoyant: bool = True, on_step: Callable[[int], None] = lambda step: None,
) -> list[Replay]:  # fmt: skip
    """Replay policies at budgets over one trace, all in one pass; those that need no budget once.

    With `clairvoyant` also Belady's rule and the optimum, with the smallest page size of the policies. `on_step` gets
    the number of steps replayed so far. `TraceError` if the trace lacks what a policy needs, or is damaged.
    """
    rules, header = rules or Rules(), trace.header
    for policy in policies:
        check_replayable(policy, trace)
    future = Future(trace, header.page_size, rules.use)
    runs = [_Run(trace, policy, budgets, future) for policy in policies]
    sizes = [policy.page_size for policy in policies if needs_budget(policy)] or [header.page_size]
    futures = {header.page_size: future}
    if clairvoyant:
        own = futures[min(sizes)] = futures.get(min(sizes)) or Future(trace, min(sizes), rules.use)
        runs.append(_Run(trace, Belady(future=own, page_size=min(sizes)), budgets, future))
    optima = OptimalRun(trace, min(sizes)) if clairvoyant else None
    prompt = trace.prompt()
    for run in runs:
        run.begin(prompt)
    grid = torch.zeros(header.layers * header.heads, header.steps.stop)
    for count, step in enumerate(trace.steps(), start=1):
        vectors, scale_M = _vectors(trace, step, grid)
        far = (step.mass > rules.use) & (step.now - ((step.page + 1) * header.page_size - 1) > rules.local)
        lookups_M = np.bincount(step.head[far], minlength=len(step.rest)) > 0  # maps that use a distant page
        if optima is not None:
            optima.add(step, scale_M)
        for run in runs:
            run.step(step, vectors, lookups_M)
        for one in futures.values():
            one.pass_by(step.now)
        on_step(count)
    found = [replay for run in runs for replay in run.replays()]
    if optima is not None:
        found += [_optimal(trace, optima, budget) for budget in budgets]
    return found


class _Vectors(NamedTuple):
    """Input of the layers in a step. Queries, keys and values are empty if the trace has none."""

    attention_LKGN: Tensor
    query_LHD: Tensor
    key_LKD: Tensor
    value_LKD: Tensor


def _vectors(trace: Trace, step: TraceStep, grid: Tensor) -> tuple[_Vectors, NDArray[np.float32]]:
    """Return the recorded attention per token, normalized in each map, and the scales; a page is its first token."""
    header = trace.header
    scale_M = (1 / np.maximum(1 - step.rest, 1e-3)).astype(np.float32)
    head, token = torch.from_numpy(step.head), torch.from_numpy(step.page.astype(np.int64) * header.page_size)
    grid[:, : step.now + 1] = 0
    grid[head, token] = torch.from_numpy(step.mass * scale_M[step.head])
    shape = (header.layers, header.kv_heads, -1, step.now + 1)
    recorded = ((header.heads, step.query), (header.kv_heads, step.key), (header.kv_heads, step.value))
    query, key, value = (
        torch.zeros(header.layers, heads, 0) if made is None else torch.from_numpy(made)
        for heads, made in recorded
    )
    return _Vectors(grid[:, : step.now + 1].reshape(shape), query, key, value), scale_M


class _Run:
    def __init__(self, trace: Trace, policy: Policy, budgets: Sequence[Budget], future: Future) -> None:
        header = trace.header
        self.trace, self.policy, self.future = trace, policy, future
        self.name = BELADY if isinstance(policy, Belady) else policy_spec(policy)
        self.budgets: list[Budget | None] = list(budgets) if needs_budget(policy) else [None]
        self.fits = [budget for budget in self.budgets if self._has_room(budget)]
        groups: dict[Policy, list[int]] = {}
        for layer in range(header.layers):
            groups.setdefault(policy.for_layer(layer), []).append(layer)
        parts = groups.items() if self.fits else ()
        self.parts = [(layers, ReplayedLayers(mine, self.fits, len(layers))) for mine, layers in parts]
        budgets_left, maps = len(self.fits), header.layers * header.heads
        self.curve_CT = np.zeros((budgets_left, len(header.steps)), dtype=np.float32)
        self.sum_CM, self.looked_C = np.zeros((budgets_left, maps)), np.zeros(budgets_left)
        self.lookups = 0
        shape = (budgets_left, header.layers, header.kv_heads, header.pages)
        self.gone_CLKP = torch.full(shape, -1, dtype=torch.int32)
        self.before: list[Tensor | None] = [None] * len(self.parts)

    def _has_room(self, budget: Budget | None) -> bool:
        if budget is None or grows(self.policy):
            return True
        prompt = self.trace.header.prompt_tokens
        return budget.pages(prompt, self.policy.page_size) >= self.policy.required_pages(prompt)

    def begin(self, prompt: TraceStep) -> None:
        header = self.trace.header
        mass = torch.zeros(header.layers * header.kv_heads, header.prompt_tokens)
        token = prompt.page.astype(np.int64) * header.page_size
        mass[torch.from_numpy(prompt.head), torch.from_numpy(token)] = torch.from_numpy(prompt.mass)
        mass_LKN = mass.unflatten(0, (header.layers, header.kv_heads))
        shape, is_read = mass_LKN.shape, reads_vectors(self.policy.needs)
        keys, values = (
            torch.from_numpy(made).view(*shape, -1)
            if is_read and made is not None
            else torch.zeros(*shape, 0)
            for made in (prompt.key, prompt.value)
        )
        for layers, replayed in self.parts:
            replayed.prefill(keys[layers], values[layers], mass_LKN[layers])

    def step(self, step: TraceStep, vectors: _Vectors, lookups_M: NDArray[np.bool_]) -> None:
        header = self.trace.header
        kept_CLH = np.empty((len(self.fits), header.layers, header.heads), dtype=np.float32)
        if not reads_vectors(self.policy.needs):
            vectors = _Vectors(vectors.attention_LKGN, *(one[..., :0] for one in vectors[1:]))
        for part, (layers, replayed) in enumerate(self.parts):
            given = vectors if len(layers) == header.layers else _Vectors(*(one[layers] for one in vectors))
            kept_CLKG = replayed.decode(*given, header.scaling)
            kept_CLH[:, layers] = kept_CLKG.flatten(2).numpy()
            self._note_evictions(step.now, part)
        kept_CM = kept_CLH.reshape(len(self.fits), header.layers * header.heads)
        self.curve_CT[:, step.now - header.prompt_tokens] = kept_CM.mean(1)
        self.sum_CM += kept_CM
        self.looked_C += kept_CM[:, lookups_M].sum(1)
        self.lookups += int(lookups_M.sum())

    def _note_evictions(self, now: int, part: int) -> None:
        """Record what was evicted in this step: its slot holds something else now, and it did not move."""
        (layers, replayed), size = self.parts[part], self.trace.header.page_size
        before, gone = self.before[part], self.gone_CLKP
        opens, fills = now % self.policy.page_size == 0, (now + 1) % self.policy.page_size == 0
        if grows(replayed.policy) or not (opens or fills or before is None):
            return
        assert replayed.position_BKS is not None
        position = replayed.position_BKS.unflatten(0, (-1, len(layers))).expand(-1, -1, gone.shape[2], -1)
        if fills or before is None:
            self.before[part] = position.clone()
        if before is None:  # what the prefill has dropped of the prompt
            gone[:, layers, :, : now // size + 1] = now
            before = torch.full_like(position, -1)
        elif not opens:
            return
        changed = (before != position).nonzero(as_tuple=True)
        for token, step in ((before[changed], now), (position[changed], -1)):
            begins = (token >= 0) & (token % size == 0)
            c, layer, table, _ = (index[begins] for index in changed)
            gone[c, torch.tensor(layers)[layer], table, token[begins].long() // size] = step

    def replays(self) -> Iterable[Replay]:
        header, steps = self.trace.header, max(1, len(self.trace.header.steps))
        for budget in self.budgets:
            known = _names(self.trace, self.name, budget, self.policy.page_size)
            if budget not in self.fits:
                yield Replay(**known, note=f"no room for a prompt of {header.prompt_tokens} tokens")
                continue
            i = self.fits.index(budget)
            maps_M, gone = (self.sum_CM[i] / steps).astype(np.float32), self.gone_CLKP[i]
            regrets = (gone >= 0) & (self.future.last_LKP[..., : gone.shape[-1]] >= gone)
            yield Replay(
                **known, recall=float(maps_M.mean()), worst=float(maps_M.min()),
                lookups=float(self.looked_C[i] / self.lookups) if self.lookups else 1.0,
                curve_T=self.curve_CT[i], maps_M=maps_M, evictions=int((gone >= 0).sum()),
                regrets=int(regrets.sum()), gone_LKN=gone.numpy(),
            )  # fmt: skip


def _names(trace: Trace, policy: str, budget: Budget | None, page_size: int) -> dict[str, Any]:
    return {
        "task": trace.header.task, "problem": trace.header.problem, "policy": policy,
        "budget": None if budget is None else budget.budget,
        "decode_budget": None if budget is None else budget.decode_budget, "page_size": page_size,
    }  # fmt: skip


def _optimal(trace: Trace, optima: OptimalRun, budget: Budget) -> Replay:
    known = _names(trace, OPTIMUM, budget, optima.page_size)
    slots = budget.pages(trace.header.prompt_tokens, optima.page_size)
    if slots < 1:
        return Replay(**known, note="no room for a page")
    recall, curve_T, gone_LKN = optima.solve(slots)
    evictions = int((gone_LKN >= 0).sum())
    return Replay(**known, recall=recall, curve_T=curve_T, gone_LKN=gone_LKN, evictions=evictions)
