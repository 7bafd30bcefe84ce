// The small operations between the linear maps, each in one pass over its rows: norms and gated activations.
#include <cmath>

#include "simd.h"

namespace {

enum Activation : int64_t { SILU, GELU_TANH };

struct NormCall {  // as native.py packs it
    const char* x;
    const char* weight;
    char* y;
    int64_t rows, width, x_stride, type, weight_type, plus_one, threads;  // stride in elements
    double eps;
};

struct GatedCall {  // as native.py packs it
    const char* gate;
    const char* up;
    char* y;
    int64_t rows, width, gate_stride, up_stride, type, activation, threads;  // strides in elements
};

template <class T> INLINE V load_some(const T* p, size_t n) { return n >= W ? load(p) : load_part(p, n); }
template <class T> INLINE void store_some(T* p, V v, size_t n) {
    if (n >= W) store(p, v);
    else store_part(p, v, n);
}

// The value as the type keeps it.
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

constexpr int64_t ALONE = 1 << 15;  // numbers that one thread has passed before another is awake

template <class F> void over_rows(int64_t rows, int64_t width, int64_t threads, F f) {
    parallel(rows * width < ALONE ? 1 : (int)threads, [&](int thread, int all) {
        for (int64_t row = rows * thread / all; row < rows * (thread + 1) / all; row++) f(row);
    });
}

}  // namespace

extern "C" int64_t lora_rms_norm(const NormCall* call) {
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
