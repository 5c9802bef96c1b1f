"""A model with its key/value cache: prompts in, then step after step of one or a few tokens for each row.

    decoder = Decoder(model, batch_size=2, length=300)
    logits = decoder.prefill([prompt_a, prompt_b])                      # (B, V), what follows each prompt
    logits = decoder.step(token[:, None], position)                     # (B, T, V), T = 1

On a CUDA GPU a step is a CUDA graph, one for each T: nothing is launched from Python, nothing is allocated. Steps of up
to 16 rows of a Llama model run through kernels made for them (kernels/decode.py), others through the model's forward.

B batch, T tokens, V ids, C width.
"""

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from lit_gpt.int8 import Int8Linear
from lit_gpt.kernels.linear import compute
from lit_gpt.model import GPT, KVCache, Linear

PREFILL_TOKENS = 16384
"""Tokens of all rows that go through the model at once, while it reads prompts."""
GRAPHED_PROMPT_TOKENS = 1024
"""Up to so many, launching the kernels takes longer than running them: prompts of a length seen before are a graph."""


class Decoder:
    """Room for `batch_size` rows of up to `length` tokens; a row is at a position of its own."""

    def __init__(self, model: GPT, batch_size: int, length: int) -> None:
        c = model.config
        self.model, self.batch_size, self.length = model, batch_size, length
        self.device = model.transformer.wte.weight.device
        dtype = compute(model.transformer.wte.weight).dtype
        self.cache = KVCache(c, batch_size, length, self.device, dtype)
        self.token, self.position = (torch.zeros(batch_size, dtype=torch.int64, device=self.device) for _ in range(2))
        self.inverse_temperature = torch.ones(1, device=self.device)
        """Where `walk` is, and how it draws."""
        self._noise: torch.Tensor | None = None
        self._walks: dict[bool, Graph] = {}
        self._graphs: dict[int, Graph] = {}
        self._prompt_graphs: dict[int, Graph | None] = {}
        self._weights = weights_of(model)
        self._fused = None
        if self.device.type == "cuda" and model.kernels.decode is not None and fits_fused(model):
            self._fused = model.kernels.decode

    def fits(self, model: GPT, batch_size: int, length: int) -> bool:
        """Whether it can be used again: it is large enough, and the weights are still where the graphs read them."""
        same = self._weights == weights_of(model)
        return same and self.batch_size == batch_size and length <= self.length

    @torch.inference_mode()
    def prefill(
        self, prompts: Sequence[Sequence[int]], copies: int = 1, text_length: int | None = None
    ) -> torch.Tensor:
        """Read the prompts, of any lengths, from position 0 on. Returns the logits of what follows each, (B, V).

        Args:
            copies: rows that go on from each prompt, next to each other: B is len(prompts) · copies.
            text_length: tokens of the longest row that will be read in the end, for dynamic rope scaling; default: all
                that there is room for.
        """
        model, device, B = self.model, self.device, len(prompts)
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        width = longest = int(lengths.max())
        graphed = copies == 1 and device.type == "cuda" and B * longest <= GRAPHED_PROMPT_TOKENS
        if graphed:
            width = min(-(-longest // 64) * 64, self.length)
        self.cache.rotate_for(text_length or self.length)
        cache = self.cache
        if copies > 1:
            cache = KVCache(model.config, B, longest, device, self.cache.k.dtype)
            cache.rope = self.cache.rope
        # Shorter prompts are padded on the right. What padding leaves in the cache lies after a row's own position,
        # where no query looks, and is overwritten before the row gets there.
        idx = torch.zeros(B, width, dtype=torch.int64)
        for row, prompt in zip(idx, prompts, strict=True):
            row[: len(prompt)] = torch.as_tensor(prompt)
        idx, last = idx.to(device), (torch.arange(B) * width + lengths - 1).to(device)
        if graphed and width in self._prompt_graphs:
            if self._prompt_graphs[width] is None:
                self._prompt_graphs[width] = Graph(self._read, idx, last)
            return self._prompt_graphs[width](idx, last)
        if graphed:
            self._prompt_graphs[width] = None  # worth a graph when it comes again
            return self._read(idx, last)
        logits = torch.empty(B, model.config.vocab_size, device=device, dtype=cache.k.dtype)
        chunk = max(1, PREFILL_TOKENS // B)
        for start in range(0, longest, chunk):
            part = idx[:, start : start + chunk]
            T = part.size(1)
            ends = ((lengths > start) & (lengths <= start + T)).nonzero()[:, 0]  # rows that end in this chunk
            last = ends * T + lengths[ends] - 1 - start
            positions = torch.arange(start, start + T, device=device)
            found = model(part, cache=cache, positions=positions, logits_at=last.to(device))
            logits[ends.to(device)] = found[:, : logits.size(1)]
        if copies > 1:
            for mine, read in ((self.cache.k, cache.k), (self.cache.v, cache.v)):
                # (layers, B, S, G, D), seen as (layers, prompts, copies, S, G, D)
                mine.unflatten(1, (B, copies))[:, :, :, :longest] = read[:, :, None]
            logits = logits.repeat_interleave(copies, 0)
        return logits

    def _read(self, idx: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
        """Read prompts idx (B, T) into the cache. Returns the logits (B, V) at `last` of the tokens laid end to end."""
        positions = torch.arange(idx.size(1), device=idx.device)
        logits = self.model(idx, cache=self.cache, positions=positions, logits_at=last)
        return logits[:, : self.model.config.vocab_size]

    @torch.inference_mode()
    def step(self, idx: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """Logits (B, T, V) after each of the tokens idx (B, T), which are at position, position + 1, ..., (B,) int64.

        On a GPU the next step with the same T overwrites them.
        """
        if self.device.type != "cuda":
            return self.forward(idx, position)
        T = idx.size(1)
        if T not in self._graphs:
            self._graphs[T] = Graph(self.forward, idx, position)
        return self._graphs[T](idx, position)

    @torch.inference_mode()
    def walk(self, move: Callable, drawn: bool, generator: torch.Generator | None = None) -> None:
        """Move self.token and self.position (B,) on by a token of each row. On a GPU only: a graph for greedy, one for
        all temperatures.

        Args:
            move: (logits (B, V), noise, self.inverse_temperature, token, position) moves the last two; always the same.
            drawn: the noise is exponentially distributed, (B, V), and not None.
        """
        noise = None
        if drawn:
            if self._noise is None:
                self._noise = torch.ones(self.batch_size, self.model.config.vocab_size, device=self.device)
            noise = self._noise.exponential_(generator=generator)

        def step() -> None:
            logits = self.forward(self.token[:, None], self.position)[:, 0]
            move(logits, noise, self.inverse_temperature, self.token, self.position)

        if drawn not in self._walks:
            token, position = self.token.clone(), self.position.clone()
            self._walks[drawn] = Graph(step)
            self.token.copy_(token)
            self.position.copy_(position)
        self._walks[drawn]()

    def forward(
        self, idx: torch.Tensor, position: torch.Tensor, ahead: int = 0, only_last: bool = False
    ) -> torch.Tensor:
        """As `step`, without a graph of its own: to be part of a larger one. The tokens are at position + ahead, ...

        Args:
            only_last: (B, 1, V), the logits after the last token of each row, are all that is wanted.
        """
        if self._fused is not None and idx.numel() <= self._fused.MAX_ROWS:
            logits = self._fused_forward(idx, position, ahead, only_last)
        else:
            B, T = idx.shape
            positions = position[:, None] + ahead + torch.arange(T, device=idx.device)  # (B, T)
            last = torch.arange(T - 1, B * T, T, device=idx.device) if only_last else None
            logits = self.model(idx, cache=self.cache, positions=positions, logits_at=last)
            logits = logits.view(B, -1, logits.size(-1))
        return logits[..., : self.model.config.vocab_size]

    def _fused_forward(self, idx: torch.Tensor, position: torch.Tensor, ahead: int, only_last: bool) -> torch.Tensor:
        """As GPT.forward for a Llama model, with the norms, SwiGLU and the additions inside the matrix products."""
        model, kernels, cache = self.model, self._fused, self.cache
        c = model.config
        embedding = compute(model.transformer.wte.weight)
        x, positions, cos, sin = kernels.begin(idx, position, ahead, embedding, *cache.rope)  # x: the residual stream
        for i, block in enumerate(model.transformer.h):
            norm_1, norm_2, attn, mlp = block.norm_1, block.norm_2, block.attn, block.mlp
            qkv = kernels.linear(x, *matrix(attn.attn), norm=norm_1.weight, eps=norm_1.eps)
            qkv = qkv.view(*idx.shape, -1)
            y = kernels.cached_attention(qkv, cos, sin, cache.layer(i, positions), c.n_query_groups, c.head_size)
            kernels.linear(y.flatten(0, 1).flatten(1), *matrix(attn.proj), add_to=x)
            (gate, gate_scale), (up, up_scale) = matrix(mlp.fc_1), matrix(mlp.fc_2)
            h = kernels.swiglu(x, gate, up, gate_scale, up_scale, norm=norm_2.weight, eps=norm_2.eps)
            kernels.linear(h, *matrix(mlp.proj), add_to=x)
        norm, B = model.transformer.ln_f, idx.size(0)
        if only_last:
            x = x.view(*idx.shape, -1)[:, -1].contiguous()
        return kernels.linear(x, *matrix(model.lm_head), norm=norm.weight, eps=norm.eps).unflatten(0, (B, -1))


_idle: "weakref.WeakKeyDictionary[GPT, Decoder]" = weakref.WeakKeyDictionary()


@contextmanager
def borrow(model: GPT, batch_size: int, length: int) -> Iterator[Decoder]:
    """A Decoder for so much: the one that was given back last, whose graphs are captured already, or a new one."""
    c = model.config
    decoder = _idle.pop(model, None)
    if decoder is None or not decoder.fits(model, batch_size, length):
        decoder = None  # free its memory first
        if model.transformer.wte.weight.is_cuda:
            length = min(-(-length // 512) * 512, c.block_size)  # for the next, too
        decoder = Decoder(model, batch_size, length)
    try:
        yield decoder
    finally:
        if decoder.device.type == "cuda" and batch_size <= 16:  # a large batch's cache is memory, its capture nothing
            _idle[model] = decoder


def matrix(layer: Linear | Int8Linear) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Its weight, and the scale of each row if it has one."""
    return (layer.weight, layer.scale) if isinstance(layer, Int8Linear) else (compute(layer.weight), None)


def weights_of(model: GPT) -> tuple[int, ...]:
    """Where its weights are in memory. (model.parameters() and .buffers() take a millisecond, the time of a token.)"""
    held = ((*m._parameters.values(), *m._buffers.values()) for m in model.modules())
    return tuple(t.data_ptr() for tensors in held for t in tensors if t is not None)


def fits_fused(model: GPT) -> bool:
    """Whether nothing in the model, such as an adapter, has a forward that the fused one does not know."""
    block = model.transformer.h[0]
    layers = (block.attn.attn, block.attn.proj, *block.mlp.children(), model.lm_head)
    return model.config.family == "llama" and all(type(layer) in (Linear, Int8Linear) for layer in layers)


class Graph:
    """function(*tensors), which returns a tensor or several, as a CUDA graph for tensors of these shapes. Every call
    overwrites what the one before returned."""

    def __init__(self, function: Callable, *inputs: torch.Tensor) -> None:
        self.inputs = [t.clone() for t in inputs]
        # Warm up with the true inputs, so that all that is written to a cache is right: kernels are compiled.
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            function(*self.inputs)
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.outputs = function(*self.inputs)

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        for mine, given in zip(self.inputs, inputs, strict=True):
            mine.copy_(given)
        self.graph.replay()
        return self.outputs
