"""Laws of recognizing and unpacking files: the same rows in every kind and packing, whatever marks and names the files have."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
from pathlib import Path
from typing import Any

import pytest

from data_tools.files import SourceFile, find_files
from data_tools.prepare import prepare
from data_tools.sources import SourceReader
from mpidp.config.command_line import read_toml
from mpidp.data import text_files
from mpidp.data.records import records
from mpidp.data.text_files import NotText, read_whole, recognize
from mpidp.data.unpack import MARK, open_bytes, reading
from mpidp.errors import DataError, UsageError
from mpidp.inference.choices import read_choices
from mpidp.inference.rows import read_prompts, read_text
from tests.unit.test_sources import read

ROWS = [{"text": "a\nb", "n": "1"}, {"text": "zwölf, \"drei\"", "n": "2"}, {"text": "c", "n": "3"}]
TEXTS = [row["text"] for row in ROWS]


def as_lines() -> bytes:
    return "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def as_table(separator: str) -> bytes:
    out = io.StringIO()
    writer = csv.writer(out, delimiter=separator)
    writer.writerows([["text", "n"], *(list(row.values()) for row in ROWS)])
    return out.getvalue().encode()


KINDS = {
    ".jsonl": as_lines(), ".ndjson": as_lines(), ".json": as_lines(), ".JSONL": as_lines(), ".jsonlines": as_lines(),
    " array.jsonl": json.dumps(ROWS, indent=1).encode(),
    " array.json": json.dumps(ROWS).encode(), " pretty.json": json.dumps(ROWS, indent=2).encode(),
    ".csv": as_table(","), ".tsv": as_table("\t"),
}


def packed(content: bytes, packing: str) -> bytes:
    if packing.lower() == ".zst":
        zstandard = pytest.importorskip("zstandard")
        return b"".join(zstandard.compress(content[i : i + 40]) for i in range(0, len(content), 40))
    return gzip.compress(content) if packing.lower() == ".gz" else content


@pytest.mark.parametrize("mark", [b"", MARK], ids=["plain", "mark"])
@pytest.mark.parametrize("packing", ["", ".gz", ".zst", ".GZ"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_in_every_packing_gives_the_same_rows(tmp_path: Path, kind: str, packing: str, mark: bytes) -> None:
    path = tmp_path / f"data{kind}{packing}"
    path.write_bytes(packed(mark + KINDS[kind], packing))
    assert read(path)[0] == TEXTS
    assert [row.fields for row in records(recognize(path))] == ROWS


@pytest.mark.parametrize("packing", ["", ".gz", ".zst"])
def test_marks_of_text_are_skipped(tmp_path: Path, packing: str) -> None:
    path = tmp_path / f"a.txt{packing}"
    path.write_bytes(packed(MARK + b"hello\n", packing))
    assert read(path)[0] == ["hello\n"] and read_whole(path) == "hello\n"


def test_a_packed_file_needs_no_suffix_and_a_suffix_needs_a_packed_file(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(gzip.compress(as_lines()))
    assert read(tmp_path / "a.jsonl")[0] == TEXTS
    (tmp_path / "b.jsonl.gz").write_bytes(as_lines())
    with pytest.raises(DataError, match=r"b\.jsonl\.gz.*not gzip data"):
        read(tmp_path / "b.jsonl.gz")


REFUSED = {
    "zip": (b"PK\x03\x04" + bytes(20), "zip archive"), "bzip2": (b"BZh91AY", "bunzip2"), "xz": (b"\xfd7zXZ\0", "unxz"),
    "lz4": (b"\x04\x22\x4d\x18aa", "unlz4"), "pdf": (b"%PDF-1.7\n", "PDF"), "nul": (b"abc\0", "looks binary"),
    "utf-16": ("hé\n".encode("utf-16"), "UTF-16"), "utf-16-be": (b"\xfe\xff" + "日本".encode("utf-16-be"), "UTF-16"),
    "utf-32": ("hello".encode("utf-32"), "UTF-32"), "tar": (b"x" * 257 + b"ustar\0" + bytes(300), "tar archive"),
    "empty": (b"", "is empty"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".json"])
def test_what_is_no_text_is_named(tmp_path: Path, name: str, suffix: str) -> None:
    content, words = REFUSED[name]
    if name == "nul" and suffix != ".txt":
        return
    path = tmp_path / f"a{suffix}"
    path.write_bytes(content)
    with pytest.raises(NotText, match=words):
        recognize(path)
    with pytest.raises(DataError, match=words):
        read(path, alone=True)
    with pytest.raises(DataError, match=words):
        read_whole(path)


def test_a_pipe_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    for path in (tmp_path / "pipe.jsonl", Path("/dev/zero")):
        with pytest.raises(NotText, match="not a regular file"):
            recognize(path)
        with pytest.raises(DataError, match="not a regular file"):
            read_whole(path)


DOUBTFUL = {
    "one.json": b'{\n  "name": "x"\n}\n', "config.json": b'{"name": "x"}', "numbers.json": b"[1, 2]", "t.csv": b"a,b\n1,2\n",
    "rows.txt": as_lines(), "other.json": b'[{"name": "x"}]', "cut.json": b'{"text": "x"}\nno object\n',
}


@pytest.mark.parametrize("name", DOUBTFUL)
def test_json_and_tables_that_hold_no_rows_are_text_and_counted(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(DOUBTFUL[name])
    found, counts = read(tmp_path / name)
    assert found == [DOUBTFUL[name].decode()] and counts.doubtful == 1
    assert name in "".join(counts.complaints())
    if name.endswith(".txt"):
        assert read(tmp_path / name, alone=True)[0] == found
    else:
        with pytest.raises(DataError, match=f"{name} is .*--text-key"):
            read(tmp_path / name, alone=True)


def test_a_damaged_array_is_malformed(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(json.dumps(ROWS, indent=1).encode()[:-30])
    found, counts = read(tmp_path / "a.json")
    assert found == [] and counts.malformed == 1 and "begins as a JSON array" in counts.no_text()


def test_bytes_of_an_array_that_are_not_utf8_concern_their_row_only(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b'[{"text": "ra\xffw"}, {"text": "good"}, {"text": "\xef\xbf\xbd"}]')
    found, counts = read(tmp_path / "a.json")
    assert found == ["ra\ufffdw", "good", "\ufffd"] and counts.bad_utf8 == 1
    assert read(tmp_path / "a.json", bad_utf8="skip")[0] == ["good", "\ufffd"]


def test_a_list_per_line_is_malformed_and_no_array(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('[{"role": "user"}]\n' * 3)
    found, counts = read(tmp_path / "a.jsonl")
    assert found == [] and counts.malformed == 3 and "not an object but a list" in counts.no_text()


@pytest.mark.parametrize("depth", [100, 300, 500, 700, 900, 950, 5000])
def test_deep_nesting_is_malformed_at_most(tmp_path: Path, depth: int) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x", "deep": ' + "[" * depth + "]" * depth + '}\n{"text": "y"}\n')
    found, counts = read(tmp_path / "a.jsonl")
    assert found[-1] == "y" and len(found) + counts.malformed == 2


def arrow(path: Path, stream: bool = True, **columns: object) -> Path:
    import pyarrow
    import pyarrow.ipc

    table = pyarrow.table(columns)
    with (pyarrow.ipc.new_stream if stream else pyarrow.ipc.new_file)(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=100)
    return path


@pytest.mark.parametrize("stream", [True, False])
def test_rows_of_arrow_files(tmp_path: Path, stream: bool) -> None:
    """Both kinds, with more rows than are read at once; a row without text is malformed."""
    texts = [f"text {i}" if i % 50 else None for i in range(1, 250)]
    found, counts = read(arrow(tmp_path / "a.arrow", stream, text=texts, other=list(range(249))))
    assert found == [text for text in texts if text] and counts.malformed == 4


def test_arrow_files_without_text_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no column `text`, only input_ids. .*use mpidp convert --from hf"):
        read(arrow(tmp_path / "a.arrow", input_ids=[[1]]), alone=True)
    (tmp_path / "b.arrow").write_bytes(b"\xff\xff\xff\xff\0\0")
    with pytest.raises(DataError, match="is not a readable arrow file"):
        read(tmp_path / "b.arrow", alone=True)


def test_files_of_several_splits_are_named(tmp_path: Path) -> None:
    for name in ("train-0.jsonl", "test-0.jsonl"):
        (tmp_path / name).write_text('{"text": "a"}\n')
    (tmp_path / "test_of_a_program.py").write_text("a")
    _, _, remarks = find_files(str(tmp_path), tmp_path / "out")
    assert len(remarks) == 1 and remarks[0].startswith("files of several splits were read together, for example test-0.jsonl")
    (tmp_path / "train-0.jsonl").unlink()
    assert find_files(str(tmp_path), tmp_path / "out")[2] == []


def test_a_folder_of_save_to_disk(tmp_path: Path) -> None:
    """The Arrow files that state.json names are read, no others, and no file that describes the dataset."""
    for name in ("data-0.arrow", "data-1.arrow", "cache-1.arrow"):
        arrow(tmp_path / name, text=[name])
    (tmp_path / "dataset_info.json").write_text("{}")
    state = {"_data_files": [{"filename": "data-0.arrow"}, {"filename": "data-1.arrow"}]}
    (tmp_path / "state.json").write_text(json.dumps(state))
    assert [f.name for f in find_files(str(tmp_path), tmp_path / "out")[0]] == ["data-0.arrow", "data-1.arrow"]
    (tmp_path / "state.json").write_text(json.dumps(state | {"_indices_data_files": [{"filename": "indices.arrow"}]}))
    with pytest.raises(DataError, match="saved this folder with a table of indices"):
        find_files(str(tmp_path), tmp_path / "out")
    (tmp_path / "state.json").write_text(json.dumps(state))
    (tmp_path / "data-1.arrow").unlink()
    with pytest.raises(DataError, match="data-1.arrow is missing, but state.json lists it"):
        find_files(str(tmp_path), tmp_path / "out")
    (tmp_path / "state.json").write_text("{}")
    with pytest.raises(DataError, match="does not list the files of a dataset"):
        find_files(str(tmp_path), tmp_path / "out")


def test_plain_text_is_not_doubted(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text('{"text": "a dict"}\nx = 1\n')
    assert read(tmp_path / "a.py")[1].doubtful == 0


@pytest.mark.parametrize("packing", ["", ".gz", ".zst"])
def test_lines_that_are_too_long_are_malformed(tmp_path: Path, packing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mpidp.data.unpack.MAX_ROW_BYTES", 1000)
    long = json.dumps({"text": "x" * 5000}) + "\n"
    path = tmp_path / f"a.jsonl{packing}"
    path.write_bytes(packed(as_lines() + long.encode() + as_lines() + long.encode()[:-1], packing))
    found, counts = read(path)
    assert found == TEXTS * 2 and counts.malformed == 2
    assert "a.jsonl" in counts.problems["malformed"][0] and ":4: longer than" in counts.problems["malformed"][0]


def test_limits_of_whole_files(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("x" * 100)
    assert read_whole(tmp_path / "a", 100) == "x" * 100
    with pytest.raises(DataError, match="more than 99 bytes"):
        read_whole(tmp_path / "a", 99)


@pytest.mark.parametrize("window", [27, 28, 31])
def test_zstandard_with_a_long_window(tmp_path: Path, window: int) -> None:
    zstandard = pytest.importorskip("zstandard")
    parameters = zstandard.ZstdCompressionParameters(window_log=window, write_checksum=True)
    writer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    (tmp_path / "a.jsonl.zst").write_bytes(writer.compress(as_lines()) + writer.flush())
    assert read(tmp_path / "a.jsonl.zst")[0] == TEXTS


def test_zstandard_frames_are_read_block_by_block(tmp_path: Path) -> None:
    """Frames of all kinds in one file, a skippable one first; a cut anywhere is noticed."""
    zstandard = pytest.importorskip("zstandard")
    content = os.urandom(300_000) + b"a" * 1_000_000 + b"xyz" * 1000
    skipped = b"\x5a\x2a\x4d\x18\x03\0\0\0abc"
    frames = [skipped, zstandard.compress(content), zstandard.compress(b""), zstandard.compress(b"end")]
    (tmp_path / "a.zst").write_bytes(b"".join(frames))
    with open_bytes(tmp_path / "a.zst") as stream:
        assert stream.read() == content + b"end"
    whole, ends = b"".join(frames), {len(b"".join(frames[:i])) for i in range(5)}
    for cut in {12, 15, 19, 30, len(whole) // 2, len(whole) - 1, len(whole) - 4} - ends:
        (tmp_path / "a.zst").write_bytes(whole[:cut])
        with pytest.raises(DataError, match="too early"), reading(tmp_path / "a.zst"), open_bytes(tmp_path / "a.zst") as stream:
            stream.read()
    bomb = zstandard.ZstdCompressor().compress(bytes(2**28))
    (tmp_path / "a.zst").write_bytes(bomb)
    with open_bytes(tmp_path / "a.zst") as stream:
        pieces = [len(piece) for piece in stream.raw._pieces]  # type: ignore[attr-defined]
    assert sum(pieces) == 2**28 and max(pieces) <= 2**17


def parquet(path: Path, columns: dict[str, Any]) -> Path:
    pyarrow, library = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    library.write_table(pyarrow.table(columns), path)
    return path


def test_parquet_columns_of_bytes_and_text_that_is_not_utf8(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    bad = pyarrow.array([b"fine", b"a\xffb"], pyarrow.binary())
    strings = pyarrow.Array.from_buffers(pyarrow.string(), 2, bad.buffers())
    for name, column in (("binary", bad), ("string", strings), ("dictionary", bad.dictionary_encode())):
        path = parquet(tmp_path / f"{name}.parquet", {"text": column})
        found, counts = read(path)
        assert found == ["fine", "a\ufffdb"] and counts.bad_utf8 == 1, name
        assert read(path, bad_utf8="skip")[0] == ["fine"]


def test_parquet_rows_with_lists_of_objects(tmp_path: Path) -> None:
    messages = [[{"role": "user", "content": "hé"}], []]
    path = parquet(tmp_path / "chat.parquet", {"messages": messages, "n": [1, None]})
    assert [row.fields for row in records(recognize(path))] == [
        {"messages": messages[0], "n": 1}, {"messages": [], "n": None}]
    (tmp_path / "other name").write_bytes(path.read_bytes())
    assert recognize(tmp_path / "other name").kind == "parquet"


def test_parquet_objects_have_the_keys_that_they_had(tmp_path: Path) -> None:
    """Arrow gives all objects of a column the same keys, with null for those that an object did not have."""
    tools = [[{"name": "f", "properties": {"city": {"type": "string"}}}], [{"name": "g", "properties": {"unit": {"type": "a"}}}]]
    messages = [[{"role": "user", "content": "q"}], [{"role": "assistant", "calls": [{"x": 0}, {"y": ""}]}]]
    path = parquet(tmp_path / "chat.parquet", {"messages": messages, "tools": tools})
    assert [row.fields for row in records(recognize(path))] == [
        {"messages": one, "tools": other} for one, other in zip(messages, tools, strict=True)]


def test_parquet_with_a_column_that_is_no_text(tmp_path: Path) -> None:
    found, counts = read(parquet(tmp_path / "a.parquet", {"text": [["a"], ["b"]]}))
    assert found == [] and counts.malformed == 2 and "`text` is a list, not a string" in counts.complaints()[0]


def test_fields_that_are_there_are_named_and_another_can_be_chosen(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"content": "x", "id": 1}\n' * 3)
    found, counts = read(path)
    assert found == [] and "its fields are: content, id (--text-key" in counts.no_text()
    assert read(path, text_key="content")[0] == ["x"] * 3
    for tokenizer in ("byte", "char"):
        with pytest.raises(DataError, match=r"no text at all(.|\n)*a\.jsonl:1.*: no field `text`; its fields are: content, id"):
            prepare(str(path), tokenizer, tmp_path / "out")
    prepare(str(path), "char", tmp_path / "out", val_fraction=0, text_key="content")


def test_a_source_of_a_mixture_without_rows_says_why(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("hello")
    (tmp_path / "b.jsonl").write_text('{"content": "x\\u001b[31m", "\\u001b[31mred": 1}\n')
    with pytest.raises(DataError, match=r"b\.jsonl has no document(.|\n)*its fields are: content, .x1b\[31mred"):
        prepare([f"{tmp_path}/a.txt:1", f"{tmp_path}/b.jsonl:1"], "byte", tmp_path / "out", 1, 0.0)


def test_a_table_that_is_not_valid_is_named_with_the_line_before(tmp_path: Path) -> None:
    """A program wrote a field with quotation marks inside, without doubling them."""
    (tmp_path / "a.csv").write_text('name,text\na,"fine"\nb,"x "y" z"\n')
    with pytest.raises(DataError, match=r"a\.csv: the table is not valid after line 2 \("):
        prepare(str(tmp_path / "a.csv"), "byte", tmp_path / "out", 1, 0.0)


def test_linked_folders_are_read_once(tmp_path: Path) -> None:
    source, real = tmp_path / "c", tmp_path / "real"
    for folder in (source / "own", real / "deep"):
        folder.mkdir(parents=True)
    (source / "a.txt").write_text("a")
    (source / "own/o.txt").write_text("o")
    (real / "deep/b.txt").write_text("b")
    (source / "books").symlink_to("../real")
    (source / "zagain").symlink_to(real)
    (source / "before").symlink_to("own")
    (source / "loop").symlink_to(".")
    (source / "up").symlink_to("..")
    (real / "back").symlink_to(source)
    (source / "linked.txt").symlink_to(real / "deep/b.txt")
    files, about, remarks = find_files(str(source), tmp_path / "out")
    assert [f.name for f in files] == ["a.txt", "books/deep/b.txt", "own/o.txt"] and about["files"] == 3
    assert "links point outside" in remarks[0] and str(real) in remarks[0] and "own" not in remarks[0]


def test_linked_files_are_read_once(tmp_path: Path) -> None:
    """As in a cache of downloads: the files are links to blobs. Copies of a text that are no links are all read."""
    source, blobs = tmp_path / "source", tmp_path / "blobs"
    source.mkdir()
    blobs.mkdir()
    (blobs / "1").write_text("one")
    for name in ("a.txt", "b.txt"):
        (source / name).symlink_to(blobs / "1")
        (source / f"copy_{name}").write_text("one")
    (source / "z.txt").symlink_to("copy_a.txt")
    files, about, _ = find_files(str(source), tmp_path / "out")
    assert [f.name for f in files] == ["a.txt", "copy_a.txt", "copy_b.txt"] and about["files"] == 3


def test_a_source_with_nothing_but_a_linked_folder(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real/b.txt").write_text("b")
    (tmp_path / "c").mkdir()
    (tmp_path / "c/books").symlink_to(tmp_path / "real")
    assert [f.name for f in find_files(str(tmp_path / "c"), tmp_path)[0]] == ["books/b.txt"]


@pytest.mark.parametrize("names", [
    ["dataset_dict.json"], ["token_ids_part_0000.npy"], ["index.json", "shard.00000.mds"],
    ["index.json", "shard.00000.mds.zstd"], ["index.json", "chunk-0-0.bin"], ["0.ds", "0.ds.metadata"], ["a.bin", "a.idx"],
])
def test_datasets_that_are_no_text_are_refused(tmp_path: Path, names: list[str]) -> None:
    (tmp_path / "d/train").mkdir(parents=True)
    for name in names:
        (tmp_path / "d/train" / name).write_text("{}")
    with pytest.raises(DataError, match="which prepare does not read. (Give the folder|If its samples|Use mpidp convert --from)"):
        find_files(str(tmp_path / "d"), tmp_path)


def test_each_source_of_a_mixture_has_its_own_rules(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "a.jsonl").write_text('{"text": "hello there"}\n' * 5)
    (tmp_path / "d/x.txt").write_text("some text")
    (tmp_path / "d/empty.txt").touch()
    (tmp_path / "d/bin.dat").write_bytes(b"\0")
    for tokenizer in ("byte", "char", "bpe:260"):
        index = prepare([f"{tmp_path}/a.jsonl:0.5", f"{tmp_path}/d:0.5"], tokenizer, tmp_path / tokenizer[:3], 1, 0.0)
        assert (index.source["empty"], index.source["binary"]) == (1, 1)


def test_the_probe_of_a_long_first_line(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"text": "x" * 3 * text_files.PROBE_BYTES}) + '\n{"text": "y"}\n')
    reader = SourceReader()
    assert len([p for p in reader.pieces(SourceFile(path.name, str(path), 1)) if p is None]) == 2


PROMPTS = [{"prompt": "a\nb", "id": "1"}, {"prompt": "zwölf", "id": "2"}]


@pytest.mark.parametrize("mark", [b"", MARK], ids=["plain", "mark"])
@pytest.mark.parametrize("name", ["p.jsonl", "p.JSONL", "p.ndjson", "p.json", "array.json", "p.csv", "p.json.gz", "p.jsonl.zst"])
def test_prompts_of_every_kind(tmp_path: Path, name: str, mark: bytes) -> None:
    content = "".join(json.dumps(row) + "\n" for row in PROMPTS).encode()
    if "array" in name:
        content = json.dumps(PROMPTS, indent=1).encode()
    if ".csv" in name:
        content = 'prompt,id\r\n"a\nb",1\r\nzwölf,2\r\n'.encode()
    (tmp_path / name).write_bytes(packed(mark + content, Path(name).suffix))
    assert read_prompts(tmp_path / name) == PROMPTS


@pytest.mark.parametrize("content", [b'["a", "b"]', b'{\n "prompt": "a"\n}', b"plain\n"])
def test_prompts_named_json_that_hold_no_rows_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "p.json").write_bytes(content)
    with pytest.raises(DataError, match="Each line must be an object like"):
        read_prompts(tmp_path / "p.json")


def test_fields_with_the_name_of_an_output_are_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "a", "text": "mine", "prompt_text": 1, "n": 2}\n{"prompt": "b", "tokens": 3}\n')
    assert read_prompts(tmp_path / "p.jsonl") == [
        {"prompt": "a", "prompt_prompt_text": "mine", "prompt_text": 1, "n": 2}, {"prompt": "b", "prompt_tokens": 3}]
    assert "prompt_prompt_text (was text)" in capsys.readouterr().err


def test_questions_and_texts_with_marks_and_packed(tmp_path: Path) -> None:
    question = {"context": "2+2=", "choices": ["4", "5"], "label": 0}
    (tmp_path / "q.json.gz").write_bytes(gzip.compress(MARK + json.dumps([question, question]).encode()))
    assert [one.label for one in read_choices(tmp_path / "q.json.gz")] == [0, 0]
    (tmp_path / "bad.json").write_text(json.dumps([question, {"context": "x"}]))
    with pytest.raises(DataError, match=r"bad\.json, item 2: "):
        read_choices(tmp_path / "bad.json")
    (tmp_path / "t.txt.gz").write_bytes(gzip.compress(MARK + b"hello"))
    assert read_text(tmp_path / "t.txt.gz") == "hello"
    (tmp_path / "t.jsonl").write_bytes(as_lines())
    with pytest.raises(DataError, match="holds rows, but one text is needed"):
        read_text(tmp_path / "t.jsonl")


def test_settings_with_a_mark(tmp_path: Path) -> None:
    content = b"[train]\r\nsteps = 3\r\n"
    (tmp_path / "a.toml").write_bytes(MARK + content)
    assert read_toml(tmp_path / "a.toml") == {"train.steps": 3}
    (tmp_path / "empty.toml").touch()
    assert read_toml(tmp_path / "empty.toml") == {}
    (tmp_path / "b.toml").write_bytes(content.decode().encode("utf-16"))
    with pytest.raises(UsageError, match="UTF-16"):
        read_toml(tmp_path / "b.toml")
    (tmp_path / "c.toml").write_text("a = " + "[" * 10_000)
    os.mkfifo(tmp_path / "d.toml")
    for name in ("c.toml", "d.toml", "absent.toml"):
        with pytest.raises(UsageError, match="cannot read this configuration file"):
            read_toml(tmp_path / name)
