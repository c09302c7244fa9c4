// rel_attention on the CPU. A thread takes a head, packs its keys, values and position rows once, and walks over blocks of
// query rows whose scores stay in its cache. A block sees every key of its rows, so a row's softmax is complete in it.
//
// The relative shift costs nothing: query row a meets key column c in position p = c - a + const, so the position product,
// stored with a row pitch one larger than that of the scores, falls on the scores it belongs to. The same view of the
// gradients of the scores is the gradient of the position product. Rows have margins for what lies outside of the scores.
//
// Where the distances are clamped, the product ends at row 0 of r; what that adds to a query's farther keys is one number.
//
//     products = content_q k^T + position_q r^T                     content_q, position_q: q + bias
//     forward:   W = exp(scale * (products - max)), out = W v / sum
//     received:  sum_a exp(scale * products - lse)
//     backward:  W again, dW = grad v^T, dS = W * (dW - sum(W dW)), and one product for each gradient
//
// Work is cut by shape alone and a head's sums have one order, so the bits do not depend on the number of threads.
#include "rel_attention.h"
#include "rel_attention_rows.h"

namespace par_xl::PAR_XL_ISA {
namespace {

template <class X>
PAR_XL_INLINE X* at(const Heads& x, int64_t b, int64_t h, int64_t t) {
    return static_cast<X*>(x.data) + b * x.batch_stride + h * x.head_stride + t * x.time_stride;
}

// One thread and what it needs: a head's operands in the arithmetic type, a block's queries, scores and results.
template <class X>
class Worker {
    using T = acc_t<X>;
    const RelAttention& p;
    const Plan<T> plan;
    T *key_t, *value_t, *r_t, *key, *value, *r, *d_key, *d_value;             // (n, width), and transposed
    T *content_q, *position_q, *d_out, *content_out, *position_out, *factor;  // (rows, width); factor (rows)
    T *scores, *d_scores;                                                     // row 0, column 0

    // Cuts a thread's workspace; returns its size.
    int64_t cut(T* workspace, bool backward) {
        const int64_t keys = round_up(plan.n_keys, panel<T>) * plan.width, block = plan.rows * plan.width;
        const int64_t positions = round_up(plan.used_positions, panel<T>) * plan.width;
        int64_t size = 0;
        auto take = [&](T*& x, int64_t n, int64_t margin = 0) {
            x = workspace + size + margin;
            size += round_up(n, 16);
        };
        for (T** x : {&content_q, &position_q, &content_out, &factor}) take(*x, block);
        for (T** x : {&key_t, backward ? &value_t : &value}) take(*x, keys);
        take(r_t, positions);
        take(scores, plan.scores, plan.margin());
        if (backward) {
            for (T** x : {&key, &d_key, &d_value}) take(*x, keys);
            for (T** x : {&d_out, &position_out}) take(*x, block);
            take(r, positions);
            take(d_scores, plan.scores, plan.margin());
        }
        return size;
    }

public:
    Worker(const RelAttention& p, bool backward, void* workspace, int64_t thread = 0) : p(p), plan(p, backward ? 2 : 1) {
        T* start = static_cast<T*>(workspace);
        const int64_t size = cut(start, backward);
        cut(start + thread * size, backward);
    }
    static int64_t workspace(const RelAttention& p, bool backward) {
        Worker worker(p, backward, nullptr);
        return worker.cut(nullptr, backward);
    }

    // The sequences of a part, for one head.
    void forward(int64_t part, int64_t h, const Heads& out, T* lse) {
        pack_positions(h, false);
        for (int64_t b = plan.first_sequence(part); b < plan.first_sequence(part + 1); ++b) {
            T* row_lse = lse + (b * p.heads + h) * p.queries;
            for (int64_t i = 0; i < p.queries; ++i)
                if (i < plan.first_row() || i >= plan.end_row(b)) {
                    row_lse[i] = -std::numeric_limits<T>::infinity();
                    memset(at<X>(out, b, h, i), 0, p.width * sizeof(X));
                }
            pack_keys(p.k_memory, p.k, b, h, nullptr, key_t);
            pack_keys(p.v_memory, p.v, b, h, value, nullptr);
            for (int64_t i = plan.first_row(); i < plan.end_row(b); i += plan.rows)
                forward_block(plan.block(b, i), b, h, out, row_lse + i);
        }
    }

