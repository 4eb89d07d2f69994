/*
 * A MoE layer in four halves: while the tokens of one micro-batch are on their way, the experts work on the other one. Tokens
 * are computed in the outbox and rows consumed where their senders have them: nothing is copied but the sums.
 *
 *   xccl run -n 2 -- overlap
 */
#include <stdio.h>
#include <stdlib.h>

#include <xccl.h>

#define CHECK(call)                                                            \
  do {                                                                         \
    if ((call) != xcclSuccess) {                                               \
      fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, xcclGetLastError());  \
      exit(1);                                                                 \
    }                                                                          \
  } while (0)

enum { TOKENS = 24, HIDDEN = 256, TOPK = 3, EXPERTS = 12, LAYERS = 6 };

/* One micro-batch: what it sends, and the exchange that it is in. */
typedef struct {
  int32_t ids[TOKENS][TOPK];
  float weights[TOKENS][TOPK];
  float tokens[TOKENS][HIDDEN]; /* kept for the comparison */
  float sums[TOKENS][HIDDEN];
  xcclExchange_t exchange;
} MicroBatch;

static float scale(int expert) { return 1.0f + 0.25f * (float)expert; }

/* The attention's part: tokens and routing of layer `layer`, written to where the peers read them. */
static void send(MicroBatch *m, int which, int layer, int rank, xcclMoe_t moe) {
  xcclMoeInput_t input = XCCL_MOE_INPUT_INITIALIZER;
  void *rows;
  size_t row_bytes;
  int t, k, c;

  CHECK(xcclMoeInputRows(TOKENS, &rows, &row_bytes, moe));
  for (t = 0; t < TOKENS; t++) {
    float *row = (float *)((char *)rows + (size_t)t * row_bytes);
    for (c = 0; c < HIDDEN; c++) row[c] = m->tokens[t][c] = (float)((rank * 7 + which * 3 + layer + t + c) % 16);
    for (k = 0; k < TOPK; k++) {
      m->ids[t][k] = (rank + which + layer + t * 5 + k * 4) % EXPERTS;
      m->weights[t][k] = 0.5f * (float)(k + 1);
    }
  }
  input.num_tokens = TOKENS; /* tokens stays null: they are in the rows */
  input.topk_ids = m->ids;
  input.topk_weights = &m->weights[0][0];
  CHECK(xcclMoeDispatchSend(&input, &m->exchange, moe));
}

/* The experts' part: rows where they are, outputs where the peers read them. */
static size_t work(MicroBatch *m, int first_expert, xcclMoe_t moe) {
  xcclMoeBatch_t batch = XCCL_MOE_BATCH_INITIALIZER;
  size_t i, c;

  CHECK(xcclMoeDispatchRecv(m->exchange, &batch, moe));
  for (i = 0; i < batch.num_rows; i++) {
    const float *x = (const float *)batch.rows[i].token_data;
    float *y = (float *)batch.rows[i].output, s = scale(first_expert + (int)batch.rows[i].expert);
    for (c = 0; c < batch.hidden; c++) y[c] = s * x[c];
  }
  CHECK(xcclMoeCombineSend(m->exchange, XCCL_IN_PLACE, moe));
  return batch.num_rows;
}

static void finish(MicroBatch *m, xcclMoe_t moe) {
  int t, k, c;
  CHECK(xcclMoeCombineRecv(m->exchange, m->sums, moe));
  for (t = 0; t < TOKENS; t++) {
    for (c = 0; c < HIDDEN; c++) {
      float sum = 0;
      for (k = 0; k < TOPK; k++) sum += m->weights[t][k] * (scale(m->ids[t][k]) * m->tokens[t][c]);
      if (m->sums[t][c] != sum) {
        fprintf(stderr, "token %d, element %d: %f, expected %f\n", t, c, (double)m->sums[t][c], (double)sum);
        exit(1);
      }
    }
  }
}

int main(void) {
  static MicroBatch batches[2];
  xcclComm_t comm;
  xcclMoe_t moe;
  xcclMoeConfig_t config = XCCL_MOE_CONFIG_INITIALIZER;
  int rank, ranks, layer, first_expert;
  size_t rows = 0;

  CHECK(xcclCommInitFromEnv(&comm, NULL));
  CHECK(xcclCommUserRank(comm, &rank));
  CHECK(xcclCommCount(comm, &ranks));
  config.max_tokens = TOKENS;
  config.hidden = HIDDEN;
  config.topk = TOPK;
  config.experts = EXPERTS;
  config.dtype = xcclFloat32;
  CHECK(xcclMoeCreate(&moe, comm, &config));
  /* The first EXPERTS % ranks ranks hold one expert more. */
  first_expert = rank * (EXPERTS / ranks) + (rank < EXPERTS % ranks ? rank : EXPERTS % ranks);

  send(&batches[0], 0, 0, rank, moe);
  for (layer = 0; layer < LAYERS; layer++) {
    /* Batch 1 is on its way while batch 0 is worked on, and the other way round. */
    send(&batches[1], 1, layer, rank, moe);
    rows += work(&batches[0], first_expert, moe);
    finish(&batches[0], moe);
    if (layer + 1 < LAYERS) send(&batches[0], 0, layer + 1, rank, moe);
    rows += work(&batches[1], first_expert, moe);
    finish(&batches[1], moe);
  }
  printf("rank %d of %d: %zu rows worked on, all sums as expected\n", rank, ranks, rows);
  CHECK(xcclMoeDestroy(moe));
  CHECK(xcclCommDestroy(comm));
  return 0;
}
