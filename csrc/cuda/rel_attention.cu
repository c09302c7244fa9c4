// Relative attention on the tensor cores of sm_80 and later, forward; see par_xl/ops/rel_attention.py for the formula.
// fp16 and bf16, sums in fp32, head widths up to 128.
//
// A block owns 64 queries of one head, each of its four warps 16 of them, and all walk over tiles of N keys (64 or 32).
// In a warp's tile, query a and key b need position row b - a + 15 of the N + 15 that begin 15 before those of its last
// query. The warp multiplies its queries with these rows and one more (whole products of 16), puts each score into a
// strip of shared memory of its own, at the place of its key, and reads the strip as the first summand of the content
// scores, in the layout that the tensor cores add to. No other warp is waited for, and nothing is carried to the next
// tile. The strip holds fp32, as these are exponents: an error of 2^-11 of a score of 20 is one of 1% of a weight. From
// one key to the next are 20 floats, so that the lanes write to, and read from, 32 different banks.
//
// Tile of 64 queries and N keys    floor         N = 64                N = 32
//     products of 16 x 16 x D      3 * 4 N / 16  48 + 4: 1.083 times   24 + 4: 1.167 times (positions: 1.25, 1.5)
//     strips, bytes each way       -             16 KB                 8 KB
//     rows from global memory      3 N           3 N: k, v and the positions that the tile before did not have
// The block's warps need 64 + N rows of positions, which lie in a ring; copying all of them for each tile would make it
// 4 N rows for N = 64 and 5 N for N = 32. In shared memory are two tiles of k and of v and a ring of 64 + 2 N rows, so
// that the next tile arrives during this one and one barrier for each suffices, and four strips of 80 N bytes: 76 KB
// for D = 64 and N = 64, 74 KB for D = 128 and N = 32, two blocks on a multiprocessor.
#include <utility>

#include "philox.h"
#include "rel_attention_tiles.cuh"

namespace par_xl::cuda {
namespace {

constexpr int WARPS = 4, THREADS = 32 * WARPS;
constexpr int ROWS = 16;  // queries of a warp
constexpr int BLOCK_ROWS = ROWS * WARPS;
constexpr int STRIP = 20;  // floats from one key to the next
constexpr float LOG2_E = 1.4426950408889634f;
constexpr double LOG_2 = 0.6931471805599453;

// A lane's place in a 16 x 8 product: elements e = 0 .. 3 are at (row(e), column(e)).
struct Lane {
    int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    __device__ int row(int e) const { return g + e / 2 * 8; }
    __device__ int column(int e) const { return 2 * t + e % 2; }
};

template <int WIDTH, int KEYS>
struct Shared {
    static constexpr int RING = BLOCK_ROWS + 2 * KEYS;
    Tile<WIDTH, KEYS> k[2], v[2];
    Tile<WIDTH, RING> r;
    float strips[WARPS][KEYS * STRIP];
};

// The keys [first, last) that a query sees: -right <= i + (K - Q) - j <= left and j < end.
struct Sight {
    int shift, left, right, end;
    bool possible;  // the sequence's length
    __device__ Sight(const RelAttention& p, int64_t b)
        : shift(int(p.keys + p.memory - p.queries)), left(int(p.left)), right(int(p.right)),
          end(int(p.keys + p.memory)), possible(true) {
        if (!p.key_lengths) return;
        const int64_t length = p.key_lengths[b];
        possible = length >= 0 && length <= p.keys;
        end = int(p.memory + min(max(length, int64_t(0)), p.keys));
    }
    __device__ int first(int i) const { return max(i + shift - left, 0); }
    __device__ int last(int i) const { return min(i + shift + right + 1, end); }
};

// What queries [i, i_end) see: some of them keys [begin, stop), all of them keys [all_begin, all_end).
struct Reach {
    int begin, all_begin, all_end, stop;
    __device__ Reach(const Sight& sight, int i, int i_end)
        : begin(sight.first(i)), all_begin(sight.first(i_end - 1)), all_end(sight.last(i)),
          stop(i < i_end ? sight.last(i_end - 1) : 0) {}
};

// The tiles of keys [begin, stop) of a head, and the positions of queries from m0 on, on their way to shared memory.
template <class T, int WIDTH, int KEYS>
struct Copies {
    Shared<WIDTH, KEYS>& shared;
    HeadRows<T> k_memory, v_memory, k, v, r;  // k and v counted from the memory's first key
    int n_memory, positions, width, begin, stop, first_position;
    bool whole;
    __device__ __forceinline__ Copies(Shared<WIDTH, KEYS>& shared, const RelAttention& p, int64_t b, int64_t h,
                                      const Reach& block, int m0, bool whole)
        : shared(shared), k_memory(p.k_memory, b, h), v_memory(p.v_memory, b, h), k(p.k, b, h, -p.memory),
          v(p.v, b, h, -p.memory), r(p.r, 0, h), n_memory(int(p.memory)), positions(int(p.positions)),
          width(int(p.width)), begin(block.begin), stop(block.stop),
          first_position(block.begin - m0 + far_row(p) + 1 - BLOCK_ROWS), whole(whole) {}

