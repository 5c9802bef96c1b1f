"""Documents come out whole and in order however a file is cut into units, and nothing unreadable is passed over."""

import gzip
import json
import random

import pytest
import zstandard

from lit_gpt import text_sources
from lit_gpt.text_sources import ANY_TEXT, Fields, Filter, Unit, find_files, open_source


def write(path, content: bytes):
    if path.suffix == ".zst":
        half = len(content) // 2  # two frames, as parallel compressors write them
        content = b"".join(zstandard.compress(part) for part in (content[:half], content[half:]))
    elif path.suffix == ".gz":
        content = gzip.compress(content)
    path.write_bytes(content)
    return path


def read_all(path, fields=Fields(), order=None) -> list[Unit]:  # noqa: B008
    """All units; `order` "fresh" opens the file anew for each, "skip" reads every other unit before its turn."""
    units, source = [], open_source(path)
    while not units or not units[-1].last:
        if order == "fresh":
            source = open_source(path)
        elif order == "skip":
            open_source(path).read(len(units), fields)
            source.read(len(units) + 1, fields)
        units.append(source.read(len(units), fields))
    return units


@pytest.fixture
def small_units(monkeypatch):
    monkeypatch.setattr(text_sources, "UNIT", 1000)
    monkeypatch.setattr(text_sources, "READ", 64)


def documents(seed: int = 0) -> list[str]:
    r = random.Random(seed)
    return ["".join(r.choices('ab\n\t é你😀\\"', k=r.choice([0, 1, 10, 300, 2500]))) for _ in range(60)]


@pytest.mark.parametrize("order", ["onwards", "fresh", "skip"])
@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.jsonl.zst", "a.jsonl.gz", "a.json.gz", "A.JSONL.ZST", "a.parquet", "a.arrow"]
)
def test_units_together_are_the_file(tmp_path, small_units, name, order):
    texts = documents()
    path = tmp_path / name
    if name.endswith(("parquet", "arrow")):
        import pyarrow
        import pyarrow.parquet

        table = pyarrow.table({"text": texts, "other": range(len(texts))})
        if name.endswith("parquet"):
            pyarrow.parquet.write_table(table, path, row_group_size=7)
        else:
            with pyarrow.ipc.new_stream(str(path), table.schema) as writer:
                writer.write_table(table, 13)
    else:
        lines = [json.dumps({"n": n, "text": t}, ensure_ascii=n % 2 == 0) for n, t in enumerate(texts)]
        lines.insert(3, "  ")
        (tmp_path / "raw").write_text("\n".join(lines))
        write(path.with_suffix(path.suffix.lower()), (tmp_path / "raw").read_bytes()).rename(path)
    units = read_all(path, order=order)
    assert [t for unit in units for t in unit.texts] == texts
    assert len(units) > 5 and not any(unit.bad for unit in units)
    assert sum(unit.rows for unit in units) == len(texts) + (not name.endswith(("parquet", "arrow")))
    assert units[-1].progress == 1.0
    beyond = open_source(path).read(len(units) + 3, Fields())
    assert beyond.last and not beyond.texts and not beyond.bad


def test_filters_subsets_and_nested_keys(tmp_path):
    rows = [{"content": f"t{n}", "meta": {"set": "code" if n % 3 == 0 else "prose", "n": n % 2}} for n in range(9)]
    path = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows)).encode())
    fields = Fields("content", (Filter.parse("meta.set!=code"), Filter.parse("meta.n=1")), subset="meta.set")
    (unit,) = read_all(path, fields)
    assert unit.texts == ["t1", "t5", "t7"] and unit.subsets == ["prose"] * 3
    assert unit.dropped == {"meta.set=code": 3, "meta.n!=1": 3}

    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    (from_parquet,) = read_all(tmp_path / "a.parquet", fields)
    assert (from_parquet.texts, from_parquet.subsets, from_parquet.dropped) == (unit.texts, unit.subsets, unit.dropped)
    with pytest.raises(ValueError, match="write key=value"):
        Filter.parse("meta.set")


