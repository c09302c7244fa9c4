// The three products of adaptive_softmax's tiles on vector instructions.
#pragma once
#include "adaptive_softmax.h"

namespace par_xl::PAR_XL_ISA {

template <class X>
class VectorProducts {
    using T = acc_t<X>;
    const AdaptiveSoftmax& p;
    const AdaptivePlan<T>& plan;
    const int64_t padded_width;
    T *h_t, *h_rows;       // of the round's rows: panels of (width, rows) and (rows, width)
    T *tables, *d_tables;  // of each thread: twice (classes, width)

public:
    static constexpr int64_t row_step = lanes<T>, class_step = tile_rows, h_bytes = 384 << 10;
    struct Thread {};  // a thread needs nothing

    VectorProducts(const AdaptiveSoftmax& p, const AdaptivePlan<T>& plan)
        : p(p), plan(plan), padded_width(round_up(p.width, panel<T>)) {}

    void cut(Cut& cut) {
        const int64_t each_classes = plan.threads * plan.classes;
        cut.take(h_t, p.width * round_up(plan.rows, panel<T>));
        cut.take(h_rows, p.grad ? plan.rows * padded_width : 0);
        cut.take(tables, std::is_same_v<X, T> ? 0 : each_classes * p.width);
        cut.take(d_tables, p.grad && p.width % lanes<T> ? each_classes * padded_width : 0);
    }

    // Rows t .. t + lanes of the n at h into both operands; zeros behind the last.
    void pack_rows(const T* h, int64_t t, int64_t n) const {
        const T* row = h + t * p.stride;
        const int64_t count = min(lanes<T>, n - t);
        T* to = h_t + t / panel<T> * panel<T> * p.width + t % panel<T>;
        for (int64_t d = 0; d < p.width; ++d)
#pragma omp simd
            for (int64_t i = 0; i < lanes<T>; ++i) to[d * panel<T> + i] = i < count ? row[i * p.stride + d] : T(0);
        for (int64_t i = 0; p.grad && i < count; ++i) pack(row + i * p.stride, t + i, n, h_rows);
    }

    // z (classes, rows) = W h^T, while the next table is fetched
    void multiply_logits(const Classes& x, const Classes& next, int64_t n, T* z) const {
        int64_t stride;
        const T* w = table(x, stride);
        const Ahead ahead = Ahead().add(next.weight<X>(), next.count, p.width, next.piece.stride);
        multiply(x.count, round_up(n, lanes<T>), p.width, w, stride, 1, Factor<T>{h_t, panel<T>, panel<T> * p.width}, z,
                 plan.pitch, false, ahead);
    }

    // dW (classes, width) = dz h, or plus that, and dh^T (width, rows) = W^T dz, or plus that, for those that are wanted; dh
    // while what the next classes need is fetched
    void multiply_gradients(const Classes& x, int64_t n, const T* z, bool add_to_table, T* dh, bool add_to_dh, Ahead ahead) const {
        if (x.piece.d_weight) multiply_table(x, n, z, add_to_table);
        if (!dh) return;
        int64_t stride;
        const T* w = table(x, stride);
        multiply(p.width, round_up(n, lanes<T>), x.count, w, 1, stride, Factor<T>{z, plan.pitch, panel<T>}, dh, plan.pitch,
                 add_to_dh, ahead);
    }

private:
    // Row i of `count` of an operand (count, width) in panels.
    void pack(const T* row, int64_t i, int64_t count, T* to) const {
        T* line = to + i * panel<T>;
        int64_t d = 0;
        for (; d + panel<T> <= p.width; d += panel<T>, line += count * panel<T>)
#pragma omp simd
            for (int64_t j = 0; j < panel<T>; ++j) line[j] = row[d + j];
        if (d == p.width) return;
        for (int64_t j = 0; j < panel<T>; ++j) line[j] = d + j < p.width ? row[d + j] : T(0);
    }

    // The table's rows of these classes in the arithmetic type, `stride` apart.
    const T* table(const Classes& x, int64_t& stride) const {
        const X* rows = x.weight<X>();
        if constexpr (std::is_same_v<X, T>) {
            stride = x.piece.stride;
            return rows;
        } else {
            T* to = plan.own(tables, p.width);
            stride = p.width;
            for (int64_t c = 0; c < x.count; ++c)
#pragma omp simd
                for (int64_t d = 0; d < p.width; ++d) to[c * p.width + d] = load(rows[c * x.piece.stride + d]);
            return to;
        }
    }

    // A product writes whole vectors, which would reach into the next row of a table that is not as wide.
    void multiply_table(const Classes& x, int64_t n, const T* z, bool add) const {
        T* to = x.d_weight<T>(p.width);
        const Factor<T> rows{h_rows, panel<T>, n * panel<T>};
        const Ahead ahead = Ahead().add(x.weight<X>(), x.count, p.width, x.piece.stride);
        if (p.width % lanes<T> == 0) return multiply(x.count, p.width, n, z, plan.pitch, 1, rows, to, p.width, add, ahead);
        T* sums = plan.own(d_tables, padded_width);
        multiply(x.count, p.width, n, z, plan.pitch, 1, rows, sums, padded_width, false);
        for (int64_t c = 0; c < x.count; ++c)
            for (int64_t d = 0; d < p.width; ++d) {
                T& sum = to[c * p.width + d];
                sum = (add ? sum : T(0)) + sums[c * padded_width + d];
            }
    }
};

}  // namespace par_xl::PAR_XL_ISA
