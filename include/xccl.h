/*
 * XCCL: communication for LLM-serving engines over global shared memory. The C interface.
 *
 * Pointers: null or misaligned ones are reported; all others must be good for the size that is given, for the length of
 * the call. Memory that is passed in stays the caller's. Handles are recognised when they are of the wrong kind, or were
 * destroyed. Sizes are in bytes where they are named so, otherwise in rows or elements; matrices are row-major, dense.
 *
 * Blocking calls end at the deadline of the configuration (the environment variable XCCL_TIMEOUT, in seconds).
 *
 * Every call returns an xcclResult_t; xcclGetLastError() says what was wrong, with the values.
 *
 * Generated from xccl-sys/src by cbindgen: XCCL_UPDATE_HEADER=1 cargo test -p xccl-sys --test header
 */

#ifndef XCCL_H
#define XCCL_H

#include <stddef.h>
#include <stdint.h>

/**
 * This header's version: major * 10000 + minor * 100 + patch. xcclGetVersion gives the library's.
 */
#define XCCL_VERSION 100

/**
 * Bytes of a unique id.
 */
#define XCCL_UNIQUE_ID_BYTES 128

/**
 * The source that stands for any rank.
 */
#define XCCL_ANY_SOURCE -1

/**
 * The result of every call. The numbers are fixed; where NCCL has the same result, they are NCCL's. 
 */
typedef enum xcclResult_t {
  /**
   * The call did what it says.
   */
  xcclSuccess = 0,
  /**
   * The operating system refused something.
   */
  xcclSystemError = 2,
  /**
   * A bug, in this library or in a peer's process.
   */
  xcclInternalError = 3,
  /**
   * A null pointer, a handle that is none, or a value out of range: the text names it.
   */
  xcclInvalidArgument = 4,
  /**
   * A call at the wrong time, or a handle that another thread is using.
   */
  xcclInvalidUsage = 5,
  /**
   * A peer died, left, or gave an exchange up.
   */
  xcclRemoteError = 6,
  /**
   * The deadline (XCCL_TIMEOUT) passed.
   */
  xcclTimeout = 8,
  /**
   * A message or an exchange has more bytes or rows than the buffer: nothing is lost, repeat with a larger one.
   */
  xcclTruncated = 9,
  /**
   * A peer's input to the exchange was refused there: repeat the call once it has been corrected.
   */
  xcclPeerRefused = 10,
  /**
   * A rank has aborted the communicator.
   */
  xcclAborted = 11,
  /**
   * The machine, or the symmetric heap, has too little memory.
   */
  xcclOutOfMemory = 12,
  /**
   * More has arrived than the configuration has room for.
   */
  xcclLimitExceeded = 13,
  /**
   * The ranks could not come together: one is missing, claimed twice, differs, or was refused.
   */
  xcclJoinFailed = 14,
  /**
   * No launcher's environment says which rank this process is.
   */
  xcclNotLaunched = 15,
} xcclResult_t;

/**
 * The element type of token rows. The numbers are fixed, and NCCL's. 
 */
typedef enum xcclDataType_t {
  /**
   * IEEE 754 half precision, 2 bytes.
   */
  xcclFloat16 = 6,
  /**
   * IEEE 754 single precision, 4 bytes.
   */
  xcclFloat32 = 7,
  /**
   * bfloat16, 2 bytes.
   */
  xcclBfloat16 = 9,
} xcclDataType_t;

/**
 * Where the weighted sum over a token's experts is formed. The numbers are fixed. 
 */
typedef enum xcclReduction_t {
  /**
   * On the token's rank, in ascending k: bitwise the same result for any number of ranks.
   */
  xcclReducePerExpert = 0,
  /**
   * First on each expert's rank, then on the token's: one row per token and rank is read.
   */
  xcclReducePerRank = 1,
} xcclReduction_t;

/**
 * What a communicator handle points to.
 */
typedef struct xcclComm xcclComm;

/**
 * What a MoE handle points to.
 */
typedef struct xcclMoe xcclMoe;

/**
 * Names a communicator that is about to be built, and holds its secret. Good for one communicator. One rank makes it
 * (xcclGetUniqueId) and hands the bytes to the others by any means it likes.
 */
typedef struct xcclUniqueId {
  /**
   * The bytes.
   */
  char internal[XCCL_UNIQUE_ID_BYTES];
} xcclUniqueId;

/**
 * A group of ranks. Made by xcclCommInitRank or xcclCommInitFromEnv, owned by the caller, given back to xcclCommDestroy.
 * Several threads may use it at once; calls that all ranks make together must come in the same order everywhere.
 */