    // The position of query 0 and key 0; without a clamp Q - 1.
    static __device__ int far_row(const RelAttention& p) {
        const int64_t n_keys = p.keys + p.memory;
        return int(min(n_keys - 1, p.clamp_len) - n_keys + p.queries);
    }

    template <int COUNT>
    __device__ __forceinline__ void start_positions(int first) {  // COUNT of those that the block needs
        const int position = first_position + first;
        // What would be before the first row of r no pair uses, or is beyond the clamp and counts as that row.
        auto source = [&](int row) { return r.at(max(position + row, 0)); };
        copy_rows<THREADS, COUNT, T>(shared.r, first % shared.RING, source, positions - position, width, whole);
    }
    __device__ __forceinline__ void start_keys(Tile<WIDTH, KEYS>& tile, const HeadRows<T>& memory,
                                               const HeadRows<T>& segment, int j0) {
        auto source = [&](int row) { return (j0 + row < n_memory ? memory : segment).at(j0 + row); };
        copy_rows<THREADS, KEYS, T>(tile, 0, source, stop - j0, width, whole);
    }
    __device__ __forceinline__ void start_tile(int tile) {
        const int j0 = begin + tile * KEYS;
        start_positions<KEYS>(BLOCK_ROWS + tile * KEYS);
        start_keys(shared.k[tile % 2], k_memory, k, j0);
        start_keys(shared.v[tile % 2], v_memory, v, j0);
        cp_async_commit();
    }
};

// (q + content_bias) * factor and (q + position_bias) * factor of the warp's rows, rounded once, as left operands.
template <class T, int WIDTH>
__device__ __forceinline__ void load_queries(uint32_t (&content_q)[WIDTH / 16][4],
                                             uint32_t (&position_q)[WIDTH / 16][4], const RelAttention& p,
                                             const HeadRows<T>& q, int64_t h, int i0) {
    const Lane lane;
    const int width = int(p.width);
    const T* content_bias = static_cast<const T*>(p.content_bias) + h * width;
    const T* position_bias = static_cast<const T*>(p.position_bias) + h * width;
    const float factor = float(p.scale) * LOG2_E;
#pragma unroll
    for (int k = 0; k < WIDTH / 16; ++k)
#pragma unroll
        for (int n = 0; n < 4; ++n) {
            const int i = i0 + lane.row(n % 2 * 2), column = 16 * k + lane.column(0) + n / 2 * 8;
            float x[2] = {}, y[2] = {};
#pragma unroll
            for (int e = 0; e < 2; ++e)
                if (i < p.queries && column + e < width) {
                    const float element = float(q.at(i)[column + e]);
                    x[e] = (element + float(content_bias[column + e])) * factor;
                    y[e] = (element + float(position_bias[column + e])) * factor;
                }
            content_q[k][n] = pack<T>(x[0], x[1]);
            position_q[k][n] = pack<T>(y[0], y[1]);
        }
}

// s (16 x KEYS), the position scores of a tile whose rows of positions begin with block `first` of 16 rows of the ring.
template <class T, int WIDTH, int KEYS>
__device__ __forceinline__ void position_scores(float (&s)[KEYS / 8][4], const uint32_t (&a)[WIDTH / 16][4],
                                                Shared<WIDTH, KEYS>& shared, int first, float* strip) {
    constexpr int RING = Shared<WIDTH, KEYS>::RING / 16, LAST = KEYS / 16;
    const Lane lane;
#pragma unroll
    for (int block = 0; block <= LAST; ++block) {
        const int in_ring = first + block < RING ? first + block : first + block - RING;
        float c[2][4] = {};
        multiply_transposed<T>(c[0], c[1], a, shared.r, 16 * in_ring);
#pragma unroll
        for (int n = 0; n < 8; ++n) {
            const int row = lane.row(n % 4), key = 16 * block + n / 4 * 8 + lane.column(n % 4) + row - 15;
            const bool inside = (block > 0 || key >= 0) && (block < LAST || key < KEYS);
            if (inside) strip[key * STRIP + row] = c[n / 4][n % 4];
        }
    }
    __syncwarp();
#pragma unroll
    for (int n = 0; n < KEYS / 2; ++n)
        s[n / 4][n % 4] = strip[(n / 4 * 8 + lane.column(n % 4)) * STRIP + lane.row(n % 4)];
}

// -inf where query i0 + a does not see key j0 + b.
template <int KEYS>
__device__ __forceinline__ void mask(float (&s)[KEYS / 8][4], const Sight& sight, int i0, int j0) {
    const Lane lane;
#pragma unroll
    for (int n = 0; n < KEYS / 2; ++n) {
        const int i = i0 + lane.row(n % 4), j = j0 + n / 4 * 8 + lane.column(n % 4);
        if (j < sight.first(i) || j >= sight.last(i)) s[n / 4][n % 4] = -INFINITY;
    }
}

// Scores become weights relative to the largest score of the row so far; `total` is this lane's part of their sum.
template <int WIDTH, int KEYS>
__device__ __forceinline__ void to_weights(float (&s)[KEYS / 8][4], float (&mean)[WIDTH / 8][4], float (&top)[2],
                                           float (&total)[2]) {
#pragma unroll
    for (int half = 0; half < 4; half += 2) {
        float most = top[half / 2];
#pragma unroll
        for (int n = 0; n < KEYS / 8; ++n) most = fmaxf(most, fmaxf(s[n][half], s[n][half + 1]));
        most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 1));
        most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 2));
        const float base = most == -INFINITY ? 0.0f : most;  // a row that has seen no key yet
        const float shrink = exp2_approx(top[half / 2] - base);
        float sum = 0;
