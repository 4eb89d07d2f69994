/*
 * XCCL for C++17: handles that clean up after themselves, over the C interface of xccl.h. Header-only, and without logic of
 * its own: what a call does, when it blocks and what can go wrong is said there, under the C function's name.
 *
 * Errors come in two styles. The types of namespace xccl throw xccl::Error. Those of xccl::expected return
 * xccl::Result<T> instead, which is what remains under -fno-exceptions. Both are the same templates.
 *
 *   auto comm = xccl::Communicator::from_env();
 *   comm.barrier();                                              // throws
 *
 *   auto joined = xccl::expected::Communicator::from_env();
 *   if (!joined) std::fprintf(stderr, "%s\n", joined.error().what());
 *   else if (auto met = joined->barrier(); !met) ...              // returns
 *
 * Destructors give up what was not finished (requests, exchanges) and never throw.
 */

#ifndef XCCL_HPP
#define XCCL_HPP

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <optional>
#include <string>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

#include "xccl.h"

#if defined(__cpp_exceptions)
#include <stdexcept>
#define XCCL_HAS_EXCEPTIONS 1
#else
#define XCCL_HAS_EXCEPTIONS 0
#endif

#if __cplusplus >= 202002L
#include <span>
#endif

namespace xccl {

#if __cplusplus >= 202002L
template <class T>
using span = std::span<T>;
#else
/** Elements that lie one after another, as std::span has them since C++20. */
template <class T>
class span {
 public:
  constexpr span() noexcept = default;
  constexpr span(T *data, std::size_t size) noexcept : data_(data), size_(size) {}
  template <std::size_t N>
  constexpr span(T (&array)[N]) noexcept : data_(array), size_(N) {}
  template <class C, class = decltype(std::declval<C &>().data()), class = decltype(std::declval<C &>().size())>
  constexpr span(C &&container) noexcept : data_(container.data()), size_(container.size()) {}
  constexpr T *data() const noexcept { return data_; }
  constexpr std::size_t size() const noexcept { return size_; }
  constexpr bool empty() const noexcept { return size_ == 0; }
  constexpr T &operator[](std::size_t i) const noexcept { return data_[i]; }
  constexpr T *begin() const noexcept { return data_; }
  constexpr T *end() const noexcept { return data_ + size_; }

 private:
  T *data_ = nullptr;
  std::size_t size_ = 0;
};
#endif

/** Which xcclDataType_t a type of rows or of a collective's buffers is. Specialize it for your own 16-bit types. */
template <class T>
struct data_type;
template <>
struct data_type<float> : std::integral_constant<xcclDataType_t, xcclFloat32> {};
#if defined(__FLT16_MAX__) && defined(__STDCPP_FLOAT16_T__)
template <>
struct data_type<_Float16> : std::integral_constant<xcclDataType_t, xcclFloat16> {};
#endif
template <>
struct data_type<std::uint8_t> : std::integral_constant<xcclDataType_t, xcclUint8> {};
template <>
struct data_type<std::int32_t> : std::integral_constant<xcclDataType_t, xcclInt32> {};
template <>
struct data_type<std::int64_t> : std::integral_constant<xcclDataType_t, xcclInt64> {};

/** xcclGetVersion: the library's, which may be newer than the header's XCCL_VERSION. */
inline int version() noexcept {
  int version = 0;
  xcclGetVersion(&version);
  return version;
}
/** xcclGetErrorString. */
inline const char *to_string(xcclResult_t result) noexcept { return xcclGetErrorString(result); }

/** Why a call failed: its code, and the text of xcclGetLastError. */
class Failure {
 public:
  Failure(xcclResult_t code, std::string text) : code_(code), text_(std::move(text)) {}
  xcclResult_t code() const noexcept { return code_; }
  const char *what() const noexcept { return text_.c_str(); }

 private:
  xcclResult_t code_;
  std::string text_;
};

#if XCCL_HAS_EXCEPTIONS
/** A Failure, thrown. */
class Error : public std::runtime_error {
 public:
  explicit Error(const Failure &failure) : std::runtime_error(failure.what()), code_(failure.code()) {}
  xcclResult_t code() const noexcept { return code_; }

 private:
  xcclResult_t code_;
};
#endif

/** A value or a Failure, for callers that do not want exceptions. */
template <class T>
class [[nodiscard]] Result {
 public:
  Result(T value) : held_(std::in_place_index<0>, std::move(value)) {}
  Result(Failure failure) : held_(std::in_place_index<1>, std::move(failure)) {}
  explicit operator bool() const noexcept { return held_.index() == 0; }
  /** Only when there is a value. */
  T &operator*() noexcept { return *std::get_if<0>(&held_); }
  T *operator->() noexcept { return std::get_if<0>(&held_); }
  /** Only when there is none. */
  const Failure &error() const noexcept { return *std::get_if<1>(&held_); }

 private:
  std::variant<T, Failure> held_;
};

template <>
class [[nodiscard]] Result<void> {
 public:
  Result() = default;
  Result(Failure failure) : failure_(std::move(failure)) {}
  explicit operator bool() const noexcept { return !failure_; }
  /** Only after a failure. */
  const Failure &error() const noexcept { return *failure_; }

 private:
  std::optional<Failure> failure_;
};

namespace detail {

/* How errors are told: `result<T>` is what calls return, `give` makes it of a code and of what gives the value. */
struct returning {
  template <class T>
  using result = Result<T>;
  template <class F>
  static auto give(xcclResult_t code, F value) -> Result<decltype(value())> {
    if (code != xcclSuccess) return Failure(code, xcclGetLastError());
    if constexpr (std::is_void_v<decltype(value())>) {
      value();
      return {};
    } else {
      return value();
    }
  }
};

#if XCCL_HAS_EXCEPTIONS
struct throwing {
  template <class T>
  using result = T;
  template <class F>
  static auto give(xcclResult_t code, F value) -> decltype(value()) {
    if (code != xcclSuccess) throw Error(Failure(code, xcclGetLastError()));
    return value();
  }
};
#endif

/* A handle that is given back once. */
template <class H, xcclResult_t (*Destroy)(H)>
class owned {
 public:
  explicit owned(H handle) noexcept : handle_(handle) {}
  owned(owned &&other) noexcept : handle_(std::exchange(other.handle_, H())) {}
  owned &operator=(owned &&other) noexcept {
    std::swap(handle_, other.handle_);
    return *this;
  }
  ~owned() {
    if (handle_) Destroy(handle_);
  }
  H get() const noexcept { return handle_; }
  H release() noexcept { return std::exchange(handle_, H()); }

