"""`lowmem run`: the text that transformers gives, piece by piece, with its figures, and what is refused."""

from __future__ import annotations

import io
import json
import logging
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

import torch
import transformers
from fake_hub import repository
from tiny_models import change_config, model_class

import lowmem
from lowmem._terminal import write_text
from lowmem.cli import main
from lowmem.running import _room, run_prompt

Run = Callable[..., tuple[int, str, str]]
PROMPT = "w10 w20 w30 w11"
PROMPT_IDS = [10, 20, 30, 11]
TEMPLATE = (
    "{% for m in messages %}<s> {{ m.role }} {{ m.content }} {% endfor %}{% if add_generation_prompt %}w5{% endif %}"
)

pytestmark = pytest.mark.usefixtures("one_thread", "quiet")


def add_tokenizer(folder: Path, words: int = 96, **options: Any) -> Path:
    """Words w4, w5, … for tokens 4, 5, … behind four special ones, which are those of the tiny models' configs."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    specials = ["<pad>", "</s>", "<s>", "<unk>"]
    vocabulary = {word: i for i, word in enumerate([*specials, *(f"w{i}" for i in range(4, words))])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    named = {"pad_token": "<pad>", "eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, **{**named, **options}).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(own: Callable[..., Path]) -> Path:
    """A tiny Llama with a tokenizer."""
    return add_tokenizer(own("llama"))


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*argv: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(["run", *map(str, argv)])
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    return call


def expected(folder: Path, *, seed: int | None = None, **options: Any) -> list[int]:
    """The new tokens of transformers' own model."""
    model = model_class(folder).from_pretrained(folder)
    ids = torch.tensor([PROMPT_IDS])
    if seed is not None:
        torch.manual_seed(seed)
    made = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)[0].tolist()
    return made[1:] if model.config.is_encoder_decoder else made[len(PROMPT_IDS) :]


def as_text(ids: list[int]) -> str:
    return " ".join(f"w{i}" for i in ids if i > 3)


@pytest.mark.parametrize(
    ("kind", "argv"),
    [
        ("llama", ()),
        ("llama", ("--device-map", "disk")),
        ("llama", ("--residency", "copy", "--attn-implementation", "eager")),
        ("llama-tied", ("--device-map", "disk")),
        ("gpt2", ()),
        ("qwen3-moe", ("--device-map", "disk")),
        ("t5", ()),
        ("t5", ("--device-map", "disk")),
    ],
)
def test_the_text_is_transformers_own(kind: str, argv: tuple[str, ...], own: Callable[..., Path], run: Run) -> None:
    folder = add_tokenizer(own(kind))
    ids = expected(folder, do_sample=False, max_new_tokens=12)
    code, out, err = run(folder, "--prompt", PROMPT, "--max-new-tokens", 12, *argv)
    assert (code, out) == (0, as_text(ids) + "\n"), err
    shown = json.loads(run(folder, "--prompt", PROMPT, "--max-new-tokens", 12, *argv, "--json")[1])
    assert shown["ids"] == ids
    assert shown["text"] == as_text(ids)


def test_the_figures_come_on_stderr_at_the_end(folder: Path, run: Run) -> None:
    code, out, err = run(folder, "--prompt", PROMPT, "--max-new-tokens", 6)
    assert code == 0
    assert out == as_text(expected(folder, max_new_tokens=6)) + "\n"
    prompt, new, load, both = err.splitlines()
    assert prompt.startswith("prompt: 4 tokens, ")
    assert new.startswith("new: 6 tokens, ")
    assert "tokens/s" in prompt
    assert "tokens/s" in new
    assert "predicted" in load
    assert "measured" in load
    assert "resident" in both


def test_json_is_one_object_with_all_figures(folder: Path, run: Run) -> None:
    code, out, err = run(folder, "--prompt", PROMPT, "--max-new-tokens", 6, "--json")
    assert (code, err) == (0, "")
    shown = json.loads(out)
    assert shown["source"] == str(folder)
    assert shown["prompt_ids"] == PROMPT_IDS
    assert (shown["prompt_tokens"], shown["new_tokens"], len(shown["ids"])) == (4, 6, 6)
    assert all(shown["seconds"][name] > 0 for name in ("load", "first_token", "following"))
    assert shown["tokens_per_second"]["following"] == pytest.approx(5 / shown["seconds"]["following"])
    assert shown["tokens_per_second"]["prompt"] == pytest.approx(4 / shown["seconds"]["first_token"])
    assert shown["load"]["predicted_peak"] == lowmem.plan(folder).host.peak
    assert shown["peak"] >= shown["load"]["peak"]
    assert shown["peak_rss"] > shown["peak"]
    assert shown["warnings"] == []


