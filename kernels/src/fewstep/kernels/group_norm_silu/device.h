// GroupNorm, FiLM, SiLU and residual on the device: what one program does, whether it is alone, one of a cluster, or one of
// several that leave their statistics in memory.
//
// A program (block) takes whole groups of one sample, `span` channels from `first` on, and the pixels [start, start +
// count). It loads them once into shared memory ("held"). Each group's first value, its pivot, is taken off x before
// anything else, and means are of what is left, so that no digit is lost where they are many standard deviations.
// Sums run in a fixed order: each thread over its elements, then per channel over threads, then per group over channels.
#pragma once
#include "kernel.h"
#include "simt.h"

namespace group_norm {

constexpr int THREADS = 256, WARPS = THREADS / 32;
constexpr int LANES = 1024;  // partial sums that contiguous layouts keep, unless there are more channels

using simt::narrow;
using simt::widen;

// One element of a dtype known at run time.
__device__ __forceinline__ float read(const void* base, int64_t at, int dtype) {
  if (dtype == 0) return ((const float*)base)[at];
  return dtype == 1 ? widen(((const __nv_bfloat16*)base)[at]) : widen(((const __half*)base)[at]);
}
__device__ __forceinline__ void write(void* base, int64_t at, int dtype, float value) {
  if (dtype == 0) ((float*)base)[at] = value;
  if (dtype == 1) narrow(value, ((__nv_bfloat16*)base)[at]);
  if (dtype == 2) narrow(value, ((__half*)base)[at]);
}
__device__ __forceinline__ float rounded(float value, int dtype) {
  if (dtype == 1) return widen(__float2bfloat16_rn(value));
  return dtype == 2 ? widen(__float2half_rn(value)) : value;
}

// How elements move: 16 bytes of T at a time, held as they are,
template <class T> struct Wide {
  static constexpr int WIDTH = 16 / sizeof(T), HELD = sizeof(T);
  union Pack {
    uint4 words;
    T values[WIDTH];
    __device__ Pack() {}
  };
  static __device__ __forceinline__ void load(const void* base, int64_t at, int, float (&v)[WIDTH]) {
    Pack pack;
    pack.words = *reinterpret_cast<const uint4*>((const T*)base + at);
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) v[i] = widen(pack.values[i]);
  }
  static __device__ __forceinline__ void store(void* base, int64_t at, int, const float (&v)[WIDTH]) {
    Pack pack;
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) narrow(v[i], pack.values[i]);
    *reinterpret_cast<uint4*>((T*)base + at) = pack.words;
  }
  static __device__ __forceinline__ void hold(void* held, int at, const float (&v)[WIDTH]) { store(held, at, 0, v); }
  static __device__ __forceinline__ void take(const void* held, int at, float (&v)[WIDTH]) { load(held, at, 0, v); }
};
// or, for sizes and addresses that this does not suit, one by one, held as float.
struct Single {
  static constexpr int WIDTH = 1, HELD = sizeof(float);
  static __device__ __forceinline__ void load(const void* base, int64_t at, int dtype, float (&v)[1]) {
    v[0] = read(base, at, dtype);
  }
  static __device__ __forceinline__ void store(void* base, int64_t at, int dtype, const float (&v)[1]) {
    write(base, at, dtype, v[0]);
  }
  static __device__ __forceinline__ void hold(void* held, int at, const float (&v)[1]) { ((float*)held)[at] = v[0]; }
  static __device__ __forceinline__ void take(const void* held, int at, float (&v)[1]) { v[0] = ((const float*)held)[at]; }
};

// Partial sums per quantity: rows of `span`, as many as threads share a channel.
inline __host__ __device__ int round_up(int n) { return (n + 3) / 4 * 4; }
inline __host__ __device__ int scratch_floats(int span) { return span > THREADS * 8 ? round_up(span) : THREADS * 8; }
inline __host__ int fixed_bytes(int span, int groups, int backward) {
  return 4 * (7 * round_up(span) + 2 * round_up(groups) + (backward ? 2 : 1) * scratch_floats(span));
}

// A program's part and its shared memory: per channel [span], per group [groups], scratch, held elements.
struct Program {
  const GroupNorm& n;
  int64_t sample;
  int block, part, first, span, groups, start, count;
  float *pivot, *gain, *offset, *mean, *rstd, *sums, *group, *scratch;
  unsigned char* held;

