// Adaptive softmax on the CPU: the sort of the tokens by tail, and all that stands between the matrix products, in place
// over a block of rows of logits z (bias added, C columns, target's column y, gradient g of the row's loss):
//
//     nll = lse - (1 - s) z_y - s mean(z) + w lse^2                   lse = log sum_c exp(z_c)
//     z_c <- g * (softmax(z)_c (1 + 2 w lse) - (1 - s) [c = y] - s / C)
//
// A row is summed by one thread in blocks of one size, so the bits do not depend on the number of threads.
#include <limits>

#include "elementary.h"

namespace par_xl::PAR_XL_ISA {
namespace {

constexpr int64_t BLOCK = 512;  // columns that are summed in the arithmetic type; their sums are added in fp64

// Adds the bias; returns the largest logit.
template <class T>
PAR_XL_INLINE T add_bias(T* z, const T* bias, int64_t columns) {
    T largest = -std::numeric_limits<T>::infinity();
    if (bias) {
#pragma omp simd
        for (int64_t c = 0; c < columns; ++c) z[c] += bias[c];
    }
#pragma omp simd reduction(max : largest)
    for (int64_t c = 0; c < columns; ++c) largest = z[c] > largest ? z[c] : largest;
    return largest;
}

// Sum of exp(z - largest), which also takes the place of z if STORE. The next row, `ahead` of z, is fetched meanwhile.
template <bool STORE, class T>
PAR_XL_INLINE double exponentiate(T* z, T largest, int64_t columns, int64_t ahead) {
    double sum = 0;
    for (int64_t begin = 0; begin < columns; begin += BLOCK) {
        const int64_t end = min(begin + BLOCK, columns);
        for (int64_t c = begin; c < end; c += 64 / sizeof(T)) __builtin_prefetch(z + ahead + c, 1, 2);
        T part = 0;
#pragma omp simd reduction(+ : part)
        for (int64_t c = begin; c < end; ++c) {
            T e = exponential(z[c] - largest);
            if (STORE) z[c] = e;
            part += e;
        }
        sum += part;
    }
    return sum;
}

template <class T>
PAR_XL_INLINE double total(const T* z, int64_t columns) {
    double sum = 0;
    for (int64_t begin = 0; begin < columns; begin += BLOCK) {
        const int64_t end = min(begin + BLOCK, columns);
        T part = 0;
#pragma omp simd reduction(+ : part)
        for (int64_t c = begin; c < end; ++c) part += z[c];
        sum += part;
    }
    return sum;
}

template <class T>
void one_row(const AdaptiveRows& p, T* z, int64_t token) {
    const int64_t y = p.column[token];
    if (y < 0) {  // an ignored token
        if (p.grad) memset(z, 0, p.columns * sizeof(T));
        return;
    }
    const T largest = add_bias(z, static_cast<const T*>(p.bias), p.columns);
    // Relative to the largest logit, so that no digits are lost to its size.
    const double s = p.label_smoothing, of_target = double(z[y]) - largest;
    const double mean = s == 0 ? 0.0 : total(z, p.columns) / p.columns - largest;
    const auto sum_of = p.grad ? exponentiate<true, T> : exponentiate<false, T>;
    const double sum = sum_of(z, largest, p.columns, p.stride);
    const double log_sum = std::log(sum), lse = largest + log_sum;
    static_cast<T*>(p.nll)[token] += T(log_sum - (1 - s) * of_target - s * mean + p.z_loss * lse * lse);
    if (!p.grad) return;
    const double g = static_cast<const T*>(p.grad)[token];
    const T scale = T(g * (1 + 2 * p.z_loss * lse) / sum), shift = T(g * s / p.columns);
#pragma omp simd
    for (int64_t c = 0; c < p.columns; ++c) z[c] = scale * z[c] - shift;
    z[y] -= T(g * (1 - s));
}

}  // namespace

int64_t adaptive_buckets(const AdaptiveBuckets& p) {
    auto tail_of = [&](int64_t target) {  // -1: the head
        int64_t i = 0;
        while (target >= p.ends[i]) ++i;
        return i - 1;
    };
    memset(p.offsets, 0, (p.tails + 1) * sizeof(int64_t));
    for (int64_t t = 0; t < p.tokens; ++t) {
        const int64_t target = p.target[t];
        p.head_column[t] = p.tail_column[t] = -1;
        if (target == p.ignore_index) continue;
        if (target < 0 || target >= p.ends[p.tails]) return t;
        const int64_t tail = tail_of(target);
        if (tail < 0) {
            p.head_column[t] = target;
        } else {
            p.head_column[t] = p.ends[0] + (p.descending ? p.tails - 1 - tail : tail);
            p.tail_column[t] = target - p.ends[tail];
            ++p.offsets[tail + 1];
        }
    }
    for (int64_t i = 0; i < p.tails; ++i) p.offsets[i + 1] += p.offsets[i];
    // A stable counting sort; each offset ends one tail further on, and is then moved back.
    for (int64_t t = 0; t < p.tokens; ++t)
        if (p.tail_column[t] >= 0) p.order[p.offsets[tail_of(p.target[t])]++] = t;
    for (int64_t i = p.tails; i > 0; --i) p.offsets[i] = p.offsets[i - 1];
    p.offsets[0] = 0;
    return -1;
}

void adaptive_rows(const AdaptiveRows& p) {
    auto rows = [&](auto storage) {
        using T = decltype(storage);
#pragma omp parallel for schedule(static) num_threads(threads_for(p.rows * p.columns * sizeof(T)))
        for (int64_t i = 0; i < p.rows; ++i)
            one_row(p, static_cast<T*>(p.logits) + i * p.stride, p.tokens ? p.tokens[i] : i);
    };
    p.dtype == DType::f64 ? rows(double{}) : rows(float{});
}

}  // namespace par_xl::PAR_XL_ISA
