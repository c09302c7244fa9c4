// Counter-based random numbers, for C++ and CUDA kernels alike; par_xl/ops/philox.py in plain PyTorch.
#pragma once
#include <cstdint>

// Forced inline in C++, where a shared copy could be linked from the object of a newer instruction set.
#ifdef __CUDACC__
#define PAR_XL_ANYWHERE __host__ __device__ __forceinline__
#else
#define PAR_XL_ANYWHERE inline __attribute__((always_inline))
#endif

namespace par_xl {

struct Philox { uint32_t c0, c1, c2, c3; };

// Philox4x32 (Salmon et al., SC 2011) at a counter: tl.randint4x(seed, counter, ROUNDS).
template <int ROUNDS>
PAR_XL_ANYWHERE Philox philox(uint64_t seed, uint64_t counter) {
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
PAR_XL_ANYWHERE float uniform(uint64_t seed, uint64_t offset) {
    uint32_t c0 = philox<10>(seed, offset).c0;
    return float(int32_t(c0) < 0 ? int32_t(~c0) : int32_t(c0)) * 4.6566127342e-10f;
}

}  // namespace par_xl
