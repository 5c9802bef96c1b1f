"""A model that answers: the engine under the terminal, the page and the HTTP endpoint.

chat = ChatModel.open("out/chat/hf")
reply = chat.reply([{"role": "user", "content": "Hello"}], Sampling(temperature=0))
for piece in reply:                  # as it is written
    print(piece, end="")
reply.finish_reason                  # "stop", or "length"
"""

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from lit_gpt.chat_template import ChatTemplate, Message
from lit_gpt.generate import ContextFull, check_settings, stream, stream_text
from lit_gpt.hub import local_folder
from lit_gpt.kernels import select_kernels
from lit_gpt.model import GPT
from lit_gpt.pretrained import load_model, open_pretrained, refuse_other_tokenizer, resolve_device
from lit_gpt.retrieval import Documents, Passage, with_passages
from lit_gpt.tokenizer import Tokenizer


@dataclass(frozen=True)
class Sampling:
    """How a reply is chosen."""

    temperature: float = 0.7
    """0: always the most likely token."""
    top_p: float = 0.95
    """Of the fewest tokens that have this probability together."""
    top_k: int | None = None
    """Of the k most likely ones."""
    max_new_tokens: int = 512
    """Longest reply; the context can be full earlier."""
    seed: int | None = None
    """The same one gives the same reply."""
    stop: tuple[str, ...] = ()
    """Texts that end a reply, and are not part of it."""


class PromptTooLong(ValueError):
    """The conversation leaves no room for a reply in the model's context."""


