// A rank in C++: the joined calls, rows copied to an expert-major buffer, 32-bit ids.
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "protocol.h"
#include "xccl.hpp"

#define EXPECT(condition)                                                      \
  do {                                                                         \
    if (!(condition)) {                                                        \
      std::fprintf(stderr, "C++, line %d: not so: %s\n", __LINE__, #condition); \
      std::exit(1);                                                            \
    }                                                                          \
  } while (0)

static void messages(xccl::Communicator &comm, int rank, int ranks) {
  const int left = (rank + ranks - 1) % ranks;
  std::uint32_t tag = 0;
  for (std::size_t length : {std::size_t(SMALL), std::size_t(LONG)}) {
    std::vector<unsigned char> out(length), in(LONG);
    for (std::size_t i = 0; i < length; i++) out[i] = byte_of(rank, i);
    auto receive = comm.irecv(in.data(), in.size(), left, tag);
    comm.isend(out.data(), out.size(), (rank + 1) % ranks, tag).wait();
    EXPECT(receive.wait().bytes == length);
    for (std::size_t i = 0; i < length; i++) EXPECT(in[i] == byte_of(left, i));
    tag++;
  }
}

template <class T>
struct Element;
template <>
struct Element<float> {
  static constexpr xcclDataType_t type = xcclFloat32;
  static float to(float x) { return x; }
  static float from(float x) { return x; }
};
template <>
struct Element<std::uint16_t> {
  static constexpr xcclDataType_t type = xcclBfloat16;
  static std::uint16_t to(float x) { return to_bf16(x); }
  static float from(std::uint16_t x) { return from_bf16(x); }
};

template <class T>
static void exchanges(xccl::Communicator &comm, int rank, int ranks) {
  auto moe = comm.moe(xccl::MoeConfig(MAX_TOKENS, HIDDEN, TOPK, EXPERTS, Element<T>::type));
  const std::size_t most = static_cast<std::size_t>(ranks) * MAX_TOKENS * TOPK;
  std::vector<T> tokens(MAX_TOKENS * HIDDEN), out(tokens.size()), rows(most * HIDDEN);
  std::vector<std::int32_t> ids(MAX_TOKENS * TOPK);
  std::vector<float> weights(ids.size());
  std::vector<std::uint32_t> counts(moe.local_experts());
  for (int round = 0; round < ROUNDS; round++) {
    const std::size_t count = tokens_of(rank, round);
    for (std::size_t t = 0; t < count; t++) {
      for (std::size_t c = 0; c < HIDDEN; c++) tokens[t * HIDDEN + c] = Element<T>::to(value_of(rank, round, t, c));
      for (int k = 0; k < TOPK; k++) {
        ids[t * TOPK + k] = id_of(rank, round, t, k);
        weights[t * TOPK + k] = weight_of(k);
      }
    }
    const std::size_t arrived =
        moe.dispatch(tokens.data(), count, ids.data(), weights.data(), rows.data(), most, counts.data());
    std::size_t row = 0;
    for (std::size_t e = 0; e < counts.size(); e++) {
      for (std::uint32_t i = 0; i < counts[e]; i++, row++) {
        const float factor = static_cast<float>(rank * (EXPERTS / ranks) + static_cast<int>(e) + 1);
        for (std::size_t c = 0; c < HIDDEN; c++) {
          T &x = rows[row * HIDDEN + c];
          x = Element<T>::to(factor * Element<T>::from(x));
        }
      }
    }
    EXPECT(row == arrived);
    moe.combine(rows.data(), out.data());
    for (std::size_t t = 0; t < count; t++) {
      for (std::size_t c = 0; c < HIDDEN; c++) {
        EXPECT(Element<T>::from(out[t * HIDDEN + c]) == sum_of(rank, round, t, c));
      }
    }
  }
}

int main() try {
  auto comm = xccl::Communicator::from_env();
  const int rank = comm.rank(), ranks = comm.size();
  messages(comm, rank, ranks);
  auto half = comm.split(rank % 2, -rank);
  EXPECT(half && half->size() == ranks / 2);
  half->barrier();
  half.reset();
  exchanges<float>(comm, rank, ranks);
  exchanges<std::uint16_t>(comm, rank, ranks);
  if (const char *named = std::getenv("DIES")) {
    const int dies = std::atoi(named);
    if (dies == rank) {
      for (int other = 0; other < ranks; other++)
        if (other != rank) comm.recv(nullptr, 0, other, THROUGH);
      std::raise(SIGKILL);
    }
    comm.send(nullptr, 0, dies, THROUGH);
    try {
      comm.barrier();
    } catch (const xccl::Error &error) {
      std::fprintf(stderr, "%s\n", error.what());
      return error.code() == xcclRemoteError ? 0 : 1;
    }
    return 1;
  }
  comm.barrier();
  return 0;
} catch (const xccl::Error &error) {
  std::fprintf(stderr, "C++: %s\n", error.what());
  return 1;
}
