"""Datasets of tokens that other libraries write are read with the same tokens, documents and masks, and they read what convert
writes."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_tools.formats import mds, row_files
from data_tools.from_tokens import FromOptions, from_tokens
from data_tools.prepare import prepare
from data_tools.to_tokens import to_tokens
from mpidp.data.shards import TokenStream
from mpidp.errors import DataError
from tests.programs.packages import needed
from tests.unit.small_tokenizers import byte_level
from tests.unit.test_convert import documents_of
from tests.unit.test_formats import rows, shards, with_masks  # noqa: F401 - fixtures

EOD = 256
DOCUMENTS = [[*range(i % 7, i % 11 + 8), EOD] for i in range(40)]


def take(name: str, source: Path, out: Path, **options: Any) -> list[str]:
    return from_tokens(name, source, out, FromOptions("byte", **{"shards": 2, "val_fraction": 0.0} | options))


def mask_of(out: Path, split: str = "train") -> list[bool]:
    stream = TokenStream(out, split)
    mask = stream.read_mask(0, stream.num_tokens)
    assert mask is not None
    return list(mask.tolist())


@pytest.fixture
def streaming(monkeypatch: pytest.MonkeyPatch) -> Any:
    """mosaicml-streaming. Its module for images needs torchvision, which has no build for every torch: an empty one is enough."""
    needed("transformers.feature_extraction_utils")  # before there is an empty torchvision
    for name, inside in (("torchvision", {}), ("torchvision.datasets", {"VisionDataset": object}), ("torchvision.transforms", {}),
                         ("torchvision.transforms.functional", {"to_tensor": None})):
        monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(**inside, __path__=[], __spec__=None))
    return needed("streaming", "mosaicml-streaming")


@pytest.mark.parametrize("column", ["bytes", "ndarray", "ndarray:int32", "ndarray:uint16"])
@pytest.mark.parametrize("compression", [None, "zstd", "zstd:9", "gz", "bz2"])
def test_mds(column: str, compression: str | None, streaming: Any, tmp_path: Path) -> None:
    dtype = np.dtype(column.partition(":")[2] or "int64")
    columns = {"id": "int", "tokens": column, "text": "str", "loss_mask": "ndarray:uint8"}
    with streaming.MDSWriter(out=str(tmp_path / "d"), columns=columns, compression=compression, size_limit=2000) as writer:
        for i, ids in enumerate(DOCUMENTS):
            array = np.array(ids, dtype)
            mask = np.arange(len(ids)) % 3 > 0
            tokens = array.tobytes() if column == "bytes" else array
            writer.write({"id": i, "tokens": tokens, "text": f"text {i}", "loss_mask": mask.astype("u1")})
    assert len(list((tmp_path / "d").glob("shard.*"))) > 1
    take("auto", tmp_path / "d", tmp_path / "out")
    assert documents_of(tmp_path / "out", "train") == DOCUMENTS
    assert mask_of(tmp_path / "out") == [i % 3 > 0 for ids in DOCUMENTS for i in range(len(ids))]


def test_mds_of_llm_foundry(streaming: Any, tmp_path: Path) -> None:
    """Rows of one length, cut from a stream; in folders named train and val. Unknown codecs and pickles are refused."""
    stream = [i for ids in DOCUMENTS for i in ids]
    for split, begin in (("train", 0), ("val", 64)):
        columns = {"tokens": "ndarray:int32:16"}
        with streaming.MDSWriter(out=str(tmp_path / "d" / split), columns=columns, compression="zstd") as writer:
            for at in range(begin, begin + 64, 16):
                writer.write({"tokens": np.array(stream[at : at + 16], np.int32)})
    take("mds", tmp_path / "d", tmp_path / "out")
    found = documents_of(tmp_path / "out", "train")
    assert [i for ids in found for i in ids] == stream[:64] and found[:3] == DOCUMENTS[:3]
    assert [i for ids in documents_of(tmp_path / "out", "val") for i in ids] == stream[64:128]
    for encoding, compression, value, why in (("pkl", None, [1, 2], "pickles, which are never read"),
                                              ("ndarray", "br", np.arange(3), "compressed with 'br', which mpidp cannot read"),
                                              ("ndarray", "snappy", np.arange(3), "compressed with 'snappy'")):
        place = tmp_path / f"{encoding}{compression}"
        with streaming.MDSWriter(out=str(place), columns={"tokens": encoding}, compression=compression) as writer:
            writer.write({"tokens": value})
        with pytest.raises(DataError, match=why):
            take("mds", place, tmp_path / "new")


def tensors(index: int) -> Any:
    return torch.tensor(DOCUMENTS[index], dtype=torch.int32)


def dicts(index: int) -> Any:
    ids = torch.tensor(DOCUMENTS[index])
    return {"text": f"text {index}", "input_ids": ids, "labels": torch.where(ids % 3 > 0, ids, -100)}


def arrays(index: int) -> Any:
    return {"tokens": np.array(DOCUMENTS[index], np.uint16), "number": index}


def lists(index: int) -> Any:
    return {"input_ids": DOCUMENTS[index], "text": f"text {index}"}


def objects(index: int) -> Any:
    return {"tokens": {"a": {1, 2}, "b": complex(index)}}


@pytest.fixture
def litdata() -> Any:
    return needed("litdata")


def write_litdata(litdata: Any, make: Any, out: Path, **options: Any) -> None:
    """Write DOCUMENTS in one process, with the writer that litdata.optimize uses."""
    from litdata.streaming.writer import BinaryWriter

    writer = BinaryWriter(str(out), **{"chunk_bytes": 1000} | options)
    for i in range(len(DOCUMENTS)):
        writer[i] = make(i)
    writer.done()
    writer.merge()


def test_litdata_of_the_tokens_loader(litdata: Any, tmp_path: Path) -> None:
    write_litdata(litdata, tensors, tmp_path / "d", item_loader=litdata.TokensLoader())
    assert len(list((tmp_path / "d").glob("chunk-*.bin"))) > 1
    take("auto", tmp_path / "d", tmp_path / "out")
    assert documents_of(tmp_path / "out", "train") == DOCUMENTS


@pytest.mark.parametrize("make", [tensors, dicts, arrays, lists])
@pytest.mark.parametrize("compression", [{}, {"compression": "zstd"}, {"compression": "zstd", "compression_level": "chunk"},
                                         {"compression": "zstd:7", "compression_level": "sample"}])
def test_litdata(make: Any, compression: dict[str, str], litdata: Any, tmp_path: Path) -> None:
    write_litdata(litdata, make, tmp_path / "d", **compression)
    take("auto", tmp_path / "d", tmp_path / "out")
    assert documents_of(tmp_path / "out", "train") == DOCUMENTS
    if make is dicts:
        assert mask_of(tmp_path / "out") == [i % 3 > 0 for ids in DOCUMENTS for i in ids]


def test_litdata_pickles_are_refused(litdata: Any, tmp_path: Path) -> None:
    write_litdata(litdata, objects, tmp_path / "d")
    with pytest.raises(DataError, match="pickles, which are never read|no column of token ids|a sample is a"):
        take("litdata", tmp_path / "d", tmp_path / "new")


@pytest.mark.parametrize("file_bytes", [2**26, 900])
def test_litdata_reads_what_convert_writes(  # the TokensLoader leaves out the rest of each chunk
    file_bytes: int, litdata: Any, shards: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:
    from litdata.streaming.writer import BinaryWriter

    monkeypatch.setattr(row_files, "FILE_BYTES", file_bytes)
    to_tokens("litdata", shards, tmp_path / "it")
    for split in ("train", "val"):
        folder, stream = tmp_path / "it" / split, TokenStream(shards, split)
        chunks = json.loads((folder / "index.json").read_text())["chunks"]
        assert (len(chunks) > 1) == (file_bytes == 900 and split == "train")
        for size in (1, 7):
            found = litdata.StreamingDataset(str(folder), item_loader=litdata.TokensLoader(block_size=size), shuffle=False)
            ids = [i for at in range(len(found)) for i in found[at].tolist()]
            wanted, at = [], 0
            for chunk in chunks:
                wanted += stream.read(at, chunk["dim"] // size * size).tolist()
                at += chunk["dim"]
            assert ids == wanted and at == stream.num_tokens and str(found[0].dtype) == "torch.uint16"
    batch = next(iter(litdata.StreamingDataLoader(
        litdata.StreamingDataset(str(tmp_path / "it/train"), item_loader=litdata.TokensLoader(block_size=8)), batch_size=4)))
    assert batch.shape == (4, 8) and batch.long().max() <= EOD

    to_tokens("litdata", rows, tmp_path / "masked")
    found = litdata.StreamingDataset(str(tmp_path / "masked/train"), shuffle=False)
    got = [list(zip(found[at]["input_ids"].tolist(), (found[at]["labels"] != -100).tolist(), strict=True))
           for at in range(len(found))]
    assert got == with_masks(rows, "train")
    for at in range(len(found)):
        ids, labels = found[at]["input_ids"].long(), found[at]["labels"]
        assert ((labels == -100) | (labels == ids)).all()
    if file_bytes > 900:  # litdata begins a new chunk at other rows
        for name, loader, items in (("it", litdata.TokensLoader(), documents_of(shards, "train")), ("masked", None, got)):
            writer = BinaryWriter(str(tmp_path / f"{name}_theirs"), chunk_bytes=file_bytes, item_loader=loader)
            for at, ids in enumerate(items):
                writer[at] = torch.tensor(ids, dtype=torch.uint16) if loader else found[at]
            writer.done()
            writer.merge()
            ours, theirs = tmp_path / name / "train", tmp_path / f"{name}_theirs"
            assert (ours / "chunk-0-0.bin").read_bytes() == (theirs / "chunk-0-0.bin").read_bytes()
            one, other = (json.loads((folder / "index.json").read_text()) | {"updated_at": ""} for folder in (ours, theirs))
            assert one == other


@pytest.mark.parametrize("file_bytes", [2**26, 2000])
def test_streaming_reads_what_convert_writes(
    file_bytes: int, streaming: Any, shards: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:
    monkeypatch.setattr(row_files, "FILE_BYTES", file_bytes)
    monkeypatch.setattr(mds, "FILE_BYTES", file_bytes)
    for name, source in (("it", shards), ("masked", rows)):
        to_tokens("mds", source, tmp_path / name)
        ours, theirs = tmp_path / name / "train", tmp_path / f"{name}_theirs"
        found = streaming.StreamingDataset(local=str(ours), shuffle=False, batch_size=1)
        documents = [found[i] for i in range(found.num_samples)]
        assert all(one["tokens"].dtype == np.uint16 for one in documents)
        if name == "it":
            assert [one["tokens"].tolist() for one in documents] == documents_of(source, "train")
        else:
            assert [list(zip(one["tokens"].tolist(), (one["labels"] != -100).tolist(), strict=True))
                    for one in documents] == with_masks(source, "train")
        columns = {"tokens": "ndarray:uint16"} | ({"labels": "ndarray:int64"} if name == "masked" else {})
        with streaming.MDSWriter(out=str(theirs), columns=columns, size_limit=file_bytes) as writer:
            for one in documents:
                writer.write(one)
        names = {path.name for path in ours.iterdir()}
        assert names == {path.name for path in theirs.iterdir()} and (len(names) > 2) == (file_bytes == 2000)
        assert all((ours / one).read_bytes() == (theirs / one).read_bytes() for one in names)


def datatrove(tmp_path: Path, **options: Any) -> Path:
    """Tokenize documents with datatrove's pipeline; return the folder."""
    needed("datatrove")
    from datatrove.data import Document
    from datatrove.pipeline.tokens import DocumentTokenizer

    (tmp_path / "tokenizer.json").write_text(byte_level().to_json())
    step = DocumentTokenizer(str(tmp_path / "ds"), str(tmp_path / "tokenizer.json"), eos_token="<|endoftext|>", **options)
    for _ in step.run((Document(text=f"hello there fox {i} " * (i % 5 + 1), id=str(i)) for i in range(30)), 0, 1) or []:
        pass
    return tmp_path / "ds"


