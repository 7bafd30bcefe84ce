// Paged attention, and writing keys and values into the block pool.
//
// A unit of work is (sequence, run of query rows, some kv heads). It takes all query heads that share a kv head, so
// that each key and value is read and widened once for all of them; several kv heads where there are enough units,
// since a position's heads are neighbours in memory. Keys are processed in tiles that begin at multiples of KEYS
// whatever the batch, with an online softmax over the tiles; the context is never gathered into a copy. The softmax
// begins anew at multiples of PART, and its parts are merged in order: where there are fewer units than threads, each
// part is a unit of its own (split over the context, as in Flash-Decoding), with the same bits.
#include <algorithm>
#include <atomic>

#include "attention_tiles.h"
#include "calls.h"

namespace {

constexpr int64_t ROWS = 64;  // rows (tokens x heads of the kv head) of one unit, about
constexpr int64_t PART = 1024;  // positions in a part of the context, a multiple of KEYS

// Whether scores and outputs are sums of dot products of pairs of bf16.
bool in_pairs(const AttentionCall& call) {
    return DOTS && call.q_type == BF16 && call.keys.type == BF16 && call.values.type == BF16;
}

struct Unit {
    int64_t sequence, head, heads, first, tokens;  // kv heads; first: of the sequence's rows in this step
    int64_t from, to;                              // positions whose keys it takes
    float* state;                                  // where its State is kept, if it is one part of several; else null
};

void check_pool([[maybe_unused]] const Pool& pool, [[maybe_unused]] int64_t blocks) {
#ifdef LORA_CHECKED
    check_memory(pool.data, blocks * pool.block);  // blocks are contiguous
#endif
}

constexpr size_t whole_panels(int64_t dim) { return ((size_t)dim + 2 * W - 1) / (2 * W) * 2 * W; }

// Scratch memory of one unit; rows are padded to whole vectors.
struct Room {
    size_t kd, vd;  // padded widths
    float *q, *score, *keys, *values;
    Room(std::vector<float>& memory, size_t rows, int64_t key_dim, int64_t value_dim)
        : kd(whole_panels(key_dim)), vd(whole_panels(value_dim)) {
        float* p = scratch(memory, rows * (kd + KEYS) + KEYS * (kd + vd) + gaps(4) + 2 * State::floats(rows, vd));
        auto take = [&](size_t n) { return part_of(p, n); };
        keys = take(KEYS * kd);
        values = take(KEYS * vd);
        score = take(rows * KEYS);
        q = take(rows * kd);
        states = p;
        floats = 2 * State::floats(rows, vd);
    }
    // Memory for two states of a unit.
    float* for_states() {
        forget_gaps(states, floats);
        return states;
    }