 private:
  H handle_;
};

/* Something of an owner's that has a number or an address, and is given up unless it was finished. */
template <class V, class O, xcclResult_t (*GiveUp)(V, O)>
class part {
 public:
  part(V value, O owner) noexcept : value_(value), owner_(owner) {}
  part(part &&other) noexcept : value_(std::exchange(other.value_, V())), owner_(other.owner_) {}
  part &operator=(part &&other) noexcept {
    std::swap(value_, other.value_);
    std::swap(owner_, other.owner_);
    return *this;
  }
  ~part() {
    if (value_) GiveUp(value_, owner_);
  }
  V get() const noexcept { return value_; }
  O owner() const noexcept { return owner_; }
  /* It is over: there is nothing to give up. */
  void finish() noexcept { value_ = V(); }

 private:
  V value_;
  O owner_;
};

}  // namespace detail

/** Options of a communicator: all from the environment, until a field is set. */
struct Config : xcclConfig_t {
  Config() : xcclConfig_t XCCL_CONFIG_INITIALIZER {}
};

/** The shape of a MoE handle's exchanges. */
struct MoeConfig : xcclMoeConfig_t {
  MoeConfig() : xcclMoeConfig_t XCCL_MOE_CONFIG_INITIALIZER {}
  MoeConfig(std::size_t max_tokens, std::size_t hidden, std::size_t topk, std::size_t experts, xcclDataType_t dtype)
      : MoeConfig() {
    this->max_tokens = max_tokens;
    this->hidden = hidden;
    this->topk = topk;
    this->experts = experts;
    this->dtype = static_cast<std::uint32_t>(dtype);
  }
};

/** The tokens of one exchange. Null tokens lie in the rows of Moe::input_rows. */
struct MoeInput : xcclMoeInput_t {
  MoeInput() : xcclMoeInput_t XCCL_MOE_INPUT_INITIALIZER {}
  /** ids: [num_tokens, topk] of int32_t or int64_t; weights: [num_tokens, topk]; active: [num_tokens] or null. */
  template <class Id>
  MoeInput(const void *tokens, std::size_t num_tokens, const Id *ids, const float *weights,
           const std::uint8_t *active = nullptr)
      : MoeInput() {
    this->tokens = tokens;
    this->num_tokens = num_tokens;
    this->topk_ids = ids;
    this->topk_weights = weights;
    this->active = active;
    this->ids_type = static_cast<std::uint32_t>(data_type<Id>::value);
  }
};

/** What is done with the sums of a combine: nothing, until a field is set. */
struct MoeEpilogue : xcclMoeEpilogue_t {
  MoeEpilogue() : xcclMoeEpilogue_t XCCL_MOE_EPILOGUE_INITIALIZER {}
};

/** One lane's part of a call, for the threads that share it: xcclLaneWork_t. */
class LaneWork {
 public:
  LaneWork(xcclLaneWork_t work, void *state) noexcept : work_(work), state_(state) {}
  void operator()(std::size_t lane) const noexcept { work_(state_, lane); }

 private:
  xcclLaneWork_t work_;
  void *state_;
};

/** What arrived for this rank's experts: a view of the handle's memory, good until the exchange is combined. */
class Batch {
 public:
  explicit Batch(const xcclMoeBatch_t &batch) noexcept : batch_(batch) {}
  std::size_t size() const noexcept { return batch_.num_rows; }
  /** Rows of each local expert, and where they begin; one more at the end. */
  span<const std::uint32_t> counts() const noexcept { return {batch_.counts, batch_.local_experts}; }
  span<const std::uint32_t> offsets() const noexcept { return {batch_.offsets, batch_.local_experts + 1}; }
  span<const xcclMoeRow_t> rows() const noexcept { return {batch_.rows, batch_.num_rows}; }
  /** Row i where its sender has it, and where its output goes. */
  template <class T>
  span<const T> token(std::size_t i) const noexcept {
    return {static_cast<const T *>(batch_.rows[i].token_data), batch_.hidden};
  }
  /** The scales of row i's codes: none with xcclWireNative. */
  span<const float> scales(std::size_t i) const noexcept { return {batch_.rows[i].scales, batch_.row_scales}; }
  template <class T>
  span<T> output(std::size_t i) const noexcept {
    return {static_cast<T *>(batch_.rows[i].output), batch_.hidden};
  }
  const xcclMoeBatch_t &get() const noexcept { return batch_; }

 private:
  xcclMoeBatch_t batch_;
};

/** Who holds attention and who holds experts: the domain of each rank, or -1 for experts. Both arguments must outlive it. */
struct A2EConfig : xcclA2EConfig_t {
  A2EConfig() : xcclA2EConfig_t XCCL_A2E_CONFIG_INITIALIZER {}
  A2EConfig(const std::int32_t *roles, const xcclMoeConfig_t &moe) : A2EConfig() {
    this->roles = roles;
    this->moe = &moe;
  }
};

/** A micro-batch for experts, or the end of their loop. */
struct A2EBatch : xcclA2EBatch_t {
  A2EBatch() : xcclA2EBatch_t XCCL_A2E_BATCH_INITIALIZER {}
  /** Whether it is a micro-batch. */
  explicit operator bool() const noexcept { return end == xcclA2EGoesOn; }
};

/** The rows of one source; none and source -1 when all have come. */
struct Arrival {
  int source;
  span<const xcclMoeRow_t> rows;
};

template <class P>
class basic_moe;

template <class P>
class basic_a2e;

/** xcclRequest_t: cancelled unless it is over. Belongs to its communicator, which must outlive it. */
template <class P>
class basic_request {
 public:
  basic_request(xcclRequest_t request, xcclComm_t comm) noexcept : held_(request, comm) {}
  /** xcclWait. */
  typename P::template result<xcclStatus_t> wait() {
    xcclStatus_t status = {};
    return P::give(wait_into(&status), [&] { return status; });
  }
  /** xcclTest. */
  typename P::template result<std::optional<xcclStatus_t>> test() {
    xcclStatus_t status = {};
    int done = 0;
    xcclResult_t code = xcclTest(held_.get(), &done, &status, held_.owner());
    if (code != xcclSuccess || done) held_.finish();
    return P::give(code, [&] { return done ? std::optional<xcclStatus_t>(status) : std::nullopt; });
  }

