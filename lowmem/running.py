"""A prompt through a model: load it, generate, hand the text out as it comes, and measure speed and memory."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .checkpoint.survey import find
from .errors import LowmemError, ModelError, OptionError, SourceError
from .memory import Measurement, measure
from .report import LoadReport
from .sizes import shown
from .sources import Sources, whole_of

if TYPE_CHECKING:
    from .loader import LoadResult
    from .planner import ProgressCallback

_MOST_TOKENS = 10_000_000
_MOST_SEED = 2**63 - 1
# Where the tokenizers of transformers 5 keep their vocabularies; its class may make an empty one where none is there.
_VOCABULARIES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
)
_VOCABULARY_SUFFIXES = (".model", ".tiktoken", ".spm", ".codes", ".bpe", ".vocab", ".tokenizer")
_TOKENIZER_CONFIG = "tokenizer_config.json"


@dataclass(frozen=True, eq=False)
class RunReport:
    """What a prompt gave, how fast, and in how much memory. Sizes are bytes, times are seconds.

    Attributes:
        text: what was generated, without special tokens.
        ids: its tokens, special ones included.
        prompt_ids: the tokens of the prompt, with those that the tokenizer or the chat template puts around it.
        load: the load's report.
        first_seconds: from the beginning to the first token: all of the prompt, and one token.
        rest_seconds: from the first token to the last.
        memory: what generating used; see `peak` for load and generation together.
        warnings: what the load said, and what was done otherwise than asked.
    """

    text: str
    ids: tuple[int, ...]
    prompt_ids: tuple[int, ...] = field(repr=False)
    load: LoadReport = field(repr=False)
    first_seconds: float
    rest_seconds: float
    memory: Measurement = field(repr=False)
    warnings: tuple[str, ...] = ()

    @property
    def prompt_rate(self) -> float:
        """Tokens of the prompt per second, until the first new one."""
        return len(self.prompt_ids) / max(self.first_seconds, 1e-9)

    @property
    def rate(self) -> float | None:
        """New tokens per second behind the first; None where there is none."""
        return (len(self.ids) - 1) / max(self.rest_seconds, 1e-9) if len(self.ids) > 1 else None

    @property
    def peak(self) -> int:
        """Anonymous bytes that loading and generating added at the worst moment, as measured; imports are not in it."""
        highest = max(self.load.memory.peak_anonymous, self.memory.peak_anonymous)
        return max(0, highest - self.load.memory.baseline)

    @property
    def peak_rss(self) -> int:
        """Highest resident memory of the process: weights that are file pages and the interpreter are in it."""
        return max(self.load.memory.peak_rss, self.memory.peak_rss)

    def to_dict(self) -> dict[str, Any]:
        """Plain values; `lowmem run --json` prints them."""
        return {
            "source": self.load.plan.checkpoint.source,
            "text": self.text,
            "ids": list(self.ids),
            "prompt_ids": list(self.prompt_ids),
            "prompt_tokens": len(self.prompt_ids),
            "new_tokens": len(self.ids),
            "seconds": {"load": self.load.seconds, "first_token": self.first_seconds, "following": self.rest_seconds},
            "tokens_per_second": {"prompt": self.prompt_rate, "following": self.rate},
            "load": {"predicted_peak": self.load.predicted_peak, "peak": self.load.peak},
            "peak": self.peak,
            "peak_rss": self.peak_rss,
            "devices": {
                name: max(peak, self.load.memory.devices.get(name, 0)) for name, peak in self.memory.devices.items()
            },
            "warnings": list(self.warnings),
        }


@dataclass(frozen=True, slots=True)
class _Wish:
    """How to generate, as it was asked."""

    max_new_tokens: int
    sample: bool
    temperature: float | None
    top_p: float | None
    seed: int | None


class _Tell(NamedTuple):
    """Whom to tell."""

    write: Callable[[str], None] | None
    interrupted: Callable[[RunReport], None] | None


def run_prompt(
    source: Sources,
    prompt: str,
    *,
    max_new_tokens: int = 64,
    chat: bool = False,
    sample: bool = False,
    temperature: float | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    write: Callable[[str], None] | None = None,
    loaded: Callable[[LoadResult], None] | None = None,
    interrupted: Callable[[RunReport], None] | None = None,
    progress: ProgressCallback | None = None,
    **options: Any,
) -> RunReport:
    """Load a model that generates text, and its tokenizer from the same folder, and let it go on with a prompt.

    What can be refused before the load is: a folder without a tokenizer, a model that does not generate, a prompt that
    is too long for it. Of beams that the model's generation config asks for there is one, because text that is handed
    out cannot be taken back.

    Args:
        source: what `load` takes, with the files of a tokenizer beside the weights.
        prompt: what the model is to go on with.
        max_new_tokens: how many tokens at most; fewer where the model ends the text itself, or has no more positions.
        chat: put the prompt into the tokenizer's chat template, as what a user says.
        sample: draw tokens by their probability, as the model's generation config says. Default: always the likeliest
            one (greedy), which gives the same text each time.
        temperature: instead of the generation config's, with `sample`; above 0.
        top_p: likewise, above 0 and at most 1.
        seed: of torch's generators, which all of the process shares, with `sample`.
        write: gets the text as it comes, in whole words, and a newline behind the last; also what there is when an
            interrupt ends it.
        loaded: called with what `load` returned, before the first token.
        interrupted: called with the report of the tokens that there are when an interrupt (Ctrl-C) ends it; the
            interrupt is raised all the same.
        progress: called while the weights move.
        **options: all others of `load`.

    Raises:
        OptionError: a value that means nothing, a prompt that gives no token or more than the model has positions for,
            or `chat` where the tokenizer has no template.
        SourceError: no tokenizer is beside the weights.
        ModelError: the model does not generate text, the tokenizer is damaged or another model's, transformers is not
            installed, or generating fails.
        LowmemError: whatever `load` refuses.
    """
    wish = _asked(max_new_tokens, sample, temperature, top_p, seed)
    _check_prompt(prompt)
    _need_transformers()
    path, selection = whole_of(source, options)
    found = find(path, **selection)
    tokenizer = _tokenizer(found.folder, options.get("trust_remote_code") is True)
    ids = _encoded(tokenizer, prompt, chat, found.folder)
    known = _class_and_config(found.config, found.folder, options)
    if known is not None:
        _check_generates(*known, found.text)
        _room(known[1], ids.shape[1], wish.max_new_tokens)
    from .loader import load
    from .offload import release

    result = load(source, progress=progress, **options)
    try:
        if loaded is not None:
            loaded(result)
        return _run(result, tokenizer, ids, wish, _Tell(write, interrupted), found.text)
    finally:
        # Now, and not when the collector comes: an interrupt leaves no thread that reads ahead.
        release(result.model)


def _run(result: LoadResult, tokenizer: Any, ids: Any, wish: _Wish, tell: _Tell, where: str) -> RunReport:
    model: Any = result.model
    _check_generates(model, getattr(model, "config", None), where)
    room = _room(model.config, ids.shape[1], wish.max_new_tokens)
    warnings = list(result.plan.warnings)
    if room < wish.max_new_tokens:
        warnings.append(
            f"max_new_tokens: {room} instead of {wish.max_new_tokens}: the model has no more positions behind a "
            f"prompt of {ids.shape[1]} tokens"
        )
    stream = _Stream(tokenizer, tell.write)

    def report() -> RunReport:
        return RunReport(
            text=tokenizer.decode(stream.ids, skip_special_tokens=True),
            ids=tuple(stream.ids),
            prompt_ids=tuple(ids[0].tolist()),
            load=result.report,
            first_seconds=stream.first - started,
            rest_seconds=stream.last - stream.first,
            memory=memory,
            warnings=tuple(warnings),
        )

    try:
        with measure() as memory:
            started = time.perf_counter()
            _generate(model, tokenizer, ids, wish, room, stream)
    except KeyboardInterrupt:
        if tell.interrupted is not None and stream.ids:
            tell.interrupted(report())
        raise
    return report()


def _asked(
    max_new_tokens: int, sample: bool, temperature: float | None, top_p: float | None, seed: int | None
) -> _Wish:
    if not _is_whole(max_new_tokens, 1, _MOST_TOKENS):
        raise OptionError(f"max_new_tokens: expected a number from 1 to {_MOST_TOKENS}, found {shown(max_new_tokens)}")
    for name, value in (("temperature", temperature), ("top_p", top_p), ("seed", seed)):
        if value is not None and not sample:
            raise OptionError(
                f"{name}: it is about drawing tokens, and the likeliest are taken; give sample (--sample)"
            )
    if temperature is not None and not (_is_number(temperature) and temperature > 0):
        raise OptionError(
            f"temperature: expected a number above 0, found {shown(temperature)}; for the likeliest tokens leave it "
            "and sample out"
        )
    if top_p is not None and not (_is_number(top_p) and 0 < top_p <= 1):
        raise OptionError(f"top_p: expected a number above 0 and at most 1, found {shown(top_p)}")
    if seed is not None and not _is_whole(seed, 0, _MOST_SEED):
        raise OptionError(f"seed: expected a number from 0 to {_MOST_SEED}, found {shown(seed)}")
    return _Wish(max_new_tokens, sample, temperature, top_p, seed)


def _is_whole(value: Any, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _check_prompt(prompt: str) -> None:
    if not isinstance(prompt, str) or not prompt:
        raise OptionError(f"prompt: expected text for the model to go on with, found {shown(prompt)}")
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise OptionError(f"prompt: expected text in UTF-8, found {shown(prompt)}; convert it") from error


def _need_transformers() -> None:
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise ModelError(f"text needs a transformers model: {error}; install lowmem[transformers]") from error


def _tokenizer(folder: Path, trust_remote_code: bool) -> Any:
    """The tokenizer whose files lie in `folder`; nothing is fetched.

    Raises:
        SourceError: there is none.
        ModelError: transformers cannot make one of what is there.
    """
    from transformers import AutoTokenizer

    from .modeling.failures import refusing

    try:
        names = {entry.name for entry in folder.iterdir()}
    except OSError as error:
        raise SourceError(f"{folder}: cannot be listed: {error.strerror or error}") from error
    has_vocabulary = any(name in _VOCABULARIES or name.endswith(_VOCABULARY_SUFFIXES) for name in names)
    absent = SourceError(
        f"{folder}: expected a tokenizer beside the weights ({', '.join(_VOCABULARIES)}), found none; copy its files "
        "there from where the model came from"
    )
    if not has_vocabulary and _TOKENIZER_CONFIG not in names:
        raise absent
    with refusing(f"{folder}: transformers cannot make a tokenizer of what is there"):
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=trust_remote_code
        )
    # A few need no vocabulary (ByT5: bytes); of the others an empty one would be made.
    if not has_vocabulary and getattr(tokenizer, "vocab_files_names", None):
        raise absent
    return tokenizer


def _encoded(tokenizer: Any, prompt: str, chat: bool, folder: Path) -> Any:
    """The prompt's tokens, as a tensor of one row.

    Raises:
        OptionError: there is no chat template, or the prompt gives no token.
        ModelError: the tokenizer or its template fails.
    """
    from .modeling.failures import refusing

    if chat and not getattr(tokenizer, "chat_template", None):
        raise OptionError(
            f"chat: the tokenizer in {folder} has no chat template (chat_template.jinja, or chat_template in "
            f"{_TOKENIZER_CONFIG}); leave chat (--chat) out, or bring the template of the model"
        )
    with refusing(f"{folder}: the tokenizer{' or its chat template' if chat else ''} cannot take the prompt"):
        if chat:
            said = [{"role": "user", "content": prompt}]
            encoded = tokenizer.apply_chat_template(
                said, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        else:
            # What is too long is for us to say: not `verbose`.
            encoded = tokenizer(prompt, return_tensors="pt", verbose=False)
        ids = encoded["input_ids"].long()
    if not ids.numel():
        raise OptionError(f"prompt: the tokenizer in {folder} makes no token of {shown(prompt)}; give more text")
    return ids


def _class_and_config(config: Path | None, folder: Path, options: dict[str, Any]) -> tuple[Any, Any] | None:
    """The class that `load` will make, and its config; None where only `load` can know."""
    import transformers

    from .modeling.classes import choose
    from .modeling.request import make_model_request

    names = ("model", "auto_class", "config", "attn_implementation", "experts_implementation", "model_kwargs")
    request = make_model_request(
        **{name: options[name] for name in names if name in options},
        trust_remote_code=options.get("trust_remote_code") is True,
    )
    if request.model is not None or (config is None and request.config is None):
        return None
    chosen = choose(transformers, str(config or folder), folder, request)
    return chosen.cls, chosen.config


def _check_generates(model: Any, config: Any, source: str) -> None:
    """Refuse a model, or the class of one, that does not go on with text.

    Raises:
        ModelError: it has no `generate`, or what it takes is no text.
    """
    name = model.__name__ if isinstance(model, type) else type(model).__name__
    can = getattr(model, "can_generate", None)
    if config is None or can is None or not can() or not hasattr(model, "generate"):
        raise ModelError(
            f"{source}: {name} does not generate text; expected a causal or sequence-to-sequence model: give its class "
            "(--auto-class AutoModelForCausalLM) if the weights are those of one"
        )
    takes = getattr(model, "main_input_name", "input_ids")
    if takes != "input_ids":
        raise ModelError(f"{source}: {name} goes on with {takes} and not with text; call its generate in Python")


def _room(config: Any, prompt: int, wanted: int) -> int:
    """How many tokens the model has positions for, up to `wanted`.

    Raises:
        OptionError: the prompt leaves none.
    """
    try:
        decoder = config.get_text_config(decoder=True)
    except (AttributeError, ValueError):
        # Several parts make text, or code beside the checkpoint does not say; then the whole's positions count, if any.
        decoder = config
    encoder = getattr(config, "encoder", None) or config
    is_apart = bool(getattr(config, "is_encoder_decoder", False))
    limit = _positions(encoder if is_apart else decoder)
    # A decoder of its own begins with one token, whatever the prompt; another one goes on behind the prompt.
    if limit is not None and prompt > (limit if is_apart else limit - 1):
        raise OptionError(
            f"prompt: expected at most {limit if is_apart else limit - 1} tokens, because the model has {limit} "
            f"positions, found {prompt}; shorten it"
        )
    most = _positions(decoder)
    return wanted if most is None else min(wanted, max(1, most - (1 if is_apart else prompt)))


def _positions(config: Any) -> int | None:
    return found if isinstance(found := getattr(config, "max_position_embeddings", None), int) and found > 0 else None


class _Stream:
    """What `generate` puts its tokens into: their ids and times, and their text in whole words."""

    def __init__(self, tokenizer: Any, write: Callable[[str], None] | None) -> None:
        from transformers import TextStreamer

        self.ids: list[int] = []
        self.first = self.last = 0.0
        self.failure: Exception | None = None
        self._write = write
        self._begun = False
        words: Any = TextStreamer(tokenizer, skip_special_tokens=True)
        words.on_finalized_text = self._pass_on
        self._words = words

    def put(self, value: Any) -> None:
        """Take the prompt, or a decoder's first token, and then the new tokens one by one."""
        if not self._begun:
            self._begun = True
            return
        self.last = time.perf_counter()
        self.first = self.first or self.last
        self.ids += value.flatten().tolist()
        if self._write is not None:
            self._words.put(value)

    def end(self) -> None:
        """Write what is left."""
        if self._write is not None and self.ids:
            self._words.end()

    def _pass_on(self, text: str, stream_end: bool = False) -> None:
        if self._write is None or not (text or stream_end):
            return
        try:
            self._write(f"{text}\n" if stream_end else text)
        except Exception as error:
            self.failure = error
            raise


