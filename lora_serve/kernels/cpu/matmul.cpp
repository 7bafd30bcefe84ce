// Linear layers: y = x Wᵀ + b, with packed weights (panels.h describes the layout).
//
// Weights are read from memory once and in order, whatever the number of rows. Every output is summed over the inputs
// in ascending order: a row's bits depend neither on the other rows, nor on the threads, nor on how the work is split.
#include <algorithm>
#include <atomic>

#include "byte_dots.h"
#include "calls.h"
#include "panels.h"

namespace {

constexpr size_t DEPTH = 1024;   // lanes at a time, so that many rows stay in the cache; whole groups of int4
constexpr int64_t FEW = TILE;    // up to so many rows are multiplied at once
constexpr int64_t LEAST_SHARE = 1 << 16;  // bytes of weights that a thread takes at a time
constexpr size_t AHEAD = 4096;   // bytes of a panel that are prefetched ahead
constexpr size_t stretch_of(int64_t kind) { return sizeof(Head) + shared_of(kind); }  // bytes of a row's group

INLINE U load_lanes(const char* p) {
    U u;
    memcpy(&u, p, sizeof u);
    return u;
}
INLINE U lane_of(const char* p) {  // one lane, broadcast
    uint32_t lane;
    memcpy(&lane, p, sizeof lane);
    return U{} + lane;
}

// Prefetches lanes of a panel: into the second-level cache, except where enough arithmetic lies between loads for the
// first-level one. (Measured on Zen 4.)
template <bool NEAR> INLINE void ask_for(const char* p, size_t lanes) {
    for (size_t k = 0; k < lanes * COLUMNS * 4; k += 64)
        if constexpr (NEAR) __builtin_prefetch(p + AHEAD / 2 + k, 0, 3);
        else __builtin_prefetch(p + AHEAD + k, 0, 2);
}

// acc[S][T] += one group (of inputs that share a step) of T quantised rows, `next` bytes apart, @ S halves (sides) of a
// panel's outputs, from `side` on
template <int64_t K, int S, int T, class A> INLINE void pass_stretch(const char* x, const char* at, int side, A acc) {
    constexpr size_t next = stretch_of(K), width = inputs_of_lane(K), lanes = shared_of(K) / width;
    asm volatile("" : "+r"(x));  // else the sides share broadcasts, more of them than registers
    I whole[S][T];
    UNROLL
    for (int t = 0; t < T; t++)
        UNROLL
        for (int s = 0; s < S; s++) whole[s][t] = K == INT8 ? (I)lane_of(x + t * next) : I{};
    UNROLL
    for (size_t i = 0; i < lanes; i++) {
        const char* four = x + sizeof(Head) + i * width;
        UNROLL
        for (int s = 0; s < S; s++) {
            U w = load_lanes(at + (2 * i + side + s) * W * 4);
            const char* own = four;
            if constexpr (K == INT4) {
                U low = w & 0x0f0f0f0f;
                UNROLL
                for (int t = 0; t < T; t++) whole[s][t] = dot_nibbles(whole[s][t], low, lane_of(own + t * next));
                w = (w >> 4) & 0x0f0f0f0f;
                own += 4;
                UNROLL
                for (int t = 0; t < T; t++) whole[s][t] = dot_nibbles(whole[s][t], w, lane_of(own + t * next));
            } else {
                w = int8_weights(w);
                UNROLL
                for (int t = 0; t < T; t++) whole[s][t] = dot_bytes(whole[s][t], w, lane_of(own + t * next));
            }
        }
    }
    UNROLL
    for (int s = 0; s < S; s++) {
        V scale{}, zero{};
        if constexpr (K == INT4) {
            H levels;
            memcpy(&levels, at + GROUP_LEVELS + (side + s) * W * 2, sizeof levels);
            scale = scale_of_levels(widened(levels));
            zero = zero_of_levels(widened(levels)) * scale;
        }
        UNROLL
        for (int t = 0; t < T; t++) {
            const Head& head = *(const Head*)(x + t * next);
            if constexpr (K == INT4) {
                acc[s][t] += to_float(group_sum(whole[s][t])) * (scale * head.step);
                acc[s][t] -= zero * head.eighth;
            } else {
                acc[s][t] += to_float(whole[s][t]) * head.step;
            }
        }
    }
}

// acc[2][T] += one lane of T rows, `ld` bytes apart, @ both halves (sides) of a panel's outputs. Each number of a row is
// broadcast once, for both sides, and then not kept: there are no registers for them.
template <int64_t K, int T> INLINE void multiply_lane(const char* rows, size_t ld, size_t lane, const char* at, V (*acc)[T]) {
    U w[2] = {load_lanes(at), load_lanes(at + W * 4)};
    constexpr int NUMBERS = K == B16 || K == F16 ? 2 : 1;
    UNROLL
    for (int i = 0; i < NUMBERS; i++) {
        V wide[2] = {(V)w[0], (V)w[1]};
        if constexpr (NUMBERS == 2) {
            using Two = std::conditional_t<K == B16, Bf16, Fp16>;
            for (V& v : wide) v = i ? second_of_pair<Two>((U)v) : first_of_pair<Two>((U)v);
        }
        UNROLL
        for (int t = 0; t < T; t++) {
            const char* x = rows + t * ld + (NUMBERS * lane + i) * 4;
            UNROLL
            for (int side = 0; side < 2; side++)
                if constexpr (K == DOT) acc[side][t] = dot_pair(acc[side][t], lane_of(x), w[side]);
                else acc[side][t] += wide[side] * *(const float*)x;
        }
    }
}

// sum[T, P * COLUMNS] (+)= rows x [T, from : to] (in lanes) @ the same lanes of P panels
template <int64_t K, int T, int P>
void multiply(const char* rows, size_t ld, const char* panel, size_t panel_bytes, size_t from, size_t to, float* sum,
              size_t lds, bool add) {
    V acc[P][2][T];
    UNROLL
    for (int t = 0; t < T; t++)
        UNROLL
        for (int c = 0; c < 2 * P; c++) acc[c / 2][c % 2][t] = add ? load(sum + t * lds + c * W) : V{};
    constexpr bool small = K == INT4 || K == INT8;
    constexpr size_t STEP = small ? shared_of(K) / inputs_of_lane(K) : 1;
    for (size_t k = from; k < to; k += STEP) {
        const char* x = rows + k / STEP * TILE * stretch_of(K);
        UNROLL
        for (int p = 0; p < P; p++) {
            const char* at = panel + p * panel_bytes + lane_at(K, k);
            ask_for<K == INT4 && (T > 4)>(at, STEP);
            if constexpr (small) {
                constexpr int S = T <= REGISTERS / (K == INT4 ? 16 : 8) ? 2 : 1;  // halves at once, as registers allow
                UNROLL
                for (int side = 0; side < 2; side += S) pass_stretch<K, S, T>(x, at, side, acc[p] + side);
            } else {
                multiply_lane<K, T>(rows, ld, k, at, acc[p]);
            }
        }
    }
    UNROLL
    for (int t = 0; t < T; t++)
        UNROLL
        for (int c = 0; c < 2 * P; c++) store(sum + t * lds + c * W, acc[c / 2][c % 2][t]);
}

template <class F> INLINE void with_kind(int64_t kind, F f) {
#define KIND(k) case k: f(std::integral_constant<int64_t, k>{}); break;
    switch (kind) { KIND(F32) KIND(B16) KIND(F16) KIND(INT8) KIND(INT4) KIND(DOT) }
#undef KIND
}

struct Span { int64_t output, from, to; };  // panels from..to of one output

struct Work {
    const LinearCall& call;
    size_t lanes, bytes;  // lanes of an output's weights; bytes of a panel
    size_t ld;            // bytes of a prepared row, with a whole vector of padding
    const char* rows;     // x, prepared for the kind

