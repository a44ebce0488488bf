"""IVON's update by hand, its noise, its views, and that it behaves as a torch optimiser does."""

from __future__ import annotations

import copy
import io
import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vlm_reason.errors import UserError
from vlm_reason.weights import IVON, diagnose, suggest_settings
from vlm_reason.weights.noise import BLOCK, POSTERIOR, TRAINING, Draw, cut_into_blocks, round_stochastically

CPU = torch.device("cpu")


def parameter(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype))


def gradient(p: Tensor, step: int = 0) -> Tensor:
    return torch.randn(p.shape, generator=torch.Generator().manual_seed(100 + step)).to(p.dtype)


def run(optimizer: IVON, steps: range) -> None:
    for step in steps:
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = gradient(p, step) + 0.1 * p.detach()
        optimizer.step()


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))


def loss_of(net: nn.Module, n: int = 8) -> Tensor:
    x = torch.linspace(-1, 1, 3 * n).view(n, 3)
    return (net(x) - x.sum(1, keepdim=True)).square().mean()


# ------------------------------------------------------------------------------------------------------- the update


@pytest.mark.parametrize("hess_approx", ["price", "gradsq"])
@pytest.mark.parametrize("delta", [0.0, 0.3])
@pytest.mark.parametrize("rescale_lr", [True, False])
def test_updates_are_the_equations(hess_approx: str, delta: float, rescale_lr: bool) -> None:
    """Three updates of two draws each, in float64 by the equations of the module's first lines."""
    p = parameter(7)
    lam, h0, b1, b2, lr, xi, k = 50.0, 0.7, 0.9, 0.95, 0.2, 0.5, 2
    m, h, mu = p.detach().double().clone(), torch.full((7,), h0).double(), torch.zeros(7).double()
    optimizer = IVON(
        [p], lr, lam, h0, b1, b2, delta, xi, rescale_lr, mc_samples=k, hess_approx=hess_approx, seed=4
    )
    for t in range(1, 4):
        grads, curvatures = [], []
        for draw in range(k):
            n = Draw(4, TRAINING, t - 1, draw).normal(0, 7, CPU).double() / (lam * (h + delta)).sqrt()
            torch.testing.assert_close(p.detach().double(), m + n, rtol=1e-5, atol=1e-6)
            p.grad = gradient(p, 10 * t + draw)
            g = p.grad.double()
            grads.append(g)
            curvatures.append(lam * (h + delta) * n * g if hess_approx == "price" else lam * g * g)
            optimizer.step()
        g, f = sum(grads) / k, sum(curvatures) / k  # type: ignore[operator]
        mu = b1 * mu + (1 - b1) * g
        h = b2 * h + (1 - b2) * f + (1 - b2) ** 2 * (h - f) ** 2 / (2 * (h + delta))
        kappa = h0 + delta if rescale_lr else 1.0
        m = m - lr * kappa * ((mu / (1 - b1**t) + delta * m) / (h + delta)).clamp(-xi, xi)
        state = optimizer.state[p]
        torch.testing.assert_close(state["precision"].double() - delta, h, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(state["mean"].double(), m, rtol=1e-4, atol=1e-5)
        assert state["step"] == t


def test_the_first_move_is_debiased() -> None:
    """Along a constant gradient the first update is as long as lr kappa g / (h + delta), not a tenth of it."""
    p = nn.Parameter(torch.zeros(5))
    optimizer = IVON([p], lr=0.1, ess=100, hess_init=2.0, weight_decay=0.0, beta2=0.999999)
    p.grad = torch.full((5,), 0.3)
    optimizer.step()
    torch.testing.assert_close(optimizer.state[p]["mean"], torch.full((5,), -0.1 * 0.3), rtol=1e-3, atol=0)


@pytest.mark.parametrize("delta", [0.0, 1e-2])
def test_the_precision_stays_positive_whatever_the_gradient(delta: float) -> None:
    p = parameter(1000)
    optimizer = IVON([p], lr=1e-3, ess=10, hess_init=1.0, beta2=0.5, weight_decay=delta)
    for step in range(60):
        before = optimizer.state[p]["precision"]
        n = p.detach() - optimizer.state[p]["mean"]
        p.grad = -3 * n if step < 40 else gradient(p, step)  # curvature -3 everywhere
        optimizer.step()
        after = optimizer.state[p]["precision"]
        assert (after > 0).all() and (after >= 0.499 * before - 1e-7 * delta).all()
        assert p.isfinite().all()


def test_clip_radius_bounds_the_move() -> None:
    p = parameter(50)
    optimizer = IVON(
        [p], lr=0.5, ess=100, hess_init=0.1, weight_decay=0.0, clip_radius=1e-3, rescale_lr=False
    )
    before = p.detach().clone() * 0 + optimizer.state[p]["mean"]
    p.grad = 100 * gradient(p)
    optimizer.step()
    torch.testing.assert_close(
        (optimizer.state[p]["mean"] - before).abs().max(), torch.tensor(0.5e-3), rtol=1e-3, atol=0
    )


# --------------------------------------------------------------------------------------------------------- the noise


def test_noise_depends_on_the_place_and_not_on_the_grouping() -> None:
    """One vector of 150,000 weights; the same cut in nine tensors; the same as slices held by three processes."""
    size = 150_000
    whole = parameter(size)
    grads = gradient(whole)
    one = IVON([whole], 0.1, 100)
    cuts = [0, 5, 64, 65_000, 65_536, 65_537, 70_000, 131_073, 140_000, size]
    spans = list(zip(cuts, cuts[1:], strict=False))
    start = one.state[whole]["mean"]
    parts = [nn.Parameter(start[a:b].clone()) for a, b in spans]
    many = IVON([{"params": parts[:4]}, {"params": parts[4:]}], 0.1, 100)
    shards = [nn.Parameter(start[a:b].clone()) for a, b in ((0, 50_000), (50_000, 100_000), (100_000, size))]
    apart = [IVON([{"params": [p], "start": 50_000 * k}], 0.1, 100) for k, p in enumerate(shards)]
    for _ in range(2):
        whole.grad = grads + whole.detach()
        for p, (a, b) in zip(parts, spans, strict=True):
            p.grad = grads[a:b] + p.detach()
        for k, p in enumerate(shards):
            p.grad = grads[50_000 * k : 50_000 * k + p.numel()] + p.detach()
        for optimizer in (one, many, *apart):
            optimizer.step()
        assert torch.equal(torch.cat([p.detach() for p in parts]), whole.detach())
        assert torch.equal(torch.cat([p.detach() for p in shards]), whole.detach())


def test_groups_that_would_share_noise_are_refused() -> None:
    with pytest.raises(UserError, match="overlap"):
        IVON([{"params": [parameter(5)]}, {"params": [parameter(5)], "start": 4}], 0.1, 100)


def test_the_number_of_threads_makes_no_difference() -> None:
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        p = parameter(6 * BLOCK + 17)
        optimizer = IVON([p], 0.1, 100)
        run(optimizer, range(2))
        results.append(p.detach().clone())
    assert torch.equal(*results)


def test_blocks_of_a_draw_have_seeds_of_their_own() -> None:
    draw = Draw(1, TRAINING, 2, 3)
    low = {draw.block_seed(k) % 2**32 for k in range(5000)}
    assert len(low) == 5000
    others = [
        Draw(1, TRAINING, 2, 4),
        Draw(1, POSTERIOR, 2, 3),
        Draw(2, TRAINING, 2, 3),
        Draw(1, TRAINING, 3, 3),
    ]
    assert len({d.block_seed(0) for d in [draw, *others]}) == 5
    full = draw.normal(7, BLOCK, CPU)
    for k in (1, 2, 3):
        moment = float((full.double() ** k).mean())
        assert abs(moment - (k == 2)) < 5 * math.sqrt([1, 2, 15][k - 1] / BLOCK)
    assert abs(float((full[1:] * full[:-1]).mean())) < 5 / math.sqrt(BLOCK)
    tail = float((full.abs() > 3).double().mean())  # 0.0027 of a normal law
    assert abs(tail - 0.0027) < 5 * math.sqrt(0.0027 / BLOCK)
    for stop in (1, 15, 17, 1000):
        assert torch.equal(draw.normal(7, stop, CPU), full[:stop])
    assert abs(float(full.mean())) < 0.02 and abs(float(full.std()) - 1) < 0.02


def test_blocks_cover_every_element_once() -> None:
    blocks = cut_into_blocks([(10, 65_530), (65_540, 3), (200_000, 0), (131_071, 2)])
    found = [(b.number, p.tensor, p.lo, p.hi, p.offset) for b in blocks for p in b.pieces]
    assert found == [
        (0, 0, 0, 65_526, 10), (1, 0, 65_526, 65_530, 0), (1, 1, 0, 3, 4), (1, 3, 0, 1, 65_535), (2, 3, 1, 2, 0)
    ]  # fmt: skip
    assert [b.stop for b in blocks] == [65_536, 65_536, 1]


def test_stochastic_rounding_has_the_right_mean() -> None:
    values = torch.tensor([1.001, -0.3337, 1e-3, 0.0]).repeat_interleave(BLOCK // 4)
    rounded = round_stochastically(values, Draw(0, TRAINING).bits(0, BLOCK, CPU)).float().view(4, -1)
    exact = values.view(4, -1)[:, 0]
    gap = exact.abs() * 2**-8 + 1e-12
    assert (((rounded.double().mean(1) - exact).abs() / gap) < 0.03).all()
    assert all(len(row.unique()) <= 2 for row in rounded)


# ------------------------------------------------------------------------------------------- what the parameters hold


def test_views_nest_and_survive_exceptions() -> None:
    p = parameter(100)
    mean = p.detach().clone()
    optimizer = IVON([p], 0.1, 100)
    training = p.detach().clone()
    assert not torch.equal(training, mean)
    with pytest.raises(ZeroDivisionError), optimizer.mean():
        assert torch.equal(p.detach(), mean)
        with optimizer.sample(3):
            first = p.detach().clone()
        assert torch.equal(p.detach(), mean)
        with optimizer.sample(3):
            assert torch.equal(p.detach(), first)
        with optimizer.sample(4):
            assert not torch.equal(p.detach(), first)
        raise ZeroDivisionError
    assert torch.equal(p.detach(), training)
    with optimizer.mean(), pytest.raises(UserError, match="leave it first"):
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_draw_has_the_width_sigma(dtype: torch.dtype) -> None:
    p = nn.Parameter(torch.full((40_000,), 0.5, dtype=dtype))
    optimizer = IVON([p], 0.1, ess=400, hess_init=1.0, weight_decay=0.0)
    assert p.dtype == dtype and optimizer.state[p]["mean"].dtype == torch.float32
    assert (
        abs(float(p.detach().double().std()) / 0.05 - 1) < 0.02
        and abs(float(p.detach().double().mean()) - 0.5) < 1e-3
    )


# ----------------------------------------------------------------------------------------------------------- resuming


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mc_samples", [1, 3])
def test_resumed_is_uninterrupted_to_the_bit(dtype: torch.dtype, mc_samples: int) -> None:
    def fresh(seed: int) -> IVON:
        groups = [
            {"params": [parameter(30, 3, seed=seed, dtype=dtype)]},
            {"params": [parameter(5, seed=seed)], "lr": 1.0},
        ]
        return IVON(groups, 0.1, 100, mc_samples=mc_samples, beta2=0.99)

    straight = fresh(0)
    run(straight, range(4))
    file = io.BytesIO()
    torch.save(straight.state_dict(), file)
    run(straight, range(4, 11))
    file.seek(0)
    resumed = fresh(9)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    run(resumed, range(4, 11))
    for a, b in zip(straight.param_groups, resumed.param_groups, strict=True):
        for p, q in zip(a["params"], b["params"], strict=True):
            assert torch.equal(p.detach(), q.detach())
            assert all(
                torch.equal(straight.state[p][k], resumed.state[q][k])
                for k in ("step", "mean", "precision", "momentum")
            )
            assert resumed.state[q]["precision"].dtype == torch.float32


@pytest.mark.parametrize("mc_samples", [1, 2])
def test_eps_is_held_as_long_as_it_is_said(mc_samples: int) -> None:
    """Its name is that of the first step it is used in: hold = 1 has the same draws there."""
    p, q = parameter(40), parameter(40)
    held = IVON([p], 0.1, 400, weight_decay=0.0, hold=3, mc_samples=mc_samples)
    fresh = IVON([q], 0.1, 400, weight_decay=0.0, mc_samples=mc_samples)
    seen: dict[str, list[Tensor]] = {"held": [], "fresh": []}
    for step in range(7):
        for name, optimizer, own in (("held", held, p), ("fresh", fresh, q)):
            state = optimizer.state[own]
            seen[name].append((own.detach() - state["mean"]) * (400 * state["precision"]).sqrt())
            own.grad = gradient(own, step)
            optimizer.step()
    for step in range(7):
        torch.testing.assert_close(seen["held"][step], seen["fresh"][step - step % 3], rtol=0, atol=1e-4)
        assert step % 3 or not step or (seen["held"][step] - seen["held"][step - 1]).abs().max() > 0.5


def test_loading_wrong_states_is_refused() -> None:
    p = parameter(5)
    optimizer = IVON([p], 0.1, 100)
    before = p.detach().clone()
    with pytest.raises(UserError, match="shape"):
        optimizer.load_state_dict(IVON([parameter(6)], 0.1, 100).state_dict())
    with pytest.raises(UserError, match="another optimiser"):
        optimizer.load_state_dict(torch.optim.AdamW([parameter(5)]).state_dict())
    with pytest.raises(UserError, match="2 parameters"):
        optimizer.load_state_dict(IVON([parameter(5), parameter(1)], 0.1, 100).state_dict())
    assert torch.equal(p.detach(), before)


def test_a_deep_copy_goes_on_alike() -> None:
    net = model()
    optimizer = IVON(net.parameters(), 0.1, 100)
    twin_net, twin = copy.deepcopy((net, optimizer))
    for n, o in ((net, optimizer), (twin_net, twin)):
        o.zero_grad()
        loss_of(n).backward()
        o.step()
        with o.mean():
            pass
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), twin_net.parameters(), strict=True))


