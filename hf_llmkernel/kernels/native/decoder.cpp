// One token of every sequence through all layers, or a few, in one call.
//
// A row's arithmetic and its order are the same whatever rows come with it: tokens checked together get the logits, to the
// bit, that they would have got one by one.
//
// Every thread runs `decode` from beginning to end; the phases in it (see pool.h) share the work. What a phase reads
// beside its own chunks (the residual stream, heads, the gated product) is written by earlier phases only, and turned
// into a matrix' inputs by each thread for itself: that costs less than another meeting of all.
//
// Shapes: M rows (tokens of all sequences), H hidden, N heads, D head_dim, P parts of the cached tokens.
#include <cmath>
#include <cstring>
#include <exception>

#include "inputs.h"
#include "model.h"
#include "pool.h"

namespace llmk {
namespace {

// A matrix that another takes the products of, and room for them.
struct Inner {
    const llmk_matrix* w;
    float* y;  // [M, rank]
};

// Linears that take the same rows, and what comes before their last matrices: first factors of low ranks and of adapters.
struct Stage {
    const llmk_linear* linear[3] = {};
    int count = 0;
    float* middle[3] = {};   // [M, rank] between the factors, where the rank is low
    float* adapted[3] = {};  // the same of adapters
    Inner inner[6] = {};
    int inner_count = 0;

    void add(const llmk_linear& more, Arena& arena, int64_t m) {
        if (is_low_rank(more)) middle[count] = add_inner(more.first, arena, m);
        if (has_adapter(more)) adapted[count] = add_inner(more.adapter_a, arena, m);
        linear[count++] = &more;
    }

  private:
    float* add_inner(const llmk_matrix& w, Arena& arena, int64_t m) {
        inner[inner_count] = {&w, arena.take<float>(m * w.rows)};
        return inner[inner_count++].y;
    }
};

// What all threads see of a call.
struct Step {
    const Call& call;
    const llmk_model& model;
    int64_t m;
    int threads;

    float* residual;   // [M, H]
    float* sines;      // [M, D / 2]
    float* cosines;
    float* heads;      // [M, queries + keys + values]
    float* partial;    // [M, N, P, D]
    float* largest;    // [M, N, P]
    float* totals;     // [M, N, P]
    float* gated;      // [M, intermediate]

    int64_t sequence(int64_t row) const { return row / call.length; }
    int64_t token(int64_t row) const { return row % call.length; }
};

int64_t wanted_chunks(const Step& step) { return step.threads * 4; }

// ---- phases of matrix products ----

// `source()` gives the rows [M, columns] of a stage, made by this thread; it may be asked twice.
template <class Source>
void first_factors(Team& team, const Step& step, const Stage& stage, Source&& source) {
    if (stage.inner_count == 0) return;
    static thread_local Arena arena;
    InputSet inputs;
    int64_t total = 0;
    for (int i = 0; i < stage.inner_count; ++i) total += blocks(*stage.inner[i].w);
    const auto prepare = [&] {
        arena.clear();
        const int64_t columns = stage.linear[0]->first.columns;
        inputs = InputSet(step.m, columns);
        for (int i = 0; i < stage.inner_count; ++i) inputs.add(arena, *stage.inner[i].w);
        inputs.read(source(), columns);
        inputs.fill(0, step.m);
    };
    const int64_t size = ceil_div(total, wanted_chunks(step));
    team.run(ceil_div(total, size), {}, prepare, [&](int64_t chunk) {
        int64_t begin = chunk * size, end = smaller(begin + size, total);
        for (int i = 0; i < stage.inner_count && begin < end; ++i) {
            const llmk_matrix& w = *stage.inner[i].w;
            const int64_t here = smaller(end, blocks(w));
            if (begin < here) {
                kernels().multiply(w, inputs.of(w), begin, here, stage.inner[i].y + begin * kBlock, w.rows);
                begin = here;
            }
            begin -= blocks(w);
            end -= blocks(w);
        }
    });
}

// The last matrices of a stage and their inputs: one set for those of one factor, one for each low rank and each adapter.
class LastFactors {
  public:
    template <class Source>
    void prepare(const Step& step, const Stage& stage, Arena& arena, Source&& source) {
        const int64_t columns = stage.linear[0]->first.columns;
        shared_ = InputSet(step.m, columns);
        bool any_shared = false;
        for (int i = 0; i < stage.count; ++i) {
            const llmk_linear& linear = *stage.linear[i];
            linear_[i] = &linear;
            if (has_adapter(linear)) adapted_[i] = own(arena, step.m, linear.adapter_b, stage.adapted[i]);
            if (!is_low_rank(linear)) {
                shared_.add(arena, linear.first);
                any_shared = true;
                continue;
            }
            inputs_[i] = own(arena, step.m, linear.second, stage.middle[i]);
        }
        if (any_shared) shared_.read(source(), columns);
        shared_.fill(0, step.m);
        for (int i = 0; i < stage.count; ++i)
            if (!is_low_rank(*stage.linear[i])) inputs_[i] = shared_.of(stage.linear[i]->first);
    }

