"""Compute with an export in other programs: log-probabilities of the next id after each position, and greedy continuations."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.programs.packages import needed

Predict = Callable[[Sequence[int]], np.ndarray]  # ids of a text: logits or log-probabilities (T, V) after each id


@dataclass
class Read:
    """A model in another program. ids: its tokenizer."""

    predict: Predict
    ids: Callable[[str], list[int]] | None = None

    def log_probs(self, ids: Sequence[int]) -> np.ndarray:
        return torch.log_softmax(torch.tensor(np.asarray(self.predict(ids), dtype=np.float32)), -1).numpy()

    def greedy(self, prompt: Sequence[int], tokens: int, ends: Sequence[int]) -> list[int]:
        found = list(prompt)
        for _ in range(tokens):
            token = int(self.predict(found)[-1].argmax())
            if token in ends:
                break
            found.append(token)
        return found[len(prompt):]


def transformers(folder: Path, place: Path) -> Read:
    program = needed("transformers")
    model = program.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = program.AutoTokenizer.from_pretrained(folder)

    @torch.no_grad()
    def predict(ids: Sequence[int]) -> np.ndarray:
        return model(torch.tensor([ids])).logits[0].float().numpy()

    return Read(predict, lambda text: tokenizer(text).input_ids)


def ctranslate2(folder: Path, place: Path) -> Read:
    program = needed("ctranslate2")
    names = {i: name for name, i in _vocabulary(folder).items()}
    program.converters.TransformersConverter(str(folder)).convert(str(place / "ctranslate2"))
    loaded = program.Generator(str(place / "ctranslate2"), device="cpu", compute_type="float32", intra_threads=1)
    return Read(lambda ids: np.array(loaded.forward_batch([[names[i] for i in ids]]))[0])


def onnxruntime_genai(folder: Path, place: Path) -> Read:
    program = needed("onnxruntime_genai")
    needed("onnx_ir")
    command = ["-m", "onnxruntime_genai.models.builder", "-i", folder, "-o", place / "onnx", "-p", "fp32", "-e", "cpu"]
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    model = program.Model(str(place / "onnx"))
    tokenizer = program.Tokenizer(model)

    def predict(ids: Sequence[int]) -> np.ndarray:
        options = program.GeneratorParams(model)
        options.set_search_options(max_length=len(ids) + 1)
        generator = program.Generator(model, options)
        found = []
        for i in ids:  # all logits are given for one id at a time
            generator.append_tokens(np.array([[i]], dtype=np.int32))
            found.append(np.array(generator.get_output("logits"))[0, -1])
        return np.stack(found)

    return Read(predict, lambda text: tokenizer.encode(text).tolist())


def mlx_lm(folder: Path, place: Path) -> Read:
    program, core = needed("mlx_lm"), needed("mlx.core")
    model, tokenizer = program.load(str(folder))
    return Read(lambda ids: np.array(model(core.array([list(ids)])).astype(core.float32))[0], tokenizer.encode)


def llama_cpp(file: Path, place: Path) -> Read:
    """file: a .gguf file."""
    server = Llama(file)
    return Read(server.predict, server.tokenize)


class Llama:
    """A server of llama.cpp in this process."""

    def __init__(self, file: Path) -> None:
        program = needed("xllamacpp")
        options = program.CommonParams()
        options.model.path, options.port, options.n_ctx, options.n_parallel = str(file), _free_port(), 512, 1
        options.warmup = False
        options.cpuparams.n_threads = 1
        options.flash_attn_type = program.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        options.cache_type_k = options.cache_type_v = program.ggml_type.GGML_TYPE_F32
        self.server = program.Server(options)
        self.url = self.server.listening_address

    def post(self, path: str, body: dict[str, Any]) -> Any:
        request = urllib.request.Request(f"{self.url}/{path}", json.dumps(body).encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    def tokenize(self, text: str) -> list[int]:
        return self.post("tokenize", {"content": text, "add_special": True})["tokens"]

    def predict(self, ids: Sequence[int]) -> np.ndarray:
        """Return the log-probabilities after the last id, (1, V)."""
        body = {"prompt": list(ids), "n_predict": 1, "temperature": 0.0, "n_probs": 100_000, "cache_prompt": False, "samplers": []}
        found = self.post("completion", body)["completion_probabilities"][0]["top_logprobs"]
        log_probs = np.full((1, 1 + max(one["id"] for one in found)), -np.inf, dtype=np.float32)
        for one in found:
            log_probs[0, one["id"]] = one["logprob"]
        return log_probs


def _vocabulary(folder: Path) -> dict[str, int]:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab(with_added_tokens=True)


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])
