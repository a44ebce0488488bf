"""One suite for every family of posteriors and every method that fits one. A family or method that is registered and
has no entry here fails it."""

from __future__ import annotations

import copy
import json
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from vlm_reason.errors import UserError
from vlm_reason.weights import (
    FAMILIES,
    METHODS,
    Choice,
    DiagonalGaussian,
    Example,
    FitReport,
    Job,
    Origin,
    Posterior,
    Training,
)
from vlm_reason.weights.adapter import adapter_tensors, base_fingerprint, peft_config_dict
from vlm_reason.weights.examples import make_batch
from vlm_reason.weights.families.core import CoreGaussian
from vlm_reason.weights.families.full import FullGaussian
from vlm_reason.weights.families.gaussian import Dense
from vlm_reason.weights.families.kronecker import Kronecker, KroneckerGaussian, as_matrix
from vlm_reason.weights.families.low_rank_plus_diagonal import LowRankPlusDiagonal
from vlm_reason.weights.families.masks import Masks
from vlm_reason.weights.families.mixture import Mixture
from vlm_reason.weights.families.particles import Particles
from vlm_reason.weights.jacobians import jacobians

IDS = torch.arange(4, 40).view(2, 18)
LIKELIHOOD = Choice((5, 9, 11))
FILES = ["adapter_config.json", "adapter_model.safetensors", "posterior.safetensors", "posterior_config.json"]


