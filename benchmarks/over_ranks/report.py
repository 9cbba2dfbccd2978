"""Files of results, and what fills them: processes started, and started again without what ended them."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from over_ranks.contenders import CONTENDERS
from over_ranks.problems import Problem, Settings
from over_ranks.processes import LONGEST_MESSAGE, LostError, run_ranks, say
from over_ranks.strong import measure_strong
from over_ranks.training import Training, measure_training
from scaling import Head, cost
from torch.cuda import nccl

from logitless.bench import environment


@dataclass
class Report:
    """A file of results, written anew with everything that is found."""

    path: Path
    content: dict[str, Any]

    def write(self) -> None:
        """In one step, so that a run that is stopped leaves the file whole."""
        partial = self.path.with_name(self.path.name + ".partial")
        partial.write_text(json.dumps(self.content, indent=1) + "\n")
        partial.replace(self.path)


def header(settings: Settings, command: str) -> dict[str, Any]:
    device = torch.device(settings.kind)
    hardware = environment.hardware(device)
    if settings.kind == "cuda":
        hardware["GPUs"] = str(torch.cuda.device_count())
        hardware["NCCL"] = ".".join(map(str, nccl.version()))
    return {
        "command": command,
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "hardware": hardware,
        "software": environment.software(),
        "NCCL_environment": {name: value for name, value in os.environ.items() if name.startswith("NCCL_")},
        "rounds": settings.rounds,
        "compiled": settings.compile,
        "seed": settings.seed,
    }


def run_strong(report: Report, ranks: int, problems: tuple[Problem, ...], settings: Settings) -> None:
    """All problems on so many ranks; again without a contender that ended the processes."""
    pending, barred = list(problems), {}
    results: list[dict[str, Any]] = report.content.setdefault("results", [])
    alone: list[dict[str, Any]] = report.content.setdefault("collectives", [])

    def hear(found: dict[str, Any]) -> None:
        where = {"problem": asdict(found["problem"]), "ranks": found["ranks"]}
        if "alone" in found:
            alone.append({**where, "rows": found["alone"]})
        else:
            results[:] = [r for r in results if (r["problem"], r["ranks"]) != tuple(where.values())]
            results.append({**where, "rows": found["rows"], "complete": found["complete"]})
            if found["complete"]:
                pending.remove(found["problem"])
        report.content["model"] = predictions(results)
        report.write()

    while pending:
        try:
            run_ranks(measure_strong, ranks, settings.kind, (pending, barred, settings), hear)
        except LostError as lost:
            say(f"lost at {' '.join(lost.at)}: {lost.reason}")
            problem, who, _ = lost.at
            if who in {contender.name for contender in CONTENDERS} and (problem, who) not in barred:
                barred[problem, who] = lost.reason[:LONGEST_MESSAGE]
                continue
            failed = next((p for p in pending if p.name == problem), pending[0])
            where = {"problem": asdict(failed), "ranks": ranks}
            results.append({**where, "rows": [], "complete": False, "error": lost.reason[:LONGEST_MESSAGE]})
            report.write()
            pending.remove(failed)


def predictions(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each contender that `scaling.py` knows: its time on one rank over t, and what the model makes of that."""
    rows = []
    medians = {
        (r["problem"]["name"], r["ranks"], row["contender"]): row["median_s"] for r in results for row in r["rows"]
    }
    for result in results:
        problem = Problem(**result["problem"])
        for contender in CONTENDERS:
            one = medians.get((problem.name, 1, contender.name))
            if contender.model is None or one is None:
                continue
            head = Head(problem.hidden, problem.vocabulary, problem.tokens, {contender.model: one})
            known = cost(contender.model, problem.tokens, result["ranks"], head)
            rows.append(
                {
                    "problem": problem.name,
                    "contender": contender.name,
                    "ranks": result["ranks"],
                    "ideal_s": known.compute,
                    "predicted_s": known.seconds,
                    "predicted_gather_s": known.gather,
                    "predicted_reduce_s": known.reduce,
                    "measured_s": medians.get((problem.name, result["ranks"], contender.name)),
                }
            )
    return rows


def run_training(report: Report, divisions: list[tuple[int, int]], sizes: Training, settings: Settings) -> None:
    report.content["training"] = asdict(sizes)
    results: list[dict[str, Any]] = report.content.setdefault("results", [])

    def hear(found: dict[str, Any]) -> None:
        results.append(found)
        one = next((r for r in results if r["gpus"] == 1 and r["error"] is None), None)
        if one is not None:
            found["efficiency"] = found["tokens_a_second_a_gpu"] / one["tokens_a_second_a_gpu"]
        report.write()

    for data, tensor in divisions:
        try:
            run_ranks(measure_training, data * tensor, settings.kind, (data, tensor, sizes, settings), hear)
        except LostError as lost:
            say(f"lost at {' '.join(lost.at)}: {lost.reason}")
            reason = lost.reason[:LONGEST_MESSAGE]
            results.append({"data": data, "tensor": tensor, "gpus": data * tensor, "error": reason})
            report.write()