typedef struct xcclComm *xcclComm_t;

/**
 * What was received.
 */
typedef struct xcclStatus_t {
  /**
   * The sender.
   */
  int source;
  /**
   * The message's tag.
   */
  uint32_t tag;
  /**
   * Its length in bytes.
   */
  size_t bytes;
} xcclStatus_t;

/**
 * A handle for the exchanges of one MoE shape over one communicator. Made by xcclMoeCreate, owned by the caller, given back
 * to xcclMoeDestroy. One thread at a time may use it.
 */
typedef struct xcclMoe *xcclMoe_t;

/**
 * The shape of a MoE handle's exchanges. Equal on all ranks.
 */
typedef struct xcclMoeConfig_t {
  /**
   * Most tokens of one rank in one exchange, 1 to 1048576.
   */
  size_t max_tokens;
  /**
   * Elements of a token row, 1 to 1048576.
   */
  size_t hidden;
  /**
   * Experts that a token may name, 1 to 64 and at most experts.
   */
  size_t topk;
  /**
   * Experts over all ranks, 1 to 65536. Rank r holds a contiguous block of them: experts / nranks, the first
   * experts % nranks ranks one more.
   */
  size_t experts;
  /**
   * An xcclDataType_t: the element type of the rows.
   */
  uint32_t dtype;
  /**
   * An xcclReduction_t.
   */
  uint32_t reduction;
} xcclMoeConfig_t;

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

/**
 * A short text for a result, for example "invalid argument". It lives for ever; "unknown result" for other numbers.
 * xcclGetLastError says what was wrong in particular.
 */
const char *xcclGetErrorString(int result);

/**
 * The text of the last call of this thread that failed: the call, the value that was wrong and what to do. An empty string
 * when none has failed. It belongs to the library and lives until the next failing call of this thread.
 */
const char *xcclGetLastError(void);

/**
 * Writes the library's version to *version: major * 10000 + minor * 100 + patch.
 */
enum xcclResult_t xcclGetVersion(int *version);

/**
 * Makes a new id in *id. Call it on one rank and hand the bytes to the others. Does not block.
 */
enum xcclResult_t xcclGetUniqueId(struct xcclUniqueId *id);

/**
 * Joins the communicator of the nranks ranks that share id, as rank `rank` (0 to nranks - 1), and writes its handle to
 * *comm; *comm is left as it is on failure. Options come from the XCCL_... environment variables. Blocks until all ranks
 * have joined or the deadline has passed (xcclJoinFailed names the rank that is missing, claimed twice, or differs).
 */
enum xcclResult_t xcclCommInitRank(xcclComm_t *comm,
                                   int nranks,
                                   struct xcclUniqueId id,
                                   int rank);

/**
 * Joins the communicator of all ranks that a launcher has started (xccl run, torchrun, mpirun, srun, or XCCL_RANK,
 * XCCL_WORLD_SIZE and XCCL_JOB set by hand) and writes its handle to *comm; *comm is left as it is on failure. The n-th
 * call of this process meets the other ranks' n-th. Blocks as xcclCommInitRank does; xcclNotLaunched without a launcher.
 */
enum xcclResult_t xcclCommInitFromEnv(xcclComm_t *comm);

/**
 * Leaves the communicator and gives the handle up: any further use of it is xcclInvalidArgument. Does not block; ranks may
 * leave in any order, and what this rank has sent can still be received. MoE handles made from it stay good.
 * xcclInvalidUsage while another thread is in a call with it: the handle is then still good.
 */
enum xcclResult_t xcclCommDestroy(xcclComm_t comm);

/**
 * Ends every pending and later wait of every rank with xcclAborted. Does not block and may be called while another thread
 * is in a call. The handle is still to be destroyed.
 */
enum xcclResult_t xcclCommAbort(xcclComm_t comm);

/**
 * Writes this process's rank, 0 to nranks - 1, to *rank.
 */
enum xcclResult_t xcclCommUserRank(xcclComm_t comm, int *rank);

/**
 * Writes the number of ranks to *count.
 */
enum xcclResult_t xcclCommCount(xcclComm_t comm, int *count);

/**
 * Returns once every rank has called it. Blocks, up to the deadline.
 */
enum xcclResult_t xcclBarrier(xcclComm_t comm);

