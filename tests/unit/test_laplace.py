"""Laplace on a tiny language model: the curvature against autograd, one example at a time; settings; what is saved."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from torch.distributions import MultivariateNormal
from transformers import LlamaForCausalLM

from vlm_reason.errors import UserError
from vlm_reason.weights import METHODS, DiagonalGaussian, Example, Job, Posterior, Training
from vlm_reason.weights.adapter import adapter_tensors
from vlm_reason.weights.curvature import DiagonalCurvature, FullCurvature, KroneckerCurvature, collect
from vlm_reason.weights.examples import make_batch
from vlm_reason.weights.families.full import FullGaussian
from vlm_reason.weights.families.kronecker import KroneckerGaussian, as_matrix
from vlm_reason.weights.likelihoods import BradleyTerry, Choice, Likelihood, Regression, Tokens
from vlm_reason.weights.methods.laplace import Laplace

CHOICE = Choice((3, 5, 7))


@pytest.fixture
def model(tiny_llama: LlamaForCausalLM) -> PeftModel:
    """fp64, one layer's q and v and another's, with B away from 0."""
    config = LoraConfig(
        task_type="CAUSAL_LM", r=2, lora_alpha=4, lora_dropout=0.5, target_modules=["q_proj", "v_proj"]
    )
    adapted = get_peft_model(tiny_llama, config).double()
    torch.manual_seed(3)
    for key, p in adapter_tensors(adapted).items():
        if "lora_B" in key:
            p.data.normal_(0, 0.3)
    return adapted  # type: ignore[return-value]


def examples(count: int = 12, pairs: bool = False) -> list[Example]:
    generator = torch.Generator().manual_seed(1)

    def ids(n: int) -> tuple[int, ...]:
        return tuple(torch.randint(0, 64, (3 + n % 4,), generator=generator).tolist())

    return [Example(str(n), ids(n), n % 3, ids(n + 1) if pairs else ()) for n in range(count)]


def gauss_newton(
    model: PeftModel, data: list[Example], likelihood: Likelihood
) -> tuple[Tensor, dict[str, slice]]:
    """[P, P] over tensors in order of their keys, one example and one output at a time, through PEFT's own forward."""
    tensors = dict(sorted(adapter_tensors(model).items()))
    for p in tensors.values():
        p.requires_grad_(True)
    model.eval()
    places, at = {}, 0
    for key, p in tensors.items():
        places[key] = slice(at, at + p.numel())
        at += p.numel()
    total = torch.zeros(at, at).double()
    for example in data:
        f = likelihood.outputs(model, make_batch([example]))[0]
        rows = [torch.autograd.grad(o, list(tensors.values()), retain_graph=True) for o in f]
        j = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows]).double()
        total += j.mT @ likelihood.hessian(f.detach()[None])[0].double() @ j
    return total, places


def weight() -> Tensor:
    return torch.randn(32, generator=torch.Generator().manual_seed(9))


LIKELIHOODS: dict[str, Any] = {
    "choice": CHOICE,
    "regression": Regression(weight(), 0.5),
    "pairs": BradleyTerry(weight()),
}


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_curvature_is_the_gauss_newton_matrix_of_all_examples(model: PeftModel, name: str) -> None:
    data, likelihood = examples(pairs=name == "pairs"), LIKELIHOODS[name]
    expected, places = gauss_newton(model, data, likelihood)
    full, diagonal = FullCurvature(), DiagonalCurvature()
    kron = KroneckerCurvature(rank=1000)
    model.train()
    logp = collect(model, data, likelihood, full, tokens=20)
    assert all(m.training for m in model.modules())  # as it was; dropout had no part in it
    collect(model, data, likelihood, diagonal, tokens=1000)
    collect(model, data, likelihood, kron, tokens=7)
    scale = expected.abs().max()
    assert (full.sums[""] - expected).abs().max() < 1e-5 * scale
    model.eval()
    with torch.no_grad():
        one_by_one = [make_batch([e]) for e in data]
        exact = sum(float(likelihood.log_prob(likelihood.outputs(model, b), b)) for b in one_by_one)
    assert logp == pytest.approx(exact, rel=1e-6)
    factors = kron.result()
    for key, place in places.items():
        own = expected[place, place]
        found = diagonal.sums[key].flatten().double()
        assert (found - own.diagonal()).abs().max() < 1e-5 * scale
        k = factors[key]
        small = (k.small_vectors * k.small_values) @ k.small_vectors.mT
        large = ((k.large_vectors * k.large_values) @ k.large_vectors.mT).double()
        shape = adapter_tensors(model)[key].shape
        block = own.view(*shape, *shape)
        if "lora_B" in key:
            block = block.permute(1, 0, 3, 2)
        trace = own.trace()
        assert (small * large.trace() - torch.einsum("rdsd->rs", block)).abs().max() < 1e-5 * trace
        assert (large * small.trace() - torch.einsum("rdre->de", block)).abs().max() < 1e-5 * trace


