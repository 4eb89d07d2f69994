/*
 * A kernel on a GPU as the experts of a MoE layer: it reads the tokens where their senders have them, in host memory that is
 * registered with the device, and writes the outputs into this rank's outbox. Nothing is copied on the host.
 *
 *   nvcc -O2 outbox.cu -lxccl -o outbox && xccl run -n 2 -- ./outbox
 */
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include <cuda_runtime.h>

#include "xccl_device.h"

static void check(xcclResult_t result, int line) {
  if (result == xcclSuccess) return;
  std::fprintf(stderr, "line %d: %s\n", line, xcclGetLastError());
  std::exit(1);
}
static void check(cudaError_t result, int line) {
  if (result == cudaSuccess) return;
  std::fprintf(stderr, "line %d: %s\n", line, cudaGetErrorString(result));
  std::exit(1);
}
#define CHECK(call) check((call), __LINE__)

/* One block per row at a time: output = 2 * token. */
__global__ void experts(xcclDeviceBatch_t batch) {
  for (uint64_t i = blockIdx.x; i < batch.num_rows; i += gridDim.x) {
    const float *token = static_cast<const float *>(xcclDeviceToken(&batch, i));
    float *output = static_cast<float *>(xcclDeviceOutput(&batch, i));
    for (uint64_t c = threadIdx.x; c < batch.hidden; c += blockDim.x) output[c] = 2 * token[c];
    /* Every thread's stores are visible to the system before one of them counts the row. */
    __threadfence_system();
    __syncthreads();
    if (threadIdx.x == 0) xcclDevicePublish(&batch, 1);
  }
}

int main() {
  const size_t tokens = 64, hidden = 1024, topk = 4;
  xcclComm_t comm;
  int rank, ranks;
  CHECK(xcclCommInitFromEnv(&comm, nullptr));
  CHECK(xcclCommUserRank(comm, &rank));
  CHECK(xcclCommCount(comm, &ranks));

  xcclMoeConfig_t config = XCCL_MOE_CONFIG_INITIALIZER;
  config.max_tokens = tokens;
  config.hidden = hidden;
  config.topk = topk;
  config.experts = 16;
  config.dtype = xcclFloat32;
  xcclMoe_t moe;
  CHECK(xcclMoeCreate(&moe, comm, &config));

  /* Own outbox for reading and writing, the others' for reading. */
  for (int r = 0; r < ranks; r++) {
    const void *base;
    size_t bytes;
    CHECK(xcclMoeOutbox(r, &base, &bytes, moe));
    CHECK(cudaHostRegister(const_cast<void *>(base), bytes,
                           cudaHostRegisterMapped | (r == rank ? 0 : cudaHostRegisterReadOnly)));
  }

  std::vector<float> input(tokens * hidden), out(tokens * hidden), weights(tokens * topk, 0.25f);
  std::vector<int32_t> ids(tokens * topk);
  for (size_t t = 0; t < tokens; t++) {
    for (size_t c = 0; c < hidden; c++) input[t * hidden + c] = float(rank * 100 + int(t) + int(c % 5));
    for (size_t k = 0; k < topk; k++) ids[t * topk + k] = int32_t((t + 4 * k) % 16);
  }
  xcclMoeInput_t sent = XCCL_MOE_INPUT_INITIALIZER;
  sent.tokens = input.data();
  sent.num_tokens = tokens;
  sent.topk_ids = ids.data();
  sent.topk_weights = weights.data();
  xcclExchange_t exchange;
  CHECK(xcclMoeDispatchSend(&sent, &exchange, moe));
  xcclMoeBatch_t received = XCCL_MOE_BATCH_INITIALIZER;
  CHECK(xcclMoeDispatchRecv(exchange, &received, moe));
  xcclDeviceBatch_t batch = XCCL_DEVICE_BATCH_INITIALIZER;
  CHECK(xcclMoeDeviceBatch(exchange, &batch, moe));

  /* The descriptors go along as a copy. */
  xcclMoeRow_t *rows;
  CHECK(cudaMalloc(&rows, batch.num_rows * sizeof *rows + 1));
  CHECK(cudaMemcpy(rows, batch.rows, batch.num_rows * sizeof *rows, cudaMemcpyHostToDevice));
  batch.rows = rows;
  experts<<<16, 256>>>(batch);
  CHECK(cudaGetLastError());
  CHECK(xcclMoeAwaitRows(exchange, moe));
  CHECK(cudaDeviceSynchronize());

  CHECK(xcclMoeCombineSend(exchange, XCCL_IN_PLACE, moe));
  CHECK(xcclMoeCombineRecv(exchange, out.data(), moe));
  for (size_t i = 0; i < out.size(); i++) {
    if (out[i] != 2 * input[i]) {
      std::fprintf(stderr, "element %zu is %f, expected %f\n", i, out[i], 2 * input[i]);
      return 1;
    }
  }
  std::printf("rank %d of %d: %llu rows computed on the GPU in place\n", rank, ranks, (unsigned long long)batch.num_rows);
  CHECK(cudaFree(rows));
  CHECK(xcclMoeDestroy(moe));
  CHECK(xcclCommDestroy(comm));
  return 0;
}