BAD_LINES = {
    b'{"text": "cut': "truncated|Unterminated",
    b'{"txt": "a", "n": 1}': "no field 'text'; there are 'txt', 'n' (name the text",
    b"{}": "there are none",
    b'{"meta": 1, "\\ud800\\n": "a"}': "lone surrogate",
    b'{"text": 7}': "Expected `str`, got `int`",
    b'{"text": null}': "Expected `str`, got `null`",
    b'["text"]': "Expected `object`, got `array`",
    b'{"text": "\xff"}': "utf-8",
    b'{"text": "\\ud800"}': "lone surrogate",
    b'{"text": "a\x00b"}': "control character",
    b'{"text": "a"} {"text": "b"}': "Extra data",
    b"\x00" * 50: "Expecting value",
    b"[" * 100_000: "recursion",
    b'{"text": "a", "n": ' + b"1" * 5000 + b"x}": "digits|delimiter",
}


@pytest.mark.parametrize("line", BAD_LINES, ids=range(len(BAD_LINES)))
def test_a_bad_line_is_named_and_the_others_are_read(tmp_path, line):
    path = write(tmp_path / "a.jsonl.zst", b'{"text": "one"}\n\n' + line + b'\n{"text": "two", "x": NaN}\n')
    (unit,) = read_all(path)
    assert unit.texts == ["one", "two"] and unit.rows == 4
    ((row, why),) = unit.bad
    assert row == 2
    assert any(part in why for part in BAD_LINES[line].split("|")), why


def test_a_missing_field_of_metadata_is_not_taken_for_the_text(tmp_path):
    path = write(tmp_path / "a.jsonl", b'{"text": "a", "' + b"k" * 300 + b'": 1}\n{"text": "a", "meta": {"x": 1}}')
    (unit,) = read_all(path, Fields("text", (Filter.parse("meta.set=a"),)))
    assert unit.bad[0] == (0, "no field 'meta.set'; there are 'text', ...")
    assert "missing required field `set`" in unit.bad[1][1]
    path.write_bytes(b'{"meta": 1, "\\ud800\\n": 1}')
    (unit,) = read_all(path, Fields("text", (Filter.parse("meta.set=a"),)))
    assert r"there are 'meta', '\ud800\n' (" in unit.bad[0][1]


def test_a_byte_order_mark_and_windows_line_ends_are_no_error(tmp_path):
    path = write(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"text": "one"}\r\n{"text": "t\\u0000wo"}\r\n')
    (unit,) = read_all(path)
    assert unit.texts == ["one", "t\0wo"] and not unit.bad


