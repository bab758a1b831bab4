"""Every operation of mpidp that adds floating-point numbers is in adding_operations.txt, with what fixes the order of its
additions, and with the test that fails if the order changes. docs/determinism.md explains the orders.

A row of the file: source file | operations and their numbers | order | test. The operations are found by name in the syntax tree:

- a call of one of ADDS, a layer of LAYERS, the operator @, and torch.add or operator.add, called or not;
- a collective call of MPI with buffers, `all_reduce`, and TensorComm.sum, unless an argument names an operation that does not
  add (MAX, LAND, ...). Calls with pickle are not used in a step, so they do not count;
- in a package of COMPUTES, `+=`, `-=` and `add_` in a loop, and `a + b` in a comprehension: the loop makes a sum. Outside a
  loop, an addition of two terms has only one order. Attributes (`self.steps += 1`), constants, lists and lengths do not count.

The additions of autograd (a tensor that is used twice, accumulation into .grad) are in no source file; docs/determinism.md
lists them. Not counted: the built-in sum (for integers only: the bits of floats depend on Python's version), math.fsum, which
rounds once, and elementwise operations (lerp_, addcmul_, AdamW).
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "mpidp").rglob("*.py"))
NAMES = """
    sum nansum mean nanmean average var std cumsum logsumexp logcumsumexp softmax log_softmax cross_entropy nll_loss kl_div
    linear_cross_entropy linear _linear_pointwise matmul mm bmm mv dot vdot inner tensordot einsum addmm addmm_ addmv addmv_
    addbmm baddbmm baddbmm_ conv1d scaled_dot_product_attention rms_norm layer_norm group_norm batch_norm norm vector_norm
    matrix_norm index_add index_add_ scatter_add scatter_add_ scatter_reduce scatter_reduce_ embedding embedding_bag bincount
    clip_grad_norm_ all_reduce reduce_scatter_tensor qr