  private:
    float* states;
    size_t floats;
};

// The rows of a unit: those of its first kv head, then those of the next.
struct Rows {
    int64_t share, rows, count, start, length, position;  // rows: of one kv head; position: of row 0's token
    const Unit& unit;
    Rows(const AttentionCall& call, const Unit& unit) : share(call.heads / call.kv_heads), unit(unit) {
        rows = unit.tokens * share;
        count = rows * unit.heads;
        start = call.query_start[unit.sequence];
        length = call.query_start[unit.sequence + 1] - start;
        position = call.context[unit.sequence] - length + unit.first;
    }
    int64_t token(int64_t r) const { return start + unit.first + r % rows / share; }
    int64_t head(int64_t r) const { return (unit.head + r / rows) * share + r % share; }
    Sight sight(const AttentionCall& call) const { return {call.window, position, share}; }
    // Where few rows use widened values straight from registers, their outputs are in the order of `load_two`.
    bool few() const { return rows <= TILE; }
    bool direct(const AttentionCall& call) const { return few() && call.values.dim % (2 * W) == 0; }
};

// Writes the outputs of a unit whose softmax is complete.
void write(const AttentionCall& call, const Rows& own, State total) {
    size_t vd = call.values.dim;
    if (own.direct(call) && !in_pairs(call))
        with_type(call.values.type, [&](auto* type) {
            using T_ = std::remove_pointer_t<decltype(type)>;
            for (float* p = total.out; p < total.out + own.count * total.width; p += 2 * W) sort_two<T_>(p, Lanes{});
        });
    with_type(call.q_type, [&](auto* type) {
        using T_ = std::remove_pointer_t<decltype(type)>;
        for (int64_t r = 0; r < own.count; r++) {
            T_* to = (T_*)call.out + (own.token(r) * call.heads + own.head(r)) * vd;
            float *out = total.out + r * total.width, sum = ::total(load(total.sum + r * W));
            size_t d = 0;
            for (; d + W <= vd; d += W) store(to + d, load(out + d) / sum);
            if (d < vd) store_part(to + d, load(out + d) / sum, vd - d);
        }
    });
}

// Attention of one unit. False where the block table names a block that is not in the pool.
bool attend(const AttentionCall& call, const Unit& unit, Room& room) {
    Rows own(call, unit);
    int64_t rows = own.rows;
    size_t kd = call.keys.dim, vd = call.values.dim;
    float scale = (float)call.scale * (call.softcap > 0 ? 1.0f : LOG2E);

    auto head = [&](int64_t r) { return own.head(r); };
    float *memory = room.for_states(), *kept = unit.state;
    State total(memory, own.count, room.vd), part(kept ? kept : memory, own.count, room.vd);
    part.clear(nullptr, head);
    bool pairs = in_pairs(call);
    with_type(call.q_type, [&](auto* type) {
        for (int64_t r = 0; r < own.count; r++) {
            auto from = (decltype(type))(call.q + own.token(r) * call.q_token + own.head(r) * call.q_head);
            float* q = room.q + r * room.kd;
            std::fill(q, q + room.kd, 0.0f);
            if (pairs) memcpy(q, from, kd * sizeof(Bf16));
            else widen_row(from, kd, q);
        }
    });

    Sight sight = own.sight(call);
    const int32_t* table = call.block_table + unit.sequence * call.table_width;
    int64_t end = std::min(unit.to, own.position + unit.tokens);
    int64_t first = std::max(unit.from, sight.oldest(0) / KEYS * KEYS);
    const char *places[2][2][KEYS];  // [this or next tile][keys, values]
    bool sound = true, merged = false, few = own.few(), direct = own.direct(call);
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
        Prefetch next_keys(places[which ^ 1][0], unit.heads * call.keys.head);
        Prefetch next_values(places[which ^ 1][1], unit.heads * call.values.head);
        for (int64_t h = 0; h < unit.heads; h++) {
            Places keys{places[which][0], h * call.keys.head}, values{places[which][1], h * call.values.head};
            float *q = room.q + h * rows * room.kd, *out = part.out + h * rows * room.vd, *score = room.score;
            Running run = {out, part.top + h * rows, part.sum + h * rows * W, room.vd};
            auto soften_all = [&](auto pairs_) {
                for (int64_t r = 0; r < rows; r += TILE) {
                    int64_t some = std::min<int64_t>(TILE, rows - r);
                    soften<decltype(pairs_)::value>(scale, (float)call.softcap, sight, r, some, first, score, run);
                }
            };
            if constexpr (DOTS)
                if (pairs) {
                    if (few) {
                        compare<Bf16, true>(rows, q, room.kd, keys, next_keys, n, kd, score);
                    } else {
                        load_keys<Bf16, true>(keys, next_keys, n, kd, room.keys);
                        multiply_pairs<false>(rows, q, room.kd, room.keys, KEYS, (kd + 1) / 2, score);
                    }
                    soften_all(std::true_type{});
                    if (direct) {
                        weigh_pairs(rows, score, values, next_values, n, vd, out, room.vd);
                    } else {
                        load_values_in_pairs(values, next_values, n, vd, room.vd, room.values);
                        multiply_pairs<true>(rows, score, KEYS, room.values, room.vd, (n + 1) / 2, out);
                    }
                    continue;
                }
            with_type(call.keys.type, [&](auto* type) {
                using T_ = std::remove_pointer_t<decltype(type)>;
                if (few) return compare<T_, false>(rows, q, room.kd, keys, next_keys, n, kd, score);
                load_keys<T_, false>(keys, next_keys, n, kd, room.keys);
                multiply<false>(rows, q, room.kd, room.keys, KEYS, kd, score);
            });
            soften_all(std::false_type{});
            with_type(call.values.type, [&](auto* type) {
                using T_ = std::remove_pointer_t<decltype(type)>;
                if (direct) return weigh<T_>(rows, score, values, next_values, n, vd, out, room.vd);
                load_values<T_>(values, next_values, n, vd, room.vd, room.values);
                multiply<true>(rows, score, KEYS, room.values, room.vd, KEYS, out);
            });
        }
        bool last = first + KEYS >= end;
        if (unit.state || !(last || (first + KEYS) % PART == 0)) continue;
        if (last && !merged && !call.sinks) {
            write(call, own, part);  // as if merged into none
            return true;
        }
        if (!merged) total.clear(call.sinks, head);
        merged = true;
        total.merge(part);
        if (last) write(call, own, total);
        else part.clear(nullptr, head);
    }
    return true;
}

