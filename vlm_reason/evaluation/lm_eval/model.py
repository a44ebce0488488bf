"""Our models as an lm-eval `LM`, registered as `vlm-reason` when this module is imported.

    plain                    pretrained=MODEL
    Bayesian, whole answers  pretrained=MODEL, adapters=FOLDER_OF_MEMBERS
    Bayesian, token by token pretrained=MODEL, adapters=..., mixture=token
    latent-variable          pretrained=MODEL, rationales=8        (and with adapters: over members too)

Exactly one result a request, in order. Scores are ours: fp32 log-softmax, shared prefixes run once, the same values in
any batch. A prompt too long for the model, a NaN, an unsupported generation setting are errors, never worked around.

lm-eval finds a model by its name only after the module that registers it was imported (it has no entry points): use
`vlm-reason lm-eval`, `python -m vlm_reason.evaluation.lm_eval`, or pass an instance to `lm_eval.simple_evaluate`.
"""

from __future__ import annotations

import glob
import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast, get_args

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import CacheHook, TemplateLM
from lm_eval.api.registry import register_model

from ...errors import UserError, nearest
from ...scoring.logprobs import context_length
from ..members import ADAPTER_FILES, Members, load_members
from .encoding import Encoder, decoding
from .mixture import Ask, Level, Mixed, Pair, WeightMixture, Written, identity
from .rationales import Choice, RationaleConfig, RationaleMixture
from .responses import Responses

_STAMP = "vlm-reason: what answered"

Place = tuple[str, int, int]
"""Name of the document (task/doc_id), index of the request within it, repeat."""


