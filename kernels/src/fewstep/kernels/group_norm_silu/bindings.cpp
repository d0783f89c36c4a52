// group_norm_silu's CUDA kernels for Python: addresses as integers, 0 for what is absent, in the order of kernel.h; see
// cuda_kernel.py.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>

#include "kernel.h"

namespace {

using Address = uintptr_t;
using Addresses = std::array<Address, 17>;
using Numbers = std::array<int64_t, 19>;

template <class T> T* at(Address address) { return reinterpret_cast<T*>(address); }

GroupNorm call_of(const Addresses& a, const Numbers& k, float eps, Address stream) {
  GroupNorm n = {};
  const void** inputs[] = {&n.x, &n.residual, &n.weight, &n.bias, &n.scale, &n.shift, &n.dy, &n.dtotal};
  void** outputs[] = {&n.y, &n.total, &n.dx};
  float** sums[] = {&n.mean, &n.rstd, &n.a, &n.b, &n.part_one, &n.part_two};
  int64_t* sizes[] = {&n.batch, &n.channels, &n.groups, &n.pixels, &n.scale_row, &n.shift_row};
  int* codes[] = {&n.together, &n.blocks, &n.chunks, &n.chunk, &n.dtype, &n.weight_dtype, &n.bias_dtype,
                  &n.scale_dtype, &n.shift_dtype, &n.wide, &n.act, &n.before, &n.last};
  for (int i = 0; i < 8; ++i) *inputs[i] = at<void>(a[i]);
  for (int i = 0; i < 3; ++i) *outputs[i] = at<void>(a[8 + i]);
  for (int i = 0; i < 6; ++i) *sums[i] = at<float>(a[11 + i]);
  for (int i = 0; i < 6; ++i) *sizes[i] = k[i];
  for (int i = 0; i < 13; ++i) *codes[i] = (int)k[6 + i];
  n.eps = eps;
  n.stream = at<void>(stream);
  return n;
}

int forward(const Addresses& a, const Numbers& k, float eps, Address stream, bool cluster) {
  const GroupNorm n = call_of(a, k, eps, stream);
  if (!cluster) return group_norm_silu_forward(&n);
  if (!group_norm_silu_forward_cluster) throw std::runtime_error("built without the cluster tier");
  return group_norm_silu_forward_cluster(&n);
}

int backward(const Addresses& a, const Numbers& k, float eps, Address stream, bool cluster) {
  const GroupNorm n = call_of(a, k, eps, stream);
  if (!cluster) return group_norm_silu_backward(&n);
  if (!group_norm_silu_backward_cluster) throw std::runtime_error("built without the cluster tier");
  return group_norm_silu_backward_cluster(&n);
}

int parameters(const std::array<Address, 9>& a, const std::array<int64_t, 8>& k, Address stream) {
  const ParameterGradients n = {at<float>(a[0]), at<float>(a[1]), at<void>(a[2]), at<void>(a[3]), at<void>(a[4]),
                                at<void>(a[5]), at<void>(a[6]), at<void>(a[7]), at<void>(a[8]), k[0], k[1], k[2],
                                (int)k[3], (int)k[4], (int)k[5], (int)k[6], (int)k[7], at<void>(stream)};
  return group_norm_silu_parameters(&n);
}

}  // namespace

PYBIND11_MODULE(fewstep_group_norm_silu, m) {
  m.def("forward", &forward);
  m.def("backward", &backward);
  m.def("parameters", &parameters);
  m.def("scratch", &group_norm_silu_scratch);
}