    explicit Work(const LinearCall& all)
        : call(all), lanes(lanes_of(all.kind, all.in)), bytes(lane_at(all.kind, lanes)), rows(nullptr) {
        size_t shared = shared_of(all.kind);
        size_t size = all.kind == INT4 || all.kind == INT8 ? ((size_t)all.in + shared - 1) / shared * stretch_of(all.kind)
                      : all.kind == DOT                    ? lanes * 4
                                                           : lanes * inputs_of_lane(all.kind) * 4;
        ld = padded(size / 4) * 4 + W * 4;
    }

    // Converts one row for the kind: to floats, bf16 pairs, or groups of bytes with a step each; padded with zeros. A
    // tile's quantised rows are interleaved group by group, so that the distance from row to row is constant.
    void prepare(int64_t row, char* all) const {
        size_t in = (size_t)call.in;
        char* to = all + (size_t)row * ld;
        with_type(call.type, [&](auto* type) {
            using T = std::remove_pointer_t<decltype(type)>;
            const T* x = (const T*)call.x + row * call.stride;
            if (call.kind == DOT) {
                Bf16* pairs = (Bf16*)to;
                for (size_t i = 0; i < in; i += W) store_some(pairs + i, load_some(x + i, in - i), in - i);
                if (in % 2) pairs[in] = Bf16{0};
            } else if (call.kind == INT4 || call.kind == INT8) {
                size_t shared = shared_of(call.kind), next = stretch_of(call.kind);
                to = all + (size_t)(row / TILE * TILE) * ld + (size_t)(row % TILE) * next;
                for (size_t i = 0; i < in; i += shared, to += TILE * next) stretch(x + i, std::min(shared, in - i), to);
            } else {
                widen_row(x, in, (float*)to);
            }
        });
    }
    template <class T> void stretch(const T* x, size_t n, char* to) const {
        if (n < shared_of(call.kind)) memset(to, 0, stretch_of(call.kind));
        Head head{{0}, step_of(x, n)};
        int32_t sum = round_row(x, n, head.step, 0, to + sizeof head);
        if (call.kind == INT4) head.eighth = (float)sum * (head.step / 8);
        else if (!SIGNED) head.start = -OFFSET * sum;
        memcpy(to, &head, sizeof head);
    }

