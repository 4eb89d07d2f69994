/* Kernels on threads of their own: each computes some rows of a batch in place and publishes them. */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>

#include "xccl_device.h"

#define CHECK(call)                                                                  \
  do {                                                                               \
    if ((call) != xcclSuccess) {                                                     \
      fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, xcclGetLastError());        \
      exit(1);                                                                       \
    }                                                                                \
  } while (0)
#define EXPECT(condition)                                                            \
  do {                                                                               \
    if (!(condition)) {                                                              \
      fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #condition);        \
      exit(1);                                                                       \
    }                                                                                \
  } while (0)

enum { TOKENS = 37, HIDDEN = 100, TOPK = 3, EXPERTS = 8, KERNELS = 4, ROUNDS = 20 };

typedef struct {
  xcclDeviceBatch_t batch;
  int index;
} Kernel;

/* Every KERNELS-th row: output = token * (local expert + 1). */
static void *kernel(void *argument) {
  const Kernel *self = (const Kernel *)argument;
  const xcclDeviceBatch_t *batch = &self->batch;
  uint64_t i;
  for (i = (uint64_t)self->index; i < batch->num_rows; i += KERNELS) {
    const float *token = (const float *)xcclDeviceToken(batch, i);
    float *output = (float *)xcclDeviceOutput(batch, i);
    xcclMoeRow_t row = xcclDeviceRow(batch, i);
    uint64_t c;
    EXPECT(i >= xcclDeviceExpertBegin(batch, row.expert) && i < xcclDeviceExpertBegin(batch, row.expert + 1));
    for (c = 0; c < batch->hidden; c++) output[c] = token[c] * (float)(row.expert + 1);
    xcclDevicePublish(batch, 1);
  }
  return NULL;
}

/* Each element of the batch's tokens as a kernel decodes it, against what the library's copy makes of it. */
static void quantized(xcclComm_t comm, int rank) {
  static float tokens[TOKENS][HIDDEN], weights[TOKENS][TOPK], out[TOKENS][HIDDEN];
  static int32_t ids[TOKENS][TOPK];
  const uint32_t formats[3] = {xcclWireInt8, xcclWireFp8E4m3, xcclWireFp8E5m2};
  int f, t, c, k, code;
  for (code = 0; code < 256; code++) {
    /* A NaN differs from itself. */
    const float e4m3 = xcclDeviceFp8E4m3((uint8_t)code), e5m2 = xcclDeviceFp8E5m2((uint8_t)code);
    EXPECT((e4m3 != e4m3) == ((code & 0x7f) == 0x7f) && (e5m2 != e5m2) == ((code & 0x7f) > 0x7c));
  }
  EXPECT(xcclDeviceFp8E4m3(0x7e) == 448 && xcclDeviceFp8E4m3(0x81) == -1 / 512.0f && xcclDeviceFp8E4m3(0x38) == 1);
  EXPECT(xcclDeviceFp8E5m2(0x7b) == 57344 && xcclDeviceFp8E5m2(0x01) == 1 / 65536.0f && xcclDeviceFp8E5m2(0x7c) > 1e38f);
  for (t = 0; t < TOKENS; t++) {
    for (c = 0; c < HIDDEN; c++) tokens[t][c] = (float)(rank * 64 + t * c % 89 - 40) / 7.0f;
    for (k = 0; k < TOPK; k++) ids[t][k] = (t + k * 3) % EXPERTS, weights[t][k] = 1;
  }
  for (f = 0; f < 3; f++) {
    xcclMoe_t moe;
    xcclMoeConfig_t config = XCCL_MOE_CONFIG_INITIALIZER;
    xcclMoeInput_t input = XCCL_MOE_INPUT_INITIALIZER;
    xcclMoeBatch_t received = XCCL_MOE_BATCH_INITIALIZER;
    xcclDeviceBatch_t batch = XCCL_DEVICE_BATCH_INITIALIZER;
    xcclExchange_t exchange;
    float *copied;
    uint64_t i;
    config.max_tokens = TOKENS;
    config.hidden = HIDDEN;
    config.topk = TOPK;
    config.experts = EXPERTS;
    config.dtype = xcclFloat32;
    config.wire = formats[f];
    CHECK(xcclMoeCreate(&moe, comm, &config));
    input.tokens = tokens;
    input.num_tokens = TOKENS;
    input.topk_ids = ids;
    input.topk_weights = &weights[0][0];
    CHECK(xcclMoeDispatchSend(&input, &exchange, moe));
    CHECK(xcclMoeDispatchRecv(exchange, &received, moe));
    CHECK(xcclMoeDeviceBatch(exchange, &batch, moe));
    EXPECT(batch.wire == formats[f] && received.wire == formats[f] && received.row_scales == 1);
    copied = (float *)malloc((batch.num_rows * HIDDEN + 1) * sizeof *copied);
    EXPECT(copied);
    CHECK(xcclMoeCopyExpertMajor(exchange, copied, batch.num_rows, 1, moe));
    for (i = 0; i < batch.num_rows; i++) {
      for (c = 0; c < HIDDEN; c++) EXPECT(xcclDeviceWireElement(&batch, i, (uint64_t)c) == copied[i * HIDDEN + (uint64_t)c]);
    }
    CHECK(xcclMoeCombineSend(exchange, copied, moe));
    CHECK(xcclMoeCombineRecv(exchange, out, moe));
    /* Three experts hand back the row they got: three times the token, but for what quantizing took: 127 or 8 or 4 steps. */
    for (t = 0; t < TOKENS; t++) {
      for (c = 0; c < HIDDEN; c++) {
        const float off = out[t][c] - 3 * tokens[t][c], most = 3 * 21.0f / (f == 0 ? 127 : f == 1 ? 8 : 4);
        EXPECT(off < most && -off < most);
      }
    }
    free(copied);
    CHECK(xcclMoeDestroy(moe));
  }
}

