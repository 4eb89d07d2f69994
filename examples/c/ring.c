/*
 * Each rank passes a block of the symmetric heap around a ring, without blocking, until it is back where it came from.
 *
 *   xccl run -n 4 -- ring
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <xccl.h>

#define CHECK(call)                                                            \
  do {                                                                         \
    if ((call) != xcclSuccess) {                                               \
      fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, xcclGetLastError());  \
      exit(1);                                                                 \
    }                                                                          \
  } while (0)

enum { BYTES = 1 << 20, TAG = 1 };

static unsigned char pattern(int rank, size_t i) { return (unsigned char)(rank * 31 + (int)(i % 251)); }

int main(void) {
  xcclComm_t comm;
  int rank, ranks, step, right, left;
  void *memory[2];
  size_t i;

  CHECK(xcclCommInitFromEnv(&comm, NULL));
  CHECK(xcclCommUserRank(comm, &rank));
  CHECK(xcclCommCount(comm, &ranks));
  right = (rank + 1) % ranks;
  left = (rank + ranks - 1) % ranks;
  /* What is sent from the symmetric heap is copied once, by its receiver. */
  CHECK(xcclMemAlloc(&memory[0], BYTES, comm));
  CHECK(xcclMemAlloc(&memory[1], BYTES, comm));
  for (i = 0; i < BYTES; i++) ((unsigned char *)memory[0])[i] = pattern(rank, i);

  for (step = 0; step < ranks; step++) {
    void *out = memory[step % 2], *in = memory[(step + 1) % 2];
    xcclRequest_t requests[2];
    xcclStatus_t statuses[2];
    CHECK(xcclIrecv(in, BYTES, left, TAG, comm, &requests[0]));
    CHECK(xcclIsend(out, BYTES, right, TAG, comm, &requests[1]));
    CHECK(xcclWaitAll(2, requests, statuses, comm));
    if (statuses[0].source != left || statuses[0].bytes != BYTES) {
      fprintf(stderr, "%zu bytes from rank %d\n", statuses[0].bytes, statuses[0].source);
      return 1;
    }
    for (i = 0; i < BYTES; i++) {
      int from = (rank + ranks - 1 - step) % ranks;
      if (((unsigned char *)in)[i] != pattern(from, i)) {
        fprintf(stderr, "step %d: byte %zu is not rank %d's\n", step, i, from);
        return 1;
      }
    }
  }
  printf("rank %d of %d: a block of %d bytes came around\n", rank, ranks, BYTES);
  CHECK(xcclMemFree(memory[0], comm));
  CHECK(xcclMemFree(memory[1], comm));
  CHECK(xcclCommDestroy(comm));
  return 0;
}
