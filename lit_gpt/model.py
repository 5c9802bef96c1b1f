"""The model, top to bottom: a Llama-architecture decoder, and GPT-NeoX's variant of it for Pythia.

    model = GPT(Config.from_name("tiny_LLaMA_1b"))
    model.init_weights(seed=1337)
    logits = model(idx)            # (B, T) -> (B, T, V)
    loss = model(idx, targets)     # summed over the targets that are not IGNORE_INDEX

B batch, T tokens, C width, V rows of the head, H query heads, G key/value heads, D head size, S cache length.
"""

import math
from typing import TYPE_CHECKING

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from lit_gpt.config import Config
from lit_gpt.kernels import ComputeWeights, Kernels, embedding, linear
from lit_gpt.kernels.rope import rope_tables
from lit_gpt.kernels.swiglu import swiglu

if TYPE_CHECKING:  # it imports triton
    from lit_gpt.kernels.fp8 import BlockFp8, Fp8


class GPT(nn.Module):
    def __init__(self, config: Config, kernels: Kernels | None = None) -> None:
        super().__init__()
        self.config = config
        self.kernels = kernels or Kernels()
        self.transformer = nn.ModuleDict(
            dict(
                wte=Embedding(config.padded_vocab_size, config.n_embd),
                h=nn.ModuleList(Block(config, self.kernels) for _ in range(config.n_layer)),
                ln_f=make_norm(config, self.kernels),
            )
        )
        self.lm_head = Linear(config.n_embd, config.padded_vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.transformer.wte.weight
        self._rope: tuple[torch.Tensor, torch.Tensor] | None = None
        self._compute_weights: ComputeWeights | None = None
        self.fp8: Fp8 | None = None
        self.recompute = False
        """Keep no activations inside a block for the backward but compute them again: a quarter more work, and memory
        for activations falls from about 24 C elements a token and layer to 2 C."""
        self.register_load_state_dict_pre_hook(accept_published_names)

    def forward(
        self,
        idx: torch.Tensor,
        targets: torch.Tensor | None = None,
        *,
        cache: "KVCache | None" = None,
        positions: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        reduction: str = "sum",
        z_loss: float = 0.0,
        logits_at: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits, or the loss where targets are given.

        Args:
            idx: (B, T) token ids.
            targets: (B, T) ids that should follow, IGNORE_INDEX where nothing is asked.
            cache: keys and values of earlier tokens; this call's are written into it at `positions`.
            positions: (T,), or (B, T) where the rows are at different places; default 0..T-1.
            cu_seqlens: (documents + 1,) int32: where documents begin in the B·T tokens laid end to end, and B·T; a
                token then sees its own document only. Not together with a cache.
            reduction: "sum", or "none" for the loss of every token, (B, T), zero where ignored. Nothing here divides:
                a batch is spread over micro-batches and ranks, and only the caller knows its number of valid targets.
            z_loss: weight of log²Z in the loss, see kernels/cross_entropy.py.
            logits_at: (N,) of the B·T tokens laid end to end, to compute these logits alone, (N, V), or the loss of
                these alone.

        Returns:
            (B, T, V) logits in the model's dtype, or the fp32 loss in nats.

        Raises:
            ValueError: more tokens than config.block_size.
        """
        T = idx.size(1)
        if T > self.config.block_size:
            raise ValueError(f"{T} tokens do not fit the model's block_size of {self.config.block_size}")
        renewed = self._compute_weights is not None and self._compute_weights.refresh()
        if self.fp8 is not None:
            if renewed:
                self.fp8.quantise_weights()
            if self.training and torch.is_grad_enabled():
                self.fp8.begin()
        if cache is not None and positions is None:
            positions = torch.arange(T, device=idx.device)
        tables = self.rope(idx.device, T) if cache is None else cache.rope
        cos, sin = (table[:T] if positions is None else table[positions] for table in tables)

        # The residual stream is x + delta: each norm's kernel does the addition that the sublayer before it left over.
        x, delta = self.transformer.wte(idx), None  # (B, T, C)
        for i, block in enumerate(self.transformer.h):
            layer = None if cache is None else cache.layer(i, positions)
            if self.recompute and self.training and torch.is_grad_enabled():
                x, delta = checkpoint(block, x, delta, cos, sin, cu_seqlens, layer, use_reentrant=False)
            else:
                x, delta = block(x, delta, cos, sin, cu_seqlens, layer)
        _, x = self.transformer.ln_f(x, delta)

        if logits_at is not None:
            x = x.flatten(0, 1).index_select(0, logits_at)  # (N, C)
            targets = None if targets is None else targets.flatten()[logits_at]
        if targets is None:
            return self.lm_head(x)
        loss = self.kernels.linear_cross_entropy(
            x.flatten(0, -2), self.lm_head.weight, targets.flatten(), reduction=reduction, z_loss=z_loss
        )
        return loss if reduction == "sum" else loss.view_as(targets)

    def rope(self, device: torch.device, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The rotary tables of calls without a cache, built at first use: as buffers they would follow
        model.to(bfloat16) and lose positions. Dynamic scaling depends on the length of the sequences."""
        c = self.config
        n_positions = max(length, c.rope_original_size) if c.rope_scaling == "dynamic" else c.block_size
        if self._rope is None or self._rope[0].device != device or self._rope[0].size(0) != n_positions:
            self._rope = rope_tables(c, n_positions, device)
        return self._rope

    def compute_in(self, dtype: torch.dtype, copies: "ComputeWeights | None" = None) -> None:
        """Run the matrix products, and the activations between them, in `dtype` over the fp32 parameters, which stay
        what an optimizer steps and a checkpoint holds; gradients are fp32 and accumulate in fp32. Call it when the
        parameters are on their device. `copies` are those of a sharded model (lit_gpt.sharding); with FSDP its
        MixedPrecisionPolicy does the same."""
        in_fp8 = [] if self.fp8 is None else [w for group in self.fp8.matrices() for w in group]
        self._compute_weights = copies or ComputeWeights(self, dtype, without=in_fp8)

    def train_in_fp8(self) -> None:
        """Run the blocks' matrix products in fp8 while training (lit_gpt/kernels/fp8.py); evaluation and the rest of
        the model stay in bf16. Call it before compute_in(torch.bfloat16).

        Raises:
            ValueError: the GPU has no fp8, or the model is not of Llama's family.
        """
        from lit_gpt.kernels.fp8 import Fp8

        self.fp8 = Fp8(self.transformer.h)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """TinyLlama's initialisation, in place: normal with σ = √(2/5C) (GPT-NeoX-20B's small init, arXiv:2204.06745),
        the projections back into the residual stream with σ = 1/(√C · n_layer). Norms 1, biases 0.

        Draws from a generator of its own on the parameters' device, so the same seed gives the same model at any world
        size. Call it before the parameters are sharded.
        """
        c = self.config
        generator = torch.Generator(self.lm_head.weight.device).manual_seed(seed)
        for name, p in self.named_parameters():
            if p.dim() == 1:
                p.fill_(0.0 if name.endswith("bias") else 1.0)
            elif name.endswith("proj.weight"):
                p.normal_(std=1 / math.sqrt(c.n_embd) / c.n_layer, generator=generator)
            else:
                p.normal_(std=math.sqrt(2 / 5 / c.n_embd), generator=generator)


class Block(nn.Module):
    def __init__(self, config: Config, kernels: Kernels) -> None:
        super().__init__()
        self.norm_1 = make_norm(config, kernels)
        self.attn = CausalSelfAttention(config, kernels)
        self.norm_2 = make_norm(config, kernels)
        self.mlp = (LLaMAMLP if config.family == "llama" else GptNeoxMLP)(config, kernels)
        self.parallel_residual = config.family == "gptneox"
        self.fp8: BlockFp8 | None = None

    def forward(
        self,
        x: torch.Tensor,
        delta: torch.Tensor | None,
        cos: torch.Tensor,
        sin: torch.Tensor,
        cu_seqlens: torch.Tensor | None = None,
        cache: "LayerCache | None" = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Residual stream in and out as (x, delta), whose sum it is; delta None is 0."""
        if self.fp8 is not None and self.training and torch.is_grad_enabled():
            attn, mlp, c = self.attn, self.mlp, self.attn.config
            heads = (c.n_query_groups, c.head_size)
            x, q, k, v = self.fp8.norm_qkv(x, delta, self.norm_1, attn.attn.weight, cos, sin, *heads)
            y = attn.kernels.attention(q, k, v, None, cu_seqlens)
            delta = self.fp8.linear(y.flatten(2), attn.proj.weight)
            return self.fp8.norm_mlp(x, delta, self.norm_2, mlp.fc_1.weight, mlp.fc_2.weight, mlp.proj.weight)
        x, y = self.norm_1(x, delta)
        delta = self.attn(y, cos, sin, cu_seqlens, cache)
        if self.parallel_residual:
            _, y = self.norm_2(x)
            return x, delta + self.mlp(y)
        x, y = self.norm_2(x, delta)
        return x, self.mlp(y)


class CausalSelfAttention(nn.Module):
    def __init__(self, config: Config, kernels: Kernels) -> None:
        super().__init__()
        bias = config.family == "gptneox"
        # Query, key and value in one, interleaved by query group: (q .. q k v) (q .. q k v) ..
        self.attn = Linear(config.n_embd, config.qkv_size, bias=bias)
        self.proj = Linear(config.n_head * config.head_size, config.n_embd, bias=bias)
        self.config, self.kernels = config, kernels

    def forward(
        self,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        cu_seqlens: torch.Tensor | None = None,
        cache: "LayerCache | None" = None,
    ) -> torch.Tensor:
        c = self.config
        qkv = self.attn(x)
        if cache is not None:
            y = self.kernels.cached_attention(qkv, cos, sin, cache, c.n_query_groups, c.head_size)
        else:
            q, k, v = self.kernels.split_rope(qkv, cos, sin, c.n_query_groups, c.head_size)
            y = self.kernels.attention(q, k, v, None, cu_seqlens)  # (B, T, H, D)
        return self.proj(y.flatten(2))


class LLaMAMLP(nn.Module):
    def __init__(self, config: Config, kernels: Kernels) -> None:
        super().__init__()
        self.fc_1 = Linear(config.n_embd, config.intermediate_size, bias=False)
        self.fc_2 = Linear(config.n_embd, config.intermediate_size, bias=False)
        self.proj = Linear(config.intermediate_size, config.n_embd, bias=False)
        self.kernels = kernels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        adapted = any(type(m) is not Linear for m in (self.fc_1, self.fc_2, self.proj))
        if adapted:  # an adapter has a forward of its own
            return self.proj(swiglu(self.fc_1(x), self.fc_2(x)))
        return self.kernels.swiglu_mlp(x, self.fc_1.weight, self.fc_2.weight, self.proj.weight)


class GptNeoxMLP(nn.Module):
    def __init__(self, config: Config, kernels: Kernels) -> None:
        super().__init__()
        self.fc = Linear(config.n_embd, config.intermediate_size)
        self.proj = Linear(config.intermediate_size, config.n_embd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(F.gelu(self.fc(x)))


class RMSNorm(nn.Module):
    def __init__(self, config: Config, kernels: Kernels) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.n_embd))
        self.eps, self.kernels = config.norm_eps, kernels

    def forward(self, x: torch.Tensor, delta: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """x + delta, and its norm."""
        if delta is None:
            return x, self.kernels.rms_norm(x, self.weight, self.eps)
        return self.kernels.add_rms_norm(x, delta, self.weight, self.eps)


class LayerNorm(nn.LayerNorm):
    def forward(self, x: torch.Tensor, delta: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """x + delta, and its norm."""
        x = x if delta is None else x + delta
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        return x, F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


def make_norm(config: Config, kernels: Kernels) -> nn.Module:
    if config.family == "gptneox":
        return LayerNorm(config.n_embd, eps=config.norm_eps)
    return RMSNorm(config, kernels)


class Linear(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight, self.bias)


class Embedding(nn.Embedding):
    def forward(self, idx: torch.Tensor) -> torch.Tensor:
        return embedding(idx, self.weight)


class KVCache:
    """Keys and values of up to `length` tokens of each row, allocated once: (n_layer, B, S, G, D) each.

    With dynamic scaling all its keys are rotated alike, as a text of `length` tokens wants it or of what `rotate_for`
    says, where transformers leaves each as the length of its moment had it.
    """

    def __init__(self, config: Config, batch_size: int, length: int, device: torch.device, dtype: torch.dtype) -> None:
        if length > config.block_size:
            raise ValueError(f"a cache of {length} tokens exceeds the model's block_size of {config.block_size}")
        self.config = config
        self.rope = rope_tables(config, length, device)
        """cos and sin of its places."""
        shape = (config.n_layer, batch_size, length, config.n_query_groups, config.head_size)
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros(shape, device=device, dtype=dtype)
        self.arrivals = torch.zeros(256, device=device, dtype=torch.int32)

    def rotate_for(self, length: int) -> None:
        """Before anything is written: the text will have `length` tokens. The cache may have places for more, for
        guesses beyond its end or from a longer text before, which must not change what is written."""
        if self.config.rope_scaling == "dynamic":
            for mine, table in zip(self.rope, rope_tables(self.config, length, self.k.device), strict=True):
                mine[:length] = table  # in place: a CUDA graph knows where they are

    def layer(self, i: int, positions: torch.Tensor) -> "LayerCache":
        return LayerCache(self.k[i], self.v[i], positions, self.arrivals)


class LayerCache:
    """One layer's view of a KVCache, at the positions of this call: (T,), or (B, T)."""

    def __init__(self, k: torch.Tensor, v: torch.Tensor, positions: torch.Tensor, arrivals: torch.Tensor) -> None:
        self.k, self.v, self.positions = k, v, positions
        self.arrivals = arrivals
        """Zeros that the decoding kernel counts in, and leaves as zeros."""

    def update(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Write k and v (B, T, G, D) at their positions and return the whole cache of the layer, (B, S, G, D)."""
        if self.positions.dim() == 1:
            return self.k.index_copy_(1, self.positions, k), self.v.index_copy_(1, self.positions, v)
        where = (torch.arange(k.size(0), device=k.device)[:, None], self.positions)
        return self.k.index_put_(where, k), self.v.index_put_(where, v)

    def mask(self) -> torch.Tensor:
        """True where a new token may look, at itself and before: (1 or B, 1, T, S)."""
        mask = torch.arange(self.k.size(1), device=self.k.device) <= self.positions[..., None]
        return mask[None, None] if self.positions.dim() == 1 else mask[:, None]


def accept_published_names(module: nn.Module, state_dict: dict, prefix: str, *_: object) -> None:
    """Load hook: TinyLlama's published checkpoints name the MLP after xformers' SwiGLU."""
    names = {".mlp.swiglu.w1.": ".mlp.fc_1.", ".mlp.swiglu.w2.": ".mlp.fc_2.", ".mlp.swiglu.w3.": ".mlp.proj."}
    for key in list(state_dict):
        for published, ours in names.items():
            if published in key:
                state_dict[key.replace(published, ours)] = state_dict.pop(key)
