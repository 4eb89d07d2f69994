"""Collectives over PyTorch's gloo backend, timed as coll_mpi.c times them. f32, sums. See README.md beside this file.

Start it with `xccl run -n 2 -- python coll_gloo.py ...`, or with RANK, WORLD_SIZE and one XCCL_JOB per job.
"""

import argparse
import json
import os
import tempfile
import time

import torch
import torch.distributed as dist

KINDS = ["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast"]


def parse():
    p = argparse.ArgumentParser()
    p.add_argument("--op", choices=KINDS, default="all_reduce")
    p.add_argument("--sizes", default="8,4096,65536,1048576,67108864")
    p.add_argument("--iters", type=int, default=200)
    p.add_argument("--warmup", type=int, default=20)
    p.add_argument("--seconds", type=float, default=1)
    p.add_argument("--verify", action="store_true")
    p.add_argument("--json")
    return p.parse_args()


def value(rank, i):
    return ((i * 7 + i // 251 + rank * 3) % 5).to(torch.float32)


def call(op, send, recv):
    if op == "all_reduce":
        dist.all_reduce(recv)
    elif op == "all_gather":
        dist.all_gather_into_tensor(recv, send)
    elif op == "reduce_scatter":
        dist.reduce_scatter_tensor(recv, send)
    elif op == "all_to_all":
        dist.all_to_all_single(recv, send)
    else:
        dist.broadcast(recv, 0)


def expected(op, rank, ranks, count, block):
    i = torch.arange(count)
    if op == "all_reduce":
        return sum(value(r, i) for r in range(ranks))
    if op == "reduce_scatter":
        return sum(value(r, rank * block + torch.arange(block)) for r in range(ranks))
    if op == "all_gather":
        return torch.cat([value(r, torch.arange(block)) for r in range(ranks)])
    if op == "all_to_all":
        return torch.cat([value(r, rank * block + torch.arange(block)) for r in range(ranks)])
    return value(0, i)


def timed(op, send, recv, calls):
    dist.barrier()
    start = time.perf_counter()
    for _ in range(calls):
        call(op, send, recv)
    return (time.perf_counter() - start) * 1e6 / calls


def main():
    args = parse()
    rank = int(os.environ.get("XCCL_RANK", os.environ.get("RANK", 0)))
    ranks = int(os.environ.get("XCCL_WORLD_SIZE", os.environ.get("WORLD_SIZE", 1)))
    torch.set_num_threads(1)
    store = os.path.join(tempfile.gettempdir(), f"coll-gloo-{os.environ['XCCL_JOB']}")
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    out = open(args.json, "w") if args.json and rank == 0 else None
    for size in map(int, args.sizes.split(",")):
        blocks = 1 if args.op in ("all_reduce", "broadcast") else ranks
        block = max(1, -(-size // (4 * blocks)))
        count = block * blocks
        # gloo reduces and broadcasts in place.
        in_place = args.op in ("all_reduce", "broadcast")
        send = value(rank, torch.arange(block if args.op == "all_gather" else count))
        recv = send.clone() if in_place else torch.zeros(block if args.op == "reduce_scatter" else count)
        call(args.op, send, recv)
        wrong = None
        if args.verify:
            bad = torch.tensor([(recv != expected(args.op, rank, ranks, count, block)).sum()])
            dist.all_reduce(bad)
            wrong = int(bad)
        recv.zero_()
        us = torch.tensor([timed(args.op, send, recv, 1)])
        dist.broadcast(us, 0)
        us = max(float(us), 1)
        calls = min(20, max(1, int(100 / us)))
        batches = min(args.iters, max(3, int(args.seconds * 1e6 / (us * calls))))
        for _ in range(min(args.warmup, batches)):
            timed(args.op, send, recv, calls)
        times = torch.tensor([timed(args.op, send, recv, calls) for _ in range(batches)], dtype=torch.float64)
        dist.all_reduce(times, dist.ReduceOp.MAX)
        if rank == 0:
            q = [float(times.quantile(at, interpolation="nearest")) for at in (0.1, 0.5, 0.9)]
            print(f"gloo {torch.__version__} {args.op} {count * 4:>10} {q[0]:>12.3f} {q[1]:>12.3f} {q[2]:>12.3f}  {wrong}", flush=True)
            if out:
                time_us = dict(zip(("p10", "median", "p90"), q))
                line = {"bench": args.op, "peer": "gloo", "version": torch.__version__, "ranks": ranks, "bytes": count * 4,
                        "time_us": time_us, "wrong": wrong}
                out.write(json.dumps(line) + "\n")
                out.flush()
    dist.barrier()
    dist.destroy_process_group()


main()