@pytest.mark.parametrize("options", [
    {"shuffle_documents": False}, {"seed": 1}, {"shuffle_documents": False, "save_loss_metadata": True}])
def test_datatrove(options: dict[str, Any], tmp_path: Path) -> None:
    source, tokenizer = datatrove(tmp_path, **options), byte_level()
    said = from_tokens("auto", source, tmp_path / "out", FromOptions(str(tmp_path / "tokenizer.json"), 2, 0.0))
    found = documents_of(tmp_path / "out", "train")
    wanted = [[*tokenizer.encode(f"hello there fox {i} " * (i % 5 + 1)), tokenizer.eod] for i in range(30)]
    assert (sorted(found) == sorted(wanted) if options.get("seed") else found == wanted) and len(said) == 1
    to_tokens("datatrove", tmp_path / "out", tmp_path / "there")
    ours, theirs = tmp_path / "there/train/00000_unshuffled.ds", next(source.glob("*.ds"))
    assert ours.read_bytes() == theirs.read_bytes()
    assert Path(f"{ours}.index").read_bytes() == Path(f"{theirs}.index").read_bytes()


def test_datatrove_reads_what_convert_writes(shards: Path, tmp_path: Path) -> None:  # noqa: F811
    needed("datatrove")
    from datatrove.utils.dataset import DatatroveFileDataset

    to_tokens("datatrove", shards, tmp_path / "it")
    stream = TokenStream(shards)
    found = DatatroveFileDataset(str(tmp_path / "it/train/00000_unshuffled.ds"), seq_len=15, token_size=2)
    wanted = stream.read(0, stream.num_tokens)
    assert all(found[i]["input_ids"].tolist() == wanted[16 * i : 16 * i + 16].tolist() for i in range(len(found)))