  __device__ __forceinline__ Program(const GroupNorm& n, unsigned char* memory, int index, bool backward) : n(n) {
    const int size = (int)(n.channels / n.groups);
    sample = index / n.blocks / n.chunks;
    part = index / n.blocks % n.chunks;
    block = index % n.blocks;
    groups = min((int)n.groups - block * n.together, n.together);
    first = block * n.together * size;
    span = groups * size;
    start = part * n.chunk;
    count = min((int)n.pixels - start, n.chunk);
    float* next = (float*)memory;
    float** arrays[] = {&pivot, &gain, &offset, &mean, &rstd};
    for (float** array : arrays) {
      *array = next;
      next += round_up(n.together * size);
    }
    sums = next;
    group = sums + 2 * round_up(n.together * size);
    scratch = group + 2 * round_up(n.together);
    held = (unsigned char*)(scratch + (backward ? 2 : 1) * scratch_floats(n.together * size));
  }
  __device__ __forceinline__ int size() const { return (int)(n.channels / n.groups); }
  // Place of an element in x, and among what is held; pixel counts from start.
  __device__ __forceinline__ int64_t at(int channel, int pixel) const {
    const int64_t base = sample * n.channels * n.pixels;
    return n.last ? base + (int64_t)(start + pixel) * n.channels + first + channel
                  : base + (int64_t)(first + channel) * n.pixels + start + pixel;
  }
  __device__ __forceinline__ int place(int channel, int pixel) const {
    return n.last ? pixel * span + channel : channel * count + pixel;
  }
  __device__ __forceinline__ int held_elements() const { return span * count; }
  __device__ __forceinline__ int64_t group_at(int g) const { return sample * n.groups + block * n.together + g; }
  __device__ __forceinline__ int64_t part_at(int g, int chunk) const {
    return (sample * n.chunks + chunk) * n.groups + block * n.together + g;
  }
};

// Pivot, gain and offset of each channel.
__device__ __forceinline__ void load_channels(const Program& p) {
  const GroupNorm& n = p.n;
  const int64_t base = p.sample * n.channels * n.pixels;
  for (int c = threadIdx.x; c < p.span; c += THREADS) {
    const int64_t channel = p.first + c, leader = p.first + c / p.size() * p.size();
    const int64_t at = base + (n.last ? leader : leader * n.pixels);
    float pivot = read(n.x, at, n.dtype), gain = 1.f, offset = 0.f;
    if (n.before) pivot = rounded(pivot + read(n.residual, at, n.dtype), n.dtype);
    if (n.weight) gain = read(n.weight, channel, n.weight_dtype);
    if (n.bias) offset = read(n.bias, channel, n.bias_dtype);
    if (n.scale) {
      const float factor = 1.f + read(n.scale, p.sample * n.scale_row + channel, n.scale_dtype);
      gain *= factor;
      offset *= factor;
    }
    if (n.shift) offset += read(n.shift, p.sample * n.shift_row + channel, n.shift_dtype);
    p.pivot[c] = pivot;
    p.gain[c] = gain;
    p.offset[c] = offset;
  }
}

// Calls visit(channel, pixel) for every vector of this program's elements: WIDTH channels or pixels.
template <int WIDTH, class Visit> __device__ __forceinline__ void each(const Program& p, Visit visit) {
  const int across = (p.n.last ? p.span : p.count) / WIDTH, along = p.n.last ? p.count : p.span;
#pragma unroll 4
  for (int i = threadIdx.x; i < across * along; i += THREADS) {
    const int inner = i % across * WIDTH, outer = i / across;
    if (p.n.last) visit(inner, outer);
    else visit(outer, inner);
  }
}

