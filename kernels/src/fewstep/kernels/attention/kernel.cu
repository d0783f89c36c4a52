// Attention in CUDA, forward and backward, by mma.sync: scores are never stored (arXiv 2205.14135, 2307.08691).
//
// A block owns ROWS rows, 16 per warp, of q (forward, gradient of q) or of k and v (their gradients), and walks over the
// other side in tiles that asynchronous copies bring into one of two buffers while the other is worked on. Nobody else
// writes what a block writes, so results are the same bits on every run. Exponentials are of base 2; the log-sum-exp is
// natural only in memory. Fragments of mma.m16n8k16: a thread holds of row lane / 4 (and that + 8) the columns
// 2 (lane % 4) and the next one, in every 8.
#include <math.h>

#include "kernel.h"
#include "simt.h"

namespace {

constexpr int ROWS = 64, THREADS = 2 * ROWS, CHUNK = 8;   // elements of 16 bytes
constexpr float LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f;

using simt::widen;

__device__ __forceinline__ void multiply(
    __nv_bfloat16, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  simt::mma_bf16(d, a, b0, b1);
}
__device__ __forceinline__ void multiply(__half, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  simt::mma_f16(d, a, b0, b1);
}

__device__ __forceinline__ uint32_t packed(__nv_bfloat16, float low, float high) {
  union {
    __nv_bfloat162 pair;
    uint32_t bits;
  } both;
  both.pair = __floats2bfloat162_rn(low, high);
  return both.bits;
}
__device__ __forceinline__ uint32_t packed(__half, float low, float high) {
  union {
    __half2 pair;
    uint32_t bits;
  } both;
  both.pair = __floats2half2_rn(low, high);
  return both.bits;
}

// A tile in shared memory: DIM columns filled up to a multiple of 16; rows an odd number of 16 bytes apart, so that the
// eight rows of a matrix lie in different banks.
template <int DIM> struct Tile {
  static constexpr int COLUMNS = (DIM + 15) / 16 * 16, STRIDE = COLUMNS + CHUNK;
};

template <class T> __device__ __forceinline__ T* at(const void* base, const Strides& strides, int batch, int head, int row) {
  return (T*)base + batch * strides.batch + head * strides.head + row * strides.row;
}

// Start copying `count` rows, zeros from row `left` on and beyond the columns.
template <class T, int DIM> __device__ void fetch(T* tile, const T* from, int64_t stride, int count, int left) {
  constexpr int CHUNKS = Tile<DIM>::COLUMNS / CHUNK;
  for (int i = threadIdx.x; i < count * CHUNKS; i += THREADS) {
    const int row = i / CHUNKS, column = i % CHUNKS * CHUNK;
    const bool exists = row < left && column < DIM;
    simt::copy_async(tile + row * Tile<DIM>::STRIDE + column, exists ? from + row * stride + column : from, exists);
  }
}

// result = a b^T for the warp's 16 rows of a and WIDE rows of b.
template <class T, int DIM, int WIDE>
__device__ __forceinline__ void product(float (&result)[WIDE / 8][4], const T* a, const T* b) {
  constexpr int STRIDE = Tile<DIM>::STRIDE;
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int j = 0; j < WIDE / 8; ++j) result[j][0] = result[j][1] = result[j][2] = result[j][3] = 0.f;
#pragma unroll
  for (int k = 0; k < Tile<DIM>::COLUMNS; k += 16) {
    uint32_t left[4];
    simt::load_matrices(left, a + lane % 16 * STRIDE + k + lane / 16 * 8);
#pragma unroll
    for (int j = 0; j < WIDE / 8; j += 2) {
      uint32_t right[4];
      simt::load_matrices(right, b + (j * 8 + lane % 8 + lane / 16 * 8) * STRIDE + k + lane / 8 % 2 * 8);
      multiply(T(), result[j], left, right[0], right[1]);
      multiply(T(), result[j + 1], left, right[2], right[3]);
    }
  }
}

