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

#include <string.h>

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

/** The token of row i, aligned to 64 bytes, for reading only: hidden elements, or hidden codes of the batch's wire format. */
XCCL_DEVICE_FN const void *xcclDeviceToken(const xcclDeviceBatch_t *batch, uint64_t i) {
  return batch->rows[i].token_data;
}

/** The number with these bits. */
XCCL_DEVICE_FN float xcclDeviceFloat(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

/** The value of an FP8 code with so many bits of mantissa, so large an exponent bias, and this code of infinity or NaN. */
XCCL_DEVICE_FN float xcclDeviceFp8(uint32_t code, uint32_t mantissa, uint32_t bias, uint32_t infinity) {
  const uint32_t magnitude = code & 0x7fu, exponent = magnitude >> mantissa, one = 1u << mantissa;
  const uint32_t steps = (magnitude & (one - 1)) + (exponent ? one : 0);
  const float step = xcclDeviceFloat((127u - bias - mantissa + (exponent ? exponent : 1u)) << 23);
  if (magnitude >= infinity) {
    /* One code of e5m2, and none of e4m3, is an infinity: the others are NaN. */
    return xcclDeviceFloat(magnitude == 0x7cu && infinity == 0x7cu ? 0x7f800000u | (code & 0x80u) << 24 : 0x7fc00000u);
  }
  return code & 0x80u ? -((float)steps * step) : (float)steps * step;
}

/** The value of an OCP FP8 E4M3 code, not scaled. */
XCCL_DEVICE_FN float xcclDeviceFp8E4m3(uint8_t code) {
  return xcclDeviceFp8(code, 3, 7, 0x7f);
}

/** The value of an OCP FP8 E5M2 code, not scaled. */
XCCL_DEVICE_FN float xcclDeviceFp8E5m2(uint8_t code) {
  return xcclDeviceFp8(code, 2, 15, 0x7c);
}

/** Element c of row i's token where it travels encoded (batch->wire is not xcclWireNative): the code's value times its scale. */
XCCL_DEVICE_FN float xcclDeviceWireElement(const xcclDeviceBatch_t *batch, uint64_t i, uint64_t c) {
  const uint8_t code = ((const uint8_t *)batch->rows[i].token_data)[c];
  const float *scales = batch->rows[i].scales;
  if (batch->wire == xcclWireInt8) return (float)(int8_t)code * scales[0];
  return (batch->wire == xcclWireFp8E4m3 ? xcclDeviceFp8E4m3(code) : xcclDeviceFp8E5m2(code)) * scales[c / 128];
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
