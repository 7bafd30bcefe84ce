// The arguments of every function that Python calls: one struct each, described here and nowhere else.
//
// calls.py reads this file and packs the structs by it, and the library is asked for their sizes when it is loaded. So
// the grammar is narrow: a member is a pointer (one to a declaration), an int64_t, a double or a struct from further
// up. All of these take 8 bytes, so there is no padding. The last member may be an array without a length, of int64_t
// or of a struct from further up: it follows the struct in memory.
//
// Types are `Type` (simd.h), kinds `Kind` (panels.h). Strides of the attention calls are in bytes, all others in
// elements.
#pragma once
#include <cstdint>

namespace {

// --- attention.cpp ---

// Keys or values of all blocks: strides of a block, a position in it and a head; width of a head.
struct Pool {
    char* data;
    int64_t block, position, head, type, dim;
};

struct WriteCall {
    Pool keys, values;
    const char* k;
    int64_t k_token, k_head;  // strides
    const char* v;
    int64_t v_token, v_head;
    const int64_t* index;  // [tokens]
    int64_t tokens, kv_heads, blocks, block_size, threads;
};

struct AttentionCall {
    Pool keys, values;
    const char* q;
    int64_t q_token, q_head, q_type;  // strides
    char* out;
    const int32_t* query_start;
    const int32_t* context;
    const int32_t* block_table;  // [sequences, table_width]
    int64_t table_width, sequences, tokens, heads, kv_heads, blocks, block_size;
    int64_t window;  // 0: none
    int64_t threads;
    const float* sinks;  // [heads], or null
    double scale;
    double softcap;  // 0: none
};

// --- delta.cpp ---

// What a call reads of a `DeltaGroup`; packed once.
struct Group {
    const int64_t* a;     // [modules, slots]
    const int64_t* b;     // [modules, slots]
    const int32_t* rank;  // [modules, slots]
    int64_t modules, slots, in, type;
    int64_t out[];  // [modules]
};

struct DeltaOutput {
    void* data;
    int64_t stride;
};

struct DeltaCall {
    const Group* group;
    const void* x;
    int64_t x_stride, tokens, type, threads, segments;
    const int32_t* start;
    const int32_t* end;
    const int32_t* slot;
    const float* weight;
    DeltaOutput output[];  // [modules]
};

// --- matmul.cpp ---

struct LinearOutput {
    const char* weight;
    const float* scale;  // INT8, INT4: [panels * COLUMNS]
    const char* bias;    // of the rows' type, or null
    char* y;
    int64_t stride, out;
};

struct LinearCall {
    const char* x;
    int64_t stride, rows, in, type, threads, kind, outputs;
    LinearOutput output[];  // [outputs]
};

// Expert e's weight, scale and bias lie e strides behind the first one's.
struct GroupedLinearCall {
    const char* x;
    int64_t stride, rows, in, out, type, threads, kind, experts;
    const char* weight;
    int64_t weight_stride;  // in bytes
    const float* scale;     // INT8, INT4: [experts, panels * COLUMNS]
    const char* bias;       // [experts, out] of the rows' type, or null
    char* y;                // [rows, out]
    const int64_t* end;     // [experts]
};

// --- packing.cpp ---

struct PackCall {
    char* weight;  // [out, in], contiguous; packed in INT4 it is integers (bytes), unpacked from INT8 and INT4 float32
    int64_t out, in;
    int64_t type;  // of the weights that are packed
    int64_t kind;
    char* packed;
    float* scale;        // INT8, INT4: [panels * COLUMNS]
    const char* levels;  // packed in INT4: [out, in / GROUP], of two bytes
    int64_t threads;
};

struct RowsCall {
    const char* packed;
    int64_t out, in, kind;
    int64_t size;        // of a weight in bytes
    const int64_t* ids;  // [count]
    int64_t count;
    char* rows;  // [count, in]
    int64_t threads;
};

// --- pointwise.cpp ---

struct NormCall {
    const char* x;
    const char* weight;
    char* y;
    int64_t rows, width, x_stride, type, weight_type, plus_one, threads;
    double eps;
};

struct GatedCall {
    const char* gate;
    const char* up;
    char* y;
    int64_t rows, width, gate_stride, up_stride, type, activation, threads;
};

// Queries or keys: strides of a token and of a head, number of heads.
struct Heads {
    const char* data;
    int64_t token, head, heads;
};

struct RopeCall {
    Heads q, k;
    char* q_out;
    char* k_out;
    const char* cosine;
    const char* sine;
    int64_t table_stride;  // of a token's cosines, and of its sines
    int64_t tokens, dim, type, table_type, threads;
};

struct AddCall {
    const char* x;
    const char* y;
    char* sum;
    int64_t count, type, threads;
};

}  // namespace
