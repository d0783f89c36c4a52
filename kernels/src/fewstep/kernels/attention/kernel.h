// What kernel.cu exports to bindings.cpp. Tensors are (batch, heads, length, dim) by strides in elements, all multiples
// of 8, rows contiguous and 16-byte aligned; k and v share theirs, as do dk and dv. lse and delta are (batch, heads,
// queries). Pointers that may be absent: key_lengths, d_lse.
#pragma once
#include <stdint.h>

struct Strides {
  int64_t batch, head, row;
};

struct Attention {
  const void *q, *k, *v;
  void* o;
  float* lse;
  const int32_t* key_lengths;  // (batch,)
  Strides of_q, of_kv, of_o;
  float scale;                             // positive
  int batch, heads, queries, keys, dim, dtype;  // dtype: 1 bfloat16, 2 float16
  void* stream;
};

struct Gradients {
  const void* d_o;
  const float* d_lse;
  void *dq, *dk, *dv;
  float* delta;
  Strides of_d_o, of_dq, of_dkv;
};

extern "C" {
// Return 0 or the number of CUDA's error; -1 for a head dimension without a kernel.
int attention_forward(const Attention* call);
int attention_backward(const Attention* call, const Gradients* gradients);
}
