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
 * Structs that may grow begin with their size: start from the initializer of the same name.
 *
 * Threads: a communicator may be used by several threads at once, a request by one, a MoE or A2E handle, a sender
 * or a receiver of KV pages by one at a time.
 *
 * Generated from xccl-sys/src by cbindgen: XCCL_UPDATE_HEADER=1 cargo test -p xccl-sys --test header
 */

#ifndef XCCL_H
#define XCCL_H

#include <stddef.h>
#include <stdint.h>

/** What a configuration starts from: all options from the environment, or their defaults. */
#define XCCL_CONFIG_INITIALIZER { sizeof(xcclConfig_t), XCCL_VERSION, XCCL_UNDEFINED, XCCL_UNDEFINED, XCCL_UNDEFINED, \
                                  XCCL_UNDEFINED, XCCL_UNDEFINED, XCCL_UNDEFINED, XCCL_UNDEFINED, XCCL_UNDEFINED, \
                                  XCCL_UNDEFINED }

/** What statistics start from. */
#define XCCL_STATISTICS_INITIALIZER { sizeof(xcclStatistics_t), 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0 }

/** What the shape of a MoE handle starts from: experts in blocks, room for the worst case, rows as they are. */
#define XCCL_MOE_CONFIG_INITIALIZER { sizeof(xcclMoeConfig_t), 0, 0, 0, 0, 0, 0, NULL, 0, NULL, 0, 0, NULL, 0, 0, 0, 0, NULL, NULL, NULL }

/** What the tokens of an exchange start from: ids are int32_t, all tokens go. */
#define XCCL_MOE_INPUT_INITIALIZER { sizeof(xcclMoeInput_t), NULL, 0, NULL, NULL, NULL, 2 /* xcclInt32 */ }

/** What a batch starts from. */
#define XCCL_MOE_BATCH_INITIALIZER { sizeof(xcclMoeBatch_t), 0, 0, NULL, NULL, NULL, NULL, 0, 0, 0, 0, 0, NULL }

/** What a batch for kernels starts from. */
#define XCCL_DEVICE_BATCH_INITIALIZER { sizeof(xcclDeviceBatch_t), NULL, NULL, NULL, 0, 0, 0, 0, 0, 0 }

/** What an epilogue starts from: nothing is added, no norm. */
#define XCCL_MOE_EPILOGUE_INITIALIZER { sizeof(xcclMoeEpilogue_t), NULL, NULL, NULL, NULL, 0, NULL }

/** What the shape of KV transfer starts from. */
#define XCCL_KV_CONFIG_INITIALIZER { sizeof(xcclKvConfig_t), 0, 0, 0, 0 }

/** What a group of attention and expert ranks starts from. */
#define XCCL_A2E_CONFIG_INITIALIZER { sizeof(xcclA2EConfig_t), NULL, NULL, 0, 0 }

/** What a micro-batch starts from. */
#define XCCL_A2E_BATCH_INITIALIZER { sizeof(xcclA2EBatch_t), 0, 0, 0, NULL, NULL, NULL, NULL, 0, 0, 0, 0, 0 }

/** What an event of KV transfer starts from. */
#define XCCL_KV_EVENT_INITIALIZER { sizeof(xcclKvEvent_t), 0, 0, 0, 0, 0, 0, 0 }

/** For the outputs of xcclMoeCombineSend: they were written to the rows' outputs. */
#define XCCL_IN_PLACE ((const void *)1)

/** For the outputs of xcclMoeCombineSend: the sums were written where xcclMoeSums says. */
#define XCCL_SUMMED ((const void *)3)

/**
 * The value of an option that the environment, or else its default, is to set.
 */
#define XCCL_UNDEFINED -1

/**
 * This header's version: major * 10000 + minor * 100 + patch. xcclGetVersion gives the library's.
 */
#define XCCL_VERSION 100

/**
 * The color of a rank that is in none of the communicators of an xcclCommSplit.
 */
#define XCCL_SPLIT_NOCOLOR -1

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
typedef enum {
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
   * A call at the wrong time, or a handle that another thread is using; a collective that ranks call with different arguments.
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
  /**
   * The network between nodes: its library is missing, no provider of it will do, or one has failed.
   */
  xcclNetworkError = 16,
} xcclResult_t;

/**
 * Types of elements. The numbers are fixed, and NCCL's.
 */
typedef enum {
  /**
   * Unsigned integer, 1 byte, or any byte: for collectives.
   */
  xcclUint8 = 1,
  /**
   * Signed integer, 4 bytes: for expert ids and collectives.
   */
  xcclInt32 = 2,
  /**
   * Signed integer, 8 bytes: for expert ids and collectives.
   */
  xcclInt64 = 4,
  /**
   * IEEE 754 half precision, 2 bytes: for rows and collectives.
   */
  xcclFloat16 = 6,
  /**
   * IEEE 754 single precision, 4 bytes: for rows and collectives.
   */
  xcclFloat32 = 7,
  /**
   * bfloat16, 2 bytes: for rows and collectives.
   */
  xcclBfloat16 = 9,
} xcclDataType_t;

/**
 * How elements of several ranks become one: in ascending order of rank, so that every rank gets the same bits. f16 and bf16 are
 * *  joined in f32 and rounded once. The numbers are fixed, and NCCL's.
 */
typedef enum {
  /**
   * The sum; integers wrap around.
   */
  xcclSum = 0,
  /**
   * The largest; NaN if one is NaN.
   */
  xcclMax = 2,
  /**
   * The smallest; NaN if one is NaN.
   */
  xcclMin = 3,
  /**
   * The sum divided by the number of ranks; integers are rounded toward zero.
   */
  xcclAvg = 4,
} xcclRedOp_t;

/**
 * Where the weighted sum over a token's experts is formed. The numbers are fixed.
 */
