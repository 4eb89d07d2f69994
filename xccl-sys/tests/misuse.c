/*
 * Every function with arguments that are null, misaligned, zero, huge, dead, of the wrong kind or at the wrong time, in bounded
 * number and a fixed order: each answer has to be a known code with a text, and the communicator has to work afterwards.
 *
 * Ranks other than 0 do nothing wrong meanwhile, and have to get an answer within their deadline each time.
 *
 * Lengths of good pointers are never wrong: that cannot be told.
 */
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "xccl_device.h"

enum { CALLS = 20000, HEALTH_EVERY = 500, TOKENS = 4, HIDDEN = 16, TOPK = 2, EXPERTS = 4, HEALTH_TAG = 4711 };

static void fail(int line, const char *what) {
  fprintf(stderr, "line %d: %s (last error: %s)\n", line, what, xcclGetLastError());
  exit(1);
}
#define EXPECT(condition) ((condition) ? (void)0 : fail(__LINE__, #condition))
#define CHECK(call) EXPECT((call) == xcclSuccess)

static uint64_t state = 0x9e3779b97f4a7c15u;
static size_t draw(size_t below) {
  state ^= state << 13;
  state ^= state >> 7;
  state ^= state << 17;
  return (size_t)(state >> 33) % below;
}
#define PICK(...) pick_from((const long long[]){__VA_ARGS__}, sizeof((const long long[]){__VA_ARGS__}) / sizeof(long long))
static long long pick_from(const long long *values, size_t n) { return values[draw(n)]; }

/* What calls may be given. */
static int ranks;
static xcclComm_t comm, dead_comm;
static xcclMoe_t moe, dead_moe;
static xcclA2E_t dead_a2e; /* of two ranks; NULL alone: a group has two */
static uint64_t nothing[64];          /* memory that is no handle */
static uint64_t memory[1 << 14];      /* room for whatever a call with small sizes writes */
static xcclExchange_t exchanges[4];   /* the last ones, and over ones among them */
static xcclRequest_t requests[8];
static void *blocks[8];
static xcclKvSender_t sender, dead_sender;
static xcclKvReceiver_t receiver, dead_receiver;
static char *shared; /* 4096 bytes that any rank may write */
static void *pool;   /* the receiver's pages */
static xcclRemote_t shared_remote;
enum { LAYERS = 2, PAGE_BYTES = 64, PAGES = 8, POOL = LAYERS * PAGES * PAGE_BYTES };
static size_t turn;
static int refused;
static struct {
  const char *name;
  int calls, refused;
} tried[FUNCTIONS]; /* with -DFUNCTIONS=<number of cases> */

static int is_bad(void) { return draw(4) == 0; }
static xcclComm_t any_comm(void) {
  if (!is_bad()) return comm;
  switch (draw(5)) {
    case 0: return NULL;
    case 1: return dead_comm;
    case 2: return (xcclComm_t)(void *)moe;
    case 3: return (xcclComm_t)(void *)((char *)comm + 1);
    default: return (xcclComm_t)(void *)nothing;
  }
}
static xcclMoe_t any_moe(void) {
  if (!is_bad()) return moe;
  switch (draw(5)) {
    case 0: return NULL;
    case 1: return dead_moe;
    case 2: return (xcclMoe_t)(void *)comm;
    case 3: return (xcclMoe_t)(void *)((char *)moe + 1);
    default: return (xcclMoe_t)(void *)nothing;
  }
}
static xcclA2E_t any_a2e(void) {
  switch (draw(5)) {
    case 0: return NULL;
    case 1: return dead_a2e;
    case 2: return (xcclA2E_t)(void *)comm;
    case 3: return (xcclA2E_t)(void *)((char *)moe + 1);
    default: return (xcclA2E_t)(void *)nothing;
  }
}
static xcclKvSender_t any_sender(void) {
  if (!is_bad()) return sender;
  switch (draw(5)) {
    case 0: return NULL;
    case 1: return dead_sender;
    case 2: return (xcclKvSender_t)(void *)receiver;
    case 3: return (xcclKvSender_t)(void *)((char *)sender + 1);
    default: return (xcclKvSender_t)(void *)nothing;
  }
}
static xcclKvReceiver_t any_receiver(void) {
  if (!is_bad()) return receiver;
  switch (draw(5)) {
    case 0: return NULL;
    case 1: return dead_receiver;
    case 2: return (xcclKvReceiver_t)(void *)sender;
    case 3: return (xcclKvReceiver_t)(void *)((char *)receiver + 1);
    default: return (xcclKvReceiver_t)(void *)nothing;
  }
}
/* Good ones, and those that name what is not shared, or not there. */
static xcclRemote_t any_remote(void) {
  xcclRemote_t remote = shared_remote;
  const uint64_t skip = (uint64_t)PICK(0, 0, 8, 64, 4, 4088, 4096);
  remote.offset += skip;
  remote.bytes -= skip;
  if (is_bad()) remote.rank = (uint64_t)PICK(0, 1, 99, -1, LLONG_MIN);
  if (is_bad()) remote.offset = (uint64_t)PICK(0, 4096, 1, -1, -8, LLONG_MAX);
  if (is_bad()) remote.bytes = (uint64_t)PICK(0, 7, 4097, -1, LLONG_MAX);
  return remote;
}
static uint64_t *any_word(void) { return (uint64_t *)(void *)(is_bad() ? (draw(2) ? NULL : (char *)nothing) : shared + PICK(0, 8, 4, 4088, 4092, 4096)); }
static uint32_t op(void) { return (uint32_t)PICK(0, 1, 0, 1, 2, 5, 6, -1); }
static xcclKvTicket_t ticket(void) { return (xcclKvTicket_t)PICK(0, 1, -1, 1ll << 20, (1ll << 20) + 256, LLONG_MIN); }
static void *out(void *good) {
  if (!is_bad()) return good;
  return draw(2) ? NULL : (char *)good + 1;
}
static void *data(void) { return is_bad() ? NULL : memory; }
/* In place, apart, or overlapping. */
static void *sent_from(void) {
  static uint64_t other[1 << 14];
  return is_bad() ? NULL : is_bad() ? memory + 1 : draw(2) ? memory : other;
}
static uint32_t datatype(void) { return (uint32_t)PICK(1, 2, 4, 6, 7, 9, 7, 7, 0, 8, -1); }
static uint32_t operation(void) { return (uint32_t)PICK(0, 2, 3, 4, 0, 0, 1, 5, -1); }
static const size_t *counts(void) {
  static const size_t few[] = {3, 0}, many[] = {5000, 1}, wrong[] = {SIZE_MAX, SIZE_MAX};
  return is_bad() ? NULL : is_bad() ? wrong : is_bad() ? many : few;
}
/* With good memory only sizes that it has, or that no memory has. */
static size_t size(void) { return (size_t)PICK(0, 1, 2, 3, 8, 40, 41, 100, 5000, (long long)SIZE_MAX); }
static int number(void) { return (int)PICK(0, 0, 0, 1, 2, -1, -2, INT_MIN, INT_MAX); }
static uint32_t tag(void) { return (uint32_t)PICK(0, 1, UINT_MAX); }
static xcclExchange_t exchange(void) {
  return is_bad() ? (xcclExchange_t)PICK(0, 1, -1, 1ll << 40) : exchanges[draw(4)];
}
static xcclRequest_t request(void) {
  return is_bad() ? (xcclRequest_t)PICK(0, 1, -1, 1ll << 32, (1ll << 32) + 1, 12345) : requests[draw(8)];
}
static size_t struct_size(size_t good) { return is_bad() ? (size_t)PICK(0, 3, 8, 24, 4096, -1) : good; }

