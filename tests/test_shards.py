import itertools
import json
import os
import pickle
import struct

import numpy as np
import pytest
import torch
from packed_data import TOKENIZER, write_source

from lit_gpt.packed_dataset import PackedDataset, PackedLoader
from lit_gpt.shards import (
    HEADER_SIZE,
    LocalFolder,
    Manifest,
    TokenStream,
    read_header,
    read_manifest,
    token_dtype,
    write_manifest,
    write_shard,
)


def shard_bytes(magic=b"LITPKDS", version=1, code=8, count=3, tokens=(5, 6, 7)):
    header = magic + struct.pack("<Q", version) + struct.pack("<B", code) + struct.pack("<Q", count)
    return header + np.array(tokens, "<u2").tobytes()


def test_the_format_is_the_originals(tmp_path):
    write_shard(tmp_path / "a.bin", np.array([5, 6, 7], np.uint16))
    assert (tmp_path / "a.bin").read_bytes() == shard_bytes()
    header = read_header(tmp_path / "a.bin")
    assert (header.dtype, header.tokens) == (np.uint16, 3)
    assert [token_dtype(v) for v in (32000, 65499, 65500, 128256)] == [np.uint16, np.uint16, np.int32, np.int32]
    assert os.listdir(tmp_path) == ["a.bin"]  # no temporary file left


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "shorter than the 24-byte header"),
        (shard_bytes()[:20], "shorter than the 24-byte header"),
        (shard_bytes(magic=b"PK\x03\x04abc"), "not a packed shard"),
        (shard_bytes(version=2), "version 2"),
        (shard_bytes(code=0), "dtype code 0"),
        (shard_bytes(code=6), "dtype code 6"),
        (shard_bytes(count=4), "promises 4 tokens"),
        (shard_bytes()[:-1], "promises 3 tokens"),
        (shard_bytes() + b"x", "promises 3 tokens"),
    ],
)
def test_a_broken_header_is_refused_by_name_wherever_it_is(tmp_path, content, message):
    write_source(tmp_path, "train", np.arange(3, 100), [10], manifest=False)
    (tmp_path / "train_0000000007.bin").write_bytes(content)
    with pytest.raises(ValueError, match=f"train_0000000007.bin.*{message}"):
        TokenStream(tmp_path, "train", vocab_size=32000)


def test_a_shard_is_of_integers(tmp_path):
    with pytest.raises(ValueError, match="a.bin.*1-d"):
        write_shard(tmp_path / "a.bin", np.zeros((2, 2), np.uint16))
    assert not os.listdir(tmp_path)


def test_manifest_round_trip_keeps_unknown_keys(tmp_path):
    manifest = Manifest("a", TOKENIZER, "eos", "uint16", 100, tokens=3, extra={"future": {"x": [1]}})
    write_manifest(tmp_path, manifest)
    assert read_manifest(tmp_path, "a") == manifest
    content = json.loads((tmp_path / "a.manifest.json").read_text())
    assert (content["format"], content["version"], content["future"]) == ("lit-packed", 1, {"x": [1]})
    assert read_manifest(tmp_path, "b") is None


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"format": "lit-packed", "version": 1}', '{"format": "lit-packed", "version": 9}']
)
def test_a_file_that_is_no_manifest(tmp_path, text):
    (tmp_path / "a.manifest.json").write_text(text)
    with pytest.raises(ValueError, match="a.manifest.json: not a manifest"):
        read_manifest(tmp_path, "a")


def test_a_stream_reads_across_shards_of_any_size_and_dtype(tmp_path):
    tokens = np.random.default_rng(0).integers(0, 32000, 1000)
    write_source(tmp_path, "train", tokens, [1, 300, 7, 2, 150], manifest=False)
    write_shard(tmp_path / "train_0000000002.bin", tokens[301:308].astype(np.int32))  # another dtype
    write_shard(tmp_path / "train_0000000003x.bin", np.array([], np.uint16))  # an empty one, between 3 and 4
    with pytest.warns(UserWarning, match="no manifest"):
        stream = TokenStream(tmp_path, "train", vocab_size=32000)
    assert stream.tokens == 1000
    for length in (1, 5, 400, 1000):
        starts = np.arange(0, 1000, 13)
        expected = np.full((len(starts), length), -100)
        for row, start in zip(expected, starts, strict=True):
            row[: len(tokens[start : start + length])] = tokens[start : start + length]
        np.testing.assert_array_equal(stream.read(starts, length, fill=-100), expected)
    path, offset = stream.locate(305)
    assert path.endswith("train_0000000002.bin") and offset == 4


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="counts open files in /proc")
def test_open_files_are_bounded_and_do_not_travel(tmp_path):
    write_source(tmp_path, "train", np.arange(2000), [10])
    stream = TokenStream(tmp_path, "train", vocab_size=32000)
    before = len(os.listdir("/proc/self/fd"))
    for start in range(0, 2000, 10):
        assert stream.read(np.array([start]), 1, fill=0)[0, 0] == start
    assert len(os.listdir("/proc/self/fd")) - before == LocalFolder.MAX_OPEN
    copy = pickle.loads(pickle.dumps(stream))
    assert copy.folder._open == {} and copy.read(np.array([7]), 1, fill=0)[0, 0] == 7
    del stream, copy
    assert len(os.listdir("/proc/self/fd")) == before