def test_state_that_was_replaced_is_put_in_place() -> None:
    """As who shards the state restores it: mean and counters are there, the parameters are then their draw."""
    p, other = parameter(5), parameter(5, seed=1)
    optimizer, twin = IVON([p], 0.1, 100), IVON([other], 0.1, 100)
    run(optimizer, range(3))
    twin.state[other] = {k: v.clone() for k, v in optimizer.state[p].items()}
    twin.param_groups[0] |= {k: v for k, v in optimizer.param_groups[0].items() if k != "params"}
    assert not torch.equal(other.detach(), p.detach())
    twin.put_draw_in_place()
    assert torch.equal(other.detach(), p.detach())


@pytest.mark.parametrize("mc_samples", [1, 2])
def test_starting_anew_is_the_first_posterior_around_the_present_weights(mc_samples: int) -> None:
    anew, kept = parameter(6), parameter(4, seed=1)
    optimizer = IVON([anew, kept], 0.1, 100, hess_init=0.7, mc_samples=mc_samples)
    run(optimizer, range(3))
    before = {k: v.clone() if isinstance(v, Tensor) else v for k, v in optimizer.state[kept].items()}
    held, start = kept.detach().clone(), torch.linspace(-1, 1, 6)
    anew.data.copy_(start)
    optimizer.start_anew([anew])
    state = optimizer.state[anew]
    assert torch.equal(state["mean"], start) and bool((state["precision"] == torch.tensor(0.7 + 1e-4)).all())
    assert state["step"] == 0 and not state["momentum"].any()
    assert all(torch.equal(before[k], v) for k, v in optimizer.state[kept].items() if isinstance(v, Tensor))
    assert torch.equal(kept.detach(), held) and not torch.equal(anew.detach(), start)
    with optimizer.mean():
        assert torch.equal(anew.detach(), start)
        with pytest.raises(UserError, match=r"start_anew\(\) inside"):
            optimizer.start_anew([anew])
    run(optimizer, range(3, 7))
    assert bool(torch.isfinite(anew).all()) and optimizer.state[anew]["step"] >= 1


