/* Ping-pong between ranks 0 and 1 over MPI, as osu_latency does it: blocking send and receive of one buffer each, half the
 * round trip. Timed as `xccl bench p2p` does: batches of ten round trips, percentiles over batches. See README.md. */
#define _GNU_SOURCE
#include <mpi.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#include "mpi_peer.h"

#define BATCH 10

static int R;

static void die(const char *m) {
  fprintf(stderr, "p2p_mpi: rank %d: %s\n", R, m);
  MPI_Abort(MPI_COMM_WORLD, 2);
  exit(2);
}
static double quant(const double *v, int n, double q) { return v[(int)((n - 1) * q + 0.5)]; }

/* Ordinary memory, as malloc gives it, or huge pages: single copies (CMA) look up each page of the sender. */
static int thp;
static unsigned char *alloc(size_t n) {
  size_t huge = 2u << 20;
  char *p = mmap(NULL, n + 2 * huge, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) die("mmap");
  p = (char *)(((uintptr_t)p + huge - 1) & ~(uintptr_t)(huge - 1));
  madvise(p, n + huge, thp ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
  return (unsigned char *)p;
}
static void ping_pong(unsigned char *out, unsigned char *back, int n) {
  if (R == 0) {
    MPI_Send(out, n, MPI_BYTE, 1, 1, MPI_COMM_WORLD);
    MPI_Recv(back, n, MPI_BYTE, 1, 1, MPI_COMM_WORLD, MPI_STATUS_IGNORE);
  } else {
    MPI_Recv(back, n, MPI_BYTE, 0, 1, MPI_COMM_WORLD, MPI_STATUS_IGNORE);
    MPI_Send(out, n, MPI_BYTE, 0, 1, MPI_COMM_WORLD);
  }
}
/* Each rank sends a pattern of its own, three times over; both compare every byte. */
static unsigned char pattern(int rank, int round, size_t i) { return (unsigned char)(i * 131 + rank * 17 + round * 7 + (i >> 8)); }
static int check(unsigned char *out, unsigned char *back, int n) {
  for (int round = 0; round < 3; round++) {
    for (int i = 0; i < n; i++) out[i] = pattern(R, round, (size_t)i);
    memset(back, 0, (size_t)n);
    ping_pong(out, back, n);
    for (int i = 0; i < n; i++)
      if (back[i] != pattern(1 - R, round, (size_t)i)) {
        fprintf(stderr, "p2p_mpi: rank %d: byte %d of %d differs\n", R, i, n);
        return 1;
      }
  }
  return 0;
}

int main(int argc, char **argv) {
  int N, iters = 200, warmup = 20, verify = 0, any_bad = 0;
  const char *sizes = "8,64,1024,4096,16384,65536,262144,1048576", *json_path = NULL;
  MPI_Init(&argc, &argv);
  MPI_Comm_rank(MPI_COMM_WORLD, &R);
  MPI_Comm_size(MPI_COMM_WORLD, &N);
  for (int i = 1; i < argc; i++) {
    const char *a = argv[i];
    if (!strcmp(a, "--verify")) { verify = 1; continue; }
    if (i + 1 >= argc) die("options: --sizes 8,64,... --iters 200 --warmup 20 --thp on|off --verify --json FILE|-");
    const char *v = argv[++i];
    if (!strcmp(a, "--sizes")) sizes = v;
    else if (!strcmp(a, "--iters")) iters = atoi(v);
    else if (!strcmp(a, "--warmup")) warmup = atoi(v);
    else if (!strcmp(a, "--thp")) thp = !strcmp(v, "on");
    else if (!strcmp(a, "--json")) json_path = v;
    else die("unknown option");
  }
  if (N != 2) die("needs 2 ranks");
  if (iters < 1 || warmup < 0) die("--iters at least 1, --warmup at least 0");
  char version[64];
  const char *peer = mpi_peer(version);
  FILE *json = NULL;
  if (!R) {
    if (json_path && !(json = !strcmp(json_path, "-") ? stdout : fopen(json_path, "w"))) die("cannot write the --json file");
    printf("%s %s, half round trip in us\n%10s %12s %12s %12s  %s\n", peer, version, "bytes", "p10", "median", "p90", "verified");
  }
  double *tm = malloc(sizeof(double) * (size_t)iters);
  if (!tm) die("out of memory");
  char *list = strdup(sizes);
  for (char *p = strtok(list, ","); p; p = strtok(NULL, ",")) {
    long bytes = atol(p);
    if (bytes < 0 || bytes > 0x7fffffff) die("--sizes: 0 to 2147483647 bytes");
    int n = (int)bytes, bad = 0;
    unsigned char *out = alloc((size_t)n), *back = alloc((size_t)n);
    memset(out, 1, (size_t)n);
    memset(back, 1, (size_t)n);
    if (verify) {
      int mine = check(out, back, n);
      MPI_Allreduce(&mine, &bad, 1, MPI_INT, MPI_MAX, MPI_COMM_WORLD);
      any_bad |= bad;
    }
    for (int it = -warmup; it < iters; it++) {
      double t0 = now_us();
      for (int b = 0; b < BATCH; b++) ping_pong(out, back, n);
      if (it >= 0) tm[it] = (now_us() - t0) / (2 * BATCH);
    }
    if (!R) {
      qsort(tm, (size_t)iters, sizeof(double), cmp_d);
      double q[3] = {quant(tm, iters, 0.1), quant(tm, iters, 0.5), quant(tm, iters, 0.9)};
      printf("%10d %12.3f %12.3f %12.3f  %s\n", n, q[0], q[1], q[2], !verify ? "not asked" : bad ? "NO" : "yes");
      if (json)
        fprintf(json, "{\"bench\":\"p2p\",\"peer\":\"%s\",\"version\":\"%s\",\"ranks\":2,\"bytes\":%d,"
                "\"half_rtt_us\":{\"p10\":%.4f,\"median\":%.4f,\"p90\":%.4f},\"verified\":%s}\n",
                peer, version, n, q[0], q[1], q[2], !verify ? "null" : bad ? "false" : "true");
      fflush(NULL);
    }
  }
  if (json && json != stdout) fclose(json);
  MPI_Finalize();
  return any_bad;
}
