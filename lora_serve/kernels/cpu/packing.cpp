// Packs weights into panels (panels.h describes the layout), and unpacks them. INT8 is quantised here; INT4 comes as
// integers, scales and levels (packed_weight.py).
//
// W outputs at a time: each one's weights become a row of lanes, and the rows are transposed into one side of a panel.
#include <algorithm>

#include "calls.h"
#include "panels.h"

namespace {

struct Packing {
    const PackCall& call;
    size_t in, lanes, ld;  // of a row: inputs, lanes, floats from row to row

    explicit Packing(const PackCall& all)
        : call(all), in((size_t)all.in), lanes(lanes_of(all.kind, all.in)), ld(padded(lanes) + W) {}

    // Transposes rows of lanes [W, lanes] into one side (half the columns) of a panel; `turn_back` is the inverse.
    void turn(const float* rows, char* side) const {
        for (size_t k = 0; k < lanes; k += W) {
            V block[W];
            for (size_t i = 0; i < W; i++) block[i] = load(rows + i * ld + k);
            transpose(block);
            for (size_t i = 0; i < W && k + i < lanes; i++) store((float*)(side + lane_at(call.kind, k + i)), block[i]);
        }
    }
    void turn_back(const char* side, float* rows) const {
        for (size_t k = 0; k < lanes; k += W) {
            V block[W] = {};
            for (size_t i = 0; i < W && k + i < lanes; i++)
                block[i] = load((const float*)(side + lane_at(call.kind, k + i)));
            transpose(block);
            for (size_t i = 0; i < W; i++) store(rows + i * ld + k, block[i]);
        }
    }

    // Converts one output's weights to lanes, quantised in INT8, whose scale it writes.
    template <class T> void shrink(const T* x, char* to, float* scale) const {
        if (call.kind == INT8) {
            *scale = step_of(x, in);
            round_row(x, in, *scale, OFFSET, to);
        } else {
            memcpy(to, x, in * sizeof(T));
        }
    }
    // The same of INT4's integers; `place` is where its first level belongs.
    void to_lanes(const char* q, const char* level, char* to, char* place) const {
        for (size_t i = 0; i < in; i += 8, to += 4) {
            uint32_t low, high;
            memcpy(&low, q + i, 4);
            memcpy(&high, q + i + 4, 4);
            low |= high << 4;
            memcpy(to, &low, 4);
        }
        for (size_t i = 0; i < in; i += GROUP, level += 2, place += GROUP_BYTES) memcpy(place, level, 2);
    }
    // The inverse, for INT8 and INT4.
    void widen(float* x, const uint8_t* from, float scale, const char* place) const {
        if (call.kind == INT8) {
            for (size_t i = 0; i < in; i++) x[i] = (float)(from[i] - OFFSET) * scale;
            return;
        }
        for (size_t i = 0; i < in; i += GROUP, place += GROUP_BYTES) {
            uint16_t level;
            memcpy(&level, place, 2);
            float step = scale_of_levels(U{} + level)[0] / 8;
            int32_t zero = level & 0x7f;
            for (size_t b = 0; b < GROUP; b += 8, from += 4)
                for (size_t j = 0; j < 8; j++)
                    x[i + b + j] = (float)(8 * (from[j % 4] >> (j & 4) & 15) - zero) * step * scale;
        }
    }

    // body(side, its levels, scratch rows, first output, outputs) for all sides, divided among the threads
    template <class F> void each_side(F body) const {
        int64_t sides = 2 * (int64_t)panels_of(call.out);
        parallel((int)call.threads, [&](int thread, int threads) {
            static thread_local std::vector<float> memory;
            float* rows = scratch(memory, W * ld);
            for (int64_t s = sides * thread / threads; s < sides * (thread + 1) / threads; s++) {
                char* side = call.packed + s / 2 * (int64_t)lane_at(call.kind, lanes) + s % 2 * W * 4;
                char* levels = side + GROUP_LEVELS - s % 2 * W * 2;
                body(side, levels, rows, s * W, std::clamp<int64_t>(call.out - s * W, 0, W));
            }
        });
    }
    void pack() const {
        each_side([&](char* side, char* levels, float* rows, int64_t first, int64_t count) {
            std::fill(rows, rows + W * ld, 0.0f);
            if (call.kind == INT4) {
                if (count < W)
                    for (size_t k = 0; k < lanes; k += GROUP_LANES) memset(levels + lane_at(INT4, k), 0, W * 2);
                for (int64_t i = 0; i < count; i++)
                    to_lanes(call.weight + (first + i) * call.in, call.levels + (first + i) * (call.in / (int64_t)GROUP) * 2,
                                  (char*)(rows + i * ld), levels + 2 * i);
            } else {
                with_type(call.type, [&](auto* type) {
                    using T = std::remove_pointer_t<decltype(type)>;
                    for (int64_t i = 0; i < count; i++)
                        shrink((const T*)call.weight + (first + i) * call.in, (char*)(rows + i * ld), call.scale + first + i);
                });
            }
            turn(rows, side);
        });
    }
    void unpack() const {
        bool small = call.kind == INT8 || call.kind == INT4;
        size_t size = in * (small || call.type == FP32 ? 4 : 2);
        each_side([&](char* side, char* levels, float* rows, int64_t first, int64_t count) {
            turn_back(side, rows);
            for (int64_t i = 0; i < count; i++) {
                char* x = call.weight + (size_t)(first + i) * size;
                const float* row = rows + i * ld;
                if (small) widen((float*)x, (const uint8_t*)row, call.scale[first + i], levels + 2 * i);
                else memcpy(x, row, size);
            }
        });
    }
};

void check_packed(const PackCall& call) {
    check_memory(&call, sizeof call);
    check_memory(call.packed, packed_bytes(call.kind, call.out, call.in));
    if (call.kind == INT8 || call.kind == INT4) check_memory(call.scale, scales_bytes(call.out));
}

}  // namespace