@register_model("vlm-reason")
class VLMReasonLM(TemplateLM):
    """Arguments are those of `--model_args`; `VLMReasonLM.over(members)` takes what is in memory already.

    pretrained    built-in name, folder or hub id
    adapters      PEFT folders of the members of a posterior: one, a folder of such folders, a glob, or several joined
                  by `;`. mixture: `sequence` or `token` (mixture.py)
    rationales    N > 0: the law of rationales.py, with max_rationale_tokens, rationale_opening, rationale_end, cue,
                  ranker, answers (their kind), on_cut
    store         folder that keeps every response, so that a run can be taken up again
    seed          of everything that is sampled
    engine        hf or vllm; score: which of the two scores where vLLM samples
    dtype, batch_size (rows decoded together; scores do not depend on it), device (the first visible GPU), progress

    Raises UserError for what it cannot do as asked: too long a prompt, a log-probability that is not finite, ...
    """

    def __init__(
        self,
        pretrained: str,
        adapters: str | Sequence[str] = (),
        mixture: Level = "sequence",
        rationales: int = 0,
        max_rationale_tokens: int = 128,
        rationale_opening: str = "\nReasoning:",
        rationale_end: str = "\n",
        cue: str = "Answer:",
        ranker: str = "mixture",
        answers: str = "text",
        on_cut: str = "error",
        engine: str = "hf",
        score: str = "hf",
        dtype: str = "auto",
        seed: int = 0,
        store: str | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
        progress: bool = True,
    ) -> None:
        _check_device(device)
        options: dict[str, Any] = {"kind": engine}
        if engine == "vllm":
            options["score"] = score
        elif score != "hf":
            raise UserError(f"score={score!r} needs engine=vllm")
        if batch_size not in (None, "auto", 1, "1"):  # 1 is what lm-eval passes where nothing was said
            options["batch_size"] = int(str(batch_size))
        members = load_members(str(pretrained), dtype, adapter_folders(adapters), options)
        latent = None
        if rationales:
            latent = RationaleConfig(
                rationales, max_rationale_tokens, rationale_opening, rationale_end, cue, ranker,
                cast(Any, answers), cast(Any, on_cut),
            )  # fmt: skip
        self._set_up(members, mixture, latent, seed, store, progress)

    @classmethod
    def over(
        cls,
        members: Members,
        mixture: Level = "sequence",
        rationales: RationaleConfig | None = None,
        seed: int = 0,
        store: str | Path | None = None,
        progress: bool = False,
    ) -> VLMReasonLM:
        """The same over members that are in memory already (`evaluation.members`)."""
        made = cls.__new__(cls)
        made._set_up(members, mixture, rationales, seed, store, progress)
        return made

    def _set_up(
        self,
        members: Members,
        mixture: Level,
        rationales: RationaleConfig | None,
        seed: int,
        store: str | Path | None,
        progress: bool,
    ) -> None:
        super().__init__()
        if mixture not in get_args(Level):
            raise UserError(
                f"mixture must be sequence or token, got {mixture!r}{nearest(mixture, get_args(Level))}"
            )
        if rationales is not None and mixture == "token":
            raise UserError("rationales mix whole answers: leave mixture=token out, or rationales")
        self.members, self.level, self.seed = members, mixture, seed
        self.tokenizer = members.tokenizer
        first = next(iter(members))
        with members.serve(first) as engine:
            self._context = cast("int | None", getattr(engine, "context", None))
            self._about = _describe(engine)
        self.encoder = Encoder(members.tokenizer, self._context)
        self.responses = Responses(store)
        label = "lm-eval" if progress else None
        self.weights = WeightMixture(members, mixture, self.encoder, self.responses, seed, label)
        self.rationales = (
            RationaleMixture(members, rationales, self.encoder, self.responses, seed, label)
            if rationales is not None
            else None
        )
        self.kept: dict[Place, Mixed | Written] = {}
        """What each request was answered with, members and drafts included (`samples.py` writes them down)."""

    # ---- requests ----------------------------------------------------------------------------------------------

    def loglikelihood(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        texts = [cast(tuple[str, str], request.args) for request in requests]
        if self.rationales is not None:
            choices = [Choice(_name(r), *pair) for r, pair in zip(requests, texts, strict=True)]
            mixed = self.rationales.score(choices)
        else:
            mixed = self.weights.score(
                [self._pair(r, *pair) for r, pair in zip(requests, texts, strict=True)]
            )
        self._keep(requests, mixed, repeated=False)
        return self._answered("loglikelihood", requests, [(m.value, m.greedy) for m in mixed])

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        if self.rationales is not None:
            raise UserError("a text has no answer to reason towards: run perplexity tasks without rationales")
        mixed = self.weights.rolling([self.encoder.windows(str(request.args[0])) for request in requests])
        self._keep(requests, mixed, repeated=False)
        return self._answered("loglikelihood_rolling", requests, [m.value for m in mixed])

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        visits: Counter[tuple[str, int]] = Counter()
        asks = []
        for request in requests:
            name, (context, options) = _name(request), request.args
            ask = Ask(
                name,
                visits[name, request.idx],
                str(context),
                decoding(cast(Mapping[str, Any], options), name),
            )
            self._refuse_collapse(request, ask)
            visits[name, request.idx] += 1
            asks.append(ask)
        written = self.rationales.write(asks) if self.rationales is not None else self.weights.write(asks)
        self._keep(requests, written, repeated=True)
        return self._answered("generate_until", requests, [w.text for w in written])

    def _pair(self, request: Instance, context: str, continuation: str) -> Pair:
        ids, target = self.encoder.pair(context, continuation)
        self.encoder.check_room(len(ids) + len(target) - 1, _name(request))
        return ids, target

    def _answered(self, kind: str, requests: Sequence[Instance], answers: list[Any]) -> list[Any]:
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial(kind, request.args, answer)
        return answers

    def _keep(self, requests: Sequence[Instance], values: Sequence[Mixed | Written], repeated: bool) -> None:
        visits: Counter[tuple[str, int]] = Counter()
        for request, value in zip(requests, values, strict=True):
            place = (_name(request), request.idx)
            self.kept[(*place, visits[place])] = value
            visits[place] += repeated

    # ---- lm-eval's response cache ------------------------------------------------------------------------------

    def set_cache_hook(self, cache_hook: CacheHook) -> None:
        """lm-eval keys its cache by the request's text alone. A file that another model filled is refused."""
        answers = cache_hook.dbdict
        if answers is not None:
            if len(answers) == 0:
                answers[_STAMP] = self.identity
            elif answers.get(_STAMP) != self.identity:
                raise UserError(
                    "use_cache: the file holds the responses of another model, or of other settings (lm-eval's cache "
                    "does not know whose they are); name another file, or use store=FOLDER, which keeps them apart"
                )
        super().set_cache_hook(cache_hook)

    def _refuse_collapse(self, request: Instance, ask: Ask) -> None:
        drawn = ask.decoding.temperature > 0 or self.rationales is not None
        marked = request.args[1].get("do_sample", False)
        if self.cache_hook.dbdict is not None and drawn and not marked and (request.repeats or 1) > 1:
            raise UserError(
                f"{ask.name}: with use_cache, lm-eval answers all {request.repeats} repeats with one stored text, "
                "since generation_kwargs.do_sample is not set; set it to true, or use store=FOLDER, not use_cache"
            )

    # ---- what lm-eval wants to know ----------------------------------------------------------------------------

    @property
    def identity(self) -> str:
        """Changes when any answer may: weights, how they are mixed, rationales, seed."""
        latent = None if self.rationales is None else self.rationales.config
        text = repr((identity(self.members), self.level, latent, self.seed))
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def get_model_info(self) -> dict[str, Any]:
        """Stands in the results under `config`."""
        latent = None if self.rationales is None else self.rationales.config
        return {
            **self._about,
            "weights": [member.weights for member in self.members],
            "members": [member.name for member in self.members],
            "mixture": self.level if len(self.members) > 1 else None,
            "rationales": None if latent is None else vars(latent),
            "without_rationale": 0 if self.rationales is None else len(self.rationales.direct),
            "identity": self.identity,
            "seed": self.seed,
        }

    @property
    def eot_token_id(self) -> int:
        return self.encoder.eos

    @property
    def prefix_token_id(self) -> int:
        return self.encoder.prefix

    @property
    def max_length(self) -> int | None:
        return self._context

    @property
    def tokenizer_name(self) -> str:
        """Part of the key of lm-eval's cache of prompts: the folder's name, and a hash of vocabulary and template."""
        known = (sorted(self.tokenizer.get_vocab().items()), self.tokenizer.chat_template)
        digest = hashlib.blake2b(repr(known).encode(), digest_size=6).hexdigest()
        return f"{str(self.tokenizer.name_or_path).replace('/', '__')}-{digest}"

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        if not self.tokenizer.chat_template:
            raise UserError("this tokenizer has no chat template: run without apply_chat_template")
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        return self.encoder.encode(string, add_special_tokens)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        pairs = [(tuple(context), tuple(target)) for _, context, target in requests]
        return [(mixed.value, mixed.greedy) for mixed in self.weights.score(pairs)]


def adapter_folders(adapters: str | Sequence[str]) -> tuple[str, ...]:
    """The member folders that a model argument names, in order of name where a folder or a glob holds several."""
    parts = [part for part in adapters.split(";") if part] if isinstance(adapters, str) else list(adapters)
    found: list[str] = []
    for part in parts:
        path = Path(part).expanduser()
        if glob.has_magic(part):
            matches = sorted(map(str, filter(_is_adapter, map(Path, glob.glob(str(path))))))
        elif path.is_dir() and not _is_adapter(path) and not (path / "config.json").is_file():
            matches = sorted(str(child) for child in path.iterdir() if _is_adapter(child))
        else:
            matches = [str(path)]
        if not matches:
            raise UserError(f"adapters: no PEFT adapter folders in {part!r}")
        found += matches
    return tuple(found)


def _is_adapter(folder: Path) -> bool:
    return all((folder / name).is_file() for name in ADAPTER_FILES)


def _name(request: Instance) -> str:
    """task/doc_id; for an instance made by hand, a hash of its arguments."""
    if request.doc_id is not None:
        return f"{request.task_name}/{request.doc_id}"
    digest = hashlib.blake2b(repr(request.args).encode(), digest_size=8).hexdigest()
    return f"{request.task_name or 'request'}/{digest}"


def _describe(engine: Any) -> dict[str, Any]:
    model = getattr(engine, "model", None)
    if model is None:
        return {"engine": type(engine).__name__}
    return {
        "engine": type(engine).__name__,
        "model_num_parameters": sum(p.numel() for p in model.parameters()),
        "model_dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "max_length": context_length(model),
    }


def _check_device(device: str | None) -> None:
    """Members are loaded onto the GPU if there is one. lm-eval's command says cuda:0 where nothing was said."""
    if device in (None, "cuda", "cuda:0"):
        return
    if device == "cpu" and not torch.cuda.is_available():
        return
    raise UserError(
        f"device={device!r}: the model runs on the first visible GPU; set CUDA_VISIBLE_DEVICES to choose"
    )