static xcclConfig_t any_config(void) {
  xcclConfig_t config = XCCL_CONFIG_INITIALIZER;
  config.size = struct_size(sizeof config);
  config.timeout_ms = PICK(5, 5, 5, 5, 5, -7);
  if (is_bad()) config.version = PICK(0, -1, 99, 10000, 1ll << 40);
  if (is_bad()) config.heap_bytes = PICK(0, 1, -2, LLONG_MAX, LLONG_MIN);
  if (is_bad()) config.p2p_ring_bytes = PICK(0, 1, -2, LLONG_MAX, 1ll << 40);
  if (is_bad()) config.rendezvous_bytes = PICK(0, -2, LLONG_MAX);
  if (is_bad()) config.unexpected_bytes = PICK(0, -2, LLONG_MAX);
  if (is_bad()) config.memory = PICK(0, 1, 2, -2);
  if (is_bad()) config.huge_pages = PICK(0, 1, 2);
  if (is_bad()) config.cma = PICK(0, 1, 2);
  if (is_bad()) config.kernels = PICK(0, 1, 5, 6, -2, LLONG_MIN);
  return config;
}
static const int32_t some_nodes[4] = {0, 0, 1, 1};
static const int32_t *slot_experts(void) {
  static const int32_t good[16] = {3, 1, 0, 2, 2, 3, 1, 0}, gap[16] = {0, -1, 1, 2}, wrong[16] = {0, 1, 2, INT_MIN};
  return is_bad() ? gap : is_bad() ? wrong : good;
}
static xcclMoeConfig_t good_shape(void) {
  xcclMoeConfig_t config = XCCL_MOE_CONFIG_INITIALIZER;
  config.max_tokens = TOKENS;
  config.hidden = HIDDEN;
  config.topk = TOPK;
  config.experts = EXPERTS;
  config.dtype = xcclFloat32;
  return config;
}
static xcclMoeConfig_t any_shape(void) {
  static const int32_t placement[EXPERTS] = {0, 0, 0, 0}, wrong[EXPERTS] = {0, -1, 7, INT_MAX};
  static const float smooth[EXPERTS * HIDDEN] = {1, 2, 0.5f};
  xcclMoeConfig_t config = good_shape();
  config.size = struct_size(sizeof config);
  if (is_bad()) config.max_tokens = size();
  if (is_bad()) config.hidden = size();
  if (is_bad()) config.topk = size();
  if (is_bad()) config.dtype = (uint32_t)PICK(0, 2, 6, 9, -1);
  if (is_bad()) config.reduction = (uint32_t)PICK(1, 2, -1);
  if (is_bad()) config.max_expert_rows = size();
  if (is_bad()) config.placement = draw(2) ? placement : wrong;
  if (is_bad()) config.wire = (uint32_t)PICK(0, 1, 2, 3, 4, -1);
  if (is_bad()) config.smooth = smooth;
  if (is_bad()) config.slots = (size_t)PICK(0, 1, 4, -1);
  if (is_bad()) config.slot_experts = slot_experts();
  if (is_bad() && !config.smooth) config.shared_experts = (size_t)PICK(0, 1, 64, -1);
  if (is_bad()) config.zero_experts = (size_t)PICK(0, 1, -1);
  if (is_bad()) config.copy_experts = (size_t)PICK(0, 1, -1);
  if (is_bad()) config.constant_experts = (size_t)PICK(0, 1, 2, -1);
  if (is_bad()) config.constant_vectors = (const float *)(void *)memory;
  if (is_bad()) config.constant_token_factors = smooth;
  if (is_bad()) config.constant_vector_factors = smooth;
  return config;
}
static xcclA2EConfig_t any_group(const xcclMoeConfig_t *shape) {
  static const int32_t roles[2] = {0, -1}, wrong[2] = {-2, INT_MAX}, holes[2] = {1, -1};
  xcclA2EConfig_t config = XCCL_A2E_CONFIG_INITIALIZER;
  config.size = struct_size(sizeof config);
  config.roles = is_bad() ? NULL : is_bad() ? wrong : is_bad() ? holes : roles;
  config.moe = is_bad() ? NULL : shape;
  config.forward = (uint32_t)PICK(0, 1, 2, 3, -1);
  config.trampolines = size();
  return config;
}
static xcclMoeInput_t any_input(void) {
  static float tokens[TOKENS * HIDDEN], weights[TOKENS * TOPK];
  static int64_t ids[TOKENS * TOPK] = {0, 1, 2, 3, 1, 0, 3, 2}, wrong[TOKENS * TOPK] = {0, 0, 99, -5, -1, -1, 1, 2};
  static uint8_t active[TOKENS] = {1, 0, 255, 1};
  xcclMoeInput_t input = XCCL_MOE_INPUT_INITIALIZER;
  input.size = struct_size(sizeof input);
  input.tokens = is_bad() ? NULL : tokens;
  input.num_tokens = (size_t)PICK(0, 1, 3, TOKENS, TOKENS, TOKENS + 1, -1);
  input.topk_ids = is_bad() ? NULL : is_bad() ? wrong : ids;
  input.ids_type = is_bad() ? (uint32_t)PICK(0, 2, 7, -1) : xcclInt64;
  input.topk_weights = is_bad() ? NULL : weights;
  if (is_bad()) input.active = active;
  return input;
}

static xcclKvConfig_t good_pages(void) {
  xcclKvConfig_t config = XCCL_KV_CONFIG_INITIALIZER;
  config.layers = LAYERS;
  config.page_bytes = PAGE_BYTES;
  config.max_pages = 4;
  config.max_requests = 2;
  return config;
}
static xcclKvConfig_t any_pages(void) {
  xcclKvConfig_t config = good_pages();
  config.size = struct_size(sizeof config);
  if (is_bad()) config.layers = (size_t)PICK(0, 1, 1 << 16, (1 << 16) + 1, -1);
  if (is_bad()) config.page_bytes = (size_t)PICK(0, 1, 65, 1ll << 30, -1);
  if (is_bad()) config.max_pages = (size_t)PICK(0, 1, 1 << 24, (1 << 24) + 1, -1);
  if (is_bad()) config.max_requests = (size_t)PICK(0, 1, 256, 257, -1);
  return config;
}
static xcclPageLayout_t good_layout(void) {
  xcclPageLayout_t layout = {PAGES, PAGES * PAGE_BYTES, PAGE_BYTES};
  return layout;
}
static xcclPageLayout_t any_layout(void) {
  xcclPageLayout_t layout = good_layout();
  if (is_bad()) layout.pages = (size_t)PICK(0, 1, 9, 1ll << 40, -1);
  if (is_bad()) layout.layer_stride = (size_t)PICK(0, 1, PAGE_BYTES, LLONG_MAX, -1);
  if (is_bad()) layout.page_stride = (size_t)PICK(0, 1, 2 * PAGE_BYTES, LLONG_MAX, -1);
  return layout;
}
static xcclMoeEpilogue_t any_epilogue(void) {
  static float rows[TOKENS * HIDDEN], normed[TOKENS * HIDDEN];
  xcclMoeEpilogue_t epilogue = XCCL_MOE_EPILOGUE_INITIALIZER;
  epilogue.size = struct_size(sizeof epilogue);
  epilogue.bias = draw(2) ? NULL : rows;
  epilogue.residual = draw(2) ? NULL : draw(2) ? memory : (void *)rows; /* memory is out */
  epilogue.norm_weight = draw(2) ? NULL : rows;
  epilogue.normed = is_bad() ? NULL : is_bad() ? rows + 1 : normed;
  epilogue.eps = is_bad() ? -1.0f : 1e-6f;
  if (is_bad()) epilogue.tokens = draw(2) ? rows : normed;
  return epilogue;
}
/* Leaves lanes out, and does others twice. */
static void lanes(void *context, size_t n, xcclLaneWork_t work, void *state) {
  size_t i;
  (void)context;
  for (i = 0; i < n; i++) work(state, draw((unsigned)n + 1));
}

#define ONE(name, ...)                        \
  case __COUNTER__:                           \
    function = #name;                         \
    result = name(__VA_ARGS__);               \
    break
/* The two that give a text and cannot be refused. */
#define TEXT(name, ...)                       \
  case __COUNTER__:                           \
    function = #name;                         \
    text = name(__VA_ARGS__);                 \
    EXPECT(text && strlen(text) < 1000);      \
    cannot_fail = 1;                          \
    break

static const char *const addresses[8] = {"127.0.0.1:5", "[::1]:0", "0.0.0.0:1", "", "localhost:1", "10.0.0.1", "[::1]:70000", "1:2:3"};