    // Some blocks of a linear; `room` [M, rows of stride] is for what its adapter adds.
    void multiply(int i, int64_t begin, int64_t end, float* sums, int64_t stride, float* room) const {
        const llmk_linear& linear = *linear_[i];
        kernels().multiply(last_matrix(linear), inputs_[i], begin, end, sums, stride);
        if (!has_adapter(linear)) return;
        kernels().multiply(linear.adapter_b, adapted_[i], begin, end, room, stride);
        const int64_t rows = smaller(end * kBlock, linear.adapter_b.rows) - begin * kBlock;
        for (int64_t m = 0; m < adapted_[i].rows; ++m) kernels().add(room + m * stride, nullptr, rows, sums + m * stride);
    }

  private:
    static Inputs own(Arena& arena, int64_t m, const llmk_matrix& w, const float* x) {
        InputSet set(m, w.columns);
        set.add(arena, w);
        set.read(x, w.columns);
        set.fill(0, m);
        return set.of(w);
    }

    InputSet shared_;
    const llmk_linear* linear_[3] = {};
    Inputs inputs_[3], adapted_[3];
};

// What a thread reads of the last matrices of a stage that begins with this block of all.
Ahead ahead_of(const Stage& stage, int64_t block) {
    for (int i = 0; i < stage.count; ++i) {
        const llmk_matrix& w = last_matrix(*stage.linear[i]);
        if (block < blocks(w)) return {block_begin(w, block), block_begin(w, blocks(w)) - block_begin(w, block)};
        block -= blocks(w);
    }
    return {};
}

// Rows of a product, handed to `done(linear, first row, rows, sums [M, rows of stride], stride)` where they are computed.
template <class Source, class Done>
void products(Team& team, const Step& step, const Stage& stage, Source&& source, Done&& done) {
    first_factors(team, step, stage, source);
    static thread_local Arena arena;
    LastFactors factors;
    int64_t total = 0;
    for (int i = 0; i < stage.count; ++i) total += blocks(last_matrix(*stage.linear[i]));
    const int64_t size = smaller(ceil_div(total, wanted_chunks(step)), 128), stride = size * kBlock;
    float *sums = nullptr, *room = nullptr;
    const auto prepare = [&] {
        arena.clear();
        sums = arena.take<float>(step.m * stride);
        room = arena.take<float>(step.m * stride);
        factors.prepare(step, stage, arena, source);
    };
    team.run(ceil_div(total, size), ahead_of(stage, team.first_chunk() * size), prepare, [&](int64_t chunk) {
        int64_t begin = chunk * size, end = smaller(begin + size, total);
        for (int i = 0; i < stage.count && begin < end; ++i) {
            const llmk_matrix& w = last_matrix(*stage.linear[i]);
            const int64_t here = smaller(end, blocks(w));
            if (begin < here) {
                factors.multiply(i, begin, here, sums, stride, room);
                done(i, begin * kBlock, smaller(here * kBlock, w.rows) - begin * kBlock, sums, stride);
                begin = here;
            }
            begin -= blocks(w);
            end -= blocks(w);
        }
    });
}

// The same for two linears of one shape whose rows are needed together.
template <class Source, class Done>
void paired_products(Team& team, const Step& step, const Stage& stage, Source&& source, Done&& done) {
    first_factors(team, step, stage, source);
    static thread_local Arena arena;
    LastFactors factors;
    const int64_t total = blocks(last_matrix(*stage.linear[0])), rows = out_features(*stage.linear[0]);
    const int64_t size = smaller(ceil_div(total, wanted_chunks(step)), 128), stride = size * kBlock;
    float *sums = nullptr, *room = nullptr;
    const auto prepare = [&] {
        arena.clear();
        sums = arena.take<float>(2 * step.m * stride);
        room = arena.take<float>(step.m * stride);
        factors.prepare(step, stage, arena, source);
    };
    team.run(ceil_div(total, size), ahead_of(stage, team.first_chunk() * size), prepare, [&](int64_t chunk) {
        const int64_t begin = chunk * size, end = smaller(begin + size, total);
        float* second = sums + step.m * stride;
        factors.multiply(0, begin, end, sums, stride, room);
        factors.multiply(1, begin, end, second, stride, room);
        done(begin * kBlock, smaller(end * kBlock, rows) - begin * kBlock, sums, second, stride);
    });
}

// A thread's own [rows, H] of the normalized residual stream, of all rows or of those that have logits.
const float* normalized(const Step& step, const float* weight, bool kept = false) {
    static thread_local Arena arena;
    arena.clear();
    const int64_t hidden = step.model.hidden, each = kept ? step.call.kept : step.call.length;
    float* y = arena.take<float>(step.call.batch * each * hidden);
    for (int64_t i = 0; i < step.call.batch * each; ++i) {
        const int64_t row = (i / each + 1) * step.call.length - each + i % each;
        kernels().rms_norm(step.residual + row * hidden, weight, step.model.epsilon, hidden, y + i * hidden);
    }
    return y;
}

template <class Source>
void add_to_residual(Team& team, const Step& step, const Stage& stage, Source&& source) {
    const float* bias = stage.linear[0]->bias;
    products(team, step, stage, source, [&](int, int64_t row, int64_t rows, const float* sums, int64_t stride) {
        for (int64_t i = 0; i < step.m; ++i)
            kernels().add(sums + i * stride, bias == nullptr ? nullptr : bias + row, rows,
                          step.residual + i * step.model.hidden + row);
    });
}

// ---- attention ----

// The cached tokens that a new one sees, itself included, in parts.
struct Seen {
    int64_t first, tokens;
    int64_t parts, part_tokens;
};

// One layer's view of the cached tokens and of the heads just computed.
struct AttentionLayer {
    const Step& step;
    const llmk_layer& layer;
    const llmk_cache& cache;
    int64_t queries, keys;  // widths
    int64_t group;          // heads that share keys
    int64_t parts;          // the most of any new token

