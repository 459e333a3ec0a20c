"""The limits of any policy: Belady's rule, and the true optimum.

Belady's rule (evict what is used again last) is optimal if a miss brings the page back; here an evicted page is gone.
The optimum for that case is an assignment problem: see `optimal_recall`.
Shape suffixes: L layers, K KV heads, C budgets, B = C * L rows, N tokens, P page slots, Q prompt columns.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from typing_extensions import override

from longthink.errors import needs_extra
from longthink.lab.analyze.store import Trace, TraceStep
from longthink.policies import PAGE_SIZES, PageTable, Policy, TrimsPrompt

MAX_PAGES = 2048
MAX_CELLS = 1 << 28  # beyond these, the optimum uses larger pages: its time grows with their cube
NEVER = torch.iinfo(torch.int32).max


class Future:
    """The next use of each page, updated while a trace is replayed. `page_size` is a multiple of the trace's."""

    def __init__(self, trace: Trace, page_size: int, use: float) -> None:
        header = trace.header
        self.page_size = page_size
        pages = -(-header.steps.stop // page_size)
        self.shape = (header.layers, header.kv_heads, pages)
        cells, times = [], []
        for step in trace.steps():
            found = used_pages(trace, step, page_size, use)
            cells.append(found)
            times.append(np.full(len(found), step.now))
        cell, time = (np.concatenate([np.zeros(0, np.int64), *parts]) for parts in (cells, times))
        order = np.lexsort((time, cell))
        cell, time = cell[order], time[order]
        same = cell[1:] == cell[:-1]
        following = np.append(np.where(same, time[1:], NEVER), NEVER)[: len(cell)]
        by_time = np.argsort(time, kind="stable")
        self._cell, self._following = torch.from_numpy(cell[by_time]), torch.from_numpy(following[by_time])
        self._bounds = np.searchsorted(time[by_time], np.arange(header.steps.stop + 1))
        self.next_LKP = torch.full(self.shape, NEVER, dtype=torch.int64)
        first = np.append(True, ~same)[: len(cell)]
        self.next_LKP.view(-1)[torch.from_numpy(cell[first])] = torch.from_numpy(time[first])
        self.last_LKP = torch.full(self.shape, -1, dtype=torch.int64)
        self.last_LKP.view(-1)[torch.from_numpy(cell)] = torch.from_numpy(time)

    def pass_by(self, now: int) -> None:
        part = slice(self._bounds[now], self._bounds[now + 1])
        self.next_LKP.view(-1)[self._cell[part]] = self._following[part]


def used_pages(trace: Trace, step: TraceStep, page_size: int, use: float) -> NDArray[np.int64]:
    """Return the pages used in a step, each once, as ``(layer * kv_heads + kv_head) * pages + page``."""
    header = trace.header
    pages, merge = -(-header.steps.stop // page_size), page_size // header.page_size
    cell = step.head * pages + step.page // merge
    used = np.nonzero(np.bincount(cell, step.mass) > use)[0] if merge > 1 else cell[step.mass > use]
    return np.unique(used // pages // (header.heads // header.kv_heads) * pages + used % pages)


@dataclass(frozen=True, kw_only=True)
class Belady(Policy, TrimsPrompt):
    """Evict the page whose next use is farthest, also of the prompt; of equals the first. Only for replay."""

    name: ClassVar[str] = "belady"

    future: Future = field(compare=False, repr=False)

    @override
    def pins_prompt(self) -> bool:
        return False

    @override
    def trim(
        self, position_BQ: Tensor, length_B: Tensor, cap_B: Tensor, mass_BKQ: Tensor | None
    ) -> Tensor | None:
        page_BQ = position_BQ.div(self.page_size, rounding_mode="floor")
        next_BKQ = self._next(page_BQ[:, None].expand(-1, self.future.shape[1], -1))
        # All tokens of a page have the same next use; the page number breaks ties.
        worth = -next_BKQ * self.future.shape[2] + page_BQ[:, None]
        pages = worth[..., :: self.page_size]
        kept = pages.argsort(-1, descending=True).argsort(-1) < cap_B[:, None, None]
        return kept.repeat_interleave(self.page_size, -1)[..., : position_BQ.shape[1]]

    @override
    def worth(self, table: PageTable) -> Tensor:
        return -self._next(table.page_BKP)

    def _next(self, page_BKP: Tensor) -> Tensor:
        next_LKP = self.future.next_LKP
        next_BKP = next_LKP.expand(len(page_BKP) // len(next_LKP), *next_LKP.shape).flatten(0, 1)
        return next_BKP.gather(2, page_BKP.clamp(min=0).long())


def optimal_recall(lost_NN: NDArray[np.float64], prompt: int, slots: int) -> tuple[float, NDArray[np.int64]]:
    """Return the least attention that one page table can lose, and the page evicted at each birth (-1: none).

    Every page born when all slots are full evicts one born before it, no page is evicted twice, and evicting page p
    at the birth of page n costs ``lost_NN[n, p]``, the attention that p would have got from then on. Any choice of
    distinct victims is a possible run of a cache and vice versa, so the cheapest assignment bounds all policies with
    pages of that size, one table per KV head and the same budget. Pages of the prompt go in any order.
    """
    with needs_extra("analyze"):
        from scipy.optimize import linear_sum_assignment
    pages = len(lost_NN)
    victims = np.full(pages, -1, dtype=np.int64)
    if pages <= slots:
        return 0.0, victims
    born, earlier = np.arange(slots, pages)[:, None], np.arange(pages)[None, :]
    allowed = (earlier < born) | ((earlier < prompt) & (born < prompt))
    cost = np.where(allowed, lost_NN[slots:], np.inf)
    rows, columns = linear_sum_assignment(cost)
    victims[slots:] = columns
    return float(cost[rows, columns].sum()), victims


class OptimalRun:
    """Accumulates a trace's attention by page, and finds the optimum. Too many pages: larger ones than requested."""

    def __init__(self, trace: Trace, page_size: int) -> None:
        header = self.header = trace.header
        tables, tokens = header.layers * header.kv_heads, header.steps.stop
        for self.page_size in [page_size, *(size for size in PAGE_SIZES if size > page_size)]:
            pages = -(-tokens // self.page_size)
            if pages <= MAX_PAGES and tables * pages**2 <= MAX_CELLS:
                break
        # Row n: attention to each page while page n is written.
        self._mass = np.zeros((tables, pages, pages), dtype=np.float32)

    def add(self, step: TraceStep, scale_M: NDArray[np.float32]) -> None:
        """Add a step; `scale_M` normalizes each map's recorded attention."""
        group, (tables, pages) = self.header.heads // self.header.kv_heads, self._mass.shape[:2]
        cell = step.head // group * pages + step.page * self.header.page_size // self.page_size
        found = np.bincount(cell, step.mass * scale_M[step.head] / group, minlength=tables * pages)
        self._mass[:, step.now // self.page_size] += found.reshape(-1, pages).astype(np.float32)

    def solve(self, slots: int) -> tuple[float, NDArray[np.float32], NDArray[np.int32]]:
        """Return mean recall, recall of each step (mean of its page), and when each page of the trace is evicted."""
        header, size = self.header, self.page_size
        tables, pages = self._mass.shape[:2]
        prompt = -(-header.prompt_tokens // size)
        missed, gone = np.zeros(pages), np.full((tables, pages), -1, dtype=np.int32)

        def victims_of(table: int) -> NDArray[np.int64]:
            lost = self._mass[table, ::-1].cumsum(0)[::-1].astype(np.float64)
            return optimal_recall(lost, prompt, slots)[1]

        with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # it releases the interpreter's lock
            found = pool.map(victims_of, range(tables))
        for table, victims in enumerate(found):
            for born in np.nonzero(victims >= 0)[0].tolist():
                gone[table, victims[born]] = max(born * size, header.steps.start)
                missed[born:] += self._mass[table, born:, victims[born]]
        steps = np.bincount(np.array(header.steps) // size, minlength=pages)
        curve = 1 - missed / np.maximum(steps, 1) / tables
        recall = 1 - float(missed.sum()) / max(1, len(header.steps)) / tables
        gone_LKN = np.repeat(gone, size // header.page_size, 1)[:, : header.pages]
        shape = (header.layers, header.kv_heads, -1)
        return recall, curve[np.array(header.steps) // size].astype(np.float32), gone_LKN.reshape(shape)
