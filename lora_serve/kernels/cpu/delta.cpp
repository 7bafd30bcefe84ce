// Low-rank deltas of a mixed batch: each row uses its own adapter, through the pointer tables.
//
// Two phases with a barrier between them. Shrink (x Aᵀ) is split over threads by (segment, rows, ranks), expand (· B)
// by columns of the outputs: no two threads write the same element, so segments may overlap. Weights are widened in
// registers; a segment's weights are read from memory once, whatever its number of rows.
#include <algorithm>

#include "calls.h"
#include "simd.h"

namespace {

struct Segment {
    int64_t first, rows, slot, ranks;  // ranks: sum over all modules
    float weight;
    size_t shrunk;  // offset of its result of shrink [rows, ranks]
};

// sum + x * w: a vector of each, or with `DOTS` one of pairs of bf16 (2W numbers)
template <class X> constexpr size_t STEP = DOTS && std::is_same_v<X, Bf16> ? 2 * W : W;  // inputs at once
template <class X, class T_> INLINE V multiply_add(V sum, const X* x, const T_* w) {
    if constexpr (STEP<X> == W) return sum + load(x) * load(w);
    else return dot_pair(sum, (U)load((const float*)x), (U)load((const float*)w));
}

// acc[T, R] (a vector each) += x[T, from:to] @ a[R, from:to].T by lanes; rows of `a` are n long, `next` is prefetched
template <class X, class T_, int T, int R>
void dots(const X* x, size_t ldx, const T_* a, const T_* next, size_t n, size_t from, size_t to, float* acc) {
    constexpr size_t S = STEP<X>;
    V sum[T * R];
    UNROLL
    for (int i = 0; i < T * R; i++) sum[i] = from ? load(acc + i * W) : V{};
    size_t k = from;
    for (; k + S <= to; k += S) {
        UNROLL
        for (int r = 0; r < R; r++)
            if (k * sizeof(T_) % 64 == 0) __builtin_prefetch(next + r * n + k, 0, 2);
        UNROLL
        for (int t = 0; t < T; t++)
            UNROLL
            for (int r = 0; r < R; r++) sum[t * R + r] = multiply_add(sum[t * R + r], x + t * ldx + k, a + r * n + k);
    }
    if (k < to)
        for (int r = 0; r < R; r++) {
            T_ w[S] = {};
            memcpy(w, a + r * n + k, (to - k) * sizeof(T_));
            UNROLL
            for (int t = 0; t < T; t++) {
                X part[S] = {};
                memcpy(part, x + t * ldx + k, (to - k) * sizeof(X));
                sum[t * R + r] = multiply_add(sum[t * R + r], part, w);
            }
        }
    UNROLL
    for (int i = 0; i < T * R; i++) store(acc + i * W, sum[i]);
}

// out[T, R] = weight * (acc[T, R] summed over lanes)
template <int T, int R> void finish(const float* acc, float weight, float* out, size_t ldo) {
    for (int first = 0; first < T * R; first += W) {
        V lanes[W] = {};
        UNROLL
        for (int i = 0; i < W; i++)
            if (first + i < T * R) lanes[i] = load(acc + (first + i) * W);
        float sum[W];
        store(sum, sums(lanes) * weight);
        for (int i = first; i < std::min(T * R, first + W); i++) out[i / R * ldo + i % R] = sum[i - first];
    }
}

// out[rows, ranks] = weight * x[rows, n] @ a[ranks, n].T; acc holds rows * ranks vectors; `after` is prefetched after
// `a`
template <class X, class T_>
void shrink_tile(int rows, const X* x, size_t ldx, const T_* a, const T_* after, size_t n, int64_t ranks,
                 float weight, float* out, size_t ldo, float* acc) {
    with_rows(rows, [&](auto t) {
        constexpr int T = decltype(t)::value;
        constexpr int R = T == 1 ? 8 : T == 2 ? (W == 16 ? 8 : 4) : T <= W / 4 ? 4 : 2;  // T * R sums fit the registers
        constexpr size_t DEPTH = T < 8 ? 2048 : 1024;                        // inputs: x stays cached for all ranks
        for (size_t k = 0; k < n; k += DEPTH) {
            size_t to = std::min(n, k + DEPTH);
            int64_t r = 0;
            for (; r + R <= ranks; r += R)
                dots<X, T_, T, R>(x, ldx, a + r * n, r + 2 * R <= ranks ? a + (r + R) * n : after, n, k, to, acc + r * T * W);
            for (; r < ranks; r++) dots<X, T_, T, 1>(x, ldx, a + r * n, a + (r + 1) * n, n, k, to, acc + r * T * W);
        }
        int64_t r = 0;
        for (; r + R <= ranks; r += R) finish<T, R>(acc + r * T * W, weight, out + r, ldo);
        for (; r < ranks; r++) finish<T, 1>(acc + r * T * W, weight, out + r, ldo);
    });
}

// out[T, C * W] += h[T, ranks] @ b[ranks, C * W]; `next` is prefetched, if there is one
template <class T_, class O, int T, int C, bool NEXT>
void expand_tile(const float* h, size_t ldh, const T_* b, const T_* next, size_t ldb, size_t ranks, O* out, size_t ldo) {
    V sum[T][C] = {};
    for (size_t r = 0; r < ranks; r++) {
        UNROLL
        for (int c = 0; c < C; c++) {
            V w = load(b + r * ldb + c * W);
            if (NEXT && c * W * sizeof(T_) % 64 == 0) __builtin_prefetch(next + r * ldb + c * W, 0, 2);
            UNROLL
            for (int t = 0; t < T; t++) sum[t][c] += w * h[t * ldh + r];
        }
    }
    UNROLL
    for (int t = 0; t < T; t++)
        UNROLL
        for (int c = 0; c < C; c++) {
            O* at = out + t * ldo + c * W;
            store(at, load(at) + sum[t][c]);
        }
}

// out[rows, from : to] += h[rows, ranks] @ b[ranks, from : to]; `after` is prefetched after `b`
template <class T_, class O>
void expand(const float* h, size_t ldh, const T_* b, const T_* after, size_t ldb, size_t ranks, O* out, size_t ldo,
            int64_t rows, size_t from, size_t to, float* wide) {
    after += from;
    if (rows <= TILE)
        with_rows((int)rows, [&](auto t) {
            constexpr int T = decltype(t)::value;
            constexpr int C = T <= REGISTERS / 16 ? 8 : T <= REGISTERS / 8 ? 4 : 2;
            for (; from + C * W <= to; from += C * W) {
                bool more = from + 2 * C * W <= to;
                const T_* next = more ? b + from + C * W : after;
                expand_tile<T_, O, T, C, true>(h, ldh, b + from, next, ldb, ranks, out + from, ldo);
            }
        });
    constexpr size_t N = 2 * W;
    for (; from < to; from += N) {  // a panel of columns, widened once for all rows
        size_t n = std::min(N, to - from);
        for (size_t r = 0; r < ranks; r++) {
            if (n <= W) store(wide + r * N + W, V{});
            widen_row(b + r * ldb + from, n, wide + r * N);
        }
        for (int64_t row = 0; row < rows; row += TILE) {
            O* at = out + row * ldo + from;
            for (int64_t next = TILE; next < std::min<int64_t>(2 * TILE, rows - row); next++)
                __builtin_prefetch(at + next * ldo, 1);
            with_rows((int)std::min<int64_t>(TILE, rows - row), [&](auto t) {
                constexpr int T = decltype(t)::value;
                const float *own = h + row * ldh, *none = nullptr;
                if (n == N) return expand_tile<float, O, T, 2, false>(own, ldh, wide, none, N, ranks, at, ldo);
                float sum[TILE * N] = {};
                expand_tile<float, float, T, 2, false>(own, ldh, wide, none, N, ranks, sum, N);
                for (int i = 0; i < T; i++) add_row(at + i * ldo, n, sum + i * N);
            });
        }
    }
}

struct Work {
    const DeltaCall& call;
    const Group& group;
    const std::vector<Segment>& segments;
    float* shrunk;
    int64_t shrink_cost, expand_cost;
    std::vector<int64_t> column_cost;  // [modules]

