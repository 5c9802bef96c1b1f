"""Causal self-attention. One function, one layout, whatever runs underneath.

B batch, T query positions, S key positions, H query heads, G key/value heads (H a multiple of G), D head size.
"""

import functools
import importlib.util
import inspect
import logging
import os
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from lit_gpt.kernels.rope import split_rope

INSTALL = {
    "fa4": 'pip install flash-attn-4==4.0.0b15 "quack-kernels==0.5.0" "nvidia-cutlass-dsl[cu13]==4.5.3" (Hopper)',
    "fa2": "pip install flash-attn --no-build-isolation",
    "xformers": "pip install xformers",
}


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
) -> torch.Tensor:
    """softmax(q kᵀ / √D) v, every group of H / G query heads sharing one key/value head.

    Args:
        q: (B, T, H, D).
        k, v: (B, S, G, D).
        mask: True where a query may look, broadcastable to (B, 1, T, S); None: causal, which needs T == S.
        cu_seqlens: (documents + 1,) int32: where each document begins in the B·T tokens laid end to end, and B·T;
            documents look only at themselves. Empty ones are allowed.

    Returns:
        (B, T, H, D).
    """
    assert mask is not None or q.size(1) == k.size(1), "over a cache, give a mask: is_causal is top-left"
    if cu_seqlens is not None:
        mask = document_mask(cu_seqlens, q.size(0), q.size(1))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    gqa = q.size(1) != k.size(1)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=gqa)
    return out.transpose(1, 2)


def cached_attention(
    qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, cache, n_query_groups: int, head_size: int
) -> torch.Tensor:
    """Attention of new tokens to themselves and to the earlier ones in a cache, which the new ones are written into.

    Args:
        qkv, cos, sin, n_query_groups, head_size: as for `split_rope`.
        cache: a model.LayerCache, at the positions of the new tokens.

    Returns:
        (B, T, H, D).
    """
    q, k, v = split_rope(qkv, cos, sin, n_query_groups, head_size)
    k, v = cache.update(k, v)  # (B, S, G, D)
    return attention(q, k, v, cache.mask())


