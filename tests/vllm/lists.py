"""A Qwen2 in plain torch whose layers attend to the residents of a list-based oracle. No longthink, no vLLM.

Shape suffixes: N tokens of a call, H heads (of queries or of keys), D head dim, E hidden size.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch.nn.functional import linear, silu

from tests.oracle.base import Heads, Limit, Setting
from tests.oracle.pages import RaasOracle


class ListedLayer:
    """Attention of one layer: all keys and values ever written, and an oracle that names the residents."""

    def __init__(self, config, decode_budget, **options):
        self.heads = Heads(
            config["num_key_value_heads"], config["num_attention_heads"] // config["num_key_value_heads"]
        )
        self.scaling = config["head_dim"] ** -0.5
        limit = Limit(decode_budget, on_top_of_prompt=True)
        self.oracle = RaasOracle(Setting(limit, self.heads, self.scaling, tolerance=1e-6), **options)
        self.keys, self.values = [], []

    def attend(self, query_NHD, key_NHD, value_NHD):
        first = len(self.keys)
        self.keys += key_NHD
        self.values += value_NHD
        if first == 0:
            self.oracle.prefill(query_NHD.transpose(0, 1).tolist(), key_NHD.transpose(0, 1).tolist())
            kept = [[range(now + 1)] * self.heads.kv for now in range(len(query_NHD))]
        else:
            self.oracle.step(query_NHD[0].tolist(), key_NHD[0].tolist())
            kept = [self.oracle.residents()]
        rows = [
            torch.cat(
                [
                    self.read(query_D, head, at[head // self.heads.group])
                    for head, query_D in enumerate(query_HD)
                ]
            )
            for query_HD, at in zip(query_NHD, kept, strict=True)
        ]
        return torch.stack(rows)

    def read(self, query_D, head, positions):
        kv_head = head // self.heads.group
        key_ND = torch.stack([self.keys[position][kv_head] for position in positions])
        value_ND = torch.stack([self.values[position][kv_head] for position in positions])
        return torch.softmax(key_ND @ query_D * self.scaling, 0) @ value_ND


class ListedQwen2:
    """Greedy tokens of a model on disk, with a bounded cache of RaaS."""

    def __init__(self, folder, decode_budget, **options):
        self.config = json.loads((Path(folder) / "config.json").read_text())
        self.weights = load_file(Path(folder) / "model.safetensors")
        count = self.config["num_hidden_layers"]
        self.layers = [ListedLayer(self.config, decode_budget, **options) for _ in range(count)]

    @torch.no_grad()
    def generate(self, prompt, count):
        tokens, new = [], prompt
        for _ in range(count):
            first = len(prompt) + len(tokens) - len(new)
            new = [int(self.logits(torch.tensor(new), torch.arange(first, first + len(new))).argmax())]
            tokens += new
        return tokens

    def logits(self, token_N, position_N):
        x_NE = self.weights["model.embed_tokens.weight"][token_N]
        for number, layer in enumerate(self.layers):
            name = f"model.layers.{number}"
            normed_NE = self.norm(f"{name}.input_layernorm", x_NE)
            query_NHD, key_NHD, value_NHD = (
                self.project(f"{name}.self_attn.{part}_proj", normed_NE).unflatten(
                    1, (-1, self.config["head_dim"])
                )
                for part in "qkv"
            )
            seen_NE = layer.attend(
                self.turn(query_NHD, position_N), self.turn(key_NHD, position_N), value_NHD
            )
            x_NE = x_NE + self.project(f"{name}.self_attn.o_proj", seen_NE)
            normed_NE = self.norm(f"{name}.post_attention_layernorm", x_NE)
            gate, up = (self.project(f"{name}.mlp.{part}_proj", normed_NE) for part in ("gate", "up"))
            x_NE = x_NE + self.project(f"{name}.mlp.down_proj", silu(gate) * up)
        return self.project("lm_head", self.norm("model.norm", x_NE[-1:]))[0]

    def project(self, name, x):
        return linear(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))

    def norm(self, name, x):
        size = (x * x).mean(-1, keepdim=True) + self.config["rms_norm_eps"]
        return x / size.sqrt() * self.weights[f"{name}.weight"]

    def turn(self, x_NHD, position_N):
        """Rotate the pairs (d, d + D / 2) of each head by an angle that grows with the position."""
        half = x_NHD.shape[-1] // 2
        speed = self.config["rope_parameters"]["rope_theta"] ** (-torch.arange(half) / half)
        angle_N1 = (position_N[:, None] * speed)[:, None]
        left, right = x_NHD[..., :half], x_NHD[..., half:]
        cos, sin = angle_N1.cos(), angle_N1.sin()
        return torch.cat([left * cos - right * sin, right * cos + left * sin], -1)