// total += weights b for the warp's 16 rows of weights, rounded to T, and WIDE rows of b.
template <class T, int DIM, int WIDE>
__device__ __forceinline__ void add_product(
    float (&total)[Tile<DIM>::COLUMNS / 8][4], const float (&weights)[WIDE / 8][4], const T* b) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int k = 0; k < WIDE / 16; ++k) {
    const float(&low)[4] = weights[2 * k], (&high)[4] = weights[2 * k + 1];
    const uint32_t left[4] = {packed(T(), low[0], low[1]), packed(T(), low[2], low[3]),
                              packed(T(), high[0], high[1]), packed(T(), high[2], high[3])};
#pragma unroll
    for (int j = 0; j < Tile<DIM>::COLUMNS / 8; j += 2) {
      uint32_t right[4];
      simt::load_matrices_transposed(right, b + (k * 16 + lane % 16) * Tile<DIM>::STRIDE + j * 8 + lane / 16 * 8);
      multiply(T(), total[j], left, right[0], right[1]);
      multiply(T(), total[j + 1], left, right[2], right[3]);
    }
  }
}

// Write the warp's 16 rows of factor[h] total, by way of its own rows of a tile that nobody reads any more.
template <class T, int DIM>
__device__ void put(T* to, int64_t stride, int left, const float (&total)[Tile<DIM>::COLUMNS / 8][4],
                    const float (&factor)[2], T* rows) {
  constexpr int STRIDE = Tile<DIM>::STRIDE, CHUNKS = DIM / CHUNK;
  const int lane = threadIdx.x % 32;
  __syncwarp();
#pragma unroll
  for (int j = 0; j < Tile<DIM>::COLUMNS / 8; ++j) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const uint32_t pair = packed(T(), total[j][2 * h] * factor[h], total[j][2 * h + 1] * factor[h]);
      *(uint32_t*)(rows + (lane / 4 + 8 * h) * STRIDE + j * 8 + lane % 4 * 2) = pair;
    }
  }
  __syncwarp();
  for (int i = lane; i < 16 * CHUNKS; i += 32) {
    const int row = i / CHUNKS, column = i % CHUNKS * CHUNK;
    if (row < left) *(uint4*)(to + row * stride + column) = *(const uint4*)(rows + row * STRIDE + column);
  }
}

// Which rows, sample and head a block owns, and how many keys its sample attends to.
struct Place {
  int start, batch, head, keys;
};

__device__ __forceinline__ Place place(const Attention& call, int owned) {
  const int tiles = (owned + ROWS - 1) / ROWS, pair = blockIdx.x / tiles;
  Place p = {(int)(blockIdx.x % tiles) * ROWS, pair / call.heads, pair % call.heads, call.keys};
  if (call.key_lengths && call.key_lengths[p.batch] < p.keys) p.keys = call.key_lengths[p.batch];
  return p;
}

// Walk over `length` rows of two tensors in tiles of WIDE: work(first row, tile of one, tile of the other).
template <class T, int DIM, int WIDE, class Work>
__device__ __forceinline__ void walk(
    T* buffers, const T* one, int64_t one_stride, const T* other, int64_t other_stride, int length, Work work) {
  constexpr int SIZE = WIDE * Tile<DIM>::STRIDE;
  const auto start = [&](int first, int buffer) {
    T* tile = buffers + 2 * buffer * SIZE;
    fetch<T, DIM>(tile, one + first * one_stride, one_stride, WIDE, length - first);
    fetch<T, DIM>(tile + SIZE, other + first * other_stride, other_stride, WIDE, length - first);
    simt::commit_copies();
  };
  if (length > 0) start(0, 0);
  for (int first = 0, buffer = 0; first < length; first += WIDE, buffer ^= 1) {
    if (first + WIDE < length) {
      start(first + WIDE, buffer ^ 1);
      simt::wait_copies<1>();
    } else {
      simt::wait_copies<0>();
    }
    __syncthreads();
    work(first, buffers + 2 * buffer * SIZE, buffers + (2 * buffer + 1) * SIZE);
    __syncthreads();
  }
}

// Over the four threads that share rows.
__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}
__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

