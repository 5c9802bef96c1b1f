"""Conversations to token ids: one Jinja template for training, inference and the exported tokenizer_config.json.

    template = ChatTemplate.named("zephyr", tokenizer)
    template.prompt([{"role": "user", "content": "Hello"}])     # ids, ending where a reply begins
    template.encode(messages)                                   # ids, and which of them are the assistant's

Special tokens come from the template alone. What people write is encoded as the characters that it is, so a "</s>" in a
message ends nothing. A turn of the assistant ends with one token, the tokenizer's end of turn, which is trained and at
which generation stops; the vocabulary never grows.
"""

import functools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from lit_gpt.tokenizer import Tokenizer
from lit_gpt.weights import read_json, write_json

Message = dict[str, str]
"""{"role": "system", "user" or "assistant", "content": ...}, as in OpenAI's API."""

# eos_token is the end of turn of the tokenizer_config.json that the template is written into.
TEMPLATES = {
    # TinyLlama-1.1B-Chat-v1.0
    "zephyr": (
        "{% for message in messages %}"
        "{{ '<|' + message['role'] + '|>\\n' + (message['content'] | trim) + eos_token + '\\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
    ),
    "chatml": (
        "{% for message in messages %}"
        "{{ '<|im_start|>' + message['role'] + '\\n' + (message['content'] | trim) + eos_token + '\\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    # openassistant-guanaco and TinyLlama-1.1B-Chat-V0.1, with the end of turn that they lack
    "guanaco": (
        "{{ bos_token }}{% for message in messages %}"
        "{% if message['role'] == 'user' %}{{ '### Human: ' + (message['content'] | trim) }}"
        "{% elif message['role'] == 'assistant' %}{{ '### Assistant: ' + (message['content'] | trim) + eos_token }}"
        "{% else %}{{ (message['content'] | trim) + '\\n' }}{% endif %}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '### Assistant:' }}{% endif %}"
    ),
    "llama2": (
        "{% set ns = namespace(system='') %}{% for message in messages %}"
        "{% if message['role'] == 'system' %}"
        "{% set ns.system = '<<SYS>>\\n' + (message['content'] | trim) + '\\n<</SYS>>\\n\\n' %}"
        "{% elif message['role'] == 'user' %}"
        "{{ bos_token }}{{ '[INST] ' + ns.system + (message['content'] | trim) + ' [/INST]' }}{% set ns.system = '' %}"
        "{% else %}{{ ' ' + (message['content'] | trim) + ' ' + eos_token }}{% endif %}"
        "{% endfor %}"
    ),
    "llama3": (
        "{{ bos_token }}{% for message in messages %}"
        "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}"
        "{{ (message['content'] | trim) + eos_token }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
    ),
}
END_OF_TURN = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>"}
"""What a format ends a turn with if the tokenizer has that token; otherwise, and in the other formats, its EOS."""


class Straddle(ValueError):
    """A token would lie across the border between the prompt and the reply, where generation cannot begin."""


@dataclass(frozen=True)
class Encoded:
    """A conversation as token ids."""

    ids: list[int]
    trained: list[bool]
    """For each id: whether it is the assistant's, words or end of turn."""
    ends: list[int]
    """For each reply: how many ids there are up to and with its end of turn."""


class ChatTemplate:
    """
    Args:
        source: the Jinja template, as transformers' apply_chat_template takes it.
        end_of_turn: the special token after every reply.

    Raises:
        ValueError: the template is not Jinja, does not end a reply with end_of_turn, or changes what messages say.
    """

    def __init__(self, source: str, tokenizer: Tokenizer, end_of_turn: str, name: str = "the model's own") -> None:
        if end_of_turn not in tokenizer.special:
            raise ValueError(f"{tokenizer.path}: {end_of_turn!r}, which should end a turn, is not a special token")
        self.source, self.tokenizer, self.name = source, tokenizer, name
        self.end_of_turn, self.eos_id = end_of_turn, tokenizer.special[end_of_turn]
        self.bos_token = next((text for text, i in tokenizer.special.items() if i == tokenizer.bos_id), "")
        longest_first = sorted(tokenizer.special, key=len, reverse=True)
        self._special = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")
        self._template = _compile(source, name)
        # One exchange and a second one: everything that could be wrong with a template shows here.
        probe = [{"role": role, "content": role} for role in ("user", "assistant", "user", "assistant")]
        try:
            self.encode(probe)
        except Straddle as e:
            raise ValueError(f"chat template {name} does not fit {tokenizer.path}: {e}; take another one") from e

    @classmethod
    def named(cls, name: str, tokenizer: Tokenizer) -> "ChatTemplate":
        """One of TEMPLATES. Raises ValueError for another name, or a tokenizer without EOS."""
        if name not in TEMPLATES:
            raise ValueError(f"unknown chat template {name!r}. Known: auto, {', '.join(TEMPLATES)}")
        end = END_OF_TURN.get(name)
        if end not in tokenizer.special:
            end = next((text for text, i in tokenizer.special.items() if i == tokenizer.eos_id), None)
        if end is None:
            raise ValueError(f"{tokenizer.path} has no EOS token, so nothing can end a turn")
        return cls(TEMPLATES[name], tokenizer, end, name)

    @classmethod
    def of_model(cls, folder: Path, tokenizer: Tokenizer) -> "ChatTemplate | None":
        """The template that comes with a Hugging Face folder; None where there is none."""
        config_file, jinja_file = folder / "tokenizer_config.json", folder / "chat_template.jinja"
        config = read_json(config_file) if config_file.is_file() else {}
        source = jinja_file.read_text(encoding="utf-8") if jinja_file.is_file() else config.get("chat_template")
        if isinstance(source, list):  # several, by name
            source = next((t["template"] for t in source if t["name"] == "default"), None)
        if not source:
            return None
        eos = config.get("eos_token")
        eos = eos["content"] if isinstance(eos, dict) else eos
        if eos is None:
            raise ValueError(f"{config_file} names no eos_token, which its chat template needs to end a turn")
        return cls(source, tokenizer, eos)

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """The ids up to where the assistant's next reply begins."""
        check_messages(messages)
        literals = self._literals(messages, generation=True)
        ids, run = [], ""
        for literal, content in zip(literals, [*(m["content"].strip() for m in messages), ""], strict=True):
            for text in self._special.split(literal):
                if text in self.tokenizer.special:
                    ids += [*self._encode(run), self.tokenizer.special[text]]
                    run = ""
                else:
                    run += text
            run += content
        return ids + self._encode(run)

    def encode(self, messages: Sequence[Message]) -> Encoded:
        """The ids of a conversation, and which of them are the assistant's.

        Text between two special tokens is encoded as a whole, as transformers does with the rendered conversation. The
        border between prompt and reply has to fall between two tokens there, the same as when the prompt is encoded
        alone, since that is what a model sees that has to reply.

        Raises:
            Straddle: it does not.
        """
        check_messages(messages)
        literals = self._literals(messages, generation=False)
        roles = tuple(m["role"] for m in messages)
        encoded = Encoded([], [], [])
        run, reply_from = "", None  # text since the last special token, and where in it a reply begins

        def finish_run() -> None:
            ids = self._encode(run)
            n_prompt = len(ids)
            if reply_from is not None:
                prompt = self._encode(run[:reply_from])
                n_prompt = len(prompt)
                if ids[:n_prompt] != prompt:
                    raise Straddle(f"a token lies across the beginning of the reply {run[reply_from:][:40]!r}")
            encoded.ids.extend(ids)
            encoded.trained.extend(i >= n_prompt for i in range(len(ids)))

        for i, literal in enumerate(literals):
            is_reply, ends_turn = roles[i : i + 1] == ("assistant",), i > 0 and roles[i - 1] == "assistant"
            begin = self._reply_begin(roles[:i]) if is_reply else len(literal)
            for text in self._special.split(literal[:begin]):
                if text not in self.tokenizer.special:
                    run += text
                    continue
                finish_run()
                run, reply_from = "", None
                encoded.ids.append(self.tokenizer.special[text])
                encoded.trained.append(ends_turn)
                if ends_turn:
                    encoded.ends.append(len(encoded.ids))
                    ends_turn = False
            if is_reply:
                reply_from = len(run)
            run += literal[begin:] + (messages[i]["content"].strip() if i < len(messages) else "")
        finish_run()
        return encoded

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, bos=False, eos=False) if text else []

    def _render(self, messages: Sequence[Message], generation: bool) -> str:
        tokens = {"bos_token": self.bos_token, "eos_token": self.end_of_turn}
        return self._template.render(messages=messages, add_generation_prompt=generation, **tokens)

    def _literals(self, messages: Sequence[Message], generation: bool) -> tuple[str, ...]:
        """The template's own text before, between and after the messages, checked against the rendering of them."""
        literals = self._around(tuple(m["role"] for m in messages), generation)
        contents = [m["content"].strip() for m in messages]
        text = "".join(part for pair in zip(literals, [*contents, ""], strict=True) for part in pair)
        stripped = [{"role": m["role"], "content": c} for m, c in zip(messages, contents, strict=True)]
        if text != self._render(stripped, generation):
            raise ValueError(
                f"chat template {self.name}: it changes what the messages say, so no span of it is certain"
            )
        return literals

    @functools.lru_cache(maxsize=1024)  # noqa: B019  a template lives as long as its program
    def _around(self, roles: tuple[str, ...], generation: bool) -> tuple[str, ...]:
        marks = [{"role": role, "content": f"\ue000{i}\ue001"} for i, role in enumerate(roles)]
        parts = re.split("\ue000(\\d+)\ue001", self._render(marks, generation))
        if parts[1::2] != [str(i) for i in range(len(roles))]:
            raise ValueError(f"chat template {self.name}: it leaves messages out, repeats or reorders them")
        literals = tuple(parts[::2])
        for i, role in enumerate(roles):
            if role == "assistant" and not literals[i + 1].lstrip().startswith(self.end_of_turn):
                raise ValueError(f"chat template {self.name}: no {self.end_of_turn} follows the assistant's words")
        return literals

    @functools.lru_cache(maxsize=1024)  # noqa: B019
    def _reply_begin(self, before: tuple[str, ...]) -> int:
        """How much of the text between the last of these messages and the reply to them belongs to the prompt."""
        prompt, whole = self._around(before, True), self._around((*before, "assistant"), False)
        if prompt[:-1] != whole[: len(before)] or not whole[len(before)].startswith(prompt[-1]):
            raise ValueError(f"chat template {self.name}: its generation prompt is not how its replies begin")
        if self._special.search(whole[len(before)][len(prompt[-1]) :]):
            raise ValueError(
                f"chat template {self.name}: its generation prompt lacks a token that its replies begin with"
            )
        return len(prompt[-1])

    def write(self, folder: Path) -> None:
        """Make the tokenizer files of a Hugging Face folder say this template, and that a turn's end ends generation.

        Args:
            folder: as hf_tokenizer.export_tokenizer wrote it.
        """

        def update(name: str, **values: object) -> None:
            file = folder / name
            if file.is_file():
                write_json(file, {**read_json(file), **values})

        config = read_json(folder / "tokenizer_config.json")
        pad = {}
        if config.get("pad_token") == self.end_of_turn:
            # What pads a batch should never be asked for in training, and the end of a turn is.
            candidates = [config.get("unk_token"), self.bos_token, *self.tokenizer.special]
            pad = {"pad_token": next(t for t in candidates if t in self.tokenizer.special and t != self.end_of_turn)}
        update("tokenizer_config.json", chat_template=self.source, eos_token=self.end_of_turn, **pad)
        update("tokenizer_config.json", split_special_tokens=False)  # a rendered template holds real ones
        update("special_tokens_map.json", eos_token=self.end_of_turn, **pad)
        (folder / "chat_template.jinja").unlink(missing_ok=True)  # transformers would prefer it
        pad_id = {"pad_token_id": self.tokenizer.special[pad["pad_token"]]} if pad else {}
        update("generation_config.json", eos_token_id=self.eos_id, **pad_id)
        update("config.json", eos_token_id=self.eos_id, **pad_id)