// Per-channel sums of N quantities into sums[N][span]: visit(channel, pixel, value) gives value[N][WIDTH] for a vector.
template <int WIDTH, int N, class Visit> __device__ __forceinline__ void channel_sums(const Program& p, Visit visit) {
  int rows;
  if (p.n.last) {  // a thread keeps to its channels and walks over pixels
    const int vectors = p.span / WIDTH, abreast = min(vectors, THREADS);
    rows = THREADS / abreast;
    const int row = threadIdx.x / abreast;
    for (int v = threadIdx.x % abreast; row < rows && v < vectors; v += abreast) {
      float total[N][WIDTH] = {};
#pragma unroll 2
      for (int pixel = row; pixel < p.count; pixel += rows) {
        float value[N][WIDTH];
        visit(v * WIDTH, pixel, value);
#pragma unroll
        for (int k = 0; k < N * WIDTH; ++k) total[k / WIDTH][k % WIDTH] += value[k / WIDTH][k % WIDTH];
      }
#pragma unroll
      for (int k = 0; k < N * WIDTH; ++k) {
        p.scratch[(row * N + k / WIDTH) * p.span + v * WIDTH + k % WIDTH] = total[k / WIDTH][k % WIDTH];
      }
    }
  } else {  // a warp takes a stretch of one channel at a time
    const int vectors = p.count / WIDTH, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    rows = max(1, min(min(WARPS, vectors / 32), LANES / p.span));
    const int stretch = (vectors + rows - 1) / rows;
    for (int unit = warp; unit < p.span * rows; unit += WARPS) {
      const int channel = unit / rows, row = unit % rows, end = min((row + 1) * stretch, vectors);
      float total[N] = {};
#pragma unroll 2
      for (int v = row * stretch + lane; v < end; v += 32) {
        float value[N][WIDTH];
        visit(channel, v * WIDTH, value);
#pragma unroll
        for (int k = 0; k < N * WIDTH; ++k) total[k / WIDTH] += value[k / WIDTH][k % WIDTH];
      }
#pragma unroll
      for (int k = 0; k < N; ++k) {
#pragma unroll
        for (int other = 16; other; other >>= 1) total[k] += __shfl_xor_sync(0xffffffffu, total[k], other);
        if (lane == 0) p.scratch[(row * N + k) * p.span + channel] = total[k];
      }
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < N * p.span; i += THREADS) {
    float total = 0.f;
    for (int row = 0; row < rows; ++row) total += p.scratch[row * N * p.span + i];
    p.sums[i] = total;
  }
  __syncthreads();  // also before scratch is used again
}

// Sums over each group of sums[which] (times gain), into group[which].
__device__ __forceinline__ void group_sums(const Program& p, int which, bool gained) {
  for (int g = threadIdx.x; g < p.groups; g += THREADS) {
    float total = 0.f;
    for (int c = g * p.size(); c < (g + 1) * p.size(); ++c) {
      total += p.sums[which * p.span + c] * (gained ? p.gain[c] : 1.f);
    }
    p.group[which * p.n.together + g] = total;
  }
}

// x, or x + residual rounded (and stored) as it is returned.
template <class E> __device__ __forceinline__ void load_x(const Program& p, int64_t at, float (&v)[E::WIDTH], bool adds) {
  E::load(p.n.x, at, p.n.dtype, v);
  if (!adds) return;
  float more[E::WIDTH];
  E::load(p.n.residual, at, p.n.dtype, more);
#pragma unroll
  for (int i = 0; i < E::WIDTH; ++i) v[i] = rounded(v[i] + more[i], p.n.dtype);
  E::store(p.n.total, at, p.n.dtype, v);
}

// Channel of element i of a vector.
__device__ __forceinline__ int channel_of(const Program& p, int channel, int i) { return p.n.last ? channel + i : channel; }

// Hold the program's elements; leave the mean of each group in group[0] and the sum of squared deviations in group[1].
template <class E> __device__ __forceinline__ void hold_and_measure(const Program& p) {
  constexpr int W = E::WIDTH;
  load_channels(p);
  __syncthreads();
  channel_sums<W, 1>(p, [&](int channel, int pixel, float(&value)[1][W]) {
    load_x<E>(p, p.at(channel, pixel), value[0], p.n.before);
    E::hold(p.held, p.place(channel, pixel), value[0]);
#pragma unroll
    for (int i = 0; i < W; ++i) value[0][i] -= p.pivot[channel_of(p, channel, i)];
  });
  group_sums(p, 0, false);
  __syncthreads();
  const float elements = (float)p.size() * p.count;
  for (int c = threadIdx.x; c < p.span; c += THREADS) p.mean[c] = p.group[c / p.size()] / elements;
  __syncthreads();
  channel_sums<W, 1>(p, [&](int channel, int pixel, float(&value)[1][W]) {
    E::take(p.held, p.place(channel, pixel), value[0]);
#pragma unroll
    for (int i = 0; i < W; ++i) {
      const int c = channel_of(p, channel, i);
      const float off = value[0][i] - p.pivot[c] - p.mean[c];
      value[0][i] = off * off;
    }
  });
  for (int g = threadIdx.x; g < p.groups; g += THREADS) {
    float total = 0.f;
    for (int c = g * p.size(); c < (g + 1) * p.size(); ++c) total += p.sums[c];
    p.group[p.n.together + g] = total;
    p.group[g] = p.mean[g * p.size()];
  }
  __syncthreads();
}

// From each group's mean and sum of squared deviations over all pixels, in group[0] and [1]: mean and rstd per channel.
__device__ __forceinline__ void spread_moments(const Program& p, bool stores) {
  const float elements = (float)p.size() * p.n.pixels;
  for (int c = threadIdx.x; c < p.span; c += THREADS) {
    const int g = c / p.size();
    p.mean[c] = p.group[g];
    p.rstd[c] = 1.f / sqrtf(p.group[p.n.together + g] / elements + p.n.eps);
    if (stores && c % p.size() == 0) {
      p.n.mean[p.group_at(g)] = p.mean[c];
      p.n.rstd[p.group_at(g)] = p.rstd[c];
    }
  }
  __syncthreads();
}

// Write y from what is held, or from x (where x + residual is normalised: from that sum) read again.
template <class E> __device__ __forceinline__ void finish(const Program& p, bool from_held) {
  constexpr int W = E::WIDTH;
  each<W>(p, [&](int channel, int pixel) {
    const int64_t at = p.at(channel, pixel);
    float v[W], more[W];
    if (from_held) E::take(p.held, p.place(channel, pixel), v);
    else E::load(p.n.before ? p.n.total : p.n.x, at, p.n.dtype, v);
    const bool adds = p.n.residual && !p.n.before;
    if (adds) E::load(p.n.residual, at, p.n.dtype, more);
#pragma unroll
    for (int i = 0; i < W; ++i) {
      const int c = channel_of(p, channel, i);
      const float slope = p.rstd[c] * p.gain[c];
      v[i] = (v[i] - p.pivot[c]) * slope + (p.offset[c] - p.mean[c] * slope);
      if (p.n.act) v[i] = v[i] / (1.f + __expf(-v[i]));
      if (adds) v[i] += more[i];
    }
    E::store(p.n.y, at, p.n.dtype, v);
  });
}

// Merge what `parts` programs left, mean and sum of squared deviations (Chan et al. 1983), a warp per group.
template <class Mean, class M2>
__device__ __forceinline__ void merge_moments(const Program& p, int parts, Mean mean_of, M2 m2_of) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, pixels = (int)p.n.pixels;
  for (int g = warp; g < p.groups; g += WARPS) {
    float weighted = 0.f, m2 = 0.f;
    for (int k = lane; k < parts; k += 32) weighted += mean_of(g, k) * min(p.n.chunk, pixels - k * p.n.chunk);
#pragma unroll
    for (int other = 16; other; other >>= 1) weighted += __shfl_xor_sync(0xffffffffu, weighted, other);
    const float mean = weighted / pixels;
    for (int k = lane; k < parts; k += 32) {
      const float off = mean_of(g, k) - mean;
      m2 += m2_of(g, k) + off * off * p.size() * min(p.n.chunk, pixels - k * p.n.chunk);
    }
#pragma unroll
    for (int other = 16; other; other >>= 1) m2 += __shfl_xor_sync(0xffffffffu, m2, other);
    if (lane == 0) {
      p.group[g] = mean;
      p.group[p.n.together + g] = m2;
    }
  }
  __syncthreads();
}