// Outputs of a unit whose parts were units of their own: these, in order.
void combine(const AttentionCall& call, const Unit* parts, size_t count, Room& room) {
    Rows own(call, parts[0]);
    float* memory = room.for_states();
    State total(memory, own.count, room.vd);
    total.clear(call.sinks, [&](int64_t r) { return own.head(r); });
    for (size_t i = 0; i < count; i++) {
        float* kept = parts[i].state;
        total.merge(State(kept, own.count, room.vd));
    }
    write(call, own, total);
}

// Units that are cut into the parts of their contexts.
struct Cuts {
    std::vector<Unit> parts;
    std::vector<size_t> begins;  // of each cut unit's parts, and their end

    // Replaces units of several parts by these.
    void cut(const AttentionCall& call, std::vector<Unit>& units) {
        static thread_local std::vector<float> memory;
        size_t floats = 0, vd = whole_panels(call.values.dim);
        std::vector<Unit> whole;
        for (const Unit& unit : units) {
            Rows own(call, unit);
            int64_t begin = own.sight(call).oldest(0) / PART * PART;
            if (unit.to - begin <= PART) {
                whole.push_back(unit);
                continue;
            }
            begins.push_back(parts.size());
            for (int64_t from = begin; from < unit.to; from += PART) {
                parts.push_back(unit);
                parts.back().from = from;
                parts.back().to = std::min(unit.to, from + PART);
                floats += State::floats(own.count, vd);
            }
        }
        begins.push_back(parts.size());
        float* state = scratch(memory, floats);
        for (Unit& part : parts) {
            part.state = state;
            state += State::floats(Rows(call, part).count, vd);
        }
        units.swap(whole);
        units.insert(units.end(), parts.begin(), parts.end());
    }
};

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
    Cuts cuts;
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
            int64_t end = context - length + first + tokens;
            for (int64_t h = 0; h < call->kv_heads; h += heads)
                units.push_back({i, h, std::min(heads, call->kv_heads - h), first, tokens, 0, end, nullptr});
            rows = std::max(rows, heads * tokens * share);
        }
        work += length ? context * call->kv_heads * (length * share + 16) : 0;
    }
    if ((int64_t)units.size() < call->threads) cuts.cut(*call, units);
    // The longest contexts first, so that no thread works on a long one alone at the end.
    std::stable_sort(units.begin(), units.end(), [](const Unit& a, const Unit& b) { return a.to - a.from > b.to - b.from; });
    std::atomic<int64_t> next{0}, next_cut{0}, wrong{0};
    parallel(work < 4096 ? 1 : (int)call->threads, [&](int, int threads) {
        static thread_local std::vector<float> mine;
        Room room(mine, rows, call->keys.dim, call->values.dim);
        for (int64_t u; (u = next.fetch_add(1, std::memory_order_relaxed)) < (int64_t)units.size();)
            if (!attend(*call, units[u], room)) wrong = units[u].sequence + 1;
        if (cuts.parts.empty()) return;
        if (threads > 1) barrier();
        for (size_t u; (u = (size_t)next_cut.fetch_add(1, std::memory_order_relaxed)) + 1 < cuts.begins.size();)
            combine(*call, &cuts.parts[cuts.begins[u]], cuts.begins[u + 1] - cuts.begins[u], room);
    });
    return wrong;
}
