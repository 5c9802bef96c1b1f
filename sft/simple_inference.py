"""One question, one answer: the shortest program around a chat model.

python sft/simple_inference.py --model out/chat --question "What is a transformer?"
"""

from lit_gpt.chat import ChatModel, Sampling
from lit_gpt.cli import one_line_errors, parse


def main(model: str, question: str, system: str = "", temperature: float = 0.7, max_new_tokens: int = 512) -> None:
    """Ask a chat model one question.

    Args:
        model: A run of finetune.py, a Hugging Face folder, adapters, one of our checkpoints, or a hub id.
        question: What to ask.
        system: What the model is told first.
        temperature: 0 always takes the most likely token; higher is more varied.
        max_new_tokens: Longest answer.
    """
    chat = ChatModel.open(model)
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": question})
    for piece in chat.reply(messages, Sampling(temperature=temperature, max_new_tokens=max_new_tokens)):
        print(piece, end="", flush=True)
    print()


if __name__ == "__main__":
    with one_line_errors():
        parse(main)
