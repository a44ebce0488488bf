"""A posterior over an adapter: densities in closed form, draws, files, and what stock PEFT and a suite make of it."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.suite_parts import suite_data
from vlm_reason.config import from_dict
from vlm_reason.errors import UserError
from vlm_reason.evaluation.members import load_members
from vlm_reason.evaluation.suite import SuiteConfig
from vlm_reason.evaluation.suite_run import run_suite
from vlm_reason.models.load import fingerprint_weights
from vlm_reason.weights import FAMILIES, IVON, DiagonalGaussian, Origin, Posterior
from vlm_reason.weights.adapter import adapter_tensors, base_fingerprint

IDS = torch.arange(4, 40).view(2, 18)


def adapted(base: Any, **keys: Any) -> PeftModel:
    torch.manual_seed(1)
    config = LoraConfig(task_type="CAUSAL_LM", r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], **keys)
    return get_peft_model(base, config)


def fitted(model: PeftModel, steps: int = 3, **keys: Any) -> IVON:
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = IVON(parameters, 0.5, 100, hess_init=2.0, weight_decay=0.1, data_size=64, **keys)
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
    return optimizer


def small(seed: int = 0, scale: float = 1.0) -> DiagonalGaussian:
    torch.manual_seed(seed)
    mean = {"b": torch.randn(3, 2), "a": torch.randn(40), "fixed": torch.ones(2)}
    sigma = {"b": scale * (0.1 + torch.rand(3, 2)), "a": scale * (0.1 + torch.rand(40))}
    return DiagonalGaussian({}, mean, sigma, Origin(prior={"a": 4.0, "b": 0.25}))


def normals(p: DiagonalGaussian) -> dict[str, torch.distributions.Normal]:
    mean = p.mean()
    return {k: torch.distributions.Normal(mean[k].double(), s.double()) for k, s in p.sigma().items()}


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


# ------------------------------------------------------------------------------------------------------ closed forms


def test_density_and_divergence_are_those_of_torch() -> None:
    p, q = small(0), small(1)
    (tree,) = q.sample(1, seed=5)
    exact = sum(float(n.log_prob(tree[k].double()).sum()) for k, n in normals(p).items())
    assert p.log_prob(tree) == pytest.approx(exact, rel=1e-9)
    of_q = normals(q)
    exact = sum(float(torch.distributions.kl_divergence(n, of_q[k]).sum()) for k, n in normals(p).items())
    assert p.kl(q) == pytest.approx(exact, rel=1e-9) and p.kl(p) == pytest.approx(0, abs=1e-12)
    prior = {"a": 0.5, "b": 2.0}  # precision 4 and 1/4
    exact = sum(
        float(torch.distributions.kl_divergence(n, torch.distributions.Normal(0.0, prior[k])).sum())
        for k, n in normals(p).items()
    )
    assert p.kl() == pytest.approx(exact, rel=1e-6)
    assert p.log_prob({**tree, "fixed": torch.zeros(2)}) == -math.inf
    with pytest.raises(UserError, match="flat"):
        DiagonalGaussian({}, p.mean(), p.sigma(), Origin()).kl()
    with pytest.raises(UserError, match="'b'"):
        p.log_prob({"a": tree["a"], "fixed": tree["fixed"]})


def test_draws_have_the_moments_and_antithetic_ones_mirror() -> None:
    p = small()
    draws = list(p.sample(4000, seed=3))
    for key, sigma in p.sigma().items():
        stack = torch.stack([d[key] for d in draws])
        assert ((stack.mean(0) - p.mean()[key]) / sigma).abs().max() < 4.5 / math.sqrt(4000)
        assert (stack.std(0) / sigma - 1).abs().max() < 0.05
    assert all(torch.equal(d["fixed"], torch.ones(2)) for d in draws[:3])
    pair = list(p.sample(4, seed=3, antithetic=True))
    for key, mean in p.mean().items():
        torch.testing.assert_close(pair[0][key] + pair[1][key], 2 * mean)
        torch.testing.assert_close(pair[2][key] + pair[3][key], 2 * mean)
    assert torch.equal(pair[0]["a"], draws[0]["a"]) and torch.equal(pair[2]["a"], draws[1]["a"])
    reordered = DiagonalGaussian(
        {}, dict(reversed(p.mean().items())), dict(reversed(p.sigma().items())), p.origin
    )
    assert all(torch.equal(v, draws[0][k]) for k, v in next(reordered.sample(1, seed=3)).items())
    with pytest.raises(UserError, match="at least 1"):
        p.sample(0, seed=3)


def test_temper_divides_variances_and_prune_takes_the_noisiest() -> None:
    p = small()
    cold = p.temper(4.0).temper(0.25).temper(4.0)
    assert cold.origin.temper == 4.0
    for key, value in cold.precision_diag().items():
        torch.testing.assert_close(value, 4 * p.precision_diag()[key])
    assert p.precision_diag()["fixed"].isinf().all()
    pruned = p.prune(0.5)
    snr = torch.cat([(p.mean()[k].abs() / s).view(-1) for k, s in p.sigma().items()])
    gone = torch.cat([(s == 0).view(-1) for s in pruned.sigma().values()])
    assert int(gone.sum()) == 23 and snr[gone].max() <= snr[~gone].min()
    assert all((pruned.mean()[k][s == 0] == 0).all() for k, s in pruned.sigma().items())
    assert pruned.kl(p) == math.inf and pruned.kl(pruned) == 0.0
    assert torch.cat([s.view(-1) for s in pruned.prune(1.0).sigma().values()]).eq(0).all()
    for wrong in (lambda: p.temper(0.0), lambda: p.prune(1.5)):
        with pytest.raises(UserError, match=r"must be"):
            wrong()


# --------------------------------------------------------------------------------------------------- from an optimiser


def test_it_is_what_the_optimiser_has(tiny_llama: Any) -> None:
    base = fingerprint_weights(tiny_llama)
    model = adapted(tiny_llama, modules_to_save=["lm_head"])
    assert base_fingerprint(model) == base
    for name, p in model.named_parameters():
        if "lora_B" in name and "layers.0" in name:
            p.requires_grad_(False)  # trained by none: certain
    optimizer = fitted(model)
    q = Posterior.from_optimizer(optimizer, model)
    assert isinstance(q, DiagonalGaussian)
    tensors = adapter_tensors(model)
    assert q.mean().keys() == tensors.keys() and any("lm_head" in key for key in tensors)
    assert q.sigma().keys() == {k for k, p in tensors.items() if p.requires_grad}
    for key, sigma in q.sigma().items():
        state = optimizer.state[tensors[key]]
        assert torch.equal(q.mean()[key], state["mean"])
        torch.testing.assert_close(sigma**-2, 100 * state["precision"])
    assert (q.origin.base, q.origin.ess, q.origin.data_size, q.origin.updates) == (base, 100, 64, 3)
    assert set(q.origin.prior.values()) == {10.0} and q.kl() > 0
    with optimizer.mean():
        held = logits(model)
    q.write(model, q.mean())
    assert torch.equal(logits(model), held)


def test_an_optimiser_of_other_weights_is_refused(tiny_llama: Any) -> None:
    model = adapted(tiny_llama)
    stranger = IVON([torch.nn.Parameter(torch.zeros(3))], 0.1, 100)
    with pytest.raises(UserError, match="not in adapter"):
        Posterior.from_optimizer(stranger, model)
    with pytest.raises(UserError, match="no adapter 'defualt'; did you mean 'default'"):
        Posterior.from_optimizer(fitted(model, 1), model, "defualt")
    optimizer = fitted(model, 1)
    next(iter(optimizer.state.values()))["mean"][0, 0] = math.nan
    with pytest.raises(UserError, match="NaN"):
        Posterior.from_optimizer(optimizer, model)


# ------------------------------------------------------------------------------------------------------------- on disk


@pytest.fixture
def saved(tiny_llama: Any, tmp_path: Path) -> tuple[Path, Any, DiagonalGaussian]:
    """(folder of a posterior, the bare base model, the posterior)."""
    base = copy.deepcopy(tiny_llama)
    model = adapted(tiny_llama)
    q = Posterior.from_optimizer(fitted(model), model)
    assert isinstance(q, DiagonalGaussian)
    return q.save(tmp_path / "posterior"), base, q


def test_it_comes_back_to_the_bit(saved: Any) -> None:
    folder, base, q = saved
    assert sorted(p.name for p in folder.iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "posterior.safetensors", "posterior_config.json"
    ]  # fmt: skip
    back = Posterior.load(folder, base)
    assert isinstance(back, DiagonalGaussian) and FAMILIES["diagonal"] is DiagonalGaussian
    assert back.origin == q.origin and back.adapter_config == q.adapter_config
    for ours, theirs in ((q.mean(), back.mean()), (q.sigma(), back.sigma())):
        assert ours.keys() == theirs.keys() and all(torch.equal(v, theirs[k]) for k, v in ours.items())
    for a, b in zip(q.sample(2, 9), back.sample(2, 9), strict=True):
        assert all(torch.equal(v, b[k]) for k, v in a.items())
    assert back.kl(q) == 0.0
    with pytest.raises(UserError, match="exists"):
        q.save(folder)


def test_stock_peft_loads_the_mean_and_every_draw(saved: Any, tmp_path: Path) -> None:
    folder, base, q = saved
    stock = PeftModel.from_pretrained(copy.deepcopy(base), str(folder)).eval()
    attached = q.attach(copy.deepcopy(base))
    assert torch.equal(logits(stock), logits(attached))
    folders = q.export_samples(3, tmp_path / "draws", seed=2, antithetic=True)
    assert [f.name for f in folders] == ["draw000", "draw001", "draw002"]
    seen = []
    for draw, tree in zip(folders, q.sample(3, 2, antithetic=True), strict=True):
        q.write(attached, tree)
        seen.append(logits(PeftModel.from_pretrained(copy.deepcopy(base), str(draw)).eval()))
        assert torch.equal(seen[-1], logits(attached))
    assert (seen[0] - seen[1]).abs().max() > 1e-3
    with pytest.raises(UserError, match="exists"):
        q.export_samples(1, tmp_path / "draws", seed=2)


def test_exported_draws_are_members_of_a_suite(saved: Any, tiny_tokenizer: Any, tmp_path: Path) -> None:
    _, base, q = saved
    base.save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    folders = [str(f) for f in q.export_samples(2, tmp_path / "draws", seed=0)]
    members = load_members(str(tmp_path / "model"), "float32", folders, {})
    assert members.base == q.origin.base and [m.adapter for m in members] == ["member0", "member1"]
    attached = q.attach(base)
    for member, tree in zip(members, q.sample(2, 0), strict=True):
        q.write(attached, tree)
        with members.serve(member) as engine:
            model: Any = engine.model  # type: ignore[attr-defined]
            model.set_adapter(member.adapter)
            assert torch.equal(logits(model), logits(attached))
    suite = suite_data(tmp_path / "suite", tmp_path / "model", [Path(f) for f in folders], problems=3)
    result = run_suite(from_dict(SuiteConfig, suite))
    assert [m["weights"] for m in result["model"]["members"]] == [m.weights for m in members]
    assert "mutual_information" in {row["metric"] for row in result["rows"]}


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensor(path: Path, change: Any) -> None:
    tensors = load_file(path)
    key = sorted(tensors)[0]
    tensors[key] = change(tensors[key])
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("breaks", "message"),
    [
        (lambda d: (d / "posterior.safetensors").unlink(), "posterior.safetensors is missing"),
        (lambda d: (d / "posterior_config.json").unlink(), "posterior_config.json is missing"),
        (lambda d: (d / "adapter_model.safetensors").write_bytes(b"no"), "no safetensors"),
        (lambda d: (d / "posterior_config.json").write_text("{"), "no JSON"),
        (lambda d: edit_json(d / "posterior_config.json", version=99), "version 99"),
        (lambda d: edit_json(d / "posterior_config.json", family="diagnal"), "did you mean 'diagonal'"),
        (lambda d: edit_json(d / "posterior_config.json", origin={"colour": 1}), "origin"),
        (lambda d: edit_json(d / "posterior_config.json", origin={"prior": 3}), "no readable origin: origin.prior"),
        (lambda d: edit_json(d / "adapter_config.json", r=8), "rank 2, adapter_config.json says r = 8"),
        (lambda d: edit_tensor(d / "posterior.safetensors", lambda t: t * math.nan), "NaN"),
        (lambda d: edit_tensor(d / "adapter_model.safetensors", lambda t: t * math.nan), "NaN"),
        (lambda d: edit_tensor(d / "posterior.safetensors", lambda t: -t), "negative"),
        (lambda d: edit_tensor(d / "posterior.safetensors", lambda t: t[:1].clone()), "shape"),
    ],
)  # fmt: skip
def test_what_is_broken_is_named(saved: Any, breaks: Any, message: str) -> None:
    folder = saved[0]
    breaks(folder)
    with pytest.raises(UserError, match=message) as caught:
        Posterior.load(folder)
    assert "\n" not in str(caught.value)


def test_another_base_model_or_rank_is_refused(saved: Any, tmp_path: Path) -> None:
    folder, base, q = saved
    other = copy.deepcopy(base)
    with torch.no_grad():
        other.lm_head.weight[0, 0] += 1
    for refused in (lambda: Posterior.load(folder, other), lambda: q.attach(other)):
        with pytest.raises(UserError, match="another|base model with hash"):
            refused()
    wide = get_peft_model(copy.deepcopy(base), LoraConfig(r=3, target_modules=["q_proj", "v_proj"]))
    with pytest.raises(UserError, match="differ in name or shape"):
        q.write(wide, q.mean())
    with pytest.raises(UserError, match="no posterior"):
        Posterior.load(tmp_path / "nowhere")


def test_a_posterior_of_before_names_were_kept_loads(saved: Any) -> None:
    folder, base, q = saved
    about = json.loads((folder / "posterior_config.json").read_text())
    for key in ("model", "dtype"):
        about["origin"].pop(key)
    (folder / "posterior_config.json").write_text(json.dumps(about))
    old = Posterior.load(folder, base)
    assert (old.origin.model, old.origin.dtype) == (None, None) and old.origin.base == q.origin.base
    base.config._name_or_path = "hub/name"
    assert (old.origin.on(base).model, old.origin.on(base).dtype) == ("hub/name", "float32")
    with pytest.raises(
        UserError, match=rf"with hash {old.origin.base}, this one has \w+ \(hub/name, bfloat16\)"
    ):
        old.check_base(copy.deepcopy(base).bfloat16())


def test_a_base_model_that_has_an_adapter_in_it_is_refused_as_that(saved: Any) -> None:
    folder, base, q = saved
    used = copy.deepcopy(base)
    attached = q.attach(used)
    Posterior.load(folder, attached)
    for refused in (lambda: Posterior.load(folder, used), lambda: q.attach(used)):
        with pytest.raises(UserError, match="has an adapter's layers in it"):
            refused()
    with pytest.raises(UserError, match="takes the bare base model, got a PeftModel"):
        q.attach(attached)


def test_nothing_is_left_where_writing_fails(
    saved: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    q = saved[2]
    before = sorted(tmp_path.iterdir())

    def full(*_: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("vlm_reason.weights.artefact.write_atomically", full)
    with pytest.raises(OSError, match="no space"):
        q.save(tmp_path / "second")
    assert sorted(tmp_path.iterdir()) == before


def test_an_adapter_that_scales_its_update_otherwise_is_refused(tiny_llama: Any) -> None:
    """Of the same shapes, so nothing else shows that s B A is another."""
    model = adapted(copy.deepcopy(tiny_llama))
    q = Posterior.from_optimizer(fitted(model, 1), model)
    torch.manual_seed(1)
    targets = ["q_proj", "v_proj"]
    for keys, named in (
        ({"lora_alpha": 8}, "lora_alpha"),
        ({"lora_alpha": 4, "use_rslora": True}, "use_rslora"),
    ):
        other = get_peft_model(copy.deepcopy(tiny_llama), LoraConfig(r=2, target_modules=targets, **keys))
        with pytest.raises(UserError, match=f"does not fit adapter 'default': its {named} is"):
            q.write(other, q.mean())
