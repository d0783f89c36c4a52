// guided_update's CUDA kernels for Python: addresses as integers, 0 for what is absent; see cuda_kernel.py.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "kernel.h"

namespace {

using Address = uintptr_t;

template <class T> T* at(Address address) { return reinterpret_cast<T*>(address); }

GuidedUpdate call_of(
    Address cond, Address uncond, Address z, Address other, Address weight, const std::array<Address, 6>& levels,
    float w, float low, float high, int64_t samples, int64_t size, int dtype, int prediction, int kind, Address stream) {
  GuidedUpdate call = {at<void>(cond), at<void>(uncond), at<float>(z), at<float>(other), at<float>(weight), {}, w, low,
                       high, samples, size, dtype, prediction, kind, at<void>(stream)};
  for (int i = 0; i < 6; ++i) call.levels[i] = at<float>(levels[i]);
  return call;
}

}  // namespace

PYBIND11_MODULE(fewstep_guided_update, m) {
  pybind11::class_<GuidedUpdate>(m, "Call", pybind11::module_local()).def(pybind11::init(&call_of));
  m.def("forward", [](const GuidedUpdate& call, Address out, Address out_x) {
    return guided_update_forward(&call, at<float>(out), at<float>(out_x));
  });
  m.def("backward", [](const GuidedUpdate& call, Address grad_cond, Address grad_uncond, Address grad_z) {
    return guided_update_backward(&call, at<void>(grad_cond), at<void>(grad_uncond), at<float>(grad_z));
  });
}
