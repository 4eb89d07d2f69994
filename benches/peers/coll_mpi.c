/* Collectives over MPI, timed as `xccl bench all_reduce` and its like time them: a barrier, a batch of calls, the slowest rank's
 * time per call; percentiles over batches. f32, sums, out of place (broadcast: one buffer). See README.md. */
#define _GNU_SOURCE
#include <mpi.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "mpi_peer.h"

static int R, N;

static void die(const char *m) {
  fprintf(stderr, "coll_mpi: rank %d: %s\n", R, m);
  MPI_Abort(MPI_COMM_WORLD, 2);
  exit(2);
}
static double quant(const double *v, int n, double q) { return v[(int)((n - 1) * q + 0.5)]; }

enum { ALL_REDUCE, ALL_GATHER, REDUCE_SCATTER, ALL_TO_ALL, BROADCAST, KINDS };
static const char *const NAMES[KINDS] = {"all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast"};

static float value(int rank, size_t i) { return (float)((i * 7 + i / 251 + (size_t)rank * 3) % 5); }

static void call(int kind, float *send, float *recv, int count, int block) {
  switch (kind) {
  case ALL_REDUCE: MPI_Allreduce(send, recv, count, MPI_FLOAT, MPI_SUM, MPI_COMM_WORLD); break;
  case ALL_GATHER: MPI_Allgather(send, block, MPI_FLOAT, recv, block, MPI_FLOAT, MPI_COMM_WORLD); break;
  case REDUCE_SCATTER: MPI_Reduce_scatter_block(send, recv, block, MPI_FLOAT, MPI_SUM, MPI_COMM_WORLD); break;
  case ALL_TO_ALL: MPI_Alltoall(send, block, MPI_FLOAT, recv, block, MPI_FLOAT, MPI_COMM_WORLD); break;
  default: MPI_Bcast(recv, count, MPI_FLOAT, 0, MPI_COMM_WORLD);
  }
}
static float expected(int kind, size_t i, int block) {
  size_t at = kind == REDUCE_SCATTER ? (size_t)R * (size_t)block + i : i;
  float sum = 0;
  switch (kind) {
  case ALL_REDUCE:
  case REDUCE_SCATTER:
    for (int r = 0; r < N; r++) sum += value(r, at);
    return sum;
  case ALL_GATHER: return value((int)(i / (size_t)block), i % (size_t)block);
  case ALL_TO_ALL: return value((int)(i / (size_t)block), (size_t)R * (size_t)block + i % (size_t)block);
  default: return value(0, i);
  }
}
static double timed(int kind, float *send, float *recv, int count, int block, int calls) {
  MPI_Barrier(MPI_COMM_WORLD);
  double t0 = now_us();
  for (int i = 0; i < calls; i++) call(kind, send, recv, count, block);
  return (now_us() - t0) / calls;
}

