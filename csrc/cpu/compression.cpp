// Compression of memory rows on the CPU, and the update of a compressive memory in one pass over its rows. A row is
// worked on in blocks of columns whose partial results stay in the first-level cache.
#include "common.h"

namespace par_xl::PAR_XL_ISA {
namespace {

constexpr int64_t BLOCK = 512;

// Calls f(first column, columns) for each block of a row.
template <class F>
PAR_XL_INLINE void for_each_block(int64_t width, F&& f) {
    for (int64_t begin = 0; begin < width; begin += BLOCK) f(begin, min(BLOCK, width - begin));
}

// out = mean over j < rate of source(j); source returns the address of a row. Rows are added by sixteens, and then
// these sums: the error grows with rate / 16.
template <class T, class Source>
PAR_XL_INLINE void mean_of_rows(T* out, Source&& source, int64_t rate, int64_t width) {
    using A = acc_t<T>;
    for_each_block(width, [&](int64_t begin, int64_t columns) {
        A total[BLOCK], sum[BLOCK];
        for (int64_t first = 0; first < rate; first += 16) {
            const T* x = source(first) + begin;
#pragma omp simd
            for (int64_t i = 0; i < columns; ++i) sum[i] = load(x[i]);
            for (int64_t j = first + 1; j < min(first + 16, rate); ++j) {
                x = source(j) + begin;
#pragma omp simd
                for (int64_t i = 0; i < columns; ++i) sum[i] += load(x[i]);
            }
#pragma omp simd
            for (int64_t i = 0; i < columns; ++i) total[i] = first ? total[i] + sum[i] : sum[i];
        }
#pragma omp simd
        for (int64_t i = 0; i < columns; ++i) out[begin + i] = store<T>(total[i] / A(rate));
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
#pragma omp simd
            for (int64_t i = 0; i < columns; ++i) {
                const A value = load(x[i]);
                const bool better = !(value <= best[i]) & (best[i] == best[i]);
                best[i] = better ? value : best[i];
                at[i] = better ? int32_t(j) : at[i];
            }
        }
#pragma omp simd
        for (int64_t i = 0; i < columns; ++i) out[begin + i] = store<T>(best[i]);
        if (choice)
#pragma omp simd
            for (int64_t i = 0; i < columns; ++i) choice[begin + i] = Index(at[i]);
    });
}

// Calls f(b, r) for r < rows of every sequence, in parallel.
template <class F>
void for_each_row(int64_t batch, int64_t rows, int64_t bytes_per_row, F&& f) {
#pragma omp parallel for schedule(static) num_threads(threads_for(batch * rows * bytes_per_row))
    for (int64_t i = 0; i < batch * rows; ++i) f(i / rows, i % rows);
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
void differentiate_mean(const Compression& p, int64_t b, int64_t n) {
    const T* grad = row<T>(p.compressed, b, n);
    for_each_block(p.width, [&](int64_t begin, int64_t columns) {
        T share[BLOCK];
#pragma omp simd
        for (int64_t i = 0; i < columns; ++i) share[i] = store<T>(load(grad[begin + i]) / acc_t<T>(p.rate));
        for (int64_t j = 0; j < p.rate; ++j) memcpy(row<T>(p.memory, b, n * p.rate + j) + begin, share, columns * sizeof(T));
    });
}

template <class T, class Index>
void differentiate_max(const Compression& p, const Index* choice, int64_t b, int64_t n) {
    const T* grad = row<T>(p.compressed, b, n);
    for (int64_t j = 0; j < p.rate; ++j) {
        T* d = row<T>(p.memory, b, n * p.rate + j);
#pragma omp simd
        for (int64_t i = 0; i < p.width; ++i) d[i] = choice[i] == Index(j) ? grad[i] : T{};
    }
}

// Row r of the memory followed by the segment.
template <class T>
PAR_XL_INLINE const T* recent(const MemoryUpdate& p, int64_t b, int64_t r) {
    return r < p.old_memory ? row<T>(p.state, b, p.old_compressed + r) : row<T>(p.hidden, b, r - p.old_memory);
}

template <class T>
void update_row(const MemoryUpdate& p, int64_t b, int64_t r) {
    T* out = row<T>(p.out, b, r);
    const int64_t left = p.old_memory + p.segment - p.new_memory;  // rows that leave the memory
    const T* kept = nullptr;
    if (r >= p.new_compressed) {
        kept = recent<T>(p, b, left + r - p.new_compressed);
    } else {
        const int64_t slot = p.old_compressed + p.fresh_rows - p.new_compressed + r, n = slot - p.old_compressed;
        if (n < 0) {
            kept = row<T>(p.state, b, slot);
        } else if (p.mode == Compressor::given) {
            kept = row<T>(p.fresh, b, n);
        } else {
            // Of the rows that leave, the oldest ones that fill no group are dropped.
            auto source = [&](int64_t j) { return recent<T>(p, b, left + (n - p.fresh_rows) * p.rate + j); };
            if (p.mode == Compressor::mean) mean_of_rows(out, source, p.rate, p.width);
            else max_of_rows(out, static_cast<uint8_t*>(nullptr), source, p.rate, p.width);
        }
    }
    if (kept) memcpy(out, kept, p.width * sizeof(T));
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
            for_each_row(p.batch, groups, bytes, [&](int64_t b, int64_t n) {
                mean_of_rows(row<T>(p.compressed, b, n), source(b, n), p.rate, p.width);
            });
        } else {
            with_choice(p, [&](auto choice) {
                for_each_row(p.batch, groups, bytes, [&](int64_t b, int64_t n) {
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
            for_each_row(p.batch, p.steps, row_bytes, [&](int64_t b, int64_t t) {
                const int32_t slot = static_cast<const int32_t*>(p.choice)[b * p.steps + t];
                T* d = row<T>(p.memory, b, t);
                slot < 0 ? memset(d, 0, row_bytes) : memcpy(d, row<T>(p.compressed, b, slot), row_bytes);
            });
        } else if (p.mode == Compressor::mean) {
            for_each_row(p.batch, groups, p.rate * row_bytes, [&](int64_t b, int64_t n) { differentiate_mean<T>(p, b, n); });
        } else {
            with_choice(p, [&](auto choice) {
                for_each_row(p.batch, groups, p.rate * row_bytes, [&](int64_t b, int64_t n) {
                    differentiate_max<T>(p, choice + (b * groups + n) * p.width, b, n);
                });
            });
        }
    });
}

void memory_update(const MemoryUpdate& p) {
    dispatch(p.dtype, [&](auto storage) {
        using T = decltype(storage);
        for_each_row(p.batch, p.new_compressed + p.new_memory, p.width * sizeof(T),
                     [&](int64_t b, int64_t r) { update_row<T>(p, b, r); });
    });
}

}  // namespace par_xl::PAR_XL_ISA
