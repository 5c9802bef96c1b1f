"""Models by their name on the hub, from a hub that runs here."""

import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from tiny import ROOT, write_lit_folder

from lit_gpt.hf import export
from lit_gpt.hf_tokenizer import export_tokenizer
from lit_gpt.hub import local_folder
from lit_gpt.pretrained import open_pretrained

pytest.importorskip("huggingface_hub")
COMMIT = "0123456789" * 4


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """(its environment variables, the folder that it serves as me/tiny, what was asked of it)."""
    root = tmp_path_factory.mktemp("hub")
    write_lit_folder(root / "lit", block_size=128)
    found = open_pretrained(root / "lit")
    folder = root / "tiny"
    folder.mkdir()
    ids = export_tokenizer(root / "lit", folder, add_bos=True, max_length=128)
    export(found.config, found.weights, folder, special_ids=ids)
    for name in ("pytorch_model.bin", "modeling_tiny.py"):
        (folder / name).write_bytes(b"never to be loaded")
    asked: list[str] = []

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            path = self.path.split("?")[0]
            if path.startswith("/api/models/me/tiny/revision/"):
                files = [{"rfilename": file.name} for file in sorted(folder.iterdir())]
                self.answer(json.dumps({"id": "me/tiny", "sha": COMMIT, "siblings": files}).encode())
            elif path.startswith("/api/models/me/tiny/tree/"):
                files = [
                    {"type": "file", "path": f.name, "size": f.stat().st_size, "oid": "0" * 40}
                    for f in sorted(folder.iterdir())
                ]
                self.answer(json.dumps(files).encode())
            elif path.startswith("/me/tiny/resolve/") and (folder / Path(path).name).is_file():
                self.answer((folder / Path(path).name).read_bytes(), etag=Path(path).name)
            else:
                self.send_response(404)
                self.send_header("X-Error-Code", "RepoNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()

        do_HEAD = do_GET

        def answer(self, body: bytes, etag: str = "json") -> None:
            self.send_response(200)
            for key, value in {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT, "Content-Length": len(body)}.items():
                self.send_header(key, str(value))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    variables = {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(root / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "no_proxy": "127.0.0.1",
    }
    yield {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"} | variables, folder, asked
    server.shutdown()


def run(variables: dict[str, str], *command: object) -> subprocess.CompletedProcess:
    """The library reads its address when it is imported, hence processes."""
    return subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, env=variables, cwd=ROOT)


FIND = "import sys; from lit_gpt.hub import local_folder; print(local_folder(sys.argv[1]))"


@pytest.mark.slow
def test_an_id_is_downloaded_once_and_without_what_can_run(hub):
    variables, served, asked = hub
    done = run(variables, "-c", FIND, "me/tiny")
    assert done.returncode == 0, done.stderr[-2000:]
    folder = Path(done.stdout.strip())
    got = {file.name: file.read_bytes() for file in folder.iterdir()}
    data = {f.name: f.read_bytes() for f in served.iterdir() if f.suffix in (".json", ".safetensors", ".model")}
    assert got == data and "model.safetensors" in got
    assert open_pretrained(folder).config.block_size == 128
    asked.clear()
    assert run(variables, "-c", FIND, "me/tiny").stdout == done.stdout
    assert not any("model.safetensors" in path for path in asked)


@pytest.mark.slow
def test_an_id_that_nobody_has_is_one_clear_error(hub):
    done = run(hub[0], "-c", FIND, "me/nothing")
    assert "FileNotFoundError: me/nothing: no such folder here, and not loaded from the hub: " in done.stderr


def test_paths_are_not_looked_for_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "me" / "tiny").mkdir(parents=True)
    for name in ("me/tiny", "./me/gone", "/me/gone", "~/gone", "a/b/c", "gone"):
        assert local_folder(name) == Path(name)


@pytest.mark.long
def test_fine_tuning_and_chat_start_from_an_id(hub, tmp_path):
    variables, _, _ = hub
    rows = [{"instruction": f"say {word}", "output": word} for word in "the model of a token is in its data".split()]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = (
        "--data",
        tmp_path / "data.jsonl",
        "--val_fraction",
        0,
        "--samples",
        0,
        "--epochs",
        1,
        "--out_dir",
        tmp_path,
    )
    flags += ("--global_batch_tokens", 256, "--micro_batch_size", 2, "--accelerator", "cpu", "--method", "lora")
    done = run(variables, "sft/finetune.py", "--base", "me/tiny", *flags)
    assert done.returncode == 0, done.stderr[-2000:]
    adapters = tmp_path / "chat" / "adapters"
    assert json.loads((adapters / "adapter_config.json").read_text())["base_model_name_or_path"] == "me/tiny"
    question = ("--question", "say token", "--max_new_tokens", 4)
    for model in ("me/tiny", adapters):
        done = run(variables, "sft/simple_inference.py", "--model", model, *question)
        assert done.returncode == 0, done.stderr[-2000:]
