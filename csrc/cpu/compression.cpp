// Compression of memory rows on the CPU, and the update of a compressive memory in one pass over its rows. A row is
// worked on in blocks of columns whose partial results stay in the first-level cache.
#include <type_traits>

#include "common.h"

namespace par_xl::PAR_XL_ISA {
namespace {

constexpr int64_t BLOCK = 1024;

// Calls f(first column, columns) for each block of a row.
template <class F>
PAR_XL_INLINE void for_each_block(int64_t width, F&& f) {
    for (int64_t begin = 0; begin < width; begin += BLOCK) f(begin, min(BLOCK, width - begin));
}

// Calls f(x, n) with the addresses x of the next n <= 4 rows until `rate` are done: rows that are read together stream
// together, and partial results are touched once for all of them.
template <class T, class Source, class F>
PAR_XL_INLINE void by_fours(Source&& source, int64_t rate, int64_t column, F&& f) {
    for (int64_t j = 0; j < rate; j += 4) {
        const int64_t n = min(4, rate - j);
        const T* x[4];
        for (int64_t k = 0; k < n; ++k) x[k] = source(j + k) + column;
        switch (n) {
            case 1: f(x, j, std::integral_constant<int, 1>{}); break;
            case 2: f(x, j, std::integral_constant<int, 2>{}); break;
            case 3: f(x, j, std::integral_constant<int, 3>{}); break;
            default: f(x, j, std::integral_constant<int, 4>{});
        }
    }
}

// out = mean over j < rate of source(j); source returns the address of a row. Rows are added by sixteens, and then
// these sums: the error grows with rate / 16.
template <class T, class Source>
PAR_XL_INLINE void mean_of_rows(T* out, Source&& source, int64_t rate, int64_t width) {
    using A = acc_t<T>;
    for_each_block(width, [&](int64_t begin, int64_t columns) {
        A total[BLOCK], sum[BLOCK];
        by_fours<T>(source, rate, begin, [&](const T* const* x, int64_t j, auto n) {
            const bool first = j % 16 == 0, last = j + 4 >= rate, sixteen = j % 16 == 12;
            auto added = [&](int64_t i) {
                A s = first ? A(0) : sum[i];
                for (int k = 0; k < n; ++k) s += load(x[k][i]);
                return s + (j >= 16 && (sixteen || last) ? total[i] : A(0));
            };
            if (last)
#pragma omp simd
                for (int64_t i = 0; i < columns; ++i) out[begin + i] = store<T>(added(i) / A(rate));
            else
#pragma omp simd
                for (int64_t i = 0; i < columns; ++i) (sixteen ? total : sum)[i] = added(i);
        });
    });
}

// out = max over j < rate of source(j); choice, if wanted, is the first j that attains it. The first NaN wins.
template <class T, class Index, class Source>
PAR_XL_INLINE void max_of_rows(T* out, Index* choice, Source&& source, int64_t rate, int64_t width) {
    using A = acc_t<T>;
    for_each_block(width, [&](int64_t begin, int64_t columns) {
        A best[BLOCK];
        int32_t at[BLOCK];
        const T* x = source(0) + begin;
#pragma omp simd
        for (int64_t i = 0; i < columns; ++i) best[i] = load(x[i]), at[i] = 0;
        for (int64_t j = 1; j < rate; ++j) {
            x = source(j) + begin;
            const int32_t here = int32_t(j);
#pragma omp simd
            for (int64_t i = 0; i < columns; ++i) {
                const A value = load(x[i]);
                const bool better = !(value <= best[i]) & (best[i] == best[i]);
                best[i] = better ? value : best[i];
                at[i] = better ? here : at[i];
            }
        }
#pragma omp simd
        for (int64_t i = 0; i < columns; ++i) out[begin + i] = store<T>(best[i]);
        if (choice) {
            Index* const to = choice + begin;  // a store of bytes may change anything else, `choice` itself too
#pragma omp simd
            for (int64_t i = 0; i < columns; ++i) to[i] = Index(at[i]);
        }
    });
}

// Calls f(b, r, stream) for r < rows of every sequence, in parallel; `stream`: the results are too large for the caches.
template <class F>
void for_each_row(int64_t batch, int64_t rows, int64_t bytes_per_row, F&& f) {
    const int64_t bytes = batch * rows * bytes_per_row;
#pragma omp parallel num_threads(threads_for(bytes))
    {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < batch * rows; ++i) f(i / rows, i % rows, bytes >= STREAMED_BYTES);
        finish_streaming();
    }
}

// Copies a row.
template <class T>
PAR_XL_INLINE void copy_row(T* to, const T* from, int64_t width, bool stream) {
    const int64_t head = stream ? min(width, -reinterpret_cast<uintptr_t>(to) % 64 / sizeof(T)) : width;
    constexpr int64_t LINE = 64 / sizeof(T);
    memcpy(to, from, head * sizeof(T));
    int64_t i = head;
    for (; i + LINE <= width; i += LINE) stream_line(to + i, from + i);
    memcpy(to + i, from + i, (width - i) * sizeof(T));
}

// Copies two rows side by side, and fetches those that follow them: one stream alone does not fill the memory's bus.
template <class T>
PAR_XL_INLINE void copy_rows(T* to, const T* from, T* next_to, const T* next_from, int64_t width, bool stream) {
    constexpr int64_t LINE = 64 / sizeof(T);
    if (!stream || (reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(next_to)) % 64 || width % LINE) {
        copy_row(to, from, width, stream);
        return copy_row(next_to, next_from, width, stream);
    }
    for (int64_t i = 0; i < width; i += LINE) {
        __builtin_prefetch(from + 2 * width + i);
        stream_line(to + i, from + i);
        __builtin_prefetch(next_from + 2 * width + i);
        stream_line(next_to + i, next_from + i);
    }
}

// Calls f(choice) with the storage type of the chosen rows of max.
template <class F>
PAR_XL_INLINE void with_choice(const Compression& p, F&& f) {
    p.rate <= 256 ? f(static_cast<uint8_t*>(p.choice)) : f(static_cast<int32_t*>(p.choice));
}

// An unsigned integer in the order of the floats: -0 equals 0 and NaN is the largest.
PAR_XL_INLINE uint32_t sort_key(float x) {
    uint32_t bits = bit_cast<uint32_t>(x);
    bits = x == 0 ? 0u : bits;
    const uint32_t key = bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
    return x != x ? 0xffffffffu : key;
}

PAR_XL_INLINE int64_t count_from(const float* usage, int64_t steps, uint32_t threshold) {
    int32_t count = 0;
#pragma omp simd reduction(+ : count)
    for (int64_t t = 0; t < steps; ++t) count += sort_key(usage[t]) >= threshold;
    return count;
}

// slots[t] = the place of step t among the `keep` most used in time order, or -1. The threshold is the keep-th largest
// key, found bit by bit; of the steps at the threshold, the older ones are kept.
void select(const float* usage, int64_t steps, int64_t keep, int32_t* slots) {
    uint32_t threshold = 0;
    for (uint32_t bit = 1u << 31; bit; bit >>= 1)
        if (count_from(usage, steps, threshold | bit) >= keep) threshold |= bit;
    const int64_t above = threshold == 0xffffffffu ? 0 : count_from(usage, steps, threshold + 1);
    int64_t ties = keep - above, slot = 0;
    for (int64_t t = 0; t < steps; ++t) {
        const uint32_t key = sort_key(usage[t]);
        const bool kept = key > threshold || (key == threshold && ties-- > 0);
        slots[t] = kept ? int32_t(slot++) : -1;
    }
}

template <class T>
void keep_most_used(const Compression& p, const float* usage) {
    auto slots = static_cast<int32_t*>(p.choice);
#pragma omp parallel for schedule(static) num_threads(threads_for(p.batch * p.steps * p.width * sizeof(T)))
    for (int64_t b = 0; b < p.batch; ++b) {
        select(usage + b * p.steps, p.steps, p.steps / p.rate, slots + b * p.steps);
        for (int64_t t = 0; t < p.steps; ++t)
            if (const int32_t slot = slots[b * p.steps + t]; slot >= 0)
                memcpy(row<T>(p.compressed, b, slot), row<T>(p.memory, b, t), p.width * sizeof(T));
    }
}

template <class T>
void differentiate_mean(const Compression& p, int64_t b, int64_t n, bool stream) {
    const T* grad = row<T>(p.compressed, b, n);
    for_each_block(p.width, [&](int64_t begin, int64_t columns) {
        T share[BLOCK];
#pragma omp simd
        for (int64_t i = 0; i < columns; ++i) share[i] = store<T>(load(grad[begin + i]) / acc_t<T>(p.rate));
        for (int64_t j = 0; j < p.rate; ++j) copy_row(row<T>(p.memory, b, n * p.rate + j) + begin, share, columns, stream);
    });
}

template <class T, class Index>
void differentiate_max(const Compression& p, const Index* choice, int64_t b, int64_t n, bool stream) {
    const T* grad = row<T>(p.compressed, b, n);
    for_each_block(p.width, [&](int64_t begin, int64_t columns) {
        int32_t at[BLOCK];
        T share[BLOCK];
#pragma omp simd
        for (int64_t i = 0; i < columns; ++i) at[i] = choice[begin + i];
        for (int32_t j = 0; j < p.rate; ++j) {
#pragma omp simd
            for (int64_t i = 0; i < columns; ++i) {
                const acc_t<T> g = load(grad[begin + i]);
                share[i] = store<T>(at[i] == j ? g : acc_t<T>(0));
            }
            copy_row(row<T>(p.memory, b, n * p.rate + j) + begin, share, columns, stream);
        }
    });
}

// Row r of the memory followed by the segment.
template <class T>
PAR_XL_INLINE const T* recent(const MemoryUpdate& p, int64_t b, int64_t r) {
    return r < p.old_memory ? row<T>(p.state, b, p.old_compressed + r) : row<T>(p.hidden, b, r - p.old_memory);
}

// The row that row r of the update is a copy of; null for one that it compresses, which is then written.
template <class T>
PAR_XL_INLINE const T* kept_row(const MemoryUpdate& p, int64_t b, int64_t r) {
    const int64_t left = p.old_memory + p.segment - p.new_memory;  // rows that leave the memory
    if (r >= p.new_compressed) return recent<T>(p, b, left + r - p.new_compressed);
    const int64_t slot = p.old_compressed + p.fresh_rows - p.new_compressed + r, n = slot - p.old_compressed;
    if (n < 0) return row<T>(p.state, b, slot);
    if (p.mode == Compressor::given) return row<T>(p.fresh, b, n);
    // Of the rows that leave, the oldest ones that fill no group are dropped.
    auto source = [&](int64_t j) { return recent<T>(p, b, left + (n - p.fresh_rows) * p.rate + j); };
    T* out = row<T>(p.out, b, r);
    if (p.mode == Compressor::mean) mean_of_rows(out, source, p.rate, p.width);
    else max_of_rows(out, static_cast<uint8_t*>(nullptr), source, p.rate, p.width);
    return nullptr;
}

// Rows r and r + 1 of the update.
template <class T>
void update_rows(const MemoryUpdate& p, int64_t b, int64_t r, bool stream) {
    const int64_t n = min(2, p.new_compressed + p.new_memory - r);
    const T* from[2] = {};
    for (int64_t k = 0; k < n; ++k) from[k] = kept_row<T>(p, b, r + k);
    if (from[0] && from[1]) return copy_rows(row<T>(p.out, b, r), from[0], row<T>(p.out, b, r + 1), from[1], p.width, stream);
    for (int64_t k = 0; k < n; ++k)
        if (from[k]) copy_row(row<T>(p.out, b, r + k), from[k], p.width, stream);
}

}  // namespace

