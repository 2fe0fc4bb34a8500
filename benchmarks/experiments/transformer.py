"""The block that the Vision Transformer and the GPT share (Vaswani et al., arXiv 1706.03762)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from cmdgpu.errors import UsageError


class Block(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x)), of (n, tokens, width); ``causal`` looks back alone."""

    def __init__(self, width: int, heads: int, *, causal: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.causal = causal
        self.norm_attention = nn.LayerNorm(width, eps=1e-6)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm_mlp = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.out(self._attended(self.norm_attention(x)))
        return x + self.mlp(self.norm_mlp(x))

    def _attended(self, x: Tensor) -> Tensor:
        """softmax(q k^T / sqrt(width / heads)) v of every head, side by side."""
        n, tokens, width = x.shape
        q, k, v = self.qkv(x).view(n, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return mixed.transpose(1, 2).reshape(n, tokens, width)


def require_heads(width: int, heads: int) -> None:
    """Raises UsageError where the width does not divide among the heads."""
    if heads < 1 or width % heads:
        raise UsageError(f"a width of {width} for {heads} heads", hint="the heads must divide the width")
