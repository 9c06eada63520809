"""What ZeRO costs: tokens a second of the zero engine, stages 0 to 3, over a bare PyTorch loop (DDP on two ranks).

    python benchmarks/engine.py [--ranks 1,2] [--sizes 1M,10M] [--tokens 4096] [--rounds 12] [--json FILE]

All contenders live at once and take turns, one step each a round, while the others sleep; the ratio is taken round by
round and its median printed, so that other load on the machine falls on all alike. `cpu` is the same ratio for seconds
of processor time, which other processes cannot lengthen, but which does not see time spent waiting for another rank.
The bare loop has the same model, loss, clipping and fused AdamW, and nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

CONTEXT, ALPHABET = 256, 1024
SIZES = {
    "1M": {"layers": 4, "width": 128, "heads": 4},
    "10M": {"layers": 6, "width": 352, "heads": 11},
}
CONTENDERS = ("bare", "zero-0", "zero-1", "zero-2", "zero-3")


def contender(order: dict[str, Any]) -> None:
    """One rank of one contender: builds itself, then answers every line on stdin with the seconds of so many steps."""
    import torch

    torch.set_num_threads(order["threads"])
    from lmtrain import models
    from lmtrain.engine import EngineConfig, OptimizerConfig, make
    from lmtrain.protocol import Batch, Cond, Place, Spec

    rank, world, rows = order["rank"], order["world"], order["tokens"] // CONTEXT
    torch.manual_seed(0)
    config = models.parse({"kind": "gpt", **SIZES[order["size"]]})
    model = models.build(config, spec=Spec(alphabet=ALPHABET, context=CONTEXT, bos=0))
    parameters = sum(p.numel() for p in model.parameters())
    g = torch.Generator().manual_seed(rank)
    x_BT = torch.randint(ALPHABET, (rows, CONTEXT), generator=g)
    batch = Batch(x_BT, torch.ones(rows, CONTEXT), Cond(torch.zeros(rows, dtype=torch.int64)), index=rank * rows)
    total = float(rows * CONTEXT * world)

    if order["contender"] == "bare":
        net: Any = model
        if world > 1:
            from torch import distributed as dist

            dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{order['port']}", rank=rank, world_size=world)
            net = torch.nn.parallel.DistributedDataParallel(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

        def step(n: int) -> float:
            logp_BT = net(batch.x_BT, cond=batch.cond)
            loss = -(logp_BT * batch.weight_BT).sum() / (total / world)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return float(loss.detach())
    else:
        engine = make(
            EngineConfig(zero_stage=int(order["contender"][-1]), deepspeed=order["deepspeed"]),
            model,
            optimizer=OptimizerConfig(lr=1e-4),
            place=Place(rank, world, rank, "127.0.0.1", order["port"]),
            micro_batch=rows,
            accumulation=1,
            seed=0,
        )

        def step(n: int) -> float:
            return engine.step([batch], total_weight=total, lr=1e-4, step=n).nats

    done = 0
    print(json.dumps({"parameters": parameters}), flush=True)
    for line in sys.stdin:
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(int(line)):
            step(done)
            done += 1
        print(json.dumps({"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}), flush=True)


class Ranks:
    """The processes of one contender."""

    def __init__(self, name: str, *, world: int, threads: int, **order: Any) -> None:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        self.name = name
        self.processes = [
            subprocess.Popen(
                [
                    sys.executable,
                    __file__,
                    "--contender",
                    json.dumps(
                        {**order, "contender": name, "rank": r, "world": world, "port": port, "threads": threads}
                    ),
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": str(threads)},
            )
            for r in range(world)
        ]
        self.parameters = self.answers()[0]["parameters"]

    def answers(self) -> list[dict[str, Any]]:
        lines = [p.stdout.readline() for p in self.processes if p.stdout]
        if not all(lines):
            codes = [p.poll() for p in self.processes]
            raise SystemExit(f"{self.name} died, exit codes {codes}; what it said stands above")
        return [json.loads(line) for line in lines]

    def run(self, steps: int) -> dict[str, float]:
        """Seconds for so many steps: the slowest rank's wall time, all ranks' processor time."""
        for p in self.processes:
            assert p.stdin
            p.stdin.write(f"{steps}\n")
            p.stdin.flush()
        got = self.answers()
        return {"wall": max(g["wall"] for g in got), "cpu": sum(g["cpu"] for g in got)}

    def end(self) -> None:
        for p in self.processes:
            p.kill()
            p.wait()


def compare(
    *, world: int, size: str, tokens: int, rounds: int, threads: int, contenders: tuple[str, ...], deepspeed: Any
) -> dict[str, Any]:
    """Ratios of one size on `world` ranks: bare seconds / contender's seconds, round by round."""
    threads = threads or max(1, (os.cpu_count() or 1) // world)
    ranks = [Ranks(n, world=world, threads=threads, size=size, tokens=tokens, deepspeed=deepspeed) for n in contenders]
    try:
        for r in ranks:
            r.run(3)  # first steps allocate, and ZeRO-3 traces them
        steps = max(1, round(0.5 / min(r.run(2)["wall"] / 2 for r in ranks)))
        times: dict[str, list[dict[str, float]]] = {r.name: [] for r in ranks}
        for turn in range(rounds):
            for r in ranks[turn % len(ranks) :] + ranks[: turn % len(ranks)]:
                times[r.name].append(r.run(steps))
    finally:
        for r in ranks:
            r.end()
    out: dict[str, Any] = {
        "ranks": world,
        "threads": threads,
        "size": size,
        "parameters": ranks[0].parameters,
        "tokens": tokens,
    }
    for name, rows in times.items():
        per = {"tokens_per_s": tokens * world * steps / statistics.median(row["wall"] for row in rows)}
        for clock in ("wall", "cpu"):
            ratios = sorted(b[clock] / row[clock] for b, row in zip(times["bare"], rows, strict=True))
            per[clock] = statistics.median(ratios)
            per[f"{clock}_quartiles"] = [ratios[len(ratios) // 4], ratios[(3 * len(ratios)) // 4]]
        out[name] = per
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", default="1,2")
    parser.add_argument("--sizes", default="1M,10M")
    parser.add_argument("--tokens", default="4096", help="of a rank and step; several with commas")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--threads", type=int, default=0, help="of each rank; default: the cores divided by the ranks")
    parser.add_argument("--contenders", default=",".join(CONTENDERS))
    parser.add_argument("--deepspeed", type=json.loads, default=None, help="JSON that is added to DeepSpeed's")
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--contender", type=json.loads, default=None, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.contender:
        contender(given.contender)
        return
    names = tuple(given.contenders.split(","))
    rows = []
    print(f"{'ranks':>5} {'size':>5} {'tokens':>6} {'bare tok/s':>11}  " + "  ".join(f"{n:>18}" for n in names[1:]))
    print(f"{'':>31}  " + "  ".join(f"{'wall (cpu) of bare':>18}" for _ in names[1:]))
    for world in map(int, given.ranks.split(",")):
        for size in given.sizes.split(","):
            for tokens in map(int, given.tokens.split(",")):
                row = compare(
                    world=world,
                    size=size,
                    tokens=tokens,
                    rounds=given.rounds,
                    threads=given.threads,
                    contenders=names,
                    deepspeed=given.deepspeed,
                )
                rows.append(row)
                cells = "  ".join(f"{row[n]['wall']:>10.3f} ({row[n]['cpu']:.3f})" for n in names[1:])
                print(f"{world:>5} {size:>5} {tokens:>6} {row['bare']['tokens_per_s']:>11.0f}  {cells}", flush=True)
    if given.json:
        given.json.write_text(json.dumps({"benchmark": "engine", "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