def test_one_token_has_no_rate_behind_the_first(folder: Path, run: Run) -> None:
    argv = (folder, "--prompt", PROMPT, "--max-new-tokens", 1)
    assert json.loads(run(*argv, "--json")[1])["tokens_per_second"]["following"] is None
    assert "new: 1 tokens\n" in run(*argv)[2]


class Recorder(io.StringIO):
    """A stdout that notes what is done with it."""

    def __init__(self, terminal: bool = False) -> None:
        super().__init__()
        self.done: list[str] = []
        self._terminal = terminal

    def write(self, text: str) -> int:
        self.done.append(text)
        return len(text)

    def flush(self) -> None:
        if self.done and self.done[-1] is not FLUSHED:
            self.done.append(FLUSHED)

    def isatty(self) -> bool:
        return self._terminal


FLUSHED = "(flushed)"


def test_each_piece_is_written_and_flushed_when_it_comes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder()
    monkeypatch.setattr(sys, "stdout", recorder)
    assert main(["run", str(folder), "--prompt", PROMPT, "--max-new-tokens", "8"]) == 0
    pieces = recorder.done[::2]
    assert recorder.done[1::2] == [FLUSHED] * len(pieces)
    assert len(pieces) == 8
    assert "".join(pieces) == as_text(expected(folder, max_new_tokens=8)) + "\n"


def test_pieces_come_between_the_forwards(folder: Path) -> None:
    forwards, seen = [0], []

    def count(*_: object) -> None:
        forwards[0] += 1

    report = run_prompt(
        folder,
        PROMPT,
        max_new_tokens=8,
        loaded=lambda result: result.model.register_forward_hook(count) and None,
        write=lambda text: seen.append((forwards[0], text)),
    )
    assert [at for at, _ in seen] == [*range(2, 9), 8]
    assert "".join(text for _, text in seen) == report.text + "\n"


def test_stdin_is_the_prompt(folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{PROMPT}\n"))
    assert json.loads(run(folder, "--prompt", "-", "--json")[1])["prompt_ids"] == PROMPT_IDS
    # It was read to its end.
    code, out, err = run(folder, "--prompt", "-")
    assert (code, out) == (2, "")
    assert err.startswith("lowmem: prompt: expected text")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe"), encoding="utf-8"))
    code, _, err = run(folder, "--prompt", "-")
    assert code == 2
    assert "--prompt -: stdin cannot be read as text" in err


def test_chat_applies_the_template(own: Callable[..., Path], run: Run) -> None:
    folder = add_tokenizer(own("llama"), chat_template=TEMPLATE)
    argv = (folder, "--prompt", "w10 w20", "--max-new-tokens", 2, "--json")
    assert json.loads(run(*argv)[1])["prompt_ids"] == [10, 20]
    # <s>, the role (no word of its vocabulary), what was said, and what the template puts before the answer.
    assert json.loads(run(*argv, "--chat")[1])["prompt_ids"] == [2, 3, 10, 20, 5]


def test_sampling_is_transformers_own_with_the_same_seed(folder: Path, run: Run) -> None:
    argv = (folder, "--prompt", PROMPT, "--max-new-tokens", 12, "--json", "--sample", "--seed", 3)
    asked = ("--temperature", 0.7, "--top-p", 0.9)
    drawn = expected(folder, seed=3, do_sample=True, temperature=0.7, top_p=0.9, max_new_tokens=12)
    assert json.loads(run(*argv, *asked)[1])["ids"] == drawn
    assert json.loads(run(*argv)[1])["ids"] == expected(folder, seed=3, do_sample=True, max_new_tokens=12)


class Remarks(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


@pytest.mark.parametrize("sample", [False, True])
def test_transformers_remarks_nothing(sample: bool, folder: Path, run: Run, recwarn: pytest.WarningsRecorder) -> None:
    """Neither of pad tokens and masks, nor of a length and settings of sampling that the checkpoint brings."""
    (folder / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [1, 3], "max_length": 500, "do_sample": True, "temperature": 0.6, "num_beams": 3})
    )
    change_config(folder, pad_token_id=None)
    remarks, argv = Remarks(), ["--sample"] if sample else []
    transformers.logging.set_verbosity_warning()
    logging.getLogger("transformers").addHandler(remarks)
    try:
        code, _, err = run(folder, "--prompt", PROMPT, "--max-new-tokens", 6, "--json", *argv)
    finally:
        logging.getLogger("transformers").removeHandler(remarks)
    assert (code, err) == (0, "")
    assert remarks.said == []
    assert [str(warning.message) for warning in recwarn] == []


