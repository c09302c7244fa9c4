// AR/TAR on the CPU. Work is cut into strips of consecutive steps of one sequence; a strip of 64K elements is long enough
// to stream and its previous row is still in the first-level cache. The cut depends on the shape alone, never on the
// number of threads, and partial sums are added in one order, so the same input gives the same bits.
#include "common.h"

namespace par_xl::PAR_XL_ISA {
namespace {

int64_t strip_steps(const ArTar& p) { return max(1, min(p.steps, (1 << 16) / max(1, p.width))); }
int64_t strips(const ArTar& p) { return ceil_div(p.steps, strip_steps(p)); }
int64_t real_steps(const ArTar& p, int64_t b) { return p.lengths ? p.lengths[b] : p.steps; }

template <class T>
PAR_XL_INLINE acc_t<T> sum_of_squares(const T* x, int64_t width) {
    acc_t<T> sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < width; ++i) {
        acc_t<T> v = load(x[i]);
        sum += v * v;
    }
    return sum;
}

template <class T>
PAR_XL_INLINE acc_t<T> sum_of_squared_steps(const T* x, const T* before, int64_t width) {
    acc_t<T> sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < width; ++i) {
        acc_t<T> step = load(x[i]) - load(before[i]);
        sum += step * step;
    }
    return sum;
}

template <class T>
void sum_strip(const ArTar& p, int64_t b, int64_t begin, int64_t end, double* sums) {
    const Rows& raw = p.raw.data ? p.raw : p.output;
    double ar = 0, tar = 0;
    for (int64_t t = begin; t < min(end, real_steps(p, b)); ++t) {
        ar += sum_of_squares(row<T>(p.output, b, t), p.width);
        if (t > 0) tar += sum_of_squared_steps(row<T>(raw, b, t), row<T>(raw, b, t - 1), p.width);
    }
    sums[0] = ar;
    sums[1] = tar;
}

// d_output = ar * output
template <class T>
PAR_XL_INLINE void ar_gradient(T* d, const T* x, acc_t<T> ar, int64_t width) {
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) d[i] = store<T>(ar * load(x[i]));
}

// d_raw[t] = tar * ((raw[t] - raw[t-1]) - (raw[t+1] - raw[t])) + ar * raw[t]; at an end, the neighbour is the row itself
template <class T>
PAR_XL_INLINE void tar_gradient(T* d, const T* before, const T* x, const T* after, acc_t<T> ar, acc_t<T> tar, int64_t width) {
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) {
        acc_t<T> v = load(x[i]);
        d[i] = store<T>(tar * ((v - load(before[i])) - (load(after[i]) - v)) + ar * v);
    }
}

template <class T>
void differentiate_strip(const ArTar& p, int64_t b, int64_t begin, int64_t end, acc_t<T> ar, acc_t<T> tar, Rows d_output, Rows d_raw) {
    const int64_t steps = real_steps(p, b);
    const bool shared = !p.raw.data;  // one tensor plays both parts: d_output takes the sum of the two gradients
    const Rows& raw = shared ? p.output : p.raw;
    const Rows& d_steps = shared ? d_output : d_raw;
    for (int64_t t = begin; t < end; ++t) {
        if (t >= steps) {  // padding
            if (d_output.data) memset(row<T>(d_output, b, t), 0, p.width * sizeof(T));
            if (d_raw.data) memset(row<T>(d_raw, b, t), 0, p.width * sizeof(T));
            continue;
        }
        if (d_output.data && !shared) ar_gradient(row<T>(d_output, b, t), row<T>(p.output, b, t), ar, p.width);
        if (d_steps.data)
            tar_gradient(row<T>(d_steps, b, t), row<T>(raw, b, max(t - 1, 0)), row<T>(raw, b, t),
                         row<T>(raw, b, min(t + 1, steps - 1)), shared ? ar : acc_t<T>(0), tar, p.width);
    }
}

template <class F>
void for_each_strip(const ArTar& p, F&& f) {
    const int64_t length = strip_steps(p), per_sequence = strips(p), count = p.batch * per_sequence;
#pragma omp parallel for schedule(static) num_threads(threads_for(p.batch * p.steps * p.width * 4))
    for (int64_t i = 0; i < count; ++i) {
        int64_t begin = i % per_sequence * length;
        f(i, i / per_sequence, begin, min(begin + length, p.steps));
    }
}

}  // namespace

int64_t ar_tar_parts(const ArTar& p) { return p.batch * strips(p); }

void ar_tar_forward(const ArTar& p, double alpha, double beta, double* partial_sums, void* loss, void* scale) {
    dispatch(p.dtype, [&](auto storage) {
        using T = decltype(storage);
        for_each_strip(p, [&](int64_t i, int64_t b, int64_t begin, int64_t end) {
            sum_strip<T>(p, b, begin, end, partial_sums + 2 * i);
        });
        double ar = 0, tar = 0, rows = 0, pairs = 0;
        for (int64_t i = 0; i < ar_tar_parts(p); ++i) {
            ar += partial_sums[2 * i];
            tar += partial_sums[2 * i + 1];
        }
        for (int64_t b = 0; b < p.batch; ++b) {
            rows += double(real_steps(p, b));
            pairs += double(max(real_steps(p, b) - 1, 0));
        }
        // A mean over nothing is 0.
        const double per_row = rows * p.width > 0 ? alpha / (rows * p.width) : 0;
        const double per_pair = pairs * p.width > 0 ? beta / (pairs * p.width) : 0;
        *static_cast<acc_t<T>*>(loss) = acc_t<T>(per_row * ar + per_pair * tar);
        static_cast<acc_t<T>*>(scale)[0] = acc_t<T>(2 * per_row);
        static_cast<acc_t<T>*>(scale)[1] = acc_t<T>(2 * per_pair);
    });
}

void ar_tar_backward(const ArTar& p, const void* grad, const void* scale, Rows d_output, Rows d_raw) {
    dispatch(p.dtype, [&](auto storage) {
        using T = decltype(storage);
        const acc_t<T> g = *static_cast<const acc_t<T>*>(grad);
        const acc_t<T> ar = g * static_cast<const acc_t<T>*>(scale)[0], tar = g * static_cast<const acc_t<T>*>(scale)[1];
        for_each_strip(p, [&](int64_t, int64_t b, int64_t begin, int64_t end) {
            differentiate_strip<T>(p, b, begin, end, ar, tar, d_output, d_raw);
        });
    });
}

}  // namespace par_xl::PAR_XL_ISA
