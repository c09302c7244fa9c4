// AR/TAR on the GPU. A thread owns VEC neighbouring columns of one sequence and walks a strip of consecutive steps, the
// previous row in registers: one read of each tensor forward, one read and one write backward. Strips depend on the shape
// alone and partial sums are added in one order, so the same input gives the same bits on every device.
#include "common.cuh"

namespace par_xl::cuda {
namespace {

constexpr int THREADS = 256;
constexpr int64_t WANTED_THREADS = 1 << 18;  // about one full wave of a large GPU
constexpr int64_t MOST_STRIPS = 65535;       // a grid's second dimension ends there
constexpr int UNROLL = 4;                    // steps whose loads are in flight together

// How a problem is cut: `lanes` column vectors over all sequences, each cut in `strips` of `length` steps.
struct Cut {
    int64_t vectors, lanes, strips, length;
    Cut(const ArTar& p, int vec) {
        vectors = ceil_div(p.width, vec);
        lanes = p.batch * vectors;
        int64_t most = ceil_div(p.steps, UNROLL);
        int64_t wanted = ceil_div(WANTED_THREADS, lanes > 0 ? lanes : 1);
        wanted = wanted < MOST_STRIPS ? wanted : MOST_STRIPS;
        length = ceil_div(p.steps, wanted < most ? wanted : (most > 0 ? most : 1));
        strips = length > 0 ? ceil_div(p.steps, length) : 0;
    }
    dim3 grid() const { return dim3(unsigned(ceil_div(lanes, THREADS)), unsigned(strips)); }
    int64_t parts() const { return ceil_div(lanes, THREADS) * strips; }
};

__device__ __forceinline__ int64_t real_steps(const ArTar& p, int64_t b) {
    if (!p.lengths) return p.steps;
    int64_t n = p.lengths[b];
    return n < 0 ? 0 : n < p.steps ? n : p.steps;  // for memory safety; a bad length makes the loss NaN in finish()
}

template <class T, int VEC, bool SHARED>
__global__ void __launch_bounds__(THREADS) sum_strips(ArTar p, Cut cut, acc_t<T>* partial_sums) {
    using A = acc_t<T>;
    const int64_t lane = int64_t(blockIdx.x) * THREADS + threadIdx.x, b = lane / cut.vectors;
    A ar = 0, tar = 0;
    if (lane < cut.lanes) {
        const int64_t column = lane % cut.vectors * VEC, begin = blockIdx.y * cut.length;
        const int64_t steps = real_steps(p, b), end = begin + cut.length < steps ? begin + cut.length : steps;
        const T* output = row<T>(p.output, b, 0) + column;
        const T* raw = SHARED ? output : row<T>(p.raw, b, 0) + column;
        const int64_t raw_stride = SHARED ? p.output.time_stride : p.raw.time_stride;
        A before[VEC];
        if (begin < end) load<T, VEC>(raw + (begin > 0 ? begin - 1 : 0) * raw_stride, before);
        for (int64_t t0 = begin; t0 < end; t0 += UNROLL) {
            A x[UNROLL][VEC], o[UNROLL][VEC];
#pragma unroll
            for (int k = 0; k < UNROLL; ++k)
                if (t0 + k < end) {
                    load<T, VEC>(raw + (t0 + k) * raw_stride, x[k]);
                    if (!SHARED) load<T, VEC>(output + (t0 + k) * p.output.time_stride, o[k]);
                }
#pragma unroll
            for (int k = 0; k < UNROLL; ++k)
                if (t0 + k < end)
#pragma unroll
                    for (int i = 0; i < VEC; ++i) {
                        const A step = x[k][i] - before[i], value = SHARED ? x[k][i] : o[k][i];
                        ar += value * value;
                        tar += step * step;
                        before[i] = x[k][i];
                    }
        }
    }
    ar = block_sum<THREADS>(ar);
    tar = block_sum<THREADS>(tar);
    if (threadIdx.x == 0) {
        const int64_t part = int64_t(blockIdx.y) * gridDim.x + blockIdx.x;
        partial_sums[2 * part] = ar;
        partial_sums[2 * part + 1] = tar;
    }
}

template <class A>
__global__ void __launch_bounds__(THREADS) finish(ArTar p, double alpha, double beta, const A* partial_sums, int64_t parts, A* loss, A* scale) {
    A ar = 0, tar = 0;
    double rows = 0, pairs = 0;
    for (int64_t i = threadIdx.x; i < parts; i += THREADS) {
        ar += partial_sums[2 * i];
        tar += partial_sums[2 * i + 1];
    }
    for (int64_t b = threadIdx.x; b < p.batch; b += THREADS) {
        const int64_t n = p.lengths ? p.lengths[b] : p.steps;
        rows += n < 0 || n > p.steps ? nan("") : double(n);  // a bad length: NaN instead of a host synchronisation
        pairs += n > 1 ? double(n - 1) : 0.0;
    }
    ar = block_sum<THREADS>(ar);
    tar = block_sum<THREADS>(tar);
    rows = block_sum<THREADS>(rows) * p.width;
    pairs = block_sum<THREADS>(pairs) * p.width;
    if (threadIdx.x == 0) {
        const double per_row = rows == 0 ? 0 : alpha / rows;  // a mean over nothing is 0
        const double per_pair = pairs == 0 ? 0 : beta / pairs;
        *loss = A(per_row * ar + per_pair * tar);
        scale[0] = A(2 * per_row);
        scale[1] = A(2 * per_pair);
    }
}

template <class T, int VEC, bool SHARED>
__global__ void __launch_bounds__(THREADS) differentiate(ArTar p, Cut cut, const acc_t<T>* grad, const acc_t<T>* scale, Rows d_output, Rows d_raw) {
    using A = acc_t<T>;
    const int64_t lane = int64_t(blockIdx.x) * THREADS + threadIdx.x, b = lane / cut.vectors;
    if (lane >= cut.lanes) return;
    const int64_t column = lane % cut.vectors * VEC, begin = blockIdx.y * cut.length, steps = real_steps(p, b);
    const int64_t end = begin + cut.length < p.steps ? begin + cut.length : p.steps;
    const A ar = *grad * scale[0], tar = *grad * scale[1];
    const Rows& raw = SHARED ? p.output : p.raw;
    const Rows& d_steps = SHARED ? d_output : d_raw;
    A before[VEC], x[VEC], d[VEC];
    if (d_steps.data && begin < steps) {
        load<T, VEC>(row<T>(raw, b, begin > 0 ? begin - 1 : 0) + column, before);
        load<T, VEC>(row<T>(raw, b, begin) + column, x);
    }
    for (int64_t t0 = begin; t0 < end; t0 += UNROLL) {
        A after[UNROLL][VEC], o[UNROLL][VEC];
#pragma unroll
        for (int k = 0; k < UNROLL; ++k) {
            const int64_t t = t0 + k;
            if (t >= end || t >= steps) continue;
            if (d_output.data && !SHARED) load<T, VEC>(row<T>(p.output, b, t) + column, o[k]);
            // At an end of the sequence the neighbour is the row itself.
            if (d_steps.data) load<T, VEC>(row<T>(raw, b, t + 1 < steps ? t + 1 : t) + column, after[k]);
        }
#pragma unroll
        for (int k = 0; k < UNROLL; ++k) {
            const int64_t t = t0 + k;
            if (t >= end) break;
            const bool real = t < steps;  // padding has gradient 0
            if (d_output.data && !SHARED) {
#pragma unroll
                for (int i = 0; i < VEC; ++i) d[i] = real ? ar * o[k][i] : A(0);
                store<T, VEC>(row<T>(d_output, b, t) + column, d);
            }
            if (d_steps.data) {
#pragma unroll
                for (int i = 0; i < VEC; ++i) {
                    const A steps_gradient = tar * ((x[i] - before[i]) - (after[k][i] - x[i]));
                    d[i] = real ? steps_gradient + (SHARED ? ar * x[i] : A(0)) : A(0);
                    before[i] = x[i];
                    x[i] = after[k][i];
                }
                store<T, VEC>(row<T>(d_steps, b, t) + column, d);
            }
        }
    }
}

bool aligned(const Rows& x, int vec, int size) {
    return !x.data || (reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && x.batch_stride * size % 16 == 0 && x.time_stride * size % 16 == 0);
}

// Calls f(T{}, vector width, shared): 16-byte vectors where every row of every tensor allows them.
template <class F>
void specialise(const ArTar& p, const Rows& d_output, const Rows& d_raw, F&& f) {
    dispatch(p.dtype, [&](auto storage) {
        using T = decltype(storage);
        constexpr int VEC = 16 / sizeof(T);
        bool wide = p.width % VEC == 0;
        for (const Rows* x : {&p.output, &p.raw, &d_output, &d_raw}) wide = wide && aligned(*x, VEC, sizeof(T));
        auto with_vector = [&](auto vec) {
            p.raw.data ? f(storage, vec, std::false_type{}) : f(storage, vec, std::true_type{});
        };
        wide ? with_vector(std::integral_constant<int, VEC>{}) : with_vector(std::integral_constant<int, 1>{});
    });
}

}  // namespace

// Enough partial sums for either vector width.
int64_t ar_tar_parts(const ArTar& p) {
    const int64_t wide = Cut(p, p.dtype == DType::f64 ? 2 : p.dtype == DType::f32 ? 4 : 8).parts(), narrow = Cut(p, 1).parts();
    return wide > narrow ? wide : narrow;
}

void ar_tar_forward(const ArTar& p, double alpha, double beta, void* partial_sums, void* loss, void* scale, void* stream) {
    specialise(p, {}, {}, [&](auto storage, auto vec, auto shared) {
        using T = decltype(storage);
        using A = acc_t<T>;
        const Cut cut(p, vec);
        auto s = static_cast<cudaStream_t>(stream);
        auto sums = static_cast<A*>(partial_sums);
        if (cut.parts() > 0) sum_strips<T, decltype(vec)::value, decltype(shared)::value><<<cut.grid(), THREADS, 0, s>>>(p, cut, sums);
        finish<A><<<1, THREADS, 0, s>>>(p, alpha, beta, sums, cut.parts(), static_cast<A*>(loss), static_cast<A*>(scale));
    });
    check_launch("ar_tar_forward");
}

void ar_tar_backward(const ArTar& p, const void* grad, const void* scale, Rows d_output, Rows d_raw, void* stream) {
    specialise(p, d_output, d_raw, [&](auto storage, auto vec, auto shared) {
        using T = decltype(storage);
        using A = acc_t<T>;
        const Cut cut(p, vec);
        if (cut.parts() == 0) return;
        differentiate<T, decltype(vec)::value, decltype(shared)::value><<<cut.grid(), THREADS, 0, static_cast<cudaStream_t>(stream)>>>(
            p, cut, static_cast<const A*>(grad), static_cast<const A*>(scale), d_output, d_raw);
    });
    check_launch("ar_tar_backward");
}

}  // namespace par_xl::cuda