    // The same; dr (positions, width) and d_biases (2, width) are this unit's.
    void backward(int64_t part, int64_t h, const Heads& out, const T* lse, const Heads& grad, const Heads& dq, const Heads* d,
                  T* dr, T* d_biases) {
        pack_positions(h, true);
        memset(dr, 0, p.positions * plan.width * sizeof(T));
        memset(d_biases, 0, 2 * plan.width * sizeof(T));
        for (int64_t b = plan.first_sequence(part); b < plan.first_sequence(part + 1); ++b) {
            for (int64_t i = 0; i < p.queries; ++i)
                if (i < plan.first_row() || i >= plan.end_row(b)) memset(at<X>(dq, b, h, i), 0, p.width * sizeof(X));
            pack_keys(p.k_memory, p.k, b, h, key, key_t);
            pack_keys(p.v_memory, p.v, b, h, nullptr, value_t);
            for (T* x : {d_key, d_value}) memset(x, 0, plan.n_keys * plan.width * sizeof(T));
            for (int64_t i = plan.first_row(); i < plan.end_row(b); i += plan.rows)
                backward_block(plan.block(b, i), b, h, out, lse, grad, dq, dr, d_biases);
            unpack(d_key, d[0], b, h, p.keys, p.memory);
            unpack(d_value, d[1], b, h, p.keys, p.memory);
            unpack(d_key, d[2], b, h, p.memory, 0);
            unpack(d_value, d[3], b, h, p.memory, 0);
        }
    }

    // The weights of each key, summed over the queries; lse may be that of a softmax over more keys than these.
    void receive(int64_t part, int64_t h, const T* lse, T* received) {
        pack_positions(h, false);
        for (int64_t b = plan.first_sequence(part); b < plan.first_sequence(part + 1); ++b) {
            T* sums = received + (b * p.heads + h) * plan.n_keys;
            memset(sums, 0, plan.n_keys * sizeof(T));
            pack_keys(p.k_memory, p.k, b, h, nullptr, key_t);
            for (int64_t i = plan.first_row(); i < plan.end_row(b); i += plan.rows) {
                const Block x = plan.block(b, i);
                multiply_scores(x, b, h);
                for (int64_t a = 0; a < x.rows; ++a) {
                    const Span s = plan.span(x, a);
                    const T *row = scores + a * x.pitch, peak = lse[(b * p.heads + h) * p.queries + i + a];
#pragma omp simd
                    for (int64_t c = s.begin; c < s.end; ++c) sums[x.key0 + c] += exponential(row[c] * T(p.scale) - peak);
                }
            }
        }
    }

private:
    void forward_block(const Block& x, int64_t b, int64_t h, const Heads& out, T* lse) {
        multiply_scores(x, b, h);
        for (int64_t a = 0; a < x.rows; ++a) {
            const Span s = plan.span(x, a);
            T* row = scores + a * x.pitch;
            factor[a] = softmax_row(row, s, T(p.scale), lse[a]) / T(1 - p.dropout_p);
            if (p.dropout_p > 0) {
                mark_dropped(row, s, uint64_t(*p.seed), offset(x, b, h, a), float(p.dropout_p));
#pragma omp simd
                for (int64_t c = s.begin; c < s.end; ++c) row[c] = row[c] < 0 ? 0 : row[c];
            }
            zero_invisible(row, s);
        }
        multiply_by_keys(x, scores, value, content_out);
        for (int64_t a = 0; a < x.rows; ++a) {
            X* to = at<X>(out, b, h, x.begin + a);
            for (int64_t d = 0; d < p.width; ++d) to[d] = store<X>(content_out[a * plan.width + d] * factor[a]);
        }
    }

