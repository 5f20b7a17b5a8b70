"""What people do with a model after it is loaded works, and gives what a model of `from_pretrained` gives."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import io
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tiny_models import inputs_of, model_class, new_model, outputs_of, same

import lowmem

accelerate = pytest.importorskip("accelerate")
transformers = pytest.importorskip("transformers")

FLAT = {
    "model.embed_tokens": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.layers.2": "cpu",
    "model.norm": "cpu",
    "model.rotary_emb": "cpu",
    "lm_head": "cpu",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    new_model("llama").save_pretrained(tmp_path / "m")
    return tmp_path / "m"


def theirs(folder: Path, **options: Any) -> Any:
    return model_class(folder).from_pretrained(folder, dtype="auto", **options)


def keys_of(folder: Path) -> dict[str, torch.Tensor]:
    held = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            held.update({key: opened.get_tensor(key) for key in opened.keys()})  # noqa: SIM118
    return held


def assert_same_files(found: Path, expected: Path) -> None:
    """The same keys and tensors, in whatever shards."""
    ours, own = keys_of(found), keys_of(expected)
    assert ours.keys() == own.keys()
    assert all(same(ours[key], own[key]) for key in own)


# Running


@pytest.mark.parametrize("options", [{}, {"residency": "copy"}, {"device_map": FLAT}, {"dtype": "bfloat16"}])
@pytest.mark.parametrize("sampling", [{}, {"do_sample": True, "temperature": 0.8, "top_k": 20}, {"num_beams": 3}])
def test_generate_gives_the_same_tokens(options: dict[str, Any], sampling: dict[str, Any], folder: Path) -> None:
    ours = lowmem.load(folder, **options).model
    other = theirs(folder).to(torch.bfloat16) if "dtype" in options else theirs(folder)
    tokens = []
    for model in (ours, other):
        torch.manual_seed(11)
        tokens.append(model.generate(**inputs_of(model), max_new_tokens=12, **sampling))
    assert torch.equal(*tokens)
    assert tokens[0].shape[1] > inputs_of(other)["input_ids"].shape[1]


@pytest.mark.parametrize("kind", ["t5", "gpt2", "gemma"])
def test_generate_of_other_kinds_gives_the_same_tokens(kind: str, tmp_path: Path) -> None:
    new_model(kind).save_pretrained(tmp_path)
    tokens = []
    for model in (lowmem.load(tmp_path).model, theirs(tmp_path)):
        batch = {k: v for k, v in inputs_of(model).items() if not k.startswith("decoder")}
        tokens.append(model.generate(**batch, max_new_tokens=8))
    assert torch.equal(*tokens)


def make_tokenizer() -> Any:
    tokenizers = pytest.importorskip("tokenizers")
    words = {word: number for number, word in enumerate(["<pad>", "<eos>", "<bos>", "a", "b", "c", "d", "e"])}
    words.update({f"w{number}": number for number in range(len(words), 96)})
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="a"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


@pytest.mark.parametrize(
    ("kind", "task", "text"),
    [("llama", "text-generation", "a b w20"), ("bert", "feature-extraction", "a w9"), ("gpt2", "text-generation", "c")],
)
def test_a_pipeline_takes_the_model(kind: str, task: str, text: str, tmp_path: Path) -> None:
    new_model(kind).save_pretrained(tmp_path)
    options = {"max_new_tokens": 6, "do_sample": False} if task == "text-generation" else {}
    told = []
    for model in (lowmem.load(tmp_path).model, theirs(tmp_path)):
        tokenizer = make_tokenizer()
        told.append(transformers.pipeline(task, model=model, tokenizer=tokenizer, device="cpu")(text, **options))
    assert told[0] == told[1]


def test_a_pipeline_takes_a_model_with_layers_on_disk(folder: Path) -> None:
    model = lowmem.load(folder, device_map=FLAT).model
    pipe = transformers.pipeline("text-generation", model=model, tokenizer=make_tokenizer())
    plain = transformers.pipeline("text-generation", model=theirs(folder), tokenizer=make_tokenizer(), device="cpu")
    options = {"max_new_tokens": 5, "do_sample": False}
    assert pipe("a b", **options) == plain("a b", **options)


def test_a_deep_copy_and_a_cast_leave_the_checkpoint_as_it_is(folder: Path) -> None:
    before = (folder / "model.safetensors").read_bytes()
    model = lowmem.load(folder).model
    other = copy.deepcopy(model).to(torch.float64)
    with torch.no_grad():
        for parameter in (*other.parameters(), *model.parameters()):
            parameter.zero_()
    assert (folder / "model.safetensors").read_bytes() == before


def through_torch(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def doubled(model: Any) -> Any:
    model.load_state_dict({key: value * 2 for key, value in model.state_dict().items()})
    return model


def resized(model: Any) -> Any:
    model.resize_token_embeddings(100, mean_resizing=False)
    model.resize_token_embeddings(96, mean_resizing=False)
    return model


@pytest.mark.parametrize(
    "change",
    [
        through_torch,
        doubled,
        resized,
        lambda model: pickle.loads(pickle.dumps(model)),
        lambda model: model.share_memory(),
        lambda model: model.to(torch.bfloat16),
        lambda model: accelerate.Accelerator(cpu=True).prepare(model),
    ],
    ids=["torch.save", "load_state_dict", "resize", "pickle", "share_memory", "to", "prepare"],
)
def test_what_is_done_to_a_model_gives_the_same(change: Callable[[Any], Any], folder: Path) -> None:
    before = (folder / "model.safetensors").read_bytes()
    ours, other = change(lowmem.load(folder).model), change(theirs(folder))
    assert same(outputs_of(ours), outputs_of(other))
    assert (folder / "model.safetensors").read_bytes() == before


# Saving


@pytest.mark.parametrize("kind", ["llama", "llama-tied", "gpt2", "t5", "bert-mlm", "vit"])
@pytest.mark.parametrize("options", [{}, {"residency": "copy"}], ids=["map", "copy"])
def test_what_is_saved_again_is_the_checkpoint(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    new_model(kind).save_pretrained(tmp_path / "m")
    lowmem.load(tmp_path / "m", **options).model.save_pretrained(tmp_path / "out")
    assert_same_files(tmp_path / "out", tmp_path / "m")
    for name in ("config.json", "generation_config.json"):
        if (tmp_path / "m" / name).exists():
            assert (tmp_path / "out" / name).read_text() == (tmp_path / "m" / name).read_text()


def test_layers_on_disk_are_saved_into_another_folder(folder: Path, tmp_path: Path) -> None:
    lowmem.load(folder, device_map=FLAT).model.save_pretrained(tmp_path / "out", max_shard_size="20KB")
    assert_same_files(tmp_path / "out", folder)


@pytest.mark.parametrize("shards", ["20KB", "1GB"])
@pytest.mark.parametrize("again", ["20KB", "30KB", "1GB"])
@pytest.mark.parametrize("change", [0.0, 1.0])
def test_saving_over_the_files_that_are_mapped_destroys_nothing(
    shards: str, again: str, change: float, tmp_path: Path
) -> None:
    """transformers replaces the files, and what is mapped stays what it was."""
    own = new_model("llama")
    own.save_pretrained(tmp_path / "m", max_shard_size=shards)
    model = lowmem.load(tmp_path / "m").model
    with torch.no_grad():
        for module in (own, model):
            next(module.parameters()).add_(change)
    own.save_pretrained(tmp_path / "expected")
    expected = outputs_of(own.eval())
    model.save_pretrained(tmp_path / "m", max_shard_size=again)
    assert same(outputs_of(model), expected)
    del model
    assert same(outputs_of(lowmem.load(tmp_path / "m").model), expected)
    # Shards that are saved beside a whole file leave it there, old as it is; the index is the newer one.
    found, saved = (dict(lowmem.stream(tmp_path / name)) for name in ("m", "expected"))
    assert found.keys() == saved.keys()
    assert all(same(found[key], saved[key]) for key in saved)


def test_a_model_without_a_checkpoint_left_can_be_saved(folder: Path, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    shutil.copytree(folder, kept)
    model = lowmem.load(folder, residency="copy").model
    shutil.rmtree(folder)
    model.save_pretrained(tmp_path / "out")
    assert_same_files(tmp_path / "out", kept)


# Training


def trained(model: Any, tmp_path: Path) -> Any:
    """Two steps of a seeded Trainer."""
    rows = [{"input_ids": row, "labels": row} for row in inputs_of(model)["input_ids"]] * 4
    arguments = transformers.TrainingArguments(
        str(tmp_path / "run"), max_steps=2, per_device_train_batch_size=4, learning_rate=0.01, use_cpu=True,
        report_to=[], save_strategy="no", seed=5, disable_tqdm=True,
    )  # fmt: skip
    transformers.Trainer(model=model, args=arguments, train_dataset=rows).train()
    return model


@pytest.mark.parametrize("residency", ["map", "copy"])
def test_a_trainer_trains_what_was_loaded_and_not_the_files(residency: str, folder: Path, tmp_path: Path) -> None:
    before = (folder / "model.safetensors").read_bytes()
    ours = trained(lowmem.load(folder, residency=residency).model, tmp_path)
    other = trained(theirs(folder), tmp_path)
    untrained = theirs(folder).state_dict()
    for name, tensor in other.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor), name
    assert not all(torch.equal(untrained[name], tensor) for name, tensor in ours.state_dict().items())
    assert (folder / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("residency", ["map", "copy"])
def test_gradients_are_the_same(residency: str, folder: Path) -> None:
    gradients = []
    for model in (lowmem.load(folder, residency=residency).model, theirs(folder)):
        batch = inputs_of(model)
        model(**batch, labels=batch["input_ids"]).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradients[0][name], value) for name, value in gradients[1].items())


# peft


@pytest.fixture
def peft() -> Any:
    # peft imports torch.distributed and more: by its name only where it is there.
    if importlib.util.find_spec("peft") is None:
        pytest.skip("peft is not installed")
    return importlib.import_module("peft")


def with_lora(model: Any, peft: Any) -> Any:
    torch.manual_seed(3)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    return peft.get_peft_model(model, config)


@pytest.mark.parametrize("options", [{}, {"residency": "copy"}], ids=["map", "copy"])
def test_lora_trains_on_what_was_loaded(options: dict[str, Any], folder: Path, peft: Any, tmp_path: Path) -> None:
    losses = []
    for number, model in enumerate((lowmem.load(folder, **options).model, theirs(folder))):
        adapted = with_lora(model, peft).eval()
        optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], 0.1)
        batch = inputs_of(model)
        for _ in range(2):
            loss = adapted(**batch, labels=batch["input_ids"]).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        adapted.save_pretrained(tmp_path / f"adapter{number}")
    assert losses[:2] == losses[2:]
    assert losses[0] != losses[1]
    assert_same_files(tmp_path / "adapter0", tmp_path / "adapter1")
    again = peft.PeftModel.from_pretrained(lowmem.load(folder).model, tmp_path / "adapter0").eval()
    assert same(outputs_of(again), outputs_of(adapted))
    merged = again.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    assert same(outputs_of(lowmem.load(tmp_path / "merged").model), outputs_of(merged.eval()))


def test_lora_beside_layers_on_disk(folder: Path, peft: Any, tmp_path: Path) -> None:
    """On layers that are not: peft gives the adapters of those that are memory that nobody has filled."""
    found = []
    for model in (
        lowmem.load(folder, device_map=FLAT).model,
        theirs(folder, device_map=FLAT, offload_folder=tmp_path / "off"),
    ):
        torch.manual_seed(3)
        config = peft.LoraConfig(r=4, target_modules=["q_proj"], layers_to_transform=[0, 2], init_lora_weights=False)
        found.append(outputs_of(peft.get_peft_model(model.eval(), config).eval()))
    assert same(*found)


def test_an_adapter_beside_the_weights_is_put_on_as_the_warning_says(folder: Path, peft: Any) -> None:
    with_lora(theirs(folder), peft).save_pretrained(folder)
    result = lowmem.load(folder)
    assert any("peft.PeftModel.from_pretrained(result.model, FOLDER)" in warning for warning in result.plan.warnings)
    adapted = peft.PeftModel.from_pretrained(result.model, folder).eval()
    # from_pretrained puts it on by itself where peft is installed.
    assert same(outputs_of(adapted), outputs_of(theirs(folder).eval()))


# accelerate


@pytest.mark.parametrize(
    ("device_map", "options"),
    [
        (FLAT, {}),
        ({"": "disk"}, {}),
        ({"": "cpu"}, {}),
        ("cpu", {}),
        ("auto", {}),
        (None, {}),
        ("auto", {"max_memory": {"cpu": 60_000}}),
        ("sequential", {"max_memory": {"cpu": 80_000}}),
    ],
)
def test_the_device_map_is_left_on_the_model_as_accelerate_leaves_it(
    device_map: Any, options: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    ours = lowmem.load(folder, device_map=device_map, dispatch="accelerate", **options).model
    try:
        other = theirs(folder, device_map=device_map, offload_folder=tmp_path / "off", **options)
    except ValueError as error:
        if "offload the whole model to the disk" not in str(error):
            raise
        # Theirs before accelerate 1.15.
        other = theirs(folder, device_map="cpu")
        assert ours.hf_device_map == {"": "disk"}
        assert same(outputs_of(ours), outputs_of(other))
        return
    assert getattr(ours, "hf_device_map", None) == getattr(other, "hf_device_map", None)
    assert same(outputs_of(ours), outputs_of(other))


@pytest.mark.parametrize("change", [lambda m: m.to("cpu"), lambda m: m.float().to("meta")])
def test_by_accelerates_hooks_a_model_with_layers_on_disk_refuses_moves_as_theirs_does(
    change: Callable[[Any], Any], folder: Path, tmp_path: Path
) -> None:
    """Ours without hooks refuses what would change something, see test_running_users.py."""
    said = []
    for model in (
        lowmem.load(folder, device_map=FLAT, dispatch="accelerate").model,
        theirs(folder, device_map=FLAT, offload_folder=tmp_path / "off"),
    ):
        try:
            change(model)
            said.append("")
        except (RuntimeError, ValueError, NotImplementedError) as error:
            said.append(str(error))
    assert said[0] == said[1]
