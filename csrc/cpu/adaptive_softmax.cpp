// Adaptive softmax on the CPU: the sort of the tokens by tail, and one softmax over its rows. Logits have the classes in
// rows, z = W h^T, and are made in tiles of some 96 classes by 200 rows of h, which stay in a core's second-level cache. All
// three products run on a tile, so that what stands between them moves no memory. With a row's target y, gradient g and
// largest logit so far m:
//
//     first pass:   z = W h^T + b,  m,  sum of exp(z - m),  z_y   ->   nll = lse - (1 - s) z_y - s mean(z) + w lse^2
//     second pass:  dz = g ((1 + 2 w lse) softmax(z) - (1 - s) [c = y] - s / C),   dW += dz h,   dh^T += W^T dz
//
// In between, exp(z - m) is kept if the workspace holds it and a product costs more than its way to memory and back;
// otherwise the second pass makes it again. The classes are cut into parts, each with its own dh, that the threads take as
// they come; the parts are added in one order. They are as many for one thread as for two, and more for more threads.
#include <limits>

#include "adaptive_softmax_vector.h"
#if defined(__AMX_BF16__)
#include "adaptive_softmax_amx.h"
#endif
#include "elementary.h"

namespace par_xl::PAR_XL_ISA {
namespace {

template <class T> constexpr T minus_infinity = -std::numeric_limits<T>::infinity();

template <class X, class Products>
class Softmax {
    using T = acc_t<X>;
    const AdaptiveSoftmax& p;
    const AdaptivePlan<T> plan;
    Products products{p, plan};
    int64_t begin = 0, n = 0;                      // of the rows of this round
    T *logits, *references;                        // kept: (columns, rows), and (tiles, rows) the m of each tile
    T *of_target, *largest, *scale, *shift, *hit;  // (rows)
    double *part_sum, *part_total, *bias_sums;     // (parts, rows): of exp(z - m) and of z; (columns)
    T *part_largest, *d_hidden;                    // (parts, rows), (parts, width, rows)
    T* tile_logits;                                // of each thread: (classes, rows)

public:
    explicit Softmax(const AdaptiveSoftmax& p) : p(p), plan(p, Products::row_step, Products::class_step, Products::h_bytes) {}

    int64_t memory() { return cut(nullptr); }

    void run(void* memory) {
        cut(static_cast<char*>(memory));
#pragma omp parallel num_threads(plan.threads)
        {
            [[maybe_unused]] typename Products::Thread thread;
            for (int64_t first = 0; first < p.rows; first += plan.rows) run_round(first);
        }
    }

private:
    void run_round(int64_t first) {
#pragma omp single
        {
            begin = first;
            n = min(plan.rows, p.rows - first);
        }
#pragma omp for
        for (int64_t t = 0; t < n; t += products.row_step)
            products.pack_rows(static_cast<const T*>(p.h) + begin * p.stride, t, n);
#pragma omp for schedule(dynamic)
        for (int64_t part = 0; part < plan.parts; ++part) first_pass(part);
#pragma omp for
        for (int64_t t = 0; t < round_up(n, lanes<T>); ++t) finish_row(t);
        if (!p.grad) return;
#pragma omp for schedule(dynamic)
        for (int64_t part = 0; part < plan.parts; ++part) second_pass(part);
#pragma omp for
        for (int64_t d = 0; d < p.width; d += lanes<T>) add_hidden(d);
    }

    int64_t cut(char* memory) {
        Cut cut{memory};
        const int64_t each_rows = plan.parts * plan.rows;
        for (double** x : {&part_sum, &part_total}) cut.take(*x, each_rows);
        cut.take(bias_sums, p.pieces[0].d_bias || p.pieces[1].d_bias ? plan.columns : 0);
        cut.take(part_largest, each_rows);
        for (T** x : {&of_target, &largest, &scale, &shift, &hit}) cut.take(*x, plan.rows);
        cut.take(tile_logits, plan.kept ? 0 : plan.threads * plan.classes * plan.pitch);
        cut.take(logits, plan.kept ? plan.columns * plan.pitch : 0);
        cut.take(references, plan.kept ? plan.tiles * plan.rows : 0);
        cut.take(d_hidden, p.dh ? plan.parts * p.width * plan.pitch : 0);
        products.cut(cut);
        return cut.size;
    }

    Classes classes_of(int64_t tile) const {
        const bool second = tile >= plan.tiles_of[0];
        const AdaptivePiece& piece = p.pieces[second];
        const int64_t first = (tile - second * plan.tiles_of[0]) * plan.classes;
        return {piece, first, min(plan.classes, piece.classes - first), first + second * p.pieces[0].classes};
    }

    int64_t token(int64_t t) const { return p.tokens ? p.tokens[begin + t] : begin + t; }

    T bias(const Classes& x, int64_t c) const {
        return x.piece.bias ? T(load(static_cast<const X*>(x.piece.bias)[x.first + c])) : T(0);
    }