def test_missing_folder_and_prefix(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        TokenStream(tmp_path / "nowhere", "train", vocab_size=32000)
    with pytest.raises(FileNotFoundError, match="no shards train.*no .bin files"):
        TokenStream(tmp_path, "train", vocab_size=32000)
    write_source(tmp_path, "train_star", np.arange(10), [10])
    write_shard(tmp_path / "val_slim_3_0000000000.bin", np.arange(10))  # the original's naming
    with pytest.raises(FileNotFoundError, match="prefixes here are train_star, val_slim_3"):
        TokenStream(tmp_path, "train_slim", vocab_size=32000)


def test_ids_outside_the_vocabulary_are_refused_with_shard_and_offset(tmp_path):
    tokens = np.arange(100)
    tokens[57] = 31999
    write_source(tmp_path, "train", tokens, [20], manifest=False)
    with pytest.warns(UserWarning):
        stream = TokenStream(tmp_path, "train", vocab_size=31999)
    stream.read(np.array([0, 58]), 40, fill=0)
    for read in (lambda: stream.read(np.array([0, 50]), 10, fill=0), stream.verify):
        with pytest.raises(ValueError, match="train_0000000002.bin: token 17 is id 31999, outside"):
            read()


def test_negative_ids_are_refused(tmp_path):
    write_shard(tmp_path / "train_0000000000.bin", np.array([3, -1, 4], np.int32))
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="token 1 is id -1"):
        TokenStream(tmp_path, "train", vocab_size=100).read(np.array([0]), 3, fill=0)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"complete": False}, "did not finish"),
        ({"tokenizer": TOKENIZER | {"vocab_size": 50000}}, "50000 ids, more than the model's 32000"),
        ({"dtype": "int32"}, "is uint16, not int32"),
        ({"shards": []}, "train_0000000000.bin is not listed"),
        ({"shards": [{"file": f"train_000000000{i}.bin", "tokens": 10} for i in range(6)]}, "5.bin is missing"),
        ({"shards": [{"file": f"train_000000000{i}.bin", "tokens": 10 + i} for i in range(5)]}, "10 tokens, not 11"),
        ({"shards": [{"file": "x"}]}, "needs a file and its tokens"),
    ],
)
def test_manifests_that_disagree(tmp_path, changes, message):
    write_source(tmp_path, "train", np.arange(50), [10], **changes)
    with pytest.raises(ValueError, match=f"train.manifest.json.*{message}"):
        TokenStream(tmp_path, "train", vocab_size=32000)


def test_one_prefix_may_span_several_manifests(tmp_path, recwarn):
    write_source(tmp_path, "train_slim_00000", np.arange(50), [20])
    write_source(tmp_path, "train_slim_00001", np.arange(50, 90), [20])
    write_source(tmp_path, "train_star", np.arange(9), [20], complete=False)  # not in the prefix, not looked at
    stream = TokenStream(tmp_path, "train_slim", vocab_size=32000)
    np.testing.assert_array_equal(stream.read(np.array([0]), 90, fill=0)[0], np.arange(90))
    assert [m.prefix for m in stream.manifests] == ["train_slim_00000", "train_slim_00001"] and not recwarn


def test_shards_without_a_manifest_beside_shards_with_one(tmp_path):
    write_source(tmp_path, "train_a", np.arange(50), [20])
    write_source(tmp_path, "train_b", np.arange(50), [20], manifest=False)
    with pytest.warns(UserWarning, match="no manifest for 3 of the 6 shards.*first: train_b_0000000000.bin"):
        TokenStream(tmp_path, "train", vocab_size=32000)


