// The mixture of a stochastic block on the CPU. A row is read once from memory and stays in the first-level cache while
// its statistics, results and sums are made. The cut into parts depends on the shape alone, never on the number of
// threads, and the parts' sums are added in one order, so the same input gives the same bits.
#include <cmath>

#include "common.h"

namespace par_xl::PAR_XL_ISA {
namespace {

int64_t rows_of_a_part(const Mix& p) { return max(32, ceil_div(p.rows, 64)); }

template <class A> PAR_XL_INLINE const A* vector_of(const void* x) { return static_cast<const A*>(x); }

// One row of x and of the branches, their statistics and the parameters.
template <class T>
struct Row {
    using A = acc_t<T>;
    const T *x, *branch[2];
    const A *gamma[2], *beta[2], *weights;
    A* stats;  // mean and rstd of x + branch[0], then of x + branch[1]
    int64_t width;

    PAR_XL_INLINE Row(const Mix& p, int64_t r) : width(p.width) {
        x = static_cast<const T*>(p.x) + r * width;
        for (int k = 0; k < 2; ++k) {
            branch[k] = static_cast<const T*>(p.branch[k]) + r * width;
            gamma[k] = vector_of<A>(p.gamma[k]);
            beta[k] = vector_of<A>(p.beta[k]);
        }
        weights = vector_of<A>(p.weights);
        stats = static_cast<A*>(p.stats) + 4 * r;
    }

    // Both branches stream through one loop: the sums of x + branch - centre, or of its squares.
    template <class F>
    PAR_XL_INLINE void sums(A* result, const A* centre, F&& f) const {
        const T *a = branch[0], *b = branch[1], *v = x;
        const A c0 = centre[0], c1 = centre[1];
        A s0 = 0, s1 = 0;
#pragma omp simd reduction(+ : s0, s1)
        for (int64_t i = 0; i < width; ++i) {
            s0 += f(load(v[i]) + load(a[i]) - c0);
            s1 += f(load(v[i]) + load(b[i]) - c1);
        }
        result[0] = s0 / A(width);
        result[1] = s1 / A(width);
    }

    PAR_XL_INLINE void forward(double eps, T* out, bool stream) const {
        A mean[2] = {0, 0}, variance[2];
        sums(mean, mean, [](A s) { return s; });
        sums(variance, mean, [](A s) { return s * s; });
        for (int k = 0; k < 2; ++k) {
            stats[2 * k] = mean[k];
            stats[2 * k + 1] = 1 / std::sqrt(variance[k] + A(eps));
        }
        const T *a = branch[0], *b = branch[1], *v = x;
        const A *g0 = gamma[0], *g1 = gamma[1], *b0 = beta[0], *b1 = beta[1];
        const A m0 = stats[0], r0 = stats[1], m1 = stats[2], r1 = stats[3], w0 = weights[0], w1 = weights[1], w2 = weights[2];
        write_rows(width, stream, result(out, [=](int64_t i) {
            const A s = load(v[i]);
            const A first = (s + load(a[i]) - m0) * r0 * g0[i] + b0[i], second = (s + load(b[i]) - m1) * r1 * g1[i] + b1[i];
            return w0 * first + w1 * second + w2 * s;
        }));
    }

