"""`DecodeLoop`: the sampling and greedy loops of ``model.generate`` around a `DecodeStep`.

Shape suffixes: B batch rows, N tokens, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation import GenerateDecoderOnlyOutput

from longthink.hf.cache import PagedCache
from longthink.hf.step import Compile, DecodeStep

NEEDS_LIBRARY = ("output_hidden_states", "num_beams", "synced_gpus", "token_healing", "stop_strings")
"""Options that only transformers' own loop supports; it decodes eagerly."""


@dataclass(frozen=True)
class DecodeLoop:
    """Value for the argument `custom_generate` of ``model.generate``.

    The streamer is a field because ``model.generate`` does not pass its own to custom loops.
    """

    compile: Compile
    streamer: Any

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        synced_gpus: bool = False,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        """Decode until every row has stopped, and return what ``model.generate`` returns."""
        cache: PagedCache = model_kwargs["past_key_values"]
        logits_BV = model._prefill(input_ids, generation_config, model_kwargs).logits[:, -1]
        step = DecodeStep(
            model, cache, compile=self.compile, tokens=generation_config.max_length - input_ids.shape[1]
        )
        ends = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
        kept: dict[str, list[Tensor]] = {"scores": [], "logits": []}
        wanted = [name for name in kept if getattr(generation_config, f"output_{name}")]
        running_B = torch.ones(len(input_ids), dtype=torch.bool, device=input_ids.device)
        text_BN, count = input_ids, input_ids.shape[1]
        while True:
            # Logits processors expect float32, and may write into it.
            logits_BV = logits_BV.to(torch.float32, copy=bool(wanted))
            scores_BV = logits_BV
            # Calling the list itself would inspect their signatures in each step.
            for process in logits_processor:
                scores_BV = process(input_ids, scores_BV)
            for name in wanted:
                kept[name].append(scores_BV if name == "scores" else logits_BV)
            token_B = _choose(scores_BV, generation_config.do_sample)
            if ends:
                token_B = torch.where(running_B, token_B, generation_config._pad_token_tensor)
            if count == text_BN.shape[1]:
                # A prompt of embeddings has no tokens, so count may be 0.
                room = text_BN.new_empty(len(text_BN), max(count, 16))
                text_BN = torch.cat([text_BN, room], 1)
            text_BN[:, count] = token_B
            count += 1
            input_ids = text_BN[:, :count]
            if self.streamer is not None:
                self.streamer.put(token_B.cpu())
            running_B &= ~stopping_criteria(input_ids, tuple(kept["scores"]))
            if not running_B.any():
                break
            logits_BV = step(token_B[:, None])
        input_ids = input_ids.clone()
        if self.streamer is not None:
            self.streamer.end()
        if not generation_config.return_dict_in_generate:
            return input_ids
        outputs = {name: tuple(kept[name]) for name in wanted}
        return GenerateDecoderOnlyOutput(sequences=input_ids, past_key_values=cache, **outputs)


def _choose(scores_BV: Tensor, sample: bool) -> Tensor:
    if not sample:
        return scores_BV.argmax(-1)
    return torch.multinomial(scores_BV.softmax(-1), num_samples=1)[:, 0]