// Backward: pivot, gain, offset, mean and rstd of each channel.
__device__ __forceinline__ void load_for_backward(const Program& p) {
  load_channels(p);
  for (int c = threadIdx.x; c < p.span; c += THREADS) {
    p.mean[c] = p.n.mean[p.group_at(c / p.size())];
    p.rstd[c] = p.n.rstd[p.group_at(c / p.size())];
  }
  __syncthreads();
}

// xhat, and dy turned into the gradient of v = xhat gain + offset.
__device__ __forceinline__ float pulled_back(const Program& p, int c, float x, float& dy) {
  const float xhat = (x - p.pivot[c]) * p.rstd[c] - p.mean[c] * p.rstd[c];
  if (p.n.act) {
    const float v = xhat * p.gain[c] + p.offset[c], s = 1.f / (1.f + __expf(-v));
    dy *= s * (1.f + v * (1.f - s));
  }
  return xhat;
}

// Hold x and dy; leave sum(dv xhat) and sum(dv) of each channel in a and b, of each group, times gain, in group.
template <class E> __device__ __forceinline__ void hold_and_sum(const Program& p) {
  constexpr int W = E::WIDTH;
  load_for_backward(p);
  unsigned char* held_dy = p.held + (size_t)p.held_elements() * E::HELD;
  channel_sums<W, 2>(p, [&](int channel, int pixel, float(&value)[2][W]) {
    float x[W];
    E::load(p.n.x, p.at(channel, pixel), p.n.dtype, x);
    E::load(p.n.dy, p.at(channel, pixel), p.n.dtype, value[1]);
    E::hold(p.held, p.place(channel, pixel), x);
    E::hold(held_dy, p.place(channel, pixel), value[1]);
#pragma unroll
    for (int i = 0; i < W; ++i) {
      const float xhat = pulled_back(p, channel_of(p, channel, i), x[i], value[1][i]);
      value[0][i] = value[1][i] * xhat;
    }
  });
  const int64_t row = (p.sample * p.n.chunks + p.part) * p.n.channels + p.first;
  for (int c = threadIdx.x; c < p.span; c += THREADS) {
    p.n.a[row + c] = p.sums[c];
    p.n.b[row + c] = p.sums[p.span + c];
  }
  group_sums(p, 0, true);
  group_sums(p, 1, true);
  __syncthreads();
}

