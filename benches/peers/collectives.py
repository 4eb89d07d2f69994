#!/usr/bin/env python3
"""Collectives of this library and of its peers in turn, in rounds; prints a table of each one's best medians. See README.md beside this file.

benches/peers/build.sh builds the peers; the library's own bench is `cargo build --release -p xccl-cli`.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time

HERE = os.path.dirname(os.path.abspath(__file__))
TARGET = os.environ.get("CARGO_TARGET_DIR", os.path.join(HERE, "..", "..", "target"))
OPS = ["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast"]
NAMES = {"xccl": "XCCL", "openmpi": "Open MPI", "mpich": "MPICH", "gloo": "gloo"}


def peer(name):
    return os.path.join(TARGET, "peers", name)


def commands(who, ranks, cores):
    """The ways in which a contender is run: the best time of them counts."""
    fits = ranks <= cores
    xccl = os.path.join(TARGET, "release", "xccl")
    if who == "xccl":
        return [[xccl, "bench", "OP", "-n", str(ranks)] + (["--bind"] if fits else [])]
    if who == "openmpi":
        place = "--bind-to core" if fits else "--oversubscribe --bind-to none --mca mpi_yield_when_idle 1"
        root = "--allow-run-as-root" if os.geteuid() == 0 else ""
        base = f"mpirun.openmpi {root} -n {ranks} {place} --mca btl vader,self".split()
        eager = "--mca btl_vader_eager_limit 65536 --mca btl_vader_max_send_size 65536".split()
        copies = "--mca btl_vader_single_copy_mechanism none".split()
        return [base + extra + [peer("coll_openmpi")] for extra in ([], eager, eager + copies)]
    if who == "mpich":
        place = "-bind-to core" if fits else "-genv MPIR_CVAR_NOLOCAL 1"
        base = f"mpirun.mpich {place} -n {ranks}".split()
        copies = "-genv UCX_TLS posix,self -genv UCX_RNDV_THRESH inf".split()
        return [base[:1] + extra + base[1:] + [peer("coll_mpich")] for extra in ([], copies)]
    return [[xccl, "run", "-n", str(ranks), "--", peer("venv/bin/python"), os.path.join(HERE, "coll_gloo.py")]]


def run(command, op, sizes, args, verify):
    fd, path = tempfile.mkstemp(suffix=".json")
    os.close(fd)
    ours = "bench" in command[1:2]
    command = [op if word == "OP" else word for word in command] + ([] if ours else ["--op", op])
    command += ["--sizes", ",".join(map(str, sizes)), "--seconds", str(args.seconds * (2 if ours else 1)), "--json", path]
    command += ["--iters", str(args.iters)] + (["--verify"] if verify else [])
    # By its own launcher, a job ends as a whole; what was measured until then counts.
    limited = ["timeout", "-k", "2", str(args.timeout)] + command
    done = subprocess.run(limited, capture_output=True, text=True)
    if done.returncode == 124:
        print(f"longer than {args.timeout} s: {' '.join(command)}", file=sys.stderr)
    elif done.returncode:
        print(f"failed: {' '.join(command)}: {done.stderr[-400:]}", file=sys.stderr)
    with open(path) as lines:
        points = [json.loads(line) for line in lines]
    os.unlink(path)
    return points


def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--ops", default=",".join(OPS))
    p.add_argument("--ranks", default="2,4,8")
    p.add_argument("--sizes", default="8,4096,65536,1048576,67108864")
    p.add_argument("--against", default="openmpi,mpich,gloo")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--seconds", type=float, default=0.3, help="for each size")
    p.add_argument("--iters", type=int, default=200)
    p.add_argument("--timeout", type=float, default=60, help="seconds for each run")
    p.add_argument("--add", metavar="FILE", help="keep samples here, and add to those that are there")
    p.add_argument("--show", action="store_true", help="only show what --add has")
    args = p.parse_args()
    started = int(time.time())
    samples = json.load(open(args.add)) if args.add and os.path.exists(args.add) else []
    sizes = [int(size) for size in args.sizes.split(",")]
    cores = len(os.sched_getaffinity(0))
    who = ["xccl"] + [name for name in args.against.split(",") if name]
    for number in range(0 if args.show else args.rounds):
        for ranks in map(int, args.ranks.split(",")):
            for op in args.ops.split(","):
                # Each round begins with another one.
                for name in who[number % len(who):] + who[:number % len(who)]:
                    for command in commands(name, ranks, cores):
                        for point in run(command, op, sizes, args, verify=number == 0):
                            # MPI's and gloo's broadcasts have one buffer; so have gloo's reductions, of which we count the slower.
                            ways = [point["time_us"]] if "time_us" in point else [point["out_of_place"]["time_us"]]
                            wrong = point.get("wrong") or point.get("out_of_place", {}).get("wrong")
                            if op == "broadcast" and "in_place" in point:
                                ways = [point["in_place"]["time_us"]]
                            if wrong:
                                print(f"WRONG RESULTS: {name} {op} {point}", file=sys.stderr)
                                continue
                            samples.append([op, ranks, nearest(sizes, point["bytes"]), name, started + number, ways[0]["median"]])
                    # After each: what was measured is there, however this ends.
                    if args.add:
                        with open(args.add, "w") as f:
                            json.dump(samples, f)
    table(samples)


def nearest(sizes, bytes):
    return min(sizes, key=lambda size: abs(size - bytes))


def table(samples):
    sizes = sorted({s[2] for s in samples})
    label = lambda n: f"{n} B" if n < 1024 else f"{n >> 10} KiB" if n < 1 << 20 else f"{n >> 20} MiB"
    print("| ranks | | " + " | ".join(map(label, sizes)) + " |\n| --- | --- |" + " --- |" * len(sizes))
    lost = []
    for op in [op for op in OPS if any(s[0] == op for s in samples)]:
        for ranks in sorted({s[1] for s in samples}):
            best = {}
            for name in NAMES:
                cells = []
                for size in sizes:
                    # The machine has a fast state and a slow one: of all rounds and ways the best median, which is of the fast one.
                    us = min((s[5] for s in samples if s[:4] == [op, ranks, size, name]), default=None)
                    cells.append("-" if us is None else f"{us:.3g}" if us < 100 else f"{us:.0f}")
                    best.setdefault(size, {})[name] = us
                if any(cell != "-" for cell in cells):
                    print(f"| {ranks} | {op}, {NAMES[name]} | " + " | ".join(cells) + " |")
            for size in sizes:
                ours = best[size].get("xccl")
                others = {n: us for n, us in best[size].items() if n != "xccl" and us is not None}
                if ours and others and min(others.values()) < ours:
                    name = min(others, key=others.get)
                    lost.append(f"{op}, {ranks} ranks, {label(size)}: {NAMES[name]} {others[name]:.3g} us, XCCL {ours:.3g}")
    print("\nNot faster: " + ("; ".join(lost) if lost else "nowhere"))


main()
