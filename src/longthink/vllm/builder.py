"""Once a step: which tokens belong to prompts, which are decoded, and where the decoded ones go.

A request that was preempted comes back with its prompt and all it had generated. The prompt is read as prompts are;
all that follows is replayed token by token, through the same step and to the same cache.

Shape suffixes: see `longthink.vllm.pool`; Q tokens of prompts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from longthink.vllm import compat
from longthink.vllm.attend import Attend, CpuAttend, KernelAttend, New, Prompts
from longthink.vllm.config import PluginOptions, layer_policies
from longthink.vllm.pool import PagePool, Rows
from longthink.vllm.spec import BoundedSpec
from longthink.vllm.step import Begun, DecodeStep


class _Tokens(NamedTuple):
    """A decode step that is to begin: its rows, their tokens among all of the batch, and what happens to pages."""

    rows: Rows
    tokens: Tensor | None
    opening: Tensor | None
    evicting: bool
    starting: Tensor | None

    def begin(self, step: DecodeStep, layer: int | None = None) -> Begun:
        """Begin it, in all layers or in one."""
        return step.begin(
            self.rows, opening=self.opening, evicting=self.evicting, starting=self.starting, layer=layer
        )


@dataclass
class StepMetadata:
    """What the layers find in a step."""

    step: DecodeStep
    places: dict[str, int]
    decode: tuple[_Tokens, Begun] | None = None
    replay: tuple[_Tokens, ...] = ()
    prompts: tuple[Prompts, Tensor, Any] | None = None

    def run(self, layer_name: str, new: New, out: Tensor) -> None:
        """Do a layer's work on the batch."""
        layer, step = self.places[layer_name], self.step
        if self.prompts is not None:
            prompts, tokens, plan = self.prompts
            part = out[tokens]
            step.attend.prompts(layer, prompts, plan, _take(new, tokens), part)
            out[tokens] = part
            step.pool.represent_prompt(layer, prompts.page_block_B, prompts.page_filled_B)
        for one in self.replay:
            begun = one.begin(step, layer)
            self._decode(layer, one, begun, new, out)
            step.finish(begun)
        if self.decode is not None:
            one, begun = self.decode
            self._decode(layer, one, begun, new, out)
            if layer == len(self.places) - 1:
                step.finish(begun)

    def _decode(self, layer: int, one: _Tokens, begun: Begun, new: New, out: Tensor) -> None:
        if one.tokens is None:
            count = len(one.rows.now_B)
            self.step.layer(begun, layer, _take(new, slice(count)), out[:count])
        else:
            part = out[one.tokens]
            self.step.layer(begun, layer, _take(new, one.tokens), part)
            out[one.tokens] = part


def _take(new: New, tokens: Tensor | slice) -> New:
    query, key, value = new
    return query[tokens], key[tokens], value[tokens]


