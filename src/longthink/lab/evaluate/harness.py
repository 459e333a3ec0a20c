"""A model ``longthink`` for lm-evaluation-harness: generation on a bounded cache.

The harness's registry is not open to other packages: ``longthink lm-eval`` registers the model, and so does an import
of this module.
"""

import logging
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from longthink.config import DEFAULT_POLICY, check_int
from longthink.errors import UnsupportedFeatureError, needs_extra
from longthink.hf import generate, make_cache
from longthink.models import load_model
from longthink.policies import Policy, make_policy, policy_budget, policy_to_dict

with needs_extra("lm-eval"):
    import lm_eval.models  # noqa: F401  (registers its own models first)
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.utils_hf import stop_sequences_criteria
    from torch import Tensor

# The harness's default device, even on machines without one.
_ANY_DEVICE = "cuda:0"
# Passed on to the harness's own class for transformers.
_PASSED_ON = (
    "add_bos_token", "chat_template_args", "enable_thinking", "max_length", "prefix_token_id", "think_end_token",
    "truncation",
)  # fmt: skip


@register_model("longthink")
class LongthinkLM(HFLM):
    """A Hugging Face model that generates with a KV cache of a fixed budget; its arguments: docs/tasks.md.

    Tasks that score given text (``loglikelihood``) are refused: one pass over a text evicts nothing, so the policy
    would have no effect. ``cuda:0`` means the first accelerator, or the CPU if there is none.
    """

    def __init__(
        self, pretrained: str, policy: str | Policy = DEFAULT_POLICY, budget: int | None = None,
        decode_budget: int | None = None, revision: str | None = None, device: str = _ANY_DEVICE,
        dtype: str = "auto", batch_size: int | str = 1, **options: Any,
    ) -> None:  # fmt: skip
        if unknown := sorted(options.keys() - set(_PASSED_ON)):
            raise ValueError(
                f"{unknown[0]}={options[unknown[0]]!r} is unknown to the model longthink: allowed are pretrained, "
                f"policy, budget, decode_budget, revision, device, dtype, batch_size, {', '.join(_PASSED_ON)}"
            )
        self.policy = make_policy(policy)
        self.budget = policy_budget(self.policy, budget, decode_budget)
        rows = int(batch_size) if isinstance(batch_size, str) and batch_size.isdecimal() else batch_size
        check_int("batch_size", rows, 1)  # type: ignore[arg-type]  # "auto" is refused here
        self.kv_bytes_peak = 0
        place = "auto" if device == _ANY_DEVICE else device
        self._loaded = load_model(pretrained, device=place, dtype=dtype, revision=revision)
        make_cache(self._loaded.model, policy=self.policy, **self._budget_arguments).close()
        # It warns that a preloaded model may ignore arguments; ours are used or refused.
        logger = logging.getLogger(HFLM.__module__)
        level, (model, tokenizer) = logger.level, (self._loaded.model, self._loaded.tokenizer)
        logger.setLevel(logging.ERROR)
        try:
            super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=rows, **options)
        finally:
            logger.setLevel(level)

    @property
    def _budget_arguments(self) -> dict[str, Any]:
        if self.budget is None:
            return {}
        return {"budget": self.budget.budget, "decode_budget": self.budget.decode_budget}

    def _model_generate(
        self, context: Tensor, max_length: int, stop: list[str], **generation_kwargs: Any
    ) -> Tensor:
        if not generation_kwargs.get("do_sample"):  # transformers warns of a temperature then
            generation_kwargs.pop("temperature", None)
        stopping = stop_sequences_criteria(self.tokenizer, stop, context.shape[1], context.shape[0])
        output = generate(
            self.model, context, generation_kwargs.pop("attention_mask"), policy=self.policy,
            **self._budget_arguments, max_length=max_length, stopping_criteria=stopping,
            pad_token_id=self.tokenizer.pad_token_id, return_dict_in_generate=True, **generation_kwargs,
        )  # fmt: skip
        self.kv_bytes_peak = max(self.kv_bytes_peak, output.past_key_values.kv_bytes)
        return output.sequences

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> NoReturn:
        raise UnsupportedFeatureError(
            "this task scores given text (loglikelihood): one pass over it evicts nothing, so a policy would have no "
            "effect; run it with --model hf, and tasks that generate (generate_until) with --model longthink"
        )

    loglikelihood_rolling = loglikelihood

    def get_model_info(self) -> dict[str, Any]:
        facts = {"model_num_parameters": self.model.num_parameters(), "model_dtype": self.model.dtype}
        facts |= {"model_device": str(self.model.device), "model_revision": self._loaded.revision}
        facts |= {
            "longthink_policy": policy_to_dict(self.policy),
            "longthink_kv_bytes_peak": self.kv_bytes_peak,
        }
        return facts | {f"longthink_{name}": value for name, value in self._budget_arguments.items()}


def main(arguments: Sequence[str]) -> None:
    from lm_eval.__main__ import cli_evaluate

    # It reads nothing but the process's own arguments.
    before, sys.argv = sys.argv, ["lm_eval", *arguments]
    try:
        cli_evaluate()
    finally:
        sys.argv = before
