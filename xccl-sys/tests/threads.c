/*
 * One communicator used by four threads at once, each with its own tag and requests; and a MoE handle that goes from thread to
 * thread under a lock, as the header allows. A second thread that comes into a MoE call is refused, not harmed.
 */
#define _POSIX_C_SOURCE 200809L
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "xccl.h"

enum { THREADS = 4, ROUNDS = 60, HIDDEN = 32, EXPERTS = 4 };

static xcclComm_t comm;
static xcclMoe_t moe;
static int rank, ranks;
static pthread_mutex_t turn = PTHREAD_MUTEX_INITIALIZER;

static void fail(int line, const char *what) {
  fprintf(stderr, "line %d: %s (last error: %s)\n", line, what, xcclGetLastError());
  exit(1);
}
#define EXPECT(condition) ((condition) ? (void)0 : fail(__LINE__, #condition))
#define CHECK(call) EXPECT((call) == xcclSuccess)

static void *messages(void *argument) {
  const uint32_t tag = *(const uint32_t *)argument;
  const int right = (rank + 1) % ranks, left = (rank + ranks - 1) % ranks;
  static const size_t sizes[] = {8, 40, 1000, 100000};
  unsigned char *out = malloc(100000), *in = malloc(100000);
  int i;
  for (i = 0; i < ROUNDS; i++) {
    const size_t size = sizes[i % 4];
    xcclRequest_t requests[2];
    xcclStatistics_t statistics = XCCL_STATISTICS_INITIALIZER;
    void *block;
    memset(out, (int)(tag * 10 + (uint32_t)i), size);
    CHECK(xcclMemAlloc(&block, 64, comm));
    CHECK(xcclIrecv(in, 100000, left, tag, comm, &requests[0]));
    CHECK(xcclIsend(out, size, right, tag, comm, &requests[1]));
    CHECK(xcclWaitAll(2, requests, NULL, comm));
    EXPECT(in[size - 1] == (unsigned char)(tag * 10 + (uint32_t)i));
    CHECK(xcclCommGetStatistics(comm, &statistics));
    EXPECT(statistics.messages_sent > 0);
    CHECK(xcclMemFree(block, comm));
    /* Something fails in each thread: the text is the thread's own. */
    EXPECT(xcclSend(NULL, tag + 1, right, tag, comm) == xcclInvalidArgument);
    EXPECT(strstr(xcclGetLastError(), "xcclSend: data is a null pointer") != NULL);
  }
  free(out);
  free(in);
  return NULL;
}

static void *exchange(void *argument) {
  float token[HIDDEN], out[HIDDEN], weight = 2;
  int32_t id = (rank + 1) % EXPERTS;
  xcclMoeInput_t input = XCCL_MOE_INPUT_INITIALIZER;
  xcclMoeBatch_t batch = XCCL_MOE_BATCH_INITIALIZER;
  xcclExchange_t sent;
  size_t i;
  int c;
  (void)argument;
  pthread_mutex_lock(&turn);
  for (c = 0; c < HIDDEN; c++) token[c] = (float)(rank + c);
  input.tokens = token;
  input.num_tokens = 1;
  input.topk_ids = &id;
  input.topk_weights = &weight;
  CHECK(xcclMoeDispatchSend(&input, &sent, moe));
  CHECK(xcclMoeDispatchRecv(sent, &batch, moe));
  for (i = 0; i < batch.num_rows; i++) memcpy(batch.rows[i].output, batch.rows[i].token_data, sizeof token);
  CHECK(xcclMoeCombineSend(sent, XCCL_IN_PLACE, moe));
  CHECK(xcclMoeCombineRecv(sent, out, moe));
  for (c = 0; c < HIDDEN; c++) EXPECT(out[c] == 2 * token[c]);
  pthread_mutex_unlock(&turn);
  return NULL;
}