# ------------------------------------------------------------------------------------------- as any torch optimiser


def test_schedulers_closures_and_learning() -> None:
    net = model()
    optimizer = IVON(net.parameters(), lr=0.3, ess=2000, hess_init=0.1, beta2=0.99)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=150)
    start = float(loss_of(net).detach())

    def closure() -> float:
        optimizer.zero_grad()
        loss = loss_of(net)
        loss.backward()
        return float(loss.detach())

    for _ in range(150):
        assert optimizer.step(closure) > 0
        scheduler.step()
    assert math.isclose(optimizer.param_groups[0]["lr"], 0.03, rel_tol=1e-6)
    with optimizer.mean():
        assert float(loss_of(net).detach()) < 0.2 * start


def test_clipping_between_backward_and_step_counts() -> None:
    results = []
    for scale in (1.0, 1000.0):
        net = model()
        optimizer = IVON(net.parameters(), 0.1, 1e4)
        (scale * loss_of(net)).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1e-3)
        optimizer.step()
        results.append(torch.cat([optimizer.state[p]["mean"].view(-1) for p in net.parameters()]))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)


def test_a_gradient_scaler_unscales_before_the_step_and_skips_overflows() -> None:
    means = []
    for enabled in (False, True):
        net = model()
        optimizer = IVON(net.parameters(), 0.1, 100)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=enabled)
        for _ in range(3):
            optimizer.zero_grad()
            scaler.scale(loss_of(net)).backward()
            scaler.step(optimizer)
            scaler.update()
        means.append(torch.cat([optimizer.state[p]["mean"].view(-1) for p in net.parameters()]))
    torch.testing.assert_close(*means, rtol=1e-5, atol=1e-6)
    held = [p.detach().clone() for p in net.parameters()]
    scaler.scale(loss_of(net) * torch.inf).backward()
    scaler.step(optimizer)
    assert all(torch.equal(p.detach(), q) for p, q in zip(net.parameters(), held, strict=True))