// Write dx = rstd (dv gain - mean(dv gain) - xhat mean(dv gain xhat)) (+ dtotal) from the groups' sums over all pixels.
template <class E> __device__ __forceinline__ void finish_backward(const Program& p, bool from_held) {
  constexpr int W = E::WIDTH;
  const float elements = (float)p.size() * p.n.pixels;
  const unsigned char* held_dy = p.held + (size_t)p.held_elements() * E::HELD;
  each<W>(p, [&](int channel, int pixel) {
    const int64_t at = p.at(channel, pixel);
    float x[W], dy[W], more[W];
    if (from_held) {
      E::take(p.held, p.place(channel, pixel), x);
      E::take(held_dy, p.place(channel, pixel), dy);
    } else {
      E::load(p.n.x, at, p.n.dtype, x);
      E::load(p.n.dy, at, p.n.dtype, dy);
    }
    if (p.n.dtotal) E::load(p.n.dtotal, at, p.n.dtype, more);
#pragma unroll
    for (int i = 0; i < W; ++i) {
      const int c = channel_of(p, channel, i), g = c / p.size();
      const float xhat = pulled_back(p, c, x[i], dy[i]);
      const float mean_a = p.group[g] / elements, mean_b = p.group[p.n.together + g] / elements;
      x[i] = p.rstd[c] * (dy[i] * p.gain[c] - mean_b - xhat * mean_a);
      if (p.n.dtotal) x[i] += more[i];
    }
    E::store(p.n.dx, at, p.n.dtype, x);
  });
}

// Add what `parts` programs left, a warp per group.
template <class A, class B> __device__ __forceinline__ void merge_sums(const Program& p, int parts, A a_of, B b_of) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int g = warp; g < p.groups; g += WARPS) {
    float a = 0.f, b = 0.f;
    for (int k = lane; k < parts; k += 32) {
      a += a_of(g, k);
      b += b_of(g, k);
    }
#pragma unroll
    for (int other = 16; other; other >>= 1) {
      a += __shfl_xor_sync(0xffffffffu, a, other);
      b += __shfl_xor_sync(0xffffffffu, b, other);
    }
    if (lane == 0) {
      p.group[g] = a;
      p.group[p.n.together + g] = b;
    }
  }
  __syncthreads();
}

inline int programs(const GroupNorm& n) { return (int)(n.batch * n.blocks * n.chunks); }

// Shared memory of a program that holds `tensors` of its chunk, in elements of `size` bytes.
inline int shared_bytes(const GroupNorm& n, bool backward, int tensors, int size) {
  const int span = n.together * (int)(n.channels / n.groups);
  return fixed_bytes(span, n.together, backward) + tensors * span * n.chunk * size;
}

}  // namespace group_norm