/**
 * Sends `bytes` bytes at data (may be null when bytes is 0) to rank peer, possibly this one. Messages of one sender with one
 * tag arrive in order. Returns when data may be reused: at once for what the sender's ring has room for, after the receiver
 * has copied it for longer messages. Messages to the own rank never block.
 */
enum xcclResult_t xcclSend(const void *data,
                           size_t bytes,
                           int peer,
                           uint32_t tag,
                           xcclComm_t comm);

/**
 * Receives the next message with this tag from rank source, or from any rank (XCCL_ANY_SOURCE), into the capacity bytes at
 * buffer (may be null when capacity is 0). Blocks until it is there, up to the deadline. Writes sender, tag and length to
 * *status unless status is null. xcclTruncated when the message is longer than capacity: *status is written all the same,
 * and the message is kept for a call with a larger buffer.
 */
enum xcclResult_t xcclRecv(void *buffer,
                           size_t capacity,
                           int source,
                           uint32_t tag,
                           struct xcclStatus_t *status,
                           xcclComm_t comm);

/**
 * Makes a handle for exchanges of the shape *config and writes it to *moe; *moe is left as it is on failure. Every rank of
 * comm must call it, with the same configuration (xcclJoinFailed on every rank otherwise). Blocks until all have.
 */
enum xcclResult_t xcclMoeCreate(xcclMoe_t *moe,
                                xcclComm_t comm,
                                const struct xcclMoeConfig_t *config);

/**
 * Gives the handle up: any further use of it is xcclInvalidArgument. An exchange that was not combined is given up, and the
 * other ranks learn of it (xcclRemoteError). Does not block.
 */
enum xcclResult_t xcclMoeDestroy(xcclMoe_t moe);

/**
 * Writes the number of experts that this rank holds to *local_experts.
 */
enum xcclResult_t xcclMoeLocalExperts(xcclMoe_t moe, size_t *local_experts);

/**
 * Sends this rank's tokens to the ranks that hold their experts, and receives what all ranks sent to this rank's experts.
 * Every rank must call it, then xcclMoeCombine. Blocks until all have called it, up to the deadline.
 *
 * In:
 * - tokens: [num_tokens, hidden], elements of the handle's type, aligned to the element;
 * - num_tokens: 0 to max_tokens, may differ on every rank;
 * - topk_ids: [num_tokens, topk], ids of experts, different within a token, or -1 for none;
 * - topk_weights: [num_tokens, topk], the factors that xcclMoeCombine applies;
 * - capacity_rows: rows that expert_rows has room for; nranks * max_tokens * min(topk, local experts) is always enough.
 *
 * Out:
 * - expert_rows: [*rows, hidden], expert-major: the rows of the first local expert, then of the next; within an expert by
 *   the rank they come from, then by token;
 * - expert_counts: [local experts], rows of each;
 * - *rows: their sum.
 *
 * Arrays without elements may be null. All memory stays the caller's; the tokens may be reused when the call returns.
 *
 * Bad input is xcclInvalidArgument and nothing is sent: the other ranks get xcclPeerRefused, and all may call again.
 * After xcclTruncated (capacity_rows is below *rows, which is written), xcclTimeout or xcclPeerRefused call again with the same
 * arguments, and a larger capacity_rows after xcclTruncated: the tokens are sent once, by whichever call gets that far.
 * xcclInvalidUsage before the last exchange was combined.
 */
enum xcclResult_t xcclMoeDispatch(const void *tokens,
                                  size_t num_tokens,
                                  const int32_t *topk_ids,
                                  const float *topk_weights,
                                  void *expert_rows,
                                  size_t capacity_rows,
                                  uint32_t *expert_counts,
                                  size_t *rows,
                                  xcclMoe_t moe);

/**
 * Hands back what this rank's experts made of the rows of the last xcclMoeDispatch, and receives the sums for the tokens
 * that this rank sent there: out[t] = sum over k of topk_weights[t, k] * output of expert topk_ids[t, k], summed in f32 and
 * rounded once; zeros for a token without experts. Blocks until the ranks that had tokens of this one have combined, up to
 * the deadline.
 *
 * - expert_outputs: [*rows, hidden] in the order of expert_rows, not weighted, and possibly the same memory;
 * - out: [num_tokens, hidden].
 *
 * Arrays without elements may be null. All memory stays the caller's. xcclInvalidUsage without a dispatch, and
 * xcclInvalidArgument, change nothing: correct the call and repeat it. After any other result the exchange has ended.
 */
enum xcclResult_t xcclMoeCombine(const void *expert_outputs,
                                 void *out,
                                 xcclMoe_t moe);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* XCCL_H */
