// Dropout on the CPU; see par_xl/ops/dropout.py for which element belongs to which word of which counter.
#include "elementary.h"

namespace par_xl::PAR_XL_ISA {
namespace {

constexpr int64_t BLOCK = 512;  // counters whose words are made before they are used
constexpr int ROUNDS = 7;

PAR_XL_INLINE void make_words(uint64_t seed, int64_t begin, uint32_t (&words)[4][BLOCK]) {
#pragma omp simd
    for (int64_t i = 0; i < BLOCK; ++i) {
        const Philox x = philox<ROUNDS>(seed, uint64_t(begin + i));
        words[0][i] = x.c0;
        words[1][i] = x.c1;
        words[2][i] = x.c2;
        words[3][i] = x.c3;
    }
}

template <class T, bool RELU>
PAR_XL_INLINE void apply(const T* x, T* y, const uint32_t* words, int64_t size, uint32_t threshold, acc_t<T> scale) {
#pragma omp simd
    for (int64_t i = 0; i < size; ++i) {
        acc_t<T> value = load(x[i]);
        if (RELU) value = value < 0 ? 0 : value;  // NaN stays
        y[i] = store<T>(words[i] >= threshold ? value * scale : acc_t<T>(0));
    }
}

template <class T, bool RELU>
void drop(const Dropout& p) {
    const T* x = static_cast<const T*>(p.x);
    T* y = static_cast<T*>(p.y);
    const uint64_t seed = uint64_t(*p.seed);
    const acc_t<T> scale = acc_t<T>(p.scale);
#pragma omp parallel for schedule(static) num_threads(threads_for(p.size * int64_t(sizeof(T))))
    for (int64_t begin = 0; begin < p.plane; begin += BLOCK) {
        alignas(64) uint32_t words[4][BLOCK];
        make_words(seed, begin, words);
        for (int64_t w = 0; w < 4; ++w) {
            const int64_t from = w * p.plane + begin, size = min(min(BLOCK, p.plane - begin), p.size - from);
            apply<T, RELU>(x + from, y + from, words[w], size, p.threshold, scale);
        }
    }
}

}  // namespace

void dropout(const Dropout& p, bool relu) {
    dispatch(p.dtype, [&](auto storage) {
        using T = decltype(storage);
        relu ? drop<T, true>(p) : drop<T, false>(p);
    });
}

void relu_dropout_backward(const void* grad, const void* out, void* dx, int64_t size, DType dtype, double scale) {
    dispatch(dtype, [&](auto storage) {
        using T = decltype(storage);
        const T *g = static_cast<const T*>(grad), *y = static_cast<const T*>(out);
        T* d = static_cast<T*>(dx);
        const acc_t<T> factor = acc_t<T>(scale);
#pragma omp parallel for simd schedule(static) num_threads(threads_for(size * int64_t(sizeof(T))))
        for (int64_t i = 0; i < size; ++i) d[i] = store<T>(load(y[i]) <= 0 ? acc_t<T>(0) : load(g[i]) * factor);
    });
}

}  // namespace par_xl::PAR_XL_ISA