static void call(void) {
  xcclResult_t result = xcclSuccess;
  const char *function = "", *text;
  const size_t which = draw(FUNCTIONS);
  int cannot_fail = 0;
  xcclConfig_t config = any_config();
  xcclMoeConfig_t shape = any_shape();
  xcclMoeInput_t input = any_input();
  xcclMoeEpilogue_t epilogue = any_epilogue();
  xcclMoeBatch_t batch = XCCL_MOE_BATCH_INITIALIZER;
  xcclDeviceBatch_t device = XCCL_DEVICE_BATCH_INITIALIZER;
  xcclStatistics_t statistics = XCCL_STATISTICS_INITIALIZER;
  xcclA2EConfig_t group = any_group(&shape);
  xcclA2EBatch_t micro_batch = XCCL_A2E_BATCH_INITIALIZER;
  xcclKvConfig_t pages = any_pages();
  xcclPageLayout_t layout = any_layout();
  xcclKvEvent_t event = XCCL_KV_EVENT_INITIALIZER;
  xcclKvSender_t made_sender = NULL;
  xcclKvReceiver_t made_receiver = NULL;
  xcclKvTicket_t posted = 0;
  xcclRemote_t remote;
  uint64_t found;
  xcclUniqueId id;
  xcclStatus_t status;
  xcclComm_t made = NULL;
  xcclMoe_t made_moe = NULL;
  xcclA2E_t made_a2e = NULL;
  xcclExchange_t sent = 0;
  xcclRequest_t started = 0;
  void *at = NULL;
  const xcclMoeRow_t *rows;
  const xcclMoeSum_t *sums;
  float *scales;
  size_t bytes = 0, count;
  int value, *int_out = (int *)out(&value);
  size_t *size_out = (size_t *)out(&count);

  memset(&id, (int)draw(256), sizeof id);
  if (!is_bad()) CHECK(xcclGetUniqueId(&id));
  batch.size = struct_size(batch.size);
  device.size = struct_size(device.size);
  micro_batch.size = struct_size(micro_batch.size);
  statistics.size = struct_size(statistics.size);
  event.size = struct_size(event.size);
  bytes = size();
  /* Collective calls need the other ranks: alone they are tried with all arguments. */
  switch (which) {
    TEXT(xcclGetErrorString, draw(2) ? (int)draw(20) : number());
    TEXT(xcclGetLastError);
    ONE(xcclGetVersion, int_out);
    ONE(xcclGetUniqueId, (xcclUniqueId *)(draw(2) ? &id : NULL));
    ONE(xcclGetUniqueIdAt, (xcclUniqueId *)(draw(2) ? &id : NULL), is_bad() ? NULL : addresses[draw(8)]);
    ONE(xcclCommInitRank, is_bad() ? NULL : &made, ranks == 1 ? (int)PICK(1, 0, -1, INT_MIN, INT_MAX) : -1, id, number());
    ONE(xcclCommInitRankConfig, is_bad() ? NULL : &made, (int)PICK(1, 0, -1, 2, INT_MIN, INT_MAX), id, number(), &config);
    ONE(xcclCommInitFromEnv, is_bad() ? NULL : (xcclComm_t *)((char *)&made + 1), is_bad() ? NULL : &config);
    ONE(xcclCommSplit, any_comm(), ranks == 1 ? number() : -2, number(), is_bad() ? NULL : &made);
    ONE(xcclCommDuplicate, ranks == 1 ? any_comm() : dead_comm, is_bad() ? NULL : &made);
    ONE(xcclCommDestroy, draw(2) ? dead_comm : NULL);
    ONE(xcclCommAbort, draw(2) ? dead_comm : (xcclComm_t)(void *)moe);
    ONE(xcclCommAbortWith, draw(2) ? dead_comm : (xcclComm_t)(void *)moe, number(), is_bad() ? NULL : "why");
    ONE(xcclCommShrink, draw(2) ? dead_comm : (xcclComm_t)(void *)moe, is_bad() ? NULL : &made);
    ONE(xcclCommRollback, draw(2) ? dead_comm : (xcclComm_t)(void *)moe, (uint64_t)number(), is_bad() ? NULL : &made,
        (uint64_t *)out(&found));
    ONE(xcclCommGetNewId, ranks == 1 ? any_comm() : dead_comm, (xcclUniqueId *)(draw(2) ? &id : NULL));
    ONE(xcclCommFormerRank, any_comm(), number(), int_out);
    ONE(xcclCommUserRank, any_comm(), int_out);
    ONE(xcclCommCount, any_comm(), int_out);
    ONE(xcclCommGetStatistics, any_comm(), (xcclStatistics_t *)out(&statistics));
    ONE(xcclCommGetWaitTimes, any_comm(), (uint64_t *)out(memory), (size_t)PICK(ranks, 0, ranks, 99, -1), (int)PICK(0, 1, 0, 2, -1));
    ONE(xcclCommGetHistory, any_comm(), number(), (xcclHistoryRecord_t *)out(memory), (size_t)PICK(0, 1, 64, -1), size_out);
    ONE(xcclCommGetStatusText, any_comm(), (char *)data(), (size_t)PICK(0, 1, 100, 4000, -1), size_out);
    ONE(xcclCommProbe, any_comm(), number(), (int64_t)PICK(0, 1, 5, -1, LLONG_MIN), (uint64_t *)out(&found));
    ONE(xcclBarrier, ranks == 1 ? any_comm() : dead_comm);
    ONE(xcclMemAlloc, is_bad() ? NULL : &at, (size_t)PICK(0, 1, 64, 4096, 1 << 30, -1), any_comm());
    ONE(xcclMemFree, is_bad() ? (void *)(is_bad() ? NULL : memory) : blocks[draw(8)], any_comm());
    ONE(xcclSend, data(), bytes, number(), tag(), any_comm());
    ONE(xcclRecv, data(), bytes, number(), tag(), (xcclStatus_t *)out(&status), any_comm());
    ONE(xcclIsend, data(), bytes, number(), tag(), any_comm(), is_bad() ? NULL : &started);
    ONE(xcclIrecv, data(), bytes, number(), tag(), any_comm(), is_bad() ? NULL : &started);
    ONE(xcclWait, request(), (xcclStatus_t *)out(&status), any_comm());
    ONE(xcclWaitAll, (size_t)PICK(0, 1, 8, -1), is_bad() ? NULL : requests,
        draw(2) ? NULL : (xcclStatus_t *)(void *)((char *)memory + (is_bad() ? 1 : 0)), any_comm());
    ONE(xcclTest, request(), int_out, (xcclStatus_t *)out(&status), any_comm());
    ONE(xcclRequestFree, request(), any_comm());
    ONE(xcclSharedAlloc, is_bad() ? NULL : &at, (size_t)PICK(0, 1, 64, 4096, 1 << 30, -1), any_comm());
    ONE(xcclSharedFree, (void *)(is_bad() ? NULL : draw(2) ? (char *)memory : shared + 8), any_comm());
    ONE(xcclSharedRemote, any_word(), (size_t)PICK(0, 1, 8, 5000, -1), (xcclRemote_t *)out(&remote), any_comm());
    ONE(xcclPut, data(), bytes, any_remote(), any_comm());
    ONE(xcclGet, data(), bytes, any_remote(), any_comm());
    ONE(xcclPutSignal, data(), bytes, any_remote(), any_remote(), op(), (uint64_t)draw(9), any_comm());
    ONE(xcclSignal, any_remote(), op(), (uint64_t)draw(9), any_comm());
    ONE(xcclSignalFetch, any_word(), (uint64_t *)out(&found), any_comm());
    ONE(xcclSignalWait, any_word(), op(), (uint64_t)draw(3), number(), draw(2) ? NULL : (uint64_t *)out(&found), any_comm());
    ONE(xcclAtomicFetch, any_remote(), (uint64_t *)out(&found), any_comm());
    ONE(xcclAtomicSwap, any_remote(), 7, (uint64_t *)out(&found), any_comm());
    ONE(xcclAtomicFetchAdd, any_remote(), (uint64_t)PICK(0, 1, -1), (uint64_t *)out(&found), any_comm());
    ONE(xcclAtomicCompareSwap, any_remote(), 7, 8, (uint64_t *)out(&found), any_comm());
    ONE(xcclFence, number(), any_comm());
    ONE(xcclQuiet, any_comm());
    ONE(xcclKvSenderCreate, is_bad() ? NULL : &made_sender, ranks == 1 ? any_comm() : dead_comm, is_bad() ? NULL : &pages,
        (xcclPageLayout_t *)out(&layout));
    ONE(xcclKvSenderDestroy, draw(2) ? dead_sender : (xcclKvSender_t)(void *)comm);
    ONE(xcclKvSenderPoll, (xcclKvEvent_t *)out(&event), any_sender());
    ONE(xcclKvSenderWait, (xcclKvEvent_t *)out(&event), any_sender());
    ONE(xcclKvSenderPages, ticket(), (uint32_t *)data(), (size_t)PICK(0, 1, 8, -1), any_sender());
    ONE(xcclKvPush, ticket(), (size_t)PICK(0, 1, 2, -1), data(), POOL, (const xcclPagePair_t *)data(), (size_t)PICK(0, 1, 8, -1),
        int_out, any_sender());
    ONE(xcclKvSenderCancel, ticket(), any_sender());
    ONE(xcclKvReceiverCreate, is_bad() ? NULL : &made_receiver, ranks == 1 ? any_comm() : dead_comm,
        is_bad() ? NULL : &pages, is_bad() ? memory : draw(2) ? (char *)pool + 8 : pool, (xcclPageLayout_t *)out(&layout));
    ONE(xcclKvReceiverDestroy, draw(2) ? dead_receiver : (xcclKvReceiver_t)(void *)comm);
    ONE(xcclKvPost, number(), 7, (const uint32_t *)data(), (size_t)PICK(0, 1, 4, 5, -1), (size_t)PICK(0, 1, PAGE_BYTES, -1),
        is_bad() ? NULL : &posted, any_receiver());
    ONE(xcclKvLayerReady, ticket(), (size_t)PICK(0, 1, 2, -1), int_out, any_receiver());
    ONE(xcclKvWaitLayer, ticket(), (size_t)PICK(0, 1, 2, -1), any_receiver());
    ONE(xcclKvReceiverCancel, ticket(), any_receiver());
    ONE(xcclKvReceiverPoll, (xcclKvEvent_t *)out(&event), any_receiver());
    ONE(xcclKvReceiverWait, (xcclKvEvent_t *)out(&event), any_receiver());
    ONE(xcclAllReduce, sent_from(), data(), bytes, datatype(), operation(), ranks == 1 ? any_comm() : dead_comm);
    ONE(xcclIAllReduce, sent_from(), data(), bytes, datatype(), operation(), ranks == 1 ? any_comm() : dead_comm, is_bad() ? NULL : &started);
    ONE(xcclReduce, sent_from(), data(), bytes, datatype(), operation(), number(), ranks == 1 ? any_comm() : dead_comm);
    ONE(xcclIReduce, sent_from(), data(), bytes, datatype(), operation(), number(), ranks == 1 ? any_comm() : dead_comm, is_bad() ? NULL : &started);
    ONE(xcclReduceScatter, sent_from(), data(), bytes, datatype(), operation(), ranks == 1 ? any_comm() : dead_comm);
    ONE(xcclIReduceScatter, sent_from(), data(), bytes, datatype(), operation(), ranks == 1 ? any_comm() : dead_comm, is_bad() ? NULL : &started);
    ONE(xcclAllGather, sent_from(), data(), bytes, datatype(), ranks == 1 ? any_comm() : dead_comm);
    ONE(xcclIAllGather, sent_from(), data(), bytes, datatype(), ranks == 1 ? any_comm() : dead_comm, is_bad() ? NULL : &started);
    ONE(xcclGather, sent_from(), data(), bytes, datatype(), number(), ranks == 1 ? any_comm() : dead_comm);
    ONE(xcclIGather, sent_from(), data(), bytes, datatype(), number(), ranks == 1 ? any_comm() : dead_comm, is_bad() ? NULL : &started);
    ONE(xcclScatter, sent_from(), data(), bytes, datatype(), number(), ranks == 1 ? any_comm() : dead_comm);
    ONE(xcclIScatter, sent_from(), data(), bytes, datatype(), number(), ranks == 1 ? any_comm() : dead_comm, is_bad() ? NULL : &started);
    ONE(xcclBroadcast, sent_from(), data(), bytes, datatype(), number(), ranks == 1 ? any_comm() : dead_comm);
    ONE(xcclIBroadcast, sent_from(), data(), bytes, datatype(), number(), ranks == 1 ? any_comm() : dead_comm, is_bad() ? NULL : &started);
    ONE(xcclAllToAll, sent_from(), data(), bytes, datatype(), ranks == 1 ? any_comm() : dead_comm);
    ONE(xcclIAllToAll, sent_from(), data(), bytes, datatype(), ranks == 1 ? any_comm() : dead_comm, is_bad() ? NULL : &started);
    ONE(xcclAllToAllv, sent_from(), counts(), counts(), data(), counts(), counts(), datatype(), ranks == 1 ? any_comm() : dead_comm);
    ONE(xcclIAllToAllv, sent_from(), counts(), counts(), data(), counts(), counts(), datatype(), ranks == 1 ? any_comm() : dead_comm, is_bad() ? NULL : &started);
    ONE(xcclMoeCreate, is_bad() ? NULL : &made_moe, ranks == 1 ? any_comm() : dead_comm, is_bad() ? NULL : &shape);
    ONE(xcclMoeDestroy, draw(2) ? dead_moe : NULL);
    ONE(xcclMoeLocalExperts, any_moe(), size_out);
    ONE(xcclMoeInputRows, size(), is_bad() ? NULL : &at, size_out, any_moe());
    ONE(xcclMoeInputWireRows, size(), is_bad() ? NULL : &at, is_bad() ? NULL : &scales, size_out, any_moe());
    ONE(xcclMoeDispatchSend, (xcclMoeInput_t *)out(&input), is_bad() ? NULL : &sent, any_moe());
    ONE(xcclMoeDispatchRecv, exchange(), (xcclMoeBatch_t *)out(&batch), any_moe());
    ONE(xcclMoeDispatchRecvSource, exchange(), int_out, is_bad() ? NULL : &rows, size_out, any_moe());
    ONE(xcclMoeDeviceBatch, exchange(), (xcclDeviceBatch_t *)out(&device), any_moe());
    ONE(xcclMoeAwaitRows, exchange(), any_moe());
    ONE(xcclMoeOutbox, number(), is_bad() ? NULL : (const void **)&at, size_out, any_moe());
    ONE(xcclMoeCopyExpertMajor, exchange(), data(), (size_t)PICK(0, 1, 64), (size_t)PICK(0, 1, 4, -1), any_moe());
    ONE(xcclMoeCopyPadded, exchange(), data(), (size_t)PICK(0, 1, 64), (size_t)PICK(0, 1, 4, -1), any_moe());
    ONE(xcclMoeCopyWireExpertMajor, exchange(), data(), (size_t)PICK(0, 1, 64), (float *)data(), (size_t)PICK(0, 1, 64),
        (uint32_t)PICK(0, 1, 2, -1), (size_t)PICK(0, 1, 4, -1), any_moe());
    ONE(xcclMoeCopyWirePadded, exchange(), data(), (size_t)PICK(0, 1, 64), (float *)data(), (size_t)PICK(0, 1, 64),
        (uint32_t)PICK(0, 1, 2, -1), (size_t)PICK(0, 1, 4, -1), any_moe());
    ONE(xcclMoeSums, exchange(), is_bad() ? NULL : &sums, size_out, any_moe());
    ONE(xcclMoeCombineSend, exchange(), is_bad() ? NULL : is_bad() ? XCCL_SUMMED : is_bad() ? memory : XCCL_IN_PLACE, any_moe());
    ONE(xcclMoeCombineRecv, exchange(), data(), any_moe());
    ONE(xcclMoeCombineRecvWith, exchange(), data(), is_bad() ? NULL : &epilogue, any_moe());
    ONE(xcclMoeSetLanes, (size_t)PICK(0, 1, 2, 64, 65, -1), is_bad() ? NULL : lanes, NULL, any_moe());
    ONE(xcclMoeInstall, is_bad() ? NULL : slot_experts(), (size_t)PICK(0, 1, 3, 4, 4, -1), is_bad() ? NULL : &sent,
        ranks == 1 ? any_moe() : dead_moe);
    ONE(xcclMoeSlotExperts, number(), is_bad() ? NULL : (int32_t *)data(), (size_t)PICK(0, 1, 4), size_out, any_moe());
    ONE(xcclMoeTakeExpertCounts, (uint32_t)PICK(0, 1, 2), is_bad() ? NULL : (int64_t *)data(), (size_t)PICK(0, 1, 2, 4, -1), any_moe());
    ONE(xcclMoeTakeSlotCounts, (uint32_t)PICK(0, 1, 2), is_bad() ? NULL : (int64_t *)data(), (size_t)PICK(0, 1, 2, 4, -1), any_moe());
    ONE(xcclBalanceExperts, is_bad() ? NULL : (const int64_t *)data(), (size_t)PICK(0, 1, 2, 4, -1), is_bad() ? NULL : some_nodes,
        (size_t)PICK(0, 1, 2, -1), (size_t)PICK(0, 1, 2, 5, -1), is_bad() ? slot_experts() : NULL, (size_t)PICK(0, 1, 2, 4, -1),
        is_bad() ? NULL : (int32_t *)data());
    ONE(xcclMoeGiveUp, exchange(), any_moe());
    ONE(xcclMoeDispatch, data(), (size_t)PICK(0, 1, TOKENS, TOKENS + 1, -1), is_bad() ? NULL : (const int32_t *)(void *)nothing,
        is_bad() ? NULL : (const float *)(void *)nothing, data(), (size_t)PICK(0, 1, 64, -1), (uint32_t *)out(memory),
        size_out, any_moe());
    ONE(xcclMoeCombine, data(), data(), any_moe());
    ONE(xcclA2ECreate, is_bad() ? NULL : &made_a2e, ranks == 1 ? any_comm() : dead_comm, is_bad() ? NULL : &group);
    ONE(xcclA2EDestroy, any_a2e());
    ONE(xcclA2ESend, (xcclMoeInput_t *)out(&input), is_bad() ? NULL : &sent, any_a2e());
    ONE(xcclE2ARecv, exchange(), data(), any_a2e());
    ONE(xcclA2ERecv, (xcclA2EBatch_t *)out(&micro_batch), any_a2e());
    ONE(xcclE2ASend, (size_t)PICK(0, 1, -1), exchange(), is_bad() ? NULL : XCCL_IN_PLACE, any_a2e());
    ONE(xcclA2EShutDown, any_a2e());
    default: fail(__LINE__, "FUNCTIONS is wrong");
  }
  text = xcclGetLastError();
  refused += result != xcclSuccess;
  tried[which].name = function;
  tried[which].calls++;
  tried[which].refused += result != xcclSuccess || cannot_fail;
  if (result != xcclSuccess) {
    size_t name = strlen(function);
    if (strcmp(xcclGetErrorString((int)result), "unknown result") == 0 || result == xcclInternalError ||
        strncmp(text, function, name) != 0 || text[name] != ':' || strlen(text) < name + 10) {
      fprintf(stderr, "%s gave %d\n", function, (int)result);
      fail(__LINE__, "a code or a text that makes no sense");
    }
  }
  if (sent) exchanges[turn++ % 4] = sent;
  if (started) requests[turn++ % 8] = started;
  if (result == xcclSuccess && at && strcmp(function, "xcclMemAlloc") == 0) {
    void **place = &blocks[turn++ % 8];
    if (*place) (void)xcclMemFree(*place, comm); /* perhaps freed before */
    *place = at;
  }
  if (result == xcclSuccess && at && strcmp(function, "xcclSharedAlloc") == 0) CHECK(xcclSharedFree(at, comm));
  if (made_sender) CHECK(xcclKvSenderDestroy(made_sender));
  if (made_receiver) CHECK(xcclKvReceiverDestroy(made_receiver));
  if (made) CHECK(xcclCommDestroy(made));
  if (made_moe) CHECK(xcclMoeDestroy(made_moe));
}