void compress_forward(const Compression& p, const float* usage) {
    const int64_t groups = p.steps / p.rate;
    dispatch(p.dtype, [&](auto storage) {
        using T = decltype(storage);
        auto source = [&](int64_t b, int64_t n) { return [&p, b, n](int64_t j) { return row<T>(p.memory, b, n * p.rate + j); }; };
        const int64_t bytes = p.rate * p.width * sizeof(T);
        if (p.mode == Compressor::most_used) {
            keep_most_used<T>(p, usage);
        } else if (p.mode == Compressor::mean) {
            for_each_row(p.batch, groups, bytes, [&](int64_t b, int64_t n, bool) {
                mean_of_rows(row<T>(p.compressed, b, n), source(b, n), p.rate, p.width);
            });
        } else {
            with_choice(p, [&](auto choice) {
                for_each_row(p.batch, groups, bytes, [&](int64_t b, int64_t n, bool) {
                    max_of_rows(row<T>(p.compressed, b, n), choice + (b * groups + n) * p.width, source(b, n), p.rate, p.width);
                });
            });
        }
    });
}

void compress_backward(const Compression& p) {
    const int64_t groups = p.steps / p.rate;
    dispatch(p.dtype, [&](auto storage) {
        using T = decltype(storage);
        const int64_t row_bytes = p.width * sizeof(T);
        if (p.mode == Compressor::most_used) {
            for_each_row(p.batch, p.steps, row_bytes, [&](int64_t b, int64_t t, bool stream) {
                const int32_t slot = static_cast<const int32_t*>(p.choice)[b * p.steps + t];
                T* d = row<T>(p.memory, b, t);
                if (slot < 0) memset(d, 0, row_bytes);
                else copy_row(d, row<T>(p.compressed, b, slot), p.width, stream);
            });
        } else if (p.mode == Compressor::mean) {
            for_each_row(p.batch, groups, p.rate * row_bytes, [&](int64_t b, int64_t n, bool stream) { differentiate_mean<T>(p, b, n, stream); });
        } else {
            with_choice(p, [&](auto choice) {
                for_each_row(p.batch, groups, p.rate * row_bytes, [&](int64_t b, int64_t n, bool stream) {
                    differentiate_max<T>(p, choice + (b * groups + n) * p.width, b, n, stream);
                });
            });
        }
    });
}

void memory_update(const MemoryUpdate& p) {
    dispatch(p.dtype, [&](auto storage) {
        using T = decltype(storage);
        for_each_row(p.batch, ceil_div(p.new_compressed + p.new_memory, 2), 2 * p.width * sizeof(T),
                     [&](int64_t b, int64_t pair, bool stream) { update_rows<T>(p, b, 2 * pair, stream); });
    });
}

}  // namespace par_xl::PAR_XL_ISA
