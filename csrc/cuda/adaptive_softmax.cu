// Adaptive softmax on the GPU: the sort of the tokens by tail, and what stands between the head's matrix products, in place
// over a block of rows; see csrc/cpu/adaptive_softmax.cpp for the formula. Matrix products and tails are not here. No
// atomics: counts and sums have one order, so the same input gives the same bits.
#include <algorithm>

#include "common.cuh"

namespace par_xl::cuda {
namespace {

constexpr int THREADS = 512;     // of a block that owns a row
constexpr int TOKENS = 1024;     // of a block of the sort
constexpr int64_t MOST_TAILS = 64;
constexpr int64_t NO_LOSS = -1, NO_CLASS = -2;  // a target's column in the head where it has none

struct Ends {
    int64_t at[MOST_TAILS + 1];
};

struct Sum {
    template <class A> __device__ A operator()(A a, A b) const { return a + b; }
};
struct Largest {
    template <class A> __device__ A operator()(A a, A b) const { return a > b ? a : b; }
};

// x of all threads of the block, folded in a fixed order; every thread gets the result.
template <int N, class A, class Fold>
__device__ __forceinline__ A over_block(A x, Fold fold) {
    __shared__ A of_warp[N / 32];
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) x = fold(x, __shfl_xor_sync(0xffffffffu, x, offset));
    if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = x;
    __syncthreads();
    x = of_warp[0];
    for (int warp = 1; warp < N / 32; ++warp) x = fold(x, of_warp[warp]);
    __syncthreads();
    return x;
}

struct Token {
    int64_t index, target, tail;  // tail -1: none
    bool real, ignored, outside;
    __device__ Token(const AdaptiveBuckets& p, const Ends& ends) {
        index = int64_t(blockIdx.x) * TOKENS + threadIdx.x;
        real = index < p.tokens;
        target = real ? p.target[index] : 0;
        ignored = target == p.ignore_index;
        outside = !ignored && (target < 0 || target >= ends.at[p.tails]);
        tail = -1;
        if (real && !ignored && !outside)
            while (target >= ends.at[tail + 1]) ++tail;
    }
};

// counts (tails, blocks)
__global__ void __launch_bounds__(TOKENS) count_tails(AdaptiveBuckets p, Ends ends, int64_t* counts) {
    const Token token(p, ends);
    for (int64_t i = 0; i < p.tails; ++i) {
        const int n = __syncthreads_count(token.tail == i);
        if (threadIdx.x == 0) counts[i * gridDim.x + blockIdx.x] = n;
    }
}

__global__ void __launch_bounds__(TOKENS) place_tokens(AdaptiveBuckets p, Ends ends, const int64_t* counts) {
    __shared__ int of_warp[TOKENS / 32];
    const Token token(p, ends);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (token.real) {
        const int64_t column = p.descending ? p.tails - 1 - token.tail : token.tail;
        p.head_column[token.index] = token.ignored    ? NO_LOSS
                                     : token.outside  ? NO_CLASS
                                     : token.tail < 0 ? token.target
                                                      : ends.at[0] + column;
        p.tail_column[token.index] = token.tail < 0 ? -1 : token.target - ends.at[token.tail];
        if (token.outside) *p.bad = token.target;
    }
    for (int64_t i = 0; i <= p.tails; ++i) {
        // What stands before: all tokens of the tails before this one, and those of this one in the blocks before.
        int64_t before = 0;
        const int64_t end = i < p.tails ? i * gridDim.x + blockIdx.x : i * gridDim.x;
        for (int64_t j = threadIdx.x; j < end; j += TOKENS) before += counts[j];
        before = over_block<TOKENS>(before, Sum());
        if (blockIdx.x == 0 && threadIdx.x == 0) p.offsets[i] = before;
        if (i == p.tails) break;
        const unsigned here = __ballot_sync(0xffffffffu, token.tail == i);
        if (lane == 0) of_warp[warp] = __popc(here);  // over_block has waited for who reads the last tail's
        __syncthreads();
        if (token.tail == i) {
            for (int w = 0; w < warp; ++w) before += of_warp[w];
            p.order[before + __popc(here & ((1u << lane) - 1))] = token.index;
        }
    }
}

template <class A> struct Vectors;
template <> struct Vectors<float> { using type = float4; };
template <> struct Vectors<double> { using type = double2; };
template <class A> using Vector = typename Vectors<A>::type;

// A block owns a row of logits, which is read once: from then on it is HELD in shared memory, where it fits. Of a longer
// row the gradient, which may be narrower, is written over logits that every thread has read.
template <class T, bool HELD>
__global__ void __launch_bounds__(THREADS) differentiate_row(AdaptiveRows p) {
    using A = acc_t<T>;
    constexpr int VEC = 16 / sizeof(T), PART = 16 / sizeof(A);
    extern __shared__ __align__(16) unsigned char memory[];
    A* held = reinterpret_cast<A*>(memory);
    const int64_t row = blockIdx.x, y = p.column[row];
    const A* z = static_cast<const A*>(p.logits) + row * p.stride;
    const A* bias = static_cast<const A*>(p.bias);
    T* dz = reinterpret_cast<T*>(static_cast<A*>(p.logits) + row * p.stride);
    A x[VEC];

    // Logits c .. c + VEC; a row has room for whole vectors, and what is past its end counts as -inf.
    auto read = [&](int64_t c) {
#pragma unroll
        for (int i = 0; i < VEC; i += PART) load<A, PART>(z + c + i, *reinterpret_cast<A(*)[PART]>(x + i));
        A b[VEC] = {};
        if (bias && c + VEC <= p.columns)
#pragma unroll
            for (int i = 0; i < VEC; i += PART) load<A, PART>(bias + c + i, *reinterpret_cast<A(*)[PART]>(b + i));
        else if (bias)
#pragma unroll
            for (int i = 0; i < VEC; ++i) b[i] = c + i < p.columns ? bias[c + i] : A(0);
#pragma unroll
        for (int i = 0; i < VEC; ++i) x[i] = c + i < p.columns ? x[i] + b[i] : A(-INFINITY);
    };
    auto keep = [&](int64_t c) {
#pragma unroll
        for (int i = 0; i < VEC; i += PART) {
            Vector<A> part;
#pragma unroll
            for (int j = 0; j < PART; ++j) (&part.x)[j] = x[i + j];
            *reinterpret_cast<Vector<A>*>(held + c + i) = part;
        }
    };
    auto recall = [&](int64_t c) {
        if (HELD)
#pragma unroll
            for (int i = 0; i < VEC; i += PART) load<A, PART>(held + c + i, *reinterpret_cast<A(*)[PART]>(x + i));
        else
            read(c);
    };

    if (y < 0) {
#pragma unroll
        for (int i = 0; i < VEC; ++i) x[i] = 0;
        for (int64_t c = threadIdx.x * VEC; c < p.columns; c += THREADS * VEC) store<T, VEC>(dz + c, x);
        if (threadIdx.x == 0) static_cast<A*>(p.nll)[row] = y == NO_LOSS ? A(0) : A(NAN);
        return;
    }
    A largest = -INFINITY;
    for (int64_t c = threadIdx.x * VEC; c < p.columns; c += THREADS * VEC) {
        read(c);
#pragma unroll
        for (int i = 0; i < VEC; ++i) largest = Largest()(largest, x[i]);
        if (HELD) keep(c);
    }
    largest = over_block<THREADS>(largest, Largest());
    const A of_target = HELD ? held[y] : z[y] + (bias ? bias[y] : A(0));
    __syncthreads();  // every thread has its copy, before the weights take the logits' place
    A sum = 0, total = 0;  // relative to the largest logit, so that no digits are lost to its size
    for (int64_t c = threadIdx.x * VEC; c < p.columns; c += THREADS * VEC) {
        recall(c);
#pragma unroll
        for (int i = 0; i < VEC; ++i) {
            total += c + i < p.columns ? x[i] - largest : A(0);
            x[i] = exp(x[i] - largest);
            sum += x[i];
        }
        if (HELD) keep(c);
    }
    sum = over_block<THREADS>(sum, Sum());
    total = over_block<THREADS>(total, Sum());
    const A s = A(p.label_smoothing), w = A(p.z_loss), log_sum = log(sum), lse = largest + log_sum;
    if (threadIdx.x == 0) {  // a term that is not wanted is not 0 times what may be infinite
        const A smooth = s == 0 ? A(0) : s * total / A(p.columns), square = w == 0 ? A(0) : w * lse * lse;
        static_cast<A*>(p.nll)[row] = log_sum - (1 - s) * (of_target - largest) - smooth + square;
    }
    const A g = static_cast<const A*>(p.grad)[row];
    const A scale = g * (1 + 2 * w * lse) / sum, shift = g * s / A(p.columns), hit = g * (1 - s);
    for (int64_t begin = 0; begin < p.columns; begin += THREADS * VEC) {
        const int64_t c = begin + threadIdx.x * VEC;
        if (c < p.columns) {
            recall(c);
#pragma unroll
            for (int i = 0; i < VEC; ++i)
                x[i] = scale * (HELD ? x[i] : exp(x[i] - largest)) - shift - (c + i == y ? hit : A(0));
        }
        if (!HELD) __syncthreads();
        if (c < p.columns) store<T, VEC>(dz + c, x);
    }
}

template <class T, bool HELD>
void launch_rows(const AdaptiveRows& p, size_t bytes, cudaStream_t stream) {
    if (HELD) cudaFuncSetAttribute(differentiate_row<T, HELD>, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes));
    differentiate_row<T, HELD><<<unsigned(p.rows), THREADS, HELD ? bytes : 0, stream>>>(p);
}

