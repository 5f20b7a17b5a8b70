"""A model whose weights are on disk computes what the same model computes in memory, bit for bit."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pickled_checkpoints import pickle_folder
from safetensors.torch import save_file
from tiny_models import inputs_of, model_class, new_model, outputs_of, same
from torch import nn
from torch.nn import functional

pytest.importorskip("transformers")

import transformers

import lowmem
from lowmem.errors import BudgetError

pytestmark = pytest.mark.usefixtures("one_thread", "quiet")

Folder = Callable[..., Path]
# Where the weights are: all of them on disk, and about half, embeddings and heads among those.
HALF: dict[str, dict[str, str]] = {
    "llama": {"": "cpu", "model.embed_tokens": "disk", "model.layers.0": "disk", "model.layers.2": "disk"},
    "llama-tied": {"": "disk", "model.layers.1": "cpu"},
    "qwen3-moe": {"": "cpu", "model.layers.1": "disk", "lm_head": "disk"},
    "t5": {"": "cpu", "encoder.block.1": "disk", "decoder": "disk"},
    "gpt2": {"": "cpu", "transformer.h.1": "disk", "transformer.h.2": "disk"},
    "bert": {"": "cpu", "embeddings": "disk", "encoder.layer.0": "disk", "encoder.layer.2": "disk"},
    "vit": {"": "cpu", "vit.embeddings": "disk", "vit.layers.1": "disk"},
    "whisper": {"": "cpu", "model.encoder": "disk", "model.decoder.layers.0": "disk"},
}
WHERE = ["all", "half"]
# As stored and as asked for.
DTYPES = [("float32", "float32"), ("bfloat16", "bfloat16"), ("bfloat16", "float32"), ("float32", "bfloat16")]


def map_of(kind: str, where: str) -> dict[str, str]:
    return {"": "disk"} if where == "all" else HALF[kind]


@pytest.fixture(scope="module")
def stored(saved: Folder, tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """`stored("llama", "bfloat16", "bin")`: the model in that layout. "fused" is the model's own, experts in one."""

    @functools.cache
    def make(kind: str, dtype: str = "float32", layout: str = "safetensors") -> Path:
        if kind == "whisper":
            return whisper(tmp_path_factory.mktemp("whisper"), dtype)
        if layout == "safetensors":
            return saved(kind, dtype)
        folder = tmp_path_factory.mktemp(f"{kind}-{layout}")
        if layout == "bin":
            return pickle_folder(saved(kind, dtype), folder / "bin")
        new_model(kind, dtype).save_pretrained(folder, save_original_format=False)
        return folder

    return make


def whisper(folder: Path, dtype: str) -> Path:
    config = transformers.WhisperConfig(
        vocab_size=96, num_mel_bins=8, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_source_positions=32,
        max_target_positions=40, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=3,
        suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    torch.manual_seed(7)
    model = transformers.WhisperForConditionalGeneration(config).to(getattr(torch, dtype))
    model.generation_config = transformers.GenerationConfig(
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=3
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape).to(parameter.dtype) * 0.05)
    model.save_pretrained(folder)
    return folder


def theirs(folder: Path, dtype: str = "auto", **options: Any) -> Any:
    return model_class(folder).from_pretrained(folder, dtype=dtype, **options)


def tokens_of(model: Any, **options: Any) -> torch.Tensor:
    """32 tokens, whatever the model thinks of ending."""
    batch = {k: v for k, v in inputs_of(model).items() if not k.startswith("decoder")}
    given = {"max_new_tokens": 32, "min_new_tokens": 32, "do_sample": False, "pad_token_id": 0, **options}
    tokens: torch.Tensor = model.generate(**batch, **given)
    assert tokens.shape[1] == given["max_new_tokens"] + (1 if model.config.is_encoder_decoder else 7)
    return tokens


Expected = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]


