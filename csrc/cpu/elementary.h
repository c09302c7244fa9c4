// Elementary functions of the C++ kernels, written so that loops over them vectorise.
#pragma once
#include <cmath>

#include "common.h"
#include "philox.h"

namespace par_xl::PAR_XL_ISA {

// exp(x) for x <= 88 within 1 ulp, 0 below -87: 2^n * e^f with n = round(x / log 2) and a polynomial of degree 7 for e^f.
// NaN stays NaN.
PAR_XL_INLINE float exponential(float x) {
    const float magic = 0x1.8p23f;  // adding it rounds to an integer, which then stands in the low bits
    float clamped = x < -87.0f ? -87.0f : x;
    float shifted = clamped * 1.44269504f + magic, n = shifted - magic;
    float f = clamped - n * 0.693359375f + n * 2.12194440e-4f;  // log 2 in two pieces: f keeps its low bits
    float y = 1.9875691e-4f;
    y = y * f + 1.3981999e-3f;
    y = y * f + 8.3334519e-3f;
    y = y * f + 4.1665795e-2f;
    y = y * f + 1.6666665e-1f;
    y = y * f + 5.0000001e-1f;
    y = y * (f * f) + f + 1.0f;
    float power = bit_cast<float>((bit_cast<int32_t>(shifted) << 23) + 0x3f800000);
    return x < -87.0f ? 0.0f : y * power;
}
PAR_XL_INLINE double exponential(double x) { return std::exp(x); }

}  // namespace par_xl::PAR_XL_ISA