def test_verify_finds_a_changed_token(tmp_path):
    write_source(tmp_path, "train", np.arange(100), [40])
    stream = TokenStream(tmp_path, "train", vocab_size=32000)
    stream.verify()
    with open(tmp_path / "train_0000000001.bin", "r+b") as file:
        file.seek(HEADER_SIZE + 6)
        file.write(b"\x01\x00")
    with pytest.raises(ValueError, match="train_0000000001.bin: checksum .* is not the manifest's"):
        stream.verify()


def test_a_file_cut_short_while_it_is_read(tmp_path):
    write_source(tmp_path, "train", np.arange(100), [100])
    stream = TokenStream(tmp_path, "train", vocab_size=32000)
    os.truncate(tmp_path / "train_0000000000.bin", 100)
    with pytest.raises(ValueError, match="train_0000000000.bin: cut short"):
        stream.read(np.array([80]), 10, fill=0)


# --- behind a URL ----------------------------------------------------------------------------------------------------


def check_remote(url: str, tokens: np.ndarray, cache_dir):
    """Reads equal the tokens, with and without a cache that holds some shards; the cache stays within its bound."""
    starts = np.random.default_rng(1).integers(0, len(tokens) - 50, 30)
    expected = np.stack([tokens[start : start + 50] for start in starts])
    for cache_bytes in (0, 5000, 1 << 30):
        stream = TokenStream(url, "train", vocab_size=32000, cache_dir=cache_dir, cache_bytes=cache_bytes)
        np.testing.assert_array_equal(stream.read(starts, 50, fill=0), expected)
        np.testing.assert_array_equal(pickle.loads(pickle.dumps(stream)).read(starts, 50, fill=0), expected)
        files = list(cache_dir.glob("*")) if cache_dir.exists() else []
        assert sum(file.stat().st_size for file in files) <= cache_bytes
        assert bool(files) == bool(cache_bytes)
    stream.verify()
    with pytest.raises(FileNotFoundError, match="prefixes here are train"):
        TokenStream(url, "val", vocab_size=32000)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        TokenStream(url + "-nowhere", "val", vocab_size=32000)


def test_memory_url(tmp_path):
    fsspec = pytest.importorskip("fsspec")
    tokens = np.random.default_rng(0).integers(0, 32000, 10_000)
    write_source(tmp_path / "here", "train", tokens, [700])
    fs = fsspec.filesystem("memory")
    fs.put(str(tmp_path / "here") + "/", "/packed/", recursive=True)
    check_remote("memory://packed", tokens, tmp_path / "cache")
    fs.pipe_file("/packed/train_0000000003.bin", shard_bytes(version=7))
    with pytest.raises(ValueError, match="memory://packed/train_0000000003.bin: shard format version 7"):
        TokenStream("memory://packed", "train", vocab_size=32000)


def test_a_changed_remote_file_is_not_read_from_the_cache(tmp_path):
    fsspec = pytest.importorskip("fsspec")
    fs = fsspec.filesystem("memory")
    for first in (3, 4):
        fs.pipe_file("/changing/train_0000000000.bin", shard_bytes(tokens=(first, 6, 7)))
        with pytest.warns(UserWarning):
            stream = TokenStream(
                "memory://changing", "train", vocab_size=100, cache_dir=tmp_path / "cache", cache_bytes=10**6
            )
        assert stream.read(np.array([0]), 1, fill=0)[0, 0] == first


def test_s3(tmp_path, monkeypatch):
    pytest.importorskip("s3fs")
    server_module = pytest.importorskip("moto.server")
    import s3fs

    server = server_module.ThreadedMotoServer(port=0)
    server.start()
    try:
        host, port = server.get_host_and_port()
        for key, value in (
            ("AWS_ENDPOINT_URL", f"http://{host}:{port}"),
            ("AWS_ACCESS_KEY_ID", "test"),
            ("AWS_SECRET_ACCESS_KEY", "test"),
        ):
            monkeypatch.setenv(key, value)
        tokens = np.random.default_rng(0).integers(0, 32000, 10_000)
        write_source(tmp_path / "here", "train", tokens, [700])
        fs = s3fs.S3FileSystem()
        fs.mkdir("bucket")
        fs.put(str(tmp_path / "here") + "/", "bucket/packed/", recursive=True)
        check_remote("s3://bucket/packed", tokens, tmp_path / "cache")
        # and from worker processes, after this process has used its own connection
        local, remote = (
            PackedDataset(directory, {"train": 1}, 64, seed=1, vocab_size=32000)
            for directory in (tmp_path / "here", "s3://bucket/packed")
        )
        batches = list(itertools.islice(PackedLoader(remote, 4, num_workers=2), 6))
        assert torch.equal(torch.cat(batches), local.tokens(range(24)))
    finally:
        server.stop()