int main(void) {
  xcclComm_t comm;
  xcclMoe_t moe;
  xcclMoeConfig_t config = XCCL_MOE_CONFIG_INITIALIZER;
  xcclConfig_t options = XCCL_CONFIG_INITIALIZER;
  int rank, ranks, round;
  static float tokens[TOKENS][HIDDEN], weights[TOKENS][TOPK], out[TOKENS][HIDDEN];
  static int64_t ids[TOKENS][TOPK];

  options.timeout_ms = 300;
  CHECK(xcclCommInitFromEnv(&comm, &options));
  CHECK(xcclCommUserRank(comm, &rank));
  CHECK(xcclCommCount(comm, &ranks));
  config.max_tokens = TOKENS;
  config.hidden = HIDDEN;
  config.topk = TOPK;
  config.experts = EXPERTS;
  config.dtype = xcclFloat32;
  CHECK(xcclMoeCreate(&moe, comm, &config));
  {
    const void *base;
    size_t bytes;
    CHECK(xcclMoeOutbox(ranks - 1, &base, &bytes, moe));
    EXPECT(base && bytes > TOKENS * HIDDEN * sizeof(float));
    EXPECT(xcclMoeOutbox(ranks, &base, &bytes, moe) == xcclInvalidArgument);
  }

  for (round = 0; round < ROUNDS; round++) {
    xcclMoeInput_t input = XCCL_MOE_INPUT_INITIALIZER;
    xcclDeviceBatch_t batch = XCCL_DEVICE_BATCH_INITIALIZER;
    xcclMoeBatch_t received = XCCL_MOE_BATCH_INITIALIZER;
    xcclExchange_t exchange;
    Kernel kernels[KERNELS];
    pthread_t threads[KERNELS];
    int t, k, c, i;

    for (t = 0; t < TOKENS; t++) {
      for (c = 0; c < HIDDEN; c++) tokens[t][c] = (float)(rank * 64 + t + round + c % 7);
      for (k = 0; k < TOPK; k++) ids[t][k] = (t + k * 3 + round) % EXPERTS, weights[t][k] = (float)(k + 1);
    }
    input.tokens = tokens;
    input.num_tokens = TOKENS;
    input.topk_ids = ids;
    input.ids_type = xcclInt64;
    input.topk_weights = &weights[0][0];
    CHECK(xcclMoeDispatchSend(&input, &exchange, moe));
    EXPECT(xcclMoeDeviceBatch(exchange, &batch, moe) == xcclInvalidUsage);
    CHECK(xcclMoeDispatchRecv(exchange, &received, moe));
    CHECK(xcclMoeDeviceBatch(exchange, &batch, moe));
    EXPECT(batch.num_rows == received.num_rows && batch.rows == received.rows && *batch.rows_done == 0);
    if (round == 0 && batch.num_rows > 0) {
      EXPECT(!xcclDeviceIsDone(&batch));
      EXPECT(xcclMoeAwaitRows(exchange, moe) == xcclTimeout); /* nobody computes yet; nothing is lost */
    }
    for (i = 0; i < KERNELS; i++) {
      kernels[i].batch = batch;
      kernels[i].index = i;
      EXPECT(pthread_create(&threads[i], NULL, kernel, &kernels[i]) == 0);
    }
    CHECK(xcclMoeAwaitRows(exchange, moe));
    EXPECT(xcclDeviceIsDone(&batch) && *batch.rows_done == batch.num_rows);
    for (i = 0; i < KERNELS; i++) pthread_join(threads[i], NULL);
    CHECK(xcclMoeCombineSend(exchange, XCCL_IN_PLACE, moe));
    CHECK(xcclMoeCombineRecv(exchange, out, moe));
    for (t = 0; t < TOKENS; t++) {
      float factor = 0;
      for (k = 0; k < TOPK; k++) {
        /* Experts lie in blocks: the first EXPERTS % ranks ranks hold one more. */
        int e = (int)ids[t][k], r = 0, first = 0;
        while (e >= first + EXPERTS / ranks + (r < EXPERTS % ranks)) first += EXPERTS / ranks + (r < EXPERTS % ranks), r++;
        factor += weights[t][k] * (float)(e - first + 1);
      }
      for (c = 0; c < HIDDEN; c++) EXPECT(out[t][c] == factor * tokens[t][c]);
    }
    CHECK(xcclBarrier(comm)); /* ranks with no rows must not run ahead of the one that shows the timeout */
  }
  CHECK(xcclMoeDestroy(moe));
  quantized(comm, rank);
  CHECK(xcclCommDestroy(comm));
  printf("ok\n");
  return 0;
}
