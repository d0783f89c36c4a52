// attention's CUDA kernels for Python: addresses as integers, 0 for what is absent; see cuda_kernel.py.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "kernel.h"

namespace {

using Address = uintptr_t;
using Steps = std::array<int64_t, 3>;

template <class T> T* at(Address address) { return reinterpret_cast<T*>(address); }
Strides strides_of(const Steps& s) { return {s[0], s[1], s[2]}; }

Attention attention_of(
    Address q, Address k, Address v, Address o, Address lse, Address key_lengths, const Steps& of_q, const Steps& of_kv,
    const Steps& of_o, float scale, const std::array<int, 6>& sizes_and_dtype, Address stream) {
  const auto& s = sizes_and_dtype;
  return {at<void>(q), at<void>(k), at<void>(v), at<void>(o), at<float>(lse), at<int32_t>(key_lengths),
          strides_of(of_q), strides_of(of_kv), strides_of(of_o), scale, s[0], s[1], s[2], s[3], s[4], s[5],
          at<void>(stream)};
}

Gradients gradients_of(
    Address d_o, Address d_lse, Address dq, Address dk, Address dv, Address delta, const Steps& of_d_o,
    const Steps& of_dq, const Steps& of_dkv) {
  return {at<void>(d_o), at<float>(d_lse), at<void>(dq), at<void>(dk), at<void>(dv), at<float>(delta),
          strides_of(of_d_o), strides_of(of_dq), strides_of(of_dkv)};
}

}  // namespace

PYBIND11_MODULE(fewstep_attention, m) {
  pybind11::class_<Attention>(m, "Attention", pybind11::module_local()).def(pybind11::init(&attention_of));
  pybind11::class_<Gradients>(m, "Gradients", pybind11::module_local()).def(pybind11::init(&gradients_of));
  m.def("forward", [](const Attention& call) { return attention_forward(&call); });
  m.def("backward", [](const Attention& call, const Gradients& g) { return attention_backward(&call, &g); });
}
