// Uses every member of xccl.hpp: in the throwing style where there are exceptions, and in the returning one.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

#include "xccl.hpp"

#define EXPECT(condition)                                                     \
  do {                                                                        \
    if (!(condition)) {                                                       \
      std::fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #condition); \
      std::exit(1);                                                           \
    }                                                                         \
  } while (0)

namespace {

// The value of a result of either style.
template <class T>
T take(T &&value) {
  return std::forward<T>(value);
}
template <class T>
T take(xccl::Result<T> result) {
  if (!result) std::fprintf(stderr, "%s\n", result.error().what());
  EXPECT(result);
  return std::move(*result);
}
void take(xccl::Result<void> result) {
  if (!result) std::fprintf(stderr, "%s\n", result.error().what());
  EXPECT(result);
}
#define TAKE_VOID(call)                                                       \
  do {                                                                        \
    if constexpr (std::is_void_v<decltype(call)>) {                           \
      call;                                                                   \
    } else {                                                                  \
      take(call);                                                             \
    }                                                                         \
  } while (0)

constexpr std::size_t kTokens = 5, kHidden = 48, kTopk = 2, kExperts = 6;

float value(int rank, std::size_t i) { return static_cast<float>((rank * 3 + static_cast<int>(i)) % 11); }

template <class Communicator>
void messages(Communicator &comm) {
  const int rank = take(comm.rank()), ranks = take(comm.size()), right = (rank + 1) % ranks, left = (rank + ranks - 1) % ranks;
  int out = rank, in = -1;
  TAKE_VOID(comm.send(&out, sizeof out, right, 1));
  EXPECT(take(comm.recv(&in, sizeof in, left, 1)).source == left && in == left);

  auto from = take(comm.alloc(1 << 16)), to = take(comm.alloc(1 << 16));
  EXPECT(from.size() == 1 << 16 && from.template as<int>().size() == (1 << 16) / sizeof(int));
  std::memset(from.data(), rank + 1, from.size());
  auto receive = take(comm.irecv(to.data(), to.size(), left, 2));
  auto send = take(comm.isend(from.data(), from.size(), right, 2));
  EXPECT(take(send.wait()).bytes == from.size());
  std::optional<xcclStatus_t> done;
  while (!done) done = take(receive.test());
  EXPECT(done->source == left && to.data()[77] == std::byte(left + 1));
  {
    auto dropped = take(comm.irecv(to.data(), 1, left, 3));  // cancelled
  }
  using Request = std::decay_t<decltype(receive)>;
  std::vector<Request> both;
  both.push_back(take(comm.irecv(to.data(), to.size(), left, 4)));
  both.push_back(take(comm.isend(&out, sizeof out, right, 4)));
  auto statuses = take(comm.wait_all(both));
  EXPECT(statuses.size() == 2 && statuses[0].source == left && statuses[0].bytes == sizeof out);
  EXPECT(take(comm.statistics()).messages_sent >= 2);
  EXPECT(take(comm.wait_times()).size() == static_cast<std::size_t>(take(comm.size())));
  TAKE_VOID(comm.barrier());
  EXPECT(std::string(take(comm.history(take(comm.rank()))).back().operation) == "barrier");
  EXPECT(take(comm.status_text()).find("communicator ") == 0);
  take(comm.probe(take(comm.rank()), std::chrono::milliseconds(1000)));
  auto twin = take(comm.duplicate());
  EXPECT(take(twin.rank()) == rank && take(twin.size()) == ranks);
  take(twin.new_id());
  TAKE_VOID(twin.abort(7, "members.cpp"));
  auto rest = take(twin.shrink());
  EXPECT(take(rest.size()) == ranks && take(rest.former_rank(rank)) == rank);
  auto back = take(rest.rollback(static_cast<std::uint64_t>(rank) + 3));
  EXPECT(take(back.first.size()) == ranks && back.second == 3);
  TAKE_VOID(comm.barrier());
}

template <class Communicator>
void one_sided(Communicator &comm) {
  const int rank = take(comm.rank()), ranks = take(comm.size()), right = (rank + 1) % ranks;
  auto block = take(comm.shared_alloc(4096));
  EXPECT(block.size() == 4096 && block.remote().rank == static_cast<std::uint64_t>(rank) && block.remote(5000).bytes == 0);
  for (std::size_t at = 0; at < 4096; at += 8) TAKE_VOID(comm.signal(block.remote(at), xcclUpdateSet, 0));
  TAKE_VOID(comm.barrier());
  auto theirs = [&](int other, std::size_t skip) {
    auto remote = block.remote(skip);
    remote.rank = static_cast<std::uint64_t>(other);  // all have allocated the same
    return remote;
  };
  int word = rank, back = -1;
  TAKE_VOID(comm.put_signal(&word, sizeof word, theirs(right, 64), theirs(right, 0), xcclUpdateAdd, 1));
  EXPECT(take(comm.signal_wait(block.word(0), xcclUntilEq, 1)) == 1 && take(comm.signal_fetch(block.word(0))) == 1);
  TAKE_VOID(comm.get(&back, sizeof back, block.remote(64)));
  EXPECT(back == (rank + ranks - 1) % ranks);
  TAKE_VOID(comm.put(&word, sizeof word, theirs(rank, 128)));
  TAKE_VOID(comm.fence(right));
  TAKE_VOID(comm.quiet());
  EXPECT(*reinterpret_cast<const int *>(block.data() + 128) == rank);
  EXPECT(take(comm.atomic_fetch_add(theirs(0, 8), 1)) < static_cast<std::uint64_t>(ranks));
  TAKE_VOID(comm.barrier());
  EXPECT(take(comm.atomic_fetch(theirs(0, 8))) == static_cast<std::uint64_t>(ranks));
  EXPECT(take(comm.atomic_swap(block.remote(16), 5)) == 0 && take(comm.atomic_compare_swap(block.remote(16), 5, 6)) == 5);
  TAKE_VOID(comm.barrier());
}

/** Rank 0 sends pages to all others. */
template <class Communicator>
void kv(Communicator &comm) {
  const int rank = take(comm.rank()), ranks = take(comm.size());
  constexpr std::size_t kPage = 100, kPages = 6, kLayers = 2;
  xccl::KvConfig config(kLayers, kPage);
  config.max_pages = 4;
  const xcclPageLayout_t layout = {kPages, kPages * kPage, kPage};
  if (rank == 0) {
    std::vector<std::byte> pool(kLayers * kPages * kPage);
    for (std::size_t i = 0; i < pool.size(); i++) pool[i] = std::byte(i / kPage + 1);
    auto sender = take(comm.kv_sender(config, layout));
    auto event = take(sender.poll());
    for (int posted = 0; posted < 2 * (ranks - 1); event = posted < 2 * (ranks - 1) ? take(sender.wait()) : event) {
      // One that its receiver has cancelled soon enough is not even heard of.
      if (event.kind != xcclKvPosted || event.id == 9) continue;
      posted++;
      if (event.id == 8) {
        TAKE_VOID(sender.cancel(event.ticket));
        continue;
      }
      EXPECT(event.id == 7 && event.pages == 2 && event.last_page_bytes == 10);
      std::vector<std::uint32_t> pages(event.pages);
      TAKE_VOID(sender.pages(event.ticket, pages));
      const std::vector<xcclPagePair_t> pairs = {{0, pages[0]}, {1, pages[1]}};
      EXPECT(!take(sender.push(event.ticket, 0, pool, pairs)) && take(sender.push(event.ticket, 1, pool, pairs)));
    }
  } else {
    auto pool = take(comm.shared_alloc(kLayers * kPages * kPage));
    auto receiver = take(comm.kv_receiver(config, pool, layout));
    const std::vector<std::uint32_t> pages = {5, 2}, other = {1};
    const auto cancelled = take(receiver.post(0, 9, other, 1));
    TAKE_VOID(receiver.cancel(cancelled));
    auto event = take(receiver.wait());
    EXPECT(event.kind == xcclKvCancelled && event.ticket == cancelled);
    const auto ticket = take(receiver.post(0, 7, pages, 10));
    TAKE_VOID(receiver.wait_layer(ticket, 0));
    EXPECT(take(receiver.layer_ready(ticket, 0)) && pool.data()[5 * kPage] == std::byte(1));
    event = take(receiver.wait());
    EXPECT(event.kind == xcclKvDone && event.id == 7 && event.peer == 0 && event.result == xcclSuccess);
    EXPECT(pool.data()[(kPages + 2) * kPage + 9] == std::byte(kPages + 2));
    const auto second = take(receiver.post(0, 8, other, 1));
    while ((event = take(receiver.poll())).kind == xcclKvNothing) std::this_thread::yield();
    EXPECT(event.kind == xcclKvCancelled && event.ticket == second);
  }
}

template <class Request>
void finish(Request &&request) {
  take(request.wait());
}

// Each collective twice: at once, and by a request.
template <class Communicator>
void collectives(Communicator &comm) {
  const int rank = take(comm.rank()), ranks = take(comm.size()), root = ranks - 1;
  const std::size_t n = static_cast<std::size_t>(ranks);
  constexpr std::size_t kBlock = 3000;
  const float all_ranks = static_cast<float>(ranks * (ranks + 1) / 2);
  std::vector<float> block(kBlock), blocks(n * kBlock), result(kBlock), results(n * kBlock);
  auto fresh = [&] {
    for (std::size_t i = 0; i < kBlock; i++) block[i] = static_cast<float>(rank + 1);
    for (std::size_t i = 0; i < n * kBlock; i++) blocks[i] = static_cast<float>(rank + 1) + static_cast<float>(i / kBlock) * 100;
    std::fill(result.begin(), result.end(), -1.0f);
    std::fill(results.begin(), results.end(), -1.0f);
  };
  auto is = [&](const std::vector<float> &values, std::size_t at, float expected) {
    for (std::size_t i = 0; i < kBlock; i++) EXPECT(values[at * kBlock + i] == expected);
  };
  for (int later = 0; later < 2; later++) {
    fresh();
    if (later) finish(take(comm.iall_reduce(block.data(), result.data(), kBlock)));
    else TAKE_VOID(comm.all_reduce(block.data(), result.data(), kBlock));
    is(result, 0, all_ranks);
    fresh();
    if (later) finish(take(comm.ireduce(block.data(), result.data(), kBlock, xcclMax, root)));
    else TAKE_VOID(comm.reduce(block.data(), result.data(), kBlock, xcclMax, root));
    is(result, 0, rank == root ? static_cast<float>(ranks) : -1);
    fresh();
    if (later) finish(take(comm.ireduce_scatter(blocks.data(), result.data(), kBlock, xcclMin)));
    else TAKE_VOID(comm.reduce_scatter(blocks.data(), result.data(), kBlock, xcclMin));
    is(result, 0, 1 + 100 * static_cast<float>(rank));
    fresh();
    if (later) finish(take(comm.iall_gather(block.data(), results.data(), kBlock)));
    else TAKE_VOID(comm.all_gather(block.data(), results.data(), kBlock));
    for (std::size_t r = 0; r < n; r++) is(results, r, static_cast<float>(r + 1));
    fresh();
    if (later) finish(take(comm.igather(block.data(), results.data(), kBlock, root)));
    else TAKE_VOID(comm.gather(block.data(), results.data(), kBlock, root));
    for (std::size_t r = 0; r < n; r++) is(results, r, rank == root ? static_cast<float>(r + 1) : -1);
    fresh();
    if (later) finish(take(comm.iscatter(blocks.data(), result.data(), kBlock, root)));
    else TAKE_VOID(comm.scatter(blocks.data(), result.data(), kBlock, root));
    is(result, 0, static_cast<float>(ranks) + 100 * static_cast<float>(rank));
    fresh();
    if (later) finish(take(comm.ibroadcast(block.data(), result.data(), kBlock, root)));
    else TAKE_VOID(comm.broadcast(block.data(), result.data(), kBlock, root));
    is(result, 0, static_cast<float>(ranks));
    fresh();
    if (later) finish(take(comm.iall_to_all(blocks.data(), results.data(), kBlock)));
    else TAKE_VOID(comm.all_to_all(blocks.data(), results.data(), kBlock));
    for (std::size_t r = 0; r < n; r++) is(results, r, static_cast<float>(r + 1) + 100 * static_cast<float>(rank));
    fresh();
    std::vector<std::size_t> counts(n, kBlock), displs(n), reversed(n);
    for (std::size_t r = 0; r < n; r++) displs[r] = r * kBlock, reversed[r] = (n - 1 - r) * kBlock;
    if (later) {
      finish(take(comm.iall_to_all_v(blocks.data(), counts.data(), displs.data(), results.data(), counts.data(), reversed.data())));
    } else {
      TAKE_VOID(comm.all_to_all_v(blocks.data(), counts.data(), displs.data(), results.data(), counts.data(), reversed.data()));
    }
    for (std::size_t r = 0; r < n; r++) is(results, n - 1 - r, static_cast<float>(r + 1) + 100 * static_cast<float>(rank));
    // In place, as each function says.
    fresh();
    TAKE_VOID(comm.all_reduce(block.data(), block.data(), kBlock, xcclAvg));
    is(block, 0, all_ranks / static_cast<float>(ranks));
    TAKE_VOID(comm.reduce_scatter(blocks.data(), blocks.data() + static_cast<std::size_t>(rank) * kBlock, kBlock));
    is(blocks, static_cast<std::size_t>(rank), all_ranks + 100 * static_cast<float>(rank * ranks));
    std::vector<std::uint8_t> bytes(n, 0);
    bytes[static_cast<std::size_t>(rank)] = static_cast<std::uint8_t>(rank + 1);
    TAKE_VOID(comm.all_gather(&bytes[static_cast<std::size_t>(rank)], bytes.data(), 1));
    for (std::size_t r = 0; r < n; r++) EXPECT(bytes[r] == r + 1);
  }
}

template <class Moe>
void exchanges(Moe &moe, int rank, int ranks) {
  const std::size_t local = take(moe.local_experts());
  EXPECT(!take(moe.outbox(rank)).empty());
  std::vector<float> tokens(kTokens * kHidden), out(tokens.size()), weights(kTokens * kTopk, 0.5f);
  std::vector<std::int32_t> ids(weights.size());
  std::vector<std::int64_t> wide(weights.size());
  for (std::size_t i = 0; i < tokens.size(); i++) tokens[i] = value(rank, i);
  for (std::size_t i = 0; i < ids.size(); i++) wide[i] = ids[i] = static_cast<std::int32_t>((i * 5 + rank) % kExperts);
  // Both choices of a token have weight 0.5, and the experts double: the sums are twice the tokens.
  auto check = [&] {
    for (std::size_t i = 0; i < out.size(); i++) EXPECT(out[i] == 2 * tokens[i]);
  };
  const std::size_t most = ranks * kTokens * kTopk;
  std::vector<float> rows(most * kHidden * 2);

  // In place.
  auto exchange = take(moe.dispatch_send(xccl::MoeInput(tokens.data(), kTokens, wide.data(), weights.data())));
  EXPECT(exchange.number() > 0);
  auto batch = take(exchange.dispatch_recv());
  EXPECT(batch.counts().size() == local && batch.offsets()[local] == batch.size());
  EXPECT(batch.get().num_rows == batch.rows().size());
  for (std::size_t i = 0; i < batch.size(); i++) {
    auto x = batch.template token<float>(i);
    auto y = batch.template output<float>(i);
    EXPECT(x.size() == kHidden && y.size() == kHidden);
    for (std::size_t c = 0; c < kHidden; c++) y[c] = 2 * x[c];
  }
  TAKE_VOID(exchange.combine_send());
  TAKE_VOID(exchange.combine_recv(out.data()));
  check();

  // Source by source, from the outbox.
  auto input = take(moe.input_rows(kTokens));
  for (std::size_t t = 0; t < kTokens; t++) {
    std::memcpy(input.template row<float>(t), &tokens[t * kHidden], kHidden * sizeof(float));
  }
  exchange = take(moe.dispatch_send(xccl::MoeInput(nullptr, kTokens, ids.data(), weights.data())));
  int sources = 0;
  for (auto arrival = take(exchange.dispatch_recv_source()); arrival.source >= 0;
       arrival = take(exchange.dispatch_recv_source())) {
    sources++;
    for (const auto &row : arrival.rows) {
      EXPECT(static_cast<int>(row.source) == arrival.source);
      for (std::size_t c = 0; c < kHidden; c++) {
        static_cast<float *>(row.output)[c] = 2 * static_cast<const float *>(row.token_data)[c];
      }
    }
  }
  EXPECT(sources == ranks && take(exchange.dispatch_recv()).get().num_rows <= most);
  TAKE_VOID(exchange.combine_send());
  TAKE_VOID(exchange.combine_recv(out.data()));
  check();

  // Copied, and the sums formed here.
  exchange = take(moe.dispatch_send(xccl::MoeInput(tokens.data(), kTokens, ids.data(), weights.data())));
  batch = take(exchange.dispatch_recv());
  EXPECT(take(exchange.device_batch()).num_rows == batch.size());
  std::size_t capacity = 0;
  for (auto count : batch.counts()) capacity = count > capacity ? count : capacity;
  std::vector<float> padded(local * capacity * kHidden);
  TAKE_VOID(exchange.copy_padded(padded.data(), local * capacity, capacity));
  TAKE_VOID(exchange.copy_expert_major(rows.data(), 2 * most, 1));
  for (std::size_t e = 0, i = 0; e < local; e++) {
    for (std::size_t r = 0; r < batch.counts()[e]; r++, i++) {
      EXPECT(std::memcmp(&padded[(e * capacity + r) * kHidden], &rows[i * kHidden], kHidden * sizeof(float)) == 0);
    }
  }
  for (const auto &sum : take(exchange.sums())) {
    auto y = static_cast<float *>(sum.output);
    for (std::size_t c = 0; c < kHidden; c++) {
      y[c] = 0;
      for (std::uint32_t r = 0; r < sum.num_rows; r++) {
        y[c] += batch.rows()[sum.rows[r]].weight * 2 * rows[sum.rows[r] * kHidden + c];
      }
    }
  }
  if (batch.size() == 0) TAKE_VOID(exchange.await_rows());
  TAKE_VOID(exchange.combine_send(XCCL_SUMMED));
  TAKE_VOID(exchange.combine_recv(out.data()));
  check();

  // On two threads, with all that can be done with the sums: twice the token, for the weights of a token make 1.
  auto threads = [](std::size_t lanes, xccl::LaneWork work) {
    std::vector<std::thread> started;
    for (std::size_t i = 0; i < lanes; i++) started.emplace_back(work, i);
    for (auto &thread : started) thread.join();
  };
  TAKE_VOID(moe.set_lanes(2, threads));
  exchange = take(moe.dispatch_send(xccl::MoeInput(tokens.data(), kTokens, ids.data(), weights.data())));
  batch = take(exchange.dispatch_recv());
  TAKE_VOID(exchange.copy_expert_major(rows.data(), 2 * most, 1));
  for (auto &x : rows) x *= 2;
  TAKE_VOID(exchange.combine_send(rows.data()));
  std::vector<float> bias(kHidden, 3), stream(out.size(), 5), normed(out.size());
  xccl::MoeEpilogue epilogue;
  epilogue.bias = bias.data();
  epilogue.residual = stream.data();
  epilogue.norm_weight = bias.data();
  epilogue.normed = stream.data();
  epilogue.eps = 1e-6f;
  if constexpr (std::is_same_v<decltype(exchange), xccl::expected::Exchange>) {
    auto overlapping = exchange.combine_recv(stream.data(), epilogue);
    EXPECT(!overlapping && std::strstr(overlapping.error().what(), "out overlaps epilogue->normed"));
  }
  epilogue.normed = normed.data();
  TAKE_VOID(exchange.combine_recv(stream.data(), epilogue));
  for (std::size_t i = 0; i < stream.size(); i++) EXPECT(stream[i] == out[i] + 3 + 5);
  for (std::size_t t = 0; t < kTokens; t++) {
    double squares = 0;
    for (std::size_t c = 0; c < kHidden; c++) squares += stream[t * kHidden + c] * stream[t * kHidden + c];
    for (std::size_t c = 0; c < kHidden; c++) {
      const double expected = 3 * stream[t * kHidden + c] / std::sqrt(squares / kHidden + 1e-6);
      EXPECT(std::fabs(normed[t * kHidden + c] - expected) < 1e-5);
    }
  }
  TAKE_VOID(moe.set_lanes(0, nullptr, nullptr));

  // Joined.
  std::vector<std::uint32_t> counts(local);
  const std::size_t n =
      take(moe.dispatch(tokens.data(), kTokens, ids.data(), weights.data(), rows.data(), most, counts.data()));
  for (std::size_t i = 0; i < n * kHidden; i++) rows[i] *= 2;
  TAKE_VOID(moe.combine(rows.data(), out.data()));
  check();
}

/** Rows that the engine has quantized, handed over as they travel. */
template <class Moe>
void quantized(Moe &moe, int rank) {
  const std::size_t local = take(moe.local_experts());
  std::vector<float> weights(kTokens * kTopk, 0.5f), out(kTokens * kHidden);
  std::vector<std::int32_t> ids(weights.size());
  for (std::size_t i = 0; i < ids.size(); i++) ids[i] = static_cast<std::int32_t>((i * 5 + rank) % kExperts);
  auto input = take(moe.input_wire_rows(kTokens));
  for (std::size_t t = 0; t < kTokens; t++) {
    std::memset(input.template row<std::int8_t>(t), static_cast<int>(t + 1), kHidden);
    *input.row_scales(t) = 0.25f;
  }
  auto exchange = take(moe.dispatch_send(xccl::MoeInput(nullptr, kTokens, ids.data(), weights.data())));
  auto batch = take(exchange.dispatch_recv());
  EXPECT(batch.get().wire == xcclWireInt8);
  std::size_t capacity = 0;
  for (auto count : batch.counts()) capacity = count > capacity ? count : capacity;
  std::vector<std::int8_t> values(batch.size() * kHidden), padded(local * capacity * kHidden);
  std::vector<float> scales(batch.size()), columns(local * (capacity + 3) / 4 * 4 + local * 4);
  TAKE_VOID(exchange.copy_wire_expert_major(values.data(), batch.size(), scales.data(), scales.size(), xcclScaleRowMajor));
  TAKE_VOID(exchange.copy_wire_padded(padded.data(), local * capacity, columns.data(), columns.size(), xcclScaleColumnMajor,
                                      capacity));
  std::vector<float> outputs(batch.size() * kHidden);
  for (std::size_t i = 0; i < batch.size(); i++) {
    const auto &row = batch.rows()[i];
    const std::size_t within = i - batch.offsets()[row.expert];
    EXPECT(batch.scales(i).size() == 1 && batch.scales(i)[0] == 0.25f && scales[i] == 0.25f);
    EXPECT(columns[row.expert * ((capacity + 3) / 4 * 4) + within] == 0.25f);
    for (std::size_t c = 0; c < kHidden; c++) {
      const auto code = batch.template token<std::int8_t>(i)[c];
      EXPECT(code == static_cast<int>(row.token + 1) && values[i * kHidden + c] == code);
      EXPECT(padded[(row.expert * capacity + within) * kHidden + c] == code);
      outputs[i * kHidden + c] = code * scales[i];
    }
  }
  TAKE_VOID(exchange.combine_send(outputs.data()));
  TAKE_VOID(exchange.combine_recv(out.data()));
  for (std::size_t i = 0; i < out.size(); i++) EXPECT(out[i] == (i / kHidden + 1) * 0.25f);
}

// Rank 0 holds attention, the others experts: a micro-batch, then the end, in one of two ways.
template <class Communicator>
void apart(Communicator &comm, bool shut_down) {
  const int rank = take(comm.rank()), ranks = take(comm.size());
  std::vector<std::int32_t> roles(static_cast<std::size_t>(ranks), -1);
  roles[0] = 0;
  const xccl::MoeConfig shape(kTokens, kHidden, kTopk, kExperts, xcclFloat32);
  xccl::A2EConfig config(roles.data(), shape);
  config.forward = shut_down ? xcclForwardTrampoline : xcclForwardFlat;
  auto a2e = take(comm.a2e(config));
  if (rank > 0) {
    std::size_t served = 0;
    auto batch = take(a2e.a2e_recv());
    for (; batch; batch = take(a2e.a2e_recv())) {
      for (std::size_t i = 0; i < batch.num_rows; i++) std::fill_n(static_cast<float *>(batch.rows[i].output), kHidden, 2.0f);
      TAKE_VOID(a2e.e2a_send(batch));
      served++;
    }
    EXPECT(served == 1 && batch.end == static_cast<std::uint32_t>(shut_down ? xcclA2EWasShutDown : xcclA2EDone));
    return;
  }
  const std::vector<float> tokens(kHidden, 1.0f), weights = {0.5f, 1.0f};
  const std::vector<std::int32_t> ids = {1, 4};
  std::vector<float> out(kHidden);
  const auto sent = take(a2e.a2e_send(xccl::MoeInput(tokens.data(), 1, ids.data(), weights.data())));
  TAKE_VOID(a2e.e2a_recv(sent, out.data()));
  EXPECT(out == std::vector<float>(kHidden, 3.0f));
  if (shut_down) {
    TAKE_VOID(a2e.shut_down());
    EXPECT(a2e.get() == nullptr);
  }
}

template <class Communicator>
void everything(Communicator comm) {
  const int rank = take(comm.rank()), ranks = take(comm.size());
  messages(comm);
  one_sided(comm);
  kv(comm);
  collectives(comm);
  xccl::MoeConfig config(kTokens, kHidden, kTopk, kExperts, xcclFloat32);
  config.reduction = xcclReducePerRank;
  auto moe = take(comm.moe(config));
  exchanges(moe, rank, ranks);
  config.reduction = xcclReducePerExpert;
  config.wire = xcclWireInt8;
  auto int8 = take(comm.moe(config));
  quantized(int8, rank);
  for (const bool shut_down : {false, true})
    if (ranks > 1) apart(comm, shut_down);

  auto half = take(comm.split(rank % 2 ? std::optional<int>() : 0, -rank));
  EXPECT(half.has_value() == (rank % 2 == 0));
  if (half) EXPECT(take(half->size()) == (ranks + 1) / 2);
  xccl::Config options;
  options.timeout_ms = 5000;
  auto alone = take(Communicator::init(1, take(Communicator::unique_id()), 0, options));
  take(Communicator::unique_id_at("127.0.0.1:29500"));
  TAKE_VOID(alone.abort());
  auto moved = std::move(comm);
  EXPECT(comm.get() == nullptr && moved.get() != nullptr);
  TAKE_VOID(moved.barrier());
}

}  // namespace

int main() {
  EXPECT(xccl::version() == XCCL_VERSION && std::strcmp(xccl::to_string(xcclTimeout), "the deadline passed") == 0);
  auto joined = xccl::expected::Communicator::from_env();
  EXPECT(joined);
  auto refused = joined->send(nullptr, 8, 0, 1);
  EXPECT(!refused && refused.error().code() == xcclInvalidArgument);
  EXPECT(std::strstr(refused.error().what(), "xcclSend: data is a null pointer"));
  everything(std::move(*joined));
#if XCCL_HAS_EXCEPTIONS
  try {
    xccl::Communicator::init(0, xccl::Communicator::unique_id(), 0);
    EXPECT(!"thrown");
  } catch (const xccl::Error &error) {
    EXPECT(error.code() == xcclInvalidArgument && std::strstr(error.what(), "nranks is 0"));
  }
  everything(xccl::Communicator::from_env());
#endif
  return 0;
}
