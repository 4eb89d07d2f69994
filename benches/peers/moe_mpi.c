/* MoE dispatch/combine over MPI: a peer to measure against, written the way a careful MPI user would.
 * See README.md beside this file. */
#define _GNU_SOURCE
#include <mpi.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#include "mpi_peer.h"
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#define MAXK 32
#define META_HDR 64

typedef uint16_t bf16;

static int R, N; /* rank, ranks */

/* ---- options ---- */
static int H = 7168, K = 8, E = 256;
static int tokens_list[64], n_tokens;
static int expert_major = 1, use_p2p = 0, self_copy = 0, thp = 1, verify = 0;
static int opt_nt = -1, opt_iters = 0, opt_warmup = -1;
static uint64_t seed = 1;
static const char *json_path = NULL, *routing_path = NULL;
static int32_t *recorded; /* of --routing: recorded_rows x K */
static long recorded_rows;

static void die(const char *m) {
  fprintf(stderr, "moe_mpi: rank %d: %s\n", R, m);
  MPI_Abort(MPI_COMM_WORLD, 2);
  exit(2);
}

/* ---- numbers ---- */
static inline float bf2f(bf16 b) {
  uint32_t u = (uint32_t)b << 16;
  float f;
  memcpy(&f, &u, 4);
  return f;
}
static inline bf16 f2bf(float f) { /* nearest even; no NaN occurs here */
  uint32_t u;
  memcpy(&u, &f, 4);
  return (bf16)((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}
static inline uint32_t mix32(uint32_t h) {
  h ^= h >> 16; h *= 0x7feb352du; h ^= h >> 15; h *= 0x846ca68bu; h ^= h >> 16;
  return h;
}
static uint64_t next64(uint64_t *s) { /* splitmix64 */
  uint64_t z = (*s += 0x9e3779b97f4a7c15ull);
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  return z ^ (z >> 31);
}
/* Row (rank, token): any rank can compute it. */
static void gen_row(int rank, int tok, bf16 *restrict out) {
  uint32_t b = mix32((uint32_t)rank * 0x9e3779b9u + (uint32_t)tok * 0x85ebca6bu + (uint32_t)seed);
  for (int c = 0; c < H; c++) {
    int32_t v = (int32_t)mix32(b + (uint32_t)c * 0xc2b2ae35u);
    out[c] = f2bf((float)v * (1.0f / 2147483648.0f));
  }
}
/* A .npy file of 4-byte integers, [tokens, K], as `xccl bench moe --routing` reads it. */
static void load_routing(void) {
  unsigned char head[10];
  char dict[4096];
  long rows, cols;
  FILE *f = fopen(routing_path, "rb");
  if (!f || fread(head, 1, 10, f) != 10 || memcmp(head, "\x93NUMPY\x01", 7)) die("--routing: no .npy file of version 1");
  size_t len = head[8] | (size_t)head[9] << 8;
  if (len >= sizeof dict || fread(dict, 1, len, f) != len) die("--routing: the header is too long or cut off");
  dict[len] = 0;
  const char *shape = strstr(dict, "'shape':");
  if (!strstr(dict, "'<i4'") || strstr(dict, "'fortran_order': True") || !shape) die("--routing: expected '<i4', C order");
  if (sscanf(shape, "'shape': (%ld, %ld)", &rows, &cols) != 2 || rows < 1 || cols != K) die("--routing: expected [tokens, --topk]");
  recorded = malloc(sizeof(int32_t) * (size_t)rows * (size_t)K);
  if (!recorded || fread(recorded, sizeof(int32_t) * (size_t)K, (size_t)rows, f) != (size_t)rows) die("--routing: the ids are cut off");
  for (long i = 0; i < rows * K; i++)
    if (recorded[i] < 0 || recorded[i] >= E) die("--routing: an id that is no expert");
  recorded_rows = rows;
  fclose(f);
}
/* Uniform distinct experts in random order (as a top-k gives them), or the recorded ones; weights that sum to one. */
static void gen_routing(int rank, int T, int32_t *ids, float *w) {
  uint64_t s = seed * 1000003u + (uint64_t)rank * 7919u + (uint64_t)T;
  int *perm = malloc(sizeof(int) * E);
  for (int i = 0; i < E; i++) perm[i] = i;
  for (int t = 0; t < T; t++) {
    float sum = 0;
    for (int k = 0; k < K; k++) {
      int j = k + (int)(next64(&s) % (uint64_t)(E - k));
      int x = perm[k]; perm[k] = perm[j]; perm[j] = x;
      ids[t * K + k] = perm[k];
      w[t * K + k] = 0.05f + (float)(next64(&s) >> 40) * (1.0f / 16777216.0f);
      sum += w[t * K + k];
    }
    for (int k = 0; k < K; k++) w[t * K + k] /= sum;
    if (recorded) memcpy(ids + (size_t)t * K, recorded + ((long)rank * T + t) % recorded_rows * K, sizeof(int32_t) * (size_t)K);
  }
  free(perm);
}
/* Tells one routing from another: as `xccl bench moe` has it. */
static uint64_t routing_sum(int ranks, int T) {
  int32_t *id = malloc(sizeof(*id) * (size_t)T * K);
  float *w = malloc(sizeof(*w) * (size_t)T * K);
  uint64_t sum = 0, i = 0;
  for (int r = 0; r < ranks; r++) {
    gen_routing(r, T, id, w);
    for (int k = 0; k < T * K; k++) sum += (uint64_t)(id[k] + 1) * ++i;
  }
  free(id); free(w);
  return sum;
}

/* ---- memory ---- */
typedef struct { void *p; size_t n; } Map;
static Map maps[32];
static int n_maps;
static void *alloc(size_t n) {
  n = (n + (2u << 20) - 1) & ~(size_t)((2u << 20) - 1);
  size_t total = n + (2u << 20);
  char *p = mmap(NULL, total, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) die("mmap");
  maps[n_maps++] = (Map){p, total};
  p = (char *)(((uintptr_t)p + (2u << 20) - 1) & ~(uintptr_t)((2u << 20) - 1));
  madvise(p, n, thp ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
  return p;
}
static void free_all(void) {
  while (n_maps) { n_maps--; munmap(maps[n_maps].p, maps[n_maps].n); }
}

static inline void copy_row_nt(bf16 *restrict d, const bf16 *restrict s) {
#ifdef __AVX512F__
  if ((H & 31) == 0) {
    for (int c = 0; c < H; c += 32) _mm512_stream_si512((void *)(d + c), _mm512_loadu_si512(s + c));
    return;
  }
#endif
  memcpy(d, s, (size_t)H * 2);
}
static inline void fence_nt(void) {
#ifdef __AVX512F__
  _mm_sfence();
#endif
}

/* GCC vectors rather than plain loops: gcc 12 unrolls and jams the loop over the entries and then fails to vectorise it.
 * Accumulators for 64 columns stay in registers (four of 64 bytes with AVX-512). */
typedef float vf __attribute__((vector_size(64)));
typedef uint32_t vu __attribute__((vector_size(64)));
typedef uint16_t vh __attribute__((vector_size(32)));
#define INL static inline __attribute__((always_inline))
INL vf ld(const bf16 *p) {
  vh h;
  memcpy(&h, p, 32);
  return (vf)(__builtin_convertvector(h, vu) << 16);
}
INL void st(bf16 *p, vf f) {
  vu u = (vu)f;
  vh h = __builtin_convertvector((u + 0x7fffu + ((u >> 16) & 1u)) >> 16, vh);
  memcpy(p, &h, 32);
}
INL void wsum_cols(int v, int n, const bf16 *const *y, const float *w, int c, bf16 *restrict out) {
  vf acc[4];
  const bf16 *a = y[0] + c;
#pragma GCC unroll 4
  for (int i = 0; i < v; i++) acc[i] = w[0] * ld(a + 16 * i);
  for (int e = 1; e < n; e++) {
    const bf16 *b = y[e] + c;
    float we = w[e];
#pragma GCC unroll 4
    for (int i = 0; i < v; i++) acc[i] += we * ld(b + 16 * i);
  }
#pragma GCC unroll 4
  for (int i = 0; i < v; i++) st(out + c + 16 * i, acc[i]);
}
/* out = round(sum_i w[i] * y[i]), i ascending */
static void wsum(int n, const bf16 *const *y, const float *w, bf16 *restrict out) {
  int c = 0, h = H;
  for (; c + 64 <= h; c += 64) wsum_cols(4, n, y, w, c, out);
  for (; c < h; c += 16) wsum_cols(1, n, y, w, c, out);
}
INL void sum_cols(int v, int n, const bf16 *const *y, int c, bf16 *restrict out) {
  vf acc[4];
#pragma GCC unroll 4
  for (int i = 0; i < v; i++) acc[i] = ld(y[0] + c + 16 * i) + ld(y[1] + c + 16 * i);
  for (int e = 2; e < n; e++) {
    const bf16 *b = y[e] + c;
#pragma GCC unroll 4
    for (int i = 0; i < v; i++) acc[i] += ld(b + 16 * i);
  }
#pragma GCC unroll 4
  for (int i = 0; i < v; i++) st(out + c + 16 * i, acc[i]);
}
INL void sum_n(int n, const bf16 *const *y, bf16 *restrict out) {
  int c = 0, h = H;
  for (; c + 64 <= h; c += 64) sum_cols(4, n, y, c, out);
  for (; c < h; c += 16) sum_cols(1, n, y, c, out);
}
static void sum_rows(int n, const bf16 *const *y, bf16 *restrict out) {
  if (n == 1) memcpy(out, y[0], (size_t)H * 2);
  else if (n == 2) sum_n(2, y, out);
  else sum_n(n, y, out);
}

/* ---- the exchange ----
 * One block per destination, one message: [64 B header: rows, metadata bytes][per row: token, n, n x (local expert,
 * weight)] padded to 64 B, then the rows. Blocks lie at fixed displacements, so that no prefix sums of received
 * counts are needed. The block to itself does not go through MPI. */
typedef struct { uint32_t rows, meta; uint32_t pad[14]; } Hdr;
typedef struct { uint32_t le; float w; } Ent;

static int T, EPR;
static size_t stride, rowb;
static int32_t *ids; static float *wts;
static uint16_t *expert_rank, *expert_local;
static bf16 *x, *out, *em_in, *em_out;
static char *sbuf, *rbuf;   /* dispatch blocks */
static bf16 *csend, *crecv; /* combine: partial rows per source / per destination, T rows capacity each */
static uint32_t **mw;       /* write position of the metadata */
static uint32_t *nrow;      /* rows to each destination */
static uint32_t *tdst_n;    /* per token: destinations */
static uint32_t *tdst;      /* [T][min(K,N)] of dest, row */
static int TD;
static int *scnt, *rcnt, *sdis, *rdis, *cscnt, *crcnt, *cdis;
static uint32_t *next_pos, *pos; /* expert-major: next row of each expert; position of each entry in scan order */
static MPI_Request *req;

static inline char *blk(int d) { return sbuf + (size_t)d * stride; }
static inline char *got(int s) { return s == R ? blk(R) : rbuf + (size_t)s * stride; } /* header and metadata from s */
static inline size_t data_off(const char *b) { return ((const Hdr *)b)->meta; }

static void dispatch(void) {
  if (use_p2p)
    for (int i = 1, q = 0; i < N; i++, q++) {
      int s = (R + N - i) % N;
      MPI_Irecv(rbuf + (size_t)s * stride, (int)stride, MPI_BYTE, s, 1, MPI_COMM_WORLD, &req[q]);
    }
  for (int d = 0; d < N; d++) { nrow[d] = 0; mw[d] = (uint32_t *)(blk(d) + META_HDR); }
  for (int t = 0; t < T; t++) { /* metadata: experts ascending, so destinations come in runs */
    uint64_t key[MAXK];
    for (int k = 0; k < K; k++) {
      uint32_t wb;
      memcpy(&wb, &wts[t * K + k], 4);
      uint64_t v = (uint64_t)(uint32_t)ids[t * K + k] << 32 | wb;
      int j = k;
      for (; j > 0 && key[j - 1] > v; j--) key[j] = key[j - 1];
      key[j] = v;
    }
    uint32_t n = 0, *td = tdst + (size_t)t * TD * 2;
    for (int k = 0; k < K;) {
      int d = expert_rank[key[k] >> 32];
      uint32_t *m = mw[d], c = 0;
      m[0] = (uint32_t)t;
      do {
        m[2 + 2 * c] = expert_local[key[k] >> 32];
        m[3 + 2 * c] = (uint32_t)key[k];
        c++; k++;
      } while (k < K && expert_rank[key[k] >> 32] == d);
      m[1] = c;
      mw[d] = m + 2 + 2 * c;
      td[2 * n] = (uint32_t)d;
      td[2 * n + 1] = nrow[d]++;
      n++;
    }
    tdst_n[t] = n;
  }
  bf16 *base[N];
  for (int d = 0; d < N; d++) {
    Hdr *h = (Hdr *)blk(d);
    h->rows = nrow[d];
    h->meta = (uint32_t)((((char *)mw[d] - (char *)h) + 63) & ~63l);
    scnt[d] = d == R ? 0 : (int)(h->meta + nrow[d] * rowb);
    base[d] = (bf16 *)((char *)h + h->meta);
  }
  if (self_copy) base[R] = (bf16 *)(rbuf + (size_t)R * stride);
  for (int t = 0; t < T; t++) { /* each row read once, written for each destination while it is in L1 */
    const uint32_t *td = tdst + (size_t)t * TD * 2;
    for (uint32_t i = 0; i < tdst_n[t]; i++) {
      int d = (int)td[2 * i];
      if (d == R && !self_copy) continue; /* its own rows stay where they are */
      memcpy(base[d] + (size_t)td[2 * i + 1] * H, x + (size_t)t * H, rowb);
    }
  }
  if (use_p2p) { /* one message a peer; its size is found by the receiver: no exchange of counts */
    for (int i = 1, q = N - 1; i < N; i++, q++) {
      int d = (R + i) % N;
      MPI_Isend(blk(d), scnt[d], MPI_BYTE, d, 1, MPI_COMM_WORLD, &req[q]);
    }
    MPI_Waitall(2 * (N - 1), req, MPI_STATUSES_IGNORE);
  } else {
    MPI_Alltoall(scnt, 1, MPI_INT, rcnt, 1, MPI_INT, MPI_COMM_WORLD);
    MPI_Alltoallv(sbuf, scnt, sdis, MPI_BYTE, rbuf, rcnt, rdis, MPI_BYTE, MPI_COMM_WORLD);
  }
  if (!expert_major) return;
  for (int e = 0; e <= EPR; e++) next_pos[e] = 0;
  uint32_t total = 0;
  for (int s = 0; s < N; s++) {
    const uint32_t *m = (const uint32_t *)(got(s) + META_HDR);
    for (uint32_t r = ((Hdr *)got(s))->rows; r; r--) {
      uint32_t n = m[1];
      for (uint32_t i = 0; i < n; i++) next_pos[m[2 + 2 * i]]++;
      m += 2 + 2 * n;
    }
  }
  for (int e = 0; e < EPR; e++) { uint32_t c = next_pos[e]; next_pos[e] = total; total += c; }
  int nt = opt_nt >= 0 ? opt_nt : (size_t)total * rowb > (12u << 20);
  uint32_t *p = pos;
  for (int s = 0; s < N; s++) {
    const char *b = got(s);
    const uint32_t *m = (const uint32_t *)(b + META_HDR);
    uint32_t rows = ((const Hdr *)b)->rows;
    const bf16 *data = s == R ? (self_copy ? (bf16 *)(rbuf + (size_t)R * stride) : NULL) : (const bf16 *)(b + data_off(b));
    for (uint32_t r = 0; r < rows; r++) {
      uint32_t n = m[1];
      const bf16 *src = data ? data + (size_t)r * H : x + (size_t)m[0] * H;
      for (uint32_t i = 0; i < n; i++) {
        uint32_t q = next_pos[m[2 + 2 * i]]++;
        *p++ = q;
        if (nt) copy_row_nt(em_in + (size_t)q * H, src);
        else memcpy(em_in + (size_t)q * H, src, rowb);
      }
      m += 2 + 2 * n;
    }
  }
  if (nt) fence_nt();
}

static void expert_work(void) { /* output row = input row */
  if (expert_major) { memcpy(em_out, em_in, (size_t)next_pos[EPR - 1] * rowb); return; }
  for (int s = 0; s < N; s++) {
    const char *b = got(s);
    const uint32_t *m = (const uint32_t *)(b + META_HDR);
    uint32_t rows = ((const Hdr *)b)->rows;
    const bf16 *data = s == R ? (self_copy ? (bf16 *)(rbuf + (size_t)R * stride) : NULL) : (const bf16 *)(b + data_off(b));
    for (uint32_t r = 0; r < rows; r++) {
      uint32_t n = m[1];
      const bf16 *y[MAXK];
      float w[MAXK];
      for (uint32_t i = 0; i < n; i++) {
        y[i] = data ? data + (size_t)r * H : x + (size_t)m[0] * H;
        memcpy(&w[i], &m[3 + 2 * i], 4);
      }
      wsum((int)n, y, w, csend + ((size_t)s * T + r) * H);
      m += 2 + 2 * n;
    }
  }
}

static void partials_for(int s, const uint32_t **pp) {
  const char *b = got(s);
  const uint32_t *m = (const uint32_t *)(b + META_HDR), *p = *pp;
  uint32_t rows = ((const Hdr *)b)->rows;
  for (uint32_t r = 0; r < rows; r++) {
    uint32_t n = m[1];
    const bf16 *y[MAXK];
    float w[MAXK];
    for (uint32_t i = 0; i < n; i++) {
      y[i] = em_out + (size_t)*p++ * H;
      memcpy(&w[i], &m[3 + 2 * i], 4);
    }
    wsum((int)n, y, w, csend + ((size_t)s * T + r) * H);
    m += 2 + 2 * n;
  }
  *pp = p;
}

static void combine(void) {
  if (use_p2p)
    for (int i = 1, q = 0; i < N; i++, q++) {
      int d = (R + N - i) % N;
      MPI_Irecv(crecv + (size_t)d * T * H, (int)(nrow[d] * rowb), MPI_BYTE, d, 2, MPI_COMM_WORLD, &req[q]);
    }
  if (expert_major) {
    const uint32_t *p = pos;
    for (int s = 0; s < N; s++) partials_for(s, &p);
  }
  if (use_p2p) {
    for (int i = 1, q = N - 1; i < N; i++, q++) {
      int s = (R + i) % N;
      MPI_Isend(csend + (size_t)s * T * H, (int)(((Hdr *)got(s))->rows * rowb), MPI_BYTE, s, 2, MPI_COMM_WORLD, &req[q]);
    }
    MPI_Waitall(2 * (N - 1), req, MPI_STATUSES_IGNORE);
  } else {
    for (int s = 0; s < N; s++) { /* both sides know the counts from the dispatch */
      cscnt[s] = s == R ? 0 : (int)(((Hdr *)got(s))->rows * rowb);
      crcnt[s] = s == R ? 0 : (int)(nrow[s] * rowb);
    }
    MPI_Alltoallv(csend, cscnt, cdis, MPI_BYTE, crecv, crcnt, cdis, MPI_BYTE, MPI_COMM_WORLD);
  }
  for (int t = 0; t < T; t++) {
    const uint32_t *td = tdst + (size_t)t * TD * 2;
    const bf16 *y[MAXK];
    for (uint32_t i = 0; i < tdst_n[t]; i++) {
      int d = (int)td[2 * i];
      y[i] = (d == R ? csend : crecv) + ((size_t)d * T + td[2 * i + 1]) * H;
    }
    sum_rows((int)tdst_n[t], y, out + (size_t)t * H);
  }
}

/* ---- checks ---- */
static void sort_token(const int32_t *id, const float *w, int *si, float *sw) {
  for (int k = 0; k < K; k++) {
    int j = k;
    for (; j > 0 && si[j - 1] > id[k]; j--) { si[j] = si[j - 1]; sw[j] = sw[j - 1]; }
    si[j] = id[k]; sw[j] = w[k];
  }
}
static int fail(const char *what, int a, int b) {
  fprintf(stderr, "moe_mpi: rank %d: verify: %s differs (%d, %d)\n", R, what, a, b);
  return 1;
}
static int check_dispatch(void) {
  int32_t *gi = malloc(sizeof(*gi) * N * T * K);
  float *gw = malloc(sizeof(*gw) * N * T * K);
  bf16 *row = malloc(rowb);
  int bad = 0, si[MAXK];
  float sw[MAXK];
  for (int s = 0; s < N; s++) gen_routing(s, T, gi + (size_t)s * T * K, gw + (size_t)s * T * K);
  for (int s = 0; s < N && !bad; s++) { /* metadata and received rows */
    const char *b = got(s);
    const uint32_t *m = (const uint32_t *)(b + META_HDR);
    uint32_t r = 0;
    for (int t = 0; t < T && !bad; t++) {
      uint32_t n = 0;
      sort_token(gi + ((size_t)s * T + t) * K, gw + ((size_t)s * T + t) * K, si, sw);
      for (int k = 0; k < K; k++) {
        if (si[k] / EPR != R) continue;
        if (m[2 + 2 * n] != (uint32_t)(si[k] % EPR) || memcmp(&m[3 + 2 * n], &sw[k], 4)) bad = fail("entry", s, t);
        n++;
      }
      if (!n) continue;
      if (m[0] != (uint32_t)t || m[1] != n) bad = fail("metadata", s, t);
      m += 2 + 2 * n;
      gen_row(s, t, row);
      const bf16 *g = s != R ? (const bf16 *)(b + data_off(b)) + (size_t)r * H
                    : self_copy ? (bf16 *)(rbuf + (size_t)R * stride) + (size_t)r * H : x + (size_t)t * H;
      if (memcmp(g, row, rowb)) bad = fail("row", s, t);
      r++;
    }
    if (r != ((const Hdr *)b)->rows) bad = fail("row count", s, (int)r);
  }
  if (expert_major && !bad) {
    size_t q = 0;
    for (int e = 0; e < EPR && !bad; e++) {
      for (int s = 0; s < N && !bad; s++)
        for (int t = 0; t < T && !bad; t++)
          for (int k = 0; k < K; k++)
            if (gi[((size_t)s * T + t) * K + k] == R * EPR + e) {
              gen_row(s, t, row);
              if (memcmp(em_in + q * H, row, rowb)) bad = fail("expert-major row", e, (int)q);
              q++;
            }
      if (!bad && next_pos[e] != q) bad = fail("expert end", e, (int)q);
    }
  }
  free(gi); free(gw); free(row);
  return bad;
}
static int check_combine(void) {
  bf16 *row = malloc(rowb);
  int bad = 0, si[MAXK];
  float sw[MAXK];
  for (int t = 0; t < T && !bad; t++) {
    gen_row(R, t, row);
    sort_token(ids + (size_t)t * K, wts + (size_t)t * K, si, sw);
    for (int c = 0; c < H && !bad; c++) {
      float v = bf2f(row[c]), sum = 0;
      for (int k = 0; k < K;) {
        int d = si[k] / EPR, first = k == 0;
        float a = sw[k] * v;
        for (k++; k < K && si[k] / EPR == d; k++) a += sw[k] * v; /* -ffp-contract=off */
        float r = bf2f(f2bf(a));
        sum = first ? r : sum + r;
      }
      if (f2bf(sum) != out[(size_t)t * H + c]) bad = fail("combined value", t, c);
    }
  }
  free(row);
  return bad;
}

/* ---- driver ---- */
static double quant(const double *v, int n, double q) {
  double p = q * (n - 1);
  int i = (int)p;
  return i + 1 < n ? v[i] + (p - i) * (v[i + 1] - v[i]) : v[n - 1];
}
static void *xmalloc(size_t n) {
  void *p = calloc(1, n ? n : 1);
  if (!p) die("out of memory");
  return p;
}
static void setup(void) {
  rowb = (size_t)H * 2;
  EPR = E / N;
  TD = K < N ? K : N;
  stride = META_HDR + (((size_t)T * (8 + 8 * (K < EPR ? K : EPR)) + 63) & ~(size_t)63) + T * rowb;
  stride = (stride + 4095) & ~(size_t)4095;
  if (stride * N > 0x7fffffff) die("ranks x tokens x hidden over 2 GiB: not supported");
  x = alloc(T * rowb); out = alloc(T * rowb);
  sbuf = alloc(N * stride); rbuf = alloc(N * stride);
  csend = alloc(N * T * rowb); crecv = alloc(N * T * rowb);
  size_t em = (size_t)N * T * (K < EPR ? K : EPR);
  em_in = em_out = NULL;
  if (expert_major) { em_in = alloc(em * rowb); em_out = alloc(em * rowb); }
  pos = alloc(em * 4);
  ids = alloc((size_t)T * K * 4); wts = alloc((size_t)T * K * 4);
  tdst_n = alloc((size_t)T * 4); tdst = alloc((size_t)T * TD * 8);
  for (int i = 0; i < N; i++) {
    sdis[i] = rdis[i] = (int)(i * stride);
    cdis[i] = (int)(i * T * rowb);
  }
  for (int t = 0; t < T; t++) gen_row(R, t, x + (size_t)t * H);
  gen_routing(R, T, ids, wts);
}

int main(int argc, char **argv) {
  MPI_Init(&argc, &argv);
  MPI_Comm_rank(MPI_COMM_WORLD, &R);
  MPI_Comm_size(MPI_COMM_WORLD, &N);
  const char *tl = "1,8,128,1024";
  for (int i = 1; i < argc; i++) {
    const char *a = argv[i];
    if (!strcmp(a, "--verify")) { verify = 1; continue; }
    if (!strcmp(a, "--help") || !strcmp(a, "-h")) {
      if (!R) printf("moe_mpi [--tokens 1,8,128,1024] [--hidden 7168] [--topk 8] [--experts 256] [--layout expert-major|rows]\n"
                     "        [--exchange alltoallv|p2p] [--self inplace|copy] [--nt auto|on|off] [--thp on|off]\n"
                     "        [--routing FILE.npy] [--iters I] [--warmup W] [--seed S] [--verify] [--json FILE|-]\n");
      MPI_Finalize();
      return 0;
    }
    if (i + 1 >= argc) die("option without its value, or unknown; see --help");
    const char *v = argv[++i];
    if (!strcmp(a, "--tokens")) tl = v;
    else if (!strcmp(a, "--hidden")) H = atoi(v);
    else if (!strcmp(a, "--topk")) K = atoi(v);
    else if (!strcmp(a, "--experts")) E = atoi(v);
    else if (!strcmp(a, "--iters")) opt_iters = atoi(v);
    else if (!strcmp(a, "--warmup")) opt_warmup = atoi(v);
    else if (!strcmp(a, "--seed")) seed = strtoull(v, NULL, 10);
    else if (!strcmp(a, "--json")) json_path = v;
    else if (!strcmp(a, "--routing")) routing_path = v;
    else if (!strcmp(a, "--layout")) {
      if (strcmp(v, "expert-major") && strcmp(v, "rows")) die("--layout expert-major|rows");
      expert_major = v[0] == 'e';
    } else if (!strcmp(a, "--exchange")) {
      if (strcmp(v, "alltoallv") && strcmp(v, "p2p")) die("--exchange alltoallv|p2p");
      use_p2p = v[0] == 'p';
    } else if (!strcmp(a, "--self")) self_copy = !strcmp(v, "copy");
    else if (!strcmp(a, "--nt")) opt_nt = !strcmp(v, "on") ? 1 : !strcmp(v, "off") ? 0 : -1;
    else if (!strcmp(a, "--thp")) thp = strcmp(v, "off") != 0;
    else die("unknown option; see --help");
  }
  for (char *d = strdup(tl), *p = strtok(d, ","); p && n_tokens < 64; p = strtok(NULL, ","))
    if ((tokens_list[n_tokens++] = atoi(p)) < 1) die("--tokens: a list of positive numbers");
  if (H < 32 || H % 32) die("--hidden must be a multiple of 32");
  if (K < 1 || K > MAXK || K > E || E > 65535) die("--topk 1 to 32, at most --experts");
  if (E % N) die("--experts must be a multiple of the number of ranks");
  if (routing_path) load_routing();

  mw = xmalloc(sizeof(*mw) * N); nrow = xmalloc(4 * N);
  int **iv[] = {&scnt, &rcnt, &sdis, &rdis, &cscnt, &crcnt, &cdis};
  for (size_t i = 0; i < sizeof(iv) / sizeof(*iv); i++) *iv[i] = xmalloc(sizeof(int) * N);
  req = xmalloc(sizeof(*req) * 2 * N);
  next_pos = xmalloc(4 * (E / N + 1));
  expert_rank = xmalloc(2 * E); expert_local = xmalloc(2 * E);
  for (int e = 0; e < E; e++) { expert_rank[e] = (uint16_t)(e / (E / N)); expert_local[e] = (uint16_t)(e % (E / N)); }

  char version[64];
  const char *peer = mpi_peer(version);
  FILE *json = NULL;
  if (!R) {
    if (json_path && !(json = !strcmp(json_path, "-") ? stdout : fopen(json_path, "w"))) die("cannot write the --json file");
    printf("%s %s, %d ranks, hidden %d, top-%d of %d, bf16, %s, %s; us, slowest rank\n", peer, version, N, H, K, E,
           expert_major ? "expert-major" : "rows", use_p2p ? "p2p" : "alltoallv");
    printf("%7s %9s %9s %9s   %9s %9s %9s  %s\n", "tokens", "disp p10", "median", "p90", "comb p10", "median", "p90", "verified");
  }
  int any_bad = 0;
  for (int ti = 0; ti < n_tokens; ti++) {
    T = tokens_list[ti];
    int iters = opt_iters > 0 ? opt_iters : T <= 16 ? 3000 : T <= 256 ? 400 : 60;
    if (opt_iters <= 0 && N > 2 && iters > 200) iters = 200;
    int warm = opt_warmup >= 0 ? opt_warmup : iters / 10 + 3;
    setup();
    int bad = 0, all_bad = 0;
    if (verify) { /* on buffers never written before */
      dispatch();
      bad = check_dispatch();
      MPI_Allreduce(&bad, &all_bad, 1, MPI_INT, MPI_MAX, MPI_COMM_WORLD);
      if (!all_bad) {
        expert_work();
        MPI_Barrier(MPI_COMM_WORLD);
        combine();
        bad = check_combine();
        MPI_Allreduce(&bad, &all_bad, 1, MPI_INT, MPI_MAX, MPI_COMM_WORLD);
      }
      any_bad |= all_bad;
    }
    double *tm = xmalloc(sizeof(double) * 2 * iters), *mx = xmalloc(sizeof(double) * 2 * iters);
    for (int it = -warm; it < iters; it++) {
      MPI_Barrier(MPI_COMM_WORLD);
      double t0 = now_us();
      dispatch();
      double t1 = now_us();
      MPI_Barrier(MPI_COMM_WORLD);
      expert_work();
      MPI_Barrier(MPI_COMM_WORLD);
      double t2 = now_us();
      combine();
      double t3 = now_us();
      if (it >= 0) { tm[it] = t1 - t0; tm[iters + it] = t3 - t2; }
    }
    MPI_Reduce(tm, mx, 2 * iters, MPI_DOUBLE, MPI_MAX, 0, MPI_COMM_WORLD);
    if (!R) {
      qsort(mx, iters, sizeof(double), cmp_d);
      qsort(mx + iters, iters, sizeof(double), cmp_d);
      double q[6];
      for (int i = 0; i < 2; i++) {
        q[3 * i] = quant(mx + i * iters, iters, 0.1);
        q[3 * i + 1] = quant(mx + i * iters, iters, 0.5);
        q[3 * i + 2] = quant(mx + i * iters, iters, 0.9);
      }
      const char *ver = !verify ? "null" : all_bad ? "false" : "true";
      printf("%7d %9.2f %9.2f %9.2f   %9.2f %9.2f %9.2f  %s\n", T, q[0], q[1], q[2], q[3], q[4], q[5],
             !verify ? "not asked" : all_bad ? "NO" : "yes");
      if (json)
        fprintf(json, "{\"bench\":\"moe\",\"peer\":\"%s\",\"version\":\"%s\",\"ranks\":%d,\"tokens\":%d,\"hidden\":%d,\"topk\":%d,\"experts\":%d,"
                "\"dtype\":\"bf16\",\"layout\":\"%s\",\"exchange\":\"%s\",\"iters\":%d,\"routing_sum\":%llu,"
                "\"dispatch_us\":{\"p10\":%.2f,\"median\":%.2f,\"p90\":%.2f},"
                "\"combine_us\":{\"p10\":%.2f,\"median\":%.2f,\"p90\":%.2f},\"verified\":%s}\n",
                peer, version, N, T, H, K, E, expert_major ? "expert-major" : "rows", use_p2p ? "p2p" : "alltoallv", iters,
                (unsigned long long)routing_sum(N, T), q[0], q[1], q[2], q[3], q[4], q[5], ver);
      fflush(NULL);
    }
    free(tm); free(mx);
    MPI_Barrier(MPI_COMM_WORLD);
    free_all();
  }
  if (json && json != stdout) fclose(json);
  MPI_Finalize();
  return any_bad ? 1 : 0;
}
