"""The page for phones, in headless Chromium; and its server, which needs none."""

import base64
import hashlib
import importlib.util
import io
import json
import os
import shutil
import subprocess
import tarfile
import threading
import time
import urllib.error
import urllib.request

import pytest

from tests.tiny import ROOT


@pytest.fixture
def serve(monkeypatch, tmp_path):
    spec = importlib.util.spec_from_file_location("phone_serve", ROOT / "phone" / "serve.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def package(serve, monkeypatch, tmp_path):
    """A stand-in for wllama's, where the network would be asked."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name in ("esm/index.js", "esm/wasm/wllama.wasm", "LICENCE", "esm/other.js"):
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(name)
            archive.addfile(info, io.BytesIO(name.encode()))
    file = tmp_path / "wllama-0.tgz"
    file.write_bytes(buffer.getvalue())
    monkeypatch.setattr(serve, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(serve, "WLLAMA", file.as_uri())
    sha512 = base64.b64encode(hashlib.sha512(buffer.getvalue()).digest()).decode()
    monkeypatch.setattr(serve, "WLLAMA_SHA512", sha512)
    return file


@pytest.fixture
def start():
    servers = []

    def run(server) -> str:
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{server.server_address[1]}"

    yield run
    for server in servers:
        server.shutdown()
        server.server_close()


def test_four_files_and_nothing_else(serve, package, start, tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"GGUF, the rest")
    url = start(serve.make_server(tmp_path / "x.gguf"))
    for path, content in (
        ("/model.gguf", b"GGUF, the rest"),
        ("/wllama/index.js", b"esm/index.js"),
        ("/wllama/wllama.wasm", b"esm/wasm/wllama.wasm"),
        ("/?tokens=5", (ROOT / "phone" / "index.html").read_bytes()),
    ):
        with urllib.request.urlopen(url + path) as response:
            assert response.read() == content
            assert response.headers["Cross-Origin-Embedder-Policy"] == "require-corp"
    for path in ("/serve.py", "/../serve.py", "/wllama/other.js", "//etc/passwd"):
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(url + path)
    package.unlink()
    serve.wllama_folder()  # is there already


def test_what_is_refused(serve, package, start, tmp_path, monkeypatch):
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    (tmp_path / "x.txt").write_bytes(b"hello")
    with pytest.raises(ValueError, match="x.txt is not a GGUF file"):
        serve.make_server(tmp_path / "x.txt")
    with pytest.raises(FileNotFoundError):
        serve.make_server(tmp_path / "y.gguf")
    with monkeypatch.context() as m:
        m.setattr(serve, "LARGEST", 3)
        with pytest.raises(ValueError, match="larger than the 2 GB that a browser takes"):
            serve.make_server(tmp_path / "x.gguf")
    with monkeypatch.context() as m:
        m.setattr(serve, "WLLAMA_SHA512", "other")
        with pytest.raises(OSError, match="its checksum differs"):
            serve.make_server(tmp_path / "x.gguf")
    assert not (tmp_path / "cache").exists()
    server = serve.make_server(tmp_path / "x.gguf")
    start(server)
    with pytest.raises(OSError, match="give another --port"):
        serve.make_server(tmp_path / "x.gguf", port=server.server_address[1])


class Chromium:
    """A headless one, spoken to through its debugging pipe: JSON messages, each ended by a zero byte."""

    def __init__(self, folder) -> None:
        (child_in, self.out), (self.inp, child_out) = os.pipe(), os.pipe()

        def as_3_and_4() -> None:
            os.dup2(child_in, 10), os.dup2(child_out, 11)
            os.dup2(10, 3), os.dup2(11, 4)

        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", f"--user-data-dir={folder}"]
        self.process = subprocess.Popen(
            [shutil.which("chromium"), *flags], preexec_fn=as_3_and_4, close_fds=False, stderr=subprocess.DEVNULL
        )
        os.close(child_in), os.close(child_out)
        self.buffer, self.id, self.session = b"", 0, None

    def ask(self, method: str, **params):
        self.id += 1
        message = {"id": self.id, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.out, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self.buffer:
                data = os.read(self.inp, 1 << 16)
                assert data, "Chromium ended"
                self.buffer += data
            line, self.buffer = self.buffer.split(b"\0", 1)
            reply = json.loads(line)
            if reply.get("id") == self.id:
                assert "error" not in reply, reply
                return reply["result"]

    def open(self, url: str) -> None:
        target = self.ask("Target.createTarget", url=url)["targetId"]
        self.session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]

    def value(self, expression: str):
        return self.ask("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def wait(self, expression: str, seconds: float = 240) -> None:
        deadline = time.monotonic() + seconds
        while not self.value(expression):
            status = self.value("document.getElementById('status')?.textContent") or ""
            assert time.monotonic() < deadline and not status.startswith("Error"), status
            time.sleep(0.2)

    def close(self) -> None:
        self.process.terminate()
        self.process.wait()
        os.close(self.inp), os.close(self.out)


@pytest.mark.long
@pytest.mark.shared
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_the_page_writes_what_we_write(serve, start, shared_data, tmp_path):
    """stories260k in the browser, greedily: the same story as here."""
    from lit_gpt.generate import stream
    from lit_gpt.gguf_file import write_gguf
    from lit_gpt.pretrained import load_model, open_pretrained
    from lit_gpt.tokenizer import Tokenizer

    found = open_pretrained(shared_data / "models" / "stories260k")
    write_gguf(found.config, found.weights, tmp_path / "x.gguf", "f16", found.tokenizer, add_bos=True)
    url = start(serve.make_server(tmp_path / "x.gguf"))
    browser = Chromium(tmp_path / "profile")
    try:
        browser.open(f"{url}/?tokens=60&temperature=0&context=256")
        browser.wait("document.getElementById('status')?.textContent.startsWith('Ready')")
        assert browser.value("document.getElementById('name').textContent") == "stories260k"
        browser.value("document.getElementById('go').click()")
        browser.wait("document.getElementById('status').textContent.endsWith('done')")
        text = browser.value("document.getElementById('text').textContent")
        print(browser.value("document.getElementById('status').textContent"))
    finally:
        browser.close()
    tokenizer = Tokenizer(found.tokenizer)
    prompt = tokenizer.encode("Once upon a time", bos=True, eos=False)
    assert text == tokenizer.decode([*prompt, *stream(load_model(found), prompt, 60)])