def test_accumulated_gradients_are_one_gradient_at_one_draw() -> None:
    means = []
    for parts in (1, 4):
        net = model()
        optimizer = IVON(net.parameters(), 0.1, 100)
        for _ in range(parts):
            (loss_of(net) / parts).backward()
        optimizer.step()
        means.append(torch.cat([optimizer.state[p]["mean"].view(-1) for p in net.parameters()]))
    torch.testing.assert_close(*means, rtol=1e-5, atol=1e-6)


def test_parameters_without_gradient_keep_their_posterior() -> None:
    used, idle = parameter(4), parameter(3)
    optimizer = IVON([used, idle], 0.1, 100, mc_samples=2)
    before = {k: v.clone() for k, v in optimizer.state[idle].items()}
    drawn = idle.detach().clone()
    for step in range(2):
        used.grad = gradient(used, step) if step else None
        optimizer.step()
    assert optimizer.state[used]["step"] == 1 and optimizer.state[idle]["step"] == 0
    assert all(torch.equal(before[k], v) for k, v in optimizer.state[idle].items())
    assert not torch.equal(idle.detach(), drawn)  # a new draw all the same


def test_groups_dtypes_and_layouts_mix() -> None:
    strided = nn.Parameter(torch.randn(6, 4).t())
    optimizer = IVON([parameter(3), parameter(4, dtype=torch.bfloat16), strided], 0.1, 100)
    optimizer.add_param_group({"params": [parameter(2, seed=5)], "lr": 0.0, "hess_init": 3.0})
    late = optimizer.param_groups[1]["params"][0]
    held = strided.detach().clone()
    run(optimizer, range(2))
    assert not strided.is_contiguous() and not torch.equal(strided.detach(), held)
    assert torch.equal(optimizer.state[late]["mean"], parameter(2, seed=5).detach())
    assert optimizer.param_groups[1]["updates"] == 2 and optimizer.param_groups[1]["start"] == 31