def document_mask(cu_seqlens: torch.Tensor, B: int, T: int) -> torch.Tensor:
    """What `cu_seqlens` allows, as a mask: (B, 1, T, T), True at and before a token in its own document."""
    position = torch.arange(B * T, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    document = torch.searchsorted(cu_seqlens, position, right=True).view(B, T)
    same = document[:, :, None] == document[:, None, :]
    return (same & torch.ones(T, T, dtype=torch.bool, device=same.device).tril())[:, None]


def sdpa(backend: SDPBackend) -> Callable:
    """`attention` through one backend of F.scaled_dot_product_attention."""

    @functools.wraps(attention)
    def forced(q, k, v, mask=None, cu_seqlens=None):
        if mask is not None:  # of a cache: torch chooses
            return attention(q, k, v, mask)
        if backend == SDPBackend.EFFICIENT_ATTENTION:
            k, v = repeat_heads(q, k, v)
        with sdpa_kernel(backend):
            return attention(q, k, v, None, cu_seqlens)

    return forced


def repeat_heads(q: torch.Tensor, *kv: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """k and v (..., G, D) with as many heads as q, for what takes no groups, or not in its backward."""
    return tuple(x.repeat_interleave(q.size(-2) // x.size(-2), -2) for x in kv)


def flash_package(causal: Callable, varlen: Callable) -> Callable:
    """`attention` through kernels that know causal and document masks, but no others."""

    @functools.wraps(attention)
    def flash(q, k, v, mask=None, cu_seqlens=None):
        if mask is not None:
            return attention(q, k, v, mask)
        if cu_seqlens is None:
            return causal(q, k, v)
        B, T = q.shape[:2]
        flat = varlen(*(x.flatten(0, 1) for x in (q, k, v)), cu_seqlens, T)  # no document is longer than its row
        return flat.view(q.shape)

    return flash


def load(name: str) -> Callable:
    """The attention called `name`. Raises ImportError if its package is missing."""
    if name in ("efficient", "math"):
        return sdpa(SDPBackend.EFFICIENT_ATTENTION if name == "efficient" else SDPBackend.MATH)
    if name in ("cudnn", "flash"):
        from torch.nn.attention.varlen import varlen_attn

        takes_groups = "enable_gqa" in inspect.signature(varlen_attn).parameters  # since torch 2.13

        def varlen(q, k, v, cu, longest):  # flash for both names: PyTorch calls cuDNN with no documents
            k, v = (k, v) if takes_groups else repeat_heads(q, k, v)
            grouped = {"enable_gqa": True} if takes_groups else {}
            return varlen_attn(q, k, v, cu, cu, longest, longest, window_size=(-1, 0), **grouped)

        backend = SDPBackend.CUDNN_ATTENTION if name == "cudnn" else SDPBackend.FLASH_ATTENTION
        return flash_package(sdpa(backend), varlen)
    if name == "fa4":
        # Kernels are compiled at their first use; kept on the disk, only at the first on this machine.
        os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")
        from flash_attn.cute import flash_attn_func, flash_attn_varlen_func

        def causal(q, k, v):
            return _first(flash_attn_func(q, k, v, causal=True))

        def varlen(q, k, v, cu, longest):
            kwargs = dict(cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=longest, max_seqlen_k=longest)
            return _first(flash_attn_varlen_func(q, k, v, causal=True, **kwargs))

        return flash_package(causal, varlen)
    if name == "fa2":
        from flash_attn import flash_attn_func, flash_attn_varlen_func

        return flash_package(
            lambda q, k, v: flash_attn_func(q, k, v, causal=True),
            lambda q, k, v, cu, longest: flash_attn_varlen_func(q, k, v, cu, cu, longest, longest, causal=True),
        )
    if name == "xformers":
        memory_efficient, Causal, CausalDocuments = _xformers()

        def repeated(q, k, v, mask):
            return memory_efficient(q, *repeat_heads(q, k, v), mask)

        def varlen(q, k, v, cu, longest):
            lengths = cu.unique().diff().tolist()  # waits for the device: it wants to know them on the host, too
            return repeated(q[None], k[None], v[None], CausalDocuments.from_seqlens(lengths))[0]

        return flash_package(lambda q, k, v: repeated(q, k, v, Causal()), varlen)
    return attention


def _xformers() -> tuple[Callable, type, type]:
    """memory_efficient_attention and its masks. xformers 0.0.35 takes every package called flash_attn for flash-attn,
    and breaks on flash-attn-4, which is another one under that name: it is out of sight for the import."""
    found = importlib.util.find_spec("flash_attn") and importlib.import_module("flash_attn")
    alone = found and importlib.util.find_spec("flash_attn.flash_attn_interface") is None
    if alone:
        sys.modules["flash_attn"] = None
    logging.getLogger("xformers").setLevel(logging.ERROR)  # what it warns of on import is raised below
    try:
        import xformers
        from xformers.ops import LowerTriangularMask, memory_efficient_attention
        from xformers.ops.fmha.attn_bias import BlockDiagonalCausalMask
    finally:
        if alone:
            sys.modules["flash_attn"] = found
    if not getattr(xformers, "_has_cpp_library", True):  # without it, it refuses even what PyTorch has the kernels for
        where = "pip's --index-url https://download.pytorch.org/whl/cu130 has those for CUDA 13.0"
        raise ImportError(f"version {xformers.__version__} is built for another PyTorch or CUDA; {where}")
    return memory_efficient_attention, LowerTriangularMask, BlockDiagonalCausalMask


def _first(result: torch.Tensor | tuple) -> torch.Tensor:
    return result[0] if isinstance(result, tuple) else result  # versions differ in whether the log-sum-exp comes along


NAMES = ("fa4", "fa2", "cudnn", "flash", "efficient", "xformers", "math", "torch")


def usable(name: str, device: torch.device, dtype: torch.dtype, heads: tuple[int, int, int] = (4, 2, 64)) -> str:
    """Why this attention cannot run forward and backward here; "" if it can. Tried on a small problem with these heads
    (H, G, D), since what a version of a package supports is best known by itself."""
    if name in ("torch", "math"):
        return ""
    if device.type != "cuda":
        return "needs a CUDA GPU"
    try:
        backend = load(name)
        H, G, D = heads
        with torch.inference_mode(False), torch.enable_grad():  # whoever asks may have switched gradients off
            q, k, v = (torch.randn(1, 256, n, D, device=device, dtype=dtype, requires_grad=True) for n in (H, G, G))
            backend(q, k, v).sum().backward()
    except ImportError as e:
        if name == "xformers" and importlib.util.find_spec("xformers"):
            return f"is installed, but does not work here ({e}); `auto` needs no package but torch"
        return f"not installed: {INSTALL[name]} ({e})"
    except Exception as e:  # whatever a foreign package raises, it does not work here
        return f"fails here: {str(e).strip().splitlines()[0][:80] if str(e).strip() else type(e).__name__}"
    return ""
