"""Talk to a model in the terminal.

    python sft/chat.py --model out/chat
    python sft/chat.py --model TinyLlama/TinyLlama-1.1B-Chat-v1.0 --docs notes/

A reply appears as it is written; Ctrl-C ends it. /reset forgets the conversation, /system TEXT sets the system message,
/undo takes the last exchange back, and a line that ends with a backslash goes on on the next one.
"""

import sys
from pathlib import Path
from typing import Literal

import torch

from lit_gpt.chat import ChatModel, Sampling
from lit_gpt.chat_template import Message
from lit_gpt.cli import one_line_errors, parse
from lit_gpt.retrieval import Documents, Embedder

HELP = "/reset  /system TEXT  /undo  /help  /quit; a backslash at the end of a line: more follows; Ctrl-C: enough"


def main(
    model: str,
    system: str = "",
    docs: Path | None = None,
    embedding_model: str | None = None,
    temperature: float = 0.7,
    top_p: float = 0.95,
    max_new_tokens: int = 512,
    seed: int | None = None,
    template: str = "auto",
    tokenizer_path: Path | None = None,
    device: str = "auto",
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
) -> None:
    """Talk to a model in the terminal.

    Args:
        model: A run of finetune.py, a Hugging Face folder, adapters, one of our checkpoints, or a hub id.
        system: What the model is told first.
        docs: Folder of .md, .txt, .rst and .py files; passages of them that match a question go with it.
        embedding_model: Find passages by their meaning with this model, a Hugging Face folder or a hub id, for example
            sentence-transformers/all-MiniLM-L6-v2; default: by their words.
        temperature: 0 always takes the most likely token; higher is more varied.
        top_p: Choose among the fewest tokens that have this probability together.
        max_new_tokens: Longest reply.
        seed: Of the choices; the same one gives the same conversation.
        template: zephyr, chatml, guanaco, llama2 or llama3; auto is the model's own.
        tokenizer_path: Folder or file; default: the one that is kept with the model.
        device: cpu, cuda or mps; auto takes a GPU if there is one.
        dtype: Of weights and arithmetic; default: bfloat16 on a GPU, float32 on a CPU.
    """
    documents = Documents(docs, Embedder(embedding_model) if embedding_model else None) if docs else None
    sampling = Sampling(temperature=temperature, top_p=top_p, max_new_tokens=max_new_tokens, seed=seed)
    dtype = getattr(torch, dtype) if dtype else None
    chat = ChatModel.open(model, template=template, tokenizer_path=tokenizer_path, device=device, dtype=dtype)
    print(f"{chat.name}, template: {chat.template.name}. {HELP}", file=sys.stderr)
    try:
        import readline  # noqa: F401  arrow keys and history in input()
    except ImportError:
        pass
    history: list[Message] = [{"role": "system", "content": system}] if system.strip() else []
    while (line := read("you> ")) is not None:
        command, _, rest = line.strip().partition(" ")
        start = [m for m in history if m["role"] == "system"]
        if not command:
            continue
        elif command == "/quit":
            break
        elif command == "/help":
            print(HELP, file=sys.stderr)
        elif command == "/reset":
            history = start
        elif command == "/undo":
            history = start + history[len(start) : -2]
        elif command == "/system":
            history = [{"role": "system", "content": rest}] if rest.strip() else []
            print("a new conversation", file=sys.stderr)
        elif command.startswith("/") and command[1:].isalpha():
            print(f"unknown command {command}: {HELP}", file=sys.stderr)
        else:
            try:
                history = exchange(chat, history, line, documents, sampling)
            except ValueError as e:
                print(f"not sent: {e}", file=sys.stderr)


def exchange(
    chat: ChatModel, history: list[Message], question: str, documents: Documents | None, sampling: Sampling
) -> list[Message]:
    """Print the reply as it is written; the conversation with it. Passages are for one question, and not kept."""
    asked = [*history, {"role": "user", "content": question}]
    reply = chat.ask(asked, sampling, documents)
    if len(reply.asked) < len(asked):
        print(f"(the first {len(asked) - len(reply.asked)} messages no longer fit and are forgotten)", file=sys.stderr)
    words = ""
    try:
        for piece in reply:
            words += piece
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        words += " ..."
    print()
    for i, passage in enumerate(reply.sources, start=1):
        print(f"[{i}] {passage.source}")
    return [*reply.asked, {"role": "assistant", "content": words or "..."}]


def read(prompt: str) -> str | None:
    """What the user typed, over several lines where they end with a backslash; None at the end of the input."""
    lines = []
    try:
        while True:
            lines.append(input(prompt if not lines else "...> "))
            if not lines[-1].endswith("\\"):
                return "\n".join([*(line[:-1] for line in lines[:-1]), lines[-1]])
    except EOFError:
        return "\n".join(line[:-1] for line in lines) if lines else None


if __name__ == "__main__":
    with one_line_errors():
        parse(main)