    void backward_block(const Block& x, int64_t b, int64_t h, const Heads& out, const T* whole_lse, const Heads& grad,
                        const Heads& dq, T* dr, T* d_biases) {
        const T kept = T(1 / (1 - p.dropout_p));
        multiply_scores(x, b, h);
        pack(grad, b, h, x.begin, x.rows, d_out);
        multiply(x.rows, x.columns(), p.width, d_out, plan.width, 1, columns(value_t, x.key0), d_scores, x.pitch, false);
        for (int64_t a = 0; a < x.rows; ++a) {
            const Span s = plan.span(x, a);
            T *row = scores + a * x.pitch, *d_row = d_scores + a * x.pitch;
            T lse, delta;  // not those saved, whose rounding would be an error common to the row, if these are all keys
            T once = softmax_row(row, s, T(p.scale), lse);
            if (whole_lse) {
                once *= std::exp(lse - whole_lse[(b * p.heads + h) * p.queries + x.begin + a]);
                delta = dot(at<X>(out, b, h, x.begin + a), d_out + a * plan.width);
            }
            if (p.dropout_p > 0) mark_dropped(row, s, uint64_t(*p.seed), offset(x, b, h, a), float(p.dropout_p));
            differentiate_row(row, d_row, s, once, kept, T(p.scale), whole_lse ? &delta : nullptr);
            zero_invisible(row, s);
            zero_invisible(d_row, s);
        }
        const int64_t n_keys = x.end_key - x.first_key, key = x.first_key - x.key0;
        const int64_t n_positions = x.end_position - x.first_position;
        const T* d_positions = d_scores + x.first_position + x.shift;  // with a row pitch one larger
        // dv += W^T grad, dk += dS^T content_q, dr += dS^T position_q
        multiply(n_keys, plan.width, x.rows, scores + key, 1, x.pitch, rows(d_out), row(d_value, x.first_key), plan.width, true);
        multiply(n_keys, plan.width, x.rows, d_scores + key, 1, x.pitch, rows(content_q), row(d_key, x.first_key), plan.width, true);
        multiply(n_positions, plan.width, x.rows, d_positions, 1, x.pitch + 1, rows(position_q), row(dr, x.first_position),
                 plan.width, true);
        // dq = dS k + dS r
        multiply_by_keys(x, d_scores, this->key, content_out);
        const bool far = sum_far(x);
        if (far) {  // of each query the sum of dS is what row 0 of r gets
            multiply(1, plan.width, x.rows, factor, 0, 1, rows(position_q), dr, plan.width, true);
            multiply(x.rows, plan.width, 1, factor, 1, 0, rows(r), position_out, plan.width, false);
        }
        multiply(x.rows, plan.width, n_positions, d_positions, x.pitch + 1, 1, rows(row(r, x.first_position)), position_out,
                 plan.width, far);
        for (int64_t a = 0; a < x.rows; ++a) {
            X* to = at<X>(dq, b, h, x.begin + a);
            for (int64_t d = 0; d < p.width; ++d)
                to[d] = store<X>(content_out[a * plan.width + d] + position_out[a * plan.width + d]);
        }
        add_rows(x.rows, content_out, d_biases);
        add_rows(x.rows, position_out, d_biases + plan.width);
    }

    T dot(const X* x, const T* y) const {
        T sum = 0;
        for (int64_t d = 0; d < p.width; ++d) sum += load(x[d]) * y[d];
        return sum;
    }

    // to += the sum of the rows of x, which is left in its first one: one rounding into `to` for each block
    void add_rows(int64_t n, T* x, T* to) const {
        for (int64_t a = 1; a < n; ++a)
            for (int64_t d = 0; d < plan.width; ++d) x[d] += x[a * plan.width + d];
        for (int64_t d = 0; d < plan.width; ++d) to[d] += x[d];
    }

