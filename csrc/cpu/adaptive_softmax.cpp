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
#include <type_traits>

#include "adaptive_softmax.h"
#include "elementary.h"

namespace par_xl::PAR_XL_ISA {
namespace {

template <class T> constexpr T minus_infinity = -std::numeric_limits<T>::infinity();

// Classes of one piece: `count` of them from `first` on, which is `column` of the softmax.
struct Classes {
    const AdaptivePiece& piece;
    int64_t first, count, column;
};

template <class X>
class Softmax {
    using T = acc_t<X>;
    const AdaptiveSoftmax& p;
    const AdaptivePlan<T> plan;
    const int64_t padded_width, pitch_z;
    int64_t begin = 0, n = 0;                        // of the rows of this round
    T *h_t, *h_rows;                                 // panels of (width, rows) and (rows, width)
    T *logits, *references;                          // kept: (columns, rows), and (tiles, rows) the m of each tile
    T *of_target, *largest, *scale, *shift, *hit;    // (rows)
    double *part_sum, *part_total, *bias_sums;       // (parts, rows): of exp(z - m) and of z; (columns)
    T *part_largest, *d_hidden;                      // (parts, rows), (parts, width, rows)
    T *tile_logits, *tables, *d_tables;              // of each thread: (classes, rows), and twice (classes, width)

public:
    explicit Softmax(const AdaptiveSoftmax& p, void* memory)
        : p(p), plan(p), padded_width(round_up(p.width, panel<T>)), pitch_z(round_up(plan.rows, panel<T>) + margin) {
        cut(static_cast<char*>(memory));
    }

    static int64_t bytes(const AdaptiveSoftmax& p) { return Softmax(p, nullptr).cut(nullptr); }

    void run() {
#pragma omp parallel num_threads(plan.threads)
        for (int64_t first = 0; first < p.rows; first += plan.rows) {
#pragma omp single
            {
                begin = first;
                n = min(plan.rows, p.rows - first);
            }
#pragma omp for
            for (int64_t t = 0; t < n; t += lanes<T>) pack_rows(t);
#pragma omp for schedule(dynamic)
            for (int64_t part = 0; part < plan.parts; ++part) first_pass(part);
#pragma omp for
            for (int64_t t = 0; t < round_up(n, lanes<T>); ++t) finish_row(t);
            if (!p.grad) continue;
#pragma omp for schedule(dynamic)
            for (int64_t part = 0; part < plan.parts; ++part) second_pass(part);
#pragma omp for
            for (int64_t d = 0; d < p.width; d += lanes<T>) add_hidden(d);
        }
    }

private:
    int64_t cut(char* memory) {
        int64_t size = 0;
        auto take = [&](auto*& x, int64_t count) {
            x = reinterpret_cast<std::remove_reference_t<decltype(x)>>(memory + size);
            size += round_up(count * int64_t(sizeof(*x)), 64);
        };
        const int64_t each_rows = plan.parts * plan.rows, each_classes = plan.threads * plan.classes;
        for (double** x : {&part_sum, &part_total}) take(*x, each_rows);
        take(bias_sums, p.pieces[0].d_bias || p.pieces[1].d_bias ? plan.columns : 0);
        take(part_largest, each_rows);
        for (T** x : {&of_target, &largest, &scale, &shift, &hit}) take(*x, plan.rows);
        take(h_t, p.width * round_up(plan.rows, panel<T>));
        take(tables, std::is_same_v<X, T> ? 0 : each_classes * p.width);
        take(tile_logits, plan.kept ? 0 : each_classes * pitch_z);
        take(logits, plan.kept ? plan.columns * pitch_z : 0);
        take(references, plan.kept ? plan.tiles * plan.rows : 0);
        take(h_rows, p.grad ? plan.rows * padded_width : 0);
        take(d_hidden, p.dh ? plan.parts * p.width * pitch_z : 0);
        take(d_tables, p.grad && p.width % lanes<T> ? each_classes * padded_width : 0);
        return size;
    }

    Classes classes_of(int64_t tile) const {
        const bool second = tile >= plan.tiles_of[0];
        const AdaptivePiece& piece = p.pieces[second];
        const int64_t first = (tile - second * plan.tiles_of[0]) * plan.classes;
        return {piece, first, min(plan.classes, piece.classes - first), first + second * p.pieces[0].classes};
    }