/* A message to itself and, alone, an exchange. */
static void health(void) {
  char word[8] = "hello", back[8] = "";
  int rank;
  size_t i;
  CHECK(xcclCommUserRank(comm, &rank));
  CHECK(xcclSend(word, sizeof word, rank, HEALTH_TAG, comm));
  CHECK(xcclRecv(back, sizeof back, rank, HEALTH_TAG, NULL, comm));
  EXPECT(strcmp(word, back) == 0);
  CHECK(xcclPutSignal(word, sizeof word, shared_remote, shared_remote, xcclUpdateSet, 5, comm));
  CHECK(xcclSignalWait((uint64_t *)(void *)shared, xcclUntilEq, 5, rank, NULL, comm));
  for (i = 0; i < 8; i++) (void)xcclRequestFree(requests[i], comm);
  for (i = 0; i < 4; i++) (void)xcclMoeGiveUp(exchanges[i], moe);
  if (ranks == 1) {
    int64_t number = 7, sum = 0;
    CHECK(xcclAllReduce(&number, &sum, 1, xcclInt64, xcclSum, comm));
    EXPECT(sum == 7);
  }
  if (ranks == 1) {
    float tokens[HIDDEN], out[HIDDEN], weights[TOPK] = {1, 1}, rows[2 * HIDDEN];
    int32_t ids[TOPK] = {3, 1};
    uint32_t counts[EXPERTS];
    size_t arrived = 0;
    for (i = 0; i < HIDDEN; i++) tokens[i] = (float)i;
    CHECK(xcclBarrier(comm));
    if (xcclMoeDispatch(tokens, 1, ids, weights, rows, 2, counts, &arrived, moe) != xcclSuccess) {
      /* One of the joined calls is under way: its tokens are not these. */
      CHECK(xcclMoeDestroy(moe));
      {
        xcclMoeConfig_t shape = good_shape();
        CHECK(xcclMoeCreate(&moe, comm, &shape));
      }
      CHECK(xcclMoeDispatch(tokens, 1, ids, weights, rows, 2, counts, &arrived, moe));
    }
    EXPECT(arrived == 2);
    CHECK(xcclMoeCombine(rows, out, moe));
    for (i = 0; i < HIDDEN; i++) EXPECT(out[i] == 2 * (float)i);
  }
}

