"""A linear layer with an int8 weight, beside the same layer in floats and beside bitsandbytes'."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import fresh
import pytest
import torch
from torch import nn

from lowmem.int8 import Int8Linear, dequantise, linear, quantise, work_size

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Of several blocks of the weight, with a last one that is smaller; and of one.
SIZES = [(300, 4000), (4000, 300), (64, 48), (7, 5), (1, 1), (33, 1)]


def layer(inputs: int, outputs: int, bias: bool = True, dtype: torch.dtype | None = None) -> Int8Linear:
    torch.manual_seed(inputs * outputs)
    made = Int8Linear(inputs, outputs, bias, dtype=dtype)
    weight = torch.randn(outputs, inputs) * inputs**-0.5
    quantise(weight, made.weight, made.SCB, torch.empty(work_size(inputs), dtype=torch.uint8))
    if made.bias is not None:
        nn.init.normal_(made.bias)
    return made


def dequantised(of: Int8Linear, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    weight = torch.empty(of.weight.shape, dtype=dtype)
    dequantise(of.weight, of.SCB, weight, torch.empty(work_size(of.in_features), dtype=torch.uint8))
    return weight


def floats(of: Int8Linear, dtype: torch.dtype) -> nn.Linear:
    made = nn.Linear(of.in_features, of.out_features, of.bias is not None, dtype=dtype)
    made.weight = nn.Parameter(dequantised(of, dtype))
    if of.bias is not None:
        made.bias = nn.Parameter(of.bias.detach().to(dtype))
    return made


def lost(dtype: torch.dtype, terms: int, *, roundings: float) -> float:
    """Error that is allowed, as a part of the sum of magnitudes.

    Each rounding to `dtype` loses half of its eps of what it rounds, which is at most the sum of magnitudes; a sum of
    n terms in fp32, and the few products around it, at most (n + 4) halves of fp32's eps of it (Higham, Accuracy and
    Stability of Numerical Algorithms, 3.1).
    """
    own = roundings / 2 * torch.finfo(dtype).eps if dtype != torch.float32 else 0.0
    return own * 1.01 + (terms + 4) / 2 * torch.finfo(torch.float32).eps


def check_product(of: Int8Linear, x: torch.Tensor, *, roundings: float = 2) -> None:
    """The product and the bias are rounded: the error is at most eps of the sum of magnitudes."""
    with torch.no_grad():
        y = of(x)
    assert (y.dtype, y.shape) == (x.dtype, (*x.shape[:-1], of.out_features))
    weight = of.weight.double() * of.SCB.double().unsqueeze(1) / 127
    bias = torch.zeros(of.out_features) if of.bias is None else of.bias.detach()
    expected = x.double() @ weight.t() + bias.double()
    magnitudes = x.double().abs() @ weight.abs().t() + bias.double().abs()
    bound = magnitudes * lost(x.dtype, of.in_features + 1, roundings=roundings) + torch.finfo(x.dtype).tiny
    assert ((y.double() - expected).abs() <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_product_is_as_near_as_its_dtype_allows(size: tuple[int, int], bias: bool, dtype: torch.dtype) -> None:
    of = layer(*size, bias)
    for shape in ((1,), (3,), (2, 17), (700,), ()):
        check_product(of, torch.randn(*shape, size[0]).to(dtype))


def test_the_bound_of_the_product_is_one_that_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    of = layer(64, 48)
    good = of.SCB.clone()
    of.SCB.mul_(1.02)
    x = torch.randn(5, 64, dtype=torch.bfloat16)
    expected = of(x)
    of.SCB.copy_(good)
    monkeypatch.setattr(Int8Linear, "forward", lambda self, x: expected)
    with pytest.raises(AssertionError):
        check_product(of, x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_that_overflow_before_they_are_scaled_do_not(dtype: torch.dtype) -> None:
    """Of fp16 the integers alone would sum to more than it has."""
    of = Int8Linear(4096, 8, bias=False)
    of.weight.fill_(127)
    of.SCB.fill_(1e-3)
    check_product(of, torch.full((2, 4096), 8.0, dtype=dtype))


def test_where_fp16_is_computed_as_such_the_weight_is_rounded_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: another rounding, as in a layer of fp16, and still no overflow."""
    monkeypatch.setattr(linear, "_computed_in", lambda x: x.dtype)
    for size in SIZES:
        # The products' sum is rounded, and the bias is added in fp16.
        check_product(layer(*size), torch.randn(9, size[0], dtype=torch.float16), roundings=4)
    of = Int8Linear(4096, 8, bias=False)
    of.weight.fill_(127)
    of.SCB.fill_(1e-3)
    check_product(of, torch.full((2, 4096), 8.0, dtype=torch.float16), roundings=4)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(0, 6), (2, 0, 6), (0, 0, 6)])
