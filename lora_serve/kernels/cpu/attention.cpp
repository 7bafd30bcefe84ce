// Paged attention, and writing keys and values into the block pool.
//
// A unit of work is (sequence, run of query rows, some kv heads). It takes all query heads that share a kv head, so
// that each key and value is read and widened once for all of them; several kv heads where there are enough units,
// since a position's heads are neighbours in memory. Keys are processed in tiles that begin at multiples of KEYS
// whatever the batch, with an online softmax over the tiles; the context is never gathered into a copy.
//
// With few rows (decode) keys and values are used straight from registers (`compare` for q · k, `weigh` for p · v);
// with more, they are widened into buffers first (`load_*`) that all rows read (`multiply*`). Either way a score sums
// over its dimensions in ascending order and an output over its keys, so both give the same bits.
#include <algorithm>
#include <atomic>
#include <limits>

#include "calls.h"
#include "simd.h"

namespace {

constexpr int64_t KEYS = 32;  // positions in a tile
constexpr int64_t ROWS = 64;  // rows (tokens x heads of the kv head) of one unit, about

struct Unit { int64_t sequence, head, heads, first, tokens; };  // kv heads; first: of the sequence's rows in this step

void check_pool([[maybe_unused]] const Pool& pool, [[maybe_unused]] int64_t blocks) {
#ifdef LORA_CHECKED
    check_memory(pool.data, blocks * pool.block);  // blocks are contiguous
#endif
}

INLINE V tangent(V x) {  // hyperbolic tangent
    V positive = x < 0 ? -x : x;
    V e = power_of_two(positive * (-2 * LOG2E));
    V value = (1.0f - e) / (1.0f + e);
    return x < 0 ? -value : value;
}

// Addresses of the keys or values at a tile's positions, for one head.
struct Places {
    const char* const* first;  // of the unit's first kv head
    int64_t offset;
    const char* operator[](int64_t j) const { return first[j] + offset; }
};

// Scratch memory of one unit; rows are padded to whole vectors.
struct Room {
    size_t kd, vd, rows;  // padded widths
    float *q, *out, *score, *keys, *values, *top, *sum;  // top: largest score; sum: of probabilities, W parts of it
    Room(std::vector<float>& memory, size_t rows, size_t key_dim, size_t value_dim)
        : kd((key_dim + 2 * W - 1) / (2 * W) * 2 * W), vd((value_dim + 2 * W - 1) / (2 * W) * 2 * W), rows(rows) {
        float* p = scratch(memory, rows * (kd + vd + KEYS + W + 1) + TILE + KEYS * (kd + vd) + gaps(7));
        auto take = [&](size_t n) { return part_of(p, n); };
        keys = take(KEYS * kd);
        values = take(KEYS * vd);
        score = take(rows * KEYS);
        q = take(rows * kd);
        out = take(rows * vd);
        top = take(rows + TILE);  // `soften` takes TILE at once
        sum = take(rows * W);
    }
};

// Dimensions from `d` of keys j..j+W, transposed: pair p (of two-byte types; half the shuffles) or dimension p of all
// W keys in block[p]; zeros for keys from n on and dimensions from `dim` on.
template <class T_> INLINE void load_block(Places row, int64_t j, int64_t n, size_t d, size_t dim, V* block) {
    size_t bytes = std::min(sizeof(V), (dim - d) * sizeof(T_));
    if (j + W <= n && bytes == sizeof(V)) {
        UNROLL
        for (int i = 0; i < W; i++) block[i] = load((const float*)(row[j + i] + d * sizeof(T_)));
    } else {
        UNROLL
        for (int i = 0; i < W; i++) {
            V part = {};  // a copy of unknown length would keep all of `block` out of the registers
            if (j + i < n) memcpy(&part, row[j + i] + d * sizeof(T_), bytes);
            block[i] = part;
        }
    }
    transpose(block);
}

// keys[dim][KEYS] = n rows of T_, transposed and widened (Dot: [pair of dim][KEYS], not widened); zeros from row n on.
template <class T_, bool Dot> void load_keys(Places row, Places next, int64_t n, size_t dim, float* keys) {
    constexpr size_t EACH = 4 / sizeof(T_);
    for (int64_t j = 0; j < KEYS; j += W)
        for (size_t d = 0; d < dim; d += W * EACH) {
            V block[W];
            load_block<T_>(row, j, n, d, dim, block);
            UNROLL
            for (int i = 0; i < W; i++) {
                __builtin_prefetch(next[j + i] + d * sizeof(T_), 0, 2);
                if constexpr (EACH == 1 || Dot) {
                    store(keys + (d / EACH + i) * KEYS + j, block[i]);
                } else {
                    store(keys + (d + 2 * i) * KEYS + j, first_of_pair<T_>((U)block[i]));
                    store(keys + (d + 2 * i + 1) * KEYS + j, second_of_pair<T_>((U)block[i]));
                }
            }
        }
}

// sum[T] += q[T rows of kd] * key: one dimension of W keys (score_element), or a pair of dimensions (score_pair).
template <int T> INLINE void score_element(V* sum, V key, const float* q, size_t kd) {
    UNROLL
    for (int t = 0; t < T; t++) sum[t] += key * q[t * kd];
}
template <int T> INLINE void score_pair(V* sum, U key, const float* q, size_t kd) {
    UNROLL
    for (int t = 0; t < T; t++) {
        uint32_t pair;
        memcpy(&pair, q + t * kd, sizeof pair);
        sum[t] = dot_pair(sum[t], key, U{} + pair);
    }
}

// Scores of few rows: score[rows, KEYS] = q[rows, dim] . n keys of T_, transposed and widened in registers.
template <class T_, bool Dot>
void compare(int64_t rows, const float* q, size_t kd, Places row, int64_t n, size_t dim, float* score) {
    constexpr size_t EACH = 4 / sizeof(T_);
    with_rows((int)rows, [&](auto t_) {
        constexpr int T = decltype(t_)::value;
        for (int64_t j = 0; j < n; j += W) {
            V sum[T] = {};
            for (size_t d = 0; d < dim; d += W * EACH) {
                V block[W];
                load_block<T_>(row, j, n, d, dim, block);
                UNROLL
                for (int i = 0; i < W; i++) {
                    if constexpr (Dot) {
                        score_pair<T>(sum, (U)block[i], q + d / 2 + i, kd);
                    } else if constexpr (EACH == 1) {
                        score_element<T>(sum, block[i], q + d + i, kd);
                    } else {
                        score_element<T>(sum, first_of_pair<T_>((U)block[i]), q + d + 2 * i, kd);
                        score_element<T>(sum, second_of_pair<T_>((U)block[i]), q + d + 2 * i + 1, kd);
                    }
                }
            }
            UNROLL
            for (int t = 0; t < T; t++) store(score + t * KEYS + j, sum[t]);
        }
    });
}

// score[rows, KEYS] = q[rows, pairs] . keys[pairs, KEYS]
void multiply_pairs(int64_t rows, const float* q, size_t kd, const float* keys, size_t pairs, float* score) {
    for (int64_t j = 0; j < KEYS; j += 2 * W)
        for (int64_t row = 0; row < rows; row += TILE)
            with_rows((int)std::min<int64_t>(TILE, rows - row), [&](auto t_) {
                constexpr int T = decltype(t_)::value;
                V left[T] = {}, right[T] = {};
                for (size_t p = 0; p < pairs; p++) {
                    score_pair<T>(left, (U)load(keys + p * KEYS + j), q + row * kd + p, kd);
                    score_pair<T>(right, (U)load(keys + p * KEYS + j + W), q + row * kd + p, kd);
                }
                UNROLL
                for (int t = 0; t < T; t++) {
                    store(score + (row + t) * KEYS + j, left[t]);
                    store(score + (row + t) * KEYS + j + W, right[t]);
                }
            });
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

// Lane t of the result is the largest lane of r[t], for TILE vectors.
template <int D = W / 2> INLINE V largests(V* r) {
    UNROLL
    for (int i = 0; i < TILE; i++)
        if constexpr (D == TILE) r[i] = larger(r[i], swapped<D>(r[i], Lanes{}));
        else if (i < D) r[i] = larger(low<D>(r[i], r[i + D], Lanes{}), high<D>(r[i], r[i + D], Lanes{}));
    if constexpr (D > 1) return largests<D / 2>(r);
    return r[0];
}

// The keys that a row sees: its sequence's up to its own position, or the last `window` of these.
struct Sight {
    int64_t window, position, share;  // position of row 0; rows per position
    int64_t newest(int64_t row) const { return position + row / share; }
    int64_t oldest(int64_t row) const { return window ? std::max<int64_t>(0, newest(row) - window + 1) : 0; }
};

// State of the online softmax after the tiles so far.
struct Running {
    float *out, *top, *sum;  // as in Room
    size_t width;            // of a row of `out`
};

// One step of the online softmax, for rows `row`.. < `row` + `rows` <= `row` + TILE and the tile of keys from `first`:
// replaces unscaled scores by probabilities relative to the rows' largest scores so far, and rescales `sum` and `out`
// where a largest score has grown.
INLINE void soften(float scale, float cap, Sight sight, int64_t row, int64_t rows, int64_t first, float* score,
                   Running run) {
    constexpr int N = KEYS / W;
    V low = V{} - std::numeric_limits<float>::infinity(), most[TILE];
    bool whole = first >= sight.oldest(row + rows - 1) && first + KEYS - 1 <= sight.newest(row);
    I lane;
    for (int i = 0; i < W; i++) lane[i] = i;
    for (int t = 0; t < TILE; t++) most[t] = low;
    score += row * KEYS;
    for (int t = 0; t < rows; t++)
        for (int c = 0; c < N; c++) {
            V s = load(score + t * KEYS + c * W) * scale;
            if (cap > 0) s = tangent(s / cap) * (cap * LOG2E);
            if (!whole) {
                int32_t from = (int32_t)(sight.oldest(row + t) - first), to = (int32_t)(sight.newest(row + t) - first);
                s = (lane >= from - c * W) & (lane <= to - c * W) ? s : low;
            }
            store(score + t * KEYS + c * W, s);
            most[t] = larger(most[t], s);
        }
    V old = {}, base, shrink;
    memcpy(&old, run.top + row, TILE * sizeof(float));
    V now = larger(old, largests(most));
    base = now == low ? V{} : now;  // low: no key seen yet
    shrink = power_of_two(old - base);
    memcpy(run.top + row, &now, TILE * sizeof(float));
    for (int t = 0; t < rows; t++) {
        V part = {};
        UNROLL
        for (int c = 0; c < N; c++) {
            V p = power_of_two(load(score + t * KEYS + c * W) - base[t]);
            store(score + t * KEYS + c * W, p);
            part += p;
        }
        float *sum = run.sum + (row + t) * W, *out = run.out + (row + t) * run.width;
        store(sum, load(sum) * shrink[t] + part);
        if (shrink[t] != 1.0f)
            for (size_t d = 0; d < run.width; d += W) store(out + d, load(out + d) * shrink[t]);
    }
}

// c[rows, n] = (Add: c +) a[rows, k] @ b[k, n], n a multiple of 2W
template <bool Add>
void multiply(int64_t rows, const float* a, size_t lda, const float* b, size_t n, size_t k, float* c) {
    for (size_t d = 0; d < n; d += 2 * W)
        for (int64_t row = 0; row < rows; row += TILE)
            with_rows((int)std::min<int64_t>(TILE, rows - row), [&](auto t) {
                panel<decltype(t)::value, Add>(a + row * lda, lda, b + d, n, k, c + row * n + d, n);
            });
}

// Loads 2W values in the order that is cheapest for their type (bf16: even ones, then odd ones); `sort_two` restores
// their own order.
template <class T_> INLINE void load_two(const T_* p, V& left, V& right) {
    if constexpr (std::is_same_v<T_, Bf16>) {
        U pairs;
        memcpy(&pairs, p, sizeof pairs);
        left = first_of_pair<Bf16>(pairs);
        right = second_of_pair<Bf16>(pairs);
    } else {
        left = load(p);
        right = load(p + W);
    }
}
template <class T_, int... J> INLINE void sort_two(float* p, std::integer_sequence<int, J...>) {
    if constexpr (std::is_same_v<T_, Bf16>) {
        V left = load(p), right = load(p + W);
        store(p, pick<(J / 2 + J % 2 * W)...>(left, right));
        store(p + W, pick<(W / 2 + J / 2 + J % 2 * W)...>(left, right));
    }
}

// Weighted values of few rows: out[rows, dim] += score[rows, n] @ n values of T_, widened in registers; `dim` is a
// multiple of 2W. The next tile's keys are prefetched here too, spread evenly: the CPU drops prefetches in a burst.
template <class T_>
void weigh(int64_t rows, const float* score, Places row, Places next, Places next_key, int64_t n, size_t dim,
           float* out, size_t width) {
    for (int64_t r = 0; r < rows; r += TILE)
        with_rows((int)std::min<int64_t>(TILE, rows - r), [&](auto t_) {
            constexpr int T = decltype(t_)::value;
            for (size_t d = 0; d < dim; d += 2 * W) {
                V sum[T][2];
                UNROLL
                for (int t = 0; t < T; t++)
                    for (int c = 0; c < 2; c++) sum[t][c] = load(out + (r + t) * width + d + c * W);
                for (int64_t j = 0; j < n; j++) {
                    V left, right;
                    load_two((const T_*)row[j] + d, left, right);
                    __builtin_prefetch(next[j] + d * sizeof(T_), 0, 2);
                    __builtin_prefetch(next_key[j] + d * sizeof(T_), 0, 2);
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

// Attention of one unit. False where the block table names a block that is not in the pool.
bool attend(const AttentionCall& call, const Unit& unit, Room& room) {
    int64_t share = call.heads / call.kv_heads, rows = unit.tokens * share;  // rows of one kv head
    int64_t start = call.query_start[unit.sequence], length = call.query_start[unit.sequence + 1] - start;
    int64_t context = call.context[unit.sequence], position = context - length + unit.first;
    size_t kd = call.keys.dim, vd = call.values.dim;
    float infinity = std::numeric_limits<float>::infinity();
    float scale = (float)call.scale * (call.softcap > 0 ? 1.0f : LOG2E);

    // The token and query head of the unit's row r: the rows of its first kv head, then those of the next.
    auto token = [&](int64_t r) { return start + unit.first + r % rows / share; };
    auto head = [&](int64_t r) { return (unit.head + r / rows) * share + r % share; };
    bool dots = DOTS && call.q_type == BF16 && call.keys.type == BF16;
    with_type(call.q_type, [&](auto* type) {
        for (int64_t r = 0; r < rows * unit.heads; r++) {
            auto from = (decltype(type))(call.q + token(r) * call.q_token + head(r) * call.q_head);
            float *q = room.q + r * room.kd, *sum = room.sum + r * W;
            std::fill(q, q + room.kd, 0.0f);
            if (dots) memcpy(q, from, kd * sizeof(Bf16));
            else widen_row(from, kd, q);
            room.top[r] = call.sinks ? call.sinks[head(r)] * LOG2E : -infinity;
            std::fill(sum, sum + W, 0.0f);
            if (call.sinks) *sum = 1.0f;
        }
    });
    std::fill(room.out, room.out + rows * unit.heads * room.vd, 0.0f);

    Sight sight = {call.window, position, share};
    const int32_t* table = call.block_table + unit.sequence * call.table_width;
    int64_t end = position + unit.tokens, first = sight.oldest(0) / KEYS * KEYS;
    const char *places[2][2][KEYS];  // [this or next tile][keys, values]
    bool sound = true, few = rows <= TILE, direct = few && vd % (2 * W) == 0;
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
            Running run = {out, room.top + h * rows, room.sum + h * rows * W, room.vd};
            with_type(call.keys.type, [&](auto* type) {
                using T_ = std::remove_pointer_t<decltype(type)>;
                Places here = of(which, 0), next = of(which ^ 1, 0);
                if constexpr (DOTS && std::is_same_v<T_, Bf16>)
                    if (dots) {
                        if (few) return compare<T_, true>(rows, q, room.kd, here, n, kd, room.score);
                        load_keys<T_, true>(here, next, n, kd, room.keys);
                        return multiply_pairs(rows, q, room.kd, room.keys, (kd + 1) / 2, room.score);
                    }
                if (few) return compare<T_, false>(rows, q, room.kd, here, n, kd, room.score);
                load_keys<T_, false>(here, next, n, kd, room.keys);
                multiply<false>(rows, q, room.kd, room.keys, KEYS, kd, room.score);
            });
            for (int64_t r = 0; r < rows; r += TILE)
                soften(scale, (float)call.softcap, sight, r, std::min<int64_t>(TILE, rows - r), first, room.score, run);
            with_type(call.values.type, [&](auto* type) {
                using T_ = std::remove_pointer_t<decltype(type)>;
                Places here = of(which, 1), next = of(which ^ 1, 1);
                if (direct) return weigh<T_>(rows, room.score, here, next, of(which ^ 1, 0), n, vd, out, room.vd);
                load_values<T_>(here, next, n, vd, room.vd, room.values);
                multiply<true>(rows, room.score, KEYS, room.values, room.vd, KEYS, out);
            });
        }
    }
    if (direct)
        with_type(call.values.type, [&](auto* type) {
            using T_ = std::remove_pointer_t<decltype(type)>;
            for (float* p = room.out; p < room.out + rows * unit.heads * room.vd; p += 2 * W) sort_two<T_>(p, Lanes{});
        });
    with_type(call.q_type, [&](auto* type) {
        using T_ = std::remove_pointer_t<decltype(type)>;
        for (int64_t r = 0; r < rows * unit.heads; r++) {
            T_* to = (T_*)call.out + (token(r) * call.heads + head(r)) * vd;
            float *out = room.out + r * room.vd, sum = total(load(room.sum + r * W));
            size_t d = 0;
            for (; d + W <= vd; d += W) store(to + d, load(out + d) / sum);
            if (d < vd) store_part(to + d, load(out + d) / sum, vd - d);
        }
    });
    return true;
}

}  // namespace

// Returns 0, or 1 + index of the first token whose KV index is not in the pool (then nothing was written).
extern "C" int64_t lora_write_kv(const WriteCall* call) {
    check_memory(call, sizeof *call);
    check_memory(call->index, call->tokens * 8);
    check_pool(call->keys, call->blocks);
    check_pool(call->values, call->blocks);
    for (int64_t h = 0; h < call->kv_heads; h++) {
        check_rows(call->k + h * call->k_head, call->tokens, call->k_token, call->keys.dim * bytes_of(call->keys.type));
        check_rows(call->v + h * call->v_head, call->tokens, call->v_token, call->values.dim * bytes_of(call->values.type));
    }
    int64_t places = call->blocks * call->block_size;
    for (int64_t t = 0; t < call->tokens; t++)
        if (call->index[t] < 0 || call->index[t] >= places) return t + 1;
    size_t key = (size_t)(call->keys.dim * bytes_of(call->keys.type));
    size_t value = (size_t)(call->values.dim * bytes_of(call->values.type));
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

// Returns 0, or 1 + index of the first sequence whose rows, context or blocks are invalid (then `out` is undefined).
extern "C" int64_t lora_attention(const AttentionCall* call) {
    check_memory(call, sizeof *call);
    check_pool(call->keys, call->blocks);
    check_pool(call->values, call->blocks);
    check_memory(call->query_start, (call->sequences + 1) * 4);
    check_memory(call->context, call->sequences * 4);
    check_memory(call->block_table, call->sequences * call->table_width * 4);
    if (call->sinks) check_memory(call->sinks, call->heads * 4);
    check_memory(call->out, call->tokens * call->heads * call->values.dim * bytes_of(call->q_type));
    for (int64_t h = 0; h < call->heads; h++)
        check_rows(call->q + h * call->q_head, call->tokens, call->q_token, call->keys.dim * bytes_of(call->q_type));
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
    // The longest contexts first, so that no thread works on a long one alone at the end.
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
