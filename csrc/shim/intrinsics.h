// Arithmetic of one thread.
#pragma once

#include <cmath>
#include <cstring>

inline int __popc(unsigned x) { return __builtin_popcount(x); }

inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