def test_activations_are_those_of_the_low_rank_path_and_shared(tiny_llama: LlamaForCausalLM) -> None:
    config = LoraConfig(
        task_type="CAUSAL_LM", r=2, lora_alpha=4, target_modules=["q_proj", "k_proj", "v_proj"]
    )
    model = get_peft_model(tiny_llama, config)
    for key, p in adapter_tensors(model).items():  # type: ignore[arg-type]
        if "lora_B" in key:
            p.data.normal_(0, 0.3)
    data = examples()
    kron = KroneckerCurvature(rank=1000, factors="activations")
    collect(model, data, LIKELIHOODS["regression"], kron, tokens=20)  # type: ignore[arg-type]
    name = "base_model.model.model.layers.1.self_attn.v_proj"
    layer = model.get_submodule(name)
    seen: list[Tensor] = []
    hooks = [
        layer.lora_A["default"].register_forward_hook(lambda m, args, out: seen.extend((args[0], out))),
        layer.lora_B["default"].register_forward_hook(lambda m, args, out: seen.append(out)),
    ]
    q, s, r, g = (0.0 for _ in range(4))
    for example in data:
        seen.clear()
        f = LIKELIHOODS["regression"].outputs(model, make_batch([example]))
        x, u, v = seen
        gu, gv = torch.autograd.grad(f.sum() / 0.5, [u, v])
        q, s = q + x[0].mT @ x[0], s + gu[0].mT @ gu[0]
        r, g = r + u[0].mT @ u[0], g + gv[0].mT @ gv[0]
    for hook in hooks:
        hook.remove()
    tokens = sum(len(e.ids) for e in data)
    assert kron.tokens == tokens
    found = kron.result()
    for key, small, large in ((".lora_A.weight", s, q), (".lora_B.weight", r, g)):
        k = found[name + key]
        mine = (k.small_vectors * k.small_values) @ k.small_vectors.mT
        assert torch.allclose(mine, torch.as_tensor(small).double() / tokens, rtol=1e-4, atol=1e-6)
        mine = (k.large_vectors * k.large_values) @ k.large_vectors.mT
        assert torch.allclose(mine, torch.as_tensor(large), rtol=1e-4, atol=1e-4)
    sources = {
        found[name.replace("v_proj", p) + ".lora_A.weight"].same for p in ("q_proj", "k_proj", "v_proj")
    }
    assert len(sources) == 1
    assert sum(k.endswith("lora_A.weight") for k in kron.large) == 2  # one a decoder layer


@pytest.mark.parametrize("make", [DiagonalCurvature, FullCurvature, lambda: KroneckerCurvature(1000),
                                  lambda: KroneckerCurvature(1000, "activations")])  # fmt: skip
def test_curvatures_of_two_parts_of_the_data_add_up(model: PeftModel, make: Any) -> None:
    data, whole, left, right = examples(), make(), make(), make()
    for into, part in ((whole, data), (left, data[:5]), (right, data[5:])):
        collect(model, part, CHOICE, into)
    left.merge(right)
    if isinstance(whole, KroneckerCurvature):
        assert whole.tokens == left.tokens
        for key, large in whole.large.items():
            (u, q, _), (v, p, _) = large.factors(), left.large[key].factors()
            assert torch.allclose((u * q) @ u.mT, (v * p) @ v.mT, rtol=1e-8)
        whole.sums, left.sums = whole.small, left.small
    for key, value in whole.sums.items():
        assert torch.allclose(value, left.sums[key], rtol=1e-10)


