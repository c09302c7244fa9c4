// AR/TAR on the CPU. Work is cut into strips of consecutive steps of one sequence; a strip of 64K elements is long enough
// to stream and its previous rows are still in a near cache. The cut depends on the shape alone, never on the
// number of threads, and partial sums are added in one order, so the same input gives the same bits.
#include "common.h"

namespace par_xl::PAR_XL_ISA {
namespace {

constexpr int64_t BLOCK = 4096;  // columns that are summed in the arithmetic type; their sums are added in fp64

int64_t strip_steps(const ArTar& p) { return max(1, min(p.steps, (1 << 16) / max(1, p.width))); }
int64_t strips(const ArTar& p) { return ceil_div(p.steps, strip_steps(p)); }
int64_t real_steps(const ArTar& p, int64_t b) { return p.lengths ? p.lengths[b] : p.steps; }

// Adds to sums: output^2 and (raw - before)^2 over N steps, `apart` from one another, that stream through one loop: the
// more places a core reads from, the more reads it keeps in flight.
template <int N, class T>
PAR_XL_INLINE void add_steps(const ArTar& p, const Rows& raw, int64_t b, int64_t t, int64_t apart, double* sums) {
    const T *output[N], *now[N], *before[N];
    for (int k = 0; k < N; ++k) {
        output[k] = row<T>(p.output, b, t + k * apart);
        now[k] = row<T>(raw, b, t + k * apart);
        before[k] = row<T>(raw, b, max(t + k * apart - 1, 0));  // the first step is its own predecessor: a step of 0
    }
    for (int64_t begin = 0; begin < p.width; begin += BLOCK) {
        const int64_t end = min(begin + BLOCK, p.width);
        acc_t<T> ar = 0, tar = 0;
#pragma omp simd reduction(+ : ar, tar)
        for (int64_t i = begin; i < end; ++i)
#pragma GCC unroll 4
            for (int k = 0; k < N; ++k) {
                const acc_t<T> o = load(output[k][i]), step = load(now[k][i]) - load(before[k][i]);
                ar += o * o;
                tar += step * step;
            }
        sums[0] += ar;
        sums[1] += tar;
    }
}

template <class T>
void sum_strip(const ArTar& p, int64_t b, int64_t begin, int64_t end, double* sums) {
    const Rows& raw = p.raw.data ? p.raw : p.output;
    const int64_t steps = max(0, min(end, real_steps(p, b)) - begin), quarter = steps / 4;
    sums[0] = sums[1] = 0;
    for (int64_t t = begin; t < begin + quarter; ++t) add_steps<4, T>(p, raw, b, t, quarter, sums);
    for (int64_t t = begin + 4 * quarter; t < begin + steps; ++t) add_steps<1, T>(p, raw, b, t, 0, sums);
}

template <class T>
void differentiate_strip(const ArTar& p, int64_t b, int64_t begin, int64_t end, acc_t<T> ar, acc_t<T> tar, Rows d_output, Rows d_raw) {
    const int64_t steps = real_steps(p, b);
    const bool shared = !p.raw.data;  // one tensor plays both parts: d_output takes the sum of the two gradients
    const Rows& raw = shared ? p.output : p.raw;
    const Rows& d_steps = shared ? d_output : d_raw;
    const acc_t<T> ar_steps = shared ? ar : acc_t<T>(0);
    const bool stream = p.batch * p.steps * p.width * int64_t(sizeof(T)) >= STREAMED_BYTES;
    for (int64_t t = begin; t < end; ++t) {
        if (t >= steps) {  // padding
            if (d_output.data) memset(row<T>(d_output, b, t), 0, p.width * sizeof(T));
            if (d_raw.data) memset(row<T>(d_raw, b, t), 0, p.width * sizeof(T));
            continue;
        }
        const T *output = row<T>(p.output, b, t), *now = row<T>(raw, b, t);
        // At an end of the sequence the neighbour is the row itself.
        const T *before = row<T>(raw, b, max(t - 1, 0)), *after = row<T>(raw, b, min(t + 1, steps - 1));
        const auto of_output = result(row<T>(d_output, b, t), [=](int64_t i) { return ar * load(output[i]); });
        const auto of_steps = result(row<T>(d_steps, b, t), [=](int64_t i) {
            const acc_t<T> v = load(now[i]);
            return tar * ((v - load(before[i])) - (load(after[i]) - v)) + ar_steps * v;
        });
        if (d_output.data && d_raw.data) write_rows(p.width, stream, of_output, of_steps);
        else if (d_steps.data) write_rows(p.width, stream, of_steps);
        else if (d_output.data) write_rows(p.width, stream, of_output);
    }
    finish_streaming();
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
