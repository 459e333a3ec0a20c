"""A logits processor of the tests: a request generates the tokens that it is told to."""

import torch
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor


class Forced(AdapterLogitsProcessor):
    """Log probabilities in vLLM's mode ``raw_logprobs`` are those of the model before this."""

    def is_argmax_invariant(self):
        return False

    def new_req_logits_processor(self, params):
        tokens = (params.extra_args or {}).get("forced")
        if tokens is None:
            return None

        def force(output_ids, logits):
            wanted = tokens[len(output_ids)]
            forced = torch.full_like(logits, -torch.inf)
            forced[wanted] = 0
            return forced

        return force