 private:
  template <class>
  friend class basic_communicator;

  xcclResult_t wait_into(xcclStatus_t *status) {
    xcclResult_t code = xcclWait(held_.get(), status, held_.owner());
    if (code != xcclTimeout) held_.finish();
    return code;
  }

  detail::part<xcclRequest_t, xcclComm_t, xcclRequestFree> held_;
};

/** Memory of the symmetric heap (xcclMemAlloc). Its communicator must outlive it. */
class Block {
 public:
  Block(void *data, std::size_t size, xcclComm_t comm) noexcept : held_(data, comm), size_(size) {}
  std::byte *data() const noexcept { return static_cast<std::byte *>(held_.get()); }
  std::size_t size() const noexcept { return size_; }
  template <class T>
  span<T> as() const noexcept {
    return {static_cast<T *>(held_.get()), size_ / sizeof(T)};
  }

 private:
  detail::part<void *, xcclComm_t, xcclMemFree> held_;
  std::size_t size_;
};

/** Memory that every rank may read and write (xcclSharedAlloc). Its communicator must outlive it. */
class SharedBlock {
 public:
  SharedBlock(void *data, std::size_t size, const xcclRemote_t &remote, xcclComm_t comm) noexcept
      : held_(data, comm), size_(size), remote_(remote) {}
  std::byte *data() const noexcept { return static_cast<std::byte *>(held_.get()); }
  std::size_t size() const noexcept { return size_; }
  /** The word at an offset, for signal_fetch and signal_wait. */
  const std::uint64_t *word(std::size_t offset) const noexcept {
    return reinterpret_cast<const std::uint64_t *>(data() + offset);
  }
  /** How other ranks name it, without its first bytes. */
  xcclRemote_t remote(std::size_t skip = 0) const noexcept {
    return {remote_.rank, remote_.offset + skip, skip < remote_.bytes ? remote_.bytes - skip : 0};
  }

 private:
  detail::part<void *, xcclComm_t, xcclSharedFree> held_;
  std::size_t size_;
  xcclRemote_t remote_;
};

/** The shape of KV transfer. */
struct KvConfig : xcclKvConfig_t {
  KvConfig() : xcclKvConfig_t XCCL_KV_CONFIG_INITIALIZER {}
  KvConfig(std::size_t layers, std::size_t page_bytes) : KvConfig() {
    this->layers = layers;
    this->page_bytes = page_bytes;
  }
};

/** xcclKvSender_t. */
template <class P>
class basic_kv_sender {
 public:
  template <class T>
  using result = typename P::template result<T>;

  explicit basic_kv_sender(xcclKvSender_t sender) noexcept : held_(sender) {}

  /** xcclKvSenderPoll. */
  result<xcclKvEvent_t> poll() {
    xcclKvEvent_t event = XCCL_KV_EVENT_INITIALIZER;
    return P::give(xcclKvSenderPoll(&event, get()), [&] { return event; });
  }
  /** xcclKvSenderWait. */
  result<xcclKvEvent_t> wait() {
    xcclKvEvent_t event = XCCL_KV_EVENT_INITIALIZER;
    return P::give(xcclKvSenderWait(&event, get()), [&] { return event; });
  }
  /** xcclKvSenderPages. */
  result<void> pages(xcclKvTicket_t ticket, span<std::uint32_t> pages) {
    return P::give(xcclKvSenderPages(ticket, pages.data(), pages.size(), get()), [] {});
  }
  /** xcclKvPush; whether the request is over. */
  result<bool> push(xcclKvTicket_t ticket, std::size_t layer, span<const std::byte> pool, span<const xcclPagePair_t> pages) {
    int over = 0;
    return P::give(xcclKvPush(ticket, layer, pool.data(), pool.size(), pages.data(), pages.size(), &over, get()),
                   [&] { return over != 0; });
  }
  /** xcclKvSenderCancel. */
  result<void> cancel(xcclKvTicket_t ticket) {
    return P::give(xcclKvSenderCancel(ticket, get()), [] {});
  }
  xcclKvSender_t get() const noexcept { return held_.get(); }

 private:
  detail::owned<xcclKvSender_t, xcclKvSenderDestroy> held_;
};

/** xcclKvReceiver_t. */
template <class P>
class basic_kv_receiver {
 public:
  template <class T>
  using result = typename P::template result<T>;

  explicit basic_kv_receiver(xcclKvReceiver_t receiver) noexcept : held_(receiver) {}

  /** xcclKvPost; XCCL_KV_TICKET_NULL when it would block. */
  result<xcclKvTicket_t> post(int from, std::uint64_t id, span<const std::uint32_t> pages, std::size_t last_page_bytes) {
    xcclKvTicket_t ticket = XCCL_KV_TICKET_NULL;
    return P::give(xcclKvPost(from, id, pages.data(), pages.size(), last_page_bytes, &ticket, get()), [&] { return ticket; });
  }
  /** xcclKvLayerReady. */
  result<bool> layer_ready(xcclKvTicket_t ticket, std::size_t layer) {
    int ready = 0;
    return P::give(xcclKvLayerReady(ticket, layer, &ready, get()), [&] { return ready != 0; });
  }
  /** xcclKvWaitLayer. */
  result<void> wait_layer(xcclKvTicket_t ticket, std::size_t layer) {
    return P::give(xcclKvWaitLayer(ticket, layer, get()), [] {});
  }
  /** xcclKvReceiverCancel. */
  result<void> cancel(xcclKvTicket_t ticket) {
    return P::give(xcclKvReceiverCancel(ticket, get()), [] {});
  }
  /** xcclKvReceiverPoll. */
  result<xcclKvEvent_t> poll() {
    xcclKvEvent_t event = XCCL_KV_EVENT_INITIALIZER;
    return P::give(xcclKvReceiverPoll(&event, get()), [&] { return event; });
  }
  /** xcclKvReceiverWait. */
  result<xcclKvEvent_t> wait() {
    xcclKvEvent_t event = XCCL_KV_EVENT_INITIALIZER;
    return P::give(xcclKvReceiverWait(&event, get()), [&] { return event; });
  }
  xcclKvReceiver_t get() const noexcept { return held_.get(); }