@pytest.mark.parametrize("kind", ["Dataset", "DatasetDict", "parquet"])
def test_hugging_face(kind: str, tmp_path: Path) -> None:
    datasets = needed("datasets")
    labels = [[i if i % 3 else -100 for i in ids] for ids in DOCUMENTS]
    ones = [[1] * len(ids) for ids in DOCUMENTS]
    made = datasets.Dataset.from_dict({"input_ids": DOCUMENTS, "labels": labels, "attention_mask": ones})
    if kind == "parquet":
        made.to_parquet(str(tmp_path / "train-00000-of-00001.parquet"))
        made.select(range(5)).to_parquet(str(tmp_path / "validation-00000-of-00001.parquet"))
        source = tmp_path
    else:
        source = tmp_path / "saved"
        if kind == "DatasetDict":
            made = datasets.DatasetDict(train=made, validation=made.select(range(5)), test=made.select(range(3)))
        made.save_to_disk(str(source), num_shards=3 if kind == "Dataset" else {"train": 3, "validation": 1, "test": 1})
    take("auto", source, tmp_path / "out")
    assert documents_of(tmp_path / "out", "train") == DOCUMENTS
    assert mask_of(tmp_path / "out") == [i % 3 > 0 for ids in DOCUMENTS for i in ids]
    assert kind == "Dataset" or documents_of(tmp_path / "out", "val") == DOCUMENTS[:5]