int main(int argc, char **argv) {
  int iters = 200, warmup = 20, verify = 0, any_bad = 0, kind = ALL_REDUCE;
  double seconds = 1;
  const char *sizes = "8,4096,65536,1048576,67108864", *json_path = NULL;
  MPI_Init(&argc, &argv);
  MPI_Comm_rank(MPI_COMM_WORLD, &R);
  MPI_Comm_size(MPI_COMM_WORLD, &N);
  for (int i = 1; i < argc; i++) {
    const char *a = argv[i];
    if (!strcmp(a, "--verify")) { verify = 1; continue; }
    if (i + 1 >= argc) die("options: --op all_reduce|... --sizes 8,64,... --iters 200 --warmup 20 --seconds 1 --verify --json FILE|-");
    const char *v = argv[++i];
    if (!strcmp(a, "--sizes")) sizes = v;
    else if (!strcmp(a, "--iters")) iters = atoi(v);
    else if (!strcmp(a, "--warmup")) warmup = atoi(v);
    else if (!strcmp(a, "--seconds")) seconds = atof(v);
    else if (!strcmp(a, "--json")) json_path = v;
    else if (!strcmp(a, "--op")) {
      for (kind = 0; kind < KINDS && strcmp(v, NAMES[kind]); kind++) {}
      if (kind == KINDS) die("--op: all_reduce, all_gather, reduce_scatter, all_to_all or broadcast");
    } else die("unknown option");
  }
  if (iters < 1 || warmup < 0) die("--iters at least 1, --warmup at least 0");
  char version[64];
  const char *peer = mpi_peer(version);
  FILE *json = NULL;
  if (!R) {
    if (json_path && !(json = !strcmp(json_path, "-") ? stdout : fopen(json_path, "w"))) die("cannot write the --json file");
    printf("%s %s, %s, %d ranks, us\n%10s %12s %12s %12s  %s\n", peer, version, NAMES[kind], N, "bytes", "p10", "median", "p90", "wrong");
  }
  double *tm = malloc(sizeof(double) * (size_t)iters), *all = malloc(sizeof(double) * (size_t)iters);
  if (!tm || !all) die("out of memory");
  char *list = strdup(sizes);
  for (char *p = strtok(list, ","); p; p = strtok(NULL, ",")) {
    long bytes = atol(p);
    int blocks = kind == ALL_REDUCE || kind == BROADCAST ? 1 : N;
    long block_l = (bytes + 4 * blocks - 1) / (4 * blocks);
    if (block_l < 1) block_l = 1;
    if (bytes < 0 || block_l * blocks > 0x7fffffff) die("--sizes: 0 to 2147483647 elements");
    int block = (int)block_l, count = block * blocks;
    size_t n = (size_t)count;
    float *send = malloc(n * 4), *recv = malloc(n * 4);
    if (!send || !recv) die("out of memory");
    for (size_t i = 0; i < n; i++) {
      send[i] = value(R, i);
      recv[i] = kind == BROADCAST ? value(R, i) : 0;
    }
    call(kind, send, recv, count, block);
    long bad = 0, bad_here = 0;
    if (verify) {
      size_t got = kind == REDUCE_SCATTER ? (size_t)block : n;
      for (size_t i = 0; i < got; i++) bad_here += recv[i] != expected(kind, i, block);
      MPI_Allreduce(&bad_here, &bad, 1, MPI_LONG, MPI_SUM, MPI_COMM_WORLD);
      any_bad |= bad != 0;
    }
    double us = timed(kind, send, recv, count, block, 1);
    MPI_Bcast(&us, 1, MPI_DOUBLE, 0, MPI_COMM_WORLD);
    double per = 100 / us, fit;
    int calls = per < 1 ? 1 : per > 20 ? 20 : (int)per;
    fit = seconds * 1e6 / (us * calls);
    int batches = fit < 3 ? 3 : fit > iters ? iters : (int)fit;
    if (batches > iters) batches = iters;
    int before = warmup < batches ? warmup : batches;
    for (int it = -before; it < batches; it++) {
      double took = timed(kind, send, recv, count, block, calls);
      if (it >= 0) tm[it] = took;
    }
    MPI_Reduce(tm, all, batches, MPI_DOUBLE, MPI_MAX, 0, MPI_COMM_WORLD);
    if (!R) {
      qsort(all, (size_t)batches, sizeof(double), cmp_d);
      double q[3] = {quant(all, batches, 0.1), quant(all, batches, 0.5), quant(all, batches, 0.9)};
      char wrong[32] = "null";
      if (verify) snprintf(wrong, sizeof wrong, "%ld", bad);
      printf("%10zu %12.3f %12.3f %12.3f  %s\n", n * 4, q[0], q[1], q[2], verify ? wrong : "not asked");
      if (json)
        fprintf(json, "{\"bench\":\"%s\",\"peer\":\"%s\",\"version\":\"%s\",\"ranks\":%d,\"bytes\":%zu,"
                "\"time_us\":{\"p10\":%.4f,\"median\":%.4f,\"p90\":%.4f},\"wrong\":%s}\n",
                NAMES[kind], peer, version, N, n * 4, q[0], q[1], q[2], wrong);
      fflush(NULL);
    }
    free(send);
    free(recv);
  }
  if (json && json != stdout) fclose(json);
  MPI_Finalize();
  return any_bad;
}