# ------------------------------------------------------------------------------------------------------- bad settings


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lr", -1.0), ("lr", math.nan), ("ess", 0), ("ess", math.inf),
        ("hess_init", 0.0), ("beta1", 1.0), ("beta2", -0.1),
        ("weight_decay", -1e-9), ("clip_radius", 0.0), ("mc_samples", 0), ("mc_samples", 1.5), ("seed", -1),
        ("hess_approx", "fisher"), ("lr", "fast"), ("horizon", 0), ("data_size", 0),
    ],
)  # fmt: skip
def test_settings_out_of_range_are_named(name: str, value: Any) -> None:
    settings: dict[str, Any] = {"lr": 0.1, "ess": 100.0, name: value}
    with pytest.raises(UserError, match=name):
        IVON([parameter(2)], **settings)


def test_what_cannot_be_given_noise_is_refused() -> None:
    with pytest.raises(UserError, match="frozen"):
        IVON([nn.Parameter(torch.zeros(2), requires_grad=False)], 0.1, 100)
    with pytest.raises(UserError, match="mc_samples is one"):
        IVON([{"params": [parameter(2)]}, {"params": [parameter(2)], "mc_samples": 2}], 0.1, 100)
    embedding = nn.Embedding(4, 2, sparse=True)
    optimizer = IVON(embedding.parameters(), 0.1, 100)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(UserError, match="sparse"):
        optimizer.step()
    assert optimizer.param_groups[0]["updates"] == 0


