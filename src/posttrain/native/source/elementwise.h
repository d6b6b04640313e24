// What elementwise.cpp offers to other kernels.

#pragma once

#include "common.h"

extern "C" {
void posttrain_norm(const bf16* x, const bf16* w, bf16* y, float* scale, long rows, long width, float epsilon);
void posttrain_gated(const bf16* gate, const bf16* up_, bf16* y, long rows, long width, long stride);
}