int64_t blocks(const AdaptiveBuckets& p) { return std::max<int64_t>(1, ceil_div(p.tokens, TOKENS)); }

}  // namespace

int64_t adaptive_bucket_counts(const AdaptiveBuckets& p) { return std::max<int64_t>(1, p.tails * blocks(p)); }

void adaptive_buckets(const AdaptiveBuckets& p, int64_t* counts, void* stream) {
    if (p.tails > MOST_TAILS) throw std::invalid_argument("the CUDA kernels take at most 64 tails");
    Ends ends;
    std::copy(p.ends, p.ends + p.tails + 1, ends.at);
    const auto grid = unsigned(blocks(p));
    count_tails<<<grid, TOKENS, 0, static_cast<cudaStream_t>(stream)>>>(p, ends, counts);
    place_tokens<<<grid, TOKENS, 0, static_cast<cudaStream_t>(stream)>>>(p, ends, counts);
    check_launch("adaptive_buckets");
}

void adaptive_rows(const AdaptiveRows& p, void* stream) {
    if (p.rows == 0) return;
    int device, most;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    dispatch(p.dtype, [&](auto storage) {
        using T = decltype(storage);
        const size_t bytes = p.stride * sizeof(acc_t<T>);
        const bool held = bytes + 1024 <= size_t(most);  // the rest is for the sums over a block
        (held ? launch_rows<T, true> : launch_rows<T, false>)(p, bytes, static_cast<cudaStream_t>(stream));
    });
    check_launch("adaptive_rows");
}

}  // namespace par_xl::cuda