class BoundedBuilder(compat.AttentionMetadataBuilder):  # type: ignore[misc, unused-ignore]
    """Prepares each step, and holds what lasts: the pool of pages and the decode step over it."""

    def __init__(
        self, kv_cache_spec: BoundedSpec, layer_names: list[str], vllm_config: Any, device: torch.device
    ):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._page_size = kv_cache_spec.block_size
        # A GPU's step can be recorded: shapes and places in memory stay the same.
        self._keeps = device.type != "cpu"
        self._step: DecodeStep | None = None
        self._layer_names = sorted(layer_names, key=compat.layer_index)
        self._places = {name: place for place, name in enumerate(self._layer_names)}

    def _make_step(self) -> DecodeStep:
        config = self.vllm_config
        options = PluginOptions.from_additional_config(config.additional_config)
        policy = options.make_policy(self._page_size)
        caches = compat.kv_caches(config, self._layer_names)
        impl = config.compilation_config.static_forward_context[self._layer_names[0]].impl
        on_cpu = self.device.type == "cpu"
        by_cpu = on_cpu and compat.cpu_kernel_serves(impl.head_size, self._page_size, caches[0].dtype)
        agree = compat.agree_over_ranks() if options.tp_sync else None
        compiles = on_cpu and agree is None and compat.compiles(config)
        pool = PagePool(policy, caches, transposed=by_cpu)
        attend: Attend = (
            CpuAttend(pool, impl.scale, impl.num_heads)
            if by_cpu
            else KernelAttend(pool, impl.scale, compiles=compiles)
        )
        policies = layer_policies(policy, map(compat.layer_index, self._layer_names))
        most = config.scheduler_config.max_num_seqs
        how = {"compiles": compiles, "keeps": self._keeps}
        return DecodeStep(pool, policies, attend, impl.scale, agree, most, impl.num_heads, **how)

    def build(
        self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False
    ) -> StepMetadata:
        """Sort the tokens of a step, and begin it."""
        del common_prefix_len, fast_build
        self._step = self._step or self._make_step()
        batch = common_attn_metadata
        prompt = batch.rswa_prefix_lens[: batch.num_reqs]
        found = StepMetadata(self._step, self._places)
        one = self._one_each(batch, prompt) if batch.max_query_len == 1 else self._sort(found, batch, prompt)
        if one is not None:
            found.decode = (one, one.begin(self._step))
        return found

    def _one_each(self, batch: Any, prompt_B: Tensor) -> _Tokens | None:
        """Where every request has one token, nothing has to be sorted, and nothing waits for the device."""
        now_B, host_B = (x.long() - 1 for x in (batch.seq_lens, batch.seq_lens_cpu_upper_bound))
        return self._tokens(batch, slice(None), now_B, host_B, prompt_B, None)

    def _tokens(
        self, batch: Any, index: Any, now_B: Tensor, host_B: Tensor, prompt_B: Tensor, tokens: Tensor | None
    ) -> _Tokens:
        """One token of each of some requests.

        Parameters
        ----------
        index
            The requests.
        now_B, host_B
            Positions of the tokens, on the device and on the host; -1 for a row that fills up a recorded batch.
        """
        page_size, spec = self._page_size, self.kv_cache_spec
        if self._keeps:
            pages = min(
                spec.cap(spec.max_prompt_tokens), batch.block_table_tensor.shape[1] - spec.query_blocks
            )
        else:
            # Two at least: a compiler would make a program of its own for one.
            pages = max(min(int(host_B.max()) // page_size + 1, spec.cap(int(prompt_B.max()))), 2)
        prompt_B = prompt_B.to(now_B.device, torch.int64, non_blocking=True)
        first_B = (prompt_B + page_size - 1) // page_size
        cap_B = first_B + spec.decode_blocks
        count_B = torch.minimum(now_B // page_size + 1, cap_B)
        block_BP, query_BE = self._blocks_of_rows(
            batch.block_table_tensor[index, : pages + spec.query_blocks].long(),
            first_B,
            count_B,
            now_B >= prompt_B,
        )
        count_B, now_B = count_B.clamp(min=1), now_B.clamp(min=0)
        opens_B = host_B % page_size == 0
        opening = None
        evicting = int(host_B.max()) // page_size >= spec.cap(0)
        if bool(opens_B.any()):
            opening = opens_B.nonzero()[:, 0].to(now_B.device, non_blocking=True)
        starting = None
        assert self._step is not None
        if self._step.admits:
            # Only the device knows how long prompts are, so on a GPU this waits for it: policies of others only.
            starts_B = (now_B == prompt_B) & (prompt_B > 0)
            starting = starts_B.nonzero()[:, 0] if bool(starts_B.any()) else None
        rows = Rows(block_BP, now_B, prompt_B, cap_B, count_B, query_BE)
        return _Tokens(rows, tokens, opening, evicting, starting)

    def _blocks_of_rows(
        self, table_BX: Tensor, first_B: Tensor, count_B: Tensor, decodes_B: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Pages of the rows, and their blocks of queries, which stand behind the `first_B` pages of the prompts."""
        queries, device = self.kv_cache_spec.query_blocks, table_BX.device
        slot_P = torch.arange(table_BX.shape[1] - queries, device=device)
        column_BP = slot_P + queries * (slot_P >= first_B[:, None])
        # Nobody's block is that of a row without a token, and takes the query of a prompt's token that comes alone.
        block_BP = torch.where(slot_P < count_B[:, None], table_BX.gather(1, column_BP), 0)
        column_BE = first_B[:, None] + torch.arange(queries, device=device)
        query_BE = table_BX.gather(1, column_BE.clamp(max=table_BX.shape[1] - 1))
        return block_BP, torch.where(decodes_B[:, None], query_BE, 0)

    def _sort(self, found: StepMetadata, batch: Any, prompt: Tensor) -> _Tokens | None:
        """Tokens of prompts, tokens to replay, and tokens to decode."""
        starts = batch.query_start_loc_cpu.numpy()[: batch.num_reqs + 1].astype(np.int64)
        lengths = batch.seq_lens_cpu_upper_bound.numpy()[: batch.num_reqs].astype(np.int64)
        prompts, queries = prompt.cpu().numpy().astype(np.int64), np.diff(starts)
        begin = lengths - queries
        of_prompt = np.clip(prompts - begin, 0, queries)
        later = queries - of_prompt
        if of_prompt.any():
            rows = of_prompt.nonzero()[0]
            found.prompts = self._prompts(batch, rows, starts[rows], begin[rows], of_prompt[rows])
        decoding = ((of_prompt == 0) & (later == 1)).nonzero()[0]
        replaying = ((later > 1) | ((of_prompt > 0) & (later > 0))).nonzero()[0]
        # The longest first, so that those that still have a token are always the first ones.
        replaying = replaying[np.argsort(-later[replaying], kind="stable")]

        def one(rows: Any, behind: Any) -> _Tokens:
            first, index = of_prompt[rows] + behind, torch.from_numpy(rows)
            position = torch.from_numpy(begin[rows] + first)
            tokens = self._here(starts[rows] + first)
            return self._tokens(batch, index, position.to(self.device), position, prompt[index], tokens)

        assert self._step is not None
        most = int(later[replaying].max(initial=0))
        found.replay = tuple(one(replaying[later[replaying] > behind], behind) for behind in range(most))
        return one(decoding, 0) if len(decoding) else None

    def _prompts(
        self, batch: Any, rows: Any, starts: Any, begin: Any, count: Any
    ) -> tuple[Prompts, Tensor, Any]:
        assert self._step is not None
        page_size, end = self._page_size, begin + count
        bounds = np.concatenate([[0], count.cumsum()])
        row_Q = np.repeat(np.arange(len(rows)), count)
        within_Q = np.arange(bounds[-1]) - bounds[row_Q]
        position_Q = begin[row_Q] + within_Q
        block_BP = batch.block_table_tensor[torch.from_numpy(rows), : -(-int(end.max()) // page_size)].long()
        # The pages that are written to, of all rows, and how far they are filled then.
        first, pages = begin // page_size, -(-end // page_size) - begin // page_size
        row_X = np.repeat(np.arange(len(rows)), pages)
        page_X = first[row_X] + np.arange(len(row_X)) - np.repeat(pages.cumsum() - pages, pages)
        filled_X = np.minimum(end[row_X] - page_X * page_size, page_size)
        slot_Q = self._blocks(block_BP, row_Q, position_Q // page_size) * page_size
        page_block_X = self._blocks(block_BP, row_X, page_X)
        self._step.pool.begin_prompt(page_block_X, self._here(page_X), self._here(filled_X))
        prompts = Prompts(
            bounds.tolist(),
            end.tolist(),
            block_BP,
            self._here(bounds),
            self._here(end),
            slot_Q + self._here(position_Q % page_size),
            page_block_X,
            self._here(filled_X),
        )
        return prompts, self._here(starts[row_Q] + within_Q), self._step.attend.plan_prompts(prompts)

    def _here(self, array: Any) -> Tensor:
        return torch.from_numpy(array).to(self.device)

    def _blocks(self, block_BP: Tensor, row: Any, page: Any) -> Tensor:
        return block_BP[self._here(row), self._here(page)]