 private:
  detail::owned<xcclKvReceiver_t, xcclKvReceiverDestroy> held_;
};

/** xcclComm_t. */
template <class P>
class basic_communicator {
 public:
  template <class T>
  using result = typename P::template result<T>;
  using request = basic_request<P>;

  explicit basic_communicator(xcclComm_t comm) noexcept : held_(comm) {}

  /** xcclCommInitFromEnv. */
  static result<basic_communicator> from_env(const xcclConfig_t &config = Config()) {
    xcclComm_t comm = nullptr;
    return P::give(xcclCommInitFromEnv(&comm, &config), [&] { return basic_communicator(comm); });
  }
  /** xcclGetUniqueId. */
  static result<xcclUniqueId> unique_id() {
    xcclUniqueId id;
    return P::give(xcclGetUniqueId(&id), [&] { return id; });
  }
  /** xcclGetUniqueIdAt. */
  static result<xcclUniqueId> unique_id_at(const char *address) {
    xcclUniqueId id;
    return P::give(xcclGetUniqueIdAt(&id, address), [&] { return id; });
  }
  /** xcclCommInitRankConfig. */
  static result<basic_communicator> init(int ranks, const xcclUniqueId &id, int rank,
                                         const xcclConfig_t &config = Config()) {
    xcclComm_t comm = nullptr;
    return P::give(xcclCommInitRankConfig(&comm, ranks, id, rank, &config), [&] { return basic_communicator(comm); });
  }
  /** xcclCommSplit; nothing for a rank without a colour. */
  result<std::optional<basic_communicator>> split(std::optional<int> color, int key) {
    xcclComm_t comm = nullptr;
    return P::give(xcclCommSplit(get(), color.value_or(XCCL_SPLIT_NOCOLOR), key, &comm), [&] {
      return comm ? std::optional<basic_communicator>(basic_communicator(comm)) : std::nullopt;
    });
  }
  /** xcclCommDuplicate. */
  result<basic_communicator> duplicate() {
    xcclComm_t comm = nullptr;
    return P::give(xcclCommDuplicate(get(), &comm), [&] { return basic_communicator(comm); });
  }
  /** xcclCommUserRank. */
  result<int> rank() const {
    int rank = 0;
    return P::give(xcclCommUserRank(get(), &rank), [&] { return rank; });
  }
  /** xcclCommCount. */
  result<int> size() const {
    int count = 0;
    return P::give(xcclCommCount(get(), &count), [&] { return count; });
  }
  /** xcclBarrier. */
  result<void> barrier() {
    return P::give(xcclBarrier(get()), [] {});
  }
  /** xcclCommAbort. */
  result<void> abort() {
    return P::give(xcclCommAbort(get()), [] {});
  }
  /** xcclCommAbortWith. */
  result<void> abort(int code, const char *why) {
    return P::give(xcclCommAbortWith(get(), code, why), [] {});
  }
  /** xcclCommShrink. */
  result<basic_communicator> shrink() {
    xcclComm_t comm = nullptr;
    return P::give(xcclCommShrink(get(), &comm), [&] { return basic_communicator(comm); });
  }
  /** xcclCommRollback, with the iteration that all have finished. */
  result<std::pair<basic_communicator, std::uint64_t>> rollback(std::uint64_t finished) {
    xcclComm_t comm = nullptr;
    std::uint64_t agreed = 0;
    return P::give(xcclCommRollback(get(), finished, &comm, &agreed),
                   [&] { return std::pair<basic_communicator, std::uint64_t>(basic_communicator(comm), agreed); });
  }
  /** xcclCommGetNewId. */
  result<xcclUniqueId> new_id() {
    xcclUniqueId id;
    return P::give(xcclCommGetNewId(get(), &id), [&] { return id; });
  }
  /** xcclCommFormerRank. */
  result<int> former_rank(int rank) const {
    int former = 0;
    return P::give(xcclCommFormerRank(get(), rank, &former), [&] { return former; });
  }
  /** xcclCommGetStatistics. */
  result<xcclStatistics_t> statistics() const {
    xcclStatistics_t statistics = XCCL_STATISTICS_INITIALIZER;
    return P::give(xcclCommGetStatistics(get(), &statistics), [&] { return statistics; });
  }
  /** xcclCommGetWaitTimes: nanoseconds waited for each rank. */
  result<std::vector<std::uint64_t>> wait_times(bool take = false) const {
    int ranks = 0;
    xcclResult_t code = xcclCommCount(get(), &ranks);
    std::vector<std::uint64_t> times(static_cast<std::size_t>(ranks));
    if (code == xcclSuccess) code = xcclCommGetWaitTimes(get(), times.data(), times.size(), take);
    return P::give(code, [&] { return std::move(times); });
  }
  /** xcclCommGetHistory: the last operations of a rank, the oldest first. */
  result<std::vector<xcclHistoryRecord_t>> history(int rank) const {
    std::vector<xcclHistoryRecord_t> records(64);
    std::size_t count = 0;
    const xcclResult_t code = xcclCommGetHistory(get(), rank, records.data(), records.size(), &count);
    records.resize(count);
    return P::give(code, [&] { return std::move(records); });
  }
  /** xcclCommGetStatusText. */
  result<std::string> status_text() const {
    std::string text(4096, '\0');
    std::size_t length = 0;
    xcclResult_t code;
    // Until it fits: it may grow meanwhile.
    while ((code = xcclCommGetStatusText(get(), &text[0], text.size(), &length)) == xcclTruncated) {
      text.resize(length + 1024);
    }
    text.resize(length);
    return P::give(code, [&] { return std::move(text); });
  }
  /** xcclCommProbe: nanoseconds that the rank takes to answer. */
  result<std::uint64_t> probe(int rank, std::chrono::milliseconds within) const {
    std::uint64_t time = 0;
    return P::give(xcclCommProbe(get(), rank, within.count(), &time), [&] { return time; });
  }
  /** xcclSend. */
  result<void> send(const void *data, std::size_t bytes, int peer, std::uint32_t tag) {
    return P::give(xcclSend(data, bytes, peer, tag, get()), [] {});
  }
  /** xcclRecv. */
  result<xcclStatus_t> recv(void *buffer, std::size_t capacity, int source, std::uint32_t tag) {
    xcclStatus_t status = {};
    return P::give(xcclRecv(buffer, capacity, source, tag, &status, get()), [&] { return status; });
  }
  /** xcclIsend: data must stay as it is until the request is over or dropped. */
  result<request> isend(const void *data, std::size_t bytes, int peer, std::uint32_t tag) {
    xcclRequest_t started = XCCL_REQUEST_NULL;
    return P::give(xcclIsend(data, bytes, peer, tag, get(), &started), [&] { return request(started, get()); });
  }
  /** xcclIrecv: buffer must be left alone until the request is over or dropped. */
  result<request> irecv(void *buffer, std::size_t capacity, int source, std::uint32_t tag) {
    xcclRequest_t started = XCCL_REQUEST_NULL;
    return P::give(xcclIrecv(buffer, capacity, source, tag, get(), &started), [&] { return request(started, get()); });
  }
  /** xcclWait for each of a range of requests, in turn, in whatever order they end: their statuses. After a failure the requests
   * behind that one are not over. */
  template <class Requests>
  result<std::vector<xcclStatus_t>> wait_all(Requests &&requests) {
    std::vector<xcclStatus_t> statuses;
    xcclResult_t code = xcclSuccess;
    for (request &one : requests) {
      code = one.wait_into(&statuses.emplace_back());
      if (code != xcclSuccess) break;
    }
    return P::give(code, [&] { return std::move(statuses); });
  }

