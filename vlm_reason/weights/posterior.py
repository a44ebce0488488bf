"""The interface of a posterior over the weights of a PEFT adapter, whatever family it is of.

    posterior = Posterior.from_optimizer(optimizer, model)      # what IVON has learnt
    posterior.save("runs/a/posterior")                          # stock PEFT loads its mean from there
    posterior = Posterior.load("runs/a/posterior")
    posterior.export_samples(8, "runs/a/draws", seed=0)         # 8 plain adapters: members of a suite, LoRAs for vLLM

Trees are dicts of fp32 CPU tensors by PEFT key. Sampling is on the CPU and depends on (seed, number of the draw, place
of the weight) alone, so one machine's draws are another's, the same torch given.
"""

from __future__ import annotations

import json
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn, cast

from peft import PeftConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..config import from_dict
from ..errors import UserError, nearest
from .adapter import adapter_tensors, base_fingerprint, described, name_and_dtype
from .artefact import (
    ADAPTER,
    ADAPTER_CONFIG,
    CONFIG,
    TENSORS,
    VERSION,
    Tree,
    adapter_files,
    check_finite,
    check_rank,
    config_file,
    read_json,
    read_tensors,
    tensor_bytes,
    write_folder,
)
from .noise import check_draws

if TYPE_CHECKING:
    from .examples import Batch, Example
    from .ivon import IVON
    from .job import FitReport, Method, Training
    from .likelihoods import Likelihood
    from .loo import LeaveOneOut
    from .predictive import Predictive


@dataclass(frozen=True)
class Origin:
    """base: hash of the base model's weights, None if unknown. ess: lambda. data_size: N, None if unknown. temper: the
    product of all tempering since the fit. prior: precision of the zero-mean Gaussian prior by key; flat at 0.
    output_temperature: logits are divided by it in every prediction. model, dtype: name (of an absolute path
    the last part) and dtype of the base model, None if unknown; for people, `base` decides."""

    base: str | None = None
    ess: float | None = None
    data_size: int | None = None
    updates: int | None = None
    temper: float = 1.0
    prior: Mapping[str, float] = field(default_factory=dict)
    output_temperature: float = 1.0
    model: str | None = None
    dtype: str | None = None

    def on(self, model: nn.Module) -> Origin:
        """With the name and the dtype of the base of `model`."""
        name, dtype = name_and_dtype(model)
        return replace(self, model=name, dtype=dtype)


_SCALING = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")
"""What s in s B A follows from."""


