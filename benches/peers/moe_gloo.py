"""MoE dispatch and combine over PyTorch's gloo backend: a peer to measure against, as a careful user writes it with
`all_to_all_single`. See README.md beside this file for what is timed.

Start it with `xccl run -n 2 -- python moe_gloo.py ...`, or with RANK, WORLD_SIZE and one XCCL_JOB per job.
"""

import argparse
import json
import os
import sys
import tempfile
import time

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F


def parse():
    p = argparse.ArgumentParser()
    p.add_argument("--tokens", default="1,8,128")
    p.add_argument("--hidden", type=int, default=7168)
    p.add_argument("--topk", type=int, default=8)
    p.add_argument("--experts", type=int, default=256)
    p.add_argument("--layout", choices=["rows", "expert-major"], default="expert-major")
    p.add_argument("--routing", required=True, help="a .npy file of 4-byte ids, [tokens, topk]")
    p.add_argument("--iters", type=int, default=20)
    p.add_argument("--warmup", type=int, default=3)
    p.add_argument("--verify", action="store_true")
    p.add_argument("--json")
    return p.parse_args()


def value_rows(rank, tokens, hidden):
    """Row t of a rank; every value is exact in bf16."""
    t = torch.arange(tokens).unsqueeze(1)
    c = torch.arange(hidden).unsqueeze(0)
    return (((rank * 31 + t * 7 + c) % 251) / 16.0 - 8.0).to(torch.bfloat16)


def weights(tokens, topk):
    return ((torch.arange(tokens * topk) % 7 + 1) / 8.0).to(torch.bfloat16).view(tokens, topk)


class Exchange:
    """One rank's tokens and buffers."""

    def __init__(self, args, rank, ranks, tokens, recorded):
        self.args, self.rank, self.ranks, self.tokens = args, rank, ranks, tokens
        self.per_rank = args.experts // ranks
        self.recorded = recorded
        self.x = value_rows(rank, tokens, args.hidden)
        self.ids = self.routing(rank)
        self.weights = weights(tokens, args.topk)
        # A row and its metadata travel together: [hidden] values, then the local experts (-1: none) and their weights, then
        # the token; all as 2-byte words.
        self.width = args.hidden + 2 * args.topk + 2
        self.send = torch.zeros(ranks * tokens, self.width, dtype=torch.int16)
        self.recv = torch.zeros(ranks * tokens, self.width, dtype=torch.int16)
        self.back = torch.zeros(ranks * tokens, args.hidden, dtype=torch.bfloat16)

    def routing(self, rank):
        rows = (rank * self.tokens + np.arange(self.tokens)) % len(self.recorded)
        return torch.from_numpy(self.recorded[rows].astype(np.int64))

    def routing_sum(self):
        ids = np.concatenate([self.routing(r).numpy().reshape(-1) for r in range(self.ranks)])
        return int(((ids + 1).astype(np.uint64) * np.arange(1, len(ids) + 1, dtype=np.uint64)).sum())

    def select(self, ids, weights):
        """Which tokens go to which rank, once each, and with which of their experts."""
        dest = ids // self.per_rank
        mask = (dest.unsqueeze(0) == torch.arange(self.ranks).view(-1, 1, 1)).any(2)
        to, token = mask.nonzero(as_tuple=True)
        here = dest[token] == to.unsqueeze(1)
        local = torch.where(here, ids[token] % self.per_rank, -1).to(torch.int16)
        return to, token, local, weights[token]

    def dispatch(self):
        h, k = self.args.hidden, self.args.topk
        to, token, local, w = self.select(self.ids, self.weights)
        n = len(token)
        send = self.send[:n]
        send[:, :h] = self.x.index_select(0, token).view(torch.int16)
        send[:, h : h + k] = local
        send[:, h + k : h + 2 * k] = w.view(torch.int16)
        send[:, h + 2 * k :] = token.to(torch.int32).view(torch.int16).view(n, 2)
        self.token = token
        counts = torch.bincount(to, minlength=self.ranks)
        got = torch.empty_like(counts)
        dist.all_to_all_single(got, counts)
        self.sent, self.got = counts.tolist(), got.tolist()
        self.recv_n = self.recv[: sum(self.got)]
        # gloo moves bytes of this type as they are; it has no 2-byte integers.
        dist.all_to_all_single(self.recv_n.view(torch.uint8), send.view(torch.uint8), self.got, self.sent)
        if self.args.layout == "expert-major":
            local = self.recv_n[:, h : h + k]
            row, slot = (local >= 0).nonzero(as_tuple=True)
            expert = local[row, slot]
            order = torch.argsort(expert, stable=True)
            self.em_in = self.recv_n[:, :h].index_select(0, row[order]).view(torch.bfloat16)
            # For the sums: entry i of the scan lies at position[i].
            self.position = torch.empty_like(order)
            self.position[order] = torch.arange(len(order))
            self.first = torch.searchsorted(row, torch.arange(len(self.recv_n)))
            self.entry_weight = self.recv_n[:, h + k : h + 2 * k].contiguous().view(torch.bfloat16)[row, slot]

    def work(self):
        """The experts: output row = input row. In `rows` they also form their rank's sums."""
        h, k = self.args.hidden, self.args.topk
        if self.args.layout == "expert-major":
            self.em_out = self.em_in.clone()
            return
        rows = self.recv_n[:, :h].contiguous().view(torch.bfloat16).float()
        w = self.recv_n[:, h + k : h + 2 * k].contiguous().view(torch.bfloat16).float()
        total = (w * (self.recv_n[:, h : h + k] >= 0)).sum(1, keepdim=True)
        self.partial = (rows * total).to(torch.bfloat16)

    def combine(self):
        if self.args.layout == "expert-major":
            self.partial = F.embedding_bag(
                self.position, self.em_out, self.first, mode="sum", per_sample_weights=self.entry_weight
            )
        back = self.back[: len(self.token)]
        dist.all_to_all_single(back.view(torch.uint8), self.partial.view(torch.uint8), self.sent, self.got)
        order = torch.argsort(self.token, stable=True)
        first = torch.searchsorted(self.token[order], torch.arange(self.tokens))
        self.out = F.embedding_bag(order, back, first, mode="sum")

    def check_dispatch(self):
        h, k = self.args.hidden, self.args.topk
        begin = 0
        for source in range(self.ranks):
            to, token, local, w = self.select(self.routing(source), weights(self.tokens, k))
            mine = to == self.rank
            got = self.recv_n[begin : begin + self.got[source]]
            begin += self.got[source]
            same = (
                len(got) == int(mine.sum())
                and torch.equal(got[:, :h], value_rows(source, self.tokens, h)[token[mine]].view(torch.int16))
                and torch.equal(got[:, h : h + k], local[mine])
                and torch.equal(got[:, h + k : h + 2 * k], w[mine].view(torch.int16))
                and torch.equal(got[:, h + 2 * k :].contiguous().view(torch.int32).view(-1), token[mine].to(torch.int32))
            )
            if not same:
                print(f"moe_gloo: rank {self.rank}: what came from rank {source} differs", file=sys.stderr)
                return False
        if self.args.layout == "expert-major":
            expected = []
            tokens = [value_rows(source, self.tokens, h) for source in range(self.ranks)]
            for e in range(self.rank * self.per_rank, (self.rank + 1) * self.per_rank):
                for source in range(self.ranks):
                    chosen = (self.routing(source) == e).any(1).nonzero().view(-1)
                    expected.append(tokens[source][chosen])
            return torch.equal(self.em_in, torch.cat(expected))
        return True

    def check_combine(self):
        # Sums of partial sums that were rounded to bf16, then rounded: within two roundings of the exact one.
        exact = self.x.double() * self.weights.double().sum(1, keepdim=True)
        size = self.x.double().abs() * self.weights.double().sum(1, keepdim=True)
        return bool(((self.out.double() - exact).abs() <= size * 2.0**-7 + 1e-30).all())


