"""Releases: their names, cards and rows, a schedule that follows a run, and nothing uploaded unless asked."""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch

from lit_gpt import Config, checkpoint
from lit_gpt.metrics import Metrics
from lit_gpt.model import GPT
from lit_gpt.model_card import model_card
from lit_gpt.pretrained import open_pretrained
from lit_gpt.release import BEGIN, END, at_risk, read_schedule, release_name, write_row
from lit_gpt.tokenizer import Tokenizer
from tests.tiny import TINY, run_script, train_sentencepiece

NAME = "TinyLlama-0M-intermediate-step-2k-8m"


@pytest.mark.parametrize(
    "facts, name",
    [
        ((1_100_048_384, 50_000, 104_857_600_000), "TinyLlama-1.1B-intermediate-step-50k-105b"),
        ((1_100_048_384, 1_431_000, 3_001_024_512_000), "TinyLlama-1.1B-intermediate-step-1431k-3T"),
        ((1_100_048_384, 715_000, 1_499_463_680_000), "TinyLlama-1.1B-intermediate-step-715k-1.5T"),
        ((121_129_728, 1_500, 12_288_000), "TinyLlama-121M-intermediate-step-1500-12m"),
    ],
)
def test_names(facts, name):
    assert release_name("TinyLlama", *facts) == name


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A run with two steps, as pretrain/tinyllama.py leaves it."""
    run = tmp_path_factory.mktemp("out") / "run"
    tokenizer = Tokenizer(train_sentencepiece(run / "tokenizer" / "tokenizer.model"))
    for step in (1000, 2000):
        save(run, step, tokenizer)
    args = {"args": {"keep_checkpoints": 3, "permanent_interval": 1000}}
    (run / "args.json").write_text(json.dumps(args))
    metrics = Metrics(run, 0)
    metrics.log(1000, tokens=4_096_000, loss=2.5, val_loss=2.75, val_bits_per_byte=0.8)
    metrics.log(2000, tokens=8_192_000, loss=2.25)
    metrics.log(3000, tokens=12_288_000, loss=1.0, val_loss=1.0)
    metrics.close()
    return run


def save(run: Path, step: int, tokenizer: Tokenizer | None = None) -> None:
    model = GPT(Config(name="tiny", **TINY))
    model.init_weights(step)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 8, dtype=torch.long), torch.ones(1, 8, dtype=torch.long)).backward()
    optimizer.step()
    args = {
        **dict(train_mix={"train_slim": 0.75, "train_star": 0.25}, learning_rate=4e-4, min_lr=4e-5),
        **dict(warmup_steps=100, schedule="cosine", global_batch_tokens=4096),
    }
    meta = {"config": model.config.to_dict(), "args": args, "tokens_seen": step * 4096, "delimiters": "bos+eos"}
    checkpoint.save(run, step, model, optimizer, meta | {"tokenizer": tokenizer and tokenizer.describe()})


@pytest.fixture
def run(source, tmp_path) -> Path:
    (tmp_path / "run").symlink_to(source)
    (tmp_path / "README.md").write_text(f"# Mine\n\n{BEGIN}\n{END}\n\nThe end.\n")
    return tmp_path / "run"


def release(run: Path, *flags) -> int | str:
    where = ("--out_dir", run.parent / "releases", "--readme", run.parent / "README.md")
    return run_script("release_checkpoint.py", "--run", run, *where, *flags)


def test_a_step_becomes_a_folder_a_card_and_a_row(run, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    results = {
        "results": {"arc": {"alias": "arc", "acc,none": 0.5, "acc_norm,none": 0.25}, "boolq": {"acc,none": 0.75}}
    }
    (tmp_path / "results-2000.json").write_text(json.dumps(results))
    assert release(run, "--step", 2000, "--evaluation", tmp_path / "results-{step}.json", "--dtype", "bfloat16") == 0
    folder = tmp_path / "releases" / NAME
    assert AutoModelForCausalLM.from_pretrained(folder).dtype == torch.bfloat16
    AutoTokenizer.from_pretrained(folder)

    front, card = (folder / "README.md").read_text().removeprefix("---\n").split("---\n", 1)
    assert "license: apache-2.0" in front and "library_name: transformers" in front
    for line in (
        f"# {NAME}",
        "| parameters | 127,296 |",
        "| training | 8,192,000 tokens, 2,000 steps |",
        "| data | 75.0% train_slim, 25.0% train_star; around each document: bos+eos |",
        "| loss | training 2.2500; validation 2.7500; validation, bits per byte 0.8000 |",
        "| licence | apache-2.0 |",
        "| arc | acc_norm | 0.2500 |",
        "| boolq | acc | 0.7500 |",
    ):
        assert line in card.splitlines(), line
    assert "AdamW, cosine from 0.0004 to 4e-05 after 100 steps of warmup, batches of 4,096 tokens" in card

    readme = (tmp_path / "README.md").read_text()
    assert readme.startswith("# Mine\n") and readme.endswith(f"{END}\n\nThe end.\n")
    (row,) = [line for line in readme.splitlines() if line.startswith("| **")]
    assert row.startswith(f"| **{NAME}** | 20") and row.endswith(
        "| 2,000 | 8,192,000 | 2.750 | 0.5000 over arc, boolq |"
    )
    assert release(run, "--step", 2000) == 0  # again: the row is replaced
    assert (tmp_path / "README.md").read_text().count(NAME) == 1


def test_rows_stand_in_the_order_of_their_release(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"{BEGIN}\n{END}")
    for name in ("a", "b", "a"):
        write_row(readme, {"release": name, "date": "today"})
    assert readme.read_text().splitlines()[3:] == ["| **b** | today |", "| **a** | today |", END]


def test_a_schedule_follows_a_run(source, run, tmp_path, capsys):
    """Step 1500 never comes, 1000 is there, 4000 appears while it waits."""
    (tmp_path / "schedule.yaml").write_text("steps: [4000, 1000, 1500]")
    late = threading.Timer(3, lambda: save(source, 4000, Tokenizer(source / "tokenizer")))
    late.start()
    try:
        assert release(run, "--schedule", tmp_path / "schedule.yaml", "--follow", "true", "--poll_s", 0.1) == 0
    finally:
        late.join()
    out = capsys.readouterr().out
    assert "step 1500 of" in out and "is not there, and step 2000 is: it was deleted or never saved" in out
    assert "warning: the run will delete step 1500" in out
    assert sorted(p.name[len(NAME) - 5 :] for p in (tmp_path / "releases").iterdir()) == ["1k-4m", "4k-16m"]


def test_steps_that_a_run_deletes(run):
    assert at_risk(run, [500, 1000, 2500, 3000]) == [500, 2500]


@pytest.mark.parametrize("content", ["", "steps: 5", "steps: []", "steps: [a]", "steps: [1.5]", "every: 3", "- 1", "{"])
def test_schedules_that_are_none(content, tmp_path):
    (tmp_path / "s.yaml").write_text(content)
    with pytest.raises(ValueError, match="s.yaml"):
        read_schedule(tmp_path / "s.yaml")


def test_what_is_refused(run, tmp_path):
    assert "give one of --step and --schedule" in release(run)
    assert "no complete checkpoint of step 7; there are: 1000, 2000" in release(run, "--step", 7)
    (tmp_path / "results.json").write_text("{}")
    assert "holds no results" in release(run, "--step", 2000, "--evaluation", tmp_path / "results.json")
    (tmp_path / "README.md").write_text("# Mine\n")
    assert "has no release table: put <!-- releases -->" in release(run, "--step", 2000)
    assert not (tmp_path / "releases" / NAME).exists()


class Hub(BaseHTTPRequestHandler):
    """Hugging Face's, as far as an upload asks it; `server.files` is what is there, {repository: {path: bytes}}."""

    def do_GET(self):
        if self.headers["Authorization"] != "Bearer hf_mine":
            self.answer({"error": "Invalid credentials"}, 401)
        elif self.path == "/api/whoami-v2":
            self.answer({"name": "me", "type": "user", "auth": {}})
        else:
            self.answer({"error": "Repository not found"}, 404)

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        if self.headers["Authorization"] != "Bearer hf_mine":
            return self.answer({"error": "Invalid credentials"}, 401)
        _, *parts = self.path.split("/")
        if parts == ["api", "repos", "create"]:
            repo = "{organization}/{name}".format(**{"organization": "me", **json.loads(body)})
            if repo.startswith("others/"):
                return self.answer({"error": "You don't have the rights to create a model there"}, 403)
            self.server.files.setdefault(repo, {})
            return self.answer({"url": f"{self.server.url}/{repo}"})
        if parts[:2] == ["api", "models"] and parts[4] == "preupload":
            files = json.loads(body)["files"]
            modes = [("lfs" if f["path"].endswith(".safetensors") else "regular") for f in files]
            return self.answer(
                {"files": [{**f, "uploadMode": m, "shouldIgnore": False} for f, m in zip(files, modes, strict=True)]}
            )
        if parts == ["api", "validate-yaml"]:  # of a model card
            return self.answer({"errors": [], "warnings": []})
        if parts[-3:] == ["lfs", "objects", "batch"]:
            objects = [
                {**o, "actions": {"upload": {"href": f"{self.server.url}/blob/{o['oid']}"}}}
                for o in json.loads(body)["objects"]
            ]
            return self.answer({"transfer": "basic", "objects": objects})
        if parts[:2] == ["api", "models"] and parts[4] == "commit":
            held = self.server.files["/".join(parts[2:4])]
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    held[value["path"]] = base64.b64decode(value["content"])
                if line["key"] == "lfsFile":
                    held[value["path"]] = self.server.blobs[value["oid"]]
            return self.answer({"commitUrl": f"{self.server.url}/me/x/commit/1", "commitOid": "1"})
        self.answer({"error": f"unknown here: {self.path}"}, 404)

    def do_PUT(self):
        content = self.rfile.read(int(self.headers["Content-Length"]))
        assert hashlib.sha256(content).hexdigest() == self.path.removeprefix("/blob/")
        self.server.blobs[self.path.removeprefix("/blob/")] = content
        self.answer({})

    def answer(self, content: dict, status: int = 200) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """One on this machine, that huggingface_hub takes for its own; nobody is logged in."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.files, server.blobs = {}, {}
    server.url = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    # Large files go as git-lfs, which every hub has taken, and not by Xet, a protocol of its own.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_uploads_only_when_asked_and_logged_in(hub, run, tmp_path, monkeypatch):
    push = ("--step", 1000, "--push", "true")
    assert release(run, "--step", 1000) == 0
    assert "nobody is logged in to Hugging Face here; run `hf auth login` first" in release(run, *push)
    monkeypatch.setenv("HF_TOKEN", "hf_another")
    assert "was not uploaded: Invalid user token" in release(run, *push)
    monkeypatch.setenv("HF_TOKEN", "hf_mine")
    assert "was not uploaded: 403 Forbidden" in release(run, *push, "--owner", "others")
    assert hub.files == {}

    assert release(run, *push) == 0 and release(run, *push, "--owner", "team") == 0
    (folder,) = (tmp_path / "releases").iterdir()
    written = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md"} <= set(written)
    for owner in ("me", "team"):
        assert hub.files[f"{owner}/{folder.name}"] == written

    hub.shutdown()
    hub.server_close()
    assert release(run, *push).startswith(f"error: --push: {folder} was not uploaded: ")


def test_the_card_of_weights_alone(tmp_path):
    from tests.tiny import write_lit_folder

    write_lit_folder(tmp_path / "lit", tokenizer=False)
    card = model_card(open_pretrained(tmp_path / "lit").stretched("yarn", 4), "x")
    assert "license" not in card and "training" not in card
    assert "| context | 256 tokens, yarn rope scaling of 64 |" in card
