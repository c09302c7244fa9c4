#pragma once
#include "cuda_runtime.h"

struct __half {
    _Float16 value;
    __half() = default;
    __half(float x) : value(static_cast<_Float16>(x)) {}  // to nearest, ties to even
    operator float() const { return value; }
};