    // Adds to columns (4, width): grad n_0, grad n_1, grad and grad x.
    PAR_XL_INLINE void backward(const T* grad, A* columns, T* d_x, T* d_a, T* d_b, bool stream) const {
        const T *a = branch[0], *b = branch[1], *v = x;
        const A *g0 = gamma[0], *g1 = gamma[1];
        const A m0 = stats[0], r0 = stats[1], m1 = stats[2], r1 = stats[3];
        A *sum_n0 = columns, *sum_n1 = columns + width, *sum = columns + 2 * width, *sum_x = columns + 3 * width;
        A h0 = 0, h1 = 0, hn0 = 0, hn1 = 0;
#pragma omp simd reduction(+ : h0, h1, hn0, hn1)
        for (int64_t i = 0; i < width; ++i) {
            const A g = load(grad[i]), s = load(v[i]);
            const A n0 = (s + load(a[i]) - m0) * r0, n1 = (s + load(b[i]) - m1) * r1;
            h0 += g * g0[i];
            h1 += g * g1[i];
            hn0 += g * g0[i] * n0;
            hn1 += g * g1[i] * n1;
            sum_n0[i] += g * n0;
            sum_n1[i] += g * n1;
            sum[i] += g;
            sum_x[i] += g * s;
        }
        h0 /= A(width), h1 /= A(width), hn0 /= A(width), hn1 /= A(width);
        const A k0 = weights[0] * r0, k1 = weights[1] * r1, w2 = weights[2];
        const auto first = [=](int64_t i) {
            return k0 * (load(grad[i]) * g0[i] - h0 - (load(v[i]) + load(a[i]) - m0) * r0 * hn0);
        };
        const auto second = [=](int64_t i) {
            return k1 * (load(grad[i]) * g1[i] - h1 - (load(v[i]) + load(b[i]) - m1) * r1 * hn1);
        };
        const auto both = [=](int64_t i) { return first(i) + second(i) + w2 * load(grad[i]); };
        write_rows(width, stream, result(d_a, first), result(d_b, second), result(d_x, both));
    }
};

// The parts' sums of columns to the gradients of the norms' parameters (4, width) and of the weights (3).
template <class A>
void finish(const Mix& p, const A* sums, A* d_weights, A* d_parameters) {
    const A *w = vector_of<A>(p.weights), *g0 = vector_of<A>(p.gamma[0]), *g1 = vector_of<A>(p.gamma[1]);
    const A *b0 = vector_of<A>(p.beta[0]), *b1 = vector_of<A>(p.beta[1]);
    const int64_t width = p.width, parts = mix_parts(p);
    constexpr int64_t BLOCK = 64;
    double d_w[3] = {0, 0, 0};
    for (int64_t begin = 0; begin < width; begin += BLOCK) {
        double total[4][BLOCK] = {};
        const int64_t columns = min(BLOCK, width - begin);
        for (int64_t part = 0; part < parts; ++part)
            for (int k = 0; k < 4; ++k) {
                const A* x = sums + (4 * part + k) * width + begin;
#pragma omp simd
                for (int64_t i = 0; i < columns; ++i) total[k][i] += x[i];
            }
        for (int64_t i = 0; i < columns; ++i) {
            const int64_t j = begin + i;
            const double n0 = total[0][i], n1 = total[1][i], g = total[2][i];
            d_parameters[j] = A(w[0] * n0);
            d_parameters[width + j] = A(w[0] * g);
            d_parameters[2 * width + j] = A(w[1] * n1);
            d_parameters[3 * width + j] = A(w[1] * g);
            d_w[0] += g0[j] * n0 + b0[j] * g;
            d_w[1] += g1[j] * n1 + b1[j] * g;
            d_w[2] += total[3][i];
        }
    }
    for (int k = 0; k < 3; ++k) d_weights[k] = A(d_w[k]);
}

// Calls f(part, first row, end) for every part, in parallel; `bytes`: what the call reads and writes.
template <class F>
void for_each_part(const Mix& p, int64_t bytes, F&& f) {
    const int64_t length = rows_of_a_part(p), count = mix_parts(p);
#pragma omp parallel num_threads(threads_for(bytes))
    {
#pragma omp for schedule(static)
        for (int64_t part = 0; part < count; ++part) f(part, part * length, min((part + 1) * length, p.rows));
        finish_streaming();
    }
}

}  // namespace

int64_t mix_parts(const Mix& p) { return ceil_div(p.rows, rows_of_a_part(p)); }

void mix_forward(const Mix& p, double eps, void* out) {
    dispatch(p.dtype, [&](auto storage) {
        using T = decltype(storage);
        const int64_t bytes = p.rows * p.width * int64_t(sizeof(T));
        for_each_part(p, 4 * bytes, [&](int64_t, int64_t begin, int64_t end) {
            for (int64_t r = begin; r < end; ++r) Row<T>(p, r).forward(eps, static_cast<T*>(out) + r * p.width, bytes >= STREAMED_BYTES);
        });
    });
}

void mix_backward(const Mix& p, const void* grad, void* sums, void* const* results) {
    dispatch(p.dtype, [&](auto storage) {
        using T = decltype(storage);
        using A = acc_t<T>;
        const int64_t width = p.width, bytes = p.rows * width * int64_t(sizeof(T));
        T *d_x = static_cast<T*>(results[0]), *d_a = static_cast<T*>(results[1]), *d_b = static_cast<T*>(results[2]);
        for_each_part(p, 7 * bytes, [&](int64_t part, int64_t begin, int64_t end) {
            A* columns = static_cast<A*>(sums) + 4 * part * width;
            memset(columns, 0, 4 * width * sizeof(A));
            for (int64_t r = begin; r < end; ++r)
                Row<T>(p, r).backward(static_cast<const T*>(grad) + r * width, columns, d_x + r * width, d_a + r * width,
                                      d_b + r * width, bytes >= STREAMED_BYTES);
        });
        finish(p, static_cast<const A*>(sums), static_cast<A*>(results[3]), static_cast<A*>(results[4]));
    });
}

}  // namespace par_xl::PAR_XL_ISA