    int64_t token(int64_t t) const { return p.tokens ? p.tokens[begin + t] : begin + t; }

    // Rows t .. t + lanes of h into both operands; zeros behind the last.
    void pack_rows(int64_t t) const {
        const T* row = static_cast<const T*>(p.h) + (begin + t) * p.stride;
        const int64_t count = min(lanes<T>, n - t);
        T* to = h_t + t / panel<T> * panel<T> * p.width + t % panel<T>;
        for (int64_t d = 0; d < p.width; ++d)
#pragma omp simd
            for (int64_t i = 0; i < lanes<T>; ++i) to[d * panel<T> + i] = i < count ? row[i * p.stride + d] : T(0);
        for (int64_t i = 0; p.grad && i < count; ++i) pack(row + i * p.stride, t + i, n, h_rows);
    }

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

    const X* weight(const Classes& x) const { return static_cast<const X*>(x.piece.weight) + x.first * x.piece.stride; }
    T* d_weight(const Classes& x) const { return static_cast<T*>(x.piece.d_weight) + x.first * p.width; }
    T bias(const Classes& x, int64_t c) const {
        return x.piece.bias ? T(load(static_cast<const X*>(x.piece.bias)[x.first + c])) : T(0);
    }

    // The table's rows of these classes in the arithmetic type, `stride` apart.
    const T* table(const Classes& x, int64_t& stride) const {
        const X* rows = weight(x);
        if constexpr (std::is_same_v<X, T>) {
            stride = x.piece.stride;
            return rows;
        } else {
            T* to = own(tables, p.width);
            stride = p.width;
            for (int64_t c = 0; c < x.count; ++c)
#pragma omp simd
                for (int64_t d = 0; d < p.width; ++d) to[c * p.width + d] = load(rows[c * x.piece.stride + d]);
            return to;
        }
    }

    // Calls f(tile, its classes, those of the next one) for the tiles of a part; the last one is its own next.
    template <class F>
    void for_tiles(int64_t part, F&& f) const {
        const int64_t end = plan.first_tile(part + 1);
        for (int64_t tile = plan.first_tile(part); tile < end; ++tile) f(tile, classes_of(tile), classes_of(min(tile + 1, end - 1)));
    }

    // z (classes, rows) = W h^T + b, while the next table is fetched
    void multiply_logits(const Classes& x, const Classes& next, T* z) const {
        int64_t stride;
        const T* w = table(x, stride);
        const Ahead ahead = Ahead().add(weight(next), next.count, p.width, next.piece.stride);
        multiply(x.count, round_up(n, lanes<T>), p.width, w, stride, 1, Factor<T>{h_t, panel<T>, panel<T> * p.width}, z, pitch_z,
                 false, ahead);
        if (!x.piece.bias) return;
        for (int64_t c = 0; c < x.count; ++c) {
            const T b = bias(x, c);
            T* row = z + c * pitch_z;
#pragma omp simd
            for (int64_t t = 0; t < round_up(n, lanes<T>); ++t) row[t] += b;
        }
    }

    // This thread's buffer of `width` numbers for each class of a tile.
    T* own(T* buffers, int64_t width) const { return buffers + omp_get_thread_num() * plan.classes * width; }

    T* logits_of(const Classes& x) const { return plan.kept ? logits + x.column * pitch_z : own(tile_logits, pitch_z); }