    AttentionLayer(const Step& s, const llmk_layer& l, const llmk_cache& c) : step(s), layer(l), cache(c) {
        const int64_t d = step.model.head_dim;
        queries = layer.heads * d;
        keys = layer.key_value_heads * d;
        group = layer.heads / layer.key_value_heads;
        parts = 0;
        for (int64_t token = 0; token < step.call.length; ++token) parts = larger(parts, seen(token).parts);
    }

    Seen seen(int64_t token) const {
        const int64_t before = cache.length + token;
        Seen seen;
        seen.first = layer.window > 0 ? larger(0, before + 1 - layer.window) : 0;
        seen.tokens = before + 1 - seen.first;
        const int64_t wanted = ceil_div(wanted_chunks(step), step.call.batch * layer.key_value_heads);
        seen.part_tokens = larger(64, round_up(ceil_div(seen.tokens, wanted), 64));
        seen.parts = ceil_div(seen.tokens, seen.part_tokens);
        return seen;
    }

    static int64_t most_parts(const Step& step) { return wanted_chunks(step); }
    int64_t chunks() const { return step.m * layer.key_value_heads * parts; }
    float* row_of(int64_t row) const { return step.heads + row * (queries + 2 * keys); }

    // One part of the tokens that a row sees, and one head of keys. Rows of a sequence follow each other, which read the same.
    void run(int64_t chunk) const {
        const int64_t d = step.model.head_dim, token = chunk % step.call.length;
        chunk /= step.call.length;
        const int64_t part = chunk % parts, head = chunk / parts % layer.key_value_heads;
        const int64_t sequence = chunk / parts / layer.key_value_heads, row = sequence * step.call.length + token;
        const Seen seen = this->seen(token);
        if (part >= seen.parts) return;
        const int64_t begin = seen.first + part * seen.part_tokens;
        const int64_t end = smaller(begin + seen.part_tokens, seen.first + seen.tokens);
        if (part == seen.parts - 1 && step.call.length == 1) store_new(row, head);

        static thread_local Arena arena;
        arena.clear();
        float* query = arena.take<float>(group * d);
        float* output = arena.take<float>(group * d);
        float* largest = arena.take<float>(group);
        float* total = arena.take<float>(group);
        for (int64_t i = 0; i < group; ++i) prepare_query(row, head * group + i, query + i * d);
        const int64_t bytes = element_bytes(cache);
        const int64_t at = (sequence * cache.batch_stride + head * cache.head_stride + begin * cache.token_stride) * bytes;
        const uint8_t* mask = step.call.mask;
        if (mask != nullptr) mask += sequence * step.call.mask_stride + cache.mask_offset + begin;
        kernels().attend({query, group, d, reinterpret_cast<const uint8_t*>(cache.keys + at),
                          reinterpret_cast<const uint8_t*>(cache.values + at), cache.token_stride,
                          static_cast<int32_t>(cache.type), end - begin, mask, output, largest, total,
                          rounding_of(cache, d), d, head_bytes(cache, d)});
        for (int64_t i = 0; i < group; ++i) {
            const int64_t to = (row * layer.heads + head * group + i) * parts + part;
            std::memcpy(step.partial + to * d, output + i * d, static_cast<size_t>(d) * sizeof(float));
            step.largest[to] = largest[i];
            step.totals[to] = total[i];
        }
    }

