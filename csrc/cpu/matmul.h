// Matrix products on one thread, for operands that lie in its cache. A tile of 6 rows by 2 or 4 vectors stays in registers
// over the whole depth, which reaches 95% of peak on AVX-512 (Zen 4) where a call into the vendor library costs more than
// such a product. Written with the compiler's vectors: one source for every instruction set.
#pragma once
#include <utility>

#include "common.h"

namespace par_xl::PAR_XL_ISA {

#if defined(__AVX512F__)
constexpr int vector_bytes = 64, tile_vectors = 4;  // 24 sums in 32 registers
#elif defined(__AVX2__)
constexpr int vector_bytes = 32, tile_vectors = 2;  // 12 sums in 16 registers
#else
constexpr int vector_bytes = 16, tile_vectors = 2;
#endif
constexpr int tile_rows = 6;
constexpr int64_t depth_step = 128;  // of a product: as much of b as the first-level cache holds

template <class T> constexpr int64_t lanes = vector_bytes / int64_t(sizeof(T));
template <class T> constexpr int64_t panel = tile_vectors * lanes<T>;  // columns of a tile

// The right factor: column n of row k stands at data[k * row + n / panel * panel_stride + n % panel].
template <class T>
struct Factor {
    const T* data;
    int64_t row, panel_stride;
};

// c[m][n] = sum_k a[m * a_row + k * a_step] * b[k * b_row + n], or plus that, for R rows and V vectors of columns
template <class T, int R, int V>
void multiply_tile(int64_t depth, const T* a, int64_t a_row, int64_t a_step, const T* b, int64_t b_row, T* c, int64_t c_row,
                   bool accumulate) {
    typedef T Vector __attribute__((vector_size(vector_bytes), aligned(alignof(T)), may_alias));
    // Few rows leave registers for several sums of each element: faster, as none waits for another, and with less error.
    constexpr int chains = R == 1 ? 4 : R == 2 ? 2 : 1;
    Vector sums[chains][R][V], (&sum)[R][V] = sums[0];
#pragma GCC unroll 8
    for (int i = 0; i < chains; ++i)
#pragma GCC unroll 8
        for (int m = 0; m < R; ++m)
#pragma GCC unroll 8
            for (int n = 0; n < V; ++n) sums[i][m][n] = Vector{};
    auto add = [&](int64_t k, Vector (&sum)[R][V]) {
        Vector right[V];
#pragma GCC unroll 8
        for (int n = 0; n < V; ++n) right[n] = *reinterpret_cast<const Vector*>(b + k * b_row + n * lanes<T>);
#pragma GCC unroll 8
        for (int m = 0; m < R; ++m)
#pragma GCC unroll 8
            for (int n = 0; n < V; ++n) sum[m][n] += a[m * a_row + k * a_step] * right[n];
    };
    int64_t k = 0;
#pragma GCC unroll 4
    for (; k + chains <= depth; k += chains)
#pragma GCC unroll 8
        for (int i = 0; i < chains; ++i) add(k + i, sums[i]);
    for (; k < depth; ++k) add(k, sum);
#pragma GCC unroll 8
    for (int i = 1; i < chains; ++i)
#pragma GCC unroll 8
        for (int m = 0; m < R; ++m)
#pragma GCC unroll 8
            for (int n = 0; n < V; ++n) sum[m][n] += sums[i][m][n];
#pragma GCC unroll 8
    for (int m = 0; m < R; ++m)
#pragma GCC unroll 8
        for (int n = 0; n < V; ++n) {
            Vector* to = reinterpret_cast<Vector*>(c + m * c_row + n * lanes<T>);
            *to = accumulate ? *to + sum[m][n] : sum[m][n];
        }
}

template <class T>
using Tile = void (*)(int64_t, const T*, int64_t, int64_t, const T*, int64_t, T*, int64_t, bool);

// tiles[R - 1][V - 1]
template <class T, int R, int... V>
constexpr void fill_tiles(Tile<T>* row, std::integer_sequence<int, V...>) {
    ((row[V] = &multiply_tile<T, R + 1, V + 1>), ...);
}
template <class T>
struct Tiles {
    Tile<T> at[tile_rows][tile_vectors];
    template <int... R>
    constexpr explicit Tiles(std::integer_sequence<int, R...>) : at{} {
        (fill_tiles<T, R>(at[R], std::make_integer_sequence<int, tile_vectors>()), ...);
    }
};
template <class T> constexpr Tiles<T> tiles{std::make_integer_sequence<int, tile_rows>()};

// Rows that are needed next, fetched into the second-level cache a few lines at a time.
class Ahead {
    struct Area {
        const char* row;
        int64_t rows, bytes, stride;
    } areas[2] = {};
    int64_t area = 0, at = 0;

public:
    template <class T>
    Ahead& add(const T* from, int64_t rows, int64_t width, int64_t stride) {
        areas[areas[0].rows > 0] = {reinterpret_cast<const char*>(from), rows, width * int64_t(sizeof(T)), stride * int64_t(sizeof(T))};
        return *this;
    }

    int64_t lines() const {
        int64_t sum = 0;
        for (const Area& x : areas) sum += x.rows * ceil_div(x.bytes, 64);
        return sum;
    }

    PAR_XL_INLINE void fetch(int64_t count) {
        for (; count > 0 && area < 2; --count) {
            Area& x = areas[area];
            if (x.rows > 0) __builtin_prefetch(x.row + at, 0, 2);
            at += 64;
            if (at >= x.bytes) at = 0, x.row += x.stride, --x.rows;
            if (x.rows <= 0) ++area;
        }
    }
};

// c (rows, columns) = a b, or plus that, where a(m, k) = a[m * a_row + k * a_step]. Whole vectors of c are written. What is
// needed next is fetched meanwhile.
template <class T>
void multiply(int64_t rows, int64_t columns, int64_t depth, const T* a, int64_t a_row, int64_t a_step, Factor<T> b, T* c,
              int64_t c_row, bool accumulate, Ahead ahead = {}) {
    const int64_t count = ceil_div(rows, tile_rows) * ceil_div(columns, panel<T>) * ceil_div(depth, depth_step);
    const int64_t lines = ceil_div(ahead.lines(), max(1, count));
    for (int64_t k = 0; k < depth; k += depth_step)
        for (int64_t n = 0; n < columns; n += panel<T>) {
            const int64_t vectors = ceil_div(min(columns - n, panel<T>), lanes<T>);
            const T* right = b.data + k * b.row + n / panel<T> * b.panel_stride;
            for (int64_t m = 0; m < rows; m += tile_rows) {
                ahead.fetch(lines);
                tiles<T>.at[min(rows - m, tile_rows) - 1][vectors - 1](
                    min(depth - k, depth_step), a + m * a_row + k * a_step, a_row, a_step, right, b.row,
                    c + m * c_row + n, c_row, accumulate || k > 0);
            }
        }
}

}  // namespace par_xl::PAR_XL_ISA
