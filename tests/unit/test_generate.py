"""Laws of generation: neither the cache nor other texts of a batch change the result; sampling; stop conditions and output."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from mpi4py import MPI
from torch import Tensor

from mpidp.data.encoder import Encoder
from mpidp.data.special_tokens import SpecialTokens
from mpidp.data.tokenizer import ByteTokenizer
from mpidp.errors import DataError, UsageError
from mpidp.evaluate import read_options as evaluate_options
from mpidp.generate import read_options
from mpidp.inference.decode import DecodedText, continue_prompts, decode
from mpidp.inference.detokenize import _Windowed, detokenizer_of
from mpidp.inference.loading import Loaded
from mpidp.inference.rows import read_prompts, read_rows
from mpidp.inference.sampling import Sampling, nucleus, seed_of
from mpidp.inference.scoring import row_scores
from mpidp.inference.speech import StreamedText
from mpidp.model.cache import Cache, joined
from mpidp.model.joint_cache import join
from mpidp.model.lora import attach, merged
from mpidp.model.rowwise import by_rows
from mpidp.model.shape import TransformerShape
from mpidp.model.transformer import Transformer
from mpidp.parallel.grid import make_grid

SHAPE = TransformerShape(
    vocab_size=257, num_layers=2, num_heads=4, num_kv_heads=2, model_dim=32, hidden_dim=48, seq_len=24, dropout=0.3
)
GREEDY = Sampling(temperature=0)


class Forgetful(Transformer):
    """A model without a cache."""

    def new_cache(self, positions: int) -> None:
        return None


def loaded(kind: type[Transformer] = Transformer, **changes: Any) -> Loaded:
    model = kind(replace(SHAPE, **changes), seed=1).eval()
    return Loaded(model, torch.device("cpu"), torch.float32, make_grid(MPI.COMM_SELF))


def ids(length: int, seed: int = 0) -> list[int]:
    return torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def grown(model: Loaded, prompts: list[list[int]], tokens: int, how: Sampling = GREEDY) -> list[list[int]]:
    rows = [DecodedText(model.model, prompt, tokens, seed_of(5, i), lambda token: False) for i, prompt in enumerate(prompts)]
    decode(model, rows, how)
    return [row.ids[len(prompt) :] for row, prompt in zip(rows, prompts, strict=True)]


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("cuts", [[1] * 20, [7] + [1] * 13, [5, 8, 1, 6], [20]], ids=str)
@torch.no_grad()
def test_logits_with_a_cache_are_those_without(kv_heads: int, cuts: list[int]) -> None:
    """For sequences in pieces of any length, and beside a sequence at another position."""
    model = loaded(num_kv_heads=kv_heads).model
    one, other = torch.tensor([ids(20, 1)]), torch.tensor([ids(20, 2)])
    caches, done, found = [Cache(24), Cache(24)], 0, []
    model(other[:, :4], caches=caches[1:])
    for cut in cuts:
        beside = torch.cat([one[:, done : done + cut], other[:, :1].expand(1, cut)])
        if caches[1].length + cut > 24:
            caches[1] = Cache(24)
        found.append(model(beside, caches=caches)[:1])
        done += cut
    torch.testing.assert_close(torch.cat(found, dim=1), model(one), rtol=0, atol=1e-5)
    assert caches[0].length == 20


def test_a_cache_is_no_longer_than_was_said() -> None:
    model = loaded().model
    assert model.new_cache(10).capacity == 10 and model.new_cache(1000).capacity == 24
    with pytest.raises(ValueError, match="position 4 exceeds"):
        model(torch.tensor([ids(5)]), caches=[Cache(4)])


@pytest.mark.parametrize("how", [GREEDY, Sampling(), Sampling(0.9, 0, 0.8)], ids=str)
def test_tokens_with_a_cache_are_those_without(how: Sampling) -> None:
    """Within the model's context and far beyond it."""
    prompts = [ids(n, n) for n in (1, 5, 24, 9)]
    with_cache, without = loaded(), loaded(Forgetful)
    by_rows(with_cache.model)
    assert grown(with_cache, prompts, 60, how) == grown(without, prompts, 60, how)


def test_beyond_the_window_the_last_half_is_seen() -> None:
    model, prompt = loaded(), ids(20)
    new = grown(model, [prompt], 40)[0]
    whole = prompt + new
    start = 0
    for place in range(20, 60):
        if place - start > 24:
            start = place - 12
        assert whole[place] == int(model.last_logits(torch.tensor([whole[start:place]])).argmax())


