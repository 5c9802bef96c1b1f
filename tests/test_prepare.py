"""Every token of every document, once, in order: whatever the processes, kills and errors on the way."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import zstandard

from lit_gpt import prepare as prepare_module
from lit_gpt import text_sources
from lit_gpt import tokenizer as tokenizer_module
from lit_gpt.prepare import DELIMITERS, PrepareArgs, prepare, select_files
from lit_gpt.shards import HEADER_SIZE, read_header, read_manifest
from lit_gpt.text_sources import Fields, Filter
from lit_gpt.tokenizer import Tokenizer

pytestmark = pytest.mark.usefixtures("tokenizer_cache")
ROOT = Path(__file__).parent.parent
FIELDS = Fields("text", (Filter.parse("meta.redpajama_set_name!=RedPajamaGithub"),), "meta.redpajama_set_name")
PATTERNS = ["train/*/*.jsonl.zst"]


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory) -> Path:
    """A small sentencepiece tokenizer with the settings of Llama 2's."""
    import io

    import sentencepiece

    model = io.BytesIO()
    text = (ROOT / "lit_gpt" / "prepare.py").read_text().splitlines()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text), model_writer=model, model_type="bpe", vocab_size=500, byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, allow_whitespace_only_pieces=True,
        minloglevel=2,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(model.getvalue())
    return path


def make_corpus(folder: Path, files: int = 5, documents: int = 60, size: int = 400) -> list[str]:
    """SlimPajama in small. Returns the texts to be packed, in order."""
    r, kept = random.Random(0), []
    words = "the of a <s> </s> def return  x=1 \n \t é 你好 😀 ▁ fox 12345".split(" ") + ["", "  "]
    for n in range(files):
        lines = []
        for _ in range(documents):
            text = " ".join(r.choices(words, k=r.randrange(size)))
            name = r.choice(["RedPajamaC4", "RedPajamaBook", "RedPajamaGithub"])
            lines.append(json.dumps({"text": text, "meta": {"redpajama_set_name": name}}) + "\n")
            kept += [text] * (name != "RedPajamaGithub")
        path = folder / "train" / f"chunk{1 + n // 3}" / f"example_train_{n}.jsonl.zst"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(zstandard.compress("".join(lines).encode()))
    return kept


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> tuple[Path, list[str]]:
    folder = tmp_path_factory.mktemp("corpus")
    return folder, make_corpus(folder)


@pytest.fixture
def small_units(monkeypatch):
    """Many units and tasks also for small files."""
    monkeypatch.setattr(text_sources, "UNIT", 20_000)
    monkeypatch.setattr(prepare_module, "UNIT", 20_000)


def run(source, tokenizer, out, prefix="train_slimpajama", patterns=PATTERNS, fields=FIELDS, **options):
    options = {"chunk_size": 5000, "processes": 1} | options
    return prepare(PrepareArgs(source, tokenizer, out, **options), prefix, patterns, fields)