  /* Collectives: the same buffer twice, or as the C function says, means in place. Those with an i in front return a request, and
     the buffers must be left alone until it is over; dropping it waits for it. */
  /** xcclAllReduce. */
  template <class T>
  result<void> all_reduce(const T *send, T *recv, std::size_t count, xcclRedOp_t op = xcclSum) {
    return P::give(xcclAllReduce(send, recv, count, type<T>(), op, get()), [] {});
  }
  /** xcclIAllReduce. */
  template <class T>
  result<request> iall_reduce(const T *send, T *recv, std::size_t count, xcclRedOp_t op = xcclSum) {
    xcclRequest_t started = XCCL_REQUEST_NULL;
    return P::give(xcclIAllReduce(send, recv, count, type<T>(), op, get(), &started), [&] { return request(started, get()); });
  }
  /** xcclReduce. */
  template <class T>
  result<void> reduce(const T *send, T *recv, std::size_t count, xcclRedOp_t op, int root) {
    return P::give(xcclReduce(send, recv, count, type<T>(), op, root, get()), [] {});
  }
  /** xcclIReduce. */
  template <class T>
  result<request> ireduce(const T *send, T *recv, std::size_t count, xcclRedOp_t op, int root) {
    xcclRequest_t started = XCCL_REQUEST_NULL;
    return P::give(xcclIReduce(send, recv, count, type<T>(), op, root, get(), &started), [&] { return request(started, get()); });
  }
  /** xcclReduceScatter. */
  template <class T>
  result<void> reduce_scatter(const T *send, T *recv, std::size_t recv_count, xcclRedOp_t op = xcclSum) {
    return P::give(xcclReduceScatter(send, recv, recv_count, type<T>(), op, get()), [] {});
  }
  /** xcclIReduceScatter. */
  template <class T>
  result<request> ireduce_scatter(const T *send, T *recv, std::size_t recv_count, xcclRedOp_t op = xcclSum) {
    xcclRequest_t started = XCCL_REQUEST_NULL;
    return P::give(xcclIReduceScatter(send, recv, recv_count, type<T>(), op, get(), &started), [&] { return request(started, get()); });
  }
  /** xcclAllGather. */
  template <class T>
  result<void> all_gather(const T *send, T *recv, std::size_t send_count) {
    return P::give(xcclAllGather(send, recv, send_count, type<T>(), get()), [] {});
  }
  /** xcclIAllGather. */
  template <class T>
  result<request> iall_gather(const T *send, T *recv, std::size_t send_count) {
    xcclRequest_t started = XCCL_REQUEST_NULL;
    return P::give(xcclIAllGather(send, recv, send_count, type<T>(), get(), &started), [&] { return request(started, get()); });
  }
  /** xcclGather. */
  template <class T>
  result<void> gather(const T *send, T *recv, std::size_t send_count, int root) {
    return P::give(xcclGather(send, recv, send_count, type<T>(), root, get()), [] {});
  }
  /** xcclIGather. */
  template <class T>
  result<request> igather(const T *send, T *recv, std::size_t send_count, int root) {
    xcclRequest_t started = XCCL_REQUEST_NULL;
    return P::give(xcclIGather(send, recv, send_count, type<T>(), root, get(), &started), [&] { return request(started, get()); });
  }
  /** xcclScatter. */
  template <class T>
  result<void> scatter(const T *send, T *recv, std::size_t recv_count, int root) {
    return P::give(xcclScatter(send, recv, recv_count, type<T>(), root, get()), [] {});
  }
  /** xcclIScatter. */
  template <class T>
  result<request> iscatter(const T *send, T *recv, std::size_t recv_count, int root) {
    xcclRequest_t started = XCCL_REQUEST_NULL;
    return P::give(xcclIScatter(send, recv, recv_count, type<T>(), root, get(), &started), [&] { return request(started, get()); });
  }
  /** xcclBroadcast. */
  template <class T>
  result<void> broadcast(const T *send, T *recv, std::size_t count, int root) {
    return P::give(xcclBroadcast(send, recv, count, type<T>(), root, get()), [] {});
  }
  /** xcclIBroadcast. */
  template <class T>
  result<request> ibroadcast(const T *send, T *recv, std::size_t count, int root) {
    xcclRequest_t started = XCCL_REQUEST_NULL;
    return P::give(xcclIBroadcast(send, recv, count, type<T>(), root, get(), &started), [&] { return request(started, get()); });
  }
  /** xcclAllToAll. */
  template <class T>
  result<void> all_to_all(const T *send, T *recv, std::size_t count) {
    return P::give(xcclAllToAll(send, recv, count, type<T>(), get()), [] {});
  }
  /** xcclIAllToAll. */
  template <class T>
  result<request> iall_to_all(const T *send, T *recv, std::size_t count) {
    xcclRequest_t started = XCCL_REQUEST_NULL;
    return P::give(xcclIAllToAll(send, recv, count, type<T>(), get(), &started), [&] { return request(started, get()); });
  }
  /** xcclAllToAllv. */
  template <class T>
  result<void> all_to_all_v(const T *send, const std::size_t *send_counts, const std::size_t *send_displs, T *recv,
                            const std::size_t *recv_counts, const std::size_t *recv_displs) {
    return P::give(xcclAllToAllv(send, send_counts, send_displs, recv, recv_counts, recv_displs, type<T>(), get()), [] {});
  }
  /** xcclIAllToAllv. */
  template <class T>
  result<request> iall_to_all_v(const T *send, const std::size_t *send_counts, const std::size_t *send_displs, T *recv,
                            const std::size_t *recv_counts, const std::size_t *recv_displs) {
    xcclRequest_t started = XCCL_REQUEST_NULL;
    return P::give(xcclIAllToAllv(send, send_counts, send_displs, recv, recv_counts, recv_displs, type<T>(), get(), &started), [&] { return request(started, get()); });
  }
  /** xcclMemAlloc. */
  result<Block> alloc(std::size_t bytes) {
    void *data = nullptr;
    return P::give(xcclMemAlloc(&data, bytes, get()), [&] { return Block(data, bytes, get()); });
  }
  /** xcclSharedAlloc, and xcclSharedRemote for the whole block. */
  result<SharedBlock> shared_alloc(std::size_t bytes) {
    void *data = nullptr;
    xcclRemote_t remote = {};
    xcclResult_t code = xcclSharedAlloc(&data, bytes, get());
    if (code == xcclSuccess) code = xcclSharedRemote(data, bytes, &remote, get());
    return P::give(code, [&] { return SharedBlock(data, bytes, remote, get()); });
  }
  /** xcclPut. */
  result<void> put(const void *data, std::size_t bytes, const xcclRemote_t &to) {
    return P::give(xcclPut(data, bytes, to, get()), [] {});
  }
  /** xcclGet. */
  result<void> get(void *buffer, std::size_t bytes, const xcclRemote_t &from) {
    return P::give(xcclGet(buffer, bytes, from, get()), [] {});
  }
  /** xcclPutSignal. */
  result<void> put_signal(const void *data, std::size_t bytes, const xcclRemote_t &to, const xcclRemote_t &word,
                          xcclUpdate_t op, std::uint64_t value) {
    return P::give(xcclPutSignal(data, bytes, to, word, static_cast<std::uint32_t>(op), value, get()), [] {});
  }
  /** xcclSignal. */
  result<void> signal(const xcclRemote_t &word, xcclUpdate_t op, std::uint64_t value) {
    return P::give(xcclSignal(word, static_cast<std::uint32_t>(op), value, get()), [] {});
  }
  /** xcclSignalFetch. */
  result<std::uint64_t> signal_fetch(const std::uint64_t *word) const {
    std::uint64_t value = 0;
    return P::give(xcclSignalFetch(word, &value, get()), [&] { return value; });
  }
  /** xcclSignalWait. */
  result<std::uint64_t> signal_wait(const std::uint64_t *word, xcclUntil_t until, std::uint64_t value,
                                    int source = XCCL_ANY_SOURCE) {
    std::uint64_t found = 0;
    return P::give(xcclSignalWait(word, static_cast<std::uint32_t>(until), value, source, &found, get()),
                   [&] { return found; });
  }
  /** xcclAtomicFetch. */
  result<std::uint64_t> atomic_fetch(const xcclRemote_t &word) {
    std::uint64_t value = 0;
    return P::give(xcclAtomicFetch(word, &value, get()), [&] { return value; });
  }
  /** xcclAtomicSwap; the value before. */
  result<std::uint64_t> atomic_swap(const xcclRemote_t &word, std::uint64_t value) {
    std::uint64_t before = 0;
    return P::give(xcclAtomicSwap(word, value, &before, get()), [&] { return before; });
  }
  /** xcclAtomicFetchAdd; the value before. */
  result<std::uint64_t> atomic_fetch_add(const xcclRemote_t &word, std::uint64_t value) {
    std::uint64_t before = 0;
    return P::give(xcclAtomicFetchAdd(word, value, &before, get()), [&] { return before; });
  }
  /** xcclAtomicCompareSwap; the value before. */
  result<std::uint64_t> atomic_compare_swap(const xcclRemote_t &word, std::uint64_t expected, std::uint64_t value) {
    std::uint64_t before = 0;
    return P::give(xcclAtomicCompareSwap(word, expected, value, &before, get()), [&] { return before; });
  }
  /** xcclFence. */
  result<void> fence(int rank) {
    return P::give(xcclFence(rank, get()), [] {});
  }
  /** xcclQuiet. */
  result<void> quiet() {
    return P::give(xcclQuiet(get()), [] {});
  }
  /** xcclKvSenderCreate. */
  result<basic_kv_sender<P>> kv_sender(const xcclKvConfig_t &config, const xcclPageLayout_t &layout) {
    xcclKvSender_t sender = nullptr;
    return P::give(xcclKvSenderCreate(&sender, get(), &config, &layout), [&] { return basic_kv_sender<P>(sender); });
  }
  /** xcclKvReceiverCreate. */
  result<basic_kv_receiver<P>> kv_receiver(const xcclKvConfig_t &config, const SharedBlock &pool,
                                           const xcclPageLayout_t &layout) {
    xcclKvReceiver_t receiver = nullptr;
    return P::give(xcclKvReceiverCreate(&receiver, get(), &config, pool.data(), &layout),
                   [&] { return basic_kv_receiver<P>(receiver); });
  }
  /** xcclMoeCreate. */
  result<basic_moe<P>> moe(const xcclMoeConfig_t &config) {
    xcclMoe_t moe = nullptr;
    return P::give(xcclMoeCreate(&moe, get(), &config), [&] { return basic_moe<P>(moe); });
  }
  /** xcclA2ECreate. */
  result<basic_a2e<P>> a2e(const xcclA2EConfig_t &config) {
    xcclA2E_t a2e = nullptr;
    return P::give(xcclA2ECreate(&a2e, get(), &config), [&] { return basic_a2e<P>(a2e); });
  }
  xcclComm_t get() const noexcept { return held_.get(); }

