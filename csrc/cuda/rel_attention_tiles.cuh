// Tiles of rows in shared memory and the matrix products of a warp with them. Types T are __half and __nv_bfloat16, and
// WIDTH is the head width, filled up with zeros to a multiple of 16.
#pragma once
#include "common.cuh"
#include "tensor_core.cuh"

namespace par_xl::cuda {

// Rows in 16-byte chunks, of which ldmatrix reads the same one of eight neighbouring rows: these lie in eight different
// groups of four banks, either because a row takes an odd number of chunks or because its chunks are exchanged.
template <int WIDTH, int ROWS>
struct Tile {
    static constexpr int CHUNKS = WIDTH / 8;
    static constexpr bool EXCHANGED = CHUNKS % 8 == 0;
    static constexpr int PITCH = EXCHANGED ? CHUNKS : CHUNKS + 1;
    uint4 chunks[ROWS * PITCH];
    __device__ __forceinline__ uint4* at(int row, int chunk) {
        return chunks + row * PITCH + (EXCHANGED ? chunk ^ (row & 7) : chunk);
    }
};

// A head's rows in global memory, `first` of which are passed over. The launcher has seen to it that 32 bits hold the
// stride, which saves four instructions of each row's address.
template <class T>
struct HeadRows {
    T* data;
    uint32_t stride;
    __device__ __forceinline__ HeadRows(const Heads& x, int64_t b, int64_t h, int64_t first = 0)
        : data(static_cast<T*>(x.data) + b * x.batch_stride + h * x.head_stride + first * x.time_stride),
          stride(uint32_t(x.time_stride)) {}
    __device__ __forceinline__ T* at(int row) const { return data + uint64_t(uint32_t(row)) * stride; }
};

// Starts to copy row i from source(i), or zeros where i >= end, to rows first + i of the tile, for i < COUNT, by all
// THREADS of the block. Without `whole` chunks (every row 16-byte aligned) elements are read one by one, and no copy is
// under way afterwards.
template <int THREADS, int COUNT, class T, int WIDTH, int ROWS, class Source>
__device__ __forceinline__ void copy_rows(Tile<WIDTH, ROWS>& tile, int first, Source&& source, int end, int width,
                                          bool whole) {
    constexpr int CHUNKS = WIDTH / 8;
    if (whole) {
#pragma unroll
        for (int n = 0; n < COUNT * CHUNKS; n += THREADS) {
            const int i = (n + threadIdx.x) / CHUNKS, chunk = (n + threadIdx.x) % CHUNKS;
            if (COUNT * CHUNKS % THREADS == 0 || i < COUNT)
                cp_async_16(tile.at(first + i, chunk), source(i) + 8 * chunk, i < end && 8 * chunk < width);
        }
    } else {
#pragma unroll 1
        for (int n = threadIdx.x; n < COUNT * CHUNKS; n += THREADS) {
            const int i = n / CHUNKS, chunk = n % CHUNKS;
            uint4 word = {};
            if (i < end)
#pragma unroll
                for (int j = 0; j < 8; ++j)
                    if (8 * chunk + j < width) reinterpret_cast<T*>(&word)[j] = source(i)[8 * chunk + j];
            *tile.at(first + i, chunk) = word;
        }
    }
}

// Two neighbouring elements of an operand, each rounded once.
template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
    if constexpr (std::is_same_v<T, __half>) {
        const __half2 pair = __floats2half2_rn(low, high);
        return *reinterpret_cast<const uint32_t*>(&pair);
    } else {
        const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
        return *reinterpret_cast<const uint32_t*>(&pair);
    }
}

// c, d (16 x 8 each) += a (16 x 16) times the left and the right half of b (16 x 16).
template <class T>
__device__ __forceinline__ void multiply(float (&c)[4], float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4]) {
    const uint32_t left[2] = {b[0], b[1]}, right[2] = {b[2], b[3]};
    mma_16816<T>(c, a, left);
    mma_16816<T>(d, a, right);
}

// c, d += a (16 x WIDTH) times the transposed rows first .. first + 7 and first + 8 .. first + 15 of a tile.
template <class T, int WIDTH, int ROWS>
__device__ __forceinline__ void multiply_transposed(float (&c)[4], float (&d)[4], const uint32_t (&a)[WIDTH / 16][4],
                                                    Tile<WIDTH, ROWS>& tile, int first) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int k = 0; k < WIDTH / 16; ++k) {
        uint32_t b[4];
        ldmatrix_x4(b, tile.at(first + lane / 16 * 8 + lane % 8, 2 * k + lane / 8 % 2));
        multiply<T>(c, d, a[k], b);
    }
}

// c (16 x WIDTH) += a (16 x 16) times rows first .. first + 15 of a tile.
template <class T, int WIDTH, int ROWS>
__device__ __forceinline__ void multiply_rows(float (&c)[WIDTH / 8][4], const uint32_t (&a)[4], Tile<WIDTH, ROWS>& tile,
                                              int first) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int n = 0; n < WIDTH / 16; ++n) {
        uint32_t b[4];
        ldmatrix_x4_trans(b, tile.at(first + lane % 16, 2 * n + lane / 16));
        multiply<T>(c[2 * n], c[2 * n + 1], a, b);
    }
}

}  // namespace par_xl::cuda
