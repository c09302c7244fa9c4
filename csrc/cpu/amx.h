// Products of fp32 matrices on AMX, whose tiles multiply bf16 and add in fp32, sixteen times as fast as AVX-512 multiplies
// fp32. A number is cut into parts of bf16, x = x0 + x1 + x2, each the rounding of what those before it leave; three are all
// of an fp32 number. Of the products of parts those are made that count:
//
//     3 parts:  a0 b0 + a0 b1 + a1 b0 + a0 b2 + a1 b1 + a2 b0     leaves out at most 2^-23 |a b|, the spacing of fp32
//     2 parts:  a0 b0 + a0 b1 + a1 b0                             at most 2^-14 |a b|
//
// A factor that is bf16 has one part. A part below 1e-38 counts as 0; what is not finite, or above 3.38e38, makes NaN.
#pragma once
#include <immintrin.h>

#include "matmul.h"

namespace par_xl::PAR_XL_ISA {

constexpr int64_t amx_side = 16, amx_depth = 32, amx_elements = amx_side * amx_depth;  // of a tile, which is 1 KB

// A factor in tiles. Tile (i, k) has rows 16 i .. of a left factor, as (16 rows, 32 steps of the depth), or columns 16 i .. of
// a right one, as (16 pairs of steps, 16 columns, 2); the tiles of its parts follow each other.
struct AmxFactor {
    bfloat16* data;
    int64_t depth_tiles;
    int parts;

    static int64_t elements(int64_t side, int64_t depth, int parts) {
        return ceil_div(side, amx_side) * ceil_div(depth, amx_depth) * amx_elements * parts;
    }
    bfloat16* tile(int64_t i, int64_t k) const { return data + (i * depth_tiles + k) * amx_elements * parts; }
};

// The tile registers of a thread, each of 16 rows of 64 bytes; in the end they are configured as they were found.
class AmxTiles {
    struct alignas(64) Config {
        uint8_t palette = 1, first_row = 0, reserved[14] = {};
        uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } found;

public:
    AmxTiles() {
        const Config ours;
        _tile_storeconfig(&found);
        asm volatile("" ::: "memory");  // the intrinsics do not say which bytes they write and read
        _tile_loadconfig(&ours);
    }
    ~AmxTiles() { found.palette ? _tile_loadconfig(&found) : _tile_release(); }
    AmxTiles(const AmxTiles&) = delete;
};

PAR_XL_INLINE __m512 widened(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }

// Up to 16 numbers, zeros for those from `count` on.
template <class X>
PAR_XL_INLINE __m512 load_vector(const X* from, int64_t count) {
    const __mmask16 mask = count >= 16 ? 0xffff : (1u << max(count, 0)) - 1;
    if constexpr (sizeof(X) == 4)
        return _mm512_maskz_loadu_ps(mask, from);
    else if constexpr (std::is_same_v<X, bfloat16>)
        return widened(_mm256_maskz_loadu_epi16(mask, from));
    else
        return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, from));
}

// Of the words of two vectors: the upper halves of both; of one vector: words of its halves in turn.
constexpr struct SplitOrder {
    alignas(64) uint16_t upper_words[32] = {}, pairs[32] = {};
    constexpr SplitOrder() {
        for (int i = 0; i < 32; ++i) upper_words[i] = 2 * i + 1, pairs[i] = i / 2 + i % 2 * 16;
    }
} split_order;

