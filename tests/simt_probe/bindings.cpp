// The probe's kernels for Python: addresses as integers.
#include <pybind11/pybind11.h>

#include "kernel.h"

PYBIND11_MODULE(fewstep_simt_probe, m) {
  m.def("moments", [](uintptr_t x, uintptr_t mean, uintptr_t variance, int rows, int size) {
    return probe_moments((const float*)x, (float*)mean, (float*)variance, rows, size);
  });
  m.def("product", [](uintptr_t a, uintptr_t b, uintptr_t c, int depth) {
    return probe_product((const void*)a, (const void*)b, (float*)c, depth);
  });
}