@pytest.mark.parametrize("suffix", [".zst", ".gz"])
def test_damaged_compression_is_named_after_what_is_whole(tmp_path, small_units, suffix):
    lines = [json.dumps({"text": f"{n} " + "".join(random.Random(n).choices("abcdef", k=200))}) for n in range(100)]
    whole = write(tmp_path / f"a.jsonl{suffix}", "\n".join(lines).encode()).read_bytes()
    texts = [json.loads(line)["text"] for line in lines]
    cut = tmp_path / f"cut.jsonl{suffix}"
    cut.write_bytes(whole[: len(whole) * 2 // 3])
    units = read_all(cut)
    got = [t for unit in units for t in unit.texts]
    assert 0 < len(got) < 100 and got == texts[: len(got)]
    assert units[-1].bad == [(None, f"the {suffix} data end too early: the file was cut short")]
    (tmp_path / f"no.jsonl{suffix}").write_bytes(b"this is not compressed at all, and long enough to see it")
    assert "damaged" in read_all(tmp_path / f"no.jsonl{suffix}")[0].bad[0][1]


def test_empty_gone_and_unknown_files(tmp_path):
    for name in ("a.jsonl", "a.jsonl.zst", "a.txt"):
        (tmp_path / name).write_bytes(b"")
        assert read_all(tmp_path / name)[0].bad == [(None, "the file is empty")]
        assert read_all(tmp_path / f"gone{name}")[0].bad == [(None, "No such file or directory")]
    (tmp_path / "a.parquet").write_bytes(b"PAR1 but no more")
    assert read_all(tmp_path / "a.parquet")[0].bad[0][0] is None
    with pytest.raises(ValueError, match="a.csv: this kind of file is not known"):
        open_source(tmp_path / "a.csv")


def test_parquet_without_the_column_or_with_other_types(tmp_path):
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"content": ["a", None, "b"], "n": [1, 2, 3]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    (unit,) = read_all(tmp_path / "a.parquet")
    ((row, why),) = unit.bad
    assert row is None and why.startswith("no field 'text'; there are 'content', 'n' (name the text")
    (unit,) = read_all(tmp_path / "a.parquet", Fields("content"))
    assert unit.texts == ["a", "b"] and unit.bad == [(1, "'content' is of type NoneType, not text")]
    (unit,) = read_all(tmp_path / "a.parquet", Fields("n"))
    assert len(unit.bad) == 3 and "not text" in unit.bad[0][1]
    invalid = pyarrow.array([b"ok", b"\xff"], pyarrow.binary()).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": invalid}), tmp_path / "b.parquet")
    (unit,) = read_all(tmp_path / "b.parquet")
    assert unit.texts == ["ok"] and unit.bad[0][0] == 1 and "utf-8" in unit.bad[0][1]


def test_plain_text_is_one_document(tmp_path):
    (tmp_path / "a.txt").write_text("two\n\nlines é")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"packed"))
    assert [read_all(tmp_path / name)[0].texts for name in ("a.txt", "b.txt.gz")] == [["two\n\nlines é"], ["packed"]]
    (tmp_path / "c.txt").write_bytes(b"\xff\xfe")
    assert "utf-8" in read_all(tmp_path / "c.txt")[0].bad[0][1]
    (unit,) = read_all(tmp_path / "a.txt", Fields("text", (Filter.parse("lang=en"),)))
    assert "no metadata lang" in unit.bad[0][1]


def test_a_document_that_is_too_long_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(text_sources, "MAX_DOCUMENT", 10_000)
    monkeypatch.setattr(text_sources, "READ", 1000)
    monkeypatch.setattr(text_sources, "UNIT", 2000)
    long = json.dumps({"text": "x" * 50_000})
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n' + long + "\n")
    units = read_all(tmp_path / "a.jsonl")
    assert units[0].texts == ["one"] and units[-1].bad == [(None, "a line of more than 10,000 bytes")]
    (tmp_path / "a.txt").write_text("x" * 50_000)
    assert "more than 10,000 bytes" in read_all(tmp_path / "a.txt")[0].bad[0][1]


def test_files_are_found_sorted_and_their_absence_is_named(tmp_path):
    for name in ("b/2.jsonl", "a/1.parquet", "c.txt", "notes.md", "state.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    assert [p.relative_to(tmp_path).as_posix() for p in find_files(tmp_path, ANY_TEXT)] == [
        "a/1.parquet",
        "b/2.jsonl",
        "c.txt",
    ]
    assert find_files(tmp_path / "c.txt", ANY_TEXT) == [tmp_path / "c.txt"]
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "link").symlink_to(tmp_path / "b")
    (tmp_path / "b" / "loop").symlink_to(tmp_path / "elsewhere")
    assert find_files(tmp_path / "elsewhere", ["**/*.jsonl"]) == [tmp_path / "elsewhere" / "link" / "2.jsonl"]
    assert find_files(tmp_path, ["b/*.jsonl", "e*/*/*.jsonl"])[1:] == [tmp_path / "elsewhere" / "link" / "2.jsonl"]
    with pytest.raises(FileNotFoundError, match="gone: no such folder"):
        find_files(tmp_path / "gone", ANY_TEXT)
    with pytest.raises(FileNotFoundError, match=r"no file in it matches \*.zst"):
        find_files(tmp_path, ["*.zst"])