class ChatModel:
    """A model and its template. Threads may share it: their replies take turns, token by token, so that one whom nobody
    reads holds up no other."""

    def __init__(self, model: GPT, template: ChatTemplate, name: str = "") -> None:
        self.model, self.template, self.name = model, template, name or model.config.name
        self._lock = threading.Lock()

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        template: str = "auto",
        tokenizer_path: Path | None = None,
        device: str = "auto",
        dtype: torch.dtype | None = None,
    ) -> "ChatModel":
        """
        Args:
            path: a run of sft/finetune.py, its hf/ or adapters/, any other Hugging Face folder or our own checkpoints,
                adapters of peft's, or a hub id.
            template: one of chat_template.TEMPLATES; auto takes the model's own, or zephyr where it has none.
            device: auto takes a GPU if there is one.
            dtype: None is bfloat16 on a GPU, float32 on a CPU.

        Raises:
            FileNotFoundError, ValueError: see resolve_device, open_pretrained, Tokenizer and ChatTemplate.
        """
        device = resolve_device(device)
        folder = local_folder(str(path))
        found = open_pretrained(folder)
        tokenizer_path = tokenizer_path or found.tokenizer
        if tokenizer_path is None:
            raise ValueError(f"{path} holds no tokenizer: give --tokenizer_path")
        tokenizer = Tokenizer(tokenizer_path)
        refuse_other_tokenizer(found, tokenizer)
        chosen = None if template != "auto" else ChatTemplate.of_model(tokenizer.path.parent, tokenizer)
        chosen = chosen or ChatTemplate.named("zephyr" if template == "auto" else template, tokenizer)
        dtype = dtype or (torch.float32 if device == "cpu" else torch.bfloat16)
        kernels = select_kernels("auto", device=torch.device(device), dtype=dtype, training=False)
        folder = folder.resolve()
        name = folder.parent.name if folder.name in ("hf", "adapters") else folder.name
        return cls(load_model(found, kernels, device, dtype), chosen, name)

    def reply(self, messages: Sequence[Message], sampling: Sampling = Sampling()) -> "Reply":  # noqa: B008
        """The reply to a conversation that ends with the user's message; it is written as it is iterated over.

        Raises:
            PromptTooLong: the prompt fills the context.
            ValueError: messages or settings that make no sense.
        """
        check_settings(sampling.temperature, sampling.top_k, sampling.top_p, sampling.max_new_tokens)
        if not messages or messages[-1].get("role") != "user":
            raise ValueError("the last message has to be the user's")
        # Tokens are made of at least one byte, but a long text takes long to cut into them: what cannot fit is not.
        block_size = self.model.config.block_size
        if sum(len(str(m.get("content"))) for m in messages) > 32 * block_size:
            raise PromptTooLong(f"the conversation is far longer than the model's context of {block_size} tokens")
        prompt = self.template.prompt(messages)
        if len(prompt) >= block_size:
            raise PromptTooLong(f"the conversation has {len(prompt)} tokens and the model's context {block_size}")
        return Reply(self, prompt, sampling)

    def ask(self, messages: list[Message], sampling: Sampling, documents: Documents | None = None) -> "Reply":
        """As `reply`, in a conversation that may be longer than the context: its oldest exchanges are forgotten, and of
        the passages that `documents` has for the last question those that fit go with it. See Reply.asked and .sources.
        """
        block_size = self.model.config.block_size
        room = min(sampling.max_new_tokens, block_size // 4)  # a longer reply must not push everything out
        asked = self.forget_oldest(messages, room)
        sources = documents.search(messages[-1]["content"]) if documents else []
        while sources and len(self.template.prompt(with_passages(asked, sources))) + room > block_size:
            sources = sources[:-1]
        reply = self.reply(with_passages(asked, sources), sampling)
        reply.asked, reply.sources = asked, sources
        return reply

    def forget_oldest(self, messages: list[Message], room: int) -> list[Message]:
        """The conversation without its oldest exchanges, so that `room` tokens are left for a reply, or as many as the
        last question alone leaves. A system message stays."""
        system, turns = (messages[:1], messages[1:]) if messages[0]["role"] == "system" else ([], list(messages))
        while len(turns) > 2 and len(self.template.prompt(system + turns)) + room > self.model.config.block_size:
            turns = turns[2:]
        return system + turns


class Reply:
    """The text of a reply, piece by piece; afterwards how it ended."""

    finish_reason: str | None = None
    """"stop": the model ended its turn, or one of the stop texts came; "length": it was cut off."""
    completion_tokens: int = 0
    asked: list[Message] = []
    """From `ask`: what was not forgotten of the conversation."""
    sources: list[Passage] = []
    """From `ask`: what went with the question."""

    def __init__(self, chat: ChatModel, prompt: list[int], sampling: Sampling) -> None:
        self.chat, self.prompt, self.sampling = chat, prompt, sampling

    def __iter__(self) -> Iterator[str]:
        chat, s = self.chat, self.sampling
        device = chat.model.lm_head.weight.device
        generator = torch.Generator(device)
        generator.manual_seed(s.seed) if s.seed is not None else generator.seed()
        ids = stream(
            chat.model,
            self.prompt,
            min(s.max_new_tokens, chat.model.config.block_size - len(self.prompt)),
            eos_id=chat.template.eos_id,
            temperature=s.temperature,
            top_k=s.top_k,
            top_p=s.top_p,
            generator=generator,
        )
        held = ""  # back: what may yet turn out to be a stop text, and the blanks at the end
        begun = False
        for piece in stream_text(chat.template.tokenizer, self.prompt, self._counted(ids)):
            held = held + piece if begun else (held + piece).lstrip()
            begun = begun or bool(held)
            stops = [at for text in s.stop if (at := held.find(text)) >= 0]
            if stops:
                held, self.finish_reason = held[: min(stops)], "stop"
                break
            ready = settled(held, s.stop)
            if ready:
                yield held[:ready]
                held = held[ready:]
        if held.rstrip():
            yield held.rstrip()

    def _counted(self, ids: Iterator[int]) -> Iterator[int]:
        self.finish_reason = "length"
        while True:
            try:
                with self.chat._lock:
                    i = next(ids)
            except (StopIteration, ContextFull):
                return
            self.completion_tokens += 1
            if i == self.chat.template.eos_id:
                self.finish_reason = "stop"
            yield i


def settled(text: str, stop: Sequence[str]) -> int:
    """How much of the text can be shown: neither blanks at its end nor what may be the beginning of a stop text."""
    ready = len(text.rstrip())
    return next((i for i in range(ready) if any(s.startswith(text[i:]) for s in stop)), ready)
