"""Sequences for training, drawn from packed shards in one global order.

The order is a function of (seed, sources, global index) and of nothing else:

    global index i  -> Mix.locate       -> source s, k-th sequence of s
    (s, k)          -> divmod(k, n_s)   -> epoch, place in the epoch
    (epoch, place)  -> permute          -> position in the source's stream of tokens

No step remembers anything, so the state of a run is one number, how many sequences it has consumed; a resume costs the
same at the start and at the end; and the number of ranks, workers and the micro-batch only decide who computes which
part of the order. In micro-step k, rank r of W takes the global indices [start + (k·W + r)·b, + b).

A sequence has block_size + 1 tokens and sequences overlap by one: the last token of one is the first of the next.
Cut so, every token of the stream (but its first) is exactly once a target. Cut without the overlap, as the original
does, one transition in block_size + 1 is never learnt. Fewer than block_size tokens at a source's end are dropped in
training, and reported; validation includes them. Where a row of a batch has no token, past the end of the data, it
holds IGNORE_INDEX: as a target that is ignored, as an input any id will do (`tokens[:, :-1].clamp(min=0)`).

    dataset = PackedDataset(data_dir, {"train_slim": 0.7, "train_star": 0.3}, block_size=2048, seed=1, vocab_size=32000)
    loader = PackedLoader(dataset, micro_batch_size=8, rank=0, world_size=1)
    for tokens in loader:  # (B, block_size + 1), int64
        ...
    state = loader.state_dict()  # small JSON; loader.load_state_dict(state) on any number of ranks
"""

import atexit
import hashlib
import itertools
import signal
import sys
import time
import weakref
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from lit_gpt.kernels import IGNORE_INDEX
from lit_gpt.mix import Mix, hash64, permute
from lit_gpt.shards import TokenStream

# --- documents inside a batch ----------------------------------------------------------------------------------------


class DocumentBatch(NamedTuple):
    """A batch whose attention, positions and loss stop at the documents' boundaries."""

    tokens: torch.Tensor
    """(B, T + 1) int64"""
    cu_seqlens: torch.Tensor
    """(B·max_documents + 1,) int32: where each document begins in the B·T inputs laid end to end, then B·T up to a
    fixed size (empty documents), as flash attention's varlen functions and torch.compile want it"""
    positions: torch.Tensor
    """(B, T) int64: place in its document"""
    loss_weights: torch.Tensor
    """(B, T) float32: 0 where the target is the beginning of another document, or IGNORE_INDEX; else 1"""


def document_batch(tokens: torch.Tensor, bos_id: int | None, eos_id: int | None, max_documents: int) -> DocumentBatch:
    """Find the documents in (B, T + 1) tokens: one begins with each row, at each bos_id and after each eos_id.

    Raises: ValueError if there are more than B·max_documents.
    """
    (B, T), idx = tokens[:, :-1].shape, tokens[:, :-1]
    ends = idx == eos_id if eos_id is not None else torch.zeros_like(idx, dtype=torch.bool)
    begins = idx == bos_id if bos_id is not None else torch.zeros_like(ends)
    begins[:, 1:] |= ends[:, :-1]
    begins[:, 0] = True
    first = begins.flatten().nonzero().flatten()
    if len(first) > B * max_documents:
        raise ValueError(f"{len(first)} documents in a micro-batch of {B}: raise max_documents above {max_documents}")
    cu_seqlens = torch.full((B * max_documents + 1,), B * T, dtype=torch.int32)
    cu_seqlens[: len(first)] = first
    document = begins.flatten().cumsum(0) - 1
    positions = (torch.arange(B * T) - first[document]).view(B, T)
    loss_weights = (~ends & (tokens[:, 1:] != IGNORE_INDEX)).float()
    return DocumentBatch(tokens, cu_seqlens, positions, loss_weights)


# --- the data sets ---------------------------------------------------------------------------------------------------


