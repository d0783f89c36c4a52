// What the probe of the SIMT emulator exports; see kernel.cu.
#pragma once
#include <stdint.h>

extern "C" {
int probe_moments(const float* x, float* mean, float* variance, int rows, int size);
int probe_product(const void* a, const void* b, float* c, int depth);
}