// How many bytes a weight takes in panels.
extern "C" int64_t lora_packed_bytes(const PackCall* call) {
    return packed_bytes(call->kind, call->out, call->in);
}

// Packs a weight [out, in] into panels.
extern "C" int64_t lora_pack(const PackCall* call) {
    check_memory(call->weight, call->out * call->in * (call->kind == INT4 ? 1 : bytes_of(call->type)));
    if (call->kind == INT4) check_memory(call->levels, call->out * (call->in / (int64_t)GROUP) * 2);
    check_packed(*call);
    Packing(*call).pack();
    return 0;
}

// Packs a float32 weight that lies turned, as [in, out]: every lane of a panel is COLUMNS consecutive numbers of a row.
extern "C" int64_t lora_pack_turned(const PackCall* call) {
    check_memory(call->weight, call->out * call->in * 4);
    check_packed(*call);
    size_t out = (size_t)call->out, lanes = lanes_of(F32, call->in), panels = panels_of(call->out);
    const float* weight = (const float*)call->weight;
    parallel((int)call->threads, [&](int thread, int threads) {
        for (size_t p = panels * thread / threads; p < panels * (thread + 1) / threads; p++) {
            size_t count = std::min(COLUMNS, out - p * COLUMNS);
            char* panel = call->packed + p * lane_at(F32, lanes);
            for (size_t k = 0; k < lanes; k++) {
                float* lane = (float*)(panel + lane_at(F32, k));
                if (count == COLUMNS) memcpy(lane, weight + k * out + p * COLUMNS, COLUMNS * 4);
                else {
                    memcpy(lane, weight + k * out + p * COLUMNS, count * 4);
                    std::fill(lane + count, lane + COLUMNS, 0.0f);
                }
            }
        }
    });
    return 0;
}

// The inverse: the weights themselves, or those that quantised ones stand for, in float32.
extern "C" int64_t lora_unpack(const PackCall* call) {
    bool small = call->kind == INT8 || call->kind == INT4;
    check_memory(call->weight, call->out * call->in * (small ? 4 : bytes_of(call->type)));
    check_packed(*call);
    Packing(*call).unpack();
    return 0;
}

// Copies rows of a weight in full precision. Returns 0, or 1 + index of the first id that is not a row.
extern "C" int64_t lora_rows(const RowsCall* call) {
    check_memory(call, sizeof *call);
    check_memory(call->packed, packed_bytes(call->kind, call->out, call->in));
    check_memory(call->ids, call->count * 8);
    check_memory(call->rows, call->count * call->in * call->size);
    for (int64_t i = 0; i < call->count; i++)
        if (call->ids[i] < 0 || call->ids[i] >= call->out) return i + 1;
    size_t lanes = lanes_of(call->kind, call->in), size = (size_t)(call->in * call->size);
    parallel(call->count < 16 ? 1 : (int)call->threads, [&](int thread, int threads) {
        for (int64_t i = call->count * thread / threads; i < call->count * (thread + 1) / threads; i++) {
            size_t id = (size_t)call->ids[i];
            const char* from = call->packed + id / COLUMNS * lane_at(call->kind, lanes) + id % COLUMNS * 4;
            char* to = call->rows + (size_t)i * size;
            for (size_t k = 0; k < lanes; k++) memcpy(to + 4 * k, from + lane_at(call->kind, k), std::min<size_t>(4, size - 4 * k));
        }
    });
    return 0;
}
