// The three products of adaptive_softmax's tiles on AMX. With fp32 tables every factor has the parts that are asked for. A
// bf16 table is one part, exactly, an fp16 table two; dz then has two, far more than the tables' precision, and h those that
// are asked for. In fp32 dh^T = W^T dz is left to vectors: its depth is a tile's classes, three steps of AMX, too few for the
// cutting of both factors, and on cores with other guests AMX halves its rate at times, which vectors do not.
#pragma once
#include "adaptive_softmax.h"
#include "amx.h"

namespace par_xl::PAR_XL_ISA {

template <class X>
class AmxProducts {
    const AdaptiveSoftmax& p;
    const AdaptivePlan<float>& plan;
    const int parts, table_parts, gradient_parts;  // of h, W and dz
    bfloat16 *h_t, *h_rows;                        // of the round's rows: right factors (width, rows) and (rows, width)
    bfloat16 *tables, *tables_t;                   // of each thread: left factors (classes, width) and (width, classes)
    bfloat16 *gradients, *gradients_t;             // of each thread: dz as a left factor (classes, rows) and as a right one

    AmxFactor factor(bfloat16* data, int64_t depth, int parts) const { return {data, ceil_div(depth, amx_depth), parts}; }
    template <class... Size>
    static bfloat16* own(bfloat16* buffers, Size... size) { return buffers + omp_get_thread_num() * AmxFactor::elements(size...); }

public:
    static constexpr int64_t row_step = amx_depth, class_step = amx_depth, h_bytes = 512 << 10;
    static constexpr bool is_fp32 = std::is_same_v<X, float>;
    using Thread = AmxTiles;

    // To cut numbers into parts takes longer than a product that is narrow, or in fp32 for few rows, on vectors.
    static bool pays(const AdaptiveSoftmax& p) { return is_fp32 ? p.width >= 128 && p.rows >= 128 : p.width >= 16; }

    AmxProducts(const AdaptiveSoftmax& p, const AdaptivePlan<float>& plan)
        : p(p), plan(plan), parts(p.parts), table_parts(is_fp32 ? parts : std::is_same_v<X, half> ? 2 : 1),
          gradient_parts(is_fp32 ? parts : 2) {}

    void cut(Cut& cut) {
        auto take = [&](bfloat16*& x, bool needed, int64_t count, int64_t side, int64_t depth, int parts) {
            cut.take(x, needed ? count * AmxFactor::elements(side, depth, parts) : 0);
        };
        take(h_t, true, 1, plan.rows, p.width, parts);
        take(h_rows, p.grad, 1, p.width, plan.rows, parts);
        take(tables, true, plan.threads, plan.classes, p.width, table_parts);
        take(tables_t, p.dh && !is_fp32, plan.threads, p.width, plan.classes, table_parts);
        take(gradients, p.grad, plan.threads, plan.classes, plan.rows, gradient_parts);
        take(gradients_t, p.dh && !is_fp32, plan.threads, plan.rows, plan.classes, gradient_parts);
    }

    // Rows t .. t + 32 of the n at h into both factors; zeros behind the last.
    void pack_rows(const float* h, int64_t t, int64_t n) const {
        const float* rows = h + t * p.stride;
        const int64_t count = min(row_step, n - t);
        AmxFactor transposed = factor(h_t, p.width, parts);
        transposed.data = transposed.tile(t / amx_side, 0);
        pack_left(rows, p.stride, count, p.width, transposed);
        transpose_tiles(transposed, count);
        if (!p.grad) return;
        AmxFactor step = factor(h_rows, n, parts);
        step.data = step.tile(0, t / amx_depth);
        pack_right(rows, p.stride, count, p.width, step);
    }

    // z (classes, rows) = W h^T, while the next table is fetched
    void multiply_logits(const Classes& x, const Classes& next, int64_t n, float* z) const {
        const AmxFactor w = factor(own(tables, plan.classes, p.width, table_parts), p.width, table_parts);
        pack_left(x.weight<X>(), x.piece.stride, x.count, p.width, w);
        multiply(x.count, round_up(n, amx_side), w, factor(h_t, p.width, parts), z, plan.pitch, false,
                 Ahead().add(next.weight<X>(), next.count, p.width, next.piece.stride));
    }

    // dW (classes, width) = dz h, or plus that, and dh^T (width, rows) = W^T dz, or plus that, for those that are wanted; dh
    // while what the next classes need is fetched
    void multiply_gradients(const Classes& x, int64_t n, const float* z, bool add_to_table, float* dh, bool add_to_dh,
                            Ahead ahead) const {
        if (x.piece.d_weight) {
            const AmxFactor dz = factor(own(gradients, plan.classes, plan.rows, gradient_parts), n, gradient_parts);
            pack_left(z, plan.pitch, x.count, n, dz);
            multiply(x.count, p.width, dz, factor(h_rows, n, parts), x.d_weight<float>(p.width), p.width, add_to_table,
                     Ahead().add(x.weight<X>(), x.count, p.width, x.piece.stride));
        }
        if (!dh) return;
        if constexpr (is_fp32) {
            multiply(p.width, round_up(n, amx_side), x.count, x.weight<float>(), 1, x.piece.stride,
                     Factor<float>{z, plan.pitch, panel<float>}, dh, plan.pitch, add_to_dh, ahead);
        } else {
            const AmxFactor dz = factor(own(gradients_t, plan.rows, plan.classes, gradient_parts), x.count, gradient_parts);
            const AmxFactor w = factor(own(tables_t, p.width, plan.classes, table_parts), x.count, table_parts);
            pack_right(z, plan.pitch, x.count, n, dz);
            pack_right(x.weight<X>(), x.piece.stride, x.count, p.width, w);
            transpose_tiles(w, p.width);
            multiply(p.width, round_up(n, amx_side), w, dz, dh, plan.pitch, add_to_dh, ahead);
        }
    }
};

}  // namespace par_xl::PAR_XL_ISA
