"""The engine under terminal, page and endpoint, the terminal, and the endpoint as clients see it."""

import http.client
import importlib.util
import json
import threading
from pathlib import Path

import pytest
import torch
from tiny import TINY, random_weights, train_sentencepiece

from lit_gpt import Config
from lit_gpt.chat import ChatModel, Sampling, settled
from lit_gpt.generate import generate
from lit_gpt.pretrained import Pretrained, write_lit

ROOT = Path(__file__).parent.parent
GREEDY = Sampling(temperature=0, max_new_tokens=12)
HELLO = [{"role": "user", "content": "Hello"}]


def script(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "sft" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


terminal, serve = script("chat"), script("serve")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("chat") / "model"
    train_sentencepiece(folder / "tokenizer.model")
    config = Config(name="tiny", **{**TINY, "block_size": 256})
    write_lit(Pretrained(folder, config, random_weights(config)), folder)
    return folder


@pytest.fixture(scope="module")
def chat(folder) -> ChatModel:
    return ChatModel.open(folder)


class Scripted:
    """Instead of a model's tokens: those of given texts, one after the other."""

    def __init__(self, monkeypatch, chat: ChatModel, *texts: str) -> None:
        self.prompts: list[list[int]] = []
        replies = iter(texts)

        def stream(model, prompt, max_new_tokens, **_):
            self.prompts.append(prompt)
            ids = chat.template.tokenizer.encode("\n" + next(replies), bos=False, eos=False)
            begin = len(chat.template.tokenizer.encode("\n", bos=False, eos=False))
            yield from [*ids[begin:], chat.template.eos_id][:max_new_tokens]

        monkeypatch.setattr("lit_gpt.chat.stream", stream)


class TestReply:
    def test_it_is_what_the_model_generates(self, chat):
        reply = chat.reply(HELLO, GREEDY)
        text = "".join(reply)
        ids = generate(chat.model, [chat.template.prompt(HELLO)], 12, eos_id=chat.template.eos_id)[0]
        assert text == chat.template.tokenizer.decode(ids).strip()
        assert reply.completion_tokens == len(ids) and reply.finish_reason in ("length", "stop")

    def test_a_seed_repeats_it(self, chat):
        a, b, c = ("".join(chat.reply(HELLO, Sampling(1.0, max_new_tokens=20, seed=seed))) for seed in (1, 1, 2))
        assert a == b != c

    def test_it_ends_with_the_turn_the_limit_or_the_context(self, chat, monkeypatch):
        Scripted(monkeypatch, chat, "Hi  there \n ", "Hi there")
        reply = chat.reply(HELLO)
        assert "".join(reply) == "Hi  there" and reply.finish_reason == "stop"
        reply = chat.reply(HELLO, Sampling(max_new_tokens=2))
        assert len("".join(reply)) < len("Hi there") and (reply.finish_reason, reply.completion_tokens) == ("length", 2)
        monkeypatch.undo()
        long = [{"role": "user", "content": "x" * 400}]
        while len(chat.template.prompt(long)) > 250:
            long[0]["content"] = long[0]["content"][:-5]
        reply = chat.reply(long, Sampling(temperature=0, max_new_tokens=100))
        assert "".join(reply) is not None and len(reply.prompt) + reply.completion_tokens <= 257

    def test_stop_texts_are_found_across_pieces_and_are_no_part_of_it(self, chat, monkeypatch):
        Scripted(monkeypatch, chat, *["one two### Human: three"] * 2)
        reply = chat.reply(HELLO, Sampling(stop=("### Human:", "zzz")))
        assert list(reply)[0] and "".join(chat.reply(HELLO, Sampling(stop=("### Human:",)))) == "one two"
        assert reply.finish_reason == "stop"
        assert [settled(text, ["###", "ab"]) for text in ("a #", "a##b", "xa", "x  ", "aab")] == [2, 4, 1, 1, 1]

    def test_a_reply_that_nobody_reads_on_holds_up_no_other(self, chat):
        first = iter(chat.reply(HELLO, GREEDY))
        next(first)
        assert "".join(chat.reply(HELLO, GREEDY)) == "".join(chat.reply(HELLO, GREEDY))

    @pytest.mark.parametrize(
        "messages, error",
        [
            ([], "last message has to be the user's"),
            ([*HELLO, {"role": "assistant", "content": "a"}], "last message has to be the user's"),
            ([{"role": "user", "content": "many words " * 200}], "the model's context 256"),
            ([{"role": "user", "content": "x" * 100_000}], "far longer than the model's context"),
            ([*HELLO, *HELLO], "take turns"),
        ],
    )
    def test_what_cannot_be_answered(self, chat, messages, error):
        with pytest.raises(ValueError, match=error):
            chat.reply(messages)

    def test_the_oldest_exchanges_are_forgotten_and_the_system_message_is_not(self, chat):
        turns = [{"role": ("user", "assistant")[i % 2], "content": f"{i} " * 10} for i in range(15)]
        system = {"role": "system", "content": "S"}
        reply = chat.ask([system, *turns], Sampling(temperature=0, max_new_tokens=30))
        assert reply.asked[0] == system and reply.asked[-1] == turns[-1] and 3 < len(reply.asked) < 16
        assert len(reply.prompt) + 30 <= 256
        assert reply.asked[1]["role"] == "user"


class TestOpen:
    def test_a_dtype_and_a_template(self, folder):
        chat = ChatModel.open(folder, template="chatml", dtype=torch.bfloat16)
        assert chat.template.name == "chatml" and chat.model.lm_head.weight.dtype == torch.bfloat16

    def test_what_is_not_there(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="does not exist"):
            ChatModel.open(tmp_path / "nothing")


class TestTerminal:
    def talk(self, monkeypatch, capsys, folder, *lines: str, **flags) -> str:
        typed = iter(lines)

        def read(prompt: str) -> str:
            try:
                return next(typed)
            except StopIteration:
                raise EOFError from None

        monkeypatch.setattr("builtins.input", read)
        terminal.main(str(folder), **flags)
        return capsys.readouterr().out

    def test_history_commands_and_lines_that_go_on(self, folder, chat, monkeypatch, capsys):
        scripted = Scripted(monkeypatch, chat, "one", "two", "three", "four", "five")
        lines = ["a", "b\\", "c", "/undo", "d", "/reset", "e", "/system Be kind", "f", "/nonsense", ""]
        out = self.talk(monkeypatch, capsys, folder, *lines)
        assert out == "one\ntwo\nthree\nfour\nfive\n"
        user = lambda *words: [{"role": ("user", "assistant")[i % 2], "content": w} for i, w in enumerate(words)]  # noqa: E731
        asked = [user("a"), user("a", "one", "b\nc"), user("a", "one", "d"), user("e")]
        asked += [[{"role": "system", "content": "Be kind"}, *user("f")]]
        assert scripted.prompts == [chat.template.prompt(messages) for messages in asked]

    def test_sources_are_shown_and_what_is_too_long_is_not_sent(self, folder, chat, monkeypatch, capsys, tmp_path):
        pytest.importorskip("bm25s")
        (tmp_path / "cats.md").write_text("Cats sleep.\n")
        (tmp_path / "dogs.md").write_text("Dogs bark.\n")
        scripted = Scripted(monkeypatch, chat, "They sleep", "Yes")
        out = self.talk(monkeypatch, capsys, folder, "x" * 5000, "cats?", "ok?", docs=tmp_path, max_new_tokens=8)
        assert out == "They sleep\n[1] cats.md:1\nYes\n"
        assert "Cats sleep." in chat.template.tokenizer.decode(scripted.prompts[0])
        assert "Cats sleep." not in chat.template.tokenizer.decode(scripted.prompts[1])  # passages are for one question


@pytest.fixture
def server(chat):
    with serve.ChatServer(chat, "127.0.0.1", 0, max_tokens=16, quiet=True) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()


def post(server, body: object, headers: dict | None = None, path: str = "/v1/chat/completions") -> tuple[int, dict]:
    connection = http.client.HTTPConnection(*server.server_address, timeout=60)
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection.request("POST", path, data, {"Content-Type": "application/json", **(headers or {})})
    response = connection.getresponse()
    return response.status, json.loads(response.read())


class TestEndpoint:
    @pytest.mark.slow
    def test_the_openai_client(self, server, chat):
        openai = pytest.importorskip("openai")
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{server.server_address[1]}/v1", api_key="-", max_retries=0)
        assert [m.id for m in client.models.list()] == ["model"]
        ask = dict(model="model", messages=HELLO, temperature=0, max_tokens=12)
        whole = client.chat.completions.create(**ask)
        assert whole.choices[0].message.content == "".join(chat.reply(HELLO, GREEDY))
        assert whole.choices[0].finish_reason in ("stop", "length") and whole.choices[0].message.role == "assistant"
        assert whole.usage.prompt_tokens == len(chat.template.prompt(HELLO)) and whole.usage.completion_tokens <= 12
        chunks = list(client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
        text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        assert text == whole.choices[0].message.content and len(chunks) > 4
        assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
        assert chunks[-1].usage == whole.usage
        with pytest.raises(openai.BadRequestError, match="the model's context 256") as error:
            client.chat.completions.create(model="", messages=[{"role": "user", "content": "word " * 1000}])
        assert error.value.code == "context_length_exceeded"

    def test_parts_developers_and_stop(self, server, chat, monkeypatch):
        scripted = Scripted(monkeypatch, chat, "one two")
        messages = [{"role": "developer", "content": "S"}]
        messages += [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
        status, answer = post(server, {"messages": messages, "stop": " two", "tools": None, "n": 1})
        assert status == 200 and answer["choices"][0]["message"]["content"] == "one"
        want = [{"role": "system", "content": "S"}, {"role": "user", "content": "ab"}]
        assert scripted.prompts == [chat.template.prompt(want)]

    @pytest.mark.parametrize(
        "body, status, message",
        [
            (b"{", 400, "the body is not JSON"),
            (b"[" * 100_000, 400, "the body is not JSON"),
            (b"[]", 400, "not a JSON object"),
            ({"messages": HELLO, "max_tokens": "9"}, 400, "max_tokens is"),
            ({"messages": HELLO, "max_tokens": 0}, 400, "max_new_tokens 0"),
            ({"messages": HELLO, "temperature": -1}, 400, "temperature -1.0"),
            ({"messages": HELLO, "temperature": float("nan")}, 400, "temperature nan"),
            ({"messages": HELLO, "n": 2}, 400, "n is not supported"),
            ({"messages": HELLO, "tools": [{}]}, 400, "tools is not supported"),
            ({"messages": HELLO, "response_format": {"type": "json_object"}}, 400, "only text"),
            ({"messages": HELLO, "seed": 2**80}, 400, "seed"),
            ({"messages": "hi"}, 400, "messages is"),
            ({"messages": []}, 400, "last message"),
            ({"messages": [{"role": "user"}]}, 400, "each needs a role"),
            ({"messages": [{"role": "tool", "content": "a"}, *HELLO]}, 400, "take turns"),
            ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "parts of type text"),
            ({"messages": [{"role": "user", "content": "\ud800"}]}, 400, "lone surrogate"),
            ({"messages": HELLO, "stop": ["a"] * 5}, 400, "up to four"),
            ({"messages": HELLO, "x": "y" * 1_000_001}, 413, "1,000,000 are allowed"),
        ],
    )
    def test_wrong_requests_get_an_error_in_openais_form(self, server, body, status, message):
        got, answer = post(server, body)
        assert got == status and message in answer["error"]["message"], answer

    def test_pages_of_other_sites_do_not_reach_it(self, server):
        ask = {"messages": HELLO, "max_tokens": 1}
        assert post(server, ask, {"Content-Type": "text/plain"})[0] == 415  # needs no permission of ours to be sent
        assert post(server, ask, {"Host": "evil.example"})[0] == 403
        assert post(server, ask, {"Host": "evil.example:80"})[0] == 403
        assert post(server, ask, {"Host": f"localhost:{server.server_address[1]}"})[0] == 200

    def test_there_is_nothing_else(self, server):
        assert post(server, {"messages": HELLO}, path="/v1/../etc/passwd")[0] == 404
        connection = http.client.HTTPConnection(*server.server_address, timeout=60)
        connection.request("GET", "/etc/passwd")
        assert connection.getresponse().status == 404

    def test_several_at_once(self, server, chat):
        want, got = "".join(chat.reply(HELLO, GREEDY)), []

        def ask() -> None:
            got.append(post(server, {"messages": HELLO, "temperature": 0, "max_tokens": 12})[1])

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [answer["choices"][0]["message"]["content"] for answer in got] == [want] * 4


def test_one_question_one_answer(folder, capsys, monkeypatch):
    script("simple_inference").main(str(folder), "Hello", temperature=0, max_new_tokens=12)
    assert capsys.readouterr().out == "".join(ChatModel.open(folder).reply(HELLO, GREEDY)) + "\n"