    int64_t rank(int64_t m, const Segment& s) const { return group.rank[m * group.slots + s.slot]; }

    const Segment& following(const Segment& s) const { return &s == &segments.back() ? s : *(&s + 1); }

    // The index 0..n, rounded to `step`, of the item at position `at` of a cost axis; items begin at `begin` and cost
    // `each`. Threads take equal shares of the axis.
    static int64_t cut(int64_t at, int64_t begin, int64_t each, int64_t n, int64_t step) {
        if (at <= begin) return 0;
        return std::min(n, ((at - begin) / each + step / 2) / step * step);
    }
    static int64_t share(int64_t total, int thread, int threads) { return total * thread / threads; }

    void shrink_share(int thread, int threads, float* x) const {
        int64_t lo = share(shrink_cost, thread, threads), hi = share(shrink_cost, thread + 1, threads), at = 0;
        size_t in = (size_t)group.in, ldx = padded(in);
        for (const Segment& s : segments)
            for (int64_t row = 0; row < s.rows; row += TILE) {
                int rows = (int)std::min<int64_t>(TILE, s.rows - row);
                int64_t each = TILE + rows, from = cut(lo, at, each, s.ranks, 8);
                int64_t to = thread + 1 == threads ? s.ranks : cut(hi, at, each, s.ranks, 8);
                at += each * s.ranks;
                if (from >= to) continue;
                bool pairs = DOTS && call.type == BF16 && group.type == BF16;
                if (!pairs)
                    with_type(call.type, [&](auto* type) {
                        auto* source = (decltype(type))call.x + (s.first + row) * call.x_stride;
                        for (int t = 0; t < rows; t++) widen_row(source + t * call.x_stride, in, x + t * ldx);
                    });
                float *out = shrunk + s.shrunk + row * s.ranks, *acc = x + TILE * ldx;
                for (int64_t m = 0, offset = 0; m < group.modules; offset += rank(m, s), m++) {
                    int64_t begin = std::max(from, offset), end = std::min(to, offset + rank(m, s));
                    if (begin >= end) continue;
                    with_type(group.type, [&](auto* type) {
                        auto* a = (decltype(type))group.a[m * group.slots + s.slot] + (begin - offset) * in;
                        bool last = m + 1 == group.modules;
                        auto* after = (decltype(type))group.a[last ? following(s).slot : (m + 1) * group.slots + s.slot];
                        if constexpr (DOTS && std::is_same_v<decltype(a), Bf16*>)
                            if (pairs) {
                                auto* own = (const Bf16*)call.x + (s.first + row) * call.x_stride;
                                shrink_tile(rows, own, (size_t)call.x_stride, a, after, in, end - begin, s.weight,
                                            out + begin, s.ranks, acc);
                                return;
                            }
                        shrink_tile(rows, x, ldx, a, after, in, end - begin, s.weight, out + begin, s.ranks, acc);
                    });
                }
            }
    }

