// Kernels that use all of simt.h, right as they stand; test_simt_emulator.py plants bugs by leaving out a line.
#include "kernel.h"
#include "simt.h"

namespace {

constexpr int THREADS = 128, WARPS = THREADS / 32, ROWS = 32, COLUMNS = 16, STEP = 16;

__device__ float block_sum(float value, float* sums) {
#pragma unroll
  for (int by = 16; by; by >>= 1) value += __shfl_xor_sync(0xffffffffu, value, by);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = value;
  __syncthreads();  // all warps have written
  float total = 0.f;
#pragma unroll
  for (int i = 0; i < WARPS; ++i) total += sums[i];
  __syncthreads();  // all threads have read
  return total;
}

__global__ void moments(const float* x, float* mean, float* variance, int size) {
  SIMT_SHARED(float, sums, WARPS);
  const float* row = x + (int64_t)blockIdx.x * size;
  float sum = 0.f, squares = 0.f;
  for (int i = threadIdx.x; i < size; i += THREADS) sum += row[i];
  const float centre = block_sum(sum, sums) / size;
  for (int i = threadIdx.x; i < size; i += THREADS) squares += (row[i] - centre) * (row[i] - centre);
  squares = block_sum(squares, sums) / size;
  if (threadIdx.x == 0) mean[blockIdx.x] = centre, variance[blockIdx.x] = squares;
}

// c = a b for a (32, depth) and b (depth, 16), by two warps and a double buffer of asynchronous copies.
__global__ void product(const __nv_bfloat16* a, const __nv_bfloat16* b, float* c, int depth) {
  SIMT_DYNAMIC_SHARED(raw);
  __nv_bfloat16 *tiles_a = (__nv_bfloat16*)raw, *tiles_b = tiles_a + 2 * ROWS * STEP;
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, steps = depth / STEP;
  auto fetch = [&](int step) {
    __nv_bfloat16 *to_a = tiles_a + step % 2 * ROWS * STEP, *to_b = tiles_b + step % 2 * STEP * COLUMNS;
    const int row = thread / 2, chunk = thread % 2 * 8;
    simt::copy_async(to_a + row * STEP + chunk, a + row * depth + step * STEP + chunk, true);
    if (row < STEP) simt::copy_async(to_b + row * COLUMNS + chunk, b + (step * STEP + row) * COLUMNS + chunk, true);
    simt::commit_copies();
  };
  float sums[2][4] = {};
  fetch(0);
  for (int step = 0; step < steps; ++step) {
    if (step + 1 < steps) {
      fetch(step + 1);
      simt::wait_copies<1>();  // this step's tiles have arrived
    } else {
      simt::wait_copies<0>();
    }
    __syncthreads();  // all threads' copies have
    uint32_t left[4], right[4];
    simt::load_matrices(left, tiles_a + step % 2 * ROWS * STEP + (warp * 16 + lane % 16) * STEP + lane / 16 * 8);
    simt::load_matrices_transposed(right, tiles_b + step % 2 * STEP * COLUMNS + lane % 16 * COLUMNS + lane / 16 * 8);
    simt::mma_bf16(sums[0], left, right[0], right[1]);
    simt::mma_bf16(sums[1], left, right[2], right[3]);
    __syncthreads();  // before the tiles are overwritten
  }
  for (int half = 0; half < 2; ++half)
    for (int i = 0; i < 4; ++i)
      c[(warp * 16 + lane / 4 + i / 2 * 8) * COLUMNS + half * 8 + lane % 4 * 2 + i % 2] = sums[half][i];
}

}  // namespace

extern "C" int probe_moments(const float* x, float* mean, float* variance, int rows, int size) {
  SIMT_LAUNCH(moments, dim3(rows), dim3(THREADS), 0, nullptr, x, mean, variance, size);
  return SIMT_STATUS();
}

extern "C" int probe_product(const void* a, const void* b, float* c, int depth) {
  const int shared = 2 * STEP * (ROWS + COLUMNS) * sizeof(__nv_bfloat16);
  SIMT_LAUNCH(product, dim3(1), dim3(64), shared, nullptr, (const __nv_bfloat16*)a, (const __nv_bfloat16*)b, c, depth);
  return SIMT_STATUS();
}
