// Paged attention and the writing of keys and values.
//
// A unit of work is (sequence, run of query rows, some kv heads). All query heads that share a kv head go together, so
// each key and value is read and widened once for all of them; several kv heads go together where there are units
// enough, since a position's heads are neighbours in memory. Keys come in tiles that begin at multiples of KEYS
// whatever the batch, softmax runs online over the tiles; nothing is gathered into a copy of the context.
#include <algorithm>
#include <atomic>
#include <limits>

#include "simd.h"

namespace {

constexpr int64_t KEYS = 32;  // positions in a tile
constexpr int64_t ROWS = 64;  // rows (tokens x heads of the kv head) of one unit, about
constexpr int64_t FEW = 8;    // rows up to which values are not worth widening into a buffer first

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

struct Unit { int64_t sequence, head, heads, first, tokens; };  // kv heads; first: of the sequence's rows in this step

size_t bytes_of(int64_t type) { return type == FP32 ? 4 : 2; }

INLINE V tangent(V x) {  // hyperbolic
    V positive = x < 0 ? -x : x;
    V e = power_of_two(positive * (-2 * LOG2E));
    V value = (1.0f - e) / (1.0f + e);
    return x < 0 ? -value : value;
}

// Where the keys or values of a tile's positions lie, for one head.
struct Places {
    const char* const* first;  // of the unit's first kv head
    int64_t offset;
    const char* operator[](int64_t j) const { return first[j] + offset; }
};

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
template <class T_> void load_keys(Places row, Places next, int64_t n, size_t dim, float* keys) {
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
void load_values(Places row, Places next, int64_t n, size_t dim, size_t width, float* values) {
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

// Turn scores (in units of log 2) of keys `first`.. into probabilities relative to the running maximum, and bring
// `out` to it.
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
        if (cap > 0) s[c] = tangent(s[c] / cap) * (cap * LOG2E);
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
        s[c] = power_of_two(s[c] - base);
        part += s[c];
        store(score + c * W, s[c]);
    }
    if (now > *top) {
        float shrink = power_of_two(V{} + (*top - base))[0];
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

// out[rows, dim] += score[rows, n] @ n rows of T_, widened as they come. For few rows; `dim` is a multiple of 2W.
template <class T_>
void weigh(int64_t rows, const float* score, Places row, Places next, int64_t n, size_t dim, float* out, size_t width) {
    for (int64_t r = 0; r < rows; r += TILE)
        with_rows((int)std::min<int64_t>(TILE, rows - r), [&](auto t_) {
            constexpr int T = decltype(t_)::value;
            for (size_t d = 0; d < dim; d += 2 * W) {
                V sum[T][2];
                UNROLL
                for (int t = 0; t < T; t++)
                    for (int c = 0; c < 2; c++) sum[t][c] = load(out + (r + t) * width + d + c * W);
                for (int64_t j = 0; j < n; j++) {
                    const T_* value = (const T_*)row[j] + d;
                    V left = load(value), right = load(value + W);
                    __builtin_prefetch(next[j] + d * sizeof(T_), 0, 2);
                    UNROLL
                    for (int t = 0; t < T; t++) {
                        float p = score[(r + t) * KEYS + j];
                        sum[t][0] += left * p;
                        sum[t][1] += right * p;
                    }
                }
                UNROLL
                for (int t = 0; t < T; t++)
                    for (int c = 0; c < 2; c++) store(out + (r + t) * width + d + c * W, sum[t][c]);
            }
        });
}

// False where the block table names a block that is not there.
bool attend(const AttentionCall& call, const Unit& unit, Room& room) {
    int64_t share = call.heads / call.kv_heads, rows = unit.tokens * share;  // rows of one kv head
    int64_t start = call.query_start[unit.sequence], length = call.query_start[unit.sequence + 1] - start;
    int64_t context = call.context[unit.sequence], position = context - length + unit.first;
    size_t kd = call.keys.dim, vd = call.values.dim;
    float infinity = std::numeric_limits<float>::infinity();
    float scale = (float)call.scale * (call.softcap > 0 ? 1.0f : LOG2E);

    // Row r of the unit: rows of the first kv head, then of the next.
    auto token = [&](int64_t r) { return start + unit.first + r % rows / share; };
    auto head = [&](int64_t r) { return (unit.head + r / rows) * share + r % share; };
    with_type(call.q_type, [&](auto* type) {
        for (int64_t r = 0; r < rows * unit.heads; r++) {
            float* q = room.q + r * room.kd;
            widen_row((decltype(type))(call.q + token(r) * call.q_token + head(r) * call.q_head), kd, q);
            for (size_t d = 0; d < kd; d += W) store(q + d, load(q + d) * scale);
            room.top[r] = call.sinks ? call.sinks[head(r)] * LOG2E : -infinity;
            room.sum[r] = call.sinks ? 1.0f : 0.0f;
        }
    });
    std::fill(room.out, room.out + rows * unit.heads * room.vd, 0.0f);

    auto oldest = [&](int64_t p) { return call.window && p >= call.window ? p - call.window + 1 : 0; };
    const int32_t* table = call.block_table + unit.sequence * call.table_width;
    int64_t end = position + unit.tokens, first = oldest(position) / KEYS * KEYS;
    const char *places[2][2][KEYS];  // [this or next tile][keys, values]
    bool sound = true, direct = rows <= FEW && vd % (2 * W) == 0;
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
        int64_t n = std::min(KEYS, end - first);
        for (int64_t h = 0; h < unit.heads; h++) {
            auto of = [&](int tile, int side) {
                return Places{places[tile][side], h * (side ? call.values : call.keys).head};
            };
            float *q = room.q + h * rows * room.kd, *out = room.out + h * rows * room.vd;
            float *top = room.top + h * rows, *sum = room.sum + h * rows;
            with_type(call.keys.type, [&](auto* type) {
                using T_ = std::remove_pointer_t<decltype(type)>;
                load_keys<T_>(of(which, 0), of(which ^ 1, 0), n, kd, room.keys);
            });
            multiply<false>(rows, q, room.kd, room.keys, KEYS, kd, room.score);
            for (int64_t r = 0; r < rows; r++) {
                int64_t p = position + r / share;
                soften(call, room.score + r * KEYS, first, oldest(p), p, top + r, sum + r, out + r * room.vd, room.vd);
            }
            with_type(call.values.type, [&](auto* type) {
                using T_ = std::remove_pointer_t<decltype(type)>;
                Places here = of(which, 1), next = of(which ^ 1, 1);
                if (direct) return weigh<T_>(rows, room.score, here, next, n, vd, out, room.vd);
                load_values<T_>(here, next, n, vd, room.vd, room.values);
                multiply<true>(rows, room.score, KEYS, room.values, room.vd, KEYS, out);
            });
        }
    }
    with_type(call.q_type, [&](auto* type) {
        using T_ = std::remove_pointer_t<decltype(type)>;
        for (int64_t r = 0; r < rows * unit.heads; r++) {
            T_* to = (T_*)call.out + (token(r) * call.heads + head(r)) * vd;
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
    int64_t share = call->heads / call->kv_heads, most = std::max<int64_t>(1, ROWS / share);
    int64_t work = 0, rows = 0, enough = 4 * call->threads;
    for (int64_t i = 0; i < call->sequences; i++) {
        int64_t start = call->query_start[i], length = call->query_start[i + 1] - start, context = call->context[i];
        if (start < 0 || length < 0 || start + length > call->tokens || (length && context < length) ||
            context > call->table_width * call->block_size)
            return i + 1;
        for (int64_t first = 0; first < length; first += most) {
            int64_t tokens = std::min(most, length - first), heads = std::max<int64_t>(1, ROWS / (tokens * share));
            heads = std::min(heads, std::max<int64_t>(1, call->sequences * call->kv_heads / enough));
            for (int64_t h = 0; h < call->kv_heads; h += heads)
                units.push_back({i, h, std::min(heads, call->kv_heads - h), first, tokens});
            rows = std::max(rows, heads * tokens * share);
        }
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
        Room room(mine, rows, call->keys.dim, call->values.dim);
        for (int64_t u; (u = next.fetch_add(1, std::memory_order_relaxed)) < (int64_t)units.size();)
            if (!attend(*call, units[u], room)) wrong = units[u].sequence + 1;
    });
    return wrong;
}
