// Compression of memory rows on the GPU, and the update of a compressive memory in one pass over its rows. A thread owns
// VEC neighbouring columns of one output row (of one group of rows, backward); no atomics, so the same bits every time.
#include "common.cuh"

namespace par_xl::cuda {
namespace {

constexpr int THREADS = 256;
constexpr int SELECTORS = 1024;  // threads of a block that selects the most used steps of one sequence
constexpr int UNROLL = 4;        // rows whose loads are in flight together

// A thread's sequence, row and first column; `inside` is false past the end.
struct Place {
    int64_t b, r, column;
    bool inside;
    __device__ Place(int64_t batch, int64_t rows, int64_t width, int vec) {
        const int64_t vectors = ceil_div(width, vec), i = int64_t(blockIdx.x) * THREADS + threadIdx.x;
        column = i % vectors * vec;
        r = i / vectors % rows;
        b = i / vectors / rows;
        inside = b < batch;
    }
};

// Folds `rate` rows, whose addresses source(j) returns, into their mean, adding by sixteens and then these sums, or into
// their maximum. `at` is the first row that attains the maximum; the first NaN wins.
template <class T, int VEC, bool MAX, class Source>
__device__ __forceinline__ void fold(Source&& source, int64_t rate, acc_t<T> (&best)[VEC], int (&at)[VEC]) {
    using A = acc_t<T>;
    A sum[VEC] = {};
#pragma unroll
    for (int i = 0; i < VEC; ++i) best[i] = 0;
    for (int64_t j0 = 0; j0 < rate; j0 += UNROLL) {
        A x[UNROLL][VEC];
#pragma unroll
        for (int k = 0; k < UNROLL; ++k)
            if (j0 + k < rate) load<T, VEC>(source(j0 + k), x[k]);
#pragma unroll
        for (int k = 0; k < UNROLL; ++k)
            if (j0 + k < rate)
#pragma unroll
                for (int i = 0; i < VEC; ++i) {
                    if (!MAX) {
                        sum[i] += x[k][i];
                    } else if (j0 + k == 0 || (!(x[k][i] <= best[i]) && best[i] == best[i])) {
                        best[i] = x[k][i];
                        at[i] = int(j0) + k;
                    }
                }
        if (!MAX && ((j0 + UNROLL) % 16 == 0 || j0 + UNROLL >= rate))
#pragma unroll
            for (int i = 0; i < VEC; ++i) {
                best[i] += sum[i];
                sum[i] = 0;
            }
    }
    if (!MAX)
#pragma unroll
        for (int i = 0; i < VEC; ++i) best[i] /= A(rate);
}

template <class T, int N>
struct alignas(N * sizeof(T)) Vector { T at[N]; };

template <class Index, int VEC>
__device__ __forceinline__ void store_choice(void* choice, int64_t offset, const int (&at)[VEC]) {
    Vector<Index, VEC> v;
#pragma unroll
    for (int i = 0; i < VEC; ++i) v.at[i] = Index(at[i]);
    *reinterpret_cast<Vector<Index, VEC>*>(static_cast<Index*>(choice) + offset) = v;
}

template <class Index, int VEC>
__device__ __forceinline__ void load_choice(const void* choice, int64_t offset, int (&at)[VEC]) {
    const auto v = *reinterpret_cast<const Vector<Index, VEC>*>(static_cast<const Index*>(choice) + offset);
#pragma unroll
    for (int i = 0; i < VEC; ++i) at[i] = int(v.at[i]);
}

// compressed[b, n] = mean or max over j < rate of memory[b, n rate + j]
template <class T, int VEC, bool MAX>
__global__ void __launch_bounds__(THREADS) pool(Compression p) {
    const int64_t groups = p.steps / p.rate;
    const Place at(p.batch, groups, p.width, VEC);
    if (!at.inside) return;
    acc_t<T> best[VEC];
    int chosen[VEC];
    const T* first = row<T>(p.memory, at.b, at.r * p.rate) + at.column;
    fold<T, VEC, MAX>([&](int64_t j) { return first + j * p.memory.time_stride; }, p.rate, best, chosen);
    store<T, VEC>(row<T>(p.compressed, at.b, at.r) + at.column, best);
    if (MAX) {
        const int64_t offset = (at.b * groups + at.r) * p.width + at.column;
        p.rate <= 256 ? store_choice<uint8_t, VEC>(p.choice, offset, chosen) : store_choice<int32_t, VEC>(p.choice, offset, chosen);
    }
}

// d_memory[b, n rate + j] = grad[b, n] / rate, or grad[b, n] where row j was chosen
template <class T, int VEC, bool MAX>
__global__ void __launch_bounds__(THREADS) unpool(Compression p) {
    const int64_t groups = p.steps / p.rate;
    const Place at(p.batch, groups, p.width, VEC);
    if (!at.inside) return;
    acc_t<T> grad[VEC];
    int chosen[VEC];
    load<T, VEC>(row<T>(p.compressed, at.b, at.r) + at.column, grad);
    if (MAX) {
        const int64_t offset = (at.b * groups + at.r) * p.width + at.column;
        p.rate <= 256 ? load_choice<uint8_t, VEC>(p.choice, offset, chosen) : load_choice<int32_t, VEC>(p.choice, offset, chosen);
    } else {
#pragma unroll
        for (int i = 0; i < VEC; ++i) grad[i] /= acc_t<T>(p.rate);
    }
    T* d = row<T>(p.memory, at.b, at.r * p.rate) + at.column;
    for (int64_t j = 0; j < p.rate; ++j, d += p.memory.time_stride) {
        acc_t<T> share[VEC];
#pragma unroll
        for (int i = 0; i < VEC; ++i) share[i] = MAX && chosen[i] != j ? acc_t<T>(0) : grad[i];
        store<T, VEC>(d, share);
    }
}

// An unsigned integer in the order of the floats: -0 equals 0 and NaN is the largest.
__device__ __forceinline__ uint32_t sort_key(float x) {
    const uint32_t bits = x == 0 ? 0u : __float_as_uint(x);
    return x != x ? 0xffffffffu : bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
}

// How many steps have at least this key; the same in every thread.
__device__ int64_t count_from(const float* usage, int64_t steps, uint32_t threshold) {
    int64_t count = 0;
    for (int64_t t = 0; t < steps; t += SELECTORS)
        count += __syncthreads_count(t + threadIdx.x < steps && sort_key(usage[t + threadIdx.x]) >= threshold);
    return count;
}

// The number of threads before this one for which the predicate holds.
__device__ int count_before(bool predicate) {
    __shared__ int of_warp[SELECTORS / 32];
    const unsigned votes = __ballot_sync(0xffffffffu, predicate);
    if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = __popc(votes);
    __syncthreads();
    int before = __popc(votes & ((1u << threadIdx.x % 32) - 1));
    for (int warp = 0; warp < threadIdx.x / 32; ++warp) before += of_warp[warp];
    __syncthreads();
    return before;
}

// slots[b, t] = the place of step t among the `keep` most used in time order, or -1. The threshold is the keep-th largest
// key, found bit by bit; of the steps at the threshold, the older ones are kept.
__global__ void __launch_bounds__(SELECTORS) select(const float* usage, int32_t* slots, int64_t steps, int64_t keep) {
    usage += blockIdx.x * steps;
    slots += blockIdx.x * steps;
    uint32_t threshold = 0;
    for (uint32_t bit = 1u << 31; bit; bit >>= 1)
        if (count_from(usage, steps, threshold | bit) >= keep) threshold |= bit;
    const int64_t ties = keep - (threshold == 0xffffffffu ? 0 : count_from(usage, steps, threshold + 1));
    int64_t kept_before = 0, ties_before = 0;
    for (int64_t t0 = 0; t0 < steps; t0 += SELECTORS) {
        const int64_t t = t0 + threadIdx.x;
        const uint32_t key = t < steps ? sort_key(usage[t]) : 0;
        const bool tie = t < steps && key == threshold;
        const bool chosen = ties_before + count_before(tie) < ties;
        const bool kept = t < steps && (key > threshold || (tie && chosen));
        const int64_t slot = kept_before + count_before(kept);
        if (t < steps) slots[t] = kept ? int32_t(slot) : -1;
        kept_before += __syncthreads_count(kept);
        ties_before += __syncthreads_count(tie);
    }
}

template <class T, int VEC>
__device__ __forceinline__ void copy(T* to, const T* from) {
    using W = typename Word<VEC * sizeof(T)>::type;
    __stwb(reinterpret_cast<W*>(to), *reinterpret_cast<const W*>(from));  // as in common.cuh's store
}

// compressed[b, slots[b, t]] = memory[b, t] for the steps kept; backward, the other way, and 0 for the rest
template <class T, int VEC, bool BACKWARD>
__global__ void __launch_bounds__(THREADS) keep_rows(Compression p) {
    const Place at(p.batch, p.steps, p.width, VEC);
    if (!at.inside) return;
    const int32_t slot = static_cast<const int32_t*>(p.choice)[at.b * p.steps + at.r];
    T* step = row<T>(p.memory, at.b, at.r) + at.column;
    T* kept = slot < 0 ? nullptr : row<T>(p.compressed, at.b, slot) + at.column;
    if (kept) BACKWARD ? copy<T, VEC>(step, kept) : copy<T, VEC>(kept, step);
    else if (BACKWARD) store<T, VEC>(step, {});
}

// Row r of the memory followed by the segment.
template <class T>
__device__ __forceinline__ const T* recent(const MemoryUpdate& p, int64_t b, int64_t r) {
    return r < p.old_memory ? row<T>(p.state, b, p.old_compressed + r) : row<T>(p.hidden, b, r - p.old_memory);
}

// One row of out = [the newest compressed rows | the newest rows of memory and segment]
template <class T, int VEC, bool MAX>
__global__ void __launch_bounds__(THREADS) update(MemoryUpdate p) {
    const Place at(p.batch, p.new_compressed + p.new_memory, p.width, VEC);
    if (!at.inside) return;
    T* out = row<T>(p.out, at.b, at.r) + at.column;
    const int64_t left = p.old_memory + p.segment - p.new_memory;   // rows that leave the memory
    const int64_t n = p.fresh_rows - p.new_compressed + at.r;       // the fresh row, if 0 <= n < fresh_rows
    if (at.r >= p.new_compressed) {
        copy<T, VEC>(out, recent<T>(p, at.b, left + at.r - p.new_compressed) + at.column);
    } else if (n < 0) {
        copy<T, VEC>(out, row<T>(p.state, at.b, p.old_compressed + n) + at.column);
    } else if (p.mode == Compressor::given) {
        copy<T, VEC>(out, row<T>(p.fresh, at.b, n) + at.column);
    } else {
        acc_t<T> best[VEC];
        int chosen[VEC];
        const int64_t first = left + (n - p.fresh_rows) * p.rate;  // the oldest rows that fill no group are dropped
        fold<T, VEC, MAX>([&](int64_t j) { return recent<T>(p, at.b, first + j) + at.column; }, p.rate, best, chosen);
        store<T, VEC>(out, best);
    }
}

bool aligned(const Rows& x, int size) {
    return !x.data || (reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && x.batch_stride * size % 16 == 0 && x.time_stride * size % 16 == 0);
}

// Calls f(T{}, vector width): 16-byte vectors where every row of every tensor allows them.
template <class F, class... Tensors>
void specialise(DType dtype, int64_t width, F&& f, const Tensors&... tensors) {
    dispatch(dtype, [&](auto storage) {
        constexpr int VEC = 16 / sizeof(storage);
        const bool wide = width % VEC == 0 && (aligned(tensors, sizeof(storage)) && ...);
        wide ? f(storage, std::integral_constant<int, VEC>{}) : f(storage, std::integral_constant<int, 1>{});
    });
}

// Launches a kernel with a thread for VEC columns of each of `rows` rows of each sequence.
template <class Problem>
void launch(void (*kernel)(Problem), const Problem& p, int64_t rows, int vec, void* stream) {
    const int64_t blocks = ceil_div(p.batch * rows * ceil_div(p.width, vec), THREADS);
    if (blocks > 0) kernel<<<unsigned(blocks), THREADS, 0, static_cast<cudaStream_t>(stream)>>>(p);
}

// The kernel of a mode, forward or backward.
template <bool BACKWARD>
void compress(const Compression& p, void* stream) {
    specialise(p.dtype, p.width, [&](auto storage, auto vec) {
        using T = decltype(storage);
        constexpr int VEC = decltype(vec)::value;
        const bool max = p.mode == Compressor::max;
        if (p.mode == Compressor::most_used) launch(keep_rows<T, VEC, BACKWARD>, p, p.steps, VEC, stream);
        else if (BACKWARD) launch(max ? unpool<T, VEC, true> : unpool<T, VEC, false>, p, p.steps / p.rate, VEC, stream);
        else launch(max ? pool<T, VEC, true> : pool<T, VEC, false>, p, p.steps / p.rate, VEC, stream);
    }, p.memory, p.compressed);
    check_launch(BACKWARD ? "compress_backward" : "compress_forward");
}

}  // namespace

void compress_forward(const Compression& p, const float* usage, void* stream) {
    if (p.mode == Compressor::most_used && p.batch * p.steps > 0)
        select<<<unsigned(p.batch), SELECTORS, 0, static_cast<cudaStream_t>(stream)>>>(usage, static_cast<int32_t*>(p.choice), p.steps, p.steps / p.rate);
    compress<false>(p, stream);
}

void compress_backward(const Compression& p, void* stream) { compress<true>(p, stream); }

void memory_update(const MemoryUpdate& p, void* stream) {
    specialise(p.dtype, p.width, [&](auto storage, auto vec) {
        using T = decltype(storage);
        constexpr int VEC = decltype(vec)::value;
        launch(p.mode == Compressor::max ? update<T, VEC, true> : update<T, VEC, false>, p, p.new_compressed + p.new_memory, VEC, stream);
    }, p.state, p.hidden, p.out, p.fresh);
    check_launch("memory_update");
}

}  // namespace par_xl::cuda