 private:
  template <class T>
  static constexpr xcclDataType_t type() noexcept {
    return data_type<T>::value;
  }
  detail::owned<xcclComm_t, xcclCommDestroy> held_;
};

/** xcclExchange_t: given up unless it was combined. Belongs to its MoE handle, which must outlive it. */
template <class P>
class basic_exchange {
 public:
  template <class T>
  using result = typename P::template result<T>;

  basic_exchange(xcclExchange_t exchange, xcclMoe_t moe) noexcept : held_(exchange, moe) {}

  xcclExchange_t number() const noexcept { return held_.get(); }
  /** xcclMoeDispatchRecv. */
  result<Batch> dispatch_recv() {
    xcclMoeBatch_t batch = XCCL_MOE_BATCH_INITIALIZER;
    return P::give(xcclMoeDispatchRecv(number(), &batch, moe()), [&] { return Batch(batch); });
  }
  /** xcclMoeDispatchRecvSource. */
  result<Arrival> dispatch_recv_source() {
    int source = -1;
    const xcclMoeRow_t *rows = nullptr;
    std::size_t num_rows = 0;
    return P::give(xcclMoeDispatchRecvSource(number(), &source, &rows, &num_rows, moe()),
                   [&] { return Arrival{source, {rows, num_rows}}; });
  }
  /** xcclMoeDeviceBatch. */
  result<xcclDeviceBatch_t> device_batch() {
    xcclDeviceBatch_t batch = XCCL_DEVICE_BATCH_INITIALIZER;
    return P::give(xcclMoeDeviceBatch(number(), &batch, moe()), [&] { return batch; });
  }
  /** xcclMoeAwaitRows. */
  result<void> await_rows() {
    return P::give(xcclMoeAwaitRows(number(), moe()), [] {});
  }
  /** xcclMoeCopyExpertMajor. */
  result<void> copy_expert_major(void *to, std::size_t capacity_rows, std::size_t align = 1) {
    return P::give(xcclMoeCopyExpertMajor(number(), to, capacity_rows, align, moe()), [] {});
  }
  /** xcclMoeCopyPadded. */
  result<void> copy_padded(void *to, std::size_t capacity_rows, std::size_t capacity) {
    return P::give(xcclMoeCopyPadded(number(), to, capacity_rows, capacity, moe()), [] {});
  }
  /** xcclMoeCopyWireExpertMajor. */
  result<void> copy_wire_expert_major(void *values, std::size_t capacity_rows, float *scales, std::size_t capacity_scales,
                                      xcclScaleLayout_t layout, std::size_t align = 1) {
    return P::give(xcclMoeCopyWireExpertMajor(number(), values, capacity_rows, scales, capacity_scales, layout, align, moe()),
                   [] {});
  }
  /** xcclMoeCopyWirePadded. */
  result<void> copy_wire_padded(void *values, std::size_t capacity_rows, float *scales, std::size_t capacity_scales,
                                xcclScaleLayout_t layout, std::size_t capacity) {
    return P::give(xcclMoeCopyWirePadded(number(), values, capacity_rows, scales, capacity_scales, layout, capacity, moe()),
                   [] {});
  }
  /** xcclMoeSums. */
  result<span<const xcclMoeSum_t>> sums() {
    const xcclMoeSum_t *sums = nullptr;
    std::size_t num_sums = 0;
    return P::give(xcclMoeSums(number(), &sums, &num_sums, moe()), [&] { return span<const xcclMoeSum_t>(sums, num_sums); });
  }
  /** xcclMoeCombineSend: a buffer, XCCL_IN_PLACE, or XCCL_SUMMED. */
  result<void> combine_send(const void *outputs = XCCL_IN_PLACE) {
    return P::give(xcclMoeCombineSend(number(), outputs, moe()), [] {});
  }
  /** xcclMoeCombineRecv. */
  result<void> combine_recv(void *out) { return received(xcclMoeCombineRecv(number(), out, moe())); }
  /** xcclMoeCombineRecvWith. */
  result<void> combine_recv(void *out, const xcclMoeEpilogue_t &epilogue) {
    return received(xcclMoeCombineRecvWith(number(), out, &epilogue, moe()));
  }