def read_tokens(folder: Path, prefix: str = "train_slimpajama") -> np.ndarray:
    paths = sorted(folder.glob(f"{prefix}_*.bin"))
    return np.concatenate([np.fromfile(p, read_header(p).dtype, offset=HEADER_SIZE) for p in paths])


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# --- the stream ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("delimiters", DELIMITERS)
def test_the_stream_is_every_document_with_its_delimiters(corpus, tokenizer_path, tmp_path, delimiters, small_units):
    source, texts = corpus
    manifest = run(source, tokenizer_path, tmp_path, delimiters=delimiters)
    tokenizer, (bos, eos) = Tokenizer(tokenizer_path), DELIMITERS[delimiters]
    expected = [tokenizer.encode(text, bos=bos, eos=eos) for text in texts]
    assert read_tokens(tmp_path).tolist() == [i for ids in expected for i in ids]

    sizes = [shard["tokens"] for shard in manifest.shards]
    assert sizes[:-1] == [5000] * (len(sizes) - 1) and 0 < sizes[-1] <= 5000 and len(sizes) > 5
    starts = np.cumsum([0] + [len(ids) for ids in expected])[:-1]
    # With no delimiters an empty document has no place; it is counted where the next begins.
    assert sum(shard["documents"] for shard in manifest.shards) == manifest.documents == len(texts)
    if delimiters != "none":
        assert [s["documents"] for s in manifest.shards] == np.histogram(starts, [*range(0, sum(sizes), 5000), 10**9])[
            0
        ].tolist()
    assert manifest.tokens == sum(sizes) == sum(source["tokens"] for source in manifest.sources)
    assert manifest.text_bytes == sum(len(text.encode()) for text in texts)
    assert manifest.delimiters == delimiters and manifest.complete
    assert manifest == read_manifest(tmp_path, "train_slimpajama")
    assert manifest.tokenizer == tokenizer.describe()
    assert list(manifest.dropped) == ["meta.redpajama_set_name=RedPajamaGithub"]
    assert set(manifest.extra["subsets"]) == {"RedPajamaC4", "RedPajamaBook"}
    assert not list(tmp_path.glob("*.tmp")) and not list(tmp_path.glob("*.journal.jsonl"))


@pytest.mark.parametrize(("processes", "slot"), [(2, 1 << 20), (3, 15_000), (16, 100)])
def test_the_bytes_do_not_depend_on_the_number_of_processes(
    corpus, tokenizer_path, tmp_path, monkeypatch, processes, slot, small_units
):
    """Nor on what fits into the memory shared with a worker, nor on who reads: of 16, the files have fewer units."""
    monkeypatch.setattr(prepare_module, "SLOT", slot)
    run(corpus[0], tokenizer_path, tmp_path / "1")
    run(corpus[0], tokenizer_path, tmp_path / "n", processes=processes)
    assert contents(tmp_path / "1") == contents(tmp_path / "n")


def test_a_large_compressed_file_is_read_once_for_all_workers(tokenizer_path, tmp_path, monkeypatch, small_units):
    make_corpus(tmp_path / "source", files=1, documents=300)
    run(tmp_path / "source", tokenizer_path, tmp_path / "1")
    writer, block = os.getpid(), text_sources.JsonLines.block

    def read_by_writer(self, index):
        assert os.getpid() == writer
        return block(self, index)

    monkeypatch.setattr(text_sources.JsonLines, "block", read_by_writer)
    run(tmp_path / "source", tokenizer_path, tmp_path / "2", processes=2)
    assert contents(tmp_path / "1") == contents(tmp_path / "2")


def test_nor_on_the_engine_or_the_size_of_units(corpus, tokenizer_path, tmp_path, monkeypatch):
    run(corpus[0], tokenizer_path, tmp_path / "a")
    run(corpus[0], tokenizer_path, tmp_path / "b", engine="reference")
    monkeypatch.setattr(text_sources, "UNIT", 3_000)
    # Five times as long as its compressed length suggests, so that more units exist than are planned.
    monkeypatch.setattr(text_sources, "COMPRESSION_RATIO", 0.2)
    run(corpus[0], tokenizer_path, tmp_path / "c", processes=2)
    for other in "bc":
        assert (read_tokens(tmp_path / "a") == read_tokens(tmp_path / other)).all()


def test_parts_for_several_machines_together_are_the_whole(corpus, tokenizer_path, tmp_path):
    run(corpus[0], tokenizer_path, tmp_path / "whole")
    for index in range(3):
        run(corpus[0], tokenizer_path, tmp_path / "parts", shard_index=index, shard_count=3)
    names = [f"train_slimpajama_{index:05d}" for index in range(3)]
    assert all(read_manifest(tmp_path / "parts", name).complete for name in names)
    assert (read_tokens(tmp_path / "whole") == read_tokens(tmp_path / "parts")).all()
    with pytest.raises(ValueError, match="part .* of 5 files has none"):
        for index in range(40):
            run(corpus[0], tokenizer_path, tmp_path / "many", shard_index=index, shard_count=40, dry_run=True)