class PackedSequences(Dataset):
    """Sequences of block_size + 1 tokens out of one or more sources; the two classes below say in which order."""

    def __init__(
        self,
        data_dir: str | Path,
        prefixes: list[str],
        block_size: int,
        vocab_size: int,
        document_mask: bool = False,
        max_documents: int = 64,
        cache_dir: str | Path | None = None,
        cache_bytes: int = 0,
    ):
        if block_size < 1:
            raise ValueError(f"block_size is {block_size}; it must be at least 1")
        if not prefixes:
            raise ValueError("no sources: name at least one prefix of the shards")
        for a, b in itertools.permutations(set(prefixes), 2):
            if b.startswith(a):
                raise ValueError(f"the shards of {b} are also shards of {a}*: name prefixes that exclude each other")
        self.block_size = block_size
        share = cache_bytes // len(prefixes)
        self.streams = {
            prefix: TokenStream(data_dir, prefix, vocab_size=vocab_size, cache_dir=cache_dir, cache_bytes=share)
            for prefix in sorted(prefixes)
        }
        manifests = [manifest for stream in self.streams.values() for manifest in stream.manifests]
        for other in manifests[1:]:
            for what, mine, its in (
                ("tokenizer", manifests[0].tokenizer.get("sha256"), other.tokenizer.get("sha256")),
                ("delimiters", manifests[0].delimiters, other.delimiters),
            ):
                if mine != its:
                    raise ValueError(
                        f"{data_dir}: {manifests[0].prefix} and {other.prefix} differ in their {what} ({mine}, {its}): "
                        f"one model cannot learn from both; prepare them alike"
                    )
        self.tokenizer: dict | None = manifests[0].tokenizer if manifests else None
        """name, sha256, vocab_size, bos_id, eos_id from the manifests; None without one"""
        self.delimiters: str | None = manifests[0].delimiters if manifests else None
        self.document_mask, self.max_documents = document_mask, max_documents
        if document_mask:
            if self.delimiters in (None, "none"):
                raise ValueError(
                    f"{data_dir}: document_mask needs to know the delimiters of the documents, and "
                    + ("there are none" if self.delimiters else "there is no manifest")
                )
            self._bos_id = self.tokenizer["bos_id"] if "bos" in self.delimiters else None
            self._eos_id = self.tokenizer["eos_id"] if "eos" in self.delimiters else None

    def locate(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For each global index: the number of its source in sorted order, and its first token in that stream."""
        raise NotImplementedError

    def describe(self, index: int) -> str:
        """Where the sequence of a global index begins, for messages: source, shard and token in the shard."""
        source, start = (int(x[0]) for x in self.locate(np.array([index])))
        name, stream = list(self.streams.items())[source]
        shard, offset = stream.locate(start)
        return f"sequence {index} ({name}: {shard}, token {offset})"

    def verify(self) -> None:
        """Read all data: checksums, and every id against the vocabulary. Raises: ValueError."""
        for stream in self.streams.values():
            stream.verify()

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.tokens([index])[0]

    def __getitems__(self, indices: list[int] | range) -> "torch.Tensor | DocumentBatch":
        """The batch of some global indices, as DataLoader asks for it."""
        tokens = self.tokens(indices)
        if not self.document_mask:
            return tokens
        return document_batch(tokens, self._bos_id, self._eos_id, self.max_documents)

    def tokens(self, indices: list[int] | range) -> torch.Tensor:
        """(len(indices), block_size + 1) int64; rows past the end of the data are IGNORE_INDEX."""
        indices = np.asarray(indices, dtype=np.int64)
        rows = np.full((len(indices), self.block_size + 1), IGNORE_INDEX, dtype=np.int64)
        inside = np.flatnonzero(indices < self.end) if self.end is not None else np.arange(len(indices))
        source, start = self.locate(indices[inside])
        for s, stream in enumerate(self.streams.values()):
            if len(mine := np.flatnonzero(source == s)):
                rows[inside[mine]] = stream.read(start[mine], self.block_size + 1, fill=IGNORE_INDEX)
        return torch.from_numpy(rows)


class PackedDataset(PackedSequences):
    """Training data: `dataset[i]` is sequence i of the global order, for any i, whatever was read before.

    Args:
        data_dir: a folder, or an fsspec URL such as s3://bucket/folder.
        mix: weight of each source, by the prefix of its shards.
        block_size: context length; sequences have one token more.
        seed: of the shuffle.
        vocab_size: the model's; other ids are refused.
        exhaustion: what happens when a source has been read `max_epochs` times. "repeat": sources start again, each
            time in another order, without end (and without max_epochs). "stop": the data end as soon as one source
            does. "renormalise": the others go on in their ratios until all have ended.
        max_epochs: how often each source may be read; a number, or one for each prefix. 1 if not given.
        document_mask: batches are DocumentBatch, from the delimiters that the manifest names.
        max_documents: room for documents in a DocumentBatch, per row on average.
        cache_dir: keep shards of a remote data_dir in this folder ...
        cache_bytes: ... but no more than this.

    Raises: FileNotFoundError, ValueError: see TokenStream; sources that differ in tokenizer or delimiters, are shorter
    than one sequence, or arguments that contradict each other.
    """

    def __init__(
        self,
        data_dir: str | Path,
        mix: dict[str, float],
        block_size: int,
        *,
        seed: int,
        vocab_size: int,
        exhaustion: Literal["repeat", "stop", "renormalise"] = "repeat",
        max_epochs: float | dict[str, float] | None = None,
        document_mask: bool = False,
        max_documents: int = 64,
        cache_dir: str | Path | None = None,
        cache_bytes: int = 50 << 30,
    ):
        if not all(np.isfinite(weight) and weight >= 0 for weight in mix.values()) or not sum(mix.values()) > 0:
            raise ValueError(f"the weights of a mix must be 0 or more, and not all 0; got {mix}")
        if exhaustion not in ("repeat", "stop", "renormalise"):
            raise ValueError(f"exhaustion is repeat, stop or renormalise, not {exhaustion!r}")
        if exhaustion == "repeat" and max_epochs is not None:
            raise ValueError("max_epochs needs a word on what follows: exhaustion stop or renormalise")
        super().__init__(
            data_dir, list(mix), block_size, vocab_size, document_mask, max_documents, cache_dir, cache_bytes
        )
        self.seed = seed
        self.sequences = {name: (stream.tokens - 1) // block_size for name, stream in self.streams.items()}
        """Whole sequences in one epoch of each source"""
        for name, n in self.sequences.items():
            if n < 1:
                raise ValueError(
                    f"{data_dir}: {name} has {self.streams[name].tokens:,} tokens, not one sequence of "
                    f"{block_size + 1:,}; use a smaller block_size, or more data"
                )
        if not isinstance(max_epochs, dict):
            max_epochs = dict.fromkeys(mix, 1 if max_epochs is None else max_epochs)
        if max_epochs.keys() != mix.keys() or min(max_epochs.values()) <= 0:
            raise ValueError(f"max_epochs must be above 0 for each of {', '.join(mix)}; got {max_epochs}")
        self.mix = Mix(
            dict(mix),
            {name: None if exhaustion == "repeat" else int(max_epochs[name] * self.sequences[name]) for name in mix},
            "stop" if exhaustion == "repeat" else exhaustion,
        )
        keys = [int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "big") for name in self.streams]
        self._keys = np.array(keys, dtype=np.uint64)

    @property
    def end(self) -> int | None:
        """How many sequences the run can draw; None when sources are repeated without end."""
        return self.mix.end

    def locate(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        source, k = self.mix.locate(indices)
        start = np.zeros_like(k)
        for s, n in enumerate(self.sequences.values()):
            mine = source == s
            epoch, place = np.divmod(k[mine], n)
            start[mine] = permute(place, n, hash64(self._keys[s] ^ hash64(epoch.astype(np.uint64)))) * self.block_size
        return source, start

    def accounts(self, index: int) -> dict[str, dict[str, float]]:
        """For each source, the `tokens` (targets) and `epochs` read before a global index."""
        drawn = self.mix.drawn_before(index)
        return {
            name: {"tokens": drawn[name] * self.block_size, "epochs": drawn[name] / n}
            for name, n in self.sequences.items()
        }

    def table(self) -> str:
        """One line for each source, to print at the start of a run."""
        lines = []
        for name, stream in self.streams.items():
            n = self.sequences[name]
            weight = self.mix.weights[name] / sum(self.mix.weights.values())
            lines.append(
                f"{name}: {weight:.4%} of the mix, {len(stream.names):,} shards, {stream.tokens:,} tokens = {n:,} "
                f"sequences; {stream.tokens - 1 - n * self.block_size:,} tokens at the end are not used"
            )
        return "\n".join(lines)

    def state_dict(self) -> dict:
        """What the order depends on."""
        return {
            "seed": self.seed,
            "block_size": self.block_size,
            "tokenizer": (self.tokenizer or {}).get("sha256"),
            "tokens": {name: stream.tokens for name, stream in self.streams.items()},
            "mix": self.mix.state_dict(),
        }

    def load_state_dict(self, state: dict, index: int, resume_mix: Literal["keep", "change"] = "keep") -> None:
        """Go on, from global index `index`, in the order that `state` describes.

        With resume_mix="change", the mix that this data set was made with takes over there; it continues in each
        source where the run left it, so that nothing is repeated within an epoch.

        Raises: ValueError when seed, block_size, tokenizer or the data are not those of the state, or the mix is not
        and was not asked to change.
        """
        mine = self.state_dict()
        for key in ("seed", "block_size", "tokenizer"):
            if mine[key] != state[key]:
                raise ValueError(f"cannot resume: {key} was {state[key]} and is now {mine[key]}")
        for name in mine["tokens"].keys() & state["tokens"].keys():
            if mine["tokens"][name] != state["tokens"][name]:
                raise ValueError(
                    f"cannot resume: {name} had {state['tokens'][name]:,} tokens and now has {mine['tokens'][name]:,}; "
                    f"add new data under another prefix"
                )
        before = Mix(**state["mix"])
        if self.mix.same_order(before):
            self.mix = before
        elif resume_mix == "change":
            self.mix = Mix(self.mix.weights, self.mix.limits, self.mix.at_limit, index, before.drawn_before(index))
        else:
            raise ValueError(
                f"cannot resume: the mix was {before} and is now {self.mix}; to take the new one from here on, pass "
                f"--resume_mix change"
            )


class ValidationSet(PackedSequences):
    """Validation data: all sequences of its sources (or a fixed, evenly spread choice of `max_sequences`), in order.

    Every call of `batches` gives the same sequences at any world size, and every rank the same number of batches: the
    tail of each source is included, and what is missing at the end of a row, or of the last batches, is IGNORE_INDEX.

    Args and Raises: as PackedDataset.
    """

    def __init__(
        self,
        data_dir: str | Path,
        prefixes: list[str],
        block_size: int,
        *,
        vocab_size: int,
        max_sequences: int | None = None,
        document_mask: bool = False,
        max_documents: int = 64,
        cache_dir: str | Path | None = None,
        cache_bytes: int = 50 << 30,
    ):
        super().__init__(
            data_dir, prefixes, block_size, vocab_size, document_mask, max_documents, cache_dir, cache_bytes
        )
        counts = [-(-(stream.tokens - 1) // block_size) for stream in self.streams.values()]
        self._first = np.concatenate([[0], np.cumsum(counts)])  # of each source, among all sequences
        self._all = int(self._first[-1])
        if self._all < 1:
            raise ValueError(f"{data_dir}: {', '.join(prefixes)}: fewer than two tokens, nothing to validate on")
        self.end = min(self._all, max_sequences or self._all)

    def __len__(self) -> int:
        return self.end

    def locate(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        indices = indices * self._all // self.end
        source = np.searchsorted(self._first, indices, side="right") - 1
        return source, (indices - self._first[source]) * self.block_size

    def batches(
        self, micro_batch_size: int, rank: int = 0, world_size: int = 1
    ) -> Iterator["torch.Tensor | DocumentBatch"]:
        """The batches of one rank, (micro_batch_size, block_size + 1) int64 each."""
        for indices in _micro_batches(0, self.end, micro_batch_size, rank, world_size):
            yield self.__getitems__(indices)


# --- the loader ------------------------------------------------------------------------------------------------------


def _micro_batches(start: int, end: int | None, size: int, rank: int, world_size: int) -> Iterator[range]:
    """The global indices of each micro-batch of one rank; as many for every rank, the last ones may exceed `end`."""
    for first in itertools.count(start, world_size * size):
        if end is not None and first >= end:
            return
        yield range(first + rank * size, first + (rank + 1) * size)


HANGS_S = 600  # a worker that has not delivered for so long will not
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # a scheduler's, of which workers take no notice


class PackedLoader:
    """Micro-batches for one rank, made by worker processes, with a state that is a count.

    Iterating gives (micro_batch_size, block_size + 1) int64 tensors (DocumentBatch with document_mask), in pinned
    memory where there is a GPU, from where the count stands. All ranks get the same number; when the data end, rows
    past the end are IGNORE_INDEX.

    Args:
        dataset: a PackedDataset; not to be changed afterwards other than through load_state_dict.
        micro_batch_size: sequences in a batch.
        rank: of this process among `world_size`, in data parallelism.
        num_workers: processes that read ahead; 0 reads in this process.
        prefetch: batches that each worker reads ahead.
    """

    def __init__(
        self,
        dataset: PackedDataset,
        micro_batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 1,
        prefetch: int = 4,
    ):
        self.dataset = dataset
        self.micro_batch_size = micro_batch_size
        self.rank, self.world_size = rank, world_size
        self.num_workers, self.prefetch = num_workers, prefetch
        self.sequences = 0
        """Sequences that all ranks together have taken out of the loader; what workers read ahead does not count"""

    def __iter__(self) -> Iterator["torch.Tensor | DocumentBatch"]:
        batches = self._batches()
        # After an error nobody ends the loop over them; Python would wait for ever for workers that outlive SIGTERM.
        atexit.register(_close, weakref.ref(batches))
        return batches

    def _batches(self) -> Iterator["torch.Tensor | DocumentBatch"]:
        end, step = self.dataset.end, self.micro_batch_size * self.world_size
        batches = DataLoader(
            _Guarded(self.dataset),
            batch_sampler=_micro_batches(self.sequences, end, self.micro_batch_size, self.rank, self.world_size),
            collate_fn=_as_it_is,
            num_workers=self.num_workers,
            prefetch_factor=self.prefetch if self.num_workers else None,
            pin_memory=torch.cuda.is_available(),
            # DataLoader draws a seed for its workers; from the global generator that would change the run's dropout.
            generator=torch.Generator(),
            worker_init_fn=_outlive_signals,
            timeout=HANGS_S if self.num_workers else 0,
            # Linux's own choice until Python 3.14. A worker that is not our child dies without our being told.
            multiprocessing_context="fork" if self.num_workers and sys.platform == "linux" else None,
        )
        # Workers start here with these signals blocked, until they ignore them: none is lost to one in between.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            batches = iter(batches)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                return
            except RuntimeError as e:  # DataLoader's: a worker was killed, or has hung
                batch = OSError(f"rank {self.rank} gets no data: {e}")
            except (ConnectionError, EOFError) as e:  # a worker was killed while a batch was on its way
                batch = OSError(f"rank {self.rank} gets no data: {e}")
                with suppress(RuntimeError):  # of torch's signal handler: here it disturbs no report
                    time.sleep(1)
            if isinstance(batch, Exception):
                batches = None  # ends the workers, to which the error's traceback would hold on
                raise batch
            self.sequences = self.sequences + step if end is None else min(self.sequences + step, end)
            yield batch

    def accounts(self) -> dict[str, dict[str, float]]:
        """For each source, the `tokens` and `epochs` that all ranks together have taken out of the loader."""
        return self.dataset.accounts(self.sequences)

    def state_dict(self) -> dict:
        """Small, JSON, the same on every rank and for every number of ranks."""
        return {"sequences": self.sequences, **self.dataset.state_dict()}

    def load_state_dict(self, state: dict, resume_mix: Literal["keep", "change"] = "keep") -> None:
        """Go on where `state` was taken; call it before iterating. Raises: see PackedDataset.load_state_dict."""
        self.dataset.load_state_dict(state, state["sequences"], resume_mix)
        self.sequences = state["sequences"]


class _Guarded(Dataset):
    """Hands over a worker's error as a value: raised there, DataLoader would wrap it in the text of a traceback."""

    def __init__(self, dataset: PackedDataset):
        self.dataset = dataset

    def __getitems__(self, indices: range) -> "torch.Tensor | DocumentBatch | Exception":
        try:
            return self.dataset.__getitems__(indices)
        except (ValueError, OSError) as error:
            return error


def _as_it_is(batch):
    return batch


def _outlive_signals(worker: int) -> None:
    """A scheduler sends its signals to all processes of a job, and the main one still finishes and saves its step.
    DataLoader ends the workers by other means, and they end by themselves when the main process is gone."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def _close(generator: weakref.ref) -> None:
    if (batches := generator()) is not None:
        batches.close()
