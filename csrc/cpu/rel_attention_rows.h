// What rel_attention on the CPU does to a row of scores between the products.
#pragma once
#include <limits>

#include "elementary.h"
#include "rel_attention.h"

namespace par_xl::PAR_XL_ISA {

// Products of a row to weights exp(scale * (product - max)). Returns 1 / sum of them (0 for an empty row), and lse.
template <class T>
PAR_XL_INLINE T softmax_row(T* score, const Span& s, T scale, T& lse) {
    T largest = -std::numeric_limits<T>::infinity(), sum = 0;
#pragma omp simd reduction(max : largest)
    for (int64_t c = s.begin; c < s.end; ++c) largest = score[c] > largest ? score[c] : largest;
#pragma omp simd reduction(+ : sum)
    for (int64_t c = s.begin; c < s.end; ++c) {
        score[c] = exponential((score[c] - largest) * scale);
        sum += score[c];
    }
    lse = s.begin < s.end ? largest * scale + std::log(sum) : -std::numeric_limits<T>::infinity();
    return s.begin < s.end ? 1 / sum : 0;
}

// Turns the sign of the weights that dropout drops. (A weight of 0 has none to turn, and makes no difference.)
template <class T>
PAR_XL_INLINE void mark_dropped(T* weight, const Span& s, uint64_t seed, uint64_t offset, float dropout_p) {
#pragma omp simd
    for (int64_t c = s.begin; c < s.end; ++c) weight[c] = uniform(seed, offset + c) >= dropout_p ? weight[c] : -weight[c];
}

// weight <- W, what dropout leaves of weight * factor (dropped ones are negative); d_weight <- scale * dS. The sum of
// W dW is taken from `whole`, if that is not null.
template <class T>
PAR_XL_INLINE void differentiate_row(T* weight, T* d_weight, const Span& s, T factor, T kept, T scale, const T* whole) {
    T delta = 0;
#pragma omp simd reduction(+ : delta)
    for (int64_t c = s.begin; c < s.end; ++c) {
        weight[c] *= factor;
        d_weight[c] = weight[c] < 0 ? 0 : d_weight[c] * kept;
        delta += weight[c] * d_weight[c];
    }
    if (whole) delta = *whole;
#pragma omp simd
    for (int64_t c = s.begin; c < s.end; ++c) {
        T w = weight[c];
        d_weight[c] = (w < 0 ? -w : w) * (d_weight[c] - delta) * scale;
        weight[c] = w < 0 ? 0 : w * kept;
    }
}

template <class T>
PAR_XL_INLINE void zero_invisible(T* x, const Span& s) {
    memset(x + s.read_begin, 0, (s.begin - s.read_begin) * sizeof(T));
    memset(x + s.end, 0, (s.read_end - s.end) * sizeof(T));
}

}  // namespace par_xl::PAR_XL_ISA
