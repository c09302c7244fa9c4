// Elementary functions of the C++ kernels, written so that loops over them vectorise.
#pragma once
#include <cmath>

#include "common.h"

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

struct Philox { uint32_t c0, c1, c2, c3; };

// Philox4x32 (Salmon et al., SC 2011) at a counter: tl.randint4x(seed, counter, ROUNDS).
template <int ROUNDS>
PAR_XL_INLINE Philox philox(uint64_t seed, uint64_t counter) {
    uint32_t c0 = uint32_t(counter), c1 = uint32_t(counter >> 32), c2 = 0, c3 = 0;
    uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
    for (int i = 0; i < ROUNDS; ++i) {
        uint64_t a = uint64_t(0xD2511F53u) * c0, b = uint64_t(0xCD9E8D57u) * c2;
        c0 = uint32_t(b >> 32) ^ c1 ^ k0;
        c1 = uint32_t(b);
        c2 = uint32_t(a >> 32) ^ c3 ^ k1;
        c3 = uint32_t(a);
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return {c0, c1, c2, c3};
}

// The first word of Philox4x32-10 as a number in [0, 1): tl.rand(seed, offset).
PAR_XL_INLINE float uniform(uint64_t seed, uint64_t offset) {
    uint32_t c0 = philox<10>(seed, offset).c0;
    return float(int32_t(c0) < 0 ? int32_t(~c0) : int32_t(c0)) * 4.6566127342e-10f;
}

}  // namespace par_xl::PAR_XL_ISA