template <class T, int DIM, int WIDE> __global__ void __launch_bounds__(THREADS, 2) forward(const Attention call) {
  SIMT_DYNAMIC_SHARED(memory);
  constexpr int N = Tile<DIM>::COLUMNS / 8;
  const Place p = place(call, call.queries);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  T* queries = (T*)memory;
  T* own = queries + warp * 16 * Tile<DIM>::STRIDE;
  fetch<T, DIM>(queries, at<T>(call.q, call.of_q, p.batch, p.head, p.start), call.of_q.row, ROWS, call.queries - p.start);
  float total[N][4], weight[2] = {0.f, 0.f}, peak[2] = {-INFINITY, -INFINITY};
#pragma unroll
  for (int j = 0; j < N; ++j) total[j][0] = total[j][1] = total[j][2] = total[j][3] = 0.f;
  const float scale2 = call.scale * LOG2E;
  walk<T, DIM, WIDE>(
      queries + ROWS * Tile<DIM>::STRIDE, at<T>(call.k, call.of_kv, p.batch, p.head, 0), call.of_kv.row,
      at<T>(call.v, call.of_kv, p.batch, p.head, 0), call.of_kv.row, p.keys, [&](int first, const T* k, const T* v) {
        float scores[WIDE / 8][4], highest[2] = {-INFINITY, -INFINITY};
        product<T, DIM, WIDE>(scores, own, k);
#pragma unroll
        for (int j = 0; j < WIDE / 8; ++j) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            if (first + j * 8 + lane % 4 * 2 + e % 2 >= p.keys) scores[j][e] = -INFINITY;
            highest[e / 2] = fmaxf(highest[e / 2], scores[j][e]);
          }
        }
        float shrink[2];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const float higher = fmaxf(peak[h], quad_max(highest[h]) * scale2);
          shrink[h] = simt::exp2_fast(peak[h] - higher);
          peak[h] = higher;
          weight[h] *= shrink[h];
        }
#pragma unroll
        for (int j = 0; j < N; ++j) {
#pragma unroll
          for (int e = 0; e < 4; ++e) total[j][e] *= shrink[e / 2];
        }
#pragma unroll
        for (int j = 0; j < WIDE / 8; ++j) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            scores[j][e] = simt::exp2_fast(scores[j][e] * scale2 - peak[e / 2]);
            weight[e / 2] += scores[j][e];
          }
        }
        add_product<T, DIM, WIDE>(total, scores, v);
      });
  float inverse[2];
  const int row = p.start + warp * 16 + lane / 4;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    weight[h] = quad_sum(weight[h]);
    inverse[h] = 1.f / weight[h];
    const int64_t flat = ((int64_t)p.batch * call.heads + p.head) * call.queries + row + 8 * h;
    if (lane % 4 == 0 && row + 8 * h < call.queries) call.lse[flat] = (peak[h] + log2f(weight[h])) * LN2;
  }
  T* to = at<T>(call.o, call.of_o, p.batch, p.head, p.start + warp * 16);
  put<T, DIM>(to, call.of_o.row, call.queries - p.start - warp * 16, total, inverse, own);
}

// delta = sum(o d_o) - d_lse of the warp's 16 rows, to memory and to `kept`; two threads share a row.
template <class T, int DIM>
__device__ void row_deltas(const Attention& call, const Gradients& g, const Place& p, const T* d_o, float* kept) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = warp * 16 + lane / 2;
  const bool exists = p.start + row < call.queries;
  const T* o = at<T>(call.o, call.of_o, p.batch, p.head, exists ? p.start + row : p.start);
  float sum = 0.f;
  for (int column = lane % 2 * CHUNK; column < DIM; column += 2 * CHUNK) {
    union {
      uint4 bits;
      T values[CHUNK];
    } chunk;
    chunk.bits = *(const uint4*)(o + column);
#pragma unroll
    for (int i = 0; i < CHUNK; ++i) sum += widen(chunk.values[i]) * widen(d_o[row * Tile<DIM>::STRIDE + column + i]);
  }
  sum += __shfl_xor_sync(0xffffffffu, sum, 1);
  if (lane % 2 == 0) {
    const int64_t flat = ((int64_t)p.batch * call.heads + p.head) * call.queries + p.start + row;
    if (exists && g.d_lse) sum -= g.d_lse[flat];
    if (exists) g.delta[flat] = sum;
    kept[row] = exists ? sum : 0.f;
  }
}