def test_datasets_reads_what_convert_writes(rows: Path, tmp_path: Path) -> None:  # noqa: F811
    datasets = needed("datasets")
    to_tokens("hf", rows, tmp_path / "it")
    found = datasets.load_dataset(str(tmp_path / "it"), cache_dir=str(tmp_path / "cache"))
    assert set(found) == {"train", "validation"} and found["train"].num_rows == TokenStream(rows).num_documents
    assert all(len(row["input_ids"]) == len(row["labels"]) for row in found["train"])
    assert str(found["train"].features["input_ids"].feature.dtype) == "int32"


def test_a_shuffled_dataset_is_read_in_its_order(tmp_path: Path) -> None:
    datasets = needed("datasets")
    made = datasets.Dataset.from_dict({"input_ids": DOCUMENTS}).shuffle(seed=3)
    made.save_to_disk(str(tmp_path / "d"))
    take("hf", tmp_path / "d", tmp_path / "out")
    assert documents_of(tmp_path / "out", "train") == made["input_ids"][:]


def test_prepare_reads_a_folder_of_save_to_disk(tmp_path: Path) -> None:
    datasets = needed("datasets")
    made = datasets.Dataset.from_dict({"text": [f"text {i} " * (i % 4 + 1) for i in range(30)], "other": list(range(30))})
    made.save_to_disk(str(tmp_path / "d"), num_shards=3)
    made.to_json(str(tmp_path / "rows.jsonl"))
    for name in ("d", "rows.jsonl"):
        prepare(str(tmp_path / name), "byte", tmp_path / f"of_{name}", val_fraction=0.0, verbose=False)
    assert documents_of(tmp_path / "of_d", "train") == documents_of(tmp_path / "of_rows.jsonl", "train")


def test_bin_files_of_nanogpt_and_llmc_are_read_by_their_own_means(shards: Path, tmp_path: Path) -> None:  # noqa: F811
    """Both programs map or read the ids as these lines do."""
    wanted = TokenStream(shards).read(0, TokenStream(shards).num_tokens)
    to_tokens("nanogpt", shards, tmp_path / "n")
    assert np.memmap(tmp_path / "n/train.bin", dtype=np.uint16, mode="r").tolist() == wanted.tolist()
    to_tokens("llmc", shards, tmp_path / "l")
    header = np.fromfile(tmp_path / "l/tokens_train_000000.bin", np.int32, 256)
    assert header[:3].tolist() == [20240520, 1, len(wanted)]
    assert np.fromfile(tmp_path / "l/tokens_train_000000.bin", np.uint16, offset=1024).tolist() == wanted.tolist()