    void prepare_query(int64_t row, int64_t head, float* query) const {
        const int64_t d = step.model.head_dim, half = d / 2;
        std::memcpy(query, row_of(row) + head * d, static_cast<size_t>(d) * sizeof(float));
        if (layer.query_norm != nullptr) kernels().rms_norm(query, layer.query_norm, step.model.epsilon, d, query);
        rotate(query, step.sines + row * half, step.cosines + row * half, d);
        const float scaling = 1.0f / std::sqrt(static_cast<float>(d));
        for (int64_t i = 0; i < d; ++i) query[i] *= scaling;
    }

    // A new token's key and value, into the cache.
    void store_new(int64_t row, int64_t head) const {
        const int64_t d = step.model.head_dim, half = d / 2;
        float* key = row_of(row) + queries + head * d;
        if (layer.key_norm != nullptr) kernels().rms_norm(key, layer.key_norm, step.model.epsilon, d, key);
        rotate(key, step.sines + row * half, step.cosines + row * half, d);
        const int64_t at = step.sequence(row) * cache.batch_stride + head * cache.head_stride +
                           (cache.length + step.token(row)) * cache.token_stride;
        store_head(cache, cache.keys, at, key, d);
        store_head(cache, cache.values, at, row_of(row) + queries + keys + head * d, d);
    }

    // A thread's own [M, N D] of what all parts have attended.
    const float* combined() const {
        static thread_local Arena arena;
        arena.clear();
        float* y = arena.take<float>(step.m * queries);
        const int64_t d = step.model.head_dim;
        for (int64_t row = 0; row < step.m; ++row) {
            const int64_t own = seen(step.token(row)).parts;
            for (int64_t head = row * layer.heads; head < (row + 1) * layer.heads; ++head) combine(head * parts, own, y + head * d);
        }
        return y;
    }