    // Calls f(tile, its classes, those of the next one) for the tiles of a part; the last one is its own next.
    template <class F>
    void for_tiles(int64_t part, F&& f) const {
        const int64_t end = plan.first_tile(part + 1);
        for (int64_t tile = plan.first_tile(part); tile < end; ++tile)
            f(tile, classes_of(tile), classes_of(min(tile + 1, end - 1)));
    }

    // z (classes, rows) = W h^T + b
    void make_logits(const Classes& x, const Classes& next, T* z) const {
        products.multiply_logits(x, next, n, z);
        if (!x.piece.bias) return;
        for (int64_t c = 0; c < x.count; ++c) {
            const T b = bias(x, c);
            T* row = z + c * plan.pitch;
#pragma omp simd
            for (int64_t t = 0; t < round_up(n, lanes<T>); ++t) row[t] += b;
        }
    }

    T* logits_of(const Classes& x) const { return plan.kept ? logits + x.column * plan.pitch : plan.own(tile_logits, plan.pitch); }

    void first_pass(int64_t part) const {
        const int64_t at = part * plan.rows;
        for (int64_t t = 0; t < plan.rows; ++t) {
            part_largest[at + t] = minus_infinity<T>;
            part_sum[at + t] = part_total[at + t] = 0;
        }
        for_tiles(part, [&](int64_t tile, const Classes& x, const Classes& next) {
            T* z = logits_of(x);
            make_logits(x, next, z);
            for (int64_t t = 0; t < n; ++t) {
                const int64_t c = p.column[token(t)] - x.column;
                if (c >= 0 && c < x.count) of_target[t] = z[c * plan.pitch + t];
            }
            if (p.label_smoothing != 0) add_columns(x, z, part_total + at);
            exponentiate(x, z, part_largest + at, part_sum + at);
            if (plan.kept) memcpy(references + tile * plan.rows, part_largest + at, plan.rows * sizeof(T));
        });
    }

    void add_columns(const Classes& x, const T* z, double* total) const {
        T sums[most_rows] = {};
        for (int64_t c = 0; c < x.count; ++c)
#pragma omp simd
            for (int64_t t = 0; t < n; ++t) sums[t] += z[c * plan.pitch + t];
        for (int64_t t = 0; t < n; ++t) total[t] += sums[t];
    }

    // Adds exp(z - m) to the sums of the rows, for the largest logit m so far, and keeps it in the place of z. A row's sum
    // stays 0 while all its logits are -inf.
    void exponentiate(const Classes& x, T* z, T* largest, double* sum) const {
        T before[most_rows], m[most_rows], sums[most_rows] = {};
        const int64_t whole = round_up(n, lanes<T>);
        memcpy(before, largest, whole * sizeof(T));
        for_pairs(x, z, [&](auto*... row) {
#pragma omp simd
            for (int64_t t = 0; t < whole; ++t) ((largest[t] = row[t] > largest[t] ? row[t] : largest[t]), ...);
        });
        for (int64_t t = 0; t < whole; ++t) m[t] = largest[t] == minus_infinity<T> ? T(0) : largest[t];
        if (plan.kept)
            for_pairs(x, z, [&](auto*... row) {
#pragma omp simd
                for (int64_t t = 0; t < whole; ++t) sums[t] += (... + (row[t] = exponential(row[t] - m[t])));
            });
        else
            for_pairs(x, z, [&](auto*... row) {
#pragma omp simd
                for (int64_t t = 0; t < whole; ++t) sums[t] += (... + exponential(row[t] - m[t]));
            });
        for (int64_t t = 0; t < n; ++t) sum[t] = sum[t] * exponential(before[t] - m[t]) + sums[t];
    }

    // Calls f with two classes' logits at a time, so that what f gathers is read and written half as often.
    template <class F>
    void for_pairs(const Classes& x, T* z, F&& f) const {
        int64_t c = 0;
        for (; c + 2 <= x.count; c += 2) f(z + c * plan.pitch, z + (c + 1) * plan.pitch);
        if (c < x.count) f(z + c * plan.pitch);
    }

    // The row's loss from the parts, and what its gradients are made with; no gradient in the lanes behind the last row.
    void finish_row(int64_t t) const {
        if (t >= n) {
            largest[t] = scale[t] = shift[t] = 0;
            return;
        }
        T top = minus_infinity<T>;
        for (int64_t part = 0; part < plan.parts; ++part) {
            const T x = part_largest[part * plan.rows + t];
            top = x > top ? x : top;
        }
        double sum = 0, total = 0;
        for (int64_t part = 0; part < plan.parts; ++part) {
            const int64_t at = part * plan.rows + t;
            sum += part_largest[at] == top ? part_sum[at] : part_sum[at] * std::exp(double(part_largest[at]) - top);
            total += part_total[at];
        }
        // Relative to the largest logit, so that no digits are lost to its size.
        const double s = p.label_smoothing, log_sum = std::log(sum), lse = top + log_sum, of_y = double(of_target[t]) - top;
        const double mean = s == 0 ? 0.0 : total / plan.columns - top;
        static_cast<T*>(p.nll)[token(t)] += T(log_sum - (1 - s) * of_y - s * mean + p.z_loss * lse * lse);
        if (!p.grad) return;
        const double g = static_cast<const T*>(p.grad)[token(t)];
        largest[t] = top;
        scale[t] = T(g * (1 + 2 * p.z_loss * lse) / sum);
        shift[t] = T(g * s / plan.columns);
        hit[t] = T(g * (1 - s));
    }

