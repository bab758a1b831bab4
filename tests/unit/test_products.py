"""The products of linear layers: oneDNN's and torch's are equal up to rounding, for values and gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mpidp.model import products

needs_onednn = pytest.mark.skipif(products.KIND == "torch", reason="MKL computes the products on this CPU")


@pytest.fixture
def every_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "SMALLEST", 0)


def _results(linear, x, weight, bias, grad):
    inputs = [one for one in (x, weight, bias) if one is not None and one.requires_grad]
    y = linear(x, weight, bias)
    return [y, *torch.autograd.grad(y, inputs, grad)]


def _draw(batch: int, positions: int, inputs: int, outputs: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    shapes = [(batch, positions, inputs), (outputs, inputs), (outputs,), (batch, positions, outputs)]
    return [torch.randn(shape, generator=g).to(dtype) for shape in shapes]


@needs_onednn
@pytest.mark.parametrize("shape", [(3, 64, 128, 344), (1, 5, 33, 7), (2, 17, 300, 66), (1, 1, 8, 8)])
@pytest.mark.parametrize("biased", [False, True])
def test_value_and_gradients_equal_those_in_float64(every_size: None, shape: tuple[int, ...], biased: bool) -> None:
    exact = _draw(*shape)
    x, weight, bias, grad = (one.float() for one in exact)
    for one in (*exact[:3], x, weight, bias):
        one.requires_grad_()
    found = _results(products.linear, x, weight, bias if biased else None, grad)
    wanted = _results(F.linear, *exact[:2], exact[2] if biased else None, exact[3])
    assert len(found) == len(wanted) and type(found[0].grad_fn).__name__ == "_LinearBackward"
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-4)


@needs_onednn
@pytest.mark.parametrize("size", [(128, 128), (384, 1024), (66, 300)])
def test_bits_depend_neither_on_threads_nor_on_the_other_rows(every_size: None, size: tuple[int, int]) -> None:
    x, weight, _, grad = _draw(4, 48, *size, dtype=torch.float32)
    x.requires_grad_(), weight.requires_grad_()
    before = torch.get_num_threads()
    try:
        of_threads = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            of_threads.append(_results(products.linear, x, weight, None, grad))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for found in of_threads[1:] for one, other in zip(found, of_threads[0], strict=True))
    fewer = _results(products.linear, x[:1], weight, None, grad[:1])
    assert torch.equal(fewer[0], of_threads[0][0][:1]) and torch.equal(fewer[1], of_threads[0][1][:1])


@needs_onednn
@pytest.mark.parametrize("size", [(40_000, 32, 32), (512, 16, 20_000), (64, 20_000, 16)], ids=str)
def test_bits_of_long_sums_do_not_depend_on_threads(size: tuple[int, int, int]) -> None:
    """The three sums of a layer: over rows (gradient of the weight), over outputs (gradient of x), over inputs (value)."""
    rows, inputs, outputs = size
    x, weight, bias, grad = (one.float().requires_grad_() for one in _draw(1, rows, inputs, outputs))
    before, of_threads = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5, 8):
            torch.set_num_threads(threads)
            of_threads.append(_results(products.linear, x, weight, bias, grad.detach()))
    finally:
        torch.set_num_threads(before)
    wanted = _results(F.linear, *(one.detach().double().requires_grad_() for one in (x, weight, bias)), grad.detach().double())
    for one, other in zip(of_threads[0], wanted, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=5e-3)
    assert all(torch.equal(one, other) for found in of_threads[1:] for one, other in zip(found, of_threads[0], strict=True))


def test_gradients_of_gradients_equal_torchs(every_size: None) -> None:
    def penalty(linear, x, weight):
        (grad,) = torch.autograd.grad(linear(x, weight).square().sum(), weight, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), [x, weight])

    x, weight, _, _ = (one.requires_grad_() for one in _draw(2, 4, 8, 8, dtype=torch.float32))
    for one, other in zip(penalty(products.linear, x, weight), penalty(F.linear, x, weight), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))


def test_frozen_inputs_get_no_gradient_and_are_not_saved(every_size: None) -> None:
    x, weight, _, grad = _draw(1, 4, 8, 8, dtype=torch.float32)
    saved: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        y = products.linear(x.requires_grad_(), weight)
    y.backward(grad)
    assert x.grad is not None and weight.grad is None and saved == [weight.shape]


def test_torch_computes_small_products_and_those_outside_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products._Linear, "apply", lambda *_: pytest.fail("oneDNN is used"))
    x, weight = torch.randn(2, 8, requires_grad=True), torch.randn(8, 8)
    products.linear(x, weight)
    monkeypatch.setattr(products, "SMALLEST", 0)
    with torch.no_grad():
        products.linear(x, weight)
    with torch.autocast("cpu", torch.bfloat16):
        products.linear(x, weight)
    products.linear(x.double(), weight.double())


@needs_onednn
def test_compiled_code_has_the_same_products(every_size: None) -> None:
    """torch's compiler rejects oneDNN's operator, because the weights are not constant. Compiled code calls our operator."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    operators: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> object:
        operators.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return make_boxed_func(graph.forward)

    exact = _draw(3, 16, 24, 40)
    x, weight, bias, grad = (one.float() for one in exact)
    for one in (x, weight, bias):
        one.requires_grad_()
    compiled = torch.compile(products.linear, backend=aot_autograd(fw_compiler=backend), fullgraph=True)
    eager = _results(products.linear, x, weight, bias, grad)
    for one, other in zip(_results(compiled, x, weight, bias, grad), eager, strict=True):
        assert torch.equal(one, other)
    assert operators.count("mpidp.product.default") == 3  # the value and two gradients