#pragma unroll
        for (int n = 0; n < KEYS / 8; ++n)
#pragma unroll
            for (int e = half; e < half + 2; ++e) sum += s[n][e] = exp2_approx(s[n][e] - base);
        total[half / 2] = total[half / 2] * shrink + sum;
        top[half / 2] = most;
#pragma unroll
        for (int d = 0; d < WIDTH / 8; ++d) {
            mean[d][half] *= shrink;
            mean[d][half + 1] *= shrink;
        }
    }
}

// Zeros in place of the weights that dropout drops, from the random numbers of query i0 and key j0 on.
template <int KEYS>
__device__ __forceinline__ void drop(float (&s)[KEYS / 8][4], const RelAttention& p, int64_t b, int64_t h, int i0,
                                     int j0) {
    const Lane lane;
    const uint64_t seed = uint64_t(*p.seed);
    const int64_t keys = p.keys + p.memory, offset = ((b * p.heads + h) * p.queries + i0) * keys + j0;
    const float dropout_p = float(p.dropout_p);
    uint32_t kept = 0;  // a bit for each weight, in a short loop: unrolled, it would be 2000 instructions
#pragma unroll 2
    for (int n = 0; n < KEYS / 2; ++n) {
        const int64_t pair = lane.row(n % 4) * keys + n / 4 * 8 + lane.column(n % 4);
        kept |= uint32_t(uniform(seed, uint64_t(offset + pair)) >= dropout_p) << n;
    }
#pragma unroll
    for (int n = 0; n < KEYS / 2; ++n) s[n / 4][n % 4] = kept >> n & 1 ? s[n / 4][n % 4] : 0.0f;
}

