/*
 * XCCL for kernels: reading a batch where it lies, and saying which outputs are written.
 *
 * Only inline functions of loads, stores and atomics: no call into the library, so they compile for any thread and for
 * devices (nvcc, hipcc). The host receives an exchange, describes it with xcclMoeDeviceBatch, and hands the struct to the
 * kernel by value; the kernel reads token rows, writes output rows, and publishes how many it has written; the host waits
 * with xcclMoeAwaitRows, then calls xcclMoeCombineSend with XCCL_IN_PLACE.
 *
 * On a device, first register the memory (cudaHostRegister): each rank's outbox (xcclMoeOutbox), the own one for reading
 * and writing, the others' for reading; and the arrays rows and offsets, or copies of them. With unified addresses the
 * pointers in the structs are good as they are.
 *
 * The struct of a batch belongs to the host's exchange: good until its xcclMoeCombineSend or xcclMoeGiveUp.
 */

#ifndef XCCL_DEVICE_H
#define XCCL_DEVICE_H

#include "xccl.h"

#if defined(__CUDACC__) || defined(__CUDA__) || defined(__HIPCC__)
#define XCCL_DEVICE_FN static __host__ __device__ __inline__
#elif defined(__GNUC__)
#define XCCL_DEVICE_FN static inline __attribute__((unused))
#else
#define XCCL_DEVICE_FN static inline
#endif

/** Row i of the batch, 0 to num_rows - 1: copied out, so that the compiler may keep it in registers. */
XCCL_DEVICE_FN xcclMoeRow_t xcclDeviceRow(const xcclDeviceBatch_t *batch, uint64_t i) {
  return batch->rows[i];
}

/** The token of row i: hidden elements, aligned to 64 bytes, for reading only. */
XCCL_DEVICE_FN const void *xcclDeviceToken(const xcclDeviceBatch_t *batch, uint64_t i) {
  return batch->rows[i].token_data;
}

/** Where the output for row i goes: hidden elements, aligned to 64 bytes. */
XCCL_DEVICE_FN void *xcclDeviceOutput(const xcclDeviceBatch_t *batch, uint64_t i) {
  return batch->rows[i].output;
}

/** The first row of local expert e; that of e + 1 is where its rows end. e: 0 to local_experts. */
XCCL_DEVICE_FN uint64_t xcclDeviceExpertBegin(const xcclDeviceBatch_t *batch, uint64_t e) {
  return batch->offsets[e];
}

/**
 * Counts `rows` more output rows as written: all that this thread has stored before is seen by whoever sees the count. Each
 * row is counted once, by the thread that has written it, or by one that has seen it written (after __syncthreads, say).
 */
XCCL_DEVICE_FN void xcclDevicePublish(const xcclDeviceBatch_t *batch, uint64_t rows) {
#if defined(__CUDA_ARCH__) || defined(__HIP_DEVICE_COMPILE__)
  __threadfence_system();
  atomicAdd_system((unsigned long long *)batch->rows_done, (unsigned long long)rows);
#else
  __atomic_fetch_add(batch->rows_done, rows, __ATOMIC_RELEASE);
#endif
}

/** Whether all outputs of the batch are written and can be read by the caller. */
XCCL_DEVICE_FN int xcclDeviceIsDone(const xcclDeviceBatch_t *batch) {
#if defined(__CUDA_ARCH__) || defined(__HIP_DEVICE_COMPILE__)
  uint64_t done = *(volatile const uint64_t *)batch->rows_done;
  __threadfence_system();
#else
  uint64_t done = __atomic_load_n(batch->rows_done, __ATOMIC_ACQUIRE);
#endif
  return done >= batch->num_rows;
}

#endif /* XCCL_DEVICE_H */
