"""Train an encoder-decoder Transformer (Vaswani 2017) to transliterate Korean into Latin letters.

    mpirun -np 2 python -m mpi4py examples/translate.py

The data comes with Python. unicodedata decomposes each of the 11,172 Hangul syllables into its letters (jamo). The Unicode name
of a syllable contains its Latin form: HANGUL SYLLABLE HAN has the jamo U+1112 U+1161 U+11AB. Every tenth syllable is held out.
"""

from __future__ import annotations

import unicodedata
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mpidp.library as mpidp

PAD, BEGIN, END = 0, 1, 2
JAMO, LETTERS, LONGEST = 0x1100, "ABCDEFGHIJKLMNOPRSTUWY", 9  # length of a name with BEGIN and END


def pairs() -> list[tuple[Tensor, Tensor]]:
    """Return [(jamo (3,), letters (LONGEST,))] for every syllable."""
    found = []
    for code in range(0xAC00, 0xD7A4):
        jamo = [ord(one) - JAMO + 3 for one in unicodedata.normalize("NFD", chr(code))]
        letters = [BEGIN, *(3 + LETTERS.index(one) for one in unicodedata.name(chr(code)).split()[-1]), END]
        found.append((torch.tensor(jamo + [PAD] * (3 - len(jamo))), torch.tensor(letters + [PAD] * (LONGEST - len(letters)))))
    return found


class Translator(nn.Module):
    """Map (jamo (B, 3), letters so far (B, T)) to logits of the next letter (B, T, 25)."""

    def __init__(self, dim: int = 64) -> None:
        super().__init__()
        self.source, self.target = nn.Embedding(256 + 3, dim), nn.Embedding(3 + len(LETTERS), dim)
        self.places = nn.Parameter(torch.randn(LONGEST, dim) / dim**0.5)
        self.transformer = nn.Transformer(dim, 4, 1, 1, 2 * dim, dropout=0.0, batch_first=True)
        self.head = nn.Linear(dim, 3 + len(LETTERS))

    def forward(self, jamo: Tensor, letters: Tensor) -> Tensor:
        """Compute the logits. The prediction of a letter depends on the whole syllable and on the letters before it."""
        t = letters.shape[1]
        source, target = self.source(jamo) + self.places[:3], self.target(letters) + self.places[:t]
        return self.head(self.transformer(source, target, tgt_mask=nn.Transformer.generate_square_subsequent_mask(t)))

    @torch.no_grad()
    def translate(self, jamo: Tensor) -> Tensor:
        """Decode greedily, letter by letter: (B, 3) -> (B, LONGEST)."""
        letters = torch.full((len(jamo), 1), BEGIN)
        while letters.shape[1] < LONGEST:
            letters = torch.cat([letters, self(jamo, letters)[:, -1:].argmax(2)], 1)
        return letters * ((letters == END).cumsum(1) - (letters == END).long() == 0)  # zeros after the first END


def train(comm: Any = None, epochs: int = 4, every: int = 1) -> dict[str, Any]:
    """Train on every `every`-th syllable. Return {right: held-out accuracy, loss, sha256, rank}. Collective over comm."""
    held_out, training = (texts := pairs()[::every])[::10], [one for i, one in enumerate(texts) if i % 10]
    torch.manual_seed(0)
    model = Translator()
    items = mpidp.from_dataset(training, batch=128, micro_batch=32, seed=0)
    optimizer = mpidp.DataParallel(model, torch.optim.AdamW(model.parameters(), 3e-3), items, clip=1.0, threads=1, comm=comm)
    for _ in range(epochs):
        for jamo, letters in optimizer.micro_batches():
            logits, wanted = model(jamo, letters[:, :-1]), letters[:, 1:]
            optimizer.backward(F.cross_entropy(logits.transpose(1, 2), wanted, ignore_index=PAD), int((wanted != PAD).sum()))
            optimizer.step()
    predicted = model.eval().translate(torch.stack([jamo for jamo, _ in held_out]))
    right = (predicted == torch.stack([letters for _, letters in held_out])).all(1).float().mean().item()
    return {"right": right, "loss": optimizer.loss, "sha256": optimizer.sha256(), "rank": optimizer.rank}


if __name__ == "__main__":
    found = train()
    if found["rank"] == 0:
        print(f"{100 * found['right']:.1f}% of held-out syllables are right, weights {found['sha256'][:16]}")
