// What elementwise.cpp offers to other kernels.

#pragma once

#include "common.h"

extern "C" {
void posttrain_norm(const Number* x, const Number* w, Number* y, float* scale, long rows, long width, float epsilon);
void posttrain_gated(const Number* gate, const Number* up_, Number* y, long rows, long width, long stride);
}
