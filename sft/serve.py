"""A chat model behind OpenAI's HTTP interface, /v1/chat/completions, streaming too.

    python sft/serve.py --model out/chat
    curl localhost:8000/v1/chat/completions -H 'Content-Type: application/json' \\
        -d '{"messages": [{"role": "user", "content": "Hello"}]}'

    client = openai.OpenAI(base_url="http://localhost:8000/v1", api_key="-")

It listens to this machine alone unless --host says otherwise, has no accounts, and opens no file that a request names.
Requests are answered one after the other.
"""

import json
import time
import uuid
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from lit_gpt.chat import ChatModel, PromptTooLong, Reply, Sampling
from lit_gpt.chat_template import Message
from lit_gpt.cli import one_line_errors, parse

MAX_BODY_BYTES = 1_000_000
LOCAL = ("127.0.0.1", "localhost", "::1")
# Fields of OpenAI's that change what comes back, and the only value of each that is understood here.
ONLY = {"n": 1, "logprobs": False, "tools": [], "functions": [], "frequency_penalty": 0, "presence_penalty": 0}


class BadRequest(ValueError):
    """Becomes an HTTP error in OpenAI's form."""

    def __init__(self, message: str, status: int = 400, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code = status, code


def read_request(body: dict[str, Any], max_tokens: int) -> tuple[list[Message], Sampling, bool, bool]:
    """Messages, sampling, whether to stream, and whether to end a stream with the usage.

    Args:
        max_tokens: the most that a request may ask for, and the default.

    Raises:
        BadRequest: naming the field that is wrong or not supported.
    """

    def field(name: str, kind: type | tuple, default: Any) -> Any:
        value = body.get(name)
        if value is None:
            return default
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise BadRequest(f"{name} is {json.dumps(value)[:60]}, which is of another type")
        return value

    for name, only in ONLY.items():
        if body.get(name) not in (None, only):
            raise BadRequest(f"{name} is not supported here", code="unsupported_parameter")
    if field("response_format", dict, {"type": "text"}).get("type") != "text":
        raise BadRequest("response_format: only text is supported", code="unsupported_parameter")
    messages = []
    for message in field("messages", list, []):
        content = message.get("content") if isinstance(message, dict) else None
        if isinstance(content, list):  # of parts, of which only text has meaning here
            if not all(
                isinstance(p, dict) and p.get("type") == "text" and isinstance(p.get("text"), str) for p in content
            ):
                raise BadRequest("messages: only parts of type text are supported")
            content = "".join(part["text"] for part in content)
        if not isinstance(content, str) or not isinstance(message.get("role"), str):
            raise BadRequest("messages: each needs a role and a content that is text")
        role = {"developer": "system"}.get(message["role"], message["role"])
        messages.append({"role": role, "content": content})
    seed = field("seed", int, None)
    if seed is not None and not -(2**63) <= seed < 2**63:
        raise BadRequest("seed has more than 64 bits")
    stop = field("stop", (str, list), [])
    stop = [stop] if isinstance(stop, str) else stop
    if len(stop) > 4 or not all(isinstance(text, str) and text for text in stop):
        raise BadRequest("stop: up to four texts")
    asked = field("max_completion_tokens", int, field("max_tokens", int, max_tokens))
    sampling = Sampling(
        temperature=float(field("temperature", (int, float), 1.0)),
        top_p=float(field("top_p", (int, float), 1.0)),
        max_new_tokens=min(asked, max_tokens),
        seed=seed,
        stop=tuple(stop),
    )
    with_usage = field("stream_options", dict, {}).get("include_usage") is True
    return messages, sampling, field("stream", bool, False), with_usage


class Handler(BaseHTTPRequestHandler):
    server: "ChatServer"
    protocol_version = "HTTP/1.1"
    timeout = 30  # seconds for a client to send or take something; a slow one would hold up the others

    def do_GET(self) -> None:
        if self.path.rstrip("/") == "/v1/models":
            model = {"id": self.server.chat.name, "object": "model", "created": self.server.started, "owned_by": "you"}
            self.send_json(200, {"object": "list", "data": [model]})
        else:
            self.send_problem(BadRequest("there is /v1/models and /v1/chat/completions", 404))

    def do_POST(self) -> None:
        try:
            self.check_sender()
            body = self.read_body()
            if self.path.rstrip("/") != "/v1/chat/completions":
                raise BadRequest("there is /v1/models and /v1/chat/completions", 404)
            messages, sampling, streamed, with_usage = read_request(body, self.server.max_tokens)
            reply = self.server.chat.reply(messages, sampling)
        except BadRequest as e:
            self.send_problem(e)
        except PromptTooLong as e:
            self.send_problem(BadRequest(str(e), code="context_length_exceeded"))
        except ValueError as e:
            self.send_problem(BadRequest(str(e)))
        else:
            self.stream(reply, with_usage) if streamed else self.whole(reply)

    def check_sender(self) -> None:
        """A web page that is open in the same machine's browser must not reach the model: it cannot send JSON without
        asking first, which is never granted, and a name that it points to this machine is not this machine's."""
        if self.headers.get_content_type() != "application/json":
            raise BadRequest("Content-Type has to be application/json", 415)
        host = self.headers.get("Host", "").rpartition(":")[0] or self.headers.get("Host", "")
        if self.server.server_address[0] in LOCAL and host.strip("[]") not in LOCAL:
            raise BadRequest(f"this server is for {', '.join(LOCAL)} alone", 403)

    def read_body(self) -> dict[str, Any]:
        try:
            length = int(self.headers["Content-Length"])
        except (TypeError, ValueError):
            raise BadRequest("Content-Length is missing", 411) from None
        if not 0 <= length <= MAX_BODY_BYTES:
            # A client reads the answer when it has sent everything, so what is not absurdly long is taken and dropped.
            left = min(length, 10 * MAX_BODY_BYTES)
            while left > 0 and (taken := len(self.rfile.read(min(left, 65536)))):
                left -= taken
            raise BadRequest(f"the body has {length:,} bytes; {MAX_BODY_BYTES:,} are allowed", 413)
        try:
            body = json.loads(self.rfile.read(length))
        except (ValueError, RecursionError) as e:
            raise BadRequest(f"the body is not JSON: {e}") from None
        if not isinstance(body, dict):
            raise BadRequest("the body is not a JSON object")
        return body

    def whole(self, reply: Reply) -> None:
        message = {"role": "assistant", "content": "".join(reply)}
        choice = {"index": 0, "message": message, "finish_reason": reply.finish_reason, "logprobs": None}
        head = self.head("chat.completion")
        self.send_json(200, {**head, "choices": [choice], "usage": usage(reply)})

    def stream(self, reply: Reply, with_usage: bool) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Cache-Control", "no-cache")
        self.send_header("Connection", "close")  # where the stream ends
        self.end_headers()
        self.close_connection = True
        head = self.head("chat.completion.chunk")

        def chunks() -> Iterator[dict]:
            yield choice({"role": "assistant", "content": ""}, None)
            for piece in reply:
                yield choice({"content": piece}, None)
            yield choice({}, reply.finish_reason)
            if with_usage:
                yield {**head, "choices": [], "usage": usage(reply)}

        def choice(delta: dict, finish_reason: str | None) -> dict:
            return {**head, "choices": [{"index": 0, "delta": delta, "finish_reason": finish_reason, "logprobs": None}]}

        for chunk in chunks():
            self.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())
            self.wfile.flush()
        self.wfile.write(b"data: [DONE]\n\n")

    def head(self, kind: str) -> dict[str, Any]:
        made = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time())}
        return {**made, "object": kind, "model": self.server.chat.name}

    def send_problem(self, problem: BadRequest) -> None:
        self.close_connection = True  # a body that was not read would be taken for the next request
        error = {"message": str(problem), "type": "invalid_request_error", "param": None, "code": problem.code}
        self.send_json(problem.status, {"error": error})

    def send_json(self, status: int, content: dict) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        if not self.server.quiet:
            super().log_message(format, *args)


class ChatServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, chat: ChatModel, host: str, port: int, max_tokens: int, quiet: bool = False) -> None:
        super().__init__((host, port), Handler)
        self.chat, self.max_tokens, self.quiet = chat, max_tokens, quiet
        self.started = int(time.time())

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up or fall silent are no errors of ours."""
        import sys

        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


def usage(reply: Reply) -> dict[str, int]:
    prompt, completion = len(reply.prompt), reply.completion_tokens
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def main(
    model: str,
    host: str = "127.0.0.1",
    port: int = 8000,
    max_tokens: int = 1024,
    template: str = "auto",
    tokenizer_path: Path | None = None,
    device: str = "auto",
) -> None:
    """Serve a chat model as OpenAI's API does.

    Args:
        model: A run of finetune.py, a Hugging Face folder, adapters, one of our checkpoints, or a hub id.
        host: Address to listen at. 0.0.0.0 lets the whole network in, without a password.
        port: 0 takes a free one.
        max_tokens: Longest reply that a request may ask for.
        template: zephyr, chatml, guanaco, llama2 or llama3; auto is the model's own.
        tokenizer_path: Folder or file; default: the one that is kept with the model.
        device: cpu, cuda or mps; auto takes a GPU if there is one.
    """
    chat = ChatModel.open(model, template=template, tokenizer_path=tokenizer_path, device=device)
    with ChatServer(chat, host, port, max_tokens) as server:
        print(f"{chat.name} at http://{host}:{server.server_address[1]}/v1", flush=True)
        server.serve_forever()


if __name__ == "__main__":
    with one_line_errors():
        parse(main)
