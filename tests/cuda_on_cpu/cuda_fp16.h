#pragma once
#include "cuda_runtime.h"

struct __half {
    _Float16 value;
    __half() = default;
    __half(float x) : value(static_cast<_Float16>(x)) {}  // to nearest, ties to even
    operator float() const { return value; }
};
struct __half2 { __half x, y; };
inline __half2 __floats2half2_rn(float x, float y) { return {x, y}; }