#define GIVES(code, part, ...)                                                                   \
  do {                                                                                           \
    xcclResult_t gave = (__VA_ARGS__);                                                           \
    if (gave != (code) || !strstr(xcclGetLastError(), part)) fail(__LINE__, "expected " #code ": " part); \
  } while (0)

/* Calls that do not go with a wire format, or with none. One rank; `input` names tokens. */
static void quantized(xcclMoeInput_t *input) {
  xcclMoeConfig_t shape = good_shape();
  xcclMoe_t int8 = NULL;
  xcclExchange_t exchange;
  xcclMoeBatch_t batch = XCCL_MOE_BATCH_INITIALIZER;
  static int8_t values[2 * TOKENS * TOPK * HIDDEN];
  float scales[2 * TOKENS * TOPK], *row_scales, smooth[EXPERTS * HIDDEN] = {0};
  size_t row_bytes;
  void *at;
  shape.wire = 4;
  GIVES(xcclInvalidArgument, "config->wire is 4", xcclMoeCreate(&int8, comm, &shape));
  shape.smooth = smooth;
  shape.wire = xcclWireFp8E4m3;
  GIVES(xcclInvalidArgument, "int8 where there are smooth scales", xcclMoeCreate(&int8, comm, &shape));
  shape.wire = xcclWireInt8;
  CHECK(xcclMoeCreate(&int8, comm, &shape));
  GIVES(xcclInvalidUsage, "smooth scales", xcclMoeInputWireRows(1, &at, &row_scales, &row_bytes, int8));
  CHECK(xcclMoeDestroy(int8));
  shape.smooth = NULL;
  CHECK(xcclMoeCreate(&int8, comm, &shape));
  GIVES(xcclInvalidUsage, "int8", xcclMoeInputRows(1, &at, &row_bytes, int8));
  CHECK(xcclMoeDispatchSend(input, &exchange, int8));
  CHECK(xcclMoeDispatchRecv(exchange, &batch, int8));
  EXPECT(batch.wire == xcclWireInt8 && batch.row_scales == 1 && batch.num_rows == TOKENS * TOPK);
  GIVES(xcclInvalidArgument, "layout is 2", xcclMoeCopyWireExpertMajor(exchange, values, 8, scales, 8, 2, 1, int8));
  GIVES(xcclInvalidArgument, "align is 0", xcclMoeCopyWireExpertMajor(exchange, values, 8, scales, 8, 0, 0, int8));
  GIVES(xcclTruncated, "takes 8 rows, capacity_rows is 7", xcclMoeCopyWireExpertMajor(exchange, values, 7, scales, 8, 0, 1, int8));
  GIVES(xcclTruncated, "takes 8 scales, capacity_scales is 7",
        xcclMoeCopyWireExpertMajor(exchange, values, 8, scales, 7, 0, 1, int8));
  GIVES(xcclInvalidArgument, "scales is a null pointer", xcclMoeCopyWireExpertMajor(exchange, values, 8, NULL, 8, 0, 1, int8));
  GIVES(xcclLimitExceeded, "capacity", xcclMoeCopyWirePadded(exchange, values, 4, scales, 16, xcclScaleColumnMajor, 1, int8));
  CHECK(xcclMoeGiveUp(exchange, int8));
  CHECK(xcclMoeDestroy(int8));
}

/* Replicas, shared and special experts, counts, and another placement while an exchange is under way. One rank. */
static void placements(void) {
  static const int32_t first[6] = {0, 1, 2, 3, 1, 4}, next[6] = {4, 3, 2, 1, 0, -1}, gap[6] = {0, 1, -1, 2, 3, 4};
  static const int32_t ids[4 * TOPK] = {1, 4, 1, 5, 1, 6, 0, -1}; /* 4, 5, 6: zero, copy, constant */
  static const float weights[4 * TOPK] = {1, 1, 1, 2, 1, 4, 1, 1};
  static const int64_t uneven[EXPERTS] = {1, 90, 1, 1};
  static float tokens[4 * HIDDEN], result[4 * HIDDEN], vectors[HIDDEN];
  static const float sums[4] = {2, 4, 18, 2};
  xcclMoeConfig_t shape = good_shape();
  xcclMoeInput_t input = XCCL_MOE_INPUT_INITIALIZER;
  xcclMoeBatch_t batch = XCCL_MOE_BATCH_INITIALIZER;
  xcclExchange_t exchange, since;
  xcclMoe_t placed = NULL;
  int64_t taken[6];
  int32_t made[8], there[6];
  size_t i, n;
  for (i = 0; i < 4 * HIDDEN; i++) tokens[i] = 1;
  for (i = 0; i < HIDDEN; i++) vectors[i] = 4;
  shape.max_tokens = 4;
  shape.slots = 6;
  shape.shared_experts = shape.zero_experts = shape.copy_experts = shape.constant_experts = 1;
  shape.constant_vectors = vectors;
  shape.slot_experts = gap;
  GIVES(xcclInvalidArgument, "config->slot_experts[0 * slots + 2] is -1", xcclMoeCreate(&placed, comm, &shape));
  shape.slot_experts = first;
  CHECK(xcclMoeCreate(&placed, comm, &shape));
  input.tokens = tokens;
  input.num_tokens = 4;
  input.topk_ids = ids;
  input.topk_weights = weights;
  CHECK(xcclMoeDispatchSend(&input, &exchange, placed));
  GIVES(xcclInvalidArgument, "slots is 0", xcclMoeInstall(next, 0, NULL, placed));
  GIVES(xcclInvalidArgument, "expert 2 in no slot", xcclMoeInstall(first, 2, NULL, placed));
  CHECK(xcclMoeInstall(next, 6, &since, placed));
  EXPECT(since == exchange + 1);
  CHECK(xcclMoeDispatchRecv(exchange, &batch, placed));
  /* The three tokens of expert 1 take turns. */
  EXPECT(batch.local_experts == 6 && batch.experts[4] == 1 && batch.counts[1] == 2 && batch.counts[4] == 1 && batch.counts[5] == 4);
  for (i = 0; i < batch.num_rows; i++) {
    float *output = (float *)batch.rows[i].output;
    for (n = 0; n < HIDDEN; n++) output[n] = 1;
  }
  CHECK(xcclMoeCombineSend(exchange, XCCL_IN_PLACE, placed));
  CHECK(xcclMoeCombineRecv(exchange, result, placed));
  for (i = 0; i < 4 * HIDDEN; i++) EXPECT(result[i] == sums[i / HIDDEN]);
  GIVES(xcclTruncated, "has 5 slots", xcclMoeSlotExperts(0, there, 4, &n, placed));
  EXPECT(n == 5);
  CHECK(xcclMoeSlotExperts(0, there, 6, &n, placed));
  EXPECT(n == 5 && there[0] == 4 && there[4] == 0);
  GIVES(xcclInvalidArgument, "form is 2", xcclMoeTakeExpertCounts(2, taken, EXPERTS, placed));
  GIVES(xcclInvalidArgument, "num_counts is 5", xcclMoeTakeExpertCounts(xcclCountsEach, taken, 5, placed));
  CHECK(xcclMoeTakeExpertCounts(xcclCountsPrefixSums, taken, EXPERTS, placed));
  EXPECT(taken[0] == 1 && taken[1] == 4 && taken[3] == 4);
  CHECK(xcclMoeTakeSlotCounts(xcclCountsEach, taken, 5, placed));
  EXPECT(taken[0] == 1 && taken[1] == 2 && taken[4] == 1);
  CHECK(xcclMoeDestroy(placed));
  GIVES(xcclInvalidArgument, "slots is 3", xcclBalanceExperts(uneven, EXPERTS, some_nodes, 2, 3, NULL, 3, made));
  CHECK(xcclBalanceExperts(uneven, EXPERTS, some_nodes, 2, 2, NULL, 4, made));
  EXPECT(made[3] == -1 && made[7] == -1);
  for (i = n = 0; i < 8; i++) n += made[i] == 1;
  EXPECT(n == 2);
}

/* The halves in every wrong order, each with its answer. One rank. */
static void wrong_orders(void) {
  xcclMoeInput_t input = XCCL_MOE_INPUT_INITIALIZER;
  xcclMoeEpilogue_t epilogue = XCCL_MOE_EPILOGUE_INITIALIZER;
  xcclMoeBatch_t batch = XCCL_MOE_BATCH_INITIALIZER;
  xcclDeviceBatch_t device = XCCL_DEVICE_BATCH_INITIALIZER;
  xcclExchange_t first, second, third = 77;
  static float tokens[TOKENS * HIDDEN], weights[TOKENS * TOPK], result[TOKENS * HIDDEN];
  static const int32_t ids[TOKENS * TOPK] = {0, 1, 2, 3, 1, 0, 3, 2};
  const xcclMoeRow_t *rows;
  const xcclMoeSum_t *sums;
  size_t n, row_bytes;
  void *at;
  int source;
  xcclRequest_t request;
  xcclStatus_t status;
  input.tokens = tokens;
  input.num_tokens = TOKENS;
  input.topk_ids = ids;
  input.topk_weights = weights;
  CHECK(xcclMoeDispatchSend(&input, &first, moe));
  GIVES(xcclInvalidUsage, "was not received", xcclMoeCombineSend(first, XCCL_IN_PLACE, moe));
  GIVES(xcclInvalidUsage, "was not combined", xcclMoeCombineRecv(first, result, moe));
  GIVES(xcclInvalidUsage, "was not received", xcclMoeCopyExpertMajor(first, result, 1, 1, moe));
  GIVES(xcclInvalidUsage, "was not received", xcclMoeDeviceBatch(first, &device, moe));
  GIVES(xcclInvalidUsage, "was not received", xcclMoeAwaitRows(first, moe));
  CHECK(xcclMoeDispatchSend(&input, &second, moe));
  GIVES(xcclInvalidUsage, "2 exchanges", xcclMoeDispatchSend(&input, &third, moe));
  EXPECT(third == 77);
  GIVES(xcclInvalidArgument, "exchange (77) is not under way", xcclMoeDispatchRecv(third, &batch, moe));
  CHECK(xcclMoeDispatchRecvSource(second, &source, &rows, &n, moe));
  EXPECT(source == 0 && n == TOKENS * TOPK);
  CHECK(xcclMoeDispatchRecvSource(second, &source, &rows, &n, moe));
  EXPECT(source == -1 && n == 0);
  CHECK(xcclMoeDispatchRecv(second, &batch, moe));
  EXPECT(batch.num_rows == TOKENS * TOPK);
  GIVES(xcclInvalidUsage, "as a whole", xcclMoeDispatchRecvSource(second, &source, &rows, &n, moe));
  GIVES(xcclInvalidUsage, "xcclReducePerRank", xcclMoeSums(second, &sums, &n, moe));
  GIVES(xcclInvalidUsage, "xcclReducePerRank", xcclMoeCombineSend(second, XCCL_SUMMED, moe));
  GIVES(xcclInvalidArgument, "outputs is a null pointer", xcclMoeCombineSend(second, NULL, moe));
  GIVES(xcclTruncated, "takes 8 rows, capacity_rows is 7", xcclMoeCopyExpertMajor(second, result, 7, 1, moe));
  GIVES(xcclInvalidArgument, "align is 0", xcclMoeCopyExpertMajor(second, result, 8, 0, moe));
  GIVES(xcclLimitExceeded, "capacity", xcclMoeCopyPadded(second, result, 4, 1, moe));
  GIVES(xcclTimeout, "", xcclMoeAwaitRows(second, moe));
  CHECK(xcclMoeCombineSend(second, XCCL_IN_PLACE, moe));
  GIVES(xcclInvalidUsage, "was combined already", xcclMoeCombineSend(second, XCCL_IN_PLACE, moe));
  GIVES(xcclInvalidUsage, "was combined already", xcclMoeDispatchRecv(second, &batch, moe));
  GIVES(xcclInvalidArgument, "out is a null pointer", xcclMoeCombineRecv(second, NULL, moe));
  GIVES(xcclInvalidArgument, "epilogue is a null pointer", xcclMoeCombineRecvWith(second, result, NULL, moe));
  epilogue.norm_weight = tokens;
  GIVES(xcclInvalidArgument, "epilogue->normed is a null pointer", xcclMoeCombineRecvWith(second, result, &epilogue, moe));
  epilogue.normed = result + 1;
  GIVES(xcclInvalidArgument, "out overlaps epilogue->normed", xcclMoeCombineRecvWith(second, result, &epilogue, moe));
  epilogue.normed = tokens;
  GIVES(xcclInvalidArgument, "normed overlaps epilogue->norm_weight", xcclMoeCombineRecvWith(second, result, &epilogue, moe));
  epilogue.eps = -1;
  GIVES(xcclInvalidArgument, "epilogue->eps is -1", xcclMoeCombineRecvWith(second, result, &epilogue, moe));
  GIVES(xcclInvalidArgument, "lanes = \"65\"", xcclMoeSetLanes(65, lanes, NULL, moe));
  CHECK(xcclMoeSetLanes(65, NULL, NULL, moe)); /* not looked at */
  CHECK(xcclMoeCombineRecv(second, result, moe));
  GIVES(xcclInvalidArgument, "is not under way", xcclMoeCombineRecv(second, result, moe));
  CHECK(xcclMoeGiveUp(first, moe));
  GIVES(xcclInvalidArgument, "is not under way", xcclMoeGiveUp(first, moe));

  input.tokens = NULL;
  GIVES(xcclInvalidArgument, "xcclMoeInputRows", xcclMoeDispatchSend(&input, &first, moe));
  CHECK(xcclMoeInputRows(TOKENS, &at, &row_bytes, moe));
  EXPECT(row_bytes == HIDDEN * sizeof(float) && ((uintptr_t)at % 64) == 0);
  CHECK(xcclMoeInputRows(2, &at, &row_bytes, moe)); /* takes the first ones back */
  GIVES(xcclInvalidArgument, "(rows)", xcclMoeDispatchSend(&input, &first, moe));
  CHECK(xcclMoeInputRows(2, &at, &row_bytes, moe));
  input.tokens = tokens; /* these instead */
  CHECK(xcclMoeDispatchSend(&input, &first, moe));
  CHECK(xcclMoeGiveUp(first, moe));
  GIVES(xcclInvalidArgument, "limit is 4", xcclMoeInputRows(TOKENS + 1, &at, &row_bytes, moe));
  quantized(&input);
  placements();

  CHECK(xcclIrecv(result, 4, 0, 9, comm, &request));
  GIVES(xcclTimeout, "rank 0", xcclWait(request, &status, comm));
  CHECK(xcclSend(tokens, 4, 0, 9, comm));
  CHECK(xcclWait(request, &status, comm));
  EXPECT(status.bytes == 4);
  GIVES(xcclInvalidArgument, "is over", xcclWait(request, &status, comm));
  GIVES(xcclInvalidArgument, "is over", xcclTest(request, &source, &status, comm));
  GIVES(xcclInvalidArgument, "is over", xcclRequestFree(request, comm));
  GIVES(xcclInvalidArgument, "requests[0]", xcclWaitAll(1, &request, NULL, comm));

  CHECK(xcclMemAlloc(&at, 100, comm));
  GIVES(xcclInvalidArgument, "xcclMemAlloc", xcclMemFree((char *)at + 8, comm));
  CHECK(xcclMemFree(at, comm));
  GIVES(xcclInvalidArgument, "was freed", xcclMemFree(at, comm));
  GIVES(xcclOutOfMemory, "heap", xcclMemAlloc(&at, (size_t)1 << 40, comm));
}

/* One-sided access and KV pages: what is refused, and with which words. One rank. */
static void one_sided(void) {
  xcclRemote_t remote = shared_remote;
  xcclKvEvent_t event = XCCL_KV_EVENT_INITIALIZER;
  xcclKvTicket_t request = 7;
  xcclKvConfig_t config = good_pages();
  xcclPageLayout_t layout = good_layout();
  xcclKvReceiver_t other = NULL;
  uint64_t found;
  uint32_t page = 0;
  void *own;
  int over;
  GIVES(xcclInvalidArgument, "at most 4096", xcclPut(memory, 4097, remote, comm));
  GIVES(xcclInvalidArgument, "data is a null pointer", xcclPut(NULL, 1, remote, comm));
  remote.bytes = 4;
  GIVES(xcclInvalidArgument, "holds no word", xcclSignal(remote, xcclUpdateAdd, 1, comm));
  remote = shared_remote;
  GIVES(xcclInvalidArgument, "op is 2", xcclSignal(remote, 2, 1, comm));
  GIVES(xcclInvalidArgument, "until is 6", xcclSignalWait((uint64_t *)(void *)shared, 6, 1, 0, NULL, comm));
  GIVES(xcclTimeout, "signal_wait", xcclSignalWait((uint64_t *)(void *)shared, xcclUntilEq, 99, 0, NULL, comm));
  GIVES(xcclInvalidArgument, "xcclSharedAlloc", xcclSignalFetch(nothing, &found, comm));
  remote.rank = 3;
  GIVES(xcclInvalidArgument, "rank 3", xcclGet(memory, 1, remote, comm));
  GIVES(xcclInvalidArgument, "rank 3", xcclFence(3, comm));
  /* Memory of xcclMemAlloc is nobody else's, whatever is said of it. */
  CHECK(xcclMemAlloc(&own, 256, comm));
  GIVES(xcclInvalidArgument, "xcclSharedAlloc", xcclSharedRemote(own, 8, &remote, comm));
  remote = shared_remote;
  remote.offset -= (uint64_t)(shared - (char *)own);
  GIVES(xcclInvalidArgument, "not shared memory", xcclPut(memory, 8, remote, comm));
  CHECK(xcclMemFree(own, comm));
  GIVES(xcclInvalidArgument, "xcclSharedAlloc", xcclSharedFree(shared + 8, comm));
  GIVES(xcclOutOfMemory, "heap", xcclSharedAlloc(&own, (size_t)1 << 40, comm));

  GIVES(xcclInvalidArgument, "no KV sender", xcclKvPost(0, 1, &page, 1, 1, &request, receiver));
  EXPECT(request == 7);
  GIVES(xcclInvalidUsage, "in flight", xcclKvReceiverWait(&event, receiver));
  GIVES(xcclInvalidUsage, "in flight", xcclKvWaitLayer(7, 0, receiver));
  GIVES(xcclInvalidUsage, "it is over", xcclKvPush(7, 0, memory, POOL, NULL, 0, &over, sender));
  GIVES(xcclTimeout, "kv send", xcclKvSenderWait(&event, sender));
  CHECK(xcclKvSenderPoll(&event, sender));
  EXPECT(event.kind == xcclKvNothing && event.ticket == XCCL_KV_TICKET_NULL && event.peer == -1);
  GIVES(xcclInvalidArgument, "beginning of its block", xcclKvReceiverCreate(&other, comm, &config, (char *)pool + 64, &layout));
  layout.pages = PAGES + 1;
  layout.layer_stride = (PAGES + 1) * PAGE_BYTES;
  GIVES(xcclInvalidArgument, "the pool's", xcclKvReceiverCreate(&other, comm, &config, pool, &layout));
  layout.page_stride = 1;
  GIVES(xcclInvalidArgument, "overlap", xcclKvReceiverCreate(&other, comm, &config, pool, &layout));
  config.max_requests = 257;
  GIVES(xcclInvalidArgument, "max_requests", xcclKvReceiverCreate(&other, comm, &config, pool, &layout));
  GIVES(xcclInvalidArgument, "is not a receiver", xcclKvReceiverPoll(&event, (xcclKvReceiver_t)(void *)sender));
}

/* A sender here and a receiver on rank 1, if there is one; and the other way round. */
static void make_kv(xcclKvSender_t *to, xcclKvReceiver_t *from, xcclComm_t of, void **pages, int rank) {
  xcclKvConfig_t config = good_pages();
  xcclPageLayout_t layout = good_layout();
  CHECK(xcclSharedAlloc(pages, POOL, of));
  if (rank == 0) CHECK(xcclKvSenderCreate(to, of, &config, &layout));
  CHECK(xcclKvReceiverCreate(from, of, &config, *pages, &layout));
  if (rank > 0) CHECK(xcclKvSenderCreate(to, of, &config, &layout));
}

/* A group of two: a micro-batch there and back, and what is refused, with which words. */
static void apart(int rank) {
  static const int32_t roles[2] = {0, -1}, all_experts[2] = {-1, -1}, holes[2] = {1, -1}, below[2] = {0, -2};
  static const int32_t elsewhere[EXPERTS] = {1, 1, 0, 1};
  xcclMoeConfig_t shape = good_shape();
  xcclA2EConfig_t config = XCCL_A2E_CONFIG_INITIALIZER;
  xcclA2E_t a2e = NULL;
  xcclMoeInput_t input = XCCL_MOE_INPUT_INITIALIZER;
  xcclA2EBatch_t batch = XCCL_A2E_BATCH_INITIALIZER;
  xcclExchange_t exchange = 0;
  float tokens[2 * HIDDEN], weights[2 * TOPK] = {1, 0, 2, 1}, sums[2 * HIDDEN];
  int32_t ids[2 * TOPK] = {3, -1, 0, 2};
  size_t i, column;
  config.moe = &shape;
  config.roles = below;
  GIVES(xcclInvalidArgument, "roles[1] is -2", xcclA2ECreate(&a2e, dead_comm, &config));
  config.roles = holes;
  GIVES(xcclInvalidArgument, "RoleConfig::attention", xcclA2ECreate(&a2e, dead_comm, &config));
  config.roles = all_experts;
  GIVES(xcclInvalidArgument, "RoleConfig::attention", xcclA2ECreate(&a2e, dead_comm, &config));
  config.roles = roles;
  config.forward = 3;
  GIVES(xcclInvalidArgument, "forward is 3", xcclA2ECreate(&a2e, dead_comm, &config));
  config.forward = xcclForwardTrampoline;
  shape.placement = elsewhere;
  GIVES(xcclInvalidArgument, "expert 2 is placed on rank 0", xcclA2ECreate(&a2e, dead_comm, &config));
  shape.placement = NULL;
  config.trampolines = rank ? 1 : 2;
  GIVES(xcclJoinFailed, "role configuration", xcclA2ECreate(&a2e, dead_comm, &config));
  config.trampolines = 0;
  EXPECT(a2e == NULL);
  CHECK(xcclA2ECreate(&a2e, dead_comm, &config));
  for (i = 0; i < 2 * HIDDEN; i++) tokens[i] = (float)i;
  input.tokens = tokens;
  input.num_tokens = 2;
  input.topk_ids = ids;
  input.topk_weights = weights;
  if (rank == 0) {
    GIVES(xcclInvalidUsage, "rank 0 holds attention of domain 0", xcclA2ERecv(&batch, a2e));
    GIVES(xcclInvalidUsage, "holds attention", xcclE2ASend(0, 1, XCCL_IN_PLACE, a2e));
    GIVES(xcclInvalidArgument, "not under way", xcclE2ARecv(1, sums, a2e));
    CHECK(xcclA2ESend(&input, &exchange, a2e));
    EXPECT(exchange == 1);
    CHECK(xcclE2ARecv(exchange, sums, a2e));
    /* Expert e adds e to each element. */
    for (column = 0; column < HIDDEN; column++) {
      EXPECT(sums[column] == tokens[column] + 3);
      EXPECT(sums[HIDDEN + column] == 2 * tokens[HIDDEN + column] + tokens[HIDDEN + column] + 2);
    }
  } else {
    GIVES(xcclInvalidUsage, "rank 1 holds experts", xcclA2ESend(&input, &exchange, a2e));
    GIVES(xcclInvalidUsage, "holds experts", xcclE2ARecv(1, sums, a2e));
    GIVES(xcclInvalidUsage, "holds experts", xcclA2EShutDown(a2e));
    CHECK(xcclA2ERecv(&batch, a2e));
    EXPECT(batch.end == xcclA2EGoesOn && batch.domain == 0 && batch.exchange == 1 && batch.num_rows == 3);
    EXPECT(batch.local_experts == EXPERTS && batch.offsets[EXPERTS] == 3 && batch.dtype == xcclFloat32);
    for (i = 0; i < batch.num_rows; i++) {
      const xcclMoeRow_t row = batch.rows[i];
      for (column = 0; column < HIDDEN; column++)
        ((float *)row.output)[column] = ((const float *)row.token_data)[column] + (float)row.expert;
    }
    GIVES(xcclInvalidArgument, "domain 1", xcclE2ASend(1, 1, XCCL_IN_PLACE, a2e));
    CHECK(xcclE2ASend(0, batch.exchange, XCCL_IN_PLACE, a2e));
    GIVES(xcclInvalidArgument, "sent back already", xcclE2ASend(0, 1, XCCL_IN_PLACE, a2e));
    CHECK(xcclA2ERecv(&batch, a2e));
    EXPECT(batch.end == xcclA2EDone && batch.num_rows == 0);
    CHECK(xcclA2ERecv(&batch, a2e));
    EXPECT(batch.end == xcclA2EDone);
  }
  CHECK(xcclA2EDestroy(a2e));
  GIVES(xcclInvalidArgument, "was destroyed", xcclA2EDestroy(a2e));
  dead_a2e = a2e;
}

/* A rank that does nothing wrong, while rank 0 does: each call has to end. */
static void good_rank(void) {
  int i;
  for (i = 0; i < 200; i++) {
    xcclMoeInput_t input = XCCL_MOE_INPUT_INITIALIZER;
    xcclMoeBatch_t batch = XCCL_MOE_BATCH_INITIALIZER;
    xcclExchange_t exchange = 0;
    float row[HIDDEN] = {0}, weights[TOPK] = {1, 1}, out[HIDDEN];
    int32_t ids[TOPK] = {0, 3};
    input.tokens = row;
    input.num_tokens = 1;
    input.topk_ids = ids;
    input.topk_weights = weights;
    if (xcclMoeDispatchSend(&input, &exchange, moe) != xcclSuccess) continue;
    if (xcclMoeDispatchRecv(exchange, &batch, moe) != xcclSuccess ||
        xcclMoeCombineSend(exchange, XCCL_IN_PLACE, moe) != xcclSuccess ||
        xcclMoeCombineRecv(exchange, out, moe) != xcclSuccess)
      (void)xcclMoeGiveUp(exchange, moe);
  }
}

int main(void) {
  xcclConfig_t config = XCCL_CONFIG_INITIALIZER;
  xcclMoeConfig_t shape = good_shape();
  int i, rank;

  config.timeout_ms = 10000;
  CHECK(xcclCommInitFromEnv(&dead_comm, &config));
  CHECK(xcclCommCount(dead_comm, &ranks));
  CHECK(xcclMoeCreate(&dead_moe, dead_comm, &shape));
  CHECK(xcclCommUserRank(dead_comm, &rank));
  make_kv(&dead_sender, &dead_receiver, dead_comm, &pool, rank);
  CHECK(xcclKvSenderDestroy(dead_sender));
  CHECK(xcclKvReceiverDestroy(dead_receiver));
  EXPECT(xcclKvSenderDestroy(dead_sender) == xcclInvalidArgument && xcclKvReceiverDestroy(dead_receiver) == xcclInvalidArgument);
  if (ranks == 2) apart(rank);
  CHECK(xcclBarrier(dead_comm));
  CHECK(xcclMoeDestroy(dead_moe));
  CHECK(xcclCommDestroy(dead_comm));
  EXPECT(xcclMoeDestroy(dead_moe) == xcclInvalidArgument && xcclCommDestroy(dead_comm) == xcclInvalidArgument);

  config.timeout_ms = ranks > 1 ? 100 : 5; /* time enough to join; then each wait for nothing costs as much */
  CHECK(xcclCommInitFromEnv(&comm, &config));
  CHECK(xcclCommUserRank(comm, &rank));
  CHECK(xcclMoeCreate(&moe, comm, &shape));
  CHECK(xcclSharedAlloc((void **)&shared, 4096, comm));
  CHECK(xcclSharedRemote(shared, 4096, &shared_remote, comm));
  make_kv(&sender, &receiver, comm, &pool, rank);
  if (rank > 0) {
    good_rank();
    printf("rank %d: every call has ended\n", rank);
    /* In order: the end of its process would end the other's calls. */
    CHECK(xcclKvSenderDestroy(sender));
    CHECK(xcclKvReceiverDestroy(receiver));
    CHECK(xcclMoeDestroy(moe));
    CHECK(xcclCommDestroy(comm));
    return 0;
  }
  if (ranks == 1) {
    wrong_orders();
    one_sided();
  }
  for (i = 0; i < CALLS; i++) {
    call();
    if (i % HEALTH_EVERY == 0) health();
  }
  health();
  printf("%d calls, %d of them refused, none harmful\n", CALLS, refused);
  EXPECT(refused > CALLS / 4 && refused < CALLS);
  for (i = 0; i < FUNCTIONS; i++) {
    if (tried[i].calls < 50 || tried[i].refused == 0) {
      fprintf(stderr, "%s: %d calls, %d refused\n", tried[i].name ? tried[i].name : "?", tried[i].calls, tried[i].refused);
      fail(__LINE__, "a function was not tried often enough, or never refused anything");
    }
  }
  CHECK(xcclKvSenderDestroy(sender));
  CHECK(xcclKvReceiverDestroy(receiver));
  CHECK(xcclMoeDestroy(moe));
  CHECK(xcclCommDestroy(comm));
  return 0;
}