def test_beams_of_the_checkpoint_are_one(folder: Path, run: Run) -> None:
    greedy = expected(folder, num_beams=1, max_new_tokens=8)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 1, "num_beams": 4}))
    assert json.loads(run(folder, "--prompt", PROMPT, "--max-new-tokens", 8, "--json")[1])["ids"] == greedy


def test_a_checkpoint_without_generation_config_runs(folder: Path, run: Run) -> None:
    (folder / "generation_config.json").unlink()
    change_config(folder, pad_token_id=None, eos_token_id=None, bos_token_id=None)
    add_tokenizer(folder, pad_token=None)
    ids = expected(folder, max_new_tokens=8)
    assert json.loads(run(folder, "--prompt", PROMPT, "--max-new-tokens", 8, "--json")[1])["ids"] == ids


def test_a_stop_string_of_the_checkpoint_ends_the_text(own: Callable[..., Path], run: Run) -> None:
    from tokenizers import Tokenizer, decoders, models

    folder = own("llama")
    letters = {chr(33 + i): i for i in range(96)}
    made = Tokenizer(models.BPE(letters, []))
    made.decoder = decoders.Fuse()
    transformers.PreTrainedTokenizerFast(tokenizer_object=made).save_pretrained(folder)
    ids = expected(folder, max_new_tokens=8)
    stop = {"eos_token_id": 1, "stop_strings": [chr(33 + ids[3])]}
    (folder / "generation_config.json").write_text(json.dumps(stop))
    prompt = "".join(chr(33 + i) for i in PROMPT_IDS)
    code, out, err = run(folder, "--prompt", prompt, "--max-new-tokens", 8, "--json")
    assert code == 0, err
    assert json.loads(out)["ids"] == ids[: ids.index(ids[3]) + 1]