template <class T, int DIM, int WIDE>
__global__ void __launch_bounds__(THREADS, 2) query_gradient(const Attention call, const Gradients g) {
  SIMT_DYNAMIC_SHARED(memory);
  SIMT_SHARED(float, deltas, ROWS);
  constexpr int N = Tile<DIM>::COLUMNS / 8, SIZE = ROWS * Tile<DIM>::STRIDE;
  const Place p = place(call, call.queries);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, left = call.queries - p.start;
  T *queries = (T*)memory, *d_outputs = queries + SIZE, *own = queries + warp * 16 * Tile<DIM>::STRIDE;
  fetch<T, DIM>(queries, at<T>(call.q, call.of_q, p.batch, p.head, p.start), call.of_q.row, ROWS, left);
  fetch<T, DIM>(d_outputs, at<T>(g.d_o, g.of_d_o, p.batch, p.head, p.start), g.of_d_o.row, ROWS, left);
  simt::commit_copies();
  simt::wait_copies<0>();
  __syncthreads();
  row_deltas<T, DIM>(call, g, p, d_outputs, deltas);
  __syncwarp();
  float total[N][4], lse2[2], delta[2];
#pragma unroll
  for (int j = 0; j < N; ++j) total[j][0] = total[j][1] = total[j][2] = total[j][3] = 0.f;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int row = warp * 16 + lane / 4 + 8 * h;
    const int64_t flat = ((int64_t)p.batch * call.heads + p.head) * call.queries + p.start + row;
    lse2[h] = row < left ? call.lse[flat] * LOG2E : 0.f;
    delta[h] = deltas[row];
  }
  const float scale2 = call.scale * LOG2E;
  walk<T, DIM, WIDE>(
      d_outputs + SIZE, at<T>(call.k, call.of_kv, p.batch, p.head, 0), call.of_kv.row,
      at<T>(call.v, call.of_kv, p.batch, p.head, 0), call.of_kv.row, p.keys, [&](int first, const T* k, const T* v) {
        float scores[WIDE / 8][4], d_weights[WIDE / 8][4];
        product<T, DIM, WIDE>(scores, own, k);
        product<T, DIM, WIDE>(d_weights, own + SIZE, v);
#pragma unroll
        for (int j = 0; j < WIDE / 8; ++j) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const float weight = simt::exp2_fast(scores[j][e] * scale2 - lse2[e / 2]);
            const bool counts = first + j * 8 + lane % 4 * 2 + e % 2 < p.keys;
            scores[j][e] = counts ? weight * (d_weights[j][e] - delta[e / 2]) : 0.f;
          }
        }
        add_product<T, DIM, WIDE>(total, scores, k);
      });
  const float factor[2] = {call.scale, call.scale};
  T* to = at<T>(g.dq, g.of_dq, p.batch, p.head, p.start + warp * 16);
  put<T, DIM>(to, g.of_dq.row, left - warp * 16, total, factor, own);
}

