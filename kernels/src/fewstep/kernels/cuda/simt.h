// One kernel source, two targets: nvcc makes it run on a GPU; g++, with tests/simt_emulator.h, on a CPU, thread by thread.
//
// Kernels written against this header need nothing else to run in both: SIMT_SHARED and SIMT_DYNAMIC_SHARED for shared
// memory, SIMT_LAUNCH to start, and namespace simt for what CUDA C++ has as inline assembly only. A file's exported
// functions are extern "C", return SIMT_STATUS() and take raw pointers, sizes and the stream.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>
#include <stdint.h>
#include <vector_types.h>

#ifndef __CUDACC__
#include "simt_emulator.h"
#else

// `SIMT_SHARED(float, sums, 32);` in a kernel: an array of the block, its contents undefined.
#define SIMT_SHARED(type, name, count) __shared__ type name[count]
// `SIMT_DYNAMIC_SHARED(bytes);`: an unsigned char*, 128-byte aligned, as large as SIMT_LAUNCH says.
#define SIMT_DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]
// kernel in parentheses if it has template arguments; grid and block dim3; shared in bytes; stream a void*.
#define SIMT_LAUNCH(kernel, grid, block, shared, stream, ...)                                                     \
  do {                                                                                                            \
    if ((shared) > 48 * 1024) cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (shared)); \
    kernel<<<grid, block, shared, (cudaStream_t)(stream)>>>(__VA_ARGS__);                                         \
  } while (0)
#define SIMT_STATUS() ((int)cudaGetLastError())

namespace simt {

__device__ __forceinline__ uint32_t shared_address(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }

// d += a b: a 16 x 16, b 16 x 8, float32 sums, operands laid out over the warp as the PTX ISA says for m16n8k16.
__device__ __forceinline__ void mma_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void mma_f16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four 8 x 8 matrices of 16-bit elements; lane l names row l % 8 of matrix l / 8, 16-byte aligned, in shared memory.
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3},[%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row)));
}
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3},[%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row)));
}

// 16 bytes from global to shared memory, done when waited for; zeros if not valid. Both ends 16-byte aligned.
__device__ __forceinline__ void copy_async(void* shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0],[%1],16,%2;" ::"r"(shared_address(shared)), "l"(global), "r"(valid ? 16 : 0));
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;"); }
// Waits until all but the last `Pending` groups that this thread committed have arrived; other threads need a barrier.
template <int Pending> __device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending));
}

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0,%1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace simt
#endif

namespace simt {

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }
__device__ __forceinline__ void narrow(float x, float& y) { y = x; }
__device__ __forceinline__ void narrow(float x, __nv_bfloat16& y) { y = __float2bfloat16_rn(x); }
__device__ __forceinline__ void narrow(float x, __half& y) { y = __float2half_rn(x); }

}  // namespace simt