 private:
  result<void> received(xcclResult_t code) {
    if (code != xcclInvalidArgument && code != xcclInvalidUsage) held_.finish();
    return P::give(code, [] {});
  }
  xcclMoe_t moe() const noexcept { return held_.owner(); }
  detail::part<xcclExchange_t, xcclMoe_t, xcclMoeGiveUp> held_;
};

/** xcclMoe_t. */
template <class P>
class basic_moe {
 public:
  template <class T>
  using result = typename P::template result<T>;
  using exchange = basic_exchange<P>;

  /** Rows of the outbox: row t begins t * row_bytes behind data. */
  struct InputRows {
    void *data;
    std::size_t row_bytes;
    template <class T>
    T *row(std::size_t t) const noexcept {
      return reinterpret_cast<T *>(static_cast<std::byte *>(data) + t * row_bytes);
    }
  };

  /** Rows of the outbox, in the wire format: row t's values and scales begin t * row_bytes behind the first ones. */
  struct InputWireRows {
    void *values;
    float *scales;
    std::size_t row_bytes;
    template <class T>
    T *row(std::size_t t) const noexcept {
      return reinterpret_cast<T *>(static_cast<std::byte *>(values) + t * row_bytes);
    }
    float *row_scales(std::size_t t) const noexcept {
      return reinterpret_cast<float *>(reinterpret_cast<std::byte *>(scales) + t * row_bytes);
    }
  };

