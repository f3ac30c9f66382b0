// One linear on its own: y = x Wᵀ + bias, of one matrix or a low-rank pair.
#include <cstring>
#include <exception>

#include "tiles.h"

namespace llmk {
namespace {

// Rows of activations as floats.
const float* as_floats(const void* x, int32_t type, int64_t count, Arena& arena) {
    if (type == LLMK_TYPE_F32) return static_cast<const float*>(x);
    float* floats = arena.take<float>(count);
    kernels().to_floats(static_cast<const uint16_t*>(x), count, floats);
    return floats;
}

struct Call {
    const llmk_linear& linear;
    int64_t m;
    void* y;
    int32_t y_type;
    bool rounds_inputs;
};

int64_t out_features(const Call& call) {
    return call.linear.second.kind != LLMK_NONE ? call.linear.second.rows : call.linear.first.rows;
}

void fill_all(Team& team, const InputSet& inputs, int64_t m) {
    const int64_t rows = larger(1, ceil_div(m, team.threads() * 4));
    team.run(ceil_div(m, rows), [&](int64_t chunk) {
        inputs.fill(chunk * rows, smaller((chunk + 1) * rows, m));
    });
}

int64_t chunk_blocks(const llmk_matrix& w, int64_t m, int threads) {
    const int64_t fair = ceil_div(blocks(w), threads * 4), cached = larger(1, 2048 / m);
    return larger(1, smaller(fair, cached));
}

// y [M, rows] in floats.
void multiply_all(Team& team, const llmk_matrix& w, const Inputs& x, float* y) {
    const int64_t step = chunk_blocks(w, x.rows, team.threads());
    team.run(ceil_div(blocks(w), step), [&](int64_t chunk) {
        const int64_t first = chunk * step;
        kernels().multiply(w, x, first, smaller(first + step, blocks(w)), y + first * kBlock, w.rows);
    });
}

void finish_row(const Call& call, const float* sums, int64_t row) {
    const int64_t outputs = out_features(call);
    float* y = const_cast<float*>(sums) + row * outputs;
    if (call.linear.bias != nullptr) kernels().add(call.linear.bias, nullptr, outputs, y);
    if (call.y_type == LLMK_TYPE_BF16) kernels().to_bf16(y, outputs, outputs, static_cast<uint16_t*>(call.y) + row * outputs);
}

void apply_rows(const Call& call, const void* x, int32_t x_type, int threads) {
    static thread_local Arena arena;
    arena.clear();
    const llmk_matrix &first = call.linear.first, &second = call.linear.second;
    const bool low_rank = second.kind != LLMK_NONE;
    const int64_t m = call.m, rows = low_rank ? second.rows : first.rows;
    const float* floats = as_floats(x, x_type, m * first.columns, arena);
    float* y = call.y_type == LLMK_TYPE_F32 ? static_cast<float*>(call.y) : arena.take<float>(m * rows);
    float* middle = low_rank ? arena.take<float>(m * first.rows) : nullptr;
    InputSet outer(m, first.columns), inner(m, first.rows);
    outer.add(arena, first);
    outer.read(floats, first.columns);
    if (low_rank) {
        inner.add(arena, second);
        inner.read(middle, first.rows);
    }
    run_team(threads, [&](Team& team) {
        fill_all(team, outer, m);
        multiply_all(team, first, outer.of(first), low_rank ? middle : y);
        if (low_rank) {
            fill_all(team, inner, m);
            multiply_all(team, second, inner.of(second), y);
        }
        team.run(m, [&](int64_t row) { finish_row(call, y, row); });
    });
}

// A part of y, in its type.
void finish_part(const Call& call, const Part& part) {
    const int64_t outputs = out_features(call);
    for (int64_t i = 0; i < part.rows; ++i) {
        float* sums = part.sums + i * part.stride;
        if (call.linear.bias != nullptr) kernels().add(call.linear.bias + part.first_output, nullptr, part.outputs, sums);
        const int64_t at = (part.first_row + i) * outputs + part.first_output;
        if (call.y_type == LLMK_TYPE_BF16)
            kernels().to_bf16(sums, part.outputs, part.outputs, static_cast<uint16_t*>(call.y) + at);
        else
            std::memcpy(static_cast<float*>(call.y) + at, sums, static_cast<size_t>(part.outputs) * sizeof(float));
    }
}

void apply_tiles(const Call& call, const void* x, int32_t x_type, int threads) {
    static thread_local Arena arena;
    arena.clear();
    const llmk_matrix &first = call.linear.first, &second = call.linear.second;
    const bool low_rank = second.kind != LLMK_NONE;
    const int64_t columns = first.columns;
    TileSet outer(call.m, columns, call.rounds_inputs), inner(call.m, first.rows, call.rounds_inputs);
    outer.add(arena, first);
    if (low_rank) inner.add(arena, second);
    float* middle = low_rank ? arena.take<float>(call.m * first.rows) : nullptr;
    run_team(threads, [&](Team& team) {
        run_rows(team, call.m, [&](int64_t row) {
            static thread_local Arena converted;
            converted.clear();
            const auto* begin = static_cast<const uint8_t*>(x) + row * columns * type_bytes(x_type);
            outer.fill_row(row, as_floats(begin, x_type, columns, converted));
        });
        const Factor factors[] = {{&first, &outer}, {&second, &inner}};
        const auto finish = [&](int, const Part& part) { finish_part(call, part); };
        if (!low_rank) return multiply_tiles(team, factors, 1, finish);
        multiply_tiles(team, factors, 1, [&](int, const Part& part) { copy_part(part, middle, first.rows); });
        run_rows(team, call.m, [&](int64_t row) { inner.fill_row(row, middle + row * first.rows); });
        multiply_tiles(team, factors + 1, 1, finish);
    });
}

void apply(const Call& call, const void* x, int32_t x_type, int threads) {
    if (call.m >= many_rows(call.linear.first) || !call.rounds_inputs) apply_tiles(call, x, x_type, threads);
    else apply_rows(call, x, x_type, threads);
}

}  // namespace
}  // namespace llmk

LLMK_API const char* llmk_apply(
    const llmk_linear* linear, const void* x, int32_t x_type, int64_t m, void* y, int32_t y_type,
    int32_t rounds_inputs, int threads) {
    try {
        if (m > 0) llmk::apply({*linear, m, y, y_type, rounds_inputs != 0}, x, x_type, threads);
    } catch (const std::exception&) {
        return "out of memory";
    }
    return nullptr;
}