def test_files_subfolders_and_models_of_the_hub_bring_their_tokenizer(
    own: Callable[..., Path], tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = add_tokenizer(own("llama", shard="1GB"))
    expected_ids = expected(folder, max_new_tokens=4)
    files = {f"part/{path.name}": path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    repository(tmp_path / "hub", "org/name", files, ref="v1")
    for argv in (
        (folder / "model.safetensors",),
        (folder.parent, "--subfolder", folder.name),
        ("org/name", "--revision", "v1", "--subfolder", "part"),
    ):
        code, out, err = run(*argv, "--prompt", PROMPT, "--max-new-tokens", 4, "--json")
        assert code == 0, err
        assert json.loads(out)["ids"] == expected_ids


def test_no_more_tokens_than_positions(folder: Path, run: Run) -> None:
    code, out, err = run(folder, "--prompt", " ".join(["w10"] * 60), "--max-new-tokens", 10, "--json")
    assert code == 0
    shown = json.loads(out)
    assert shown["new_tokens"] <= 4
    assert any("max_new_tokens: 4 instead of 10" in warning for warning in shown["warnings"])
    assert "warning: max_new_tokens: 4 instead of 10" in err


@pytest.mark.parametrize(
    ("config", "most", "behind"),
    [
        # (the longest prompt, how many new tokens there is room for behind it)
        (transformers.GPT2Config(n_positions=16), 15, 1),
        (transformers.LlamaConfig(max_position_embeddings=16), 15, 1),
        # A decoder of its own has all positions but that of its first token.
        (transformers.BartConfig(max_position_embeddings=16), 16, 15),
        (
            transformers.EncoderDecoderConfig.from_encoder_decoder_configs(
                transformers.BertConfig(max_position_embeddings=16), transformers.GPT2Config(n_positions=8)
            ),
            16,
            7,
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_positions_bound_the_prompt_and_what_comes_behind(config: Any, most: int, behind: int) -> None:
    assert _room(config, most, 100) == behind
    with pytest.raises(lowmem.OptionError, match=f"expected at most {most} tokens"):
        _room(config, most + 1, 100)


def test_relative_positions_bound_nothing() -> None:
    for config in (transformers.T5Config(), transformers.MambaConfig()):
        assert _room(config, 10_000, 100) == 100


@pytest.mark.parametrize(
    ("argv", "code", "said"),
    [
        (("--prompt", ""), 2, "prompt: expected text for the model to go on with"),
        (("--prompt", " "), 2, "makes no token of ' '; give more text"),
        (("--prompt", "\udcff"), 2, "prompt: expected text in UTF-8"),
        (("--prompt", " ".join(["w10"] * 64)), 2, "at most 63 tokens, because the model has 64 positions, found 64"),
        (("--prompt", "x", "--max-new-tokens", "0"), 2, "max_new_tokens: expected a number from 1"),
        (("--prompt", "x", "--chat"), 2, "has no chat template (chat_template.jinja"),
        (("--prompt", "x", "--temperature", "0.5"), 2, "temperature: it is about drawing tokens"),
        (("--prompt", "x", "--top-p", "0.5"), 2, "top_p: it is about drawing tokens"),
        (("--prompt", "x", "--seed", "1"), 2, "seed: it is about drawing tokens"),
        (("--prompt", "x", "--sample", "--temperature", "0"), 2, "temperature: expected a number above 0"),
        (("--prompt", "x", "--sample", "--temperature", "nan"), 2, "temperature: expected a number above 0"),
        (("--prompt", "x", "--sample", "--top-p", "1.5"), 2, "top_p: expected a number above 0 and at most 1"),
        (("--prompt", "x", "--sample", "--seed", "-1"), 2, "seed: expected a number from 0"),
        (("--prompt", "x", "--auto-class", "AutoModel"), 1, "LlamaModel does not generate text"),
        (("--prompt", "x", "--model", "torch.nn:Identity"), 1, "Identity does not generate text"),
        (("--prompt", "x", "--ram", "lots"), 2, "ram: expected a size"),
        (("--prompt", "x", "--subfolder", "none"), 1, "subfolder none: no such folder"),
    ],
)
def test_what_cannot_be_done_is_refused_without_output(
    argv: tuple[str, ...], code: int, said: str, folder: Path, run: Run
) -> None:
    found, out, err = run(folder, *argv)
    assert (found, out) == (code, "")
    assert [line for line in err.splitlines() if line.startswith("lowmem: ")]
    assert said in err


def test_an_encoder_is_refused_before_it_is_loaded(
    own: Callable[..., Path], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = add_tokenizer(own("bert-mlm"))
    monkeypatch.setattr("lowmem.loader.load", lambda *_, **__: pytest.fail("it was loaded"))
    code, out, err = run(folder, "--prompt", PROMPT)
    assert (code, out) == (1, "")
    assert f"{folder}: BertForMaskedLM does not generate text" in err
    assert "--auto-class" in err


def test_pictures_are_no_prompt(own: Callable[..., Path], run: Run) -> None:
    folder = add_tokenizer(own("vit"))
    assert "ViTForImageClassification does not generate text" in run(folder, "--prompt", PROMPT)[2]


@pytest.mark.parametrize("kind", ["llama", "bert-mlm", "gpt2"])
def test_a_folder_without_tokenizer_is_refused(kind: str, own: Callable[..., Path], run: Run) -> None:
    folder = own(kind)
    for config in (None, {"tokenizer_class": "BertTokenizer"}):
        if config is not None:
            (folder / "tokenizer_config.json").write_text(json.dumps(config))
        code, out, err = run(folder, "--prompt", PROMPT)
        assert (code, out) == (1, "")
        assert f"{folder}: expected a tokenizer beside the weights (tokenizer.json, tokenizer.model" in err
        assert "copy its files there" in err


def test_a_damaged_tokenizer_is_named(folder: Path, run: Run) -> None:
    (folder / "tokenizer.json").write_text('{"model": ')
    code, out, err = run(folder, "--prompt", PROMPT)
    assert (code, out) == (1, "")
    assert f"lowmem: {folder}: transformers cannot make a tokenizer of what is there" in err


def test_a_tokenizer_of_bytes_needs_no_vocabulary(own: Callable[..., Path], run: Run) -> None:
    folder = own("t5")
    transformers.ByT5Tokenizer(extra_ids=0).save_pretrained(folder)
    for name in ("tokenizer.json", "added_tokens.json", "special_tokens_map.json"):
        (folder / name).unlink(missing_ok=True)
    code, out, err = run(folder, "--prompt", "AB", "--max-new-tokens", 2, "--json")
    assert code == 0, err
    assert json.loads(out)["prompt_ids"] == [ord("A") + 3, ord("B") + 3, 1]


def test_a_tokenizer_of_another_model_is_told(own: Callable[..., Path], run: Run) -> None:
    folder = add_tokenizer(own("llama"), words=200)
    code, out, err = run(folder, "--prompt", "w10 w150")
    assert (code, out) == (1, "")
    assert f"{folder}: the tokenizer makes token 150 of the prompt, and the model has 96" in err


def test_code_of_a_tokenizer_runs_only_when_it_may(folder: Path, run: Run) -> None:
    proof = folder.parent / "ran"
    (folder / "own_tokenizer.py").write_text(
        f"from transformers import PreTrainedTokenizerFast\nopen({str(proof)!r}, 'w').close()\n"
        "class Own(PreTrainedTokenizerFast):\n    pass\n"
    )
    path = folder / "tokenizer_config.json"
    table = json.loads(path.read_text())
    table |= {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": [None, "own_tokenizer.Own"]}}
    path.write_text(json.dumps(table))
    argv = (folder, "--prompt", PROMPT, "--max-new-tokens", 2, "--json")
    run(*argv)
    assert not proof.exists()
    assert json.loads(run(*argv, "--trust-remote-code")[1])["prompt_ids"] == PROMPT_IDS
    assert proof.exists()


def failing_forward(at: int, error: BaseException) -> Callable[[Any], None]:
    """Makes the forward number `at` of a loaded model raise."""
    count = [0]

    def hook(*_: object) -> None:
        count[0] += 1
        if count[0] == at:
            raise error

    return lambda result: result.model.register_forward_hook(hook) and None


def patched(monkeypatch: pytest.MonkeyPatch, change: Callable[[Any], None]) -> None:
    """What is loaded is changed before it generates."""
    import lowmem.loader

    load = lowmem.loader.load

    def loading(*args: Any, **options: Any) -> Any:
        result = load(*args, **options)
        change(result)
        return result

    monkeypatch.setattr("lowmem.loader.load", loading)


@pytest.mark.parametrize("as_json", [False, True])
def test_an_interrupt_leaves_what_was_generated(
    as_json: bool, folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = expected(folder, max_new_tokens=8)
    patched(monkeypatch, failing_forward(5, KeyboardInterrupt()))
    code, out, err = run(folder, "--prompt", PROMPT, *(["--json"] if as_json else []))
    assert code == 130
    assert out == ("" if as_json else as_text(ids[:4]) + "\n")
    *summary, last = err.splitlines()
    assert last.startswith("lowmem: interrupted")
    assert any(line.startswith("new: 4 tokens, ") for line in summary) is not as_json


def test_an_error_of_the_model_is_one_message(folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = expected(folder, max_new_tokens=8)
    patched(monkeypatch, failing_forward(3, RuntimeError("no such kernel")))
    code, out, err = run(folder, "--prompt", PROMPT)
    assert (code, out) == (1, as_text(ids[:2]) + "\n")
    assert err == "lowmem: LlamaForCausalLM: generating failed: RuntimeError: no such kernel\n"


def test_an_error_of_the_callers_function_is_passed_on(folder: Path) -> None:
    class OwnError(Exception):
        pass

    def write(_: str) -> None:
        raise OwnError("mine")

    with pytest.raises(OwnError, match="mine"):
        run_prompt(folder, PROMPT, write=write)


def test_a_reader_that_goes_away_ends_it_quietly(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Closed(io.StringIO):
        def write(self, _: str) -> int:
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stdout", Closed())
    assert main(["run", str(folder), "--prompt", PROMPT]) == 1
    assert capsys.readouterr().err == ""


def test_text_steers_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for terminal, shown in ((True, "a\ufffd[2J\n\tb\u200d"), (False, "a\x1b[2J\n\tb\u200d")):
        recorder = Recorder(terminal)
        monkeypatch.setattr(sys, "stdout", recorder)
        write_text("a\x1b[2J\n\tb\u200d")
        assert recorder.done == [shown, FLUSHED]


def test_a_model_that_the_caller_makes_runs(folder: Path) -> None:
    def make() -> Any:
        return transformers.LlamaForCausalLM(transformers.AutoConfig.from_pretrained(folder))

    report = run_prompt(folder, PROMPT, max_new_tokens=6, model=make)
    assert list(report.ids) == expected(folder, max_new_tokens=6)
    assert report.text == as_text(list(report.ids))
    assert len(report.prompt_ids) == 4


def test_an_option_that_load_does_not_have_is_refused(folder: Path) -> None:
    with pytest.raises(TypeError, match=r"dtpye.*Did you mean .dtype"):
        run_prompt(folder, PROMPT, dtpye="float32")


def test_without_transformers_it_is_said(folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    code, out, err = run(folder, "--prompt", PROMPT)
    assert (code, out) == (1, "")
    assert "install lowmem[transformers]" in err
    shutil.rmtree(folder)
