"""Metadata of a step: splits the batch into prefill, decode and replay, and begins the decode step.

A preempted request is resumed with its prompt and all the tokens that it had generated. The prompt is prefilled; the
generated tokens are replayed one by one through the decode step, which leads to the same cache.

Shape suffixes: see `longthink.vllm.pool`; Q prompt tokens.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from vllm.v1.attention.backend import AttentionMetadataBuilder

from longthink.vllm import compat
from longthink.vllm.attention import QKV, BlockAttention, CpuAttention, KernelAttention, PrefillBatch
from longthink.vllm.config import PluginOptions, layer_policies
from longthink.vllm.decoder import BlockDecoder, DecodeContext
from longthink.vllm.observe import ObserveOptions
from longthink.vllm.pool import DecodeBatch, PagePool
from longthink.vllm.spec import BoundedSpec


class _DecodeTokens(NamedTuple):
    """One token of each of some requests; for the last three fields see `BlockDecoder.begin`."""

    batch: DecodeBatch
    offsets: Tensor | None  # in vLLM's batch; None if the tokens are the whole batch
    opening: Tensor | None
    evicts: bool
    admitting: Tensor | None

    def begin(self, decoder: BlockDecoder, layer: int | None = None) -> DecodeContext:
        return decoder.begin(
            self.batch, opening=self.opening, evicts=self.evicts, admitting=self.admitting, layer=layer
        )


@dataclass
class BoundedMetadata:
    """What a step runs in each layer: prefill, then replay, then decode."""

    decoder: BlockDecoder
    layers: dict[str, int]
    decode: tuple[_DecodeTokens, DecodeContext] | None = None
    replay: tuple[_DecodeTokens, ...] = ()
    prefill: tuple[PrefillBatch, Tensor, Any] | None = None

    def run(self, layer_name: str, new: QKV, out: Tensor) -> None:
        layer, decoder = self.layers[layer_name], self.decoder
        if self.prefill is not None:
            batch, index, plan = self.prefill
            part = out[index]
            decoder.attention.prefill(layer, batch, plan, _select(new, index), part)
            out[index] = part
            decoder.pool.compute_prompt_bounds(layer, batch.page_block_B, batch.page_filled_B)
        for tokens in self.replay:
            context = tokens.begin(decoder, layer)
            self._decode(layer, tokens, context, new, out)
            decoder.finish(context)
        if self.decode is not None:
            tokens, context = self.decode
            self._decode(layer, tokens, context, new, out)
            if layer == len(self.layers) - 1:
                decoder.finish(context)

    def _decode(
        self, layer: int, tokens: _DecodeTokens, context: DecodeContext, new: QKV, out: Tensor
    ) -> None:
        if tokens.offsets is None:
            count = len(tokens.batch.now_B)
            self.decoder.layer(context, layer, _select(new, slice(count)), out[:count])
        else:
            part = out[tokens.offsets]
            self.decoder.layer(context, layer, _select(new, tokens.offsets), part)
            out[tokens.offsets] = part


def _select(new: QKV, index: Tensor | slice) -> QKV:
    query, key, value = new
    return query[index], key[index], value[index]


class _LastStep(NamedTuple):
    """A step that decoded one token of each request, to recognise the one after it, on a CPU."""

    table_BX: Tensor
    prompt_B: Tensor
    tokens: _DecodeTokens
    context: DecodeContext

    def next(self, batch: Any, page_size: int) -> Tensor | None:
        """Positions of the tokens if the same requests decode on in the same pages, else None."""
        now_B = self.tokens.batch.now_B + 1
        if len(now_B) != batch.num_reqs or bool((now_B % page_size == 0).any()):
            return None
        same = torch.equal(now_B, batch.seq_lens.long() - 1)
        same = same and torch.equal(self.prompt_B, batch.rswa_prefix_lens[: batch.num_reqs])
        table_BX = batch.block_table_tensor[: batch.num_reqs, : self.table_BX.shape[1]]
        return now_B if same and torch.equal(self.table_BX, table_BX) else None


class BoundedBuilder(AttentionMetadataBuilder):  # type: ignore[misc, unused-ignore]
    """Builds the metadata of each step; owns the pool and the decoder."""

    def __init__(
        self, kv_cache_spec: BoundedSpec, layer_names: list[str], vllm_config: Any, device: torch.device
    ):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._page_size = kv_cache_spec.block_size
        # On a GPU shapes and addresses stay the same, so that a step can be captured as a CUDA graph.
        self._static = device.type != "cpu"
        self._decoder: BlockDecoder | None = None
        self._last: _LastStep | None = None
        self._layer_names = sorted(layer_names, key=compat.layer_index)
        self._layers = {name: index for index, name in enumerate(self._layer_names)}

    def _make_decoder(self) -> BlockDecoder:
        config = self.vllm_config
        options = PluginOptions.from_additional_config(config.additional_config)
        policy = options.make_policy(self._page_size)
        caches = compat.kv_caches(config, self._layer_names)
        impl = config.compilation_config.static_forward_context[self._layer_names[0]].impl
        on_cpu = self.device.type == "cpu"
        cpu_kernel = on_cpu and compat.cpu_kernel_supports(impl.head_size, self._page_size, caches[0].dtype)
        over_ranks = compat.max_over_ranks() if options.tp_sync else None
        compiles = on_cpu and over_ranks is None and compat.compiles(config)
        pool = PagePool(policy, caches, transposed=cpu_kernel)
        attention: BlockAttention
        if cpu_kernel:
            attention = CpuAttention(pool, impl.scale, impl.num_heads)
        else:
            attention = KernelAttention(pool, impl.scale, compiles=compiles)
        policies = layer_policies(policy, map(compat.layer_index, self._layer_names))
        observe = ObserveOptions(impl.num_heads, impl.scale, over_ranks)
        rows = config.scheduler_config.max_num_seqs
        return BlockDecoder(
            pool, policies, attention, observe, rows, compiles=compiles, static_buffers=self._static
        )

    def build(
        self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False
    ) -> BoundedMetadata:
        self._decoder = self._decoder or self._make_decoder()
        batch = common_attn_metadata
        prompt_B = batch.rswa_prefix_lens[: batch.num_reqs]
        metadata = BoundedMetadata(self._decoder, self._layers)
        if batch.max_query_len == 1:
            metadata.decode = self._decode_all(batch, prompt_B)
            return metadata
        self._last = None
        if (tokens := self._split(metadata, batch, prompt_B)) is not None:
            metadata.decode = (tokens, tokens.begin(self._decoder))
        return metadata

    def _decode_all(self, batch: Any, prompt_B: Tensor) -> tuple[_DecodeTokens, DecodeContext]:
        """Begin a step of one token each: nothing to split, and no wait for the device.

        Most steps on a CPU are like the last one, a token further in the same pages: then nothing is looked up again.
        """
        assert self._decoder is not None
        last, self._last = self._last, None
        if last is not None and (now_B := last.next(batch, self._page_size)) is not None:
            tokens = last.tokens._replace(batch=last.tokens.batch._replace(now_B=now_B))
            tokens = tokens._replace(opening=None, evicts=False, admitting=None)
            context = self._decoder.advance(last.context, now_B)
            self._last = last._replace(tokens=tokens, context=context)
            return tokens, context
        now_B, host_B = (x.long() - 1 for x in (batch.seq_lens, batch.seq_lens_cpu_upper_bound))
        tokens = self._tokens(batch, slice(None), now_B, host_B, prompt_B, None)
        context = tokens.begin(self._decoder)
        # A step with a token of a prompt is none to go on from: the next may be the first that its policy observes.
        if not self._static and bool(context.active_B.all()):
            columns = tokens.batch.block_BP.shape[1] + self.kv_cache_spec.query_blocks
            table_BX = batch.block_table_tensor[: batch.num_reqs, :columns].clone()
            self._last = _LastStep(table_BX, prompt_B.clone(), tokens, context)
        return tokens, context

    def _tokens(
        self, batch: Any, rows: Any, now_B: Tensor, host_B: Tensor, prompt_B: Tensor, offsets: Tensor | None
    ) -> _DecodeTokens:
        """One token of each of some requests; its position is -1 for rows that pad a captured batch."""
        page_size, spec = self._page_size, self.kv_cache_spec
        if self._static:
            columns = batch.block_table_tensor.shape[1] - spec.query_blocks
            pages = min(spec.max_pages(spec.max_prompt_tokens), columns)
        else:
            # At least two: a compiler specialises on sizes of one.
            pages = max(min(int(host_B.max()) // page_size + 1, spec.max_pages(int(prompt_B.max()))), 2)
        prompt_B = prompt_B.to(now_B.device, torch.int64, non_blocking=True)
        first_B = (prompt_B + page_size - 1) // page_size
        table_BX = batch.block_table_tensor[rows, : pages + spec.query_blocks].long()
        block_BP, query_BE = self._split_table(table_BX, first_B, now_B >= prompt_B)
        cap_B = self._caps(block_BP, first_B)
        count_B = torch.minimum(now_B // page_size + 1, cap_B)
        # Padding rows go to the null block.
        slot_P = torch.arange(block_BP.shape[1], device=block_BP.device)
        block_BP = torch.where(slot_P < count_B[:, None], block_BP, 0)
        count_B, now_B = count_B.clamp(min=1), now_B.clamp(min=0)
        opens_B = host_B % page_size == 0
        opening, evicts = None, False
        if bool(opens_B.any()):
            opening = opens_B.nonzero()[:, 0].to(now_B.device, non_blocking=True)
            evicts = self._evicts(host_B[opens_B], cap_B, opening)
        admitting = None
        assert self._decoder is not None
        if self._decoder.admits:
            # Prompt lengths are on the device, so on a GPU this waits for it; only policies that admit pay for that.
            starts_B = (now_B == prompt_B) & (prompt_B > 0)
            admitting = starts_B.nonzero()[:, 0] if bool(starts_B.any()) else None
        decode_batch = DecodeBatch(block_BP, now_B, prompt_B, cap_B, count_B, query_BE)
        return _DecodeTokens(decode_batch, offsets, opening, evicts, admitting)

    def _split_table(self, table_BX: Tensor, first_B: Tensor, decodes_B: Tensor) -> tuple[Tensor, Tensor]:
        """Split block tables into pages and query blocks, which follow the `first_B` pages of the prompt."""
        queries, device = self.kv_cache_spec.query_blocks, table_BX.device
        slot_P = torch.arange(table_BX.shape[1] - queries, device=device)
        column_BP = slot_P + queries * (slot_P >= first_B[:, None])
        column_BE = first_B[:, None] + torch.arange(queries, device=device)
        query_BE = table_BX.gather(1, column_BE.clamp(max=table_BX.shape[1] - 1))
        # The queries of prompt tokens processed on their own go to the null block.
        return table_BX.gather(1, column_BP), torch.where(decodes_B[:, None], query_BE, 0)

    def _caps(self, block_BP: Tensor, first_B: Tensor) -> Tensor:
        """Page slots that each request may fill: the server's budget, or less if the null block ends its table.

        The table ends so once the request is full (`longthink.vllm.manager`). Before, what follows the request's
        blocks is left from others, and the result is anything from the pages it has to what the server allows.
        """
        slot_P = torch.arange(block_BP.shape[1], device=block_BP.device)
        ends_BP = (block_BP == 0) & (slot_P >= first_B[:, None])
        most_B = first_B + self.kv_cache_spec.decode_blocks
        return torch.minimum(torch.where(ends_BP, slot_P, most_B[:, None]).amin(1), most_B)

    def _evicts(self, host_B: Tensor, cap_B: Tensor, opening: Tensor) -> bool:
        """Whether any of the rows that open a page may be full."""
        page_B = host_B // self._page_size
        if self._static:
            # The caps are on the device. No request is full with a page of its prompt and one more.
            return int(page_B.max()) >= 2
        return bool((page_B >= cap_B[opening]).any())

    def _split(self, metadata: BoundedMetadata, batch: Any, prompt_B: Tensor) -> _DecodeTokens | None:
        """Add prefill and replay to the metadata; return the tokens to decode."""
        starts = batch.query_start_loc_cpu.numpy()[: batch.num_reqs + 1].astype(np.int64)
        lengths = batch.seq_lens_cpu_upper_bound.numpy()[: batch.num_reqs].astype(np.int64)
        prompts, queries = prompt_B.cpu().numpy().astype(np.int64), np.diff(starts)
        begin = lengths - queries
        of_prompt = np.clip(prompts - begin, 0, queries)
        generated = queries - of_prompt
        if of_prompt.any():
            rows = of_prompt.nonzero()[0]
            metadata.prefill = self._prefill(batch, rows, starts[rows], begin[rows], of_prompt[rows])
        decoding = ((of_prompt == 0) & (generated == 1)).nonzero()[0]
        replaying = ((generated > 1) | ((of_prompt > 0) & (generated > 0))).nonzero()[0]
        # Longest first, so that the rows that still have a token come first.
        replaying = replaying[np.argsort(-generated[replaying], kind="stable")]

        def tokens(rows: Any, offset: int) -> _DecodeTokens:
            first, requests = of_prompt[rows] + offset, torch.from_numpy(rows)
            position = torch.from_numpy(begin[rows] + first)
            offsets = self._to_device(starts[rows] + first)
            return self._tokens(
                batch, requests, position.to(self.device), position, prompt_B[requests], offsets
            )

        longest = int(generated[replaying].max(initial=0))
        metadata.replay = tuple(
            tokens(replaying[generated[replaying] > offset], offset) for offset in range(longest)
        )
        return tokens(decoding, 0) if len(decoding) else None

    def _prefill(
        self, batch: Any, rows: Any, starts: Any, begin: Any, count: Any
    ) -> tuple[PrefillBatch, Tensor, Any]:
        assert self._decoder is not None
        page_size, end = self._page_size, begin + count
        bounds = np.concatenate([[0], count.cumsum()])
        row_Q = np.repeat(np.arange(len(rows)), count)
        within_Q = np.arange(bounds[-1]) - bounds[row_Q]
        position_Q = begin[row_Q] + within_Q
        block_BP = batch.block_table_tensor[torch.from_numpy(rows), : -(-int(end.max()) // page_size)].long()
        # Pages that are written to, and the tokens that each then holds.
        first, pages = begin // page_size, -(-end // page_size) - begin // page_size
        row_X = np.repeat(np.arange(len(rows)), pages)
        page_X = first[row_X] + np.arange(len(row_X)) - np.repeat(pages.cumsum() - pages, pages)
        filled_X = np.minimum(end[row_X] - page_X * page_size, page_size)
        slot_Q = self._block_ids(block_BP, row_Q, position_Q // page_size) * page_size
        page_block_X = self._block_ids(block_BP, row_X, page_X)
        self._decoder.pool.start_prompt_pages(
            page_block_X, self._to_device(page_X), self._to_device(filled_X)
        )
        prefill = PrefillBatch(
            bounds.tolist(), end.tolist(), block_BP, slot_Q + self._to_device(position_Q % page_size),
            page_block_X, self._to_device(filled_X),
        )  # fmt: skip
        index = self._to_device(starts[row_Q] + within_Q)
        return prefill, index, self._decoder.attention.plan_prefill(prefill)

    def _to_device(self, array: Any) -> Tensor:
        return torch.from_numpy(array).to(self.device)

    def _block_ids(self, block_BP: Tensor, row: Any, page: Any) -> Tensor:
        return block_BP[self._to_device(row), self._to_device(page)]
