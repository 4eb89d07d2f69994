/*
 * A ring of messages, then one MoE dispatch and combine, checked against the expected values.
 *
 *   cargo build --release -p xccl-sys
 *   cc -std=c99 -Iinclude examples/c/moe.c -o moe -Ltarget/release -lxccl_c -Wl,-rpath,$PWD/target/release
 *   xccl run -n 4 -- ./moe
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#include "xccl.h"

#define CHECK(call)                                                                                        \
    do {                                                                                                   \
        xcclResult_t result = (call);                                                                      \
        if (result != xcclSuccess) {                                                                       \
            fprintf(stderr, "%s:%d: %s: %s\n", __FILE__, __LINE__, xcclGetErrorString(result),             \
                    xcclGetLastError());                                                                   \
            exit(1);                                                                                       \
        }                                                                                                  \
    } while (0)

enum { MAX_TOKENS = 16, HIDDEN = 96, TOPK = 2, EXPERTS = 5 };

/* Small integers and powers of two: sums are exact, whatever their order. */
static float token_value(int rank, size_t token, size_t column) {
    return (float)(rank * 100 + (int)token * 10 + (int)(column % 7));
}

static const float WEIGHTS[TOPK] = {0.5f, 0.25f};

static int32_t expert_of(int rank, size_t token, size_t k) {
    return (int32_t)(((size_t)rank + token + 2 * k) % EXPERTS);
}

/* Expert e multiplies by e + 1. */
static float expert_factor(size_t expert) { return (float)(expert + 1); }

static void *allocate(size_t count, size_t size) {
    void *memory = calloc(count ? count : 1, size);
    if (!memory) {
        fprintf(stderr, "no memory for %zu elements of %zu bytes\n", count, size);
        exit(1);
    }
    return memory;
}

static void ring(xcclComm_t comm, int rank, int nranks) {
    int64_t sent = 1000 + rank, received = 0;
    int left = (rank + nranks - 1) % nranks;
    xcclStatus_t status;
    CHECK(xcclSend(&sent, sizeof sent, (rank + 1) % nranks, 7, comm));
    CHECK(xcclRecv(&received, sizeof received, XCCL_ANY_SOURCE, 7, &status, comm));
    if (status.source != left || status.bytes != sizeof received || received != 1000 + left) {
        fprintf(stderr, "rank %d received %lld from %d, expected %d from %d\n", rank, (long long)received,
                status.source, 1000 + left, left);
        exit(1);
    }
}

static void exchange(xcclComm_t comm, int rank, int nranks) {
    xcclMoeConfig_t config = XCCL_MOE_CONFIG_INITIALIZER;
    config.max_tokens = MAX_TOKENS;
    config.hidden = HIDDEN;
    config.topk = TOPK;
    config.experts = EXPERTS;
    config.dtype = xcclFloat32;
    config.reduction = xcclReducePerExpert;
    xcclMoe_t moe;
    CHECK(xcclMoeCreate(&moe, comm, &config));

    /* The first EXPERTS % nranks ranks hold one expert more. */
    size_t local, share = (size_t)(EXPERTS / nranks), larger = (size_t)(EXPERTS % nranks), r = (size_t)rank;
    size_t first = r * share + (r < larger ? r : larger);
    CHECK(xcclMoeLocalExperts(moe, &local));

    size_t num_tokens = r % MAX_TOKENS + 3;
    size_t capacity = (size_t)nranks * MAX_TOKENS * (local < TOPK ? local : TOPK);
    float *tokens = allocate(num_tokens * HIDDEN, sizeof *tokens);
    float *out = allocate(num_tokens * HIDDEN, sizeof *out);
    float *weights = allocate(num_tokens * TOPK, sizeof *weights);
    int32_t *ids = allocate(num_tokens * TOPK, sizeof *ids);
    float *expert_rows = allocate(capacity * HIDDEN, sizeof *expert_rows);
    uint32_t *counts = allocate(local, sizeof *counts);

    for (int iteration = 0; iteration < 3; iteration++) {
        for (size_t t = 0; t < num_tokens; t++) {
            for (size_t h = 0; h < HIDDEN; h++) tokens[t * HIDDEN + h] = token_value(rank, t, h);
            for (size_t k = 0; k < TOPK; k++) {
                ids[t * TOPK + k] = expert_of(rank, t, k);
                weights[t * TOPK + k] = WEIGHTS[k];
            }
        }
        size_t rows;
        CHECK(xcclMoeDispatch(tokens, num_tokens, ids, weights, expert_rows, capacity, counts, &rows, moe));

        size_t row = 0;
        for (size_t e = 0; e < local; e++) /* the experts' work, in place */
            for (uint32_t i = 0; i < counts[e]; i++, row++)
                for (size_t h = 0; h < HIDDEN; h++) expert_rows[row * HIDDEN + h] *= expert_factor(first + e);
        if (row != rows) {
            fprintf(stderr, "rank %d: the counts' sum is %zu, rows is %zu\n", rank, row, rows);
            exit(1);
        }
        CHECK(xcclMoeCombine(expert_rows, out, moe));

        for (size_t t = 0; t < num_tokens; t++)
            for (size_t h = 0; h < HIDDEN; h++) {
                float expected = 0;
                for (size_t k = 0; k < TOPK; k++)
                    expected += WEIGHTS[k] * expert_factor((size_t)expert_of(rank, t, k)) * token_value(rank, t, h);
                if (out[t * HIDDEN + h] != expected) {
                    fprintf(stderr, "rank %d: out[%zu][%zu] is %g, expected %g\n", rank, t, h,
                            (double)out[t * HIDDEN + h], (double)expected);
                    exit(1);
                }
            }
    }
    printf("rank %d of %d: %zu tokens dispatched and combined, all values as expected\n", rank, nranks, num_tokens);
    free(tokens);
    free(out);
    free(weights);
    free(ids);
    free(expert_rows);
    free(counts);
    CHECK(xcclMoeDestroy(moe));
}

int main(void) {
    xcclComm_t comm;
    int rank, nranks;
    CHECK(xcclCommInitFromEnv(&comm, NULL));
    CHECK(xcclCommUserRank(comm, &rank));
    CHECK(xcclCommCount(comm, &nranks));
    ring(comm, rank, nranks);
    exchange(comm, rank, nranks);
    CHECK(xcclBarrier(comm));
    CHECK(xcclCommDestroy(comm));
    return 0;
}
