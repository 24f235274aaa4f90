r"""Where a profiled step's time goes: a table by kernel family, and the ten longest kernels.

    python train_kd.py --config configs/smollm2.yaml --profile --max_steps 6 --run mine
    python scripts/profile_table.py runs/mine            # its newest trace
    python scripts/profile_table.py runs/mine/trace-5.json

Reads the Chrome trace that --profile writes. Busy is the time in which at least one kernel, copy or
fill runs, so that streams at work together count once; a family's time is the sum over its
launches, and the shares, of busy time, add up to more than 1 where streams overlap. Several ranks
also get how long collectives ran, how much of that nothing else did, and how much longer kernels
beside them took than the median of the same ones (name and grid) with none beside them. Idle is
what is left of the window from the first profiled step to its last kernel. Muon's matmuls are in
matmul. A trace without GPU kernels gives the operators of the CPU by self time. Tested by
tests/test_profile_table.py.
"""

from __future__ import annotations

import argparse
import bisect
import itertools
import json
import re
import statistics
import sys
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from config import UserError
from metrics import console_table

GPU = ("kernel", "gpu_memcpy", "gpu_memset")

# Family -> what its kernels' names hold. The first that matches counts: torch.compile names kernels
# after the operators in them, and PyTorch's copies and optimizers are elementwise kernels, too.
FAMILIES = {
    "collectives": r"nccl",
    "loss head": r"^_?kd_",
    "compiled elementwise": r"^triton_(poi|red|per|for)_",
    "linear attention": r"^_?(chunk_|fused_recurrent|fused_chunk|parallel_|prepare_wy|recompute_w_u"
    r"|wu_fwd|wy_|solve_tril|merge_16x16|l2norm|layer_norm_gated|short_conv|causal_conv1d|kda_gate"
    r"|gdn_gate|fused_addcmul|token_shift|compute_dh0|state_passing|bmm_chunk)|causal_conv1d",
    "softmax attention": r"flash|fmha|sdpa|attention",
    "copies and fills": r"^mem(cpy|set)|copy_kernel|fillfunctor|catarray",
    "optimizer": r"multi_tensor|adam",
    "matmul": r"gemm|gemv|cublas|cutlass|nvjet|splitk|^triton_tem_.*mm",
    "eager PyTorch": r"at::|\bcub::",
}


def family(name: str) -> str:
    """The family of a kernel's name."""
    for title, pattern in FAMILIES.items():
        if re.search(pattern, name, re.IGNORECASE):
            return title
    return "other"


def newest_trace(path: str) -> Path:
    """`path`, or the newest trace-<step>.json in a folder. UserError where there is none."""
    found = Path(path)
    if found.is_dir():
        traces = sorted(found.glob("trace-*.json"), key=lambda p: p.stat().st_mtime_ns)
        if not traces:
            raise UserError(f"{path}: no trace-<step>.json in it; a run with --profile writes one")
        return traces[-1]
    if not found.is_file():
        raise UserError(f"{path}: no such run folder or trace")
    return found


def read_events(path: Path) -> list[dict]:
    """The complete events ("ph": "X") of a Chrome trace."""
    try:
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
        events = [event for event in events if event.get("ph") == "X"]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path}: not a Chrome trace of torch.profiler") from None
    if not any(event.get("cat") in (*GPU, "cpu_op") for event in events):
        raise UserError(f"{path}: neither GPU kernels nor CPU operators in this trace")
    return events


def busy_time(events: list[dict]) -> float:
    """Microseconds in which at least one of the events runs."""
    total, end = 0.0, float("-inf")
    for event in sorted(events, key=lambda e: e["ts"]):
        start, stop = max(event["ts"], end), event["ts"] + event["dur"]
        total += max(0.0, stop - start)
        end = max(end, stop)
    return total


def slowed(work: list[dict], collectives: list[dict]) -> float:
    """Microseconds that kernels of `work` took longer beside collectives than the median of the
    same ones without; those that never ran without count as not slowed."""
    spans = sorted((e["ts"], e["ts"] + e["dur"]) for e in collectives)
    ends = list(itertools.accumulate((end for _, end in spans), max))
    alone, beside = defaultdict(list), defaultdict(list)
    for event in work:
        i = bisect.bisect_left(spans, (event["ts"] + event["dur"],)) - 1  # the last to begin before
        same = (event["name"], tuple(event.get("args", {}).get("grid", ())))
        found = beside if i >= 0 and ends[i] > event["ts"] else alone
        found[same].append(event["dur"])
    return sum(
        sum(times) - len(times) * statistics.median(alone[same])
        for same, times in beside.items()
        if same in alone
    )


