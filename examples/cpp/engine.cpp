// The experts of a MoE layer on a pool of threads: each local expert is a thread of its own, which waits for a batch, reads its
// rows where their senders have them, writes the outputs where the peers read them, and counts what it has done.
//
//   xccl run -n 2 -- engine
#include <condition_variable>
#include <cstdio>
#include <mutex>
#include <thread>
#include <vector>

#include <xccl.hpp>
#include <xccl_device.h>

namespace {

constexpr std::size_t kTokens = 40, kHidden = 512, kTopk = 2, kExperts = 6, kSteps = 10;

float scale(std::size_t expert) { return 1.0f + 0.5f * static_cast<float>(expert); }

/// One thread per local expert.
class Experts {
 public:
  Experts(std::size_t local, std::size_t first) {
    for (std::size_t e = 0; e < local; e++) threads_.emplace_back([this, e, first] { run(e, scale(first + e)); });
  }
  ~Experts() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stop_ = true;
    }
    changed_.notify_all();
    for (auto &thread : threads_) thread.join();
  }
  /// Hands a batch to all of them. It has to be done before the next one.
  void start(const xcclDeviceBatch_t &batch) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      batch_ = batch;
      batches_++;
    }
    changed_.notify_all();
  }

 private:
  void run(std::size_t expert, float factor) {
    for (unsigned seen = 0;;) {
      xcclDeviceBatch_t batch;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        changed_.wait(lock, [&] { return stop_ || batches_ != seen; });
        if (stop_) return;
        seen = batches_;
        batch = batch_;
      }
      const auto begin = xcclDeviceExpertBegin(&batch, expert), end = xcclDeviceExpertBegin(&batch, expert + 1);
      for (auto i = begin; i < end; i++) {
        auto x = static_cast<const float *>(xcclDeviceToken(&batch, i));
        auto y = static_cast<float *>(xcclDeviceOutput(&batch, i));
        for (std::size_t c = 0; c < batch.hidden; c++) y[c] = factor * x[c];
      }
      xcclDevicePublish(&batch, end - begin);
    }
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  xcclDeviceBatch_t batch_ = XCCL_DEVICE_BATCH_INITIALIZER;
  unsigned batches_ = 0;
  bool stop_ = false;
  std::vector<std::thread> threads_;
};

int engine() {
  auto comm = xccl::Communicator::from_env();
  const int rank = comm.rank(), ranks = comm.size();
  auto moe = comm.moe(xccl::MoeConfig(kTokens, kHidden, kTopk, kExperts, xcclFloat32));
  const std::size_t local = moe.local_experts(), share = kExperts / ranks, larger = kExperts % ranks;
  const std::size_t first = rank * share + (static_cast<std::size_t>(rank) < larger ? rank : larger);
  Experts experts(local, first);

  std::vector<float> tokens(kTokens * kHidden), out(tokens.size()), weights(kTokens * kTopk);
  std::vector<std::int64_t> ids(weights.size());
  std::size_t rows = 0;
  for (std::size_t step = 0; step < kSteps; step++) {
    for (std::size_t i = 0; i < tokens.size(); i++) tokens[i] = static_cast<float>((rank * 5 + step + i) % 32);
    for (std::size_t i = 0; i < ids.size(); i++) {
      ids[i] = static_cast<std::int64_t>((rank + step + i / kTopk * 3 + i % kTopk) % kExperts);
      weights[i] = 0.25f * static_cast<float>(i % kTopk + 1);
    }
    auto exchange = moe.dispatch_send(xccl::MoeInput(tokens.data(), kTokens, ids.data(), weights.data()));
    rows += exchange.dispatch_recv().size();
    experts.start(exchange.device_batch());
    exchange.await_rows();
    exchange.combine_send();
    exchange.combine_recv(out.data());

    for (std::size_t i = 0; i < out.size(); i++) {
      float sum = 0;
      for (std::size_t k = 0; k < kTopk; k++) {
        const std::size_t choice = i / kHidden * kTopk + k;
        sum += weights[choice] * (scale(static_cast<std::size_t>(ids[choice])) * tokens[i]);
      }
      if (out[i] != sum) {
        std::fprintf(stderr, "step %zu, element %zu: %f, expected %f\n", step, i, double(out[i]), double(sum));
        return 1;
      }
    }
  }
  std::printf("rank %d of %d: %zu rows on %zu threads, all sums as expected\n", rank, ranks, rows, local);
  return 0;
}

}  // namespace

int main() {
  try {
    return engine();
  } catch (const xccl::Error &error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
