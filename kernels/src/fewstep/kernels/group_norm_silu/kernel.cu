// GroupNorm, FiLM, SiLU and residual in CUDA: one program per group of channels, or two launches over chunks of pixels.
#include "device.h"

namespace group_norm {

template <class E> __global__ void __launch_bounds__(THREADS, 2) forward_one(const GroupNorm n) {
  SIMT_DYNAMIC_SHARED(memory);
  const Program p(n, memory, blockIdx.x, false);
  hold_and_measure<E>(p);
  spread_moments(p, true);
  finish<E>(p, true);
}

template <class E> __global__ void __launch_bounds__(THREADS, 2) forward_moments(const GroupNorm n) {
  SIMT_DYNAMIC_SHARED(memory);
  const Program p(n, memory, blockIdx.x, false);
  hold_and_measure<E>(p);
  for (int g = threadIdx.x; g < p.groups; g += THREADS) {
    n.part_one[p.part_at(g, p.part)] = p.group[g];
    n.part_two[p.part_at(g, p.part)] = p.group[n.together + g];
  }
}

// Begins with what was read last, which may still be in a cache.
template <class E> __global__ void __launch_bounds__(THREADS, 2) forward_apply(const GroupNorm n) {
  SIMT_DYNAMIC_SHARED(memory);
  const Program p(n, memory, gridDim.x - 1 - blockIdx.x, false);
  load_channels(p);
  merge_moments(
      p, n.chunks, [&](int g, int k) { return n.part_one[p.part_at(g, k)]; },
      [&](int g, int k) { return n.part_two[p.part_at(g, k)]; });
  spread_moments(p, p.part == 0);
  finish<E>(p, false);
}

template <class E> __global__ void __launch_bounds__(THREADS, 2) backward_one(const GroupNorm n) {
  SIMT_DYNAMIC_SHARED(memory);
  const Program p(n, memory, blockIdx.x, true);
  hold_and_sum<E>(p);
  finish_backward<E>(p, true);
}

template <class E> __global__ void __launch_bounds__(THREADS, 2) backward_sums(const GroupNorm n) {
  SIMT_DYNAMIC_SHARED(memory);
  const Program p(n, memory, blockIdx.x, true);
  hold_and_sum<E>(p);
  for (int g = threadIdx.x; g < p.groups; g += THREADS) {
    n.part_one[p.part_at(g, p.part)] = p.group[g];
    n.part_two[p.part_at(g, p.part)] = p.group[n.together + g];
  }
}

template <class E> __global__ void __launch_bounds__(THREADS, 2) backward_apply(const GroupNorm n) {
  SIMT_DYNAMIC_SHARED(memory);
  const Program p(n, memory, gridDim.x - 1 - blockIdx.x, true);
  load_for_backward(p);
  merge_sums(
      p, n.chunks, [&](int g, int k) { return n.part_one[p.part_at(g, k)]; },
      [&](int g, int k) { return n.part_two[p.part_at(g, k)]; });
  finish_backward<E>(p, false);
}

constexpr int COLUMNS = 32, ROWS = 8;

// v = (xhat weight + bias) (1 + scale) + shift: dshift = b, dscale = weight a + bias b, dweight = sum((1 + scale) a).
__global__ void __launch_bounds__(COLUMNS* ROWS) parameters(const ParameterGradients n) {
  SIMT_SHARED(float, shared, 2 * COLUMNS * ROWS);
  const int column = threadIdx.x % COLUMNS, row = threadIdx.x / COLUMNS;
  const int64_t c = (int64_t)blockIdx.x * COLUMNS + column;
  float total_a = 0.f, total_b = 0.f;
  for (int64_t sample = row; c < n.channels && sample < n.batch; sample += ROWS) {
    float a = 0.f, b = 0.f;
    for (int k = 0; k < n.chunks; ++k) {
      a += n.a[(sample * n.chunks + k) * n.channels + c];
      b += n.b[(sample * n.chunks + k) * n.channels + c];
    }
    if (n.dshift) write(n.dshift, sample * n.channels + c, n.shift_dtype, b);
    if (n.dscale) {
      float gradient = n.weight ? a * read(n.weight, c, n.weight_dtype) : a;
      if (n.bias) gradient += b * read(n.bias, c, n.bias_dtype);
      write(n.dscale, sample * n.channels + c, n.scale_dtype, gradient);
    }
    const float factor = n.scale ? 1.f + read(n.scale, sample * n.scale_row + c, n.scale_dtype) : 1.f;
    total_a += factor * a;
    total_b += factor * b;
  }
  shared[threadIdx.x] = total_a;
  shared[COLUMNS * ROWS + threadIdx.x] = total_b;
  __syncthreads();
  if (row > 0 || c >= n.channels) return;
  for (int other = 1; other < ROWS; ++other) {
    total_a += shared[other * COLUMNS + column];
    total_b += shared[(ROWS + other) * COLUMNS + column];
  }
  if (n.dweight) write(n.dweight, c, n.weight_dtype, total_a);
  if (n.dbias) write(n.dbias, c, n.bias_dtype, total_b);
}

template <class E> int forward_of(const GroupNorm& n) {
  const dim3 grid(programs(n)), threads(THREADS);
  const int holding = shared_bytes(n, false, 1, E::HELD), plain = shared_bytes(n, false, 0, 0);
  if (n.chunks == 1) {
    SIMT_LAUNCH((forward_one<E>), grid, threads, holding, n.stream, n);
    return SIMT_STATUS();
  }
  SIMT_LAUNCH((forward_moments<E>), grid, threads, holding, n.stream, n);
  if (int status = SIMT_STATUS()) return status;
  SIMT_LAUNCH((forward_apply<E>), grid, threads, plain, n.stream, n);
  return SIMT_STATUS();
}

template <class E> int backward_of(const GroupNorm& n) {
  const dim3 grid(programs(n)), threads(THREADS);
  const int holding = shared_bytes(n, true, 2, E::HELD), plain = shared_bytes(n, true, 0, 0);
  if (n.chunks == 1) {
    SIMT_LAUNCH((backward_one<E>), grid, threads, holding, n.stream, n);
    return SIMT_STATUS();
  }
  SIMT_LAUNCH((backward_sums<E>), grid, threads, holding, n.stream, n);
  if (int status = SIMT_STATUS()) return status;
  SIMT_LAUNCH((backward_apply<E>), grid, threads, plain, n.stream, n);
  return SIMT_STATUS();
}

}  // namespace group_norm

using namespace group_norm;

extern "C" int group_norm_silu_forward(const GroupNorm* n) {
  if (!n->wide) return forward_of<Single>(*n);
  if (n->dtype == 0) return forward_of<Wide<float>>(*n);
  return n->dtype == 1 ? forward_of<Wide<__nv_bfloat16>>(*n) : forward_of<Wide<__half>>(*n);
}

extern "C" int group_norm_silu_backward(const GroupNorm* n) {
  if (!n->wide) return backward_of<Single>(*n);
  if (n->dtype == 0) return backward_of<Wide<float>>(*n);
  return n->dtype == 1 ? backward_of<Wide<__nv_bfloat16>>(*n) : backward_of<Wide<__half>>(*n);
}

extern "C" int group_norm_silu_parameters(const ParameterGradients* n) {
  const dim3 grid((unsigned)((n->channels + COLUMNS - 1) / COLUMNS)), threads(COLUMNS * ROWS);
  SIMT_LAUNCH(parameters, grid, threads, 0, n->stream, *n);
  return SIMT_STATUS();
}

extern "C" int group_norm_silu_scratch(int span, int groups, int backward) { return fixed_bytes(span, groups, backward); }