// mean += weights (16 x KEYS, rounded) times a tile of values. The layout of a sum is that of a left operand.
template <class T, int WIDTH, int KEYS>
__device__ __forceinline__ void add_values(float (&mean)[WIDTH / 8][4], const float (&s)[KEYS / 8][4],
                                           Tile<WIDTH, KEYS>& values) {
#pragma unroll
    for (int n = 0; n < KEYS / 8; n += 2) {
        const uint32_t weights[4] = {pack<T>(s[n][0], s[n][1]), pack<T>(s[n][2], s[n][3]),
                                     pack<T>(s[n + 1][0], s[n + 1][1]), pack<T>(s[n + 1][2], s[n + 1][3])};
        multiply_rows<T, WIDTH>(mean, weights, values, 8 * n);
    }
}

// The warp's rows of out and lse, those of the head; NaN in out if the sequence's length is not possible.
template <class T, int WIDTH>
__device__ __forceinline__ void store_rows(const float (&mean)[WIDTH / 8][4], const float (&top)[2],
                                           const float (&total)[2], const HeadRows<T>& out, float* lse,
                                           const RelAttention& p, int i0, bool possible, bool whole) {
    const Lane lane;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        float sum = total[half] + __shfl_xor_sync(0xffffffffu, total[half], 1);
        sum += __shfl_xor_sync(0xffffffffu, sum, 2);
        sum = sum == 0 ? 1.0f : sum;  // a row that sees no key: 0, and a logarithm of -inf
        const float factor = possible ? 1 / (sum * float(1 - p.dropout_p)) : NAN;
        const int i = i0 + lane.row(2 * half);
        if (i >= p.queries) continue;
        // Rounded once: an error here is an error of every weight that a backward recomputes.
        if (lane.t == 0) lse[i] = float((double(top[half]) + double(log2f(sum))) * LOG_2);
        T* row = out.at(i);
#pragma unroll
        for (int d = 0; d < WIDTH / 8; ++d) {
            const int column = 8 * d + lane.column(0);
            const uint32_t pair = pack<T>(mean[d][2 * half] * factor, mean[d][2 * half + 1] * factor);
            if (whole && column < p.width) *reinterpret_cast<uint32_t*>(row + column) = pair;
#pragma unroll
            for (int e = 0; e < 2; ++e)
                if (!whole && column + e < p.width) row[column + e] = reinterpret_cast<const T*>(&pair)[e];
        }
    }
}

template <class T, int WIDTH, int KEYS>
__global__ void __launch_bounds__(THREADS, 2) attend(RelAttention p, Heads out, float* lse, bool whole) {
    extern __shared__ uint4 memory[];
    auto& shared = *reinterpret_cast<Shared<WIDTH, KEYS>*>(memory);
    // The heads of a sequence are neighbours; its last queries, which see most, go first.
    const int warp = threadIdx.x / 32, queries = int(p.queries), blocks = int(ceil_div(queries, BLOCK_ROWS));
    const int64_t h = blockIdx.x % p.heads, b = blockIdx.x / p.heads / blocks;
    const int m0 = (blocks - 1 - int(blockIdx.x / p.heads % blocks)) * BLOCK_ROWS, i0 = m0 + ROWS * warp;
    const Sight sight(p, b);
    const Reach block(sight, m0, min(m0 + BLOCK_ROWS, queries)), own(sight, i0, min(i0 + ROWS, queries));

    Copies<T, WIDTH, KEYS> copies(shared, p, b, h, block, m0, whole);
    const int tiles = block.stop > block.begin ? int(ceil_div(block.stop - block.begin, KEYS)) : 0;
    if (tiles > 0) {
        copies.template start_positions<BLOCK_ROWS>(0);
        copies.start_tile(0);
    }
    uint32_t content_q[WIDTH / 16][4], position_q[WIDTH / 16][4];
    load_queries<T, WIDTH>(content_q, position_q, p, HeadRows<T>(p.q, b, h), h, i0);
    float mean[WIDTH / 8][4] = {}, top[2] = {-INFINITY, -INFINITY}, total[2] = {};

    for (int tile = 0; tile < tiles; ++tile) {
        const int j0 = block.begin + tile * KEYS;
        cp_async_wait<0>();
        __syncthreads();  // this tile is there, and no warp reads the one before, nor its strip, any more
        if (tile + 1 < tiles) copies.start_tile(tile + 1);
        if (j0 >= own.stop || j0 + KEYS <= own.begin) continue;
        float s[KEYS / 8][4];
        const int first = (tile * KEYS + ROWS * (WARPS - 1 - warp)) % shared.RING / 16;
        position_scores<T>(s, position_q, shared, first, shared.strips[warp]);
#pragma unroll
        for (int n = 0; n < KEYS / 8; n += 2)
            multiply_transposed<T>(s[n], s[n + 1], content_q, shared.k[tile % 2], 8 * n);
        if (j0 < own.all_begin || j0 + KEYS > own.all_end) mask<KEYS>(s, sight, i0, j0);
        to_weights<WIDTH, KEYS>(s, mean, top, total);
        if (p.dropout_p > 0) drop<KEYS>(s, p, b, h, i0, j0);
        add_values<T, WIDTH, KEYS>(mean, s, shared.v[tile % 2]);
    }
    float* lse_of_head = lse + (b * p.heads + h) * queries;
    store_rows<T, WIDTH>(mean, top, total, HeadRows<T>(out, b, h), lse_of_head, p, i0, sight.possible, whole);
}