    // Writes y[first : first + count, columns of one panel] from sums: scale, bias, rounding to the rows' type.
    void finish(const LinearOutput& o, int64_t panel, int64_t first, int64_t count, const float* sum, size_t lds) const {
        int64_t column = panel * (int64_t)COLUMNS, n = std::min<int64_t>(COLUMNS, o.out - column);
        with_type(call.type, [&](auto* type) {
            using T = std::remove_pointer_t<decltype(type)>;
            const T* bias = o.bias ? (const T*)o.bias + column : nullptr;
            for (int64_t t = 0; t < count; t++) {
                T* y = (T*)o.y + (first + t) * o.stride + column;
                for (int64_t c = 0; c < n; c += W) {
                    int64_t m = std::min<int64_t>(W, n - c);
                    V v = load(sum + t * lds + c);
                    if (call.kind == INT8 || call.kind == INT4) v *= load(o.scale + column + c);
                    if (bias) v += load_some(bias + c, (size_t)m);
                    store_some(y + c, v, (size_t)m);
                }
            }
        });
    }

    // Few rows: all at once, as many panels together as there are registers for.
    void few(const Span& span) const {
        const LinearOutput& o = call.output[span.output];
        float sum[FEW * 8 * W];
        with_kind(call.kind, [&](auto kind) {
            constexpr int64_t K = decltype(kind)::value;
            with_rows((int)call.rows, [&](auto t) {
                constexpr int T = decltype(t)::value;
                constexpr int P = K == INT8 ? 1 : T <= REGISTERS / 16 ? 4 : T <= REGISTERS / 8 ? 2 : 1;
                int64_t panel = span.from;
                for (; panel + P <= span.to; panel += P) {
                    multiply<K, T, P>(rows, ld, o.weight + panel * bytes, bytes, 0, lanes, sum, P * COLUMNS, false);
                    for (int p = 0; p < P; p++) finish(o, panel + p, 0, T, sum + p * COLUMNS, P * COLUMNS);
                }
                for (; panel < span.to; panel++) {
                    multiply<K, T, 1>(rows, ld, o.weight + panel * bytes, bytes, 0, lanes, sum, COLUMNS, false);
                    finish(o, panel, 0, T, sum, COLUMNS);
                }
            });
        });
    }

    // Many rows: tile by tile, DEPTH lanes of inputs at a time; sums holds all rows of the span's panels.
    void many(const Span& span, float* sums) const {
        const LinearOutput& o = call.output[span.output];
        size_t all = (size_t)call.rows;
        bool once = lanes <= DEPTH;
        for (size_t k = 0; k < lanes; k += DEPTH) {
            size_t to = std::min(lanes, k + DEPTH);
            for (int64_t panel = span.from; panel < span.to; panel++) {
                float* sum = once ? sums : sums + (size_t)(panel - span.from) * all * COLUMNS;
                with_kind(call.kind, [&](auto kind) {
                    for (size_t row = 0; row < all; row += TILE)
                        with_rows((int)std::min<size_t>(TILE, all - row), [&](auto t) {
                            multiply<decltype(kind)::value, decltype(t)::value, 1>(
                                rows + row * ld, ld, o.weight + panel * bytes, bytes, k, to, sum + row * COLUMNS,
                                COLUMNS, k > 0);
                        });
                });
                if (to == lanes) finish(o, panel, 0, call.rows, sum, COLUMNS);
            }
        }
    }
};

// Distributes panels to threads in shares that get smaller: long runs of memory first, and at the end so little each
// that no thread waits long for one that was preempted.
struct Shares {
    int64_t all, least;
    std::atomic<int64_t> given{0};

    bool next(int threads, int64_t& from, int64_t& to) {
        from = given.load(std::memory_order_relaxed);
        do {
            if (from >= all) return false;
            int64_t left = all - from;
            to = from + (threads == 1 ? left : std::min(left, std::max(least, left / (2 * threads))));
        } while (!given.compare_exchange_weak(from, to, std::memory_order_relaxed));
        return true;
    }
};

}  // namespace

