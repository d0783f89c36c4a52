// What kernel.cu and cluster_sm90a.cu export to bindings.cpp. Pointers that may be absent (null): residual, weight, bias,
// scale, shift, total, dtotal and the four gradients.
#pragma once
#include <stdint.h>

struct GroupNorm {
  const void *x, *residual;                                     // (B, C, S), dtype
  const void *weight, *bias, *scale, *shift;                    // (C,), (B, C); dtypes below
  void *y, *total;                                              // like x; total = x + residual if before
  float *mean, *rstd;                                           // (B, G); means less each group's first value
  const void *dy, *dtotal;                                      // backward: gradients of y and total
  void* dx;
  float *a, *b;                                                 // (B, chunks, C): sum(dv xhat), sum(dv)
  float *part_one, *part_two;                                   // (B, chunks, G): what chunks leave for each other
  int64_t batch, channels, groups, pixels, scale_row, shift_row;
  int together, blocks, chunks, chunk;                          // groups and pixels of a program, how many there are
  int dtype, weight_dtype, bias_dtype, scale_dtype, shift_dtype;     // 0 float32, 1 bfloat16, 2 float16
  int wide, act, before, last;                                  // flags: 16-byte vectors, SiLU, channels_last
  float eps;
  void* stream;
};

struct ParameterGradients {
  const float *a, *b;                                           // (batch, chunks, channels)
  const void *weight, *bias, *scale;
  void *dweight, *dbias, *dscale, *dshift;                      // in the dtypes of their parameters
  int64_t batch, channels, scale_row;
  int chunks, weight_dtype, bias_dtype, scale_dtype, shift_dtype;
  void* stream;
};

extern "C" {
// Return 0 or the number of CUDA's error. chunks > 1 takes two launches, and x again.
int group_norm_silu_forward(const GroupNorm* call);
int group_norm_silu_backward(const GroupNorm* call);
int group_norm_silu_parameters(const ParameterGradients* call);
// The same with the chunks of a group in one cluster (2 to 8) that share their statistics on chip, so that memory is read
// once. sm_90 only; weak, for builds without it.
__attribute__((weak)) int group_norm_silu_forward_cluster(const GroupNorm* call);
__attribute__((weak)) int group_norm_silu_backward_cluster(const GroupNorm* call);
// Bytes of shared memory of a program, without what it holds of x (and dy).
int group_norm_silu_scratch(int span, int groups, int backward);
}