@pytest.mark.parametrize("how", [GREEDY, Sampling()], ids=str)
def test_neighbours_change_no_token(how: Sampling) -> None:
    """In batches of any number of rows, of which some end earlier."""
    model = loaded()
    by_rows(model.model)
    prompts = [ids(n, n) for n in (3, 9, 1, 14, 9, 2, 20)]
    seeds = [seed_of(5, i) for i in range(len(prompts))]

    def rows(places: list[int]) -> list[DecodedText]:
        return [DecodedText(model.model, prompts[i], 10 + i, seeds[i], lambda token: False) for i in places]

    alone = []
    for i in range(len(prompts)):
        decode(model, (one := rows([i])), how)
        alone.append(one[0].ids)
    for size in (2, 3, 7):
        for first in range(0, len(prompts), size):
            decode(model, (some := rows(list(range(len(prompts)))[first : first + size])), how)
            assert [row.ids for row in some] == alone[first : first + size]


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("changes", [
    {}, {"num_kv_heads": 1}, {"window": 5}, {"attention_cap": 20.0}, {"seq_len": 700}
], ids=str)
@torch.no_grad()
def test_sequences_of_equal_length_are_computed_together_with_the_bits_of_each_alone(changes: dict[str, Any]) -> None:
    model = loaded(hidden_dim=64, **changes)  # see test_a_row_alone_has_the_bits_that_it_has_among_others
    by_rows(model.model)
    length = model.model.shape.seq_len - 4
    prompts = torch.tensor([ids(length, i) for i in range(5)])

    def begun(some: range) -> list[Any]:
        caches = [model.model.new_cache(length + 4 - i % 2) for i in some]
        for cache, i in zip(caches, some, strict=True):
            model.last_logits(prompts[i : i + 1], [cache])
        return caches

    together, alone = begun(range(5)), begun(range(5))
    for steps, places in ((1, [0, 1, 2, 3, 4]), (2, [0, 2, 4])):  # two sequences end
        for step in range(steps):
            join(some := [together[i] for i in places])
            assert joined(some)
            tokens = prompts[places, step : step + 1]
            found = model.last_logits(tokens, some)
            for token, i, logits in zip(tokens, places, found, strict=True):
                assert torch.equal(model.last_logits(token[None], [alone[i]])[0], logits)


def test_without_exact_prompts_of_equal_length_are_one_input() -> None:
    model, sizes = loaded(), list[tuple[int, ...]]()
    model.model.register_forward_pre_hook(lambda _, given: sizes.append(tuple(given[0].shape)))
    prompts = [ids(n, n + i) for i, n in enumerate((6, 9, 6, 6))]
    rows = [DecodedText(model.model, prompt, 5, 0, lambda token: False) for prompt in prompts]
    decode(model, rows, GREEDY, exact=False)
    assert sizes == [(3, 6), (1, 9)] + [(4, 1)] * 4
    exact = [DecodedText(model.model, prompt, 5, 0, lambda token: False) for prompt in prompts]
    decode(model, exact, GREEDY)
    assert [row.ids for row in rows] == [row.ids for row in exact]


def test_a_row_alone_has_the_bits_that_it_has_among_others() -> None:
    model = loaded(hidden_dim=64)  # other widths round silu differently, because vector units process the remainder separately
    attach(model.model, 4, 16.0, "gate,down", seed=1)
    for layer in ("gate", "down"):
        adapter = getattr(model.model.blocks["0"].feed_forward, layer).lora_b
        torch.nn.init.normal_(adapter, std=0.1, generator=torch.Generator().manual_seed(2))
    by_rows(model.model)
    by_rows(model.model)
    hidden = torch.randn(8, 1, 32, generator=torch.Generator().manual_seed(1))
    layer = model.model.blocks["0"].feed_forward
    together = layer(hidden)
    assert all(torch.equal(layer(hidden[i : i + n]), together[i : i + n]) for n in (1, 3) for i in range(6))
    assert not torch.equal(together, loaded(hidden_dim=64).model.blocks["0"].feed_forward(hidden))
    plain = loaded(hidden_dim=64).model
    plain.load_state_dict(merged(dict(model.model.named_parameters()), 16.0))
    torch.testing.assert_close(together, plain.blocks["0"].feed_forward(hidden))