@pytest.mark.parametrize("likelihood", [CHOICE, Tokens()], ids=["choice", "tokens"])
def test_sampled_labels_average_to_the_exact_curvature(model: PeftModel, likelihood: Any) -> None:
    data = [dataclasses.replace(e, target=2) for e in examples(3)]
    if isinstance(likelihood, Choice):
        expected, _ = gauss_newton(model, data, likelihood)
    else:  # the Fisher matrix of every predicted token, by enumeration of the vocabulary
        expected = token_fisher(model, data)
    samples = 2 if isinstance(likelihood, Choice) else 40
    errors, total = [], torch.zeros_like(expected)
    for seed in range(64 if isinstance(likelihood, Choice) else 8):
        full = FullCurvature()
        collect(model, data, likelihood, full, samples=samples, seed=seed)
        total += full.sums[""]
        errors.append(float((total / (seed + 1) - expected).norm() / expected.norm()))
    assert errors[-1] < 0.15
    assert errors[-1] < 3 * sum(errors[:2]) / 2 / math.sqrt(
        len(errors)
    )  # it falls as the noise of a mean does
    again = FullCurvature()
    collect(model, data, likelihood, again, samples=2, seed=0, tokens=1)
    once = FullCurvature()
    collect(model, data, likelihood, once, samples=2, seed=0)
    assert torch.allclose(again.sums[""], once.sums[""], rtol=1e-4, atol=1e-6 * float(expected.abs().max()))


def token_fisher(model: PeftModel, data: list[Example]) -> Tensor:
    tensors = [p.requires_grad_(True) for _, p in sorted(adapter_tensors(model).items())]
    model.eval()
    size = sum(p.numel() for p in tensors)
    total = torch.zeros(size, size).double()
    for example in data:
        logp = model(torch.tensor([example.ids])).logits[0].log_softmax(-1)
        for place in range(int(example.target), len(example.ids)):
            law = logp[place - 1]
            g = torch.stack([
                torch.cat([t.flatten() for t in torch.autograd.grad(one, tensors, retain_graph=True)]) for one in law
            ])  # fmt: skip
            total += (g * law.detach().exp()[:, None]).mT @ g
    return total


# ---------------------------------------------------------------------------------------------- the whole method


@pytest.fixture
def job(model: PeftModel) -> Job:
    return Job(model.float(), examples(), CHOICE, Training(epochs=2, batch_size=4), held_out=examples(5))


SHAPES = {
    "kronecker": Laplace(rank=3, groups="kind"),
    "shared": Laplace(rank=3, factors="activations", groups="tensor"),
    "full": Laplace(structure="full", groups="kind"),
}


@pytest.mark.parametrize("name", SHAPES)
def test_saved_posterior_is_the_same(job: Job, name: str, tmp_path: Path) -> None:
    posterior, report = SHAPES[name].fit(job)
    loaded = Posterior.load(posterior.save(tmp_path / "p"))
    assert type(loaded) is type(posterior)
    for ours, theirs in zip(posterior.sample(3, 5), loaded.sample(3, 5), strict=True):
        assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    tree = next(posterior.sample(1, 8))
    assert loaded.log_prob(tree) == pytest.approx(posterior.log_prob(tree), rel=1e-9)
    assert loaded.kl() == pytest.approx(posterior.kl(), rel=1e-9)
    assert report.held_out_nll is not None and report.train_nll is not None
    assert report.details["log_evidence"] < -report.train_nll * 12


def covariance_of(posterior: KroneckerGaussian | FullGaussian) -> tuple[Tensor, list[str]]:
    keys = posterior.uncertain()
    mean = posterior.mean()
    size = sum(mean[k].numel() for k in keys)
    eye, at, jacobian = torch.eye(size).double(), 0, {}
    for key in keys:
        jacobian[key] = eye[:, at : at + mean[key].numel()].reshape(1, size, *mean[key].shape)
        at += mean[key].numel()
    return posterior.output_covariance(jacobian)[0], keys


