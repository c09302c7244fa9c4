// The instructions of csrc/cuda/tensor_core.cuh on the emulator, after the PTX ISA's description of each.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace par_xl::cuda {

template <bool TRANSPOSED>
void ldmatrix(uint32_t (&r)[4], const void* row, emulator::Place place) {
    struct Lane {
        const void* row;
        uint32_t (*r)[4];
    } mine{row, &r};
    if (reinterpret_cast<uintptr_t>(row) % 16) emulator::fail(place.text() + ": ldmatrix of an address not divisible by 16");
    emulator::meet_warp(~0u, place, mine, [](Lane** of) {
        uint16_t x[4][8][8];
        for (int i = 0; i < 32; ++i) memcpy(x[i / 8][i % 8], of[i]->row, 16);
        for (int i = 0; i < 32; ++i)
            for (int m = 0; m < 4; ++m) {
                const int a = i / 4, b = i % 4 * 2;
                const uint16_t pair[] = {TRANSPOSED ? x[m][b][a] : x[m][a][b], TRANSPOSED ? x[m][b + 1][a] : x[m][a][b + 1]};
                memcpy(&(*of[i]->r)[m], pair, 4);
            }
    });
}
inline void ldmatrix_x4(uint32_t (&r)[4], const void* row, EMULATOR_PLACE) { ldmatrix<false>(r, row, {file, line}); }
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row, EMULATOR_PLACE) { ldmatrix<true>(r, row, {file, line}); }

// Added up in fp32, product by product; the order of the hardware is not known.
template <class T>
void mma_16816(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], EMULATOR_PLACE) {
    struct Lane {
        float* c;
        const uint32_t *a, *b;
    } mine{c, a, b};
    emulator::meet_warp(~0u, {file, line}, mine, [](Lane** of) {
        float x[16][16], y[16][8];
        for (int i = 0; i < 32; ++i) {
            T pair[2];
            for (int part = 0; part < 4; ++part) {
                memcpy(pair, of[i]->a + part, 4);
                for (int j = 0; j < 2; ++j) x[i / 4 + part % 2 * 8][i % 4 * 2 + j + part / 2 * 8] = pair[j];
            }
            for (int part = 0; part < 2; ++part) {
                memcpy(pair, of[i]->b + part, 4);
                for (int j = 0; j < 2; ++j) y[i % 4 * 2 + j + part * 8][i / 4] = pair[j];
            }
        }
        for (int i = 0; i < 32; ++i)
            for (int part = 0; part < 4; ++part)
                for (int k = 0; k < 16; ++k)
                    of[i]->c[part] += x[i / 4 + part / 2 * 8][k] * y[k][i % 4 * 2 + part % 2];
    });
}

// The bytes arrive at the wait, which is as late as they may; until then they are poison.
inline void cp_async_16(void* to, const void* from, bool valid) {
    if (reinterpret_cast<uintptr_t>(to) % 16 || (valid && reinterpret_cast<uintptr_t>(from) % 16))
        emulator::fail("cp.async of an address not divisible by 16");
    memset(to, emulator::POISON, 16);
    emulator::self->open.push_back({to, from, valid});
}
inline void cp_async_commit() { emulator::self->closed.push_back(std::exchange(emulator::self->open, {})); }
template <int N>
void cp_async_wait() {
    auto& groups = emulator::self->closed;
    for (; groups.size() > N; groups.erase(groups.begin()))
        for (const auto& copy : groups.front())
            if (copy.valid) memcpy(copy.to, copy.from, 16);
            else memset(copy.to, 0, 16);
}

inline float exp2_approx(float x) { return exp2f(x); }

}  // namespace par_xl::cuda