class Posterior(ABC):
    """A distribution over adapters of one shape. What a family cannot do raises a UserError that says so."""

    family: ClassVar[str]

    def __init__(self, adapter_config: Mapping[str, Any], origin: Origin) -> None:
        self.adapter_config, self.origin = dict(adapter_config), origin

    @staticmethod
    def from_optimizer(optimizer: IVON, model: PeftModel, adapter: str = "default") -> Posterior:
        """q as IVON has it, over adapter `adapter` of `model`: a diagonal Gaussian. Tensors of the adapter that the
        optimiser does not train are certain. Collective where parameters are sharded.

        UserError if the optimiser trains weights outside the adapter or none in it, and for NaN.
        """
        from .families.diagonal import DiagonalGaussian

        return DiagonalGaussian.from_ivon(optimizer, model, adapter)

    @staticmethod
    def fit(
        model: PeftModel,
        data: Sequence[Example],
        likelihood: Likelihood,
        method: str | Method = "laplace",
        training: Training | None = None,
        held_out: Sequence[Example] = (),
        start: Posterior | None = None,
        seed: int = 0,
        adapter: str = "default",
    ) -> tuple[Posterior, FitReport]:
        """Fit `method`, a name in METHODS (with its default settings) or a method with settings of yours, to adapter
        `adapter` of `model`, in place: afterwards it holds the mean. `Job` has the meaning of the rest, and more.

        UserError for an unknown method, no data, and what the method refuses.
        """
        from .job import Job, Training
        from .methods import METHODS

        if isinstance(method, str):
            if method not in METHODS:
                raise UserError(f"unknown method {method!r}{nearest(method, METHODS)}")
            method = METHODS[method]()
        job = Job(model, data, likelihood, training or Training(), held_out, start, seed, adapter)
        posterior, report = method.fit(job)
        posterior.origin = posterior.origin.on(model)
        return posterior, report

    # ------------------------------------------------------------------------------------------ what a family gives

    @abstractmethod
    def mean(self) -> Tree: ...

    @abstractmethod
    def sample(self, n: int, seed: int, antithetic: bool = False) -> Iterator[Tree]:
        """n draws, one at a time. antithetic: draws 2k and 2k+1 lie opposite each other about the mean, which halves
        or more the noise of averages of functions that are nearly linear in the weights."""

    def log_prob(self, tree: Mapping[str, Tensor]) -> float:
        self._lacks("density")

    def kl(self, other: Posterior | None = None) -> float:
        """KL(self || other), in nats; None is the prior."""
        self._lacks("KL divergence in closed form")

    def precision_diag(self) -> Tree:
        """1 / variance of every weight; infinite where it is certain."""
        self._lacks("diagonal precision")

    def temper(self, tau: float) -> Posterior:
        """Variances divided by tau > 0: above 1 is colder. Chosen on held-out data, it trades accuracy of the draws
        against calibration."""
        self._lacks("temperature")

    def prune(self, fraction: float) -> Posterior:
        """The `fraction` of weights with the lowest |mean| / sigma at 0, and certain of it."""
        self._lacks("pruning")

    def output_covariance(self, jacobian: Mapping[str, Tensor]) -> Tensor:
        """J Sigma J^T [B, C, C] of the linearised model; jacobian: key -> [B, C, *shape], of the uncertain tensors at
        least. Exact for the family's own covariance."""
        self._lacks("covariance in closed form")

    def closed_form(
        self, model: PeftModel, batch: Batch, likelihood: Likelihood, adapter: str = "default"
    ) -> tuple[Tensor, Tensor]:
        """(m [B, C], V [B, C, C]), fp32 or wider: the outputs f ~ N(m, V) exactly, in one run of the model and without
        draws. For families whose uncertainty is in a last, linear layer."""
        self._lacks("outputs in closed form")

    def uncertain(self) -> list[str]:
        """Keys whose tensors differ between draws."""
        return list(self.mean())

    @abstractmethod
    def tensors(self) -> Tree:
        """What posterior.safetensors holds."""

    @classmethod
    @abstractmethod
    def from_tensors(
        cls, adapter_config: Mapping[str, Any], mean: Tree, tensors: Tree, origin: Origin
    ) -> Posterior: ...

    # ------------------------------------------------------------------------------------------------ predictions

    def predictive(
        self,
        model: PeftModel,
        data: Batch | Sequence[Example],
        likelihood: Likelihood,
        n: int = 10,
        mode: str = "auto",
        *,
        seed: int = 0,
        antithetic: bool = False,
        link: str = "mc",
        until: float | None = None,
        at_least: int = 4,
        with_mean: bool = False,
        keep_logits: bool = False,
        adapter: str = "default",
        tokens: int = 4096,
        memory: int = 1 << 30,
    ) -> Predictive:
        """What the posterior predicts for every example of `data`: the mean of p(y | f) over its draws of weights, on a
        `model` this posterior was attached to. The adapter is left as it was found; dropout is off meanwhile.

        With theta_s ~ q, f_s = f(x; theta_s) [C] and m = mean of q, p(y) is, by `mode`:

        mean         p(y | f(x; m)); one run of the model
        sequential   mean_s p(y | f_s), one draw after the other written into the adapter; n runs
        batched      the same numbers, all draws in one forward; layers below the first uncertain one run once
        linearised   E p(y | f), f ~ N(f(x; m), J Sigma J^T), J = df/dtheta at m; for families without a covariance the
                     draws f(x; m) + J (theta_s - m); one run and C backward passes
        closed_form  E p(y | f) with the f ~ N(., V) a family has exactly (Bayesian last layers), in one run; families
                     with a covariance alone: linearised, with link "probit"
        auto         closed_form where outputs have one, mean where the posterior is certain, else batched

        n: draws. Draw s is the same whatever n, mode and the division into batches. antithetic: pairs about the mean.
        link: "mc" averages over draws of f ~ N(., V) (the same 4096 normals for every example); "probit" is
        softmax(f_c / sqrt(1 + pi V_cc / 8)) (MacKay 1992). For the two modes that have V.
        until: adaptive n, for sequential and batched. After `at_least` draws, and after every `at_least` more, an
        example is finished when the 95 % intervals of its total and expected entropy are no wider than +- `until`
        nats; the others go on, to at most n. Stopping favours examples whose first draws agree by luck.
        with_mean: `mean_probs` also in modes that do not have it anyway (one more run). keep_logits: f [S, B, C].
        tokens: how many tokens, draws included, go through the uncertain layers at once (at least one row of one draw).
        memory: bytes that draws, or Jacobians, take at once. Neither changes the numbers beyond rounding.

        Choice gives probabilities; BradleyTerry [p, 1 - p], the preferred first; Regression mean and variance; Tokens
        log_prob alone, of the mixture over draws of the whole sequence. `log_prob` of the targets is always there.

        Draws that cannot share a forward here (embeddings, modules_to_save) go through PEFT's mixed batches in place of
        `batched`, others (DoRA) one after the other; a warning says so once.

        UserError for unknown modes and links, and for what a family or a likelihood does not have.

        When not to use it: if a temperature-scaled mean is as good on held-out data, which takes one run.
        """
        from .predictive import predictive

        return predictive(
            self, model, data, likelihood, n, mode, seed=seed, antithetic=antithetic, link=link, until=until,
            at_least=at_least, with_mean=with_mean, keep_logits=keep_logits, adapter=adapter, tokens=tokens,
            memory=memory,
        )  # fmt: skip

    def loo(
        self,
        model: PeftModel,
        data: Sequence[Example],
        likelihood: Likelihood,
        n: int = 32,
        mode: str = "auto",
        *,
        newton: bool = True,
        seed: int = 0,
        adapter: str = "default",
    ) -> LeaveOneOut:
        """Loss on new examples, estimated from the training examples `data` alone; see loo.py."""
        from .loo import loo

        return loo(self, model, data, likelihood, n, mode, newton=newton, seed=seed, adapter=adapter)

    def sensitivity(
        self,
        model: PeftModel,
        data: Sequence[Example],
        likelihood: Likelihood,
        n: int = 32,
        mode: str = "auto",
        *,
        seed: int = 0,
        adapter: str = "default",
    ) -> dict[str, float]:
        """Id of each training example -> how much leaving it out changes what is said of it, the largest first. For
        wrong labels `loo(...).ranking("nll")` is the better list. See loo.py."""
        found = self.loo(model, data, likelihood, n, mode, seed=seed, adapter=adapter)
        by_id = dict(zip(found.ids, found.sensitivity.tolist(), strict=True))
        return {name: by_id[name] for name in found.ranking()}

    def merge(
        self,
        others: Sequence[Posterior],
        base: Posterior | None = None,
        alphas: Sequence[float] | None = None,
    ) -> Posterior:
        """One posterior for the tasks of this one and `others`; see merging.py, which also merges other gauges."""
        from .merging import merge

        return merge([self, *others], base, alphas)[0]

    def _lacks(self, what: str) -> NoReturn:
        raise UserError(f"a posterior of family {self.family!r} has no {what}")

    # ------------------------------------------------------------------------------------------------------ on disk

    def save(self, folder: str | Path) -> Path:
        """Write the four files of artefact.py into a new or empty folder. UserError for any other, and for NaN."""
        return write_folder(folder, list(self.files()))

    def files(self) -> Iterator[tuple[str, bytes]]:
        """What `save` writes: (path in the folder, content). UserError for NaN."""
        mean, tensors = self.mean(), self.tensors()
        check_finite(mean, "of the mean")
        check_finite(tensors, "of the posterior")
        config = {"version": VERSION, "family": self.family, "origin": asdict(self.origin)}
        yield from adapter_files(self.adapter_config, mean)
        yield TENSORS, tensor_bytes(tensors)
        yield config_file(config)

    @classmethod
    def from_folder(
        cls, folder: Path, adapter_config: Mapping[str, Any], mean: Tree, tensors: Tree, origin: Origin
    ) -> Posterior:
        """`from_tensors`, for families that keep more in the folder than the four files."""
        return cls.from_tensors(adapter_config, mean, tensors, origin)

    @staticmethod
    def load(folder: str | Path, model: nn.Module | None = None) -> Posterior:
        """What `save` wrote, of whichever family. model: the base model it is meant for, bare or with adapters.

        UserError for a missing or broken file, NaN, tensors that do not belong together, another rank than the config
        says, and a `model` that is not the one it was fitted on.
        """
        from .families import FAMILIES

        folder = Path(folder).expanduser()
        config = read_json(folder / CONFIG)
        if config.get("version") != VERSION:
            raise UserError(f"{str(folder)!r} has version {config.get('version')}, this code reads {VERSION}")
        family = config.get("family")
        if family not in FAMILIES:
            raise UserError(
                f"unknown family {family!r} of posterior in {str(folder)!r}{nearest(str(family), FAMILIES)}"
            )
        adapter_config = read_json(folder / ADAPTER_CONFIG)
        mean, tensors = read_tensors(folder / ADAPTER), read_tensors(folder / TENSORS)
        check_rank(adapter_config, mean, folder)
        try:
            origin = from_dict(Origin, config["origin"], "origin")
        except (KeyError, UserError) as error:
            raise UserError(f"{CONFIG} in {str(folder)!r} has no readable origin: {error}") from error
        posterior = FAMILIES[family].from_folder(folder, adapter_config, mean, tensors, origin)
        if model is not None:
            posterior.check_base(model)
        return posterior

    def export_samples(self, n: int, folder: str | Path, seed: int, antithetic: bool = False) -> list[Path]:
        """n draws as plain PEFT adapters `folder/draw000`, `draw001`, ... in a new or empty folder."""
        names = [f"draw{k:03d}" for k in range(check_draws(n))]

        def files() -> Iterator[tuple[str, bytes]]:
            for name, tree in zip(names, self.sample(n, seed, antithetic), strict=True):
                for file, content in adapter_files(self.adapter_config, tree):
                    yield f"{name}/{file}", content

        written = write_folder(folder, files())
        return [written / name for name in names]

    # ------------------------------------------------------------------------------------------------- on a model

    def check_base(self, model: nn.Module) -> None:
        """UserError if `model` is not the base model the posterior was fitted on (weights and dtype)."""
        found = base_fingerprint(model)
        if self.origin.base is not None and found != self.origin.base:
            if not isinstance(model, PeftModel) and any(
                isinstance(m, BaseTunerLayer) for m in model.modules()
            ):
                raise UserError(
                    "this base model has an adapter's layers in it, which PEFT puts in place: give the PeftModel that "
                    "was made of it, or load the base model anew"
                )
            theirs, ours = (self.origin.model, self.origin.dtype), name_and_dtype(model)
            raise UserError(
                f"the posterior was fitted on a base model with hash {described(self.origin.base, theirs)}, this one "
                f"has {described(found, ours)}: load that model, in that dtype"
            )

    def attach(self, model: nn.Module, adapter: str = "default") -> PeftModel:
        """`model`, the bare base model, with an adapter that holds the mean; `write` puts draws in its place. UserError
        for another base model, and for one whose modules are not the adapter's."""
        if isinstance(model, PeftModel):
            raise UserError(
                "attach takes the bare base model, got a PeftModel: `write` puts the mean or a draw into its adapter"
            )
        self.check_base(model)
        try:
            wrapped = cast(
                PeftModel, get_peft_model(cast(Any, model), self._peft_config(), adapter_name=adapter)
            )
        except ValueError as error:
            raise UserError(f"the adapter does not fit this model: {error}") from error
        self.write(wrapped, self.mean(), adapter)
        return wrapped.eval()

    def write(self, model: PeftModel, tree: Mapping[str, Tensor], adapter: str = "default") -> None:
        """Set the weights of `model`'s adapter to a tree of this posterior. UserError if they do not fit."""
        own = adapter_tensors(model, adapter)
        wrong = sorted(
            own.keys() ^ tree.keys() | {k for k in own.keys() & tree.keys() if own[k].shape != tree[k].shape}
        )
        if wrong:
            raise UserError(f"the posterior does not fit adapter {adapter!r}: {len(wrong)} tensors differ in name or "
                            f"shape, the first is {wrong[0]!r}")  # fmt: skip
        for name in _SCALING if "lora_alpha" in self.adapter_config else ():
            theirs = getattr(model.peft_config[adapter], name, None)
            if (self.adapter_config.get(name) or None) != (theirs or None):
                raise UserError(f"the posterior does not fit adapter {adapter!r}: its {name} is "
                                f"{self.adapter_config.get(name)!r}, the adapter's {theirs!r}")  # fmt: skip
        set_peft_model_state_dict(model, dict(tree), adapter_name=adapter)

    def _peft_config(self) -> PeftConfig:
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / ADAPTER_CONFIG).write_text(json.dumps(self.adapter_config))
            config = PeftConfig.from_pretrained(folder)
        config.inference_mode = True
        return config