@pytest.fixture(scope="module")
def expected(stored: Folder) -> Expected:
    """Logits and tokens of the model in memory."""

    @functools.cache
    def of(kind: str, source: str, dtype: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        model = theirs(stored(kind, source), dtype)
        return outputs_of(model), tokens_of(model) if model.can_generate() else None

    return of


def check_gives(model: Any, wanted: tuple[torch.Tensor, torch.Tensor | None]) -> None:
    """The logits twice, as the order is learned at the first; then the tokens; then the logits again."""
    logits, tokens = wanted
    for _ in range(2):
        assert same(outputs_of(model), logits)
    if tokens is not None:
        assert torch.equal(tokens_of(model), tokens)
        assert same(outputs_of(model), logits)


# -- transformers


MAIN = [
    *[(kind, "safetensors", *pair) for kind in ("llama", "qwen3-moe") for pair in DTYPES],
    *[("qwen3-moe", "fused", *pair) for pair in DTYPES[:3]],
    ("llama-tied", "safetensors", *DTYPES[1]),
    ("llama-tied", "safetensors", *DTYPES[2]),
    ("llama", "bin", *DTYPES[1]),
    ("llama", "bin", *DTYPES[2]),
    ("qwen3-moe", "bin", *DTYPES[3]),
]


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize(("kind", "layout", "source", "dtype"), MAIN, ids=["-".join(case) for case in MAIN])
def test_logits_and_tokens_are_those_of_the_loaded_model(
    kind: str, layout: str, source: str, dtype: str, where: str, stored: Folder, expected: Expected
) -> None:
    """Mapped where nothing changes, else cast and put together at use."""
    result = lowmem.load(stored(kind, source, layout), dtype=dtype, device_map=map_of(kind, where))
    assert "disk" in result.plan.device_map.values()
    assert result.plan.bytes_written == 0
    check_gives(result.model, expected(kind, source, dtype))


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize(
    ("kind", "source", "dtype"),
    [("llama-tied", *DTYPES[2]), ("llama", *DTYPES[3]), ("qwen3-moe", *DTYPES[1]), ("qwen3-moe", *DTYPES[2])],
)
def test_so_they_are_from_an_offload_folder(
    kind: str, source: str, dtype: str, where: str, stored: Folder, expected: Expected, tmp_path: Path
) -> None:
    """When it was written, and when it is found."""
    options: dict[str, Any] = {"dtype": dtype, "device_map": map_of(kind, where), "offload_folder": tmp_path / "off"}
    written, found = (lowmem.load(stored(kind, source), **options) for _ in range(2))
    assert written.plan.bytes_written > found.plan.bytes_written == 0
    check_gives(written.model, (expected(kind, source, dtype)[0], None))
    check_gives(found.model, expected(kind, source, dtype))


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["t5", "gpt2", "bert", "vit"])
def test_other_architectures_run_as_loaded(
    kind: str, dtype: str, where: str, stored: Folder, expected: Expected
) -> None:
    """As stored and cast at use: encoders, encoder and decoder, `Conv1D`, convolutions."""
    ours = lowmem.load(stored(kind), dtype=dtype, device_map=map_of(kind, where)).model
    check_gives(ours, expected(kind, "float32", dtype))


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize(("source", "dtype"), DTYPES[1:], ids=["-".join(pair) for pair in DTYPES[1:]])
def test_whisper_transcribes_as_loaded(source: str, dtype: str, where: str, stored: Folder) -> None:
    folder = stored("whisper", source)
    features = torch.randn(2, 8, 64, generator=torch.Generator().manual_seed(1)).to(getattr(torch, dtype))
    ours = lowmem.load(folder, dtype=dtype, device_map=map_of("whisper", where)).model
    tokens = [m.generate(features, max_new_tokens=32, min_new_tokens=32) for m in (ours, theirs(folder, dtype))]
    assert torch.equal(*tokens)
    assert tokens[0].shape[1] > 30


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("layout", ["safetensors", "fused"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("experts", ["eager", "grouped_mm", "batched_mm"])
def test_experts_compute_as_loaded_however_they_are_multiplied(
    experts: str, dtype: str, layout: str, where: str, stored: Folder
) -> None:
    """Put together and cast at use."""
    folder = stored("qwen3-moe", "bfloat16", layout)
    device_map = map_of("qwen3-moe", where)
    ours = lowmem.load(folder, dtype=dtype, device_map=device_map, experts_implementation=experts).model
    other = theirs(stored("qwen3-moe", "bfloat16"), dtype, experts_implementation=experts)
    for _ in range(2):
        assert same(outputs_of(ours), outputs_of(other))
    assert torch.equal(*(tokens_of(model, max_new_tokens=8, min_new_tokens=8) for model in (ours, other)))


RUNNING = [("llama", "bfloat16"), ("llama", "float32"), ("qwen3-moe", "bfloat16")]


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize(("kind", "dtype"), RUNNING)
def test_padded_batches_run_as_loaded(kind: str, dtype: str, where: str, stored: Folder) -> None:
    """Of several lengths and sizes, one after another."""
    folder = stored(kind, "bfloat16")
    ours = lowmem.load(folder, dtype=dtype, device_map=map_of(kind, where)).model
    other = theirs(folder, dtype)
    generator = torch.Generator().manual_seed(2)
    for rows, length in ((3, 9), (1, 1), (5, 4), (3, 9)):
        ids = torch.randint(3, 96, (rows, length), generator=generator)
        mask = (torch.arange(length) >= torch.arange(rows)[:, None] % length).long()
        ids = ids * mask
        with torch.no_grad():
            assert same(*(m(input_ids=ids, attention_mask=mask).logits for m in (ours, other)))
        options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
        assert torch.equal(*(m.generate(ids, attention_mask=mask, **options) for m in (ours, other)))


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize(("kind", "dtype"), RUNNING)
def test_beams_and_samples_are_those_of_the_loaded_model(kind: str, dtype: str, where: str, stored: Folder) -> None:
    folder = stored(kind, "bfloat16")
    ours = lowmem.load(folder, dtype=dtype, device_map=map_of(kind, where)).model
    other = theirs(folder, dtype)
    assert torch.equal(
        *(tokens_of(model, num_beams=3, max_new_tokens=12, min_new_tokens=12) for model in (ours, other))
    )
    tokens = []
    for model in (ours, other):
        torch.manual_seed(11)
        options = {"do_sample": True, "temperature": 0.8, "top_k": 20, "max_new_tokens": 12, "pad_token_id": 0}
        tokens.append(model.generate(**inputs_of(other), **options))
    assert torch.equal(*tokens)


MODES: dict[str, Callable[[], Any]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "neither": contextlib.nullcontext,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


@pytest.mark.parametrize(("kind", "dtype"), RUNNING)
def test_every_mode_of_autograd_gives_the_same(kind: str, dtype: str, stored: Folder) -> None:
    """One after another, in both orders: what one of them made must not trouble the next."""
    folder = stored(kind, "bfloat16")
    ours = lowmem.load(folder, dtype=dtype, device_map="disk").model
    other = theirs(folder, dtype)
    batch = inputs_of(other)
    for mode in (*MODES.values(), *reversed(MODES.values())):
        with mode():
            found, expected = ours(**batch).logits, other(**batch).logits
        assert same(found.detach(), expected.detach())


# -- modules of the user's own


class Recurrent(nn.Module):
    def __init__(self, cls: Any) -> None:
        super().__init__()
        self.layer = cls(12, 10, num_layers=2, bidirectional=True, batch_first=True)

    def forward(self, x: torch.Tensor) -> Any:
        return self.layer(x)[0]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.MultiheadAttention(12, 3, batch_first=True)

    def forward(self, x: torch.Tensor) -> Any:
        return self.layer(x, x, x)[0] + self.layer(x, x, x, need_weights=False)[0]


class NormedWeight(nn.Module):
    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.first = norm(nn.Linear(12, 9))
        self.second = norm(nn.Linear(9, 4))

    def forward(self, x: torch.Tensor) -> Any:
        return self.second(torch.tanh(self.first(x)))


class Listed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.several = nn.ParameterList([nn.Parameter(torch.randn(12, 12)) for _ in range(3)])
        self.named = nn.ParameterDict({"scale": nn.Parameter(torch.randn(12)), "shift": nn.Parameter(torch.randn(12))})

    def forward(self, x: torch.Tensor) -> Any:
        for weight in self.several:
            x = torch.tanh(x @ weight)
        return x * self.named["scale"] + self.named["shift"]


def ids_of(x: torch.Tensor) -> torch.Tensor:
    return (x.flatten(1).abs() * 7).long() % 20


class Embedded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 8, padding_idx=0)
        self.bag = nn.EmbeddingBag(20, 8, mode="mean")

    def forward(self, x: torch.Tensor) -> Any:
        ids = ids_of(x)
        return self.words(ids).sum(1) + self.bag(ids) * 3


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 12)
        self.body = nn.Linear(12, 12)
        self.head = nn.Linear(12, 20, bias=False)
        self.head.weight = self.words.weight

    def forward(self, x: torch.Tensor) -> Any:
        return self.head(self.body(self.words(ids_of(x))))


class Convolved(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Conv2d(1, 4, 3, padding=1)
        self.grouped = nn.Conv2d(4, 8, 3, groups=2)
        self.back = nn.ConvTranspose2d(8, 2, 2)
        self.line = nn.Conv1d(2, 3, 2)
        self.norm = nn.BatchNorm1d(3)
        self.slope = nn.PReLU(3)

    def forward(self, x: torch.Tensor) -> Any:
        y = self.back(self.grouped(self.plain(x[:, None])))
        return self.slope(self.norm(self.line(y.flatten(2))))


class Several(nn.Module):
    """Bilinear, norms, a bias that is no layer's, and a layer that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.twice = nn.Linear(12, 12)
        self.pair = nn.Bilinear(12, 12, 6)
        self.norm = nn.LayerNorm(6)
        self.shift = nn.Parameter(torch.randn(6))

    def forward(self, x: torch.Tensor) -> Any:
        once = torch.tanh(self.twice(x))
        return self.norm(self.pair(once, self.twice(once))) + self.shift


class Turning(nn.Module):
    """Layers in another order every second call, and an early exit at every third."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(12, 12) for _ in range(5))
        self.calls = 0

    def forward(self, x: torch.Tensor) -> Any:
        self.calls += 1
        layers = list(self.layers)
        for number, layer in enumerate(reversed(layers) if self.calls % 2 else layers):
            x = torch.tanh(layer(x))
            if self.calls % 3 == 0 and number == 2:
                break
        return x


class Borrowing(nn.Module):
    """Uses the weight of a module that it never calls, and reads a part of one."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(12, 12)
        self.inner = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12, bias=False))

    def forward(self, x: torch.Tensor) -> Any:
        y = functional.linear(x, self.other.weight, self.other.bias)
        y = y @ self.inner[0].weight[2:8].T + self.inner[0].bias[:6]
        stacked = torch.stack([self.inner[1].weight[0], self.inner[1].weight[-1]])
        return torch.cat([y, x @ stacked.T, x * self.inner[1].weight.mean()], -1)


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(12, 3, 16, batch_first=True, norm_first=True, activation=torch.tanh)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: torch.Tensor) -> Any:
        return self.layers(x)


PLAIN: dict[str, Callable[[], nn.Module]] = {
    "attention": Attention,
    "encoder": Encoder,
    "LSTM": lambda: Recurrent(nn.LSTM),
    "GRU": lambda: Recurrent(nn.GRU),
    "weight_norm": lambda: NormedWeight(torch.nn.utils.parametrizations.weight_norm),
    "old weight_norm": lambda: NormedWeight(torch.nn.utils.weight_norm),
    "lists": Listed,
    "embeddings": Embedded,
    "tied": Tied,
    "convolutions": Convolved,
    "several": Several,
    "turning": Turning,
    "borrowing": Borrowing,
}
PARTS = ["all", "first", "rest"]


def part_of(model: nn.Module, part: str) -> dict[str, str]:
    names = [name for name, child in model.named_children() if any(True for _ in child.parameters())]
    on_disk = names[:1] if part == "first" else names[1:]
    return {"": "disk"} if part == "all" else {"": "cpu", **dict.fromkeys(on_disk, "disk")}


def made(make: Callable[[], nn.Module], dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(5)
    return make().to(dtype).eval()


def write(model: nn.Module, file: Path) -> Path:
    state = {id(tensor): (name, tensor) for name, tensor in model.state_dict(keep_vars=True).items()}
    save_file({name: tensor.detach().contiguous() for name, tensor in state.values()}, file)
    return file


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated", "ignore::UserWarning:torch.nn.modules.rnn")
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize(("source", "dtype"), [DTYPES[0], DTYPES[2], DTYPES[3]], ids=["as stored", "up", "down"])
@pytest.mark.parametrize("kind", PLAIN)
def test_a_module_of_ones_own_computes_as_loaded(kind: str, source: str, dtype: str, part: str, tmp_path: Path) -> None:
    """Mapped where nothing changes, cast at use where the dtype does."""
    other = made(PLAIN[kind], getattr(torch, source))
    device_map = part_of(other, part)
    if device_map == {"": "cpu"}:
        pytest.skip("it has no second part")
    file = write(other, tmp_path / "m.safetensors")
    other.to(getattr(torch, dtype))
    ours = lowmem.load(file, model=PLAIN[kind], dtype=dtype, device_map=device_map).model
    generator = torch.Generator().manual_seed(1)
    for _ in range(6):
        x = torch.randn(2, 5, 12, generator=generator).to(getattr(torch, dtype))
        with torch.no_grad():
            assert torch.equal(ours(x), other(x))


def test_a_module_that_fails_computes_as_loaded_the_next_time(tmp_path: Path) -> None:
    """An error in the middle of a forward leaves nothing that the next one stumbles over."""
    other = made(Turning)
    file = write(other, tmp_path / "m.safetensors")
    ours: Any = lowmem.load(file, model=Turning, dtype="bfloat16", device_map="disk").model
    other.to(torch.bfloat16)
    for length in (12, 11, 12, 12, 3, 12):
        x = torch.ones(2, length, dtype=torch.bfloat16)
        if length == 12:
            with torch.no_grad():
                assert torch.equal(ours(x), other(x))
        else:
            for model in (ours, other):
                with pytest.raises(RuntimeError, match="shapes"):
                    model(x)


# -- any plain model


class Chain(nn.Module):
    """Layers after each other, and in another order at every second call where their sizes allow it."""

    def __init__(self, sizes: tuple[int, ...], words: int, norms: tuple[bool, ...]) -> None:
        super().__init__()
        self.words = nn.Embedding(words, sizes[0])
        self.layers = nn.ModuleList()
        for before, behind, norm in zip(sizes, sizes[1:], norms, strict=False):
            layer = nn.Linear(before, behind, bias=not norm)
            self.layers.append(nn.Sequential(layer, nn.LayerNorm(behind)) if norm else layer)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.words(ids)
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def least_ram(file: Path, **options: Any) -> int:
    """What the refusal says would do."""
    try:
        lowmem.plan(file, ram=1, **options)
    except BudgetError as error:
        return error.required
    raise AssertionError("a byte was enough")


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    sizes = tuple(draw(st.lists(st.integers(1, 40), min_size=2, max_size=6)))
    names = ["words", *(f"layers.{i}" for i in range(len(sizes) - 1))]
    places = draw(st.lists(st.sampled_from(["cpu", "disk"]), min_size=len(names), max_size=len(names)))
    dtypes = st.sampled_from(["float32", "bfloat16", "float16", "float64"])
    return {
        "sizes": sizes,
        "norms": tuple(draw(st.lists(st.booleans(), min_size=len(sizes), max_size=len(sizes)))),
        "words": draw(st.integers(1, 60)),
        "map": dict(zip(names, places, strict=True)),
        "source": draw(dtypes),
        "dtype": draw(dtypes),
        "more": draw(st.sampled_from([0, 1, 4096, 1 << 20, 1 << 30])),
        "offload": draw(st.booleans()),
    }


@pytest.fixture(scope="module")
def new_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Path]:
    return lambda: tmp_path_factory.mktemp("any")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=cases())
def test_any_model_on_any_map_within_any_ram_computes_as_loaded(
    case: dict[str, Any], new_folder: Callable[[], Path]
) -> None:
    def make() -> nn.Module:
        return Chain(case["sizes"], case["words"], case["norms"])

    folder = new_folder()
    other = made(make, getattr(torch, case["source"]))
    file = write(other, folder / "m.safetensors")
    other.to(getattr(torch, case["dtype"]))
    offload = folder / "off" if case["offload"] else None
    options: dict[str, Any] = {"model": make, "dtype": case["dtype"], "device_map": case["map"]}
    options["offload_folder"] = offload
    ours = lowmem.load(file, ram=least_ram(file, **options) + case["more"], **options).model
    generator = torch.Generator().manual_seed(1)
    for rows in (3, 1, 3):
        ids = torch.randint(0, case["words"], (rows, 4), generator=generator)
        with torch.no_grad():
            assert torch.equal(ours(ids), other(ids))


# -- what the map says


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_say_what_they_are(where: str, dtype: str, stored: Folder) -> None:
    """Names, shapes, dtypes, the device that computes, sizes and ties are those of the loaded model."""
    folder = stored("llama-tied")
    ours: Any = lowmem.load(folder, dtype=dtype, device_map=map_of("llama-tied", where)).model
    other = theirs(folder, dtype)
    found, expected = dict(ours.named_parameters()), dict(other.named_parameters())
    assert list(found) == list(expected)
    for name, parameter in found.items():
        assert isinstance(parameter, nn.Parameter), name
        for attribute in ("shape", "dtype", "device", "nbytes", "is_meta", "is_leaf", "requires_grad"):
            assert getattr(parameter, attribute) == getattr(expected[name], attribute), (name, attribute)
        assert parameter.stride() == expected[name].stride(), name
        assert parameter.is_contiguous(), name
    assert ours.lm_head.weight is ours.model.embed_tokens.weight
    assert (ours.dtype, ours.device) == (other.dtype, other.device)
    assert ours.num_parameters() == other.num_parameters()
    # What reads it would take the model for one with hooks, whose weights are not there.
    assert not hasattr(ours, "hf_device_map")