# ---------------------------------------------------------------------------------------- diagnostics and suggestions


def test_diagnostics_say_width_memory_and_temperature() -> None:
    p = nn.Parameter(torch.full((1000,), 0.5))
    optimizer = IVON([p], 0.1, 400, hess_init=0.9, weight_decay=0.1, beta2=0.99, horizon=500, data_size=100)
    found = diagnose(optimizer)
    assert found.sigma == pytest.approx((0.05,) * 5) and found.noise_to_weight == pytest.approx((0.1,) * 5)
    assert found.hess_drift == pytest.approx((1.0,) * 5)
    assert found.temperature == 0.25 and found.memory == pytest.approx(0.99**500) and found.updates == 0


def test_a_posterior_that_cannot_move_is_warned_of() -> None:
    with pytest.warns(UserWarning, match="90% of hess_init"):
        IVON([parameter(2)], 0.1, 100, horizon=10_000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        s = suggest_settings(1000, 640)
        IVON([parameter(2)], 0.1, s.ess, s.hess_init, beta2=s.beta2, horizon=s.horizon, data_size=s.data_size)


def test_suggested_settings_start_at_the_width_asked_for() -> None:
    s = suggest_settings(1000, 640, sigma=0.02, temperature=0.1, weight_decay=1e-5)
    assert (s.ess, s.beta2, s.horizon, s.data_size) == (6400.0, 0.995, 1000, 640)
    assert (s.ess * (s.hess_init + 1e-5)) ** -0.5 == pytest.approx(0.02)
    with pytest.raises(UserError, match="prior"):
        suggest_settings(1000, 640, sigma=1.0, weight_decay=0.1)
    with pytest.raises(UserError, match="data_size"):
        suggest_settings(1000, 0)
