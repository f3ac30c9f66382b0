// The tokens of prompts through all layers in one call, some hundred rows at a time.
//
// A run takes the same tokens of every sequence: M rows. Its keys and values go into the cache before its queries attend, so
// that runs follow each other as calls would.
//
// Shapes: M rows, H hidden, N heads, D head_dim.
#include <exception>
#include <utility>
#include <vector>

#include "model.h"
#include "tiles.h"

namespace llmk {
namespace {

constexpr int64_t kRunRows = 512;     // memory against how often weights are read
constexpr int64_t kQueryTokens = 32;  // of a chunk of attention

// What is between two factors, of a low rank or of an adapter.
struct Inner {
    const llmk_matrix* w = nullptr;  // the first one
    float* y = nullptr;              // [M, rank]
    TileSet tiles;                   // the same to the second
    Inner() = default;
    Inner(Arena& arena, int64_t rows, bool rounds, const llmk_matrix& first, const llmk_matrix& second)
        : w(&first), y(arena.take<float>(rows * first.rows)), tiles(rows, first.rows, rounds) {
        tiles.add(arena, second);
    }
};

// Linears that take the same rows: these as tiles, and what comes before their last matrices.
struct Stage {
    const llmk_linear* linear[3] = {};
    int count = 0;
    TileSet outer;
    Inner low_rank[3], adapter[3];  // where there is one

    Stage() = default;
    Stage(Arena& arena, int64_t rows, bool rounds, std::initializer_list<const llmk_linear*> linears) {
        outer = TileSet(rows, (*linears.begin())->first.columns, rounds);
        for (const llmk_linear* more : linears) {
            outer.add(arena, more->first);
            if (is_low_rank(*more)) low_rank[count] = Inner(arena, rows, rounds, more->first, more->second);
            if (has_adapter(*more)) {
                outer.add(arena, more->adapter_a);
                adapter[count] = Inner(arena, rows, rounds, more->adapter_a, more->adapter_b);
            }
            linear[count++] = more;
        }
    }
    Factor last(int i) const {
        Factor factor{&last_matrix(*linear[i]), is_low_rank(*linear[i]) ? &low_rank[i].tiles : &outer};
        if (has_adapter(*linear[i])) {
            factor.added = &linear[i]->adapter_b;
            factor.added_x = &adapter[i].tiles;
        }
        return factor;
    }
};

struct LayerStages {
    Stage attention, output, feed, down;
};

// Some tokens of every sequence, and the room for them.
struct Run {
    const Call& prompt;
    int64_t first, tokens;  // of every sequence
    int64_t rows;
    std::vector<LayerStages> layers;
    Stage head;

    float* residual;  // [M, H]
    float* sines;     // [M, D / 2]
    float* cosines;
    float* heads;     // [M, queries + keys + values]
    float* attended;  // [M, queries]
    float* gated;     // [M, intermediate]
    uint8_t* restored;  // keys, then values [batch, heads, tokens, D] of a layer that keeps integers