@pytest.mark.parametrize("name", SHAPES)
def test_density_divergences_and_draws_are_those_of_the_dense_gaussian(job: Job, name: str) -> None:
    posterior: Any = SHAPES[name].fit(job)[0]
    covariance, keys = covariance_of(posterior)

    def flat(tree: Mapping[str, Tensor]) -> Tensor:
        return torch.cat([tree[k].flatten() for k in keys]).double()

    law = MultivariateNormal(flat(posterior.mean()), (covariance + covariance.mT) / 2)
    trees = list(posterior.sample(4, 0))
    assert posterior.log_prob(trees[0]) == pytest.approx(float(law.log_prob(flat(trees[0]))), rel=1e-4)
    prior = torch.cat(
        [torch.full((posterior.mean()[k].numel(),), posterior.origin.prior[k]) for k in keys]
    ).double()
    flat_prior = MultivariateNormal(torch.zeros(len(prior)).double(), precision_matrix=prior.diag())
    kl = torch.distributions.kl_divergence
    assert posterior.kl() == pytest.approx(float(kl(law, flat_prior)), rel=1e-4)
    sigma = {k: torch.rand_like(v) + 0.1 for k, v in posterior.mean().items()}
    other = DiagonalGaussian(posterior.adapter_config, trees[1], sigma, posterior.origin)
    diagonal = MultivariateNormal(flat(trees[1]), flat(sigma).square().diag())
    assert posterior.kl(other) == pytest.approx(float(kl(law, diagonal)), rel=1e-4)
    cold = posterior.temper(4.0)
    cold_law = MultivariateNormal(flat(posterior.mean()), (covariance + covariance.mT) / 8)
    assert posterior.kl(cold) == pytest.approx(float(kl(law, cold_law)), rel=1e-4)
    assert torch.allclose(flat(posterior.precision_diag()), covariance.diagonal().reciprocal(), rtol=1e-4)
    opposite = list(posterior.sample(2, 0, antithetic=True))
    assert torch.allclose((flat(opposite[0]) + flat(opposite[1])) / 2, flat(posterior.mean()), atol=1e-6)
    assert torch.equal(flat(opposite[0]), flat(trees[0]))
    draws = torch.stack([flat(t) for t in posterior.sample(1500, 1)]) - flat(posterior.mean())
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(law.covariance_matrix), draws.mT, upper=False)
    chi = white.square().sum(0)
    size = len(prior)
    assert abs(float(chi.mean()) - size) < 4 * math.sqrt(2 * size / 1500)
    found = draws.mT @ draws / 1500
    assert float((found - covariance).norm() / covariance.norm()) < 3 * math.sqrt(size / 1500)


def test_linearised_score_chooses_the_prior(job: Job) -> None:
    settings = Laplace(prior="held_out", grid=(0.01, 1.0, 100.0), rank=4)
    posterior, report = settings.fit(job)
    grid = report.details["grid"]
    best = min(grid, key=lambda row: row["nll"])
    assert set(posterior.origin.prior.values()) == {best["prior_precision"]}
    assert report.held_out_nll == pytest.approx(best["nll"])
    # one example, one output covariance, by hand
    fixed = Laplace(prior="fixed", prior_precision=1.0, rank=4).fit(
        dataclasses.replace(job, held_out=examples(1))
    )
    from vlm_reason.weights.jacobians import jacobians

    batch = make_batch(examples(1))
    f, j = jacobians(job.model, batch, CHOICE)
    covariance = fixed[0].output_covariance(j)[0]
    draws = MultivariateNormal(f[0].double(), covariance + 1e-9 * torch.eye(3)).sample((40000,))
    expected = -math.log(float(draws.softmax(-1)[:, 0].mean()))
    assert fixed[1].held_out_nll == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize("structure", ["diagonal", "full"])
def test_yesterdays_posterior_as_prior_is_all_data_at_once(job: Job, structure: Any) -> None:
    """Curvature at one and the same place: H1 + (H2 + delta) in either order."""
    first = dataclasses.replace(job, train=job.train[:6], held_out=())
    second = dataclasses.replace(job, train=job.train[6:], held_out=())
    yesterday, _ = Laplace(structure="diagonal", prior="fixed", prior_precision=3.0).fit(first)
    today, report = Laplace(structure=structure, prior="start").fit(
        dataclasses.replace(second, start=yesterday)
    )
    if structure == "diagonal":
        whole, _ = Laplace(structure="diagonal", prior="fixed", prior_precision=3.0).fit(
            dataclasses.replace(job, held_out=())
        )
        for key, value in whole.precision_diag().items():
            assert torch.allclose(today.precision_diag()[key], value, rtol=1e-4)
    kl = today.kl(yesterday)  # theta* = theta_0: log Z = log p - 1/2 (log|P| - log|P_0|)
    ratio = report.details["log_evidence"] + report.train_nll * 6  # type: ignore[operator]
    if structure == "full":
        p0 = sum(float(v.log().sum()) for v in yesterday.precision_diag().values())
        assert ratio == pytest.approx(-(today.log_det() - p0) / 2, rel=1e-3)  # type: ignore[attr-defined]
    assert kl > 0


def test_trains_first_only_what_was_never_trained(job: Job, tiny_llama: LlamaForCausalLM) -> None:
    _, report = Laplace(rank=2).fit(job)
    assert report.steps == 0
    for key, p in adapter_tensors(job.model).items():
        if "lora_B" in key:
            p.data.zero_()
    posterior, report = Laplace(rank=2).fit(job)
    assert report.steps == 6
    held = adapter_tensors(job.model)
    assert all(torch.equal(v, held[k].detach()) for k, v in posterior.mean().items())