def test_no_rows_give_no_rows_and_have_gradients(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    of = layer(6, 4)
    x = torch.empty(shape, dtype=dtype, requires_grad=True)
    y = of(x)
    assert (y.shape, y.dtype) == ((*shape[:-1], 4), dtype)
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == shape
    assert of.bias is not None
    assert of.bias.grad is not None
    assert not of.bias.grad.any()


def test_layers_without_inputs_or_outputs_do_what_linear_does() -> None:
    assert torch.equal(Int8Linear(0, 4, bias=False)(torch.empty(3, 0)), torch.zeros(3, 4))
    assert Int8Linear(4, 0)(torch.empty(3, 4)).shape == (3, 0)


def test_inputs_of_any_strides_will_do() -> None:
    of = layer(6, 4)
    for x in (torch.randn(6, 5).t(), torch.randn(5, 12)[:, ::2], torch.randn(1, 6).expand(5, 6)):
        torch.testing.assert_close(of(x), floats(of, torch.float32)(x))


@pytest.mark.parametrize("size", [(6, 4), (300, 4000), (4000, 300)], ids=str)
def test_gradients_are_those_of_the_layer_in_floats(size: tuple[int, int]) -> None:
    of = layer(*size).double()
    other = floats(of, torch.float64)
    ours, theirs = (torch.randn(2, 3, size[0], dtype=torch.float64).requires_grad_() for _ in range(2))
    theirs.data.copy_(ours.data)
    weights = torch.randn(2, 3, size[1], dtype=torch.float64)
    (of(ours) * weights).sum().backward()
    (other(theirs) * weights).sum().backward()
    assert of.bias is not None
    torch.testing.assert_close(ours.grad, theirs.grad)
    torch.testing.assert_close(of.bias.grad, other.bias.grad)
    assert of.weight.grad is None
    assert of.SCB.grad is None


def test_gradients_are_those_of_small_differences() -> None:
    of = layer(6, 4).double()
    assert torch.autograd.gradcheck(of, torch.randn(3, 6, dtype=torch.float64, requires_grad=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_are_as_near_as_their_dtype_allows(dtype: torch.dtype) -> None:
    """The weight and the sum are rounded."""
    of = layer(300, 4000)
    x = torch.randn(7, 300, dtype=dtype, requires_grad=True)
    grad = torch.randn(7, 4000).to(dtype)
    of(x).backward(grad)
    assert x.grad is not None
    assert x.grad.dtype == dtype
    weight = dequantised(of).double()
    error = (x.grad.double() - grad.double() @ weight).abs()
    bound = grad.double().abs() @ weight.abs() * lost(dtype, 4000, roundings=2) + torch.finfo(dtype).tiny
    assert (error <= bound).all()


def test_a_lora_on_top_is_trained() -> None:
    torch.manual_seed(0)
    of = layer(16, 12, bias=False)
    down, up = nn.Linear(16, 2), nn.Linear(2, 16)
    optimiser = torch.optim.SGD([*down.parameters(), *up.parameters()], lr=0.1)
    x, target = torch.randn(20, 16), torch.randn(20, 12)
    losses = []
    for _ in range(20):
        loss = (of(x + up(down(x))) - target).square().mean()
        losses.append(loss.item())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert losses[-1] < losses[0]


def test_nothing_is_kept_for_the_way_back_but_the_int8_weight() -> None:
    of, kept = layer(300, 4000), []
    x = torch.randn(5, 300, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        of(x)
    assert [tensor.data_ptr() for tensor in kept] == [of.weight.data_ptr(), of.SCB.data_ptr()]


_PEAK = """
import torch
from lowmem.int8 import Int8Linear
from lowmem.memory import measure
inputs, outputs, rows = args["shape"]
torch.set_num_threads(2)
def run(of, x):
    y = of(x)
    if args["backward"]:
        y.backward(y.detach())
def made(inputs, outputs, rows):
    of = Int8Linear(inputs, outputs)
    of.weight.fill_(1), of.SCB.fill_(1), of.bias.data.fill_(1)
    return of, torch.ones(rows, inputs, dtype=getattr(torch, args["dtype"]), requires_grad=args["backward"])
run(*made(64, 64, 64))  # what libraries keep for good
of, x = made(inputs, outputs, rows)
if args["whole"]:
    forward = lambda x: x @ (of.weight.to(x.dtype) * of.SCB.to(x.dtype).unsqueeze(1)).T
else:
    forward = of
with measure() as memory:
    run(forward, x)
result = [memory.peak, rows * (outputs + (inputs if args["backward"] else 0)) * x.element_size()]
"""


def beside(shape: tuple[int, int, int], dtype: str, *, backward: bool = False, whole: bool = False) -> int:
    """Bytes at the peak beside inputs, outputs and gradients."""
    peak, results = fresh.server().run(_PEAK, shape=shape, dtype=dtype, backward=backward, whole=whole)
    return int(peak - results)


MIB = 2**20


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shape", [(4096, 8192, 1), (8192, 4096, 64)], ids=str)
def test_the_product_takes_a_few_mib_whatever_the_size(shape: tuple[int, int, int], dtype: str) -> None:
    """8 MiB of blocks, with 2 MiB of what libraries pack for themselves."""
    assert beside(shape, dtype) <= 10 * MIB


@pytest.mark.parametrize("backward", [False, True])
def test_many_rows_take_a_few_mib_too(backward: bool) -> None:
    """The libraries pack up to 10 MiB more for these."""
    assert beside((2048, 2048, 2048), "float32", backward=backward) <= 24 * MIB


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_take_a_few_mib_too(dtype: str) -> None:
    assert beside((8192, 4096, 64), dtype, backward=True) <= 12 * MIB


def test_a_whole_copy_of_the_weight_would_be_seen() -> None:
    assert beside((4096, 8192, 1), "float32", whole=True) >= 100 * MIB


def test_inference_mode_and_no_grad_give_what_training_does() -> None:
    of = layer(64, 48)
    x = torch.randn(3, 64)
    expected = of(x)
    assert expected.requires_grad
    with torch.no_grad():
        found = of(x)
    with torch.inference_mode():
        again = of(x)
    assert not found.requires_grad
    assert torch.equal(found, expected)
    assert torch.equal(again, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_autocast_the_product_has_its_dtype_as_of_linear(dtype: torch.dtype) -> None:
    of = layer(64, 48)
    x = torch.randn(3, 64, dtype=dtype, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, expected = of(x), floats(of, torch.float32)(x)
        y.float().sum().backward()
    assert y.dtype == expected.dtype == torch.bfloat16
    assert torch.equal(y, of(x.bfloat16()))
    torch.testing.assert_close(y, expected, rtol=0.02, atol=0.02)
    assert x.grad is not None
    assert x.grad.dtype == dtype


@pytest.mark.parametrize(
    "x",
    [torch.zeros(3, 5), torch.zeros(2, 3, 5), torch.zeros(5), torch.zeros(()), torch.zeros(3, 6, dtype=torch.int64)],
    ids=["two", "three", "one", "none", "integers"],
)
def test_inputs_that_do_not_fit_are_refused_in_the_words_of_linear(x: torch.Tensor) -> None:
    of = Int8Linear(6, 4, bias=False)
    with pytest.raises(RuntimeError) as expected:
        nn.Linear(6, 4, bias=False)(x)
    with pytest.raises(RuntimeError) as found:
        of(x)
    assert str(found.value) == str(expected.value)


CASTS = {
    "half": lambda model: model.half(),
    "bfloat16": lambda model: model.bfloat16(),
    "float64": lambda model: model.double(),
    "to": lambda model: model.to(torch.bfloat16),
    "to both": lambda model: model.to("cpu", torch.float16),
    "type": lambda model: model.type(torch.float16),
}


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
def test_a_cast_of_the_model_leaves_weight_and_scales(cast: Any) -> None:
    model = nn.Sequential(layer(64, 48), nn.Linear(48, 3))
    of = model[0]
    weight, scales, (kept, kept_scales) = of.weight.clone(), of.SCB.clone(), (of.weight, of.SCB)
    cast(model)
    assert of.weight is kept
    assert of.SCB is kept_scales
    assert torch.equal(of.weight, weight)
    assert of.weight.dtype == torch.int8
    assert torch.equal(of.SCB, scales)
    assert of.SCB.dtype == torch.float32
    assert of.bias.dtype == model[1].weight.dtype != torch.float32
    x = torch.randn(2, 64, dtype=model[1].weight.dtype)
    assert model(x).dtype == x.dtype


def test_a_module_on_meta_comes_and_goes() -> None:
    with torch.device("meta"):
        of = Int8Linear(6, 4, dtype=torch.bfloat16)
    assert of.half().SCB.dtype == torch.float32
    assert {parameter.device.type for parameter in of.parameters()} == {"meta"}
    assert of.state_dict()["weight_format"].item() == 0
    of.to_empty(device="cpu")
    of.requires_grad_(True)
    assert [str(p.device) for p in of.parameters()] == ["cpu"] * 3
    assert (of.weight.dtype, of.SCB.dtype) == (torch.int8, torch.float32)
    of.load_state_dict(layer(6, 4).state_dict())
    assert of(torch.ones(2, 6)).isfinite().all()
    assert of.to("meta").weight.is_meta
    assert of.weight.dtype == torch.int8


def test_a_model_may_be_made_to_require_gradients() -> None:
    model = nn.Sequential(layer(6, 4), nn.Linear(4, 3))
    for again in (model, model.to("meta").to_empty(device="cpu"), pickle.loads(pickle.dumps(model)), model.double()):
        again.requires_grad_(True)
        wants = {name for name, parameter in again.named_parameters() if parameter.requires_grad}
        assert wants == {"0.bias", "1.weight", "1.bias"}
        again.requires_grad_(False)
        assert not any(parameter.requires_grad for parameter in again.parameters())


def test_parameters_that_are_put_in_stay_frozen_and_stay_themselves() -> None:
    first, second = layer(6, 4), layer(6, 4)
    shared, scales = nn.Parameter(first.weight.data.clone(), requires_grad=False), nn.Parameter(torch.ones(4))
    for of in (first, second):
        of.weight, of.SCB = shared, scales
        of.requires_grad_(True)
    assert first.weight is second.weight is shared
    assert not scales.requires_grad


def test_the_names_are_those_of_the_attributes() -> None:
    assert [name for name, _ in layer(6, 4).named_parameters()] == ["weight", "SCB", "bias"]
    assert [name for name, _ in layer(6, 4, bias=False).named_parameters()] == ["weight", "SCB"]
    assert repr(layer(6, 4)) == "Int8Linear(in_features=6, out_features=4, bias=True)"


def _saved(of: Int8Linear) -> Int8Linear:
    file = io.BytesIO()
    torch.save(of, file)
    file.seek(0)
    return torch.load(file, weights_only=False)  # type: ignore[no-any-return]


def _state(of: Int8Linear) -> Int8Linear:
    file = io.BytesIO()
    torch.save(of.state_dict(), file)
    file.seek(0)
    fresh_one = Int8Linear(of.in_features, of.out_features, of.bias is not None)
    fresh_one.load_state_dict(torch.load(file, weights_only=True))
    return fresh_one


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda of: pickle.loads(pickle.dumps(of)),
    "save": _saved,
    "state": _state,
}


@pytest.mark.parametrize("way", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("bias", [True, False])
def test_a_copy_is_the_same_layer(way: Any, bias: bool) -> None:
    of = layer(6, 4, bias)
    again = way(of)
    x = torch.randn(3, 6)
    assert torch.equal(again(x), of(x))
    assert again.weight is not of.weight
    assert (again.weight.dtype, again.SCB.dtype) == (torch.int8, torch.float32)
    again.requires_grad_(True)
    assert not again.SCB.requires_grad


@pytest.mark.parametrize("assign", [True, False])
@pytest.mark.parametrize("written", [torch.tensor(0, dtype=torch.uint8), None, 0, "row"], ids=str)
def test_the_format_of_the_weight_is_taken_with_the_state(written: Any, assign: bool) -> None:
    of = nn.Sequential(layer(6, 4))
    state = of.state_dict()
    assert state["0.weight_format"].dtype == torch.uint8
    if written is None:
        del state["0.weight_format"]
    else:
        state["0.weight_format"] = written
    again = nn.Sequential(Int8Linear(6, 4))
    assert again.load_state_dict(state, assign=assign) == ([], [])
    again.requires_grad_(True)
    assert torch.equal(again(torch.ones(6)), of(torch.ones(6)))


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("weight_format", torch.tensor(2, dtype=torch.uint8), r"0\.weight_format: expected 0 .*, found 2"),
        ("weight_format", "col32", r"0\.weight_format: expected 0 .*, found 'col32'"),
        ("weight", torch.zeros(4, 6), r"0\.weight: expected torch.int8, found torch.float32"),
        ("SCB", torch.zeros(4, dtype=torch.float16), r"0\.SCB: expected torch.float32, found torch.float16"),
        ("SCB", torch.zeros(5), "size mismatch for 0.SCB"),
    ],
)
def test_another_state_is_refused_by_the_name_of_its_key(key: str, value: Any, text: str) -> None:
    of = nn.Sequential(layer(6, 4))
    before = copy.deepcopy(of.state_dict())
    with pytest.raises(RuntimeError, match=text):
        of.load_state_dict({**before, f"0.{key}": value}, strict=False)
    assert torch.equal(of[0].weight, before["0.weight"])


def test_keys_that_are_missing_are_said_to_be() -> None:
    assert Int8Linear(6, 4).load_state_dict({}, strict=False).missing_keys == ["weight", "SCB", "bias"]


def test_state_dicts_go_to_bitsandbytes_and_come_back() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    source = nn.Linear(64, 48)
    theirs = bnb.nn.Linear8bitLt(64, 48, has_fp16_weights=False)
    theirs.load_state_dict(source.state_dict())
    theirs = theirs.to("cpu")
    state = theirs.state_dict()
    ours = Int8Linear(64, 48)
    ours.load_state_dict(state)
    mine = ours.state_dict()
    assert mine.keys() == state.keys()
    for key, tensor in state.items():
        assert torch.equal(mine[key], tensor)
        assert mine[key].dtype == tensor.dtype
    x = torch.randn(5, 64)
    torch.testing.assert_close(ours(x), theirs(x), rtol=0.05, atol=0.05)
    blank = bnb.nn.Linear8bitLt(64, 48, has_fp16_weights=False)
    blank.load_state_dict(nn.Linear(64, 48).state_dict())
    blank = blank.to("cpu")
    blank.load_state_dict(mine)
    assert torch.equal(blank.weight.data, ours.weight)
    assert torch.equal(blank(x), theirs(x))
