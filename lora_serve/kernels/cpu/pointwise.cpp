// Norms, gated activations, rotary embeddings and sums, each in one pass over its rows; and the replay of recorded
// calls.
#include <algorithm>
#include <cmath>

#include "calls.h"
#include "simd.h"

namespace {

enum Activation : int64_t { SILU, GELU_TANH };

// The value rounded to T.
template <class T> INLINE V kept(V v) {
    T lanes[W];
    store(lanes, v);
    return load(lanes);
}

INLINE V logistic(V x) {
    V most = V{} + 126.0f, power = x * -LOG2E;
    return 1.0f / (1.0f + power_of_two(power < most ? power : most));
}

INLINE V activated(V x, int64_t kind) {
    if (kind == SILU) return x * logistic(x);
    V inner = 0.7978845608f * (x + 0.044715f * x * x * x);
    return x * logistic(2.0f * inner);  // (1 + tanh u) / 2 is the logistic function of 2 u
}

constexpr int64_t ALONE = 1 << 15;  // numbers that one thread processes before another is awake

template <class F> void over_rows(int64_t rows, int64_t width, int64_t threads, F f) {
    parallel(rows * width < ALONE ? 1 : (int)threads, [&](int thread, int all) {
        for (int64_t row = rows * thread / all; row < rows * (thread + 1) / all; row++) f(row);
    });
}

}  // namespace

extern "C" int64_t lora_rms_norm(const NormCall* call) {
    int64_t each = bytes_of(call->type);
    check_memory(call, sizeof *call);
    check_memory(call->weight, call->width * bytes_of(call->weight_type));
    check_rows(call->x, call->rows, call->x_stride * each, call->width * each);
    check_memory(call->y, call->rows * call->width * each);
    size_t n = (size_t)call->width;
    with_type(call->type, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        with_type(call->weight_type, [&](auto* other) {
            using S = std::remove_pointer_t<decltype(other)>;
            const S* weight = (const S*)call->weight;
            over_rows(call->rows, call->width, call->threads, [&](int64_t row) {
                const T* x = (const T*)call->x + row * call->x_stride;
                T* y = (T*)call->y + row * call->width;
                V squares{};
                for (size_t i = 0; i < n; i += W) {
                    V v = load_some(x + i, n - i);
                    squares += v * v;
                }
                float factor = 1.0f / std::sqrt(total(squares) / (float)n + (float)call->eps);
                for (size_t i = 0; i < n; i += W) {
                    V v = load_some(x + i, n - i) * factor, w = load_some(weight + i, n - i);
                    v = call->plus_one ? v * (1.0f + w) : kept<T>(v) * w;
                    store_some(y + i, v, n - i);
                }
            });
        });
    });
    return 0;
}

extern "C" int64_t lora_gated(const GatedCall* call) {
    int64_t each = bytes_of(call->type);
    check_memory(call, sizeof *call);
    check_rows(call->gate, call->rows, call->gate_stride * each, call->width * each);
    check_rows(call->up, call->rows, call->up_stride * each, call->width * each);
    check_memory(call->y, call->rows * call->width * each);
    size_t n = (size_t)call->width;
    with_type(call->type, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        over_rows(call->rows, call->width, call->threads, [&](int64_t row) {
            const T* gate = (const T*)call->gate + row * call->gate_stride;
            const T* up = (const T*)call->up + row * call->up_stride;
            T* y = (T*)call->y + row * call->width;
            for (size_t i = 0; i < n; i += W) {
                V v = kept<T>(activated(load_some(gate + i, n - i), call->activation));
                store_some(y + i, v * load_some(up + i, n - i), n - i);
            }
        });
    });
    return 0;
}

// Rotates the halves a and b of each head: (a, b) -> (a cos - b sin, b cos' + a sin').
extern "C" int64_t lora_rope(const RopeCall* call) {
    check_memory(call, sizeof *call);
    int64_t each = bytes_of(call->type), entry = bytes_of(call->table_type), row = call->dim * each;
    for (const Heads& from : {call->q, call->k})
        for (int64_t h = 0; h < from.heads; h++)
            check_rows((const char*)from.data + h * from.head * each, call->tokens, from.token * each, row);
    check_memory(call->q_out, call->tokens * call->q.heads * row);
    check_memory(call->k_out, call->tokens * call->k.heads * row);
    for (const char* table : {call->cosine, call->sine})
        check_rows(table, call->tokens, call->table_stride * entry, call->dim * entry);
    size_t half = (size_t)call->dim / 2;
    int64_t heads = call->q.heads + call->k.heads;
    with_type(call->type, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        with_type(call->table_type, [&](auto* other) {
            using S = std::remove_pointer_t<decltype(other)>;
            over_rows(call->tokens, heads * call->dim, call->threads, [&](int64_t token) {
                const S* cosine = (const S*)call->cosine + token * call->table_stride;
                const S* sine = (const S*)call->sine + token * call->table_stride;
                for (int64_t h = 0; h < heads; h++) {
                    bool is_q = h < call->q.heads;
                    const Heads& from = is_q ? call->q : call->k;
                    int64_t own = is_q ? h : h - call->q.heads;
                    const T* x = (const T*)from.data + token * from.token + own * from.head;
                    T* y = (T*)(is_q ? call->q_out : call->k_out) + (token * from.heads + own) * call->dim;
                    for (size_t i = 0; i < half; i += W) {
                        V a = load_some(x + i, half - i), b = load_some(x + half + i, half - i);
                        V first = a * load_some(cosine + i, half - i) - b * load_some(sine + i, half - i);
                        V second = b * load_some(cosine + half + i, half - i) + a * load_some(sine + half + i, half - i);
                        store_some(y + i, first, half - i);
                        store_some(y + half + i, second, half - i);
                    }
                }
            });
        });
    });
    return 0;
}

extern "C" int64_t lora_add(const AddCall* call) {
    check_memory(call, sizeof *call);
    for (const char* each : {call->x, call->y, (const char*)call->sum})
        check_memory(each, call->count * bytes_of(call->type));
    constexpr int64_t EACH = 4096;
    with_type(call->type, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        over_rows((call->count + EACH - 1) / EACH, EACH, call->threads, [&](int64_t part) {
            int64_t from = part * EACH, to = std::min(call->count, from + EACH);
            for (int64_t i = from; i < to; i += W) {
                size_t n = (size_t)(to - i);
                store_some((T*)call->sum + i, load_some((const T*)call->x + i, n) + load_some((const T*)call->y + i, n), n);
            }
        });
    });
    return 0;
}

// Calls functions one after the other, given as pairs of (function, its arguments). Returns 0, or 1 + index of the
// first that fails (the ones after it are not called).
extern "C" int64_t lora_replay(const int64_t* pairs, int64_t count) {
    check_memory(pairs, count * 16);
    for (int64_t i = 0; i < count; i++) {
        auto function = (int64_t(*)(const void*))pairs[2 * i];
        if (function((const void*)pairs[2 * i + 1])) return i + 1;
    }
    return 0;
}