def test_percentage_and_filenames_subset(corpus, tmp_path):
    def names(**options):
        args = PrepareArgs(corpus[0], tmp_path, tmp_path, **options)
        return [path.name[14:15] for path in select_files(args, PATTERNS)]

    assert names() == list("01234")
    assert names(percentage=0.5) == list("01")
    assert names(filenames_subset="chunk2") == list("34")
    assert names(filenames_subset=["train_0", "train_4"]) == list("04")
    for options, message in (
        ({"percentage": 0.1}, "--percentage 0.1 of 5 files is none"),
        ({"filenames_subset": "nope"}, "no file has one of these in its path"),
    ):
        with pytest.raises(ValueError, match=message):
            names(**options)


def test_one_tiny_file_is_enough(tokenizer_path, tmp_path):
    (tmp_path / "a.txt").write_text("hi")
    manifest = run(tmp_path / "a.txt", tokenizer_path, tmp_path / "out", "mine", fields=Fields(), processes=2)
    assert manifest.documents == 1
    assert read_tokens(tmp_path / "out", "mine").tolist() == Tokenizer(tokenizer_path).encode("hi", bos=True, eos=True)


def test_a_large_vocabulary_is_written_as_int32(tmp_path, monkeypatch):
    import base64

    tokens = [bytes([b]) for b in range(256)] + [b"%d" % n for n in range(100_000, 166_000)]
    (tmp_path / "tokenizer.model").write_bytes(
        b"".join(base64.b64encode(t) + b" %d\n" % i for i, t in enumerate(tokens))
    )
    (tmp_path / "a.txt").write_text("hello")
    manifest = run(tmp_path / "a.txt", tmp_path, tmp_path / "out", "mine", fields=Fields(), engine="reference")
    assert manifest.dtype == "int32"
    assert read_tokens(tmp_path / "out", "mine")[[0, -1]].tolist() == [len(tokens), len(tokens) + 1]


# --- restarts --------------------------------------------------------------------------------------------------------