def test_start_gives_the_mean(job: Job) -> None:
    tree = {k: v.detach() + 0.1 for k, v in adapter_tensors(job.model).items()}
    start = DiagonalGaussian(
        Laplace(rank=1).fit(job)[0].adapter_config, tree, {}, Laplace(rank=1).fit(job)[0].origin
    )
    posterior, _ = Laplace(rank=2).fit(dataclasses.replace(job, start=start))
    assert all(torch.equal(v, posterior.mean()[k]) for k, v in tree.items())


@pytest.mark.parametrize("name", ["laplace", "core", "vbll"])
def test_a_start_with_a_temperature_is_refused(job: Job, name: str) -> None:
    """What these methods give has outputs of its own, and no temperature: it would be lost."""
    start = Laplace(rank=1).fit(job)[0]
    start.origin = dataclasses.replace(start.origin, output_temperature=2.5)
    before = {k: v.detach().clone() for k, v in adapter_tensors(job.model).items()}
    with pytest.raises(UserError, match=f"{name}: the start divides its outputs by 2.5.*method temperature"):
        METHODS[name]().fit(dataclasses.replace(job, start=start))
    assert all(torch.equal(v, before[k]) for k, v in adapter_tensors(job.model).items())


def test_feeds_the_batched_predictive(job: Job) -> None:
    posterior, _ = Laplace(rank=3).fit(job)
    batched = posterior.predictive(job.model, examples(4), CHOICE, 4, "batched")
    sequential = posterior.predictive(job.model, examples(4), CHOICE, 4, "sequential")
    assert (batched.probs - sequential.probs).abs().max() < 1e-5
    assert float(batched.mutual_information.max()) > 1e-3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"structure": "dense"}, "structure must be one of diagonal, kronecker, full, got 'dense'"),
        ({"rank": 0}, "rank must be >= 1, got 0"),
        ({"temperature": 0.0}, "temperature must be > 0, got 0.0"),
        ({"prior": "flat"}, "prior must be one of"),
        ({"grid": (1.0, -1.0)}, "grid must hold prior precisions > 0"),
        ({"samples": -1}, "samples must be >= 0"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        Laplace(**settings)


def test_what_cannot_be_done_says_so(job: Job) -> None:
    with pytest.raises(UserError, match="a full covariance of 448 weights .* the limit is 400 weights"):
        Laplace(structure="full", largest_full=400).fit(job)
    with pytest.raises(UserError, match="token likelihood needs sampled labels"):
        Laplace().fit(dataclasses.replace(job, likelihood=Tokens()))
    with pytest.raises(UserError, match="needs held-out examples"):
        Laplace(prior="held_out").fit(dataclasses.replace(job, held_out=()))
    with pytest.raises(UserError, match="needs a posterior to start from"):
        Laplace(prior="start").fit(job)
    kron = Laplace(rank=2).fit(job)[0]
    with pytest.raises(UserError, match="needs a diagonal Gaussian"):
        Laplace(prior="start").fit(dataclasses.replace(job, start=kron))
    with pytest.raises(UserError, match="no pruning"):
        kron.prune(0.1)
    with pytest.raises(UserError, match="tau must be > 0"):
        kron.temper(0.0)
    assert as_matrix("x.lora_B.weight", torch.zeros(5, 2)).shape == (2, 5)
    with torch.no_grad():
        for p in adapter_tensors(job.model).values():
            p.fill_(math.nan)
    with pytest.raises(UserError, match="the outputs for example .* are not finite"):
        Laplace(train=False).fit(job)


def test_processes_share_the_examples_and_all_end_with_the_whole(
    model: PeftModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes acted one after the other."""
    import copy

    from vlm_reason.weights.curvature import collect as module_function

    module = __import__(module_function.__module__, fromlist=["collect"])
    alone = FullCurvature()
    expected = collect(model, examples(), CHOICE, alone)
    empty = FullCurvature()
    found: list[Any] = []

    def as_rank(number: int) -> Any:
        def work(run: Any) -> list[Any]:
            monkeypatch.setattr(module, "rank", lambda: number)
            return [copy.deepcopy(run())]

        return work

    for number in range(2):  # what each of them sends
        monkeypatch.setattr(module, "world", lambda: 2)
        monkeypatch.setattr(module, "together", as_rank(number))
        part = FullCurvature()
        found.append((part, collect(model, examples(), CHOICE, part)))
    monkeypatch.setattr(module, "together", lambda run: copy.deepcopy(found))
    assert collect(model, examples(), CHOICE, empty) == pytest.approx(expected)
    assert torch.allclose(empty.sums[""], alone.sums[""], rtol=1e-9, atol=1e-12)
