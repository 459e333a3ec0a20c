"""What few bits alone cost: KL of a dense cache whose pages are packed, from one forward pass over each text.

    python -m bench.formats --model FOLDER --data texts.jsonl [-n 3] [--max-tokens 500] [--formats 4,3,3/2,2]

A query reads the recent window in full and what is behind it packed, as in decoding; nothing is evicted. In float32.
Prints a row for each format: bits of a number with steps and minima, mean KL from the dense predictions behind the
first 128 tokens of the answer, and share of tokens whose most likely one differs.

Shape suffixes: B batch rows, H query heads, K KV heads, G query heads per KV head, N tokens, P pages, T tokens in a
page, D head dim, V vocabulary.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from longthink.config import KvBits
from longthink.kernels import packing
from longthink.lab.fidelity.solver import encode
from longthink.lab.fidelity.texts import Encoded, read_texts
from longthink.models import load_model


class PackedBehindAWindow:
    """Attention of a whole text in which each query reads what has left its window at few bits."""

    form: KvBits | None = None
    prompt = 0
    bits = 0.0
    """Bits of a number in the last pages that were packed, with steps and minima."""

    def __call__(
        self, module: Any, query_BHND: Tensor, key_BKND: Tensor, value_BKND: Tensor, mask: Any, scaling: float,
        **more: Any,
    ) -> tuple[Tensor, None]:  # fmt: skip
        count, kv_heads = key_BKND.shape[2], key_BKND.shape[1]
        query = query_BHND.unflatten(1, (kv_heads, -1))
        place_N = torch.arange(count)
        near_NN = torch.ones(count, count, dtype=torch.bool)
        keys, values = far = key_BKND, value_BKND
        if self.form is not None:
            page = self.form.page
            near_NN = place_N // page > place_N[:, None] // page - self.form.window // page
            near_NN |= place_N < (self.prompt if self.form.prompt == "full" else page)
            far = self._packed(query, keys, values)
        logits = torch.where(near_NN, query @ keys[:, :, None].mT, query @ far[0][:, :, None].mT)
        causal_NN = place_N <= place_N[:, None]
        weights = (logits * scaling).masked_fill(~causal_NN, -torch.inf).softmax(-1)
        out = (weights * near_NN) @ values[:, :, None] + (weights * ~near_NN) @ far[1][:, :, None]
        return out.flatten(1, 2).transpose(1, 2).contiguous(), None

    def _packed(self, query_BKGND: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        assert self.form is not None
        page, count, first = self.form.page, keys.shape[2], self.prompt
        squares_BKD = query_BKGND[:, :, :, :first].square().sum((2, 3))
        real = torch.ones(1, first, dtype=torch.bool)
        order = packing.order_channels(keys[:, :, :first], real, squares_BKD)
        pages = [
            pad(x, (0, 0, 0, -count % page), mode="replicate").unflatten(2, (-1, page))
            for x in (keys, values)
        ]
        packed = packing.pack(pages[0], pages[1], self.form.keys, self.form.values, order)
        self.bits = 8 * sum(tensor.nbytes for tensor in packed) / sum(x.numel() for x in pages)
        read_k, read_v = packing.unpack(packed, page, keys.dtype, order)
        return read_k.flatten(2, 3)[:, :, :count], read_v.flatten(2, 3)[:, :, :count]


def predictions(model: Any, text: Encoded) -> Tensor:
    """Log probabilities behind the first 128 decoded tokens, NV."""
    ids = torch.tensor([[*text.prompt, *text.decoded]])
    return model(ids, use_cache=False).logits[0, len(text.prompt) + 127 : -1].log_softmax(-1)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("-n", type=int, default=3)
    parser.add_argument("--max-tokens", type=int, default=500)
    parser.add_argument("--formats", default="8,4,4/2,3,3/2,2,3:prompt=packed,2:prompt=packed")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    attention = PackedBehindAWindow()
    ALL_ATTENTION_FUNCTIONS.register("packed_behind_a_window", attention)
    loaded = load_model(asked.model, device="cpu", dtype="float32")
    loaded.model.set_attn_implementation("packed_behind_a_window")
    texts = [encode(text, loaded.tokenizer, asked.max_tokens) for text in read_texts([asked.data], asked.n)]
    dense = [predictions(loaded.model, text) for text in texts]
    print("| `kv_bits` | bits of a number | KL | other top token |\n|---|---|---|---|")
    for form in map(KvBits.parse, asked.formats.split(",")):
        assert form is not None
        attention.form, changes = form, []
        for text, expected_NV in zip(texts, dense, strict=True):
            attention.prompt = len(text.prompt)
            found_NV = predictions(loaded.model, text)
            divergence_N = (expected_NV.exp() * (expected_NV - found_NV)).sum(-1)
            other_N = expected_NV.argmax(-1) != found_NV.argmax(-1)
            changes.append(torch.stack([divergence_N.mean(), other_N.float().mean()]))
        mean, other = torch.stack(changes).mean(0).tolist()
        print(f"| `{form}` | {attention.bits:.2f} | {mean:.4f} | {100 * other:.1f} % |", flush=True)


if __name__ == "__main__":
    main()