    int64_t sequence(int64_t row) const { return row / tokens; }
    int64_t token(int64_t row) const { return first + row % tokens; }
    // Rows of the run that have logits, counted over all sequences.
    int64_t kept_tokens() const { return larger(0, smaller(tokens, first + tokens - (prompt.length - prompt.kept))); }
    int64_t kept_rows() const { return prompt.batch * kept_tokens(); }
    int64_t row_of_kept(int64_t kept) const {
        return kept / kept_tokens() * tokens + tokens - kept_tokens() + kept % kept_tokens();
    }
    int64_t logits_of_kept(int64_t kept) const {
        const int64_t row = row_of_kept(kept);
        return sequence(row) * prompt.kept + token(row) - (prompt.length - prompt.kept);
    }
};

// ---- products ----

// What is to be done with rows of a stage's inputs, made one by one by `source(row)`, until all last factors can multiply.
template <class Source>
void fill_stage(Team& team, const Stage& stage, int64_t rows, Source&& source) {
    run_rows(team, rows, [&](int64_t row) { stage.outer.fill_row(row, source(row)); });
    Factor factors[6];
    const Inner* inner[6];
    int count = 0;
    for (int i = 0; i < stage.count; ++i)
        for (const Inner* each : {&stage.low_rank[i], &stage.adapter[i]})
            if (each->w != nullptr) {
                factors[count] = {each->w, &stage.outer};
                inner[count++] = each;
            }
    if (count == 0) return;
    multiply_tiles(team, factors, count, [&](int i, const Part& part) { copy_part(part, inner[i]->y, inner[i]->w->rows); });
    run_rows(team, rows, [&](int64_t row) {
        for (int i = 0; i < count; ++i) inner[i]->tiles.fill_row(row, inner[i]->y + row * inner[i]->w->rows);
    });
}

template <class Done>
void multiply_stage(Team& team, const Stage& stage, Done&& done) {
    Factor factors[3];
    for (int i = 0; i < stage.count; ++i) factors[i] = stage.last(i);
    multiply_tiles(team, factors, stage.count, done);
}

void add_bias(const llmk_linear& linear, const Part& part) {
    if (linear.bias == nullptr) return;
    for (int64_t i = 0; i < part.rows; ++i)
        kernels().add(linear.bias + part.first_output, nullptr, part.outputs, part.sums + i * part.stride);
}

void add_to_residual(Team& team, const Run& run, const Stage& stage) {
    const float* bias = stage.linear[0]->bias;
    multiply_stage(team, stage, [&](int, const Part& part) {
        for (int64_t i = 0; i < part.rows; ++i)
            kernels().add(part.sums + i * part.stride, bias == nullptr ? nullptr : bias + part.first_output, part.outputs,
                          run.residual + (part.first_row + i) * run.prompt.model.hidden + part.first_output);
    });
}

// A thread's own row of the residual stream, normalized.
const float* normalized(const Run& run, const float* weight, int64_t row) {
    static thread_local std::vector<float> y;
    const int64_t hidden = run.prompt.model.hidden;
    y.resize(static_cast<size_t>(hidden));
    kernels().rms_norm(run.residual + row * hidden, weight, run.prompt.model.epsilon, hidden, y.data());
    return y.data();
}

// ---- attention ----

struct AttentionLayer {
    const Run& run;
    const llmk_layer& layer;
    const llmk_cache& cache;
    llmk_cache states;  // what is attended: the cache, or its integers restored
    int64_t d, queries, keys, group;

    AttentionLayer(const Run& r, const llmk_layer& l, const llmk_cache& c)
        : run(r), layer(l), cache(c), states(c), d(r.prompt.model.head_dim), queries(l.heads * d), keys(l.key_value_heads * d),
          group(l.heads / l.key_value_heads) {
        if (cache.bits == 0) return;
        states.bits = 0;
        states.token_stride = d;
        states.head_stride = (past() + run.tokens) * d;
        states.batch_stride = layer.key_value_heads * states.head_stride;
        states.keys = reinterpret_cast<int64_t>(run.restored);
        states.values = states.keys + run.prompt.batch * states.batch_stride * element_bytes(states);
    }

    int64_t past() const { return cache.length + run.first; }

    // One head of one sequence, all cached tokens.
    void restore(int64_t lane) const {
        const int64_t sequence = lane / layer.key_value_heads, head = lane % layer.key_value_heads;
        const Rounding rounding = rounding_of(cache, d);
        const int64_t from = sequence * cache.batch_stride + head * cache.head_stride;
        const int64_t to = sequence * states.batch_stride + head * states.head_stride, bytes = element_bytes(states);
        for (int64_t token = 0; token < past(); ++token)
            for (const auto& [records, floats] : {std::pair(cache.keys, states.keys), std::pair(cache.values, states.values)})
                kernels().restore_head(rounding, reinterpret_cast<const uint8_t*>(records + from + token * cache.token_stride),
                                       reinterpret_cast<uint8_t*>(floats + (to + token * d) * bytes));
    }

    float* row_of(int64_t row) const { return run.heads + row * (queries + 2 * keys); }

