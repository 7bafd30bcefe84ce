// Paged attention and the writing of keys and values.
//
// A unit of work is (sequence, kv head, run of query rows): all query heads that share the kv head go together, so each
// key and value is read and widened once for all of them. Keys come in tiles that begin at multiples of KEYS whatever the
// batch, softmax runs online over the tiles; nothing is gathered into a copy of the context.
#include <algorithm>
#include <atomic>
#include <limits>

#include "simd.h"

namespace {

constexpr int64_t KEYS = 32;  // positions in a tile
constexpr int64_t ROWS = 64;  // rows (tokens x heads of the kv head) of one unit, about

struct Pool { char* data; int64_t block, position, head, type, dim; };  // strides in bytes

struct WriteCall {  // as native.py packs it
    Pool keys, values;
    const char* k;
    int64_t k_token, k_head;  // bytes
    const char* v;
    int64_t v_token, v_head;
    const int64_t* index;
    int64_t tokens, kv_heads, blocks, block_size, threads;
};

struct AttentionCall {  // as native.py packs it
    Pool keys, values;
    const char* q;
    int64_t q_token, q_head, q_type;  // bytes
    char* out;
    const int32_t* query_start;
    const int32_t* context;
    const int32_t* block_table;
    int64_t table_width, sequences, tokens, heads, kv_heads, blocks, block_size, window, threads;
    const float* sinks;
    double scale, softcap;  // softcap 0: none
};

struct Unit { int64_t sequence, head, first, tokens; };  // first: of the sequence's rows in this step

size_t bytes_of(int64_t type) { return type == FP32 ? 4 : 2; }

// exp for x <= 88; 0 below the smallest normal float, NaN for NaN. Cody and Waite's reduction, then a polynomial.
INLINE V exponential(V x) {
    constexpr float magic = 0x1.8p23f;  // adding it rounds to an integer
    V floor = V{} - 87.3f;
    V n = larger(x, floor) * 1.44269504f + magic - magic;
    V r = x - n * 0.693359375f + n * 2.12194440e-4f;
    V p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    I power = (__builtin_convertvector(n, I) + 127) << 23;
    return x < floor ? V{} : p * (V)power;
}
INLINE V tangent(V x) {  // hyperbolic
    V positive = x < 0 ? -x : x;
    V e = exponential(larger(V{} - 80.0f, positive * -2.0f));
    V value = (1.0f - e) / (1.0f + e);
    return x < 0 ? -value : value;
}

// One unit's memory, all rows padded to vectors.
struct Room {
    size_t kd, vd, rows;  // padded widths
    float *q, *out, *score, *keys, *values, *top, *sum;
    Room(std::vector<float>& memory, size_t rows, size_t key_dim, size_t value_dim)
        : kd((key_dim + 2 * W - 1) / (2 * W) * 2 * W), vd((value_dim + 2 * W - 1) / (2 * W) * 2 * W), rows(rows) {
        float* p = scratch(memory, rows * (kd + vd + KEYS + 2) + KEYS * (kd + vd));
        auto take = [&](size_t n) { return (p += n) - n; };
        keys = take(KEYS * kd);
        values = take(KEYS * vd);
        score = take(rows * KEYS);
        q = take(rows * kd);
        out = take(rows * vd);
        top = take(rows);
        sum = take(rows);
    }
};

// keys[dim][KEYS] = n rows of T_, transposed; zeros behind row n. Two-byte types travel in pairs: half the shuffles.
template <class T_> void load_keys(const char* const* row, const char* const* next, int64_t n, size_t dim, float* keys) {
    constexpr size_t PAIR = 4 / sizeof(T_), STEP = W * PAIR;
    for (int64_t j = 0; j < KEYS; j += W)
        for (size_t d = 0; d < dim; d += STEP) {
            V block[W];
            size_t bytes = std::min(STEP, dim - d) * sizeof(T_);
            UNROLL
            for (int i = 0; i < W; i++) {
                const char* p = row[j + i] + d * sizeof(T_);
                block[i] = V{};
                if (j + i < n) {
                    if (bytes == sizeof(V)) memcpy(&block[i], p, sizeof(V));
                    else memcpy(&block[i], p, bytes);
                }
                __builtin_prefetch(next[j + i] + d * sizeof(T_), 0, 2);
            }
            transpose(block);
            UNROLL
            for (int i = 0; i < W; i++) {
                float* to = keys + (d + i * PAIR) * KEYS + j;
                if constexpr (PAIR == 2) {
                    store(to, first_of_pair<T_>((U)block[i]));
                    store(to + KEYS, second_of_pair<T_>((U)block[i]));
                } else {
                    store(to, block[i]);
                }
            }
        }
}

template <class T_>
void load_values(const char* const* row, const char* const* next, int64_t n, size_t dim, size_t width, float* values) {
    for (int64_t j = 0; j < KEYS; j++) {
        float* to = values + j * width;
        size_t done = 0;
        if (j < n) {
            widen_row((const T_*)row[j], dim, to);
            done = padded(dim);
            for (size_t d = 0; d < dim * sizeof(T_); d += 64) __builtin_prefetch(next[j] + d, 0, 2);
        }
        for (; done < width; done += W) store(to + done, V{});
    }
}

// Turn scores of keys `first`.. into probabilities relative to the running maximum, and bring `out` to it.
INLINE void soften(const AttentionCall& call, float* score, int64_t first, int64_t oldest, int64_t position, float* top,
                   float* sum, float* out, size_t width) {
    constexpr int N = KEYS / W;
    V s[N];
    float low = -std::numeric_limits<float>::infinity();
    float cap = (float)call.softcap;
    bool whole = first >= oldest && first + KEYS - 1 <= position;
    I lane;
    for (int i = 0; i < W; i++) lane[i] = i;
    UNROLL
    for (int c = 0; c < N; c++) {
        s[c] = load(score + c * W);
        if (cap > 0) s[c] = tangent(s[c] / cap) * cap;
        if (!whole) {
            I seen = (lane >= (int32_t)(oldest - first - c * W)) & (lane <= (int32_t)(position - first - c * W));
            s[c] = seen ? s[c] : V{} + low;
        }
    }
    V most = s[0];
    UNROLL
    for (int c = 1; c < N; c++) most = larger(most, s[c]);
    float now = std::max(*top, largest(most));
    float base = now == low ? 0.0f : now;  // nothing seen yet
    V part = {};
    UNROLL
    for (int c = 0; c < N; c++) {
        s[c] = exponential(s[c] - base);
        part += s[c];
        store(score + c * W, s[c]);
    }
    if (now > *top) {
        float shrink = exponential(V{} + (*top - base))[0];
        *sum *= shrink;
        for (size_t d = 0; d < width; d += W) store(out + d, load(out + d) * shrink);
    }
    *sum += total(part);
    *top = now;
}

// a[rows, k] @ b[k, n] into or onto c, n a multiple of 2W
template <bool Add>
void multiply(int64_t rows, const float* a, size_t lda, const float* b, size_t n, size_t k, float* c) {
    for (size_t d = 0; d < n; d += 2 * W)
        for (int64_t row = 0; row < rows; row += TILE)
            with_rows((int)std::min<int64_t>(TILE, rows - row), [&](auto t) {
                panel<decltype(t)::value, Add>(a + row * lda, lda, b + d, n, k, c + row * n + d, n);
            });
}

// False where the block table names a block that is not there.
bool attend(const AttentionCall& call, const Unit& unit, Room& room) {
    int64_t share = call.heads / call.kv_heads, rows = unit.tokens * share, head = unit.head * share;
    int64_t start = call.query_start[unit.sequence], length = call.query_start[unit.sequence + 1] - start;
    int64_t context = call.context[unit.sequence], position = context - length + unit.first;
    size_t kd = call.keys.dim, vd = call.values.dim;
    float infinity = std::numeric_limits<float>::infinity();

    auto q_row = [&](int64_t r) {
        return call.q + (start + unit.first + r / share) * call.q_token + (head + r % share) * call.q_head;
    };
    with_type(call.q_type, [&](auto* type) {
        for (int64_t r = 0; r < rows; r++) {
            float* q = room.q + r * room.kd;
            widen_row((decltype(type))q_row(r), kd, q);
            for (size_t d = 0; d < kd; d += W) store(q + d, load(q + d) * (float)call.scale);
            room.top[r] = call.sinks ? call.sinks[head + r % share] : -infinity;
            room.sum[r] = call.sinks ? 1.0f : 0.0f;
        }
    });
    std::fill(room.out, room.out + rows * room.vd, 0.0f);

    auto oldest = [&](int64_t p) { return call.window && p >= call.window ? p - call.window + 1 : 0; };
    const int32_t* table = call.block_table + unit.sequence * call.table_width;
    int64_t end = position + unit.tokens, first = oldest(position) / KEYS * KEYS;
    const char *places[2][2][KEYS];  // [this or next tile][keys, values]
    bool sound = true;
    auto find = [&](int which, int64_t from) {
        from = std::min(from, end - 1);
        int64_t j = 0, n = std::min(KEYS, end - from), entry = from / call.block_size, offset = from % call.block_size;
        for (; j < n; entry++, offset = 0) {
            int64_t block = table[entry];
            if (block < 0 || block >= call.blocks) { sound = false; block = 0; }
            const Pool &k = call.keys, &v = call.values;
            const char* key = k.data + block * k.block + offset * k.position + unit.head * k.head;
            const char* value = v.data + block * v.block + offset * v.position + unit.head * v.head;
            for (; offset < call.block_size && j < n; offset++, j++, key += k.position, value += v.position) {
                places[which][0][j] = key;
                places[which][1][j] = value;
            }
        }
        for (; j < KEYS; j++)  // never read, only prefetched
            for (auto& side : places[which]) side[j] = side[n - 1];
    };
    find(0, first);
    for (int which = 0; first < end; first += KEYS, which ^= 1) {
        find(which ^ 1, first + KEYS);
        if (!sound) return false;
        auto& here = places[which];
        auto& next = places[which ^ 1];
        int64_t n = std::min(KEYS, end - first);
        with_type(call.keys.type, [&](auto* type) {
            using T_ = std::remove_pointer_t<decltype(type)>;
            load_keys<T_>(here[0], next[0], n, kd, room.keys);
            load_values<T_>(here[1], next[1], n, vd, room.vd, room.values);
        });
        multiply<false>(rows, room.q, room.kd, room.keys, KEYS, kd, room.score);
        for (int64_t r = 0; r < rows; r++) {
            int64_t p = position + r / share;
            soften(call, room.score + r * KEYS, first, oldest(p), p, room.top + r, room.sum + r,
                   room.out + r * room.vd, room.vd);
        }
        multiply<true>(rows, room.score, KEYS, room.values, room.vd, KEYS, room.out);
    }
    with_type(call.q_type, [&](auto* type) {
        using T_ = std::remove_pointer_t<decltype(type)>;
        for (int64_t r = 0; r < rows; r++) {
            int64_t token = start + unit.first + r / share;
            T_* to = (T_*)call.out + (token * call.heads + head + r % share) * vd;
            float* out = room.out + r * room.vd;
            size_t d = 0;
            for (; d + W <= vd; d += W) store(to + d, load(out + d) / room.sum[r]);
            if (d < vd) store_part(to + d, load(out + d) / room.sum[r], vd - d);
        }
    });
    return true;
}

}  // namespace