    void expand_share(int thread, int threads, float* wide) const {
        int64_t lo = share(expand_cost, thread, threads), hi = share(expand_cost, thread + 1, threads), at = 0;
        for (int64_t m = 0; m < group.modules; m++) {
            int64_t each = column_cost[m], columns = group.out[m];
            if (each == 0) continue;
            int64_t from = cut(lo, at, each, columns, 64);
            int64_t to = thread + 1 == threads ? columns : cut(hi, at, each, columns, 64);
            at += each * columns;
            if (from >= to) continue;
            DeltaOutput output = call.output[m];
            for (const Segment& s : segments) {
                int64_t ranks = rank(m, s), offset = 0;
                if (ranks == 0) continue;
                for (int64_t before = 0; before < m; before++) offset += rank(before, s);
                with_type(group.type, [&](auto* type) {
                    auto* b = (decltype(type))group.b[m * group.slots + s.slot];
                    auto* after = (decltype(type))group.b[m * group.slots + following(s).slot];
                    with_type(call.type, [&](auto* element) {
                        auto* out = (decltype(element))output.data + s.first * output.stride;
                        expand(shrunk + s.shrunk + offset, s.ranks, b, after, columns, ranks, out, output.stride, s.rows,
                               from, to, wide);
                    });
                });
            }
        }
    }
};

void check_call([[maybe_unused]] const DeltaCall& call) {
#ifdef LORA_CHECKED
    const Group& group = *call.group;
    int64_t entries = group.modules * group.slots, each = bytes_of(call.type), weights = bytes_of(group.type);
    check_memory(&group, (int64_t)sizeof group);
    check_memory(&group, (int64_t)sizeof group + group.modules * 8);
    check_memory(&call, (int64_t)sizeof call + group.modules * (int64_t)sizeof(DeltaOutput));
    check_memory(group.a, entries * 8);
    check_memory(group.b, entries * 8);
    check_memory(group.rank, entries * 4);
    for (const void* part : {(const void*)call.start, (const void*)call.end, (const void*)call.slot, (const void*)call.weight})
        check_memory(part, call.segments * 4);
    check_rows(call.x, call.tokens, call.x_stride * each, group.in * each);
    for (int64_t m = 0; m < group.modules; m++) {
        check_rows(call.output[m].data, call.tokens, call.output[m].stride * each, group.out[m] * each);
        for (int64_t i = 0; i < call.segments; i++) {
            int64_t entry = m * group.slots + call.slot[i];
            if (call.slot[i] < 0 || call.slot[i] >= group.slots) continue;  // the call says so itself
            check_memory((const void*)group.a[entry], group.rank[entry] * group.in * weights);
            check_memory((const void*)group.b[entry], group.rank[entry] * group.out[m] * weights);
        }
    }
#endif
}

}  // namespace