// Tiles of 64 keys where a block then has room on every device (99 KB on sm_86), else of 32.
template <class T, int WIDTH>
void launch(const RelAttention& p, Heads out, float* lse, bool whole, cudaStream_t stream) {
    constexpr int KEYS = WIDTH <= 64 ? 64 : 32, bytes = sizeof(Shared<WIDTH, KEYS>);
    const int64_t blocks = p.batch * p.heads * ceil_div(p.queries, BLOCK_ROWS);
    cudaFuncSetAttribute(attend<T, WIDTH, KEYS>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    attend<T, WIDTH, KEYS><<<unsigned(blocks), THREADS, bytes, stream>>>(p, out, lse, whole);
}

bool aligned(const Heads& x) {
    return reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && x.batch_stride % 8 == 0 && x.head_stride % 8 == 0 &&
           x.time_stride % 8 == 0;
}

// The smallest of the padded widths that holds the head width.
template <class T, int... WIDTHS>
void launch_type(const RelAttention& p, Heads out, float* lse, cudaStream_t stream,
                 std::integer_sequence<int, WIDTHS...>) {
    bool whole = p.width % 8 == 0;
    for (const Heads& x : {p.k, p.v, p.r, p.k_memory, p.v_memory, out}) whole = whole && aligned(x);
    (void)((p.width <= WIDTHS && (launch<T, WIDTHS>(p, out, lse, whole, stream), true)) || ...);
}

}  // namespace

void rel_attention_forward(const RelAttention& given, Heads out, float* lse, void* stream) {
    RelAttention p = given;
    if (p.batch * p.heads * p.queries == 0) return;
    if (p.width > 128 || (p.dtype != DType::f16 && p.dtype != DType::bf16))
        throw std::invalid_argument("the CUDA kernel of rel_attention takes fp16 and bf16, and widths up to 128");
    for (const Heads& x : {p.q, p.k, p.v, p.r, p.k_memory, p.v_memory, out})
        if (x.time_stride > UINT32_MAX)
            throw std::invalid_argument("the CUDA kernel of rel_attention takes steps at most 2^32 elements apart");
    p.left = p.left < p.keys + p.memory ? p.left : p.keys + p.memory;
    p.right = p.right < p.queries ? p.right : p.queries - 1;
    constexpr std::integer_sequence<int, 32, 48, 64, 80, 96, 128> widths;
    const auto s = static_cast<cudaStream_t>(stream);
    p.dtype == DType::f16 ? launch_type<__half>(p, out, lse, s, widths)
                          : launch_type<__nv_bfloat16>(p, out, lse, s, widths);
    check_launch("rel_attention_forward");
}

}  // namespace par_xl::cuda