extern "C" int64_t lora_columns() { return (int64_t)COLUMNS; }

// Whether this CPU has a dot product instruction for pairs of bf16.
extern "C" int64_t lora_has_dot() {
#if defined(__AVX512BF16__) || defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
    return 1;
#else
    return 0;
#endif
}

extern "C" int64_t lora_linear(const LinearCall* call) {
    check_memory(call, (int64_t)sizeof *call);
    check_memory(call, (int64_t)sizeof *call + call->outputs * (int64_t)sizeof(LinearOutput));
    int64_t each = bytes_of(call->type);
    check_rows(call->x, call->rows, call->stride * each, call->in * each);
    for (int64_t i = 0; i < call->outputs; i++) {
        const LinearOutput& o = call->output[i];
        check_memory(o.weight, packed_bytes(call->kind, o.out, call->in));
        if (call->kind == INT8 || call->kind == INT4) check_memory(o.scale, scales_bytes(o.out));
        if (o.bias) check_memory(o.bias, o.out * each);
        check_rows(o.y, call->rows, o.stride * each, o.out * each);
    }
    static thread_local std::vector<float> shared;
    int64_t all = 0;
    for (int64_t i = 0; i < call->outputs; i++) all += (int64_t)panels_of(call->output[i].out);
    if (all == 0 || call->rows == 0) return 0;
    Work work(*call);
    size_t count = (size_t)call->rows, prepared = (count + TILE - 1) / TILE * TILE * work.ld / 4;
    bool own = call->rows <= FEW;  // with few rows, every thread prepares them all for itself, which saves a barrier
    float* common = own ? nullptr : scratch(shared, prepared);
    constexpr int64_t SMALL = 1 << 17;  // products; with fewer, one thread is done before another is awake
    int wanted = all * (int64_t)COLUMNS * call->in * call->rows < SMALL ? 1 : (int)call->threads;
    Shares shares{all, std::max<int64_t>(1, LEAST_SHARE / (int64_t)work.bytes)};
    parallel(wanted, [&](int thread, int threads) {
        static thread_local std::vector<float> mine;
        size_t sums = count * COLUMNS * (work.lanes <= DEPTH ? 1 : (size_t)((all + threads - 1) / threads) + 1);
        float* room = scratch(mine, own ? prepared : sums);
        char* rows = (char*)(own ? room : common);
        Work part = work;
        part.rows = rows;
        size_t from = own ? 0 : count * thread / threads, until = own ? count : count * (thread + 1) / threads;
        for (size_t row = from; row < until; row++) part.prepare((int64_t)row, rows);
        if (!own && threads > 1) barrier();
        for (int64_t lo = 0, hi = 0; shares.next(threads, lo, hi);) {
            int64_t at = 0;
            for (int64_t i = 0; i < call->outputs; i++) {
                int64_t n = (int64_t)panels_of(call->output[i].out);
                Span span{i, std::max<int64_t>(0, lo - at), std::min(n, hi - at)};
                at += n;
                if (span.from >= span.to) continue;
                if (own) part.few(span);
                else part.many(span, room);
            }
        }
    });
    return 0;
}

// Each expert's layer over its own rows; those behind the last expert's become zero. Returns 0, or 1 + index of the first
// expert whose rows end before they begin or beyond the batch (then nothing was written).
extern "C" int64_t lora_grouped_linear(const GroupedLinearCall* call) {
    check_memory(call, (int64_t)sizeof *call);
    check_memory(call->end, call->experts * 8);
    int64_t each = bytes_of(call->type), scales = scales_bytes(call->out) / 4, last = 0;
    for (int64_t e = 0; e < call->experts; last = call->end[e++])
        if (call->end[e] < last || call->end[e] > call->rows) return e + 1;
    check_memory(call->y, call->rows * call->out * each);
    alignas(LinearCall) char memory[sizeof(LinearCall) + sizeof(LinearOutput)];  // of a call with one output
    LinearCall& own = *(LinearCall*)memory;
    for (int64_t e = 0, first = 0; e < call->experts; first = call->end[e++]) {
        if (call->end[e] == first) continue;
        own.x = call->x + first * call->stride * each, own.stride = call->stride;
        own.rows = call->end[e] - first, own.in = call->in, own.outputs = 1;
        own.type = call->type, own.threads = call->threads, own.kind = call->kind;
        own.output[0] = {call->weight + e * call->weight_stride, call->scale ? call->scale + e * scales : nullptr,
                         call->bias ? call->bias + e * call->out * each : nullptr,
                         call->y + first * call->out * each, call->out, call->out};
        lora_linear(&own);
    }
    memset(call->y + last * call->out * each, 0, (size_t)((call->rows - last) * call->out * each));
    return 0;
}
