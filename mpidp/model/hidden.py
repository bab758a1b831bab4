"""Finds the hidden matrices of a model, which are the weight matrices of its hidden layers. The optimizers muon and normuon
apply orthogonalized updates to these matrices, and AdamW to all other parameters."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from mpidp.errors import UsageError

OUTER = ("embedding.weight", "head.weight", "positions.weight")  # matrices that are not hidden matrices (built-in models)


def hidden_by_name(named: Iterable[tuple[str, nn.Parameter]]) -> frozenset[str]:
    """Return the names of the hidden matrices of a built-in model. These are all matrices except embeddings, learned positions
    and the head. named: (name, parameter) pairs. Pure."""
    return frozenset(name for name, p in named if p.dim() == 2 and not name.endswith(OUTER))


def hidden_of_own(module: nn.Module, vocab_size: int) -> frozenset[str]:
    """Return the names of the hidden matrices of a custom model.

    If the model has an attribute `hidden_matrices`, the attribute lists these names. Otherwise the hidden matrices are all
    parameters with two dimensions, except the weights of nn.Embedding and the head. Among these parameters, the head is the last
    one with `vocab_size` rows that is not the weight of an nn.Embedding. Raises UsageError if hidden_matrices has a name that is
    not a parameter with two dimensions. Pure.
    """
    matrices = {name: p for name, p in module.named_parameters() if p.dim() == 2}
    given = getattr(module, "hidden_matrices", None)
    if given is not None:
        wrong = [name for name in given if name not in matrices]
        if wrong:
            raise UsageError(
                f"your model's hidden_matrices has {wrong[0]!r}, which is not a parameter with two dimensions. Parameters "
                f"with two dimensions are {', '.join(list(matrices)[:6])}"
            )
        return frozenset(given)
    tables = {id(one.weight) for one in module.modules() if isinstance(one, nn.Embedding)}
    heads = [id(p) for p in matrices.values() if p.shape[0] == vocab_size and id(p) not in tables]
    return frozenset(name for name, p in matrices.items() if id(p) not in tables | set(heads[-1:]))