    // content_q k^T + position_q r^T of the block's rows, as far as they are visible
    void multiply_scores(const Block& x, int64_t b, int64_t h) {
        pack(p.q, b, h, x.begin, x.rows, content_q);
        const X* content = static_cast<const X*>(p.content_bias) + h * p.width;
        const X* position = static_cast<const X*>(p.position_bias) + h * p.width;
        for (int64_t a = 0; a < x.rows; ++a)
            for (int64_t d = 0; d < p.width; ++d) {
                T q = content_q[a * plan.width + d];
                content_q[a * plan.width + d] = q + load(content[d]);
                position_q[a * plan.width + d] = q + load(position[d]);
            }
        multiply(x.rows, x.columns(), p.width, content_q, plan.width, 1, columns(key_t, x.key0), scores, x.pitch, false);
        multiply(x.rows, x.end_position - x.position0, p.width, position_q, plan.width, 1, columns(r_t, x.position0),
                 scores + x.position0 + x.shift, x.pitch + 1, true);
        for (int64_t a = 0; a < x.rows; ++a) {
            const Span s = plan.span(x, a);
            if (s.begin == s.near_begin) continue;
            const T far = dot(at<X>(p.r, 0, h, 0), row(position_q, a));
#pragma omp simd
            for (int64_t c = s.begin; c < s.near_begin; ++c) scores[a * x.pitch + c] += far;
        }
    }

    // factor = the sum of each row's gradients of scores beyond the clamp; whether there are any
    bool sum_far(const Block& x) {
        bool any = false;
        for (int64_t a = 0; a < x.rows; ++a) {
            const Span s = plan.span(x, a);
            const T* row = d_scores + a * x.pitch;
            T sum = 0;
#pragma omp simd reduction(+ : sum)
            for (int64_t c = s.begin; c < s.near_begin; ++c) sum += row[c];
            factor[a] = sum;
            any |= s.begin < s.near_begin;
        }
        return any;
    }

    // to = x_rows keys, over the keys that the block sees
    void multiply_by_keys(const Block& x, const T* from, T* keys, T* to) {
        multiply(x.rows, plan.width, x.end_key - x.first_key, from + x.first_key - x.key0, x.pitch, 1,
                 rows(row(keys, x.first_key)), to, plan.width, false);
    }

    T* row(T* x, int64_t i) const { return x + i * plan.width; }
    Factor<T> rows(const T* x) const { return {x, plan.width, panel<T>}; }
    Factor<T> columns(const T* x, int64_t first) const { return {x + first * p.width, panel<T>, panel<T> * p.width}; }

    // Of the random number that belongs to a row's column 0.
    uint64_t offset(const Block& x, int64_t b, int64_t h, int64_t a) const {
        return uint64_t(((b * p.heads + h) * p.queries + x.begin + a) * plan.n_keys + x.key0);
    }

    // (n, width), padded with zeros
    void pack(const Heads& x, int64_t b, int64_t h, int64_t begin, int64_t n, T* to) const {
        for (int64_t t = 0; t < n; ++t) {
            const X* from = at<X>(x, b, h, begin + t);
            for (int64_t d = 0; d < p.width; ++d) to[t * plan.width + d] = load(from[d]);
            for (int64_t d = p.width; d < plan.width; ++d) to[t * plan.width + d] = 0;
        }
    }

    // (D, n) in panels of columns, from column `first` on
    void pack_transposed(const Heads& x, int64_t b, int64_t h, int64_t n, int64_t first, T* to) const {
        for (int64_t t = 0; t < n; ++t) {
            const X* from = at<X>(x, b, h, t);
            const int64_t c = first + t;
            T* column = to + c / panel<T> * panel<T> * p.width + c % panel<T>;
            for (int64_t d = 0; d < p.width; ++d) column[d * panel<T>] = load(from[d]);
        }
    }

