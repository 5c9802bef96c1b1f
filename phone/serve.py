"""A page with the model inside it, for phones and browsers: llama.cpp as WebAssembly reads a GGUF file on the device.

    python phone/serve.py --gguf tinyllama-q4_0.gguf

The computer that runs this serves four files and computes nothing. llama.cpp comes from the npm package wllama; one
version of it is downloaded once and compared with its checksum.
"""

import base64
import hashlib
import io
import shutil
import socket
import tarfile
import urllib.request
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from lit_gpt.cli import one_line_errors, parse
from lit_gpt.weights import whole_folder

WLLAMA = "https://registry.npmjs.org/@wllama/wllama/-/wllama-3.8.1.tgz"
WLLAMA_SHA512 = "Pl7BEJhPU8OHnV/yhn3DFZYhLLOdSHh+4TND79WCftHnlUAdQPAsyc/CfIOY+4mVxvf5VW3Xw3Uf7BBfotS1gw=="  # npm's
CACHE = Path("~/.cache/lit_gpt").expanduser()
LARGEST = 2_000_000_000  # a browser's ArrayBuffer


def main(gguf: Path, port: int = 8000, host: str = "0.0.0.0") -> None:
    """Serve a page that runs a GGUF file in the browser that opens it.

    Args:
        gguf: What scripts/convert_gguf.py wrote; q4_0 is small enough for phones.
        port: Of this server; 0 takes a free one.
        host: Address to listen at; 0.0.0.0 lets phones in the same network in, 127.0.0.1 this computer alone.
    """
    server = make_server(gguf, host, port)
    port = server.server_address[1]
    print(f"on this computer: http://localhost:{port}")
    if host == "0.0.0.0":
        print(f"on a phone in the same network: http://{address()}:{port}")
    try:
        server.serve_forever()
    finally:
        server.server_close()


def make_server(gguf: Path, host: str = "127.0.0.1", port: int = 0) -> ThreadingHTTPServer:
    """A server of the page and what it loads.

    Raises:
        FileNotFoundError, ValueError: no such file, not GGUF, or too large for a browser.
        OSError: wllama could not be downloaded, or the port is taken.
    """
    with open(gguf, "rb") as f:
        if f.read(4) != b"GGUF":
            raise ValueError(f"{gguf} is not a GGUF file: scripts/convert_gguf.py makes one")
    if gguf.stat().st_size > LARGEST:
        raise ValueError(f"{gguf} is larger than the 2 GB that a browser takes: convert it with --dtype q4_0")
    wllama = wllama_folder()
    files = {
        "/": (Path(__file__).parent / "index.html", "text/html; charset=utf-8"),
        "/model.gguf": (gguf, "application/octet-stream"),
        "/wllama/index.js": (wllama / "index.js", "text/javascript"),
        "/wllama/wllama.wasm": (wllama / "wllama.wasm", "application/wasm"),
    }
    try:
        return ThreadingHTTPServer((host, port), partial(Handler, files))
    except OSError as e:
        raise OSError(f"port {port} of {host}: {e.strerror}; give another --port") from e


class Handler(BaseHTTPRequestHandler):
    def __init__(self, files: dict[str, tuple[Path, str]], *args) -> None:
        self.files = files
        super().__init__(*args)

    def do_GET(self) -> None:
        path, kind = self.files.get(self.path.partition("?")[0], (None, ""))
        if path is None:
            return self.send_error(404)
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(path.stat().st_size))
        self.send_header("Cache-Control", "no-cache")
        # Without these two a page may not share memory between threads.
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")
        self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        self.end_headers()
        with open(path, "rb") as f:
            shutil.copyfileobj(f, self.wfile)

    def log_message(self, *_: object) -> None:
        """The terminal shows the address, not every file."""


def wllama_folder() -> Path:
    """Where wllama's JavaScript and WebAssembly are, downloaded at first use. Raises OSError where that fails."""
    folder = CACHE / Path(WLLAMA).stem
    if folder.is_dir():
        return folder
    with urllib.request.urlopen(WLLAMA, timeout=60) as response:
        content = response.read()
    if base64.b64encode(hashlib.sha512(content).digest()).decode() != WLLAMA_SHA512:
        raise OSError(f"{WLLAMA} is not the file that was tested: its checksum differs")
    with whole_folder(folder) as temporary, tarfile.open(fileobj=io.BytesIO(content)) as archive:
        for member in ("package/esm/index.js", "package/esm/wasm/wllama.wasm", "package/LICENCE"):
            (temporary / Path(member).name).write_bytes(archive.extractfile(member).read())
    return folder


def address() -> str:
    """This computer's in its network: that of the interface by which a packet elsewhere would leave. None is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        try:
            s.connect(("192.0.2.1", 9))
        except OSError:
            return "localhost"
        return s.getsockname()[0]


if __name__ == "__main__":
    with one_line_errors():
        parse(main)