// The parts of 32 numbers, a line in each part's tile: first, then second, or in pairs of one of each. A part that has a
// next one is rounded by an addition to its bits; the last one's conversion keeps a NaN that this may lose.
template <bool in_pairs>
PAR_XL_INLINE void split(__m512 first, __m512 second, int parts, bfloat16* to) {
    const __m512i half = _mm512_set1_epi32(0x8000), upper = _mm512_set1_epi32(0xffff0000);
    const __m512i upper_words = _mm512_load_si512(split_order.upper_words), pairs = _mm512_load_si512(split_order.pairs);
    for (; parts > 1; --parts, to += amx_elements) {
        const __m512i a = _mm512_and_si512(_mm512_add_epi32(_mm512_castps_si512(first), half), upper);
        const __m512i b = _mm512_and_si512(_mm512_add_epi32(_mm512_castps_si512(second), half), upper);
        first = _mm512_sub_ps(first, _mm512_castsi512_ps(a));
        second = _mm512_sub_ps(second, _mm512_castsi512_ps(b));
        const __m512i in_turn = _mm512_or_si512(_mm512_srli_epi32(a, 16), b);
        _mm512_store_si512(to, in_pairs ? in_turn : _mm512_permutex2var_epi16(a, upper_words, b));
    }
    const __m512i last = (__m512i)_mm512_cvtne2ps_pbh(second, first);
    _mm512_store_si512(to, in_pairs ? _mm512_permutexvar_epi16(pairs, last) : last);
}

// Rows (count, depth) of x, `stride` apart, as a left factor; zeros fill its last tiles.
template <class X>
void pack_left(const X* x, int64_t stride, int64_t count, int64_t depth, AmxFactor to) {
    for (int64_t i = 0; i < round_up(count, amx_side); ++i)
        for (int64_t k = 0; k < depth; k += amx_depth) {
            const int64_t left = i < count ? depth - k : 0;
            const X* from = x + i * stride + k;
            split<false>(load_vector(from, left), load_vector(from + 16, left - 16), to.parts,
                         to.tile(i / amx_side, k / amx_depth) + i % amx_side * amx_depth);
        }
}

// Rows (depth, count) of x, `stride` apart, as a right factor; zeros fill its last tiles.
template <class X>
void pack_right(const X* x, int64_t stride, int64_t depth, int64_t count, AmxFactor to) {
    for (int64_t k = 0; k < round_up(depth, amx_depth); k += 2)
        for (int64_t n = 0; n < count; n += amx_side) {
            const X* from = x + k * stride + n;
            split<true>(load_vector(from, k < depth ? count - n : 0), load_vector(from + stride, k + 1 < depth ? count - n : 0),
                        to.parts, to.tile(n / amx_side, k / amx_depth) + k % amx_depth * amx_side);
        }
}

// A left factor becomes the right factor of the transposed matrix, or the other way: each tile is (16, 16) pairs.
inline void transpose_tiles(AmxFactor x, int64_t count) {
    for (bfloat16* tile = x.data; tile < x.tile(ceil_div(count, amx_side), 0); tile += amx_elements) {
        __m512i a[16], b[16];
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) a[i] = _mm512_load_si512(tile + i * amx_depth);
#pragma GCC unroll 8
        for (int i = 0; i < 16; i += 2) {
            b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
            b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
        }
#pragma GCC unroll 4
        for (int i = 0; i < 16; i += 4) {  // a[i + j]: in quarter q, column 4 q + j of rows i .. i + 4
            a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
            a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
            a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
            a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
        }
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
            constexpr int even = 0x88, odd = 0xdd;  // quarters of both
            for (int i = 0; i < 16; i += 8) {
                b[i] = _mm512_shuffle_i32x4(a[i + j], a[i + 4 + j], even);
                b[i + 1] = _mm512_shuffle_i32x4(a[i + j], a[i + 4 + j], odd);
            }
            _mm512_store_si512(tile + j * amx_depth, _mm512_shuffle_i32x4(b[0], b[8], even));
            _mm512_store_si512(tile + (4 + j) * amx_depth, _mm512_shuffle_i32x4(b[1], b[9], even));
            _mm512_store_si512(tile + (8 + j) * amx_depth, _mm512_shuffle_i32x4(b[0], b[8], odd));
            _mm512_store_si512(tile + (12 + j) * amx_depth, _mm512_shuffle_i32x4(b[1], b[9], odd));
        }
    }
}

// Tile (i, j) of c, a matrix of (rows, columns): in its place, or in a buffer where c ends within it.
class AmxSums {
    alignas(64) float buffer[amx_side * amx_side];
    float* place;
    int64_t rows, columns, stride;

public:
    float* at;
    int64_t row_bytes;