    void pack_keys(const Heads& memory, const Heads& segment, int64_t b, int64_t h, T* rows, T* transposed) const {
        const int64_t n = plan.real_keys(b) - p.memory;
        if (rows) {
            pack(memory, b, h, 0, p.memory, rows);
            pack(segment, b, h, 0, n, rows + p.memory * plan.width);
        }
        if (transposed) {
            pack_transposed(memory, b, h, p.memory, 0, transposed);
            pack_transposed(segment, b, h, n, p.memory, transposed);
        }
    }

    void pack_positions(int64_t h, bool backward) const {
        pack_transposed(p.r, 0, h, plan.used_positions, 0, r_t);
        if (backward) pack(p.r, 0, h, 0, plan.used_positions, r);
    }

    void unpack(const T* from, const Heads& x, int64_t b, int64_t h, int64_t n, int64_t first) const {
        for (int64_t t = 0; t < n; ++t) {
            X* to = at<X>(x, b, h, t);
            for (int64_t d = 0; d < p.width; ++d) to[d] = store<X>(from[(first + t) * plan.width + d]);
        }
    }
};

// Calls f(worker, part, head) for each unit of work.
template <class X, class F>
void for_each_unit(const RelAttention& p, bool backward, int64_t threads, void* workspace, F&& f) {
    const int64_t count = Plan<acc_t<X>>(p, 1).parts() * p.heads;
#pragma omp parallel num_threads(threads)
    {
        Worker<X> worker(p, backward, workspace, omp_get_thread_num());
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < count; ++i) f(worker, i / p.heads, i % p.heads);
    }
}

}  // namespace

RelAttentionCut rel_attention_cut(const RelAttention& p, bool backward) {
    const int64_t parts = Plan<float>(p, 1).parts(), bytes = p.batch * p.heads * p.queries * (p.memory + p.keys) * 8;
    RelAttentionCut cut{max(1, min(threads_for(bytes), parts * p.heads)), 0, parts};
    dispatch(p.dtype, [&](auto storage) { cut.workspace = Worker<decltype(storage)>::workspace(p, backward); });
    return cut;
}

void rel_attention_forward(const RelAttention& p, int64_t threads, void* workspace, Heads out, void* lse) {
    dispatch(p.dtype, [&](auto storage) {
        using X = decltype(storage);
        for_each_unit<X>(p, false, threads, workspace, [&](Worker<X>& worker, int64_t part, int64_t h) {
            worker.forward(part, h, out, static_cast<acc_t<X>*>(lse));
        });
    });
}

void rel_attention_received(const RelAttention& p, int64_t threads, void* workspace, const void* lse, void* received) {
    dispatch(p.dtype, [&](auto storage) {
        using X = decltype(storage);
        using T = acc_t<X>;
        for_each_unit<X>(p, false, threads, workspace, [&](Worker<X>& worker, int64_t part, int64_t h) {
            worker.receive(part, h, static_cast<const T*>(lse), static_cast<T*>(received));
        });
    });
}

void rel_attention_backward(const RelAttention& p, int64_t threads, void* workspace, Heads out, const void* lse, Heads grad,
                            Heads dq, const Heads* d_keys_values, void* dr, void* d_biases) {
    dispatch(p.dtype, [&](auto storage) {
        using X = decltype(storage);
        using T = acc_t<X>;
        const int64_t width = round_up(p.width, 16);
        for_each_unit<X>(p, true, threads, workspace, [&](Worker<X>& worker, int64_t part, int64_t h) {
            const int64_t unit = (part * p.heads + h) * width;
            worker.backward(part, h, out, static_cast<const T*>(lse), grad, dq, d_keys_values, static_cast<T*>(dr) + unit * p.positions,
                            static_cast<T*>(d_biases) + unit * 2);
        });
    });
}

}  // namespace par_xl::PAR_XL_ISA
