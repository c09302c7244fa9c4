// Rows of rel_attention on the CPU: all that stands between its matrix products, in one pass over a block of score rows.
//
//     score = content + position (read at its own offset: this is the relative shift), masked to the window
//     forward:   content <- exp(score - max), dropped;  factor = 1 / (sum * (1 - p));  lse = max + log(sum)
//     backward:  P = exp(score - lse);  dW <- dS = P * (keep/(1-p) * dW - delta);  position <- dS;  content <- P * keep/(1-p)
//
// What is not visible becomes 0, so that the products that follow may run over whole rectangles. A row is summed by one
// thread, so the bits do not depend on the number of threads.
#include <cmath>
#include <limits>

#include "common.h"

namespace par_xl::PAR_XL_ISA {
namespace {

// exp(x) for x <= 88 within 1 ulp, 0 below -87: 2^n * e^f with n = round(x / log 2) and a polynomial of degree 7 for e^f.
// Written without branches, so that loops over it vectorise; NaN stays NaN.
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

// The first word of Philox4x32-10 (Salmon et al., SC 2011) at counter `offset`, as a number in [0, 1): tl.rand(seed, offset).
PAR_XL_INLINE float uniform(uint64_t seed, uint64_t offset) {
    uint32_t c0 = uint32_t(offset), c1 = uint32_t(offset >> 32), c2 = 0, c3 = 0;
    uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
    for (int i = 0; i < 10; ++i) {
        uint64_t a = uint64_t(0xD2511F53u) * c0, b = uint64_t(0xCD9E8D57u) * c2;
        c0 = uint32_t(b >> 32) ^ c1 ^ k0;
        c1 = uint32_t(b);
        c2 = uint32_t(a >> 32) ^ c3 ^ k1;
        c3 = uint32_t(a);
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return float(int32_t(c0) < 0 ? int32_t(~c0) : int32_t(c0)) * 4.6566127342e-10f;
}

// Row a of (batch, head), its visible columns [begin, end) and the address of its position products by column.
template <class T>
struct Row {
    int64_t index, begin, end;
    T* position;
    uint64_t offset;

    Row(const RelRows& p, int64_t b, int64_t h, int64_t a)
        : index((b * p.heads + h) * p.rows + a),
          begin(max(0, p.distance + a - p.left)),
          end(min(p.columns[0] + p.columns[1], p.distance + a + p.right + 1)),
          position(static_cast<T*>(p.position) + ((h * p.batches + b) * p.rows + a) * p.positions + p.shift - a),
          offset(p.offset + b * p.batch_offset + h * p.head_offset + a * p.row_offset) {}
};

// The visible columns of one part of a row, as a span [begin, end) of that part, which starts at column `first`.
struct Span {
    int64_t first, begin, end;

    template <class T>
    Span(const RelRows& p, const Row<T>& row, int part)
        : first(part ? p.columns[0] : 0),
          begin(min(max(row.begin - first, 0), p.columns[part])),
          end(max(begin, min(row.end - first, p.columns[part]))) {}
};

template <class T>
PAR_XL_INLINE T* row_of(void* const* parts, const RelRows& p, int part, int64_t index) {
    return static_cast<T*>(parts[part]) + index * p.columns[part];
}

template <class T>
PAR_XL_INLINE void zero_outside(T* x, int64_t begin, int64_t end, int64_t size) {
    memset(x, 0, begin * sizeof(T));
    memset(x + end, 0, (size - end) * sizeof(T));
}

template <class T>
PAR_XL_INLINE T add_positions(T* score, const T* position, Span s) {
    T largest = -std::numeric_limits<T>::infinity();
#pragma omp simd reduction(max : largest)
    for (int64_t c = s.begin; c < s.end; ++c) {
        score[c] += position[c];
        largest = score[c] > largest ? score[c] : largest;
    }
    return largest;
}

template <class T>
PAR_XL_INLINE T exponentiate(T* score, T largest, Span s) {
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t c = s.begin; c < s.end; ++c) {
        score[c] = exponential(score[c] - largest);
        sum += score[c];
    }
    return sum;
}

template <class T>
PAR_XL_INLINE void drop(T* weight, Span s, uint64_t seed, uint64_t offset, float dropout_p) {
#pragma omp simd
    for (int64_t c = s.begin; c < s.end; ++c) weight[c] = uniform(seed, offset + c) >= dropout_p ? weight[c] : T(0);
}

template <class T>
void forward_row(const RelRows& p, const Row<T>& row, T* factor, T* lse) {
    T largest = -std::numeric_limits<T>::infinity(), sum = 0;
    for (int part = 0; part < 2; ++part) {
        Span s(p, row, part);
        T found = add_positions(row_of<T>(p.scores, p, part, row.index), row.position + s.first, s);
        largest = found > largest ? found : largest;
    }
    for (int part = 0; part < 2; ++part) {
        Span s(p, row, part);
        T* weight = row_of<T>(p.scores, p, part, row.index);
        sum += exponentiate(weight, largest, s);
        if (p.dropout_p > 0) drop(weight, s, p.seed, row.offset + s.first, float(p.dropout_p));
        zero_outside(weight, s.begin, s.end, p.columns[part]);
    }
    *factor = row.begin < row.end ? 1 / (sum * T(1 - p.dropout_p)) : 0;
    *lse = row.begin < row.end ? largest + std::log(sum) : largest;
}

// P from the scores, and delta = sum of P * dW. With dropout, `position` then holds keep / (1 - p), and dW is times that.
template <class T>
PAR_XL_INLINE T recompute(const RelRows& p, T* score, T* d_weight, T* position, T lse, Span s, uint64_t offset) {
    T delta = 0;
#pragma omp simd
    for (int64_t c = s.begin; c < s.end; ++c) score[c] = exponential(score[c] + position[c] - lse);
    if (p.dropout_p > 0) {
        const T kept = T(1 / (1 - p.dropout_p));
        const float dropout_p = float(p.dropout_p);
#pragma omp simd
        for (int64_t c = s.begin; c < s.end; ++c) {
            position[c] = uniform(p.seed, offset + c) >= dropout_p ? kept : T(0);
            d_weight[c] *= position[c];
        }
    }
#pragma omp simd reduction(+ : delta)
    for (int64_t c = s.begin; c < s.end; ++c) delta += score[c] * d_weight[c];
    return delta;
}

template <class T>
PAR_XL_INLINE void differentiate(const RelRows& p, T* score, T* d_weight, T* position, T delta, Span s) {
    const bool dropout = p.dropout_p > 0;
#pragma omp simd
    for (int64_t c = s.begin; c < s.end; ++c) {
        T weight = score[c], d_score = weight * (d_weight[c] - delta);
        score[c] = dropout ? weight * position[c] : weight;
        d_weight[c] = d_score;
        position[c] = d_score;
    }
}

template <class T>
void backward_row(const RelRows& p, const Row<T>& row, int64_t a, T lse) {
    T delta = 0;
    for (int part = 0; part < 2; ++part) {
        Span s(p, row, part);
        delta += recompute(p, row_of<T>(p.scores, p, part, row.index), row_of<T>(p.d_weights, p, part, row.index),
                           row.position + s.first, lse, s, row.offset + s.first);
    }
    for (int part = 0; part < 2; ++part) {
        Span s(p, row, part);
        T* weight = row_of<T>(p.scores, p, part, row.index);
        T* d_weight = row_of<T>(p.d_weights, p, part, row.index);
        differentiate(p, weight, d_weight, row.position + s.first, delta, s);
        zero_outside(weight, s.begin, s.end, p.columns[part]);
        zero_outside(d_weight, s.begin, s.end, p.columns[part]);
    }
    const int64_t start = p.shift - a;
    const bool empty = row.begin >= row.end;
    zero_outside(row.position - start, empty ? 0 : start + row.begin, empty ? 0 : start + row.end, p.positions);
}

template <class F>
void for_each_row(const RelRows& p, F&& f) {
    const int64_t count = p.batches * p.heads * p.rows;
#pragma omp parallel for schedule(static) num_threads(threads_for(count * p.positions * 4))
    for (int64_t i = 0; i < count; ++i) f(i / (p.heads * p.rows), i / p.rows % p.heads, i % p.rows);
}

// Calls f(float{}) or f(double{}).
template <class F>
void dispatch_wide(DType dtype, F&& f) {
    return dtype == DType::f64 ? f(double{}) : f(float{});
}

}  // namespace

void rel_attention_forward(const RelRows& p, void* factor, void* lse, int64_t batch_stride, int64_t head_stride) {
    dispatch_wide(p.dtype, [&](auto type) {
        using T = decltype(type);
        for_each_row(p, [&](int64_t b, int64_t h, int64_t a) {
            Row<T> row(p, b, h, a);
            forward_row(p, row, static_cast<T*>(factor) + row.index,
                        static_cast<T*>(lse) + b * batch_stride + h * head_stride + a);
        });
    });
}

void rel_attention_backward(const RelRows& p, const void* lse, int64_t batch_stride, int64_t head_stride) {
    dispatch_wide(p.dtype, [&](auto type) {
        using T = decltype(type);
        for_each_row(p, [&](int64_t b, int64_t h, int64_t a) {
            backward_row(p, Row<T>(p, b, h, a), a, static_cast<const T*>(lse)[b * batch_stride + h * head_stride + a]);
        });
    });
}

}  // namespace par_xl::PAR_XL_ISA
