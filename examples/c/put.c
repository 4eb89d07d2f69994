/*
 * One-sided access: each rank puts a block into the memory of its right neighbour, with a signal; the neighbour only waits. Then
 * all draw tickets from a counter on rank 0.
 *
 *   xccl run -n 4 -- put
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

enum { BYTES = 1 << 16, ROUNDS = 10, TAG = 1 };

/* What lies in each rank's shared memory. Words first: they must be at multiples of 8. */
typedef struct {
  uint64_t arrived; /* rounds that the left neighbour has put */
  uint64_t taken;   /* rounds that the right neighbour has read */
  uint64_t tickets; /* rank 0's counts for all */
  unsigned char data[BYTES];
} shared_t;

static unsigned char pattern(int rank, int round, size_t i) { return (unsigned char)(rank * 31 + round * 7 + (int)(i % 251)); }

/* A part of a piece. */
static xcclRemote_t part(xcclRemote_t remote, size_t offset, size_t bytes) {
  remote.offset += offset;
  remote.bytes = bytes;
  return remote;
}

int main(void) {
  xcclComm_t comm;
  xcclRemote_t here, all[64];
  shared_t *shared;
  unsigned char *own = malloc(BYTES);
  uint64_t ticket;
  int rank, ranks, right, left, peer, round;
  size_t i;

  CHECK(xcclCommInitFromEnv(&comm, NULL));
  CHECK(xcclCommUserRank(comm, &rank));
  CHECK(xcclCommCount(comm, &ranks));
  if (ranks > 64 || own == NULL) return 2;
  right = (rank + 1) % ranks;
  left = (rank + ranks - 1) % ranks;

  CHECK(xcclSharedAlloc((void **)&shared, sizeof *shared, comm));
  memset(shared, 0, sizeof *shared);
  CHECK(xcclSharedRemote(shared, sizeof *shared, &here, comm));
  /* Numbers that mean the same everywhere: each rank tells all others. Nobody can write before it was told. */
  for (peer = 0; peer < ranks; peer++) CHECK(xcclSend(&here, sizeof here, peer, TAG, comm));
  for (peer = 0; peer < ranks; peer++) CHECK(xcclRecv(&all[peer], sizeof all[peer], peer, TAG, NULL, comm));

  for (round = 1; round <= ROUNDS; round++) {
    for (i = 0; i < BYTES; i++) own[i] = pattern(rank, round, i);
    /* The neighbour has read the block before. */
    CHECK(xcclSignalWait(&shared->taken, xcclUntilGe, (uint64_t)round - 1, right, NULL, comm));
    CHECK(xcclPutSignal(own, BYTES, part(all[right], offsetof(shared_t, data), BYTES),
                        part(all[right], offsetof(shared_t, arrived), 8), xcclUpdateAdd, 1, comm));
    CHECK(xcclSignalWait(&shared->arrived, xcclUntilGe, (uint64_t)round, left, NULL, comm));
    for (i = 0; i < BYTES; i++) {
      if (shared->data[i] != pattern(left, round, i)) {
        fprintf(stderr, "round %d: byte %zu is not rank %d's\n", round, i, left);
        return 1;
      }
    }
    CHECK(xcclSignal(part(all[left], offsetof(shared_t, taken), 8), xcclUpdateSet, (uint64_t)round, comm));
  }

  CHECK(xcclAtomicFetchAdd(part(all[0], offsetof(shared_t, tickets), 8), 1, &ticket, comm));
  CHECK(xcclBarrier(comm));
  if (rank == 0 && shared->tickets != (uint64_t)ranks) {
    fprintf(stderr, "%llu tickets were drawn by %d ranks\n", (unsigned long long)shared->tickets, ranks);
    return 1;
  }
  printf("rank %d of %d: %d blocks of %d bytes came, ticket %llu\n", rank, ranks, ROUNDS, BYTES, (unsigned long long)ticket);
  CHECK(xcclBarrier(comm)); /* nobody leaves while another one still puts there */
  CHECK(xcclSharedFree(shared, comm));
  CHECK(xcclCommDestroy(comm));
  free(own);
  return 0;
}