// Returns 0, or 1 + index of the first segment that lies outside the batch or the tables (then nothing was written).
extern "C" int64_t lora_delta(const DeltaCall* call) {
    static thread_local std::vector<Segment> segments;
    static thread_local std::vector<float> memory;
    const Group& group = *call->group;
    check_call(*call);
    segments.clear();
    Work work{*call, group, segments, nullptr, 0, 0, std::vector<int64_t>(group.modules)};
    size_t floats = 0, weights = 0, most = 0;
    for (int64_t i = 0; i < call->segments; i++) {
        Segment s{call->start[i], call->end[i] - call->start[i], call->slot[i], 0, call->weight[i], floats};
        if (s.first < 0 || s.rows < 0 || call->end[i] > call->tokens) return i + 1;
        if (s.slot < 0 || s.slot >= group.slots) return i + 1;
        if (s.rows == 0) continue;
        int64_t tiles = (s.rows + TILE - 1) / TILE;
        for (int64_t m = 0; m < group.modules; m++) {
            int64_t rank = work.rank(m, s);
            s.ranks += rank;
            work.column_cost[m] += rank * (tiles * TILE + s.rows);
            weights += rank * (group.in + group.out[m]) * (tiles + 1);
            most = std::max<size_t>(most, rank);
        }
        work.shrink_cost += s.ranks * (tiles * TILE + s.rows);
        floats += s.rows * s.ranks;
        if (s.ranks) segments.push_back(s);
    }
    for (int64_t m = 0; m < group.modules; m++) work.expand_cost += work.column_cost[m] * group.out[m];
    if (segments.empty()) return 0;
    work.shrunk = scratch(memory, floats);
    size_t own = std::max(TILE * padded(group.in) + most * TILE * W, most * 2 * W);
    constexpr size_t SMALL = 1 << 15;  // weights; with fewer, one thread is done before another is awake
    parallel(weights < SMALL ? 1 : (int)call->threads, [&](int thread, int threads) {
        static thread_local std::vector<float> mine;
        float* room = scratch(mine, own);
        work.shrink_share(thread, threads, room);
        if (threads > 1) barrier();
        work.expand_share(thread, threads, room);
    });
    return 0;
}