    void open(float* c, int64_t c_row, int64_t c_rows, int64_t c_columns, int64_t i, int64_t j, bool accumulate) {
        place = c + i * amx_side * c_row + j * amx_side;
        rows = min(c_rows - i * amx_side, amx_side);
        columns = min(c_columns - j * amx_side, amx_side);
        stride = c_row;
        const bool whole = rows == amx_side && columns == amx_side;
        at = whole ? place : buffer;
        row_bytes = (whole ? stride : amx_side) * int64_t(sizeof(float));
        if (whole || !accumulate) return;
        for (int64_t r = 0; r < rows; ++r)
            for (int64_t k = 0; k < columns; ++k) buffer[r * amx_side + k] = place[r * stride + k];
    }

    void close() const {
        if (at == place) return;
        for (int64_t r = 0; r < rows; ++r)
            for (int64_t k = 0; k < columns; ++k) place[r * stride + k] = buffer[r * amx_side + k];
    }
};

// c (rows, columns) = a b, or plus that, in blocks of 2 by 2 tiles. What is needed next is fetched meanwhile.
inline void multiply(int64_t rows, int64_t columns, AmxFactor a, AmxFactor b, float* c, int64_t c_row, bool accumulate,
                     Ahead ahead = {}) {
    const int64_t last_row = ceil_div(rows, amx_side) - 1, last_column = ceil_div(columns, amx_side) - 1;
    const int64_t lines = ceil_div(ahead.lines(), (last_row / 2 + 1) * (last_column / 2 + 1) * a.depth_tiles);
    const int terms = max(a.parts, b.parts);
    AmxSums sums[2][2];
    for (int64_t n = 0; n <= last_column; n += 2)
        for (int64_t m = 0; m <= last_row; m += 2) {
            for (int i = 0; i < 2; ++i)
                for (int j = 0; j < 2; ++j) sums[i][j].open(c, c_row, rows, columns, m + i, n + j, accumulate);
            asm volatile("" ::: "memory");  // tile loads do not say that they read memory
            if (accumulate) {
                _tile_loadd(0, sums[0][0].at, sums[0][0].row_bytes);
                _tile_loadd(1, sums[0][1].at, sums[0][1].row_bytes);
                _tile_loadd(2, sums[1][0].at, sums[1][0].row_bytes);
                _tile_loadd(3, sums[1][1].at, sums[1][1].row_bytes);
            } else {
                _tile_zero(0);
                _tile_zero(1);
                _tile_zero(2);
                _tile_zero(3);
            }
            for (int64_t k = 0; k < a.depth_tiles; ++k) {
                ahead.fetch(lines);
                const bfloat16 *left[2] = {a.tile(m, k), a.tile(min(m + 1, last_row), k)};
                const bfloat16 *right[2] = {b.tile(n, k), b.tile(min(n + 1, last_column), k)};
                // a's parts in falling order, b's back and forth: each loaded as seldom as four registers allow
                for (int i = a.parts - 1, j = 0, loaded = -1; i >= 0; --i, j = loaded) {
                    _tile_loadd(4, left[0] + i * amx_elements, 64);
                    _tile_loadd(5, left[1] + i * amx_elements, 64);
                    const int count = min(b.parts, terms - i);
                    for (int term = 0; term < count; ++term, j = j + 1 < count ? j + 1 : 0) {
                        if (j != loaded) {
                            _tile_loadd(6, right[0] + j * amx_elements, 64);
                            _tile_loadd(7, right[1] + j * amx_elements, 64);
                            loaded = j;
                        }
                        _tile_dpbf16ps(0, 4, 6);
                        _tile_dpbf16ps(1, 4, 7);
                        _tile_dpbf16ps(2, 5, 6);
                        _tile_dpbf16ps(3, 5, 7);
                    }
                }
            }
            _tile_stored(0, sums[0][0].at, sums[0][0].row_bytes);
            _tile_stored(1, sums[0][1].at, sums[0][1].row_bytes);
            _tile_stored(2, sums[1][0].at, sums[1][0].row_bytes);
            _tile_stored(3, sums[1][1].at, sums[1][1].row_bytes);
            for (const auto& row : sums)
                for (const AmxSums& x : row) x.close();
        }
}

}  // namespace par_xl::PAR_XL_ISA