def test_a_layer_of_an_own_model_keeps_its_forward() -> None:
    class Doubled(torch.nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    layer, x = Doubled(4, 3), torch.randn(2, 1, 4)
    wanted = layer(x)
    by_rows(torch.nn.Sequential(layer))
    assert torch.equal(layer(x), wanted)


def softmax(*logits: float) -> Tensor:
    return torch.softmax(torch.tensor(logits), dim=0)


def test_a_loss_in_chunks_changes_no_score_and_no_text() -> None:
    """train.eval_tasks uses the model of the training, which then returns hidden states."""
    model = loaded(logit_cap=4.0, logit_scale=0.5)

    def computed() -> Any:
        return row_scores(model, [(ids(9, 1), 4), (ids(20, 2), 7)]), grown(model, [ids(5), ids(11, 3)], 9)

    wanted = computed()
    model.model.defer_head()
    assert computed() == wanted


@pytest.mark.parametrize("top_p", [0.01, 0.3, 0.5, 0.77, 0.9, 0.999, 1.0])
def test_top_p_keeps_the_smallest_set_that_has_it(top_p: float) -> None:
    for seed in range(20):
        p = torch.softmax(3 * torch.randn(30, generator=torch.Generator().manual_seed(seed)), dim=0)
        kept = nucleus(p, top_p)
        held = kept > 0
        assert torch.equal(kept[held], p[held]) and p[held].min() >= p[~held].max() if (~held).any() else True
        assert float(p[held].double().sum()) >= top_p - 1e-6
        assert float(p[held].double().sum() - p[held].min()) < top_p


def test_of_equals_top_p_keeps_the_first() -> None:
    assert nucleus(torch.tensor([0.25, 0.25, 0.25, 0.25]), 0.5).tolist() == [0.25, 0.25, 0, 0]
    assert nucleus(torch.tensor([0.25, 0.25, 0.25, 0.25]), 0.51).tolist() == [0.25, 0.25, 0.25, 0]


def test_only_what_is_kept_is_drawn() -> None:
    logits, generator = torch.tensor([0.0, 3.0, 2.0, 1.0, -1.0]), torch.Generator().manual_seed(0)

    def drawn(how: Sampling) -> set[int]:
        return {how.draw(logits, generator) for _ in range(300)}

    assert drawn(GREEDY) == drawn(Sampling(1.0, 1)) == drawn(Sampling(1.0, 0, 0.1)) == {1}
    assert drawn(Sampling(2.0, 3)) == {1, 2, 3}
    assert drawn(Sampling(2.0, 0)) == {0, 1, 2, 3, 4}
    assert drawn(Sampling(1.0, 0, 0.8)) == {1, 2}
    assert drawn(Sampling(5.0, 3, 0.6)) == {1, 2}  # of the three that remain
    assert logits.tolist() == [0.0, 3.0, 2.0, 1.0, -1.0]


@pytest.mark.parametrize("temperature", [1e-7, 1e-39, 1e-45, 1e-300])
def test_a_tiny_temperature_draws_the_likeliest(temperature: float) -> None:
    logits = torch.tensor([0.0, 3.0, 2.0, -100.0])
    assert {Sampling(temperature, k, p).draw(logits, torch.Generator()) for k in (0, 2) for p in (0.5, 1.0)} == {1}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("how", [GREEDY, Sampling(), Sampling(0.9, 0, 0.8)], ids=str)
def test_logits_that_are_not_finite_are_refused(value: float, how: Sampling) -> None:
    model = replace(loaded(), name="runs/x/checkpoints/step_00000001")
    with torch.no_grad():
        model.model.head.weight[7, 0] = value
    with pytest.raises(DataError, match="runs/x/checkpoints/step_00000001: the largest logit is not finite"):
        continue_prompts(model, PLAIN, {0: ids(6)}, how, 5, 0)
    with torch.no_grad():
        model.model.head.weight[7] = 0.0  # the same model, mended
    continue_prompts(model, PLAIN, {0: ids(6)}, how, 5, 0)


def test_draws_have_the_probabilities() -> None:
    generator, logits = torch.Generator().manual_seed(0), torch.tensor([0.0, 1.0, 2.0])
    counts = torch.bincount(torch.tensor([Sampling(0.5, 0).draw(logits, generator) for _ in range(4000)]), minlength=3)
    torch.testing.assert_close(counts / 4000, softmax(0.0, 2.0, 4.0), atol=0.03, rtol=0)


def test_every_prompt_has_a_seed_of_its_own() -> None:
    assert seed_of(7, 0) == 7
    assert len({seed_of(s, i) for s in range(20) for i in range(50)}) == 20 * 50


BYTES = ByteTokenizer()
PLAIN = Encoder(BYTES, SpecialTokens(None, (256,)))
TEXT = "naïve 日本語 🙂 \ufffd end"


def spoken(data: bytes, stops: list[str] | None = None) -> tuple[str, str, list[str], bool]:
    """Return (printed text, returned text, the pieces, stopped?)."""
    pieces: list[str] = []
    stream = StreamedText(detokenizer_of(BYTES, [65]), stops or (), pieces.append)
    any(stream.add(token) for token in data)
    text = stream.end()
    return "".join(pieces), text, pieces, stream.stopped


@pytest.mark.parametrize("data", [TEXT.encode(), b"ab\xf0\x9f", b"\xff\xfe a\xe6\x97", b"", "🙂".encode()[1:] + b"x"], ids=repr)
def test_what_is_said_piece_by_piece_is_what_is_returned(data: bytes) -> None:
    said, returned, pieces, _ = spoken(data)
    assert said == returned == data.decode(errors="replace")
    assert all(pieces)


def test_half_a_character_is_never_said() -> None:
    _, _, pieces, _ = spoken("日本語🙂".encode())
    assert pieces == ["日", "本", "語", "🙂"]


@pytest.mark.parametrize(("stops", "text"), [
    (["lo w"], "hel"), (["zz", "world"], "hello "), (["d!"], "hello worl"), (["h"], ""), (["lower"], "hello world!"),
    (["o w", "lo"], "hel"), (["ll", "l"], "he"),
])
def test_nothing_of_a_stop_is_said(stops: list[str], text: str) -> None:
    said, returned, _, stopped = spoken(b"hello world!", stops)
    assert said == returned == text
    assert stopped == (text != "hello world!")


@pytest.mark.parametrize(("stops", "text"), [
    (["b\ufffd"], "a"), (["\ufffd"], "ab"), (["\ufffdc", "ab\ufffd"], ""), (["\ufffdc"], "ab\ufffd"),
])
@pytest.mark.parametrize("windowed", [False, True])
def test_a_stop_is_found_in_the_text_that_the_end_completes(stops: list[str], text: str, windowed: bool) -> None:
    """The last character is incomplete, so it is known only when generation ends."""
    pieces: list[str] = []
    stream = StreamedText(_Windowed(BYTES, [65]) if windowed else detokenizer_of(BYTES, [65]), stops, pieces.append)
    assert not any(stream.add(token) for token in b"ab\xf0\x9f")
    assert stream.end() == "".join(pieces) == text and stream.stopped == (text != "ab\ufffd")


def test_a_stop_at_the_end_is_the_reason_of_the_end() -> None:
    class Half(Transformer):
        """A model that writes the first byte of a character."""

        def forward(self, tokens: Tensor, caches: Any = None) -> Tensor:
            return torch.eye(257)[0xF0].expand(*tokens.shape, 257)

        def new_cache(self, positions: int) -> None:
            return None

    for stops, ended in (["\ufffd"], "stop"), (["x"], "tokens"):
        (_, found), = continue_prompts(loaded(Half), PLAIN, {0: [65]}, GREEDY, 1, 0, stops)
        assert (found.text, found.ended) == ("" if ended == "stop" else "\ufffd", ended)


def test_a_sequence_ends_at_the_end_of_a_document_or_before_a_stop() -> None:
    model, prompt = loaded(), ids(6)
    new = grown(model, [prompt], 15)[0]

    first = new.index(new[8])
    for ends in [(new[8],), (256, new[8]), (new[8], new[-1])]:
        (_, found), = continue_prompts(model, Encoder(BYTES, SpecialTokens(None, ends)), {0: prompt}, GREEDY, 15, 0)
        last = min(new.index(one) for one in ends if one in new)
        assert (found.ended, found.tokens, found.text) == ("eod", last, BYTES.decode(new[:last])) and last <= first
    (_, found), = continue_prompts(model, PLAIN, {0: prompt}, GREEDY, 15, 0)
    assert (found.ended, found.tokens, found.text, found.cut) == ("tokens", 15, BYTES.decode(new), False)
    stop = BYTES.decode(new)[4]
    pieces: list[str] = []
    (_, found), = continue_prompts(model, PLAIN, {0: prompt}, GREEDY, 15, 0, [stop], pieces.append)
    assert found.ended == "stop" and found.text == BYTES.decode(new).partition(stop)[0] == "".join(pieces)
    (_, found), = continue_prompts(model, PLAIN, {0: prompt}, GREEDY, 0, 0)
    assert (found.ended, found.tokens, found.text) == ("tokens", 0, "")


def test_ids_beyond_the_tokenizer_are_never_drawn() -> None:
    """Ids of a padded vocabulary are never drawn, however likely they are. The draws are those of a model without padding."""
    plain, padded = loaded(), loaded(vocab_size=300)
    with torch.no_grad():
        for name, p in padded.model.named_parameters():
            mine = plain.model.get_parameter(name)
            p[: len(mine)].copy_(mine) if len(p) > len(mine) else p.copy_(mine)
        padded.model.head.weight[257:].copy_(padded.model.head.weight[:43] * 20)
    prompts = {i: ids(5, i) for i in range(3)}
    for how in (GREEDY, Sampling(2.0, 0), Sampling(2.0, 10, 0.9)):
        assert continue_prompts(padded, PLAIN, prompts, how, 20, 3) == continue_prompts(plain, PLAIN, prompts, how, 20, 3)


def test_prompts_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_bytes("one\r\n\n two\u2028 \nthree".encode())
    assert [row["prompt"] for row in read_prompts(tmp_path / "p.txt")] == ["one", " two\u2028 ", "three"]
    for name in ("p.json.txt", "p.jsonl.bak", "json"):
        (tmp_path / name).write_text("a line\n")
        assert read_prompts(tmp_path / name) == [{"prompt": "a line"}]
    (tmp_path / "p.jsonl").write_text('{"prompt": "a\\nb", "id": 3}\n\n{"prompt": ""}\n')
    assert read_prompts(tmp_path / "p.jsonl") == [{"prompt": "a\nb", "id": 3}, {"prompt": ""}]


@pytest.mark.parametrize(("name", "content", "said"), [
    ("p.txt", b"", "is empty"), ("p.txt", b"\n \n", "only blank lines. Each line must be a prompt"),
    ("p.txt", b"ab\xff", r"not UTF-8 text: byte 2 is not valid"), ("p.jsonl", b"\n\n", "only blank lines"),
    ("p.jsonl", b'{"prompt": "a"}\n\n{"prompt": \n', r"line 3: not valid JSON .* like \{\"prompt\""),
    ("p.jsonl", b"[1]", "line 1: not an object"),
    ("p.jsonl", b'{"text": "a"}', 'line 1: "prompt" is missing or not a string; the keys are text'),
    ("p.jsonl", b'{"prompt": 3}', 'line 1: "prompt" is missing or not a string'),
    ("p.json", b"one\ntwo\n", r"p.json is JSON with neither one object per line nor an array.* like \{\"prompt\""),
    ("p.json.gz", gzip.compress(b"[1]", mtime=0), r"p.json.gz is a JSON array whose items are not objects\. Each line must be"),
    ("absent.txt", None, "cannot read .*absent.txt: No such file"),
])
def test_bad_files_of_prompts(tmp_path: Path, name: str, content: bytes | None, said: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=said):
        read_prompts(tmp_path / name)


def test_a_hostile_line_is_no_crash(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text("[" * 100_000)
    with pytest.raises(DataError, match="line 1: not valid JSON"):
        read_rows(tmp_path / "p.jsonl", "{}")


@pytest.mark.parametrize(("words", "said"), [
    (["--top-p=0"], "--top-p 0.0 must be above 0"), (["--top-p=1.01"], "--top-p 1.01"),
    (["--seed=-1"], "--seed -1"), (["--seed", str(2**63)], "--seed 9223372036854775808"),
    (["--top-p=nan"], "--top-p nan"),
    (["--temperature=-1"], "--temperature"), (["--temperature=nan"], "--temperature"), (["--temperature=inf"], "--temperature"),
    (["--top-k=-1"], "--top-k"), (["--tokens=-1"], "--tokens"), (["--batch=0"], "--batch 0"), (["--stop="], "--stop ''"),
    (["--prompt=a", "--prompts=b"], "give only one of them"), (["--stream", "--prompts=b"], "--stream"),
])
def test_wrong_options_of_generate(words: list[str], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        read_options(["run", *words])


@pytest.mark.parametrize(("words", "said"), [
    (["--text=a", "--choices=b"], "only one of them"), (["--stride=3"], "--stride"), (["--text=a", "--stride=-1"], "--stride"),
    (["--text=a", "--system=b"], "--system works only with --tasks"),
    (["--tasks=a", "--system=b"], "--system works only with --chat"), (["--tasks=a", "--system="], "only with --chat"),
])
def test_wrong_options_of_evaluate(words: list[str], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        evaluate_options(["run", *words])