typedef enum {
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
 * How counts are written. The numbers are fixed.
 */
typedef enum {
  /**
   * One by one.
   */
  xcclCountsEach = 0,
  /**
   * Each with all before it.
   */
  xcclCountsPrefixSums = 1,
} xcclCounts_t;

/**
 * Where shared segments come from. The numbers are fixed.
 */
typedef enum {
  /**
   * memfd_create: no name anywhere, sealed against writing by peers.
   */
  xcclMemfd = 0,
  /**
   * shm_open: counted against /dev/shm, reserved at start.
   */
  xcclPosix = 1,
} xcclMemory_t;

/**
 * Which instruction set the loops use that touch every element. All give the same bits. The numbers are fixed.
 */
typedef enum {
  /**
   * The best that this processor has.
   */
  xcclKernelsAuto = 0,
  /**
   * Plain loops, for any processor.
   */
  xcclKernelsScalar = 1,
  /**
   * x86-64 with AVX2 and F16C.
   */
  xcclKernelsAvx2 = 2,
  /**
   * x86-64 with AVX-512 F, BW and VL.
   */
  xcclKernelsAvx512 = 3,
  /**
   * The same with AVX-512 DQ, and the conversion to bf16 of AVX-512 BF16.
   */
  xcclKernelsAvx512Bf16 = 4,
  /**
   * AArch64.
   */
  xcclKernelsNeon = 5,
} xcclKernels_t;

/**
 * How token rows travel in a dispatch; outputs keep the element type. The numbers are fixed.
 */
typedef enum {
  /**
   * The elements as they are, without scales.
   */
  xcclWireNative = 0,
  /**
   * int8_t with one scale per row: the row's largest magnitude / 127. A row with NaN or an infinity has scale NaN.
   */
  xcclWireInt8 = 1,
  /**
   * OCP FP8 E4M3 with one scale per 128 channels: their largest magnitude / 448. NaN and infinities become NaN.
   */
  xcclWireFp8E4m3 = 2,
  /**
   * OCP FP8 E5M2 with one scale per 128 channels: their largest magnitude / 57344.
   */
  xcclWireFp8E5m2 = 3,
} xcclWireFormat_t;

/**
 * How the scales of several rows lie beside each other. The numbers are fixed.
 */
typedef enum {
  /**
   * [rows, scales per row].
   */
  xcclScaleRowMajor = 0,
  /**
   * [scales per row, rows padded to a multiple of 4], as block-scaled GEMMs load them.
   */
  xcclScaleColumnMajor = 1,
} xcclScaleLayout_t;

/**
 * How a signal changes its word. The numbers are fixed.
 */
typedef enum {
  /**
   * The word becomes the value.
   */
  xcclUpdateSet = 0,
  /**
   * The value is added to the word; past the largest number it goes on from 0.
   */
  xcclUpdateAdd = 1,
} xcclUpdate_t;

/**
 * What a word is compared with a value for, as unsigned numbers. The numbers are fixed.
 */
typedef enum {
  /**
   * Equal.
   */
  xcclUntilEq = 0,
  /**
   * Different.
   */
  xcclUntilNe = 1,
  /**
   * Greater.
   */
  xcclUntilGt = 2,
  /**
   * Greater or equal.
   */
  xcclUntilGe = 3,
  /**
   * Less.
   */
  xcclUntilLt = 4,
  /**
   * Less or equal.
   */
  xcclUntilLe = 5,
} xcclUntil_t;

/**
 * What has happened to a request. The numbers are fixed.
 */
typedef enum {
  /**
   * Nothing that was not told yet.
   */
  xcclKvNothing = 0,
  /**
   * To a sender: a receiver waits for these pages.
   */
  xcclKvPosted = 1,
  /**
   * To a receiver: all pages have come; the request is over.
   */
  xcclKvDone = 2,
  /**
   * One of the two ranks has cancelled it; the request is over.
   */
  xcclKvCancelled = 3,
  /**
   * The other rank has died, left or misbehaved; the request is over.
   */
  xcclKvFailed = 4,
  /**
   * To a sender: a receiver will post nothing any more; no request.
   */
  xcclKvGone = 5,
} xcclKvEventKind_t;

/**
 * Who reads what of whom, beside the rows. The numbers are fixed.
 */
typedef enum {
  /**
   * By trampolines in a domain of many attention ranks, on nodes with many expert ranks.
   */
  xcclForwardAuto = 0,
  /**
   * Each expert rank the lists of each attention rank, and the other way round.
   */
  xcclForwardFlat = 1,
  /**
   * A few expert ranks of each node gather them for the others.
   */
  xcclForwardTrampoline = 2,
} xcclForward_t;

/**
 * Why an expert rank's loop has ended. The numbers are fixed.
 */
typedef enum {
  /**
   * It goes on: this is a micro-batch.
   */
  xcclA2EGoesOn = 0,
  /**
   * All attention ranks are done.
   */
  xcclA2EDone = 1,
  /**
   * An attention rank has shut the group down.
   */
  xcclA2EWasShutDown = 2,
  /**
   * A rank has aborted the communicator.
   */
  xcclA2EAborted = 3,
} xcclA2EEnd_t;

/**
 * What a handle points to.
 */
typedef struct xcclA2E xcclA2E;

/**
 * What a communicator handle points to.
 */
typedef struct xcclComm xcclComm;

/**
 * What a receiver's handle points to.
 */
typedef struct xcclKvReceiver xcclKvReceiver;

/**
 * What a sender's handle points to.
 */
typedef struct xcclKvSender xcclKvSender;

/**
 * What a MoE handle points to.
 */
typedef struct xcclMoe xcclMoe;

/**
 * Names a communicator that is about to be built, and holds its secret. Good for one communicator. One rank makes it
 * (xcclGetUniqueId) and hands the bytes to the others by any means it likes.
 */
typedef struct {
  /**
   * The bytes.
   */
  char internal[XCCL_UNIQUE_ID_BYTES];
} xcclUniqueId;

/**
 * A group of ranks. Made by xcclCommInitRank or xcclCommInitFromEnv, owned by the caller, given back to xcclCommDestroy.
 * Several threads may use it at once; calls that all ranks make together must come in the same order everywhere.
 */
typedef xcclComm *xcclComm_t;

/**
 * Options of a communicator. Set it to XCCL_CONFIG_INITIALIZER, then what is to be different. Each option that is
 * XCCL_UNDEFINED comes from its environment variable, or has its default.
 */
typedef struct {
  /**
   * sizeof(xcclConfig_t).
   */
  size_t size;
  /**
   * XCCL_VERSION.
   */
  int64_t version;
  /**
   * Deadline of every blocking call in milliseconds; 0 waits for ever. XCCL_TIMEOUT, 60000.
   */
  int64_t timeout_ms;
  /**
   * Bytes of each rank's symmetric heap. XCCL_HEAP, 16 MiB.
   */
  int64_t heap_bytes;
  /**
   * Payload bytes of the ring from each rank to each other one. XCCL_P2P_RING, 128 KiB.
   */
  int64_t p2p_ring_bytes;
  /**
   * Messages of at least this many bytes are copied once, where possible. XCCL_RENDEZVOUS, 32 KiB.
   */
  int64_t rendezvous_bytes;
  /**
   * Most bytes kept for receives that have not been posted yet. XCCL_UNEXPECTED_BYTES, 256 MiB.
   */
  int64_t unexpected_bytes;
  /**
   * An xcclMemory_t. XCCL_MEMORY, xcclMemfd.
   */
  int64_t memory;
  /**
   * 1 to ask for huge pages, 0 not to. XCCL_HUGE_PAGES, 1.
   */
  int64_t huge_pages;
  /**
   * 1 to read a sender's private memory where the kernel permits it, 0 not to. XCCL_CMA, 1.
   */
  int64_t cma;
  /**
   * An xcclKernels_t. XCCL_KERNELS, xcclKernelsAuto.
   */
  int64_t kernels;
} xcclConfig_t;

/**
 * What this rank has done in a communicator so far. Set it to XCCL_STATISTICS_INITIALIZER.
 */
typedef struct {
  /**
   * sizeof(xcclStatistics_t).
   */
  size_t size;
  /**
   * Messages sent.
   */
  uint64_t messages_sent;
  /**
   * Bytes in them.
   */
  uint64_t bytes_sent;
  /**
   * Messages received.
   */
  uint64_t messages_received;
  /**
   * Bytes in them.
   */
  uint64_t bytes_received;
  /**
   * Messages of these that the receiver copied straight from the sender's memory.
   */
  uint64_t rendezvous;
  /**
   * MoE exchanges completed.
   */
  uint64_t exchanges;
  /**
   * Tokens dispatched.
   */
  uint64_t tokens;
  /**
   * Waits that were not satisfied at once.
   */
  uint64_t waits;
  /**
   * Microseconds spent in them.
   */
  uint64_t waited_us;
  /**
   * Waits among them that went on to give the core away (sched_yield) before they ended.
   */
  uint64_t waits_yielded;
  /**
   * Waits among them that went to sleep.
   */
  uint64_t waits_slept;
  /**
   * Sleeping ranks that this one has woken.
   */
  uint64_t wake_ups;
} xcclStatistics_t;

/**
 * An operation that a rank remembers.
 */
typedef struct {
  /**
   * Counts the operations of a rank.
   */
  uint64_t number;
  /**
   * The epoch, the number of the collective, or the tag of messages.
   */
  uint64_t epoch;
  /**
   * Nanoseconds since it began; of calls, to the kernel's tick (4 ms).
   */
  uint64_t began_ns_ago;
  /**
   * Nanoseconds that it took; UINT64_MAX while it is not over.
   */
  uint64_t took_ns;
  /**
   * The rank that was waited for; -1 for any, and for calls.
   */
  int32_t peer;
  /**
   * 1 for a wait that went to sleep, 0 for a call.
   */
  int32_t is_wait;
  /**
   * 1 if it ended with an error.
   */
  int32_t failed;
  /**
   * 0.
   */
  int32_t reserved;
  /**
   * Its name, for example "dispatch_recv"; ends with a zero.
   */
  char operation[32];
} xcclHistoryRecord_t;

/**
 * What was received.
 */
typedef struct {
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
 * A message or a collective on its way: made by xcclIsend, xcclIrecv, xcclIAllReduce and the like, over when xcclWait or
 * xcclTest says so, or with xcclRequestFree.
 * A number, never used again, so that a request that is over is recognised.
 */
typedef uint64_t xcclRequest_t;

/**
 * A piece of a rank's shared memory, by numbers that mean the same on every rank: it may be sent in a message. Made by
 * xcclSharedRemote on the rank that has the memory. Pieces of it are made by arithmetic; what they name is checked when they are
 * used.
 */
typedef struct {
  /**
   * The rank.
   */
  uint64_t rank;
  /**
   * Where it begins, in bytes from the beginning of the rank's heap.
   */
  uint64_t offset;
  /**
   * Its bytes.
   */
  uint64_t bytes;
} xcclRemote_t;

/**
 * A rank's part in KV transfer: it sends pages. Made by xcclKvSenderCreate, owned by the caller, given back to
 * xcclKvSenderDestroy. One thread at a time may use it, not always the same.
 */
typedef xcclKvSender *xcclKvSender_t;

/**
 * The shape of what is moved. Equal on all ranks. Set it to XCCL_KV_CONFIG_INITIALIZER, then its fields.
 */
typedef struct {
  /**
   * sizeof(xcclKvConfig_t).
   */
  size_t size;
  /**
   * Layers of the model. Where keys and values of a layer lie in two tensors, count each as a layer.
   */
  size_t layers;
  /**
   * Bytes of a page of one layer.
   */
  size_t page_bytes;
  /**
   * Most pages of one request; 0: 1024.
   */
  size_t max_pages;
  /**
   * Most requests in flight from one sender to one receiver, at most 256; 0: 16.
   */
  size_t max_requests;
} xcclKvConfig_t;

/**
 * Where the pages of a pool lie: page p of layer l begins l * layer_stride + p * page_stride bytes behind its beginning. May
 * differ between ranks.
 */
typedef struct {
  /**
   * Pages of each layer.
   */
  size_t pages;
  /**
   * Bytes from a page to the same page of the next layer.
   */
  size_t layer_stride;
  /**
   * Bytes from a page to the next one of its layer.
   */
  size_t page_stride;
} xcclPageLayout_t;

/**
 * A request in flight. A number, never used again by its handle, so that a request that is over is recognised.
 */
typedef uint64_t xcclKvTicket_t;

/**
 * What has happened. Set it to XCCL_KV_EVENT_INITIALIZER.
 */
typedef struct {
  /**
   * sizeof(xcclKvEvent_t).
   */
  size_t size;
  /**
   * The request.
   */
  xcclKvTicket_t ticket;
  /**
   * Its id.
   */
  uint64_t id;
  /**
   * Number of its pages (xcclKvPosted).
   */
  size_t pages;
  /**
   * Bytes of the last page that are wanted (xcclKvPosted).
   */
  size_t last_page_bytes;
  /**
   * An xcclKvEventKind_t.
   */
  uint32_t kind;
  /**
   * The other rank.
   */
  int peer;
  /**
   * An xcclResult_t: why it failed or has gone, otherwise xcclSuccess.
   */
  uint32_t result;
} xcclKvEvent_t;

/**
 * A page to be copied.
 */
typedef struct {
  /**
   * The sender's page.
   */
  uint32_t source;
  /**
   * The receiver's page.
   */
  uint32_t destination;
} xcclPagePair_t;

/**
 * A rank's part in KV transfer: it receives pages. Made by xcclKvReceiverCreate, owned by the caller, given back to
 * xcclKvReceiverDestroy. One thread at a time may use it, not always the same.
 */
typedef xcclKvReceiver *xcclKvReceiver_t;

/**
 * A handle for the exchanges of one MoE shape over one communicator. Made by xcclMoeCreate, owned by the caller, given back
 * to xcclMoeDestroy. One thread at a time may use it, not always the same. Two exchanges may be under way.
 */
typedef xcclMoe *xcclMoe_t;

/**
 * The shape of a MoE handle's exchanges. Equal on all ranks. Set it to XCCL_MOE_CONFIG_INITIALIZER, then its fields.
 */
typedef struct {
  /**
   * sizeof(xcclMoeConfig_t).
   */
  size_t size;
  /**
   * Most tokens of one rank in one exchange, 1 to 1048576.
   */
  size_t max_tokens;
  /**
   * Elements of a token row, 1 to 1048576.
   */
  size_t hidden;
  /**
   * Experts that a token may name, 1 to 64 (less with shared experts), and at most as many as there are.
   */
  size_t topk;
  /**
   * Routed experts over all ranks, 1 to 65536, however many replicas they have.
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
  /**
   * [experts], the rank that holds each expert, read during xcclMoeCreate; null: rank r holds a contiguous block,
   * experts / nranks of them, the first experts % nranks ranks one more.
   */
  const int32_t *placement;
  /**
   * Most rows that may arrive for one rank's experts in one exchange; 0 makes room for the worst case. Memory is used as
   * it is touched.
   */
  size_t max_expert_rows;
  /**
   * [experts, hidden], shared ones last, read during xcclMoeCreate: what a row for each expert is multiplied by before it is quantized, with
   * xcclWireInt8 only; a row is then written for each choice. Null: nothing.
   */
  const float *smooth;
  /**
   * An xcclWireFormat_t: how token rows travel.
   */
  uint32_t wire;
  /**
   * Most slots of a rank, in this and later placements (xcclMoeInstall); 0: no more than the first one has.
   */
  size_t slots;
  /**
   * [nranks, slots], read during xcclMoeCreate, in place of placement: the logical expert in each slot of each rank, -1 after
   * a rank's last; an expert in several slots has replicas, which its tokens rotate over. The shared expert s is experts + s.
   * Null: see placement; then every rank has a replica of each shared expert.
   */
  const int32_t *slot_experts;
  /**
   * Experts that every token goes to, without naming them, with the factor 1.
   */
  size_t shared_experts;
  /**
   * Experts that need no slot, whose ids begin at experts: zero experts give nothing, copy experts the token, constant ones
   * token factor * token + vector factor * vector.
   */
  size_t zero_experts;
  /**
   * See zero_experts. Where rows travel encoded, combine needs the tokens for them (xcclMoeEpilogue_t).
   */
  size_t copy_experts;
  /**
   * See zero_experts.
   */
  size_t constant_experts;
  /**
   * [constant_experts, hidden], read during xcclMoeCreate, rounded to the element type.
   */
  const float *constant_vectors;
  /**
   * [constant_experts], read during xcclMoeCreate; null: 0, the token has no part in it.
   */
  const float *constant_token_factors;
  /**
   * [constant_experts], read during xcclMoeCreate; null: 1.
   */
  const float *constant_vector_factors;
} xcclMoeConfig_t;

/**
 * Names an exchange of a MoE handle: its number, from 1, the same on all ranks.
 */
typedef uint64_t xcclExchange_t;

/**
 * One row that an expert of this rank is to work on. The struct is fixed: kernels walk arrays of it (xccl_device.h).
 */
typedef struct {
  /**
   * The token in its sender's memory, aligned to 64 bytes: hidden elements, or hidden codes of the handle's wire format. For
   * reading only: a store to another rank's memory is a fault.
   */
  const void *token_data;
  /**
   * The codes' scales, as many as the wire format has for a row, for reading only; null with xcclWireNative.
   */
  const float *scales;
  /**
   * Where the expert's output goes, hidden elements in this rank's memory, aligned to 64 bytes.
   */
  void *output;
  /**
   * The slot: an index among this rank's experts.
   */
  uint32_t expert;
  /**
   * The rank that sent it.
   */
  uint32_t source;
  /**
   * The token's index there.
   */
  uint32_t token;
  /**
   * The expert's factor in the token's sum.
   */
  float weight;
} xcclMoeRow_t;

/**
 * A batch as kernels see it: see xccl_device.h, whose inline functions read it. Set it to XCCL_DEVICE_BATCH_INITIALIZER. What
 * it points to is good until the exchange's xcclMoeCombineSend or xcclMoeGiveUp.
 */
typedef struct {
  /**
   * sizeof(xcclDeviceBatch_t).
   */
  size_t size;
  /**
   * [num_rows].
   */
  const xcclMoeRow_t *rows;
  /**
   * [local_experts + 1], expert e has the rows offsets[e] to offsets[e + 1] - 1.
   */
  const uint32_t *offsets;
  /**
   * Rows whose outputs are written; in this rank's outbox, alone on its cache line.
   */
  uint64_t *rows_done;
  /**
   * Rows: by local expert, then by the rank they come from, then by token.
   */
  uint64_t num_rows;
  /**
   * Experts of this rank.
   */
  uint64_t local_experts;
  /**
   * Elements of a row.
   */
  uint64_t hidden;
  /**
   * Bytes from one output row to the next: hidden elements, rounded up to 64 bytes.
   */
  uint64_t row_bytes;
  /**
   * An xcclDataType_t: the element type of the rows.
   */
  uint32_t dtype;
  /**
   * An xcclWireFormat_t: how the token rows lie in their senders' memory.
   */
  uint32_t wire;
} xcclDeviceBatch_t;

/**
 * The tokens of one exchange. Set it to XCCL_MOE_INPUT_INITIALIZER, then its fields. It may be used again, also with other
 * tokens: a routing serves as many exchanges as you like.
 */
typedef struct {
  /**
   * sizeof(xcclMoeInput_t).
   */
  size_t size;
  /**
   * [num_tokens, hidden], elements of the handle's type, aligned to the element; copied once. Null: they lie in the rows
   * that xcclMoeInputRows gave.
   */
  const void *tokens;
  /**
   * 0 to max_tokens, may differ on every rank.
   */
  size_t num_tokens;
  /**
   * [num_tokens, topk], ids of experts, different within a token, or -1 for none.
   */
  const void *topk_ids;
  /**
   * [num_tokens, topk], the factors that the combine applies.
   */
  const float *topk_weights;
  /**
   * [num_tokens], 0 for tokens that go nowhere (their sums are zeros); null when all go.
   */
  const uint8_t *active;
  /**
   * xcclInt32 or xcclInt64: the type of topk_ids.
   */
  uint32_t ids_type;
} xcclMoeInput_t;

/**
 * What arrived for this rank's experts in one exchange. Set it to XCCL_MOE_BATCH_INITIALIZER. What it points to belongs to the
 * handle and is good until the exchange's xcclMoeCombineSend or xcclMoeGiveUp.
 */
typedef struct {
  /**
   * sizeof(xcclMoeBatch_t).
   */
  size_t size;
  /**
   * Rows: by local expert, then by the rank they come from, then by token.
   */
  size_t num_rows;
  /**
   * Experts of this rank.
   */
  size_t local_experts;
  /**
   * [local_experts], rows of each.
   */
  const uint32_t *counts;
  /**
   * [local_experts + 1], expert e has the rows offsets[e] to offsets[e + 1] - 1.
   */
  const uint32_t *offsets;
  /**
   * [num_rows].
   */
  const xcclMoeRow_t *rows;
  /**
   * [num_rows, row_bytes], the outputs of all rows in their order, as one matrix: what rows[i].output points into. Null when
   * the exchange was received source by source, since the outputs then lie in the order of arrival.
   */
  void *outputs;
  /**
   * Bytes from one output row to the next: hidden elements, rounded up to 64 bytes.
   */
  size_t row_bytes;
  /**
   * Elements of a row.
   */
  size_t hidden;
  /**
   * An xcclDataType_t: the element type of the rows.
   */
  uint32_t dtype;
  /**
   * An xcclWireFormat_t: how the token rows lie in their senders' memory.
   */
  uint32_t wire;
  /**
   * Scales of one token row.
   */
  size_t row_scales;
  /**
   * [local_experts], the logical expert in each slot; from the number of routed experts on they are shared ones.
   */
  const size_t *experts;
} xcclMoeBatch_t;

/**
 * The sum that one token of one source gets from this rank.
 */
typedef struct {
  /**
   * Where it goes, hidden elements in this rank's memory, aligned to 64 bytes.
   */
  void *output;
  /**
   * [num_rows], the rows of the batch that belong to it, ascending.
   */
  const uint32_t *rows;
  /**
   * How many these are, at least 1.
   */
  uint32_t num_rows;
  /**
   * The rank that sent the token.
   */
  uint32_t source;
  /**
   * The token's index there.
   */
  uint32_t token;
  /**
   * 0.
   */
  uint32_t reserved;
} xcclMoeSum_t;

/**
 * What xcclMoeCombineRecvWith does with the sum s[t] of each token, over k from 0 on in f32:
 *
 * - out[t] = round(s[t] + bias + residual[t]), added in this order in f32 and rounded once;
 * - normed[t] = round((out[t] * r) * norm_weight), r = 1 / sqrt(sum of out[t][i]^2 / hidden + eps), in f32 without fused
 *   multiplications. The norm is that of the rounded out[t], so a pass of its own over out gives the same bits. The squares are
 *   summed in a fixed order: 64 sums, the i-th of the elements i, i + 64, ..., of which the upper half is added to the lower one
 *   until one is left; the result is the same on every processor.
 *
 * Set it to XCCL_MOE_EPILOGUE_INITIALIZER, then its fields. Elements are of the handle's type.
 */
typedef struct {
  /**
   * sizeof(xcclMoeEpilogue_t).
   */
  size_t size;
  /**
   * [hidden]; null: none.
   */
  const void *bias;
  /**
   * [num_tokens, hidden], or the same memory as out, which the sums are then added to; null: none.
   */
  const void *residual;
  /**
   * [hidden]; null: no norm.
   */
  const void *norm_weight;
  /**
   * [num_tokens, hidden], where the normed rows go; not looked at without norm_weight.
   */
  void *normed;
  /**
   * Added to the mean of the squares: finite, 0 or more.
   */
  float eps;
  /**
   * [num_tokens, hidden], the tokens, which copy and constant experts are worked out from: needed for those where rows travel
   * encoded. Null: they are taken from the outbox.
   */
  const void *tokens;
} xcclMoeEpilogue_t;

/**
 * One lane's part of a call: call it with the state that xcclRunLanes_t was given and the number of the lane.
 */
typedef void (*xcclLaneWork_t)(void *state, size_t lane);

/**
 * Lends threads: calls work(state, i) for each i in 0 to lanes - 1, on any threads, and returns when all of these calls have.
 * Calls that are left out, or come twice or late, cost time and nothing else. What is shared takes some ten microseconds or
 * more, so threads should spin for their work, not sleep. It must not use the MoE handle, nor throw.
 */
typedef void (*xcclRunLanes_t)(void *context, size_t lanes, xcclLaneWork_t work, void *state);

/**
 * A handle of a group in which some ranks hold attention and others hold experts. Made by xcclA2ECreate, owned by the caller, given
 * back to xcclA2EDestroy. One thread at a time may use it, not always the same.
 */
typedef xcclA2E *xcclA2E_t;

/**
 * Who holds attention and who holds experts. Equal on all ranks. Set it to XCCL_A2E_CONFIG_INITIALIZER, then its fields.
 */
typedef struct {
  /**
   * sizeof(xcclA2EConfig_t).
   */
  size_t size;
  /**
   * [nranks], read during xcclA2ECreate: the domain of a rank that holds attention, counted from 0 without gaps, or -1 for one that
   * holds experts. The ranks of a domain send their micro-batches together.
   */
  const int32_t *roles;
  /**
   * The shape of the exchanges, read during xcclA2ECreate. Its placement names ranks that hold experts; null: these share the
   * experts evenly. Its max_expert_rows counts what comes from one domain.
   */
  const xcclMoeConfig_t *moe;
  /**
   * How many expert ranks of each node gather for the others, if any do; 0: the square root of a domain's attention ranks.
   */
  size_t trampolines;
  /**
   * An xcclForward_t.
   */
  uint32_t forward;
} xcclA2EConfig_t;

/**
 * A micro-batch of one domain: what arrived for this rank's experts. Set it to XCCL_A2E_BATCH_INITIALIZER. What it points to belongs to
 * the handle and is good until the micro-batch's xcclE2ASend.
 */
typedef struct {
  /**
   * sizeof(xcclA2EBatch_t).
   */
  size_t size;
  /**
   * The micro-batch's number in its domain, from 1.
   */
  xcclExchange_t exchange;
  /**
   * Rows: by local expert, then by the rank they come from, then by token.
   */
  size_t num_rows;
  /**
   * Experts of this rank.
   */
  size_t local_experts;
  /**
   * [local_experts], rows of each.
   */
  const uint32_t *counts;
  /**
   * [local_experts + 1], expert e has the rows offsets[e] to offsets[e + 1] - 1.
   */
  const uint32_t *offsets;
  /**
   * [num_rows].
   */
  const xcclMoeRow_t *rows;
  /**
   * [num_rows, row_bytes], the outputs of all rows in their order: what rows[i].output points into.
   */
  void *outputs;
  /**
   * Bytes from one output row to the next.
   */
  size_t row_bytes;
  /**
   * An xcclA2EEnd_t: when it is not xcclA2EGoesOn the loop is over and there is no micro-batch.
   */
  uint32_t end;
  /**
   * The domain.
   */
  uint32_t domain;
  /**
   * An xcclDataType_t: the element type of the rows.
   */
  uint32_t dtype;
  /**
   * An xcclWireFormat_t: how the token rows lie in their senders' memory.
   */
  uint32_t wire;
} xcclA2EBatch_t;

/**
 * No request.
 */
#define XCCL_REQUEST_NULL 0

/**
 * No request.
 */
#define XCCL_KV_TICKET_NULL 0

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

/* ---- Results --------------------------------------------------------------------------------------------------- */

/**
 * A short text for a result, for example "invalid argument". It lives for ever; "unknown result" for other numbers.
 * xcclGetLastError says what was wrong in particular. Does not block.
 */
const char *xcclGetErrorString(int result);

/**
 * The text of the last call of this thread that failed: the call, the value that was wrong and what to do. An empty string
 * when none has failed. It belongs to the library and lives until the next failing call of this thread. Does not block.
 */
const char *xcclGetLastError(void);

/* ---- Communicators --------------------------------------------------------------------------------------------- */

/**
 * Writes the library's version to *version: major * 10000 + minor * 100 + patch. Does not block.
 */
xcclResult_t xcclGetVersion(int *version);

/**
 * Makes a new id in *id. Call it on one rank and hand the bytes to the others. Does not block.
 */
xcclResult_t xcclGetUniqueId(xcclUniqueId *id);

/**
 * Makes a new id in *id for ranks on any hosts, whose rank 0 waits for the others at `address`: one of its own host's and a
 * port, such as "10.0.0.1:29500" or "[2001:db8::1]:29500"; no names. With port 0 a free one is taken at once, and the process
 * that makes the id must be the one that joins as rank 0. Call it on one rank and hand the bytes to the others. Does not
 * block.
 */
xcclResult_t xcclGetUniqueIdAt(xcclUniqueId *id,
                               const char *address);

/**
 * Joins the communicator of the nranks ranks that share id, as rank `rank` (0 to nranks - 1), and writes its handle to
 * *comm; *comm is left as it is on failure. Options come from the XCCL_... environment variables. Blocks until all ranks
 * have joined or the deadline has passed (xcclJoinFailed names the rank that is missing, claimed twice, or differs).
 */
xcclResult_t xcclCommInitRank(xcclComm_t *comm,
                              int nranks,
                              xcclUniqueId id,
                              int rank);

/**
 * As xcclCommInitRank, with options of the application's: those of *config that are not XCCL_UNDEFINED win over the
 * environment. config may be null. Every rank must give the same. Blocks as xcclCommInitRank does.
 */
xcclResult_t xcclCommInitRankConfig(xcclComm_t *comm,
                                    int nranks,
                                    xcclUniqueId id,
                                    int rank,
                                    const xcclConfig_t *config);

/**
 * Joins the communicator of all ranks that a launcher has started (xccl run, torchrun, mpirun, srun, or XCCL_RANK,
 * XCCL_WORLD_SIZE and XCCL_JOB set by hand) and writes its handle to *comm; *comm is left as it is on failure. The n-th
 * call of this process meets the other ranks' n-th. config may be null, or gives options as for xcclCommInitRankConfig.
 * Blocks as xcclCommInitRank does; xcclNotLaunched without a launcher.
 */
xcclResult_t xcclCommInitFromEnv(xcclComm_t *comm, const xcclConfig_t *config);

/**
 * Divides the ranks of comm by color (0 or more): in each new communicator they are ordered by key, then by rank in comm. A
 * rank that passes XCCL_SPLIT_NOCOLOR takes part and gets null. Every rank must call it. Options are comm's. Blocks until
 * all have called it, up to the deadline. The new communicator is independent of comm and destroyed on its own.
 */
xcclResult_t xcclCommSplit(xcclComm_t comm,
                           int color,
                           int key,
                           xcclComm_t *newcomm);

/**
 * Makes another communicator of the same ranks, whose messages and exchanges never meet comm's, and writes its handle to
 * *newcomm. Every rank must call it. Options are comm's. Blocks until all have called it, up to the deadline. The new
 * communicator is independent of comm and destroyed on its own.
 */
xcclResult_t xcclCommDuplicate(xcclComm_t comm,
                               xcclComm_t *newcomm);

/**
 * Leaves the communicator and gives the handle up: any further use of it is xcclInvalidArgument. Does not block; ranks may
 * leave in any order, and what this rank has sent can still be received. Its requests are cancelled and its memory
 * (xcclMemAlloc) is freed; MoE handles made from it stay good.
 * xcclInvalidUsage while another thread is in a call with it: the handle is then still good.
 */
xcclResult_t xcclCommDestroy(xcclComm_t comm);

/**
 * Ends every pending and later wait of every rank with xcclAborted. Does not block and may be called while another thread
 * is in a call. The handle is still to be destroyed.
 */
xcclResult_t xcclCommAbort(xcclComm_t comm);

/**
 * As xcclCommAbort, with a number and a reason that every rank finds in the text of its error: up to 112 bytes of it. why may be
 * null. Does not block.
 */
xcclResult_t xcclCommAbortWith(xcclComm_t comm,
                               int code,
                               const char *why);

/**
 * Makes a communicator of the ranks that are left after others have died or left, in the order of their ranks in comm, and writes
 * its handle to *newcomm; *newcomm is left as it is on failure. Ends comm as xcclCommAbort does. Every rank that lives must call it,
 * and all get the same members, although ranks die meanwhile, rank 0 too. Blocks until all that live have called it, up to the
 * deadline (xcclTimeout, and xcclRemoteError where another rank has met its own). comm is still to be destroyed.
 */
xcclResult_t xcclCommShrink(xcclComm_t comm,
                            xcclComm_t *newcomm);

/**
 * As xcclCommShrink, to run an iteration again: `finished` is the last one that this rank has finished, in numbers of the
 * application's, and *agreed becomes the smallest of all. What was under way in comm is forgotten, and cannot be met in *newcomm.
 * Ranks that wait are told to call it too by xcclAborted, whose text says that comm rolls back. Blocks as xcclCommShrink does.
 */
xcclResult_t xcclCommRollback(xcclComm_t comm,
                              uint64_t finished,
                              xcclComm_t *newcomm,
                              uint64_t *agreed);

/**
 * Makes an id on rank 0 and writes it to *id on every rank, for a communicator of comm's ranks and others to come, to whom the
 * application hands it: then comm's ranks call xcclCommInitRank with their ranks and the new nranks, the others with the ranks from
 * there on. Every rank must call it. Blocks until all have called it, up to the deadline.
 */
xcclResult_t xcclCommGetNewId(xcclComm_t comm,
                              xcclUniqueId *id);

/**
 * Writes to *former the rank that `rank` had in the communicator that comm was made from by xcclCommShrink or xcclCommRollback; rank
 * itself in any other. Does not block.
 */
xcclResult_t xcclCommFormerRank(xcclComm_t comm,
                                int rank,
                                int *former);

/**
 * Writes this process's rank, 0 to nranks - 1, to *rank. Does not block.
 */
xcclResult_t xcclCommUserRank(xcclComm_t comm, int *rank);

/**
 * Writes the number of ranks to *count. Does not block.
 */
xcclResult_t xcclCommCount(xcclComm_t comm, int *count);

/**
 * Returns once every rank has called it. Blocks, up to the deadline.
 */
xcclResult_t xcclBarrier(xcclComm_t comm);

/* ---- Memory on the symmetric heap, and statistics -------------------------------------------------------------- */

/**
 * Allocates bytes bytes (at least 1) on this rank's symmetric heap and writes their address, a multiple of 256, to *ptr.
 * A message that is sent from there is copied once, by its receiver. The memory is the communicator's: it is given back by
 * xcclMemFree or xcclCommDestroy. Any contents. xcclOutOfMemory when the heap (XCCL_HEAP, or heap_bytes) is full. Does not
 * block.
 */
xcclResult_t xcclMemAlloc(void **ptr,
                          size_t bytes,
                          xcclComm_t comm);

/**
 * Gives back what xcclMemAlloc has allocated from the same communicator. No request may use it any more. Does not block.
 */
xcclResult_t xcclMemFree(void *ptr,
                         xcclComm_t comm);

/**
 * Writes this rank's counters to *statistics. Does not block.
 */
xcclResult_t xcclCommGetStatistics(xcclComm_t comm, xcclStatistics_t *statistics);

/* ---- Seeing what ranks do -------------------------------------------------------------------------------------- */

/**
 * Writes how many nanoseconds this rank has waited for each rank to times, which has count elements: the number of ranks. With
 * take = 1 they count from 0 afterwards, with 0 they go on. A wait counts for the rank that had to come next in the order of the
 * call; waits that are over at once, and those for any rank, do not count. Does not block.
 */
xcclResult_t xcclCommGetWaitTimes(xcclComm_t comm,
                                  uint64_t *times,
                                  size_t count,
                                  int take);

/**
 * Writes the last operations of a rank of this node, also after its death, to records, at most capacity of them, the oldest
 * first, and how many to *count: calls that all ranks make together, and waits that went to sleep; a rank remembers 64. Of a
 * rank of another node there are none. Does not block.
 */
xcclResult_t xcclCommGetHistory(xcclComm_t comm,
                                int rank,
                                xcclHistoryRecord_t *records,
                                size_t capacity,
                                size_t *count);

/**
 * Writes what this rank sees of all ranks to text: a line for each, with what it does, whom it waits for and since when, and a
 * sentence that says what holds them up. It ends with a zero. *length is the length without it; where that is capacity or
 * more, the text is cut and the call returns xcclTruncated. Does not block.
 */
xcclResult_t xcclCommGetStatusText(xcclComm_t comm,
                                   char *text,
                                   size_t capacity,
                                   size_t *length);

/**
 * Asks whether a rank can be reached, and writes the nanoseconds that it took to answer to *time. A saturated link is late, a
 * broken one never answers (xcclTimeout, or xcclRemoteError where the rank is known to be gone). A rank of this node is only
 * looked at. Blocks, for within_ms milliseconds at most.
 */
xcclResult_t xcclCommProbe(xcclComm_t comm,
                           int rank,
                           int64_t within_ms,
                           uint64_t *time);

/* ---- Messages -------------------------------------------------------------------------------------------------- */

/**
 * Sends `bytes` bytes at data (may be null when bytes is 0) to rank peer, possibly this one. Messages of one sender with one
 * tag arrive in order. Returns when data may be reused: at once for what the sender's ring has room for, after the receiver
 * has copied it for longer messages. Messages to the own rank never block.
 */
xcclResult_t xcclSend(const void *data,
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
xcclResult_t xcclRecv(void *buffer,
                      size_t capacity,
                      int source,
                      uint32_t tag,
                      xcclStatus_t *status,
                      xcclComm_t comm);

/**
 * Starts to send, as xcclSend does, and writes a request to *request. data must stay as it is until the request is over.
 * Does not block.
 */
xcclResult_t xcclIsend(const void *data,
                       size_t bytes,
                       int peer,
                       uint32_t tag,
                       xcclComm_t comm,
                       xcclRequest_t *request);

/**
 * Starts to receive, as xcclRecv does, and writes a request to *request. The capacity bytes at buffer must not be used until
 * the request is over. Does not block.
 */
xcclResult_t xcclIrecv(void *buffer,
                       size_t capacity,
                       int source,
                       uint32_t tag,
                       xcclComm_t comm,
                       xcclRequest_t *request);

/**
 * Waits until the request's buffer may be used again; writes to *status as xcclRecv does (for a send: the own rank, the tag
 * and the length; for a collective zeros) unless status is null. Blocks up to the deadline. The request is over then, but not after xcclTimeout. A
 * message that was too long for its buffer (xcclTruncated) is kept for another receive.
 */
xcclResult_t xcclWait(xcclRequest_t request,
                      xcclStatus_t *status,
                      xcclComm_t comm);

/**
 * Waits for the count requests at requests, in any order of completion, and writes to statuses[i] for requests[i] unless
 * statuses is null. On the first failure it returns: the requests after that one are not over. Blocks for each as xcclWait
 * does.
 */
xcclResult_t xcclWaitAll(size_t count,
                         const xcclRequest_t *requests,
                         xcclStatus_t *statuses,
                         xcclComm_t comm);

/**
 * Writes 1 to *done when the request is over, and to *status as xcclWait does; 0 when it is not. Does not block.
 */
xcclResult_t xcclTest(xcclRequest_t request, int *done, xcclStatus_t *status, xcclComm_t comm);

/**
 * Gives a request up: its buffer may be used again. A receive takes no message any more; a send whose beginning the receiver
 * may have seen is finished from a copy. Does not block for messages; a collective is waited for, up to the deadline: the other
 * ranks need this one's part.
 */
xcclResult_t xcclRequestFree(xcclRequest_t request,
                             xcclComm_t comm);

/* ---- Collectives ----------------------------------------------------------------------------------------------- */

/**
 * Joins the count elements at sendbuff of all ranks and writes the result to recvbuff on all. In place when sendbuff is
 * recvbuff. Every rank has to call it, with the same count, datatype, op (xcclInvalidUsage on all ranks otherwise).
 * datatype is an xcclDataType_t, op an xcclRedOp_t. After a failure other than xcclInvalidArgument the communicator makes
 * no collectives any more. Blocks until this rank's part is over, up to the deadline.
 */
xcclResult_t xcclAllReduce(const void *sendbuff,
                           void *recvbuff,
                           size_t count,
                           uint32_t datatype,
                           uint32_t op,
                           xcclComm_t comm);

/**
 * Starts what xcclAllReduce does, and writes a request to *request, for xcclWait and xcclTest. The buffers must be left
 * alone until it is over. Several may be on their way, made in the order of their calls. Does not block.
 */
xcclResult_t xcclIAllReduce(const void *sendbuff,
                            void *recvbuff,
                            size_t count,
                            uint32_t datatype,
                            uint32_t op,
                            xcclComm_t comm,
                            xcclRequest_t *request);

/**
 * As xcclAllReduce, but only rank root gets the result: recvbuff is not used on the others. Every rank has to call it,
 * with the same count, datatype, op, root (xcclInvalidUsage on all ranks otherwise). Blocks until this rank's part is
 * over, up to the deadline.
 */
xcclResult_t xcclReduce(const void *sendbuff,
                        void *recvbuff,
                        size_t count,
                        uint32_t datatype,
                        uint32_t op,
                        int root,
                        xcclComm_t comm);

/**
 * Starts what xcclReduce does, and writes a request to *request, for xcclWait and xcclTest. The buffers must be left alone
 * until it is over. Several may be on their way, made in the order of their calls. Does not block.
 */
xcclResult_t xcclIReduce(const void *sendbuff,
                         void *recvbuff,
                         size_t count,
                         uint32_t datatype,
                         uint32_t op,
                         int root,
                         xcclComm_t comm,
                         xcclRequest_t *request);

/**
 * Joins the elements at sendbuff of all ranks, a block of recvcount for each rank, and writes this rank's block of the
 * result to recvbuff. In place when recvbuff is sendbuff + rank * recvcount. Every rank has to call it, with the same
 * count, datatype, op (xcclInvalidUsage on all ranks otherwise). Blocks until this rank's part is over, up to the
 * deadline.
 */
xcclResult_t xcclReduceScatter(const void *sendbuff,
                               void *recvbuff,
                               size_t recvcount,
                               uint32_t datatype,
                               uint32_t op,
                               xcclComm_t comm);

/**
 * Starts what xcclReduceScatter does, and writes a request to *request, for xcclWait and xcclTest. The buffers must be
 * left alone until it is over. Several may be on their way, made in the order of their calls. Does not block.
 */
xcclResult_t xcclIReduceScatter(const void *sendbuff,
                                void *recvbuff,
                                size_t recvcount,
                                uint32_t datatype,
                                uint32_t op,
                                xcclComm_t comm,
                                xcclRequest_t *request);

/**
 * Gives the sendcount elements at sendbuff of every rank to all: those of rank r become block r of recvbuff. In place when
 * sendbuff is recvbuff + rank * sendcount. Every rank has to call it, with the same count, datatype (xcclInvalidUsage on
 * all ranks otherwise). Blocks until this rank's part is over, up to the deadline.
 */
xcclResult_t xcclAllGather(const void *sendbuff,
                           void *recvbuff,
                           size_t sendcount,
                           uint32_t datatype,
                           xcclComm_t comm);

/**
 * Starts what xcclAllGather does, and writes a request to *request, for xcclWait and xcclTest. The buffers must be left
 * alone until it is over. Several may be on their way, made in the order of their calls. Does not block.
 */
xcclResult_t xcclIAllGather(const void *sendbuff,
                            void *recvbuff,
                            size_t sendcount,
                            uint32_t datatype,
                            xcclComm_t comm,
                            xcclRequest_t *request);

/**
 * As xcclAllGather, but only rank root gets the blocks: recvbuff is not used on the others. Every rank has to call it,
 * with the same count, datatype, root (xcclInvalidUsage on all ranks otherwise). Blocks until this rank's part is over, up
 * to the deadline.
 */
xcclResult_t xcclGather(const void *sendbuff,
                        void *recvbuff,
                        size_t sendcount,
                        uint32_t datatype,
                        int root,
                        xcclComm_t comm);

/**
 * Starts what xcclGather does, and writes a request to *request, for xcclWait and xcclTest. The buffers must be left alone
 * until it is over. Several may be on their way, made in the order of their calls. Does not block.
 */
xcclResult_t xcclIGather(const void *sendbuff,
                         void *recvbuff,
                         size_t sendcount,
                         uint32_t datatype,
                         int root,
                         xcclComm_t comm,
                         xcclRequest_t *request);

/**
 * Gives block r of rank root's sendbuff, recvcount elements, to rank r, which gets it in recvbuff. sendbuff is not used on
 * the others. In place on root when recvbuff is sendbuff + rank * recvcount. Every rank has to call it, with the same
 * count, datatype, root (xcclInvalidUsage on all ranks otherwise). Blocks until this rank's part is over, up to the
 * deadline.
 */
xcclResult_t xcclScatter(const void *sendbuff,
                         void *recvbuff,
                         size_t recvcount,
                         uint32_t datatype,
                         int root,
                         xcclComm_t comm);

/**
 * Starts what xcclScatter does, and writes a request to *request, for xcclWait and xcclTest. The buffers must be left
 * alone until it is over. Several may be on their way, made in the order of their calls. Does not block.
 */
xcclResult_t xcclIScatter(const void *sendbuff,
                          void *recvbuff,
                          size_t recvcount,
                          uint32_t datatype,
                          int root,
                          xcclComm_t comm,
                          xcclRequest_t *request);

/**
 * Gives the count elements at rank root's sendbuff to all, in recvbuff. sendbuff is not used on the others. In place when
 * sendbuff is recvbuff. Rank root may return before the others have called. Every rank has to call it, with the same
 * count, datatype, root (xcclInvalidUsage on all ranks otherwise). Blocks until this rank's part is over, up to the
 * deadline.
 */
xcclResult_t xcclBroadcast(const void *sendbuff,
                           void *recvbuff,
                           size_t count,
                           uint32_t datatype,
                           int root,
                           xcclComm_t comm);

/**
 * Starts what xcclBroadcast does, and writes a request to *request, for xcclWait and xcclTest. The buffers must be left
 * alone until it is over. Several may be on their way, made in the order of their calls. Does not block.
 */
xcclResult_t xcclIBroadcast(const void *sendbuff,
                            void *recvbuff,
                            size_t count,
                            uint32_t datatype,
                            int root,
                            xcclComm_t comm,
                            xcclRequest_t *request);

/**
 * Gives block r of sendbuff, count elements, to rank r, and gets block r of recvbuff from it. In place when sendbuff is
 * recvbuff. Every rank has to call it, with the same count, datatype (xcclInvalidUsage on all ranks otherwise). Blocks
 * until this rank's part is over, up to the deadline.
 */
xcclResult_t xcclAllToAll(const void *sendbuff, void *recvbuff, size_t count, uint32_t datatype, xcclComm_t comm);

/**
 * Starts what xcclAllToAll does, and writes a request to *request, for xcclWait and xcclTest. The buffers must be left
 * alone until it is over. Several may be on their way, made in the order of their calls. Does not block.
 */
xcclResult_t xcclIAllToAll(const void *sendbuff,
                           void *recvbuff,
                           size_t count,
                           uint32_t datatype,
                           xcclComm_t comm,
                           xcclRequest_t *request);

/**
 * As xcclAllToAll, with blocks of different sizes: rank r gets the sendcounts[r] elements at sendbuff + sdispls[r], and
 * those from rank r, recvcounts[r], go to recvbuff + rdispls[r]. All four are [nranks], in elements. What one rank sends
 * another has to be what that one expects (xcclInvalidUsage on all ranks otherwise). In place when sendbuff is recvbuff,
 * and counts and displacements are the same. Every rank has to call it, with the same datatype. Blocks until this rank's
 * part is over, up to the deadline.
 */
xcclResult_t xcclAllToAllv(const void *sendbuff,
                           const size_t *sendcounts,
                           const size_t *sdispls,
                           void *recvbuff,
                           const size_t *recvcounts,
                           const size_t *rdispls,
                           uint32_t datatype,
                           xcclComm_t comm);

/**
 * Starts what xcclAllToAllv does, and writes a request to *request, for xcclWait and xcclTest. The buffers must be left
 * alone until it is over. Several may be on their way, made in the order of their calls. Does not block.
 */
xcclResult_t xcclIAllToAllv(const void *sendbuff,
                            const size_t *sendcounts,
                            const size_t *sdispls,
                            void *recvbuff,
                            const size_t *recvcounts,
                            const size_t *rdispls,
                            uint32_t datatype,
                            xcclComm_t comm,
                            xcclRequest_t *request);

/* ---- One-sided access to shared memory ------------------------------------------------------------------------- */

/**
 * Allocates bytes bytes (at least 1) of this rank that every rank of comm may read and write by the calls below, and writes
 * their address, a multiple of 256, to *ptr. The memory is the communicator's: it is given back by xcclSharedFree or
 * xcclCommDestroy. Any contents. It comes from the upper end of the symmetric heap; what was shared once stays so, so that
 * a late put never reaches memory of xcclMemAlloc. Ranks that allocate the same blocks in the same order have them at the
 * same offsets. xcclOutOfMemory when the heap (XCCL_HEAP, or heap_bytes) is full. Does not block.
 */
xcclResult_t xcclSharedAlloc(void **ptr,
                             size_t bytes,
                             xcclComm_t comm);

/**
 * Gives back what xcclSharedAlloc has allocated from the same communicator; the pool of a receiver of KV pages stays until
 * that is destroyed. Does not block.
 */
xcclResult_t xcclSharedFree(void *ptr,
                            xcclComm_t comm);

/**
 * Writes to *remote how other ranks name the bytes bytes at ptr, which lie in a block of xcclSharedAlloc. Does not block.
 */
xcclResult_t xcclSharedRemote(const void *ptr,
                              size_t bytes,
                              xcclRemote_t *remote,
                              xcclComm_t comm);

/**
 * Writes the bytes bytes at data (may be null when bytes is 0) to the beginning of a piece of a rank's shared memory. Returns
 * when data may be reused. They arrive in any order with other puts: see xcclPutSignal, xcclFence, xcclQuiet, which are as
 * in OpenSHMEM. Bytes that a rank reads meanwhile are old or new. Blocks only for room towards another machine.
 */
xcclResult_t xcclPut(const void *data,
                     size_t bytes,
                     xcclRemote_t to,
                     xcclComm_t comm);

/**
 * Copies the first bytes bytes of a piece of a rank's shared memory to buffer (may be null when bytes is 0). Blocks only until
 * they have come from another machine, up to the deadline.
 */
xcclResult_t xcclGet(void *buffer,
                     size_t bytes,
                     xcclRemote_t from,
                     xcclComm_t comm);

/**
 * As xcclPut; then changes a word of the same rank, the first 8 bytes of word, at a multiple of 8: op is an xcclUpdate_t.
 * Whoever sees the change sees the data; who waits for it is woken. Blocks as xcclPut does.
 */
xcclResult_t xcclPutSignal(const void *data,
                           size_t bytes,
                           xcclRemote_t to,
                           xcclRemote_t word,
                           uint32_t op,
                           uint64_t value,
                           xcclComm_t comm);

/**
 * Changes a word without data, and wakes who waits for it: op is an xcclUpdate_t. Atomic with all other changes of words. After
 * xcclFence it says that all puts before have arrived. Blocks as xcclPut does.
 */
xcclResult_t xcclSignal(xcclRemote_t word,
                        uint32_t op,
                        uint64_t value,
                        xcclComm_t comm);

/**
 * Writes the value of a word in a shared block of this rank to *value. What was put before the signal that made it so is
 * visible. Does not block.
 */
xcclResult_t xcclSignalFetch(const uint64_t *word,
                             uint64_t *value,
                             xcclComm_t comm);

/**
 * Waits until a word in a shared block of this rank compares with value as until (an xcclUntil_t) says, and writes what it is
 * to *found unless found is null. source is the rank that will make it so, or XCCL_ANY_SOURCE: it alone wakes this rank at
 * once, and its end ends the wait. What was put before that signal is visible. Blocks up to the deadline.
 */
xcclResult_t xcclSignalWait(const uint64_t *word,
                            uint32_t until,
                            uint64_t value,
                            int source,
                            uint64_t *found,
                            xcclComm_t comm);

/**
 * Writes the value of a word of a rank's shared memory to *value. Blocks only until it has come from another machine.
 */
xcclResult_t xcclAtomicFetch(xcclRemote_t word, uint64_t *value, xcclComm_t comm);

/**
 * Sets a word and writes its value before to *before. Blocks as xcclAtomicFetch does.
 */
xcclResult_t xcclAtomicSwap(xcclRemote_t word, uint64_t value, uint64_t *before, xcclComm_t comm);

/**
 * Adds to a word and writes its value before to *before; past the largest number it goes on from 0. Blocks as xcclAtomicFetch
 * does.
 */
xcclResult_t xcclAtomicFetchAdd(xcclRemote_t word,
                                uint64_t value,
                                uint64_t *before,
                                xcclComm_t comm);

/**
 * Sets a word to value if it is expected, and writes its value before to *before, either way. Blocks as xcclAtomicFetch does.
 */
xcclResult_t xcclAtomicCompareSwap(xcclRemote_t word,
                                   uint64_t expected,
                                   uint64_t value,
                                   uint64_t *before,
                                   xcclComm_t comm);

/**
 * Puts, signals and atomics of this rank at rank after this call arrive there after those before it. Does not block.
 */
xcclResult_t xcclFence(int rank, xcclComm_t comm);

/**
 * Returns when all that this rank has put, signalled and changed is visible to every rank. Blocks only for other machines, up
 * to the deadline.
 */
xcclResult_t xcclQuiet(xcclComm_t comm);

/* ---- KV pages from prefill to decode ranks --------------------------------------------------------------------- */

/**
 * Makes this rank a sender of KV pages, whose pages lie as *layout says in the memory that xcclKvPush is given, and writes its
 * handle to *sender; *sender is left as it is on failure. Every rank of comm must make a sender or a receiver at the same
 * time, with the same configuration (xcclJoinFailed on every rank otherwise). Blocks until all have.
 */
xcclResult_t xcclKvSenderCreate(xcclKvSender_t *sender,
                                xcclComm_t comm,
                                const xcclKvConfig_t *config,
                                const xcclPageLayout_t *layout);

/**
 * Gives the handle up: any further use of it is xcclInvalidArgument. Requests in flight are cancelled. Does not block.
 */
xcclResult_t xcclKvSenderDestroy(xcclKvSender_t sender);

/**
 * Writes to *event what has happened that was not told yet: a request was posted, cancelled, or its receiver is gone; or that
 * nothing has (xcclKvNothing). Does not block.
 */
xcclResult_t xcclKvSenderPoll(xcclKvEvent_t *event,
                              xcclKvSender_t sender);

/**
 * Waits for something to happen, and writes it to *event. Blocks up to the deadline.
 */
xcclResult_t xcclKvSenderWait(xcclKvEvent_t *event, xcclKvSender_t sender);

/**
 * Copies the receiver's pages of a request, in its order, to the capacity elements at pages. xcclTruncated when they are more.
 * Does not block.
 */
xcclResult_t xcclKvSenderPages(xcclKvTicket_t ticket,
                               uint32_t *pages,
                               size_t capacity,
                               xcclKvSender_t sender);

/**
 * Copies the count pages at pages of one layer from this rank's pool, pool_bytes bytes at pool, to the receiver's; to none
 * but those that it has posted for the request, and to each once. The receiver is told when the layer is complete; also of a
 * request without pages every layer has to be pushed. Writes 1 to *over when the whole request is complete, otherwise 0. The
 * pool may be reused when the call returns. xcclInvalidArgument for a wrong page: nothing was moved. xcclRemoteError when the
 * receiver has cancelled or is gone: the request is over. Blocks only for room towards another machine.
 */
xcclResult_t xcclKvPush(xcclKvTicket_t ticket,
                        size_t layer,
                        const void *pool,
                        size_t pool_bytes,
                        const xcclPagePair_t *pages,
                        size_t count,
                        int *over,
                        xcclKvSender_t sender);

/**
 * Gives a request up: it is over, and the receiver gets its pages back. Does not block.
 */
xcclResult_t xcclKvSenderCancel(xcclKvTicket_t ticket, xcclKvSender_t sender);

/**
 * Makes this rank a receiver of KV pages, with the pool at pool, a block of xcclSharedAlloc that lies as *layout says, and writes
 * its handle to *receiver; *receiver is left as it is on failure. Every rank takes part: see xcclKvSenderCreate. Blocks until
 * all have.
 */
xcclResult_t xcclKvReceiverCreate(xcclKvReceiver_t *receiver,
                                  xcclComm_t comm,
                                  const xcclKvConfig_t *config,
                                  const void *pool,
                                  const xcclPageLayout_t *layout);

/**
 * Gives the handle up: any further use of it is xcclInvalidArgument. Requests in flight are cancelled; while a sender may still
 * write to the pool, it stays allocated. Does not block.
 */
xcclResult_t xcclKvReceiverDestroy(xcclKvReceiver_t receiver);

/**
 * Asks rank from, a sender, to fill the count pages at pages (may be null when count is 0) for the request id, which is the
 * application's: of the last page the first last_page_bytes bytes, of the others all. Writes a ticket to *ticket, or
 * XCCL_KV_TICKET_NULL when as many requests as may be are in flight from that sender: poll, and post again. The pages belong
 * to the request until its end has been told. xcclInvalidArgument for a page that is none or has a request. Does not block.
 */
xcclResult_t xcclKvPost(int from,
                        uint64_t id,
                        const uint32_t *pages,
                        size_t count,
                        size_t last_page_bytes,
                        xcclKvTicket_t *ticket,
                        xcclKvReceiver_t receiver);

/**
 * Writes 1 to *ready when a layer of a request is complete: its pages may be read; otherwise 0. xcclRemoteError when it will
 * not come any more. Does not block.
 */
xcclResult_t xcclKvLayerReady(xcclKvTicket_t ticket,
                              size_t layer,
                              int *ready,
                              xcclKvReceiver_t receiver);

/**
 * Waits until a layer of a request is complete. Otherwise as xcclKvLayerReady. Blocks up to the deadline.
 */
xcclResult_t xcclKvWaitLayer(xcclKvTicket_t ticket, size_t layer, xcclKvReceiver_t receiver);

/**
 * Tells the sender to stop. The pages are free when the end of the request has been told, which may still be xcclKvDone. Does
 * not block.
 */
xcclResult_t xcclKvReceiverCancel(xcclKvTicket_t ticket,
                                  xcclKvReceiver_t receiver);

/**
 * Writes to *event which request has ended, and how, if one has that was not told yet (otherwise xcclKvNothing). Its pages are
 * free. Does not block.
 */
xcclResult_t xcclKvReceiverPoll(xcclKvEvent_t *event,
                                xcclKvReceiver_t receiver);

/**
 * Waits for a request to end, and writes it to *event. xcclInvalidUsage when none is in flight. Blocks up to the deadline.
 */
xcclResult_t xcclKvReceiverWait(xcclKvEvent_t *event,
                                xcclKvReceiver_t receiver);

/* ---- Experts: handles, and batches for kernels ----------------------------------------------------------------- */

/**
 * Makes a handle for exchanges of the shape *config and writes it to *moe; *moe is left as it is on failure. Every rank of
 * comm must call it, with the same configuration (xcclJoinFailed on every rank otherwise). Blocks until all have.
 */
xcclResult_t xcclMoeCreate(xcclMoe_t *moe,
                           xcclComm_t comm,
                           const xcclMoeConfig_t *config);

/**
 * Gives the handle up: any further use of it is xcclInvalidArgument. An exchange that was not combined is given up, and the
 * other ranks learn of it (xcclRemoteError). Does not block.
 */
xcclResult_t xcclMoeDestroy(xcclMoe_t moe);

/**
 * Writes the number of slots of this rank, by the placement of the next exchange, to *local_experts: the experts that it holds.
 * Does not block.
 */
xcclResult_t xcclMoeLocalExperts(xcclMoe_t moe,
                                 size_t *local_experts);

/**
 * Describes an exchange that was received (xcclMoeDispatchRecv) for kernels on other threads or devices, which write the
 * outputs in place and count them; xcclMoeAwaitRows waits for them. Does not block.
 */
xcclResult_t xcclMoeDeviceBatch(xcclExchange_t exchange,
                                xcclDeviceBatch_t *batch,
                                xcclMoe_t moe);

/**
 * Blocks, up to the deadline, until kernels have counted all rows of the exchange's batch as done (xcclDevicePublish). May be
 * called again after xcclTimeout.
 */
xcclResult_t xcclMoeAwaitRows(xcclExchange_t exchange,
                              xcclMoe_t moe);

/**
 * Writes to *base and *bytes where the outbox that rank `rank` has for this handle is mapped in this process: to register it
 * with a device (cudaHostRegister; cudaHostRegisterReadOnly for another rank's, which must not be written). All rows of all
 * batches lie in these. Good until xcclMoeDestroy. Does not block.
 */
xcclResult_t xcclMoeOutbox(int rank,
                           const void **base,
                           size_t *bytes,
                           xcclMoe_t moe);

/* ---- Experts: an exchange in four halves ----------------------------------------------------------------------- */

/**
 * Gives the rows that the next exchange's tokens lie in: [num_tokens, *row_bytes], of which hidden elements of each row count,
 * aligned to 64 bytes, with what an earlier exchange left there. Compute the tokens there, then call xcclMoeDispatchSend with
 * tokens null and this num_tokens: nothing is copied. Rows that were given before and not sent are taken back.
 * xcclInvalidUsage where rows travel encoded: see xcclMoeInputWireRows. Blocks as xcclMoeDispatchSend does.
 */
xcclResult_t xcclMoeInputRows(size_t num_tokens,
                              void **rows,
                              size_t *row_bytes,
                              xcclMoe_t moe);

/**
 * First half of a dispatch: sends this rank's tokens to the ranks that hold their experts, and names the exchange in
 * *exchange. Every rank must call it for every exchange. The arrays may be used again when it returns. Blocks only until every
 * rank has combined the exchange before the last, up to the deadline.
 *
 * Bad input is xcclInvalidArgument and nothing is sent: ranks that wait for this one get xcclPeerRefused, and all may call
 * again. xcclInvalidUsage when two exchanges are under way.
 */
xcclResult_t xcclMoeDispatchSend(const xcclMoeInput_t *input,
                                 xcclExchange_t *exchange,
                                 xcclMoe_t moe);

/**
 * Second half of a dispatch: receives what all ranks sent to this rank's experts and describes it in *batch. The rows stay in
 * the senders' memory. Blocks until all ranks have sent, up to the deadline; may be called again, also to get the same
 * description once more. xcclPeerRefused when a rank's input was bad: call again once it has sent.
 */
xcclResult_t xcclMoeDispatchRecv(xcclExchange_t exchange,
                                 xcclMoeBatch_t *batch,
                                 xcclMoe_t moe);

/**
 * As xcclMoeDispatchRecv, source by source in the order of arrival: *source is the rank whose *num_rows rows at *rows have
 * come, by local expert, then token; -1 when all sources have come, after which xcclMoeDispatchRecv describes all of them in
 * the usual order, with the same outputs. *rows is good until the next call for the exchange. Blocks until a source has sent,
 * up to the deadline; may be called again after a failure.
 */
xcclResult_t xcclMoeDispatchRecvSource(xcclExchange_t exchange,
                                       int *source,
                                       const xcclMoeRow_t **rows,
                                       size_t *num_rows,
                                       xcclMoe_t moe);

/**
 * Copies the rows of an exchange that was received into the expert-major layout at to: each local expert's rows one after
 * another, beginning at a multiple of align rows (1: without gaps). to has room for capacity_rows rows of hidden elements;
 * xcclTruncated when these are too few, with nothing written. Does not block.
 */
xcclResult_t xcclMoeCopyExpertMajor(xcclExchange_t exchange,
                                    void *to,
                                    size_t capacity_rows,
                                    size_t align,
                                    xcclMoe_t moe);

/**
 * Copies the rows of an exchange that was received into the padded layout [local experts, capacity, hidden] at to, which has
 * room for capacity_rows rows. xcclLimitExceeded when an expert has more rows than capacity, xcclTruncated when capacity_rows
 * is below local experts * capacity, both with nothing written. Does not block.
 */
xcclResult_t xcclMoeCopyPadded(xcclExchange_t exchange,
                               void *to,
                               size_t capacity_rows,
                               size_t capacity,
                               xcclMoe_t moe);

/**
 * For engines that form the sums of xcclReducePerRank themselves: describes in *sums the *num_sums sums that are asked of this
 * rank, by source, then token. Write each to its output, then call xcclMoeCombineSend with outputs XCCL_SUMMED. *sums is good
 * until then. Does not block.
 */
xcclResult_t xcclMoeSums(xcclExchange_t exchange,
                         const xcclMoeSum_t **sums,
                         size_t *num_sums,
                         xcclMoe_t moe);

/**
 * First half of a combine: publishes what this rank's experts made of the rows. outputs: [num_rows, hidden] in the batch's
 * order, not weighted, copied once (or summed on the way, with xcclReducePerRank); XCCL_IN_PLACE when they were written to
 * rows[i].output; XCCL_SUMMED when the sums were written where xcclMoeSums says. Ends the batch. Does not block.
 * xcclInvalidArgument and xcclInvalidUsage change nothing.
 */
xcclResult_t xcclMoeCombineSend(xcclExchange_t exchange,
                                const void *outputs,
                                xcclMoe_t moe);

/**
 * Second half of a combine: receives the sums for the tokens that this rank sent in the exchange: out[t] = sum over k of
 * topk_weights[t, k] * output of expert topk_ids[t, k], [num_tokens, hidden], summed in f32 and rounded once; zeros for a
 * token without experts. Blocks until the ranks that had tokens of this one have combined, up to the deadline.
 * xcclInvalidUsage before xcclMoeCombineSend, and xcclInvalidArgument, change nothing. After any other result the exchange is
 * over.
 */
xcclResult_t xcclMoeCombineRecv(xcclExchange_t exchange,
                                void *out,
                                xcclMoe_t moe);

/**
 * As xcclMoeCombineRecv, and adds a bias and residual rows to the sums before they are rounded, and norms what it has written, all
 * while a row is in registers and caches: see xcclMoeEpilogue_t. out and normed must not overlap each other nor what is read, but
 * for a residual that is out. xcclInvalidArgument for such an overlap and for eps changes nothing. Blocks as
 * xcclMoeCombineRecv does.
 */
xcclResult_t xcclMoeCombineRecvWith(xcclExchange_t exchange,
                                    void *out,
                                    const xcclMoeEpilogue_t *epilogue,
                                    xcclMoe_t moe);

/**
 * Gives an exchange up: the ranks that wait for this one's part get xcclRemoteError. Does not block.
 */
xcclResult_t xcclMoeGiveUp(xcclExchange_t exchange, xcclMoe_t moe);

/* ---- Experts: an exchange in two calls ------------------------------------------------------------------------- */

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
xcclResult_t xcclMoeDispatch(const void *tokens,
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
xcclResult_t xcclMoeCombine(const void *expert_outputs,
                            void *out,
                            xcclMoe_t moe);

/* ---- Experts: threads that share a call ------------------------------------------------------------------------ */

/**
 * From now on shares the copies and sums of each call with `lanes` threads of the program, 1 to 64, where there is enough to
 * share: those of xcclMoeDispatchSend, xcclMoeDispatch, xcclMoeCopyExpertMajor, xcclMoeCopyPadded, xcclMoeCopyWire..., xcclMoeCombineSend,
 * xcclMoeCombineRecv, xcclMoeCombineRecvWith and xcclMoeCombine. run lends the threads; it is called with context by the thread
 * that is in the call. Results have the same bits for any number of lanes. XCCL starts no threads itself. run and context must
 * be good until they are replaced or the handle is destroyed; with run null, as at first, the calling thread works alone. Does
 * not block.
 */
xcclResult_t xcclMoeSetLanes(size_t lanes,
                             xcclRunLanes_t run,
                             void *context,
                             xcclMoe_t moe);

/* ---- Experts: placements, and how many tokens each expert got -------------------------------------------------- */

/**
 * Goes by another placement from the next exchange on, whose number it writes to *exchange unless that is null. Exchanges under
 * way end by the one that they began with. slot_experts is [nranks, slots], the logical expert in each slot of each rank, -1
 * after a rank's last; the shared expert s is num_experts + s. Every rank must call it with the same placement between the same
 * two dispatches. Where ranks do not agree, receiving the first exchange that they do not agree on is xcclInvalidUsage on every
 * rank, with both values in xcclGetLastError, and no row is taken; they can go on by giving it up and installing the same one.
 * xcclInvalidArgument for one that does not fit the handle; what was in force stays so. Does not block.
 */
xcclResult_t xcclMoeInstall(const int32_t *slot_experts,
                            size_t slots,
                            xcclExchange_t *exchange,
                            xcclMoe_t moe);

/**
 * Writes the logical experts in the slots of a rank, by the placement of the next exchange, to experts, which has room for
 * capacity of them, and their number to *num_slots. xcclTruncated when capacity is too small, with *num_slots written. Does not
 * block.
 */
xcclResult_t xcclMoeSlotExperts(int rank,
                                int32_t *experts,
                                size_t capacity,
                                size_t *num_slots,
                                xcclMoe_t moe);

/**
 * Writes how many of this rank's tokens have named each routed expert since they were last taken to counts, and begins anew.
 * num_counts is the number of routed experts; form an xcclCounts_t. Does not block.
 */
xcclResult_t xcclMoeTakeExpertCounts(uint32_t form,
                                     int64_t *counts,
                                     size_t num_counts,
                                     xcclMoe_t moe);

/**
 * Writes how many rows have come for each of this rank's slots since they were last taken to counts, and begins anew. num_counts is
 * the number of slots, as xcclMoeLocalExperts gives it; form an xcclCounts_t. A slot goes on counting when another expert is
 * installed in it: take the counts before. Does not block.
 */
xcclResult_t xcclMoeTakeSlotCounts(uint32_t form,
                                   int64_t *counts,
                                   size_t num_counts,
                                   xcclMoe_t moe);

/**
 * Makes a placement for num_experts experts with these counts of tokens (of all ranks together), over nranks ranks on these
 * nodes, with at most redundant slots more than experts, spread evenly: the hottest rank gets as few tokens as can be found.
 * previous is null or [nranks, slots], where experts stay as far as that costs nothing. The result is written to slot_experts,
 * [nranks, slots], as xcclMoeInstall takes it; slots is at least (num_experts + redundant) / nranks, rounded up. The same arguments
 * give the same placement on every rank. Does not block; takes milliseconds.
 */
xcclResult_t xcclBalanceExperts(const int64_t *counts,
                                size_t num_experts,
                                const int32_t *nodes,
                                size_t nranks,
                                size_t redundant,
                                const int32_t *previous,
                                size_t slots,
                                int32_t *slot_experts);

/**
 * As xcclMoeInputRows, in the handle's wire format, for engines that hold quantized tokens: row t's values begin at
 * (char *)*values + t * *row_bytes, aligned to 64 bytes, and its scales at (char *)*scales + t * *row_bytes; *scales is null
 * where the format has none. xcclInvalidUsage with smooth scales. Blocks as xcclMoeDispatchSend does.
 */
xcclResult_t xcclMoeInputWireRows(size_t num_tokens,
                                  void **values,
                                  float **scales,
                                  size_t *row_bytes,
                                  xcclMoe_t moe);

/**
 * As xcclMoeCopyExpertMajor, with the rows as they travel: values has room for capacity_rows rows of the format's bytes (hidden,
 * or with xcclWireNative hidden elements), scales for capacity_scales scales, laid out as layout, an xcclScaleLayout_t, says for
 * all rows of the layout. xcclTruncated when either is too small, with nothing written. Does not block.
 */
xcclResult_t xcclMoeCopyWireExpertMajor(xcclExchange_t exchange,
                                        void *values,
                                        size_t capacity_rows,
                                        float *scales,
                                        size_t capacity_scales,
                                        uint32_t layout,
                                        size_t align,
                                        xcclMoe_t moe);

/**
 * As xcclMoeCopyPadded, with the rows as they travel: see xcclMoeCopyWireExpertMajor. Each local expert has capacity rows of
 * values, and scales for as many rows laid out as layout says. Does not block.
 */
xcclResult_t xcclMoeCopyWirePadded(xcclExchange_t exchange,
                                   void *values,
                                   size_t capacity_rows,
                                   float *scales,
                                   size_t capacity_scales,
                                   uint32_t layout,
                                   size_t capacity,
                                   xcclMoe_t moe);

/* ---- Attention and experts on ranks of their own --------------------------------------------------------------- */

/**
 * Makes this rank's handle of a group of attention and expert ranks and writes it to *a2e; *a2e is left as it is on failure. Every
 * rank of comm must call it, with the same configuration (xcclJoinFailed on every rank otherwise). xcclInvalidArgument on every rank
 * for one that cannot be, such as an expert that is placed on a rank that holds attention. Blocks until all have called.
 */
xcclResult_t xcclA2ECreate(xcclA2E_t *a2e,
                           xcclComm_t comm,
                           const xcclA2EConfig_t *config);

/**
 * Gives the handle up: any further use of it is xcclInvalidArgument. An attention rank says by it that it is done; when all have, the
 * experts' loops end. A micro-batch that an expert rank has not sent back is given up, which its attention ranks learn of
 * (xcclRemoteError). Blocks, up to the deadline, while other ranks still need what this one passes on.
 */
xcclResult_t xcclA2EDestroy(xcclA2E_t a2e);

/**
 * Attention: sends the tokens of a micro-batch to the experts and names it in *exchange. Every attention rank of the domain calls
 * it for every micro-batch, perhaps with no tokens; two may be under way. The arrays may be used again when it returns. Blocks only
 * until the micro-batch before the last was consumed, up to the deadline.
 *
 * Bad input is xcclInvalidArgument and nothing is sent; expert ranks are told (xcclPeerRefused) and wait for the corrected one.
 * xcclInvalidUsage on a rank that holds experts, or for a third micro-batch; xcclRemoteError when an expert rank's loop has ended.
 */
xcclResult_t xcclA2ESend(const xcclMoeInput_t *input,
                         xcclExchange_t *exchange,
                         xcclA2E_t a2e);

/**
 * Attention: receives the sums of a micro-batch, [num_tokens, hidden], as xcclMoeCombineRecv. Those under way may be received in
 * either order. Blocks until the expert ranks that had tokens of this one have sent them back, up to the deadline. After any result
 * but xcclInvalidArgument and xcclInvalidUsage the micro-batch is over.
 */
xcclResult_t xcclE2ARecv(xcclExchange_t exchange,
                         void *out,
                         xcclA2E_t a2e);

/**
 * Attention: ends the loops of all expert ranks at once, without waiting for other attention ranks, whose micro-batches under way are
 * given up (xcclRemoteError). The handle is given up as by xcclA2EDestroy. xcclInvalidUsage on a rank that holds experts. Does not
 * block.
 */
xcclResult_t xcclA2EShutDown(xcclA2E_t a2e);

/**
 * Experts: receives the next micro-batch of any domain and describes it in *batch; the rows stay in the attention ranks' memory.
 * Domains take turns. When the loop is over, now and from then on, batch->end says why. Two micro-batches of each domain may be out.
 * Blocks until one is complete, up to the deadline; may be called again after xcclTimeout and after xcclPeerRefused, which names an
 * attention rank whose input was bad. xcclRemoteError for a domain that one of its ranks has left: the others go on.
 * xcclInvalidUsage on a rank that holds attention.
 */
xcclResult_t xcclA2ERecv(xcclA2EBatch_t *batch,
                         xcclA2E_t a2e);

/**
 * Experts: sends the outputs of a domain's micro-batch back. outputs: [num_rows, hidden] in the batch's order, copied once (or
 * summed on the way, with xcclReducePerRank), or XCCL_IN_PLACE when they were written to rows[i].output. Micro-batches may be sent
 * back in any order. Does not block. xcclInvalidArgument and xcclInvalidUsage change nothing.
 */
xcclResult_t xcclE2ASend(size_t domain,
                         xcclExchange_t exchange,
                         const void *outputs,
                         xcclA2E_t a2e);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* XCCL_H */
