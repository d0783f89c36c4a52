// Guidance, conversion to x, clipping and one update in one pass over memory, in CUDA; and its gradient.
//
// A block takes THREADS * Width consecutive elements of one sample. One thread works out the sample's scalars, by the
// formulas of reference.py; then every thread takes Width elements, 16 bytes or more at a time where the sizes allow.
#include "kernel.h"
#include "simt.h"

namespace {

constexpr int THREADS = 256, WIDE = 8;

enum Prediction { X, EPS, V, FLOW };
enum Kind { ESTIMATE, DDIM, RENOISE, POSTERIOR, BLEND };

// x = (z_to_x z + output_to_x output) over; result = from_z z + from_x x + from_other other.
struct Scalars {
  float z_to_x, output_to_x, over, from_z, from_x, from_other, w;
};

__device__ void convert(Scalars& c, int prediction, float alpha, float sigma) {
  const float divisor = prediction == EPS ? alpha : prediction == V ? alpha * alpha + sigma * sigma : alpha + sigma;
  c.z_to_x = prediction == X ? 0.f : prediction == V ? alpha : 1.f;
  c.output_to_x = prediction == X ? 1.f : -sigma;
  c.over = prediction == X ? 1.f : 1.f / divisor;
}

// 1 - e^{lambda_t - lambda_s}, and the other part in `kept`.
__device__ float snr_ratio(float alpha_t, float sigma_t, float alpha_s, float sigma_s, float& kept) {
  const float root = (alpha_t * sigma_s) / (sigma_t * alpha_s);
  kept = root * root;
  return fmaxf((1.f - root) * (1.f + root), 0.f);
}

__device__ void step(Scalars& c, int kind, const float (&level)[6]) {
  const float alpha_t = level[0], sigma_t = level[1], alpha_s = level[2], sigma_s = level[3];
  float kept;
  c.from_z = c.from_other = 0.f;
  c.from_x = 1.f;
  if (kind == DDIM) {
    c.from_z = sigma_s / sigma_t;
    c.from_x = alpha_s - c.from_z * alpha_t;
  } else if (kind == RENOISE) {
    const float alpha_k = level[4], sigma_k = level[5], ratio = sigma_k / sigma_t, back = alpha_s / alpha_k;
    c.from_z = back * ratio;
    c.from_x = back * (alpha_k - ratio * alpha_t);
    c.from_other = sigma_s * sqrtf(snr_ratio(alpha_s, sigma_s, alpha_k, sigma_k, kept));
  } else if (kind == POSTERIOR) {
    const float rest = snr_ratio(alpha_t, sigma_t, alpha_s, sigma_s, kept);
    c.from_z = kept * alpha_s / alpha_t;
    c.from_x = rest * alpha_s;
    c.from_other = sigma_s * sqrtf(rest);
  } else if (kind == BLEND) {
    c.from_other = alpha_s;  // its share
    c.from_x = 1.f - alpha_s;
  }
}

__device__ void scalars_of(Scalars& c, const GuidedUpdate& call, int64_t sample) {
  float level[6];
#pragma unroll
  for (int i = 0; i < 6; ++i) level[i] = call.levels[i][sample];
  convert(c, call.prediction, level[0], level[1]);
  step(c, call.kind, level);
  c.w = call.weight ? call.weight[sample] : call.w;
}

using simt::narrow;
using simt::widen;

// Width elements as they lie in memory, moved 16 bytes at a time if there are so many.
template <class T, int Width> struct Pack {
  static constexpr int BYTES = Width * sizeof(T), WORDS = BYTES >= 16 ? BYTES / 16 : 1;
  union {
    uint4 words[WORDS];
    T values[Width];
  };
  __device__ __forceinline__ Pack() {}
  __device__ __forceinline__ void load(const void* base, int64_t at) {
    if constexpr (BYTES >= 16) {
#pragma unroll
      for (int i = 0; i < WORDS; ++i) words[i] = reinterpret_cast<const uint4*>((const T*)base + at)[i];
    } else {
#pragma unroll
      for (int i = 0; i < Width; ++i) values[i] = ((const T*)base)[at + i];
    }
  }
  __device__ __forceinline__ void store(void* base, int64_t at) const {
    if constexpr (BYTES >= 16) {
#pragma unroll
      for (int i = 0; i < WORDS; ++i) reinterpret_cast<uint4*>((T*)base + at)[i] = words[i];
    } else {
#pragma unroll
      for (int i = 0; i < Width; ++i) ((T*)base)[at + i] = values[i];
    }
  }
};

// The place of this thread's first element, or -1 beyond the sample's end; fills the block's scalars.
template <int Width> __device__ __forceinline__ int64_t begin(const GuidedUpdate& call, Scalars* scalars) {
  const int64_t blocks = (call.size + THREADS * Width - 1) / (THREADS * Width);
  const int64_t sample = blockIdx.x / blocks;
  if (threadIdx.x == 0) scalars_of(*scalars, call, sample);
  __syncthreads();
  const int64_t at = (blockIdx.x % blocks * THREADS + threadIdx.x) * Width;
  return at < call.size ? sample * call.size + at : -1;
}

template <class T, int Width>
__global__ void __launch_bounds__(THREADS) forward(const GuidedUpdate call, float* out, float* out_x) {
  SIMT_SHARED(Scalars, scalars, 1);
  const int64_t at = begin<Width>(call, scalars);
  if (at < 0) return;
  const Scalars c = scalars[0];
  Pack<T, Width> cond, uncond;
  Pack<float, Width> z, other, x, moved;
  cond.load(call.cond, at);
  z.load(call.z, at);
  if (call.uncond) uncond.load(call.uncond, at);
  if (call.other) other.load(call.other, at);
#pragma unroll
  for (int i = 0; i < Width; ++i) {
    float output = widen(cond.values[i]);
    if (call.uncond) output += c.w * (output - widen(uncond.values[i]));
    float value = (c.z_to_x * z.values[i] + c.output_to_x * output) * c.over;
    value = value < call.low ? call.low : value > call.high ? call.high : value;  // NaN stays
    x.values[i] = value;
    moved.values[i] = c.from_z * z.values[i] + c.from_x * value;
    if (call.other) moved.values[i] += c.from_other * other.values[i];
  }
  moved.store(out, at);
  if (out_x) x.store(out_x, at);
}

template <class T, int Width>
__global__ void __launch_bounds__(THREADS)
backward(const GuidedUpdate call, void* grad_cond, void* grad_uncond, float* grad_z) {
  SIMT_SHARED(Scalars, scalars, 1);
  const int64_t at = begin<Width>(call, scalars);
  if (at < 0) return;
  const Scalars c = scalars[0];
  const bool clips = call.cond != nullptr;
  const float w = grad_uncond ? c.w : 0.f;
  Pack<T, Width> cond, uncond, d_cond, d_uncond;
  Pack<float, Width> z, grad, d_z;
  grad.load(call.other, at);
  if (clips) {
    cond.load(call.cond, at);
    z.load(call.z, at);
    if (call.uncond) uncond.load(call.uncond, at);
  }
#pragma unroll
  for (int i = 0; i < Width; ++i) {
    float d_x = c.from_x * grad.values[i];
    if (clips) {
      float output = widen(cond.values[i]);
      if (call.uncond) output += w * (output - widen(uncond.values[i]));
      const float x = (c.z_to_x * z.values[i] + c.output_to_x * output) * c.over;
      d_x = x < call.low || x > call.high ? 0.f : d_x;
    }
    d_x *= c.over;
    narrow((1.f + w) * (c.output_to_x * d_x), d_cond.values[i]);
    narrow(-w * (c.output_to_x * d_x), d_uncond.values[i]);
    d_z.values[i] = c.from_z * grad.values[i] + c.z_to_x * d_x;
  }
  d_cond.store(grad_cond, at);
  if (grad_uncond) d_uncond.store(grad_uncond, at);
  if (grad_z) d_z.store(grad_z, at);
}

// Whether all of these are absent or start on 16 bytes, and samples are whole vectors.
template <class... Pointers> bool aligned(int64_t size, Pointers... pointers) {
  return size % WIDE == 0 && ((((uintptr_t)pointers) % 16 == 0) && ...);
}

dim3 grid_of(const GuidedUpdate& call, int width) {
  const int64_t per_block = (int64_t)THREADS * width;
  return dim3((unsigned)(call.samples * ((call.size + per_block - 1) / per_block)));
}

template <class T> int forward_of(const GuidedUpdate& call, float* out, float* out_x) {
  const dim3 threads(THREADS);
  if (aligned(call.size, call.cond, call.uncond, call.z, call.other, out, out_x)) {
    SIMT_LAUNCH((forward<T, WIDE>), grid_of(call, WIDE), threads, 0, call.stream, call, out, out_x);
  } else {
    SIMT_LAUNCH((forward<T, 1>), grid_of(call, 1), threads, 0, call.stream, call, out, out_x);
  }
  return SIMT_STATUS();
}

template <class T> int backward_of(const GuidedUpdate& call, void* grad_cond, void* grad_uncond, float* grad_z) {
  const dim3 threads(THREADS);
  if (aligned(call.size, call.cond, call.uncond, call.z, call.other, grad_cond, grad_uncond, grad_z)) {
    SIMT_LAUNCH((backward<T, WIDE>), grid_of(call, WIDE), threads, 0, call.stream, call, grad_cond, grad_uncond, grad_z);
  } else {
    SIMT_LAUNCH((backward<T, 1>), grid_of(call, 1), threads, 0, call.stream, call, grad_cond, grad_uncond, grad_z);
  }
  return SIMT_STATUS();
}

}  // namespace

extern "C" int guided_update_forward(const GuidedUpdate* call, float* out, float* out_x) {
  if (call->dtype == 0) return forward_of<float>(*call, out, out_x);
  return call->dtype == 1 ? forward_of<__nv_bfloat16>(*call, out, out_x) : forward_of<__half>(*call, out, out_x);
}

extern "C" int guided_update_backward(const GuidedUpdate* call, void* grad_cond, void* grad_uncond, float* grad_z) {
  if (call->dtype == 0) return backward_of<float>(*call, grad_cond, grad_uncond, grad_z);
  if (call->dtype == 1) return backward_of<__nv_bfloat16>(*call, grad_cond, grad_uncond, grad_z);
  return backward_of<__half>(*call, grad_cond, grad_uncond, grad_z);
}