    void second_pass(int64_t part) const {
        T* const dh = p.dh ? d_hidden + part * p.width * plan.pitch : nullptr;
        for_tiles(part, [&](int64_t tile, const Classes& x, const Classes& next) {
            T* z = logits_of(x);
            if (!plan.kept) make_logits(x, next, z);
            differentiate(x, z, plan.kept ? references + tile * plan.rows : nullptr);
            if (x.piece.d_bias) add_rows(x, z);
            Ahead ahead;
            if (plan.kept) ahead.add(logits_of(next), next.count, n, plan.pitch);
            if (next.piece.d_weight) ahead.add(next.d_weight<T>(p.width), next.count, p.width, p.width);
            products.multiply_gradients(x, n, z, begin > 0, dh, tile > plan.first_tile(part), ahead);
        });
    }

    // z <- dz, from exp(z - reference), or from z where there is none
    void differentiate(const Classes& x, T* z, const T* reference) const {
        T factor[most_rows];
        const int64_t whole = round_up(n, lanes<T>);
#pragma omp simd
        for (int64_t t = 0; t < whole; ++t) factor[t] = reference ? scale[t] * exponential(reference[t] - largest[t]) : scale[t];
        for (int64_t c = 0; c < x.count; ++c) {
            T* row = z + c * plan.pitch;
            if (reference)
#pragma omp simd
                for (int64_t t = 0; t < whole; ++t) row[t] = factor[t] * row[t] - shift[t];
            else
#pragma omp simd
                for (int64_t t = 0; t < whole; ++t) row[t] = factor[t] * exponential(row[t] - largest[t]) - shift[t];
        }
        for (int64_t t = 0; t < n; ++t) {
            const int64_t c = p.column[token(t)] - x.column;
            if (c >= 0 && c < x.count) z[c * plan.pitch + t] -= hit[t];
        }
    }

    // db += the sums of dz over the rows. Rare classes have the same dz in most rows: fp32 would round each addition alike.
    void add_rows(const Classes& x, const T* z) const {
        T* to = static_cast<T*>(x.piece.d_bias) + x.first;
        double* sums = bias_sums + x.column;
        for (int64_t c = 0; c < x.count; ++c) {
            double sum = begin ? sums[c] : 0;
#pragma omp simd reduction(+ : sum)
            for (int64_t t = 0; t < n; ++t) sum += z[c * plan.pitch + t];
            sums[c] = sum;
            if (begin + n == p.rows) to[c] = T(sum);
        }
    }

    // Columns d .. d + lanes of dh, from the parts of its transpose.
    void add_hidden(int64_t d) const {
        if (!p.dh) return;
        const int64_t count = min(lanes<T>, p.width - d);
        T* to = static_cast<T*>(p.dh) + begin * p.width + d;
        for (int64_t t = 0; t < n; ++t) __builtin_prefetch(to + t * p.width, 1);
        T sums[lanes<T>][most_rows] = {};
        for (int64_t part = 0; part < plan.parts; ++part)
            for (int64_t i = 0; i < count; ++i) {
                const T* from = d_hidden + (part * p.width + d + i) * plan.pitch;
#pragma omp simd
                for (int64_t t = 0; t < n; ++t) sums[i][t] += from[t];
            }
        for (int64_t t = 0; t < n; ++t)
            for (int64_t i = 0; i < count; ++i) to[t * p.width + i] = sums[i][t];
    }
};

// Calls f with the softmax, for the products that are the fastest.
template <class F>
void with_softmax(const AdaptiveSoftmax& p, F&& f) {
    dispatch(p.dtype, [&](auto storage) {
        using X = decltype(storage);
#if defined(__AMX_BF16__)
        if constexpr (!std::is_same_v<X, double>)
            if (AmxProducts<X>::pays(p)) return f(Softmax<X, AmxProducts<X>>(p));
#endif
        f(Softmax<X, VectorProducts<X>>(p));
    });
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

int64_t adaptive_softmax_memory(const AdaptiveSoftmax& p) {
    int64_t bytes = 0;
    with_softmax(p, [&](auto&& softmax) { bytes = softmax.memory(); });
    return bytes;
}

void adaptive_softmax(const AdaptiveSoftmax& p, void* memory) {
    with_softmax(p, [&](auto&& softmax) { softmax.run(memory); });
}

}  // namespace par_xl::PAR_XL_ISA