// 0, or 1 + index of the first token whose place is not in the pool (then nothing was written).
extern "C" int64_t lora_write_kv(const WriteCall* call) {
    int64_t places = call->blocks * call->block_size;
    for (int64_t t = 0; t < call->tokens; t++)
        if (call->index[t] < 0 || call->index[t] >= places) return t + 1;
    size_t key = call->keys.dim * bytes_of(call->keys.type), value = call->values.dim * bytes_of(call->values.type);
    parallel(call->tokens < 64 ? 1 : (int)call->threads, [&](int thread, int threads) {
        int64_t from = call->tokens * thread / threads, to = call->tokens * (thread + 1) / threads;
        for (int64_t t = from; t < to; t++) {
            int64_t block = call->index[t] / call->block_size, offset = call->index[t] % call->block_size;
            for (int64_t h = 0; h < call->kv_heads; h++) {
                const Pool &k = call->keys, &v = call->values;
                memcpy(k.data + block * k.block + offset * k.position + h * k.head,
                       call->k + t * call->k_token + h * call->k_head, key);
                memcpy(v.data + block * v.block + offset * v.position + h * v.head,
                       call->v + t * call->v_token + h * call->v_head, value);
            }
        }
    });
    return 0;
}

// 0, or 1 + index of the first sequence whose rows, context or blocks cannot be (then `out` is undefined).
extern "C" int64_t lora_attention(const AttentionCall* call) {
    static thread_local std::vector<Unit> memory;
    std::vector<Unit>& units = memory;
    units.clear();
    int64_t share = call->heads / call->kv_heads, most = std::max<int64_t>(1, ROWS / share), longest = 0;
    int64_t work = 0;
    for (int64_t i = 0; i < call->sequences; i++) {
        int64_t start = call->query_start[i], length = call->query_start[i + 1] - start, context = call->context[i];
        if (start < 0 || length < 0 || start + length > call->tokens || (length && context < length) ||
            context > call->table_width * call->block_size)
            return i + 1;
        for (int64_t first = 0; first < length; first += most)
            for (int64_t h = 0; h < call->kv_heads; h++)
                units.push_back({i, h, first, std::min(most, length - first)});
        longest = std::max(longest, std::min(most, length));
        work += length ? context * call->kv_heads * (length * share + 16) : 0;
    }
    // The longest contexts first, so that no thread is left alone with one at the end.
    auto reach = [&](const Unit& u) {
        return call->context[u.sequence] - (call->query_start[u.sequence + 1] - call->query_start[u.sequence]) +
               u.first + u.tokens;
    };
    std::stable_sort(units.begin(), units.end(), [&](const Unit& a, const Unit& b) { return reach(a) > reach(b); });
    std::atomic<int64_t> next{0}, wrong{0};
    parallel(work < 4096 ? 1 : (int)call->threads, [&](int, int) {
        static thread_local std::vector<float> mine;
        Room room(mine, longest * share, call->keys.dim, call->values.dim);
        for (int64_t u; (u = next.fetch_add(1, std::memory_order_relaxed)) < (int64_t)units.size();)
            if (!attend(*call, units[u], room)) wrong = units[u].sequence + 1;
    });
    return wrong;
}