def check_messages(messages: Sequence[Message]) -> None:
    """Raise ValueError where it is not `[system] user assistant user ...` with words in every message."""
    if not messages:
        raise ValueError("the conversation has no messages")
    turns = messages[1:] if messages[0].get("role") == "system" else messages
    for i, message in enumerate(turns):
        if message.get("role") != ("user", "assistant")[i % 2]:
            raise ValueError(
                f"message {i + 1} is from {message.get('role')!r}: user and assistant take turns, the user begins, and "
                "a system message may come first"
            )
    for message in messages:
        if not isinstance(message.get("content"), str) or not message["content"].strip():
            raise ValueError(f"a message from {message['role']!r} is empty, or not text")
    if not turns:
        raise ValueError("the conversation has a system message alone")


def _compile(source: str, name: str):
    """As transformers does it: in a sandbox, since templates come with downloads."""
    import jinja2
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> None:
        raise ValueError(f"chat template {name}: {message}")

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = lambda x, **kw: json.dumps(x, ensure_ascii=False, **kw)
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    # Some templates mark what the assistant says for transformers' return_assistant_tokens_mask; we find it ourselves.
    source = re.sub(r"\{%(-?)\s*(?:end)?generation\s*(-?)%\}", r"{#\1 \2#}", source)
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as e:
        raise ValueError(f"chat template {name} is not Jinja: {e}") from e