template <class T, int DIM, int WIDE>
__global__ void __launch_bounds__(THREADS, 2) key_gradient(const Attention call, const Gradients g) {
  SIMT_DYNAMIC_SHARED(memory);
  constexpr int N = Tile<DIM>::COLUMNS / 8, SIZE = ROWS * Tile<DIM>::STRIDE;
  const Place p = place(call, call.keys);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, left = p.keys - p.start;
  T *keys = (T*)memory, *values = keys + SIZE, *own = keys + warp * 16 * Tile<DIM>::STRIDE;
  fetch<T, DIM>(keys, at<T>(call.k, call.of_kv, p.batch, p.head, p.start), call.of_kv.row, ROWS, left);
  fetch<T, DIM>(values, at<T>(call.v, call.of_kv, p.batch, p.head, p.start), call.of_kv.row, ROWS, left);
  simt::commit_copies();
  float dk[N][4], dv[N][4];
#pragma unroll
  for (int j = 0; j < N; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) dk[j][e] = dv[j][e] = 0.f;
  }
  const int64_t flat = ((int64_t)p.batch * call.heads + p.head) * call.queries;
  const float scale2 = call.scale * LOG2E;
  walk<T, DIM, WIDE>(
      values + SIZE, at<T>(call.q, call.of_q, p.batch, p.head, 0), call.of_q.row,
      at<T>(g.d_o, g.of_d_o, p.batch, p.head, 0), g.of_d_o.row, left > 0 ? call.queries : 0,
      [&](int first, const T* q, const T* d_o) {
        float weights[WIDE / 8][4], d_weights[WIDE / 8][4];
        product<T, DIM, WIDE>(weights, own, q);
        product<T, DIM, WIDE>(d_weights, own + SIZE, d_o);
#pragma unroll
        for (int j = 0; j < WIDE / 8; ++j) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const int query = first + j * 8 + lane % 4 * 2 + e % 2;
            const bool counts = query < call.queries && warp * 16 + lane / 4 + e / 2 * 8 < left;
            const float lse2 = counts ? call.lse[flat + query] * LOG2E : 0.f, delta = counts ? g.delta[flat + query] : 0.f;
            weights[j][e] = counts ? simt::exp2_fast(weights[j][e] * scale2 - lse2) : 0.f;
            d_weights[j][e] = weights[j][e] * (d_weights[j][e] - delta);
          }
        }
        add_product<T, DIM, WIDE>(dv, weights, d_o);
        add_product<T, DIM, WIDE>(dk, d_weights, q);
      });
  simt::wait_copies<0>();
  __syncthreads();
  const float scaled[2] = {call.scale, call.scale}, plain[2] = {1.f, 1.f};
  const int rows = call.keys - p.start - warp * 16;
  put<T, DIM>(at<T>(g.dk, g.of_dkv, p.batch, p.head, p.start + warp * 16), g.of_dkv.row, rows, dk, scaled, own);
  put<T, DIM>(at<T>(g.dv, g.of_dkv, p.batch, p.head, p.start + warp * 16), g.of_dkv.row, rows, dv, plain, own);
}

template <class T, int DIM> constexpr int bytes(int owned_tiles, int wide) {
  return (owned_tiles * ROWS + 4 * wide) * Tile<DIM>::STRIDE * sizeof(T);
}

dim3 grid_of(const Attention& call, int owned) {
  return dim3((unsigned)((int64_t)(owned + ROWS - 1) / ROWS * call.heads * call.batch));
}

template <class T, int DIM> int launch(const Attention& call, const Gradients* g) {
  constexpr int WIDE = 64;                                            // what fits the registers of each kernel
  constexpr int FOR_QUERIES = DIM > 80 ? 32 : 64, FOR_KEYS = DIM > 80 ? 16 : DIM > 64 ? 32 : 64;
  const dim3 threads(THREADS);
  if (!g) {
    SIMT_LAUNCH((forward<T, DIM, WIDE>), grid_of(call, call.queries), threads, (bytes<T, DIM>(1, WIDE)), call.stream, call);
    return SIMT_STATUS();
  }
  SIMT_LAUNCH((query_gradient<T, DIM, FOR_QUERIES>), grid_of(call, call.queries), threads,
              (bytes<T, DIM>(2, FOR_QUERIES)), call.stream, call, *g);
  const int status = SIMT_STATUS();
  if (status) return status;
  SIMT_LAUNCH((key_gradient<T, DIM, FOR_KEYS>), grid_of(call, call.keys), threads, (bytes<T, DIM>(2, FOR_KEYS)),
              call.stream, call, *g);
  return SIMT_STATUS();
}

template <class T> int launch_for_dim(const Attention& call, const Gradients* g) {
  switch (call.dim) {
    case 16: return launch<T, 16>(call, g);
    case 32: return launch<T, 32>(call, g);
    case 64: return launch<T, 64>(call, g);
    case 72: return launch<T, 72>(call, g);
    case 128: return launch<T, 128>(call, g);
  }
  return -1;
}

}  // namespace

extern "C" int attention_forward(const Attention* call) {
  return call->dtype == 1 ? launch_for_dim<__nv_bfloat16>(*call, nullptr) : launch_for_dim<__half>(*call, nullptr);
}

extern "C" int attention_backward(const Attention* call, const Gradients* gradients) {
  return call->dtype == 1 ? launch_for_dim<__nv_bfloat16>(*call, gradients) : launch_for_dim<__half>(*call, gradients);
}
