// What kernel.cu exports to bindings.cpp; see arguments.py for the meaning of each. Pointers that may be absent: uncond,
// other, out_x, weight, grad_uncond, grad_z, and for the backward without limits cond, uncond and z.
#pragma once
#include <stdint.h>

struct GuidedUpdate {
  const void *cond, *uncond;            // dtype
  const float *z, *other, *weight;      // other: noise, or the gradient of the result
  const float* levels[6];               // (samples,): alpha and sigma at t, s and k
  float w, low, high;
  int64_t samples, size;                // size: elements of a sample
  int dtype, prediction, kind;          // dtype: 0 float32, 1 bfloat16, 2 float16
  void* stream;
};

extern "C" {
// Return 0 or the number of CUDA's error.
int guided_update_forward(const GuidedUpdate* call, float* out, float* out_x);
int guided_update_backward(const GuidedUpdate* call, void* grad_cond, void* grad_uncond, float* grad_z);
}