  explicit basic_moe(xcclMoe_t moe) noexcept : held_(moe) {}

  /** xcclMoeLocalExperts. */
  result<std::size_t> local_experts() const {
    std::size_t local = 0;
    return P::give(xcclMoeLocalExperts(get(), &local), [&] { return local; });
  }
  /** xcclMoeSetLanes. */
  result<void> set_lanes(std::size_t lanes, xcclRunLanes_t run, void *context) {
    return P::give(xcclMoeSetLanes(lanes, run, context, get()), [] {});
  }
  /**
   * xcclMoeSetLanes with runner(lanes, work), which calls work(i) for each i below lanes and returns when all of these calls
   * have. The runner must outlive the handle or be replaced; an exception that leaves it ends the program.
   */
  template <class Runner>
  result<void> set_lanes(std::size_t lanes, Runner &runner) {
    const auto run = [](void *context, std::size_t lanes, xcclLaneWork_t work, void *state) noexcept {
      (*static_cast<Runner *>(context))(lanes, LaneWork(work, state));
    };
    return set_lanes(lanes, run, static_cast<void *>(&runner));
  }
  /** xcclMoeInputRows. */
  result<InputRows> input_rows(std::size_t num_tokens) {
    InputRows rows = {};
    return P::give(xcclMoeInputRows(num_tokens, &rows.data, &rows.row_bytes, get()), [&] { return rows; });
  }
  /** xcclMoeInputWireRows. */
  result<InputWireRows> input_wire_rows(std::size_t num_tokens) {
    InputWireRows rows = {};
    return P::give(xcclMoeInputWireRows(num_tokens, &rows.values, &rows.scales, &rows.row_bytes, get()), [&] { return rows; });
  }
  /** xcclMoeDispatchSend. */
  result<exchange> dispatch_send(const xcclMoeInput_t &input) {
    xcclExchange_t sent = 0;
    return P::give(xcclMoeDispatchSend(&input, &sent, get()), [&] { return exchange(sent, get()); });
  }
  /** xcclMoeOutbox. */
  result<span<const std::byte>> outbox(int rank) const {
    const void *base = nullptr;
    std::size_t bytes = 0;
    return P::give(xcclMoeOutbox(rank, &base, &bytes, get()),
                   [&] { return span<const std::byte>(static_cast<const std::byte *>(base), bytes); });
  }
  /** xcclMoeDispatch; gives the number of rows. */
  result<std::size_t> dispatch(const void *tokens, std::size_t num_tokens, const std::int32_t *ids, const float *weights,
                               void *expert_rows, std::size_t capacity_rows, std::uint32_t *expert_counts) {
    std::size_t rows = 0;
    return P::give(
        xcclMoeDispatch(tokens, num_tokens, ids, weights, expert_rows, capacity_rows, expert_counts, &rows, get()),
        [&] { return rows; });
  }
  /** xcclMoeCombine. */
  result<void> combine(const void *expert_outputs, void *out) {
    return P::give(xcclMoeCombine(expert_outputs, out, get()), [] {});
  }
  xcclMoe_t get() const noexcept { return held_.get(); }

 private:
  detail::owned<xcclMoe_t, xcclMoeDestroy> held_;
};

/** xcclA2E_t: an attention rank's side says at its end that it is done. */
template <class P>
class basic_a2e {
 public:
  template <class T>
  using result = typename P::template result<T>;
  explicit basic_a2e(xcclA2E_t a2e) noexcept : held_(a2e) {}

  /** xcclA2ESend: attention. */
  result<xcclExchange_t> a2e_send(const xcclMoeInput_t &input) {
    xcclExchange_t sent = 0;
    return P::give(xcclA2ESend(&input, &sent, get()), [&] { return sent; });
  }
  /** xcclE2ARecv: attention. */
  result<void> e2a_recv(xcclExchange_t exchange, void *out) {
    return P::give(xcclE2ARecv(exchange, out, get()), [] {});
  }
  /** xcclA2ERecv: experts. */
  result<A2EBatch> a2e_recv() {
    A2EBatch batch;
    return P::give(xcclA2ERecv(&batch, get()), [&] { return batch; });
  }
  /** xcclE2ASend: experts; outputs in place unless they are given. */
  result<void> e2a_send(const xcclA2EBatch_t &batch, const void *outputs = XCCL_IN_PLACE) {
    return P::give(xcclE2ASend(batch.domain, batch.exchange, outputs, get()), [] {});
  }
  /** xcclA2EShutDown: attention; the handle is given up. */
  result<void> shut_down() {
    const xcclResult_t ended = xcclA2EShutDown(get());
    if (ended == xcclSuccess) held_.release();
    return P::give(ended, [] {});
  }
  xcclA2E_t get() const noexcept { return held_.get(); }

 private:
  detail::owned<xcclA2E_t, xcclA2EDestroy> held_;
};

namespace expected {
using Communicator = basic_communicator<detail::returning>;
using Request = basic_request<detail::returning>;
using Moe = basic_moe<detail::returning>;
using A2E = basic_a2e<detail::returning>;
using Exchange = basic_exchange<detail::returning>;
using KvSender = basic_kv_sender<detail::returning>;
using KvReceiver = basic_kv_receiver<detail::returning>;
}  // namespace expected

#if XCCL_HAS_EXCEPTIONS
using Communicator = basic_communicator<detail::throwing>;
using Request = basic_request<detail::throwing>;
using Moe = basic_moe<detail::throwing>;
using A2E = basic_a2e<detail::throwing>;
using Exchange = basic_exchange<detail::throwing>;
using KvSender = basic_kv_sender<detail::throwing>;
using KvReceiver = basic_kv_receiver<detail::throwing>;
#endif

}  // namespace xccl

#endif /* XCCL_HPP */
