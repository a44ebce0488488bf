"""A plan as one JSON object. Seconds, bytes and tokens are plain numbers; shares are of 1."""

from __future__ import annotations

from typing import Any

from .advice import advise, where_time_goes
from .hardware import Device
from .lengths import CAP_SHARE, SPREAD
from .memory import USABLE
from .plan import PhasePlan, Plan, sensitivity
from .workload import Rows


def plan_json(plan: Plan) -> dict[str, Any]:
    scenario = plan.scenario
    setup, cluster, args = scenario.setup, scenario.cluster, scenario.args
    return {
        "model": {
            "name": setup.size.name,
            "parameters": setup.size.total,
            "matrix_parameters": setup.size.body,
            "adapter_parameters": setup.adapter,
            "cache_bytes_per_token": setup.size.kv_bytes(setup.width),
            "dtype": setup.dtype,
        },
        "device": _device(setup.device, setup.dtype),
        "cluster": {
            "devices": cluster.devices,
            "nodes": cluster.nodes,
            "sampling_devices": cluster.samplers,
            "engines": cluster.engines,
            "ranks": cluster.ranks,
            "sharding": cluster.sharding,
            "engine": scenario.engine.kind,
            "layout": setup.layout,
            "recompute": setup.recompute,
        },
        "assumptions": _assumptions(plan),
        "sensitivity": {name: round(value, 3) for name, value in sensitivity(plan).items()},
        "phases": [_phase(p) for p in plan.phases],
        "run": {
            "windows": plan.windows,
            "steps": plan.steps,
            "groups_per_step": args.prompts_per_step,
            "traces_per_prompt": scenario.traces,
            "seconds": plan.seconds,
            "device_hours": plan.device_hours,
            "generated_tokens": plan.total(lambda p: p.generated_tokens),
            "scored_tokens": plan.total(lambda p: p.scored_tokens),
            "trained_tokens": plan.total(lambda p: p.trained_tokens),
            "flops": plan.flops,
            "utilisation": plan.utilisation,
            "where": where_time_goes(plan),
        },
        "memory": _memory(plan),
        "advice": [vars(advice) for advice in advise(plan)],
    }


def _device(device: Device, dtype: str) -> dict[str, Any]:
    return {
        "name": device.name,
        "measured": device.measured,
        "matrix_flops": device.flops(dtype),
        "bytes_per_second": device.bytes_per_second,
        "memory": device.memory,
        "seconds_per_operation": device.dispatch,
    }


def _assumptions(plan: Plan) -> list[dict[str, Any]]:
    """What only the run will tell, and where its value here comes from."""
    s, prompts = plan.scenario, plan.scenario.prompts
    said = s.guess.trace_tokens is not None
    out: list[tuple[str, float, str]] = [
        ("mean trace tokens", s.trace.mean, "given" if said else f"{CAP_SHARE:.2f} of max_trace_tokens"),
        ("spread of trace tokens", SPREAD, "standard deviation over mean, log-normal, cut at the cap"),
        ("mean answer tokens", s.answer.mean, "given" if s.guess.answer_tokens else "the reference answers'"),
        ("share of live traces", s.guess.live_share, "given" if s.guess.live_share < 1 else "all: an upper bound"),
        ("prompt tokens", prompts.prior, prompts.source),
        ("hinted prompt tokens", prompts.hinted, prompts.source),
    ]  # fmt: skip
    return [{"name": name, "value": value, "source": source} for name, value, source in out]


def _phase(p: PhasePlan) -> dict[str, Any]:
    return {
        "name": p.work.name,
        "windows_per_round": p.work.windows,
        "steps": p.steps,
        "seconds": {
            "window": p.window,
            "generate": p.generate,
            "score": p.score,
            "train": p.train,
            "communicate": p.communicate,
            "optimise": p.optimise,
            "sync": p.sync,
        },
        "tokens": {
            "generated": p.generated_tokens,
            "scored": p.scored_tokens,
            "trained": p.trained_tokens,
        },
        "flops": {"generate": p.generate_flops, "score": p.score_flops, "train": p.train_flops},
        "draws": [{"law": d.name, "texts": d.sequences, "prompts": d.prompts} for d in p.work.draws],
        "scored": [_rows(r) for r in p.work.scored],
        "trained": [_rows(r) for r in p.work.trained],
    }


def _rows(rows: Rows) -> dict[str, Any]:
    tokens = {layout: rows.tokens(layout) for layout in ("packed", "tree")}
    return {"law": rows.name, "rows": rows.count, "tokens": tokens, "labelled": rows.head_rows}


def _memory(plan: Plan) -> dict[str, Any]:
    memory, device = plan.memory, plan.scenario.setup.device
    parts = ("weights", "gradients", "optimiser", "activations", "logits", "cache", "sampler_weights")
    return {
        **{name: getattr(memory, name) for name in parts},
        "training_peak": memory.training_peak,
        "sampling_peak": memory.sampling_peak,
        "usable": USABLE * device.memory,
        "fits": memory.peak <= USABLE * device.memory,
    }