def everywhere(ok):
    flag = torch.tensor([0 if ok else 1])
    dist.all_reduce(flag)
    return flag.item() == 0


def main():
    args = parse()
    rank = int(os.environ.get("XCCL_RANK", os.environ.get("RANK", 0)))
    ranks = int(os.environ.get("XCCL_WORLD_SIZE", os.environ.get("WORLD_SIZE", 1)))
    # Several ranks on a core: more threads only take turns.
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks))
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = os.path.join(tempfile.gettempdir(), f"xccl-gloo-{os.environ['XCCL_JOB']}")
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    recorded = np.load(args.routing)
    out = open(args.json, "w") if args.json and rank == 0 else None
    failed = False
    for tokens in map(int, args.tokens.split(",")):
        e = Exchange(args, rank, ranks, tokens, recorded)
        verified = None
        if args.verify:
            e.dispatch()
            good = everywhere(e.check_dispatch())
            e.work()
            e.combine()
            verified = everywhere(e.check_combine()) and good
            failed |= not verified
        times = []
        for i in range(args.warmup + args.iters):
            dist.barrier()
            t0 = time.perf_counter()
            e.dispatch()
            t1 = time.perf_counter()
            dist.barrier()
            e.work()
            dist.barrier()
            t2 = time.perf_counter()
            e.combine()
            t3 = time.perf_counter()
            if i >= args.warmup:
                times.append([(t1 - t0) * 1e6, (t3 - t2) * 1e6])
        slowest = torch.tensor(times, dtype=torch.float64)
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        if rank != 0:
            continue
        q = np.percentile(slowest.numpy(), [10, 50, 90], axis=0, method="nearest")
        name = dict(zip(["p10", "median", "p90"], q[:, 0].tolist()))
        point = {
            "bench": "moe",
            "peer": "gloo",
            "version": torch.__version__,
            "ranks": ranks,
            "tokens": tokens,
            "hidden": args.hidden,
            "topk": args.topk,
            "experts": args.experts,
            "dtype": "bf16",
            "layout": args.layout,
            "iters": args.iters,
            "routing_sum": e.routing_sum(),
            "dispatch_us": name,
            "combine_us": dict(zip(["p10", "median", "p90"], q[:, 1].tolist())),
            "verified": verified,
        }
        print(f"gloo {torch.__version__} {args.layout} tokens {tokens}: {q[1, 0]:.0f} + {q[1, 1]:.0f} us, verified {verified}")
        if out:
            out.write(json.dumps(point) + "\n")
            out.flush()
    try:
        dist.barrier()
        dist.destroy_process_group()
    except RuntimeError:
        pass  # All results are there; gloo complains when the other rank closes first.
    if rank == 0 and os.path.exists(store):
        os.remove(store)
    sys.exit(1 if failed else 0)


main()
