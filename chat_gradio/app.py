"""A page to talk to a model on, from a desk or a phone.

    python chat_gradio/app.py --model out/chat
    python chat_gradio/app.py --model out/chat --docs notes/ --host 0.0.0.0     # the whole network may use it

Replies appear as they are written. What people and the model write is shown as the characters that it is: no HTML, no
Markdown, no links, no files. A conversation lives in the server's memory until its page is closed.
"""

import html
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from lit_gpt.chat import ChatModel, Sampling
from lit_gpt.chat_template import Message
from lit_gpt.cli import one_line_errors, parse
from lit_gpt.retrieval import Documents, Embedder

if TYPE_CHECKING:
    import gradio

MAX_CHARACTERS = 20_000


def build(chat: ChatModel, documents: Documents | None = None, system: str = "") -> "gradio.Blocks":
    """The page; launch() starts it."""
    try:
        import gradio as gr
    except ImportError as e:
        raise ImportError(f'the page needs gradio: pip install "gradio>=6" ({e})') from e

    def ask(
        question: str, history: list[Message], system: str, temperature: float, max_new_tokens: float
    ) -> Iterator[tuple[list[Message], list[Message], str]]:
        """Yields (conversation, what is shown, what stays in the question's box) while the reply is written."""
        unsent = (history, display(history), question)
        if not question.strip():
            yield unsent
            return
        if len(question) + len(system) > MAX_CHARACTERS:
            gr.Warning(f"A question may have {MAX_CHARACTERS:,} characters, together with the system message.")
            yield unsent
            return
        start = [{"role": "system", "content": system}] if system.strip() else []
        asked = [*history, {"role": "user", "content": question}]
        answer = {"role": "assistant", "content": "..."}
        yield [*asked, answer], display([*asked, answer]), ""
        try:
            sampling = Sampling(temperature=temperature, max_new_tokens=int(max_new_tokens))
            reply = chat.ask([*start, *asked], sampling, documents)
        except ValueError as e:
            gr.Warning(str(e))
            yield unsent
            return
        words = ""
        for piece in reply:
            words += piece
            answer = {**answer, "content": words}
            yield [*asked, answer], display([*asked, answer]), ""
        answer["sources"] = "\n".join(f"[{i}] {p.source}" for i, p in enumerate(reply.sources, start=1))
        yield [*asked, answer], display([*asked, answer]), ""

    with gr.Blocks(title=f"{chat.name} - chat", analytics_enabled=False, fill_height=True) as page:
        history = gr.State([])
        shown = gr.Chatbot(
            label=chat.name,
            elem_id="conversation",
            render_markdown=False,
            buttons=[],
            feedback_options=None,
            reasoning_tags=[],
            scale=1,
            min_height="50vh",
        )
        with gr.Row():
            box = gr.Textbox(
                placeholder="Ask something", show_label=False, autofocus=True, max_lines=8, scale=6, elem_id="question"
            )
            send = gr.Button("Send", variant="primary", scale=1, min_width=70, elem_id="send")
            stop = gr.Button("Stop", scale=1, min_width=70)
            clear = gr.Button("New", scale=1, min_width=70, elem_id="new")
        with gr.Accordion("Settings", open=False):
            system_box = gr.Textbox(system, label="System message", lines=2)
            temperature = gr.Slider(0, 2, 0.7, step=0.1, label="Temperature (0: always the most likely token)")
            block_size = chat.model.config.block_size
            longest = gr.Slider(16, block_size, min(512, block_size // 2), step=16, label="Longest reply, tokens")
        inputs, outputs = [box, history, system_box, temperature, longest], [history, shown, box]
        asked = [trigger(ask, inputs, outputs, api_visibility="private") for trigger in (send.click, box.submit)]
        stop.click(None, None, None, cancels=asked, api_visibility="private")
        for trigger in (clear.click, shown.clear):
            trigger(lambda: ([], [], ""), None, outputs, cancels=asked, api_visibility="private")
    return page.queue(default_concurrency_limit=4, max_size=32)


def display(history: list[Message]) -> list[Message]:
    """What is shown of a conversation: sources too, of which the model is not told that it said them. Escaped, since
    gradio's Chatbot takes text for HTML even where it renders no Markdown."""
    shown = []
    for message in history:
        text = "\n\n".join(part for part in (message["content"], message.get("sources")) if part)
        shown.append({"role": message["role"], "content": html.escape(text)})
    return shown


def launch(page: "gradio.Blocks", host: str, port: int, wait: bool = True) -> str:
    """Start the page and return its address. Nothing is sent to, or fetched from, anywhere else."""
    import gradio as gr

    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    _, address, _ = page.launch(
        server_name=host,
        server_port=port,
        share=False,
        theme=theme,
        footer_links=[],
        ssr_mode=False,
        max_file_size=1,  # byte: nothing is uploaded
        prevent_thread_lock=not wait,
        quiet=True,
    )
    return address


def main(
    model: str,
    docs: Path | None = None,
    embedding_model: str | None = None,
    system: str = "",
    host: str = "127.0.0.1",
    port: int = 7860,
    template: str = "auto",
    tokenizer_path: Path | None = None,
    device: str = "auto",
) -> None:
    """A page to talk to a model on.

    Args:
        model: A run of finetune.py, a Hugging Face folder, adapters, one of our checkpoints, or a hub id.
        docs: Folder of .md, .txt, .rst and .py files; passages that match a question go with it, and are named.
        embedding_model: Find passages by their meaning with this model, a Hugging Face folder or a hub id, for example
            sentence-transformers/all-MiniLM-L6-v2; default: by their words.
        system: What the model is told first; can be changed on the page.
        host: Address to listen at. 0.0.0.0 lets the whole network in, without a password.
        port: Of the address.
        template: zephyr, chatml, guanaco, llama2 or llama3; auto is the model's own.
        tokenizer_path: Folder or file; default: the one that is kept with the model.
        device: cpu, cuda or mps; auto takes a GPU if there is one.
    """
    documents = Documents(docs, Embedder(embedding_model) if embedding_model else None) if docs else None
    chat = ChatModel.open(model, template=template, tokenizer_path=tokenizer_path, device=device)
    page = build(chat, documents, system)
    print(f"{chat.name} at http://{host}:{port}", flush=True)
    launch(page, host, port)


if __name__ == "__main__":
    with one_line_errors():
        parse(main)