def adapted(base: Any) -> PeftModel:
    torch.manual_seed(1)
    config = LoraConfig(task_type="CAUSAL_LM", r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"])
    return get_peft_model(base, config).eval()


def examples(count: int) -> list[Example]:
    torch.manual_seed(2)
    rows = [tuple(torch.randint(3, 64, (4 + n % 4,)).tolist()) for n in range(count)]
    return [Example(f"e{n}", row, n % 3) for n, row in enumerate(rows)]


DATA = examples(6)


# ------------------------------------------------------------------------------------------------------------ builders


@dataclass(frozen=True)
class Adapter:
    """What a posterior over the tiny model's adapter is made of."""

    model: PeftModel
    config: Mapping[str, Any]
    mean: dict[str, Tensor]
    origin: Origin

    @staticmethod
    def of(base: Any) -> Adapter:
        model = adapted(base)
        torch.manual_seed(3)
        mean = {k: 0.2 * torch.randn_like(v) for k, v in adapter_tensors(model).items()}
        prior = {k: 4.0 for k in mean}
        return Adapter(
            model,
            peft_config_dict(model, "default"),
            mean,
            Origin(base_fingerprint(model), 50.0, 50, 7, 1.0, prior),
        )

    def sigma(self, level: float = 0.05) -> dict[str, Tensor]:
        """Of all but the last tensor, which is certain."""
        return {k: level * (0.5 + torch.rand_like(v)) for k, v in list(self.mean.items())[:-1]}


def diagonal(a: Adapter) -> Posterior:
    return DiagonalGaussian(a.config, a.mean, a.sigma(), a.origin)


def low_rank(a: Adapter) -> Posterior:
    sigma = a.sigma()
    factor = {k: 0.04 * torch.randn(3, *v.shape) for k, v in sigma.items()}
    return LowRankPlusDiagonal(a.config, a.mean, sigma, factor, a.origin)


def full(a: Adapter) -> Posterior:
    keys = list(a.mean)[1:3]
    size = sum(a.mean[k].numel() for k in keys)
    half = torch.randn(size, size, dtype=torch.float64)
    factor = Dense.of(half @ half.T * 3 + 200 * torch.eye(size)).factor.float()
    return FullGaussian.of(a.config, a.mean, keys, Dense(factor), a.origin)


def core(a: Adapter) -> Posterior:
    def block() -> Dense:
        half = torch.randn(4, 4, dtype=torch.float64)
        return Dense(Dense.of(half @ half.T * 20 + 50 * torch.eye(4)).factor.float())

    return CoreGaussian(a.config, a.mean, {k: block() for k in a.mean if "lora_A" in k}, a.origin)


def kronecker(a: Adapter) -> Posterior:
    def block(key: str) -> Kronecker:
        small, large = as_matrix(key, a.mean[key]).shape
        v, _ = torch.linalg.qr(torch.randn(small, small))
        u, _ = torch.linalg.qr(torch.randn(large, 3))
        return Kronecker(
            v, 5 + 20 * torch.rand(small), u, 2 + 9 * torch.rand(3), torch.tensor(0.7), torch.tensor(80.0)
        )

    return KroneckerGaussian(a.config, a.mean, {k: block(k) for k in list(a.mean)[:-1]}, a.origin)


def particles(a: Adapter) -> Posterior:
    trees = [{k: v + 0.1 * torch.randn_like(v) for k, v in a.mean.items()} for _ in range(3)]
    return Particles(a.config, trees, a.origin)


def mixture(a: Adapter) -> Posterior:
    moved = replace(a, mean={k: v + 0.02 * torch.randn_like(v) for k, v in a.mean.items()})
    return Mixture([diagonal(a), low_rank(moved)], [3.0, 1.0])


def masks(a: Adapter) -> Posterior:
    drop = {k: 0.1 + 0.1 * n for n, k in enumerate(k for k in a.mean if "lora_A" in k)}
    return Masks(a.config, a.mean, drop, "columns", a.origin)


def rank_masks(a: Adapter) -> Posterior:
    return Masks(a.config, a.mean, {k: 0.3 for k in a.mean if "lora_A" in k}, "ranks", a.origin)


def last_layer(a: Adapter) -> Posterior:
    job = Job(a.model, examples(12), LIKELIHOOD, Training(epochs=1))
    return METHODS["vbll"](steps=3, features=8, batch_size=6).fit(job)[0]  # type: ignore[call-arg]


Build = Callable[[Adapter], Posterior]
BUILDERS: dict[str, Build] = {
    "core": core,
    "diagonal": diagonal,
    "full": full,
    "kronecker": kronecker,
    "last_layer": last_layer,
    "low_rank_plus_diagonal": low_rank,
    "masks": masks,
    "masks/ranks": rank_masks,
    "mixture": mixture,
    "particles": particles,
}
"""family, or family/variant."""

ALL = {
    "sample",
    "antithetic",
    "log_prob",
    "kl",
    "precision_diag",
    "temper",
    "prune",
    "output_covariance",
    "closed_form",
}
GAUSSIAN = ALL - {"prune", "closed_form"}
OFFERS: dict[str, set[str]] = {
    "core": GAUSSIAN,
    "diagonal": ALL - {"closed_form"},
    "full": GAUSSIAN,
    "kronecker": GAUSSIAN,
    "last_layer": {"precision_diag", "kl", "temper", "closed_form"},
    "low_rank_plus_diagonal": GAUSSIAN,
    "masks": {"sample", "log_prob", "precision_diag", "output_covariance"},
    "mixture": GAUSSIAN - {"kl", "output_covariance"},
    "particles": {"sample"},
}
"""What a family can do. All else has to raise a UserError."""


def family_of(name: str) -> str:
    return name.split("/")[0]


def offering(what: str) -> list[str]:
    return [name for name in BUILDERS if what in OFFERS[family_of(name)]]


@dataclass
class Made:
    posterior: Posterior
    adapter: Adapter
    base: Any

    @property
    def model(self) -> PeftModel:
        return self.adapter.model


@pytest.fixture
def make(tiny_llama: Any) -> Callable[[str], Made]:
    """family -> a posterior over the tiny model's adapter, that model, and the base model without an adapter."""
    base = copy.deepcopy(tiny_llama)

    def build(name: str) -> Made:
        adapter = Adapter.of(tiny_llama)
        torch.manual_seed(4)
        return Made(BUILDERS[name](adapter), adapter, base)

    return build


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


def draw(p: Posterior, seed: int, n: int = 1) -> list[dict[str, Tensor]]:
    return list(p.sample(n, seed))


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(input_ids=IDS).logits


def predicted(p: Posterior, model: PeftModel, mode: str = "auto", n: int = 4, **options: Any) -> Any:
    return p.predictive(model, DATA, LIKELIHOOD, n, mode, seed=5, **options)


def test_every_family_and_method_is_here() -> None:
    assert {family_of(name) for name in BUILDERS} == set(FAMILIES) == set(OFFERS), (
        "a builder, and what it offers"
    )
    assert {kind.family for kind in FAMILIES.values()} == set(FAMILIES)
    assert set(FITS) == set(METHODS), "settings for a fit of a few steps"


every_family = pytest.mark.parametrize("name", BUILDERS)


# --------------------------------------------------------------------------------------------------------------- disk


@every_family
def test_it_comes_back_to_the_bit(name: str, make: Any, tmp_path: Path) -> None:
    made = make(name)
    p = made.posterior
    folder = p.save(tmp_path / "p")
    files = sorted(f for f in folder.rglob("*") if f.is_file())
    assert {f.suffix for f in files} == {".json", ".safetensors"}  # no pickle
    assert set(FILES) <= {f.name for f in files}
    assert json.loads((folder / "posterior_config.json").read_text())["family"] == p.family == family_of(name)
    back = Posterior.load(folder, copy.deepcopy(made.base))
    assert type(back) is type(p) is FAMILIES[p.family]
    assert back.origin == p.origin and back.adapter_config == p.adapter_config
    assert same(back.mean(), p.mean()) and same(back.tensors(), p.tensors())
    assert back.uncertain() == p.uncertain()
    if "sample" in OFFERS[p.family]:
        assert all(same(a, b) for a, b in zip(draw(p, 9, 3), draw(back, 9, 3), strict=True))
    again = back.save(tmp_path / "again")
    for file in files:
        assert (again / file.relative_to(folder)).read_bytes() == file.read_bytes()


@every_family
def test_it_predicts_the_same_on_a_fresh_base(name: str, make: Any, tmp_path: Path) -> None:
    made = make(name)
    before = predicted(made.posterior, made.model)
    made.posterior.save(tmp_path / "p")
    fresh = copy.deepcopy(made.base)
    back = Posterior.load(tmp_path / "p", fresh)
    after = predicted(back, back.attach(fresh))
    assert torch.equal(before.probs, after.probs)
    assert torch.equal(before.mutual_information, after.mutual_information)


@every_family
def test_stock_peft_loads_the_mean(name: str, make: Any, tmp_path: Path) -> None:
    made = make(name)
    folder = made.posterior.save(tmp_path / "p")
    stock = PeftModel.from_pretrained(copy.deepcopy(made.base), str(folder)).eval()
    attached = made.posterior.attach(copy.deepcopy(made.base))
    assert torch.equal(logits(stock), logits(attached))
    made.posterior.write(made.model, made.posterior.mean())
    assert torch.equal(logits(stock), logits(made.model))


@pytest.mark.parametrize("name", offering("sample"))
def test_exported_draws_are_adapters(name: str, make: Any, tmp_path: Path) -> None:
    made = make(name)
    folders = made.posterior.export_samples(2, tmp_path / "draws", seed=6)
    for folder, tree in zip(folders, made.posterior.sample(2, 6), strict=True):
        stock = PeftModel.from_pretrained(copy.deepcopy(made.base), str(folder)).eval()
        made.posterior.write(made.model, tree)
        assert torch.equal(logits(stock), logits(made.model))
    with pytest.raises(UserError, match="exists"):
        made.posterior.export_samples(2, tmp_path / "draws", seed=6)


def poison(path: Path) -> None:
    tensors = load_file(path)
    key = next(k for k in sorted(tensors) if tensors[k].numel())
    tensors[key].view(-1)[0] = math.nan
    save_file(tensors, path, {"format": "pt"})


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@every_family
def test_what_is_broken_is_refused(name: str, make: Any, tmp_path: Path) -> None:
    made = make(name)
    whole = made.posterior.save(tmp_path / "whole")
    number = 0

    def refused(words: str, change: Callable[[Path], Any], model: Any = None) -> None:
        nonlocal number
        folder = tmp_path / f"broken{number}"
        number += 1
        shutil.copytree(whole, folder)
        change(folder)
        with pytest.raises(UserError, match=words):
            Posterior.load(folder, model)

    for file in FILES:
        refused("missing", lambda f, file=file: (f / file).unlink())
        refused("JSON" if file.endswith("json") else "no safetensors", lambda f, file=file: cut(f / file))
    for file in FILES[1:3]:
        refused("NaN", lambda f, file=file: poison(f / file))
    config = json.loads((whole / FILES[0]).read_text())
    refused("has rank 2, .* says r = 3", lambda f: (f / FILES[0]).write_text(json.dumps({**config, "r": 3})))
    other = copy.deepcopy(made.base)
    with torch.no_grad():
        next(other.parameters()).view(-1)[0] += 1
    refused("base model with hash", lambda f: None, other)
    about = json.loads((whole / FILES[3]).read_text())
    refused("version 99", lambda f: (f / FILES[3]).write_text(json.dumps({**about, "version": 99})))
    strange = {**about, "family": p[:-1] + "x" if (p := about["family"]) else ""}
    refused("unknown family .* did you mean", lambda f: (f / FILES[3]).write_text(json.dumps(strange)))


@every_family
def test_tensors_of_another_family_are_refused(name: str, make: Any, tmp_path: Path) -> None:
    folder = make(name).posterior.save(tmp_path / "p")
    about = json.loads((folder / FILES[3]).read_text())
    for other in set(FAMILIES) - {about["family"]}:
        (folder / FILES[3]).write_text(json.dumps({**about, "family": other}))
        with pytest.raises(UserError):
            Posterior.load(folder)


@every_family
def test_nothing_is_overwritten_and_nothing_half_written(
    name: str, make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    p = make(name).posterior
    folder = p.save(tmp_path / "p")
    before = {f: f.read_bytes() for f in folder.rglob("*") if f.is_file()}
    with pytest.raises(UserError, match="exists and is not an empty folder"):
        p.save(folder)
    bad = p.mean()
    next(iter(bad.values())).view(-1)[0] = math.nan
    monkeypatch.setattr(p, "mean", lambda: bad)
    with pytest.raises(UserError, match="NaN"):
        p.save(tmp_path / "q")
    assert {f: f.read_bytes() for f in folder.rglob("*") if f.is_file()} == before
    assert [f.name for f in tmp_path.iterdir()] == ["p"]


# -------------------------------------------------------------------------------------------------------------- draws


@pytest.mark.parametrize("name", offering("sample"))
def test_a_draw_is_its_seeds_and_numbers(name: str, make: Any) -> None:
    p = make(name).posterior
    five, three = draw(p, 8, 5), draw(p, 8, 3)
    assert all(same(a, b) for a, b in zip(five, three, strict=False))
    assert not same(five[0], five[1])
    assert name == "particles" or not same(five[0], draw(p, 7)[0])
    mean, varies = p.mean(), set(p.uncertain())
    for key, value in mean.items():
        assert all(d[key].dtype == torch.float32 and d[key].shape == value.shape for d in five)
        differs = any(not torch.equal(d[key], five[0][key]) for d in draw(p, 8, 12))
        assert differs == (key in varies), key
        assert key in varies or torch.equal(five[0][key], value)
    five[0][next(iter(mean))].fill_(9.0)  # a draw is the caller's
    assert same(mean, p.mean()) and same(draw(p, 8)[0], three[0])
    with pytest.raises(UserError, match="at least 1, got 0"):
        list(p.sample(0, 8))


@pytest.mark.parametrize("name", offering("antithetic"))
def test_antithetic_draws_mirror(name: str, make: Any) -> None:
    p = make(name).posterior
    mean, draws = p.mean(), list(p.sample(6, 8, antithetic=True))
    if isinstance(p, Mixture):  # about the component's mean: their pairs have one of two sums
        sums = [{k: 2 * v for k, v in c.mean().items()} for c in p.components]
    else:
        sums = [{k: 2 * v for k, v in mean.items()}]
        assert all(same(a, b) for a, b in zip(draws[::2], draw(p, 8, 3), strict=True))
    for one, two in zip(draws[::2], draws[1::2], strict=True):
        total = {k: one[k] + two[k] for k in mean}
        assert any(all(torch.allclose(total[k], s[k], atol=1e-6) for k in mean) for s in sums)
        assert not same(one, two)


@pytest.mark.parametrize("name", offering("sample"))
def test_draws_have_the_moments(name: str, make: Any) -> None:
    p = make(name).posterior
    count = 1500
    total: dict[str, Tensor] = {}
    squares: dict[str, Tensor] = {}
    mean = p.mean()
    for tree in p.sample(count, 1):
        for key in mean:
            apart = tree[key].double() - mean[key]
            total[key] = total.get(key, 0) + apart
            squares[key] = squares.get(key, 0) + apart.square()
    precision = p.precision_diag() if "precision_diag" in OFFERS[p.family] else None
    for key in mean:
        variance = squares[key] / count - (total[key] / count).square()
        if precision is None:
            torch.testing.assert_close(total[key] / count, torch.zeros_like(total[key]), atol=1e-6, rtol=0)
            continue
        free = ~precision[key].isinf()
        assert bool((squares[key][~free] == 0).all()) and free.any() == (key in p.uncertain())
        exact = precision[key][free].double().reciprocal()
        ratio = variance[free] / exact
        z = total[key][free] / (count * exact).sqrt()
        assert z.numel() == 0 or float(z.abs().max()) < 5.5, key
        assert ratio.numel() == 0 or float((ratio - 1).abs().max()) < (
            0.35 if p.family == "masks" else 0.2
        ), key
        assert ratio.numel() == 0 or float(ratio.mean() - 1) < 0.05, key


@pytest.mark.parametrize("name", offering("output_covariance"))
def test_the_covariance_of_outputs_is_that_of_draws(name: str, make: Any) -> None:
    """J Sigma J^T against the covariance of J (theta - m) over draws."""
    made = make(name)
    p = made.posterior
    p.write(made.model, p.mean())
    _, j = jacobians(made.model, make_batch(DATA[:3]), LIKELIHOOD)
    exact = p.output_covariance({k: j[k] for k in p.uncertain()})
    mean = p.mean()
    moved = []
    for tree in p.sample(1200, 2):
        parts = [(j[k].flatten(2) @ (tree[k] - mean[k]).flatten()) for k in p.uncertain()]
        moved.append(torch.stack(parts).sum(0))
    draws = torch.stack(moved).double()  # [S, B, C]
    apart = draws - draws.mean(0)
    sampled = torch.einsum("sbc,sbd->bcd", apart, apart) / len(apart)
    assert exact.shape == (3, 3, 3)
    torch.testing.assert_close(exact, exact.mT, atol=1e-10, rtol=1e-6)
    assert float((sampled - exact).norm() / exact.norm()) < 0.15


# -------------------------------------------------------------------------------------- densities, temperature, pruning


@pytest.mark.parametrize("name", offering("kl"))
def test_divergences(name: str, make: Any) -> None:
    made = make(name)
    p = made.posterior
    assert p.kl() > 0
    to: list[Posterior] = []
    if p.family != "low_rank_plus_diagonal":  # to diagonal ones alone
        assert p.kl(p) == pytest.approx(0, abs=1e-3)
        to += [p.temper(4.0), p.temper(0.25)]
    if p.family not in ("core", "last_layer"):
        to.append(
            DiagonalGaussian(
                p.adapter_config,
                p.mean(),
                {k: torch.full_like(made.adapter.mean[k], 0.1) for k in p.uncertain()},
                p.origin,
            )
        )
    for other in to:  # KL = E_q[log q - log p] >= 0
        assert p.kl(other) > 0
        if "sample" in OFFERS[p.family]:
            ratios = torch.tensor([p.log_prob(t) - other.log_prob(t) for t in p.sample(60, 3)])
            assert float(ratios.mean()) == pytest.approx(p.kl(other), abs=5 * float(ratios.std()) / 60**0.5)
    with pytest.raises(UserError, match=r"KL|closed form"):
        p.kl(particles(made.adapter))


@pytest.mark.parametrize("name", offering("log_prob"))
def test_densities(name: str, make: Any) -> None:
    p = make(name).posterior
    tree = draw(p, 1)[0]
    assert math.isfinite(p.log_prob(tree))
    key = next(iter(tree))
    with pytest.raises(UserError, match=key.split(".")[-3]):
        p.log_prob({k: v for k, v in tree.items() if k != key})
    certain = next((k for k in tree if k not in p.uncertain()), None)
    if certain:
        assert p.log_prob({**tree, certain: tree[certain] + 1}) == -math.inf


@pytest.mark.parametrize("name", offering("temper"))
def test_temper_divides_variances(name: str, make: Any) -> None:
    made = make(name)
    p = made.posterior
    cold = p.temper(4.0)
    assert cold.origin.temper == 4.0 and cold.temper(0.25).origin.temper == 1.0 and p.origin.temper == 1.0
    assert same(cold.mean(), p.mean())
    pairs = (
        list(zip(p.components, cold.components, strict=True)) if isinstance(p, Mixture) else [(p, cold)]  # type: ignore[attr-defined]
    )
    for warm, colder in pairs:
        before, after = warm.precision_diag(), colder.precision_diag()
        for key in before:
            torch.testing.assert_close(after[key], 4 * before[key], rtol=1e-4, atol=0)
    if "closed_form" in OFFERS[p.family]:
        mean, spread = p.closed_form(made.model, make_batch(DATA), LIKELIHOOD)
        mean4, spread4 = cold.closed_form(made.model, make_batch(DATA), LIKELIHOOD)
        torch.testing.assert_close(mean4, mean)
        torch.testing.assert_close(4 * spread4, spread)
    for tau in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(UserError, match="tau"):
            p.temper(tau)


@every_family
def test_what_it_lacks_it_says(name: str, make: Any) -> None:
    made = make(name)
    p = made.posterior
    tree = p.mean()
    calls: dict[str, Callable[[], Any]] = {
        "sample": lambda: list(p.sample(1, 0)),
        "antithetic": lambda: list(p.sample(2, 0, antithetic=True)),
        "log_prob": lambda: p.log_prob(tree),
        "kl": lambda: p.kl(),
        "precision_diag": p.precision_diag,
        "temper": lambda: p.temper(2.0),
        "prune": lambda: p.prune(0.1),
        "output_covariance": lambda: p.output_covariance(
            {k: torch.ones(1, 1, *v.shape) for k, v in tree.items()}
        ),
        "closed_form": lambda: p.closed_form(made.model, make_batch(DATA), LIKELIHOOD),
    }
    assert set(calls) == ALL
    for what, call in calls.items():
        if what in OFFERS[p.family]:
            call()
            continue
        with pytest.raises(UserError) as caught:
            call()
        assert "\n" not in str(caught.value)
        assert repr(p.family) in str(caught.value) or "last layer" in str(caught.value), (
            what,
            str(caught.value),
        )


# -------------------------------------------------------------------------------------------------------- predictions


@pytest.mark.parametrize("name", offering("sample"))
def test_batched_is_sequential(name: str, make: Any) -> None:
    made = make(name)
    held = {k: v.detach().clone() for k, v in adapter_tensors(made.model).items()}
    one = predicted(made.posterior, made.model, "batched", keep_logits=True)
    two = predicted(made.posterior, made.model, "sequential", keep_logits=True)
    assert one.logits.shape == (4, 6, 3) and float(one.logit_variance.max()) > 1e-4
    torch.testing.assert_close(one.logits, two.logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(one.probs, two.probs, atol=1e-5, rtol=1e-5)
    by_hand = []
    for tree in made.posterior.sample(4, 5):
        made.posterior.write(made.model, tree)
        with torch.no_grad():
            by_hand.append(torch.cat([LIKELIHOOD.outputs(made.model, make_batch([e])) for e in DATA]))
    torch.testing.assert_close(one.logits, torch.stack(by_hand).to(one.logits), atol=1e-5, rtol=1e-5)
    made.posterior.write(made.model, held)
    predicted(made.posterior, made.model)
    assert same({k: v.detach() for k, v in adapter_tensors(made.model).items()}, held)


@pytest.mark.parametrize(
    "name", [n for n in BUILDERS if OFFERS[family_of(n)] & {"output_covariance", "closed_form"}]
)
def test_leave_one_out_is_of_every_family_with_a_covariance(name: str, make: Any) -> None:
    made = make(name)
    found = made.posterior.loo(made.model, DATA, LIKELIHOOD)
    assert found.mode == ("closed_form" if name == "last_layer" else "linearised")
    assert found.mean_nll > float(found.train_nll.mean()) and bool((found.sensitivity > 0).all())


# ------------------------------------------------------------------------------------------------------------- methods

FITS: dict[str, dict[str, Any]] = {
    "batch_ensemble": {"members": 2},
    "blob": {},
    "concrete_dropout": {},
    "core": {},
    "dropout": {},
    "ensemble": {"members": 2},
    "entropy_mcmc": {"particles": 2, "cycles": 1, "exploration": 0.4},
    "ivon": {},
    "langevin": {"particles": 2},
    "laplace": {},
    "map": {},
    "mixture": {"method": "dropout", "members": 2},
    "rank_masks": {},
    "swag": {"rank": 2},
    "temperature": {},
    "tfb": {"draws": 2, "anchors": 6},
    "vbll": {"steps": 3, "features": 8, "batch_size": 6},
}
"""Settings of a fit of a few steps."""


def fitted(base: Any, name: str, seed: int = 0) -> tuple[Posterior, FitReport, PeftModel]:
    model = adapted(base)
    torch.manual_seed(7)
    with torch.no_grad():  # past its first steps: with B at 0 the draws of some families do not differ
        for key, value in adapter_tensors(model).items():
            if "lora_B" in key and name not in ("ensemble", "mixture"):  # which begin with new adapters
                value.copy_(0.1 * torch.randn_like(value))
    torch.manual_seed(100 + seed)  # what the caller left there must not matter
    job = Job(
        model,
        examples(12),
        LIKELIHOOD,
        Training(epochs=1, batch_size=3, learning_rate=5e-3),
        examples(5),
        seed=seed,
    )
    posterior, report = METHODS[name](**FITS[name]).fit(job)
    return posterior, report, model


@pytest.mark.parametrize("name", METHODS)
def test_a_method_fits(name: str, tiny_llama: Any, tmp_path: Path) -> None:
    base = copy.deepcopy(tiny_llama)
    posterior, report, model = fitted(copy.deepcopy(tiny_llama), name)
    assert posterior.family in FAMILIES and report.family == posterior.family and report.method == name
    assert report.examples == 12 and report.steps >= 0 and report.seconds >= 0
    assert json.loads(json.dumps(asdict(report), allow_nan=False))["method"] == name
    assert report.held_out_nll is not None and 0 < report.held_out_nll < 20
    held = {k: v.detach().float() for k, v in adapter_tensors(model).items()}
    assert same(held, posterior.mean())  # the mean is left in the model
    assert not model.training
    posterior.check_base(base)
    folder = posterior.save(tmp_path / "p")
    back = Posterior.load(folder, base)
    assert same(back.tensors(), posterior.tensors())
    before, after = predicted(posterior, model, n=3), predicted(back, back.attach(base), n=3)
    torch.testing.assert_close(after.probs, before.probs, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(before.probs.sum(-1), torch.ones(6).to(before.probs))
    if "sample" in OFFERS[posterior.family]:
        for one, two in zip(draw(posterior, 3, 2), draw(back, 3, 2), strict=True):
            assert all(torch.allclose(v, two[k], atol=1e-6, rtol=1e-5) for k, v in one.items())
    again, repeated, _ = fitted(copy.deepcopy(tiny_llama), name)
    assert same(again.tensors(), posterior.tensors()) and same(again.mean(), posterior.mean())
    assert repeated.held_out_nll == report.held_out_nll


def test_no_data_is_refused(tiny_llama: Any) -> None:
    with pytest.raises(UserError, match="no training examples"):
        Job(adapted(tiny_llama), [], LIKELIHOOD)
