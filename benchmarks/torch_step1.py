"""Step-1 and its training step in PyTorch eager, as one would write it there: the benchmark's peer.

Fused scaled-dot-product attention with an explicit bias (made once a step, shared by the layers),
F.rms_norm, F.cross_entropy, AdamW and gradient clipping of the library; no torch.compile.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn


def slopes(heads: int) -> torch.Tensor:
    n = 2 ** int(math.log2(heads))
    main = [2 ** (-8 * i / n) for i in range(1, n + 1)]
    return torch.tensor(main + [2 ** (-4 * k / n) for k in range(1, 2 * (heads - n), 2)])


class Layer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        heads, groups = (n * config.head_dim for n in (config.num_heads, config.num_kv_heads))
        self.attention_norm = nn.Parameter(torch.ones(config.embed))
        self.mlp_norm = nn.Parameter(torch.ones(config.embed))
        self.query = nn.Linear(config.embed, heads, bias=False)
        self.key = nn.Linear(config.embed, groups, bias=False)
        self.value = nn.Linear(config.embed, groups, bias=False)
        self.out = nn.Linear(heads, config.embed, bias=False)
        self.gate = nn.Linear(config.embed, config.mlp, bias=False)
        self.up = nn.Linear(config.embed, config.mlp, bias=False)
        self.down = nn.Linear(config.mlp, config.embed, bias=False)

    def forward(self, x, bias):
        shape = (*x.shape[:2], -1, self.config.head_dim)
        y = F.rms_norm(x, x.shape[-1:], self.attention_norm, self.config.rms_eps)
        q, k, v = (f(y).view(shape).transpose(1, 2) for f in (self.query, self.key, self.value))
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        y = F.rms_norm(x, x.shape[-1:], self.mlp_norm, self.config.rms_eps)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Step1(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.embed)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.final_norm = nn.Parameter(torch.ones(config.embed))
        self.head = nn.Linear(config.embed, config.vocab_size, bias=False)
        self.register_buffer("slopes", slopes(config.num_heads))

    def forward(self, tokens, positions, segment_ids):
        behind = positions[:, :, None] - positions[:, None, :]
        seen = (segment_ids[:, :, None] == segment_ids[:, None, :]) & (behind >= 0)
        root = behind.clamp(min=0).float().sqrt().masked_fill(~seen, math.inf)
        bias = -self.slopes[:, None, None] * root[:, None]
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x, bias)
        return self.head(F.rms_norm(x, x.shape[-1:], self.final_norm, self.config.rms_eps))

    @torch.no_grad()
    def load(self, weights):
        """Takes the weights of ours: a nested dict of numpy arrays with stacked layers."""
        self.embedding.weight.copy_(torch.from_numpy(weights["embedding"]))
        self.head.weight.copy_(torch.from_numpy(weights["head"].T.copy()))
        self.final_norm.copy_(torch.from_numpy(weights["final_norm"]["scale"]))
        for i, layer in enumerate(self.layers):
            for name, stacked in weights["layers"].items():
                target = getattr(layer, name)
                if name.endswith("norm"):
                    target.copy_(torch.from_numpy(stacked["scale"][i]))
                else:  # ours are [in..., out...], nn.Linear's [out, in]
                    kernel = stacked[i].reshape(target.in_features, target.out_features)
                    target.weight.copy_(torch.from_numpy(kernel.T.copy()))


class Trainer:
    """One AdamW step at a time on one batch."""

    def __init__(self, config, weights, batch, learning_rate, weight_decay, threads):
        torch.set_num_threads(threads)
        self.model = Step1(config)
        self.model.load(weights)
        self.batch = {name: torch.tensor(array) for name, array in batch.items()}
        self.targets = self.batch["targets"].flatten().long()
        self.weights = self.batch["weights"].flatten() / self.batch["weights"].sum()
        parameters = list(self.model.parameters())
        groups = [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
            {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=learning_rate)

    def step(self) -> float:
        batch = self.batch
        self.optimizer.zero_grad(set_to_none=True)
        logits = self.model(batch["tokens"], batch["positions"], batch["segment_ids"])
        losses = F.cross_entropy(logits.flatten(0, 1), self.targets, reduction="none")
        loss = (losses * self.weights).sum()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return loss.item()
