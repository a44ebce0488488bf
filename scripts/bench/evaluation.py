"""A store of a million samples: how long it takes to open, and to compute every metric from, in time and memory.

    OMP_NUM_THREADS=2 python scripts/bench/evaluation.py             # about five minutes on 2 cores, 3 GB of disk
    python scripts/bench/evaluation.py --samples 50000 --no-ranking  # a quick look

The store is made first (not measured but for `write`): `answers` holds generated samples, 12,500 problems x 4 members
of a posterior x 20 draws, with token ids, log-probabilities, rewards and verdicts, so that every metric of generation
applies; `choices` holds 4 members' log-likelihoods of 2 to 5 options. Each row is measured in a process of its own, on
files that the page cache may hold. `metrics` counts opening the store, its columns and the whole summary, with all
resampling; `memory` is the peak resident memory of that process, libraries included.

The rows of ranking come from evaluation_ranking.py.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from command import bench_parser

from vlm_reason.evaluation.summary import summary
from vlm_reason.store import SampleRecord, SampleStore

OPEN_BAR, METRICS_BAR, MEMORY_BAR = 5.0, 60.0, 4.0
MEMBERS, DRAWS = 4, 20
GIB = 2**30


def answers(samples: int) -> Iterator[SampleRecord]:
    """Generated samples: problems differ in difficulty, members in what they prefer; some cut, some unreadable."""
    draw = random.Random(0)
    for problem in range(samples // (MEMBERS * DRAWS)):
        for member in range(MEMBERS):
            chance = min(1.0, max(0.0, draw.gauss((problem % 100) / 100, 0.1)))
            for k in range(DRAWS):
                answer = "7" if draw.random() < chance else draw.choice(("8", "9", "12", "7/2", None))
                yield record(draw, problem, member, k, answer, draw.random() < 0.02)


def choices(samples: int) -> Iterator[SampleRecord]:
    draw = random.Random(1)
    for problem in range(samples // MEMBERS):
        gold, options = 0, 2 + problem % 4
        for member in range(MEMBERS):
            logps = [draw.gauss(-3.0 + (i == gold), 1.0) for i in range(options)]
            best = max(range(options), key=logps.__getitem__)
            extra = {"choice_logps": logps, "choice_gold": gold}
            yield record(draw, problem, member, 0, "ABCDE"[best], False, "A", extra)


def record(
    draw: random.Random,
    problem: int,
    member: int,
    k: int,
    answer: str | None,
    cut: bool,
    right: str = "7",
    extra: dict | None = None,
) -> SampleRecord:
    tokens = 0 if extra else draw.randrange(16, 33)
    answered = {} if cut else {
        "m": 1, "answer_ids": (11, 12), "answer_text": answer or "?", "answer_logps": (-draw.random(), -0.25),
        "answer_finish": "stop", "answer_seed": k, "correct": answer == right, "score": float(answer == right),
        "parsed": answer, "failed": False, "canonical": answer,
    }  # fmt: skip
    return SampleRecord(
        key=f"{problem:016x}{member:08x}{k:08x}",
        problem_id=f"arithmetic/{problem}",
        question="How many of them are left when the last guest has gone home?",
        reference=right,
        prompt_ids=tuple(range(100, 124)),
        trace_ids=tuple(range(200, 200 + tokens)),
        trace_text="There were nineteen of them, and twelve have gone, so it must be the rest.",
        trace_logps=tuple(-draw.random() for _ in range(tokens)),
        finish="length" if cut else "stop",
        seed=k,
        temperature=1.0,
        top_p=1.0,
        proposal="reasoner/prior",
        saw_answer=False,
        weights=f"base+member{member}",
        engine="bench",
        k=k,
        member=member,
        reward=draw.gauss(float(answer == right), 1.0),
        **answered,
        extra=extra or {},
    )


KINDS = {"answers": answers, "choices": choices}


def write(kind: str, samples: int, folder: Path) -> None:
    records = KINDS[kind](samples)
    with SampleStore(folder) as store:
        while batch := list(islice(records, 5000)):
            store.append(batch)


def measured(work: str, folder: Path) -> dict[str, float | int | list[str]]:
    """What a process of its own found out about the store in `folder`."""
    argv = [sys.executable, __file__, "--work", work, "--store", str(folder)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{work} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def worker(work: str, folder: Path) -> dict[str, object]:
    start = time.perf_counter()
    store = SampleStore.open(folder)
    found: dict[str, object] = {"samples": len(store), "open": time.perf_counter() - start}
    if work != "open":
        columns = store.columns()
        found |= {"columns": time.perf_counter() - start, "columns_mib": columns.nbytes / 2**20}
    if work == "metrics":
        parts, cpu = [("", time.perf_counter())], time.process_time()
        done = summary(columns, progress=lambda name: parts.append((name, time.perf_counter())))
        parts.append(("", time.perf_counter()))
        found["parts"] = {
            name: round(b - a, 2) for (name, a), (_, b) in zip(parts[1:], parts[2:], strict=False)
        }
        found |= {
            "metrics": time.perf_counter() - start,
            "cpu": time.process_time() - cpu,
            "estimates": len(done.estimates),
            "skipped": dict(done.skipped),
        }
    return {**found, "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB}


def report(row: str, value: float, unit: str, bar: float | None, detail: dict) -> None:
    result = {"bench": "evaluation", "row": row, "value": round(value, 3), "unit": unit, "bar": bar}
    print(json.dumps({**result, "ok": bar is None or value <= bar, "detail": detail}), flush=True)


def rows(kind: str, samples: int, folder: Path) -> None:
    start = time.perf_counter()
    write(kind, samples, folder)
    seconds = time.perf_counter() - start
    size = sum(path.stat().st_size for path in folder.glob("*.jsonl")) / GIB
    detail = {"samples": samples, "segments_gib": round(size, 2)}
    report(f"{kind}: write", samples / seconds, "samples/s", None, detail)
    opened = measured("open", folder)
    report(
        f"{kind}: open", opened["open"], "s", OPEN_BAR, {**detail, "peak_gib": round(opened["peak_gib"], 2)}
    )
    done = measured("metrics", folder)
    detail |= {"metrics": done["estimates"], "seconds": done["parts"], "skipped": sorted(done["skipped"])}
    detail |= {"columns_s": round(done["columns"], 2), "columns_mib": round(done["columns_mib"])}
    detail["summary_cpu_s"] = round(done["cpu"], 1)
    report(f"{kind}: metrics", done["metrics"], "s", METRICS_BAR, detail)
    report(f"{kind}: memory", done["peak_gib"], "GiB", MEMORY_BAR, {"samples": samples})
    for path in folder.glob("*.index"):
        path.unlink()
    report(f"{kind}: open without index", measured("open", folder)["open"], "s", None, {"samples": samples})
    first = measured("columns", folder)
    report(
        f"{kind}: columns without index",
        first["columns"],
        "s",
        None,
        {"peak_gib": round(first["peak_gib"], 2)},
    )


def main() -> None:
    parser = bench_parser(__doc__)
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument(
        "--no-ranking", action="store_true", help="leave out the rows that need the built-in model"
    )
    parser.add_argument("--work", choices=("open", "columns", "metrics"), help=argparse.SUPPRESS)
    parser.add_argument("--store", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        print(json.dumps(worker(args.work, args.store)))
        return
    for kind in KINDS:
        with tempfile.TemporaryDirectory(prefix="vlm-reason-bench-") as folder:
            rows(kind, args.samples, Path(folder))
    if not args.no_ranking:
        ranking = Path(__file__).with_name("evaluation_ranking.py")
        subprocess.run([sys.executable, str(ranking)], check=True)


if __name__ == "__main__":
    main()