    void combine(int64_t from, int64_t parts, float* y) const {
        const int64_t d = step.model.head_dim;
        float largest = -INFINITY, total = 0;
        for (int64_t p = 0; p < parts; ++p) largest = std::fmax(largest, step.largest[from + p]);
        for (int64_t i = 0; i < d; ++i) y[i] = 0;
        for (int64_t p = 0; p < parts; ++p) {
            if (step.largest[from + p] == -INFINITY) continue;
            const float scale = std::exp(step.largest[from + p] - largest);
            total += scale * step.totals[from + p];
            for (int64_t i = 0; i < d; ++i) y[i] += scale * step.partial[(from + p) * d + i];
        }
        for (int64_t i = 0; total > 0 && i < d; ++i) y[i] /= total;
    }
};

void attention(Team& team, const Step& step, const llmk_layer& layer, const llmk_cache& cache, const Stage stages[2]) {
    const AttentionLayer heads(step, layer, cache);
    const int64_t begin[3] = {0, heads.queries, heads.queries + heads.keys};
    const auto source = [&] { return normalized(step, layer.input_norm); };
    products(team, step, stages[0], source, [&](int i, int64_t row, int64_t rows, const float* sums, int64_t stride) {
        const float* bias = stages[0].linear[i]->bias;
        for (int64_t input = 0; input < step.m; ++input) {
            float* y = heads.row_of(input) + begin[i] + row;
            std::memcpy(y, sums + input * stride, static_cast<size_t>(rows) * sizeof(float));
            if (bias != nullptr) kernels().add(bias + row, nullptr, rows, y);
        }
    });
    if (step.call.length > 1)  // all keys before the queries that see them
        team.run(step.m * layer.key_value_heads, [&](int64_t chunk) {
            heads.store_new(chunk / layer.key_value_heads, chunk % layer.key_value_heads);
        });
    team.run(heads.chunks(), [&](int64_t chunk) { heads.run(chunk); });
    add_to_residual(team, step, stages[1], [&] { return heads.combined(); });
}

// ---- the feed-forward ----

void feed_forward(Team& team, const Step& step, const llmk_layer& layer, const Stage stages[2]) {
    const int64_t width = out_features(layer.up);
    const auto source = [&] { return normalized(step, layer.post_norm); };
    const auto with_bias = [&](const llmk_linear& linear, int64_t row, int64_t rows, float* sums) {
        if (linear.bias != nullptr) kernels().add(linear.bias + row, nullptr, rows, sums);
    };
    if (layer.gated) {
        paired_products(team, step, stages[0], source, [&](int64_t row, int64_t rows, float* gate, float* up, int64_t stride) {
            for (int64_t i = 0; i < step.m; ++i) {
                with_bias(layer.gate, row, rows, gate + i * stride);
                with_bias(layer.up, row, rows, up + i * stride);
                kernels().activate(step.model.activation, gate + i * stride, up + i * stride, rows, step.gated + i * width + row);
            }
        });
    } else {
        products(team, step, stages[0], source, [&](int, int64_t row, int64_t rows, float* up, int64_t stride) {
            for (int64_t i = 0; i < step.m; ++i) {
                with_bias(layer.up, row, rows, up + i * stride);
                kernels().activate(step.model.activation, up + i * stride, nullptr, rows, step.gated + i * width + row);
            }
        });
    }
    add_to_residual(team, step, stages[1], [&] { return static_cast<const float*>(step.gated); });
}

// `step` with the rows that have logits.
void head(Team& team, const Step& step, const Stage& stage) {
    const int64_t vocabulary = out_features(step.model.head);
    const float* bias = step.model.head.bias;
    const auto source = [&] { return normalized(step, step.model.final_norm, true); };
    products(team, step, stage, source, [&](int, int64_t row, int64_t rows, float* sums, int64_t stride) {
        for (int64_t i = 0; i < step.m; ++i) {
            if (bias != nullptr) kernels().add(bias + row, nullptr, rows, sums + i * stride);
            const int64_t at = i * vocabulary + row;
            if (step.call.logits_type == LLMK_TYPE_BF16)
                kernels().to_bf16(sums + i * stride, rows, rows, static_cast<uint16_t*>(step.call.logits) + at);
            else
                std::memcpy(static_cast<float*>(step.call.logits) + at, sums + i * stride, static_cast<size_t>(rows) * sizeof(float));
        }
    });
}

// ---- the whole ----

// Room for what all threads share, and what stands before the first phase: embeddings, sines and cosines.
void make_room(Step& step, Arena& arena) {
    const llmk_model& model = step.model;
    const int64_t m = step.m, d = model.head_dim;
    int64_t heads = 0, width = 0, queries = 0;
    for (int32_t i = 0; i < model.layers; ++i) {
        const llmk_layer& layer = model.layer[i];
        if (layer.attends) heads = larger(heads, (layer.heads + 2 * layer.key_value_heads) * d);
        if (layer.attends) queries = larger(queries, layer.heads);
        if (layer.feeds) width = larger(width, out_features(layer.up));
    }
    const int64_t parts = m * queries * AttentionLayer::most_parts(step);
    step.residual = arena.take<float>(m * model.hidden);
    step.sines = arena.take<float>(m * d / 2);
    step.cosines = arena.take<float>(m * d / 2);
    step.heads = arena.take<float>(m * heads);
    step.partial = arena.take<float>(parts * d);
    step.largest = arena.take<float>(parts);
    step.totals = arena.take<float>(parts);
    step.gated = arena.take<float>(m * width);
    for (int64_t i = 0; i < m; ++i) {
        embed(model.embedding, step.call.tokens[i], step.residual + i * model.hidden);
        rotation(model, step.call.positions[i], step.sines + i * (d / 2), step.cosines + i * (d / 2));
    }
}

}  // namespace

void decode(const Call& call) {
    const llmk_model& model = call.model;
    Step step{call, model, call.batch * call.length, call.threads,
              nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr};
    static thread_local Arena arena;
    arena.clear();
    make_room(step, arena);
    std::vector<Stage> stages(static_cast<size_t>(4 * model.layers + 1));
    for (int32_t i = 0; i < model.layers; ++i) {
        const llmk_layer& layer = model.layer[i];
        Stage* of_layer = &stages[4 * i];
        if (layer.attends) {
            for (const llmk_linear* linear : {&layer.query, &layer.key, &layer.value}) of_layer[0].add(*linear, arena, step.m);
            of_layer[1].add(layer.output, arena, step.m);
        }
        if (layer.feeds) {
            if (layer.gated) of_layer[2].add(layer.gate, arena, step.m);
            of_layer[2].add(layer.up, arena, step.m);
            of_layer[3].add(layer.down, arena, step.m);
        }
    }
    Step kept = step;
    kept.m = call.batch * call.kept;
    stages.back().add(model.head, arena, kept.m);
    run_team(step.threads, [&](Team& team) {
        for (int32_t i = 0; i < model.layers; ++i) {
            if (model.layer[i].attends) attention(team, step, model.layer[i], call.caches[i], &stages[4 * i]);
            if (model.layer[i].feeds) feed_forward(team, step, model.layer[i], &stages[4 * i + 2]);
        }
        if (kept.m > 0) head(team, kept, stages.back());
    });
}

}  // namespace llmk

LLMK_API const char* llmk_decode(
    const llmk_model* model, const int64_t* tokens, const int64_t* positions, int64_t batch, const llmk_cache* caches,
    const uint8_t* mask, int64_t mask_stride, void* logits, int32_t logits_type, int threads) {
    for (int64_t i = 0; i < batch; ++i)
        if (tokens[i] < 0 || tokens[i] >= model->embedding.rows) return "a token is not of the vocabulary";
    try {
        llmk::decode({*model, tokens, positions, batch, 1, caches, mask, mask_stride, 1, logits, logits_type,
                      threads < 1 ? 1 : threads});
    } catch (const std::exception&) {
        return "out of memory";
    }
    return nullptr;
}