    // Norms and rotations of a row's heads; its keys and values into the cache.
    void place(int64_t row) const {
        const llmk_model& model = run.prompt.model;
        const float *sines = run.sines + row * (d / 2), *cosines = run.cosines + row * (d / 2);
        const float scaling = 1.0f / std::sqrt(static_cast<float>(d));
        float* x = row_of(row);
        for (int64_t head = 0; head < layer.heads; ++head) prepare_head(model, layer.query_norm, sines, cosines, x + head * d);
        for (int64_t i = 0; i < queries; ++i) x[i] *= scaling;
        x += queries;
        for (int64_t head = 0; head < layer.key_value_heads; ++head, x += d) {
            prepare_head(model, layer.key_norm, sines, cosines, x);
            store_new(cache, row, head, x);
            if (cache.bits != 0) store_new(states, row, head, x);
        }
    }

    void store_new(const llmk_cache& to, int64_t row, int64_t head, const float* x) const {
        const int64_t at = run.sequence(row) * to.batch_stride + head * to.head_stride +
                           (cache.length + run.token(row)) * to.token_stride;
        store_head(to, to.keys, at, x, d);
        store_head(to, to.values, at, x + keys, d);
    }

    int64_t query_tiles() const { return ceil_div(run.tokens, kQueryTokens); }
    int64_t chunks() const { return query_tiles() * run.prompt.batch * layer.key_value_heads; }