"""
ADDS = set(NAMES.split())
LAYERS = {f"nn.{kind}" for kind in ("Linear", "LSTM", "GRU", "RNN", "Embedding", "EmbeddingBag", "LayerNorm", "RMSNorm")}
COLLECTIVE = re.compile(r"I?([Aa]ll)?[Rr]educe(_scatter)?(_block)?|I?(Ex)?[Ss]can|R?Accumulate")
ADDS_NOT = {"MAX", "MIN", "LAND", "LOR", "LXOR", "BAND", "BOR", "BXOR"}
COMPUTES = ("model", "parallel", "reducers", "strategies", "comm", "c10d", "training", "inference", "faults", "library.py")
ORDERS = {"kernel", "blocks", "sequence", "tree", "ranks", "mpi", "exact", "own", "figure"}
NEEDS_NO_TEST = {"exact", "own", "figure"}


def is_float(value: ast.expr) -> bool:
    """Whether a term may be a floating-point number that was computed."""
    if isinstance(value, ast.Call):
        return ast.unparse(value.func).rpartition(".")[2] not in ("len", "int", "numel", "size", "bool")
    if isinstance(value, ast.Attribute):
        return value.attr not in ("nbytes", "size", "count")
    return not isinstance(value, ast.Constant | ast.Compare | ast.List | ast.ListComp | ast.Tuple | ast.JoinedStr | ast.BoolOp)


def operation(node: ast.AST, in_loop: bool, loops: bool) -> str:
    """Return the name of the operation if it adds, else ""."""
    if isinstance(node, ast.BinOp | ast.AugAssign) and isinstance(node.op, ast.MatMult):
        return "@"
    if isinstance(node, ast.ListComp | ast.GeneratorExp) and isinstance(node.elt, ast.BinOp) and isinstance(node.elt.op, ast.Add):
        return "+" if loops and isinstance(node.elt.left, ast.Name) and isinstance(node.elt.right, ast.Name) else ""
    if isinstance(node, ast.AugAssign) and isinstance(node.op, ast.Add | ast.Sub):
        return "+=" if in_loop and not isinstance(node.target, ast.Attribute) and is_float(node.value) else ""
    if isinstance(node, ast.Attribute) and ast.unparse(node) in ("torch.add", "operator.add"):
        return ast.unparse(node)
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
        return ""
    name, given = node.func.attr, (*node.args, *(keyword.value for keyword in node.keywords))
    if name == "add_":
        return "+=" if in_loop and any(map(is_float, node.args)) else ""
    if ast.unparse(node.func) in LAYERS:
        return ast.unparse(node.func)
    adds = name in ADDS or (COLLECTIVE.fullmatch(name) and name[0].isupper())
    return name if adds and not any(isinstance(one, ast.Attribute) and one.attr in ADDS_NOT for one in given) else ""


def walk(node: ast.AST, loops: bool, in_loop: bool = False) -> list[str]:
    """Return the operations that add. loops: whether additions in loops count."""
    found = [operation(node, in_loop, loops)]
    for child in ast.iter_child_nodes(node):
        inside = in_loop or isinstance(node, ast.For | ast.While) and loops
        found += walk(child, loops, inside and not isinstance(child, ast.FunctionDef | ast.Lambda))
    return [one for one in found if one]


@cache
def adding(file: str) -> Counter[str]:
    """Return how often each adding operation is in a file."""
    return Counter(walk(ast.parse((ROOT / file).read_text()), file.split("/")[1] in COMPUTES))


def rows() -> list[list[str]]:
    lines = Path(__file__).with_name("adding_operations.txt").read_text().splitlines()
    return [[part.strip() for part in line.split("|")] for line in lines if line and not line.startswith("#")]


def listed(file: str) -> Counter[str]:
    found: Counter[str] = Counter()
    for _, operations, _, _ in (row for row in rows() if row[0] == file):
        for one in operations.split(", "):
            name, _, count = one.rpartition(" ")
            found[name] += int(count)
    return found


@pytest.mark.parametrize("file", FILES)
def test_every_operation_that_adds_is_listed(file: str) -> None:
    assert adding(file) == listed(file), "change tests/unit/adding_operations.txt: what fixes the order, and which test fails?"


def test_every_row_names_a_file_an_order_and_a_test() -> None:
    page = (ROOT / "docs/determinism.md").read_text()
    assert all(f"| `{order}` |" in page for order in ORDERS)
    for row in rows():
        file, _, order, test = row
        assert file in FILES, row
        assert order in ORDERS, row
        if test == "-":
            assert order in NEEDS_NO_TEST, row
            continue
        place, _, name = test.partition("::")
        assert name and re.search(rf"^def {name}\(", (ROOT / "tests" / place).read_text(), re.M), row


@pytest.mark.parametrize(("code", "found"), [
    ("y = x @ w", ["@"]), ("y = F.linear(x, w)", ["linear"]), ("x.index_add_(0, i, y)", ["index_add_"]), ("n = sum(sizes)", []),
    ("for x in xs: total += x", ["+="]), ("total += x", []), ("for x in xs: n += len(x)", []),
    ("y = [a + b for a, b in z]", ["+"]),
    ("for x in xs: flat.add_(x)", ["+="]), ("for x in xs: seen.add(x)", []),
    ("functools.reduce(operator.add, xs)", ["operator.add"]),
    ("comm.Allreduce(IN_PLACE, x)", ["Allreduce"]), ("comm.Iallreduce(IN_PLACE, x)", ["Iallreduce"]),
    ("comm.Ireduce_scatter_block(x, y)", ["Ireduce_scatter_block"]), ("comm.Allreduce(IN_PLACE, x, op=MPI.LAND)", []),
    ("tp.sum(x, MPI.MAX)", []), ("comm.allreduce(n)", []), ("layer = nn.LSTM(3, 3)", ["nn.LSTM"]),
], ids=str)
def test_operations_are_found_by_name(code: str, found: list[str]) -> None:
    assert walk(ast.parse(code), loops=True) == found


if __name__ == "__main__":
    for f in FILES:
        if adding(f):
            print(f, "|", ", ".join(f"{k} {v}" for k, v in sorted(adding(f).items())))