    void first_pass(int64_t part) const {
        const int64_t at = part * plan.rows;
        for (int64_t t = 0; t < plan.rows; ++t) {
            part_largest[at + t] = minus_infinity<T>;
            part_sum[at + t] = part_total[at + t] = 0;
        }
        for_tiles(part, [&](int64_t tile, const Classes& x, const Classes& next) {
            T* z = logits_of(x);
            multiply_logits(x, next, z);
            for (int64_t t = 0; t < n; ++t) {
                const int64_t c = p.column[token(t)] - x.column;
                if (c >= 0 && c < x.count) of_target[t] = z[c * pitch_z + t];
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
            for (int64_t t = 0; t < n; ++t) sums[t] += z[c * pitch_z + t];
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
        for (; c + 2 <= x.count; c += 2) f(z + c * pitch_z, z + (c + 1) * pitch_z);
        if (c < x.count) f(z + c * pitch_z);
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
        T* const dh = d_hidden + part * p.width * pitch_z;
        for_tiles(part, [&](int64_t tile, const Classes& x, const Classes& next) {
            T* z = logits_of(x);
            if (!plan.kept) multiply_logits(x, next, z);
            differentiate(x, z, plan.kept ? references + tile * plan.rows : nullptr);
            if (x.piece.d_bias) add_rows(x, z);
            if (x.piece.d_weight) add_table(x, z);
            if (!p.dh) return;
            int64_t stride;
            const T* w = table(x, stride);
            Ahead ahead;
            if (plan.kept) ahead.add(logits_of(next), next.count, n, pitch_z);
            if (next.piece.d_weight) ahead.add(d_weight(next), next.count, p.width, p.width);
            multiply(p.width, round_up(n, lanes<T>), x.count, w, 1, stride, Factor<T>{z, pitch_z, panel<T>}, dh, pitch_z,
                     tile > plan.first_tile(part), ahead);
        });
    }

    // z <- dz, from exp(z - reference), or from z where there is none
    void differentiate(const Classes& x, T* z, const T* reference) const {
        T factor[most_rows];
        const int64_t whole = round_up(n, lanes<T>);
#pragma omp simd
        for (int64_t t = 0; t < whole; ++t) factor[t] = reference ? scale[t] * exponential(reference[t] - largest[t]) : scale[t];
        for (int64_t c = 0; c < x.count; ++c) {
            T* row = z + c * pitch_z;
            if (reference)
#pragma omp simd
                for (int64_t t = 0; t < whole; ++t) row[t] = factor[t] * row[t] - shift[t];
            else
#pragma omp simd
                for (int64_t t = 0; t < whole; ++t) row[t] = factor[t] * exponential(row[t] - largest[t]) - shift[t];
        }
        for (int64_t t = 0; t < n; ++t) {
            const int64_t c = p.column[token(t)] - x.column;
            if (c >= 0 && c < x.count) z[c * pitch_z + t] -= hit[t];
        }
    }

    // db += the sums of dz over the rows. Rare classes have the same dz in most rows: fp32 would round each addition alike.
    void add_rows(const Classes& x, const T* z) const {
        T* to = static_cast<T*>(x.piece.d_bias) + x.first;
        double* sums = bias_sums + x.column;
        for (int64_t c = 0; c < x.count; ++c) {
            double sum = begin ? sums[c] : 0;
#pragma omp simd reduction(+ : sum)
            for (int64_t t = 0; t < n; ++t) sum += z[c * pitch_z + t];
            sums[c] = sum;
            if (begin + n == p.rows) to[c] = T(sum);
        }
    }

    // dW (classes, width) += dz h. A product writes whole vectors, which would reach into the next row of a table that is not
    // as wide.
    void add_table(const Classes& x, const T* z) const {
        T* to = d_weight(x);
        const Factor<T> rows{h_rows, panel<T>, n * panel<T>};
        const Ahead ahead = Ahead().add(weight(x), x.count, p.width, x.piece.stride);
        if (p.width % lanes<T> == 0) return multiply(x.count, p.width, n, z, pitch_z, 1, rows, to, p.width, begin > 0, ahead);
        T* sums = own(d_tables, padded_width);
        multiply(x.count, p.width, n, z, pitch_z, 1, rows, sums, padded_width, false);
        for (int64_t c = 0; c < x.count; ++c)
            for (int64_t d = 0; d < p.width; ++d) {
                T& sum = to[c * p.width + d];
                sum = (begin ? sum : T(0)) + sums[c * padded_width + d];
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
                const T* from = d_hidden + (part * p.width + d + i) * pitch_z;
#pragma omp simd
                for (int64_t t = 0; t < n; ++t) sums[i][t] += from[t];
            }
        for (int64_t t = 0; t < n; ++t)
            for (int64_t i = 0; i < count; ++i) to[t * p.width + i] = sums[i][t];
    }
};

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
    dispatch(p.dtype, [&](auto storage) { bytes = Softmax<decltype(storage)>::bytes(p); });
    return bytes;
}

void adaptive_softmax(const AdaptiveSoftmax& p, void* memory) {
    dispatch(p.dtype, [&](auto storage) { Softmax<decltype(storage)>(p, memory).run(); });
}

}  // namespace par_xl::PAR_XL_ISA