    // Some tokens of one sequence and one head of keys, the last ones first, which see most.
    void attend(int64_t chunk) const {
        const int64_t lanes = run.prompt.batch * layer.key_value_heads;
        const int64_t begin = (query_tiles() - 1 - chunk / lanes) * kQueryTokens;
        const int64_t sequence = chunk % lanes / layer.key_value_heads, head = chunk % layer.key_value_heads;
        const int64_t row = sequence * run.tokens + begin;
        const int64_t at = (sequence * states.batch_stride + head * states.head_stride) * element_bytes(states);
        static thread_local Arena arena;
        arena.clear();
        PromptAttention a = {};
        a.queries = row_of(row) + head * group * d;
        a.query_stride = queries + 2 * keys;
        a.tokens = smaller(kQueryTokens, run.tokens - begin);
        a.heads = group;
        a.head_dim = d;
        a.keys = reinterpret_cast<const uint8_t*>(states.keys + at);
        a.values = reinterpret_cast<const uint8_t*>(states.values + at);
        a.token_stride = states.token_stride;
        a.type = static_cast<int32_t>(states.type);
        a.first = cache.length + run.first + begin;
        a.window = layer.window;
        if (run.prompt.mask != nullptr) a.mask = run.prompt.mask + sequence * run.prompt.mask_stride + cache.mask_offset;
        a.output = run.attended + row * queries + head * group * d;
        a.output_stride = queries;
        a.scratch = arena.take<float>(PromptAttention::scratch_floats(a.tokens, group, d));
        kernels().attend_prompt(a);
    }
};

void attention(Team& team, const Run& run, const llmk_layer& layer, const llmk_cache& cache, const LayerStages& stages) {
    const AttentionLayer heads(run, layer, cache);
    const int64_t begin[3] = {0, heads.queries, heads.queries + heads.keys};
    fill_stage(team, stages.attention, run.rows, [&](int64_t row) { return normalized(run, layer.input_norm, row); });
    multiply_stage(team, stages.attention, [&](int i, const Part& part) {
        add_bias(*stages.attention.linear[i], part);
        copy_part(part, run.heads + begin[i], heads.queries + 2 * heads.keys);
    });
    if (cache.bits != 0 && heads.past() > 0)
        team.run(run.prompt.batch * layer.key_value_heads, [&](int64_t lane) { heads.restore(lane); });
    run_rows(team, run.rows, [&](int64_t row) { heads.place(row); });
    team.run(heads.chunks(), [&](int64_t chunk) { heads.attend(chunk); });
    fill_stage(team, stages.output, run.rows, [&](int64_t row) { return run.attended + row * heads.queries; });
    add_to_residual(team, run, stages.output);
}

// ---- the feed-forward ----

void activate_part(const Run& run, const llmk_layer& layer, const Part& gate, const float* up) {
    const int64_t width = out_features(layer.up);
    for (int64_t i = 0; i < gate.rows; ++i)
        kernels().activate(run.prompt.model.activation, gate.sums + i * gate.stride, up == nullptr ? nullptr : up + i * gate.stride,
                           gate.outputs, run.gated + (gate.first_row + i) * width + gate.first_output);
}

void feed_forward(Team& team, const Run& run, const llmk_layer& layer, const LayerStages& stages) {
    const int64_t width = out_features(layer.up);
    fill_stage(team, stages.feed, run.rows, [&](int64_t row) { return normalized(run, layer.post_norm, row); });
    if (layer.gated) {
        const Factor factors[] = {stages.feed.last(0), stages.feed.last(1)};
        multiply_paired_tiles(team, factors, [&](const Part& gate, const Part& up) {
            add_bias(layer.gate, gate);
            add_bias(layer.up, up);
            activate_part(run, layer, gate, up.sums);
        });
    } else {
        multiply_stage(team, stages.feed, [&](int, const Part& up) {
            add_bias(layer.up, up);
            activate_part(run, layer, up, nullptr);
        });
    }
    fill_stage(team, stages.down, run.rows, [&](int64_t row) { return run.gated + row * width; });
    add_to_residual(team, run, stages.down);
}

void head(Team& team, const Run& run) {
    const Call& prompt = run.prompt;
    const llmk_linear& linear = prompt.model.head;
    const int64_t vocabulary = out_features(linear);
    fill_stage(team, run.head, run.kept_rows(), [&](int64_t kept) {
        return normalized(run, prompt.model.final_norm, run.row_of_kept(kept));
    });
    multiply_stage(team, run.head, [&](int, const Part& part) {
        add_bias(linear, part);
        for (int64_t i = 0; i < part.rows; ++i) {
            const int64_t at = run.logits_of_kept(part.first_row + i) * vocabulary + part.first_output;
            const float* sums = part.sums + i * part.stride;
            if (prompt.logits_type == LLMK_TYPE_BF16)
                kernels().to_bf16(sums, part.outputs, part.outputs, static_cast<uint16_t*>(prompt.logits) + at);
            else
                std::memcpy(static_cast<float*>(prompt.logits) + at, sums, static_cast<size_t>(part.outputs) * sizeof(float));
        }
    });
}

// ---- the whole ----

// Stages one after the other in the same memory, two in turns: one is filled while another is read.
void make_stages(Run& run, Arena arenas[2]) {
    const llmk_model& model = run.prompt.model;
    run.layers.assign(static_cast<size_t>(model.layers), {});
    int64_t made = 0;
    const auto stage = [&](int64_t rows, std::initializer_list<const llmk_linear*> linears) {
        Arena& arena = arenas[made++ % 2];
        arena.clear();
        return Stage(arena, rows, model.rounds_inputs != 0, linears);
    };
    for (int32_t i = 0; i < model.layers; ++i) {
        const llmk_layer& layer = model.layer[i];
        LayerStages& stages = run.layers[i];
        if (layer.attends) {
            stages.attention = stage(run.rows, {&layer.query, &layer.key, &layer.value});
            stages.output = stage(run.rows, {&layer.output});
        }
        if (layer.feeds) {
            stages.feed = layer.gated ? stage(run.rows, {&layer.gate, &layer.up}) : stage(run.rows, {&layer.up});
            stages.down = stage(run.rows, {&layer.down});
        }
    }
    if (run.kept_rows() > 0) run.head = stage(run.kept_rows(), {&model.head});
}

int64_t restored_bytes(const Run& run) {
    const llmk_model& model = run.prompt.model;
    int64_t most = 0;
    for (int32_t i = 0; i < model.layers; ++i) {
        const llmk_cache& cache = run.prompt.caches[i];
        if (!model.layer[i].attends || cache.bits == 0) continue;
        const int64_t tokens = cache.length + run.first + run.tokens;
        most = larger(most, 2 * run.prompt.batch * model.layer[i].key_value_heads * tokens * model.head_dim *
                                type_bytes(static_cast<int32_t>(cache.type)));
    }
    return most;
}

void make_room(Run& run, Arena& arena) {
    const llmk_model& model = run.prompt.model;
    const int64_t m = run.rows, half = model.head_dim / 2;
    int64_t heads = 0, width = 0, queries = 0;
    for (int32_t i = 0; i < model.layers; ++i) {
        const llmk_layer& layer = model.layer[i];
        if (layer.attends) heads = larger(heads, (layer.heads + 2 * layer.key_value_heads) * model.head_dim);
        if (layer.attends) queries = larger(queries, layer.heads * model.head_dim);
        if (layer.feeds) width = larger(width, out_features(layer.up));
    }
    run.residual = arena.take<float>(m * model.hidden);
    run.sines = arena.take<float>(m * half);
    run.cosines = arena.take<float>(m * half);
    run.heads = arena.take<float>(m * heads);
    run.attended = arena.take<float>(m * queries);
    run.gated = arena.take<float>(m * width);
    run.restored = arena.take<uint8_t>(restored_bytes(run));
}

void begin_row(const Run& run, int64_t row) {
    const llmk_model& model = run.prompt.model;
    const int64_t at = run.sequence(row) * run.prompt.length + run.token(row), half = model.head_dim / 2;
    embed(model.embedding, run.prompt.tokens[at], run.residual + row * model.hidden);
    rotation(model, run.prompt.positions[at], run.sines + row * half, run.cosines + row * half);
}

// Whether these are the first tokens of a cache of integers: they see themselves as they are, however few they be.
bool begins_integers(const Call& prompt) {
    for (int32_t i = 0; i < prompt.model.layers; ++i)
        if (prompt.model.layer[i].attends && prompt.caches[i].bits != 0 && prompt.caches[i].length == 0) return true;
    return false;
}

// The most rows that a decoding step takes faster, by what the first layer is of.
int64_t few_rows(const llmk_model& model) {
    const llmk_layer& layer = model.layer[0];
    const llmk_matrix& w = layer.feeds ? layer.up.first : layer.query.first;
    return is_integer(w.kind) ? 16 : w.kind == LLMK_F32 ? 12 : 24;
}

void read_run(const Call& prompt, int64_t first, int64_t tokens) {
    static thread_local Arena arena, stage_arenas[2];
    const llmk_model& model = prompt.model;
    Run run{prompt, first, tokens, prompt.batch * tokens, {}, {}, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr};
    arena.clear();
    make_room(run, arena);
    make_stages(run, stage_arenas);
    make_stages(run, stage_arenas);  // again, where the memory has grown to what all need
    run_team(prompt.threads, [&](Team& team) {
        run_rows(team, run.rows, [&](int64_t row) { begin_row(run, row); });
        for (int32_t i = 0; i < model.layers; ++i) {
            if (model.layer[i].attends) attention(team, run, model.layer[i], prompt.caches[i], run.layers[i]);
            if (model.layer[i].feeds) feed_forward(team, run, model.layer[i], run.layers[i]);
        }
        if (run.kept_rows() > 0) head(team, run);
    });
}

}  // namespace
}  // namespace llmk

LLMK_API const char* llmk_read(
    const llmk_model* model, const int64_t* tokens, const int64_t* positions, int64_t batch, int64_t length,
    const llmk_cache* caches, const uint8_t* mask, int64_t mask_stride, int64_t kept, void* logits, int32_t logits_type,
    int threads) {
    using namespace llmk;
    for (int64_t i = 0; i < batch * length; ++i)
        if (tokens[i] < 0 || tokens[i] >= model->embedding.rows) return "a token is not of the vocabulary";
    try {
        const Call prompt{*model, tokens, positions, batch, length, caches, mask, mask_stride, kept, logits, logits_type,
                          threads < 1 ? 1 : threads};
        if (batch * length <= few_rows(*model) && model->rounds_inputs != 0 && !begins_integers(prompt)) {
            decode(prompt);
            return nullptr;
        }
        const int64_t step = larger(1, kRunRows / batch);
        for (int64_t first = 0; first < length; first += step) read_run(prompt, first, smaller(step, length - first));
    } catch (const std::exception&) {
        return "out of memory";
    }
    return nullptr;
}