/* Waits in the handle until the other rank sends, or for as long as the deadline. */
static void *waits_in_moe(void *argument) {
  xcclMoeBatch_t batch = XCCL_MOE_BATCH_INITIALIZER;
  xcclResult_t result;
  /* It may be this thread that comes into a call of the other one. */
  while ((result = xcclMoeDispatchRecv(*(xcclExchange_t *)argument, &batch, moe)) == xcclInvalidUsage) continue;
  CHECK(result);
  return NULL;
}

static void *waits_in_recv(void *argument) {
  char byte;
  CHECK(xcclRecv(&byte, 1, rank, 99, NULL, *(xcclComm_t *)argument));
  return NULL;
}

int main(void) {
  pthread_t threads[THREADS];
  uint32_t tags[THREADS];
  xcclMoeConfig_t config = XCCL_MOE_CONFIG_INITIALIZER;
  const struct timespec soon = {0, 300000000};
  int i;
  CHECK(xcclCommInitFromEnv(&comm, NULL));
  CHECK(xcclCommUserRank(comm, &rank));
  CHECK(xcclCommCount(comm, &ranks));
  config.max_tokens = 4;
  config.hidden = HIDDEN;
  config.topk = 1;
  config.experts = EXPERTS;
  config.dtype = xcclFloat32;
  CHECK(xcclMoeCreate(&moe, comm, &config));
  for (i = 0; i < THREADS; i++) {
    tags[i] = (uint32_t)i;
    EXPECT(pthread_create(&threads[i], NULL, messages, &tags[i]) == 0);
  }
  for (i = 0; i < THREADS; i++) pthread_join(threads[i], NULL);
  for (i = 0; i < THREADS; i++) EXPECT(pthread_create(&threads[i], NULL, exchange, NULL) == 0);
  for (i = 0; i < THREADS; i++) pthread_join(threads[i], NULL);

  /* A communicator that a thread waits in cannot be destroyed under it. */
  EXPECT(pthread_create(&threads[0], NULL, waits_in_recv, &comm) == 0);
  nanosleep(&soon, NULL); /* long enough for it to be there */
  EXPECT(xcclCommDestroy(comm) == xcclInvalidUsage);
  EXPECT(strstr(xcclGetLastError(), "another thread is in a call with comm") != NULL);
  CHECK(xcclSend("x", 1, rank, 99, comm));
  pthread_join(threads[0], NULL);

  if (ranks > 1) {
    /* Rank 1 sends late: meanwhile a thread of rank 0 waits in the handle, and a second one is refused. */
    xcclMoeInput_t input = XCCL_MOE_INPUT_INITIALIZER;
    xcclExchange_t sent;
    float out[1];
    char byte = 0;
    if (rank != 0) {
      CHECK(xcclRecv(&byte, 1, 0, 98, NULL, comm));
      CHECK(xcclMoeDispatchSend(&input, &sent, moe));
      CHECK(waits_in_moe(&sent) ? xcclInternalError : xcclSuccess);
    } else {
      size_t local;
      CHECK(xcclMoeDispatchSend(&input, &sent, moe));
      EXPECT(pthread_create(&threads[0], NULL, waits_in_moe, &sent) == 0);
      while (xcclMoeLocalExperts(moe, &local) == xcclSuccess) continue;
      EXPECT(strstr(xcclGetLastError(), "another thread is in a call with moe") != NULL);
      EXPECT(xcclMoeDestroy(moe) == xcclInvalidUsage);
      for (i = 1; i < ranks; i++) CHECK(xcclSend(&byte, 1, i, 98, comm));
      pthread_join(threads[0], NULL);
    }
    CHECK(xcclMoeCombineSend(sent, XCCL_IN_PLACE, moe));
    CHECK(xcclMoeCombineRecv(sent, out, moe));
  }
  CHECK(xcclBarrier(comm));
  CHECK(xcclMoeDestroy(moe));
  CHECK(xcclCommDestroy(comm));
  printf("ok\n");
  return 0;
}
