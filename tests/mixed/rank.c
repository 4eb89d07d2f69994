/* A rank in C: the four halves, rows in place, 64-bit ids. */
#define _POSIX_C_SOURCE 200809L
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>

#include "protocol.h"
#include "xccl.h"

#define CHECK(call)                                                            \
  do {                                                                         \
    if ((call) != xcclSuccess) {                                               \
      fprintf(stderr, "C, line %d: %s\n", __LINE__, xcclGetLastError());       \
      exit(1);                                                                 \
    }                                                                          \
  } while (0)
#define EXPECT(condition)                                                      \
  do {                                                                         \
    if (!(condition)) {                                                        \
      fprintf(stderr, "C, line %d: not so: %s\n", __LINE__, #condition);       \
      exit(1);                                                                 \
    }                                                                          \
  } while (0)

static int rank, ranks;

static void messages(xcclComm_t comm) {
  static unsigned char out[LONG], in[LONG];
  const size_t lengths[2] = {SMALL, LONG};
  size_t i, l;
  for (l = 0; l < 2; l++) {
    xcclRequest_t requests[2];
    xcclStatus_t statuses[2];
    int left = (rank + ranks - 1) % ranks;
    for (i = 0; i < lengths[l]; i++) out[i] = byte_of(rank, i);
    CHECK(xcclIrecv(in, LONG, left, (uint32_t)l, comm, &requests[0]));
    CHECK(xcclIsend(out, lengths[l], (rank + 1) % ranks, (uint32_t)l, comm, &requests[1]));
    CHECK(xcclWaitAll(2, requests, statuses, comm));
    EXPECT(statuses[0].bytes == lengths[l] && statuses[0].source == left);
    for (i = 0; i < lengths[l]; i++) EXPECT(in[i] == byte_of(left, i));
  }
}

static float load(const void *row, size_t c, xcclDataType_t dtype) {
  return dtype == xcclFloat32 ? ((const float *)row)[c] : from_bf16(((const uint16_t *)row)[c]);
}
static void store(void *row, size_t c, float x, xcclDataType_t dtype) {
  if (dtype == xcclFloat32) ((float *)row)[c] = x;
  else ((uint16_t *)row)[c] = to_bf16(x);
}

static void exchanges(xcclComm_t comm, xcclDataType_t dtype) {
  xcclMoe_t moe;
  xcclMoeConfig_t config = XCCL_MOE_CONFIG_INITIALIZER;
  int round, k;
  static float tokens[MAX_TOKENS * HIDDEN], out[MAX_TOKENS * HIDDEN]; /* room for either type */
  config.max_tokens = MAX_TOKENS;
  config.hidden = HIDDEN;
  config.topk = TOPK;
  config.experts = EXPERTS;
  config.dtype = (uint32_t)dtype;
  CHECK(xcclMoeCreate(&moe, comm, &config));
  for (round = 0; round < ROUNDS; round++) {
    int64_t ids[MAX_TOKENS][TOPK];
    float weights[MAX_TOKENS][TOPK];
    xcclMoeInput_t input = XCCL_MOE_INPUT_INITIALIZER;
    xcclMoeBatch_t batch = XCCL_MOE_BATCH_INITIALIZER;
    xcclExchange_t exchange;
    size_t t, c, i, count = tokens_of(rank, round);
    for (t = 0; t < count; t++) {
      for (c = 0; c < HIDDEN; c++) store(tokens, t * HIDDEN + c, value_of(rank, round, t, c), dtype);
      for (k = 0; k < TOPK; k++) ids[t][k] = id_of(rank, round, t, k), weights[t][k] = weight_of(k);
    }
    input.tokens = tokens;
    input.num_tokens = count;
    input.topk_ids = ids;
    input.ids_type = xcclInt64;
    input.topk_weights = &weights[0][0];
    CHECK(xcclMoeDispatchSend(&input, &exchange, moe));
    CHECK(xcclMoeDispatchRecv(exchange, &batch, moe));
    for (i = 0; i < batch.num_rows; i++) {
      const xcclMoeRow_t *row = &batch.rows[i];
      float factor = (float)(rank * (EXPERTS / ranks) + (int)row->expert + 1);
      for (c = 0; c < HIDDEN; c++) {
        float x = load(row->token_data, c, dtype);
        EXPECT(x == value_of((int)row->source, round, row->token, c));
        store(row->output, c, factor * x, dtype);
      }
    }
    CHECK(xcclMoeCombineSend(exchange, XCCL_IN_PLACE, moe));
    CHECK(xcclMoeCombineRecv(exchange, out, moe));
    for (t = 0; t < count; t++) {
      for (c = 0; c < HIDDEN; c++) EXPECT(load(out, t * HIDDEN + c, dtype) == sum_of(rank, round, t, c));
    }
  }
  CHECK(xcclMoeDestroy(moe));
}

int main(void) {
  xcclComm_t comm, half;
  int count;
  CHECK(xcclCommInitFromEnv(&comm, NULL));
  CHECK(xcclCommUserRank(comm, &rank));
  CHECK(xcclCommCount(comm, &ranks));
  messages(comm);
  CHECK(xcclCommSplit(comm, rank % 2, -rank, &half));
  CHECK(xcclCommCount(half, &count));
  EXPECT(count == ranks / 2);
  CHECK(xcclBarrier(half));
  CHECK(xcclCommDestroy(half));
  exchanges(comm, xcclFloat32);
  exchanges(comm, xcclBfloat16);
  if (getenv("DIES")) { /* the rank that does, all of a sudden; the others wait for it */
    xcclResult_t result;
    const int dies = atoi(getenv("DIES"));
    int i;
    if (dies == rank) {
      for (i = 0; i < ranks; i++)
        if (i != rank) CHECK(xcclRecv(NULL, 0, i, THROUGH, NULL, comm));
      raise(SIGKILL);
    }
    CHECK(xcclSend(NULL, 0, dies, THROUGH, comm));
    result = xcclBarrier(comm);
    fprintf(stderr, "%s\n", xcclGetLastError());
    EXPECT(result == xcclRemoteError);
    CHECK(xcclCommDestroy(comm)); /* or this rank would be the next one that died */
    return 0;
  }
  CHECK(xcclBarrier(comm));
  CHECK(xcclCommDestroy(comm));
  return 0;
}