def self_times(events: list[dict]) -> list[tuple[str, float]]:
    """(name, microseconds) of every CPU operator, without the operators inside it."""
    found, threads = [], defaultdict(list)
    for event in events:
        threads[event.get("pid"), event.get("tid")].append(event)
    for thread in threads.values():
        open_ones: list[tuple[float, int]] = []  # (end, index in found)
        for event in sorted(thread, key=lambda e: (e["ts"], -e["dur"])):
            while open_ones and open_ones[-1][0] <= event["ts"]:
                open_ones.pop()
            if open_ones:
                found[open_ones[-1][1]][1] -= event["dur"]
            open_ones.append((event["ts"] + event["dur"], len(found)))
            found.append([event["name"], event["dur"]])
    return [(name, time) for name, time in found]


def summarise(events: list[dict]) -> dict:
    """Steps, milliseconds a step of window, busy and idle, and (name, ms a step, launches) of
    families and of kernels (of CPU operators, without families, where no GPU was at work)."""
    marks = [e for e in events if e["name"].startswith("ProfilerStep#")]
    marks = [e for e in marks if e.get("cat") == "user_annotation"]
    gpu = [e for e in events if e.get("cat") in GPU]
    work = gpu or [e for e in events if e.get("cat") == "cpu_op"]
    begin = min(e["ts"] for e in marks or work)
    work = [e for e in work if e["ts"] >= begin]
    end = max(e["ts"] + e["dur"] for e in marks + work)  # kernels run on after the host's step
    scale = 1e-3 / max(1, len(marks))
    named = [(e["name"], e["dur"]) for e in work] if gpu else self_times(work)
    busy = busy_time(work)
    messages = [e for e in work if family(e["name"]) == "collectives"]
    other = [e for e in work if family(e["name"]) != "collectives"]
    return {
        "gpu": bool(gpu), "steps": len(marks), "wall": (end - begin) * scale,
        "busy": busy * scale, "collectives": busy_time(messages) * scale,
        "collectives alone": (busy - busy_time(other)) * scale,
        "slowed": slowed(other, messages) * scale,
        "families": totals([(family(n), t) for n, t in named], scale) if gpu else [],
        "kernels": totals(named, scale),
    }  # fmt: skip


def totals(named: list[tuple[str, float]], scale: float) -> list[tuple[str, float, int]]:
    """(name, scaled total, launches), longest first."""
    sums: dict[str, list[float]] = defaultdict(list)
    for name, time in named:
        sums[name].append(time)
    rows = [(name, sum(times) * scale, len(times)) for name, times in sums.items()]
    return sorted(rows, key=lambda row: -row[1])


def show(found: dict, most: int) -> None:
    """The tables."""
    steps, wall, busy = max(1, found["steps"]), found["wall"], found["busy"]

    def table(title: str, what: str, rows: list) -> None:
        console_table(title, [
            {what: name[:90], "ms/step": f"{ms:.3f}", "share": f"{100 * ms / busy:.1f}%",
             "launches/step": f"{count / steps:.1f}"}
            for name, ms, count in rows
        ])  # fmt: skip

    where = "GPU" if found["gpu"] else "CPU"
    if not found["gpu"]:
        print("no GPU kernels in this trace: operators of the CPU by self time")
    print(
        f"{found['steps']} steps of {wall:.3f} ms; {where} busy {busy:.3f} ms, idle "
        f"{wall - busy:.3f} ms = {100 * (1 - busy / wall):.1f}%"
    )
    if found["collectives"]:
        under_way, alone = found["collectives"], found["collectives alone"]
        print(
            f"collectives {under_way:.3f} ms, alone {alone:.3f} ms; kernels beside them "
            f"{found['slowed']:.3f} ms longer"
        )
    if found["gpu"]:
        table("by kernel family", "family", found["families"])
    longest = "kernel" if found["gpu"] else "operator"
    table(f"the longest {longest}s", longest, found["kernels"][:most])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", help="run folder (its newest trace) or trace file")
    parser.add_argument("--most", type=int, default=10, help="kernels listed one by one")
    parser.add_argument("--json", default="", help="write the numbers here")
    args = parser.parse_args(argv)
    try:
        trace = newest_trace(args.path)
        found = summarise(read_events(trace))
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    print(trace)
    show(found, args.most)
    if args.json:
        Path(args.json).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