def test_a_second_run_does_nothing(corpus, tokenizer_path, tmp_path, capsys):
    run(corpus[0], tokenizer_path, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    run(corpus[0], tokenizer_path, tmp_path, processes=2)
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert "already complete" in capsys.readouterr().out


def interrupt_after(monkeypatch, shards: int) -> None:
    write, written = prepare_module.write_shard, []

    def write_some(path, tokens):
        if len(written) == shards:
            raise KeyboardInterrupt
        written.append(path)
        write(path, tokens)

    monkeypatch.setattr(prepare_module, "write_shard", write_some)


@pytest.mark.parametrize("processes", [1, 2])
def test_an_interrupted_run_goes_on_where_it_was(corpus, tokenizer_path, tmp_path, monkeypatch, small_units, processes):
    run(corpus[0], tokenizer_path, tmp_path / "straight")
    for shards in (0, 1, 3, 2, 100):
        with monkeypatch.context() as patch:
            interrupt_after(patch, shards)
            try:
                run(corpus[0], tokenizer_path, tmp_path / "again", processes=processes)
            except KeyboardInterrupt:
                assert not read_manifest(tmp_path / "again", "train_slimpajama").complete
                # What a kill in the middle of a write leaves behind:
                with open(tmp_path / "again" / "train_slimpajama.journal.jsonl", "ab") as journal:
                    journal.write(b'{"shard": {"file": "train_sl')
                (tmp_path / "again" / "train_slimpajama_0000000009.bin.tmp").write_bytes(b"LITP")
    assert contents(tmp_path / "straight") == contents(tmp_path / "again")


def changed_runs(source: Path, tokenizer: Path, folder: Path):
    other = folder / "other" / "tokenizer.model"
    other.parent.mkdir()
    other.write_bytes(tokenizer.read_bytes() + b"\n")
    first = sorted(source.glob(PATTERNS[0]))[0]
    yield "begun with delimiters bos\\+eos, now it is eos", lambda: {"delimiters": "eos"}
    yield "begun with chunk_size 5000, now it is 4000", lambda: {"chunk_size": 4000}
    yield "begun with filters .* now it is \\[\\]", lambda: {"fields": Fields("text")}
    yield "example_train_4.jsonl.zst is gone", lambda: {"percentage": 0.8}
    yield "example_train_0.jsonl.zst has changed", lambda: os.utime(first, (1, 1)) or {}


@pytest.mark.parametrize("finished", [True, False])
def test_another_input_is_refused_and_overwrite_begins_anew(tokenizer_path, tmp_path, monkeypatch, finished):
    source, out = tmp_path / "source", tmp_path / "out"
    make_corpus(source)
    with monkeypatch.context() as patch:
        if not finished:
            interrupt_after(patch, 2)
        try:
            run(source, tokenizer_path, out)
        except KeyboardInterrupt:
            pass
    before = contents(out)
    for message, options in changed_runs(source, tokenizer_path, tmp_path):
        with pytest.raises(ValueError, match=message + ".*--overwrite true begins anew"):
            run(source, tokenizer_path, out, **options())
    (source / "train" / "chunk1" / "z.jsonl.zst").write_bytes(zstandard.compress(b""))
    with pytest.raises(ValueError, match="z.jsonl.zst is new"):
        run(source, tokenizer_path, out)
    (source / "train" / "chunk1" / "z.jsonl.zst").unlink()
    assert contents(out) == before

    manifest = run(source, tokenizer_path, out, delimiters="eos", overwrite=True)
    assert manifest.delimiters == "eos" and len(list(out.iterdir())) == len(manifest.shards) + 1


def test_another_tokenizer_is_refused(corpus, tokenizer_path, tmp_path):
    run(corpus[0], tokenizer_path, tmp_path / "out")
    from sentencepiece import SentencePieceTrainer

    SentencePieceTrainer.train(
        sentence_iterator=iter(["some other words"] * 9), model_prefix=str(tmp_path / "tokenizer"), vocab_size=280,
        model_type="bpe", byte_fallback=True, minloglevel=2,
    )  # fmt: skip
    with pytest.raises(ValueError, match="begun with tokenizer sha256"):
        run(corpus[0], tmp_path / "tokenizer.model", tmp_path / "out")


def test_shards_of_another_maker_or_that_are_gone_are_not_taken_for_ours(corpus, tokenizer_path, tmp_path):
    (tmp_path / "train_slimpajama_0000000000.bin").write_bytes(b"theirs")
    with pytest.raises(ValueError, match="shards of this prefix without a manifest"):
        run(corpus[0], tokenizer_path, tmp_path)
    run(corpus[0], tokenizer_path, tmp_path, overwrite=True)
    (tmp_path / "train_slimpajama_0000000001.bin").unlink()
    with pytest.raises(ValueError, match="0000000001.bin: this shard of the earlier run is missing"):
        run(corpus[0], tokenizer_path, tmp_path)


SCRIPT = """
import runpy, sys
from lit_gpt import prepare, text_sources
prepare.UNIT = text_sources.UNIT = 100_000  # so that there is much to be interrupted in a small corpus
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def command(source: Path, tokenizer: Path, out: Path, *flags: str) -> list[str]:
    script = ROOT / "scripts" / "prepare_slimpajama.py"
    paths = ["--source_path", source, "--tokenizer_path", tokenizer, "--destination_path", out]
    return [sys.executable, "-c", SCRIPT, *map(str, [script, *paths]), "--chunk_size=20000", *flags]


def processes_of(out: Path) -> list[str]:
    """The running processes that have `out` in their command line."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            found += [entry.name] * (str(out).encode() in (entry / "cmdline").read_bytes())
        except OSError:
            continue
    return found


def kill_and_restart(tmp_path: Path, tokenizer: Path, processes: int, kills: int) -> None:
    source, out, r = tmp_path / "source", tmp_path / "out", random.Random(processes)
    make_corpus(source, files=6, documents=1500, size=600 if kills > 5 else 200)
    subprocess.run(command(source, tokenizer, tmp_path / "straight", "--processes=1"), check=True, capture_output=True)
    again = command(source, tokenizer, out, f"--processes={processes}", "--engine=reference")
    for _ in range(kills):
        process = subprocess.Popen(again, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        target = len(list(out.glob("*.bin"))) + r.randrange(6)
        while process.poll() is None and (not out.exists() or len(list(out.glob("*.bin"))) < target):
            time.sleep(0.002)
        time.sleep(r.uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "it was done before it was killed"
        deadline = time.monotonic() + 20
        while processes_of(out):
            assert time.monotonic() < deadline, "a worker outlives the writer"
            time.sleep(0.01)
    assert not read_manifest(out, "train_slimpajama").complete
    done = len(list(out.glob("*.bin")))
    last = subprocess.run(again, check=True, capture_output=True, text=True)
    assert contents(tmp_path / "straight") == normalised(contents(out))
    assert done > 0 and "shards in" in last.stdout


def normalised(files: dict[str, bytes]) -> dict[str, bytes]:
    """The manifest names the engine, which here is another."""
    return {
        name: content.replace(b'"engine": "reference"', b'"engine": "gigatoken"') for name, content in files.items()
    }


@pytest.mark.parametrize("processes", [1, 2])
def test_killed_and_restarted(tmp_path, tokenizer_path, processes):
    kill_and_restart(tmp_path, tokenizer_path, processes, kills=2)


@pytest.mark.long
@pytest.mark.parametrize("processes", [1, 2])
def test_killed_twenty_times_and_restarted(tmp_path, tokenizer_path, processes):
    kill_and_restart(tmp_path, tokenizer_path, processes, kills=20)


def test_a_killed_worker_ends_the_run_loudly(corpus, tokenizer_path, tmp_path, monkeypatch, small_units):
    parse, units = text_sources._parse, []

    def die(*args):
        units.append(args)
        if len(units) == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        parse(*args)

    with monkeypatch.context() as patch:
        patch.setattr(text_sources, "_parse", die)
        with pytest.raises(ChildProcessError, match="a worker process died"):
            run(corpus[0], tokenizer_path, tmp_path / "a", processes=2)
    assert not read_manifest(tmp_path / "a", "train_slimpajama").complete
    run(corpus[0], tokenizer_path, tmp_path / "a", processes=2)
    run(corpus[0], tokenizer_path, tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_two_runs_at_once_are_refused(tokenizer_path, tmp_path):
    make_corpus(tmp_path / "source", files=3, documents=1500, size=600)
    slow = command(tmp_path / "source", tokenizer_path, tmp_path / "out", "--engine=reference", "--processes=2")
    first = subprocess.Popen(slow, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while not (tmp_path / "out" / "train_slimpajama.manifest.json").exists():
            assert first.poll() is None
            time.sleep(0.01)
        with pytest.raises(ValueError, match="another process is preparing"):
            run(tmp_path / "source", tokenizer_path, tmp_path / "out")
    finally:
        first.kill()
        first.wait()


# --- bad input -------------------------------------------------------------------------------------------------------


def break_corpus(source: Path) -> tuple[Path, bytes]:
    """Break lines 3 and 5 of the third file. Returns: the file and its good content."""
    path = source / "train" / "chunk1" / "example_train_2.jsonl.zst"
    good = path.read_bytes()
    lines = zstandard.decompress(good).splitlines(keepends=True)
    lines[2], lines[4] = b'{"text": "no meta"}\n', b"not json\n"
    path.write_bytes(zstandard.compress(b"".join(lines)))
    return path, good


def test_a_bad_line_stops_the_run_or_is_listed(tokenizer_path, tmp_path, small_units):
    source = tmp_path / "source"
    make_corpus(source)
    break_corpus(source)
    for processes in (1, 2):
        with pytest.raises(ValueError, match=r"train_2.jsonl.zst, line 3: .*; there are 'text' \(and 1 more near it\)"):
            run(source, tokenizer_path, tmp_path / "out", processes=processes)
        assert not read_manifest(tmp_path / "out", "train_slimpajama").complete
    manifest = run(source, tokenizer_path, tmp_path / "out", on_error="skip")
    assert manifest.complete
    assert [(s["path"], s["line"]) for s in manifest.skipped] == [
        ("train/chunk1/example_train_2.jsonl.zst", n) for n in (3, 5)
    ]
    run(source, tokenizer_path, tmp_path / "straight", on_error="skip", processes=2)
    assert contents(tmp_path / "out") == contents(tmp_path / "straight")


def test_a_file_that_stopped_the_run_may_be_mended(tokenizer_path, tmp_path, small_units):
    source = tmp_path / "source"
    make_corpus(source)
    path, good = break_corpus(source)
    with pytest.raises(ValueError, match="line 3"):
        run(source, tokenizer_path, tmp_path / "out")
    assert list((tmp_path / "out").glob("*.bin"))
    path.write_bytes(good)
    run(source, tokenizer_path, tmp_path / "out")
    run(source, tokenizer_path, tmp_path / "straight")
    assert contents(tmp_path / "out") == contents(tmp_path / "straight")


def test_what_stopped_before_the_first_shard_may_be_corrected(tokenizer_path, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in "ab":
        (source / f"{name}.jsonl").write_text('{"content": "of the fox"}\n')
    (source / "c.jsonl").write_text("not json\n")
    corpus = (source, tokenizer_path, tmp_path / "out", "mine", ["*.jsonl"])
    with pytest.raises(ValueError, match="a.jsonl, line 1: no field 'text'; there are 'content' .*--text_key"):
        run(*corpus, Fields())
    with pytest.raises(ValueError, match="c.jsonl, line 1"):
        run(*corpus, Fields("content"))
    (source / "c.jsonl").unlink()
    manifest = run(*corpus, Fields("content"), delimiters="eos")
    assert manifest.documents == 2 and "stopped_at" not in manifest.extra
    with pytest.raises(ValueError, match="begun with delimiters eos"):
        run(*corpus, Fields("content"))


@pytest.mark.parametrize("prefix", ["", "../other", "/tmp/other", "other/"])
def test_a_prefix_stays_in_the_folder(tokenizer_path, tmp_path, prefix):
    (tmp_path / "a.txt").write_text("hi")
    with pytest.raises(ValueError, match="--prefix '.*no /"):
        run(tmp_path / "a.txt", tokenizer_path, tmp_path / "out", prefix, fields=Fields())
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_no_document_leaves_nothing_behind(tokenizer_path, tmp_path):
    make_corpus(tmp_path / "source", files=1)
    fields = Fields("text", (Filter.parse("meta.redpajama_set_name=None"),))
    with pytest.raises(ValueError, match=r"hold no document \(60 left out, 0 unreadable\)"):
        run(tmp_path / "source", tokenizer_path, tmp_path / "out", fields=fields)
    assert contents(tmp_path / "out") == {}


def test_all_wrong_flags_are_named_at_once(tmp_path):
    with pytest.raises(ValueError) as error:
        PrepareArgs(
            tmp_path, tmp_path, tmp_path, percentage=2, chunk_size=0, processes=0, shard_index=1, delimiters="x"
        )
    assert all(
        flag in str(error.value) for flag in ("percentage", "chunk_size", "processes", "shard_index", "delimiters")
    )


def test_a_difference_from_the_reference_stops_the_run(corpus, tokenizer_path, tmp_path, monkeypatch):
    monkeypatch.setattr("lit_gpt.tokenizer.TORTURE", ["nothing of note"])
    right = tokenizer_module._in_gigatoken(Tokenizer(tokenizer_path))
    wrong = Tokenizer(tokenizer_path).encode("fox", bos=False, eos=False)[-1]

    class Wrong:
        def encode_batch_padded(self, texts, **options):
            ids, lengths = right.encode_batch_padded(texts, **options)
            return np.where(ids == wrong, wrong + 1, ids), lengths

    monkeypatch.setattr(tokenizer_module, "_in_gigatoken", lambda tokenizer: Wrong())
    for processes in (1, 2):
        with pytest.raises(ValueError, match="differ from the reference tokenizer's .* --engine reference"):
            run(corpus[0], tokenizer_path, tmp_path, processes=processes)


def test_the_first_documents_are_checked(tokenizer_path, tmp_path, small_units, monkeypatch):
    """CHECK_FIRST characters in all, however many processes and units there are."""
    checked, disagreement = tmp_path / "checked", tokenizer_module.BatchEncoder.disagreement

    def spy(self, texts):
        with open(checked, "a") as file:  # from the workers
            file.writelines("x" for text in texts if text.startswith("fox"))
        return disagreement(self, texts)

    monkeypatch.setattr(tokenizer_module.BatchEncoder, "disagreement", spy)
    for name, files, expected in (("one", 1, 50), ("six", 6, 100)):
        for n in range(files):
            path = tmp_path / name / f"{n}.jsonl"
            path.parent.mkdir(exist_ok=True)
            path.write_text(f'{{"text": "{"fox " * 250}"}}\n' * 50)  # 50,000 characters
        run(tmp_path / name, tokenizer_path, tmp_path / "out" / name, name, ["*.jsonl"], Fields(), processes=8)
        assert expected <= len(checked.read_text()) <= expected + 8  # and the first document of each worker
        checked.unlink()


def script(name: str, *flags: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(ROOT / "scripts" / f"{name}.py"), *map(str, flags)], capture_output=True, text=True
    )


def test_macos_counts_its_processors_too(monkeypatch, tmp_path):
    monkeypatch.delattr(os, "sched_getaffinity")
    assert PrepareArgs(tmp_path, tmp_path, tmp_path).processes == os.cpu_count()


def test_the_scripts_end_in_one_line_and_exit_code_1(corpus, tokenizer_path, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.parquet").write_bytes(b"PAR1" * 10)
    good = {"--source_path": corpus[0], "--tokenizer_path": tokenizer_path, "--destination_path": tmp_path / "out"}
    for name, change, message in (
        ("prepare_slimpajama", {"--source_path": tmp_path / "gone"}, "gone: no such folder"),
        ("prepare_slimpajama", {"--source_path": tmp_path / "empty"}, "no file in it matches train/*/*.jsonl.zst"),
        ("prepare_slimpajama", {"--tokenizer_path": __file__}, "not a tokenizer"),
        ("prepare_starcoder", {"--source_path": tmp_path}, "x.parquet: Parquet"),
        ("prepare_redpajama", {"--chunk_size": 0}, "--chunk_size 0"),
        ("prepare_dataset", {"--filter": "x"}, "--filter 'x'"),
    ):
        result = script(name, *(part for flag in (good | change).items() for part in flag))
        errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
        assert result.returncode == 1 and len(errors) == 1 and message in errors[0], result.stderr
        assert "Traceback" not in result.stderr
        assert not list((tmp_path / "out").glob("*.bin")) if (tmp_path / "out").exists() else True


def test_prepare_dataset_verifies_decodes_and_estimates(corpus, tokenizer_path, tmp_path):
    texts = [f"document {n} of fox" for n in range(50)]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"body": {"t": t}, "n": n}) for n, t in enumerate(texts)))
    flags = ["--source_path", tmp_path / "a.jsonl", "--tokenizer_path", tokenizer_path, "--text_key=body.t"]
    dry = script("prepare_dataset", *flags, "--destination_path", tmp_path / "dry", "--dry_run=true")
    assert dry.returncode == 0 and dry.stdout.startswith("1 files, "), dry.stderr
    assert f"about {sum(map(len, texts))}B of text" in dry.stdout and " of shards\n" in dry.stdout
    assert not (tmp_path / "dry").exists()
    for n, delimiters in enumerate(("bos+eos", "eos", "bos")):
        out = tmp_path / delimiters
        made = script(
            "prepare_dataset", *flags, "--destination_path", out, "--chunk_size=64", f"--delimiters={delimiters}"
        )
        assert made.returncode == 0, made.stderr
        check = ["--verify", out, "--tokenizer_path", tokenizer_path, "--document"]
        result = script("prepare_dataset", *check, 49 * (n > 0))
        assert result.returncode == 0 and "50 documents" in result.stdout, result.stderr
        assert result.stdout.splitlines()[-1] == texts[49 * (n > 0)]
    assert "has 50 documents" in script("prepare_dataset", *check, 50).stderr
    shard = out / "train_0000000001.bin"
    damaged = bytearray(shard.read_bytes())
    damaged[50] ^= 1
    shard.write_bytes(damaged)
    result = script("prepare_dataset", "--verify", out)
    assert result.returncode == 1 and "train_0000000001.bin: checksum" in result.stderr


def test_redpajama_keeps_its_sets_apart(tokenizer_path, tmp_path):
    source, lines = tmp_path / "source", {"arxiv": 3, "book": 2}
    for name, documents in lines.items():
        for path in (source / f"{name}_sample.jsonl", source / name / f"{name}_0.jsonl"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text('{"text": "of the fox"}\n' * documents)
    good = ("--source_path", source, "--tokenizer_path", tokenizer_path, "--destination_path", tmp_path / "out")
    assert script("prepare_redpajama", *good).returncode == 0
    assert script("prepare_redpajama", *good, "--sample=false", "--match=book").returncode == 0
    counts = {name: read_manifest(tmp_path / "out", name).documents for name in ("arxiv_sample", "book_sample", "book")}
    assert counts == {"arxiv_sample": 3, "book_sample": 2, "book": 2}
    missing = script("prepare_redpajama", *good, "--sample=false")
    assert missing.returncode == 1 and "no file in it matches c4/c4-train*.jsonl" in missing.stderr
    assert read_manifest(tmp_path / "out", "arxiv") is None


# --- the original ----------------------------------------------------------------------------------------------------


@pytest.mark.shared
@pytest.mark.parametrize("name", ["slimpajama_train", "slimpajama_validation", "slimpajama_test", "starcoder_train"])
def test_equal_to_what_the_originals_packer_makes(shared_data, tmp_path, name):
    import hashlib

    reference = json.loads((shared_data / "PACKING_REFERENCE.json").read_text())["sets"]
    reference = reference[name] if name in reference else reference[next(k for k in reference if "star" in k)]
    corpus, split = name.split("_")
    slim = corpus == "slimpajama"
    source = shared_data / ("SlimPajama" if slim else "starcoderdata")
    result = script(
        f"prepare_{corpus}", "--source_path", source, "--tokenizer_path", shared_data / "tokenizer" / "llama2",
        "--destination_path", tmp_path, "--split", split, "--delimiters=eos", "--chunk_size", 262_272, "--processes=2",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    prefix = f"{split}_{corpus}"
    manifest = read_manifest(tmp_path, prefix)
    assert manifest.tokens == reference["total_tokens"]
    root = "SlimPajama" if slim else "starcoderdata"
    assert [(f"{root}/{s['path']}", s["documents"], s["tokens"]) for s in manifest.sources] == [
        (f["file"], f["documents_used"], f["tokens_with_eos"]) for f in reference["files"]
    ]
    stream = read_tokens(tmp_path, prefix)
    assert hashlib.sha256(stream.tobytes()).hexdigest() == reference["token_stream_sha256"]
    for chunk in reference["full_chunks"]:
        shard = tmp_path / f"{prefix}_{chunk['index']:010d}.bin"
        assert hashlib.sha256(shard.read_bytes()).hexdigest() == chunk["sha256"]
    assert len(manifest.shards) == len(reference["full_chunks"]) + 1
