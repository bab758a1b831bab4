"""Small trained models and their exports, with the tokens and log-likelihoods that mpidp computes for them in float32."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from data_tools.prepare import prepare
from mpidp.config.schema import Config
from mpidp.export import export
from mpidp.hf.gguf import REGEXES
from mpidp.inference.decode import DecodedText, decode
from mpidp.inference.loading import Loaded, open_model
from mpidp.inference.sampling import Sampling
from tests.families import folder_of_row
from tests.tiny import WORLD, text, tiny, train_at

SEQ_LEN, NEW = 128, 40
LLAMA3 = "llama3:8,1,4,32"
# name: (tokenizer, settings of the model). untied: no head dimension of its own, no BOS
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "untied": ("bpe", {"tie_embeddings": False}),
    "gqa": ("bpe", {"num_kv_heads": 2, "rope_theta": 5e5}),  # tied
    "wide": ("bpe", {"num_kv_heads": 2, "head_dim": 32}),  # tied; heads larger than model_dim / num_heads
    "narrow": ("bpe", {"head_dim": 24}),  # tied; heads whose size is not a multiple of 16
    "llama3": ("bpe", {"rope_theta": 5e5, "rope_scaling": LLAMA3}),
    "bos": ("bos", {"tie_embeddings": False}),  # every document begins with a BOS token
    "byte": ("byte", {}),
    "char": ("char", {}),
    "llama-bpe": ("llama-bpe", {}),  # a tokenizer that splits text as Llama 3's
    "qwen2": ("qwen2", {}),
}
FAMILIES: dict[str, dict[str, Any]] = {  # rows of tests/families.py, and fields of config.json in place of theirs
    "qwen3": {}, "gpt2": {"intermediate_size": 256}, "mistral": {},  # mistral: with a window
}
PROMPTS = ("the rank of a tree", "who was there", "done.\nin order")
CORPUS = text(20_000) + "naïve Ünïcode 漢字 🚀\n"


@dataclass(frozen=True)
class Export:
    """An export, and what mpidp computes for the model: ids of a long text, log-probabilities (T, V) after each of its ids, and
    greedy continuations of the ids of PROMPTS."""

    name: str
    run: Path
    folder: Path
    ids: list[int]
    log_probs: np.ndarray
    prompts: list[list[int]]
    greedy: list[list[int]]

    def tokenizer(self) -> Tokenizer:
        return Tokenizer.from_file(str(self.folder / "tokenizer.json"))

    def config(self) -> dict[str, Any]:
        return json.loads((self.folder / "config.json").read_text())


def shards_of(kind: str, place: Path) -> Path:
    """Make shards of CORPUS, once."""
    out, source = place / f"shards_{kind}", place / "text.txt"
    if not out.exists():
        source.write_text(CORPUS)
        tokenizer = "bpe:400" if kind == "bpe" else kind
        if kind == "bos":
            tokenizer = str(place / "bos.json")
            with_bos(shards_of("bpe", place) / "tokenizer.json").save(tokenizer)
        if kind in REGEXES.values():
            tokenizer = str(place / f"{kind}.json")
            split_by(next(regex for regex, name in REGEXES.items() if name == kind)).save(tokenizer)
        prepare(str(source), tokenizer, out, shards=1, val_fraction=0.05, verbose=False)
    return out


def with_bos(file: Path) -> Tokenizer:
    """Return the tokenizer with a token <s> that begins every text."""
    made = Tokenizer.from_file(str(file))
    made.add_special_tokens(["<s>"])
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", made.token_to_id("<s>"))]
    )
    return made


def split_by(regex: str) -> Tokenizer:
    """Return a byte-level BPE tokenizer, trained on CORPUS, that splits text by a regular expression."""
    made = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(regex), "isolated")
    made.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    made.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<|endoftext|>"], show_progress=False, initial_alphabet=alphabet
    )
    made.train_from_iterator([CORPUS, "12345 x=3; 777777 1234567 'tis \r\n\r\n " * 40], trainer)
    return made


def make(name: str, place: Path) -> Export:
    """Train a model of MODELS or FAMILIES and export it. Independent."""
    if name in FAMILIES:
        return make_family(name, place, **FAMILIES[name])
    kind, model = MODELS[name]
    sizes = {"num_layers": 2, "num_heads": 4, "model_dim": 64, "hidden_dim": 96, "seq_len": SEQ_LEN}
    train = {"steps": 50, "global_batch": 4, "eval_every": 0, "eval_tokens": 0}
    run, folder = place / f"run_{name}", place / name
    train_at(1, tiny(shards_of(kind, place), run, model=sizes | model, train=train))
    export(WORLD, str(run), str(folder))
    return computed(name, run, folder)


def make_family(row: str, place: Path, **more: Any) -> Export:
    """Fine-tune a model of transformers for two steps and export it. row: of tests/families.py; more: fields of its config.json.
    Independent."""
    name, shards = row.replace(", ", "-"), shards_of("bpe", place)
    vocabulary = Tokenizer.from_file(str(shards / "tokenizer.json")).get_vocab_size()
    sizes = {"hidden_size": 64, "vocab_size": vocabulary, "max_position_embeddings": SEQ_LEN}
    base = folder_of_row(row, place / f"base_{name}", shards / "tokenizer.json", **sizes | more)
    names = {f"{key}_token": "<|endoftext|>" for key in ("bos", "eos", "pad", "unk")}
    (base / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **names}))
    run, folder = place / f"run_{name}", place / name
    plain = Config().model
    unset = {key: getattr(plain, key) for key in ("num_layers", "num_heads", "model_dim", "hidden_dim")}
    train = {"init_from": str(base), "steps": 2, "global_batch": 4, "eval_every": 0, "eval_tokens": 0}
    train_at(1, tiny(shards, run, model={**unset, "seq_len": SEQ_LEN}, train=train, optim={"lr": 1e-3, "warmup_steps": 1}))
    export(WORLD, str(run), str(folder))
    return computed(name, run, folder)


def computed(name: str, run: Path, folder: Path) -> Export:
    """Compute tokens and log-likelihoods with the model of a run. Independent."""
    options = SimpleNamespace(
        run=str(run), tokenizer=None, tp=1, pp=1, device="cpu", threads=1, model_kind="", base="", seq_len=0
    )
    _, loaded, encoder = open_model(options, WORLD, "text")
    ids = encoder.prompt(CORPUS[7000:7400])[:SEQ_LEN]
    prompts = [encoder.prompt(prompt) for prompt in PROMPTS]
    log_probs = torch.log_softmax(logits_of(loaded, ids), -1).numpy()
    rows = [DecodedText(loaded.model, one, NEW, 0, lambda _: False) for one in prompts]
    decode(loaded, rows, Sampling(0.0), encoder.table.ends, encoder.tokenizer.vocab_size)
    greedy = [row.ids[len(one):] for row, one in zip(rows, prompts, strict=True)]
    return Export(name, run, folder, ids, log_probs, prompts, greedy)


def logits_of(loaded: Loaded, ids: list[int]) -> torch.Tensor:
    found = loaded.forward(torch.tensor([ids]))
    assert found is not None
    return found[0].float()