def _generate(model: Any, tokenizer: Any, ids: Any, wish: _Wish, room: int, stream: _Stream) -> None:
    """Let `model` put at most `room` new tokens into `stream`.

    Raises:
        ModelError: the tokenizer is another model's, or generating fails.
    """
    import torch

    from .modeling.failures import refusing

    embeddings = _embeddings(model)
    if embeddings is not None and int(ids.max()) >= embeddings.shape[0]:
        raise ModelError(
            f"{tokenizer.name_or_path}: the tokenizer makes token {int(ids.max())} of the prompt, and the model has "
            f"{embeddings.shape[0]}; bring the tokenizer of this model"
        )
    # Weights that come when they are used may have no device until then; what brings them takes the tokens along.
    device = torch.device("cpu") if embeddings is None or embeddings.is_meta else embeddings.device
    ids = ids.to(device)
    if wish.seed is not None:
        torch.manual_seed(wish.seed)
    try:
        with refusing(f"{type(model).__name__}: generating failed"):
            settings = _settings(model.generation_config, tokenizer, wish, room)
            model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), streamer=stream, **settings)
    except KeyboardInterrupt:
        stream.end()
        raise
    except LowmemError:
        # What the caller's function raised is not the model's.
        if stream.failure is not None:
            raise stream.failure from None
        stream.end()
        raise
    if not stream.ids:
        raise ModelError(f"{type(model).__name__}: its generate gave out no token; call it in Python")


def _settings(config: Any, tokenizer: Any, wish: _Wish, room: int) -> dict[str, Any]:
    """The arguments of `generate`; of the model's own generation config goes what they are instead of."""
    settings: dict[str, Any] = {"max_new_tokens": room, "do_sample": wish.sample, "num_beams": 1}
    settings |= {name: getattr(wish, name) for name in ("temperature", "top_p") if getattr(wish, name) is not None}
    # transformers would remark that only one of the two counts.
    config.max_length = None
    config.num_return_sequences = 1
    if config.pad_token_id is None:
        end = config.eos_token_id[0] if isinstance(config.eos_token_id, list) else config.eos_token_id
        settings["pad_token_id"] = end if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    if config.stop_strings:
        settings["tokenizer"] = tokenizer
    return settings


def _embeddings(model: Any) -> Any:
    """The table that tokens are looked up in, or None where the model does not say."""
    try:
        return getattr(model.get_input_embeddings(), "weight", None)
    except (AttributeError, NotImplementedError):
        return None
